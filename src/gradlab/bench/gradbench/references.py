"""What the evaluations' outputs should be, in numpy: derivatives in closed form, or by complex steps.

Written from the definitions, entry by entry where that is plain, without jax, torch or their functions here.
A complex step's derivative Im f(x + ih) / h has no difference in it, so that h = 1e-30 costs no accuracy (Squire and
Trapp, Using complex variables to estimate derivatives of real functions, SIAM Review 40 (1998)).
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import logsumexp, multigammaln, softmax

H = 1e-30
SMALL = 1e-5


def complex_step(f: Callable[[np.ndarray], Any], x: np.ndarray) -> np.ndarray:
    """The Jacobian of an analytic f at a real vector."""
    return np.stack([np.imag(f(x + 1j * H * e)) / H for e in np.eye(len(x))], axis=-1)


def hello(function: str, given: Any) -> Any:
    """x², or 2 x."""
    return given**2 if function == "square" else 2 * given


def gmm(function: str, given: Any) -> Any:
    """log p(x) and the log of the Wishart prior; each component's matrix is filled entry by entry."""
    d, k, n, m, gamma = (given[name] for name in ("d", "k", "n", "m", "gamma"))
    alpha, mu, q, x = (np.array(given[name]) for name in ("alpha", "mu", "q", "x"))
    lower = np.reshape(given["l"], (k, -1))
    cells = [(row, column) for column in range(d) for row in range(column + 1, d)]
    R, Qs = np.empty((n, k, d)), []
    for c in range(k):
        Q = np.diag(np.exp(q[c]))
        for (row, column), entry in zip(cells, lower[c], strict=True):
            Q[row, column] = entry
        Qs.append(Q)
        R[:, c] = (x - mu[c]) @ Q.T
    main = alpha + q.sum(1) - (R**2).sum(2) / 2
    if function == "objective":
        freedom = d + m + 1
        constant = freedom * d * (math.log(gamma) - math.log(2) / 2) - multigammaln(freedom / 2, d)
        prior = k * constant - gamma**2 / 2 * ((np.exp(q) ** 2).sum() + (lower**2).sum()) + m * q.sum()
        return logsumexp(main, 1).sum() - n * logsumexp(alpha) + prior - n * d / 2 * math.log(2 * math.pi)
    share = softmax(main, 1)
    slope = {"alpha": share.sum(0) - n * softmax(alpha), "mu": [], "q": [], "l": []}
    for c, Q in enumerate(Qs):
        weighed = share[:, c, None] * R[:, c]
        outer = weighed.T @ (x - mu[c])
        slope["mu"].append(weighed.sum(0) @ Q)
        slope["q"].append(share[:, c].sum() - np.diag(outer) * np.exp(q[c]) - gamma**2 * np.exp(2 * q[c]) + m)
        slope["l"].append(
            [-outer[cell] - gamma**2 * entry for cell, entry in zip(cells, lower[c], strict=True)]
        )
    return slope


def kmeans(function: str, given: Any) -> Any:
    """The step goes from a centroid to the mean of its points."""
    points, centroids = np.array(given["points"]), np.array(given["centroids"])
    squares = np.stack([((points - c) ** 2).sum(1) for c in centroids], axis=1)
    if function == "cost":
        return squares.min(1).sum()
    near = squares.argmin(1)
    return centroids - np.stack([points[near == j].mean(0) for j in range(len(centroids))])


def lse(function: str, given: Any) -> Any:
    """The gradient is the softmax."""
    x = np.array(given["x"])
    return logsumexp(x) if function == "primal" else softmax(x)


def llsq(function: str, given: Any) -> Any:
    """V x - s, and Vᵀ of it."""
    x, n = np.array(given["x"]), given["n"]
    t = np.array([-1 + 2 * i / (n - 1) for i in range(n)])
    V = np.vander(t, len(x), increasing=True)
    residual = V @ x - np.sign(t)
    return residual @ residual / 2 if function == "primal" else V.T @ residual


def ode(function: str, given: Any) -> Any:
    """Every state is linear in each rate, after any Runge and Kutta step too: ∂y/∂xᵢ = y / xᵢ of the last."""
    x, s = np.array(given["x"]), given["s"]
    y, h = np.zeros_like(x), 2 / s

    def slope(y: Any) -> Any:
        return x * np.roll(np.append(y[:-1], 1.0), 1)

    for _ in range(s):
        a = slope(y)
        b = slope(y + h / 2 * a)
        c = slope(y + h / 2 * b)
        y = y + h / 6 * (a + 2 * b + 2 * c + slope(y + h * c))
    return y if function == "primal" else y[-1] / x


def ba(function: str, given: Any) -> Any:
    """One observation by complex steps, since all are alike."""
    n, m, p = (given[name] for name in "nmp")
    z = np.concatenate([given["cam"], given["x"], [given["w"]]])

    def error(z: Any) -> Any:
        rotation, w = z[:3], z[14]
        Y = z[11:14] - z[3:6]
        angle = np.sqrt(rotation @ rotation)
        K = np.array(
            [[0, -rotation[2], rotation[1]], [rotation[2], 0, -rotation[0]], [-rotation[1], rotation[0], 0]]
        )
        K = K / angle
        X = Y + np.sin(angle) * K @ Y + (1 - np.cos(angle)) * K @ K @ Y
        flat = X[:2] / X[2]
        r = flat @ flat
        return w * (flat * (1 + z[9] * r + z[10] * r**2) * z[6] + z[7:9] - given["feat"])

    if function == "objective":
        reprojection = {"elements": error(z), "repeated": p}
        return {"reproj_error": reprojection, "w_err": {"element": 1 - z[14] ** 2, "repeated": p}}
    places = [*range(11), *range(11 * n, 11 * n + 3), 11 * n + 3 * m]
    return {
        "rows": [*(15 * i if i <= 2 * p else 28 * p + i for i in range(30)), 31 * p],
        "cols": [*places, *places, 11 * n + 3 * m + p - 1],
        "vals": [*complex_step(error, z).ravel(), -2 * z[14]],
    }


