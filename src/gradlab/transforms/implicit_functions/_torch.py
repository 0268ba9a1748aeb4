from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from gradlab._errors import InputError, KindError
from gradlab._typing import Leaves
from gradlab.transforms.implicit_functions._torch_levels import (
    closed_over,
    complain,
    everywhere,
    looks_at_numbers,
    orders,
    outside,
    unrecorded,
)
from gradlab.transforms.implicit_functions._torch_linear import inverse, jacobian, solve
from gradlab.transforms.implicit_functions.options import Method, Options, Unconverged
from gradlab.transforms.repairs._torch import Level, Repair, repaired, transforming
from gradlab.transforms.trees._torch import Tree, as_tensors, scalar_function

Flat = Callable[[Any], Any]  # of y as one flat vector


def root(
    residual: Callable[..., Any],
    solver: Callable[..., Any] | None = None,
    *,
    linear_solver: Method | Callable[..., Any] = "direct",
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int | None = None,
    unconverged: Unconverged = "raise",
) -> Callable[..., Any]:
    """Damped Newton iterations; the derivative by Newton steps with the Jacobian held constant."""
    options = Options("root", residual, solver, linear_solver, rtol, atol, max_steps, unconverged)

    def zero(tree: Tree, leaves: Leaves, args: Any) -> Leaves:
        return like(tree, "residual's output", residual(tree.put(leaves), *args))

    def find(options: Options, tree: Tree, f: Flat, function: Flat) -> Any:
        direction = lambda y: solve(options, f, y, -f(y))
        return newton(options, direction, lambda y: (f(y) ** 2).sum(), tree.ravel(tree.leaves))

    return solution(options, zero, find)


def fixed_point(
    step: Callable[..., Any],
    solver: Callable[..., Any] | None = None,
    *,
    linear_solver: Method | Callable[..., Any] = "direct",
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int | None = None,
    unconverged: Unconverged = "raise",
) -> Callable[..., Any]:
    """The root of y - step(y), found by Anderson's acceleration."""
    options = Options("fixed_point", step, solver, linear_solver, rtol, atol, max_steps, unconverged)

    def zero(tree: Tree, leaves: Leaves, args: Any) -> Leaves:
        stepped = like(tree, "step's output", step(tree.put(leaves), *args))
        return [y - z for y, z in zip(leaves, stepped, strict=True)]

    def find(options: Options, tree: Tree, f: Flat, function: Flat) -> Any:
        return anderson(options, lambda y: y - f(y), tree.ravel(tree.leaves))

    return solution(options, zero, find)


def argmin(
    objective: Callable[..., Any],
    solver: Callable[..., Any] | None = None,
    *,
    linear_solver: Method | Callable[..., Any] = "direct",
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int | None = None,
    unconverged: Unconverged = "raise",
) -> Callable[..., Any]:
    """The root of the gradient, found by Newton iterations that descend where the Hessian is not positive."""
    options = Options("argmin", objective, solver, linear_solver, rtol, atol, max_steps, unconverged)

    def zero(tree: Tree, leaves: Leaves, args: Any) -> Leaves:
        scalar = scalar_function("argmin", objective, tree, args, False)
        return gradient(lambda leaves: scalar(leaves)[0][0], leaves)

    def find(options: Options, tree: Tree, f: Flat, function: Flat) -> Any:
        return newton(options, partial(descent, options, f), function, tree.ravel(tree.leaves))

    return solution(options, zero, find)


