"""Small charts as SVG text: lines with their names at their ends, and pairs of points along a scale.

Colours are classes that the page's style sheet gives, so that one drawing serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from gradlab.bench.profiling import si

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 54, 142, 12, 40
APART = 13  # between two names
LETTER = 6.0  # a letter's width
EVEN = 1.05  # a ratio whose bounds leave these out is coloured

Points = Sequence[tuple[float, float]]


class Scale:
    """From values to places, by logarithms where they span more than a factor of eight."""

    def __init__(self, values: Sequence[float], start: float, end: float):
        low, high = min(values), max(values)
        self.log = low > 0 and high > 8 * low
        if not self.log and low >= 0 and low < 0.6 * high:
            low = 0.0
        if low == high:
            low, high = (low / 2, high * 2) if low > 0 else (low - 1, high + 1)
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        """The place of a value."""
        of = math.log if self.log else float
        share = (of(value) - of(self.low)) / (of(self.high) - of(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers between the ends: three to six."""
        if not self.log:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / 3))
            step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (step * m) <= 5)
            first = math.ceil(self.low / step - 1e-9)
            return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        inside = lambda found: [t for t in found if 0.999 * self.low <= t <= 1.001 * self.high]
        decades = inside(10.0**p for p in powers)
        if len(decades) >= 3:
            return decades[:: math.ceil(len(decades) / 6)]
        fine = inside(m * 10.0**p for p in powers for m in (1, 2, 5))
        return fine if len(fine) <= 6 else inside(m * 10.0**p for p in powers for m in (1, 3))


def lines(
    series: Mapping[str, Points], x: str, y: Callable[[float], str], colours: Mapping[str, int], title: str
) -> str:
    """One line a series over a shared x; `y` writes a value with its unit."""
    points = [p for line in series.values() for p in line]
    across = Scale([p[0] for p in points], LEFT, WIDTH - RIGHT)
    up = Scale([p[1] for p in points], HEIGHT - BOTTOM, TOP)
    drawn = [_grid(across, up, x, y)]
    for name, line in series.items():
        places = [(across(a), up(b)) for a, b in line]
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
        drawn.append(f'<g class="c{colours[name]}"><path class="line" d="{path}"/>')
        drawn += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>' for a, b in places]
        drawn.append("</g>")
    ends = {name: (across(line[-1][0]), up(line[-1][1])) for name, line in series.items()}
    drawn += _names(ends, colours)
    return _svg(WIDTH, HEIGHT, drawn, title)


def _grid(across: Scale, up: Scale, x: str, y: Callable[[float], str]) -> str:
    parts = []
    for tick in up.ticks():
        at = f"{up(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at}" dy="4" text-anchor="end">{y(tick)}</text>')
    for tick in across.ticks():
        at = f"{across(tick):.1f}"
        parts.append(
            f'<line class="tickmark" x1="{at}" x2="{at}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>'
        )
        parts.append(
            f'<text class="tick" x="{at}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{counted(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x)}</text>')
    return "".join(parts)


def _names(ends: Mapping[str, tuple[float, float]], colours: Mapping[str, int]) -> list[str]:
    """Each at the end of its line, moved apart where they would lie on each other."""
    order = sorted(ends, key=lambda name: ends[name][1])
    places = [ends[name][1] for name in order]
    for _ in range(200):
        for i in range(len(places) - 1):
            overlap = APART - (places[i + 1] - places[i])
            if overlap > 0.01:
                places[i] -= overlap / 2
                places[i + 1] += overlap / 2
        lift = max(TOP + 2 - places[0], 0) + min(HEIGHT - BOTTOM + 6 - places[-1], 0)
        if abs(lift) > 0.01:
            places = [p + lift for p in places]
    found, right = [], WIDTH - RIGHT
    for name, place in zip(order, places, strict=True):
        x, y = ends[name]
        text = shortened(name, (RIGHT - 18) / LETTER)
        found.append(f'<path class="leader" d="M{x + 4:.1f} {y:.1f}L{right + 12:.1f} {place:.1f}"/>')
        found.append(
            f'<text class="name t{colours[name]}" x="{right + 15}" y="{place:.1f}" dy="4">{escape(text)}</text>'
        )
    return found


def pairs(
    rows: Sequence[tuple[str, Mapping[str, float]]],
    unit: Callable[[float], str],
    colours: Mapping[str, int],
    title: str,
) -> str:
    """A scale a row, a point a name on each, with its value; the row's label above it."""
    step, top = 40, 8
    height = top + step * len(rows) + 22
    scale = Scale([v for _, values in rows for v in values.values()], 50, WIDTH - 56)
    drawn = []
    for tick in scale.ticks():
        at = f"{scale(tick):.1f}"
        drawn.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{top}" y2="{height - 20}"/>')
        drawn.append(f'<text class="tick" x="{at}" y="{height - 6}" text-anchor="middle">{unit(tick)}</text>')
    for i, (label, values) in enumerate(rows):
        y = top + step * i + 27
        drawn.append(f'<text class="label" x="2" y="{y - 13}">{escape(shortened(label, 64))}</text>')
        ordered = sorted(values, key=lambda name: values[name])
        places = {name: scale(values[name]) for name in ordered}
        first, last = ordered[0], ordered[-1]
        drawn.append(
            f'<line class="between" x1="{places[first]:.1f}" x2="{places[last]:.1f}" y1="{y}" y2="{y}"/>'
        )
        for name in ordered:
            drawn.append(f'<circle class="c{colours[name]}" cx="{places[name]:.1f}" cy="{y}" r="4.5"/>')
        ends = [(first, -9, "end"), (last, 9, "start")] if first != last else [(last, 9, "start")]
        for name, shift, anchor in ends:
            drawn.append(
                f'<text class="value t{colours[name]}" x="{places[name] + shift:.1f}" y="{y + 4}" '
                f'text-anchor="{anchor}">{unit(values[name])}</text>'
            )
    return _svg(WIDTH, height, drawn, title)


def interval(low: float, middle: float, high: float, less_is_better: bool) -> str:
    """A ratio with its bounds on a scale from a half to two; the mark in the middle is one."""
    width, height = 72, 14
    place = lambda value: 2 + (width - 4) * (math.log2(min(max(value, 0.5), 2.0)) + 1) / 2
    better = "better" if high < 1 / EVEN else "worse" if low > EVEN else "even"
    better = better if less_is_better else "even"
    clipped = "" if 0.5 <= middle <= 2 else " clipped"
    drawn = [
        f'<line class="one" x1="{place(1)}" x2="{place(1)}" y1="1" y2="{height - 1}"/>',
        f'<line class="bounds {better}" x1="{place(low):.1f}" x2="{place(high):.1f}" y1="7" y2="7"/>',
        f'<circle class="{better}{clipped}" cx="{place(middle):.1f}" cy="7" r="3.4"/>',
    ]
    body = "".join(drawn)
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg class="spark" {size} aria-hidden="true">{body}</svg>'


def counted(value: float) -> str:
    """A number of things, short: 512, 10k, 1M."""
    if abs(value) < 10_000 and value == round(value):
        return f"{value:.0f}"
    return si(value, "").strip().replace(" ", "") if abs(value) >= 1 else f"{value:.3g}"


def shortened(text: str, letters: float) -> str:
    """Cut to so many letters."""
    most = int(letters)
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
