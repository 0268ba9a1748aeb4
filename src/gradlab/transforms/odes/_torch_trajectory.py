"""What an integration leaves: the steps with their polynomials, and the states."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class Trajectory:
    """The steps taken, and the polynomial within each."""

    starts: list[Any] = field(default_factory=list)  # (B,) each
    ends: list[Any] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)  # y at the start, (B, n)
    polynomials: list[Any] = field(default_factory=list)  # (degree, B, n)
    whole: bool = True  # else the times alone
    known: dict[float, Any] = field(default_factory=dict)  # states of one example, computed together

    def add(self, start: Any, end: Any, y: Any, polynomial: Any) -> None:
        """One more step; an example that does not move has end = start."""
        self.starts.append(start)
        self.ends.append(end)
        if self.whole:
            self.values.append(y)
            self.polynomials.append(polynomial)

    def close(self, t: Any, y: Any) -> Trajectory:
        """Ready to be looked up; of two methods, with polynomials of one degree. Without a step it stays at (t, y)."""
        if not self.ends:
            Trajectory.add(self, t, t, y, torch.zeros_like(y)[None])
        degree = max(map(len, self.polynomials), default=0)
        pad = lambda p: torch.nn.functional.pad(p, (0, 0, 0, 0, 0, degree - len(p)))
        self.polynomials = [p if len(p) == degree else pad(p) for p in self.polynomials]
        ends = np.array(self.ends).reshape(len(self.ends), -1).T  # (B, steps)
        self.starts = list(np.array(self.starts).reshape(len(self.ends), -1))
        self.ends = list(ends.T)
        self.direction = np.sign(ends[:, -1] - self.starts[0])
        self.knots = ends * self.direction[:, None]  # rising
        self.sign, self.rising = float(self.direction[0]), self.knots[0].tolist()  # of the first example
        return self

    def ahead(self, times: list[float]) -> None:
        """Compute the states at these times of one example."""
        self.known = dict(zip(times, self.states(times).split(1), strict=True))

    def states(self, times: list[float]) -> Any:
        """Those (k, n) at times of one example that rise or fall, by one product for all in a step."""
        steps: dict[int, list[float]] = {}
        for t in times:
            k = min(bisect_left(self.rising, self.sign * t), len(self.rising) - 1)
            steps.setdefault(k, []).append(t)
        rows = []
        for k, ts in steps.items():
            y, polynomial, start, end = (
                self.values[k],
                self.polynomials[k],
                self.starts[k][0],
                self.ends[k][0],
            )
            shares = [_share(start, end, t) for t in ts]
            powers = [[x**j for j in range(1, len(polynomial) + 1)] for x in shares]
            factor = torch.tensor(powers, dtype=y.dtype, device=y.device)
            rows.append(torch.addmm(y, factor, polynomial.view(len(polynomial), -1)))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def __call__(self, time: Any) -> Any:
        """y at times (B,)."""
        if isinstance(time, float) and time in self.known:
            return self.known[time]
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
    stiff: np.ndarray  # whether it ended by the method for stiff equations
    switched: int | None  # how many of the steps of the trajectory came before that
    first: Any  # the slope at the start, (B, n)
    size: Any  # of the last step of each example, had there been no end; None where sizes are given
    events: np.ndarray  # when each example met the event, or infinity
    trajectory: Trajectory | None
