"""The two integrations, of plain tensors: forwards, and of the adjoint backwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import _engine_run_backward

from gradlab._errors import ConvergenceError, InputError
from gradlab.transforms.odes._torch_stages import Field, jacobians
from gradlab.transforms.odes._torch_steps import Start, integrate
from gradlab.transforms.odes._torch_systems import Problem
from gradlab.transforms.odes._torch_trajectory import Solved, Trajectory
from gradlab.transforms.odes.options import Status, Tolerance, most_missed
from gradlab.transforms.repairs._torch import unseen


def solve(
    problem: Problem, scales: Any, ts: Any, y0: Any, params: Sequence[Any], record: Any, event: Any = None
) -> Solved:
    """The system integrated, of plain tensors."""
    one = problem.batch is None
    y = y0.detach().reshape(problem.batch or 1, -1)
    times = checked(problem, on_host(ts, len(y)))
    rates = problem.field(params)
    tape, bound = isinstance(record, Trajectory), problem.bound
    known = record if tape else problem.system
    first = getattr(known, "first", None) if one and bound is None else None
    shape = problem.system.shape if one else None
    flat = rates if shape is None else lambda t, y: rates(t, y.view(shape)).reshape(1, -1)
    field = Field(lambda _, t, y: (rates(t, y), None), lambda _, t, y: jacobians(flat, t, y), shape=shape)
    if bound is not None:
        whole = record is True or len(ts) > 2 or event is not None
        field.compiled = bound.forwards(params, whole, record.note if tape else None)
        field.begin = bound.begin(params)
    elif tape:
        field.slopes, field.ahead = record.slopes, record.ahead
    keep = record if tape or record == "steps" else record and problem.options.adjoint != "backsolve"
    along = tolerance(problem, scales, y, record is True)
    meets = None
    if event is not None:
        meets = lambda t, y: problem.system.rates(t, y[0] if one else y, params, problem.flags, event)
    start = Start(slope=None if first is None else first[1].detach().view(1, -1))
    solved = integrate(field, times, y, along, keep, event=meets, start=start)
    if problem.options.throw and solved.status.any():
        raise failure(problem, solved, times)
    return solved


def tolerance(problem: Problem, scales: Any, y: Any, recorded: bool) -> Tolerance:
    """Of a problem's state, whose parts have these scales."""
    eps = torch.finfo(y.dtype).eps
    if problem.parts == 1:
        return problem.options.tolerance(eps, recorded=recorded)
    scales = scales.reshape(-1, problem.parts).repeat_interleave(y.shape[1] // problem.parts, -1)
    return problem.options.tolerance(eps, problem.parts, scales, recorded=recorded)


def on_host(ts: Any, count: int) -> np.ndarray:
    """The times of each of so many examples, (count, T)."""
    if count == 1 and ts.ndim == 1:
        return np.array([ts.tolist()])
    times = ts.detach().double().cpu().numpy().reshape(-1, ts.shape[-1])
    return times if len(times) == count else np.broadcast_to(times, (count, times.shape[1]))


def checked(problem: Problem, ts: np.ndarray) -> np.ndarray:
    """Times that rise or fall throughout."""
    if problem.repeats:
        return ts
    before, after = ts[:, :-1], ts[:, 1:]
    sorted = (before < after).all(1) | (before > after).all(1)
    if not (sorted.all() and np.isfinite(ts).all()):
        raise InputError(
            "odeint: ts is not sorted, or holds a time twice; pass times that rise, or fall, throughout"
        )
    return ts


def failure(problem: Problem, solved: Solved, times: np.ndarray) -> ConvergenceError:
    """What is said of an integration that did not reach the last time."""
    b = int(np.flatnonzero(solved.status)[0])
    return ConvergenceError(
        problem.options.unfinished(Status(int(solved.status[b])), float(solved.t[b]), solved.y[b].tolist())
    )


def lifted(problem: Problem, params: Sequence[Any], wanted: Sequence[int]) -> tuple[Any, Any, Any]:
    """The parameters, those wanted as tensors to differentiate by; these alone; which there are of each example."""
    one, flags, xs = problem.batch is None, list(problem.flags), []
    for i, p in enumerate(params):
        original = any(p is x for x in problem.closed)
        if i in wanted and not (one and original and p.requires_grad):
            p = p if one or flags[i] else p.expand(problem.batch, *p.shape)
            p, flags[i] = p.detach().requires_grad_(), flags[i] or not one
        xs.append(p if original or i in wanted else p.detach())
    return xs, [xs[i] for i in wanted], flags


class Backward:
    """The adjoint's equation a' = -(∂f/∂y)ᵀ a beside the integrals of the params' cotangents.

    y comes from the polynomials of the forward steps, or (backsolve) is integrated as a second half of the state.
    """

    def __init__(self, problem: Problem, solved: Solved, wanted: Sequence[int], params: Sequence[Any]):
        self.problem, self.one = problem, problem.batch is None
        self.trajectory = solved.trajectory
        xs, self.leaves, flags = lifted(problem, params, wanted)
        self.rates = problem.field(xs, flags)
        self.shape = problem.system.shape if self.one else None
        self.known: dict[float, Any] = {}  # slopes of one example at times that are wanted
        ahead = self.trajectory.ahead if self.trajectory is not None else None
        self.field = Field(self.slopes, self.jacobians, ahead)
        self.timed = True  # whether f depends on t, as far as is known
        bound = problem.bound if self.trajectory is not None else None
        if bound is not None:
            compiled = bound.backwards(params, wanted, self.trajectory, self.known)
            self.timed, self.field = compiled.timed, compiled.field(self.jacobians)

    def flat(self, t: Any, y: Any) -> Any:
        """f of states (B, n)."""
        return self.rates(t, y if self.shape is None else y.view(self.shape)).reshape(y.shape)

    def split(self, time: Any, a: Any) -> tuple[Any, Any]:
        """a and y, of a state."""
        return (a, self.trajectory(time)) if self.trajectory is not None else a.chunk(2, -1)

    def slopes(self, time: Any, t: Any, state: Any) -> Any:
        """Those of the state, and the integrands: of the params, and of t if f depends on it."""
        a, y = self.split(time, state)
        with torch.enable_grad():
            y = (y if self.shape is None else y.view(self.shape)).detach().requires_grad_()
            t = t.requires_grad_() if self.timed else t
            slope = self.rates(t, y)
        inputs = (y, *self.leaves, t) if self.timed else (y, *self.leaves)
        back: Any = [None] * len(inputs)
        if slope.requires_grad:  # torch.autograd.grad, less what it looks at first
            u = torch.neg(a).view(slope.shape)
            back = _engine_run_backward((slope,), (u,), False, False, inputs, True, accumulate_grad=False)
        if self.timed and back[-1] is None:
            self.timed, inputs, back = False, inputs[:-1], back[:-1]
        back = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, back, strict=True)]
        moved = back[0].reshape(a.shape)
        if self.one and time in self.known:
            self.known[time] = slope.detach().reshape(a.shape)
        if self.trajectory is None:
            moved = torch.cat([moved, slope.detach().reshape(a.shape)], -1)
        if len(back) == 1:
            return moved, None
        rows = [g.reshape(len(a), -1) for g in back[1:]]
        return moved, rows[0] if len(rows) == 1 else torch.cat(rows, -1)

    def jacobians(self, time: Any, t: Any, state: Any) -> Any:
        """That of a, -Jᵀ; of a second half J, without how it moves the first, which comes after it in any iteration."""
        _, y = self.split(time, state)
        J, _ = jacobians(self.flat, t, y)
        if self.trajectory is not None:
            return -J.mT, None
        zeros = torch.zeros_like(J)
        return torch.cat([torch.cat([-J.mT, zeros], -1), torch.cat([zeros, J], -1)], -2), None


