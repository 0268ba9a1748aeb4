"""Models, training, inference and derivatives in TensorFlow 2: functions of a dict of variables, under tf.function.

The mode "graph" is tf.function, "compiled" the same with XLA.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import tensorflow as tf

from gradlab.bench.comparison.cases import Ready
from gradlab.bench.comparison.data import (
    EXAMPLES,
    VOCABULARY,
    Optimiser,
    Task,
    batch,
    direction,
    flattened,
    weight,
)

__all__ = ["Learner", "arrays", "flat", "host", "lacks", "operation", "predict", "repeated", "synchronise"]

Params = dict[str, Any]


def lacks(device: str) -> str | None:
    """Why it cannot run there."""
    if device == "cuda" and not tf.config.list_physical_devices("GPU"):
        return "this build of TensorFlow finds no GPU"
    return None


def arrays(tree: Any, dtype: str, device: str = "cpu") -> Any:
    """numpy arrays on the device; floats in the dtype, integers as they are."""
    with tf.device(f"/{'gpu' if device == 'cuda' else device}:0"):
        return tf.nest.map_structure(
            lambda a: tf.constant(a, dtype if np.asarray(a).dtype.kind == "f" else None), tree
        )


def synchronise(result: Any) -> Any:
    """Wait until the result is there."""
    tf.test.experimental.sync_devices()
    return result


def host(array: Any) -> Any:
    """As numpy can read it."""
    return array.numpy()


def flat(tree: Any) -> Any:
    """All numbers of a tree, in the order of the parameters."""
    leaves = list(tree.values()) if isinstance(tree, dict) else tf.nest.flatten(tree)
    return np.concatenate([np.ravel(leaf.numpy()) for leaf in leaves])


def wrapped(function: Any, mode: str) -> Any:
    """Under tf.function, with XLA or without."""
    return tf.function(function, jit_compile=mode == "compiled", reduce_retracing=False)


def shapes(task: Task) -> dict[str, tuple[int, ...]]:
    """Of the parameters, in torch's layout."""
    linear = lambda name, n, m: {f"{name}.weight": (m, n), f"{name}.bias": (m,)}
    found: dict[str, tuple[int, ...]] = {}
    if task.kind == "mlp":
        for i, (n, m) in enumerate(pairwise(task.sizes["widths"])):
            found |= linear(f"layers.{i}", n, m)
    elif task.kind == "conv":
        for i, (n, m) in enumerate(pairwise(task.sizes["channels"])):
            found |= {f"layers.{i}.weight": (m, n, 3, 3), f"layers.{i}.bias": (m,)}
        found |= linear("head", flattened(task.sizes["channels"]), 10)
    else:
        d, length = task.sizes["width"], task.sizes["length"]
        norm = lambda name: {f"{name}.weight": (d,), f"{name}.bias": (d,)}
        found |= {"embed.weight": (VOCABULARY, d), "place": (length, d)}
        for i in range(task.sizes["blocks"]):
            b = f"blocks.{i}"
            found |= norm(f"{b}.norm0") | linear(f"{b}.qkv", d, 3 * d) | linear(f"{b}.out", d, d)
            found |= norm(f"{b}.norm1") | linear(f"{b}.up", d, 4 * d) | linear(f"{b}.down", 4 * d, d)
        found |= norm("norm") | ({} if task.sizes["tied"] else {"head.weight": (VOCABULARY, d)})
    return found


def build(task: Task, dtype: str, device: str, seed: int, values: Any = weight) -> Params:
    """The weights that every framework begins with, or other values by path and shape."""
    return arrays({name: values(name, shape, seed) for name, shape in shapes(task).items()}, dtype, device)


def linear(p: Params, name: str, x: Any) -> Any:
    """A layer."""
    return tf.linalg.matmul(x, p[f"{name}.weight"], transpose_b=True) + p[f"{name}.bias"]


def norm(p: Params, name: str, x: Any) -> Any:
    """LayerNorm."""
    mean, variance = tf.nn.moments(x, [-1], keepdims=True)
    return (x - mean) * tf.math.rsqrt(variance + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x: Any) -> Any:
    """By tanh, as the others; tf.nn.gelu has its constant in single precision."""
    return 0.5 * x * (1 + tf.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def mlp(p: Params, x: Any, task: Task) -> Any:
    """Layers with tanh between them."""
    last = len(task.sizes["widths"]) - 2
    for i in range(last):
        x = tf.tanh(linear(p, f"layers.{i}", x))
    return linear(p, f"layers.{last}", x)


def conv(p: Params, x: Any, task: Task) -> Any:
    """3x3 convolutions with GELU, the later ones halving the image, and a linear head; channels come last."""
    x = tf.transpose(x, [0, 2, 3, 1])
    for i in range(len(task.sizes["channels"]) - 1):
        filters = tf.transpose(p[f"layers.{i}.weight"], [2, 3, 1, 0])
        padded = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])
        x = gelu(tf.nn.conv2d(padded, filters, 1 if i == 0 else 2, "VALID") + p[f"layers.{i}.bias"])
    return linear(p, "head", tf.reshape(tf.transpose(x, [0, 3, 1, 2]), [tf.shape(x)[0], -1]))


