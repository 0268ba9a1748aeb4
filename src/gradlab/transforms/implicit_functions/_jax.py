from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jax.custom_derivatives import SymbolicZero
from jax.flatten_util import ravel_pytree

from gradlab._errors import InputError, KindError
from gradlab._typing import Leaves
from gradlab.transforms.custom_rules._jax_ruled import is_inexact, ruled
from gradlab.transforms.implicit_functions.options import Method, Options, Unconverged
from gradlab.transforms.linearised._jax import gradient_of
from gradlab.transforms.trees._jax import Tree, scalar_function

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
    """Damped Newton iterations; the derivative by a linear solve, which lineax differentiates again."""
    options = Options("root", residual, solver, linear_solver, rtol, atol, max_steps, unconverged)

    def zero(residual: Any, tree: Tree, leaves: Leaves, args: Any) -> Leaves:
        return like(tree, "residual's output", residual(tree.put(leaves), *args))

    def find(options: Options, tree: Tree, f: Flat, function: Flat) -> Any:
        direction = lambda y: inverse(options, f, y, -f(y))
        return newton(options, direction, lambda y: jnp.sum(f(y) ** 2), tree.ravel(tree.leaves))

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
    """The root of y - step(y), found by optimistix.FixedPointIteration."""
    options = Options("fixed_point", step, solver, linear_solver, rtol, atol, max_steps, unconverged)

    def zero(step: Any, tree: Tree, leaves: Leaves, args: Any) -> Leaves:
        stepped = like(tree, "step's output", step(tree.put(leaves), *args))
        return [y - z for y, z in zip(leaves, stepped, strict=True)]

    def find(options: Options, tree: Tree, f: Flat, function: Flat) -> Any:
        method: Any = optx.FixedPointIteration(options.rtol, options.atol)
        moved = lambda y, _: y - f(y)
        found: Any = optx.fixed_point(
            moved, method, tree.ravel(tree.leaves), max_steps=options.steps(4096), throw=False
        )
        return found.value, found.result == optx.RESULTS.successful

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

    def zero(objective: Any, tree: Tree, leaves: Leaves, args: Any) -> Leaves:
        return gradient_of(scalar_function("argmin", objective, tree, args, False))(leaves)[0]

    def find(options: Options, tree: Tree, f: Flat, function: Flat) -> Any:
        return newton(options, partial(descent, options, f), function, tree.ravel(tree.leaves))

    return solution(options, zero, find)


def solution(options: Options, zero: Callable[..., Leaves], find: Callable[..., Any]) -> Callable[..., Any]:
    """The function `(y0, *args) -> y` with zero(y, *args) = 0, differentiable in args."""

    def at(y0: Any, *args: Any) -> Any:
        tree = Tree(options.op, "y0", held(y0))
        asked = options.tolerances(float(jnp.finfo(tree.dtype).eps))
        args = jax.tree.map(as_array, args)
        start = tree.put(tree.leaves)
        function = eqx.filter_closure_convert(
            options.function, start, *args
        )  # what it closes over, as leaves
        equations = eqx.filter_closure_convert(partial(zero, function, tree), tree.leaves, args)
        if options.solver is None:
            f = lambda y: tree.ravel(held(equations)(tree.split(y), held(args)))
            y, converged = find(
                asked, tree, f, lambda y: held(function)(tree.put(tree.split(y)), *held(args))
            )
            found = tree.split(complain(asked, y, ~converged, options.unsolved))
        else:
            found = like(tree, "solver's result", options.solver(held(function), start, *held(args)))
        moving, rest = eqx.partition((equations, args), eqx.is_array)

        def vanishing(leaves: Leaves, moving: Any) -> Leaves:
            equations, args = eqx.combine(moving, rest)
            # Whose tangents are mapped wherever it is: lineax cannot transpose a mapped A with one b.
            return [r * (1 + 0 * jax.lax.stop_gradient(r)) for r in equations(leaves, args)]

        return tree.put(attached(asked, vanishing, moving, held(found)))

    return at


def attached(options: Options, vanishing: Callable[..., Leaves], moving: Any, leaves: Leaves) -> Leaves:
    """The leaves of y as they stand, with -A⁻¹ (∂f/∂args) v for their derivative along v, where A = ∂f/∂y."""

    def derivative(primals: Any, tangents: Any) -> Any:
        y, moving = value(*primals), primals[0]
        b = pushed(lambda moving: vanishing(y, moving), moving, tangents[0])
        operator = lx.JacobianLinearOperator(lambda y, moving: vanishing(y, moving), y, moving)
        solved = lx.linear_solve(operator, jax.tree.map(jnp.negative, b), Solve(options), throw=False)
        return y, solved.value

    value = ruled(lambda moving, leaves: leaves, derivative)
    return value(moving, leaves)


