"""What does a dense Jacobian cost in each mode, and where does `auto` have to turn from one to the other?

    python experiments/jacobian_scaling.py --framework both --preset smoke|paper --device cpu --out results

y = B tanh(C tanh(A x)) with n inputs and m outputs. Expected: a product costs about the same in either mode, so that
forward wins below about `FORWARD_UP_TO` m inputs (`transforms/jacobians/modes.py`), or `FORWARD_UP_TO_LOOPED` m in jax
on a CPU, where reverse is never batched: the crossovers that the record gives; products in chunks of `PUSHES` and
`DIRECTIONS` (`transforms/operators`) are within a tenth of the best. Aborts where a Jacobian is not that of
extrapolated differences in float64. One line a framework in results/jacobian_scaling.jsonl, a table, a figure.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track
from rich.table import Table

from gradlab.bench.console import console
from gradlab.bench.record import in_each_framework, keep
from gradlab.bench.suite import Case, Cell
from gradlab.cli import Framework, OneDtype, Preset

HIDDEN = 128
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"fixed": (128,), "sizes": (32, 128, 512), "chunks": (16, 256), "square": 512},
    "paper": {
        "fixed": (256,),
        "sizes": (16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
        "chunks": (1, 16, 64, 256, 1024, 4096),
        "square": 2048,
    },
}
OPTIONS = {"smoke": {"repeats": 12, "budget": 0.6}, "paper": {"repeats": 30, "budget": 1.5}}


class Setup:
    """The function, a point and the framework's own ways."""

    def __init__(self, framework: str, n: int, m: int, device: str, dtype: str):
        side = importlib.import_module(f"gradlab.bench._{framework}")
        self.gl = importlib.import_module(f"gradlab.{framework}")
        rng = np.random.default_rng(0)
        shapes = ((HIDDEN, n), (HIDDEN, HIDDEN), (m, HIDDEN), (n,))
        found = side.arrays([rng.normal(size=s) / s[-1] ** 0.5 for s in shapes], dtype, device)
        A, C, B, self.x = found
        self.looped = framework == "jax" and device == "cpu" and dtype == "float32"
        if framework == "jax":
            import jax

            tanh, self.compiled, self.grad = jax.numpy.tanh, jax.jit, jax.grad
            self.own = {"jacfwd": jax.jacfwd, "jacrev": jax.jacrev}
        else:
            import torch

            tanh, self.compiled, self.grad = torch.tanh, lambda f: f, torch.func.grad
            self.own = {"jacfwd": torch.func.jacfwd, "jacrev": torch.func.jacrev}
        self.f = lambda x: B @ tanh(C @ tanh(A @ x))

    def jacobian(self, **how: Any) -> Any:
        """Of f at the point, by gradlab."""
        return partial(self.compiled(lambda x: self.gl.jacobian(self.f, x, **how)), self.x)

    def case(self, chunk: int | None, own: bool) -> Case:
        """Auto beside each mode, all with these products at once."""
        hand = {mode: self.jacobian(mode=mode, chunk_size=chunk) for mode in ("forward", "reverse")}
        if own:
            hand |= {name: partial(self.compiled(way(self.f)), self.x) for name, way in self.own.items()}
        unit = partial(self.compiled(self.grad(lambda x: self.f(x).sum())), self.x)
        case = Case(self.jacobian(), hand, unit)
        if self.looped:
            case.unsafe = frozenset({"jacrev"})  # a batched pullback, which XLA compiles wrongly on a CPU
        return case


def verified(framework: str, device: str) -> None:
    """Abort unless both modes give the extrapolated differences in float64."""
    s = Setup(framework, 12, 7, device, "float64")
    e = np.eye(12)
    side = importlib.import_module(f"gradlab.bench._{framework}")
    at = lambda i, h: np.asarray(s.f(s.x + side.arrays(h * e[i], "float64", device)))
    slope = lambda i, h: (at(i, h) - at(i, -h)) / (2 * h)
    expected = np.stack([(4 * slope(i, 1e-3) - slope(i, 2e-3)) / 3 for i in range(12)], axis=1)
    for mode in ("auto", "forward", "reverse"):
        error = np.abs(np.asarray(s.jacobian(mode=mode)()) - expected).max()
        if not error < 1e-10:
            raise SystemExit(f"{framework}: {mode} is off by {error:.1e}; nothing is timed")


def cells(framework: str, preset: str, device: str, dtype: str) -> Iterator[tuple[dict[str, Any], Cell]]:
    """The keys of a row, and how it is measured."""
    chosen, mode = PRESETS[preset], "compiled" if framework == "jax" else "eager"

    def cell(axis: str, n: int, m: int, chunk: int | None = None) -> Any:
        make = lambda: Setup(framework, n, m, device, dtype).case(chunk, own=chunk is None)
        keys = {"axis": axis, "inputs": n, "outputs": m, "chunk": chunk or 0}
        return keys, Cell(axis, f"{n} x {m}", mode, make)

    for fixed in chosen["fixed"]:
        for size in chosen["sizes"]:
            yield cell(f"inputs, {fixed} outputs", size, fixed)
        for size in chosen["sizes"]:
            yield cell(f"outputs, {fixed} inputs", fixed, size)
    for chunk in chosen["chunks"]:
        yield cell("chunk", chosen["square"], chosen["square"], chunk)


