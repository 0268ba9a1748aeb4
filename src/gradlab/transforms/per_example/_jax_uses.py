"""What a loss does with the leaves of its parameters, found in its jaxpr.

Where an operation that is linear in a leaf (a product, a convolution, a lookup of rows) takes it together with
an activation x and gives y, the leaf's gradient is a product of x and of the cotangent of y: nothing as large as
the leaf is needed for one example. Such uses are recorded, with a zero added to y whose gradient is that cotangent,
and the leaf itself is held. Whatever else happens to a leaf is differentiated as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode

Factors = tuple[Any, Any, Any]  # left, right and the layout in which their product is the leaf's gradient

# Calls that are looked into. Not those with a rule of their own, whose derivative is not that of their code.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
CALLS |= {"checkpoint": "jaxpr", "remat2": "jaxpr"}
# What leaves the entries as they are, but for their places and precision.
STEPS = frozenset({"transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "copy", "copy_p"})
REDUCTIONS = ("reduce_", "arg", "cum", "sort")


@dataclass(frozen=True)
class View:
    """A leaf, moved about by `steps`; `axes` are the leaf's axes in its order, None once it was reshaped."""

    leaf: int
    axes: tuple[int, ...] | None
    steps: tuple[Any, ...] = ()

    def then(self, equation: Any) -> View:
        axes, name = self.axes, equation.primitive.name
        if name == "transpose" and axes is not None:
            axes = tuple(axes[i] for i in equation.params["permutation"])
        elif name not in ("copy", "copy_p", "convert_element_type", "transpose"):
            axes = None
        return View(self.leaf, axes, (*self.steps, equation))

    def of(self, w: Any) -> Any:
        """The view of a leaf's value."""
        for equation in self.steps:
            w = bind(equation, [w])[0]
        return w

    @property
    def layout(self) -> Any:
        """Equal for views in which the leaf has the same axes."""
        moved = [e for e in self.steps if e.primitive.name != "convert_element_type"]
        return None if self.axes is not None else tuple(str(e) for e in moved)


@dataclass(frozen=True)
class Use:
    """y = operation(x, leaf), linear in the leaf; `factors(x, dy)` are those of one example's gradient."""

    view: View
    operation: Callable[[Any, Any], Any]  # of x and of the view's value
    y: Any  # shape and dtype
    factors: Callable[[Any, Any], Factors]

    def of_leaf(self, x: Any, w: Any) -> Any:
        return self.operation(x, self.view.of(w))


@dataclass
class Walk:
    """One run through a jaxpr: the uses met, their x, and the leaves that something else was done with."""

    held: Sequence[Any]  # the values of the leaves, without derivative
    probes: Sequence[Any] | None = None  # zeros, one a use
    uses: list[Use] = field(default_factory=list)
    xs: list[Any] = field(default_factory=list)
    escaped: set[int] = field(default_factory=set)

    def run(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], views: Sequence[View | None]
    ) -> tuple[list[Any], list[View | None]]:
        """The outputs of a jaxpr, and which of them are views of leaves."""
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        seen = {v: view for v, view in zip(jaxpr.invars, views, strict=True) if view is not None}
        read = lambda v: v.val if hasattr(v, "val") else values[v]
        view_of = lambda v: None if hasattr(v, "val") else seen.get(v)
        for equation in jaxpr.eqns:
            inputs, found = [read(v) for v in equation.invars], [view_of(v) for v in equation.invars]
            outputs, shown = self.step(equation, inputs, found)
            values |= zip(equation.outvars, outputs, strict=True)
            seen |= {v: view for v, view in zip(equation.outvars, shown, strict=True) if view is not None}
        return [read(v) for v in jaxpr.outvars], [view_of(v) for v in jaxpr.outvars]

    def step(
        self, equation: Any, inputs: list[Any], views: list[View | None]
    ) -> tuple[list[Any], list[View | None]]:
        """One equation: looked into, recorded, or run as it stands."""
        name = equation.primitive.name
        unseen: list[View | None] = [None] * len(equation.outvars)
        if not any(views):
            return bind(equation, inputs), unseen
        if name in CALLS:
            inner = equation.params[CALLS[name]]
            return self.run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs, views)
        empty = any(v.aval.size == 0 for v in equation.invars)
        use = KNOWN[name](equation, views) if name in KNOWN and not empty else None
        if use is not None:
            return [self.record(use, inputs, views)], unseen
        if views[0] is not None and moves(equation):
            return bind(equation, inputs), [views[0].then(equation)]
        self.escaped |= {view.leaf for view in views if view is not None}
        return bind(equation, inputs), unseen

    def record(self, use: Use, inputs: list[Any], views: list[View | None]) -> Any:
        (x,) = (value for value, view in zip(inputs, views, strict=True) if view is None)
        y = use.of_leaf(x, self.held[use.view.leaf])
        self.uses.append(replace(use, y=jax.typeof(y)))
        self.xs.append(x)
        return y if self.probes is None else y + self.probes[len(self.uses) - 1]


