"""The audit of a framework's own operations: `check.derivatives` over each of them, in a process apart.

`audit_jax.py` and `audit_torch.py` give the operations' inputs by `cases()`; here they are run, a time limit
each, and what is found is written down: a line a case, then the table of what is known to be wrong.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

from gradlab.check.report import FAILED, PASSED


@dataclass(frozen=True)
class Operator:
    """One operation of a framework at one input.

    Attributes:
        name: importable path, as the user calls it: "torch.nn.functional.layer_norm", "jax.numpy.linalg.det".
        variant: which of its samples.
        f: function of x alone, to a tree of floats.
        x: point: a tree; what is not to be differentiated is closed over by f.
        code: a reproduction of about four lines, where the operation is known to be wrong: import, x, the
            composition, and a print of what it gives and what is right.
        order: to which `check.derivatives` runs.
    """

    name: str
    variant: str
    f: Callable[..., Any]
    x: Any
    code: str = ""
    order: int = 2


class Expired(BaseException):
    """The time of a case is over; no Exception, which the checker would take for the framework's answer."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `Expired` in the body after so many seconds."""

    def expire(*_: Any) -> None:
        raise Expired

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def audited(framework: str, operator: Operator, seconds: float) -> dict[str, Any]:
    """What the checker says of one case: the rows that did not pass, and what f's graph is made of."""
    from gradlab import check

    found: dict[str, Any] = {"name": operator.name, "variant": operator.variant}
    began = time.perf_counter()
    try:
        with limited(seconds):
            report = check.derivatives(operator.f, operator.x, order=operator.order, compiled=False)
            nodes = importlib.import_module(f"gradlab.bench.audit_{framework}").nodes(operator)
    except Expired:
        return {**found, "skipped": f"more than {seconds:g} s"}
    except Exception as error:  # the case is not one: no floats, an input the operation refuses
        return {**found, "skipped": f"{type(error).__name__}: {str(error)[:200]}"}
    rows = {
        row.claim: {"status": row.status, "error": row.error, "message": row.message}
        for row in report.rows
        if row.status != PASSED
    }
    taken = round(time.perf_counter() - began, 3)
    claims = [row.claim for row in report.rows]
    return {**found, "seconds": taken, "claims": len(claims), "rows": rows, "nodes": sorted(nodes)}


def work(framework: str, start: int, seconds: float) -> Iterator[dict[str, Any]]:
    """The worker: number of each case before it is tried, then what was found."""
    warnings.simplefilter("ignore")
    operators = list(importlib.import_module(f"gradlab.bench.audit_{framework}").cases())
    for number, operator in enumerate(operators[start:], start):
        yield {"number": number, "of": len(operators), "name": operator.name}
        yield audited(framework, operator, seconds)


def run(framework: str, out: Path, seconds: float, tell: Callable[[int, int, str], Any]) -> None:
    """Audit one framework into the lines of `out`, going on after the last of them.

    `tell` gets the number of each case, of how many, and its name, before it is tried. A case that ends its
    process (torch's linearize can) is written down as such, and the next process goes on after it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    done = len(out.read_text().splitlines()) if out.exists() else 0
    command = [sys.executable, "-m", "gradlab.bench.audit", framework]
    quiet = {**os.environ, "KINETO_LOG_LEVEL": "99", "JAX_ENABLE_X64": "1"}
    while True:
        current = None
        with (
            subprocess.Popen(
                [*command, str(done), str(seconds)], stdout=subprocess.PIPE, text=True, env=quiet
            ) as child,
            out.open("a") as file,
        ):
            assert child.stdout is not None
            watch = Timer(0.0, child.kill)
            for line in child.stdout:
                if not line.startswith("{"):
                    continue
                found = json.loads(line)
                watch.cancel()
                if "number" in found:
                    current = found
                    watch = Timer(2 * seconds, child.kill)  # a hung loop of XLA heeds no signal but this one
                    watch.start()
                    tell(found["number"], found["of"], found["name"])
                else:
                    current, done = None, done + 1
                    print(json.dumps(found), file=file, flush=True)
            watch.cancel()
            status = child.wait()
            if current is None:
                if status:
                    raise RuntimeError(f"the audit of {framework} ended with status {status}")
                return
            crash = {"name": current["name"], "variant": "", "skipped": f"ended its process, status {status}"}
            print(json.dumps(crash), file=file, flush=True)
            done += 1


def alarms(found: dict[str, Any]) -> list[str]:
    """The claims of a case that failed."""
    return [claim for claim, row in found.get("rows", {}).items() if row["status"] == FAILED]


if __name__ == "__main__":
    for line in work(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])):
        print(json.dumps(line), flush=True)
