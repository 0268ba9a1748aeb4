"""How well do noisy observations determine the rates of a stiff reaction, and are the intervals told honestly?

    python experiments/parameter_estimation.py --framework both --preset smoke|paper --out results

Robertson's three species, observed at 24 times between 0.01 and 1000 with 2 % noise; the logarithms of the three rate
constants, which are nine orders of magnitude apart, are fitted by Gauss-Newton steps through `odeint` (kvaerno5) from
a start that is off by a factor of two. Intervals come from the Hessian of the likelihood through the solve, and from
Gauss-Newton's approximation of it. Expected: a handful of steps; both intervals alike; over many draws of the noise the
truth lies in the 95 % interval in about 95 of 100. Aborts where the Jacobian is not that of differences. One line a
framework in results/parameter_estimation.jsonl, a table, a figure.
"""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import typer
from rich.progress import track
from rich.table import Table

from gradlab import check
from gradlab.bench.console import console
from gradlab.bench.record import append, environment, in_each_framework
from gradlab.cli import Framework, Preset

DRAWS = {"smoke": 20, "paper": 200}
RATES, NAMES = np.array([0.04, 3e7, 1e4]), ("k1", "k2", "k3")
TIMES = np.concatenate([[0.0], np.logspace(-2, 3, 24)])
START = np.array([1.0, 0.0, 0.0])
UNITS = np.array([1.0, 3.65e-5, 1.0])  # of the species, by their largest amounts
NOISE, STEPS, OFF = 0.02, 8, np.log([2.0, 0.5, 2.0])
HOW = {"method": "kvaerno5", "adjoint": "forward", "rtol": 1e-6, "atol": 1e-10}  # three directions


def load(framework: str) -> Any:
    """The framework's names under one set."""
    gl = importlib.import_module(f"gradlab.{framework}")
    if framework == "jax":
        import jax
        import jax.numpy as jnp

        return SimpleNamespace(
            gl=gl, xp=jnp, array=jnp.asarray, compiled=jax.jit, vmap=jax.vmap, jacfwd=jax.jacfwd
        )
    import torch

    torch.set_num_threads(1)
    return SimpleNamespace(
        gl=gl,
        xp=torch,
        array=torch.as_tensor,
        compiled=lambda f: f,
        vmap=torch.func.vmap,
        jacfwd=torch.func.jacfwd,
    )


def amounts(fw: Any, theta: Any) -> Any:
    """What is observed, (24, 3), in units of each species' largest amount."""

    def reaction(t: Any, y: Any, k: Any) -> Any:
        slow, fast, back = k[0] * y[0], k[1] * y[1] ** 2, k[2] * y[1] * y[2]
        return fw.xp.stack([back - slow, slow - back - fast, fast])

    k = fw.xp.exp(theta)
    return fw.gl.odeint(reaction, fw.array(START), fw.array(TIMES), k, **HOW).ys[1:] / fw.array(UNITS)


def residual(fw: Any, theta: Any, data: Any) -> Any:
    """(72,), in standard deviations of the noise."""
    return ((amounts(fw, theta) - data) / NOISE).reshape(-1)


def stepped(fw: Any, theta: Any, data: Any) -> tuple[Any, Any]:
    """A Gauss-Newton step of at most a factor e in each rate, and half the sum of squares before it."""
    J = fw.jacfwd(lambda theta: residual(fw, theta, data))(theta)
    r = residual(fw, theta, data)
    step = -fw.xp.linalg.solve(J.T @ J, J.T @ r)
    return theta + fw.xp.clip(step, -1.0, 1.0), (r**2).sum() / 2


def curvatures(fw: Any, theta: Any, data: Any) -> tuple[Any, Any]:
    """The Hessian of half the sum of squares, and Jᵀ J."""
    J = fw.jacfwd(lambda theta: residual(fw, theta, data))(theta)
    half = lambda theta: (residual(fw, theta, data) ** 2).sum() / 2
    return fw.jacfwd(fw.jacfwd(half))(theta), J.T @ J


