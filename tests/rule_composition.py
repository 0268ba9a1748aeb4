"""Every kind of rule under every transform and nest to third order, against closed forms: one table.

f(x)ᵢ = exp(bᵢ·x), whose rule is deliberately not its derivative: the first derivative that it gives is twice
the true one, so that a cell that used f itself would show. Where the rule gives the derivative by f's own
output, that output follows the rule in turn, and order n has the factor 2ⁿ; where it computes the exponential
anew, f's true derivatives follow, and the factor stays 2.

    python tests/rule_composition.py           prints the table
    python tests/rule_composition.py --write   writes it to docs/custom_rules.md
"""

import itertools
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from composition import markdown

PAGE = Path(__file__).parent.parent / "docs" / "custom_rules.md"
rng = np.random.default_rng(8)
B, X, D, W = rng.normal(size=(4, 3)) / 2, rng.normal(size=3), rng.normal(size=3), rng.normal(size=4)
POINTS = np.stack([X, X + D, X - D])


@dataclass(frozen=True)
class Kind:
    """A function x -> (exp(bᵢ·x))ᵢ with a rule, and the factors of its derivatives of order 0, 1, 2, 3."""

    name: str
    f: Any
    factors: tuple[int, ...]

    def tensor(self, order, x):
        """The derivative of w·f of that order at x, an array of shape (3,) * order."""
        total = np.zeros((3,) * order)
        for b, value in zip(B, W * np.exp(B @ x), strict=True):
            part = np.array(value * self.factors[order])
            for _ in range(order):
                part = part[..., None] * b
            total += part
        return total


SELF, ONCE = (1, 2, 4, 8), (1, 2, 2, 2)


def kinds(fw, declare=None):
    """Every kind of rule, made with the names of `declare`: a namespace, or the façade."""
    declare, b = declare or fw.gl, fw.array(B)
    plain = lambda x, b: fw.xp.exp(b @ x)
    at_b = lambda f: lambda x: f(x, b)

    by_output = declare.custom_vjp(plain)
    by_output.defvjp(lambda x, b: (y := plain(x, b), (y, b)), lambda r, u: (2 * (u * r[0]) @ r[1], None))
    yield Kind("custom_vjp, residual an output", at_b(by_output), SELF)

    computed = declare.custom_vjp(plain)
    computed.defvjp(
        lambda x, b: (plain(x, b), {"slope": 2 * plain(x, b), "b": b}),
        lambda r, u: ((u * r["slope"]) @ r["b"], None),
    )
    yield Kind("custom_vjp, residual computed", at_b(computed), ONCE)

    recursive = declare.custom_vjp(plain)
    recursive.defvjp(
        lambda x, b: (recursive(x, b), [x, b]), lambda r, u: (2 * (u * recursive(*r)) @ r[1], None)
    )
    yield Kind("custom_vjp that calls itself", at_b(recursive), SELF)

    tangents = declare.custom_jvp(plain)
    tangents.defjvp(lambda at, v: (plain(*at), 2 * plain(*at) * (at[1] @ v[0])))
    yield Kind("custom_jvp", at_b(tangents), ONCE)

    again = declare.custom_jvp(plain)
    again.defjvp(lambda at, v: (again(*at), 2 * again(*at) * (at[1] @ v[0])))
    yield Kind("custom_jvp that calls itself", at_b(again), SELF)

    yield Kind("custom_vjp of trees", _of_trees(declare, plain, b), SELF)

    batched = declare.custom_vjp(plain)
    batched.defvjp(lambda x, b: (y := plain(x, b), (y, b)), lambda r, u: (2 * (u * r[0]) @ r[1], None))
    batched.defvmap(lambda size, in_batched, x, b: (fw.xp.exp(x @ b.T), True))
    yield Kind("custom_vjp, batched form", at_b(batched), SELF)

    closed = declare.custom_vjp(lambda x: plain(x, b))
    closed.defvjp(lambda x: (y := plain(x, b), y), lambda y, u: (2 * (u * y) @ b,))
    yield Kind("custom_vjp, data in a closure", closed, SELF)


def _of_trees(declare, plain, b):
    """A tree in and out, a static argument in between, an integer, a keyword, and an argument left at zero."""

    @partial(declare.custom_vjp, nondiff_argnums=(1,))
    def f(tree, scale, count, name=None):
        return {"y": plain(tree["x"], tree["b"]) * scale, "count": count}

    def fwd(tree, scale, count, name):
        out = f(tree, scale, count, name)
        return out, (tree["b"], name, out["y"])

    def bwd(scale, residuals, u):
        b, name, y = residuals
        assert name == "name"
        return {"x": 2 * scale * (u["y"] * y) @ b, "b": None, "k": None}, None, None

    f.defvjp(fwd, bwd)
    return lambda x: f({"x": x, "b": b, "k": 3}, 1, count=4, name="name")["y"]


