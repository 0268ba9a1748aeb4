"""Do hyperparameters learned by bilevel gradients beat a grid search that costs the same?

    python experiments/hyperparameters.py --framework both --preset smoke|paper --out results

Logistic regression on scikit-learn's digits, 600 training examples of which 40 % have a random label, 150 clean
validation examples, the rest for the test. Learned: a weight for every training example and the penalty, by
`bilevel_value_and_grad` (implicit, conjugate gradients) and Adam. Against: a grid search over the penalty, all weights
equal, with as many gradients of the training loss; and training on the validation examples themselves. Expected: the
learned weights tell wrong labels from right ones, and the test accuracy is well above the grid's. Aborts where
the gradient is not that of differences. One line a framework in results/hyperparameters.jsonl, a table, a figure.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track
from rich.table import Table

from gradlab import check
from gradlab.bench.console import console
from gradlab.bench.record import append, environment, in_each_framework
from gradlab.cli import Framework, Preset

NOISE, STEPS, CG_STEPS, CLASSES = 0.4, 100, 20, 10
ITERATIONS = {"smoke": 30, "paper": 100}
SEEDS = {"smoke": (0,), "paper": (0, 1, 2)}
# Gradients of the training loss in one bilevel gradient: the steps, and a Hessian product (two) for each of CG's.
COST = STEPS + 2 * CG_STEPS + 2


def digits(seed: int) -> dict[str, np.ndarray]:
    """Images with a constant column, one-hot labels, and which training labels are wrong."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    X = np.concatenate([images / 16.0, np.ones((len(labels), 1))], axis=1)[order]
    y = labels[order]
    given = y[:600].copy()
    noisy = rng.random(600) < NOISE
    given[noisy] = rng.integers(0, CLASSES, noisy.sum())
    hot = np.eye(CLASSES)
    return {
        "X": X[:600], "y": hot[given], "X_val": X[600:750], "y_val": hot[y[600:750]],
        "X_test": X[750:], "y_test": hot[y[750:]], "wrong": given != y[:600],
    }  # fmt: skip


def load(framework: str) -> Any:
    """array, compile, log_softmax, sigmoid, exp, gl of a framework."""
    gl = importlib.import_module(f"gradlab.{framework}")
    if framework == "jax":
        import jax

        xp = jax.numpy
        return xp.asarray, jax.jit, jax.nn.log_softmax, jax.nn.sigmoid, xp.exp, gl
    import torch

    torch.set_num_threads(1)
    return torch.as_tensor, lambda f: f, lambda z: z.log_softmax(-1), torch.sigmoid, torch.exp, gl


def losses(framework: str) -> tuple[Any, Any]:
    """inner(w, meta, X, y), weighted and penalised; outer(w, meta, X, y), neither."""
    _, _, log_softmax, sigmoid, exp, _ = load(framework)
    errors = lambda w, X, y: -(y * log_softmax(X @ w)).sum(-1)

    def inner(w: Any, meta: Any, X: Any, y: Any) -> Any:
        weights = sigmoid(meta["weight"])
        return (weights * errors(w, X, y)).mean() + exp(meta["penalty"]) * (w**2).sum() / 2

    return inner, lambda w, meta, X, y: errors(w, X, y).mean()


def verified(framework: str) -> None:
    """Abort unless the implicit gradient is that of differences through 2000 steps, on few examples."""
    array, _, _, _, _, gl = load(framework)
    inner, outer = losses(framework)
    data = {key: array(a[:12]) for key, a in digits(0).items() if a.ndim == 2}
    meta = {"weight": array(np.linspace(-1, 1, 12)), "penalty": array(np.array(-1.0))}
    start = array(np.zeros((65, CLASSES)))
    pairs = (data["X"], data["y"]), (data["X_val"], data["y_val"])
    how = {"optimizer": gl.optimizers.sgd(0.2, 0.9, nesterov=True), "steps": 400, "method": "implicit"}
    gradient = gl.bilevel_grad(inner, outer, meta, start, pairs, **how)
    solved = gl.argmin(inner, linear_solver="cg")
    value = lambda meta: outer(solved(start, meta, *pairs[0]), meta, *pairs[1])
    h = 1e-4
    for key, i in (("weight", 3), ("weight", 8), ("penalty", ())):
        e = np.zeros(meta[key].shape)
        e[i] = h
        ends = [float(value({**meta, key: meta[key] + s * array(e)})) for s in (1, -1)]
        slope = float(gradient[key][i] if i != () else gradient[key])
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-9)
    check.derivatives(lambda m: inner(start + 0.1, m, *pairs[0]), meta, order=2, vmap=False).raise_if_failed()


def fit(framework: str, X: Any, y: Any) -> Callable[[Any], Any]:
    """Weights of the regression after all steps, as a function of meta."""
    array, compiled, _, _, _, gl = load(framework)
    inner, _ = losses(framework)
    start = array(np.zeros((X.shape[1], CLASSES)))
    how = {"optimizer": gl.optimizers.sgd(0.15, 0.9, nesterov=True), "steps": STEPS}
    return compiled(lambda meta: gl.adapt(lambda w, *d: inner(w, meta, *d), start, X, y, **how))


