from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from gradlab._errors import InputError, KindError, StrategyError
from gradlab._typing import Leaves
from gradlab.transforms.custom_rules._torch_levels import differentiating, tracked
from gradlab.transforms.graphs._torch import remember
from gradlab.transforms.implicit_functions._torch import argmin, held
from gradlab.transforms.implicit_functions._torch_levels import complain, unrecorded
from gradlab.transforms.implicit_functions._torch_linear import cg
from gradlab.transforms.linearised._torch import linearise
from gradlab.transforms.meta.plan import Method, Plan, bilevel_plan, check_pair, segments, task_count
from gradlab.transforms.operators import check_chunk_size
from gradlab.transforms.optimizers._torch import sgd
from gradlab.transforms.repairs._torch import Level, Repair, repaired
from gradlab.transforms.rules._torch import checkpoint
from gradlab.transforms.trees._torch import Tree, as_tensors, flatten, scalar_function, spread


def adapt(
    loss: Callable[..., Any],
    params: Any,
    *data: Any,
    optimizer: Any,
    steps: int,
    method: Method = "unroll",
    mask: Any = None,
    last: int | None = None,
    proximal: float | None = None,
    cg_steps: int | None = None,
    state: Any = None,
) -> Any:
    """A Python loop; rules.checkpoint; argmin for the implicit method."""
    losses = {"loss": loss}
    plan = Plan("adapt", losses, optimizer, steps, method, last, proximal, cg_steps, state is not None)
    adapted, state = adapted_by(plan, loss, params, mask, as_tensors(data), state)
    return adapted if not plan.stateful else (adapted, state)


def meta_grad(
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    params: Any,
    tasks: Any,
    *,
    optimizer: Any,
    steps: int,
    method: Method = "unroll",
    mask: Any = None,
    last: int | None = None,
    proximal: float | None = None,
    cg_steps: int | None = None,
    state: Any = None,
    chunk_size: int | None = None,
) -> Any:
    """The gradient of `meta_value_and_grad`."""
    losses = {"inner_loss": inner_loss, "outer_loss": outer_loss}
    plan = Plan("meta_grad", losses, optimizer, steps, method, last, proximal, cg_steps, state is not None)
    return over_tasks(plan, params, tasks, mask, state, chunk_size)[1]


def meta_value_and_grad(
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    params: Any,
    tasks: Any,
    *,
    optimizer: Any,
    steps: int,
    method: Method = "unroll",
    mask: Any = None,
    last: int | None = None,
    proximal: float | None = None,
    cg_steps: int | None = None,
    state: Any = None,
    chunk_size: int | None = None,
    report: bool = False,
) -> Any:
    """One backward pass through torch.func.vmap over tasks; chunks one after the other, their gradients summed."""
    op, losses = "meta_value_and_grad", {"inner_loss": inner_loss, "outer_loss": outer_loss}
    plan = Plan(op, losses, optimizer, steps, method, last, proximal, cg_steps, state is not None)
    found = over_tasks(plan, params, tasks, mask, state, chunk_size)
    return found if report else found[:2]


def maml_grad(
    loss: Callable[..., Any],
    params: Any,
    tasks: Any,
    *,
    inner_lr: Any,
    steps: int,
    method: Method = "unroll",
    chunk_size: int | None = None,
) -> Any:
    """`meta_grad` of one loss with SGD."""
    losses = {"inner_loss": loss, "outer_loss": loss}
    plan = Plan("maml_grad", losses, sgd(inner_lr), steps, method)
    return over_tasks(plan, params, tasks, None, None, chunk_size)[1]


def bilevel_grad(
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    meta: Any,
    params: Any,
    data: Any,
    *,
    optimizer: Any,
    steps: int,
    method: Method = "unroll",
    last: int | None = None,
    proximal: float | None = None,
    cg_steps: int | None = None,
    state: Any = None,
) -> Any:
    """The gradient of `bilevel_value_and_grad`."""
    how = (optimizer, steps, method, last, proximal, cg_steps, state is not None)
    plan = bilevel_plan("bilevel_grad", inner_loss, outer_loss, *how)
    return of_one(plan, meta, params, data, state)[1]


def bilevel_value_and_grad(
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    meta: Any,
    params: Any,
    data: Any,
    *,
    optimizer: Any,
    steps: int,
    method: Method = "unroll",
    last: int | None = None,
    proximal: float | None = None,
    cg_steps: int | None = None,
    state: Any = None,
    report: bool = False,
) -> Any:
    """One task with (params, meta) for its parameters, of which params alone are adapted."""
    how = (optimizer, steps, method, last, proximal, cg_steps, state is not None)
    plan = bilevel_plan("bilevel_value_and_grad", inner_loss, outer_loss, *how)
    found = of_one(plan, meta, params, data, state)
    return found if report else found[:2]


def adapted_by(plan: Plan, loss: Any, params: Any, mask: Any, data: Any, state: Any) -> tuple[Any, Any]:
    """The adapted tree and the last state."""
    refuse_compiled(plan)
    tree = chosen(plan.op, params, mask)
    if plan.method == "implicit":
        objective = proximal_loss(plan, loss, tree, data)
        return tree.put(minimised(plan, objective, plan.optimizer_at(params), tree)), None
    leaves, state = descended(plan, loss, params, mask, data, state)
    return tree.put(leaves), state


