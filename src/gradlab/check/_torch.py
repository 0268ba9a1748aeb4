from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import gradlab.torch as gl
from gradlab._typing import Leaves
from gradlab.check.claims import POINTS, SEEDS, entry_name
from gradlab.transforms.linearised._torch import materialised
from gradlab.transforms.repairs._torch import Level, Repair, repaired
from gradlab.transforms.trees._torch import Tree, flatten, tree_function, unflatten

OP = "check.derivatives"
jvp, vjp, vmap = torch.func.jvp, torch.func.vjp, torch.func.vmap


def subjects(f: Callable[..., Any], x: Any, args: Any, has_aux: bool) -> tuple[Subject, Subject | None]:
    """f in its own dtype, and a float64 run of the same function as its shadow, where it has one."""
    f, x = real_form(f, x, has_aux)
    subject = Subject(f, x, args, has_aux)
    if subject.eps == np.finfo(np.float64).eps:
        return subject, None
    x, args = pytree.tree_map(_widened, (x, args))
    return subject, _shadow(f, x, args, has_aux, nullcontext) or _shadow(f, x, args, has_aux, Widened)


def _shadow(f: Any, x: Any, args: Any, has_aux: bool, within: Callable[[], Any]) -> Subject | None:
    """The float64 run of f; None where an operation meets a tensor of another dtype, or has no such form."""
    try:
        shadow = Subject(f, x, args, has_aux, within)
        shadow.vjp(shadow.x, np.ones(shadow.output.size))
    except RuntimeError:
        return None
    return shadow if shadow.eps == np.finfo(np.float64).eps else None


class Precisions(TorchFunctionMode):
    """Records the dtypes that f's operations give, since the coarsest is what f can be held to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.dtype] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and (result.is_floating_point() or result.is_complex()):
            self.found.append(result.dtype)
        return result


class Widened(TorchFunctionMode):
    """While active, every operation runs in float64: what f closes over too, which torch does not promote."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        narrow = args and isinstance(args[0], torch.Tensor) and _widened(args[0]) is not args[0]
        if narrow and (name in ("__setitem__", "set_") or (name.endswith("_") and not name.endswith("__"))):
            raise RuntimeError(f"{name} writes into a {args[0].dtype} tensor of f's own")
        if name in ("float", "half", "bfloat16"):
            func = torch.Tensor.double
        if name in ("cfloat", "chalf"):
            return args[0].to(torch.complex128)
        return func(*map(_widened, args), **{key: _widened(value) for key, value in kwargs.items()})


def _widened(leaf: Any) -> Any:
    if isinstance(leaf, torch.dtype):
        wide = torch.complex128 if leaf.is_complex else torch.float64
        return wide if leaf.is_complex or leaf.is_floating_point else leaf
    if isinstance(leaf, torch.Tensor):
        wide = _widened(leaf.dtype)
        return leaf if leaf.dtype == wide else leaf.to(wide)
    return type(leaf)(map(_widened, leaf)) if type(leaf) in (list, tuple) else leaf


def real_form(f: Callable[..., Any], x: Any, has_aux: bool) -> tuple[Callable[..., Any], Any]:
    """f and x with complex tensors as pairs of reals on a last axis: each framework's convention cancels.

    What f returns beside floats (integers, None) is left out.
    """
    pairs = lambda leaf: torch.stack([leaf.real, leaf.imag], -1) if _complex(leaf) else leaf
    leaves, structure = flatten(x)
    which = [_complex(leaf) for leaf in leaves]

    def paired(tree: Any) -> Any:
        leaves, structure = flatten(tree)
        return unflatten(structure, list(map(pairs, leaves))) if any(map(_complex, leaves)) else tree

    def floats(y: Any) -> Any:
        leaves, _ = flatten(y)
        kept = [z for z in leaves if _complex(z) or (isinstance(z, torch.Tensor) and z.is_floating_point())]
        return paired(y if len(kept) in (0, len(leaves)) else kept)

    def real(x: Any, *args: Any) -> Any:
        if any(which):
            given = zip(which, flatten(x)[0], strict=True)
            x = unflatten(structure, [torch.complex(z[..., 0], z[..., 1]) if c else z for c, z in given])
        y = f(x, *args)
        if has_aux and isinstance(y, tuple) and len(y) == 2:
            return floats(y[0]), y[1]
        return floats(y)

    return real, paired(x)


def restored(subject: Subject, x: Any) -> Any:
    """The subject's point as a tree like x, of which `real_form` made pairs."""
    given = subject.tree.put(subject.tree.split(subject._array(subject.x)))
    join = lambda leaf, pair: torch.complex(pair[..., 0], pair[..., 1]) if _complex(leaf) else pair
    return pytree.tree_map(join, x, given)


