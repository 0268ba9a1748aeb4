"""Does a continuous normalizing flow learn a density in the plane, normalised, and the same in both frameworks?

    python experiments/cnf.py --framework both --preset smoke|paper --out results

Two moons, two spirals and a chessboard by `flow_log_density`: a network of 64-64 units moves a normal distribution for
one unit of time, trained by Adam on the exact log-likelihood. Against a Gaussian kernel estimate of the same points and
the best normal distribution. Both frameworks compile the steps. Expected: held-out log-likelihood above both;
densities that integrate to one on a grid; both frameworks, from the same weights and batches, alike. Aborts where
`check.derivatives` fails. One line a framework in results/cnf.jsonl, a table, a figure.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import typer
from rich.table import Table

from gradlab import check
from gradlab.bench.console import console
from gradlab.bench.record import append, environment, in_each_framework
from gradlab.bench.training import train
from gradlab.cli import Framework, Preset

PRESETS = {"smoke": 150, "paper": 2000}
BATCH, HELD_OUT, WIDTH, REACH, GRID = 256, 2000, 64, 4.0, 60
TOLERANCES = {"rtol": 1e-4, "atol": 1e-5, "method": "tsit5"}


def moons(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two half circles."""
    upper, angle = rng.integers(2, size=n), np.pi * rng.random(n)
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle)), np.where(upper, np.sin(angle), 0.5 - np.sin(angle))
    return 1.6 * (np.stack(x, 1) - [0.5, 0.25]) + 0.12 * rng.normal(size=(n, 2))


