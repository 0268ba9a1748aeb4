"""The library of rules: closed forms, edge points where plain formulas fail, every mode against differences."""

import math

import numpy as np
import pytest

from gradlab import ConvergenceError, InputError, KindError, StrategyError, check

rng = np.random.default_rng(0)
S = (lambda M: M + M.T)(rng.normal(size=(4, 4)))
Q = np.linalg.qr(rng.normal(size=(4, 4)))[0]
DEGENERATE = Q @ np.diag([1.0, 1.0, 1.0, 3.0]) @ Q.T
W = rng.normal(size=(4, 4))


def spectral(fw, f):
    weights = fw.array(W)
    return lambda A: (f(A) * weights).sum()


SMOOTH = {
    "norm": (lambda fw, r: lambda x: r.norm(x) * x.sum(), rng.normal(size=5)),
    "norm of rows": (lambda fw, r: lambda x: r.norm(x, axis=-1, keepdims=True) * x, rng.normal(size=(3, 2))),
    "sqrt": (lambda fw, r: r.sqrt, np.array([1e-6, 0.5, 2.0])),
    "log1mexp": (lambda fw, r: r.log1mexp, np.array([1e-3, 0.5, 0.8, 3.0, 20.0])),
    "logsumexp": (lambda fw, r: lambda x: r.logsumexp(x, axis=-1), rng.normal(size=(3, 4))),
    "eigh": (lambda fw, r: lambda A: (lambda w, V: (w**3).sum() + (V**4).sum())(*r.eigh(A)), S),
    "matrix_function": (lambda fw, r: spectral(fw, lambda A: r.matrix_function(fw.xp.exp, A)), S / 5),
    "matrix_function, degenerate": (
        lambda fw, r: spectral(fw, lambda A: r.matrix_function(fw.xp.exp, A, order=2)),
        DEGENERATE,
    ),
    "expm": (lambda fw, r: spectral(fw, r.expm), W / 3),
    "logdet": (lambda fw, r: r.logdet, W),
    "checkpoint": (
        lambda fw, r: lambda x: r.checkpoint(lambda y: fw.xp.sin(y).sum() * y, x),
        rng.normal(size=3),
    ),
}


LONG = ("matrix_function", "expm")  # to compile in jax


def quick(fw, f):
    """jax runs compiled what takes minutes operation by operation."""
    return fw.compile(f) if fw.name == "jax" else f


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in SMOOTH])
def test_every_mode_to_second_order(fw, name):
    make, x = SMOOTH[name]
    check.derivatives(make(fw, fw.gl.rules), fw.array(x), compiled=False).raise_if_failed()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SMOOTH) - {"matrix_function, degenerate"}))
def test_every_mode_to_third_order(fw, name):
    make, x = SMOOTH[name]
    check.derivatives(make(fw, fw.gl.rules), fw.array(x), order=3).raise_if_failed()


def every(fw, f, x):
    """The first three derivatives of f by x, in both modes, and their nests."""
    for outer in (fw.jacfwd, fw.jacrev):
        yield fw.numpy(quick(fw, outer(f))(x))
        for inner in (fw.jacfwd, fw.jacrev):
            yield fw.numpy(quick(fw, outer(inner(f)))(x))
            yield fw.numpy(quick(fw, outer(inner(fw.jacfwd(f))))(x))


def test_at_zero_the_norm_and_the_root_are_flat(fw):
    rules = fw.gl.rules
    for f in (rules.norm, lambda x: rules.sqrt(x**2).sum()):
        assert all((found == 0).all() for found in every(fw, f, fw.array(np.zeros(2))))
    x = fw.array(np.array([[3.0, 4.0], [0.0, 0.0]]))
    slopes = fw.numpy(fw.grad(lambda x: rules.norm(x, axis=1).sum())(x))
    np.testing.assert_allclose(slopes, [[0.6, 0.8], [0.0, 0.0]], atol=1e-15)


