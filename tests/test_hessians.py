"""Every second-order operation on every scenario, against closed forms, on both frameworks."""

import numpy as np
import pytest

from frameworks import arrays, flat, leaves
from scenarios import SCALARS, VECTORS

STRATEGIES = ["auto", "forward_over_reverse", "reverse_over_reverse", "reverse_over_forward"]
scalars = pytest.mark.parametrize("s", SCALARS, ids=lambda s: s.name)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12 * max(1.0, np.abs(expected).max()))


def prepared(fw, s):
    return (lambda x, *args: s.f(fw.xp, x, *args)), arrays(fw, s.x), arrays(fw, s.args)


@scalars
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_hvp(fw, s, strategy):
    f, x, args = prepared(fw, s)
    v = s.direction()
    product = fw.gl.hvp(f, x, arrays(fw, v), *args, strategy=strategy)
    close(flat(fw, product), s.hessian @ np.concatenate([leaf.reshape(-1) for leaf in leaves(v)]))


@scalars
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_hessian(fw, s, chunk_size):
    f, x, args = prepared(fw, s)
    H = fw.gl.hessian(f, x, *args, chunk_size=chunk_size)
    close(matrix(fw, H, x, x), s.hessian)


def matrix(fw, blocks, rows, columns):
    """A dense tree of trees as one numpy matrix."""
    lines = blocks if isinstance(rows, (dict, list, tuple)) else [blocks]
    out = []
    for row, block in zip(leaves(rows), _outer(lines, rows), strict=True):
        size = int(np.prod(row.shape))
        out.append(np.concatenate([fw.numpy(b).reshape(size, -1) for b in leaves(block)], axis=1))
    return np.concatenate(out)


def _outer(blocks, like):
    """The blocks that stand where `like` has its arrays."""
    if isinstance(like, dict):
        return [b for key in like for b in _outer(blocks[key], like[key])]
    if isinstance(like, (list, tuple)):
        return [b for one, child in zip(blocks, like, strict=True) for b in _outer(one, child)]
    return [blocks] if hasattr(like, "shape") else []


@scalars
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_hessian_diagonal(fw, s, chunk_size):
    f, x, args = prepared(fw, s)
    close(flat(fw, fw.gl.hessian_diagonal(f, x, *args, chunk_size=chunk_size)), np.diag(s.hessian))


@scalars
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_hessian_operator(fw, s, chunk_size):
    f, x, args = prepared(fw, s)
    H = fw.gl.hessian_operator(f, x, *args, chunk_size=chunk_size)
    n = len(s.hessian)
    assert H.shape == (n, n)
    v, V = s.direction(), s.direction(1, lead=(5,))
    close(flat(fw, H @ arrays(fw, v)), s.hessian @ numpy_flat(v))
    close(flat(fw, H.matmat(arrays(fw, V)), lead=1), numpy_flat(V, lead=1) @ s.hessian)
    close(fw.numpy(H @ fw.array(numpy_flat(v))).reshape(-1), s.hessian @ numpy_flat(v))
    if n > 1:
        close(fw.numpy(H.matmat(fw.array(numpy_flat(V, 1)))).reshape(5, n), numpy_flat(V, 1) @ s.hessian)
    close(fw.numpy(H.T.dense()), s.hessian)
    scipy = H.to_scipy()
    close(scipy @ numpy_flat(v), s.hessian @ numpy_flat(v))
    close(scipy @ numpy_flat(V, 1).T, s.hessian @ numpy_flat(V, 1).T)
    close(scipy.T @ numpy_flat(v), s.hessian @ numpy_flat(v))


def numpy_flat(tree, lead=0):
    parts = leaves(tree)
    return np.concatenate([part.reshape(*part.shape[:lead], -1) for part in parts], axis=-1)


@pytest.mark.parametrize("s", VECTORS, ids=lambda s: s.name)
def test_gauss_newton(fw, s):
    """Loss Σ y³/6: its Hessian at the model's output y is diag(y)."""
    f, x, args = prepared(fw, s)
    y = s.f(np, s.x, *s.args)
    G = s.jacobian.T @ (numpy_flat(y)[:, None] * s.jacobian)
    loss = lambda out: sum((leaf**3).sum() for leaf in leaves(out)) / 6
    v = s.direction()
    close(flat(fw, fw.gl.ggn_vp(f, loss, x, arrays(fw, v), *args)), G @ numpy_flat(v))
    operator = fw.gl.ggn_operator(f, loss, x, *args, chunk_size=3)
    close(fw.numpy(operator.dense()), G)
    close(flat(fw, operator @ arrays(fw, v)), G @ numpy_flat(v))


