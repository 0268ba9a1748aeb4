from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gradlab.transforms.operators import DIRECTIONS

Leaves = Sequence[Any]
Function = Callable[[Leaves], tuple[Leaves, Any]]


@dataclass
class Linearised:
    """Outputs and aux of a function at a point, and the two linear maps of its derivative J there.

    `push(vs)` is J v and `pull(us)` is Jᵀ u, the transpose of one another.
    """

    outputs: Leaves
    aux: Any
    push: Callable[[Leaves], Leaves]
    pull: Callable[[Leaves], Leaves]


def linearise(f: Function, leaves: Leaves, *, gradient: bool = False) -> Linearised:
    """Linearise `f(leaves) -> (outputs, aux)`, or with `gradient=True` the gradient of its one output.

    By jax.linearize, and by jax.vjp where a `jax.custom_vjp` inside f refuses forward mode.
    """
    leaves = list(leaves)
    if gradient:
        outputs, push, aux = jax.linearize(gradient_of(f), leaves, has_aux=True)
        return Linearised(outputs, aux, push, push)
    try:
        outputs, push, aux = jax.linearize(f, leaves, has_aux=True)
        return Linearised(outputs, aux, push, transposed(push, leaves))
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
    outputs, pullback, aux = jax.vjp(f, leaves, has_aux=True)
    pull = lambda us: pullback(list(us))[0]
    return Linearised(outputs, aux, transposed(pull, outputs), pull)


def transposed(linear: Callable[[Leaves], Leaves], at: Leaves) -> Callable[[Leaves], Leaves]:
    """The transpose of a linear function of leaves like `at`."""
    return lambda us: jax.linear_transpose(linear, list(at))(list(us))[0]


def gradient_of(f: Function) -> Callable[[Leaves], tuple[Leaves, Any]]:
    """The gradient of the one output of `f`, with its aux."""

    def first(xs: Leaves) -> tuple[Any, Any]:
        (y,), aux = f(xs)
        return y, aux

    return jax.grad(first, has_aux=True)


def over_basis(n: int, apply: Callable[[Any], Any], chunk: int, traced: bool) -> Any:
    """`apply(i)` for the unit directions i = 0 ... n - 1, stacked: a chunk of them at a time.

    Compiled code loops (jax.lax.map); eager code runs jax.vmap, which does not compile anew at each call.
    """
    if traced:
        return in_chunks(apply, jnp.arange(n), chunk)
    chunk = max(chunk, min(n, DIRECTIONS)) if chunk == 1 else chunk
    parts = [jax.vmap(apply)(jnp.arange(i, min(i + chunk, n))) for i in range(0, n, chunk)]
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaf: jnp.concatenate(leaf), *parts)


def in_chunks(apply: Callable[[Any], Any], stacked: Any, chunk: int) -> Any:
    """`apply` over a leading axis, at most `chunk` entries at once."""
    if chunk >= jax.tree.leaves(stacked)[0].shape[0]:
        return jax.vmap(apply)(stacked)
    return jax.lax.map(apply, stacked, batch_size=None if chunk == 1 else chunk)


def second_order_chunk(chunk_size: int | None) -> int:
    """Second-order products at once: on a CPU one after the other, on an accelerator many.

    A CPU's caches hold one direction's intermediates and not many: 1.2-1.6 gradients a direction against
    1.6-2.0 batched. First-order products are small enough to be batched everywhere.
    """
    return chunk_size or (1 if jax.default_backend() == "cpu" else DIRECTIONS)


def is_traced(leaves: Leaves) -> bool:
    """Whether a transform or jit is at work on any of these leaves."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
