"""What is trained on, in numpy: real digits and real text, split without a leak, and the batches of every step."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

EXAMPLES = 32  # of which gradients are taken one by one
VOCABULARY = 128  # the characters of ASCII
HELD_OUT = 0.2  # of the images, and of the topics
Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Task:
    """A model, its sizes and the batch it is trained on; the same in every framework.

    Attributes:
        name: In tables.
        kind: Which model: "mlp" and "conv" on digits, "decoder" on text.
        batch: Examples a step.
        steps: Of training.
        sizes: What the model is built from.
    """

    name: str
    kind: str
    batch: int
    steps: int
    sizes: Mapping[str, Any] = field(hash=False)


# Of operations whose results grow with the square of the parameters.
SMALL = Task("small", "mlp", 32, 0, {"widths": (64, 8, 10)})


@dataclass(frozen=True)
class Optimiser:
    """AdamW after clipping by the global norm: g ← g min(1, max_norm / (|g| + 1e-6)), as torch clips."""

    rate: float = 3e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    max_norm: float = 1.0


def _mlp(*widths: int) -> dict[str, Any]:
    return {"widths": (64, *widths, 10)}


def _decoder(width: int, heads: int, blocks: int, length: int, tied: bool = True) -> dict[str, Any]:
    return {"width": width, "heads": heads, "blocks": blocks, "length": length, "tied": tied}


TASKS: dict[str, dict[str, Task]] = {
    "tiny": {
        "mlp": Task("mlp", "mlp", 32, 20, _mlp(16)),
        "conv": Task("conv", "conv", 16, 10, {"channels": (1, 4, 6)}),
        "decoder": Task("decoder", "decoder", 4, 10, _decoder(16, 2, 1, 12)),
        "untied": Task("untied", "decoder", 4, 10, _decoder(16, 2, 1, 12, tied=False)),
    },
    "smoke": {
        "mlp": Task("mlp", "mlp", 128, 200, _mlp(128, 128)),
        "conv": Task("conv", "conv", 64, 100, {"channels": (1, 16, 32)}),
        "decoder": Task("decoder", "decoder", 16, 100, _decoder(64, 4, 2, 64)),
    },
    "paper": {
        "mlp": Task("mlp", "mlp", 256, 1000, _mlp(512, 512)),
        "conv": Task("conv", "conv", 128, 600, {"channels": (1, 32, 64)}),
        "decoder": Task("decoder", "decoder", 16, 1000, _decoder(128, 4, 4, 128)),
        "untied": Task("untied", "decoder", 16, 1000, _decoder(128, 4, 4, 128, tied=False)),
    },
}


def flattened(channels: tuple[int, ...]) -> int:
    """Numbers that reach the conv net's head from images of 8x8, halved by each layer but the first."""
    return channels[-1] * (8 >> len(channels) - 2) ** 2


@cache
def digits() -> tuple[Pair, Pair]:
    """scikit-learn's handwritten digits in [0, 1]: images (n, 64) and labels (n,), to train on and held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    cut = round(len(images) * (1 - HELD_OUT))
    parts = (order[:cut], order[cut:])
    train, test = ((images[part] / 16.0, labels[part].astype(np.int64)) for part in parts)
    return train, test


@cache
def text() -> tuple[str, str]:
    """The language reference that comes with Python, by topics: to train on, and held out."""
    from pydoc_data.topics import topics

    different = sorted(set(topics.values()))
    order = np.random.default_rng(0).permutation(len(different))
    cut = round(len(different) * (1 - HELD_OUT))
    parts = ("\n".join(different[i] for i in part) for part in (order[:cut], order[cut:]))
    train, test = (part.encode("ascii", "replace").decode() for part in parts)
    return train, test


@cache
def windows(length: int) -> np.ndarray:
    """Held-out pieces (n, length + 1) of the text, none of which occurs in what is trained on."""
    train, test = text()
    pieces = [test[i : i + length + 1] for i in range(0, len(test) - length, length + 1)]
    return np.array([_tokens(piece) for piece in pieces if piece not in train])


def _tokens(characters: str) -> np.ndarray:
    return np.frombuffer(characters.encode(), np.uint8).astype(np.int64)


def batch(task: Task, step: int, seed: int = 0, size: int | None = None) -> Pair:
    """Inputs and targets of one step, drawn by its number alone."""
    rng, size = np.random.default_rng([seed, step]), size or task.batch
    if task.kind == "decoder":
        tokens, length = _tokens(text()[0]), task.sizes["length"]
        first = rng.integers(len(tokens) - length, size=size)
        pieces = tokens[first[:, None] + np.arange(length + 1)]
        return pieces[:, :-1], pieces[:, 1:]
    (images, labels), _ = digits()
    chosen = rng.integers(len(images), size=size)
    return _shaped(task, images[chosen]), labels[chosen]


def held_out(task: Task, most: int = 400) -> Pair:
    """Inputs and targets that no step sees."""
    if task.kind == "decoder":
        pieces = windows(task.sizes["length"])[:most]
        return pieces[:, :-1], pieces[:, 1:]
    images, labels = digits()[1]
    return _shaped(task, images[:most]), labels[:most]


def _shaped(task: Task, images: np.ndarray) -> np.ndarray:
    return images.reshape(-1, 1, 8, 8) if task.kind == "conv" else images


def weight(path: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """The first value of the parameter at a path such as "layers.0.weight": by its name, so in any framework alike.

    Norms begin with weight one, biases with zero; the rest is normal, over the square root of the inputs.
    """
    if "norm" in path or path.endswith("bias"):
        return np.full(shape, 1.0 if path.endswith("weight") else 0.0)
    scale = 0.1 if path.startswith(("embed", "place")) else float(np.prod(shape[1:])) ** -0.5
    return scale * direction(path, shape, seed)


def direction(path: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A normal direction for the parameter at a path."""
    return np.random.default_rng([seed, zlib.crc32(path.encode())]).normal(size=shape)


def sinusoids(tasks: int = 16, examples: int = 10, width: int = 40) -> tuple[dict[str, np.ndarray], Any]:
    """Weights of a 1-width-1 network, and few-shot tasks ((x, y), (x, y)): to adapt to, and to answer for."""
    rng = np.random.default_rng(5)
    params = {
        "b0": np.zeros(width),
        "b1": np.zeros(1),
        "w0": rng.normal(size=(1, width)),
        "w1": rng.normal(size=(width, 1)) * width**-0.5,
    }
    height, phase = rng.uniform(0.1, 5.0, (tasks, 1, 1)), rng.uniform(0.0, np.pi, (tasks, 1, 1))
    x = rng.uniform(-5.0, 5.0, (2, tasks, examples, 1))
    support, query = ((part, height * np.sin(part - phase)) for part in x)
    return params, (support, query)


def line(size: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A point, a direction and weights, (4, size) each."""
    x, v, w = np.random.default_rng(7).normal(size=(3, 4, size))
    return x, v, w


def motion(size: int = 16, points: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Starts (points, size) and the matrix W (size, size) of dy/dt = tanh(y W)."""
    rng = np.random.default_rng(6)
    return rng.normal(size=(points, size)), rng.normal(size=(size, size)) / size**0.5


def scores(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Accuracy and macro F1."""
    from sklearn.metrics import accuracy_score, f1_score

    answers, targets = logits.reshape(-1, logits.shape[-1]).argmax(-1), targets.reshape(-1)
    return {
        "accuracy": float(accuracy_score(targets, answers)),
        "f1": float(f1_score(targets, answers, average="macro", zero_division=0)),
    }
