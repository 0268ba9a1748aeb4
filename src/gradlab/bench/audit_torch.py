"""torch's own operations for the audit: its OpInfo samples, its modules, and what neither holds.

What f is of x is what torch's own gradient tests differentiate: the operation in its wrapper (a symmetric
matrix for eigh, a triangular one for cholesky_inverse, a fixed seed for dropout), by the inputs that are
marked as differentiable, to the outputs that are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gradlab.bench.audit import Operator
from gradlab.bench.faults_torch import EXPLAINED, FAULTS

__all__ = ["ALIASES", "EXPLAINED", "cases", "nodes"]

ALIASES = {name: fault.aliases for name, fault in FAULTS.items()}
SAMPLES = {torch.float64: 2, torch.complex128: 1}  # of each operation
LARGEST, LARGEST_MODULE = 130, 600  # entries of x
THIRD = 9  # up to so many entries third order is checked too
SEED = 0
COMPOSED = ("RNN", "GRU", "LSTM", "Attention", "Transformer")  # modules that are no function of torch.nn's


def cases() -> Iterator[Operator]:
    """Every operation that torch's own test data holds, after those it lacks."""
    for operator in chain(_others(), _opinfos(), _modules()):
        fault = FAULTS.get(operator.name)
        yield replace(operator, code=fault.code) if fault else operator


def nodes(operator: Operator) -> set[str]:
    """The names of the autograd nodes between f's outputs and x."""
    x = pytree.tree_map(lambda t: t.detach().clone().requires_grad_(_inexact(t)), operator.x)
    pending = [y.grad_fn for y in _tensors(operator.f(x)) if y.grad_fn is not None]
    found: dict[Any, str] = {}
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = type(node).__name__
            pending += [parent for parent, _ in _parents(node) if parent is not None]
    return {name for name in found.values() if "AccumulateGrad" not in name}


def _parents(node: Any) -> Any:
    try:
        return node.next_functions
    except RuntimeError:  # of control flow's nodes in torch 2.11
        return ()


def _opinfos() -> Iterator[Operator]:
    from torch.testing._internal.common_methods_invocations import op_db

    for op in op_db:
        if not op.supports_autograd:
            continue
        for dtype, count in SAMPLES.items():
            if dtype not in op.supported_backward_dtypes("cpu"):
                continue
            torch.manual_seed(SEED)
            try:
                samples = list(op.sample_inputs("cpu", dtype, requires_grad=True))
            except Exception:  # samples that need a package or a device which is not there
                continue
            usable = [found for found in (_point(sample) for sample in samples) if found is not None]
            for k in _spread(len(usable), count):
                f, x, entries = _function(op, *usable[k])
                variant = " ".join(filter(None, (op.variant_test_name, str(dtype)[6:], f"sample {k}")))
                yield Operator(_path(op.name), variant, f, x, order=3 if entries <= THIRD else 2)


def _spread(n: int, count: int) -> list[int]:
    """`count` of n numbers, from first to last."""
    return sorted({round(i * (n - 1) / max(count - 1, 1)) for i in range(count)}) if n else []


def _point(sample: Any) -> tuple[Any, Any, list[Any], list[int]] | None:
    """A sample, its leaves and which of them are differentiated; None if these are none or too many."""
    leaves, structure = pytree.tree_flatten((sample.input, list(sample.args), dict(sample.kwargs)))
    active = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    entries = sum(leaves[i].numel() for i in active)
    plain = all(leaves[i].layout == torch.strided and leaves[i].numel() for i in active)
    return (sample, structure, leaves, active) if 0 < entries <= LARGEST and plain else None


def _function(
    op: Any, sample: Any, structure: Any, leaves: list[Any], active: list[int]
) -> tuple[Callable[..., Any], Any, int]:
    """The operation as a function of the sample's differentiable inputs alone."""
    x = tuple(leaves[i].detach() for i in active)

    def called(x: Any) -> list[Any]:
        torch.default_generator.manual_seed(SEED)  # of the CPU alone, which is quick
        given = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        for i, leaf in zip(active, x, strict=True):
            given[i] = leaf.clone()  # not a leaf, which must not be written to
        first, args, kwargs = pytree.tree_unflatten(given, structure)
        return _tensors(sample.output_process_fn_grad(op.gradcheck_wrapper(op.op, first, *args, **kwargs)))

    return _differentiable(called, x), x, sum(leaf.numel() for leaf in x)


