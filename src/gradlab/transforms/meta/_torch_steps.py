"""The inner loop: steps of an optimiser on the leaves that are adapted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from gradlab._errors import InputError, KindError, StrategyError
from gradlab._typing import Leaves
from gradlab.transforms.custom_rules._torch_levels import tracked
from gradlab.transforms.implicit_functions._torch import argmin, held
from gradlab.transforms.implicit_functions._torch_levels import unrecorded
from gradlab.transforms.implicit_functions._torch_linear import cg
from gradlab.transforms.linearised._torch import tensors_only
from gradlab.transforms.meta.plan import Plan, segments
from gradlab.transforms.optimizers import check_mask
from gradlab.transforms.repairs._torch import Level, Repair, repaired
from gradlab.transforms.rules._torch import checkpoint
from gradlab.transforms.trees._torch import Tree, flatten, scalar_function, spread


class TorchPlan(Plan):
    """A plan that torch can follow where it stands."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if is_compiling() and self.method == "implicit":
            raise StrategyError(
                f"{self.op}: torch.compile does not trace method='implicit'; call it uncompiled, or pass 'unroll' or "
                "'truncate'"
            )


def adapted_by(plan: Plan, loss: Any, params: Any, mask: Any, data: Any, state: Any) -> tuple[Any, Any]:
    """The adapted tree and the last state."""
    tree = chosen(plan.op, params, mask)
    if plan.method == "implicit":
        objective = proximal_loss(plan, loss, tree, data)
        return tree.put(minimised(plan, objective, plan.optimizer_at(params), tree)), None
    leaves, state = descended(plan, loss, params, mask, data, state)
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


def repaired_once(f: Callable[..., Any]) -> Callable[..., Any]:
    """f in the mode that repairs faulty operations, until a call has shown that it has none."""
    repair = Repair(Level.ALL)
    right = repaired(f, repair)
    calls = 0

    def run(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return f(*args) if calls > 1 and repair.plain and not is_compiling() else right(*args)

    return run


def slope_of(plan: Plan, loss: Any, tree: Tree, data: Any) -> Callable[..., tuple[Leaves, Any]]:
    """`(leaves, state) -> (gradient of the inner loss, next state)`."""
    name = f"{plan.op}, {next(iter(plan.losses))}"

    def value(leaves: Leaves, state: Any) -> tuple[Any, Any]:
        args = (state, *data) if plan.stateful else data
        (y,), new = scalar_function(name, loss, tree, args, plan.stateful)(leaves)
        return y, new if plan.stateful else ()

    alone = plan.op == "adapt" or plan.method in (
        "checkpoint",
        "reptile",
    )  # else `linearise` looks after the whole
    function = repaired_once(value) if alone else value

    def slope(leaves: Leaves, state: Any) -> tuple[Leaves, Any]:
        if not plan.stateful:
            return torch.func.grad(function, has_aux=True)(list(leaves), state)[0], None
        of_tensors, restore = tensors_only(lambda leaves: function(leaves, state))
        gradient, new = torch.func.grad(of_tensors, has_aux=True)(list(leaves))
        return gradient, same(plan.op, "the state that the loss returns", restore(new), state)

    return slope


def stepper(plan: Plan, loss: Any, params: Any, mask: Any, data: Any) -> tuple[Tree, Any, Callable[..., Any]]:
    """The leaves that are adapted, the optimiser's first state, and a step of the optimiser."""
    tree = chosen(plan.op, params, mask)
    optimizer = plan.optimizer_at(params)
    slope = slope_of(plan, loss, tree, data)
    memory = numbers(plan.op, optimizer.init(tree.like(tree.leaves)))
    first = True

    def step(carry: Any, free: bool = True) -> Any:
        nonlocal first
        leaves, memory, state = carry
        if free:
            gradient, state = slope(leaves, state)
        else:
            with unrecorded():
                gradient, state = held(slope(held(list(leaves)), held(state)))
        updates, new = optimizer.update(tree.like(gradient), memory, tree.like(leaves))
        leaves = moved(plan.op, tree, leaves, updates)
        if first:
            same(plan.op, "the optimiser's state", new, memory)
            first = False
            if free:
                refuse_cut_off(plan.op, gradient, updates)
        return leaves, new, state

    return tree, memory, step


def descended(plan: Plan, loss: Any, params: Any, mask: Any, data: Any, state: Any) -> tuple[Leaves, Any]:
    """The leaves after all steps of the optimiser, and the state."""
    tree, memory, step = stepper(plan, loss, params, mask, data)
    carry = list(tree.leaves), memory, None if state is None else numbers(plan.op, state)
    if plan.method != "checkpoint":
        for i in range(plan.steps):
            carry = step(carry, plan.free(i))
        return carry[0], carry[2]

    def part(n: int) -> Callable[..., Any]:
        def run(carry: Any, params: Any, data: Any) -> Any:
            step = stepper(plan, loss, params, mask, data)[2]
            for _ in range(n):
                carry = step(carry)
            return carry

        return run

    length, count, rest = segments(plan.steps)
    for n in [*[rest] * (rest > 0), *[length] * count]:
        carry = checkpoint(part(n), carry, params, data)
    return carry[0], carry[2]


def moved(op: str, tree: Tree, leaves: Leaves, updates: Any) -> Leaves:
    """leaves + updates, in the dtypes of the leaves."""
    us, spec = flatten(updates)
    if spec != flatten(tree.like(leaves))[1]:
        us, spec = pytree.tree_flatten(updates)
        us = us if spec == pytree.tree_structure(tree.like(leaves)) else []
    us = [u for u in us if u is not None]
    if len(us) != len(leaves) or any(u.shape != x.shape for u, x in zip(us, leaves, strict=True)):
        raise InputError(
            f"{op}: the optimiser's updates are not like params; return a tree like the gradients"
        )
    return [x + u if u.dtype == x.dtype else (x + u).to(x.dtype) for x, u in zip(leaves, us, strict=True)]


def same(op: str, what: str, new: Any, old: Any) -> Any:
    """A state that is like the one before."""
    form = lambda x: (tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else type(x)
    (a, spec), (b, before) = pytree.tree_flatten(new), pytree.tree_flatten(old)
    if spec != before or list(map(form, a)) != list(map(form, b)):
        raise InputError(
            f"{op}: {what} is not like the one before, in structure, shapes or dtypes; return a tree like it"
        )
    return new


def numbers(op: str, state: Any) -> Any:
    """A state of tensors and numbers alone."""
    for leaf in pytree.tree_leaves(state):
        if leaf is not None and not isinstance(leaf, (torch.Tensor, int, float)):
            raise KindError(
                f"{op}: a state holds a {type(leaf).__name__}, which is not differentiable; keep tensors in it alone"
            )
    return state


def refuse_cut_off(op: str, gradient: Leaves, updates: Any) -> None:
    us = [u for u in pytree.tree_leaves(updates) if u is not None]
    if not is_compiling() and any(map(tracked, gradient)) and not any(map(tracked, us)):
        raise InputError(
            f"{op}: the optimiser's updates have no derivative in the gradients (detach or no_grad in its state or "
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

    def solver(objective: Any, leaves: Leaves) -> Leaves:
        memory = optimizer.init(tree.like(leaves))
        for _ in range(plan.steps):
            gradient = torch.func.grad(objective)(list(leaves))
            updates, memory = held(optimizer.update(tree.like(gradient), memory, tree.like(leaves)))
            leaves = moved(plan.op, tree, leaves, updates)
        return leaves

    return argmin(objective, solver, **plan.linear(torch.finfo(tree.dtype).eps, cg))(list(tree.leaves))
