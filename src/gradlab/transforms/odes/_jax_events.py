"""When a function of time and state first changes its sign, with the derivative of that time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import optimistix as optx

from gradlab.transforms.implicit_functions._jax import root
from gradlab.transforms.odes._jax_rules import Forward, Problem, solve


def until(problem: Problem, ts: Any, y0: Any, params: Any, arrays: Any) -> tuple[Any, Any, Any]:
    """The times, those past the event being its own; when that is, infinity where it does not come to pass; and the
    status of the search.

    That time is the root of event(t, y(t)), whose derivatives are those of y by `solve`, in every mode.
    """
    found, occurred, status = located(problem, ts, y0, params, arrays)
    free = replace(problem, options=replace(problem.options, adjoint="auto"), inner=True)

    def residual(t: Any, start: Any, y0: Any, params: Any) -> Any:
        ys, *_ = solve(free, jnp.stack([start, t]), y0, params, arrays)
        value = problem.field.event_value(t, jax.tree.map(lambda y: y[-1], ys), params, arrays)
        return jnp.where(occurred, value, t - found)

    at = root(residual, lambda residual, t, *_: t)(found, ts[0], y0, params)
    up = jnp.where(ts[0] < ts[-1], 1, -1)
    return jnp.where(up * ts < up * at, ts, at), jnp.where(occurred, at, jnp.inf), status


@partial(jax.jit, static_argnums=0)
def located(problem: Problem, ts: Any, y0: Any, params: Any, arrays: Any) -> tuple[Any, Any, Any]:
    """The time (else the last), by steps as fine as those of a derivative, whether it comes to pass, and the status;
    no derivatives.
    """
    ts, y0, params = jax.lax.stop_gradient((ts, y0, params))
    dtype = jax.tree.leaves(y0)[0].dtype
    rounding = float(8 * jnp.finfo(dtype).eps)
    up = jnp.where(ts[0] < ts[-1], 1, -1)
    value = lambda t, y, args, **_: problem.field.event_value(up * t, y, *args)
    bisection: Any = optx.Bisection
    event = dfx.Event(value, bisection(rounding, rounding))
    run = replace(problem.integrator(dtype, recorded=True), event=event)
    found = run(Forward(problem.field), ts[0], ts[-1], y0, (params, arrays))
    return jnp.where(found.seen[1], found.reached[0], ts[-1]), found.seen[1], found.status
