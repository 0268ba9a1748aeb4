"""The evaluations in jax, each compiled as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.special import multigammaln

import gradlab.jax as gl
from gradlab.bench.gradbench.evaluations import fingers, generations, minors

synchronise = jax.block_until_ready

STEP, SMALL = 0.1, 1e-5  # of time in `particle`; where a descent ends
MOST_STEPS = 4096  # of one path, whose states are kept for the way back


def arrays(given: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: jnp.asarray(a) for name, a in given.items()}


def numpy(result: Any) -> Any:
    return jax.tree.map(np.asarray, result)


def bound(f: Callable[..., Any], given: dict[str, Any], options: dict[str, Any]) -> Callable[[], Any]:
    """Compiled for these arrays, which stay its arguments."""
    compiled = jax.jit(lambda given: f(**given, **options))
    return lambda: compiled(given)


def gradient(f: Callable[..., Any], x: Any, *args: Any) -> Any:
    return gl.jacobian_operator(f, x, *args).T @ jnp.ones(())


def square(x: Any) -> Any:
    return x**2


def double(x: Any) -> Any:
    return gradient(square, x)


def gmm_objective(alpha: Any, mu: Any, q: Any, lower: Any, x: Any, gamma: float, m: int) -> Any:
    """log p(x) + log prior. Q(x - μ) is linear in (x, 1): its squares are a matrix product of their pairs."""
    n, d = x.shape
    k = len(alpha)
    columns, rows = np.triu_indices(d, 1)
    Q = jnp.zeros((k, d, d)).at[:, rows, columns].set(lower) + jnp.exp(q)[:, :, None] * jnp.eye(d)
    centre = lax.stop_gradient(x.mean(0))  # no matter in exact numbers; rounding is less near 0
    Q1 = jnp.concatenate([Q, -Q @ (mu - centre)[:, :, None]], axis=2)
    x1 = jnp.concatenate([x - centre, jnp.ones((n, 1))], axis=1)
    S = jnp.swapaxes(Q1, 1, 2) @ Q1
    pairs = x1[:, :, None] * x1[:, None, :]
    squares = pairs.reshape(n, -1) @ S.reshape(k, -1).T
    likelihood = _log_sum_exp(alpha + q.sum(1) - squares / 2).sum() - n * _log_sum_exp(alpha)
    prior = m * q.sum() - gamma**2 / 2 * (jnp.exp(2 * q).sum() + (lower**2).sum())
    freedom = d + m + 1
    constant = k * (freedom * d * math.log(gamma / math.sqrt(2)) - multigammaln(freedom / 2, d))
    return likelihood + prior + constant - n * d / 2 * math.log(2 * math.pi)


def gmm_jacobian(alpha: Any, mu: Any, q: Any, lower: Any, x: Any, gamma: float, m: int) -> Any:
    return dict(
        zip(("alpha", "mu", "q", "l"), gradient(_mixture, (alpha, mu, q, lower), x, gamma, m), strict=True)
    )


def _mixture(params: Any, x: Any, gamma: float, m: int) -> Any:
    alpha, mu, q, lower = params
    return gmm_objective(alpha, mu, q, lower, x, gamma, m)


def _log_sum_exp(x: Any) -> Any:
    """log Σ exp over the last axis. Any shift a gives the same, so its derivative is none."""
    a = lax.stop_gradient(x.max(-1))
    return a + jnp.log(jnp.exp(x - a[..., None]).sum(-1))


def kmeans_cost(centroids: Any, points: Any) -> Any:
    """Σ over points of the squared distance to the nearest centroid."""
    return _spread(centroids, points, _nearest(centroids, points))


def kmeans_dir(centroids: Any, points: Any) -> Any:
    """The gradient over the Hessian's diagonal, which is all there is of it: H 1 is its diagonal."""
    near = _nearest(centroids, points)
    slope = gradient(_spread, centroids, points, near)
    return slope / gl.hvp(_spread, centroids, jnp.ones_like(centroids), points, near)


def _nearest(centroids: Any, points: Any) -> Any:
    return jnp.argmin((centroids**2).sum(1) - 2 * points @ centroids.T, axis=1)


def _spread(centroids: Any, points: Any, near: Any) -> Any:
    return ((points - centroids[near]) ** 2).sum()


