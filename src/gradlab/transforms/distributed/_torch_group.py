"""A process of a torch.distributed group as a shard: sums by all_reduce, which are differentiated by all_reduce.

What is the same everywhere becomes a process's own, what is its own becomes a sum, and each is the
other's transpose: so derivatives of any order, taken alike in all processes, are those of the whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.utils import _pytree as pytree

from gradlab._errors import InputError, ProcessError, StrategyError
from gradlab.transforms.custom_rules._torch_levels import is_inexact, transforming
from gradlab.transforms.distributed.shards import SAME, check_timeout, count_examples, reason
from gradlab.transforms.linearised._torch import materialised

BITS = 20  # of a fingerprint, whose square is summed over processes in 64 bits


class Part:
    """This process's shard."""

    where = staticmethod(torch.where)

    def __init__(self, op: str, group: Any, timeout: float):
        import gradlab.torch

        self.ops, self.op, self.group, self.timeout = gradlab.torch, f"distributed.{op}", group, timeout
        self.rank, self.processes = dist.get_rank(group), dist.get_world_size(group)
        self.size = self.count = 0

    def map(self, f: Callable[..., Any], *trees: Any) -> Any:
        leaves = lambda x, *rest: f(x, *rest) if isinstance(x, torch.Tensor) else x
        return pytree.tree_map(leaves, *trees)

    def leaves(self, tree: Any) -> list[Any]:
        return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

    def total(self, tree: Any) -> Any:
        """The sum over processes of every tensor, all of a dtype in one reduction."""
        leaves, spec = pytree.tree_flatten(tree)
        found = list(leaves)
        for dtype in dict.fromkeys(x.dtype for x in leaves if isinstance(x, torch.Tensor)):
            places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.dtype == dtype]
            flat = torch.cat([leaves[i].reshape(-1) for i in places])
            for i, part in zip(
                places, Sum.apply(self, True, flat).split([leaves[i].numel() for i in places]), strict=True
            ):
                found[i] = part.reshape(leaves[i].shape)
        return pytree.tree_unflatten(found, spec)

    def shared(self, tree: Any) -> Any:
        """A tree that is the same everywhere, whose derivative is the sum of every process's."""
        tracked = lambda x: is_inexact(x) and (x.requires_grad or transforming())
        return self.map(lambda x: Sum.apply(self, False, x) if tracked(x) else x, tree)

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over processes, in place."""
        try:
            work = dist.all_reduce(x, group=self.group, async_op=True)
            work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise self.lost(error) from error
        return x

    def lost(self, error: Exception) -> ProcessError:
        name = "the default group" if self.group is None else f"the group {self.group.group_name}"
        return ProcessError(
            f"{self.op}: process {self.rank} of the {self.processes} in {name} ({dist.get_backend(self.group)}) waited "
            f"for the others up to {self.timeout:g} s in vain ({reason(error)}); a process has ended, or "
            "calls something else. See the other processes' output, and start all again (torchrun --max-restarts does)"
        )

    def agree(self, same: Any, batch: Any) -> None:
        """Count all examples, and refuse processes that disagree: of equal numbers the variance is zero, exactly."""
        form = described(same, batch)
        h = zlib.crc32(form.encode()) >> (32 - BITS)
        b = 0 if transforming() else checksum(self.leaves(same))
        device = next((x.device for x in self.leaves(same)), torch.device("cpu"))
        facts = [self.size, int(self.size == 0), h, h * h, b, b * b]
        sums = self.reduce(torch.tensor(facts, dtype=torch.int64, device=device)).tolist()
        self.count, empty, *rest = sums
        differ = lambda total, squares: self.processes * squares != total * total
        if differ(*rest[:2]) or empty:
            forms: list[Any] = [None] * self.processes
            dist.all_gather_object(forms, (self.size, form), group=self.group)
            if empty:
                none = ", ".join(str(i) for i, (size, _) in enumerate(forms) if not size)
                raise InputError(
                    f"{self.op}: process {none} of {self.processes} has no examples; give it some"
                )
            first = next(i for i, (_, other) in enumerate(forms) if other != forms[0][1])
            raise InputError(
                f"{self.op}: processes disagree: process 0 has {forms[0][1]}, process {first} has {forms[first][1]}; "
                "call with the same in all"
            )
        if differ(*rest[2:]):
            raise InputError(
                f"{self.op}: processes hold other numbers for what should be the same (params, x or v); send those of "
                "one to all, with torch.distributed.broadcast"
            )


def sharded(
    op: str,
    over: Any,
    timeout: float,
    same: tuple[Any, ...],
    batch: Any,
    body: Callable[..., Any],
    out: Any = SAME,
) -> Any:
    """What a body gives for this process's part; `out` is for jax's twin, which has to know."""
    if not (dist.is_available() and dist.is_initialized()):
        raise StrategyError(
            f"distributed.{op}: there is no process group; start by torchrun and call "
            "torch.distributed.init_process_group, or use the operation without distributed"
        )
    if torch.compiler.is_compiling():
        raise StrategyError(
            f"distributed.{op}: torch.compile cannot trace its checks; compile f, and call this uncompiled"
        )
    if over is not None and not isinstance(over, dist.ProcessGroup):
        raise InputError(f"distributed.{op}: over is a {type(over).__name__}; pass a process group, or None")
    check_timeout(op, timeout)
    part = Part(op, over, timeout)
    part.size = count_examples(op, part.leaves(batch))
    part.agree(same, batch)
    return body(part, tuple(map(part.shared, same)), batch)


def described(same: Any, batch: Any) -> str:
    """Structure, shapes and dtypes, of the batch less its examples."""
    form = lambda x, skip: (
        f"{str(x.dtype)[6:]}{list(x.shape[skip:])}" if isinstance(x, torch.Tensor) else type(x).__name__
    )
    say = lambda tree, skip: ", ".join(
        f"{pytree.keystr(path)} {form(x, skip)}" for path, x in pytree.tree_flatten_with_path(tree)[0]
    )
    return f"{say(same, 0)}; examples {say(batch, 1)}"


def checksum(tensors: Sequence[torch.Tensor]) -> int:
    """Of the bits of tensors."""
    total = 0
    for i, x in enumerate(tensors):
        raw = x.detach().contiguous().reshape(-1).view(torch.uint8)
        raw = raw.view(torch.int16 if raw.numel() % 4 else torch.int32) if raw.numel() % 2 == 0 else raw
        total = zlib.crc32(f"{total} {i} {int(raw.sum(dtype=torch.int64))}".encode())
    return total >> (32 - BITS)


class Sum(torch.autograd.Function):
    """Own parts to their `total`, which is the same everywhere; or the transpose, from the same to one's own."""

    @staticmethod
    def forward(part: Part, total: bool, x: Any) -> Any:
        x = x.detach().clone(memory_format=torch.contiguous_format)
        return part.reduce(x) if total else x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.part, ctx.total, _ = inputs

    @staticmethod
    def backward(ctx: Any, u: Any) -> Any:
        return None, None, Sum.apply(ctx.part, not ctx.total, u)

    @staticmethod
    def jvp(ctx: Any, _part: Any, _total: Any, t: Any) -> Any:
        with _set_fwd_grad_enabled(True):
            return Sum.apply(ctx.part, ctx.total, materialised(t))

    @staticmethod
    def vmap(info: Any, in_dims: Any, part: Part, total: bool, x: Any) -> Any:
        return Sum.apply(part, total, x), in_dims[2]
