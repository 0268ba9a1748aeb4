"""The models in equinox: one example in, its logits out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox import nn

from gradlab.bench.comparison.data import VOCABULARY, Task, flattened, weight

KEY: Any = np.zeros(2, np.uint32)  # of first values that `build` never makes


class MLP(eqx.Module):
    """Layers with tanh between them."""

    layers: list[nn.Linear]

    def __init__(self, widths: tuple[int, ...]):
        self.layers = [nn.Linear(n, m, key=KEY) for n, m in pairwise(widths)]

    def __call__(self, x: Any) -> Any:
        for layer in self.layers[:-1]:
            x = jnp.tanh(layer(x))
        return self.layers[-1](x)


class Conv(eqx.Module):
    """3x3 convolutions with GELU, the later ones halving the image, and a linear head."""

    layers: list[nn.Conv2d]
    head: nn.Linear

    def __init__(self, channels: tuple[int, ...]):
        pairs = pairwise(channels)
        self.layers = [nn.Conv2d(n, m, 3, 1 if n == 1 else 2, padding=1, key=KEY) for n, m in pairs]
        self.head = nn.Linear(flattened(channels), 10, key=KEY)

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = jax.nn.gelu(layer(x))
        return self.head(x.reshape(-1))


def attention(q: Any, k: Any, v: Any) -> Any:
    """Of heads (heads, length, d), each place looking back; jax.nn's own takes its softmax in float32."""
    scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)) @ v


class Block(eqx.Module):
    """Causal attention and two layers with GELU, each after a norm and added to what came in."""

    norm0: nn.LayerNorm
    qkv: nn.Linear
    out: nn.Linear
    norm1: nn.LayerNorm
    up: nn.Linear
    down: nn.Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int):
        self.norm0, self.norm1 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, key=KEY), nn.Linear(width, width, key=KEY)
        self.up, self.down = nn.Linear(width, 4 * width, key=KEY), nn.Linear(4 * width, width, key=KEY)
        self.heads = heads

    def __call__(self, h: Any) -> Any:
        length, width = h.shape
        qkv = jax.vmap(self.qkv)(jax.vmap(self.norm0)(h))
        q, k, v = qkv.reshape(length, 3, self.heads, -1).transpose(1, 2, 0, 3)
        h = h + jax.vmap(self.out)(attention(q, k, v).swapaxes(0, 1).reshape(length, width))
        return h + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norm1)(h))))


class Decoder(eqx.Module):
    """A GPT: what comes next, at every place; the head is the embedding itself where it is tied."""

    embed: nn.Embedding
    place: jax.Array
    blocks: list[Block]
    norm: nn.LayerNorm
    head: nn.Linear | None

    def __init__(self, width: int, heads: int, blocks: int, length: int, tied: bool):
        self.embed = nn.Embedding(VOCABULARY, width, key=KEY)
        self.place = jnp.zeros((length, width))
        self.blocks = [Block(width, heads) for _ in range(blocks)]
        self.norm = nn.LayerNorm(width)
        self.head = None if tied else nn.Linear(width, VOCABULARY, use_bias=False, key=KEY)

    def __call__(self, tokens: Any) -> Any:
        h = jax.vmap(self.embed)(tokens) + self.place
        for block in self.blocks:
            h = block(h)
        h = jax.vmap(self.norm)(h)
        return h @ self.embed.weight.T if self.head is None else jax.vmap(self.head)(h)


MODELS: dict[str, Any] = {"mlp": MLP, "conv": Conv, "decoder": Decoder}


def build(task: Task, dtype: str, device: str = "cpu", seed: int = 0, values: Any = weight) -> Any:
    """The model of a task, with the weights that every framework begins with, or other values by path and shape."""
    model = eqx.filter_eval_shape(MODELS[task.kind], **task.sizes)
    place = jax.local_devices(backend="gpu" if device == "cuda" else device)[0]

    def first(path: Any, leaf: Any) -> Any:
        value = values(jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape, seed)
        return jax.device_put(jnp.asarray(value, dtype), place)

    return jax.tree_util.tree_map_with_path(first, model)


def cross_entropy(model: Any, inputs: Any, targets: Any) -> Any:
    """Mean over the examples, and over the places of each."""
    logits = jax.nn.log_softmax(jax.vmap(model)(inputs))
    return -jnp.take_along_axis(logits, targets[..., None], axis=-1).mean()
