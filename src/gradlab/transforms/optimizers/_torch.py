from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from gradlab._errors import InputError, KindError
from gradlab.transforms.optimizers import Optimizer, check_mask, check_number, check_options, check_rate
from gradlab.transforms.rules._torch import sqrt
from gradlab.transforms.trees._torch import as_tensor, flatten, reordered, spread, unflatten


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
    return chain(by_moments(b1, b2, eps, eps_root, nesterov), scaled("adam", rate))


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
    moments = by_moments(b1, b2, eps, eps_root, nesterov)
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
    size = lambda v: torch.sqrt(v + eps) if eps_in_sqrt else sqrt(v) + eps

    def init(params: Any) -> Any:
        mean = mapped(torch.zeros_like, params) if centered else ()
        return mean, mapped(lambda x: (torch.zeros_like(x) + initial_scale).to(x.dtype), params)

    def update(gs: Any, state: Any, params: Any) -> Any:
        m, v = state
        v = mapped(lambda g, v: (1 - decay) * g**2 + decay * v, gs, v)
        if not centered:
            return mapped(lambda g, v: g / size(v), gs, v), (m, v)
        m = mapped(lambda g, m: (1 - decay) * g + decay * m, gs, m)
        return mapped(lambda g, m, v: g / size(v - m**2), gs, m, v), (m, v)

    return chain(Optimizer(init, update), scaled("rmsprop", rate), traced(momentum, nesterov))


def chain(*parts: Optimizer) -> Optimizer:
    """One after the other: each takes the updates of the one before for its gradients."""

    def update(gs: Any, states: Any, params: Any = None) -> Any:
        new = []
        for part, state in zip(parts, states, strict=True):
            gs, state = part.update(gs, state, params)
            new.append(state)
        return gs, tuple(new)

    return Optimizer(lambda params: tuple(part.init(params) for part in parts), update)


def traced(momentum: Any, nesterov: bool) -> Optimizer:
    """t ← g + momentum t."""
    if momentum is None:
        return Optimizer(lambda params: (), lambda gs, state, params: (gs, state))
    add = lambda g, t: g + momentum * t

    def update(gs: Any, t: Any, params: Any) -> Any:
        t = mapped(add, gs, t)
        return mapped(add, gs, t) if nesterov else t, t

    return Optimizer(lambda params: mapped(torch.zeros_like, params), update)


def by_moments(b1: Any, b2: Any, eps: Any, eps_root: Any, nesterov: bool) -> Optimizer:
    """m̂ / (√(v̂ + eps_root) + eps)."""

    def init(params: Any) -> Any:
        return 0, mapped(torch.zeros_like, params), mapped(torch.zeros_like, params)

    def update(gs: Any, state: Any, params: Any) -> Any:
        count, m, v = state
        n = count + 1
        m = mapped(lambda g, m: (1 - b1) * g + b1 * m, gs, m)
        v = mapped(lambda g, v: (1 - b2) * g**2 + b2 * v, gs, v)
        if nesterov:
            ahead = lambda g, m: b1 * (m / (1 - b1 ** (n + 1))) + (1 - b1) * (g / (1 - b1**n))
            mean = mapped(ahead, gs, m)
        else:
            mean = mapped(lambda m: m / (1 - b1**n), m)
        size = lambda v: sqrt(v / (1 - b2**n) + eps_root) + eps
        return mapped(lambda m, v: m / size(v), mean, v), (n, m, v)

    return Optimizer(init, update)


def decayed(op: str, weight_decay: Any, mask: Any) -> Optimizer:
    """g + weight_decay params."""

    def update(gs: Any, state: Any, params: Any) -> Any:
        if params is None:
            raise InputError(f"{op}: update needs params; call update(gradients, state, params)")
        leaves, spec = pytree.tree_flatten(gs)
        flags = spread(True if mask is None else mask, gs)
        check_mask(op, flags, len(leaves), "True (decayed) and False")
        flags = pytree.tree_unflatten(flags, spec)
        return mapped(lambda g, x, flag: g + weight_decay * x if flag else g, gs, params, flags), state

    return Optimizer(lambda params: (), update)


def scaled(op: str, rate: Any) -> Optimizer:
    """-rate g: one rate, a tree of them, or a schedule of either."""
    check_rate(op, rate)
    rate = checked(op, rate) if not is_schedule(rate) else rate

    def update(gs: Any, count: Any, params: Any) -> Any:
        now = checked(op, rate(count)) if is_schedule(rate) else rate
        if isinstance(now, (int, float)):
            return mapped(lambda g: g * -now, gs), count + 1
        leaves, spec = pytree.tree_flatten(gs)
        found = spread(now, gs)
        misfit = any((r is None) != (g is None) for r, g in zip(found, leaves, strict=False) if g is not None)
        if len(found) != len(leaves) or misfit:
            raise InputError(
                f"{op}: rate has the structure {pytree.tree_structure(now)}, the gradients have {spec}; "
                "pass one number, or a tree of rates like params or like its upper part (None for what is held)"
            )
        each = zip(found, leaves, strict=True)
        us = [None if g is None else descended(op, r, g) for r, g in each]
        return pytree.tree_unflatten(us, spec), count + 1

    return Optimizer(lambda params: 0, update)


def is_schedule(rate: Any) -> bool:
    return not isinstance(rate, (dict, list, tuple, torch.Tensor, int, float)) and callable(rate)


def descended(op: str, rate: Any, g: Any) -> Any:
    u = -rate * g
    if u.shape != g.shape:
        raise InputError(
            f"{op}: a rate of shape {tuple(rate.shape)} does not fit a parameter of shape {tuple(g.shape)}; "
            "pass a number or an array that broadcasts to it"
        )
    return u.to(g.dtype)


def checked(op: str, rate: Any) -> Any:
    """A tree of rates as tensors and numbers, none of them negative or not-a-number as far as they can be seen."""
    if isinstance(rate, (int, float)):
        check_number(op, "rate", rate)
        return rate
    rate = pytree.tree_map(as_tensor, rate)
    for leaf in pytree.tree_leaves(rate):
        if not isinstance(leaf, torch.Tensor):
            if leaf is not None and not isinstance(leaf, (int, float, np.generic)):
                raise KindError(f"{op}: rate holds a {type(leaf).__name__}; pass numbers or arrays")
            check_number(op, "rate", leaf if leaf is None else float(leaf))
        elif leaf.numel() and seen(leaf):
            check_number(op, "rate", float(leaf.detach().min()))
            check_number(op, "rate", float(leaf.detach().max()))
    return rate


def seen(x: torch.Tensor) -> bool:
    """Whether a look at the numbers of a constant costs nothing: neither learned nor transformed, and on the host."""
    if is_compiling() or x.requires_grad or x.device.type != "cpu":
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def mapped(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """f over the leaves of like trees; where a leaf is held there is None."""
    leaves, spec = flatten(tree)
    rest = []
    for other in others:
        xs, form = flatten(other)
        rest.append(xs if form == spec else flatten(reordered(other, tree))[0])
    return unflatten(
        spec, [None if x is None else f(x, *more) for x, *more in zip(leaves, *rest, strict=True)]
    )