def test_aux_is_returned_as_it_is(fw):
    x = fw.array(np.arange(1.0, 4.0))
    f = lambda x: ((x**3).sum(), {"twice": 2 * x, "name": "cubic"})
    for result in (
        fw.gl.hvp(f, x, x, has_aux=True),
        fw.gl.hvp(f, x, x, has_aux=True, strategy="reverse_over_forward"),
        fw.gl.hessian(f, x, has_aux=True),
        fw.gl.hessian_diagonal(f, x, has_aux=True),
        fw.gl.jacobian(f, x, has_aux=True),
        fw.gl.ggn_vp(f, lambda y: y**2, x, x, has_aux=True),
    ):
        assert result[1]["name"] == "cubic"
        close(fw.numpy(result[1]["twice"]), [2.0, 4.0, 6.0])
    for operator in (
        fw.gl.hessian_operator(f, x, has_aux=True),
        fw.gl.jacobian_operator(f, x, has_aux=True),
        fw.gl.ggn_operator(f, lambda y: y**2, x, has_aux=True),
    ):
        assert operator.aux["name"] == "cubic"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_follows_the_input(fw, dtype):
    x = fw.array(np.arange(1, 4), dtype)
    f = lambda x: (x**3).sum()
    for result in (
        fw.gl.hvp(f, x, x),
        fw.gl.hessian(f, x),
        fw.gl.hessian_diagonal(f, x),
        fw.gl.hessian_operator(f, x).dense(),
        fw.gl.jacobian(f, x),
        fw.gl.ggn_vp(f, lambda y: y**2, x, x),
    ):
        assert str(result.dtype).endswith(dtype)
    assert fw.gl.hessian_operator(f, x).to_scipy().dtype == dtype


def test_leaves_of_different_dtypes(fw):
    x = {"a": fw.array(np.ones(2), "float32"), "b": fw.array(np.ones(3), "float64")}
    H = fw.gl.hessian(lambda x: (x["a"] ** 2).sum() + (x["b"] ** 3).sum(), x)
    close(matrix(fw, H, x, x), np.diag([2.0, 2, 6, 6, 6]))


def test_numpy_and_numbers_in_the_namespaces(fw):
    f = lambda x, a: a.sum() * x**3
    close(fw.numpy(fw.gl.hvp(f, 2.0, 1.0, np.ones(2))), 24.0)
    close(fw.numpy(fw.gl.hvp(lambda x: (x**3).sum(), np.array([1.0, 2.0]), np.ones(2))), [6.0, 12.0])


def test_key_order_of_the_direction_does_not_matter(fw):
    x = {"a": fw.array(np.array([1.0])), "b": fw.array(np.array([2.0]))}
    v = {"b": fw.array(np.array([0.0])), "a": fw.array(np.array([1.0]))}
    product = fw.gl.hvp(lambda x: (x["a"] ** 3 + x["b"] ** 3).sum(), x, v)
    close(fw.numpy(product["a"]), [6.0])
    close(fw.numpy(product["b"]), [0.0])


def test_the_step_of_newton(fw):
    """An end-to-end use: Newton's method with scipy's CG on the operator reaches the minimum."""
    from scipy.sparse.linalg import cg

    f = lambda x: (xp.exp(x) - x).sum() + (x[1:] - x[:-1]) ** 2 @ xp.ones(4)
    xp = fw.xp
    x = fw.array(np.linspace(-1, 1, 5))
    if fw.name == "torch":
        f = lambda x: (xp.exp(x) - x).sum() + ((x[1:] - x[:-1]) ** 2).sum()
    for _ in range(8):
        step, info = cg(fw.gl.hessian_operator(f, x).to_scipy(), fw.numpy(fw.gl.jacobian(f, x)), rtol=1e-12)
        assert info == 0
        x = x - fw.array(step)
    close(fw.numpy(x), np.zeros(5))
