"""A model of either framework as a pure function of its parameters.

Contracts only; `_jax.py` and `_torch.py` implement them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradlab._dispatch import operation

__all__ = ["functional"]


@operation
def functional(model: Any) -> tuple[Callable[..., Any], Any]:
    """Split a model into `(apply, params)` with `apply(params, *inputs) == model(*inputs)`."""
