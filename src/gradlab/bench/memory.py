"""Peak memory of a call beyond its inputs, in bytes; None where it cannot be measured."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def peak(framework: str, call: Callable[..., Any], *args: Any, device: str = "cpu") -> int | None:
    """Peak bytes that `call(*args)` holds above what was there before: temporaries and results.

    torch on an accelerator (say its device): the allocator's peak. torch on a CPU: the running sum of the
    profiler's allocation events. jax: XLA's own plan of the compiled call, temporaries and outputs, so
    `call` must be what jax.jit accepts. None where the framework does not say.
    """
    return _jax(call, *args) if framework == "jax" else _torch(call, device, *args)


def _torch(call: Callable[..., Any], device: str, *args: Any) -> int | None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*args)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        call(*args)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest if events else None


def resident(call: Callable[..., Any], *args: Any) -> int | None:
    """Peak bytes of the process above what it held before, as Linux counts them: of calls too long for a profiler.

    Some hundred kilobytes that the process had freed and kept are taken again unseen.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    gc.collect()
    with suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # forget the highest so far
    kilobytes = lambda key: int(status.read_text().partition(f"{key}:")[2].split()[0])
    before = kilobytes("VmRSS")
    call(*args)
    return 1024 * (kilobytes("VmHWM") - before)


def _jax(call: Callable[..., Any], *args: Any) -> int | None:
    import jax

    compiled: Any = call if hasattr(call, "lower") else jax.jit(call)  # what has run is not compiled again
    plan = compiled.lower(*args).compile().memory_analysis()
    return None if plan is None else plan.temp_size_in_bytes + plan.output_size_in_bytes
