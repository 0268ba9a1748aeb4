from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from gradlab._errors import InputError, KindError, StrategyError
from gradlab.transforms.custom_rules._jax_ruled import is_inexact, ruled, zero_tangent
from gradlab.transforms.custom_rules.declared import Declared

# How jax refuses a function that looks at the numbers of an array that has none yet.
LOOKS_AT_NUMBERS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


class Rule(Declared):
    """What both rules are made of: f with a derivative attached to its value."""

    how = ""  # the method that gives the rule
    proven_linear = False  # whether bwd has been seen to be zero at zero

    def defvmap(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        self.define("defvmap", rule)
        return rule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = self.positional(args, kwargs)
        point = Point(self, args)
        concrete = not any(isinstance(x, jax.core.Tracer) for x in point.arrays)
        if self.check and concrete and any(map(is_inexact, point.arrays)):
            self.defined(self.how)
            out, _ = self.begin(point, [], point.arrays, [zero_tangent(x) for x in point.arrays])
            refuse_other_value(self, out, self.f(*args))
            self.verify(args)
        return self.differentiable(point)

    def differentiable(self, point: Point) -> Any:
        """f at a point, with the rule for its derivative."""
        self.defined(self.how)
        value, closed = closed_over(self.primal(point), point.arrays)

        def derivative(primals: Any, tangents: Any) -> Any:
            refuse_moving(self, tangents[0])
            return self.begin(point, primals[0], primals[1], tangents[1])

        return ruled(value, derivative)(closed, point.arrays)

    def primal(self, point: Point) -> Callable[[Any], Any]:
        """f as a function of the arrays among its arguments; by the batched form under vmap where it has one."""
        value = lambda xs: self.f(*point.put(xs))
        if "defvmap" not in self.definitions:
            return value
        (batched,) = self.definitions["defvmap"]
        mapped = custom_vmap(value)

        @mapped.def_vmap
        def _(axis_size: int, in_batched: Any, xs: Any) -> Any:
            return batched(axis_size, point.flags(in_batched[0]), *point.put(xs))

        return mapped

    def prove_alike(self, point: Point, xs: Any, out: Any) -> None:
        """Refuse a rule whose output is of another form than f's."""
        with suppress(*LOOKS_AT_NUMBERS):  # then f is met in eager code alone
            refuse_unlike(self, out, jax.eval_shape(lambda xs: self.f(*point.put(xs)), xs))

    def begin(self, point: Point, closed: Any, xs: Any, txs: Any) -> tuple[Any, Any]:
        """Value and tangent where the rule is met first; `closed` are the traced arrays that f closes over."""
        raise NotImplementedError


class custom_vjp(Rule):
    """A jax.custom_jvp whose tangent is bwd transposed: forward mode exists, and reverse mode transposes it back."""

    op, how = "custom_vjp", "defvjp"

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        self.define("defvjp", fwd, bwd)

    def begin(self, point: Point, closed: Any, xs: Any, txs: Any) -> tuple[Any, Any]:
        fwd, _ = self.definitions["defvjp"]
        result = fwd(*point.put(xs))
        if not isinstance(result, tuple) or len(result) != 2:
            raise InputError(
                f"{self.op}: fwd of {self.name} returned a {type(result).__name__}; return (out, residuals)"
            )
        out, residuals = result
        self.prove_alike(point, xs, out)
        kept, restored = kept_residuals(residuals, xs, out)
        again = partial(self.tangent, point, restored)
        out = attached(self, again, closed, xs, kept, jax.lax.stop_gradient(out))
        return out, self.tangent(point, restored, xs, kept, out, txs)

    def tangent(self, point: Point, restored: Any, xs: Any, kept: Any, out: Any, txs: Any) -> Any:
        """J v, as the transpose of u ↦ Jᵀ u for the arguments that move."""
        _, bwd = self.definitions["defvjp"]
        residuals = restored(xs, kept, out)
        ys, spec = jax.tree.flatten(out)
        floats = [i for i, y in enumerate(ys) if is_inexact(y)]
        live = [i for i, t in enumerate(txs) if not isinstance(t, SymbolicZero) and is_inexact(xs[i])]
        us = [zero_tangent(y) for y in ys]

        def pulled(*some: Any) -> list[Any]:
            for i, u in zip(floats, some, strict=True):
                us[i] = u
            cotangents = bwd(*point.static, residuals, jax.tree.unflatten(spec, us))
            return point.cotangents(cotangents, live)

        tangents = [zero_tangent(y) for y in ys]
        if live and floats:
            moved = transposed(self, pulled, [ys[i] for i in floats], [txs[i] for i in live])
            for i, t in zip(floats, moved, strict=True):
                tangents[i] = t
        return jax.tree.unflatten(spec, tangents)


class custom_jvp(Rule):
    """A jax.custom_jvp whose value has the rule for its derivative at every order."""

    op, how = "custom_jvp", "defjvp"

    def defjvp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        self.define("defjvp", rule)
        return rule

    def begin(self, point: Point, closed: Any, xs: Any, txs: Any) -> tuple[Any, Any]:
        out, tangent = self.apply(point, xs, txs)
        self.prove_alike(point, xs, out)
        again = lambda xs, _, out, txs: self.apply(point, xs, txs)[1]
        return attached(self, again, closed, xs, (), jax.lax.stop_gradient(out)), tangent

    def apply(self, point: Point, xs: Any, txs: Any) -> tuple[Any, Any]:
        """What the rule gives."""
        (rule,) = self.definitions["defjvp"]
        _, primals = self.split(point.put(xs))
        result = rule(*point.static, primals, point.tangents(txs))
        if not isinstance(result, tuple) or len(result) != 2:
            raise InputError(
                f"{self.op}: the rule of {self.name} returned a {type(result).__name__}; return (out, tangent)"
            )
        out, tangent = result
        return out, fitting_tangent(self, out, tangent)


class Point:
    """The arguments of a call: arrays, which move, and the rest, which is held constant."""

    def __init__(self, rule: Declared, args: tuple[Any, ...]):
        self.rule = rule
        self.static, self.moving = rule.split(args)
        self.leaves, self.spec = jax.tree.flatten(self.moving)
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, (jax.Array, np.ndarray))]
        self.arrays = [jnp.asarray(self.leaves[i]) for i in self.places]

    def put(self, xs: Sequence[Any]) -> tuple[Any, ...]:
        """All arguments, with `xs` for the arrays."""
        return self.rule.joined(self.static, self._filled(self.leaves, xs))

    def tangents(self, txs: Sequence[Any]) -> tuple[Any, ...]:
        """Tangents like the arguments; None where nothing is differentiated."""
        shown = [instantiated(t) if is_inexact(x) else None for x, t in zip(self.arrays, txs, strict=True)]
        return self._filled([None] * len(self.leaves), shown)

    def flags(self, batched: Sequence[bool]) -> tuple[Any, ...]:
        """Which of all arguments are batched."""
        moving = self._filled([False] * len(self.leaves), batched)
        return self.rule.joined((False,) * len(self.static), moving)

    def _filled(self, around: Sequence[Any], some: Sequence[Any]) -> tuple[Any, ...]:
        filled = list(around)
        for i, x in zip(self.places, some, strict=True):
            filled[i] = x
        return jax.tree.unflatten(self.spec, filled)

    def cotangents(self, given: Any, live: Sequence[int]) -> list[Any]:
        """The cotangents of the arrays numbered `live`, as bwd gave them, if they fit."""
        rule, n = self.rule, len(self.moving)
        if not isinstance(given, (tuple, list)) or len(given) != n:
            count = (
                len(given)
                if isinstance(given, (tuple, list))
                else f"a {type(given).__name__}, not a tuple, of"
            )
            raise InputError(
                f"{rule.op}: bwd of {rule.name} returned {count} cotangents for {n} arguments; "
                "return a tuple of one for each argument that is not static, None for zero"
            )
        flat: list[Any] = []
        for i, (ct, arg) in enumerate(zip(given, self.moving, strict=True)):
            flat += self._matched(i, ct, arg)
        return [self._fitting(flat[self.places[i]], i) for i in live]

    def _matched(self, i: int, ct: Any, arg: Any) -> list[Any]:
        """The leaves of one cotangent, one for each leaf of its argument; None stands for a tree of zeros."""
        is_none = lambda part: part is None

        def spread(part: Any, x: Any) -> list[Any]:
            if part is not None and not jax.tree_util.all_leaves([x]):
                raise ValueError("a leaf for a tree")
            return [part] * len(jax.tree.leaves(x))

        try:
            return jax.tree.leaves(jax.tree.map(spread, ct, arg, is_leaf=is_none), is_leaf=is_none)
        except (ValueError, TypeError):
            raise InputError(
                f"{self.rule.op}: bwd of {self.rule.name} returned a cotangent of structure "
                f"{jax.tree.structure(ct)} for {self.rule.argument(i)}, which has {jax.tree.structure(arg)}; "
                "return one like it, or None"
            ) from None

    def _fitting(self, ct: Any, i: int) -> Any:
        x = self.arrays[i]
        if ct is None:
            return jnp.zeros(x.shape, x.dtype)
        refuse_misfit(self.rule, "bwd", "cotangent", ct, self._name(self.places[i]), x)
        return jnp.asarray(ct, x.dtype)

    def _name(self, place: int) -> str:
        paths = jax.tree_util.tree_flatten_with_path(self.moving)[0]
        (first, *rest), _ = paths[place]
        return self.rule.argument(first.idx) + jax.tree_util.keystr(tuple(rest))