def test_the_norm_does_not_overflow(fw):
    for size in (1e200, 1e-200):
        x = fw.array(np.array([3.0, 4.0]) * size)
        np.testing.assert_allclose(fw.numpy(fw.gl.rules.norm(x)) / size, 5.0, rtol=1e-15)
        np.testing.assert_allclose(fw.numpy(fw.grad(fw.gl.rules.norm)(x)), [0.6, 0.8], rtol=1e-15)
    assert fw.numpy(fw.gl.rules.norm(fw.array(np.array([np.inf, 1.0])))) == np.inf
    assert fw.numpy(fw.gl.rules.norm(fw.array(np.zeros((0,))))) == 0


def test_log1mexp_at_both_ends(fw):
    x = np.array([1e-300, 1e-10, 1.0, 40.0, 800.0])
    right = np.array(
        [-np.log(1e300), np.log(-np.expm1(-1e-10)), np.log1p(-np.exp(-1.0)), -np.exp(-40.0), 0.0]
    )
    f = lambda x: fw.gl.rules.log1mexp(x).sum()
    np.testing.assert_allclose(fw.numpy(fw.gl.rules.log1mexp(fw.array(x))), right, rtol=1e-14)
    slope = 1 / np.expm1(np.minimum(x, 700.0)) * (x < 700)
    np.testing.assert_allclose(fw.numpy(fw.grad(f)(fw.array(x))), slope, rtol=1e-14)
    curved = fw.numpy(fw.grad(lambda x: fw.grad(f)(x).sum())(fw.array(x[1:])))
    np.testing.assert_allclose(curved, -slope[1:] * (slope[1:] + 1), rtol=1e-13)
    assert np.isnan(fw.numpy(fw.gl.rules.log1mexp(fw.array(np.array([-1.0])))))
    assert fw.numpy(fw.gl.rules.log1mexp(fw.array(np.array([0.0])))) == -np.inf


def test_logsumexp_of_nothing_is_flat(fw):
    f = lambda x: fw.gl.rules.logsumexp(x)
    masked = fw.array(np.array([0.3, -np.inf, 0.3]))
    np.testing.assert_allclose(fw.numpy(fw.grad(f)(masked)), [0.5, 0.0, 0.5])
    second = fw.numpy(fw.jacfwd(fw.grad(f))(masked))
    np.testing.assert_allclose(second, [[0.25, 0, -0.25], [0, 0, 0], [-0.25, 0, 0.25]], atol=1e-16)
    nothing = fw.array(np.full(2, -np.inf))
    assert fw.numpy(f(nothing)) == -np.inf
    assert all((found == 0).all() for found in every(fw, f, nothing))
    assert fw.numpy(f(fw.array(np.array([np.inf, 0.0])))) == np.inf
    np.testing.assert_allclose(fw.numpy(f(fw.array(np.array([1e4, 1e4])))), 1e4 + np.log(2))


def test_estimators_keep_the_value(fw):
    rules, x = fw.gl.rules, fw.array(np.array([0.1, 1.7, -2.3]))
    hard = lambda x: rules.straight_through(fw.xp.round(x), fw.xp.tanh(x))
    np.testing.assert_array_equal(fw.numpy(hard(x)), [0.0, 2.0, -2.0])
    slope = 1 - np.tanh(fw.numpy(x)) ** 2
    np.testing.assert_allclose(fw.numpy(fw.grad(lambda x: hard(x).sum())(x)), slope)
    np.testing.assert_allclose(fw.numpy(fw.jvp(hard, x, fw.xp.ones_like(x))), slope)
    tree = {"a": x, "b": [2 * x]}
    turned = rules.reverse_gradient(tree, 0.5)
    np.testing.assert_array_equal(fw.numpy(turned["b"][0]), fw.numpy(tree["b"][0]))
    f = lambda x: (rules.reverse_gradient(x, 0.5) ** 3).sum()
    x3 = fw.numpy(x)
    np.testing.assert_allclose(fw.numpy(fw.grad(f)(x)), -1.5 * x3**2)
    np.testing.assert_allclose(fw.numpy(fw.jacfwd(fw.grad(f))(x)), np.diag(0.25 * 6 * x3))


