"""What do per-example gradients, their norms and clipped sums cost, by every strategy, in time and peak memory?

    python experiments/per_example_cost.py --framework both --preset paper

Expected: gradlab's gradients within 1.05 of vmap(grad) and not slower than Opacus or BackPACK; norms of the MLP in
a few hundredths of the time of forming gradients, on the conv net and the transformer not above the cheaper of
forming and ghost norms; peak memory of norms and clipped sums a few times that of one gradient of the batch, at every
batch size. Results are compared with vmap(grad) before they are timed. `--preset calibrate` measures both forms of
a squared norm over a grid of shapes, and fits the constants of transforms/per_example/costs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track
from rich.table import Table

from gradlab.bench.clock import interleave, ratio
from gradlab.bench.console import console
from gradlab.bench.memory import peak
from gradlab.bench.problems import digits
from gradlab.bench.record import append, environment, in_each_framework
from gradlab.cli import Framework


class Preset(StrEnum):
    """How much to measure."""

    smoke = "smoke"
    paper = "paper"
    calibrate = "calibrate"


BATCHES = {
    "smoke": {"time": (32,), "memory": (32, 128)},
    "paper": {"time": (32, 256), "memory": (32, 128, 512, 2048)},
}
BUDGET_S = {"smoke": 5.0, "paper": 40.0}
MODELS = ("mlp", "conv", "transformer")
FORMED = 2**29  # entries of gradients beyond which strategies that form them are left out: 2 GiB
LENGTH, WIDTH, VOCABULARY = 32, 64, 65


def data(model: str, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Digits of 28 by 28 pixels and their labels, or token sequences and a class."""
    rng = np.random.default_rng(0)
    if model == "transformer":
        return rng.integers(0, VOCABULARY, (batch, LENGTH)), rng.integers(0, 10, batch)
    images, labels = digits(1797, 28)
    chosen = rng.integers(0, len(labels), batch)
    shape = (batch, 784) if model == "mlp" else (batch, 1, 28, 28)
    return images[chosen].reshape(shape).astype(np.float32), labels[chosen]


