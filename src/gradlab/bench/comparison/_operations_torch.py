"""Derivatives in torch: by gradlab, and as a user of torch.func writes them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.nn.functional import layer_norm
from torch.utils import _pytree as pytree

import gradlab.torch as gl
from gradlab.bench._torch import arrays
from gradlab.bench.comparison._models_torch import build, cross_entropy
from gradlab.bench.comparison.cases import Ready
from gradlab.bench.comparison.data import EXAMPLES, Task, batch, direction, line, motion, sinusoids
from gradlab.bench.comparison.operations import (
    ENTRIES,
    INNER_RATE,
    INNER_STEPS,
    RK4_STEPS,
    TOLERANCES,
    points,
)


class Point:
    """A model with its batch: where a loss is differentiated, and in which direction."""

    def __init__(self, task: Task, dtype: str, device: str, size: int, seed: int):
        self.apply, self.params = gl.functional(build(task, dtype, device, seed))
        self.v = gl.functional(build(task, dtype, device, seed + 1, direction))[1]
        self.examples = arrays(batch(task, 0, seed, size), dtype, device)
        self.dtype = dtype

    def loss(self, params: Any, inputs: Any, targets: Any) -> Any:
        """Mean cross-entropy."""
        return cross_entropy(partial(self.apply, params), inputs, targets)

    def at(self, t: Any) -> Any:
        """params + t v."""
        return {name: p + t * self.v[name] for name, p in self.params.items()}

    def of_one(self, params: Any, x: Any, y: Any) -> Any:
        """Loss of one example."""
        return self.loss(params, x[None], y[None])

    def fresh(self) -> dict[str, Any]:
        """Parameters that record."""
        return {name: p.detach().requires_grad_() for name, p in self.params.items()}


def operation(
    what: str, way: str, task: Task, mode: str, dtype: str, device: str, size: int, seed: int
) -> Ready:
    """A derivative, done in one way."""
    if what in APART:
        function, *args = APART[what](way, dtype, device)
    else:
        function, *args = OF_MODELS[what](way, Point(task, dtype, device, size, seed))
    if mode == "compiled":
        torch._dynamo.reset()
        return Ready.of(torch.compile(function), *args)
    return Ready.of(function, *args)


def gradient(way: str, at: Point) -> Any:
    """∇ loss."""

    def recorded(_: Any, *examples: Any) -> Any:
        params = at.fresh()
        return torch.autograd.grad(at.loss(params, *examples), list(params.values()))

    return {"autograd": recorded, "plain": grad(at.loss)}[way], at.params, *at.examples


def hvp(way: str, at: Point) -> Any:
    """(∇² loss) v."""
    gradient = lambda p: grad(at.loss)(p, *at.examples)

    def twice(_: Any, v: Any) -> Any:
        params = at.fresh()
        leaves = list(params.values())
        g = torch.autograd.grad(at.loss(params, *at.examples), leaves, create_graph=True)
        return torch.autograd.grad(g, leaves, list(v.values()))

    found = {
        "gradlab": lambda p, v: gl.hvp(at.loss, p, v, *at.examples),
        "plain": lambda p, v: jvp(gradient, (p,), (v,))[1],
        "reverse": lambda p, v: vjp(gradient, p)[1](v)[0],
        "autograd": twice,
    }
    return found[way], at.params, at.v


def hessian(way: str, at: Point) -> Any:
    """∇² loss."""
    found = {"gradlab": gl.hessian, "plain": lambda f, p, *a: torch.func.hessian(f)(p, *a)}[way]
    return partial(found, at.loss), at.params, *at.examples


def jacobian(way: str, at: Point) -> Any:
    """Of all logits of the batch in the parameters."""
    found = {"gradlab": gl.jacobian, "plain": lambda f, p, *a: jacrev(f)(p, *a)}[way]
    return partial(found, at.apply), at.params, at.examples[0]


def per_example(way: str, at: Point) -> Any:
    """∇ loss of each example."""

    def loop(p: Any, X: Any, y: Any) -> Any:
        each = []
        for example in zip(X, y, strict=True):
            params = at.fresh()
            each.append(torch.autograd.grad(at.of_one(params, *example), list(params.values())))
        return [torch.stack(leaves) for leaves in zip(*each, strict=True)]

    mapped = vmap(grad(at.of_one), (None, 0, 0))
    found = {"gradlab": partial(gl.per_example_grads, at.of_one), "plain": mapped, "loop": loop}
    return found[way], at.params, *(part[:EXAMPLES] for part in at.examples)


def along_a_line(way: str, along: Any, dtype: str) -> Any:
    """The third derivative of a function of one number, at 0; or the function where it is differenced."""
    kind = getattr(torch, dtype)
    one = torch.ones((), dtype=kind)
    found = {
        "gradlab": lambda t: gl.jacobian(lambda t: gl.hvp(along, t, one), t),
        "plain": grad(grad(grad(along))),
        "values": lambda ts: torch.stack([along(t) for t in ts]),
    }
    return found[way], torch.tensor(points() if way == "values" else 0.0, dtype=kind)


def third(way: str, at: Point) -> Any:
    """Of t ↦ loss(params + t v)."""
    return along_a_line(way, lambda t: at.loss(at.at(t), *at.examples), at.dtype)


def normed(way: str, dtype: str, device: str) -> Any:
    """Of t ↦ Σ w LayerNorm(x + t v)²."""
    x, v, w = arrays(line(), dtype, device)
    return along_a_line(way, lambda t: (w * layer_norm(x + t * v, x.shape[1:]) ** 2).sum(), dtype)


def network(p: Any, x: Any) -> Any:
    """Two layers."""
    return torch.tanh(x @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"]


def meta(way: str, dtype: str, device: str) -> Any:
    """The MAML gradient of sinusoids."""
    params, tasks = arrays(sinusoids(), dtype, device)
    loss = lambda p, x, y: ((network(p, x) - y) ** 2).mean()

    def outer(p: Any, support: Any, query: Any) -> Any:
        for _ in range(INNER_STEPS):
            p = pytree.tree_map(lambda w, g: w - INNER_RATE * g, p, grad(loss)(p, *support))
        return loss(p, *query)

    def by_hand(p: Any, tasks: Any) -> Any:
        return grad(lambda p: vmap(outer, (None, 0, 0))(p, *tasks).mean())(p)

    ours = lambda p, tasks: gl.maml_grad(loss, p, tasks, inner_lr=INNER_RATE, steps=INNER_STEPS)
    return {"gradlab": ours, "plain": by_hand}[way], params, tasks


class Log1pExp(torch.autograd.Function):
    """log(1 + eˣ), as torch has rules declared."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        """The value."""
        ctx.save_for_backward(x)
        return torch.log1p(torch.exp(x))

    @staticmethod
    def backward(ctx: Any, u: Any) -> Any:
        """The cotangent."""
        (x,) = ctx.saved_tensors
        return u * torch.sigmoid(x)


def rule(way: str, dtype: str, device: str) -> Any:
    """The gradient of Σ log(1 + eˣ) by a rule of one's own."""
    log1pexp: Any = gl.custom_vjp(lambda x: torch.log1p(torch.exp(x)))
    log1pexp.defvjp(lambda x: (log1pexp(x), x), lambda x, u: (u * torch.sigmoid(x),))
    declared = {"gradlab": log1pexp, "plain": Log1pExp.apply}[way]
    x = torch.linspace(-5, 5, ENTRIES, dtype=getattr(torch, dtype), device=device, requires_grad=True)
    return lambda x: torch.autograd.grad((declared(x) ** 2).sum(), x), x