def test_clipping_is_of_the_whole_tree(fw):
    x = {"a": fw.array(np.zeros(9)), "b": fw.array(np.zeros(16))}

    def f(x, size):
        clipped = fw.gl.rules.clip_gradient(x, 1.0)
        return size * (clipped["a"].sum() + clipped["b"].sum())

    for size, right in ((10.0, 0.2), (0.1, 0.1)):
        found = fw.grad(lambda x, size=size: f(x, size))(x)
        np.testing.assert_allclose(fw.numpy(found["a"]), np.full(9, right))
        np.testing.assert_allclose(fw.numpy(found["b"]), np.full(16, right))
    sizes = fw.array(np.array([10.0, 0.1]))
    mapped = fw.vmap(lambda s: fw.grad(lambda x: f(x, s))(x)["a"][0])(sizes)
    np.testing.assert_allclose(fw.numpy(mapped), [0.2, 0.1])


def test_eigh_at_equal_eigenvalues(fw):
    """What does not depend on the basis of an eigenspace has its right first derivatives."""
    A, eigh = fw.array(DEGENERATE), fw.gl.rules.eigh
    projector = lambda A: (lambda V: V @ V.mT)(eigh(A)[1][:, :3])
    E = (lambda M: M + M.T)(rng.normal(size=(4, 4)))
    w, V = np.linalg.eigh(DEGENERATE)
    F = V.T @ E @ V
    cross = V[:, :3] @ F[:3, 3:] @ V[:, 3:].T / (1.0 - 3.0)
    np.testing.assert_allclose(fw.numpy(fw.jvp(projector, A, fw.array(E))), cross + cross.T, atol=1e-12)
    total = lambda A: fw.xp.exp(eigh(A)[0]).sum()
    right = (V * np.exp(w)) @ V.T
    np.testing.assert_allclose(fw.numpy(fw.grad(total)(A)), right, atol=1e-12)
    for derivative in (fw.jacfwd, fw.jacrev):  # which lacks a term: not a finite wrong number
        assert np.isnan(fw.numpy(quick(fw, derivative(fw.grad(total)))(A))).all()


def test_eigh_of_hermitian_matrices(fw):
    H = rng.normal(size=(3, 3)) + 1j * rng.normal(size=(3, 3))
    f = lambda A: (fw.gl.rules.eigh(A)[0] ** 3).sum()  # the trace of the cube
    check.derivatives(f, fw.array(H), compiled=False).raise_if_failed()


@pytest.mark.slow
def test_matrix_function_at_equal_eigenvalues(fw):
    """The exponential's own derivatives, which do not know of eigenvalues."""
    rules, A = fw.gl.rules, fw.array(DEGENERATE)
    for order, derivative in enumerate((fw.jacrev, fw.jacfwd, fw.jacrev), 1):
        one, other = (
            fw.numpy(quick(fw, nested(fw, spectral(fw, f), derivative, order))(A))
            for f in (
                lambda A: rules.matrix_function(fw.xp.exp, (A + A.mT) / 2),
                lambda A: rules.expm((A + A.mT) / 2),
            )
        )
        np.testing.assert_allclose(one, other, atol=(1e-9, 1e-6, 1e-3)[order - 1] * np.abs(other).max())
    first = lambda A: spectral(fw, lambda A: rules.matrix_function(fw.xp.exp, A, order=1))(A)
    assert np.abs(fw.numpy(fw.jacfwd(fw.grad(first))(A))).max() == 0  # as it says


def nested(fw, f, derivative, order):
    for _ in range(order):
        f = derivative(f)
    return f


def test_batches_of_matrices(fw):
    rules, As = fw.gl.rules, fw.array(np.stack([S, DEGENERATE, 2 * S]))
    for f in (
        lambda A: rules.eigh(A)[0],
        lambda A: rules.matrix_function(fw.xp.cos, A),
        lambda A: rules.expm(A),
        rules.logdet,
    ):
        at_once, mapped = quick(fw, f)(As), quick(fw, fw.vmap(f))(As)
        np.testing.assert_allclose(fw.numpy(at_once), fw.numpy(mapped), rtol=1e-12, atol=1e-12)


