from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._C._functorch import is_functorch_wrapped_tensor

from gradlab._errors import InputError, KindError, StrategyError
from gradlab.transforms.custom_rules._torch_levels import (
    base,
    closed_over,
    innermost,
    tracked,
    transforming,
)
from gradlab.transforms.implicit_functions._torch_levels import Seen
from gradlab.transforms.odes._torch_compiled import Bound, traced
from gradlab.transforms.odes._torch_events import until
from gradlab.transforms.odes._torch_replay import states
from gradlab.transforms.odes._torch_rules import direction, tangent, warn
from gradlab.transforms.odes._torch_systems import UNFOLLOWED, Equation, Problem
from gradlab.transforms.odes.options import Adjoint, Method, Options, Solution, check_equation
from gradlab.transforms.repairs._torch import Level, Repair, repaired, unseen
from gradlab.transforms.trees._torch import Tree, as_tensors, flatten, unflatten


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
    compile: bool = False,
) -> Solution:
    """Two autograd.Functions that are each other's derivatives, of the system and of those of its tangents."""
    options = Options(
        method, adjoint, rtol, atol, step_size, 100_000 if max_steps is None else max_steps, throw
    )
    if compile and options.tableau.implicit:
        raise InputError(
            f"odeint: compile=True compiles the steps of explicit methods, and {method} is implicit; pass "
            "compile=False, or method='tsit5'"
        )
    tree = Tree("odeint", "y0", y0)
    if torch.is_autocast_enabled(tree.leaves[0].device.type):
        raise StrategyError(
            "odeint: torch.autocast around it would round the steps to sixteen bits as well, and end before the "
            "backward pass; use it inside f, and return a tree of y0's dtype"
        )
    check_equation(f, tree)
    ts = times(ts, tree)
    leaves, spec = flatten(tuple(as_tensors(args)))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    bare = all(isinstance(x, torch.Tensor) for x in args)
    tensors = [leaves[i] for i in places]

    def put(tensors: Any) -> Any:
        if bare:
            return tensors
        filled = list(leaves)
        for i, x in zip(places, tensors, strict=True):
            filled[i] = x
        return unflatten(spec, filled)

    y = tree.ravel(tree.leaves)
    equation = Equation(f, form(tree), put, [])
    if transforming() or gradient_error:
        look_at(equation, event, ts, y, tensors)
    elif compile:
        trace(equation, event, ts, y, tensors)
    elif torch.is_grad_enabled():  # else no derivative can be taken
        look_recorded(equation, event, ts, y, tensors)
    params = [*tensors, *equation.closed]
    problem = Problem(equation, options, (False,) * len(params), equation.closed)
    if innermost([ts, y, *params]) == "forward":
        options.refuse_mode("forward")
    record = torch.is_grad_enabled() and any(x.requires_grad for x in (ts, y, *params))
    scales = torch.ones(1, dtype=y.dtype, device=y.device)
    if event is None:
        (ys, info), time = states(problem, record, scales, ts, y, params), None
    else:
        ys, info, time = until(problem, event, scales, ts, y, params, record)
    equation.first = None
    stats = {"evaluations": info[0], "accepted": info[1], "rejected": info[2]}
    error = discrepancy(problem, scales, ts, y, params) if gradient_error else None
    return Solution(tree.put(tree.split(ys)), stats, info[3], error, time)


def discrepancy(problem: Problem, scales: Any, ts: Any, y: Any, params: list[Any]) -> Any:
    """How far cotangents, by the adjoint asked for, are from the tangent along a random direction, of their sizes."""
    options = problem.options
    both = (
        replace(problem, options=replace(options, adjoint="auto"))
        if options.adjoint == "forward"
        else problem
    )
    ts, *xs = (x.detach() for x in (ts, y, *params))
    vs = [direction(x, i) * torch.where(x == 0, 1.0, x.abs()) for i, x in enumerate(xs)]
    pulled: Any = torch.func.vjp(lambda *xs: states(both, True, scales, ts, xs[0], xs[1:])[0], *xs)
    u = direction(pulled[0], len(xs))
    moved = tangent(problem, scales, (ts, *xs), [None, *vs])[1]
    back = sum((g * v).sum() for g, v in zip(pulled[1](u), vs, strict=True))
    size = torch.linalg.vector_norm
    error = (((back - (u * moved).sum()).abs()) / (size(u) * size(moved))).detach()
    asked = options.tolerance(torch.finfo(y.dtype).eps).rtol
    largest = float(base(error).max())
    if largest > 100 * asked:
        warn(options, largest)
    return error


def form(tree: Tree) -> Tree:
    """A tree of the same form without its numbers, which may be those of a transform."""
    kind = lambda x: {"dtype": x.dtype, "device": x.device}
    plain = [torch.empty_strided(x.shape, (0,) * x.ndim, **kind(x)) for x in tree.leaves]
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


