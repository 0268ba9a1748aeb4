"""The README's code prints what it says, and docstring examples run as they stand, in a fresh process each."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", README, re.DOTALL)
CONTRACTS = [
    "gradlab.bench.profiling",
    "gradlab.check",
    "gradlab.interop",
    "gradlab.transforms.custom_rules",
    "gradlab.transforms.distributed",
    "gradlab.transforms.flows",
    "gradlab.transforms.gradient_statistics",
    "gradlab.transforms.hessians",
    "gradlab.transforms.implicit_functions",
    "gradlab.transforms.jacobians",
    "gradlab.transforms.meta",
    "gradlab.transforms.models",
    "gradlab.transforms.odes",
    "gradlab.transforms.operators",
    "gradlab.transforms.per_example",
    "gradlab.transforms.optimizers",
    "gradlab.transforms.rules",
    "gradlab.transforms.steady_states",
]


def printed(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


END = "=== the end of a block"


def needed(text):
    """The framework of a block."""
    if "privacy" in text:
        pytest.importorskip("dp_accounting")
    return "jax" if "import jax" in text else "torch"


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_readme(framework):
    """The blocks of a framework, each with names of its own; in one process, since importing takes seconds."""
    pytest.importorskip(framework)
    blocks = [(code, output) for code, output in BLOCKS if needed(code) == framework]
    assert blocks
    codes = [code for code, _ in blocks]
    found = printed(f"for code in {codes!r}:\n    exec(code, {{'__name__': '__main__'}})\n    print({END!r})")
    assert found.split(END + "\n")[:-1] == [output for _, output in blocks]


def test_every_readme_example_is_run():
    assert len(BLOCKS) == README.count("```python") >= 4


def test_readme_names_every_operation():
    import gradlab

    for name in gradlab.__all__:
        if name[0].islower():
            assert f"`{name}(" in README


EXAMPLES = [
    (module, test.name)
    for module in CONTRACTS
    for test in doctest.DocTestFinder().find(importlib.import_module(module), module)
    if test.examples
]


def test_every_operation_has_an_example():
    import gradlab

    shown = {name.rpartition(".")[2] for _, name in EXAMPLES}
    assert {name for name in gradlab.__all__ if name[0].islower()} <= shown


RUN = """
import doctest, importlib, sys
failed = 0
for name in {modules!r}:
    for test in doctest.DocTestFinder().find(importlib.import_module(name), name):
        test.globs = {{}}
        failed += doctest.DocTestRunner().run(test).failed
sys.exit(failed > 0)
"""


@pytest.mark.parametrize("modules", [CONTRACTS[::2], CONTRACTS[1::2]], ids=["half", "other"])
def test_docstrings(modules):
    """Each example has its own names; those of many modules share a process, since importing takes seconds."""
    pytest.importorskip("jax")
    pytest.importorskip("torch")
    printed(RUN.format(modules=modules))


def test_a_wrong_example_is_seen():
    code = RUN.format(modules=["doctest_of_nothing"]).replace(
        "importlib.import_module(name)",
        "__import__('types').ModuleType('doctest_of_nothing', '>>> 1 + 1\\n3\\n')",
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert run.returncode == 1
