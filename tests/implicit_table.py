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


def table(fw):
    """Largest relative error of every cell, at one point and mapped over three: {problem: {nest: error}}."""
    rows = {}
    for name, f, M in solutions(fw):
        case = Case(name, f, 1, M)
        rows[name] = {}
        for nest, g, exact in nests(fw, f, case):
            cells = {nest: (g, fw.array(X), exact(X))}
            points = np.stack(POINTS)
            cells[f"vmap of {nest}"] = (fw.vmap(g), fw.array(points), np.stack([exact(x) for x in POINTS]))
            for cell, (call, x, expected) in cells.items():
                rows[name][cell] = np.abs(fw.numpy(call(x)) - expected).max() / np.abs(expected).max()
    return rows


if __name__ == "__main__":
    import sys
    import time

    from frameworks import load

    import jax

    jax.config.update("jax_enable_x64", True)
    fw = load(sys.argv[1])
    for name, f, M in solutions(fw):
        if len(sys.argv) > 2 and not name.startswith(sys.argv[2]):
            continue
        case = Case(name, f, 1, M)
        t = time.time()
        worst = 0
        for nest, g, exact in nests(fw, f, case):
            try:
                e = np.abs(fw.numpy(g(fw.array(X))) - exact(X)).max() / np.abs(exact(X)).max()
                expected = np.stack([exact(x) for x in POINTS])
                ev = (
                    np.abs(fw.numpy(fw.vmap(g)(fw.array(np.stack(POINTS)))) - expected).max()
                    / np.abs(expected).max()
                )
            except Exception as err:
                print(name, nest, type(err), str(err)[-300:])
                continue
            worst = max(worst, e, ev)
            if not max(e, ev) < 1e-9:
                print(name, nest, e, ev)
        print(name, worst, time.time() - t, flush=True)