B = rng.normal(size=(6, 6))
PROBES = np.linalg.qr(rng.normal(size=(6, 6)))[0] * 6**0.5


def estimate(fw, probes, **options):
    """Of log det (s B Bᵀ + diag t), for x = (s, t)."""
    outer, probes = fw.array(B @ B.T), fw.array(probes)
    matvec = lambda v, x: x[0] * (outer @ v) + x[1:] * v
    return lambda x: fw.gl.rules.stochastic_logdet(matvec, probes, x, **options)


def exact(fw):
    outer = fw.array(B @ B.T)
    return lambda x: fw.gl.rules.logdet(x[0] * outer + fw.xp.diag(x[1:]))


X = np.concatenate([[0.7], rng.uniform(0.5, 2.0, 6)])


def test_logdet_of_orthogonal_probes_is_exact(fw):
    x, found, right = fw.array(X), estimate(fw, PROBES), exact(fw)
    np.testing.assert_allclose(fw.numpy(found(x)), fw.numpy(right(x)), rtol=1e-12)
    for derivative in (fw.grad, lambda f: fw.jacfwd(fw.grad(f))):
        one, other = (fw.numpy(quick(fw, derivative(f))(x)) for f in (found, right))
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-10)


def test_logdet_of_random_probes_is_unbiased(fw):
    probes = np.random.default_rng(1).choice([-1.0, 1.0], size=(400, 6))
    x = fw.array(X)
    slopes = lambda f: fw.numpy(quick(fw, fw.jacrev(f))(x))
    alone = lambda x: fw.xp.stack([estimate(fw, z[None], order=1, steps=2)(x) for z in probes[:8]])
    off = slopes(estimate(fw, probes, order=1)) - slopes(exact(fw))
    assert (np.abs(off) <= 8 * slopes(alone).std(0) / 20 + 1e-12).all()
    value = fw.numpy(quick(fw, estimate(fw, probes))(x))
    np.testing.assert_allclose(value, fw.numpy(exact(fw)(x)), rtol=0.05)


def test_checkpoint_runs_again(fw):
    calls = []

    def f(x, y):
        calls.append(0)
        return fw.xp.sin(x["a"]) * y

    x, y = {"a": fw.array(np.array([0.3, 0.4]))}, fw.array(np.array([2.0, 3.0]))
    loss = lambda x: fw.gl.rules.checkpoint(f, x, y).sum()
    found = fw.grad(loss)(x)["a"]
    np.testing.assert_allclose(fw.numpy(found), np.cos([0.3, 0.4]) * np.array([2.0, 3.0]))


def test_checkpoint_takes_any_leaf(fw):
    x = fw.array(np.array([2.0, 3.0]))

    def f(x, n, nothing, name, places):
        assert (n, nothing, name) == (3, None, "a")
        return {"y": (x**n)[places].sum(), "first": x.argmax(), "name": name}

    g = lambda x: fw.gl.rules.checkpoint(f, x, 3, None, "a", fw.array(np.array([0])))
    assert fw.numpy(g(x)["first"]) == 1
    assert g(x)["name"] == "a"
    np.testing.assert_allclose(fw.numpy(fw.grad(lambda x: g(x)["y"])(x)), [12.0, 0.0])
    np.testing.assert_allclose(
        fw.numpy(fw.jacfwd(fw.grad(lambda x: g(x)["y"]))(x)), [[12.0, 0.0], [0.0, 0.0]]
    )


