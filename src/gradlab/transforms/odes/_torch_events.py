"""The solution until an event: its time without derivatives, which Newton's corrections to it then give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from gradlab.transforms.odes._torch_passes import solve
from gradlab.transforms.odes._torch_replay import flowed, states
from gradlab.transforms.odes._torch_rules import fold, unfold
from gradlab.transforms.odes._torch_systems import Problem

ORDERS = 4  # of the derivatives that are right: one a correction


class Find(torch.autograd.Function):
    """When each example meets the event, or infinity."""

    @staticmethod
    def forward(problem: Problem, event: Any, scales: Any, ts: Any, y0: Any, *params: Any) -> Any:
        found = solve(problem, scales, ts, y0, params, False, event).events
        out = torch.from_numpy(found).to(ts)
        return out if problem.batch is not None else out[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, problem: Problem, event: Any, *tensors: Any) -> Any:
        folded, given = fold(problem, info.batch_size, in_dims[2:], tensors, 3)
        return unfold(problem, info.batch_size, Find.apply(folded, event, *given)), 0


def until(
    problem: Problem,
    event: Callable[..., Any],
    scales: Any,
    ts: Any,
    y0: Any,
    params: Sequence[Any],
    record: bool,
) -> tuple[Any, Any, Any]:
    """The states at ts and the counts, as of Solve, and the time of the event."""
    held = [x.detach() for x in (ts, y0, *params)]
    found = Find.apply(problem, event, scales, *held)
    happened = found.isfinite()
    end = torch.where(happened, found, held[0][-1])
    later = (held[0] - end) * (held[0][-1] - held[0][0]).sign() > 0
    times = torch.cat([torch.where(later, end, ts), end[None]])
    ys, counts = states(replace(problem, repeats=True), record, scales, times, y0, params)
    value = partial(problem.system.value, event)
    start, end = torch.where(happened, ys[-1], y0), end.to(y0)
    by_time, by_state = torch.func.grad(value, (0, 1))(end, start.detach(), *held[2:])
    rate = by_time + by_state @ problem.system(end, start.detach(), *held[2:])
    rate, time, here = torch.where(happened, rate, 1.0).detach(), end, start
    for _ in range(ORDERS):
        time = time - value(time, here, *params) / rate
        here = flowed(problem.system, end, start, time - end, params)
    ys = torch.where(later[:, None], here, ys[:-1])
    return ys, counts, torch.where(happened, time, torch.inf)
