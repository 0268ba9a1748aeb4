"""What `gradlab bench` found: each operation against hand-written code, jax and torch, eager and compiled."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradlab.bench.profiling import si
from gradlab.bench.report import charts
from gradlab.bench.report.figures import Figure
from gradlab.bench.report.lines import NONE, WRONG, Cell, Table, cell, span
from gradlab.bench.report.records import Record

TOLERANCE = 2e-3  # what the suite holds a result to
SHADES = {"jax": 0, "torch eager": 4, "torch compiled": 1, "jax eager": 5}


@dataclass(frozen=True)
class Case:
    """One operation on one problem in one mode, and what was found of it."""

    framework: str
    device: str
    row: dict[str, Any]
    bytes: dict[str, float]

    @property
    def ours(self) -> dict[str, Any]:
        """gradlab's call."""
        return dict(self.row.get("variants", {}).get("gradlab", {}))

    @property
    def hand(self) -> dict[str, Any]:
        """The fastest right call by hand."""
        return dict(self.row.get("variants", {}).get(self.row.get("best_by_hand"), {}))

    @property
    def seconds(self) -> float | None:
        """Of gradlab's call, where it is right."""
        return self.ours.get("median_s") if right(self.ours) else None

    @property
    def ratio(self) -> list[float] | None:
        """Of gradlab's time to that of the best by hand, where both are right."""
        return self.row.get("ratio_to_best") if right(self.ours) and right(self.hand) else None

    @property
    def series(self) -> str:
        """What it is called among others of its operation."""
        mode = self.row.get("mode", "")
        return {("jax", "compiled"): "jax", ("jax", "eager"): "jax eager"}.get(
            (self.framework, mode), f"{self.framework} {mode}"
        )


def right(variant: dict[str, Any]) -> bool:
    """Whether its result was compared and found right."""
    error = variant.get("error")
    known = isinstance(error, (int, float)) and math.isfinite(error) and error <= TOLERANCE
    return known and variant.get("verdict") not in WRONG


def cases(records: Iterable[Record]) -> list[Case]:
    """Every case of every record."""
    found = []
    for record in records:
        rows = record.body.get("rows", [])
        held = {  # in older records beside the rows
            (row["problem"], row["operation"]): row["bytes"] for row in rows if "bytes" in row
        }
        for row in rows:
            if {"variants", "skipped", "failed"} & row.keys():
                mode = row.get("mode")
                taken = (record.framework, mode) in (("jax", "compiled"), ("torch", "eager"))
                sizes = held.get((row["problem"], row["operation"]), {}) if taken else {}
                inside = {name: v.get("bytes") for name, v in row.get("variants", {}).items()}
                sizes = {name: size for name, size in inside.items() if size is not None} or sizes
                found.append(Case(record.framework, str(record.config.get("device", "")), row, sizes))
    return found


def against_hand(found: Sequence[Case]) -> Table:
    """One line a case."""
    heads = [
        "problem", "operation", "", "check", "gradlab", "by hand", "gradlab / by hand", "in gradients", "first call",
    ]  # fmt: skip
    rows = []
    for case in found:
        row, ours, hand = case.row, case.ours, case.hand
        fast, theirs = right(ours), right(hand)
        speed = lambda name, of, known: cell(name, of.get(name) if known else None)
        best = str(row.get("best_by_hand", ""))
        rows.append(
            [
                Cell(row["problem"], row["problem"]),
                Cell(row["operation"], row["operation"]),
                Cell(case.series, case.series),
                check(row, ours),
                speed("median_s", ours, fast),
                replace(speed("median_s", hand, theirs), under=best),
                replace(span(*case.ratio), less_is_better=True) if case.ratio else Cell(NONE),
                speed("gradients", ours, fast),
                speed("first_s", ours, fast),
            ]
        )
    note = (
        "Time is the median of a call, interleaved with its rivals; the ratio has its quartiles, round by round: left "
        "of the mark gradlab is the faster, and it is coloured where they leave out 0.95 to 1.05. In gradients: per "
        "direction, in gradients of the same framework and mode. A call whose result is wrong shows no speed; below "
        "the time by hand stands how it is made."
    )
    return Table(heads, rows, note)


