"""Training and inference in jax with equinox and optax, as their users write it."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from gradlab.bench._jax import arrays, synchronise
from gradlab.bench.comparison._models_jax import build, cross_entropy
from gradlab.bench.comparison._operations_jax import operation
from gradlab.bench.comparison.cases import Ready
from gradlab.bench.comparison.data import Optimiser, Task, batch

__all__ = ["Learner", "arrays", "flat", "host", "operation", "predict", "repeated", "synchronise"]

WRAP: dict[str, Any] = {"eager": lambda f: f, "compiled": eqx.filter_jit}


def host(array: Any) -> Any:
    """As numpy can read it."""
    return array


def flat(tree: Any) -> Any:
    """All numbers of a tree, in its order."""
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def clipped(max_norm: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm, with the 1e-6 beside the norm that torch has."""

    def clip(grads: Any, params: Any) -> Any:
        scale = jnp.minimum(1.0, max_norm / (optax.global_norm(grads) + 1e-6))
        return jax.tree.map(lambda g: scale * g, grads)

    return optax.stateless(clip)


def adamw(o: Optimiser) -> optax.GradientTransformation:
    """As torch.optim.AdamW after torch.nn.utils.clip_grad_norm_."""
    return optax.chain(
        clipped(o.max_norm), optax.adamw(o.rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay)
    )


def update(
    optimiser: Any, model: Any, state: Any, inputs: Any, targets: Any, loss_of: Any = cross_entropy
) -> Any:
    """One step: model, state, loss."""
    loss, grads = eqx.filter_value_and_grad(loss_of)(model, inputs, targets)
    updates, state = optimiser.update(grads, state, model)
    return eqx.apply_updates(model, updates), state, loss


class Learner:
    """A model in training."""

    def __init__(self, task: Task, mode: str, dtype: str, device: str, seed: int, optimiser: Optimiser):
        self.model, rule = build(task, dtype, device, seed), adamw(optimiser)
        self.state = jax.jit(rule.init)(self.model)
        self._update = WRAP[mode](lambda *args: update(rule, *args))
        self._logits = jax.jit(lambda model, inputs: jax.vmap(model)(inputs))

    def step(self, inputs: Any, targets: Any) -> Any:
        """Learn from one batch; its loss before."""
        self.model, self.state, loss = self._update(self.model, self.state, inputs, targets)
        return loss

    def logits(self, inputs: Any) -> Any:
        """Of examples."""
        return self._logits(self.model, inputs)


def repeated(learner: Learner, task: Task, dtype: str, device: str, size: int, seed: int) -> Ready:
    """Steps on one batch, one after the other; memory is that of loss and gradient."""
    examples = arrays(batch(task, 0, seed, size), dtype, device)
    gradient = jax.jit(jax.value_and_grad(cross_entropy))
    return Ready(lambda: learner.step(*examples), gradient, (learner.model, *examples))


def predict(task: Task, mode: str, dtype: str, device: str, size: int, seed: int) -> Ready:
    """Logits of a batch, by a model whose weights stay."""
    model = build(task, dtype, device, seed)
    inputs, _ = arrays(batch(task, 0, seed, size), dtype, device)
    logits = lambda inputs: jax.vmap(model)(inputs)
    if mode == "compiled":
        return Ready.of(jax.jit(logits), inputs)
    return Ready(lambda: logits(inputs))
