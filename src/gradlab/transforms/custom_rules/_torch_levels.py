"""Which of torch's transforms are at work around a rule, and what a rule closes over of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch._C._functorch import (
    TransformType,
    _unwrap_for_grad,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_get_level,
)
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad


def transforming() -> bool:
    """Whether a torch.func transform or forward mode is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiating(tensors: Any, below: float = float("inf")) -> bool:
    """Whether a derivative is being taken: by a transform below that level, or of these tensors."""
    levels = get_interpreter_stack() or ()
    forward = any(level.key() == TransformType.Jvp for level in levels)
    if forward_ad._current_level >= 0 and not forward:  # not opened by torch.func, thus below all of it
        return True
    if any(
        level.key() in (TransformType.Grad, TransformType.Jvp) and level.level() < below for level in levels
    ):
        return True
    return torch.is_grad_enabled() and any(base(t).requires_grad for t in tensors)


def base(tensor: Any) -> Any:
    """The tensor within those of torch.func's transforms."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def tracked(tensor: Any) -> bool:
    """Whether this tensor is being differentiated with respect to something, at any level."""
    if tensor.requires_grad:
        return True
    if not torch._C._are_functorch_transforms_active():
        return forward_ad._current_level >= 0 and _has_tangent(tensor)
    interpreter = retrieve_current_functorch_interpreter()
    key, level = interpreter.key(), interpreter.level()
    if key == TransformType.Jvp and _has_tangent(tensor):
        return True
    with interpreter.lower():
        return tracked(_lowered(tensor, level))


def innermost(tensors: Any) -> str | None:
    """The mode of the innermost derivative that is being taken of any of these: "forward", "reverse" or none."""
    if not torch._C._are_functorch_transforms_active():
        if any(t.requires_grad for t in tensors):
            return "reverse"
        return "forward" if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)) else None
    interpreter = retrieve_current_functorch_interpreter()
    if interpreter.key() == TransformType.Jvp and any(map(_has_tangent, tensors)):
        return "forward"
    if interpreter.key() == TransformType.Grad and any(t.requires_grad for t in tensors):
        return "reverse"
    with interpreter.lower():
        return innermost([_lowered(t, interpreter.level()) for t in tensors])


def _lowered(tensor: Any, level: int) -> Any:
    if maybe_get_level(tensor) != level:
        return tensor
    return get_unwrapped(tensor) if is_batchedtensor(tensor) else _unwrap_for_grad(tensor, level)


def without_tangents(tensors: Any) -> list[Any]:
    """The tensors less their tangents of the innermost forward mode, as the `jvp` of a Function is to see them."""
    return [forward_ad.unpack_dual(t, level=0).primal if is_inexact(t) else t for t in tensors]


def is_inexact(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def _has_tangent(tensor: Any) -> bool:
    return is_inexact(tensor) and forward_ad.unpack_dual(tensor, level=0).tangent is not None


def concrete(tensors: Any) -> bool:
    """Whether these tensors hold real numbers that can be looked at, within any transform: no compiler."""
    return all(not t.is_complex() and type(base(t)) in (torch.Tensor, torch.nn.Parameter) for t in tensors)


def mixed_batches(functions: Any, tensors: Any) -> bool:
    """Whether functions close over a tensor under a vmap that is itself being differentiated.

    Run again for a derivative outside of that vmap, they would take its batch for another.
    """
    return any(
        is_batchedtensor(t) and differentiating(tensors, below=maybe_get_level(t))
        for function in functions
        for t in closed_over(function)
    )


def holds_tensor(function: Any) -> bool:
    return next(closed_over(function), None) is not None


def closed_over(thing: Any, depth: int = 5, seen: set[int] | None = None) -> Iterator[Any]:
    """The tensors that a function holds: in its closure, its defaults, its object, and in theirs."""
    seen = set() if seen is None else seen
    if isinstance(thing, torch.Tensor):
        while is_functorch_wrapped_tensor(thing):
            yield thing
            thing = get_unwrapped(thing)
        yield thing
    elif depth and id(thing) not in seen:
        seen.add(id(thing))
        for item in _held(thing):
            yield from closed_over(item, depth - 1, seen)


def _held(thing: Any) -> Any:
    if isinstance(thing, FunctionType):
        cells = [_content(cell) for cell in thing.__closure__ or ()]
        return [*cells, thing.__defaults__, thing.__kwdefaults__]
    if isinstance(thing, MethodType):
        return [thing.__func__, thing.__self__]
    if isinstance(thing, partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, (dict, list, tuple, set)):
        return list(thing.values() if isinstance(thing, dict) else thing)
    return [] if isinstance(thing, (ModuleType, type)) else list(getattr(thing, "__dict__", {}).values())


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None
