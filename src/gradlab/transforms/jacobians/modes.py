"""Which mode a dense Jacobian is taken by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradlab.transforms.jacobians import Mode

# Inputs an output up to which forward mode is the faster: where both modes run many products at once, and where reverse
# mode runs one at a time (experiments/jacobian_scaling.py, results/jacobian_scaling.jsonl).
FORWARD_UP_TO, FORWARD_UP_TO_LOOPED = 1.0, 2.9


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
