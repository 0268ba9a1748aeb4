"""The checker: planted wrong rules fail with the right row blamed, right but hard functions pass."""

import json

import numpy as np
import pytest

import gradlab
from frameworks import arrays
from gradlab import check
from gradlab.check import differences


def with_rule(fw, f, slope):
    """A function with a derivative rule of our own: `slope(x, u, stop)` is Jᵀu, `stop` detaches."""
    if fw.name == "jax":
        import jax

        ruled = jax.custom_vjp(f)
        ruled.defvjp(lambda x: (f(x), x), lambda x, u: (slope(x, u, jax.lax.stop_gradient),))
        return ruled
    import torch

    class Ruled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return f(x)

        @staticmethod
        def backward(ctx, u):
            return slope(*ctx.saved_tensors, u, lambda t: t.detach())

    return Ruled.apply


def entry_wrong(x, u, stop):
    factors = np.ones(x.shape)
    factors[17 % len(factors)] = 1.5
    return u * 3 * x**2 * type_like(x, factors)


def type_like(x, values):
    return x * 0 + (x.new_tensor(values) if hasattr(x, "new_tensor") else values.astype(x.dtype))


# x³ elementwise; each rule is wrong in one way. The rows that must fail, among those supported.
FIRST = ("vjp", "gradient")
SECOND = ("hvp", "reverse over reverse")
WRONG = {
    "sign": (lambda x, u, stop: -3 * x**2 * u, FIRST),
    "factor of two": (lambda x, u, stop: 6 * x**2 * u, FIRST),
    "a thousandth": (lambda x, u, stop: 1.001 * 3 * x**2 * u, FIRST),
    "missing term": (lambda x, u, stop: (3 * x**2 - 0.1 * x) * u, FIRST),
    "constant": (lambda x, u, stop: 3 * u, FIRST),
    "zero": (lambda x, u, stop: 0 * u, FIRST),
    "shifted": (lambda x, u, stop: 3 * x**2 * u + 1e-3, FIRST),
    "one entry": (entry_wrong, FIRST),
    "at second order only": (lambda x, u, stop: 3 * stop(x) ** 2 * u, SECOND),
    "one factor at second order": (lambda x, u, stop: 3 * x * stop(x) * u, SECOND),
    "sign at second order": (lambda x, u, stop: 3 * (2 * stop(x) ** 2 - x**2) * u, SECOND),
}
POINT = np.linspace(0.4, 2.0, 23)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
@pytest.mark.parametrize("name", WRONG)
def test_planted_wrong_rules_fail(fw, name, dtype):
    slope, blamed = WRONG[name]
    cube = with_rule(fw, lambda x: x**3, slope)
    report = check.derivatives(lambda x: fw.xp.sin(cube(x)).sum(), fw.array(POINT, dtype))
    assert not report.passed
    failed = {row.claim for row in report.rows if row.status == "failed"}
    assert set(blamed) <= failed
    if blamed is SECOND:
        assert not set(FIRST) & failed
    with pytest.raises(gradlab.check.CheckError, match=r"differences give"):
        report.raise_if_failed()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_right_rule_passes(fw, dtype):
    cube = with_rule(fw, lambda x: x**3, lambda x, u, stop: 3 * x**2 * u)
    check.derivatives(lambda x: fw.xp.sin(cube(x)).sum(), fw.array(POINT, dtype)).raise_if_failed()


def test_a_detached_branch_fails(fw):
    stop = __import__("jax").lax.stop_gradient if fw.name == "jax" else lambda t: t.detach()
    f = lambda x: (x**2).sum() + 0.01 * (stop(x) ** 3).sum()
    report = check.derivatives(f, fw.array(POINT))
    assert report["gradient"].status == report["jvp"].status == report["vjp"].status == "failed"


def test_the_wrong_entry_is_located(fw):
    n = 10_000
    x = np.linspace(0.4, 2.0, n)
    cube = with_rule(
        fw, lambda x: x**3, lambda x, u, stop: u * 3 * x**2 * type_like(x, 1 + 0.5 * (np.arange(n) == 4321))
    )
    report = check.derivatives(lambda p: cube(p["w"]).sum(), {"w": fw.array(x)}, order=1)
    row = report["gradient"]
    assert (row.status, row.where) == ("failed", "x['w'][4321]")
    assert "off by" in row.message


