"""Uses of a leaf in operations that are linear in it: what was kept of them, and the leaf's gradients from that.

Each use has `view`, the leaf as it was used; x, what went in with it; `dy`, the cotangent of what came out, put
in order by `arranged`. It gives the gradients of the examples (`each`), their weighted sum (`weighted`), and, unless
`layout` is None, the factors of the gradients (`pair`) and their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.nn import functional

from gradlab.transforms.per_example._torch_factors import Rows, formed

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class View:
    """A leaf moved about: its value, and the leaf's axes in its order, or None and by what it was reshaped."""

    leaf: int
    value: Tensor
    axes: tuple[int, ...] | None
    steps: tuple[Any, ...] = ()

    def pulled(self, leaf: Tensor, gradients: Tensor, again: bool) -> Tensor:
        """Gradients of the view, behind any leading axis, as gradients of the leaf."""
        if self.value is leaf:
            return gradients
        if self.axes is not None:
            lead = gradients.ndim - leaf.ndim
            back = [lead + self.axes.index(i) for i in range(leaf.ndim)]
            return gradients.permute(*range(lead), *back).to(leaf.dtype)
        batched = gradients.ndim > self.value.ndim
        (found,) = torch.autograd.grad(
            self.value, leaf, gradients, retain_graph=True, create_graph=again, is_grads_batched=batched
        )
        return found


