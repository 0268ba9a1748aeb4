"""The benchmark of every operation against hand-written framework code, interleaved in one run.

    gradlab bench --preset smoke|paper --framework jax|torch|both

Each framework runs in a process of its own. Every variant's result is compared first: one that is wrong
is listed as wrong and gets no speed. Each run appends one record a framework to bench.jsonl.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradlab.bench.clock import Timing, interleave, ratio
from gradlab.bench.record import append, environment

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"names": ["mlp_10k", "mlp_500"], "repeats": 20, "budget": 1.5},
    "paper": {"names": ["mlp_10k", "mlp_784", "transformer_128", "mlp_500"], "repeats": 40, "budget": 12.0},
}
EXAMPLES = 32  # of which gradients, norms and clipped sums are taken one by one
TOLERANCE = 2e-3  # relative to the largest entry: rounding in float32 is below, a wrong strategy far above


@dataclass
class Case:
    """One operation on one problem: gradlab's call, its hand-written rivals, and one gradient as the unit."""

    problem: str
    operation: str
    mode: str
    ours: Callable[[], Any]
    hand: Mapping[str, Callable[[], Any]]
    unit: Callable[[], Any]
    units: int = 1  # directions in one call: times are given per direction
    trusted: Callable[[], Any] | None = None  # what results are compared with; else the first rival
    unsafe: frozenset[str] = (
        frozenset()
    )  # rivals that are right here and wrong on other functions: no measure


def measure(case: Case, synchronise: Callable[[Any], Any], repeats: int, budget: float) -> dict[str, Any]:
    """Check every variant, time the right ones against each other, and give one row."""
    variants = {"gradlab": case.ours, **case.hand}
    expected = _flat((case.trusted or next(iter(case.hand.values())))())
    errors = {name: _error(call, expected) for name, call in variants.items()}
    right = {name: call for name, call in variants.items() if errors[name] <= TOLERANCE}
    timings = interleave(
        {"gradient": case.unit, **right}, synchronise=synchronise, repeats=repeats, budget_s=budget
    )
    rivals = {name: timings[name] for name in right if name != "gradlab" and name not in case.unsafe}
    best = min(rivals, key=lambda name: rivals[name].median_s)
    row: dict[str, Any] = {
        "problem": case.problem,
        "operation": case.operation,
        "mode": case.mode,
        "best_by_hand": best,
        "gradient_s": timings["gradient"].median_s,
        "variants": {
            name: {
                "error": errors[name],
                **_numbers(timings.get(name), timings["gradient"], case.units),
                **({"verdict": "right here, wrong elsewhere"} if name in case.unsafe else {}),
            }
            for name in variants
        },
    }
    if "gradlab" in right:
        row["ratio_to_best"] = ratio(timings["gradlab"], rivals[best])
    return row


def _numbers(timing: Timing | None, unit: Timing, units: int) -> dict[str, Any]:
    """What is said of a variant: nothing of speed when its result was wrong."""
    if timing is None:
        return {"verdict": "wrong"}
    return {
        "verdict": "right",
        "first_s": timing.first_s,
        "median_s": timing.median_s,
        "spread_s": timing.spread_s,
        "gradients": ratio(timing, unit)[0] / units,
    }


def _error(call: Callable[[], Any], expected: np.ndarray) -> float:
    try:
        actual = _flat(call())
    except Exception:  # a strategy the framework refuses here
        return float("inf")
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    return float(error) if np.isfinite(error) else float("inf")


def _flat(tree: Any) -> np.ndarray:
    if isinstance(tree, dict):
        tree = [tree[key] for key in sorted(tree)]
    if isinstance(tree, (list, tuple)):
        return np.concatenate([_flat(child) for child in tree])
    return np.asarray(tree.detach().cpu() if hasattr(tree, "detach") else tree, np.float64).reshape(-1)


def overhead(framework: str) -> dict[str, float]:
    """Microseconds a call spends before the framework's own work, for a tree of ten leaves.

    `dispatch` is the façade alone; `checks` the door of an operation: taking the tree apart, comparing
    the direction with it.
    """
    import timeit

    from gradlab._dispatch import framework_of

    functions = importlib.import_module(f"gradlab.bench._{framework}")
    Tree = importlib.import_module(f"gradlab.transforms.trees._{framework}").Tree
    tree = functions.arrays({f"k{i}": np.ones(3) for i in range(10)}, "float32")
    f = lambda x: x

    def door() -> Any:
        point = Tree("hvp", "x", tree)
        return point.put(point.direction(tree))

    micro = lambda call: min(timeit.repeat(call, number=2000, repeat=5)) / 2000 * 1e6
    return {"dispatch_us": micro(lambda: framework_of("hvp", (f, tree, tree))), "checks_us": micro(door)}


