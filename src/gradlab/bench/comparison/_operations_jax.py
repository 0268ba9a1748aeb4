"""Derivatives in jax: by gradlab, and as a user of jax writes them."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from equinox.nn import LayerNorm

import gradlab.jax as gl
from gradlab.bench._jax import arrays
from gradlab.bench.comparison._models_jax import build, cross_entropy
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

grad, jvp, vjp, vmap = jax.grad, jax.jvp, jax.vjp, jax.vmap


class Point:
    """A model with its batch: where a loss is differentiated, and in which direction."""

    def __init__(self, task: Task, dtype: str, device: str, size: int, seed: int):
        self.params = build(task, dtype, device, seed)
        self.v = build(task, dtype, device, seed + 1, direction)
        self.examples = arrays(batch(task, 0, seed, size), dtype, device)
        self.dtype = dtype

    def at(self, t: Any) -> Any:
        """params + t v."""
        return jax.tree.map(lambda p, v: p + t * v, self.params, self.v)


def operation(
    what: str, way: str, task: Task, mode: str, dtype: str, device: str, size: int, seed: int
) -> Ready:
    """A derivative, done in one way."""
    if what in APART:
        function, *args = APART[what](way, dtype, device)
    else:
        function, *args = OF_MODELS[what](way, Point(task, dtype, device, size, seed))
    if mode == "compiled":
        return Ready.of(jax.jit(function), *args)
    return Ready(lambda: function(*args))


def of_one(params: Any, x: Any, y: Any) -> Any:
    """Loss of one example."""
    return cross_entropy(params, x[None], y[None])


def gradient(way: str, at: Point) -> Any:
    """∇ loss."""
    return grad(cross_entropy), at.params, *at.examples


def hvp(way: str, at: Point) -> Any:
    """(∇² loss) v."""
    gradient = lambda p: grad(cross_entropy)(p, *at.examples)
    found = {
        "gradlab": lambda p, v: gl.hvp(cross_entropy, p, v, *at.examples),
        "plain": lambda p, v: jvp(gradient, (p,), (v,))[1],
        "reverse": lambda p, v: vjp(gradient, p)[1](v)[0],
    }
    return found[way], at.params, at.v


def hessian(way: str, at: Point) -> Any:
    """∇² loss."""
    found = {"gradlab": gl.hessian, "plain": lambda f, p, *a: jax.hessian(f)(p, *a)}[way]
    return partial(found, cross_entropy), at.params, *at.examples


def jacobian(way: str, at: Point) -> Any:
    """Of all logits of the batch in the parameters."""
    logits = lambda p, x: vmap(p)(x)
    found = {"gradlab": gl.jacobian, "plain": lambda f, p, *a: jax.jacrev(f)(p, *a)}[way]
    return partial(found, logits), at.params, at.examples[0]


def per_example(way: str, at: Point) -> Any:
    """∇ loss of each example."""

    def loop(p: Any, X: Any, y: Any) -> Any:
        each = [jitted(p, *example) for example in zip(X, y, strict=True)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    jitted = jax.jit(grad(of_one))
    found = {"gradlab": partial(gl.per_example_grads, of_one), "plain": vmap(grad(of_one), (None, 0, 0))}
    return {**found, "loop": loop}[way], at.params, *(part[:EXAMPLES] for part in at.examples)


def along_a_line(way: str, along: Any, dtype: str) -> Any:
    """The third derivative of a function of one number, at 0; or the function where it is differenced."""
    one = jnp.ones((), dtype)
    found = {
        "gradlab": lambda t: gl.jacobian(lambda t: gl.hvp(along, t, one), t),
        "plain": grad(grad(grad(along))),
        "values": vmap(along),
    }
    return found[way], jnp.asarray(points() if way == "values" else 0.0, dtype)


def third(way: str, at: Point) -> Any:
    """Of t ↦ loss(params + t v)."""
    return along_a_line(way, lambda t: cross_entropy(at.at(t), *at.examples), at.dtype)


def normed(way: str, dtype: str, device: str) -> Any:
    """Of t ↦ Σ w LayerNorm(x + t v)²."""
    x, v, w = arrays(line(), dtype, device)
    norm = vmap(LayerNorm(x.shape[1:], use_weight=False, use_bias=False))
    return along_a_line(way, lambda t: (w * norm(x + t * v) ** 2).sum(), dtype)


def network(p: Any, x: Any) -> Any:
    """Two layers."""
    return jnp.tanh(x @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"]


def meta(way: str, dtype: str, device: str) -> Any:
    """The MAML gradient of sinusoids."""
    params, tasks = arrays(sinusoids(), dtype, device)
    loss = lambda p, x, y: ((network(p, x) - y) ** 2).mean()

    def outer(p: Any, support: Any, query: Any) -> Any:
        for _ in range(INNER_STEPS):
            p = jax.tree.map(lambda w, g: w - INNER_RATE * g, p, grad(loss)(p, *support))
        return loss(p, *query)

    def by_hand(p: Any, tasks: Any) -> Any:
        return grad(lambda p: vmap(outer, (None, 0, 0))(p, *tasks).mean())(p)

    ours = lambda p, tasks: gl.maml_grad(loss, p, tasks, inner_lr=INNER_RATE, steps=INNER_STEPS)
    return {"gradlab": ours, "plain": by_hand}[way], params, tasks


def rule(way: str, dtype: str, device: str) -> Any:
    """The gradient of Σ log(1 + eˣ) by a rule of one's own."""
    declare = {"gradlab": gl.custom_vjp, "plain": jax.custom_vjp}[way]
    log1pexp: Any = declare(lambda x: jnp.log1p(jnp.exp(x)))
    log1pexp.defvjp(lambda x: (log1pexp(x), x), lambda x, u: (u * jax.nn.sigmoid(x),))
    x = jnp.linspace(-5, 5, ENTRIES, dtype=dtype)
    return grad(lambda x: (log1pexp(x) ** 2).sum()), x


def ode(way: str, dtype: str, device: str) -> Any:
    """The gradient in W of |y(1)|² with dy/dt = tanh(y W)."""
    y0, W = arrays(motion(), dtype, device)
    f = lambda t, y, W: jnp.tanh(y @ W)
    rtol, atol = TOLERANCES[dtype]

    def adaptive(W: Any) -> Any:
        ts = jnp.array([0.0, 1.0], dtype)
        return (gl.odeint(f, y0, ts, W, rtol=rtol, atol=atol).ys[-1] ** 2).mean()

    def fixed(W: Any) -> Any:
        def rk4(y: Any, _: Any) -> Any:
            h = 1 / RK4_STEPS
            a = f(0, y, W)
            b = f(0, y + h / 2 * a, W)
            c = f(0, y + h / 2 * b, W)
            return y + h / 6 * (a + 2 * b + 2 * c + f(0, y + h * c, W)), None

        return (jax.lax.scan(rk4, y0, None, RK4_STEPS)[0] ** 2).mean()

    return grad({"gradlab": adaptive, "plain": fixed}[way]), W


OF_MODELS: dict[str, Any] = {
    "gradient": gradient,
    "hvp": hvp,
    "hessian": hessian,
    "jacobian": jacobian,
    "per_example": per_example,
    "third": third,
}
APART: dict[str, Any] = {"normed": normed, "meta": meta, "rule": rule, "ode": ode}
