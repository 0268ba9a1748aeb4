"""Solve and Adjoint, whose derivatives are Solve and Adjoint of the system's tangent, to every order.

With S[f] the solution at ts as a function of p = (ts, y0, params), T S its tangent, and A[f](p, u) = (∂S/∂p)ᵀ u:
T S[f] is the second half of S[T f] (and slopes at ts); A comes from integrating backwards, with y from the
polynomials of the forward steps; T A(p, u) along (dp, du) is the pullback of p ↦ (S, T S(p, dp)) at (du, u); and
the pullback of A at w is (that of p ↦ T S(p, w) at u, T S(p, w)), as second derivatives are symmetric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from gradlab._errors import ConvergenceError, InputError
from gradlab.transforms.custom_rules._torch_levels import without_tangents
from gradlab.transforms.linearised._torch import materialised
from gradlab.transforms.odes._torch_stages import Field, jacobians
from gradlab.transforms.odes._torch_steps import integrate
from gradlab.transforms.odes._torch_systems import Problem
from gradlab.transforms.odes._torch_trajectory import Solved
from gradlab.transforms.odes.options import Status, Tolerance


class Solve(torch.autograd.Function):
    """S: the states (T, n) at ts, and how many evaluations, steps and rejections they took, with the status."""

    @staticmethod
    def forward(problem: Problem, record: bool, scales: Any, ts: Any, y0: Any, *params: Any) -> Any:
        solved = solve(problem, scales, ts, y0, params, record)
        problem.latest = solved if record else None
        counts = [
            np.full_like(solved.status, solved.evaluations),
            solved.steps,
            solved.rejected,
            solved.status,
        ]
        info = torch.from_numpy(np.stack(counts, -1)).to(y0.device)
        return (solved.ys, info) if problem.batch is not None else (solved.ys[0], info[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.problem, _, *tensors = inputs
        ctx.latest, ctx.problem.latest = ctx.problem.latest, None
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, us: Any, _: Any) -> Any:
        scales, ts, y0, *params = map(ctx.problem.own, ctx.saved_tensors)
        wanted = tuple(i for i, need in enumerate(ctx.needs_input_grad[5:]) if need)
        timed = ctx.needs_input_grad[3]
        out = Adjoint.apply(ctx.problem, ctx.latest, timed, wanted, scales, us, ts, y0, *params)
        grads: list[Any] = [None] * len(params)
        for i, g in zip(wanted, out[2:], strict=True):
            grads[i] = g
        return None, None, None, out[0] if timed else None, out[1], *grads

    @staticmethod
    def jvp(ctx: Any, _problem: Any, _record: Any, _scales: Any, dts: Any, dy0: Any, *dparams: Any) -> Any:
        """With forward mode switched on, which torch switches off here: a silent 0 in nests (pytorch#197867)."""
        with _set_fwd_grad_enabled(True):
            scales, ts, y0, *params = without_tangents(ctx.saved_tensors)
            moved = [None if d is None else materialised(d) for d in (dts, dy0, *dparams)]
            return tangent(ctx.problem, scales, (ts, y0, *params), moved)[1], None

    @staticmethod
    def vmap(info: Any, in_dims: Any, problem: Problem, record: bool, *tensors: Any) -> Any:
        folded, given = fold(problem, info.batch_size, in_dims[2:], tensors, 3)
        ys, counts = Solve.apply(folded, record, *given)
        return (unfold(problem, info.batch_size, ys), unfold(problem, info.batch_size, counts)), (0, 0)


class Adjoint(torch.autograd.Function):
    """A: cotangents of ts (where `timed`), of y0 and of the params wanted."""

    @staticmethod
    def forward(
        problem: Problem,
        solved: Any,
        timed: bool,
        wanted: Any,
        scales: Any,
        us: Any,
        ts: Any,
        y0: Any,
        *params: Any,
    ) -> Any:
        solved = solved or solve(problem, scales, ts, y0, params, True)
        return pull(problem, solved, timed, wanted, scales, us, ts, params)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.problem, _, ctx.timed, ctx.wanted, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *ws: Any) -> Any:
        scales, us, *primals = ctx.saved_tensors
        moved: list[Any] = [None] * len(primals)
        moved[0], moved[1] = ws[0] if ctx.timed else None, ws[1]
        for i, w in zip(ctx.wanted, ws[2:], strict=True):
            moved[2 + i] = w
        needs = [i for i, need in enumerate(ctx.needs_input_grad[6:]) if need]

        def pushed(*some: Any) -> Any:
            return tangent(ctx.problem, scales, put(primals, needs, some), moved)[1]

        pulled: Any = torch.func.vjp(pushed, *(primals[i] for i in needs))
        value, pullback = pulled
        grads = put([None] * len(primals), needs, pullback(us))
        return None, None, None, None, None, value, *grads

    @staticmethod
    def jvp(ctx: Any, _p: Any, _s: Any, _t: Any, _w: Any, _scales: Any, dus: Any, *moved: Any) -> Any:
        """As of Solve."""
        with _set_fwd_grad_enabled(True):
            scales, us, *primals = without_tangents(ctx.saved_tensors)
            moved = tuple(None if d is None else materialised(d) for d in moved)
            asked = [*([0] if ctx.timed else []), 1, *(2 + i for i in ctx.wanted)]
            dus = torch.zeros_like(us) if dus is None else materialised(dus)

            def both(*some: Any) -> Any:
                return tangent(ctx.problem, scales, put(primals, asked, some), moved)

            pulled: Any = torch.func.vjp(both, *(primals[i] for i in asked))
            out = pulled[1]((dus, us))
            return out if ctx.timed else (us.new_zeros(()), *out)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, problem: Problem, _: Any, timed: bool, wanted: Any, *tensors: Any
    ) -> Any:
        size, dims, given = info.batch_size, list(in_dims[4:]), list(tensors)
        for i in [*([2] if timed else []), *(4 + i for i in wanted)]:
            if dims[i] is None:  # each example has a cotangent of its own
                dims[i], given[i] = 0, given[i].expand(size, *given[i].shape)
        folded, given = fold(problem, size, dims, given, 4)
        out = Adjoint.apply(folded, None, timed, wanted, *given)
        return split_examples(problem, folded, size, timed, wanted, out)


