from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gradlab._typing import Leaves
from gradlab.transforms.implicit_functions._jax import complain, root
from gradlab.transforms.linearised._jax import is_traced
from gradlab.transforms.meta._jax_steps import adapted_by, chosen, minimised, proximal_loss, solved
from gradlab.transforms.meta.plan import Method, Plan, bilevel_plan, check_pair, shape_of, task_count
from gradlab.transforms.operators import check_chunk_size
from gradlab.transforms.optimizers._jax import sgd
from gradlab.transforms.trees._jax import Tree, scalar_function


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
    """A Python loop of few steps, jax.lax.scan of many; jax.checkpoint; argmin for the implicit method."""
    losses = {"loss": loss}
    plan = Plan("adapt", losses, optimizer, steps, method, last, proximal, cg_steps, state is not None)
    adapted, state = adapted_by(plan, loss, params, mask, data, state)
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
    """jax.value_and_grad of jax.vmap over tasks; chunks one after the other, their gradients summed."""
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
    plan = bilevel_plan(Plan, "bilevel_grad", inner_loss, outer_loss, *how)
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
    plan = bilevel_plan(Plan, "bilevel_value_and_grad", inner_loss, outer_loss, *how)
    found = of_one(plan, meta, params, data, state)
    return found if report else found[:2]


def over_tasks(plan: Plan, params: Any, tasks: Any, mask: Any, state: Any, chunk_size: int | None) -> Any:
    """The mean outer loss, its gradient, and what is reported of each task."""
    check_chunk_size(plan.op, chunk_size)
    data = (*check_pair(plan.op, tasks), state)
    tree = Tree(plan.op, "params", params)
    count = task_count(plan.op, shapes(("support", "query", "state"), data), "support and query")
    together = of_many(plan, lambda leaves: (tree.put(leaves), mask), count)

    def body(total: Any, chunk: Any) -> Any:
        *part, report = together(tree.leaves, chunk)
        return jax.tree.map(jnp.add, total, part), report

    size = min(chunk_size or count, count)
    if size == count:
        value, gradient, report = together(tree.leaves, data)
        return value, tree.like(gradient), report
    cut = lambda i, j: jax.tree.map(lambda x: x[i:j], data)
    *forms, _ = jax.eval_shape(together, tree.leaves, cut(0, size))
    start = jax.tree.map(lambda form: jnp.zeros(form.shape, form.dtype), forms)
    if is_traced(jax.tree.leaves((tree.leaves, data))):
        full = count // size * size
        stacked = jax.tree.map(lambda x: x[:full].reshape(-1, size, *x.shape[1:]), data)
        total, reports = jax.lax.scan(body, start, stacked)
        reports = [jax.tree.map(lambda x: x.reshape(full, *x.shape[2:]), reports)]
    else:
        full, total, reports = 0, start, []
    for i in range(full, count, size):
        total, found = body(total, cut(i, i + size))
        reports.append(found)
    return total[0], tree.like(total[1]), jax.tree.map(lambda *xs: jnp.concatenate(xs), *reports)


def of_many(plan: Plan, assemble: Callable[[Leaves], Any], count: int) -> Callable[..., Any]:
    """`(leaves, tasks) -> (sum of losses / count, its gradient, report)`, by all tasks at once."""
    over = lambda f: jax.vmap(f, (None, 0))
    if plan.method in ("reptile", "implicit"):

        def direct(leaves: Leaves, data: Any) -> Any:
            losses, gradients, report = over(partial(directly, plan, assemble))(leaves, data)
            return losses.sum() / count, [g.sum(0) / count for g in gradients], report

        return direct

    def total(leaves: Leaves, data: Any) -> Any:
        losses, report = over(partial(derived, plan, assemble))(leaves, data)
        return losses.sum() / count, report

    def by_gradient(leaves: Leaves, data: Any) -> Any:
        (value, report), gradient = jax.value_and_grad(total, has_aux=True)(list(leaves), data)
        return value, gradient, report

    return by_gradient


def of_one(plan: Plan, meta: Any, params: Any, data: Any, state: Any) -> Any:
    """The outer loss, its gradient in meta, and what is reported."""
    task = (*check_pair(plan.op, data, "data", ("inner_data", "outer_data")), state)
    Tree(plan.op, "params", params)
    tree = Tree(plan.op, "meta", meta)
    assemble = lambda leaves: ((params, tree.put(leaves)), (True, False))
    if plan.method == "implicit":
        value, gradient, report = directly(plan, assemble, tree.leaves, task)
    else:
        function = jax.value_and_grad(partial(derived, plan, assemble), has_aux=True)
        (value, report), gradient = function(tree.leaves, task)
    return value, tree.like(gradient), report


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
    function = scalar_function(f"{plan.op}, outer_loss", plan.losses["outer_loss"], tree, args, plan.stateful)
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
        return jax.grad(proximal_loss(plan, inner_loss, tree_at(leaves), support))(minimum)

    def loss_at(leaves: Leaves, minimum: Leaves) -> Any:
        return outer(plan, tree_at(leaves).put(minimum), query, None)[0]

    tree = tree_at(leaves)
    objective = proximal_loss(plan, inner_loss, tree, support)
    minimum = minimised(plan, objective, plan.optimizer_at(assemble(leaves)[0]), tree)
    loss, (direct, u) = jax.value_and_grad(loss_at, (0, 1))(list(leaves), minimum)
    x, residual = adjoint(plan, partial(slope, leaves), minimum, u)
    there, pull = jax.vjp(lambda leaves: slope(leaves, minimum), list(leaves))
    gradient = [a - b for a, b in zip(direct, pull(x)[0], strict=True)]
    return loss, gradient, {"loss": loss, "residual": residual, "stationarity": norm(there)}


def adjoint(plan: Plan, slope: Any, minimum: Leaves, u: Leaves) -> tuple[Leaves, Any]:
    """x with (∇² objective) x = u, and ‖(∇² objective) x - u‖/‖u‖."""
    eps = float(jnp.finfo(u[0].dtype).eps)
    system = plan.system(eps)
    product = jax.linearize(slope, minimum)[1]
    less = lambda a, b: [x - y for x, y in zip(a, b, strict=True)]
    solver = lambda residual, start: solved(system, product, u)
    x = root(lambda x: less(product(x), u), solver, **plan.linear(eps, solved))(
        [jnp.zeros_like(y) for y in u]
    )
    size, missed = norm(u), norm(less(product(x), u))
    if plan.cg_steps is None:
        small = missed <= system.rtol * size + system.atol * sum(y.size for y in u) ** 0.5
        x = complain(system, x, ~small, plan.unsolved)
    return x, jnp.where(size > 0, missed / jnp.where(size > 0, size, 1), 0)


def norm(leaves: Leaves) -> Any:
    return jnp.sqrt(sum((x**2).sum() for x in leaves))


def shapes(names: tuple[str, ...], data: Any) -> dict[str, Any]:
    """The shape of each leaf by its name; None of what is no array of numbers."""
    return {
        name + jax.tree_util.keystr(path): shape_of(leaf)
        for name, part in zip(names, data, strict=True)
        for path, leaf in jax.tree_util.tree_flatten_with_path(part)[0]
    }
