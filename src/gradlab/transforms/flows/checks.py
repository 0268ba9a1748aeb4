"""What both frameworks check of a flow's arguments."""

from __future__ import annotations

from typing import Any

from gradlab._errors import InputError, KindError


def check_flow(f: Any, log_base: Any, x: tuple[int, ...], noise: tuple[int, ...] | None, ts: Any) -> None:
    """Functions, shapes and times."""
    for name, function in (("f", f), ("log_base", log_base)):
        if not callable(function):
            raise KindError(f"flow_log_density: {name} is a {type(function).__name__}; pass a function")
    if len(x) != 2:
        raise InputError(f"flow_log_density: x has shape {x}; pass samples (B, d)")
    if noise is not None and (len(noise) != 3 or noise[1:] != x or not noise[0]):
        raise InputError(f"flow_log_density: noise has shape {noise}; pass directions (k, {x[0]}, {x[1]})")
    if not hasattr(ts, "__len__") or len(ts) != 2:
        raise InputError(
            "flow_log_density: ts is not a pair; pass the time of the known density, and that of x"
        )


def check_shapes(velocity: tuple[int, ...], density: tuple[int, ...], x: tuple[int, ...]) -> None:
    """Of what f and log_base give for all samples."""
    if velocity != x:
        raise InputError(
            f"flow_log_density: f gives shape {velocity[1:]} for a sample of shape {x[1:]}; return one velocity like it"
        )
    if density != x[:1]:
        raise InputError(
            f"flow_log_density: log_base gives shape {density[1:]} for one sample; return a scalar"
        )
