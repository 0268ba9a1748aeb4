"""The claims a framework makes of a function's derivatives, one row each.

Neutral: what is claimed, and what each claim is compared with; `judge.py` gives the verdicts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from itertools import product
from typing import Any

import numpy as np
from scipy.linalg import norm

from gradlab.check.differences import STEPS, Estimate, Ladder, joined, ladder
from gradlab.check.judge import (
    FACTOR,
    RESOLUTION,
    Derivative,
    Subject,
    Vector,
    agreed,
    judged,
    resolved,
    told,
    worst,
)
from gradlab.check.report import FAILED, INCONCLUSIVE, PASSED, UNSUPPORTED, Row

GROUPS = 6  # directions of one leaf alone; more leaves are put together in so many
HESSIAN_ENTRIES = 8  # the dense Hessian is checked up to this many entries of x
EVALUATIONS = 5  # at the same point, which a random function does not survive
LOCATED = 3  # wrong entries that are named
SIZES = {True: (300.0, 2.0**20), False: (64.0,)}  # of cotangents, in float32 and above, and below
NOISES = 1000.0  # times the noise of an output, which a small slope must not bring out
MODES = ("forward", "reverse")
POINTS = np.array([1.0, 1.01, 0.98])  # multiples of x that are mapped over
SEEDS = np.array([1.0, -1.5, 0.75])  # and of a direction or cotangent, at one x

Additive = Callable[[Estimate], Vector]  # where an estimated slope is linear in its direction


class Checked:
    """A subject, its float64 shadow, the directions, and the values along them that all claims share."""

    @np.errstate(all="ignore")
    def __init__(
        self, subject: Subject, shadow: Subject | None, seed: int, directions: int, accuracy: float = 0.0
    ):
        self.accuracy = accuracy
        self.low, self.high = subject, shadow if shadow and _same_function(subject, shadow) else subject
        self.x, self.rng = subject.x, np.random.default_rng(seed)
        self.scales = natural_scales(subject.x, subject.sizes)
        self.directions = [self._signs(subject.n) * self.scales for _ in range(directions)]
        self.full = directions  # of all entries; any others are of a group
        groups = _groups(self.scales, subject.sizes)
        self._ladders: dict[tuple[str, int, int], Ladder] = {}
        self._parts: dict[tuple[str, int], list[tuple[Ladder, Ladder]]] = {}
        if groups.any():
            alone = (self._signs(subject.n) * self.scales * (groups == g) for g in range(groups.max() + 1))
            self.directions += [self._grown(v) for v in alone]

    def _signs(self, n: int) -> Vector:
        """Random signs and sizes, none near zero: a single wrong entry always counts."""
        return self.rng.choice([-1.0, 1.0], size=n) * self.rng.uniform(0.5, 1.5, size=n)

    def _grown(self, v: Vector) -> Vector:
        """v, or a multiple of it along which f changes enough to be seen, beside larger things that f is made of."""

        def unresolved(v: Vector) -> float:
            slope = self.values(v).slope()
            part = 10 * slope.uncertainty / np.abs(slope.value)
            return float(np.mean(np.fmin(part, 1.0))) if part.size else 0.0

        found, tried = unresolved(v), v
        for _ in range(2):
            if found < RESOLUTION:
                break
            tried = 1e3 * tried
            other = unresolved(tried)
            if other < found / 2:
                found, v = other, tried
        return v

    def ladder(self, what: str, k: int, steps: np.ndarray) -> Ladder:
        """Values or gradients along direction k, evaluated when first asked for."""
        key = (what, k, id(steps))
        if key not in self._ladders:
            sides = self.ladder(what, 0, steps).sides if 0 < k < self.full else None
            self._ladders[key] = self._along(what)(self.directions[k], steps, sides)
        return self._ladders[key]

    def _along(self, what: str) -> Callable[..., Ladder]:
        return self.gradients if what == "gradient" else self.values

    def values(self, v: Vector, steps: np.ndarray = STEPS, sides: np.ndarray | None = None) -> Ladder:
        """Of f along v."""
        return ladder(self.high.value, self.x, v, steps, sides, self.high.eps)

    def gradients(self, v: Vector, steps: np.ndarray = STEPS, sides: np.ndarray | None = None) -> Ladder:
        """Of u·f along v; what is below the rounding of u·f in a natural change of x is rounding."""
        found = ladder(self.high.gradient, self.x, v, steps, sides, self.high.eps)
        return replace(found, natural=self.magnitude / np.where(self.scales > 0, self.scales, 1.0))

    @cached_property
    def magnitude(self) -> float:
        """Of u·f at x."""
        return float(np.abs(self.high.weights) @ np.abs(self.high.value(self.x)))

    @cached_property
    def noise(self) -> Vector:
        """Of f in its own precision."""
        return self.ladder("value", 0, STEPS).noise * (self.low.eps / self.high.eps)

    @property
    def weighted_noise(self) -> float:
        """Of u·f."""
        return float(norm(self.noise * self.high.weights))

    @property
    def slope_noise(self) -> Vector:
        """What that is in a slope of u·f, entry by entry: over a natural change of x."""
        return self.weighted_noise / np.where(self.scales > 0, self.scales, 1.0)

    def cotangent(self) -> Vector:
        """A random u in which each output counts by its slope, so that a small one is not hidden."""
        plain = self._signs(self.high.value(self.x).size)
        if self.low.scalar:
            return plain
        first = self.ladder("value", 0, STEPS)
        estimate = first.slope()
        slope = np.nan_to_num(np.abs(estimate.value))
        size = np.maximum.reduce([slope, 1e-4 * np.abs(first.centre), NOISES * self.noise])
        known = slope > 10 * estimate.uncertainty  # rounding must not be blown up to count
        largest = size.max(initial=0.0)
        size = np.where(known, np.maximum(size, max(1e-8, self.low.eps) * largest), largest)
        return plain / np.where(size > 0, size, 1.0)

    def additive(self, what: str, k: int, of: Callable[[Ladder], Ladder] = lambda found: found) -> Additive:
        """Where the slope along direction k is the sum of those along two parts of it, for four ways to part it."""

        def holds(whole: Estimate) -> Vector:
            linear = np.ones(whole.value.shape, bool)
            for one, other in (map(Ladder.slope, map(of, pair)) for pair in self._parted(what, k)):
                size = np.maximum(np.abs(one.value), np.abs(other.value))
                known = one.uncertainty + other.uncertainty + whole.uncertainty
                gap = np.abs(one.value + other.value - whole.value)
                linear &= gap <= FACTOR * known + RESOLUTION * size
            return linear

        return holds

    def _parted(self, what: str, k: int) -> list[tuple[Ladder, Ladder]]:
        """Values or gradients along two vectors that add up to direction k, four times; found when first asked for."""
        if (what, k) not in self._parts:
            v, along = self.directions[k], self._along(what)
            parts = [v * self.rng.uniform(-1.0, 1.0, size=v.size) for _ in range(4)]
            self._parts[what, k] = [(along(part), along(v - part)) for part in parts]
        return self._parts[what, k]

    def everywhere(self, verdict: Callable[[int, Vector], Row]) -> Row:
        """The worst verdict over all directions, of which none is tried after one that fails."""
        found: list[Row] = []
        for k, v in enumerate(self.directions):
            found.append(verdict(k, v))
            if found[-1].status == FAILED:
                break
        return worst(found)


def _groups(scales: Vector, sizes: list[int]) -> np.ndarray:
    """For each entry the number of a group that also gets a direction of its own, lest a larger one hides it.

    A group is a leaf, or those of its entries which are 10⁴ times smaller or larger than most.
    """
    leaf = np.repeat(np.arange(len(sizes)), sizes)
    parts = [part for part in np.split(scales, np.cumsum(sizes)[:-1]) if part.size]
    relative = np.concatenate([part / (np.median(part) or 1.0) for part in parts])
    band = np.round(np.log10(np.where(relative > 0, relative, 1.0)) / 8)
    return np.unique(np.stack([leaf, band]), axis=1, return_inverse=True)[1].reshape(-1) % GROUPS


def _same_function(subject: Subject, shadow: Subject) -> bool:
    """Whether the float64 run is of the same function: keyed random numbers, for one, depend on the dtype."""
    low, high = subject.value(subject.x), shadow.value(shadow.x)
    near = np.abs(low - high) <= np.sqrt(subject.eps) * (np.abs(high) + np.abs(high).max(initial=0.0))
    return low.shape == high.shape and bool((near | ~np.isfinite(low) | ~np.isfinite(high)).all())


Claim = tuple[str, Callable[[Checked], Row]]


@np.errstate(all="ignore")
def rows(
    c: Checked,
    order: int,
    modes: tuple[str, ...] = MODES,
    vmap: bool = True,
    compiled: bool = True,
    without: tuple[str, ...] = (),
) -> list[Row]:
    """Every claim up to the order asked for, one row each; some are left out by name."""
    first = _value(c)
    if first.status != PASSED:
        return [first]
    u = c.cotangent()
    for s in {id(s): s for s in (c.low, c.high)}.values():
        s.weigh(np.ones(1) if c.low.scalar else u)
    claims = [*_first(c, modes, u)]
    if order >= 2:
        claims += _higher(c, modes, order)
    if vmap:
        claims += _mapped(modes, u)
    if compiled:
        claims.append(("compiled", partial(_compiled, u)))
    return [first, *(_supported(name, claim, c) for name, claim in claims if name not in without)]


def _supported(name: str, claim: Callable[[Checked], Row], c: Checked) -> Row:
    try:
        return claim(c)
    except Exception as error:  # whatever the framework raises is its answer to this claim
        message = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        return Row(name, UNSUPPORTED, message=message)


def _value(c: Checked) -> Row:
    mutated = c.low.mutated()
    if mutated:
        return Row("value", FAILED, where=mutated, message=f"f changed its input {mutated} in place")
    once, *others = (c.low.plain(c.x) for _ in range(EVALUATIONS))
    again = next((z for z in others if not np.array_equal(once, z, equal_nan=True)), once)
    if again is not once:
        worst_error = float(np.nanmax(np.abs(once - again)))
        return Row(
            "value", FAILED, worst_error, 0.0, message="evaluations at the same point differ: is it random?"
        )
    if not np.isfinite(once).all():
        where = c.low.where_output(int(np.argmin(np.isfinite(once))))
        return Row("value", INCONCLUSIVE, where=where, message="the value is not finite")
    return Row("value", PASSED, 0.0, 0.0)


def _first(c: Checked, modes: tuple[str, ...], u: Vector) -> Iterator[Claim]:
    forward, reverse = "forward" in modes, "reverse" in modes
    yield "structure", _structure
    if forward:
        yield "jvp", _jvp
    if reverse:
        yield "vjp", lambda c: _pulled(c, "vjp", u, lambda s, x, u: s.vjp(x, u))
        if c.low.scalar:
            yield "gradient", lambda c: _pulled(c, "gradient", np.ones(1), lambda s, x, u: u * s.gradient(x))
        yield "vjp linear", partial(_linear, u)
        yield "vjp repeatable", partial(_repeatable, u)
    if forward and reverse:
        yield "jvp against vjp", partial(_transposed, u)
    if c.low.parts > 2:
        yield "each part alone", partial(_parts, u, forward, reverse)


def _higher(c: Checked, modes: tuple[str, ...], order: int) -> Iterator[Claim]:
    if "reverse" in modes:
        yield "hvp", lambda c: _second(c, "hvp", lambda s, x, v: s.product(x, v))
    for depth in range(2, order + 1):
        for nest in product(modes, repeat=depth):
            how = " over ".join(nest)
            yield how, partial(_nested, how)
    if "reverse" in modes:
        yield "hessian symmetric", _symmetric
        if c.low.n <= HESSIAN_ENTRIES:
            yield "hessian", _hessian


def _mapped(modes: tuple[str, ...], u: Vector) -> Iterator[Claim]:
    yield "vmap", lambda c: _alike(c, "vmap", np.ones(1))
    if "forward" in modes:
        yield "vmap of jvp", lambda c: _alike(c, "vmap of jvp", c.directions[0])
    if "reverse" in modes:
        yield "vmap of vjp", lambda c: _alike(c, "vmap of vjp", u)
        yield "vjp of vmap", lambda c: _alike(c, "vjp of vmap", u)


def _structure(c: Checked) -> Row:
    message = c.low.structure()
    return Row("structure", FAILED if message else PASSED, message=message)


def _jvp(c: Checked) -> Row:
    def verdict(k: int, v: Vector) -> Row:
        reference = lambda steps: c.ladder("value", k, steps).slope()
        additive = c.additive("value", k)
        forward = lambda s, x, v: s.jvp(x, v)
        return judged("jvp", forward, v, reference, c, c.noise, c.low.where_output, additive)

    return c.everywhere(verdict)


def _pulled(c: Checked, claim: str, u: Vector, pull: Callable[[Subject, Vector, Vector], Vector]) -> Row:
    """(Jᵀu)·v against the slope of u·f along v; where it fails, bisection finds the entries."""
    tried: list[Vector] = []
    onto = lambda v: lambda s, x, u: np.atleast_1d(pull(s, x, u) @ v)
    noise = float(norm(c.noise * u))

    def verdict(k: int, v: Vector) -> Row:
        tried.append(v)
        reference = lambda steps: c.ladder("value", k, steps).of(u).slope()
        additive = c.additive("value", k, lambda found: found.of(u))
        return judged(claim, onto(v), u, reference, c, noise, additive=additive)

    def within(v: Vector) -> Row:
        """The same along another direction, without another look at what is resolved at once."""
        first = c.values(v).of(u).slope()
        finer = lambda steps: c.values(v, steps).of(u).slope()
        reference = lambda steps: first if steps is STEPS or resolved(first).all() else finer(steps)
        return judged(claim, onto(v), u, reference, c, noise)

    row = c.everywhere(verdict)
    if row.status != FAILED:
        return row
    found = _located(within, tried[-1])
    if not found:
        return row
    entries = {i: within((np.arange(c.low.n) == i).astype(np.float64)) for i in found}
    order = sorted(found, key=lambda i: -(entries[i].error or 0.0))
    names = ", ".join(c.low.where(i) for i in order) + (" ..." if len(found) == LOCATED else "")
    entry = entries[order[0]]  # where a step of its own size resolves it
    return told(entry if entry.status == FAILED else row, names)


def _located(within: Callable[[Vector], Row], v: Vector) -> list[int]:
    """Entries of x at which a wrong derivative is found: the halves that fail, halved again."""
    found: list[int] = []
    pending = [np.arange(v.size)]
    while pending and len(found) < LOCATED:
        inside = pending.pop()
        if inside.size == 1:
            found.append(int(inside[0]))
            continue
        halves = np.array_split(inside, 2)
        tried = [within(np.where(np.isin(np.arange(v.size), half), v, 0.0)) for half in halves]
        pending += [
            half for half, row in reversed(list(zip(halves, tried, strict=True))) if row.status == FAILED
        ]
    return sorted(found)


def _linear(u: Vector, c: Checked) -> Row:
    """Jᵀ(a u + b w) = a Jᵀu + b Jᵀw, Jᵀ(-u) = -Jᵀu, Jᵀ(a u) = a Jᵀu for a large and a small a, and Jᵀ0 = 0."""
    w = u * c._signs(u.size)
    pull = lambda s, x, u: s.vjp(x, u)
    scaled = lambda a: (lambda s, x, u: pull(s, x, a * u), lambda s, x, u: a * pull(s, x, u))
    parts = [
        (
            lambda s, x, u: pull(s, x, 0.37 * u + 1.91 * w),
            lambda s, x, u: 0.37 * pull(s, x, u) + 1.91 * pull(s, x, w),
        ),
        *map(scaled, (-1.0, *(factor for a in SIZES[c.low.eps < 1e-4] for factor in (a, 1 / a)))),
        (
            lambda s, x, u: np.where(np.isfinite(pull(s, x, u)), pull(s, x, 0 * u), 0),
            lambda s, x, u: np.zeros_like(x),
        ),
    ]

    def verdict(one: Derivative, other: Derivative) -> Row:
        digits = np.nan_to_num(
            np.sqrt(c.low.eps) * np.abs(other(c.low, c.x, u))
        )  # of algorithms that depend on u's size
        words = "a linear pullback gives"
        return agreed("vjp linear", one, other, u, c, c.low.where, words, least=digits)

    return worst([verdict(*part) for part in parts])


def _repeatable(u: Vector, c: Checked) -> Row:
    """The same pullback twice gives the same, and leaves its cotangent as it was."""
    once, again, changed = c.low.pulls(c.x, u)
    if changed:
        return Row("vjp repeatable", FAILED, message="the pullback changed its cotangent in place")
    claim = "vjp repeatable"
    forms = (lambda s, x, u: again, lambda s, x, u: once)
    return agreed(claim, *forms, u, c, c.low.where, "its first run gave", linear=False)


def _transposed(u: Vector, c: Checked) -> Row:
    def verdict(k: int, v: Vector) -> Row:
        forward = lambda s, x, v: np.atleast_1d(s.jvp(x, v) @ u)
        reverse = lambda s, x, v: np.atleast_1d(s.vjp(x, u) @ v)
        least = c.low.eps * c.magnitude
        return agreed("jvp against vjp", forward, reverse, v, c, words="the vjp gives", least=least)

    return c.everywhere(verdict)


def _parts(u: Vector, forward: bool, reverse: bool, c: Checked) -> Row:
    """Each leaf of x, and each of f's outputs, differentiated with the others left out: they add up."""
    claim, words = "each part alone", "together they give"
    pulled = (lambda s, x, u: s.vjp(x, u), u, c, c.low.where, words)
    pushed = (lambda s, x, v: s.jvp(x, v), c.directions[0], c, c.low.where_output, words)
    parts = [(lambda s, x, u: s.vjp_by_output(x, u), *pulled), (lambda s, x, u: s.vjp_by_leaf(x, u), *pulled)]
    parts = parts * reverse + [(lambda s, x, v: s.jvp_by_leaf(x, v), *pushed)] * forward
    found = [_supported(claim, lambda c: agreed(claim, *part), c) for part in parts]
    return worst([row for row in found if row.status != UNSUPPORTED] or found)


