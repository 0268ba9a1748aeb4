"""Optimisers as pure functions, differentiable in everything: gradients, parameters and rates.

Contracts only; `_jax.py` and `_torch.py` implement them in this order. An optimiser is a pair of functions, of the
shape that optax has: `state = init(params)`, `updates, state = update(gradients, state, params)`, and the next
parameters are params + updates. In jax any optax transformation is one too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple, TypeVar

from gradlab._dispatch import framework_of
from gradlab._errors import InputError, KindError

__all__ = ["adam", "adamw", "rmsprop", "sgd"]

Contract = TypeVar("Contract", bound=Callable[..., Any])


BELOW = {"b1": 1.0, "b2": 1.0, "decay": 1.0}  # and finite, what is named in none
OPTIONS = {*BELOW, "momentum", "eps", "eps_root", "weight_decay", "initial_scale"}  # that are numbers


class Optimizer(NamedTuple):
    """`init(params) -> state` and `update(gradients, state, params) -> (updates, state)`."""

    init: Callable[..., Any]
    update: Callable[..., Any]


def by_framework(contract: Contract) -> Contract:
    """Make the public function of a contract: its optimiser looks at the parameters for their framework."""
    name, parameters = contract.__name__, tuple(signature(contract).parameters)

    @wraps(contract)
    def declared(rate: Any, *args: Any, **options: Any) -> Optimizer:
        check_rate(name, rate)
        check_options(name, **dict(zip(parameters, (rate, *args), strict=False)), **options)

        def of(tree: Any) -> Any:
            if framework_of(f"optimizers.{name}", (tree,)) == "torch":
                import gradlab.torch as namespace
            else:
                import gradlab.jax as namespace  # type: ignore[no-redef]
            return getattr(namespace.optimizers, name)(rate, *args, **options)

        return Optimizer(
            lambda params: of(params).init(params),
            lambda gradients, state, params=None: of(gradients).update(gradients, state, params),
        )

    return declared  # type: ignore[return-value]


def check_rate(op: str, rate: Any) -> None:
    """Refuse what is no rate; trees, arrays and schedules are looked at where their framework is known."""
    if rate is None or isinstance(rate, (str, complex)):
        raise KindError(
            f"{op}: rate is {rate!r}; pass a number, a tree like params of numbers or arrays, or a function of the step"
        )
    check_number(op, "rate", rate)


def check_options(op: str, **options: Any) -> None:
    """Refuse decays and sizes that are none; arrays, which may be learned, pass."""
    for name, value in options.items():
        if name not in OPTIONS or (value is None and name == "momentum"):
            continue
        if not isinstance(value, (int, float)) and not hasattr(value, "shape"):
            raise KindError(f"{op}: {name} is a {type(value).__name__}; pass a number or an array")
        check_number(op, name, value)


def check_number(op: str, name: str, value: Any) -> None:
    """Refuse a number outside of its range; what is no number passes."""
    below = BELOW.get(name, math.inf)
    if isinstance(value, (int, float)) and not 0 <= value < below:
        needed = "a finite number that is not negative" if below == math.inf else "a number from 0 to below 1"
        raise InputError(f"{op}: {name} is {value}; pass {needed}")


def check_mask(op: str, flags: list[Any], count: int, meaning: str) -> None:
    """Refuse a mask that is not one flag for each of so many leaves."""
    import numpy as np  # here, that importing gradlab stays light

    if len(flags) != count or not all(isinstance(flag, (bool, np.bool_)) for flag in flags):
        raise InputError(
            f"{op}: mask does not fit params; pass a tree of {meaning} with the structure "
            "of params or of its upper part"
        )


@by_framework
def sgd(rate: Any, momentum: Any = None, nesterov: bool = False) -> Optimizer:
    """Gradient descent: u = -rate g, with momentum t ← g + momentum t and u = -rate t.

    Args:
        rate: A number; a tree like params of numbers or arrays, a rate for each parameter; or a function of the
            step's number 0, 1, ... that gives either. What it is made of can be differentiated: learned rates.
        momentum: A number, or None.
        nesterov: Whether u = -rate (g + momentum t) with the new t.

    Returns:
        An `Optimizer`. Its state is a tree of arrays.

    Raises:
        InputError: a rate or another number that is negative, infinite or not-a-number, where it can be seen (of a
            schedule at every step; in jax at the first); a tree of rates that does not fit the parameters.
        KindError: what is no rate, or no number.

    Cost:
        One or two operations a leaf.

    Example:
        >>> import torch
        >>> from gradlab import optimizers
        >>> descent = optimizers.sgd(0.5)
        >>> x = torch.tensor([1.0, 2.0])
        >>> descent.update(2 * x, descent.init(x), x)[0]
        tensor([-1., -2.])

    Source:
        Sutskever et al., ICML 2013 (Nesterov's momentum in this form); the semantics are those of optax.sgd.
    """


@by_framework
def adam(
    rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    *,
    nesterov: bool = False,
) -> Optimizer:
    """Adam: u = -rate m̂ / (√(v̂ + eps_root) + eps), with m̂ and v̂ the corrected means of g and g².

    Differentiated at a gradient of zero, the plain formula gives 0 · ∞, not-a-number; here the root has slope 0 at
    zero, which leaves the true derivative -rate/eps · ∂g of the first step. With eps = 1e-8 that is a large number:
    pass eps_root, as large as the square of the smallest gradient that matters, where it does harm.

    Args:
        rate: As for `sgd`.
        b1: Decay of the mean of g, from 0 to below 1.
        b2: Decay of the mean of g², likewise.
        eps: Added to the root.
        eps_root: Added within the root.
        nesterov: Whether m̂ looks a step ahead (NAdam).

    Returns:
        An `Optimizer`.

    Raises:
        InputError, KindError: as for `sgd`.

    Cost:
        About ten operations a leaf.

    Example:
        >>> import torch
        >>> from gradlab import optimizers
        >>> adam = optimizers.adam(1.0, eps=0.5)
        >>> first = lambda g: adam.update(g, adam.init(g), g)[0]
        >>> torch.func.grad(first)(torch.tensor(0.0))  # of -g / (|g| + 1/2)
        tensor(-2.)

    Source:
        Kingma and Ba, ICLR 2015, arXiv:1412.6980; Dozat (2016). The semantics are those of optax.adam.
    """


@by_framework
def adamw(
    rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    weight_decay: Any = 1e-4,
    *,
    mask: Any = None,
    nesterov: bool = False,
) -> Optimizer:
    """Adam with decoupled weight decay: u = -rate (m̂ / (√(v̂ + eps_root) + eps) + weight_decay params).

    Args:
        rate: As for `sgd`.
        b1: As for `adam`.
        b2: As for `adam`.
        eps: As for `adam`.
        eps_root: As for `adam`.
        weight_decay: A number.
        mask: Tree of True and False (not decayed), of the structure of params or of its upper part. None: all True.
        nesterov: As for `adam`.

    Returns:
        An `Optimizer`.

    Raises:
        InputError, KindError: as for `sgd`.

    Cost:
        As for `adam`.

    Example:
        >>> import torch
        >>> from gradlab import optimizers
        >>> shrink = optimizers.adamw(0.5, weight_decay=1.0)
        >>> x = torch.tensor([1.0, 2.0])
        >>> shrink.update(0 * x, shrink.init(x), x)[0]
        tensor([-0.5000, -1.0000])

    Source:
        Loshchilov and Hutter, ICLR 2019, arXiv:1711.05101. The semantics are those of optax.adamw.
    """


@by_framework
def rmsprop(
    rate: Any,
    decay: Any = 0.9,
    eps: Any = 1e-8,
    initial_scale: Any = 0.0,
    eps_in_sqrt: bool = True,
    momentum: Any = None,
    nesterov: bool = False,
    *,
    centered: bool = False,
) -> Optimizer:
    """RMSprop: u = -rate g / √(v + eps), or -rate g / (√v + eps), with v the mean of g²; then momentum of u.

    Args:
        rate: As for `sgd`.
        decay: Decay of the mean of g², from 0 to below 1.
        eps: Added within the root, or to it.
        initial_scale: Where v begins.
        eps_in_sqrt: Which of the two; the root has slope 0 at zero, as in `adam`.
        momentum: A number, or None.
        nesterov: As for `sgd`.
        centered: Whether v is the variance, the mean of g² less the square of the mean of g.

    Returns:
        An `Optimizer`.

    Raises:
        InputError, KindError: as for `sgd`.

    Cost:
        About five operations a leaf.

    Example:
        >>> import torch
        >>> from gradlab import optimizers
        >>> scaled = optimizers.rmsprop(0.1, decay=0.0)
        >>> g = torch.tensor([10.0, -20.0])
        >>> scaled.update(g, scaled.init(g), g)[0]
        tensor([-0.1000,  0.1000])

    Source:
        Tieleman and Hinton, lecture 6.5 (2012). The semantics are those of optax.rmsprop.
    """
