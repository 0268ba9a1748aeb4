from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import CellType, FunctionType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gradlab.jax as gl
from gradlab._typing import Leaves
from gradlab.check.claims import POINTS, SEEDS, entry_name
from gradlab.transforms.linearised._jax import inside
from gradlab.transforms.trees._jax import Tree, tree_function

OP = "check.derivatives"


def subjects(f: Callable[..., Any], x: Any, args: Any, has_aux: bool) -> tuple[Subject, Subject | None]:
    """f in its own dtype, and a float64 run of the same function as its shadow, where it has one."""
    subject = Subject(*real_form(f, x, has_aux), args, has_aux)
    if subject.eps == np.finfo(np.float64).eps:
        return subject, None
    with jax.enable_x64(True):
        x, args = _widened((x, args))
        # the second where an operation does not promote, the third where f casts to less
        for form in (lambda: f, lambda: _widened(f), lambda: _without_casts(f)):
            try:
                shadow = Subject(*real_form(form(), x, has_aux), args, has_aux, wide=True)
            except (TypeError, ValueError, RecursionError, NotImplementedError):  # or there is no such form
                continue
            if shadow.eps == np.finfo(np.float64).eps:
                return subject, shadow
    return subject, None


def _without_casts(f: Callable[..., Any]) -> Callable[..., Any]:
    """f operation by operation in float64, whatever it casts to."""

    def wide(x: Any, *args: Any) -> Any:
        closed, shape = jax.make_jaxpr(f, return_shape=True)(x, *args)
        outputs = _evaluated(closed.jaxpr, closed.consts, jax.tree.leaves((x, *args)))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return wide


