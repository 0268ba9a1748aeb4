"""The evaluations in torch: eager, but for `particle` and `saddle`, whose thousands of small steps are recorded."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from scipy.special import multigammaln
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import gradlab.torch as gl
from gradlab.bench._profile_torch import synchronise as synchronise
from gradlab.bench.gradbench.evaluations import fingers, generations, minors

STEP, SMALL = 0.1, 1e-5  # of time in `particle`; where a descent ends

ONE = torch.ones((), dtype=torch.float64)


def arrays(given: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: torch.as_tensor(a) for name, a in given.items()}


def numpy(result: Any) -> Any:
    return pytree.tree_map(lambda x: x.detach().numpy(), result)


def bound(f: Callable[..., Any], given: dict[str, Any], options: dict[str, Any]) -> Callable[[], Any]:
    """Eager, on these tensors."""
    return lambda: f(**given, **options)


def recorded(f: Callable[..., Any], compiled: bool = False) -> Callable[..., Any]:
    """f as the list of its operations at the first call, derivatives included: no Python between them after that.

    Compiled, it is one function of C++, which pays from a hundred operations on.
    """
    kept: list[Any] = []

    def run(*xs: Any) -> Any:
        if not kept:
            made = make_fx(f)(*xs)
            made.graph.eliminate_dead_code()
            made.recompile()
            kept.append(torch.compile(made, fullgraph=True) if compiled else made)
        with torch.no_grad():
            return kept[0](*xs)

    return run


def gradient(f: Callable[..., Any], x: Any, *args: Any) -> Any:
    return gl.jacobian_operator(f, x, *args).T @ ONE


def square(x: Any) -> Any:
    return x**2


def double(x: Any) -> Any:
    return gradient(square, x)


def gmm_objective(alpha: Any, mu: Any, q: Any, lower: Any, x: Any, gamma: float, m: int) -> Any:
    """log p(x) + log prior. Q(x - μ) is linear in (x, 1): its squares are a matrix product of their pairs."""
    n, d = x.shape
    k = len(alpha)
    columns, rows = np.triu_indices(d, 1)
    Q = x.new_zeros(k, d, d)
    Q[:, rows, columns] = lower
    Q = Q + torch.diag_embed(torch.exp(q))
    centre = x.mean(0)  # no matter in exact numbers; rounding is less near 0
    Q1 = torch.cat([Q, -Q @ (mu - centre)[:, :, None]], dim=2)
    x1 = torch.cat([x - centre, x.new_ones(n, 1)], dim=1)
    S = Q1.mT @ Q1
    pairs = x1[:, :, None] * x1[:, None, :]
    squares = pairs.reshape(n, -1) @ S.reshape(k, -1).T
    likelihood = _log_sum_exp(alpha + q.sum(1) - squares / 2).sum() - n * _log_sum_exp(alpha)
    prior = m * q.sum() - gamma**2 / 2 * (torch.exp(2 * q).sum() + (lower**2).sum())
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
    a = x.detach().amax(-1)
    return a + torch.log(torch.exp(x - a[..., None]).sum(-1))


def kmeans_cost(centroids: Any, points: Any) -> Any:
    """Σ over points of the squared distance to the nearest centroid."""
    return _spread(centroids, points, _nearest(centroids, points))


def kmeans_dir(centroids: Any, points: Any) -> Any:
    """The gradient over the Hessian's diagonal, which is all there is of it: H 1 is its diagonal."""
    near = _nearest(centroids, points)
    slope = gradient(_spread, centroids, points, near)
    return slope / gl.hvp(_spread, centroids, torch.ones_like(centroids), points, near)


def _nearest(centroids: Any, points: Any) -> Any:
    return torch.addmm((centroids**2).sum(1), points, centroids.T, alpha=-2).min(1).indices


def _spread(centroids: Any, points: Any, near: Any) -> Any:
    return ((points - centroids[near]) ** 2).sum()


def lse_primal(x: Any) -> Any:
    return _log_sum_exp(x)


def lse_gradient(x: Any) -> Any:
    return gradient(_log_sum_exp, x)


def llsq_primal(x: Any, n: int) -> Any:
    """Half the squares of sign(t) less the polynomial; the powers of t by doubling their number."""
    t = torch.linspace(-1.0, 1.0, n, dtype=x.dtype)
    powers = x.new_ones(1, n)
    while len(powers) < len(x):
        powers = torch.cat([powers, powers * (powers[-1] * t)])
    return ((torch.sign(t) - x @ powers[: len(x)]) ** 2).sum() / 2


def llsq_gradient(x: Any, n: int) -> Any:
    return gradient(llsq_primal, x, n)


def ode_primal(x: Any, s: int) -> Any:
    """y₀' = x₀ and yᵢ' = xᵢ yᵢ₋₁ from 0, at time 2 after s steps of Runge and Kutta.

    Not by `odeint`: the derivative that is asked for is that of these steps, not of the solution.
    """
    h = 2.0 / s
    slope = lambda y: x * torch.cat([x.new_ones(1), y[:-1]])

    def step(y: Any) -> Any:
        a = slope(y)
        b = slope(y + h / 2 * a)
        c = slope(y + h / 2 * b)
        return y + h / 6 * (a + 2 * b + 2 * c + slope(y + h * c))

    y = torch.zeros_like(x)
    for _ in range(s):
        y = step(y)
    return y


