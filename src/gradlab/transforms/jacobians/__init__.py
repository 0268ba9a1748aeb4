"""First derivatives of functions with many outputs: dense Jacobians and Jacobian operators.

Contracts only; `_jax.py` and `_torch.py` implement them in this order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from gradlab._dispatch import operation
from gradlab.transforms.operators import LinearOperator

__all__ = ["jacobian", "jacobian_operator"]

Mode = Literal["auto", "forward", "reverse"]


@operation
def jacobian(
    f: Callable[..., Any],
    x: Any,
    *args: Any,
    has_aux: bool = False,
    mode: Mode = "auto",
    chunk_size: int | None = None,
) -> Any:
    """Dense Jacobian of a function, as a tree of its output, then of x.

    Computes J = ∂f(x, *args)/∂x.

    Args:
        f: Function `f(x, *args)`, any tree of floats with m entries in all; or `(output, aux)`.
        x: Point: a tree with n float entries in all; other leaves are held constant.
        *args: Data, handed to f as they are.
        has_aux: Whether f returns `(output, aux)`; then the result is `(jacobian, aux)`.
        mode: `"forward"` (a product J e for each of the n inputs), `"reverse"` (a product Jᵀ e for each of
            the m outputs) or `"auto"`: forward where n < m, since the products cost about the same; in jax
            on a CPU below float64 where n < 2.9 m, since those in reverse run one at a time there.
            Where f lacks that mode (a while_loop in jax, cdist in torch) auto takes the other. In torch,
            forward is the pullback transposed wherever forward mode may be wrong or is missing:
            compiled, under a transform, where the result can be differentiated again, and where f
            uses torch.no_grad, hooks or forward mode of its own.
        chunk_size: Products at once: beside the result, memory is `chunk_size` times that of one
            product. None: 1024 forward, 256 in reverse. In jax on a CPU below float64 the products in
            reverse always run one at a time, because XLA compiles a batch of them wrongly
            (docs/decisions.md).

    Returns:
        A tree like f's output of trees like x: `J[o][i]` has shape `output[o].shape + x[i].shape`.

    Raises:
        TooLargeError: m n entries cannot fit in the device's memory.
        InputError: an empty tree, an unknown mode, a chunk_size that is not positive.
        KindError: x or f's output is not made of real floats.
        BackendError: arrays of both frameworks, or of neither.

    Cost:
        One linearisation of f and min(m, n) products of one to two evaluations of f each.

    Example:
        >>> import torch
        >>> from gradlab import jacobian
        >>> jacobian(lambda x: torch.stack([x[0] * x[1], x[1] ** 2]), torch.tensor([2.0, 3.0]))
        tensor([[3., 2.],
                [0., 6.]])
        >>> import jax.numpy as jnp
        >>> jacobian(lambda x: jnp.stack([x[0] * x[1], x[1] ** 2]), jnp.array([2.0, 3.0]))
        Array([[3., 2.],
               [0., 6.]], dtype=float32)

    Source:
        Griewank and Walther, Evaluating Derivatives (2008), chapter 3.
    """


@operation
def jacobian_operator(
    f: Callable[..., Any], x: Any, *args: Any, has_aux: bool = False, chunk_size: int | None = None
) -> LinearOperator:
    """The Jacobian of a function as a linear operator, linearised once.

    Computes J = ∂f(x, *args)/∂x by its products `J @ v` and `J.T @ u`.

    Args:
        f: Function `f(x, *args)`, any tree of floats with m entries in all; or `(output, aux)`.
        x: Point: a tree with n float entries in all; other leaves are held constant.
        *args: Data, handed to f as they are.
        has_aux: Whether f returns `(output, aux)`; then `aux` is the operator's attribute `aux`.
        chunk_size: Directions at once in `matmat` and `dense`. None: in torch all in `matmat`, 256 in
            `dense`; in jax as for `jacobian`.

    Returns:
        A `LinearOperator` of shape (m, n); `J @ v` is a tree like f's output, `J.T @ u` a tree like x.

    Raises:
        InputError, KindError, BackendError: as for `jacobian`.

    Cost:
        One evaluation of f and its linearisation, kept in memory; then one to two evaluations of f a
        product. jax compiles each product at its first use.

    Example:
        >>> import jax.numpy as jnp
        >>> from gradlab import jacobian_operator
        >>> J = jacobian_operator(lambda x: jnp.stack([x[0] * x[1], x[1] ** 2]), jnp.array([2.0, 3.0]))
        >>> J @ jnp.array([1.0, 0.0])
        Array([3., 0.], dtype=float32)
        >>> J.T @ jnp.array([1.0, 0.0])
        Array([3., 2.], dtype=float32)

    Source:
        Griewank and Walther, Evaluating Derivatives (2008), chapter 3.
    """
