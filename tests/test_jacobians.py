"""Jacobians on every scenario, against closed forms, on both frameworks."""

import numpy as np
import pytest

from frameworks import arrays, flat
from scenarios import VECTORS
from test_hessians import close, matrix, numpy_flat, prepared

vectors = pytest.mark.parametrize("s", VECTORS, ids=lambda s: s.name)


@vectors
@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_jacobian(fw, s, mode, chunk_size):
    f, x, args = prepared(fw, s)
    J = fw.gl.jacobian(f, x, *args, mode=mode, chunk_size=chunk_size)
    close(matrix(fw, J, f(x, *args), x), s.jacobian)


@vectors
def test_jacobian_operator(fw, s):
    f, x, args = prepared(fw, s)
    J = fw.gl.jacobian_operator(f, x, *args, chunk_size=2)
    assert J.shape == s.jacobian.shape
    v, V = s.direction(), s.direction(1, lead=(3,))
    close(flat(fw, J @ arrays(fw, v)), s.jacobian @ numpy_flat(v))
    close(flat(fw, J.matmat(arrays(fw, V)), lead=1), numpy_flat(V, 1) @ s.jacobian.T)
    u = np.random.default_rng(2).normal(size=J.shape[0])
    close(flat(fw, J.T @ fw.array(u)), s.jacobian.T @ u)
    close(fw.numpy(J.dense()), s.jacobian)
    close(fw.numpy(J.T.dense()), s.jacobian.T)
    scipy = J.to_scipy()
    close(scipy @ numpy_flat(v), s.jacobian @ numpy_flat(v))
    close(scipy.T @ u, s.jacobian.T @ u)


def test_operator_is_its_own_transpose_twice(fw):
    J = fw.gl.jacobian_operator(lambda x: x[:2] ** 2, fw.array(np.arange(3.0)))
    assert J.T.shape == (3, 2)
    assert J.T.T is J
