"""The stages of one step: explicit, diagonally implicit by Newton's method, or of a Rosenbrock method.

K holds h times the slope of each stage (of a Rosenbrock method what its linear equations give), and Q the same of
the integrands; the end of the step, its error and its polynomial are sums of the rows of K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from gradlab.transforms.odes.rosenbrock import Rosenbrock
from gradlab.transforms.odes.tableaux import Tableau
from gradlab.transforms.repairs._torch import unseen

NEWTON = 0.01  # the error of a stage's equation, as a share of the tolerances
ITERATIONS = 10


@dataclass
class Field:
    """What is integrated, of states (B, n) at times (B,), given as the host has them and as a tensor."""

    slopes: Callable[[Any, Any, Any], tuple[Any, Any]]  # (time, t, y) -> slope, integrands (B, m) or None
    jacobians: Callable[[Any, Any, Any], tuple[Any, Any]]  # (time, t, y) -> ∂f/∂y (B, n, n), ∂f/∂t (B, n)
    ahead: Callable[[list[float]], None] | None = (
        None  # told of the times of one example's step, to prepare for them
    )
    compiled: Callable[..., Any] | None = None  # a whole step of one example
    begin: Callable[..., Any] | None = None  # its first slope and what the first step is chosen by, compiled
    shape: tuple[int, ...] | None = None  # of one example's states and slopes there; None: (1, n)

    def __call__(self, time: Any, t: Any, y: Any) -> tuple[Any, Any]:
        """slopes, of (B, n) and so itself."""
        if self.shape is None:
            return self.slopes(time, t, y)
        slope, integrand = self.slopes(time, t, y.view(self.shape))
        return slope.reshape(y.shape), integrand


def combined(row: Sequence[Any], slopes: Sequence[Any]) -> Any:
    """A sum of slopes with these weights."""
    terms = [w * k for w, k in zip(row, slopes, strict=False) if not (isinstance(w, (int, float)) and w == 0)]
    return sum(terms[1:], terms[0])


def jacobians(rates: Callable[..., Any], t: Any, y: Any) -> tuple[Any, Any]:
    """∂f/∂y (B, n, n) and ∂f/∂t (B, n) by the pullback of every output: all at once, or one by one where torch's batch
    of them is wrong.
    """
    with unseen(torch.enable_grad()):
        t, y = t.detach().reshape(-1).requires_grad_(), y.detach().requires_grad_()
        slope = rates(t, y)
    (B, n), back = y.shape, partial(_pulled, slope, (y, t))
    if not slope.requires_grad:
        return y.new_zeros(B, n, n), y.new_zeros(B, n)
    eye = torch.eye(n, dtype=y.dtype, device=y.device)[:, None].expand(n, B, n)
    with suppress(RuntimeError):
        J, drift = back(eye, is_grads_batched=True)
        u = torch.linspace(1, 2, n, dtype=y.dtype, device=y.device)
        off = (torch.tensordot(u, J, 1) - back(u.expand(B, n))[0]).abs().amax(-1)
        if bool((off <= n * torch.finfo(y.dtype).eps ** 0.5 * J.abs().amax((0, 2))).all()):
            return J.movedim(0, 1), drift.mT
    rows = [back(e) for e in eye]
    return torch.stack([row[0] for row in rows], 1), torch.stack([row[1] for row in rows], 1)


def _pulled(slope: Any, inputs: Any, u: Any, **options: Any) -> Any:
    return torch.autograd.grad(slope, inputs, u, retain_graph=True, materialize_grads=True, **options)


@dataclass
class Weights:
    """A tableau as tensors."""

    a: list[Any]
    b: Any
    error: Any  # the error, the step, and (explicit methods) two differences of slopes and states at the end
    dense: Any
    c: Any
    back: Any  # of each stage, its weights in all the others
    rounding: float  # of the error, as a share of the step
    inner: list[Any]  # what predicts a stage, or couples it to those before


@cache
def weights(tableau: Tableau | Rosenbrock, dtype: torch.dtype, device: torch.device) -> Weights:
    """A tableau as tensors of this kind."""
    tensor = lambda row: torch.tensor(row, dtype=dtype, device=device)
    rows = [] if tableau.error is None else [tableau.error, tableau.b]
    if not tableau.implicit and tableau.c[-2] == tableau.c[-1]:  # two slopes and their states at the end
        n, unit = tableau.stages, lambda i: [float(i == j) for j in range(tableau.stages)]
        last, other = [*tableau.a[-1], 0.0], [*tableau.a[-2], 0.0, 0.0]
        rows += [np.subtract(unit(n - 1), unit(n - 2)).tolist(), np.subtract(last, other).tolist()]
    inner = tableau.coupling if isinstance(tableau, Rosenbrock) else tableau.guesses
    return Weights(
        [tensor(row) for row in tableau.a],
        tensor(tableau.b),
        tensor(rows),
        tensor(tableau.dense),
        tensor(tableau.c),
        tensor([[*row, *[0.0] * (tableau.stages - len(row))] for row in tableau.a]).T,
        3 * torch.finfo(dtype).eps * float(np.linalg.norm(tableau.error or 0.0)),
        [tensor(row) for row in inner],
    )


class Stages:
    """Those of an explicit method. `run` is the integration that they are of."""

    def __init__(self, run: Any, tableau: Any):
        self.run, self.tableau = run, tableau
        self.weights = weights(tableau, run.y.dtype, run.y.device)
        stages, (B, n) = tableau.stages, run.shape
        self.K = run.y.new_empty(stages, B, n)
        self.flat = self.K.view(stages, B * n)
        self.before = [None, *(self.flat[:i].T for i in range(1, stages))]
        self.Q: Any = None
        if run.integrand is not None:
            self.Q = run.y.new_empty(stages, *run.integrand.shape)

    def __call__(self, t: Any, h: Any) -> tuple[Any, Any, Any, Any]:
        """y, slope and integrand at the end of a step, and which examples found none."""
        run, column, times, flat = self.run, *self.begin(t, h)
        if run.f.ahead is not None and run.one:
            run.f.ahead([t + c * h for c in self.tableau.c[1:]])
        torch.mul(run.slope, column, out=self.K[0])
        for i in range(1, self.tableau.stages):
            y = torch.addmv(flat, self.before[i], self.weights.a[i]).view(run.shape)
            slope, integrand = run.f(t + self.tableau.c[i] * h, times[i], y)
            torch.mul(slope, column, out=self.K[i])
            if self.Q is not None:
                torch.mul(integrand, column, out=self.Q[i])
        run.evaluations += self.tableau.stages - 1
        return y, slope, integrand, run.nobody

    def begin(self, t: Any, h: Any) -> tuple[Any, Any, Any]:
        """h as a factor of states, the times of the stages, and y, flat."""
        run, column = self.run, self.run.column(h)
        times = (column * self.weights.c + run.column(t)).view(-1, self.tableau.stages).T.unbind()
        if self.Q is not None:
            torch.mul(run.integrand, column, out=self.Q[0])
        return column, times, run.y.view(-1)

    errors: Any  # the first of the rows of the weights of errors

    def judged(self, size: Any) -> Any:
        """How large the error is in units of the tolerances, where |y| is `size` at the end, and the step itself."""
        return self.run.norms(self.sums(self.errors), self.run.scale(torch.maximum(self.run.size, size)))

    def sums(self, rows: Any) -> Any:
        """Sums (k, B, n) of the stages with these weights (k, stages)."""
        return (rows @ self.flat).view(-1, *self.run.shape)

    def gained(self, total: Any) -> Any:
        """The integrals at the end of the step."""
        return None if total is None else total + torch.tensordot(self.weights.b, self.Q, 1)

    def polynomial(self) -> Any:
        """The coefficients (degree, B, n) of the powers of θ, from the first on."""
        return self.sums(self.weights.dense)


class Single(Stages):
    """Those of one example, where h is a number: K holds the slopes themselves, and Q the sum alone."""

    def __init__(self, run: Any, tableau: Any):
        self.run, self.tableau = run, tableau
        self.weights = weights(tableau, run.y.dtype, run.y.device)
        self.flat = run.y.new_empty(tableau.stages, run.y.numel())
        self.rows = self.flat.view(-1, *(run.shape if run.f.shape is None else run.f.shape)).unbind()
        columns = self.flat.T
        self.before = [None, *(columns.narrow(1, 0, i) for i in range(1, tableau.stages))]

    def __call__(self, t: Any, h: Any) -> tuple[Any, Any, Any, Any]:
        """As of Stages."""
        run, c, a, b = self.run, self.tableau.c, self.weights.a, self.tableau.b
        self.h, flat, slopes, shape = (
            h,
            run.y.view(-1),
            run.f.slopes,
            run.shape if run.f.shape is None else run.f.shape,
        )
        if run.f.ahead is not None:
            run.f.ahead([t + x * h for x in c[1:]])
        times = (self.weights.c * h).add_(t).unbind()
        self.flat[0].copy_(run.slope[0])
        self.Q = integrand = run.integrand
        if integrand is not None:
            self.Q = integrand * (b[0] * h)
        for i in range(1, len(c)):
            y = torch.addmv(flat, self.before[i], a[i], alpha=h)
            slope, integrand = slopes(t + c[i] * h, times[i], y.view(shape))
            self.rows[i].copy_(slope)
            if integrand is not None and b[i] != 0:
                self.Q.add_(integrand, alpha=b[i] * h)
        run.evaluations += len(c) - 1
        return y.view(run.shape), slope.reshape(run.shape), integrand, False

    def judged(self, size: Any) -> Any:
        """As of Stages."""
        run, unit = self.run, abs(self.h)
        scale = run.scale(torch.maximum(run.size, size))
        return [x * unit for x in run.norms((self.errors @ self.flat)[:, None], scale)]

    def sums(self, rows: Any) -> Any:
        """As of Stages."""
        return (rows @ self.flat).mul_(self.h).view(-1, *self.run.shape)

    def gained(self, total: Any) -> Any:
        """As of Stages."""
        return None if total is None else total + self.Q


class Implicit(Stages):
    """What the implicit ones share: I - h γ ∂f/∂y, as it is at the start of the step."""

    seen: Any = None
    J: Any = None
    drift: Any = None

    def factors(self, t: Any, time: Any, h: Any) -> Any:
        """The solution of (I - h γ J) x = b (B, n), by one factorisation; J is kept while a step is tried again."""
        run = self.run
        if self.seen != run.moves:
            self.J, self.drift = run.f.jacobians(t, time, run.y)
            self.seen = run.moves
            run.evaluations += 1
        wide = torch.promote_types(run.y.dtype, torch.float32)
        factor = (-self.tableau.diagonal * run.column(h)).to(wide)
        M = factor[..., None] * self.J.to(wide) if factor.ndim else factor * self.J.to(wide)
        M.diagonal(dim1=-2, dim2=-1).add_(1)
        LU, pivots, _ = torch.linalg.lu_factor_ex(M)
        return lambda b: torch.linalg.lu_solve(LU, pivots, b.to(wide)[..., None])[..., 0].to(b.dtype)


class Diagonal(Implicit):
    """Singly diagonally implicit stages: k = f(t, base + h γ k) by Newton's method with one matrix for all."""

    def __call__(self, t: Any, h: Any) -> tuple[Any, Any, Any, Any]:
        """As of Stages."""
        run, column, times, flat = self.run, *self.begin(t, h)
        torch.mul(run.slope, column, out=self.K[0])
        solve = self.factors(t, times[0], h)
        scale = self.scale()
        failed, self.rate, integrand = run.nobody, run.nobody + 1.0, None
        for i in range(1, self.tableau.stages):
            base = torch.addmv(flat, self.before[i], self.weights.a[i]).view(run.shape)
            guess = torch.mv(self.before[i], self.weights.inner[i]).view(run.shape)
            at = partial(run.f, t + self.tableau.c[i] * h, times[i])
            self.K[i], lost = self.newton(at, base, guess, column, solve, scale, h)
            failed = failed | lost
            y = torch.add(base, self.K[i], alpha=self.tableau.diagonal)
            if self.Q is not None:
                integrand = at(y)[1]
                torch.mul(integrand, column, out=self.Q[i])
        return y, self.K[-1] / column, integrand, failed

    def scale(self) -> Any:
        """What the error of a stage's equation is measured in; with fixed steps, rounding."""
        run, size = self.run, self.run.size
        if run.tolerance.step_size is None:
            return NEWTON * torch.add(run.atol, size, alpha=run.tolerance.rtol)
        return 8 * torch.finfo(size.dtype).eps * (size + size.amax(-1, keepdim=True)) + 1e-300

    def newton(self, at: Any, base: Any, z: Any, column: Any, solve: Any, scale: Any, h: Any) -> Any:
        """z = h f(base + γ z), and which examples did not come to it.

        The error left is that of a geometric series by the rate at which corrections shrink (Hairer and Wanner 1996,
        IV.8), which the stages of a step have in common.
        """
        run, chosen, last = self.run, self.run.chosen, None
        fixed = run.tolerance.step_size is not None
        active, lost = run.going & (h != 0), run.nobody
        for _ in range(2 * ITERATIONS if fixed else ITERATIONS):
            slope, _ = at(torch.add(base, z, alpha=self.tableau.diagonal))
            run.evaluations += 1
            correction = solve(torch.addcmul(-z, slope, column))
            size = run.norm(correction, scale)
            z = z + correction if run.every(active) else torch.where(run.mask(active), z + correction, z)
            if last is not None:
                self.rate = chosen(active, size / run.most(last, 1e-300), self.rate)
            rate = run.least(self.rate, 1.0)
            left = size * rate / run.most(1 - rate, 1e-16)
            small = (left <= 1) | (size <= 1e-2)
            if fixed and last is not None:  # rounding: no more is to be had
                small = small | ((size < 1e3) & (size >= 0.5 * last))
            grows = run.unless(np.isfinite(size) if last is None else size < 2 * last)
            lost = lost | (active & grows & run.unless(small))
            active = active & run.unless(small | grows)
            if not run.some(active):
                break
            last = size
        return z, lost | active


