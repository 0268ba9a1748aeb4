"""The integrator: plain tensors and nothing recorded. Times and step sizes are numbers of the host, one an example."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import factorial
from typing import Any

import numpy as np
import torch

from gradlab.transforms.odes._torch_stages import Field, stages
from gradlab.transforms.odes._torch_trajectory import Solved, Trajectory, within
from gradlab.transforms.odes.options import Status, Tolerance
from gradlab.transforms.repairs._torch import unseen

EPS = float(np.finfo(float).eps)

# A step is stiff if h |∂f/∂y|, from two slopes at its end, is beyond the stability of the explicit method; so many of
# them, without so many others in between, make an equation stiff (Hairer and Wanner 1996, IV.2).
STIFF, STEPS, OTHERS = 3.25, 15, 6


@dataclass
class Start:
    """What is known before the first step."""

    slope: Any = None
    size: Any = None  # of a step that will do, of each example


def integrate(
    f: Field,
    ts: np.ndarray,
    y: Any,
    tolerance: Tolerance,
    record: Any = False,
    stiff: Any = None,
    event: Any = None,
    start: Start | None = None,
) -> Solved:
    """Integrate from states y (B, n) at ts[:, 0] along times ts (B, T).

    `record` keeps the trajectory, or "steps" its times alone. Each example has step sizes of its own; one that is
    finished stays. Those that are `stiff` (B,), or are seen to be, go on by the other method when the rest has
    finished.
    """
    with unseen(torch.no_grad()), np.errstate(all="ignore"):
        run = Run(f, ts, y, tolerance, record, stiff, event, start or Start())
        while run.some(run.going):
            run.step()
        if run.some(run.stiff):
            run.change()
            while run.some(run.going):
                run.step()
        return run.result()


class Run:
    """The state of an integration between steps.

    Times, step sizes and errors are arrays (B,) of the host, or plain numbers where there is one example: numpy
    costs as much for one number as for a hundred, and several times what Python does.
    """

    def __init__(
        self,
        f: Field,
        ts: np.ndarray,
        y: Any,
        tolerance: Tolerance,
        record: Any,
        stiff: Any,
        event: Any,
        start: Start,
    ):
        self.f, self.y, self.tolerance = f, y.contiguous(), tolerance
        self.tableau: Any = tolerance.tableau
        self.shape = y.shape
        B = len(y)
        self.one = B == 1
        pairs: Any = (min, max, bool, bool) if self.one else (np.minimum, np.maximum, np.all, np.any)
        self.least, self.most, self.every, self.some = pairs
        self.chosen = (lambda mask, a, b: a if mask else b) if self.one else np.where
        self.ts = ts
        self.ahead = [[t if row[0] < row[-1] else -t for t in row] for row in ts.tolist()]  # rising
        self.reached = [0] * B  # of ts, the last that is passed
        self.t, self.end = self.numbers(ts[:, 0]), self.numbers(ts[:, -1])
        self.direction = self.numbers(np.sign(ts[:, -1] - ts[:, 0]))
        least, none = self.least, 0.0 if self.one else np.zeros(B)
        self.status, self.accepted, self.rejected = none, none + 0, none + 0
        self.last_error, self.planned = none + 1, none + 0
        self.early: Any = True if self.one else np.ones(B, dtype=bool)
        self.evaluations, self.tries, self.moves = 0, 0, 0
        self.nobody: Any = False if self.one else np.zeros(B, dtype=bool)
        self.stiff: Any = self.nobody if stiff is None else bool(stiff[0]) if self.one else stiff
        self.signs, self.others = none + 0, none + 0  # of stiffness, and steps without
        self.ys = y.new_full((B, ts.shape[1], y.shape[1]), torch.nan)
        self.ys[:, 0] = y
        again = ts[:, 1:] == ts[:, :1]
        if again.any():
            self.ys[:, 1:][torch.from_numpy(again).to(y.device)] = y[:, None].expand_as(self.ys[:, 1:])[again]
        self.trajectory = Trajectory(whole=record != "steps") if record else None
        if isinstance(record, Trajectory):
            self.trajectory = record
        self.switched: int | None = None
        self.slope, self.integrand, self.begun = start.slope, None, None
        if start.slope is not None:
            self.evaluations += 1
        elif f.begin is not None and tolerance.step_size is None:
            self.slope, self.begun = f.begin(self)
            self.evaluations += 1
        else:
            self.slope, self.integrand = self.at(self.t, y)
        self.first = self.slope
        self.integrals = None if self.integrand is None else torch.zeros_like(self.integrand)
        self.stages = stages(self, self.tableau)
        self.event, self.events, self.sign = event, none + np.inf, none
        if event is not None:
            self.sign = self.signs_of(ts[:, 0], y)
        self.atol = torch.as_tensor(tolerance.atol, dtype=y.dtype, device=y.device)
        self.measure()
        self.size = y.abs()
        bad = ~np.isfinite(self.norm(self.slope, None))
        self.status = self.chosen(bad, Status.NOT_FINITE, self.status)
        self.going = (self.t != self.end) & self.unless(bad)
        span = self.most(self.end - self.t, self.t - self.end)
        if tolerance.step_size is not None:
            self.h = self.direction * tolerance.step_size
        elif self.some(self.going):
            known = start.size is not None and self.every(self.t + self.direction * start.size != self.t)
            self.h = self.direction * least(start.size if known else self.first_step(span), span)
        self.going = self.going & self.unless(self.stiff)

    def change(self) -> None:
        """To the method for stiff equations."""
        self.switched = len(self.trajectory.ends) if self.trajectory is not None else None
        self.tableau = self.tolerance.stiff
        self.stages = stages(self, self.tableau)
        self.measure()
        self.going = self.stiff & (self.t != self.end)
        self.last_error = self.chosen(self.going, 1.0, self.last_error)
        self.tries = int(np.max((self.accepted + self.rejected) * self.going))

    def measure(self) -> None:
        """How the error is measured: with stiffness where that matters, and what rounding makes of it."""
        self.watched = self.tolerance.stiff is not None and self.tolerance.stiff is not self.tableau
        self.stages.errors = self.stages.weights.error[: 4 if self.watched else 2]
        self.rounding = self.stages.weights.rounding

    def unless(self, mask: Any) -> Any:
        """The other examples."""
        return not mask if self.one else ~mask

    def mask(self, examples: Any) -> Any:
        """A mask of examples for states."""
        return torch.as_tensor(examples, device=self.y.device).view(-1, 1)

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
        return self.norms(x[None], scale)[0]

    def norms(self, xs: Any, scale: Any) -> Any:
        """That of several states (k, B, n)."""
        parts, (B, n) = self.tolerance.parts, self.shape
        xs = xs if scale is None else xs / scale
        if parts == 1:
            sizes = torch.linalg.vector_norm(xs, dim=-1)
            if self.one:
                unit = n**-0.5
                return [size * unit for (size,) in sizes.tolist()]
        else:
            sizes = torch.linalg.vector_norm(xs.reshape(-1, B, parts, n // parts), dim=-1).amax(-1)
        factor = (parts / n) ** 0.5
        if self.one:
            return [size * factor for size in sizes.view(-1).tolist()]
        return sizes.cpu().numpy().astype(float) * factor

    def scale(self, size: Any) -> Any:
        """What errors are measured in."""
        return torch.add(self.atol, size, alpha=self.tolerance.rtol)

    def first_step(self, span: Any) -> Any:
        """By the sizes of y, of f and of its change along an Euler step (Hairer, Nørsett and Wanner 1993, II.4)."""
        least, most, order = self.least, self.most, self.tableau.error_order + 1
        d1, h, change = self.euler_step(span) if self.begun is None else self.begun
        change = change / most(h, 1e-300)
        change = self.chosen(np.isfinite(change), change, 1e15)
        larger = most(d1, change)
        longer = self.chosen(
            larger <= 1e-15, most(1e-6, h * 1e-3), (0.01 / most(larger, 1e-15)) ** (1 / order)
        )
        short = least(100 * h, longer)
        if self.tableau.implicit:
            return least(short, span)
        rate = least(
            change / most(d1, 1e-300), 1e30
        )  # were each derivative as much larger than the one before
        term = (0.1 * factorial(order) / most(d1 * rate ** (order - 1), 1e-300)) ** (1 / order)
        return least(least(most(short, term), 10 * short), span)

    def euler_step(self, span: Any) -> tuple[Any, Any, Any]:
        """The size of f, how long a short step is, and how much f changes along it."""
        scale = self.scale(self.size)
        d0, d1 = self.norms(torch.stack([self.y, self.slope]), scale)
        h = self.chosen((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / self.most(d1, 1e-5))
        h = self.least(h, span)
        y = torch.addcmul(self.y, self.column(self.direction * h), self.slope)
        slope, _ = self.at(self.t + self.direction * h, y)
        return d1, h, self.norm(slope - self.slope, scale)

    def step(self) -> None:
        """One step of every example that has not finished, kept where its error is small enough."""
        t, h = self.t, self.h * self.going
        self.planned = self.chosen(self.going, abs(h), self.planned)
        left = self.end - t
        after = self.chosen(self.direction * (left - h) <= 1e-10 * abs(h), self.end, t + h)
        after = self.chosen(self.going, after, t)
        h = after - t
        y, slope, integrand, failed = self.stages(t, h)
        size = y.abs()
        ratio: Any = 0.0
        if self.tolerance.step_size is None:
            error, moved, *ends = self.stages.judged(size)
            self.noise = self.rounding * moved
            if ends:
                ratio = ends[0] / self.most(ends[1], 1e-300)
        else:
            error = 0 * (self.norm(y, None) + self.norm(slope, None))
        error = self.chosen(error < np.inf, error, np.inf)
        error = self.chosen(failed & (error < np.inf), 4.0**self.tableau.order, error)
        kept = (error <= 1) & self.going
        self.record(kept, t, after, y)
        met = self.nobody if self.event is None else self.look(kept, t, after, y)
        self.move(kept, after, y, slope, integrand, size)
        self.control(kept, error, h)
        if self.watched:
            self.watch(kept, ratio)
        self.going = self.going & self.unless(met)

    def signs_of(self, time: Any, y: Any) -> Any:
        """Those of the event, (B,)."""
        times = np.reshape(np.asarray(time, dtype=float), -1)
        return np.sign(self.event(torch.tensor(times).to(y), y).detach().cpu().double().numpy().reshape(-1))

    def look(self, kept: Any, t: Any, after: Any, y: Any) -> Any:
        """Which examples met the event in this step; its time by halving the polynomial's part of it."""
        sign = self.signs_of(after, y)
        met = np.reshape(kept, -1) & (self.sign != 0) & (sign != self.sign)
        if met.any():
            polynomial, length = self.stages.polynomial(), np.reshape(after, -1) - np.reshape(t, -1)
            low, high = np.zeros(len(met)), np.ones(len(met))
            for _ in range(52):
                middle = (low + high) / 2
                now = self.signs_of(t + middle * length, within(self.y, polynomial, middle))
                low, high = np.where(now == self.sign, middle, low), np.where(now == self.sign, high, middle)
            self.events = np.where(met, t + high * length, self.events)
        self.sign = np.where(kept, sign, self.sign)
        return bool(met[0]) if self.one else met

    def watch(self, kept: Any, ratio: Any) -> None:
        """Whether the steps kept are those of a stiff equation."""
        sign = ratio > STIFF
        self.signs = self.signs + (kept & sign)
        self.others = self.chosen(kept, self.chosen(sign, 0, self.others + 1), self.others)
        self.signs = self.chosen(self.others >= OTHERS, 0, self.signs)
        self.stiff = self.stiff | (self.going & (self.signs >= STEPS))
        self.going = self.going & self.unless(self.stiff)

    def record(self, kept: Any, t: Any, after: Any, y: Any) -> None:
        """The values at those of ts that lie in the steps kept, and the steps themselves if asked for."""
        polynomial = None
        if self.trajectory is not None and self.some(kept):
            polynomial = self.stages.polynomial() if self.trajectory.whole else None
            self.trajectory.add(t, self.chosen(kept, after, t), self.y, polynomial)
        for b in range(self.shape[0]):
            keep, start, end = (kept, t, after) if self.one else (kept[b], t[b], after[b])
            if not keep:
                continue
            last = bisect_right(self.ahead[b], end if end > start else -end)
            for j in range(self.reached[b] + 1, last):
                if self.ts[b, j] == end:
                    self.ys[b, j] = y[b]
                    continue
                if polynomial is None:
                    polynomial = self.stages.polynomial()
                share = np.array([(self.ts[b, j] - start) / (end - start)])
                self.ys[b, j] = within(self.y[b : b + 1], polynomial[:, b : b + 1].contiguous(), share)[0]
            self.reached[b] = last - 1

    def move(self, kept: Any, after: Any, y: Any, slope: Any, integrand: Any, size: Any) -> None:
        """To the end of the steps kept."""
        if not self.some(kept):
            return
        self.moves += 1
        integrals = self.stages.gained(self.integrals)
        new: Any = y, slope, size, integrand, integrals
        if not self.every(kept):
            old, mask = (self.y, self.slope, self.size, self.integrand, self.integrals), self.mask(kept)
            new = tuple(None if x is None else torch.where(mask, x, z) for x, z in zip(new, old, strict=True))
        self.y, self.slope, self.size, self.integrand, self.integrals = new
        self.t = self.chosen(kept, after, self.t)

    def control(self, kept: Any, error: Any, h: Any) -> None:
        """The next step size: proportional and integral control (Hairer and Wanner 1996, IV.2); at first integral."""
        least, most, chosen = self.least, self.most, self.chosen
        self.tries += 1
        self.accepted += kept
        self.rejected += self.going & self.unless(kept)
        if self.tolerance.step_size is None:
            order = self.tableau.error_order + 1
            known = most(error - self.noise, error / 2)  # of rounding alone a step should still grow
            size = most(known, 1e-12)
            grown = 0.9 * size ** (0.03 - 1 / order) * self.last_error**0.04
            self.early = self.early & (size < 0.1)
            grown = chosen(self.early, 0.9 * size ** (-1 / order), grown)
            shrunk = 0.9 * most(error, 1e-12) ** (-1 / order)
            factor = chosen(kept, least(most(grown, 0.2), 10.0), least(most(shrunk, 0.1), 0.9))
            self.h = chosen(self.going & (h != 0), h * factor, self.h)
            self.last_error = chosen(kept, most(error, 1e-4), self.last_error)
            lost = abs(self.h) <= 16 * EPS * abs(self.t)
        else:
            lost = error > 1
        lost = lost & self.going & self.unless(kept)
        if self.some(lost):
            reason = chosen(error < np.inf, Status.STEP_TOO_SMALL, Status.NOT_FINITE)
            self.status = chosen(lost, reason, self.status)
            self.going = chosen(lost, False, self.going)
        self.going = self.going & (self.t != self.end)
        if self.tries >= self.tolerance.max_steps:
            self.status = chosen(self.going, Status.MAX_STEPS, self.status)
            self.going = chosen(self.going, False, self.going)

    def result(self) -> Solved:
        trajectory = None if self.trajectory is None else self.trajectory.close(self.t, self.y)
        each = lambda numbers, kind=None: np.array(numbers, kind).reshape(-1)
        whole = lambda numbers: each(numbers, np.int64)
        self.events = each(self.events)
        return Solved(
            self.ys,
            self.integrals,
            each(self.t),
            self.y,
            whole(self.accepted),
            whole(self.rejected),
            self.evaluations,
            whole(self.status),
            each(self.stiff),
            self.switched,
            self.first,
            self.planned if self.tolerance.step_size is None else None,
            self.events,
            trajectory,
        )
