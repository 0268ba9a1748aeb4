"""What does a gradlab rule cost beside the framework's own, in the combination that both were made for?

    python experiments/custom_rule_overhead.py --framework jax
    python experiments/custom_rule_overhead.py --framework torch

Expected: under jax.jit a gradient through `custom_vjp` is within 5 % of one through a bare `jax.custom_vjp` (the
compiled programs are the same); in eager torch a forward and backward is within 30 µs of that of a bare
`torch.autograd.Function` (more beside tensors that empty the processor's caches: the same Python after a sigmoid of a
million numbers takes 100 µs more than before one). The derivatives are compared before they are timed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import typer

from gradlab.bench.clock import interleave
from gradlab.bench.record import append, environment

SIZES = {"smoke": (16, 65_536), "paper": (16, 1_024, 65_536, 1_048_576)}


def main(
    framework: str = typer.Option(..., help="jax or torch: one a process"),
    preset: str = "smoke",
    repeats: int = 40,
    out: Path = Path("results"),
) -> None:
    """Time both rules at each size, print a table, append one record."""
    measure = {"jax": in_jax, "torch": in_torch}[framework]
    rows = [measure(n, repeats) for n in SIZES[preset]]
    print(
        f"{'entries':>9} {'bare, µs':>10} {'gradlab, µs':>12} {'difference, µs':>15} {'of the best':>12} {'ratio':>6}"
    )
    for row in rows:
        print(
            f"{row['entries']:>9} {row['bare_us']:>10.1f} {row['ours_us']:>12.1f} {row['difference_us']:>15.1f} "
            f"{row['best_difference_us']:>12.1f} {row['ratio']:>6.3f}"
        )
    append(
        out / "custom_rule_overhead.jsonl",
        {"framework": framework, "preset": preset, "rows": rows, **environment()},
    )


def in_jax(n: int, repeats: int) -> dict[str, Any]:
    """A compiled gradient of Σ w log(1 + exp x) through a rule."""
    import jax
    import jax.numpy as jnp

    import gradlab.jax as gl

    def softplus(declare: Any) -> Any:
        f = declare(lambda x: jnp.logaddexp(x, 0.0))
        f.defvjp(lambda x: (jnp.logaddexp(x, 0.0), x), lambda x, u: (u * jax.nn.sigmoid(x),))
        return f

    x, w = (jnp.asarray(a, jnp.float32) for a in np.random.default_rng(0).normal(size=(2, n)))
    gradient = lambda f: jax.jit(jax.grad(lambda x: (w * f(x)).sum()))
    bare, ours = gradient(softplus(jax.custom_vjp)), gradient(softplus(gl.custom_vjp))
    np.testing.assert_allclose(ours(x), bare(x), rtol=1e-6)
    calls = {"bare": lambda: bare(x), "ours": lambda: ours(x)}
    return _row(n, interleave(calls, synchronise=jax.block_until_ready, repeats=repeats))


def in_torch(n: int, repeats: int) -> dict[str, Any]:
    """The same in eager torch: forward and backward."""
    import torch

    import gradlab.torch as gl

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(x)
            return torch.logaddexp(x, x.new_zeros(()))

        @staticmethod
        def backward(ctx: Any, u: Any) -> Any:
            (x,) = ctx.saved_tensors
            return u * torch.sigmoid(x)

    ours = gl.custom_vjp(lambda x: torch.logaddexp(x, x.new_zeros(())))
    ours.defvjp(lambda x: (torch.logaddexp(x, x.new_zeros(())), x), lambda x, u: (u * torch.sigmoid(x),))
    torch.set_num_threads(1)
    x, w = torch.tensor(np.random.default_rng(0).normal(size=(2, n)), dtype=torch.float32)
    x.requires_grad_()
    gradient = lambda f: torch.autograd.grad(f(x), x, w)[0]
    torch.testing.assert_close(gradient(ours), gradient(Bare.apply))
    calls = {"bare": lambda: gradient(Bare.apply), "ours": lambda: gradient(ours)}
    return _row(n, interleave(calls, synchronise=lambda result: result, repeats=repeats))


def _row(n: int, timings: Any) -> dict[str, Any]:
    bare, ours = (np.array(timings[name].samples) for name in ("bare", "ours"))
    return {
        "entries": n,
        "bare_us": float(np.median(bare) * 1e6),
        "ours_us": float(np.median(ours) * 1e6),
        "difference_us": float(np.median(ours - bare) * 1e6),
        "ratio": float(np.median(ours / bare)),
        "best_difference_us": (timings["ours"].best_s - timings["bare"].best_s) * 1e6,
    }


if __name__ == "__main__":
    typer.run(main)