def fitted(fw: Any, name: str, data: Any, many: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """The estimate or estimates, the sums of squares of every step, and seconds."""
    one = lambda theta, data: stepped(fw, theta, data)
    step = fw.compiled(fw.vmap(one) if many else one)
    theta = np.log(RATES) + OFF
    theta = fw.array(np.broadcast_to(theta, (*data.shape[:-2], 3)).copy())
    sums, began = [], time.perf_counter()
    for _ in track(range(STEPS), name, console=console()):
        theta, value = step(theta, data)
        sums.append(np.asarray(value))
    return np.asarray(theta), np.array(sums), time.perf_counter() - began


def verified(framework: str) -> None:
    """Abort unless the Jacobian through the solve is that of differences."""
    fw = load(framework)
    data = fw.array(np.zeros((len(TIMES) - 1, 3)))
    total = lambda theta: (residual(fw, theta, data) ** 2).mean()
    check.derivatives(
        total, fw.array(np.log(RATES)), order=1, directions=1, vmap=False, compiled=False, accuracy=1e-4
    ).raise_if_failed()


def estimated(framework: str, preset: str, seed: int) -> dict[str, Any]:
    """One fit with its intervals, then many for their coverage."""
    fw, rng = load(framework), np.random.default_rng(seed)
    truth = np.log(RATES)
    clean = np.asarray(amounts(fw, fw.array(truth)))
    drawn = clean + NOISE * rng.normal(size=(DRAWS[preset], *clean.shape))
    theta, sums, seconds = fitted(fw, "one fit", fw.array(drawn[0]), False)
    curved = fw.compiled(lambda theta, data: curvatures(fw, theta, data))
    hessian, gauss_newton = map(np.asarray, curved(fw.array(theta), fw.array(drawn[0])))
    deviation = lambda H: np.sqrt(np.diagonal(np.linalg.inv(H), axis1=-2, axis2=-1))
    every, _, all_seconds = fitted(fw, f"{len(drawn)} fits", fw.array(drawn), True)
    J = fw.compiled(
        fw.vmap(lambda theta: fw.jacfwd(lambda theta: residual(fw, theta, fw.array(clean)))(theta))
    )
    Js = np.asarray(J(fw.array(every)))
    inside = np.abs(every - truth) <= 1.96 * deviation(np.einsum("nra,nrb->nab", Js, Js))
    return {
        "estimate": theta.tolist(),
        "sums": sums.tolist(),
        "by_hessian": deviation(hessian).tolist(),
        "by_gauss_newton": deviation(gauss_newton).tolist(),
        "covariance": np.linalg.inv(hessian).tolist(),
        "estimates": every.tolist(),
        "coverage": inside.mean(0).tolist(),
        "seconds": [seconds, all_seconds],
        "data": drawn[0].tolist(),
        "curve": np.asarray(amounts(fw, fw.array(theta))).tolist(),
    }


def show(framework: str, found: dict[str, Any], draws: int) -> None:
    """A line a rate."""
    table = Table(
        "rate",
        "truth",
        "estimate",
        "± by Hessian",
        "± by Gauss-Newton",
        f"truth inside, of {draws}",
        title=framework,
    )
    for i, name in enumerate(NAMES):
        percent = lambda key, i=i: f"{196 * found[key][i]:.2f} %"
        table.add_row(
            name,
            f"{RATES[i]:.4g}",
            f"{np.exp(found['estimate'][i]):.5g}",
            percent("by_hessian"),
            percent("by_gauss_newton"),
            f"{100 * found['coverage'][i]:.1f} %",
        )
    one, many = found["seconds"]
    table.caption = (
        f"{STEPS} steps: {one:.1f} s for one fit, {many:.1f} s for {draws} at once, compiling included"
    )
    console().print(table)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Data and fit; sums of squares; estimates of all draws with the ellipse of the Hessian."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8))
    first = records[0]["found"]
    for i, name in enumerate(("A", "B", "C")):
        left.semilogx(TIMES[1:], np.array(first["data"])[:, i], ".", color=f"C{i}")
        left.semilogx(TIMES[1:], np.array(first["curve"])[:, i], color=f"C{i}", label=name)
    left.set(xlabel="time", ylabel="amount / largest amount", title="one draw and its fit")
    left.legend(fontsize=8)
    for record, style in zip(records, ("-", "--"), strict=True):
        framework = record["config"]["framework"]
        middle.semilogy(record["found"]["sums"], f"o{style}", label=framework)
        points = 100 * (np.array(record["found"]["estimates"]) - np.log(RATES))
        right.plot(points[:, 0], points[:, 2], "." if style == "-" else "x", ms=4, label=framework)
    middle.set(xlabel="Gauss-Newton step", title="half the sum of squares")
    middle.legend(fontsize=8)
    covariance = 1e4 * np.array(first["covariance"])[np.ix_([0, 2], [0, 2])]
    angle = np.linspace(0, 2 * np.pi, 200)
    ellipse = np.linalg.cholesky(covariance) @ np.stack([np.cos(angle), np.sin(angle)]) * np.sqrt(5.991)
    right.plot(*ellipse, color="0.4", label="95 % by the Hessian")
    right.set(xlabel="error of log k1, %", ylabel="error of log k3, %", title="estimates of all draws")
    right.legend(fontsize=8)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    framework: Framework = Framework.both,
    preset: Preset = Preset.smoke,
    out: Path = Path("results"),
    seed: int = 0,
) -> None:
    """Fit in one framework a process, then draw both."""
    path = out / "parameter_estimation.jsonl"
    if framework is Framework.both:
        plot(
            in_each_framework(__file__, path, preset=preset.value, out=out, seed=seed),
            out / "parameter_estimation.png",
        )
        return
    os.environ["JAX_ENABLE_X64"] = "1"
    verified(framework.value)
    found = estimated(framework.value, preset.value, seed)
    config = {
        "framework": framework.value,
        "preset": preset.value,
        "device": "cpu",
        "dtype": "float64",
        "seed": seed,
    }
    append(
        path,
        {
            "experiment": "parameter_estimation",
            "config": config,
            "environment": environment(),
            "found": found,
        },
    )
    show(framework.value, found, DRAWS[preset.value])


if __name__ == "__main__":
    typer.run(main)
