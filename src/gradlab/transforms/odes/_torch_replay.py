"""The steps themselves differentiated, their sizes held constant: `adjoint="direct"`, or with checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any

import numpy as np
import torch

from gradlab.transforms.custom_rules._torch_levels import tracked, transforming
from gradlab.transforms.implicit_functions._torch import root
from gradlab.transforms.odes._torch_direct import Direct
from gradlab.transforms.odes._torch_passes import on_host, solve
from gradlab.transforms.odes._torch_rules import Solve, applied, counted, fold, unfold
from gradlab.transforms.odes._torch_stages import combined
from gradlab.transforms.odes._torch_systems import Problem, followed
from gradlab.transforms.odes.rosenbrock import Rosenbrock
from gradlab.transforms.odes.tableaux import RK4
from gradlab.transforms.rules._torch import checkpoint


class Notes:
    """What the host knows of a plan: the method of each step, and of each example (B, T) the steps of its times."""

    methods: list[Any]
    index: Any


class Plan(torch.autograd.Function):
    """Where the steps of an example start, and how long they are; in which of them each of ts lies, and where."""

    @staticmethod
    def forward(problem: Problem, notes: Notes, scales: Any, ts: Any, y0: Any, *params: Any) -> Any:
        solved = solve(problem, scales, ts, y0, params, "steps")
        found: Any = solved.trajectory
        options, count = problem.options, len(found.starts)
        switched = count if solved.switched is None else solved.switched
        notes.methods = [options.tableau] * switched + [options.stiff] * (count - switched)
        starts, ends = np.stack(found.starts, 1), np.stack(found.ends, 1)  # (B, steps)
        times = on_host(ts, len(solved.ys))
        pairs = zip(found.knots, found.direction, times, strict=True)
        index = np.stack([np.searchsorted(knots, direction * t) for knots, direction, t in pairs])
        index = np.minimum(index, count - 1)
        unreached = (times - solved.t[:, None]) * np.sign(times[:, -1:] - times[:, :1]) > 0
        within = lambda x: np.take_along_axis(x, index, 1)
        size = within(ends - starts)
        share = np.where(size == 0, 0.0, (times - within(starts)) / np.where(size == 0, 1.0, size))
        share, notes.index = np.where(unreached, np.nan, share), index
        tensor = lambda x: torch.from_numpy(x).to(y0)
        out: Any = tensor(starts), tensor(ends - starts), torch.from_numpy(index).to(y0.device), tensor(share)
        out = *out, counted(solved).to(y0.device)
        return out if problem.batch is not None else tuple(x[0] for x in out)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        return (None,) * 5

    @staticmethod
    def vmap(info: Any, in_dims: Any, problem: Problem, notes: Notes, *tensors: Any) -> Any:
        size = info.batch_size
        folded, given = fold(problem, size, in_dims[2:], tensors, 3)
        out = Plan.apply(folded, notes, *given)
        return tuple(unfold(problem, size, x) for x in out), (0,) * len(out)


@dataclass(eq=False)
class Replay:
    """The steps in plain operations, which every transform differentiates."""

    system: Any  # (t, y, *params) -> slope, of one example
    methods: list[Any]

    def step(self, k: int, t: Any, h: Any, y: Any, slope: Any, params: Sequence[Any]) -> tuple[Any, Any, Any]:
        """y and slope at the end of step k, and the polynomial within it as a function of θ."""
        tableau, slopes = self.methods[k], [slope]
        if isinstance(tableau, Rosenbrock):
            return self.linear(tableau, t, h, y, slope, params)
        for i in range(1, tableau.stages):
            at = y + h * combined(tableau.a[i], slopes)
            time = t + tableau.c[i] * h
            if not tableau.implicit:
                slopes.append(self.system(time, at, *params))
                continue
            guess = combined(tableau.guesses[i], slopes)
            slopes.append(self.stage(tableau.diagonal, guess, time, at, h, params))
        if tableau.implicit:
            at = at + h * tableau.diagonal * slopes[-1]

        return at, slopes[-1], lambda share: y + h * within(tableau, share, slopes)

    def linear(self, tableau: Rosenbrock, t: Any, h: Any, y: Any, slope: Any, params: Sequence[Any]) -> Any:
        """The same of a Rosenbrock method, whose stages are linear equations."""
        drift = followed(lambda t: self.system(t, y, *params), [t], [torch.ones_like(t)])[1]
        sums: list[Any] = []
        for i in range(tableau.stages):
            if i > 0:
                slope = self.system(t + tableau.c[i] * h, y + combined(tableau.a[i], sums), *params)
            right = h * slope + tableau.drift[i] * h**2 * drift
            right = right + combined(tableau.coupling[i], sums) if i > 0 else right
            sums.append(self.solved(tableau.diagonal, tableau.diagonal * right, t, y, h, params))
        end = y + combined(tableau.b, sums)
        return end, self.system(t + h, end, *params), lambda share: y + within(tableau, share, sums)

    def solved(self, diagonal: float, right: Any, t: Any, y: Any, h: Any, params: Sequence[Any]) -> Any:
        """u with (I - h γ ∂f/∂y) u = right."""

        def residual(u: Any, right: Any, t: Any, y: Any, h: Any, *params: Any) -> Any:
            return u - h * diagonal * followed(lambda y: self.system(t, y, *params), [y], [u])[1] - right

        return root(residual, rtol=64 * torch.finfo(y.dtype).eps, atol=0.0)(right, right, t, y, h, *params)

    def stage(self, diagonal: float, guess: Any, t: Any, y: Any, h: Any, params: Sequence[Any]) -> Any:
        """The slope k = f(t, y + h γ k) with its derivatives, by the implicit function theorem."""
        residual = lambda k, t, y, h, *params: k - self.system(t, y + h * diagonal * k, *params)
        eps = torch.finfo(y.dtype).eps
        return root(residual, rtol=64 * eps, atol=0.0)(guess, t, y, h, *params)

    def steps(self, first: int, places: Any, own: list[int], *given: Any) -> Any:
        """From step `first` on: the state and slope at the end, and the states at those times that lie in these steps.

        `places` are, for each step, the numbers of its times, and whether they lie there in every example; `own` those
        of all of them.
        """
        y, slope, starts, sizes, index, share, params = given
        ys = {j: torch.zeros_like(y) for j in own}
        for k, here in enumerate(places):
            end, slope_end, within = self.step(first + k, starts[k], sizes[k], y, slope, params)
            for j, every in here:
                ys[j] = (
                    within(share[j]) if every else torch.where(index[j] == first + k, within(share[j]), ys[j])
                )
            y, slope = end, slope_end
        return y, slope, [ys[j] for j in own]


def flowed(system: Any, t: Any, y: Any, h: Any, params: Sequence[Any]) -> Any:
    """The state after h = 0, whose derivatives in t and h are those of the flow, to the fourth order."""
    slopes: list[Any] = []
    for c, row in zip(RK4.c[:-1], RK4.a[:-1], strict=True):
        at = y + h * combined(row, slopes) if slopes else y
        slopes.append(system(t + c * h, at, *params))
    return y + h * combined(RK4.b[:-1], slopes)


def within(tableau: Any, share: Any, slopes: Sequence[Any]) -> Any:
    """The polynomial of a step at θ, less its first value."""
    powers = [share ** (j + 1) for j in range(len(tableau.dense))]
    columns = zip(*tableau.dense, strict=True)
    return combined(
        [sum(w * p for w, p in zip(column, powers, strict=True) if w != 0) for column in columns], slopes
    )


def states(problem: Problem, record: bool, scales: Any, ts: Any, y0: Any, params: Sequence[Any]) -> Any:
    """The states at ts and the counts, with derivatives by the adjoint asked for."""
    options, plain = problem.options, not transforming()
    if options.adjoint in ("direct", "checkpoint") and len(ts) > 1 and (record or not plain):
        explicit = options.stiff is None and not options.tableau.implicit
        if options.adjoint == "direct" and plain and explicit and not ts.requires_grad:
            return Direct.apply(problem, replayed, scales, ts, y0, *params)
        return replayed(problem, scales, ts, y0, params)
    if record or not plain:
        return applied(Solve, problem, record, scales, ts, y0, *params)
    return Solve.forward(problem, record, scales, ts, y0, *params)


def replayed(problem: Problem, scales: Any, ts: Any, y0: Any, params: Sequence[Any]) -> tuple[Any, Any]:
    """The states at ts and the counts, as of Solve."""
    notes = Notes()
    starts, sizes, index, share, counts = Plan.apply(
        problem, notes, scales, *(x.detach() for x in (ts, y0, *params))
    )
    methods = notes.methods
    replay, moving, times = Replay(problem.system, methods), tracked(ts), ts.to(y0)
    y, t = y0, times[0]
    if moving:  # the steps start where they did
        y, t = flowed(problem.system, t, y, t.detach() - t, params), t.detach()
    slope = problem.system(t, y, *params)
    places = numbered(notes.index, len(methods))
    direct = problem.options.adjoint == "direct"
    length = len(methods) if direct else isqrt(len(methods)) + 1
    ys: list[Any] = [y0, *[torch.zeros_like(y0)] * (len(ts) - 1)]
    for first in range(0, len(methods), length):
        here = places[first : first + length]
        own = sorted({j for step in here for j, _ in step})
        run: Any = partial(replay.steps, first, here, own)
        run = run if direct else partial(checkpoint, run)
        part = slice(first, first + length)
        y, slope, found = run(y, slope, starts[part], sizes[part], index, share, list(params))
        for j, x in zip(own, found, strict=True):  # of each example in one of the parts
            ys[j] = ys[j] + x
    if moving:
        later = zip(times[1:], ys[1:], strict=True)
        ys = [y0, *(flowed(problem.system, t.detach(), y, t - t.detach(), params) for t, y in later)]
    return torch.stack(ys), counts


def numbered(index: np.ndarray, count: int) -> list[list[tuple[int, bool]]]:
    """Of each step the numbers of the times in it, in any example, and whether in every one."""
    places: list[list[tuple[int, bool]]] = [[] for _ in range(count)]
    for j in range(1, index.shape[1]):
        for k in np.unique(index[:, j]):
            places[k].append((j, bool((index[:, j] == k).all())))
    return places
