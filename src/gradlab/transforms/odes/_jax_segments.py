"""A solution kept by segments: the states at which they begin, and the polynomials of the steps of one of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp

from gradlab.transforms.odes._jax_dense import Path
from gradlab.transforms.odes._jax_solvers import Found, Integrator
from gradlab.transforms.odes.options import Status


class Segments(eqx.Module):
    """Of so many steps each, whose times are known: those of a segment are taken again, without a choice.

    Room for S segments of N steps takes the memory of about S + N·stages states, where that for S·N steps would be
    their product.
    """

    begins: Any  # (S,) times, and the states there
    steps: Any  # (S, N + 1) times of each method's, and how many; until when the first holds
    known: tuple[Any, Path]  # the number and the polynomials of one, at first of the last

    def start(self, known: Any) -> Any:
        """The time at which a segment begins."""
        return self.begins[0][known[0]]

    def holding(self, t: Any, known: Any, run: Integrator, field: Any, args: Any) -> Any:
        """The segment that ends at t, or that t is within, no later than the one that is known."""

        def earlier(known: Any) -> Any:
            i, path = known[0] - 1, known[1]
            taken, until = jax.tree.map(lambda x: x[i], self.steps)
            y, pieces = jax.tree.map(lambda y: y[i], self.begins[1]), []
            methods = run.tolerance.tableau, run.tolerance.stiff
            for tableau, piece, (times, size) in zip(methods, path.pieces, taken, strict=False):
                terms, at = dfx.ODETerm(field), times * path.up
                y, infos = again(run.solver(tableau), terms, at, size, y, args, piece.infos)
                new = times, size, infos, path.up
                pieces.append(eqx.tree_at(lambda p: (p.ts, p.ts_size, p.infos, p.direction), piece, new))
            return i, Path(tuple(pieces), until, path.up)

        begun = lambda known: (known[0] > 0) & ((t - self.start(known)) * known[1].up <= 0)
        return jax.lax.while_loop(begun, earlier, known)


def again(solver: Any, terms: Any, times: Any, size: Any, y: Any, args: Any, infos: Any) -> Any:
    """The state at the end of steps between these times, and what their polynomials are made of."""

    def step(i: Any, carry: Any) -> Any:
        y, state, infos = carry
        y, _, dense, state, _ = solver.step(terms, times[i], times[i + 1], y, args, state, False)
        return y, state, jax.tree.map(lambda xs, x: xs.at[i].set(x), infos, dense)

    begin = y, solver.init(terms, times[0], times[1], y, args), infos
    y, _, infos = jax.lax.fori_loop(0, size - 1, step, begin)
    return y, infos


def in_segments(run: Integrator, field: Any, t0: Any, t1: Any, y0: Any, args: Any, ts: Any) -> Found:
    """The solution at the times, and its segments as the path."""
    most = run.tolerance.max_steps
    room = min(most, max(32, 2 ** int(math.log2(most) / 2)))
    short = replace(run, tolerance=replace(run.tolerance, max_steps=room))
    count = -(-most // room)
    up = jnp.where(t0 < t1, 1, -1)

    def segment(found: Found) -> Found:
        (t, y), (stiff, _) = found.reached, found.seen
        return short(field, t, t1, y, args, dense=True, stiff=stiff, size=found.size)

    def taken(path: Path) -> Any:
        return tuple((piece.ts, piece.ts_size) for piece in path.pieces), path.until

    def more(state: Any) -> Any:
        i, _, found, *_ = state
        return (i == 0) | ((i < count) & (found.status == Status.MAX_STEPS))

    def go_on(state: Any) -> Any:
        i, j, last, ys, begins, steps = state
        found = segment(last)
        put = lambda xs, x: xs.at[i].set(x)
        begins, steps = jax.tree.map(put, (begins, steps), (last.reached, taken(found.path)))
        reached = lambda j, ys: (j < len(ts)) & ((ts[j] - found.reached[0]) * up <= 0)
        write = lambda j: lambda ys, y: ys.at[j].set(y)
        save = lambda j, ys: (j + 1, jax.tree.map(write(j), ys, found.path.evaluate(ts[j])))
        j, ys = jax.lax.while_loop(lambda x: reached(*x), lambda x: save(*x), (j, ys))
        counts = jax.tree.map(jnp.add, last.counts, found.counts)
        return i + 1, j, found._replace(counts=counts), ys, begins, steps

    begin = Found(None, {}, None, (t0, y0), None, (jnp.array(False), None), jnp.zeros_like(t0))
    blank = lambda x: jnp.zeros(x.shape, x.dtype)
    shapes = jax.eval_shape(segment, begin)
    first = jax.tree.map(blank, shapes)._replace(reached=begin.reached)
    ys = jax.tree.map(lambda y: jnp.full((len(ts), *y.shape), jnp.nan, y.dtype).at[0].set(y), y0)
    many = lambda tree: jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), tree)
    state = 0, 1, first, ys, many(begin.reached), many(taken(shapes.path))
    i, _, found, ys, begins, steps = jax.lax.while_loop(more, go_on, state)
    over = found.counts["accepted"] + found.counts["rejected"] > most
    status = jnp.where(over, Status.MAX_STEPS, found.status)
    return found._replace(ys=ys, status=status, path=Segments(begins, steps, (i - 1, found.path)))
