"""The library of rules: closed forms, edge points where plain formulas fail, every mode against differences."""

import numpy as np
import pytest

from gradlab import InputError, check

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
    assert np.isfinite(fw.numpy(fw.jacfwd(fw.grad(total))(A))).all()


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


def test_bad_input(fw):
    rules, x = fw.gl.rules, fw.array(np.ones(2))
    for call, message in (
        (lambda: rules.clip_gradient(x, 0.0), "max_norm is 0.0; pass a positive number"),
        (lambda: rules.matrix_function(fw.xp.exp, fw.array(S), order=4), "order is 4; pass 0, 1, 2 or 3"),
        (lambda: rules.straight_through(x, x[:1]), "shape"),
        (lambda: rules.straight_through(x, [x]), "different structures"),
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