def _differentiable(called: Callable[[Any], list[Any]], x: Any) -> Callable[[Any], Any]:
    """`called` to those of its outputs that depend on x; itself where it raises, for the audit to say so."""
    try:
        which = [y.requires_grad for y in called(pytree.tree_map(lambda t: t.clone().requires_grad_(), x))]
    except Exception:
        return called
    return lambda x: tuple(y for y, wanted in zip(called(x), which, strict=True) if wanted)


def _modules() -> Iterator[Operator]:
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        if any(word in info.module_cls.__name__ for word in COMPOSED):
            for training in (True, False):
                yield from _module(info, training)


def _module(info: Any, training: bool) -> Iterator[Operator]:
    make = partial(info.module_inputs_func, info, "cpu", torch.float64, True, training)
    torch.manual_seed(SEED)
    try:
        inputs = list(make())
    except Exception:  # as above
        return
    for k in _spread(len(inputs), 1):
        try:
            built, given = inputs[k].constructor_input, inputs[k].forward_input
            module = info.module_cls(*built.args, **built.kwargs, dtype=torch.float64)
        except Exception:  # modules without a dtype have no numbers of their own
            try:
                module = info.module_cls(*built.args, **built.kwargs)
            except Exception:
                continue
        if given is None:
            continue
        module.train(training)
        operator = _by_parameters(info, module, given, f"{'train' if training else 'eval'} sample {k}")
        if operator is not None:
            yield operator


def _by_parameters(info: Any, module: Any, given: Any, variant: str) -> Operator | None:
    """The module as a function of its parameters and of the inputs that are differentiated."""
    leaves, structure = pytree.tree_flatten((given.args, given.kwargs))
    active = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    x = {
        "params": {name: p.detach() for name, p in module.named_parameters()},
        "inputs": [leaves[i].detach() for i in active],
    }
    entries = sum(leaf.numel() for leaf in pytree.tree_leaves(x))
    if not 0 < entries <= LARGEST_MODULE:
        return None
    buffers = dict(module.named_buffers())

    def called(x: Any) -> list[Any]:
        torch.manual_seed(SEED)
        inputs = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        for i, leaf in zip(active, x["inputs"], strict=True):
            inputs[i] = leaf.clone()
        args, kwargs = pytree.tree_unflatten(inputs, structure)
        state = {**x["params"], **{name: b.detach().clone() for name, b in buffers.items()}}
        return _tensors(torch.func.functional_call(module, state, args, kwargs))

    name = f"{info.module_cls.__module__.rsplit('.modules', 1)[0]}.{info.module_cls.__name__}"
    return Operator(name, variant, _differentiable(called, x), x)


def _others() -> Iterator[Operator]:
    """What torch's test data lacks, each at a small point, random where only its shape is given, and to third order."""
    random = lambda shape: torch.randn(shape, dtype=torch.float64)
    for name, variant, f, points in _OTHERS:
        torch.manual_seed(SEED)
        x = tuple(point if isinstance(point, torch.Tensor) else random(point) for point in points)
        order = 2 if name in _COMPILED else 3
        yield Operator(f"torch.{name}", variant, lambda x, f=f: f(*x), x, order=order)


def _pullback(f: Callable[..., Any], *x: Any) -> Callable[[Any], Any]:
    """The pullback of f at x as a function of its cotangent, which vmap runs for many at once."""
    return lambda u: torch.func.vjp(f, *x)[1](u)[0]