HARD = {
    "Rosenbrock": (
        lambda xp, x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(),
        [-1.2, 1.0, 0.5],
    ),
    "exponentials far out": (lambda xp, x: xp.exp(x).sum(), [30.0, -30.0, 1.0]),
    "badly scaled": (lambda xp, x: (x * xp.exp(-(x**2) * 1e-14)).sum() + (x**2).sum(), [1e-6, 1.0, 1e6]),
    "tiny": (lambda xp, x: 1e-12 * xp.sin(x).sum(), [0.3, 2.0]),
    "huge": (lambda xp, x: 1e12 * xp.sin(x).sum(), [0.3, 2.0]),
    "norm": (lambda xp, x: xp.sqrt((x**2).sum()), [3.0, -4.0, 0.5]),
    "log near zero": (lambda xp, x: xp.log(x).sum(), [1e-3, 0.5]),
    "logsumexp": (lambda xp, x: xp.log(xp.exp(x).sum()), [1.0, 2.0, -3.0]),
    "oscillating": (lambda xp, x: xp.sin(100 * x).sum(), [0.3, 1.7]),
    "a quartic at its minimum": (lambda xp, x: (x**4).sum(), [0.0, 0.0]),
    "linear": (lambda xp, x: 3 * x.sum(), [1.0, 2.0]),
    "constant": (lambda xp, x: 0 * x.sum() + 2, [1.0, 2.0]),
    "kink elsewhere": (lambda xp, x: (abs(x) * x).sum() + abs(x - 5).sum(), [1.0, -2.0]),
    "saturated": (lambda xp, x: xp.tanh(5 * x).sum(), [0.9, -0.4]),
    "many outputs": (lambda xp, x: xp.stack([x[0] * x[1], xp.exp(x[0]), 1e-6 * x[1] ** 3]), [0.7, 1.3]),
    "a pole nearby": (lambda xp, x: (1 / (x - 1)).sum(), [1.01, 3.0]),
    "cancellation": (lambda xp, x: ((1 - xp.cos(x)) / x**2).sum(), [0.1, 1.0]),
}


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
@pytest.mark.parametrize("name", HARD)
def test_right_but_hard_functions_pass(fw, name, dtype):
    f, x = HARD[name]
    check.derivatives(lambda x: f(fw.xp, x), fw.array(np.array(x), dtype)).raise_if_failed()


def test_an_ill_conditioned_quadratic_passes(fw):
    n = 8
    hilbert = fw.array(1.0 / (np.arange(n)[:, None] + np.arange(n) + 1))
    check.derivatives(lambda x, A: x @ A @ x / 2, fw.array(np.ones(n)), hilbert).raise_if_failed()


def test_trees_with_constants_pass(fw):
    x = arrays(fw, {"a": np.array([0.3, 0.4]), "b": [np.array(2.0)], "n": 3, "o": None})
    report = check.derivatives(lambda x: (x["a"] ** x["n"]).sum() * x["b"][0], x)
    assert report.raise_if_failed().passed


def test_aux_and_data(fw):
    x = fw.array(POINT)
    check.derivatives(lambda x, a: ((a * x**3).sum(), "aux"), x, x, has_aux=True).raise_if_failed()


@pytest.mark.parametrize(
    "f", [lambda xp, x: abs(x).sum(), lambda xp, x: (x * (x > 0)).sum()], ids=["abs", "relu"]
)
def test_a_kink_is_inconclusive(fw, f):
    report = check.derivatives(lambda x: f(fw.xp, x), fw.array(np.array([0.0, 1.0])), order=1)
    assert report["gradient"].status == "inconclusive"
    assert not report.passed
    with pytest.raises(check.CheckError, match="kink"):
        report.raise_if_failed()


def test_a_jump_is_inconclusive(fw):
    f = lambda x: (x + 3 * (x > 1)).sum()
    assert check.derivatives(f, fw.array(np.array([1.0])), order=1)["gradient"].status == "inconclusive"


def test_unsteady_and_mutating_functions_are_named():
    torch = pytest.importorskip("torch")
    counter = iter(range(10**6))
    report = check.derivatives(lambda x: x.sum() + next(counter), torch.ones(2))
    assert [row.claim for row in report.rows] == ["value"]
    assert "differ" in report["value"].message

    def mutates(x, data):
        data += 1
        return (x * data).sum()

    assert (
        "changed its input args" in check.derivatives(mutates, torch.ones(2), torch.ones(2))["value"].message
    )


def test_not_finite_is_inconclusive(fw):
    report = check.derivatives(lambda x: (x / 0.0).sum(), fw.array(np.array([1.0])))
    assert report["value"].status == "inconclusive"


def test_forward_mode_through_custom_vjp_is_unsupported_not_wrong():
    jax = pytest.importorskip("jax")
    cube = jax.custom_vjp(lambda x: x**3)
    cube.defvjp(lambda x: (x**3, x), lambda x, u: (3 * x**2 * u,))
    report = check.derivatives(lambda x: cube(x).sum(), jax.numpy.asarray(POINT))
    assert report.passed
    assert report["jvp"].status == "unsupported"
    assert "custom_vjp" in report["jvp"].message


