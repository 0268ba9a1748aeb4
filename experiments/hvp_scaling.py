"""What does a Hessian-vector product cost against parameters, directions, batch and order, and is `auto` the best?

    python experiments/hvp_scaling.py --framework both --preset smoke|paper --device cpu --out results

A tanh network. Along each axis gradlab's own choice stands beside every explicit one, in gradients of the same
framework and mode. Expected: two to four gradients at any size; auto within a tenth of the best, so that in jax on a
CPU it is on the right side of where a batch of directions gets slower than a loop over them (`second_order` in
`transforms/linearised/_jax.py`); but from 10^6 parameters in jax up to 1.4 times the best, as reverse mode outside is
faster there, which a loop in a rule's backward pass does not allow. Aborts where a product is not that of
extrapolated differences in float64. One line a framework in results/hvp_scaling.jsonl, a table, a figure.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track
from rich.table import Table

from gradlab.bench.console import console
from gradlab.bench.record import in_each_framework, keep
from gradlab.bench.solutions import network
from gradlab.bench.suite import Case, Cell, peaks
from gradlab.cli import Framework, OneDtype, Preset

INPUTS, OUTPUTS, BATCH = 16, 10, 64
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "decades": (2, 3, 4),
        "directions": (1, 8, 64),
        "batches": (16, 128, 1024),
        "orders": (1, 2, 3),
    },
    "paper": {
        "decades": (2, 3, 4, 5, 6, 7, 8),
        "directions": (1, 2, 4, 8, 16, 32, 64, 128, 256),
        "batches": (8, 16, 32, 64, 128, 256, 512, 1024, 2048),
        "orders": (1, 2, 3, 4),
    },
}
OPTIONS = {"smoke": {"repeats": 12, "budget": 0.8}, "paper": {"repeats": 30, "budget": 3.0}}
COMPILED = {"smoke": (), "paper": (2, 4, 6)}  # decades of parameters at which torch compiles


class Setup:
    """A loss of about n parameters in either framework, its gradient as the unit, and directions."""

    def __init__(self, framework: str, n: int, batch: int, device: str, dtype: str):
        side = importlib.import_module(f"gradlab.bench._{framework}")
        self.gl = importlib.import_module(f"gradlab.{framework}")
        width = max(2, round((-(INPUTS + OUTPUTS) + ((INPUTS + OUTPUTS) ** 2 + 4 * n) ** 0.5) / 2))
        params, rng = network((INPUTS, width, width, OUTPUTS), 0), np.random.default_rng(1)
        self.n = sum(leaf.size for leaf in params.values())
        X, y = rng.normal(size=(batch, INPUTS)), rng.normal(size=(batch, OUTPUTS))
        self.v = {name: rng.normal(size=leaf.shape) for name, leaf in params.items()}
        self.numpy = (params, X, y)
        self.array = lambda tree, dtype=dtype: side.arrays(tree, dtype, device)
        self.params, self.X, self.y = self.array((params, X, y))
        tanh = importlib.import_module("jax.numpy" if framework == "jax" else "torch").tanh

        def loss(p: Any, X: Any, y: Any) -> Any:
            h = tanh(tanh(X @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"])
            return ((h @ p["w2"] + p["b2"] - y) ** 2).mean()

        self.loss = loss

    def stacked(self, k: int) -> Any:
        """k directions."""
        rng = np.random.default_rng(2)
        return self.array({name: rng.normal(size=(k, *leaf.shape)) for name, leaf in self.v.items()})


def transforms(framework: str) -> tuple[Any, Any, Any]:
    """grad, jvp and compile of a framework; torch's eager gradient is that of a recorded graph."""
    if framework == "jax":
        import jax

        return jax.grad, jax.jvp, jax.jit
    import torch

    from gradlab.bench._torch import grad

    return grad, torch.func.jvp, lambda f: f


