from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from gradlab._dispatch import refuse_foreign
from gradlab._errors import InputError, KindError, StrategyError
from gradlab._typing import Function, Leaves


class Tree:
    """A torch pytree and its float tensors, in the order of torch's own pytree leaves."""

    def __init__(self, op: str, name: str, tree: Any):
        if not is_compiling() and torch.is_inference_mode_enabled():  # derivatives would be silent zeros
            raise StrategyError(f"{op}: torch.inference_mode records no derivatives; use torch.no_grad")
        leaves, self.spec = flatten(tree)
        self.op, self.name = op, name
        self.leaves: Leaves
        if (
            leaves
            and _PLAIN.issuperset(map(type, leaves))
            and all(map(torch.Tensor.is_floating_point, leaves))
            and (is_compiling() or not any(map(_is_sparse, leaves)))
        ):
            self.all = self.leaves = leaves
            self.places: Sequence[int] = range(len(leaves))
        else:
            self._choose(leaves)

    def _choose(self, leaves: list[Any]) -> None:
        """Pick the float tensors among leaves of any kind."""
        op, name = self.op, self.name
        if not leaves:
            raise InputError(f"{op}: {name} is an empty tree; pass at least one float tensor")
        if not any(isinstance(leaf, (torch.Tensor, np.ndarray)) for leaf in leaves):
            leaves = [torch.as_tensor(leaf) if isinstance(leaf, float) else leaf for leaf in leaves]
        self.all = [as_tensor(leaf) for leaf in leaves]
        self.places = [i for i, leaf in enumerate(self.all) if _is_float(leaf)]
        self.leaves = [self.all[i] for i in self.places]
        if any(isinstance(leaf, torch.Tensor) and leaf.layout is not torch.strided for leaf in self.all):
            raise KindError(
                f"{op}: {name} holds a sparse tensor; differentiate by its values, or by .to_dense()"
            )
        if any(_is_complex(leaf) for leaf in self.all):
            raise KindError(
                f"{op}: {name} holds complex numbers; differentiate by the real and imaginary parts"
            )
        if not self.leaves:
            for leaf in leaves:
                refuse_foreign(op, name, leaf, "torch")
                if isinstance(leaf, torch.nn.Module):
                    raise KindError(
                        f"{op}: {name} is a module; pass its parameters: apply, params = gradlab.functional(model)"
                    )
            kinds = ", ".join(sorted({str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in leaves}))
            raise KindError(f"{op}: {name} holds no float tensor to differentiate (only {kinds}); convert it")

    @property
    def forms(self) -> list[tuple[Any, ...] | None]:
        """Shape and dtype of each leaf."""
        return list(map(_form, self.leaves))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(leaf.shape) for leaf in self.leaves]

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        return sum(self.sizes)

    @property
    def dtype(self) -> torch.dtype:
        kinds = [leaf.dtype for leaf in self.leaves]
        while len(kinds) > 1:
            kinds.append(torch.promote_types(kinds.pop(), kinds.pop()))
        return kinds[0]

    def put(self, leaves: Sequence[Any]) -> Any:
        """The tree with `leaves` for its float tensors: what the user's function takes."""
        return unflatten(self.spec, self._filled(self.all, leaves))

    def like(self, leaves: Sequence[Any]) -> Any:
        """A result tree: `leaves` in their places, None where a leaf was held constant."""
        return unflatten(self.spec, self._filled([None] * len(self.all), leaves))

    def _filled(self, around: Sequence[Any], leaves: Sequence[Any]) -> Sequence[Any]:
        if len(leaves) == len(around):
            return leaves
        filled = list(around)
        for i, leaf in zip(self.places, leaves, strict=True):
            filled[i] = leaf
        return filled

    def direction(self, v: Any, name: str = "v", batch: bool = False) -> Leaves:
        """The leaves of a direction shaped like the tree (under one leading axis if `batch`)."""
        leaves, spec = flatten(v)
        if spec != self.spec:
            leaves = self._matched(v, name)
        if len(leaves) > len(self.leaves):
            leaves = [leaves[i] for i in self.places]
        if not batch and list(map(_form, leaves)) == self.forms:
            return leaves
        leaves = [
            leaf if isinstance(leaf, torch.Tensor) else self._converted(leaf, x, name)
            for leaf, x in zip(leaves, self.leaves, strict=True)
        ]
        lead = leaves[0].shape[:1] if batch else ()
        for leaf, x, i in zip(leaves, self.leaves, self.places, strict=True):
            if leaf.shape != (lead + x.shape if batch else x.shape) or (
                batch and leaf.numel() == 0 < x.numel()
            ):
                raise InputError(
                    f"{self.op}: {self.leaf_name(i, name)} has shape {tuple(leaf.shape)}, "
                    f"{self.leaf_name(i)} has shape {tuple(x.shape)}; pass "
                    f"{'directions stacked on one leading axis, each' if batch else 'a direction'} "
                    f"shaped like {self.name}"
                )
            if leaf.dtype != x.dtype:
                raise KindError(
                    f"{self.op}: {self.leaf_name(i, name)} has dtype {leaf.dtype}, "
                    f"{self.leaf_name(i)} has dtype {x.dtype}; convert the direction with .to"
                )
        return leaves

    def _converted(self, leaf: Any, x: Any, name: str) -> Any:
        refuse_foreign(self.op, name, leaf, "torch")
        try:
            return torch.as_tensor(leaf, dtype=x.dtype, device=x.device)
        except (TypeError, ValueError, RuntimeError):
            raise KindError(
                f"{self.op}: {name} holds a {type(leaf).__name__} where {self.name} has a tensor; "
                f"pass a direction like {self.name}"
            ) from None

    def _matched(self, v: Any, name: str) -> list[Any]:
        """The leaves of `v` in the order of this tree, where the quick comparison of structures failed."""
        x = unflatten(self.spec, self.all)
        v = reordered(v, x)
        (leaves, given), needed = pytree.tree_flatten(v), pytree.tree_structure(x)
        if given != needed:
            raise InputError(
                f"{self.op}: {name} has the structure {given}, {self.name} has {needed}; "
                f"pass a direction with the structure of {self.name}"
            )
        return leaves

    def leaf_name(self, i: int, name: str | None = None) -> str:
        """The path of leaf i, as in x['w']."""
        paths = pytree.tree_flatten_with_path(unflatten(self.spec, self.all))[0]
        return (name or self.name) + pytree.keystr(paths[i][0])

    def read(self, v: Any, name: str = "v", batch: bool = False) -> tuple[Leaves, Callable[..., Any]]:
        """The leaves of a direction given as a tree or as a flat vector, and how to shape a result alike."""
        vector = (
            isinstance(v, (torch.Tensor, np.ndarray)) and v.ndim == 1 + batch and v.shape[-1] == self.size
        )
        if vector and not (self.spec is LEAF and self.shapes == [(self.size,)]):
            return self.split(as_tensor(v)), Tree.ravel
        return self.direction(v, name, batch), Tree.like

    def ravel(self, leaves: Leaves) -> Any:
        """One flat vector (behind any leading axis) from leaves."""
        lead = leaves[0].shape[: leaves[0].ndim - self.leaves[0].ndim]
        rows = [leaf.reshape(*lead, n) for leaf, n in zip(leaves, self.sizes, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)

    def split(self, flat: Any) -> Leaves:
        """Leaves from one flat vector (behind any leading axis)."""
        parts = [flat] if len(self.leaves) == 1 else torch.split(flat, self.sizes, dim=-1)
        return [
            part.reshape(flat.shape[:-1] + x.shape).to(x) for part, x in zip(parts, self.leaves, strict=True)
        ]

    def basis(self, start: int, stop: int) -> Leaves:
        """The unit directions number `start` to `stop`, stacked."""
        rows = torch.zeros(stop - start, self.size, dtype=self.dtype, device=self.leaves[0].device)
        rows.diagonal(start).fill_(1)
        return self.split(rows)

    def stack(self, rows: Sequence[Any]) -> Any:
        """Batches of rows as one array."""
        return rows[0] if len(rows) == 1 else torch.cat(list(rows))

    def zeros(self, shape: tuple[int, ...]) -> Any:
        return torch.zeros(shape, dtype=self.dtype, device=self.leaves[0].device)

    @property
    def numpy_dtype(self) -> np.dtype:
        """The numpy dtype of the flat vector; float32 stands in for what numpy lacks (bfloat16)."""
        return np.dtype(str(self.dtype).removeprefix("torch.").replace("bfloat16", "float32"))

    def from_numpy(self, flat: np.ndarray) -> Any:
        return torch.as_tensor(flat, dtype=self.dtype, device=self.leaves[0].device)

    def to_numpy(self, flat: Any) -> np.ndarray:
        return flat.detach().cpu().to(getattr(torch, str(self.numpy_dtype))).numpy()

    def memory(self) -> int | None:
        """Bytes of memory of an accelerator that holds the leaves; None for the host."""
        device = self.leaves[0].device
        if device.type != "cuda" or torch.compiler.is_compiling():
            return None
        return torch.cuda.get_device_properties(device).total_memory


def nested(rows: Tree, columns: Tree, stacked: Leaves) -> Any:
    """A tree of trees from a matrix given as stacked rows: one tensor (rows.size, *shape) a column leaf."""
    blocks = [torch.split(leaf, rows.sizes) for leaf in stacked]
    return rows.like(
        [
            columns.like([block[i].reshape(shape + tuple(block[i].shape[1:])) for block in blocks])
            for i, shape in enumerate(rows.shapes)
        ]
    )


def nested_columns(rows: Tree, columns: Tree, stacked: Leaves) -> Any:
    """A tree of trees from a matrix given as stacked columns: one array (columns.size, *shape) a row leaf."""
    blocks = [torch.split(leaf, columns.sizes) for leaf in stacked]
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
    args = as_tensors(args)

    def function(leaves: Leaves) -> tuple[Leaves, Any]:
        y, aux = f(x.put(leaves), *args), None
        if has_aux:
            y, aux = split_aux(op, y)
        if isinstance(y, torch.Tensor) and y.ndim == 0 and y.is_floating_point():
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
    args = as_tensors(args)
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


# The three shapes of tree that nearly every call has (a tensor; a flat dict, list or tuple of them) are
# taken apart here: torch's pytree needs 7 microseconds for ten leaves, this needs one.
LEAF = "*"
_PLAIN = frozenset({torch.Tensor})
_LEAF_TYPES = frozenset({torch.Tensor, torch.nn.Parameter, np.ndarray, float, int, bool, type(None)})


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves and structure of a tree; `unflatten(structure, leaves)` gives it back."""
    kind: Any = type(tree)
    spec: Any
    if kind in _LEAF_TYPES:
        return [tree], LEAF
    if kind is dict:
        leaves, spec = list(tree.values()), (dict, tuple(tree))
    elif kind is tuple or kind is list:
        leaves, spec = list(tree), (kind, len(tree))
    else:
        return pytree.tree_flatten(tree)
    if _LEAF_TYPES.issuperset(map(type, leaves)):
        return leaves, spec
    return pytree.tree_flatten(tree)


def unflatten(spec: Any, leaves: Sequence[Any]) -> Any:
    """The tree of this structure with these leaves."""
    if spec is LEAF:
        return leaves[0]
    if isinstance(spec, tuple):
        kind, keys = spec
        return dict(zip(keys, leaves, strict=True)) if kind is dict else kind(leaves)
    return pytree.tree_unflatten(leaves, spec)


def _form(leaf: Any) -> tuple[Any, ...] | None:
    return (leaf.shape, leaf.dtype) if type(leaf) is torch.Tensor else None


def reordered(v: Any, x: Any) -> Any:
    """v with its dictionaries of the kind and in the order of those of x."""
    if isinstance(v, dict) and isinstance(x, dict) and set(v) == set(x):
        return type(x)((key, reordered(v[key], x[key])) for key in x)
    if type(v) is type(x) and type(v) in (list, tuple) and len(v) == len(x):
        return type(v)(reordered(a, b) for a, b in zip(v, x, strict=True))
    return v


def spread(upper: Any, tree: Any) -> list[Any]:
    """What the upper part of a tree says of each leaf, in the order of the leaves; [] where it does not fit."""
    if isinstance(upper, dict) and isinstance(tree, dict):
        pairs = [(upper[key], tree[key]) for key in tree] if set(upper) == set(tree) else []
    elif isinstance(upper, (list, tuple)):
        pairs = (
            list(zip(upper, tree, strict=True))
            if type(upper) is type(tree) and len(upper) == len(tree)
            else []
        )
    elif type(upper) is type(tree) and type(upper) in pytree.SUPPORTED_NODES:
        children = pytree.SUPPORTED_NODES[type(upper)].flatten_fn
        pairs = list(zip(children(upper)[0], children(tree)[0], strict=False))
    else:
        return [] if isinstance(upper, dict) else [upper] * len(pytree.tree_leaves(tree))
    return [flag for pair in pairs for flag in spread(*pair)]


def as_tensor(leaf: Any) -> Any:
    """A copy of a numpy array as a tensor, which a later change of the array does not reach; else as it stands."""
    return torch.tensor(leaf) if isinstance(leaf, np.ndarray) else leaf


def as_tensors(args: Any) -> list[Any]:
    """Data with tensors for its numpy arrays, at any depth."""
    return [as_tensor(arg) if type(arg) in _LEAF_TYPES else pytree.tree_map(as_tensor, arg) for arg in args]


_is_sparse = attrgetter("is_sparse")


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _is_complex(leaf: Any) -> bool:
    return isinstance(leaf, complex) or (isinstance(leaf, torch.Tensor) and leaf.is_complex())
