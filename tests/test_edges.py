"""Edges of both frameworks: sizes of zero, rules without a mode, arrays of the other framework, orders of keys."""

import collections

import numpy as np
import pytest

import gradlab
from frameworks import load

square = lambda x: (x**2).sum()


def test_sizes_of_zero(fw):
    empty, three = fw.array(np.zeros(0)), fw.array(np.ones(3))
    none = lambda x: x[:0]
    for H in (
        gradlab.hessian(square, empty),
        gradlab.hessian_operator(square, empty).dense(),
        gradlab.jacobian(lambda x: x**2, empty, mode="forward"),
        gradlab.jacobian(lambda x: x**2, empty, mode="reverse"),
    ):
        assert tuple(H.shape) == (0, 0)
    for J in (
        gradlab.jacobian(none, three, mode="forward"),
        gradlab.jacobian(none, three, mode="reverse"),
        gradlab.jacobian_operator(none, three).dense(),
    ):
        assert tuple(J.shape) == (0, 3)
    for d in (gradlab.hessian_diagonal(square, empty), gradlab.hvp(square, empty, empty)):
        assert tuple(d.shape) == (0,)
    H = gradlab.hessian(lambda p: square(p["a"]) + square(p["b"]), {"a": empty, "b": three[:1]})
    assert tuple(H["a"]["b"].shape) == (0, 1)
    assert fw.numpy(H["b"]["b"]).tolist() == [[2.0]]


def test_chunk_sizes_of_numpy(fw):
    H = gradlab.hessian(square, fw.array(np.ones(3)), chunk_size=np.int64(2))
    assert fw.numpy(H).tolist() == (2 * np.eye(3)).tolist()


def test_arrays_of_the_other_framework_in_a_namespace():
    jax, torch = load("jax"), load("torch")
    for own, other in ((jax, torch), (torch, jax)):
        x, y = own.array(np.ones(2)), other.array(np.ones(2))
        for call in (lambda: own.gl.hvp(square, y, y), lambda: own.gl.hvp(square, x, y)):
            with pytest.raises(
                gradlab.BackendError, match=rf"is an array of {other.name}; call gradlab.{other.name}"
            ):
                call()


def test_sparse_tensors_are_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(
        gradlab.KindError, match=r"sparse tensor; differentiate by its values, or by .to_dense"
    ):
        gradlab.hessian(lambda x: x.to_dense().sum(), torch.eye(3).to_sparse())


def test_directions_with_other_orders_of_keys(fw):
    one, two = fw.array(np.ones(2)), fw.array(np.full(2, 2.0))
    f = lambda p: (p["m"]["a"] ** 3).sum() + (p["m"]["b"] ** 3).sum()
    product = gradlab.hvp(f, {"m": {"a": one, "b": two}}, {"m": {"b": one, "a": two}})
    assert fw.numpy(product["m"]["a"]).tolist() == [12.0, 12.0]
    assert fw.numpy(product["m"]["b"]).tolist() == [12.0, 12.0]
    if fw.name == "torch":
        product = gradlab.hvp(lambda p: (p["a"] ** 3).sum(), collections.OrderedDict(a=one), {"a": two})
        assert fw.numpy(product["a"]).tolist() == [12.0, 12.0]


def test_a_rule_that_calls_another_rule():
    """jax gives a custom_vjp no forward mode: where its rule holds another, Hessians go by reverse mode twice."""
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    inner = jax.custom_vjp(lambda x: x * x)
    inner.defvjp(lambda x: (x * x, x), lambda x, u: (2 * x * u,))
    cube = jax.custom_vjp(lambda x: x**3)
    cube.defvjp(lambda x: (x**3, x), lambda x, u: (3 * inner(x) * u,))
    f, x, v = lambda x: cube(x).sum(), jnp.array([1.0, 2.0]), jnp.array([1.0, -1.0])
    calls = {
        "hvp": lambda x: gradlab.hvp(f, x, v),
        "hessian": lambda x: gradlab.hessian(f, x) @ v,
        "hessian_diagonal": lambda x: gradlab.hessian_diagonal(f, x) * v,
        "hessian_operator": lambda x: gradlab.hessian_operator(f, x) @ v,
        "matmat": lambda x: gradlab.hessian_operator(f, x).matmat(v[None])[0],
        "ggn_vp": lambda x: gradlab.ggn_vp(lambda x: x, f, x, v),
        "ggn_operator": lambda x: gradlab.ggn_operator(lambda x: x, f, x) @ v,
    }
    for call in calls.values():
        for run in (call, jax.jit(call), lambda x, c=call: jax.vmap(c)(x[None])[0]):
            np.testing.assert_allclose(run(x), 6 * x * v, rtol=1e-12)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(jax.grad(f), (x,), (v,))


def test_a_loop_without_reverse_mode():
    jax = pytest.importorskip("jax")
    cube = lambda x: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] * x), (0, x))[1]
    x = jax.numpy.array([1.0, 2.0])
    J = gradlab.jacobian(
        lambda x: cube(x).sum(), x
    )  # fewer outputs than inputs: by shape it would be reverse
    np.testing.assert_allclose(J, 3 * x**2, rtol=1e-12)
    with pytest.raises(ValueError, match=r"[Rr]everse-mode"):
        gradlab.jacobian(cube, x, mode="reverse")
