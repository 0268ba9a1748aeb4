"""check.agree: ports that agree pass, and each way of not agreeing fails in its row."""

import numpy as np
import pytest

import gradlab
from gradlab import check

jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
jnp = jax.numpy
rng = np.random.default_rng(0)
X = {
    "w": rng.normal(size=(3, 4)).astype("float32"),
    "b": rng.normal(size=3),
}  # keys in torch's order, not jax's
DATA = rng.normal(size=4)


def model(xp):
    return lambda p, data: xp.tanh(p["w"] @ data + p["b"]) * 3


def failed(report):
    return [row.claim for row in report.rows if row.status == "failed"]


def test_a_right_port_agrees():
    report = check.agree(model(jnp), model(torch), X, DATA).raise_if_failed()
    assert [row.claim for row in report.rows] == ["structure", "value", "jvp", "vjp", "hvp"]
    check.agree(
        lambda z: (abs(z) ** 2).sum(), lambda z: (abs(z) ** 2).sum(), np.array([1 + 2j, 0.5j])
    ).raise_if_failed()


def test_wrong_ports_fail_in_their_row():
    other = lambda p, data: model(torch)(p, data) * (1 + 1e-6)
    assert "value" in failed(check.agree(model(jnp), other, X, DATA))
    detached = lambda p, data: model(torch)({"w": p["w"], "b": p["b"].detach()}, data)
    report = check.agree(model(jnp), detached, X, DATA)
    assert failed(report)[:2] == ["jvp", "vjp"]
    assert "x['b']" in report["vjp"].where
    cube = lambda x: (x**3).sum()
    frozen = lambda x: (3 * x.detach() ** 2 * x - 2 * x.detach() ** 3).sum()  # right to first order
    assert failed(check.agree(cube, frozen, np.array([0.5, 1.5]))) == ["hvp"]
    sliced = lambda p, data: model(torch)(p, data)[:2]
    report = check.agree(model(jnp), sliced, X, DATA)
    assert failed(report) == ["structure"]
    assert "(2,)" in report["structure"].message


def test_bad_input():
    with pytest.raises(gradlab.KindError, match="f_torch is a int; pass two functions"):
        check.agree(model(jnp), 3, X, DATA)
    with pytest.raises(gradlab.InputError, match="order is 3; pass 1 or 2"):
        check.agree(model(jnp), model(torch), X, DATA, order=3)
