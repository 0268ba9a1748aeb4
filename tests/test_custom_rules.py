"""custom_vjp and custom_jvp: every transform and nest, trees, closures, bad rules, verification."""

import re

import numpy as np
import pytest

import gradlab
import rule_composition
from frameworks import FRAMEWORKS, load
from gradlab.check import CheckError


def documented(framework):
    """The page's table of one framework: {transform: {kind: outcome}}."""
    section = rule_composition.PAGE.read_text().split(f"## {framework}\n")[1].split("\n## ")[0]
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in section.strip().split("\n")]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


@pytest.mark.parametrize(
    "number", [pytest.param(i, marks=[pytest.mark.slow] * (i % 4 > 0)) for i in range(8)]
)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_cell(framework, number):
    fw = load(framework)
    page, kind = documented(framework), list(rule_composition.kinds(fw))[number]
    transforms = rule_composition.transforms(fw)
    assert set(page) == set(transforms)
    for name, transform in transforms.items():
        try:
            found = rule_composition.outcome(transform, kind, fw)
        except Exception as error:
            raise AssertionError(f"{kind.name} under {name}") from error
        assert found == page[name][kind.name], f"{kind.name} under {name}: {found}"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_no_cell_is_refused_but_closures_compiled_by_torch(framework):
    for name, row in documented(framework).items():
        for kind, outcome in row.items():
            excused = framework == "torch" and "compiled" in name and "closure" in kind
            assert outcome == ("refused (StrategyError)" if excused else "right"), (name, kind)


def test_a_wrong_cell_is_seen(fw):
    kind = next(rule_composition.kinds(fw))
    wrong = rule_composition.Kind("f's own derivative", lambda x: kind.f(x) * (1 + 1e-8), kind.factors)
    for name, transform in rule_composition.transforms(fw).items():
        if "compiled" not in name:
            with pytest.raises(AssertionError):
                rule_composition.outcome(transform, wrong, fw)


def test_the_facade_declares_before_the_framework_is_known(fw):
    kind = next(rule_composition.kinds(fw, declare=gradlab))
    for name in ("value", "grad", "jvp of jvp", "vmap of grad of jvp", "compiled grad"):
        assert rule_composition.outcome(rule_composition.transforms(fw)[name], kind, fw) == "right"


def test_one_facade_rule_serves_both_frameworks():
    cube = gradlab.custom_vjp(lambda x: x**3)
    cube.defvjp(lambda x: (x**3, x), lambda x, u: (5 * x**2 * u,))
    for name in FRAMEWORKS:
        fw = load(name)
        np.testing.assert_allclose(fw.numpy(fw.grad(cube)(fw.array(2.0))), 20.0)
    with pytest.raises(gradlab.BackendError, match=r"gradlab\.jax\.custom_vjp"):
        cube(2.0)


def square(fw, *, check=False, bwd=None, fwd=None):
    """x² by a custom_vjp."""
    f = fw.gl.custom_vjp(lambda x: x**2, check=check)
    f.defvjp(fwd or (lambda x: (x**2, x)), bwd or (lambda x, u: (2 * x * u,)))
    return f


def square_by_tangent(fw, rule, *, check=False):
    f = fw.gl.custom_jvp(lambda x: x**2, check=check)
    f.defjvp(rule)
    return f


def test_one_evaluation_of_fwd_and_bwd(fw):
    calls = []

    def fwd(x):
        calls.append("fwd")
        return x**2, x

    f = square(fw, fwd=fwd)
    if fw.name == "torch":
        x = fw.array(np.array(3.0)).requires_grad_()
        f(x).backward()
    else:
        fw.compile(fw.grad(f))(fw.array(3.0))
    assert calls == ["fwd"]


def test_an_argument_without_cotangent_is_zero(fw):
    f = fw.gl.custom_vjp(lambda x, y: x * y)
    f.defvjp(lambda x, y: (x * y, y), lambda y, u: (u * y, None))
    one = fw.array(np.array(1.0))
    grads = fw.grad(lambda xy: f(*xy))((2 * one, 3 * one))
    np.testing.assert_allclose([fw.numpy(g) for g in grads], [3.0, 0.0])
    np.testing.assert_allclose(fw.numpy(fw.jvp(lambda y: f(one, y), 3 * one, one)), 0.0)


