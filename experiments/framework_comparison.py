"""JAX or PyTorch: which trains, answers and differentiates faster here, and do both compute the same?

    python experiments/framework_comparison.py --framework both --preset smoke|paper --out results

An MLP and a conv net on scikit-learn's digits and a GPT on the language reference that comes with Python, from the same
weights in equinox and torch.nn (and flax and TensorFlow where they are installed), trained by the same AdamW on the
same batches. Expected: the same losses, to rounding; compiling costs jax and torch.compile seconds, which small models
never earn back in torch; no framework is the faster one everywhere. Aborts, naming the step, where losses differ. Each
framework has a process of its own; calls are timed in turn. One record in results/framework_comparison.jsonl, tables
in results/framework_comparison.md, a figure.
"""

from __future__ import annotations

from pathlib import Path

import typer

from gradlab.bench.comparison.figures import draw
from gradlab.bench.comparison.run import compare
from gradlab.bench.comparison.views import markdown, tables, terminal
from gradlab.bench.console import console
from gradlab.bench.record import append
from gradlab.cli import Framework, OneDtype, Preset


def main(
    framework: Framework = Framework.both,
    device: str = "cpu",
    dtype: OneDtype = OneDtype.float32,
    seed: int = 0,
    preset: Preset = Preset.smoke,
    out: Path = Path("results"),
) -> None:
    """Compare, then show."""
    chosen = ("jax", "torch", "flax", "tensorflow") if framework is Framework.both else (framework.value,)
    with console().status("starting") as status:
        record = compare(chosen, preset.value, device, dtype.value, seed, status.update)
    append(out / "framework_comparison.jsonl", record)
    found = tables(record)
    (out / "framework_comparison.md").write_text("\n".join(map(markdown, found)))
    draw(record, out / "framework_comparison.png")
    for table in found:
        console().print(terminal(table))


if __name__ == "__main__":
    typer.run(main)
