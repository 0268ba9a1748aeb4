"""What a loss does with the leaves of its parameters, seen while it runs for all examples under vmap.

The loss is given a copy of each leaf for every example, so whatever it does with a leaf is differentiated for each
example alone. Where an operation that is linear in a leaf (a product, a convolution, a lookup of rows, an added
bias) takes a copy together with an activation x, it runs with the leaf itself; x is kept, and where in the autograd
graph its output y is. The leaf's gradient is a product of x and of the cotangent of y: nothing as large as the leaf
is needed for one example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gradlab._errors import InputError
from gradlab.transforms.per_example._torch_factors import Rows, formed
from gradlab.transforms.per_example.options import mixing
from gradlab.transforms.repairs._torch import DIFFERENTIATING
from gradlab.transforms.repairs._torch_recurrent import WRITTEN_OUT

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

    def sides(self) -> tuple[Tensor, Tensor, tuple[int, ...], tuple[int, ...]]:
        """The factors with their axes of the view, those of the leaf's earlier axis first."""
        _, contracted, free = self.parts
        place = (self.view.axes or range(self.view.value.ndim)).__getitem__
        if not contracted or (free and min(map(place, free)) < min(map(place, contracted))):
            return self.dy, self.x, free, contracted
        return self.x, self.dy, contracted, free

    def each(self) -> Tensor:
        left, right, *_ = self.sides()
        return self._of_view(left.mT @ right)

    def weighted(self, scale: Callable[[Tensor], Tensor], mask: Callable[[Tensor], Tensor]) -> Tensor:
        self.x, self.dy = mask(self.x), scale(self.dy)
        left, right = (a.transpose(0, 1).flatten(1, 2) for a in self.sides()[:2])
        return self._of_view((left.mT @ right).unsqueeze(0)).squeeze(0)

    def _of_view(self, rows: Tensor) -> Tensor:
        """(N, G, left, right) with the view's axes in their places."""
        shape, order = self.view.value.shape, [i for part in (self.parts[0], *self.sides()[2:]) for i in part]
        rows = rows.reshape(len(rows), *(shape[i] for i in order))
        if order == list(range(len(order))):
            return rows
        return rows.permute(0, *(1 + order.index(i) for i in range(len(shape))))

    @property
    def layout(self) -> Any:
        """Equal for uses whose factors are along the same axes of the leaf."""
        axes = self.view.axes or tuple(range(self.view.value.ndim))
        parts = (self.parts[0], *self.sides()[2:])
        return self.view.steps, *(tuple(axes[i] for i in part) for part in parts)

    @property
    def sizes(self) -> tuple[int, ...]:
        """T, p, q and the number of groups."""
        left, right, *_ = self.sides()
        return left.shape[2], left.shape[3], right.shape[3], left.shape[1]

    def pair(self) -> tuple[Any, Any]:
        return self.sides()[:2]


