"""Other points around x, where a claim that holds at x may fail: found and shrunk by hypothesis.

Neutral. A candidate is x as a whole scaled and shifted, with a few entries replaced; it shrinks towards x.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from gradlab.check.claims import natural_scales

EXAMPLES = 200  # points that are tried before shrinking
SCALES = (1.0, -1.0, 10.0, 0.1, 100.0, 1e-3, 0.0)  # of x as a whole
SHIFT = 10.0  # of x as a whole, in units of its own size
REACH = 1000.0  # of a single entry, in units of the largest
REPLACED = 4  # entries that are set apart


def failing_point(
    x: np.ndarray, sizes: list[int], fails: Callable[[np.ndarray], bool], seed: int
) -> np.ndarray | None:
    """The simplest point found around x for which `fails`; None where there is none among the examples."""
    unit = natural_scales(x, sizes)
    unit = np.where(unit > 0, unit, 1.0)
    reach = REACH * float(unit.max())
    entry = st.tuples(st.integers(0, x.size - 1), st.floats(-reach, reach))
    change = st.tuples(st.sampled_from(SCALES), st.floats(-SHIFT, SHIFT), st.lists(entry, max_size=REPLACED))

    def point(change: Any) -> np.ndarray:
        scale, shift, replaced = change
        z = np.where(np.isfinite(x), scale * x + shift * unit, x)
        for i, value in replaced:
            z[i] = value
        return z

    quiet = settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    try:
        return point(find(change, lambda change: fails(point(change)), settings=quiet, random=Random(seed)))
    except NoSuchExample:
        return None
