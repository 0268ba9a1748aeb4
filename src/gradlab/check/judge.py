"""The verdict on one derivative: against differences, against another form of itself, in its own precision.

Neutral: a `Subject` (an adapter's) gives values and derivatives as float64 numpy vectors. An error counts
as wrong where it is far beyond the uncertainty of the reference and what rounding can do; what the
reference cannot resolve is inconclusive.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import numpy as np

from gradlab.check.differences import EPS, SECOND_STEPS, STEPS, Estimate
from gradlab.check.report import FAILED, INCONCLUSIVE, PASSED, UNSUPPORTED, Row

Vector = np.ndarray

FACTOR = 10.0  # an error this many times its reference's uncertainty (and the arithmetic's) is wrong
RESOLUTION = 1e-2  # what cannot be resolved to this fraction of the derivative is inconclusive
RESOLUTION_AT_LOW_PRECISION = 0.1  # ... where there is no float64 run
FLOOR = 1e-6  # ... where it is less than this part of the value's own size
SMALL = 1e-3  # ... or than this part of the largest entry
SMALL_AT_LOW_PRECISION = 0.1  # ... again
ULPS = 100.0  # rounding between two forms of the same numbers that needs no measuring, in units of eps


class Subject(Protocol):
    """A function at a point, in one dtype, as its framework differentiates it."""

    n: int
    eps: float
    largest: float  # number of its dtype
    scalar: bool
    x: Vector
    sizes: list[int]  # of the leaves of x
    parts: int  # leaves of x and of f's output
    weights: Vector  # the fixed u of the scalar u·f that second-order claims are about

    def at(self, x: Vector) -> Subject: ...
    def weigh(self, u: Vector) -> None: ...
    def value(self, x: Vector) -> Vector: ...
    def plain(self, x: Vector) -> Vector: ...
    def mutated(self) -> str: ...
    def structure(self) -> str: ...
    def jvp(self, x: Vector, v: Vector) -> Vector: ...
    def vjp(self, x: Vector, u: Vector) -> Vector: ...
    def gradient(self, x: Vector) -> Vector: ...
    def pulls(self, x: Vector, u: Vector) -> tuple[Vector, Vector, bool]: ...
    def jvp_by_leaf(self, x: Vector, v: Vector) -> Vector: ...
    def vjp_by_leaf(self, x: Vector, u: Vector) -> Vector: ...
    def vjp_by_output(self, x: Vector, u: Vector) -> Vector: ...
    def nested(self, x: Vector, v: Vector, how: str) -> Vector: ...
    def product(self, x: Vector, v: Vector) -> Vector: ...
    def hessian(self, x: Vector) -> Vector: ...
    def mapped(self, how: str, x: Vector, seed: Vector, loop: bool) -> Vector: ...
    def run(self, x: Vector, u: Vector, compiled: bool) -> Vector: ...
    def mended(self) -> tuple[Subject, str] | None: ...
    def where(self, i: int) -> str: ...
    def where_output(self, i: int) -> str: ...


Derivative = Callable[
    [Any, Vector, Vector], Vector
]  # (subject, x, the direction or cotangent it is seeded with)


def judged(
    claim: str,
    derivative: Derivative,
    seed: Vector,
    reference: Callable[[np.ndarray], Estimate],
    c: Any,
    noise: Vector | float,
    where: Callable[[int], str] = lambda i: "",
    additive: Callable[[Estimate], Vector] | None = None,
) -> Row:
    """The verdict on a derivative against differences in float64, then in its own precision.

    There it may be as far off as the `noise` of f itself, and what the rounding of x changes. `additive`
    says where the slopes of an estimate are linear in their direction, as those beside a tie are not.
    """
    exact, estimate = derivative(c.high, c.x, seed), reference(STEPS)
    own = noise * (c.high.eps / c.low.eps)
    spread = cache(lambda: _spread(derivative, c.high, c, seed) + FACTOR * own)
    allowed = FACTOR * estimate.uncertainty + _rounding(c, c.high, exact)
    error = _distance(exact, estimate.value, allowed)
    if not (error <= allowed).all():
        allowed = allowed + spread()
    if not ((error <= allowed) & resolved(estimate)).all():
        estimate = estimate.confirmed(reference(SECOND_STEPS)).loosened(spread() / FACTOR)
        allowed = FACTOR * estimate.uncertainty + _rounding(c, c.high, exact)
        error = _distance(exact, estimate.value, allowed)
        if not resolved(estimate).all():  # who knows what is right there
            error = np.where(np.isfinite(exact), error, 0.0)
    if additive and not (error <= allowed).all():
        estimate = estimate.loosened(np.where(additive(estimate), 0.0, np.inf))
        error = np.where(np.isfinite(estimate.uncertainty), error, 0.0)
    if not (error <= allowed).all():
        return _failed(claim, error, allowed, exact, estimate.value, where, "")
    if c.low is not c.high:
        low, bound = derivative(c.low, c.x, seed), _rounding(c, c.low, exact)
        error = _distance(low, exact, np.where(np.abs(exact) < c.low.largest / 4, allowed, np.inf))
        if not (error <= bound).all():
            bound = bound + FACTOR**2 * noise + _spread(derivative, c.high, c, seed, eps=c.low.eps)
        if not (error <= bound).all():
            slight = (error <= max(ULPS * c.low.eps, RESOLUTION) * np.abs(exact).max(initial=0.0)).all()
            note = f" (right in float64{': imprecise, not wrong' if slight else ''})"
            return _failed(claim, error, bound, low, exact, where, note)
        allowed = allowed + bound
    i = int(np.argmax(error / allowed))
    row = Row(claim, PASSED, float(error[i]), float(allowed[i]) / FACTOR, where(i))
    if resolved(estimate).all():
        return row
    i = int(np.argmin(resolved(estimate)))
    message = (
        f"differences resolve it to {FACTOR * estimate.uncertainty[i]:.1e} only, near {estimate.value[i]:.3g}; "
        f"the framework gives {exact[i]:.3g}: a kink, jump or pole?"
    )
    return Row(claim, INCONCLUSIVE, float(error[i]), float(estimate.uncertainty[i]), where(i), message)


def agreed(
    claim: str,
    one: Derivative,
    other: Derivative,
    seed: Vector,
    c: Any,
    where: Callable[[int], str] = lambda i: "",
    words: str = "",
    linear: bool = True,
    least: Vector | float = 0.0,
) -> Row:
    """The verdict on two forms of the same numbers, which differ by rounding alone.

    They are `linear` in the seed or not; `least` is rounding that is known to be there.
    """
    left, right = one(c.low, c.x, seed), other(c.low, c.x, seed)
    if left.shape != right.shape:
        return Row(claim, FAILED, message=f"shape {left.shape} where {right.shape} is right")
    finite = np.isfinite(left) | np.isfinite(right)
    size = np.abs(right[np.isfinite(right)]).max(initial=0.0)
    allowed = (
        max(ULPS * c.low.eps, c.accuracy) * size
        + np.finfo(np.float64).tiny
        + np.broadcast_to(least, right.shape)
    )
    finite &= ~(np.minimum(np.abs(left), np.abs(right)) > c.low.largest / 4)
    error = np.where(finite, np.abs(left - right), 0.0)
    if not (error <= allowed).all():
        allowed = allowed + sum(_spread(form, c.low, c, seed, linear) for form in (other, one))
    if not (error <= allowed).all():
        return _failed(claim, error, allowed, left, right, where, "", words or "the other form gives")
    i = int(np.argmax(error / allowed)) if error.size else 0
    return (
        Row(claim, PASSED, float(error[i]), float(allowed[i]) / FACTOR) if error.size else Row(claim, PASSED)
    )


def resolved(estimate: Estimate) -> np.ndarray:
    """Where differences say enough to judge by."""
    part = SMALL if estimate.eps <= EPS else SMALL_AT_LOW_PRECISION
    largest = np.full_like(estimate.size, part * np.abs(estimate.value).max(initial=0.0))
    scale = np.maximum.reduce([np.abs(estimate.value), FLOOR * estimate.size, largest])
    known = np.isfinite(estimate.uncertainty)
    part = RESOLUTION if estimate.eps <= EPS else max(RESOLUTION_AT_LOW_PRECISION, 4 * np.sqrt(estimate.eps))
    return known & (FACTOR * estimate.uncertainty <= part * scale)


def _distance(exact: Vector, value: Vector, allowed: Vector) -> Vector:
    """|exact - value|; none where nothing is known, as beside a pole."""
    error = np.abs(exact - value)
    return np.where(np.isfinite(allowed), np.where(np.isnan(error), np.inf, error), 0.0)


def _rounding(c: Any, s: Subject, exact: Vector) -> Vector:
    """What needs no excuse: half of the digits, entry by entry, and the accuracy that was claimed, of the largest.

    Beyond that a function is wrong, not imprecise.

    The frameworks' special functions are good to 1e-9 in float64, their float32 derivatives to 1e-4 where
    they saturate.
    """
    size = np.nan_to_num(np.abs(exact))
    return np.sqrt(s.eps) * size + c.accuracy * size.max(initial=0.0) + np.finfo(np.float64).tiny


def _spread(
    derivative: Derivative,
    s: Subject,
    c: Any,
    seed: Vector,
    linear: bool = False,
    eps: float | None = None,
) -> Vector:
    """What rounding in the subject's own precision (or that of `eps`) can do: the answer to changes of a few ulps.

    Among themselves: at x alone it may be wrong. Where it is linear in the seed, another scale of it as
    well, which rounds what cancels otherwise.
    """
    changes = ((1, 1.0), (1, 1.0007), (2, 1.0), (2, 1.0011), (3, 0.9993), (4, 0.9989))
    near = lambda z, size: z * (1 + (eps or s.eps) * size * c.rng.choice([-1.0, 1.0], size=z.size))
    scaled = [(near(c.x, size), near(seed, size), scale if linear else 1.0) for size, scale in changes]
    moved = np.stack([derivative(s, x, scale * u) / scale for x, u, scale in scaled])
    return FACTOR * np.nan_to_num(np.abs(moved - np.median(moved, axis=0)).max(axis=0))


def _failed(
    claim: str,
    error: Vector,
    allowed: Vector,
    actual: Vector,
    right: Vector,
    where: Callable[[int], str],
    note: str,
    words: str = "differences give",
) -> Row:
    excess = np.where(np.isfinite(error), error / allowed, np.inf)
    i = int(np.argmax(excess))
    message = f"{actual[i]:.6g} where {words} {right[i]:.6g}, off by {error[i]:.1e}{note}"
    others = int((excess > 1).sum()) - 1
    row = Row(claim, FAILED, float(error[i]), float(allowed[i]) / FACTOR, message=message)
    return told(row, where(i) + (f" and {others} more" if others and where(i) else ""))


def told(row: Row, where: str) -> Row:
    """The row with the place of its fault."""
    message = f"at {where}: {row.message}" if where and not row.message.startswith("at ") else row.message
    return Row(row.claim, row.status, row.error, row.uncertainty, where, message)


def worst(found: list[Row]) -> Row:
    """The row that says most: a failure, then doubt, then the largest error."""
    rank = {FAILED: 3, INCONCLUSIVE: 2, PASSED: 1, UNSUPPORTED: 0}
    return max(found, key=lambda row: (rank[row.status], row.ratio or 0.0))
