"""Derivatives through rules and solutions in torch, against the same written by hand, eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch

import gradlab.torch as gl
from gradlab.bench import _torch as functions
from gradlab.bench.solutions import INNER, RATE, STEP, numbers
from gradlab.bench.suite import Case, Cell

grad, vmap = torch.func.grad, torch.func.vmap


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
        yield Cell(name, operation, "eager", on(name, make))


def _case(ours: Any, hand: dict[str, Any], unit: Any, *args: Any) -> Case:
    """All of the same arguments."""
    of = lambda f: partial(f, *args)
    return Case(of(ours), {name: of(f) for name, f in hand.items()}, of(unit))


def _layers(params: Any, x: Any) -> Any:
    for i in range(len(params) // 2):
        x = (torch.tanh(x) if i else x) @ params[f"w{i}"] + params[f"b{i}"]
    return x


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return torch.logaddexp(x, torch.zeros_like(x))

    @staticmethod
    def backward(ctx: Any, u: Any) -> Any:
        (x,) = ctx.saved_tensors
        return u * torch.sigmoid(x)


def _rule(x: Any) -> Case:
    plain = lambda x: torch.logaddexp(x, torch.zeros_like(x))
    ruled = gl.custom_vjp(plain)
    ruled.defvjp(lambda x: (plain(x), x), lambda x, u: (u * torch.sigmoid(x),))
    of = lambda f: functions.grad(lambda x: (f(x) ** 2).sum())
    hand = {"torch.autograd.Function": of(_Softplus.apply), "no rule": of(plain)}
    return _case(of(ruled), hand, of(plain), x)


def _argmin(given: Any) -> Case:
    X, t, X_val, t_val, penalties = given
    n = len(t)
    matrix = lambda lam: X.T @ X / n + torch.diag(torch.exp(lam))
    objective = lambda w, lam: ((X @ w - t) ** 2).mean() / 2 + (torch.exp(lam) * w**2).sum() / 2
    solve = lambda lam: torch.linalg.solve(matrix(lam), X.T @ t / n)
    validation = lambda w: ((X_val @ w - t_val) ** 2).mean() / 2
    fit = gl.argmin(objective, lambda objective, w, lam: solve(lam))

    def adjoint(lam: Any) -> Any:
        w = solve(lam)
        return -torch.exp(lam) * w * torch.linalg.solve(matrix(lam), functions.grad(validation)(w))

    ours = functions.grad(lambda lam: validation(fit(torch.zeros_like(lam), lam)))
    hand = {
        "an adjoint solve": adjoint,
        "through the solve": functions.grad(lambda lam: validation(solve(lam))),
    }
    return _case(ours, hand, lambda lam: functions.grad(objective)(lam, lam), penalties)


def _maml(given: Any) -> Case:
    loss = lambda p, x, y: ((_layers(p, x) - y) ** 2).mean()

    def by_hand(p: Any, tasks: Any) -> Any:
        def one(p: Any, support: Any, query: Any) -> Any:
            for _ in range(INNER):
                g = grad(loss)(p, *support)
                p = {name: p[name] - RATE * g[name] for name in p}
            return loss(p, *query)

        return grad(lambda p: vmap(one, (None, 0, 0))(p, *tasks).mean())(p)

    ours = lambda p, tasks: gl.maml_grad(loss, p, tasks, inner_lr=RATE, steps=INNER)
    unit = functions.grad(lambda p, tasks: vmap(partial(loss, p))(*tasks[0]).mean())
    return _case(ours, {"grad(vmap(...))": by_hand}, unit, *given)


def _runge_kutta(f: Callable[..., Any], state: tuple[Any, ...], h: float) -> tuple[Any, ...]:
    """Over a unit of time."""
    for _ in range(round(1 / abs(h))):
        add = lambda k, by: tuple(y + by * part for y, part in zip(state, k, strict=True))
        a = f(*state)
        b = f(*add(a, h / 2))
        c = f(*add(b, h / 2))
        d = f(*add(c, h))
        slopes = (a + 2 * b + 2 * c + d for a, b, c, d in zip(a, b, c, d, strict=True))
        state = tuple(y + h / 6 * slope for y, slope in zip(state, slopes, strict=True))
    return state


def _equation(given: Any, gradient: bool, **options: Any) -> Case:
    ts = torch.tensor([0.0, 1.0]).to(given[1])
    solved = lambda p, y: gl.odeint(
        lambda t, y, p: _layers(p, y), y, ts, p, method="rk4", step_size=STEP, **options
    ).ys[-1]
    by_hand = lambda p, y: _runge_kutta(lambda y: (_layers(p, y),), (y,), STEP)[0]
    of = lambda f: functions.grad(lambda p, y: (f(p, y) ** 2).mean()) if gradient else f
    return _case(of(solved), {"a loop of steps": of(by_hand)}, of(_layers), *given)


def _flow(given: Any) -> Case:
    normal = lambda z: -(z**2).sum() / 2
    velocity = lambda t, z, p: _layers(p, z)
    options = {"method": "rk4", "step_size": STEP, "adjoint": "direct"}
    ours = lambda p, x: gl.flow_log_density(velocity, x, p, ts=(0.0, 1.0), log_base=normal, **options)

    def by_hand(p: Any, x: Any) -> Any:
        f = lambda z: _layers(p, z)
        trace = vmap(lambda z: torch.func.jacrev(f)(z).trace())
        state = (x, torch.zeros(len(x)).to(x))
        z, gained = _runge_kutta(lambda z, _: (f(z), trace(z)), state, -STEP)
        return vmap(normal)(z) + gained

    unit = functions.grad(lambda p, x: _layers(p, x).sum())
    return _case(ours, {"a loop with the trace of jacrev": by_hand}, unit, *given)
