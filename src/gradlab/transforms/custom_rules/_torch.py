from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.compiler import is_compiling, is_dynamo_compiling

from gradlab._errors import StrategyError
from gradlab.transforms.custom_rules._torch_calls import (
    CLOSED,
    Call,
    Pulled,
    Pushed,
    refuse_unlike,
)
from gradlab.transforms.custom_rules._torch_levels import (
    holds_tensor,
    is_inexact,
    mixed_batches,
    tracked,
    transforming,
    without_tangents,
)
from gradlab.transforms.custom_rules.declared import Declared
from gradlab.transforms.linearised._torch import materialised
from gradlab.transforms.repairs._torch import unseen


class Rule(Declared):
    """What both rules are made of: f with a derivative attached to its value."""

    def __init__(self, f: Callable[..., Any], nondiff_argnums: Sequence[int] = (), *, check: bool = False):
        super().__init__(f, nondiff_argnums, check=check)
        self.proven_linear = False  # whether the rule's transpose has been seen to be one
        self.proven_alike = False  # whether the rule's output has been seen to be like f's
        # torch.compile keeps this call whole and traces through it with every transform at work; its own
        # reading of an autograd.Function silently loses the derivatives of torch.func.
        self.whole = torch._dynamo.nonstrict_trace(lambda *args, **kwargs: self.traced(args, kwargs))

    def define(self, how: str, *rules: Any) -> None:
        super().define(how, *rules)
        self.holds_tensors = any(map(holds_tensor, self.functions))

    def defvmap(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        self.define("defvmap", rule)
        return rule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            if self.holds_tensors:
                raise self.refused(UNWATCHED)
            return self.whole(*args, **kwargs)
        if kwargs or self.static or len(args) < self.width:
            args = self.positional(args, kwargs)
        if self.check and not transforming():
            self.verify(args)
        return self.differentiable(args)

    def differentiable(self, args: tuple[Any, ...]) -> Any:
        """f at these arguments, with the rule for its derivative."""
        call = self.at(args)
        if not transforming():
            if torch.is_grad_enabled() and any(x.requires_grad for x in call.arrays):
                xs = call.taken()
                return self.alike(call, xs, call.output(Recorded.apply(call, *xs)))
            return call.plain()
        if not any(map(tracked, call.arrays)):
            return call.batched() if "defvmap" in self.definitions else call.plain()
        if mixed_batches(self.functions, call.arrays):
            raise self.refused("closes over a tensor that is under vmap, and is differentiated outside of it")
        ys, kept = call.value([x.detach() for x in call.arrays])
        if any(map(tracked, (*ys, *kept))):
            raise self.refused(CLOSED)
        xs = call.taken()
        return self.alike(call, xs, call.output(Nested.apply(call, *xs, *ys, *kept)))

    def traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same under torch.compile, where a tensor from a closure would stay what it was at the first call."""
        if any(map(holds_tensor, self.functions)):
            raise self.refused(UNWATCHED)
        return self.differentiable(self.positional(args, kwargs))

    @property
    def functions(self) -> tuple[Any, ...]:
        return (self.f, *chain(*self.definitions.values()))

    def refused(self, why: str) -> StrategyError:
        return StrategyError(f"{self.op}: {self.name} {why}; pass the tensor as an argument")

    def alike(self, call: Call, xs: Sequence[Any], out: Any) -> Any:
        """The rule's output; at its first derivative f runs too, whose output must be of the same form."""
        if not self.proven_alike and not is_compiling():
            devices = {x.device for x in xs if x.device.type == "cuda"}
            with unseen(torch.no_grad()), torch.random.fork_rng(devices):
                refuse_unlike(self, out, self.f(*call.put([x.detach() for x in xs])))
            self.proven_alike = True
        return out

    def verify(self, args: tuple[Any, ...]) -> None:
        call = self.at(args)
        if any(map(is_inexact, call.arrays)):
            with torch.enable_grad():
                xs = [x.detach() for x in call.arrays]
                refuse_unlike(self, call.ruled_output(xs), self.f(*call.put(xs)), values=True)
                call.exercise(xs)
                super().verify(args)

    def at(self, args: tuple[Any, ...]) -> Call:
        raise NotImplementedError


UNWATCHED = "closes over a tensor, which torch.compile does not watch there"


class custom_vjp(Rule):
    """An autograd.Function whose backward is bwd, and whose forward derivative is bwd transposed."""

    op = "custom_vjp"

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        self.define("defvjp", fwd, bwd)

    def at(self, args: tuple[Any, ...]) -> Call:
        self.defined("defvjp")
        return Pulled(self, args)


class custom_jvp(Rule):
    """An autograd.Function whose forward derivative is the rule, and whose backward is the rule transposed."""

    op = "custom_jvp"

    def defjvp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        self.define("defjvp", rule)
        return rule

    def at(self, args: tuple[Any, ...]) -> Call:
        self.defined("defjvp")
        return Pushed(self, args)


class Batched:
    """The pull and push of a call under one more vmap, whose batch lies on the leading axis."""

    def __init__(self, call: Any, dims: Sequence[int | None], randomness: str):
        self.call, self.randomness, self.width, self.height = call, randomness, call.width, call.height
        self.xs, self.kept = list(dims[: self.width]), list(dims[self.width + self.height :])

    def pull(self, xs: Any, kept: Any, ys: Any, us: Any) -> list[Any]:
        def one(xs: Any, kept: Any, ys: Any, us: Any) -> list[Any]:
            cts = self.call.pull(xs, kept, ys, us)
            return [torch.zeros_like(x) if ct is None else ct for x, ct in zip(xs, cts, strict=True)]

        cts = self._mapped(one, (self.xs, self.kept, 0, 0), xs, kept, ys, us)
        cts = [ct if d is not None else ct.sum(0) for ct, d in zip(cts, self.xs, strict=True)]
        return [ct if is_inexact(ct) else None for ct in cts]

    def push(self, xs: Any, kept: Any, ys: Any, ts: Any) -> list[Any]:
        dims = [None if t is None else d for d, t in zip(self.xs, ts, strict=True)]
        return self._mapped(self.call.push, (self.xs, self.kept, 0, dims), xs, kept, ys, ts)

    def _mapped(self, one: Callable[..., Any], dims: Any, *trees: Any) -> list[Any]:
        return torch.func.vmap(one, dims, randomness=self.randomness)(*map(list, trees))


class Recorded(torch.autograd.Function):
    """A call in plain reverse mode."""

    @staticmethod
    def forward(ctx: Any, call: Call, *xs: Any) -> Any:
        with torch.enable_grad():  # to see what f closes over
            ys, kept = call.value(detached := [x.detach() for x in xs])
        tensors = (*ys, *kept)
        if any(t.requires_grad for t in tensors):
            raise call.rule.refused(CLOSED)
        ctx.call = call
        ctx.save_for_backward(*xs, *(tensors if call.by_output else kept))
        same = {id(x): xs[i] for i, x in enumerate(detached)}  # an output that is an argument is a view of it
        return tuple(same.get(id(y), y) for y in ys)

    @staticmethod
    def backward(ctx: Any, *us: Any) -> Any:
        call, saved = ctx.call, ctx.saved_tensors
        n = call.width
        m = n + call.height if call.by_output else n
        return (None, *call.pull(saved[:n], saved[m:], saved[n:m], us))


class Nested(torch.autograd.Function):
    """A call under torch.func's transforms, and in forward mode: gives outputs ys their derivative."""

    @staticmethod
    def forward(call: Any, *tensors: Any) -> Any:
        ys = tensors[call.width : call.width + call.height]
        # Views of several arguments lose all tangents but the first in plain forward mode, and expanded ones raise.
        return tuple(y.view_as(y) if len(ys) == 1 and y.is_contiguous() else y.clone() for y in ys)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call = call = inputs[0]
        saved = (*inputs[1 : 1 + call.width], *output, *inputs[1 + call.width + call.height :])
        ctx.count = len(inputs)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *us: Any) -> Any:
        cts = ctx.call.pull(*parts(ctx.call, ctx.saved_tensors), us)
        return (None, *cts, *[None] * (ctx.count - 1 - len(cts)))

    @staticmethod
    def jvp(ctx: Any, *ts: Any) -> Any:
        """With forward mode switched on, which torch switches off here: a silent 0 in nests (pytorch#197867)."""
        with _set_fwd_grad_enabled(True):
            here = without_tangents(ctx.saved_tensors)
            moved = [None if t is None else materialised(t) for t in ts[1 : 1 + ctx.call.width]]
            return tuple(t.contiguous() for t in ctx.call.push(*parts(ctx.call, here), moved))

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Any, *tensors: Any) -> Any:
        dims = [None if d is None else 0 for d in in_dims[1:]]
        moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims[1:], strict=True)]
        for i in range(call.width, call.width + call.height):
            if dims[i] is None:
                moved[i] = moved[i].expand(info.batch_size, *moved[i].shape)
        return Nested.apply(Batched(call, dims, info.randomness), *moved), (0,) * call.height


def parts(call: Any, tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Arguments, kept residuals and outputs, as they are saved."""
    n, m = call.width, call.width + call.height
    return tensors[:n], tensors[m:], tensors[n:m]
