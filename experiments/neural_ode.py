"""Do neural ODEs learn the same in both frameworks: a spiral from its points, and real digits by an augmented state?

    python experiments/neural_ode.py --framework both --preset smoke|paper --out results

Chen et al. 2018: y' = network(y³), fitted to short pieces of the spiral y' = A y³, then followed over its whole length.
Dupont et al. 2019: scikit-learn's digits as the start of an ODE whose end a linear layer classifies, with 16 more
dimensions that start at zero, and without; against the linear layer alone. Expected: both frameworks, from the same
weights and batches, with the same losses until their rounding has grown; the spiral followed to a few tenths (over 25
units of time a small error is a lag of phase); the digits told apart better than by the linear layer. Aborts where
`check.derivatives` fails. One line a framework in results/neural_ode.jsonl, a table, a figure.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.table import Table

from gradlab import check
from gradlab.bench.console import console
from gradlab.bench.record import append, environment, in_each_framework
from gradlab.bench.training import train
from gradlab.cli import Framework, Preset

PRESETS = {"smoke": {"spiral": 300, "digits": 100}, "paper": {"spiral": 2000, "digits": 1000}}
A, START, END, POINTS = np.array([[-0.1, -2.0], [2.0, -0.1]]), np.array([2.0, 0.0]), 25.0, 1000
PIECES, LENGTH, HIDDEN = 20, 10, 50  # of the spiral: pieces in a batch, points in a piece
BATCH, WIDTH = 128, 64
MODELS = {"linear": None, "neural ODE": 0, "augmented": 16}  # dimensions beyond the 64 pixels
TOLERANCES = {"rtol": 1e-3, "atol": 1e-4}
Params = dict[str, Any]


@cache
def spiral() -> tuple[np.ndarray, np.ndarray]:
    """Times (1000,) and points (1000, 2) of y' = A y³ from (2, 0)."""
    from scipy.integrate import solve_ivp

    ts = np.linspace(0.0, END, POINTS)
    found = solve_ivp(
        lambda t, y: A @ y**3, (0, END), START, t_eval=ts, rtol=1e-10, atol=1e-12, method="DOP853"
    )
    return ts, found.y.T


@cache
def digits() -> tuple[Any, Any]:
    """Four fifths of the digits to train on and the rest to test: images (n, 64) and one-hot labels (n, 10)."""
    from sklearn.datasets import load_digits

    X, labels = load_digits(return_X_y=True)
    order, cut = np.random.default_rng(0).permutation(len(X)), 1437
    X, hot = X[order] / 16.0, np.eye(10)[labels[order]]
    return (X[:cut], hot[:cut]), (X[cut:], hot[cut:])


def layers(*sizes: int, last: float = 1.0) -> dict[str, np.ndarray]:
    """Weights of a network, seeded; those of the last layer are scaled."""
    rng, count = np.random.default_rng(3), len(sizes) - 1
    params = {f"b{i}": np.zeros(sizes[i + 1]) for i in range(count)}
    for i in range(count):
        params[f"w{i}"] = (
            rng.normal(size=sizes[i : i + 2]) / sizes[i] ** 0.5 * (last if i == count - 1 else 1)
        )
    return dict(sorted(params.items()))


