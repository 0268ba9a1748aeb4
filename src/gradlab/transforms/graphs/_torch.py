"""Autograd graphs of torch that are recorded once and differentiated more than once.

While f runs, its faulty operations are repaired as far as the graph that it leaves shows the need.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import _engine_run_backward
from torch.compiler import set_stance
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from gradlab._errors import InputError, StrategyError
from gradlab._typing import Function, Leaves
from gradlab.transforms.repairs._torch import (
    FAULTY,
    FAULTY_AT_SECOND,
    FIRST_IN_GRAD_MODE,
    UNREPAIRABLE,
    WITHOUT_SECOND,
    Level,
    Repair,
)

requires_grad = attrgetter("requires_grad")
_ONCE = once_differentiable(lambda ctx: None).__code__


def replayed(leaves: Leaves) -> Callable[[Callable[[], Any]], Any]:
    """Runs a function later with the random numbers of now; refuses where x has changed in place since."""
    versions = [x._version for x in leaves]
    state = torch.get_rng_state()
    devices = {x.device for x in leaves if x.device.type == "cuda"}
    states = {device: torch.cuda.get_rng_state(device) for device in devices}

    def run(function: Callable[[], Any]) -> Any:
        if versions != [x._version for x in leaves]:
            raise InputError("x has been changed in place since the operator was made; make a new operator")
        with torch.random.fork_rng([device.index for device in devices]):
            torch.set_rng_state(state)
            for device, numbers in states.items():
                torch.cuda.set_rng_state(numbers, device)
            return function()

    return run


@dataclass
class Graph:
    """A recorded autograd graph of outputs at xs.

    `attached` says whether it reaches other tensors, `careful` whether torch's backward is right only
    while it records (the determinant of a singular matrix).
    """

    xs: Leaves
    outputs: Leaves
    aux: Any
    attached: bool
    careful: bool

    def backward(self, us: Leaves | None, *, create_graph: bool, retain_graph: bool = False) -> list[Any]:
        """Jᵀ u."""
        if self.careful and not create_graph:
            return [g.detach() for g in _backward(self.outputs, self.xs, us, create_graph=True)]
        return _backward(self.outputs, self.xs, us, create_graph=create_graph, retain_graph=retain_graph)


def _backward(
    outputs: Leaves, xs: Leaves, us: Leaves | None, *, create_graph: bool, retain_graph: bool = False
) -> list[Any]:
    """torch.autograd.grad, less its checks of shapes, with zeros for what does not depend on xs.

    The checks cost 30 µs a call, as much as a small layer's backward; directions are checked at the door.
    """
    if not all(map(requires_grad, outputs)):  # constant outputs have no graph
        kept = [i for i, y in enumerate(outputs) if y.requires_grad]
        if not kept:
            return [torch.zeros_like(x) for x in xs]
        outputs = [outputs[i] for i in kept]
        us = None if us is None else [us[i] for i in kept]
    us = [torch.ones_like(y) for y in outputs] if us is None else us
    grads = _engine_run_backward(
        tuple(outputs),
        tuple(us),
        retain_graph or create_graph,
        create_graph,
        tuple(xs),
        True,
        accumulate_grad=False,
    )
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, xs, strict=True)]


# What the first call of a function taught: the repairs that its operations need.
_learned: WeakKeyDictionary[Any, Level] = WeakKeyDictionary()


class NoForwardMode(Exception):
    """Forward mode does not give what reverse mode gives."""


def recorded(f: Function, leaves: Leaves, user: Any, gradient: bool, forward: bool = False) -> Graph:
    """Record the graph of `f`, or of its gradient, from fresh leaves; say whether it reaches other tensors.

    Such a result can be differentiated again, which some faulty operations do not survive; then, and
    where an operation has no second derivative, `f` runs again in repaired form. With `forward`, `f`
    carries tangents, and runs in the mode that sees whether they can be trusted.
    """
    if not torch.is_grad_enabled():
        with torch.enable_grad():
            graph = recorded(f, leaves, user, gradient, forward)
        return replace(graph, aux=_detached(graph.aux), attached=False)
    if any(map(requires_grad, leaves)):  # x itself may stand in what f closes over
        xs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in leaves]
    else:
        xs = [x.detach().requires_grad_() for x in leaves]
    level = _learned_level(user)
    repair, (outputs, aux) = _run(f, xs, level)
    attached, kinds = survey(outputs, xs)
    needed = (
        Level.ALL if repair and repair.names and repair.differentiates else repairs_needed(kinds, attached)
    )
    if needed > level:
        remember(user, needed)
        repair, (outputs, aux) = _run(f, xs, needed)
        attached, kinds = survey(outputs, xs)
    elif level is Level.TRANSFORMS and repair and repair.plain and not needed:
        remember(user, Level.NONE)
    if repair and repair.level >= Level.ALL and repairs_needed(kinds, attached) >= Level.ALL:
        raise StrategyError(
            "f calls an operation whose higher derivatives torch gets wrong "
            f"({', '.join(sorted({kind.__name__ for kind in kinds} & FAULTY))}) below torch's Python functions; "
            "call it as torch.nn.functional has it"
        )
    if forward and repair and not repair.forward:
        raise NoForwardMode
    if gradient:
        if once := _without_a_second(kinds):
            raise StrategyError(f"f calls {once}, whose backward is marked once_differentiable")
        outputs = _backward(outputs, xs, None, create_graph=True)
    return Graph(xs, outputs, aux if attached else _detached(aux), attached, _careful(kinds))


def _detached(aux: Any) -> Any:
    return None if aux is None else pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, aux)


@lru_cache(maxsize=256)
def _careful(kinds: frozenset[type]) -> bool:
    """Whether one of these operations has a backward that is right only while it records."""
    return not FIRST_IN_GRAD_MODE.isdisjoint(kind.__name__ for kind in kinds)


@lru_cache(maxsize=256)
def _without_a_second(kinds: frozenset[type]) -> str:
    """The user's own operations that refuse a second derivative, of which torch.autograd.grad makes zeros."""
    rules = [kind._forward_cls for kind in kinds if hasattr(kind, "_forward_cls")]
    marked = [rule for rule in rules if getattr(getattr(rule, "backward", None), "__code__", None) is _ONCE]
    return ", ".join(sorted(rule.__name__ for rule in marked))