def verified(framework: str, device: str) -> None:
    """Abort unless every strategy gives the extrapolated difference of gradients in float64."""
    s = Setup(framework, 300, 8, device, "float64")
    grad, _, _ = transforms(framework)
    to = lambda tree: np.concatenate([np.asarray(tree[key]).ravel() for key in sorted(tree)])
    length = sum((leaf**2).sum() for leaf in s.v.values()) ** 0.5
    v = s.array({name: leaf / length for name, leaf in s.v.items()})
    moved = lambda h: {name: s.params[name] + h * v[name] for name in v}
    slope = lambda h: (to(grad(s.loss)(moved(h), s.X, s.y)) - to(grad(s.loss)(moved(-h), s.X, s.y))) / (2 * h)
    expected = (4 * slope(1e-3) - slope(2e-3)) / 3
    H = s.gl.hessian_operator(s.loss, s.params, s.X, s.y)
    found = {name: s.gl.hvp(s.loss, s.params, v, s.X, s.y, strategy=name) for name in STRATEGIES}
    found |= {
        "operator": H @ v,
        "many": {k: leaf[0] for k, leaf in H.matmat({k: v[k][None] for k in v}).items()},
    }
    for name, product in found.items():
        error = np.abs(to(product) - expected).max() / np.abs(expected).max()
        if not error < 1e-8:
            raise SystemExit(f"{framework}: {name} is off by {error:.1e}; nothing is timed")


STRATEGIES = ("auto", "forward_over_reverse", "reverse_over_reverse", "reverse_over_forward")


def product(framework: str, s: Setup, mode: str = "compiled") -> Case:
    """One product, by every strategy."""
    grad, _, compiled = transforms(framework)
    if framework == "torch" and mode == "compiled":
        import torch

        torch._dynamo.reset()
        compiled, grad = partial(torch.compile, fullgraph=True), torch.func.grad
    v = s.array(s.v)
    of = lambda how: partial(
        compiled(lambda p, v, X, y: s.gl.hvp(s.loss, p, v, X, y, strategy=how)), s.params, v, s.X, s.y
    )
    named = STRATEGIES[1:] if framework == "jax" or mode == "eager" else STRATEGIES[2:3]
    unit = partial(compiled(grad(s.loss)), s.params, s.X, s.y)
    hand = {name.replace("_", " "): of(name) for name in named}
    return Case(of("auto"), hand, unit, trusted=hand["reverse over reverse"])


def several(framework: str, s: Setup, k: int) -> Case:
    """k products at one point: a batch of them, one after the other, and auto."""
    grad, _, compiled = transforms(framework)
    V = s.stacked(k)
    of = lambda chunk: partial(
        compiled(lambda p, V, X, y: s.gl.hessian_operator(s.loss, p, X, y, chunk_size=chunk).matmat(V)),
        s.params, V, s.X, s.y,
    )  # fmt: skip
    unit = partial(compiled(grad(s.loss)), s.params, s.X, s.y)
    return Case(of(None), {"one by one": of(1), "a batch": of(k)}, unit, units=k)