class Side:
    """One framework: gradlab's namespace, and the few names that a model needs."""

    def __init__(self, framework: str):
        self.gl: Any = importlib.import_module(f"gradlab.{framework}")
        if framework == "jax":
            import jax
            import jax.numpy as jnp

            self.array, self.tree, self.tanh, self.cat = jnp.asarray, jax.tree.map, jnp.tanh, jnp.concatenate
            self.zeros: Any = lambda x, n: jnp.zeros((*x.shape[:-1], n), x.dtype)
            self.log_softmax: Any = jax.nn.log_softmax
        else:
            import torch
            from torch.utils import _pytree as pytree

            torch.set_num_threads(1)
            self.array, self.tree, self.tanh, self.cat = (
                torch.as_tensor,
                pytree.tree_map,
                torch.tanh,
                torch.cat,
            )
            self.zeros = lambda x, n: x.new_zeros(*x.shape[:-1], n)
            self.log_softmax = lambda z: z.log_softmax(-1)

    def network(self, p: Params, y: Any) -> Any:
        """Two layers."""
        return self.tanh(y @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"]

    def followed(self, p: Params, y0: Any, ts: Any) -> Any:
        """The states (T, ..., 2) of y' = network(y³)."""
        return self.gl.odeint(
            lambda t, y, p: self.network(p, y**3), y0, ts, p, method="tsit5", **TOLERANCES
        ).ys

    def pieces(self, p: Params, y0: Any, ts: Any, ys: Any) -> Any:
        """How far pieces of the spiral are missed, as a mean square."""
        return ((self.followed(p, y0, ts) - ys) ** 2).mean()

    def logits(self, p: Params, x: Any, more: int | None) -> Any:
        """Of images, by the end of an ODE that starts with them."""
        if more is not None:
            x = self.cat([x, self.zeros(x, more)], -1)
            ts = self.array(np.array([0.0, 1.0], "float32"))
            x = self.gl.odeint(lambda t, h, p: self.network(p, h), x, ts, p, method="tsit5", **TOLERANCES).ys[
                -1
            ]
        return x @ p["w2"] + p["b2"]

    def entropy(self, p: Params, x: Any, hot: Any, more: int | None) -> Any:
        """Mean cross-entropy."""
        return -(hot * self.log_softmax(self.logits(p, x, more))).sum(-1).mean()


def verified(framework: str) -> None:
    """Abort unless a gradient through the solution is that of differences, in float64."""
    side = Side(framework)
    params = side.tree(side.array, layers(2, 4, 2))
    ts, y0 = side.array(np.array([0.0, 0.3, 0.7])), side.array(np.array([[1.0, 0.5], [0.2, -0.4]]))
    field = lambda t, y, p: side.network(p, y**3)
    end = lambda p: (side.gl.odeint(field, y0, ts, p, method="tsit5", rtol=1e-10, atol=1e-12).ys ** 2).sum()
    check.derivatives(end, params, order=1, vmap=False, compiled=False, accuracy=1e-7).raise_if_failed()


def spiral_batches(seed: int) -> Any:
    """Starts (20, 2), times (10,) and points (10, 20, 2)."""
    ts, ys = (a.astype("float32") for a in spiral())
    rng = np.random.default_rng(seed)
    while True:
        first = rng.choice(POINTS - LENGTH, PIECES, replace=False)
        yield ys[first], ts[:LENGTH], np.stack([ys[first + k] for k in range(LENGTH)])


def digit_batches(seed: int) -> Any:
    """Images (128, 64) and labels (128, 10)."""
    (X, hot), _ = digits()
    rng = np.random.default_rng(seed)
    while True:
        chosen = rng.choice(len(X), BATCH, replace=False)
        yield X[chosen].astype("float32"), hot[chosen].astype("float32")


def learned(framework: str, preset: str, seed: int) -> dict[str, Any]:
    """Losses, speeds and what was reached, of the spiral and of the digits."""
    side, counts = Side(framework), PRESETS[preset]
    single = lambda params: side.tree(lambda a: side.array(a.astype("float32")), params)
    params, losses, seconds = train(
        framework,
        side.pieces,
        single(layers(2, HIDDEN, 2, last=0.1)),
        spiral_batches(seed),
        3e-2,
        "spiral",
        counts["spiral"],
    )
    ts, ys = spiral()
    path = np.asarray(side.followed(params, *(side.array(a.astype("float32")) for a in (START, ts))))
    far = float(np.sqrt(((path - ys) ** 2).sum(-1).mean()))
    rows = [{"task": "spiral", "losses": losses, "seconds": seconds, "reached": far}]
    (_, _), (X, hot) = digits()
    for name, more in MODELS.items():
        size = 64 + (more or 0)
        params = {
            f"{kind}2": leaf for (kind, _), leaf in zip(("b0", "w0"), layers(size, 10).values(), strict=True)
        }
        if more is not None:
            params |= layers(size, WIDTH, size, last=0.1)
        loss = lambda p, x, hot, more=more: side.entropy(p, x, hot, more)
        found, losses, seconds = train(
            framework, loss, single(params), digit_batches(seed), 3e-3, name, counts["digits"]
        )
        answers = np.asarray(side.logits(found, side.array(X.astype("float32")), more)).argmax(-1)
        right = float((answers == hot.argmax(-1)).mean())
        rows.append({"task": name, "losses": losses, "seconds": seconds, "reached": right})
    return {"rows": rows, "path": path[::5].tolist()}


def show(framework: str, rows: list[dict[str, Any]]) -> None:
    """One table."""
    table = Table("task", "first loss", "last loss", "ms a step", "reached", title=framework)
    for row in rows:
        reached = (
            f"{row['reached']:.3f} away" if row["task"] == "spiral" else f"{100 * row['reached']:.1f} % right"
        )
        last = np.mean(row["losses"][-10:])
        table.add_row(
            row["task"], f"{row['losses'][0]:.4f}", f"{last:.5f}", f"{1e3 * row['seconds']:.1f}", reached
        )
    console().print(table)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """The spiral as it is and as it was learned; losses of both frameworks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8))
    ys = spiral()[1]
    left.plot(*ys.T, color="0.75", lw=4, label="spiral")
    for record, style in zip(records, ("-", "--"), strict=True):
        name = record["config"]["framework"]
        left.plot(*np.array(record["path"]).T, style, lw=1.2, label=f"learned, {name}")
        for i, row in enumerate(record["rows"]):
            axis = middle if row["task"] == "spiral" else right
            width = max(1, len(row["losses"]) // 60)
            smooth = np.convolve(row["losses"], np.ones(width) / width, "valid")
            axis.semilogy(smooth, style, color=f"C{i}", label=f"{row['task']}, {name}")
    for axis, title in zip(
        (left, middle, right), ("the spiral", "its loss", "digits: cross-entropy"), strict=True
    ):
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    for axis in (middle, right):
        axis.set_xlabel("steps")
    left.set_aspect("equal")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    framework: Framework = Framework.both,
    preset: Preset = Preset.smoke,
    out: Path = Path("results"),
    seed: int = 0,
) -> None:
    """Train in one framework a process, then compare."""
    path = out / "neural_ode.jsonl"
    if framework is Framework.both:
        found = in_each_framework(__file__, path, preset=preset.value, out=out, seed=seed)
        plot(found, out / "neural_ode.png")
        for ours, theirs in zip(*(record["rows"] for record in found), strict=True):
            a, b = (np.array(row["losses"][:50]) for row in (ours, theirs))
            console().print(
                f"{ours['task']}: losses of the first 50 steps differ by {np.max(abs(a - b) / a):.1e}"
            )
        return
    os.environ["JAX_ENABLE_X64"] = "1"
    verified(framework.value)
    found = learned(framework.value, preset.value, seed)
    config = {
        "framework": framework.value,
        "preset": preset.value,
        "device": "cpu",
        "dtype": "float32",
        "seed": seed,
    }
    append(path, {"experiment": "neural_ode", "config": config, "environment": environment(), **found})
    show(framework.value, found["rows"])


if __name__ == "__main__":
    typer.run(main)
