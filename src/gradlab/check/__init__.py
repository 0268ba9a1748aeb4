"""Prove a derivative right on your own function, against differences with an error estimate.

from gradlab import check
check.derivatives(f, x, *args).raise_if_failed()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradlab._dispatch import framework_of
from gradlab._errors import InputError, KindError
from gradlab.check.report import CheckError, Report, Row

__all__ = ["CheckError", "Report", "Row", "derivatives"]


def derivatives(
    f: Callable[..., Any], x: Any, *args: Any, order: int = 2, has_aux: bool = False, seed: int = 0
) -> Report:
    """Check every derivative a framework claims for f at x against extrapolated differences.

    Along random directions v, scaled like x, the slope of f is taken by central differences on a ladder
    of steps, extrapolated to step zero, with an estimate of its own error ε. A derivative d is wrong
    where |d - reference| > 10 ε + (rounding of the arithmetic), and only if a second ladder agrees;
    what differences cannot resolve to one percent (a kink, a jump, noise) is inconclusive.

    Args:
        f: Function `f(x, *args)` to a scalar or a tree of floats, or `(value, aux)`.
        x: Point: a tree; its float arrays are differentiated, other leaves are held constant.
        *args: Data, handed to f as they are.
        order: 1 checks value, jvp, vjp and gradient; 2 also gradlab's hvp and (up to 32 entries) dense
            Hessian, and the framework's forward over reverse and reverse over reverse. For an f with many
            outputs these are of u·f(x) with a fixed random u.
        has_aux: Whether f returns `(value, aux)`.
        seed: Of the directions.

    Returns:
        A `Report`: `.rows` (one a claim, with `.status` "passed", "failed", "unsupported" where the
        framework refuses, or "inconclusive"; `.error`, `.uncertainty` and `.where`), `.passed`,
        `.raise_if_failed()`, `.to_json()`, and a table when printed. A float32 or lower function is
        judged in its own precision, against a float64 run of the same function where it has one.

    Raises:
        InputError: order is not 1 or 2, an empty tree.
        KindError: f is not callable, x or f's output has no floats, complex numbers.
        BackendError: arrays of both frameworks, or of neither.

    Cost:
        About 60 evaluations of f a direction and claim, 3 directions; at order 2 as many gradients, and
        60 n gradients for the dense Hessian. Does not grow with the number of parameters otherwise. An
        entry of x that is wrong by a fraction r is missed only where r times its part of a random
        slope is below 10 ε: with ε near 1e-10, one wrong entry in 10^4 is found with all but
        certainty, and located by bisection.

    Example:
        >>> import torch
        >>> from gradlab import check
        >>> check.derivatives(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0])).passed
        True

    Source:
        Ridders, Advances in Engineering Software 4 (1982), doi:10.1016/S0141-1195(82)80057-0; Moré and
        Wild, SIAM J. Sci. Comput. 33 (2011), doi:10.1137/100786125.
    """
    if not callable(f):
        raise KindError(f"check.derivatives: f is a {type(f).__name__}; pass the function, then its point")
    if order not in (1, 2):
        raise InputError(f"check.derivatives: order is {order!r}; pass 1 or 2")
    if framework_of("check.derivatives", (x, *args)) == "torch":
        from gradlab.check._torch import report
    else:
        from gradlab.check._jax import report
    return report(f, x, args, order, has_aux, seed)