def test_checkpoint_draws_the_same_again_in_torch():
    """The generators' states at the first run hold at the second, and then go on as if it had not been."""
    torch = pytest.importorskip("torch")
    from gradlab.torch import rules

    own = torch.Generator().manual_seed(1)
    drop = lambda x: torch.nn.functional.dropout(x, 0.5)
    noisy = lambda x, generator: x * torch.rand(x.shape, generator=generator, dtype=x.dtype)
    ones = torch.ones(9, dtype=torch.float64)
    for f, args in ((drop, ()), (noisy, (own,))):
        torch.manual_seed(0)
        x = ones.clone().requires_grad_()
        y = rules.checkpoint(f, x, *args)
        between = torch.rand(1)
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(slope, y.detach())
        assert len(slope.unique()) > 0
        after = torch.rand(1)
        loss = lambda x, f=f, args=args: (lambda y: (y.sum(), y))(rules.checkpoint(f, x, *args))
        slope, value = torch.func.grad(loss, has_aux=True)(ones)
        assert torch.equal(slope, value)
        value, tangent = torch.func.jvp(
            lambda x, f=f, args=args: rules.checkpoint(f, x, *args), (ones,), (ones,)
        )
        assert torch.equal(tangent, value)
    torch.manual_seed(0)  # the last f drew from its own generator
    assert torch.equal(torch.rand(1), between)
    assert torch.equal(torch.rand(1), after)
    batched = lambda x: torch.func.grad(
        lambda x: (lambda y: (y.sum(), y))(rules.checkpoint(drop, x)), has_aux=True
    )(x)
    for randomness in ("same", "different"):
        slope, value = torch.func.vmap(batched, randomness=randomness)(torch.ones(5, 9))
        assert torch.equal(slope, value)
        assert len(slope.unique()) == 2
    slope = torch.compile(
        torch.func.grad(lambda x: rules.checkpoint(torch.sin, x).sum()), backend="aot_eager"
    )(ones)
    assert torch.allclose(slope, ones.cos())


def test_checkpoint_of_equinox_modules():
    jax, eqx = pytest.importorskip("jax"), pytest.importorskip("equinox")
    from gradlab.jax import rules

    model, x = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0)), jax.numpy.ones(2)
    losses = (
        lambda model: model(x).sum(),
        lambda model: rules.checkpoint(lambda model, x: model(x), model, x).sum(),
        lambda model: rules.checkpoint(model, x).sum(),
    )
    right, *others = (jax.tree.leaves(eqx.filter_grad(loss)(model)) for loss in losses)
    for found in others:
        for a, b in zip(found, right, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


def test_clipping_in_every_place(fw):
    clip, x = fw.gl.rules.clip_gradient, fw.array(np.ones(4))
    f = lambda x, m: (10 * clip(x, m)).sum()
    for m, right in ((math.inf, 10.0), (1.0, 0.5)):
        np.testing.assert_allclose(fw.numpy(fw.compile(fw.grad(lambda x, m=m: f(x, m)))(x)), right)
        np.testing.assert_allclose(fw.numpy(fw.grad(lambda x, m=m: f(x, m))(x)), right)
    norms = fw.array(np.array([1.0, 2.0, np.inf]))
    found = fw.numpy(fw.vmap(lambda m: fw.grad(lambda x: f(x, m))(x))(norms))
    np.testing.assert_allclose(found, np.array([[0.5], [1.0], [10.0]]) * np.ones(4))
    again = fw.compile(fw.grad(lambda x: (fw.grad(lambda x: (clip(x, 100.0) ** 3).sum())(x)).sum()))
    np.testing.assert_allclose(fw.numpy(again(x)), 6.0)
    tree = lambda x: {"x": x, "n": fw.array(np.array([1, 2])), "none": None}
    for rule, right in (
        (lambda t: clip(t, 1.0), 0.5),
        (lambda t: fw.gl.rules.reverse_gradient(t, 2.0), -20.0),
    ):
        np.testing.assert_allclose(fw.numpy(fw.grad(lambda x: (10 * rule(tree(x))["x"]).sum())(x)), right)
        assert fw.numpy(rule(tree(x))["n"]).tolist() == [1, 2]


def test_clipping_refuses_what_is_no_number(fw):
    for max_norm in ("a", None):
        with pytest.raises(KindError, match=r"max_norm is a (str|NoneType); pass a positive number"):
            fw.gl.rules.clip_gradient(fw.array(np.ones(2)), max_norm)


def test_clipping_has_no_forward_mode(fw):
    x = fw.array(np.ones(4))
    f = lambda x: (10 * fw.gl.rules.clip_gradient(x, 1.0)).sum()
    slope = lambda x: fw.jvp(f, x, x)
    for forward in (slope, lambda x: fw.jvp(slope, x, x)):
        own = (TypeError, NotImplementedError)  # jax's
        with pytest.raises(StrategyError if fw.name == "torch" else own, match=r"forward|custom_lin"):
            forward(x)
    if fw.name == "torch":
        with pytest.raises(Exception, match=r"no forward mode|nonstrict_trace"):
            fw.compile(slope)(x)
        assert fw.numpy(fw.jvp(fw.xp.sin, x[0], x[0])) == np.cos(1.0)  # nothing of it is left behind


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 1e4, 1e8])
def test_divided_differences_at_every_scale(fw, scale, dtype):
    """Of log and root, at eigenvalues apart, near and equal: f(s A) has the derivatives of f(A), scaled."""
    np_log = np.array([1.0, 1.0 + 1e-9, 1.0 + 1e-5, 1.003, 1.3, 5.0]) * scale
    w = fw.array(np_log, dtype)
    E = fw.array(np.ones((6, 6)) * scale, dtype)
    f = lambda A: fw.gl.rules.matrix_function(fw.xp.log, A, order=1)
    z = fw.numpy(w).astype(np.float64) / scale
    gap = z[:, None] - z
    ratio = np.log1p(gap / z) / np.where(gap == 0, 1.0, gap)
    right = np.where(gap == 0, 1 / z[:, None] * np.ones(6), ratio)
    found = fw.numpy(quick(fw, lambda w: fw.jvp(f, fw.xp.diag(w), E))(w))
    np.testing.assert_allclose(found, right, rtol={"float64": 1e-10, "float32": 1e-4}[dtype])