def bind(equation: Any, inputs: Sequence[Any]) -> list[Any]:
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # apart, in older jax
    with equation.ctx.manager:
        outputs = equation.primitive.bind(*functions, *inputs, **params)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def moves(equation: Any) -> bool:
    """Whether an equation changes no entry of its input, but for its place and precision."""
    before, after = equation.invars[0].aval, equation.outvars[0].aval
    if equation.primitive.name == "convert_element_type":
        return jnp.issubdtype(after.dtype, jnp.floating)
    return equation.primitive.name in STEPS and before.size == after.size


def product(equation: Any, views: list[View | None]) -> Use | None:
    """x contracted with a leaf: the rows of its gradient are those axes of x and y that the leaf lacks."""
    if all(views):
        return None
    place = 1 if views[0] is None else 0
    view: Any = views[place]
    (contracted, batched) = equation.params["dimension_numbers"]
    x_axes, w_axes = (contracted[1 - place], batched[1 - place]), (contracted[place], batched[place])
    x_ndim, w_ndim = equation.invars[1 - place].aval.ndim, equation.invars[place].aval.ndim
    rows = [i for i in range(x_ndim) if i not in (*x_axes[0], *x_axes[1])]
    free = [i for i in range(w_ndim) if i not in (*w_axes[0], *w_axes[1])]
    operation = lambda x, w: bind(equation, [x, w] if place else [w, x])[0]

    def factors(x: Any, dy: Any) -> Factors:
        groups = math.prod(x.shape[i] for i in x_axes[1])
        x = x.transpose(*x_axes[1], *rows, *x_axes[0])
        x = x.reshape(groups, math.prod(x.shape[len(x_axes[1]) :][: len(rows)]), -1)
        if not place:  # y is groups, free, rows
            order = np.arange(dy.ndim)
            g, f = len(x_axes[1]), len(free)
            dy = dy.transpose(*order[:g], *order[g + f :], *order[g : g + f])
        dy = dy.reshape(groups, x.shape[1], -1)
        axes = view.axes or tuple(range(w_ndim))
        parts = [tuple(axes[i] for i in some) for some in (w_axes[1], w_axes[0], free)]
        if not parts[1] or (parts[2] and min(parts[2]) < min(parts[1])):
            return dy, x, (view.layout, parts[0], parts[2], parts[1])
        return x, dy, (view.layout, *parts)

    return Use(view, operation, None, factors)


