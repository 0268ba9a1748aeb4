"""What torch says of a call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gradlab.bench.profiling import Counts


def synchronise(result: Any) -> Any:
    """Wait until the result is there, on whatever accelerator there is."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return result


def device(tree: Any) -> str:
    """Where the tensors of a tree are."""
    tensors = [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]
    return str(tensors[0].device) if tensors else "cpu"


def is_compiled(fn: Callable[..., Any]) -> bool:
    """Whether this is what torch.compile gives."""
    return hasattr(fn, "_torchdynamo_orig_callable") or hasattr(fn, "_orig_mod")


class Traffic(TorchDispatchMode):
    """The bytes that operations read and write, each its inputs and outputs; views move none."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view:
            leaves = pytree.tree_leaves((args, kwargs, out))
            self.total += sum(x.nbytes for x in leaves if isinstance(x, torch.Tensor))
        return out


def counted(fn: Callable[..., Any], args: Any) -> Counts:
    """By torch's counter, with what is compiled run as it was written."""
    flops, traffic = FlopCounterMode(display=False), Traffic()
    compiling = "torch._dynamo" in sys.modules  # seconds to import, where nothing is compiled
    eager = torch.compiler.set_stance("force_eager") if compiling else nullcontext()
    with eager, flops, traffic:
        fn(*args)
    note = "operations other than products of matrices, convolutions and attention"
    if is_compiled(fn):
        note += "; what the compiler saves"
    return Counts(float(flops.get_total_flops()), float(traffic.total), note)


def traced(call: Callable[[], Any], folder: Path, name: str) -> Path:
    """A trace of one call."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profile, torch.profiler.record_function(name):
        synchronise(call())
    path = folder / f"{''.join(c if c.isalnum() else '_' for c in name)}.json"
    profile.export_chrome_trace(str(path))
    return path


def large(device: str, n: int, entries: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A product of n by n matrices, and a copy."""
    A, x = torch.ones(n, n, device=device), torch.ones(entries, device=device)
    y = torch.empty_like(x)
    return lambda: A @ A, lambda: y.copy_(x)
