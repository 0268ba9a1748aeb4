"""Functions that a framework differentiates in part only: the right derivative, or the named refusal."""

import numpy as np
import pytest

import gradlab
from frameworks import load

X = np.array([0.5, 1.2])
CUBE_HESSIAN, CUBE_JACOBIAN = np.diag(6 * X), np.diag(3 * X**2)


def operations(gl, xp, cube, x):
    """Every operation on Σ x³ or on x³, and the closed form it must have."""
    f = lambda x: cube(x).sum()
    v, V = xp.ones_like(x), xp.stack([xp.ones_like(x), 2 * x])
    H, J = gl.hessian_operator(f, x), gl.jacobian_operator(cube, x)
    G = gl.ggn_operator(cube, lambda y: (y**2).sum() / 2, x)
    gauss_newton = CUBE_JACOBIAN**2
    return [
        (gl.hvp(f, x, v), CUBE_HESSIAN @ np.ones(2)),
        (gl.hessian(f, x), CUBE_HESSIAN),
        (gl.hessian_diagonal(f, x), np.diag(CUBE_HESSIAN)),
        (H @ v, CUBE_HESSIAN @ np.ones(2)),
        (H.matmat(V), np.stack([np.ones(2), 2 * X]) @ CUBE_HESSIAN),
        (gl.jacobian(cube, x, mode="forward"), CUBE_JACOBIAN),
        (gl.jacobian(cube, x, mode="reverse"), CUBE_JACOBIAN),
        (J @ v, CUBE_JACOBIAN @ np.ones(2)),
        (J.matmat(V), np.stack([np.ones(2), 2 * X]) @ CUBE_JACOBIAN),
        (J.T @ v, CUBE_JACOBIAN @ np.ones(2)),
        (J.T.matmat(V), np.stack([np.ones(2), 2 * X]) @ CUBE_JACOBIAN),
        (gl.ggn_vp(cube, lambda y: (y**2).sum() / 2, x, v), gauss_newton @ np.ones(2)),
        (G.matmat(V), np.stack([np.ones(2), 2 * X]) @ gauss_newton),
    ]


def all_right(fw, cube):
    for actual, expected in operations(fw.gl, fw.xp, cube, fw.array(X)):
        np.testing.assert_allclose(fw.numpy(actual), expected, rtol=1e-12)


def test_an_old_style_function_of_torch():
    """One without setup_context, which torch.func refuses: graphs alone differentiate it."""
    fw = load("torch")
    import torch

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, u):
            (x,) = ctx.saved_tensors
            return 3 * x**2 * u

    all_right(fw, Cube.apply)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jacrev(Cube.apply)(fw.array(X))


def test_where_torch_records_nothing():
    fw = load("torch")
    import torch

    cube, x = lambda x: x**3, fw.array(X)
    with torch.no_grad():
        results = operations(fw.gl, torch, cube, x)
    for actual, expected in results:
        assert not actual.requires_grad
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)
    with torch.inference_mode():
        for op in (gradlab.jacobian, gradlab.jacobian_operator):
            with pytest.raises(gradlab.StrategyError, match=r"torch.no_grad"):
                op(cube, x)


def control_flow(torch):
    from torch._higher_order_ops.scan import scan
    from torch._higher_order_ops.while_loop import while_loop

    def while_(x):
        start = torch.tensor(0), torch.ones_like(x)
        return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * x), start)[1]

    return {
        "while_loop": while_,
        "scan": lambda x: scan(lambda c, a: (c * a, c * a), x * 1.0, torch.stack([x, x]), dim=0)[0],
        "cond": lambda x: torch.cond(x.sum() > 0, lambda x: x * x * x, lambda x: 2 * x, (x,)),
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, tracing a scan
@pytest.mark.parametrize("name", ["while_loop", "scan", "cond"])
def test_control_flow_of_torch_is_refused(name):
    """torch's own second derivative of these is silently wrong."""
    fw = load("torch")
    import torch

    cube, x, v = control_flow(torch)[name], fw.array(X), fw.array(np.ones(2))
    f = lambda x: cube(x).sum()
    calls = [
        lambda: gradlab.hvp(f, x, v),
        lambda: gradlab.hessian(f, x),
        lambda: gradlab.hessian_diagonal(f, x),
        lambda: gradlab.hessian_operator(f, x),
        lambda: gradlab.jacobian(cube, x, mode="forward"),
        lambda: gradlab.jacobian(cube, x, mode="reverse"),
        lambda: gradlab.jacobian_operator(cube, x),
        lambda: gradlab.ggn_vp(cube, lambda y: (y**2).sum(), x, v),
        lambda: gradlab.ggn_operator(cube, lambda y: (y**2).sum(), x),
    ]
    for call in calls:
        with pytest.raises(gradlab.StrategyError, match="write it in Python"):
            call()


def test_custom_vjp_of_jax():
    fw = load("jax")
    import jax

    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, u: (3 * x**2 * u,))
    in_a_scan = lambda x: jax.lax.scan(lambda c, a: (cube(a) * c, None), x * 0 + 1, x[None])[0]
    for wrapped in (cube, jax.jit(cube), jax.vmap(cube), in_a_scan):
        all_right(fw, wrapped)
        all_right(fw, lambda x, f=wrapped: jax.checkpoint(f)(x))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jacfwd(cube)(fw.array(X))


def test_loops_of_jax():
    fw = load("jax")
    import jax

    all_right(fw, lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y * x, x * 0 + 1))
    dynamic = lambda x: jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * x), (0, x * 0 + 1)
    )[1]
    J = gradlab.jacobian(dynamic, fw.array(X), mode="forward")
    np.testing.assert_allclose(J, CUBE_JACOBIAN, rtol=1e-12)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        gradlab.jacobian(dynamic, fw.array(X), mode="reverse")