def ode(way: str, dtype: str, device: str) -> Any:
    """The gradient in W of |y(1)|² with dy/dt = tanh(y W)."""
    y0, W = arrays(motion(), dtype, device)
    f = lambda t, y, W: torch.tanh(y @ W)
    rtol, atol = TOLERANCES[dtype]

    def adaptive(W: Any) -> Any:
        ts = torch.tensor([0.0, 1.0], dtype=W.dtype, device=W.device)
        return (gl.odeint(f, y0, ts, W, rtol=rtol, atol=atol).ys[-1] ** 2).mean()

    def fixed(W: Any) -> Any:
        y, h = y0, 1 / RK4_STEPS
        for _ in range(RK4_STEPS):
            a = f(0, y, W)
            b = f(0, y + h / 2 * a, W)
            c = f(0, y + h / 2 * b, W)
            y = y + h / 6 * (a + 2 * b + 2 * c + f(0, y + h * c, W))
        return (y**2).mean()

    solution = {"gradlab": adaptive, "plain": fixed}[way]
    W.requires_grad_()
    return lambda W: torch.autograd.grad(solution(W), W), W


OF_MODELS: dict[str, Any] = {
    "gradient": gradient,
    "hvp": hvp,
    "hessian": hessian,
    "jacobian": jacobian,
    "per_example": per_example,
    "third": third,
}
APART: dict[str, Any] = {"normed": normed, "meta": meta, "rule": rule, "ode": ode}
