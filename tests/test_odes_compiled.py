"""odeint in torch as it is used in training: compiled steps, and recorded ones pulled back stage by stage."""

import numpy as np
import pytest

from gradlab import InputError, StrategyError

torch = pytest.importorskip("torch")
gl = pytest.importorskip("gradlab.torch")

OPTIONS = {"rtol": 1e-4, "atol": 1e-6, "method": "bosh3"}
TIMES = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    return torch.nn.Sequential(*layers).to(dtype)


def gradients(f, y0, params, *args, **options):
    """The states, and the derivatives of a loss of them all."""
    ys = gl.odeint(f, y0, TIMES, *args, **OPTIONS | options).ys
    return [ys.detach(), *torch.autograd.grad((ys.sin() ** 2).sum(), params)]


def close(found, expected, rtol=1e-12):
    for x, y in zip(found, expected, strict=True):
        x, y = x.detach(), y.detach()
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * float(y.abs().max()))


def test_compiled_steps_are_the_others(monkeypatch):
    """States and gradients; again after the parameters, and a number in f, have changed; one compilation for both."""
    from gradlab.transforms.odes import _torch_compiled

    net, scale = network(), [1.0]
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y0 = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    f = lambda t, y, w: scale[0] * net(y) * torch.cos(w * t)
    params, run = [y0, w, *net.parameters()], _torch_compiled.Program.run
    kinds = []
    monkeypatch.setattr(
        _torch_compiled.Program, "run", lambda self, name, *rest: kinds.append(name) or run(self, name, *rest)
    )
    close(gradients(f, y0, params, w, compile=True), gradients(f, y0, params, w))
    assert set(kinds) == {"begin", "forwards", "slopes", "backwards"}
    (programs,) = [t.programs for code, t in _torch_compiled._traced.items() if code is f.__code__]
    (program,) = programs.values()
    before = dict(program.steps)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    other = network()
    close(gradients(f, y0, params, w, compile=True), gradients(f, y0, params, w))
    assert before == program.steps
    assert len(programs) == 1
    net, params = other, [y0, w, *other.parameters()]  # the cell that f holds
    close(gradients(f, y0, params, w, compile=True), gradients(f, y0, params, w))
    ys = gl.odeint(f, y0, TIMES, w, **OPTIONS, compile=True).ys
    first = torch.autograd.grad(ys.sum(), w, create_graph=True)[0]
    second = torch.autograd.grad(first, w)[0]
    plain = lambda w: gl.odeint(f, y0.detach(), TIMES, w, rtol=1e-8, atol=1e-10).ys.sum()
    torch.testing.assert_close(second, torch.func.hessian(plain)(w.detach()), rtol=1e-3, atol=1e-4)
    scale[0] = 2.0
    with torch.no_grad():
        states = [gl.odeint(f, y0, TIMES, w, **OPTIONS, compile=c).ys for c in (True, False)]
    close(states[:1], states[1:])


@pytest.mark.parametrize("method", ["midpoint", pytest.param("dopri8", marks=pytest.mark.slow)])
def test_compiled_steps_that_are_recorded(method, monkeypatch):
    """States and gradients of adjoint="direct", with times within the steps; second derivatives are as they were."""
    from gradlab.transforms.odes import _torch_compiled

    net, kinds, run = network(), [], _torch_compiled.Program.run
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y0 = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    f = lambda t, y, w: net(y) * torch.cos(w * t)
    params, options = [y0, w, *net.parameters()], {"adjoint": "direct", "method": method}
    monkeypatch.setattr(
        _torch_compiled.Program, "run", lambda self, name, *rest: kinds.append(name) or run(self, name, *rest)
    )
    close(gradients(f, y0, params, w, compile=True, **options), gradients(f, y0, params, w, **options))
    assert set(kinds) == {"begin", "forwards", "slopes", "recorded"}
    for compile in (True, False):
        ys = gl.odeint(f, y0, TIMES, w, **OPTIONS | options, compile=compile).ys
        again = [torch.autograd.grad(ys.sum(), params, retain_graph=True) for _ in range(2)]
        close(*again)
    ys = gl.odeint(f, y0, TIMES[:1], w, **OPTIONS | options, compile=True).ys  # no step
    close(torch.autograd.grad(ys.sum(), y0), [torch.ones_like(y0)])
    second = []
    for compile in (True, False):
        ys = gl.odeint(f, y0, TIMES, w, **OPTIONS | options, compile=compile).ys
        first = torch.autograd.grad(ys.square().sum(), w, create_graph=True)[0]
        second.append(torch.autograd.grad(first, w)[0])
    close(second[:1], second[1:])


