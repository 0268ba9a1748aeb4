"""Compiled torch: every form of calling is right, on a transformer whose hand-compiled jvp(grad) is wrong."""

import shutil

import pytest

import gradlab

torch = pytest.importorskip("torch")
functional = torch.nn.functional
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU"
)


def transformer(d=16, heads=2, vocabulary=11, length=6, batch=3):
    """A pre-norm decoder block with fused attention and layer norms: loss, params, batch."""
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw) / shape[0] ** 0.5
    params = {
        "embed": normal(vocabulary, d), "qkv": normal(d, 3 * d), "out": normal(d, d), "up": normal(d, 4 * d),
        "down": normal(4 * d, d), "scale": torch.ones(d), "head": normal(d, vocabulary),
    }  # fmt: skip
    tokens = torch.randint(0, vocabulary, (batch, length + 1), generator=draw)

    def loss(p, tokens):
        h = functional.embedding(tokens[:, :-1], p["embed"])
        q, k, v = (
            (functional.layer_norm(h, (d,), p["scale"]) @ p["qkv"])
            .view(batch, length, 3, heads, -1)
            .unbind(2)
        )
        mixed = functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True
        )
        h = h + mixed.transpose(1, 2).reshape(batch, length, d) @ p["out"]
        h = h + functional.gelu(functional.layer_norm(h, (d,)) @ p["up"], approximate="tanh") @ p["down"]
        logits = functional.layer_norm(h, (d,)) @ p["head"]
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return loss, params, tokens


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def close(actual, expected):
    for name, leaf in expected.items():
        torch.testing.assert_close(actual[name], leaf, rtol=2e-4, atol=2e-5)


def directions(params, k=None):
    draw = torch.Generator().manual_seed(1)
    lead = () if k is None else (k,)
    return {name: torch.randn(*lead, *p.shape, generator=draw) for name, p in params.items()}


def reference(loss, params, v, tokens):
    """In float64, by double backward of the MATH attention: right in torch (FACTS of the framework)."""
    xs = {name: p.double().requires_grad_() for name, p in params.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        g = torch.autograd.grad(loss(xs, tokens), list(xs.values()), create_graph=True)
    products = torch.autograd.grad(g, list(xs.values()), [t.double() for t in v.values()])
    return {name: t.float() for name, t in zip(params, products, strict=True)}


def test_eager_transformer():
    loss, params, tokens = transformer()
    v = directions(params)
    close(gradlab.hvp(loss, params, v, tokens), reference(loss, params, v, tokens))


@needs_compiler
@pytest.mark.parametrize("call", [gradlab.hvp, None], ids=["façade", "namespace"])
def test_inductor_hvp(call):
    import gradlab.torch

    loss, params, tokens = transformer()
    v = directions(params)
    op = call or gradlab.torch.hvp
    compiled = torch.compile(lambda p, v, tokens: op(loss, p, v, tokens), fullgraph=True)
    close(compiled(params, v, tokens), reference(loss, params, v, tokens))


@needs_compiler
def test_inductor_many_directions():
    loss, params, tokens = transformer()
    V = directions(params, k=3)
    compiled = torch.compile(
        lambda p, V, tokens: gradlab.hessian_operator(loss, p, tokens).matmat(V), fullgraph=True
    )
    products = compiled(params, V, tokens)
    for i in range(3):
        v = {name: t[i] for name, t in V.items()}
        close({name: t[i] for name, t in products.items()}, reference(loss, params, v, tokens))


@needs_compiler
def test_inductor_gauss_newton_and_jacobian():
    W, x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(4)
    model = lambda x: torch.tanh(W @ x)
    outer = lambda y: (y**2).sum() / 2
    compiled = torch.compile(lambda x: gradlab.ggn_vp(model, outer, x, x), fullgraph=True)
    torch.testing.assert_close(compiled(x), gradlab.ggn_vp(model, outer, x, x))
    for mode in ("forward", "reverse"):
        compiled = torch.compile(lambda x, mode=mode: gradlab.jacobian(model, x, mode=mode), fullgraph=True)
        torch.testing.assert_close(compiled(x), gradlab.jacobian(model, x))


def test_named_forward_strategies_are_refused_when_compiled():
    compiled = torch.compile(
        lambda x: gradlab.hvp(lambda x: (x**3).sum(), x, x, strategy="forward_over_reverse"),
        backend="aot_eager",
        fullgraph=True,
    )
    with pytest.raises(Exception, match="use 'reverse_over_reverse'"):
        compiled(torch.ones(2))


def test_third_order_through_a_norm_compiled():
    """Forward over a compiled Hessian-vector product of a layer norm: the repaired form is what is traced."""
    W = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f = lambda x: (functional.layer_norm(x, (4,)) ** 3 * W).sum()
    x, v = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    third = lambda x: torch.func.jvp(lambda x: gradlab.hvp(f, x, v), (x,), (v,))[1]
    torch.testing.assert_close(torch.compile(third, backend="aot_eager", fullgraph=True)(x), third(x))


def test_a_cold_process_compiles_the_facade():
    """The façade imports an implementation at its first call: torch.compile of a cold one still works."""
    import subprocess
    import sys

    code = (
        "import torch, gradlab\n"
        "f = torch.compile(lambda x: gradlab.hvp(lambda x: (x**3).sum(), x, x),"
        " backend='aot_eager', fullgraph=True)\n"
        "print(f(torch.ones(2)).tolist())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[6.0, 6.0]", result.stderr
