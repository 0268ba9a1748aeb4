"""The records of a folder, in one form, the newest of each kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RANK = {"paper": 2, "smoke": 0}  # any other preset stands between: a larger run is shown before a newer one
OF_MACHINE = ("time", "python", "system", "processor", "accelerator", "cores", "versions", "commit", "dirty")
OF_CONFIG = ("framework", "preset", "device", "dtype", "seed")


@dataclass(frozen=True)
class Record:
    """One run: of which script, how it was called, where it ran, and what it found.

    Attributes:
        name: Of the experiment; "operations" for `gradlab bench`, "verify" for `gradlab verify`.
        file: Where it was read.
        config: Framework, device, dtype, preset and what else was chosen.
        environment: Machine, versions, time and commit.
        body: Everything else.
    """

    name: str
    file: str
    config: dict[str, Any]
    environment: dict[str, Any]
    body: dict[str, Any] = field(repr=False)

    @property
    def framework(self) -> str:
        """ "jax", "torch", or "" where the run has none."""
        return str(self.config.get("framework") or "").split(" ")[0]

    @property
    def kind(self) -> tuple[str, ...]:
        """Records of one kind supersede each other."""
        return (self.name, self.framework, *(str(self.config.get(key) or "") for key in ("device", "dtype")))


def read(folder: str | Path) -> tuple[list[Record], list[str]]:
    """Every record under a folder, oldest first in each file, and which lines could not be read."""
    found: list[Record] = []
    faults: list[str] = []
    for path in sorted(Path(folder).rglob("*.jsonl")) + sorted(Path(folder).rglob("*.json")):
        texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        for number, text in enumerate(texts, 1):
            if not text.strip():
                continue
            try:
                given = json.loads(text)
            except ValueError as error:
                faults.append(f"{path.name}, line {number}: {error}")
                continue
            if isinstance(given, dict) and "cell" not in given:  # a cell is part of a run that has not ended
                found.append(_record(given, path))
            elif not isinstance(given, dict):
                faults.append(
                    f"{path.name}, line {number}: a {type(given).__name__} where a record is an object"
                )
    return found, faults


def _record(given: dict[str, Any], path: Path) -> Record:
    """Older records hold configuration and environment at the top."""
    body = dict(given)
    name = next((str(body.pop(key)) for key in ("experiment", "benchmark", "job") if key in body), path.stem)
    config = dict(body.pop("config", None) or {})
    environment = dict(body.pop("environment", None) or {})
    environment |= {key: body.pop(key) for key in OF_MACHINE if key in body}
    config |= {key: body.pop(key) for key in OF_CONFIG if key in body}
    return Record(name, path.name, config, environment, body)


def newest(records: list[Record]) -> list[Record]:
    """Of each kind the last of its largest preset."""
    chosen: dict[tuple[str, ...], Record] = {}
    for record in records:
        before = chosen.get(record.kind)
        if before is None or _order(record) >= _order(before):
            chosen[record.kind] = record
    return list(chosen.values())


def _order(record: Record) -> tuple[int, str]:
    return RANK.get(str(record.config.get("preset")), 1), str(record.environment.get("time", ""))


def by_name(records: list[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Name, and its records."""
    names = dict.fromkeys(record.name for record in records)
    for name in names:
        yield name, [record for record in records if record.name == name]
