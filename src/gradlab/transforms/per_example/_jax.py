from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradlab._errors import InputError
from gradlab._typing import Leaves
from gradlab.transforms.linearised._jax import is_traced
from gradlab.transforms.operators import check_chunk_size
from gradlab.transforms.per_example import Clipping, Randomness
from gradlab.transforms.per_example._jax_factors import wide
from gradlab.transforms.per_example._jax_pass import Pass, run
from gradlab.transforms.per_example.options import (
    STABILITY,
    check_batch,
    check_clipping,
    check_not_empty,
    check_randomness,
    positive_number,
)
from gradlab.transforms.rules._jax_scalars import sqrt
from gradlab.transforms.trees._jax import Tree, as_array, scalar_function


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
    check_key(op, rng)
    batched = Batched(op, loss, params, batch, has_aux, keep_batch_axis, randomness, empty=True)
    total, norms, aux = batched.clipped(max_norm, clipping, mask, chunk_size)
    sums, noisy = map(wide, batched.tree.direction(total)), []
    for x, key in zip(sums, jax.random.split(rng, len(batched.tree.leaves)), strict=True):
        z = jax.random.normal(key, x.shape, x.dtype)
        noisy.append((x + noise_multiplier * max_norm * z) / expected_batch_size)
    grad = batched.tree.like([x.astype(w.dtype) for x, w in zip(noisy, batched.tree.leaves, strict=True)])
    return (grad, norms, aux) if has_aux else (grad, norms)


