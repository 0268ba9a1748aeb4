"""Is gradlab faster on GradBench's evaluations than plain jax.grad under jit and plain torch.autograd?

    python experiments/gradbench.py --framework both --preset smoke|paper --out results

The derivatives of the suite's evaluations: `gradlab.bench.gradbench` against the way that they are written without it
(the definition, and the framework's own gradient of it), interleaved, in float64. Every variant is checked against
the numpy reference first, and one that is wrong aborts. Expected: torch at least twice as fast on gmm, kmeans and lse;
jax at least as fast everywhere. torch's `particle` and `saddle` are left out, since a plain one takes minutes. One line
a framework in results/gradbench.jsonl, a table, a figure.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track
from rich.table import Table

from gradlab.bench.clock import interleave, ratio
from gradlab.bench.console import console
from gradlab.bench.gradbench.evaluations import OUTPUTS, prepared
from gradlab.bench.gradbench.inputs import made
from gradlab.bench.gradbench.protocol import call, plain
from gradlab.bench.gradbench.validate import validate
from gradlab.bench.record import append, environment, in_each_framework
from gradlab.cli import Framework, Preset

MEASURED = {
    "gmm": "jacobian",
    "kmeans": "dir",
    "lse": "gradient",
    "llsq": "gradient",
    "ode": "gradient",
    "ba": "jacobian",
    "ht": "jacobian",
    "particle": "ff",
    "saddle": "ff",
    "det": "gradient",
}
REPEATS = {"smoke": 10, "paper": 40}
BUDGET_S = {"smoke": 2.0, "paper": 20.0}


def permutations(n: int) -> tuple[np.ndarray, np.ndarray]:
    """All of n columns, and their signs."""
    found = np.array(list(itertools.permutations(range(n))))
    swaps = sum((found[:, i] > found[:, j]).astype(int) for i in range(n) for j in range(i + 1, n))
    return found, (-1.0) ** swaps


def filled(xp: Any, lower: Any, d: int, zeros: Any) -> Any:
    """Strictly lower triangular matrices (k, d, d) of their columns."""
    places = np.zeros((d, d), int)
    columns, rows = np.triu_indices(d, 1)
    places[rows, columns] = np.arange(len(rows))
    return xp.where(zeros(np.tri(d, d, -1) > 0), lower[:, places], 0.0)


def log_posterior(xp: Any, params: Any, x: Any, gamma: float, m: int, array: Any, lse: Any) -> Any:
    """The mixture's, point by component by coordinate."""
    from scipy.special import multigammaln

    alpha, mu, q, lower = params
    (n, d), k = x.shape, len(alpha)
    centred = x[:, None, :] - mu[None]
    turned = xp.exp(q) * centred + xp.einsum("kij,nkj->nki", filled(xp, lower, d, array), centred)
    main = alpha + q.sum(1) - (turned**2).sum(2) / 2
    prior = m * q.sum() - gamma**2 / 2 * ((xp.exp(q) ** 2).sum() + (lower**2).sum())
    freedom = d + m + 1
    constant = k * (freedom * d * math.log(gamma / math.sqrt(2)) - multigammaln(freedom / 2, d))
    return lse(main, 1).sum() - n * lse(alpha, 0) + prior + constant - n * d / 2 * math.log(2 * math.pi)


def squared_distances(xp: Any, points: Any, centroids: Any) -> Any:
    """Of every point to every centroid."""
    return (points**2).sum(1)[:, None] + (centroids**2).sum(1) - 2 * points @ centroids.T