def _evaluated(jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    known = dict(zip(jaxpr.constvars, _widened(list(constants)), strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))
    read = lambda v: _widened_leaf(v.val) if hasattr(v, "val") else known[v]
    for equation in jaxpr.eqns:
        inputs, params = [read(v) for v in equation.invars], equation.params
        if equation.primitive.name in ("jit", "pjit"):
            results = _evaluated(params["jaxpr"].jaxpr, params["jaxpr"].consts, inputs)
        elif equation.primitive.name == "scan":
            results = _scanned(params, inputs)
        elif any(hasattr(getattr(p, "jaxpr", p), "eqns") for p in jax.tree.leaves(list(params.values()))):
            raise NotImplementedError(equation.primitive.name)  # a while loop, a custom rule
        else:
            results = equation.primitive.bind(*inputs, **{k: _wide_dtype(p) for k, p in params.items()})
        results = results if isinstance(results, (list, tuple)) else [results]
        known.update(zip(equation.outvars, _widened(list(results)), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _scanned(params: dict[str, Any], inputs: list[Any]) -> list[Any]:
    start, many = params["num_consts"], params["num_carry"]
    held, carry, xs = inputs[:start], inputs[start : start + many], inputs[start + many :]

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        found = _evaluated(params["jaxpr"].jaxpr, params["jaxpr"].consts, [*held, *carry, *xs])
        return found[:many], found[many:]

    carry, ys = jax.lax.scan(body, carry, xs, params["length"], params["reverse"])
    return [*carry, *ys]


def _wide_dtype(value: Any) -> Any:
    return (
        np.dtype(np.float64) if isinstance(value, np.dtype) and jnp.issubdtype(value, jnp.floating) else value
    )


def _widened(tree: Any) -> Any:
    """The tree in float64: its arrays, and those that its functions close over."""
    return jax.tree.map(_widened_leaf, tree)


def _widened_leaf(leaf: Any) -> Any:
    if isinstance(leaf, (jax.Array, np.ndarray)):
        kinds = ((jnp.floating, jnp.float64), (jnp.complexfloating, jnp.complex128))
        return next((leaf.astype(wide) for kind, wide in kinds if jnp.issubdtype(leaf.dtype, kind)), leaf)
    if isinstance(leaf, FunctionType):
        names = {k: v for k, v in leaf.__globals__.items() if k in leaf.__code__.co_names}
        known = {
            k: _widened(v) for k, v in names.items() if not isinstance(v, (FunctionType, ModuleType, type))
        }
        cells = tuple(CellType(_widened(cell.cell_contents)) for cell in leaf.__closure__ or ())
        defaults = _widened(leaf.__defaults__)
        return FunctionType(leaf.__code__, {**leaf.__globals__, **known}, leaf.__name__, defaults, cells)
    if isinstance(leaf, (jax.custom_vjp, jax.custom_jvp)):
        wide = copy.copy(leaf)
        vars(wide).update({k: _widened_leaf(v) for k, v in vars(leaf).items() if isinstance(v, FunctionType)})
        return wide
    return leaf


def real_form(f: Callable[..., Any], x: Any, has_aux: bool) -> tuple[Callable[..., Any], Any]:
    """f and x with complex arrays as pairs of reals on a last axis: each framework's convention cancels.

    What f returns beside floats (integers, strings) is left out.
    """
    pairs = lambda leaf: jnp.stack([leaf.real, leaf.imag], -1) if _complex(leaf) else leaf
    leaves, structure = jax.tree.flatten(x)
    which = [_complex(leaf) for leaf in leaves]

    def floats(y: Any) -> Any:
        leaves = jax.tree.leaves(y)
        kept = [
            z
            for z in leaves
            if isinstance(z, (jax.Array, np.ndarray)) and jnp.issubdtype(z.dtype, jnp.inexact)
        ]
        return jax.tree.map(pairs, y if len(kept) in (0, len(leaves)) else kept)

    def real(x: Any, *args: Any) -> Any:
        given = jax.tree.leaves(x)
        joined = [
            jax.lax.complex(z[..., 0], z[..., 1]) if c else z for c, z in zip(which, given, strict=True)
        ]
        y = f(jax.tree.unflatten(structure, joined), *args)
        if has_aux and isinstance(y, tuple) and len(y) == 2:
            return floats(y[0]), y[1]
        return floats(y)

    return real, jax.tree.map(pairs, x)


def restored(subject: Subject, x: Any) -> Any:
    """The subject's point as a tree like x, of which `real_form` made pairs."""
    given = subject.tree.put(subject.tree.split(subject._array(subject.x)))
    join = lambda leaf, pair: jax.lax.complex(pair[..., 0], pair[..., 1]) if _complex(leaf) else pair
    return jax.tree.map(join, x, given)


def _complex(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray)) and jnp.iscomplexobj(leaf)


class Subject:
    """f at x as jax differentiates it: flat numpy float64 vectors in and out."""

    def __init__(self, f: Callable[..., Any], x: Any, args: Any, has_aux: bool, wide: bool = False):
        self.tree = Tree(OP, "x", x)
        self.function, output = tree_function(OP, f, self.tree, args, has_aux)
        outputs, _ = self.function(self.tree.leaves)
        self.output = output(outputs)
        self.mode = (lambda: jax.enable_x64(True)) if wide else nullcontext
        self.n, self.sizes, self.scalar = self.tree.size, self.tree.sizes, self.output.shapes == [()]
        self.parts = len(self.sizes) + len(self.output.sizes)
        self.eps = max(float(jnp.finfo(dtype).eps) for dtype in _precisions(self.function, self.tree.leaves))
        self.largest = float(jnp.finfo(self.tree.dtype).max)
        self.x = self._numpy(self.tree.ravel(self.tree.leaves))
        self.dtype = str(self.tree.dtype)
        self.compilations: dict[Any, Callable[..., Any]] = {}

    def weigh(self, u: np.ndarray) -> None:
        self.weights = u

    def at(self, x: np.ndarray) -> Subject:
        """The same function at another point, rounded to its dtype."""
        other = copy.copy(self)
        other.x = self._numpy(self._array(x))
        return other

    def flat(self, z: Any) -> Any:
        """f on flat vectors, all in the dtype of x."""
        return self._flat(self.tree.split(z))

    def _flat(self, leaves: Leaves) -> Any:
        return self.output.ravel(self.function(leaves)[0]).astype(self.tree.dtype)

    def value(self, x: np.ndarray) -> np.ndarray:
        return self._run("value", self.flat, x)

    def plain(self, x: np.ndarray) -> np.ndarray:
        with self.mode():
            return self._numpy(self.flat(self._array(x)))

    def mutated(self) -> str:
        return ""  # jax arrays cannot be

    def structure(self) -> str:
        return ""  # jax refuses a rule whose result has another shape or dtype

    def jvp(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        return self._run("jvp", lambda x, v: jax.jvp(self.flat, (x,), (v,))[1], x, v)

    def vjp(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        return self._run("vjp", lambda x, u: jax.vjp(self.flat, x)[1](u)[0], x, u)

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return self.vjp(x, self.weights)

    def pulls(self, x: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        with self.mode():
            pullback = jax.vjp(self.flat, self._array(x))[1]
            once, again = (self._numpy(pullback(self._array(u))[0]) for _ in range(2))
        return once, again, False

    def jvp_by_leaf(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        def total(x: Any, v: Any) -> Any:
            leaves, tangents = self.tree.split(x), self.tree.split(v)
            return sum(
                jax.jvp(self._alone(leaves, k), (leaves[k],), (tangents[k],))[1] for k in range(len(leaves))
            )

        return self._run("jvp by leaf", total, x, v)

    def vjp_by_leaf(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        def each(x: Any, u: Any) -> Any:
            leaves = self.tree.split(x)
            return self.tree.ravel(
                [jax.vjp(self._alone(leaves, k), leaves[k])[1](u)[0] for k in range(len(leaves))]
            )

        return self._run("vjp by leaf", each, x, u)

    def _alone(self, leaves: Leaves, k: int) -> Callable[[Any], Any]:
        """f of its k-th leaf, the others held constant."""
        return lambda leaf: self._flat([*leaves[:k], leaf, *leaves[k + 1 :]])

    def vjp_by_output(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        def total(x: Any, u: Any) -> Any:
            one = lambda z, k: self.function(self.tree.split(z))[0][k]
            parts = enumerate(self.output.split(u))
            return sum(jax.vjp(lambda z, k=k: one(z, k), x)[1](part)[0] for k, part in parts)

        return self._run("vjp by output", total, x, u)

    def nested(self, x: np.ndarray, v: np.ndarray, how: str) -> np.ndarray:
        def nest(x: Any, v: Any, u: Any) -> Any:
            function: Callable[[Any], Any] = lambda x: self.flat(x) @ u
            vector = False  # whether the function gives a gradient, or its slope along v
            for mode in reversed(how.split(" over ")):
                function = _derived(mode, function, v, vector)
                vector = vector or mode == "reverse"
            return function(x)

        return np.atleast_1d(self._run(how, nest, x, v, self.weights))

    def product(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        def product(x: Any, v: Any, u: Any) -> Any:
            point, direction = self.tree.put(self.tree.split(x)), self.tree.like(self.tree.split(v))
            scalar = lambda x: self.output.ravel(self.function(Tree(OP, "x", x).leaves)[0]) @ u
            return self.tree.ravel(Tree(OP, "v", gl.hvp(scalar, point, direction)).leaves)

        return self._run("hvp", product, x, v, self.weights)

    def hessian(self, x: np.ndarray) -> np.ndarray:
        return self._run("hessian", lambda x, u: gl.hessian(lambda x: self.flat(x) @ u, x), x, self.weights)

    def mapped(self, how: str, x: np.ndarray, seed: np.ndarray, loop: bool) -> np.ndarray:
        pull = lambda x, u: jax.vjp(self.flat, x)[1](u)[0]
        one: dict[str, Callable[..., Any]] = {
            "vmap": lambda x, _: self.flat(x),
            "vmap of jvp": lambda x, v: jax.jvp(self.flat, (x,), (v,))[1],
            "vmap of vjp": pull,
        }
        points, alone = POINTS[:, None] * x, how in ("vmap of jvp", "vmap of vjp")
        seeds = SEEDS[:, None] * seed if alone else np.zeros((0, seed.size))
        if loop:
            alike = {"vmap": lambda x, _: self.value(x), "vmap of jvp": self.jvp}.get(how, self.vjp)
            pairs = [(z, seed) for z in points] + [(x, s) for s in seeds]
            return np.concatenate([alike(*pair) for pair in pairs])

        def many(points: Any, x: Any, seeds: Any, seed: Any) -> Any:
            if how == "vjp of vmap":
                y, pullback = jax.vjp(jax.vmap(self.flat), points)
                return pullback(jnp.broadcast_to(seed, y.shape))[0]
            found = jax.vmap(one[how], (0, None))(points, seed)
            return jnp.concatenate([found, jax.vmap(one[how], (None, 0))(x, seeds)]) if alone else found

        return self._run(how, many, points, x, seeds, seed).reshape(-1)

    def run(self, x: np.ndarray, u: np.ndarray, compiled: bool) -> np.ndarray:
        def both(x: Any, u: Any) -> Any:  # the value apart, as f may look at whether it is traced
            return jnp.concatenate([self.flat(x), jax.vjp(self.flat, x)[1](u)[0]])

        run = self.compilations.setdefault("both", jax.jit(both)) if compiled else both
        with self.mode():
            return self._numpy(run(self._array(x), self._array(u)))

    def mended(self) -> None:
        return None  # jax has no operation that is known to be wrong

    def where(self, i: int) -> str:
        return entry_name(self.tree, i)

    def where_output(self, i: int) -> str:
        return entry_name(self.output, i)

    def _run(self, name: str, function: Callable[..., Any], *vectors: np.ndarray) -> np.ndarray:
        """Compiled once; op by op where f looks at its values, which jit does not allow."""
        run = self.compilations.get(name)
        if run is None:
            run = self.compilations[name] = jax.jit(function)
        with self.mode():
            try:
                return self._numpy(run(*(v.astype(self.tree.dtype) for v in vectors)))
            except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
                self.compilations[name] = function
                return self._numpy(function(*map(self._array, vectors)))

    def _array(self, vector: np.ndarray) -> Any:
        return jnp.asarray(vector, self.tree.dtype)

    def _numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array, np.float64)


def _precisions(f: Callable[..., Any], leaves: Sequence[Any]) -> list[Any]:
    """The dtypes of x and of f's operations, of which the coarsest is what f can be held to."""
    found = [leaf.dtype for leaf in leaves]
    try:
        jaxpr = jax.make_jaxpr(lambda leaves: f(leaves)[0])(list(leaves)).jaxpr
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        return found  # f looks at its values
    moving, results = set(jaxpr.invars), []  # constants that f makes for itself are as exact as they are
    for equation in jaxpr.eqns:
        if not moving.isdisjoint(v for v in equation.invars if not hasattr(v, "val")):
            moving.update(equation.outvars)
            results += [v.aval for e in (equation, *inside(equation)) for v in e.outvars]
    found += [aval.dtype for aval in results if hasattr(aval, "dtype")]
    return [dtype for dtype in found if jnp.issubdtype(dtype, jnp.inexact)]


def _derived(mode: str, f: Callable[[Any], Any], v: Any, vector: bool) -> Callable[[Any], Any]:
    """The gradient of f (of v·f, where f is a vector), or its slope along v."""
    if mode == "forward":
        return lambda x: jax.jvp(f, (x,), (v,))[1]
    return jax.grad((lambda x: f(x) @ v) if vector else f)
