"""Rules as compositions where these are exact, by `custom_jvp` where they are not."""

from __future__ import annotations

from collections.abc import Callable
from math import factorial
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from gradlab._errors import InputError
from gradlab.transforms.custom_rules._jax import custom_jvp
from gradlab.transforms.implicit_functions._jax import held, root

Axis = int | tuple[int, ...] | None


def norm(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    m = stop_gradient(jnp.abs(x).max(axis, keepdims=True, initial=0.0))
    m = jnp.where((m > 0) & jnp.isfinite(m), m, 1.0)
    length = sqrt(((x / m) ** 2).sum(axis, keepdims=True)) * m
    return length if keepdims else jnp.squeeze(length, axis)


def sqrt(x: Any) -> Any:
    zero = x == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))


def log1mexp(x: Any) -> Any:
    small = x < jnp.log(2.0)
    inside = jnp.where(small, 1.0, x)  # of the second branch, which must not see what it cannot take
    return jnp.where(small, jnp.log(-jnp.expm1(-x)), jnp.log1p(-jnp.exp(-inside)))


def logsumexp(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    m = stop_gradient(x.max(axis, keepdims=True, initial=-jnp.inf))
    m = jnp.where(m == -jnp.inf, 0.0, m)
    total = jnp.exp(x - m).sum(axis, keepdims=True)
    empty = total == 0
    found = jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1.0, total)) + m)
    found = jnp.where(m == jnp.inf, jnp.inf, found)
    return found if keepdims else jnp.squeeze(found, axis)


def straight_through(hard: Any, soft: Any) -> Any:
    if jax.tree.structure(hard) != jax.tree.structure(soft):  # type: ignore[operator]
        raise InputError(
            "rules.straight_through: hard and soft have different structures; pass two like trees"
        )
    for a, b in zip(jax.tree.leaves(hard), jax.tree.leaves(soft), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise InputError(
                f"rules.straight_through: hard has shape {jnp.shape(a)} where soft has {jnp.shape(b)}; "
                "pass two like trees"
            )
    return jax.tree.map(lambda a, b: stop_gradient(a) + (b - stop_gradient(b)), hard, soft)


def reverse_gradient(x: Any, scale: float = 1.0) -> Any:
    return _reversed(x, scale)


@custom_jvp
def _reversed(x: Any, scale: float) -> Any:
    return x


@_reversed.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x, scale), (v, _) = primals, tangents
    return x, jax.tree.map(lambda v: -scale * v, v)


def clip_gradient(x: Any, max_norm: float) -> Any:
    if not max_norm > 0:
        raise InputError(f"rules.clip_gradient: max_norm is {max_norm!r}; pass a positive number")
    clipped = jax.custom_vjp(lambda x: x)

    def backward(_: None, u: Any) -> Any:
        size = norm(jnp.stack([norm(leaf) for leaf in jax.tree.leaves(u)]))
        factor = max_norm / jnp.maximum(size, max_norm)
        return (jax.tree.map(lambda u: factor.astype(u.dtype) * u, u),)

    clipped.defvjp(lambda x: (x, None), backward)
    return clipped(x)


def eigh(A: Any) -> Any:
    return _eigh(_hermitian(A))


@custom_jvp
def _eigh(A: Any) -> Any:
    return tuple(jnp.linalg.eigh(A, symmetrize_input=False))


@_eigh.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (A,), (dA,) = primals, tangents
    w, V = _eigh(A)
    E = V.mT.conj() @ dA @ V
    gap = w[..., None, :] - w[..., :, None]
    F = jnp.where(_equal(w), 0.0, 1 / jnp.where(_equal(w), 1.0, gap))
    return (w, V), (jnp.diagonal(E, 0, -2, -1).real, V @ (F * E))


def matrix_function(f: Callable[[Any], Any], A: Any, order: int = 3) -> Any:
    if order not in (0, 1, 2, 3):
        raise InputError(f"rules.matrix_function: order is {order!r}; pass 0, 1, 2 or 3")
    A = _hermitian(A)
    w, V = jnp.linalg.eigh(stop_gradient(A), symmetrize_input=False)
    D = V.mT @ A @ V
    moved = D - stop_gradient(D)  # zero, but for its derivatives, in which this is a series
    total = f(w)[..., None] * jnp.eye(w.shape[-1], dtype=w.dtype)
    for k in range(1, order + 1):
        total = total + jnp.einsum(_SERIES[k], _divided(f, w, k), *[moved] * k)
    return V @ total @ V.mT


