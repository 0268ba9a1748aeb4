"""Functions on which torch, or an easy strategy, is silently wrong: gradlab is right, or refuses.

References are closed forms, or the same function written in primitives.
"""

import numpy as np
import pytest

import gradlab

torch = pytest.importorskip("torch")
functional = torch.nn.functional
double = lambda values: torch.tensor(values, dtype=torch.float64)
same = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
rng = np.random.default_rng(0)
c, W = torch.tensor(rng.normal(size=(2, 3))), torch.tensor(rng.normal(size=(4, 4)))


def test_weight_norm_at_second_order():
    v, ones = torch.tensor(rng.normal(size=6)), torch.ones(2, 1, dtype=torch.float64)
    f = lambda v: (torch._weight_norm(v.view(2, 3), ones) ** 2 * c).sum()

    def written(v):
        w = v.view(2, 3)
        return ((w / w.norm(dim=1, keepdim=True)) ** 2 * c).sum()

    H = torch.func.hessian(written)(v)
    for _ in range(2):  # the first call learns
        same(gradlab.hessian(f, v), H)
        same(gradlab.hvp(f, v, v.flip(0)), H @ v.flip(0))
    same(gradlab.hessian_operator(f, v) @ v.flip(0), H @ v.flip(0))
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2).double())
    apply, params = gradlab.functional(layer)
    H = gradlab.hessian_operator(lambda p: (apply(p, c) ** 3).sum(), params)
    dense = torch.stack([H @ row for row in torch.eye(H.shape[0], dtype=torch.float64)])
    same(dense, dense.T)
    same(dense, H.dense())


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_a_compiled_function(backend):
    x, v, A = double([0.3, -0.5]), double([1.0, 2.0]), double([[1.0, 2.0], [0.5, -1.0]])
    plain = lambda x: torch.tanh(x @ A).sum()
    f = torch.compile(lambda x: torch.tanh(x @ A).sum(), backend=backend)
    H = torch.func.hessian(plain)(x)
    for _ in range(3):
        same(gradlab.hvp(f, x, v), H @ v)
        operator = gradlab.hessian_operator(f, x)
        same(operator @ v, H @ v)
        same(operator.dense(), H)
        same(gradlab.ggn_vp(lambda x: x * x, f, x, v), 4 * x * (torch.func.hessian(plain)(x * x) @ (x * v)))


def test_a_gradient_penalty_through_a_norm():
    """f differentiates a layer norm itself, so that a Hessian of f is of third order."""
    weights = torch.tensor(rng.normal(size=4))
    norm = lambda y: functional.layer_norm(y, (4,))
    written = lambda y: (y - y.mean()) * torch.rsqrt(((y - y.mean()) ** 2).mean() + 1e-5)

    def penalty(norm):
        def f(x):
            x = x if x.requires_grad else x.detach().requires_grad_()
            (d,) = torch.autograd.grad((norm(x @ W).tanh() * weights).sum(), x, create_graph=True)
            return (d**2).sum()

        return f

    x, v = torch.tensor(rng.normal(size=4)), torch.tensor(rng.normal(size=4))
    f, right = penalty(norm), penalty(written)
    for _ in range(2):
        same(gradlab.hvp(f, x, v), gradlab.hvp(right, x, v))
        same(gradlab.hessian_operator(f, x) @ v, gradlab.hvp(right, x, v))
        same(gradlab.hessian(f, x), gradlab.hessian(right, x))


def test_a_backward_that_is_singular_at_zero():
    f, x, v = lambda x: x.logcumsumexp(0), double([0.3, -0.5, 0.2]), double([1.0, 2.0, -1.0])
    p = x.exp() / x.exp().cumsum(0).unsqueeze(1)
    J = torch.tril(p)
    loss = lambda y: (y**2).sum() / 2
    same(gradlab.jacobian_operator(f, x) @ v, J @ v)
    same(gradlab.ggn_operator(f, loss, x) @ v, J.T @ (J @ v))
    same(torch.func.vmap(lambda x: gradlab.ggn_vp(f, loss, x, v))(x[None])[0], J.T @ (J @ v))
    same(torch.func.vmap(lambda x: gradlab.jacobian(f, x, mode="forward"))(x[None])[0], J)


def straight_through(x):
    with torch.no_grad():
        r = x.round() - x
    return (x + r) ** 2


def hooked(x):
    y = x * 1.0
    y.register_hook(lambda g: 2 * g)
    return y**2 / 2