def spirals(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two arms."""
    angle = np.sqrt(rng.random(n)) * 3 * np.pi
    arm = np.stack([-np.cos(angle) * angle, np.sin(angle) * angle], 1) / 3.3
    return np.where(rng.integers(2, size=(n, 1)), arm, -arm) + 0.12 * rng.normal(size=(n, 2))


def chessboard(rng: np.random.Generator, n: int) -> np.ndarray:
    """Eight of sixteen squares."""
    x = 4 * rng.random(n) - 2
    y = rng.random(n) - 2 * rng.integers(2, size=n) + np.floor(x) % 2
    return 1.5 * np.stack([x, y], 1)


DENSITIES = {"moons": moons, "spirals": spirals, "chessboard": chessboard}


def initial(dtype: str) -> dict[str, np.ndarray]:
    """Weights of the 3-64-64-2 network of (z, t), that moves little at first."""
    rng, sizes = np.random.default_rng(4), (3, WIDTH, WIDTH, 2)
    params = {f"b{i}": np.zeros(sizes[i + 1]) for i in range(3)}
    params |= {
        f"w{i}": rng.normal(size=sizes[i : i + 2]) / sizes[i] ** 0.5 * (0.1 if i == 2 else 1)
        for i in range(3)
    }
    return {key: leaf.astype(dtype) for key, leaf in sorted(params.items())}


def load(framework: str) -> Any:
    """The framework's names under one set."""
    gl = importlib.import_module(f"gradlab.{framework}")
    if framework == "jax":
        import jax
        import jax.numpy as jnp

        return SimpleNamespace(
            gl=gl,
            array=jnp.asarray,
            tree=jax.tree.map,
            compiled=jax.jit,
            options={},
            tanh=jnp.tanh,
            with_time=lambda z, t: jnp.append(z, jnp.asarray(t, z.dtype)),
            with_time_all=lambda z, t: jnp.concatenate([z, jnp.full((len(z), 1), t, z.dtype)], 1),
        )
    import torch
    from torch.utils import _pytree as pytree

    torch.set_num_threads(1)

    return SimpleNamespace(
        gl=gl,
        array=torch.as_tensor,
        tree=pytree.tree_map,
        compiled=lambda f: f,
        options={"compile": True},
        tanh=torch.tanh,
        with_time=lambda z, t: torch.cat([z, t.reshape(1).to(z.dtype)]),
        with_time_all=lambda z, t: torch.cat([z, t.to(z.dtype).expand(len(z), 1)], 1),
    )


def network(fw: Any, p: Any, x: Any) -> Any:
    """Three layers."""
    h = fw.tanh(x @ p["w0"] + p["b0"])
    return fw.tanh(h @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def log_normal(z: Any) -> Any:
    """Of the standard normal distribution in the plane."""
    return -(z**2).sum() / 2 - np.log(2 * np.pi)


def log_density(fw: Any, params: Any, x: Any, **options: Any) -> Any:
    """Of points (B, 2)."""
    velocity = lambda t, z, p: network(fw, p, fw.with_time(z, t))
    return fw.gl.flow_log_density(
        velocity, x, params, ts=(0.0, 1.0), log_base=log_normal, **{**TOLERANCES, **fw.options, **options}
    )


def drawn(fw: Any, params: Any, n: int) -> np.ndarray:
    """Samples (n, 2)."""
    z = fw.array(np.random.default_rng(8).normal(size=(n, 2)).astype("float32"))
    ts = fw.array(np.array([0.0, 1.0]))
    velocity = lambda t, z, p: network(fw, p, fw.with_time_all(z, t))
    return np.asarray(fw.gl.odeint(velocity, z, ts, params, **TOLERANCES).ys[-1])


def verified(framework: str) -> None:
    """Abort unless the gradient of the likelihood is that of differences, in float64."""
    fw, points = load(framework), moons(np.random.default_rng(0), 4)
    params = fw.tree(fw.array, initial("float64"))
    held = {key: leaf for key, leaf in params.items() if key != "w2"}
    loss = lambda w2: log_density(fw, {**held, "w2": w2}, fw.array(points), rtol=1e-9, atol=1e-11).mean()
    check.derivatives(
        loss, params["w2"], order=1, modes="reverse", vmap=False, compiled=False, accuracy=1e-7
    ).raise_if_failed()


def batches(name: str, seed: int) -> Any:
    """Points (256, 2)."""
    rng = np.random.default_rng(seed)
    while True:
        yield (DENSITIES[name](rng, BATCH).astype("float32"),)


def judged(fw: Any, name: str, params: Any, seed: int) -> dict[str, Any]:
    """Held-out log-likelihood beside the baselines', the density on a grid with its integral, and samples."""
    from scipy.stats import gaussian_kde, multivariate_normal

    rng = np.random.default_rng(seed + 1000)
    seen, new = (DENSITIES[name](rng, HELD_OUT) for _ in range(2))
    evaluate = fw.compiled(lambda x: log_density(fw, params, x))
    cut = lambda x: np.concatenate(
        [np.asarray(evaluate(fw.array(part))) for part in np.split(x, len(x) // 400)]
    )
    ticks = (np.arange(GRID) + 0.5) * 2 * REACH / GRID - REACH
    plane = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2).astype("float32")
    density = np.exp(cut(plane)).reshape(GRID, GRID)
    normal = multivariate_normal(seen.mean(0), np.cov(seen.T))
    return {
        "log_likelihood": float(cut(new.astype("float32")).mean()),
        "kernel_estimate": float(gaussian_kde(seen.T, 0.12).logpdf(new.T).mean()),
        "normal": float(normal.logpdf(new).mean()),
        "integral": float(density.sum() * (2 * REACH / GRID) ** 2),
        "density": np.round(density, 4).tolist(),
        "samples": np.round(drawn(fw, params, 600), 2).tolist(),
    }


def show(framework: str, rows: list[dict[str, Any]]) -> None:
    """One table."""
    table = Table(
        "density",
        "flow",
        "kernel estimate",
        "normal",
        "integral",
        "ms a step",
        title=f"{framework}: nats a point",
    )
    for row in rows:
        cells = [f"{row[key]:.3f}" for key in ("log_likelihood", "kernel_estimate", "normal", "integral")]
        table.add_row(row["name"], *cells, f"{1e3 * row['seconds']:.1f}")
    console().print(table)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """A row a density: points, the learned density of both frameworks, samples; losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(DENSITIES), 5, figsize=(15, 3 * len(DENSITIES)))
    for line, rows in zip(axes, zip(*(record["rows"] for record in records), strict=True), strict=True):
        name = rows[0]["name"]
        points = DENSITIES[name](np.random.default_rng(0), 1000)
        line[0].scatter(*points.T, s=2, color="0.3")
        line[0].set_title(f"{name}: points", fontsize=9)
        line[3].scatter(*np.array(rows[0]["samples"]).T, s=2, color="tab:blue")
        line[3].set_title("samples of the flow", fontsize=9)
        for axis, row, record in zip(line[1:3], rows, records, strict=True):
            density = np.array(row["density"])
            axis.imshow(
                density,
                origin="lower",
                extent=(-REACH, REACH) * 2,
                cmap="magma",
                vmax=np.quantile(density, 0.995),
            )
            framework = record["config"]["framework"]
            axis.set_title(f"{framework}: integral {row['integral']:.3f}", fontsize=9)
            width = max(1, len(row["losses"]) // 50)
            smooth = np.convolve(row["losses"], np.ones(width) / width, "valid")
            line[4].plot(smooth, "-" if framework == "jax" else ":", lw=2, label=framework)
        line[4].axhline(-rows[0]["kernel_estimate"], color="0.5", ls="--", label="kernel estimate")
        line[4].axhline(-rows[0]["normal"], color="0.7", ls=":", label="normal")
        line[4].set_title("loss in nats", fontsize=9)
        line[4].grid(alpha=0.3)
        for axis in (line[0], line[3]):
            axis.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal")
        for axis in line[:4]:
            axis.set(xticks=[], yticks=[])
    axes[0, 4].legend(fontsize=7)
    axes[-1, 4].set_xlabel("steps")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(
    framework: Framework = Framework.both,
    preset: Preset = Preset.smoke,
    out: Path = Path("results"),
    seed: int = 0,
) -> None:
    """Train in one framework a process, then draw both."""
    path = out / "cnf.jsonl"
    if framework is Framework.both:
        plot(in_each_framework(__file__, path, preset=preset.value, out=out, seed=seed), out / "cnf.png")
        return
    os.environ["JAX_ENABLE_X64"] = "1"
    verified(framework.value)
    fw, rows = load(framework.value), []
    for name in DENSITIES:
        params, losses, seconds = train(
            framework.value,
            lambda p, x: -log_density(fw, p, x).mean(),
            fw.tree(fw.array, initial("float32")),
            batches(name, seed),
            3e-3,
            name,
            PRESETS[preset.value],
        )
        rows.append({"name": name, "losses": losses, "seconds": seconds, **judged(fw, name, params, seed)})
    config = {
        "framework": framework.value,
        "preset": preset.value,
        "device": "cpu",
        "dtype": "float32",
        "seed": seed,
    }
    append(path, {"experiment": "cnf", "config": config, "environment": environment(), "rows": rows})
    show(framework.value, rows)


if __name__ == "__main__":
    typer.run(main)
