"""Per-example operations of the same model, weights and data in jax and in torch."""

import importlib

import numpy as np
import pytest

from frameworks import FRAMEWORKS, flat, load
from gradlab.bench.problems import CHECKED, decoder

pytest.importorskip("sklearn")
PROBLEMS = {**CHECKED, "decoder": lambda: decoder(d=8, length=6, batch=5, vocabulary=9, blocks=1)}


def found(framework, problem):
    """Gradients, norms, norms of leaves, clipped sums and dot products of five examples, as numpy arrays."""
    fw, functions = load(framework), importlib.import_module(f"gradlab.bench._{framework}")
    data = (problem.params, problem.inputs[:5], problem.targets[:5])
    params, x, y = functions.arrays(data, "float64")
    loss, kept = functions.loss(problem), {"keep_batch_axis": True}

    def run(params, x, y):
        norms = fw.gl.per_example_norms(loss, params, x, y, **kept)
        clip = lambda clipping: fw.gl.clipped_grad(
            loss, params, x, y, max_norm=0.5 * norms[0], clipping=clipping, **kept
        )[0]
        return {
            "gradients": fw.gl.per_example_grads(loss, params, x, y, **kept),
            "norms": norms,
            "norms of leaves": fw.gl.per_example_norms(loss, params, x, y, per_leaf=True, **kept),
            "clipped": clip("flat"),
            "clipped by leaf": clip("per_leaf"),
            "clipped automatically": clip("automatic"),
            "dot products": fw.gl.per_example_gram(loss, params, x, y, **kept),
        }

    results = (fw.compile if framework == "jax" else lambda f: f)(run)(params, x, y)
    return {name: flat(fw, by_name(tree)) for name, tree in results.items()}


def by_name(tree):
    """Leaves in one order for both frameworks."""
    return [tree[name] for name in sorted(tree)] if isinstance(tree, dict) else [tree]


QUICK = ("conv", "transformer")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PROBLEMS]
)
def test_jax_and_torch_agree(name):
    jax, torch = (found(framework, PROBLEMS[name]()) for framework in FRAMEWORKS)
    for result, a in jax.items():
        b = torch[result]
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 1e-10 * np.abs(b).max(), result
        assert np.abs(b).max() > 1e-3
