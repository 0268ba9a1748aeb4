"""Every adjoint of odeint under every nest of modes: its closed form, or a refusal by name."""

import numpy as np
import pytest

from frameworks import EACH, FRAMEWORKS, load
from gradlab import StrategyError
from gradlab.bench.ode_problems import EQUATIONS
from test_odes import NESTS, X, exact, nests, solved

ADJOINTS = ["interpolating", "forward", "backsolve", "direct", "checkpoint"]  # auto: test_odes.py
QUICK = {
    ("interpolating", "grad"),
    ("interpolating", "jvp"),
    ("forward", "jvp"),
    ("forward", "vmap of grad"),
    ("forward", "jacfwd of jacfwd"),
    ("backsolve", "grad"),
    ("backsolve", "vmap of grad"),
    ("backsolve", "jacrev of jacfwd"),
    ("direct", "jvp"),
    ("direct", "jacrev of jacrev"),
    ("direct", "vmap of jacfwd of jacrev"),
    ("checkpoint", "jacrev of jacrev"),
    ("checkpoint", "vmap of grad"),
}
QUICK_JAX = {("interpolating", "jvp"), ("checkpoint", "jvp"), ("direct", "grad"), ("backsolve", "grad")}
CELLS = [
    pytest.param(framework, adjoint, nest, marks=() if quick else pytest.mark.slow)
    for framework in FRAMEWORKS
    for adjoint in ADJOINTS
    for nest in NESTS
    for quick in [(adjoint, nest) in (QUICK if framework == "torch" else QUICK_JAX)]
]


def refused(framework, adjoint, nest):
    """What a method cannot serve by its nature: forward mode next to the solve, or reverse mode anywhere."""
    reverse = "grad" in nest or "jacrev" in nest
    if (framework, adjoint) == ("jax", "checkpoint"):  # diffrax's, of reverse mode and once
        return nest.removeprefix("vmap of ").removesuffix(" of vmap") not in (
            "value",
            "vmap",
            "grad",
            "jacrev",
        )
    if adjoint == "forward":
        return reverse
    innermost_forward = nest.endswith(("jvp", "jacfwd"))
    return innermost_forward if adjoint in ("interpolating", "backsolve") else False


@pytest.mark.parametrize(("framework", "adjoint", "nest"), CELLS)
def test_matrix(framework, adjoint, nest):
    fw = load(framework)
    x = fw.array(X)
    run = nests(fw, solved(fw, adjoint=adjoint, method="tsit5", rtol=1e-9, atol=1e-11))[nest]
    run = fw.compile(run) if framework == "jax" else run
    if refused(framework, adjoint, nest):
        with pytest.raises(StrategyError, match=f"adjoint='{adjoint}' is of .*pass adjoint='auto'"):
            run(x)
        return
    found, expected = fw.numpy(run(x)), fw.numpy(nests(fw, exact(fw))[nest](x))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-8 * np.abs(expected).max()


def decayed(fw, rate, **options):
    """The derivative of exp(-rate) y0 with respect to y0, and to the rate."""
    f = lambda t, y, k: -k * y
    run = lambda x: fw.gl.odeint(f, x[:1], fw.array([0.0, 1.0]), x[1], rtol=1e-6, atol=1e-8, **options).ys[
        -1, 0
    ]
    return fw.numpy(fw.grad(run)(fw.array([1.0, rate])))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_state_that_does_not_come_back(framework):
    """What decayed below the tolerances does not grow back to y0, and that is said."""
    fw = load(framework)
    with pytest.raises(RuntimeError, match=r"y integrated backwards misses y0.*adjoint='auto'"):
        decayed(fw, 40.0, adjoint="backsolve")
    assert np.isnan(decayed(fw, 40.0, adjoint="backsolve", throw=False)[0])
    assert np.allclose(decayed(fw, 2.0, adjoint="backsolve"), np.exp(-2.0) * np.array([1, -1]), rtol=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("adjoint", "method"),
    [
        ("direct", "kvaerno5"),
        pytest.param("checkpoint", "kvaerno5", marks=pytest.mark.slow),
        pytest.param("direct", "rodas5p", marks=pytest.mark.slow),
    ],
)
def test_implicit_steps(framework, adjoint, method):
    """The steps of an implicit method, with a derivative in the times, of examples that end at different steps."""
    fw = load(framework)
    f = lambda t, y, a: -a * (y - fw.xp.sin(t)) * y
    options = {"method": method, "rtol": 1e-5, "atol": 1e-7}

    def loss(x, adjoint):
        ys = fw.gl.odeint(f, x[:1], x[1:4], x[4], adjoint=adjoint, **options).ys
        return (ys[1:] ** 2).sum()

    xs = fw.array([[0.5, 0.0, 0.4, 1.0, 2.0], [0.6, 0.1, 0.5, 0.9, 30.0]])
    found = fw.numpy(fw.vmap(fw.grad(lambda x: loss(x, adjoint)))(xs))
    expected = fw.numpy(fw.vmap(fw.grad(lambda x: loss(x, "auto")))(xs))
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-4)
    if framework == "torch":
        x = xs[0].requires_grad_()
        loss(x, adjoint).backward()
        assert np.allclose(x.grad.numpy(), found[0], rtol=1e-6)


