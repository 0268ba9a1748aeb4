"""Estimators and checkpoints; the other rules are handed on from the modules beside this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from gradlab._errors import InputError, KindError, StrategyError
from gradlab.transforms.custom_rules._torch import custom_jvp, custom_vjp
from gradlab.transforms.custom_rules._torch_levels import is_inexact
from gradlab.transforms.rules._torch_matrices import eigh, expm, logdet, matrix_function, stochastic_logdet
from gradlab.transforms.rules._torch_scalars import log1mexp, logsumexp, norm, real, sqrt
from gradlab.transforms.trees._torch import Tree

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
    here.direction(hard, "hard")  # neither has a float tensor where the other has none
    pairs = zip(there.leaves, there.direction(soft, "soft"), strict=True)
    return there.put([a.detach() + (b - b.detach()) for a, b in pairs])


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
    if not isinstance(max_norm, (int, float, torch.Tensor)):
        raise KindError(
            f"rules.clip_gradient: max_norm is a {type(max_norm).__name__}; pass a positive number"
        )
    if isinstance(max_norm, (int, float)) and not max_norm > 0:
        raise InputError(f"rules.clip_gradient: max_norm is {max_norm!r}; pass a positive number")
    tree = Tree("rules.clip_gradient", "x", x)
    clipped = _clipped_whole if is_compiling() else _Clipped.apply
    return tree.put(clipped(real("clip_gradient", max_norm, "max_norm"), *tree.leaves))


class _Clipped(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(max_norm: Any, *leaves: Any) -> Any:
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *us: Any) -> Any:
        (max_norm,) = ctx.saved_tensors
        size = norm(torch.stack([norm(u) for u in us]))
        factor = 1 / (size / torch.where(max_norm > 0, max_norm, torch.nan)).clamp(min=1.0)
        return (None, *(factor.to(u.dtype) * u for u in us))

    @staticmethod
    def jvp(ctx: Any, *ts: Any) -> Any:
        raise StrategyError(
            "rules.clip_gradient: clipping is not linear in the cotangent, so it has no forward mode; "
            "use reverse mode alone"
        )


# Kept whole by torch.compile, whose own reading of a Function loses the derivatives of torch.func.
_clipped_whole = torch._dynamo.nonstrict_trace(lambda max_norm, *leaves: _Clipped.apply(max_norm, *leaves))


def checkpoint(f: Callable[..., Any], *args: Any) -> Any:
    if is_compiling():  # the compiler itself chooses what is computed again
        return f(*args)
    again = custom_vjp(f)
    again.proven_alike = True  # f and the rule's are one

    def forward(*args: Any) -> Any:
        replayed = _replayed(args)
        return f(*args), (args, replayed)

    def backward(kept: Any, u: Any) -> Any:
        args, replayed = kept
        leaves, structure = pytree.tree_flatten(args)
        places = [i for i, x in enumerate(leaves) if is_inexact(x)]

        def of_floats(*xs: Any) -> Any:
            filled = list(leaves)
            for i, x in zip(places, xs, strict=True):
                filled[i] = x
            with replayed():
                out = f(*pytree.tree_unflatten(filled, structure))
            return [y for y in pytree.tree_leaves(out) if is_inexact(y)]

        pulled = torch.func.vjp(of_floats, *(leaves[i] for i in places))[1]
        cts: list[Any] = [None] * len(leaves)
        for i, ct in zip(places, pulled([u for u in pytree.tree_leaves(u) if u is not None]), strict=True):
            cts[i] = ct
        return pytree.tree_unflatten(cts, structure)

    again.defvjp(forward, backward)
    return again(*args)


def _replayed(args: Any) -> Callable[[], AbstractContextManager[None]]:
    """A context in which torch's generators, and those among the arguments, draw again what they draw after this."""
    leaves = pytree.tree_leaves(args)
    generators = [torch.default_generator, *(x for x in leaves if isinstance(x, torch.Generator))]
    for device in {x.device for x in leaves if isinstance(x, torch.Tensor) and x.device.type == "cuda"}:
        generators.append(torch.cuda.default_generators[device.index])
    states = [generator.get_state() for generator in generators]

    @contextmanager
    def again() -> Iterator[None]:
        now = [generator.get_state() for generator in generators]
        try:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            yield
        finally:
            for generator, state in zip(generators, now, strict=True):
                generator.set_state(state)

    return again