def crossovers(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Inputs an output at which both modes take the same time, of each axis on which they cross."""
    found = {}
    for axis in dict.fromkeys(row["axis"] for row in rows if row["axis"] != "chunk"):
        points = []
        for row in rows:
            times = {name: v.get("median_s") for name, v in row.get("variants", {}).items()}
            if row["axis"] == axis and times.get("forward") and times.get("reverse"):
                points.append(
                    (math.log(row["inputs"] / row["outputs"]), math.log(times["forward"] / times["reverse"]))
                )
        points.sort()
        for (a, low), (b, high) in pairwise(points):
            if low <= 0 < high:
                found[axis] = math.exp(a - low * (b - a) / (high - low))
    return found


def measure(framework: str, preset: str, device: str, dtype: str) -> list[dict[str, Any]]:
    """A row a cell."""
    verified(framework, device)
    side = importlib.import_module(f"gradlab.bench._{framework}")
    rows = []
    for keys, cell in track(list(cells(framework, preset, device, dtype)), framework, console=console()):
        row = cell.run(framework, device, side.synchronise, OPTIONS[preset])
        rows.append(
            {**keys, **{key: value for key, value in row.items() if key not in ("problem", "operation")}}
        )
    return rows


def show(framework: str, rows: list[dict[str, Any]]) -> None:
    """A line a row, and the crossovers."""
    table = Table(
        "axis", "inputs", "outputs", "chunk", "auto", "forward", "reverse", "auto / best", title=framework
    )
    for row in rows:
        if "ratio_to_best" in row:
            of = lambda name, row=row: f"{row['variants'][name].get('gradients', float('nan')):.1f}"
            middle, low, high = row["ratio_to_best"]
            sizes = (str(row[key]) for key in ("inputs", "outputs", "chunk"))
            names = (of(name) for name in ("gradlab", "forward", "reverse"))
            table.add_row(row["axis"], *sizes, *names, f"{middle:.2f} ({low:.2f} to {high:.2f})")
    console().print(table)
    for axis, ratio in crossovers(rows).items():
        console().print(f"{framework}, {axis}: the modes cross at {ratio:.2f} inputs an output")


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Time in gradients of each mode against inputs, outputs and chunk: a row a framework."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axes_of = list(dict.fromkeys(row["axis"] for row in records[0]["rows"]))
    figure, axes = plt.subplots(
        len(records), len(axes_of), figsize=(3.4 * len(axes_of), 3.3 * len(records)), squeeze=False
    )
    colours = {"gradlab": "black", "forward": "C0", "reverse": "C1", "jacfwd": "C9", "jacrev": "C3"}
    for line, record in zip(axes, records, strict=True):
        for panel, axis in zip(line, axes_of, strict=True):
            rows = [row for row in record["rows"] if row["axis"] == axis and "variants" in row]
            key = axis.split(",")[0]
            for name, colour in colours.items():
                points = [
                    (row[key], row["variants"][name]["gradients"])
                    for row in rows
                    if "gradients" in row["variants"].get(name, {})
                ]
                style = (
                    {"lw": 3.5, "alpha": 0.35} if name == "gradlab" else {"lw": 1.3, "marker": "o", "ms": 3}
                )
                if points:
                    panel.loglog(*zip(*points, strict=True), color=colour, label=name, **style)
            panel.set_title(f"{record['config']['framework']}: {axis}", fontsize=9)
            panel.set_xlabel(key)
            panel.grid(alpha=0.3)
        line[0].set_ylabel("time in gradients")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    framework: Framework = Framework.both,
    preset: Preset = Preset.smoke,
    device: str = "cpu",
    dtype: OneDtype = OneDtype.float32,
    out: Path = Path("results"),
) -> None:
    """Measure one framework a process, then draw what was measured."""
    path = out / "jacobian_scaling.jsonl"
    if framework is Framework.both:
        flags = {"preset": preset.value, "device": device, "dtype": dtype.value, "out": out}
        draw(in_each_framework(__file__, path, **flags), out / "jacobian_scaling.png")
        return
    os.environ["JAX_ENABLE_X64"] = "1"  # for the differences
    rows = measure(framework.value, preset.value, device, dtype.value)
    config = {"framework": framework.value, "preset": preset.value, "device": device, "dtype": dtype.value}
    keep(path, "jacobian_scaling", config, crossovers=crossovers(rows), rows=rows)
    show(framework.value, rows)


if __name__ == "__main__":
    typer.run(main)
