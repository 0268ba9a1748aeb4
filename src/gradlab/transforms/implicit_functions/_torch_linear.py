"""Linear solves A x = b with A = ∂f/∂y: one to start from, and one that is a linear map under every transform."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.compiler import is_compiling

from gradlab._errors import StrategyError
from gradlab.transforms.custom_rules._torch_levels import without_tangents
from gradlab.transforms.implicit_functions._torch_levels import (
    Substituted,
    closed_over,
    complain,
    everywhere,
    mapped,
    unrecorded,
)
from gradlab.transforms.implicit_functions.options import Options
from gradlab.transforms.linearised._torch import materialised
from gradlab.transforms.repairs._torch import transforming, unseen

Flat = Callable[[Any], Any]  # of y as one flat vector


def solve(options: Options, f: Flat, y: Any, b: Any) -> Any:
    """A⁻¹ b at y, as far as the linear solver comes."""
    if options.linear_solver == "direct":
        return solved(jacobian(f, y), b)
    return method(options)(product(options, f, y, False), b)


def solved(A: Any, b: Any) -> Any:
    """A⁻¹ b; of half precision, which torch does not factorise, in single."""
    wide = torch.promote_types(A.dtype, torch.float32)
    return torch.linalg.solve_ex(A.to(wide), b.to(wide))[0].to(A.dtype)


def jacobian(f: Flat, y: Any) -> Any:
    """∂f/∂y by the pullback of every output: all at once, or one by one where torch batches it wrongly (cdist)."""
    if transforming():
        pulled: Any = torch.func.vjp(f, y)
        r, pull = pulled[0], lambda u: pulled[1](u)[0]
        pull_all: Any = torch.func.vmap(pull)
    else:  # of a recorded graph, half as dear
        with unseen(torch.enable_grad()):
            y = y.detach().requires_grad_()
            r = f(y)
        if not r.requires_grad:
            return r.new_zeros(r.numel(), r.numel())
        back: Any = partial(torch.autograd.grad, r, y, retain_graph=True, materialize_grads=True)
        pull = lambda u: back(u)[0]
        pull_all = lambda us: back(us, is_grads_batched=True)[0]
    eye = torch.eye(r.numel(), dtype=r.dtype, device=r.device)
    with suppress(RuntimeError):  # an operation (eigh, svd, ...) whose derivative torch cannot batch
        A = pull_all(eye)
        u = torch.linspace(1, 2, len(eye), dtype=eye.dtype, device=eye.device)
        off = (u @ A - pull(u)).abs()
        if is_compiling() or everywhere(off <= len(eye) * torch.finfo(eye.dtype).eps ** 0.5 * A.abs().amax()):
            return A
    return torch.stack([pull(u) for u in eye])


def inverse(options: Options, f: Flat, y: Any) -> Flat:
    """A⁻¹ at y as a linear map of b, itself without derivatives in y and in what f closes over."""
    if options.linear_solver == "direct":
        A = jacobian(f, y).detach()
        eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
        X = solved(A, eye)
        error = (A @ X - eye).abs().amax()
        complain(options, ~(error <= torch.finfo(A.dtype).eps ** 0.5), options.unsolved_linear)
        return lambda b: X @ b
    if is_compiling():
        raise StrategyError(
            f"{options.op}: torch.compile cannot trace an iterative linear solve, whose steps depend on the numbers; "
            "pass linear_solver='direct', or leave this call uncompiled"
        )
    plain = not torch._C._are_functorch_transforms_active()
    tensors = [y] if plain else closed_over(f, y)

    def at(transposed: bool) -> Callable[..., Any]:
        def solved(b: Any, *others: Any) -> Any:
            with unrecorded(), nullcontext() if plain else Substituted(tensors, others):
                matvec = product(options, f, others[0], transposed)
                x = method(options)(matvec, b)
                complain(options, ~small(options, matvec(x) - b, b), options.unsolved_linear)
                return x

        return solved

    pair = Pair(at(False), at(True))
    return lambda b: Linear.apply(pair, b, *(t.detach() for t in tensors))


class Pair(NamedTuple):
    """A linear map of b, which depends on other tensors, and its transpose."""

    forward: Callable[..., Any]
    transposed: Callable[..., Any]


class Linear(torch.autograd.Function):
    """Such a map, whose derivative is itself."""

    @staticmethod
    def forward(pair: Pair, b: Any, *tensors: Any) -> Any:
        return pair.forward(b, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.pair = inputs[0]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, u: Any) -> Any:
        tensors = ctx.saved_tensors
        return None, Linear.apply(Pair(*reversed(ctx.pair)), u, *tensors), *[None] * len(tensors)

    @staticmethod
    def jvp(ctx: Any, _: Any, t: Any, *rest: Any) -> Any:
        """With forward mode switched on, which torch switches off here: a silent 0 in nests (pytorch#197867)."""
        with _set_fwd_grad_enabled(True):
            return Linear.apply(ctx.pair, materialised(t), *without_tangents(ctx.saved_tensors))

    @staticmethod
    def vmap(info: Any, in_dims: Any, pair: Pair, *tensors: Any) -> Any:
        dims = [None if d is None else 0 for d in in_dims[1:]]
        moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims[1:], strict=True)]
        if dims[0] is None:
            dims[0], moved[0] = 0, moved[0].expand(info.batch_size, *moved[0].shape)
        many = Pair(*(mapped(run, dims, info.randomness) for run in pair))
        return Linear.apply(many, *moved), 0


