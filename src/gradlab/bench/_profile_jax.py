"""What jax says of a call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gradlab.bench.profiling import Counts

synchronise = jax.block_until_ready


def device(tree: Any) -> str:
    """Where the arrays of a tree are, as "cpu" or "cuda:0"; else where jax puts them."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    places = sorted(arrays[0].devices(), key=lambda d: d.id) if arrays else jax.devices()
    kind = {"gpu": "cuda"}.get(places[0].platform, places[0].platform)
    return kind if kind == "cpu" else f"{kind}:{places[0].id}"


def is_compiled(fn: Callable[..., Any]) -> bool:
    """Whether this is a function under jax.jit."""
    return hasattr(fn, "lower")


def counted(fn: Callable[..., Any], args: Any) -> Counts:
    """By XLA, of the compiled program."""
    run: Any = fn if is_compiled(fn) else jax.jit(fn)
    costs = run.lower(*args).compile().cost_analysis() or {}
    note = "loops beyond their first turn, where there are any; custom calls (LAPACK, cuDNN)"
    return Counts(costs.get("flops", 0.0), costs.get("bytes accessed"), note)


def traced(call: Callable[[], Any], folder: Path, name: str) -> Path:
    """A trace of one call."""
    before = set(folder.rglob("perfetto_trace.json.gz"))
    with jax.profiler.trace(str(folder), create_perfetto_trace=True), jax.profiler.TraceAnnotation(name):
        synchronise(call())
    (made,) = set(folder.rglob("perfetto_trace.json.gz")) - before
    return made


def large(device: str, n: int, entries: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A product of n by n matrices, and a copy."""
    kind, _, index = device.partition(":")
    place = jax.devices("gpu" if kind == "cuda" else kind)[int(index or 0)]
    A, x = (jax.device_put(jnp.ones(shape, jnp.float32), place) for shape in ((n, n), (entries,)))
    product, copy = jax.jit(jnp.matmul), jax.jit(jnp.copy)
    return lambda: product(A, A), lambda: copy(x)