def attached(rule: Declared, tangent: Callable[..., Any], closed: Any, xs: Any, kept: Any, out: Any) -> Any:
    """`out` as it stands, with `tangent(xs, kept, out, txs)` for its derivative in xs, and none in `out`.

    A rule's own output is differentiated again by the next level of a nest, which sees the rule here too.
    """

    def derivative(primals: Any, tangents: Any) -> Any:
        refuse_moving(rule, tangents[0])
        out = value(*primals)
        return out, tangent(primals[1], primals[2], out, tangents[1])

    value = ruled(lambda closed, xs, kept, out: out, derivative)
    return value(closed, xs, kept, out)


def refuse_moving(rule: Declared, tangents: Any) -> None:
    """Refuse the derivative in what f closes over."""
    if not all(isinstance(t, SymbolicZero) for t in tangents):
        raise StrategyError(
            f"{rule.op}: {rule.name} closes over an array that is being differentiated, and its rule does not "
            "know of it; pass the array as an argument"
        )


def transposed(
    rule: Declared, pulled: Callable[..., Any], ys: Sequence[Any], ts: Sequence[Any]
) -> Sequence[Any]:
    """The transpose of the linear map us ↦ pulled(*us) of cotangents like ys, at ts."""
    like = [jax.ShapeDtypeStruct(y.shape, y.dtype) for y in ys]
    refuse_affine(rule, pulled, like)
    transpose = jax.linear_transpose(pulled, *like)
    try:
        return transpose(list(ts))
    except (NotImplementedError, AssertionError, TypeError, ValueError) as error:
        raise StrategyError(
            f"{rule.op}: bwd of {rule.name} is not linear in its cotangent, or computes with it what jax cannot "
            f"transpose ({error}); return what is linear in u, by operations that jax differentiates"
        ) from error


