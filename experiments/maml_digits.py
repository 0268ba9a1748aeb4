"""Do meta-learned networks tell new handwritten digits apart from five examples each?

    python experiments/maml_digits.py --framework both --preset smoke|paper --out results

scikit-learn's digits: a task is three classes in random order, all turned by the same quarter turns; 5 examples of each
to adapt, 10 to test. Classes 0 to 5 are learned from, 6 to 9 held out. Against: a network pretrained to tell the 24
turned classes apart, with a new head, and one from scratch, each with the best of four rates. Expected: after five
steps MAML is ahead of the network from scratch and as good as the pretrained one; in ten, digits this small are
learned from scratch too. Trained ten times longer (paper) it is behind both: six classes are few, and it has
learned them by heart. Aborts where the meta-gradient is not that of differences. One line a framework in
results/maml_digits.jsonl, a table, a figure.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
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

WAYS, SHOTS, QUERIES, WIDTH, STEPS = 3, 5, 10, 64, 10
SEEN, HELD_OUT = (0, 1, 2, 3, 4, 5), (6, 7, 8, 9)
PRESETS = {"smoke": {"iterations": 300, "tests": 200}, "paper": {"iterations": 3000, "tests": 1000}}
HEAD = {"b0": False, "b1": False, "b2": True, "w0": False, "w1": False, "w2": True}
HOW: dict[str, dict[str, Any]] = {
    "MAML": {"method": "unroll"},
    "FOMAML": {"method": "first_order"},
    "ANIL": {"method": "unroll", "mask": HEAD},
}
RATE, INNER_STEPS, TASKS, BLOCK = 0.1, 5, 16, 50
RATES = (0.03, 0.1, 0.3, 1.0)  # that the pretrained network and the one from scratch may choose from


@cache
def images() -> tuple[np.ndarray, np.ndarray]:
    """The digits by 0 to 3 quarter turns, (turns, examples, 64), and their labels."""
    from sklearn.datasets import load_digits

    flat, labels = load_digits(return_X_y=True)
    square = flat.reshape(-1, 8, 8) / 16.0
    return np.stack([np.rot90(square, k, (1, 2)).reshape(-1, 64) for k in range(4)]), labels


def draw(rng: np.random.Generator, classes: tuple[int, ...], count: int, dtype: str) -> Any:
    """(support, query) of tasks: images (count, points, 64) and one-hot labels (count, points, 3)."""
    turned, labels = images()
    places = {c: np.flatnonzero(labels == c) for c in classes}
    X = np.empty((count, SHOTS + QUERIES, WAYS, 64), dtype)
    for i in range(count):
        turn = rng.integers(4)
        for j, c in enumerate(rng.permutation(classes)[:WAYS]):
            chosen = rng.choice(places[c], SHOTS + QUERIES, replace=False)
            X[i, :, j] = turned[turn, chosen]
    hot = np.broadcast_to(np.eye(WAYS, dtype=dtype), (count, SHOTS + QUERIES, WAYS, WAYS))
    cut = lambda a, part: np.ascontiguousarray(a[:, part].reshape(count, -1, a.shape[-1]))
    support, query = slice(0, SHOTS), slice(SHOTS, None)
    return (cut(X, support), cut(hot, support)), (cut(X, query), cut(hot, query))


def initial(ways: int, dtype: str) -> dict[str, np.ndarray]:
    """Weights of the 64-64-64 network."""
    rng, sizes = np.random.default_rng(0), (64, WIDTH, WIDTH, ways)
    params = {f"b{i}": np.zeros(sizes[i + 1]) for i in range(3)}
    params |= {
        f"w{i}": rng.normal(size=sizes[i : i + 2]) * (2 / sum(sizes[i : i + 2])) ** 0.5 for i in range(3)
    }
    return {key: leaf.astype(dtype) for key, leaf in sorted(params.items())}


def load(framework: str) -> Any:
    """gl, array, tree map, compile, vmap, value and gradient, the model and its loss."""
    gl = importlib.import_module(f"gradlab.{framework}")
    if framework == "jax":
        import jax

        tanh, log_softmax = jax.numpy.tanh, jax.nn.log_softmax
        parts = (jax.numpy.asarray, jax.tree.map, jax.jit, jax.vmap, jax.value_and_grad)
    else:
        import torch
        from torch.utils import _pytree as pytree

        torch.set_num_threads(1)
        tanh, log_softmax = torch.tanh, lambda z: z.log_softmax(-1)
        gradient = lambda f: lambda *args: torch.func.grad_and_value(f)(*args)[::-1]
        parts = (torch.as_tensor, pytree.tree_map, lambda f: f, torch.func.vmap, gradient)

    def model(p: Any, x: Any) -> Any:
        h = tanh(x @ p["w0"] + p["b0"])
        return tanh(h @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    loss = lambda p, x, y: -(y * log_softmax(model(p, x))).sum(-1).mean()
    return gl, *parts, model, loss


def verified(framework: str) -> None:
    """Abort unless the meta-gradient is that of differences, in float64."""
    gl, array, tree, _, vmap, value_and_grad, _, loss = load(framework)
    params = tree(array, initial(WAYS, "float64"))
    support, query = tree(array, draw(np.random.default_rng(1), SEEN, 2, "float64"))
    how = {"optimizer": gl.optimizers.sgd(RATE), "steps": 2}

    def outer(params: Any) -> Any:
        one = lambda a, b, c, d: loss(gl.adapt(loss, params, a, b, **how), c, d)
        return vmap(one)(*support, *query).mean()

    check.derivatives(outer, params, order=1, vmap=False, compiled=False).raise_if_failed()
    found = gl.meta_grad(loss, loss, params, (support, query), **how)
    _, expected = value_and_grad(outer)(params)
    for key in params:
        np.testing.assert_allclose(np.asarray(found[key]), np.asarray(expected[key]), atol=1e-10)


def train(framework: str, name: str, iterations: int, dtype: str, seed: int) -> tuple[Any, list[float]]:
    """Parameters after Adam's steps on the meta-gradient, or on the loss of the 24 turned classes."""
    gl, array, tree, compiled, _, value_and_grad, _, loss = load(framework)
    params = tree(array, initial(24 if name == "pretrained" else WAYS, dtype))
    adam, rng, curve = gl.optimizers.adam(1e-3), np.random.default_rng(seed + 10), []
    how = {"optimizer": gl.optimizers.sgd(RATE), "steps": INNER_STEPS, **HOW.get(name, {})}

    def step(params: Any, memory: Any, tasks: Any) -> Any:
        if name == "pretrained":
            value, gradient = value_and_grad(loss)(params, *tasks)
        else:
            value, gradient = gl.meta_value_and_grad(loss, loss, params, tasks, **how)
        updates, memory = adam.update(gradient, memory, params)
        return {key: params[key] + updates[key] for key in params}, memory, value

    step, memory = compiled(step), adam.init(params)
    turned, labels = images()
    places = np.flatnonzero(np.isin(labels, SEEN))
    for i in track(range(iterations), name, console=console()):
        if name == "pretrained":
            turn, chosen = rng.integers(4, size=256), rng.choice(places, 256)
            tasks = (
                turned[turn, chosen].astype(dtype),
                np.eye(24, dtype=dtype)[4 * labels[chosen] + turn],
            )
        else:
            tasks = draw(rng, SEEN, TASKS, dtype)
        params, memory, value = step(params, memory, tree(array, tasks))
        if i % BLOCK == 0:
            curve.append(float(value))
    return params, curve


