"""optax's own, with rates that may be trees, and roots that have slope 0 at zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradlab._errors import InputError, KindError
from gradlab.transforms.optimizers import Optimizer, check_mask, check_number, check_options, check_rate
from gradlab.transforms.optimizers._jax_traced import with_safe_roots
from gradlab.transforms.trees._jax import spread


def sgd(rate: Any, momentum: Any = None, nesterov: bool = False) -> Optimizer:
    check_options("sgd", momentum=momentum)
    return chain(traced(momentum, nesterov), scaled("sgd", rate))


def adam(
    rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    *,
    nesterov: bool = False,
) -> Optimizer:
    check_options("adam", b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    return chain(optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov), scaled("adam", rate))


def adamw(
    rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    weight_decay: Any = 1e-4,
    *,
    mask: Any = None,
    nesterov: bool = False,
) -> Optimizer:
    check_options("adamw", b1=b1, b2=b2, eps=eps, eps_root=eps_root, weight_decay=weight_decay)
    moments = optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov)
    return chain(moments, decayed("adamw", weight_decay, mask), scaled("adamw", rate))


def rmsprop(
    rate: Any,
    decay: Any = 0.9,
    eps: Any = 1e-8,
    initial_scale: Any = 0.0,
    eps_in_sqrt: bool = True,
    momentum: Any = None,
    nesterov: bool = False,
    *,
    centered: bool = False,
) -> Optimizer:
    check_options("rmsprop", decay=decay, eps=eps, initial_scale=initial_scale, momentum=momentum)
    by = optax.scale_by_stddev if centered else optax.scale_by_rms
    by_size = by(decay, eps, initial_scale, eps_in_sqrt=eps_in_sqrt)
    return chain(by_size, scaled("rmsprop", rate), traced(momentum, nesterov))


def chain(*parts: Any) -> Optimizer:
    """One after the other: each takes the updates of the one before for its gradients."""
    whole = optax.chain(*parts)
    return Optimizer(whole.init, with_safe_roots(whole.update))


def traced(momentum: Any, nesterov: bool) -> Any:
    """t ← g + momentum t."""
    return optax.identity() if momentum is None else optax.trace(momentum, nesterov)


def decayed(op: str, weight_decay: Any, mask: Any) -> Any:
    """g + weight_decay params."""

    def update(gs: Any, state: Any, params: Any = None) -> Any:
        if params is None:
            raise InputError(f"{op}: update needs params; call update(gradients, state, params)")
        leaves, spec = jax.tree.flatten(gs)
        flags = spread(True if mask is None else mask, gs)
        check_mask(op, flags, len(leaves), "True (decayed) and False")
        flags = jax.tree.unflatten(spec, flags)
        return jax.tree.map(lambda g, x, flag: g + weight_decay * x if flag else g, gs, params, flags), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scaled(op: str, rate: Any) -> Any:
    """-rate g: one rate, a tree of them, or a schedule of either."""
    check_rate(op, rate)
    check(op, rate(jnp.zeros((), jnp.int32)) if callable(rate) else rate)

    def update(gs: Any, count: Any, params: Any = None) -> Any:
        now = rate(count) if callable(rate) else rate
        leaves, spec = jax.tree.flatten(gs)
        found = spread(now, gs)
        if len(found) != len(leaves) or any(r is None for r in found):
            raise InputError(
                f"{op}: rate has the structure {jax.tree.structure(now)}, the gradients have {spec}; "
                "pass one number, or a tree of rates like params or like its upper part (None for what is held)"
            )
        us = [descended(op, r, g) for r, g in zip(found, leaves, strict=True)]
        return jax.tree.unflatten(spec, us), count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def descended(op: str, rate: Any, g: Any) -> Any:
    shape = np.broadcast_shapes(jnp.shape(rate), g.shape)
    if shape != g.shape:
        raise InputError(
            f"{op}: a rate of shape {jnp.shape(rate)} does not fit a parameter of shape {g.shape}; "
            "pass a number or an array that broadcasts to it"
        )
    return (-rate * g).astype(g.dtype)


def check(op: str, rate: Any) -> None:
    """Refuse rates that are none, negative or not-a-number, as far as they can be seen."""
    for leaf in jax.tree.leaves(rate):
        if isinstance(leaf, (jax.Array, np.ndarray)):
            if not isinstance(leaf, jax.core.Tracer) and leaf.size:
                check_number(op, "rate", float(np.min(leaf)))
                check_number(op, "rate", float(np.max(leaf)))
        elif isinstance(leaf, (int, float, np.generic)):
            check_number(op, "rate", float(leaf))
        else:
            raise KindError(f"{op}: rate holds a {type(leaf).__name__}; pass numbers or arrays")