def check_key(op: str, rng: Any) -> None:
    if not isinstance(rng, jax.Array) or not (
        jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) or (rng.dtype == jnp.uint32 and rng.ndim == 1)
    ):
        raise InputError(
            f"{op}: rng is a {type(rng).__name__}; pass a key of jax.random.key, a new one (jax.random.split) at "
            "every step: noise that is used twice hides nothing"
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
        if randomness != "error":
            raise InputError(
                f"{op}: randomness is torch's; in jax pass a key an example: jax.random.split(key, n) in the batch"
            )
        self.tree = Tree(op, "params", params)
        self.all, self.spec = jax.tree.flatten(tuple(batch))
        self.places = [i for i, x in enumerate(self.all) if isinstance(x, (jax.Array, np.ndarray))]
        self.arrays = [as_array(self.all[i]) for i in self.places]
        self.size = check_batch(op, self.arrays, self.named)
        if not empty:
            check_not_empty(op, self.size)

    def named(self) -> list[tuple[str, Any]]:
        paths = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(self.spec, self.all))[0]
        return [("batch" + jax.tree_util.keystr(paths[i][0]), paths[i][1]) for i in self.places]

    def example(self, leaves: Leaves, example: Sequence[Any]) -> tuple[Any, Any]:
        """The loss of one example, and aux."""
        given = list(self.all)
        for i, x in zip(self.places, example, strict=True):
            given[i] = x[None] if self.keep_batch_axis else x
        args = jax.tree.unflatten(self.spec, given)
        (value,), aux = scalar_function(self.op, self.loss, self.tree, args, self.has_aux)(leaves)
        return value, aux

    def run(self, arrays: Sequence[Any]) -> Pass:
        return run(self.op, self.example, self.tree.leaves, arrays)

    def in_chunks(
        self,
        chunk_size: int | None,
        of: Callable[[Pass, Any], tuple[Any, Any, Any]],
        joined: Callable[[Any, Any], Any] | None = None,
    ) -> tuple[Any, Any, Any]:
        """What `of` gives for passes over at most chunk_size examples, the first of which is number start.

        `of(pass, start)` is (rows, aux, sums): rows and aux are put behind one another, sums are added, or
        joined otherwise. Compiled code loops over the whole chunks.
        """
        check_chunk_size(self.op, chunk_size)
        joined = joined or partial(jax.tree.map, jnp.add)
        chunk = min(chunk_size or self.size, self.size)
        part = lambda start, stop: of(self.run([x[start:stop] for x in self.arrays]), start)
        parts = [part(0, chunk)]
        starts = list(range(chunk, self.size, chunk))
        whole = (self.size - chunk) // chunk  # chunks after the first
        if whole > 1 and is_traced([*self.tree.leaves, *self.arrays]):
            behind = [x[chunk : chunk + whole * chunk] for x in self.arrays]
            stacked = [x.reshape(whole, chunk, *x.shape[1:]) for x in behind]

            def step(sums: Any, given: Any) -> Any:
                rows, aux, more = of(self.run(given[0]), given[1])
                return joined(sums, more), (rows, aux)

            rows, aux, sums = parts[0]
            sums, looped = jax.lax.scan(step, sums, (stacked, jnp.array(starts[:whole])))
            looped = jax.tree.map(lambda x: x.reshape(whole * chunk, *x.shape[2:]), looped)
            parts = [(_behind([rows, looped[0]]), _behind([aux, looped[1]]), sums)]
            starts = starts[whole:]
        parts += [part(start, start + chunk) for start in starts]
        if len(parts) == 1:
            return parts[0]
        rows, aux, sums = zip(*parts, strict=True)
        return _behind(rows), _behind(aux), reduce(joined, sums)

    def chosen(self, indices: Any) -> tuple[Any, ...]:
        """The batch with these examples alone."""
        given = list(self.all)
        for i, x in zip(self.places, self.arrays, strict=True):
            given[i] = x[indices]
        return jax.tree.unflatten(self.spec, given)

    def norms(self, squares: Leaves, per_leaf: bool) -> Any:
        """(N,), or a tree of it; in the dtype of the parameters."""
        if not per_leaf:
            return sqrt(sum(squares)).astype(self.tree.dtype)
        return self.tree.like(
            [sqrt(s).astype(w.dtype) for s, w in zip(squares, self.tree.leaves, strict=True)]
        )

    def clipped(
        self, max_norm: Any, clipping: str, mask: Any, chunk_size: int | None
    ) -> tuple[Any, Any, Any]:
        """The clipped sum, the norms before, and aux."""
        counted = as_mask(self.op, mask, self.size)

        def of(found: Pass, start: Any) -> Any:
            squares = squared(found)
            here = jax.lax.dynamic_slice_in_dim(counted, start, found.size)
            weights = factors([sqrt(s) for s in squares], sqrt(sum(squares)), max_norm, clipping)
            sums = [found.weighted(i, jnp.where(here, c, 0)) for i, c in enumerate(weights)]
            return squares, found.aux, sums

        if self.size == 0:
            empty = jax.tree.map(jnp.zeros_like, list(self.tree.leaves))
            return self.tree.like(empty), jnp.zeros(0, self.tree.dtype), None
        squares, aux, sums = self.in_chunks(chunk_size, of)
        return self.tree.like(sums), self.norms(squares, clipping == "per_leaf"), aux


def _behind(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def squared(found: Pass) -> Leaves:
    return [found.squares(i) for i in range(len(found.leaves))]


def factors(by_leaf: Sequence[Any], norm: Any, max_norm: Any, clipping: str) -> list[Any]:
    """By what each example's gradient is multiplied, leaf by leaf; zero if it is not finite."""
    max_norm = jnp.where((max_norm > 0) & (max_norm < jnp.inf), max_norm, jnp.nan)  # if it is traced
    if clipping == "per_leaf":
        bound = max_norm / len(by_leaf) ** 0.5
        every = [jnp.minimum(1, bound / jnp.where(n == 0, 1, n)) for n in by_leaf]
    elif clipping == "automatic":
        every = [max_norm / (norm + STABILITY)] * len(by_leaf)
    else:
        every = [jnp.minimum(1, max_norm / jnp.where(norm == 0, 1, norm))] * len(by_leaf)
    return [jnp.where(jnp.isfinite(norm), c, 0) for c in every]


def as_mask(op: str, mask: Any, size: int) -> Any:
    if mask is None:
        return jnp.ones(size, bool)
    mask = jnp.asarray(mask)
    if mask.shape != (size,) or mask.dtype != bool:
        raise InputError(
            f"{op}: mask has shape {mask.shape} and dtype {mask.dtype}; pass booleans of shape ({size},)"
        )
    return mask