def accuracies(framework: str, name: str, params: Any, tasks: Any, rate: float) -> np.ndarray:
    """Of each task, after 0 to 10 steps: (steps + 1, tasks)."""
    gl, array, tree, compiled, vmap, _, model, loss = load(framework)
    count = len(tasks[0][0])
    support, query = tree(array, tasks)
    how = {"optimizer": gl.optimizers.sgd(rate), "steps": 1, "mask": HOW.get(name, {}).get("mask")}
    step = compiled(lambda many: vmap(lambda p, a, b: gl.adapt(loss, p, a, b, **how))(many, *support))
    repeat = lambda leaf: np.ascontiguousarray(np.broadcast_to(leaf, (count, *leaf.shape)))
    many = {key: array(repeat(np.asarray(leaf))) for key, leaf in params.items()}
    found, right = [], np.asarray(query[1]).argmax(-1)
    for _ in range(STEPS + 1):
        found.append((np.asarray(vmap(model)(many, query[0])).argmax(-1) == right).mean(-1))
        many = step(many)
    return np.stack(found)


def evaluate(framework: str, name: str, params: Any, tests: int, dtype: str) -> dict[str, Any]:
    """Mean accuracy and 95 % interval after each step on tasks of held-out classes."""
    rng = np.random.default_rng(5)
    seen, held_out = draw(rng, SEEN, 100, dtype), draw(rng, HELD_OUT, tests, dtype)
    rate = RATE
    if name not in HOW:
        rate = max(RATES, key=lambda r: accuracies(framework, name, params, seen, r)[-1].mean())
    found = accuracies(framework, name, params, held_out, rate)
    half = 1.96 * found.std(axis=1, ddof=1) / tests**0.5
    return {"rate": rate, "accuracy": found.mean(1).tolist(), "interval": half.tolist()}


