"""Solutions of equations under every nest of transforms, against closed forms, as in composition.py.

Each problem has the solution y = S⁻¹ exp(B x), whose derivatives of every order are known.
"""

from itertools import product

import numpy as np

from composition import B, Case, D, V, X

rng = np.random.default_rng(7)
n = len(B)
W = rng.normal(size=n)
C = np.eye(n) + 0.3 * rng.normal(size=(n, n))
E = 0.6 * np.eye(n) + 0.1 * rng.normal(size=(n, n))
S = np.eye(n) + 0.2 * rng.normal(size=(n, n))
DIRECTIONS = (D, V, D - 2 * V)
POINTS = (X, X + D / 2, X - D / 2)


def own_solver(fw):
    """A user's linear solver, with control flow by the numbers in torch."""
    if fw.name == "jax":
        from jax.scipy.sparse.linalg import bicgstab

        return lambda matvec, b: bicgstab(matvec, b, tol=1e-13, atol=1e-13)[0]

    def richardson(matvec, b):
        x = 0 * b
        for _ in range(500):
            r = b - matvec(x)
            if r.norm() <= 1e-13 * b.norm():
                break
            x = x + r
        return x

    return richardson


def solutions(fw):
    """Name to a function of x alone that solves its problem, and the matrix M of the closed form."""
    gl, xp, b = fw.gl, fw.xp, fw.array(B)
    c, e, s, one = fw.array(C), fw.array(E), fw.array(S), fw.array(np.ones(n))
    residual = lambda y, x: c @ (xp.log(y) - b @ x)
    step = lambda y, x: y - e @ (xp.log(y) - b @ x)
    objective = lambda z, x: ((s @ z) * (xp.log(s @ z) - 1 - b @ x)).sum()
    start = fw.array(np.linalg.solve(S, np.ones(n)))
    for method in ("direct", "gmres"):
        yield f"root, {method}", lambda x, m=method: gl.root(residual, linear_solver=m)(one, x), np.eye(n)
    for method in ("direct", "gmres", "neumann", own_solver(fw)):
        name = method if isinstance(method, str) else "own"
        yield (
            f"fixed_point, {name}",
            lambda x, m=method: gl.fixed_point(step, linear_solver=m)(one, x),
            np.eye(n),
        )
    for method in ("direct", "cg"):
        yield (
            f"argmin, {method}",
            lambda x, m=method: gl.argmin(objective, linear_solver=m)(start, x),
            np.linalg.inv(S).T,
        )
    closed = lambda x: gl.root(lambda y: residual(y, x))(one)
    yield "root, closing over x", closed, np.eye(n)
    yield (
        "fixed_point, closing over x",
        lambda x: gl.fixed_point(lambda y: step(y, x), linear_solver="gmres")(one),
        np.eye(n),
    )


def nests(fw, f, case):
    """Name to (a function of x, its closed form at a point), for every nest to third order."""
    if fw.name == "jax":
        import jax as transforms
    else:
        from torch import func as transforms
    jacobians = {"jacfwd": transforms.jacfwd, "jacrev": transforms.jacrev}
    w = fw.array(W)
    scalar = lambda x: (f(x) * w).sum()
    yield "value", f, case.value
    yield "vjp", lambda x: fw.vjp(f, x, w), lambda x: np.array([case.along(x, e) @ W for e in np.eye(3)])
    for name, jacobian in jacobians.items():
        yield name, jacobian(f), lambda x: np.stack([case.along(x, e) for e in np.eye(3)], -1)
    for (outer, j), (inner, i) in product(jacobians.items(), repeat=2):
        second = lambda x: np.array([[case.along(x, a, b) @ W for a in np.eye(3)] for b in np.eye(3)])
        yield f"{outer} of {inner}", j(i(scalar)), second
    for order in (1, 2, 3):
        for modes in product(("jvp", "grad"), repeat=order):
            g = scalar
            for mode, d in zip(reversed(modes), DIRECTIONS, strict=False):
                g = along(fw, mode, g, fw.array(d))
            yield " of ".join(modes), g, lambda x, k=order: case.along(x, *DIRECTIONS[:k]) @ W


def along(fw, mode, g, d):
    """The derivative of g along d by this mode."""
    if mode == "jvp":
        return lambda x: fw.jvp(g, x, d)
    return lambda x: (fw.grad(g)(x) * d).sum()


def outcome(fw, g, exact, compiled=False):
    """`right` at a point, mapped and in jax compiled, `refused`, or an assertion error for a wrong number."""
    points, expected = fw.array(np.stack(POINTS)), np.stack([exact(x) for x in POINTS])
    try:
        if compiled or fw.name == "torch":
            one = (fw.compile(g) if compiled else g)(fw.array(X))
            np.testing.assert_allclose(fw.numpy(one), exact(X), rtol=1e-9, atol=1e-9 * np.abs(exact(X)).max())
        if not compiled:
            many = fw.vmap(g)
            many = (fw.compile(many) if fw.name == "jax" else many)(points)
            np.testing.assert_allclose(
                fw.numpy(many), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max()
            )
    except Exception as error:
        if "raised exception StrategyError" in str(error):  # how torch.compile passes ours on
            return "refused"
        raise
    return "right"


def cells(fw, f, case):
    """Name to a function without arguments that gives the outcome, for every cell of a problem."""
    table = {nest: lambda g=g, e=exact: outcome(fw, g, e) for nest, g, exact in nests(fw, f, case)}
    if fw.name == "torch":
        w = fw.array(W)
        gradient = fw.grad(lambda x: (f(x) * w).sum())
        table["compiled"] = lambda: outcome(fw, f, case.value, True)
        table["compiled grad"] = lambda: outcome(
            fw, gradient, lambda x: np.array([case.along(x, e) @ W for e in np.eye(3)]), True
        )
    return table


INTRODUCTION = """# Derivatives of solutions: what composes with what

`root`, `fixed_point` and `argmin` by every linear solver, differentiated in every nest of modes to third
order, each cell compared with a closed form to 1e-9 in float64 at three points. Generated by
`python tests/implicit_table.py [jax|torch] --write`; `tests/test_implicit.py` runs the cells again.

- *right*: the closed form, mapped over three points as well as at one. In jax each cell is compiled too.
- *refused*: gradlab's own StrategyError, which names what to use instead: torch.compile traces no loop whose
  steps depend on the numbers.
- "own" is a linear solver of the user's, in torch with control flow by the numbers, which vmap runs example by
  example; "closing over x": x is not an argument of the equation but stands in its closure.
"""


def main():
    """Print or write the tables of both frameworks."""
    import sys

    import jax

    from composition import PAGE, markdown
    from frameworks import load

    jax.config.update("jax_enable_x64", True)
    page = PAGE.with_name("implicit_composition.md")
    sections = page.read_text().split("\n## ")[1:] if page.exists() else ["jax\n", "torch\n"]
    for name in [name for name in ("jax", "torch") if name in sys.argv] or ("jax", "torch"):
        fw = load(name)
        rows = {}
        for problem, f, M in solutions(fw):
            table = cells(fw, f, Case(problem, f, 1, M))
            rows[problem] = {cell: run() for cell, run in table.items()}
            print(name, problem, file=sys.stderr, flush=True)
        columns = list(next(iter(rows.values())))
        turned = {cell: {problem: rows[problem][cell] for problem in rows} for cell in columns}
        section = f"{name}\n\n{markdown(turned).replace('| operation |', '| nest |')}\n"
        sections = [section if old.startswith(name) else old for old in sections]
    text = INTRODUCTION + "".join(f"\n## {section}" for section in sections)
    if "--write" in sys.argv:
        page.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
