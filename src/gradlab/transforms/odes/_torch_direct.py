"""The recorded steps of an explicit method pulled back, stage by stage: `adjoint="direct"` in plain eager code.

With Dₗ = (∂f/∂y)ᵀ gₗ at stage l, the cotangent of its slope is gᵢ = h Σₗ aₗᵢ Dₗ beside what comes from the polynomial
and from the next step, and that of the state before the step Σₗ Dₗ. Only the evaluations of f are recorded; of compiled
steps their slopes, by which f is evaluated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import _engine_run_backward

from gradlab.transforms.odes._torch_passes import lifted, lost, on_host, solve
from gradlab.transforms.odes._torch_rules import counted
from gradlab.transforms.odes._torch_stages import weights
from gradlab.transforms.odes._torch_systems import Problem
from gradlab.transforms.odes._torch_trajectory import Trajectory


class Tape(Trajectory):
    """The steps kept, with the graph of f at each of their stages."""

    def __init__(self, problem: Problem, params: Sequence[Any]):
        super().__init__(whole=False)
        self.wanted = [i for i, p in enumerate(params) if p.requires_grad]
        xs, self.leaves, _ = lifted(problem, params, self.wanted)
        self.rates, self.tableau = problem.field(xs), problem.options.tableau
        self.latest: Any = []
        args = len(params) - len(problem.closed)
        self.first: Any = None if any(i < args for i in self.wanted) else problem.system.first
        self.steps: list[Any] = []

    def slopes(self, _: Any, t: Any, y: Any) -> tuple[Any, Any]:
        """f, recorded."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            slope = self.rates(t, y)
        self.latest.append((y, slope))
        return slope.detach(), None

    def ahead(self, _: Any) -> None:
        """A step begins."""
        if self.first is None:
            self.first = self.latest[0]
        self.latest = []

    def add(self, start: Any, end: Any, y: Any, polynomial: Any) -> None:
        """As of a trajectory."""
        super().add(start, end, y, polynomial)
        self.steps.append(self.latest)

    def clear(self, u: Any) -> None:
        """Nothing is pulled back yet: a graph that is kept may be so more than once."""
        self.total = [torch.zeros_like(p) for p in self.leaves]
        self.D = u.new_zeros(self.tableau.stages, len(u))

    def back(self, k: int, h: float, own: Any, moved: Any, slope: Any) -> tuple[Any, Any]:
        """Cotangents of the state and the slope at the start of step k, from those at its end and of its slopes."""
        last, D, columns, rows = self.tableau.stages - 1, self.D, self.D.T, self.D.unbind()
        a = (weights(self.tableau, moved.dtype, moved.device).back * h).unbind()  # 0 for the stages before
        rows[last].copy_(moved)
        for i in range(last, -1, -1):
            g = slope if i == last else torch.mv(columns, a[i])
            if own is not None:
                g = own[i] if g is None else g + own[i]
            if i == last and g is not None:
                rows[i].add_(self.pull(self.steps[k][i - 1], g))
            elif 0 < i < last:
                rows[i].copy_(self.pull(self.steps[k][i - 1], g))
        return D[1:].sum(0), g

    def pull(self, stage: Any, u: Any) -> Any:
        """The cotangent of a stage's state (n,), from that of its slope; those of the parameters are added up."""
        y, slope = stage
        if not slope.requires_grad:
            return torch.zeros_like(u)
        back = _engine_run_backward(
            (slope,), (u.view(slope.shape),), True, False, (y, *self.leaves), True, accumulate_grad=False
        )
        pairs = [(x, g) for x, g in zip(self.total, back[1:], strict=True) if g is not None]
        if pairs:
            torch._foreach_add_(*zip(*pairs, strict=True))
        return torch.zeros_like(u) if back[0] is None else back[0].reshape(-1)

    def begin(self, slope: Any, _: float) -> Any:
        """The cotangent of y0 from that of the first slope."""
        return self.pull(self.first, slope)

    def grads(self) -> list[Any]:
        """The cotangents of the parameters."""
        return self.total


