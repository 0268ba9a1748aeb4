"""Functions given by equations: roots, fixed points and minima, differentiable in the equations' parameters.

Contracts only; `_jax.py` and `_torch.py` implement them in this order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradlab.transforms.implicit_functions.options import Method, Unconverged, found_later

__all__ = ["argmin", "fixed_point", "root"]


@found_later
def root(
    residual: Callable[..., Any],
    solver: Callable[..., Any] | None = None,
    *,
    linear_solver: Method | Callable[..., Any] = "direct",
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int | None = None,
    unconverged: Unconverged = "raise",
) -> Callable[..., Any]:
    """The root of an equation as a function of its parameters, differentiable by the implicit function theorem.

    Gives `solution(y0, *args)`, the y with residual(y, *args) = 0, whose derivative is
    ∂y/∂args = -A⁻¹ ∂residual/∂args with A = ∂residual/∂y, right in every mode to every order that is
    asked for under torch.func and jax. By torch.autograd it is right to third order and no further: for a
    fourth derivative nest torch.func's. What residual closes over is differentiated as its arguments are.
    Neither time nor memory of a derivative grows with the solver's steps.

    Args:
        residual: Function `residual(y, *args)` to a tree like y.
        solver: Function `solver(residual, y0, *args) -> y`. Its result is believed: the derivative is that
            of the solution of residual = (its value there). It runs without derivatives, so by any code; in
            torch under no_grad, and where it looks at numbers under vmap, once an example. None: Newton's
            method, damped by halving steps.
        linear_solver: How A x = b is solved. `"direct"`: A as a dense matrix, factorised. By products with A
            alone: `"cg"` (conjugate gradients, A symmetric and definite), `"gmres"`, `"neumann"` (Σ (I - A)ᵏ b,
            where it converges), or a function `(matvec, b) -> x` of y's flat vectors. The default solver uses it.
        rtol: Relative tolerance, of the default solver's last step and of |A x - b| in an iterative linear
            solve. None: the rounding to the power 3/4, 2e-12 in float64.
        atol: The same, absolute, a number of y or b. None: as rtol.
        max_steps: The most steps of either iteration. None: 256 of Newton, 4096 of a fixed-point iteration or of
            a Neumann series, ten times the entries of y for `"cg"` and `"gmres"`.
        unconverged: What becomes of a default solver or a linear solve that has not reached its tolerance, or
            meets a singular A: `"raise"` (ConvergenceError) or `"warn"` (ConvergenceWarning; in jax's reverse
            mode lineax raises at a singular A all the same).

    Returns:
        `solution(y0, *args)`, a tree like y0, whose integers and other constants stand as they are. y0 has no
        derivative; args are trees, whose float arrays are differentiated.

    Raises:
        InputError: an option that does not exist; what residual or solver returns is not like y0.
        KindError: residual or solver is no function, y0 has no float array.
        ConvergenceError: as asked. jax raises it inside a derivative or compiled code as its own
            JaxRuntimeError (a RuntimeError too), with the same message; in compiled torch nothing can be
            raised, and the solution is not-a-number.
        StrategyError: in torch, an iterative linear solver under torch.compile.
        BackendError: arrays of both frameworks, or of neither.

    Cost:
        The solver, and to have a derivative one Jacobian A (its n gradients; products alone if iterative);
        each derivative one linear solve. torch evaluates residual once for each order of derivative.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gradlab import root
        >>> cube_root = lambda a: root(lambda y, a: y**3 - a)(jnp.array(1.0), a)
        >>> print(f"{cube_root(8.0):.4f} {jax.grad(cube_root)(8.0):.4f}")  # 1 / 12
        2.0000 0.0833
        >>> import torch
        >>> cube_root = lambda a: root(lambda y, a: y**3 - a)(torch.tensor(1.0), a)
        >>> torch.func.grad(cube_root)(torch.tensor(8.0))
        tensor(0.0833)

    Source:
        Blondel et al., Efficient and modular implicit differentiation, NeurIPS 2022, arXiv:2105.15183.
        Griewank and Walther, Evaluating Derivatives (2008), section 15 (derivatives of Newton iterations).
    """


@found_later
def fixed_point(
    step: Callable[..., Any],
    solver: Callable[..., Any] | None = None,
    *,
    linear_solver: Method | Callable[..., Any] = "direct",
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int | None = None,
    unconverged: Unconverged = "raise",
) -> Callable[..., Any]:
    """The fixed point of a map as a function of its parameters, differentiable by the implicit function theorem.

    Gives `solution(y0, *args)`, the y with step(y, *args) = y: the `root` of y - step(y, *args), with
    ∂y/∂args = (I - ∂step/∂y)⁻¹ ∂step/∂args.

    Args:
        step: Function `step(y, *args)` to a tree like y.
        solver: Function `solver(step, y0, *args) -> y`, as for `root`. None: the iteration itself, in torch by
            Anderson's acceleration.
        linear_solver: As for `root`, with A = I - ∂step/∂y; `"neumann"` converges wherever the iteration does.
        rtol: As for `root`.
        atol: As for `root`.
        max_steps: As for `root`.
        unconverged: As for `root`.

    Returns:
        `solution(y0, *args)`, as for `root`.

    Raises:
        InputError, KindError, ConvergenceError, StrategyError, BackendError: as for `root`.

    Cost:
        As for `root`.

    Example:
        >>> import torch
        >>> from gradlab import fixed_point
        >>> heron = fixed_point(lambda y, a: (y + a / y) / 2)  # √a
        >>> torch.func.grad(lambda a: heron(torch.tensor(1.0), a))(torch.tensor(4.0))
        tensor(0.2500)
        >>> import jax, jax.numpy as jnp
        >>> print(f"{jax.grad(lambda a: heron(jnp.array(1.0), a))(4.0):.4f}")
        0.2500

    Source:
        Christianson, Reverse accumulation and attractive fixed points, Optimization Methods and Software 3
        (1994), doi:10.1080/10556789408805572. Walker and Ni, Anderson acceleration for fixed-point
        iterations, SIAM J. Numer. Anal. 49 (2011), doi:10.1137/10078356X.
    """


@found_later
def argmin(
    objective: Callable[..., Any],
    solver: Callable[..., Any] | None = None,
    *,
    linear_solver: Method | Callable[..., Any] = "direct",
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int | None = None,
    unconverged: Unconverged = "raise",
) -> Callable[..., Any]:
    """A minimum as a function of the objective's parameters, differentiable by the implicit function theorem.

    Gives `solution(y0, *args)`, a local minimum of objective(y, *args): the `root` of ∇_y objective, with
    ∂y/∂args = -H⁻¹ ∂(∇_y objective)/∂args and H = ∇²_y objective.

    Args:
        objective: Function `objective(y, *args)` to one float.
        solver: Function `solver(objective, y0, *args) -> y`, as for `root`. None: Newton's method that descends,
            by the moduli of H's eigenvalues and off any saddle; with an iterative linear_solver by its solves,
            which stay at a y0 that is stationary.
        linear_solver: As for `root`, with A = H.
        rtol: As for `root`.
        atol: As for `root`.
        max_steps: As for `root`.
        unconverged: As for `root`.

    Returns:
        `solution(y0, *args)`, as for `root`.

    Raises:
        InputError: objective does not return one float; as for `root`.
        KindError, ConvergenceError, StrategyError, BackendError: as for `root`.

    Cost:
        As for `root`, with the gradient for the residual.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gradlab import argmin
        >>> ridge = argmin(lambda y, a: jnp.sum((y - 1.0) ** 2) + a * jnp.sum(y**2))  # 1 / (1 + a)
        >>> print(jax.jacfwd(lambda a: ridge(jnp.zeros(2), a))(1.0))
        [-0.25 -0.25]
        >>> import torch
        >>> ridge = argmin(lambda y, a: ((y - 1.0) ** 2).sum() + a * (y**2).sum())
        >>> torch.func.jacrev(lambda a: ridge(torch.zeros(2), a))(torch.tensor(1.0))
        tensor([-0.2500, -0.2500])

    Source:
        Bengio, Gradient-based optimization of hyperparameters, Neural Computation 12 (2000),
        doi:10.1162/089976600300015187.
    """
