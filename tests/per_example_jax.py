"""Models whose parameters meet every kind of use, in jax: name -> (loss, params, batch, options)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox import nn

from gradlab.jax import functional

rng = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(rng.normal(size=shape))


def model(module, *inputs, call=None, keep=False, **options):
    """A squared loss of what `call` makes of a module and an example, sines as targets."""
    module = jax.tree.map(lambda a: draw(*a.shape) / 2 if eqx.is_inexact_array(a) else a, module)
    apply, params = functional(Called(module, call or (lambda m, *x: m(*x))))

    def loss(params, *example):
        y = apply(params, *example)
        return ((y - jnp.sin(jnp.arange(y.size).reshape(y.shape))) ** 2).mean()

    return loss, params, inputs, {"keep_batch_axis": keep, **options}


class Called(eqx.Module):
    module: eqx.Module
    call: object = eqx.field(static=True)

    def __call__(self, *x):
        return self.call(self.module, *x)


def modules():
    """equinox.nn as it stands."""
    k, N = jax.random.key(0), 5
    tokens = jnp.asarray(rng.integers(0, 7, (N, 4)))
    lin = lambda n, m, **o: nn.Linear(n, m, key=k, **o)
    yield "mlp", model(nn.MLP(3, 2, 4, 2, key=k), draw(N, 3))
    over = lambda f: lambda m, x: jax.vmap(lambda r: f(m, r))(x)
    yield (
        "linear over time",
        model((lin(3, 4), lin(4, 2)), draw(N, 6, 3), call=over(lambda m, x: m[1](jnp.tanh(m[0](x))))),
    )
    yield "scalar output", model(lin(3, "scalar"), draw(N, 3))
    yield "conv", model(nn.Conv2d(2, 4, 3, stride=2, padding=1, key=k), draw(N, 2, 7, 6))
    yield (
        "conv over a batch axis",
        model(nn.Conv2d(2, 4, 3, key=k), draw(N, 2, 7, 6), call=lambda m, x: jax.vmap(m)(x), keep=True),
    )
    yield "conv1d, groups, dilation", model(nn.Conv1d(4, 6, 3, groups=2, dilation=2, key=k), draw(N, 4, 9))
    yield "conv3d", model(nn.Conv3d(2, 2, 2, stride=(1, 2, 1), key=k), draw(N, 2, 3, 4, 3))
    yield "conv, same", model(nn.Conv1d(1, 2, 4, padding="SAME", key=k), draw(N, 1, 6))
    yield (
        "conv, circular",
        model(nn.Conv1d(1, 2, 3, padding=1, padding_mode="CIRCULAR", key=k), draw(N, 1, 6)),
    )
    yield "conv, depthwise", model(nn.Conv2d(3, 6, 2, groups=3, use_bias=False, key=k), draw(N, 3, 4, 4))
    yield "conv, wide", model(nn.Conv1d(1, 2, 2, key=k), draw(N, 1, 30))
    yield "transposed conv", model(nn.ConvTranspose1d(2, 3, 2, stride=2, key=k), draw(N, 2, 4))
    embedded = lambda m, i: jax.vmap(m[1])(jax.vmap(m[0])(i))
    yield "embedding", model((nn.Embedding(7, 3, key=k), lin(3, 2)), tokens, call=embedded)
    yield "one row", model(nn.Embedding(7, 3, key=k), tokens[:, 0])
    rows = lambda m, i: jnp.tanh(jax.vmap(m[1])(m[0].weight[i]))
    yield (
        "tied",
        model((nn.Embedding(7, 3, key=k), lin(3, 3)), tokens, call=lambda m, i: rows(m, i) @ m[0].weight.T),
    )
    shared = lambda m, x: m(jnp.tanh(m(jnp.tanh(m(x)))))
    yield "shared", model(lin(3, 3), draw(N, 3), call=shared)
    yield "shared over time", model(lin(3, 3), draw(N, 2, 3), call=over(shared))
    yield (
        "shared layer",
        model(
            nn.Shared(
                (nn.Embedding(7, 3, key=k), nn.Linear(3, 7, key=k)),
                lambda p: p[1].weight,
                lambda p: p[0].weight,
            ),
            tokens,
            call=lambda m, i: jax.vmap(m()[1])(jax.vmap(m()[0])(i)),
        ),
    )
    yield (
        "layer norm",
        model((nn.LayerNorm(4), lin(4, 2)), draw(N, 3, 4), call=over(lambda m, x: m[1](m[0](x)))),
    )
    yield "rms norm", model((nn.RMSNorm(4), lin(4, 2)), draw(N, 3, 4), call=over(lambda m, x: m[1](m[0](x))))
    yield "group norm", model(nn.GroupNorm(2, 4), draw(N, 4, 3))
    attention = nn.MultiheadAttention(2, 4, key=k, use_query_bias=True, use_output_bias=True)
    yield "attention", model(attention, draw(N, 3, 4), call=lambda m, x: m(x, x, x))
    yield (
        "cells",
        model(
            (nn.LSTMCell(3, 4, key=k), nn.GRUCell(3, 4, key=k)),
            draw(N, 2, 3),
            call=lambda m, x: m[1](x[1], m[0](x[0], (jnp.zeros(4), jnp.zeros(4)))[0]),
        ),
    )

    def scanned(m, x):
        return jax.lax.scan(lambda h, r: (m(r, h), None), jnp.zeros(4), x)[0]

    yield "recurrent scan", model(nn.GRUCell(3, 4, key=k), draw(N, 5, 3), call=scanned)
    layers = eqx.filter_vmap(lambda k: nn.Linear(3, 3, key=k))(jax.random.split(k, 4))

    def deep(m, x):
        arrays, rest = eqx.partition(m, eqx.is_array)
        return jax.lax.scan(lambda h, a: (jnp.tanh(eqx.combine(a, rest)(h)), None), x, arrays)[0]

    yield "scan over layers", model(layers, draw(N, 3), call=deep)
    yield "ensemble", model(layers, draw(N, 3), call=lambda m, x: eqx.filter_vmap(lambda m: m(x))(m))
    yield "weight norm", model(nn.WeightNorm(lin(3, 4)), draw(N, 3))
    yield (
        "checkpointed",
        model(
            (lin(3, 4), lin(4, 2)),
            draw(N, 3),
            call=lambda m, x: m[1](jax.checkpoint(lambda m, x: jnp.tanh(m(x)))(m[0], x)),
        ),
    )
    yield (
        "jitted",
        model(
            (lin(3, 4), lin(4, 2)),
            draw(N, 3),
            call=lambda m, x: m[1](eqx.filter_jit(lambda m, x: jnp.tanh(m(x)))(m[0], x)),
        ),
    )


@jax.custom_vjp
def twice_in_reverse(w, x):
    return w @ x


twice_in_reverse.defvjp(lambda w, x: (w @ x, (w, x)), lambda r, u: (2 * jnp.outer(u, r[1]), r[0].T @ u))


@jax.custom_jvp
def thrice(w, x):
    return w @ x


@thrice.defjvp
def _(primals, tangents):
    (w, x), (tw, tx) = primals, tangents
    return w @ x, 3 * (tw @ x) + w @ tx


def functions():
    """Losses of parameters in dicts, that do odd things with them."""
    N = 5
    x, X = draw(N, 3), draw(N, 4, 3)
    W, V = draw(2, 3), draw(3, 2)
    sq = lambda y: (jnp.sin(y) ** 2).sum()
    mask = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    stop = jax.lax.stop_gradient
    numbers = jnp.asarray(rng.integers(-5, 5, (N, 4)))

    def penalty(p, x):
        f = lambda x: sq(jnp.tanh(x @ p["V"]))
        return f(x) + (jax.grad(f)(x) ** 2).sum()

    yield "matmul", (lambda p, x: sq(x @ p["V"]), {"V": V}, (X,), {})
    yield "matmul from the left", (lambda p, x: sq(p["W"] @ x.T), {"W": W}, (X,), {})
    yield "matrix vector", (lambda p, x: sq(p["W"] @ x), {"W": W}, (x,), {})
    yield "vector", (lambda p, x: sq(x @ p["w"]), {"w": draw(3)}, (X,), {})
    yield "scalar", (lambda p, x: sq(x * p["s"]), {"s": draw()}, (X,), {})
    yield "einsum", (lambda p, x: sq(jnp.einsum("tq,hqk->htk", x, p["K"])), {"K": draw(2, 3, 2)}, (X,), {})
    yield (
        "einsum of groups",
        (lambda p, x: sq(jnp.einsum("gq,gqk->gk", x, p["K"])), {"K": draw(4, 3, 2)}, (X,), {}),
    )
    yield (
        "einsum of groups from the left",
        (
            lambda p, x: sq(jnp.einsum("gqk,tgq->gtk", p["K"], x)),
            {"K": draw(4, 3, 2)},
            (draw(N, 2, 4, 3),),
            {},
        ),
    )
    yield (
        "two axes contracted",
        (
            lambda p, x: sq(jnp.einsum("tqr,qkr->kt", x, p["K"])),
            {"K": draw(2, 3, 2)},
            (draw(N, 4, 2, 2),),
            {},
        ),
    )
    yield "masked weights", (lambda p, x: sq(x @ (p["W"] * mask).T), {"W": W}, (X,), {})
    yield "decay", (lambda p, x: sq(x @ p["V"]) + (p["V"] ** 2).sum(), {"V": V}, (X,), {})
    yield "stopped", (lambda p, x: sq(x @ stop(p["W"]).T + x @ p["V"]), {"W": W, "V": V}, (X,), {})
    yield "stopped in part", (lambda p, x: sq(x @ (p["V"] + stop(p["V"]))), {"V": V}, (X,), {})
    yield "transposed twice", (lambda p, x: sq(x @ p["W"].T.T.T + x @ p["W"].T), {"W": W}, (X,), {})
    yield "reshaped", (lambda p, x: sq(x @ p["v"].reshape(3, 2)), {"v": draw(6)}, (X,), {})
    yield (
        "reshaped two ways",
        (
            lambda p, x: sq(x @ p["v"].reshape(3, 2)) + sq(x @ p["v"].reshape(2, 3).T),
            {"v": draw(6)},
            (X,),
            {},
        ),
    )
    yield "sliced", (lambda p, x: sq(x @ p["V"][:, :1] + x @ p["V"][:, 1:] ** 2), {"V": V}, (X,), {})
    yield "two weights", (lambda p, x: sq(x @ (p["V"] @ p["W"])), {"V": V, "W": W}, (X,), {})
    yield "itself", (lambda p, x: sq(p["W"] @ p["W"].T) * x.sum(), {"W": W}, (X,), {})
    yield "cast", (lambda p, x: sq(x @ p["f"].astype(float)), {"f": V.astype(jnp.float32)}, (X,), {})
    yield "constant input", (lambda p, x: sq(jnp.ones((2, 3)) @ p["V"] * x.sum()), {"V": V}, (X,), {})
    yield "rows by number", (lambda p, i: sq(p["E"][i] @ p["V"]), {"E": draw(5, 3), "V": V}, (numbers,), {})
    yield (
        "rows taken, some missing",
        (
            lambda p, i: sq(jnp.nan_to_num(jnp.take(p["E"], i + 3, 0, mode="fill"))),
            {"E": draw(5, 3)},
            (numbers,),
            {},
        ),
    )
    yield (
        "rows taken, clipped",
        (lambda p, i: sq(jnp.take(p["E"], i + 3, 0, mode="clip")), {"E": draw(5, 3)}, (numbers,), {}),
    )
    yield "columns by number", (lambda p, i: sq(p["E"][:, i]), {"E": draw(3, 5)}, (numbers,), {})
    yield "columns of the transpose", (lambda p, i: sq(p["E"].T[i]), {"E": draw(3, 5)}, (numbers,), {})
    yield "entries by number", (lambda p, i: sq(p["w"][i]), {"w": draw(5)}, (numbers,), {})
    yield "no rows", (lambda p, i: sq(p["E"][i]) + sq(p["E"][:1]), {"E": draw(5, 3)}, (numbers[:, :0],), {})
    yield "no time", (lambda p, x: sq(x @ p["V"]) + sq(p["V"]), {"V": V}, (X[:, :0],), {})
    yield "custom_vjp", (lambda p, x: sq(twice_in_reverse(p["W"], x)), {"W": W}, (x,), {})
    yield "custom_jvp", (lambda p, x: sq(thrice(p["W"], x)), {"W": W}, (x,), {})
    yield (
        "branches",
        (
            lambda p, x: sq(jax.lax.cond(x[0] > 0, lambda w: w @ x, lambda w: 2 * w @ x, p["W"])),
            {"W": W},
            (x,),
            {},
        ),
    )
    yield "gradient penalty", (penalty, {"V": V}, (X,), {})
    yield (
        "tangent",
        (lambda p, x: sq(jax.jvp(lambda x: jnp.tanh(x @ p["V"]), (x,), (x,))[1]), {"V": V}, (X,), {}),
    )
    yield "mixed rows", (lambda p, x: sq((x @ p["V"]) @ (x @ p["V"]).T), {"V": V}, (X,), {})
    yield "dead", (lambda p, x: sq(x @ p["V"]), {"V": V, "unused": W}, (X,), {})
    yield (
        "constants",
        (
            lambda p, x, t, scale: sq(x @ p["V"]) * scale * t["t"] + p["n"],
            {"V": V, "n": 3, "none": None, "i": jnp.arange(3), "f": jnp.tanh},
            (X, {"t": draw(N)}, 0.5),
            {},
        ),
    )
    yield (
        "keys",
        (
            lambda p, x, key: sq((x * jax.random.bernoulli(key, 0.5, x.shape)) @ p["V"]),
            {"V": V},
            (X, jax.random.split(jax.random.key(1), N)),
            {},
        ),
    )
    yield "normalised", (lambda p, x: sq(x @ (p["V"] / jnp.sqrt((p["V"] ** 2).sum(0)))), {"V": V}, (X,), {})
    yield "nothing of the parameters", (lambda p, x: sq(x), {"V": V}, (X,), {})
    yield "the parameter itself", (lambda p, x: p, draw(), (x,), {})


def cases():
    """All of them, from one seed."""
    global rng
    rng = np.random.default_rng(0)
    return {**dict(modules()), **dict(functions())}
