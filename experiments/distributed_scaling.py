"""What does sharding a batch over processes of one machine cost, and what does it bring?

    python experiments/distributed_scaling.py --framework both --preset smoke|paper --out results

Hessian-vector products and clipped sums of gradients of a network 64-128-128-10 on scikit-learn's digits, by
`gradlab.distributed` over 1, 2 and 4 processes of one thread each (torchrun with gloo; jax.distributed with gloo): of
one batch that is split (strong scaling) and of a batch for each process (weak), beside the same operation on the
process's own shard alone, in turn. Expected: the sharding adds milliseconds a call (5 in torch, 10 in jax) as long as
there is a core for each process; beyond that, processes share cores, and what is split gains nothing. Aborts where the
sharded result differs from that of the whole batch by more than 1e-12 in float64 (1e-6 in float32). One line a
framework in results/distributed_scaling.jsonl, a table, a figure.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track
from rich.table import Table

from gradlab.bench.console import console
from gradlab.bench.record import append, environment, in_each_framework
from gradlab.cli import Framework, Preset

PROCESSES = {"smoke": (1, 2), "paper": (1, 2, 4)}
EXAMPLES = {"smoke": 128, "paper": 1024}
REPEATS = {"smoke": 10, "paper": 30}
WIDTHS = (64, 128, 128, 10)
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}
OPERATIONS = ("hvp", "clipped_grad")


def data(examples: int, dtype: str, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Any]:
    """Parameters, a direction, and images and labels, repeated where more are asked for than there are."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    rows = np.random.default_rng(seed).permutation(max(examples, len(X)))[:examples] % len(X)
    draw = np.random.default_rng(seed + 1)
    layers = [(f"w{i}", draw.normal(size=(a, b)) / a**0.5) for i, (a, b) in enumerate(pairwise(WIDTHS))]
    params = {name: w.astype(dtype) for name, w in layers}
    v = {name: draw.normal(size=w.shape).astype(dtype) for name, w in params.items()}
    return params, v, ((X[rows] / 16).astype(dtype), y[rows].astype(np.int64))


def in_torch(processes: int, rank: int) -> Any:
    """How to make, compile, gather and wait, after joining the group."""
    import torch

    import gradlab.torch as gl

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    loss = lambda p, x, y: torch.nn.functional.cross_entropy(
        torch.tanh(torch.tanh(x @ p["w0"]) @ p["w1"]) @ p["w2"], y
    )
    numbers = lambda tree: [np.asarray(x) for x in torch.utils._pytree.tree_leaves(tree)]
    return gl, torch.from_numpy, loss, loss, lambda f: f, lambda x: x, torch.utils._pytree.tree_map, numbers


def in_jax(processes: int, rank: int) -> Any:
    """The same in jax, compiled; a process has one device."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    import jax
    import jax.numpy as jnp

    import gradlab.jax as gl

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if processes > 1:
        jax.distributed.initialize(os.environ["COORDINATOR"], processes, rank)

    def loss(p: Any, x: Any, y: Any) -> Any:
        logits = jnp.tanh(jnp.tanh(x @ p["w0"]) @ p["w1"]) @ p["w2"]
        return jax.nn.logsumexp(logits) - logits[y]

    mean = lambda p, X, y: jax.vmap(loss, (None, 0, 0))(p, X, y).mean()
    numbers = lambda tree: [np.asarray(x) for x in jax.tree.leaves(tree)]
    return gl, jnp.asarray, loss, mean, jax.jit, jax.block_until_ready, jax.tree.map, numbers


def worker(framework: str, dtype: str, examples: int, repeats: int, seed: int) -> dict[str, Any]:
    """One process: its shard, checked against the whole batch, then timed beside the shard alone."""
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    found = (in_torch if framework == "torch" else in_jax)(processes, rank)
    gl, array, loss, mean, compiled, wait, tree_map, numbers = found
    params, v, whole = data(examples, dtype, seed)
    shard = tuple(np.array_split(x, processes)[rank] for x in whole)
    p, v = tree_map(array, params), tree_map(array, v)
    whole, shard = (tuple(map(array, batch)) for batch in (whole, shard))
    split = global_arrays(shard) if framework == "jax" and processes > 1 else shard

    def of(ops: Any, name: str) -> Callable[..., Any]:
        if name == "hvp":
            return compiled(lambda p, v, *batch: ops.hvp(mean, p, v, *batch))
        return compiled(lambda p, v, *batch: ops.clipped_grad(loss, p, *batch, max_norm=1.0)[0])

    rows = {}
    for name in OPERATIONS:
        sharded, alone = of(gl.distributed, name), of(gl, name)
        pairs = zip(numbers(sharded(p, v, *split)), numbers(alone(p, v, *whole)), strict=True)
        off = max(float(abs(a - b).max() / abs(b).max()) for a, b in pairs)
        if not off <= TOLERANCE[dtype]:
            raise SystemExit(f"{framework}, {name}, {processes} processes: off by {off:.1e}")
        times: dict[str, list[float]] = {"sharded": [], "alone": []}
        for _ in range(repeats):  # a fixed number, since all processes must call alike
            for kind, call in (
                ("alone", lambda: alone(p, v, *shard)),
                ("sharded", lambda: sharded(p, v, *split)),
            ):
                began = time.perf_counter()
                wait(call())
                times[kind].append(time.perf_counter() - began)
        middle = {kind: float(np.median(t[2:])) for kind, t in times.items()}
        added = float(np.median(np.array(times["sharded"][2:]) - np.array(times["alone"][2:])))
        rows[name] = {**middle, "added": added, "error": off}
    return rows


def global_arrays(shard: Any) -> Any:
    """Every process's examples as one array of jax."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    where = NamedSharding(Mesh(np.array(jax.devices()), ("examples",)), PartitionSpec("examples"))
    return tuple(jax.make_array_from_process_local_data(where, np.asarray(x)) for x in shard)