def torch_model(name: str) -> Any:
    """The models as torch.nn modules, of layers that Opacus knows."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(
            nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )
    if name == "conv":
        pool = lambda: nn.MaxPool2d(2)
        first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        return nn.Sequential(
            first, nn.ReLU(), pool(), second, nn.ReLU(), pool(), nn.Flatten(), nn.Linear(1568, 10)
        )

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm0, self.norm1 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, h: Any) -> Any:
            split = lambda a: a.reshape(*a.shape[:-1], 4, -1).transpose(-2, -3)
            q, k, v = map(split, self.qkv(self.norm0(h)).chunk(3, -1))
            weights = (q @ k.mT / k.shape[-1] ** 0.5).softmax(-1)
            h = h + self.out((weights @ v).transpose(-2, -3).flatten(-2))
            return h + self.down(nn.functional.gelu(self.up(self.norm1(h))))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Embedding(VOCABULARY, WIDTH), nn.Sequential(Block(), Block())
            self.head = nn.Linear(WIDTH, 10)

        def forward(self, tokens: Any) -> Any:
            return self.head(self.blocks(self.embed(tokens)).mean(1))

    return Encoder()


def jax_model(name: str) -> tuple[Any, Any]:
    """The same in jax: parameters, and logits of a batch."""
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[1:])), jnp.float32)
    dense = lambda n, m: {"w": draw(m, n), "b": jnp.zeros(m)}
    apply = lambda p, x: x @ p["w"].T + p["b"]
    if name == "mlp":
        params = [dense(784, 256), dense(256, 256), dense(256, 10)]
        return params, lambda p, x: apply(p[2], jax.nn.relu(apply(p[1], jax.nn.relu(apply(p[0], x)))))
    if name == "conv":
        params = [{"w": draw(16, 1, 3, 3), "b": jnp.zeros(16)}, {"w": draw(32, 16, 3, 3), "b": jnp.zeros(32)}]

        def convolved(p: Any, x: Any) -> Any:
            y = jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME") + p["b"][:, None, None]
            return jax.lax.reduce_window(
                jax.nn.relu(y), -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"
            )

        flat = lambda h: h.reshape(len(h), -1)
        return [*params, dense(1568, 10)], lambda p, x: apply(p[2], flat(convolved(p[1], convolved(p[0], x))))
    norm = lambda: {"w": jnp.ones(WIDTH), "b": jnp.zeros(WIDTH)}
    block = lambda: {
        "norms": [norm(), norm()],
        "qkv": dense(WIDTH, 3 * WIDTH),
        "out": dense(WIDTH, WIDTH),
        "up": dense(WIDTH, 4 * WIDTH),
        "down": dense(4 * WIDTH, WIDTH),
    }

    def normed(p: Any, x: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["w"] + p["b"]

    def blocked(p: Any, h: Any) -> Any:
        split = lambda a: a.reshape(*a.shape[:-1], 4, -1).swapaxes(-2, -3)
        q, k, v = map(split, jnp.split(apply(p["qkv"], normed(p["norms"][0], h)), 3, -1))
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / k.shape[-1] ** 0.5)
        mixed = (weights @ v).swapaxes(-2, -3)
        h = h + apply(p["out"], mixed.reshape(h.shape))
        return h + apply(p["down"], jax.nn.gelu(apply(p["up"], normed(p["norms"][1], h)), approximate=False))

    params = {"embed": draw(VOCABULARY, WIDTH), "blocks": [block(), block()], "head": dense(WIDTH, 10)}
    run = lambda p, x: apply(
        p["head"], blocked(p["blocks"][1], blocked(p["blocks"][0], p["embed"][x])).mean(1)
    )
    return params, run


Calls = dict[str, Callable[[], Any]]


def torch_calls(name: str, batch: int) -> dict[str, Calls]:
    """Every strategy of every result, on a batch."""
    import torch
    from torch.nn.functional import cross_entropy

    import gradlab.torch as gl

    model, (x, y) = torch_model(name), map(torch.as_tensor, data(name, batch))
    apply, params = gl.functional(model)
    loss = lambda p, x, y: cross_entropy(apply(p, x[None]), y[None])
    mapped = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    row = lambda g: g.reshape(len(g), -1).square().sum(1)
    norms = lambda gs: sum(map(row, gs.values())).sqrt()

    def gradient() -> Any:
        xs = {k: p.detach().requires_grad_() for k, p in params.items()}
        return torch.autograd.grad(cross_entropy(apply(xs, x), y, reduction="sum"), list(xs.values()))

    def clipped() -> Any:
        gs = mapped(params, x, y)
        c = (1 / norms(gs)).clamp(max=1)
        return {k: torch.einsum("n,n...->...", c, g) for k, g in gs.items()}

    found: dict[str, Calls] = {
        "one gradient": {"autograd": gradient},
        "gradients": {
            "vmap(grad)": lambda: mapped(params, x, y),
            "gradlab": lambda: gl.per_example_grads(loss, params, x, y),
        },
        "norms": {
            "vmap(grad)": lambda: norms(mapped(params, x, y)),
            "gradlab": lambda: gl.per_example_norms(loss, params, x, y),
        },
        "clipped sum": {
            "vmap(grad)": clipped,
            "gradlab": lambda: gl.clipped_grad(loss, params, x, y, max_norm=1.0)[0],
        },
    }
    if find_spec("opacus"):
        with_hooks, ghost = opacus(name, x, y)
        found["gradients"]["opacus"] = with_hooks
        found["norms"]["opacus, ghost"] = ghost
    if find_spec("backpack") and name != "transformer":
        found["gradients"]["backpack"] = backpack(name, x, y)
    return found


def opacus(name: str, x: Any, y: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Gradients by hooks, and ghost norms."""
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleModuleFastGradientClipping,
    )
    from torch.nn.functional import cross_entropy

    module = GradSampleModule(torch_model(name), loss_reduction="sum")
    fast = GradSampleModuleFastGradientClipping(
        torch_model(name), loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True
    )

    def with_hooks() -> Any:
        module.zero_grad()
        cross_entropy(module(x), y, reduction="sum").backward()
        return {k.removeprefix("_module."): p.grad_sample for k, p in module.named_parameters()}

    def ghost() -> Any:
        fast.zero_grad()
        cross_entropy(fast(x), y, reduction="sum").backward()
        return fast.get_norm_sample()

    return with_hooks, ghost


