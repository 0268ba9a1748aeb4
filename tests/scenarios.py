"""Scenarios are data: a function, a point, and the closed forms of its derivatives in numpy.

`f(xp, x, *args)` is written once for jax.numpy and torch. Trees keep their keys in alphabetical
order, which is the leaf order of both frameworks. Closed forms are over the flat vector.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

rng = np.random.default_rng(0)


@dataclass(frozen=True)
class Scalar:
    """A scalar function with its closed-form Hessian at x."""

    name: str
    f: Callable[..., Any]
    x: Any
    hessian: np.ndarray
    args: tuple[Any, ...] = ()

    def direction(self, seed=0, lead=()):
        """A random direction shaped like x, None at its constants."""
        draw = np.random.default_rng(seed)
        return _map(lambda leaf: draw.normal(size=lead + leaf.shape) if _is_float(leaf) else None, self.x)


@dataclass(frozen=True)
class Vector:
    """A function with many outputs, with its closed-form Jacobian (outputs by inputs, both flat)."""

    name: str
    f: Callable[..., Any]
    x: Any
    jacobian: np.ndarray
    args: tuple[Any, ...] = ()

    direction = Scalar.direction


def _is_float(leaf):
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f"


def _map(f, tree):
    if isinstance(tree, dict):
        return {key: _map(f, child) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_map(f, child) for child in tree)
    return f(tree)


def _rosenbrock_hessian(x):
    n = len(x)
    H = np.zeros((n, n))
    for i in range(n - 1):
        H[i, i] += 2 - 400 * (x[i + 1] - 3 * x[i] ** 2)
        H[i + 1, i + 1] += 200
        H[i, i + 1] = H[i + 1, i] = -400 * x[i]
    return H


def _softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


A = rng.normal(size=(5, 5))
A = A + A.T
B = rng.normal(size=(7, 4)) / 2
q, r, z, w = rng.normal(size=5), rng.normal(size=6), rng.normal(size=4), rng.normal(size=(2, 3))
p = _softmax(B @ z)

SCALARS = [
    Scalar(
        "quadratic form with data",
        lambda xp, x, A: x @ A @ x / 2,
        q,
        A,
        (A,),
    ),
    Scalar(
        "Rosenbrock",
        lambda xp, x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(),
        r,
        _rosenbrock_hessian(r),
    ),
    Scalar(
        "logsumexp of a linear map",
        lambda xp, x, B: xp.log(xp.exp(B @ x).sum()),
        z,
        B.T @ (np.diag(p) - np.outer(p, p)) @ B,
        (B,),
    ),
    Scalar("a matrix", lambda xp, x: (x**3).sum(), w, np.diag(6 * w.reshape(-1))),
    Scalar("a number", lambda xp, x: xp.sin(x), np.array(0.3), np.array([[-np.sin(0.3)]])),
    Scalar(
        "a tree with constants",
        lambda xp, x: x["a"] ** 2 * x["b"][0].sum() * x["n"] + xp.sin(x["b"][1]["c"]).sum(),
        {"a": np.array(1.5), "b": [np.array([1.0, 2.0]), {"c": np.array([[0.2, 0.7]])}], "n": 2, "o": None},
        np.block(
            [
                [np.array([[2 * 3.0 * 2]]), np.full((1, 2), 4 * 1.5), np.zeros((1, 2))],
                [np.full((2, 1), 4 * 1.5), np.zeros((2, 4))],
                [np.zeros((2, 3)), np.diag(-np.sin([0.2, 0.7]))],
            ]
        ),
    ),
    Scalar("linear", lambda xp, x: 3 * x.sum(), q, np.zeros((5, 5))),
    Scalar("constant", lambda xp, x: 3.0, q, np.zeros((5, 5))),
    Scalar(
        "one leaf ignored",
        lambda xp, x: (x["a"] ** 2).sum(),
        {"a": z, "b": q},
        np.diag([2.0] * 4 + [0.0] * 5),
    ),
]

VECTORS = [
    Vector(
        "more outputs than inputs",
        lambda xp, x, B: xp.exp(B @ x),
        z,
        np.exp(B @ z)[:, None] * B,
        (B,),
    ),
    Vector(
        "more inputs than outputs",
        lambda xp, x: xp.stack([x.sum() ** 2, (x**2).sum()]),
        r,
        np.stack([np.full(6, 2 * r.sum()), 2 * r]),
    ),
    Vector(
        "trees in and out",
        lambda xp, x: {"p": x["a"] * x["b"].sum(), "s": [x["a"].sum()]},
        {"a": z, "b": w, "n": 7},
        np.block(
            [
                [np.eye(4) * w.sum(), np.repeat(z[:, None], 6, axis=1)],
                [np.ones((1, 4)), np.zeros((1, 6))],
            ]
        ),
    ),
    Vector("a scalar output", lambda xp, x: (x**2).sum(), z, 2 * z[None]),
    Vector("a matrix to a matrix", lambda xp, x: 2 * x.T, w, 2 * np.eye(6)[[0, 3, 1, 4, 2, 5]]),
    Vector("constant", lambda xp, x: xp.zeros(2, dtype=x.dtype), z, np.zeros((2, 4))),
]
