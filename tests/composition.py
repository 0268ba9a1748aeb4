"""Every operation under every transform of its own framework, against closed forms: one table.

The functions are sums of exponentials of linear forms, whose derivatives of every order have closed
forms: each result is R(x) = Σᵢ exp(k bᵢ·x) Mᵢ, so its derivative along d is Σᵢ k (bᵢ·d) exp(k bᵢ·x) Mᵢ.

    python tests/composition.py           prints the table
    python tests/composition.py --write   writes it to docs/composition.md
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PAGE = Path(__file__).parent.parent / "docs" / "composition.md"
rng = np.random.default_rng(3)
B, X, V, U = rng.normal(size=(4, 3)) / 2, rng.normal(size=3), rng.normal(size=3), rng.normal(size=4)
D = rng.normal(size=3)
S = np.stack([V, -2 * V, D])
outer = np.einsum("ia,ib->iab", B, B)
along = np.einsum("iab,b->ia", outer, V)


@dataclass(frozen=True)
class Case:
    """An operation's call, and (k, M) of its closed form Σᵢ exp(k bᵢ·x) Mᵢ."""

    name: str
    call: Any
    k: float
    M: np.ndarray

    def value(self, x):
        return np.tensordot(np.exp(self.k * B @ x), self.M, 1)

    def along(self, x, *ds):
        """The derivative of the value at x along each of the directions `ds`, in turn."""
        weights = np.exp(self.k * B @ x)
        for d in ds:
            weights = weights * self.k * (B @ d)
        return np.tensordot(weights, self.M, 1)


def cases(fw):
    """The operations, each as a function of x alone that gives one array."""
    gl, xp, b, v, u, s = fw.gl, fw.xp, fw.array(B), fw.array(V), fw.array(U), fw.array(S)
    f = lambda x: xp.exp(b @ x).sum()
    model = lambda x: xp.exp(b @ x)
    loss = lambda y: (y**3).sum() / 6
    rows = np.eye(4)[:, :, None] * B[:, None, :]
    stacked = np.einsum("iab,kb->ika", outer, S)
    yield Case("hvp", lambda x: gl.hvp(f, x, v), 1, along)
    for strategy in ("reverse_over_reverse", "forward_over_reverse", "reverse_over_forward"):
        yield Case(f"hvp, {strategy}", lambda x, s=strategy: gl.hvp(f, x, v, strategy=s), 1, along)
    yield Case("hessian", lambda x: gl.hessian(f, x), 1, outer)
    yield Case("hessian, chunk_size", lambda x: gl.hessian(f, x, chunk_size=2), 1, outer)
    yield Case("hessian_diagonal", lambda x: gl.hessian_diagonal(f, x), 1, B**2)
    yield Case("hessian_operator @", lambda x: gl.hessian_operator(f, x) @ v, 1, along)
    yield Case("hessian_operator.matvec", lambda x: gl.hessian_operator(f, x).matvec(v), 1, along)
    yield Case("hessian_operator.matmat", lambda x: gl.hessian_operator(f, x).matmat(s), 1, stacked)
    yield Case("hessian_operator.dense", lambda x: gl.hessian_operator(f, x).dense(), 1, outer)
    yield Case("jacobian, forward", lambda x: gl.jacobian(model, x, mode="forward"), 1, rows)
    yield Case("jacobian, reverse", lambda x: gl.jacobian(model, x, mode="reverse"), 1, rows)
    yield Case("jacobian_operator.matvec", lambda x: gl.jacobian_operator(model, x).matvec(v), 1, rows @ V)
    yield Case(
        "jacobian_operator.T.matvec", lambda x: gl.jacobian_operator(model, x).T.matvec(u), 1, U @ rows
    )
    yield Case("ggn_vp", lambda x: gl.ggn_vp(model, loss, x, v), 3, along)
    yield Case("ggn_operator.matvec", lambda x: gl.ggn_operator(model, loss, x).matvec(v), 3, along)
    one = lambda x, row: xp.exp(row @ x)
    lengths = np.diag(np.linalg.norm(B, axis=1))
    yield Case("per_example_grads", lambda x: gl.per_example_grads(one, x, b), 1, rows)
    yield Case("per_example_norms", lambda x: gl.per_example_norms(one, x, b), 1, lengths)
    yield Case("clipped_grad", lambda x: gl.clipped_grad(one, x, b, max_norm=1e9)[0], 1, B)
    yield from meta_cases(gl, xp, b)


def meta_cases(gl, xp, b):
    """Adaptation to φ = x/2, by one step of descent on ‖x‖²/2 or as the minimum of ‖x‖²/2 + ‖x - x₀‖²/2."""
    half, ones = gl.optimizers.sgd(0.5), b[:, 0] * 0 + 1
    inner, mean = lambda x, a: a * (x @ x) / 2, lambda x, row: 4 * xp.exp(row @ x)
    for method, how in (("unroll", {}), ("checkpoint", {}), ("implicit", {"proximal": 1.0})):
        run = lambda x, how={"method": method, **how}: gl.meta_grad(
            inner, mean, x, ((ones,), (b,)), optimizer=half, steps=1, **how
        )
        yield Case(f"meta_grad, {method}", run, 0.5, B / 2)
    inner, total = lambda w, x: ((w - x) ** 2).sum() / 2, lambda w, x: xp.exp(b @ w).sum()
    trained = lambda x: gl.bilevel_grad(inner, total, x, 0 * x, ((), ()), optimizer=half, steps=1)
    yield Case("bilevel_grad", trained, 0.5, B / 2)


