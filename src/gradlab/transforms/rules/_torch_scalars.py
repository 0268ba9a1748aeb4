"""Functions of real arrays with derivatives right at their edges."""

from __future__ import annotations

from math import log
from typing import Any

import torch

from gradlab._errors import KindError

Axis = int | tuple[int, ...] | None


def norm(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    x = real("norm", x)
    if axis == ():  # which torch takes for all
        return norm(x[None], 0)
    axis = tuple(range(x.ndim)) if axis is None else axis
    m = _largest(x.detach().abs(), axis, 0.0)
    m = torch.where((m > 0) & m.isfinite(), m, 1.0)
    length = sqrt(((x / m) ** 2).sum(axis, keepdim=True)) * m
    return length if keepdims else length.squeeze(axis)


def sqrt(x: Any) -> Any:
    x = real("sqrt", x)
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def log1mexp(x: Any) -> Any:
    x = real("log1mexp", x)
    x = x * torch.where(x < 0, torch.nan, 1.0)  # and so its derivatives
    small = x < log(2.0)
    inside = torch.where(small, 1.0, x)  # of the second branch, which must not see what it cannot take
    return torch.where(small, torch.log(-torch.expm1(-x)), torch.log1p(-torch.exp(-inside)))


def logsumexp(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    x = real("logsumexp", x)
    if axis == ():
        return logsumexp(x[None], 0)
    axis = tuple(range(x.ndim)) if axis is None else axis
    m = _largest(x.detach(), axis, -torch.inf)
    m = torch.where(m == -torch.inf, 0.0, m)
    total = torch.exp(x - m).sum(axis, keepdim=True)
    empty = total == 0
    found = torch.where(empty, -torch.inf, torch.where(empty, 1.0, total).log() + m)
    found = torch.where(m == torch.inf, torch.inf, found)
    return found if keepdims else found.squeeze(axis)


def real(op: str, x: Any, name: str = "x") -> Any:
    """x as a tensor of real numbers."""
    x = (
        x
        if isinstance(x, torch.Tensor)
        else torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else None)
    )
    if x.is_complex():
        raise KindError(f"rules.{op}: {name} is complex; pass real numbers")
    return x


def _largest(x: Any, axis: Any, least: float) -> Any:
    """The maximum over axes that are kept with length 1; `least` of none."""
    return x.amax(axis, keepdim=True) if x.numel() else x.sum(axis, keepdim=True) + least
