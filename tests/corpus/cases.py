"""Functions whose derivatives are wrong, or right but hard to check: what a checker is measured on.

A case is a function that builds `(f, x)`, or `(f, x, options of check.derivatives)`, when it is run. `wrong`
names the rows that must fail and, where a fault has a side that is right, rows that must not; `right` says
what the verdict is to be: "passed", or "inconclusive" at a kink, a jump or a pole, never "failed".
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One function of the corpus, built by `make`."""

    name: str
    make: Callable[[], tuple[Any, ...]]
    wrong: bool
    blamed: tuple[str, ...] = ()
    innocent: tuple[str, ...] = ()
    verdict: str = "passed"

    def built(self) -> tuple[Callable[..., Any], Any, dict[str, Any]]:
        """The function, its point, and options for the checker."""
        f, x, *options = self.make()
        return f, x, options[0] if options else {}


_found: dict[str, list[Case]] = {}


def wrong(*blamed: str, innocent: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """A function with a wrong derivative: each row of `blamed` must fail, none of `innocent` may."""
    return lambda make: _add(make, Case(make.__name__, make, True, blamed, innocent))


def right(verdict: str = "passed") -> Callable[[Callable], Callable]:
    """A function whose derivatives are right, however hard it is to see."""
    return lambda make: _add(make, Case(make.__name__, make, False, verdict=verdict))


def _add(make: Callable, case: Case) -> Callable:
    _found.setdefault(make.__module__, []).append(case)
    return make


def corpus(framework: str) -> list[Case]:
    """All cases of one framework, which is imported by this."""
    modules = [f"corpus.{kind}_{framework}" for kind in ("wrong", "right")]
    for module in modules:
        importlib.import_module(module)
    return [case for module in modules for case in _found[module]]
