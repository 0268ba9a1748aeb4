"""Derivatives of the loss of each example of a batch: gradients, their norms, clipped and private sums.

Contracts only; `_jax.py` and `_torch.py` implement them in this order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from gradlab._dispatch import operation

__all__ = ["clipped_grad", "per_example_grads", "per_example_norms", "private_grad"]

Clipping = Literal["flat", "per_leaf", "automatic"]
Randomness = Literal["error", "different", "same"]


@operation
def per_example_grads(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    has_aux: bool = False,
    chunk_size: int | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> Any:
    """The gradient of the loss of each example.

    Computes gₙ = ∇ loss(params, *exampleₙ) for every example n of the batch.

    Args:
        loss: Scalar function `loss(params, *example)` of one example; or `(value, aux)`. It is mapped by vmap, and
            so must not branch in Python on numbers.
        params: A tree whose float arrays are differentiated and whose other leaves are held constant.
        *batch: Trees of arrays with one leading axis of examples; `loss` gets one entry of each, without that
            axis. What is not an array (numbers, None, functions) is handed on as it is.
        has_aux: Whether loss returns `(value, aux)`; then the result is `(gradients, aux)`, with the examples on
            the leading axis of each array of aux.
        chunk_size: Examples at once, to bound memory. None: all.
        keep_batch_axis: Whether loss gets each example with a leading axis of length 1, for models that want one.
        randomness: Random numbers that loss draws, in torch: `"error"` refuses them, `"different"` draws new ones
            for each example, `"same"` the same for all in a chunk. In jax they are data: put a key for each example
            into the batch (`jax.random.split(key, n)`).

    Returns:
        A tree like params, each leaf with a leading axis of examples; None where params holds a constant.

    Raises:
        InputError: arrays of the batch that disagree on the number of examples, an empty batch, a loss that is not
            a scalar, batch norm in training mode (or any loss that names a mapped axis, in jax).
        KindError: params has no float array, or complex numbers.
        BackendError: arrays of both frameworks, or of neither.

    Cost:
        One forward and backward pass of the batch, and the writing of N gradients. In torch, in eager code, by
        ordinary autograd under vmap; under torch.compile and inside transforms by torch.func.vmap(torch.func.grad).

    Example:
        >>> import torch
        >>> from gradlab import per_example_grads
        >>> loss = lambda w, x, y: (w @ x - y) ** 2
        >>> X, y = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([0.0, 1.0])
        >>> per_example_grads(loss, torch.tensor([1.0, 1.0]), X, y)  # 2 (w·x - y) x
        tensor([[2., 0.],
                [4., 8.]])
        >>> import jax.numpy as jnp
        >>> X, y = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([0.0, 1.0])
        >>> per_example_grads(loss, jnp.array([1.0, 1.0]), X, y)
        Array([[2., 0.],
               [4., 8.]], dtype=float32)

    Source:
        Goodfellow, Efficient per-example gradient computations (2015), arXiv:1510.01799.
    """


@operation
def per_example_norms(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    per_leaf: bool = False,
    has_aux: bool = False,
    chunk_size: int | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> Any:
    """The Euclidean norm of the gradient of each example's loss, mostly without forming the gradients.

    Computes |gₙ| with gₙ = ∇ loss(params, *exampleₙ). Where the loss uses a leaf in a product, a convolution or a
    lookup of rows, the leaf's part of gₙ is Σₜ lₜ rₜᵀ with rows of what went into it and of the cotangent of what
    came out, and its squared norm is Σₜₛ (lₜ·lₛ)(rₜ·rₛ), or that of the sum itself, whichever is cheaper for
    the shapes. What else is done with a leaf is found out while the loss runs; then that leaf's gradients are formed.

    Args:
        loss, params, *batch: As for `per_example_grads`.
        per_leaf: Whether to give the norm of each leaf instead of the norm over all.
        has_aux, chunk_size, keep_batch_axis, randomness: As for `per_example_grads`.

    Returns:
        An array (N,) in the dtype of params; with per_leaf a tree like params of such arrays. An example whose
        gradient is infinite or not a number has such a norm. The sum over t and s may cancel: a norm far below
        Σₜ |lₜ| |rₜ| is exact to √ε of that (3e-4 in float32), not to ε.

    Raises:
        InputError, KindError, BackendError: as for `per_example_grads`.

    Cost:
        One forward and backward pass of the batch less the gradients of the leaves; memory of one such pass, and of
        the leaves that had to be formed. In torch under torch.compile or inside a transform, N gradients (which a
        compiler need not write).

    Example:
        >>> import jax.numpy as jnp
        >>> from gradlab import per_example_norms
        >>> loss = lambda w, x: ((w @ x) ** 2).sum() / 2
        >>> X = jnp.array([[3.0, 4.0], [1.0, 0.0]])
        >>> per_example_norms(loss, jnp.eye(2), X)  # |w x| |x|
        Array([25.,  1.], dtype=float32)
        >>> import torch
        >>> per_example_norms(loss, torch.eye(2), torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([25.,  1.])

    Source:
        Goodfellow (2015), arXiv:1510.01799. Li, Tramèr, Liang and Hashimoto, Large language models can be strong
        differentially private learners (2022), arXiv:2110.05679. Rochette, Manoel and Tramel, Efficient per-example
        gradient computations in convolutional neural networks (2019), arXiv:1912.06015.
    """


@operation
def clipped_grad(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    max_norm: Any,
    clipping: Clipping = "flat",
    mask: Any = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> Any:
    """The sum over a batch of gradients that are clipped example by example.

    Computes Σₙ cₙ gₙ with cₙ = min(1, max_norm / |gₙ|). What the one pass kept for the norms gives the weighted
    sum too: each leaf's is one product of its factors.

    Args:
        loss, params, *batch: As for `per_example_grads`.
        max_norm: The norm C > 0 that no example's part of the sum exceeds, up to rounding.
        clipping: `"flat"`: as above. `"per_leaf"`: each of the L leaves on its own, to C / √L. `"automatic"`:
            cₙ = C / (|gₙ| + 0.01), which makes all about equally long.
        mask: Booleans (N,): the examples that count; the others have factor 0. For batches of varying size in arrays
            of one size.
        has_aux, chunk_size, keep_batch_axis, randomness: As for `per_example_grads`.

    Returns:
        `(sum, norms)`, or `(sum, norms, aux)`: a tree like params, and the norms before clipping as of
        `per_example_norms` (with `"per_leaf"` a tree of them). An example whose norm is infinite or not a number has
        factor 0, whatever its gradient holds; its norm is reported as it is. In float32 that is also a norm of more
        than 1.8e19, the square of which overflows.

    Raises:
        InputError: max_norm is not a positive finite number (where it is traced, the sum is NaN), an unknown
            clipping, a mask that does not fit; and as for `per_example_grads`.
        KindError, BackendError: as for `per_example_grads`.

    Cost:
        That of `per_example_norms`, and about half a backward pass for the sum.

    Example:
        >>> import torch
        >>> from gradlab import clipped_grad
        >>> X = torch.tensor([[3.0, 4.0], [0.5, 0.0], [float("nan"), 1.0]])
        >>> total, norms = clipped_grad(lambda w, x: w @ x, torch.zeros(2), X, max_norm=1.0)
        >>> total  # (3, 4) / 5 + (0.5, 0)
        tensor([1.1000, 0.8000])
        >>> norms
        tensor([5.0000, 0.5000,    nan])

    Source:
        Abadi and others, Deep learning with differential privacy (2016), doi:10.1145/2976749.2978318. Bu, Wang, Zha
        and Karypis, Differentially private optimization on large model at small cost (2023), arXiv:2210.00038, and
        Automatic clipping (2023), arXiv:2206.07136.
    """


@operation
def private_grad(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    max_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    rng: Any,
    clipping: Clipping = "flat",
    mask: Any = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> Any:
    """A differentially private estimate of the mean gradient: clipped, summed, noised, scaled.

    Computes (Σₙ cₙ gₙ + σ C z) / B with clipped examples as in `clipped_grad`, C = max_norm, σ = noise_multiplier,
    z standard normal, and B = expected_batch_size. The noise belongs to the sum, to which one example adds at most C.
    B is fixed beforehand: the size of the batch that was drawn is itself private.

    Args:
        loss, params, *batch: As for `per_example_grads`. The batch should be drawn by Poisson sampling
            (`gradlab.privacy.poisson_batches`), for which `gradlab.privacy.epsilon` accounts. It may be empty.
        max_norm: The norm C to which each example is clipped.
        noise_multiplier: σ; `gradlab.privacy.noise_multiplier` finds it for an epsilon. 0 gives no privacy.
        expected_batch_size: B, the sampling rate times the number of examples in all.
        rng: jax: a key, a new one at every step. torch: one torch.Generator, on the device of params, at which
            torch.compile breaks its graph. Noise is drawn in float32 at least.
        clipping, mask, has_aux, chunk_size, keep_batch_axis, randomness: As for `clipped_grad`.

    Returns:
        `(gradient, norms)`, or `(gradient, norms, aux)`. The norms and aux are not private.

    Raises:
        InputError: a noise_multiplier below 0, an expected_batch_size that is not positive, an rng that is not a key or
            generator; and as for `clipped_grad`.
        KindError, BackendError: as for `per_example_grads`.

    Cost:
        That of `clipped_grad`.

    Example:
        >>> import torch
        >>> from gradlab import private_grad
        >>> X = torch.tensor([[3.0, 4.0], [0.5, 0.0]])
        >>> options = {"max_norm": 1.0, "expected_batch_size": 2, "rng": torch.Generator().manual_seed(0)}
        >>> private_grad(lambda w, x: w @ x, torch.zeros(2), X, noise_multiplier=0.0, **options)[0]
        tensor([0.5500, 0.4000])

    Source:
        Abadi and others (2016), doi:10.1145/2976749.2978318. The noise is made by ordinary floating-point arithmetic:
        Mironov, On significance of the least significant bits for differential privacy (2012),
        doi:10.1145/2382196.2382264, says what an adversary who sees every bit can learn from that.
    """
