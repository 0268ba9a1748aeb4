"""The pytest plugin in other people's projects: each test here runs a small project of its own."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

pytest_plugins = ["pytester"]

STRICT = "[pytest]\naddopts = --strict-markers -ra\nfilterwarnings = error\n"


def need(framework):
    """Skip without importing, since pytester forgets what is imported in its tests, which torch does not survive."""
    if find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")


@pytest.fixture
def project(pytester, monkeypatch):
    """A directory beside which gradlab is installed, as its entry points say, whether it is in fact or not."""
    installed = pytester.mkdir("installed")
    info = installed / "gradlab_as_installed-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gradlab-as-installed\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[pytest11]\ngradlab = gradlab.pytest_plugin\n")
    path = [str(installed), *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", ":".join(path))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makefile(".ini", pytest=STRICT)
    return pytester


def run(project, source, *options):
    project.makepyfile(source)
    return project.runpytest_subprocess("-p", "no:cacheprovider", *options)


def blocked(framework):
    """A conftest under which a framework is as if not installed."""
    return f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {framework!r}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
"""


MARKED = """
    import pytest

    @pytest.mark.gradlab_check({arguments})
    def test_cube(check_derivatives):
        x = check_derivatives.array([1.0, -2.0])
        assert check_derivatives.dtype in str(x.dtype)
        assert check_derivatives.framework in str(type(x))
        report = check_derivatives(lambda x: (x**3).sum(), x, compiled=False)
        assert report.passed and report.framework == check_derivatives.framework
        assert report.dtype == check_derivatives.dtype
        assert ("vmap" in [row.claim for row in report.rows]) == {vmap}
"""


def test_a_marked_test_runs_for_each_framework_and_dtype(project):
    need("jax")
    need("torch")
    after = """
    def test_float64_is_of_that_test_alone():
        import jax.numpy as jnp
        assert jnp.ones(1).dtype == "float32"

    @pytest.mark.gradlab_check(frameworks="jax", dtypes="float64")
    @pytest.mark.parametrize("power", [2, 3])
    def test_beside_other_parameters(check_derivatives, power):
        check_derivatives(lambda z: (abs(z) ** power).sum(), check_derivatives.array([1 + 2j]), order=1)
    """
    result = run(project, MARKED.format(arguments="order=1, vmap=False", vmap=False) + after, "-v")
    result.assert_outcomes(passed=7)
    names = [f"{framework}-{dtype}" for framework in ("jax", "torch") for dtype in ("float32", "float64")]
    result.stdout.fnmatch_lines([f"*test_cube?{name}?*" for name in names])


@pytest.mark.parametrize(("absent", "present"), [("jax", "torch"), ("torch", "jax")])
def test_an_absent_framework_is_skipped(project, absent, present):
    need(present)
    project.makeconftest(blocked(absent))
    result = run(project, MARKED.format(arguments="dtypes=['float32']", vmap=True))
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines([f"*gradlab_check: {absent} is not installed*"])


WRONG = """
    import torch

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, u):
            (x,) = ctx.saved_tensors
            return x**2 * u * torch.tensor([3.0, 1.0])

    def test_wrong(check_derivatives):
        x = torch.tensor([1.0, 2.0])
        check_derivatives(lambda x: Cube.apply(x).sum(), x, order=1)  # here

    def test_caught(check_derivatives):
        import pytest
        from gradlab.check import CheckError
        with pytest.raises(CheckError, match="off by"):
            check_derivatives(lambda x: Cube.apply(x).sum(), torch.tensor([1.0, 2.0]), order=1)

    def test_error_of_the_function(check_derivatives):
        check_derivatives(lambda x: x.nothing, torch.tensor([1.0, 2.0]))
"""


def test_a_wrong_rule_fails_at_the_line_of_the_test(project):
    need("torch")
    result = run(project, WRONG)
    result.assert_outcomes(passed=1, failed=2)
    wrong = result.stdout.str().split("test_error_of_the_function ____")[0]
    expected = [
        ">       check_derivatives(lambda x: Cube.apply(x).sum(), x, order=1)  # here",
        "E       gradlab.check.report.CheckError: derivatives on torch, float32:",
        "E       gradient failed: at x[[]1]: 4 where differences give 12, off by 8.0e+00",
        "E       claim * status * error * uncertainty * where",
        "E       gradient * failed * x[[]1]",
    ]
    result.stdout.fnmatch_lines(expected)
    assert "report.py" not in wrong
    assert "pytest_plugin.py" not in wrong
    result.stdout.fnmatch_lines(["*AttributeError: 'Tensor' object has no attribute 'nothing'"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("frameworks=['tensorflow']", "frameworks is 'tensorflow'; choose from jax, torch"),
        ("dtypes='float128'", "dtypes is 'float128'; choose from bfloat16, float16, float32, float64"),
        ("dtypes=[]", "dtypes is empty; choose from"),
        ("ordre=2", "no option 'ordre'; choose from frameworks, dtypes, order, modes"),
        ("'jax'", "it takes keywords alone, not 'jax'"),
    ],
)
def test_a_wrong_marker_is_an_error_of_collection(project, arguments, message):
    result = run(project, MARKED.format(arguments=arguments, vmap=True))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*gradlab_check: {message}*"])
    assert "pytest_plugin.py" not in result.stdout.str()


UNUSED = """
    import pytest

    pytestmark = pytest.mark.gradlab_check(order=1)

    def test_beside():
        pass
"""


def test_a_marked_test_without_the_fixture(project):
    run(project, UNUSED).assert_outcomes(passed=1)
    result = run(
        project, UNUSED + "\n    @pytest.mark.gradlab_check()\n    def test_of_nothing():\n        pass"
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*test_of_nothing does not take the fixture check_derivatives"])


def test_an_array_needs_the_marker(project):
    result = run(project, "def test_of_no_framework(check_derivatives):\n    check_derivatives.array([1.0])")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["check_derivatives.array: mark the test with @pytest.mark.gradlab_check"])


def test_the_marker_is_registered_and_the_plugin_can_be_left_out(project):
    result = run(project, "", "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.gradlab_check(frameworks=('jax', 'torch'), *"])
    result = run(project, MARKED.format(arguments="", vmap=True), "-p", "no:gradlab")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*'gradlab_check' not found in `markers` configuration option"])


def test_loading_it_imports_nothing_heavy():
    heavy = "{'jax', 'torch', 'numpy', 'scipy', 'rich', 'typer', 'hypothesis', 'gradlab.check'}"
    code = f"import sys, gradlab.pytest_plugin\nprint(*set(sys.modules) & {heavy})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
    planted = code.replace("gradlab.pytest_plugin", "gradlab.pytest_plugin, gradlab.check")
    found = subprocess.run([sys.executable, "-c", planted], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "gradlab.check"
