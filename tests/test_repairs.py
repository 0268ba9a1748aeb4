"""Operations whose higher derivatives torch gets wrong: shown wrong bare, and right in every nest here.

The truth is independent of automatic differentiation: φ(t) = f(X + t V) interpolated at Chebyshev
points, whose derivatives at 0 are good to about nine digits.
"""

import numpy as np
import pytest

import gradlab

torch = pytest.importorskip("torch")
functional = torch.nn.functional
jvp = lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1]

generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


X, V, B, W = normal(4, 4) + 2 * torch.eye(4), normal(4, 4), normal(4, 3), normal(4, 4)
weight, bias = normal(4), normal(4)

FAULTY = {
    "layer_norm": lambda x: (functional.layer_norm(x, (4,), weight, bias) ** 2 * W).sum(),
    "LayerNorm": lambda x: (torch.nn.LayerNorm(4, elementwise_affine=False)(x) ** 3 * W).sum(),
    "batch_norm": lambda x: (
        functional.batch_norm(x, None, None, weight, bias, training=True) ** 2 * W
    ).sum(),
    "instance_norm": lambda x: (functional.instance_norm(x[None], weight=weight, bias=bias) ** 2 * W).sum(),
    "det": torch.linalg.det,
    "Tensor.det": lambda x: x.det() ** 2,
    "batched det": lambda x: (torch.linalg.det(torch.stack([x, x.T @ x]))).sum(),
    "slogdet": lambda x: torch.linalg.slogdet(x)[1] ** 2,
    "logdet": lambda x: torch.logdet(x @ x.T) ** 2,
    "solve": lambda x: (torch.linalg.solve(x, B) ** 2).sum(),
    "solve a vector": lambda x: (torch.linalg.solve(x, B[:, 0]) ** 2).sum(),
    "solve from the right": lambda x: (torch.linalg.solve(x, B.T, left=False) ** 2).sum(),
    "solve_ex": lambda x: (torch.linalg.solve_ex(x, B).result ** 2).sum(),
    "tensorsolve": lambda x: (torch.linalg.tensorsolve(x.reshape(2, 2, 4), B[:, 0].reshape(2, 2)) ** 2).sum(),
}
# Forward mode of these losses raises in torch; its fused attention has no second derivative on a CPU.
MISSING = {
    "mse_loss": lambda x: functional.mse_loss(x, W) ** 2,
    "huber_loss": lambda x: functional.huber_loss(x, W, delta=0.7) ** 2,
    "attention": lambda x: (
        functional.scaled_dot_product_attention(x[None], 2 * x[None], x[None]) ** 2
    ).sum(),
    "attention in a module": lambda x: (
        functional.multi_head_attention_forward(
            x, x, x, 4, 2, W.repeat(3, 1), None, None, None, False, 0.0, W, None, need_weights=False
        )[0]
        ** 2
    ).sum(),
}
# Wrong where its second derivative is batched over directions (torch.autograd.grad, is_grads_batched).
BATCHED = {"group_norm": lambda x: (functional.group_norm(x, 1, weight, bias) ** 3 * W).sum()}
RIGHT = {  # near relatives, right in torch itself: no repair may spoil them
    "batch_norm in evaluation": lambda x: (functional.batch_norm(x, weight, weight**2) ** 3 * W).sum(),
    "rms_norm": lambda x: (functional.rms_norm(x, (4,)) ** 3 * W).sum(),
    "inv": lambda x: (torch.linalg.inv(x) * W).sum(),
    "cross_entropy": lambda x: functional.cross_entropy(x, torch.arange(4)) ** 2,
}
ALL = {**FAULTY, **MISSING, **BATCHED, **RIGHT}
every = pytest.mark.parametrize("name", ALL)


def truth(f):
    """First, second and third derivative at t = 0 of φ(t) = f(X + t V)."""
    h, n = 0.05, 17
    t = np.cos(np.pi * (np.arange(n) + 0.5) / n) * h
    values = [float(f(X + ti * V)) for ti in t]
    series = np.polynomial.chebyshev.Chebyshev.fit(t, values, n - 1, domain=[-h, h])
    return [float(series.deriv(k)(0)) for k in (1, 2, 3)]


