"""Functions of one framework called from the other, against closed forms, in every nest; arrays shared."""

import itertools

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")
jnp = jax.numpy

import gradlab  # noqa: E402
from gradlab import check, interop  # noqa: E402
from gradlab._errors import BackendError, InputError, KindError, StrategyError  # noqa: E402
from gradlab.interop import _jax as from_jax  # noqa: E402
from gradlab.interop import _torch as from_torch  # noqa: E402

POINT = np.array([0.3, -1.2, 0.7])
EYE = np.eye(3)


def quartic(x):
    """Σ x⁴ + (Σ x)³, in either framework."""
    return (x**4).sum() + x.sum() ** 3


def derivative(order, x=POINT):
    """Of the quartic, in closed form."""
    s = x.sum()
    if order == 1:
        return 4 * x**3 + 3 * s**2
    if order == 2:
        return np.diag(12 * x**2) + 6 * s
    return np.einsum("ij,jk,k->ijk", EYE, EYE, 24 * x) + 6


class Torch:
    """Called from torch, the function is of jax."""

    f = staticmethod(interop.as_torch(quartic))
    array = staticmethod(torch.tensor)
    wrap = staticmethod(interop.as_torch)
    grad, vmap, jvp = torch.func.grad, torch.func.vmap, torch.func.jvp
    modes = (torch.func.jacfwd, torch.func.jacrev)
    xp, other = torch, jnp
    engine = from_torch.Jax


class Jax:
    """Called from jax, the function is of torch."""

    f = staticmethod(interop.as_jax(quartic))
    array = staticmethod(jnp.asarray)
    wrap = staticmethod(interop.as_jax)
    grad, vmap, jvp = jax.grad, jax.vmap, jax.jvp
    modes = (jax.jacfwd, jax.jacrev)
    xp, other = jnp, torch
    engine = from_jax.Torch


@pytest.fixture(params=[Torch, Jax], ids=["as_torch", "as_jax"])
def side(request):
    return request.param


NESTS = [nest for order in (1, 2, 3) for nest in itertools.product((0, 1), repeat=order)]


@pytest.mark.parametrize("nest", NESTS, ids=lambda nest: "".join("fr"[mode] for mode in nest))
def test_every_nest(side, nest):
    f = side.f
    for mode in nest:
        f = side.modes[mode](f)
    np.testing.assert_allclose(f(side.array(POINT)), derivative(len(nest)), rtol=1e-13)


def test_batches(side):
    points = np.stack([POINT, 2 * POINT, POINT + 1])
    X, truth = side.array(points), lambda order: [derivative(order, x) for x in points]
    over, back = side.modes
    same = lambda found, truth: np.testing.assert_allclose(found, truth, rtol=1e-13)
    same(side.vmap(side.f)(X), [(x**4).sum() + x.sum() ** 3 for x in points])
    same(side.vmap(side.grad(side.f))(X), truth(1))
    same(side.grad(lambda X: side.vmap(side.f)(X).sum())(X), truth(1))
    same(side.vmap(over(back(side.f)))(X), truth(2))
    same(side.vmap(back(over(side.f)), 1)(X.T), truth(2))
    whole = np.asarray(back(over(lambda X: side.vmap(side.f)(X).sum()))(X))
    same(np.einsum("ijik->ijk", whole), truth(2))
    # a point that all examples share
    shared = lambda w: side.vmap(lambda x: side.f(x * w))(X).sum()
    same(over(shared)(side.array(np.ones(3))), (points * truth(1)).sum(0))


