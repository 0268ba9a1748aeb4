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
    """Hessian-vector product (∇²ₓ f(x, *args)) v of a scalar function, without forming the Hessian."""


@operation
def hessian(
    f: Callable[..., Any], x: Any, *args: Any, has_aux: bool = False, chunk_size: int | None = None
) -> Any:
    """Dense Hessian ∇²ₓ f(x, *args) as a tree of trees: H[a][b] has shape x[a].shape + x[b].shape."""


@operation
def hessian_diagonal(
    f: Callable[..., Any], x: Any, *args: Any, has_aux: bool = False, chunk_size: int | None = None
) -> Any:
    """Exact diagonal of the Hessian, a tree like x."""


@operation
def hessian_operator(
    f: Callable[..., Any], x: Any, *args: Any, has_aux: bool = False, chunk_size: int | None = None
) -> LinearOperator:
    """The Hessian ∇²ₓ f(x, *args) as a linear operator: linearised once, applied many times."""


@operation
def ggn_vp(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    x: Any,
    v: Any,
    *args: Any,
    has_aux: bool = False,
) -> Any:
    """Generalised Gauss-Newton product Jᵀ (∇² loss) J v, with J = ∂model/∂x and `loss` of its output."""


@operation
def ggn_operator(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    x: Any,
    *args: Any,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> LinearOperator:
    """The generalised Gauss-Newton matrix Jᵀ (∇² loss) J as a linear operator."""
