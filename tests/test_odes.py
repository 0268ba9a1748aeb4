"""odeint: closed forms under every nest of modes, steps, trees, closures, and what is refused."""

from typing import get_args

import numpy as np
import pytest

import gradlab
from frameworks import EACH, FRAMEWORKS, load
from gradlab import ConvergenceError, InputError, KindError
from gradlab.bench.ode_problems import EQUATIONS
from gradlab.transforms.odes.options import Adjoint, Status
from gradlab.transforms.odes.tableaux import METHODS

X = np.array([0.3, 0.1, 0.0, 0.7, 2.0, 1.1, 0.7])  # y0, ts, a
V = np.array([0.3, -0.2, 0.1, 0.2, -0.3, 0.5, 0.4])
W = np.array([[0.3, -1.2], [0.8, 0.5], [-0.6, 1.1]])
EXPLICIT = [name for name, tableau in METHODS.items() if not tableau.implicit]


def logistic(t, y, a):
    return a * y * (1 - y)


def solved(fw, **options):
    """x to the states at ts of y' = a y (1 - y)."""
    options = {"rtol": 1e-10, "atol": 1e-12, "max_steps": 512, **options}
    return lambda x: fw.gl.odeint(logistic, x[:2], x[2:5], x[5:], **options).ys


def exact(fw):
    def states(x):
        y0, ts, a = x[:2], x[2:5], x[5:]
        grown = fw.xp.exp(a * (ts - ts[0])[:, None])
        return y0 * grown / (1 + y0 * (grown - 1))

    return states


def nests(fw, solution):
    """Every nest of modes to second order, two of the third, and vmap of some."""
    w, v = fw.array(W), fw.array(V)
    loss = lambda x: (fw.xp.sin(solution(x)) * w).sum()
    modes = {"jacrev": fw.jacrev, "jacfwd": fw.jacfwd}
    pushed = lambda f: lambda x: fw.jvp(f, x, v)
    runs = {"value": solution, "jvp": pushed(solution), "grad": fw.grad(loss)}
    runs |= {name: mode(solution) for name, mode in modes.items()}
    for outer, mode in modes.items():
        runs |= {f"{outer} of {inner}": mode(other(loss)) for inner, other in modes.items()}
    runs["jvp of jvp of grad"] = pushed(pushed(fw.grad(loss)))
    runs["grad of jvp of jvp"] = fw.grad(pushed(pushed(loss)))
    for name in ("value", "grad", "jacfwd", "jacfwd of jacrev"):
        runs[f"vmap of {name}"] = over_batch(fw, runs[name])
    runs["grad of vmap"] = fw.grad(lambda x: over_batch(fw, loss)(x).sum())
    runs["vmap of vmap"] = over_batch(fw, over_batch(fw, solution))
    return runs


def over_batch(fw, f):
    """f at three points near x, mapped."""
    shifts = fw.array(np.outer([0.0, 0.02, -0.05], np.where(V > 0, V, 0)))
    return lambda x: fw.vmap(lambda d: f(x + d))(shifts)


