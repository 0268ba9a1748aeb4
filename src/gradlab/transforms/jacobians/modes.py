"""Which mode a dense Jacobian is taken by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradlab.transforms.jacobians import Mode


def one_of(
    forward: Callable[[], Any], reverse: Callable[[], Any], mode: Mode, wide: bool, missing: type[Exception]
) -> Any:
    """The Jacobian by the mode asked for; with "auto" by shape, or the other where f lacks that mode."""
    if mode != "auto":
        return forward() if mode == "forward" else reverse()
    first, second = (forward, reverse) if wide else (reverse, forward)
    try:
        return first()
    except missing as error:  # an operation without that mode
        try:
            return second()
        except missing:
            raise error from None
