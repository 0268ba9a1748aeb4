from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradlab._dispatch import refuse_foreign
from gradlab._errors import InputError, KindError
from gradlab._typing import Function, Leaves


class Tree:
    """A jax pytree and its float arrays, in the order of `jax.tree.leaves`."""

    def __init__(self, op: str, name: str, tree: Any):
        leaves, spec = jax.tree.flatten(tree)
        self.spec: Any = spec
        if not leaves:
            raise InputError(f"{op}: {name} is an empty tree; pass at least one float array")
        if not any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves):
            leaves = [jnp.asarray(leaf) if isinstance(leaf, float) else leaf for leaf in leaves]
        self.op, self.name, self.all = op, name, leaves
        self.places = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]
        self.leaves: Leaves = [as_array(leaves[i]) for i in self.places]
        if any(_is_complex(leaf) for leaf in leaves):
            raise KindError(
                f"{op}: {name} holds complex numbers; differentiate by the real and imaginary parts"
            )
        if not self.leaves:
            for leaf in leaves:
                refuse_foreign(op, name, leaf, "jax")
            kinds = ", ".join(sorted({str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in leaves}))
            raise KindError(f"{op}: {name} holds no float array to differentiate (only {kinds}); convert it")

    @cached_property
    def forms(self) -> list[tuple[Any, ...] | None]:
        """Shape and dtype of each leaf."""
        return list(map(_form, self.leaves))

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        return [leaf.shape for leaf in self.leaves]

    @cached_property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @cached_property
    def size(self) -> int:
        return sum(self.sizes)

    @cached_property
    def dtype(self) -> Any:
        return jnp.result_type(*self.leaves)

    def put(self, leaves: Sequence[Any]) -> Any:
        """The tree with `leaves` for its float arrays: what the user's function takes."""
        return jax.tree.unflatten(self.spec, self._filled(self.all, leaves))

    def like(self, leaves: Sequence[Any]) -> Any:
        """A result tree: `leaves` in their places, None where a leaf was held constant."""
        return jax.tree.unflatten(self.spec, self._filled([None] * len(self.all), leaves))

    def _filled(self, around: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
        filled = list(around)
        for i, leaf in zip(self.places, leaves, strict=True):
            filled[i] = leaf
        return filled

    def direction(self, v: Any, name: str = "v", batch: bool = False) -> Leaves:
        """The leaves of a direction shaped like the tree (under one leading axis if `batch`)."""
        spec: Any
        leaves, spec = jax.tree.flatten(v)
        if spec == self.spec:
            leaves = leaves if len(leaves) == len(self.places) else [leaves[i] for i in self.places]
        elif spec != jax.tree.structure(self.like(self.leaves)):
            raise InputError(
                f"{self.op}: {name} has the structure {spec}, {self.name} has {self.spec}; "
                f"pass a direction with the structure of {self.name}"
            )
        if not batch and list(map(_form, leaves)) == self.forms:
            return leaves
        for leaf in leaves:
            if not isinstance(leaf, jax.Array):
                refuse_foreign(self.op, name, leaf, "jax")
        leaves = [as_array(leaf, x.dtype) for leaf, x in zip(leaves, self.leaves, strict=True)]
        lead = leaves[0].shape[:1] if batch else ()
        for leaf, x, i in zip(leaves, self.leaves, self.places, strict=True):
            if leaf.shape != lead + x.shape or leaf.size == 0 < x.size:
                raise InputError(
                    f"{self.op}: {self.leaf_name(i, name)} has shape {leaf.shape}, "
                    f"{self.leaf_name(i)} has shape {x.shape}; pass "
                    f"{'directions stacked on one leading axis, each' if batch else 'a direction'} "
                    f"shaped like {self.name}"
                )
            if leaf.dtype != x.dtype:
                raise KindError(
                    f"{self.op}: {self.leaf_name(i, name)} has dtype {leaf.dtype}, "
                    f"{self.leaf_name(i)} has dtype {x.dtype}; convert the direction with .astype"
                )
        return leaves

    def leaf_name(self, i: int, name: str | None = None) -> str:
        """The path of leaf i, as in x['w']."""
        paths = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(self.spec, self.all))[0]
        return (name or self.name) + jax.tree_util.keystr(paths[i][0])

    def read(self, v: Any, name: str = "v", batch: bool = False) -> tuple[Leaves, Callable[..., Any]]:
        """The leaves of a direction given as a tree or as a flat vector, and how to shape a result alike."""
        vector = isinstance(v, (jax.Array, np.ndarray)) and v.ndim == 1 + batch and v.shape[-1] == self.size
        if vector and not (jax.tree_util.treedef_is_leaf(self.spec) and self.shapes == [(self.size,)]):
            return self.split(jnp.asarray(v)), Tree.ravel
        return self.direction(v, name, batch), Tree.like

    def ravel(self, leaves: Leaves) -> Any:
        """One flat vector (behind any leading axis) from leaves."""
        lead = leaves[0].shape[: leaves[0].ndim - len(self.shapes[0])]
        flat = (leaf.reshape(*lead, n) for leaf, n in zip(leaves, self.sizes, strict=True))
        return jnp.concatenate(list(flat), axis=-1)

    def split(self, flat: Any) -> Leaves:
        """Leaves from one flat vector (behind any leading axis)."""
        parts = jnp.split(flat, np.cumsum(self.sizes)[:-1], axis=-1)
        return [
            part.reshape(flat.shape[:-1] + x.shape).astype(x.dtype)
            for part, x in zip(parts, self.leaves, strict=True)
        ]

    def basis(self, start: int, stop: int) -> Leaves:
        """The unit directions number `start` to `stop`, stacked."""
        return jax.vmap(self.unit)(jnp.arange(start, stop))

    def unit(self, i: Any) -> Leaves:
        """The unit direction number `i`."""
        return self.split(jax.nn.one_hot(i, self.size, dtype=self.dtype))

    def stack(self, rows: Sequence[Any]) -> Any:
        """Batches of rows as one array."""
        return rows[0] if len(rows) == 1 else jnp.concatenate(list(rows))

    def zeros(self, shape: tuple[int, ...]) -> Any:
        return jnp.zeros(shape, self.dtype)

    @property
    def numpy_dtype(self) -> np.dtype:
        """The numpy dtype of the flat vector; float32 stands in for what numpy lacks (bfloat16)."""
        return np.dtype(str(self.dtype).replace("bfloat16", "float32"))

    def from_numpy(self, flat: np.ndarray) -> Any:
        return jnp.asarray(flat, self.dtype)

    def to_numpy(self, flat: Any) -> np.ndarray:
        return np.asarray(flat, self.numpy_dtype)

    def memory(self) -> int | None:
        """Bytes of memory of an accelerator, jax's default device; None for the host."""
        return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def nested(rows: Tree, columns: Tree, stacked: Leaves) -> Any:
    """A tree of trees from a matrix given as stacked rows: one array (rows.size, *shape) a column leaf."""
    blocks = [jnp.split(leaf, np.cumsum(rows.sizes)[:-1]) for leaf in stacked]
    return rows.like(
        [
            columns.like([block[i].reshape(shape + block[i].shape[1:]) for block in blocks])
            for i, shape in enumerate(rows.shapes)
        ]
    )


