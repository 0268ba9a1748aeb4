"""The table of what frameworks get wrong, made from an audit's lines: JSON for the library, a page for readers.

An operation is listed where a row of the audit failed and its reproduction prints a number that is not the
right one; an alarm without either is an error of the checker, or of the audit, and is returned for a person.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gradlab.bench.audit import alarms
from gradlab.check.report import FAILED, UNSUPPORTED

Line = dict[str, Any]
SECOND = [f"{a} over {b}" for a in ("forward", "reverse") for b in ("forward", "reverse")]


def entries(
    lines: list[Line],
    codes: Mapping[str, str],
    aliases: Mapping[str, tuple[str, ...]],
    explained: Mapping[str, str],
) -> tuple[list[dict[str, Any]], list[Line]]:
    """What is known to be wrong, or to have no second derivative; and the cases whose alarms nothing explains.

    Args:
        lines: an audit's.
        codes: by operation, the reproduction of its fault, or "".
        aliases: by operation, its other public names.
        explained: by operation, or by "operation: row", why what fails is no wrong derivative.
    """
    lines = [_less(line, explained) for line in lines]
    same = {alias: name for name, others in aliases.items() for alias in others}
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(same.get(line["name"]) or line["name"], []).append(line)
    innocent = _innocent(groups)
    listed, open_alarms = [], []
    for name, group in sorted(groups.items()):
        failing = [line for line in group if alarms(line)]
        code = codes.get(name, "")
        if failing and not code:
            open_alarms += failing
        elif failing:
            entry = _entry(name, group, failing, innocent)
            listed.append({**entry, "aliases": _names(group, name, aliases), **reproduced(code)})
        elif _without_second(group):
            listed.append({**_entry(name, group, group, innocent), "aliases": _names(group, name, aliases)})
    return listed, open_alarms


def _less(line: Line, explained: Mapping[str, str]) -> Line:
    """The line without the rows that failed and are explained."""
    name = line["name"]
    known = lambda claim: name in explained or f"{name}: {claim}" in explained
    rows = line.get("rows", {}).items()
    kept = {claim: row for claim, row in rows if not (row["status"] == FAILED and known(claim))}
    return {**line, "rows": kept} if "rows" in line else line


def _entry(name: str, group: list[Line], blamed: list[Line], innocent: dict[str, set[str]]) -> dict[str, Any]:
    by_status = lambda status: {
        claim for line in group for claim, row in line.get("rows", {}).items() if row["status"] == status
    }
    failed = by_status(FAILED)
    nodes = {node for line in blamed for node in line.get("nodes", ())}
    return {
        "operation": name,
        "failed": sorted(failed),
        "unsupported": sorted(by_status(UNSUPPORTED) - failed),
        "nodes": sorted(node for node in nodes if innocent.get(node, set()) <= {name}),
    }


def _innocent(groups: Mapping[str, list[Line]]) -> dict[str, set[str]]:
    """For each graph node, the operations that contain it and of which no row failed or was refused."""
    found: dict[str, set[str]] = {}
    for name, group in groups.items():
        if not any(
            row["status"] in (FAILED, UNSUPPORTED) for line in group for row in line.get("rows", {}).values()
        ):
            for node in {node for line in group for node in line.get("nodes", ())}:
                found.setdefault(node, set()).add(name)
    return found


def _without_second(group: list[Line]) -> bool:
    """Whether every nest of two modes is refused, at every sample, though a first derivative is there."""
    refused = lambda line, claim: line["rows"].get(claim, {}).get("status") == UNSUPPORTED
    judged = [line for line in group if "rows" in line]
    return bool(judged) and all(
        all(refused(line, claim) for claim in SECOND) and not refused(line, "vjp") for line in judged
    )


def _names(group: list[Line], name: str, aliases: Mapping[str, tuple[str, ...]]) -> list[str]:
    return sorted({*aliases.get(name, ()), *(line["name"] for line in group)} - {name})


def reproduced(code: str) -> dict[str, Any]:
    """A reproduction, what it prints, and the relative error of the number in it (None: not finite)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    output = printed.getvalue().strip()
    found = re.fullmatch(r"(\S+) where (\S+) is right", output)
    if found is None:
        raise ValueError(f"the reproduction printed {output!r}, not '... where ... is right':\n{code}")
    wrong, right = map(float, found.groups())
    error = abs(wrong - right) / (abs(right) or 1.0)
    if error < 1e-12:
        raise ValueError(f"the reproduction shows no fault, {output}:\n{code}")
    return {
        "relative_error": round(error, 10) if math.isfinite(error) else None,
        "reproduction": code,
        "output": output,
    }


def publish(path: Path, version: str, found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Write one version's entries ("torch 2.13.0") into the table, beside the other versions'."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table = dict(sorted({**table, version: list(found)}.items()))
    path.write_text(json.dumps(table, indent=1) + "\n")
    return table


def page(framework: str, table: Mapping[str, list[dict[str, Any]]]) -> str:
    """The page of one framework: an operation a line, then how to see each fault."""
    versions = {name: found for name, found in table.items() if name.startswith(f"{framework} ")}
    wrong: dict[str, dict[str, dict[str, Any]]] = {}
    for version, found in versions.items():
        for entry in found:
            if entry["failed"]:
                wrong.setdefault(entry["operation"], {})[version.split()[1]] = entry
    lines = [
        f"# What {framework} gets wrong",
        "",
        "Made by `experiments/framework_audit.py`, which runs `check.derivatives` over the framework's own test",
        f"inputs: not typed by hand. Versions: {', '.join(name.split()[1] for name in versions)}. A row is a claim",
        "of the checker that failed, at some input; the relative error is of the number that the reproduction",
        "below prints.",
        "",
        "| operation | rows that fail | versions | relative error |",
        "|---|---|---|---|",
    ]
    for name, by_version in sorted(wrong.items()):
        last = by_version[max(by_version)]
        rows = sorted({row for entry in by_version.values() for row in entry["failed"]})
        names = ", ".join(f"`{n}`" for n in [name, *last["aliases"]])
        error = "not a number" if last["relative_error"] is None else f"{last['relative_error']:.2g}"
        lines.append(f"| {names} | {', '.join(rows)} | {', '.join(by_version)} | {error} |")
    without = sorted({e["operation"] for found in versions.values() for e in found if not e["failed"]})
    if without:
        lines += [
            "",
            "Without any second derivative, and saying so: " + ", ".join(f"`{n}`" for n in without) + ".",
        ]
    lines += ["", "## Reproductions"]
    for name, by_version in sorted(wrong.items()):
        last = by_version[max(by_version)]
        lines += ["", f"`{name}`, {framework} {max(by_version)}:", ""]
        lines += ["```python", last["reproduction"], "```", "```text", last["output"], "```"]
    return "\n".join(lines) + "\n"
