"""Events of odeint: their times and states in closed form, under every nest of modes; and the gradient's own error."""

import numpy as np
import pytest

import gradlab
from frameworks import EACH, FRAMEWORKS, load
from gradlab import ConvergenceError, GradientWarning, InputError
from gradlab.transforms.odes.options import Status
from test_odes import logistic

X = np.array([10.0, 9.8, 0.0, 0.2, 0.5, 3.0, 4.0])  # height, gravity, ts, and at the end beyond the fall
W = np.array([0.7, -0.3, 0.4, 0.2, 0.5, -0.6, 0.9])


def fallen(fw, adjoint="auto", **options):
    """Of a stone that is dropped: height and speed at ts, and the time when it is on the ground, with a weight each."""

    def run(x):
        zero = 0 * x[0]
        f = lambda t, y, g: fw.xp.stack([y[1], -g + 0 * y[0]])
        start = fw.xp.stack([x[0], zero])
        ground = lambda t, y, g: y[0]
        options_ = {"rtol": 1e-10, "atol": 1e-12, "event": ground, "adjoint": adjoint, **options}
        solution = fw.gl.odeint(f, start, x[2:6], x[1], **options_)
        return fw.xp.stack([*solution.ys[:, 0], *solution.ys[1:, 1], solution.event_time])

    return run


def exactly(fw):
    def run(x):
        end = x[2] + (2 * x[0] / x[1]) ** 0.5
        ts = [x[3], x[4], end]
        heights = [x[0] - x[1] * (t - x[2]) ** 2 / 2 for t in ts]
        return fw.xp.stack([x[0], *heights, *(-x[1] * (t - x[2]) for t in ts), end])

    return run


def loss(fw, run):
    return lambda x: (fw.xp.sin(run(x)) * fw.array([*W, 0.3])).sum()


MODES = {
    "value": lambda fw, f: f,
    "jacrev": lambda fw, f: fw.jacrev(f),
    "jacfwd": lambda fw, f: fw.jacfwd(f),
    "jacrev of grad": lambda fw, f: fw.jacrev(fw.grad(loss(fw, f))),
    "jacfwd of grad": lambda fw, f: fw.jacfwd(fw.grad(loss(fw, f))),
    "jacrev of jacfwd": lambda fw, f: fw.jacrev(fw.jacfwd(loss(fw, f))),
    "jacfwd of jacfwd": lambda fw, f: fw.jacfwd(fw.jacfwd(loss(fw, f))),
    "vmap of jacrev": lambda fw, f: (
        lambda x: fw.vmap(fw.jacrev(lambda s: f(s * x)))(fw.array([[1.0], [1.3]]))
    ),
    "vmap of hessian": lambda fw, f: (
        lambda x: fw.vmap(fw.jacfwd(fw.grad(lambda s: loss(fw, f)(s * x))))(fw.array([[1.0], [1.3]]))
    ),
}
QUICK = ("value", "jacrev", "jacfwd of jacfwd", "vmap of hessian")


@pytest.mark.parametrize(
    ("framework", "mode"),
    [
        pytest.param(
            framework,
            mode,
            marks=() if mode in (QUICK if framework == "torch" else QUICK[:1]) else pytest.mark.slow,
        )
        for framework in FRAMEWORKS
        for mode in MODES
    ],
)
def test_a_fall(framework, mode):
    fw = load(framework)
    x = fw.array(X[:6])
    run = MODES[mode](fw, fallen(fw, method="tsit5", max_steps=512))
    found = fw.numpy((fw.compile(run) if framework == "jax" else run)(x))
    expected = fw.numpy(MODES[mode](fw, exactly(fw))(x))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-8 * np.abs(expected).max()


@pytest.mark.parametrize("framework", EACH)
@pytest.mark.parametrize(
    "adjoint", ["direct", pytest.param("checkpoint", marks=pytest.mark.slow), "backsolve"]
)
def test_a_fall_by_other_adjoints(framework, adjoint):
    fw = load(framework)
    x = fw.array(X[:6])
    found, expected = (fw.numpy(fw.jacrev(f)(x)) for f in (fallen(fw, adjoint), exactly(fw)))
    assert np.abs(found - expected).max() <= 1e-7 * np.abs(expected).max()


@pytest.mark.parametrize("framework", EACH)
def test_no_event(framework):
    fw = load(framework)
    y0, ts = fw.array([1.0]), fw.array([0.0, 1.0, 2.0])
    run = lambda y0, **options: fw.gl.odeint(lambda t, y: -y, y0, ts, rtol=1e-8, atol=1e-10, **options)
    never = lambda t, y: y[0] + 1
    solution = run(y0, event=never)
    assert float(solution.event_time) == np.inf
    assert np.allclose(fw.numpy(solution.ys), fw.numpy(run(y0).ys), rtol=1e-12)
    assert run(y0).event_time is None
    found = fw.grad(lambda y0: run(y0, event=never).ys[-1, 0])(y0)
    assert np.allclose(fw.numpy(found), np.exp(-2.0), rtol=1e-6)