def test_static_arguments_come_first_in_their_given_order(fw):
    def rule(b, a, residuals, u):
        assert (b, a) == ("b", "a")
        return (3 * u,)

    f = fw.gl.custom_vjp(lambda a, x, b: x, nondiff_argnums=(2, 0))
    f.defvjp(lambda a, x, b: (x, None), rule)
    np.testing.assert_allclose(fw.numpy(fw.grad(lambda x: f("a", x, b="b"))(fw.array(np.array(1.0)))), 3.0)
    g = fw.gl.custom_jvp(lambda name, x: x, nondiff_argnums=(0,))
    g.defjvp(lambda name, xs, vs: (xs[0], 3 * vs[0]))
    np.testing.assert_allclose(fw.numpy(fw.grad(lambda x: g("a", x))(fw.array(np.array(1.0)))), 3.0)


def test_integers_functions_and_none_are_handed_on(fw):
    xp = fw.xp

    def fwd(x, index, apply, nothing):
        assert nothing is None
        return apply(x[index]), (x, index)

    def bwd(residuals, u):
        x, _ = residuals
        return xp.zeros_like(x) + 7 * u, None, None, None

    f = fw.gl.custom_vjp(lambda x, index, apply, nothing: apply(x[index]))
    f.defvjp(fwd, bwd)
    x, indices = fw.array(np.array([1.0, 2.0])), fw.array(np.array([0, 1, 1]))
    g = lambda x, i: f(x, i, xp.exp, None)
    np.testing.assert_allclose(fw.numpy(fw.grad(lambda x: g(x, indices[1]))(x)), [7.0, 7.0])
    by_index = fw.grad(lambda x: fw.vmap(lambda i: g(x, i))(indices).sum())(x)
    np.testing.assert_allclose(fw.numpy(by_index), [21.0, 21.0])


def test_outputs_that_are_integers(fw):
    f = fw.gl.custom_vjp(lambda x: {"y": 2 * x, "positive": x > 0})
    f.defvjp(lambda x: ({"y": 2 * x, "positive": x > 0}, None), lambda _, u: (5 * u["y"],))
    x, one = fw.array(np.array(1.5)), fw.array(np.array(1.0))
    np.testing.assert_allclose(fw.numpy(fw.grad(lambda x: f(x)["y"])(x)), 5.0)
    np.testing.assert_allclose(fw.numpy(fw.jvp(lambda x: f(x)["y"], x, one)), 5.0)
    assert bool(f(x)["positive"])


