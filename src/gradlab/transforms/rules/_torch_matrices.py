"""Functions of matrices, as series and rules that hold where eigenvalues meet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from math import factorial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gradlab._errors import InputError, KindError, StrategyError
from gradlab.transforms.custom_rules._torch import custom_jvp
from gradlab.transforms.custom_rules._torch_levels import tracked
from gradlab.transforms.implicit_functions._torch import held, root
from gradlab.transforms.implicit_functions._torch_levels import Substituted, closed_over, complain
from gradlab.transforms.implicit_functions.options import Options
from gradlab.transforms.rules._torch_scalars import norm, real
from gradlab.transforms.trees._torch import as_tensor


def eigh(A: Any) -> Any:
    return _eigh(_hermitian(A))


@custom_jvp
def _eigh(A: Any) -> Any:
    return tuple(torch.linalg.eigh(A))


@custom_jvp
def _eigh_once(A: Any) -> Any:
    """The same, whose derivative at equal eigenvalues is NaN: it would be a second one, which lacks a term."""
    return tuple(torch.linalg.eigh(A))


def _moved(at_equal: float, primals: Any, tangents: Any) -> Any:
    (A,), (dA,) = primals, tangents
    w, V = _eigh_once(A)
    E = V.mH @ dA @ V
    gap, equal = w[..., None, :] - w[..., :, None], _equal(w)
    same = torch.where(torch.eye(w.shape[-1], dtype=torch.bool, device=w.device), 0.0, at_equal)
    F = torch.where(equal, same, 1 / torch.where(equal, 1.0, gap))
    return (w, V), (E.diagonal(0, -2, -1).real, V @ (F * E))


_eigh.defjvp(partial(_moved, 0.0))


_eigh_once.defjvp(partial(_moved, torch.nan))


def matrix_function(f: Callable[[Any], Any], A: Any, order: int = 3) -> Any:
    _refuse_order("matrix_function", order)
    A = _hermitian(A)
    w, V = torch.linalg.eigh(A.detach())
    D = V.mH @ A @ V
    moved = D - D.detach()  # zero, but for its derivatives, in which this is a series
    total = f(w).diag_embed().to(V.dtype)
    for k in range(1, order + 1):
        total = total + torch.einsum(_SERIES[k], _divided(f, w, k).to(V.dtype), *[moved] * k)
    return V @ total @ V.mH


_SERIES = {1: "...ij,...ij->...ij", 2: "...ijk,...ij,...jk->...ik", 3: "...ijkl,...ij,...jk,...kl->...il"}


def _divided(f: Callable[[Any], Any], w: Any, k: int) -> Any:
    """f[wᵢ, wⱼ, ...] of k + 1 of the numbers w, an axis each."""
    nodes = [w.reshape(*w.shape[:-1], *(-1 if i == j else 1 for j in range(k + 1))) for i in range(k + 1)]
    return _difference(f, torch.stack(torch.broadcast_tensors(*nodes)).sort(0).values)[0]


def _difference(f: Callable[[Any], Any], z: Any) -> tuple[Any, Any]:
    """f[z₀, ..., z_k] of sorted nodes along the leading axis, and its error.

    The quotient of two lower ones, or where that loses more to rounding Taylor's series, if the two agree.
    """
    k, eps = len(z) - 1, torch.finfo(z.dtype).eps
    if not k:
        value = f(z[0])
        return value, eps * (value.abs() + (z[0] * _derivative(f, 1)(z[0])).abs())
    gap = z[-1] - z[0]
    apart = torch.where(gap == 0, 1.0, gap)
    (upper, above), (lower, below) = _difference(f, z[1:]), _difference(f, z[:-1])
    quotient, noise = (upper - lower) / apart, (above + below) / apart
    series, last = _meeting(f, z)
    cut = last.abs() + eps * series.abs()
    better = (cut < noise) & ((series - quotient).abs() <= 10 * noise)
    taken = (gap == 0) | better
    return torch.where(taken, series, quotient), torch.where(taken, cut, noise)


def _meeting(f: Callable[[Any], Any], z: Any) -> tuple[Any, Any]:
    """f[z₀, ..., z_k] of nodes that are close: f⁽ᵏ⁾/k! at their mean, and the term of second order; and that term."""
    k, mean = len(z) - 1, z.mean(0)
    spread = ((z - mean) ** 2).sum(0) / (2 * (k + 1) * (k + 2))
    last = spread * _derivative(f, k + 2)(mean) / factorial(k)
    last = torch.where(torch.isfinite(last), last, 0.0)  # a derivative that overflows, or is infinite at zero
    return _derivative(f, k)(mean) / factorial(k) + last, last


def _derivative(f: Callable[[Any], Any], k: int) -> Callable[[Any], Any]:
    """The k-th derivative of an elementwise function."""
    if not k:
        return f
    lower = _derivative(f, k - 1)
    return lambda x: torch.func.vjp(lower, x)[1](torch.ones_like(x))[0]


def expm(A: Any) -> Any:
    return torch.linalg.matrix_exp(A)


def logdet(A: Any) -> Any:
    return _logdet(real("logdet", A, "A"))


@custom_jvp
def _logdet(A: Any) -> Any:
    return torch.linalg.slogdet(A)[1]


@_logdet.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (A,), (dA,) = primals, tangents
    return _logdet(A), (_inverse(A).mT * dA).sum((-2, -1))


@custom_jvp
def _inverse(A: Any) -> Any:
    X, singular = torch.linalg.inv_ex(A)  # which does not raise, for one of many
    return torch.where(singular[..., None, None] != 0, torch.inf, X)


@_inverse.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (A,), (dA,) = primals, tangents
    X = _inverse(A)
    return X, -X @ dA @ X


@torch.compiler.disable  # which would unroll the iterations for minutes
def stochastic_logdet(
    matvec: Callable[..., Any], probes: Any, *params: Any, steps: int = 30, order: int = 3
) -> Any:
    _refuse_order("stochastic_logdet", order)
    probes = _probes(probes, steps)
    fixed = _held_matvec(matvec, probes[0], held(params))
    with torch.no_grad():
        quadrature = lambda z: _quadrature(fixed, z, min(steps, z.shape[0]))
        values, sizes, bad = torch.func.vmap(quadrature)(probes)
    complain(Options("root", fixed, None, "cg", None, None, None, "raise"), bad, INDEFINITE)

    def series(z: Any, size: Any) -> Any:
        inverse = root(lambda y, b: fixed(y) / size - b, linear_solver="cg")
        total, v = torch.zeros_like(size), z
        w = inverse(torch.zeros_like(z), z) / size if order else z
        for k in range(1, order + 1):
            moved = matvec(v, *params) - fixed(v)  # zero, but for its derivatives, in which this is a series
            total = total - (-1) ** k / k * (w * moved).sum()
            v = inverse(torch.zeros_like(z), moved) / size if k < order else v
        return total

    return (values + torch.func.vmap(series)(probes, sizes)).mean()


INDEFINITE = "rules.stochastic_logdet: A is not positive definite; pass products with a matrix that is"


def _held_matvec(matvec: Callable[..., Any], z: Any, params: Any) -> Callable[[Any], Any]:
    """v ↦ A v, of which what matvec closes over has no derivative either."""
    used = closed_over(lambda z: _refuse_unlike(matvec(z, *params), z), z)
    moving = [t for t in used if tracked(t)]

    def fixed(v: Any) -> Any:
        with Substituted(moving, held(moving)) if moving else nullcontext():
            return matvec(v, *params)

    if tracked(fixed(z)):
        raise StrategyError(
            "rules.stochastic_logdet: matvec closes over a tensor that is being differentiated, out of sight; "
            "pass it as one of params"
        )
    return fixed


def _quadrature(matvec: Callable[..., Any], z: Any, steps: int) -> tuple[Any, Any, Any]:
    """zᵀ log(A) z, by Lanczos' iteration with full orthogonalisation; the size of A; whether A is not definite."""
    size = norm(z)
    basis, diagonal, beside = [z / torch.where(size == 0, 1.0, size)], [], []
    for _ in range(steps):
        q, Q = basis[-1], torch.stack(basis)
        v = matvec(q)
        a = torch.where((q == 0).all(), 1.0, (q * v).sum())
        for _ in range(2):
            v = v - Q.mT @ (Q @ v)
        b = norm(v)
        lost = b <= 100 * torch.finfo(v.dtype).eps * a.abs()  # the space is exhausted
        diagonal.append(a)
        beside.append(torch.where(lost, 0.0, b))
        basis.append(torch.where(lost, 0.0, v / torch.where(lost, 1.0, b)))
    a, b = torch.stack(diagonal), torch.stack(beside)[:-1]
    theta, U = torch.linalg.eigh(a.diag_embed() + b.diag_embed(1) + b.diag_embed(-1))
    tau, bad = U[0], ~(theta > 0).all()
    return size**2 * (tau**2 * theta.log()).sum(), a[0].abs(), bad


