from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils import _pytree as pytree

from gradlab._errors import InputError, KindError, StrategyError
from gradlab.transforms.custom_rules._torch_levels import closed_over, innermost, tracked
from gradlab.transforms.implicit_functions._torch_levels import Seen
from gradlab.transforms.odes._torch_replay import replayed
from gradlab.transforms.odes._torch_rules import Solve
from gradlab.transforms.odes._torch_systems import UNFOLLOWED, Equation, Problem
from gradlab.transforms.odes.options import Adjoint, Method, Options, Solution, check_equation
from gradlab.transforms.repairs._torch import Level, Repair, repaired
from gradlab.transforms.trees._torch import Tree, as_tensors


@torch.compiler.disable  # the number of steps depends on the numbers
def odeint(
    f: Callable[..., Any],
    y0: Any,
    ts: Any,
    *args: Any,
    method: Method = "tsit5",
    adjoint: Adjoint = "auto",
    rtol: float | None = None,
    atol: float | None = None,
    step_size: float | None = None,
    max_steps: int | None = None,
    throw: bool = True,
    gradient_error: bool = False,
    event: Callable[..., Any] | None = None,
) -> Solution:
    """Two autograd.Functions that are each other's derivatives, of the system and of those of its tangents."""
    options = Options(
        method, adjoint, rtol, atol, step_size, 100_000 if max_steps is None else max_steps, throw
    )
    if gradient_error or event is not None:
        raise InputError("odeint: not there yet in this framework")
    tree = Tree("odeint", "y0", y0)
    check_equation(f, tree)
    ts = times(ts, tree)
    leaves, spec = pytree.tree_flatten(tuple(as_tensors(args)))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    tensors = [leaves[i] for i in places]

    def put(tensors: Any) -> Any:
        filled = list(leaves)
        for i, x in zip(places, tensors, strict=True):
            filled[i] = x
        return pytree.tree_unflatten(filled, spec)

    y = tree.ravel(tree.leaves)
    equation = Equation(f, form(tree), put, [])
    look_at(equation, ts, y, tensors)
    params = [*tensors, *equation.closed]
    problem = Problem(equation, options, (False,) * len(params), equation.closed)
    if innermost([ts, y, *params]) == "forward":
        options.refuse_mode("forward")
    record = torch.is_grad_enabled() and any(x.requires_grad for x in (ts, y, *params))
    scales = torch.ones(1, dtype=y.dtype, device=y.device)
    if adjoint in ("direct", "checkpoint") and len(ts) > 1:
        ys, info = replayed(problem, scales, ts, y, params)
    else:
        ys, info = Solve.apply(problem, record, scales, ts, y, *params)
    stats = {"evaluations": info[0], "accepted": info[1], "rejected": info[2]}
    return Solution(tree.put(tree.split(ys)), stats, info[3])


def form(tree: Tree) -> Tree:
    """A tree of the same form without its numbers, which may be those of a transform."""
    plain = [torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape) for x in tree.leaves]
    return Tree("odeint", "y0", tree.put(plain))


def times(ts: Any, tree: Tree) -> Any:
    """The times as one vector of floats."""
    if not isinstance(ts, torch.Tensor):
        ts = torch.as_tensor(ts, dtype=torch.float64)
    if ts.ndim != 1 or len(ts) < 1:
        raise KindError(
            f"odeint: ts has shape {tuple(ts.shape)}; pass a vector of times, the first being that of y0"
        )
    if ts.is_complex() or ts.dtype == torch.bool:
        raise KindError(f"odeint: ts is of {ts.dtype}; pass times as floats")
    return (ts if ts.is_floating_point() else ts.to(torch.float64)).to(tree.leaves[0].device)


def look_at(equation: Equation, ts: Any, y: Any, tensors: list[Any]) -> None:
    """Run f once: for the tensors that it closes over, for faulty operations, and for what it returns."""
    t, repair = ts[0].detach().to(y.dtype), Repair(Level.ALL)
    given, y = [x.detach() for x in tensors], y.detach()
    with torch.no_grad(), Seen([t, y, *given]) as seen, repair:
        equation(t, y, *given)
    if repair.names:
        equation.f = repaired(equation.f)
    closed = {id(x): x for x in [*seen.closed, *closed_over(equation.f)]}
    equation.closed += [x for x in closed.values() if is_functorch_wrapped_tensor(x) or tracked(x)]
    if any(map(tracked, equation.closed)) or torch.is_grad_enabled():
        with torch.enable_grad():
            slope = equation(t, y, *given, *(x.detach() for x in equation.closed))
        if tracked(slope):
            raise StrategyError(UNFOLLOWED)