def by_jax() -> dict[str, Callable[..., Any]]:
    """The derivatives as jax's users write them: jax.grad, jvp and jacfwd of the definition, jitted."""
    import jax
    import jax.numpy as jnp

    from gradlab.bench.gradbench import _jax as ours

    def gmm(alpha: Any, mu: Any, q: Any, lower: Any, x: Any, gamma: float, m: int) -> Any:
        lse = lambda x, axis: jax.scipy.special.logsumexp(x, axis)
        f = lambda params: log_posterior(jnp, params, x, gamma, m, jnp.asarray, lse)
        return dict(zip(("alpha", "mu", "q", "l"), jax.grad(f)((alpha, mu, q, lower)), strict=True))

    def kmeans(centroids: Any, points: Any) -> Any:
        cost = lambda c: squared_distances(jnp, points, c).min(1).sum()
        slope, product = jax.jvp(jax.grad(cost), (centroids,), (jnp.ones_like(centroids),))
        return slope / product

    def lse(x: Any) -> Any:
        def f(x: Any) -> Any:
            return x.max() + jnp.log(jnp.exp(x - x.max()).sum())

        return jax.grad(f)(x)

    def llsq(x: Any, n: int) -> Any:
        def f(x: Any) -> Any:
            def residual(i: Any) -> Any:
                t = -1.0 + 2.0 * i / (n - 1)
                return jnp.sign(t) - x @ jnp.cumprod(jnp.full(len(x), t).at[0].set(1.0))

            return (jax.vmap(residual)(jnp.arange(n)) ** 2).sum() / 2

        return jax.grad(f)(x)

    def ode(x: Any, s: int) -> Any:
        def f(x: Any) -> Any:
            h = 2.0 / s
            slope = lambda y: jnp.where(jnp.arange(len(x)) == 0, x, x * jnp.roll(y, 1))

            def step(y: Any, _: Any) -> Any:
                a = slope(y)
                b = slope(y + h / 2 * a)
                c = slope(y + h / 2 * b)
                d = slope(y + h * c)
                return y + h / 6 * (a + 2 * b + 2 * c + d), None

            return jax.lax.scan(step, jnp.zeros_like(x), None, length=s)[0][-1]

        return jax.grad(f)(x)

    def ba(cameras: Any, points: Any, w: Any, features: Any, camera: Any, point: Any) -> Any:
        def error(c: Any, x: Any, w: Any, feature: Any) -> Any:
            return ours.ba_errors((c[None], x[None], w[None]), feature[None])[0]

        jacobian = jax.vmap(jax.jacrev(error, argnums=(0, 1, 2)))
        c, x, w = jacobian(cameras[camera], points[point], w, features)
        return jnp.concatenate([c, x, w[:, :, None]], axis=2)[:, :2], w[:, 2]

    def ht(theta: Any, us: Any, **data: Any) -> Any:
        u, rest = jax.jacfwd(lambda us, theta: ours.ht_objective(theta, us, **data), argnums=(0, 1))(
            us, theta
        )
        own = jnp.arange(len(us))
        blocks = u.reshape(len(us), 3, len(us), 2)[own, :, own]
        return jnp.concatenate([blocks.reshape(-1, 2), rest], axis=1)

    def slope(f: Any, x: Any) -> Any:
        return jax.jacfwd(lambda x: (f(x),) * 2, has_aux=True)(x)[::-1]

    def particle(w: Any) -> Any:
        def miss(w: Any) -> Any:
            def potential(x: Any) -> Any:
                far = lambda y: jnp.sqrt((x[0] - 10) ** 2 + (x[1] - y) ** 2)
                return 1 / far(10 - w) + 1 / far(0.0)

            turn = lambda s: jnp.concatenate(
                [s[:2] + 0.1 * s[2:], s[2:] - 0.1 * jax.jacfwd(potential)(s[:2])]
            )
            s = jax.lax.while_loop(
                lambda s: s[1] + 0.1 * s[3] > 0, turn, jnp.array([0.0, 8.0, 0.75, 0.0]) + 0 * w
            )
            return (s[0] - s[1] / s[3] * s[2]) ** 2

        return ours.descend(lambda w: slope(miss, w), w)

    def saddle(start: Any) -> Any:
        height = lambda x, y: (x**2).sum() - (y**2).sum()
        highest = lambda x: ours.descend(lambda y: slope(lambda y: -height(x, y), y), start + 0 * x)
        x = ours.descend(lambda x: slope(lambda x: height(x, highest(x)), x), start)
        return jnp.concatenate([x, highest(x)])

    def det(A: Any) -> Any:
        columns, signs = permutations(len(A))
        return jax.grad(lambda A: (A[np.arange(len(A)), columns].prod(1) * signs).sum())(A)

    return {f.__name__: f for f in (gmm, kmeans, lse, llsq, ode, ba, ht, particle, saddle, det)}


