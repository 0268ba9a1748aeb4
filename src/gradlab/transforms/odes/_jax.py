from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from gradlab._errors import ConvergenceError, InputError, KindError
from gradlab.transforms.implicit_functions._jax import like
from gradlab.transforms.odes._jax_rules import Equation, Problem, solve
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
) -> Solution:
    """diffrax solves; two functions that are each other's derivatives, of the system and of those of its tangents."""
    options = Options(method, adjoint, rtol, atol, step_size, 4096 if max_steps is None else max_steps, throw)
    if (
        options.tableau.implicit
        or adjoint != "auto"
        or method == "auto"
        or gradient_error
        or event is not None
    ):
        raise InputError("odeint: not there yet in this framework")
    tree = Tree("odeint", "y0", y0)
    check_equation(f, tree)
    ts = times(ts)
    args = jax.tree.map(lambda x: jnp.asarray(x) if hasattr(x, "__array__") else x, args)
    t, y = ts[0], tree.put(tree.leaves)
    if closes_over_tracers(f, t, y, args):
        f = eqx.filter_closure_convert(f, t, y, *args)
    refuse_unlike(tree, jax.eval_shape(lambda: f(t, y, *args)))
    moving, rest = eqx.partition((f, args), eqx.is_inexact_array)
    arrays, static = eqx.partition(rest, eqx.is_array)

    (params, kind), (constants, rest) = jax.tree.flatten(moving), jax.tree.flatten(static)
    problem = Problem(Equation(tree.spec, kind, tuple(constants), rest), options)
    ys, counts, status = solve(problem, ts, tree.leaves, params, arrays)
    ys, status = finished(options, ys, status)
    return Solution(tree.put(ys), counts, status)


def times(ts: Any) -> Any:
    """The times as one vector of floats."""
    ts = jnp.asarray(ts)
    if ts.ndim != 1 or len(ts) < 1:
        raise KindError(
            f"odeint: ts has shape {ts.shape}; pass a vector of times, the first being that of y0"
        )
    if jnp.iscomplexobj(ts) or ts.dtype == bool:
        raise KindError(f"odeint: ts is of {ts.dtype}; pass times as floats")
    ts = ts if jnp.issubdtype(ts.dtype, jnp.floating) else ts.astype(jnp.result_type(float))
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


def finished(options: Options, ys: Any, status: Any) -> Any:
    """The states, if the last time was reached; else as asked."""
    if not options.throw:
        return ys, status
    message = (
        f"odeint: the last time was not reached within max_steps = {options.max_steps} steps, or no step was small "
        "enough, or f is not finite; raise max_steps or the tolerances, or pass throw=False and look at status"
    )
    bad = status != Status.DONE
    if not isinstance(bad, jax.core.Tracer):
        if bad:
            raise ConvergenceError(message)
        return ys, status
    return eqx.error_if(ys, bad, message), status
