"""Measure what a derivative costs: clock, memory, records, and the problems they are measured on.

Neutral modules here; `_jax.py` and `_torch.py` hold each framework's side. Importing this package
imports neither framework.
"""

from gradlab.bench.clock import Timing, interleave, interval, ratio
from gradlab.bench.profiling import Ceilings, Comparison, Counts, Measurement, compare, profile
from gradlab.bench.record import append, environment

__all__ = [
    "Ceilings",
    "Comparison",
    "Counts",
    "Measurement",
    "Timing",
    "append",
    "compare",
    "environment",
    "interleave",
    "interval",
    "profile",
    "ratio",
]