def by_torch() -> dict[str, Callable[..., Any]]:
    """The derivatives as torch's users write them: torch.autograd on the definition, a row at a time."""
    import torch
    from torch.autograd.functional import vhp, vjp

    from gradlab.bench.gradbench import _torch as ours

    def grad(f: Callable[..., Any], *xs: Any) -> Any:
        leaves = [x.detach().requires_grad_() for x in xs]
        return torch.autograd.grad(f(*leaves), leaves)

    def rows(f: Callable[..., Any], *xs: Any) -> Any:
        leaves = [x.detach().requires_grad_() for x in xs]
        found = [torch.autograd.grad(y, leaves, retain_graph=True) for y in f(*leaves).ravel()]
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    def gmm(alpha: Any, mu: Any, q: Any, lower: Any, x: Any, gamma: float, m: int) -> Any:
        f = lambda *params: log_posterior(torch, params, x, gamma, m, torch.as_tensor, torch.logsumexp)
        return dict(zip(("alpha", "mu", "q", "l"), grad(f, alpha, mu, q, lower), strict=True))

    def kmeans(centroids: Any, points: Any) -> Any:
        cost = lambda c: squared_distances(torch, points, c).min(1).values.sum()
        slope = vjp(cost, centroids, torch.ones((), dtype=points.dtype))[1]
        return slope / vhp(cost, centroids, torch.ones_like(centroids))[1]

    def lse(x: Any) -> Any:
        return grad(lambda x: x.max() + torch.log(torch.exp(x - x.max()).sum()), x)[0]

    def llsq(x: Any, n: int) -> Any:
        def f(x: Any) -> Any:
            t = torch.linspace(-1.0, 1.0, n, dtype=x.dtype)
            return ((torch.sign(t) - torch.vander(t, len(x), increasing=True) @ x) ** 2).sum() / 2

        return grad(f, x)[0]

    def ode(x: Any, s: int) -> Any:
        def f(x: Any) -> Any:
            h, y = 2.0 / s, torch.zeros_like(x)
            first = torch.arange(len(x)) == 0
            slope = lambda y: torch.where(first, x, x * torch.roll(y, 1))
            for _ in range(s):
                a = slope(y)
                b = slope(y + h / 2 * a)
                c = slope(y + h / 2 * b)
                y = y + h / 6 * (a + 2 * b + 2 * c + slope(y + h * c))
            return y[-1]

        return grad(f, x)[0]

    def ba(cameras: Any, points: Any, w: Any, features: Any, camera: Any, point: Any) -> Any:
        blocks, slopes = [], []
        for i in range(len(w)):
            f = lambda c, x, w, i=i: ours.ba_errors((c[None], x[None], w[None]), features[i : i + 1])
            c, x, dw = rows(f, cameras[camera[i]], points[point[i]], w[i])
            blocks.append(torch.cat([c, x, dw[:, None]], dim=1)[:2])
            slopes.append(dw[2])
        return torch.stack(blocks), torch.stack(slopes)

    def ht(theta: Any, us: Any, **data: Any) -> Any:
        u, rest = rows(lambda us, theta: ours.ht_objective(theta, us, **data), us, theta)
        own = torch.arange(len(us))
        blocks = u.reshape(len(us), 3, len(us), 2)[own, :, own]
        return torch.cat([blocks.reshape(-1, 2), rest], dim=1)

    def det(A: Any) -> Any:
        columns, signs = permutations(len(A))
        f = lambda A: (A[np.arange(len(A)), columns].prod(1) * torch.from_numpy(signs)).sum()
        return grad(f, A)[0]

    return {f.__name__: f for f in (gmm, kmeans, lse, llsq, ode, ba, ht, det)}


