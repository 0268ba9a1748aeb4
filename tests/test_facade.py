"""The façade: pure import, dispatch, one framework alone, equal signatures on both sides."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import numpy as np
import pytest

import gradlab
import gradlab.transforms
from frameworks import FRAMEWORKS

HEAVY = ["jax", "jaxlib", "torch", "equinox", "diffrax", "optax", "matplotlib", "numpy", "scipy"]
TOPICS = [
    "custom_rules",
    "distributed",
    "flows",
    "gradient_statistics",
    "hessians",
    "implicit_functions",
    "jacobians",
    "meta",
    "models",
    "odes",
    "optimizers",
    "per_example",
    "rules",
    "steady_states",
]
LIBRARIES = ["distributed", "optimizers", "rules"]  # namespaces of their own


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def loaded_after(statement):
    code = f"import sys\n{statement}\nprint(*sorted(set(sys.modules) & set({HEAVY})))"
    return python(code).stdout.split()


def test_import_loads_no_framework():
    assert loaded_after("import gradlab") == []
    assert loaded_after("from gradlab import *") == []
    assert loaded_after("import gradlab; gradlab.interop.as_jax") == []


def test_the_test_of_purity_can_fail():
    assert "numpy" in loaded_after("import gradlab, numpy")
    for framework in FRAMEWORKS:
        if importlib.util.find_spec(framework):
            assert framework in loaded_after(f"import gradlab.{framework}")


def test_import_executes_little_code():
    """Below 0.1 s on any machine: what importing loads is counted, not timed. Contracts, and little else."""
    code = "import sys; before = set(sys.modules); import gradlab; print(*(set(sys.modules) - before))"
    loaded = python(code).stdout.split()
    ours = [name for name in loaded if name.startswith("gradlab")]
    assert not [name for name in ours if "._jax" in name or "._torch" in name]
    assert len(loaded) - len(ours) < 50, loaded


BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocker())
"""
OTHERS = {
    "jax": ("{'torch'}", "import jax.numpy as xp; from gradlab.jax import *", "xp.ones(2)"),
    "torch": (
        "{'jax', 'jaxlib', 'equinox', 'diffrax', 'optax', 'lineax', 'optimistix'}",
        "import torch as xp; from gradlab.torch import *",
        "xp.ones(2)",
    ),
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_one_framework_alone_is_enough(framework):
    pytest.importorskip(framework)
    blocked, imports, x = OTHERS[framework]
    code = (
        BLOCK.format(blocked=blocked)
        + f"{imports}\nimport gradlab\nf = lambda x: (x**3).sum()\nx = {x}\n"
        + "print(float(hvp(f, x, x)[0]), float(gradlab.hvp(f, x, x)[0]), hessian_operator(f, x).shape)\n"
        + "import gradlab.check\nprint(gradlab.check.derivatives(f, x).passed)\n"
    )
    result = python(code)
    assert result.stdout.split("\n")[:2] == ["6.0 6.0 (2, 2)", "True"], result.stderr


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_blocking_works(framework):
    blocked = OTHERS[framework][0]
    other = "torch" if framework == "jax" else "jax"
    assert "ModuleNotFoundError" in python(BLOCK.format(blocked=blocked) + f"import {other}").stderr


def topics():
    found = [name for _, name, is_package in pkgutil.iter_modules(gradlab.transforms.__path__) if is_package]
    return sorted(found)


def differences(contract, implementation):
    """What a caller would notice: names, kinds, defaults and annotations of the parameters."""
    left, right = inspect.signature(contract), inspect.signature(implementation)
    if list(left.parameters) != list(right.parameters):
        return f"{list(left.parameters)} against {list(right.parameters)}"
    for a, b in zip(left.parameters.values(), right.parameters.values(), strict=True):
        if (a.kind, a.default) != (b.kind, b.default):
            return f"{a} against {b}"
    return ""


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("topic", TOPICS)
def test_implementations_have_the_contract_signatures(framework, topic):
    pytest.importorskip(framework)
    contracts = importlib.import_module(f"gradlab.transforms.{topic}")
    implementations = importlib.import_module(f"gradlab.transforms.{topic}._{framework}")
    for name in contracts.__all__:
        assert not differences(getattr(contracts, name), getattr(implementations, name)), name


def test_planted_differences_are_seen():
    def contract(f, x, *args, chunk_size=None): ...
    def renamed(f, y, *args, chunk_size=None): ...
    def other_default(f, x, *args, chunk_size=1): ...
    def positional(f, x, chunk_size=None, *args): ...
    def missing(f, x, *args): ...

    for planted in (renamed, other_default, positional, missing):
        assert differences(contract, planted)
    assert not differences(contract, contract)


def test_private_topics_are_twins():
    """Tree has the same public names in both frameworks."""
    pytest.importorskip("jax")
    pytest.importorskip("torch")
    public = lambda cls: {name for name in vars(cls) if not name.startswith("_")}
    jax_tree = importlib.import_module("gradlab.transforms.trees._jax").Tree
    torch_tree = importlib.import_module("gradlab.transforms.trees._torch").Tree
    only_jax = {"unit"}  # one direction by a traced index, for jax.lax.map
    assert public(jax_tree) - only_jax == public(torch_tree)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_namespaces_hold_every_operation(framework):
    pytest.importorskip(framework)
    namespace = importlib.import_module(f"gradlab.{framework}")
    operations = [
        name
        for topic in TOPICS
        if topic not in LIBRARIES
        for name in importlib.import_module(f"gradlab.transforms.{topic}").__all__
    ]
    assert sorted(namespace.__all__) == sorted([*operations, *LIBRARIES])
    assert set(operations) <= set(gradlab.__all__)
    assert set(TOPICS) <= set(topics())


def test_dispatch_follows_the_arguments(fw):
    x = fw.array(np.array([1.0, 2.0]))
    f = lambda x, *data: (x**3).sum()
    for arguments in ((x, x), (x, x, 3, "text", None), (x, x, {"deep": [x, (1, x)]})):
        assert fw.is_array(gradlab.hvp(f, *arguments))
    tree = {"layers": [{"w": x}], "n": 3}
    H = gradlab.hessian(lambda t: (t["layers"][0]["w"] ** 3).sum(), tree)
    assert fw.is_array(H["layers"][0]["w"]["layers"][0]["w"])


def test_dispatch_sees_into_registered_nodes():
    eqx, jnp = pytest.importorskip("equinox"), pytest.importorskip("jax.numpy")

    class Point(eqx.Module):
        a: object
        name: str = "point"

    p = Point(jnp.array([1.0, 2.0]))
    product = gradlab.hvp(lambda p: (p.a**3).sum(), p, p)
    assert isinstance(product, Point)
    assert product.name is None
    np.testing.assert_allclose(product.a, [6.0, 24.0])


def test_every_public_function_is_documented():
    for name in gradlab.__all__:
        thing = getattr(gradlab, name)
        assert thing.__doc__, name
        if inspect.isfunction(thing):
            for section in ("Args:", "Returns:", "Raises:", "Cost:", "Example:", "Source:"):
                assert section in thing.__doc__, f"{name} lacks {section}"
