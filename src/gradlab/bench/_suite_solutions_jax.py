"""Derivatives through rules and solutions in jax, against the same written by hand, under jit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

import gradlab.jax as gl
from gradlab.bench import _jax as functions
from gradlab.bench.solutions import INNER, RATE, STEP, numbers
from gradlab.bench.suite import Case, Cell

grad, vmap, jit = jax.grad, jax.vmap, jax.jit


def cells(dtype: str, device: str) -> Iterator[Cell]:
    """Every case."""
    given = cache(lambda: functions.arrays(numbers(), dtype, device))
    on = lambda name, make: lambda: make(given()[name])
    for name, operation, make in (
        ("rule", "custom_vjp, gradient", _rule),
        ("ridge", "argmin, gradient", _argmin),
        ("sinusoids", "maml_grad, 5 steps", _maml),
        ("equation", "odeint, solution", partial(_equation, gradient=False)),
        ("equation", "odeint, gradient", partial(_equation, gradient=True)),
        ("equation", "odeint, gradient of the steps", partial(_equation, gradient=True, adjoint="direct")),
        ("flow", "flow_log_density", _flow),
    ):
        yield Cell(name, operation, "compiled", on(name, make))


def _case(ours: Any, hand: dict[str, Any], unit: Any, *args: Any) -> Case:
    """All of the same arguments."""
    of = lambda f: partial(jit(f), *args)
    return Case(of(ours), {name: of(f) for name, f in hand.items()}, of(unit))


def _layers(params: Any, x: Any) -> Any:
    for i in range(len(params) // 2):
        x = (jnp.tanh(x) if i else x) @ params[f"w{i}"] + params[f"b{i}"]
    return x


def _rule(x: Any) -> Case:
    def declared(declare: Any) -> Callable[[Any], Any]:
        f = declare(lambda x: jnp.logaddexp(x, 0.0))
        f.defvjp(lambda x: (jnp.logaddexp(x, 0.0), x), lambda x, u: (u * jax.nn.sigmoid(x),))
        return grad(lambda x: (f(x) ** 2).sum())

    plain = grad(lambda x: (jnp.logaddexp(x, 0.0) ** 2).sum())
    hand = {"jax.custom_vjp": declared(jax.custom_vjp), "no rule": plain}
    return _case(declared(gl.custom_vjp), hand, plain, x)


def _argmin(given: Any) -> Case:
    X, t, X_val, t_val, penalties = given
    n = len(t)
    matrix = lambda lam: X.T @ X / n + jnp.diag(jnp.exp(lam))
    objective = lambda w, lam: ((X @ w - t) ** 2).mean() / 2 + (jnp.exp(lam) * w**2).sum() / 2
    solve = lambda lam: jnp.linalg.solve(matrix(lam), X.T @ t / n)
    validation = lambda w: ((X_val @ w - t_val) ** 2).mean() / 2
    fit = gl.argmin(objective, lambda objective, w, lam: solve(lam))

    def adjoint(lam: Any) -> Any:
        w = solve(lam)
        return -jnp.exp(lam) * w * jnp.linalg.solve(matrix(lam), grad(validation)(w))

    ours = grad(lambda lam: validation(fit(jnp.zeros_like(lam), lam)))
    hand = {"an adjoint solve": adjoint, "through the solve": grad(lambda lam: validation(solve(lam)))}
    return _case(ours, hand, lambda lam: grad(objective)(lam, lam), penalties)


def _maml(given: Any) -> Case:
    loss = lambda p, x, y: ((_layers(p, x) - y) ** 2).mean()

    def by_hand(p: Any, tasks: Any) -> Any:
        def one(p: Any, support: Any, query: Any) -> Any:
            for _ in range(INNER):
                p = jax.tree.map(lambda a, g: a - RATE * g, p, grad(loss)(p, *support))
            return loss(p, *query)

        return grad(lambda p: vmap(one, (None, 0, 0))(p, *tasks).mean())(p)

    ours = lambda p, tasks: gl.maml_grad(loss, p, tasks, inner_lr=RATE, steps=INNER)
    unit = lambda p, tasks: grad(lambda p: vmap(partial(loss, p))(*tasks[0]).mean())(p)
    return _case(ours, {"grad(vmap(...))": by_hand}, unit, *given)


def _runge_kutta(f: Callable[[Any], Any], y: Any, h: float) -> Any:
    """Over a unit of time."""

    def step(y: Any, _: Any) -> Any:
        add = lambda k, by: jax.tree.map(lambda a, b: a + by * b, y, k)
        a = f(y)
        b = f(add(a, h / 2))
        c = f(add(b, h / 2))
        d = f(add(c, h))
        return jax.tree.map(lambda y, a, b, c, d: y + h / 6 * (a + 2 * b + 2 * c + d), y, a, b, c, d), None

    return jax.lax.scan(step, y, None, length=round(1 / abs(h)))[0]


def _equation(given: Any, gradient: bool, **options: Any) -> Case:
    ts = jnp.array([0.0, 1.0])
    solved = lambda p, y: gl.odeint(
        lambda t, y, p: _layers(p, y), y, ts, p, method="rk4", step_size=STEP, **options
    ).ys[-1]
    by_hand = lambda p, y: _runge_kutta(lambda y: _layers(p, y), y, STEP)
    of = lambda f: grad(lambda p, y: (f(p, y) ** 2).mean()) if gradient else f
    return _case(of(solved), {"a scan of steps": of(by_hand)}, of(_layers), *given)


def _flow(given: Any) -> Case:
    normal = lambda z: -(z**2).sum() / 2
    velocity = lambda t, z, p: _layers(p, z)
    options = {"method": "rk4", "step_size": STEP, "adjoint": "direct"}
    ours = lambda p, x: gl.flow_log_density(velocity, x, p, ts=(0.0, 1.0), log_base=normal, **options)

    def by_hand(p: Any, x: Any) -> Any:
        def one(state: Any) -> Any:
            z, _ = state
            f = lambda z: _layers(p, z)
            return f(z), jnp.trace(jax.jacfwd(f)(z))

        z, gained = _runge_kutta(vmap(one), (x, jnp.zeros(len(x), x.dtype)), -STEP)
        return vmap(normal)(z) + gained

    return _case(
        ours, {"a scan with the trace of jacfwd": by_hand}, grad(lambda p, x: _layers(p, x).sum()), *given
    )
