"""One pass over a batch: what the gradients of all examples are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from gradlab._errors import InputError
from gradlab._typing import Leaves
from gradlab.transforms.per_example._jax_factors import squared_norms, wide, width
from gradlab.transforms.per_example._jax_uses import Rows, Use, View, Walk, normalises
from gradlab.transforms.per_example.costs import gram_is_cheaper
from gradlab.transforms.per_example.options import mixing


@dataclass
class Pass:
    """The gradients of N examples, as factors where the loss uses a leaf linearly, and formed elsewhere."""

    leaves: Leaves
    aux: Any
    uses: Sequence[Use]
    xs: Sequence[Any]
    cotangents: Sequence[Any]
    formed: dict[int, Any]  # (N, *leaf.shape) by the number of the leaf
    size: int
    rows: dict[int, Any] = field(default_factory=dict)  # gradients that were formed for their norms

    def of(self, leaf: int) -> list[tuple[Use, Any, Any]]:
        """The uses of a leaf, with x and the cotangent of y."""
        uses = zip(self.uses, self.xs, self.cotangents, strict=True)
        return [(use, x, dy) for use, x, dy in uses if use.view.leaf == leaf]

    def gradients(self, leaf: int) -> Any:
        """(N, *leaf.shape)."""
        w = self.leaves[leaf]
        one = lambda use: lambda x, dy: jax.linear_transpose(lambda w: use.of_leaf(x, w), w)(dy)[0]
        parts = [jax.vmap(one(use))(x, dy) for use, x, dy in self.of(leaf)]
        parts += [self.formed[leaf]] if leaf in self.formed else []
        return reduce(jnp.add, parts) if parts else jnp.zeros((self.size, *w.shape), w.dtype)

    def weighted(self, leaf: int, weights: Any) -> Any:
        """Σₙ weightsₙ gradientₙ; an example of weight zero counts for nothing, be it infinite or not a number."""
        w = self.leaves[leaf]
        if leaf in self.rows:
            return jnp.tensordot(weights.astype(w.dtype), masked(weights, self.rows[leaf]), 1)
        total = jnp.zeros(w.shape, w.dtype)
        for use, x, dy in self.of(leaf):
            x, dy = masked(weights, x), scaled(weights, dy)
            every = lambda w, x=x, use=use: jax.vmap(lambda x: use.of_leaf(x, w))(x)
            total += jax.linear_transpose(every, w)(dy)[0]
        if leaf in self.formed:
            total += scaled(weights, self.formed[leaf]).sum(0).astype(w.dtype)
        return total

    def squares(self, leaf: int) -> Any:
        """The squared norms (N,), by the cheapest form."""
        if self.gram_is_cheaper(leaf):
            return squared_norms(self.pairs(leaf))
        self.rows[leaf] = self.gradients(leaf)
        return jnp.square(wide(self.rows[leaf]).reshape(self.size, -1)).sum(1)

    def one_row(self, leaf: int) -> bool:
        """Whether the leaf's gradient is one product l rᵀ."""
        if leaf in self.formed or len(self.of(leaf)) != 1:
            return False
        ((use, x, dy),) = self.of(leaf)
        left, right = jax.eval_shape(lambda x, dy: use.factors(x, dy)[:2], _one(x), _one(dy))
        return not isinstance(left, Rows) and right.shape[:2] == (1, 1)

    def pairs(self, leaf: int) -> list[Any]:
        """The factors of all examples, of each use of a leaf."""
        factors = lambda use: lambda x, dy: use.factors(x, dy)[:2]
        return [jax.vmap(factors(use))(x, dy) for use, x, dy in self.of(leaf)]

    def gram_is_cheaper(self, leaf: int) -> bool:
        """Whether factors in one layout describe the leaf, and their Gram matrices cost less than their product."""
        uses = self.of(leaf)
        if leaf in self.formed or not uses:
            return False
        shapes, layouts = [], set()
        for use, x, dy in uses:
            layout: list[Any] = []
            arrays = lambda x, dy, use=use, layout=layout: _noted(use.factors(x, dy), layout)
            shapes.append(jax.eval_shape(arrays, _one(x), _one(dy)))
            layouts |= set(layout)
        left, right = shapes[0]
        T = sum(right.shape[1] for _, right in shapes)
        return len(layouts) == 1 and gram_is_cheaper(T, width(left), right.shape[2], right.shape[0])


def _one(rows: Any) -> Any:
    return jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype)


def _noted(factors: Any, layouts: list[Any]) -> Any:
    """The arrays among the factors; the layout, which is none, goes into a list."""
    left, right, layout = factors
    layouts.append(layout)
    return left, right


def scaled(weights: Any, rows: Any) -> Any:
    weights = weights.reshape(-1, *(1,) * (rows.ndim - 1)).astype(rows.dtype)
    return jnp.where(weights == 0, 0, weights * rows)


def masked(weights: Any, x: Any) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jnp.where(weights.reshape(-1, *(1,) * (x.ndim - 1)) == 0, 0, x)


def run(op: str, f: Callable[..., Any], leaves: Leaves, batch: Sequence[Any]) -> Pass:
    """Differentiate f(leaves, example) -> (loss, aux) for all examples at once.

    The loss is traced once. A dry run through its jaxpr finds the uses and which leaves are needed beside.
    """
    example = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in batch]
    try:
        jaxpr, shape = jax.make_jaxpr(f, return_shape=True)(list(leaves), example)
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise InputError(mixing(op, str(error))) from error
    structure: Any = jax.tree.structure(shape)
    views = [View(i, tuple(range(x.ndim))) for i, x in enumerate(leaves)]

    def walk(leaves: Leaves, example: Any, probes: Any = None, held: Any = None) -> tuple[Any, Any, Walk]:
        walk = Walk(leaves if held is None else held, probes)
        known = [*views, *[None] * len(example)]
        outs, shown = walk.run(jaxpr.jaxpr, jaxpr.consts, [*leaves, *example], known)
        walk.escaped |= {view.leaf for view in shown if view is not None}
        (value, aux) = jax.tree.unflatten(structure, outs)
        return value, aux, walk

    dry: list[Walk] = []
    jax.eval_shape(lambda leaves, example: dry.append(walk(leaves, example)[2]), list(leaves), example)
    uses, escaped = dry[0].uses, sorted(dry[0].escaped)

    def one(example: Any) -> Any:
        def loss(probes: Any, moving: Any) -> Any:
            every = list(leaves)
            for i, x in zip(escaped, moving, strict=True):
                every[i] = x
            value, aux, walked = walk(every, example, probes, leaves)
            return value, (walked.xs, aux)

        probes = [jnp.zeros(use.y.shape, use.y.dtype) for use in uses]
        return jax.grad(loss, (0, 1), has_aux=True)(probes, [leaves[i] for i in escaped])

    origins = [(i in escaped, False) for i in range(len(leaves))] + [(False, True)] * len(example)
    looped = escaped and batching_is_wrong(leaves) and normalises(jaxpr.jaxpr, origins)[0]
    every = (lambda batch: jax.lax.map(one, batch)) if looped else jax.vmap(one)
    (cotangents, formed), (xs, aux) = every(list(batch))
    size = batch[0].shape[0]
    return Pass(leaves, aux, uses, xs, cotangents, dict(zip(escaped, formed, strict=True)), size)


def batching_is_wrong(leaves: Leaves) -> bool:
    """XLA on a CPU, below float64, where what is normalised are the parameters themselves (docs/decisions.md)."""
    return jax.default_backend() == "cpu" and jnp.finfo(jnp.result_type(*leaves)).bits < 64