@pytest.mark.parametrize(("f", "slope"), [(straight_through, [2.0, 4.0]), (hooked, [1.2, 3.4])])
def test_what_reverse_mode_alone_regards(f, slope):
    """no_grad and hooks: every operation means the function that backward sees."""
    x, v = double([0.6, 1.7]), double([1.0, -1.0])
    if f is hooked:  # torch.func runs no hooks of a tensor's own in every transform: compare the graphs alone
        loss = lambda y: (y**2).sum() / 2
        same(gradlab.ggn_vp(f, loss, x, v), gradlab.ggn_operator(f, loss, x) @ v)
        return
    J = torch.diag(double(slope))
    same(gradlab.jacobian(f, x, mode="forward"), J)
    same(gradlab.jacobian(f, x, mode="reverse"), J)
    wide = gradlab.jacobian(lambda x: torch.cat([f(x), x, x]), x)
    same(wide, torch.cat([J, torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)]))
    for _ in range(2):
        same(gradlab.ggn_vp(f, lambda y: (y**2).sum() / 2, x, v), J @ (J @ v))


class Square(torch.autograd.Function):
    """x² with its own rules: a second forward derivative through it is a silent zero (pytorch#197867)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, u):
        return 2 * ctx.saved_tensors[0] * u

    @staticmethod
    def jvp(ctx, v):
        return 2 * ctx.saved_tensors[0] * v


def test_forward_mode_inside_f():
    f = lambda x: torch.func.jvp(lambda z: Square.apply(z) * z, (x,), (x,))[1]  # 3 x³
    x, v = double([1.0, 2.0]), double([1.0, 1.0])
    same(gradlab.hvp(lambda x: f(x).sum(), x, v), 18 * x)
    for strategy in ("forward_over_reverse", "reverse_over_forward"):
        with pytest.raises(gradlab.StrategyError, match="use 'reverse_over_reverse'"):
            gradlab.hvp(lambda x: f(x).sum(), x, v, strategy=strategy)
    same(gradlab.jacobian(f, x, mode="forward"), torch.diag(9 * x**2))


def test_norms_by_their_short_names():
    x, weight = torch.tensor(rng.normal(size=(5, 3))), torch.tensor(rng.normal(size=3))
    before = weight.clone()
    batch = lambda x: (torch.batch_norm(x, weight, weight, None, None, True, 0.1, 1e-5, False) ** 3).sum()
    instance = lambda x: (
        torch.instance_norm(x[None].mT, weight, weight, None, None, True, 0.1, 1e-5, False) ** 3
    ).sum()

    def written(x):
        y = (x - x.mean(0)) * torch.rsqrt(((x - x.mean(0)) ** 2).mean(0) + 1e-5)
        return ((y * weight + weight) ** 3).sum()

    for f in (batch, instance):
        same(gradlab.hessian(f, x), torch.func.hessian(written)(x))
        same(gradlab.hvp(f, x, x), torch.func.jvp(torch.func.grad(written), (x,), (x,))[1])
    assert torch.equal(weight, before)


def test_huber_loss_at_a_zero_residual():
    t = double([0.5, 1.0])
    f = lambda x: functional.huber_loss(x, t, reduction="sum")
    same(gradlab.hessian(f, t), torch.eye(2, dtype=torch.float64))
    same(
        torch.func.vmap(lambda v: gradlab.hvp(f, t, v))(torch.eye(2, dtype=torch.float64)),
        torch.eye(2).double(),
    )


def test_determinants_at_a_singular_matrix():
    A = torch.diag(double([1.0, 2.0, 0.0]))
    cofactors = torch.diag(double([0.0, 0.0, 2.0]))
    same(gradlab.jacobian(torch.det, A), cofactors)
    J = gradlab.jacobian_operator(torch.det, A)
    same(J.T @ double(1.0), cofactors)
    same(J.T.matmat(double([1.0]))[0], cofactors)
    # repaired, its derivatives are refused by not-a-number rather than wrong
    assert torch.func.vmap(lambda A: gradlab.jacobian(torch.det, A))(A[None]).isnan().any()


def test_operators_keep_their_point():
    x = torch.ones(3, dtype=torch.float64)
    H = gradlab.hessian_operator(lambda x: (x**4).sum(), x)
    x.mul_(2)
    with pytest.raises(gradlab.InputError, match="changed in place"):
        H.matmat(torch.ones(1, 3, dtype=torch.float64))
    points = np.ones(3)
    H = gradlab.torch.hessian_operator(lambda x: (x**4).sum(), points)
    points[:] = 2
    same(H @ torch.ones(3, dtype=torch.float64), torch.full((3,), 12.0, dtype=torch.float64))


def test_operators_keep_their_random_numbers():
    x, v = torch.ones(64, dtype=torch.float64), torch.ones(64, dtype=torch.float64)
    f = lambda x: (functional.dropout(x, 0.5) ** 4).sum()
    H = gradlab.hessian_operator(f, x)
    first = H @ v
    state = torch.get_rng_state()
    same(H.matmat(v[None])[0], first)
    assert torch.equal(torch.get_rng_state(), state)
    J = gradlab.jacobian_operator(lambda x: functional.dropout(x, 0.5), x)
    same(J.matmat(v[None])[0], J @ v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_in_16_bits(dtype):
    x = torch.tensor([300.0, 600.0, 900.0, 1200.0])
    f = lambda x: functional.layer_norm(x, (4,))
    exact = torch.func.jacrev(f)(x)
    given = torch.func.vmap(lambda x: gradlab.jacobian(f, x))(x.to(dtype)[None])[0]
    torch.testing.assert_close(given.float(), exact, rtol=0.05, atol=2e-4)


def test_faulty_operations_below_python_are_refused():
    x = torch.tensor(rng.normal(size=4), requires_grad=True)
    f = lambda x: (torch.native_layer_norm(x, (4,), None, None, 1e-5)[0] ** 3).sum()
    with pytest.raises(gradlab.StrategyError, match="below torch's Python functions"):
        gradlab.hvp(f, x, x.detach())
    written = lambda x: (functional.layer_norm(x, (4,)) ** 3).sum()
    same(gradlab.hvp(f, x.detach(), x.detach()), gradlab.hvp(written, x.detach(), x.detach()))


def test_a_checkpointed_model():
    A, x, v = (
        torch.tensor(rng.normal(size=(3, 3))),
        torch.tensor(rng.normal(size=3)),
        double([1.0, 2.0, -1.0]),
    )
    layer = lambda x: torch.tanh(A @ x)
    f = lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    loss = lambda y: (y**3).sum()
    same(gradlab.ggn_vp(f, loss, x, v), gradlab.ggn_vp(layer, loss, x, v))


def test_auto_takes_the_mode_that_exists():
    C, X = torch.tensor(rng.normal(size=(5, 3))), torch.tensor(rng.normal(size=(2, 3)))
    J = gradlab.jacobian(lambda x: torch.cdist(x, C), X)
    same(J, gradlab.jacobian(lambda x: (x[:, None] - C).norm(dim=-1), X))


def test_a_fused_loss_in_chunks():
    functional_loss = getattr(functional, "linear_cross_entropy", None)
    if functional_loss is None:
        return  # before torch 2.13
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions(batch_chunk_size=2, allow_retain_graph=True)
    x, target = torch.tensor(rng.normal(size=(6, 4))), torch.tensor([0, 1, 3, 2, 1, 0])
    fused = lambda x: functional_loss(x, W, target, options=options)
    written = lambda x: functional.cross_entropy(x @ W.T, target)
    for _ in range(2):
        same(gradlab.hvp(fused, x, x), gradlab.hvp(written, x, x))
        same(gradlab.hessian(fused, x), gradlab.hessian(written, x))
    same(gradlab.ggn_vp(lambda x: fused(x)[None], lambda y: (y**2).sum(), x, x), 2 * _outer(written, x))


def _outer(f, x):
    (g,) = torch.autograd.grad(f(x := x.clone().requires_grad_()), x)
    return g * (g * x.detach()).sum()


def test_operations_without_a_right_forward_mode():
    x, index = torch.tensor(rng.normal(size=6)), torch.tensor([0, 1, 1, 2, 0, 2])
    f = lambda x: torch.zeros(9, dtype=x.dtype).scatter_reduce(0, index, x, "prod", include_self=False)
    written = lambda x: torch.cat([torch.stack([x[0] * x[4], x[1] * x[2], x[3] * x[5]]), x.new_zeros(6)])
    J = torch.func.jacrev(written)(x)
    same(gradlab.jacobian(f, x), J)
    same(gradlab.jacobian(f, x, mode="forward"), J)
    same(gradlab.ggn_vp(f, lambda y: (y**2).sum() / 2, x, x), J.T @ (J @ x))
    A = torch.tensor(rng.normal(size=(4, 3)))
    tau = torch.tensor(rng.normal(size=3))
    for strategy in ("forward_over_reverse", "reverse_over_forward"):
        with pytest.raises(gradlab.StrategyError, match="use 'reverse_over_reverse'"):
            gradlab.hvp(
                lambda A: (torch.linalg.householder_product(A, tau) ** 3).sum(), A, A, strategy=strategy
            )


def test_a_rule_that_refuses_a_second_derivative_is_not_taken_for_a_constant():
    torch = pytest.importorskip("torch")

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, u):
            return 3 * ctx.saved_tensors[0] ** 2 * u

    f = lambda x: Cube.apply(x).sum()
    x = torch.ones(2)
    assert gradlab.jacobian(f, x).tolist() == [3, 3]
    with pytest.raises(gradlab.StrategyError, match="Cube, whose backward is marked once_differentiable"):
        gradlab.hvp(f, x, x)
