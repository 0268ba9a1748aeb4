"""How accurate is a classifier of digits that was trained privately, against the epsilon that it was given?

    python experiments/dp_sgd_digits.py --framework both --preset smoke|paper --out results

Logistic regression, an MLP and a small conv net on scikit-learn's digits (1437 to train on, 360 to test), by DP-SGD:
`private_grad` on Poisson samples of 256, clipped to 1, noise calibrated by Rényi accounting, 300 steps of momentum 0.9.
Both frameworks begin at the same weights and draw the same batches; their noise is their own. Expected: accuracy
grows with epsilon, to within four points of training without privacy at 8; at 1 the model with fewest parameters does
best, since noise grows with their number; jax and torch agree within the spread of seeds. Aborts where a clipped sum
is not that of single gradients. One line a framework in results/dp_sgd_digits.jsonl, a table, a figure. The
learning rates were not chosen privately, and the seeds are fixed: repeat the method, not the run, on data that matters.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track
from rich.table import Table

from gradlab import check, privacy
from gradlab.bench.console import console
from gradlab.bench.problems import Arrays, digits
from gradlab.bench.record import append, environment, in_each_framework
from gradlab.cli import Dtype, Framework, Preset

TRAIN, BATCH, CLIP, MOMENTUM, DELTA = 1437, 256, 1.0, 0.9, 1e-4
STEPS = {"smoke": 60, "paper": 300}
EPSILONS = {"smoke": (1.0, 8.0), "paper": (1.0, 2.0, 4.0, 8.0)}
SEEDS = {"smoke": 1, "paper": 3}
SHAPES = {  # weights (inputs, outputs) and kernels (channels out, in, height, width)
    "logistic": ((64, 10),),
    "mlp": ((64, 64), (64, 10)),
    "conv": ((8, 1, 3, 3), (16, 8, 3, 3), (64, 10)),
}
RATES = {"logistic": 0.5, "mlp": 0.2, "conv": 0.1}
COLOURS = {"jax": "tab:blue", "torch": "tab:orange"}


def weights(model: str, seed: int) -> Arrays:
    """Normal weights over the root of what goes into each output, biases zero: the same in both frameworks."""
    rng = np.random.default_rng(seed)
    params = {}
    for i, shape in enumerate(SHAPES[model]):
        fan_in = shape[0] if len(shape) == 2 else np.prod(shape[1:])
        params[f"b{i}"] = np.zeros(shape[1] if len(shape) == 2 else shape[0])
        params[f"w{i}"] = rng.normal(size=shape) / np.sqrt(fan_in)
    return params


@dataclass(frozen=True)
class Backend:
    """What differs between the frameworks."""

    arrays: Callable[[Any], Any]
    loss: Callable[..., Any]
    logits: Callable[..., Any]
    gl: Any
    jit: Callable[[Any], Any]
    noise: Callable[[int], Iterator[Any]]
    padded: bool  # compiled steps want batches of one size


def backend(framework: str, dtype: str, device: str) -> Backend:
    """Logits of images (N, 64), their mean cross-entropy, and the random numbers for the noise."""
    bench, gl = import_module(f"gradlab.bench._{framework}"), import_module(f"gradlab.{framework}")
    if framework == "jax":
        import jax
        import jax.numpy as xp

        convolve = lambda h, w, stride: jax.lax.conv_general_dilated(h, w, (stride, stride), "VALID")
        noise = lambda seed: (jax.random.fold_in(jax.random.key(seed), i) for i in range(2**31))
        jit, relu = jax.jit, jax.nn.relu
    else:
        import torch as xp

        xp.set_num_threads(1)
        convolve = lambda h, w, stride: xp.nn.functional.conv2d(h, w, stride=stride)
        jit, relu = (lambda f: f), xp.relu

        def noise(seed: int) -> Iterator[Any]:
            generator = xp.Generator(device).manual_seed(seed)
            while True:
                yield generator

    def logits(params: Any, x: Any) -> Any:
        layers = len(params) // 2
        for i in range(layers):
            w, b = params[f"w{i}"], params[f"b{i}"]
            if w.ndim == 4:
                x = x.reshape(-1, 1, 8, 8) if i == 0 else x
                x = xp.tanh(convolve(x, w, i + 1) + b[:, None, None])
            else:
                x = x.reshape(len(x), -1) @ w + b
                x = relu(x) if i < layers - 1 else x
        return x

    loss = lambda params, x, y: bench.outer(logits(params, x), y)
    return Backend(
        lambda tree: bench.arrays(tree, dtype, device), loss, logits, gl, jit, noise, framework == "jax"
    )


def checked(found: Backend, model: str, X: Any, y: Any) -> None:
    """Stop if the loss has a wrong derivative, mixes examples, or the clipped sum is not that of a loop."""
    params = found.arrays(weights(model, 0))
    x, t = X[:8], y[:8]
    check.derivatives(
        lambda p: found.loss(p, x, t), params, order=1, modes="reverse", vmap=False
    ).raise_if_failed()
    alone = lambda p, batch: found.jit(lambda p, x: (found.logits(p, x) ** 2).sum(1))(p, batch)
    check.batch_independent(alone, params, x).raise_if_failed()
    clipped = lambda p, *batch: found.gl.clipped_grad(
        found.loss, p, *batch, max_norm=CLIP, keep_batch_axis=True
    )[0]
    single = found.jit(lambda p, *batch: found.gl.jacobian(found.loss, p, *batch))
    total, by_hand = found.jit(clipped)(params, x, t), dict.fromkeys(params, 0.0)
    for n in range(8):
        one = single(params, x[n : n + 1], t[n : n + 1])
        one = {name: np.asarray(g, np.float64) for name, g in one.items()}
        norm = np.sqrt(sum((g**2).sum() for g in one.values()))
        by_hand = {name: by_hand[name] + g * min(1, CLIP / norm) for name, g in one.items()}
    for name, g in total.items():
        if np.abs(np.asarray(g) - by_hand[name]).max() > 1e-5:
            raise SystemExit(f"{model}: the clipped sum is wrong in {name}")


def stepper(found: Backend, model: str) -> Callable[..., Any]:
    """One step of DP-SGD with momentum; sigma 0 and a large clip: without privacy."""

    def step(params: Any, velocity: Any, x: Any, t: Any, mask: Any, rng: Any, sigma: Any, clip: Any) -> Any:
        grad, _ = found.gl.private_grad(
            found.loss, params, x, t, max_norm=clip, noise_multiplier=sigma, expected_batch_size=BATCH,
            rng=rng, mask=mask, keep_batch_axis=True,
        )  # fmt: skip
        velocity = {name: MOMENTUM * velocity[name] + g for name, g in grad.items()}
        return {name: w - RATES[model] * velocity[name] for name, w in params.items()}, velocity

    return found.jit(step)


def trained(
    found: Backend, step: Callable[..., Any], start: Arrays, data: Any, steps: int, sigma: float, seed: int
) -> Any:
    """The parameters after so many steps on Poisson samples of the data; sigma 0: without privacy."""
    params = found.arrays(start)
    velocity = {name: 0 * w for name, w in params.items()}
    batches = privacy.poisson_batches(
        TRAIN, sample_rate=BATCH / TRAIN, steps=steps, seed=seed, padded=found.padded
    )
    for batch, rng in zip(batches, found.noise(seed), strict=False):
        chosen, mask = batch if found.padded else (batch, None)
        drawn = (a[chosen] for a in data)
        params, velocity = step(params, velocity, *drawn, mask, rng, sigma, CLIP if sigma else 1e9)
    return params


def measure(framework: str, preset: str, dtype: str, device: str, seed: int) -> list[dict[str, Any]]:
    """Test accuracy of every model at every epsilon: infinite means without privacy."""
    found = backend(framework, dtype, device)
    images, labels = digits(1797)
    X, y = found.arrays(images), found.arrays(labels)
    run = {"delta": DELTA, "sample_rate": BATCH / TRAIN, "steps": STEPS[preset]}
    sigmas = {epsilon: privacy.noise_multiplier(epsilon=epsilon, **run) for epsilon in EPSILONS[preset]}
    tight = {e: privacy.epsilon(noise_multiplier=s, accountant="pld", **run) for e, s in sigmas.items()}
    data, rows = (X[:TRAIN], y[:TRAIN]), []
    for model in track(SHAPES, framework, console=console()):
        checked(found, model, X, y)
        step = stepper(found, model)
        for epsilon, sigma in (*sigmas.items(), (None, 0.0)):
            accuracies = []
            for s in range(seed, seed + SEEDS[preset]):
                params = trained(found, step, weights(model, s), data, STEPS[preset], sigma, s)
                guessed = np.asarray(found.logits(params, X[TRAIN:])).argmax(1)
                accuracies.append(float((guessed == labels[TRAIN:]).mean()))
            row = {"model": model, "epsilon": epsilon, "epsilon_pld": tight.get(epsilon)}
            rows.append({**row, "noise_multiplier": sigma, "accuracies": accuracies})
    return rows


def spread(row: dict[str, Any]) -> tuple[float, float]:
    """Mean and standard deviation over seeds, in per cent."""
    percent = 100 * np.array(row["accuracies"])
    return float(percent.mean()), float(percent.std(ddof=1)) if len(percent) > 1 else 0.0


def show(framework: str, rows: list[dict[str, Any]]) -> None:
    """A line for each epsilon, a column for each model."""
    table = Table("epsilon", "by PLD", "noise multiplier", *SHAPES, title=f"{framework}: test accuracy, %")
    for epsilon in dict.fromkeys(row["epsilon"] for row in rows):
        line = [row for row in rows if row["epsilon"] == epsilon]
        cells = ["{:.1f} ± {:.1f}".format(*spread(row)) for row in line]
        heads = ["none", "", ""]
        if epsilon:
            heads = [f"{epsilon:g}", f"{line[0]['epsilon_pld']:.2f}", f"{line[0]['noise_multiplier']:.2f}"]
        table.add_row(*heads, *cells)
    console().print(table)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against epsilon, a panel a model: every seed a dot, their means a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SHAPES), figsize=(11, 3.6), sharey=True)
    for axis, model in zip(axes, SHAPES, strict=True):
        for side, record in zip((0.97, 1.03), records, strict=True):
            framework = record["config"]["framework"]
            rows = [row for row in record["rows"] if row["model"] == model]
            private = [row for row in rows if row["epsilon"]]
            at = np.array([row["epsilon"] for row in private]) * side
            colour = COLOURS[framework]
            axis.semilogx(at, [spread(row)[0] for row in private], "-", color=colour, label=framework)
            for x, row in zip(at, private, strict=True):
                seeds = 100 * np.array(row["accuracies"])
                axis.plot([x] * len(seeds), seeds, "o", color=colour, ms=4, alpha=0.6)
        free = [
            spread(row)[0]
            for r in records
            for row in r["rows"]
            if row["model"] == model and not row["epsilon"]
        ]
        axis.axhline(np.mean(free), color="0.4", ls=":", label="no privacy, both")
        ticks = [row["epsilon"] for row in private]
        axis.set_xticks(ticks, [f"{e:g}" for e in ticks])
        axis.minorticks_off()
        count = sum(int(np.prod(shape)) for shape in SHAPES[model])
        axis.set_title(f"{model}, {count} weights", fontsize=10)
        axis.set_xlabel(f"epsilon, at delta {DELTA:g}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    axes[-1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    framework: Framework = Framework.both,
    preset: Preset = Preset.smoke,
    device: str = "cpu",
    dtype: Dtype = Dtype.float32,
    seed: int = 0,
    out: Path = Path("results"),
) -> None:
    """Train in one framework a process, then draw what came out."""
    path = out / "dp_sgd_digits.jsonl"
    config = {"preset": preset.value, "device": device, "dtype": dtype.value, "seed": seed}
    if framework is Framework.both:
        draw(in_each_framework(__file__, path, **config, out=out), out / "dp_sgd_digits.png")
        return
    logging.getLogger("absl").setLevel(logging.ERROR)  # dp-accounting names every Rényi order it leaves out
    os.environ["JAX_ENABLE_X64"] = str(int(dtype is Dtype.float64))
    rows = measure(framework.value, preset.value, dtype.value, device, seed)
    config = {"framework": framework.value, **config}
    append(
        path, {"experiment": "dp_sgd_digits", "config": config, "environment": environment(), "rows": rows}
    )
    show(framework.value, rows)


if __name__ == "__main__":
    typer.run(main)
