"""The benchmark of every operation against hand-written framework code, interleaved in one run.

    gradlab bench --preset smoke|paper --framework jax|torch|both

Each framework runs in a process of its own. Every variant's result is compared first: one that is wrong
is listed as wrong and gets no speed. Each run appends one record a framework to bench.jsonl; one that was
stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gradlab._errors import TooLargeError
from gradlab.bench.clock import Timing, interleave, ratio
from gradlab.bench.record import append, environment

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "names": ["mlp_10k", "mlp_500", "solutions"],
        "repeats": 20,
        "budget": 1.0,
        "without": ("matmat, 8 directions | compiled", "matmat, 32 directions | compiled"),  # long to compile
    },
    "paper": {
        "names": ["mlp_10k", "mlp_784", "transformer_128", "mlp_500", "solutions"],
        "repeats": 40,
        "budget": 12.0,
        "without": (),
    },
}
OVERHEAD = "overhead"  # the last cell
EXAMPLES = 32  # of which gradients, norms and clipped sums are taken one by one
TOLERANCE = 2e-3  # relative to the largest entry: rounding in float32 is below, a wrong strategy far above


@dataclass
class Case:
    """One operation on one problem: gradlab's call, its hand-written rivals, and one gradient as the unit."""

    ours: Callable[[], Any]
    hand: Mapping[str, Callable[[], Any]]
    unit: Callable[[], Any]
    units: int = 1  # directions in one call: times are given per direction
    trusted: Callable[[], Any] | None = None  # what results are compared with; else the first rival
    unsafe: frozenset[str] = (
        frozenset()
    )  # rivals that are right here and wrong on other functions: no measure


