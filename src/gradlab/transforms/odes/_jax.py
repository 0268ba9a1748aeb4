from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gradlab._errors import ConvergenceError, GradientWarning, InputError, KindError
from gradlab.transforms.implicit_functions._jax import like
from gradlab.transforms.odes._jax_events import until
from gradlab.transforms.odes._jax_recorded import checkpoint, direct
from gradlab.transforms.odes._jax_rules import Equation, Problem, arrived, dot, solve, tangent
from gradlab.transforms.odes.options import Adjoint, Method, Options, Solution, Status, check_equation
from gradlab.transforms.trees._jax import Tree


def odeint(
    f: Callable[..., Any],
    y0: Any,
    ts: Any,
    *args: Any,
    method: Method = "tsit5",
    adjoint: Adjoint = "auto",
    rtol: float | None = None,
    atol: float | None = None,
    step_size: float | None = None,
    max_steps: int | None = None,
    throw: bool = True,
    gradient_error: bool = False,
    event: Callable[..., Any] | None = None,
    compile: bool = False,
) -> Solution:
    """diffrax solves; two functions that are each other's derivatives, of the system and of those of its tangents."""
    options = Options(method, adjoint, rtol, atol, step_size, 4096 if max_steps is None else max_steps, throw)
    tree = Tree("odeint", "y0", y0)
    check_equation(f, tree)
    ts, options = times(ts, jnp.result_type(*tree.leaves)), with_room(options, ts)
    args = jax.tree.map(lambda x: jnp.asarray(x) if hasattr(x, "__array__") else x, args)
    t, y = ts[0], tree.put(tree.leaves)
    refuse_unlike(tree, jax.eval_shape(lambda: f(t, y, *args)))
    if event is not None:
        refuse_event(event, lambda: event(t, y, *args))
    convert = lambda g: (
        eqx.filter_closure_convert(g, t, y, *args) if closes_over_tracers(g, t, y, args) else g
    )
    moving, rest = eqx.partition(
        (convert(f), event if event is None else convert(event), args), eqx.is_inexact_array
    )
    arrays, static = eqx.partition(rest, eqx.is_array)

    (params, kind), (constants, rest) = jax.tree.flatten(moving), jax.tree.flatten(static)
    problem = Problem(Equation(tree.spec, kind, tuple(constants), rest), options)
    event_time, search = None, None
    if event is not None:
        ts, event_time, search = until(problem, ts, tree.leaves, params, arrays)
    by: Any = {"direct": direct, "checkpoint": checkpoint}.get(adjoint, solve)
    ys, counts, status, reached = by(problem, ts, tree.leaves, params, arrays)
    status = status if search is None else jnp.where(search == Status.DONE, status, search)
    ys, status = finished(options, ys, status, reached)
    off = disagreement(by, problem, ts, tree.leaves, params, arrays) if gradient_error else None
    return Solution(tree.put(ys), counts, status, off, event_time)


def with_room(options: Options, ts: Any) -> Options:
    """No room for more fixed steps than known times take, to a power of two; adaptive ones keep max_steps."""
    known = (
        not any(isinstance(t, jax.core.Tracer) for t in jax.tree.leaves(ts))
        and np.ndim(ts) == 1
        and len(ts) > 1
    )
    if options.step_size is None or not known:
        return options
    steps = abs(float(ts[-1] - ts[0])) / options.step_size + len(ts) + 1  # one cut short before each time
    room = 2 ** math.ceil(math.log2(steps)) if math.isfinite(steps) else options.max_steps
    return replace(options, max_steps=min(options.max_steps, room))


def times(ts: Any, dtype: Any) -> Any:
    """The times as one vector of floats, no finer than the state: diffrax would make the state as fine as them."""
    ts = jnp.asarray(ts)
    if ts.ndim != 1 or len(ts) < 1:
        raise KindError(
            f"odeint: ts has shape {ts.shape}; pass a vector of times, the first being that of y0"
        )
    if jnp.iscomplexobj(ts) or ts.dtype == bool:
        raise KindError(f"odeint: ts is of {ts.dtype}; pass times as floats")
    ts = ts.astype(jnp.promote_types(dtype, jnp.float32))
    steps = jnp.diff(ts)
    bad = ~(jnp.isfinite(ts).all() & ((steps > 0).all() | (steps < 0).all()))
    if not isinstance(bad, jax.core.Tracer):
        if bad:
            raise InputError(UNSORTED)
        return ts
    return eqx.error_if(ts, bad, UNSORTED)