def test_float32_functions_over_float32_constants():
    """torch does not promote; the check runs f in float64 all the same, and sees a fault of one part in 10^4."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    W = torch.linspace(-1, 1, 12).reshape(3, 4)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
    x = torch.tensor([0.3, 0.1, -0.4, 0.9])
    good = lambda x: torch.tanh(W @ x).square().sum() + model(x).float().sum()
    report = check.derivatives(good, x, modes="reverse")
    assert report.passed
    assert all((row.uncertainty or 0.0) < 1e-4 for row in report.rows)
    slightly = lambda x: good(x) + 1e-4 * (x - x.detach()).sum()
    assert not check.derivatives(slightly, x, modes="reverse").passed


def test_float32_functions_without_a_float64_form():
    """Differences of the float32 function decide, as far as they resolve it."""
    torch = pytest.importorskip("torch")
    buffer, x = torch.zeros(4), torch.tensor([0.3, 0.1, -0.4, 0.9])
    f = lambda x: torch.tanh(x).square().sum() + buffer.zero_().sum()
    assert check.derivatives(f, x).passed
    stop = lambda x: f(x.detach()) + 0.1 * x.sum()
    assert not check.derivatives(stop, x).passed


def test_float32_convolution_over_float32_data():
    jax = pytest.importorskip("jax")
    eqx = pytest.importorskip("equinox")
    conv = eqx.nn.Conv2d(1, 2, 3, key=jax.random.key(0), dtype=jax.numpy.float32)
    image = jax.random.normal(jax.random.key(1), (1, 8, 8), jax.numpy.float32)
    apply, params = gradlab.functional(conv)
    assert check.derivatives(lambda p: jax.numpy.tanh(apply(p, image)).sum(), params).passed


def test_the_report_reads_well(fw):
    report = check.derivatives(lambda x: (x**3).sum(), fw.array(POINT))
    assert str(report).splitlines()[0].split() == ["claim", "status", "error", "uncertainty", "where"]
    parsed = json.loads(report.to_json())
    assert parsed["passed"]
    assert [row["claim"] for row in parsed["rows"]][:5] == ["value", "structure", "jvp", "vjp", "gradient"]
    assert report.__rich__().row_count == len(report.rows)
    assert report.raise_if_failed() is report


def test_bad_input(fw):
    x = fw.array(POINT)
    with pytest.raises(gradlab.KindError, match="pass the function, then its point"):
        check.derivatives(x, x)
    with pytest.raises(gradlab.InputError, match="order is 4; pass 1, 2 or 3"):
        check.derivatives(lambda x: x.sum(), x, order=4)
    with pytest.raises(gradlab.InputError, match="modes is 'back'; pass one of all, forward, reverse"):
        check.derivatives(lambda x: x.sum(), x, modes="back")
    with pytest.raises(gradlab.InputError, match="directions is 0; pass a positive integer"):
        check.derivatives(lambda x: x.sum(), x, directions=0)
    with pytest.raises(gradlab.KindError, match="x holds no float"):
        check.derivatives(lambda x: x.sum(), fw.array(np.ones(2, int)))
    with pytest.raises(gradlab.InputError, match="empty tree"):
        check.derivatives(lambda x: 1.0, [], x)


# The reference by itself: numpy functions with known slopes.
@pytest.mark.parametrize(
    ("g", "x", "slope"),
    [
        (np.exp, 1.0, np.e),
        (np.sin, 1e-3, np.cos(1e-3)),
        (lambda x: np.float64(np.float32(np.sin(x))), 0.7, np.cos(0.7)),
        (lambda x: np.sin(50 * x), 0.2, 50 * np.cos(10.0)),
        (lambda x: x**0.5, 1e-4, 50.0),
        (lambda x: 1e-9 * x**7, 2.0, 7e-9 * 64),
    ],
)
def test_the_error_estimate_is_honest(g, x, slope):
    estimate = differences.directional(lambda z: g(z), np.array([x]), np.array([1.0]) * x)
    error = abs(estimate.value[0] - slope * x)
    assert error <= 3 * estimate.uncertainty[0]
    assert estimate.uncertainty[0] < 1e-3 * abs(slope * x)


def test_curvature_from_values():
    estimate = differences.curvature(
        lambda z: np.exp(z[:1] * z[1:]), np.array([0.5, 0.7]), np.array([1.0, 0.0])
    )
    assert abs(estimate.value[0] - 0.49 * np.exp(0.35)) <= 3 * estimate.uncertainty[0] < 1e-6
