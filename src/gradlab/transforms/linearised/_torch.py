from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointError

from gradlab._typing import Function, Leaves
from gradlab.transforms.graphs._torch import Graph, NoForwardMode, recorded, replayed, requires_grad
from gradlab.transforms.repairs._torch import Level, Repair, repaired, transforming


@dataclass
class Linearised:
    """Outputs and aux of a function at a point, and the two linear maps of its derivative J there.

    `pull(us)` is Jᵀ u. `push(vs)` is J v: the transpose of the pullback, so that reverse mode alone
    serves both. Each takes `many=True` for directions stacked on a leading axis.
    """

    outputs: Leaves
    aux: Any
    pull: Callable[..., Leaves]
    transpose: Callable[[Leaves], Callable[..., Leaves]] | None = None
    forward: bool = True  # whether forward mode through f gives the same
    transposed: Callable[..., Leaves] | None = None  # made at the first push

    def push(self, vs: Leaves, many: bool = False) -> Leaves:
        if self.transposed is None:
            assert self.transpose is not None
            self.transposed = self.transpose([torch.ones_like(y) for y in self.outputs])
        return self.transposed(vs, many)


def linearise(
    f: Function, leaves: Leaves, user: Any, *, gradient: bool = False, many: bool = False
) -> Linearised:
    """Linearise `f(leaves) -> (outputs, aux)`, or with `gradient=True` the gradient of its one output.

    `user` is the caller's own function, by which what was learned of its operations is remembered;
    `many` says that the products will be of many directions at once.
    """
    if transforming():
        return _by_transforms(f, leaves, gradient, Level.ALL)
    line = _batched(f, leaves, gradient, user) if many else None
    return line or _by_graph(f, leaves, user, gradient)


def product_of_gradient(f: Function, leaves: Leaves, user: Any, vs: Leaves) -> tuple[Leaves, Any]:
    """H v and aux for one direction, after which nothing is kept."""
    if transforming():
        line = _by_transforms(f, leaves, True, Level.ALL)
        return line.pull(vs), line.aux
    graph = recorded(f, leaves, user, True)
    again = graph.attached or (torch.is_grad_enabled() and any(map(requires_grad, vs)))
    return graph.backward(vs, create_graph=again), graph.aux


def linearise_along(f: Function, leaves: Leaves, user: Any, vs: Leaves) -> tuple[Linearised, Leaves]:
    """Linearise, with J v for one tangent: by forward mode in the same run of `f` where that is right.

    Forward mode is cheaper than the transposed pullback in eager code; a result that can be
    differentiated again, and operations without forward mode, take the transposed pullback.
    """
    tangents: list[Any] = []

    def along(xs: Leaves) -> tuple[Leaves, Any]:
        outputs, aux = f([torch._make_dual(x, v, level=0) for x, v in zip(xs, vs, strict=True)])
        pairs = [torch._unpack_dual(y, level=0) for y in outputs]
        tangents[:] = [torch.zeros_like(y) if t is None else materialised(t.detach()) for y, t in pairs]
        return [y for y, _ in pairs], aux

    if not (transforming() or any(map(requires_grad, leaves)) or any(map(requires_grad, vs))):
        try:
            with forward_ad.dual_level():
                graph = recorded(along, leaves, user, False, forward=True)
            if not graph.attached:

                def pull(us: Leaves, last: bool) -> Leaves:
                    again = torch.is_grad_enabled() and any(map(requires_grad, us))
                    try:
                        return graph.backward(us, create_graph=again)
                    except CheckpointError:  # a checkpoint recomputes without the tangents, and is puzzled
                        return linearise(f, leaves, user).pull(us)

                return Linearised([y.detach() for y in graph.outputs], graph.aux, pull), tangents
        except (RuntimeError, NoForwardMode):
            pass
    line = linearise(f, leaves, user)
    return line, line.push(vs)


