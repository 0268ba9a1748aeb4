"""Do meta-learned initialisations adapt to a new sinusoid in a few steps, and by which meta-gradient best?

    python experiments/maml_sinusoid.py --framework both --preset smoke|paper --out results

Finn et al. 2017: regression of A sin(x - φ), A in [0.1, 5], φ in [0, π], x in [-5, 5], 5 or 10 points a task, a
40-40 network, 25 tasks a step, Adam. Seven ways to learn the initialisation, adapted to 1000 new tasks by 0 to 10 steps
of gradient descent. Expected: MAML's error falls to a few percent of its start in 10 steps, FOMAML's nearly so, that of
the network trained on all tasks alike hardly; both frameworks, from the same weights and tasks, the same within the
intervals. Aborts where `check.derivatives` fails. One line a framework in results/maml_sinusoid.jsonl, a table, a
figure.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
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

INNER_RATE, TASKS, STEPS = 0.01, 25, 10
METHODS = ("MAML", "FOMAML", "ANIL", "Meta-SGD", "iMAML", "Reptile", "pretrained")
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"iterations": 2000, "shots": (10,), "methods": ("MAML", "FOMAML", "pretrained"), "tests": 200},
    "paper": {"iterations": 20000, "shots": (10, 5), "methods": METHODS, "tests": 1000},
}
HOW: dict[str, dict[str, Any]] = {  # the options of meta_value_and_grad while training
    "MAML": {"steps": 1},
    "FOMAML": {"steps": 1, "method": "first_order"},
    "ANIL": {"steps": 1, "mask": {"net": "head", "rate": False}},
    "Meta-SGD": {"steps": 5, "rates": True},
    "iMAML": {"steps": 50, "method": "implicit", "proximal": 3.0, "cg_steps": 5},
    "Reptile": {"steps": 8, "method": "reptile"},
}
MOST = {"iMAML": 1500}  # iterations, of the method whose 50 inner steps torch does not compile
FINER = {"iMAML": 5}  # of its steps that count as one of the others' when it adapts
FEW = ("MAML", "FOMAML", "pretrained")  # compared at 5 shots too
BLOCK = 500  # iterations between two reports


def initial(dtype: str) -> dict[str, np.ndarray]:
    """Weights of the 40-40 network, the same for every method and framework."""
    rng = np.random.default_rng(0)
    layer = lambda n, m: rng.normal(size=(n, m)) * (2 / (n + m)) ** 0.5
    params = {"b0": np.zeros(40), "b1": np.zeros(40), "b2": np.zeros(1)}
    params |= {"w0": layer(1, 40), "w1": layer(40, 40), "w2": layer(40, 1)}
    return {name: leaf.astype(dtype) for name, leaf in params.items()}


def draw(rng: np.random.Generator, lead: tuple[int, ...], points: int, dtype: str) -> Any:
    """Points and values of tasks, (*lead, points, 1) each."""
    amplitude = rng.uniform(0.1, 5.0, size=(*lead, 1, 1))
    phase = rng.uniform(0.0, np.pi, size=(*lead, 1, 1))
    x = rng.uniform(-5.0, 5.0, size=(*lead, points, 1))
    return x.astype(dtype), (amplitude * np.sin(x - phase)).astype(dtype)


def split(x: Any, y: Any, shots: int) -> Any:
    """(support, query): the first points of each task, and the others."""
    return (x[..., :shots, :], y[..., :shots, :]), (x[..., shots:, :], y[..., shots:, :])


def load(framework: str, device: str) -> SimpleNamespace:
    """What the experiment needs of a framework, under one set of names."""
    if framework == "jax":
        import jax
        import jax.numpy as jnp
        import optax

        import gradlab.jax as gl

        place = jax.devices("gpu" if device == "cuda" else device)[0]

        def trainer(step: Callable[..., Any], params: Any) -> Any:
            """A function of a block of tasks, by one compiled scan of Adam's steps."""
            adam = optax.adam(1e-3)
            memory = adam.init(params)

            def one(carry: Any, tasks: Any) -> Any:
                params, memory = carry
                value, gradient = step(params, *tasks)
                updates, memory = adam.update(gradient, memory, params)
                return (optax.apply_updates(params, updates), memory), value

            run = jax.jit(lambda carry, block: jax.lax.scan(one, carry, block))
            carry = [(params, memory)]

            def block(tasks: Any) -> Any:
                carry[0], values = run(carry[0], tasks)
                return np.asarray(values)

            return block, lambda: carry[0][0]

        return SimpleNamespace(
            gl=gl,
            relu=jax.nn.relu,
            exp=jnp.exp,
            array=lambda a: jax.device_put(jnp.asarray(a), place),
            tree=lambda f, tree: jax.tree.map(f, tree),
            vmap=jax.vmap,
            compile=jax.jit,
            gradient=jax.value_and_grad,
            trainer=trainer,
            numpy=np.asarray,
        )
    import torch
    from torch.utils import _pytree as pytree

    torch.set_num_threads(1)  # the network is small
    import gradlab.torch as gl

    def trainer(step: Callable[..., Any], params: Any, compiled: bool = True) -> Any:  # type: ignore[no-redef]
        """A function of a block of tasks: Adam's steps one after the other, the meta-gradient compiled."""
        leaves, spec = pytree.tree_flatten(params)
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        adam = torch.optim.Adam(leaves, lr=1e-3, foreach=True)
        state = lambda: pytree.tree_unflatten([leaf.detach() for leaf in leaves], spec)
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True) if compiled else step

        def block(tasks: Any) -> Any:
            values = []
            for i in range(len(pytree.tree_leaves(tasks)[0])):
                value, gradient = step(state(), *pytree.tree_map(lambda x: x[i], tasks))
                for leaf, g in zip(leaves, pytree.tree_leaves(gradient), strict=True):
                    leaf.grad = g.detach().clone()
                adam.step()
                values.append(float(value))
            return np.array(values)

        return block, state

    return SimpleNamespace(
        gl=gl,
        relu=torch.relu,
        exp=torch.exp,
        array=lambda a: torch.as_tensor(a, device=device),
        tree=pytree.tree_map,
        vmap=torch.func.vmap,
        compile=lambda f: f,
        gradient=lambda f: lambda *args: torch.func.grad_and_value(f)(*args)[::-1],
        trainer=trainer,
        numpy=lambda a: a.detach().cpu().numpy(),
    )


