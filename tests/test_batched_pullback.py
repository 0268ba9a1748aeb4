"""jax in float32 on a CPU: XLA compiles a batched pullback through a norm wrongly; gradlab never runs one.

Each operation is compared with itself in float64, whose code is right, at sizes that the fault needs.
"""

import numpy as np
import pytest

import gradlab

jax = pytest.importorskip("jax")
jnp = jax.numpy

draw = np.random.default_rng(0)
X, V, U = draw.normal(size=(16, 16)), draw.normal(size=(16, 16)), draw.normal(size=(256, 16, 16))

NORMS = {
    "rms norm": lambda x: x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5),
    "layer norm": lambda x: (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5),
    "scaled by its squares": lambda x: x * (x**2).sum(-1, keepdims=True),
    "scaled by its maximum": lambda x: x * x.max(-1, keepdims=True),
}
CALLS = {
    "jacobian": lambda g, x, U: gradlab.jacobian(g, x, mode="reverse"),
    "jacobian of a jitted function": lambda g, x, U: gradlab.jacobian(jax.jit(g), x, mode="reverse"),
    "jacobian, chunk_size": lambda g, x, U: gradlab.jacobian(g, x, mode="reverse", chunk_size=256),
    "forward jacobian": lambda g, x, U: gradlab.jacobian(g, x, mode="forward"),
    "J.T": lambda g, x, U: gradlab.jacobian_operator(g, x).T.matmat(U),
    "J": lambda g, x, U: gradlab.jacobian_operator(g, x).matmat(U),
    "hessian": lambda g, x, U: gradlab.hessian(lambda x: jnp.sin(g(x)).sum(), x, chunk_size=256),
    "H": lambda g, x, U: gradlab.hessian_operator(lambda x: jnp.sin(g(x)).sum(), x, chunk_size=256).matmat(U),
    "G": lambda g, x, U: gradlab.ggn_operator(g, lambda y: (y**4).sum(), x, chunk_size=256).matmat(U),
}


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["compiled", "eager"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("call", CALLS)
def test_float32_is_float64_rounded(call, norm, wrap):
    run = wrap(lambda x, U: CALLS[call](NORMS[norm], x, U))
    single = run(jnp.asarray(X, jnp.float32), jnp.asarray(U, jnp.float32))
    double = run(jnp.asarray(X), jnp.asarray(U))
    assert single.dtype == jnp.float32
    assert np.abs(single - double).max() < 1e-4 * np.abs(double).max()


pinned = pytest.mark.skipif(
    jax.__version__ != "0.10.2" or jax.default_backend() != "cpu", reason="a fault of the pinned version"
)


@pinned
@pytest.mark.parametrize("norm", NORMS)
def test_bare_jax_is_wrong(norm):
    """If this fails, XLA has mended its fusion: pullbacks may be batched again."""
    g, single, double = NORMS[norm], jnp.asarray(X, jnp.float32), jnp.asarray(X)
    reference = jax.jacrev(g)(double)
    bare = jax.jit(jax.jacrev(g))(single)
    assert np.abs(bare - reference).max() > 1e-2 * np.abs(reference).max()
