"""The problems whose derivatives pass through a solution or a rule: numbers in numpy, the same for both frameworks."""

from __future__ import annotations

from typing import Any

import numpy as np

STEP, INNER, RATE = 0.05, 5, 0.01  # of an equation over [0, 1]; steps of adaptation, and their rate


def network(sizes: tuple[int, ...], seed: int) -> dict[str, np.ndarray]:
    """Weights of tanh layers."""
    rng = np.random.default_rng(seed)
    found = {}
    for i in range(len(sizes) - 1):
        found[f"b{i}"] = 0.1 * rng.normal(size=sizes[i + 1])
        found[f"w{i}"] = rng.normal(size=(sizes[i], sizes[i + 1])) / sizes[i] ** 0.5
    return dict(sorted(found.items()))


def numbers() -> dict[str, Any]:
    """Of every problem.

    rule: 65,536 numbers. ridge: data (256, 32) to train on and as many to validate, logarithms of 32 penalties.
    sinusoids: a 1-40-40-1 network, support and query of 25 tasks with 10 points each. equation: a 16-64-16 network
    and 128 states. flow: a 4-32-4 network and 64 samples.
    """
    rng = np.random.default_rng(0)
    data = lambda: (X := rng.normal(size=(256, 32)), X @ rng.normal(size=32) + rng.normal(size=256))
    x, phase = rng.uniform(-5, 5, size=(25, 20, 1)), rng.uniform(0, np.pi, size=(25, 1, 1))
    y = np.sin(x - phase)
    return {
        "rule": rng.normal(size=65_536),
        "ridge": (*data(), *data(), rng.normal(-3.0, 0.5, size=32)),
        "sinusoids": (network((1, 40, 40, 1), 1), ((x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:]))),
        "equation": (network((16, 64, 16), 2), rng.normal(size=(128, 16))),
        "flow": (network((4, 32, 4), 3), rng.normal(size=(64, 4))),
    }
