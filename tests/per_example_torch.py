"""Models whose parameters meet every kind of use, in torch: name -> (loss, params, batch, options)."""

import torch
from torch import nn
from torch.nn import functional as F

from gradlab.torch import functional


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def model(module, *inputs, keep=False, **options):
    """A squared loss of a module's output (its first, if it has several), sines of it as targets."""
    module = module.double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    apply, params = functional(module)

    def loss(params, *example):
        y = apply(params, *example)
        y = y[0] if isinstance(y, tuple) else y
        return ((y - torch.sin(torch.arange(y.numel()).reshape(y.shape))) ** 2).mean()

    return loss, params, inputs, {"keep_batch_axis": keep, **options}


class Of(nn.Module):
    """A module from modules and a function of them and of the input."""

    def __init__(self, f, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.f = f

    def forward(self, *x):
        return self.f(self, *x)


def tied(m, i):
    h = torch.tanh(m.mix(m.embed(i)))
    return F.linear(h, m.embed.weight)


def tied_by_transpose(m, i):
    return torch.tanh(m.mix(m.embed(i))) @ m.embed.weight.T


def modules():
    """torch.nn as it stands."""
    lin = nn.Linear
    N, tokens = 5, torch.randint(0, 7, (5, 4))
    yield "mlp", model(nn.Sequential(lin(3, 4), nn.Tanh(), lin(4, 2)), draw(N, 3))
    yield "linear over time", model(nn.Sequential(lin(3, 4), nn.GELU(), lin(4, 2)), draw(N, 6, 3))
    conv = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 2))
    yield "conv", model(conv, draw(N, 2, 7, 6))
    yield "conv with a batch axis", model(conv, draw(N, 2, 7, 6), keep=True)
    yield "conv1d, groups, dilation", model(nn.Conv1d(4, 6, 3, groups=2, dilation=2), draw(N, 4, 9))
    yield "conv3d", model(nn.Conv3d(2, 2, 2, stride=(1, 2, 1)), draw(N, 2, 3, 4, 3))
    yield "conv, same", model(nn.Conv2d(1, 2, 3, padding="same"), draw(N, 1, 4, 5))
    yield "conv, same, even", model(nn.Conv1d(1, 2, 4, padding="same"), draw(N, 1, 6))
    yield "conv, circular", model(nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular"), draw(N, 1, 6))
    yield "conv, depthwise", model(nn.Conv2d(3, 6, 2, groups=3, bias=False), draw(N, 3, 4, 4))
    yield "conv, wide", model(nn.Conv1d(1, 2, 2), draw(N, 1, 30))
    yield "transposed conv", model(nn.ConvTranspose1d(2, 3, 2), draw(N, 2, 4))
    yield (
        "embedding",
        model(Of(lambda m, i: m.out(m.embed(i)), embed=nn.Embedding(7, 3), out=lin(3, 2)), tokens),
    )
    yield "padded", model(nn.Embedding(7, 3, padding_idx=2), tokens)
    yield "scaled by frequency", model(nn.Embedding(7, 3, scale_grad_by_freq=True), tokens[:, :2])
    yield "tied", model(Of(tied, embed=nn.Embedding(7, 3), mix=lin(3, 3)), tokens)
    yield "tied and padded", model(Of(tied, embed=nn.Embedding(7, 3, padding_idx=1), mix=lin(3, 3)), tokens)
    yield "tied by transpose", model(Of(tied_by_transpose, embed=nn.Embedding(7, 3), mix=lin(3, 3)), tokens)
    shared = Of(lambda m, x: m.a(torch.tanh(m.a(torch.tanh(m.a(x))))), a=lin(3, 3))
    yield "shared", model(shared, draw(N, 3))
    yield "shared over time", model(shared, draw(N, 2, 3))
    yield "bilinear", model(nn.Bilinear(3, 2, 2), draw(N, 3), draw(N, 2))
    for name, norm in (
        ("layer norm", nn.LayerNorm(4)),
        ("rms norm", nn.RMSNorm(4)),
        ("layer norm of two axes", nn.LayerNorm((3, 4))),
    ):
        yield name, model(nn.Sequential(norm, lin(4, 2)), draw(N, 3, 4))
    yield "group norm", model(nn.GroupNorm(2, 4), draw(N, 4, 3), keep=True)
    yield "instance norm", model(nn.InstanceNorm1d(4, affine=True), draw(N, 4, 3), keep=True)
    batch_norm = Of(lambda m, x: m.n(m.c(x)), c=nn.Conv1d(2, 4, 2), n=nn.BatchNorm1d(4)).eval()
    yield "batch norm, evaluation", model(batch_norm, draw(N, 2, 3), keep=True)
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    yield "attention", model(Of(lambda m, x: m.a(x, x, x), a=attention), draw(N, 3, 4), keep=True)
    yield (
        "cross attention",
        model(Of(lambda m, x, y: m.a(x, y, y), a=attention), draw(N, 3, 4), draw(N, 2, 4)),
    )
    uneven = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True, add_bias_kv=True)
    yield "uneven attention", model(uneven, draw(N, 3, 4), draw(N, 2, 3), draw(N, 2, 2))
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    yield "transformer layer", model(layer, draw(N, 3, 4), keep=True)
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        yield kind.__name__, model(kind(3, 4, batch_first=True), draw(N, 5, 3), keep=True)
    yield "deep LSTM, both ways", model(nn.LSTM(3, 2, 2, bidirectional=True), draw(N, 4, 3))
    yield "LSTM with a projection", model(nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True), draw(N, 4, 3))
    yield "GRU without bias", model(nn.GRU(3, 2, bias=False), draw(N, 4, 3))
    cell = Of(lambda m, x: m.b(x[1], m.a(x[0])[0]), a=nn.LSTMCell(3, 4), b=nn.GRUCell(3, 4))
    yield "cells", model(cell, draw(N, 2, 3))
    normed = nn.utils.parametrizations.weight_norm(lin(3, 4))
    yield "weight norm", model(nn.Sequential(normed, nn.Tanh(), lin(4, 2)), draw(N, 3))


