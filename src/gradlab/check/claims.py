"""The claims a framework makes of a function's derivatives, each judged against differences.

Neutral: a `Subject` (an adapter's) gives values and derivatives as float64 numpy vectors, a claim
compares one of them with a reference that knows nothing of automatic differentiation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np

from gradlab.check.differences import EPS, SECOND_STEPS, STEPS, Estimate, curvature, directional, table_noise
from gradlab.check.report import FAILED, INCONCLUSIVE, PASSED, UNSUPPORTED, Row

Vector = np.ndarray

DIRECTIONS = 3
FACTOR = 10.0  # an error this many times its reference's uncertainty (and the arithmetic's) is wrong
RESOLUTION = 1e-2  # what cannot be resolved to this fraction of the derivative is inconclusive
HESSIAN_ENTRIES = 32  # the dense Hessian is checked up to this many entries of x


class Subject(Protocol):
    """A function at a point, in one dtype, as its framework differentiates it."""

    n: int
    eps: float
    scalar: bool
    x: Vector
    weights: Vector  # the fixed u of the scalar u·f that second-order claims are about

    def value(self, x: Vector) -> Vector: ...
    def mutated(self) -> str: ...
    def jvp(self, x: Vector, v: Vector) -> Vector: ...
    def vjp(self, x: Vector, u: Vector) -> Vector: ...
    def gradient(self, x: Vector) -> Vector: ...
    def second(self, x: Vector, v: Vector, how: str) -> Vector: ...
    def hessian(self, x: Vector) -> Vector: ...
    def scales(self) -> Vector: ...
    def where(self, i: int) -> str: ...
    def where_output(self, i: int) -> str: ...


class Checked:
    """A subject, its float64 shadow, and the directions along which every claim is judged."""

    def __init__(self, subject: Subject, shadow: Subject | None, seed: int):
        self.low = subject
        self.high = shadow or subject
        self.x, self.rng = subject.x, np.random.default_rng(seed)
        self.directions = [self.rng.normal(size=subject.n) * subject.scales() for _ in range(DIRECTIONS)]

    def weighted(self, x: Vector) -> Vector:
        """The scalar u·f that second-order claims are about."""
        return np.atleast_1d(self.high.value(x) @ self.high.weights)


def rows(subject: Subject, shadow: Subject | None, order: int, seed: int) -> list[Row]:
    """Every claim up to the order asked for, one row each."""
    checked = Checked(subject, shadow, seed)
    first = _value(checked)
    if first.status != PASSED:
        return [first]
    claims: list[tuple[str, Callable[[Checked], Row]]] = [("jvp", _jvp), ("vjp", _vjp)]
    if subject.scalar:
        claims.append(("gradient", _gradient))
    if order == 2:
        for how in ("hvp", "forward over reverse", "reverse over reverse"):
            claims.append((how, partial(_second, how)))
        if subject.n <= HESSIAN_ENTRIES:
            claims.append(("hessian", _hessian))
    return [first, *(_supported(name, claim, checked) for name, claim in claims)]


def _supported(name: str, claim: Callable[[Checked], Row], checked: Checked) -> Row:
    try:
        return claim(checked)
    except Exception as error:  # whatever the framework raises is its answer to this claim
        message = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        return Row(name, UNSUPPORTED, message=message)


def _value(c: Checked) -> Row:
    mutated = c.low.mutated()
    if mutated:
        return Row("value", FAILED, where=mutated, message=f"f changed its input {mutated} in place")
    once, again = c.low.value(c.x), c.low.value(c.x)
    if not np.array_equal(once, again, equal_nan=True):
        worst = float(np.abs(once - again).max())
        return Row("value", FAILED, worst, 0.0, message="two evaluations at the same point differ")
    if not np.isfinite(once).all():
        where = c.low.where_output(int(np.argmin(np.isfinite(once))))
        return Row("value", INCONCLUSIVE, where=where, message="the value is not finite")
    return Row("value", PASSED, 0.0, 0.0)


def _jvp(c: Checked) -> Row:
    found = [
        _judged(
            "jvp",
            lambda s, x: s.jvp(x, v),
            lambda steps: directional(c.high.value, c.x, v, steps),
            c,
            c.low.where_output,
        )
        for v in c.directions
    ]
    return _worst(found)


def _vjp(c: Checked) -> Row:
    u = c.rng.normal(size=c.high.value(c.x).size)
    return _pulled(c, "vjp", u, lambda s, x: s.vjp(x, u))


def _gradient(c: Checked) -> Row:
    return _pulled(c, "gradient", np.ones(1), lambda s, x: s.gradient(x))


def _pulled(c: Checked, claim: str, u: Vector, pull: Callable[[Subject, Vector], Vector]) -> Row:
    """(Jᵀu)·v against the slope of u·f along v; where it fails, bisection finds the entry."""

    def along(v: Vector) -> Row:
        return _judged(
            claim,
            lambda s, x: np.atleast_1d(pull(s, x) @ v),
            lambda steps: directional(lambda x: np.atleast_1d(c.high.value(x) @ u), c.x, v, steps),
            c,
            lambda i: "",
        )

    row = _worst([along(v) for v in c.directions])
    if row.status != FAILED:
        return row
    index = _located(along, c.directions[0])
    if index is None:
        return row
    entry = along(
        (np.arange(c.low.n) == index).astype(np.float64)
    )  # the entry itself, where a step of its own size resolves it
    return _told(entry if entry.status == FAILED else row, c.low.where(index))


def _located(along: Callable[[Vector], Row], v: Vector) -> int | None:
    """The entry of x at which a wrong derivative is found: the half that fails, halved again."""
    inside = np.arange(v.size)
    while inside.size > 1:
        halves = np.array_split(inside, 2)
        tried = [along(np.where(np.isin(np.arange(v.size), half), v, 0.0)) for half in halves]
        failing = [(row.ratio or np.inf, k) for k, row in enumerate(tried) if row.status == FAILED]
        if not failing:
            return None
        inside = halves[max(failing)[1]]
    return int(inside[0])


def _second(how: str, c: Checked) -> Row:
    """H v against differences of the gradient, entry by entry, and v·H v against second differences."""
    found = []
    for v in c.directions:
        found.append(
            _judged(
                how,
                lambda s, x: s.second(x, v, how),
                lambda steps: directional(c.high.gradient, c.x, v, steps),
                c,
                c.low.where,
            )
        )
    v = c.directions[0]
    independent = _judged(
        how,
        lambda s, x: np.atleast_1d(s.second(x, v, how) @ v),
        lambda steps: curvature(c.weighted, c.x, v, steps),
        c,
        lambda i: "along a random direction, against second differences of the value",
    )
    # Second differences resolve less than first: they can convict, and need not decide.
    return _worst([*found, independent] if independent.status == FAILED else found)


def _hessian(c: Checked) -> Row:
    n, scales = c.low.n, c.low.scales()
    found = [
        _judged(
            "hessian",
            lambda s, x: s.hessian(x)[:, i] * scales[i],
            lambda steps: directional(c.high.gradient, c.x, scales[i] * np.eye(n)[i], steps),
            c,
            lambda j: f"[{c.low.where(j)}, {c.low.where(i)}]",
        )
        for i in range(n)
    ]
    return _worst(found)


def _judged(
    claim: str,
    derivative: Callable[[Any, Vector], Vector],
    reference: Callable[[Vector], Estimate],
    c: Checked,
    where: Callable[[int], str],
) -> Row:
    """The verdict on one derivative: against differences in float64, then in its own precision."""
    exact, estimate = derivative(c.high, c.x), reference(STEPS)
    allowed = FACTOR * estimate.uncertainty + _arithmetic(derivative, c.high, c, exact)
    error = np.abs(exact - estimate.value)
    if not (error <= allowed).all():  # on another grid of steps, before it is called wrong
        other = reference(SECOND_STEPS)
        doubt = np.maximum(other.uncertainty, np.abs(other.value - estimate.value))
        allowed = np.maximum(allowed, FACTOR * doubt)
    if not (error <= allowed).all():
        return _failed(claim, error, allowed, exact, estimate.value, where, "")
    if c.low is not c.high:
        low = derivative(c.low, c.x)
        error = np.abs(low - exact)
        rounding = _arithmetic(derivative, c.low, c, exact) + FACTOR * _rounding(derivative, c)
        if not (error <= rounding).all():
            note = " (right in float64: imprecise, not wrong)"
            return _failed(claim, error, rounding, low, exact, where, note)
        allowed = allowed + rounding
    scale = max(
        float(np.abs(estimate.value).max(initial=0.0)), 1e-6 * float(np.abs(estimate.noise).max()) / EPS
    )
    i = int(np.argmax(allowed))
    row = Row(claim, PASSED, float(error.max()), float(allowed[i]) / FACTOR, where(int(np.argmax(error))))
    if FACTOR * estimate.uncertainty.max(initial=0.0) <= RESOLUTION * scale:
        return row
    message = f"differences resolve it to {allowed[i]:.1e} only, near {estimate.value[i]:.3g}: a kink, jump or pole?"
    return Row(claim, INCONCLUSIVE, row.error, row.uncertainty, where(i), message)


def _arithmetic(derivative: Callable[[Any, Vector], Vector], s: Subject, c: Checked, exact: Vector) -> Vector:
    """What rounding in the subject's own precision can do: the answer to changes of the input by a few ulps."""
    ulps = [c.rng.choice([-1.0, 1.0], size=s.n) * size for size in (1, 1, 2, 2, 3, 4)]
    moves = [derivative(s, c.x * (1 + s.eps * ulp)) for ulp in ulps]
    here = derivative(s, c.x)
    spread = np.max([np.abs(moved - here) for moved in moves], axis=0)
    return FACTOR * spread + 100 * s.eps * np.abs(exact).max(initial=0.0) + np.finfo(np.float64).tiny


