"""The `gradlab` command."""

from __future__ import annotations

import sys
from enum import StrEnum

try:
    import typer
except ModuleNotFoundError:
    sys.exit("gradlab: the command needs the tools: pip install 'gradlab[tools]'")


class Framework(StrEnum):
    """Which framework to run."""

    jax = "jax"
    torch = "torch"
    both = "both"


class Dtype(StrEnum):
    """Which floating-point type to run."""

    float32 = "float32"
    float64 = "float64"
    both = "both"


class Preset(StrEnum):
    """How much to run."""

    smoke = "smoke"
    paper = "paper"


app = typer.Typer(
    add_completion=False, help="Higher-order derivatives on JAX and PyTorch, checked and measured."
)


@app.command()
def verify(
    preset: Preset = Preset.smoke,
    framework: Framework = Framework.both,
    device: str = "cpu",
    dtype: Dtype = Dtype.both,
    out: str = "results",
) -> None:
    """Check every operation on real data and closed forms, then time it; writes verify.json and verify.png."""
    from gradlab.bench.verify import run

    sys.exit(run(preset.value, framework.value, device, dtype.value, out))


@app.command()
def bench(
    preset: Preset = Preset.smoke,
    framework: Framework = Framework.both,
    device: str = "cpu",
    dtype: Dtype = Dtype.float32,
    out: str = "results",
) -> None:
    """Time each operation against hand-written framework code; appends a record a framework to bench.jsonl."""
    from gradlab.bench.suite import run

    sys.exit(run(preset.value, framework.value, device, dtype.value, out))


def main() -> None:
    """Run the command line."""
    app()
