"""A function with a derivative of its own: a jax.custom_jvp whose function is a primitive with the same rule.

jax.custom_jvp alone would do but for lax.scan: to hoist what does not depend on the loop, jax traces a linearised
scan's body anew and puts functions in the place of their custom_jvp, so that a second reverse derivative is silently
that of f's own code (jax 0.10.2, `_scan_known_hoisting`). The primitive is whole there. It alone would not do either:
a rule may close over an array under vmap, which custom_jvp's own batching knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Flat = Callable[..., list[Any]]  # of arrays, one positional argument each


def ruled(value: Callable[..., Any], derivative: Callable[..., Any]) -> Callable[..., Any]:
    """value(*operands), trees of arrays, with derivative(primals, tangents) -> (out, tangent) for its derivative.

    As in a jax.custom_jvp with symbolic_zeros, a SymbolicZero stands where nothing moves.
    """

    @jax.custom_jvp
    def kept(*operands: Any) -> Any:
        leaves, spec = jax.tree.flatten(operands)
        structure: Any = None

        def flat_value(*xs: Any) -> list[Any]:
            nonlocal structure
            ys, structure = jax.tree.flatten(value(*jax.tree.unflatten(spec, xs)))
            return list(map(jnp.asarray, ys))

        def flat_derivative(xs: Sequence[Any], ts: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            out, tangent = derivative(jax.tree.unflatten(spec, xs), jax.tree.unflatten(spec, ts))
            return jax.tree.leaves(out), jax.tree.leaves(tangent)

        ys = ruled_p.bind(*map(jnp.asarray, leaves), value=flat_value, derivative=flat_derivative)
        return jax.tree.unflatten(structure, ys)

    kept.defjvp(derivative, symbolic_zeros=True)
    return kept


def is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def zero_tangent(y: Any) -> Any:
    """Zeros like y; of the type float0 where y does not move."""
    if is_inexact(y):
        return jnp.zeros(jnp.shape(y), jnp.result_type(y))
    return np.zeros(jnp.shape(y), jax.dtypes.float0)


def _run(*xs: Any, value: Flat, derivative: Any) -> list[Any]:
    return value(*xs)


def _shapes(*avals: Any, value: Flat, derivative: Any) -> tuple[Any, Any]:
    jaxpr = jax.make_jaxpr(value)(*avals)
    return jaxpr.out_avals, jaxpr.effects


def _jvp(primals: Any, tangents: Any, *, value: Flat, derivative: Any) -> tuple[list[Any], list[Any]]:
    symbolic = [SymbolicZero(t.aval) if type(t) is ad.Zero else t for t in tangents]
    ys, ts = derivative(primals, symbolic)
    zero = lambda y: ad.Zero(jax.typeof(y).to_tangent_aval())
    moves = lambda y, t: is_inexact(y) and not isinstance(t, SymbolicZero)
    return ys, [t if moves(y, t) else zero(y) for y, t in zip(ys, ts, strict=True)]


def _batched(axis: Any, args: Any, dims: Any, *, value: Flat, derivative: Any) -> tuple[list[Any], list[Any]]:
    if all(d is None for d in dims):
        ys = ruled_p.bind(*args, value=value, derivative=derivative)
        return ys, [None] * len(ys)
    name = axis.name if isinstance(axis.name, str) else None
    options = {"axis_size": axis.size, "axis_name": name, "spmd_axis_name": axis.spmd_name}

    def derivatives(xs: Sequence[Any], ts: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        live = [i for i, t in enumerate(ts) if not isinstance(t, SymbolicZero)]

        def one(xs: Sequence[Any], some: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            full: list[Any] = [SymbolicZero(jax.typeof(x).to_tangent_aval()) for x in xs]
            for i, t in zip(live, some, strict=True):
                full[i] = t
            ys, tys = derivative(xs, full)
            zeros = [
                zero_tangent(y) if isinstance(t, SymbolicZero) else t for y, t in zip(ys, tys, strict=True)
            ]
            return ys, [t for y, t in zip(ys, zeros, strict=True) if is_inexact(y)]

        mapped = jax.vmap(one, (list(dims), [dims[i] for i in live]), **options)
        ys, some = mapped(list(xs), [ts[i] for i in live])
        rest = iter(some)
        return ys, [next(rest) if is_inexact(y) else zero_tangent(y) for y in ys]

    ys = ruled_p.bind(*args, value=jax.vmap(value, tuple(dims), **options), derivative=derivatives)
    return ys, [0] * len(ys)


def _transposed(cotangents: Any, *args: Any, value: Flat, derivative: Any) -> list[Any]:
    """Of a value that is linear in some arguments: inside a rule that is transposed itself."""
    linear = [i for i, x in enumerate(args) if ad.is_undefined_primal(x)]

    def of_linear(*xs: Any) -> list[Any]:
        full = list(args)
        for i, x in zip(linear, xs, strict=True):
            full[i] = x
        return value(*full)

    like = [jax.ShapeDtypeStruct(args[i].aval.shape, args[i].aval.dtype) for i in linear]
    found: list[Any] = [None] * len(args)
    pulled = jax.linear_transpose(of_linear, *like)(list(map(ad.instantiate_zeros, cotangents)))
    for i, ct in zip(linear, pulled, strict=True):
        found[i] = ct
    return found


ruled_p = Primitive("gradlab_rule")
ruled_p.multiple_results = True
ruled_p.def_impl(_run)
ruled_p.def_effectful_abstract_eval(_shapes)
mlir.register_lowering(ruled_p, mlir.lower_fun(_run, multiple_results=True))
ad.primitive_jvps[ruled_p] = _jvp
ad.primitive_transposes[ruled_p] = _transposed
batching.fancy_primitive_batchers[ruled_p] = _batched