def convolution(equation: Any, views: list[View | None]) -> Use | None:
    """x convolved with a leaf: the right factors are the patches of x that the kernel meets."""
    params = equation.params
    if views[1] is None or views[0] is not None or params["batch_group_count"] != 1:
        return None
    view, numbers, groups = views[1], params["dimension_numbers"], params["feature_group_count"]
    kernel = equation.invars[1].aval.shape
    window = [kernel[i] for i in numbers.rhs_spec[2:]]

    def factors(x: Any, dy: Any) -> Factors:
        x, dy = x.transpose(numbers.lhs_spec), dy.transpose(numbers.out_spec)
        edges = [(0, 0, 0)] * 2 + [
            (low, high, dilation - 1)
            for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True)
        ]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
        patches = jnp.stack([patch(x, offset, dy.shape[2:]) for offset in np.ndindex(*window)], 2)
        N, C, k = patches.shape[:3]
        patches = patches.reshape(N, groups, C // groups, k, -1).transpose(1, 0, 4, 2, 3)
        left = dy.reshape(N, groups, dy.shape[1] // groups, -1).transpose(1, 0, 3, 2)
        merged = lambda a: a.reshape(groups, a.shape[1] * a.shape[2], -1)
        return merged(left), merged(patches), (view.layout, view.axes, numbers.rhs_spec, groups)

    def patch(x: Any, offset: Sequence[int], out: Sequence[int]) -> Any:
        """What the kernel's entry at `offset` is multiplied with."""
        starts = [i * d for i, d in zip(offset, params["rhs_dilation"], strict=True)]
        strides = params["window_strides"]
        stops = [s + (n - 1) * step + 1 for s, n, step in zip(starts, out, strides, strict=True)]
        return jax.lax.slice(x, (0, 0, *starts), (*x.shape[:2], *stops), (1, 1, *strides))

    return Use(view, lambda x, w: bind(equation, [x, w])[0], None, factors)


def lookup(equation: Any, views: list[View | None]) -> Use | None:
    """Rows of a leaf by their numbers: the left factors are unit vectors, given by the numbers alone."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    mode = GatherScatterMode.from_any(equation.params["mode"])
    view, shape = views[0], equation.invars[0].aval.shape
    picked = [i for i, size in enumerate(sizes) if size != shape[i]]
    if view is None or len(picked) != 1 or sizes[picked[0]] != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = picked
    if axis not in numbers.start_index_map:
        return None
    if mode == GatherScatterMode.FILL_OR_DROP and len(numbers.start_index_map) > 1:
        return None

    def factors(x: Any, dy: Any) -> Factors:
        index = x[..., numbers.start_index_map.index(axis)]
        batch = [i for i in range(dy.ndim) if i not in numbers.offset_dims]
        dy = dy.transpose(*batch, *numbers.offset_dims).reshape(1, index.size, -1)
        index, n = index.reshape(1, -1), shape[axis]
        if mode == GatherScatterMode.FILL_OR_DROP:
            dy = jnp.where(((index >= 0) & (index < n))[..., None], dy, 0)
        axes = view.axes or tuple(range(len(shape)))
        rest = tuple(axes[i] for i in range(len(shape)) if i != axis)
        layout = (view.layout, (), (axes[axis],), rest)
        return Rows(jnp.clip(index, 0, n - 1), n), dy, layout

    return Use(view, lambda x, w: bind(equation, [w, x])[0], None, factors)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Unit vectors with `n` entries, by the number of the entry that is one."""

    index: Any
    n: int = field(metadata={"static": True})


KNOWN = {"dot_general": product, "conv_general_dilated": convolution, "gather": lookup}


Origin = tuple[bool, bool]  # whether a value is made from the parameters, and from the example


def normalises(jaxpr: Any, origins: Sequence[Origin]) -> tuple[bool, list[Origin]]:
    """Whether something is summed up of the parameters alone; and the origins of the outputs."""
    known = dict(zip(jaxpr.invars, origins, strict=True))
    origin = lambda v: (False, False) if hasattr(v, "val") else known.get(v, (False, False))
    found = False
    for equation in jaxpr.eqns:
        inputs = [origin(v) for v in equation.invars]
        merged = (any(a for a, _ in inputs), any(b for _, b in inputs))
        outputs = [merged] * len(equation.outvars)
        if merged[0] and equation.primitive.name.startswith(REDUCTIONS) and merged != (True, True):
            return True, []
        for inner in bodies(equation):
            shift = len(inner.invars) - len(inputs)  # a branch lacks the index before its inputs
            given = inputs[-shift:] if shift < 0 else [(False, False)] * shift + inputs
            inside, shown = normalises(inner, given)
            if equation.primitive.name == "scan" and not inside:  # once more, with the carry as it becomes
                start = equation.params["num_consts"]
                carry = equation.params["num_carry"]
                for i, new in enumerate(shown[:carry]):
                    given[start + i] = (given[start + i][0] or new[0], given[start + i][1] or new[1])
                inside, shown = normalises(inner, given)
            found = found or inside
            outputs = shown if len(shown) == len(outputs) else outputs
        known |= zip(equation.outvars, outputs, strict=True)
    return found, [origin(v) for v in jaxpr.outvars]


def bodies(equation: Any) -> list[Any]:
    """The jaxprs that an equation runs."""
    values = jax.tree.leaves(list(equation.params.values()))
    return [inner for value in values if hasattr(inner := getattr(value, "jaxpr", value), "eqns")]