def _second(c: Checked, claim: str, derivative: Callable[[Subject, Vector, Vector], Vector]) -> Row:
    """H v against differences of the gradient, entry by entry, and v·H v against second differences."""

    def verdict(k: int, v: Vector) -> Row:
        reference = lambda steps: c.ladder("gradient", k, steps).slope()
        additive = c.additive("gradient", k)
        return judged(claim, derivative, v, reference, c, c.slope_noise, c.low.where, additive)

    along = lambda s, x, v: np.atleast_1d(derivative(s, x, v) @ c.directions[0])
    independent = _by_values(c, claim, along)
    # Second differences resolve less than first: they can convict, and need not decide.
    row = c.everywhere(verdict)
    return independent if independent.status == FAILED and row.status != FAILED else row


def _by_values(c: Checked, claim: str, derivative: Callable[[Subject, Vector, Vector], Vector]) -> Row:
    """v·H v against second differences of u·f, which no derivative of the framework's stands behind."""
    reference = lambda steps: c.ladder("value", 0, steps).of(c.high.weights).curvature()
    place = lambda i: "along a random direction, against second differences of the value"
    return judged(claim, derivative, c.directions[0], reference, c, c.weighted_noise, place)


def _nested(how: str, c: Checked) -> Row:
    """A nest of modes; where torch's own operations are at fault and not f's rules, the row says so."""
    row = _nest(how, c)
    mended = c.high.mended() if row.status == FAILED else None
    if mended is None:
        return row
    subject, operations = mended
    other = copy.copy(c)
    other.low = other.high = subject
    if _nest(how, other).status == FAILED:
        return row
    note = f"{row.message}; {operations} differentiated by primitives is right: a fault of the framework's"
    return Row(row.claim, row.status, row.error, row.uncertainty, row.where, note)


