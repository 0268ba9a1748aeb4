"""Norms and products of gradients that are given by factors: Σₜ lₜ rₜᵀ in each of G groups, for each of N examples.

Left factors have shape (N, G, T, p), or are `Rows`; right factors have shape (N, G, T, q).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gradlab.transforms.per_example._jax_uses import Rows

Pair = tuple[Any, Any]  # left and right


def squared_norms(pairs: Sequence[Pair]) -> Any:
    """|Σ l rᵀ|² for each example, over all pairs together, by the Gram matrices of the factors."""
    pairs = joined([(wide(left), wide(right)) for left, right in pairs])
    total = 0.0
    for i, (left, right) in enumerate(pairs):
        for other, other_right in pairs[i:]:
            twice = 1 if other is left else 2
            total += twice * (dots(left, other) * dots(right, other_right)).sum((1, 2, 3))
    return jnp.maximum(total, 0)  # rounding


def joined(pairs: Sequence[Pair]) -> list[Pair]:
    """At most one pair with dense left factors, and one with rows: behind one another in T."""
    kinds = [[pair for pair in pairs if isinstance(pair[0], Rows) == rows] for rows in (False, True)]
    behind = lambda parts: jax.tree.map(lambda *leaves: jnp.concatenate(leaves, 2), *parts)
    return [kind[0] if len(kind) == 1 else behind(kind) for kind in kinds if kind]


def dots(a: Any, b: Any) -> Any:
    """aₜ·bₛ for each example and group: (N, G, T, S)."""
    if isinstance(a, Rows) and isinstance(b, Rows):
        return (a.index[..., :, None] == b.index[..., None, :]).astype(jnp.float32)
    if isinstance(a, Rows):
        return dots(b, a).swapaxes(-1, -2)
    if isinstance(b, Rows):
        return jnp.take_along_axis(a, b.index[..., None, :], -1)
    return jnp.einsum("ngtp,ngsp->ngts", a, b)


def width(left: Any) -> int:
    return left.n if isinstance(left, Rows) else left.shape[-1]


def wide(a: Any) -> Any:
    """At least float32, in which squares of 16-bit numbers neither overflow nor lose their digits."""
    if isinstance(a, Rows) or jnp.finfo(a.dtype).bits >= 32:
        return a
    return a.astype(jnp.float32)
