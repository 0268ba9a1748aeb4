"""What an NVIDIA device says of itself: the energy of a call, and how busy it is meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

SHORTEST_S = 1.0  # of calls between two readings: the counter moves in steps of some milliseconds
BETWEEN_S = 0.05  # readings of how busy it is


def joules(
    device: str, call: Callable[[], Any], synchronise: Callable[[Any], Any], seconds: float
) -> float | None:
    """Joules of one call of about so many seconds, of all that the device draws meanwhile; None elsewhere."""
    try:
        pynvml, handle = _device(device)
        read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        before = read()
    except Exception:  # no library, no driver, or a device that does not count
        return None
    count = max(1, round(SHORTEST_S / seconds))
    for _ in range(count):
        synchronise(call())
    return float(read() - before) / count


@contextmanager
def utilisation(device: str) -> Iterator[Callable[[], float | None]]:
    """Per cent of the time within the block at which a kernel ran, asked for after it; None where nobody says."""
    found: list[float] = []
    try:
        pynvml, handle = _device(device)
        read = lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
        read()
    except Exception:
        yield lambda: None
        return
    done = Event()

    def watch() -> None:
        while not done.wait(BETWEEN_S):
            found.append(read())

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: sum(found) / len(found) if found else None
    finally:
        done.set()
        watcher.join()


def _device(device: str) -> tuple[Any, Any]:
    """NVML, and its handle of a device such as "cuda:0"."""
    if not device.startswith("cuda"):
        raise LookupError(device)
    import pynvml

    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(device.partition(":")[2] or 0))
