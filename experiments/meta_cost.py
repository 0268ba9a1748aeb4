"""What do the ways to a meta-gradient cost in time and memory, and how far are they from the exact one?

    python experiments/meta_cost.py --framework both --preset smoke|paper --out results

The sinusoid network (40-40) with 25 tasks: each method against 1 to 256 inner steps, and at 5 steps against the
number of tasks; gradlab against hand-written code, and against higher and TorchOpt where they are installed. Expected:
memory of unrolling grows with the steps, of checkpointing with their root, of the implicit and the first-order method
not at all; gradlab no slower than by hand, the libraries that loop over tasks 5 times slower or more. Aborts where the
exact gradient is not that of differences. One line a framework in results/meta_cost.jsonl, tables, a figure.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track
from rich.table import Table

from gradlab import check
from gradlab.bench.clock import interleave, ratio
from gradlab.bench.console import console
from gradlab.bench.memory import peak
from gradlab.bench.record import append, environment, in_each_framework
from gradlab.cli import Framework, Preset

RATE, TASKS = 0.01, 25
METHODS: dict[str, dict[str, Any]] = {
    "unroll": {},
    "checkpoint": {"method": "checkpoint"},
    "truncate": {"method": "truncate", "last": 1},
    "first_order": {"method": "first_order"},
    "implicit": {"method": "implicit", "proximal": 1.0, "cg_steps": 5},
}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"steps": (1, 16, 256), "tasks": (5, 25), "repeats": 5, "budget": 5.0},
    "paper": {"steps": (1, 4, 16, 64, 256), "tasks": (1, 5, 25, 100), "repeats": 20, "budget": 30.0},
}
COLOURS = {name: f"C{i}" for i, name in enumerate(METHODS)}


def numbers(tasks: int, dtype: str) -> tuple[Any, Any]:
    """Weights, and (support, query) of sinusoids, 10 points each."""
    rng = np.random.default_rng(0)
    layer = lambda n, m: rng.normal(size=(n, m)) * (2 / (n + m)) ** 0.5
    params = {"b0": np.zeros(40), "b1": np.zeros(40), "b2": np.zeros(1)}
    params |= {"w0": layer(1, 40), "w1": layer(40, 40), "w2": layer(40, 1)}
    x = rng.uniform(-5, 5, size=(tasks, 20, 1))
    size, phase = rng.uniform(0.1, 5, size=(tasks, 1, 1)), rng.uniform(0, np.pi, size=(tasks, 1, 1))
    y = size * np.sin(x - phase)
    cast = lambda a: np.ascontiguousarray(a.astype(dtype))
    data = (cast(x[:, :10]), cast(y[:, :10])), (cast(x[:, 10:]), cast(y[:, 10:]))
    return {name: cast(leaf) for name, leaf in params.items()}, data


def loss_of(xp: Any) -> Callable[..., Any]:
    """The squared error of the network, with tanh, which differences can check."""

    def loss(p: Any, x: Any, y: Any) -> Any:
        h = xp.tanh(xp.tanh(x @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"])
        return ((h @ p["w2"] + p["b2"] - y) ** 2).mean()

    return loss


def load(framework: str) -> Any:
    """array, tree map, compile, wait, numpy, gl and loss of a framework."""
    gl = importlib.import_module(f"gradlab.{framework}")
    if framework == "jax":
        import jax

        return (
            jax.numpy.asarray,
            jax.tree.map,
            jax.jit,
            jax.block_until_ready,
            np.asarray,
            gl,
            loss_of(jax.numpy),
        )
    import torch
    from torch.utils import _pytree as pytree

    torch.set_num_threads(1)  # the network is small
    same = lambda f: f
    return torch.as_tensor, pytree.tree_map, same, same, lambda a: a.numpy(), gl, loss_of(torch)


def verified(framework: str) -> None:
    """Abort unless the unrolled gradient is that of differences, and checkpointing gives the same."""
    array, tree, _, _, numpy, gl, loss = load(framework)
    params, tasks = tree(array, numbers(2, "float64"))
    how = {"optimizer": gl.optimizers.sgd(RATE), "steps": 3}
    (a, b), (c, d) = tasks

    def outer(params: Any) -> Any:
        adapted = lambda i: gl.adapt(loss, params, a[i], b[i], **how)
        return (loss(adapted(0), c[0], d[0]) + loss(adapted(1), c[1], d[1])) / 2

    report = check.derivatives(outer, params, order=1, vmap=False, compiled=False)
    report.raise_if_failed()
    found = [gl.meta_grad(loss, loss, params, tasks, **how, **METHODS[m]) for m in ("unroll", "checkpoint")]
    for name in params:
        np.testing.assert_allclose(numpy(found[0][name]), numpy(found[1][name]), atol=1e-12)


def measure(framework: str, preset: str, dtype: str) -> list[dict[str, Any]]:
    """Seconds, bytes and relative error of every method, against steps and against tasks."""
    array, tree, compiled, wait, numpy, gl, loss = load(framework)
    chosen, rows = PRESETS[preset], []
    grid = [("steps", k, TASKS) for k in chosen["steps"]] + [("tasks", 5, n) for n in chosen["tasks"]]
    for axis, steps, count in track(grid, framework, console=console()):
        params, tasks = tree(array, numbers(count, dtype))
        calls = {}
        for name, how in METHODS.items():
            how = {"optimizer": gl.optimizers.sgd(RATE), "steps": steps, **how}
            f = lambda p, t, how=how: gl.meta_grad(loss, loss, p, t, **how)
            calls[name] = compiled(f)
        flat = lambda g: np.concatenate([numpy(g[key]).ravel() for key in sorted(g)])
        found = {name: flat(call(params, tasks)) for name, call in calls.items()}
        exact = found["unroll"]
        runs = {name: lambda call=call: call(params, tasks) for name, call in calls.items()}
        times = interleave(
            runs, synchronise=wait, repeats=chosen["repeats"], warmup=1, budget_s=chosen["budget"]
        )
        rows.append(
            {
                "axis": axis,
                "steps": steps,
                "tasks": count,
                "seconds": {name: t.median_s for name, t in times.items()},
                "ratio": {name: ratio(t, times["unroll"]) for name, t in times.items()},
                "bytes": {name: peak(framework, call, params, tasks) for name, call in calls.items()},
                "error": {
                    name: float(np.linalg.norm(g - exact) / np.linalg.norm(exact))
                    for name, g in found.items()
                },
            }
        )
    return rows


def by_hand(framework: str, loss: Any, steps: int, tasks: Any) -> Callable[[Any], Any]:
    """grad(vmap(...)) as a user would write it."""
    if framework == "jax":
        import jax

        gradient, vmap = jax.grad, jax.vmap
    else:
        import torch

        gradient, vmap = torch.func.grad, torch.func.vmap

    def one(p: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        for _ in range(steps):
            g = gradient(loss)(p, a, b)
            p = {name: p[name] - RATE * g[name] for name in p}
        return loss(p, c, d)

    data = (*tasks[0], *tasks[1])
    return gradient(lambda p: vmap(one, (None, 0, 0, 0, 0))(p, *data).mean())


def looped(library: str, loss: Any, steps: int, tasks: Any, params: Any) -> Callable[[Any], Any]:
    """The module interface of higher or TorchOpt, one task after the other."""
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, leaf in params.items():
                setattr(self, name, torch.nn.Parameter(leaf.clone()))

        def forward(self, x: Any, y: Any) -> Any:
            return loss({name: getattr(self, name) for name in params}, x, y)

    net, count = Net(), len(tasks[0][0])

    def run(_: Any) -> Any:
        net.zero_grad()
        for i in range(count):
            support, query = ([part[i] for part in data] for data in tasks)
            if library == "higher":
                import higher

                sgd = torch.optim.SGD(net.parameters(), lr=RATE)
                with higher.innerloop_ctx(net, sgd, copy_initial_weights=False) as (inner, optimiser):
                    for _ in range(steps):
                        optimiser.step(inner(*support))
                    (inner(*query) / count).backward()
            else:
                import torchopt

                optimiser = torchopt.MetaSGD(net, lr=RATE)
                start = torchopt.extract_state_dict(net, by="reference")
                memory = torchopt.extract_state_dict(optimiser)
                for _ in range(steps):
                    optimiser.step(net(*support))
                (net(*query) / count).backward()
                torchopt.recover_state_dict(net, start)
                torchopt.recover_state_dict(optimiser, memory)
        return {name: getattr(net, name).grad.clone() for name in params}

    return run


def rivals(framework: str, preset: str, dtype: str) -> list[dict[str, Any]]:
    """gradlab against hand-written code and other libraries at 1 and 5 steps, interleaved; wrong ones get no time."""
    array, tree, compiled, wait, numpy, gl, loss = load(framework)
    chosen, rows = PRESETS[preset], []
    params, tasks = tree(array, numbers(TASKS, dtype))
    for steps in (1, 5):
        ours = lambda p: gl.maml_grad(loss, p, tasks, inner_lr=RATE, steps=steps)
        calls = {
            "by hand": compiled(by_hand(framework, loss, steps, tasks)),
            "gradlab": compiled(ours),
        }
        if framework == "torch":
            import torch

            torch._dynamo.reset()
            calls["gradlab compiled"] = torch.compile(ours, fullgraph=True)
            for library in ("higher", "torchopt"):
                if find_spec(library):
                    calls[library] = looped(library, loss, steps, tasks, params)
        flat = lambda g: np.concatenate([numpy(g[key]).ravel() for key in sorted(g)])
        exact, errors = flat(calls["by hand"](params)), {}
        for name, call in calls.items():
            errors[name] = float(np.linalg.norm(flat(call(params)) - exact) / np.linalg.norm(exact))
        runs = {name: lambda call=call: call(params) for name, call in calls.items() if errors[name] < 1e-4}
        times = interleave(runs, synchronise=wait, repeats=20, budget_s=2 * chosen["budget"])
        rows.append(
            {
                "steps": steps,
                "error": errors,
                "seconds": {name: t.median_s for name, t in times.items()},
                "ratio": {name: ratio(t, times["by hand"]) for name, t in times.items()},
            }
        )
    return rows


def show(framework: str, rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Two tables: the methods, and the rivals."""
    table = Table("steps", "tasks", "method", "ms", "÷ unroll", "kB", "÷ unroll", "error", title=framework)
    for row in rows:
        for name in METHODS:
            kilobytes, share = row["bytes"][name] / 1e3, row["bytes"][name] / row["bytes"]["unroll"]
            cells = (f"{1e3 * row['seconds'][name]:.2f}", f"{row['ratio'][name][0]:.2f}", f"{kilobytes:.0f}")
            table.add_row(
                str(row["steps"]),
                str(row["tasks"]),
                name,
                *cells,
                f"{share:.2f}",
                f"{row['error'][name]:.1e}",
            )
    console().print(table)
    table = Table("steps", "variant", "ms", "÷ by hand", "quartiles", "error", title=framework)
    for row in others:
        for name, (middle, low, high) in row["ratio"].items():
            cells = (f"{1e3 * row['seconds'][name]:.2f}", f"{middle:.2f}", f"{low:.2f}-{high:.2f}")
            table.add_row(str(row["steps"]), name, *cells, f"{row['error'][name]:.1e}")
    console().print(table)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Time, memory and error against steps, a row a framework; time against tasks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(records), 4, figsize=(13.5, 3.1 * len(records)), squeeze=False)
    panels = (("steps", "seconds"), ("steps", "bytes"), ("steps", "error"), ("tasks", "seconds"))
    for line, record in zip(axes, records, strict=True):
        for axis, (over, key) in zip(line, panels, strict=True):
            rows = [row for row in record["rows"] if row["axis"] == over]
            for name in METHODS:
                values = [row[key][name] for row in rows]
                if key == "error" and name in ("unroll", "checkpoint"):
                    continue
                axis.loglog(
                    [row[over] for row in rows], values, "o-", color=COLOURS[name], label=name, markersize=4
                )
            fixed = f"{TASKS} tasks" if over == "steps" else "5 steps"
            axis.set_title(f"{record['config']['framework']}, {fixed}", fontsize=9)
            axis.set_xlabel("inner steps" if over == "steps" else "tasks")
            axis.set_ylabel({"error": "error against unroll", "bytes": "peak bytes"}.get(key, key))
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    framework: Framework = Framework.both,
    preset: Preset = Preset.smoke,
    out: Path = Path("results"),
    dtype: str = "float32",
) -> None:
    """Measure one framework a process, then draw what was measured."""
    path = out / "meta_cost.jsonl"
    if framework is Framework.both:
        plot(in_each_framework(__file__, path, preset=preset, out=out, dtype=dtype), out / "meta_cost.png")
        return
    os.environ["JAX_ENABLE_X64"] = "1"
    verified(framework.value)
    others = rivals(framework.value, preset.value, dtype)
    rows = measure(framework.value, preset.value, dtype)
    config = {"framework": framework.value, "preset": preset.value, "device": "cpu", "dtype": dtype}
    record = {"experiment": "meta_cost", "config": config, "environment": environment()}
    append(path, {**record, "rows": rows, "rivals": others})
    show(framework.value, rows, others)


if __name__ == "__main__":
    typer.run(main)
