"""One call of a rule in torch: its arguments and outputs as tensors, and its two linear maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch._functorch.autograd_function import _add_batch_dim, unwrap_batched
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.utils import _pytree as pytree

from gradlab._errors import InputError, KindError, StrategyError
from gradlab.transforms.custom_rules._torch_levels import base, concrete, is_inexact, tracked, transforming
from gradlab.transforms.custom_rules.declared import Declared
from gradlab.transforms.trees._torch import flatten, unflatten

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
CLOSED = "closes over a tensor that is being differentiated, and its rule does not know of it"


class Call:
    """One call of a rule: its arguments, as tensors and the rest, which is held constant; then its output.

    `value(xs)` are the float outputs and the kept residuals; `pull` is Jᵀ u and `push` J v at given xs,
    kept residuals and outputs ys.
    """

    by_output = False  # whether a residual is an output

    def __init__(self, rule: Any, args: tuple[Any, ...]):
        self.rule = rule
        self.static, moving = rule.split(args)
        self.count = len(moving)
        leaves, self.spec = flatten(moving)
        if PLAIN.issuperset(map(type, leaves)):
            self.places: Sequence[int] = range(len(leaves))
            self.arrays: Sequence[Any] = leaves
            self.constants = [None] * len(leaves)
        else:
            self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
            self.arrays = [leaves[i] for i in self.places]
            self.constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.width = len(self.arrays)

    def value(self, xs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        raise NotImplementedError

    def pull(self, xs: Any, kept: Any, ys: Any, us: Any) -> list[Any]:
        raise NotImplementedError

    def push(self, xs: Any, kept: Any, ys: Any, ts: Any) -> Sequence[Any]:
        raise NotImplementedError

    def ruled_output(self, xs: Sequence[Any]) -> Any:
        """f's output as the rule has it."""
        raise NotImplementedError

    def exercise(self, xs: Sequence[Any]) -> None:
        """Run the rule once, which raises what is wrong with its form."""
        raise NotImplementedError

    def taken(self) -> Sequence[Any]:
        """The tensors, of which a recorded graph may hold no second copy in this object."""
        arrays, self.arrays = self.arrays, ()
        return arrays

    def put(self, xs: Sequence[Any]) -> tuple[Any, ...]:
        """All arguments, with `xs` for the tensors."""
        return self.rule.joined(self.static, self.filled(self.constants, xs))

    def filled(self, around: Sequence[Any], some: Sequence[Any]) -> tuple[Any, ...]:
        if len(some) == len(around):
            return unflatten(self.spec, some)
        filled = list(around)
        for i, x in zip(self.places, some, strict=True):
            filled[i] = x
        return unflatten(self.spec, filled)

    def keep_output(self, out: Any) -> list[Any]:
        """The float tensors of f's output; the rest is remembered as it stands."""
        leaves, self.out_spec = flatten(out)
        self.out_places = [i for i, y in enumerate(leaves) if is_inexact(y)]
        self.height = len(self.out_places)
        ys = [leaves[i] for i in self.out_places]
        self.around = leaves  # float tensors there would hold their own graph
        for i in self.out_places:
            leaves[i] = None
        return ys

    def output(self, ys: Sequence[Any], others: bool = True) -> Any:
        """A tree like f's output, with `ys` for its float tensors, and the others as they are, or None."""
        if len(ys) == len(self.around):
            return unflatten(self.out_spec, ys)
        filled = list(self.around) if others else [None] * len(self.around)
        for i, y in zip(self.out_places, ys, strict=True):
            filled[i] = y
        return unflatten(self.out_spec, filled)

    def structure(self) -> Any:
        """Of f's output."""
        return pytree.tree_structure(unflatten(self.out_spec, self.around))

    def plain(self) -> Any:
        """f where no argument is differentiated."""
        out = self.rule.f(*self.put(self.arrays))
        if any(map(tracked, self.keep_output(out))) and not any(map(tracked, self.arrays)):
            raise self.rule.refused(CLOSED)
        return out

    def batched(self) -> Any:
        """f by its batched form, at the innermost vmap that meets an argument."""
        if not torch._C._are_functorch_transforms_active():
            return self.rule.f(*self.put(self.arrays))
        interpreter: Any = retrieve_current_functorch_interpreter()
        xs, dims = unwrap_batched(tuple(self.arrays), interpreter.level())
        with interpreter.lower():
            if all(d is None for d in dims):
                return self.rule(*self.put(self.arrays))
            (rule,) = self.rule.definitions["defvmap"]
            xs = [x if d is None else x.movedim(d, 0) for x, d in zip(xs, dims, strict=True)]
            flags = self.filled([False] * len(self.constants), [d is not None for d in dims])
            flags = self.rule.joined((False,) * len(self.static), flags)
            out, batched = self.checked_batch(
                rule(interpreter.batch_size(), flags, *self.put(xs)), interpreter.batch_size()
            )
        wrap = lambda y, b: _add_batch_dim(y, 0, interpreter.level()) if b else y
        return pytree.tree_map(wrap, out, batched)

    def checked_batch(self, result: Any, size: int) -> Any:
        """What the batched form returned, if that is (out, out_batched) of so many examples."""
        op, name = self.rule.op, self.rule.name
        if not isinstance(result, tuple) or len(result) != 2:
            raise InputError(
                f"{op}: the batched form of {name} returned a {type(result).__name__}; return (out, out_batched)"
            )
        out, batched = result
        if isinstance(batched, bool):
            batched = pytree.tree_map(lambda _: batched, out)
        for y, mapped in zip(pytree.tree_leaves(out), pytree.tree_leaves(batched), strict=True):
            if mapped and (not isinstance(y, torch.Tensor) or y.ndim == 0 or y.shape[0] != size):
                raise InputError(
                    f"{op}: the batched form of {name} returned shape {tuple(getattr(y, 'shape', ()))} for {size} "
                    "examples; return them on the leading axis"
                )
        return out, batched

    def name(self, i: int) -> str:
        """Of tensor number i among the arguments, as in x['w']."""
        paths = pytree.tree_flatten_with_path(self.filled(self.constants, [0.0] * self.width))[0]
        path: Any = paths[self.places[i]][0]
        (first, *rest) = path
        return self.rule.argument(first.idx) + pytree.keystr(tuple(rest))


