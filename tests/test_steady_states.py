"""steady_state against closed forms in every mode, and what does not settle."""

import numpy as np
import pytest

import gradlab
from frameworks import FRAMEWORKS, load
from gradlab import ConvergenceError, InputError, KindError


@pytest.fixture(params=FRAMEWORKS)
def fw(request):
    return load(request.param)


def reaction(t, y, k):
    return 1.0 - k * y**2  # rests at 1 / √k


def rest(fw):
    return lambda k: fw.gl.steady_state(reaction, fw.array(np.array(0.5)), k)


def test_derivatives_of_every_mode(fw):
    k, f = fw.array(np.array(4.0)), rest(fw)
    found = [f(k), fw.grad(f)(k), fw.jvp(f, k, fw.array(np.array(1.0))), fw.jacfwd(fw.grad(f))(k)]
    np.testing.assert_allclose([float(x) for x in found], [0.5, -1 / 16, -1 / 16, 3 / 128], rtol=1e-9)
    many = fw.vmap(fw.grad(f))(fw.array(np.array([1.0, 4.0])))
    np.testing.assert_allclose(fw.numpy(many), [-0.5, -1 / 16], rtol=1e-9)


def test_a_tree_reaches_the_state_that_it_leads_to(fw):
    """Of the two stable states of y' = y - y³ the one on its side, beside another that follows it."""
    f = lambda t, y, a: {"y": y["y"] - y["y"] ** 3, "z": a * y["y"] - y["z"]}
    for start, sign in ((0.1, 1.0), (-0.1, -1.0)):
        y0 = {"y": fw.array(np.array(start)), "z": fw.array(np.zeros(2))}
        found = fw.gl.steady_state(f, y0, fw.array(np.array([2.0, 3.0])))
        np.testing.assert_allclose(fw.numpy(found["y"]), sign, rtol=1e-9)
        np.testing.assert_allclose(fw.numpy(found["z"]), [2 * sign, 3 * sign], rtol=1e-9)


def test_what_does_not_settle_is_refused(fw):
    error = (ConvergenceError, RuntimeError) if fw.name == "jax" else ConvergenceError
    call = lambda f, **how: fw.gl.steady_state(f, fw.array(np.array([1.0, 0.0])), max_doublings=4, **how)
    with pytest.raises(error, match="has not settled by t = 16"):
        call(lambda t, y: fw.xp.stack([y[1], -y[0]]), method="tsit5")
    timed = RuntimeError if fw.name == "jax" else InputError
    with pytest.raises(timed, match="depends on t"):
        call(lambda t, y: t - y)


def test_bad_input(fw):
    y0 = fw.array(np.ones(2))
    with pytest.raises(KindError, match="f is a int"):
        fw.gl.steady_state(3, y0)
    with pytest.raises(InputError, match="time_scale is 0"):
        fw.gl.steady_state(reaction, y0, 1.0, time_scale=0)
    with pytest.raises(InputError, match="max_doublings is 0"):
        fw.gl.steady_state(reaction, y0, 1.0, max_doublings=0)


def test_the_facade():
    torch = pytest.importorskip("torch")
    found = gradlab.steady_state(lambda t, y: 2.0 - y, torch.zeros(2))
    torch.testing.assert_close(found, torch.full((2,), 2.0))