def memory(found: Sequence[Case]) -> Table:
    """Peak beyond the inputs, where it was measured: gradlab's and each rival's."""
    rows = []
    for case in found:
        ours = case.bytes.get("gradlab")
        for name, size in case.bytes.items():
            if name != "gradlab" and right(case.ours) and right(case.row["variants"].get(name, {})):
                keys = (case.row["problem"], case.row["operation"], case.series)
                over = Cell(f"{ours / size:.2f}", ours / size) if ours and size else Cell(NONE)
                sizes = (cell("bytes", ours), Cell(name, name), cell("bytes", size), over)
                rows.append([*(Cell(key, key) for key in keys), *sizes])
    heads = ["problem", "operation", "", "gradlab", "by hand", "its memory", "gradlab / by hand"]
    return Table(heads, rows, "Temporaries and results held at once, beyond the inputs.", "Peak memory")


def check(row: dict[str, Any], ours: dict[str, Any]) -> Cell:
    """What the comparison of results said."""
    if "skipped" in row:
        return Cell(f"skipped: {row['skipped']}", "skipped", "skipped")
    if "failed" in row:
        return Cell(f"✗ {row['failed']}", math.inf, "wrong")
    error = ours.get("error", math.inf)
    size = f"{error:.0e}" if error else "0"
    if right(ours):
        return Cell(f"✓ {size}", error, "right")
    return Cell(f"✗ off by {size}" if math.isfinite(error) else "✗ no result", math.inf, "wrong")


def side_by_side(found: Sequence[Case]) -> Table:
    """jax, torch eager, torch compiled."""
    heads = [
        "problem",
        "operation",
        "jax",
        "torch eager",
        "torch compiled",
        "torch / jax",
        "eager / compiled",
    ]
    rows = []
    for (problem, operation), times in _times(found).items():
        seconds = [times.get(name) for name in ("jax", "torch eager", "torch compiled")]
        torch = min((t for t in seconds[1:] if t), default=None)
        over = lambda a, b: Cell(f"{a / b:.2f}", a / b) if a and b else Cell(NONE)
        rows.append(
            [
                Cell(problem, problem),
                Cell(operation, operation),
                *(cell("seconds", t) for t in seconds),
                over(torch, seconds[0]),
                over(seconds[1], seconds[2]),
            ]
        )
    note = (
        "Each framework runs in a process of its own, so these are not interleaved: read differences below a fifth as "
        "none. jax under jit; torch / jax takes the faster of torch's modes."
    )
    return Table(heads, rows, note)


def _times(found: Sequence[Case]) -> dict[tuple[str, str], dict[str, float]]:
    times: dict[tuple[str, str], dict[str, float]] = {}
    for case in found:
        if case.seconds:
            times.setdefault((case.row["problem"], case.row["operation"]), {})[case.series] = case.seconds
    return times


def side_by_side_figures(found: Sequence[Case]) -> list[Figure]:
    """A chart a problem: the time of each operation, by framework and mode."""
    times, drawn = _times(found), []
    for problem in dict.fromkeys(name for name, _ in times):
        rows = [(operation, t) for (name, operation), t in times.items() if name == problem and len(t) > 1]
        if rows:
            title = f"time of each operation on {problem}"
            drawn.append(Figure(charts.pairs(rows, lambda v: si(v, "s"), SHADES, title), problem))
    return drawn


def typical(found: Sequence[Case], framework: str) -> float | None:
    """The median of a framework's ratios to hand-written code."""
    ratios = [case.ratio[0] for case in found if case.framework == framework and case.ratio]
    return statistics.median(ratios) if ratios else None