def turned(fw, ts, w, **options):
    """Points that turn with angular velocity w."""
    f = lambda t, y, w: fw.xp.stack([w * y[1], -w * y[0]])
    return fw.gl.odeint(f, fw.array([1.0, 0.5]), ts, w, rtol=1e-8, atol=1e-10, **options).ys


@pytest.mark.parametrize("ts", [[0.0, 7.0, 8.0, 30.0], [0.0, -20.0]], ids=["forwards", "backwards"])
def test_more_steps_than_a_segment_of_jax(ts):
    """The gradient of hundreds of steps, of which 64 are in memory at a time; each example has its own."""
    fw = load("jax")
    ts, w = fw.array(ts), np.array([0.1, 3.0])
    loss = lambda w: turned(fw, ts, w)[1:, 0].sum()
    found = fw.numpy(fw.compile(fw.vmap(fw.grad(loss)))(fw.array(w)))
    angle = np.outer(w, ts[1:])
    expected = (fw.numpy(ts)[1:] * (0.5 * np.cos(angle) - np.sin(angle))).sum(1)
    assert np.allclose(found, expected, rtol=0, atol=1e-5)


def test_a_solve_of_jax_holds_no_room_for_all_its_steps():
    """Of a cotangent, which has room for 4096 steps of 9 states by default, the memory that is planned."""
    fw = load("jax")
    y = fw.array(np.ones(256))
    gradient = fw.grad(lambda y: fw.gl.odeint(lambda t, y: -y, y, fw.array([0.0, 1.0])).ys[-1].sum())
    planned = fw.compile(gradient).lower(y).compile().memory_analysis().temp_size_in_bytes
    assert planned < 1500 * y.nbytes


def test_fixed_steps_of_jax_hold_no_room_for_more():
    """The cotangent of 20 steps, with room for 4096 by default, plans the memory of tens."""
    fw = load("jax")
    gradient = lambda **options: fw.grad(
        lambda y: fw.gl.odeint(lambda t, y: -y, y, np.array([0.0, 1.0]), method="rk4", **options).ys[-1].sum()
    )
    y = fw.array(np.ones(64))
    planned = fw.compile(gradient(step_size=0.05)).lower(y).compile().memory_analysis().temp_size_in_bytes
    assert planned < 100 * 8 * y.nbytes
    assert np.allclose(fw.numpy(gradient(step_size=0.05)(y)), np.exp(-1), rtol=1e-6)


@pytest.mark.parametrize("framework", EACH)
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
def test_a_state_that_does_not_come_back_at_loose_tolerances(framework, tolerance):
    """Van der Pol's oscillation ends, backwards, in the point of rest: a few hundred times the tolerances from y0."""
    fw, e = load(framework), EQUATIONS["van_der_pol_1"]
    options = {"rtol": tolerance, "atol": tolerance, "adjoint": "backsolve"}
    f, ts = lambda t, y: fw.xp.stack(e.f(t, y, e.p)), fw.array([0.0, e.end])
    with pytest.raises(Exception, match="misses y0"):
        fw.numpy(fw.grad(lambda y: fw.gl.odeint(f, y, ts, **options).ys[-1].sum())(fw.array(e.y0)))
