"""Per-example gradients, norms and clipped sums: equal to a loop over examples, on every kind of model."""

import importlib
import warnings
from functools import partial

import numpy as np
import pytest

from frameworks import FRAMEWORKS, load

# The others take the same roads, and are run by `make test-all`.
QUICK = {
    "torch": None,  # all: they are quick
    "jax": {
        *("conv1d, groups, dilation", "tied", "reshaped two ways", "custom_vjp", "constants", "no time"),
    },
}


def cases(framework):
    """The zoo of a framework, once a process."""
    load(framework)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.nn, about models that are odd on purpose
        return importlib.import_module(f"per_example_{framework}").cases()


def flatten(framework, tree):
    if framework == "torch":
        from torch.utils import _pytree

        return _pytree.tree_flatten(tree)
    import jax

    leaves, spec = jax.tree.flatten(tree)
    return leaves, spec


def unflatten(framework, leaves, spec):
    if framework == "torch":
        from torch.utils import _pytree

        return _pytree.tree_unflatten(leaves, spec)
    return spec.unflatten(leaves)


def is_float(x):
    return hasattr(x, "dtype") and "float" in str(x.dtype)


def looped(framework, loss, params, batch, keep):
    """The gradients by a loop over examples and the framework's plain gradient: one numpy array a leaf."""
    leaves, spec = flatten(framework, params)
    floats = [i for i, x in enumerate(leaves) if is_float(x)]
    data, of_batch = flatten(framework, batch)
    arrays = [i for i, x in enumerate(data) if hasattr(x, "shape")]

    def value(xs, given):
        every, example = list(leaves), list(data)
        for i, x in zip(floats, xs, strict=True):
            every[i] = x
        for i, x in zip(arrays, given, strict=True):
            example[i] = x
        return loss(unflatten(framework, every, spec), *unflatten(framework, example, of_batch))

    gradient = plain_gradient(framework, value)
    row = lambda n: [data[i][n : n + 1] if keep else data[i][n] for i in arrays]
    rows = [gradient([leaves[i] for i in floats], row(n)) for n in range(data[arrays[0]].shape[0])]
    return [np.stack(leaf) for leaf in zip(*rows, strict=True)]


def plain_gradient(framework, value):
    if framework == "jax":
        import jax

        compiled = jax.jit(jax.grad(value))
        return lambda xs, example: [np.asarray(g, np.float64) for g in compiled(xs, example)]
    import torch

    def gradient(xs, example):
        xs = [x.detach().clone().requires_grad_() for x in xs]
        y = value(xs, example)
        grads = torch.autograd.grad(y, xs, allow_unused=True) if y.requires_grad else [None] * len(xs)
        filled = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, xs, strict=True)]
        return [g.detach().double().numpy() for g in filled]

    return gradient


def compiled(framework, f):
    """In jax one compilation for what eager code would compile operation by operation."""
    if framework == "torch":
        return f
    import equinox

    return equinox.filter_jit(f)


def results(framework, tree):
    leaves = [x for x in flatten(framework, tree)[0] if x is not None]
    return [np.asarray(x.detach() if framework == "torch" else x, np.float64) for x in leaves]


def close(actual, expected, scale, tolerance):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max(initial=0) <= tolerance * scale


def compare(framework, loss, params, batch, options, limit=1e-10):
    """Gradients, norms of all and of each leaf, and clipped sums, relative to their sizes."""
    gl = load(framework).gl
    expected = looped(framework, loss, params, batch, options.get("keep_batch_axis"))
    squares = [np.square(g).reshape(len(g), -1).sum(1) for g in expected]
    norms = np.sqrt(sum(squares))
    largest, C = norms.max(), float(np.median(norms)) or 1.0

    @partial(compiled, framework)
    def run(params, batch):
        return (
            gl.per_example_grads(loss, params, *batch, **options),
            gl.per_example_norms(loss, params, *batch, per_leaf=True, **options),
            gl.clipped_grad(loss, params, *batch, max_norm=C, **options),
        )

    grads, by_leaf, (total, found) = run(params, batch)
    for actual, g in zip(results(framework, grads), expected, strict=True):
        close(actual, g, np.abs(g).max(initial=0), limit)
    close(results(framework, found)[0], norms, largest, limit)
    for actual, square in zip(results(framework, by_leaf), squares, strict=True):
        close(actual, np.sqrt(square), largest, limit)
    factors = np.minimum(1, C / np.where(norms == 0, 1, norms))
    for actual, g in zip(results(framework, total), expected, strict=True):
        close(actual, np.tensordot(factors, g, 1), len(g) * np.abs(g).max(initial=0), limit)


def failures(framework, chosen):
    """The cases that are not equal to a loop, with why."""
    found = {}
    for name, (loss, params, batch, options) in cases(framework).items():
        if chosen(name):
            try:
                compare(framework, loss, params, batch, options, 1e-6 if name == "cast" else 1e-10)
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
    return found


quiet = pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:`torch.jit")


@quiet
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_equal_to_a_loop(framework):
    assert failures(framework, lambda name: name in (QUICK[framework] or {name})) == {}


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("framework", [f for f in FRAMEWORKS if QUICK[f]])
def test_the_rest_is_equal_to_a_loop(framework):
    assert failures(framework, lambda name: name not in QUICK[framework]) == {}
