"""What a worker can be asked to time, and what it makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One call, as it is named between processes.

    Attributes:
        what: "step", "predict", or an operation such as "hvp".
        task: On which model.
        mode: "eager" or "compiled".
        way: Of several, how it is done: "gradlab", or as the framework's user writes it.
        batch: Examples; 0: the task's own.
        dtype: Of the floats.
    """

    what: str
    task: str
    mode: str = "compiled"
    way: str = ""
    batch: int = 0
    dtype: str = "float32"


@dataclass(frozen=True)
class Ready:
    """A call that can be timed, and the same as a function of arrays, whose memory can be planned."""

    run: Callable[[], Any]
    pure: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()

    @classmethod
    def of(cls, pure: Callable[..., Any], *args: Any) -> Ready:
        """Of a function and its arguments."""
        return cls(lambda: pure(*args), pure, args)
