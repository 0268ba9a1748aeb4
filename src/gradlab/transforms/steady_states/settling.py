"""What both frameworks check and say of a state that is to settle."""

from __future__ import annotations

from typing import Any

from gradlab._errors import InputError, KindError

SETTLED = (
    1e-3  # a state is at rest when its last doubling of the time moved it less than this part of its size
)
NEAR = 1e-2  # and the root that Newton's method then finds is this near to it

TIMED = "steady_state: f depends on t; pass an equation that does not, or use odeint"


def unsettled(time: float) -> str:
    """What is said of a state that does not come to rest."""
    return (
        f"steady_state: the state has not settled by t = {time:.3g}; it may grow or oscillate: raise max_doublings or "
        "time_scale, or look at odeint's solution"
    )


def check_times(f: Any, time_scale: Any, max_doublings: Any) -> None:
    """A function, a positive time and number."""
    if not callable(f):
        raise KindError(f"steady_state: f is a {type(f).__name__}; pass a function f(t, y, *args)")
    if not 0 < time_scale < float("inf"):
        raise InputError(f"steady_state: time_scale is {time_scale}; pass a positive number")
    if not isinstance(max_doublings, int) or max_doublings < 1:
        raise InputError(f"steady_state: max_doublings is {max_doublings}; pass a positive whole number")
