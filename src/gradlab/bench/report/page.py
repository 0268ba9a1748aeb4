"""The page and the Markdown file, of the same tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradlab._errors import InputError
from gradlab.bench.report import charts
from gradlab.bench.report.lines import Cell, Table
from gradlab.bench.report.records import read
from gradlab.bench.report.sections import Image, Section, Tile, machines, sections, tiles

SHOWN = 24  # a longer table beside charts is folded


def write(folder: str | Path, out: str | Path | None = None) -> tuple[Path, Path]:
    """Write report.html and report.md of the records under a folder.

    Args:
        folder: Searched for .jsonl and .json records.
        out: Where the two files go; None: into the folder.

    Returns:
        The page and the Markdown file.

    Raises:
        InputError: no such folder, or no record in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"report: there is no folder {folder}; pass one that holds records (.jsonl)")
    records, faults = read(folder)
    if not records:
        raise InputError(f"report: no record in {folder}; write some by gradlab bench --out {folder}")
    out = folder if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    said: dict[str, Any] = {
        "machines": machines(records),
        "tiles": tiles(records),
        "sections": sections(records, folder),
        "faults": faults,
    }
    page, plain = out / "report.html", out / "report.md"
    page.write_text(html(**said))
    plain.write_text(markdown(**said))
    return page, plain


def html(machines: Table, tiles: list[Tile], sections: list[Section], faults: list[str]) -> str:
    """One file: style, tables, drawings and the sorting of tables."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    templates = Environment(
        loader=PackageLoader("gradlab.bench.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals["spark"] = lambda cell: Markup(
        charts.interval(cell.span[0], cell.span[1], cell.span[2], cell.less_is_better)
    )
    templates.filters["drawn"] = lambda figure: Markup(figure.svg)
    templates.tests["table"] = lambda block: isinstance(block, Table)
    templates.tests["image"] = lambda block: isinstance(block, Image)
    page = templates.get_template("page.html.jinja")
    return page.render(machines=machines, tiles=tiles, sections=sections, faults=faults, most=SHOWN)


def markdown(machines: Table, tiles: list[Tile], sections: list[Section], faults: list[str]) -> str:
    """The same tables."""
    parts = ["# What derivatives cost here", table(machines)]
    parts += ["\n".join(f"- **{tile.value}** {tile.label}" for tile in tiles)]
    parts += [f"Not read: {fault}" for fault in faults]
    for section in sections:
        parts += [f"## {section.title}", section.lead, "\n".join(f"- {run}" for run in section.runs)]
        for block in section.blocks:
            if isinstance(block, Table):
                parts += [f"### {block.title}" if block.title else "", table(block), block.note]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(of: Table) -> str:
    """Numbers to the right."""
    escaped = lambda text: text.replace("|", "\\|").replace("\n", " ")
    line = lambda cells: "| " + " | ".join(cells) + " |"
    marks = ["---:" if of.numeric(i) else "---" for i in range(len(of.heads))]
    shown = lambda cell: escaped(cell.whole) if isinstance(cell, Cell) else str(cell)
    rows: list[Any] = [[shown(cell) for cell in row] for row in of.rows]
    return "\n".join([line([escaped(h) for h in of.heads]), line(marks), *map(line, rows)])
