"""What does a call across the frameworks cost beside the framework's own?

    python experiments/interop_overhead.py --preset smoke|paper --out results

A function of one framework (Σ sin² of a vector, and a network of two layers) called and differentiated from the other,
beside the caller's own form of it: eager, compiled, gradient, Hessian-vector product and a batch. Expected: 0.1 to
0.3 ms a call and 0.6 ms a gradient in eager torch and in compiled jax, 1 to 2 ms under torch.func; on large arrays the
frameworks' own speeds and the copies to and from the host. Aborts where the two differ.
Both frameworks in one process, one thread each, since they work together. One line in results/interop_overhead.jsonl.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track
from rich.table import Table

from gradlab.bench.clock import interleave
from gradlab.bench.console import console
from gradlab.bench.record import append, environment
from gradlab.cli import Preset

SIZES = {"smoke": (16,), "paper": (16, 4096, 262_144)}
REPEATS = {"smoke": 10, "paper": 30}


def calls(size: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """For each way to call: the caller's own form, and the other framework's."""
    import jax
    import jax.numpy as jnp
    import torch

    from gradlab import interop

    rng = np.random.default_rng(0)
    W, V = rng.normal(size=(2, 64, 64)) / 8
    x = rng.normal(size=(max(size // 64, 1), 64 if size >= 64 else size))
    W, V = W[: x.shape[1]], V

    def function(xp: Any, array: Callable[[Any], Any]) -> Callable[[Any], Any]:
        A, B = array(W), array(V)
        return lambda x: (xp.sin(xp.tanh(x @ A) @ B) ** 2).sum()

    of_torch, of_jax = function(torch, torch.tensor), function(jnp, jnp.asarray)
    in_torch, in_jax = (
        {"own": of_torch, "other": interop.as_torch(of_jax)},
        {
            "own": of_jax,
            "other": interop.as_jax(of_torch),
        },
    )
    t, leaf, v, j = (
        torch.tensor(x),
        torch.tensor(x, requires_grad=True),
        torch.ones(x.shape).double(),
        jnp.asarray(x),
    )
    T, J = torch.stack([t] * 8), jnp.stack([j] * 8)
    func, both = torch.func, lambda make, fs: {name: make(f) for name, f in fs.items()}

    def hvp(f: Any) -> Any:
        (g,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        return torch.autograd.grad(g, leaf, v)[0]

    along = lambda f: lambda j: jax.jvp(jax.grad(f), (j,), (jnp.ones_like(j),))[1]
    now = lambda g, at: lambda: g(at)
    return {
        "torch: call": both(lambda f: lambda: f(t), in_torch),
        "torch: backward": both(lambda f: lambda: torch.autograd.grad(f(leaf), leaf)[0], in_torch),
        "torch: double backward": both(lambda f: lambda: hvp(f), in_torch),
        "torch: func.grad": both(lambda f: now(func.grad(f), t), in_torch),
        "torch: func.vmap of 8": both(lambda f: now(func.vmap(f), T), in_torch),
        "jax: call": both(lambda f: now(f, j), in_jax),
        "jax: jit": both(lambda f: now(jax.jit(f), j), in_jax),
        "jax: grad": both(lambda f: now(jax.grad(f), j), in_jax),
        "jax: jit grad": both(lambda f: now(jax.jit(jax.grad(f)), j), in_jax),
        "jax: jit hvp": both(lambda f: now(jax.jit(along(f)), j), in_jax),
        "jax: jit vmap of 8": both(lambda f: now(jax.jit(jax.vmap(f)), J), in_jax),
    }


def measure(size: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of both forms of every call."""
    import jax

    rows = []
    for name, pair in track(calls(size).items(), f"{size} numbers", console=console()):
        own, other = (np.asarray(call().detach() if "torch" in name else call()) for call in pair.values())
        np.testing.assert_allclose(other, own, rtol=1e-10, atol=1e-10)
        wait = jax.block_until_ready if name.startswith("jax") else lambda result: result
        times = interleave(pair, synchronise=wait, repeats=repeats, budget_s=5.0)
        a, b = (np.array(times[form].samples) * 1e3 for form in ("own", "other"))
        row = {"call": name, "size": size, "own_ms": float(np.median(a)), "other_ms": float(np.median(b))}
        rows.append({**row, "more_ms": float(np.median(b - a))})
    return rows


def main(preset: Preset = Preset.smoke, out: Path = Path("results")) -> None:
    """Time every call at each size, print a table, append one record."""
    os.environ["JAX_ENABLE_X64"] = "1"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    import torch

    torch.set_num_threads(1)
    rows = [row for size in SIZES[preset.value] for row in measure(size, REPEATS[preset.value])]
    table = Table("call", "numbers", "own, ms", "across, ms", "more, ms", title="calls across the frameworks")
    for row in rows:
        times = [f"{row[key]:.3f}" for key in ("own_ms", "other_ms", "more_ms")]
        table.add_row(row["call"], str(row["size"]), *times)
    console().print(table)
    config = {"preset": preset.value, "device": "cpu", "dtype": "float64"}
    record = {"experiment": "interop_overhead", "config": config, "environment": environment(), "rows": rows}
    append(out / "interop_overhead.jsonl", record)


if __name__ == "__main__":
    typer.run(main)
