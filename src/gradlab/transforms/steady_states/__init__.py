"""Where a differential equation comes to rest.

Contracts only; `_jax.py` and `_torch.py` implement them in this order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradlab._dispatch import operation

__all__ = ["steady_state"]


@operation
def steady_state(
    f: Callable[..., Any],
    y0: Any,
    *args: Any,
    time_scale: float = 1.0,
    max_doublings: int = 40,
    linear_solver: Any = "direct",
    **options: Any,
) -> Any:
    """The state that dy/dt = f(t, y, *args) settles at from y0, differentiable in args.

    The equation is solved over times that double until the state has stopped, and Newton's method ends it. The
    derivative is that of f = 0 by the implicit function theorem (`root`): neither its cost nor its memory depends on
    how long the state took to settle.

    Args:
        f: Function `f(t, y, *args)` that does not depend on t; it is evaluated at times from 0 on.
        y0: Tree of float arrays, from which the state is reached; it has no derivative.
        *args: Trees, whose float arrays are differentiated, as is what f closes over.
        time_scale: The first time, in units of t; of the size of the fastest changes.
        max_doublings: The longest time is time_scale · 2^max_doublings.
        linear_solver: As for `root`.
        **options: Of `odeint`: method (an implicit one where the equation is stiff), rtol (1e-4 unless given), atol,
            max_steps.

    Returns:
        A tree like y0.

    Raises:
        ConvergenceError: the state does not settle (it grows or oscillates), or ∂f/∂y is singular there, as where
            something is conserved.
        InputError: f depends on t; as for `odeint`. For this and the former jax raises its own JaxRuntimeError with
            the same message.
        KindError, BackendError: as for `odeint`.

    Cost:
        That of `odeint` until the state is at rest, and a few Newton steps; a derivative: one Jacobian of f and one
        linear solve.

    Example:
        >>> import torch
        >>> from gradlab import steady_state
        >>> equilibrium = lambda k: steady_state(lambda t, y, k: 1.0 - k * y**2, torch.tensor(0.5), k)  # 1 / √k
        >>> equilibrium(torch.tensor(4.0)), torch.func.grad(equilibrium)(torch.tensor(4.0))
        (tensor(0.5000), tensor(-0.0625))

    Source:
        Blondel et al., Efficient and modular implicit differentiation, NeurIPS 2022, arXiv:2105.15183.
    """