class _Cubed(torch.autograd.Function):
    """x³ with every rule that a Function can have, and its batching generated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Any) -> Any:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, u: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * u

    @staticmethod
    def jvp(ctx: Any, v: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * v


@cache
def _layer() -> Any:
    """A linear layer with weight norm."""
    return torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2, bias=False, dtype=torch.float64))


def _parametrized(g: Any, v: Any, x: Any) -> Any:
    names = ("parametrizations.weight.original0", "parametrizations.weight.original1")
    return torch.func.functional_call(_layer(), dict(zip(names, (g, v), strict=True)), (x,))


# Control flow compiles its functions when it meets them first: they are no closures.
def _thrice(i: Any, x: Any, a: Any) -> Any:
    return i < 3


def _sine_of_product(i: Any, x: Any, a: Any) -> Any:
    return i + 1, torch.sin(a * x), a.clone()


def _sine_of_sum(carry: Any, x: Any) -> Any:
    y = torch.sin(carry + x)
    return y, y.clone()


def _cosine(x: Any) -> Any:
    return x.cos()


def _sine_by_itself(x: Any) -> Any:
    return x.sin() * x


def _while_loop(a: Any) -> Any:
    from torch._higher_order_ops.while_loop import while_loop

    return while_loop(_thrice, _sine_of_product, (torch.tensor(0), torch.full_like(a, 0.9).detach(), a))[1]


def _scan(x: Any) -> Any:
    from torch._higher_order_ops.scan import scan

    return scan(_sine_of_sum, x[0], x, dim=0)[1]


def _cond(x: Any) -> Any:
    return torch.cond(x.sum() > 100, _cosine, _sine_by_itself, (x,))


_COMPILED = ("ops.higher_order.while_loop", "ops.higher_order.scan", "cond")  # a third of a second a call
_SINGULAR = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [7.0, 8.0, 9.5]], dtype=torch.float64)
_HEADS = torch.tensor([[0.3, -1.2, 0.4], [1.1, 0.2, -0.7]], dtype=torch.float64)
_OTHERS: list[tuple[str, str, Callable[..., Any], list[Any]]] = [
    ("_weight_norm", "", lambda v, g: torch._weight_norm(v, g, 0), [(2, 3), (2, 1)]),
    ("nn.utils.parametrizations.weight_norm", "", _parametrized, [(2, 1), (2, 3), (3,)]),
    ("autograd.Function", "generate_vmap_rule", _Cubed.apply, [(3,)]),
    ("cdist", "its pullback", _pullback(lambda x: torch.cdist(x, _HEADS), _HEADS + 1), [(2, 2)]),
    ("logcumsumexp", "third order", lambda x: torch.logcumsumexp(x, 0), [(4,)]),
    ("det", "third order", torch.det, [(3, 3)]),
    ("logdet", "third order", lambda x: torch.logdet(x @ x.mT), [(3, 3)]),
    ("linalg.slogdet", "third order", lambda x: torch.linalg.slogdet(x)[1], [(3, 3)]),
    ("linalg.solve", "third order", torch.linalg.solve, [(3, 3), (3,)]),
    ("linalg.inv", "third order", torch.linalg.inv, [(3, 3)]),
    ("linalg.eigvalsh", "third order", lambda x: torch.linalg.eigvalsh(x + x.mT), [(3, 3)]),
    ("linalg.svdvals", "third order", torch.linalg.svdvals, [(3, 2)]),
    ("nn.functional.layer_norm", "third order", lambda x: torch.nn.functional.layer_norm(x, (3,)), [(2, 3)]),
    (
        "nn.functional.batch_norm",
        "third order",
        lambda x: torch.nn.functional.batch_norm(x, None, None, training=True),
        [(4, 2)],
    ),
    ("nn.functional.instance_norm", "third order", torch.nn.functional.instance_norm, [(1, 2, 4)]),
    ("nn.functional.group_norm", "third order", lambda x: torch.nn.functional.group_norm(x, 2), [(1, 4, 2)]),
    ("nn.functional.rms_norm", "third order", lambda x: torch.nn.functional.rms_norm(x, (3,)), [(2, 3)]),
    ("linalg.householder_product", "third order", torch.linalg.householder_product, [(3, 2), (2,)]),
    (
        "nn.functional.scaled_dot_product_attention",
        "small",
        torch.nn.functional.scaled_dot_product_attention,
        [(1, 1, 3, 2)] * 3,
    ),
    ("linalg.det", "singular", torch.linalg.det, [_SINGULAR]),
    ("roll", "no axes", lambda x: torch.roll(x, 1), [()]),
    ("ops.higher_order.while_loop", "one carried without grad", _while_loop, [(2,)]),
    ("ops.higher_order.scan", "", _scan, [(3, 2)]),
    ("cond", "", _cond, [(3,)]),
]


def _tensors(y: Any) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves(y) if isinstance(leaf, torch.Tensor) and _inexact(leaf)]


def _inexact(leaf: Any) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def _path(name: str) -> str:
    """An OpInfo's name as its users write it: a function of torch, a method of Tensor, or an operator."""
    if name.startswith("torch."):
        return name.removesuffix(".default")
    for owner in ("torch", "torch.Tensor", "torch.ops.aten"):
        found: Any = torch
        for part in f"{owner}.{name}".split(".")[1:]:
            found = getattr(found, part, None)
        if found is not None:
            return f"{owner}.{name}"
    return name
