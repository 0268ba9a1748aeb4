"""The implicit methods as solvers for diffrax's loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import lu_factor, lu_solve

from gradlab.transforms.odes._jax_dense import polynomial


class Implicit(dfx.AbstractSolver):
    """A method that solves for its stages; with `integrals` the state is (y, ...), the rest an integral over y.

    The integral comes after the step, by a formula for it: the equations are y's alone.
    """

    tableau: Any = eqx.field(static=True)
    rtol: float = eqx.field(static=True)
    atol: float = eqx.field(static=True)
    norm: Callable[[Any], Any] = eqx.field(static=True)
    integrals: bool = eqx.field(static=True, default=False)
    term_structure: ClassVar = dfx.ODETerm

    @property
    def interpolation_cls(self) -> Any:  # type: ignore[override]
        """The polynomial within a step."""
        return polynomial(self.tableau.name)

    def order(self, terms: Any) -> int:
        """Of the error of a solution."""
        return self.tableau.order

    def func(self, terms: Any, t0: Any, y0: Any, args: Any) -> Any:
        """The slope."""
        return terms.vf(t0, y0, args)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any) -> Any:
        """The slope at the start, as one vector."""
        slope = terms.vf(t0, y0, args)
        return ravel_pytree(slope[0] if self.integrals else slope)[0]

    def step(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any, first: Any, made_jump: Any) -> Any:
        """The state at t1, its error, what the polynomial is made of, the slope at t1, whether it was found."""
        moving, *rest = y0 if self.integrals else (y0,)
        y, unravel = ravel_pytree(moving)
        whole = lambda t, x: terms.vf(t, (unravel(x), *rest) if rest else unravel(x), args)
        f = lambda t, x: ravel_pytree(whole(t, x)[0] if rest else whole(t, x))[0]
        h = terms.contr(t0, t1)
        K, end, error, last, found = self.stages(f, t0, t1 - t0, h, y, first, unravel)
        error = unravel(jnp.where(found, error, jnp.inf))
        dense = {"y0": moving, "k": jax.vmap(unravel)(K)}
        state = unravel(end)
        if rest:
            nodes, weights, rows = (jnp.array(x, y.dtype) for x in self.quadrature)
            at = lambda t, x: terms.vf(t, (unravel(x), *rest), args)[1:]
            slopes = jax.vmap(at)(t0 + nodes * (t1 - t0), y + rows @ K)
            total = lambda q, g: q + (h * jnp.tensordot(weights, g, 1)).astype(q.dtype)
            state = (state, *jax.tree.map(total, tuple(rest), slopes))
            error = (error, *jax.tree.map(jnp.zeros_like, rest))
        result = dfx.RESULTS.where(found, dfx.RESULTS.successful, dfx.RESULTS.nonlinear_divergence)
        return state, error, dense, last, result

    def factors(self, f: Callable[..., Any], t: Any, h: Any, y: Any) -> Any:
        """Of I - h γ ∂f/∂y."""
        J = jax.jacfwd(lambda x: f(t, x))(y)
        return lu_factor(jnp.eye(len(y), dtype=y.dtype) - h * self.tableau.diagonal * J)

    @property
    def quadrature(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """θ of its nodes, their weights, and the rows by which K gives the states there."""
        raise NotImplementedError

    def stages(
        self, f: Callable[..., Any], t0: Any, dt: Any, h: Any, y: Any, first: Any, unravel: Any
    ) -> Any:
        """K, h times the slopes; the state at the end, its error, the slope there, whether all was solved."""
        raise NotImplementedError


class Esdirk(Implicit):
    """Stages one after the other, by Newton's iteration with the Jacobian at the start of the step."""

    @property
    def quadrature(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The stages: so the integral is what it would be as a part of the state."""
        tableau = self.tableau
        diagonal = np.diag([0.0, *[tableau.diagonal] * (tableau.stages - 1)])
        return np.array(tableau.c), np.array(tableau.b), padded(tableau.a) + diagonal

    def stages(
        self, f: Callable[..., Any], t0: Any, dt: Any, h: Any, y: Any, first: Any, unravel: Any
    ) -> Any:
        """kᵢ = h f(t + cᵢ h, y + Σⱼ aᵢⱼ kⱼ + γ kᵢ), the first being known from the last step."""
        tableau, n = self.tableau, self.tableau.stages
        gamma = tableau.diagonal
        lu = self.factors(f, t0, h, y)
        rows = lambda lists: jnp.array(padded(lists)[1:], y.dtype)
        size = lambda x, scale: self.norm(unravel(x / scale))

        def solve(K: Any, stage: Any) -> Any:
            i, c, a, guess = stage
            base, t = y + a @ K, t0 + c * dt

            def improve(state: Any) -> Any:
                k, last, count, _, _ = state
                x = base + gamma * k
                d = lu_solve(lu, h * f(t, x) - k)
                moved = gamma * size(d, self.atol + self.rtol * jnp.maximum(jnp.abs(y), jnp.abs(x)))
                rate = moved / last
                rounding = jnp.max(jnp.abs(d)) <= 4 * jnp.finfo(y.dtype).eps * jnp.max(jnp.abs(x))
                done = (moved == 0) | rounding | ((count > 0) & (moved * rate < 0.01 * (1 - rate)))
                failed = ~jnp.isfinite(moved) | ((rate > 2) & ~done)
                return k + d, moved, count + 1, done, failed

            going = lambda state: ~(state[3] | state[4]) & (state[2] < 10)
            start = guess @ K, jnp.full((), jnp.inf, y.dtype), 0, jnp.array(False), jnp.array(False)
            k, _, _, done, _ = jax.lax.while_loop(going, improve, start)
            return K.at[i].set(k), done

        K = jnp.zeros((n, len(y)), y.dtype).at[0].set(h * first)
        cs = jnp.array(tableau.c[1:], y.dtype)
        K, found = jax.lax.scan(solve, K, (jnp.arange(1, n), cs, rows(tableau.a), rows(tableau.guesses)))
        end = y + jnp.array(tableau.b, y.dtype) @ K
        return K, end, jnp.array(tableau.error, y.dtype) @ K, K[-1] / h, found.all()


class Rosenbrock(Implicit):
    """Stages that are linear equations, of one matrix."""

    @property
    def quadrature(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gauss's, along the polynomial of the step."""
        nodes, weights = np.polynomial.legendre.leggauss(4)
        theta, dense = (nodes + 1) / 2, np.array(self.tableau.dense)
        return theta, weights / 2, theta[:, None] ** np.arange(1, len(dense) + 1) @ dense

    def stages(
        self, f: Callable[..., Any], t0: Any, dt: Any, h: Any, y: Any, first: Any, unravel: Any
    ) -> Any:
        """(I - h γ J) uᵢ = γ (h f(t + cᵢ h, y + Σⱼ aᵢⱼ uⱼ) + Σⱼ couplingᵢⱼ uⱼ + h² driftᵢ ∂f/∂t)."""
        tableau, n = self.tableau, self.tableau.stages
        gamma = tableau.diagonal
        lu = self.factors(f, t0, h, y)
        in_time = jax.jvp(lambda t: f(t, y), (t0,), (dt,))[1].astype(y.dtype)
        rows = lambda lists: jnp.array(padded(lists), y.dtype)

        def solve(U: Any, stage: Any) -> Any:
            i, c, a, coupling, drift = stage
            slope = f(t0 + c * dt, y + a @ U) + drift * in_time
            return U.at[i].set(lu_solve(lu, gamma * (h * slope + coupling @ U))), None

        cs, drifts = jnp.array(tableau.c, y.dtype), jnp.array(tableau.drift, y.dtype)
        stages = jnp.arange(n), cs, rows(tableau.a), rows(tableau.coupling), drifts
        U, _ = jax.lax.scan(solve, jnp.zeros((n, len(y)), y.dtype), stages)
        end, error = (jnp.array(weights, y.dtype) @ U for weights in (tableau.b, tableau.error))
        return U, y + end, error, first, jnp.isfinite(end).all()


def padded(rows: Any) -> np.ndarray:
    """Rows of a triangle as a square matrix."""
    return np.array([[*row, *[0.0] * (len(rows) - len(row))] for row in rows])
