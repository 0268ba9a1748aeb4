"""Training over several devices by the frameworks' own engines: the same losses as on one, and the time of a step."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from gradlab.bench.comparison.agreement import same_losses
from gradlab.bench.comparison.crew import median
from gradlab.bench.comparison.data import TASKS, Task

STEPS = {"float64": 10, "float32": 30}  # to compare; to time
TOLERANCE = 1e-12  # relative, in float64: sums in another order
WAYS = {  # framework: way to title
    "jax": {
        "one": "jax",
        "sharded": "jax, sharded arrays",
        "shard_map": "jax, shard_map",
        "processes": "jax.distributed",
    },
    "torch": {"one": "torch", "ddp": "torch DDP", "fsdp": "torch FSDP"},
}
LIMIT_S = 240
Row = dict[str, Any]


class Lost(RuntimeError):
    """A process of a parallel run failed."""


def followed(
    made: Callable[[Task, str], Callable[[int], float]],
    wide: Callable[[str], AbstractContextManager[Any]],
    preset: str,
    name: str,
) -> dict[str, Any]:
    """Losses in float64, and seconds of steps in float32; in each process of a run."""
    found: dict[str, Any] = {}
    for dtype, count in STEPS.items():
        with wide(dtype):
            step, losses, seconds = made(TASKS[preset][name], dtype), [], []
            for i in range(count):
                start = time.perf_counter()
                losses.append(step(i))
                seconds.append(time.perf_counter() - start)
        found[dtype] = {"losses": losses, "seconds": seconds}
    return found


def told(found: dict[str, Any], devices: int, rank: int) -> None:
    """The first process says what was found."""
    if rank == 0:
        print(json.dumps({"devices": devices, **found}), flush=True)


def parallel(
    frameworks: tuple[str, ...], preset: str, task: str, device: str, say: Callable[[str], None]
) -> list[Row]:
    """Every way on as many devices as there are, or two that share a CPU."""
    rows: list[Row] = []
    count = accelerators(device) if device != "cpu" else 2
    for framework in (name for name in WAYS if name in frameworks):
        alone: list[float] = []
        for way, title in WAYS[framework].items():
            say(f"parallel: {title}")
            row: Row = {"column": title, "framework": framework, "way": way, "task": task}
            try:
                found = run(framework, way, preset, task, device, 1 if way == "one" else count)
            except Lost as lost:
                rows.append({**row, "raises": str(lost)})
                continue
            losses = found["float64"]["losses"]
            alone = losses if way == "one" else alone
            far = same_losses(task, (WAYS[framework]["one"], alone), (title, losses), TOLERANCE)
            seconds = found["float32"]["seconds"][2:]
            row |= {
                "devices": found["devices"],
                "largest": far,
                "samples": seconds,
                "seconds": median(seconds),
            }
            rows.append({**row, "real": device != "cpu"})
    return rows


def run(framework: str, way: str, preset: str, task: str, device: str, count: int) -> dict[str, Any]:
    """What the first process of a run says; raises `Lost`, with the others ended, where one fails."""
    ranks = count if way in ("processes", "ddp", "fsdp") else 1
    module = f"gradlab.bench.comparison._parallel_{framework}"
    words = [sys.executable, "-m", module, way, preset, task, device]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // ranks))}
    if device == "cpu":
        env["JAX_PLATFORMS"] = "cpu"
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count if ranks == 1 else 1}"
    port = str(free_port())
    started = [
        subprocess.Popen(
            [*words, str(rank), str(ranks), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(ranks)
    ]
    try:
        return _first(started, way)
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _first(started: list[subprocess.Popen[str]], way: str) -> dict[str, Any]:
    """The answer of the first process, once all have ended."""
    said = ""
    for rank, process in enumerate(started):
        try:
            out, error = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired as late:
            raise Lost(f"{way}: process {rank} of {len(started)} gave nothing in {LIMIT_S} s") from late
        if process.returncode:
            lines = error.strip().splitlines() or ["no message"]
            last = next((line for line in reversed(lines) if "Error" in line), lines[-1])
            raise Lost(
                f"{way}: process {rank} of {len(started)} ended with status {process.returncode}: {last}"
            )
        said = said or out
    found: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return found


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
    return port


def accelerators(device: str) -> int:
    """How many of them there are, as the driver says."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except Exception:
        return 1
