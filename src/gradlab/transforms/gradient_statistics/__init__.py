"""What the gradients of a batch's examples look like together, without keeping them all.

Contracts only; `_jax.py` and `_torch.py` implement them in this order. `params`, `batch` and the options are
those of `per_example_grads`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gradlab._dispatch import operation
from gradlab.transforms.per_example import Randomness

__all__ = [
    "gradient_noise_scale",
    "per_example_gram",
    "per_example_projections",
    "per_example_statistics",
    "per_example_top_k",
]


class Statistics(NamedTuple):
    """Entry by entry over the examples: trees like params.

    Attributes:
        mean: ḡ, the gradient of the mean loss.
        variance: Σₙ (gₙ - ḡ)² / (N - 1).
        signal_to_noise: ḡ² / variance; 0 where both vanish.
    """

    mean: Any
    variance: Any
    signal_to_noise: Any


class NoiseScale(NamedTuple):
    """Unbiased estimates of what a batch size must overcome.

    Attributes:
        scale: trace / square, in examples: the batch size at which noise and gradient are equally long.
        trace: tr Σ, the variance of one example's gradient, summed over entries.
        square: |G|² of the true gradient; below zero where the batch is too small to tell.
    """

    scale: Any
    trace: Any
    square: Any


@operation
def per_example_statistics(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    chunk_size: int | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> Statistics:
    """Mean, variance and signal-to-noise ratio of each entry of the gradient.

    Computes ḡ = Σₙ gₙ / N, v = Σₙ (gₙ - ḡ)² / (N - 1) and ḡ² / v, with the sums of chunks put together by their means,
    so that nothing cancels.

    Args:
        loss, params, *batch: As for `per_example_grads`; two examples at least.
        chunk_size: Gradients held at once. None: as many as make 2²⁴ entries.
        keep_batch_axis, randomness: As for `per_example_grads`.

    Returns:
        `Statistics` of three trees like params.

    Raises:
        InputError: fewer than two examples; and as for `per_example_grads`.
        KindError, BackendError: as for `per_example_grads`.

    Cost:
        That of `per_example_grads`, with the memory of one chunk.

    Example:
        >>> import torch
        >>> from gradlab import per_example_statistics
        >>> found = per_example_statistics(lambda w, x: w * x, torch.tensor(1.0), torch.tensor([1.0, 3.0]))
        >>> found.mean, found.variance, found.signal_to_noise
        (tensor(2.), tensor(2.), tensor(2.))

    Source:
        Chan, Golub and LeVeque, Algorithms for computing the sample variance, The American Statistician 37 (1983),
        doi:10.1080/00031305.1983.10483115.
    """


@operation
def gradient_noise_scale(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    chunk_size: int | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> NoiseScale:
    """The simple noise scale of a batch's gradient, from norms and mean alone.

    Computes tr Σ = N / (N - 1) · (mean |gₙ|² - |ḡ|²), |G|² = |ḡ|² - tr Σ / N and their quotient.

    Args:
        loss, params, *batch: As for `per_example_grads`; two examples at least.
        chunk_size, keep_batch_axis, randomness: As for `per_example_grads`.

    Returns:
        `NoiseScale` of three numbers; trace and square are unbiased, their quotient is not quite.

    Raises:
        InputError: fewer than two examples; and as for `per_example_grads`.
        KindError, BackendError: as for `per_example_grads`.

    Cost:
        That of `clipped_grad`: no gradient of one example is formed where its norm does not need it.

    Example:
        >>> import jax.numpy as jnp
        >>> from gradlab import gradient_noise_scale
        >>> found = gradient_noise_scale(lambda w, x: w * x, jnp.array(1.0), jnp.array([1.0, 3.0]))
        >>> float(found.trace), float(found.square)
        (2.0, 3.0)

    Source:
        McCandlish, Kaplan and Amodei, An empirical model of large-batch training (2018), arXiv:1812.06162, appendix A.
    """


@operation
def per_example_gram(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    other: tuple[Any, ...] | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> Any:
    """Dot products of the gradients of all pairs of examples.

    Computes Kₙₘ = gₙ·gₘ, or gₙ·g'ₘ with the gradients g' of another batch: the empirical tangent kernel of the loss,
    and the influence of one step on one example upon another's loss.

    Args:
        loss, params, *batch: As for `per_example_grads`, N examples.
        other: Another batch of M examples, a tuple like batch; None: the same.
        keep_batch_axis, randomness: As for `per_example_grads`.

    Returns:
        An array (N, N) or (N, M).

    Raises:
        KindError: other is not a tuple; and as for `per_example_grads`.
        InputError, BackendError: as for `per_example_grads`.

    Cost:
        One pass of each batch; for a product with one row an example N M times its rows' lengths, for other leaves
        N + M gradients of one leaf at a time.

    Example:
        >>> import torch
        >>> from gradlab import per_example_gram
        >>> X = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> per_example_gram(lambda w, x: w @ x, torch.zeros(2), X)  # X Xᵀ
        tensor([[1., 1.],
                [1., 5.]])

    Source:
        Pruthi, Liu, Kale and Sundararajan, Estimating training data influence by tracing gradient descent (2020),
        arXiv:2002.08484.
    """


@operation
def per_example_projections(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    dimension: int,
    seed: int = 0,
    chunk_size: int | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> Any:
    """The gradients projected on random directions, which keeps their dot products on average.

    Computes P gₙ with entries ±1 / √dimension of P drawn from the seed, the same in every call for the same params:
    E[(P g)·(P h)] = g·h, with a variance of at most 2 |g|² |h|² / dimension.

    Args:
        loss, params, *batch: As for `per_example_grads`.
        dimension: Length k of the projections.
        seed: Of P. jax and torch draw different ones; torch draws from a generator, not under vmap or torch.compile.
        chunk_size: Gradients held at once. None: as many as make 2²⁴ entries.
        keep_batch_axis, randomness: As for `per_example_grads`.

    Returns:
        An array (N, k).

    Raises:
        InputError: a dimension that is not positive; and as for `per_example_grads`.
        KindError, BackendError: as for `per_example_grads`.

    Cost:
        That of `per_example_grads`, 2 N k additions an entry of params, and P drawn in blocks once a chunk.

    Example:
        >>> import torch
        >>> from gradlab import per_example_projections
        >>> p = per_example_projections(lambda w, x: w * x, torch.tensor(1.0), torch.tensor([3.0]), dimension=4)
        >>> p.abs()
        tensor([[1.5000, 1.5000, 1.5000, 1.5000]])

    Source:
        Johnson and Lindenstrauss (1984); Achlioptas (2003), doi:10.1016/S0022-0000(03)00025-4. Park and others, TRAK:
        Attributing model behavior at scale (2023), arXiv:2303.14186.
    """


@operation
def per_example_top_k(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    k: int,
    chunk_size: int | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> tuple[Any, Any, Any]:
    """The k examples with the longest gradients, and these gradients.

    Computes the norms of all as `per_example_norms` does, and the gradients of the k largest alone.

    Args:
        loss, params, *batch: As for `per_example_grads`.
        k: How many, at most N.
        chunk_size, keep_batch_axis, randomness: As for `per_example_grads`.

    Returns:
        `(norms, indices, gradients)`: norms (k,) from the largest down, the numbers (k,) of the examples, and a tree
        like params with a leading axis k. Norms that are not a number come first.

    Raises:
        InputError: k is not between 1 and N; and as for `per_example_grads`.
        KindError, BackendError: as for `per_example_grads`.

    Cost:
        That of `per_example_norms`, and of `per_example_grads` for k examples.

    Example:
        >>> import torch
        >>> from gradlab import per_example_top_k
        >>> X = torch.tensor([1.0, -3.0, 2.0])
        >>> per_example_top_k(lambda w, x: w * x, torch.tensor(1.0), X, k=2)
        (tensor([3., 2.]), tensor([1, 2]), tensor([-3.,  2.]))

    Source:
        Katharopoulos and Fleuret, Not all samples are created equal (2018), arXiv:1803.00942.
    """
