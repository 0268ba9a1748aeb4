"""How a solution is found and differentiated: what was asked for, checked once, and what is said when it fails."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Literal, TypeVar, get_args

from gradlab._dispatch import framework_of
from gradlab._errors import ConvergenceError, ConvergenceWarning, InputError, KindError

Contract = TypeVar("Contract", bound=Callable[..., Any])
Method = Literal["direct", "cg", "gmres", "neumann"]
Unconverged = Literal["raise", "warn"]

FUNCTIONS = {"root": "residual", "fixed_point": "step", "argmin": "objective"}


@dataclass(frozen=True)
class Options:
    """The arguments of `root`, `fixed_point` or `argmin`, which is `op`."""

    op: str
    function: Callable[..., Any]
    solver: Callable[..., Any] | None
    linear_solver: Method | Callable[..., Any]
    rtol: Any  # a number, or None
    atol: Any
    max_steps: int | None
    unconverged: Unconverged

    def __post_init__(self) -> None:
        op, name = self.op, FUNCTIONS[self.op]
        if not callable(self.function):
            raise KindError(
                f"{op}: {name} is a {type(self.function).__name__}; pass a function {name}(y, *args)"
            )
        if self.solver is not None and not callable(self.solver):
            raise KindError(
                f"{op}: solver is a {type(self.solver).__name__}; pass a function solver({name}, y0, *args) -> y, "
                "or None"
            )
        if not callable(self.linear_solver) and self.linear_solver not in get_args(Method):
            raise InputError(
                f"{op}: unknown linear_solver {self.linear_solver!r}; pass one of {', '.join(get_args(Method))}, "
                "or a function (matvec, b) -> x"
            )
        for key in ("rtol", "atol"):
            tolerance = getattr(self, key)
            if tolerance is not None and not 0 <= tolerance < math.inf:
                raise InputError(f"{op}: {key} is {tolerance}; pass a number that is not negative, or None")
        if self.max_steps is not None and (not isinstance(self.max_steps, int) or self.max_steps < 1):
            raise InputError(f"{op}: max_steps is {self.max_steps}; pass a positive whole number, or None")
        if self.unconverged not in get_args(Unconverged):
            raise InputError(f"{op}: unknown unconverged {self.unconverged!r}; pass 'raise' or 'warn'")

    def tolerances(self, eps: float) -> Options:
        """The same with numbers for the tolerances, of arithmetic with this rounding."""
        default = eps**0.75
        return replace(
            self,
            rtol=default if self.rtol is None else self.rtol,
            atol=default if self.atol is None else self.atol,
        )

    def steps(self, default: int) -> int:
        """The most steps of an iteration."""
        return self.max_steps or default

    @property
    def unsolved(self) -> str:
        """What is said of a default solver that stopped early."""
        return (
            f"{self.op}: the default solver did not reach rtol and atol; start nearer to the solution, "
            "raise max_steps, or pass a solver"
        )

    @property
    def unsolved_linear(self) -> str:
        """What is said of a linear solve that stopped early, or met a singular matrix."""
        name = self.linear_solver if isinstance(self.linear_solver, str) else "own"
        if name == "direct":
            return (
                f"{self.op}: the Jacobian at the solution is singular, so the solution has no derivative there; "
                "change the equations or the parameters"
            )
        return (
            f"{self.op}: the {name} linear solve did not reach rtol and atol; raise max_steps, "
            "or pass linear_solver='direct'"
        )

    def report(self, message: str) -> None:
        """Raise or warn, as asked."""
        if self.unconverged == "raise":
            raise ConvergenceError(message)
        warnings.warn(message, ConvergenceWarning, stacklevel=2)


def found_later(contract: Contract) -> Contract:
    """Make the public function of a contract: its solution looks at its arguments for their framework."""
    op = contract.__name__
    defaults: Any = contract.__kwdefaults__

    @wraps(contract)
    def declared(function: Any, solver: Any = None, **options: Any) -> Callable[..., Any]:
        Options(op, function, solver, **{**defaults, **options})

        def solution(y0: Any, *args: Any) -> Any:
            # Import statements, not importlib: torch.compile traces these, in a cold process too.
            if framework_of(op, (y0, *args)) == "torch":
                import gradlab.torch as namespace
            else:
                import gradlab.jax as namespace  # type: ignore[no-redef]
            return getattr(namespace, op)(function, solver, **options)(y0, *args)

        return solution

    return declared  # type: ignore[return-value]