def refuse_compiled(plan: Plan) -> None:
    if is_compiling() and plan.method == "implicit":
        raise StrategyError(
            f"{plan.op}: torch.compile does not trace method={plan.method!r}; call it uncompiled, or pass 'unroll' or "
            "'truncate'"
        )


def chosen(op: str, params: Any, mask: Any) -> Tree:
    """The tree whose leaves are those that are adapted; the others are held in it."""
    tree = Tree(op, "params", params)
    if mask is None:
        return tree
    flags = spread(mask, params)
    if len(flags) != len(tree.all) or not all(isinstance(flag, bool) for flag in flags):
        raise InputError(
            f"{op}: mask does not fit params; pass a tree of True (adapted) and False (held) with the structure "
            "of params or of its upper part"
        )
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

    alone = plan.op == "adapt" or plan.method == "checkpoint"  # else `linearise` looks after the whole
    function = repaired_once(value) if alone else value

    def slope(leaves: Leaves, state: Any) -> tuple[Leaves, Any]:
        gradient, new = torch.func.grad(function, has_aux=True)(list(leaves), state)
        return gradient, same(
            plan.op, "the state that the loss returns", new, state
        ) if plan.stateful else None

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
        moved = added(plan.op, tree, leaves, updates)
        if first:
            same(plan.op, "the optimiser's state", new, memory)
            first = False
            if free:
                refuse_cut_off(plan.op, gradient, updates)
        return moved, new, state

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


def added(op: str, tree: Tree, leaves: Leaves, updates: Any) -> Leaves:
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
            leaves = added(plan.op, tree, leaves, updates)
        return leaves

    return argmin(objective, solver, **plan.linear(torch.finfo(tree.dtype).eps, cg))(list(tree.leaves))


def over_tasks(plan: Plan, params: Any, tasks: Any, mask: Any, state: Any, chunk_size: int | None) -> Any:
    """The mean outer loss, its gradient, and what is reported of each task."""
    refuse_compiled(plan)
    check_chunk_size(plan.op, chunk_size)
    data = (*map(as_tensors, check_pair(plan.op, tasks)), *as_tensors((state,)))
    tree = Tree(plan.op, "params", params)
    count = task_count(plan.op, shapes(("support", "query", "state"), data), "support and query")
    together = of_many(plan, lambda leaves: (tree.put(leaves), mask), count)
    size = min(chunk_size or count, count)
    parts = []
    for i in range(0, count, size):
        cut = lambda x: x[i : i + size] if isinstance(x, torch.Tensor) and size < count else x
        parts.append(together(tree.leaves, pytree.tree_map(cut, data)))
    if len(parts) == 1:
        value, gradient, report = parts[0]
        return value, tree.like(gradient), report
    values, gradients, reports = zip(*parts, strict=True)
    gradient = [sum(leaf) for leaf in zip(*gradients, strict=True)]
    joined = pytree.tree_map(lambda *xs: torch.cat(xs), *reports)
    return sum(values), tree.like(gradient), joined


def of_many(plan: Plan, assemble: Callable[[Leaves], Any], count: int) -> Callable[..., Any]:
    """`(leaves, tasks) -> (sum of losses / count, its gradient, report)`, by all tasks at once."""

    def over(f: Callable[..., Any], leaves: Leaves, data: Any) -> Any:
        return torch.func.vmap(lambda *task: f(leaves, task), (0, 0, 0 if plan.stateful else None))(*data)

    def direct(leaves: Leaves, data: Any) -> Any:
        losses, gradients, report = over(partial(directly, plan, assemble), leaves, data)
        return losses.sum() / count, [g.sum(0) / count for g in gradients], report

    def total(data: Any, leaves: Leaves) -> Any:
        losses, report = over(partial(derived, plan, assemble), leaves, data)
        return [losses.sum() / count], report

    return by_method(plan, direct, total)


def by_method(plan: Plan, direct: Callable[..., Any], total: Callable[..., Any]) -> Callable[..., Any]:
    """`(leaves, data) -> (value, gradient, report)`, directly or as the gradient of `total(data, leaves)`.

    The implicit method's direct gradient is a number. Where it is differentiated again, it is taken through `adapt`.
    """

    def run(leaves: Leaves, data: Any) -> Any:
        if plan.method == "reptile":
            return direct(leaves, data)
        if plan.method == "implicit":
            tensors = [x for x in pytree.tree_leaves(data) if isinstance(x, torch.Tensor)]
            again = differentiating([*leaves, *tensors])
            with unrecorded():
                found = direct(held(list(leaves)), held(data))
            if not again:
                return found
        steps = partial(total, data)
        if not is_compiling():
            remember(steps, Level.NONE)  # unless its graph shows otherwise
        line = linearise(steps, leaves, steps)
        (value,) = line.outputs
        report = found[2] if plan.method == "implicit" else line.aux
        return value, line.pull([torch.ones_like(value)], last=True), report

    return run