@lru_cache(maxsize=256)
def repairs_needed(kinds: frozenset[type], attached: bool) -> Level:
    """The repairs that a graph of these operations needs."""
    names = {kind.__name__ for kind in kinds}
    if not names.isdisjoint(UNREPAIRABLE):
        raise StrategyError(
            f"f runs {', '.join(sorted(names & UNREPAIRABLE))}, whose derivatives torch {torch.__version__} gets "
            "silently wrong (docs/torch_known_wrong.md); write it in Python, or in terms of other operations"
        )
    if "CompiledFunctionBackward" in names:
        return Level.EAGER
    if not names.isdisjoint(FAULTY if attached else FAULTY_AT_SECOND):
        return Level.ALL
    return Level.NONE if names.isdisjoint(WITHOUT_SECOND) else Level.TRANSFORMS


def _run(f: Function, xs: Leaves, level: Level) -> tuple[Repair | None, tuple[Leaves, Any]]:
    if level is Level.NONE:
        return None, f(xs)
    stance = set_stance("force_eager") if level is Level.EAGER else nullcontext()
    with sdpa_kernel(SDPBackend.MATH), stance, Repair(level) as repair:
        result = f(xs)
    return repair, result


def _learned_level(user: Any) -> Level:
    try:
        return _learned.get(user, Level.TRANSFORMS)
    except TypeError:  # not hashable or not weakly referable: nothing is remembered
        return Level.TRANSFORMS


def remember(user: Any, level: Level) -> None:
    """Say which repairs a function needs, as far as its graph shows no others."""
    try:
        _learned[user] = level
    except TypeError:
        return


def survey(outputs: Leaves, xs: Leaves) -> tuple[bool, frozenset[type]]:
    """Whether the graph of `outputs` has leaves other than `xs`, and its kinds of operations."""
    nodes = [y.grad_fn for y in outputs if y.grad_fn is not None]
    seen, ends = {None, *nodes}, []
    for node in nodes:  # grows meanwhile
        inputs = node.next_functions
        if not inputs:
            ends.append(node)
        for other, _ in inputs:
            if other not in seen:
                seen.add(other)
                nodes.append(other)
    own = set(map(id, xs))
    attached = any(id(getattr(end, "variable", xs[0])) not in own for end in ends)
    return attached, frozenset(map(type, nodes))