def memory(framework: str, problem: str, device: str, dtype: str) -> list[dict[str, Any]]:
    """Peak bytes of one hvp and of eight directions, gradlab's and by hand; run in a child process."""
    from gradlab.bench.memory import peak

    suite = importlib.import_module(f"gradlab.bench._suite_{framework}")
    return [
        {
            "problem": problem,
            "operation": case.operation,
            "bytes": {
                name: peak(framework, call, device=device)
                for name, call in {"gradlab": case.ours, **case.hand}.items()
            },
        }
        for case in suite.held(suite.Setup(problem, dtype, device))
    ]


def run_framework(framework: str, preset: str, device: str, dtype: str) -> Iterator[dict[str, Any]]:
    """Rows of one framework, in this process: first each operation's, last memory and overhead."""
    functions = importlib.import_module(f"gradlab.bench._{framework}")
    suite = importlib.import_module(f"gradlab.bench._suite_{framework}")
    options = PRESETS[preset]
    for case in suite.cases(options["names"], dtype, device, compile=True):
        yield measure(case, functions.synchronise, options["repeats"], options["budget"])
    for problem in (name for name in options["names"] if name != "mlp_500"):
        yield from memory(framework, problem, device, dtype)
    yield {"overhead": overhead(framework)}


def run(
    preset: str = "smoke",
    framework: str = "both",
    device: str = "cpu",
    dtype: str = "float32",
    out: str | Path = "results",
) -> int:
    """Run the benchmark, print the table, append the records; 1 if a result of gradlab's was wrong."""
    from gradlab.bench.console import console as terminal

    console, wrong = terminal(), False
    for name in ("jax", "torch") if framework == "both" else (framework,):
        rows = list(_child(name, preset, device, dtype, console))
        append(Path(out) / "bench.jsonl", _record(name, preset, device, dtype, rows))
        console.print(table(name, rows), footnotes(rows))
        wrong = wrong or any("variants" in row and "ratio_to_best" not in row for row in rows)
    return int(wrong)


def _record(
    framework: str, preset: str, device: str, dtype: str, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    config = {"framework": framework, "preset": preset, "device": device, "dtype": dtype}
    return {"benchmark": "operations", "config": config, "environment": environment(), "rows": rows}


def _child(framework: str, preset: str, device: str, dtype: str, console: Any) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "gradlab.bench.suite", framework, preset, device, dtype]
    quiet = {**os.environ, "KINETO_LOG_LEVEL": "99"}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet) as child,
        console.status(f"{framework}: starting") as status,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("{"):
                row = json.loads(line)
                status.update(f"{framework}: {row.get('problem', '')} {row.get('operation', '')}")
                yield row
        if child.wait():
            raise RuntimeError(f"the benchmark of {framework} ended with status {child.returncode}")


def table(framework: str, rows: list[dict[str, Any]]) -> Any:
    """One line a case: gradlab, the best by hand, their ratio with its quartiles; in gradients a product."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = ("problem", "operation", "mode", "gradlab", "by hand", "best by hand", "ratio")
    shown = Table(*columns, title=framework, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        if "variants" not in row:
            continue
        best, ours = row["best_by_hand"], row["variants"]["gradlab"]
        middle, low, high = row.get("ratio_to_best", (float("nan"),) * 3)
        notes = [_note(name, v) for name, v in row["variants"].items() if v["verdict"] != "right"]
        shown.add_row(
            row["problem"],
            row["operation"],
            row["mode"],
            f"{ours['gradients']:.2f}" if "gradients" in ours else "WRONG",
            f"{row['variants'][best]['gradients']:.2f}",
            "; ".join([best, *notes]),
            f"{middle:.2f} ({low:.2f}-{high:.2f})",
        )
    shown.caption = (
        "times in gradients of the same framework and mode, a direction; "
        "unsafe: right here, wrong on other functions (docs/decisions.md)"
    )
    return shown


def footnotes(rows: list[dict[str, Any]]) -> str:
    """Peak memory and the overhead of a call, a line each."""
    size = lambda count: "unknown" if count is None else f"{count / 2**20:.1f}"
    lines = [
        f"peak MiB, {row['problem']}, {row['operation']}: "
        + ", ".join(f"{name} {size(count)}" for name, count in row["bytes"].items())
        for row in rows
        if "bytes" in row
    ]
    costs: dict[str, float] = next((row["overhead"] for row in rows if "overhead" in row), {})
    lines += [
        f"{name.removesuffix('_us')}: {cost:.1f} µs a call of ten leaves" for name, cost in costs.items()
    ]
    return "\n".join(lines)


def _note(name: str, variant: dict[str, Any]) -> str:
    """Why a rival does not count."""
    if "gradients" in variant:
        return f"{name} {variant['gradients']:.2f}: unsafe"
    return f"{name}: wrong by {variant['error']:.0e}" if np.isfinite(variant["error"]) else f"{name}: raises"


if __name__ == "__main__":
    for finding in run_framework(*sys.argv[1:]):
        print(json.dumps(finding), flush=True)
