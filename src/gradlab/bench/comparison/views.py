"""A record of the comparison as tables, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradlab.bench.profiling import si

Table = tuple[str, tuple[str, ...], Sequence[tuple[Any, ...]]]  # title, heads, rows
ABSENT = "not available"


def tables(record: dict[str, Any]) -> list[Table]:
    """Every table of a record."""
    return [
        make(record)
        for make in (claims, agreement, training, latency, batches, operations, resident, parallel)
    ]


def claims(record: dict[str, Any]) -> Table:
    """What people say, and what is so here."""
    rows = []
    for row in record["claims"]:
        number = row["reason"] if row["value"] is None else bounded(row["value"], (row["low"], row["high"]))
        rows.append((row["claim"], row["measured"], number, row["holds"], row["verdict"]))
    return "Claims, on this machine", ("claim", "measured", "number", "holds if", "verdict"), rows


def agreement(record: dict[str, Any]) -> Table:
    """How far the losses are apart."""
    rows = [
        (row["task"], row["dtype"], " and ".join(row["pair"]), str(row["steps"]), f"{row['largest']:.1e}")
        for row in record["agreement"]
    ]
    title = "Losses from the same weights: largest relative difference"
    return title, ("task", "dtype", "between", "steps", "apart"), rows


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
                f"{row['total_s']:.1f} s ({row['steps']})",
                "" if row["compile_s"] is None else f"{row['compile_s']:.1f} s",
                si(found["bytes"], "B"),
                ABSENT if row["utilisation"] is None else f"{row['utilisation']:.0f} %",
                f"{row['accuracy']:.3f}",
                f"{row['f1']:.3f}",
            )
        )
    rows += [("all", name, reason, *[""] * 7) for name, reason in record["missing"].items()]
    heads = ("task", "framework", "a step", f"÷ {record['base']}", "in all (steps)", "compiling", "memory")
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
    heads = ("task", "framework", "median", "p99", f"÷ {record['base']}", "first call")
    return "Inference, one example", heads, rows


def batches(record: dict[str, Any]) -> Table:
    """A training step against its examples."""
    sizes = sorted({row["batch"] for row in record["batches"]})
    columns = dict.fromkeys(row["column"] for row in record["batches"])
    found = {(row["column"], row["batch"]): row["seconds"]["median"] for row in record["batches"]}
    rows = [(name, *(si(found[name, size], "s") for size in sizes)) for name in columns]
    return "A training step of the MLP, by examples", ("framework", *map(str, sizes)), rows


def operations(record: dict[str, Any]) -> Table:
    """Derivatives: whether they are right, and what they cost."""
    rows = []
    for row in record["operations"]:
        error = max((e for e in row["error"].values() if e is not None), default=None)
        said = "refused" if "raises" in row else "right" if row["right"] else "WRONG"
        said = "not checked" if said == "right" and error is None else said  # nothing to hold it against
        timed = "seconds" in row
        rows.append(
            (
                row["operation"],
                f"{row['framework']}, {row['way']}, {row['mode']}",
                f"{said}" + ("" if error is None else f" ({error:.0e})"),
                si(row["seconds"]["median"], "s") if timed else "",
                within(row["ratio"]) if timed else "",
                f"{row['first_s']:.2f} s" if timed else "",
                si(row["bytes"], "B") if timed else "",
            )
        )
    heads = (
        "derivative",
        "framework, way, mode",
        "answer (error)",
        "time",
        "÷ the first",
        "first call",
        "memory",
    )
    return "Derivatives", heads, rows


def resident(record: dict[str, Any]) -> Table:
    """What the processes held, the framework itself and its compiler included."""
    rows = [(name, si(count, "B")) for name, count in record["resident"].items()]
    return "Most resident memory of a whole process, before the derivatives", ("framework", "memory"), rows


def parallel(record: dict[str, Any]) -> Table:
    """Over several devices."""
    alone = {
        r["framework"]: r["seconds"]["median"]
        for r in record["parallel"]
        if r["way"] == "one" and "seconds" in r
    }
    rows = []
    for row in record["parallel"]:
        if "raises" in row:
            rows.append((row["column"], "", "", "", row["raises"]))
            continue
        seconds = row["seconds"]["median"]
        speed = f"{alone[row['framework']] / seconds:.2f}" if row["framework"] in alone else ""
        rows.append((row["column"], str(row["devices"]), si(seconds, "s"), speed, f"{row['largest']:.1e}"))
    shared = "" if all(row.get("real") for row in record["parallel"]) else " (of one CPU, which they share)"
    heads = ("engine", f"devices{shared}", "a step", "times as fast as one", "losses apart")
    task = record["parallel"][0]["task"] if record["parallel"] else "nothing was run"
    return f"Data parallelism: {task}", heads, rows


def within(ratio: dict[str, Any]) -> str:
    """A ratio with its bounds."""
    low, high = ratio["interval"]
    return "1" if low == high == 1 else bounded(ratio["median"], (low, high))


def bounded(value: float, bounds: Sequence[float]) -> str:
    """A number with its bounds."""
    low, high = bounds
    short = lambda x: f"{x:.1e}" if 0 < abs(x) < 1e-2 else f"{x:.3g}" if abs(x) >= 10 else f"{x:.2f}"
    return short(value) if low == high else f"{short(value)} ({short(low)} to {short(high)})"


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
