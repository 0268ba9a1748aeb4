"""The audit and what is made of it: an alarm is listed with its reproduction or shown; pages and table agree."""

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from gradlab.bench import audit, known_wrong

ROOT = Path(__file__).parents[1]
TABLE = json.loads((ROOT / "src/gradlab/transforms/repairs/known_wrong.json").read_text())
CODE = 'wrong, right = 2.0, 1.0; print(f"{wrong} where {right} is right")'


def line(name, *nodes, **rows):
    """An audit's line: claims by name, with their status."""
    found = {claim: {"status": status, "error": 1.0, "message": ""} for claim, status in rows.items()}
    return {"name": name, "variant": "", "claims": len(rows), "rows": found, "nodes": list(nodes)}


def test_an_alarm_with_a_reproduction_is_listed():
    lines = [line("f.norm", "A", "B", jvp="failed", vjp="passed"), line("f.sum", "A")]
    found, alarms = known_wrong.entries(lines, {"f.norm": CODE}, {"f.norm": ("f.Norm",)}, {})
    assert not alarms
    (entry,) = found
    assert entry["operation"] == "f.norm"
    assert entry["failed"] == ["jvp"]
    assert entry["nodes"] == ["B"]  # A is in the graph of a right operation too
    assert entry["aliases"] == ["f.Norm"]
    assert (entry["relative_error"], entry["output"]) == (1.0, "2.0 where 1.0 is right")


def test_an_alarm_without_one_is_left_for_a_person():
    found, alarms = known_wrong.entries([line("f.norm", jvp="failed")], {}, {}, {})
    assert not found
    assert [a["name"] for a in alarms] == ["f.norm"]


def test_an_explained_alarm_is_neither():
    found, alarms = known_wrong.entries([line("f.draw", jvp="failed")], {}, {}, {"f.draw": "it draws"})
    assert not found
    assert not alarms


def test_an_explained_row_is_left_out_of_what_is_listed():
    lines = [line("f.norm", jvp="failed", vjp="failed")]
    (entry,), _ = known_wrong.entries(lines, {"f.norm": CODE}, {}, {"f.norm: vjp": "rounding"})
    assert entry["failed"] == ["jvp"]


def test_an_operation_without_any_second_derivative_is_listed():
    refused = line("f.once", **dict.fromkeys(known_wrong.SECOND, "unsupported"))
    (entry,), _ = known_wrong.entries([refused], {}, {}, {})
    assert (entry["operation"], entry["failed"]) == ("f.once", [])


def test_a_reproduction_that_shows_no_fault_is_refused():
    with pytest.raises(ValueError, match="shows no fault"):
        known_wrong.reproduced(CODE.replace("2.0", "1.0"))


def test_a_wrong_rule_raises_an_alarm_and_a_slow_case_is_skipped():
    torch = pytest.importorskip("torch")

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, u):
            return 2.001 * ctx.saved_tensors[0] * u

    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = audit.audited("torch", audit.Operator("wrong", "", Wrong.apply, x), 60.0)
    assert "vjp" in audit.alarms(found)
    assert found["nodes"] == ["WrongBackward"]
    slow = audit.Operator("slow", "", lambda x: (time.sleep(0.1), x)[1], x)
    assert "more than 0.2 s" in audit.audited("torch", slow, 0.2)["skipped"]


def test_a_case_that_hangs_is_ended_and_written_down(tmp_path, monkeypatch):
    """XLA does not let go of a loop for a signal's handler; what runs after it is the next case."""
    worker = tmp_path / "python"
    case = json.dumps({"number": 0, "of": 1, "name": "hangs"})
    worker.write_text(f"#!/bin/sh\n[ $4 = 1 ] && exit 0\necho '{case}'\nexec sleep 60\n")
    worker.chmod(0o755)
    monkeypatch.setattr(audit.sys, "executable", str(worker))
    audit.run("torch", tmp_path / "lines", 0.1, lambda *_: None)
    assert json.loads((tmp_path / "lines").read_text())["skipped"] == "ended its process, status -9"


@pytest.mark.parametrize("framework", sorted({name.split()[0] for name in TABLE}))
def test_the_page_is_made_from_the_table(framework):
    page = (ROOT / f"docs/{framework}_known_wrong.md").read_text()
    assert page == known_wrong.page(framework, TABLE)


@pytest.mark.slow
@pytest.mark.parametrize("framework", sorted({name.split()[0] for name in TABLE}))
def test_every_reproduction_prints_what_the_page_says(framework):
    pytest.importorskip(framework)
    name = f"{framework} {version(framework).split('+')[0]}"
    entries = [entry for entry in TABLE.get(name, []) if entry["failed"]]
    script = "import json, sys\nfor code in json.load(sys.stdin): exec(code, {})"
    codes = json.dumps([entry["reproduction"] for entry in entries])
    run = subprocess.run([sys.executable, "-c", script], input=codes, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [entry["output"] for entry in entries]


def test_what_is_known_of_jax_is_of_operations_that_the_audit_runs():
    pytest.importorskip("jax")
    from gradlab.bench import audit_jax

    names = {audit_jax.name(point, expression) for point, expression, _ in audit_jax.lines()}
    assert len(names) > 150
    assert {*audit_jax.FAULTS, *audit_jax.EXPLAINED} <= names


@pytest.mark.parametrize(
    ("point", "expression", "operation"),
    [
        ("normal(key(0), (3,))", "(jnp.linalg.svdvals(x) ** 4).sum()", "jax.numpy.linalg.svdvals"),
        ("normal(key(0), (3,))", "x.at[jnp.array([0])].power(2)", "jax.numpy.ndarray.at.power"),
        ("(eqx.nn.LayerNorm(4), jnp.zeros(4))", "x[0](x[1])", "equinox.nn.LayerNorm"),
        ("jnp.zeros(3)", "odeint(lambda y, t: -y, x, x)", "jax.experimental.ode.odeint"),
    ],
)
def test_a_case_of_jax_is_named_by_its_operation(point, expression, operation):
    pytest.importorskip("jax")
    from gradlab.bench import audit_jax

    assert audit_jax.name(point, expression) == operation