def pull(
    problem: Problem,
    solved: Solved,
    timed: bool,
    wanted: Sequence[int],
    scales: Any,
    us: Any,
    ts: Any,
    params: Sequence[Any],
) -> Any:
    """Cotangents of ts, y0 and the params wanted: the adjoint integrated backwards from jump to jump.

    And whether there is reason to doubt them.
    """
    one = problem.batch is None
    us = us.detach().reshape(problem.batch or 1, *us.shape[-2:])
    times = on_host(ts, len(us))
    backward = Backward(problem, solved, wanted, params)
    backsolve = backward.trajectory is None
    states = solved.ys.expand(len(us), *solved.ys.shape[1:])
    failed = torch.zeros(len(us), dtype=torch.bool, device=us.device)
    if solved.status.any():
        reached = ~states.isnan()
        failed = lost(states, us) | (backsolve & ~reached.flatten(1).all(1))
        us = torch.where(reached & ~failed[:, None, None], us, 0.0)
    backward.known = dict.fromkeys(times[0].tolist()) if one else {}

    def ends(i: int) -> Any:
        slope = backward.known.get(times[0, i])
        if slope is None:
            with unseen(torch.no_grad()):
                slope = backward.flat(torch.tensor(times[:, i]).to(us), states[:, i])
        return slope

    along = tolerance_backwards(problem, scales, us)
    check = Check(problem, us) if problem.parts == 1 else None
    if backsolve:
        along = with_state(problem, scales, states, along)
    a, total, stiff, y = torch.zeros_like(us[:, 0]), 0.0, solved.stiff, states[:, -1]
    dts, suspect, size = torch.zeros_like(us[..., 0]), False, solved.size
    for i in range(us.shape[1] - 1, 0, -1):
        u = us[:, i]
        a = a + u
        moving = bool(a.any())
        if not moving and not backsolve:
            if timed:
                dts[:, i] = (u * ends(i)).sum(-1)
            continue
        state = torch.cat([a, y], -1) if backsolve else a
        start = Start(size=size)
        back = integrate(backward.field, times[:, [i, i - 1]], state, along, stiff=stiff, start=start)
        size = back.size
        if timed or check:
            dts[:, i] = (u * ends(i)).sum(-1)
        if back.status.any():
            if problem.options.throw:
                raise failure(problem, back, times)
            failed = failed | torch.from_numpy(back.status != 0).to(us.device)
        if check:
            check.jump(back.first[:, : a.shape[1]], states[:, i])
        state, stiff = back.ys[:, -1], back.stiff
        a, y = state.chunk(2, -1) if backsolve else (state, y)
        total = total if back.integrals is None else total + back.integrals
    if backsolve:
        failed = failed | astray(problem, scales, y, states[:, 0])
    if failed.any() or solved.status.any():
        dts = torch.where((us != 0).any(-1), dts, 0.0)  # not what f is where nothing was reached
        a, dts = (torch.where(failed[:, None], torch.nan, x) for x in (a, dts))
    if timed or check:
        slope = ends(0)
        dts[:, 0] = -(a * slope).sum(-1)
        if check:
            drift = total[:, -1] if backward.timed and not isinstance(total, float) else 0.0
            suspect = check.fails(dts.sum(-1) - drift, a, slope)
    dts = dts if ts.ndim == 2 else dts.sum(0)
    dts = dts.to(ts) if timed else us.new_zeros(())
    dy0 = a + us[:, 0]
    grads = split_params(problem, wanted, params, total, failed)
    return (dts, (dy0[0] if one else dy0), *grads), suspect


