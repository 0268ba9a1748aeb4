"""The inner loop: steps of an optimiser on the leaves that are adapted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradlab._errors import InputError, KindError
from gradlab._typing import Leaves
from gradlab.transforms.implicit_functions._jax import argmin, held
from gradlab.transforms.linearised._jax import gradient_of
from gradlab.transforms.meta.plan import Plan, segments
from gradlab.transforms.optimizers import Optimizer, check_mask
from gradlab.transforms.optimizers._jax_traced import is_cut_off, with_safe_roots
from gradlab.transforms.trees._jax import Tree, scalar_function, spread

UNROLLED = 5  # steps up to which a Python loop compiles quickly and runs faster than jax.lax.scan


def adapted_by(plan: Plan, loss: Any, params: Any, mask: Any, data: Any, state: Any) -> tuple[Any, Any]:
    """The adapted tree and the last state."""
    tree = chosen(plan.op, params, mask)
    optimizer = plan.optimizer_at(params)
    if plan.method == "implicit":
        objective = proximal_loss(plan, loss, tree, data)
        return tree.put(minimised(plan, objective, optimizer, tree)), None
    slope = partial(slope_of, plan, loss, tree, data)
    leaves, state = descended(plan, optimizer, tree, slope, state)
    return tree.put(leaves), state


def chosen(op: str, params: Any, mask: Any) -> Tree:
    """The tree whose leaves are those that are adapted; the others are held in it."""
    tree = Tree(op, "params", params)
    if mask is None:
        return tree
    flags = spread(mask, params)
    check_mask(op, flags, len(tree.all), "True (adapted) and False (held)")
    kept = [k for k, i in enumerate(tree.places) if flags[i]]
    if not kept:
        raise InputError(f"{op}: mask holds all of params; set True where they are to be adapted")
    tree.places, tree.leaves = [tree.places[k] for k in kept], [tree.leaves[k] for k in kept]
    return tree


def slope_of(plan: Plan, loss: Any, tree: Tree, data: Any, leaves: Leaves, state: Any) -> tuple[Leaves, Any]:
    """The gradient of the inner loss, and the next state."""
    args = (state, *data) if plan.stateful else data
    name = f"{plan.op}, {next(iter(plan.losses))}"
    gradient, new = gradient_of(scalar_function(name, loss, tree, args, plan.stateful))(leaves)
    return gradient, same(plan.op, "the state that the loss returns", new, state)


def descended(
    plan: Plan, optimizer: Any, tree: Tree, slope: Callable[..., Any], state: Any
) -> tuple[Leaves, Any]:
    """The leaves after all steps of the optimiser, and the state."""
    update = with_safe_roots(plain(plan.op, optimizer.update))
    memory = numbers(plan.op, optimizer.init(tree.like(tree.leaves)))
    if plan.held < plan.steps and plan.method != "implicit":
        refuse_cut_off(plan.op, lambda g: update(g, memory, tree.like(tree.leaves))[0], tree)

    def step(carry: Any, free: bool = True) -> Any:
        leaves, memory, state = carry
        found = slope(leaves, state)
        gradient, state = found if free else held(found)
        updates, new = update(tree.like(gradient), memory, tree.like(leaves))
        return (
            moved(plan.op, tree, leaves, updates),
            same(plan.op, "the optimiser's state", new, memory),
            state,
        )

    carry = tree.leaves, memory, numbers(plan.op, state)
    if plan.method == "checkpoint":
        length, count, rest = segments(plan.steps)
        part = lambda n: jax.checkpoint(lambda carry: repeated(step, carry, n, unrolled=1))
        carry = repeated(part(length), part(rest)(carry) if rest else carry, count, unrolled=1)
    else:
        carry = repeated(partial(step, free=False), carry, plan.held)
        carry = repeated(step, carry, plan.steps - plan.held)
    return carry[0], carry[2]


def plain(op: str, update: Callable[..., Any]) -> Callable[..., Any]:
    """An update of gradients, state and params alone."""

    def of_three(*args: Any) -> Any:
        try:
            return update(*args)
        except TypeError as error:
            if "keyword-only argument" not in str(error):
                raise
            raise KindError(
                f"{op}: the optimiser's update asks for more than gradients, state and params ({error}); "
                "pass one without a line search, and without a schedule by values of the loss"
            ) from error

    return of_three


def repeated(step: Callable[[Any], Any], carry: Any, n: int, unrolled: int = UNROLLED) -> Any:
    if n > unrolled:
        return jax.lax.scan(lambda carry, _: (step(carry), None), carry, None, length=n)[0]
    for _ in range(n):
        carry = step(carry)
    return carry


def moved(op: str, tree: Tree, leaves: Leaves, updates: Any) -> Leaves:
    """leaves + updates, in the dtypes of the leaves."""
    us = jax.tree.leaves(updates)
    like: Any = jax.tree.structure(tree.like(leaves))
    fits = jax.tree.structure(updates) == like
    if not fits or any(jnp.shape(u) != x.shape for u, x in zip(us, leaves, strict=True)):
        raise InputError(
            f"{op}: the optimiser's updates are not like params; return a tree like the gradients"
        )
    return [(x + u).astype(x.dtype) for x, u in zip(leaves, us, strict=True)]


def same(op: str, what: str, new: Any, old: Any) -> Any:
    """A state that is like the one before."""
    form = lambda tree: [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)]
    if jax.tree.structure(new) != jax.tree.structure(old) or form(new) != form(old):  # type: ignore[operator]
        raise InputError(
            f"{op}: {what} is not like the one before, in structure, shapes or dtypes; return a tree like it"
        )
    return new


def numbers(op: str, state: Any) -> Any:
    """A state of arrays alone."""
    for leaf in jax.tree.leaves(state):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float)):
            raise KindError(
                f"{op}: a state holds a {type(leaf).__name__}, which is not differentiable; keep arrays in it alone"
            )
    return jax.tree.map(jnp.asarray, state)


def refuse_cut_off(op: str, update: Callable[[Any], Any], tree: Tree) -> None:
    if is_cut_off(lambda leaves: update(tree.like(leaves)), list(tree.leaves)):
        raise InputError(
            f"{op}: the optimiser's updates have no derivative in the gradients (stop_gradient in its state or "
            "update?); pass another optimiser, or method='first_order', which holds the gradients constant"
        )


def proximal_loss(plan: Plan, loss: Any, tree: Tree, data: Any) -> Callable[[Leaves], Any]:
    """The inner loss of leaves, and ‖leaves - those of the tree‖² proximal/2."""
    function = scalar_function(f"{plan.op}, {next(iter(plan.losses))}", loss, tree, data, False)

    def objective(leaves: Leaves) -> Any:
        (value,), _ = function(leaves)
        far = sum(((x - y) ** 2).sum() for x, y in zip(leaves, tree.leaves, strict=True))
        return value + plan.proximal / 2 * far  # type: ignore[operator]

    return objective


def minimised(plan: Plan, objective: Callable[[Leaves], Any], optimizer: Any, tree: Tree) -> Leaves:
    """Where the steps lead, as a minimum of the proximal loss."""

    def solver(objective: Any, start: Any) -> Any:
        fixed = Optimizer(optimizer.init, lambda *args: held(optimizer.update(*args)))
        slope = lambda leaves, state: (jax.grad(objective)(leaves), None)
        return held(descended(plan, fixed, tree, slope, None)[0])

    return argmin(objective, solver, **plan.linear(float(jnp.finfo(tree.dtype).eps), solved))(
        list(tree.leaves)
    )


def solved(system: Any, A: Callable[[Any], Any], b: Any) -> Any:
    """A⁻¹ b by conjugate gradients."""
    steps = system.steps(10 * sum(x.size for x in jax.tree.leaves(b)))
    return jax.scipy.sparse.linalg.cg(A, b, tol=system.rtol / 2, atol=system.atol / 2, maxiter=steps)[0]
