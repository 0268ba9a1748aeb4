"""What the page holds, in order: the machine, claims, operations, correctness, and every experiment."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradlab.bench.report import operations
from gradlab.bench.report.figures import Figure, figures
from gradlab.bench.report.lines import Cell, Table, cell, lines, number, tabulate
from gradlab.bench.report.records import Record, by_name, newest

QUESTIONS = {
    "hvp_scaling": (
        "Scaling of second derivatives",
        "Cost against parameters, directions, batch, order and mode.",
    ),
    "jacobian_scaling": (
        "Scaling of Jacobians",
        "Cost by forward and by reverse against inputs and outputs.",
    ),
    "framework_comparison": ("jax against torch", "Sayings about the two frameworks, measured."),
    "gradbench": ("GradBench", "The public suite of differentiation benchmarks, against the plain way."),
    "per_example_cost": ("Derivatives of each example", "Gradients, norms and clipped sums, one by one."),
    "meta_cost": ("Meta-gradients", "Time, memory and error of every method."),
    "implicit_regression": (
        "Implicit differentiation",
        "Hyperparameter gradients: implicit, unrolled, differenced.",
    ),
    "ode_speed": ("Differential equations", "Solving and differentiating, beside other libraries."),
    "custom_rule_overhead": ("Rules of one's own", "What a rule costs beside a bare one of the framework."),
    "profile_resolution": (
        "Can the clock be believed?",
        "Exact counts, true rates, a slow-down of 5 % seen.",
    ),
    "checkers": ("Derivative checkers", "Wrong derivatives found and right ones accused."),
    "mutants": ("Mutants of torch's rules", "Small changes to backward rules, found or not."),
    "framework_audit": ("Audit of the frameworks", "Derivatives that the frameworks get wrong."),
    "dp_sgd_digits": ("Private training", "Accuracy of private training on digits."),
    "influence_digits": ("Influence of examples", "Planted wrong labels found."),
    "maml_sinusoid": ("MAML on sinusoids", "Error after steps of adaptation."),
    "maml_digits": ("MAML on digits", "Accuracy after steps of adaptation."),
    "hyperparameters": ("Learned weights of examples", "Test accuracy against a grid search."),
}


@dataclass
class Image:
    """A figure that an experiment wrote, inside the page."""

    source: str
    title: str


@dataclass
class Section:
    """One heading of the page.

    Attributes:
        key: The anchor.
        title: As the contents name it.
        lead: One sentence.
        runs: Where its numbers come from, a line each.
        blocks: Tables, images, and lists of figures.
    """

    key: str
    title: str
    lead: str
    runs: list[str] = field(default_factory=list)
    blocks: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Tile:
    """A number at the top of the page."""

    value: str
    label: str
    mark: str = ""


def sections(records: Sequence[Record], folder: Path) -> list[Section]:
    """Everything that the newest records say."""
    chosen = newest(list(records))
    found = [_claims(chosen)] if any("claims" in record.body for record in chosen) else []
    rest = []
    for name, of in by_name(chosen):
        if name == "operations":
            found += _operations(of)
        elif name == "verify":
            found.append(_verify(of))
        else:
            rest.append(_experiment(name, of, folder))
    known = list(QUESTIONS)
    rest.sort(key=lambda s: known.index(s.key) if s.key in known else len(known))
    return found + rest


def run(record: Record) -> str:
    """Where a record's numbers come from, in one line."""
    e = record.environment
    versions = e.get("versions", {})
    frameworks = [record.framework] if record.framework in versions else ["jax", "torch"]
    parts = [f"{name} {versions[name]}" for name in frameworks if name in versions]
    parts += [str(record.config[key]) for key in ("device", "dtype", "preset") if record.config.get(key)]
    commit = str(e.get("commit") or "")[:8]
    parts.append(f"{commit}{' with changes' if e.get('dirty') else ''}" if commit else "")
    parts.append(str(e.get("time", ""))[:10])
    return " · ".join(part for part in parts if part)


