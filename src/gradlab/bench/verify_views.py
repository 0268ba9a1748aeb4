"""What `gradlab verify` shows: a live table with a progress bar, a summary, and the figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gradlab.bench.verify import OPERATIONS, Row

SHORT = {
    "gradient": "grad",
    "hvp": "hvp",
    "hessian": "hess",
    "hessian_diagonal": "diag",
    "hessian_operator": "H @",
    "jacobian": "jac",
    "jacobian_operator": "J @",
    "ggn_vp": "ggn",
    "ggn_operator": "G @",
}
COLOURS = {"jax": "tab:blue", "torch": "tab:orange"}


class Live:
    """A table that fills as rows arrive: errors against differences, one line a problem, framework, dtype."""

    def __init__(
        self, console: Console, names: Sequence[str], frameworks: Sequence[str], dtypes: Sequence[str]
    ):
        self.console, self.cells = console, dict[tuple[str, str, str], dict[str, Row]]()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns)
        self.task = self.progress.add_task("starting", total=len(names) * len(frameworks) * len(dtypes))
        self.live = RichLive(console=console, refresh_per_second=4, vertical_overflow="visible")

    def __enter__(self) -> Live:
        self.live.__enter__()
        self.live.update(self._view())
        return self

    def __exit__(self, *error: Any) -> None:
        self.live.__exit__(*error)

    def add(self, row: Row) -> None:
        """Show one more result."""
        key = (row["problem"], row["framework"], row["dtype"])
        self.cells.setdefault(key, {})[row["operation"]] = row
        self.progress.update(self.task, completed=len(self.cells), description=" ".join(key))
        self.live.update(self._view())

    def _view(self) -> Group:
        return Group(self._table("relative error against differences", _cell), self.progress)

    def _table(self, title: str, cell: Callable[[str, Row], str]) -> Table:
        table = Table("problem", "", title=title, title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for op in OPERATIONS:
            table.add_column(SHORT[op], justify="right", no_wrap=True)
        for (problem, framework, dtype), rows in self.cells.items():
            cells = [cell(op, rows[op]) if op in rows else "[dim]-[/]" for op in OPERATIONS]
            table.add_row(problem, f"{framework} {dtype.replace('float', 'f')}", *cells)
        return table

    def summary(self, record: dict[str, Any], out: Path) -> None:
        """The times, compile time apart, the closed forms, jax against torch, and the verdict."""
        show, rows = self.console.print, record["rows"]
        show()
        show(self._table("time of a call, in gradients of the same framework (grad: ms)", _time))
        show(
            "H @, J @, G @: linearised, then applied (H: to 5 directions); - : too many parameters to be dense"
        )
        if compiled := [row["first_s"] - row["median_s"] for row in rows if row["framework"] == "jax"]:
            mean = sum(compiled) / len(compiled)
            show(f"jax compile time, apart: {mean:.2f} s an operation, {sum(compiled):.0f} s in all")
        _worst(
            show, "closed forms", [{**row, "error": row["closed_form"]} for row in rows if row["closed_form"]]
        )
        _worst(show, "jax against torch in float64", record["agreement"])
        ulps = max((row["ulps"] for row in rows if row["ulps"] is not None), default=None)
        if ulps is not None:
            show(f"float32 against float64: at most {ulps:.1f} ulps times the condition")
        failed = [row for row in [*rows, *record["agreement"]] if not row["passed"]]
        for row in failed:
            show(f"[bold red]failed[/] {row}")
        count = len(rows) + len(record["agreement"])
        verdict = (
            f"[bold red]{len(failed)} of {count} failed[/]"
            if failed
            else f"[bold green]all {count} passed[/]"
        )
        show(f"{verdict}; {out / 'verify.json'}, {out / 'verify.png'}")


def _worst(show: Callable[[str], None], name: str, rows: list[Row]) -> None:
    rows = [row for row in rows if row.get("dtype") != "float32"]
    if rows:
        worst = max(rows, key=lambda row: row["error"])
        show(f"{name}: at most {worst['error']:.1e} relative ({worst['problem']}, {worst['operation']})")


def _cell(op: str, row: Row) -> str:
    return f"[green]{row['error']:.0e}[/]" if row["passed"] else f"[bold red]{row['error']:.0e} ✗[/]"


def _time(op: str, row: Row) -> str:
    value = 1e3 * row["median_s"] if op == "gradient" else row["gradients"]
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def figure(record: dict[str, Any], path: Path) -> None:
    """Left: error against step size, with the chosen step. Right: each operation's error per framework."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    drawn, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    _ladders(left, [row for row in record["rows"] if "ladder" in row])
    _errors(right, record["rows"])
    drawn.savefig(path, dpi=150)
    pyplot.close(drawn)


def _ladders(axes: Any, rows: list[Row]) -> None:
    chosen = [row for row in rows if row["framework"] == rows[0]["framework"]] if rows else []
    for row in chosen:
        ladder = row["ladder"]
        errors = [max(e, 1e-17) for e in ladder["error"]]
        (line,) = axes.loglog(ladder["steps"], errors, ".-", lw=1, label=row["problem"])
        best = max(ladder["extrapolated"], 1e-17)
        axes.loglog(ladder["chosen"], best, "*", ms=12, color=line.get_color(), mec="black", mew=0.5)
    axes.set(xlabel="step, in units of the direction", ylabel="relative error of H v by differences")
    axes.set_title("Central differences of the gradient; ★ extrapolated, at the chosen step", fontsize=10)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _errors(axes: Any, rows: list[Row]) -> None:
    for k, (framework, marker) in enumerate((("jax", "o"), ("torch", "s"))):
        for dtype, face in (("float64", COLOURS[framework]), ("float32", "none")):
            some = [row for row in rows if (row["framework"], row["dtype"]) == (framework, dtype)]
            if some:
                places = [OPERATIONS.index(row["operation"]) + 0.3 * (k - 0.5) for row in some]
                errors = [max(row["error"], 1e-17) for row in some]
                style = {"mfc": face, "mec": COLOURS[framework], "ls": "", "alpha": 0.7}
                axes.semilogy(places, errors, marker, label=f"{framework}, {dtype}", **style)
    axes.set_xticks(range(len(OPERATIONS)), [SHORT[op] for op in OPERATIONS], rotation=30, ha="right")
    axes.set_ylabel("relative error against differences")
    axes.set_title("Every operation on every problem", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, axis="y")
