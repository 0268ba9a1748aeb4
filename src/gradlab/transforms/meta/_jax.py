from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradlab._errors import InputError, KindError
from gradlab._typing import Leaves
from gradlab.transforms.implicit_functions._jax import argmin, complain, held, root
from gradlab.transforms.linearised._jax import gradient_of, is_traced
from gradlab.transforms.meta.plan import Method, Plan, bilevel_plan, check_pair, segments, task_count
from gradlab.transforms.operators import check_chunk_size
from gradlab.transforms.optimizers import Optimizer
from gradlab.transforms.optimizers._jax import sgd
from gradlab.transforms.optimizers._jax_traced import is_cut_off, with_safe_roots
from gradlab.transforms.trees._jax import Tree, scalar_function, spread

UNROLLED = 5  # steps up to which a Python loop compiles quickly and runs faster than jax.lax.scan


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
    if len(flags) != len(tree.all) or not all(isinstance(flag, (bool, np.bool_)) for flag in flags):
        raise InputError(
            f"{op}: mask does not fit params; pass a tree of True (adapted) and False (held) with the structure "
            "of params or of its upper part"
        )
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
    update = with_safe_roots(optimizer.update)
    memory = arrays(plan.op, optimizer.init(tree.like(tree.leaves)))
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

    carry = tree.leaves, memory, arrays(plan.op, state)
    if plan.method == "checkpoint":
        length, count, rest = segments(plan.steps)
        part = lambda n: jax.checkpoint(lambda carry: repeated(step, carry, n, unrolled=1))
        carry = repeated(part(length), part(rest)(carry) if rest else carry, count, unrolled=1)
    else:
        carry = repeated(partial(step, free=False), carry, plan.held)
        carry = repeated(step, carry, plan.steps - plan.held)
    return carry[0], carry[2]


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


def arrays(op: str, state: Any) -> Any:
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


def over_tasks(plan: Plan, params: Any, tasks: Any, mask: Any, state: Any, chunk_size: int | None) -> Any:
    """The mean outer loss, its gradient, and what is reported of each task."""
    check_chunk_size(plan.op, chunk_size)
    data = (*check_pair(plan.op, tasks), state)
    tree = Tree(plan.op, "params", params)
    count = task_count(plan.op, shapes(("support", "query", "state"), data), "support and query")
    together = of_many(plan, lambda leaves: (tree.put(leaves), mask), count)
    start = (jnp.zeros((), tree.dtype), [jnp.zeros_like(x) for x in tree.leaves])
    add = lambda total, part: jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part)

    def body(total: Any, chunk: Any) -> Any:
        *part, report = together(tree.leaves, chunk)
        return add(total, tuple(part)), report

    size = min(chunk_size or count, count)
    if size == count:
        value, gradient, report = together(tree.leaves, data)
        return value, tree.like(gradient), report
    cut = lambda i, j: jax.tree.map(lambda x: x[i:j], data)
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
        x = complain(system, x, ~small, system.unsolved_linear)
    return x, jnp.where(size > 0, missed / jnp.where(size > 0, size, 1), 0)


def norm(leaves: Leaves) -> Any:
    return jnp.sqrt(sum((x**2).sum() for x in leaves))


def shapes(names: tuple[str, ...], data: Any) -> dict[str, Any]:
    """The shape of each leaf by its name; None of what is no array."""
    return {
        name + jax.tree_util.keystr(path): getattr(leaf, "shape", None)
        for name, part in zip(names, data, strict=True)
        for path, leaf in jax.tree_util.tree_flatten_with_path(part)[0]
    }
