"""A function of jax called from torch: an autograd.Function whose derivatives and batches are calls of its kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from gradlab._errors import BackendError, StrategyError
from gradlab.interop.arrays import array, tensor
from gradlab.interop.calls import ARRAY, Call, Constant, Flat, Foreign, of_live, put
from gradlab.transforms.custom_rules._torch_levels import is_inexact, transforming, without_tangents
from gradlab.transforms.linearised._torch import materialised

OP = "as_torch"


def as_torch(f: Callable[..., Any], *, jit: bool = True) -> Foreign:
    def make(structure: Any, constants: tuple[Any, ...], _: Any) -> Call:
        def flat(*xs: Any) -> list[Any]:
            rest = iter(xs)
            leaves = [next(rest) if c is ARRAY else c.value for c in constants]
            args, kwargs = jax.tree.unflatten(structure, leaves)
            ys, call.output = jax.tree.flatten(f(*args, **kwargs))
            return list(map(jnp.asarray, ys))

        call = Call(flat, Jax(jit))
        return call

    return FromTorch(OP, f, make)


class Jax:
    """jax's own transforms. A cotangent of jax is the conjugate of torch's, which shows for complex numbers."""

    def __init__(self, jit: bool):
        self.jit = jit

    def runs(self, flat: Flat) -> Flat:
        return jax.jit(flat) if self.jit else flat

    def push(self, flat: Flat, live: Sequence[int], floats: Sequence[int]) -> Flat:
        def pushed(*args: Any) -> Any:
            xs, ts = split(args, len(live))
            return jax.jvp(of_live(flat, xs, live, floats), [xs[i] for i in live], list(ts))[1]

        return pushed

    def pull(self, flat: Flat, live: Sequence[int], floats: Sequence[int]) -> Flat:
        def pulled(*args: Any) -> Any:
            xs, us = split(args, len(floats))
            _, pull = jax.vjp(of_live(flat, xs, live, floats), *(xs[i] for i in live))
            return list(map(jnp.conj, pull(list(map(jnp.conj, us)))))

        return pulled

    def batch(self, flat: Flat, dims: Sequence[int | None]) -> Flat:
        return jax.vmap(flat, tuple(dims))


def recorded(call: Call, live: Sequence[int]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The outputs with what the pullback of the float ones needs, and that pullback."""
    structure: Any = None

    def forward(*xs: Any) -> Any:
        nonlocal structure

        def function(*some: Any) -> Any:
            ys = call.flat(*put(xs, live, some))
            return [y for y in ys if jnp.issubdtype(y.dtype, jnp.inexact)], ys

        _, pull, ys = jax.vjp(function, *(xs[i] for i in live), has_aux=True)
        kept, structure = jax.tree.flatten(pull)
        return ys, kept

    def backward(kept: Any, us: Any) -> Any:
        pull = jax.tree.unflatten(structure, kept)
        return list(map(jnp.conj, pull(list(map(jnp.conj, us)))))

    return call.engine.runs(forward), call.engine.runs(backward)


