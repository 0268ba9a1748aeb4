"""What is known of jax's faults by hand: for each a reproduction of a few lines.

An operation is listed as wrong only where the audit finds it and its reproduction here prints a number that is
not the right one; `right` is a plain difference of the function's values, or what its definition says.
"""

from __future__ import annotations

IMPORTS = "import jax, jax.numpy as jnp, jax.scipy as jsp; jax.config.update('jax_enable_x64', True)"
PRINT = 'print(f"{float(wrong):.8g} where {float(right):.8g} is right")'


def _shown(wrong: str, right: str) -> str:
    """The number jax gives, and the right one."""
    return "\n".join([IMPORTS, f"wrong = {wrong}", f"right = {right}", PRINT])


FAULTS: dict[str, str] = {
    "jax.scipy.special.i0": _shown("jax.grad(jsp.special.i0)(0.0)", "0  # i0 is even"),
    "jax.scipy.special.i1": _shown("jax.hessian(jsp.special.i1)(0.0)", "0  # i1 is odd"),
    "jax.numpy.i0": _shown("jax.hessian(jnp.i0)(0.0)", "1 / 2  # i0(x) = 1 + x²/4 + ..."),
    "jax.numpy.kaiser": _shown(
        "jax.hessian(lambda b: jnp.kaiser(5, b)[0])(0.0)", "-1 / 2  # 1 / i0(b) = 1 - b²/4 + ..."
    ),
    "jax.scipy.special.spence": _shown(
        "jax.grad(jsp.special.spence)(2.0)  # nan on 1 < x <= 2; 0 at x = 1",
        "-jnp.log(2.0)  # log(x) / (1 - x), as forward mode gives",
    ),
    "jax.scipy.special.expn": _shown(
        "jax.grad(lambda x: jsp.special.expn(0, x))(0.5)", "-jnp.exp(-0.5) * (0.5 + 1) / 0.5**2"
    ),
    "jax.scipy.special.log_ndtr": _shown(
        "jax.hessian(jsp.special.log_ndtr)(-20.5)", "-0.9976537796275292  # mpmath"
    ),
    "jax.numpy.power": _shown("jax.hessian(lambda x: jnp.power(x, 1.0))(0.0)", "0"),
    "jax.numpy.ndarray.at.power": _shown(
        "jax.hessian(lambda x: x.at[0].power(2.0)[1])(jnp.zeros(2))[1, 1]", "0  # x[1] is left as it is"
    ),
    "jax.numpy.linalg.eigvalsh": _shown(
        "jax.hessian(lambda t: (jnp.linalg.eigvalsh(t * jnp.eye(2)) ** 2).sum())(1.0)", "4  # of 2 t²"
    ),
    "jax.numpy.linalg.eigh": _shown(
        "jax.hessian(lambda t: jnp.linalg.eigh(t * jnp.eye(2))[0].prod())(1.0)", "2  # of t²"
    ),
    "jax.numpy.linalg.svdvals": _shown(
        "jax.hessian(lambda t: (jnp.linalg.svdvals(t * jnp.eye(2)) ** 2).sum())(1.0)", "4  # of 2 t²"
    ),
    "jax.numpy.linalg.norm": _shown(
        "jax.hessian(lambda t: jnp.linalg.norm(t * jnp.eye(2), ord='nuc'))(1.0)", "0  # of 2 t"
    ),
    "jax.numpy.abs": _shown("jax.hessian(lambda t: jnp.abs(t + 0j) ** 2)(0.0)", "2  # of t²"),
    "jax.scipy.linalg.eigh_tridiagonal": _shown(
        "jax.jacfwd(lambda d: jsp.linalg.eigh_tridiagonal(d, jnp.array([0.5, 0.3]), eigvals_only=True))"
        "(jnp.array([1.0, 0, 1]))[1, 0]",
        "0.26470588  # as jax.numpy.linalg.eigvalsh of the dense matrix; reverse mode is refused",
    ),
}

# Rows that fail for a reason which is not a wrong derivative.
_SAMPLES = (
    "the derivative is that of the distribution (implicit), not of the rejection sampler at a fixed key"
)
EXPLAINED: dict[str, str] = {
    **{f"jax.random.{name}": _SAMPLES for name in ("gamma", "beta", "dirichlet", "t")},
    "jax.experimental.ode.odeint": "the adjoint of the continuous problem, right to the solver's tolerance",
}
