"""Which of a framework's own operations have wrong derivatives, in which mode?

    python experiments/framework_audit.py --framework torch --out results

Runs `check.derivatives` over torch's own test inputs (OpInfo), or over jax.numpy and jax.scipy, in a process
apart, an operation at a time. A run that was interrupted goes on after the last line of
audit_<framework>_<version>.jsonl; one that is complete only writes the table again. Expected: every alarm is a
fault with a reproduction that prints it, or is explained in the data; otherwise the alarms are printed and the
exit code is 1. Run it in an environment of each framework version: known_wrong.json, which the library reads,
and docs/<framework>_known_wrong.md then hold all of them.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gradlab.bench import audit, known_wrong
from gradlab.bench.console import console as terminal
from gradlab.bench.record import append, environment

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "src/gradlab/transforms/repairs/known_wrong.json"


def audited(framework: str, lines: Path, seconds: float) -> list[dict[str, Any]]:
    """Every case of one framework, with a bar; those in `lines` are not run again."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal()) as progress:
        bar = progress.add_task(framework, total=None)

        def tell(number: int, total: int, name: str) -> None:
            progress.update(bar, completed=number, total=total, description=name)

        audit.run(framework, lines, seconds, tell)
    return [json.loads(line) for line in lines.read_text().splitlines()]


def shown(alarms: list[dict[str, Any]]) -> Table:
    """What a person has to look at."""
    table = Table("operation", "variant", "rows", "the first", title="alarms that nothing explains")
    for line in alarms:
        claims = audit.alarms(line)
        table.add_row(line["name"], line["variant"], ", ".join(claims), line["rows"][claims[0]]["message"])
    return table


def one(framework: str, out: Path, seconds: float) -> bool:
    """Audit, table and page of one framework; whether every alarm is explained."""
    module = importlib.import_module(f"gradlab.bench.audit_{framework}")
    name = f"{framework} {version(framework).split('+')[0]}"
    lines = audited(framework, out / f"audit_{name.replace(' ', '_')}.jsonl", seconds)
    codes = {operator.name: operator.code for operator in module.cases()}
    explained = getattr(module, "EXPLAINED", {})
    found, alarms = known_wrong.entries(lines, codes, getattr(module, "ALIASES", {}), explained)
    table = known_wrong.publish(TABLE, name, found)
    (ROOT / f"docs/{framework}_known_wrong.md").write_text(known_wrong.page(framework, table))
    numbers = {
        "cases": len(lines),
        "operations": len({line["name"] for line in lines}),
        "rows": sum(line.get("claims", 0) for line in lines),
        "skipped": [
            f"{line['name']} {line['variant']}: {line['skipped']}" for line in lines if "skipped" in line
        ],
        "inconclusive": sum(
            row["status"] == "inconclusive" for line in lines for row in line.get("rows", {}).values()
        ),
        "wrong": [entry["operation"] for entry in found if entry["failed"]],
        "explained": explained,
        "unexplained": [f"{line['name']} {line['variant']}" for line in alarms],
    }
    record = {"experiment": "framework_audit", "framework": name, "environment": environment(), **numbers}
    append(out / "framework_audit.jsonl", record)
    terminal().print(
        f"{name}: {numbers['cases']} cases of {numbers['operations']} operations, {numbers['rows']} rows; "
        f"{len(numbers['wrong'])} operations wrong, {len(alarms)} alarms unexplained, "
        f"{numbers['inconclusive']} rows inconclusive, {len(numbers['skipped'])} cases skipped"
    )
    if alarms:
        terminal().print(shown(alarms))
    return not alarms


def main(
    framework: Annotated[str, typer.Option(help="jax, torch or both")] = "both",
    out: str = "results",
    seconds: Annotated[float, typer.Option(help="limit of one case")] = 240.0,
) -> None:
    """Audit, write the table and the page."""
    warnings.simplefilter("ignore")  # the operations' own
    names = ("jax", "torch") if framework == "both" else (framework,)
    explained = [one(name, Path(out), seconds) for name in names]
    sys.exit(0 if all(explained) else 1)


if __name__ == "__main__":
    typer.run(main)