def measure(framework: str, preset: str, only: list[str]) -> list[dict[str, Any]]:
    """A row an evaluation that has a plain way: checked, then timed against it."""
    from importlib import import_module

    side = import_module(f"gradlab.bench.gradbench._{framework}")
    plain_ways = {"jax": by_jax, "torch": by_torch}[framework]()
    rows = []
    chosen = [module for module in plain_ways if not only or module in only]
    for module in track(chosen, framework, console=console()):
        function, given = MEASURED[module], made(module, preset)
        arrays, options = prepared(module, given)
        calls = {
            "gradlab": call(framework, module, function, given),
            "plain": side.bound(plain_ways[module], side.arrays(arrays), options),
        }
        for name, run in calls.items():
            output = OUTPUTS.get((module, function), plain)(side.numpy(side.synchronise(run())), given)
            if fault := validate(module, function, given, output):
                raise SystemExit(f"{framework}, {module} by {name}: {fault}; nothing is timed")
        times = interleave(
            calls, synchronise=side.synchronise, repeats=REPEATS[preset], budget_s=BUDGET_S[preset], warmup=1
        )
        row = {
            "evaluation": module,
            "function": function,
            "seconds": {n: t.median_s for n, t in times.items()},
        }
        rows.append({**row, "ratio": ratio(times["plain"], times["gradlab"])})
    return rows


def show(framework: str, rows: list[dict[str, Any]]) -> None:
    """One table."""
    table = Table("evaluation", "function", "ms gradlab", "plain", "plain / gradlab", title=framework)
    for row in rows:
        times = [f"{1e3 * row['seconds'][n]:.3f}" for n in ("gradlab", "plain")]
        middle, low, high = row["ratio"]
        table.add_row(row["evaluation"], row["function"], *times, f"{middle:.2f} ({low:.2f} to {high:.2f})")
    console().print(table)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """How many times faster, a bar an evaluation and framework."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    names = list(MEASURED)
    for k, record in enumerate(records):
        rows = record["rows"]
        at = [names.index(row["evaluation"]) + 0.36 * (k - 0.5) for row in rows]
        gains = [row["ratio"][0] for row in rows]
        label = record["config"]["framework"]
        bars = axes.bar(at, [g - 1 for g in gains], 0.34, bottom=1, label=label, color=f"C{k}")
        axes.bar_label(bars, [f"{g:.1f}" for g in gains], fontsize=7, padding=2)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("time of the plain way / gradlab's")
    axes.set_title(
        f"GradBench's derivatives, {records[0]['config']['preset']} sizes, float64, CPU", fontsize=10
    )
    axes.margins(y=0.15)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    framework: Framework = Framework.both,
    preset: Preset = Preset.smoke,
    out: Path = Path("results"),
    only: str = "",
) -> None:
    """Measure one framework a process, then draw what was measured; `only` names evaluations, between commas."""
    path = out / "gradbench.jsonl"
    if framework is Framework.both:
        draw(in_each_framework(__file__, path, preset=preset, out=out, only=only), out / "gradbench.png")
        return
    os.environ["JAX_ENABLE_X64"] = "1"
    if framework is Framework.torch:
        import torch

        torch.set_num_threads(1)
    rows = measure(framework.value, preset.value, [name for name in only.split(",") if name])
    config = {"framework": framework.value, "preset": preset.value, "device": "cpu", "dtype": "float64"}
    append(path, {"experiment": "gradbench", "config": config, "environment": environment(), "rows": rows})
    show(framework.value, rows)


if __name__ == "__main__":
    typer.run(main)
