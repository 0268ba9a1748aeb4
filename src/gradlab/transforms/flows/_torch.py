from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gradlab.transforms.flows.checks import check_flow, check_shapes
from gradlab.transforms.odes._torch import odeint
from gradlab.transforms.repairs._torch import unseen


def flow_log_density(
    f: Callable[..., Any],
    x: Any,
    *args: Any,
    ts: tuple[float, float],
    log_base: Callable[[Any], Any],
    noise: Any = None,
    **options: Any,
) -> Any:
    """The trace by products Jᵀ v."""
    x = torch.as_tensor(x)
    noise = None if noise is None else torch.as_tensor(noise).to(x)
    check_flow(f, log_base, tuple(x.shape), None if noise is None else tuple(noise.shape), ts)
    B, d = x.shape
    vs = torch.eye(d, dtype=x.dtype, device=x.device)[:, None].expand(d, B, d) if noise is None else noise
    share = 1 if noise is None else len(noise)
    densities = torch.func.vmap(log_base)
    velocity = lambda t, z, args: torch.func.vmap(lambda z: f(t, z, *args))(z)
    with unseen(torch.no_grad()):
        shapes = velocity(x.new_tensor(float(ts[0])), x, args), densities(x)
    velocities, logs = (tuple(getattr(y, "shape", ())) for y in shapes)
    check_shapes(velocities, logs, tuple(x.shape))

    def field(t: Any, state: Any, vs: Any, *args: Any) -> Any:
        pulled: Any = torch.func.vjp(lambda z: velocity(t, z, args), state[0])
        y, pull = pulled
        return y, torch.einsum("kbd,kbd->b", vs, torch.func.vmap(pull)(vs)[0]) / share

    backwards = torch.tensor([float(ts[1]), float(ts[0])], dtype=torch.float64)
    z, change = odeint(field, (x, x.new_zeros(B)), backwards, vs, *args, **options).ys
    return densities(z[-1]) + change[-1]