def test_the_batched_form_is_used_where_nothing_is_differentiated(fw):
    seen = []
    f = square(fw)

    @f.defvmap
    def batched(size, in_batched, x):
        seen.append((size, in_batched))
        return x**2 + 100, True

    x = fw.array(np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(fw.numpy(fw.vmap(f)(x)), [101.0, 104.0, 109.0])
    assert seen == [(3, (True,))]
    np.testing.assert_allclose(fw.numpy(fw.vmap(fw.grad(f))(x)), [2.0, 4.0, 6.0])
    grid = fw.vmap(lambda y: fw.vmap(lambda x: f(x))(y))(fw.array(np.ones((2, 3))))
    assert grid.shape == (2, 3)


# Closures: right, or refused by name.


def scaled(fw, c, kind):
    """sin(x) c with c in a closure."""
    sin, cos = fw.xp.sin, fw.xp.cos
    if kind == "custom_vjp":
        f = fw.gl.custom_vjp(lambda x: sin(x) * c)
        f.defvjp(lambda x: (sin(x) * c, x), lambda x, u: (cos(x) * c * u,))
    else:
        f = fw.gl.custom_jvp(lambda x: sin(x) * c)
        f.defjvp(lambda xs, vs: (sin(xs[0]) * c, cos(xs[0]) * c * vs[0]))
    return f


@pytest.mark.parametrize("kind", ["custom_vjp", "custom_jvp"])
def test_closures_over_mapped_arrays(fw, kind):
    x, cs = fw.array(np.array(0.7)), fw.array(np.array([1.0, 2.0, 3.0]))
    one, slopes = fw.array(np.array(1.0)), np.cos(0.7) * np.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(
        fw.numpy(fw.vmap(lambda c: scaled(fw, c, kind)(x))(cs)), np.sin(0.7) * fw.numpy(cs)
    )
    np.testing.assert_allclose(fw.numpy(fw.vmap(lambda c: fw.grad(scaled(fw, c, kind))(x))(cs)), slopes)
    np.testing.assert_allclose(fw.numpy(fw.vmap(lambda c: fw.jvp(scaled(fw, c, kind), x, one))(cs)), slopes)
    outside = lambda x: fw.vmap(lambda c: scaled(fw, c, kind)(x))(cs).sum()
    if fw.name == "jax":
        np.testing.assert_allclose(fw.numpy(fw.grad(outside)(x)), slopes.sum())
    else:
        with pytest.raises(gradlab.StrategyError, match="closes over a tensor that is under vmap"):
            fw.grad(outside)(x)


@pytest.mark.parametrize("kind", ["custom_vjp", "custom_jvp"])
def test_closures_over_differentiated_arrays_are_refused(fw, kind):
    x, one = fw.array(np.array(0.7)), fw.array(np.array(1.0))
    loop = lambda c: fw.vmap(scaled(fw, c, kind))(fw.array(np.ones(3))).sum()
    for attempt in (
        lambda: fw.grad(lambda c: scaled(fw, c, kind)(x))(x),
        lambda: fw.grad(lambda c: scaled(fw, c, kind)(c))(x),
        lambda: fw.jvp(lambda c: scaled(fw, c, kind)(x), x, one),
        lambda: fw.grad(loop)(x),
        lambda: fw.grad(lambda c: fw.grad(scaled(fw, c, kind))(x))(x),
        lambda: fw.grad(lambda c: fw.primal(scaled(fw, c, kind), x))(x),
    ):
        with pytest.raises(gradlab.StrategyError, match="closes over a"):
            attempt()


def test_closures_inside_jit_and_scan():
    """A closure over what jit traces works; differentiated later, it is refused."""
    fw = load("jax")
    import jax

    def steps(c, x):
        return jax.lax.scan(lambda s, _: (scaled(fw, c, "custom_vjp")(s), None), x, length=2)[0]

    x, c = fw.array(0.7), fw.array(1.5)
    expected = 1.5 * np.cos(1.5 * np.sin(0.7)) * 1.5 * np.cos(0.7)
    np.testing.assert_allclose(jax.jit(lambda c, x: jax.grad(lambda x: steps(c, x))(x))(c, x), expected)
    with pytest.raises(gradlab.StrategyError, match="closes over an array"):
        jax.grad(lambda c: steps(c, x))(c)
    with pytest.raises(gradlab.StrategyError, match="closes over an array"):
        jax.grad(jax.jit(lambda c: scaled(fw, c, "custom_vjp")(x)))(c)


def test_closures_over_parameters_are_refused():
    fw = load("torch")
    weight = fw.array(np.ones(3)).requires_grad_()
    for x in (fw.array(np.ones(3)), fw.array(np.ones(3)).requires_grad_()):
        with pytest.raises(gradlab.StrategyError, match="closes over a tensor"):
            scaled(fw, weight, "custom_vjp")(x)


# Bad rules.


def derivative(fw, f, mode, x=None):
    x = fw.array(np.array([1.0, 2.0])) if x is None else x
    if mode == "reverse":
        return fw.grad(lambda x: f(x).sum())(x)
    return fw.jvp(f, x, fw.xp.ones_like(x))


BAD_COTANGENTS = {
    "returned 2 cotangents for 1 arguments": lambda x, u: (u, u),
    "not a tuple": lambda x, u: 2 * x * u,
    r"shape \(\) for x, which has shape \(2,\)": lambda x, u: ((2 * x * u).sum(),),
    r"returned a .*for x": lambda x, u: ({"a": u},),
}


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("message", BAD_COTANGENTS)
def test_bad_cotangents(fw, message, mode):
    f = square(fw, bwd=BAD_COTANGENTS[message])
    with pytest.raises((gradlab.InputError, gradlab.KindError), match=message) as raised:
        derivative(fw, f, mode)
    assert "custom_vjp: bwd of <lambda> returned" in str(raised.value)


def test_the_faulty_leaf_is_named(fw):
    f = fw.gl.custom_vjp(lambda p: (p["w"] * p["b"]).sum())
    f.defvjp(lambda p: ((p["w"] * p["b"]).sum(), p), lambda p, u: ({"w": u * p["b"], "b": u},))
    p = {"w": fw.array(np.ones(3)), "b": fw.array(np.ones(3))}
    with pytest.raises(gradlab.InputError, match=r"for p\['b'\], which has shape \(3,\)"):
        fw.grad(f)(p)


def test_cotangents_of_another_dtype(fw):
    cast = (lambda u: u.float()) if fw.name == "torch" else (lambda u: u.astype("float32"))
    with pytest.raises(gradlab.KindError, match=r"dtype .*float32 for x, which has dtype .*float64"):
        derivative(fw, square(fw, bwd=lambda x, u: (cast(2 * x * u),)), "reverse")


BAD_TANGENTS = {
    r"tangent of shape \(\)": lambda xs, vs: (xs[0] ** 2, vs[0].sum()),
    "structure": lambda xs, vs: (xs[0] ** 2, (vs[0],)),
    r"return \(out, tangent\)": lambda xs, vs: [2 * xs[0] * vs[0]],
    "like|the same": lambda xs, vs: ((xs[0] ** 2, 1), (2 * xs[0] * vs[0], 1)),
}


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("message", BAD_TANGENTS)
def test_bad_tangents(fw, message, mode):
    f = square_by_tangent(fw, BAD_TANGENTS[message])
    with pytest.raises(gradlab.InputError, match=message) as raised:
        derivative(fw, f, mode)
    assert "custom_jvp: the rule of <lambda> returned" in str(raised.value)


def test_fwd_must_return_a_pair(fw):
    with pytest.raises(gradlab.InputError, match=r"fwd of <lambda> returned .*; return \(out, residuals\)"):
        derivative(fw, square(fw, fwd=lambda x: x**2), "reverse")


@pytest.mark.parametrize("bwd", [lambda x, u: (2 * x * u**2,), lambda x, u: (2 * x * abs(u),)])
def test_a_bwd_that_is_not_linear(fw, bwd):
    u = -1.0
    with pytest.raises(gradlab.StrategyError, match="bwd of <lambda> is not linear in its cotangent"):
        fw.jvp(square(fw, bwd=bwd), fw.array(np.array(3.0)), fw.array(np.array(u)))


def test_a_bwd_that_jax_cannot_transpose():
    fw = load("jax")
    import jax

    halved = lambda u: jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] / 2), (0, u))[1]
    f = square(fw, bwd=lambda x, u: (16 * x * halved(u),))
    with pytest.raises(gradlab.StrategyError, match=r"what jax cannot transpose .*lax.while_loop"):
        fw.grad(f)(fw.array(1.0))


