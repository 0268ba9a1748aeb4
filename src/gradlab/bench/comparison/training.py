"""Training and inference compared: agreement first, then what is learned, seconds, memory, latency, batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gradlab.bench.comparison.agreement import TOLERANCES, same_losses
from gradlab.bench.comparison.cases import Case
from gradlab.bench.comparison.crew import Crew, Hand, in_turn, median, quotient, rounds
from gradlab.bench.comparison.data import TASKS

AGREE_STEPS = 50
OP_BY_OP = (
    "mlp",
)  # what jax is also run on without jit, where each operation is compiled and sent by itself
Row = dict[str, Any]
Say = Callable[[str], None]


def agreement(crew: Crew, preset: str, say: Say) -> list[Row]:
    """The same losses in every framework, in float64; aborts where they are not, before any time is taken."""
    rows = []
    for task in TASKS[preset]:
        losses = {}
        for name, hand in crew.hands.items():
            say(f"agreement, {task}: {name}")
            mode = "eager" if name == "torch" else "compiled"
            done = hand.ask("train", task=task, mode=mode, dtype="float64", steps=AGREE_STEPS)
            losses[name] = done["losses"]
            hand.ask("forget")
        rows += compared(task, "float64", losses)
    return rows


def compared(task: str, dtype: str, losses: dict[str, list[float]]) -> list[Row]:
    """Each with the first; raises where two differ."""
    (first, ours), *others = losses.items()
    rows = []
    for name, theirs in others:
        count = min(len(ours), len(theirs), AGREE_STEPS)
        far = same_losses(task, (first, ours[:count]), (name, theirs[:count]), TOLERANCES[dtype])
        rows.append({"task": task, "dtype": dtype, "pair": [first, name], "steps": count, "largest": far})
    return rows


def columns(crew: Crew, task: str) -> dict[str, tuple[Hand, str]]:
    """Those that a task is run in."""
    found = crew.columns()
    return {name: column for name, column in found.items() if name != "jax eager" or task in OP_BY_OP}


def training(crew: Crew, preset: str, dtype: str, say: Say) -> tuple[list[Row], list[Row]]:
    """What every column learns in all of a task's steps, and in how many seconds; how far their losses are apart."""
    rows, apart = [], []
    for task, todo in TASKS[preset].items():
        losses = {}
        for name, (hand, mode) in columns(crew, task).items():
            say(f"training, {task}: {name}")
            steps = min(todo.steps, 20) if name == "jax eager" else todo.steps
            done = hand.ask("train", task=task, mode=mode, dtype=dtype, steps=steps)
            seconds, losses[name] = done.pop("seconds"), done["losses"]
            usual = float(np.median(seconds[1:]))
            rows.append(
                {
                    "task": task,
                    "column": name,
                    "steps": steps,
                    "total_s": sum(seconds),
                    "first_s": seconds[0],
                    "compile_s": seconds[0] - usual if mode != "eager" else None,
                    **done,
                    "losses": done["losses"][:: max(1, steps // 100)],
                }
            )
        apart += compared(task, dtype, losses)
    return rows, apart


def prepared(
    calls: dict[str, tuple[Hand, Case]], say: Say
) -> Iterator[tuple[str, tuple[Hand, Case], dict[str, float]]]:
    """Each call made ready by its worker."""
    for name, (hand, case) in calls.items():
        say(f"{case.what}, {case.task}: {name} {case.way}")
        yield name, (hand, case), hand.ask("prepare", case=case)


def steps(crew: Crew, preset: str, dtype: str, count: int, say: Say, base: str) -> list[Row]:
    """Seconds of a training step, in turn, and its memory."""
    rows = []
    for task in TASKS[preset]:
        calls = {
            name: (hand, Case("step", task, mode, dtype=dtype))
            for name, (hand, mode) in columns(crew, task).items()
        }
        first = {name: times["first_s"] for name, _, times in prepared(calls, say)}
        samples = rounds(calls, count)
        for name, (hand, case) in calls.items():
            row = {"task": task, "column": name, "first_s": first[name], "samples": samples[name]}
            row |= {"seconds": median(samples[name]), "ratio": quotient(samples[name], samples[base])}
            row["bytes"] = hand.ask("bytes", case=case)
            rows.append(row)
    return rows


def latency(crew: Crew, preset: str, dtype: str, count: int, say: Say, base: str) -> list[Row]:
    """Seconds of the answer for one example: median and 99th percentile of calls, one by one."""
    rows = []
    for task in TASKS[preset]:
        calls = {
            name: (hand, Case("predict", task, mode, batch=1, dtype=dtype))
            for name, (hand, mode) in columns(crew, task).items()
        }
        first = {name: times["first_s"] for name, _, times in prepared(calls, say)}
        every: dict[str, list[list[float]]] = {name: [] for name in calls}
        in_turn(
            calls, count, lambda name, hand, case: every[name].append(hand.ask("each", case=case, count=50))
        )
        middles = {name: [float(np.median(part)) for part in parts] for name, parts in every.items()}
        for name, parts in every.items():
            p99 = float(np.percentile(np.concatenate(parts), 99))
            row = {"task": task, "column": name, "first_s": first[name], "seconds": median(middles[name])}
            row |= {"p99": p99, "calls": count * 50, "samples": middles[name]}
            rows.append({**row, "ratio": quotient(middles[name], middles[base])})
    return rows


def batches(crew: Crew, preset: str, dtype: str, count: int, sizes: tuple[int, ...], say: Say) -> list[Row]:
    """Seconds of a training step against the examples in it."""
    rows = []
    task = "mlp"
    found = {name: column for name, column in columns(crew, task).items() if name != "jax eager"}
    for size in sizes:
        calls = {
            name: (hand, Case("step", task, mode, batch=size, dtype=dtype))
            for name, (hand, mode) in found.items()
        }
        for _ in prepared(calls, say):
            pass
        for name, samples in rounds(calls, count).items():
            row = {"task": task, "column": name, "batch": size, "seconds": median(samples)}
            rows.append({**row, "samples": samples})
    return rows
