"""Each operation in torch against the same thing written by hand, eager and compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import gradlab
import gradlab.torch as gl
from gradlab.bench import _suite_solutions_torch
from gradlab.bench import _torch as functions
from gradlab.bench.problems import MEASURED
from gradlab.bench.suite import EXAMPLES, Case, Cell

grad, jvp, vjp, vmap = torch.func.grad, torch.func.jvp, torch.func.vjp, torch.func.vmap


class Setup:
    """A problem on the device: its loss and model as functions of the parameters, and directions."""

    def __init__(self, name: str, dtype: str, device: str):
        problem = MEASURED[name]()
        params, inputs, targets = functions.arrays(
            (problem.params, problem.inputs, problem.targets), dtype, device
        )
        loss, model = functions.loss(problem), functions.model(problem)
        self.name, self.params, self.keys = name, params, list(params)
        self.loss = lambda p: loss(p, inputs, targets)
        self.loss_of, self.examples = loss, (inputs[:EXAMPLES], targets[:EXAMPLES])
        self.model = lambda p: model(p, inputs)
        self.outer = lambda y: functions.outer(y, targets)
        self.flops = 0
        draw = torch.Generator(device=device).manual_seed(0)
        self.directions = lambda k: {
            n: torch.randn(*k, *p.shape, generator=draw, dtype=p.dtype, device=device)
            for n, p in params.items()
        }
        self.v = self.directions(())

    def hand(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """What a user must write around attention: its fused kernel has no second derivative."""
        if "transformer" not in self.name:
            return f

        def math(*args: Any) -> Any:
            with sdpa_kernel(SDPBackend.MATH):
                return f(*args)

        return math

    def fresh(self) -> list[Any]:
        return [p.detach().requires_grad_() for p in self.params.values()]

    def named(self, leaves: Any) -> dict[str, Any]:
        return dict(zip(self.keys, leaves, strict=True))


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of the whole function, or nothing on a CPU without a C++ compiler."""
    return torch.compile(f, fullgraph=True)


def cells(names: list[str], dtype: str, device: str) -> Iterator[Cell]:
    """Every case on every problem asked for; a problem is set up at its first."""

    @lru_cache(maxsize=1)
    def setup(name: str) -> Setup:
        torch._dynamo.reset()
        return Setup(name, dtype, device)

    on = lambda name, make: lambda: make(setup(name))
    lacks = (
        "torch.compile needs a C++ compiler (g++) on a CPU"
        if device == "cpu" and not shutil.which("g++")
        else ""
    )
    for name in names:
        if name == "solutions":
            yield from _suite_solutions_torch.cells(dtype, device)
            continue
        for operation, mode, make in DENSE if name == "mlp_500" else PRODUCTS:
            why = lacks if mode == "compiled" else ""
            if name == "transformer_128" and operation.startswith("matmat") and mode == "compiled":
                why = why or "minutes to compile"
            yield Cell(name, operation, mode, on(name, make), why)


def _gradient(s: Setup) -> Callable[[], Any]:
    def gradient() -> Any:
        xs = s.fresh()
        return torch.autograd.grad(s.loss(s.named(xs)), xs)

    return gradient


def _double_backward(s: Setup) -> Callable[[], Any]:
    loss = s.hand(s.loss)

    def product() -> Any:
        xs = s.fresh()
        g = torch.autograd.grad(loss(s.named(xs)), xs, create_graph=True)
        return s.named(torch.autograd.grad(g, xs, list(s.v.values())))

    return product


def _hvp(s: Setup) -> Case:
    loss, keys = s.hand(s.loss), s.keys
    leaves, tangents = tuple(s.params.values()), tuple(s.v.values())
    by_leaves = lambda *xs: loss(dict(zip(keys, xs, strict=True)))
    hand = {
        "double backward": _double_backward(s),
        "jvp(grad)": lambda: jvp(grad(loss), (s.params,), (s.v,))[1],
        "vjp(grad)": lambda: vjp(grad(loss), s.params)[1](s.v)[0],
        "functional.vhp": lambda: s.named(torch.autograd.functional.vhp(by_leaves, leaves, tangents)[1]),
    }
    return Case(lambda: gradlab.hvp(s.loss, s.params, s.v), hand, _gradient(s))


