"""The report of a check: one row a claim, a verdict each, a table, JSON, and an error that says what is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from gradlab._errors import GradlabError

PASSED, FAILED, UNSUPPORTED, INCONCLUSIVE = "passed", "failed", "unsupported", "inconclusive"


WITHOUT_DERIVATIVE = ("value", "structure", "vmap", "compiled")  # claims that prove none


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
    """What was found of one function at one point: `.rows`, `.passed`, a table, JSON.

    Attributes:
        framework: "jax", "torch", or both where they are compared.
        dtype: of x.
        rows: the verdicts.
        point: the point that exploration found, a tree like x; None where the rows are of x itself.
    """

    framework: str
    dtype: str
    rows: list[Row] = field(default_factory=list)
    point: Any = None

    @property
    def passed(self) -> bool:
        """True when no claim failed or is inconclusive, and a first derivative was really checked."""
        statuses = {row.status for row in self.rows}
        checked = any(row.status == PASSED for row in self.rows if row.claim not in WITHOUT_DERIVATIVE)
        return checked and not statuses & {FAILED, INCONCLUSIVE}

    @property
    def failed(self) -> bool:
        """True when a claim failed: a derivative is wrong, which is more than not `passed`."""
        return any(row.status == FAILED for row in self.rows)

    @property
    def title(self) -> str:
        """Of what function, and where."""
        place = "" if self.point is None else f", at the point {self.point} that exploration found"
        return f"derivatives on {self.framework}, {self.dtype}{place}"

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
        raise CheckError("\n".join([f"{self.title}:", *lines, "", str(self)]))

    def to_json(self) -> str:
        """The report as one JSON object."""
        rows = [asdict(row) for row in self.rows]
        return json.dumps(
            {
                "title": self.title,
                "framework": self.framework,
                "dtype": self.dtype,
                "passed": self.passed,
                "rows": rows,
            }
        )

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

        table = Table(*HEADINGS, title=self.title)
        colours = {PASSED: "green", FAILED: "bold red", UNSUPPORTED: "dim", INCONCLUSIVE: "yellow"}
        for row, cells in zip(self.rows, self.cells(), strict=True):
            table.add_row(*cells, style=colours[row.status])
        return table


HEADINGS = ["claim", "status", "error", "uncertainty", "where"]
