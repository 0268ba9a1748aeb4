"""The integrator: plain tensors and nothing recorded. Times and step sizes are numbers of the host, one an example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from gradlab.transforms.odes.options import Status, Tolerance
from gradlab.transforms.odes.tableaux import Tableau

# A field is `(time, t, y) -> (slope, integrands)`: times (B,) as tensors and as the host has them, states (B, n).
# Integrands (B, m), or None, are integrated beside the state and enter no error.
Field = Callable[[Any, Any, Any], tuple[Any, Any]]

EPS = float(np.finfo(float).eps)


@dataclass
class Weights:
    """A tableau as tensors."""

    a: list[Any]
    b: Any
    error: Any
    dense: Any
    c: Any


@cache
def weights(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> Weights:
    """A tableau as tensors of this kind; the rows of a padded with zeros are those of the stages before."""
    tensor = lambda row: torch.tensor(row, dtype=dtype, device=device)
    error = None if tableau.error is None else tensor(tableau.error)
    return Weights(
        [tensor(row) for row in tableau.a], tensor(tableau.b), error, tensor(tableau.dense), tensor(tableau.c)
    )


@dataclass
class Trajectory:
    """The steps taken, and the polynomial within each."""

    starts: list[Any] = field(default_factory=list)  # (B,) each
    ends: list[Any] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)  # y at the start, (B, n)
    polynomials: list[Any] = field(default_factory=list)  # (degree, B, n)

    def add(self, start: Any, end: Any, y: Any, polynomial: Any) -> None:
        """One more step; an example that does not move has end = start."""
        self.starts.append(start)
        self.ends.append(end)
        self.values.append(y)
        self.polynomials.append(polynomial)

    def close(self) -> Trajectory:
        """Ready to be looked up."""
        ends = np.array(self.ends).reshape(len(self.ends), -1).T  # (B, steps)
        self.starts = list(np.array(self.starts).reshape(len(self.ends), -1))
        self.ends = list(ends.T)
        self.direction = np.sign(ends[:, -1] - self.starts[0])
        self.knots = ends * self.direction[:, None]  # rising
        return self

    def __call__(self, time: Any) -> Any:
        """y at times (B,)."""
        t = np.reshape(time, -1)
        steps = [
            min(int(np.searchsorted(knots, s * at)), len(knots) - 1)
            for s, knots, at in zip(self.direction, self.knots, t, strict=True)
        ]
        share = np.array([_share(self.starts[k][b], self.ends[k][b], t[b]) for b, k in enumerate(steps)])
        if len(steps) == 1:
            return within(self.values[steps[0]], self.polynomials[steps[0]], share)
        values = torch.stack([self.values[k][b] for b, k in enumerate(steps)])
        polynomials = torch.stack([self.polynomials[k][:, b] for b, k in enumerate(steps)], 1)
        return within(values, polynomials, share)


def _share(start: float, end: float, t: float) -> float:
    return (t - start) / (end - start) if end != start else 0.0


def within(y: Any, polynomial: Any, share: np.ndarray) -> Any:
    """y + Σⱼ θʲ⁺¹ polynomialⱼ of states (B, n), at θ (B,)."""
    degree = len(polynomial)
    powers = share ** np.arange(1, degree + 1)[:, None]
    if len(share) == 1:
        row = torch.from_numpy(powers[:, 0]).to(y)
        return torch.addmv(y.view(-1), polynomial.view(degree, -1).T, row).view(y.shape)
    return y + (torch.from_numpy(powers).to(y)[:, :, None] * polynomial).sum(0)


@dataclass
class Solved:
    """What an integration gives: states (B, T, n), not-a-number where not reached, and how it went, (B,) each."""

    ys: Any
    integrals: Any  # (B, m) or None
    t: np.ndarray  # how far each example came, (B,)
    y: Any  # and its state there
    steps: np.ndarray  # accepted
    rejected: np.ndarray
    evaluations: int
    status: np.ndarray
    trajectory: Trajectory | None


def integrate(
    f: Field, ts: np.ndarray, y: Any, tolerance: Tolerance, record: bool = False, first: Any = None
) -> Solved:
    """Integrate from states y (B, n) at ts[:, 0] along times ts (B, T).

    `first` is f at the start, where it is known. Each example has step sizes of its own; one that is finished stays.
    """
    with torch.no_grad(), np.errstate(all="ignore"):
        run = Run(f, ts, y, tolerance, record, first)
        while run.some(run.going):
            run.step()
        return run.result()


class Run:
    """The state of an integration between steps.

    Times, step sizes and errors are arrays (B,) of the host, or plain numbers where there is one example: numpy
    costs as much for one number as for a hundred, and several times what Python does.
    """

    def __init__(self, f: Field, ts: np.ndarray, y: Any, tolerance: Tolerance, record: bool, first: Any):
        self.f, self.y, self.tolerance = f, y.contiguous(), tolerance
        self.tableau = tolerance.tableau
        self.weights = weights(self.tableau, y.dtype, y.device)
        self.shape = B, n = y.shape
        self.one = B == 1
        pairs: Any = (min, max, bool, bool) if self.one else (np.minimum, np.maximum, np.all, np.any)
        self.least, self.most, self.every, self.some = pairs
        self.chosen = (lambda mask, a, b: a if mask else b) if self.one else np.where
        self.ts = ts
        self.ahead = ts * np.sign(ts[:, -1:] - ts[:, :1])  # rising
        self.reached = np.zeros(B, dtype=int)  # of ts, the last that is passed
        self.t, self.end = self.numbers(ts[:, 0]), self.numbers(ts[:, -1])
        self.direction = self.numbers(np.sign(ts[:, -1] - ts[:, 0]))
        self.status, self.accepted, self.rejected = (self.numbers(np.zeros(B)) for _ in range(3))
        self.last_error = self.numbers(np.ones(B))
        self.evaluations, self.tries = 0, 0
        self.K = y.new_empty(self.tableau.stages, B, n)  # h times the slopes
        self.flat = self.K.view(self.tableau.stages, B * n)
        self.before = [None, *(self.flat[:i].T for i in range(1, self.tableau.stages))]
        self.ys = y.new_full((B, ts.shape[1], n), torch.nan)
        self.ys[:, 0] = y
        self.trajectory = Trajectory() if record else None
        self.integrals: Any = None
        self.Q: Any = None
        self.slope, self.integrand = first if first is not None else self.at(self.t, y)
        if self.integrand is not None:
            self.Q = y.new_empty(self.tableau.stages, *self.integrand.shape)
            self.integrals = torch.zeros_like(self.integrand)
        self.atol = torch.as_tensor(tolerance.atol, dtype=y.dtype, device=y.device)
        self.size = y.abs()
        bad = ~np.isfinite(self.norm(self.slope, 1.0))
        self.status += bad * Status.NOT_FINITE
        self.going = (self.t != self.end) & (not bad if self.one else ~bad)
        span = self.most(self.end - self.t, self.t - self.end)
        if tolerance.step_size is not None:
            self.h = self.direction * tolerance.step_size
        elif self.some(self.going):
            self.h = self.direction * self.first_step(span)

    def numbers(self, array: np.ndarray) -> Any:
        return float(array[0]) if self.one else array.astype(float)

    def column(self, numbers: Any) -> Any:
        """Numbers (B,) of the host as a factor of states."""
        if self.one:
            return torch.tensor(numbers, dtype=self.y.dtype, device=self.y.device)
        return torch.from_numpy(numbers).to(self.y)[:, None]

    def at(self, t: Any, y: Any) -> Any:
        """f, counted."""
        self.evaluations += 1
        return self.f(t, self.column(t).view(-1), y)

    def norm(self, x: Any, scale: Any) -> Any:
        """The largest, over the parts of a state, of the root mean square of x / scale."""
        parts = self.tolerance.parts
        sizes = torch.linalg.vector_norm((x / scale).reshape(self.shape[0], parts, -1), dim=-1).amax(-1)
        sizes = sizes.item() if self.one else sizes.cpu().numpy().astype(float)
        return sizes * (parts / self.shape[1]) ** 0.5

    def first_step(self, span: Any) -> Any:
        """By the sizes of y, of f and of its change along an Euler step (Hairer, Nørsett and Wanner 1993, II.4)."""
        least, most, order = self.least, self.most, self.tableau.error_order + 1
        scale = torch.add(self.atol, self.size, alpha=self.tolerance.rtol)
        d0, d1 = self.norm(self.y, scale), self.norm(self.slope, scale)
        h = self.chosen((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / most(d1, 1e-5))
        h = least(h, span)
        y = torch.addcmul(self.y, self.column(self.direction * h), self.slope)
        slope, _ = self.at(self.t + self.direction * h, y)
        change = self.norm(slope - self.slope, scale) / most(h, 1e-300)
        change = self.chosen(np.isfinite(change), most(d1, change), 1e15)
        longer = self.chosen(
            change <= 1e-15, most(1e-6, h * 1e-3), (0.01 / most(change, 1e-15)) ** (1 / order)
        )
        return least(least(100 * h, longer), span)

    def step(self) -> None:
        """One step of every example that has not finished, kept where its error is small enough."""
        t, h = self.t, self.h * self.going
        left = self.end - t
        after = self.chosen(self.direction * (left - h) <= 1e-10 * abs(h), self.end, t + h)
        after = self.chosen(self.going, after, t)
        h = after - t
        y, slope, integrand = self.stages(t, h)
        size = y.abs()
        if self.tolerance.step_size is None:
            scale = torch.add(self.atol, torch.maximum(self.size, size), alpha=self.tolerance.rtol)
            error = self.norm((self.weights.error @ self.flat).view(self.shape), scale)
        else:
            error = 0 * (self.norm(y, 1.0) + self.norm(slope, 1.0))
        error = self.chosen(error < np.inf, error, np.inf)
        kept = (error <= 1) & self.going
        self.record(kept, t, after, y)
        self.move(kept, after, y, slope, integrand, size)
        self.control(kept, error, h)

    def stages(self, t: Any, h: Any) -> tuple[Any, Any, Any]:
        """y, slope and integrand at the end of a step."""
        times = self.column(h) * self.weights.c + self.column(t)  # (stages,) or (B, stages)
        times = times.view(-1, self.tableau.stages).T.unbind()
        column, flat = self.column(h), self.y.view(-1)
        torch.mul(self.slope, column, out=self.K[0])
        if self.Q is not None:
            torch.mul(self.integrand, column, out=self.Q[0])
        for i in range(1, self.tableau.stages):
            y = torch.addmv(flat, self.before[i], self.weights.a[i]).view(self.shape)
            slope, integrand = self.f(t + self.tableau.c[i] * h, times[i], y)
            torch.mul(slope, column, out=self.K[i])
            if self.Q is not None:
                torch.mul(integrand, column, out=self.Q[i])
        self.evaluations += self.tableau.stages - 1
        return y, slope, integrand

    def record(self, kept: Any, t: Any, after: Any, y: Any) -> None:
        """The values at those of ts that lie in the steps kept, and the steps themselves if asked for."""
        polynomial = None
        if self.trajectory is not None and self.some(kept):
            polynomial = (self.weights.dense @ self.flat).view(-1, *self.shape)
            self.trajectory.add(t, self.chosen(kept, after, t), self.y, polynomial)
        for b in range(self.shape[0]):
            keep, start, end = (kept, t, after) if self.one else (kept[b], t[b], after[b])
            if not keep:
                continue
            last = np.searchsorted(self.ahead[b], end * np.sign(end - start), side="right")
            for j in range(self.reached[b] + 1, last):
                if self.ts[b, j] == end:
                    self.ys[b, j] = y[b]
                    continue
                if polynomial is None:
                    polynomial = (self.weights.dense @ self.flat).view(-1, *self.shape)
                share = np.array([(self.ts[b, j] - start) / (end - start)])
                self.ys[b, j] = within(self.y[b : b + 1], polynomial[:, b : b + 1].contiguous(), share)[0]
            self.reached[b] = last - 1

    def move(self, kept: Any, after: Any, y: Any, slope: Any, integrand: Any, size: Any) -> None:
        """To the end of the steps kept."""
        if not self.some(kept):
            return
        if self.Q is not None:
            moved = self.integrals + torch.tensordot(self.weights.b, self.Q, 1)
        if self.every(kept):
            self.y, self.slope, self.size = y, slope, size
            if self.Q is not None:
                self.integrals, self.integrand = moved, integrand
        else:
            mask = torch.from_numpy(kept).to(y.device)[:, None]
            self.y, self.slope = torch.where(mask, y, self.y), torch.where(mask, slope, self.slope)
            self.size = torch.where(mask, size, self.size)
            if self.Q is not None:
                self.integrals = torch.where(mask, moved, self.integrals)
                self.integrand = torch.where(mask, integrand, self.integrand)
        self.t = self.chosen(kept, after, self.t)

    def control(self, kept: Any, error: Any, h: Any) -> None:
        """The next step size: proportional and integral control (Hairer and Wanner 1996, IV.2)."""
        least, most, chosen = self.least, self.most, self.chosen
        self.tries += 1
        self.accepted += kept
        self.rejected += self.going & (not kept if self.one else ~kept)
        if self.tolerance.step_size is None:
            order = self.tableau.error_order + 1
            size = most(error, 1e-12)
            grown = 0.9 * size ** (0.03 - 1 / order) * self.last_error**0.04
            shrunk = 0.9 * size ** (-1 / order)
            factor = chosen(kept, least(most(grown, 0.2), 10.0), least(most(shrunk, 0.1), 0.9))
            self.h = chosen(self.going & (h != 0), h * factor, self.h)
            self.last_error = chosen(kept, most(error, 1e-4), self.last_error)
            lost = abs(self.h) <= 16 * EPS * abs(self.t)
        else:
            lost = error > 1
        lost = lost & self.going & (not kept if self.one else ~kept)
        if self.some(lost):
            reason = chosen(error < np.inf, Status.STEP_TOO_SMALL, Status.NOT_FINITE)
            self.status = chosen(lost, reason, self.status)
            self.going = chosen(lost, False, self.going)
        self.going = self.going & (self.t != self.end)
        if self.tries >= self.tolerance.max_steps:
            self.status = chosen(self.going, Status.MAX_STEPS, self.status)
            self.going = chosen(self.going, False, self.going)

    def result(self) -> Solved:
        trajectory = None if self.trajectory is None else self.trajectory.close()
        whole = lambda numbers: np.array(numbers, dtype=np.int64).reshape(-1)
        return Solved(
            self.ys,
            self.integrals,
            np.reshape(self.t, -1),
            self.y,
            whole(self.accepted),
            whole(self.rejected),
            self.evaluations,
            whole(self.status),
            trajectory,
        )
