from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from gradlab._errors import InputError
from gradlab._typing import Leaves
from gradlab.transforms.custom_rules._torch_levels import differentiating
from gradlab.transforms.graphs._torch import remember
from gradlab.transforms.implicit_functions._torch import held
from gradlab.transforms.implicit_functions._torch_levels import complain, unrecorded
from gradlab.transforms.implicit_functions._torch_linear import cg
from gradlab.transforms.linearised._torch import linearise
from gradlab.transforms.meta._torch_steps import TorchPlan, adapted_by, chosen, minimised, proximal_loss
from gradlab.transforms.meta.plan import Method, Plan, bilevel_plan, check_pair, shape_of, task_count
from gradlab.transforms.operators import check_chunk_size
from gradlab.transforms.optimizers._torch import sgd
from gradlab.transforms.repairs._torch import Level, repaired
from gradlab.transforms.trees._torch import Tree, as_tensors, scalar_function


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
    plan = TorchPlan("adapt", losses, optimizer, steps, method, last, proximal, cg_steps, state is not None)
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
    plan = TorchPlan(
        "meta_grad", losses, optimizer, steps, method, last, proximal, cg_steps, state is not None
    )
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
    plan = TorchPlan(op, losses, optimizer, steps, method, last, proximal, cg_steps, state is not None)
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
    plan = TorchPlan("maml_grad", losses, sgd(inner_lr), steps, method)
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
    plan = bilevel_plan(TorchPlan, "bilevel_grad", inner_loss, outer_loss, *how)
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
    plan = bilevel_plan(TorchPlan, "bilevel_value_and_grad", inner_loss, outer_loss, *how)
    found = of_one(plan, meta, params, data, state)
    return found if report else found[:2]


def over_tasks(plan: Plan, params: Any, tasks: Any, mask: Any, state: Any, chunk_size: int | None) -> Any:
    """The mean outer loss, its gradient, and what is reported of each task."""
    check_chunk_size(plan.op, chunk_size)
    data = (*check_pair(plan.op, tasks), state)
    tree = Tree(plan.op, "params", params)
    count = task_count(plan.op, shapes(("support", "query", "state"), data), "support and query")
    data = (*map(as_tensors, data[:2]), *as_tensors((state,)))
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
        many = torch.func.vmap(lambda *task: f(leaves, task), (0, 0, 0 if plan.stateful else None))
        if is_compiling():
            return many(*data)
        try:
            return many(*data)
        except RuntimeError as error:
            explain(plan.op, error)
            raise

    def direct(leaves: Leaves, data: Any) -> Any:
        losses, gradients, report = over(partial(directly, plan, assemble), leaves, data)
        return losses.sum() / count, [g.sum(0) / count for g in gradients], report

    def total(data: Any, leaves: Leaves) -> Any:
        losses, report = over(partial(derived, plan, assemble), leaves, data)
        return [losses.sum() / count], report

    return by_method(plan, direct, total, partial(over, partial(at_start, plan, assemble)))


def explain(op: str, error: RuntimeError) -> None:
    """What torch.func.vmap means, in the words of tasks."""
    if "called random operation" in str(error):
        raise InputError(
            f"{op}: a loss draws random numbers, and each task needs its own; draw them outside, and pass them as "
            "data of the tasks or as state (masks of dropout)"
        ) from error
    if "Batch norm got a batched tensor" in str(error):
        raise InputError(
            f"{op}: a loss changes the running statistics of a batch norm in place, and each task needs its own; pass "
            "them as state, or call model.eval()"
        ) from error


def by_method(
    plan: Plan, direct: Callable[..., Any], total: Callable[..., Any], probe: Callable[..., Any]
) -> Callable[..., Any]:
    """`(leaves, data) -> (value, gradient, report)`, directly or as the gradient of `total(data, leaves)`.

    The implicit method's direct gradient is a number. Where it is differentiated again, it is taken through `adapt`;
    `probe(leaves, data)` are losses, whose graph shows the tensors that they close over.
    """

    def run(leaves: Leaves, data: Any) -> Any:
        if plan.method == "reptile":
            return direct(leaves, data)
        if plan.method == "implicit":
            tensors = [x for x in pytree.tree_leaves(data) if isinstance(x, torch.Tensor)]
            again = differentiating([*leaves, *tensors])
            again = again or (torch.is_grad_enabled() and probe(held(list(leaves)), held(data)).requires_grad)
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
    Tree(plan.op, "params", params)
    tree = Tree(plan.op, "meta", meta)
    assemble = lambda leaves: ((params, tree.put(leaves)), (True, False))

    def total(task: Any, leaves: Leaves) -> Any:
        loss, report = derived(plan, assemble, leaves, task)
        return [loss], report

    start = partial(at_start, plan, assemble)
    found = by_method(plan, partial(directly, plan, assemble), total, start)(tree.leaves, task)
    return found[0], tree.like(found[1]), found[2]


def at_start(plan: Plan, assemble: Callable[[Leaves], Any], leaves: Leaves, task: Any) -> Any:
    """The inner and the outer loss of one task, summed, before any step."""
    params, mask = assemble(leaves)
    tree = chosen(plan.op, params, mask)
    return (
        proximal_loss(plan, plan.losses["inner_loss"], tree, task[0])(tree.leaves)
        + outer(plan, params, task[1], None)[0]
    )


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
        complain(system, ~small, plan.unsolved)
    return tree.split(x), torch.where(size > 0, missed / torch.where(size > 0, size, 1), 0)


def norm(leaves: Leaves) -> Any:
    return sum((x**2).sum() for x in leaves).sqrt()


def shapes(names: tuple[str, ...], data: Any) -> dict[str, Any]:
    """The shape of each leaf by its name; None of what is no tensor or array of numbers."""
    return {
        name + pytree.keystr(path): shape_of(leaf)
        for name, part in zip(names, data, strict=True)
        for path, leaf in pytree.tree_flatten_with_path(part)[0]
        if part is not None
    }
