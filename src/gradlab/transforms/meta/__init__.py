"""Meta-gradients: derivatives through the adaptation of parameters to a task, and of many tasks at once.

Contracts only; `_jax.py` and `_torch.py` implement them in this order. An adaptation is φ = params after K steps of
an optimiser on an inner loss; what is wanted is the gradient of an outer loss of φ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradlab._dispatch import operation
from gradlab.transforms.meta.plan import Method

__all__ = ["adapt", "bilevel_grad", "bilevel_value_and_grad", "maml_grad", "meta_grad", "meta_value_and_grad"]


@operation
def adapt(
    loss: Callable[..., Any],
    params: Any,
    *data: Any,
    optimizer: Any,
    steps: int,
    method: Method = "unroll",
    mask: Any = None,
    last: int | None = None,
    proximal: float | None = None,
    cg_steps: int | None = None,
    state: Any = None,
) -> Any:
    """Parameters adapted to data by steps of an optimiser: the inner loop, as a function that can be differentiated.

    φ₀ = params, φᵢ₊₁ = φᵢ + update(∇loss(φᵢ, *data)), for i = 0 ... steps - 1. The derivative is in params, in data,
    and in whatever loss and optimizer are made of: learned rates, losses, weights.

    Args:
        loss: Function `loss(params, *data)` to one float; with state `loss(params, state, *data)` to
            `(value, state)`.
        params: A tree; its float arrays are adapted, other leaves are held constant.
        *data: Handed to loss as they are.
        optimizer: A pair of pure functions: one of `gradlab.optimizers`, in jax any optax transformation that asks for
            gradients, state and params alone; or a function of params that gives one, for rates that are learned.
            Its square roots have slope 0 at zero (a clipped norm still has none, as in optax: not-a-number).
        steps: K ≥ 1.
        method: How φ depends on params. `"unroll"`: as computed, exactly. `"checkpoint"`: the same, with about 2 √K
            steps kept and each run once more. `"truncate"`: with the gradients of all steps but the `last` held
            constant. `"first_order"`: with all of them held constant. `"implicit"`: as the minimum of
            loss + proximal/2 ‖φ - params‖², of which the steps are taken to be a solution. What is held constant
            is so in every further derivative too: those are of the formula, not of the numbers that it gives.
        mask: Tree of True (adapted) and False (held), of the structure of params or of its upper part. What is
            held is handed to loss too, and differentiated. None: all True.
        last: Steps of `"truncate"` that are differentiated, 1 ≤ last ≤ steps.
        proximal: Strength of the proximal term of `"implicit"`, ≥ 0. With 0, φ does not depend on params.
        cg_steps: Steps of conjugate gradients in the derivative of `"implicit"`, whatever residual they leave.
            None: as many as it takes to a residual of ε^⅔ (4e-11 in float64), else a ConvergenceError.
        state: Tree of arrays handed from step to step: statistics, a random key, a counter. None: no state. Torch has
            no keys: draw what is random outside, and hand it in as data or state.

    Returns:
        A tree like params; with state `(tree, last state)`.

    Raises:
        InputError: no steps, an unknown method or one without its option, a mask that does not fit, a rate that is
            negative or not-a-number, updates unlike params, a state that changes its form, a loss that is not scalar,
            an optimiser whose updates have no derivative, a state with `"implicit"`.
        KindError: an optimiser that is no pair of functions (torch.optim), a state that holds other than arrays.
        ConvergenceError: conjugate gradients, as above; raised by jax while it runs, as a RuntimeError of its own.
        StrategyError: in torch `"checkpoint"` where loss or optimizer close over a tensor that is being
            differentiated; `"implicit"` under torch.compile.
        BackendError: arrays of both frameworks, or of neither.

    Cost:
        K gradients of loss. Differentiated: K Hessian-vector products, and memory of K steps (`"unroll"`), of 2 √K and
        K more gradients (`"checkpoint"`), of `last` steps; one gradient (`"first_order"`); about cg_steps products
        and memory of one step (`"implicit"`). In jax more than 5 steps are a jax.lax.scan, which compiles anew at
        each call outside of jax.jit.

    Example:
        >>> import torch
        >>> from gradlab import adapt, optimizers
        >>> x = torch.tensor(1.0)
        >>> halved = lambda x: adapt(lambda x: x**2, x, optimizer=optimizers.sgd(0.25), steps=3)  # x / 8
        >>> halved(x), torch.func.grad(halved)(x)
        (tensor(0.1250), tensor(0.1250))
        >>> import jax, jax.numpy as jnp
        >>> rate = lambda r: adapt(lambda x: x**2, jnp.array(1.0), optimizer=optimizers.sgd(r), steps=1)  # 1 - 2 r
        >>> print(jax.grad(rate)(0.25))
        -2.0

    Source:
        Finn, Abbeel and Levine, ICML 2017, arXiv:1703.03400; Shaban et al., AISTATS 2019, arXiv:1810.10667
        (truncation); Rajeswaran et al., NeurIPS 2019, arXiv:1909.04630 (the implicit gradient).
    """


@operation
def meta_grad(
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    params: Any,
    tasks: Any,
    *,
    optimizer: Any,
    steps: int,
    method: Method = "unroll",
    mask: Any = None,
    last: int | None = None,
    proximal: float | None = None,
    cg_steps: int | None = None,
    state: Any = None,
    chunk_size: int | None = None,
) -> Any:
    """The gradient of the mean outer loss over tasks after each task's own adaptation.

    ∇ mean_t outer_loss(φ_t, *query_t) with φ_t = adapt(inner_loss, params, *support_t), all tasks at once.

    Args:
        inner_loss: Function `inner_loss(params, *support)` of one task to one float; with state
            `inner_loss(params, state, *support)` to `(value, state)`.
        outer_loss: The same of the query.
        params: A tree; the gradient is taken in its float arrays. Rates, losses and weights that are learned stand in
            it beside what is adapted, with False in the mask.
        tasks: `(support, query)`, each a tuple of trees of arrays with the same leading axis of T tasks.
        optimizer: As for `adapt`; a function of params where rates are learned (Meta-SGD).
        steps: As for `adapt`.
        method: As for `adapt`; and `"reptile"`: params - φ_t for the gradient of task t.
        mask: As for `adapt`; ANIL adapts the head alone.
        last: As for `adapt`.
        proximal: As for `adapt`, > 0 for a gradient in what is adapted.
        cg_steps: As for `adapt`.
        state: As for `adapt`, a state for each task: arrays with the leading axis of tasks.
        chunk_size: Tasks at once; None: all.

    Returns:
        A tree like params, in the units of the outer loss divided by those of params; None where params holds a
        constant. Zero where a leaf has no influence (a rate, with `"reptile"`).

    Raises:
        InputError: no tasks, leading axes that disagree, a chunk_size that is not positive; as for `adapt`.
        KindError, ConvergenceError, StrategyError, BackendError: as for `adapt`.

    Cost:
        As for `adapt`, for chunk_size tasks at once. In torch as fast as `torch.func.grad` of a hand-written
        `vmap`, and 4 times faster compiled; put `jax.jit` or `torch.compile` around the call.

    Example:
        >>> import torch
        >>> from gradlab import meta_grad, optimizers
        >>> loss = lambda x, target: (x - target) ** 2 / 2
        >>> targets = torch.tensor([1.0, 3.0])
        >>> gradient = lambda method: meta_grad(
        ...     loss, loss, torch.tensor(0.0), ((targets,), (targets,)), optimizer=optimizers.sgd(0.5), steps=1,
        ...     method=method,
        ... )
        >>> gradient("unroll"), gradient("first_order")  # φ = target / 2: mean (φ - target) / 2, and without the half
        (tensor(-0.5000), tensor(-1.))

    Source:
        Finn, Abbeel and Levine, ICML 2017, arXiv:1703.03400; Nichol, Achiam and Schulman, arXiv:1803.02999 (Reptile);
        Rajeswaran et al., arXiv:1909.04630; Li et al., arXiv:1707.09835 (Meta-SGD); Raghu et al., ICLR 2020,
        arXiv:1909.09157 (ANIL).
    """


@operation
def meta_value_and_grad(
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    params: Any,
    tasks: Any,
    *,
    optimizer: Any,
    steps: int,
    method: Method = "unroll",
    mask: Any = None,
    last: int | None = None,
    proximal: float | None = None,
    cg_steps: int | None = None,
    state: Any = None,
    chunk_size: int | None = None,
    report: bool = False,
) -> Any:
    """The mean outer loss after adaptation, and its gradient as by `meta_grad`.

    Args:
        inner_loss: As for `meta_grad`.
        outer_loss: As for `meta_grad`.
        params: As for `meta_grad`.
        tasks: As for `meta_grad`.
        optimizer: As for `meta_grad`.
        steps: As for `meta_grad`.
        method: As for `meta_grad`.
        mask: As for `meta_grad`.
        last: As for `meta_grad`.
        proximal: As for `meta_grad`.
        cg_steps: As for `meta_grad`.
        state: As for `meta_grad`.
        chunk_size: As for `meta_grad`.
        report: Whether to return what is known of each task.

    Returns:
        `(value, gradient)`, or with report `(value, gradient, report)`, a dict of arrays (T, ...): `"loss"`, the outer
        loss of each task; `"state"`, its last state, if any; of `"implicit"` `"residual"`, ‖A x - u‖/‖u‖ of the
        linear system with A = ∇² of the proximal loss and u = ∇outer_loss, and `"stationarity"`, the norm of the
        proximal loss's gradient at φ_t, which the method takes to be zero.

    Raises:
        InputError, KindError, ConvergenceError, StrategyError, BackendError: as for `meta_grad`.

    Cost:
        As for `meta_grad`.

    Example:
        >>> import jax.numpy as jnp
        >>> from gradlab import meta_value_and_grad, optimizers
        >>> loss = lambda x, target: (x - target) ** 2 / 2
        >>> tasks = (jnp.array([1.0, 3.0]),), (jnp.array([1.0, 3.0]),)
        >>> value, gradient, report = meta_value_and_grad(
        ...     loss, loss, jnp.array(0.0), tasks, optimizer=optimizers.sgd(0.5), steps=40, method="implicit",
        ...     proximal=1.0, report=True,
        ... )
        >>> print(value, gradient, report["loss"])  # φ = target / 2
        0.625 -0.5 [0.125 1.125]

    Source:
        As for `meta_grad`.
    """


@operation
def maml_grad(
    loss: Callable[..., Any],
    params: Any,
    tasks: Any,
    *,
    inner_lr: Any,
    steps: int,
    method: Method = "unroll",
    chunk_size: int | None = None,
) -> Any:
    """The MAML gradient: of the mean query loss after gradient descent on the support.

    `meta_grad(loss, loss, params, tasks, optimizer=optimizers.sgd(inner_lr), steps=steps, ...)`.

    Args:
        loss: Function `loss(params, *data)` to one float, of the support and of the query.
        params: As for `meta_grad`.
        tasks: As for `meta_grad`.
        inner_lr: The rate, or rates, of `optimizers.sgd`.
        steps: As for `meta_grad`.
        method: As for `meta_grad`; those that need an option are for `meta_grad`.
        chunk_size: As for `meta_grad`.

    Returns:
        A tree like params.

    Raises:
        InputError, KindError, StrategyError, BackendError: as for `meta_grad`.

    Cost:
        As for `meta_grad`.

    Example:
        >>> import torch
        >>> from gradlab import maml_grad
        >>> loss = lambda x, target: (x - target) ** 2 / 2
        >>> targets = torch.tensor([1.0, 3.0])
        >>> maml_grad(loss, torch.tensor(0.0), ((targets,), (targets,)), inner_lr=0.5, steps=1)
        tensor(-0.5000)

    Source:
        Finn, Abbeel and Levine, ICML 2017, arXiv:1703.03400.
    """


@operation
def bilevel_grad(
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    meta: Any,
    params: Any,
    data: Any,
    *,
    optimizer: Any,
    steps: int,
    method: Method = "unroll",
    last: int | None = None,
    proximal: float | None = None,
    cg_steps: int | None = None,
    state: Any = None,
) -> Any:
    """The gradient of an outer loss in hyperparameters, through the training that they direct.

    ∂/∂meta outer_loss(φ, meta, *outer_data) with φ = params after `steps` of inner_loss(φ, meta, *inner_data):
    regularisation, weights of examples, learned losses, rates.

    Args:
        inner_loss: Function `inner_loss(params, meta, *inner_data)` to one float; with state
            `inner_loss(params, meta, state, *inner_data)` to `(value, state)`.
        outer_loss: Function `outer_loss(params, meta, *outer_data)`.
        meta: A tree of hyperparameters; the gradient is taken in its float arrays.
        params: Where training starts; not differentiated.
        data: `(inner_data, outer_data)`, tuples.
        optimizer: As for `adapt`, of params alone; a function of meta where it is learned.
        steps: As for `adapt`.
        method: As for `adapt`, without `"first_order"`; `"implicit"` takes φ for a minimum.
        last: As for `adapt`.
        proximal: As for `adapt`; None: 0.
        cg_steps: As for `adapt`.
        state: As for `adapt`.

    Returns:
        A tree like meta.

    Raises:
        InputError, KindError, ConvergenceError, BackendError: as for `adapt`.
        StrategyError: `"first_order"` and `"reptile"`, which hold constant what meta is felt through.

    Cost:
        As for `adapt`.

    Example:
        >>> import torch
        >>> from gradlab import bilevel_grad, optimizers
        >>> inner = lambda w, a: (w - 1.0) ** 2 + a * w**2  # w = 1 / (1 + a)
        >>> outer = lambda w, a: w
        >>> bilevel_grad(
        ...     inner, outer, torch.tensor(1.0), torch.tensor(0.0), ((), ()), optimizer=optimizers.sgd(0.25), steps=1,
        ...     method="implicit",
        ... )
        tensor(-0.2500)

    Source:
        Bengio, Neural Computation 12 (2000), doi:10.1162/089976600300015187; Franceschi et al., ICML 2018,
        arXiv:1806.04910; Lorraine, Vicol and Duvenaud, AISTATS 2020, arXiv:1911.02590.
    """


@operation
def bilevel_value_and_grad(
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    meta: Any,
    params: Any,
    data: Any,
    *,
    optimizer: Any,
    steps: int,
    method: Method = "unroll",
    last: int | None = None,
    proximal: float | None = None,
    cg_steps: int | None = None,
    state: Any = None,
    report: bool = False,
) -> Any:
    """The outer loss after training, and its gradient as by `bilevel_grad`.

    Args:
        inner_loss: As for `bilevel_grad`.
        outer_loss: As for `bilevel_grad`.
        meta: As for `bilevel_grad`.
        params: As for `bilevel_grad`.
        data: As for `bilevel_grad`.
        optimizer: As for `bilevel_grad`.
        steps: As for `bilevel_grad`.
        method: As for `bilevel_grad`.
        last: As for `bilevel_grad`.
        proximal: As for `bilevel_grad`.
        cg_steps: As for `bilevel_grad`.
        state: As for `bilevel_grad`.
        report: As for `meta_value_and_grad`, of the one task, without its axis.

    Returns:
        `(value, gradient)`, or `(value, gradient, report)`.

    Raises:
        InputError, KindError, ConvergenceError, StrategyError, BackendError: as for `bilevel_grad`.

    Cost:
        As for `bilevel_grad`.

    Example:
        >>> import jax.numpy as jnp
        >>> from gradlab import bilevel_value_and_grad, optimizers
        >>> value, gradient = bilevel_value_and_grad(
        ...     lambda w, a: (w - 1.0) ** 2 + a * w**2, lambda w, a: w, jnp.array(1.0), jnp.array(0.0), ((), ()),
        ...     optimizer=optimizers.sgd(0.25), steps=1, method="implicit",
        ... )
        >>> print(value, gradient)
        0.5 -0.25

    Source:
        As for `bilevel_grad`.
    """
