"""Solve and Adjoint, whose derivatives are Solve and Adjoint of the system's tangent, to every order.

With S[f] the solution at ts as a function of p = (ts, y0, params), T S its tangent, and A[f](p, u) = (∂S/∂p)ᵀ u:
T S[f] is the second half of S[T f] (and slopes at ts); A comes from integrating backwards, with y from the
polynomials of the forward steps; T A(p, u) along (dp, du) is the pullback of p ↦ (S, T S(p, dp)) at (du, u); and
the pullback of A at w is (that of p ↦ T S(p, w) at u, T S(p, w)), as second derivatives are symmetric.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from gradlab._errors import GradientWarning
from gradlab.transforms.custom_rules._torch_levels import transforming, without_tangents
from gradlab.transforms.linearised._torch import materialised
from gradlab.transforms.odes._torch_passes import pull, solve
from gradlab.transforms.odes._torch_systems import Problem


class Solve(torch.autograd.Function):
    """S: the states (T, n) at ts, and how many evaluations, steps and rejections they took, with the status."""

    @staticmethod
    def forward(problem: Problem, record: bool, scales: Any, ts: Any, y0: Any, *params: Any) -> Any:
        solved = solve(problem, scales, ts, y0, params, record)
        problem.latest = solved if record else None
        info = counted(solved).to(y0.device)
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
        ctx.problem.options.refuse_mode("reverse")
        scales, ts, y0, *params = map(ctx.problem.own, ctx.saved_tensors)
        wanted = tuple(i for i, need in enumerate(ctx.needs_input_grad[5:]) if need)
        timed = ctx.needs_input_grad[3]
        out = applied(Adjoint, ctx.problem, ctx.latest, timed, wanted, scales, us, ts, y0, *params)
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
        out, suspect = pull(problem, solved, timed, wanted, scales, us, ts, params)
        if suspect:
            confirm(problem, scales, us, (ts, y0, *params), out[1] - us[..., 0, :])
        return out

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


def applied(function: Any, *args: Any) -> Any:
    """function.apply(*args), which torch precedes by a look at its signature that only transforms have need of."""
    if transforming():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(args))


def counted(solved: Any) -> Any:
    """Evaluations, steps and rejections, and the status, of each example."""
    columns = solved.evaluations, solved.steps, solved.rejected, solved.status
    counts = np.empty((len(solved.status), len(columns)), np.int64)
    for i, column in enumerate(columns):
        counts[:, i] = column
    return torch.from_numpy(counts)


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


def confirm(problem: Problem, scales: Any, us: Any, primals: Sequence[Any], a: Any) -> None:
    """A warning, where the cotangent of y0 disagrees with the tangent along some direction by 100 times the tolerances.

    So a jump of f in t, at which a · f jumps as well, is no reason for one.
    """
    v = direction(primals[1])
    us = us.clone()
    us[..., 0, :] = 0
    along = us * tangent(problem, scales, primals, [None, v, *[None] * (len(primals) - 2)])[1]
    off = (along.sum((-1, -2)) - (a * v).sum(-1)).abs()
    asked = problem.options.tolerance(torch.finfo(us.dtype).eps)
    sizes = along.abs().sum((-1, -2)) + (a * v).abs().sum(-1)
    allowed = asked.rtol * sizes + asked.atol * us.abs().amax((-1, -2)) * v.abs().sum(-1)
    if bool((off > 100 * allowed).any()):
        warn(problem.options, float((off / sizes).nan_to_num(torch.inf).max()))


def warn(options: Any, error: float) -> None:
    """That the gradient is not known to the tolerances."""
    warnings.warn(options.unresolved(error), GradientWarning, stacklevel=2)


def direction(x: Any, seed: int = 0) -> Any:
    """A random one, the same each time."""
    return torch.from_numpy(np.array(np.random.default_rng(seed).standard_normal(tuple(x.shape)))).to(x)


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