def ode_gradient(x: Any, s: int) -> Any:
    return gradient(_last, x, s)


def _last(x: Any, s: int) -> Any:
    return ode_primal(x, s)[-1]


def ba_errors(seen: Any, features: Any) -> Any:
    """Of each observation: the reprojection's two errors, and the weight's."""
    camera, X, w = seen
    rotation, centre, focal = camera[:, :3], camera[:, 3:6], camera[:, 6:7]
    square = (rotation**2).sum(1, keepdim=True)
    turns = square > 0
    angle = torch.sqrt(torch.where(turns, square, 1.0))
    axis, Y = rotation / angle, X - centre
    across, along = torch.linalg.cross(axis, Y), (axis * Y).sum(1, keepdim=True)
    turned = Y * torch.cos(angle) + across * torch.sin(angle) + axis * along * (1 - torch.cos(angle))
    Z = torch.where(turns, turned, Y + torch.linalg.cross(rotation, Y))
    flat = Z[:, :2] / Z[:, 2:]
    r = (flat**2).sum(1, keepdim=True)
    flat = flat * (1 + camera[:, 9:10] * r + camera[:, 10:] * r**2)
    error = w[:, None] * (flat * focal + camera[:, 7:9] - features)
    return torch.cat([error, 1 - w[:, None] ** 2], dim=1)


def ba_objective(cameras: Any, points: Any, w: Any, features: Any, camera: Any, point: Any) -> Any:
    return ba_errors((cameras[camera], points[point], w), features)


def ba_jacobian(cameras: Any, points: Any, w: Any, features: Any, camera: Any, point: Any) -> Any:
    """Each observation has inputs of its own, so one pullback gives a row of every block: three give all."""
    J = gl.jacobian_operator(ba_errors, (cameras[camera], points[point], w), features)
    pull = lambda i: J.T @ torch.eye(3, dtype=w.dtype)[i].repeat(len(w), 1)
    row = lambda parts: torch.cat([parts[0], parts[1], parts[2][:, None]], dim=1)
    return torch.stack([row(pull(0)), row(pull(1))], dim=1), pull(2)[2]


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
    bent, axes = map(torch.from_numpy, fingers())
    angles = theta.new_zeros(len(parents), 2).index_put((bent, axes), theta[6:])
    moved = relatives @ _turns(angles)
    for bones in generations(parents)[1:]:
        ahead = moved[np.array(parents)[bones]]
        moved = moved.index_copy(0, torch.from_numpy(bones), ahead @ moved[bones])
    blend = torch.einsum("ptb,bij->ptij", weights, (moved @ inverses)[:, :3])
    vertices = torch.einsum("ptij,ptj->pti", blend, positions) * sides
    placed = vertices @ _rotation(theta[:3]).T + theta[3:6]
    if placed.shape[1] == 3:
        placed = placed * torch.cat([us, 1 - us.sum(1, keepdim=True)], dim=1)[:, :, None]
    return (points - placed.sum(1)).ravel()


def ht_jacobian(theta: Any, us: Any, **data: Any) -> Any:
    """Forward along 26 angles and 2 shifts of all the u at once: each stands in the rows of its own point alone."""
    shift = theta.new_zeros(len(theta) + (2 if len(us) else 0))
    split = len(shift) - len(theta)
    move = lambda z: ht_objective(theta + z[split:], us + z[:split] if split else us, **data)
    return gl.jacobian(move, shift, mode="forward")


def _turns(angles: Any) -> Any:
    """Homogeneous matrices of turns about x, then about z."""
    (cx, cz), (sx, sz) = torch.cos(angles).T, torch.sin(angles).T
    o, i = torch.zeros_like(cx), torch.ones_like(cx)
    entries = [cz, -sz * cx, sz * sx, o, sz, cz * cx, -cz * sx, o, o, sx, cx, o, o, o, o, i]
    return torch.stack(entries, dim=1).reshape(-1, 4, 4)


def _rotation(rotation: Any) -> Any:
    """The turn by |rotation| about its direction; none where it is below 1e-4."""
    square = (rotation**2).sum()
    turns = square >= 1e-8
    angle = torch.sqrt(torch.where(turns, square, 1.0))
    axis = rotation / angle
    eye = torch.eye(3, dtype=rotation.dtype)
    cross = torch.linalg.cross(eye, axis.expand(3, 3))
    R = (
        torch.cos(angle) * eye
        + (1 - torch.cos(angle)) * torch.outer(axis, axis)
        + torch.sin(angle) * -cross.T
    )
    return torch.where(turns, R, eye)


