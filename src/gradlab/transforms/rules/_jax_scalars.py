"""Functions of real arrays with derivatives right at their edges."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.lax import stop_gradient

from gradlab._errors import KindError

Axis = int | tuple[int, ...] | None


def norm(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    x = real("norm", x)
    m = stop_gradient(jnp.abs(x).max(axis, keepdims=True, initial=0.0))
    m = jnp.where((m > 0) & jnp.isfinite(m), m, 1.0)
    length = sqrt(((x / m) ** 2).sum(axis, keepdims=True)) * m
    return length if keepdims else jnp.squeeze(length, axis)


def sqrt(x: Any) -> Any:
    x = real("sqrt", x)
    zero = x == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))


def log1mexp(x: Any) -> Any:
    x = real("log1mexp", x)
    x = x * jnp.where(x < 0, jnp.nan, 1.0)  # and so its derivatives
    small = x < jnp.log(2.0)
    inside = jnp.where(small, 1.0, x)  # of the second branch, which must not see what it cannot take
    return jnp.where(small, jnp.log(-jnp.expm1(-x)), jnp.log1p(-jnp.exp(-inside)))


def logsumexp(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    x = real("logsumexp", x)
    m = stop_gradient(x.max(axis, keepdims=True, initial=-jnp.inf))
    m = jnp.where(m == -jnp.inf, 0.0, m)
    total = jnp.exp(x - m).sum(axis, keepdims=True)
    empty = total == 0
    found = jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1.0, total)) + m)
    found = jnp.where(m == jnp.inf, jnp.inf, found)
    return found if keepdims else jnp.squeeze(found, axis)


def real(op: str, x: Any, name: str = "x") -> Any:
    """x as an array of real numbers."""
    x = jnp.asarray(x)
    if jnp.iscomplexobj(x):
        raise KindError(f"rules.{op}: {name} is complex; pass real numbers")
    return x