@dataclass
class Convolution:
    """y = x * w: the right factors are the patches of x that the kernel meets."""

    view: View
    x: Tensor  # (N, M, channels, *space)
    arranged: Callable[[Tensor], Tensor]  # of y: (N, M, channels, *space)
    options: tuple[Any, ...]  # stride, padding, dilation, groups
    dy: Any = None

    def each(self) -> Tensor:
        return torch.func.vmap(self._backward)(self.x, self.dy)

    def weighted(self, scale: Callable[[Tensor], Tensor], mask: Callable[[Tensor], Tensor]) -> Tensor:
        return self._backward(mask(self.x).flatten(0, 1), scale(self.dy).flatten(0, 1))

    def _backward(self, x: Tensor, dy: Tensor) -> Tensor:
        stride, padding, dilation, groups = self.options
        none = [0] * len(stride)
        return aten.convolution_backward(
            dy,
            x,
            self.view.value.detach(),
            [0],
            stride,
            padding,
            dilation,
            False,
            none,
            groups,
            [False, True, False],
        )[1]

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
        N, M, C = x.shape[:3]
        out, k = math.prod(x.shape[3 : 3 + len(window)]), math.prod(window)
        right = x.reshape(N, M, groups, C // groups, out, k).permute(0, 2, 1, 4, 3, 5)
        left = self.dy.reshape(N, M, groups, -1, out).permute(0, 2, 1, 4, 3)
        return left.reshape(N, groups, M * out, -1), right.reshape(N, groups, M * out, -1)


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
    """y = ... + w in one axis of y: its gradient is a sum, and as small as y."""

    view: View
    arranged: Callable[[Tensor], Tensor]  # of y: (N, T, channels)
    dy: Any = None

    def each(self) -> Tensor:
        return self.dy.sum(1)

    def weighted(self, scale: Callable[[Tensor], Tensor], mask: Callable[[Tensor], Tensor]) -> Tensor:
        return scale(self.dy).sum((0, 1))

    layout = None  # no factors


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
        self.level = _functorch.maybe_get_level(self.copies[0]) if self.substitute else None
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
        """A tensor of every example as it is below vmap; None if all examples share it."""
        found = Arranged.of(tensor)
        return found if found is not None and self.level in found.levels else None

    def keep(self, x: Arranged) -> Tensor:
        self.kept.append((x.raw, x.raw._version))
        return x.arrange(x.raw if self.again else x.raw.detach())

    def record(self, y: Any, *uses: Any) -> None:
        """Where y is in the graph as it is now: a later change in place moves y, and a view loses its place."""
        raw = Arranged.of(y).raw
        edge = get_gradient_edge(raw if raw._base is None else raw._base)
        for use in uses:
            self.uses.append((use, edge))


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


def contract(
    recorder: Recorder, x: Any, w: Any, run: Any, of_x: str, of_w: str, of_y: str, bias: View | None = None
) -> Any:
    """An operation on x and a leaf that sums their products, with the letters of their axes."""
    view, rows = recorder.view(w), recorder.rows(x)
    if view is None or rows is None or recorder.view(x) is not None:
        return NotImplemented
    y, below = settled(run(view.value))
    if below.levels != rows.levels:
        return NotImplemented
    if not below.raw.requires_grad:
        return y
    n, e = "N", "".join(chr(0x3B1 + i) for i in range(rows.extra))
    groups, contracted = ("".join(c for c in of_w if c in of_x and (c in of_y) == y) for y in (True, False))
    free = "".join(c for c in of_w if c not in of_x)
    ts = e + "".join(c for c in of_x if c not in of_w)

    def canonical(a: Tensor, letters: str, last: str) -> Tensor:
        order = [letters.index(c) for c in n + groups + ts + last]
        a = a if order == list(range(a.ndim)) else a.permute(order)
        sizes, g, t = a.shape, 1 + len(groups), 1 + len(groups + ts)
        return a.reshape(sizes[0], math.prod(sizes[1:g]), math.prod(sizes[g:t]), math.prod(sizes[t:]))

    kept = canonical(recorder.keep(rows), n + e + of_x, contracted)
    arrange, letters_of_y = below.arrange, n + e + of_y
    arranged = lambda raw: canonical(arrange(raw), letters_of_y, free)
    parts = tuple(tuple(of_w.index(c) for c in part) for part in (groups, contracted, free))
    shifts = [] if bias is None else [added(bias, below, -1)]
    recorder.record(y, Contraction(view, kept, arranged, parts), *shifts)
    return y


LETTERS = "abcdefghijklm"


def linear(recorder: Recorder, input: Any, weight: Any, bias: Any = None) -> Any:
    """Rows of x with weight (p, q), and a bias (p,)."""
    if recorder.view(weight) is None or weight.ndim != 2:
        return NotImplemented
    of_bias = recorder.view(bias)
    b = bias if of_bias is None else of_bias.value
    ts = LETTERS[: input.ndim - 1]
    run = lambda w: functional.linear(input, w, b)
    return contract(recorder, input, weight, run, ts + "q", "pq", ts + "p", of_bias)


def added(view: View, y: Arranged, channel: int) -> Bias:
    """The gradient of a bias along one axis of y."""

    arrange = y.arrange

    def arranged(raw: Tensor) -> Tensor:
        dy = arrange(raw).movedim(channel, -1)
        return dy.reshape(dy.shape[0], -1, dy.shape[-1])

    return Bias(view, arranged)


def matmul(recorder: Recorder, input: Any, other: Any) -> Any:
    """x W, W x, and the same of stacks of equal length."""
    right = recorder.view(other) is not None
    x, w = (input, other) if right else (other, input)
    run = lambda w: torch.matmul(input, w) if right else torch.matmul(w, other)
    if (
        x.ndim == 0
        or w.ndim == 0
        or w.ndim > 3
        or (w.ndim == 3 and (x.ndim != 3 or x.shape[0] != w.shape[0]))
    ):
        return NotImplemented
    if w.ndim == 3:
        letters = ("gtq", "gqp", "gtp") if right else ("gqt", "gpq", "gpt")
    elif right:
        ts = LETTERS[: x.ndim - 1]
        letters = (ts + "q", "qp"[: w.ndim], ts + "p"[: w.ndim - 1])
    else:
        ts = LETTERS[: max(x.ndim - 2, 0)]
        t = "t" if x.ndim > 1 else ""
        letters = (ts + "q" + t, "pq"[-w.ndim :], ts + "p"[: w.ndim - 1] + t)
    return contract(recorder, x, w, run, *letters)


def addmm(recorder: Recorder, input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """input + mat1 mat2, with an ordinary sum."""
    if beta != 1 or alpha != 1:
        return NotImplemented
    y = matmul(recorder, mat1, mat2)
    return y if y is NotImplemented else y + input


def einsum(recorder: Recorder, equation: Any, *operands: Any) -> Any:
    """Two operands, every letter once in each, and none in one operand alone."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation or "->" not in equation:
        return NotImplemented
    inputs, _, of_y = equation.replace(" ", "").partition("->")
    of_a, _, of_b = inputs.partition(",")
    place = 0 if recorder.view(operands[0]) is not None else 1
    (of_w, of_x) = (of_a, of_b) if place == 0 else (of_b, of_a)
    for letters, others in ((of_w, of_x + of_y), (of_x, of_w + of_y), (of_y, of_w + of_x)):
        if len(set(letters)) != len(letters) or not set(letters) <= set(others):
            return NotImplemented
    x, w = operands[1 - place], operands[place]
    if x.ndim != len(of_x) or w.ndim != len(of_w):
        return NotImplemented
    run = lambda w: torch.einsum(equation, *((w, x) if place == 0 else (x, w)))
    return contract(recorder, x, w, run, of_x, of_w, of_y)


def convolution(dims: int) -> Callable[..., Any]:
    """torch.conv1d, conv2d, conv3d."""
    run = (torch.conv1d, torch.conv2d, torch.conv3d)[dims - 1]
    wide = lambda n: [n] * dims if isinstance(n, int) else list(n) * (dims if len(n) == 1 else 1)

    def conv(
        recorder: Recorder,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        view, rows, of_bias = recorder.view(weight), recorder.rows(input), recorder.view(bias)
        if view is None or rows is None or recorder.view(input) is not None:
            return NotImplemented
        gaps = wide(dilation)
        if isinstance(padding, str):
            reach = [gap * (size - 1) for gap, size in zip(gaps, weight.shape[2:], strict=True)]
            if padding == "same" and any(r % 2 for r in reach):
                return NotImplemented
            padding = [r // 2 for r in reach] if padding == "same" else 0
        b = bias if of_bias is None else of_bias.value
        y, below = settled(run(input, view.value, b, stride, padding, dilation, groups))
        if below.levels != rows.levels:
            return NotImplemented
        if not below.raw.requires_grad:
            return y
        several = lambda a: a.reshape(a.shape[0], -1, *a.shape[a.ndim - dims - 1 :])
        arrange = below.arrange
        x, arranged = several(recorder.keep(rows)), lambda raw: several(arrange(raw))
        options = (wide(stride), wide(padding), gaps, groups)
        shifts = [] if of_bias is None else [added(of_bias, below, -dims - 1)]
        recorder.record(y, Convolution(view, x, arranged, options), *shifts)
        return y

    return conv


def embedding(
    recorder: Recorder,
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Rows of the weight; the row numbered padding_idx has no gradient."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    run = lambda w: functional.embedding(input, w, padding_idx)
    return looked_up(recorder, input, weight, run, padding_idx)


def indexed(recorder: Recorder, weight: Any, index: Any) -> Any:
    """weight[index] with an array of whole numbers."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        return NotImplemented
    return looked_up(recorder, index, weight, lambda w: w[index], None)


def looked_up(recorder: Recorder, index: Any, weight: Any, run: Any, padding_idx: int | None) -> Any:
    view, rows = recorder.view(weight), recorder.rows(index)
    if view is None or rows is None:
        return NotImplemented
    y, below = settled(run(view.value))
    if below.levels != rows.levels:
        return NotImplemented
    if not below.raw.requires_grad:
        return y
    n = weight.shape[0]
    numbers = recorder.keep(rows)
    numbers = numbers.reshape(numbers.shape[0], 1, -1).long() % n
    arrange = below.arrange

    def arranged(raw: Tensor) -> Tensor:
        dy = arrange(raw).reshape(*numbers.shape, -1)
        return dy if padding_idx is None else dy.masked_fill((numbers == padding_idx % n).unsqueeze(-1), 0)

    recorder.record(y, Lookup(view, numbers, arranged))
    return y


def training(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call of batch norm takes its statistics from the batch."""
    place = 5
    return bool(args[place] if len(args) > place else kwargs.get("training", False))


def takes(handler: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a handler knows these options."""
    return not kwargs or set(kwargs) <= set(handler.__code__.co_varnames)


NORMS = {functional.batch_norm, torch.batch_norm}
KNOWN: dict[Any, Callable[..., Any]] = {
    functional.linear: linear,
    functional.embedding: embedding,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    torch.mm: matmul,
    Tensor.mm: matmul,
    torch.bmm: matmul,
    Tensor.bmm: matmul,
    torch.mv: matmul,
    Tensor.mv: matmul,
    Tensor.__rmatmul__: lambda recorder, self, other: matmul(recorder, other, self),
    torch.addmm: addmm,
    torch.einsum: einsum,
    torch.conv1d: convolution(1),
    torch.conv2d: convolution(2),
    torch.conv3d: convolution(3),
    Tensor.__getitem__: indexed,
}
PERMUTING = {
    torch.t,
    Tensor.t,
    Tensor.T.__get__,
    Tensor.mT.__get__,
    torch.transpose,
    Tensor.transpose,
    torch.swapaxes,
    Tensor.swapaxes,
    torch.permute,
    Tensor.permute,
    torch.movedim,
    Tensor.movedim,
}
MOVES = PERMUTING | {
    Tensor.reshape,
    torch.reshape,
    Tensor.view,
    Tensor.view_as,
    Tensor.flatten,
    torch.flatten,
    Tensor.unflatten,
    Tensor.squeeze,
    torch.squeeze,
    Tensor.unsqueeze,
    torch.unsqueeze,
    Tensor.contiguous,
    Tensor.clone,
    Tensor.to,
    Tensor.float,
    Tensor.double,
    Tensor.bfloat16,
    Tensor.half,
    Tensor.type,
}


def looked_into(f: FunctionType) -> Callable[..., Any]:
    """A function of torch.nn.functional that calls others, without its question whether a mode takes the call."""
    never = lambda *args: False
    asked = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    copy = FunctionType(f.__code__, f.__globals__ | dict.fromkeys(asked, never), f.__name__, f.__defaults__)
    copy.__kwdefaults__ = f.__kwdefaults__
    return copy


COMPOSITE: dict[Any, Callable[..., Any]] = {
    f: looked_into(f) for f in (functional.multi_head_attention_forward,) if isinstance(f, FunctionType)
}
