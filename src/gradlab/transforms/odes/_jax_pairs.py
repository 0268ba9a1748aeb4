"""A linear map that is given together with its transpose, under every transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def paired(
    forward: Callable[..., Any],
    transpose: Callable[..., Any],
    at: Any,
    v: Any,
    like: Any,
    again: Callable[..., Any] | None = None,
) -> Any:
    """forward(at, v), linear in v and a tree like `like`, whose transpose is `transpose(at, u)`.

    The derivative in `at` is forward's own. Neither is traced before it is needed. `again` is the transpose of the
    transpose, where that is not `forward` itself.
    """
    at_leaves, at_spec = jax.tree.flatten(at)
    v_leaves, v_spec = jax.tree.flatten(v)
    out_leaves, out_spec = jax.tree.flatten(like)
    n = len(at_leaves)

    def flat(f: Callable[..., Any], spec: Any) -> Callable[..., Any]:
        def run(*leaves: Any) -> Any:
            return jax.tree.leaves(
                f(jax.tree.unflatten(at_spec, leaves[:n]), jax.tree.unflatten(spec, leaves[n:]))
            )

        return run

    maps = flat(forward, v_spec), flat(transpose, out_spec), flat(again or forward, v_spec)
    avals = tuple(jax.core.ShapedArray(y.shape, y.dtype) for y in out_leaves)
    out = paired_p.bind(*at_leaves, *v_leaves, count=n, maps=maps, avals=avals)
    return jax.tree.unflatten(out_spec, out)


paired_p = Primitive("paired_linear_map")
paired_p.multiple_results = True


def run(*leaves: Any, count: int, maps: Any, avals: Any) -> Any:
    return maps[0](*leaves)


def shapes(*_: Any, count: int, maps: Any, avals: Any) -> Any:
    return list(avals)


def derivative(primals: Any, tangents: Any, *, count: int, maps: Any, avals: Any) -> Any:
    bind = lambda *leaves: paired_p.bind(*leaves, count=count, maps=maps, avals=avals)
    at, vs = primals[:count], primals[count:]
    out = bind(*primals)
    moved = [None] * len(out)
    add = lambda rows: [y if m is None else m + y for m, y in zip(moved, rows, strict=True)]
    dvs = tangents[count:]
    if not all(type(d) is ad.Zero for d in dvs):
        moved = add(bind(*at, *map(ad.instantiate_zeros, dvs)))
    live = [
        i for i, d in enumerate(tangents[:count]) if type(d) is not ad.Zero and d.dtype != jax.dtypes.float0
    ]
    if live:

        def along(*some: Any) -> Any:
            here = list(at)
            for i, x in zip(live, some, strict=True):
                here[i] = x
            return maps[0](*here, *vs)

        moved = add(jax.jvp(along, [at[i] for i in live], [tangents[i] for i in live])[1])
    zero = lambda y: ad.Zero(jax.typeof(y).to_tangent_aval())
    return out, [zero(y) if m is None else m for y, m in zip(out, moved, strict=True)]


def transposed(cts: Any, *leaves: Any, count: int, maps: Any, avals: Any) -> Any:
    at, vs = leaves[:count], leaves[count:]
    us = [ad.instantiate_zeros(ct) for ct in cts]
    back = tuple(v.aval for v in vs)
    out = paired_p.bind(*at, *us, count=count, maps=(maps[1], maps[2], maps[1]), avals=back)
    return [None] * count + out


def batched(leaves: Any, dims: Any, *, count: int, maps: Any, avals: Any) -> Any:
    size = next(x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None)
    moved, axes = [], []
    for i, (x, d) in enumerate(zip(leaves, dims, strict=True)):
        if d is None:
            shared = i < count
            moved.append(x if shared else jnp.broadcast_to(x, (size, *x.shape)))
            axes.append(None if shared else 0)
        else:
            moved.append(jnp.moveaxis(x, d, 0))
            axes.append(0)
    many = lambda f: lambda *xs: jax.vmap(f, (*axes[:count], *[0] * (len(xs) - count)), axis_size=size)(*xs)
    wide = tuple(jax.core.ShapedArray((size, *a.shape), a.dtype) for a in avals)
    out = paired_p.bind(*moved, count=count, maps=tuple(map(many, maps)), avals=wide)
    return out, [0] * len(out)


paired_p.def_impl(run)
paired_p.def_abstract_eval(shapes)
ad.primitive_jvps[paired_p] = derivative
ad.primitive_transposes[paired_p] = transposed
batching.primitive_batchers[paired_p] = batched
mlir.register_lowering(paired_p, mlir.lower_fun(run, multiple_results=True))