def machines(records: Sequence[Record]) -> Table:
    """Each machine and set of versions once."""
    seen: dict[tuple[str, ...], list[str]] = {}
    for record in newest(list(records)):
        e = record.environment
        versions = ", ".join(f"{name} {v}" for name, v in e.get("versions", {}).items() if name != "gradlab")
        place = str(e.get("accelerator") or e.get("processor") or "unknown")
        key = (place, str(e.get("cores", "")), str(e.get("system", "")), str(e.get("python", "")), versions)
        seen.setdefault(key, []).append(str(e.get("time", ""))[:10])
    rows = [
        [*(Cell(part, part) for part in key), Cell(f"{min(days)} to {max(days)}", max(days))]
        for key, days in seen.items()
    ]
    return Table(["device", "cores", "system", "Python", "versions", "measured"], rows)


def tiles(records: Sequence[Record]) -> list[Tile]:
    """The page in four to six numbers."""
    chosen, found = newest(list(records)), []
    cases = operations.cases([r for r in chosen if r.name == "operations"])
    run = [case for case in cases if "skipped" not in case.row]
    if run:
        good = sum(operations.right(case.ours) for case in run)
        found.append(Tile(f"{good} of {len(run)}", "operations checked and right", _mark(good == len(run))))
    for framework in ("jax", "torch"):
        if ratio := operations.typical(cases, framework):
            found.append(Tile(f"{ratio:.2f}", f"of hand-written {framework}'s time (median)"))
    rows = [row for r in chosen if r.name == "verify" for row in [*r.body["rows"], *r.body["agreement"]]]
    if rows:
        passed = sum(row["passed"] is True for row in rows)
        found.append(Tile(f"{passed} of {len(rows)}", "derivative checks passed", _mark(passed == len(rows))))
    if claims := [claim for r in chosen for claim in r.body.get("claims", [])]:
        held = sum(claim.get("verdict") == "confirmed" for claim in claims)
        found.append(Tile(f"{held} of {len(claims)}", "claims confirmed here"))
    found.append(Tile(str(len(chosen)), "runs on this page"))
    return found


def _mark(good: bool) -> str:
    return "right" if good else "wrong"


def _claims(records: Sequence[Record]) -> Section:
    """What is said of the frameworks, and what was measured."""
    of = [record for record in records if "claims" in record.body]
    rows = []
    for record in of:
        for claim in record.body["claims"]:
            verdict = str(claim.get("verdict", ""))
            mark = {"confirmed": "right", "refuted": "wrong"}.get(verdict, "skipped")
            value, low, high = (claim.get(key) for key in ("value", "low", "high"))
            said = lambda v: number("", v) if isinstance(v, (int, float)) else str(v)
            bounds = f"{said(low)} to {said(high)}" if low is not None and high is not None else "–"
            shown = cell("value", value)
            sign = {"right": "✓ ", "wrong": "✗ "}.get(mark, "")
            rows.append(
                [
                    Cell(str(claim.get("claim", "")), str(claim.get("claim", ""))),
                    Cell(sign + verdict, verdict, mark),
                    shown,
                    Cell(bounds, low if isinstance(low, (int, float)) else ""),
                    Cell(str(claim.get("measured", "")), str(claim.get("measured", ""))),
                ]
            )
    table = Table(["claim", "verdict", "value", "bounds", "measured"], rows)
    lead = "What is said of the two frameworks, and what this machine says to it."
    return Section("claims", "Claims", lead, [run(record) for record in of], [table])


def _operations(records: Sequence[Record]) -> list[Section]:
    """Each operation against hand-written code, then across frameworks and modes; a section a device."""
    found = []
    for device in dict.fromkeys(str(record.config.get("device", "")) for record in records):
        of = [record for record in records if str(record.config.get("device", "")) == device]
        runs, cases = [run(record) for record in of], operations.cases(of)
        suffix = f"-{device}" if device != "cpu" else ""
        on = f" on {device}" if device != "cpu" else ""
        hand = Section(
            f"operations{suffix}",
            f"Against hand-written code{on}",
            "Every operation beside the same thing written by hand in the framework, checked first.",
            runs,
            [operations.against_hand(cases)],
        )
        if (held := operations.memory(cases)).rows:
            hand.blocks.append(held)
        if costs := _overheads(of):
            hand.blocks.append(costs)
        both = Section(
            f"frameworks{suffix}",
            f"jax and torch, eager and compiled{on}",
            "The time of gradlab's own call, by framework and mode.",
            runs,
            [operations.side_by_side_figures(cases), operations.side_by_side(cases)],
        )
        found += [hand, both]
    return found