def _refuse_order(op: str, order: Any) -> None:
    if type(order) is not int or not 0 <= order <= 3:
        raise InputError(f"rules.{op}: order is {order!r}; pass 0, 1, 2 or 3")


def _probes(probes: Any, steps: Any) -> Any:
    """The probes, as a matrix of floats."""
    probes = as_tensor(probes)
    if not isinstance(probes, torch.Tensor) or not probes.is_floating_point():
        kind = getattr(probes, "dtype", type(probes).__name__)
        raise KindError(f"rules.stochastic_logdet: probes is {kind}; pass a tensor of floats")
    if probes.ndim != 2 or 0 in probes.shape or type(steps) is not int or steps < 1:
        raise InputError(
            f"rules.stochastic_logdet: probes has shape {tuple(probes.shape)}, steps is {steps!r}; "
            "pass probes of shape (k, n) and a positive whole number of steps"
        )
    if tracked(probes):
        raise StrategyError(
            "rules.stochastic_logdet: probes are being differentiated, in which the estimate has no derivative here; "
            "hold them constant by .detach()"
        )
    return probes


def _refuse_unlike(v: Any, z: Any) -> None:
    given = [(tuple(x.shape), x.dtype) for x in pytree.tree_leaves(v)]
    if given != [(tuple(z.shape), z.dtype)]:
        raise InputError(
            f"rules.stochastic_logdet: matvec of a vector {tuple(z.shape)} of {z.dtype} has given {given}; "
            "return a vector like it"
        )


def _hermitian(A: Any) -> Any:
    return (A + A.mH) / 2


def _equal(w: Any) -> Any:
    """Which eigenvalues are the same to rounding; each is to itself."""
    size = w.abs().amax(-1)[..., None, None]
    return (w[..., None, :] - w[..., :, None]).abs() <= 100 * w.shape[-1] * torch.finfo(w.dtype).eps * size
