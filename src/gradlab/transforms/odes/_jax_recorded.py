"""Adjoints that differentiate the solver's own steps, their sizes held constant: diffrax's."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp

from gradlab._errors import StrategyError
from gradlab.transforms.odes._jax_pairs import paired
from gradlab.transforms.odes._jax_rules import Forward, Problem, integrate, still


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def direct(problem: Problem, ts: Any, y0: Any, params: Any, arrays: Any) -> Any:
    """S, differentiated by diffrax's DirectAdjoint in every mode."""
    return integrate(problem, ts, y0, params, arrays)[:-1]


@direct.defjvp
def _(problem: Problem, primals: Any, tangents: Any) -> Any:
    *point, arrays = primals
    by_steps = partial(stepped, problem, dfx.DirectAdjoint(), arrays)
    return jax.jvp(by_steps, tuple(point), tuple(tangents[:3]))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def checkpoint(problem: Problem, ts: Any, y0: Any, params: Any, arrays: Any) -> Any:
    """S, differentiated by diffrax's RecursiveCheckpointAdjoint, once and in reverse mode."""
    return integrate(problem, ts, y0, params, arrays)[:-1]


@checkpoint.defjvp
def _(problem: Problem, primals: Any, tangents: Any) -> Any:
    *point, arrays = primals

    def by_steps(*point: Any) -> Any:
        ys, *rest = stepped(problem, dfx.RecursiveCheckpointAdjoint(), arrays, *point, order=1)
        return ys, rest

    ys, pull, rest = jax.vjp(by_steps, *once(tuple(point)), has_aux=True)
    moved = paired(refused_forward, lambda pull, us: pull(us), pull, tuple(tangents[:3]), ys)
    return (ys, *rest), (moved, *jax.tree.map(still, rest))


@jax.custom_jvp
def once(point: Any) -> Any:
    """The point, which has no derivative."""
    return point


@once.defjvp
def _(primals: Any, tangents: Any) -> Any:
    raise StrategyError(REFUSAL.format("is of a higher order"))


def refused_forward(*_: Any) -> Any:
    """In the place of a tangent."""
    raise StrategyError(REFUSAL.format("is taken in forward mode"))


REFUSAL = (
    "odeint: adjoint='checkpoint' is of reverse mode and first order in jax, and this derivative {}; pass "
    "adjoint='auto' or 'direct', which have every mode"
)


def stepped(
    problem: Problem, adjoint: Any, arrays: Any, ts: Any, y0: Any, params: Any, *, order: int = 4
) -> Any:
    """S as its steps give it. Times stand still in them, and move by a step of size zero at each."""
    fixed = jax.lax.stop_gradient(ts)
    field = lambda t, y: problem.field(t, y, params, arrays)
    nudge = partial(by_slope if order == 1 else by_classical_step, field)
    run = problem.integrator(jax.tree.leaves(y0)[0].dtype, adjoint=adjoint)
    start = nudge(ts[0], y0, fixed[0] - ts[0])
    found = run(Forward(problem.field), fixed[0], fixed[-1], start, (params, arrays), ts=fixed)
    later = jax.vmap(nudge)(fixed[1:], jax.tree.map(lambda y: y[1:], found.ys), (ts - fixed)[1:])
    ys = jax.tree.map(lambda y, ys: jnp.concatenate([y[None], ys]), y0, later)
    if not problem.options.throw:  # a cotangent of what was not reached, not-a-number, comes to all
        total: Any = sum(jnp.sum(x) for x in jax.tree.leaves((ts, y0, params)))
        zero = total - jax.lax.stop_gradient(total)
        ys = jax.tree.map(lambda y: jnp.where(jnp.isnan(y), y + zero.astype(y.dtype), y), ys)
    return ys, found.counts, found.status, jax.lax.stop_gradient(found.reached)


def by_slope(field: Any, t: Any, y: Any, h: Any) -> Any:
    """The state after a step of size zero: itself, with its first derivative in h."""
    slope = jax.lax.stop_gradient(field(t, y))
    return jax.tree.map(lambda y, k: y + (h * k).astype(y.dtype), y, slope)


def by_classical_step(field: Any, t: Any, y: Any, h: Any) -> Any:
    """The same by the classical method, with its first four derivatives."""
    ahead = lambda y, h, k: jax.tree.map(lambda y, k: y + (h * k).astype(y.dtype), y, k)
    k1 = field(t, y)
    k2 = field(t + h / 2, ahead(y, h / 2, k1))
    k3 = field(t + h / 2, ahead(y, h / 2, k2))
    k4 = field(t + h, ahead(y, h, k3))
    return ahead(y, h / 6, jax.tree.map(lambda a, b, c, d: a + 2 * b + 2 * c + d, k1, k2, k3, k4))