def test_eager_torch():
    """backward, create_graph to third order, and dual numbers."""
    x = torch.tensor(POINT, requires_grad=True)
    v = torch.tensor([1.0, 2.0, -1.0]).double()
    found = Torch.f(x)
    for order, truth in ((1, derivative(1)), (2, derivative(2) @ v.numpy())):
        (g,) = torch.autograd.grad(found, x, create_graph=True)
        np.testing.assert_allclose(g.detach(), truth, rtol=1e-13, err_msg=str(order))
        found = g @ v
    third = torch.autograd.grad(found, x)[0]
    np.testing.assert_allclose(third, np.einsum("ijk,j,k", derivative(3), v, v), rtol=1e-13)
    Torch.f(x).backward()
    np.testing.assert_allclose(x.grad, derivative(1), rtol=1e-13)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), v)
        moved = torch.autograd.forward_ad.unpack_dual(Torch.f(dual)).tangent
    np.testing.assert_allclose(moved, derivative(1) @ v.numpy(), rtol=1e-13)
    y = Torch.f(x)
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_compiled_jax():
    """jit, scan, checkpoint, linearize and transposes."""
    x = jnp.asarray(POINT)
    loop = lambda x: jax.lax.scan(lambda c, _: (c + Jax.f(x), None), 0.0, None, length=2)[0]
    np.testing.assert_allclose(jax.jit(jax.hessian(loop))(x), 2 * derivative(2), rtol=1e-13)
    np.testing.assert_allclose(
        jax.jit(jax.grad(jax.checkpoint(Jax.f)))(x), jax.jit(jax.jacfwd(Jax.f))(x), rtol=1e-13
    )
    _, line = jax.linearize(Jax.f, x)
    np.testing.assert_allclose(jax.linear_transpose(line, x)(1.0)[0], derivative(1), rtol=1e-13)
    _, pull = jax.vjp(Jax.f, x)
    (along,) = (jax.linear_transpose(lambda u: pull(u)[0], 1.0)(x),)
    np.testing.assert_allclose(along[0], derivative(1) @ POINT, rtol=1e-13)
    A = np.arange(6.0).reshape(2, 3)
    linear = interop.as_jax(lambda x: torch.tensor(A) @ x)
    (back,) = jax.linear_transpose(jax.vmap(linear, 1, 1), jnp.ones((3, 4)))(jnp.ones((2, 4)))
    np.testing.assert_allclose(back, A.T @ np.ones((2, 4)))


def tree_function(xp):
    return lambda p, n: {"a": xp.sin(p["w"]) * p["b"], "n": n + 1, "s": (p["w"] * xp.exp(p["b"])).sum()}


def test_the_checker_passes(side):
    """Every claim to second order, of a tree of parameters and of a vector-valued function."""
    params = {"b": side.array(np.array(0.4)), "w": side.array(POINT)}
    inner = side.wrap(tree_function(side.other))
    f = lambda p: {name: y for name, y in inner(p, 2 * side.xp.ones(3)).items() if name != "n"}
    check.derivatives(f, params, order=2, directions=1).raise_if_failed()


@pytest.mark.parametrize("fault", ["push", "pull", "batch"])
def test_planted_faults_are_seen(side, fault, monkeypatch):
    """The checker refuses a wrong tangent, a wrong cotangent and a batch that mixes examples."""
    right = getattr(side.engine, fault)

    def wrong(self, flat, *how):
        made = right(self, flat, *how)
        if fault == "batch":
            return lambda *xs: [y.sum(0, keepdims=True) + 0 * y for y in made(*xs)]
        return lambda *xs: [1.001 * y for y in made(*xs)]

    monkeypatch.setattr(side.engine, fault, wrong)
    order = 2 if (side, fault) == (Torch, "pull") else 1  # a plain gradient is of the recorded pullback
    options = {"order": order, "vmap": fault == "batch", "compiled": False, "directions": 1}
    report = check.derivatives(side.wrap(quartic), side.array(POINT), **options)
    accused = {"push": "jvp", "pull": "vjp" if order == 1 else "hvp", "batch": "vmap"}[fault]
    assert report[accused].status == "failed"


def test_a_fault_of_the_recorded_pullback_is_seen(monkeypatch):
    def wrong(call, live, right=from_torch.recorded):
        forward, pull = right(call, live)
        return forward, lambda kept, us: [1.001 * ct for ct in pull(kept, us)]

    monkeypatch.setattr(from_torch, "recorded", wrong)
    f = interop.as_torch(quartic)
    report = check.derivatives(f, torch.tensor(POINT), order=1, vmap=False, directions=1)
    assert report["vjp"].status == "failed"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex128"])
