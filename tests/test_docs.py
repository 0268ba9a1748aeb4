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
    "gradlab.transforms.custom_rules",
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


def needs(text):
    if "privacy" in text:
        pytest.importorskip("dp_accounting")
    for framework in ("jax", "torch"):
        if f"import {framework}" in text:
            pytest.importorskip(framework)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_readme(block):
    code, output = BLOCKS[block]
    needs(code)
    assert printed(code) == output


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
module = importlib.import_module({module!r})
failed = 0
for test in doctest.DocTestFinder().find(module, {module!r}):
    test.globs = {{}}
    failed += doctest.DocTestRunner().run(test).failed
sys.exit(failed > 0)
"""


@pytest.mark.parametrize("module", CONTRACTS)
def test_docstrings(module):
    """Each example has its own names; those of a module share a process, since importing takes seconds."""
    pytest.importorskip("jax")
    pytest.importorskip("torch")
    printed(RUN.format(module=module))


def test_a_wrong_example_is_seen():
    code = RUN.format(module="doctest_of_nothing").replace(
        "module = importlib.import_module('doctest_of_nothing')",
        "import types; module = types.ModuleType('doctest_of_nothing', '>>> 1 + 1\\n3\\n')",
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert run.returncode == 1