def backpack(name: str, x: Any, y: Any) -> Callable[[], Any]:
    """BatchGrad on extended modules."""
    import torch
    from backpack import backpack as extended
    from backpack import extend
    from backpack.extensions import BatchGrad

    model, outer = extend(torch_model(name)), extend(torch.nn.CrossEntropyLoss(reduction="sum"))

    def call() -> Any:
        model.zero_grad()
        with extended(BatchGrad()):
            outer(model(x), y).backward()
        return {k: p.grad_batch for k, p in model.named_parameters()}

    return call


def jax_calls(name: str, batch: int) -> dict[str, Calls]:
    """The same in compiled jax."""
    import jax
    import jax.numpy as jnp

    import gradlab.jax as gl

    params, logits = jax_model(name)
    x, y = map(jnp.asarray, data(name, batch))
    one = lambda p, x, y: -jax.nn.log_softmax(logits(p, x[None])[0])[y]
    mapped = jax.vmap(jax.grad(one), (None, 0, 0))
    norms = lambda gs: jnp.sqrt(sum((g.reshape(len(g), -1) ** 2).sum(1) for g in jax.tree.leaves(gs)))
    whole = lambda p, x, y: -jnp.take_along_axis(jax.nn.log_softmax(logits(p, x)), y[:, None], 1).sum()

    def clipped(p: Any, x: Any, y: Any) -> Any:
        gs = mapped(p, x, y)
        c = jnp.minimum(1, 1 / norms(gs))
        return jax.tree.map(lambda g: jnp.einsum("n,n...->...", c, g), gs)

    calls: dict[str, dict[str, Any]] = {
        "one gradient": {"grad": jax.grad(whole)},
        "gradients": {"vmap(grad)": mapped, "gradlab": lambda *a: gl.per_example_grads(one, *a)},
        "norms": {
            "vmap(grad)": lambda *a: norms(mapped(*a)),
            "lax.map": lambda p, x, y: jax.lax.map(
                lambda e: norms(jax.tree.map(lambda g: g[None], jax.grad(one)(p, *e)))[0], (x, y)
            ),
            "gradlab": lambda *a: gl.per_example_norms(one, *a),
        },
        "clipped sum": {
            "vmap(grad)": clipped,
            "gradlab": lambda *a: gl.clipped_grad(one, *a, max_norm=1.0)[0],
        },
    }

    def bound(f: Callable[..., Any]) -> Callable[[], Any]:
        run = jax.jit(f)
        call = lambda: run(params, x, y)
        call.plan = (f, params, x, y)  # type: ignore[attr-defined]
        return call

    return {result: {k: bound(f) for k, f in variants.items()} for result, variants in calls.items()}


def flat(framework: str, tree: Any) -> np.ndarray:
    """All numbers of a result, in one order for all strategies."""
    if framework == "jax":
        import jax

        leaves = jax.tree.leaves(tree)
    else:
        leaves = list(
            tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple) else [tree]
        )
        leaves = [leaf.detach() for leaf in leaves]
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in leaves])


def measure(framework: str, preset: str) -> list[dict[str, Any]]:
    """Check, then time and weigh every strategy at every batch size."""
    if framework == "jax":
        import jax

        make, wait = jax_calls, jax.block_until_ready
    else:
        import torch

        torch.set_num_threads(1)
        make, wait = torch_calls, lambda result: result
    rows = []
    sizes = [(m, b) for m in MODELS for b in sorted({*BATCHES[preset]["time"], *BATCHES[preset]["memory"]})]
    for model, batch in track(sizes, framework, console=console()):
        found = make(model, batch)
        entries = batch * {"mlp": 269_322, "conv": 20_490, "transformer": 104_778}[model]
        if entries > FORMED:
            found = {
                r: {k: f for k, f in c.items() if k in ("gradlab", "autograd", "grad")}
                for r, c in found.items()
            }
            del found["gradients"]
        for variants in found.values():
            answers = {name: flat(framework, call()) for name, call in variants.items()}
            trusted = next(iter(answers.values()))
            for name, answer in answers.items():
                if np.abs(answer - trusted).max() > 2e-3 * np.abs(trusted).max():
                    raise SystemExit(f"{framework}, {model}, {batch}: {name} is wrong")
        calls = {f"{r}: {k}": call for r, variants in found.items() for k, call in variants.items()}
        row: dict[str, Any] = {"model": model, "batch": batch}
        if batch in BATCHES[preset]["time"]:
            times = interleave(calls, synchronise=wait, repeats=20, budget_s=BUDGET_S[preset])
            unit = times[next(iter(times))]
            row["seconds"] = {name: t.median_s for name, t in times.items()}
            row["gradients"] = {name: ratio(t, unit) for name, t in times.items()}
            row["of_forming"] = {
                r: ratio(times[f"{r}: gradlab"], times[f"{r}: vmap(grad)"])
                for r in ("gradients", "norms", "clipped sum")
            }
        weigh = lambda call: peak("jax", *call.plan) if framework == "jax" else peak("torch", call)
        row["bytes"] = {name: weigh(call) for name, call in calls.items()}
        rows.append(row)
    return rows