def of_one(plan: Plan, meta: Any, params: Any, data: Any, state: Any) -> Any:
    """The outer loss, its gradient in meta, and what is reported."""
    pair = check_pair(plan.op, data, "data", ("inner_data", "outer_data"))
    task = (*map(as_tensors, pair), *as_tensors((state,)))
    tree = Tree(plan.op, "meta", meta)
    assemble = lambda leaves: ((params, tree.put(leaves)), (True, False))

    def total(task: Any, leaves: Leaves) -> Any:
        loss, report = derived(plan, assemble, leaves, task)
        return [loss], report

    found = by_method(plan, partial(directly, plan, assemble), total)(tree.leaves, task)
    return found[0], tree.like(found[1]), found[2]


def derived(plan: Plan, assemble: Callable[[Leaves], Any], leaves: Leaves, task: Any) -> tuple[Any, Any]:
    """The outer loss of one task after adaptation, to be differentiated in the leaves."""
    return followed(plan, assemble, leaves, task)[1:]


def followed(
    plan: Plan, assemble: Callable[[Leaves], Any], leaves: Leaves, task: Any
) -> tuple[Any, Any, Any]:
    """The adapted tree of one task, its outer loss, and what is reported."""
    support, query, state = task
    params, mask = assemble(leaves)
    adapted, state = adapted_by(plan, plan.losses["inner_loss"], params, mask, support, state)
    loss, state = outer(plan, adapted, query, state)
    return adapted, loss, {"loss": loss, "state": state} if plan.stateful else {"loss": loss}


def outer(plan: Plan, adapted: Any, query: Any, state: Any) -> tuple[Any, Any]:
    """The outer loss, and the last state."""
    tree = Tree(plan.op, "params", adapted)
    args = (state, *query) if plan.stateful else query
    name = f"{plan.op}, outer_loss"
    function = scalar_function(name, plan.losses["outer_loss"], tree, args, plan.stateful)
    (value,), state = function(tree.leaves)
    return value, state


def directly(
    plan: Plan, assemble: Callable[[Leaves], Any], leaves: Leaves, task: Any
) -> tuple[Any, Any, Any]:
    """The outer loss of one task, and its gradient by another way than through the steps."""
    if plan.method == "reptile":  # params - adapted, zero where params are held
        adapted, loss, report = followed(plan, assemble, leaves, task)
        found = Tree(plan.op, "params", adapted).leaves
        return loss, [x - y for x, y in zip(leaves, found, strict=True)], report

    support, query, _ = task
    inner_loss = plan.losses["inner_loss"]

    def tree_at(leaves: Leaves) -> Tree:
        return chosen(plan.op, *assemble(leaves))

    def slope(leaves: Leaves, minimum: Leaves) -> Leaves:
        return torch.func.grad(proximal_loss(plan, inner_loss, tree_at(leaves), support))(minimum)

    def loss_at(leaves: Leaves, minimum: Leaves) -> Any:
        return outer(plan, tree_at(leaves).put(minimum), query, None)[0]

    tree = tree_at(leaves)
    objective = proximal_loss(plan, inner_loss, tree, support)
    minimum = list(minimised(plan, objective, plan.optimizer_at(assemble(leaves)[0]), tree))
    both: Any = torch.func.grad_and_value(loss_at, (0, 1))(list(leaves), minimum)
    (direct, u), loss = both
    x, residual = adjoint(plan, partial(slope, leaves), tree, minimum, u)
    pulled: Any = torch.func.vjp(lambda leaves: slope(leaves, minimum), list(leaves))
    there, pull = pulled
    gradient = [a - b for a, b in zip(direct, pull(x)[0], strict=True)]
    return loss, gradient, {"loss": loss, "residual": residual, "stationarity": norm(there)}


def adjoint(plan: Plan, slope: Any, tree: Tree, minimum: Leaves, u: Leaves) -> tuple[Leaves, Any]:
    """x with (∇² objective) x = u, and ‖(∇² objective) x - u‖/‖u‖."""
    system = plan.system(torch.finfo(tree.dtype).eps)
    pull: Any = torch.func.vjp(repaired(slope), minimum)[1]
    product = lambda x: pull(tree.split(x))[0]
    b = tree.ravel(u)
    x = cg(system, lambda x: tree.ravel(product(x)), b)
    size, missed = norm([b]), norm([tree.ravel(product(x)) - b])
    if plan.cg_steps is None:
        small = missed <= system.rtol * size + system.atol * b.numel() ** 0.5
        complain(system, ~small, system.unsolved_linear)
    return tree.split(x), torch.where(size > 0, missed / torch.where(size > 0, size, 1), 0)


def norm(leaves: Leaves) -> Any:
    return sum((x**2).sum() for x in leaves).sqrt()


def shapes(names: tuple[str, ...], data: Any) -> dict[str, Any]:
    """The shape of each leaf by its name; None of what is no tensor."""
    return {
        name + pytree.keystr(path): getattr(leaf, "shape", None)
        for name, part in zip(names, data, strict=True)
        for path, leaf in pytree.tree_flatten_with_path(part)[0]
        if part is not None
    }
