"""`solve` and `adjoint`, whose derivatives are solve and adjoint of the system's tangent, to every order.

With S[f] the solution at ts as a function of p = (ts, y0, params), T S its tangent, and A[f](p, u) = (∂S/∂p)ᵀ u:
T S[f] is the second half of S[T f] (and slopes at ts); A comes from integrating backwards, with y from the
polynomials of the forward steps; T A(p, u) along (dp, du) is the pullback of p ↦ (S, T S(p, dp)) at (du, u); and
the pullback of A at w is (that of p ↦ T S(p, w) at u, T S(p, w)), as second derivatives are symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from gradlab.transforms.odes._jax_pairs import paired
from gradlab.transforms.odes._jax_segments import in_segments
from gradlab.transforms.odes._jax_solvers import Integrator
from gradlab.transforms.odes.options import Options, Status, most_missed
from gradlab.transforms.odes.tableaux import METHODS


@dataclass(frozen=True)
class Equation:
    """dy/dt = f(t, y, *args) of the leaves of y; equal where f is the same, so that compiled code is used again."""

    state: Any  # the structure of y
    moving: Any  # the structure of (f, event, args) with its float arrays, which are the parameters
    static: tuple[Any, ...]  # what they hold beside arrays
    rest: Any  # and the structure of that

    def __call__(self, t: Any, y: Any, params: Any, arrays: Any) -> Any:
        f, _, args = self.parts(params, arrays)
        return jax.tree.leaves(f(t, jax.tree.unflatten(self.state, y), *args))

    def event_value(self, t: Any, y: Any, params: Any, arrays: Any) -> Any:
        """The function whose change of sign is the event."""
        _, event, args = self.parts(params, arrays)
        return event(t, jax.tree.unflatten(self.state, y), *args)

    def parts(self, params: Any, arrays: Any) -> Any:
        """f, event and args."""
        static = jax.tree.unflatten(self.rest, self.static)
        return eqx.combine(jax.tree.unflatten(self.moving, params), arrays, static)


@dataclass(frozen=True)
class Tangent:
    """A field and its derivative: of the state (y, s) and the parameters (p, dp), (f, ∂f/∂y s + ∂f/∂p dp)."""

    inner: Any

    def __call__(self, t: Any, both: Any, params: Any, arrays: Any) -> Any:
        (y, s), (p, dp) = both, params
        return jax.jvp(lambda y, p: self.inner(t, y, p, arrays), (y, p), (s, dp))


@dataclass(frozen=True)
class Forward:
    """A field as diffrax calls it."""

    field: Any

    def __call__(self, t: Any, y: Any, args: Any) -> Any:
        return self.field(t, y, *args)


@dataclass(frozen=True)
class Backward:
    """The adjoint's: a' = -(∂f/∂y)ᵀ a and, to be integrated beside it, -(∂f/∂p)ᵀ a."""

    field: Any

    def __call__(self, t: Any, both: Any, args: Any) -> Any:
        path, params, arrays = args
        _, pull = jax.vjp(lambda y, p: self.field(t, y, p, arrays), path.evaluate(t), params)
        return jax.tree.map(jnp.negative, pull(both[0])[: len(both)])


@dataclass(frozen=True)
class Returning:
    """The same with y integrated backwards too: the state is ((y, a), integrals)."""

    field: Any

    def __call__(self, t: Any, both: Any, args: Any) -> Any:
        params, arrays = args
        (y, a), *rest = both
        slope, pull = jax.vjp(lambda y, p: self.field(t, y, p, arrays), y, params)
        da, dp = jax.tree.map(jnp.negative, pull(a))
        return (slope, da), *((dp,) if rest else ())


@dataclass(frozen=True)
class Problem:
    """A field (t, y, params, arrays) -> dy/dt of trees of float arrays, and how it is to be solved."""

    field: Any
    options: Options
    parts: int = 1  # of the state: (y, s) of one, ((y, s), (dy, ds)) of those, ...
    inner: bool = False  # whether it is part of a derivative that was allowed

    def tangent(self) -> Problem:
        """That of the derivative."""
        return Problem(Tangent(self.field), self.options, 2 * self.parts, True)

    def integrator(
        self, dtype: Any, *, recorded: bool = False, backward: bool = False, adjoint: Any = None
    ) -> Integrator:
        """How it is solved; backwards by steps of its own."""
        options = self.options
        tolerance = options.tolerance(float(jnp.finfo(dtype).eps), recorded=recorded, backward=backward)
        if (recorded or backward) and options.step_size is None:
            chosen = accurate_between(options.tableau), accurate_between(options.stiff)
            tolerance = replace(tolerance, tableau=chosen[0], stiff=chosen[1])
        parts = 2 * self.parts if backward and self.returns else self.parts
        return Integrator(tolerance, partial(parted, parts), backward, adjoint)

    @property
    def returns(self) -> bool:
        """Whether y is integrated backwards."""
        return self.options.adjoint == "backsolve"

    def refuse_mode(self, mode: Any) -> None:
        """Refuse a derivative of the solution that was not asked for."""
        if not self.inner or self.options.adjoint == "forward":
            self.options.refuse_mode(mode)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def solve(problem: Problem, ts: Any, y0: Any, params: Any, arrays: Any) -> Any:
    """S: the states at ts; how many evaluations, steps and rejections; the status; where it ended."""
    return integrate(problem, ts, y0, params, arrays)[:-1]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def recorded(problem: Problem, ts: Any, y0: Any, params: Any, arrays: Any) -> Any:
    """S, by finer steps if they are recorded, and what the adjoint needs of them, which has no derivative."""
    *found, path = integrate(problem, ts, y0, params, arrays, recorded=True)
    return *found, sealed((found[0], path))


def integrate(problem: Problem, ts: Any, y0: Any, params: Any, arrays: Any, *, recorded: bool = False) -> Any:
    """The states and how they were found; between the steps too if recorded."""
    kept = recorded and not problem.returns
    run = problem.integrator(jax.tree.leaves(y0)[0].dtype, recorded=kept)
    by = partial(in_segments, run) if kept else run
    found = by(Forward(problem.field), ts[0], ts[-1], y0, (params, arrays), ts=ts)
    return found.ys, found.counts, found.status, found.reached, found.path


def rule(problem: Problem, primals: Any, tangents: Any) -> Any:
    """The tangent of S, whose transpose is A."""

    def asked(at: Any, moved: Any) -> Any:
        problem.refuse_mode("forward")
        return forward(at, moved)

    def forward(at: Any, moved: Any) -> Any:
        return tangent(problem, at[0], moved)[1]

    def transpose(at: Any, us: Any) -> Any:
        problem.refuse_mode("reverse")
        primals, record = at
        return adjoint(problem, us, *primals, record)

    out = recorded(replace(problem, inner=True), *primals)
    moved = paired(asked, transpose, (tuple(primals), out[-1]), tuple(tangents[:3]), out[0], forward)
    return out, (moved, *jax.tree.map(still, out[1:]))


def accurate_between(tableau: Any) -> Any:
    """A method, or rodas5p for an implicit one, as theirs is the polynomial that holds where an equation is stiff."""
    return METHODS["rodas5p"] if tableau is not None and tableau.implicit else tableau


def still(x: Any) -> Any:
    """The tangent of what does not move."""
    return jnp.zeros(x.shape, x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jax.dtypes.float0)


recorded.defjvp(rule)


@solve.defjvp
def _(problem: Problem, primals: Any, tangents: Any) -> Any:
    out, moved = rule(problem, primals, tangents)
    return out[:-1], moved[:-1]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def adjoint(problem: Problem, us: Any, ts: Any, y0: Any, params: Any, arrays: Any, record: Any) -> Any:
    """A: cotangents of ts, y0 and params."""
    unit = largest(us)
    us = jax.tree.map(lambda u: u / unit, us)
    dtype = jax.tree.leaves(y0)[0].dtype
    ys, path = opened(record, dtype)
    steps, run = problem.integrator(dtype, recorded=True), problem.integrator(dtype, backward=True)
    zeros = jax.tree.map(jnp.zeros_like, (y0, params) if jax.tree.leaves(params) else (y0,))

    def back(carry: Any, step: Any) -> Any:
        u, y, start, end = step
        ((x, a), *total), known, size = carry
        a = jax.tree.map(jnp.add, a, u)
        later = dot(u, problem.field(start, y, params, arrays))
        if problem.returns:
            both = (x, a), *total
            gone = run(Returning(problem.field), start, end, both, (params, arrays), size=size)
            return (gone.reached[1], known, gone.size), (later, gone.status)

        def through(state: Any) -> Any:
            t, both, known, size, status = state
            known = path.holding(t, known, steps, Forward(problem.field), (params, arrays))
            begin, polynomials = path.start(known), known[1]
            begin = jnp.where(ts[0] < ts[-1], jnp.maximum(begin, end), jnp.minimum(begin, end))
            at, stiff = (polynomials, params, arrays), polynomials.stiff(t)
            gone = run(Backward(problem.field), t, begin, both, at, stiff=stiff, size=size)
            return begin, gone.reached[1], known, gone.size, jnp.maximum(status, gone.status)

        state = start, (a, *total), known, size, jnp.array(Status.DONE)
        going = lambda state: state[0] != end
        _, (a, *total), known, size, status = jax.lax.while_loop(going, through, state)
        return (((x, a), *total), known, size), (later, status)

    at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    intervals = at(us, slice(1, None)), at(ys, slice(1, None)), ts[1:], ts[:-1]
    begin = ((at(ys, -1), zeros[0]), *zeros[1:]), path and path.known, jnp.zeros_like(ts[0])
    (((x, a), *total), *_), (later, status) = jax.lax.scan(back, begin, intervals, reverse=True)
    first = -dot(a, problem.field(ts[0], y0, params, arrays))
    dts = jnp.concatenate([first[None], later]).astype(ts.dtype)
    dy0 = jax.tree.map(jnp.add, a, at(us, 0))
    out = jax.tree.map(lambda x: unit.astype(x.dtype) * x, (dts, dy0, total[0] if total else params))
    return checked(problem, out, status, x, y0, ys)


@adjoint.defjvp
def _(problem: Problem, primals: Any, tangents: Any) -> Any:
    def forward(primals: Any, moved: Any) -> Any:
        (us, *point, arrays, _), (dus, *dp) = primals, moved
        both = lambda *point: tangent(problem, (*point, arrays), tuple(dp))
        return jax.vjp(both, *point)[1]((dus, us))

    def transpose(primals: Any, ws: Any) -> Any:
        us, *point, arrays, _ = primals
        value, pull = jax.vjp(lambda *point: tangent(problem, (*point, arrays), tuple(ws))[1], *point)
        return (value, *pull(us))

    out = adjoint(problem, *primals)
    return out, paired(forward, transpose, tuple(primals), tuple(tangents[:4]), out)


def tangent(problem: Problem, primals: Any, moved: Any) -> Any:
    """S and T S at (ts, y0, params, arrays) along (dts, dy0, dparams)."""
    (ts, y0, params, arrays), (dts, dy0, dparams) = primals, moved
    times = lambda t, tree: jax.tree.map(lambda x: (t * x).astype(x.dtype), tree)
    slope = problem.field(ts[0], y0, params, arrays)
    dy0 = jax.tree.map(jnp.subtract, dy0, times(dts[0], slope))
    unit = largest(jax.tree.map(lambda x, v: v / jnp.maximum(jnp.abs(x), 1), (y0, params), (dy0, dparams)))
    shrunk = lambda tree: times(1 / unit, tree)
    both = (y0, shrunk(dy0)), (params, shrunk(dparams))
    (ys, s), _, status, _ = solve(problem.tangent(), ts, *both, arrays)
    s = arrived(s, status, problem.options.throw, UNFINISHED.format("tangents", "last"))
    slopes = jax.vmap(lambda t, y, dt: times(dt, problem.field(t, y, params, arrays)))(ts, ys, dts)
    return ys, jax.tree.map(lambda s, k: (unit * s).astype(s.dtype) + k, s, slopes)


def largest(tree: Any) -> Any:
    """The largest entry of a tree, as a unit that it is measured in; one where all are zero."""
    leaves = [jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]
    size = jax.lax.stop_gradient(jnp.max(jnp.array(leaves)))
    return jnp.where(size > 0, size, 1)


def dot(a: Any, b: Any) -> Any:
    """The sum of all products of entries."""
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def parted(parts: int, error: Any) -> Any:
    """The largest, over the parts of a state, of the root mean square."""
    if parts == 1:
        leaves = jax.tree.leaves(error)
        total = sum(jnp.sum(x**2) for x in leaves)
        return jnp.sqrt(total / max(sum(x.size for x in leaves), 1))
    return jnp.maximum(*(parted(parts // 2, half) for half in error))


def checked(problem: Problem, cotangents: Any, status: Any, y: Any, y0: Any, ys: Any) -> Any:
    """The cotangents, if the backward solution arrived, and where y came back with it, if it came to y0."""
    throw = problem.options.throw
    message = UNFINISHED.format("cotangents", "first")
    cotangents = failing(cotangents, (status != Status.DONE).any(), throw, message)
    if not problem.returns:
        return cotangents
    asked = problem.integrator(jax.tree.leaves(y0)[0].dtype).tolerance
    size = jnp.max(jnp.array([jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(ys)]))
    apart = parted(problem.parts, jax.tree.map(jnp.subtract, y, y0))
    missed = apart / (asked.atol + asked.rtol * size)
    limits = most_missed(asked.rtol), 1e4, 1e8  # of which the first is too much, and the others are told
    for most, least in zip((*limits[1:], jnp.inf), limits, strict=True):
        bad = ~(missed <= least) & ((missed <= most) | (most == jnp.inf))
        cotangents = failing(cotangents, bad, throw, problem.options.astray(least))
    return cotangents


UNFINISHED = (
    "odeint: the {} did not arrive at the {} time within max_steps steps, or no step was small enough, or the "
    "derivative of f is not finite; raise max_steps or the tolerances, or name a stiff method"
)


def failing(tree: Any, bad: Any, throw: bool, message: str) -> Any:
    """The tree, or the error, or not-a-number in its place; by a factor, so that its derivatives fail with it."""
    one = jnp.ones(())
    one = eqx.error_if(one, bad, message) if throw else jnp.where(bad, jnp.nan, one)
    return jax.tree.map(lambda x: x * jax.lax.stop_gradient(one).astype(x.dtype), tree)


def arrived(tree: Any, status: Any, throw: bool, message: str) -> Any:
    """States, if all were reached, or the error; else derivatives too are not-a-number where they were not."""
    bad = status != Status.DONE
    if throw:
        return failing(tree, bad, throw, message)
    return jax.tree.map(lambda x: kept(x, bad & jnp.isnan(x)), tree)


@jax.custom_jvp
def kept(x: Any, lost: Any) -> Any:
    """x, whose tangents are not-a-number where it is lost; and cotangents, that are not zero."""
    return x


@kept.defjvp
def _(primals: Any, tangents: Any) -> Any:
    x, lost = primals
    forward = lambda lost, d: jnp.where(lost, jnp.nan, d)
    transpose = lambda lost, u: jnp.where(lost & (u != 0), jnp.nan, u)
    return x, paired(forward, transpose, lost, tangents[0], x)


def sealed(tree: Any) -> Any:
    """A tree whose floats are written as unsigned integers of the same bits, so that no derivative is of them."""
    bits = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(
        lambda x: jax.lax.bitcast_convert_type(x, bits[x.dtype.itemsize]) if is_float(x) else x, tree
    )


def opened(tree: Any, half: Any) -> Any:
    """The floats again; `half` is what those of 16 bits are."""
    floats = {2: half, 4: jnp.float32, 8: jnp.float64}
    is_sealed = lambda x: jnp.issubdtype(x.dtype, jnp.unsignedinteger)
    return jax.tree.map(
        lambda x: jax.lax.bitcast_convert_type(x, floats[x.dtype.itemsize]) if is_sealed(x) else x, tree
    )