@dataclass(frozen=True)
class Cell:
    """A case by its name, made when its turn comes; `lacks` says why this device cannot."""

    problem: str
    operation: str
    mode: str
    make: Callable[[], Case]
    lacks: str = ""

    @property
    def key(self) -> str:
        """By which a run that was stopped knows it."""
        return f"{self.problem} | {self.operation} | {self.mode}"

    def run(
        self, framework: str, device: str, synchronise: Callable[[Any], Any], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Its row: numbers, or why it was skipped, or how it failed."""
        row: dict[str, Any] = {"problem": self.problem, "operation": self.operation, "mode": self.mode}
        if self.lacks:
            return {**row, "skipped": self.lacks}
        try:
            case = self.make()
            row |= measure(case, synchronise, options["repeats"], options["budget"])
        except Exception as error:
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            return {**row, "skipped" if exhausted(error) else "failed": said}
        calls = {"gradlab": case.ours, **case.hand}
        compared = {name: calls[name] for name in ("gradlab", row["best_by_hand"])}
        for name, size in peaks(framework, compared, device).items():
            row["variants"][name]["bytes"] = size
        return row


def exhausted(error: BaseException) -> bool:
    """Whether the device's memory was too small."""
    words = str(error).lower()
    return (
        isinstance(error, (MemoryError, TooLargeError))
        or "out of memory" in words
        or "resource_exhausted" in words
    )


def measure(case: Case, synchronise: Callable[[Any], Any], repeats: int, budget: float) -> dict[str, Any]:
    """Check every variant, time the right ones against each other, and give their numbers."""
    variants = {"gradlab": case.ours, **case.hand}
    expected = _flat((case.trusted or next(iter(case.hand.values())))())
    errors = {name: _error(call, expected) for name, call in variants.items()}
    right = {name: call for name, call in variants.items() if errors[name] <= TOLERANCE}
    timings = interleave(
        {"gradient": case.unit, **right},
        synchronise=synchronise,
        repeats=repeats,
        budget_s=budget,
        warm="gradient",
    )
    rivals = {name: timings[name] for name in right if name != "gradlab" and name not in case.unsafe}
    best = min(rivals, key=lambda name: rivals[name].median_s)
    row: dict[str, Any] = {
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
    except Exception as refusal:  # a strategy the framework refuses here
        if exhausted(refusal):
            raise
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


def peaks(framework: str, calls: Mapping[str, Callable[[], Any]], device: str) -> dict[str, int | None]:
    """Peak bytes of each call; None where it cannot be measured."""
    from gradlab.bench.memory import peak

    found: dict[str, int | None] = {}
    for name, call in calls.items():
        fn, args = (call.func, call.args) if isinstance(call, partial) else (call, ())
        try:
            found[name] = peak(framework, fn, *args, device=device)
        except Exception:  # a call that cannot be traced again
            found[name] = None
    return found


def lacking(framework: str, device: str, dtype: str) -> str:
    """Why nothing can run on this device, or nothing."""
    if importlib.util.find_spec(framework) is None:
        return f"{framework} is not installed: pip install 'gradlab[{framework}]'"
    functions = importlib.import_module(f"gradlab.bench._{framework}")
    try:
        functions.arrays(np.ones(1), dtype, device)
    except Exception as error:
        return f"{device} in {dtype}: {str(error).splitlines()[0]}"
    return ""


def run_framework(
    framework: str, preset: str, device: str, dtype: str, done: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """In this process: the plan, then each cell's name and its row."""
    from gradlab.bench.record import accelerator

    if reason := lacking(framework, device, dtype):
        yield {"plan": [], "lacking": reason}
        return
    if framework == "jax" and dtype == "float64":
        import jax

        jax.config.update("jax_enable_x64", True)
    functions = importlib.import_module(f"gradlab.bench._{framework}")
    suite = importlib.import_module(f"gradlab.bench._suite_{framework}")
    options = PRESETS[preset]
    cells = [
        cell
        for cell in suite.cells(options["names"], dtype, device)
        if framework == "jax" or not cell.key.endswith(options["without"] or "\n")
    ]
    yield {"plan": [cell.key for cell in cells] + [OVERHEAD], "accelerator": accelerator(framework, device)}
    for cell in cells:
        if cell.key not in done:
            yield {"start": cell.key}
            yield {"cell": cell.key, "row": cell.run(framework, device, functions.synchronise, options)}
    if OVERHEAD not in done:
        yield {"cell": OVERHEAD, "row": {"overhead": overhead(framework)}}


def run(
    preset: str = "smoke",
    framework: str = "both",
    device: str = "cpu",
    dtype: str = "float32",
    out: str | Path = "results",
    fresh: bool = False,
) -> int:
    """Run the cells that are left, print the table, append the records; 1 if a result of gradlab's was wrong."""
    from gradlab.bench.console import console as terminal
    from gradlab.bench.suite_views import Bar, footnotes, table

    console, wrong = terminal(), False
    for name in ("jax", "torch") if framework == "both" else (framework,):
        config = {"framework": name, "preset": preset, "device": device, "dtype": dtype}
        kept = Unfinished(Path(out) / "bench.unfinished.jsonl", config, fresh)
        if kept.rows:
            console.print(f"{name}: goes on after {len(kept.rows)} cells (--fresh starts over)")
        try:
            with Bar(name, console) as bar:
                machine = _cells(config, kept, bar.show)
        except KeyboardInterrupt:
            console.print(
                f"{name}: stopped after {len(kept.rows)} cells; the same command goes on from there"
            )
            return 130
        rows = list(kept.rows.values())
        if reason := machine.get("lacking"):
            console.print(f"{name}: skipped, {reason}")
            continue
        here = environment() | ({"accelerator": machine["accelerator"]} if machine.get("accelerator") else {})
        record = {"benchmark": "operations", "config": config, "environment": here, "rows": rows}
        append(Path(out) / "bench.jsonl", record)
        kept.finish()
        console.print(table(name, rows), footnotes(rows))
        wrong = wrong or any(
            "skipped" not in row and "operation" in row and "ratio_to_best" not in row for row in rows
        )
    return int(wrong)


def _cells(config: dict[str, Any], kept: Unfinished, show: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Every cell in a child, and a new child where a cell ends it; what the child says of its device."""
    while True:
        machine, on, status = _child(config, kept, show)
        if status == 0:
            return machine
        if not on:
            raise RuntimeError(f"the benchmark of {config['framework']} ended with status {status}")
        kept.add(on, {**_named(on), "failed": f"ended its process with status {status}"})


def _child(
    config: dict[str, Any], kept: Unfinished, show: Callable[[str, int, int], None]
) -> tuple[dict[str, Any], str, int]:
    """The first line of a child, the cell that it was at when it ended, and how it ended."""
    command = [sys.executable, "-m", "gradlab.bench.suite", json.dumps({**config, "done": list(kept.rows)})]
    quiet = {**os.environ, "KINETO_LOG_LEVEL": "99"}
    machine: dict[str, Any] = {"plan": []}
    on = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet) as child:
        assert child.stdout is not None
        for line in child.stdout:
            said = json.loads(line) if line.startswith("{") else {}
            if "plan" in said:
                machine = said
            elif "cell" in said:
                kept.add(said["cell"], said["row"])
            on = said.get("start", "" if "cell" in said else on)
            show(on, len(kept.rows), len(machine["plan"]))
        return machine, on, child.wait()


def _named(key: str) -> dict[str, str]:
    return dict(zip(("problem", "operation", "mode"), key.split(" | "), strict=True))


class Unfinished:
    """The cells of a run that has not ended, a line each, in a file beside the records.

    They count for a run of the same framework, preset, device and dtype by the same code and versions alone.
    """

    def __init__(self, path: Path, config: dict[str, Any], fresh: bool):
        versions = environment()["versions"]
        self.path, self.run = path, json.dumps([config, versions, digest()], sort_keys=True)
        self.others: list[str] = []
        self.rows: dict[str, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                said = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if said["run"] != self.run:
                self.others.append(line)
            elif not fresh:
                self.rows[said["cell"]] = said["row"]
        if fresh:
            self.finish()

    def add(self, cell: str, row: dict[str, Any]) -> None:
        """One more is done."""
        self.rows[cell] = row
        append(self.path, {"run": self.run, "cell": cell, "row": row})

    def finish(self) -> None:
        """Leave the other runs' cells."""
        if self.others:
            self.path.write_text("".join(line + "\n" for line in self.others))
        else:
            self.path.unlink(missing_ok=True)


def digest() -> str:
    """Of the package's own code: what differs may cost something else."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    try:
        for finding in run_framework(**json.loads(sys.argv[1])):
            print(json.dumps(finding), flush=True)
    except KeyboardInterrupt:  # the parent says so
        sys.exit(130)