def split_params(problem: Problem, wanted: Any, params: Any, total: Any, failed: Any) -> list[Any]:
    """The integrals (B, m) as cotangents of the params wanted; of one that the examples share, their sum.

    Not-a-number of the examples that failed.
    """
    grads, start = [], 0
    for i in wanted:
        p = params[i]
        each = p.shape[1:] if problem.flags[i] else p.shape
        n = each.numel()
        if isinstance(total, float):
            grads.append(torch.zeros_like(p))
        else:
            g = total[:, start : start + n]
            grads.append((g if problem.flags[i] else g.sum(0)).reshape(p.shape).to(p))
        if failed.any():
            mask = failed.view(-1, *[1] * len(each)) if problem.flags[i] else failed.any()
            grads[-1] = torch.where(mask, torch.nan, grads[-1])
        start += n
    return grads


def lost(states: Any, us: Any) -> Any:
    """The examples (B,) with cotangents of states (B, T, n) that were not reached."""
    return (states.isnan() & (us != 0)).flatten(1).any(1)


def tolerance_backwards(problem: Problem, scales: Any, us: Any) -> Tolerance:
    """Of the adjoint, in units of the cotangent: a part of the state in units c has an adjoint in units of 1 / c."""
    if problem.parts == 1:
        unit = us.abs().amax((1, 2))[:, None]
        each = torch.where(unit > 0, unit, 1.0)
        return problem.options.tolerance(torch.finfo(us.dtype).eps, 1, each, backward=True)
    parts = us.reshape(len(us), us.shape[1], problem.parts, -1).abs().amax((1, 3))  # (B, parts)
    scales = scales.reshape(-1, problem.parts).to(us)
    unit = (parts * scales).amax(1, keepdim=True)
    adjoint = torch.where(unit > 0, unit, 1.0) / scales
    each = adjoint.repeat_interleave(us.shape[2] // problem.parts, -1)
    return problem.options.tolerance(torch.finfo(us.dtype).eps, problem.parts, each, backward=True)


def with_state(problem: Problem, scales: Any, us: Any, along: Tolerance) -> Tolerance:
    """That of the adjoint with the state as a second half."""
    own = tolerance(problem, scales, us[:, 0], False)
    atol = torch.as_tensor(own.atol).to(us).expand_as(us[:, 0])
    return replace(along, atol=torch.cat([along.atol.expand_as(atol), atol], -1), parts=2 * along.parts)


def astray(problem: Problem, scales: Any, y: Any, y0: Any) -> Any:
    """The examples whose y has not come back to y0; an error if any, unless that is not asked for."""
    own = tolerance(problem, scales, y0, False)
    off = ((y - y0) / (own.atol + own.rtol * y0.abs())).square().mean(-1).sqrt()
    missed = ~(off <= most_missed(own.rtol))
    if problem.options.throw and bool(missed.any()):
        raise ConvergenceError(problem.options.astray(float(off.nan_to_num(torch.inf).max())))
    return missed


class Check:
    """Whether cotangents can be right: a · f changes by ∫ a · ∂f/∂t dt alone, as f itself is a tangent."""

    def __init__(self, problem: Problem, us: Any):
        self.asked = problem.options.tolerance(torch.finfo(us.dtype).eps)
        self.least = self.asked.atol * us.abs().amax((1, 2))
        self.allowed: Any = 0.0

    def jump(self, first: Any, y: Any) -> None:
        """How well a · f is known at a jump, from the adjoint's slope there and a state within the tolerances."""
        self.allowed = self.allowed + (first.abs() * (self.asked.rtol * y.abs() + self.asked.atol)).sum(-1)

    def fails(self, change: Any, a: Any, slope: Any) -> bool:
        """Whether the change left unexplained is more than 100 times the tolerances."""
        size = (a * slope).abs().sum(-1)
        allowed = self.allowed + self.asked.rtol * size + self.least * slope.abs().sum(-1)
        return bool((change.abs() > 100 * allowed).any())