def split(args: Sequence[Any], last: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Arguments, and so many tangents or cotangents behind them."""
    return args[: len(args) - last], args[len(args) - last :]


class FromTorch(Foreign):
    """A function of jax, called with torch tensors."""

    @torch.compiler.disable(reason="as_torch runs jax, which torch.compile cannot trace")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        leaves = [torch.tensor(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves]
        is_array = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        for leaf in leaves:
            if isinstance(leaf, jax.Array):
                raise BackendError(
                    f"{OP}: {self.name} was given an array of jax; pass torch tensors, or close over it"
                )
        xs = [x for x, yes in zip(leaves, is_array, strict=True) if yes]
        constants = tuple(ARRAY if yes else Constant(x) for x, yes in zip(leaves, is_array, strict=True))
        call = self.call(structure, constants, tuple((x.shape, x.dtype) for x in xs))
        if transforming():
            ys = Called.apply(call, *xs)
        elif torch.is_grad_enabled() and any(x.requires_grad for x in xs):
            ys = Recorded.apply(call, *xs)
        else:
            ys = numbers(call.engine, call.run, xs)
        return jax.tree.unflatten(call.output, ys)


def numbers(engine: Jax, function: Callable[..., Any], tensors: Sequence[Any]) -> list[Any]:
    """What a function of jax gives for these tensors, in memory of its own."""
    xs = arrays(tensors)
    return owned(engine, function(*xs), xs)


def arrays(tensors: Sequence[Any]) -> list[Any]:
    """The numbers of tensors, shared."""
    return [array(OP, f"argument {i}", x.detach()) for i, x in enumerate(tensors)]


def owned(engine: Jax, ys: Sequence[Any], xs: Sequence[Any]) -> list[Any]:
    """Outputs as tensors that share no memory with the arguments, nor with what the function holds."""
    if any(isinstance(y, jax.core.Tracer) for y in ys):
        raise StrategyError(
            f"{OP}: f closes over an array that jax is differentiating or mapping; use jax alone there"
        )
    jax.block_until_ready(ys)
    given = {x.unsafe_buffer_pointer() for x in xs}
    fresh = lambda y: engine.jit and y.unsafe_buffer_pointer() not in given
    return [tensor(OP, f"output {i}", y, copy=not fresh(y)) for i, y in enumerate(ys)]


class Recorded(torch.autograd.Function):
    """A call in plain reverse mode, which keeps what its pullback needs."""

    @staticmethod
    def forward(ctx: Any, call: Call, *xs: Any) -> Any:
        ctx.live = tuple(i for i, x in enumerate(xs) if is_inexact(x) and ctx.needs_input_grad[i + 1])
        shared = arrays(xs)
        forward, ctx.pull = call.once(recorded, ctx.live)
        found, ctx.kept = forward(*shared)
        ys = owned(call.engine, found, shared)
        ctx.call, ctx.floats = call, [i for i, y in enumerate(ys) if is_inexact(y)]
        ctx.mark_non_differentiable(*(y for y in ys if not is_inexact(y)))
        ctx.save_for_backward(*xs)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *us: Any) -> Any:
        xs = ctx.saved_tensors
        us = tuple(us[i] for i in ctx.floats)
        if torch.is_grad_enabled():
            found = Called.apply(ctx.call.pulled(ctx.live, ctx.floats), *xs, *us)
        else:
            found = owned(ctx.call.engine, ctx.pull(ctx.kept, arrays(us)), ())
        return None, *put([None] * len(xs), ctx.live, found)


class Called(torch.autograd.Function):
    """A call, under any transform."""

    @staticmethod
    def forward(call: Call, *xs: Any) -> Any:
        return tuple(numbers(call.engine, call.run, xs))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, *xs = inputs
        ctx.height = len(output)
        ctx.floats = [i for i, y in enumerate(output) if is_inexact(y)]
        ctx.mark_non_differentiable(*(y for y in output if not is_inexact(y)))
        ctx.save_for_backward(*xs)
        ctx.save_for_forward(*xs)

    @staticmethod
    def backward(ctx: Any, *us: Any) -> Any:
        xs = ctx.saved_tensors
        live = [i for i, x in enumerate(xs) if is_inexact(x) and ctx.needs_input_grad[i + 1]]
        found = Called.apply(ctx.call.pulled(live, ctx.floats), *xs, *(us[i] for i in ctx.floats))
        return None, *put([None] * len(xs), live, found)

    @staticmethod
    def jvp(ctx: Any, _: Any, *ts: Any) -> Any:
        """With forward mode switched on, which torch switches off here: a silent 0 in nests (pytorch#197867)."""
        with _set_fwd_grad_enabled(True):
            xs = without_tangents(ctx.saved_tensors)
            live = [i for i, t in enumerate(ts) if t is not None]
            pushed = Called.apply(
                ctx.call.pushed(live, ctx.floats), *xs, *(materialised(ts[i]) for i in live)
            )
            moved = dict(zip(ctx.floats, pushed, strict=True))
            return tuple(moved.get(i) for i in range(ctx.height))

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *xs: Any) -> Any:
        ys = Called.apply(call.batched(in_dims[1:]), *xs)
        return ys, (0,) * len(ys)