def network(fw: Any) -> tuple[Any, Any]:
    """model(net, x) and loss(params, x, y), where params = {"net": weights, "rate": rates or nothing}."""

    def model(net: Any, x: Any) -> Any:
        h = fw.relu(x @ net["w0"] + net["b0"])
        h = fw.relu(h @ net["w1"] + net["b1"])
        return h @ net["w2"] + net["b2"]

    return model, lambda params, x, y: ((model(params["net"], x) - y) ** 2).mean()


def options(fw: Any, name: str) -> dict[str, Any]:
    """The options of adapt for a method: rates and mask; and of its training, method and steps."""
    found = dict(HOW.get(name, {"steps": 1}))
    sgd, head = fw.gl.optimizers.sgd, ("b2", "w2")
    found["mask"] = {"net": True, "rate": False}
    if name == "ANIL":
        found["mask"] = {
            "net": {key: key in head for key in ("b0", "b1", "b2", "w0", "w1", "w2")},
            "rate": False,
        }
    found["optimizer"] = sgd(found.pop("rate", INNER_RATE))
    if found.pop("rates", False):  # one for each parameter, of which the logarithm is learned
        rates = lambda params: {key: INNER_RATE * fw.exp(leaf) for key, leaf in params["rate"].items()}
        found["optimizer"] = lambda params: sgd({"net": rates(params), "rate": None})
    return found


def start(fw: Any, name: str, dtype: str) -> Any:
    """The parameters that a method learns."""
    net = initial(dtype)
    rate = {key: np.zeros_like(leaf) for key, leaf in net.items()} if name == "Meta-SGD" else ()
    return fw.tree(fw.array, {"net": net, "rate": rate})


