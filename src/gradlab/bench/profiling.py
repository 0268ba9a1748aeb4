"""What a call costs on this machine: seconds, memory, arithmetic, traffic, energy; and two calls compared.

`_profile_jax.py` and `_profile_torch.py` hold what each framework says of a call.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from gradlab._dispatch import framework_of
from gradlab._errors import BackendError, InputError, KindError
from gradlab.bench.clock import Timing, interleave, interval
from gradlab.bench.energy import joules
from gradlab.bench.memory import peak

REPEATS = 10_000  # rounds at most; the precision or the budget ends them


@dataclass(frozen=True)
class Counts:
    """What one call computes and moves, as the framework counts it; None where it does not say.

    Attributes:
        flops: Floating-point operations; a multiplication and an addition are two.
        bytes: Bytes read and written.
        note: What is not counted.
    """

    flops: float | None = None
    bytes: float | None = None
    note: str = ""


UNCOUNTED = Counts(note="everything: the call could not be traced")


@dataclass(frozen=True)
class Ceilings:
    """The rates that this device reaches: of a large matrix product, and of a large copy.

    Attributes:
        flops_per_s: Operations a second.
        bytes_per_s: Bytes read and written a second.
    """

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Measurement:
    """What one call costs. None means that it was not available, never nothing.

    Attributes:
        name: Of the call.
        framework: "jax" or "torch".
        device: As the framework names it.
        seconds: Median of a call, result waited for.
        interval: Bounds of that median with 99 % confidence.
        spread_s: Interquartile range.
        first_s: Of the first call, tracing and compiling included.
        compile_s: By how much the first call was longer, of a function that is compiled.
        samples: How many rounds.
        peak_bytes: Temporaries and results held at once, beyond what was there before.
        counts: Operations and bytes of one call.
        joules: Energy of one call, by the device's own counter.
        ceilings: Of the device, where they were asked for.
        trace: A file that opens in Perfetto, where one was asked for.
    """

    name: str
    framework: str
    device: str
    seconds: float
    interval: tuple[float, float]
    spread_s: float
    first_s: float
    compile_s: float | None
    samples: int
    peak_bytes: int | None
    counts: Counts
    joules: float | None = None
    ceilings: Ceilings | None = None
    trace: Path | None = None
    timing: Timing | None = field(default=None, repr=False, compare=False)

    @property
    def flops_per_s(self) -> float | None:
        """Operations a second."""
        return None if self.counts.flops is None else self.counts.flops / self.seconds

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes a second."""
        return None if self.counts.bytes is None else self.counts.bytes / self.seconds

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            **{
                k: getattr(self, k) for k in ("name", "framework", "device", "seconds", "spread_s", "first_s")
            },
            "interval": list(self.interval),
            **{k: getattr(self, k) for k in ("compile_s", "samples", "peak_bytes", "joules")},
            "flops": self.counts.flops,
            "bytes": self.counts.bytes,
            "not_counted": self.counts.note,
            "ceilings": None if self.ceilings is None else vars(self.ceilings),
        }

    def __str__(self) -> str:
        of = self.ceilings
        low, high = self.interval
        rows = {
            "time": f"{si(self.seconds, 's')} ({si(low, 's')} to {si(high, 's')}, {self.samples} rounds)",
            "compiling": si(self.compile_s, "s"),
            "peak memory": si(self.peak_bytes, "B"),
            "operations": si(self.counts.flops, "FLOP"),
            "rate": _share(self.flops_per_s, "FLOP/s", of.flops_per_s if of else None),
            "traffic": si(self.counts.bytes, "B"),
            "bandwidth": _share(self.bytes_per_s, "B/s", of.bytes_per_s if of else None),
            "energy": si(self.joules, "J"),
        }
        lines = [f"{self.name} in {self.framework} on {self.device}"]
        lines += [f"  {name:<12} {value}" for name, value in rows.items()]
        return "\n".join([*lines, *([f"  not counted: {self.counts.note}"] if self.counts.note else [])])