def test_dtypes(side, dtype):
    x = side.array(np.array([1.0, 2.0]))
    x = x.to(getattr(torch, dtype)) if side is Torch else x.astype(dtype)
    f = side.wrap(lambda x: (x * x).sum())
    y, moved = side.jvp(f, (x,), (x,))
    assert str(y.dtype).endswith(dtype)
    assert str(moved.dtype).endswith(dtype)
    assert complex(y) == 5
    assert complex(moved) == 10
    real = (lambda x: (f(x) * 1).real) if dtype.startswith("complex") else f
    g = side.grad(real)(x)
    assert g.dtype == x.dtype
    assert [complex(e) for e in g] == [2, 4]
    assert [complex(e) for e in side.vmap(f)(x[None])] == [5]


def test_complex_cotangents_follow_their_framework(side):
    z = np.array([1 + 2j, 3 - 1j])
    f = lambda z: (z**3 * z.conj()).real.sum()
    grad = lambda f: (side.grad if side is Jax else torch.func.grad)(f)(side.array(z))
    np.testing.assert_allclose(grad(side.wrap(f)), grad(f), rtol=1e-13)


def test_integers_bools_constants_and_keywords(side):
    x, i = side.array(POINT), side.array(np.array([2, 0]))
    f = side.wrap(lambda x, i, *, scale, name: {name: x[i] * scale, "n": (i + 1, x > 0), "none": None})
    out = f(x, i, scale=2, name="y")
    np.testing.assert_allclose(out["y"], 2 * POINT[[2, 0]])
    assert [int(n) for n in out["n"][0]] == [3, 1]
    assert [bool(b) for b in out["n"][1]] == [True, False, True]
    assert out["none"] is None
    total = lambda x: f(x, i, scale=2, name="y")["y"].sum()
    np.testing.assert_allclose(side.grad(total)(x), [2, 0, 2])
    np.testing.assert_allclose(side.vmap(lambda x: f(x, i, scale=2, name="y")["n"][1])(x[None]), [POINT > 0])
    one = side.wrap(lambda x, c: x * (2 if c is True else 3))
    assert [float(one(x, c)[2]) for c in (True, 1)] == pytest.approx([1.4, 2.1])
    signed = side.wrap(lambda x, c: x * np.copysign(1.0, c))
    assert [float(signed(x, c)[2]) for c in (0.0, -0.0)] == [0.7, -0.7]


def test_empty_arrays_and_no_arrays(side):
    x = side.array(np.zeros((0, 3)))
    f = side.wrap(lambda x: (x**2).sum())
    assert float(f(x)) == 0
    assert side.grad(f)(x).shape == (0, 3)
    assert float(side.wrap(lambda: side.other.ones(2))().sum()) == 2


def test_memory_is_its_own():
    """What torch changes in place reaches no array of jax, and a tensor's later changes no result."""
    W = jnp.arange(3.0)
    for jit in (True, False):
        x = torch.zeros(3).double()
        for y in interop.as_torch(lambda x: (x, W), jit=jit)(x):
            y += 7
        assert x.sum() == 0
        assert W.sum() == 3

    def careless(x):
        x += 1
        return x

    parameter = torch.ones(3)
    x = jnp.zeros(3)
    y = interop.as_jax(lambda x: parameter)(x)
    parameter += 1
    assert y.sum() == 3
    for f in (interop.as_jax(careless), jax.jit(interop.as_jax(careless))):
        assert f(x).sum() == 3
        assert x.sum() == 0


def test_compiled_once_and_mapped_in_one_call():
    traces, calls = [], []
    f = interop.as_torch(lambda x: (traces.append(0), jnp.sin(x).sum())[1])
    for _ in range(3):
        torch.func.grad(f)(torch.tensor(POINT))
    assert len(traces) == 2  # the value, the pullback
    g = interop.as_jax(lambda x: (calls.append(0), torch.sin(x).sum())[1])
    assert jax.vmap(g)(jnp.ones((50, 3))).shape == (50,)
    assert len(calls) == 1


