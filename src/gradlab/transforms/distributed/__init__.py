"""Operations over a batch that is sharded across devices and processes, on the frameworks' own engines.

Contracts only; `shards.py` implements them in this order for both frameworks. `gradlab.distributed` holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradlab._dispatch import operation
from gradlab.transforms.gradient_statistics import NoiseScale, Statistics

__all__ = [
    "clipped_grad",
    "ggn_vp",
    "gradient_noise_scale",
    "hvp",
    "per_example_norms",
    "per_example_statistics",
]

TIMEOUT = 300.0  # seconds


def sharded(contract: Any) -> Any:
    """The public function of a contract whose implementations stand in gradlab.jax.distributed and its twin."""
    return operation(contract, "distributed")


@sharded
def hvp(
    f: Callable[..., Any], x: Any, v: Any, *batch: Any, over: Any = None, timeout: float = TIMEOUT
) -> Any:
    """Hessian-vector product of a mean over a batch that is sharded.

    Computes (∇²ₓ f(x, *batch)) v of the whole batch, as Σₖ nₖ/N (∇²ₓ f(x, *batchₖ)) v over its shards of nₖ of N
    examples: the mean over all examples, however unequal the shards.

    Each process passes its own examples, and all processes call with the same f, x and v. In torch a process is a
    shard (`torchrun`, `torch.distributed.init_process_group`). In jax the examples of a process are split over its
    devices (`jax.distributed.initialize` for several processes); global arrays, and tracers inside of jit, are the
    whole batch.

    Args:
        f: Scalar function `f(x, *batch)`, a mean over the examples of whatever batch it gets.
        x, v: As for `gradlab.hvp`, the same in every process.
        *batch: Trees of arrays with one leading axis of examples; what is no array is handed on as it stands.
        over: torch: the process group, None for the default one. jax: a jax.sharding.Mesh, over all of whose axes the
            examples are split; None: all devices.
        timeout: Seconds that processes wait for one another.

    Returns:
        A tree like x, in every process the same. In jax it can be differentiated, mapped and compiled like any
        other; in torch too, if all processes do so alike: x and v then count as one for all, and each batch as its
        process's own. torch.compile is refused.

    Raises:
        ProcessError: a process is lost or does not call within the timeout; the group and the process are named. In
            jax, inside of a user's own jit, where nothing can be caught, the engine's own JaxRuntimeError.
        InputError: processes that disagree in structure, shapes, dtypes or numbers of x and v (numbers: not where
            they are mapped, differentiated by transforms or traced); arrays of a batch that disagree in their number of
            examples, a process without examples; in jax, examples that the devices do not divide.
        StrategyError: torch without a process group.
        As `gradlab.hvp` otherwise.

    Cost:
        That of the local product; one reduction of two counts and checksums, and one of the result. jax: put jax.jit
        around the call, inside which the checks run once, when it is traced.

    Example:
        >>> import jax.numpy as jnp
        >>> from gradlab import distributed
        >>> f = lambda x, a: jnp.mean(a * jnp.sum(x**3))
        >>> distributed.hvp(f, jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0]), jnp.ones(8))  # over all devices
        Array([ 6., 12.], dtype=float32)
        >>> import tempfile, torch
        >>> file = tempfile.NamedTemporaryFile()  # torchrun makes this unnecessary
        >>> torch.distributed.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        >>> f = lambda x, a: (a * (x**3).sum()).mean()
        >>> distributed.hvp(f, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), torch.ones(8))
        tensor([ 6., 12.])
        >>> torch.distributed.destroy_process_group()

    Source:
        Pearlmutter, Neural Computation 6 (1994), doi:10.1162/neco.1994.6.1.147. jax.shard_map; torch.distributed.
    """


@sharded
def ggn_vp(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    x: Any,
    v: Any,
    *batch: Any,
    over: Any = None,
    timeout: float = TIMEOUT,
) -> Any:
    """Gauss-Newton product of a mean over a batch that is sharded.

    Computes Jᵀ (∇² loss) J v of the whole batch, as `hvp` does.

    Args:
        model: Function `model(x, *batch)`.
        loss: Scalar function `loss(output, *batch)`, a mean over the examples: it gets the batch too, since what it
            closes over is not sharded.
        x, v, *batch, over, timeout: As for `hvp`.

    Returns:
        As `hvp`.

    Raises:
        As `hvp`.

    Cost:
        As `hvp`, with `gradlab.ggn_vp` for the local product.

    Example:
        >>> import jax.numpy as jnp
        >>> from gradlab import distributed
        >>> X, x, v = jnp.array([[1.0, 2.0]] * 8), jnp.ones(2), jnp.array([1.0, 0.0])
        >>> distributed.ggn_vp(lambda x, X: X @ x, lambda y, X: jnp.mean(y**2) / 2, x, v, X)  # XᵀX v / 8
        Array([1., 2.], dtype=float32)

    Source:
        Schraudolph, Neural Computation 14 (2002), doi:10.1162/08997660260028683.
    """


@sharded
def per_example_norms(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    over: Any = None,
    timeout: float = TIMEOUT,
    **options: Any,
) -> Any:
    """The norm of each example's gradient, of a batch that is sharded.

    Computes |∇ loss(params, *exampleₙ)|.

    Args:
        loss: Scalar function `loss(params, *example)` of one example.
        params: A tree, the same in every process.
        *batch, over, timeout: As for `hvp`.
        **options: As for `gradlab.per_example_norms`.

    Returns:
        torch: the norms of this process's own examples. jax: those of all, an array that is sharded as the batch is.

    Raises:
        As `hvp`, and as `gradlab.per_example_norms`.

    Cost:
        That of the local norms; one reduction of counts.

    Example:
        >>> import jax.numpy as jnp
        >>> from gradlab import distributed
        >>> distributed.per_example_norms(lambda w, x: w * x, jnp.array(1.0), -jnp.arange(4.0))
        Array([0., 1., 2., 3.], dtype=float32)

    Source:
        Goodfellow (2015), arXiv:1510.01799.
    """


@sharded
def clipped_grad(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    max_norm: Any,
    over: Any = None,
    timeout: float = TIMEOUT,
    **options: Any,
) -> Any:
    """The sum of gradients clipped example by example, of a batch that is sharded.

    Computes Σₙ min(1, max_norm / |gₙ|) gₙ over all examples of all shards.

    Args:
        loss, params, *batch, over, timeout: As for `per_example_norms`.
        max_norm: A number, as for `gradlab.clipped_grad`.
        **options: As for `gradlab.clipped_grad`, without mask and has_aux.

    Returns:
        `(sum, norms)`: the sum of all, the same in every process, and norms as of `per_example_norms`.

    Raises:
        As `per_example_norms`.

    Cost:
        That of the local sum; one reduction of counts, and one of the sum.

    Example:
        >>> import jax.numpy as jnp
        >>> from gradlab import distributed
        >>> distributed.clipped_grad(lambda w, x: w * x, jnp.array(1.0), jnp.arange(4.0), max_norm=1.5)[0]
        Array(4., dtype=float32)

    Source:
        Abadi and others, Deep learning with differential privacy (2016), doi:10.1145/2976749.2978318.
    """


@sharded
def per_example_statistics(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    over: Any = None,
    timeout: float = TIMEOUT,
    **options: Any,
) -> Statistics:
    """Mean, variance and signal-to-noise ratio of the gradients of a batch that is sharded, entry by entry.

    Computes ḡ = Σₖ nₖ ḡₖ / N and Σₖ (Sₖ + nₖ (ḡₖ - ḡ)²) / (N - 1), Sₖ a shard's squares about its own mean ḡₖ.

    Args:
        loss, params, *batch, over, timeout: As for `per_example_norms`.
        **options: As for `gradlab.per_example_statistics`.

    Returns:
        `Statistics` as of `gradlab.per_example_statistics`, of all examples, the same in every process.

    Raises:
        As `per_example_norms`; InputError for one example in all.

    Cost:
        That of the local statistics; one reduction of counts, and two of trees like params.

    Example:
        >>> import jax.numpy as jnp
        >>> from gradlab import distributed
        >>> found = distributed.per_example_statistics(lambda w, x: w * x, jnp.array(1.0), jnp.array([1.0, 3.0]))
        >>> float(found.mean), float(found.variance)
        (2.0, 2.0)

    Source:
        Chan, Golub and LeVeque, The American Statistician 37 (1983), doi:10.1080/00031305.1983.10483115.
    """


@sharded
def gradient_noise_scale(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    over: Any = None,
    timeout: float = TIMEOUT,
    **options: Any,
) -> NoiseScale:
    """The gradient noise scale of a batch that is sharded.

    Computes what `gradlab.gradient_noise_scale` does, from Σₙ |gₙ|² and Σₙ gₙ over all shards.

    Args:
        loss, params, *batch, over, timeout: As for `per_example_norms`.
        **options: chunk_size, keep_batch_axis, randomness as for `gradlab.gradient_noise_scale`.

    Returns:
        `NoiseScale` of all examples, the same in every process.

    Raises:
        As `per_example_norms`; InputError for one example in all.

    Cost:
        That of `clipped_grad`.

    Example:
        >>> import jax.numpy as jnp
        >>> from gradlab import distributed
        >>> found = distributed.gradient_noise_scale(lambda w, x: w * x, jnp.array(1.0), jnp.array([1.0, 3.0]))
        >>> float(found.trace), float(found.square)
        (2.0, 3.0)

    Source:
        McCandlish, Kaplan and Amodei (2018), arXiv:1812.06162, appendix A.
    """
