from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradlab._typing import Function, Leaves
from gradlab.transforms.operators import DIRECTIONS, PUSHES


@dataclass
class Linearised:
    """Outputs and aux of a function at a point, and the two linear maps of its derivative J there.

    `push(vs)` is J v and `pull(us)` is Jᵀ u, the transpose of one another.
    """

    outputs: Leaves
    aux: Any
    push: Callable[[Leaves], Leaves]
    pull: Callable[[Leaves], Leaves]
    kept: int  # elements of the intermediate results that the two maps keep
    forward: bool = True  # whether push is forward mode, not the pullback transposed


def linearise(f: Function, leaves: Leaves, *, gradient: bool = False) -> Linearised:
    """Linearise `f(leaves) -> (outputs, aux)`, or with `gradient=True` the gradient of its one output.

    Where a `jax.custom_vjp` inside f has no forward mode, the pushforward is the pullback transposed.
    """
    leaves = list(leaves)
    outputs, push, aux = jax.linearize(gradient_of(f) if gradient else f, leaves, has_aux=True)
    kept = sum(leaf.size for leaf in jax.tree.leaves(push))
    forward = not has_primitive("custom_lin", jax.make_jaxpr(push)(leaves).jaxpr)
    if gradient:
        product = push if forward else transposed(push, leaves)
        return Linearised(outputs, aux, product, product, kept, forward)
    pull = transposed(push, leaves)
    return Linearised(outputs, aux, push if forward else transposed(pull, outputs), pull, kept, forward)


def product_of_gradient(f: Function, leaves: Leaves, vs: Leaves) -> tuple[Leaves, Any]:
    """H v and aux for one direction: forward over reverse, or reverse twice where a rule has no forward mode."""
    along = lambda xs, vs: jax.jvp(gradient_of(f), (xs,), (vs,), has_aux=True)[1:]
    leaves, vs = list(leaves), list(vs)
    try:
        product, aux = along(leaves, vs)
    except TypeError:  # a custom_vjp whose rule calls another
        return by_reverse(f, leaves, vs)
    contains = lambda name, g, *args: has_primitive(name, jax.make_jaxpr(g)(*args).jaxpr)
    ruled = is_traced(product) and contains("custom_vjp_call", f, leaves)
    if ruled and contains("custom_lin", along, leaves, vs):  # which would raise when compiled
        return by_reverse(f, leaves, vs)
    return product, aux


def by_reverse(f: Function, leaves: Leaves, vs: Leaves) -> tuple[Leaves, Any]:
    """The same by reverse over reverse."""
    _, pullback, aux = jax.vjp(gradient_of(f), leaves, has_aux=True)
    return pullback(list(vs))[0], aux


def transposed(linear: Callable[[Leaves], Leaves], at: Leaves) -> Callable[[Leaves], Leaves]:
    """The transpose of a linear function of leaves like `at`."""
    return lambda us: jax.linear_transpose(linear, list(at))(list(us))[0]


def has_primitive(name: str, jaxpr: Any) -> bool:
    """Whether an operation of that name stands in a jaxpr, at any depth."""
    return any(equation.primitive.name == name for equation in equations(jaxpr))


def equations(jaxpr: Any) -> Iterator[Any]:
    """The operations of a jaxpr, and of those within them."""
    for equation in jaxpr.eqns:
        yield equation
        yield from inside(equation)


def inside(equation: Any) -> Iterator[Any]:
    """The operations within one, of a loop or a function."""
    for value in jax.tree.leaves(list(equation.params.values())):
        inner = getattr(value, "jaxpr", value)  # a closed jaxpr holds one
        if hasattr(inner, "eqns"):
            yield from equations(inner)


def gradient_of(f: Function) -> Callable[[Leaves], tuple[Leaves, Any]]:
    """The gradient of the one output of `f`, with its aux."""

    def first(xs: Leaves) -> tuple[Any, Any]:
        (y,), aux = f(xs)
        return y, aux

    return jax.grad(first, has_aux=True)


BATCHED_ELEMENTS = 2**29  # 2 GiB in float32
# What a processor's cache keeps from one product to the next, so that a loop over directions does not read it from
# memory again: below, loops are up to 2.4 times as fast (experiments/hvp_scaling.py, results/hvp_scaling.jsonl).
CACHED_ELEMENTS = 2**22


class Chunk(NamedTuple):
    """Directions at once, in compiled and in eager code; None: a compiled loop there too."""

    compiled: int
    eager: int | None


def pushes(chunk_size: int | None) -> Chunk:
    """First-order forward products are small enough to be batched everywhere."""
    return Chunk(chunk_size or PUSHES, chunk_size or PUSHES)


def second_order(chunk_size: int | None, line: Linearised, n: int, k: int) -> Chunk:
    """k products with the Hessian of n entries that was linearised as `line`.

    Compiled for a CPU, batched where what the linearisation keeps does not fit a cache, so that every product of a
    loop reads it anew, where the parameters are a small part of it, and where a batch of it fits the memory; else
    one after the other.
    """
    batched = jax.default_backend() != "cpu" or (
        max(CACHED_ELEMENTS, 5 * n) < line.kept and min(k, DIRECTIONS) * line.kept < BATCHED_ELEMENTS
    )
    return Chunk(chunk_size or (DIRECTIONS if batched else 1), chunk_size or DIRECTIONS)


def pulls(chunk_size: int | None, dtype: Any) -> Chunk:
    """Never batched on a CPU below float64: XLA compiles a batched pullback through a norm wrongly there."""
    if jax.default_backend() == "cpu" and jnp.finfo(dtype).bits < 64:
        return Chunk(1, None)
    return Chunk(chunk_size or DIRECTIONS, chunk_size or DIRECTIONS)


def over_basis(n: int, apply: Callable[[Any], Any], chunk: Chunk, traced: bool) -> Any:
    """`apply(i)` for the unit directions i = 0 ... n - 1, stacked: a chunk of them at a time.

    Compiled code loops (jax.lax.map); eager code runs jax.vmap where it may, since a loop compiles anew at
    each call.
    """
    if traced or chunk.eager is None or n == 0:
        return in_chunks(apply, jnp.arange(n), chunk.compiled)
    starts = range(0, n, chunk.eager)
    parts = [jax.vmap(apply)(jnp.arange(i, min(i + chunk.eager, n))) for i in starts]
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaf: jnp.concatenate(leaf), *parts)


def in_chunks(apply: Callable[[Any], Any], stacked: Any, chunk: int) -> Any:
    """`apply` over a leading axis, at most `chunk` entries at once."""
    if 1 < chunk >= jax.tree.leaves(stacked)[0].shape[0]:
        return jax.vmap(apply)(stacked)
    return jax.lax.map(apply, stacked, batch_size=None if chunk == 1 else chunk)


def is_traced(leaves: Leaves) -> bool:
    """Whether a transform or jit is at work on any of these leaves."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
