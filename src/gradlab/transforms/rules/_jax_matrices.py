"""Functions of matrices, as series and rules that hold where eigenvalues meet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import factorial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from gradlab._errors import InputError, KindError, StrategyError
from gradlab.transforms.custom_rules._jax import custom_jvp
from gradlab.transforms.implicit_functions._jax import as_array, complain, held, root
from gradlab.transforms.implicit_functions.options import Options
from gradlab.transforms.rules._jax_scalars import norm, real


def eigh(A: Any) -> Any:
    return _eigh(_hermitian(A))


@custom_jvp
def _eigh(A: Any) -> Any:
    return tuple(jnp.linalg.eigh(A, symmetrize_input=False))


@custom_jvp
def _eigh_once(A: Any) -> Any:
    """The same, whose derivative at equal eigenvalues is NaN: it would be a second one, which lacks a term."""
    return tuple(jnp.linalg.eigh(A, symmetrize_input=False))


def _moved(at_equal: float, primals: Any, tangents: Any) -> Any:
    (A,), (dA,) = primals, tangents
    w, V = _eigh_once(A)
    E = V.mT.conj() @ dA @ V
    gap, equal = w[..., None, :] - w[..., :, None], _equal(w)
    same = jnp.where(jnp.eye(w.shape[-1], dtype=bool), 0.0, at_equal)
    F = jnp.where(equal, same, 1 / jnp.where(equal, 1.0, gap))
    return (w, V), (jnp.diagonal(E, 0, -2, -1).real, V @ (F * E))


_eigh.defjvp(partial(_moved, 0.0))


_eigh_once.defjvp(partial(_moved, jnp.nan))


def matrix_function(f: Callable[[Any], Any], A: Any, order: int = 3) -> Any:
    _refuse_order("matrix_function", order)
    A = _hermitian(A)
    w, V = jnp.linalg.eigh(stop_gradient(A), symmetrize_input=False)
    D = V.mT.conj() @ A @ V
    moved = D - stop_gradient(D)  # zero, but for its derivatives, in which this is a series
    total = f(w)[..., None] * jnp.eye(w.shape[-1], dtype=V.dtype)
    for k in range(1, order + 1):
        total = total + jnp.einsum(_SERIES[k], _divided(f, w, k), *[moved] * k)
    return V @ total @ V.mT.conj()


_SERIES = {1: "...ij,...ij->...ij", 2: "...ijk,...ij,...jk->...ik", 3: "...ijkl,...ij,...jk,...kl->...il"}


def _divided(f: Callable[[Any], Any], w: Any, k: int) -> Any:
    """f[wᵢ, wⱼ, ...] of k + 1 of the numbers w, an axis each."""
    nodes = [w.reshape(*w.shape[:-1], *(-1 if i == j else 1 for j in range(k + 1))) for i in range(k + 1)]
    return _difference(f, jnp.sort(jnp.stack(jnp.broadcast_arrays(*nodes)), 0))[0]


def _difference(f: Callable[[Any], Any], z: Any) -> tuple[Any, Any]:
    """f[z₀, ..., z_k] of sorted nodes along the leading axis, and its error.

    The quotient of two lower ones, or where that loses more to rounding Taylor's series, if the two agree.
    """
    k, eps = len(z) - 1, jnp.finfo(z.dtype).eps
    if not k:
        value = f(z[0])
        return value, eps * (jnp.abs(value) + jnp.abs(z[0] * _derivative(f, 1)(z[0])))
    gap = z[-1] - z[0]
    apart = jnp.where(gap == 0, 1.0, gap)
    (upper, above), (lower, below) = _difference(f, z[1:]), _difference(f, z[:-1])
    quotient, noise = (upper - lower) / apart, (above + below) / apart
    series, last = _meeting(f, z)
    cut = jnp.abs(last) + eps * jnp.abs(series)
    better = (cut < noise) & (jnp.abs(series - quotient) <= 10 * noise)
    taken = (gap == 0) | better
    return jnp.where(taken, series, quotient), jnp.where(taken, cut, noise)


def _meeting(f: Callable[[Any], Any], z: Any) -> tuple[Any, Any]:
    """f[z₀, ..., z_k] of nodes that are close: f⁽ᵏ⁾/k! at their mean, and the term of second order; and that term."""
    k, mean = len(z) - 1, z.mean(0)
    spread = ((z - mean) ** 2).sum(0) / (2 * (k + 1) * (k + 2))
    last = spread * _derivative(f, k + 2)(mean) / factorial(k)
    last = jnp.where(jnp.isfinite(last), last, 0.0)  # a derivative that overflows, or is infinite at zero
    return _derivative(f, k)(mean) / factorial(k) + last, last


def _derivative(f: Callable[[Any], Any], k: int) -> Callable[[Any], Any]:
    """The k-th derivative of an elementwise function."""
    if not k:
        return f
    lower = _derivative(f, k - 1)
    return lambda x: jax.jvp(lower, (x,), (jnp.ones_like(x),))[1]


def expm(A: Any) -> Any:
    fits = jnp.abs(A).sum(-2).max(-1, initial=0.0) <= 2.0**34  # beyond it jax gives NaN, of derivative 0
    return jax.scipy.linalg.expm(A * jnp.where(fits, 1.0, jnp.nan)[..., None, None], max_squarings=32)


def logdet(A: Any) -> Any:
    return _logdet(real("logdet", A, "A"))


@custom_jvp
def _logdet(A: Any) -> Any:
    return jnp.linalg.slogdet(A)[1]


@_logdet.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (A,), (dA,) = primals, tangents
    return _logdet(A), (_inverse(A).mT * dA).sum((-2, -1))


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
    _refuse_order("stochastic_logdet", order)
    probes, params = _undifferentiated(_probes(probes, steps)), jax.tree.map(as_array, params)
    _refuse_unlike(jax.eval_shape(matvec, probes[0], *params), probes[0])
    matvec = eqx.filter_closure_convert(matvec, probes[0], *params)  # what it closes over, as leaves
    fixed_matvec, fixed_params = held((matvec, params))
    fixed = lambda v: fixed_matvec(v, *fixed_params)
    values, sizes, bad = jax.vmap(lambda z: _quadrature(fixed, z, min(steps, z.shape[0])))(probes)
    values = complain(
        Options("root", fixed, None, "cg", None, None, None, "raise"), values, bad.any(), INDEFINITE
    )

    def series(z: Any, size: Any) -> Any:
        inverse = root(lambda y, b: fixed(y) / size - b, linear_solver="cg")
        total, v = jnp.zeros_like(size), z
        w = inverse(jnp.zeros_like(z), z) / size if order else z
        for k in range(1, order + 1):
            moved = matvec(v, *params) - fixed(v)  # zero, but for its derivatives, in which this is a series
            total = total - (-1) ** k / k * (w * moved).sum()
            v = inverse(jnp.zeros_like(z), moved) / size if k < order else v
        return total

    return (values + jax.vmap(series)(probes, sizes)).mean()


INDEFINITE = "rules.stochastic_logdet: A is not positive definite; pass products with a matrix that is"


@jax.custom_jvp
def _undifferentiated(probes: Any) -> Any:
    return probes


@_undifferentiated.defjvp
def _(primals: Any, tangents: Any) -> Any:
    raise StrategyError(
        "rules.stochastic_logdet: probes are being differentiated, in which the estimate has no derivative here; "
        "hold them constant by jax.lax.stop_gradient"
    )


def _quadrature(matvec: Callable[..., Any], z: Any, steps: int) -> tuple[Any, Any, Any]:
    """zᵀ log(A) z, by Lanczos' iteration with full orthogonalisation; the size of A; whether A is not definite."""

    def step(carry: Any, i: Any) -> Any:
        Q, q = carry
        Q, v = Q.at[i].set(q), matvec(q)
        a = jnp.where((q == 0).all(), 1.0, (q * v).sum())
        for _ in range(2):
            v = v - Q.mT @ (Q @ v)
        b = norm(v)
        lost = b <= 100 * jnp.finfo(v.dtype).eps * jnp.abs(a)  # the space is exhausted
        return (Q, jnp.where(lost, 0.0, v / jnp.where(lost, 1.0, b))), (a, jnp.where(lost, 0.0, b))

    size = norm(z)
    start = jnp.zeros((steps, *z.shape), z.dtype), z / jnp.where(size == 0, 1.0, size)
    _, (a, b) = jax.lax.scan(step, start, jnp.arange(steps))
    theta, U = jnp.linalg.eigh(jnp.diag(a) + jnp.diag(b[:-1], 1) + jnp.diag(b[:-1], -1))
    tau, bad = U[0], ~(theta > 0).all()
    return stop_gradient((size**2 * (tau**2 * jnp.log(theta)).sum(), jnp.abs(a[0]), bad))


