from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gradlab._errors import InputError
from gradlab.transforms.gradient_statistics import NoiseScale, Statistics
from gradlab.transforms.gradient_statistics.sizes import blocks, check_count, check_other, held_at_once
from gradlab.transforms.per_example import Randomness
from gradlab.transforms.per_example._torch import Batched, per_example_grads, per_example_norms, squared
from gradlab.transforms.per_example._torch_pass import Pass


def per_example_statistics(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    chunk_size: int | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> Statistics:
    """Means and sums of squares about them, chunk by chunk."""
    op = "per_example_statistics"
    batched = Batched(op, loss, params, batch, False, keep_batch_axis, randomness)
    check_count(op, "examples in the batch", batched.size, 2)

    def moments(found: Pass, start: Any) -> Any:
        rows = [found.gradients(i) for i in range(len(found.leaves))]
        means = [x.mean(0) for x in rows]
        squares = [(x - m).square().sum(0) for x, m in zip(rows, means, strict=True)]
        return (), (), (float(found.size), means, squares)

    def joined(a: Any, b: Any) -> Any:
        n, m = a[0], b[0]
        shift = [y - x for x, y in zip(a[1], b[1], strict=True)]
        means = [x + d * (m / (n + m)) for x, d in zip(a[1], shift, strict=True)]
        squares = [p + q + d * d * (n * m / (n + m)) for p, q, d in zip(a[2], b[2], shift, strict=True)]
        return n + m, means, squares

    chunk = chunk_size or held_at_once(batched.tree.size, batched.size)
    _, _, (n, means, squares) = batched.in_chunks(chunk, moments, joined)
    variances = [s / (n - 1) for s in squares]
    ratios = [
        torch.where(m == 0, 0, m * m / torch.where(m == 0, 1, v))
        for m, v in zip(means, variances, strict=True)
    ]
    return Statistics(*map(batched.tree.like, (means, variances, ratios)))


def gradient_noise_scale(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    chunk_size: int | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> NoiseScale:
    """Squared norms and their weighted sum, of the same pass."""
    op = "gradient_noise_scale"
    batched = Batched(op, loss, params, batch, False, keep_batch_axis, randomness)
    N = batched.size
    check_count(op, "examples in the batch", N, 2)

    def of(found: Pass, start: Any) -> Any:
        ones = batched.tree.zeros((found.size,)) + 1
        square: Any = sum(squared(found))
        return (), (), (square.mean() * found.size / N, [
            found.weighted(i, ones) / N for i in range(len(found.leaves))
        ])  # fmt: skip

    _, _, (mean_square, mean) = batched.in_chunks(chunk_size, of)
    square = sum(m.square().sum() for m in mean)
    trace = N / (N - 1) * (mean_square - square)
    true = square - trace / N
    return NoiseScale(trace / true, trace, true)


def per_example_gram(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    other: tuple[Any, ...] | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> Any:
    """Leaf by leaf: the product of the factors' dot products, or of gradients."""
    op = "per_example_gram"
    first = Batched(op, loss, params, batch, False, keep_batch_axis, randomness)
    a = first.run(first.arrays)
    b = a
    if other is not None:
        second = Batched(op, loss, params, check_other(op, other), False, keep_batch_axis, randomness)
        b = second.run(second.arrays)
    return sum(_gram(a, b, i) for i in range(len(a.leaves)))


def _gram(a: Pass, b: Pass, leaf: int) -> Any:
    if a.one_row(leaf) and b.one_row(leaf):
        ((left, right),), ((left_b, right_b),) = a.pairs(leaf), b.pairs(leaf)
        return (left[:, 0, 0] @ left_b[:, 0, 0].T) * (right[:, 0, 0] @ right_b[:, 0, 0].T)
    x = a.gradients(leaf).reshape(a.size, -1)
    return x @ (x if b is a else b.gradients(leaf).reshape(b.size, -1)).T


def per_example_projections(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    dimension: int,
    seed: int = 0,
    chunk_size: int | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> Any:
    """Gradients of a chunk, times blocks of rows of Pᵀ drawn as they are needed."""
    op = "per_example_projections"
    check_count(op, "entries in dimension", dimension, 1)
    batched = Batched(op, loss, params, batch, False, keep_batch_axis, randomness)

    def of(found: Pass, start: Any) -> Any:
        total = batched.tree.zeros((found.size, dimension))
        draw = torch.Generator(total.device).manual_seed(seed)
        for i in range(len(found.leaves)):
            rows = found.gradients(i).reshape(found.size, -1)
            for first, last in blocks(rows.shape[1], dimension):
                signs = torch.randint(2, (last - first, dimension), generator=draw, device=total.device)
                total = total + rows[:, first:last] @ (2 * signs - 1).to(rows.dtype)
        return total / dimension**0.5, (), ()

    chunk = chunk_size or held_at_once(batched.tree.size, batched.size)
    return batched.in_chunks(chunk, of)[0]


def per_example_top_k(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    k: int,
    chunk_size: int | None = None,
    keep_batch_axis: bool = False,
    randomness: Randomness = "error",
) -> tuple[Any, Any, Any]:
    """The largest norms, then the gradients of their examples."""
    op = "per_example_top_k"
    batched = Batched(op, loss, params, batch, False, keep_batch_axis, randomness)
    check_count(op, "examples in k", k, 1)
    if k > batched.size:
        raise InputError(f"{op}: k is {k}, the batch has {batched.size} examples; pass at most as many")
    options: Any = {"chunk_size": chunk_size, "keep_batch_axis": keep_batch_axis, "randomness": randomness}
    norms, indices = per_example_norms(loss, params, *batch, **options).topk(k)
    chosen = batched.chosen(indices)
    return norms, indices, per_example_grads(loss, params, *chosen, **options)