def _overheads(records: Sequence[Record]) -> Table | None:
    rows = [
        [Cell(record.framework, record.framework), Cell(key.removesuffix("_us"), key), cell(key, value)]
        for record in records
        for row in record.body.get("rows", [])
        for key, value in row.get("overhead", {}).items()
    ]
    title = "What a call costs before the framework's own work, for a tree of ten leaves"
    return Table(["framework", "part", "time"], rows, title=title) if rows else None


def _verify(records: Sequence[Record]) -> Section:
    """A line an operation, framework and dtype: how many problems, and the largest error."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        for row in record.body["rows"]:
            groups.setdefault((row["operation"], row["framework"], row["dtype"]), []).append(row)
        for row in record.body["agreement"]:
            groups.setdefault((row["operation"], "jax = torch", "float64"), []).append(row)
    rows = []
    for key, of in groups.items():
        passed = sum(row["passed"] is True for row in of)
        good = passed == len(of)
        times = [row["gradients"] for row in of if row["passed"] is True and row.get("gradients")]
        rows.append(
            [
                *(Cell(part, part) for part in key),
                Cell(f"{'✓' if good else '✗'} {passed} of {len(of)}", passed / len(of), _mark(good)),
                cell("error", max(float(row["error"]) for row in of)),
                cell("gradients", sorted(times)[len(times) // 2] if times and good else None),
            ]
        )
    note = "Errors are relative, against extrapolated differences in float64; times in gradients, the median problem."
    heads = ["operation", "framework", "dtype", "problems right", "largest error", "in gradients"]
    lead = "Every operation on real models and closed forms."
    return Section("verify", "Correctness", lead, [run(r) for r in records], [Table(heads, rows, note)])


def _experiment(name: str, records: Sequence[Record], folder: Path) -> Section:
    """Charts over what was varied, and everything as tables."""
    title, lead = QUESTIONS.get(name, (name.replace("_", " ").capitalize(), ""))
    section = Section(
        name, title, lead, [run(record) for record in sorted(records, key=lambda record: record.kind)]
    )
    drawn: list[Figure] = []
    tables: list[Table] = []
    for record in sorted(records, key=lambda record: record.kind):
        for key, value in record.body.items():
            if key == "claims":
                continue
            heading = " · ".join(part for part in (record.framework, "" if key == "rows" else key) if part)
            if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
                found = lines(value)
                drawn += figures(found, heading)
                tables.append(tabulate(found, heading))
            elif isinstance(value, dict) and value:
                tables.append(_of_dict(value, heading))
        if numbers := {k: v for k, v in record.body.items() if not isinstance(v, (dict, list))}:
            tables.append(_of_dict(numbers, record.framework))
    picture = folder / f"{name}.png"
    if drawn:
        section.blocks.append(drawn)
    elif picture.exists():
        data = base64.b64encode(picture.read_bytes()).decode()
        section.blocks.append(Image(f"data:image/png;base64,{data}", f"{title}: {lead}"))
    section.blocks += [table for table in tables if table.rows]
    return section


def _of_dict(value: dict[str, Any], title: str) -> Table:
    """Names with one number each, or with several."""
    rows: list[dict[str, Any]] = []
    for name, found in value.items():
        if isinstance(found, dict):
            rows.append({"name": name, **{k: len(v) if isinstance(v, list) else v for k, v in found.items()}})
        elif not isinstance(found, list):
            rows.append({"name": name, title.rpartition(" · ")[2] or "value": found})
        else:
            rows.append(
                {
                    "name": name,
                    "value": ", ".join(number("", x) if isinstance(x, float) else str(x) for x in found[:8]),
                }
            )
    flat = [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in rows]
    return tabulate(lines(flat), title)
