"""The problems that are checked and measured: weights and data in numpy, the same for both frameworks.

`_jax.py` and `_torch.py` hold the functions under the same names. Parameters are float64 and seeded;
the digits are scikit-learn's real handwritten ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Problem:
    """Parameters and data of a model; its functions are `model` and `outer` of the same `kind`.

    `loss(params, inputs, targets) = outer(model(params, inputs), targets)`.
    """

    name: str
    kind: str  # which model: "mlp", "conv", "transformer", "decoder"
    params: Arrays
    inputs: np.ndarray
    targets: np.ndarray

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(p.size for p in self.params.values())


@dataclass(frozen=True)
class Analytic:
    """A function with closed forms: `f(xp, x)` for numpy, jax.numpy or torch; gradient and Hessian in numpy."""

    name: str
    f: Callable[[Any, Any], Any]
    x: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray


def digits(batch: int, side: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Real handwritten digits in [0, 1], (batch, side²), and their labels; pixels repeated above side 8."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(labels))[:batch]
    nearest = np.arange(side) * 8 // side
    square = (images[chosen] / 16.0).reshape(-1, 8, 8)[:, nearest][:, :, nearest]
    return square.reshape(len(square), -1), labels[chosen]


def _layers(sizes: tuple[int, ...], rng: np.random.Generator) -> Arrays:
    params = {}
    for i, (n, m) in enumerate(pairwise(sizes)):
        params[f"b{i}"] = 0.1 * rng.normal(size=m)
        params[f"w{i}"] = rng.normal(size=(n, m)) / np.sqrt(n)
    return dict(sorted(params.items()))


def mlp(name: str, sizes: tuple[int, ...], batch: int, side: int = 8, width: int | None = None) -> Problem:
    """A tanh network on the digits; with one layer, logistic regression."""
    images, labels = digits(batch, side)
    return Problem(
        name,
        "mlp",
        _layers(sizes, np.random.default_rng(1)),
        images[:, 18 : 18 + width] if width else images,
        labels,
    )


def conv(batch: int = 32) -> Problem:
    """Two 3x3 convolutions with GELU, the mean over the image, a linear head."""
    images, labels = digits(batch)
    rng = np.random.default_rng(2)
    params = {
        "b0": 0.1 * rng.normal(size=6),
        "b1": 0.1 * rng.normal(size=8),
        "b2": 0.1 * rng.normal(size=10),
        "w0": rng.normal(size=(6, 1, 3, 3)) / 3,
        "w1": rng.normal(size=(8, 6, 3, 3)) / np.sqrt(54),
        "w2": rng.normal(size=(8, 10)) / np.sqrt(8),
    }
    return Problem("conv", "conv", params, images.reshape(-1, 1, 8, 8), labels)


def _block(i: int, d: int, rng: np.random.Generator) -> Arrays:
    return {
        f"block{i}.down": rng.normal(size=(4 * d, d)) / np.sqrt(4 * d),
        f"block{i}.norm0": 1 + 0.1 * rng.normal(size=d),
        f"block{i}.norm1": 1 + 0.1 * rng.normal(size=d),
        f"block{i}.out": rng.normal(size=(d, d)) / np.sqrt(d),
        f"block{i}.qkv": rng.normal(size=(d, 3 * d)) / np.sqrt(d),
        f"block{i}.up": rng.normal(size=(d, 4 * d)) / np.sqrt(d),
    }


def transformer(batch: int = 32, d: int = 16) -> Problem:
    """One pre-norm block over the eight rows of a digit as tokens, the mean over tokens, a linear head."""
    images, labels = digits(batch)
    rng = np.random.default_rng(3)
    params = {
        **_block(0, d, rng),
        "embed": rng.normal(size=(8, d)) / np.sqrt(8),
        "head": rng.normal(size=(d, 10)) / np.sqrt(d),
        "place": 0.1 * rng.normal(size=(8, d)),
    }
    return Problem("transformer", "transformer", params, images.reshape(-1, 8, 8), labels)


def decoder(d: int = 128, length: int = 64, batch: int = 8, vocabulary: int = 65, blocks: int = 2) -> Problem:
    """A causal decoder on generated token sequences: the next token is predicted at every place."""
    rng = np.random.default_rng(4)
    params = {
        "embed": rng.normal(size=(vocabulary, d)) / np.sqrt(d),
        "head": rng.normal(size=(d, vocabulary)) / np.sqrt(d),
        "place": 0.1 * rng.normal(size=(length, d)),
    }
    for i in range(blocks):
        params |= _block(i, d, rng)
    steps = rng.integers(1, 4, size=(batch, length + 1))
    tokens = np.cumsum(steps, axis=1) % vocabulary  # a walk: the next token can be learned
    return Problem("transformer_128", "decoder", dict(sorted(params.items())), tokens[:, :-1], tokens[:, 1:])


# The correctness job, and the benchmarks.
CHECKED: dict[str, Callable[[], Problem]] = {
    "logistic": lambda: mlp("logistic", (64, 10), 32),
    "mlp": lambda: mlp("mlp", (64, 32, 32, 10), 32),
    "conv": conv,
    "transformer": transformer,
}
MEASURED: dict[str, Callable[[], Problem]] = {
    "mlp_10k": lambda: mlp("mlp_10k", (64, 72, 64, 10), 128),
    "mlp_784": lambda: mlp("mlp_784", (784, 512, 512, 10), 256, side=28),
    "transformer_128": decoder,
    "mlp_500": lambda: mlp("mlp_500", (8, 16, 16, 10), 128, width=8),
}


def _point(x: np.ndarray) -> np.ndarray:
    """A point that float32 holds exactly, so that one closed form serves every dtype."""
    return x.astype(np.float32).astype(np.float64)


def _rosenbrock() -> Analytic:
    x = _point(np.random.default_rng(5).normal(size=10))
    n = len(x)
    g, H = np.zeros(n), np.zeros((n, n))
    for i in range(n - 1):
        rest = x[i + 1] - x[i] ** 2
        g[i] += -400 * x[i] * rest - 2 * (1 - x[i])
        g[i + 1] += 200 * rest
        H[i, i] += 2 - 400 * (rest - 2 * x[i] ** 2)
        H[i + 1, i + 1] += 200
        H[i, i + 1] = H[i + 1, i] = -400 * x[i]
    f = lambda xp, x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
    return Analytic("rosenbrock", f, x, g, H)


def _hilbert() -> Analytic:
    n = 8
    i = np.arange(n)
    A = 1.0 / (i[:, None] + i + 1)  # condition number 1.5e10
    x = _point(np.random.default_rng(6).normal(size=n))

    def f(xp: Any, x: Any) -> Any:
        i = xp.arange(n, dtype=x.dtype) if not hasattr(x, "new_tensor") else xp.arange(n).to(x)
        return x @ ((1.0 / (i[:, None] + i + 1)) @ x) / 2

    return Analytic("hilbert", f, x, A @ x, A)


def _quartic() -> Analytic:
    x = _point(np.random.default_rng(7).normal(size=6))
    s = x.sum()
    H = np.diag(12 * x**2) + 2 * np.ones((6, 6))
    return Analytic("quartic", lambda xp, x: (x**4).sum() + x.sum() ** 2, x, 4 * x**3 + 2 * s, H)


def _logsumexp() -> Analytic:
    x = _point(3 * np.random.default_rng(8).normal(size=7))
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    return Analytic("logsumexp", lambda xp, x: xp.log(xp.exp(x).sum()), x, p, np.diag(p) - np.outer(p, p))


def _waves() -> Analytic:
    x = _point(np.random.default_rng(9).normal(size=8))
    g, H = np.zeros(8), np.zeros((8, 8))
    for i in range(7):
        a, b = x[i], 2 * x[i + 1]
        g[i] += np.cos(a) * np.sin(b)
        g[i + 1] += 2 * np.sin(a) * np.cos(b)
        H[i, i] -= np.sin(a) * np.sin(b)
        H[i + 1, i + 1] -= 4 * np.sin(a) * np.sin(b)
        H[i, i + 1] += 2 * np.cos(a) * np.cos(b)
        H[i + 1, i] += 2 * np.cos(a) * np.cos(b)
    return Analytic("waves", lambda xp, x: (xp.sin(x[:-1]) * xp.sin(2 * x[1:])).sum(), x, g, H)


def _barrier() -> Analytic:
    x = _point(np.linspace(0.01, 2.0, 6))
    s = 1 + (x**2).sum()
    g = -1 / x + 2 * x / s
    H = np.diag(1 / x**2 + 2 / s) - 4 * np.outer(x, x) / s**2
    return Analytic("log barrier", lambda xp, x: -xp.log(x).sum() + xp.log(1 + (x**2).sum()), x, g, H)


def analytics() -> list[Analytic]:
    """The functions with closed forms, one of them ill-conditioned."""
    return [_rosenbrock(), _hilbert(), _quartic(), _logsumexp(), _waves(), _barrier()]
