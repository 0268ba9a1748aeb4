"""`gradlab check`: a function of the user's own file, its point as it is named, the table and the exit code."""

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from frameworks import FRAMEWORKS
from gradlab.cli import app

PROBLEM = """
import numpy as np
import {imports}

def cube(x):
    return (x**3).sum()

def model(params, inputs, labels, power=2):
    return ((inputs @ params["w"] + params["b"] - labels) ** power).sum()

def trees(x):
    (a, b), c = x["pair"], x["one"]
    return (a * b).sum() * c

def aux(x):
    return cube(x), "aux"

def broken(x):
    return x.nothing

class Holder:
    power = staticmethod(cube)

point = np.array([1.0, -2.0])
def start():
    return {{"w": np.array([0.5, 1.5]), "b": np.array(0.25)}}

def fails():
    raise RuntimeError("no point today")
"""
TORCH = """
import torch

class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, u):
        (x,) = ctx.saved_tensors
        return x**2 * u

wrong = lambda x: Wrong.apply(x).sum()
tensor = torch.tensor([1.0, 2.0])
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the user's files, which is the current one; its modules are forgotten afterwards."""
    (tmp_path / "problem.py").write_text(PROBLEM.format(imports="math"))
    (tmp_path / "wrong.py").write_text(TORCH)
    (tmp_path / "faulty.py").write_text("\n1 / 0\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "apart.py").write_text("import beside\nf = beside.f\n")
    (tmp_path / "folder" / "beside.py").write_text("f = lambda x: (x**4).sum()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("problem", "wrong", "faulty", "apart", "beside"):
        sys.modules.pop(name, None)


def check(*arguments):
    return CliRunner().invoke(app, ["check", *arguments], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})


def passes(*arguments):
    result = check(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    "arguments",
    [
        ("problem:cube", "--at", "[1.0, -2.0]"),
        ("problem.py:Holder.power", "--at", "problem:point", "--no-vmap"),
        ("folder/apart.py:f", "--at", "[[1, 2], [3, 4]]", "--no-compiled"),
        ("problem:trees", "--at", "{'pair': ([1.0, 2.0], [3.0, 4.0]), 'one': -1.5}", "--order", "1"),
        ("problem:model", "--at", "problem:start", "--data", "[[1.0, 2.0]]", "--data", "[1]", "--data", "3"),
        ("problem:aux", "--at", "x.npy", "--has-aux", "--modes", "reverse", "--order", "1"),
        ("problem:model", "--at", "x.npz", "--data", "[[1.0, 2.0]]", "--data", "[0.5]", "--order", "1"),
    ],
)
def test_points_of_every_kind(here, framework, arguments):
    pytest.importorskip(framework)
    np.save(here / "x.npy", np.array([0.5, 1.5]))
    np.savez(here / "x.npz", w=np.array([0.5, 1.5]), b=np.array(0.25))
    output = passes(*arguments, "--framework", framework)
    assert f"derivatives on {framework}, float64" in output
    assert ("vmap" in output) == ("--no-vmap" not in arguments)


def test_dtypes(here, fw):
    for_this = ("--framework", fw.name, "--order", "1")
    assert "float32" in passes("problem:cube", "--at", "[1.0, 2.0]", "--dtype", "float32", *for_this)
    np.save(here / "x.npy", np.array([0.5, 1.5], "float32"))
    assert "float32" in passes("problem:cube", "--at", "x.npy", *for_this)
    assert "float64" in passes("problem:cube", "--at", "x.npy", "--dtype", "float64", *for_this)


def test_a_wrong_rule(here):
    pytest.importorskip("torch")
    result = check("wrong:wrong", "--at", "wrong:tensor", "--json", "report.json", "--order", "1")
    assert result.exit_code == 1
    assert "derivatives on torch, float32" in result.output
    assert "gradient failed: at x[1], x[0]: 4 where differences give 12, off by 8.0e+00" in result.output
    assert json.loads((here / "report.json").read_text())["passed"] is False


def test_what_cannot_be_decided_is_no_pass(here):
    pytest.importorskip("torch")
    (here / "problem.py").write_text("def kink(x):\n    return abs(x).sum()\n")
    result = check("problem:kink", "--at", "[0.0, 1.0]", "--framework", "torch")
    assert result.exit_code == 1
    assert "gradient inconclusive: differences resolve it to" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cube", "--at", "[1.0]"), "'cube' is no module:name and no path/to/file.py:name"),
        (("absent:f", "--at", "[1.0]"), "there is no module absent, in the current directory or installed"),
        (("absent.py:f", "--at", "[1.0]"), "there is no file absent.py"),
        (
            ("faulty:f", "--at", "[1.0]"),
            "importing faulty failed: ZeroDivisionError: division by zero (faulty.py,",
        ),
        (("problem:cubes", "--at", "[1.0]"), "problem has no cubes"),
        (("problem:point", "--at", "[1.0]"), "f is a ndarray; pass the function"),
        (("problem:cube", "--at", "[1.0"), "'[1.0' is no Python literal"),
        (("problem:cube", "--at", "__import__('os').getcwd()"), "is no Python literal"),
        (("problem:cube", "--at", "[[1.0], [1.0, 2.0]]"), "is ragged; write a tuple of lists for a tree"),
        (("problem:cube", "--at", "['a']"), "is not of numbers alone"),
        (("problem:cube", "--at", "absent.npy"), "absent.npy cannot be read: FileNotFoundError"),
        (
            ("problem:cube", "--at", "problem:fails"),
            "problem:fails() raised RuntimeError: no point today (problem.py",
        ),
        (("problem:cube", "--at", "'text'"), "the arguments hold no jax or torch array"),
        (("problem:cube", "--at", "[1.0]", "--order", "4"), "order is 4; pass 1, 2 or 3"),
        (("problem:model", "--at", "[1.0]"), "problem:model raised TypeError: model() missing 2 required"),
        (("problem:broken", "--at", "[1.0]"), "object has no attribute 'nothing' (problem.py, line"),
        (("problem:cube", "--at", "[1.0]", "--json", "no/where.json"), "there is no folder no"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(here, arguments, message):
    pytest.importorskip("torch")
    result = check(*arguments, "--framework", "torch")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_which_framework(here):
    pytest.importorskip("jax")
    pytest.importorskip("torch")
    result = check("problem:cube", "--at", "[1.0]")
    assert result.exit_code == 2
    assert "your file imports both jax and torch; pass --framework jax or torch" in result.output
    result = check("wrong:wrong", "--at", "wrong:tensor", "--framework", "jax")
    assert result.exit_code == 2
    assert "hold arrays of torch; leave out --framework jax" in result.output


RUN = "from gradlab.cli import main; main()"


def test_the_command_in_a_process_of_its_own(here):
    pytest.importorskip("torch")
    command = [sys.executable, "-c", RUN, "check", "wrong:wrong", "--at", "[1.0, 2.0]", "--order", "1"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1, found.stderr
    assert "gradient failed: at x[1], x[0]: 4 where" in found.stdout
    assert "derivatives on torch, float64" in found.stdout
    found = subprocess.run([*command[:4], "problem:cube", *command[5:]], capture_output=True, text=True)
    assert found.returncode == 2
    assert "neither jax nor torch" in found.stderr
