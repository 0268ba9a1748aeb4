"""The recorded steps of an explicit method pulled back, stage by stage: `adjoint="direct"` in plain eager code.

With Dₗ = (∂f/∂y)ᵀ gₗ at stage l, the cotangent of its slope is gᵢ = h Σₗ aₗᵢ Dₗ beside what comes from the polynomial
and from the next step, and that of the state before the step Σₗ Dₗ. Only the evaluations of f are recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import _engine_run_backward

from gradlab.transforms.odes._torch_passes import lifted, on_host, solve
from gradlab.transforms.odes._torch_rules import counted
from gradlab.transforms.odes._torch_stages import weights
from gradlab.transforms.odes._torch_systems import Problem
from gradlab.transforms.odes._torch_trajectory import Trajectory


class Tape(Trajectory):
    """The steps kept, with the graph of f at each of their stages."""

    def __init__(self, problem: Problem, params: Sequence[Any]):
        super().__init__(whole=False)
        wanted = [i for i, p in enumerate(params) if p.requires_grad]
        xs, self.leaves, _ = lifted(problem, params, wanted)
        self.wanted, self.rates = wanted, problem.field(xs)
        self.stages: list[Any] = []
        self.first: Any = None
        self.steps: list[list[Any]] = []

    def slopes(self, _: Any, t: Any, y: Any) -> tuple[Any, Any]:
        """f, recorded."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            slope = self.rates(t, y)
        self.stages.append((y, slope))
        return slope.detach(), None

    def ahead(self, _: Any) -> None:
        """A step begins."""
        if self.first is None:
            self.first = self.stages[0]
        self.stages = []

    def add(self, start: Any, end: Any, y: Any, polynomial: Any) -> None:
        """As of a trajectory."""
        super().add(start, end, y, polynomial)
        self.steps.append(self.stages)

    def pull(self, stage: Any, u: Any, total: list[Any]) -> Any:
        """The cotangent of a stage's state (n,), from that of its slope; those of the parameters are added up."""
        y, slope = stage
        if not slope.requires_grad:
            return torch.zeros_like(u)
        back = _engine_run_backward(
            (slope,), (u.view(slope.shape),), True, False, (y, *self.leaves), True, accumulate_grad=False
        )
        for i, g in enumerate(back[1:]):
            if g is not None:
                total[i] = g if total[i] is None else total[i] + g
        return torch.zeros_like(u) if back[0] is None else back[0].reshape(-1)


class Direct(torch.autograd.Function):
    """The states at ts and the counts, as of Solve, outside of every transform."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, again: Any, scales: Any, ts: Any, y0: Any, *params: Any) -> Any:
        ctx.tape, ctx.problem, ctx.again = Tape(problem, params), problem, again
        solved = solve(problem, scales, ts, y0, params, ctx.tape)
        info = counted(solved).to(y0.device)[0]
        ctx.mark_non_differentiable(info)
        ctx.save_for_backward(scales, ts, y0, *params)
        return solved.ys[0], info

    @staticmethod
    def backward(ctx: Any, us: Any, _: Any) -> Any:
        scales, ts, y0, *params = map(ctx.problem.own, ctx.saved_tensors)
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[4:]) if need]
        if torch.is_grad_enabled():
            xs = [(y0, *params)[i] for i in wanted]
            ys, _ = ctx.again(ctx.problem, scales, ts, y0, params)
            grads = torch.autograd.grad(ys, xs, us, create_graph=True, materialize_grads=True)
        else:
            moved, total = pulled(ctx.tape, ctx.problem.options.tableau, ts, us)
            found = dict(zip((i + 1 for i in ctx.tape.wanted), total, strict=True)) | {0: moved}
            grads = tuple(found[i] for i in wanted)
        out: list[Any] = [None] * (1 + len(params))
        for i, g in zip(wanted, grads, strict=True):
            out[i] = g
        return None, None, None, None, *out


def pulled(tape: Tape, tableau: Any, ts: Any, us: Any) -> tuple[Any, list[Any]]:
    """Cotangents of y0 and of the parameters, from those (T, n) of the states."""
    times, last = on_host(ts, 1)[0], len(tape.steps)
    index = np.minimum(np.searchsorted(tape.knots[0], tape.direction[0] * times), last - 1)
    a = weights(tableau, us.dtype, us.device).back
    moved, slope, total = torch.zeros_like(us[0]), None, [None] * len(tape.leaves)
    D = us.new_empty(tableau.stages, us.shape[1])
    for k in range(last - 1, -1, -1):
        start, h = tape.starts[k][0], tape.ends[k][0] - tape.starts[k][0]
        own: list[Any] = [None] * (tableau.stages - 1) + [slope]
        before = None
        for j in np.flatnonzero(index == k):
            if times[j] == tape.ends[k][0]:
                moved = moved + us[j]
            elif j > 0:
                share = (times[j] - start) / h
                row = np.power(share, np.arange(1, len(tableau.dense) + 1)) @ np.array(tableau.dense)
                own = [
                    h * w * us[j] if x is None else x + h * w * us[j] for w, x in zip(row, own, strict=True)
                ]
                before = us[j] if before is None else before + us[j]
        for i in range(tableau.stages - 1, -1, -1):
            g = own[i]
            if i < tableau.stages - 1:
                later, row = D[i + 1 :].T, a[i]
                g = torch.mv(later, row * h) if g is None else torch.addmv(g, later, row, alpha=h)
            if i == 0:
                slope = g
            elif g is None:
                D[i] = moved
            else:
                back = tape.pull(tape.steps[k][i - 1], g, total)
                D[i] = back + moved if i == tableau.stages - 1 else back
        moved = D[1:].sum(0) if before is None else D[1:].sum(0).add_(before)
    moved = moved + us[0] if slope is None else moved + us[0] + tape.pull(tape.first, slope, total)
    return moved, [torch.zeros_like(p) if g is None else g for p, g in zip(tape.leaves, total, strict=True)]
