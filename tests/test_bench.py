"""The measuring instruments: problems equal in both frameworks, a clock that compares, honest records."""

import importlib
import json

import numpy as np
import pytest

from frameworks import FRAMEWORKS
from gradlab.bench import append, environment, interleave, ratio
from gradlab.bench.memory import peak
from gradlab.bench.problems import CHECKED, MEASURED, analytics

pytest.importorskip("sklearn")


def side(framework):
    pytest.importorskip(framework)
    return importlib.import_module(f"gradlab.bench._{framework}")


def losses(framework, problem, dtype="float64"):
    functions = side(framework)
    args = functions.arrays((problem.params, problem.inputs, problem.targets), dtype)
    return float(functions.loss(problem)(*args))


@pytest.mark.parametrize("name", [*CHECKED, *MEASURED])
def test_problems_are_the_same_in_both_frameworks(name):
    problem = {**CHECKED, **MEASURED}[name]()
    a, b = (losses(framework, problem) for framework in FRAMEWORKS)
    assert abs(a - b) < 1e-12 * abs(a)
    assert abs(losses("torch", problem, "float32") - a) < 1e-5 * abs(a)


def test_sizes_are_what_their_names_say():
    assert 9_000 < MEASURED["mlp_10k"]().size < 11_000
    wide = MEASURED["mlp_784"]()
    assert wide.inputs.shape == (256, 784)
    assert wide.size == 784 * 512 + 512 * 512 + 512 * 10 + 512 + 512 + 10
    decoder = MEASURED["transformer_128"]()
    assert decoder.params["embed"].shape[1] == 128
    assert decoder.inputs.shape[1] == 64


@pytest.mark.parametrize("a", analytics(), ids=lambda a: a.name)
def test_closed_forms(a):
    """By complex steps and differences of the closed gradient: neither framework is asked."""
    n, h = a.x.size, 1e-6
    for i in range(n):
        e = np.eye(n)[i]
        slope = (a.f(np, a.x + h * e) - a.f(np, a.x - h * e)) / (2 * h)
        assert abs(slope - a.gradient[i]) < 1e-4 * max(np.abs(a.gradient).max(), 1)
    assert np.allclose(a.hessian, a.hessian.T)
    assert (a.x == a.x.astype(np.float32)).all()


def test_one_function_is_ill_conditioned():
    assert max(np.linalg.cond(a.hessian) for a in analytics()) > 1e9


class FakeClock:
    """Time that passes only when a call says so."""

    def __init__(self):
        self.time, self.order = 0.0, []

    def call(self, name, seconds, first=0.0):
        extra = [first]

        def run():
            self.order.append(name)
            self.time += seconds + (extra.pop() if extra else 0.0)

        return run

    def now(self):
        return self.time


def test_the_clock_interleaves_and_rotates():
    clock = FakeClock()
    calls = {"a": clock.call("a", 2.0, first=5.0), "b": clock.call("b", 1.0)}
    timings = interleave(calls, synchronise=lambda r: r, repeats=4, warmup=1, now=clock.now)
    assert timings["a"].first_s == 7.0
    assert timings["a"].median_s == 2.0
    assert timings["b"].spread_s == 0.0
    assert ratio(timings["a"], timings["b"]) == (2.0, 2.0, 2.0)
    assert clock.order[4:] == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_a_unit_is_timed_warm():
    clock, last = FakeClock(), [""]

    def call(name, seconds):
        def run():
            clock.time += seconds if last[0] == name else 10 * seconds  # after the other one it is cold
            last[0] = name

        return run

    timings = interleave(
        {"unit": call("unit", 1.0), "a": call("a", 2.0)},
        synchronise=lambda r: r,
        repeats=4,
        warm="unit",
        now=clock.now,
    )
    assert timings["unit"].best_s == timings["unit"].median_s == 1.0


def test_the_clock_keeps_to_its_budget():
    clock = FakeClock()
    calls = {"a": clock.call("a", 1.0)}
    timings = interleave(calls, synchronise=lambda r: r, repeats=100, budget_s=5.0, now=clock.now)
    assert 3 <= len(timings["a"].samples) <= 7


def test_the_clock_waits_for_results():
    waited = []
    interleave({"a": lambda: "result"}, synchronise=waited.append, repeats=3)
    assert set(waited) == {"result"}


def test_peak_memory_of_a_known_allocation():
    torch = pytest.importorskip("torch")
    hold = lambda: (torch.ones(1000, 1000) + 1.0).sum()
    assert 8e6 <= peak("torch", hold) < 9e6  # the ones and their sum with one, float32
    jnp = pytest.importorskip("jax.numpy")
    x = jnp.ones((1000, 1000), jnp.float32)
    assert 8e6 <= peak("jax", lambda x: jnp.tanh(x) @ x, x) < 9e6  # its operand and its result


