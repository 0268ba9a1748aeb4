"""Which charts a record's lines make: cost over whatever number was varied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gradlab.bench.profiling import si
from gradlab.bench.report import charts
from gradlab.bench.report.lines import Line, is_span, is_speed

MEASURES = {
    "seconds": ("time", lambda v: si(v, "s")),
    "median_s": ("time", lambda v: si(v, "s")),
    "gradients": ("time in gradients", lambda v: f"{v:.3g}"),
    "bytes": ("memory", lambda v: si(v, "B")),
    "error": ("error", lambda v: f"{v:.0e}" if v else "0"),
}
MOST = 18  # charts of one experiment
MOST_SERIES = 9
TELLING = 1e-4  # errors below are rounding


@dataclass(frozen=True)
class Figure:
    """A drawing and what stands above it."""

    svg: str
    title: str


def figures(found: Sequence[Line], framework: str) -> list[Figure]:
    """A chart for each measure and each setting of the words among the keys."""
    drawn = []
    measures = [m for m in MEASURES if any(_value(line.measures.get(m)) for line in found)]
    if "gradients" in measures:
        measures = [m for m in measures if not is_speed(m) or m == "gradients"]
    if not any((_value(line.measures.get("error")) or 0) > TELLING for line in found):
        measures = [m for m in measures if m != "error"]
    names = _all_series(found)
    for panel, lines in _panels(found):
        x = _varied(lines)
        for measure in measures if x else ():
            series = _series(lines, x, measure)
            if min(len(names), 2) <= len(series) <= MOST_SERIES:
                words, unit = MEASURES[measure]
                title = " · ".join(word for word in (framework, *panel, words) if word)
                colours = {name: i for i, name in enumerate(names)}
                name = x.replace("_", " ")
                drawn.append(
                    Figure(charts.lines(series, name, unit, colours, f"{title} against {name}"), title)
                )
    return drawn[:MOST]


def _panels(found: Sequence[Line]) -> Iterator[tuple[tuple[str, ...], list[Line]]]:
    """Lines of one setting; a variant "kind: name" is one called name in a panel called kind."""
    words = [
        key
        for key in dict.fromkeys(k for line in found for k in line.keys)
        if key not in ("verdict", "best_by_hand")
        and any(isinstance(line.keys.get(key), str) for line in found)
    ]
    panels: dict[tuple[str, ...], list[Line]] = {}
    for line in found:
        kind, _, name = line.variant.rpartition(": ")
        panel = (*(str(line.keys.get(word, "")) for word in words), kind)
        panels.setdefault(panel, []).append(Line(line.keys, name, line.measures))
    yield from panels.items()


def _varied(lines: Sequence[Line]) -> str:
    """The number that takes the most values: at least three."""
    counts = {}
    for key in dict.fromkeys(k for line in lines for k in line.keys):
        values = {line.keys.get(key) for line in lines}
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        if numbers and not is_speed(key) and "error" not in key:
            counts[key] = len(values)
    best = max(counts, key=lambda key: counts[key], default="")
    alone = all(count == 1 for key, count in counts.items() if key != best)
    return best if best and counts[best] >= 3 and alone else ""


def _series(lines: Sequence[Line], x: str, measure: str) -> dict[str, list[tuple[float, float]]]:
    """Of each variant the points whose check did not fail."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        value = _value(line.measures.get(measure))
        if value and (line.right or not is_speed(measure)):
            found.setdefault(line.variant, []).append((float(line.keys[x]), value))
    return {name: sorted(points) for name, points in found.items() if len(points) > 2}


def _all_series(found: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line.variant.rpartition(": ")[2] for line in found))


def _value(given: Any) -> float | None:
    """A positive number, or the middle of a span."""
    value = given[0] if is_span(given) else given
    return float(value) if isinstance(value, (int, float)) and value > 0 and value < float("inf") else None