def _rounding(derivative: Callable[[Any, Vector], Vector], c: Checked) -> Vector:
    """The noise of the low precision: how its distance from float64 scatters over neighbouring points."""
    signs = c.rng.choice([-1.0, 1.0], size=c.x.size)
    points = [c.x * (1 + i * 2.0**-12 * signs) for i in range(1, 9)]
    return table_noise(np.stack([derivative(c.low, z) - derivative(c.high, z) for z in points]))


def _failed(
    claim: str, error: Vector, allowed: Vector, actual: Vector, right: Vector, where: Any, note: str
) -> Row:
    excess = np.where(np.isfinite(error), error / allowed, np.inf)
    i = int(np.argmax(excess))
    message = f"{actual[i]:.6g} where differences give {right[i]:.6g}, off by {error[i]:.1e}{note}"
    return _told(Row(claim, FAILED, float(error[i]), float(allowed[i]) / FACTOR, message=message), where(i))


def _told(row: Row, where: str) -> Row:
    message = f"at {where}: {row.message}" if where and not row.message.startswith("at ") else row.message
    return Row(row.claim, row.status, row.error, row.uncertainty, where, message)


def _worst(found: list[Row]) -> Row:
    """The row that says most: a failure, then doubt, then the largest error."""
    rank = {FAILED: 2, INCONCLUSIVE: 1, PASSED: 0}
    return max(found, key=lambda row: (rank[row.status], row.ratio or 0.0))


def natural_scales(x: Vector, sizes: list[int]) -> Vector:
    """A natural change of each entry: its size, or that of its leaf where it is nearly or wholly zero."""
    parts = np.split(np.abs(x), np.cumsum(sizes)[:-1])
    medians = np.repeat([np.median(p[p > 0]) if (p > 0).any() else 1.0 for p in parts], sizes)
    return np.where(x == 0, medians, np.maximum(np.abs(x), 1e-3 * medians))


def entry_name(tree: Any, i: int) -> str:
    """The leaf and index of flat entry i of a tree, as in x['w'][0, 3]."""
    ends = np.cumsum(tree.sizes)
    k = int(np.searchsorted(ends, i, side="right"))
    index = np.unravel_index(i - (ends[k] - tree.sizes[k]), tree.shapes[k])
    return tree.leaf_name(tree.places[k]) + (str([int(j) for j in index]) if index else "")
