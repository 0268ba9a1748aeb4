"""Second derivatives: Hessian-vector products, dense Hessians, diagonals, operators, Gauss-Newton.

Contracts only; `_jax.py` and `_torch.py` implement them in this order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from gradlab._dispatch import operation
from gradlab.transforms.operators import LinearOperator

__all__ = [
    "ggn_operator",
    "ggn_vp",
    "hessian",
    "hessian_diagonal",
    "hessian_operator",
    "hvp",
]

Strategy = Literal["auto", "forward_over_reverse", "reverse_over_reverse", "reverse_over_forward"]


@operation
def hvp(
    f: Callable[..., Any], x: Any, v: Any, *args: Any, has_aux: bool = False, strategy: Strategy = "auto"
) -> Any:
    """Hessian-vector product of a scalar function, without forming the Hessian.

    Computes (∇²ₓ f(x, *args)) v.

    Args:
        f: Scalar function `f(x, *args)`; returns one float of shape (), or `(value, aux)`.
        x: Point: a tree whose float arrays are differentiated and whose other leaves are held constant.
        v: Direction: a tree like x, each leaf of the same shape and dtype. Where x has a constant, v
            may hold anything, None for instance.
        *args: Data, handed to f as they are.
        has_aux: Whether f returns `(value, aux)`; then the result is `(product, aux)`. aux is a tree.
        strategy: `"auto"` or the composition of modes by name. Auto is `"forward_over_reverse"` in
            jax (the fastest there: 1.5-2.1 gradients) and `"reverse_over_reverse"` in torch (2.7-3.5
            gradients in eager code, 1.2-1.8 compiled, and right where forward mode is not).
            In torch the other two run with the faulty operations repaired, or are refused
            (docs/decisions.md).

    Returns:
        A tree like x, in the units of f divided by those of x; None where x holds a constant.

    Raises:
        InputError: v does not fit x, f is not scalar, an empty tree, an unknown strategy.
        KindError: x has no float array, or complex numbers.
        StrategyError: a strategy that torch gets wrong in this place (compiled, or inside a jvp).
        BackendError: arrays of both frameworks, or of neither.

    Cost:
        Two to four gradients of f; memory of about two gradients.

    Example:
        >>> import torch
        >>> from gradlab import hvp
        >>> hvp(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
        >>> import jax.numpy as jnp
        >>> hvp(lambda x: (x**3).sum(), jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0]))
        Array([ 6., 12.], dtype=float32)

    Source:
        Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6 (1994),
        doi:10.1162/neco.1994.6.1.147. Griewank and Walther, Evaluating Derivatives (2008), section 5.
    """


@operation
def hessian(
    f: Callable[..., Any], x: Any, *args: Any, has_aux: bool = False, chunk_size: int | None = None
) -> Any:
    """Dense Hessian of a scalar function, as a tree of trees.

    Computes ∇²ₓ f(x, *args), entry by entry ∂²f / ∂x[a] ∂x[b].

    Args:
        f: Scalar function `f(x, *args)`; returns one float of shape (), or `(value, aux)`.
        x: Point: a tree with n float entries in all; other leaves are held constant.
        *args: Data, handed to f as they are.
        has_aux: Whether f returns `(value, aux)`; then the result is `(hessian, aux)`.
        chunk_size: Directions at once. Beside the result, memory is `chunk_size` times that of one
            Hessian-vector product. None: 256; in compiled jax on a CPU one at a time, unless the
            parameters are a small part (a fifth) of what the linearised gradient keeps, or the batch
            would pass 2²⁹ elements: each is the faster one there (docs/decisions.md).

    Returns:
        A tree like x of trees like x: `H[a][b]` has shape `x[a].shape + x[b].shape`. For a single array
        x, one array of shape `x.shape + x.shape`.

    Raises:
        TooLargeError: n² entries cannot fit in the device's memory; said, with the size, before any work.
        InputError, KindError, BackendError: as for `hvp`; also a chunk_size that is not positive.

    Cost:
        One gradient, linearised once, and n products with it (each 1.2 to 2 gradients).

    Example:
        >>> import jax.numpy as jnp
        >>> from gradlab import hessian
        >>> hessian(lambda x: x[0] ** 2 * x[1], jnp.array([1.0, 2.0]))
        Array([[4., 2.],
               [2., 0.]], dtype=float32)
        >>> import torch
        >>> hessian(lambda x: x["a"] * x["b"] ** 2, {"a": torch.tensor(1.0), "b": torch.tensor(3.0)})
        {'a': {'a': tensor(0.), 'b': tensor(6.)}, 'b': {'a': tensor(6.), 'b': tensor(2.)}}

    Source:
        Griewank and Walther, Evaluating Derivatives (2008), section 5.3.
    """


@operation
def hessian_diagonal(
    f: Callable[..., Any], x: Any, *args: Any, has_aux: bool = False, chunk_size: int | None = None
) -> Any:
    """Exact diagonal of the Hessian of a scalar function.

    Computes ∂²f / ∂xᵢ² for every float entry xᵢ of x, without keeping the matrix.

    Args:
        f: Scalar function `f(x, *args)`; returns one float of shape (), or `(value, aux)`.
        x: Point: a tree with n float entries in all; other leaves are held constant.
        *args: Data, handed to f as they are.
        has_aux: Whether f returns `(value, aux)`; then the result is `(diagonal, aux)`.
        chunk_size: Directions at once: memory is `chunk_size` times that of one Hessian-vector product.
            None as for `hessian`.

    Returns:
        A tree like x.

    Raises:
        InputError, KindError, BackendError: as for `hvp`; also a chunk_size that is not positive.

    Cost:
        One gradient, linearised once, and n products with it; memory of `chunk_size` products.

    Example:
        >>> import torch
        >>> from gradlab import hessian_diagonal
        >>> hessian_diagonal(lambda x: (x**3).sum() + x[0] * x[1], torch.tensor([1.0, 2.0]))
        tensor([ 6., 12.])
        >>> import jax.numpy as jnp
        >>> hessian_diagonal(lambda x: (x**3).sum() + x[0] * x[1], jnp.array([1.0, 2.0]))
        Array([ 6., 12.], dtype=float32)

    Source:
        Griewank and Walther, Evaluating Derivatives (2008), section 7.
    """


@operation
def hessian_operator(
    f: Callable[..., Any], x: Any, *args: Any, has_aux: bool = False, chunk_size: int | None = None
) -> LinearOperator:
    """The Hessian of a scalar function as a linear operator, linearised once.

    Computes H = ∇²ₓ f(x, *args) by its products: `H @ v`, `H.matmat(V)`, `H.dense()`, `H.to_scipy()`.

    Args:
        f: Scalar function `f(x, *args)`; returns one float of shape (), or `(value, aux)`.
        x: Point: a tree with n float entries in all; other leaves are held constant.
        *args: Data, handed to f as they are.
        has_aux: Whether f returns `(value, aux)`; then `aux` is the operator's attribute `aux`.
        chunk_size: Directions at once in `matmat` and `dense`. None: in torch all in `matmat`, 256 in
            `dense`; in jax as for `hessian`, compiled.

    Returns:
        A `LinearOperator` of shape (n, n); it is its own transpose.

    Raises:
        InputError, KindError, BackendError: as for `hvp`; also a chunk_size that is not positive.

    Cost:
        One gradient and its linearisation, kept in memory with the operator; then 1 to 2 gradients a
        product. jax compiles the product at its first use, so make the operator inside your own
        jax.jit when x changes at every step.

    Example:
        >>> import jax.numpy as jnp
        >>> from gradlab import hessian_operator
        >>> H = hessian_operator(lambda x: (x**3).sum(), jnp.array([1.0, 2.0]))
        >>> H @ jnp.array([1.0, 1.0])
        Array([ 6., 12.], dtype=float32)
        >>> import torch
        >>> H = hessian_operator(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
        >>> H.matmat(torch.eye(2))
        tensor([[ 6.,  0.],
                [ 0., 12.]])

    Source:
        Pearlmutter, Neural Computation 6 (1994), doi:10.1162/neco.1994.6.1.147.
    """


@operation
def ggn_vp(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    x: Any,
    v: Any,
    *args: Any,
    has_aux: bool = False,
) -> Any:
    """Product with the generalised Gauss-Newton matrix of a loss of a model's output.

    Computes Jᵀ (∇² loss) J v with J = ∂model(x, *args)/∂x and ∇² loss taken at the model's output.

    Args:
        model: Function `model(x, *args)`, any tree of floats; or `(output, aux)`.
        loss: Scalar function `loss(output)`; close over targets.
        x: Point: a tree with float arrays; other leaves are held constant.
        v: Direction: a tree like x.
        *args: Data of the model.
        has_aux: Whether the model returns `(output, aux)`; then the result is `(product, aux)`.

    Returns:
        A tree like x.

    Raises:
        InputError: v does not fit x, or loss is not scalar.
        KindError, BackendError: as for `hvp`.

    Cost:
        About two gradients: one pass of the model forward with its tangent, one back.

    Example:
        >>> import torch
        >>> from gradlab import ggn_vp
        >>> A, x, v = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.ones(2), torch.tensor([1.0, 0.0])
        >>> ggn_vp(lambda x: A @ x, lambda y: (y**2).sum() / 2, x, v)  # Aᵀ A v
        tensor([1., 2.])
        >>> import jax.numpy as jnp
        >>> A, x, v = jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.ones(2), jnp.array([1.0, 0.0])
        >>> ggn_vp(lambda x: A @ x, lambda y: (y**2).sum() / 2, x, v)
        Array([1., 2.], dtype=float32)

    Source:
        Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural
        Computation 14 (2002), doi:10.1162/08997660260028683.
    """


@operation
def ggn_operator(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    x: Any,
    *args: Any,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> LinearOperator:
    """The generalised Gauss-Newton matrix of a loss of a model's output as a linear operator.

    Computes G = Jᵀ (∇² loss) J by its products, with model and loss each linearised once.

    Args:
        model: Function `model(x, *args)`, any tree of floats; or `(output, aux)`.
        loss: Scalar function `loss(output)`; close over targets.
        x: Point: a tree with n float entries in all; other leaves are held constant.
        *args: Data of the model.
        has_aux: Whether the model returns `(output, aux)`; then `aux` is the operator's attribute.
        chunk_size: Directions at once in `matmat` and `dense`, as for `hessian_operator`.

    Returns:
        A `LinearOperator` of shape (n, n), its own transpose; positive semi-definite for a convex loss.

    Raises:
        InputError, KindError, BackendError: as for `ggn_vp`; also a chunk_size that is not positive.

    Cost:
        One pass of the model and its linearisation, kept in memory; then about two gradients a product.

    Example:
        >>> import jax.numpy as jnp
        >>> from gradlab import ggn_operator
        >>> A = jnp.array([[1.0, 2.0], [0.0, 1.0]])
        >>> G = ggn_operator(lambda x: A @ x, lambda y: (y**2).sum() / 2, jnp.ones(2))
        >>> G.dense()
        Array([[1., 2.],
               [2., 5.]], dtype=float32)

    Source:
        Schraudolph, Neural Computation 14 (2002), doi:10.1162/08997660260028683.
    """
