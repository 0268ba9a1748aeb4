"""One pass over a batch: what the gradients of all examples are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from gradlab._errors import StrategyError
from gradlab._typing import Leaves
from gradlab.transforms.graphs._torch import repairs_needed, requires_grad, survey
from gradlab.transforms.linearised._torch import tensors_only
from gradlab.transforms.per_example._torch_factors import Rows, squared_norms, wide
from gradlab.transforms.per_example._torch_recorder import Recorder
from gradlab.transforms.per_example.costs import gram_is_cheaper
from gradlab.transforms.repairs._torch import repaired, transforming

Loss = Callable[[Leaves, Sequence[Any]], tuple[Any, Any]]  # leaves and one example -> (loss, aux)


@dataclass
class Pass:
    """The gradients of N examples, as factors where the loss uses a leaf linearly, and formed elsewhere."""

    leaves: Leaves
    aux: Any
    uses: Sequence[Any]
    formed: Sequence[Any]  # (N, *leaf.shape) or None, one a leaf
    size: int
    again: bool = False  # whether the result can be differentiated again
    rows: dict[int, Any] = field(default_factory=dict)  # gradients that were formed for their norms

    def of(self, leaf: int) -> list[Any]:
        return [use for use in self.uses if use.view.leaf == leaf]

    def pulled(self, use: Any, rows: Any) -> Any:
        return use.view.pulled(self.leaves[use.view.leaf], rows, self.again).to(
            self.leaves[use.view.leaf].dtype
        )

    def gradients(self, leaf: int) -> Any:
        """(N, *leaf.shape)."""
        parts = [self.pulled(use, use.each()) for use in self.of(leaf)]
        parts += [self.formed[leaf]] if self.formed[leaf] is not None else []
        return sum(parts[1:], parts[0]) if parts else self.zeros(leaf)

    def zeros(self, leaf: int) -> Any:
        w = self.leaves[leaf].detach()
        return w.new_zeros(self.size, *w.shape)

    def weighted(self, leaf: int, weights: Any) -> Any:
        """Σₙ weightsₙ gradientₙ; an example of weight zero counts for nothing, be it infinite or not a number."""
        lost = is_compiling() or transforming() or bool((weights == 0).any())

        def mask(x: Any) -> Any:
            return x.masked_fill(_like(weights == 0, x), 0) if lost else x

        scale = lambda dy: mask(dy) * _like(weights, dy).to(dy.dtype)
        if leaf in self.rows:
            rows = mask(self.rows[leaf])
            return torch.tensordot(weights.to(rows.dtype), rows, 1)
        parts = [self.pulled(use, use.weighted(scale, mask)) for use in self.of(leaf)]
        if self.formed[leaf] is not None:
            parts.append(scale(self.formed[leaf]).sum(0))
        return sum(parts[1:], parts[0]) if parts else torch.zeros_like(self.leaves[leaf].detach())

    def squares(self, leaf: int) -> Any:
        """The squared norms (N,), by the cheapest form."""
        if self.gram_is_cheaper(leaf):
            return squared_norms(self.pairs(leaf))
        self.rows[leaf] = self.gradients(leaf)
        return wide(self.rows[leaf]).reshape(self.size, -1).square().sum(1)

    def one_row(self, leaf: int) -> bool:
        """Whether the leaf's gradient is one product l rᵀ."""
        uses = self.of(leaf)
        if self.formed[leaf] is not None or len(uses) != 1 or uses[0].layout is None:
            return False
        T, *_, groups = uses[0].sizes
        return T == groups == 1 and not isinstance(uses[0].pair()[0], Rows)

    def pairs(self, leaf: int) -> list[Any]:
        """The factors of all examples, of each use of a leaf."""
        return [use.pair() for use in self.of(leaf)]

    def gram_is_cheaper(self, leaf: int) -> bool:
        """Whether factors in one layout describe the leaf, and their Gram matrices cost less than their product."""
        uses = self.of(leaf)
        if self.formed[leaf] is not None or not uses or any(use.layout is None for use in uses):
            return False
        T = sum(use.sizes[0] for use in uses)
        return len({use.layout for use in uses}) == 1 and gram_is_cheaper(T, *uses[0].sizes[1:])


def _like(weights: Any, rows: Any) -> Any:
    return weights.reshape(-1, *(1,) * (rows.ndim - 1))


