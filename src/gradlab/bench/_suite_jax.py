"""Each operation in jax against the same thing written by hand, jitted (and eager on the small model)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import gradlab
import gradlab.jax as gl
from gradlab.bench import _jax as functions
from gradlab.bench import _suite_solutions_jax
from gradlab.bench.problems import MEASURED
from gradlab.bench.suite import EXAMPLES, Case, Cell

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


def cells(names: list[str], dtype: str, device: str) -> Iterator[Cell]:
    """Every case on every problem asked for; a problem is set up at its first."""
    setup = lru_cache(maxsize=1)(lambda name: Setup(name, dtype, device))
    on = lambda name, make: lambda: make(setup(name))
    for name in names:
        if name == "solutions":
            yield from _suite_solutions_jax.cells(dtype, device)
            continue
        for operation, mode, make in DENSE if name == "mlp_500" else PRODUCTS:
            why = "seconds a call" if mode == "eager" and name != "mlp_10k" else ""
            yield Cell(name, operation, mode, on(name, make), why)


def _unit(s: Setup, wrap: Callable[..., Any] = jit) -> Callable[[], Any]:
    return partial(wrap(grad(s.loss)), s.params)


def _calls(table: Mapping[str, Callable[..., Any]], *args: Any) -> dict[str, Callable[[], Any]]:
    return {name: partial(f, *args) for name, f in table.items()}


def _hvp(s: Setup, wrap: Callable[..., Any] = jit) -> Case:
    hand = {
        "jvp(grad)": wrap(lambda p, v: jvp(grad(s.loss), (p,), (v,))[1]),
        "vjp(grad)": wrap(lambda p, v: vjp(grad(s.loss), p)[1](v)[0]),
    }
    ours = wrap(lambda p, v: gradlab.hvp(s.loss, p, v))
    return Case(partial(ours, s.params, s.v), _calls(hand, s.params, s.v), _unit(s, wrap))


def _linearised(s: Setup) -> Case:
    H = gradlab.hessian_operator(s.loss, s.params)
    push = jit(jax.linearize(grad(s.loss), s.params)[1])
    return Case(partial(H.__matmul__, s.v), _calls({"linearize": push}, s.v), _unit(s))


def _many(s: Setup, k: int) -> Case:
    V = s.directions((k,))

    def loop(p: Any, V: Any) -> Any:
        push = jax.linearize(grad(s.loss), p)[1]
        return jax.lax.map(push, V)

    def batched(p: Any, V: Any) -> Any:
        return vmap(lambda v: jvp(grad(s.loss), (p,), (v,))[1])(V)

    ours = jit(lambda p, V: gl.hessian_operator(s.loss, p).matmat(V))
    hand = {"lax.map of linearize": jit(loop), "vmap(jvp(grad))": jit(batched)}
    return Case(partial(ours, s.params, V), _calls(hand, s.params, V), _unit(s), units=k)


def _gauss_newton(s: Setup) -> Case:
    def by_hand(p: Any, v: Any) -> Any:
        y, tangent = jvp(s.model, (p,), (v,))
        return vjp(s.model, p)[1](jvp(grad(s.outer), (y,), (tangent,))[1])[0]

    ours = jit(lambda p, v: gradlab.ggn_vp(s.model, s.outer, p, v))
    hand = _calls({"jvp, vjp": jit(by_hand)}, s.params, s.v)
    return Case(partial(ours, s.params, s.v), hand, _unit(s))


def _per_example(s: Setup, operation: str) -> Case:
    one = lambda p, *example: s.loss_of(p, *(a[None] for a in example))
    each = vmap(grad(one), (None, 0, 0))
    norms = lambda gs: jnp.sqrt(sum((g.reshape(len(g), -1) ** 2).sum(1) for g in gs.values()))

    def clipped(*args: Any) -> Any:
        gs = each(*args)
        c = jnp.minimum(1, 1 / norms(gs))
        return {name: jnp.tensordot(c, g, 1) for name, g in gs.items()}

    unit = partial(jit(grad(s.loss_of)), s.params, *s.examples)
    of = lambda f, **o: lambda *args: f(s.loss_of, *args, keep_batch_axis=True, **o)
    ours, hand = {
        "per_example_grads": (of(gl.per_example_grads), each),
        "per_example_norms": (of(gl.per_example_norms), lambda *args: norms(each(*args))),
        "clipped_grad": (of(lambda *a, **o: gl.clipped_grad(*a, max_norm=1.0, **o)[0]), clipped),
    }[operation]
    calls = _calls({"gradlab": jit(ours), "vmap(grad)": jit(hand)}, s.params, *s.examples)
    return Case(calls.pop("gradlab"), calls, unit)


def _dense(s: Setup, diagonal: bool) -> Case:
    flat, unravel = ravel_pytree(s.params)
    loss = lambda z: s.loss(unravel(z))
    n = flat.size

    def mapped(z: Any) -> Any:
        push = jax.linearize(grad(loss), z)[1]
        return jax.lax.map(lambda i: push(jnp.zeros(n, z.dtype).at[i].set(1)), jnp.arange(n))

    hand = {"jax.hessian": jax.hessian(loss), "lax.map of linearize": mapped}
    ours = lambda z: gradlab.hessian(loss, z)
    if diagonal:
        ours = lambda z: gradlab.hessian_diagonal(loss, z)
    of = lambda f: jit((lambda z: jnp.diagonal(f(z))) if diagonal else f)
    calls = _calls({name: of(f) for name, f in hand.items()}, flat)
    return Case(partial(jit(ours), flat), calls, partial(jit(grad(loss)), flat))


def _jacobian(s: Setup, outputs: int) -> Case:
    flat, unravel = ravel_pytree(s.params)
    f = lambda z: s.model(unravel(z)).reshape(-1)[:outputs]

    def rows(z: Any) -> Any:
        y, pullback = vjp(f, z)
        return jax.lax.map(lambda u: pullback(u)[0], jnp.eye(y.size, dtype=y.dtype))

    ours = jit(lambda z: gradlab.jacobian(f, z))
    by_hand = {"jacfwd": jax.jacfwd(f), "lax.map of vjp": rows, "jacrev": jax.jacrev(f)}
    hand = _calls({name: jit(g) for name, g in by_hand.items()}, flat)
    case = Case(partial(ours, flat), hand, _unit(s))
    if flat.dtype != jnp.float64 and jax.default_backend() == "cpu":
        case.unsafe = frozenset({"jacrev"})  # a batched pullback
    return case


PRODUCTS: list[tuple[str, str, Callable[[Setup], Case]]] = [
    ("hvp", "eager", partial(_hvp, wrap=lambda f: f)),
    ("hvp", "compiled", _hvp),
    ("hessian_operator @ v", "compiled", _linearised),
    ("matmat, 8 directions", "compiled", partial(_many, k=8)),
    ("matmat, 32 directions", "compiled", partial(_many, k=32)),
    ("ggn_vp", "compiled", _gauss_newton),
    ("per_example_grads", "compiled", partial(_per_example, operation="per_example_grads")),
    ("per_example_norms", "compiled", partial(_per_example, operation="per_example_norms")),
    ("clipped_grad", "compiled", partial(_per_example, operation="clipped_grad")),
]
DENSE: list[tuple[str, str, Callable[[Setup], Case]]] = [
    ("hessian", "compiled", partial(_dense, diagonal=False)),
    ("hessian_diagonal", "compiled", partial(_dense, diagonal=True)),
    ("jacobian, more outputs", "compiled", partial(_jacobian, outputs=1280)),
    ("jacobian, fewer outputs", "compiled", partial(_jacobian, outputs=160)),
]