def close(actual, expected, scale):
    assert abs(float(actual) - expected) <= 1e-6 * max(abs(expected), abs(scale), 1e-3)


@every
@pytest.mark.parametrize(
    "strategy", ["auto", "reverse_over_reverse", "forward_over_reverse", "reverse_over_forward"]
)
def test_second_order(name, strategy):
    f, (_, second, third) = ALL[name], truth(ALL[name])
    close((gradlab.hvp(f, X, V, strategy=strategy) * V).sum(), second, third)


@every
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_second_order_over_many_directions(name, chunk_size):
    f, (_, second, third) = ALL[name], truth(ALL[name])
    close(contracted_hessian(f, X), second, third)
    H = gradlab.hessian_operator(f, X, chunk_size=chunk_size)
    assert torch.allclose(H.matmat(torch.stack([V, 2 * V]))[1], 2 * (H @ V), rtol=1e-10)
    assert torch.allclose(H.dense().diagonal(), gradlab.hessian_diagonal(f, X).reshape(-1), rtol=1e-10)
    g = lambda x: f(x).reshape(1)
    assert torch.allclose(gradlab.jacobian(g, X, mode="forward"), gradlab.jacobian(g, X), rtol=1e-10)


def contracted_hessian(f, x):
    H = gradlab.hessian(f, x, chunk_size=5)
    return torch.einsum("ijkl,ij,kl", H, V, V)


THIRD = {
    "hvp inside jvp": lambda f: (jvp(lambda x: gradlab.hvp(f, x, V), X, V) * V).sum(),
    "hvp inside grad": lambda f: (torch.func.grad(lambda x: (gradlab.hvp(f, x, V) * V).sum())(X) * V).sum(),
    "hvp inside vmap of jvp": lambda f: (
        torch.func.vmap(lambda v: jvp(lambda x: gradlab.hvp(f, x, V), X, v))(V[None]) * V
    ).sum(),
    "hessian inside jvp": lambda f: jvp(lambda x: contracted_hessian(f, x), X, V),
    "diagonal inside grad": lambda f: (
        torch.func.grad(lambda t: gradlab.hessian_diagonal(lambda s: f(X + s * V), t)[0])(
            torch.zeros(1).double()
        )
    )[0],
    "operator inside jvp": lambda f: (jvp(lambda x: gradlab.hessian_operator(f, x) @ V, X, V) * V).sum(),
    "operator, forward level": lambda f: (_dual(lambda x: gradlab.hessian_operator(f, x) @ V) * V).sum(),
    "hvp of forward mode": lambda f: (gradlab.hvp(lambda x: jvp(f, x, V), X, V) * V).sum(),
    "jacobian of hvp": lambda f: (gradlab.jacobian(lambda x: (gradlab.hvp(f, x, V) * V).sum(), X) * V).sum(),
    "plain backward": lambda f: _backward(f, X.clone().requires_grad_()),
    "plain backward of a closed-over tensor": lambda f: _closed_over(f),
    "plain backward of data": lambda f: _of_data(f),
}


def _dual(function):
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(X, V))).tangent


def _backward(f, x):
    (g,) = torch.autograd.grad((gradlab.hvp(f, x, V) * V).sum(), x)
    return (g * V).sum()


def _closed_over(f):
    shift = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad((gradlab.hvp(lambda x: f(x + shift), X, V) * V).sum(), shift)
    return (g * V).sum()


def _of_data(f):
    shift = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad((gradlab.hvp(lambda x, s: f(x + s), X, V, shift) * V).sum(), shift)
    return (g * V).sum()


@every
@pytest.mark.parametrize("nest", THIRD)
def test_third_order(name, nest):
    f, (_, second, third) = ALL[name], truth(ALL[name])
    close(THIRD[nest](f), third, second)


@every
def test_a_second_call_is_as_right_as_the_first(name):
    """What the first call of a function taught must not make a later one wrong."""
    f, (_, second, third) = ALL[name], truth(ALL[name])
    for _ in range(3):
        close((gradlab.hvp(f, X, V) * V).sum(), second, third)
    close(_backward(f, X.clone().requires_grad_()), third, second)
    close((gradlab.hvp(f, X, V) * V).sum(), second, third)


