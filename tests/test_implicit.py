"""root, fixed_point and argmin: closed forms, every nest of modes, trees, closures, and what is refused."""

import re
import warnings

import numpy as np
import pytest

import gradlab
import implicit_table
from composition import PAGE, Case
from frameworks import FRAMEWORKS, load
from gradlab import ConvergenceError, ConvergenceWarning, InputError, KindError, StrategyError, check

OPERATIONS = ["root", "fixed_point", "argmin"]
QUICK = {
    "jax": ("root, direct", "argmin, direct", "root, closing over x"),
    "torch": ("root, direct", "argmin, cg", "fixed_point, closing over x"),
}
SOME = ("vjp", "jacfwd of jacrev", "grad of jvp of grad", "jvp of grad of jvp")


def documented(framework):
    """The page's table: {nest: {problem: outcome}}."""
    page = PAGE.with_name("implicit_composition.md").read_text()
    section = page.split(f"## {framework}\n")[1].split("\n## ")[0]
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in section.strip().split("\n")]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def compare(fw, problems=None, nests=None):
    """Run cells and compare them with the page; a wrong number is an error that names the cell."""
    page = documented(fw.name)
    for problem, f, M in implicit_table.solutions(fw):
        if problems is None or problem in problems:
            for nest, run in implicit_table.cells(fw, f, Case(problem, f, 1, M)).items():
                if nests is None or nest in nests:
                    try:
                        found = run()
                    except Exception as error:
                        raise AssertionError(f"{problem} under {nest}") from error
                    assert found == page[nest][problem], f"{problem} under {nest}: {found}"


