"""Losses over real models are one line: torch.nn and equinox modules through `functional`."""

import numpy as np
import pytest

import gradlab
import gradlab.check
from frameworks import flat

rng = np.random.default_rng(0)
X = rng.normal(size=(5, 3))
TARGET = rng.normal(size=(5, 2))


def torch_model():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Tanh(), torch.nn.Linear(4, 2)]
    model = torch.nn.Sequential(*layers).double()
    mean_squares = lambda y: ((y - torch.tensor(TARGET)) ** 2).mean()
    return model, torch.tensor(X), mean_squares


def jax_model():
    jax, eqx = pytest.importorskip("jax"), pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0), dtype="float64")
    return model, jax.numpy.asarray(X), lambda y: ((y - TARGET) ** 2).mean()


def problem(fw):
    """(loss of the parameters, model's output of the parameters, loss of the output, parameters)."""
    model, x, outer = torch_model() if fw.name == "torch" else jax_model()
    apply, params = gradlab.functional(model)
    output = (lambda p: apply(p, x)) if fw.name == "torch" else (lambda p: fw.vmap(lambda x: apply(p, x))(x))
    assert np.array_equal(
        fw.numpy(output(params)), fw.numpy(model(x) if fw.name == "torch" else fw.vmap(model)(x))
    )
    return (lambda p: outer(output(p))), output, outer, params


def direction(fw, params, seed=0):
    draw = np.random.default_rng(seed)
    return fw.map(lambda p: fw.array(draw.normal(size=p.shape)) if hasattr(p, "shape") else p, params)


def entries(fw, tree):
    if fw.name == "jax":
        import jax

        return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])
    return flat(fw, tree)


def test_every_operation_on_a_real_model(fw):
    loss, output, outer, params = problem(fw)
    v = direction(fw, params)
    H = fw.numpy(gradlab.hessian_operator(loss, params).dense())
    np.testing.assert_allclose(H, H.T, atol=1e-12)
    product = gradlab.hvp(loss, params, v)
    assert type(product) is type(params)
    np.testing.assert_allclose(entries(fw, product), H @ entries(fw, v), rtol=1e-10, atol=1e-12)
    diagonal = gradlab.hessian_diagonal(loss, params, chunk_size=7)
    np.testing.assert_allclose(entries(fw, diagonal), np.diag(H), rtol=1e-10, atol=1e-12)
    J = fw.numpy(gradlab.jacobian_operator(output, params).dense())
    G = J.T @ (2 / TARGET.size * J)
    np.testing.assert_allclose(
        entries(fw, gradlab.ggn_vp(output, outer, params, v)), G @ entries(fw, v), rtol=1e-10, atol=1e-12
    )


def test_against_differences(fw):
    loss, output, _, params = problem(fw)
    report = gradlab.check.derivatives(loss, params)
    gradlab.check.derivatives(output, params, order=1).raise_if_failed()
    failed = {row.claim for row in report.rows if row.status == "failed"}
    # torch's own layer norm loses a term there, which the row says
    assert failed == (set() if fw.name == "jax" else {"forward over forward", "reverse over forward"})
    assert all(
        "layer_norm differentiated by primitives is right" in report[claim].message for claim in failed
    )


def test_an_equinox_module_is_a_point():
    """The module itself, with functions and integers among its leaves, as x."""
    jax, eqx = pytest.importorskip("jax"), pytest.importorskip("equinox")
    model, x, outer = jax_model()
    loss = lambda model: outer(jax.vmap(model)(x))
    product = gradlab.hvp(loss, model, eqx.filter(model, eqx.is_inexact_array))
    assert product.activation is None
    assert product.depth == model.depth
    H = gradlab.hessian(loss, model)
    block = H.layers[0].weight.layers[0].bias
    assert block.shape == (4, 3, 4)
    with pytest.raises(gradlab.InputError, match=r"v.layers\[0\].weight has shape \(3, 4\)"):
        gradlab.hvp(loss, model, eqx.tree_at(lambda m: m.layers[0].weight, model, model.layers[0].weight.T))


