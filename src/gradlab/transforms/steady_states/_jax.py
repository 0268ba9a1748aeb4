from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from gradlab.transforms.implicit_functions._jax import root
from gradlab.transforms.odes._jax import odeint
from gradlab.transforms.steady_states.settling import NEAR, SETTLED, TIMED, check_times, unsettled
from gradlab.transforms.trees._jax import Tree


def steady_state(
    f: Callable[..., Any],
    y0: Any,
    *args: Any,
    time_scale: float = 1.0,
    max_doublings: int = 40,
    linear_solver: Any = "direct",
    **options: Any,
) -> Any:
    """`root` with a solver that follows the state to where it rests."""
    check_times(f, time_scale, max_doublings)
    options = {"rtol": 1e-4, **options}
    tree = Tree("steady_state", "y0", y0)

    def residual(y: Any, *args: Any) -> Any:
        return f(jnp.zeros((), tree.dtype), y, *args)

    def solver(residual: Any, y: Any, *args: Any) -> Any:
        flat = lambda y: ravel_pytree(y)[0]
        apart = lambda a, b: jnp.linalg.norm(flat(a) - flat(b))
        start, late = flat(residual(y, *args)), flat(f(jnp.asarray(time_scale, tree.dtype), y, *args))
        y = eqx.error_if(y, jnp.any(start != late), TIMED)
        newton = root(residual, linear_solver=linear_solver, unconverged="warn")

        def follow(carry: Any) -> Any:
            y, _, span, count, _ = carry
            last = y
            ys = odeint(f, y, jnp.stack([jnp.zeros_like(span), span]), *args, **options).ys
            y = jax.tree.map(lambda x: x[-1], ys)
            size = jnp.linalg.norm(flat(y))
            rests = apart(y, last) <= SETTLED * size
            found = jax.lax.cond(rests, lambda: newton(y, *args), lambda: y)
            rests &= apart(found, y) <= NEAR * jnp.maximum(size, jnp.finfo(tree.dtype).tiny)
            return y, found, 2 * span, count + 1, rests

        going = lambda carry: ~carry[4] & (carry[3] < max_doublings)
        first = (y, y, jnp.asarray(time_scale, jnp.result_type(float)), 0, jnp.asarray(False))
        _, found, _, _, rests = jax.lax.while_loop(going, follow, first)
        return eqx.error_if(found, ~rests, unsettled(time_scale * 2.0**max_doublings))

    return root(residual, solver, linear_solver=linear_solver)(y0, *args)
