"""Can a measurement be believed: exact counts, true rates, a slow-down of 5 % seen, and none seen where there is none?

    python experiments/profile_resolution.py --framework both --preset smoke|paper --out results

Expected: a matrix product and a copy have exactly the operations that the formula gives, and the rate of a loop
timed by hand to 5 %; of calls of about 5 ms, one made 5 % longer is told apart from the other, and a call is told
apart from itself in at most one of 20 runs. One line a framework in results/profile_resolution.jsonl.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track
from rich.table import Table

from gradlab.bench import append, compare, environment, profile
from gradlab.bench.console import console
from gradlab.bench.record import in_each_framework
from gradlab.cli import Framework, Preset

RUNS = {"smoke": 4, "paper": 20}
BUDGET_S = {"smoke": 2.0, "paper": 6.0}
N, ENTRIES = 512, 2**22


def by_hand(side: Any, call: Any, seconds: float = 2.0) -> float:
    """Seconds of a call in a plain loop: the median of its turns."""
    side.synchronise(call())
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        side.synchronise(call())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def workload(framework: str) -> tuple[Any, Any, Any, Any, Any]:
    """A product, a copy, their arguments, and a chain of small products `(count) -> call`."""
    rng = np.random.default_rng(0)
    A, x, small = (rng.normal(size=s).astype(np.float32) for s in ((N, N), (ENTRIES,), (96, 96)))
    small = np.linalg.qr(small)[
        0
    ]  # orthogonal: a chain of products neither grows nor falls below normal numbers
    if framework == "jax":
        import jax
        import jax.numpy as jnp

        A, x, small = map(jnp.asarray, (A, x, small))
        step = jax.jit(jnp.matmul)
        return jax.jit(jnp.matmul), jax.jit(jnp.copy), A, x, lambda count: _chain(step, small, count)
    import torch

    torch.set_num_threads(1)
    A, x, small = map(torch.as_tensor, (A, x, small))
    return torch.matmul, torch.clone, A, x, lambda count: _chain(torch.matmul, small, count)


def _chain(step: Any, a: Any, count: int) -> Any:
    def call() -> Any:
        y = a
        for _ in range(count):
            y = step(y, a)
        return y

    return call


def measure(framework: str, preset: str) -> dict[str, Any]:
    """Counts and rates, then the comparisons."""
    side: Any = importlib.import_module(f"gradlab.bench._profile_{framework}")
    product, copy, A, x, chain = workload(framework)
    rows: dict[str, Any] = {}
    for name, fn, args, flops, moved in (
        ("product", product, (A, A), 2 * N**3, 3 * 4 * N**2),
        ("copy", copy, (x,), 0, 2 * 4 * ENTRIES),
    ):
        call = lambda fn=fn, args=args: fn(*args)
        turns = [(profile(fn, *args, budget_s=0.5), by_hand(side, call, 0.5)) for _ in range(7)]
        found = turns[0][0]
        rows[name] = {
            "flops": [found.counts.flops, flops],
            "bytes": [found.counts.bytes, moved],
            "seconds": [[found.seconds, hand] for found, hand in turns],
        }
        if found.counts.flops != flops or found.counts.bytes != moved:
            raise SystemExit(f"{framework}, {name}: counted {found.counts}, it is {flops} and {moved}")
    count = max(20, round(5e-3 / (by_hand(side, chain(20), 0.5) / 20) / 20) * 20)
    seen: dict[str, list[list[float]]] = {"same": [], "5 % longer": []}
    for _ in track(range(RUNS[preset]), framework, console=console()):
        for name, longer in (("same", count), ("5 % longer", count + count // 20)):
            calls = {"one": chain(count), "other": chain(longer)}
            found = compare(calls, framework=framework, budget_s=BUDGET_S[preset], precision=0.004)
            seen[name].append(list(found.ratio("other")))
    rows["ratios"] = seen
    rows["told apart"] = {
        name: sum(low > 1 or high < 1 for _, low, high in ratios) for name, ratios in seen.items()
    }
    return rows


def main(
    framework: Framework = Framework.both, preset: Preset = Preset.smoke, out: Path = Path("results")
) -> None:
    """Measure each framework in a process of its own."""
    path = out / "profile_resolution.jsonl"
    if framework is Framework.both:
        in_each_framework(__file__, path, preset=preset.value, out=out)
        return
    rows = measure(framework.value, preset.value)
    config = {"framework": framework.value, "preset": preset.value, "device": "cpu"}
    append(
        path,
        {"experiment": "profile_resolution", "config": config, "environment": environment(), "rows": rows},
    )
    table = Table("call", "measured / by hand", "told apart", title=framework.value)
    for name in ("product", "copy"):
        ratio = np.median([ours / hand for ours, hand in rows[name]["seconds"]])
        table.add_row(name, f"{ratio:.3f}", "")
    for name, count in rows["told apart"].items():
        table.add_row(name, "", f"{count} of {RUNS[preset.value]}")
    console().print(table)


if __name__ == "__main__":
    typer.run(main)
