"""Does one example of a batch influence the loss of another? Each half of the batch replaced, the other watched.

The batch is made part of the point, its integers as pairs of floats, so that one compiled function serves
every batch, in float64 where f has such a form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from gradlab._errors import InputError, KindError
from gradlab.check.claims import _same_function, _value, natural_scales
from gradlab.check.judge import FACTOR, Derivative, Subject, Vector, agreed, worst
from gradlab.check.report import FAILED, PASSED, Report, Row

OP = "check.batch_independent"
DIGIT = 4096  # an integer is DIGIT times one float plus another, which float32 holds exactly
Pair = tuple[np.ndarray, np.ndarray]  # examples that are replaced, and those that are watched


class Independence(Report):
    """The report, under a title of its own."""

    @property
    def title(self) -> str:
        """Of what function."""
        return f"batch independence on {self.framework}, {self.dtype}"


@dataclass(frozen=True)
class Batch:
    """A function of params and batch as one flat vector x, of whose entries `owner` is the example, -1 for params."""

    subject: Subject
    owner: np.ndarray
    size: int
    weights: Vector  # of the losses in the gradient
    scale: Vector  # of each loss, in units of which it is looked at, beside losses of other sizes
    rng: np.random.Generator
    accuracy: float = 0.0

    @property
    def x(self) -> Vector:
        """The point."""
        return self.subject.x

    @property
    def low(self) -> Subject:
        """The subject."""
        return self.subject

    def forms(self, claim: str, pair: Pair, other: Vector) -> tuple[Derivative, Derivative, Vector]:
        """What is the same where examples are independent, and the cotangent it is seeded with.

        The losses of those that are watched, whether or not the rest is replaced. A scalar loss is a sum over
        examples: replaced together they change it by as much as one by one.
        """
        acting, watched = pair
        swapped = lambda x, *examples: np.where(np.isin(self.owner, np.concatenate(examples)), other, x)
        if self.subject.scalar:
            get, u = self._getter(claim, np.array([0])), np.ones(1)
            together = lambda s, x, u: get(s, x, u) + get(s, swapped(x, acting, watched), u)
            apart = lambda s, x, u: get(s, swapped(x, acting), u) + get(s, swapped(x, watched), u)
            return together, apart, u
        seen = self._outputs(watched)
        get, u = self._getter(claim, np.flatnonzero(seen)), np.where(seen, self.weights / self.scale, 0.0)
        return lambda s, x, u: get(s, swapped(x, acting), u), get, u

    def _getter(self, claim: str, seen: np.ndarray) -> Derivative:
        if claim == "losses":
            return lambda s, x, u: s.value(x)[seen] / self.scale[seen]
        return lambda s, x, u: s.vjp(x, u)[self.owner < 0]

    def _outputs(self, examples: np.ndarray) -> np.ndarray:
        """Which of the losses are those of these examples."""
        return np.isin(np.repeat(np.arange(self.size), self.weights.size // self.size), examples)

    def halves(self) -> Iterator[Pair]:
        """Splits of the batch that part every two examples, in both roles."""
        examples = np.arange(self.size)
        for bit in range((self.size - 1).bit_length()):
            one, other = examples[examples >> bit & 1 == 1], examples[examples >> bit & 1 == 0]
            yield one, other
            if not self.subject.scalar:
                yield other, one

    def verdict(self, claim: str, others: list[Vector]) -> Row:
        """The first influence found, or the verdict that says most."""
        found = [Row(claim, PASSED, 0.0)]
        for other in others:
            for pair in self.halves():
                left, right, u = self.forms(claim, pair, other)
                row = agreed(claim, left, right, u, self, linear=claim == "gradients")
                if row.status == FAILED:
                    return self._told(row, pair, other)
                found.append(row)
        return worst(found)

    def _told(self, row: Row, pair: Pair, other: Vector) -> Row:
        """The row with the two examples, found by halving, between which the influence is largest."""
        rounding = FACTOR * (row.uncertainty or 0.0)

        def effect(acting: np.ndarray, watched: np.ndarray) -> float:
            left, right, u = self.forms(row.claim, (acting, watched), other)
            change = np.abs(left(self.subject, self.x, u) - right(self.subject, self.x, u)).max(initial=0.0)
            return float(change) if np.isfinite(change) else np.inf

        def narrowed(examples: np.ndarray, effect: Callable[[np.ndarray], float]) -> np.ndarray:
            while examples.size > 1:
                half = max(np.array_split(examples, 2), key=effect)
                if effect(half) <= rounding:  # only together
                    break
                examples = half
            return examples

        acting, watched = pair
        watched = narrowed(watched, lambda half: effect(acting, half))
        acting = narrowed(acting, lambda half: effect(half, watched))
        unit = 1.0 if self.subject.scalar else float(self.scale[self._outputs(watched)].max())
        change, rounding = unit * effect(acting, watched), unit * rounding
        what = "the loss" if row.claim == "losses" else "the gradient of the loss"
        message = f"{what} of {_named(watched)} changes by {change:.1e} when {_named(acting)} is replaced"
        if self.subject.scalar:
            both = f"{_named(watched)} and {_named(acting)}"
            message = f"{what} is no sum over examples: replacing {both} changes it otherwise than one by one"
            message += f", by {change:.1e}"
        message += f" (rounding: {rounding:.1e})"
        where = f"{_named(watched)} by {_named(acting)}"
        return replace(row, error=change, uncertainty=rounding / FACTOR, where=where, message=message)


def _named(examples: np.ndarray) -> str:
    if examples.size == 1:
        return f"example {examples[0]}"
    return "examples " + ", ".join(map(str, examples[:3])) + (", ..." if examples.size > 3 else "")


def report(
    framework: str, f: Callable[..., Any], params: Any, batch: Any, args: tuple[Any, ...], seed: int
) -> Report:
    """Rows `value`, `losses` and `gradients`."""
    tools = _tools(framework)
    leaves, structure, size = _leaves(batch, tools)
    encoded = [tools.encode(leaf) for _, leaf in leaves]

    def joint(x: Any, *args: Any) -> Any:
        params, given = x
        decoded = [tools.decode(z, leaf) for z, (_, leaf) in zip(given, leaves, strict=True)]
        y = f(params, tools.unflatten(structure, decoded), *args)
        _refuse_output(y, size)
        return y

    subject, shadow = tools.subjects(joint, (params, encoded), args, False)
    if len(subject.sizes) == len(leaves):
        raise KindError(f"{OP}: params holds no float array to differentiate; pass (params, batch)")
    first = _value(SimpleNamespace(low=subject, x=subject.x))  # type: ignore[arg-type]
    if first.status != PASSED:
        return Independence(framework, subject.dtype, [first])
    whole = shadow if shadow is not None and _same_function(subject, shadow) else subject
    sizes = whole.sizes[-len(leaves) :]
    owner = np.concatenate(
        [np.full(whole.n - sum(sizes), -1)] + [np.repeat(np.arange(size), n // size) for n in sizes]
    )
    rng = np.random.default_rng(seed)
    losses = np.abs(whole.value(whole.x))
    weights = rng.choice([-1.0, 1.0], size=losses.size) * rng.uniform(0.5, 1.5, size=losses.size)
    largest = 1.0 if whole.scalar else losses.max() or 1.0
    scale = np.ones(1) if whole.scalar else np.maximum(losses, whole.eps * largest)
    b = Batch(whole, owner, size, weights, scale, rng)
    others = _replacements(b, [tools.kind(leaf) for _, leaf in leaves], sizes)
    return Independence(
        framework, subject.dtype, [first, *(b.verdict(c, others) for c in ("losses", "gradients"))]
    )


def _leaves(batch: Any, tools: Any) -> tuple[list[tuple[str, Any]], Any, int]:
    """The batch's leaves with their names, and its size."""
    leaves, structure = tools.flatten(batch)
    if not leaves:
        raise InputError(f"{OP}: batch is an empty tree; pass arrays with a leading axis of examples")
    for name, leaf in leaves:
        if not getattr(leaf, "shape", ()):
            given = "shape ()" if hasattr(leaf, "shape") else f"type {type(leaf).__name__}"
            raise InputError(
                f"{OP}: {name} has {given}, no leading axis of examples; pass data that is no example after the batch"
            )
    (first, leaf), size = leaves[0], leaves[0][1].shape[0]
    for name, other in leaves:
        if other.shape[0] != size:
            raise InputError(
                f"{OP}: {name} has {other.shape[0]} examples, {first} has {size}; "
                "pass leaves with one leading axis of examples"
            )
    if size == 0:
        raise InputError(f"{OP}: the batch is empty; pass at least two examples")
    if size == 1:
        raise InputError(
            f"{OP}: the batch has one example, which has no other to influence; pass at least two"
        )
    return leaves, structure, size


