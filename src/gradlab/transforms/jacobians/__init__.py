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
    """Dense Jacobian ∂f(x, *args)/∂x: a tree of f's output, then of x."""


@operation
def jacobian_operator(
    f: Callable[..., Any], x: Any, *args: Any, has_aux: bool = False, chunk_size: int | None = None
) -> LinearOperator:
    """The Jacobian ∂f(x, *args)/∂x as a linear operator with `J @ v` and `J.T @ u`."""