def _hvp_compiled(s: Setup) -> Case:
    loss = s.hand(s.loss)
    ours = compiled(lambda p, v: gl.hvp(s.loss, p, v))
    reverse = compiled(lambda p, v: vjp(grad(loss), p)[1](v)[0])
    forward = compiled(lambda p, v: jvp(grad(loss), (p,), (v,))[1])
    gradient = compiled(lambda p: grad(loss)(p))
    hand = {"vjp(grad)": lambda: reverse(s.params, s.v), "jvp(grad)": lambda: forward(s.params, s.v)}
    case = Case(lambda: ours(s.params, s.v), hand, lambda: gradient(s.params))
    case.trusted = _double_backward(s)
    return case


def _kept_graph(s: Setup) -> tuple[Any, Any]:
    xs = s.fresh()
    return xs, torch.autograd.grad(s.hand(s.loss)(s.named(xs)), xs, create_graph=True)


def _linearised(s: Setup) -> Case:
    H = gradlab.hessian_operator(s.loss, s.params)
    xs, g = _kept_graph(s)
    hand = {
        "double backward, graph kept": lambda: s.named(
            torch.autograd.grad(g, xs, list(s.v.values()), retain_graph=True)
        )
    }
    return Case(lambda: H @ s.v, hand, _gradient(s))


def _many(s: Setup, k: int) -> Case:
    loss, V = s.hand(s.loss), s.directions((k,))
    H = gradlab.hessian_operator(s.loss, s.params)
    xs, g = _kept_graph(s)
    rows = [[t[i] for t in V.values()] for i in range(k)]
    pullback = vjp(grad(loss), s.params)[1]

    def loop() -> Any:
        products = [torch.autograd.grad(g, xs, row, retain_graph=True) for row in rows]
        return s.named([torch.stack(leaf) for leaf in zip(*products, strict=True)])

    hand = {
        "graph kept, loop": loop,
        "graph kept, batched": lambda: s.named(
            torch.autograd.grad(g, xs, list(V.values()), retain_graph=True, is_grads_batched=True)
        ),
        "vmap(vjp(grad))": lambda: vmap(lambda v: pullback(v)[0])(V),
    }
    return Case(lambda: H.matmat(V), hand, _gradient(s), units=k)


def _many_compiled(s: Setup, k: int) -> Case:
    loss, V = s.hand(s.loss), s.directions((k,))

    def by_hand(p: Any, V: Any) -> Any:
        pullback = vjp(grad(loss), p)[1]
        return vmap(lambda v: pullback(v)[0])(V)

    ours = compiled(lambda p, V: gl.hessian_operator(s.loss, p).matmat(V))
    theirs = compiled(by_hand)
    gradient = compiled(lambda p: grad(loss)(p))
    hand = {"vmap(vjp(grad))": lambda: theirs(s.params, V)}
    return Case(lambda: ours(s.params, V), hand, lambda: gradient(s.params), units=k)


def _gauss_newton(s: Setup) -> Case:
    model = s.hand(s.model)

    def curved(y: Any, tangent: Any) -> Any:
        y = y.detach().requires_grad_()
        (g,) = torch.autograd.grad(s.outer(y), y, create_graph=True)
        return torch.autograd.grad(g, y, tangent)[0]

    def dual() -> Any:
        xs = s.fresh()
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, v) for x, v in zip(xs, s.v.values(), strict=True)]
            y, tangent = forward_ad.unpack_dual(model(s.named(duals)))
        return s.named(torch.autograd.grad(y, xs, curved(y, tangent.detach())))

    def transforms() -> Any:
        y, tangent, *_ = jvp(model, (s.params,), (s.v,))
        return vjp(model, s.params)[1](vjp(grad(s.outer), y)[1](tangent)[0])[0]

    hand = {"dual numbers and backward": dual, "jvp, vjp": transforms}
    return Case(lambda: gradlab.ggn_vp(s.model, s.outer, s.params, s.v), hand, _gradient(s))