def test_divided_differences_where_derivatives_vanish(fw):
    """x + x⁹ has no third derivative at 0, the mean of 1 and -1, where its series misses the ninth power."""
    f = lambda A: fw.gl.rules.matrix_function(lambda x: x + x**9, A, order=1)
    A, E = fw.array(np.diag([-1.0, 1.0])), fw.array(np.array([[0.0, 1.0], [1.0, 0.0]]))
    found = fw.numpy(quick(fw, lambda A: fw.jvp(f, A, E))(A))
    np.testing.assert_allclose(found, [[0.0, 2.0], [2.0, 0.0]], atol=1e-12)


def test_matrix_function_of_hermitian_matrices(fw):
    H = rng.normal(size=(3, 3)) + 1j * rng.normal(size=(3, 3))
    H, E = H + H.T.conj(), (lambda M: M + M.T)(rng.normal(size=(3, 3))) + 0j
    rules = fw.gl.rules
    one, other = (
        fw.numpy(
            quick(fw, lambda A, f=f: fw.jvp(lambda A: fw.jvp(f, A, fw.array(E)), A, fw.array(E)))(fw.array(H))
        )
        for f in (lambda A: rules.matrix_function(fw.xp.exp, A, order=2), rules.expm)
    )
    np.testing.assert_allclose(one, other, rtol=1e-9)


def test_expm_of_large_norm(fw):
    """sinh(1) s beside e and 1/e; and no finite derivative where there is no value."""
    entry = lambda A: fw.gl.rules.expm(A)[0, 1]
    for s in (1e3, 1e6, 1e9):
        A = fw.array(np.array([[1.0, s], [0.0, -1.0]]))
        np.testing.assert_allclose(fw.numpy(entry(A)), np.sinh(1) * s, rtol=3e-16 * s + 1e-12)
        np.testing.assert_allclose(fw.numpy(fw.grad(entry)(A))[0, 1], np.sinh(1), rtol=3e-16 * s + 1e-12)
    beyond = fw.array(np.array([[1.0, 1e15], [0.0, -1.0]]))
    value, slope = fw.numpy(entry(beyond)), fw.numpy(fw.grad(entry)(beyond))[0, 1]
    assert np.isfinite(value) == np.isfinite(slope)