def test_layer_norm_is_right_at_higher_order():
    """torch's own is wrong in forward mode at second order, and in every mode at third."""

    def plain(x):
        y = (x - x.mean()) / jnp.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
        return (y**3).sum()

    f = interop.as_jax(lambda x: (torch.nn.functional.layer_norm(x, (3,)) ** 3).sum())
    x = jnp.asarray(POINT)
    along = lambda f: lambda x: jax.jvp(f, (x,), (jnp.cos(x),))[1]
    for nest in (
        lambda f: along(along(f)),
        lambda f: jax.grad(along(f)),
        lambda f: along(along(jax.grad(f))),
    ):
        np.testing.assert_allclose(nest(f)(x), jax.jit(nest(plain))(x), rtol=1e-9)


def test_a_module_of_torch_in_jax():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    apply, params = gradlab.functional(model)
    x = jnp.asarray(POINT)
    f = interop.as_jax(lambda params, x: apply(params, x).sum())
    found = jax.jit(jax.grad(f))(interop.to_jax(params, copy=True), x)
    truth = torch.func.grad(lambda p: apply(p, torch.tensor(POINT)).sum())(params)
    for name in params:
        np.testing.assert_allclose(found[name], truth[name], rtol=1e-13)
    np.testing.assert_allclose(
        jax.grad(lambda x: interop.as_jax(model)(x)[0])(x),
        torch.func.grad(lambda x: model(x)[0])(torch.tensor(POINT)).detach(),
        rtol=1e-13,
    )


