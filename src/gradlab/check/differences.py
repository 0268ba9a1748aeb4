"""Directional derivatives by extrapolated differences, with an estimate of their own error.

Everything here is numpy in float64 and knows no framework. Along a direction the function is evaluated
on a ladder of halving steps; central differences are extrapolated to step zero (Richardson), and per
output the entry of the tableau with the smallest estimated error is taken (Ridders). The estimate
adds truncation (the disagreement of neighbouring entries), rounding (the function's own noise,
measured on a difference table, divided by the step) and the jump of the slope, where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.linalg import norm  # which does not overflow on its way

Function = Callable[[np.ndarray], np.ndarray]

STEPS = 0.25 * 2.0 ** -np.arange(14)  # in units of the direction
SECOND_STEPS = 0.3 * 1.7 ** -np.arange(44)  # another grid, and finer: what the first leaves in doubt
EVEN, ODD = (2, 4, 6, 8, 10, 12), (1, 3, 5, 7)  # error terms of central differences, and of their asymmetry
SPACING, FINE_SPACING = 2.0**-22, 2.0**-36  # of the neighbours from which noise is measured, on either grid
EPS = float(np.finfo(np.float64).eps)
LEAST = 8  # steps smaller than so many eps are rounding


@dataclass(frozen=True)
class Estimate:
    """A derivative by differences: value and uncertainty per output, and the ladder it came from.

    Attributes:
        value: the extrapolated derivative, shape (m,).
        uncertainty: its estimated absolute error, shape (m,); infinite where nothing can be said.
        steps: the ladder, shape (k,), in units of the direction.
        raw: the plain differences at each step, shape (k, m).
        step: the step at which the tableau entry taken was formed, per output, shape (m,).
        noise: the measured noise of the function, per output, shape (m,).
        size: the magnitude of the function at the point, and of its change over the ladder, shape (m,);
            a hundred times that for second differences, which resolve so much less.
        eps: of the function's precision.
    """

    value: np.ndarray
    uncertainty: np.ndarray
    steps: np.ndarray
    raw: np.ndarray
    step: np.ndarray
    noise: np.ndarray
    size: np.ndarray
    eps: float = EPS

    def confirmed(self, other: Estimate) -> Estimate:
        """The better of two, per output; where they contradict one another, no better than their distance.

        Where the other stands on steps finer than all of these, which saw nothing of it, it decides alone.
        """
        finer = (other.step < self.steps[-1]) & np.isfinite(other.uncertainty)
        better = (self.uncertainty <= other.uncertainty) & ~finer
        distance = np.abs(self.value - other.value)
        agree = finer | (distance <= 10 * (self.uncertainty + other.uncertainty))
        least = np.where(better, self.uncertainty, other.uncertainty)
        return replace(
            self,
            value=np.where(better, self.value, other.value),
            uncertainty=np.where(agree, least, np.where(np.isnan(distance), np.inf, distance)),
        )

    def loosened(self, more: np.ndarray) -> Estimate:
        """The same, known less well."""
        return replace(self, uncertainty=self.uncertainty + more)


def joined(parts: list[Estimate]) -> Estimate:
    """Estimates of several functions on the same ladder, as of one with all their outputs."""
    names = ("value", "uncertainty", "step", "noise", "size")
    joint = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    raw = np.concatenate([part.raw for part in parts], axis=1)
    return Estimate(steps=parts[0].steps, raw=raw, eps=parts[0].eps, **joint)


@dataclass(frozen=True)
class Ladder:
    """Values of g: R^n -> R^m around x along v: at the point, and at x ± h v for every step h.

    Attributes:
        steps: the ladder, shape (k,), in units of the direction.
        centre, plus, minus: the values, shapes (m,), (k, m), (k, m).
        sides: eight neighbouring values on either side, shape (2, 8, m), from which noise is measured.
        eps: of the precision that g runs in.
        least: noise that is known to be there, shape (m,).
        natural: the magnitude below whose rounding g is nothing but rounding, shape (m,).
    """

    steps: np.ndarray
    centre: np.ndarray
    plus: np.ndarray
    minus: np.ndarray
    sides: np.ndarray
    eps: float = EPS
    least: np.ndarray | float = 0.0
    natural: np.ndarray | float = 0.0

    def of(self, u: np.ndarray) -> Ladder:
        """The ladder of the scalar u·g, whose rounding is at least that of g's outputs."""
        one = lambda values: (values @ u)[..., None]
        with np.errstate(all="ignore"):
            least = np.array([norm(self.noise * u)])
            values = one(self.centre), one(self.plus), one(self.minus), one(self.sides)
            return Ladder(self.steps, *values, self.eps, least)

    @cached_property
    def noise(self) -> np.ndarray:
        """Standard deviation of g's rounding, from the high differences of neighbouring values.

        The smaller answer of the two sides, so that a kink beside x does not pass for noise. Where all
        neighbours are the same number and those farther off are not, as in 1 + erf(-8), the rounding is
        that of numbers of size one inside g.
        """
        with np.errstate(all="ignore"):
            found = np.fmin(*[table_noise(side) for side in self.sides])
            inside = np.where(self._stuck, self._largest, np.abs(self.centre))
            inside = np.where(self.size == self._natural, self._natural, inside)
            known = [found, self.eps * inside, self.least * (self._moved > 0)]
            if self.eps > EPS:
                known += [self.eps * (inside + self._moved), self._quantum]  # the rounding of x counts too
            return np.maximum.reduce(known)

    @property
    def _quantum(self) -> np.ndarray:
        """The least change over the ladder, where g does not change over its finest step."""
        least = np.where(self._changes > 0, self._changes, np.inf).min(axis=0)
        flat = (self.plus[-1] == self.centre) & (self.minus[-1] == self.centre)
        return np.where(flat & np.isfinite(least), least, 0.0)

    @property
    def _stuck(self) -> np.ndarray:
        return (self.sides == self.centre).all((0, 1)) & (self._moved > 0)

    @property
    def _largest(self) -> float:
        return max(1.0, np.abs(self.centre).max(initial=0.0))

    @property
    def _natural(self) -> np.ndarray:
        return np.maximum(self.natural, np.where(self._stuck, self._largest, 0.0))

    @cached_property
    def _rounding(self) -> np.ndarray:
        """Of the values at each step, which may be larger than at the point."""
        return np.maximum(self.noise, self.eps * np.fmax(np.abs(self.plus), np.abs(self.minus)))

    @cached_property
    def size(self) -> np.ndarray:
        """The magnitude of g at x, or of its change over the ladder."""
        size = np.maximum(np.abs(self.centre), self._moved)
        part = 1000 * EPS if self.eps <= EPS else 10 * self.eps
        return np.where(size < part * self._natural, self._natural, size)

    @cached_property
    def _moved(self) -> np.ndarray:
        return np.where(np.isfinite(self._changes), self._changes, 0.0).max(axis=0)

    @cached_property
    def _changes(self) -> np.ndarray:
        return np.abs(np.concatenate([self.plus, self.minus]) - self.centre)

    def slope(self) -> Estimate:
        """d/dt g(x + t v) at t = 0."""
        return self._slope

    @cached_property
    def _slope(self) -> Estimate:
        h = self.steps[:, None]
        with np.errstate(all="ignore"):
            raw = (self.plus - self.minus) / (2 * h)
            value, error, step = _extrapolated(raw, self._rounding / h, self.steps, EVEN)
            return Estimate(
                value, error + self._jump / 2, self.steps, raw, step, self.noise, self.size, self.eps
            )

    def curvature(self) -> Estimate:
        """d²/dt² g(x + t v) at t = 0; nothing is said where the slope is unknown or jumps, little where this does."""
        h = self.steps[:, None]
        with np.errstate(all="ignore"):
            raw = (self.plus - 2 * self.centre + self.minus) / h**2
            value, error, step = _extrapolated(raw, 4 * self._rounding / h**2, self.steps, EVEN)
            known = self._slope.uncertainty <= 1e-3 * np.maximum(np.abs(self._slope.value), self.size)
            smooth = (self._jump == 0) & known
            error += np.where(smooth, self._bend() / 2, np.inf)
        return Estimate(value, error, self.steps, raw, step, self.noise, 100 * self.size, self.eps)

    @cached_property
    def _jump(self) -> np.ndarray:
        """Jump of the slope at x: the limit of the asymmetry, h g'' + O(h³) where smooth."""
        h = self.steps[:, None]
        asymmetry = (self.plus - 2 * self.centre + self.minus) / h
        found = _nonzero(asymmetry, 4 * self._rounding / h, self.steps)
        return np.where(found > 1e-9 * self.size, found, 0.0)

    def _bend(self) -> np.ndarray:
        """Jump of the second derivative at x: how much the two one-sided ones differ, O(h) where smooth."""
        h = self.steps[:, None]
        differences = 4 * np.diff((self.plus - self.minus) / (2 * h), axis=0) / np.diff(h, axis=0)
        return _nonzero(differences, 8 * (self._rounding / h**2)[1:], self.steps[1:])


