"""Every claim of the checker fails on a function that breaks it alone, and says so in its row."""

import numpy as np
import pytest

from gradlab import InputError, check
from test_check import POINT, with_rule

torch_only = pytest.fixture(lambda: pytest.importorskip("torch"))


def statuses(report, status="failed"):
    return {row.claim for row in report.rows if row.status == status}


def function(torch, backward, jvp=None, vmap=None, forward=lambda x: x**3):
    """An autograd.Function of one tensor with rules of our own."""

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    methods = {
        "forward": staticmethod(lambda x: forward(x)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(lambda ctx, u: backward(ctx.saved_tensors[0], u)),
        "jvp": staticmethod(lambda ctx, v: (jvp or (lambda x, v: 3 * x**2 * v))(ctx.saved_tensors[0], v)),
        "generate_vmap_rule": vmap is None,
    }
    if vmap is not None:
        methods["vmap"] = staticmethod(vmap)
    return type("Own", (torch.autograd.Function,), methods).apply


def test_a_wrong_jvp_is_told_from_a_right_vjp(torch_only):
    cube = function(torch_only, lambda x, u: 3 * x**2 * u, jvp=lambda x, v: 2.9 * x**2 * v)
    report = check.derivatives(cube, torch_only.tensor(POINT), order=1)
    assert {"jvp", "jvp against vjp"} <= statuses(report)
    assert not {"vjp", "vjp linear", "vmap"} & statuses(report)


def test_a_pullback_that_is_not_linear(fw):
    clipped = lambda x, u, stop: (
        3 * x**2 * (u.clip(-0.3, 0.3) if fw.name == "torch" else fw.xp.clip(u, -0.3, 0.3))
    )
    cube = with_rule(fw, lambda x: x**3, clipped)
    assert "vjp linear" in statuses(check.derivatives(cube, fw.array(POINT), order=1))
    shifted = with_rule(fw, lambda x: x**3, lambda x, u, stop: 3 * x**2 * u + 1e-3)
    assert "vjp linear" in statuses(check.derivatives(shifted, fw.array(POINT), order=1))


def test_a_pullback_that_changes_its_cotangent(torch_only):
    cube = function(torch_only, lambda x, u: u.mul_(3 * x**2))
    report = check.derivatives(cube, torch_only.tensor(POINT), order=1, vmap=False)
    assert report["vjp repeatable"].status == "failed"
    assert "changed its cotangent" in report["vjp repeatable"].message
    count = iter(range(10**9))
    drifting = function(torch_only, lambda x, u: 3 * x**2 * u * (1 + 0.1 * next(count)))
    assert "vjp repeatable" in statuses(
        check.derivatives(drifting, torch_only.tensor(POINT), order=1, vmap=False)
    )


def test_a_wrong_batching_rule(torch_only):
    def rolled(info, in_dims, x):
        return function(torch_only, lambda x, u: 3 * x**2 * u)(x.roll(1, 0)), 0

    cube = function(torch_only, lambda x, u: 3 * x**2 * u, vmap=rolled)
    report = check.derivatives(cube, torch_only.tensor(POINT), order=1)
    assert "vmap" in statuses(report)
    assert not {"value", "jvp", "vjp", "vjp linear"} & statuses(report)
    jax = pytest.importorskip("jax")
    mixed = jax.custom_batching.custom_vmap(lambda x: x**3)
    mixed.def_vmap(lambda size, batched, x: (x**3 + 0.1 * x.mean(0), True))
    assert "vmap" in statuses(check.derivatives(mixed, jax.numpy.asarray(POINT), order=1))


def test_a_function_that_is_another_when_compiled(fw):
    if fw.name == "torch":
        from torch.compiler import is_compiling as compiling
    else:
        from jax.extend.core import unsafe_am_i_under_a_jit_DO_NOT_USE as compiling
    report = check.derivatives(
        lambda x: x**3 * (2.0 if compiling() else 1.0), fw.array(POINT), order=1, compiled=True
    )
    assert report["compiled"].status == "failed"
    same = check.derivatives(lambda x: x**3, fw.array(POINT), order=1, compiled=True)
    assert same["compiled"].status == "passed"


def test_parts_alone(torch_only):
    """A rule that takes the gradient of one argument for granted."""

    class Product(torch_only.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a * b, a + b

        @staticmethod
        def backward(ctx, u, w):
            a, b = ctx.saved_tensors
            both = bool((u != 0).any()) and bool((w != 0).any())
            return u * b + w, u * a + (w if both else 0 * w)

    f = lambda x: Product.apply(x["a"], x["b"])
    x = {"a": torch_only.tensor(POINT), "b": torch_only.tensor(POINT) + 1}
    assert "each part alone" in statuses(check.derivatives(f, x, order=1, modes="reverse", vmap=False))


@pytest.mark.parametrize("wrong", [0.0, 1e-4])
def test_a_solver_s_own_accuracy(torch_only, wrong):
    """A pullback that is right to 1e-9 fails against rounding, and passes where that is its accuracy."""
    torch = torch_only
    solved = function(torch, lambda x, u: 3 * x**2 * u * (1 + 1e-9 + wrong))
    f = lambda x: solved(x).sum()
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    report = lambda **how: check.derivatives(f, x, order=1, vmap=False, **how)
    assert report()["jvp against vjp"].status == "failed"
    assert report(accuracy=1e-8).passed == (wrong == 0)
    with pytest.raises(InputError, match="accuracy is 2"):
        report(accuracy=2)


def test_third_order(fw):
    good = lambda x: (fw.xp.sin(x) * x).sum()
    report = check.derivatives(good, fw.array(POINT), order=3)
    assert report.passed
    assert sum(row.claim.count("over") == 2 for row in report.rows) == 8
    # right to second order, wrong at third: the cube of x less its frozen self vanishes twice
    stop = (lambda x: x.detach()) if fw.name == "torch" else __import__("jax").lax.stop_gradient
    frozen = lambda x: good(x) + ((x - stop(x)) ** 3).sum()
    failed = statuses(check.derivatives(frozen, fw.array(POINT), order=3))
    assert "reverse over reverse over reverse" in failed
    assert not {"vjp", "hvp", "reverse over reverse"} & failed


@pytest.mark.parametrize("single", [False, True])
def test_complex_functions(fw, single):
    z = np.array([1 + 2j, 0.5 - 1j, -0.3 + 0.1j])
    kind = "complex64" if single else "complex128"
    z = fw.xp.asarray(z.astype(kind)) if fw.name == "jax" else fw.xp.tensor(z.astype(kind))
    conj = fw.xp.conj
    check.derivatives(lambda z: z**2 * conj(z), z).raise_if_failed()
    check.derivatives(lambda z: abs(z * z.sum()).sum(), z).raise_if_failed()
    # a rule that forgets the conjugate
    if fw.name == "torch":
        import torch

        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, z):
                ctx.save_for_backward(z)
                return z**2

            @staticmethod
            def backward(ctx, u):
                return 2 * ctx.saved_tensors[0] * u

        wrong = Wrong.apply
    else:
        import jax

        wrong = jax.custom_vjp(lambda z: z**2)
        wrong.defvjp(lambda z: (z**2, z), lambda z, u: (2 * conj(z) * u,))
    assert "vjp" in statuses(check.derivatives(wrong, z, order=1))


def test_a_framework_s_own_fault_is_named(torch_only):
    f = lambda x: torch_only.nn.functional.layer_norm(x, (23,)).pow(3).sum()
    report = check.derivatives(f, torch_only.tensor(POINT))
    assert statuses(report) == {"forward over forward", "reverse over forward"}
    assert "layer_norm differentiated by primitives is right" in report["reverse over forward"].message
    assert check.derivatives(f, torch_only.tensor(POINT), modes="reverse").passed


def test_a_rule_under_noise_does_not_pass(torch_only):
    noisy = function(
        torch_only, lambda x, u: 3.6 * x**2 * u, forward=lambda x: x**3 + 0.1 * torch_only.sin(1e13 * x)
    )
    report = check.derivatives(noisy, torch_only.tensor(POINT), order=1, modes="reverse")
    assert not report.passed
    assert report["vjp"].status == "inconclusive"
    with torch_only.random.fork_rng():
        torch_only.manual_seed(438)  # its first two calls coincide
        random = check.derivatives(
            lambda x: torch_only.dropout(x, 0.5, True).sum(), torch_only.linspace(0.5, 1.5, 10)
        )
    assert random["value"].status == "failed"


RIGHT_IN_LOW_PRECISION = {
    "an edge of the domain": lambda torch: (lambda x: torch.acos(x).sum(), torch.tensor([0.999])),
    "two dtypes": lambda torch: (
        lambda p: (p["a"] ** 3).sum() + (p["b"] ** 2).sum(),
        {"a": torch.linspace(0.5, 1.5, 10), "b": torch.linspace(0.5, 1.5, 10).double()},
    ),
    "bfloat16 inside": lambda torch: (
        lambda x: (x.bfloat16() ** 3).float().sum(),
        torch.linspace(0.5, 1.5, 10),
    ),
    "bfloat16": lambda torch: (lambda x: (x**3).sum(), torch.linspace(0.5, 1.5, 10).bfloat16()),
    "float16": lambda torch: (lambda x: torch.sin(x).sum(), torch.linspace(0.5, 1.5, 10).half()),
}


@pytest.mark.parametrize("name", RIGHT_IN_LOW_PRECISION)
def test_low_precision_is_no_fault(torch_only, name):
    f, x = RIGHT_IN_LOW_PRECISION[name](torch_only)
    check.derivatives(f, x).raise_if_failed()


def test_keyed_random_numbers_are_no_fault():
    """jax draws other numbers in float64, so that the float64 run is of another function."""
    jax = pytest.importorskip("jax")
    f = lambda x: (jax.random.normal(jax.random.key(0), (4,), x.dtype) * x**2).sum()
    check.derivatives(f, jax.numpy.asarray([0.3, 0.5, -0.2, 0.9], "float32"), order=1).raise_if_failed()
