"""GradBench's evaluations: both frameworks against numpy's references, the validator against faults, the protocol."""

import importlib.util
import io
import json
import subprocess
import sys
from itertools import product

import numpy as np
import pytest

from frameworks import FRAMEWORKS, load
from gradlab.bench.gradbench import EVALUATIONS
from gradlab.bench.gradbench.inputs import made
from gradlab.bench.gradbench.protocol import answer, functions, serve
from gradlab.bench.gradbench.references import REFERENCES
from gradlab.bench.gradbench.validate import compare, validate

PAIRS = ("ff", "fr", "rf", "rr")
NAMES = {
    "hello": ("square", "double"),
    "gmm": ("objective", "jacobian"),
    "kmeans": ("cost", "dir"),
    "lse": ("primal", "gradient"),
    "llsq": ("primal", "gradient"),
    "ode": ("primal", "gradient"),
    "ba": ("objective", "jacobian"),
    "ht": ("objective", "jacobian"),
    "particle": PAIRS,
    "saddle": PAIRS,
    "det": ("primal", "gradient"),
}
LOOPS = ("particle", "saddle")
QUICK = {
    ("jax", "particle", "fr"),
    ("jax", "saddle", "rf"),
    ("torch", "particle", "rf"),
    ("torch", "saddle", "fr"),
}
COMPILED = {("jax", "gmm", "objective"), ("jax", "ba", "objective"), ("jax", "ht", "objective")}


def cases():
    """All of both frameworks; what compiles or descends for long, and has siblings here, by `make test-all`."""
    for framework, module in product(FRAMEWORKS, EVALUATIONS):
        for function in NAMES[module]:
            case = (framework, module, function)
            long = (module in LOOPS and case not in QUICK) or case in COMPILED
            yield pytest.param(*case, marks=[pytest.mark.slow] * long, id="-".join(case))


@pytest.fixture
def eager():
    """What torch would compile runs as it is."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


def evaluated(framework, module, function, given):
    message = {"id": 1, "kind": "evaluate", "module": module, "function": function, "input": given}
    found = answer(framework, message)
    assert found["success"], found["error"]
    return found


@pytest.mark.parametrize(("framework", "module", "function"), list(cases()))
def test_outputs(framework, module, function, eager):
    load(framework)
    given = made(module, "test")
    found = evaluated(framework, module, function, given)
    assert validate(module, function, given, found["output"]) is None
    assert [timing["name"] for timing in found["timings"]] == ["compile", "evaluate"]
    assert set(functions(framework, module)) == set(NAMES[module])


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["ff", "rr"])
@pytest.mark.parametrize("module", LOOPS)
def test_whole_descents(fw, module, pair):
    """From the suite's own start, a hundred steps or more, compiled."""
    given = made(module, "smoke")
    assert validate(module, pair, given, evaluated(fw.name, module, pair, given)["output"]) is None


