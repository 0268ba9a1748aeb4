"""What do hyperparameter gradients cost and err: implicit, unrolled, or by finite differences?

    python experiments/implicit_regression.py --framework both --preset smoke|paper --out results

A penalty of its own for every feature of scikit-learn's diabetes data (ridge regression) and breast-cancer data
(logistic regression); the gradient of the validation loss in the logarithms of the penalties, through K steps of
accelerated gradient descent. Expected: the implicit gradient (`gradlab.argmin`) errs less than the unrolled one
once both have converged, its memory does not grow with K, and it is the faster from 32 steps on. Aborts where
`check.derivatives` fails. One line a framework in results/implicit_regression.jsonl, a table, a figure.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
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

STEPS = {"smoke": (8, 32, 128), "paper": (8, 16, 32, 64, 128, 256, 512, 1024, 2048)}
REPEATS = {"smoke": 5, "paper": 20}
BUDGET_S = {"smoke": 5.0, "paper": 30.0}  # for the rounds of one pair of variants
COLOURS = {"implicit": "tab:blue", "unrolled": "tab:orange", "differences": "tab:green"}


@dataclass(frozen=True)
class Problem:
    """Training and validation data, standardised, and which loss they have."""

    name: str
    X: np.ndarray
    t: np.ndarray
    X_val: np.ndarray
    t_val: np.ndarray

    def penalties(self) -> np.ndarray:
        """The logarithms of the penalties that are differentiated at."""
        return np.random.default_rng(0).normal(-3.0, 0.5, self.X.shape[1])


def problems() -> list[Problem]:
    """Two thirds of each data set to train on, the rest to validate."""
    from sklearn import datasets

    found = []
    for name, load in (("ridge", datasets.load_diabetes), ("logistic", datasets.load_breast_cancer)):
        X, t = load(return_X_y=True)
        X = (X - X.mean(0)) / X.std(0)
        t = (t - t.mean()) / t.std() if name == "ridge" else 2.0 * t - 1.0
        order = np.random.default_rng(1).permutation(len(X))
        train, rest = order[: 2 * len(X) // 3], order[2 * len(X) // 3 :]
        found.append(Problem(name, X[train], t[train], X[rest], t[rest]))
    return found


def losses(problem: Problem, xp: Any, array: Callable[[Any], Any]) -> tuple[Any, Any]:
    """objective(w, λ) and validation(w), in either framework."""
    X, t, X_val, t_val = map(array, (problem.X, problem.t, problem.X_val, problem.t_val))

    def loss(w: Any, X: Any, t: Any) -> Any:
        if problem.name == "ridge":
            return ((X @ w - t) ** 2).mean() / 2
        return xp.logaddexp(0 * t, -t * (X @ w)).mean()

    objective = lambda w, lam: loss(w, X, t) + (xp.exp(lam) * w**2).sum() / 2
    return objective, lambda w: loss(w, X_val, t_val)


def steepness(problem: Problem, lam: np.ndarray) -> tuple[float, float]:
    """Bounds of the Hessian's eigenvalues, which give descent its step and its momentum."""
    largest = np.linalg.eigvalsh(problem.X.T @ problem.X / len(problem.X))[-1]
    return float(largest + np.exp(lam).max()), float(np.exp(lam).min())


def variants(framework: str, problem: Problem, steps: int) -> dict[str, Callable[[Any], Any]]:
    """The validation loss as a function of λ: through the solver's steps, around them, and at the minimum itself."""
    if framework == "jax":
        import jax
        import jax.numpy as xp

        import gradlab.jax as gl

        array, gradient, zeros = xp.asarray, jax.grad, xp.zeros

        def repeat(step: Any, state: Any) -> Any:
            return jax.lax.scan(lambda s, _: (step(s), None), state, None, length=steps)[0]
    else:
        import torch as xp

        import gradlab.torch as gl

        array, gradient = xp.as_tensor, xp.func.grad
        zeros = lambda n: xp.zeros(n, dtype=xp.float64)

        def repeat(step: Any, state: Any) -> Any:
            for _ in range(steps):
                state = step(state)
            return state

    objective, validation = losses(problem, xp, array)
    high, low = steepness(problem, problem.penalties())
    momentum = (1 - (low / high) ** 0.5) / (1 + (low / high) ** 0.5)

    def descend(objective: Any, w0: Any, lam: Any) -> Any:
        """Nesterov's accelerated gradient descent."""

        def step(state: Any) -> Any:
            w, ahead = state
            new = ahead - gradient(objective)(ahead, lam) / high
            return new, new + momentum * (new - w)

        return repeat(step, (w0, w0))[0]

    w0 = zeros(problem.X.shape[1])
    implicit, exact = gl.argmin(objective, descend), gl.argmin(objective)
    return {
        "implicit": lambda lam: validation(implicit(w0, lam)),
        "unrolled": lambda lam: validation(descend(objective, w0, lam)),
        "exact": lambda lam: validation(exact(w0, lam)),
    }


