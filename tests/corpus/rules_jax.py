"""Rules of one's own on a jax function, and numbers to try them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def pulled(f: Callable[..., Any], pull: Callable[..., Any]) -> Callable[..., Any]:
    """f with the pullback `pull(*x, u)`: an array for one argument, a tuple for several."""
    ruled = jax.custom_vjp(lambda *x: f(*x))  # whose optional arguments jax would pass on as data
    back = lambda x, u: pull(*x, u) if len(x) > 1 else (pull(*x, u),)
    ruled.defvjp(lambda *x: (f(*x), x), back)
    return ruled


def pushed(f: Callable[..., Any], push: Callable[..., Any]) -> Callable[..., Any]:
    """f with the tangent `push(*x, *v)`, which reverse mode transposes."""
    ruled = jax.custom_jvp(lambda *x: f(*x))
    ruled.defjvp(lambda x, v: (ruled(*x), push(*x, *v)))
    return ruled


def normal(*shape: int, seed: int = 0, dtype: Any = np.float64) -> jax.Array:
    """Normal random numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def even(n: int, low: float = 0.4, high: float = 2.0, dtype: Any = np.float64) -> jax.Array:
    """Evenly spaced numbers."""
    return jnp.asarray(np.linspace(low, high, n), dtype)


def array(*values: Any, dtype: Any = np.float64) -> jax.Array:
    """An array of the numbers given."""
    return jnp.asarray(np.array(values), dtype)
