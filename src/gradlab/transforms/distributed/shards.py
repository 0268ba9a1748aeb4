"""What each shard computes and how the shards are put together: the same in both frameworks.

A part is a shard within its framework: `part.ops` are gradlab's operations there, `part.size` its number of examples
and `part.count` that of all shards; `part.total(tree)` is the sum over all shards, `part.map(f, *trees)` maps leaves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from gradlab._errors import InputError
from gradlab.transforms.distributed import TIMEOUT
from gradlab.transforms.gradient_statistics import NoiseScale, Statistics

SAME, OWN = False, True  # of results: in every process the same, or of its own examples
UNCLIPPED = 1e30  # a bound that no gradient of float32 whose norm is finite passes by much


class Operations:
    """The operations, by a framework's `sharded`, which gives what a body gives on every shard."""

    def __init__(self, sharded: Callable[..., Any]):
        self.sharded = sharded

    def hvp(
        self,
        f: Callable[..., Any],
        x: Any,
        v: Any,
        *batch: Any,
        over: Any = None,
        timeout: float = TIMEOUT,
    ) -> Any:
        """A weighted sum of the shards' products."""
        body = lambda part, same, batch: mean(part, part.ops.hvp(f, *same, *batch))
        return self.sharded("hvp", over, timeout, (x, v), batch, body)

    def ggn_vp(
        self,
        model: Callable[..., Any],
        loss: Callable[..., Any],
        x: Any,
        v: Any,
        *batch: Any,
        over: Any = None,
        timeout: float = TIMEOUT,
    ) -> Any:
        """A weighted sum of the shards' products."""

        def body(part: Any, same: Any, batch: Any) -> Any:
            of_output = lambda output: loss(output, *batch)
            return mean(part, part.ops.ggn_vp(lambda x: model(x, *batch), of_output, *same))

        return self.sharded("ggn_vp", over, timeout, (x, v), batch, body)

    def per_example_norms(
        self,
        loss: Callable[..., Any],
        params: Any,
        *batch: Any,
        over: Any = None,
        timeout: float = TIMEOUT,
        **options: Any,
    ) -> Any:
        """Those of each shard's examples."""
        body = lambda part, same, batch: part.ops.per_example_norms(loss, *same, *batch, **options)
        return self.sharded("per_example_norms", over, timeout, (params,), batch, body, OWN)

    def clipped_grad(
        self,
        loss: Callable[..., Any],
        params: Any,
        *batch: Any,
        max_norm: Any,
        over: Any = None,
        timeout: float = TIMEOUT,
        **options: Any,
    ) -> Any:
        """A sum of the shards' sums."""

        def body(part: Any, same: Any, batch: Any) -> Any:
            clipped, norms = part.ops.clipped_grad(loss, *same, *batch, max_norm=max_norm, **options)
            return part.total(clipped), norms

        return self.sharded("clipped_grad", over, timeout, (params,), batch, body, (SAME, OWN))

    def per_example_statistics(
        self,
        loss: Callable[..., Any],
        params: Any,
        *batch: Any,
        over: Any = None,
        timeout: float = TIMEOUT,
        **options: Any,
    ) -> Statistics:
        """Means, then squares about the mean of all."""

        def body(part: Any, same: Any, batch: Any) -> Statistics:
            at_least_two("per_example_statistics", part)
            if part.size > 1:
                own, variance, _ = part.ops.per_example_statistics(loss, *same, *batch, **options)
                squares = part.map(lambda s: s * (part.size - 1), variance)
            else:
                own = part.map(lambda g: g[0], part.ops.per_example_grads(loss, *same, *batch, **options))
                squares = part.map(lambda g: 0 * g, own)
            middle = mean(part, own)
            about = lambda s, a, b: s + part.size * (a - b) ** 2
            squares = part.total(part.map(about, squares, own, middle))
            variance = part.map(lambda s: s / (part.count - 1), squares)
            ratio = lambda m, v: part.where(m == 0, 0 * m, m * m / part.where(m == 0, 1 + 0 * m, v))
            return Statistics(middle, variance, part.map(ratio, middle, variance))

        return self.sharded("per_example_statistics", over, timeout, (params,), batch, body)

    def gradient_noise_scale(
        self,
        loss: Callable[..., Any],
        params: Any,
        *batch: Any,
        over: Any = None,
        timeout: float = TIMEOUT,
        **options: Any,
    ) -> NoiseScale:
        """From the sum of gradients, and that of squared norms."""

        def body(part: Any, same: Any, batch: Any) -> NoiseScale:
            at_least_two("gradient_noise_scale", part)
            N = part.count
            own, norms = part.ops.clipped_grad(loss, *same, *batch, max_norm=UNCLIPPED, **options)
            total, squares = part.total((own, (norms**2).sum()))
            square = sum((leaf / N).ravel() @ (leaf / N).ravel() for leaf in part.leaves(total))
            trace = N / (N - 1) * (squares / N - square)
            true = square - trace / N
            return NoiseScale(trace / true, trace, true)

        return self.sharded("gradient_noise_scale", over, timeout, (params,), batch, body)


def mean(part: Any, tree: Any) -> Any:
    """Of means over shards: the mean over all examples."""
    return part.total(part.map(lambda leaf: leaf * (part.size / part.count), tree))


def at_least_two(op: str, part: Any) -> None:
    """Refuse what says nothing of a variance."""
    if part.count < 2:
        raise InputError(f"distributed.{op}: {part.count} example in all shards; pass at least 2")


def check_timeout(op: str, timeout: Any) -> None:
    """Refuse what is no time."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        raise InputError(f"distributed.{op}: timeout is {timeout!r}; pass seconds above zero")


def count_examples(op: str, arrays: Sequence[Any]) -> int:
    """The length of the leading axis that all arrays of a batch share."""
    sizes = {tuple(x.shape[:1]) for x in arrays}
    if len(sizes) != 1 or () in sizes:
        found = ", ".join(str(list(size)) for size in sorted(sizes)) or "no array"
        raise InputError(
            f"distributed.{op}: the arrays of the batch have leading axes {found}; pass arrays with one axis of "
            "examples that all share"
        )
    return next(iter(sizes))[0]


def reason(error: Exception) -> str:
    """An engine's own words, the first sentence of them, without its place in the engine's code."""
    return re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0]).split(". ")[0]
