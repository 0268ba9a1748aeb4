"""Exploration: a fault that does not show at x is found elsewhere and shrunk."""

import numpy as np
import pytest

from frameworks import load
from gradlab import check

X = np.array([0.4, 0.7, 1.2, 1.9])


def cube(fw, faulty):
    """Σ x³ by a rule that is wrong by a thirtieth where `faulty`."""
    if fw.name == "torch":

        class Cube(fw.xp.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x**3

            @staticmethod
            def backward(ctx, u):
                (x,) = ctx.saved_tensors
                return fw.xp.where(faulty(x), 2.9, 3.0) * x**2 * u

        return lambda x: Cube.apply(x).sum()
    import jax

    rule = jax.custom_vjp(lambda x: x**3)
    rule.defvjp(lambda x: (x**3, x), lambda x, u: (fw.xp.where(faulty(x), 2.9, 3.0) * x**2 * u,))
    return lambda x: rule(x).sum()


@pytest.mark.parametrize(
    ("framework", "faulty", "found"),
    [
        ("torch", lambda x: x > 37.2, lambda z: z.max() == 38),
        ("jax", lambda x: x < 0, lambda z: (z < 0).any()),
    ],
    ids=["beyond 37.2", "negative"],
)
def test_a_fault_away_from_x_is_found_and_shrunk(framework, faulty, found):
    fw = load(framework)
    f, x = cube(fw, faulty), fw.array(X)
    assert check.derivatives(f, x, order=1, vmap=False).passed
    report = check.derivatives(f, x, order=1, vmap=False, explore=True)
    assert report["gradient"].status == "failed"
    assert found(fw.numpy(report.point))
    with pytest.raises(check.CheckError, match="that exploration found"):
        report.raise_if_failed()


def test_the_point_is_a_tree_like_x():
    fw = load("torch")
    f = cube(fw, lambda x: x > 30)
    x = {"a": fw.array(X), "z": fw.xp.tensor([1.0 + 2.0j], dtype=fw.xp.complex128), "n": 3}
    report = check.derivatives(
        lambda p: f(p["a"]) + (p["z"] * p["z"].conj()).real.sum(), x, order=1, vmap=False, explore=True
    )
    assert report.failed
    assert report.point["z"].dtype == fw.xp.complex128
    assert report.point["n"] == 3
    assert (report.point["a"] > 30).any()


def test_what_is_right_everywhere_stays_passed(monkeypatch):
    fw = load("torch")
    monkeypatch.setattr("gradlab.check.exploration.EXAMPLES", 20)
    report = check.derivatives(cube(fw, lambda x: x != x), fw.array(X), order=1, vmap=False, explore=True)
    assert report.passed
    assert report.point is None
