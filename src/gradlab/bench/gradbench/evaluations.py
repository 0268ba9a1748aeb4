"""The suite's inputs as numpy arrays, and results in the suite's form: neutral of framework, and not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Input = dict[str, Any]
Arrays = dict[str, np.ndarray]

CAMERA = 11  # rotation 3, centre 3, focal length, principal point 2, radial distortion 2


def prepared(module: str, given: Input) -> tuple[Arrays, Input]:
    """An evaluation's arrays, floats in float64, and what is no array: sizes and modes, known when it compiles."""
    arrays, options = PREPARE[module](given)
    return {name: np.asarray(a, None if _whole(a) else np.float64) for name, a in arrays.items()}, options


def _whole(a: Any) -> bool:
    return np.asarray(a).dtype.kind == "i" and isinstance(a, np.ndarray)


def hello(given: Any) -> tuple[Any, Input]:
    """The input is the number itself."""
    return {"x": given}, {}


def gmm(given: Input) -> tuple[Any, Input]:
    """Log weights (k,), means (k, d), log diagonals (k, d) and strict lower parts (k, d(d-1)/2), points (n, d)."""
    d, k = given["d"], given["k"]
    params = {name: given[name] for name in ("alpha", "mu", "q")}
    lower = np.reshape(given["l"], (k, d * (d - 1) // 2))
    return {**params, "lower": lower, "x": given["x"]}, {"gamma": given["gamma"], "m": given["m"]}


def kmeans(given: Input) -> tuple[Any, Input]:
    """Centroids (k, d), points (n, d)."""
    return {name: given[name] for name in ("centroids", "points")}, {}


def lse(given: Input) -> tuple[Any, Input]:
    """A vector."""
    return {"x": given["x"]}, {}


def llsq(given: Input) -> tuple[Any, Input]:
    """Coefficients of a polynomial, and how many points it is fitted to."""
    return {"x": given["x"]}, {"n": int(given["n"])}


def ode(given: Input) -> tuple[Any, Input]:
    """Rates, and how many steps are taken."""
    return {"x": given["x"]}, {"s": int(given["s"])}


def ba(given: Input) -> tuple[Any, Input]:
    """n cameras, m points and p observations, each the one that is given; observation i is of camera i mod n."""
    n, m, p = (int(given[name]) for name in "nmp")
    every = np.arange(p)
    return {
        "cameras": np.tile(given["cam"], (n, 1)),
        "points": np.tile(given["x"], (m, 1)),
        "w": np.full(p, given["w"]),
        "features": np.tile(given["feat"], (p, 1)),
        "camera": every % n,
        "point": every % m,
    }, {}


def ht(given: Input) -> tuple[Any, Input]:
    """The bones, and of the hand's vertices those that an observed point is compared with: 1 or 3 for each."""
    data, model = given["data"], given["data"]["model"]
    parents = np.asarray(model["parents"], int)
    rows = np.asarray(data["correspondences"], int)[:, None]
    us = np.reshape(given["us"], (-1, 2)).astype(float)
    if len(us):
        rows = np.asarray(model["triangles"], int)[rows[:, 0]]
    arrays = {
        "theta": given["theta"],
        "us": us,
        "relatives": model["base_relatives"],
        "inverses": model["inverse_base_absolutes"],
        "positions": np.asarray(model["base_positions"])[rows],
        "weights": np.asarray(model["weights"])[rows],
        "points": data["points"],
        "sides": [-1.0 if model["is_mirrored"] else 1.0, 1.0, 1.0],
    }
    return arrays, {"parents": tuple(parents.tolist())}


def particle(given: Input) -> tuple[Any, Input]:
    """Where the one charge stands, at first."""
    return {"w": given["w"]}, {}


def saddle(given: Input) -> tuple[Any, Input]:
    """Where every descent starts."""
    return {"start": given["start"]}, {}


def det(given: Input) -> tuple[Any, Input]:
    """A square matrix."""
    return {"A": np.reshape(given["A"], (given["ell"], given["ell"]))}, {}


PREPARE: dict[str, Callable[[Any], tuple[Any, Input]]] = {
    f.__name__: f for f in (hello, gmm, kmeans, lse, llsq, ode, ba, ht, particle, saddle, det)
}


def ba_objective(result: Any, given: Input) -> Input:
    """The observations are all alike: the first one's errors, and how often they stand there."""
    first = result[0].tolist()
    return {
        "reproj_error": {"elements": first[:2], "repeated": len(result)},
        "w_err": {"element": first[2], "repeated": len(result)},
    }


def ba_jacobian(result: Any, given: Input) -> Input:
    """The sparse matrix of 3 p rows: 15 entries in each of 2 p, one in each of p; the first 30 entries and the last."""
    blocks, weights = result
    n, m, p = (int(given[name]) for name in "nmp")
    every = np.arange(p)
    places = np.concatenate(
        [
            CAMERA * (every % n)[:, None] + np.arange(CAMERA),
            CAMERA * n + 3 * (every % m)[:, None] + np.arange(3),
            CAMERA * n + 3 * m + every[:, None],
        ],
        axis=1,
    )
    width = CAMERA + 4
    rows = np.concatenate([width * np.arange(2 * p), 2 * p * width + np.arange(p + 1)])
    cols = np.concatenate([np.repeat(places, 2, axis=0).ravel(), places[:, -1]])
    vals = np.concatenate([blocks.ravel(), weights])
    cut = lambda a: [*a[: 2 * width].tolist(), a[-1].item()]
    return {"rows": cut(rows), "cols": cut(cols), "vals": cut(vals)}


OUTPUTS: dict[tuple[str, str], Callable[[Any, Any], Any]] = {
    ("gmm", "jacobian"): lambda result, _: {name: part.tolist() for name, part in result.items()},
    ("ba", "objective"): ba_objective,
    ("ba", "jacobian"): ba_jacobian,
    ("det", "gradient"): lambda result, _: result.ravel().tolist(),
}


def fingers() -> tuple[np.ndarray, np.ndarray]:
    """Which bones turn by theta[6:], and about which axis: five fingers of three bones, the first by two angles.

    theta[:3] turns the hand and theta[3:6] moves it. A bone's angles are about x (0) and z (1); the wrist and each
    finger's base have none.
    """
    turns = [
        (4 * finger + bone, axis) for finger in range(5) for bone, axis in ((2, 0), (2, 1), (3, 0), (4, 0))
    ]
    bones, axes = np.array(turns).T
    return bones, axes


def generations(parents: tuple[int, ...]) -> list[np.ndarray]:
    """The bones by their distance from the root, each set after its parents' one."""
    depth: list[int] = []
    for parent in parents:
        depth.append(0 if parent < 0 else depth[parent] + 1)
    return [np.flatnonzero(np.array(depth) == level) for level in range(max(depth) + 1)]


def minors(size: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """How the minors of the last m rows come from those of the last m - 1, for m = 2 .. size.

    A minor is named by its columns, in the order of their numbers' bits. Of each level: the column left out (minors,
    m), the place of what is left over in the level before, and the signs of the expansion.
    """
    sets = [[s for s in range(2**size) if s.bit_count() == m] for m in range(size + 1)]
    levels = []
    for m in range(2, size + 1):
        place = {s: i for i, s in enumerate(sets[m - 1])}
        columns = [[j for j in range(size) if s >> j & 1] for s in sets[m]]
        left = [[place[s ^ (1 << j)] for j in js] for s, js in zip(sets[m], columns, strict=True)]
        levels.append((np.array(columns), np.array(left), (-1.0) ** np.arange(m)))
    return levels
