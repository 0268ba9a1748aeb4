"""Optimisers: optax's semantics step by step, and derivatives at gradients of zero."""

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest

import gradlab
from frameworks import arrays, flat, load
from gradlab import InputError, KindError

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
    "decay of some": ("adamw", (0.1,), {"weight_decay": 0.3, "mask": {"a": True, "b": False}}),
    "rmsprop centered": ("rmsprop", (0.1, 0.8), {"centered": True, "momentum": 0.9}),
    "rmsprop centered outside": ("rmsprop", (0.1,), {"centered": True, "eps_in_sqrt": False, "eps": 1e-3}),
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


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("sgd", {"momentum": float("nan")}, "momentum is nan; pass a finite number that is not negative"),
        ("adam", {"b1": 1.0}, "b1 is 1.0; pass a number from 0 to below 1"),
        ("adam", {"b2": float("nan")}, "b2 is nan"),
        ("adam", {"eps": -1e-3}, "eps is -0.001"),
        ("adamw", {"weight_decay": -0.1}, "weight_decay is -0.1"),
        ("rmsprop", {"decay": 2.0}, "decay is 2.0; pass a number from 0 to below 1"),
    ],
)
def test_numbers_out_of_range(fw, kind, options, match):
    for place in (fw.gl.optimizers, gradlab.optimizers):
        with pytest.raises(InputError, match=f"{kind}: {match}"):
            getattr(place, kind)(0.1, **options)


def test_what_is_no_number(fw):
    for place in (fw.gl.optimizers, gradlab.optimizers):
        for rate in (None, "0.1", 0.1j):
            with pytest.raises(KindError, match=r"rate is .*; pass a number, a tree like params"):
                place.sgd(rate)
        with pytest.raises(KindError, match="momentum is a str; pass a number or an array"):
            place.sgd(0.1, "heavy")
        with pytest.raises(KindError, match="weight_decay is a function"):
            place.adamw(0.1, weight_decay=lambda step: 0.1)
    with pytest.raises(KindError, match="rate holds a str"):
        fw.gl.optimizers.sgd({"a": "0.1"})
    adamw, g = fw.gl.optimizers.adamw(0.1, mask={"b": True}), {"a": fw.array(1.0)}
    with pytest.raises(InputError, match="mask does not fit params"):
        adamw.update(g, adamw.init(g), g)
    with pytest.raises(InputError, match="adamw: update needs params"):
        adamw.update(g, adamw.init(g), None)


def test_schedules_of_negative_rates(fw):
    g = fw.array(1.0)

    def run(rate):
        descent = fw.gl.optimizers.sgd(rate)
        state = descent.init(g)
        for _ in range(2):
            _, state = descent.update(g, state, g)

    for first in (-0.1, float("nan"), np.array([0.1, -0.1])):
        with pytest.raises(InputError, match="rate is"):
            run(lambda step, first=first: first)
    if fw.name == "torch":
        with pytest.raises(InputError, match=r"rate is -0\.9"):
            run(lambda step: 0.1 - step)


def test_rates_from_numpy(fw):
    sgd = fw.gl.optimizers.sgd
    rates, g = {"a": np.array([0.1, 0.2, 0.3]), "b": np.float32(0.5)}, arrays(fw, GRADIENTS[0])
    updates, _ = sgd(rates).update(g, sgd(rates).init(g), g)
    np.testing.assert_allclose(fw.numpy(updates["a"]), -rates["a"] * GRADIENTS[0]["a"])
    for rate in (np.array(-0.1), np.float32(-0.1), {"a": np.array([0.1, np.nan]), "b": 0.1}):
        with pytest.raises(InputError, match="rate is"):
            sgd(rate)


def test_gradients_in_another_order(fw):
    """Dictionaries are matched by their keys, whatever was put into them first."""
    adamw, params = fw.gl.optimizers.adamw(0.1, weight_decay=0.5), arrays(fw, PARAMS)
    params["b"], gradient = params["a"] + 1, {"a": params["a"], "b": params["a"] * 2}
    turned = {"b": gradient["b"], "a": gradient["a"]}
    expected, state = adamw.update(gradient, adamw.init(params), params)
    found, again = adamw.update(turned, adamw.init(params), params)
    for key in ("a", "b"):
        np.testing.assert_array_equal(fw.numpy(found[key]), fw.numpy(expected[key]))
    expected, found = adamw.update(gradient, state, params)[0], adamw.update(gradient, again, params)[0]
    for key in ("a", "b"):
        np.testing.assert_array_equal(fw.numpy(found[key]), fw.numpy(expected[key]))


def test_a_learned_initial_scale(fw):
    """First step -r g / √(d s + (1 - d) g² + ε): ∂/∂s = r g d / 2 (...)^(-3/2)."""
    g, rmsprop = fw.array(2.0), fw.gl.optimizers.rmsprop
    first = lambda s: (lambda o: o.update(g, o.init(g), g)[0])(rmsprop(0.1, 0.5, initial_scale=s))
    inside = 0.5 * 3.0 + 0.5 * 4.0 + 1e-8
    assert float(fw.grad(first)(fw.array(3.0))) == pytest.approx(0.1 * 2.0 * 0.5 / 2 * inside**-1.5)


def test_rates_and_masks_in_registered_nodes():
    torch = pytest.importorskip("torch")
    pair = namedtuple("Pair", "a b")

    @dataclass
    class Layer:
        a: object
        b: object

    torch.utils._pytree.register_dataclass(Layer)
    for node in (pair, Layer):
        sgd = gradlab.torch.optimizers.sgd(node(0.1, 0.5))
        params, mask = node(torch.ones(2), torch.ones(2)), node(True, False)
        loss = lambda p: (p.a**2).sum() / 2 + (p.b**2).sum() / 2
        adapted = gradlab.adapt(loss, params, optimizer=sgd, steps=1, mask=None)
        assert (float(adapted.a[0]), float(adapted.b[0])) == pytest.approx((0.9, 0.5))
        adapted = gradlab.adapt(loss, params, optimizer=gradlab.optimizers.sgd(0.1), steps=1, mask=mask)
        assert (float(adapted.a[0]), float(adapted.b[0])) == pytest.approx((0.9, 1.0))
