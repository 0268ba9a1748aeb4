"""How an equation is solved: what was asked for, checked once, and what is said when it fails."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from gradlab._errors import InputError, KindError

if TYPE_CHECKING:
    from gradlab.transforms.odes.tableaux import Tableau

Method = Literal["euler", "midpoint", "bosh3", "rk4", "dopri5", "tsit5", "dopri8"]


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
    """

    ys: Any
    stats: dict[str, Any]
    status: Any


@dataclass(frozen=True)
class Tolerance:
    """How the steps of one integration are chosen."""

    tableau: Tableau
    rtol: float
    atol: Any  # a number, or one for each entry of the state
    step_size: float | None
    max_steps: int
    parts: int = 1  # of equal size, of a state; each has to be within the tolerances by itself


@dataclass(frozen=True)
class Options:
    """The arguments of `odeint`."""

    method: Method
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
        if self.step_size is None and self.tableau.embedded is None:
            raise InputError(
                f"odeint: {self.method} has no estimate of its error, by which steps are chosen; pass step_size, "
                "or method='tsit5'"
            )

    @property
    def tableau(self) -> Tableau:
        """Of the method; imported at the first use."""
        from gradlab.transforms.odes.tableaux import METHODS

        return METHODS[self.method]

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

    def tolerance(
        self, eps: float, parts: int = 1, scales: Any = 1.0, *, recorded: bool = False, backward: bool = False
    ) -> Tolerance:
        """Of arithmetic with this rounding, for a state of parts with absolute tolerances in these scales.

        Steps that are recorded for an adjoint are ten times finer, as it is carried back along their polynomials; and
        its own absolute tolerance is a hundred times smaller, since it may shrink on its way and grow again.
        """
        rtol = self.rtol if self.rtol is not None else 1e-6 if eps < 1e-10 else 1e-4
        atol = (self.atol if self.atol is not None else rtol / 100) * scales
        rtol, atol = (rtol / 10, atol / 10) if recorded else (rtol, atol / 100 if backward else atol)
        rtol = max(rtol, 8 * eps)
        return Tolerance(self.tableau, rtol, atol, self.step_size, self.max_steps, parts)


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