def run(op: str, f: Loss, leaves: Leaves, batch: Sequence[Any], randomness: str) -> Pass:
    """Differentiate f(leaves, example) -> (loss, aux) for all examples at once."""
    if transforming():
        return by_transforms(op, f, leaves, batch, randomness)
    if not torch.is_grad_enabled():
        with torch.enable_grad():
            return recorded(op, f, leaves, batch, randomness, graph=False)
    return recorded(op, f, leaves, batch, randomness, graph=True)


def recorded(
    op: str,
    f: Loss,
    leaves: Leaves,
    batch: Sequence[Any],
    randomness: str,
    graph: bool,
    substitute: bool = True,
    again: bool = False,
) -> Pass:
    """In eager code: the loss under vmap on an ordinary autograd graph, and one backward pass to what was recorded.

    Where the result can be differentiated again, the loss runs with faulty operations repaired.
    """
    again = again or (graph and any(map(requires_grad, [*leaves, *batch])))
    size = batch[0].shape[0]
    own = [w if again and w.requires_grad else w.detach().requires_grad_() for w in leaves]
    copies = [w.expand(size, *w.shape) for w in own]
    if not again:
        copies = [copy.detach().requires_grad_() for copy in copies]
    recorders: list[Recorder] = []

    def one(arguments: tuple[Leaves, Sequence[Any]]) -> tuple[Any, Any]:
        copies, example = arguments
        recorder = Recorder(op, copies, own, substitute, again)
        recorders.append(recorder)
        with batched_attention(leaves[0].device), recorder:
            return f(copies, example)

    of_tensors, restore = tensors_only(repaired(one) if again else one)
    losses, tensors = torch.func.vmap(of_tensors, randomness=randomness)((copies, list(batch)))
    aux, (recorder,) = restore(tensors), recorders
    if not losses.requires_grad:
        return Pass(leaves, aux, (), [None] * len(leaves), size)
    attached, kinds = survey([losses], [*own, *copies])
    repairs_needed(kinds, attached)
    intact = recorder.alone and all(x._version == version for x, version in recorder.kept)
    if (attached and graph and not again) or (substitute and not intact):
        again = again or (attached and graph)
        return recorded(op, f, leaves, batch, randomness, graph, substitute and intact, again)
    edges = [edge for _, edge in recorder.uses]
    try:
        found = torch.autograd.grad(losses.sum(), [*edges, *copies], create_graph=again, allow_unused=True)
    except RuntimeError as error:
        if "escaped" not in str(error):
            raise
        raise StrategyError(
            f"{op}: the backward pass of the loss runs code of its own on mapped examples (torch.utils.checkpoint, "
            "hooks for saved tensors); use gradlab.rules.checkpoint"
        ) from error
    uses = []
    for (use, _), dy in zip(recorder.uses, found, strict=False):
        if dy is not None:
            use.dy = use.arranged(dy)
            uses.append(use)
            if hasattr(use, "x") and use.x.is_floating_point() and use.x.dtype != use.dy.dtype:  # autocast
                use.x = use.x.to(torch.promote_types(use.x.dtype, use.dy.dtype))
                use.dy = use.dy.to(use.x.dtype)
    if not again:
        aux = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, aux)
    return Pass(own, aux, uses, found[len(edges) :], size, again)


def batched_attention(device: torch.device) -> Any:
    """On a CPU torch has no batched form of its fused kernel, and would loop."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def by_transforms(op: str, f: Loss, leaves: Leaves, batch: Sequence[Any], randomness: str) -> Pass:
    """Under a transform or torch.compile: vmap of the gradient, whose rows a compiler need not form."""

    def one(leaves: Leaves, example: Sequence[Any]) -> tuple[Any, Any]:
        if is_compiling():
            return f(leaves, example)
        with Recorder(op, leaves, leaves, substitute=False):
            return f(leaves, example)

    of_tensors, restore = tensors_only(lambda given: repaired(one)(*given))
    gradient = torch.func.grad(lambda leaves, example: of_tensors((leaves, example)), has_aux=True)
    every = torch.func.vmap(gradient, in_dims=(None, 0), randomness=randomness)
    formed, tensors = every(list(leaves), list(batch))
    return Pass(leaves, restore(tensors), (), formed, batch[0].shape[0])
