"""The workers, asked in turn: one framework computes while the others wait."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gradlab.bench.clock import interval
from gradlab.bench.comparison.cases import Case

# What is timed: framework, and mode.
COLUMNS: dict[str, tuple[str, str]] = {
    "jax jit": ("jax", "compiled"),
    "jax eager": ("jax", "eager"),
    "torch eager": ("torch", "eager"),
    "torch compile": ("torch", "compiled"),
    "flax jit": ("flax", "compiled"),
    "tensorflow": ("tensorflow", "graph"),
    "tensorflow XLA": ("tensorflow", "compiled"),
}
EXTRAS = ("flax", "tensorflow")  # whose own words while they load are left unsaid


class Refused(RuntimeError):
    """A worker could not do what it was asked."""


class Hand:
    """One worker, as seen from here."""

    def __init__(self, framework: str, preset: str, device: str, seed: int, cache: str):
        command = [sys.executable, "-m", "gradlab.bench.comparison.worker"]
        quiet = {
            "KINETO_LOG_LEVEL": "99",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TORCHINDUCTOR_CACHE_DIR": cache,  # so that compiling is measured, not remembered
        }
        self.framework = framework
        self.process = subprocess.Popen(
            [*command, framework, preset, device, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if framework in EXTRAS else None,
            text=True,
            env={**os.environ, **quiet},
        )

    def missing(self) -> str | None:
        """Why the framework is not here, where it is not; waits until it is loaded."""
        return self._read().get("missing")

    def ask(self, do: str, **asked: Any) -> Any:
        """What the worker answers; raises `Refused` with its error."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **asked}) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise Refused(f"{self.framework}, {do}: {answer['error']}")
        return answer["reply"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Refused(f"{self.framework}: its process ended with status {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def dismiss(self) -> None:
        """Nothing more will be asked."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()

    def leave(self) -> None:
        """Wait for the end of the process."""
        self.dismiss()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Crew:
    """The workers of some frameworks, as a context; `missing` says which, or which columns, are not there and why."""

    def __init__(self, frameworks: tuple[str, ...], preset: str, device: str, seed: int):
        self._asked = (frameworks, preset, device, seed)
        self.hands: dict[str, Hand] = {}
        self.missing: dict[str, str] = {}

    def __enter__(self) -> Crew:
        frameworks, preset, device, seed = self._asked
        self._cache = tempfile.TemporaryDirectory(prefix="comparison")
        hands = {name: Hand(name, preset, device, seed, self._cache.name) for name in frameworks}
        for name, hand in hands.items():  # they load at the same time
            if why := hand.missing():
                hand.leave()
                self.missing[name] = why
            else:
                self.hands[name] = hand
        if "torch" in self.hands and device == "cpu" and shutil.which("g++") is None:
            self.missing["torch compile"] = "no C++ compiler: install g++"
        return self

    def __exit__(self, *error: Any) -> None:
        for hand in self.hands.values():
            hand.dismiss()
        for hand in self.hands.values():
            hand.leave()
        self._cache.cleanup()

    def columns(self) -> dict[str, tuple[Hand, str]]:
        """Worker and mode of every column that there is."""
        return {
            n: (self.hands[f], mode)
            for n, (f, mode) in COLUMNS.items()
            if f in self.hands and n not in self.missing
        }

    def scratch(self, name: str) -> str:
        """A path for a file between processes."""
        return os.path.join(self._cache.name, name)


def rounds(calls: Mapping[str, tuple[Hand, Case]], count: int) -> dict[str, list[float]]:
    """Samples of calls that are prepared, each round one of every call, in an order that rotates."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    in_turn(calls, count, lambda name, hand, case: samples[name].append(hand.ask("sample", case=case)))
    return samples


def in_turn(calls: Mapping[str, tuple[Hand, Case]], count: int, do: Callable[[str, Hand, Case], Any]) -> None:
    """So many rounds, each beginning one further on."""
    names = list(calls)
    for turn in range(count):
        start = turn % max(len(names), 1)
        for name in names[start:] + names[:start]:
            do(name, *calls[name])


def median(samples: list[float]) -> dict[str, Any]:
    """A median with its bounds at 99 %."""
    return {"median": float(np.median(samples)), "interval": list(interval(samples))}


def quotient(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Median and bounds at 99 % of ours over theirs, round by round."""
    return median([a / b for a, b in zip(ours, theirs, strict=True)])