def lse_primal(x: Any) -> Any:
    return _log_sum_exp(x)


def lse_gradient(x: Any) -> Any:
    return gradient(_log_sum_exp, x)


def llsq_primal(x: Any, n: int) -> Any:
    """Half the squares of sign(t) less the polynomial; the powers of t by doubling their number."""
    t = jnp.linspace(-1.0, 1.0, n)
    powers = jnp.ones((1, n))
    while len(powers) < len(x):
        powers = jnp.concatenate([powers, powers * (powers[-1] * t)])
    return ((jnp.sign(t) - x @ powers[: len(x)]) ** 2).sum() / 2


def llsq_gradient(x: Any, n: int) -> Any:
    return gradient(llsq_primal, x, n)


def ode_primal(x: Any, s: int) -> Any:
    """y₀' = x₀ and yᵢ' = xᵢ yᵢ₋₁ from 0, at time 2 after s steps of Runge and Kutta.

    Not by `odeint`: the derivative that is asked for is that of these steps, not of the solution.
    """
    h = 2.0 / s
    slope = lambda y: x * jnp.concatenate([jnp.ones(1), y[:-1]])

    def step(y: Any, _: Any) -> Any:
        a = slope(y)
        b = slope(y + h / 2 * a)
        c = slope(y + h / 2 * b)
        return y + h / 6 * (a + 2 * b + 2 * c + slope(y + h * c)), None

    return lax.scan(jax.checkpoint(step), jnp.zeros_like(x), None, length=s)[0]


def ode_gradient(x: Any, s: int) -> Any:
    return gradient(_last, x, s)


def _last(x: Any, s: int) -> Any:
    return ode_primal(x, s)[-1]


def ba_errors(seen: Any, features: Any) -> Any:
    """Of each observation: the reprojection's two errors, and the weight's."""
    camera, X, w = seen
    rotation, centre, focal = camera[:, :3], camera[:, 3:6], camera[:, 6:7]
    square = (rotation**2).sum(1, keepdims=True)
    turns = square > 0
    angle = jnp.sqrt(jnp.where(turns, square, 1.0))
    axis, Y = rotation / angle, X - centre
    across, along = jnp.cross(axis, Y), (axis * Y).sum(1, keepdims=True)
    turned = Y * jnp.cos(angle) + across * jnp.sin(angle) + axis * along * (1 - jnp.cos(angle))
    Z = jnp.where(turns, turned, Y + jnp.cross(rotation, Y))
    flat = Z[:, :2] / Z[:, 2:]
    r = (flat**2).sum(1, keepdims=True)
    flat = flat * (1 + camera[:, 9:10] * r + camera[:, 10:] * r**2)
    error = w[:, None] * (flat * focal + camera[:, 7:9] - features)
    return jnp.concatenate([error, 1 - w[:, None] ** 2], axis=1)


def ba_objective(cameras: Any, points: Any, w: Any, features: Any, camera: Any, point: Any) -> Any:
    return ba_errors((cameras[camera], points[point], w), features)


def ba_jacobian(cameras: Any, points: Any, w: Any, features: Any, camera: Any, point: Any) -> Any:
    """Each observation has inputs of its own, so one pullback gives a row of every block: three give all."""
    J = gl.jacobian_operator(ba_errors, (cameras[camera], points[point], w), features)
    pull = lambda i: J.T @ jnp.zeros((len(w), 3)).at[:, i].set(1.0)
    row = lambda parts: jnp.concatenate([parts[0], parts[1], parts[2][:, None]], axis=1)
    return jnp.stack([row(pull(0)), row(pull(1))], axis=1), pull(2)[2]


def ht_objective(
    theta: Any,
    us: Any,
    relatives: Any,
    inverses: Any,
    positions: Any,
    weights: Any,
    points: Any,
    sides: Any,
    parents: tuple[int, ...],
) -> Any:
    """Observed points less those of the posed hand: a vertex, or a point of a triangle by its coordinates u."""
    bent, axes = fingers()
    angles = jnp.zeros((len(parents), 2)).at[bent, axes].set(theta[6:])
    moved = relatives @ _turns(angles)
    for bones in generations(parents)[1:]:
        ahead = moved[np.array(parents)[bones]]
        moved = moved.at[bones].set(ahead @ moved[bones])
    blend = jnp.einsum("ptb,bij->ptij", weights, (moved @ inverses)[:, :3])
    vertices = jnp.einsum("ptij,ptj->pti", blend, positions) * sides
    placed = vertices @ _rotation(theta[:3]).T + theta[3:6]
    if placed.shape[1] == 3:
        placed = placed * jnp.concatenate([us, 1 - us.sum(1, keepdims=True)], axis=1)[:, :, None]
    return (points - placed.sum(1)).ravel()


