"""Do two trainings compute the same thing: their losses, step by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradlab._errors import InputError

# Relative. In float64 the frameworks differ by rounding alone, which training does not amplify within 50 steps. In
# float32 rounding is 6e-8 of each number; Adam divides each gradient by its own size, so that an entry which is
# rounding alone is taken as seriously as any other.
TOLERANCES = {"float64": 1e-8, "float32": 1e-3}


class Disagreement(RuntimeError):
    """Two frameworks were given the same model and data, and do not compute the same."""


def distances(ours: Sequence[float], theirs: Sequence[float]) -> np.ndarray:
    """Relative difference of the losses of each step."""
    if len(ours) != len(theirs):
        raise InputError(f"agreement: {len(ours)} and {len(theirs)} losses; give as many of both")
    a, b = np.array(ours, float), np.array(theirs, float)
    return np.abs(a - b) / np.abs(a)


def same_losses(
    task: str, ours: tuple[str, Sequence[float]], theirs: tuple[str, Sequence[float]], tolerance: float
) -> float:
    """The largest relative difference; raises where it is beyond the tolerance, naming the first such step."""
    (name, a), (other, b) = ours, theirs
    far = distances(a, b)
    wrong = ~(far <= tolerance)  # a loss that is not a number is wrong as well
    if wrong.any():
        step = int(np.argmax(wrong))
        raise Disagreement(
            f"{task}: {name} and {other} do not compute the same: at step {step} their losses are {a[step]:.12g} "
            f"and {b[step]:.12g}, {far[step]:.1e} apart where {tolerance:.0e} is rounding; no time was taken"
        )
    return float(far.max())