@pytest.mark.parametrize("framework", EACH)
def test_backwards_in_time(framework):
    fw = load(framework)
    ts = fw.array([2.0, 1.0, 0.0])
    when = lambda y0: (
        fw.gl.odeint(
            lambda t, y: y, fw.array([1.0]) * y0, ts, rtol=1e-10, atol=1e-12, event=lambda t, y: y[0] - 0.3
        ).event_time
    )
    one = fw.array(1.0)
    assert np.isclose(float(when(one)), 2 + np.log(0.3), rtol=1e-9)
    assert np.isclose(float(fw.grad(when)(one)), -1.0, rtol=1e-8)


def test_what_an_event_may_be(fw):
    with pytest.raises(InputError, match=r"event returns of shape \(2,\); return a float scalar"):
        gradlab.odeint(lambda t, y: -y, fw.array([1.0, 2.0]), fw.array([0.0, 1.0]), event=lambda t, y: y)


@pytest.mark.parametrize("framework", EACH)
@pytest.mark.parametrize("adjoint", ["auto", "forward", "direct"])
def test_the_error_of_a_gradient_is_estimated(framework, adjoint):
    fw = load(framework)
    y0, ts, a = fw.array([0.3, 0.1]), fw.array([0.0, 0.7, 2.0]), fw.array([1.1, 0.7])
    run = lambda a: (
        fw.gl.odeint(
            logistic, y0, ts, a, rtol=1e-6, atol=1e-8, gradient_error=True, adjoint=adjoint
        ).gradient_error
    )
    assert 0 < float(run(a)) < 1e-4
    many = fw.vmap(run)(fw.xp.stack([a, 2 * a]))
    assert np.allclose(fw.numpy(many), [float(run(a)), float(run(2 * a))], rtol=1e-2)


def test_a_wrong_gradient_is_warned_of(monkeypatch):
    """Backward passes that are off by a hundredth: by the check that each makes, and by the estimate."""
    torch = pytest.importorskip("torch")
    from gradlab.transforms.odes import _torch_passes

    fw, right = load("torch"), _torch_passes.Backward.slopes

    def wrong(self, *args):
        slope, integrands = right(self, *args)
        return slope * 1.01, integrands

    ts, a = fw.array([0.0, 0.7, 2.0]), fw.array([1.1, 0.7])
    run = lambda y0, **options: fw.gl.odeint(logistic, y0, ts, a, rtol=1e-6, atol=1e-8, **options)
    y0 = torch.tensor([0.3, 0.1], dtype=torch.float64, requires_grad=True)
    run(y0).ys[-1].sum().backward()
    monkeypatch.setattr(_torch_passes.Backward, "slopes", wrong)
    with pytest.warns(GradientWarning, match="off by 0.0"):
        run(y0).ys[-1].sum().backward()
    with pytest.warns(GradientWarning, match="off by 0.0"):
        assert float(run(y0, gradient_error=True).gradient_error.detach()) > 1e-4


def test_a_jump_of_f_is_no_reason_for_a_warning():
    torch = pytest.importorskip("torch")
    y0 = torch.tensor([0.3, 0.1], dtype=torch.float64, requires_grad=True)
    f = lambda t, y: -y + torch.where(t > 0.5, 1.0, 0.0)
    ys = load("torch").gl.odeint(f, y0, torch.tensor([0.0, 2.0]), rtol=1e-6, atol=1e-8).ys
    ys[-1].sum().backward()
    assert np.allclose(y0.grad.numpy(), np.exp(-2.0), rtol=1e-5)


@pytest.mark.parametrize("framework", EACH)
def test_a_search_that_ends_early_is_no_answer(framework):
    """Finer steps look for the event than the solution needs: their end is not that of the solution."""
    fw = load(framework)
    ts, options = fw.array([0.0, 5.0, 20.0]), {"rtol": 1e-8, "max_steps": 64}
    f = lambda t, y: -y * (1 + 0.1 * fw.xp.sin(20 * t))
    run = lambda **more: fw.gl.odeint(
        f, fw.array([1.0]), ts, event=lambda t, y: y[0] - 1e-3, **options, **more
    )
    with pytest.raises(ConvergenceError, match="max_steps"):
        run()
    assert int(run(throw=False).status) == Status.MAX_STEPS
