"""The problems and the clock's needs in jax, as a user of jax would write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradlab.bench.problems import Problem


def arrays(tree: Any, dtype: str, device: str = "cpu") -> Any:
    """A tree of numpy arrays on the device; floats in the dtype, integers as they are."""
    place = jax.devices("gpu" if device == "cuda" else device)[0]
    cast = lambda a: jnp.asarray(a, dtype if a.dtype.kind == "f" else None)
    return jax.tree.map(lambda a: jax.device_put(cast(np.asarray(a)), place), tree)


def synchronise(result: Any) -> Any:
    """Wait until the result is there."""
    return jax.block_until_ready(result)


def model(problem: Problem) -> Callable[..., Any]:
    """`model(params, inputs)`: logits."""
    return {"mlp": _mlp, "conv": _conv, "transformer": _transformer, "decoder": _decoder}[problem.kind]


def outer(outputs: Any, targets: Any) -> Any:
    """Mean cross-entropy of logits (..., classes) and integer labels (...)."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[..., None], axis=-1)
    return -chosen.mean()


def loss(problem: Problem) -> Callable[..., Any]:
    """`loss(params, inputs, targets)`."""
    apply = model(problem)
    return lambda params, inputs, targets: outer(apply(params, inputs), targets)


def _mlp(params: Any, inputs: Any) -> Any:
    h, layers = inputs, len(params) // 2
    for i in range(layers):
        h = h @ params[f"w{i}"] + params[f"b{i}"]
        h = jnp.tanh(h) if i < layers - 1 else h
    return h


def _conv(params: Any, inputs: Any) -> Any:
    h = inputs
    for i in range(2):
        h = jax.lax.conv_general_dilated(h, params[f"w{i}"], (1, 1), "SAME") + params[f"b{i}"][:, None, None]
        h = jax.nn.gelu(h)
    return h.mean((2, 3)) @ params["w2"] + params["b2"]


def _norm(x: Any, scale: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale


def _block(params: Any, name: str, h: Any, heads: int, causal: bool) -> Any:
    batch, length, d = h.shape
    qkv = (_norm(h, params[f"{name}.norm0"]) @ params[f"{name}.qkv"]).reshape(batch, length, 3, heads, -1)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]).astype(h.dtype)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    mixed = (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3)
    h = h + mixed.reshape(batch, length, d) @ params[f"{name}.out"]
    return h + jax.nn.gelu(_norm(h, params[f"{name}.norm1"]) @ params[f"{name}.up"]) @ params[f"{name}.down"]


def _transformer(params: Any, inputs: Any) -> Any:
    h = _block(params, "block0", inputs @ params["embed"] + params["place"], heads=2, causal=False)
    return h.mean(1) @ params["head"]


def _decoder(params: Any, inputs: Any) -> Any:
    h = params["embed"][inputs] + params["place"]
    for i in range(sum(name.endswith(".qkv") for name in params)):
        h = _block(params, f"block{i}", h, heads=4, causal=True)
    return h @ params["head"]
