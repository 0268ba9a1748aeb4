"""The two types that the transforms hand one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Leaves = Sequence[Any]  # a tree's float arrays, in the framework's own order
Function = Callable[[Leaves], tuple[Leaves, Any]]  # leaves -> (output leaves, aux)