def solution(options: Options, zero: Callable[..., Leaves], find: Callable[..., Any]) -> Callable[..., Any]:
    """The function `(y0, *args) -> y` with zero(y, *args) = 0, differentiable in args."""

    def at(y0: Any, *args: Any) -> Any:
        tree = Tree(options.op, "y0", held(y0))
        if not tree.size:
            return tree.put(tree.leaves)
        asked = options.tolerances(torch.finfo(tree.dtype).eps)
        data = as_tensors(args)
        constant = held(data)
        f = lambda y: tree.ravel(zero(tree, tree.split(y), constant))

        def search() -> Any:
            if options.solver is None:
                y, converged = find(
                    asked, tree, f, lambda y: options.function(tree.put(tree.split(y)), *constant)
                )
                complain(asked, ~converged, options.unsolved)
                return torch.where(converged, y, torch.nan) if is_compiling() else y
            found = options.solver(options.function, tree.put(tree.leaves), *constant)
            return tree.ravel(like(tree, "solver's result", found))

        with unrecorded():
            y = detached(search, f, tree, constant).detach()
        moving = lambda y: tree.ravel(zero(tree, tree.split(y), data))
        return tree.put(tree.split(attached(asked, moving, f, y)))

    return at


def attached(options: Options, moving: Flat, f: Flat, y: Any) -> Any:
    """y with its derivatives: each step y - A⁻¹ (f(y) - its value) makes those of one more order right."""
    repair = Repair(Level.ALL)
    right = repaired(moving, repair)
    r = right(y)
    steps = orders(r)
    if steps == 0:
        return y
    if (
        not transforming() and not repair.names
    ):  # nothing to be repaired, which costs 7 microseconds an operation
        right = moving
    else:
        f = repaired(f)
    with unrecorded():
        apply = inverse(options, f, y)
    value = r.detach()
    y = y - apply(r - value)
    for _ in range(steps - 1):
        y = y if transforming() else Later.apply(y)
        y = y - apply(right(y) - value)
    return y


class Later(torch.autograd.Function):
    """The identity, before a further step: what comes back to it is zero, unless it is differentiated again."""

    @staticmethod
    def forward(ctx: Any, y: Any) -> Any:
        ctx.again = False
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, u: Any) -> Any:
        ctx.again = ctx.again or torch.is_grad_enabled()
        return u if ctx.again else None


def gradient(f: Callable[[Leaves], Any], leaves: Leaves) -> Leaves:
    """∇f, which can be differentiated again; in plain eager code by a recorded graph, half as dear as torch.func's."""
    if transforming():
        return torch.func.grad(f)(list(leaves))
    moving = any(x.requires_grad for x in leaves)
    again = torch.is_grad_enabled() and (moving or f(leaves).requires_grad)
    with torch.enable_grad():
        xs = [x if again and x.requires_grad else x.detach().requires_grad_() for x in leaves]
        return torch.autograd.grad(f(xs), xs, create_graph=again, materialize_grads=True)


def detached(search: Callable[[], Any], f: Flat, tree: Tree, args: Any) -> Any:
    """What search() finds, under the transforms at work, or else outside of them."""
    try:
        return search()
    except RuntimeError as error:
        if not looks_at_numbers(error):
            raise
    given = [x for x in pytree.tree_leaves((tree.all, args)) if isinstance(x, torch.Tensor)]
    return outside(search, [*given, *closed_over(f, tree.ravel(tree.leaves))])


def held(tree: Any) -> Any:
    """A tree whose tensors have no derivative."""
    return pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, tree)


def like(tree: Tree, name: str, y: Any) -> Leaves:
    """The leaves of a tree that must be like y0."""
    try:
        return tree.direction(y, name)
    except (InputError, KindError) as error:
        raise type(error)(f"{str(error).rpartition(';')[0]}; return a tree like y0") from None