def _refuse_order(op: str, order: Any) -> None:
    if type(order) is not int or not 0 <= order <= 3:
        raise InputError(f"rules.{op}: order is {order!r}; pass 0, 1, 2 or 3")


def _probes(probes: Any, steps: Any) -> Any:
    """The probes, as a matrix of floats."""
    if not isinstance(probes, (jax.Array, np.ndarray)) or not jnp.issubdtype(probes.dtype, jnp.floating):
        kind = getattr(probes, "dtype", type(probes).__name__)
        raise KindError(f"rules.stochastic_logdet: probes is {kind}; pass an array of floats")
    if probes.ndim != 2 or 0 in probes.shape or type(steps) is not int or steps < 1:
        raise InputError(
            f"rules.stochastic_logdet: probes has shape {probes.shape}, steps is {steps!r}; "
            "pass probes of shape (k, n) and a positive whole number of steps"
        )
    return jnp.asarray(probes)


def _refuse_unlike(v: Any, z: Any) -> None:
    given = [(x.shape, x.dtype) for x in jax.tree.leaves(v)]
    if given != [(z.shape, z.dtype)]:
        raise InputError(
            f"rules.stochastic_logdet: matvec of a vector {z.shape} of {z.dtype} has given {given}; "
            "return a vector like it"
        )


def _hermitian(A: Any) -> Any:
    return (A + A.mT.conj()) / 2


def _equal(w: Any) -> Any:
    """Which eigenvalues are the same to rounding; each is to itself."""
    size = jnp.abs(w).max(-1, initial=0.0)[..., None, None]
    return jnp.abs(w[..., None, :] - w[..., :, None]) <= 100 * w.shape[-1] * jnp.finfo(w.dtype).eps * size
