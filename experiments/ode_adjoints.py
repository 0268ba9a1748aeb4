"""Which adjoint of an ODE solve is right, and at what cost?

    python experiments/ode_adjoints.py --framework both --preset smoke|paper --out results

The gradient of a weighted last state in y0 and the parameters by every adjoint of `odeint`, against tolerance, for
the equations of gradlab.bench.ode_problems (the implicit kvaerno5 where stiff, tsit5 elsewhere), with the reference
sensitivities as the truth; of a neural ODE (16-64-16, batch 128, against auto at 1e-10); and of the linear equation by
rk4 against the number of steps. Expected: auto, interpolating and forward err at most 100 times the tolerance
everywhere; direct and checkpoint do not where tsit5 is at its limit of stability; backsolve refuses where it cannot
return; at 10,000 steps checkpoint holds at most 0.05 of what direct does. In jax the gradients of direct, checkpoint
and backsolve take at most 1.05 times as long as diffrax called by hand. Processor seconds: run it on one core. An
adjoint that needed longer than 10 s is left out at tighter tolerances. Aborts where `check.derivatives` fails. One
line a framework and problem in results/ode_adjoints.jsonl, a table, a figure of the newest of each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import typer
from rich.progress import track
from rich.table import Table

from gradlab import check
from gradlab.bench.clock import interleave, ratio
from gradlab.bench.console import console
from gradlab.bench.memory import peak, resident
from gradlab.bench.ode_problems import EQUATIONS
from gradlab.bench.record import in_each_framework, keep
from gradlab.cli import Framework, Preset

COLOURS = {
    "auto": "black",
    "interpolating": "tab:blue",
    "forward": "tab:cyan",
    "backsolve": "tab:red",
    "direct": "tab:orange",
    "checkpoint": "tab:green",
}
PROBLEMS = {"smoke": ("linear", "lotka_volterra"), "paper": (*EQUATIONS, "neural")}
TOLERANCES = {"smoke": (1e-3, 1e-6), "paper": (1e-3, 1e-5, 1e-7, 1e-9)}
STEPS = {"smoke": (16, 256), "paper": (16, 256, 4096, 10000)}
REPEATS = {"smoke": 5, "paper": 20}
MAX_STEPS = {"jax": 2**12, "torch": 2**14}  # jax's direct adjoint is compiled for as many
LONG, MANY = ("van_der_pol", "robertson", "oregonator"), {"jax": 2**16, "torch": 2**16}
SHORT_S, LONG_S = 0.5, 10.0  # calls above are timed once, and without their memory; and left out when tighter


@dataclass(frozen=True)
class Problem:
    """A loss as a function of one vector, (y0, parameters), and its gradient in units of that vector."""

    name: str
    x: np.ndarray
    loss: Callable[..., Any]  # (odeint, framework's numpy, array, x, options) -> loss, solution
    truth: np.ndarray | None
    unit: np.ndarray
    method: str

    def error(self, gradient: np.ndarray) -> float:
        """Relative to the truth, in these units."""
        assert self.truth is not None
        return float(
            np.linalg.norm((gradient - self.truth) * self.unit) / np.linalg.norm(self.truth * self.unit)
        )


def known(name: str) -> Problem:
    """One of the equations with references."""
    e = EQUATIONS[name]
    reference, n = e.reference(), len(e.y0)
    weights = np.linspace(1, 2, n)
    smallest = float(np.abs(reference["y"]).min()) if e.stiff else 1.0

    def loss(odeint: Any, xp: Any, array: Any, x: Any, rtol: float, **options: Any) -> Any:
        f = lambda t, y, p: xp.stack(e.f(t, y, p))
        options = {"rtol": rtol, "atol": rtol * min(smallest, 1.0), **options}
        solution = odeint(f, x[:n], array([0.0, e.end]), x[n:], **options)
        return (solution.ys[-1] * array(weights)).sum(), solution

    truth = weights @ np.hstack([reference["dy0"], reference["dp"]])
    unit = np.array([*np.ones(n), *e.p])
    return Problem(name, np.array([*e.y0, *e.p]), loss, truth, unit, "kvaerno5" if e.stiff else "tsit5")


SIZES, BATCH = (16, 64, 16), 128


def neural() -> Problem:
    """A network of two layers as the right-hand side, a batch as one state."""
    n, hidden, _ = SIZES
    random = np.random.default_rng(0)
    W1, W2 = random.normal(size=(n, hidden)) / n**0.5, random.normal(size=(hidden, n)) / hidden**0.5
    y0 = random.normal(size=(BATCH, n))

    def loss(odeint: Any, xp: Any, array: Any, x: Any, rtol: float, **options: Any) -> Any:
        solution = odeint(network(xp), array(y0), array([0.0, 1.0]), x, rtol=rtol, atol=rtol, **options)
        return (solution.ys[-1] ** 2).mean(), solution

    x = np.concatenate([W1.ravel(), W2.ravel()])
    return Problem("neural", x, loss, None, np.ones(len(x)), "tsit5")


def network(xp: Any) -> Callable[..., Any]:
    """f(t, y, w) of the neural ODE."""
    n, hidden, _ = SIZES

    def f(t: Any, y: Any, w: Any) -> Any:
        W1, W2 = w[: n * hidden].reshape(n, hidden), w[n * hidden :].reshape(hidden, n)
        return xp.tanh(y @ W1) @ W2

    return f


@dataclass(frozen=True)
class Tools:
    """What differs between the frameworks."""

    name: str
    odeint: Any
    xp: Any
    array: Callable[[Any], Any]
    wait: Callable[[Any], Any]

    def gradient(self, f: Callable[[Any], Any], x: Any, forward: bool) -> Callable[[Any], Any]:
        """That of f, compiled in jax; in forward mode if asked."""
        if self.name == "jax":
            import jax

            return jax.jit((jax.jacfwd if forward else jax.grad)(f)).lower(x).compile()
        import torch

        if forward:
            return torch.func.jacfwd(f)

        def reverse(x: Any) -> Any:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(f(x), x)[0]

        return reverse

    def bytes(self, gradient: Callable[[Any], Any], x: Any) -> int | None:
        """The most it holds."""
        if self.name == "torch":
            return peak("torch", gradient, x)
        plan = gradient.memory_analysis()  # type: ignore[attr-defined]
        return plan.temp_size_in_bytes + plan.output_size_in_bytes


def tools(framework: str) -> Tools:
    """Of a framework, in float64."""
    if framework == "jax":
        import jax

        from gradlab.jax import odeint

        return Tools("jax", odeint, jax.numpy, jax.numpy.asarray, jax.block_until_ready)
    import torch

    from gradlab.torch import odeint as torch_odeint

    return Tools("torch", torch_odeint, torch, torch.as_tensor, lambda result: result)


def measure(fw: Tools, problem: Problem, preset: str) -> list[dict[str, Any]]:
    """Every adjoint at every tolerance."""
    x = fw.array(problem.x)
    solved = lambda x, rtol, adjoint: problem.loss(
        fw.odeint,
        fw.xp,
        fw.array,
        x,
        rtol,
        adjoint=adjoint,
        method=problem.method,
        max_steps=(MANY if problem.name.startswith(LONG) else MAX_STEPS)[fw.name],
    )
    if problem.truth is None:
        finest = fw.gradient(lambda x: solved(x, 1e-10, "auto")[0], x, False)
        problem = replace(problem, truth=np.asarray(finest(x)))
    rows: list[dict[str, Any]] = []
    cells = [(rtol, adjoint) for rtol in TOLERANCES[preset] for adjoint in COLOURS]
    slow = set()
    for rtol, adjoint in track(cells, f"{fw.name}, {problem.name}", console=console(), transient=True):
        if adjoint in slow or (adjoint == "forward" and len(problem.x) > 100):  # a solve for each parameter
            continue
        row: dict[str, Any] = {"problem": problem.name, "tolerance": rtol, "adjoint": adjoint}
        rows.append(row)
        value = lambda x, rtol=rtol, adjoint=adjoint: solved(x, rtol, adjoint)[0]
        try:
            gradient = fw.gradient(value, x, adjoint == "forward")
            row |= cost(fw, gradient, x, preset, lambda found: problem.error(np.asarray(found)))
        except RuntimeError as refusal:
            row["refused"] = "odeint:" + str(refusal).partition("odeint:")[2].partition(";")[0][:200]
        if row.get("seconds", 0) > LONG_S:
            slow.add(adjoint)
        if adjoint == "auto":
            run = lambda x, rtol=rtol: solved(x, rtol, "auto")[1].stats
            if fw.name == "jax":
                import jax

                run = jax.jit(run)
            row["stats"] = {k: int(v) for k, v in run(x).items()}
    return rows


def cost(fw: Tools, gradient: Any, x: Any, preset: str, error: Callable[[Any], float]) -> dict[str, Any]:
    """The error, the seconds and, of short calls, the memory."""
    start = process_time()
    found = {"error": error(fw.wait(gradient(x))), "seconds": process_time() - start}
    if found["seconds"] > SHORT_S:
        return found
    timing = interleave(
        {"": lambda: gradient(x)},
        synchronise=fw.wait,
        repeats=REPEATS[preset],
        warmup=1,
        budget_s=1.0,
        now=process_time,
    )
    return {**found, "seconds": timing[""].median_s, "bytes": fw.bytes(gradient, x)}


def lengths(fw: Tools, preset: str) -> list[dict[str, Any]]:
    """Every reverse adjoint of the linear equation by rk4, against the number of steps."""
    problem, rows = known("linear"), []
    x, end = fw.array(problem.x), EQUATIONS["linear"].end
    for steps in STEPS[preset]:
        for adjoint in ("backsolve", "checkpoint", "interpolating", "direct"):  # by the memory they hold
            value = lambda x, steps=steps, adjoint=adjoint: problem.loss(
                fw.odeint,
                fw.xp,
                fw.array,
                x,
                1.0,  # which with fixed steps only says how near to y0 backsolve has to return
                adjoint=adjoint,
                method="rk4",
                step_size=end / steps,
                max_steps=steps + 1,
            )[0]
            row: dict[str, Any] = {"problem": "linear", "steps": steps, "adjoint": adjoint}
            gradient = fw.gradient(value, x, False)
            start = process_time()
            row["error"] = problem.error(np.asarray(gradient(x)))
            row["seconds"] = process_time() - start
            size = fw.bytes(gradient, x) if fw.name == "jax" else resident(gradient, x)
            rows.append({**row, "bytes": size})
    return rows


def by_hand(fw: Tools, rtol: float, repeats: int) -> dict[str, list[float]]:
    """How long gradlab's gradients of the neural ODE take in jax, over diffrax's own with the same adjoint."""
    import diffrax as dfx
    import jax

    problem = neural()
    x, f = fw.array(problem.x), network(fw.xp)
    solver, controller = dfx.Tsit5(), dfx.PIDController(rtol, rtol)
    term = dfx.ODETerm(f)
    kinds = {
        "value": dfx.ForwardMode(),
        "auto": dfx.RecursiveCheckpointAdjoint(),
        "direct": dfx.DirectAdjoint(),
        "checkpoint": dfx.RecursiveCheckpointAdjoint(),
        "backsolve": dfx.BacksolveAdjoint(stepsize_controller=controller),
    }
    y0 = fw.array(np.random.default_rng(1).normal(size=(BATCH, SIZES[0])))

    def theirs(x: Any, kind: Any) -> Any:
        saveat = dfx.SaveAt(ts=fw.array([0.0, 1.0]))
        found = dfx.diffeqsolve(
            term,
            solver,
            0.0,
            1.0,
            None,
            y0,
            x,
            saveat=saveat,
            stepsize_controller=controller,
            adjoint=kind,
            max_steps=4096,
        )
        return (found.ys[-1] ** 2).mean()

    def ours(x: Any, adjoint: str) -> Any:
        ts, options = fw.array([0.0, 1.0]), {"rtol": rtol, "atol": rtol, "method": "tsit5"}
        return (fw.odeint(f, y0, ts, x, adjoint=adjoint, **options).ys[-1] ** 2).mean()

    ratios = {}
    for name, kind in kinds.items():
        mode = (lambda g: g) if name == "value" else jax.grad
        adjoint = "auto" if name == "value" else name  # which diffrax has not: beside its default
        pair = {
            "gradlab": jax.jit(mode(lambda x: ours(x, adjoint))),
            "diffrax": jax.jit(mode(lambda x: theirs(x, kind))),
        }
        apart = float(np.abs(np.array(pair["gradlab"](x)) - np.array(pair["diffrax"](x))).max())
        calls = {key: lambda call=call: call(x) for key, call in pair.items()}
        times = interleave(calls, synchronise=fw.wait, repeats=repeats, budget_s=20.0)
        ratios[name] = [*ratio(times["gradlab"], times["diffrax"]), apart]
    return ratios


def show(framework: str, rows: list[dict[str, Any]], ratios: dict[str, list[float]]) -> None:
    """A line for each problem, tolerance or number of steps, and adjoint."""
    heads = ("problem", "tolerance or steps", "adjoint", "error", "÷ tolerance", "ms", "kB")
    table = Table(*heads, title=framework)
    for row in rows:
        rtol = row.get("tolerance")
        cells = [row["problem"], f"{rtol:.0e}" if rtol else str(row["steps"]), row["adjoint"]]
        if "refused" in row:
            table.add_row(*cells, "refused")
            continue
        size = f"{row['bytes'] / 1e3:.0f}" if row.get("bytes") is not None else ""
        over = f"{row['error'] / rtol:.2g}" if rtol else ""
        table.add_row(*cells, f"{row['error']:.1e}", over, f"{1e3 * row['seconds']:.2f}", size)
    console().print(table)
    for name, (middle, low, high, _) in ratios.items():
        console().print(f"neural ODE, {name}: gradlab / diffrax {middle:.2f} ({low:.2f} to {high:.2f})")


def newest(path: Path, preset: str) -> list[dict[str, Any]]:
    """The rows of each framework, of the newest record of each problem."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found: dict[str, dict[str, Any]] = {"jax": {}, "torch": {}}
    for record in records:
        config = record["config"]
        if config["preset"] == preset:
            found[config["framework"]][config["problem"]] = record["rows"]
    return [
        {"framework": name, "rows": [row for rows in problems.values() for row in rows]}
        for name, problems in found.items()
    ]


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """A row a problem: error and seconds against tolerance in each framework; below, against the number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["problem"] for r in records for row in r["rows"] if "tolerance" in row))
    columns = [(r, key) for key in ("error", "seconds") for r in records]
    size = (3.2 * len(columns), 2.1 * (len(names) + 1))
    figure, axes = plt.subplots(
        len(names) + 1, len(columns), figsize=size, layout="constrained", squeeze=False
    )
    lines = [("tolerance", name, columns) for name in names]
    lines.append(("steps", "linear", [(r, key) for key in ("bytes", "seconds") for r in records]))
    for line, (along, problem, across) in zip(axes, lines, strict=True):
        for axis, (record, key) in zip(line, across, strict=True):
            rows = [row for row in record["rows"] if row["problem"] == problem and along in row]
            if not rows:
                axis.axis("off")
                continue
            for name, colour in COLOURS.items():
                points = [(row[along], row[key]) for row in rows if row["adjoint"] == name and row.get(key)]
                if points:
                    axis.loglog(*zip(*points, strict=True), "o-", ms=3, lw=1, color=colour, label=name)
            axis.set_title(f"{problem}, {record['framework']}: {key}", fontsize=9)
            axis.grid(alpha=0.3)
            if along == "tolerance":
                axis.invert_xaxis()
                at = np.array(sorted({row[along] for row in rows}))
                if key == "error":
                    axis.fill_between(at, at * 1e-2, 100 * at, color="0.92")
                    axis.set_ylim(1e-12, 10)
            axis.set_xlabel(along, fontsize=8)
            axis.tick_params(labelsize=7)
    handles = {
        text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False
    )
    figure.savefig(path, dpi=110)


def main(
    framework: Framework = Framework.both,
    preset: Preset = Preset.smoke,
    only: str = "",
    out: Path = Path("results"),
) -> None:
    """Measure one framework a process, then draw what was measured; of some problems alone, with commas between."""
    path = out / "ode_adjoints.jsonl"
    if framework is Framework.both:
        in_each_framework(__file__, path, preset=preset, only=only, out=out)
        draw(newest(path, preset.value), out / "ode_adjoints.png")
        return
    os.environ["JAX_ENABLE_X64"] = "1"
    fw = tools(framework.value)
    simple = known("linear")
    last = lambda x: simple.loss(fw.odeint, fw.xp, fw.array, x, 1e-6, method="tsit5")[0]
    check.derivatives(last, fw.array(simple.x), order=1, accuracy=1e-4).raise_if_failed()
    config = {"framework": framework.value, "preset": preset.value, "device": "cpu", "dtype": "float64"}
    for name in [name for name in only.split(",") if name] or PROBLEMS[preset.value]:
        rows = measure(fw, neural() if name == "neural" else known(name), preset.value)
        ratios = {}
        if name == "linear":
            rows += lengths(fw, preset.value)
        if name == "neural" and framework is Framework.jax:
            ratios = by_hand(fw, 1e-5, REPEATS[preset.value])
        found = {"rows": rows, "gradlab / diffrax": ratios}
        keep(path, "ode_adjoints", {**config, "problem": name}, **found)
        show(f"{framework.value}, {name}", rows, ratios)


if __name__ == "__main__":
    typer.run(main)