def nested_columns(rows: Tree, columns: Tree, stacked: Leaves) -> Any:
    """A tree of trees from a matrix given as stacked columns: one array (columns.size, *shape) a row leaf."""
    blocks = [jnp.split(leaf, np.cumsum(columns.sizes)[:-1]) for leaf in stacked]
    return rows.like(
        [
            columns.like(
                [
                    part.reshape(size, math.prod(row)).T.reshape(row + column)
                    for part, size, column in zip(block, columns.sizes, columns.shapes, strict=True)
                ]
            )
            for block, row in zip(blocks, rows.shapes, strict=True)
        ]
    )


def scalar_function(op: str, f: Callable[..., Any], x: Tree, args: Any, has_aux: bool) -> Function:
    """`f(x, *args)` as `leaves -> ([value], aux)`; a value that is not one float is refused."""

    def function(leaves: Leaves) -> tuple[Leaves, Any]:
        y, aux = f(x.put(leaves), *args), None
        if has_aux:
            y, aux = split_aux(op, y)
        if isinstance(y, jax.Array) and y.ndim == 0 and _is_kind(y.dtype, jnp.floating):
            return [y], aux
        outputs = Tree(op, "f's output", y)
        refuse_constants(op, outputs)
        if len(outputs.leaves) != 1 or outputs.leaves[0].ndim != 0:
            given = " and ".join(str(shape) for shape in outputs.shapes)
            raise InputError(
                f"{op}: f must return one scalar, it returned shape {given}; sum it, "
                "or use jacobian for a function with many outputs"
            )
        return outputs.leaves, aux

    return function


def tree_function(
    op: str, f: Callable[..., Any], x: Tree, args: Any, has_aux: bool
) -> tuple[Function, Callable[[Leaves], Tree]]:
    """`f(x, *args)` as `leaves -> (output leaves, aux)`, and the tree of such leaves once it has run."""
    latest: list[Tree] = []

    def function(leaves: Leaves) -> tuple[Leaves, Any]:
        y, aux = f(x.put(leaves), *args), None
        if has_aux:
            y, aux = split_aux(op, y)
        latest[:] = [Tree(op, "f's output", y)]
        refuse_constants(op, latest[0])
        return latest[0].leaves, aux

    return function, lambda outputs: Tree(op, "f's output", latest[0].put(outputs))


def split_aux(op: str, y: Any) -> tuple[Any, Any]:
    if not isinstance(y, tuple) or len(y) != 2:
        raise KindError(f"{op}: with has_aux=True f must return (value, aux), it returned {type(y).__name__}")
    return y


def refuse_constants(op: str, y: Tree) -> None:
    if len(y.leaves) < len(y.all):
        raise KindError(
            f"{op}: f must return float arrays alone; "
            "return anything else as aux: (value, aux), with has_aux=True"
        )


def spread(upper: Any, tree: Any) -> list[Any]:
    """What the upper part of a tree says of each leaf, in the order of the leaves; [] where it does not fit."""
    found: list[Any] = []
    try:
        over = lambda flag, part: found.extend([flag] * len(jax.tree.leaves(part)))
        jax.tree.map(over, upper, tree, is_leaf=lambda flag: flag is None)
    except (ValueError, TypeError):
        return []
    return found


def as_array(leaf: Any, dtype: Any = None) -> Any:
    """A jax array as it stands; anything else converted (jnp.asarray costs a jax array 6 µs)."""
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf, dtype)


def _form(leaf: Any) -> tuple[Any, ...] | None:
    aval = getattr(leaf, "aval", None)  # of an array or tracer
    return None if aval is None else (aval.shape, aval.dtype)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray)) and _is_kind(leaf.dtype, jnp.floating)


def _is_complex(leaf: Any) -> bool:
    array = isinstance(leaf, (jax.Array, np.ndarray))
    return isinstance(leaf, complex) or (array and _is_kind(leaf.dtype, jnp.complexfloating))


@cache
def _is_kind(dtype: Any, kind: Any) -> bool:
    return jnp.issubdtype(dtype, kind)
