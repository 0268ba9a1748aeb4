"""profile and compare: counts exact, intervals honest, nothing invented where nothing is known."""

import importlib
import json
import math
import time

import numpy as np
import pytest

from frameworks import FRAMEWORKS
from gradlab import BackendError, InputError, KindError
from gradlab.bench import Comparison, Counts, Measurement, Timing, compare, interval, profile
from gradlab.bench.energy import joules
from gradlab.bench.profiling import si


def side(framework):
    pytest.importorskip(framework)
    return importlib.import_module(f"gradlab.bench._profile_{framework}")


def array(framework, a):
    return importlib.import_module(f"gradlab.bench._{framework}").arrays(a, "float32")


def comparison(a, b):
    timing = lambda values: Timing(1.0, float(np.median(values)), 0.0, min(values), tuple(values))
    made = lambda name, t: Measurement(
        name, "torch", "cpu", t.median_s, (0, 0), 0.0, 1.0, None, len(a), None, Counts(), timing=t
    )
    return Comparison({"a": made("a", timing(a)), "b": made("b", timing(b))}, "a")


def test_interval_holds_its_confidence():
    """Of 4000 medians of skewed numbers, at least 99 % lie in their bounds, and those of 80 % do not always."""
    rng = np.random.default_rng(0)
    samples = np.exp(rng.normal(size=(4000, 41)))
    held = lambda c: np.mean(
        [low <= 1 <= high for low, high in (interval(row.tolist(), c) for row in samples)]
    )
    assert held(0.99) > 0.985
    assert 0.8 < held(0.8) < 0.92
    assert interval([1.0] * 5) == (-math.inf, math.inf)
    low, high = interval(range(5001))  # the binomial coefficients of so many are beyond floats
    assert low == 5000 - high
    assert abs(low - (2500 - 2.576 * 5001**0.5 / 2)) < 2


def test_a_slow_down_is_told_from_noise():
    rng = np.random.default_rng(1)
    noisy = lambda scale: (scale * (1 + 0.1 * np.abs(rng.normal(size=200)))).tolist()
    assert sum(comparison(noisy(1.0), noisy(1.0)).differs("b") for _ in range(20)) <= 1
    assert all(comparison(noisy(1.0), noisy(1.05)).differs("b") for _ in range(20))
    middle, low, high = comparison(noisy(1.0), noisy(1.05)).ratio("b")
    assert low < middle < high


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_products_and_copies_are_counted_exactly(framework):
    own = side(framework)
    A = array(framework, np.random.default_rng(0).normal(size=(48, 64)))
    product, copy = (lambda a: a @ a.T), {"jax": lambda a: a + 0, "torch": lambda a: a.clone()}[framework]
    counts = own.counted(product, (A,))
    assert counts.flops == 2 * 48 * 48 * 64
    assert counts.note
    counts = own.counted(copy, (A,))
    assert counts.bytes == 2 * 4 * 48 * 64


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_measurement(framework, tmp_path):
    own = side(framework)
    A = array(framework, np.ones((64, 64)))
    found = profile(lambda a: a @ a, A, name="square", budget_s=0.2, trace=tmp_path / "t")
    assert found.framework == framework
    assert found.device == "cpu"
    assert found.counts.flops == 2 * 64**3
    assert found.peak_bytes == 4 * 64**2
    assert found.compile_s is None
    assert found.joules is None
    assert found.samples >= 3
    assert found.flops_per_s == found.counts.flops / found.seconds
    assert found.trace.stat().st_size > 100
    text = str(found)
    assert "524 kFLOP" in text
    assert text.count("not available") == 2  # compiling, energy
    assert json.loads(json.dumps(found.record()))["flops"] == found.counts.flops
    assert own.device((A,)) == "cpu"


def test_compiling_is_apart():
    jax = pytest.importorskip("jax")
    found = profile(jax.jit(lambda x: (x**3).sum()), jax.numpy.ones(8), budget_s=0.05)
    assert found.compile_s is not None
    assert found.compile_s > found.seconds


def test_what_cannot_be_traced_is_not_available():
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones(3)
    found = profile(lambda x: x * 2 if float(x.sum()) > 0 else x, x, budget_s=0.05)
    assert found.counts.flops is None
    assert found.peak_bytes is None
    assert "could not be traced" in str(found)


def test_compare_prints_ratios():
    torch = pytest.importorskip("torch")
    x = torch.ones(50)
    found = compare({"one": lambda x: x * 2, "two": lambda x: x + x}, x, budget_s=0.1)
    assert "of one" in str(found)
    assert found.ratio("one")[0] == 1


def test_bad_input():
    torch = pytest.importorskip("torch")
    f, x = torch.sin, torch.ones(2)
    with pytest.raises(KindError, match="is a int; pass a function"):
        profile(3, x)
    with pytest.raises(InputError, match="precision is 0"):
        profile(f, x, precision=0)
    with pytest.raises(InputError, match="budget_s is -1"):
        profile(f, x, budget_s=-1)
    with pytest.raises(InputError, match="1 calls were given"):
        compare({"a": f}, x)
    with pytest.raises(InputError, match="no call is named 'c'"):
        compare({"a": f, "b": f}, x, baseline="c")
    with pytest.raises(BackendError, match="no jax or torch array"):
        profile(lambda: 3)


def test_units():
    assert si(None, "B") == "not available"
    assert si(0, "B") == "0 B"
    assert si(1234.0, "B") == "1.23 kB"
    assert si(2.5e-6, "s") == "2.5 µs"


def test_energy_is_that_of_a_counter(monkeypatch):
    """By a counter that rises by 3 J a call."""
    import sys
    from types import SimpleNamespace

    drawn = [0]
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: drawn[0],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)

    def call():
        drawn[0] += 3000

    assert joules("cuda:0", call, lambda r: r, 0.1) == 3.0
    assert joules("cpu", call, lambda r: r, 0.1) is None


def test_calls_without_arguments_are_first_run_by_the_clock():
    """Their first call is the one that is timed, and tells the framework."""
    torch = pytest.importorskip("torch")
    runs = []

    def slow_at_first():
        if not runs:
            time.sleep(0.2)
        runs.append(None)
        return torch.ones(2)

    assert profile(slow_at_first, budget_s=0.05).first_s >= 0.2