class Pulled(Call):
    """A call with a rule for cotangents."""

    def value(self, xs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        out, residuals = self.run(xs)
        ys = self.keep_output(out)
        leaves, self.residual_spec = flatten(residuals)
        own = {id(y): ("output", j) for j, y in enumerate(ys)}
        own.update({id(x): ("argument", i) for i, x in enumerate(xs)})
        kept: list[Any] = []
        self.sources: list[tuple[str, Any]] = []
        for leaf in leaves:
            source = own.get(id(leaf))
            if source is None:
                source = ("constant", leaf)
                if isinstance(leaf, torch.Tensor):
                    source = ("kept", len(kept))
                    kept.append(leaf)
            elif source[0] == "output":
                self.by_output = True
            self.sources.append(source)
        return ys, kept

    def run(self, xs: Sequence[Any]) -> tuple[Any, Any]:
        """fwd."""
        rule = self.rule
        fwd, _ = rule.definitions["defvjp"]
        result = fwd(*self.put(xs))
        if not isinstance(result, tuple) or len(result) != 2:
            raise InputError(
                f"{rule.op}: fwd of {rule.name} returned a {type(result).__name__}; return (out, residuals)"
            )
        return result

    def ruled_output(self, xs: Sequence[Any]) -> Any:
        return self.run(xs)[0]

    def exercise(self, xs: Sequence[Any]) -> None:
        ys, kept = self.value(xs)
        self.pull(xs, kept, ys, [torch.ones_like(y) for y in ys])

    def pull(self, xs: Any, kept: Any, ys: Any, us: Any) -> list[Any]:
        """bwd. Residuals that fwd computed are computed again where they can be differentiated."""
        if kept and torch.is_grad_enabled():
            kept = self.computed(xs)
        return self.cotangents(xs, self.residuals(xs, kept, ys), us)

    def push(self, xs: Any, kept: Any, ys: Any, ts: Any) -> Sequence[Any]:
        """bwd transposed."""
        residuals = self.residuals(xs, self.computed(xs) if kept else kept, ys)
        live = [i for i, t in enumerate(ts) if t is not None and is_inexact(xs[i])]

        def pulled(us: list[Any]) -> list[Any]:
            cts = self.cotangents(xs, residuals, us)
            return [torch.zeros_like(xs[i]) if cts[i] is None else cts[i] for i in live]

        return transposed(self.rule, "bwd", pulled, ys, [ts[i] for i in live])

    def computed(self, xs: Any) -> list[Any]:
        """The kept residuals, with their derivatives."""
        leaves, _ = flatten(self.run(xs)[1])
        return [leaf for leaf, (kind, _) in zip(leaves, self.sources, strict=True) if kind == "kept"]

    def residuals(self, xs: Any, kept: Any, ys: Any) -> Any:
        found = {"argument": xs, "output": ys, "kept": kept}
        leaves = [where if kind == "constant" else found[kind][where] for kind, where in self.sources]
        return unflatten(self.residual_spec, leaves)

    def cotangents(self, xs: Any, residuals: Any, us: Any) -> list[Any]:
        """What bwd gives for each tensor, if it fits; None for zero."""
        rule, n = self.rule, self.count
        _, bwd = rule.definitions["defvjp"]
        given = bwd(*self.static, residuals, self.output(us, others=False))
        if not isinstance(given, (tuple, list)) or len(given) != n:
            count = (
                len(given)
                if isinstance(given, (tuple, list))
                else f"a {type(given).__name__}, not a tuple, of"
            )
            raise InputError(
                f"{rule.op}: bwd of {rule.name} returned {count} cotangents for {n} arguments; "
                "return a tuple of one for each argument that is not static, None for zero"
            )
        flat = given if self.spec == (tuple, n) else self.matched(given)
        cts = list(flat) if self.width == len(flat) else [flat[i] for i in self.places]
        for i, ct in enumerate(cts):
            x = xs[i]
            if type(ct) is torch.Tensor and ct.dtype is x.dtype and ct.shape == x.shape:
                continue
            if not is_inexact(x):
                cts[i] = None
            elif ct is not None:
                refuse_misfit(rule, "bwd", "cotangent", ct, self.name(i), x)
        return cts

    def matched(self, given: Any) -> list[Any]:
        """The leaves of all cotangents, one for each leaf of the arguments; None stands for a tree of zeros."""
        flat: list[Any] = []
        args = self.filled(self.constants, [0.0] * self.width)
        for i, (ct, arg) in enumerate(zip(given, args, strict=True)):
            parts = _parts(ct, arg)
            if parts is None:
                raise InputError(
                    f"{self.rule.op}: bwd of {self.rule.name} returned a cotangent of structure "
                    f"{pytree.tree_structure(ct)} for {self.rule.argument(i)}, which has {pytree.tree_structure(arg)}; "
                    "return one like it, or None"
                )
            flat += parts
        return flat


def _parts(ct: Any, arg: Any) -> list[Any] | None:
    """The leaves of a cotangent, one for each of its argument, where None stands for a subtree of zeros."""
    if ct is None:
        return [None] * len(pytree.tree_leaves(arg))
    (children, spec), (cts, given) = _one_level(arg), _one_level(ct)
    if isinstance(arg, dict) and isinstance(ct, dict) and set(arg) == set(ct):
        cts = [ct[key] for key in arg]
    elif spec != given:
        return None
    elif len(children) == 1 and children[0] is arg:
        return [ct]
    parts = [_parts(*pair) for pair in zip(cts, children, strict=True)]
    return None if any(part is None for part in parts) else list(chain.from_iterable(parts))  # type: ignore[arg-type]


def _one_level(tree: Any) -> tuple[list[Any], Any]:
    return pytree.tree_flatten(tree, is_leaf=lambda node: node is not tree)


class Pushed(Call):
    """A call with a rule for tangents."""

    def value(self, xs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        ys = self.keep_output(self.rule.f(*self.put(xs)))
        return ys, []

    def ruled_output(self, xs: Sequence[Any]) -> Any:
        return self.run(xs, [None] * self.width)[0]

    def exercise(self, xs: Sequence[Any]) -> None:
        ys, kept = self.value(xs)
        self.push(xs, kept, ys, [torch.ones_like(x) if is_inexact(x) else None for x in xs])

    def pull(self, xs: Any, kept: Any, ys: Any, us: Any) -> list[Any]:
        """The rule transposed."""
        live = [i for i, x in enumerate(xs) if is_inexact(x)]

        def pushed(ts: list[Any]) -> list[Any]:
            tangents = [None] * len(xs)
            for i, t in zip(live, ts, strict=True):
                tangents[i] = t
            return self.push(xs, kept, ys, tangents)

        cts: list[Any] = [None] * len(xs)
        moved = transposed(self.rule, "the rule", pushed, [xs[i] for i in live], us)
        for i, ct in zip(live, moved, strict=True):
            cts[i] = ct
        return cts

    def push(self, xs: Any, kept: Any, ys: Any, ts: Any) -> list[Any]:
        """The rule's tangent, if it fits."""
        rule = self.rule
        out, tangent = self.run(xs, ts)
        (values, given), (moved, spec) = pytree.tree_flatten(out), pytree.tree_flatten(tangent)
        if given != spec or given != self.structure():
            raise InputError(
                f"{rule.op}: the rule of {rule.name} returned out of structure {given} and a tangent of {spec}, "
                f"{rule.name} has {self.structure()}; return both like the output of {rule.name}"
            )
        moved, values = [moved[i] for i in self.out_places], [values[i] for i in self.out_places]
        for i, t, y in zip(self.out_places, moved, values, strict=True):
            refuse_misfit(rule, "the rule", "tangent", t, f"output {i}", y)
        return moved

    def run(self, xs: Any, ts: Any) -> tuple[Any, Any]:
        """The rule, with zeros where nothing moves."""
        rule = self.rule
        (function,) = rule.definitions["defjvp"]
        like = zip(xs, ts, strict=True)
        ts = [torch.zeros_like(x) if t is None and is_inexact(x) else t for x, t in like]
        _, primals = rule.split(self.put(xs))
        result = function(*self.static, primals, self.filled([None] * len(self.constants), ts))
        if not isinstance(result, tuple) or len(result) != 2:
            raise InputError(
                f"{rule.op}: the rule of {rule.name} returned a {type(result).__name__}; return (out, tangent)"
            )
        return result


def transposed(
    rule: Any, who: str, linear: Callable[..., Any], like: Sequence[Any], at: Any
) -> Sequence[Any]:
    """The transpose at `at` of a linear map of tensors like these: its pullback, taken at ones."""
    ones = [torch.ones_like(y) for y in like]
    if transforming():
        pulled: Any = torch.func.vjp(linear, ones)
        values, result = pulled[0], pulled[1](list(at))[0]
    else:  # the same, faster
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            values = linear([one.requires_grad_() for one in ones])
            moved = [(v, u) for v, u in zip(values, at, strict=True) if v.requires_grad]
            outputs, us = zip(*moved, strict=True) if moved else ((), ())
            result = torch.autograd.grad(outputs, ones, us, create_graph=again, materialize_grads=True)
    if not rule.proven_linear and concrete((*values, *result)):
        refuse_nonlinear(rule, who, linear, values, at, result)
    return result


def refuse_nonlinear(
    rule: Any, who: str, linear: Callable[..., Any], values: Any, at: Any, result: Any
) -> None:
    """Refuse a map L that is not linear, once it shows.

    L(1)·t = 1·Lᵀt, and L(a 1 + b r) = a L(1) + b L(r) for a negative a, a small and a large b, or it is not.
    """
    total = lambda tensors: float(sum(base(t).double().sum() for t in tensors))
    size = lambda tensors: total([t.abs() for t in tensors])
    with torch.no_grad():
        there = [(v * t).detach() for v, t in zip(values, at, strict=True)]
        back = [r.detach() for r in result]
        ones = [torch.ones_like(r) for r in result]
        ramp = [torch.linspace(-1.3, 1.7, r.numel()).to(r).reshape(r.shape) for r in result]
        off = abs(total(there) - total(back)) / (size((*there, *back)) or 1.0)
        one, along = linear(ones), linear(ramp)
        for a, b in ((-1.0, 0.0), (1.0, 1e-4), (1.0, 1e4)):
            mixed = lambda xs, ys: [a * x + b * y for x, y in zip(xs, ys, strict=True)]
            found = mixed(one, along)
            unlike = [y - z for y, z in zip(linear(mixed(ones, ramp)), found, strict=True)]
            off += size(unlike) / (size(found) or 1.0)
    if off > max(torch.finfo(t.dtype).eps for t in (*there, *back)) ** 0.5:
        name = "its cotangent" if who == "bwd" else "its tangents"
        raise StrategyError(
            f"{rule.op}: {who} of {rule.name} is not linear in {name}, so it has no transpose; "
            f"return what is linear, or use {'reverse' if who == 'bwd' else 'forward'} mode alone"
        )
    rule.proven_linear = size((*there, *back)) > 0


def refuse_misfit(rule: Declared, who: str, kind: str, given: Any, name: str, like: Any) -> None:
    """Refuse a cotangent or tangent of another kind, shape or dtype."""
    if not isinstance(given, torch.Tensor):
        raise KindError(
            f"{rule.op}: {who} of {rule.name} returned a {type(given).__name__} as {kind} for {name}; "
            "return a tensor" + (", or None for zero" if kind == "cotangent" else "")
        )
    if given.shape != like.shape:
        raise InputError(
            f"{rule.op}: {who} of {rule.name} returned a {kind} of shape {tuple(given.shape)} for {name}, "
            f"which has shape {tuple(like.shape)}; return one of that shape"
        )
    if given.dtype != like.dtype:
        raise KindError(
            f"{rule.op}: {who} of {rule.name} returned a {kind} of dtype {given.dtype} for {name}, "
            f"which has dtype {like.dtype}; convert it with .to"
        )


def refuse_unlike(rule: Declared, out: Any, like: Any, values: bool = False) -> None:
    """Refuse an output of a rule that is not that of f in structure, shape and dtype, or in its numbers too."""
    (ys, given), (forms, spec) = pytree.tree_flatten(out), pytree.tree_flatten(like)
    if given != spec:
        raise InputError(
            f"{rule.op}: the rule of {rule.name} returned an output of structure {given}, {rule.name} has {spec}; "
            "return the same"
        )
    for i, (y, form) in enumerate(zip(ys, forms, strict=True)):
        if not is_inexact(form):
            continue
        if not isinstance(y, torch.Tensor) or (y.shape, y.dtype) != (form.shape, form.dtype):
            raise InputError(
                f"{rule.op}: the rule of {rule.name} returned output {i} of shape "
                f"{tuple(getattr(y, 'shape', ()))} and dtype {getattr(y, 'dtype', type(y).__name__)}, {rule.name} "
                f"has {tuple(form.shape)} and {form.dtype}; return the same"
            )
        tolerance = torch.finfo(y.dtype).eps ** 0.5
        if values and not torch.allclose(y, form, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise InputError(
                f"{rule.op}: the rule of {rule.name} returned output {i} with other numbers than {rule.name}; "
                "return the same"
            )