class Compiled(Trajectory):
    """The same of compiled steps."""

    def __init__(self, problem: Problem, params: Sequence[Any]):
        super().__init__(whole=False)
        self.wanted = [i for i, p in enumerate(params) if p.requires_grad]
        self.leaves, self.tableau = [params[i] for i in self.wanted], problem.options.tableau
        self.pull_step, self.pull_first = problem.bound.recorded(params, self.wanted)
        self.latest: Any = None
        self.steps: list[Any] = []

    def clear(self, u: Any) -> None:
        """As of Tape."""
        self.total = u.new_zeros(sum(p.numel() for p in self.leaves))
        self.nothing = u.new_zeros(self.tableau.stages, len(u))  # of the slopes of a step

    def note(self, slopes: Any) -> None:
        """Those of the latest step."""
        self.latest = slopes

    def add(self, start: Any, end: Any, y: Any, polynomial: Any) -> None:
        """As of a trajectory."""
        super().add(start, end, y, polynomial)
        self.steps.append((y.view(-1), self.latest))

    def back(self, k: int, h: float, own: Any, moved: Any, slope: Any) -> tuple[Any, Any]:
        """As of Tape."""
        y, slopes = self.steps[k]
        slope = self.nothing[0] if slope is None else slope
        own = self.nothing if own is None else own
        at = torch.tensor([self.starts[k][0], h], dtype=y.dtype, device=y.device)
        moved, slope, total = self.pull_step(self.tableau, moved, slope, own, y, slopes, at)
        self.total = self.total + total
        return moved, slope

    def begin(self, slope: Any, t: float) -> Any:
        """As of Tape."""
        y = self.steps[0][0]
        moved, total = self.pull_first(-slope, torch.tensor(t, dtype=y.dtype, device=y.device), y)
        self.total = self.total + total
        return moved

    def grads(self) -> list[Any]:
        """As of Tape."""
        parts = self.total.split_with_sizes([p.numel() for p in self.leaves]) if self.leaves else ()
        return [g.view(p.shape) for g, p in zip(parts, self.leaves, strict=True)]


class Direct(torch.autograd.Function):
    """The states at ts and the counts, as of Solve, outside of every transform."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, again: Any, scales: Any, ts: Any, y0: Any, *params: Any) -> Any:
        tape = Tape if problem.bound is None else Compiled
        ctx.tape, ctx.problem, ctx.again = tape(problem, params), problem, again
        solved = solve(problem, scales, ts, y0, params, ctx.tape)
        ctx.partly = solved.ys if solved.status.any() else None
        info = counted(solved).to(y0.device)[0]
        ctx.mark_non_differentiable(info)
        ctx.save_for_backward(scales, ts, y0, *params)
        return solved.ys[0], info

    @staticmethod
    def backward(ctx: Any, us: Any, _: Any) -> Any:
        scales, ts, y0, *params = ctx.saved_tensors
        params = [ctx.problem.own(p) for p in params]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[4:]) if need]
        if torch.is_grad_enabled():
            xs = [(y0, *params)[i] for i in wanted]
            ys, _ = ctx.again(ctx.problem, scales, ts, y0, params)
            grads = torch.autograd.grad(ys, xs, us, create_graph=True, materialize_grads=True)
        elif ctx.partly is not None and lost(ctx.partly, us[None]):
            grads = tuple(torch.full_like((y0, *params)[i], torch.nan) for i in wanted)
        else:
            us = us if ctx.partly is None else torch.where(ctx.partly[0].isnan(), 0.0, us)
            moved, total = pulled(ctx.tape, ts, us)
            found = dict(zip((i + 1 for i in ctx.tape.wanted), total, strict=True)) | {0: moved}
            grads = tuple(found[i] for i in wanted)
        out: list[Any] = [None] * (1 + len(params))
        for i, g in zip(wanted, grads, strict=True):
            out[i] = g
        return None, None, None, None, *out


def pulled(tape: Tape | Compiled, ts: Any, us: Any) -> tuple[Any, list[Any]]:
    """Cotangents of y0 and of the parameters, from those (T, n) of the states."""
    tape.clear(us[0])
    if not tape.steps:
        return us.sum(0), tape.grads()
    times, last, dense = on_host(ts, 1)[0], len(tape.steps), np.array(tape.tableau.dense)
    index = np.minimum(np.searchsorted(tape.knots[0], tape.direction[0] * times), last - 1)
    moved, slope = torch.zeros_like(us[0]), None
    for k in range(last - 1, -1, -1):
        start, end = tape.starts[k][0], tape.ends[k][0]
        own, before = None, 0.0
        for j in np.flatnonzero(index == k):
            if times[j] == end:
                moved = moved + us[j]
            elif j > 0:
                share = (times[j] - start) / (end - start)
                row = (end - start) * np.power(share, np.arange(1, len(dense) + 1)) @ dense
                own = torch.outer(torch.from_numpy(row).to(us), us[j]) + (0.0 if own is None else own)
                before = before + us[j]
        moved, slope = tape.back(k, end - start, own, moved, slope)
        moved = moved + before
    moved = moved + us[0] if slope is None else moved + us[0] + tape.begin(slope, times[0])
    return moved, tape.grads()