def test_forward_mode_of_torch_by_dual_numbers():
    """With backward on either side of it, and a second derivative inside one level of torch.func."""
    import torch
    from torch.autograd import forward_ad

    fw = load("torch")
    x, one = fw.array(np.array(3.0)), fw.array(np.array(1.0))
    for f in (square(fw), square_by_tangent(fw, lambda xs, vs: (xs[0] ** 2, 2 * xs[0] * vs[0]))):
        y = x.clone().requires_grad_()
        with forward_ad.dual_level():
            out = f(forward_ad.make_dual(y, one))
            tangent = forward_ad.unpack_dual(out).tangent
            (slope,) = torch.autograd.grad(out, y, create_graph=True)
            (curved,) = torch.autograd.grad(tangent, y, retain_graph=True)
            found = [tangent, curved, forward_ad.unpack_dual(slope).tangent]
        assert [t.item() for t in found] == [6.0, 2.0, 2.0]

        def twice(x):
            (slope,) = torch.autograd.grad(f(x), x, create_graph=True)
            return torch.autograd.grad(slope, x, create_graph=True)[0]

        assert torch.func.vjp(twice, x)[0].item() == 2.0


def test_complex_arguments(fw):
    f, z, one = square(fw), fw.array(np.array(0.3 + 0.4j)), fw.array(np.array(1.0 + 0j))
    if fw.name == "torch":  # a cotangent is conjugate there
        f = square(fw, bwd=lambda z, u: (2 * z.conj() * u,))
    np.testing.assert_allclose(fw.numpy(fw.jvp(f, z, one)), 0.6 + 0.8j)
    np.testing.assert_allclose(
        fw.numpy(fw.grad(lambda z: f(z).real)(z)), fw.numpy(fw.grad(lambda z: (z**2).real)(z))
    )