def test_logdet_of_singular_matrices_is_not_finite(fw):
    As = fw.array(np.stack([2 * np.eye(2), np.ones((2, 2)), np.zeros((2, 2))]))
    slopes = fw.numpy(fw.grad(lambda A: fw.gl.rules.logdet(A).sum())(As))
    np.testing.assert_allclose(slopes[0], np.eye(2) / 2)
    assert not np.isfinite(slopes[1:]).all((1, 2)).any()
    np.testing.assert_array_equal(fw.numpy(fw.gl.rules.logdet(As))[1:], -np.inf)


def test_a_value_that_is_nan_has_a_slope_that_is(fw):
    for f in (fw.gl.rules.log1mexp, fw.gl.rules.sqrt):
        for derivative in (fw.grad, fw.jacfwd, lambda f: fw.jacfwd(fw.grad(f))):
            assert np.isnan(fw.numpy(derivative(f)(fw.array(np.array(-1.0)))))


def test_no_axis_is_each_entry(fw):
    x = fw.array(np.array([-2.0, 0.0]))
    for keepdims in (False, True):
        np.testing.assert_array_equal(fw.numpy(fw.gl.rules.norm(x, axis=(), keepdims=keepdims)), [2.0, 0.0])
        np.testing.assert_array_equal(
            fw.numpy(fw.gl.rules.logsumexp(x, axis=(), keepdims=keepdims)), [-2.0, 0.0]
        )


def closing_over(fw, order):
    outer, probes = fw.array(B @ B.T + np.eye(6)), fw.array(PROBES)
    return lambda a: fw.gl.rules.stochastic_logdet(lambda v: a * (outer @ v), probes, order=order)


@pytest.mark.slow
def test_estimate_of_what_matvec_closes_over_in_every_mode(fw):
    f, a = closing_over(fw, 2), fw.array(np.array(2.0))
    for derivative, right in ((fw.jacfwd, 3.0), (lambda f: fw.jacfwd(fw.grad(f)), -1.5)):
        np.testing.assert_allclose(fw.numpy(quick(fw, derivative(f))(a)), right, rtol=1e-9)


def test_estimate_of_what_matvec_closes_over(fw):
    """As of a parameter."""
    slope = quick(fw, fw.grad(closing_over(fw, 1)))
    np.testing.assert_allclose(fw.numpy(slope(fw.array(np.array(2.0)))), 3.0, rtol=1e-9)
    if fw.name == "torch":
        outer, probes = fw.array(B @ B.T + np.eye(6)), fw.array(PROBES)
        layer = fw.xp.nn.Linear(6, 6, bias=False, dtype=fw.xp.float64)
        with fw.xp.no_grad():
            layer.weight.copy_(outer)
        value = fw.gl.rules.stochastic_logdet(layer, probes, order=1)
        (slope,) = fw.xp.autograd.grad(value, layer.weight)
        np.testing.assert_allclose(slope, np.linalg.inv(outer), rtol=1e-9, atol=1e-12)


def test_estimate_of_small_matrices_and_of_nothing(fw):
    probes = np.concatenate([PROBES, np.zeros((6, 6))])
    A = np.diag(np.arange(1.0, 7.0))
    f = lambda s: fw.gl.rules.stochastic_logdet(
        lambda v, s: s * (fw.array(A) @ v), fw.array(probes), s, order=1
    )
    s = fw.array(np.array(1e-20))
    np.testing.assert_allclose(fw.numpy(quick(fw, f)(s)), np.linalg.slogdet(1e-20 * A)[1] / 2, rtol=1e-12)
    np.testing.assert_allclose(fw.numpy(quick(fw, fw.grad(f))(s)), 3e20, rtol=1e-9)


