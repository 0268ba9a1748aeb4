"""Initial value problems whose derivatives are known: equations for any framework, and references in a file.

`experiments/reference_sensitivities.py` makes the references, from the variational equations at a tolerance of
1e-12 by SciPy, with Jacobians by complex steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Equation:
    """dy/dt = f(t, y, p) from y0 at time 0 until `end`; f returns a list of the entries of dy/dt."""

    name: str
    f: Callable[[Any, Any, Any], list[Any]]
    y0: tuple[float, ...]
    p: tuple[float, ...]
    end: float
    stiff: bool = False
    source: str = ""

    def reference(self) -> dict[str, np.ndarray]:
        """y at `end` (n,), and its derivatives `dy0` (n, n) and `dp` (n, m)."""
        return {name: np.array(value) for name, value in _references()[self.name].items()}


@cache
def _references() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("ode_references.json").read_text())


def van_der_pol(t: Any, y: Any, p: Any) -> list[Any]:
    """y'' = μ (1 - y²) y' - y."""
    return [y[1], p[0] * (1 - y[0] ** 2) * y[1] - y[0]]


def lotka_volterra(t: Any, y: Any, p: Any) -> list[Any]:
    """Prey and predators."""
    return [p[0] * y[0] - p[1] * y[0] * y[1], p[2] * y[0] * y[1] - p[3] * y[1]]


def lorenz(t: Any, y: Any, p: Any) -> list[Any]:
    """The chaotic three."""
    return [p[0] * (y[1] - y[0]), y[0] * (p[1] - y[2]) - y[1], y[0] * y[1] - p[2] * y[2]]


def robertson(t: Any, y: Any, p: Any) -> list[Any]:
    """Three species, with rates that are nine orders of magnitude apart."""
    slow, fast, back = p[0] * y[0], p[1] * y[1] * y[1], p[2] * y[1] * y[2]
    return [-slow + back, slow - back - fast, fast]


def hires(t: Any, y: Any, p: Any) -> list[Any]:
    """High irradiance response: eight species of plant physiology."""
    a = p[0] * y[5] * y[7]
    return [
        -1.71 * y[0] + 0.43 * y[1] + 8.32 * y[2] + p[1],
        1.71 * y[0] - 8.75 * y[1],
        -10.03 * y[2] + 0.43 * y[3] + 0.035 * y[4],
        8.32 * y[1] + 1.71 * y[2] - 1.12 * y[3],
        -1.745 * y[4] + 0.43 * y[5] + 0.43 * y[6],
        -a + 0.69 * y[3] + 1.71 * y[4] - 0.43 * y[5] + 0.69 * y[6],
        a - 1.81 * y[6],
        -a + 1.81 * y[6],
    ]


def oregonator(t: Any, y: Any, p: Any) -> list[Any]:
    """The Belousov-Zhabotinskii reaction (OREGO)."""
    return [
        p[0] * (y[1] + y[0] * (1 - p[1] * y[0] - y[1])),
        (y[2] - (1 + y[0]) * y[1]) / p[0],
        p[2] * (y[0] - y[2]),
    ]


def linear(t: Any, y: Any, p: Any) -> list[Any]:
    """A spiral."""
    return [-p[0] * y[0] + p[1] * y[1], -p[1] * y[0] - p[0] * y[1]]


_HAIRER = "Hairer and Wanner, Solving Ordinary Differential Equations II (1996), IV.10"

EQUATIONS = {
    e.name: e
    for e in (
        Equation("linear", linear, (1.0, 0.5), (0.2, 1.5), 5.0),
        Equation("lotka_volterra", lotka_volterra, (10.0, 5.0), (1.5, 0.1, 0.075, 1.0), 10.0),
        Equation("van_der_pol_1", van_der_pol, (2.0, 0.0), (1.0,), 50.0),
        Equation("van_der_pol_10", van_der_pol, (2.0, 0.0), (10.0,), 50.0),
        Equation("van_der_pol_100", van_der_pol, (2.0, 0.0), (100.0,), 50.0),
        Equation("van_der_pol_1000", van_der_pol, (2.0, 0.0), (1000.0,), 500.0, stiff=True),
        Equation("lorenz", lorenz, (1.0, 1.0, 1.0), (10.0, 28.0, 8 / 3), 2.0),
        Equation("robertson", robertson, (1.0, 0.0, 0.0), (0.04, 3e7, 1e4), 40.0, stiff=True, source=_HAIRER),
        Equation(
            "hires",
            hires,
            (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0057),
            (280.0, 0.0007),
            40.0,
            stiff=True,
            source=_HAIRER,
        ),
        Equation(
            "oregonator",
            oregonator,
            (1.0, 2.0, 3.0),
            (77.27, 8.375e-6, 0.161),
            30.0,
            stiff=True,
            source=_HAIRER,
        ),
    )
}