def test_an_affine_tangent_is_refused_in_reverse_by_torch():
    fw = load("torch")
    f = square_by_tangent(fw, lambda xs, vs: (xs[0] ** 2, 2 * xs[0] * vs[0] + 1))
    with pytest.raises(gradlab.StrategyError, match="the rule of <lambda> is not linear in its tangents"):
        derivative(fw, f, "reverse")


def test_a_rule_is_needed(fw):
    with pytest.raises(gradlab.StrategyError, match=r"has no rule yet; give it one with .*\.defvjp"):
        fw.gl.custom_vjp(lambda x: x)(fw.array(1.0))
    with pytest.raises(gradlab.StrategyError, match=r"has no rule yet; give it one with .*\.defjvp"):
        fw.gl.custom_jvp(lambda x: x)(fw.array(1.0))


def test_declarations_that_cannot_be(fw):
    for declare in (fw.gl.custom_vjp, fw.gl.custom_jvp, gradlab.custom_vjp, gradlab.custom_jvp):
        with pytest.raises(gradlab.KindError, match="f is a int"):
            declare(3)
        with pytest.raises(gradlab.KindError, match="nondiff_argnums is"):
            declare(lambda x: x, nondiff_argnums=("x",))
    with pytest.raises(gradlab.KindError, match="defvjp was given a NoneType"):
        fw.gl.custom_vjp(lambda x: x).defvjp(None, None)
    f = fw.gl.custom_vjp(lambda x: x, nondiff_argnums=(1,))
    f.defvjp(lambda x: (x, None), lambda _, u: (u,))
    with pytest.raises(gradlab.KindError, match="nondiff_argnums holds 1"):
        f(fw.array(1.0))
    g = fw.gl.custom_vjp(lambda x, *, y: x)
    g.defvjp(lambda x: (x, None), lambda _, u: (u,))
    with pytest.raises(gradlab.KindError, match="takes y by keyword alone"):
        g(fw.array(1.0), y=2)


# Verification.


def test_right_rules_pass_their_check(fw):
    x = fw.array(np.array([1.0, 2.0]))
    square(fw, check=True)(x)
    square_by_tangent(fw, lambda xs, vs: (xs[0] ** 2, 2 * xs[0] * vs[0]), check=True)(x)


WRONG = {
    "scaled": lambda x, u: (2.001 * x * u,),
    "sign": lambda x, u: (-2 * x * u,),
    "constant second derivative": lambda x, u: (2 * detached(x) * u,),
    "affine": lambda x, u: (2 * x * u + 1e-3,),
}


def detached(x):
    if hasattr(x, "detach"):
        return x.detach()
    import jax

    return jax.lax.stop_gradient(x)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_rules_fail_their_check(fw, wrong):
    f = square(fw, check=True, bwd=WRONG[wrong])
    x = fw.array(np.array([1.0, 2.0]))
    for _ in range(2):  # again at the next call
        with pytest.raises((CheckError, gradlab.StrategyError)):
            f(x)
    square(fw, bwd=WRONG[wrong])(x)  # unchecked