def gradients(framework: str, losses: dict[str, Callable[[Any], Any]]) -> dict[str, Callable[[Any], Any]]:
    """The gradient of each, compiled in jax, by torch.autograd in torch; and by central differences."""
    if framework == "jax":
        import jax

        found = {name: jax.jit(jax.grad(f)) for name, f in losses.items()}
        value = jax.jit(losses["unrolled"])
    else:
        import torch

        def of(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def gradient(lam: Any) -> Any:
                lam = lam.detach().requires_grad_()
                return torch.autograd.grad(f(lam), lam)[0]

            return gradient

        found = {name: of(f) for name, f in losses.items()}
        value = torch.no_grad()(losses["unrolled"])

    def differences(lam: Any) -> Any:
        slopes = []
        for i in range(len(lam)):
            e = np.zeros(len(lam))
            e[i] = 1e-5
            e = 0 * lam + (e if framework == "jax" else torch.as_tensor(e))
            slopes.append(float((value(lam + e) - value(lam - e)) / 2e-5))
        return np.array(slopes)

    return {**found, "differences": differences}


def reference(framework: str, f: Callable[[Any], Any], lam: np.ndarray, array: Any) -> np.ndarray:
    """The gradient at the minimum itself, by differences of steps h and 2 h, extrapolated."""
    value = lambda lam: float(f(array(lam)))
    slope = lambda e, h: (value(lam + h * e) - value(lam - h * e)) / (2 * h)
    return np.array([(4 * slope(e, 1e-3) - slope(e, 2e-3)) / 3 for e in np.eye(len(lam))])


def measure(framework: str, problem: Problem, preset: str) -> list[dict[str, Any]]:
    """Error, time and memory of every gradient at every number of steps."""
    if framework == "jax":
        import jax

        array, wait, numpy = jax.numpy.asarray, jax.block_until_ready, np.asarray
    else:
        import torch

        array, wait, numpy = torch.as_tensor, lambda result: result, lambda g: np.asarray(g)
    lam = problem.penalties()
    at = array(lam)
    exact = variants(framework, problem, 1)["exact"]
    check.derivatives(exact, at, order=1).raise_if_failed()
    exact = jax.jit(exact) if framework == "jax" else exact
    truth = reference(framework, exact, lam, array)
    rows = []
    for steps in track(STEPS[preset], f"{framework}, {problem.name}", console=console()):
        found = gradients(framework, variants(framework, problem, steps))
        error = lambda name: float(np.linalg.norm(numpy(found[name](at)) - truth) / np.linalg.norm(truth))
        errors = {name: error(name) for name in COLOURS}
        calls = {name: lambda name=name: found[name](at) for name in ("implicit", "unrolled")}
        times = interleave(calls, synchronise=wait, repeats=REPEATS[preset], budget_s=BUDGET_S[preset])
        middle, low, high = ratio(times["unrolled"], times["implicit"])
        slow = interleave(
            {"differences": lambda: found["differences"](at)},
            synchronise=wait,
            repeats=3,
            warmup=1,
            budget_s=2.0,
        )
        row = {"problem": problem.name, "steps": steps, "ratio": [middle, low, high], "error": errors}
        row["seconds"] = {name: t.median_s for name, t in {**times, **slow}.items()}
        row["bytes"] = {name: peak(framework, found[name], at) for name in ("implicit", "unrolled")}
        rows.append(row)
    return rows


def show(framework: str, rows: list[dict[str, Any]]) -> None:
    """One table: a line for each problem and number of steps."""
    heads = (
        "problem",
        "steps",
        "error implicit",
        "unrolled",
        "differences",
        "ms implicit",
        "unrolled",
        "ratio",
    )
    table = Table(*heads, "kB implicit", "unrolled", title=framework)
    for row in rows:
        errors = [f"{row['error'][name]:.1e}" for name in COLOURS]
        times = [f"{1e3 * row['seconds'][name]:.2f}" for name in ("implicit", "unrolled")]
        sizes = [f"{row['bytes'][name] / 1e3:.0f}" for name in ("implicit", "unrolled")]
        table.add_row(row["problem"], str(row["steps"]), *errors, *times, f"{row['ratio'][0]:.2f}", *sizes)
    console().print(table)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Error, seconds and memory against steps: a row a framework and problem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [(r, name) for r in records for name in ("ridge", "logistic")]
    figure, axes = plt.subplots(len(panels), 3, figsize=(11, 2.4 * len(panels)), squeeze=False, sharex=True)
    for line, (record, problem) in zip(axes, panels, strict=True):
        rows = [row for row in record["rows"] if row["problem"] == problem]
        for axis, key in zip(line, ("error", "seconds", "bytes"), strict=True):
            for name in rows[0][key]:
                values = [row[key][name] for row in rows]
                axis.loglog([row["steps"] for row in rows], values, "o-", color=COLOURS[name], label=name)
            axis.set_title(f"{record['config']['framework']}, {problem}: {key}", fontsize=9)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("steps of the inner solver")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    framework: Framework = Framework.both,
    preset: Preset = Preset.smoke,
    out: Path = Path("results"),
) -> None:
    """Measure one framework a process, then draw what was measured."""
    path = out / "implicit_regression.jsonl"
    if framework is Framework.both:
        draw(in_each_framework(__file__, path, preset=preset, out=out), out / "implicit_regression.png")
        return
    os.environ["JAX_ENABLE_X64"] = "1"
    rows = [row for problem in problems() for row in measure(framework.value, problem, preset.value)]
    config = {"framework": framework.value, "preset": preset.value, "device": "cpu", "dtype": "float64"}
    append(
        path,
        {"experiment": "implicit_regression", "config": config, "environment": environment(), "rows": rows},
    )
    show(framework.value, rows)


if __name__ == "__main__":
    typer.run(main)