def transforms(fw):
    """Each transform as (f, its kind, point) -> (actual, expected)."""
    ops = _operations(fw)
    table = {"value": lambda f, k: (_weighed(fw, f)(fw.array(X)), k.tensor(0, X))}
    for n in (1, 2, 3):
        for names in itertools.product(ops, repeat=n):
            if n == 1 or len({_family(name) for name in names}) == 1:
                _add(table, fw, names)
    table["grad of vmap"] = lambda f, k: (
        fw.grad(lambda xs: fw.vmap(_weighed(fw, f))(xs).sum())(fw.array(POINTS)),
        np.stack([k.tensor(1, x) for x in POINTS]),
    )
    table["jvp of vmap"] = lambda f, k: (
        fw.jvp(lambda xs: fw.vmap(_weighed(fw, f))(xs), fw.array(POINTS), fw.array(np.stack([D] * 3))),
        np.stack([k.tensor(1, x) @ D for x in POINTS]),
    )
    table["jvp of grad of vmap"] = lambda f, k: (
        fw.jvp(
            fw.grad(lambda xs: fw.vmap(_weighed(fw, f))(xs).sum()),
            fw.array(POINTS),
            fw.array(np.stack([D] * 3)),
        ),
        np.stack([k.tensor(2, x) @ D for x in POINTS]),
    )
    if fw.name == "torch":
        for n in (1, 2, 3):
            table[f"backward, {n} times"] = lambda f, k, n=n: (_backward(fw, f, n), _along(k, n, X))
    return table


def _weighed(fw, f):
    w = fw.array(W)
    return lambda x: w @ f(x)


def _operations(fw):
    """Operations that take a function to its derivative, densely or along D."""
    d = fw.array(D)
    return {
        "jacfwd": fw.jacfwd,
        "jacrev": fw.jacrev,
        "jvp": lambda g: lambda x: fw.jvp(g, x, d),
        "grad": lambda g: lambda x: fw.grad(g)(x) @ d,
    }


def _family(name):
    return name.startswith("jac")


def _add(table, fw, names):
    """A nest, the nest mapped over points, and both compiled."""
    ops, dense = _operations(fw), _family(names[0])

    def nest(f):
        g = _weighed(fw, f)
        for name in reversed(names):
            g = ops[name](g)
        return g

    expected = lambda k, x: k.tensor(len(names), x) if dense else _along(k, len(names), x)
    mapped = lambda k: np.stack([expected(k, x) for x in POINTS])
    title = " of ".join(names)
    if fw.name == "torch" or len(names) < 3:  # uncompiled, jax takes minutes for the rest
        table[title] = lambda f, k: (nest(f)(fw.array(X)), expected(k, X))
        table[f"vmap of {title}"] = lambda f, k: (fw.vmap(nest(f))(fw.array(POINTS)), mapped(k))
    if fw.name == "jax" or (not dense and len(names) < 3):
        table[f"compiled {title}"] = lambda f, k: (fw.compile(nest(f))(fw.array(X)), expected(k, X))
    if fw.name == "jax":
        table[f"compiled vmap of {title}"] = lambda f, k: (
            fw.compile(fw.vmap(nest(f)))(fw.array(POINTS)),
            mapped(k),
        )


def _along(kind, n, x):
    tensor = kind.tensor(n, x)
    for _ in range(n):
        tensor = tensor @ D
    return tensor


def _backward(fw, f, n):
    import torch

    x = fw.array(X).requires_grad_()
    y = _weighed(fw, f)(x)
    for _ in range(n):
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        y = g @ fw.array(D)
    return y


def outcome(transform, kind, fw):
    """`right`, or the name of the library's error; a wrong number is an assertion error."""
    from gradlab import GradlabError

    try:
        actual, expected = transform(kind.f, kind)
    except GradlabError as error:
        return f"refused ({type(error).__name__})"
    except Exception as error:
        if "StrategyError" in str(error):  # how torch.compile passes ours on
            return "refused (StrategyError)"
        raise
    np.testing.assert_allclose(fw.numpy(actual), expected, rtol=1e-9, atol=1e-12)
    return "right"


def table(fw):
    """Outcome of every cell of one framework: transforms down, kinds of rule across."""
    found = list(kinds(fw))
    return {
        name: {kind.name: outcome(transform, kind, fw) for kind in found}
        for name, transform in transforms(fw).items()
    }


INTRODUCTION = """# Rules under every transform

Each kind of `custom_vjp` and `custom_jvp` under each transform and nest to third order, every cell compared
with a closed form to 1e-9 in float64. Generated by `python tests/rule_composition.py --write`;
`tests/test_custom_rules.py` runs every cell again.

- The rules give twice the derivative of their function, so that a cell that used the function shows.
- "compiled" is `jax.jit`, and `torch.compile(fullgraph=True)`; jvp and grad are along one direction, jacfwd and
  jacrev dense (the Hessian by each pair of modes, third order by each triple).
- *right*: the closed form, to 1e-9. *refused*: gradlab's own error.
"""


def main():
    """Print or write the tables of both frameworks."""
    import jax

    from frameworks import load

    jax.config.update("jax_enable_x64", True)
    text = INTRODUCTION
    for name in ("jax", "torch"):
        text += f"\n## {name}\n\n{markdown(table(load(name))).replace('| operation', '| transform', 1)}\n"
    if "--write" in sys.argv:
        PAGE.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