def test_a_value_unlike_that_of_f_fails_the_check(fw):
    x = fw.array(np.array([1.0, 2.0]))
    with pytest.raises(gradlab.InputError, match="other numbers"):
        square(fw, check=True, fwd=lambda x: (x**2 + 1e-3, x))(x)
    with pytest.raises(gradlab.InputError, match="structure"):
        square(fw, check=True, fwd=lambda x: ((x**2, x), x))(x)
    with pytest.raises(gradlab.InputError, match="other numbers"):
        square_by_tangent(fw, lambda xs, vs: (xs[0], 2 * xs[0] * vs[0]), check=True)(x)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_fixture_checks_rules(framework, check_derivatives):
    fw = load(framework)
    x = fw.array(np.array([1.0, 2.0]))
    check_derivatives(square(fw), x, order=3)
    check_derivatives(square_by_tangent(fw, lambda xs, vs: (xs[0] ** 2, 2 * xs[0] * vs[0])), x, order=3)
    with pytest.raises(CheckError):
        check_derivatives(square(fw, bwd=WRONG["scaled"]), x)


# What torch alone has.


def test_a_graph_keeps_no_second_copy():
    import gc
    import weakref

    fw = load("torch")
    x = fw.array(np.ones(3)).requires_grad_()
    gc.collect()
    gc.disable()
    try:
        y = square(fw)(x)
        node = weakref.ref(y.grad_fn)
        del y
        assert node() is None
    finally:
        gc.enable()


def test_an_output_that_is_an_argument_does_not_change_it():
    fw = load("torch")
    f = fw.gl.custom_vjp(lambda x: x)
    f.defvjp(lambda x: (x, None), lambda _, u: (-u,))
    x = fw.array(np.ones(3)).requires_grad_()
    with pytest.raises(RuntimeError, match="view"):
        f(x).mul_(2)
    np.testing.assert_allclose(fw.numpy(x), 1.0)


def test_torch_modules_and_parameters():
    import torch

    fw = load("torch")
    f = square(fw)
    layer = torch.nn.Linear(3, 2, dtype=torch.float64)
    f(layer(fw.array(np.ones(3)))).sum().backward()
    expected = 2 * layer(fw.array(np.ones(3))).detach()
    np.testing.assert_allclose(layer.bias.grad.numpy(), expected.numpy())
    f(layer.weight).sum().backward()


@pytest.mark.parametrize(
    "outputs",
    [
        lambda A: (A.sum(), 2 * A),
        lambda A: (A.sum(), (2 * A).T),
        lambda A: ((2 * A).T,),
        lambda A: (A.sum().expand(3),),
    ],
    ids=["several", "transposed beside another", "transposed", "expanded"],
)
def test_no_tangent_of_dual_numbers_is_lost(outputs):
    """torch drops those of all outputs but the first where a Function gives views of several arguments."""
    torch = pytest.importorskip("torch")
    import gradlab.torch as gl

    rule = gl.custom_jvp(outputs)
    rule.defjvp(lambda primals, tangents: (outputs(*primals), outputs(*tangents)))
    A = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    with torch.autograd.forward_ad.dual_level():
        found = [
            torch.autograd.forward_ad.unpack_dual(y).tangent
            for y in rule(torch.autograd.forward_ad.make_dual(A, A + 1))
        ]
    for tangent, right in zip(found, outputs(A + 1), strict=True):
        assert torch.equal(tangent, right)


def test_cotangents_of_trees_of_one_leaf(fw):
    """As many arguments as leaves, which are trees all the same."""
    f = fw.gl.custom_vjp(lambda x, y: fw.xp.sin(x["a"]) * y)
    f.defvjp(lambda x, y: (f.f(x, y), (x, y)), lambda r, u: ({"a": fw.xp.cos(r[0]["a"]) * r[1] * u}, None))
    x, y = {"a": fw.array(np.array([0.3, 0.4]))}, fw.array(np.array([2.0, 3.0]))
    found = fw.grad(lambda x: f(x, y).sum())(x)["a"]
    np.testing.assert_allclose(fw.numpy(found), np.cos([0.3, 0.4]) * [2.0, 3.0])