@pytest.mark.parametrize("framework", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
def test_cells(framework):
    compare(load(framework), QUICK[framework], SOME)


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_cell(framework):
    compare(load(framework))


def test_a_wrong_cell_is_seen(fw):
    problem, f, M = next(implicit_table.solutions(fw))
    wrong = lambda x: f(x) * (1 + 1e-8)
    cells = implicit_table.cells(fw, wrong, Case(problem, wrong, 1, M))
    for nest in ("value", "vjp", "jvp of grad"):
        with pytest.raises(AssertionError):
            cells[nest]()


def ridge(fw):
    """Data, and the weights w(λ) = (XᵀX + diag λ)⁻¹ Xᵀt by argmin and in closed form."""
    rng = np.random.default_rng(2)
    X, t = rng.normal(size=(12, 3)), rng.normal(size=12)
    a, b = fw.array(X), fw.array(t)
    objective = lambda w, lam: (((a @ w - b) ** 2).sum() + (lam * w**2).sum()) / 2
    closed = lambda lam: np.linalg.solve(X.T @ X + np.diag(lam), X.T @ t)
    return objective, closed


def test_ridge(fw):
    objective, closed = ridge(fw)
    lam = np.array([0.5, 1.0, 2.0])
    solution = lambda lam: fw.gl.argmin(objective)(fw.array(np.zeros(3)), lam)
    np.testing.assert_allclose(fw.numpy(solution(fw.array(lam))), closed(lam), rtol=1e-12)
    w = closed(lam)
    J = fw.numpy(fw.gl.jacobian(solution, fw.array(lam)))
    A = np.linalg.inv(np.linalg.lstsq(J, -np.diag(w), rcond=None)[0])  # J = -A⁻¹ diag(w)
    np.testing.assert_allclose(A @ J @ A.T, A @ J @ A.T, rtol=1e-9)
    h = 1e-6
    for i, e in enumerate(np.eye(3)):
        slope = (closed(lam + h * e) - closed(lam - h * e)) / (2 * h)
        np.testing.assert_allclose(J[:, i], slope, rtol=1e-7, atol=1e-9)


def test_kepler(fw):
    """E - e sin E = M, with dE/dM = 1 / (1 - e cos E)."""
    kepler = fw.gl.root(lambda E, e, M: E - e * fw.xp.sin(E) - M)
    e, M = fw.array(np.array(0.9)), fw.array(np.array(0.3))
    E = float(kepler(M, e, M))
    slope = float(fw.grad(lambda M: kepler(M, e, M))(M))
    np.testing.assert_allclose(E - 0.9 * np.sin(E), 0.3, rtol=1e-13)
    np.testing.assert_allclose(slope, 1 / (1 - 0.9 * np.cos(E)), rtol=1e-12)
    second = float(fw.grad(fw.grad(lambda M: kepler(M, e, M)))(M))
    np.testing.assert_allclose(second, -0.9 * np.sin(E) * slope**3, rtol=1e-11)


@pytest.mark.slow
def test_differences_to_third_order(fw):
    """A fixed point without a closed form, and the multinomial logistic regression of a small data set."""
    dottie = fw.gl.fixed_point(lambda y, a: fw.xp.cos(a * y))
    start = fw.array(np.array(0.5))
    order = 3 if fw.name == "torch" else 2  # jax, run op by op, compiles each of the eight nests
    check.derivatives(lambda a: dottie(start, a), fw.array(np.array(1.1)), order=order).raise_if_failed()
    rng = np.random.default_rng(4)
    x, labels = fw.array(rng.normal(size=(9, 2))), fw.array(np.eye(3)[rng.integers(0, 3, 9)])

    def loss(w, lam):
        z = x @ w
        return (fw.xp.log(fw.xp.exp(z).sum(-1)) - (labels * z).sum(-1)).sum() + (lam * w**2).sum()

    fit = fw.gl.argmin(loss)
    weights = lambda lam: (fit(fw.array(np.zeros((2, 3))), lam) ** 3).sum()
    lam = fw.array(np.array([[0.5], [1.5]]))
    check.derivatives(weights, lam, order=2).raise_if_failed()


def test_frameworks_agree():
    pytest.importorskip("jax")
    pytest.importorskip("torch")
    found = []
    for name in FRAMEWORKS:
        fw = load(name)
        objective, _ = ridge(fw)
        f = lambda lam: (fw.gl.argmin(objective)(fw.array(np.zeros(3)), lam) ** 3).sum()
        found.append(fw.numpy(fw.gl.hessian(f, fw.array(np.array([0.5, 1.0, 2.0])))))
    np.testing.assert_allclose(*found, rtol=1e-11)


def test_an_unfinished_solution_has_the_same_derivative_in_both():
    """That of the equation with its right-hand side moved to where the solver stopped."""
    for name in FRAMEWORKS:
        pytest.importorskip(name)
        fw = load(name)
        stopped = fw.gl.root(lambda y, a: y**3 - a, lambda residual, y0, a: y0 + 0.1)
        f = lambda a: stopped(fw.array(np.array(1.0)), a)
        a = fw.array(np.array(2.0))
        np.testing.assert_allclose(float(f(a)), 1.1, rtol=1e-14)
        np.testing.assert_allclose(float(fw.grad(f)(a)), 1 / (3 * 1.1**2), rtol=1e-13)
        np.testing.assert_allclose(float(fw.grad(fw.grad(f))(a)), -2 / (9 * 1.1**5), rtol=1e-12)


def test_trees(fw):
    """y and args of any structure; integers and None are constants."""
    y0 = {"a": fw.array(np.ones(2)), "n": 2, "b": (fw.array(np.array(1.0)), None)}

    def residual(y, p, power):
        assert y["n"] == 2
        return {"a": y["a"] ** y["n"] - p["x"], "n": 2, "b": (y["b"][0] - y["a"].sum() ** power, None)}

    x = np.array([4.0, 9.0])
    solution = fw.gl.root(residual)
    y = solution(y0, {"x": fw.array(x), "kind": "square"}, 2)
    np.testing.assert_allclose(fw.numpy(y["a"]), np.sqrt(x), rtol=1e-12)
    np.testing.assert_allclose(float(y["b"][0]), 25.0, rtol=1e-12)
    assert (y["n"], y["b"][1]) == (2, None)
    g = fw.grad(lambda x: solution(y0, {"x": x, "kind": "square"}, 2)["b"][0])(fw.array(x))
    np.testing.assert_allclose(fw.numpy(g), 5 / np.sqrt(x), rtol=1e-12)  # d(Σ√x)²/dx


def test_the_start_has_no_derivative(fw):
    f = lambda y0: fw.gl.root(lambda y: y**3 - 8.0)(y0)
    y0 = fw.array(np.array(1.5))
    assert float(fw.grad(f)(y0)) == 0.0
    assert float(fw.jvp(f, y0, y0)) == 0.0


def test_hard_starts(fw):
    """Where the plain Newton step overshoots, leaves the domain, or climbs."""
    start = lambda a: fw.array(np.array(a))
    assert abs(float(fw.gl.root(lambda y: fw.xp.arctan(y))(start(5.0)))) < 1e-12
    np.testing.assert_allclose(
        float(fw.gl.root(lambda y: fw.xp.log(y) + 3)(start(9.0))), np.exp(-3), rtol=1e-12
    )
    lowest = fw.gl.argmin(lambda y: (y**2 - 1) ** 2)(start(0.1))  # the Hessian is negative there
    np.testing.assert_allclose(float(lowest), 1.0, rtol=1e-12)


def test_solvers_of_ones_own(fw):
    """With control flow by the numbers in torch, mapped, closed over, and under derivatives."""

    def newton(f, y, *args):
        if fw.name == "jax":
            import jax

            return jax.lax.fori_loop(0, 20, lambda _, y: y - f(y, *args) / (3 * y**2), y)
        for _ in range(50):
            r = f(y, *args)
            if abs(float(r)) < 1e-14:
                break
            y = y - r / (3 * y**2)
        return y

    one, xs = fw.array(np.array(1.0)), np.array([2.0, 5.0, 8.0])
    given = lambda x: fw.gl.root(lambda y, x: y**3 - x, newton)(one, x)
    closed = lambda x: fw.gl.root(lambda y: y**3 - x, newton)(one)
    for f in (given, closed):
        np.testing.assert_allclose(fw.numpy(fw.vmap(f)(fw.array(xs))), xs ** (1 / 3), rtol=1e-12)
        slopes = fw.numpy(fw.vmap(fw.grad(f))(fw.array(xs)))
        np.testing.assert_allclose(slopes, xs ** (-2 / 3) / 3, rtol=1e-12)
        total = lambda xs: (fw.vmap(f)(xs) ** 2).sum()
        np.testing.assert_allclose(fw.numpy(fw.grad(total)(fw.array(xs))), 2 / 3 * xs ** (-1 / 3), rtol=1e-12)


def test_backward():
    """torch.autograd, to third order, of arguments and of what the equation closes over."""
    torch = pytest.importorskip("torch")
    from gradlab.torch import root

    for method in ("direct", "gmres"):
        x = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
        c = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        y = root(lambda y, x: y**3 - c * x, linear_solver=method)(torch.ones(2, dtype=torch.float64), x)
        value, power, s = y.sum(), 1 / 3, x.detach().numpy()
        for order in range(3):
            (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
            factor = np.prod([power - k for k in range(order + 1)])
            np.testing.assert_allclose(value.detach().numpy(), factor * s ** (power - order - 1), rtol=1e-11)
        (slope,) = torch.autograd.grad(y.sum(), c)
        np.testing.assert_allclose(float(slope), (s**power / 3).sum(), rtol=1e-12)


def message(error):
    return str(error.value)


def test_a_recorded_solution_is_differentiated_once_and_then_again():
    """The steps that only higher derivatives need are left out of a first one, not of the next."""
    torch = pytest.importorskip("torch")
    solve = gradlab.root(lambda y, a: y**3 - a)  # y = a^(1/3)
    a = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    y = solve(torch.tensor(1.5, dtype=torch.float64), a)
    (once,) = torch.autograd.grad(y, a, retain_graph=True)
    (first,) = torch.autograd.grad(y, a, create_graph=True)
    (second,) = torch.autograd.grad(first, a, create_graph=True)
    (third,) = torch.autograd.grad(second, a)
    found = [d.item() for d in (once, first, second, third)]
    np.testing.assert_allclose(found, [1 / 12, 1 / 12, -1 / 144, 5 / 3456], rtol=1e-12)


def test_a_jacobian_that_torch_batches_wrongly():
    """torch.func.jacrev of cdist is off by its own size, which three steps hid to four digits."""
    torch = pytest.importorskip("torch")
    centres = torch.as_tensor(np.random.default_rng(0).normal(size=(5, 3)))
    distances = lambda y: torch.cdist(y.reshape(1, 3), centres).reshape(-1)[:3]
    solve = gradlab.root(lambda y, t: y + distances(y) / 10 - t)
    t, z = torch.as_tensor(np.random.default_rng(1).normal(size=3)), torch.zeros(3, dtype=torch.float64)
    y = solve(z, t)
    D = (y - centres[:3]) / distances(y)[:, None]
    truth = np.linalg.inv(np.eye(3) + D.numpy() / 10)
    recorded = torch.autograd.functional.jacobian(lambda t: solve(z, t), t)
    along = [torch.func.jvp(lambda t: solve(z, t), (t,), (e,))[1] for e in torch.eye(3, dtype=torch.float64)]
    np.testing.assert_allclose(recorded, truth, rtol=1e-10)
    np.testing.assert_allclose(torch.stack(along, 1), truth, rtol=1e-10)


def test_a_solution_of_another_structure_is_refused(fw):
    one = fw.array(np.ones(2))
    for solver in (lambda f, y: {"y": y}, lambda f, y: y[0], lambda f, y: (y, y)):
        with pytest.raises(InputError, match=r"(?s)root: solver's result.* has .*; return a tree like y0"):
            fw.gl.root(lambda y: y - 1.0, solver)(one)
    with pytest.raises(InputError, match=r"root: residual's output.* has shape \(\)"):
        fw.gl.root(lambda y: y.sum())(one)
    with pytest.raises(InputError, match=r"fixed_point: step's output\['a'\] has shape \(1,\)"):
        fw.gl.fixed_point(lambda y: {"a": y["a"][:1]})({"a": one})
    with pytest.raises(InputError, match=r"argmin: .* one scalar"):
        fw.gl.argmin(lambda y: y**2)(one)


@pytest.mark.parametrize("op", OPERATIONS)
def test_bad_options(op):
    declare = getattr(gradlab, op)
    for options, needed in (
        ({"linear_solver": "lu"}, "unknown linear_solver 'lu'; pass one of direct, cg, gmres, neumann"),
        ({"rtol": float("nan")}, "rtol is nan"),
        ({"atol": -1.0}, "atol is -1.0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"unconverged": "ignore"}, "unknown unconverged 'ignore'; pass 'raise' or 'warn'"),
    ):
        with pytest.raises(InputError, match=needed):
            declare(lambda y: y, **options)
    with pytest.raises(KindError, match=f"{op}: .* is a int; pass a function"):
        declare(3)
    with pytest.raises(KindError, match=f"{op}: solver is a str; pass a function"):
        declare(lambda y: y, "newton")
    with pytest.raises(gradlab.BackendError, match=f"{op}: .* no jax or torch array"):
        declare(lambda y: y)(1.0)


def test_no_solution_is_an_error(fw):
    one = fw.array(np.array(1.0))
    calls = {
        "root": lambda **k: fw.gl.root(lambda y: y**2 + 1.0, max_steps=30, **k)(one),
        "fixed_point": lambda **k: fw.gl.fixed_point(lambda y: y + 1.0, max_steps=30, **k)(one),
        "argmin": lambda **k: fw.gl.argmin(lambda y: y, max_steps=30, **k)(one),
    }
    for op, call in calls.items():
        with pytest.raises(ConvergenceError, match=f"{op}: the default solver did not reach"):
            call()
        with pytest.warns(ConvergenceWarning, match=f"{op}: the default solver did not reach"):
            call(unconverged="warn")


def test_one_example_without_a_solution_is_an_error(fw):
    f = lambda a: fw.gl.root(lambda y: y**2 - a, max_steps=30)(fw.array(np.array(1.0)))
    with pytest.raises(RuntimeError, match="root: the default solver did not reach"):
        fw.vmap(f)(fw.array(np.array([1.0, -1.0])))


@pytest.mark.parametrize("method", ["cg", "gmres", "neumann", "own"])
def test_an_unconverged_linear_solve_is_an_error(fw, method):
    """Too few steps, or a series that diverges; not a wrong gradient."""
    A = fw.array(np.diag([1.0, 3.0, 9.0, 27.0]))
    chosen = (lambda matvec, b: 0.9 * b) if method == "own" else method
    exact = lambda residual, y0, a: a * fw.array(1 / np.array([1.0, 3.0, 9.0, 27.0]))
    a = fw.array(np.array(2.0))

    def gradient(**options):
        solution = fw.gl.root(lambda y, a: A @ y - a, exact, linear_solver=chosen, max_steps=2, **options)
        return fw.grad(lambda a: solution(fw.array(np.ones(4)), a).sum())(a)

    name = "own" if method == "own" else method
    with pytest.raises(RuntimeError, match=f"root: the {name} linear solve did not reach rtol and atol"):
        gradient()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.asarray(gradient(unconverged="warn"))
        if fw.name == "jax":
            import jax

            jax.effects_barrier()
    assert any(w.category is ConvergenceWarning for w in caught)


@pytest.mark.parametrize("method", ["direct", "gmres"])
def test_a_singular_jacobian_is_an_error(fw, method):
    A = fw.array(np.array([[1.0, 2.0], [2.0, 4.0]]))
    believed = lambda residual, y0, a: y0
    f = lambda a: fw.gl.root(lambda y, a: A @ y - a, believed, linear_solver=method)(fw.array(np.ones(2)), a)[
        0
    ]
    with pytest.raises(
        RuntimeError, match=r"root: the (Jacobian at the solution is singular|gmres linear solve)"
    ):
        fw.grad(lambda a: f(a * fw.array(np.array([1.0, 0.0]))))(fw.array(np.array(1.0)))


def test_a_tolerance_is_honoured(fw):
    """The derivative by an iterative solver is as wrong as was allowed, and no more."""
    rng = np.random.default_rng(8)
    A = rng.normal(size=(30, 30))
    A = np.eye(30) + A @ A.T
    a, v = fw.array(A), rng.normal(size=30)
    exact = lambda residual, y0, x: fw.array(np.linalg.inv(A)) @ x
    errors = []
    for rtol in (1e-2, 1e-6, 1e-12):
        f = fw.gl.root(lambda y, x: a @ y - x, exact, linear_solver="cg", rtol=rtol, atol=0.0)
        product = fw.numpy(fw.jvp(lambda x: f(fw.array(np.zeros(30)), x), fw.array(v), fw.array(v)))
        errors.append(np.linalg.norm(A @ product - v) / np.linalg.norm(v))
        assert errors[-1] <= rtol
    assert errors[0] > 1e-10  # else the tolerance would not have been used


@pytest.mark.slow
def test_compiled_torch_says_what_it_cannot():
    torch = pytest.importorskip("torch")
    fw = load("torch")
    f = lambda a: gradlab.torch.root(lambda y: y**2 - a)(torch.tensor(1.0, dtype=torch.float64))
    compiled = fw.compile(f)
    assert abs(float(compiled(fw.array(np.array(4.0)))) - 2) < 1e-12
    assert np.isnan(float(compiled(fw.array(np.array(-1.0)))))
    iterative = lambda a: gradlab.torch.root(lambda y: y - a, linear_solver="cg")(a)
    with pytest.raises(Exception, match=r"torch\.compile cannot trace an iterative linear solve") as error:
        fw.compile(fw.grad(iterative))(fw.array(np.array(4.0)))
    assert isinstance(error.value, StrategyError) or "StrategyError" in message(error)


def test_a_minimum_is_found_from_a_maximum_and_a_saddle(fw):
    """Where the gradient is zero and the Hessian is not positive, Newton's step is zero too."""
    hill = gradlab.argmin(lambda y, a: (y**4 - a * y**2).sum())
    np.testing.assert_allclose(np.abs(fw.numpy(hill(fw.array(np.zeros(2)), fw.array(np.array(2.0))))), 1.0)
    saddle = gradlab.argmin(lambda y, a: y[0] ** 2 - a * y[1] ** 2 + y[1] ** 4)
    found = fw.vmap(lambda a: saddle(fw.array(np.zeros(2)), a))(fw.array(np.array([2.0, 8.0])))
    np.testing.assert_allclose(np.abs(fw.numpy(found)), [[0.0, 1.0], [0.0, 2.0]], atol=1e-9)


def test_half_precision_and_nothing_at_all():
    torch = pytest.importorskip("torch")
    solve = gradlab.root(lambda y, a: y**3 - a)
    a = torch.tensor([8.0, 2.0], dtype=torch.bfloat16)
    slope = torch.func.grad(lambda a: solve(torch.ones_like(a), a).sum())(a)
    np.testing.assert_allclose(slope.float(), a.float() ** (-2 / 3) / 3, rtol=2e-2)
    assert solve(torch.ones(0), torch.ones(0)).shape == (0,)


def test_a_shared_parameter_under_vmap(fw):
    """y = (x + a) / 2 for each x, and the same a: the gradient is summed over the batch."""
    xs = fw.array(np.arange(6.0).reshape(3, 2))
    closest = lambda x, a: fw.gl.argmin(lambda y: ((y - x) ** 2).sum() + ((y - a) ** 2).sum())(0 * x)
    total = lambda a: fw.vmap(lambda x: (closest(x, a) ** 2).sum())(xs).sum()
    slope = fw.grad(total)(fw.array(np.ones(2)))
    np.testing.assert_allclose(fw.numpy(slope), (np.arange(6.0).reshape(3, 2) / 2 + 0.5).sum(0))
