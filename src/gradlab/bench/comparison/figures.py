"""A record of the comparison as one figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gradlab.bench.comparison.claims import CONFIRMED, REFUTED, UNMEASURABLE, UNRESOLVED

COLOURS = {
    "jax jit": "#1f77b4",
    "jax eager": "#9ecae1",
    "torch eager": "#e6550d",
    "torch compile": "#fdae6b",
    "flax jit": "#31a354",
    "tensorflow": "#756bb1",
    "tensorflow XLA": "#bcbddc",
}
SIDES = {"jax": "#1f77b4", "torch": "#e6550d", "flax": "#31a354", "tensorflow": "#756bb1"}
MARKS = {"gradlab": "o", "plain": "s", "reverse": "^", "autograd": "D", "loop": "v"}
VERDICTS = {CONFIRMED: "#31a354", REFUTED: "#d62728", UNRESOLVED: "#7f7f7f"}


def draw(record: dict[str, Any], path: Path) -> None:
    """Steps, latency and batches above; derivatives and claims below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(17, 14), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 2.1))
    upper, lower = parts
    above = upper.subplots(1, 3)
    left, right = lower.subplots(1, 2, width_ratios=(1, 1.1))
    bars(above[0], record["steps"], "a training step", None)
    bars(above[1], record["latency"], "inference of one example (line: 99th percentile)", "p99")
    lines(above[2], record["batches"])
    derivatives(left, record["operations"])
    forest(right, record["claims"])
    names = dict.fromkeys(row["column"] for row in record["steps"])
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in names]
    above[0].legend(handles, names, fontsize=8, ncols=2)
    of = record["environment"]
    figure.suptitle(
        f"JAX {of['versions'].get('jax', '-')} and PyTorch {of['versions'].get('torch', '-')}, "
        f"{record['config']['dtype']}, {of['processor']}, {of['cores_used']} cores",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bars(axis: Any, rows: list[dict[str, Any]], title: str, beyond: str | None) -> None:
    """Medians by task, a colour a column, with their bounds; a thin line up to what is beyond."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = list(dict.fromkeys(row["column"] for row in rows))
    width = 0.8 / len(columns)
    for row in rows:
        x = tasks.index(row["task"]) + (columns.index(row["column"]) - (len(columns) - 1) / 2) * width
        middle, (low, high) = 1e3 * row["seconds"]["median"], 1e3 * np.array(row["seconds"]["interval"])
        axis.bar(x, middle, 0.92 * width, color=COLOURS[row["column"]])
        axis.plot([x, x], [low, high], color="black", lw=1.6)
        if beyond:
            axis.plot([x, x], [middle, 1e3 * row[beyond]], color="black", lw=0.6)
    axis.set_yscale("log")
    axis.set_ylim(top=axis.get_ylim()[1] * (5 if beyond is None else 1))
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set_ylabel("ms")
    axis.set_title(title, fontsize=10)
    axis.grid(axis="y", alpha=0.3)


def lines(axis: Any, rows: list[dict[str, Any]]) -> None:
    """A step against the batch."""
    from matplotlib.ticker import LogLocator

    for name in dict.fromkeys(row["column"] for row in rows):
        found = [row for row in rows if row["column"] == name]
        sizes, times = [r["batch"] for r in found], [1e3 * r["seconds"]["median"] for r in found]
        axis.loglog(sizes, times, "o-", color=COLOURS[name], lw=1.5, ms=4)
    sizes = sorted({row["batch"] for row in rows})
    axis.set_xticks(sizes, map(str, sizes))
    axis.minorticks_off()
    axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        which(lambda value, _: f"{value:g}")
    axis.set_xlabel("examples")
    axis.set_ylabel("ms")
    axis.set_title("a training step of the MLP", fontsize=10)
    axis.grid(alpha=0.3)


def derivatives(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Every right way in the time of the fastest; a cross for a wrong one."""
    names = list(dict.fromkeys(row["operation"] for row in rows))
    for i, name in enumerate(names):
        found = [row for row in rows if row["operation"] == name]
        times = [row["seconds"]["median"] for row in found if "seconds" in row]
        for k, row in enumerate(found):
            y = i + 0.34 * (2 * (k + 0.5) / len(found) - 1)
            colour = SIDES[row["framework"]]
            if "seconds" not in row:
                axis.plot(1, y, "x", color=colour, ms=8, mew=2)
                axis.annotate(
                    "wrong" if not row.get("raises") else "refused", (1.15, y), fontsize=7, va="center"
                )
                continue
            filled = colour if row["mode"] == "compiled" else "white"
            mark = MARKS.get(row["way"], "o")
            axis.plot(row["seconds"]["median"] / min(times), y, mark, color=colour, mfc=filled, ms=6)
        axis.axhline(i + 0.5, color="0.9", lw=0.8)
    axis.set_xscale("log")
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel("time ÷ that of the fastest right way")
    axis.set_title("derivatives (filled: compiled; open: eager)", fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    for framework in dict.fromkeys(row["framework"] for row in rows):
        axis.plot([], [], "o", color=SIDES[framework], label=framework)
    for way in dict.fromkeys(row["way"] for row in rows):
        axis.plot([], [], MARKS.get(way, "o"), color="0.4", mfc="0.4", label=way)
    axis.legend(fontsize=8, loc="upper right", ncols=2)


def forest(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Every number with its bounds, in units of its threshold, coloured by its verdict."""
    for i, row in enumerate(rows):
        if row["verdict"] == UNMEASURABLE:
            axis.annotate(UNMEASURABLE, (1, i), fontsize=7, va="center", ha="center", color="0.5")
            continue
        unit = float(row["holds"].split()[-1]) or 1.0
        middle, low, high = (max(abs(v) / unit, 1e-4) for v in (row["value"], row["low"], row["high"]))
        colour = VERDICTS[row["verdict"]]
        axis.plot([max(low, 1e-3), min(high, 1e3)], [i, i], color=colour, lw=2)
        axis.plot(min(max(middle, 1e-3), 1e3), i, "o", color=colour, ms=5)
    axis.axvline(1, color="black", lw=0.8)
    axis.set_xscale("log")
    axis.set_xlim(0.8e-3, 1.25e3)
    axis.set_yticks(range(len(rows)), [row["claim"] for row in rows], fontsize=7.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("number ÷ threshold (ends: beyond)")
    axis.set_title("what people say, on this machine", fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    for name, colour in VERDICTS.items():
        axis.plot([], [], "o-", color=colour, label=name)
    axis.legend(fontsize=8, loc="upper right")