def pushed(f: Callable[[Any], Any], x: Any, v: Any) -> Any:
    """J v, where v has a SymbolicZero for what does not move."""
    leaves, spec = jax.tree.flatten(x)
    ts = jax.tree.leaves(v)
    live = [i for i, t in enumerate(ts) if not isinstance(t, SymbolicZero) and is_inexact(leaves[i])]

    def of_live(some: Leaves) -> Any:
        full = list(leaves)
        for i, leaf in zip(live, some, strict=True):
            full[i] = leaf
        return f(jax.tree.unflatten(spec, full))

    return jax.jvp(of_live, ([leaves[i] for i in live],), ([ts[i] for i in live],))[1]


def held(tree: Any) -> Any:
    """A tree whose arrays have no derivative."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x, tree)


def as_array(x: Any) -> Any:
    """An array for a number under a transform, which has a Python number within; of the same weak type."""
    return x * 1 if isinstance(x, jax.Array) and x.weak_type and eqx.is_inexact_array(x) else x


def like(tree: Tree, name: str, y: Any) -> Leaves:
    """The leaves of a tree that must be like y0."""
    try:
        return tree.direction(y, name)
    except (InputError, KindError) as error:
        raise type(error)(f"{str(error).rpartition(';')[0]}; return a tree like y0") from None


def newton(options: Options, direction: Flat, merit: Flat, start: Any) -> tuple[Any, Any]:
    """Where steps in this direction have become small, and whether they have.

    The full step if the merit does not rise, else the best of 15 halved ones. Small is within the
    tolerances, or within the square root of the rounding and no longer halving: then rounding is all that moves y.
    """
    eps = jnp.finfo(start.dtype).eps

    def body(state: Any) -> Any:
        y, last, k, _, _ = state
        p = direction(y)
        size, scale = jnp.linalg.norm(p), jnp.linalg.norm(y)
        small = size <= options.atol * y.size**0.5 + options.rtol * scale
        small |= (size <= eps**0.5 * scale) & (size > last / 2)
        here, full = merit(y), merit(y + p)
        fine = small | (full <= here + 8 * eps * jnp.abs(here))
        t = jax.lax.cond(fine, lambda: jnp.ones_like(size), lambda: halved(merit, y, p))
        return jnp.where(jnp.isfinite(size), y + t * p, y), size, k + 1, small, ~jnp.isfinite(size)

    going = lambda state: ~(state[3] | state[4]) & (state[2] < options.steps(256))
    state = start, jnp.full((), jnp.inf, start.dtype), 0, jnp.array(False), jnp.array(False)
    y, _, _, converged, _ = jax.lax.while_loop(going, body, state)
    return y, converged


def halved(merit: Flat, y: Any, p: Any) -> Any:
    """The best of the step lengths 1/2, 1/4, ..."""
    ts = 0.5 ** jnp.arange(1, 16, dtype=y.dtype)
    merits = jax.vmap(lambda t: merit(y + t * p))(ts)
    return jnp.where(merits <= jnp.nanmin(merits), ts, 0).max()


def inverse(options: Options, f: Flat, y: Any, b: Any) -> Any:
    """A⁻¹ b with A = ∂f/∂y, as far as the linear solver comes."""
    operator = lx.JacobianLinearOperator(lambda y, _: f(y), y)
    return lx.linear_solve(operator, b, Solve(options, checked=False), throw=False).value


def descent(options: Options, f: Flat, y: Any) -> Any:
    """-|H|⁻¹ g with the eigenvalues of H made positive, and a push off a saddle or a maximum.

    By an iterative linear solver -H⁻¹ g, or -g if that rises.
    """
    g = f(y)
    if options.linear_solver != "direct":
        p = inverse(options, f, y, -g)
        return jnp.where(jnp.vdot(p, g) < 0, p, -g)
    values, vectors = jnp.linalg.eigh(jax.jacfwd(f)(y))
    sizes, eps = jnp.abs(values), jnp.finfo(g.dtype).eps
    p = -vectors @ (vectors.T @ g / jnp.maximum(sizes, eps * sizes.max()))
    bent = values[0] < -(eps**0.5) * sizes.max()
    push = eps**0.25 * (1 + jnp.linalg.norm(y)) * vectors[:, 0]
    return p + jnp.where(bent, jnp.where(push @ p < 0, -push, push), 0.0)


def complain(options: Options, x: Any, bad: Any, message: str) -> Any:
    """x, or the error or warning asked for where `bad`: when the compiled code runs, if it is compiled."""
    if not isinstance(bad, jax.core.Tracer):
        if bad:
            options.report(message)
    elif options.unconverged == "raise":
        return eqx.error_if(x, bad, message)
    else:
        jax.debug.callback(lambda bad: options.report(message) if bad.any() else None, bad)
    return x


class Solve(lx.AbstractLinearSolver):
    """A linear solve of A x = b by the method asked for, whose residual is seen to be small."""

    asked: Options = eqx.field(static=True)
    checked: bool = eqx.field(static=True, default=True)

    def init(self, operator: Any, options: Any) -> Any:
        operator = lx.linearise(operator)
        method = self.method(operator)
        return operator, None if method is None else method.init(self.viewed(operator), {})

    def compute(self, state: Any, vector: Any, options: Any) -> Any:
        operator, inner = state
        method = self.method(operator)
        if method is not None:
            x = method.compute(inner, vector, {})[0]
        elif self.asked.linear_solver == "neumann":
            x = neumann(self.asked, operator.mv, vector)
        else:
            flat, shaped = ravel_pytree(vector)
            matvec = lambda v: ravel_pytree(operator.mv(shaped(v)))[0]
            x = shaped(self.asked.linear_solver(matvec, flat))  # type: ignore[operator]
        return self.seen(operator, x, vector) if self.checked else x, lx.RESULTS.successful, {}

    def method(self, operator: Any) -> Any:
        """lineax's solver, where it has one."""
        options, n = self.asked, operator.in_size()
        if options.linear_solver == "cg":
            return lx.CG(options.rtol / 2, options.atol / 2, max_steps=options.steps(10 * n))
        if options.linear_solver == "gmres":
            steps = options.steps(10 * n)
            space = min(n, 20, steps)  # lineax fills a whole one before it looks at the residual
            cycles = -(-steps // space)
            return lx.GMRES(options.rtol / 2, options.atol / 2, max_steps=cycles, restart=space)
        return lx.LU() if options.linear_solver == "direct" else None

    def viewed(self, operator: Any) -> Any:
        """The operator as lineax's method wants it: the method of conjugate gradients, told to be definite."""
        definite = self.asked.linear_solver == "cg"
        return lx.TaggedLinearOperator(operator, lx.positive_semidefinite_tag) if definite else operator

    def seen(self, operator: Any, x: Any, b: Any) -> Any:
        """x, if |A x - b| is within the tolerance; of a direct solve, within the square root of the rounding."""
        options = self.asked
        flat = lambda tree: ravel_pytree(tree)[0]
        r = flat(operator.mv(x)) - flat(b)
        rtol = options.rtol if options.linear_solver != "direct" else jnp.finfo(r.dtype).eps ** 0.5
        small = jnp.linalg.norm(r) <= options.atol * r.size**0.5 + rtol * jnp.linalg.norm(flat(b))
        return complain(options, x, ~small, options.unsolved_linear)

    def transpose(self, state: Any, options: Any) -> Any:
        operator, inner = state
        operator = operator.transpose()
        if self.asked.linear_solver == "direct":
            return (operator, lx.LU().transpose(inner, {})[0]), {}
        return self.init(operator, options), {}

    def conj(self, state: Any, options: Any) -> Any:
        return state, {}

    def assume_full_rank(self) -> bool:
        return True


def neumann(options: Options, matvec: Any, b: Any) -> Any:
    """Σ (I - A)ᵏ b."""

    def body(carry: Any) -> Any:
        x, term, k = carry
        term = jax.tree.map(jnp.subtract, term, matvec(term))
        return jax.tree.map(jnp.add, x, term), term, k + 1

    def unfinished(carry: Any) -> Any:
        _, term, k = carry
        norm = lambda tree: jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
        return (norm(term) > options.atol / 4 + options.rtol / 4 * norm(b)) & (k < options.steps(4096))

    return jax.lax.while_loop(unfinished, body, (b, b, 0))[0]