def compare(fw, nest, tolerance=1e-8):
    x = fw.array(X)
    found, expected = nests(fw, solved(fw))[nest](x), nests(fw, exact(fw))[nest](x)
    found, expected = fw.numpy(found), fw.numpy(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max(), nest


NESTS = """value, jvp, grad, jacrev, jacfwd, jacrev of jacrev, jacrev of jacfwd, jacfwd of jacrev, jacfwd of jacfwd,
jvp of jvp of grad, grad of jvp of jvp, vmap of value, vmap of grad, vmap of jacfwd, vmap of jacfwd of jacrev,
grad of vmap, vmap of vmap""".replace("\n", " ").split(", ")
QUICK = {
    "torch": (
        "value",
        "jvp",
        "grad",
        "jacrev",
        "jacfwd of jacfwd",
        "vmap of grad",
        "grad of vmap",
        "vmap of vmap",
    ),
    "jax": ("grad",),
}


def cells(framework):
    """Every nest, of which some are among the quick tests."""
    return [n if n in QUICK[framework] else pytest.param(n, marks=pytest.mark.slow) for n in NESTS]


@pytest.mark.parametrize("nest", cells("torch"))
def test_nests_in_torch(nest):
    compare(load("torch"), nest)


@pytest.mark.parametrize("nest", cells("jax"))
def test_nests_in_jax(nest):
    fw = load("jax")
    x = fw.array(X)
    found = fw.numpy(fw.compile(nests(fw, solved(fw))[nest])(x))
    expected = fw.numpy(nests(fw, exact(fw))[nest](x))
    assert np.abs(found - expected).max() <= 1e-8 * np.abs(expected).max()


def test_a_wrong_derivative_is_seen(monkeypatch):
    """The nests would show a tangent that is off by 1e-7 of itself."""
    from gradlab.transforms.odes import _torch_rules

    right = _torch_rules.tangent

    def wrong(*args):
        ys, s = right(*args)
        return ys, s * (1 + 1e-7)

    monkeypatch.setattr(_torch_rules, "tangent", wrong)
    for nest in ("jvp", "jacfwd of jacrev"):
        with pytest.raises(AssertionError):
            compare(load("torch"), nest)


ERRORS = [
    pytest.param(framework, name, tolerance, marks=() if quick else pytest.mark.slow)
    for framework in FRAMEWORKS
    for name in ("linear", "lotka_volterra", "lorenz", "van_der_pol_1", "van_der_pol_10", "van_der_pol_100")
    for tolerance in (1e-3, 1e-5, 1e-6, 1e-7, 1e-9)
    for quick in [framework == "torch" and name in ("lotka_volterra", "lorenz") and tolerance == 1e-3]
]


@pytest.mark.parametrize(("framework", "name", "tolerance"), ERRORS)
def test_error_of_a_gradient(framework, name, tolerance):
    """At most 100 times the tolerance, against SciPy's variational equations at 1e-12."""
    fw, equation = load(framework), EQUATIONS[name]
    reference, n = equation.reference(), len(equation.y0)
    weights = np.linspace(1, 2, n)
    options = {"rtol": tolerance, "atol": tolerance, "max_steps": 100_000}

    def loss(x):
        f = lambda t, y, p: fw.xp.stack(equation.f(t, y, p))
        ys = fw.gl.odeint(f, x[:n], fw.array([0.0, equation.end]), x[n:], **options).ys
        return (ys[-1] * fw.array(weights)).sum()

    found = fw.numpy(fw.grad(loss)(fw.array([*equation.y0, *equation.p])))
    for part, unit, key in ((found[:n], 1.0, "dy0"), (found[n:], np.array(equation.p), "dp")):
        expected = weights @ reference[key]
        off = np.linalg.norm((part - expected) * unit) / np.linalg.norm(expected * unit)
        assert off <= 100 * tolerance, key


@pytest.mark.parametrize("adjoint", get_args(Adjoint))
@pytest.mark.parametrize("framework", EACH)
def test_a_gradient_of_what_was_not_reached(framework, adjoint):
    """It is refused where the value is, compiled code of the gradient alone included; else it is not-a-number."""
    fw = load(framework)
    options = {"adjoint": adjoint, "max_steps": 12, "rtol": 1e-8}
    f, ts, x = lambda t, y, k: -k * y * (1 + t), fw.array([0.0, 0.1, 10.0]), fw.array([1.0, 2.0, 1.0])
    states = lambda x, **more: fw.gl.odeint(f, x[:2], ts, x[2:], **options, **more).ys.sum(1)
    compiled = fw.compile if framework == "jax" else lambda f: f
    gradient = lambda f: compiled((fw.jacfwd if adjoint == "forward" else fw.grad)(f))
    with pytest.raises(Exception, match="max_steps"):
        fw.numpy(gradient(lambda x: states(x)[-1])(x))
    at = lambda i: fw.numpy(gradient(lambda x: states(x, throw=False)[i])(x))
    assert np.isnan(at(2)).all()
    gone = np.exp(-0.105)
    expected = [gone, gone, -3 * 0.105 * gone]
    found = at(1)  # or none, where y has to come back, or a graph holds what was not reached
    whole = adjoint in ("auto", "interpolating", "forward")
    assert (np.isclose(found, expected, rtol=1e-5, atol=0) | (np.isnan(found) & (not whole))).all()
    if framework == "torch" and adjoint != "forward":
        x = x.requires_grad_()
        ys = states(x, throw=False)
        assert fw.numpy(fw.xp.autograd.grad(ys[2], x, retain_graph=True)[0].isnan()).all()
        if adjoint == "direct":
            assert np.allclose(fw.numpy(fw.xp.autograd.grad(ys[1], x)[0]), expected, rtol=1e-5, atol=0)


def test_a_float32_state_with_float64_times(fw):
    """f is given t in the dtype of y, and so are cotangents."""
    y0, ts = fw.array([1.0, 2.0], dtype="float32"), fw.array([0.0, 0.5])
    ends = lambda y: fw.gl.odeint(lambda t, y: -y * t, y, ts).ys[-1]
    found = fw.grad(lambda y: ends(y).sum())(y0)
    assert "float32" in str(ends(y0).dtype)
    assert "float32" in str(found.dtype)
    assert np.allclose(fw.numpy(found), np.exp(-0.125), rtol=1e-4, atol=0)


@pytest.mark.parametrize("adjoint", get_args(Adjoint))
@pytest.mark.parametrize("framework", EACH)
def test_one_time_alone(framework, adjoint):
    """Nothing to integrate: the state is y0."""
    fw = load(framework)
    y0, t0 = fw.array([0.3, -1.2]), fw.array([0.5])
    states = lambda y: fw.gl.odeint(lambda t, y: -t * y, y, t0, adjoint=adjoint).ys
    mode = fw.jacfwd if adjoint == "forward" else fw.jacrev
    assert np.array_equal(fw.numpy(states(y0)), fw.numpy(y0)[None])
    assert np.array_equal(fw.numpy(mode(states)(y0)), np.eye(2)[None])


def test_backwards_in_time(fw):
    back = fw.array([2.0, 0.5, 0.0])
    ys = fw.gl.odeint(lambda t, y: -y + t, fw.array([1.0]), back, rtol=1e-10, atol=1e-12).ys
    expected = np.array([2.0, 0.5, 0.0])
    expected = (expected - 1)[:, None] + (1.0 - 1.0) * np.exp(2.0 - expected)[:, None]
    assert np.allclose(fw.numpy(ys), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", EXPLICIT)
def test_fixed_steps_are_those_of_diffrax(method):
    fw, other = load("torch"), load("jax")
    run = lambda fw: fw.numpy(
        fw.gl.odeint(
            lambda t, y, a: a * y * (1 - y) + 0.1 * fw.xp.sin(3 * t),
            fw.array(X[:2]),
            fw.array([0.0, 0.8, 1.6]),
            fw.array(X[5:]),
            method=method,
            step_size=0.1,
        ).ys
    )
    assert np.allclose(run(fw), run(other), rtol=4e-15, atol=0)


@pytest.mark.parametrize("method", EXPLICIT)
def test_order_of_convergence(method):
    fw, order = load("torch"), METHODS[method].order
    sizes = np.array([0.5, 0.25] if method == "dopri8" else [0.1, 0.05])
    errors = []
    for size in sizes:
        ts = fw.array([0.0, 4.0])
        ys = fw.gl.odeint(logistic, fw.array(X[:2]), ts, fw.array(X[5:]), method=method, step_size=size).ys
        grown = np.exp(X[5:] * 4)
        errors.append(np.abs(fw.numpy(ys)[-1] - X[:2] * grown / (1 + X[:2] * (grown - 1))).max())
    assert np.log2(errors[0] / errors[1]) > order - 0.2


def test_trees_and_stats(fw):
    y0 = {"a": fw.array([1.0, 2.0]), "b": fw.array([[0.5]])}
    f = lambda t, y, k: {"a": -k["rate"] * y["a"], "b": y["b"] * y["a"].sum()}
    rate = lambda r: fw.gl.odeint(
        f, y0, fw.array([0.0, 1.0]), {"rate": r, "name": "k"}, rtol=1e-9, atol=1e-11
    )
    solution = rate(fw.array(0.5))
    assert fw.numpy(solution.ys["a"]).shape == (2, 2)
    assert np.allclose(fw.numpy(solution.ys["a"])[1], [np.exp(-0.5), 2 * np.exp(-0.5)], rtol=1e-8)
    grown = 0.5 * np.exp(3 * (1 - np.exp(-0.5)) / 0.5)
    assert np.allclose(fw.numpy(solution.ys["b"])[1], grown, rtol=1e-8)
    assert int(solution.status) == Status.DONE
    assert int(solution.stats["evaluations"]) > 6 * int(solution.stats["accepted"]) > 0


def test_closures(fw):
    def last(k, k_inside):
        f = (lambda t, y: -k * y) if k_inside else (lambda t, y, k: -k * y)
        args = () if k_inside else (k,)
        return fw.gl.odeint(f, fw.array(1.0), fw.array([0.0, 1.0]), *args, rtol=1e-9, atol=1e-11).ys[-1]

    for inside in (True, False):
        assert np.isclose(float(fw.grad(lambda k: last(k, inside))(fw.array(0.5))), -np.exp(-0.5), rtol=1e-8)


def test_parameters_of_a_module():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 2, dtype=torch.float64)
    y0, ts = torch.ones(3, 2, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    loss = lambda f, *args: (
        load("torch").gl.odeint(f, y0, ts, *args, rtol=1e-9, atol=1e-11).ys[-1] ** 2
    ).sum()
    named = {name: p.detach() for name, p in net.named_parameters()}
    given = torch.func.grad(
        lambda params: loss(lambda t, y, p: torch.func.functional_call(net, p, (y,)), params)
    )(named)
    first = torch.autograd.grad(loss(lambda t, y: net(y)), list(net.parameters()), create_graph=True)
    for g, (name, p) in zip(first, net.named_parameters(), strict=True):
        assert torch.allclose(g, given[name], rtol=1e-8)
        assert p.grad is None
    again = torch.autograd.grad(sum((g**2).sum() for g in first), list(net.parameters()))
    size = lambda params: sum(
        (g**2).sum()
        for g in torch.func.grad(lambda p: loss(lambda t, y, p: torch.func.functional_call(net, p, (y,)), p))(
            params
        ).values()
    )
    for g, expected in zip(again, torch.func.grad(size)(named).values(), strict=True):
        assert torch.allclose(g, expected, rtol=1e-7)


def test_what_is_refused(fw):
    one, ts = fw.array([1.0]), fw.array([0.0, 1.0])
    decay = lambda t, y: -y
    run = lambda f=decay, y0=one, ts=ts, *args, **options: gradlab.odeint(f, y0, ts, *args, **options)
    for times in ([0.0, 1.0, 1.0], [0.0, 2.0, 1.0], [0.0, np.nan]):
        with pytest.raises(InputError, match="not sorted"):
            run(ts=fw.array(times))
    with pytest.raises(InputError, match="unknown method 'rk45'; pass one of auto, euler"):
        run(method="rk45")
    with pytest.raises(InputError, match="unknown adjoint 'symplectic'; pass one of auto"):
        run(adjoint="symplectic")
    with pytest.raises(InputError, match=r"method='auto' chooses.*step_size fixes"):
        run(method="auto", step_size=0.1)
    with pytest.raises(InputError, match=r"rk4 has no estimate of its error.*step_size"):
        run(method="rk4")
    with pytest.raises(InputError, match="rtol is -1"):
        run(rtol=-1)
    with pytest.raises(KindError, match="f is a str"):
        run("decay")
    with pytest.raises(KindError, match=r"y0\['n'\] is of .*int.*convert it"):
        run(lambda t, y: y, {"n": fw.array([1]), "x": one})
    with pytest.raises(KindError, match="ts has shape"):
        run(ts=fw.array(1.0))
    with pytest.raises(InputError, match=r"(?s)f's output has the structure.*return a tree like y0"):
        run(lambda t, y: (y, y))
    with pytest.raises(InputError, match=r"f's output has shape.*return a tree like y0"):
        run(lambda t, y: y[None])


def test_what_does_not_finish(fw):
    blows_up = lambda t, y: y**2  # y = 1 / (1 - t)
    one, ts = fw.array([1.0]), fw.array([0.0, 0.5, 2.0])
    with pytest.raises(ConvergenceError, match="odeint: "):
        gradlab.odeint(blows_up, one, ts)
    with pytest.raises(ConvergenceError, match="max_steps = 3"):
        gradlab.odeint(lambda t, y: -y, one, ts, max_steps=3, rtol=1e-9)
    solution = gradlab.odeint(blows_up, one, ts, throw=False)
    assert int(solution.status) != Status.DONE
    ys = fw.numpy(solution.ys)
    assert np.allclose(ys[:2, 0], [1.0, 2.0], rtol=1e-4)
    assert np.isnan(ys[2]).all()


def test_not_a_number_is_named_in_torch():
    fw = load("torch")
    f = lambda t, y: fw.xp.log(y)
    with pytest.raises(ConvergenceError, match=r"f is not finite at t = 0, y = \[-1\]"):
        fw.gl.odeint(f, fw.array([-1.0]), fw.array([0.0, 1.0]))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_examples_have_steps_of_their_own(framework):
    fw = load(framework)
    rates = fw.array([0.1, 1.0, 30.0])
    run = lambda k: fw.gl.odeint(
        lambda t, y: -k * y, fw.array([1.0]), fw.array([0.0, 1.0]), rtol=1e-8, atol=1e-8
    )
    many = fw.vmap(lambda k: run(k)[1]["accepted"])(rates)
    alone = [int(run(k).stats["accepted"]) for k in rates]
    assert [int(n) for n in many] == alone
    assert len(set(alone)) == 3


@pytest.mark.parametrize("how", ["torch.func", "autograd"])
def test_tensors_that_a_transform_within_wraps_are_refused(how):
    """Else their derivative would be lost, or torch would report a fault of its own."""
    torch = pytest.importorskip("torch")
    one, w = torch.ones((), dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    squared = lambda w: torch.func.grad(lambda w: w**2 / 2)(w)
    solve = lambda f, *args: gradlab.odeint(f, one, torch.tensor([0.0, 1.0]), *args).ys[-1]
    closed = lambda w: solve(lambda t, y: squared(w) * y)
    given = lambda w: solve(lambda t, y, w: squared(w) * y, w)
    gradient = torch.func.grad if how == "torch.func" else lambda f: lambda w: torch.autograd.grad(f(w), w)[0]
    w = w if how == "torch.func" else w.requires_grad_()
    with pytest.raises(gradlab.StrategyError, match="pass the tensor as an argument"):
        gradient(closed)(w)
    torch.testing.assert_close(gradient(given)(w), w.exp().detach(), rtol=1e-5, atol=0)
