"""Training and inference in torch, as its users write it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from gradlab.bench._torch import arrays, synchronise
from gradlab.bench.comparison._models_torch import build, cross_entropy
from gradlab.bench.comparison._operations_torch import operation
from gradlab.bench.comparison.cases import Ready
from gradlab.bench.comparison.data import Optimiser, Task, batch

__all__ = ["Learner", "arrays", "flat", "host", "operation", "predict", "repeated", "synchronise"]

RECOMPILATIONS = (
    64  # of one function, for models, batches and dtypes; beyond it torch goes on without compiling
)


def compiled(f: Any) -> Any:
    """torch.compile, of as many models as there are."""
    torch._dynamo.config.recompile_limit = RECOMPILATIONS
    return torch.compile(f)


WRAP: dict[str, Any] = {"eager": lambda f: f, "compiled": compiled}


def adamw(model: torch.nn.Module, o: Optimiser) -> torch.optim.Optimizer:
    """In one kernel, which is the fastest form on every device."""
    betas = (o.b1, o.b2)
    return torch.optim.AdamW(
        model.parameters(), o.rate, betas, o.eps, weight_decay=o.weight_decay, fused=True
    )


def update(loss_of: Any, model: Any, optimiser: Any, max_norm: float, inputs: Any, targets: Any) -> Any:
    """One step, in place: the loss."""
    loss = loss_of(model, inputs, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimiser.step()
    optimiser.zero_grad()
    return loss.detach()


def host(array: Any) -> Any:
    """As numpy can read it."""
    return array.detach().cpu()


def flat(tree: Any) -> Any:
    """All numbers of a tree, in its order."""
    return torch.cat([leaf.detach().reshape(-1).cpu() for leaf in pytree.tree_leaves(tree)])


class Learner:
    """A model in training."""

    def __init__(self, task: Task, mode: str, dtype: str, device: str, seed: int, optimiser: Optimiser):
        self.model = build(task, dtype, device, seed)
        self._optimiser, self._max_norm = adamw(self.model, optimiser), optimiser.max_norm
        self._loss = WRAP[mode](cross_entropy)

    def step(self, inputs: Any, targets: Any) -> Any:
        """Learn from one batch; its loss before."""
        return update(self._loss, self.model, self._optimiser, self._max_norm, inputs, targets)

    def gradient(self, inputs: Any, targets: Any) -> Any:
        """Loss and gradient."""
        loss = self._loss(self.model, inputs, targets)
        return loss.detach(), torch.autograd.grad(loss, list(self.model.parameters()))

    @torch.no_grad()
    def logits(self, inputs: Any) -> Any:
        """Of examples."""
        return self.model(inputs)


def repeated(learner: Learner, task: Task, dtype: str, device: str, size: int, seed: int) -> Ready:
    """Steps on one batch, one after the other; memory is that of loss and gradient."""
    examples = arrays(batch(task, 0, seed, size), dtype, device)
    return Ready(lambda: learner.step(*examples), learner.gradient, examples)


def predict(task: Task, mode: str, dtype: str, device: str, size: int, seed: int) -> Ready:
    """Logits of a batch, by a model whose weights stay."""
    model = WRAP[mode](build(task, dtype, device, seed).eval())
    inputs, _ = arrays(batch(task, 0, seed, size), dtype, device)
    return Ready.of(torch.inference_mode()(lambda inputs: model(inputs)), inputs)
