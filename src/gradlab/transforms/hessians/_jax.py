from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import jax

from gradlab._errors import InputError
from gradlab.transforms.hessians import Strategy
from gradlab.transforms.linearised._jax import (
    by_reverse,
    gradient_of,
    in_chunks,
    is_traced,
    linearise,
    over_basis,
    product_of_gradient,
    pulls,
    second_order,
)
from gradlab.transforms.operators import LinearOperator, check_chunk_size, check_fits
from gradlab.transforms.trees._jax import Tree, nested, scalar_function, tree_function


def hvp(
    f: Callable[..., Any], x: Any, v: Any, *args: Any, has_aux: bool = False, strategy: Strategy = "auto"
) -> Any:
    """Forward over reverse: jax.jvp of jax.grad."""
    tree = Tree("hvp", "x", x)
    vs = tree.direction(v)
    function = scalar_function("hvp", f, tree, args, has_aux)
    if strategy == "auto":
        product, aux = product_of_gradient(function, tree.leaves, vs)
    else:
        product, aux = _by_name(function, tree.leaves, vs, strategy)
    return (tree.like(product), aux) if has_aux else tree.like(product)


def _by_name(function: Any, leaves: Any, vs: Any, strategy: str) -> tuple[Any, Any]:
    if strategy not in get_args(Strategy):
        raise InputError(f"hvp: unknown strategy {strategy!r}; pass one of {', '.join(get_args(Strategy))}")
    if strategy == "forward_over_reverse":
        _, product, aux = jax.jvp(gradient_of(function), (leaves,), (vs,), has_aux=True)
    elif strategy == "reverse_over_reverse":
        product, aux = by_reverse(function, leaves, vs)
    else:

        def directional(xs: Any) -> tuple[Any, Any]:
            _, slopes, aux = jax.jvp(function, (xs,), (vs,), has_aux=True)
            return slopes, aux

        product, aux = gradient_of(directional)(leaves)
    return product, aux


def hessian(
    f: Callable[..., Any], x: Any, *args: Any, has_aux: bool = False, chunk_size: int | None = None
) -> Any:
    """The linearised gradient, pushed forward along unit directions."""
    check_chunk_size("hessian", chunk_size)
    tree = Tree("hessian", "x", x)
    check_fits("hessian", (tree.size, tree.size), tree)
    gradient = linearise(scalar_function("hessian", f, tree, args, has_aux), tree.leaves, gradient=True)
    traced = is_traced(gradient.outputs)
    chunk = second_order(chunk_size, gradient, tree.size, tree.size)
    rows = over_basis(tree.size, lambda i: gradient.push(tree.unit(i)), chunk, traced)
    H = nested(tree, tree, rows)
    return (H, gradient.aux) if has_aux else H


def hessian_diagonal(
    f: Callable[..., Any], x: Any, *args: Any, has_aux: bool = False, chunk_size: int | None = None
) -> Any:
    """The entries eᵢ·(H eᵢ) of products with unit directions; no matrix is kept."""
    check_chunk_size("hessian_diagonal", chunk_size)
    tree = Tree("hessian_diagonal", "x", x)
    gradient = linearise(
        scalar_function("hessian_diagonal", f, tree, args, has_aux), tree.leaves, gradient=True
    )
    traced = is_traced(gradient.outputs)
    entry = lambda i: tree.ravel(gradient.push(tree.unit(i)))[i] if tree.size else 0.0
    chunk = second_order(chunk_size, gradient, tree.size, tree.size)
    diagonal = tree.like(tree.split(over_basis(tree.size, entry, chunk, traced)))
    return (diagonal, gradient.aux) if has_aux else diagonal


def hessian_operator(
    f: Callable[..., Any], x: Any, *args: Any, has_aux: bool = False, chunk_size: int | None = None
) -> LinearOperator:
    """The linearised gradient, kept and compiled at its first use."""
    check_chunk_size("hessian_operator", chunk_size)
    tree = Tree("hessian_operator", "x", x)
    gradient = linearise(
        scalar_function("hessian_operator", f, tree, args, has_aux), tree.leaves, gradient=True
    )
    at_once = lambda chunk, k: second_order(chunk, gradient, tree.size, k).compiled
    return _symmetric(tree, gradient.push, at_once, chunk_size, gradient.aux)


def _symmetric(
    tree: Tree,
    apply: Callable[..., Any],
    at_once: Callable[[int | None, int], int],
    chunk_size: int | None,
    aux: Any,
) -> LinearOperator:
    return LinearOperator(
        tree,
        tree,
        jax.jit(apply),
        jax.jit(lambda V, chunk: in_chunks(apply, V, at_once(chunk, len(V[0]))), static_argnums=1),
        lambda H: H,
        chunk_size=chunk_size,
        aux=aux,
    )


def ggn_vp(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    x: Any,
    v: Any,
    *args: Any,
    has_aux: bool = False,
) -> Any:
    """J v by the linearised model, ∇² loss forward over reverse, Jᵀ by transposition."""
    tree = Tree("ggn_vp", "x", x)
    vs = tree.direction(v)
    function, output = tree_function("ggn_vp", model, tree, args, has_aux)
    line = linearise(function, tree.leaves)
    outer = scalar_function("ggn_vp", loss, output(line.outputs), (), False)
    curved, _ = product_of_gradient(outer, line.outputs, line.push(vs))
    product = tree.like(line.pull(curved))
    return (product, line.aux) if has_aux else product


def ggn_operator(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    x: Any,
    *args: Any,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> LinearOperator:
    """The linearised model and the linearised gradient of the loss, kept and compiled at first use."""
    check_chunk_size("ggn_operator", chunk_size)
    tree = Tree("ggn_operator", "x", x)
    function, output = tree_function("ggn_operator", model, tree, args, has_aux)
    line = linearise(function, tree.leaves)
    curvature = linearise(
        scalar_function("ggn_operator", loss, output(line.outputs), (), False), line.outputs, gradient=True
    )
    apply = lambda vs: line.pull(curvature.push(line.push(vs)))
    at_once = lambda chunk, k: min(
        second_order(chunk, line, tree.size, k).compiled, pulls(chunk, tree.dtype).compiled
    )
    return _symmetric(tree, apply, at_once, chunk_size, line.aux)
