from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gradlab._errors import ConvergenceError, InputError
from gradlab.transforms.implicit_functions._torch import root
from gradlab.transforms.odes._torch import odeint
from gradlab.transforms.steady_states.settling import NEAR, SETTLED, TIMED, check_times, unsettled
from gradlab.transforms.trees._torch import Tree


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
    tree_of = lambda y: Tree("steady_state", "y0", y)
    tree = tree_of(y0)
    time = lambda t: torch.tensor(t, dtype=tree.dtype, device=tree.leaves[0].device)

    def residual(y: Any, *args: Any) -> Any:
        return f(time(0.0), y, *args)

    def solver(residual: Any, y: Any, *args: Any) -> Any:
        flat = lambda y: tree.ravel(tree_of(y).leaves)
        apart = lambda a, b: float((flat(a) - flat(b)).norm())
        start, late = flat(residual(y, *args)), flat(f(time(time_scale), y, *args))
        if not bool((start == late).all()):
            raise InputError(TIMED)
        span = time_scale
        for _ in range(max_doublings):
            ts = torch.tensor([0.0, span], dtype=torch.float64)
            last, y = y, odeint(f, y, ts, *args, **options).ys
            y = tree.put([x[-1] for x in tree_of(y).leaves])
            if apart(y, last) <= SETTLED * float(flat(y).norm()):
                found = root(residual, linear_solver=linear_solver)(y, *args)
                if apart(found, y) <= NEAR * max(float(flat(y).norm()), 1e-300):
                    return found
            span *= 2
        raise ConvergenceError(unsettled(span))

    return root(residual, solver, linear_solver=linear_solver)(y0, *args)
