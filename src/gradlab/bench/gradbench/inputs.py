"""Inputs of any size for every evaluation, from numpy's seed 31337, in the suite's form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

SEED = 31337
BONES = 22  # of a hand: wrist, five fingers of four, forearm

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "test": {
        "hello": {},
        "gmm": {"d": 3, "k": 4, "n": 20},
        "kmeans": {"k": 4, "n": 40, "d": 3},
        "lse": {"n": 30},
        "llsq": {"m": 6, "n": 16},
        "ode": {"n": 8, "s": 3},
        "ba": {"n": 3, "m": 5, "p": 11},
        "ht": {"points": 5, "vertices": 12},
        "particle": {"w": 0.20345},  # from here both descents end after a few steps
        "saddle": {"start": (0.3, 0.40003125)},
        "det": {"ell": 4},
    },
    "smoke": {
        "hello": {},
        "gmm": {"d": 16, "k": 10, "n": 1000},
        "kmeans": {"k": 50, "n": 5000, "d": 8},
        "lse": {"n": 160_000},
        "llsq": {"m": 128, "n": 1024},
        "ode": {"n": 60, "s": 20},
        "ba": {"n": 10, "m": 200, "p": 1000},
        "ht": {"points": 50, "vertices": 200},
        "particle": {},
        "saddle": {},
        "det": {"ell": 6},
    },
    "paper": {
        "hello": {},
        "gmm": {"d": 32, "k": 25, "n": 1000},
        "kmeans": {"k": 100, "n": 10_000, "d": 8},
        "lse": {"n": 640_000},
        "llsq": {"m": 128, "n": 4096},
        "ode": {"n": 250, "s": 100},
        "ba": {"n": 21, "m": 11_315, "p": 36_455},
        "ht": {"points": 100, "vertices": 544},
        "particle": {},
        "saddle": {},
        "det": {"ell": 8},
    },
}


def made(module: str, size: str, **fields: Any) -> dict[str, Any]:
    """The input of an evaluation at a size of `SIZES`, with other fields of it where they are given."""
    return INPUTS[module](np.random.default_rng(SEED), **{**SIZES[size][module], **fields})


def hello(rng: Any) -> Any:
    """A number."""
    return float(rng.normal())


def gmm(rng: Any, d: int, k: int, n: int, m: int = 0, gamma: float = 1.0) -> Any:
    """A mixture that has nothing to do with its points."""
    arrays = {"x": rng.normal(size=(n, d)), "mu": rng.uniform(size=(k, d)), "q": rng.normal(size=(k, d)) / 2}
    arrays |= {"l": rng.normal(size=(k, d * (d - 1) // 2)), "alpha": rng.normal(size=k)}
    return {
        "d": d,
        "k": k,
        "n": n,
        "m": m,
        "gamma": gamma,
        **{name: a.tolist() for name, a in arrays.items()},
    }


def kmeans(rng: Any, k: int, n: int, d: int) -> Any:
    """Centroids near points, so that each has some."""
    points = rng.uniform(size=(n, d))
    return {"points": points.tolist(), "centroids": (points[-k:] + 1e-3 * rng.normal(size=(k, d))).tolist()}


def lse(rng: Any, n: int) -> Any:
    """A vector over several powers of e."""
    return {"x": rng.uniform(-5.0, 5.0, n).tolist()}


def llsq(rng: Any, m: int, n: int) -> Any:
    """Coefficients."""
    return {"x": rng.uniform(size=m).tolist(), "n": n}


def ode(rng: Any, n: int, s: int) -> Any:
    """Rates that rise, so that the last state, their product times 2ⁿ/n!, is a number of moderate size.

    Uniform rates as the suite's leave it, and with it the whole gradient, below the smallest number.
    """
    return {"x": ((0.75 + 0.5 * rng.uniform(size=n)) * np.arange(1, n + 1) / 2).tolist(), "s": s}


def ba(rng: Any, n: int, m: int, p: int) -> Any:
    """A camera that looks at a point in front of it."""
    cam = np.concatenate(
        [rng.normal(size=3) / 3, rng.normal(size=3), [500.0], rng.normal(size=2), [0.1, 0.02]]
    )
    x = np.array([0.5, -0.3, 6.0]) + rng.normal(size=3) / 3
    feat = rng.normal(size=2)
    return {"n": n, "m": m, "p": p, "cam": cam.tolist(), "x": x.tolist(), "w": 0.8, "feat": feat.tolist()}


def ht(rng: Any, points: int, vertices: int, triangles: bool = True, mirrored: bool = False) -> Any:
    """A hand of random bones: rigid relative places, weights that sum to one, triangles of random vertices."""
    parents = [-1, *(0 if i % 4 == 1 else i - 1 for i in range(1, BONES - 1)), 0]

    def places() -> Any:
        matrices = np.tile(np.eye(4), (BONES, 1, 1))
        matrices[:, :3, :3] = np.linalg.qr(rng.normal(size=(BONES, 3, 3)))[0]
        matrices[:, :3, 3] = rng.normal(size=(BONES, 3))
        return matrices.tolist()

    weights = rng.uniform(size=(vertices, BONES)) ** 4
    faces = rng.integers(vertices, size=(vertices, 3))
    model = {
        "bone_count": BONES,
        "bone_names": [f"bone{i}" for i in range(BONES)],
        "parents": parents,
        "base_relatives": places(),
        "inverse_base_absolutes": places(),
        "base_positions": np.hstack([rng.normal(size=(vertices, 3)), np.ones((vertices, 1))]).tolist(),
        "weights": (weights / weights.sum(1, keepdims=True)).tolist(),
        "triangles": faces.tolist(),
        "is_mirrored": mirrored,
    }
    correspondences = rng.integers(vertices, size=points).tolist()
    data = {
        "model": model,
        "correspondences": correspondences,
        "points": rng.normal(size=(points, 3)).tolist(),
    }
    us = rng.uniform(size=(points, 2)).tolist() if triangles else []
    return {"theta": rng.normal(size=26).tolist(), "data": data, "us": us}


def particle(rng: Any, w: float = 0.0) -> Any:
    """The suite's start."""
    return {"w": w}


def saddle(rng: Any, start: Any = (1.0, 1.0)) -> Any:
    """The suite's start."""
    return {"start": list(start)}


def det(rng: Any, ell: int) -> Any:
    """A matrix by its rows."""
    return {"A": rng.uniform(size=ell * ell).tolist(), "ell": ell}


INPUTS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (hello, gmm, kmeans, lse, llsq, ode, ba, ht, particle, saddle, det)
}
