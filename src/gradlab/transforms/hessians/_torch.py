from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch

from gradlab._errors import InputError, StrategyError
from gradlab.transforms.hessians import Strategy
from gradlab.transforms.linearised._torch import (
    in_chunks,
    linearise,
    linearise_along,
    materialised,
    over_basis,
    product_of_gradient,
    tensors_only,
)
from gradlab.transforms.operators import DIRECTIONS, LinearOperator, check_chunk_size, check_fits
from gradlab.transforms.repairs._torch import Level, Repair, repaired
from gradlab.transforms.trees._torch import Tree, nested, scalar_function, tree_function


def hvp(
    f: Callable[..., Any], x: Any, v: Any, *args: Any, has_aux: bool = False, strategy: Strategy = "auto"
) -> Any:
    """Reverse over reverse: a kept autograd graph in eager code, torch.func in transforms and compiled."""
    tree = Tree("hvp", "x", x)
    vs = tree.direction(v)
    function = scalar_function("hvp", f, tree, args, has_aux)
    if strategy in ("auto", "reverse_over_reverse"):
        product, aux = product_of_gradient(function, tree.leaves, f, vs)
    else:
        product, aux = _by_forward(function, tree.leaves, vs, strategy)
    return (tree.like(product), aux) if has_aux else tree.like(product)


def _by_forward(function: Any, leaves: Any, vs: Any, strategy: str) -> Any:
    if strategy not in get_args(Strategy):
        raise InputError(f"hvp: unknown strategy {strategy!r}; pass one of {', '.join(get_args(Strategy))}")
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0:
        raise StrategyError(
            f"hvp: strategy {strategy!r} can be silently wrong in torch {torch.__version__} under torch.compile "
            "and inside jvp; use 'reverse_over_reverse', or 'auto', which takes it"
        )
    repair = Repair(Level.ALL)
    value, restore = tensors_only(lambda xs: _first(repaired(function, repair)(xs)))
    if strategy == "forward_over_reverse":
        gradient = torch.func.grad(value, has_aux=True)
        along: Any = torch.func.jvp(gradient, (leaves,), (vs,), has_aux=True)
        _, product, aux = along
    else:

        def directional(xs: Any) -> Any:
            return torch.func.jvp(value, (xs,), (vs,), has_aux=True)[1:]

        product, aux = torch.func.grad(directional, has_aux=True)(leaves)
    if not repair.forward:
        raise StrategyError(
            f"hvp: strategy {strategy!r} can be silently wrong where f uses forward mode of its own, "
            "torch.no_grad, a hook, or an operation whose forward derivative is not right "
            "(docs/decisions.md); use 'reverse_over_reverse', or 'auto', which takes it"
        )
    return [materialised(leaf) for leaf in product], restore(aux)


def _first(result: Any) -> Any:
    (y,), aux = result
    return y, aux


def hessian(
    f: Callable[..., Any], x: Any, *args: Any, has_aux: bool = False, chunk_size: int | None = None
) -> Any:
    """The linearised gradient, pulled back along unit directions, many at once."""
    check_chunk_size("hessian", chunk_size)
    tree = Tree("hessian", "x", x)
    check_fits("hessian", (tree.size, tree.size), tree)
    gradient = linearise(
        scalar_function("hessian", f, tree, args, has_aux), tree.leaves, f, gradient=True, many=True
    )
    rows = over_basis(tree, tree, gradient.pull, chunk_size or DIRECTIONS)
    H = nested(tree, tree, [tree.stack(leaf) for leaf in zip(*(part for _, part in rows), strict=True)])
    return (H, gradient.aux) if has_aux else H


def hessian_diagonal(
    f: Callable[..., Any], x: Any, *args: Any, has_aux: bool = False, chunk_size: int | None = None
) -> Any:
    """The entries eᵢ·(H eᵢ) of products with unit directions, many at once; no matrix is kept."""
    check_chunk_size("hessian_diagonal", chunk_size)
    tree = Tree("hessian_diagonal", "x", x)
    gradient = linearise(
        scalar_function("hessian_diagonal", f, tree, args, has_aux), tree.leaves, f, gradient=True, many=True
    )
    parts = [
        tree.ravel(rows).diagonal(start)
        for start, rows in over_basis(tree, tree, gradient.pull, chunk_size or DIRECTIONS)
    ]
    diagonal = tree.like(tree.split(tree.stack(parts)))
    return (diagonal, gradient.aux) if has_aux else diagonal


def hessian_operator(
    f: Callable[..., Any], x: Any, *args: Any, has_aux: bool = False, chunk_size: int | None = None
) -> LinearOperator:
    """The linearised gradient, kept."""
    check_chunk_size("hessian_operator", chunk_size)
    tree = Tree("hessian_operator", "x", x)
    gradient = linearise(
        scalar_function("hessian_operator", f, tree, args, has_aux), tree.leaves, f, gradient=True
    )
    return _symmetric(tree, gradient.pull, chunk_size, gradient.aux)


def _symmetric(tree: Tree, apply: Callable[..., Any], chunk_size: int | None, aux: Any) -> LinearOperator:
    return LinearOperator(
        tree,
        tree,
        apply,
        lambda V, chunk: in_chunks(apply, V, chunk),
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
    """J v by forward mode in eager code, by reverse mode twice elsewhere; then ∇² loss; then the pullback."""
    tree = Tree("ggn_vp", "x", x)
    vs = tree.direction(v)
    function, output = tree_function("ggn_vp", model, tree, args, has_aux)
    line, Jv = linearise_along(function, tree.leaves, model, vs)
    outer = scalar_function("ggn_vp", loss, output(line.outputs), (), False)
    curved, _ = product_of_gradient(outer, line.outputs, loss, Jv)
    product = tree.like(line.pull(curved, last=True))
    return (product, line.aux) if has_aux else product


def ggn_operator(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    x: Any,
    *args: Any,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> LinearOperator:
    """The linearised model and the linearised gradient of the loss, kept."""
    check_chunk_size("ggn_operator", chunk_size)
    tree = Tree("ggn_operator", "x", x)
    function, output = tree_function("ggn_operator", model, tree, args, has_aux)
    line = linearise(function, tree.leaves, model)
    curvature = linearise(
        scalar_function("ggn_operator", loss, output(line.outputs), (), False),
        line.outputs,
        loss,
        gradient=True,
    )

    def apply(vs: Any, many: bool = False) -> Any:
        return line.pull(curvature.pull(line.push(vs, many), many), many)

    return _symmetric(tree, apply, chunk_size, line.aux)