@dataclass(frozen=True)
class Comparison:
    """Calls timed against each other in one run.

    Attributes:
        measurements: Name to `Measurement`.
        baseline: The name that the others are compared with.
    """

    measurements: Mapping[str, Measurement]
    baseline: str

    def ratio(self, name: str, to: str | None = None) -> tuple[float, float, float]:
        """Time of `name` / time of `to` (the baseline): the median over the rounds, and its bounds at 99 %."""
        ours, theirs = (self[n].timing for n in (name, to or self.baseline))
        quotients = _over(ours.samples, theirs.samples)  # type: ignore[union-attr]
        return float(np.median(quotients)), *interval(quotients)

    def differs(self, name: str, to: str | None = None) -> bool:
        """Whether those bounds leave out 1."""
        _, low, high = self.ratio(name, to)
        return low > 1 or high < 1

    def __getitem__(self, name: str) -> Measurement:
        return self.measurements[name]

    def __str__(self) -> str:
        width = max(map(len, self.measurements))
        lines = []
        for name, m in self.measurements.items():
            middle, low, high = self.ratio(name)
            against = (
                ""
                if name == self.baseline
                else f"  {middle:.3f} ({low:.3f} to {high:.3f}) of {self.baseline}"
            )
            lines.append(f"{name:<{width}}  {si(m.seconds, 's'):>9}  {si(m.peak_bytes, 'B'):>13}{against}")
        return "\n".join(lines)


def profile(
    fn: Callable[..., Any],
    *args: Any,
    name: str | None = None,
    framework: str | None = None,
    precision: float = 0.01,
    budget_s: float = 5.0,
    ceilings: bool = False,
    trace: str | Path | None = None,
) -> Measurement:
    """What `fn(*args)` costs: the first call, the repeated one, memory, operations, bytes and energy.

    Args:
        fn: A function, compiled or not; its result is waited for.
        *args: Its arguments.
        name: In what is printed; None: that of fn.
        framework: "jax" or "torch"; None: that of the arrays in args, or in the result.
        precision: Calls are repeated until the 99 % bounds of the median are this close to it, relatively.
        budget_s: Or until so many seconds have passed.
        ceilings: Whether to measure, once a process, what the device reaches at most (a few seconds).
        trace: A folder for a profiler's trace of one call, to be opened at ui.perfetto.dev.

    Returns:
        A `Measurement`; print it, or append its `.record()` to a file.

    Raises:
        BackendError: neither args nor the result hold arrays of one framework, and none is named.
        KindError: fn is no function.
        InputError: a precision or budget that is not positive.

    Cost:
        `budget_s` and a few calls more; in jax one more compilation, from whose program operations, bytes and memory
        are read.

    Example:
        >>> import torch
        >>> from gradlab.bench import profile
        >>> A = torch.ones(256, 256)
        >>> profile(torch.mm, A, A, budget_s=0.1).counts.flops == 2 * 256**3
        True
    """
    (found,) = measured(
        {name or _name(fn): fn}, args, framework, precision, budget_s, ceilings, trace
    ).values()
    return found


def compare(
    calls: Mapping[str, Callable[..., Any]],
    *args: Any,
    baseline: str | None = None,
    framework: str | None = None,
    precision: float = 0.01,
    budget_s: float = 20.0,
) -> Comparison:
    """Calls against each other, each round calling every one, in an order that rotates.

    Args:
        calls: Name to function; all take the same arguments.
        *args: Those.
        baseline: Which name the others are compared with; None: the first.
        framework: As for `profile`.
        precision: Rounds go on until every ratio's 99 % bounds are this close to it, relatively.
        budget_s: Or until so many seconds have passed.

    Returns:
        A `Comparison`: `.ratio(name)` with bounds, `.differs(name)`, a `Measurement` each.

    Raises:
        BackendError, KindError: as for `profile`.
        InputError: fewer than two calls, an unknown baseline; as for `profile`.

    Cost:
        `budget_s` at most, and a few calls more of each.

    Example:
        >>> import torch
        >>> from gradlab.bench import compare
        >>> x = torch.ones(100_000)
        >>> found = compare({"once": lambda: x.sin(), "thrice": lambda: x.sin().sin().sin()}, budget_s=2.0)
        >>> found.differs("thrice")
        True
    """
    if len(calls) < 2:
        raise InputError(f"compare: {len(calls)} calls were given; pass two or more, or use profile for one")
    baseline = baseline or next(iter(calls))
    if baseline not in calls:
        raise InputError(f"compare: no call is named {baseline!r}; pass one of {', '.join(calls)}")
    return Comparison(measured(calls, args, framework, precision, budget_s, False, None, baseline), baseline)