def refuse_affine(rule: Any, pulled: Callable[..., Any], like: Any) -> None:
    """Refuse a bwd that is not zero at zero, once it shows: its transpose would leave the constant out, unseen."""
    if rule.proven_linear:
        return
    at_zero = pulled(*[jnp.zeros(y.shape, y.dtype) for y in like])
    if any(isinstance(ct, jax.core.Tracer) for ct in at_zero):
        return
    if any(jnp.any(ct != 0) for ct in at_zero):
        raise StrategyError(
            f"{rule.op}: bwd of {rule.name} is not linear in its cotangent: it is not zero at zero; "
            "return what is linear in u"
        )
    rule.proven_linear = True


def closed_over(value: Callable[[Any], Any], xs: Any) -> tuple[Callable[..., Any], list[Any]]:
    """`value` as a function of the traced arrays that it closes over and of xs, and those arrays.

    As arguments they cannot be differentiated unseen, inside jit and scan either.
    """
    plain = lambda _, xs: value(xs)
    try:
        jaxpr, shape = jax.make_jaxpr(value, return_shape=True)(xs)
    except LOOKS_AT_NUMBERS:  # which eager code alone can
        return plain, []
    traced = [i for i, c in enumerate(jaxpr.consts) if isinstance(c, jax.core.Tracer)]
    if not traced:
        return plain, []

    def explicit(closed: list[Any], xs: Any) -> Any:
        consts = list(jaxpr.consts)
        for i, c in zip(traced, closed, strict=True):
            consts[i] = c
        outs = jax.core.eval_jaxpr(jaxpr.jaxpr, consts, *jax.tree.leaves(xs))
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return explicit, [jaxpr.consts[i] for i in traced]