def newton(options: Options, direction: Flat, merit: Flat, y: Any) -> tuple[Any, Any]:
    """Where steps in this direction have become small, and whether they have.

    The full step if the merit does not rise, else the best of 15 halved ones. Small is within the
    tolerances, or within the square root of the rounding and no longer halving: then rounding is all that moves y.
    """
    eps = torch.finfo(y.dtype).eps
    last, converged = torch.inf, torch.zeros((), dtype=torch.bool, device=y.device)
    failed = converged
    for _ in range(options.steps(256 if not is_compiling() else 16)):
        p = direction(y)
        size, scale = torch.linalg.vector_norm(p), torch.linalg.vector_norm(y)
        small = size <= options.atol * y.numel() ** 0.5 + options.rtol * scale
        small = small | ((size <= eps**0.5 * scale) & (size > last / 2))
        here, full = merit(y), merit(y + p)
        fine = small | (full <= here + 8 * eps * here.abs())
        t = torch.ones_like(size) if everywhere(fine) else torch.where(fine, 1, halved(merit, y, p))
        failed = failed | ~size.isfinite()
        y = torch.where(converged | failed, y, y + t * p)
        converged, last = converged | (small & ~failed), size
        if everywhere(converged | failed):
            break
    return y, converged


def halved(merit: Flat, y: Any, p: Any) -> Any:
    """The best of the step lengths 1/2, 1/4, ..."""
    ts = 0.5 ** torch.arange(1, 16, dtype=y.dtype, device=y.device)
    merits = torch.func.vmap(lambda t: merit(y + t * p))(ts)
    return torch.where(merits <= merits.nan_to_num(torch.inf).amin(), ts, 0).amax()


def anderson(options: Options, step: Flat, y: Any, memory: int = 5) -> tuple[Any, Any]:
    """Where a step moves y no more, and whether it does so."""
    ys: list[Any] = []
    steps: list[Any] = []
    converged = torch.zeros((), dtype=torch.bool, device=y.device)
    for _ in range(options.steps(4096 if not is_compiling() else 64)):
        z = step(y)
        r = z - y
        scale = torch.linalg.vector_norm(z)
        small = torch.linalg.vector_norm(r) <= options.atol * y.numel() ** 0.5 + options.rtol * scale
        ys, steps = [*ys[-memory:], y], [*steps[-memory:], z]
        y = torch.where(converged, y, mixed(ys, steps))
        converged = converged | small
        if everywhere(converged):
            break
    return y, converged


def mixed(ys: Leaves, zs: Leaves) -> Any:
    """The last step, less what a least-squares fit of the differences before it predicts of its residual."""
    if len(ys) == 1:
        return zs[0]
    rs = [z - y for y, z in zip(ys, zs, strict=True)]
    R = torch.stack([b - a for a, b in pairwise(rs)])
    Z = torch.stack([b - a for a, b in pairwise(zs)])
    G = R @ R.T
    G = G + torch.diag_embed(torch.finfo(G.dtype).eps * len(rs) * G.diagonal().sum().expand(len(R)))
    weights = torch.linalg.solve_ex(G, R @ rs[-1])[0]
    accelerated = zs[-1] - weights @ Z
    return torch.where(accelerated.isfinite().all(), accelerated, zs[-1])


def descent(options: Options, f: Flat, y: Any) -> Any:
    """-|H|⁻¹ g with the eigenvalues of H made positive, and a push off a saddle or a maximum.

    By an iterative linear solver -H⁻¹ g, or -g if that rises.
    """
    g = f(y)
    if options.linear_solver != "direct":
        p = solve(options, f, y, -g)
        return torch.where(p @ g < 0, p, -g)
    H = jacobian(f, y)
    wide = torch.promote_types(H.dtype, torch.float32)  # torch decomposes no half precision
    values, vectors = (part.to(H.dtype) for part in torch.linalg.eigh(H.to(wide)))
    sizes, eps = values.abs(), torch.finfo(g.dtype).eps
    p = -vectors @ (vectors.T @ g / sizes.clamp(min=eps * sizes.amax()))
    bent = values[0] < -(eps**0.5) * sizes.amax()
    push = eps**0.25 * (1 + torch.linalg.vector_norm(y)) * vectors[:, 0]
    return p + torch.where(bent, torch.where(push @ p < 0, -push, push), 0.0)
