"""Training, inference and derivatives in jax with flax NNX and optax, as their users write them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gradlab.bench._jax import arrays, synchronise
from gradlab.bench.comparison._jax import adamw
from gradlab.bench.comparison._models_flax import build, cross_entropy
from gradlab.bench.comparison.cases import Ready
from gradlab.bench.comparison.data import EXAMPLES, Optimiser, Task, batch, direction

__all__ = ["Learner", "arrays", "flat", "host", "operation", "predict", "repeated", "synchronise"]


def host(array: Any) -> Any:
    """As numpy can read it."""
    return array


def flat(tree: Any) -> Any:
    """All numbers of a tree, in torch's order: matrices transposed, a bias after its weight."""
    named = {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(tree)}
    parts = []
    for path in sorted(named, key=lambda path: (path[:-1], path[-1] == "bias")):
        leaf = named[path][...]
        parts.append(jnp.ravel(leaf.swapaxes(-1, -2) if path[-1] == "kernel" else leaf))
    return jnp.concatenate(parts)


class Learner:
    """A model in training."""

    def __init__(self, task: Task, mode: str, dtype: str, device: str, seed: int, optimiser: Optimiser):
        self.model = build(task, dtype, device, seed)
        self._optimiser = nnx.Optimizer(self.model, adamw(optimiser), wrt=nnx.Param)

        def update(model: Any, optimiser: Any, inputs: Any, targets: Any) -> Any:
            loss, grads = nnx.value_and_grad(cross_entropy)(model, inputs, targets)
            optimiser.update(model, grads)
            return loss

        self._update = nnx.jit(update)

    def step(self, inputs: Any, targets: Any) -> Any:
        """Learn from one batch; its loss before."""
        return self._update(self.model, self._optimiser, inputs, targets)

    def logits(self, inputs: Any) -> Any:
        """Of examples."""
        return self.model(inputs)


def repeated(learner: Learner, task: Task, dtype: str, device: str, size: int, seed: int) -> Ready:
    """Steps on one batch, one after the other; memory is that of loss and gradient."""
    examples = arrays(batch(task, 0, seed, size), dtype, device)
    graph, params = nnx.split(learner.model)
    loss = lambda params, *examples: cross_entropy(nnx.merge(graph, params), *examples)
    return Ready(lambda: learner.step(*examples), jax.jit(jax.value_and_grad(loss)), (params, *examples))


def predict(task: Task, mode: str, dtype: str, device: str, size: int, seed: int) -> Ready:
    """Logits of a batch, by a model whose weights stay."""
    model = build(task, dtype, device, seed)
    inputs, _ = arrays(batch(task, 0, seed, size), dtype, device)
    return Ready.of(jax.jit(lambda inputs: model(inputs)), inputs)


def operation(
    what: str, way: str, task: Task, mode: str, dtype: str, device: str, size: int, seed: int
) -> Ready:
    """A derivative of the loss, jitted."""
    graph, params = nnx.split(build(task, dtype, device, seed))
    turned = lambda path, shape, seed: _turned(path, shape, seed)
    _, v = nnx.split(build(task, dtype, device, seed + 1, turned))
    X, y = arrays(batch(task, 0, seed, size), dtype, device)
    loss = lambda p, X, y: cross_entropy(nnx.merge(graph, p), X, y)
    one = lambda p, x, y: loss(p, x[None], y[None])
    found: dict[str, tuple[Any, ...]] = {
        "gradient": (jax.grad(loss), params, X, y),
        "hvp": (lambda p, v: jax.jvp(lambda p: jax.grad(loss)(p, X, y), (p,), (v,))[1], params, v),
        "per_example": (jax.vmap(jax.grad(one), (None, 0, 0)), params, X[:EXAMPLES], y[:EXAMPLES]),
    }
    function, *args = found[what]
    return Ready.of(jax.jit(function), *args)


def _turned(path: tuple[Any, ...], shape: tuple[int, ...], seed: int) -> Any:
    """The same direction as in the other frameworks."""
    *names, last = map(str, path)
    name = ".".join([*names, "bias" if last == "bias" else "weight"])
    if last != "kernel":
        return direction(name, shape, seed)
    return direction(name, shape[::-1], seed).T
