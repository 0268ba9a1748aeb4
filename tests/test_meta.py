"""adapt, meta_grad and bilevel_grad: closed forms, differences, every method and optimiser, and what is refused."""

from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest

import gradlab
from frameworks import arrays, flat, load
from gradlab import ConvergenceError, InputError, KindError, StrategyError, check
from gradlab.transforms.meta.plan import Method

rng = np.random.default_rng(0)
NET = {"b": rng.normal(size=4) / 2, "v": rng.normal(size=(4, 1)) / 2, "w": rng.normal(size=(2, 4))}
SUPPORT = rng.normal(size=(3, 5, 2)), rng.normal(size=(3, 5, 1))
QUERY = rng.normal(size=(3, 6, 2)), rng.normal(size=(3, 6, 1))
TARGETS = np.array([1.0, 3.0])

OPTIMIZERS = {
    "sgd": lambda o: o.sgd(0.3),
    "nesterov": lambda o: o.sgd(0.1, 0.9, nesterov=True),
    "adam": lambda o: o.adam(0.05),
    "adamw": lambda o: o.adamw(0.05, weight_decay=0.1),
    "rmsprop": lambda o: o.rmsprop(0.05, momentum=0.5),
}


SLOW_JAX = pytest.mark.parametrize(  # seconds of compilation each
    "fw", [pytest.param("jax", marks=pytest.mark.slow), "torch"], indirect=True
)


@pytest.fixture
def problem(fw):
    """A tanh network on three tasks."""
    return network(fw)


def network(fw):
    def loss(params, x, y):
        return ((fw.xp.tanh(x @ params["w"] + params["b"]) @ params["v"] - y) ** 2).mean()

    tasks = arrays(fw, SUPPORT), arrays(fw, QUERY)
    return SimpleNamespace(loss=loss, params=arrays(fw, NET), tasks=tasks)


def jit(fw, f):
    """Compiled where that is what makes it quick."""
    return fw.compile(f) if fw.name == "jax" else f


def square(x, target):
    return (x - target) ** 2 / 2


def targets(fw):
    return (fw.array(TARGETS),), (fw.array(TARGETS),)


def meta_loss(fw, problem, **how):
    """The mean outer loss after adaptation, as a function of params."""

    def mean(params):
        one = lambda *d: problem.loss(fw.gl.adapt(problem.loss, params, *d[:2], **how), *d[2:])
        return fw.vmap(one)(*problem.tasks[0], *problem.tasks[1]).mean()

    return mean


@pytest.mark.parametrize(
    "name", ["sgd", *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS if name != "sgd")]
)
def test_the_whole_pipeline_agrees_in_both_frameworks_and_with_differences(name):
    found = {}
    for framework in ("jax", "torch"):
        fw = load(framework)
        problem = network(fw)
        how = {"optimizer": OPTIMIZERS[name](fw.gl.optimizers), "steps": 5}
        run = lambda p: fw.gl.meta_value_and_grad(problem.loss, problem.loss, p, problem.tasks, **how)
        value, gradient = jit(fw, run)(problem.params)
        found[framework] = np.append(flat(fw, gradient), float(value))
    np.testing.assert_allclose(found["torch"], found["jax"], rtol=0, atol=1e-10)
    total = meta_loss(fw, problem, **how)
    check.derivatives(total, problem.params, order=1, vmap=False).raise_if_failed()
    np.testing.assert_allclose(found["torch"][:-1], flat(fw, fw.grad(total)(problem.params)), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in get_args(Method) if name != "implicit"])