def transforms(fw):
    """Each transform as (the operation as f(x), its case) -> (actual, expected), both numpy."""
    x, d, xs = fw.array(X), fw.array(D), fw.array(np.stack([X, X + D, X - D]))
    weights = lambda case: np.random.default_rng(5).normal(size=case.value(X).shape)

    def weigh(f, w):
        w = fw.array(w)
        return lambda x: (f(x) * w).sum()

    def gradient(case, w, *ds):
        return np.array([(case.along(X, *ds, e) * w).sum() for e in np.eye(3)])

    def mapped(case):
        return np.stack([case.value(row) for row in (X, X + D, X - D)])

    table = {
        "eager": lambda f, c: (f(x), c.value(X)),
        "vmap": lambda f, c: (fw.vmap(f)(xs), mapped(c)),
        "compiled": lambda f, c: (fw.compile(f)(x), c.value(X)),
        "compiled vmap": lambda f, c: (fw.compile(lambda xs: fw.vmap(f)(xs))(xs), mapped(c)),
        "grad": lambda f, c: (fw.grad(weigh(f, weights(c)))(x), gradient(c, weights(c))),
        "jvp": lambda f, c: (fw.jvp(f, x, d), c.along(X, D)),
        "vjp": lambda f, c: (fw.vjp(f, x, fw.array(weights(c))), gradient(c, weights(c))),
        "vmap of jvp": lambda f, c: (
            fw.vmap(lambda x: fw.jvp(f, x, d))(xs)[1],
            c.along(X + D, D),
        ),
        "jvp of vmap": lambda f, c: (
            fw.jvp(lambda t: fw.vmap(lambda x: f(x + t * d))(xs), fw.array(0.0), fw.array(1.0))[0],
            c.along(X, D),
        ),
        "compiled grad": lambda f, c: (
            fw.compile(fw.grad(weigh(f, weights(c))))(x),
            gradient(c, weights(c)),
        ),
        "grad of jvp": lambda f, c: (
            fw.grad(lambda x: weigh(lambda x: fw.jvp(f, x, d), weights(c))(x))(x),
            gradient(c, weights(c), D),
        ),
        "jvp of grad": lambda f, c: (
            fw.jvp(fw.grad(weigh(f, weights(c))), x, d),
            gradient(c, weights(c), D),
        ),
        "grad of grad": lambda f, c: (
            fw.grad(lambda x: (fw.grad(weigh(f, weights(c)))(x) * d).sum())(x),
            gradient(c, weights(c), D),
        ),
    }
    if fw.name == "torch":
        table["backward"] = lambda f, c: (_backward(weigh(f, weights(c)), x), gradient(c, weights(c)))
        table["backward twice"] = lambda f, c: (
            _backward(weigh(f, weights(c)), x, d),
            gradient(c, weights(c), D),
        )
    return table


def _backward(f, x, d=None):
    import torch

    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    return g if d is None else torch.autograd.grad((g * d).sum(), x)[0]


def outcome(transform, f, case, fw):
    """`right`, or the name of the error that refuses; a wrong number is an assertion error."""
    from gradlab import GradlabError

    try:
        actual, expected = transform(f, case)
    except GradlabError as error:
        return f"refused ({type(error).__name__})"
    except Exception as error:
        if "raised exception StrategyError" in str(error):  # how torch.compile passes ours on
            return "refused (StrategyError)"
        if "UserDefinedObjectVariable(LinearOperator)" in str(error):
            return "not traced by torch"
        raise
    np.testing.assert_allclose(fw.numpy(actual), expected, rtol=1e-9, atol=1e-12)
    return "right"


def markdown(rows):
    """The table of one framework: operations down, transforms across."""
    names = list(next(iter(rows.values())))
    lines = ["| operation | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {operation} | " + " | ".join(row[name] for name in names) + " |"
        for operation, row in rows.items()
    ]
    return "\n".join(lines)


def table(fw):
    """Outcome of every cell of one framework."""
    return {
        case.name: {name: outcome(t, case.call, case, fw) for name, t in transforms(fw).items()}
        for case in cases(fw)
    }


def main():
    """Print or write the tables of both frameworks."""
    import jax

    from frameworks import load

    jax.config.update("jax_enable_x64", True)
    text = INTRODUCTION
    for name in ("jax", "torch"):
        text += f"\n## {name}\n\n{markdown(table(load(name)))}\n"
    if "--write" in sys.argv:
        PAGE.write_text(text)
    else:
        print(text)


INTRODUCTION = """# What composes with what

Every operation under every transform of its own framework, each cell compared with a closed form to
1e-9 in float64. Generated by `python tests/composition.py --write`; `tests/test_composition.py` runs
every cell again and fails where this page no longer says what happens.

- *right*: the closed form, to 1e-9. *refused*: gradlab's own error, which names what to use instead.
- "compiled" is `jax.jit`, and `torch.compile(fullgraph=True)`.
- *not traced by torch*: torch.compile knows `@` for tensors alone; `H.matvec(v)` is the same product.
- In torch the two strategies with forward mode, asked for by name, are refused inside `jvp` and under
  `torch.compile`, where torch can be silently wrong; `"auto"` is right in every cell.
- jax's own hole, below float64 on a CPU: XLA compiles a batched pullback through some norms wrongly
  (docs/decisions.md). gradlab never batches one by itself, but `jax.jit(jax.vmap(...))` around `jacobian`
  in reverse mode, `J.T`, `ggn_vp` or `hvp(strategy="reverse_over_reverse")` does. Use float64 there,
  `jax.lax.map` for `jax.vmap`, or `XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=`.
"""

if __name__ == "__main__":
    main()
