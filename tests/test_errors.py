"""Bad input gets the named error before any work; where a zero derivative is the truth, zeros."""

import numpy as np
import pytest

import gradlab
from frameworks import flat
from gradlab import BackendError, InputError, KindError, TooLargeError
from gradlab.transforms import hessians, jacobians

cube = lambda x: (x**3).sum()


def raises(error, match):
    return pytest.raises(error, match=match)


def point(fw, *shape):
    return fw.array(np.ones(shape))


def test_direction_of_another_shape_names_the_leaf(fw):
    f = lambda x: (x["w"] ** 3).sum()
    with raises(InputError, r"hvp: v\['w'\] has shape \(3,\), x\['w'\] has shape \(4,\); pass a direction"):
        fw.gl.hvp(f, {"w": point(fw, 4)}, {"w": point(fw, 3)})


def test_direction_of_another_structure(fw):
    f = lambda x: (x["w"] ** 3).sum()
    with raises(InputError, "hvp: v has the structure"):
        fw.gl.hvp(f, {"w": point(fw, 4)}, [point(fw, 4)])
    with raises(InputError, "hvp: v has the structure"):
        fw.gl.hvp(f, {"w": point(fw, 4)}, {"w": point(fw, 4), "b": point(fw, 1)})


def test_direction_of_another_dtype(fw):
    with raises(KindError, r"hvp: v has dtype .*float32, x has dtype .*float64; convert the direction"):
        fw.gl.hvp(cube, point(fw, 2), fw.array(np.ones(2), "float32"))


def test_direction_that_only_broadcasts(fw):
    with raises(InputError, r"v has shape \(1, 2\), x has shape \(2, 2\)"):
        fw.gl.hvp(cube, point(fw, 2, 2), point(fw, 1, 2))
    with raises(InputError, r"v has shape \(\), x has shape \(2,\)"):
        fw.gl.hessian_operator(cube, point(fw, 2)) @ fw.array(1.0)


def test_stacked_directions_that_do_not_fit(fw):
    H = fw.gl.hessian_operator(lambda x: cube(x["a"]) + cube(x["b"]), {"a": point(fw, 2), "b": point(fw, 3)})
    with raises(
        InputError, r"V\['b'\] has shape \(5, 3\), x\['b'\] has shape \(3,\); pass directions stacked"
    ):
        H.matmat({"a": point(fw, 4, 2), "b": point(fw, 5, 3)})
    with raises(InputError, "pass directions stacked"):
        H.matmat({"a": point(fw, 2), "b": point(fw, 3)})
    with raises(InputError, "V has the structure"):
        H.matmat(point(fw, 4, 6))
    with raises(InputError, "no directions|stacked"):
        H.matmat({"a": point(fw, 0, 2), "b": point(fw, 0, 3)})


SCALAR_OPS = ["hvp", "hessian", "hessian_diagonal", "hessian_operator"]


def call(fw, op, f, x, **options):
    second = (x,) if op == "hvp" else ()
    return getattr(fw.gl, op)(f, x, *second, **options)


@pytest.mark.parametrize("op", SCALAR_OPS)
def test_a_vector_where_a_scalar_is_needed(fw, op):
    with raises(InputError, rf"{op}: f must return one scalar, it returned shape \(2,\); sum it"):
        call(fw, op, lambda x: x**2, point(fw, 2))
    with raises(InputError, "one scalar"):
        call(fw, op, lambda x: {"a": x.sum(), "b": x.sum()}, point(fw, 2))


@pytest.mark.parametrize("op", [*SCALAR_OPS, "jacobian", "jacobian_operator"])
def test_wrong_kinds_of_x(fw, op):
    with raises(KindError, f"{op}: x holds no float .* to differentiate"):
        call(fw, op, cube, fw.array(np.ones(2, int)))
    with raises(KindError, f"{op}: x holds complex numbers"):
        call(fw, op, cube, fw.array(np.ones(2, complex)))
    with raises(KindError, f"{op}: x holds complex numbers"):
        call(fw, op, lambda x: cube(x["a"]), {"a": point(fw, 2), "c": fw.array(np.ones(2, complex))})
    for empty in ({}, [], ()):
        with raises(InputError, f"{op}: x is an empty tree"):
            call(fw, op, lambda x: 1.0, empty)