pinned = pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="faults of the pinned version")


@pinned
@pytest.mark.parametrize("name", FAULTY)
def test_bare_torch_is_wrong(name):
    """If this fails, torch has mended the operation: its repair can go."""
    f, (_, second, _) = FAULTY[name], truth(FAULTY[name])
    bare = torch.func.grad(lambda x: jvp(f, x, V))(X)
    assert abs(float((bare * V).sum()) - second) > 1e-3 * abs(second)


@pinned
def test_bare_torch_is_wrong_on_a_batched_second_derivative_of_group_norm():
    f, x = lambda x: (functional.group_norm(x, 1) ** 3 * W).sum(), X.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    (one,) = torch.autograd.grad(g, x, V, retain_graph=True)
    (many,) = torch.autograd.grad(g, x, V[None], is_grads_batched=True)
    assert (many[0] - one).abs().max() > 1e-3 * one.abs().max()


@pytest.mark.parametrize("spectral", [torch.linalg.svdvals, lambda x: torch.linalg.eigvalsh(x + x.T)])
def test_operations_that_torch_cannot_batch(spectral):
    f = lambda x: (spectral(x) ** 3).sum()
    _, second, third = truth(f)
    close(contracted_hessian(f, X), second, third)


def test_a_function_that_changes_is_not_taken_for_the_one_it_was():
    use_norm = False

    def f(x):
        y = functional.layer_norm(x, (4,)) if use_norm else x
        return (y**3 * W).sum()

    close((gradlab.hvp(f, X, V) * V).sum(), truth(f)[1], 1)
    use_norm = True
    close((gradlab.hvp(f, X, V) * V).sum(), truth(f)[1], 1)
    close(_backward(f, X.clone().requires_grad_()), truth(f)[2], 1)


def test_running_statistics_are_those_of_batch_norm():
    mean, var = torch.zeros(4).double(), torch.ones(4).double()
    expected_mean, expected_var = mean.clone(), var.clone()
    functional.batch_norm(X, expected_mean, expected_var, training=True)
    f = lambda x: functional.batch_norm(x, mean, var, training=True).sum()
    gradlab.hvp(f, X, V, strategy="forward_over_reverse")
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(var, expected_var)


@pytest.mark.parametrize("strategy", ["forward_over_reverse", "reverse_over_forward"])
def test_forward_strategies_are_refused_where_torch_is_silently_wrong(strategy):
    """A Function's second forward derivative is a silent 0 in torch: nested forward mode is refused."""
    f = lambda x: (x**3).sum()
    with pytest.raises(gradlab.StrategyError, match="reverse_over_reverse"):
        jvp(lambda x: gradlab.hvp(f, x, V, strategy=strategy), X, V)


class Cube(torch.autograd.Function):
    """x³ with every rule that torch.func asks for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, u):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * u

    @staticmethod
    def jvp(ctx, v):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * v


def test_jacobian_inside_jvp_of_a_custom_function():
    """Forward over forward of an autograd.Function is 0 in torch; here it is right."""
    x, v = X[0], V[0]
    moved = jvp(lambda x: gradlab.jacobian(Cube.apply, x, mode="forward"), x, v)
    torch.testing.assert_close(moved, torch.diag(6 * x * v))


def test_the_audit_s_table_decides_what_is_repaired():
    pytest.importorskip("torch")
    from gradlab.transforms.repairs import _torch as repairs

    everywhere = repairs.known_wrong("0.0")  # a version that was never audited: all that was found in any
    assert {e["operation"] for e in repairs.known_wrong("2.13.0")} <= {e["operation"] for e in everywhere}
    named = repairs.named(everywhere)
    for form in repairs.RIGHT_FORMS:
        assert form in named or form in repairs._RAISING
    assert repairs.named([]) == frozenset()
    assert {"NativeLayerNormBackward0", "LinalgDetBackward0"} <= repairs.FAULTY - repairs.FAULTY_AT_SECOND
    assert {"NativeLayerNormBackwardBackward0", "CudnnBatchNormBackwardBackward0"} <= repairs.FAULTY_AT_SECOND
    assert "WhileLoopAutogradOpBackward" in repairs.UNREPAIRABLE
