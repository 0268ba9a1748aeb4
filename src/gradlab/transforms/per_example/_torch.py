from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gradlab._dispatch import refuse_foreign
from gradlab._errors import InputError
from gradlab._typing import Leaves
from gradlab.transforms.operators import check_chunk_size
from gradlab.transforms.per_example import Clipping, Randomness
from gradlab.transforms.per_example._torch_factors import wide
from gradlab.transforms.per_example._torch_pass import Pass, run
from gradlab.transforms.per_example.options import (
    STABILITY,
    check_batch,
    check_clipping,
    check_not_empty,
    check_randomness,
    positive_number,
)
from gradlab.transforms.rules._torch_scalars import sqrt
from gradlab.transforms.trees._torch import Tree, as_tensor, scalar_function


def per_example_grads(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    has_aux: bool = False,
    chunk_size: int | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> Any:
    """The gradients of one pass, formed from their factors."""
    batched = Batched("per_example_grads", loss, params, batch, has_aux, keep_batch_axis, randomness)
    gradients = lambda found: [found.gradients(i) for i in range(len(found.leaves))]
    rows, aux, _ = batched.in_chunks(chunk_size, lambda found, start: (gradients(found), found.aux, ()))
    grads = batched.tree.like(rows)
    return (grads, aux) if has_aux else grads


def per_example_norms(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    per_leaf: bool = False,
    has_aux: bool = False,
    chunk_size: int | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> Any:
    """Each leaf's squared norms by its cheapest form."""
    batched = Batched("per_example_norms", loss, params, batch, has_aux, keep_batch_axis, randomness)
    squares, aux, _ = batched.in_chunks(chunk_size, lambda found, start: (squared(found), found.aux, ()))
    norms = batched.norms(squares, per_leaf)
    return (norms, aux) if has_aux else norms


def clipped_grad(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    max_norm: Any,
    clipping: Clipping = "flat",
    mask: Any = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> Any:
    """One pass gives the norms, and the sum of what it kept, weighted by their factors."""
    check_clipping("clipped_grad", max_norm, clipping)
    batched = Batched("clipped_grad", loss, params, batch, has_aux, keep_batch_axis, randomness)
    total, norms, aux = batched.clipped(max_norm, clipping, mask, chunk_size)
    return (total, norms, aux) if has_aux else (total, norms)


def private_grad(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    max_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    rng: Any,
    clipping: Clipping = "flat",
    mask: Any = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> Any:
    """The clipped sum, plus normal noise of standard deviation noise_multiplier · max_norm, over the expected size."""
    op = "private_grad"
    check_clipping(op, max_norm, clipping)
    positive_number(op, "noise_multiplier", noise_multiplier, zero=True)
    positive_number(op, "expected_batch_size", expected_batch_size)
    check_generator(op, rng)
    batched = Batched(op, loss, params, batch, has_aux, keep_batch_axis, randomness, empty=True)
    total, norms, aux = batched.clipped(max_norm, clipping, mask, chunk_size)
    noisy = []
    for x in map(wide, batched.tree.direction(total)):
        z = torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
        noisy.append((x + noise_multiplier * max_norm * z) / expected_batch_size)
    grad = batched.tree.like([x.to(w.dtype) for x, w in zip(noisy, batched.tree.leaves, strict=True)])
    return (grad, norms, aux) if has_aux else (grad, norms)


def check_generator(op: str, rng: Any) -> None:
    if not isinstance(rng, torch.Generator):
        raise InputError(
            f"{op}: rng is a {type(rng).__name__}; pass one torch.Generator(device) for all steps, seeded once: noise "
            "that is used twice hides nothing"
        )


class Batched:
    """A loss of one example, its parameters, and a batch of examples."""

    def __init__(
        self,
        op: str,
        loss: Callable[..., Any],
        params: Any,
        batch: Sequence[Any],
        has_aux: bool,
        keep_batch_axis: bool,
        randomness: str,
        empty: bool = False,
    ):
        self.op, self.loss, self.has_aux, self.keep_batch_axis = op, loss, has_aux, keep_batch_axis
        check_randomness(op, randomness)
        self.randomness = randomness
        self.tree = Tree(op, "params", params)
        leaves, self.spec = pytree.tree_flatten(tuple(batch))
        self.all = [as_tensor(x) for x in leaves]
        for x in self.all:
            if not isinstance(x, torch.Tensor):
                refuse_foreign(op, "batch", x, "torch")
        self.places = [i for i, x in enumerate(self.all) if isinstance(x, torch.Tensor)]
        self.arrays = [self.all[i] for i in self.places]
        self.size = check_batch(op, self.arrays, self.named)
        if not empty:
            check_not_empty(op, self.size)

    def named(self) -> list[tuple[str, Any]]:
        paths = pytree.tree_flatten_with_path(pytree.tree_unflatten(self.all, self.spec))[0]
        return [("batch" + pytree.keystr(paths[i][0]), paths[i][1]) for i in self.places]

    def example(self, leaves: Leaves, example: Sequence[Any]) -> tuple[Any, Any]:
        """The loss of one example, and aux."""
        given = list(self.all)
        for i, x in zip(self.places, example, strict=True):
            given[i] = x[None] if self.keep_batch_axis else x
        args = pytree.tree_unflatten(given, self.spec)
        (value,), aux = scalar_function(self.op, self.loss, self.tree, args, self.has_aux)(leaves)
        return value, aux

    def run(self, arrays: Sequence[Any]) -> Pass:
        return run(self.op, self.example, self.tree.leaves, arrays, self.randomness)

    def in_chunks(
        self,
        chunk_size: int | None,
        of: Callable[[Pass, Any], tuple[Any, Any, Any]],
        joined: Callable[[Any, Any], Any] | None = None,
    ) -> tuple[Any, Any, Any]:
        """What `of` gives for passes over at most chunk_size examples, the first of which is number start.

        `of(pass, start)` is (rows, aux, sums): rows and aux are put behind one another, sums are added, or
        joined otherwise.
        """
        check_chunk_size(self.op, chunk_size)
        joined = joined or partial(pytree.tree_map, torch.add)
        chunk = min(chunk_size or self.size, self.size)
        every: list[Any] = []
        total: Any = None
        for start in range(0, self.size, chunk):
            *rows, sums = of(self.run([x[start : start + chunk] for x in self.arrays]), start)
            total = joined(total, sums) if every else sums
            every.append(rows)
        if len(every) == 1:
            return *every[0], total
        rows, aux = (pytree.tree_map(_behind, *parts) for parts in zip(*every, strict=True))
        return rows, aux, total

    def chosen(self, indices: Any) -> tuple[Any, ...]:
        """The batch with these examples alone."""
        given = list(self.all)
        for i, x in zip(self.places, self.arrays, strict=True):
            given[i] = x[indices]
        return pytree.tree_unflatten(given, self.spec)

    def norms(self, squares: Leaves, per_leaf: bool) -> Any:
        """(N,), or a tree of it; in the dtype of the parameters."""
        if not per_leaf:
            return sqrt(sum(squares)).to(self.tree.dtype)
        return self.tree.like([sqrt(s).to(w.dtype) for s, w in zip(squares, self.tree.leaves, strict=True)])

    def clipped(
        self, max_norm: Any, clipping: str, mask: Any, chunk_size: int | None
    ) -> tuple[Any, Any, Any]:
        """The clipped sum, the norms before, and aux."""
        counted = as_mask(self.op, mask, self.size)

        def of(found: Pass, start: int) -> Any:
            squares = squared(found)
            weights = factors([sqrt(s) for s in squares], sqrt(sum(squares)), max_norm, clipping)
            if counted is not None:
                here = counted[start : start + found.size].to(squares[0].device)
                weights = [torch.where(here, c, 0) for c in weights]
            sums = [found.weighted(i, c) for i, c in enumerate(weights)]
            return squares, found.aux, sums

        if self.size == 0:
            empty = [torch.zeros_like(w.detach()) for w in self.tree.leaves]
            return self.tree.like(empty), self.tree.zeros((0,)), None
        squares, aux, sums = self.in_chunks(chunk_size, of)
        return self.tree.like(sums), self.norms(squares, clipping == "per_leaf"), aux


def _behind(*leaves: Any) -> Any:
    return torch.cat(leaves) if isinstance(leaves[0], torch.Tensor) else leaves[0]


def squared(found: Pass) -> Leaves:
    return [found.squares(i) for i in range(len(found.leaves))]


def factors(by_leaf: Sequence[Any], norm: Any, max_norm: Any, clipping: str) -> list[Any]:
    """By what each example's gradient is multiplied, leaf by leaf; zero if it is not finite."""
    if isinstance(max_norm, torch.Tensor):  # which may be traced
        max_norm = torch.where((max_norm > 0) & (max_norm < torch.inf), max_norm, torch.nan)
    if clipping == "per_leaf":
        bound = max_norm / len(by_leaf) ** 0.5
        every = [(bound / torch.where(n == 0, 1, n)).clamp(max=1) for n in by_leaf]
    elif clipping == "automatic":
        every = [max_norm / (norm + STABILITY)] * len(by_leaf)
    else:
        every = [(max_norm / torch.where(norm == 0, 1, norm)).clamp(max=1)] * len(by_leaf)
    return [torch.where(norm.isfinite(), c, 0) for c in every]


def as_mask(op: str, mask: Any, size: int) -> Any:
    if mask is None:
        return None
    mask = torch.as_tensor(mask)
    if mask.shape != (size,) or mask.dtype != torch.bool:
        raise InputError(
            f"{op}: mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; pass booleans of shape ({size},)"
        )
    return mask