def nested(framework: str, s: Setup, order: int) -> Case:
    """The gradient of the derivative of order - 1 along a direction: by gradlab's hvp inside, and by grad alone."""
    if framework == "jax":
        import jax

        grad, compiled = jax.grad, jax.jit
    else:
        import torch

        grad, compiled = torch.func.grad, lambda f: f
    v = s.array(s.v)
    dot = lambda a: sum((a[name] * v[name]).sum() for name in v)
    plain, ours = s.loss, s.loss
    for _ in range(order - 1):
        plain = lambda p, X, y, f=plain: dot(grad(f)(p, X, y))
    for turn in range(order // 2):  # v·(∇²f) v raises the order by two
        if turn < (order - 1) // 2:
            ours = lambda p, X, y, f=ours: dot(s.gl.hvp(f, p, v, X, y))
    last = grad(ours) if order % 2 else lambda p, X, y: s.gl.hvp(ours, p, v, X, y)
    at = (s.params, s.X, s.y)
    unit = partial(compiled(transforms(framework)[0](s.loss)), *at)
    return Case(partial(compiled(last), *at), {"grad nested": partial(compiled(grad(plain)), *at)}, unit)


def cells(framework: str, preset: str, device: str, dtype: str) -> Iterator[tuple[dict[str, Any], Cell]]:
    """The keys of a row, and how it is measured."""
    chosen = PRESETS[preset]
    mode = "compiled" if framework == "jax" else "eager"

    def cell(
        axis: str, make: Callable[[Setup], Case], n: int, mode: str = mode, k: int = 1, **keys: Any
    ) -> Any:
        batch = keys.get("batch", BATCH)
        setup = lambda: make(Setup(framework, n, batch, device, dtype))
        row = {"axis": axis, "parameters": n, "batch": batch, "directions": k, "order": 2, **keys}
        return row, Cell(axis, str(row[axis]), mode, setup)

    for decade in chosen["decades"]:
        yield cell("parameters", partial(product, framework, mode=mode), 10**decade)
        if framework == "torch" and decade in COMPILED[preset]:
            yield cell("parameters", partial(product, framework, mode="compiled"), 10**decade, "compiled")
    for k in chosen["directions"]:
        yield cell("directions", partial(several, framework, k=k), 10**4, k=k)
    for batch in chosen["batches"]:
        yield cell("batch", partial(several, framework, k=32), 10**4, k=32, batch=batch)
    for order in chosen["orders"]:
        yield cell("order", partial(nested, framework, order=order), 10**4, order=order)


def measure(framework: str, preset: str, device: str, dtype: str) -> list[dict[str, Any]]:
    """A row a cell: checked, timed, and the memory of every right variant."""
    verified(framework, device)
    side = importlib.import_module(f"gradlab.bench._{framework}")
    rows = []
    for keys, cell in track(list(cells(framework, preset, device, dtype)), framework, console=console()):
        kept: list[Case] = []
        watched = Cell(
            cell.problem, cell.operation, cell.mode, lambda cell=cell, kept=kept: remembered(cell, kept)
        )
        row = watched.run(framework, device, side.synchronise, OPTIONS[preset])
        if "variants" in row:
            calls = {
                name: call for name, call in kept[0].hand.items() if "bytes" not in row["variants"][name]
            }
            for name, size in peaks(framework, calls, device).items():
                row["variants"][name]["bytes"] = size
        rows.append(
            {**keys, **{key: value for key, value in row.items() if key not in ("problem", "operation")}}
        )
    return rows


def remembered(cell: Cell, kept: list[Case]) -> Case:
    """The case, which the memory of its variants is taken of later."""
    kept.append(cell.make())
    return kept[0]


def show(framework: str, rows: list[dict[str, Any]]) -> None:
    """A line a row."""
    table = Table(
        "axis", "at", "mode", "auto, gradients", "best of the others", "auto / best", title=framework
    )
    for row in rows:
        at = f"{row[row['axis']]:,}"
        if "ratio_to_best" not in row:
            table.add_row(row["axis"], at, row["mode"], "", row.get("skipped", "WRONG"), "")
            continue
        best = row["best_by_hand"]
        ours, theirs = (f"{row['variants'][name]['gradients']:.2f}" for name in ("gradlab", best))
        middle, low, high = row["ratio_to_best"]
        table.add_row(
            row["axis"], at, row["mode"], ours, f"{theirs} {best}", f"{middle:.2f} ({low:.2f} to {high:.2f})"
        )
    console().print(table)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Gradients a product against each axis: a row a framework."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axes_of = ("parameters", "directions", "batch", "order")
    figure, axes = plt.subplots(len(records), 4, figsize=(14, 3.3 * len(records)), squeeze=False)
    for line, record in zip(axes, records, strict=True):
        for panel, axis in zip(line, axes_of, strict=True):
            series: dict[str, list[tuple[float, float]]] = {}
            for row in record["rows"]:
                for name, found in row.get("variants", {}).items() if row["axis"] == axis else ():
                    inductor = record["config"]["framework"] == "torch" and row["mode"] == "compiled"
                    label = f"{name}, compiled" if inductor else name
                    if "gradients" in found:
                        series.setdefault(label, []).append((row[axis], found["gradients"]))
            for name, points in sorted(series.items(), key=lambda item: item[0] != "gradlab"):
                style = {"lw": 2.2, "zorder": 3} if name.startswith("gradlab") else {"lw": 1.2, "alpha": 0.85}
                panel.plot(*zip(*points, strict=True), "o-", ms=3.5, label=name, **style)
            panel.set(xlabel=axis, yscale="log", xscale="linear" if axis == "order" else "log")
            if axis == "order":
                panel.set_xticks(sorted({x for points in series.values() for x, _ in points}))
            panel.set_title(f"{record['config']['framework']}: gradients a product", fontsize=9)
            panel.grid(alpha=0.3, which="both")
            panel.legend(fontsize=7)
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
    path = out / "hvp_scaling.jsonl"
    if framework is Framework.both:
        flags = {"preset": preset.value, "device": device, "dtype": dtype.value, "out": out}
        draw(in_each_framework(__file__, path, **flags), out / "hvp_scaling.png")
        return
    os.environ["JAX_ENABLE_X64"] = "1"  # for the differences
    rows = measure(framework.value, preset.value, device, dtype.value)
    config = {"framework": framework.value, "preset": preset.value, "device": device, "dtype": dtype.value}
    keep(path, "hvp_scaling", config, rows=rows)
    show(framework.value, rows)


if __name__ == "__main__":
    typer.run(main)
