"""What is checked at the door, and how an example's gradient is scaled: the same for both frameworks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

from gradlab._errors import InputError, KindError
from gradlab.transforms.per_example import Clipping, Randomness

STABILITY = 0.01  # of automatic clipping, as in its paper


def check_batch(op: str, batch: Sequence[Any], named: Callable[[], Sequence[tuple[str, Any]]]) -> int:
    """The number of examples, which the arrays of the batch have in common.

    `batch` are its arrays; `named` gives them with their names, for the message.
    """
    if not batch:
        raise InputError(
            f"{op}: the batch holds no array; pass arrays with a leading axis of examples after params"
        )
    for i, x in enumerate(batch):
        if len(x.shape) == 0:
            raise InputError(
                f"{op}: {named()[i][0]} has shape (), no leading axis of examples; close over data that all "
                "examples share"
            )
    size = batch[0].shape[0]
    for i, x in enumerate(batch):
        if x.shape[0] != size:
            raise InputError(
                f"{op}: {named()[i][0]} has {x.shape[0]} examples, {named()[0][0]} has {size}; "
                "pass arrays with one leading axis of examples"
            )
    return size


def check_not_empty(op: str, size: int) -> None:
    """Refuse a batch without examples."""
    if size == 0:
        raise InputError(f"{op}: the batch is empty; pass at least one example")


def check_clipping(op: str, max_norm: Any, clipping: str) -> None:
    """Refuse a bound that bounds nothing, and an unknown way to clip."""
    if clipping not in get_args(Clipping):
        raise InputError(f"{op}: unknown clipping {clipping!r}; pass one of {', '.join(get_args(Clipping))}")
    positive_number(op, "max_norm", max_norm)


def positive_number(op: str, name: str, value: Any, zero: bool = False) -> None:
    """Refuse what is no number above zero; a traced array cannot be looked at."""
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or hasattr(value, "dtype")):
        raise KindError(f"{op}: {name} is a {type(value).__name__}; pass a positive number")
    if getattr(value, "shape", ()) != ():
        raise InputError(f"{op}: {name} has shape {tuple(value.shape)}; pass one number")
    try:
        number = float(value)
    except Exception:  # traced: of a compiled call, or of a transform around
        return
    if not (0 <= number < math.inf if zero else 0 < number < math.inf):
        needed = "a finite number, zero or more" if zero else "a positive finite number"
        raise InputError(f"{op}: {name} is {number}; pass {needed}")


def check_randomness(op: str, randomness: str) -> None:
    """Refuse an unknown word."""
    if randomness not in get_args(Randomness):
        raise InputError(
            f"{op}: unknown randomness {randomness!r}; pass one of {', '.join(get_args(Randomness))}"
        )


def mixing(op: str, reason: str) -> str:
    """What is said of a loss that needs the rest of the batch."""
    return (
        f"{op}: the loss mixes the examples of a batch ({reason}), so that one example has no gradient of its own; "
        "use the layer in evaluation mode (torch: model.eval(), equinox: eqx.nn.inference_mode), or a norm over "
        "one example (group, layer or instance norm). check.batch_independent shows which examples influence which"
    )
