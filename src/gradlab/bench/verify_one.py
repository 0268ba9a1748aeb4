"""One framework's side of `gradlab verify`, in a process of its own: rows as JSON lines.

Differences are taken of the float64 function; a float32 function is compared with them and with the float64
answer at the same point (parameters and data are rounded to float32 for both), in units of the last place
times the measured condition of the operation.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gradlab.bench.clock import Timing, interleave, ratio
from gradlab.bench.problems import CHECKED, analytics
from gradlab.bench.verify import PRESETS, Row
from gradlab.bench.verify_case import Case, Lab, Probe, closed_forms, compared, operations, result
from gradlab.check.differences import EPS, Estimate

FACTOR = 10.0  # errors up to this many times the differences' own uncertainty pass
ROUNDING = 1e3  # and up to this many roundings of the largest entry, times the condition
ULPS = 100.0  # float32 against float64: units in the last place, times the condition


def condition(probe: Probe, call: Callable[[Any], Any], here: np.ndarray, operation: str) -> float:
    """Relative change of the result over a relative change of the parameters, at least one."""
    step = 1e-7
    signs = np.random.default_rng(12).choice([-1.0, 1.0], size=probe.x.size)
    moved = call(probe.lab.arrays(probe.tree(probe.x * (1 + step * signs))))
    change = np.abs(result(probe, operation, moved) - here).max() / max(np.abs(here).max(), 1e-300)
    return max(1.0, float(change / step))


def verify(framework: str, preset: str, device: str, dtypes: list[str], folder: Path) -> Iterator[Row]:
    """Rows of one framework: every operation on every problem in every dtype."""
    options = PRESETS[preset]
    forms = {a.name: a for a in analytics()}
    for name in [*CHECKED, *forms]:
        probe = Probe(Lab(framework, "float64", device), name)
        refs = probe.references()
        closed = closed_forms(forms[name], probe) if name in forms else {}
        exact: dict[str, np.ndarray] = {}
        conditions: dict[str, float] = {}
        for dtype in sorted({"float64", *dtypes}, reverse=True):
            lab = Lab(framework, dtype, device)
            case = probe.case if dtype == "float64" else lab.case(name)
            calls = operations(probe, lab, case, int(options["dense"]))
            first, found = _first(probe, case, calls)
            if dtype == "float64":
                exact = found
                conditions = {op: condition(probe, call, found[op], op) for op, call in calls.items()}
            if dtype not in dtypes:
                continue
            timings = _timed(lab, case, calls, options)
            for op, numbers in found.items():
                if dtype == "float64":
                    np.save(folder / f"{framework}-{name}-{op}.npy", numbers)
                verdict = Verdict(dtype, conditions[op], exact[op], closed.get(op))
                row = {**_row(probe, op, numbers, refs, verdict), **_times(op, first, timings)}
                yield {"problem": name, "framework": framework, "dtype": dtype, **row}


def _first(probe: Probe, case: Case, calls: dict[str, Any]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Seconds of each operation's first call, compilation included, and its result."""
    seconds, found = {}, {}
    for op, call in calls.items():
        start = time.perf_counter()
        found[op] = result(probe, op, call(case.params))
        seconds[op] = time.perf_counter() - start
    return seconds, found


@dataclass
class Verdict:
    """What a result is held against, beside differences: the float64 answer and the closed form."""

    dtype: str
    condition: float
    exact: np.ndarray
    closed: np.ndarray | None

    @property
    def eps(self) -> float:
        """The rounding unit of the dtype."""
        return EPS if self.dtype == "float64" else float(np.finfo(np.float32).eps)

    def ulps(self, numbers: np.ndarray) -> float:
        """Largest distance from the float64 answer, in units of the last place times the condition."""
        return _relative(numbers, self.exact) / self.eps / self.condition

    def rounding(self) -> float:
        """The relative error that rounding may make."""
        return ROUNDING * self.eps * self.condition


def _relative(numbers: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(numbers - truth).max() / max(np.abs(truth).max(), 1e-300))


def _row(probe: Probe, op: str, numbers: np.ndarray, refs: dict[str, Any], verdict: Verdict) -> Row:
    part, (value, doubt) = compared(probe, op, numbers, refs)
    scale = max(np.abs(value).max(), 1e-300)
    error = np.abs(part - value)
    closed = None if verdict.closed is None else _relative(numbers, verdict.closed)
    passed = (
        bool((error <= FACTOR * doubt + verdict.rounding() * scale).all())
        and bool(np.isfinite(numbers).all())
        and verdict.ulps(numbers) <= ULPS
        and (closed is None or closed <= verdict.rounding())
    )
    row: Row = {
        "operation": op,
        "error": float(error.max() / scale),
        "uncertainty": float(doubt.max() / scale),
        "closed_form": closed,
        "condition": verdict.condition,
        "ulps": verdict.ulps(numbers) if verdict.dtype == "float32" else None,
        "passed": passed,
    }
    if op == "hvp" and verdict.dtype == "float64":
        row["ladder"] = _ladder(refs["ladder"], numbers)
    return row


def _ladder(estimate: Estimate, numbers: np.ndarray) -> dict[str, Any]:
    """The largest entry's error at each step, and of the extrapolation at the step it chose."""
    i = int(np.argmax(np.abs(estimate.value)))
    truth, scale = numbers[i], max(abs(estimate.value[i]), 1e-300)
    return {
        "steps": estimate.steps.tolist(),
        "error": (np.abs(estimate.raw[:, i] - truth) / scale).tolist(),
        "chosen": float(estimate.step[i]),
        "extrapolated": float(abs(estimate.value[i] - truth) / scale),
    }


def _timed(lab: Lab, case: Case, calls: dict[str, Any], options: dict[str, Any]) -> dict[str, Timing]:
    fresh = {op: partial(call, case.params) for op, call in calls.items()}
    return interleave(
        fresh,
        synchronise=lab.functions.synchronise,
        repeats=int(options["repeats"]),
        budget_s=options["budget"],
        warmup=1,
    )


def _times(op: str, first: dict[str, float], timings: dict[str, Timing]) -> Row:
    return {
        "first_s": first[op],
        "median_s": timings[op].median_s,
        "spread_s": timings[op].spread_s,
        "gradients": ratio(timings[op], timings["gradient"])[0],
    }


if __name__ == "__main__":
    chosen, size, where, kinds, place = sys.argv[1:]
    for finding in verify(chosen, size, where, kinds.split(","), Path(place)):
        print(json.dumps(finding), flush=True)