def test_default_arguments(fw):
    power = fw.gl.custom_vjp(lambda x, k=2.0: x**k)
    power.defvjp(lambda x, k: (x**k, (x, k)), lambda r, u: (r[1] * r[0] ** (r[1] - 1.0) * u, None))
    assert float(fw.grad(power)(fw.array(np.array(3.0)))) == 6.0


def test_none_for_a_part_of_a_tree(fw):
    f = fw.gl.custom_vjp(lambda x: 2 * x["w"] + x["b"][0])
    f.defvjp(lambda x: (2 * x["w"] + x["b"][0], None), lambda _, u: ({"b": None, "w": 2 * u},))
    x = {"w": fw.array(np.array(1.0)), "b": [fw.array(np.array(3.0))]}  # in another order than bwd's
    g = fw.grad(f)(x)
    assert (float(g["w"]), float(g["b"][0])) == (2.0, 0.0)


@pytest.mark.parametrize(
    "bend", ["square", "clamp", "clip the norm", "shift"], ids=lambda name: name.replace(" ", "_")
)
@pytest.mark.parametrize("nest", ["jvp", "vmap of jvp", "hessian"])
def test_a_bwd_that_is_not_linear_is_refused(nest, bend):
    """Wherever its transpose is asked for, under vmap too, and however small or large the cotangents are."""
    torch = pytest.importorskip("torch")
    import gradlab.torch as gl

    bends = {
        "square": lambda u: u**2,
        "clamp": lambda u: u.clamp(-1, 1),
        "clip the norm": lambda u: u * (10 / u.norm()).clamp(max=1.0),
        "shift": lambda u: u + 0.1,
    }
    f = gl.custom_vjp(lambda x: 1 * x)
    f.defvjp(lambda x: (1 * x, None), lambda _, u: (bends[bend](u),))
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    along = lambda x: torch.func.jvp(f, (x,), (x,))[1]
    nests = {
        "jvp": lambda: along(x),
        "vmap of jvp": lambda: torch.func.vmap(along)(torch.stack([x, x])),
        "hessian": lambda: torch.func.hessian(lambda x: f(x**2).sum())(x),
    }
    with pytest.raises(gradlab.StrategyError, match="not linear in its cotangent"):
        nests[nest]()


def test_an_affine_bwd_is_refused_in_jax():
    """The transpose that jax makes of it leaves the constant out."""
    jax = pytest.importorskip("jax")
    import gradlab.jax as gl

    f = gl.custom_vjp(lambda x: x**2)
    f.defvjp(lambda x: (x**2, x), lambda x, u: (2 * x * u + 0.1,))
    with pytest.raises(gradlab.StrategyError, match="not zero at zero"):
        jax.grad(f)(3.0)


