"""What is known of a solution between its steps."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp

from gradlab.transforms.odes.tableaux import METHODS


class Polynomial(dfx.AbstractLocalInterpolation):
    """y0 + Σⱼ θʲ⁺¹ Σᵢ denseⱼᵢ kᵢ for t = t0 + θ (t1 - t0), by a method's own weights."""

    name: str = eqx.field(static=True)
    t0: Any  # type: ignore[misc]
    t1: Any  # type: ignore[misc]
    y0: Any
    k: Any

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> Any:
        """The state at a time, or how much it rises between two."""
        if t1 is not None:
            return jax.tree.map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        rows = METHODS[self.name].dense
        theta = (t0 - self.t0) / jnp.where(self.t1 == self.t0, 1, self.t1 - self.t0)
        weights = theta ** jnp.arange(1, len(rows) + 1) @ jnp.array(rows, theta.dtype)
        return jax.tree.map(lambda y, k: y + jnp.tensordot(weights.astype(k.dtype), k, 1), self.y0, self.k)


@cache
def polynomial(name: str) -> Any:
    """That of a method, for diffrax; one object a name, as compiled code is kept by it."""
    return partial(Polynomial, name)


class Path(eqx.Module):
    """A solution by a first method until a time and, from there on, by a second."""

    pieces: tuple[dfx.DenseInterpolation, ...]
    until: Any
    up: Any  # 1, or -1 where time falls: a piece without a step does not tell

    def evaluate(self, t: Any) -> Any:
        """The state at a time."""
        first, *second = (within(piece, t) for piece in self.pieces)
        if not second:
            return first
        late = self.stiff(t)
        return jax.tree.map(lambda a, b: jnp.where(late, b, a), first, second[0])

    def stiff(self, t: Any) -> Any:
        """Whether it is the second that holds at a time: where the first took no step, it always is."""
        if len(self.pieces) == 1:
            return False
        first, second = (piece.ts_size > 1 for piece in self.pieces)
        return ~first | (second & ((t - self.until) * self.up > 0))


def within(piece: dfx.DenseInterpolation, t: Any) -> Any:
    """The state by the polynomial of the step that a time lies in.

    Implicit methods ask a little past the ends; never further than the polynomial of the last step is good for.
    """
    t = t * piece.direction
    i = jnp.clip(jnp.searchsorted(piece.ts, t) - 1, 0, jnp.maximum(piece.ts_size - 2, 0))
    start, end = piece.ts[i], piece.ts[i + 1]
    t = jnp.clip(t, start - (end - start), end + (end - start))
    step = piece.interpolation_cls(t0=start, t1=end, **jax.tree.map(lambda x: x[i], piece.infos))
    return step.evaluate(t)