def test_there_and_back():
    back = interop.as_jax(interop.as_torch(lambda x: jnp.sin(x).sum()))
    x = jnp.asarray(POINT)
    np.testing.assert_allclose(jax.hessian(back)(x), np.diag(-np.sin(POINT)), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(jax.jit(jax.grad(back))(x), np.cos(POINT), rtol=1e-13)


def test_functions_that_look_at_their_numbers():
    branch = lambda x: (x**2 if x.sum() > -1 else -x).sum()
    x = torch.tensor(POINT, requires_grad=True)
    f = interop.as_torch(branch, jit=False)
    f(x).backward()
    np.testing.assert_allclose(x.grad, 2 * POINT)
    np.testing.assert_allclose(torch.func.grad(f)(x.detach()), 2 * POINT)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        interop.as_torch(branch)(x)
    g, y = interop.as_jax(branch), jnp.asarray(POINT)
    with pytest.raises(StrategyError, match="looks at its numbers, call the function once"):
        jax.jit(g)(y)
    np.testing.assert_allclose(jax.grad(g)(y), 2 * POINT)
    np.testing.assert_allclose(jax.jit(jax.grad(g))(y), 2 * POINT)


def test_what_the_function_raises_arrives():
    def wrong(x):
        if type(x) is torch.Tensor:  # not where only shapes are looked for
            raise ValueError("the user's own words")
        return x

    with pytest.raises(ValueError, match="own words"):
        interop.as_jax(wrong)(jnp.ones(2))
    with pytest.raises(jax.errors.JaxRuntimeError, match="own words"):
        jax.block_until_ready(jax.jit(interop.as_jax(wrong))(jnp.ones(2)))
    with pytest.raises(TypeError, match="contracting dimensions"):
        interop.as_torch(lambda x: x @ jnp.ones(7))(torch.ones(3))


def test_bad_calls():
    with pytest.raises(KindError, match="f is a int"):
        interop.as_torch(3)
    with pytest.raises(KindError, match="f is a int"):
        interop.as_jax(3)
    with pytest.raises(BackendError, match="an array of jax"):
        interop.as_torch(lambda x: x)(jnp.ones(2))
    with pytest.raises(BackendError, match="a tensor of torch"):
        interop.as_jax(lambda x: x)(torch.ones(2))
    with pytest.raises(KindError, match=r"returned a float at output\['a'\]"):
        interop.as_jax(lambda x: {"a": x.sum().item()})(jnp.ones(2))
    with pytest.raises(StrategyError, match="closes over an array that jax"):
        jax.grad(lambda w: interop.as_torch(lambda x: w * x)(torch.ones(2))[0])(2.0)
    with pytest.raises(KindError, match=r"under a torch.func transform"):
        torch.func.grad(lambda w: interop.to_torch(interop.as_jax(lambda x: w * x)(jnp.ones(()))))(
            torch.tensor(2.0)
        )
    with pytest.raises(KindError, match="key of random numbers"):
        interop.as_jax(lambda x: x)(jax.random.key(0))


def test_64_bits_off():
    with jax.enable_x64(False):
        with pytest.raises(KindError, match=r"argument 0 is torch.float64, and jax would make it 32 bits"):
            interop.as_torch(jnp.sin)(torch.ones(2).double())
        f = interop.as_torch(lambda x, i: x[i] * 2)
        x = torch.ones(3, requires_grad=True)
        f(x, torch.tensor([0, 2])).sum().backward()
        assert x.grad.tolist() == [2, 0, 2]
        with pytest.raises(InputError, match="integers beyond 32 bits"):
            f(x, torch.tensor([2**40]))
        with pytest.raises(KindError, match=r"output 0 is torch.float64"):
            interop.as_jax(lambda x: x.double())(jnp.ones(2))
        with pytest.raises(KindError, match=r"output 0 is torch.float64"):
            jax.jit(interop.as_jax(lambda x: x.double()))(jnp.ones(2))
        assert jax.jit(interop.as_jax(lambda x: x.argmax()))(jnp.ones(2)).dtype == jnp.int32


SHARED = ["float32", "float64", "float16", "bfloat16", "bool", "int8", "int32", "int64", "complex64"]


@pytest.mark.parametrize("dtype", SHARED)
def test_arrays_are_shared(dtype):
    t = torch.ones(4, 3).to(getattr(torch, dtype))
    j = interop.to_jax(t, copy=False)
    assert (j.dtype.name, j.shape) == (dtype, (4, 3))
    assert j.unsafe_buffer_pointer() == t.data_ptr()
    back = interop.to_torch(j, copy=False)
    assert back.data_ptr() == t.data_ptr()
    assert back.dtype == t.dtype
    assert interop.to_torch(j, copy=True).data_ptr() != t.data_ptr()
    assert interop.to_jax(t, copy=True).unsafe_buffer_pointer() != t.data_ptr()
    assert interop.to_jax(t.T, copy=False).shape == (3, 4)


def test_trees_are_shared():
    tree = {"w": [torch.ones(2), (None, "text")], "n": 3, "a": np.ones(2)}
    there = interop.to_jax(tree)
    assert isinstance(there["w"][0], jax.Array)
    assert isinstance(there["a"], jax.Array)
    assert (there["w"][1], there["n"]) == ((None, "text"), 3)
    back = interop.to_torch(there)
    assert back["w"][0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("tensor", "error", "words"),
    [
        (lambda: torch.ones(8)[::2], InputError, r"tree\['a'\] is not contiguous"),
        (lambda: torch.ones(1).expand(3), InputError, "not contiguous"),
        (lambda: torch.ones(17)[1:], InputError, "not aligned"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), InputError, "conjugate"),
        (lambda: np.ones(2), InputError, "numpy array"),
        (lambda: torch.ones(2, requires_grad=True), KindError, "requires grad"),
        (lambda: torch.eye(2).to_sparse(), KindError, "sparse"),
        (lambda: torch.ones(2, device="meta"), KindError, "meta device"),
        (lambda: torch.nn.Linear(2, 2), KindError, "is a module"),
    ],
)
def test_what_cannot_be_shared_is_said(tensor, error, words):
    with pytest.raises(error, match=words):
        interop.to_jax({"a": tensor()}, copy=False)
    if error is InputError:
        found = interop.to_jax({"a": tensor()})["a"]
        np.testing.assert_array_equal(found, np.asarray(torch.as_tensor(tensor()).resolve_conj()))


def test_traced_arrays_are_refused():
    with pytest.raises(KindError, match=r"tree\['a'\] is traced by jax"):
        jax.jit(lambda x: interop.to_torch({"a": x}))(jnp.ones(2))
    with pytest.raises(KindError, match=r"under a torch.func transform"):
        torch.func.grad(lambda x: interop.to_jax(x))(torch.ones(()))
    with pytest.raises(KindError, match="key of random numbers"):
        interop.to_torch(jax.random.key(0))
    with pytest.raises(KindError, match="torch cannot hold"):
        interop.to_torch(jnp.ones(2, jnp.uint4))