def product(options: Options, f: Flat, y: Any, transposed: bool) -> Flat:
    """v ↦ A v, or Aᵀ v, by reverse mode alone; of a symmetric A the cheaper one."""
    pullback: Any = torch.func.vjp(f, y)[1]
    pull = lambda u: pullback(u)[0]
    if transposed or options.op == "argmin":
        return pull
    pushed: Any = torch.func.vjp(pull, torch.ones_like(y))[1]
    return lambda v: pushed(v)[0]


def small(options: Options, r: Any, b: Any, share: float = 1.0) -> Any:
    """Whether a residual is within (this share of) the tolerances."""
    norm = torch.linalg.vector_norm
    return norm(r) <= share * (options.atol * r.numel() ** 0.5 + options.rtol * norm(b))


def method(options: Options) -> Callable[[Flat, Any], Any]:
    """The iteration asked for, as (matvec, b) -> x."""
    if not isinstance(options.linear_solver, str):
        return options.linear_solver
    iteration = {"cg": cg, "gmres": gmres, "neumann": neumann}[options.linear_solver]
    return lambda matvec, b: iteration(options, matvec, b)


def cg(options: Options, matvec: Flat, b: Any) -> Any:
    """Conjugate gradients."""
    x, r, p = torch.zeros_like(b), b, b
    for _ in range(options.steps(10 * b.numel())):
        done = small(options, r, b, 1 / 2)
        if everywhere(done):
            break
        q = matvec(p)
        t = torch.where(done, 0, (r @ r) / (p @ q))
        x, last, r = x + t * p, r, r - t * q
        p = torch.where(done, p, r + (r @ r) / (last @ last) * p)
    return x


def gmres(options: Options, matvec: Flat, b: Any, restart: int = 32) -> Any:
    """Generalised minimal residuals: of each Krylov space the x whose image comes nearest."""
    x, r, steps = torch.zeros_like(b), b, options.steps(10 * b.numel())
    done = small(options, r, b, 1 / 2)
    while steps > 0 and not everywhere(done):
        left, space, images, reached = r, [unit(r)], [], [torch.zeros_like(b)]
        for k in range(min(restart, b.numel(), steps)):
            images.append(matvec(space[k]))
            reached.append(unit(orthogonal(images[k], torch.stack(reached))))
            left = left - reached[-1] * (reached[-1] @ left)
            if everywhere(done | small(options, left, b, 1 / 4)):
                break
            space.append(unit(orthogonal(images[k], torch.stack(space))))
        steps -= len(images)
        weights = torch.linalg.pinv(torch.stack(images).T) @ r
        x = torch.where(done, x, x + weights @ torch.stack(space[: len(images)]))
        r = b - matvec(x)
        done = small(options, r, b, 1 / 2)
    return x


def orthogonal(v: Any, basis: Any) -> Any:
    """The part of v orthogonal to the rows of a basis; nothing, where only rounding is left."""
    w = v - basis.T @ (basis @ v)
    w = w - basis.T @ (basis @ w)
    norm = torch.linalg.vector_norm
    return torch.where(norm(w) <= 8 * torch.finfo(v.dtype).eps * norm(v), 0, w)


def unit(v: Any) -> Any:
    """v of length one, or zero."""
    length = torch.linalg.vector_norm(v)
    return torch.where(length > 0, v / length, 0)


def neumann(options: Options, matvec: Flat, b: Any) -> Any:
    """Σ (I - A)ᵏ b."""
    x = term = b
    for _ in range(options.steps(4096)):
        if everywhere(small(options, term, b, 1 / 4)):
            break
        term = term - matvec(term)
        x = x + term
    return x
