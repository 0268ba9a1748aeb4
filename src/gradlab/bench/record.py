"""Records: what was measured, on what, with which versions, at which commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("gradlab", "jax", "jaxlib", "torch", "equinox", "numpy", "scipy")


def environment() -> dict[str, Any]:
    """Versions, machine and commit: no host name, no user, no paths."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        **_commit(),
    }


def accelerator(framework: str, device: str) -> str | None:
    """The name of a device that is no CPU, as the framework says it; of jax or torch, which are running here."""
    if device == "cpu":
        return None
    if framework == "jax":
        import jax

        return str(jax.devices("gpu" if device.startswith("cuda") else device.split(":")[0])[0].device_kind)
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> dict[str, Any]:
    """The commit of the code that runs, and whether the tree differs from it; None outside a checkout."""
    here = Path(__file__).parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--", str(here.parent))
    return {"commit": commit, "dirty": None if commit is None else bool(changed)}


def append(path: str | Path, record: dict[str, Any]) -> None:
    """Add one record to a JSON-lines file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def keep(path: str | Path, experiment: str, config: dict[str, Any], **found: Any) -> None:
    """Add what an experiment found, with its configuration and where it ran: the framework's `device`, the machine."""
    here = environment() | {"accelerator": accelerator(config["framework"], config["device"])}
    append(path, {"experiment": experiment, "config": config, "environment": here, **found})


def in_each_framework(script: str, path: str | Path, **flags: Any) -> list[dict[str, Any]]:
    """Run a script once a framework, each in a process of its own, and read the record that each appended to path."""
    for framework in ("jax", "torch"):
        given = {"framework": framework, **flags}
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, script, *words], check=True)
    return [json.loads(line) for line in Path(path).read_text().splitlines()[-2:]]