def test_a_torch_module_closed_over_stays_attached():
    """An input Hessian of a model in training: the result's gradient reaches the model's parameters."""
    torch = pytest.importorskip("torch")
    model, x, _ = torch_model()
    f = lambda x: model(x).sum()
    product = gradlab.hvp(f, x, torch.ones_like(x))
    (gradient,) = torch.autograd.grad(product.square().sum(), model[0].weight)

    def by_parameter(weight):
        held = {**dict(model.named_parameters()), "0.weight": weight}
        f = lambda x: torch.func.functional_call(model, held, (x,)).sum()
        return torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),))[1].square().sum()

    weight, step = model[0].weight.detach(), 1e-5
    for index in [(0, 0), (3, 2)]:
        bump = torch.zeros_like(weight)
        bump[index] = step
        difference = (by_parameter(weight + bump) - by_parameter(weight - bump)) / (2 * step)
        assert abs(difference - gradient[index]) < 1e-6 * gradient.abs().max()


def test_what_a_loss_closes_over_stays_attached():
    """The gradient of G v by a weight inside the loss: G = Jᵀ (∇² loss) J with ∇² loss = w I."""
    torch = pytest.importorskip("torch")
    A, x, v = torch.randn(3, 4), torch.randn(4), torch.randn(4)
    w = torch.tensor(2.0, requires_grad=True)
    for product in (
        gradlab.ggn_vp(lambda x: A @ x, lambda y: w * (y**2).sum() / 2, x, v),
        gradlab.ggn_operator(lambda x: A @ x, lambda y: w * (y**2).sum() / 2, x) @ v,
    ):
        torch.testing.assert_close(product, 2 * A.T @ (A @ v))
        (slope,) = torch.autograd.grad(product.sum(), w)
        torch.testing.assert_close(slope, (A.T @ (A @ v)).sum())


def test_frozen_and_no_grad_results_are_detached():
    torch = pytest.importorskip("torch")
    model, x, _ = torch_model()
    f = lambda x: model(x).sum()
    with torch.no_grad():
        assert not gradlab.hvp(f, x, x).requires_grad
    assert gradlab.hvp(f, x, x).requires_grad
    model.requires_grad_(False)
    assert not gradlab.hvp(f, x, x).requires_grad
    assert gradlab.hvp(f, x.clone().requires_grad_(), x).requires_grad
    assert gradlab.hvp(f, x, x.clone().requires_grad_()).requires_grad


def test_tied_weights_and_training_statistics():
    torch = pytest.importorskip("torch")

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Linear(3, 3, bias=False)
            self.norm = torch.nn.BatchNorm1d(3)
            self.head = torch.nn.Linear(3, 3, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.norm(self.embed(x)))

    model = Tied().double()
    apply, params = gradlab.functional(model)
    assert sorted(params) == ["embed.weight", "norm.bias", "norm.weight"]
    before = model.norm.running_mean.clone()
    loss = lambda p: (apply(p, torch.tensor(X)) ** 3).sum()
    gradlab.check.derivatives(loss, params, modes="reverse").raise_if_failed()
    assert torch.equal(model.norm.running_mean, before)


def test_options_reach_the_model(fw):
    if fw.name == "torch":
        torch = pytest.importorskip("torch")

        class Scaled(torch.nn.Linear):
            def forward(self, x, scale=1.0):
                return scale * super().forward(x)

        model = Scaled(3, 2).double()
    else:
        eqx, jax = pytest.importorskip("equinox"), pytest.importorskip("jax")

        class Scaled(eqx.nn.Linear):
            def __call__(self, x, scale=1.0):
                return scale * super().__call__(x)

        model = Scaled(3, 2, key=jax.random.key(0), dtype="float64")
    apply, params = gradlab.functional(model)
    x = fw.array(X[0])
    np.testing.assert_allclose(fw.numpy(apply(params, x, scale=2.0)), 2 * fw.numpy(apply(params, x)))