def put(values: Sequence[Any], places: Sequence[int], some: Sequence[Any]) -> list[Any]:
    """The values with some others in these places."""
    values = list(values)
    for i, x in zip(places, some, strict=True):
        values[i] = x
    return values


def tangent(problem: Problem, scales: Any, primals: Sequence[Any], moved: Sequence[Any]) -> tuple[Any, Any]:
    """S and T S at (ts, y0, *params) along `moved`, where None does not move."""
    (ts, y0, *params), (dts, dy0, *dparams) = primals, moved
    dy0 = torch.zeros_like(y0) if dy0 is None else dy0
    moving = [i for i, d in enumerate(dparams) if d is not None]
    if dts is not None:
        dy0 = dy0 - problem.rates(ts[..., 0], y0, params) * dts[..., :1]
    vs = [dparams[i] for i in moving]
    scale = size(problem, [y0, *(params[i] for i in moving)], [dy0, *vs], moving)
    scales = torch.cat([scales, scales * scale], -1)
    both = torch.cat([y0, dy0], -1)
    ys, s = Solve.apply(problem.tangent(moving), False, scales, ts, both, *params, *vs)[0].chunk(2, -1)
    if dts is not None:
        times = range(ts.shape[-1])
        slopes = [problem.rates(ts[..., i], ys[..., i, :], params) for i in times]
        s = s + torch.stack(slopes, -2) * dts[..., None]
    return ys, s


def size(problem: Problem, xs: Sequence[Any], vs: Sequence[Any], moving: Sequence[int]) -> Any:
    """How large a direction is, (1,) or (B, 1): the largest entry, relative where that of the point is above one."""
    total: Any = 0.0
    for x, v, i in zip(xs, vs, [-1, *moving], strict=True):
        ratio = (v / x.abs().clamp(min=1.0)).detach().abs()
        each = problem.batch is not None and (i < 0 or problem.flags[i])
        rows = ratio.reshape(len(ratio), -1) if each else ratio.reshape(1, -1)
        largest = torch.cat([rows, rows.new_zeros(len(rows), 1)], 1).amax(1, keepdim=True).to(xs[0])
        total = torch.maximum(largest, torch.zeros_like(largest) + total)
    total = torch.where(total > 0, total, 1.0)
    return total if problem.batch is not None else total[0]


def solve(problem: Problem, scales: Any, ts: Any, y0: Any, params: Sequence[Any], record: bool) -> Solved:
    """The system integrated, of plain tensors."""
    one = problem.batch is None
    y = y0.detach().reshape(problem.batch or 1, -1)
    times = checked(ts.detach().double().cpu().numpy().reshape(-1, ts.shape[-1]))
    times = np.broadcast_to(times, (len(y), times.shape[1]))

    def rates(t: Any, y: Any) -> Any:
        slope = problem.rates(t, y[0] if one else y, params)
        return slope[None] if one else slope

    field = Field(lambda _, t, y: (rates(t, y), None), lambda _, t, y: jacobians(rates, t, y))
    solved = integrate(field, times, y, tolerance(problem, scales, y, record), record)
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


