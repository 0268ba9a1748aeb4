"""The operations that are known to be linear in a leaf, and those that only move its entries.

Each function has the parameters of its operation behind the recorder, and gives the output, or NotImplemented where the
operation is to run as it stands, with the copies of the leaf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gradlab.transforms.per_example._torch_uses import (
    Arranged,
    Bias,
    Contraction,
    Convolution,
    Lookup,
    View,
    settled,
)

Recorder = Any  # of _torch_recorder, which knows these operations


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
    n, e = "·", "".join(chr(0x3B1 + i) for i in range(rows.extra))  # no letters that einsum takes
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
        dy = arrange(raw)
        others = [i for i in range(1, dy.ndim) if i != dy.ndim + channel]
        return dy.sum(others) if others else dy

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
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
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
