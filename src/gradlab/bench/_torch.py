"""The problems and the clock's needs in torch, as a user of torch would write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils import _pytree as pytree

from gradlab.bench.problems import Problem


def arrays(tree: Any, dtype: str, device: str = "cpu") -> Any:
    """A tree of numpy arrays on the device; floats in the dtype, integers as they are."""
    kind = lambda a: getattr(torch, dtype) if a.dtype.kind == "f" else None
    return pytree.tree_map(
        lambda a: torch.tensor(np.asarray(a), dtype=kind(np.asarray(a)), device=device), tree
    )


def synchronise(result: Any) -> Any:
    """Wait until the result is there."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def value_and_grad(f: Callable[..., Any]) -> Callable[..., Any]:
    """f and its gradient in a tensor, or a dictionary of them, by plain backward: torch's fastest way."""

    def both(p: Any, *args: Any) -> Any:
        named = isinstance(p, dict)
        leaves = [leaf.detach().requires_grad_() for leaf in (p.values() if named else [p])]
        value = f(dict(zip(p, leaves, strict=True)) if named else leaves[0], *args)
        found = torch.autograd.grad(value, leaves)
        return value.detach(), dict(zip(p, found, strict=True)) if named else found[0]

    return both


def grad(f: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient alone."""
    both = value_and_grad(f)
    return lambda *args: both(*args)[1]


def model(problem: Problem) -> Callable[..., Any]:
    """`model(params, inputs)`: logits."""
    return {"mlp": _mlp, "conv": _conv, "transformer": _transformer, "decoder": _decoder}[problem.kind]


def outer(outputs: Any, targets: Any) -> Any:
    """Mean cross-entropy of logits (..., classes) and integer labels (...)."""
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def loss(problem: Problem) -> Callable[..., Any]:
    """`loss(params, inputs, targets)`."""
    apply = model(problem)
    return lambda params, inputs, targets: outer(apply(params, inputs), targets)


def _mlp(params: Any, inputs: Any) -> Any:
    h, layers = inputs, len(params) // 2
    for i in range(layers):
        h = h @ params[f"w{i}"] + params[f"b{i}"]
        h = torch.tanh(h) if i < layers - 1 else h
    return h


def _conv(params: Any, inputs: Any) -> Any:
    h = inputs
    for i in range(2):
        h = functional.conv2d(h, params[f"w{i}"], params[f"b{i}"], padding=1)
        h = functional.gelu(h, approximate="tanh")
    return h.mean((2, 3)) @ params["w2"] + params["b2"]


def _norm(x: Any, scale: Any) -> Any:
    return functional.layer_norm(x, x.shape[-1:], scale)


def _block(params: Any, name: str, h: Any, heads: int, causal: bool) -> Any:
    batch, length, d = h.shape
    qkv = (_norm(h, params[f"{name}.norm0"]) @ params[f"{name}.qkv"]).reshape(batch, length, 3, heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
    h = h + mixed.reshape(batch, length, d) @ params[f"{name}.out"]
    up = functional.gelu(_norm(h, params[f"{name}.norm1"]) @ params[f"{name}.up"], approximate="tanh")
    return h + up @ params[f"{name}.down"]


def _transformer(params: Any, inputs: Any) -> Any:
    h = _block(params, "block0", inputs @ params["embed"] + params["place"], heads=2, causal=False)
    return h.mean(1) @ params["head"]


def _decoder(params: Any, inputs: Any) -> Any:
    h = params["embed"][inputs] + params["place"]
    for i in range(sum(name.endswith(".qkv") for name in params)):
        h = _block(params, f"block{i}", h, heads=4, causal=True)
    return h @ params["head"]
