"""What a loss does with the leaves of its parameters, seen while it runs for all examples under vmap.

The loss is given a copy of each leaf for every example, so whatever it does with a leaf is differentiated for each
example alone. Where an operation that is linear in a leaf (a product, a convolution, a lookup of rows, an added
bias) takes a copy together with an activation x, it runs with the leaf itself; x is kept, and where in the autograd
graph its output y is. The leaf's gradient is a product of x and of the cotangent of y: nothing as large as the leaf
is needed for one example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from gradlab._errors import InputError
from gradlab.transforms.per_example._torch_operations import (
    COMPOSITE,
    KNOWN,
    MOVES,
    NORMS,
    PERMUTING,
    takes,
    training,
)
from gradlab.transforms.per_example._torch_uses import Arranged, View
from gradlab.transforms.per_example.options import mixing
from gradlab.transforms.repairs._torch import DIFFERENTIATING
from gradlab.transforms.repairs._torch_recurrent import WRITTEN_OUT


@dataclass
class Recorder(TorchFunctionMode):
    """Active while the loss runs: gives known operations the leaf in place of its copies, and keeps their x.

    `alone` says that nothing was met that uses a leaf unseen (a derivative that the loss takes itself).
    """

    op: str
    copies: Sequence[Tensor]
    leaves: Sequence[Tensor]  # that require a gradient
    substitute: bool = True
    again: bool = False  # whether what is kept can be differentiated
    uses: list[tuple[Any, Any]] = field(default_factory=list)  # with the edge of y in the graph
    kept: list[tuple[Tensor, int]] = field(default_factory=list)  # every x with its version
    alone: bool = True

    def __post_init__(self) -> None:
        super().__init__()
        self.views = {
            id(copy): View(i, leaf, tuple(range(leaf.ndim)))
            for i, (copy, leaf) in enumerate(zip(self.copies, self.leaves, strict=True))
        }
        self.objects: list[Any] = list(self.copies)  # alive, so that no other object takes their ids
        self.level = _functorch.maybe_get_level(self.copies[0]) or 0
        self.forwards = forward_ad._current_level

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WRITTEN_OUT:
            with self:
                return WRITTEN_OUT[func](*args, **kwargs)
        if func in NORMS and training(func, args, kwargs):
            raise InputError(mixing(self.op, "batch norm in training mode"))
        if not self.substitute:
            return func(*args, **kwargs)
        if func in DIFFERENTIATING:
            self.alone = False
        if any(id(a) in self.views for a in args) or any(id(a) in self.views for a in kwargs.values()):
            if func in KNOWN and self.plain() and takes(KNOWN[func], kwargs):
                found = KNOWN[func](self, *args, **kwargs)
                if found is not NotImplemented:
                    return found
            elif func in MOVES and torch.is_grad_enabled():
                return self.moved(func, args, kwargs)
            elif func in COMPOSITE:
                with self:
                    return COMPOSITE[func](*args, **kwargs)
        return func(*args, **kwargs)

    def plain(self) -> bool:
        """Whether, since the examples were mapped, nothing but vmap is at work: no derivative of the loss's own."""
        stack = get_interpreter_stack() or ()
        above = [level for level in stack if level.level() > self.level]
        return self.forwards == forward_ad._current_level and all(
            level.key() == TransformType.Vmap for level in above
        )

    def moved(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A view of a view, known again when it is met."""
        out, view = func(*args, **kwargs), self.views.get(id(args[0]))
        if view is None or not isinstance(out, Tensor):
            return out
        value = func(view.value, *args[1:], **kwargs)
        if value.requires_grad and value.is_floating_point() and value.numel() == view.value.numel():
            axes, steps = view.axes, view.steps
            if func in PERMUTING and axes is not None and not steps:
                sizes = func(
                    torch.empty(tuple(range(1, 1 + len(axes))), device="meta"), *args[1:], **kwargs
                ).shape
                axes = tuple(axes[size - 1] for size in sizes)
            elif value.shape != view.value.shape or func in PERMUTING:
                axes, steps = None, (*steps, (func.__name__, repr(args[1:]), repr(kwargs)))
            self.views[id(out)] = View(view.leaf, value, axes, steps)
            self.objects.append(out)
        return out

    def view(self, tensor: Any) -> View | None:
        return self.views.get(id(tensor))

    def rows(self, tensor: Any) -> Arranged | None:
        """A tensor of every example as it is below vmap; None if all examples share it, or it is empty."""
        found = Arranged.of(tensor)
        return found if found is not None and self.level in found.levels and found.raw.numel() else None

    def keep(self, x: Arranged) -> Tensor:
        self.kept.append((x.raw, x.raw._version))
        return x.arrange(x.raw if self.again else x.raw.detach())

    def record(self, y: Any, *uses: Any) -> None:
        """Where y is in the graph as it is now: a later change in place moves y, and a view loses its place."""
        raw = Arranged.of(y).raw
        edge = get_gradient_edge(raw if raw._base is None else raw._base)
        for use in uses:
            self.uses.append((use, edge))
