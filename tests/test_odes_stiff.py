"""Implicit methods: order, stiff equations against SciPy and reference sensitivities, the switch to them."""

import numpy as np
import pytest

from frameworks import EACH, FRAMEWORKS, load
from gradlab import ConvergenceError
from gradlab.bench.ode_problems import EQUATIONS
from gradlab.transforms.odes.tableaux import METHODS

IMPLICIT = [name for name, tableau in METHODS.items() if tableau.implicit]


def solve(fw, name, ts=None, **options):
    """The states of a known equation, and how it went."""
    e = EQUATIONS[name]
    ts = fw.array([0.0, e.end] if ts is None else ts)
    return fw.gl.odeint(
        lambda t, y, p: fw.xp.stack(e.f(t, y, p)), fw.array(e.y0), ts, fw.array(e.p), **options
    )


def forced(fw):
    """y' = -a (y - sin t) + cos t, whose solution from 0 is sin t."""
    return lambda t, y, a: -a * (y - fw.xp.sin(t)) + fw.xp.cos(t)


@pytest.mark.parametrize("method", IMPLICIT)
def test_order_of_convergence(method):
    fw, order = load("torch"), METHODS[method].order
    f = lambda t, y, a: a * y * (1 - y) + fw.xp.sin(t) * y
    y0, ts, a = fw.array([0.1, 0.7]), fw.array([0.0, 2.0]), fw.array([1.1, 0.7])
    exact = fw.gl.odeint(f, y0, ts, a, method="dopri8", rtol=1e-13, atol=1e-14).ys[-1]
    errors = []
    for size in (0.2, 0.1) if order == 5 else (0.05, 0.025):
        ys = fw.gl.odeint(f, y0, ts, a, method=method, step_size=size).ys
        errors.append(np.abs(fw.numpy(ys[-1] - exact)).max())
    assert np.log2(errors[0] / errors[1]) > order - 0.2


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("method", [m for m in IMPLICIT if m.startswith("kvaerno")])
@pytest.mark.slow
def test_fixed_steps_are_those_of_diffrax(framework, method):
    """Called by hand; linear in y, that Newton's iteration is done to rounding."""
    diffrax, fw, jax = pytest.importorskip("diffrax"), load(framework), load("jax")
    A, y0, end = [[-30.0, 2.0], [5.0, -1.0]], [1.0, -0.5], 1.6
    f = lambda fw: lambda t, y, A: A @ y + fw.xp.sin(3 * t)
    ours = fw.gl.odeint(
        f(fw), fw.array(y0), fw.array([0.0, end]), fw.array(A), method=method, step_size=0.1
    ).ys[-1]
    solver = getattr(diffrax, method.capitalize())(root_finder=diffrax.VeryChord(rtol=1e-12, atol=1e-12))
    theirs = diffrax.diffeqsolve(
        diffrax.ODETerm(f(jax)), solver, 0.0, end, 0.1, jax.array(y0), jax.array(A)
    ).ys[-1]
    assert np.allclose(fw.numpy(ours), np.asarray(theirs), rtol=1e-11, atol=0)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.slow
def test_states_are_those_of_scipy(framework, name):
    """DOP853, or Radau where stiff, at 1e-12."""
    fw, e = load(framework), EQUATIONS[name]
    reference, smallest = e.reference(), 1e-6 if e.stiff else 1.0
    method = "kvaerno5" if e.stiff else "tsit5" if name == "van_der_pol_100" else "dopri8"
    found = solve(fw, name, method=method, rtol=1e-8, atol=1e-8 * smallest, max_steps=100_000)
    assert np.abs(fw.numpy(found.ys[-1]) - reference["y"]).max() < 1e-7 * np.abs(reference["y"]).max()