def test_every_method_agrees_in_both_frameworks(method):
    """With a mask, integers, chunks that do not divide the tasks, a state; and the derivative of the gradient."""
    found, how = {}, {"last": 2} if method == "truncate" else {}
    how |= {"mask": {"v": True, "w": False, "b": True, "n": False}, "steps": 3}

    def derivatives(fw):
        net = network(fw)

        loss = lambda p, state, x, y: (net.loss(p, x, y) * p["n"] * (1 + state), state / 2)

        state = {"state": fw.array(np.array([0.1, 0.2, 0.3]))}
        optimizer = fw.gl.optimizers.sgd(0.1, 0.9)
        run = lambda params: fw.gl.meta_value_and_grad(
            loss, loss, params, net.tasks, optimizer=optimizer, chunk_size=2, method=method, **state, **how
        )
        params, n = dict(net.params), fw.array(np.array(2))
        both = lambda params: run({**params, "n": n})[1]
        again = fw.grad(lambda params: sum((g**2).sum() for k, g in both(params).items() if k != "n"))
        return [flat(fw, jit(fw, f)(params)) for f in (both, again)]

    for framework in ("jax", "torch"):
        found[framework] = derivatives(load(framework))
    for a, b in zip(found["torch"], found["jax"], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_hessian_of_the_meta_loss(fw, problem, name):
    total = meta_loss(fw, problem, optimizer=OPTIMIZERS[name](fw.gl.optimizers), steps=3)
    check.derivatives(jit(fw, total), problem.params, order=2, vmap=False).raise_if_failed()


@SLOW_JAX
@pytest.mark.parametrize("method", ["unroll", "checkpoint", "implicit"])
def test_a_meta_gradient_is_differentiated_again(fw, method):
    """φ = c x + ..., so the meta-gradient is linear in x with slope c²."""
    how = {"steps": 200, "proximal": 2.0} if method == "implicit" else {"steps": 3}
    descent = fw.gl.optimizers.sgd(0.25)
    gradient = lambda x: fw.gl.meta_grad(
        square, square, x, targets(fw), optimizer=descent, method=method, **how
    )
    c = 2 / 3 if method == "implicit" else 0.75**3
    x = fw.array(0.5)
    np.testing.assert_allclose(fw.numpy(gradient(x)), c * c * (0.5 - 2.0), atol=1e-9)
    np.testing.assert_allclose(fw.numpy(jit(fw, fw.grad(gradient))(x)), c * c, atol=1e-9)


def test_layer_norm_in_the_hessian_of_a_meta_loss():
    """Of third order, where torch's own layer norm is wrong in every nest."""
    torch = pytest.importorskip("torch")
    x, params = torch.tensor(SUPPORT[0]), torch.tensor(rng.normal(size=2))
    written = lambda z: (
        (z - z.mean(-1, keepdim=True)) / z.var(-1, correction=0, keepdim=True).add(1e-5).sqrt()
    )
    fused = lambda z: torch.nn.functional.layer_norm(z, (2,))

    def hessian(norm):
        loss = lambda p, x: (norm(x * p + p**2) ** 3).mean()
        gradient = lambda p: gradlab.maml_grad(loss, p, ((x,), (x,)), inner_lr=0.1, steps=2)
        return torch.func.jacrev(gradient)(params)

    torch.testing.assert_close(hessian(fused), hessian(written), rtol=1e-8, atol=1e-8)


@SLOW_JAX
def test_methods_of_one_derivative(fw, problem):
    run = lambda **how: flat(
        fw,
        jit(fw, lambda p: fw.gl.meta_grad(problem.loss, problem.loss, p, problem.tasks, **how))(
            problem.params
        ),
    )
    how = {"optimizer": fw.gl.optimizers.adam(0.05), "steps": 7}
    exact = run(**how)
    for other in ({"method": "checkpoint"}, {"method": "truncate", "last": 7}, {"chunk_size": 2}):
        np.testing.assert_allclose(run(**how, **other), exact, atol=1e-12)
    first = run(**how, method="first_order")
    assert np.abs(first - exact).max() > 1e-3
    assert np.abs(run(**how, method="truncate", last=2) - first).max() > 1e-4


def test_closed_forms(fw):
    """φ = x - r (x - t) after one step; mean gradients at x = 1/2."""
    x, tasks, mean = fw.array(0.5), targets(fw), 0.5 - 2.0
    run = lambda method, steps=1, **how: float(
        fw.gl.meta_grad(
            square, square, x, tasks, optimizer=fw.gl.optimizers.sgd(0.25), steps=steps, method=method, **how
        )
    )
    assert run("unroll") == pytest.approx(0.75**2 * mean)
    assert run("first_order") == pytest.approx(0.75 * mean)
    assert run("truncate", steps=3, last=1) == pytest.approx(0.75 * 0.75**3 * mean)
    assert run("reptile", steps=2) == pytest.approx((1 - 0.75**2) * mean)
    assert run("implicit", steps=150, proximal=2.0) == pytest.approx((2 / 3) ** 2 * mean)


@SLOW_JAX
def test_what_the_implicit_method_reports(fw, problem):
    how = {"optimizer": fw.gl.optimizers.sgd(0.2), "method": "implicit", "proximal": 1.0, "report": True}
    run = lambda **more: jit(
        fw,
        lambda p: fw.gl.meta_value_and_grad(problem.loss, problem.loss, p, problem.tasks, **how, **more),
    )(problem.params)
    value, gradient, report = run(steps=300)
    assert fw.numpy(report["loss"]).mean() == pytest.approx(float(value))
    assert fw.numpy(report["residual"]).shape == (3,)
    assert fw.numpy(report["residual"]).max() < 1e-9
    assert fw.numpy(report["stationarity"]).max() < 1e-9
    _, rough, report = run(steps=10, cg_steps=1)
    assert fw.numpy(report["residual"]).min() > 1e-3
    assert fw.numpy(report["stationarity"]).min() > 1e-6
    assert np.abs(flat(fw, rough) - flat(fw, gradient)).max() > 1e-6
    total = meta_loss(fw, problem, optimizer=how["optimizer"], steps=300, method="implicit", proximal=1.0)
    np.testing.assert_allclose(
        flat(fw, jit(fw, fw.grad(total))(problem.params)), flat(fw, gradient), atol=1e-8
    )


def test_an_implicit_gradient_without_a_solution_is_refused(fw):
    """x⁴ - 4 x² at its maximum: conjugate gradients meet a matrix that is not definite."""
    saddle = lambda p, a: a * (p[0] ** 2 - p[1] ** 2) / 2
    run = lambda: fw.gl.meta_grad(
        saddle,
        lambda p, a: (p * a).sum() + p[0],
        fw.array(np.zeros(2)),
        ((fw.array(np.array([1.0])),), (fw.array(np.array([1.0])),)),
        optimizer=fw.gl.optimizers.sgd(0.1),
        steps=1,
        method="implicit",
        proximal=1.0,
    )
    with pytest.raises((ConvergenceError, RuntimeError), match=r"cg linear solve"):
        run()


@SLOW_JAX
def test_freezing_parts(fw, problem):
    """ANIL: the head alone moves; the body is differentiated nevertheless."""
    mask = {"v": True, "w": False, "b": False}
    how = {"optimizer": fw.gl.optimizers.sgd(0.3), "steps": 2, "mask": mask}
    support = [d[0] for d in problem.tasks[0]]
    adapted = fw.gl.adapt(problem.loss, problem.params, *support, **how)
    assert (fw.numpy(adapted["w"]) == NET["w"]).all()
    assert (fw.numpy(adapted["v"]) != NET["v"]).all()
    gradient = fw.gl.meta_grad(problem.loss, problem.loss, problem.params, problem.tasks, **how)

    def by_hand(params):
        def one(a, b, c, d):
            head = params["v"]
            for _ in range(2):
                head = head - 0.3 * fw.grad(lambda head: problem.loss({**params, "v": head}, a, b))(head)
            return problem.loss({**params, "v": head}, c, d)

        return fw.vmap(one)(*problem.tasks[0], *problem.tasks[1]).mean()

    np.testing.assert_allclose(flat(fw, gradient), flat(fw, fw.grad(by_hand)(problem.params)), atol=1e-13)


def test_learned_rates(fw):
    """φ = x - r (x - t): by a number, by step, by parameter; the mask holds the rate out of the adaptation."""
    sgd, x = fw.gl.optimizers.sgd, fw.array(0.5)
    inner, outer = (lambda p, t: square(p["x"], t)), (lambda p, t: square(p["x"], t))
    run = lambda rate, optimizer, steps: fw.gl.meta_grad(
        inner,
        outer,
        {"x": x, "rate": rate},
        targets(fw),
        optimizer=optimizer,
        steps=steps,
        mask={"x": True, "rate": False},
    )
    g = run(fw.array(0.25), lambda p: sgd({"x": p["rate"], "rate": None}), 1)
    slope = -(0.75 * (0.5 - TARGETS) ** 2).mean()
    assert float(g["rate"]) == pytest.approx(slope)
    rates = np.array([0.25, 0.5])
    g = run(fw.array(rates), lambda p: sgd(lambda i: p["rate"][i]), 2)
    left = 0.75 * 0.5
    expected = [-(left * (left / (1 - r)) * (0.5 - TARGETS) ** 2).mean() for r in rates]
    np.testing.assert_allclose(fw.numpy(g["rate"]), expected)


def test_a_state_of_plain_numbers(fw):
    """φ = x (1 - 2 r)^3 of a loss that counts its calls; what is no array is handed on as it stands."""
    loss = lambda x, state: (x**2, {"calls": state["calls"] + 1, "none": None})
    for method in ("unroll", "checkpoint", "first_order"):
        adapted, state = fw.gl.adapt(
            loss,
            fw.array(1.0),
            optimizer=fw.gl.optimizers.sgd(0.25),
            steps=3,
            state={"calls": 0, "none": None},
            method=method,
        )
        assert float(adapted) == pytest.approx(0.125)
        assert int(state["calls"]) == 3


def test_state_is_handed_on(fw):
    """A counter picks the noise of each step: dropout that both frameworks draw alike."""
    keep = fw.array((rng.random((2, 3, 4)) > 0.3).astype(float))
    x, t = fw.array(rng.normal(size=4)), fw.array(rng.normal(size=(2, 4)))

    def loss(p, state, t, keep):
        chosen = (keep * (fw.xp.arange(3) == state["step"])[:, None]).sum(0)
        return ((p - t) ** 2 * chosen).sum() / 2, {"step": state["step"] + 1}

    state = {"step": fw.array(np.zeros(2, int))}
    how = {"optimizer": fw.gl.optimizers.sgd(0.5), "steps": 2, "state": state, "report": True}
    for method in ("unroll", "checkpoint"):
        value, gradient, report = fw.gl.meta_value_and_grad(
            loss, loss, x, ((t, keep), (t, keep)), method=method, **how
        )
        assert (fw.numpy(report["state"]["step"]) == 3).all()
        masks, left = fw.numpy(keep), fw.numpy(x) - fw.numpy(t)
        for i in range(2):
            left = left * (1 - 0.5 * masks[:, i])
        slope = (1 - 0.5 * masks[:, 0]) * (1 - 0.5 * masks[:, 1]) * masks[:, 2] * left
        np.testing.assert_allclose(fw.numpy(gradient), slope.mean(0))
        assert float(value) == pytest.approx((masks[:, 2] * left**2).sum(1).mean() / 2)


def test_random_keys_as_state():
    jax = pytest.importorskip("jax")

    def loss(p, state, t):
        now, after = jax.random.split(state["key"])
        return ((p - t) ** 2 * jax.random.bernoulli(now, 0.5, p.shape)).sum(), {"key": after}

    keys = {"key": jax.random.split(jax.random.key(0), 3)}
    t = jax.numpy.asarray(rng.normal(size=(3, 4)))
    how = {"optimizer": gradlab.jax.optimizers.sgd(0.1), "steps": 3, "report": True}
    run = lambda keys: gradlab.jax.meta_value_and_grad(
        loss, loss, jax.numpy.ones(4), ((t,), (t,)), state=keys, **how
    )
    value, _, report = run(keys)
    assert float(value) == float(run(keys)[0])
    assert float(value) != float(run(report["state"])[0])


@SLOW_JAX
def test_bilevel_ridge(fw):
    """w(λ) = (XᵀX + λ)⁻¹ Xᵀt: the implicit gradient is exact, the unrolled one converges to it."""
    X, t = rng.normal(size=(12, 3)), rng.normal(size=12)
    A, b = fw.array(X), fw.array(t)
    inner = lambda w, lam, X, t: (((X @ w - t) ** 2).sum() + lam * (w**2).sum()) / 2
    outer = lambda w, lam, c: (w * c).sum()
    c, lam = np.array([1.0, -2.0, 0.5]), 0.7
    H = X.T @ X + lam * np.eye(3)
    w = np.linalg.solve(H, X.T @ t)
    expected = -c @ np.linalg.solve(H, w)
    run = lambda **how: jit(
        fw,
        lambda lam: fw.gl.bilevel_value_and_grad(
            inner, outer, lam, fw.array(np.zeros(3)), ((A, b), (fw.array(c),)), **how
        ),
    )(fw.array(lam))
    descent = fw.gl.optimizers.sgd(1 / np.linalg.eigvalsh(H)[-1])
    for how in ({"method": "implicit"}, {"method": "unroll"}, {"method": "truncate", "last": 250}):
        value, gradient = run(optimizer=descent, steps=300, **how)
        assert float(value) == pytest.approx(c @ w, rel=1e-9)
        assert float(gradient) == pytest.approx(expected, rel=1e-8)
    with pytest.raises(StrategyError, match=r"first_order.*holds the gradients constant"):
        run(optimizer=descent, steps=3, method="first_order")


def test_weights_of_examples_and_rates_by_bilevel(fw):
    """One step of weighted descent: ∂φ/∂weightᵢ = -r ∇ℓᵢ, and ∂φ/∂r = -Σ weightᵢ ∇ℓᵢ."""
    t = fw.array(TARGETS)
    inner = lambda w, meta, t: (meta["weight"] * square(w, t)).sum()
    meta = {"weight": fw.array(np.array([0.3, 0.6])), "rate": fw.array(0.5)}
    gradient = fw.gl.bilevel_grad(
        inner,
        lambda w, meta: w,
        meta,
        fw.array(0.0),
        ((t,), ()),
        optimizer=lambda meta: fw.gl.optimizers.sgd(meta["rate"]),
        steps=1,
    )
    assert gradient.keys() == meta.keys()
    np.testing.assert_allclose(fw.numpy(gradient["weight"]), 0.5 * TARGETS)
    assert float(gradient["rate"]) == pytest.approx(0.3 * 1 + 0.6 * 3)


def test_plain_torch_backward():
    torch = pytest.importorskip("torch")
    x = torch.tensor(0.5, requires_grad=True)
    rate = torch.tensor(0.25, requires_grad=True)
    loss = lambda x: (x - 2.0) ** 2 / 2
    adapted = gradlab.adapt(loss, x, optimizer=gradlab.optimizers.sgd(rate), steps=2)
    gx, gr = torch.autograd.grad(adapted, (x, rate), create_graph=True)
    assert float(gx.detach()) == pytest.approx(0.75**2)
    assert float(gr.detach()) == pytest.approx(-2 * 0.75 * (0.5 - 2.0))
    assert float(torch.autograd.grad(gr, rate)[0]) == pytest.approx(2 * (0.5 - 2.0))
    assert not gradlab.adapt(loss, x.detach(), optimizer=gradlab.optimizers.sgd(0.1), steps=2).requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("method", ["unroll", "checkpoint", "first_order", "reptile"])
def test_compiled_torch(method):
    torch = pytest.importorskip("torch")
    fw = load("torch")
    problem = network(fw)
    how = {"optimizer": fw.gl.optimizers.adam(0.05), "steps": 2, "method": method}
    run = lambda p: fw.gl.meta_value_and_grad(problem.loss, problem.loss, p, problem.tasks, **how)
    expected, found = run(problem.params), fw.compile(run)(problem.params)
    torch.testing.assert_close(found, expected)


def test_an_implicit_gradient_sees_what_the_losses_close_over():
    """φ = (w t + x) / (w + 1): under torch.autograd too, where nothing tells that w is differentiated."""
    torch = pytest.importorskip("torch")
    fw, w = load("torch"), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    inner = lambda x, t: w * (x - t) ** 2 / 2
    how = {"optimizer": gradlab.optimizers.sgd(0.3), "steps": 120, "method": "implicit", "proximal": 1.0}
    gradient = gradlab.meta_grad(inner, square, fw.array(0.5), targets(fw), **how)
    assert float(gradient.detach()) == pytest.approx((0.5 - 2.0) / 9)
    assert float(torch.autograd.grad(gradient, w)[0]) == pytest.approx(-2 * (0.5 - 2.0) / 27)
    gradient = gradlab.bilevel_grad(
        lambda x, a: w * (x - 1) ** 2 + a * x**2,
        lambda x, a: x,
        fw.array(1.0),
        fw.array(0.0),
        ((), ()),
        **{**how, "optimizer": gradlab.optimizers.sgd(0.1), "proximal": None},
    )
    assert float(gradient.detach()) == pytest.approx(-2 / 9)  # -w / (w + a)²
    assert float(torch.autograd.grad(gradient, w)[0]) == pytest.approx((2 - 1) / 27)


def test_what_torch_cannot_map():
    torch = pytest.importorskip("torch")
    fw = load("torch")
    tasks = arrays(fw, SUPPORT), arrays(fw, QUERY)
    for layer, match in (
        (torch.nn.Dropout(0.5), "draws random numbers, and each task needs its own"),
        (torch.nn.BatchNorm1d(4), "running statistics of a batch norm in place"),
    ):
        model, params = gradlab.functional(torch.nn.Sequential(torch.nn.Linear(2, 4), layer).double())
        loss = lambda p, x, y, model=model: ((model(p, x) - y) ** 2).mean()
        with raises(f"maml_grad: a loss .*{match}"):
            gradlab.maml_grad(loss, params, tasks, inner_lr=0.1, steps=1)


def test_optax_with_a_line_search_is_refused():
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    with raises("the optimiser's update asks for more than gradients, state and params", KindError):
        gradlab.adapt(lambda x: x**2, jax.numpy.array(1.0), optimizer=optax.lbfgs(), steps=1)


def test_chunks_keep_the_dtype_of_the_loss():
    jax = pytest.importorskip("jax")
    loss = lambda x, t: square(x.astype("float32"), t)
    tasks = ((jax.numpy.array(TARGETS, "float32"),),) * 2
    how = {"optimizer": gradlab.optimizers.sgd(0.1), "steps": 1}
    run = lambda chunk: jax.eval_shape(
        lambda x: gradlab.meta_value_and_grad(loss, loss, x, tasks, chunk_size=chunk, **how),
        jax.numpy.array(0.5, "bfloat16"),
    )
    assert [x.dtype for x in run(1)] == [x.dtype for x in run(None)] == ["float32", "bfloat16"]


def test_what_compiled_torch_refuses():
    pytest.importorskip("torch")
    fw = load("torch")
    tasks = targets(fw)
    train = lambda a: fw.gl.bilevel_grad(
        lambda w, a: (w - 1.0) ** 2 + a * w**2, lambda w, a: w, a, a * 0, ((), ()), **how, steps=1
    )
    how = {"optimizer": fw.gl.optimizers.sgd(0.1), "method": "implicit"}
    with pytest.raises(Exception, match=r"torch.compile does not trace method='implicit'"):
        fw.compile(train)(fw.array(0.5))
    how = {"optimizer": fw.gl.optimizers.sgd(0.1), "steps": 4, "method": "implicit", "proximal": 1.0}
    run = lambda x: fw.gl.meta_grad(square, square, x, tasks, **how)
    with pytest.raises(Exception, match=r"torch.compile does not trace method='implicit'"):
        fw.compile(run)(fw.array(0.5))


def raises(match, error=InputError):
    return pytest.raises(error, match=match)


def test_tasks_that_do_not_fit(fw):
    sgd = fw.gl.optimizers.sgd(0.1)
    run = lambda tasks, **how: fw.gl.meta_grad(
        square, square, fw.array(0.0), tasks, optimizer=sgd, steps=1, **how
    )
    many = lambda n: fw.array(np.ones(n))
    with raises(
        r"meta_grad: support\[0\] has 3 tasks on its leading axis, query\[0\] has 4; stack the tasks"
    ):
        run(((many(3),), (many(4),)))
    with raises("support and query hold no tasks"):
        run(((many(0),), (many(0),)))
    with raises("support and query hold no tasks"):
        run(((), ()))
    with raises(r"support\[0\] is a scalar; pass arrays with a leading axis of tasks"):
        run(((fw.array(1.0),), (many(1),)))
    with raises(r"support\[0\] is no array"):
        run((("text",), (many(1),)))
    with raises(r"support\[0\] is no array of numbers"):
        run(((np.array([np.zeros(2), np.zeros(3)], dtype=object),), (many(2),)))
    with raises(r"tasks is not a pair; pass \(support, query\)"):
        run(many(2))
    with raises("support is a .*; pass a tuple", KindError):
        run((many(2), many(2)))
    with raises("chunk_size is 0; pass a positive integer"):
        run(targets(fw), chunk_size=0)


def test_options_that_do_not_exist(fw):
    run = lambda **how: fw.gl.meta_grad(
        square,
        square,
        fw.array(0.0),
        targets(fw),
        **{"optimizer": fw.gl.optimizers.sgd(0.1), "steps": 2, **how},
    )
    for steps in (0, -1, 1.0, True):
        with raises("meta_grad: steps is .*; pass a positive whole number"):
            run(steps=steps)
    with raises("unknown method 'second_order'; pass one of unroll, checkpoint"):
        run(method="second_order")
    with raises("method='truncate' needs last"):
        run(method="truncate")
    with raises("last is 3 of 2 steps"):
        run(method="truncate", last=3)
    with raises("last belongs to method='truncate', the method is 'unroll'"):
        run(last=1)
    for proximal in (None, -1.0, float("nan")):
        with raises("proximal is .*; method='implicit' needs a number"):
            run(method="implicit", proximal=proximal)
    with raises("proximal is '1'; method='implicit' needs a number"):
        run(method="implicit", proximal="1")
    with raises("method='implicit' needs a loss with a minimum, and a state changes it"):
        run(method="implicit", proximal=1.0, state=fw.array(np.zeros(2)))
    with raises("mask does not fit params"):
        run(mask={"x": True})
    with raises("mask holds all of params"):
        run(mask=False)
    with raises("'reptile' is no derivative"):
        fw.gl.adapt(
            square, fw.array(0.0), 1.0, optimizer=fw.gl.optimizers.sgd(0.1), steps=1, method="reptile"
        )
    with raises(r"meta_grad, outer_loss: f must return one scalar"):
        fw.gl.meta_grad(
            square,
            lambda x, t: x * fw.array(np.ones(2)),
            fw.array(0.0),
            targets(fw),
            optimizer=fw.gl.optimizers.sgd(0.1),
            steps=1,
        )
    for place in (fw.gl.optimizers, gradlab.optimizers):
        with raises("optimizer is the function sgd; call it with a rate", KindError):
            run(optimizer=place.sgd)
        with raises("optimizer is the function adam; call it with a rate", KindError):
            fw.gl.bilevel_grad(square, square, x := fw.array(0.0), x, ((), ()), optimizer=place.adam, steps=1)
    with raises("bilevel_grad: params holds no float", KindError):
        fw.gl.bilevel_grad(
            square, square, x, fw.array(1), ((), ()), optimizer=fw.gl.optimizers.sgd(0.1), steps=1
        )
    with raises("inner_loss is a int", KindError):
        fw.gl.meta_grad(3, square, fw.array(0.0), targets(fw), optimizer=fw.gl.optimizers.sgd(0.1), steps=1)


def test_rates_that_are_none(fw):
    o = fw.gl.optimizers
    for rate in (-0.1, float("nan"), float("inf")):
        for make in (o.sgd, o.adam, o.adamw, o.rmsprop, gradlab.optimizers.sgd):
            with raises("rate is .*; pass a finite number that is not negative"):
                make(rate)
        with raises("rate is"):
            fw.gl.maml_grad(square, fw.array(0.0), targets(fw), inner_lr=rate, steps=1)
        with raises("rate is"):
            o.sgd({"a": fw.array(np.array([0.1, rate]))})
    run = lambda rate: fw.gl.maml_grad(
        lambda p, t: square(p["a"], t), {"a": fw.array(0.0)}, targets(fw), inner_lr=rate, steps=1
    )
    with raises("rate has the structure .*; pass one number, or a tree of rates"):
        run({"b": 0.1})
    with raises(r"a rate of shape \(2,\) does not fit a parameter of shape \(\)"):
        run({"a": fw.array(np.array([0.1, 0.1]))})


def test_optimisers_without_a_derivative(fw):
    from gradlab.transforms.optimizers import Optimizer

    x, still = fw.array(np.ones(2)), _still(fw)
    run = lambda optimizer, **how: fw.gl.adapt(
        lambda x: (x**2).sum(), x, optimizer=optimizer, **{"steps": 3, **how}
    )
    grad = lambda optimizer, **how: fw.gl.meta_grad(
        lambda x, t: (x**2).sum(), lambda x, t: x.sum(), x, targets(fw), optimizer=optimizer, steps=1, **how
    )
    cut = Optimizer(lambda p: (), lambda g, s, p: (fw.map(still, fw.map(lambda g: -0.1 * g, g)), s))
    with raises("the optimiser's updates have no derivative in the gradients"):
        grad(cut)
    grad(cut, method="first_order")
    with raises("a state holds a str, which is not differentiable", KindError):
        run(Optimizer(lambda p: "text", lambda g, s, p: (g, s)))
    grows = Optimizer(lambda p: p, lambda g, s, p: (g, fw.xp.stack([s, s])))
    with raises("the optimiser's state is not like the one before"):
        run(grows)
    with raises("the optimiser's updates are not like params"):
        run(Optimizer(lambda p: (), lambda g, s, p: ([g, g], s)))
    with raises(r"optimizer is a .*; pass a pair of pure functions", KindError):
        run(object())
    with raises(r"optimizer\(params\) is a .*; return a pair of functions", KindError):
        run(lambda params: 0.1)


def _still(fw):
    if fw.name == "torch":
        return lambda x: x.detach()
    import jax

    return jax.lax.stop_gradient


def test_torch_optim_is_refused():
    torch = pytest.importorskip("torch")
    x = torch.zeros(2, requires_grad=True)
    with raises("optimizer is a SGD; pass a pair of pure functions.*torch.optim changes", KindError):
        gradlab.adapt(lambda x: x.sum(), x, optimizer=torch.optim.SGD([x], 0.1), steps=1)


def test_a_state_that_changes_its_form(fw):
    loss = lambda x, state: ((x**2).sum(), fw.xp.stack([state, state]))
    with raises("the state that the loss returns is not like the one before"):
        fw.gl.adapt(
            loss, fw.array(1.0), optimizer=fw.gl.optimizers.sgd(0.1), steps=2, state=fw.array(np.ones(1))
        )
