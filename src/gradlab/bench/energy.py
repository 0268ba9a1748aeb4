"""Energy of a call, by the counter of an NVIDIA device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SHORTEST_S = 1.0  # of calls between two readings: the counter moves in steps of some milliseconds


def joules(
    device: str, call: Callable[[], Any], synchronise: Callable[[Any], Any], seconds: float
) -> float | None:
    """Joules of one call of about so many seconds, of all that the device draws meanwhile; None elsewhere."""
    if not device.startswith("cuda"):
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(device.partition(":")[2] or 0))
        read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        before = read()
    except Exception:  # no library, no driver, or a device that does not count
        return None
    count = max(1, round(SHORTEST_S / seconds))
    for _ in range(count):
        synchronise(call())
    return float(read() - before) / count