def measured(
    calls: Mapping[str, Callable[..., Any]],
    args: tuple[Any, ...],
    framework: str | None,
    precision: float,
    budget_s: float,
    ceilings: bool,
    trace: str | Path | None,
    baseline: str | None = None,
) -> dict[str, Measurement]:
    """Every call measured; timed in one run until its time, or its ratio to the baseline, is known."""
    op = "compare" if baseline else "profile"
    for name, fn in calls.items():
        if not callable(fn):
            raise KindError(f"{op}: {name} is a {type(fn).__name__}; pass a function")
    for name, value in (("precision", precision), ("budget_s", budget_s)):
        if not value > 0:
            raise InputError(f"{op}: {name} is {value}; pass a positive number")
    sides: Any = {name: _side(name) for name in ("jax", "torch") if name in sys.modules or name == framework}
    framework = framework or _framework_of(op, args)
    bound = {name: lambda fn=fn: fn(*args) for name, fn in calls.items()}

    def settled(samples: Mapping[str, list[float]]) -> bool:
        known = samples if baseline is None else {n: _over(samples[n], samples[baseline]) for n in samples}
        return all(_relative(values) <= precision for values in known.values())

    def synchronise(result: Any) -> Any:
        nonlocal framework
        framework = framework or framework_of(op, (result,))
        return sides[framework].synchronise(result)

    timings = interleave(
        bound, synchronise=synchronise, repeats=REPEATS, warmup=3, budget_s=budget_s, settled=settled
    )
    assert framework is not None  # the calls have run
    side = sides[framework]
    device = side.device((args, bound[next(iter(bound))]()))
    roof = measured_ceilings(framework, device) if ceilings else None
    found = {}
    for name, timing in timings.items():
        call, fn = bound[name], calls[name]
        slower = max(timing.first_s - timing.median_s, 0.0)
        found[name] = Measurement(
            name,
            framework,
            device,
            timing.median_s,
            interval(timing.samples),
            timing.spread_s,
            timing.first_s,
            slower if side.is_compiled(fn) else None,
            len(timing.samples),
            _tried(partial(peak, framework, fn, *args, device=device)),
            _tried(partial(side.counted, fn, args)) or UNCOUNTED,
            joules(device, call, side.synchronise, timing.median_s),
            roof,
            None if trace is None else side.traced(call, Path(trace), name),
            timing,
        )
    return found


@cache
def measured_ceilings(framework: str, device: str) -> Ceilings:
    """By a square matrix product in float32 and a copy, both far larger than any cache."""
    side = _side(framework)
    n, entries = (2048, 2**26) if device.startswith("cpu") else (8192, 2**28)
    product, copy = side.large(device, n, entries)
    times = interleave({"product": product, "copy": copy}, synchronise=side.synchronise, repeats=10)
    return Ceilings(2 * n**3 / times["product"].best_s, 2 * 4 * entries / times["copy"].best_s)


def si(value: float | None, unit: str) -> str:
    """A number with its unit, to three digits; or that there is none."""
    if value is None:
        return "not available"
    if value == 0:
        return f"0 {unit}"
    power = int(np.clip(np.floor(np.log10(abs(value)) / 3), -4, 5))
    return f"{value / 1000.0**power:.3g} {['p', 'n', 'µ', 'm', '', 'k', 'M', 'G', 'T', 'P'][power + 4]}{unit}"


def _share(rate: float | None, unit: str, most: float | None) -> str:
    share = f", {rate / most:.0%} of what a large one reaches" if rate is not None and most else ""
    return si(rate, unit) + share


def _over(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(values, others, strict=True)]


def _relative(values: list[float]) -> float:
    low, high = interval(values)
    return (high - low) / 2 / float(np.median(values))


def _tried(measure: Callable[[], Any]) -> Any:
    """What could not be measured is not available; the call itself has run before."""
    try:
        return measure()
    except Exception:
        return None


def _name(fn: Any) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def _side(framework: str) -> Any:
    """What a framework says of a call."""
    return importlib.import_module(f"gradlab.bench._profile_{framework}")


def _framework_of(op: str, args: tuple[Any, ...]) -> str | None:
    """Of the arguments; None where what a call gives has to tell, which must not run before the clock does."""
    try:
        return framework_of(op, args)
    except BackendError:
        return None
