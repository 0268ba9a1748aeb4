"""The main job: every operation on real data and on closed forms, checked first and timed after.

    gradlab verify --preset smoke|paper

Per problem, framework and dtype: the error of each operation against extrapolated differences (which know
nothing of automatic differentiation) with their own error estimate, jax against torch, and the time as a
multiple of one gradient. Each framework runs in a process of its own (`verify_one`); this module collects,
compares, shows and records.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gradlab.bench.problems import CHECKED, analytics
from gradlab.bench.record import environment

OPERATIONS = (
    "gradient",
    "hvp",
    "hessian",
    "hessian_diagonal",
    "hessian_operator",
    "jacobian",
    "jacobian_operator",
    "ggn_vp",
    "ggn_operator",
)
# Parameters up to which the Hessian is made dense; rounds of the clock, and its seconds a problem and dtype.
PRESETS = {
    "smoke": {"dense": 700, "repeats": 5, "budget": 0.5},
    "paper": {"dense": 4000, "repeats": 20, "budget": 20.0},
}
AGREEMENT = 1e-12  # jax against torch in float64, relative to the largest entry
Row = dict[str, Any]


def run(
    preset: str = "smoke",
    framework: str = "both",
    device: str = "cpu",
    dtype: str = "both",
    out: str | Path = "results",
) -> int:
    """Verify, show a live table, write verify.json and verify.png to `out`; 1 if anything fails, else 0."""
    from gradlab.bench.console import console
    from gradlab.bench.verify_views import Live, figure

    frameworks = ("jax", "torch") if framework == "both" else (framework,)
    dtypes = ("float64", "float32") if dtype == "both" else (dtype,)
    names = [*CHECKED, *(a.name for a in analytics())]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        with Live(console(), names, frameworks, dtypes) as live:
            for name in frameworks:
                for row in _child(name, preset, device, dtypes, folder):
                    rows.append(row)
                    live.add(row)
        agreement = _agreement(Path(folder), rows) if len(frameworks) == 2 and "float64" in dtypes else []
    passed = all(row["passed"] for row in [*rows, *agreement])
    record = {
        "job": "verify",
        "config": {"preset": preset, "framework": framework, "device": device, "dtype": dtype},
        "environment": environment(),
        "passed": passed,
        "rows": rows,
        "agreement": agreement,
    }
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "verify.json").write_text(json.dumps(record, indent=1))
    figure(record, out / "verify.png")
    live.summary(record, out)
    return 0 if passed else 1


def _child(framework: str, preset: str, device: str, dtypes: tuple[str, ...], folder: str) -> Iterator[Row]:
    command = [
        sys.executable,
        "-m",
        "gradlab.bench.verify_one",
        framework,
        preset,
        device,
        ",".join(dtypes),
        folder,
    ]
    setting = {**os.environ, "JAX_ENABLE_X64": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=setting) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        if child.wait():
            raise RuntimeError(f"verifying {framework} ended with status {child.returncode}")


def _agreement(folder: Path, rows: list[Row]) -> list[Row]:
    """jax against torch, operation by operation, in float64: the largest difference over the largest entry."""
    found = []
    for row in rows:
        if row["framework"] == "jax" and row["dtype"] == "float64":
            name = f"{row['problem']}-{row['operation']}.npy"
            a, b = np.load(folder / f"jax-{name}"), np.load(folder / f"torch-{name}")
            error = float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-300))
            found.append(
                {
                    "problem": row["problem"],
                    "operation": row["operation"],
                    "error": error,
                    "passed": bool(error <= AGREEMENT),
                }
            )
    return found
