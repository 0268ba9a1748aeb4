"""Directional derivatives by extrapolated differences, with an estimate of their own error.

Everything here is numpy in float64 and knows no framework. Along a direction the function is evaluated
on a ladder of halving steps; central differences are extrapolated to step zero (Richardson), and per
output the entry of the tableau with the smallest estimated error is taken (Ridders). The estimate
adds truncation (the disagreement of neighbouring entries), rounding (the function's own noise,
measured on a difference table, divided by the step) and the jump of the slope, where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]

STEPS = 0.25 * 2.0 ** -np.arange(20)  # in units of the direction
SECOND_STEPS = 0.3 * 1.7 ** -np.arange(22)  # another grid, to confirm a failure on
EVEN, ODD = (2, 4, 6, 8, 10, 12), (1, 3, 5, 7)  # error terms of central differences, and of their asymmetry
NOISE_SPACING = 2.0**-22
EPS = float(np.finfo(np.float64).eps)


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
    """

    value: np.ndarray
    uncertainty: np.ndarray
    steps: np.ndarray
    raw: np.ndarray
    step: np.ndarray
    noise: np.ndarray


def directional(g: Function, x: np.ndarray, v: np.ndarray, steps: np.ndarray = STEPS) -> Estimate:
    """Derivative of g: R^n -> R^m at x along v: d/dt g(x + t v) at t = 0.

    The direction carries the scale: v should be as large as a natural change of x, of which the
    largest step is a quarter.

    Cost:
        2 evaluations of g a step, and 17 for its noise: 57 in all.

    Source:
        Ridders, Advances in Engineering Software 4 (1982), doi:10.1016/S0141-1195(82)80057-0; noise as in
        Moré and Wild, SIAM J. Sci. Comput. 33 (2011), doi:10.1137/100786125.
    """
    centre, plus, minus, noise = _sampled(g, x, v, steps)
    h = steps[:, None]
    raw = (plus - minus) / (2 * h)
    value, error, step = _extrapolated(raw, noise / h, steps, EVEN)
    return Estimate(value, error + _jump(centre, plus, minus, noise, steps) / 2, steps, raw, step, noise)


def curvature(g: Function, x: np.ndarray, v: np.ndarray, steps: np.ndarray = STEPS) -> Estimate:
    """Second derivative along a direction, from values alone: d²/dt² g(x + t v) at t = 0.

    Cost:
        As `directional`.
    """
    centre, plus, minus, noise = _sampled(g, x, v, steps)
    h = steps[:, None]
    raw = (plus - 2 * centre + minus) / h**2
    value, error, step = _extrapolated(raw, 4 * noise / h**2, steps, EVEN)
    kink = np.where(_jump(centre, plus, minus, noise, steps) > 0, np.inf, 0.0)  # no second derivative there
    return Estimate(value, error + kink, steps, raw, step, noise)


def _sampled(g: Function, x: np.ndarray, v: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, ...]:
    with np.errstate(all="ignore"):
        centre = g(x)
        plus = np.stack([g(x + h * v) for h in steps])
        minus = np.stack([g(x - h * v) for h in steps])
        return centre, plus, minus, _noise(g, x, v, centre)


def _noise(g: Function, x: np.ndarray, v: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Standard deviation of g's rounding, from the high differences of neighbouring values.

    Eight values on either side; the smaller answer, so that a kink beside x does not pass for noise.
    """
    sides = [
        table_noise(np.stack([g(x + side * i * NOISE_SPACING * v) for i in range(1, 9)])) for side in (-1, 1)
    ]
    return np.maximum(np.minimum(*sides), EPS * np.abs(centre))


def table_noise(table: np.ndarray) -> np.ndarray:
    """Standard deviation of the rounding in values at equal spacing: what high differences leave."""
    levels, factor = [], 1.0
    for k in range(1, 7):
        table = np.diff(table, axis=0)
        factor *= k / (2.0 * (2 * k - 1))
        if k >= 4:
            levels.append(np.sqrt(factor * np.mean(table**2, axis=0)))
    return np.max(levels, axis=0)


def _jump(
    centre: np.ndarray, plus: np.ndarray, minus: np.ndarray, noise: np.ndarray, steps: np.ndarray
) -> np.ndarray:
    """Jump of the slope at x, 0 where smooth: the limit of the asymmetry, which is h g'' + O(h³) if smooth."""
    h = steps[:, None]
    limit, error, _ = _extrapolated((plus - 2 * centre + minus) / h, 4 * noise / h, steps, ODD)
    return np.where(np.abs(limit) > 10 * error, np.abs(limit), 0.0)


def _extrapolated(
    raw: np.ndarray, rounding: np.ndarray, steps: np.ndarray, orders: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Limit at step zero of differences with error terms h^orders, its error, and the step it came from."""
    column, best = raw, raw[-1].copy()
    error = np.full(raw.shape[1], np.inf)
    step = np.full(raw.shape[1], steps[-1])
    amplification = 1.0
    with np.errstate(all="ignore"):
        for j, order in enumerate(orders, start=1):
            weight = (steps[0] / steps[1]) ** order
            following = (weight * column[1:] - column[:-1]) / (weight - 1)
            amplification *= (weight + 1) / (weight - 1)
            truncation = np.maximum(np.abs(following - column[1:]), np.abs(following - column[:-1]))
            total = truncation + 3 * amplification * rounding[j:]
            total = np.where(np.isfinite(total), total, np.inf)
            row = np.argmin(total, axis=0)
            candidate = np.take_along_axis(total, row[None], 0)[0]
            better = candidate < error
            best = np.where(better, np.take_along_axis(following, row[None], 0)[0], best)
            step = np.where(better, steps[j:][row], step)
            error = np.where(better, candidate, error)
            column = following
    return best, error, step