def show(framework: str, rows: list[dict[str, Any]]) -> None:
    """One table: accuracy after 0, 1, 5 and 10 steps."""
    table = Table(
        "method", "rate", "0 steps", "1", "5", "10", title=f"{framework}: accuracy on held-out classes"
    )
    for row in rows:
        cells = [f"{100 * row['accuracy'][k]:.1f} ± {100 * row['interval'][k]:.1f}" for k in (0, 1, 5, 10)]
        table.add_row(row["method"], str(row["rate"]), *cells)
    console().print(table)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against steps of adaptation; a few of the tasks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(10, 3.8))
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    axis = left.subplots()
    for record, style in zip(records, ("-", "--"), strict=False):
        for i, row in enumerate(record["rows"]):
            middle, half = 100 * np.array(row["accuracy"]), 100 * np.array(row["interval"])
            label = row["method"] if style == "-" else None
            axis.plot(middle, style, color=f"C{i}", label=label)
            if style == "-":
                axis.fill_between(range(STEPS + 1), middle - half, middle + half, color=f"C{i}", alpha=0.2)
    names = [record["config"]["framework"] for record in records]
    axis.set_title(
        ", ".join(f"{n} ({s})" for n, s in zip(names, ("solid", "dashed"), strict=False)), fontsize=10
    )
    axis.set_xlabel("steps of adaptation")
    axis.set_ylabel("accuracy on held-out classes, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    (X, _), _ = draw(np.random.default_rng(5), HELD_OUT, 3, "float32")
    grid = right.subplots(3, 9, gridspec_kw={"wspace": 0.05, "hspace": 0.25})
    for task, line in zip(X, grid, strict=True):
        for k, cell in enumerate(line):
            cell.imshow(task.reshape(SHOTS, WAYS, 8, 8)[k % 3, k // 3], cmap="gray_r")
            cell.set_axis_off()
    right.suptitle("three held-out tasks, 3 of 5 examples of each class", fontsize=10)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def main(
    framework: Framework = Framework.both,
    preset: Preset = Preset.smoke,
    out: Path = Path("results"),
    dtype: str = "float32",
    seed: int = 0,
) -> None:
    """Train and test in one framework a process, then draw what was found."""
    path = out / "maml_digits.jsonl"
    if framework is Framework.both:
        found = in_each_framework(__file__, path, preset=preset, out=out, dtype=dtype, seed=seed)
        plot(found, out / "maml_digits.png")
        return
    os.environ["JAX_ENABLE_X64"] = "1"
    verified(framework.value)
    chosen, rows = PRESETS[preset.value], []
    for name in (*HOW, "pretrained", "scratch"):
        if name == "scratch":
            params, curve = train(framework.value, "MAML", 0, dtype, seed)
        else:
            params, curve = train(framework.value, name, chosen["iterations"], dtype, seed)
        if name == "pretrained":  # a new head
            _, array, tree, *_ = load(framework.value)
            new = tree(array, initial(WAYS, dtype))
            params = {key: new[key] if HEAD[key] else leaf for key, leaf in params.items()}
        found = evaluate(framework.value, name, params, chosen["tests"], dtype)
        rows.append({"method": name, "training": curve, **found})
    config = {
        "framework": framework.value,
        "preset": preset.value,
        "device": "cpu",
        "dtype": dtype,
        "seed": seed,
    }
    append(path, {"experiment": "maml_digits", "config": config, "environment": environment(), "rows": rows})
    show(framework.value, rows)


if __name__ == "__main__":
    typer.run(main)
