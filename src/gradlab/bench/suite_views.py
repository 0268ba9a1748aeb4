"""What `gradlab bench` shows: a bar while it runs, then a table a framework."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class Bar:
    """How many cells are done, and which is on."""

    def __init__(self, framework: str, console: Console):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.framework, self.progress = framework, Progress(*columns, console=console)
        self.task = self.progress.add_task(f"{framework}: starting", total=None)

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()

    def show(self, cell: str, done: int, total: int) -> None:
        """The cell that is on."""
        words = f"{self.framework}: {cell or 'done'}"
        self.progress.update(self.task, description=words, completed=done, total=total)


def table(framework: str, rows: list[dict[str, Any]]) -> Any:
    """One line a case: gradlab, the best by hand, their ratio with its quartiles; in gradients a product."""
    columns = ("problem", "operation", "mode", "gradlab", "by hand", "best by hand", "ratio")
    shown = Table(*columns, title=framework, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        if "operation" not in row:
            continue
        if "variants" not in row:
            why = f"skipped: {row['skipped']}" if "skipped" in row else f"FAILED: {row['failed']}"
            shown.add_row(row["problem"], row["operation"], row["mode"], "", "", why, "")
            continue
        best, ours = row["best_by_hand"], row["variants"]["gradlab"]
        middle, low, high = row.get("ratio_to_best", (float("nan"),) * 3)
        notes = [_note(name, v) for name, v in row["variants"].items() if v["verdict"] != "right"]
        shown.add_row(
            row["problem"],
            row["operation"],
            row["mode"],
            f"{ours['gradients']:.2f}" if "gradients" in ours else "WRONG",
            f"{row['variants'][best]['gradients']:.2f}",
            "; ".join([best, *notes]),
            f"{middle:.2f} ({low:.2f}-{high:.2f})",
        )
    shown.caption = (
        "times in gradients of the same framework and mode, a direction; "
        "unsafe: right here, wrong on other functions (docs/decisions.md)"
    )
    return shown


def footnotes(rows: list[dict[str, Any]]) -> str:
    """Peak memory and the overhead of a call, a line each."""
    size = lambda count: "unknown" if count is None else f"{count / 2**20:.1f}"
    lines = [
        f"peak MiB, {row['problem']}, {row['operation']}, {row['mode']}: "
        + ", ".join(f"{name} {size(v['bytes'])}" for name, v in row["variants"].items() if "bytes" in v)
        for row in rows
        if row.get("operation", "").startswith(("hvp", "matmat, 8")) and "variants" in row
    ]
    costs: dict[str, float] = next((row["overhead"] for row in rows if "overhead" in row), {})
    lines += [
        f"{name.removesuffix('_us')}: {cost:.1f} µs a call of ten leaves" for name, cost in costs.items()
    ]
    return "\n".join(lines)


def _note(name: str, variant: dict[str, Any]) -> str:
    """Why a rival does not count."""
    if "gradients" in variant:
        return f"{name} {variant['gradients']:.2f}: unsafe"
    return f"{name}: wrong by {variant['error']:.0e}" if np.isfinite(variant["error"]) else f"{name}: raises"