def pushforward(f: Function, leaves: Leaves, line: Linearised) -> Callable[..., Leaves]:
    """J v for stacked tangents: by batched forward mode on the same terms as `linearise_along`."""
    one = lambda vs: torch.func.jvp(lambda xs: f(xs)[0], (list(leaves),), (vs,))[1]

    def push(vs: Leaves, many: bool = True) -> Leaves:
        if line.forward and not transforming() and not any(map(requires_grad, line.outputs)):
            try:
                with sdpa_kernel(SDPBackend.MATH):
                    return torch.func.vmap(one)(list(vs))
            except RuntimeError:  # an operation without forward mode
                pass
        return line.push(vs, many=True)

    return push


def materialised(tensor: Any) -> Any:
    """Forward mode's symbolic zero as a tensor of zeros, which numpy and in-place operations can take."""
    zero = tensor._is_zerotensor()
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device) if zero else tensor


def over_basis(
    tree: Any, codomain: Any, apply: Callable[..., Leaves], chunk: int
) -> Iterator[tuple[int, Leaves]]:
    """A start, and the products with the unit directions from there on: a chunk at a time."""
    if tree.size == 0:
        yield 0, [x.new_zeros(0, *x.shape) for x in codomain.leaves]
    for start in range(0, tree.size, chunk):
        yield start, apply(tree.basis(start, min(start + chunk, tree.size)), many=True)


def in_chunks(apply: Callable[..., Leaves], directions: Leaves, chunk_size: int | None) -> Leaves:
    """The products with stacked directions, at most `chunk_size` of them at once."""
    k = directions[0].shape[0]
    if chunk_size is None or chunk_size >= k:
        return apply(directions, many=True)
    parts = [apply(part, many=True) for part in zip(*(d.split(chunk_size) for d in directions), strict=True)]
    return [torch.cat(leaf) for leaf in zip(*parts, strict=True)]


TENSOR = object()  # marks the place of a tensor among constants


def tensors_only(f: Callable[..., tuple[Any, Any]]) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """`f` with the tensors alone of its aux, which is all that torch.func takes, and how to restore it."""
    constants: list[Any] = []

    def of_tensors(xs: Leaves) -> tuple[Any, Any]:
        outputs, aux = f(xs)
        flat, spec = pytree.tree_flatten(aux)
        constants[:] = [spec, [TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]]
        return outputs, tuple(leaf for leaf in flat if isinstance(leaf, torch.Tensor))

    def restore(tensors: tuple[Any, ...]) -> Any:
        (spec, flat), rest = constants, iter(tensors)
        return pytree.tree_unflatten([next(rest) if leaf is TENSOR else leaf for leaf in flat], spec)

    return of_tensors, restore


def _by_transforms(f: Function, leaves: Leaves, gradient: bool, level: Level, user: Any = None) -> Linearised:
    """torch.func: reverse over reverse, right under vmap, grad, jvp and torch.compile, and batched."""
    repair = Repair(level)
    of_tensors, restore = tensors_only(repaired(f, repair))

    def first(xs: Leaves) -> tuple[Any, Any]:
        (y,), aux = of_tensors(xs)
        return y, aux

    function = torch.func.grad(first, has_aux=True) if gradient else of_tensors
    linearised: Any = torch.func.vjp(function, list(leaves), has_aux=True)
    outputs, pullback, tensors = linearised
    if level < Level.ALL and repair.names and (repair.differentiates or any(map(requires_grad, outputs))):
        return _by_transforms(f, leaves, gradient, Level.ALL, user)

    def linear(pullback: Callable[..., Any]) -> Callable[..., Leaves]:
        one = lambda us: pullback(us)[0]

        def apply(us: Leaves, many: bool = False, last: bool = False) -> Leaves:
            if not many:
                return one(list(us))
            if transforming():
                return torch.func.vmap(one)(list(us))
            try:
                products = torch.func.vmap(one)(list(us))
            except RuntimeError:  # an operation (eigh, svd, ...) whose derivative torch cannot batch
                return _looped(one, us)
            return products if _proven(user, one, us, products) else _looped(one, us)

        return apply

    pull = linear(pullback)
    transpose = lambda us: linear(torch.func.vjp(pull, us)[1])
    return Linearised(outputs, restore(tensors), pull, transpose, forward=repair.forward)


