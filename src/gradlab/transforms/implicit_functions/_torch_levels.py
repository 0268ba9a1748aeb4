"""What of torch's transforms is at work around a solve, and how to run code outside of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    maybe_get_level,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gradlab.transforms.custom_rules._torch_levels import base
from gradlab.transforms.implicit_functions.options import Options
from gradlab.transforms.repairs._torch import unseen


def orders(r: Any) -> int:
    """How many derivatives will be taken of r: one a transform at work; of a recorded graph, up to three."""
    if is_compiling():
        return 3
    keys = [level.key() for level in get_interpreter_stack() or ()]
    forward = keys.count(TransformType.Jvp) or int(forward_ad._current_level >= 0)
    count = keys.count(TransformType.Grad) + forward
    return max(3, count + 1) if torch.is_grad_enabled() and base(r).requires_grad else count


def everywhere(mask: Any) -> bool:
    """Whether this holds for every example of the batches at work; in compiled code nothing is known of it."""
    return not is_compiling() and bool(base(mask).all())


def complain(options: Options, bad: Any, message: str) -> None:
    """The error or warning asked for, where any example is `bad`; in compiled code nothing."""
    if not is_compiling() and bool(base(bad).any()):
        options.report(message)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Without derivatives by the transforms at work, in either mode."""
    with unseen(torch.no_grad()), forward_ad._set_fwd_grad_enabled(False):
        yield


def outside(run: Callable[[], Any], tensors: Sequence[Any]) -> Any:
    """run() without the transforms at work, so once an example where it looks at numbers under vmap.

    `tensors` are those it closes over, which it then sees without what the transforms make of them.
    """

    def substituted(*others: Any) -> Any:
        with Substituted(tensors, others):
            return run()

    return Outside.apply(substituted, *tensors)


class Outside(torch.autograd.Function):
    """A call that torch.func runs below all its levels, without derivatives."""

    @staticmethod
    def forward(run: Callable[..., Any], *tensors: Any) -> Any:
        return run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, in_dims: Any, run: Callable[..., Any], *tensors: Any) -> Any:
        return Outside.apply(mapped(run, in_dims[1:], info.randomness), *tensors), 0


def mapped(run: Callable[..., Any], dims: Sequence[int | None], randomness: str) -> Callable[..., Any]:
    """run over a batch of examples: by vmap, or one after the other where it looks at numbers."""

    def many(*tensors: Any) -> Any:
        try:
            return torch.func.vmap(run, tuple(dims), randomness=randomness)(*tensors)
        except RuntimeError as error:
            if not looks_at_numbers(error):
                raise
        size = next(t.shape[d] for t, d in zip(tensors, dims, strict=True) if d is not None)
        example = lambda i: [t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)]
        return torch.stack([run(*example(i)) for i in range(size)])

    return many


def looks_at_numbers(error: RuntimeError) -> bool:
    """Whether this is how vmap refuses control flow by the numbers of a batch."""
    return "vmap: It looks like you're" in str(error)


def closed_over(f: Callable[..., Any], *xs: Any) -> list[Any]:
    """The tensors that f(*xs) uses and has not been given, and those it has been given."""
    with Seen(xs) as seen:
        f(*xs)
    return [*xs, *seen.closed]


class Seen(TorchFunctionMode):
    """Remembers the tensors that are used in it and neither given nor made in it."""

    def __init__(self, given: Sequence[Any]):
        super().__init__()
        self.known = {id(t): t for t in given}
        self.closed: list[Any] = []
        self.wrapped: list[Any] = []  # by a transform within
        self.level = len(get_interpreter_stack() or ())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in self._new((args, kwargs)):
            level = maybe_get_level(t)
            if -1 <= level <= self.level:  # -2: of one that has ended
                self.closed.append(t)
            elif level > self.level:
                self.wrapped.append(t)
        result = func(*args, **(kwargs or {}))
        self._new(result)
        return result

    def _new(self, tree: Any) -> list[Any]:
        new = [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor) and id(t) not in self.known]
        self.known.update({id(t): t for t in new})
        return new


class Substituted(TorchFunctionMode):
    """Uses other tensors in the place of some."""

    def __init__(self, tensors: Sequence[Any], others: Sequence[Any]):
        super().__init__()
        self.table = {id(t): other for t, other in zip(tensors, others, strict=True)}
        self.level = len(get_interpreter_stack() or ())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(self._other, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _other(self, t: Any) -> Any:
        return self.table.get(id(t), t) if isinstance(t, torch.Tensor) else t