_SERIES = {1: "...ij,...ij->...ij", 2: "...ijk,...ij,...jk->...ik", 3: "...ijkl,...ij,...jk,...kl->...il"}


def _divided(f: Callable[[Any], Any], w: Any, k: int) -> Any:
    """f[wᵢ, wⱼ, ...] of k + 1 of the numbers w, an axis each; by Taylor's series where they nearly meet."""
    nodes = [w.reshape(*w.shape[:-1], *(-1 if i == j else 1 for j in range(k + 1))) for i in range(k + 1)]
    return _difference(f, jnp.sort(jnp.stack(jnp.broadcast_arrays(*nodes)), 0))


def _difference(f: Callable[[Any], Any], z: Any) -> Any:
    """f[z₀, ..., z_k] of sorted nodes along the leading axis."""
    k = len(z) - 1
    if not k:
        return f(z[0])
    gap = z[-1] - z[0]
    near = gap <= jnp.finfo(z.dtype).eps ** (1 / (k + 2)) * jnp.maximum(1.0, jnp.abs(z).max(0))
    quotient = (_difference(f, z[1:]) - _difference(f, z[:-1])) / jnp.where(near, 1.0, gap)
    return jnp.where(near, _meeting(f, z), quotient)


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
    return lambda x: jax.jvp(lower, (x,), (jnp.ones_like(x),))[1]


def expm(A: Any) -> Any:
    return jax.scipy.linalg.expm(A)


@custom_jvp
def logdet(A: Any) -> Any:
    return jnp.linalg.slogdet(A)[1]


@logdet.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (A,), (dA,) = primals, tangents
    return logdet(A), (_inverse(A).mT * dA).sum((-2, -1))


@custom_jvp
def _inverse(A: Any) -> Any:
    return jnp.linalg.inv(A)


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
        w = inverse(jnp.zeros_like(z), z) if order else z
        for k in range(1, order + 1):
            moved = matvec(v, *params) - fixed(v)  # zero, but for its derivatives, in which this is a series
            total = total - (-1) ** k / k * (w * moved).sum()
            v = inverse(jnp.zeros_like(z), moved) if k < order else v
        return total

    return jax.vmap(one)(probes).mean()


def _quadrature(matvec: Callable[..., Any], z: Any, steps: int) -> Any:
    """zᵀ log(A) z, by Lanczos' iteration with full orthogonalisation; nothing is differentiated."""

    def step(carry: Any, i: Any) -> Any:
        Q, q = carry
        Q, v = Q.at[i].set(q), matvec(q)
        a = (q * v).sum()
        for _ in range(2):
            v = v - Q.mT @ (Q @ v)
        b = norm(v)
        lost = b <= 100 * jnp.finfo(v.dtype).eps * jnp.abs(a)  # the space is exhausted
        return (Q, jnp.where(lost, 0.0, v / jnp.where(lost, 1.0, b))), (a, jnp.where(lost, 0.0, b))

    size = norm(z)
    start = jnp.zeros((steps, *z.shape), z.dtype), z / size
    _, (a, b) = jax.lax.scan(step, start, jnp.arange(steps))
    theta, U = jnp.linalg.eigh(jnp.diag(a) + jnp.diag(b[:-1], 1) + jnp.diag(b[:-1], -1))
    tau = U[0]
    logs = jnp.where(tau == 0, 0.0, tau**2 * jnp.log(jnp.where(tau == 0, 1.0, theta)))
    return stop_gradient(size**2 * logs.sum())


def checkpoint(f: Callable[..., Any], *args: Any) -> Any:
    return jax.checkpoint(f)(*args)


def _hermitian(A: Any) -> Any:
    return (A + A.mT.conj()) / 2


def _equal(w: Any) -> Any:
    """Which eigenvalues are the same to rounding; each is to itself."""
    size = jnp.abs(w).max(-1, initial=0.0)[..., None, None]
    return jnp.abs(w[..., None, :] - w[..., :, None]) <= 100 * w.shape[-1] * jnp.finfo(w.dtype).eps * size
