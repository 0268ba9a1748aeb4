"""Rules as compositions where these are exact, by `custom_jvp` where they are not."""

from __future__ import annotations

from collections.abc import Callable
from math import factorial, log
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gradlab._errors import InputError
from gradlab.transforms.custom_rules._torch import custom_jvp, custom_vjp
from gradlab.transforms.implicit_functions._torch import held, root

Axis = int | tuple[int, ...] | None


def norm(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    axis = tuple(range(x.ndim)) if axis is None else axis
    m = _largest(x.detach().abs(), axis, 0.0)
    m = torch.where((m > 0) & m.isfinite(), m, 1.0)
    length = sqrt(((x / m) ** 2).sum(axis, keepdim=True)) * m
    return length if keepdims else length.squeeze(axis)


def sqrt(x: Any) -> Any:
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def log1mexp(x: Any) -> Any:
    small = x < log(2.0)
    inside = torch.where(small, 1.0, x)  # of the second branch, which must not see what it cannot take
    return torch.where(small, torch.log(-torch.expm1(-x)), torch.log1p(-torch.exp(-inside)))


def logsumexp(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    axis = tuple(range(x.ndim)) if axis is None else axis
    m = _largest(x.detach(), axis, -torch.inf)
    m = torch.where(m == -torch.inf, 0.0, m)
    total = torch.exp(x - m).sum(axis, keepdim=True)
    empty = total == 0
    found = torch.where(empty, -torch.inf, torch.where(empty, 1.0, total).log() + m)
    found = torch.where(m == torch.inf, torch.inf, found)
    return found if keepdims else found.squeeze(axis)


def straight_through(hard: Any, soft: Any) -> Any:
    if pytree.tree_structure(hard) != pytree.tree_structure(soft):
        raise InputError(
            "rules.straight_through: hard and soft have different structures; pass two like trees"
        )
    for a, b in zip(pytree.tree_leaves(hard), pytree.tree_leaves(soft), strict=True):
        if tuple(a.shape) != tuple(b.shape):
            raise InputError(
                f"rules.straight_through: hard has shape {tuple(a.shape)} where soft has {tuple(b.shape)}; "
                "pass two like trees"
            )
    return pytree.tree_map(lambda a, b: a.detach() + (b - b.detach()), hard, soft)


def reverse_gradient(x: Any, scale: float = 1.0) -> Any:
    return _reversed(x, scale)


@custom_jvp
def _reversed(x: Any, scale: float) -> Any:
    return x


@_reversed.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x, scale), (v, _) = primals, tangents
    return x, pytree.tree_map(lambda v: -scale * v, v)


def clip_gradient(x: Any, max_norm: float) -> Any:
    if not max_norm > 0:
        raise InputError(f"rules.clip_gradient: max_norm is {max_norm!r}; pass a positive number")
    leaves, structure = pytree.tree_flatten(x)
    return pytree.tree_unflatten(_Clipped.apply(max_norm, *leaves), structure)


class _Clipped(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(max_norm: float, *leaves: Any) -> Any:
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.max_norm = inputs[0]

    @staticmethod
    def backward(ctx: Any, *us: Any) -> Any:
        size = norm(torch.stack([norm(u) for u in us]))
        factor = ctx.max_norm / size.clamp(min=ctx.max_norm)
        return (None, *(factor.to(u.dtype) * u for u in us))


def eigh(A: Any) -> Any:
    return _eigh(_hermitian(A))


@custom_jvp
def _eigh(A: Any) -> Any:
    return tuple(torch.linalg.eigh(A))


@_eigh.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (A,), (dA,) = primals, tangents
    w, V = _eigh(A)
    E = V.mH @ dA @ V
    gap = w[..., None, :] - w[..., :, None]
    F = torch.where(_equal(w), 0.0, 1 / torch.where(_equal(w), 1.0, gap))
    return (w, V), (E.diagonal(0, -2, -1).real, V @ (F * E))


def matrix_function(f: Callable[[Any], Any], A: Any, order: int = 3) -> Any:
    if order not in (0, 1, 2, 3):
        raise InputError(f"rules.matrix_function: order is {order!r}; pass 0, 1, 2 or 3")
    A = _hermitian(A)
    w, V = torch.linalg.eigh(A.detach())
    D = V.mT @ A @ V
    moved = D - D.detach()  # zero, but for its derivatives, in which this is a series
    total = f(w).diag_embed()
    for k in range(1, order + 1):
        total = total + torch.einsum(_SERIES[k], _divided(f, w, k), *[moved] * k)
    return V @ total @ V.mT


_SERIES = {1: "...ij,...ij->...ij", 2: "...ijk,...ij,...jk->...ik", 3: "...ijkl,...ij,...jk,...kl->...il"}


def _divided(f: Callable[[Any], Any], w: Any, k: int) -> Any:
    """f[wᵢ, wⱼ, ...] of k + 1 of the numbers w, an axis each; by Taylor's series where they nearly meet."""
    nodes = [w.reshape(*w.shape[:-1], *(-1 if i == j else 1 for j in range(k + 1))) for i in range(k + 1)]
    return _difference(f, torch.stack(torch.broadcast_tensors(*nodes)).sort(0).values)


def _difference(f: Callable[[Any], Any], z: Any) -> Any:
    """f[z₀, ..., z_k] of sorted nodes along the leading axis."""
    k = len(z) - 1
    if not k:
        return f(z[0])
    gap = z[-1] - z[0]
    near = gap <= torch.finfo(z.dtype).eps ** (1 / (k + 2)) * z.abs().amax(0).clamp(min=1.0)
    quotient = (_difference(f, z[1:]) - _difference(f, z[:-1])) / torch.where(near, 1.0, gap)
    return torch.where(near, _meeting(f, z), quotient)


def _meeting(f: Callable[[Any], Any], z: Any) -> Any:
    """f[z₀, ..., z_k] of nodes that are close: f⁽ᵏ⁾/k! at their mean, and the term of second order."""
    k, mean = len(z) - 1, z.mean(0)
    spread = ((z - mean) ** 2).sum(0) / (2 * (k + 1) * (k + 2))
    return (_derivative(f, k)(mean) + spread * _derivative(f, k + 2)(mean)) / factorial(k)


def _derivative(f: Callable[[Any], Any], k: int) -> Callable[[Any], Any]:
    """The k-th derivative of an elementwise function."""
    if not k:
        return f
    lower = _derivative(f, k - 1)
    return lambda x: torch.func.vjp(lower, x)[1](torch.ones_like(x))[0]


def expm(A: Any) -> Any:
    return torch.linalg.matrix_exp(A)


@custom_jvp
def logdet(A: Any) -> Any:
    return torch.linalg.slogdet(A)[1]


@logdet.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (A,), (dA,) = primals, tangents
    return logdet(A), (_inverse(A).mT * dA).sum((-2, -1))


@custom_jvp
def _inverse(A: Any) -> Any:
    return torch.linalg.inv(A)


@_inverse.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (A,), (dA,) = primals, tangents
    X = _inverse(A)
    return X, -X @ dA @ X


def stochastic_logdet(
    matvec: Callable[..., Any], probes: Any, *params: Any, steps: int = 30, order: int = 3
) -> Any:
    if probes.ndim != 2 or steps < 1 or order not in (0, 1, 2, 3):
        raise InputError(
            f"rules.stochastic_logdet: probes has shape {tuple(probes.shape)}, steps is {steps!r}, order is {order!r}; "
            "pass probes of shape (k, n), a positive number of steps, and an order from 0 to 3"
        )
    fixed_params = held(params)
    fixed = lambda v: matvec(v, *fixed_params)
    inverse = root(lambda y, b: fixed(y) - b, linear_solver="cg")

    def one(z: Any) -> Any:
        total, v = _quadrature(fixed, z, min(steps, z.shape[0])), z
        w = inverse(torch.zeros_like(z), z) if order else z
        for k in range(1, order + 1):
            moved = matvec(v, *params) - fixed(v)  # zero, but for its derivatives, in which this is a series
            total = total - (-1) ** k / k * (w * moved).sum()
            v = inverse(torch.zeros_like(z), moved) if k < order else v
        return total

    return torch.func.vmap(one)(probes).mean()


def _quadrature(matvec: Callable[..., Any], z: Any, steps: int) -> Any:
    """zᵀ log(A) z, by Lanczos' iteration with full orthogonalisation; nothing is differentiated."""
    z = z.detach()
    size = norm(z)
    basis, diagonal, beside = [z / size], [], []
    for _ in range(steps):
        v, Q = matvec(basis[-1]).detach(), torch.stack(basis)
        a = (basis[-1] * v).sum()
        for _ in range(2):
            v = v - Q.mT @ (Q @ v)
        b = norm(v)
        lost = b <= 100 * torch.finfo(v.dtype).eps * a.abs()  # the space is exhausted
        diagonal.append(a)
        beside.append(torch.where(lost, 0.0, b))
        basis.append(torch.where(lost, 0.0, v / torch.where(lost, 1.0, b)))
    a, b = torch.stack(diagonal), torch.stack(beside)[:-1]
    theta, U = torch.linalg.eigh(a.diag_embed() + b.diag_embed(1) + b.diag_embed(-1))
    tau = U[0]
    logs = torch.where(tau == 0, 0.0, tau**2 * torch.where(tau == 0, 1.0, theta).log())
    return size**2 * logs.sum()


def checkpoint(f: Callable[..., Any], *args: Any) -> Any:
    again = custom_vjp(f)
    again.defvjp(lambda *args: (f(*args), args), lambda args, u: torch.func.vjp(f, *args)[1](u))
    return again(*args)


def _largest(x: Any, axis: Any, least: float) -> Any:
    """The maximum over axes that are kept with length 1; `least` of none."""
    return x.amax(axis, keepdim=True) if x.numel() else x.sum(axis, keepdim=True) + least


def _hermitian(A: Any) -> Any:
    return (A + A.mH) / 2


def _equal(w: Any) -> Any:
    """Which eigenvalues are the same to rounding; each is to itself."""
    size = w.abs().amax(-1)[..., None, None]
    return (w[..., None, :] - w[..., :, None]).abs() <= 100 * w.shape[-1] * torch.finfo(w.dtype).eps * size
