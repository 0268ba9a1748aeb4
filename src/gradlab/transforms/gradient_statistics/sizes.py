"""How much is held at once, and what is refused: the same for both frameworks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gradlab._errors import InputError, KindError

GRADIENTS = 2**24  # entries of gradients held at once: 64 MiB in float32
SIGNS = 2**22  # entries of a random matrix drawn at once


def held_at_once(entries: int, size: int) -> int:
    """How many gradients of so many entries."""
    return max(1, min(size, GRADIENTS // max(entries, 1)))


def blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """From and to which rows a matrix is drawn at once."""
    step = max(1, SIGNS // columns)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def check_count(op: str, what: str, count: int, least: int) -> None:
    """Refuse a count below the least."""
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise InputError(f"{op}: {count} {what}; pass at least {least}")


def check_other(op: str, other: Any) -> tuple[Any, ...]:
    """Refuse an array where a batch is asked for: its rows would be taken for arguments."""
    if not isinstance(other, (tuple, list)):
        raise KindError(f"{op}: other is a {type(other).__name__}; pass a tuple of arrays, such as (x, y)")
    return tuple(other)