@pytest.mark.parametrize("fields", [{"triangles": False}, {"mirrored": True}], ids=["vertices", "mirrored"])
@pytest.mark.parametrize("framework", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
def test_the_other_hands(framework, fields):
    load(framework)
    given = made("ht", "test", **fields)
    for function in NAMES["ht"]:
        output = evaluated(framework, "ht", function, given)["output"]
        assert validate("ht", function, given, output) is None


@pytest.mark.parametrize("fields", [{"m": 2, "gamma": 0.7}, {"d": 1, "k": 1}])
def test_the_mixtures_prior(fields):
    load("torch")
    given = made("gmm", "test", **fields)
    for function in NAMES["gmm"]:
        assert validate("gmm", function, given, evaluated("torch", "gmm", function, given)["output"]) is None


@pytest.mark.parametrize("pair", PAIRS)
def test_the_slope_of_a_path(pair, eager):
    """One path in torch, not compiled, with its tangent or cotangent over every step."""
    load("torch")
    import torch

    side = importlib.import_module("gradlab.bench.gradbench._torch")
    value, slope = side.particle_miss(*pair)(torch.tensor(0.1, dtype=torch.float64))
    again, expected = _path(0.1 + 1e-30j).real, _path(0.1 + 1e-30j).imag / 1e-30
    np.testing.assert_allclose([float(value), float(slope)], [again, expected], rtol=1e-10)


def _path(w):
    """The references' path, here from its slope's own formula: Newton's law with both charges' inverse squares."""
    s = np.array([0, 8, 0.75, 0], complex)
    while (s[1] + 0.1 * s[3]).real > 0:
        away = [s[:2] - place for place in (np.array([10, 10 - w]), np.array([10, 0]))]
        force = sum(r / (r @ r) ** 1.5 for r in away)
        s = s + 0.1 * np.concatenate([s[2:], force])
    return (s[0] - s[1] / s[3] * s[2]) ** 2


def test_references_of_the_suites_constants():
    """The two results that the suite states as numbers."""
    assert compare(0.2071918746486116, REFERENCES["particle"]("ff", {"w": 0.0})) is None
    assert compare([8.246324826140356e-06] * 4, REFERENCES["saddle"]("rr", {"start": [1.0, 1.0]})) is None


@pytest.mark.parametrize(
    ("module", "primal", "derivative", "fields"),
    [
        ("gmm", "objective", "jacobian", ("alpha", "mu", "q", "l")),
        ("lse", "primal", "gradient", ("x",)),
        ("llsq", "primal", "gradient", ("x",)),
        ("ode", "primal", "gradient", ("x",)),
        ("det", "primal", "gradient", ("A",)),
    ],
)
def test_references_by_differences(module, primal, derivative, fields):
    given = made(module, "test")
    exact = REFERENCES[module](derivative, given)
    for name in fields:
        at = np.array(given[name])
        last = lambda x: np.ravel(REFERENCES[module](primal, {**given, name: x.tolist()}))[-1]
        central = lambda e, h: (last(at + h * e) - last(at - h * e)) / (2 * h)
        units = np.eye(at.size).reshape(-1, *at.shape)
        slopes = [(4 * central(e, 1e-3) - central(e, 2e-3)) / 3 for e in units]
        found = exact[name] if isinstance(exact, dict) else exact
        np.testing.assert_allclose(np.ravel(found), slopes, rtol=1e-7, atol=1e-8 * np.abs(slopes).max())


@pytest.mark.parametrize("module", ["gmm", "kmeans", "lse", "llsq", "ode", "ba", "ht", "det"])
def test_faults_are_found(module):
    given, derivative = made(module, "test"), NAMES[module][1]
    right = REFERENCES[module](derivative, given)
    plain = lambda part: (
        {k: plain(v) for k, v in part.items()} if isinstance(part, dict) else np.array(part, float)
    )
    right = plain(right)
    assert validate(module, derivative, given, right) is None
    leaves = right if isinstance(right, dict) else {"": right}

    def fault(change, name):
        leaf = change(leaves[name])
        return validate(module, derivative, given, {**right, name: leaf} if isinstance(right, dict) else leaf)

    def one(part, change):
        part = part.copy()
        part.flat[np.abs(part).argmax()] = change(np.abs(part).max())
        return part

    for name in leaves:
        assert "is zero" in fault(np.zeros_like, name)
        assert "not finite" in fault(lambda part: one(part, lambda _: np.nan), name)
        assert "not finite" in fault(lambda part: one(part, lambda _: np.inf), name)
        assert "shape" in fault(lambda part: part[..., None], name)
        assert "shape" in fault(lambda part: part[:-1], name)
        assert " is " in fault(lambda part: part * (1 + 3e-8), name)
        assert " is " in fault(lambda part: -part, name)
        assert "not an array" in fault(lambda part: [None, "nothing"], name)
    small = leaves[next(reversed(leaves))].copy()
    small.flat[np.abs(small).argmin()] += 1e-6 * np.abs(small).max()
    assert " is " in fault(lambda _: small, next(reversed(leaves)))
    if isinstance(right, dict):
        assert "fields" in validate(module, derivative, given, {**right, "more": 0})


def spoken(framework, *messages):
    """The answers to messages, in this process."""
    answers = io.StringIO()
    serve(framework, [json.dumps({"id": i, **message}) for i, message in enumerate(messages)], answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_answers(fw, monkeypatch):
    module = importlib.import_module(f"gradlab.bench.gradbench._{fw.name}")
    ask = lambda module, function, given: {
        "kind": "evaluate",
        "module": module,
        "function": function,
        "input": given,
    }
    wrong = {"double": lambda x: x * float("nan"), "raises": lambda x: x.nothing}
    monkeypatch.setitem(module.FUNCTIONS, "hello", {**module.FUNCTIONS["hello"], **wrong})
    found = spoken(
        fw.name,
        {"kind": "start", "eval": "lstm"},
        {"kind": "define", "module": "lstm"},
        {"kind": "define", "module": "lse"},
        ask("lse", "gradient", {"x": [1.0, 2.0], "min_runs": 3, "min_seconds": 0}),
        {"kind": "analysis", "of": 3, "valid": True},
        {"kind": "something later"},
        ask("hello", "double", 3.0),
        ask("hello", "raises", 3.0),
        ask("hello", "triple", 3.0),
        ask("hello", "square", 3.0),
    )
    assert [answer["id"] for answer in found] == list(range(10))
    assert found[0] == {"id": 0, "tool": "gradlab", "config": {"framework": fw.name}}
    assert found[1]["success"] is False
    assert "lstm" in found[1]["error"]
    assert found[2] == {"id": 2, "success": True}
    assert [t["name"] for t in found[3]["timings"]] == ["compile", *["evaluate"] * 3]
    assert all(t["nanoseconds"] > 0 for t in found[3]["timings"])
    assert found[4:6] == [{"id": 4}, {"id": 5}]
    for reply, why in zip(found[6:9], ("not finite", "nothing", "square, double"), strict=True):
        assert reply["success"] is False
        assert why in reply["error"]
    assert found[9]["output"] == 9.0


@pytest.mark.parametrize("framework", ["jax", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_process(framework):
    """Float64 without being asked for, and nothing but answers on stdout."""
    load(framework)
    given = made("lse", "test")
    messages = [
        {"id": 5, "kind": "start", "eval": "lse"},
        {"id": 6, "kind": "define", "module": "lse"},
        {"id": 7, "kind": "evaluate", "module": "lse", "function": "gradient", "input": given},
    ]
    command = [sys.executable, "-m", "gradlab.bench.gradbench", "--framework", framework]
    lines = "".join(json.dumps(message) + "\n" for message in messages)
    run = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert [answer["id"] for answer in found] == [5, 6, 7]
    assert validate("lse", "gradient", given, found[2]["output"]) is None


def test_results_are_waited_for(fw, monkeypatch):
    """A run counts until its result is there: the clock is read after `synchronise`."""
    module = importlib.import_module(f"gradlab.bench.gradbench._{fw.name}")
    waited = []
    monkeypatch.setattr(module, "synchronise", lambda result: waited.append(1) or result)
    evaluated(fw.name, "lse", "primal", {"x": [1.0, 2.0], "min_runs": 4})
    assert len(waited) == 5