def ht(function: str, given: Any) -> Any:
    """Bone by bone and point by point; two columns for each point's own u, then 26."""
    theta, us = np.array(given["theta"]), np.reshape(given["us"], (-1, 2))

    def error(z: Any) -> Any:
        return _posed(z[2:], us + z[:2] if len(us) else us, given)

    z = np.concatenate([[0.0, 0.0], theta])
    if function == "objective":
        return error(z).real
    J = complex_step(error, z)
    return J if len(us) else J[:, 2:]


def _posed(theta: Any, us: Any, given: Any) -> Any:
    data, model = given["data"], given["data"]["model"]
    angles = np.zeros((len(model["parents"]), 2), complex)
    places = iter(theta[6:])
    for finger in range(5):
        for bone in (2, 3, 4):
            angles[4 * finger + bone, 0] = next(places)
            if bone == 2:
                angles[4 * finger + bone, 1] = next(places)
    found: list[Any] = []
    for parent, place, (tx, tz) in zip(model["parents"], model["base_relatives"], angles, strict=True):
        X, Z = np.eye(4, dtype=complex), np.eye(4, dtype=complex)
        X[1:3, 1:3] = [[np.cos(tx), -np.sin(tx)], [np.sin(tx), np.cos(tx)]]
        Z[:2, :2] = [[np.cos(tz), -np.sin(tz)], [np.sin(tz), np.cos(tz)]]
        found.append((np.eye(4) if parent < 0 else found[parent]) @ np.array(place) @ Z @ X)
    moves = [a @ np.array(b) for a, b in zip(found, model["inverse_base_absolutes"], strict=True)]
    a, b, c = theta[:3]
    K, angle = np.array([[0, -c, b], [c, 0, -a], [-b, a, 0]]), np.sqrt(a**2 + b**2 + c**2)
    R = np.eye(3) + np.sin(angle) / angle * K + (1 - np.cos(angle)) / angle**2 * K @ K

    def vertex(i: int) -> Any:
        at = np.array(model["base_positions"][i])
        x = sum(w * (M @ at)[:3] for w, M in zip(model["weights"][i], moves, strict=True))
        return R @ (x * [-1 if model["is_mirrored"] else 1, 1, 1]) + theta[3:6]

    errors = []
    for i, (at, point) in enumerate(zip(data["correspondences"], data["points"], strict=True)):
        if len(us):
            (p, q), (r, s, t) = us[i], model["triangles"][at]
            errors.append(point - (p * vertex(r) + q * vertex(s) + (1 - p - q) * vertex(t)))
        else:
            errors.append(point - vertex(at))
    return np.concatenate(errors)


def particle(function: str, given: Any) -> Any:
    """Euler's steps with the charges' field written out; the slope in w by a complex step."""

    def missed(w: complex) -> complex:
        x, y, u, v = 0j, 8 + 0j, 0.75 + 0j, 0j
        while (y + 0.1 * v).real > 0:
            a, b = (x - 10) ** 2 + (y - 10 + w) ** 2, (x - 10) ** 2 + y**2
            a, b = a * cmath.sqrt(a), b * cmath.sqrt(b)
            force = (x - 10) / a + (x - 10) / b, (y - 10 + w) / a + y / b
            x, y, u, v = x + 0.1 * u, y + 0.1 * v, u + 0.1 * force[0], v + 0.1 * force[1]
        return (x - y / v * u) ** 2

    def both(w: list[float]) -> tuple[float, list[float]]:
        found = missed(w[0] + 1j * H)
        return found.real, [found.imag / H]

    return descend(both, [given["w"]])[0]


def saddle(function: str, given: Any) -> Any:
    """The slope of max f(x, y) over y is that of f at the maximum."""
    start = list(given["start"])

    def highest(x: list[float]) -> list[float]:
        height = x[0] ** 2 + x[1] ** 2
        return descend(lambda y: (y[0] ** 2 + y[1] ** 2 - height, [2 * y[0], 2 * y[1]]), start)

    def both(x: list[float]) -> tuple[float, list[float]]:
        y = highest(x)
        return x[0] ** 2 + x[1] ** 2 - y[0] ** 2 - y[1] ** 2, [2 * x[0], 2 * x[1]]

    x = descend(both, start)
    return [*x, *highest(x)]


def descend(f: Callable[[list[float]], tuple[float, list[float]]], x: list[float]) -> list[float]:
    """The suite's descent: a step doubled after ten that went down, halved after one that did not."""
    value, slope = f(x)
    rate, downs = 1e-5, 0
    while math.hypot(*slope) > SMALL:
        if downs == 10:
            rate, downs = 2 * rate, 0
        ahead = [a - rate * g for a, g in zip(x, slope, strict=True)]
        if math.dist(x, ahead) <= SMALL:
            break
        lower, steeper = f(ahead)
        if lower < value:
            x, value, slope, downs = ahead, lower, steeper, downs + 1
        else:
            rate, downs = rate / 2, 0
    return x


def det(function: str, given: Any) -> Any:
    """det A, and det A · A⁻ᵀ."""
    A = np.reshape(given["A"], (given["ell"], given["ell"]))
    value = np.linalg.det(A)
    return value if function == "primal" else (value * np.linalg.inv(A).T).ravel()


REFERENCES: dict[str, Callable[[str, Any], Any]] = {
    f.__name__: f for f in (hello, gmm, kmeans, lse, llsq, ode, ba, ht, particle, saddle, det)
}