def checked(ts: np.ndarray) -> np.ndarray:
    """Times that rise or fall throughout."""
    steps = np.diff(ts)
    if not np.isfinite(ts).all() or not ((steps > 0).all(1) | (steps < 0).all(1)).all():
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
    """Cotangents of ts, y0 and the params wanted: the adjoint integrated backwards from jump to jump."""
    one = problem.batch is None
    us = us.detach().reshape(problem.batch or 1, *us.shape[-2:])
    times = np.broadcast_to(
        ts.detach().double().cpu().numpy().reshape(-1, ts.shape[-1]), (len(us), ts.shape[-1])
    )
    flags, xs, leaves = list(problem.flags), [], []
    for i, p in enumerate(params):
        original = any(p is x for x in problem.closed)
        if i in wanted and not (one and original and p.requires_grad):
            p = p if one or flags[i] else p.expand(problem.batch, *p.shape)
            p, flags[i] = p.detach().requires_grad_(), flags[i] or not one
        xs.append(p if original or i in wanted else p.detach())
    leaves = [xs[i] for i in wanted]

    trajectory: Any = solved.trajectory

    def rates(t: Any, y: Any) -> Any:
        slope = problem.system.rates(t, y[0] if one else y, xs, flags)
        return slope[None] if one else slope

    def slopes(time: Any, t: Any, a: Any) -> Any:
        with torch.enable_grad():
            y = trajectory(time).requires_grad_()
            slope = rates(t, y)
            if not slope.requires_grad:
                back: Any = [torch.zeros_like(x) for x in (y, *leaves)]
            else:
                back = torch.autograd.grad(slope, (y, *leaves), -a, materialize_grads=True)
        if not leaves:
            return back[0], None
        return back[0], torch.cat([g.reshape(len(a), -1) for g in back[1:]], -1)

    def transposed(time: Any, t: Any, _: Any) -> Any:
        return -jacobians(rates, t, trajectory(time))[0].mT, None

    field = Field(slopes, transposed)
    state = lambda i: solved.ys[0, i] if one else solved.ys[:, i]
    ends = lambda i: problem.rates(torch.tensor(times[:, i]).to(us), state(i), params)
    along = tolerance_backwards(problem, scales, us)
    a, total, last, stiff = torch.zeros_like(us[:, 0]), 0.0, us.shape[1] - 1, solved.stiff
    dts = torch.zeros_like(us[..., 0])
    for i in range(last, 0, -1):
        u = us[:, i]
        if timed:
            dts[:, i] = (u * ends(i)).sum(-1)
        a = a + u
        if not bool(a.any()):
            continue
        back = integrate(field, times[:, [i, i - 1]], a, along, stiff=stiff)
        if problem.options.throw and back.status.any():
            raise failure(problem, back, times)
        a, stiff = back.ys[:, -1], back.stiff
        total = total if back.integrals is None else total + back.integrals
    if timed:
        dts[:, 0] = -(a * ends(0)).sum(-1)
    dts = dts if ts.ndim == 2 else dts.sum(0)
    dts = dts.to(ts) if timed else us.new_zeros(())
    dy0 = a + us[:, 0]
    grads = split_params(problem, wanted, params, total, one)
    return dts, (dy0[0] if one else dy0), *grads


def split_params(problem: Problem, wanted: Any, params: Any, total: Any, one: bool) -> list[Any]:
    """The integrals (B, m) as cotangents of the params wanted; of one that the examples share, their sum."""
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
        start += n
    return grads


def tolerance_backwards(problem: Problem, scales: Any, us: Any) -> Tolerance:
    """Of the adjoint, in units of the cotangent: a part of the state in units c has an adjoint in units of 1 / c."""
    parts = us.reshape(len(us), us.shape[1], problem.parts, -1).abs().amax((1, 3))  # (B, parts)
    scales = scales.reshape(-1, problem.parts).to(us)
    unit = (parts * scales).amax(1, keepdim=True)
    adjoint = torch.where(unit > 0, unit, 1.0) / scales
    each = adjoint.repeat_interleave(us.shape[2] // problem.parts, -1)
    return problem.options.tolerance(torch.finfo(us.dtype).eps, problem.parts, each, backward=True)


def fold(problem: Problem, size: int, dims: Sequence[Any], tensors: Sequence[Any], first: int) -> Any:
    """A batch of a problem as one problem of a batch, and its tensors; from number `first` on they are params."""
    old = problem.batch
    moved, flags = [], []
    for k, (x, d) in enumerate(zip(tensors, dims, strict=True)):
        kind = k - first
        shared = (
            problem.flags[kind]
            if kind >= 0
            else old is not None and (k != first - 2 or x.ndim > 1 + (d is not None))
        )
        if d is None and not shared and (kind >= 0 or k == first - 2):
            moved.append(x)
            flags.append(False)
            continue
        x = x.movedim(d, 0) if d is not None else x.expand(size, *x.shape)
        if old is not None:
            x = x if shared else x[:, None].expand(size, old, *x.shape[1:])
            x = x.reshape(size * old, *x.shape[2:])
        moved.append(x)
        flags.append(True)
    return problem.folded(size, flags[first:]), moved


def unfold(problem: Problem, size: int, x: Any) -> Any:
    """What came of a folded problem, with the new batch on the leading axis."""
    return x if problem.batch is None else x.reshape(size, problem.batch, *x.shape[1:])


def split_examples(problem: Problem, folded: Problem, size: int, timed: bool, wanted: Any, out: Any) -> Any:
    """The same of cotangents, of which those of shared tensors are sums."""
    dts, dy0, *grads = out
    flags = [problem.flags[i] for i in wanted]
    split = [unfold(problem, size, dy0)]
    for g, shared in zip(grads, flags, strict=True):
        split.append(
            unfold(problem, size, g) if shared or problem.batch is None else unfold(problem, size, g).sum(1)
        )
    if timed:
        dts = unfold(problem, size, dts)
        return (dts, *split), (0,) * (1 + len(split))
    return (dts, *split), (None, *(0,) * len(split))
