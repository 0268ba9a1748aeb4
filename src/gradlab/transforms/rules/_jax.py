"""Estimators and checkpoints; the other rules are handed on from the modules beside this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from gradlab._errors import InputError, KindError
from gradlab.transforms.custom_rules._jax import custom_jvp
from gradlab.transforms.rules._jax_matrices import eigh, expm, logdet, matrix_function, stochastic_logdet
from gradlab.transforms.rules._jax_scalars import log1mexp, logsumexp, norm, real, sqrt
from gradlab.transforms.trees._jax import Tree

__all__ = [
    "checkpoint",
    "clip_gradient",
    "eigh",
    "expm",
    "log1mexp",
    "logdet",
    "logsumexp",
    "matrix_function",
    "norm",
    "reverse_gradient",
    "sqrt",
    "stochastic_logdet",
    "straight_through",
]


def straight_through(hard: Any, soft: Any) -> Any:
    name = "rules.straight_through"
    there, here = Tree(name, "hard", hard), Tree(name, "soft", soft)
    here.direction(hard, "hard")  # neither has a float array where the other has none
    pairs = zip(there.leaves, there.direction(soft, "soft"), strict=True)
    return there.put([stop_gradient(a) + (b - stop_gradient(b)) for a, b in pairs])


def reverse_gradient(x: Any, scale: float = 1.0) -> Any:
    tree = Tree("rules.reverse_gradient", "x", x)
    return tree.put(_reversed(tree.leaves, scale))


@custom_jvp
def _reversed(x: Any, scale: float) -> Any:
    return x


@_reversed.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x, scale), (v, _) = primals, tangents
    return x, [-scale * v for v in v]


def clip_gradient(x: Any, max_norm: float) -> Any:
    if not isinstance(max_norm, (int, float, np.number, np.ndarray, jax.Array)):
        raise KindError(
            f"rules.clip_gradient: max_norm is a {type(max_norm).__name__}; pass a positive number"
        )
    if isinstance(max_norm, (int, float)) and not max_norm > 0:
        raise InputError(f"rules.clip_gradient: max_norm is {max_norm!r}; pass a positive number")
    tree = Tree("rules.clip_gradient", "x", x)
    return tree.put(_clipped(tree.leaves, real("clip_gradient", max_norm, "max_norm")))


@jax.custom_vjp
def _clipped(leaves: Any, max_norm: Any) -> Any:
    return leaves


def _clip(max_norm: Any, us: Any) -> Any:
    size = norm(jnp.stack([norm(u) for u in us]))
    factor = 1 / jnp.maximum(1.0, size / jnp.where(max_norm > 0, max_norm, jnp.nan))
    return [factor.astype(u.dtype) * u for u in us], None


_clipped.defvjp(lambda leaves, max_norm: (leaves, max_norm), _clip)


def checkpoint(f: Callable[..., Any], *args: Any) -> Any:
    return eqx.filter_checkpoint(f)(
        *jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, args)
    )
