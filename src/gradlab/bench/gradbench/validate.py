"""Whether an output is right: of the form it should have, finite, not all zero, and equal to the reference."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradlab.bench.gradbench.references import REFERENCES

TOLERANCE = 1e-8  # of every number, relative to itself
ROUNDING = 1e-12  # and this much of the largest beside it, which is what rounding leaves of one that cancels


def validate(module: str, function: str, given: Any, output: Any) -> str | None:
    """What is wrong with an evaluation's output, or None."""
    return compare(REFERENCES[module](function, given), output)


def compare(expected: Any, found: Any, name: str = "output") -> str | None:
    """What is wrong with an output: the first of its parts that differs."""
    if isinstance(expected, dict):
        if not isinstance(found, dict) or set(found) != set(expected):
            return f"{name} should have the fields {', '.join(expected)}"
        parts = (compare(expected[key], found[key], f"{name}.{key}") for key in expected)
        return next((fault for fault in parts if fault), None)
    try:
        truth, numbers = np.asarray(expected, float), np.asarray(found, float)
    except (TypeError, ValueError):
        return f"{name} is not an array of numbers"
    if numbers.shape != truth.shape:
        return f"{name} has shape {numbers.shape}, not {truth.shape}"
    if not np.isfinite(numbers).all():
        return f"{name} is not finite"
    if not numbers.any() and truth.any():
        return f"{name} is zero"
    allowed = TOLERANCE * np.abs(truth) + ROUNDING * np.abs(truth).max(initial=0.0)
    off = np.abs(numbers - truth) - allowed
    if (off > 0).any():
        worst = np.unravel_index(np.argmax(off), off.shape)
        return f"{name}{list(map(int, worst)) or ''} is {numbers[worst]!r}, not {truth[worst]!r}"
    return None
