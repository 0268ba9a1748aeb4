"""The models in flax NNX: a batch in, logits out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gradlab.bench.comparison._models_jax import attention
from gradlab.bench.comparison.data import VOCABULARY, Task, flattened, weight


class MLP(nnx.Module):
    """Layers with tanh between them."""

    def __init__(self, widths: tuple[int, ...], rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(n, m, rngs=rngs) for n, m in pairwise(widths)])

    def __call__(self, x: Any) -> Any:
        for layer in list(self.layers)[:-1]:
            x = jnp.tanh(layer(x))
        return self.layers[-1](x)


class Conv(nnx.Module):
    """3x3 convolutions with GELU, the later ones halving the image, and a linear head; channels come last."""

    def __init__(self, channels: tuple[int, ...], rngs: nnx.Rngs):
        stride = lambda n: 1 if n == 1 else 2
        self.layers = nnx.List(
            [nnx.Conv(n, m, (3, 3), stride(n), padding=1, rngs=rngs) for n, m in pairwise(channels)]
        )
        self.head = nnx.Linear(flattened(channels), 10, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x.transpose(0, 2, 3, 1)
        for layer in self.layers:
            x = jax.nn.gelu(layer(x))
        return self.head(x.transpose(0, 3, 1, 2).reshape(len(x), -1))


class Block(nnx.Module):
    """Causal attention and two layers with GELU, each after a norm and added to what came in."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        norm = lambda: nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.norm0, self.norm1 = norm(), norm()
        self.qkv, self.out = nnx.Linear(width, 3 * width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)
        self.heads = heads

    def __call__(self, h: Any) -> Any:
        batch, length, width = h.shape
        qkv = self.qkv(self.norm0(h))
        q, k, v = qkv.reshape(batch, length, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        h = h + self.out(attention(q, k, v).swapaxes(1, 2).reshape(batch, length, width))
        return h + self.down(jax.nn.gelu(self.up(self.norm1(h))))


class Decoder(nnx.Module):
    """A GPT: what comes next, at every place; the head is the embedding itself where it is tied."""

    def __init__(self, width: int, heads: int, blocks: int, length: int, tied: bool, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.place = nnx.Param(jnp.zeros((length, width)))
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(blocks)])
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.head = None if tied else nnx.Linear(width, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        h = self.embed(tokens) + self.place[...]
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        return self.embed.attend(h) if self.head is None else self.head(h)


MODELS: dict[str, Any] = {"mlp": MLP, "conv": Conv, "decoder": Decoder}
NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}  # and a bias is a bias


def values(path: tuple[Any, ...], shape: tuple[int, ...], seed: int) -> np.ndarray:
    """What torch and equinox have there: their matrices are flax's transposed, their images have channels first."""
    *names, last = map(str, path)
    name = ".".join([*names, NAMES.get(last, last)])
    if last != "kernel":
        return weight(name, shape, seed)
    axes = {2: (1, 0), 4: (2, 3, 1, 0)}[len(shape)]
    theirs = tuple(shape[i] for i in np.argsort(axes))
    return weight(name, theirs, seed).transpose(axes)


def build(task: Task, dtype: str, device: str = "cpu", seed: int = 0, values: Any = values) -> Any:
    """The model of a task, with the weights that every framework begins with, or other values by path and shape."""
    made = lambda: MODELS[task.kind](**task.sizes, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(made))
    place = jax.local_devices(backend="gpu" if device == "cuda" else device)[0]

    def first(path: Any, leaf: Any) -> Any:
        return leaf.replace(jax.device_put(jnp.asarray(values(path, leaf.shape, seed), dtype), place))

    model = nnx.merge(graph, nnx.map_state(first, state))
    if task.kind == "decoder":
        model.embed.dtype = jnp.dtype(dtype)  # what an embedding gives is of the dtype it was made with
    return model


def cross_entropy(model: Any, inputs: Any, targets: Any) -> Any:
    """Mean over the examples, and over the places of each."""
    logits = jax.nn.log_softmax(model(inputs))
    return -jnp.take_along_axis(logits, targets[..., None], axis=-1).mean()