def ht_jacobian(theta: Any, us: Any, **data: Any) -> Any:
    """Forward along 26 angles and 2 shifts of all the u at once: each stands in the rows of its own point alone."""
    shift = jnp.zeros(len(theta) + (2 if len(us) else 0))
    split = len(shift) - len(theta)
    move = lambda z: ht_objective(theta + z[split:], us + z[:split] if split else us, **data)
    return gl.jacobian(move, shift, mode="forward")


def _turns(angles: Any) -> Any:
    """Homogeneous matrices of turns about x, then about z."""
    (cx, cz), (sx, sz) = jnp.cos(angles).T, jnp.sin(angles).T
    o, i = jnp.zeros_like(cx), jnp.ones_like(cx)
    entries = [cz, -sz * cx, sz * sx, o, sz, cz * cx, -cz * sx, o, o, sx, cx, o, o, o, o, i]
    return jnp.stack(entries, axis=1).reshape(-1, 4, 4)


def _rotation(rotation: Any) -> Any:
    """The turn by |rotation| about its direction; none where it is below 1e-4."""
    square = (rotation**2).sum()
    turns = square >= 1e-8
    angle = jnp.sqrt(jnp.where(turns, square, 1.0))
    axis = rotation / angle
    cross = jnp.cross(jnp.eye(3), axis)
    R = jnp.cos(angle) * jnp.eye(3) + (1 - jnp.cos(angle)) * jnp.outer(axis, axis) + jnp.sin(angle) * -cross.T
    return jnp.where(turns, R, jnp.eye(3))


def value_and_gradient(f: Callable[..., Any], x: Any, *args: Any, mode: str) -> Any:
    """Of a function of a few variables: forward (f) along each of them, or in reverse (r)."""
    modes: dict[str, Any] = {"f": "forward", "r": "reverse"}
    return gl.jacobian(lambda x: (f(x, *args),) * 2, x, has_aux=True, mode=modes[mode])[::-1]


def descend(f: Callable[[Any], Any], x: Any) -> Any:
    """The suite's descent of `f(x) -> (value, gradient)`: the step doubles after ten that go down, or halves."""

    def turn(state: Any) -> Any:
        x, value, slope, rate, downs = state
        ahead = x - rate * slope
        better, steeper = f(ahead)
        down = better < value
        downs = jnp.where(down, downs + 1, 0)
        rate = rate * jnp.where(down, jnp.where(downs == 10, 2.0, 1.0), 0.5)
        keep = lambda new, old: jnp.where(down, new, old)
        return (
            keep(ahead, x),
            keep(better, value),
            keep(steeper, slope),
            rate,
            jnp.where(downs == 10, 0, downs),
        )

    def far(state: Any) -> Any:
        _, _, slope, rate, _ = state
        length = jnp.sqrt((slope**2).sum())
        return (length > SMALL) & (rate * length > SMALL)

    return lax.while_loop(far, turn, (x, *f(x), jnp.array(1e-5), 0))[0]