def kept_residuals(residuals: Any, xs: Sequence[Any], out: Any) -> tuple[list[Any], Callable[..., Any]]:
    """The arrays among residuals that are neither an argument nor an output, and how to restore all."""
    leaves, spec = jax.tree.flatten(residuals)
    ys = jax.tree.leaves(out)
    kept: list[Any] = []
    sources: list[tuple[str, Any]] = []
    for leaf in leaves:
        x, y = _position(leaf, xs), _position(leaf, ys)
        if x is not None:
            sources.append(("argument", x))
        elif y is not None:
            sources.append(("output", y))
        elif isinstance(leaf, (jax.Array, np.ndarray)):
            sources.append(("kept", len(kept)))
            kept.append(leaf)
        else:
            sources.append(("constant", leaf))

    def restored(xs: Sequence[Any], kept: Sequence[Any], out: Any) -> Any:
        found = {"argument": xs, "output": jax.tree.leaves(out), "kept": kept}
        return jax.tree.unflatten(
            spec, [where if kind == "constant" else found[kind][where] for kind, where in sources]
        )

    return kept, restored


def _position(leaf: Any, leaves: Sequence[Any]) -> int | None:
    return next((i for i, other in enumerate(leaves) if leaf is other), None)


def fitting_tangent(rule: Declared, out: Any, tangent: Any) -> Any:
    """The tangent a rule gave, if it fits its output."""
    given: Any
    given, needed = jax.tree.structure(tangent), jax.tree.structure(out)
    if given != needed:
        raise InputError(
            f"{rule.op}: the rule of {rule.name} returned a tangent of structure {given}, "
            f"out has {needed}; return a tangent like out"
        )

    def fitting(path: Any, y: Any, t: Any) -> Any:
        if not is_inexact(y):
            return zero_tangent(y)
        refuse_misfit(rule, "the rule", "tangent", t, "out" + jax.tree_util.keystr(path), y)
        return jnp.asarray(t, jnp.result_type(y))

    return jax.tree_util.tree_map_with_path(fitting, out, tangent)


def refuse_misfit(rule: Declared, who: str, kind: str, given: Any, name: str, like: Any) -> None:
    """Refuse a cotangent or tangent of another shape or dtype."""
    if jnp.shape(given) != jnp.shape(like):
        raise InputError(
            f"{rule.op}: {who} of {rule.name} returned a {kind} of shape {jnp.shape(given)} for {name}, "
            f"which has shape {jnp.shape(like)}; return one of that shape"
        )
    if hasattr(given, "dtype") and given.dtype != jnp.result_type(like):
        raise KindError(
            f"{rule.op}: {who} of {rule.name} returned a {kind} of dtype {given.dtype} for {name}, "
            f"which has dtype {jnp.result_type(like)}; convert it with .astype"
        )


def refuse_unlike(rule: Declared, out: Any, like: Any) -> None:
    """Refuse an output of a rule that is not that of f in structure, shape and dtype."""
    given: Any
    given, needed = jax.tree.structure(out), jax.tree.structure(like)
    if given != needed:
        raise InputError(
            f"{rule.op}: the rule of {rule.name} returned an output of structure {given}, {rule.name} has {needed}; "
            "return the same"
        )
    for (path, y), form in zip(jax.tree_util.tree_leaves_with_path(out), jax.tree.leaves(like), strict=True):
        form_of_y = (jnp.shape(y), jnp.result_type(y))
        if form_of_y != (form.shape, form.dtype):
            raise InputError(
                f"{rule.op}: the rule of {rule.name} returned out{jax.tree_util.keystr(path)} of shape {form_of_y[0]} "
                f"and dtype {form_of_y[1]}, {rule.name} has {form.shape} and {form.dtype}; return the same"
            )


def refuse_other_value(rule: Declared, out: Any, like: Any) -> None:
    """Refuse an output of a rule that has other numbers than that of f."""
    for (path, y), value in zip(jax.tree_util.tree_leaves_with_path(out), jax.tree.leaves(like), strict=True):
        if not is_inexact(value):
            continue
        tolerance = float(jnp.finfo(jnp.result_type(value)).eps) ** 0.5
        if not jnp.allclose(y, value, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise InputError(
                f"{rule.op}: the rule of {rule.name} returned out{jax.tree_util.keystr(path)} with other numbers than "
                f"{rule.name}; return the same"
            )


def instantiated(t: Any) -> Any:
    return jnp.zeros(t.shape, t.dtype) if isinstance(t, SymbolicZero) else t