def verified(fw: Any, dtype: str) -> None:
    """Abort unless the meta-gradient is that of differences, in float64."""
    _, loss = network(fw)
    params = fw.tree(fw.array, {"net": initial("float64"), "rate": ()})
    x, y = map(fw.array, draw(np.random.default_rng(1), (3,), 20, "float64"))
    support, query = split(x, y, 10)
    how = options(fw, "MAML")
    adapted = lambda params, a, b: fw.gl.adapt(loss, params, a, b, **how)

    def outer(params: Any) -> Any:
        return fw.vmap(lambda a, b, c, d: loss(adapted(params, a, b), c, d))(*support, *query).mean()

    check.derivatives(outer, params, order=1).raise_if_failed()
    _, expected = fw.gradient(outer)(params)
    found = fw.gl.meta_grad(loss, loss, params, (support, query), **how)
    for key in expected["net"]:
        np.testing.assert_allclose(fw.numpy(found["net"][key]), fw.numpy(expected["net"][key]), atol=1e-10)


def train(
    fw: Any, name: str, shots: int, iterations: int, dtype: str, seed: int
) -> tuple[Any, list[float], float]:
    """Parameters after training, the mean loss of each block, and seconds."""
    _, loss = network(fw)
    params = start(fw, name, dtype)
    how = options(fw, name)

    def step(params: Any, x: Any, y: Any) -> Any:
        if name == "pretrained":  # one network for all tasks
            flat = lambda z: z.reshape(-1, 1)
            return fw.gradient(lambda params: loss(params, flat(x), flat(y)))(params)
        return fw.gl.meta_value_and_grad(loss, loss, params, split(x, y, shots), **how)

    more = {"compiled": False} if name == "iMAML" and "torch" in fw.gl.__name__ else {}
    block, state = fw.trainer(step, params, **more)
    rng, curve, began = np.random.default_rng(seed + 100), [], time.perf_counter()
    blocks = track(range(max(1, iterations // BLOCK)), f"{name}, {shots}-shot", console=console())
    for _ in blocks:
        tasks = draw(rng, (min(BLOCK, iterations), TASKS), 2 * shots, dtype)
        curve.append(float(block(tuple(map(fw.array, tasks))).mean()))
    return state(), curve, time.perf_counter() - began


def evaluate(fw: Any, name: str, params: Any, shots: int, tests: int, dtype: str) -> dict[str, Any]:
    """Mean squared error on new tasks after 0 to 10 steps, with 95 % intervals; and one task's curves."""
    model, loss = network(fw)
    x, y = map(fw.array, draw(np.random.default_rng(7), (tests,), shots + 100, dtype))
    support, query = split(x, y, shots)
    how = options(fw, name)
    how = {key: how[key] for key in ("mask", "optimizer")}
    steps = FINER.get(name, 1)
    grid = fw.array(np.linspace(-5, 5, 101, dtype=dtype)[:, None])
    step = fw.compile(
        lambda many: fw.vmap(lambda p, a, b: fw.gl.adapt(loss, p, a, b, steps=steps, **how))(many, *support)
    )
    many = fw.tree(lambda leaf: leaf + 0 * fw.array(np.zeros((tests,) + (1,) * leaf.ndim, dtype)), params)
    errors, curves = [], {}
    for k in range(STEPS + 1):
        losses = fw.numpy(fw.vmap(loss)(many, *query)).astype(float)
        errors.append([float(losses.mean()), float(1.96 * losses.std(ddof=1) / tests**0.5)])
        if k in (0, 1, STEPS):
            first = fw.tree(lambda leaf: leaf[0], many["net"])
            curves[k] = fw.numpy(model(first, grid))[:, 0].tolist()
        many = step(many)
    points = [fw.numpy(part)[0, :, 0].tolist() for part in support]
    return {"errors": errors, "curves": curves, "points": points}


def show(record: dict[str, Any]) -> None:
    """One table: error after 0, 1, 5 and 10 steps."""
    table = Table(
        "shots", "method", "0 steps", "1", "5", "10", "seconds", title=record["config"]["framework"]
    )
    for row in record["rows"]:
        cells = [f"{row['errors'][k][0]:.3f} ± {row['errors'][k][1]:.3f}" for k in (0, 1, 5, 10)]
        table.add_row(str(row["shots"]), row["method"], *cells, f"{row['seconds']:.0f}")
    console().print(table)


def newest(path: Path, preset: str) -> list[dict[str, Any]]:
    """For each framework one record of this preset, with the newest row of every method and number of shots."""
    found: dict[str, dict[str, Any]] = {}
    rows: dict[str, dict[Any, Any]] = {}
    for record in map(json.loads, path.read_text().splitlines()):
        if record["config"]["preset"] == preset:
            name = record["config"]["framework"]
            found[name] = record
            rows.setdefault(name, {}).update({(row["shots"], row["method"]): row for row in record["rows"]})
    order = lambda key: (-key[0], METHODS.index(key[1]))
    return [
        {**found[name], "rows": [rows[name][key] for key in sorted(rows[name], key=order)]}
        for name in sorted(found)
    ]


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """One task's curve before and after adaptation; error against steps, a panel for each number of shots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = records[0]["rows"]
    shots = list(dict.fromkeys(row["shots"] for row in rows))
    figure, axes = plt.subplots(1, 2 + len(shots), figsize=(3.9 * (2 + len(shots)), 3.6))
    for axis, name in zip(axes, ("MAML", "pretrained"), strict=False):
        row = next(row for row in rows if row["method"] == name and row["shots"] == shots[0])
        grid = np.linspace(-5, 5, 101)
        for k, style in (("0", ":"), ("1", "--"), (str(STEPS), "-")):
            label = f"{k} step{'s' * (k != '1')}"
            curve = row["curves"].get(k) or row["curves"][int(k)]
            axis.plot(grid, curve, style, color="tab:blue", label=label)
        axis.plot(*row["points"], "o", color="black", markersize=4, label="given")
        axis.set_title(f"{name}, {shots[0]}-shot: a new task", fontsize=10)
        axis.set_xlabel("x")
        axis.legend(fontsize=8)
    colours = {name: f"C{i}" for i, name in enumerate(METHODS)}
    for axis, n in zip(axes[2:], shots, strict=True):
        for record, style in zip(records, ("-", "--"), strict=False):
            for row in (row for row in record["rows"] if row["shots"] == n):
                middle, half = np.array(row["errors"]).T
                label = row["method"] if style == "-" else None
                axis.semilogy(middle, style, color=colours[row["method"]], label=label, linewidth=1.4)
                if style == "-":
                    axis.fill_between(
                        range(STEPS + 1),
                        middle - half,
                        middle + half,
                        color=colours[row["method"]],
                        alpha=0.2,
                        linewidth=0,
                    )
        names = " (solid), ".join(record["config"]["framework"] for record in records)
        axis.set_title(f"{n}-shot: {names}{' (dashed)' if len(records) > 1 else ''}", fontsize=10)
        axis.set_xlabel("steps of adaptation")
        axis.set_ylabel("squared error")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    framework: Framework = Framework.both,
    preset: Preset = Preset.smoke,
    out: Path = Path("results"),
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    methods: str = "",
    shots: str = "",
) -> None:
    """Train and test in one framework a process, then draw what was found.

    With methods and shots (lists with commas) a part alone is run; the figure has the newest row of each.
    """
    path = out / "maml_sinusoid.jsonl"
    if framework is Framework.both:
        flags = {"preset": preset, "out": out, "device": device, "dtype": dtype, "seed": seed}
        in_each_framework(__file__, path, **flags, methods=methods, shots=shots)
        return
    os.environ["JAX_ENABLE_X64"] = "1"
    fw = load(framework.value, device)
    verified(fw, dtype)
    chosen, rows = PRESETS[preset.value], []
    asked = methods.split(",") if methods else chosen["methods"]
    for points in map(int, shots.split(",")) if shots else chosen["shots"]:
        for name in asked if points == 10 else [name for name in asked if name in FEW]:
            iterations = min(chosen["iterations"], MOST.get(name, chosen["iterations"]))
            params, curve, seconds = train(fw, name, points, iterations, dtype, seed)
            row = {"method": name, "shots": points, "iterations": iterations, "seconds": seconds}
            rows.append(
                row | {"training": curve, **evaluate(fw, name, params, points, chosen["tests"], dtype)}
            )
    config = {"framework": framework.value, "preset": preset.value, "device": device, "dtype": dtype}
    config |= {"seed": seed, "iterations": chosen["iterations"], "tests": chosen["tests"]}
    record = {"experiment": "maml_sinusoid", "config": config, "environment": environment(), "rows": rows}
    append(path, record)
    show(record)
    plot(newest(path, preset.value), out / "maml_sinusoid.png")


if __name__ == "__main__":
    typer.run(main)
