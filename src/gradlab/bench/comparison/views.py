"""A record of the comparison as tables for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradlab.bench.profiling import si

Table = tuple[str, tuple[str, ...], Sequence[tuple[Any, ...]]]  # title, heads, rows


def tables(record: dict[str, Any]) -> list[Table]:
    """Every table of a record."""
    return [agreement(record), training(record), latency(record)]


def agreement(record: dict[str, Any]) -> Table:
    """How far the losses of 50 steps are apart."""
    rows = [
        (row["task"], row["dtype"], " and ".join(row["pair"]), f"{row['largest']:.1e}")
        for row in record["agreement"]
    ]
    return (
        "Losses of 50 steps from the same weights, largest relative difference",
        ("task", "dtype", "between", "apart"),
        rows,
    )


def training(record: dict[str, Any]) -> Table:
    """What was learned, and what it took."""
    step = {(row["task"], row["column"]): row for row in record["steps"]}
    rows = []
    for row in record["training"]:
        found = step[row["task"], row["column"]]
        rows.append(
            (
                row["task"],
                row["column"],
                si(found["seconds"]["median"], "s"),
                within(found["ratio"]),
                f"{row['total_s']:.1f} s for {row['steps']}",
                "" if row["compile_s"] is None else f"{row['compile_s']:.1f} s",
                size(found["bytes"]),
                "not available" if row["utilisation"] is None else f"{row['utilisation']:.0f} %",
                f"{row['accuracy']:.3f}",
                f"{row['f1']:.3f}",
            )
        )
    heads = ("task", "framework", "a step", f"÷ {record['base']}", "all steps", "compiling", "memory")
    return "Training", (*heads, "utilisation", "accuracy", "macro F1"), rows


def latency(record: dict[str, Any]) -> Table:
    """The answer for one example."""
    rows = [
        (
            row["task"],
            row["column"],
            si(row["seconds"]["median"], "s"),
            si(row["p99"], "s"),
            within(row["ratio"]),
            f"{row['first_s']:.2f} s",
        )
        for row in record["latency"]
    ]
    return (
        "Inference, one example",
        ("task", "framework", "median", "p99", f"÷ {record['base']}", "first call"),
        rows,
    )


def within(ratio: dict[str, Any]) -> str:
    """A ratio with its bounds."""
    low, high = ratio["interval"]
    return "1" if low == high == 1 else f"{ratio['median']:.2f} ({low:.2f}–{high:.2f})"


def size(count: int | None) -> str:
    """Bytes, or that they are not known."""
    return si(count, "B")


def markdown(table: Table) -> str:
    """As GitHub shows it."""
    title, heads, rows = table
    lines = [f"### {title}", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def terminal(table: Table) -> Any:
    """As a terminal shows it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Shown

    title, heads, rows = table
    shown = Shown(*heads, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        shown.add_row(*row)
    return shown