def launch(framework: str, processes: int, words: list[str]) -> dict[str, Any]:
    """Start the processes, torch's by torchrun, and read what the first one found."""
    with tempfile.TemporaryDirectory() as folder:
        answer = str(Path(folder) / "rows.json")
        script = [__file__, "--framework", framework, "--answer", answer, *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if framework == "torch":
            run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            subprocess.run([sys.executable, *run, *script], env=environment, check=True)
        else:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                environment["COORDINATOR"] = f"127.0.0.1:{s.getsockname()[1]}"
            ranks = [{"RANK": str(i), "WORLD_SIZE": str(processes)} for i in range(processes)]
            runs = [subprocess.Popen([sys.executable, *script], env={**environment, **r}) for r in ranks]
            if sum(abs(run.wait()) for run in runs):  # wait for all
                raise SystemExit(f"{framework}, {processes} processes: failed")
        return json.loads(Path(answer).read_text())


def show(framework: str, rows: list[dict[str, Any]]) -> None:
    """One table."""
    table = Table(
        "scaling", "processes", "examples", "operation", "ms a call", "its shard alone", "added", "error"
    )
    table.title = framework
    for row in rows:
        times = [f"{1e3 * row[key]:.2f}" for key in ("sharded", "alone", "added")]
        table.add_row(
            row["scaling"],
            str(row["processes"]),
            str(row["examples"]),
            row["operation"],
            *times,
            f"{row['error']:.0e}",
        )
    console().print(table)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds against processes: a panel for each kind of scaling and operation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [(scaling, operation) for scaling in ("strong", "weak") for operation in OPERATIONS]
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4))
    for axis, (scaling, operation) in zip(axes, panels, strict=True):
        for record, colour in zip(records, ("tab:blue", "tab:orange"), strict=True):
            rows = [r for r in record["rows"] if (r["scaling"], r["operation"]) == (scaling, operation)]
            at, name = [r["processes"] for r in rows], record["config"]["framework"]
            axis.plot(at, [1e3 * r["sharded"] for r in rows], "o-", color=colour, label=f"{name}, sharded")
            axis.plot(
                at, [1e3 * r["alone"] for r in rows], "s:", color=colour, label=f"{name}, its shard alone"
            )
        what = "one batch, split" if scaling == "strong" else "a batch for each process"
        axis.set_title(f"{operation}: {what}", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xticks(at, [str(n) for n in at])
        axis.set_xlabel("processes")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms a call")
    axes[0].legend(fontsize=7)
    cores = records[0]["environment"]["cores"]
    figure.suptitle(f"gradlab.distributed on one machine of {cores} cores, one thread a process", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    framework: Framework = Framework.both,
    preset: Preset = Preset.smoke,
    dtype: str = "float64",
    seed: int = 0,
    out: Path = Path("results"),
    answer: Path | None = None,
    examples: int = 0,
) -> None:
    """Measure one framework after the other, then draw what was measured; with `answer`, be one process."""
    repeats = REPEATS[preset.value]
    if answer is not None:
        rows = worker(framework.value, dtype, examples, repeats, seed)
        if os.environ["RANK"] == "0":
            answer.write_text(json.dumps(rows))
        return
    path = out / "distributed_scaling.jsonl"
    if framework is Framework.both:
        records = in_each_framework(__file__, path, preset=preset, dtype=dtype, seed=seed, out=out)
        draw(records, out / "distributed_scaling.png")
        return
    name, base = framework.value, EXAMPLES[preset.value]
    runs = [
        (scaling, n)
        for scaling in ("strong", "weak")
        for n in PROCESSES[preset.value]
        if scaling == "strong" or n > 1
    ]
    rows = []
    for scaling, n in track(runs, name, console=console()):
        size = base if scaling == "strong" else n * base
        words = ["--dtype", dtype, "--seed", str(seed), "--preset", preset.value, "--examples", str(size)]
        found = launch(name, n, words)
        for kind in ("strong", "weak") if n == 1 else (scaling,):
            rows += [
                {"scaling": kind, "processes": n, "examples": size, "operation": op, **found[op]}
                for op in found
            ]
    rows.sort(key=lambda row: (row["scaling"], row["operation"], row["processes"]))
    config = {"framework": name, "preset": preset.value, "device": "cpu", "dtype": dtype, "seed": seed}
    append(
        path,
        {"experiment": "distributed_scaling", "config": config, "environment": environment(), "rows": rows},
    )
    show(name, rows)


if __name__ == "__main__":
    typer.run(main)