def value_and_gradient(f: Callable[..., Any], x: Any, *args: Any, mode: str) -> Any:
    """Of a function of a few variables: forward (f) along each of them, or in reverse (r)."""
    J = gl.jacobian_operator(lambda x: (f(x, *args),) * 2, x, has_aux=True)
    return J.aux, J.T @ ONE if mode == "r" else torch.stack([J @ e for e in torch.eye(len(x), dtype=x.dtype)])


def descend(f: Callable[[Any], Any], x: Any) -> Any:
    """The suite's descent of `f(x) -> (value, gradient)`: the step doubles after ten that go down, or halves."""
    value, slope = f(x)
    rate, downs = 1e-5, 0
    while True:
        length = float(torch.linalg.vector_norm(slope))
        if not (length > SMALL and rate * length > SMALL):
            return x
        ahead = x - rate * slope
        better, steeper = f(ahead)
        if better < value:
            x, value, slope, downs = ahead, better, steeper, downs + 1
            if downs == 10:
                rate, downs = 2 * rate, 0
        else:
            rate, downs = rate / 2, 0


@cache
def particle_miss(outer: str, inner: str) -> Callable[[Any], Any]:
    """The square of where a particle crosses y = 0 and its slope in w: Euler's steps in the field of two charges."""

    def step(s: Any, w: Any) -> Any:
        """Position and velocity after a step; the field is the potential's gradient."""

        def potential(x: Any, w: Any) -> Any:
            charges = torch.stack([x.new_tensor([10.0, 0.0]), torch.stack([0 * w + 10.0, 10.0 - w])])
            return (1 / torch.sqrt(((x - charges) ** 2).sum(1))).sum()

        x, v = s[:2], s[2:]
        return torch.cat([x + STEP * v, v - STEP * value_and_gradient(potential, x, w, mode=inner)[1]])

    def missed(s: Any) -> Any:
        """The square of where the line from here crosses y = 0."""
        return (s[0] - s[1] / s[3] * s[2]) ** 2

    def linear(s: Any, w: Any) -> Any:
        """A step and its derivative."""
        return gl.jacobian_operator(lambda point: (step(*point),) * 2, (s, w), has_aux=True)

    def above(s: Any) -> bool:
        return bool(s[1] + STEP * s[3] > 0)

    def pushed(s: Any, ds: Any, w: Any) -> Any:
        J = linear(s, w)
        return J.aux, J @ (ds, ONE)

    push, on = recorded(pushed, compiled=True), recorded(step, compiled=True)
    pull = recorded(lambda s, u, w: linear(s, w).T @ u, compiled=True)

    def forward(w: Any) -> Any:
        """The tangent along with the path."""
        s, ds = start, torch.zeros_like(start)
        while above(s):
            s, ds = push(s, ds, w)
        end = gl.jacobian_operator(lambda s: (missed(s),) * 2, s, has_aux=True)
        return end.aux, end @ ds

    def reverse(w: Any) -> Any:
        """The cotangent back along the path, whose states are kept."""
        s, kept = start, []
        while above(s):
            kept.append(s)
            s = on(s, w)
        end = gl.jacobian_operator(lambda s: (missed(s),) * 2, s, has_aux=True)
        u, slope = end.T @ ONE, torch.zeros_like(w)
        for s in reversed(kept):
            u, more = pull(s, u, w)
            slope = slope + more
        return end.aux, slope

    start = torch.tensor([0.0, 8.0, 0.75, 0.0], dtype=torch.float64)
    return {"f": forward, "r": reverse}[outer]


def particle(w: Any, pair: str) -> Any:
    """The w by which the particle passes the origin."""
    return descend(particle_miss(*pair), w)


@cache
def saddle_descent(outer: str, inner: str) -> Callable[..., Any]:
    """x of min max f(x, y), then y of max f(x, y); the inner maximum's derivative is the implicit function's."""
    rise = recorded(lambda y, x: value_and_gradient(lambda y: -height(x, y), y, mode=inner))
    last = recorded(lambda y, x: value_and_gradient(lambda y: -height(x, y), y, mode=outer))

    def descent(start: Any) -> Any:
        lowest = lambda objective, y, x: descend(lambda y: rise(y, x.detach()), y.detach())
        highest = gl.argmin(lambda y, x: -height(x, y), lowest, atol=1e-4)
        top = lambda x: height(x, highest(start, x))
        both = lambda x: value_and_gradient(top, x, mode=outer)
        x = descend(lambda x: tuple(part.detach() for part in both(x)), start)
        y = descend(lambda y: last(y, x), start)
        return torch.cat([x, y])

    def height(x: Any, y: Any) -> Any:
        return (x**2).sum() - (y**2).sum()

    return descent


def saddle(start: Any, pair: str) -> Any:
    return saddle_descent(*pair)(start)


def det_primal(A: Any) -> Any:
    """By expansion along the rows, last first, each minor once: 2ⁿ of them, where each anew would be n!."""
    found = A[-1]
    for columns, left, signs in minors(len(A)):
        found = (A[len(A) - columns.shape[1]][columns] * found[left] * torch.from_numpy(signs)).sum(1)
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
