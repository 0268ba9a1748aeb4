"""The conditions that make a Runge-Kutta method one of its order, by Butcher's rooted trees.

A tree is the tuple of its branches. With γ its density, the method is of order p if Σᵢ bᵢ Φᵢ = 1 / γ for every
tree of at most p nodes; the polynomial within a step if Σᵢ bᵢ(θ) Φᵢ = θⁿ / γ for every tree of n.
"""

from functools import cache
from math import prod

import numpy as np
import pytest

from gradlab.transforms.odes.rosenbrock import RODAS5P
from gradlab.transforms.odes.tableaux import METHODS

RUNGE_KUTTA = {name: tableau for name, tableau in METHODS.items() if tableau is not RODAS5P}
THETA = np.linspace(0, 1, 9)


@cache
def trees(n):
    """All rooted trees of n nodes."""
    return tuple((*forest,) for forest in forests(n - 1, n - 1))


@cache
def forests(n, largest):
    """All multisets of trees of n nodes together, none of more than `largest`."""
    if n == 0:
        return ((),)
    found = {
        tuple(sorted((tree, *rest)))
        for size in range(1, min(n, largest) + 1)
        for tree in trees(size)
        for rest in forests(n - size, size)
    }
    return tuple(found)


def nodes(tree):
    return 1 + sum(map(nodes, tree))


def density(tree):
    return nodes(tree) * prod(map(density, tree))


def matrix(tableau):
    A = np.zeros((tableau.stages, tableau.stages))
    for i, row in enumerate(tableau.a):
        A[i, : len(row)] = row
    A[np.arange(1, len(A)), np.arange(1, len(A))] = tableau.diagonal
    return A


def stage_weights(A, tree):
    """Φᵢ of each stage i."""
    return np.prod([np.ones(len(A)), *(A @ stage_weights(A, branch) for branch in tree)], axis=0)


def residual(A, b, n, theta=1.0):
    """The largest residual of the conditions of order n; b may hold a row for each θ."""
    return max(abs(b @ stage_weights(A, tree) - theta**n / density(tree)).max() for tree in trees(n))


def test_there_are_as_many_trees_as_known():
    assert [len(trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


@pytest.mark.parametrize("tableau", RUNGE_KUTTA.values(), ids=RUNGE_KUTTA)
def test_order(tableau):
    A, b = matrix(tableau), np.array(tableau.b)
    assert np.allclose(A.sum(1), tableau.c, rtol=0, atol=1e-11)
    for n in range(1, tableau.order + 1):
        assert residual(A, b, n) < 1e-11
    assert residual(A, b, tableau.order + 1) > 1e-6
    if tableau.embedded is not None:
        embedded = np.array(tableau.embedded)
        for n in range(1, tableau.error_order + 1):
            assert residual(A, embedded, n) < 1e-11
        assert residual(A, embedded, tableau.error_order + 1) > 1e-6


@pytest.mark.parametrize("tableau", RUNGE_KUTTA.values(), ids=RUNGE_KUTTA)
def test_order_within_a_step(tableau):
    A, P = matrix(tableau), np.array(tableau.dense)
    b = THETA[:, None] ** np.arange(1, len(P) + 1) @ P
    for n in range(1, tableau.dense_order + 1):
        assert residual(A, b, n, THETA) < 1e-11
    assert residual(A, b, tableau.dense_order + 1, THETA) > 1e-6
    assert np.allclose(b[-1], tableau.b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("tableau", RUNGE_KUTTA.values(), ids=RUNGE_KUTTA)
def test_the_last_stage_is_the_end_of_the_step(tableau):
    assert tableau.c[-1] == 1
    assert len(tableau.b) == tableau.stages
    if tableau.implicit:  # stiffly accurate: the last equation is that of the step
        assert tableau.b[-1] == tableau.diagonal
    else:
        assert tableau.b[-1] == 0


def lower(rows):
    """Rows of a strictly lower triangle as a matrix."""
    return np.array([[*row, *[0.0] * (len(rows) - len(row))] for row in rows])


def rosenbrock_weights(alpha, beta, tree):
    """Φᵢ of each stage: a branch that stands alone goes by β, as J multiplies it, others by α."""
    step = beta if len(tree) == 1 else alpha
    return np.prod(
        [np.ones(len(alpha)), *(step @ rosenbrock_weights(alpha, beta, branch) for branch in tree)], axis=0
    )


def test_order_of_a_rosenbrock_method():
    """The conditions of Hairer and Wanner (1996), IV.7, in the variables before u = Γ k."""
    inverse = np.eye(8) / RODAS5P.diagonal - lower(RODAS5P.coupling)
    gamma = np.linalg.inv(inverse)
    alpha = lower(RODAS5P.a) @ gamma
    assert np.allclose(alpha.sum(1), RODAS5P.c, rtol=0, atol=1e-11)
    assert np.allclose(gamma.sum(1), RODAS5P.drift, rtol=0, atol=1e-11)

    def residual(weights, n, theta=1.0):
        rows = [weights @ gamma @ rosenbrock_weights(alpha, alpha + gamma, t) for t in trees(n)]
        return max(abs(row - theta**n / density(t)).max() for row, t in zip(rows, trees(n), strict=True))

    P = np.array(RODAS5P.dense)
    within = THETA[:, None] ** np.arange(1, len(P) + 1) @ P
    for weights, order, theta in (
        (np.array(RODAS5P.b), RODAS5P.order, 1.0),
        (np.array(RODAS5P.embedded), RODAS5P.error_order, 1.0),
        (within, RODAS5P.dense_order, THETA),
    ):
        for n in range(1, order + 1):
            assert residual(weights, n, theta) < 1e-11
        assert residual(weights, order + 1, theta) > 1e-6
    assert np.allclose(within[-1], RODAS5P.b, rtol=0, atol=1e-11)