@cache
def particle_miss(outer: str, inner: str) -> Callable[[Any], Any]:
    """The square of where a particle crosses y = 0 and its slope in w: Euler's steps in the field of two charges."""

    def step(s: Any, w: Any) -> Any:
        """Position and velocity after a step; the field is the potential's gradient."""

        def potential(x: Any, w: Any) -> Any:
            charges = jnp.stack([jnp.array([10.0, 0.0]), jnp.stack([0 * w + 10.0, 10.0 - w])])
            return (1 / jnp.sqrt(((x - charges) ** 2).sum(1))).sum()

        x, v = s[:2], s[2:]
        return jnp.concatenate([x + STEP * v, v - STEP * value_and_gradient(potential, x, w, mode=inner)[1]])

    def missed(s: Any) -> Any:
        """The square of where the line from here crosses y = 0."""
        return (s[0] - s[1] / s[3] * s[2]) ** 2

    def linear(s: Any, w: Any) -> Any:
        """A step and its derivative."""
        return gl.jacobian_operator(lambda point: (step(*point),) * 2, (s, w), has_aux=True)

    def above(s: Any) -> Any:
        return s[1] + STEP * s[3] > 0

    def forward(w: Any) -> Any:
        """The tangent along with the path."""

        def turn(state: Any) -> Any:
            s, ds = state
            J = linear(s, w)
            return J.aux, J @ (ds, jnp.ones(()))

        s, ds = lax.while_loop(lambda state: above(state[0]), turn, (start, jnp.zeros(4)))
        end = gl.jacobian_operator(lambda s: (missed(s),) * 2, s, has_aux=True)
        return end.aux, end @ ds

    def reverse(w: Any) -> Any:
        """The cotangent back along the path, whose states are kept."""

        def turn(state: Any) -> Any:
            s, kept, k = state
            return step(s, w), kept.at[k].set(s), k + 1

        inside = lambda state: above(state[0]) & (state[2] < MOST_STEPS)
        s, kept, k = lax.while_loop(inside, turn, (start, jnp.zeros((MOST_STEPS, 4)), 0))
        end = gl.jacobian_operator(lambda s: (missed(s),) * 2, s, has_aux=True)

        def back(state: Any) -> Any:
            u, slope, k = state
            u, more = linear(kept[k - 1], w).T @ u
            return u, slope + more, k - 1

        pulled = lax.while_loop(lambda state: state[2] > 0, back, (end.T @ jnp.ones(()), jnp.zeros(()), k))
        return jnp.where(above(s), jnp.nan, end.aux), pulled[1]

    start = jnp.array([0.0, 8.0, 0.75, 0.0])
    return {"f": forward, "r": reverse}[outer]


def particle(w: Any, pair: str) -> Any:
    """The w by which the particle passes the origin."""
    return descend(particle_miss(*pair), w)


@cache
def saddle_descent(outer: str, inner: str) -> Callable[..., Any]:
    """x of min max f(x, y), then y of max f(x, y); the inner maximum's derivative is the implicit function's."""

    def descent(start: Any) -> Any:
        lowest = lambda objective, y, x: descend(lambda y: value_and_gradient(objective, y, x, mode=inner), y)
        highest = gl.argmin(lambda y, x: -height(x, y), lowest, atol=1e-4)
        top = lambda x: height(x, highest(start, x))
        x = descend(lambda x: value_and_gradient(top, x, mode=outer), start)
        y = descend(lambda y: value_and_gradient(lambda y: -height(x, y), y, mode=outer), start)
        return jnp.concatenate([x, y])

    def height(x: Any, y: Any) -> Any:
        return (x**2).sum() - (y**2).sum()

    return descent


def saddle(start: Any, pair: str) -> Any:
    return saddle_descent(*pair)(start)


def det_primal(A: Any) -> Any:
    """By expansion along the rows, last first, each minor once: 2ⁿ of them, where each anew would be n!."""
    found = A[-1]
    for columns, left, signs in minors(len(A)):
        found = (A[len(A) - columns.shape[1]][columns] * found[left] * signs).sum(1)
    return found[0]


def det_gradient(A: Any) -> Any:
    return gradient(det_primal, A)


PAIRS = ("ff", "fr", "rf", "rr")

FUNCTIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "hello": {"square": square, "double": double},
    "gmm": {"objective": gmm_objective, "jacobian": gmm_jacobian},
    "kmeans": {"cost": kmeans_cost, "dir": kmeans_dir},
    "lse": {"primal": lse_primal, "gradient": lse_gradient},
    "llsq": {"primal": llsq_primal, "gradient": llsq_gradient},
    "ode": {"primal": ode_primal, "gradient": ode_gradient},
    "ba": {"objective": ba_objective, "jacobian": ba_jacobian},
    "ht": {"objective": ht_objective, "jacobian": ht_jacobian},
    "particle": {pair: partial(particle, pair=pair) for pair in PAIRS},
    "saddle": {pair: partial(saddle, pair=pair) for pair in PAIRS},
    "det": {"primal": det_primal, "gradient": det_gradient},
}
