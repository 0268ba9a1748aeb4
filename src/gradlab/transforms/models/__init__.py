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
    """Split a model into a pure function and its parameters.

    Gives `(apply, params)` with apply(params, *inputs) = model(*inputs), so that a loss over a real
    model is one line: `loss = lambda params, X, y: cross_entropy(apply(params, X), y)`.

    Args:
        model: A torch.nn.Module, or an equinox module (or any jax tree that is callable).

    Returns:
        apply: `apply(params, *inputs, **options)`. Everything in the model that is not a parameter
            (buffers, integers, functions) is held as it is; in training mode torch buffers are
            copied at each call, so that applying never changes the model.
        params: torch: a dict of the named parameters, detached, a tied parameter once. jax: the module
            with None in place of whatever is not a float array.

    Raises:
        BackendError: the model holds arrays of neither framework.

    Cost:
        No evaluation; shares memory with the model.

    Example:
        >>> import torch
        >>> from gradlab import functional, hvp
        >>> apply, params = functional(torch.nn.Linear(2, 1, bias=False))
        >>> X = torch.tensor([[1.0, 2.0]])
        >>> v = {"weight": torch.tensor([[1.0, 0.0]])}
        >>> hvp(lambda params: (apply(params, X) ** 2).sum() / 2, params, v)  # X Xᵀ v
        {'weight': tensor([[1., 2.]])}

    Source:
        torch.func.functional_call; equinox.partition and equinox.combine.
    """