@pytest.mark.parametrize(
    "bwd",
    [lambda x, u: (u[:1],), lambda x, u: u, lambda x, u: (1 // 0,), lambda x, u: (3 * x * u,)],
    ids=["shape", "no_tuple", "raises", "factor"],
)
def test_check_refuses_a_rule_that_fails(fw, bwd):
    f = fw.gl.custom_vjp(lambda x: x**2, check=True)
    f.defvjp(lambda x: (x**2, x), bwd)
    with pytest.raises((gradlab.GradlabError, ZeroDivisionError, CheckError)):
        f(fw.array(np.array([1.0, 2.0])))


def test_check_waits_for_floats_and_needs_no_recording(fw):
    f = fw.gl.custom_vjp(lambda x: x**2, check=True)
    f.defvjp(lambda x: (x**2, x), lambda x, u: (2 * x * u,))
    f(fw.xp.arange(3))
    x = fw.array(np.array([1.0, 2.0]))
    if fw.name == "torch":
        with fw.xp.no_grad():
            f(x)
    np.testing.assert_allclose(fw.numpy(f(x)), [1.0, 4.0])


@pytest.mark.parametrize("fault", ["shape", "dtype", "structure"])
def test_an_output_of_fwd_unlike_that_of_f_is_refused(fw, fault):
    single = lambda x: x.float() if fw.name == "torch" else x.astype("float32")
    outs = {"shape": lambda x: 2 * x[:1], "dtype": lambda x: single(2 * x), "structure": lambda x: [2 * x]}
    f = fw.gl.custom_vjp(lambda x: 2 * x)
    f.defvjp(lambda x: (outs[fault](x), None), lambda _, u: (2 * u,))
    with pytest.raises(gradlab.InputError, match="return the same"):
        fw.grad(lambda x: f(x).sum())(fw.array(np.array([1.0, 2.0])))


def test_a_batched_form_is_checked():
    torch = pytest.importorskip("torch")
    import gradlab.torch as gl

    f = gl.custom_vjp(lambda x: x**2)
    f.defvjp(lambda x: (x**2, x), lambda x, u: (2 * x * u,))
    for batched, message in (
        (lambda n, b, x: (x[:1], True), "for 2 examples"),
        (lambda n, b, x: x, "out_batched"),
    ):
        f.defvmap(batched)
        with pytest.raises(gradlab.InputError, match=message):
            torch.func.vmap(f)(torch.ones(2))


def test_functions_that_look_at_numbers():
    """In eager jax a rule may branch on its arguments, and use numpy, as with jax.custom_vjp."""
    jax = pytest.importorskip("jax")
    import gradlab.jax as gl

    bent = lambda x: x**2 if x > 0 else -x
    f = gl.custom_vjp(bent)
    f.defvjp(lambda x: (bent(x), x), lambda x, u: (2 * x * u if x > 0 else -u,))
    assert (float(jax.grad(f)(3.0)), float(jax.grad(f)(-3.0))) == (6.0, -1.0)
    chosen = gl.custom_vjp(lambda x: x[x > 1].sum())
    chosen.defvjp(lambda x: (x[x > 1].sum(), x), lambda x, u: ((x > 1) * u,))
    np.testing.assert_array_equal(jax.grad(chosen)(np.array([1.0, 2.0])), [0.0, 1.0])


slowly = lambda *kinds: [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("kind", ["computed", *slowly("calls itself", "custom_jvp", "root", "logdet")])
def test_loops_keep_the_rule(kind):
    """jax drops a custom_jvp from a scan that is linearised twice: 561 for 982 of f(f(x)), f' = 6x²."""
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp

    import gradlab.jax as gl

    grad, along = jax.grad, lambda f: lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]
    if kind == "root":
        f = lambda a: gl.root(lambda y, a: y**3 - a)(jnp.array(1.0), a)
    elif kind == "logdet":
        f = lambda a: gl.rules.logdet(jnp.array([[2.0, 1.0], [1.0, 3.0]]) * a)
    elif kind == "custom_jvp":
        f = gl.custom_jvp(lambda x: x**3)
        f.defjvp(lambda x, v: (x[0] ** 3, 6 * x[0] ** 2 * v[0]))
    elif kind == "computed":
        f = gl.custom_vjp(lambda x: x**3)
        f.defvjp(lambda x: (x**3, 6 * x**2), lambda slope, u: (slope * u,))
    else:
        f = gl.custom_vjp(lambda x: x**3)
        f.defvjp(lambda x: (x**3, x), lambda x, u: (6 * f(x) / x * u,))
    loop = lambda x: jax.lax.scan(lambda y, _: (f(y), None), x, None, length=2)[0]
    nests = [grad, lambda g: grad(grad(g)), lambda g: along(grad(g)), lambda g: grad(along(g))]
    for nest in [*nests, lambda g: grad(grad(grad(g)))]:
        unrolled = nest(lambda x: f(f(x)))(1.1)
        np.testing.assert_allclose(nest(loop)(1.1), unrolled, rtol=1e-9)
        np.testing.assert_allclose(jax.vmap(nest(loop))(jnp.array([1.1, 1.2]))[0], unrolled, rtol=1e-9)
