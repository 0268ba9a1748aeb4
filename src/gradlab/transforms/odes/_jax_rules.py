"""`solve` and `adjoint`, whose derivatives are solve and adjoint of the system's tangent, to every order.

With S[f] the solution at ts as a function of p = (ts, y0, params), T S its tangent, and A[f](p, u) = (∂S/∂p)ᵀ u:
T S[f] is the second half of S[T f] (and slopes at ts); A comes from integrating backwards, with y from the
polynomials of the forward steps; T A(p, u) along (dp, du) is the pullback of p ↦ (S, T S(p, dp)) at (du, u); and
the pullback of A at w is (that of p ↦ T S(p, w) at u, T S(p, w)), as second derivatives are symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp

from gradlab.transforms.odes._jax_pairs import paired
from gradlab.transforms.odes._jax_solvers import SOLVERS
from gradlab.transforms.odes.options import Options, Status


@dataclass(frozen=True)
class Equation:
    """dy/dt = f(t, y, *args) of the leaves of y; equal where f is the same, so that compiled code is used again."""

    state: Any  # the structure of y
    moving: Any  # the structure of (f, args) with its float arrays, which are the parameters
    static: tuple[Any, ...]  # what f and args hold beside arrays
    rest: Any  # and the structure of that

    def __call__(self, t: Any, y: Any, params: Any, arrays: Any) -> Any:
        static = jax.tree.unflatten(self.rest, self.static)
        f, args = eqx.combine(jax.tree.unflatten(self.moving, params), arrays, static)
        return jax.tree.leaves(f(t, jax.tree.unflatten(self.state, y), *args))


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
        found, params, arrays = args
        _, pull = jax.vjp(lambda y, p: self.field(t, y, p, arrays), found.evaluate(t), params)
        return jax.tree.map(jnp.negative, pull(both[0])[: len(both)])


@dataclass(frozen=True)
class Problem:
    """A field (t, y, params, arrays) -> dy/dt of trees of float arrays, and how it is to be solved."""

    field: Any
    options: Options
    parts: int = 1  # of the state: (y, s) of one, ((y, s), (dy, ds)) of those, ...

    def tangent(self) -> Problem:
        """That of the derivative."""
        return Problem(Tangent(self.field), self.options, 2 * self.parts)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def solve(problem: Problem, ts: Any, y0: Any, params: Any, arrays: Any) -> Any:
    """S: the states at ts; how many evaluations, steps and rejections; the status."""
    found = integrate(problem, ts[0], ts[-1], y0, (params, arrays), dfx.SaveAt(ts=ts))
    unreached = ~jnp.isfinite(found.ts)
    ys = jax.tree.map(lambda y: jnp.where(unreached.reshape(-1, *[1] * (y.ndim - 1)), jnp.nan, y), found.ys)
    accepted, rejected = found.stats["num_accepted_steps"], found.stats["num_rejected_steps"]
    stages = problem.options.tableau.stages - 1
    counts = {"evaluations": stages * (accepted + rejected) + 1, "accepted": accepted, "rejected": rejected}
    return ys, counts, status(found, ys)


def status(found: Any, ys: Any) -> Any:
    """Of a solution of diffrax."""
    is_ = lambda result: found.result == result
    finite = jnp.array([jnp.isfinite(y).all() for y in jax.tree.leaves(ys)]).all()
    few = jnp.where(is_(dfx.RESULTS.max_steps_reached), Status.MAX_STEPS, Status.STEP_TOO_SMALL)
    return jnp.where(is_(dfx.RESULTS.successful), jnp.where(finite, Status.DONE, Status.NOT_FINITE), few)


@solve.defjvp
def _(problem: Problem, primals: Any, tangents: Any) -> Any:
    ys, counts, done = solve(problem, *primals)

    def forward(primals: Any, moved: Any) -> Any:
        return tangent(problem, primals, moved)[1]

    def transpose(primals: Any, us: Any) -> Any:
        return adjoint(problem, us, *primals)

    zero = lambda x: jax.tree.map(lambda x: jnp.zeros(x.shape, jax.dtypes.float0), x)
    moved = paired(forward, transpose, tuple(primals), tuple(tangents[:3]), ys)
    return (ys, counts, done), (moved, zero(counts), zero(done))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def adjoint(problem: Problem, us: Any, ts: Any, y0: Any, params: Any, arrays: Any) -> Any:
    """A: cotangents of ts, y0 and params."""
    unit = largest(us)
    us = jax.tree.map(lambda u: u / unit, us)
    found = integrate(problem, ts[0], ts[-1], y0, (params, arrays), dfx.SaveAt(ts=ts, dense=True))

    def back(carry: Any, step: Any) -> Any:
        u, y, start, end = step
        a = jax.tree.map(jnp.add, carry[0], u)
        slope = problem.field(start, y, params, arrays)
        back = Backward(problem.field)
        gone = integrate(
            problem, start, end, (a, *carry[1:]), (found, params, arrays), dfx.SaveAt(t1=True), back
        )
        return jax.tree.map(lambda x: x[0], gone.ys), dot(u, slope)

    zeros = jax.tree.map(jnp.zeros_like, (y0, params) if jax.tree.leaves(params) else (y0,))
    at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    steps = at(us, slice(1, None)), at(found.ys, slice(1, None)), ts[1:], ts[:-1]
    (a, *total), later = jax.lax.scan(back, zeros, steps, reverse=True)
    first = -dot(a, problem.field(ts[0], y0, params, arrays))
    dts = jnp.concatenate([first[None], later]).astype(ts.dtype)
    dy0 = jax.tree.map(jnp.add, a, at(us, 0))
    return jax.tree.map(lambda x: unit.astype(x.dtype) * x, (dts, dy0, total[0] if total else params))


@adjoint.defjvp
def _(problem: Problem, primals: Any, tangents: Any) -> Any:
    def forward(primals: Any, moved: Any) -> Any:
        (us, *point, arrays), (dus, *dp) = primals, moved
        both = lambda *point: tangent(problem, (*point, arrays), tuple(dp))
        return jax.vjp(both, *point)[1]((dus, us))

    def transpose(primals: Any, ws: Any) -> Any:
        us, *point, arrays = primals
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
    (ys, s), *_ = solve(problem.tangent(), ts, (y0, shrunk(dy0)), (params, shrunk(dparams)), arrays)
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


def integrate(problem: Problem, t0: Any, t1: Any, y0: Any, args: Any, saveat: Any, back: Any = None) -> Any:
    """By diffrax; backwards, with a field of its own, the state is (a, integrals) and a alone is controlled."""
    options = problem.options
    first = jax.tree.leaves(y0)[0]
    eps = float(jnp.finfo(first.dtype).eps)
    tolerance = options.tolerance(eps, recorded=saveat.dense, backward=back is not None)
    dt0: Any = None
    controller: Any
    if tolerance.step_size is None:
        norm = partial(parted, problem.parts) if back is None else lambda e: parted(problem.parts, e[0])
        controller = dfx.PIDController(tolerance.rtol, tolerance.atol, norm=norm)
    else:
        dt0, controller = jnp.sign(t1 - t0) * tolerance.step_size, dfx.ConstantStepSize()
    return dfx.diffeqsolve(
        dfx.ODETerm(back or Forward(problem.field)),
        SOLVERS[tolerance.tableau.name](),
        t0,
        t1,
        dt0,
        y0,
        args,
        saveat=saveat,
        stepsize_controller=controller,
        adjoint=dfx.ForwardMode(),
        max_steps=tolerance.max_steps,
        throw=False,
    )


def parted(parts: int, error: Any) -> Any:
    """The largest, over the parts of a state, of the root mean square."""
    if parts == 1:
        leaves = jax.tree.leaves(error)
        total = sum(jnp.sum(x**2) for x in leaves)
        return jnp.sqrt(total / max(sum(x.size for x in leaves), 1))
    return jnp.maximum(*(parted(parts // 2, half) for half in error))