def _refuse_output(y: Any, size: int) -> None:
    shape = tuple(y.shape) if hasattr(y, "shape") else None
    if shape is None:
        raise InputError(
            f"{OP}: f returned a {type(y).__name__}; return the losses of the {size} examples, or one scalar"
        )
    if shape and shape[0] != size:
        raise InputError(
            f"{OP}: f returned shape {shape}; return the losses of the {size} examples, "
            f"shape ({size},), or one scalar"
        )
    if "float" not in str(y.dtype):
        raise KindError(f"{OP}: f returned {y.dtype}; return floats")


def _replacements(b: Batch, kinds: list[str], sizes: list[int]) -> list[Vector]:
    """Other batches: each example another one of the batch; and with other values, where f takes them."""
    start = b.x.size - sum(sizes)
    parts = np.split(b.x[start:], np.cumsum(sizes)[:-1])
    donors = (np.arange(b.size) + b.rng.integers(1, b.size)) % b.size
    moved = [part.reshape(b.size, -1)[donors].reshape(-1) for part in parts]
    drawn = [
        [_drawn(part, kind, b.rng, *between) for part, kind in zip(parts, kinds, strict=True)]
        for between in ((0.5, 1.5), (-3.0, 3.0))
    ]
    shuffled, *others = (np.concatenate([b.x[:start], *found]) for found in (moved, *drawn))
    return [shuffled, *(other for other in others if _taken(b, other))]


