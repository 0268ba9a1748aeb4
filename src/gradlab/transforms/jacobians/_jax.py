from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import jax

from gradlab._errors import InputError
from gradlab.transforms.jacobians import Mode
from gradlab.transforms.jacobians.modes import FORWARD_UP_TO, FORWARD_UP_TO_LOOPED, one_of
from gradlab.transforms.linearised._jax import (
    in_chunks,
    is_traced,
    linearise,
    over_basis,
    pulls,
    pushes,
)
from gradlab.transforms.operators import LinearOperator, check_chunk_size, check_fits
from gradlab.transforms.trees._jax import Tree, nested, nested_columns, tree_function


def jacobian(
    f: Callable[..., Any],
    x: Any,
    *args: Any,
    has_aux: bool = False,
    mode: Mode = "auto",
    chunk_size: int | None = None,
) -> Any:
    """Rows by the pullback of each output, or columns by the pushforward of each input."""
    check_chunk_size("jacobian", chunk_size)
    if mode not in get_args(Mode):
        raise InputError(f"jacobian: unknown mode {mode!r}; pass one of {', '.join(get_args(Mode))}")
    tree = Tree("jacobian", "x", x)
    function, output = tree_function("jacobian", f, tree, args, has_aux)
    line = linearise(function, tree.leaves)
    y = output(line.outputs)
    check_fits("jacobian", (y.size, tree.size), tree)
    traced = is_traced(line.outputs)
    pulled = pulls(chunk_size, y.dtype)
    pushed = pushes(chunk_size) if line.forward else pulled

    def forward() -> Any:
        return nested_columns(
            y, tree, over_basis(tree.size, lambda i: line.push(tree.unit(i)), pushed, traced)
        )

    def reverse() -> Any:
        return nested(y, tree, over_basis(y.size, lambda i: line.pull(y.unit(i)), pulled, traced))

    most = FORWARD_UP_TO_LOOPED if pulled.eager is None else FORWARD_UP_TO
    wide = tree.size < most * y.size
    J = one_of(forward, reverse, mode, wide, ValueError)  # no reverse mode of a while_loop
    return (J, line.aux) if has_aux else J


def jacobian_operator(
    f: Callable[..., Any], x: Any, *args: Any, has_aux: bool = False, chunk_size: int | None = None
) -> LinearOperator:
    """The linearised function, kept and compiled at its first use: pushforward and pullback."""
    check_chunk_size("jacobian_operator", chunk_size)
    tree = Tree("jacobian_operator", "x", x)
    function, output = tree_function("jacobian_operator", f, tree, args, has_aux)
    line = linearise(function, tree.leaves)
    y = output(line.outputs)
    pulled = lambda chunk: pulls(chunk, y.dtype).compiled
    pushed = lambda chunk: pushes(chunk).compiled if line.forward else pulled(chunk)
    push = jax.jit(lambda V, chunk: in_chunks(line.push, V, pushed(chunk)), static_argnums=1)
    pull = jax.jit(lambda U, chunk: in_chunks(line.pull, U, pulled(chunk)), static_argnums=1)
    kept = {"chunk_size": chunk_size, "aux": line.aux}
    one = jax.jit(line.pull)
    transposed = lambda J: LinearOperator(y, tree, one, pull, lambda _: J, **kept)
    return LinearOperator(tree, y, jax.jit(line.push), push, transposed, **kept)
