"""flow_log_density against the linear flow's closed form, in both frameworks; the estimate's mean; bad input."""

import numpy as np
import pytest
from scipy.linalg import expm

import gradlab
from frameworks import FRAMEWORKS, load
from gradlab import InputError, KindError

rng = np.random.default_rng(0)
A, X, D = 0.4 * rng.normal(size=(3, 3)), rng.normal(size=(5, 3)), rng.normal(size=(3, 3))
TIGHT = {"rtol": 1e-9, "atol": 1e-11, "method": "tsit5"}


@pytest.fixture(params=FRAMEWORKS)
def fw(request):
    return load(request.param)


def linear(t, z, a):
    return a @ z


def normal(z):
    return -(z**2).sum() / 2


def exact(a):
    """z(1) = exp(a) z(0)."""
    return -((X @ np.linalg.inv(expm(a)).T) ** 2).sum(1) / 2 - np.trace(a)


def slope(f, x, d, h=1e-3):
    """Of a function along d, by differences of the fourth order."""
    at = lambda k: f(x + k * h * d)
    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)


def density(fw, **options):
    return lambda a: fw.gl.flow_log_density(
        linear, fw.array(X), a, ts=(0.0, 1.0), log_base=normal, **TIGHT, **options
    )


def test_densities_and_their_derivatives(fw):
    f, a, d = density(fw), fw.array(A), fw.array(D)
    np.testing.assert_allclose(fw.numpy(f(a)), exact(A), atol=1e-8)
    np.testing.assert_allclose(fw.numpy(fw.jvp(f, a, d)), slope(exact, A, D), atol=1e-7)
    gradient = fw.numpy(fw.grad(lambda a: f(a).sum())(a))
    np.testing.assert_allclose((gradient * D).sum(), slope(exact, A, D).sum(), atol=1e-7)


@pytest.mark.slow
def test_second_derivatives(fw):
    f, d = density(fw), fw.array(D)
    curved = fw.jvp(fw.grad(lambda a: f(a).sum()), fw.array(A), d)
    expected = slope(lambda a: slope(exact, a, D).sum(), A, D)
    np.testing.assert_allclose((fw.numpy(curved) * D).sum(), expected, atol=1e-5)


def test_the_estimate_of_all_directions_is_the_trace(fw):
    """√d eᵢ for all i: their mean is exact; of one of them it is not."""
    every = np.sqrt(3) * np.broadcast_to(np.eye(3)[:, None], (3, 5, 3))
    estimate = lambda noise: fw.numpy(density(fw, noise=fw.array(noise))(fw.array(A)))
    np.testing.assert_allclose(estimate(every), exact(A), atol=1e-8)
    assert np.abs(estimate(every[:1]) - exact(A)).min() > 1e-3


def test_a_network_s_parameters_are_reached(fw):
    """Those that f closes over, and a base that depends on them."""
    x, w = fw.array(X[:2]), fw.array(A)
    loss = lambda w: fw.gl.flow_log_density(
        lambda t, z: fw.xp.tanh(w @ z), x, ts=(0.0, 1.0), log_base=lambda z: -(z**2).sum() / 2, **TIGHT
    ).sum()
    given = lambda w: fw.gl.flow_log_density(
        lambda t, z, w: fw.xp.tanh(w @ z), x, w, ts=(0.0, 1.0), log_base=normal, **TIGHT
    ).sum()
    np.testing.assert_allclose(fw.numpy(fw.grad(loss)(w)), fw.numpy(fw.grad(given)(w)), atol=1e-7)


def test_bad_input(fw):
    x, a, good = fw.array(X), fw.array(A), {"ts": (0.0, 1.0), "log_base": normal}
    call = lambda f=linear, x=x, **how: fw.gl.flow_log_density(f, x, a, **{**good, **how})
    with pytest.raises(KindError, match="f is a int"):
        call(3)
    with pytest.raises(KindError, match="log_base is a NoneType"):
        call(log_base=None)
    with pytest.raises(InputError, match="x has shape"):
        call(x=fw.array(X[0]))
    with pytest.raises(InputError, match="noise has shape"):
        call(noise=fw.array(X))
    with pytest.raises(InputError, match="ts is not a pair"):
        call(ts=(0.0, 0.5, 1.0))
    with pytest.raises(InputError, match="f gives shape"):
        call(lambda t, z, a: z[:2])
    with pytest.raises(InputError, match="log_base gives shape"):
        call(log_base=lambda z: z)
    with pytest.raises(InputError, match="unknown method"):
        call(method="best")


def test_the_facade():
    torch = pytest.importorskip("torch")
    x = torch.tensor(X)
    found = gradlab.flow_log_density(linear, x, torch.tensor(A), ts=(0.0, 1.0), log_base=normal)
    np.testing.assert_allclose(found.numpy(), exact(A), atol=1e-4)