@pytest.mark.parametrize("op", [*SCALAR_OPS, "jacobian", "jacobian_operator"])
def test_wrong_kinds_of_output(fw, op):
    whole = lambda x: (x**2).sum() > 1
    with raises(KindError, f"{op}: f's output holds no float"):
        call(fw, op, whole, point(fw, 2))
    with raises(KindError, f"{op}: f's output holds complex"):
        call(fw, op, lambda x: (x * 1j).sum(), point(fw, 2))
    with raises(KindError, "return anything else as aux|holds no float"):
        call(fw, op, lambda x: (x.sum(), "name"), point(fw, 2))
    with raises(KindError, "with has_aux=True f must return"):
        call(fw, op, cube, point(fw, 2), has_aux=True)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0, True, "all"])
def test_chunk_sizes(fw, chunk_size):
    for op in ("hessian", "hessian_diagonal", "hessian_operator", "jacobian", "jacobian_operator"):
        with raises(InputError, f"{op}: chunk_size is .*; pass a positive integer or None"):
            call(fw, op, cube, point(fw, 2), chunk_size=chunk_size)


def test_unknown_options(fw):
    with raises(InputError, "hvp: unknown strategy 'fast'; pass one of auto, forward_over_reverse"):
        fw.gl.hvp(cube, point(fw, 2), point(fw, 2), strategy="fast")
    with raises(InputError, "jacobian: unknown mode 'both'; pass one of auto, forward, reverse"):
        fw.gl.jacobian(cube, point(fw, 2), mode="both")


def test_bad_options_are_refused_before_f_runs(fw):
    def never(x):
        raise AssertionError("f was called")

    x = point(fw, 2)
    for call_ in (
        lambda: fw.gl.hvp(never, x, x, strategy="fast"),
        lambda: fw.gl.hvp(never, x, point(fw, 3)),
        lambda: fw.gl.jacobian(never, x, mode="both"),
        lambda: fw.gl.hessian(never, x, chunk_size=0),
        lambda: fw.gl.hessian(never, fw.array(np.ones(1_000_000))),
    ):
        with pytest.raises(gradlab.GradlabError):
            call_()


def test_a_dense_matrix_that_cannot_fit(fw):
    """10^6 floats: the matrix would take terabytes; said with its size, at once."""
    x = fw.array(np.ones(1_000_000))
    with raises(
        TooLargeError, r"hessian: the dense 1000000 x 1000000 matrix needs 7450.6 GiB, the device has"
    ):
        fw.gl.hessian(cube, x)
    with raises(MemoryError, "dense"):
        fw.gl.hessian_operator(cube, x).dense()
    with raises(TooLargeError, "jacobian: the dense 1000000 x 1000000"):
        fw.gl.jacobian(lambda x: x**2, x)


def test_a_zero_derivative_is_zeros(fw):
    x = {"a": point(fw, 2), "b": [point(fw, 3)]}
    for f in (lambda x: 2.0, lambda x: 2 * x["a"].sum(), lambda x: fw.array(np.array(1.0))):
        product = fw.gl.hvp(f, x, x)
        assert product["a"].shape == (2,)
        assert product["b"][0].shape == (3,)
        assert not flat(fw, product).any()
        assert not flat(fw, fw.gl.hessian_diagonal(f, x)).any()
        assert not fw.numpy(fw.gl.hessian_operator(f, x).dense()).any()
    constant = lambda x: 2.0
    assert not flat(fw, fw.gl.jacobian(constant, x)).any()
    assert not fw.numpy(fw.gl.jacobian_operator(constant, x).dense()).any()


def test_errors_derive_from_the_builtin_ones():
    assert issubclass(InputError, ValueError)
    assert issubclass(KindError, TypeError)
    assert issubclass(BackendError, TypeError)
    assert issubclass(TooLargeError, MemoryError)
    assert issubclass(gradlab.StrategyError, ValueError)


@pytest.mark.parametrize("op", [*hessians.__all__, *jacobians.__all__])
def test_no_framework_or_two(op):
    torch, jnp = pytest.importorskip("torch"), pytest.importorskip("jax.numpy")
    arity = {"hvp": 2, "ggn_vp": 3, "ggn_operator": 2}.get(op, 1)
    functions = (cube, cube) if op.startswith("ggn") else (cube,)
    values = arity - len(functions) + 1
    named = rf"{op}: .* or call gradlab.jax.{op} or gradlab.torch.{op}"
    with raises(BackendError, named):
        getattr(gradlab, op)(*functions, *[np.ones(2)] * values)
    with raises(BackendError, named):
        getattr(gradlab, op)(*functions, *[1.0] * values)
    with raises(BackendError, named):
        getattr(gradlab, op)(*functions, *[torch.ones(2)] * values, jnp.ones(2))