class Linear(Implicit):
    """Rosenbrock stages: linear equations with one matrix."""

    def __call__(self, t: Any, h: Any) -> tuple[Any, Any, Any, Any]:
        """As of Stages."""
        run, column, times, flat = self.run, *self.begin(t, h)
        solve, tableau, w = self.factors(t, times[0], h), self.tableau, self.weights
        slope = run.slope
        drift = column**2 * self.drift
        for i in range(tableau.stages):
            if i > 0:
                y = torch.addmv(flat, self.before[i], w.a[i]).view(run.shape)
                slope, _ = run.f(t + tableau.c[i] * h, times[i], y)
            right = torch.addcmul(tableau.drift[i] * drift, slope, column)
            if i > 0:
                right = right + torch.mv(self.before[i], w.inner[i]).view(run.shape)
            self.K[i] = solve(tableau.diagonal * right)
        y = run.y + self.sums(w.b[None])[0]
        slope, integrand = run.f(t + h, run.column(t + h).view(-1), y)
        run.evaluations += tableau.stages
        return y, slope, integrand, run.nobody


def stages(run: Any, tableau: Tableau | Rosenbrock) -> Stages:
    """Those of this method."""
    if isinstance(tableau, Rosenbrock):
        return Linear(run, tableau)
    if tableau.implicit:
        return Diagonal(run, tableau)
    if run.f.compiled is not None:
        from gradlab.transforms.odes._torch_compiled import Compiled

        return Compiled(run, tableau)
    return (Single if run.one else Stages)(run, tableau)