def functions():
    """Losses of parameters in dicts, that do odd things with them."""
    N = 5
    x, X = draw(N, 3), draw(N, 4, 3)
    W, V, b = draw(2, 3), draw(3, 2), draw(2)
    sq = lambda y: (torch.sin(y) ** 2).sum()
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)

    def no_grad_view(p, x):
        with torch.no_grad():
            v = p["W"].T
        return sq(x @ v + x @ p["V"])

    def in_place(p, x):
        y = F.linear(x, p["W"])
        y += p["b"]
        y.mul_(2)
        return sq(y)

    def penalty(p, x):
        f = lambda x: sq(torch.tanh(x @ p["V"]))
        return f(x) + (torch.func.grad(f)(x) ** 2).sum()

    def tangent(p, x):
        f = lambda x: sq(torch.tanh(x @ p["V"]))
        return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1] ** 2

    def outer_product(p, x):  # an operation that mixes the rows of one example
        h = x @ p["V"]
        return sq(h @ h.T + h.mean(0) @ h.T)

    yield "matmul", (lambda p, x: sq(x @ p["V"]), {"V": V}, (X,), {})
    yield "matmul from the left", (lambda p, x: sq(p["W"] @ x.T), {"W": W}, (X,), {})
    yield "matrix vector", (lambda p, x: sq(p["W"] @ x) + sq(torch.mv(p["W"], x)), {"W": W}, (x,), {})
    yield "vector", (lambda p, x: sq(x @ p["w"]), {"w": draw(3)}, (X,), {})
    yield "scalar", (lambda p, x: sq(x * p["s"]), {"s": draw()}, (X,), {})
    yield "one number", (lambda p, x: p**2 * x, draw(), (draw(N),), {})
    yield "addmm", (lambda p, x: sq(torch.addmm(p["b"], x, p["V"])), {"V": V, "b": b}, (X,), {})
    yield "einsum", (lambda p, x: sq(torch.einsum("tq,hqk->htk", x, p["K"])), {"K": draw(2, 3, 2)}, (X,), {})
    yield (
        "einsum of groups",
        (lambda p, x: sq(torch.einsum("gq,gqk->gk", x, p["K"])), {"K": draw(4, 3, 2)}, (X,), {}),
    )
    yield "bmm", (lambda p, x: sq(torch.bmm(x, p["K"])), {"K": draw(4, 3, 2)}, (draw(N, 4, 2, 3),), {})
    yield "stacks from the left", (lambda p, x: sq(p["K"] @ x), {"K": draw(4, 2, 3)}, (draw(N, 4, 3, 2),), {})
    yield "broadcast stack", (lambda p, x: sq(x @ p["K"]), {"K": draw(4, 3, 2)}, (draw(N, 2, 3),), {})
    yield "masked weights", (lambda p, x: sq(F.linear(x, p["W"] * mask)), {"W": W}, (X,), {})
    yield "decay", (lambda p, x: sq(F.linear(x, p["W"])) + (p["W"] ** 2).sum(), {"W": W}, (X,), {})
    yield "stopped", (lambda p, x: sq(x @ p["W"].detach().T + x @ p["V"]), {"W": W, "V": V}, (X,), {})
    yield "stopped in part", (lambda p, x: sq(x @ (p["V"] + p["V"].detach())), {"V": V}, (X,), {})
    yield "no grad", (no_grad_view, {"W": W, "V": V}, (X,), {})
    yield "in place", (in_place, {"W": W, "b": b}, (X,), {})
    yield "transposed twice", (lambda p, x: sq(F.linear(x, p["W"].t().mT) + x @ p["W"].T), {"W": W}, (X,), {})
    yield "reshaped", (lambda p, x: sq(x @ p["v"].view(3, 2)), {"v": draw(6)}, (X,), {})
    yield (
        "reshaped two ways",
        (
            lambda p, x: sq(x @ p["v"].view(3, 2)) + sq(F.linear(x, p["v"].reshape(2, 3))),
            {"v": draw(6)},
            (X,),
            {},
        ),
    )
    yield "sliced", (lambda p, x: sq(x @ p["V"][:, :1] + x @ p["V"][:, 1:] ** 2), {"V": V}, (X,), {})
    yield "two weights", (lambda p, x: sq(x @ (p["V"] @ p["W"])), {"V": V, "W": W}, (X,), {})
    yield "itself", (lambda p, x: sq(p["W"] @ p["W"].T) * x.sum(), {"W": W}, (X,), {})
    yield "cast", (lambda p, x: sq(x @ p["f"].double()), {"f": V.float()}, (X,), {})
    yield (
        "constant input",
        (lambda p, x: sq(torch.ones(2, 3).double() @ p["V"] * x.sum()), {"V": V}, (X,), {}),
    )
    yield (
        "rows by number",
        (
            lambda p, i: sq(p["E"][i] @ p["V"]),
            {"E": draw(5, 3), "V": V},
            (torch.randint(-5, 5, (N, 4)),),
            {},
        ),
    )
    yield "columns by number", (lambda p, i: sq(p["V"].T[i]), {"V": V}, (torch.randint(0, 2, (N, 4)),), {})
    yield (
        "einsum in capitals",
        (lambda p, x: sq(torch.einsum("NI,Ia->Na", x, p["V"])), {"V": V}, (X,), {}),
    )
    none = torch.zeros(N, 0, dtype=torch.int64)
    yield "no rows", (lambda p, i: sq(p["E"][i]) + sq(p["E"][:1]), {"E": draw(5, 3)}, (none,), {})
    yield "no time", (lambda p, x: sq(x @ p["V"]) + sq(p["V"]), {"V": V}, (X[:, :0],), {})
    yield (
        "no images",
        (lambda p, x: sq(F.conv1d(x, p["K"])) + sq(p["K"]), {"K": draw(2, 3, 2)}, (draw(N, 0, 3, 5),), {}),
    )
    yield "mapped rows", (lambda p, x: sq(torch.func.vmap(lambda r: p["W"] @ r)(x)), {"W": W}, (X,), {})
    yield (
        "mapped weights",
        (lambda p, x: sq(torch.func.vmap(lambda w, r: w @ r)(p["K"], x)), {"K": draw(4, 2, 3)}, (X,), {}),
    )
    yield (
        "mapped twice",
        (
            lambda p, x: sq(
                torch.func.vmap(torch.func.vmap(lambda r: F.linear(r, p["W"], p["b"])), in_dims=1)(x)
            ),
            {"W": W, "b": b},
            (draw(N, 2, 4, 3),),
            {},
        ),
    )
    yield "gradient penalty", (penalty, {"V": V}, (X,), {})
    yield "tangent", (tangent, {"V": V}, (X,), {})
    yield "mixed rows", (outer_product, {"V": V}, (X,), {})
    yield "dead", (lambda p, x: sq(x @ p["V"]), {"V": V, "unused": W}, (X,), {})
    yield (
        "constants",
        (
            lambda p, x, t, scale: sq(x @ p["V"]) * scale * t["t"] + p["n"],
            {"V": V, "n": 3, "none": None, "i": torch.arange(3)},
            (X, {"t": draw(N)}, 0.5),
            {},
        ),
    )
    yield "nothing of the parameters", (lambda p, x: sq(x), {"V": V}, (X.requires_grad_(False),), {})


def cases():
    """All of them, from one seed."""
    torch.manual_seed(0)
    return {**dict(modules()), **dict(functions())}
