"""The comparison from its first line to its record."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gradlab.bench.comparison import training
from gradlab.bench.comparison.claims import judged
from gradlab.bench.comparison.crew import COLUMNS, Crew
from gradlab.bench.comparison.operations import operations
from gradlab.bench.comparison.parallel import parallel
from gradlab.bench.comparison.training import Say
from gradlab.bench.record import environment

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"rounds": 8, "batches": (8,), "compiled": False, "parallel": "mlp"},
    "smoke": {"rounds": 12, "batches": (32, 128, 512), "compiled": False, "parallel": "mlp"},
    "paper": {"rounds": 40, "batches": (32, 128, 512, 2048), "compiled": True, "parallel": "decoder"},
}
BASES = ("torch eager", "jax jit")  # what ratios are to: the first that there is
MORE = ("optax", "flax", "tensorflow", "scikit-learn")


def compare(
    frameworks: tuple[str, ...], preset: str, device: str, dtype: str, seed: int, say: Say
) -> dict[str, Any]:
    """A record of everything that was compared; raises `Disagreement` before any time is taken."""
    options = PRESETS[preset]
    count = options["rounds"]
    with Crew(frameworks, preset, device, seed) as crew:
        base = next(name for name in BASES if name in crew.columns())
        compared = [name for name in ("jax", "torch") if name in crew.hands]
        config = {
            "framework": "both" if len(compared) > 1 else compared[0],
            "preset": preset,
            "device": device,
        }
        of = crew.missing
        absent = {n: of.get(n) or of[f] for n, (f, _) in COLUMNS.items() if n in of or f in of}
        agreed = training.agreement(crew, preset, say)
        learned, apart = training.training(crew, preset, dtype, say)
        record: dict[str, Any] = {
            "experiment": "framework_comparison",
            "config": {**config, "dtype": dtype, "seed": seed},
            "environment": described(),
            "missing": absent,
            "base": base,
            "agreement": agreed + apart,
            "training": learned,
            "steps": training.steps(crew, preset, dtype, count, say, base),
            "latency": training.latency(crew, preset, dtype, count, say, base),
            "batches": training.batches(crew, preset, dtype, count, options["batches"], say),
            "resident": {name: hand.ask("resident") for name, hand in crew.hands.items()},
            "operations": operations(crew, dtype, count, options["compiled"], say),
        }
    record["parallel"] = parallel(frameworks, preset, options["parallel"], device, say)
    record["claims"] = judged(record)
    return record


def described() -> dict[str, Any]:
    """The environment, with the cores that this process may use and the versions of all that is compared."""
    found = environment()
    for package in MORE:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {**found, "cores_used": cores}