def _nest(how: str, c: Checked) -> Row:
    derivative = lambda s, x, v: s.nested(x, v, how)
    third, scalar = how.count("over") == 2, "reverse" not in how
    if not (third or scalar):
        return _second(c, how, derivative)

    def verdict(k: int, v: Vector) -> Row:
        def reference(steps: np.ndarray) -> Estimate:
            gradients = lambda: c.ladder("gradient", k, steps)
            if third:
                return (gradients().of(v) if scalar else gradients()).curvature()
            found = c.ladder("value", k, steps).of(c.high.weights).curvature()
            if steps is STEPS or resolved(found).all():
                return found
            return found.confirmed(gradients().of(v).slope())  # which the vjp's row has judged

        if scalar:
            return judged(how, derivative, v, reference, c, c.weighted_noise)
        return judged(how, derivative, v, reference, c, c.slope_noise, c.low.where)

    return c.everywhere(verdict)


def _symmetric(c: Checked) -> Row:
    v, w = c.directions[0], c._signs(c.low.n) * c.scales
    left = lambda s, x, v: np.atleast_1d(s.product(x, v) @ w)
    right = lambda s, x, v: np.atleast_1d(s.product(x, w) @ v)
    least = c.low.eps * c.magnitude
    return agreed("hessian symmetric", left, right, v, c, words="its transpose gives", least=least)


