"""The two frameworks under one set of names, so that a test is written once."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest

FRAMEWORKS = ["jax", "torch"]
EACH = ["torch", pytest.param("jax", marks=pytest.mark.slow)]  # where jax compiles for long


def load(name):
    """The framework's namespace; skips the test when the framework is not installed."""
    pytest.importorskip(name)
    return {"jax": _jax, "torch": _torch}[name]()


def _jax():
    import jax
    import jax.numpy as jnp

    return SimpleNamespace(
        name="jax",
        gl=importlib.import_module("gradlab.jax"),
        xp=jnp,
        array=lambda a, dtype=None: jnp.asarray(a, dtype),
        is_array=lambda a: isinstance(a, jax.Array),
        numpy=np.asarray,
        map=lambda f, tree: jax.tree.map(f, tree),
        compile=jax.jit,
        vmap=jax.vmap,
        grad=jax.grad,
        jacfwd=jax.jacfwd,
        jacrev=jax.jacrev,
        jvp=lambda f, x, v: jax.jvp(f, (x,), (v,))[1],
        primal=lambda f, x: jax.vjp(f, x)[0],
        vjp=lambda f, x, u: jax.vjp(f, x)[1](u)[0],
    )


def _torch():
    import torch
    from torch.utils import _pytree as pytree

    def compile(f, backend="aot_eager"):
        torch._dynamo.reset()
        return torch.compile(f, backend=backend, fullgraph=True)

    return SimpleNamespace(
        name="torch",
        gl=importlib.import_module("gradlab.torch"),
        xp=torch,
        array=lambda a, dtype=None: torch.tensor(np.asarray(a, dtype)),
        is_array=lambda a: isinstance(a, torch.Tensor),
        numpy=lambda a: a.detach().numpy(),
        map=pytree.tree_map,
        compile=compile,
        vmap=torch.func.vmap,
        grad=torch.func.grad,
        jacfwd=torch.func.jacfwd,
        jacrev=torch.func.jacrev,
        jvp=lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
        primal=lambda f, x: torch.func.vjp(f, x)[0],
        vjp=lambda f, x, u: torch.func.vjp(f, x)[1](u)[0],
    )


def arrays(fw, tree, dtype=None):
    """A tree of numpy arrays as the framework's arrays; everything else as it stands."""
    return fw.map(lambda leaf: fw.array(leaf, dtype) if isinstance(leaf, np.ndarray) else leaf, tree)


def leaves(tree):
    """The arrays of a tree in its own order, None and other constants left out."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [leaf for child in tree for leaf in leaves(child)]
    return [tree] if hasattr(tree, "shape") else []


def flat(fw, tree, lead=0):
    """All floats of a result tree as one numpy vector, behind `lead` leading axes."""
    parts = [fw.numpy(leaf) for leaf in leaves(tree)]
    return np.concatenate([part.reshape(*part.shape[:lead], -1) for part in parts], axis=-1)
