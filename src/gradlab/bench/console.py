"""Where tables go."""

from __future__ import annotations

from rich.console import Console

NARROWEST = 110  # columns, where the output is not a terminal


def console() -> Console:
    """The terminal, or a file that is wide enough for the tables."""
    found = Console()
    return found if found.is_terminal else Console(width=max(found.width, NARROWEST))