def _hessian(c: Checked) -> Row:
    n = c.low.n

    def reference(steps: np.ndarray) -> Estimate:
        """Columns H (sᵢ eᵢ), one after the other."""
        return joined([c.gradients(row, steps).slope() for row in np.diag(c.scales)])

    columns = lambda s, x, scales: (s.hessian(x) * scales).T.reshape(-1)
    where = lambda i: f"[{c.low.where(i % n)}, {c.low.where(i // n)}]"
    return judged("hessian", columns, c.scales, reference, c, np.tile(c.slope_noise, n), where)


def _alike(c: Checked, how: str, seed: Vector) -> Row:
    """A transform of f against a loop over the same points."""
    batched = lambda s, x, seed: s.mapped(how, x, seed, loop=False)
    looped = lambda s, x, seed: s.mapped(how, x, seed, loop=True)
    values = how == "vmap"
    least = FACTOR * np.tile(c.noise, len(POINTS)) if values else 0.0
    return agreed(how, batched, looped, seed, c, words="a loop gives", linear=not values, least=least)


def _compiled(u: Vector, c: Checked) -> Row:
    """Value and pullback, compiled and not."""
    compiled = lambda s, x, u: s.run(x, u, compiled=True)
    eager = lambda s, x, u: s.run(x, u, compiled=False)
    least = np.concatenate([FACTOR * c.noise, np.zeros(c.low.n)])
    return agreed("compiled", compiled, eager, u, c, words="uncompiled it is", linear=False, least=least)


def natural_scales(x: Vector, sizes: list[int]) -> Vector:
    """A natural change of each entry: its size, or that of its leaf where it is zero but for rounding.

    An infinite entry has no neighbours and is left where it is.
    """
    size = np.where(np.isfinite(x), np.abs(x), 0.0)
    parts = np.split(size, np.cumsum(sizes)[:-1])
    medians = np.repeat([np.median(p[p > 0]) if (p > 0).any() else 1.0 for p in parts], sizes)
    return np.isfinite(x) * np.where(size > 1e-15 * medians, size, medians)


def entry_name(tree: Any, i: int) -> str:
    """The leaf and index of flat entry i of a tree, as in x['w'][0, 3]."""
    ends = np.cumsum(tree.sizes)
    k = int(np.searchsorted(ends, i, side="right"))
    index = np.unravel_index(i - (ends[k] - tree.sizes[k]), tree.shapes[k])
    return tree.leaf_name(tree.places[k]) + (str([int(j) for j in index]) if index else "")