def decoder(p: Params, tokens: Any, task: Task) -> Any:
    """A GPT: what comes next, at every place; the head is the embedding itself where it is tied."""
    heads, length, width = task.sizes["heads"], task.sizes["length"], task.sizes["width"]
    seen = tf.linalg.band_part(tf.ones((length, length), tf.bool), -1, 0)
    h = tf.gather(p["embed.weight"], tokens) + p["place"]
    for i in range(task.sizes["blocks"]):
        b = f"blocks.{i}"
        qkv = tf.reshape(
            linear(p, f"{b}.qkv", norm(p, f"{b}.norm0", h)), [-1, length, 3, heads, width // heads]
        )
        q, k, v = tf.unstack(tf.transpose(qkv, [2, 0, 3, 1, 4]))
        scores = tf.matmul(q, k, transpose_b=True) / (width // heads) ** 0.5
        mixed = tf.matmul(tf.nn.softmax(tf.where(seen, scores, scores.dtype.min)), v)
        h += linear(p, f"{b}.out", tf.reshape(tf.transpose(mixed, [0, 2, 1, 3]), [-1, length, width]))
        h += linear(p, f"{b}.down", gelu(linear(p, f"{b}.up", norm(p, f"{b}.norm1", h))))
    head = p["embed.weight"] if task.sizes["tied"] else p["head.weight"]
    return tf.linalg.matmul(norm(p, "norm", h), head, transpose_b=True)


MODELS: dict[str, Any] = {"mlp": mlp, "conv": conv, "decoder": decoder}


def cross_entropy(task: Task, p: Params, inputs: Any, targets: Any) -> Any:
    """Mean over the examples, and over the places of each."""
    logits = MODELS[task.kind](p, inputs, task)
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits))


def gradient(task: Task, p: Params, inputs: Any, targets: Any) -> Any:
    """Loss and gradient."""
    with tf.GradientTape() as tape:
        tape.watch(p)
        loss = cross_entropy(task, p, inputs, targets)
    return loss, {name: tf.convert_to_tensor(g) for name, g in tape.gradient(loss, p).items()}


class Learner:
    """A model in training; its AdamW is written out, since that of Keras puts eps elsewhere."""

    def __init__(self, task: Task, mode: str, dtype: str, device: str, seed: int, optimiser: Optimiser):
        start = build(task, dtype, device, seed)
        variables = lambda: {name: tf.Variable(tf.zeros_like(p)) for name, p in start.items()}
        params, mean, square = variables(), variables(), variables()
        for name, p in start.items():
            params[name].assign(p)
        count = tf.Variable(tf.zeros([], dtype))
        self.params, o = params, optimiser

        def update(inputs: Any, targets: Any) -> Any:
            loss, grads = gradient(
                task, {k: tf.convert_to_tensor(v) for k, v in params.items()}, inputs, targets
            )
            norm = tf.sqrt(tf.add_n([tf.reduce_sum(g * g) for g in grads.values()]))
            scale = tf.minimum(tf.ones_like(norm), o.max_norm / (norm + 1e-6))
            count.assign_add(tf.ones_like(count))
            for name, p in params.items():
                g = scale * grads[name]
                mean[name].assign(o.b1 * mean[name] + (1 - o.b1) * g)
                square[name].assign(o.b2 * square[name] + (1 - o.b2) * g * g)
                m, v = mean[name] / (1 - o.b1**count), square[name] / (1 - o.b2**count)
                p.assign_sub(o.rate * (m / (tf.sqrt(v) + o.eps) + o.weight_decay * p))
            return loss

        self.step = wrapped(update, mode)
        self._task = task

    def logits(self, inputs: Any) -> Any:
        """Of examples."""
        return MODELS[self._task.kind](self.params, inputs, self._task)


def repeated(learner: Learner, task: Task, dtype: str, device: str, size: int, seed: int) -> Ready:
    """Steps on one batch, one after the other."""
    examples = arrays(batch(task, 0, seed, size), dtype, device)
    return Ready(lambda: learner.step(*examples))


def predict(task: Task, mode: str, dtype: str, device: str, size: int, seed: int) -> Ready:
    """Logits of a batch, by a model whose weights stay."""
    params = build(task, dtype, device, seed)
    inputs, _ = arrays(batch(task, 0, seed, size), dtype, device)
    call = wrapped(lambda inputs: MODELS[task.kind](params, inputs, task), mode)
    return Ready(lambda: call(inputs))


def operation(
    what: str, way: str, task: Task, mode: str, dtype: str, device: str, size: int, seed: int
) -> Ready:
    """A derivative of the loss."""
    p = build(task, dtype, device, seed)
    v = build(task, dtype, device, seed + 1, direction)
    X, y = arrays(batch(task, 0, seed, size), dtype, device)

    def hvp(p: Params, v: Params) -> Any:
        with tf.autodiff.ForwardAccumulator(list(p.values()), list(v.values())) as forward:
            _, grads = gradient(task, p, X, y)
        return {name: forward.jvp(g) for name, g in grads.items()}

    def per_example(p: Params, X: Any, y: Any) -> Any:
        return tf.vectorized_map(lambda one: gradient(task, p, one[0][None], one[1][None])[1], (X, y))

    found: dict[str, tuple[Any, ...]] = {
        "gradient": (lambda p, X, y: gradient(task, p, X, y)[1], p, X, y),
        "hvp": (hvp, p, v),
        "per_example": (per_example, p, X[:EXAMPLES], y[:EXAMPLES]),
    }
    function, *args = found[what]
    call = wrapped(function, mode)
    return Ready(lambda: call(*args))