def _drawn(part: Vector, kind: str, rng: np.random.Generator, low: float, high: float) -> Vector:
    """Floats multiplied by as much; integers that occur in the leaf, and zero; any booleans."""
    if kind == "float":
        size = np.where(part == 0, natural_scales(part, [part.size]), part) if part.size else part
        return size * rng.uniform(low, high, part.size)
    known = part.reshape(-1, 2)
    pool = np.array([[0.0, 0.0], [0.0, 1.0]]) if kind == "bool" else np.concatenate([known, np.zeros((1, 2))])
    return pool[rng.integers(0, len(pool), len(known))].reshape(-1)


def _taken(b: Batch, other: Vector) -> bool:
    """Whether f has finite losses and gradients there."""
    try:
        found = b.subject.value(other), b.subject.vjp(other, b.weights)[b.owner < 0]
    except Exception:  # of f: no such label, an empty sequence
        return False
    return all(np.isfinite(z).all() for z in found)


def _digits(numbers: np.ndarray) -> np.ndarray:
    return np.stack(np.divmod(numbers.astype(np.int64), DIGIT), -1)


def _tools(framework: str) -> SimpleNamespace:
    return _torch_tools() if framework == "torch" else _jax_tools()


def _jax_tools() -> SimpleNamespace:
    import jax
    import jax.numpy as jnp

    from gradlab.check import _jax

    def kind(leaf: Any) -> str:
        if not (leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.number)):
            raise KindError(f"{OP}: batch holds {leaf.dtype}; pass numbers (of random keys their key_data)")
        whole = "int" if jnp.issubdtype(leaf.dtype, jnp.integer) else "float"
        return "bool" if leaf.dtype == bool else whole

    def flatten(batch: Any) -> Any:
        paths, structure = jax.tree_util.tree_flatten_with_path(batch)
        return [("batch" + jax.tree_util.keystr(path), leaf) for path, leaf in paths], structure

    def decode(z: Any, leaf: Any) -> Any:
        if kind(leaf) == "float":
            return z
        digits = jnp.round(z).astype(int)
        return (digits[..., 0] * DIGIT + digits[..., 1]).astype(leaf.dtype)

    def encode(leaf: Any) -> Any:
        return jnp.asarray(leaf) if kind(leaf) == "float" else jnp.asarray(_digits(np.asarray(leaf)), float)

    return SimpleNamespace(
        subjects=_jax.subjects,
        flatten=flatten,
        unflatten=jax.tree.unflatten,
        encode=encode,
        decode=decode,
        kind=kind,
    )


def _torch_tools() -> SimpleNamespace:
    import torch
    from torch.utils import _pytree

    from gradlab.check import _torch

    def kind(leaf: Any) -> str:
        whole = "float" if leaf.is_floating_point() or leaf.is_complex() else "int"
        return "bool" if leaf.dtype == torch.bool else whole

    def flatten(batch: Any) -> Any:
        paths, structure = _pytree.tree_flatten_with_path(batch)
        name = lambda path: "batch" + _pytree.keystr(path)
        convert = lambda leaf: torch.tensor(leaf) if isinstance(leaf, np.ndarray) else leaf
        return [(name(path), convert(leaf)) for path, leaf in paths], structure

    def encode(leaf: Any) -> Any:
        if kind(leaf) == "float":
            return leaf
        return torch.tensor(_digits(leaf.cpu().numpy()), dtype=torch.float64, device=leaf.device)

    def decode(z: Any, leaf: Any) -> Any:
        if kind(leaf) == "float":
            return z
        digits = z.round().long()
        return (digits[..., 0] * DIGIT + digits[..., 1]).to(leaf.dtype)

    return SimpleNamespace(
        subjects=_torch.subjects,
        flatten=flatten,
        unflatten=lambda structure, leaves: _pytree.tree_unflatten(leaves, structure),
        encode=encode,
        decode=decode,
        kind=kind,
    )