def _nonzero(raw: np.ndarray, rounding: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The size of a limit that is 0 for a smooth function, where it clearly is not."""
    limit, error, _ = _extrapolated(raw, rounding, steps, ODD)
    return np.where(np.abs(limit) > 10 * error, np.abs(limit), 0.0)


def resolvable(steps: np.ndarray, eps: float) -> np.ndarray:
    """Those steps that the rounding of x leaves; others where they are too few."""
    kept = steps[steps >= LEAST * eps]
    return kept if kept.size >= 8 else np.geomspace(0.5, min(LEAST * eps, 0.1), 8)


def ladder(
    g: Function,
    x: np.ndarray,
    v: np.ndarray,
    steps: np.ndarray = STEPS,
    sides: np.ndarray | None = None,
    eps: float = EPS,
) -> Ladder:
    """Evaluate g, which runs in a precision of `eps`, around x along v, as large as a natural change of x.

    The `sides` of a ladder along another direction, in which as much of x changes, serve for this one too.

    Cost:
        2 evaluations of g a step, and 17 for its noise: 45 in all; 16 less where `sides` are given.

    Source:
        Ridders, Advances in Engineering Software 4 (1982), doi:10.1016/S0141-1195(82)80057-0; noise as in
        Moré and Wild, SIAM J. Sci. Comput. 33 (2011), doi:10.1137/100786125.
    """
    centre, spacing = g(x), max(SPACING if steps[-1] > SPACING else FINE_SPACING, 2 * eps)
    steps = resolvable(steps, eps)

    def near(h: float) -> np.ndarray:
        try:
            return g(x + h * v)
        except Exception:  # beyond the edge of g's domain
            return np.full_like(centre, np.nan)

    with np.errstate(all="ignore"):
        if sides is None:
            sides = np.array([[near(side * i * spacing) for i in range(1, 9)] for side in (-1, 1)])
        plus, minus = ([near(side * h) for h in steps] for side in (1, -1))
        return Ladder(steps, centre, np.stack(plus), np.stack(minus), sides, eps)


def directional(g: Function, x: np.ndarray, v: np.ndarray, steps: np.ndarray = STEPS) -> Estimate:
    """Derivative of g: R^n -> R^m at x along v, by the `ladder` of its values."""
    return ladder(g, x, v, steps).slope()


def curvature(g: Function, x: np.ndarray, v: np.ndarray, steps: np.ndarray = STEPS) -> Estimate:
    """Second derivative of g along v, by the `ladder` of its values."""
    return ladder(g, x, v, steps).curvature()


def table_noise(table: np.ndarray) -> np.ndarray:
    """Standard deviation of the rounding in values at equal spacing: what high differences leave."""
    levels, factor = [], 1.0
    largest = np.abs(table).max(axis=0)
    table = table / np.where(largest > 0, largest, 1.0)
    for k in range(1, 7):
        table = np.diff(table, axis=0)
        factor *= k / (2.0 * (2 * k - 1))
        if k >= 4:
            levels.append(np.sqrt(factor * np.mean(table**2, axis=0)))
    return largest * np.max(levels, axis=0)


def _extrapolated(
    raw: np.ndarray, rounding: np.ndarray, steps: np.ndarray, orders: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Limit at step zero of differences with error terms h^orders, its error, and the step it came from.

    A limit must also explain the differences of all smaller steps, as a slope across a kink beside x does not.
    """
    column, best = raw, raw[-1].copy()
    lowest, highest = raw - 10 * rounding, raw + 10 * rounding  # ... which the limit is to lie between
    lowest, highest = (
        np.vstack([f.accumulate(b[::-1])[-2::-1], none])
        for f, b, none in (
            (np.fmax, lowest, np.full((1, raw.shape[1]), -np.inf)),
            (np.fmin, highest, np.full((1, raw.shape[1]), np.inf)),
        )
    )
    error = np.full(raw.shape[1], np.inf)
    step = np.full(raw.shape[1], steps[-1])
    amplification = 1.0
    with np.errstate(all="ignore"):
        for j, order in enumerate(orders, start=1):
            weight = (steps[0] / steps[1]) ** order
            following = (weight * column[1:] - column[:-1]) / (weight - 1)
            amplification *= (weight + 1) / (weight - 1)
            truncation = np.maximum(np.abs(following - column[1:]), np.abs(following - column[:-1]))
            beyond = np.maximum(lowest[j:] - following, following - highest[j:])
            unexplained = np.maximum(beyond - np.abs(following - raw[j:]), 0.0)
            total = truncation + 3 * amplification * rounding[j:] + unexplained
            total = np.where(np.isfinite(total), total, np.inf)
            row = np.argmin(total, axis=0)
            candidate = np.take_along_axis(total, row[None], 0)[0]
            better = candidate < error
            best = np.where(better, np.take_along_axis(following, row[None], 0)[0], best)
            step = np.where(better, steps[j:][row], step)
            error = np.where(better, candidate, error)
            column = following
    return best, error, step
