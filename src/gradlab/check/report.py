"""The report of a check: one row a claim, a verdict each, a table, JSON, and an error that says what is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from gradlab._errors import GradlabError

PASSED, FAILED, UNSUPPORTED, INCONCLUSIVE = "passed", "failed", "unsupported", "inconclusive"


class CheckError(GradlabError, AssertionError):
    """A claim about a derivative does not hold, or could not be decided."""


@dataclass(frozen=True)
class Row:
    """The verdict on one claim.

    Attributes:
        claim: what is claimed: "value", "gradient", "jvp", "vjp", "hvp", "hessian", ...
        status: "passed", "failed", "unsupported" (the framework refuses) or "inconclusive".
        error: the largest difference between derivative and reference, absolute.
        uncertainty: the estimated error of the reference there, and of the arithmetic, absolute.
        where: leaf and index of the largest fault, where it is known.
        message: what is wrong, or why nothing can be said.
    """

    claim: str
    status: str
    error: float | None = None
    uncertainty: float | None = None
    where: str = ""
    message: str = ""

    @property
    def ratio(self) -> float | None:
        """error / uncertainty: far above one is wrong."""
        return self.error / self.uncertainty if self.error is not None and self.uncertainty else None


@dataclass(frozen=True)
class Report:
    """What was found of one function at one point: `.rows`, `.passed`, a table, JSON."""

    framework: str
    dtype: str
    rows: list[Row] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True when no claim failed or is inconclusive, and a first derivative was really checked."""
        statuses = {row.status for row in self.rows}
        checked = any(row.status == PASSED for row in self.rows if row.claim != "value")
        return checked and not statuses & {FAILED, INCONCLUSIVE}

    def __getitem__(self, claim: str) -> Row:
        return next(row for row in self.rows if row.claim == claim)

    def raise_if_failed(self) -> Report:
        """Return the report, or raise `CheckError` saying which claim is wrong, where and by how much."""
        if self.passed:
            return self
        bad = [row for row in self.rows if row.status in (FAILED, INCONCLUSIVE)]
        lines = [f"{row.claim} {row.status}: {row.message}" for row in bad] or [
            "no derivative could be checked"
        ]
        raise CheckError(
            "\n".join([f"derivatives on {self.framework}, {self.dtype}:", *lines, "", str(self)])
        )

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps({**asdict(self), "passed": self.passed})

    def cells(self) -> list[list[str]]:
        """The table's rows as text: claim, status, error, uncertainty, where."""
        number = lambda value: "" if value is None else f"{value:.1e}"
        return [[r.claim, r.status, number(r.error), number(r.uncertainty), r.where] for r in self.rows]

    def __str__(self) -> str:
        table = [HEADINGS, *self.cells()]
        widths = [max(len(row[i]) for row in table) for i in range(len(HEADINGS))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table
        )

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(*HEADINGS, title=f"derivatives on {self.framework}, {self.dtype}")
        colours = {PASSED: "green", FAILED: "bold red", UNSUPPORTED: "dim", INCONCLUSIVE: "yellow"}
        for row, cells in zip(self.rows, self.cells(), strict=True):
            table.add_row(*cells, style=colours[row.status])
        return table


HEADINGS = ["claim", "status", "error", "uncertainty", "where"]