def _batched(f: Function, leaves: Leaves, gradient: bool, user: Any) -> Linearised | None:
    """The same; None where f has what torch.func does not take: an old-style autograd.Function, a while_loop."""
    try:
        return _by_transforms(f, leaves, gradient, Level.ALL if gradient else Level.TRANSFORMS, user)
    except (RuntimeError, AssertionError):  # another fault of f is raised again by its next run
        return None


_batches: WeakSet[Any] = WeakSet()  # functions whose batched products were seen to be right


def _proven(user: Any, one: Callable[[Leaves], Leaves], us: Leaves, products: Leaves) -> bool:
    """Whether a batch of products is right: once a function, by the product with a sum of its directions.

    torch's batching of some derivatives is silently wrong (cdist, as_strided_scatter).
    """
    with suppress(TypeError):  # not hashable: seen anew at every call
        if user in _batches:
            return True
    if any(map(requires_grad, products)):
        return True
    with torch.no_grad():
        k = us[0].shape[0]
        weigh = lambda leaf: torch.einsum("k...,k->...", leaf, torch.linspace(1, 2, k).to(leaf))
        for product, rows in zip(one([weigh(u) for u in us]), products, strict=True):
            largest = k * torch.linalg.vector_norm(rows, float("inf")) if rows.numel() else 0.0
            off = (weigh(rows) - product).abs() > torch.finfo(rows.dtype).eps ** 0.5 * largest
            if bool((off | (weigh(rows).isnan() != product.isnan())).any()):
                return False
    with suppress(TypeError):
        _batches.add(user)
    return True


def _looped(one: Callable[[Leaves], Leaves], us: Leaves) -> Leaves:
    rows = [one(list(row)) for row in zip(*us, strict=True)]
    return [torch.stack(leaf) for leaf in zip(*rows, strict=True)]


def _by_graph(f: Function, leaves: Leaves, user: Any, gradient: bool) -> Linearised:
    """A kept autograd graph: the fastest eager form for one direction at a time.

    Stacked directions go through torch.func, which batches them better, or else one by one: batched
    in the graph itself (is_grads_batched) they are up to half as fast, and wrong through group_norm.
    """
    replay = replayed(leaves)
    graph = recorded(f, leaves, user, gradient)
    batched = cache(lambda: replay(lambda: _batched(f, leaves, gradient, user)))

    def linear(graph: Graph, stacked: Callable[[Linearised, Leaves], Leaves]) -> Callable[..., Leaves]:
        def one(us: Leaves, last: bool = False) -> Leaves:
            again = torch.is_grad_enabled() and (graph.attached or any(map(requires_grad, us)))
            return graph.backward(us, retain_graph=again or not last, create_graph=again)

        def apply(us: Leaves, many: bool = False, last: bool = False) -> Leaves:
            if not many:
                return one(us, last)
            line = batched()
            return _looped(one, us) if line is None else stacked(line, us)

        return apply

    def transpose(us: Leaves) -> Callable[..., Leaves]:
        us = [u.requires_grad_() for u in us]
        pulled = graph.backward(us, create_graph=True)
        of_pullback = replace(graph, xs=us, outputs=pulled)
        return linear(of_pullback, lambda line, vs: line.push(vs, many=True))

    shown = graph.outputs if graph.attached or gradient else [y.detach() for y in graph.outputs]
    pull = linear(graph, lambda line, us: line.pull(us, many=True))
    return Linearised(shown, graph.aux, pull, transpose)