def test_estimate_refuses(fw):
    x, A = fw.array(PROBES), fw.array(np.diag([1.0, 2, 3, 4, 5, -6]))
    estimate = lambda f, probes=x, **options: fw.gl.rules.stochastic_logdet(f, probes, **options)
    for order in (0, 1):
        with pytest.raises(ConvergenceError, match="A is not positive definite"):
            estimate(lambda v: A @ v, order=order)
    for error, message, call in (
        (StrategyError, "probes are being diff", lambda: fw.grad(lambda x: estimate(lambda v: 2 * v, x))(x)),
        (
            StrategyError,
            "probes are being diff",
            lambda: fw.jvp(lambda x: estimate(lambda v: 2 * v, x, order=0), x, x),
        ),
        (KindError, "probes is .*int64", lambda: estimate(lambda v: v, fw.array(np.ones((2, 3), int)))),
        (KindError, "probes is list", lambda: estimate(lambda v: v, [[1.0]])),
        (InputError, "probes has shape", lambda: estimate(lambda v: v, x[:0])),
        (InputError, "steps is 2.5", lambda: estimate(lambda v: v, steps=2.5)),
        (InputError, "order is True", lambda: estimate(lambda v: v, order=True)),
        (InputError, "has given", lambda: estimate(lambda v: v[:3])),
        (InputError, "has given", lambda: estimate(lambda v: [v, v])),
    ):
        with pytest.raises(error, match=message):
            call()


def test_complex_numbers_are_refused(fw):
    z = fw.array(np.array([[3.0 + 4.0j]]))
    rules = fw.gl.rules
    for op in (rules.norm, rules.sqrt, rules.log1mexp, rules.logsumexp, rules.logdet):
        with pytest.raises(KindError, match="is complex; pass real numbers"):
            op(z)
    for op in (
        lambda z: rules.clip_gradient(z, 1.0),
        rules.reverse_gradient,
        lambda z: rules.straight_through(z, z),
    ):
        with pytest.raises(KindError, match="holds complex numbers"):
            op(z)


def test_estimators_refuse_what_has_no_derivative(fw):
    x, n = fw.array(np.ones(2)), fw.array(np.ones(2, dtype=np.int64))
    for hard, soft in ((n, x), (x, n), (n == 1, n == 1), ([x, n], [x, x]), ([x, x], [x, n])):
        with pytest.raises(KindError, match=r"(hard|soft).*(int64|bool)"):
            fw.gl.rules.straight_through(hard, soft)


def test_bad_input(fw):
    rules, x = fw.gl.rules, fw.array(np.ones(2))
    for call, message in (
        (lambda: rules.clip_gradient(x, 0.0), "max_norm is 0.0; pass a positive number"),
        (lambda: rules.matrix_function(fw.xp.exp, fw.array(S), order=4), "order is 4; pass 0, 1, 2 or 3"),
        (lambda: rules.straight_through(x, x[:1]), "shape"),
        (lambda: rules.straight_through(x, [x]), "has the structure"),
        (lambda: rules.stochastic_logdet(lambda v: v, x), "probes has shape"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_the_facade_finds_the_framework(fw):
    import gradlab

    x = fw.array(np.array([3.0, 4.0]))
    assert fw.numpy(gradlab.rules.norm(x)) == 5
    with pytest.raises(gradlab.BackendError, match=r"rules\.norm"):
        gradlab.rules.norm([3.0, 4.0])


def test_checkpoint_hands_integers_on(fw):
    """A counter beside the floats, in and out."""
    f = lambda carry, k: {"x": carry["x"] ** 2 * k, "n": carry["n"] + 1}
    n = fw.array(np.array(2))
    g = lambda x: fw.gl.rules.checkpoint(f, {"x": x, "n": n}, n)
    assert int(g(fw.array(3.0))["n"]) == 3
    assert float(fw.grad(lambda x: g(x)["x"])(fw.array(3.0))) == 12.0