def run(framework: str, preset: str, seed: int) -> dict[str, Any]:
    """Test accuracies of all three, and the learned weights."""
    array, compiled, _, sigmoid, _, gl = load(framework)
    inner, outer = losses(framework)
    raw = digits(seed)
    data = {key: array(a) for key, a in raw.items() if key != "wrong"}
    n, start = len(raw["X"]), array(np.zeros((65, CLASSES)))
    accuracy = lambda w, part: float(
        (np.asarray(data[f"X_{part}"] @ w).argmax(-1) == raw[f"y_{part}"].argmax(-1)).mean()
    )
    pairs = (data["X"], data["y"]), (data["X_val"], data["y_val"])
    gradient = compiled(
        lambda meta: gl.bilevel_value_and_grad(
            inner, outer, meta, start, pairs, optimizer=gl.optimizers.sgd(0.15, 0.9, nesterov=True), steps=STEPS,
            method="implicit", cg_steps=CG_STEPS,
        )
    )  # fmt: skip
    meta = {"weight": array(np.zeros(n)), "penalty": array(np.array(-5.0))}
    adam = gl.optimizers.adam(0.2)
    memory, curve = adam.init(meta), []
    training = fit(framework, *pairs[0])
    for i in track(range(ITERATIONS[preset]), f"{framework}, seed {seed}", console=console()):
        value, slope = gradient(meta)
        if i % 5 == 0:
            curve.append([i * COST, float(value), accuracy(training(meta), "test")])
        updates, memory = adam.update(slope, memory, meta)
        meta = {key: meta[key] + updates[key] for key in meta}
    learned = accuracy(training(meta), "test")
    count = ITERATIONS[preset] * COST // STEPS
    found = []
    for penalty in np.linspace(-12.0, 2.0, count):
        w = training({"weight": array(np.zeros(n)), "penalty": array(penalty)})
        found.append([accuracy(w, "val"), accuracy(w, "test"), float(penalty)])
    best = max(found, key=lambda row: row[0])
    clean = fit(framework, *pairs[1])
    alone = []
    for penalty in np.linspace(-12.0, 2.0, 15):
        w = clean({"weight": array(np.zeros(150)), "penalty": array(penalty)})
        alone.append(accuracy(w, "test"))
    return {
        "seed": seed, "learned": learned, "grid": best[1], "grid_best_possible": max(row[1] for row in found),
        "validation_alone": max(alone), "grid_points": count, "gradients": ITERATIONS[preset] * COST,
        "curve": curve, "weights": np.asarray(sigmoid(meta["weight"])).tolist(), "wrong": raw["wrong"].tolist(),
        "penalty": float(meta["penalty"]),
    }  # fmt: skip


def show(framework: str, rows: list[dict[str, Any]]) -> None:
    """One table: accuracy on the test examples."""
    table = Table(
        "seed", "learned", "grid search", "grid, best on the test", "validation alone", "AUC", title=framework
    )
    for row in rows:
        keys = ("learned", "grid", "grid_best_possible", "validation_alone")
        table.add_row(str(row["seed"]), *(f"{row[key]:.3f}" for key in keys), f"{area(row):.3f}")
    console().print(table)


def area(row: dict[str, Any]) -> float:
    """The share of pairs of a right and a wrong label of which the right one has the larger weight."""
    weights, wrong = np.array(row["weights"]), np.array(row["wrong"])
    return float((weights[~wrong][:, None] > weights[wrong][None, :]).mean())


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Test accuracy against cost, both frameworks; the learned weights of right and wrong labels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for record, style in zip(records, ("-", "--"), strict=False):
        cost, _, test = np.array(record["rows"][0]["curve"]).T
        name = record["config"]["framework"]
        left.plot(cost, 100 * test, style, color="C0", label=f"learned weights, {name}")
    row = records[0]["rows"][0]
    left.axhline(100 * row["grid"], color="C1", linestyle="-", label="grid search, same cost in all")
    left.axhline(100 * row["validation_alone"], color="C2", linestyle=":", label="validation examples alone")
    left.set_xlabel("gradients of the training loss")
    left.set_ylabel("test accuracy, %")
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    weights, wrong = np.array(row["weights"]), np.array(row["wrong"])
    bins = np.linspace(0, 1, 31)
    right.hist(weights[~wrong], bins, alpha=0.6, color="C0", label=f"right labels ({(~wrong).sum()})")
    right.hist(weights[wrong], bins, alpha=0.6, color="C3", label=f"wrong labels ({wrong.sum()})")
    right.set_xlabel("learned weight")
    right.set_ylabel("training examples")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    framework: Framework = Framework.both, preset: Preset = Preset.smoke, out: Path = Path("results")
) -> None:
    """Learn in one framework a process, then draw what was found."""
    path = out / "hyperparameters.jsonl"
    if framework is Framework.both:
        plot(in_each_framework(__file__, path, preset=preset, out=out), out / "hyperparameters.png")
        return
    os.environ["JAX_ENABLE_X64"] = "1"
    verified(framework.value)
    rows = [run(framework.value, preset.value, seed) for seed in SEEDS[preset.value]]
    config = {"framework": framework.value, "preset": preset.value, "device": "cpu", "dtype": "float64"}
    record = {"experiment": "hyperparameters", "config": config, "environment": environment(), "rows": rows}
    append(path, record)
    show(framework.value, rows)


if __name__ == "__main__":
    typer.run(main)
