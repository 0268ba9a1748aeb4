from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from gradlab._errors import InputError
from gradlab.transforms.jacobians import Mode
from gradlab.transforms.jacobians.modes import FORWARD_UP_TO, one_of
from gradlab.transforms.linearised._torch import in_chunks, linearise, over_basis, pushforward
from gradlab.transforms.operators import DIRECTIONS, PUSHES, LinearOperator, check_chunk_size, check_fits
from gradlab.transforms.trees._torch import Tree, nested, nested_columns, tree_function


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
    line = linearise(function, tree.leaves, f, many=True)
    y = output(line.outputs)
    check_fits("jacobian", (y.size, tree.size), tree)

    def forward() -> Any:
        push = pushforward(function, tree.leaves, line)
        columns = [part for _, part in over_basis(tree, y, push, chunk_size or PUSHES)]
        return nested_columns(y, tree, [tree.stack(leaf) for leaf in zip(*columns, strict=True)])

    def reverse() -> Any:
        rows = [part for _, part in over_basis(y, tree, line.pull, chunk_size or DIRECTIONS)]
        return nested(y, tree, [tree.stack(leaf) for leaf in zip(*rows, strict=True)])

    J = one_of(forward, reverse, mode, tree.size < FORWARD_UP_TO * y.size, NotImplementedError)
    return (J, line.aux) if has_aux else J


def jacobian_operator(
    f: Callable[..., Any], x: Any, *args: Any, has_aux: bool = False, chunk_size: int | None = None
) -> LinearOperator:
    """The linearised function, kept: pushforward and pullback."""
    check_chunk_size("jacobian_operator", chunk_size)
    tree = Tree("jacobian_operator", "x", x)
    function, output = tree_function("jacobian_operator", f, tree, args, has_aux)
    line = linearise(function, tree.leaves, f)
    y = output(line.outputs)
    kept = {"chunk_size": chunk_size, "aux": line.aux}
    push = lambda V, chunk: in_chunks(line.push, V, chunk)
    pull = lambda U, chunk: in_chunks(line.pull, U, chunk)
    transposed = lambda J: LinearOperator(y, tree, line.pull, pull, lambda _: J, **kept)
    return LinearOperator(tree, y, line.push, push, transposed, **kept)
