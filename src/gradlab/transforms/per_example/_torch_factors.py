"""Norms and products of gradients that are given by factors: Σₜ lₜ rₜᵀ in each of G groups, for each of N examples.

Left factors have shape (N, G, T, p), or are `Rows`; right factors have shape (N, G, T, q).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

Pair = tuple[Any, Any]  # left and right


@dataclass(frozen=True)
class Rows:
    """Unit vectors with `n` entries, by the number of the entry that is one."""

    index: Any
    n: int


def squared_norms(pairs: Sequence[Pair]) -> Any:
    """|Σ l rᵀ|² for each example, over all pairs together, by the Gram matrices of the factors."""
    pairs = joined([(wide(left), wide(right)) for left, right in pairs])
    left, right = pairs[0]
    if len(pairs) == 1 and right.shape[2] == 1 and not isinstance(left, Rows):
        return (left.square().sum(-1) * right.square().sum(-1)).sum((1, 2))
    total: Any = 0.0
    for i, (left, right) in enumerate(pairs):
        for other, other_right in pairs[i:]:
            twice = 1 if other is left else 2
            total = total + twice * (dots(left, other) * dots(right, other_right)).sum((1, 2, 3))
    return total.clamp(min=0)  # rounding


def joined(pairs: Sequence[Pair]) -> list[Pair]:
    """At most one pair with dense left factors, and one with rows: behind one another in T."""
    dense = [pair for pair in pairs if not isinstance(pair[0], Rows)]
    rows = [pair for pair in pairs if isinstance(pair[0], Rows)]
    behind = lambda parts: parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    found: list[Pair] = []
    if dense:
        found.append((behind([left for left, _ in dense]), behind([right for _, right in dense])))
    if rows:
        index = behind([left.index for left, _ in rows])
        found.append((Rows(index, rows[0][0].n), behind([right for _, right in rows])))
    return found


def dots(a: Any, b: Any) -> Any:
    """aₜ·bₛ for each example and group: (N, G, T, S)."""
    if isinstance(a, Rows) and isinstance(b, Rows):
        return a.index.unsqueeze(-1) == b.index.unsqueeze(-2)
    if isinstance(a, Rows):
        return dots(b, a).mT
    if isinstance(b, Rows):
        return a.gather(-1, b.index.unsqueeze(-2).expand(*a.shape[:-1], -1))
    return a @ b.mT


def formed(left: Any, right: Any) -> Any:
    """Σₜ lₜ rₜᵀ for each example and group: (N, G, p, q)."""
    if not isinstance(left, Rows):
        return left.mT @ right
    N, G, T, q = right.shape
    first = left.n * torch.arange(N * G, device=right.device).unsqueeze(-1)
    flat = right.new_zeros(N * G * left.n, q)
    flat = flat.index_add(0, (left.index.reshape(N * G, T) + first).reshape(-1), right.reshape(-1, q))
    return flat.reshape(N, G, left.n, q)


def wide(a: Any) -> Any:
    """At least float32, in which squares of 16-bit numbers neither overflow nor lose their digits."""
    if isinstance(a, Rows) or a.dtype not in (torch.float16, torch.bfloat16):
        return a
    return a.float()
