"""Ordinary differential equations whose solutions have derivatives in every mode, to every order.

Contracts only; `_jax.py` and `_torch.py` implement them in this order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradlab._dispatch import operation
from gradlab.transforms.odes.options import Adjoint, Method, Solution

__all__ = ["odeint"]


@operation
def odeint(
    f: Callable[..., Any],
    y0: Any,
    ts: Any,
    *args: Any,
    method: Method = "tsit5",
    adjoint: Adjoint = "auto",
    rtol: float | None = None,
    atol: float | None = None,
    step_size: float | None = None,
    max_steps: int | None = None,
    throw: bool = True,
    gradient_error: bool = False,
    event: Callable[..., Any] | None = None,
    compile: bool = False,
) -> Solution:
    """The solution of dy/dt = f(t, y, *args), y(ts[0]) = y0, differentiable in y0, ts and args.

    A tangent solves s' = ∂f/∂y s + ∂f/∂args dargs, integrated together with y, and both are kept within the
    tolerances. A cotangent solves a' = -(∂f/∂y)ᵀ a backwards from ts[-1] by steps of its own, with y from the
    polynomials of the forward steps; ∫ (∂f/∂args)ᵀ a dt comes beside it. So no derivative is that of steps that were
    chosen for y alone, which is another one wherever the steps are at the limit of stability. Derivatives of these are
    the same two of the tangent's equation: any nest of modes, vmap and jit, to any order.

    Args:
        f: Function `f(t, y, *args)` to a tree like y; t is a scalar. What f closes over is differentiated as its
            arguments are, a torch.nn.Module's or an equinox module's parameters too.
        y0: Tree of float arrays.
        ts: Times (T,), rising or falling throughout; y0 is the state at the first.
        *args: Trees, whose float arrays are differentiated.
        method: Explicit: `"tsit5"` and `"dopri5"` of order 5, `"dopri8"` of order 8 for tight tolerances, `"bosh3"`
            for loose ones, `"midpoint"`; with fixed steps alone `"rk4"` and `"euler"`. A stiff equation takes as many
            of their steps as stability asks for. Implicit, for stiff equations: `"kvaerno5"`, `"kvaerno3"` and
            `"rodas5p"`, with ∂f/∂y (n, n) of each example. `"auto"`: tsit5, until it sees stiffness, and kvaerno5
            from there on.
        adjoint: How derivatives are taken. `"auto"`: as above, in every mode. `"interpolating"`: the cotangent above
            alone; refuses forward mode. `"forward"`: the tangent alone; refuses reverse mode. `"backsolve"`: y is
            integrated backwards with the cotangent, with no memory of steps; raises where it does not return to y0.
            `"direct"`: the steps themselves are differentiated, their sizes held constant. `"checkpoint"`: the
            same, with the memory of the square root of their number; in jax in reverse mode alone, once.
        rtol: Error of a step relative to y, as a root mean square over its entries. None: 1e-6 in float64, 1e-4 in
            float32.
        atol: The same, absolute, in units of y. None: rtol / 100. A tangent's is in units of the largest entry of its
            direction; a cotangent's is rtol / 1000 of the largest cotangent, or atol / 10 where that is less.
        step_size: The size of every step, in units of t; None: chosen by the tolerances.
        max_steps: The most steps, rejected ones too. None: 4096 in jax, where memory is set aside by it (see Cost),
            and 100,000 in torch.
        throw: Whether a solution that does not reach the last time raises; else it is not-a-number from there on, and
            its status says why.
        gradient_error: Whether to estimate the error of the derivatives: the cotangent by this adjoint against the
            tangent under error control, along one random direction. Costs as much as both, and
            warns above 100 times rtol. (In torch every cotangent of `"auto"` warns where a·f is not kept.)
        event: Function `event(t, y, *args)` -> scalar, whose first change of sign after ts[0] ends the solution. The
            states at later ts are the one at the event. None: there is no event.
        compile: In torch, whether a step of an explicit method is compiled, forwards and of the cotangent, at the first
            call: a minute of waiting. Another f, shape, dtype or method is compiled anew; the numbers that f closes
            over may change. Under a transform, in derivatives of derivatives and of `"checkpoint"` they run as they do
            without. In jax there is nothing to do: put `jax.jit` around the call.

    Returns:
        `Solution(ys, stats, status, gradient_error, event_time)`: ys a tree like y0 with a leading axis of T times;
        stats, a dictionary of whole numbers: "evaluations" of f (in jax each stage of an implicit method counts
        once), steps "accepted" and "rejected"; status, a number of `Status` (0: done); gradient_error relative to the
        sizes of both, or None; event_time, differentiable, or infinity without derivative if the event does not come
        to pass, or None if there is none. Each has a batch axis under vmap, where every example has steps of its
        own.

    Raises:
        KindError: y0 holds anything but floats, or args complex numbers.
        InputError: ts is not sorted or holds a time twice; f returns a tree unlike y0; an option that does not exist.
        StrategyError: a derivative that the adjoint asked for has not; with compile=True, an f that torch.compile
            cannot trace as one graph; in torch.autocast, which belongs inside f.
        ConvergenceError: max_steps was reached, no step was small enough, or f was not finite; torch names the time
            and the state. In compiled jax it is jax's own JaxRuntimeError with the same message.
        BackendError: arrays of both frameworks, or of neither.

    Warns:
        GradientWarning: cotangents disagree with the tangent along a random direction by more than 100 times the
            tolerances. In torch each backward pass has a sign of that; in jax, and for the parameters, pass
            gradient_error=True.

    Cost:
        Evaluations of f: stages - 1 a step (6 of tsit5); of an implicit method about 15, and ∂f/∂y once. A tangent:
        with each the derivative of f along one direction (in torch two pullbacks). A cotangent: a pullback of f for
        each stage of about twice as many steps backwards, under torch.func after another solve; memory in entries of
        y: in torch 5 a step (tsit5); in jax 10 √max_steps, the steps of one segment of √max_steps and where the
        segments begin, each but the last being solved again. torch.compile around the call leaves its graph for it:
        pass compile=True.

    Example:
        >>> import torch
        >>> from gradlab import odeint
        >>> at_one = lambda k: odeint(lambda t, y: -k * y, torch.tensor(1.0), torch.tensor([0.0, 1.0])).ys[-1]
        >>> k = torch.tensor(2.0)  # y = exp(-k t)
        >>> first, second = torch.func.grad(at_one)(k), torch.func.hessian(at_one)(k)
        >>> print(f"{first * torch.exp(k):.3f} {second * torch.exp(k):.3f}")
        -1.000 1.000
        >>> import jax, jax.numpy as jnp
        >>> at_one = lambda k: odeint(lambda t, y: -k * y, jnp.array(1.0), jnp.array([0.0, 1.0])).ys[-1]
        >>> print(f"{jax.grad(at_one)(2.0) * jnp.exp(2.0):.3f}")
        -1.000

    Source:
        Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I (1993), II.4-6. Kidger, Chen and Lyons,
        "Hey, that's not an ODE": faster ODE adjoints via seminorms, ICML 2021, arXiv:2009.09457. Tsitouras (2011),
        doi:10.1016/j.camwa.2011.06.002.
    """
