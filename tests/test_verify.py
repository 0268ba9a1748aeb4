"""The main job: what is right passes, what is planted wrong fails, and the exit code says so."""

import importlib
import json

import numpy as np
import pytest

from gradlab.bench import verify
from gradlab.bench.verify_case import Lab, Probe, closed_forms, compared, operations, result
from gradlab.bench.verify_one import Verdict, _row, condition

pytest.importorskip("sklearn")
pytest.importorskip("rich")


def examined(framework, name, dtype, spoil=lambda numbers: numbers):
    """A row for each operation on one problem, its numbers spoilt before they are judged."""
    pytest.importorskip(framework)
    probe = Probe(Lab(framework, "float64", "cpu"), name)
    refs, forms = probe.references(), {a.name: a for a in verify.analytics()}
    closed = closed_forms(forms[name], probe) if name in forms else {}
    exact_calls = operations(probe, probe.lab, probe.case, 1000)
    lab = Lab(framework, dtype, "cpu")
    case = lab.case(name)
    rows = []
    for op, call in operations(probe, lab, case, 1000).items():
        exact = result(probe, op, exact_calls[op](probe.case.params))
        kappa = condition(probe, exact_calls[op], exact, op)
        numbers = spoil(result(probe, op, call(case.params)))
        rows.append(_row(probe, op, numbers, refs, Verdict(dtype, kappa, exact, closed.get(op))))
    return rows


def test_right_operations_pass(fw):
    for name, dtype in [("logsumexp", "float64"), ("hilbert", "float32")]:
        rows = examined(fw.name, name, dtype)
        assert [row["operation"] for row in rows] == list(verify.OPERATIONS)
        assert all(row["passed"] for row in rows), [row for row in rows if not row["passed"]]
        assert all(row["closed_form"] is not None for row in rows)


SPOILT = {
    "sign": lambda z: -z,
    "a millionth": lambda z: z * (1 + 1e-6),
    "one entry": lambda z: np.where(np.arange(z.size) == np.argmax(np.abs(z)), 0.0, z),
    "not a number": lambda z: np.where(np.arange(z.size) == 0, np.nan, z),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_wrong_results_fail(fw, spoilt):
    assert not any(row["passed"] for row in examined(fw.name, "quartic", "float64", SPOILT[spoilt]))


def test_differences_alone_see_a_wrong_result(fw):
    """Real data has no closed form: the references must find the fault by themselves."""
    probe = Probe(Lab(fw.name, "float64", "cpu"), "logistic")
    refs = probe.references()
    for op, call in operations(probe, probe.lab, probe.case, 1000).items():
        numbers = result(probe, op, call(probe.case.params))
        part, (value, doubt) = compared(probe, op, numbers, refs)
        scale = np.abs(value).max()
        assert np.abs(part - value).max() <= 10 * doubt.max() + 1e-11 * scale
        assert np.abs(1.0001 * part - value).max() > 10 * doubt.max() + 1e-11 * scale


def fake_rows(passed=True):
    ladder = {"steps": [0.1, 0.01], "error": [1e-2, 1e-4], "chosen": 0.01, "extrapolated": 1e-9}
    for framework in ("jax", "torch"):
        for op in verify.OPERATIONS:
            yield {
                "problem": "quartic", "framework": framework, "dtype": "float64", "operation": op,
                "error": 1e-12, "uncertainty": 1e-12, "closed_form": 1e-16, "condition": 1.0, "ulps": None,
                "passed": passed or op != "hvp", "first_s": 0.2, "median_s": 1e-3, "spread_s": 1e-5,
                "gradients": 1.5, **({"ladder": ladder} if op == "hvp" else {}),
            }  # fmt: skip


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("agree", [True, False])
def test_the_exit_code(monkeypatch, tmp_path, capsys, passed, agree):
    def child(framework, preset, device, dtypes, folder):
        for row in fake_rows(passed):
            if row["framework"] == framework:
                shift = 0.0 if agree or framework == "jax" else 1e-9
                np.save(f"{folder}/{framework}-quartic-{row['operation']}.npy", np.arange(3.0) + shift)
                yield row

    monkeypatch.setattr(verify, "_child", child)
    assert verify.run(out=tmp_path) == (0 if passed and agree else 1)
    record = json.loads((tmp_path / "verify.json").read_text())
    assert record["passed"] == (passed and agree)
    assert len(record["agreement"]) == len(verify.OPERATIONS)
    assert (tmp_path / "verify.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert ("all 27 passed" in shown) == (passed and agree)
    assert "jax against torch" in shown


def test_a_child_that_dies_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="ended with status"):
        list(verify._child("no_such_framework", "smoke", "cpu", ("float64",), str(tmp_path)))


def test_the_command(monkeypatch):
    typer = pytest.importorskip("typer.testing")
    cli = importlib.import_module("gradlab.cli")
    asked = []
    monkeypatch.setattr(verify, "run", lambda *args: asked.append(args) or 1)
    done = typer.CliRunner().invoke(cli.app, ["verify", "--framework", "torch", "--dtype", "float32"])
    assert done.exit_code == 1
    assert asked == [("smoke", "torch", "cpu", "float32", "results")]
    assert typer.CliRunner().invoke(cli.app, ["verify", "--framework", "tensorflow"]).exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_job_itself(framework, tmp_path):
    pytest.importorskip(framework)
    assert verify.run("smoke", framework, out=tmp_path) == 0