def _per_example(s: Setup, operation: str) -> Case:
    loss = s.hand(s.loss_of)
    one = lambda p, *example: loss(p, *(a[None] for a in example))
    each = lambda: vmap(grad(one), (None, 0, 0))(s.params, *s.examples)
    norms = lambda gs: sum(g.flatten(1).square().sum(1) for g in gs.values()).sqrt()

    def clipped() -> Any:
        gs = each()
        c = (1 / norms(gs)).clamp(max=1)
        return {name: torch.tensordot(c, g, 1) for name, g in gs.items()}

    def gradient() -> Any:
        xs = s.fresh()
        return torch.autograd.grad(s.loss_of(s.named(xs), *s.examples), xs)

    of = lambda f, **o: lambda: f(s.loss_of, s.params, *s.examples, keep_batch_axis=True, **o)
    ours, hand = {
        "per_example_grads": (of(gl.per_example_grads), each),
        "per_example_norms": (of(gl.per_example_norms), lambda: norms(each())),
        "clipped_grad": (of(lambda *a, **o: gl.clipped_grad(*a, max_norm=1.0, **o)[0]), clipped),
    }[operation]
    return Case(ours, {"vmap(grad)": hand}, gradient)


def _dense(s: Setup, diagonal: bool) -> Case:
    shapes = [p.shape for p in s.params.values()]
    sizes = [p.numel() for p in s.params.values()]
    flat = torch.cat([p.reshape(-1) for p in s.params.values()])

    def loss(z: Any) -> Any:
        return s.loss(s.named([part.view(shape) for part, shape in zip(z.split(sizes), shapes, strict=True)]))

    def loop() -> Any:
        z = flat.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(z), z, create_graph=True)
        return torch.stack([torch.autograd.grad(gi, z, retain_graph=True)[0] for gi in g])

    hand = {
        "jacrev(grad)": lambda: torch.func.jacrev(grad(loss))(flat),
        "func.hessian": lambda: torch.func.hessian(loss)(flat),
        "double backward, loop": loop,
    }
    unit = lambda: grad(loss)(flat)
    if not diagonal:
        return Case(lambda: gradlab.hessian(loss, flat), hand, unit)
    diagonals = {name: lambda f=f: f().diagonal() for name, f in hand.items()}
    return Case(lambda: gradlab.hessian_diagonal(loss, flat), diagonals, unit)


def _jacobian(s: Setup, outputs: int) -> Case:
    sizes, shapes = [p.numel() for p in s.params.values()], [p.shape for p in s.params.values()]
    flat = torch.cat([p.reshape(-1) for p in s.params.values()])
    split = lambda z: s.named([part.view(shape) for part, shape in zip(z.split(sizes), shapes, strict=True)])
    f = lambda z: s.model(split(z)).reshape(-1)[:outputs]
    hand = {"jacrev": partial(torch.func.jacrev(f), flat), "jacfwd": partial(torch.func.jacfwd(f), flat)}
    return Case(lambda: gradlab.jacobian(f, flat), hand, _gradient(s))


PRODUCTS: list[tuple[str, str, Callable[[Setup], Case]]] = [
    ("hvp", "eager", _hvp),
    ("hvp", "compiled", _hvp_compiled),
    ("hessian_operator @ v", "eager", _linearised),
    ("matmat, 8 directions", "eager", partial(_many, k=8)),
    ("matmat, 8 directions", "compiled", partial(_many_compiled, k=8)),
    ("matmat, 32 directions", "eager", partial(_many, k=32)),
    ("matmat, 32 directions", "compiled", partial(_many_compiled, k=32)),
    ("ggn_vp", "eager", _gauss_newton),
    ("per_example_grads", "eager", partial(_per_example, operation="per_example_grads")),
    ("per_example_norms", "eager", partial(_per_example, operation="per_example_norms")),
    ("clipped_grad", "eager", partial(_per_example, operation="clipped_grad")),
]
DENSE: list[tuple[str, str, Callable[[Setup], Case]]] = [
    ("hessian", "eager", partial(_dense, diagonal=False)),
    ("hessian_diagonal", "eager", partial(_dense, diagonal=True)),
    ("jacobian, more outputs", "eager", partial(_jacobian, outputs=1280)),
    ("jacobian, fewer outputs", "eager", partial(_jacobian, outputs=160)),
]