def show(framework: str, rows: list[dict[str, Any]]) -> None:
    """A line for each model, batch and strategy."""
    table = Table("model", "batch", "result: strategy", "ms", "gradients", "peak MB", title=framework)
    for row in rows:
        for name, held in row["bytes"].items():
            timed = name in row.get("seconds", {})
            ms = f"{1e3 * row['seconds'][name]:.2f}" if timed else ""
            relative = f"{row['gradients'][name][0]:.2f}" if timed else ""
            table.add_row(row["model"], str(row["batch"]), name, ms, relative, f"{held / 1e6:.1f}")
    console().print(table)


COLOURS = {"gradlab": "tab:blue", "vmap(grad)": "tab:orange", "lax.map": "tab:pink"}
COLOURS |= {"opacus": "tab:green", "opacus, ghost": "tab:green", "backpack": "tab:red"}
STYLES = {"gradients": "-.", "norms": "-", "clipped sum": "--"}


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """A row a model: time of each strategy, then peak memory against batch size, in each framework."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = [(record, show) for show in (_bars, _lines) for record in records]
    figure, axes = plt.subplots(
        len(MODELS), len(columns), figsize=(4 * len(columns), 9.5), squeeze=False, layout="constrained"
    )
    for row, model in zip(axes, MODELS, strict=True):
        for axis, (record, show) in zip(row, columns, strict=True):
            axis.set_title(f"{record['config']['framework']}, {model}", fontsize=10)
            show(axis, [r for r in record["rows"] if r["model"] == model])
            axis.tick_params(labelsize=8)
    lines = axes[0, -1].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower right", ncol=len(lines[0]), fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def _bars(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Of the largest batch that was timed, in gradients of the batch."""
    timed = [row for row in rows if "gradients" in row][-1]
    bars = [(name.split(": "), value) for name, (value, *_) in timed["gradients"].items()][1:]
    results, places, y = [result for (result, _), _ in bars], [], 0.0
    for i, result in enumerate(results):
        y -= 1.0 if i and result == results[i - 1] else 1.6
        places.append(y)
    for ((_, strategy), value), y in zip(bars, places, strict=True):
        axis.barh(y, value, 0.85, color=COLOURS[strategy])
        axis.annotate(f"{value:.3g}", (value, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(places, [f"{result}: {strategy}" for (result, strategy), _ in bars])
    values = [value for _, value in bars]
    if max(values) > 10:
        axis.set_xscale("log")
        axis.set_xlim(0.5 * min(1, *values), 3 * max(values))
    else:
        axis.set_xlim(0, 1.15 * max(values))
    axis.axvline(1, color="0.5", lw=0.8)
    axis.set_xlabel(f"time / one gradient of the batch of {timed['batch']}", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _lines(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Of gradlab and of forming gradients, beside one gradient of the batch."""
    for name in rows[0]["bytes"]:
        result, strategy = name.split(": ")
        have = [row for row in rows if name in row["bytes"]]
        style: dict[str, Any] = {"color": "0.3", "ls": ":", "label": "one gradient of the batch"}
        if result in STYLES:
            style = {"color": COLOURS[strategy], "ls": STYLES[result], "label": f"{result}: {strategy}"}
        if strategy in ("gradlab", "vmap(grad)") or result not in STYLES:
            held = [row["bytes"][name] / 1e6 for row in have]
            axis.loglog([row["batch"] for row in have], held, marker=".", **style)
    axis.set_xticks([row["batch"] for row in rows], [row["batch"] for row in rows], minor=False)
    axis.minorticks_off()
    axis.set_xlabel("examples", fontsize=8)
    axis.set_ylabel("peak MB", fontsize=8)
    axis.grid(alpha=0.3)


def calibrate(framework: str) -> dict[str, Any]:
    """Nanoseconds a multiplication and addition, and an entry written and read, of both forms over a grid of shapes."""
    from gradlab.transforms.per_example import costs

    shapes = [(T, p, q) for T in (2, 8, 32, 128, 512) for p in (16, 128, 512) for q in (16, 128, 512)]
    rows, features = [], []
    for T, p, q in track([s for s in shapes if s[0] * sum(s[1:]) < 2**19], framework, console=console()):
        N = int(np.clip(2**22 / (T * (p + q) + T * T + p * q), 2, 256))
        times = _both_forms(framework, N, T, p, q)
        rows.append({"T": T, "p": p, "q": q, **{k: 1e9 * t / N for k, t in times.items()}})
        features += [(T * T * (p + q), 2 * T * T), (T * p * q, p * q)]
    seconds = np.array([row[k] for row in rows for k in ("gram", "formed")])
    scaled = np.array(features) / seconds[:, None]
    product, entry = np.linalg.lstsq(scaled, np.ones(len(scaled)), rcond=None)[0]
    chosen = [r["gram"] if costs.gram_is_cheaper(r["T"], r["p"], r["q"]) else r["formed"] for r in rows]
    loss = [c / min(r["gram"], r["formed"]) for c, r in zip(chosen, rows, strict=True)]
    return {
        "product_ns": product,
        "entry_ns": entry,
        "median_loss": np.median(loss),
        "worst_loss": max(loss),
        "rows": rows,
    }


def _both_forms(framework: str, N: int, T: int, p: int, q: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=(N, 1, T, k)).astype(np.float32) for k in (p, q))
    if framework == "jax":
        import jax
        import jax.numpy as jnp

        from gradlab.transforms.per_example._jax_factors import squared_norms

        left, right, wait = jnp.asarray(left), jnp.asarray(right), jax.block_until_ready
        gram = jax.jit(lambda a, b: squared_norms([(a, b)]))
        formed = jax.jit(lambda a, b: jnp.square(jnp.einsum("ngtp,ngtq->ngpq", a, b)).sum((1, 2, 3)))
    else:
        import torch

        from gradlab.transforms.per_example._torch_factors import squared_norms

        torch.set_num_threads(1)
        left, right, wait = torch.as_tensor(left), torch.as_tensor(right), lambda result: result
        gram = lambda a, b: squared_norms([(a, b)])
        formed = lambda a, b: (a.mT @ b).square().sum((1, 2, 3))
    calls = {"gram": lambda: gram(left, right), "formed": lambda: formed(left, right)}
    return {k: t.median_s for k, t in interleave(calls, synchronise=wait, repeats=7, budget_s=1.0).items()}


def main(
    framework: Framework = Framework.both, preset: Preset = Preset.smoke, out: Path = Path("results")
) -> None:
    """Measure one framework a process, then draw what was measured."""
    path = out / "per_example_cost.jsonl"
    if framework is Framework.both:
        found = in_each_framework(__file__, path, preset=preset, out=out)
        if preset is not Preset.calibrate:
            draw(found, out / "per_example_cost.png")
        return
    config = {"framework": framework.value, "preset": preset.value, "device": "cpu", "dtype": "float32"}
    record = {"experiment": "per_example_cost", "config": config, "environment": environment()}
    if preset is Preset.calibrate:
        fitted = calibrate(framework.value)
        append(path, {**record, **fitted})
        print({k: round(float(v), 3) for k, v in fitted.items() if k != "rows"})
        return
    rows = measure(framework.value, preset.value)
    append(path, {**record, "rows": rows})
    show(framework.value, rows)


if __name__ == "__main__":
    typer.run(main)
