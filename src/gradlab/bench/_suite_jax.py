"""Each operation in jax against the same thing written by hand, jitted (and eager on the small model)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import gradlab
import gradlab.jax as gl
from gradlab.bench import _jax as functions
from gradlab.bench.problems import MEASURED
from gradlab.bench.suite import EXAMPLES, Case

grad, jvp, vjp, vmap, jit = jax.grad, jax.jvp, jax.vjp, jax.vmap, jax.jit


class Setup:
    """A problem on the device: its loss and model as functions of the parameters, and directions."""

    def __init__(self, name: str, dtype: str, device: str):
        problem = MEASURED[name]()
        params, inputs, targets = functions.arrays(
            (problem.params, problem.inputs, problem.targets), dtype, device
        )
        loss, model = functions.loss(problem), functions.model(problem)
        self.name, self.params = name, params
        self.loss = lambda p: loss(p, inputs, targets)
        self.loss_of, self.examples = loss, (inputs[:EXAMPLES], targets[:EXAMPLES])
        self.model = lambda p: model(p, inputs)
        self.outer = lambda y: functions.outer(y, targets)
        keys = dict(zip(params, jax.random.split(jax.random.key(0), len(params)), strict=True))
        self.directions = lambda k: {
            n: jax.random.normal(keys[n], (*k, *p.shape), p.dtype) for n, p in params.items()
        }
        self.v = self.directions(())


def cases(names: list[str], dtype: str, device: str, compile: bool) -> Iterator[Case]:
    """Every case on every problem asked for."""
    for name in names:
        s = Setup(name, dtype, device)
        if name == "mlp_500":
            yield from _dense(s)
            yield from _jacobians(s)
            continue
        if name == "mlp_10k":
            yield _hvp(s, "eager", lambda f: f)
        yield _hvp(s, "compiled", jit)
        yield _linearised(s)
        for k in (8, 32):
            yield _many(s, k)
        yield _gauss_newton(s)
        yield from _per_example(s)


def held(s: Setup) -> list[Case]:
    """The cases whose memory is taken."""
    return [_hvp(s, "compiled", jit), _many(s, 8)]


def _unit(s: Setup, wrap: Callable[..., Any] = jit) -> Callable[[], Any]:
    gradient = wrap(grad(s.loss))
    return lambda: gradient(s.params)


def _calls(table: Mapping[str, Callable[..., Any]], *args: Any) -> dict[str, Callable[[], Any]]:
    return {name: partial(f, *args) for name, f in table.items()}


def _hvp(s: Setup, mode: str, wrap: Callable[..., Any]) -> Case:
    hand = {
        "jvp(grad)": wrap(lambda p, v: jvp(grad(s.loss), (p,), (v,))[1]),
        "vjp(grad)": wrap(lambda p, v: vjp(grad(s.loss), p)[1](v)[0]),
    }
    ours = wrap(lambda p, v: gradlab.hvp(s.loss, p, v))
    return Case(s.name, "hvp", mode, lambda: ours(s.params, s.v), _calls(hand, s.params, s.v), _unit(s, wrap))


def _linearised(s: Setup) -> Case:
    H = gradlab.hessian_operator(s.loss, s.params)
    push = jit(jax.linearize(grad(s.loss), s.params)[1])
    return Case(
        s.name,
        "hessian_operator @ v",
        "compiled",
        lambda: H @ s.v,
        _calls({"linearize": push}, s.v),
        _unit(s),
    )


def _many(s: Setup, k: int) -> Case:
    V = s.directions((k,))

    def loop(p: Any, V: Any) -> Any:
        push = jax.linearize(grad(s.loss), p)[1]
        return jax.lax.map(push, V)

    def batched(p: Any, V: Any) -> Any:
        return vmap(lambda v: jvp(grad(s.loss), (p,), (v,))[1])(V)

    ours = jit(lambda p, V: gl.hessian_operator(s.loss, p).matmat(V))
    hand = {"lax.map of linearize": jit(loop), "vmap(jvp(grad))": jit(batched)}
    return Case(
        s.name,
        f"matmat, {k} directions",
        "compiled",
        lambda: ours(s.params, V),
        _calls(hand, s.params, V),
        _unit(s),
        units=k,
    )


def _gauss_newton(s: Setup) -> Case:
    def by_hand(p: Any, v: Any) -> Any:
        y, tangent = jvp(s.model, (p,), (v,))
        return vjp(s.model, p)[1](jvp(grad(s.outer), (y,), (tangent,))[1])[0]

    ours = jit(lambda p, v: gradlab.ggn_vp(s.model, s.outer, p, v))
    hand = _calls({"jvp, vjp": jit(by_hand)}, s.params, s.v)
    return Case(s.name, "ggn_vp", "compiled", lambda: ours(s.params, s.v), hand, _unit(s))


def _per_example(s: Setup) -> Iterator[Case]:
    one = lambda p, *example: s.loss_of(p, *(a[None] for a in example))
    each = vmap(grad(one), (None, 0, 0))
    norms = lambda gs: jnp.sqrt(sum((g.reshape(len(g), -1) ** 2).sum(1) for g in gs.values()))

    def clipped(*args: Any) -> Any:
        gs = each(*args)
        c = jnp.minimum(1, 1 / norms(gs))
        return {name: jnp.tensordot(c, g, 1) for name, g in gs.items()}

    unit = partial(jit(grad(s.loss_of)), s.params, *s.examples)
    ours = lambda f, **o: lambda *args: f(s.loss_of, *args, keep_batch_axis=True, **o)
    for operation, call, hand in (
        ("per_example_grads", ours(gl.per_example_grads), each),
        ("per_example_norms", ours(gl.per_example_norms), lambda *args: norms(each(*args))),
        ("clipped_grad", ours(lambda *a, **o: gl.clipped_grad(*a, max_norm=1.0, **o)[0]), clipped),
    ):
        calls = _calls({"gradlab": jit(call), "vmap(grad)": jit(hand)}, s.params, *s.examples)
        yield Case(s.name, operation, "compiled", calls.pop("gradlab"), calls, unit)


def _dense(s: Setup) -> Iterator[Case]:
    flat, unravel = ravel_pytree(s.params)
    loss = lambda z: s.loss(unravel(z))
    n = flat.size

    def mapped(z: Any) -> Any:
        push = jax.linearize(grad(loss), z)[1]
        return jax.lax.map(lambda i: push(jnp.zeros(n, z.dtype).at[i].set(1)), jnp.arange(n))

    hand = {"jax.hessian": jax.hessian(loss), "lax.map of linearize": mapped}
    unit = jit(grad(loss))
    ours = jit(lambda z: gradlab.hessian(loss, z))
    yield Case(
        s.name,
        "hessian",
        "compiled",
        lambda: ours(flat),
        _calls({name: jit(f) for name, f in hand.items()}, flat),
        lambda: unit(flat),
    )
    diagonal = jit(lambda z: gradlab.hessian_diagonal(loss, z))
    yield Case(
        s.name,
        "hessian_diagonal",
        "compiled",
        lambda: diagonal(flat),
        _calls({name: jit(lambda z, f=f: jnp.diagonal(f(z))) for name, f in hand.items()}, flat),
        lambda: unit(flat),
    )


def _jacobians(s: Setup) -> Iterator[Case]:
    flat, unravel = ravel_pytree(s.params)
    for outputs, kind in ((1280, "more outputs"), (160, "fewer outputs")):
        f = lambda z, n=outputs: s.model(unravel(z)).reshape(-1)[:n]

        def rows(z: Any, f: Any = f) -> Any:
            y, pullback = vjp(f, z)
            return jax.lax.map(lambda u: pullback(u)[0], jnp.eye(y.size, dtype=y.dtype))

        ours = jit(lambda z, f=f: gradlab.jacobian(f, z))
        by_hand = {"jacfwd": jax.jacfwd(f), "lax.map of vjp": rows, "jacrev": jax.jacrev(f)}
        hand = _calls({name: jit(g) for name, g in by_hand.items()}, flat)
        case = Case(s.name, f"jacobian, {kind}", "compiled", partial(ours, flat), hand, _unit(s))
        if flat.dtype != jnp.float64 and jax.default_backend() == "cpu":
            case.unsafe = frozenset({"jacrev"})  # a batched pullback
        yield case
