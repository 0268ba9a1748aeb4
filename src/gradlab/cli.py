"""The `gradlab` command."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

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


class Modes(StrEnum):
    """Which modes the derivatives of derivatives are made of."""

    all = "all"
    forward = "forward"
    reverse = "reverse"


class OneFramework(StrEnum):
    """Which framework the numbers given are arrays of."""

    jax = "jax"
    torch = "torch"


class OneDtype(StrEnum):
    """Which dtype the floats given have."""

    float32 = "float32"
    float64 = "float64"


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
    dtype: OneDtype = OneDtype.float32,
    out: str = "results",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget the cells of a run that was stopped.")
    ] = False,
) -> None:
    """Time each operation against hand-written framework code; appends a record a framework to bench.jsonl."""
    from gradlab.bench.suite import run

    sys.exit(run(preset.value, framework.value, device, dtype.value, out, fresh))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Searched for records: .jsonl and .json.")] = Path("results"),
    out: Annotated[Path | None, typer.Option(help="Default: the same folder.")] = None,
) -> None:
    """Write report.html, one page that needs no network, and report.md, of the records in a folder."""
    from gradlab._errors import GradlabError
    from gradlab.bench.report import write

    try:
        page, plain = write(folder, out)
    except GradlabError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{page}\n{plain}")


AT = "The point: a Python literal such as '[1.0, 2.0]' or '{\"w\": [1.0]}', a .npy or .npz file, or module:name."
DATA = "A further argument of the function, given likewise; repeat it for more."
FRAMEWORK = "Default: that of the point's arrays, else the one which the file imports."
DTYPE = "Default: the point's own, float64 for a literal."
COMPILED = "Default: in jax alone."


@app.command()
def check(
    function: Annotated[str, typer.Argument(help="module:function or path/to/file.py:function.")],
    at: Annotated[str, typer.Option(help=AT)],
    data: Annotated[list[str] | None, typer.Option(help=DATA)] = None,
    framework: Annotated[OneFramework | None, typer.Option(help=FRAMEWORK)] = None,
    dtype: Annotated[OneDtype | None, typer.Option(help=DTYPE)] = None,
    order: int = 2,
    modes: Modes = Modes.all,
    has_aux: Annotated[bool, typer.Option("--has-aux", help="The function returns (value, aux).")] = False,
    vmap: bool = True,
    compiled: Annotated[bool | None, typer.Option("--compiled/--no-compiled", help=COMPILED)] = None,
    directions: int = 2,
    accuracy: Annotated[
        float, typer.Option(help="Of a function that is itself computed to a tolerance, relative.")
    ] = 0.0,
    explore: Annotated[
        bool, typer.Option("--explore", help="Search the inputs around the point too.")
    ] = False,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="Write the report there.")] = None,
) -> None:
    """Check the derivatives of a function in your own file; exits with 1 unless every claim passed."""
    options: dict[str, Any] = {
        "order": order,
        "modes": modes.value,
        "has_aux": has_aux,
        "vmap": vmap,
        "compiled": compiled,
    }
    options |= {"directions": directions, "accuracy": accuracy, "explore": explore, "seed": seed}
    if json is not None and not json.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {json.parent}", param_hint="--json")
    report = _checked(function, at, data or [], framework, dtype, options)
    if json is not None:
        json.write_text(report.to_json())
    sys.exit(_show(report))


def _checked(function: str, at: str, data: list[str], framework: Any, dtype: Any, options: Any) -> Any:
    """The report; whatever is wrong with what was given becomes one line."""
    from gradlab._errors import GradlabError
    from gradlab.check import arguments, derivatives

    try:
        f = arguments.load(function)
        given = [arguments.read(at, floats=True), *(arguments.read(text) for text in data)]
        chosen = arguments.framework_for(tuple(tree for tree, _ in given), framework and framework.value)
        wide = dtype.value if dtype else arguments.dtype_of(given[0][0], chosen) or "float64"
        with _precision(chosen, wide):
            x, *args = (
                arguments.arrays(tree, chosen, wide if dtype or literal else None) for tree, literal in given
            )
            return derivatives(f, x, *args, **options)
    except GradlabError as error:
        raise typer.BadParameter(str(error)) from error
    except Exception as error:
        raise typer.BadParameter(f"{function} raised {arguments.told(error)}") from error


def _precision(framework: str, dtype: str) -> Any:
    """In jax, float64 where it is asked for."""
    if framework != "jax" or dtype != "float64":
        return nullcontext()
    import jax

    return jax.enable_x64(True)


def _show(report: Any) -> int:
    """Print the table and what is wrong; 0 where nothing is."""
    from rich.console import Console

    from gradlab.check.report import FAILED, INCONCLUSIVE

    Console().print(report)
    bad = [row for row in report.rows if row.status in (FAILED, INCONCLUSIVE)]
    for row in bad:
        typer.echo(f"{row.claim} {row.status}: {row.message}")
    if not bad and not report.passed:
        typer.echo("no derivative could be checked")
    return 0 if report.passed else 1


def main() -> None:
    """Run the command line."""
    app()
