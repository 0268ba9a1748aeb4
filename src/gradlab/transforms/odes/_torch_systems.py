"""What is integrated: the user's equation as a function of one flat state, and the equations of its tangents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor

from gradlab._errors import InputError, StrategyError
from gradlab.transforms.implicit_functions._torch import like
from gradlab.transforms.implicit_functions._torch_levels import Substituted, looks_at_numbers
from gradlab.transforms.odes.options import Options
from gradlab.transforms.repairs._torch import unseen
from gradlab.transforms.trees._torch import Tree

# Parameters are a list of tensors; flags say which of them hold one for each example of a batch.


UNFOLLOWED = (
    "odeint: f maps or differentiates a tensor that it closes over, by a transform of its own, while one outside is at "
    "work on it; pass the tensor as an argument"
)


@dataclass(eq=False)
class Equation:
    """dy/dt = f(t, y, *args), of the flat state and of the tensors that f is given or closes over."""

    f: Callable[..., Any]
    tree: Tree
    put: Callable[[Sequence[Any]], Any]  # the arguments, with these tensors
    closed: list[Any]  # the tensors that f closes over, the last of the parameters
    first: Any = None  # the state and the slope at the first time, recorded, once known
    bound: Any = None  # f as a graph, to be compiled

    @cached_property
    def bare(self) -> bool:
        """Whether the state is no tree but a tensor alone."""
        return isinstance(self.tree.put(self.tree.leaves), torch.Tensor)

    @cached_property
    def shape(self) -> Any:
        """Its shape then."""
        return self.tree.leaves[0].shape if self.bare else None

    def __call__(self, t: Any, y: Any, *params: Any) -> Any:
        """The flat slope of one example."""
        return self.call(self.f, self.flat, t, y, *params)

    def flat(self, slope: Any) -> Any:
        """What f returned, as one vector."""
        if self.bare and isinstance(slope, torch.Tensor):  # what follows costs as much as a small f
            y = self.tree.leaves[0]
            if slope.shape == y.shape and slope.dtype == y.dtype:
                return slope.reshape(-1)
        return self.tree.ravel(like(self.tree, "f's output", slope))

    def single(self, params: Sequence[Any]) -> Callable[[Any, Any], Any]:
        """The slope (1, n) of one example at a state (1, n); where they are bare tensors both in their own shape."""
        own = len(params) - len(self.closed)
        if self.shape is None or any(x is not p for x, p in zip(self.closed, params[own:], strict=True)):
            shape = (1, -1) if self.shape is None else self.shape
            return lambda t, y: self(t.view(()), y.reshape(-1), *params).view(shape)
        f, put, some, shape = self.f, self.put, params[:own], self.shape

        def rates(t: Any, y: Any) -> Any:  # what is looked up here costs as much as a small f
            slope = f(t if t.ndim == 0 else t.view(()), y, *put(some))
            if isinstance(slope, torch.Tensor) and slope.shape == shape and slope.dtype == y.dtype:
                return slope
            return self.flat(slope).view(shape)

        return rates

    def value(self, event: Callable[..., Any], t: Any, y: Any, *params: Any) -> Any:
        """That of an event."""
        return self.call(event, scalar, t, y, *params)

    def call(self, f: Callable[..., Any], then: Callable[[Any], Any], t: Any, y: Any, *params: Any) -> Any:
        """A function of one example, of the state as a tree."""
        own = len(params) - len(self.closed)
        others = [(x, p) for x, p in zip(self.closed, params[own:], strict=True) if x is not p]
        with Substituted(*zip(*others, strict=True)) if others else nullcontext():
            state = y.view(self.tree.leaves[0].shape) if self.bare else self.tree.put(self.tree.split(y))
            try:
                out = f(t, state, *self.put(params[:own]))
            except RuntimeError as error:
                if "INTERNAL ASSERT" in str(error):  # of a level that is not at work here
                    raise StrategyError(UNFOLLOWED) from error
                raise
            return then(out)

    def rates(self, t: Any, y: Any, params: Sequence[Any], flags: Sequence[bool], of: Any = None) -> Any:
        """The slopes of one example, or of a batch: then y is (B, n) and t (B,); or, of an event, its values."""
        run = self if of is None else partial(self.value, of)
        if y.ndim == 1:
            return run(t.view(()), y, *params)
        dims = [0 if flag else None for flag in flags]
        try:
            return torch.func.vmap(run, (0, 0, *dims), randomness="same")(t, y, *params)
        except RuntimeError as error:
            if not looks_at_numbers(error):
                raise
        row = lambda b: [p[b] if flag else p for p, flag in zip(params, flags, strict=True)]
        return torch.stack([run(t[b], y[b], *row(b)) for b in range(len(y))])


def scalar(value: Any) -> Any:
    """What an event returned."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.is_floating_point():
        return value.reshape(())
    what = (
        f"of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
    )
    raise InputError(f"odeint: event returns {what}; return a float scalar, whose sign changes at the event")