def trace(equation: Equation, event: Any, ts: Any, y: Any, tensors: list[Any]) -> None:
    """Find the graph that f is now, and the tensors that it closes over; look at it if it is new."""
    program, given = traced(equation, ts[0].to(y.dtype), y, equation.put(tensors))
    if event is not None or not program.looked:
        f = equation.f
        look_recorded(equation, event, ts, y, tensors)
        program.looked, program.repaired = True, equation.f is not f
    else:
        equation.closed += [x for x in given if x.requires_grad and not any(x is a for a in tensors)]
        equation.f = repaired(equation.f) if program.repaired else equation.f
    params = [*tensors, *equation.closed]
    equation.bound = Bound(program, [next((i for i, p in enumerate(params) if p is x), x) for x in given])


_plain: WeakKeyDictionary[Any, Any] = (
    WeakKeyDictionary()
)  # what the graphs were of functions that were looked at


def look_recorded(equation: Equation, event: Any, ts: Any, y: Any, tensors: list[Any]) -> None:
    """The same in plain eager code, where the graph that f leaves shows whatever was missed; it is the first slope.

    A function that was looked at, and leaves the same graph, needs no modes around it again.
    """
    t, repair, given = ts[0].detach().to(y.dtype), Repair(Level.ALL), [x.detach() for x in tensors]
    before, f = known(equation.f) if event is None else None, equation.f
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        state = leaf.view_as(leaf)
        begin = state.grad_fn._sequence_nr()
        old = lambda x: x.requires_grad and (x.grad_fn is None or x.grad_fn._sequence_nr() < begin)
        held = {id(x): x for x in closed_over([f, event]) if old(x)}
        if before is not None:
            slope = equation(t, state, *given)
            kinds, used, older = survey(slope, begin)
            if kinds == before and not older:
                equation.closed += ({id(x): x for x in used if x is not leaf} | held).values()
                equation.first = leaf, slope
                return
        with Seen([t, leaf, state, *given]) as seen, repair:
            slope = equation(t, state, *given)
            if event is not None:
                equation.value(event, t, state, *given)
    own = {id(x): x for x in seen.closed if old(x)}
    equation.closed += (own | held).values()
    inner = [x for x in map(base, seen.wrapped) if old(x)]
    kinds, used, older = survey(slope, begin)
    starts = [x.grad_fn for x in own.values()]
    if (
        any(id(x) in own or id(x) not in seen.known for x in inner)
        or any(x is not leaf and id(x) not in own for x in used)
        or any(not any(node is start for start in starts) for node in older)
    ):
        raise StrategyError(UNFOLLOWED)
    if repair.names:
        equation.f = repaired(f)
        return
    equation.first = leaf, slope
    with suppress(TypeError):  # of an f that no weak reference can be made to
        _plain[f] = kinds


def known(f: Any) -> Any:
    """The graph that a function left when it was looked at."""
    with suppress(TypeError):
        return _plain.get(f)
    return None


def survey(slope: Any, begin: int) -> tuple[list[Any], list[Any], list[Any]]:
    """What a graph is made of from its node number `begin` on: the kinds of its nodes, its ends, and older nodes."""
    nodes = [slope.grad_fn] if slope.grad_fn is not None else []
    seen, kinds, ends, older = set(nodes), [], [], []
    for node in nodes:  # grows meanwhile
        kinds.append(type(node))
        variable = getattr(node, "variable", None)
        if variable is not None:
            ends.append(variable)
        elif node._sequence_nr() < begin:
            older.append(node)
        else:
            for other, _ in node.next_functions:
                if other is not None and other not in seen:
                    seen.add(other)
                    nodes.append(other)
    return kinds, ends, older


def look_at(equation: Equation, event: Any, ts: Any, y: Any, tensors: list[Any]) -> None:
    """Run f once: for the tensors that it closes over, for faulty operations, and for what it returns."""
    t, repair = ts[0].detach().to(y.dtype), Repair(Level.ALL)
    given, y = [x.detach() for x in tensors], y.detach()
    with unseen(torch.no_grad()), Seen([t, y, *given]) as seen, repair:
        equation(t, y, *given)
        if event is not None:
            equation.value(event, t, y, *given)
    if repair.names:
        equation.f = repaired(equation.f)
    closed = {id(x): x for x in [*seen.closed, *closed_over([equation.f, event])]}
    equation.closed += [x for x in closed.values() if is_functorch_wrapped_tensor(x) or tracked(x)]
    if any(map(tracked, equation.closed)) or torch.is_grad_enabled():
        with torch.enable_grad():
            slope = equation(t, y, *given, *(x.detach() for x in equation.closed))
        if tracked(slope):
            raise StrategyError(UNFOLLOWED)
