"""A clock that compares: variants interleaved in one run, results waited for, ratios round by round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import bdtr

SHORTEST_SAMPLE = 1e-3  # seconds: shorter calls are repeated inside one sample


@dataclass(frozen=True)
class Timing:
    """Seconds a call: of the first (compilation included), and of the repeated ones.

    Attributes:
        first_s: the first call, with whatever it compiles.
        median_s: median over the samples.
        spread_s: interquartile range of the samples.
        best_s: the fastest sample.
        samples: every sample, in the order of the rounds.
    """

    first_s: float
    median_s: float
    spread_s: float
    best_s: float
    samples: tuple[float, ...]


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    synchronise: Callable[[Any], Any],
    repeats: int = 20,
    warmup: int = 2,
    warm: str = "",
    budget_s: float | None = None,
    settled: Callable[[Mapping[str, list[float]]], bool] | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time variants against each other: each round calls every one once, in an order that rotates.

    Args:
        calls: name to callable without arguments.
        synchronise: waits for a result to be there (jax.block_until_ready, torch.cuda.synchronize).
        repeats: rounds; fewer if the budget ends, at least three.
        warmup: calls of each before the rounds, after the first.
        warm: the name that is called once before each of its samples: a short unit beside calls that leave nothing of
            it in the cache.
        budget_s: seconds for the rounds of all variants together.
        settled: asked after 10, 20, 40, ... rounds with all samples so far; the rounds end when it says so.
        now: the clock, in seconds.

    Returns:
        A `Timing` a name. A call shorter than a millisecond is repeated within its sample.
    """

    def seconds(call: Callable[[], Any], inner: int) -> float:
        start = now()
        for _ in range(inner):
            synchronise(call())  # and the result let go: that takes time too
        return (now() - start) / inner

    first = {name: seconds(call, 1) for name, call in calls.items()}
    inner = {}
    for name, call in calls.items():
        times = [seconds(call, 1) for _ in range(max(warmup, 1))]
        inner[name] = max(1, int(np.ceil(SHORTEST_SAMPLE / max(min(times), 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, began, asked = list(calls), now(), 10
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name == warm:
                synchronise(calls[name]())
            samples[name].append(seconds(calls[name], inner[name]))
        if budget_s is not None and turn >= 2 and now() - began > budget_s:
            break
        if settled is not None and turn + 1 == asked:
            if settled(samples):
                break
            asked *= 2
    return {name: _timing(first[name], samples[name]) for name in calls}


def _timing(first: float, samples: list[float]) -> Timing:
    low, middle, high = np.percentile(samples, [25, 50, 75])
    return Timing(first, float(middle), float(high - low), min(samples), tuple(samples))


def ratio(a: Timing, b: Timing) -> tuple[float, float, float]:
    """Median, lower and upper quartile of a / b, round by round: what shakes both does not count."""
    quotients = np.array(a.samples) / np.array(b.samples)
    low, middle, high = np.percentile(quotients, [25, 50, 75])
    return float(middle), float(low), float(high)


def interval(values: Sequence[float], confidence: float = 0.99) -> tuple[float, float]:
    """Bounds of the median that hold with this confidence for independent values of any distribution.

    Two of the values themselves: as many lie below the median as heads fall in so many tosses of a coin (David and
    Nagaraja, Order Statistics, 2003, 7.1). Infinite where there are too few.
    """
    n = len(values)
    k = int((2 * bdtr(np.arange(n // 2 + 1), n, 0.5) <= 1 - confidence).sum())
    ordered = sorted(values)
    return (ordered[k - 1], ordered[n - k]) if k else (-math.inf, math.inf)
