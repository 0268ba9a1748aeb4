"""Optimisers: optax's semantics step by step, and derivatives at gradients of zero."""

import numpy as np
import pytest

import gradlab
from frameworks import arrays, flat, load

rng = np.random.default_rng(3)
PARAMS = {"a": rng.normal(size=3), "b": rng.normal(size=(2, 2))}
GRADIENTS = [{"a": rng.normal(size=3), "b": rng.normal(size=(2, 2))} for _ in range(5)]

VARIANTS = {
    "sgd": ("sgd", (0.1,), {}),
    "momentum": ("sgd", (0.1, 0.9), {}),
    "nesterov": ("sgd", (0.1, 0.9), {"nesterov": True}),
    "adam": ("adam", (0.1, 0.8, 0.95, 1e-3), {}),
    "eps_root": ("adam", (0.1,), {"eps_root": 1e-3}),
    "nadam": ("adam", (0.1,), {"nesterov": True}),
    "adamw": ("adamw", (0.1,), {"weight_decay": 0.3}),
    "rmsprop": ("rmsprop", (0.1,), {}),
    "rmsprop outside": ("rmsprop", (0.1,), {"eps_in_sqrt": False, "eps": 1e-3, "initial_scale": 0.5}),
    "rmsprop momentum": ("rmsprop", (0.1, 0.8), {"momentum": 0.9, "nesterov": True}),
    "schedule": ("sgd", (lambda i: 0.1 / (1 + i),), {}),
}


def trajectory(fw, optimizer):
    """Updates of five steps."""
    params, found = arrays(fw, PARAMS), []
    state = optimizer.init(params)
    for gradient in GRADIENTS:
        updates, state = optimizer.update(arrays(fw, gradient), state, params)
        params = fw.map(lambda *leaves: leaves[0], params)
        params = {name: params[name] + updates[name] for name in params}
        found.append(flat(fw, updates))
    return np.stack(found)


@pytest.mark.parametrize("name", VARIANTS)
def test_semantics_of_optax(fw, name):
    optax = pytest.importorskip("optax")
    kind, args, options = VARIANTS[name]
    expected = trajectory(load("jax"), getattr(optax, kind)(*args, **options))
    for place in (fw.gl.optimizers, gradlab.optimizers):
        found = trajectory(fw, getattr(place, kind)(*args, **options))
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_rates_of_each_parameter(fw):
    rates = {"a": fw.array(np.array([0.1, 0.2, 0.3])), "b": 0.5}
    descent, gradient = fw.gl.optimizers.sgd(rates), arrays(fw, GRADIENTS[0])
    updates, _ = descent.update(gradient, descent.init(gradient), gradient)
    np.testing.assert_allclose(fw.numpy(updates["a"]), -np.array([0.1, 0.2, 0.3]) * GRADIENTS[0]["a"])
    np.testing.assert_allclose(fw.numpy(updates["b"]), -0.5 * GRADIENTS[0]["b"])


@pytest.mark.parametrize("kind", ["adam", "adamw", "rmsprop"])
def test_derivative_at_a_gradient_of_zero(fw, kind):
    """Adam's first step is -r g / (|g| + ε), whose slope at zero is -r/ε; and RMSprop's -r g / (√(1 - d) |g| + ε)."""
    options = {"eps_in_sqrt": False} if kind == "rmsprop" else {}
    optimizer = getattr(fw.gl.optimizers, kind)(0.1, eps=1e-2, **options)
    first = lambda g: optimizer.update(g, optimizer.init(g), 0 * g)[0].sum()
    g = fw.array(np.array([0.0, 3.0]))
    slope = fw.numpy(fw.grad(first)(g))
    assert slope[0] == pytest.approx(-10.0)
    assert np.isfinite(slope).all()


def test_optax_itself_at_a_gradient_of_zero():
    """φ = x + u(∇(x - t)²/2) at x = t: ∂φ/∂x = 1 - r/ε, where optax's own derivative is not-a-number."""
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    adam, x = optax.adam(0.1, eps=1e-2), jax.numpy.array(2.0)
    bare = lambda x: adam.update(x - 2.0, adam.init(x), x)[0]
    assert np.isnan(jax.grad(bare)(x))
    adapted = lambda x, steps: gradlab.jax.adapt(lambda x: (x - 2.0) ** 2 / 2, x, optimizer=adam, steps=steps)
    assert float(jax.grad(adapted)(x, 1)) == pytest.approx(1 - 10.0)
    assert np.isfinite(jax.grad(adapted)(x, 7))
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_rss(), optax.scale(-0.1))
    found = gradlab.jax.adapt(lambda x: (x**2).sum(), jax.numpy.zeros(2), optimizer=clipped, steps=2)
    assert np.isfinite(found).all()
