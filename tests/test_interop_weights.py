"""Weights of an equinox and of a torch model: forward equal to rounding, there and back exact."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")
eqx = pytest.importorskip("equinox")
jnp, jnn, nn = jax.numpy, eqx.nn, torch.nn

from gradlab import interop  # noqa: E402
from gradlab._errors import InputError, KindError  # noqa: E402

KEY = jax.random.key(0)
BIASES = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}


class Block(eqx.Module):
    """One block of a transformer, of a sequence."""

    first: jnn.LayerNorm
    mix: jnn.MultiheadAttention
    second: jnn.LayerNorm
    out: jnn.MLP

    def __init__(self, key):
        self.first, self.second = jnn.LayerNorm(8), jnn.LayerNorm(8)
        self.mix = jnn.MultiheadAttention(2, 8, **BIASES, key=key)
        self.out = jnn.MLP(8, 8, 16, 1, activation=jax.nn.gelu, key=key)

    def __call__(self, x):
        h = jax.vmap(self.first)(x)
        x = x + self.mix(h, h, h, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
        return x + jax.vmap(self.out)(jax.vmap(self.second)(x))


class Decoder(eqx.Module):
    """Tokens to logits."""

    embed: jnn.Embedding
    blocks: list
    head: jnn.Linear

    def __init__(self, key):
        self.embed = jnn.Embedding(11, 8, key=key)
        self.blocks = [Block(k) for k in jax.random.split(key, 2)]
        self.head = jnn.Linear(8, 11, use_bias=False, key=key)

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


class TorchBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(approximate="tanh"), nn.Linear(16, 8))

    def forward(self, x):
        h, hidden = self.ln1(x), torch.triu(torch.ones(len(x), len(x), dtype=torch.bool), 1)
        x = x + self.attn(h, h, h, attn_mask=hidden, need_weights=False)[0]
        return x + self.mlp(self.ln2(x))


class TorchDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.h = nn.Embedding(11, 8), nn.ModuleList([TorchBlock(), TorchBlock()])
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, tokens):
        x = self.wte(tokens)
        for block in self.h:
            x = block(x)
        return self.lm_head(x)


def decoder_names(name):
    for ours, theirs in (
        ("embed", "wte"), ("blocks", "h"), ("head", "lm_head"), ("first", "ln1"), ("second", "ln2"), ("mix", "attn"),
        ("out.layers.0", "mlp.0"), ("out.layers.1", "mlp.2"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def conv_nets():
    ours = jnn.Sequential(
        [
            jnn.Conv2d(1, 4, 3, stride=2, padding=1, key=KEY),
            jnn.GroupNorm(2, 4),
            jnn.Lambda(jax.nn.relu),
            jnn.ConvTranspose2d(4, 2, 4, stride=2, padding=1, groups=2, key=KEY),
            jnn.Lambda(jnp.ravel),
            jnn.Linear(128, 3, key=KEY),
        ]
    )
    theirs = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1, groups=2),
        nn.Flatten(0),
        nn.Linear(128, 3),
    )
    unbatched = lambda m, x: m[2:](m[1](m[0](x)[None])[0])
    return ours, theirs, {}, unbatched


MLP_NAMES = {"layers.0": "0", "layers.1": "2", "layers.2": "4"}
draw = np.random.default_rng(0).normal
first = lambda m, *x: m(*x)[0]
square = lambda ours, theirs: (ours, theirs, {}, None)


def mlps():
    relu = nn.ReLU()
    theirs = nn.Sequential(nn.Linear(3, 8), relu, nn.Linear(8, 8), relu, nn.Linear(8, 2))
    return jnn.MLP(3, 2, 8, 2, key=KEY), theirs, {"rename": MLP_NAMES}, None


MODELS = {
    "mlp": (mlps, (draw(size=3),)),
    "conv net": (conv_nets, (draw(size=(1, 8, 8)),)),
    "decoder": (
        lambda: (Decoder(KEY), TorchDecoder(), {"rename": decoder_names}, None),
        (np.array([3, 1, 4, 1, 5]),),
    ),
    "conv1d, groups": (
        lambda: square(jnn.Conv1d(4, 6, 3, groups=2, key=KEY), nn.Conv1d(4, 6, 3, groups=2)),
        (draw(size=(4, 9)),),
    ),
    "transposed conv": (
        lambda: square(jnn.ConvTranspose1d(2, 3, 4, key=KEY), nn.ConvTranspose1d(2, 3, 4)),
        (draw(size=(2, 5)),),
    ),
    "layer norm of two axes": (
        lambda: square(jnn.LayerNorm((3, 4)), nn.LayerNorm((3, 4))),
        (draw(size=(3, 4)),),
    ),
    "rms norm": (
        lambda: square(jnn.RMSNorm(4, use_bias=False, eps=1e-6), nn.RMSNorm(4, eps=1e-6)),
        (draw(size=4),),
    ),
    "GRU cell": (lambda: square(jnn.GRUCell(3, 4, key=KEY), nn.GRUCell(3, 4)), (draw(size=3), draw(size=4))),
    "GRU cell without bias": (
        lambda: square(jnn.GRUCell(3, 4, use_bias=False, key=KEY), nn.GRUCell(3, 4, bias=False)),
        (draw(size=3), draw(size=4)),
    ),
    "LSTM cell": (
        lambda: square(jnn.LSTMCell(3, 4, key=KEY), nn.LSTMCell(3, 4)),
        (draw(size=3), (draw(size=4), draw(size=4))),
    ),
    "attention without bias": (
        lambda: (
            jnn.MultiheadAttention(2, 4, key=KEY),
            nn.MultiheadAttention(4, 2, bias=False),
            {},
            first,
        ),
        (draw(size=(5, 4)),) * 3,
    ),
    "uneven attention": (
        lambda: (
            jnn.MultiheadAttention(
                2, 4, key_size=3, value_size=5, qk_size=2, vo_size=2, output_size=4, **BIASES, key=KEY
            ),
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            {},
            first,
        ),
        (draw(size=(5, 4)), draw(size=(6, 3)), draw(size=(6, 5))),
    ),
    "one slope": (lambda: square(jnn.PReLU(), nn.PReLU()), (draw(size=4),)),
}


QUICK = ("mlp", "conv net", "decoder", "GRU cell")


def outputs(y):
    return y if isinstance(y, tuple) else (y,)


def arrays(model):
    return jax.tree.leaves(eqx.filter(model, eqx.is_array))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MODELS]
)
def test_the_same_function(name):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    ours, theirs, options, call = make()
    ours = jax.tree.map(lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, ours)
    theirs = theirs.double()

    run = eqx.filter_jit(lambda model, inputs: model(*inputs))

    def apart(ours):
        y = run(ours, jax.tree.map(jnp.asarray, inputs))
        x = jax.tree.map(torch.tensor, inputs)
        z = call(theirs, *x) if call else theirs(*x)
        return max(
            abs(np.asarray(a) - b.detach().numpy()).max() for a, b in zip(*map(outputs, (y, z)), strict=True)
        )

    assert apart(interop.to_equinox(ours, theirs.state_dict(), **options)) < 1e-12
    weights = interop.to_state_dict(ours, **options)
    theirs.load_state_dict(weights)
    assert apart(ours) < 1e-12
    back = interop.to_equinox(ours, weights, **options)
    assert all((a == b).all() for a, b in zip(arrays(ours), arrays(back), strict=True))
    assert jax.tree.structure(ours) == jax.tree.structure(back)


def test_weights_are_copies():
    theirs = nn.Linear(2, 2)
    ours = interop.to_equinox(jnn.Linear(2, 2, key=KEY), theirs.state_dict())
    kept = np.array(ours.weight)
    with torch.no_grad():
        theirs.weight += 1
    np.testing.assert_array_equal(ours.weight, kept)
    interop.to_state_dict(ours)["weight"].add_(1)
    np.testing.assert_array_equal(ours.weight, kept)


def test_what_does_not_match_is_listed():
    ours = jnn.MLP(3, 2, 8, 1, key=KEY)
    theirs = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(7, 2)).state_dict()
    names = {"layers.0": "0", "layers.1": "2"}
    with pytest.raises(InputError, match=r"layers.1.weight \(2, 8\) from 2.weight \(2, 7\)"):
        interop.to_equinox(ours, theirs, rename=names)
    with pytest.raises(InputError, match=r"has no layers.0.weight, .*no place for 0.bias, 0.weight, 2.bias"):
        interop.to_equinox(ours, theirs)
    with pytest.raises(InputError, match=r"bias \(12,\) from bias_ih \(15,\) and bias_hh \(15,\)"):
        interop.to_equinox(jnn.GRUCell(3, 4, key=KEY), nn.GRUCell(3, 5).state_dict())
    with pytest.raises(InputError, match=r"no place for in_proj_bias, out_proj\.bias"):
        interop.to_equinox(jnn.MultiheadAttention(2, 4, key=KEY), nn.MultiheadAttention(4, 2).state_dict())
    with pytest.raises(InputError, match=r"weight \(6, 4, 3, 3\) from weight \(6, 4, 2, 2\)"):
        interop.to_equinox(jnn.ConvTranspose2d(4, 6, 3, key=KEY), nn.Conv2d(4, 6, 2).state_dict())
    with pytest.raises(InputError, match="two arrays of the model are named 'w'"):
        interop.to_state_dict(ours, rename=lambda name: "w")
    with pytest.raises(KindError, match="pass its state_dict"):
        interop.to_equinox(ours, nn.Linear(2, 2))
    with pytest.raises(KindError, match="without arrays of jax"):
        interop.to_state_dict(nn.Linear(2, 2))
    with pytest.raises(KindError, match="return a name"):
        interop.to_state_dict(ours, rename=lambda name: None)


def test_names():
    ours = jnn.MLP(3, 2, 8, 1, key=KEY)
    names = interop.to_state_dict(ours, rename={"": "net", "layers.1": "head"})
    assert sorted(names) == ["head.bias", "head.weight", "net.layers.0.bias", "net.layers.0.weight"]
    assert sorted(interop.to_state_dict(ours, ignore=["*.bias"])) == ["layers.0.weight", "layers.1.weight"]
    theirs = {**interop.to_state_dict(ours), "extra": torch.ones(1)}
    kept = interop.to_equinox(ours, theirs, ignore=["extra", "*.bias"])
    assert kept.layers[0].bias is ours.layers[0].bias
