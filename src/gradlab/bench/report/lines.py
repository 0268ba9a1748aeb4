"""Any record as tables: a line a row and variant, its keys on the left and what was measured on the right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradlab.bench.profiling import si

NONE = "–"  # not measured, or not said because a check failed
MOST = 200  # lines of a table; the rest stays in the file
WRONG = ("wrong", "failed", "refuted")
SPEEDS = (
    "seconds",
    "gradients",
    "ratio",
    "of_forming",
    "ratio_to_best",
    "flops_per_s",
    "bytes_per_s",
    "medians",
)


@dataclass(frozen=True)
class Cell:
    """What a reader sees, and what the column is sorted by.

    Attributes:
        text: As it is read.
        key: A number or a string.
        mark: "right", "wrong", "skipped" or "": how it is coloured.
        span: Low, middle, high of a ratio, drawn beside it.
        under: More of it, in small letters below.
        less_is_better: Whether that ratio is coloured, green below one.
    """

    text: str
    key: float | str = ""
    mark: str = ""
    span: tuple[float, float, float] | None = None
    under: str = ""
    less_is_better: bool = False

    @property
    def whole(self) -> str:
        """All that it says."""
        return f"{self.text} ({self.under})" if self.under else self.text

    @property
    def numeric(self) -> bool:
        """Whether it is aligned to the right."""
        return not isinstance(self.key, str)


@dataclass
class Table:
    """Rows under heads; `note` says what they mean."""

    heads: list[str]
    rows: list[list[Cell]]
    note: str = ""
    title: str = ""

    def numeric(self, column: int) -> bool:
        """Whether every cell that says something is a number."""
        cells = [row[column] for row in self.rows if row[column].text != NONE]
        return bool(cells) and all(cell.numeric for cell in cells)


@dataclass
class Line:
    """One variant of one row: what it is, and what was measured of it."""

    keys: dict[str, Any]
    variant: str
    measures: dict[str, Any] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        """Whether nothing says that its check failed."""
        return not failed({**self.keys, **self.measures})


def failed(row: dict[str, Any]) -> bool:
    """Whether a row says that its own check failed."""
    error = row.get("error")
    wrong = isinstance(error, float) and not math.isfinite(error)
    return wrong or row.get("passed") is False or str(row.get("verdict")) in WRONG


def is_speed(name: str) -> bool:
    """Whether a number of this name is a speed, which a failed check takes away."""
    return name in SPEEDS or name.endswith(("_s", "_us", "_ms")) or name.startswith("seconds")


def lines(rows: Iterable[dict[str, Any]]) -> list[Line]:
    """A line for every variant of every row; where there are no variants, a line a row."""
    found: list[Line] = []
    for row in rows:
        keys = {k: v for k, v in row.items() if not isinstance(v, (dict, list))}
        spans = {k: v for k, v in row.items() if isinstance(v, (list, tuple)) and is_span(v)}
        grouped = {k: v for k, v in row.items() if isinstance(v, dict)}
        inner = grouped.pop("variants", {})
        if not all(isinstance(v, dict) for v in inner.values()):
            inner = {}
        wide = {k: v for k, v in grouped.items() if all(_measure(x) for x in v.values())}
        names = dict.fromkeys([*inner, *(name for values in wide.values() for name in values)])
        if not names:
            found.append(Line(keys, "", dict(spans)))
            continue
        for name in names:
            measures = {k: v for k, v in inner.get(name, {}).items() if _measure(v)}
            measures |= {k: values[name] for k, values in wide.items() if name in values}
            found.append(Line(keys, str(name), measures))
        found[-len(names)].measures |= {f"{k} of the row": v for k, v in spans.items()}
    return found


def _measure(value: Any) -> bool:
    return value is None or isinstance(value, (int, float, str)) or is_span(value)


def is_span(value: Any) -> bool:
    """Whether this is a ratio with its bounds, or a value with its uncertainty."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)
        and value[1] <= value[0] <= value[2]
    )


def tabulate(found: Sequence[Line], title: str = "", note: str = "") -> Table:
    """The lines as a table: keys, variant, measures; no speed where a check failed."""
    keys = list(dict.fromkeys(k for line in found for k in line.keys))
    measures = list(dict.fromkeys(k for line in found for k in line.measures))
    variant = ["variant"] if any(line.variant for line in found) else []
    rows = []
    for line in found[:MOST]:
        shown = lambda name, value: cell(name, value if line.right or not is_speed(name) else None)
        row = [shown(k, line.keys.get(k)) for k in keys]
        row += [Cell(line.variant, line.variant) for _ in variant]
        rows.append(row + [shown(k, line.measures.get(k)) for k in measures])
    if len(found) > MOST:
        note = f"{note} The first {MOST} of {len(found)} lines.".strip()
    heads = [head(name) for name in (*keys, *variant, *measures)]
    return Table(heads, rows, note, title)


def head(name: str) -> str:
    """A column's head in words."""
    known = {
        "seconds": "time",
        "median_s": "time",
        "spread_s": "spread",
        "first_s": "first call",
        "bytes": "memory",
        "gradients": "in gradients",
        "ratio_to_best": "ratio to the best by hand",
        "verdict": "check",
        "passed": "check",
    }
    words = known.get(name, name.replace("_", " "))
    return words[:-2] if words.endswith(" s") else words


def cell(name: str, value: Any) -> Cell:
    """A value, as its name says that it is read."""
    if value is None:
        return Cell(NONE)
    if isinstance(value, bool) or name == "verdict":
        return _verdict(value)
    if is_span(value):
        return span(*value)
    if isinstance(value, (int, float)):
        return Cell(number(name, value), float(value) if math.isfinite(value) else math.inf)
    return Cell(str(value), str(value))


def _verdict(value: Any) -> Cell:
    bad = value is False or str(value) in WRONG
    words = (
        {True: "passed", False: "failed"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    )
    return Cell(
        ("✗ " if bad else "✓ " if words in ("passed", "right", "confirmed") else "") + words,
        words,
        "wrong" if bad else "right" if words in ("passed", "right", "confirmed") else "",
    )


def span(middle: float, low: float, high: float) -> Cell:
    """A ratio with its bounds."""
    key = middle if math.isfinite(middle) else math.inf
    return Cell(_short(middle), key, span=(low, middle, high), under=f"{_short(low)} to {_short(high)}")


def number(name: str, value: float) -> str:
    """With its unit, to three digits."""
    if not math.isfinite(value):
        return "not finite"
    if name in ("seconds", "medians") or (name.endswith("_s") and not name.endswith("per_s")):
        return si(value, "s")
    if name.endswith("_us"):
        return si(value / 1e6, "s")
    if name == "bytes" or name.endswith("_bytes"):
        return si(value, "B")
    if "error" in name or "uncertainty" in name:
        return f"{value:.1e}" if value else "0"
    return _short(value) if isinstance(value, float) else str(value)


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