@pytest.mark.parametrize("method", IMPLICIT)
def test_few_steps_where_an_equation_is_stiff(method):
    fw = load("torch")
    y0, ts = fw.array([0.0]), fw.array([0.0, 2.0])
    solution = fw.gl.odeint(forced(fw), y0, ts, fw.array(1e6), method=method, rtol=1e-6, atol=1e-8)
    assert np.allclose(fw.numpy(solution.ys)[1], np.sin(2.0), rtol=0, atol=1e-5)
    assert int(solution.stats["accepted"]) < 100


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=pytest.mark.slow if m == "kvaerno3" else ()) for m in [*IMPLICIT, "auto"]],
)
def test_every_example_by_itself_in_torch(method):
    """A batch of stiff and other equations: the steps of each are those that it has alone."""
    fw = load("torch")
    f, y0, ts = forced(fw), fw.array([0.5]), fw.array([0.0, 0.7, 1.5])
    run = lambda a: fw.gl.odeint(f, y0, ts, a, method=method, rtol=1e-3, atol=1e-5)
    rates = fw.array([1.0, 3e4, 40.0])
    ys, stats, *_ = fw.vmap(lambda a: run(a)[:2])(rates)
    for i, a in enumerate(rates):
        alone = run(a)
        assert np.allclose(fw.numpy(ys[i]), fw.numpy(alone.ys), rtol=1e-8)
        assert int(stats["accepted"][i]) == int(alone.stats["accepted"])
    loss = lambda a: (run(a).ys[1:] ** 2).sum()
    many = fw.vmap(fw.grad(loss))(rates)
    assert np.allclose(fw.numpy(many), [float(fw.grad(loss)(a)) for a in rates], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("framework", EACH)
def test_the_switch_is_taken_once_and_only_where_needed(framework):
    fw = load(framework)
    for rtol in (1e-4, 1e-8):
        stiff = solve(fw, "robertson", method="auto", rtol=rtol, atol=1e-4 * rtol)
        assert int(stiff.stats["accepted"]) < 200
    explicit = solve(fw, "robertson", method="tsit5", rtol=1e-4, atol=1e-8, throw=False, max_steps=2000)
    assert int(explicit.status) != 0
    plain = {m: solve(fw, "lotka_volterra", method=m, rtol=1e-5, atol=1e-7) for m in ("auto", "tsit5")}
    assert int(plain["auto"].stats["evaluations"]) == int(plain["tsit5"].stats["evaluations"])


CASES = [
    pytest.param(framework, name, method, tolerance, marks=() if quick else pytest.mark.slow)
    for framework in FRAMEWORKS
    for name in ("robertson", "hires", "oregonator")
    for method in ("kvaerno5", "rodas5p", "auto")
    for tolerance in ((1e-3, 1e-4, 1e-6, 1e-7, 1e-9) if name == "robertson" else (1e-4, 1e-7))
    for quick in [name == "robertson" and tolerance == 1e-4 and (framework == "torch" or method == "auto")]
]


@pytest.mark.parametrize(("framework", "name", "method", "tolerance"), CASES)
def test_error_of_a_gradient(framework, name, method, tolerance):
    """At most 100 times the tolerance, against SciPy's variational equations by Radau at 1e-12."""
    fw, equation = load(framework), EQUATIONS[name]
    reference, n = equation.reference(), len(equation.y0)
    weights = np.linspace(1, 2, n)

    def states(x):
        f = lambda t, y, p: fw.xp.stack(equation.f(t, y, p))
        options = {"method": method, "rtol": tolerance, "atol": tolerance * 1e-4, "max_steps": 20_000}
        return fw.gl.odeint(f, x[:n], fw.array([0.0, equation.end]), x[n:], **options).ys[-1]

    x = fw.array([*equation.y0, *equation.p])
    size = np.linalg.norm(reference["y"])
    assert np.linalg.norm(fw.numpy(states(x)) - reference["y"]) <= 100 * tolerance * size
    found = fw.numpy(fw.grad(lambda x: (states(x) * fw.array(weights)).sum())(x))
    for part, unit, key in ((found[:n], 1.0, "dy0"), (found[n:], np.array(equation.p), "dp")):
        expected = weights @ reference[key]
        off = np.linalg.norm((part - expected) * unit) / np.linalg.norm(expected * unit)
        assert off <= 100 * tolerance, key


def test_what_newton_cannot_solve_is_said():
    fw = load("torch")
    with pytest.raises(ConvergenceError, match="not finite"):
        fw.gl.odeint(
            lambda t, y: fw.xp.log(1 - t) * y, fw.array([1.0]), fw.array([0.0, 2.0]), method="kvaerno5"
        )