@dataclass
class Contraction:
    """y = Σ x w over the axes that x and w share and y lacks.

    x is kept as (N, G, T, contracted) and y as (N, G, T, free); `parts` are the axes of the view that are
    groups, contracted, free.
    """

    view: View
    x: Tensor
    arranged: Callable[[Tensor], Tensor]  # of y
    parts: tuple[tuple[int, ...], ...]
    dy: Any = None

    @property
    def order(self) -> tuple[tuple[int, ...], ...]:
        """The axes of the view: groups, then those of the left and of the right factors, the leaf's earlier first."""
        groups, contracted, free = self.parts
        place = (self.view.axes or range(self.view.value.ndim)).__getitem__
        if not contracted or (free and min(map(place, free)) < min(map(place, contracted))):
            return groups, free, contracted
        return groups, contracted, free

    def sides(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return (x, dy) if self.order == self.parts else (dy, x)

    def each(self) -> Tensor:
        left, right = self.pair()
        return self._of_view(left.mT @ right)

    def weighted(self, scale: Callable[[Tensor], Tensor], mask: Callable[[Tensor], Tensor]) -> Tensor:
        left, right = (a.transpose(0, 1).flatten(1, 2) for a in self.sides(mask(self.x), scale(self.dy)))
        return self._of_view((left.mT @ right).unsqueeze(0)).squeeze(0)

    def _of_view(self, rows: Tensor) -> Tensor:
        """(N, G, left, right) with the view's axes in their places."""
        shape, order = self.view.value.shape, [i for part in self.order for i in part]
        rows = rows.reshape(len(rows), *(shape[i] for i in order))
        if order == list(range(len(order))):
            return rows
        return rows.permute(0, *(1 + order.index(i) for i in range(len(shape))))

    @property
    def layout(self) -> Any:
        """Equal for uses whose factors are along the same axes of the leaf."""
        axes = self.view.axes or tuple(range(self.view.value.ndim))
        return self.view.steps, *(tuple(axes[i] for i in part) for part in self.order)

    @property
    def sizes(self) -> tuple[int, ...]:
        """T, p, q and the number of groups."""
        left, right = self.pair()
        return left.shape[2], left.shape[3], right.shape[3], left.shape[1]

    def pair(self) -> tuple[Any, Any]:
        return self.sides(self.x, self.dy)


@dataclass
class Convolution:
    """y = x * w: the right factors are the patches of x that the kernel meets."""

    view: View
    x: Tensor  # (N, M, channels, *space)
    arranged: Callable[[Tensor], Tensor]  # of y: (N, M, channels, *space)
    options: tuple[Any, ...]  # stride, padding, dilation, groups
    dy: Any = None

    def each(self) -> Tensor:
        """Each example as a group of channels of its own; with one channel its patches, which are then few."""
        if self.x.shape[2] == 1:
            left, right = self.pair()
            return (left.mT @ right).reshape(len(self.x), *self.view.value.shape)
        behind = lambda a: a.transpose(0, 1).flatten(1, 2)
        rows = self._backward(behind(self.x), behind(self.dy), len(self.x))
        return rows.unflatten(0, (len(self.x), -1))

    def weighted(self, scale: Callable[[Tensor], Tensor], mask: Callable[[Tensor], Tensor]) -> Tensor:
        return self._backward(mask(self.x).flatten(0, 1), scale(self.dy).flatten(0, 1), 1)

    def _backward(self, x: Tensor, dy: Tensor, examples: int) -> Tensor:
        """The weight's gradient, of which the weight itself gives the shape alone."""
        stride, padding, dilation, groups = self.options
        w = dy.new_zeros(()).expand(dy.shape[1], *self.view.value.shape[1:])
        none, weight_alone = [0] * len(stride), [False, True, False]
        options = (stride, padding, dilation, False, none, groups * examples, weight_alone)
        return aten.convolution_backward(dy, x, w, [0], *options)[1]

    @property
    def layout(self) -> Any:
        return self.view.steps, self.view.axes, self.options[-1]

    @property
    def sizes(self) -> tuple[int, ...]:
        groups, w = self.options[-1], self.view.value
        rows = self.dy.shape[1] * math.prod(self.dy.shape[3:])
        return rows, w.shape[0] // groups, math.prod(w.shape[1:]), groups

    def pair(self) -> tuple[Any, Any]:
        stride, padding, dilation, groups = self.options
        window = self.view.value.shape[2:]
        edges = [p for pad in reversed(padding) for p in (pad, pad)]
        x = functional.pad(self.x, edges)
        for i, (size, step, gap) in enumerate(zip(window, stride, dilation, strict=True)):
            x = x.unfold(3 + i, gap * (size - 1) + 1, step)[..., ::gap]
        x, dy = x.unflatten(2, (groups, -1)), self.dy.unflatten(2, (groups, -1))
        m, places = 3 + len(window), range(4, 4 + len(window))
        taps = [place + len(window) for place in places]
        left = dy.permute(0, 2, 3, 1, *places).flatten(3)
        right = x.permute(0, 2, 3, *taps, 1, *places).flatten(m).flatten(2, -2)  # copied in runs of places
        return left.mT, right.mT


@dataclass
class Lookup:
    """y = w[x], the rows numbered x: the left factors are unit vectors."""

    view: View
    x: Tensor  # (N, 1, T)
    arranged: Callable[[Tensor], Tensor]  # of y: (N, 1, T, rest), zero where padded
    dy: Any = None

    def rows(self) -> Rows:
        return Rows(self.x, self.view.value.shape[0])

    def each(self) -> Tensor:
        rows = formed(self.rows(), self.dy)
        return rows.reshape(len(rows), *self.view.value.shape)

    def weighted(self, scale: Callable[[Tensor], Tensor], mask: Callable[[Tensor], Tensor]) -> Tensor:
        dy = scale(self.dy)
        flat = dy.new_zeros(self.view.value.shape[0], dy.shape[-1])
        flat = flat.index_add(0, self.x.reshape(-1), dy.reshape(-1, dy.shape[-1]))
        return flat.reshape(self.view.value.shape)

    @property
    def layout(self) -> Any:
        axes = self.view.axes or tuple(range(self.view.value.ndim))
        return self.view.steps, (), axes[:1], axes[1:]

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.dy.shape[2], self.view.value.shape[0], self.dy.shape[3], 1

    def pair(self) -> tuple[Any, Any]:
        return self.rows(), self.dy


@dataclass
class Bias:
    """y = ... + w along one axis of y: its gradient is a sum, and smaller than y."""

    view: View
    arranged: Callable[[Tensor], Tensor]  # of y: (N, channels)
    dy: Any = None

    def each(self) -> Tensor:
        return self.dy

    def weighted(self, scale: Callable[[Tensor], Tensor], mask: Callable[[Tensor], Tensor]) -> Tensor:
        return scale(self.dy).sum(0)

    layout = None  # no factors


@dataclass(frozen=True)
class Arranged:
    """The tensor below all levels of vmap, and how its axes become (N, further mapped axes, own axes)."""

    raw: Tensor
    levels: tuple[int, ...]
    order: tuple[int, ...]

    @staticmethod
    def of(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return None
        levels: list[int] = []
        places: list[int] = []
        while _functorch.is_batchedtensor(tensor):
            levels.append(_functorch.maybe_get_level(tensor))
            places.append(_functorch.maybe_get_bdim(tensor))
            tensor = _functorch.get_unwrapped(tensor)
        if _functorch.is_functorch_wrapped_tensor(tensor):
            return None
        axes = list(range(tensor.ndim))
        lead = [axes.pop(place) for place in reversed(places)]
        return Arranged(tensor, tuple(reversed(levels)), (*lead, *axes))

    @property
    def extra(self) -> int:
        """How many further axes are mapped, by a vmap of the loss's own."""
        return len(self.levels) - 1

    @property
    def arrange(self) -> Callable[[Tensor], Tensor]:
        """Of the tensor, or of a gradient like it (or like the base, if it is a view)."""
        shape, order = self.raw.shape, self.order
        return lambda raw: raw.reshape(shape).permute(order)


def settled(y: Any) -> tuple[Any, Arranged]:
    """An output whose place in the graph can be told, and its axes."""
    below = Arranged.of(y)
    raw, base = below.raw, below.raw._base
    if base is not None and not (
        raw.numel() == base.numel() and raw.is_contiguous() and base.is_contiguous()
    ):
        y = y.clone()
        below = Arranged.of(y)
    return y, below