@dataclass(eq=False)
class Tangent:
    """A system and its derivative: of the state (y, s) and the parameters (p, dp), (f, ∂f/∂y s + ∂f/∂p dp)."""

    inner: Any
    width: int  # of p
    moving: Sequence[int]  # those that have a dp
    shape: Any = None  # of a bare state

    def single(self, params: Sequence[Any]) -> Callable[[Any, Any], Any]:
        """As of an equation, of flat states."""
        return lambda t, y: self.rates(t, y[0], params, [False] * len(params))[None]

    def rates(self, t: Any, y: Any, params: Sequence[Any], flags: Sequence[bool]) -> Any:
        """As of an equation."""
        xs, own = list(params[: self.width]), list(flags[: self.width])
        vs = list(params[self.width :])
        for k, (i, flag) in enumerate(zip(self.moving, flags[self.width :], strict=True)):
            if flag and not own[i]:
                xs[i], own[i] = xs[i].expand(len(y), *xs[i].shape), True
            elif own[i] and not flag:
                vs[k] = vs[k].expand(len(y), *vs[k].shape)
        y, s = y.chunk(2, -1)

        def run(y: Any, *moved: Any) -> Any:
            for i, x in zip(self.moving, moved, strict=True):
                xs[i] = x
            return self.inner.rates(t, y, xs, own)

        return torch.cat(pushed(run, [y, *(xs[i] for i in self.moving)], [s, *vs]), -1)


def pushed(run: Callable[..., Any], xs: list[Any], vs: list[Any]) -> tuple[Any, Any]:
    """A value and J v as the transposed pullback, by reverse mode alone, which torch has right everywhere."""
    if torch._C._are_functorch_transforms_active():
        return followed(run, xs, vs)
    again = torch.is_grad_enabled() and any(x.requires_grad for x in (*xs, *vs))
    with unseen(torch.enable_grad()):
        xs = [x if x.requires_grad else x.detach().requires_grad_() for x in xs]
        k = run(*xs)
        u = torch.ones_like(k).requires_grad_()
        if not k.requires_grad:
            return k, torch.zeros_like(k)
        back = torch.autograd.grad(k, xs, u, create_graph=True, materialize_grads=True)
        some = [(g, v) for g, v in zip(back, vs, strict=True) if g.requires_grad]
        if not some:
            return k, torch.zeros_like(k)
        gs, ds = zip(*some, strict=True)
        (moved,) = torch.autograd.grad(gs, u, ds, create_graph=again, materialize_grads=True)
    return (k, moved) if again else (k.detach(), moved.detach())


def followed(run: Callable[..., Any], xs: list[Any], vs: list[Any]) -> tuple[Any, Any]:
    """The same, differentiable in whatever `run` closes over."""
    pulled: Any = torch.func.vjp(run, *xs)
    k, pull = pulled
    push: Any = torch.func.vjp(pull, torch.ones_like(k))[1]
    return k, push(tuple(vs))[0]


@dataclass(eq=False)
class Problem:
    """A system with how it is to be solved; of one example, or of a batch of them with step sizes of their own."""

    system: Any
    options: Options
    flags: tuple[bool, ...]  # of the parameters
    closed: list[Any]  # the tensors that f closes over
    parts: int = 1  # of the state
    batch: int | None = None
    latest: Any = None  # how it was last solved, for the pullback
    repeats: bool = False  # whether times may be the same as the ones before

    def rates(self, t: Any, y: Any, params: Sequence[Any]) -> Any:
        """The slopes at (t, y)."""
        t = t.expand(self.batch) if self.batch is not None and t.ndim == 0 else t
        return self.system.rates(t, y, params, self.flags)

    @property
    def bound(self) -> Any:
        """The equation as a graph, where its steps are to be compiled."""
        explicit = self.batch is None and not self.options.tableau.implicit
        return self.system.bound if explicit and isinstance(self.system, Equation) else None

    def field(self, params: Sequence[Any], flags: Sequence[bool] | None = None) -> Callable[[Any, Any], Any]:
        """The slopes (B, n) at times t and states (B, n); of one example B = 1."""
        if self.batch is None:
            return self.system.single(params)
        flags = self.flags if flags is None else flags
        return lambda t, y: self.system.rates(t.expand(len(y)), y, params, flags)

    def own(self, tensor: Any) -> Any:
        """The closed-over tensor that this one is, as saved by autograd, where it is one; then f need not be told."""
        if is_functorch_wrapped_tensor(tensor) or any(x is tensor for x in self.closed):
            return tensor
        same = lambda x: (
            not is_functorch_wrapped_tensor(x)
            and x.data_ptr() == tensor.data_ptr()
            and x.grad_fn is tensor.grad_fn
            and (x.shape, x.stride(), x.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
        )
        return next((x for x in self.closed if same(x)), tensor)

    def tangent(self, moving: Sequence[int]) -> Problem:
        """That of its derivative along a direction in these parameters."""
        system = Tangent(self.system, len(self.flags), moving)
        flags = (*self.flags, *(self.flags[i] for i in moving))
        return replace(self, system=system, flags=flags, parts=2 * self.parts, latest=None)

    def folded(self, size: int, flags: Sequence[bool]) -> Problem:
        """That of a batch of it."""
        return replace(self, flags=tuple(flags), batch=size * (self.batch or 1), latest=None)