def _complex(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_complex()


class Subject:
    """f at x as torch differentiates it: flat numpy float64 vectors in and out."""

    def __init__(
        self, f: Callable[..., Any], x: Any, args: Any, has_aux: bool, within: Callable[[], Any] = nullcontext
    ):
        self.within = within  # the mode in which everything of f runs
        detach = lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
        x, args = pytree.tree_map(detach, x), pytree.tree_map(detach, args)
        self.tree = Tree(OP, "x", x)
        tensors = [t for t in pytree.tree_leaves((self.tree.leaves, args)) if isinstance(t, torch.Tensor)]
        before = [tensor.clone() for tensor in tensors]
        self.function, output = tree_function(OP, f, self.tree, args, has_aux)
        with within(), Precisions() as inside:
            outputs, _ = self.function(self.tree.leaves)
        changed = [i for i, (a, b) in enumerate(zip(tensors, before, strict=True)) if not _same(a, b)]
        self.changed = ["x" if i < len(self.tree.leaves) else "args" for i in changed]
        self.output = output([y.detach() for y in outputs])
        self.n, self.sizes, self.scalar = self.tree.size, self.tree.sizes, self.output.shapes == [()]
        self.parts = len(self.sizes) + len(self.output.sizes)
        self.eps = max(
            torch.finfo(dtype).eps for dtype in [leaf.dtype for leaf in self.tree.leaves] + inside.found
        )
        self.largest = float(torch.finfo(self.tree.dtype).max)
        self.x = self._numpy(self.tree.ravel(self.tree.leaves)).copy()  # of the caller's own memory
        self.dtype = str(self.tree.dtype).removeprefix("torch.")
        self.compilations: dict[str, Callable[..., Any]] = {}

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
        return self.output.ravel(self.function(leaves)[0]).to(self.tree.dtype)

    def value(self, x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self._run(self.flat, x)

    plain = value  # nothing is compiled

    def mutated(self) -> str:
        return self.changed[0] if self.changed else ""

    def structure(self) -> str:
        with self.within():
            xs = [x.detach().clone().requires_grad_() for x in self.tree.leaves]
            outputs = [y for y in self.function(xs)[0] if y.requires_grad]
            grads = torch.autograd.grad(outputs, xs, [torch.ones_like(y) for y in outputs], allow_unused=True)
        for i, (g, x) in enumerate(zip(grads, xs, strict=True)):
            if g is not None and (g.shape, g.dtype, g.device) != (x.shape, x.dtype, x.device):
                place = self.tree.leaf_name(self.tree.places[i])
                return (
                    f"the gradient by {place} is {g.dtype} {tuple(g.shape)}, x is {x.dtype} {tuple(x.shape)}"
                )
        return ""

    def jvp(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        return self._run(lambda x, v: _pushed(self.flat, x, v), x, v)

    def vjp(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        return self._run(lambda x, u: _pulled(self.flat, x, u), x, u)

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return self.vjp(x, self.weights)

    def pulls(self, x: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        z, seed = self._array(x).requires_grad_(), self._array(u)
        given = seed.clone()
        with self.within():
            y = self.flat(z)
            if not y.requires_grad:
                return 0 * x, 0 * x, False
            pull = lambda u: torch.autograd.grad(y, z, u, retain_graph=True, materialize_grads=True)[0]
            once, again = self._numpy(pull(seed)), self._numpy(pull(given.clone()))
        return once, again, not _same(seed, given)

    def jvp_by_leaf(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        def total(x: Any, v: Any) -> Any:
            leaves, tangents = self.tree.split(x), self.tree.split(v)
            return sum(_pushed(self._alone(leaves, k), leaves[k], tangents[k]) for k in range(len(leaves)))

        return self._run(total, x, v)

    def vjp_by_leaf(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        def each(x: Any, u: Any) -> Any:
            leaves = self.tree.split(x)
            return self.tree.ravel(
                [_pulled(self._alone(leaves, k), leaves[k], u) for k in range(len(leaves))]
            )

        return self._run(each, x, u)

    def _alone(self, leaves: Leaves, k: int) -> Callable[[Any], Any]:
        """f of its k-th leaf, the others held constant."""
        return lambda leaf: self._flat([*leaves[:k], leaf, *leaves[k + 1 :]])

    def vjp_by_output(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        def total(x: Any, u: Any) -> Any:
            one = lambda z, k: self.function(self.tree.split(z))[0][k]
            parts = enumerate(self.output.split(u))
            return sum(_pulled(lambda z, k=k: one(z, k), x, part) for k, part in parts)

        return self._run(total, x, u)

    def nested(self, x: np.ndarray, v: np.ndarray, how: str) -> np.ndarray:
        def nest(x: Any, v: Any, u: Any) -> Any:
            function: Callable[[Any], Any] = lambda x: self.flat(x) @ u
            vector = False  # whether the function gives a gradient, or its slope along v
            for mode in reversed(how.split(" over ")):
                function = _derived(mode, function, v, vector, graph="forward" not in how)
                vector = vector or mode == "reverse"
            return materialised(function(x))

        return np.atleast_1d(self._run(nest, x, v, self.weights))

    def product(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        def product(x: Any, v: Any, u: Any) -> Any:
            point, direction = self.tree.put(self.tree.split(x)), self.tree.like(self.tree.split(v))
            scalar = lambda x: self.output.ravel(self.function(Tree(OP, "x", x).leaves)[0]) @ u
            return self.tree.ravel(Tree(OP, "v", gl.hvp(scalar, point, direction)).leaves)

        return self._run(product, x, v, self.weights)

    def hessian(self, x: np.ndarray) -> np.ndarray:
        return self._run(lambda x, u: gl.hessian(lambda x: self.flat(x) @ u, x), x, self.weights)

    def mapped(self, how: str, x: np.ndarray, seed: np.ndarray, loop: bool) -> np.ndarray:
        pull = lambda x, u: vjp(self.flat, x)[1](u)[0]
        one: dict[str, Callable[..., Any]] = {
            "vmap": lambda x, _: self.flat(x),
            "vmap of jvp": lambda x, v: materialised(jvp(self.flat, (x,), (v,))[1]),
            "vmap of vjp": pull,
            "vjp of vmap": pull,
        }
        points, alone = POINTS[:, None] * x, how in ("vmap of jvp", "vmap of vjp")
        seeds = SEEDS[:, None] * seed if alone else np.zeros((0, seed.size))
        if loop:
            pairs = [(z, seed) for z in points] + [(x, s) for s in seeds]
            return np.concatenate([self._run(one[how], *pair) for pair in pairs])

        def many(points: Any, x: Any, seeds: Any, seed: Any) -> Any:
            if how == "vjp of vmap":
                mapped: Any = vjp(vmap(self.flat), points)
                y, pullback = mapped
                return pullback(seed.expand_as(y))[0]
            found = vmap(one[how], (0, None))(points, seed)
            return torch.cat([found, vmap(one[how], (None, 0))(x, seeds)]) if alone else found

        return self._run(many, points, x, seeds, seed).reshape(-1)

    def run(self, x: np.ndarray, u: np.ndarray, compiled: bool) -> np.ndarray:
        forward = self.flat
        if compiled:
            forward = self.compilations.setdefault("flat", torch.compile(self.flat))

        def both(x: Any, u: Any) -> Any:
            x = x.requires_grad_()
            y = forward(x)
            return torch.cat([y, _zero_or(lambda: torch.autograd.grad(y, x, u)[0], y, x)])

        return self._run(both, x, u)

    def mended(self) -> tuple[Subject, str] | None:
        repair = Repair(Level.ALL)
        other = copy.copy(self)
        other.function = repaired(self.function, repair)
        other.value(self.x)
        return (other, ", ".join(sorted(repair.names))) if repair.names else None

    def where(self, i: int) -> str:
        return entry_name(self.tree, i)

    def where_output(self, i: int) -> str:
        return entry_name(self.output, i)

    def _run(self, function: Callable[..., Any], *vectors: np.ndarray) -> np.ndarray:
        arrays = [self._array(v) for v in vectors]
        with self.within():
            return self._numpy(function(*arrays))

    def _array(self, vector: np.ndarray) -> Any:
        return torch.tensor(vector, dtype=self.tree.dtype, device=self.tree.leaves[0].device)

    def _numpy(self, array: Any) -> np.ndarray:
        return array.double().numpy(force=True)


def _derived(mode: str, f: Callable[[Any], Any], v: Any, vector: bool, graph: bool) -> Callable[[Any], Any]:
    """The gradient of f (of v·f, where f is a vector), or its slope along v; `graph`: by autograd alone."""
    if mode == "forward":
        return lambda x: jvp(f, (x,), (v,))[1]
    scalar = (lambda x: f(x) @ v) if vector else f
    return (lambda x: _pulled(scalar, x, None, create_graph=True)) if graph else torch.func.grad(scalar)


def _pulled(f: Callable[..., Any], x: Any, u: Any, create_graph: bool = False) -> Any:
    """Reverse mode by torch.autograd.grad, which every autograd.Function supports."""
    x = x if x.requires_grad else x.clone().requires_grad_()
    y = f(x)
    return _zero_or(
        lambda: torch.autograd.grad(y, x, u, create_graph=create_graph, materialize_grads=True)[0], y, x
    )


def _zero_or(gradient: Callable[[], Any], y: Any, x: Any) -> Any:
    """A gradient; zeros where y does not depend on x."""
    return gradient() if y.requires_grad else torch.zeros_like(x)


def _pushed(f: Callable[..., Any], x: Any, v: Any) -> Any:
    """Forward mode by dual numbers, which every autograd.Function with a jvp supports."""
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v)))
    return torch.zeros_like(primal) if tangent is None else materialised(tangent)


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
