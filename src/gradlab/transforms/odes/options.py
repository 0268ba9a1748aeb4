"""How an equation is solved: what was asked for, checked once, and what is said when it fails."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from gradlab._errors import InputError, KindError, StrategyError

if TYPE_CHECKING:
    from gradlab.transforms.odes.rosenbrock import Rosenbrock
    from gradlab.transforms.odes.tableaux import Tableau

Method = Literal[
    "auto",
    "euler",
    "midpoint",
    "bosh3",
    "rk4",
    "dopri5",
    "tsit5",
    "dopri8",
    "kvaerno3",
    "kvaerno5",
    "rodas5p",
]
Adjoint = Literal["auto", "interpolating", "forward", "backsolve", "direct", "checkpoint"]


class Status(IntEnum):
    """How a solution ended."""

    DONE = 0
    MAX_STEPS = 1
    STEP_TOO_SMALL = 2
    NOT_FINITE = 3


class Solution(NamedTuple):
    """What `odeint` gives.

    Attributes:
        ys: Tree like y0 with a leading time axis, an entry for each of ts.
        stats: "evaluations" of f, steps "accepted" and "rejected": whole numbers.
        status: A number of `Status`.
        gradient_error: How far the cotangents are from the tangents along a random direction, relative; None where
            it was not asked for.
        event_time: When the event came to pass, or infinity; None where there is none.
    """

    ys: Any
    stats: dict[str, Any]
    status: Any
    gradient_error: Any = None
    event_time: Any = None


@dataclass(frozen=True)
class Tolerance:
    """How the steps of one integration are chosen."""

    tableau: Tableau | Rosenbrock
    stiff: Tableau | Rosenbrock | None  # to go on by from where the equation is seen to be stiff
    rtol: float
    atol: Any  # a number, or one for each entry of the state
    step_size: float | None
    max_steps: int
    parts: int = 1  # of equal size, of a state; each has to be within the tolerances by itself


@dataclass(frozen=True)
class Options:
    """The arguments of `odeint`."""

    method: Method
    adjoint: Adjoint
    rtol: Any
    atol: Any
    step_size: Any
    max_steps: int
    throw: bool

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise InputError(
                f"odeint: unknown method {self.method!r}; pass one of {', '.join(get_args(Method))}"
            )
        if self.adjoint not in get_args(Adjoint):
            raise InputError(
                f"odeint: unknown adjoint {self.adjoint!r}; pass one of {', '.join(get_args(Adjoint))}"
            )
        for name in ("rtol", "atol", "step_size"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise KindError(f"odeint: {name} is a {type(value).__name__}; pass a number, or None")
            if not 0 < value < float("inf"):
                raise InputError(f"odeint: {name} is {value}; pass a positive number, or None")
        if not isinstance(self.max_steps, int) or isinstance(self.max_steps, bool):
            raise KindError(f"odeint: max_steps is a {type(self.max_steps).__name__}; pass a whole number")
        if self.max_steps < 1:
            raise InputError(f"odeint: max_steps is {self.max_steps}; pass a positive whole number")
        if self.method == "auto" and self.step_size is not None:
            raise InputError(
                "odeint: method='auto' chooses by the sizes of its steps, and step_size fixes them; pass the name of "
                "a method, or no step_size"
            )
        if self.step_size is None and self.tableau.embedded is None:
            raise InputError(
                f"odeint: {self.method} has no estimate of its error, by which steps are chosen; pass step_size, "
                "or method='tsit5'"
            )

    @property
    def tableau(self) -> Tableau | Rosenbrock:
        """Of the method; imported at the first use."""
        from gradlab.transforms.odes.tableaux import METHODS

        return METHODS["tsit5" if self.method == "auto" else self.method]

    @property
    def stiff(self) -> Tableau | Rosenbrock | None:
        """That of the method that takes over where the equation is seen to be stiff."""
        from gradlab.transforms.odes.tableaux import METHODS

        return METHODS["kvaerno5"] if self.method == "auto" else None

    def refuse_mode(self, mode: Literal["forward", "reverse"]) -> None:
        """Refuse a derivative that this adjoint has not."""
        if mode == "forward" and self.adjoint in ("interpolating", "backsolve"):
            raise StrategyError(
                f"odeint: adjoint={self.adjoint!r} is of reverse mode, and this derivative is taken in forward mode; "
                "pass adjoint='auto', which has both, or 'forward'"
            )
        if mode == "reverse" and self.adjoint == "forward":
            raise StrategyError(
                "odeint: adjoint='forward' is of forward mode, and this derivative is taken in reverse mode; pass "
                "adjoint='auto', which has both, or take it by jvp or jacfwd"
            )

    def unfinished(self, status: Status, t: float, y: list[float]) -> str:
        """What is said of a solution that did not reach the last time."""
        state = ", ".join(f"{x:.6g}" for x in y[:8]) + (", ..." if len(y) > 8 else "")
        where = f"at t = {t:.9g}, y = [{state}]"
        if status == Status.MAX_STEPS:
            return f"odeint: max_steps = {self.max_steps} steps were taken {where}; raise max_steps, or the tolerances"
        if status == Status.NOT_FINITE:
            return (
                f"odeint: f is not finite {where}, or just after it; look at f there, or pass throw=False for "
                "not-a-number from there on"
            )
        return (
            f"odeint: no step is small enough {where}; the solution may have a singularity, or the tolerances may be "
            "below the rounding"
        )

    def astray(self, distance: float) -> str:
        """What is said of a state that was integrated backwards and did not come back."""
        return (
            f"odeint: y integrated backwards misses y0 by {distance:.2g} times the tolerances, so the cotangents are "
            "wrong; pass adjoint='auto', which has y from the forward steps"
        )

    def unresolved(self, error: float) -> str:
        """What is said of a gradient that is not as good as the tolerances."""
        return (
            f"odeint: the gradient is off by {error:.1g} of itself, more than 100 times the tolerances; pass smaller "
            "ones, or a method for stiff equations"
        )

    def tolerance(
        self, eps: float, parts: int = 1, scales: Any = 1.0, *, recorded: bool = False, backward: bool = False
    ) -> Tolerance:
        """Of arithmetic with this rounding, for a state of parts with absolute tolerances in these scales.

        Steps that are recorded for an adjoint are ten times finer, as it is carried back along their polynomials. Its
        own (but for backsolve's) are four times finer, and its absolute tolerance, which is in units of the largest
        cotangent, is a thousandth of rtol, since it may shrink on its way and grow again: so van der Pol's (mu = 10,
        to t = 50) is good to 70 times the tolerance, where it would be 150 by a hundredth. It is a tenth of atol where
        that is less, as entries of the state in small units have large cotangents. It goes by kvaerno5 in the place
        of rodas5p, which would need the derivative of its Jacobian in time.
        """
        from gradlab.transforms.odes.tableaux import METHODS

        rtol = self.rtol if self.rtol is not None else 1e-6 if eps < 1e-10 else 1e-4
        absolute = self.atol if self.atol is not None else rtol / 100
        atol = absolute * scales
        if recorded:
            rtol, atol = rtol / 10, atol / 10
        elif backward:
            floor = min(rtol / 1000, absolute / 10) * scales
            rtol, atol = rtol if self.adjoint == "backsolve" else rtol / 4, floor
        rtol = max(rtol, 8 * eps)
        tableau = METHODS["kvaerno5"] if backward and self.method == "rodas5p" else self.tableau
        return Tolerance(tableau, self.stiff, rtol, atol, self.step_size, self.max_steps, parts)


def most_missed(rtol: float) -> float:
    """How many times the tolerances y integrated backwards may miss y0 by: a hundred, and no more than a tenth."""
    return min(100.0, 0.1 / rtol)


def check_equation(f: Any, y0: Any) -> None:
    """Refuse an f that is no function, and a state (a tree of either framework) that is not of floats alone."""
    if not callable(f):
        raise KindError(f"odeint: f is a {type(f).__name__}; pass a function f(t, y, *args)")
    for i, leaf in enumerate(y0.all):
        if i not in y0.places:
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise KindError(
                f"odeint: {y0.leaf_name(i)} is of {kind}; a state is made of floats, so convert it"
            )
