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


@pytest.mark.parametrize("method", ["tsit5", pytest.param("kvaerno5", marks=pytest.mark.slow)])
def test_forward_mode_through_an_equation_in_torch(method, monkeypatch):
    """Three rates and 12 outputs: three tangents, where odeint's own no_grad is none of f's."""
    torch = pytest.importorskip("torch")
    import gradlab.torch as gl
    from gradlab.transforms.linearised import _torch as linearised

    tangents = []
    jvp = torch.func.jvp
    monkeypatch.setattr(
        linearised.torch.func, "jvp", lambda *args, **how: tangents.append(1) or jvp(*args, **how)
    )
    ts, y0 = torch.linspace(0, 1, 4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    decay = lambda hidden: lambda t, y, k: -k * y + (0 * k.sum() if hidden is None else hidden(k))
    k = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    exact = torch.diag_embed(-ts[:, None] * torch.exp(-ts[:, None] * k))
    solve = lambda f: lambda k: gl.odeint(f, y0, ts, k, method=method, rtol=1e-9, atol=1e-9).ys
    assert (gl.jacobian(solve(decay(None)), k) - exact).abs().max() < 1e-7
    assert tangents

    def without_derivative(k):
        with torch.no_grad():
            return 0 * k.sum()

    tangents.clear()
    assert (gl.jacobian(solve(decay(without_derivative)), k) - exact).abs().max() < 1e-7
    assert not tangents  # forward mode would see through f's own
