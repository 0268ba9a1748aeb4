"""Do influence scores find planted mislabelled digits better than checking the examples of highest loss?

    python experiments/influence_digits.py --framework both --preset smoke|paper --out results

Of 1200 of scikit-learn's digits, either a tenth get another label at random, or seven in ten of two digits get one
other digit's label each, as from a careless labeller. A logistic regression and an MLP are trained to a minimum; then
examples are checked in the order of a score: the loss, the gradient's length, the influence on the own loss, and that
on the loss of 300 digits of trusted labels, with the Gauss-Newton matrix (`ggn_operator`), with random projections and
their second moments (`per_example_projections`), of one gradient step (`per_example_gram`). Expected: the loss is hard
to beat on random errors, which no model believes; on systematic ones, which it does, influence on trusted labels is
better. Aborts where `check.derivatives` fails or the examples' gradients do not sum to the gradient. One line a
framework in results/influence_digits.jsonl, a table, a figure.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track
from rich.table import Table
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.special import log_softmax

from gradlab import check
from gradlab.bench.console import console
from gradlab.bench.problems import Problem, mlp
from gradlab.bench.record import append, environment, in_each_framework
from gradlab.cli import Framework, Preset

TRAIN, TRUSTED, DIMENSION = 1200, 300, 512
RANDOM, SYSTEMATIC = 0.1, 0.7  # shares of all examples, and of those of two digits
SEEDS = {"smoke": 1, "paper": 3}
HIDDEN = {"smoke": 8, "paper": 32}
PENALTY = {"logistic": 1e-2, "mlp": 1e-3}  # times half the squared length of all weights
PLANTINGS = ("random", "systematic")
SCORES = {
    "loss": "tab:orange",
    "gradient norm": "tab:red",
    "own loss, Gauss-Newton": "tab:brown",
    "trusted, Gauss-Newton": "tab:blue",
    "trusted, projections": "tab:green",
    "trusted, one step": "tab:purple",
}


def planted(labels: np.ndarray, planting: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which some are another digit's, and which these are."""
    rng = np.random.default_rng(seed)
    changed = labels.copy()
    if planting == "random":
        wrong = rng.choice(len(labels), int(RANDOM * len(labels)), replace=False)
        changed[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    else:
        a, b, c, d = rng.choice(10, 4, replace=False)
        for digit, taken_for in ((a, b), (c, d)):
            changed[(labels == digit) & (rng.random(len(labels)) < SYSTEMATIC)] = taken_for
    return changed, changed != labels


class Case:
    """One model on one data set with planted errors, in one framework, on flat weights or by name."""

    def __init__(self, framework: str, problem: Problem, planting: str, seed: int):
        self.bench, self.gl = (
            import_module(f"gradlab.{name}") for name in (f"bench._{framework}", framework)
        )
        self.jit = import_module("jax").jit if framework == "jax" else lambda f: f
        self.framework, self.problem, self.penalty = framework, problem, PENALTY[problem.name]
        self.model, self.loss = self.bench.model(problem), self.bench.loss(problem)
        order = np.random.default_rng(100 + seed).permutation(len(problem.targets))
        images, truth = problem.inputs[order], problem.targets[order]
        self.given, self.wrong = planted(truth[:TRAIN], planting, seed)
        self.train = self.array(images[:TRAIN]), self.array(self.given)
        self.trusted = tuple(self.array(a[TRAIN : TRAIN + TRUSTED]) for a in (images, truth))
        self.start = np.concatenate([p.ravel() for p in problem.params.values()])

    def array(self, tree: Any) -> Any:
        """Numpy arrays as the framework's."""
        return self.bench.arrays(tree, "float64")

    def named(self, flat: Any) -> Any:
        """Weights by name, in the order in which both frameworks hold them."""
        ends = np.cumsum([p.size for p in self.problem.params.values()])
        entries = zip(self.problem.params.items(), ends, strict=True)
        return {name: flat[end - p.size : end].reshape(p.shape) for (name, p), end in entries}

    def gradient(self, flat: np.ndarray, batch: Any) -> np.ndarray:
        """Of the mean loss of a batch."""
        return np.asarray(
            self.gl.jacobian(lambda flat: self.loss(self.named(flat), *batch), self.array(flat))
        )

    def minimum(self) -> np.ndarray:
        """Where L-BFGS ends."""
        objective = lambda flat: self.loss(self.named(flat), *self.train) + self.penalty / 2 * (flat**2).sum()
        if self.framework == "jax":
            import jax

            both = jax.jit(jax.value_and_grad(objective))
        else:
            import torch

            torch.set_num_threads(1)
            both = lambda x: torch.func.grad_and_value(objective)(x)[::-1]

        def numbers(x: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = both(self.array(x))
            return float(value), np.asarray(slope)

        return minimize(numbers, self.start, jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x


def scores(case: Case) -> dict[str, np.ndarray]:
    """How suspect each training example is: the first to be checked has the largest number."""
    flat, gl, loss = case.minimum(), case.gl, case.loss
    params = case.named(case.array(flat))
    each = lambda f, *batch, **options: case.jit(
        lambda params, *batch: f(loss, params, *batch, keep_batch_axis=True, **options)
    )(params, *batch)

    grads = each(gl.per_example_grads, *case.train)
    G = np.concatenate([np.asarray(grads[name]).reshape(TRAIN, -1) for name in params], 1)
    if not np.allclose(G.mean(0), case.gradient(flat, case.train), rtol=1e-8, atol=1e-12):
        raise SystemExit(f"{case.problem.name}: the examples' gradients do not sum to the gradient")
    logits = np.asarray(case.model(params, case.train[0]))

    of_logits = lambda logits: case.bench.outer(logits, case.train[1])
    H = np.asarray(gl.ggn_operator(case.model, of_logits, params, case.train[0]).dense())
    solve = lambda b: cho_solve(cho_factor(H + case.penalty * np.eye(len(H))), b)

    P, Q = (
        np.asarray(each(gl.per_example_projections, *batch, dimension=DIMENSION))
        for batch in (case.train, case.trusted)
    )
    moments = P.T @ P / TRAIN
    moments += 0.1 * np.trace(moments) / DIMENSION * np.eye(DIMENSION)
    return {
        "loss": -log_softmax(logits, 1)[np.arange(TRAIN), case.given],
        "gradient norm": np.asarray(each(gl.per_example_norms, *case.train)),
        "own loss, Gauss-Newton": (G * solve(G.T).T).sum(1),
        "trusted, Gauss-Newton": -G @ solve(case.gradient(flat, case.trusted)),
        "trusted, projections": -P @ np.linalg.solve(moments, Q.mean(0)),
        "trusted, one step": -np.asarray(each(gl.per_example_gram, *case.train, other=case.trusted)).mean(1),
    }


def measure(framework: str, preset: str, seed: int) -> list[dict[str, Any]]:
    """The share of planted errors among the first checked: a curve for each score, seed, model and planting."""
    problems = [mlp("logistic", (64, 10), 1797), mlp("mlp", (64, HIDDEN[preset], 10), 1797)]
    rows = []
    cases = [(problem, planting) for problem in problems for planting in PLANTINGS]
    for problem, planting in track(cases, framework, console=console()):
        row: dict[str, Any] = {"model": problem.name, "planting": planting, "planted": []}
        row |= {"curves": {name: [] for name in SCORES}, "at_planted": {name: [] for name in SCORES}}
        for s in range(seed, seed + SEEDS[preset]):
            case = Case(framework, problem, planting, s)
            if s == seed and planting == PLANTINGS[0]:
                few = lambda flat: case.loss(case.named(flat), *(a[:16] for a in case.train))
                check.derivatives(few, case.array(case.start), order=2).raise_if_failed()
            row["planted"].append(int(case.wrong.sum()))
            for name, score in scores(case).items():
                recall = np.cumsum(case.wrong[np.argsort(-score)]) / case.wrong.sum()
                row["curves"][name].append([0.0, *recall[TRAIN // 50 - 1 :: TRAIN // 50].round(4).tolist()])
                row["at_planted"][name].append(float(recall[case.wrong.sum() - 1]))
        rows.append(row)
    return rows


def show(framework: str, rows: list[dict[str, Any]]) -> None:
    """A line for each score: recall after as many checks as there are planted errors."""
    heads = [f"{row['model']}, {row['planting']}" for row in rows]
    table = Table("score", *heads, title=f"{framework}: % found of n planted, by n checks")
    for name in SCORES:
        table.add_row(name, *(f"{100 * np.mean(row['at_planted'][name]):.0f}" for row in rows))
    table.add_row("at random", *(f"{100 * np.mean(row['planted']) / TRAIN:.0f}" for row in rows))
    console().print(table)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Recall against the share that was checked: a row a framework, a panel a model and planting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = len(records[0]["rows"])
    figure, axes = plt.subplots(
        len(records), panels, figsize=(13, 3.2 * len(records)), squeeze=False, sharex=True, sharey=True
    )
    checked = np.linspace(0, 100, 51)
    for line, record in zip(axes, records, strict=True):
        for axis, row in zip(line, record["rows"], strict=True):
            for name, colour in SCORES.items():
                axis.plot(checked, 100 * np.mean(row["curves"][name], 0), color=colour, label=name)
            axis.plot(checked, checked, ":", color="0.5", label="at random")
            axis.axvline(100 * np.mean(row["planted"]) / TRAIN, color="0.8", lw=0.8)
            title = f"{record['config']['framework']}, {row['model']}: {row['planting']} errors"
            axis.set_title(title, fontsize=9)
            axis.set_xlim(0, 60)
            axis.grid(alpha=0.3)
        line[0].set_ylabel("% of planted errors found")
    for axis in axes[-1]:
        axis.set_xlabel("% of examples checked")
    axes[-1, -1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    framework: Framework = Framework.both,
    preset: Preset = Preset.smoke,
    seed: int = 0,
    out: Path = Path("results"),
) -> None:
    """Score in one framework a process, in float64 on the CPU, then draw what was found."""
    path = out / "influence_digits.jsonl"
    if framework is Framework.both:
        found = in_each_framework(__file__, path, preset=preset, seed=seed, out=out)
        draw(found, out / "influence_digits.png")
        return
    os.environ["JAX_ENABLE_X64"] = "1"
    rows = measure(framework.value, preset.value, seed)
    config = {"framework": framework.value, "preset": preset.value, "device": "cpu", "dtype": "float64"}
    config["seed"] = seed
    append(
        path, {"experiment": "influence_digits", "config": config, "environment": environment(), "rows": rows}
    )
    show(framework.value, rows)


if __name__ == "__main__":
    typer.run(main)
