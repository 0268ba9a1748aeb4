from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gradlab.transforms.flows.checks import check_flow, check_shapes
from gradlab.transforms.odes._jax import odeint


def flow_log_density(
    f: Callable[..., Any],
    x: Any,
    *args: Any,
    ts: tuple[float, float],
    log_base: Callable[[Any], Any],
    noise: Any = None,
    **options: Any,
) -> Any:
    """The trace by products J v."""
    x = jnp.asarray(x)
    noise = None if noise is None else jnp.asarray(noise, x.dtype)
    check_flow(f, log_base, x.shape, None if noise is None else noise.shape, ts)
    B, d = x.shape
    vs = jnp.broadcast_to(jnp.eye(d, dtype=x.dtype)[:, None], (d, B, d)) if noise is None else noise
    share = 1 if noise is None else len(noise)
    densities = jax.vmap(log_base)
    velocity = lambda t, z, args: jax.vmap(lambda z: f(t, z, *args))(z)
    shapes = jax.eval_shape(lambda: (velocity(0.0, x, args), densities(x)))
    velocities, logs = (getattr(y, "shape", ()) for y in shapes)
    check_shapes(velocities, logs, x.shape)

    def field(t: Any, state: Any, vs: Any, *args: Any) -> Any:
        y, push = jax.linearize(lambda z: velocity(t, z, args), state[0])
        return y, jnp.einsum("kbd,kbd->b", vs, jax.vmap(push)(vs)) / share

    backwards = jnp.asarray([ts[1], ts[0]], jnp.result_type(float))
    z, change = odeint(field, (x, jnp.zeros(B, x.dtype)), backwards, vs, *args, **options).ys
    return densities(z[-1]) + change[-1]