def test_compiled_steps_of_an_equation_that_differentiates():
    """By a transform of its own, and with a part held constant; by both adjoints, whose first slopes are of one f."""
    W = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y0 = torch.tensor([[0.5, -1.0]], dtype=torch.float64, requires_grad=True)

    def f(t, y):
        value, pull = torch.func.vjp(lambda z: torch.tanh(z @ W), y)
        with torch.no_grad():
            size = 1 + y.square().sum()
        return torch.cos(t) * value + pull(torch.ones_like(y))[0] / size

    for adjoint in ("direct", "auto"):
        found = gradients(f, y0, [y0, W], adjoint=adjoint, compile=True)
        close(found, gradients(f, y0, [y0, W], adjoint=adjoint))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tsit5", "dopri5", "dopri8", "auto"])
def test_compiled_steps_of_every_order(method):
    """Of a state that is a tree."""
    net = network()
    a, b = torch.ones(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    f = lambda t, y: {"a": net(y["a"]) + y["b"], "b": -y["b"] + y["a"].sum(0) * t}
    found = {}
    for compile in (True, False):
        ys = gl.odeint(f, {"a": a, "b": b}, TIMES, **OPTIONS | {"method": method}, compile=compile).ys
        grads = torch.autograd.grad(ys["a"].sum() + ys["b"].square().sum(), [b, *net.parameters()])
        found[compile] = [ys["a"].detach(), ys["b"].detach(), *grads]
    close(found[True], found[False])


def test_what_cannot_be_compiled():
    one = torch.ones(2, dtype=torch.float64)
    with pytest.raises(InputError, match=r"compile=True.*kvaerno5 is implicit.*compile=False"):
        gl.odeint(lambda t, y: -y, one, TIMES, method="kvaerno5", compile=True)
    by_numbers = lambda t, y: y if float(y.sum()) > 0 else -y
    with pytest.raises(StrategyError, match=r"compile=True cannot compile f.*pass compile=False"):
        gl.odeint(by_numbers, one, TIMES, compile=True)


@pytest.mark.parametrize("compile", [False, True])
def test_sixteen_bits_within_an_equation(compile):
    """In it autocast rounds to 3 digits; around the solution it is refused."""
    W = torch.tensor([[0.3, -1.0], [0.7, 0.2]], requires_grad=True)
    y0 = torch.tensor([[0.5, -1.0]], requires_grad=True)
    plain = lambda t, y: torch.tanh(y @ W).float()

    def f(t, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(t, y)

    found = gradients(f, y0, [y0, W], compile=compile, rtol=1e-2)
    close(found, gradients(plain, y0, [y0, W], rtol=1e-2), rtol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(StrategyError, match="use it inside f"):
        gl.odeint(plain, y0, TIMES, compile=compile)


@pytest.mark.parametrize("method", ["midpoint", "tsit5", "dopri8"])
def test_recorded_steps(method):
    """Those pulled back stage by stage are those differentiated by torch; and their second derivatives."""
    net = network()
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y0 = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    f = lambda t, y, w: net(y) * torch.cos(w * t)
    params = [y0, w, *net.parameters()]
    options = {"method": method, "adjoint": "direct", "rtol": 1e-3}
    found = gradients(f, y0, params, 2 * w, **options)
    loss = lambda y0, w: (gl.odeint(f, y0, TIMES, 2 * w, **OPTIONS | options).ys.sin() ** 2).sum()
    by_torch = torch.func.grad(loss, (0, 1))
    close(found[1:3], by_torch(y0.detach(), w.detach()))
    first = torch.autograd.grad(loss(y0, w), params, create_graph=True)
    close([g.detach() for g in first], found[1:])
    again = torch.autograd.grad(sum((g**2).sum() for g in first[:2]), [y0, w])
    size = lambda y0, w: sum((g**2).sum() for g in by_torch(y0, w))
    close(again, torch.func.grad(size, (0, 1))(y0.detach(), w.detach()), rtol=1e-9)


def test_a_float64_state_where_float32_is_the_default():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        k = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        y0 = torch.ones(1, dtype=torch.float64)
        ys = gl.odeint(lambda t, y, k: -k * y, y0, TIMES, k, rtol=1e-10, atol=1e-12).ys
        assert np.isclose(float(torch.autograd.grad(ys[-1, 0], k)[0]), -np.exp(-2.0), rtol=1e-8, atol=0)
    finally:
        torch.set_default_dtype(default)