def test_records_say_where_they_come_from(tmp_path):
    for value in (1, 2):
        append(tmp_path / "deep" / "r.jsonl", {"value": value, "environment": environment()})
    rows = [json.loads(line) for line in (tmp_path / "deep" / "r.jsonl").read_text().splitlines()]
    assert [row["value"] for row in rows] == [1, 2]
    assert {"versions", "processor", "cores", "commit", "dirty", "python", "time"} <= set(
        rows[0]["environment"]
    )
    assert "numpy" in rows[0]["environment"]["versions"]


def test_a_wrong_variant_gets_no_speed():
    suite = importlib.import_module("gradlab.bench.suite")
    right, wrong = np.ones(3), np.array([1.0, 1.0, 1.1])

    def refused():
        raise ValueError("no such strategy here")

    case = suite.Case(lambda: right, {"a": lambda: right, "b": lambda: wrong, "c": refused}, lambda: right)
    row = suite.measure(case, lambda r: r, repeats=3, budget=1.0)
    assert row["best_by_hand"] == "a"
    assert "ratio_to_best" in row
    for name in ("b", "c"):
        assert row["variants"][name]["verdict"] == "wrong"
        assert "median_s" not in row["variants"][name]
    case.ours = lambda: wrong
    assert "ratio_to_best" not in suite.measure(case, lambda r: r, repeats=3, budget=1.0)


def test_a_cell_is_measured_or_skipped_or_failed():
    suite = importlib.import_module("gradlab.bench.suite")
    pytest.importorskip("torch")
    options = {"repeats": 3, "budget": 0.1}
    one = lambda: np.ones(3)
    case = suite.Case(one, {"hand": one}, one)
    run = lambda make, lacks="": suite.Cell("p", "op", "eager", make, lacks).run(
        "torch", "cpu", lambda r: r, options
    )

    def short_of_memory():
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 TiB")

    def broken():
        raise TypeError("no such thing\nsecond line")

    assert run(lambda: case)["ratio_to_best"]
    assert run(lambda: case, "no compiler") == {
        "problem": "p", "operation": "op", "mode": "eager", "skipped": "no compiler"
    }  # fmt: skip
    assert "out of memory" in run(short_of_memory)["skipped"]
    assert run(broken)["failed"] == "TypeError: no such thing"
    case.ours = short_of_memory
    assert "skipped" in run(lambda: case)


ROW = {
    "problem": "p",
    "operation": "op",
    "mode": "eager",
    "best_by_hand": "hand",
    "ratio_to_best": [1.0, 0.9, 1.1],
}
VARIANT = {
    "error": 0.0,
    "verdict": "right",
    "first_s": 1.0,
    "median_s": 1.0,
    "spread_s": 0.1,
    "gradients": 1.0,
}


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    """Stopped by the user after two cells, ended by a cell at the fourth, then whole; and --fresh."""
    suite = importlib.import_module("gradlab.bench.suite")
    plan = [f"p | op{i} | eager" for i in range(5)]
    ran = []

    def child(config, kept, show):
        for key in [key for key in plan if key not in kept.rows]:
            if len(ran) == 2:
                ran.append("interrupt")
                raise KeyboardInterrupt
            ran.append(key)
            if key == plan[3]:
                return {"plan": plan}, key, -9
            variants = {"gradlab": VARIANT, "hand": VARIANT}
            kept.add(key, {**ROW, "operation": key.split(" | ")[1], "variants": variants})
            show(key, len(kept.rows), len(plan))
        return {"plan": plan}, "", 0

    monkeypatch.setattr(suite, "_child", child)
    go = lambda **options: suite.run("smoke", "torch", "cpu", "float32", tmp_path, **options)
    assert go() == 130
    assert not (tmp_path / "bench.jsonl").exists()
    with (tmp_path / "bench.unfinished.jsonl").open("a") as file:
        file.write('{"run": "killed in the mid')
    assert suite.Unfinished(tmp_path / "bench.unfinished.jsonl", {"framework": "jax"}, False).rows == {}
    assert go() == 1  # a cell ended its process
    assert ran == [plan[0], plan[1], "interrupt", *plan[2:]]
    record = json.loads((tmp_path / "bench.jsonl").read_text())
    assert [row["operation"] for row in record["rows"]] == [f"op{i}" for i in range(5)]
    assert "status -9" in record["rows"][3]["failed"]
    assert not (tmp_path / "bench.unfinished.jsonl").exists()
    ran[:] = []
    assert go() == 130
    ran[:] = []
    assert go(fresh=True) == 130
    assert ran[:2] == plan[:2]


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_case_of_the_smoke_benchmark_is_right(framework):
    functions, suite = side(framework), importlib.import_module(f"gradlab.bench._suite_{framework}")
    for cell in suite.cells(["mlp_10k", "mlp_500", "solutions"], "float32", "cpu"):
        if cell.mode == "eager" or framework == "jax":
            row = cell.run(framework, "cpu", functions.synchronise, {"repeats": 3, "budget": 0.1})
            assert "ratio_to_best" in row, row