UNSORTED = "odeint: ts is not sorted, or holds a time twice; pass times that rise, or fall, throughout"


def closes_over_tracers(f: Callable[..., Any], t: Any, y: Any, args: Any) -> bool:
    """Whether f holds an array that a transform is at work on, outside of any tree."""
    if isinstance(f, eqx.Module):
        return False
    dynamic, static = eqx.partition((t, y, args), eqx.is_array)

    def run(dynamic: Any) -> Any:
        t, y, args = eqx.combine(dynamic, static)
        return f(t, y, *args)

    return any(isinstance(c, jax.core.Tracer) for c in jax.make_jaxpr(run)(dynamic).consts)


def refuse_unlike(tree: Tree, slope: Any) -> None:
    """Refuse an f whose output is not like y0."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), slope)
    like(tree, "f's output", zeros)


def refuse_event(event: Any, call: Callable[[], Any]) -> None:
    """Refuse an event that is no function to one float."""
    if not callable(event):
        raise KindError(f"odeint: event is a {type(event).__name__}; pass a function event(t, y, *args)")
    found = jax.tree.leaves(jax.eval_shape(call))
    if len(found) != 1 or found[0].shape or not jnp.issubdtype(found[0].dtype, jnp.floating):
        kind = ", ".join(f"shape {x.shape}" for x in found)
        raise InputError(
            f"odeint: event returns of {kind}; return a float scalar, whose change of sign is the event"
        )


def finished(options: Options, ys: Any, status: Any, reached: Any) -> Any:
    """The states, if the last time was reached; else as asked."""
    if options.throw and not isinstance(status, jax.core.Tracer):
        if status != Status.DONE:
            t, leaves = reached
            y = [float(x) for leaf in leaves for x in jnp.ravel(leaf)[:9]]
            raise ConvergenceError(options.unfinished(Status(int(status)), float(t), y))
        return ys, status
    message = (
        f"odeint: the last time was not reached within max_steps = {options.max_steps} steps, or no step was small "
        "enough, or f is not finite; raise max_steps or the tolerances, or pass throw=False and look at status"
    )
    return arrived(ys, status, options.throw, message), status


def disagreement(by: Any, problem: Problem, ts: Any, y0: Any, params: Any, arrays: Any) -> Any:
    """|⟨A u, v⟩ - ⟨u, T S v⟩| / (|u| |T S v|) of a random u and v, whose entries are as large as the point's."""
    point = jax.lax.stop_gradient((ts, y0, params))
    if problem.options.adjoint == "forward":
        problem = replace(problem, options=replace(problem.options, adjoint="auto"))
    ys, pull = jax.vjp(lambda *point: by(problem, *point, arrays)[0], *point)
    key = jax.random.key(0)
    u = drawn(jax.random.fold_in(key, 0), ys)
    v = jax.tree.map(
        lambda r, x: r * jnp.where(x == 0, 1, x), drawn(jax.random.fold_in(key, 1), point), point
    )
    moved = tangent(replace(problem, inner=True), (*point, arrays), v)[1]
    off = jnp.abs(dot(pull(u), v) - dot(u, moved)) / jnp.sqrt(dot(u, u) * dot(moved, moved))
    off = jax.lax.stop_gradient(off)
    asked = problem.integrator(y0[0].dtype).tolerance.rtol
    if isinstance(off, jax.core.Tracer):
        jax.debug.callback(lambda off: unresolved(problem.options, off, asked), off)
    else:
        unresolved(problem.options, off, asked)
    return off


def drawn(key: Any, tree: Any) -> Any:
    """Normal numbers like the leaves of a tree."""
    leaves, spec = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    found = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(spec, found)


def unresolved(options: Options, off: Any, asked: float) -> None:
    """Warn of a gradient that is not as good as the tolerances."""
    if not np.all(off <= 100 * asked):
        warnings.warn(options.unresolved(float(np.max(off))), GradientWarning, stacklevel=2)
