"""Per-example derivatives: bad input, infinite examples, random numbers, dtypes, memory, and what composes."""

import numpy as np
import pytest

import gradlab
from frameworks import load
from gradlab import InputError, KindError, StrategyError

rng = np.random.default_rng(0)
X, Y = rng.normal(size=(6, 3)), rng.normal(size=6)
W, V = rng.normal(size=(4, 3)), rng.normal(size=4)


def problem(fw, dtype=np.float64):
    """tanh(W x)·v against y: parameters, batch and loss."""
    params = {"W": fw.array(W, dtype), "v": fw.array(V, dtype)}
    loss = lambda p, x, y: (fw.xp.tanh(p["W"] @ x) @ p["v"] - y) ** 2
    return loss, params, (fw.array(X, dtype), fw.array(Y, dtype))


def gradients(w=W, v=V, x=X, y=Y):
    """The closed form, (6, 4, 3) and (6, 4)."""
    h = np.tanh(x @ w.T)
    r = 2 * (h @ v - y)
    return r[:, None, None] * (v * (1 - h**2))[:, :, None] * x[:, None, :], r[:, None] * h


def quick(fw, f):
    """In jax compiled: eager code would compile each operation for itself."""
    return fw.compile(f) if fw.name == "jax" else f


def norms():
    return np.sqrt(sum((g.reshape(6, -1) ** 2).sum(1) for g in gradients()))


CALLS = {
    "per_example_grads": {},
    "per_example_norms": {},
    "clipped_grad": {"max_norm": 1.0},
    "gradient_noise_scale": {},
    "per_example_gram": {},
    "per_example_projections": {"dimension": 2},
    "per_example_statistics": {},
    "per_example_top_k": {"k": 1},
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_batches(fw, name):
    loss, params, (x, y) = problem(fw)
    call = lambda loss, params, *batch, **o: getattr(fw.gl, name)(loss, params, *batch, **CALLS[name], **o)
    with pytest.raises(InputError, match=rf"{name}: batch\[1\] has 5 examples, batch\[0\] has 6"):
        call(loss, params, x, y[:5])
    with pytest.raises(InputError, match="the batch is empty"):
        call(loss, params, x[:0], y[:0])
    with pytest.raises(InputError, match="holds no array"):
        call(lambda p: (p["W"] ** 2).sum(), params)
    with pytest.raises(InputError, match=r"batch\[1\] has shape \(\)"):
        call(loss, params, x, y[0])
    with pytest.raises(InputError, match="must return one scalar"):
        call(lambda p, x, y: p["W"] @ x, params, x, y)
    with pytest.raises(KindError, match="no float"):
        call(lambda p, x, y: x.sum(), {"n": fw.array(np.arange(3))}, x, y)
    with pytest.raises(InputError, match="unknown randomness 'some'"):
        call(loss, params, x, y, randomness="some")


@pytest.mark.parametrize("bound", [0, -1.0, float("nan"), float("inf")])
def test_bad_bounds(fw, bound):
    loss, params, batch = problem(fw)
    with pytest.raises(InputError, match=f"clipped_grad: max_norm is {float(bound)}"):
        fw.gl.clipped_grad(loss, params, *batch, max_norm=bound)


def test_a_bad_bound_that_is_traced_gives_no_number(fw):
    loss, params, batch = problem(fw)
    clip = lambda C: fw.gl.clipped_grad(loss, params, *batch, max_norm=C)[0]["v"]
    bad, good = fw.numpy(quick(fw, fw.vmap(clip))(fw.array(np.array([-1.0, 1.0]))))
    assert np.isnan(bad).all()
    np.testing.assert_allclose(good, fw.numpy(clip(1.0)), rtol=1e-12)


def test_the_longest_gradient_may_be_no_number(fw):
    x = fw.array(np.array([1.0, np.nan, 3.0]))
    longest, indices, _ = fw.gl.per_example_top_k(lambda w, x: w * x, fw.array(1.0), x, k=2)
    np.testing.assert_array_equal(fw.numpy(indices), [1, 2])
    np.testing.assert_array_equal(fw.numpy(longest), [np.nan, 3.0])


def test_other_bad_options(fw):
    loss, params, batch = problem(fw)
    clip = lambda **options: fw.gl.clipped_grad(loss, params, *batch, **{"max_norm": 1.0, **options})
    with pytest.raises(KindError, match="max_norm is a str"):
        clip(max_norm="1")
    with pytest.raises(InputError, match="unknown clipping 'hard'"):
        clip(clipping="hard")
    with pytest.raises(InputError, match=r"mask has shape \(5,\)"):
        clip(mask=fw.array(np.ones(5, bool)))
    with pytest.raises(InputError, match="chunk_size"):
        clip(chunk_size=0)
    with pytest.raises(KindError, match=r"per_example_gram: other is a \w+; pass a tuple"):
        fw.gl.per_example_gram(loss, params, *batch, other=batch[0][:1])
    with pytest.raises(InputError, match="k is 7, the batch has 6"):
        fw.gl.per_example_top_k(loss, params, *batch, k=7)
    with pytest.raises(InputError, match="1 examples in the batch; pass at least 2"):
        fw.gl.gradient_noise_scale(loss, params, *(b[:1] for b in batch))


def test_facade_and_numpy(fw):
    loss, params, batch = problem(fw)
    np.testing.assert_allclose(fw.numpy(gradlab.per_example_norms(loss, params, *batch)), norms(), rtol=1e-12)
    assert fw.is_array(fw.gl.per_example_norms(loss, params, X, Y))


@pytest.mark.parametrize(
    "value", [np.nan, *(pytest.param(v, marks=pytest.mark.slow) for v in (np.inf, 1e200))]
)
def test_an_infinite_example_does_not_poison_the_sum(fw, value):
    loss = lambda p, x, y: ((p["W"] @ x) ** 2).sum() * y
    params, x = {"W": fw.array(W)}, X.copy()
    x[2] = value
    total, found = fw.gl.clipped_grad(loss, params, fw.array(x), fw.array(Y), max_norm=0.5)
    keep = np.arange(6) != 2
    expected, _ = fw.gl.clipped_grad(loss, params, fw.array(X[keep]), fw.array(Y[keep]), max_norm=0.5)
    np.testing.assert_allclose(fw.numpy(total["W"]), fw.numpy(expected["W"]), rtol=1e-12)
    assert not np.isfinite(fw.numpy(found)[2])
    assert np.isfinite(fw.numpy(found)[keep]).all()


def test_clippings(fw):
    loss, params, batch = problem(fw)
    gs, n, L = gradients(), norms(), 2
    by_leaf = [np.sqrt((g.reshape(6, -1) ** 2).sum(1)) for g in gs]
    C = float(np.median(n))
    factors = {
        "flat": [np.minimum(1, C / n)] * L,
        "automatic": [C / (n + 0.01)] * L,
        "per_leaf": [np.minimum(1, C / np.sqrt(L) / m) for m in by_leaf],
    }
    for clipping, every in factors.items():
        total, found = fw.gl.clipped_grad(loss, params, *batch, max_norm=C, clipping=clipping)
        for key, c, g in zip("Wv", every, gs, strict=True):
            np.testing.assert_allclose(fw.numpy(total[key]), np.tensordot(c, g, 1), rtol=1e-11)
        if clipping == "per_leaf":
            np.testing.assert_allclose(fw.numpy(found["v"]), by_leaf[1], rtol=1e-12)
        else:
            np.testing.assert_allclose(fw.numpy(found), n, rtol=1e-12)


def test_a_mask_leaves_examples_out(fw):
    loss, params, batch = problem(fw)
    keep = np.array([1, 0, 1, 1, 0, 1], bool)
    for chunk in (None, 4):
        clip = lambda p, m, *batch, c=chunk: fw.gl.clipped_grad(
            loss, p, *batch, max_norm=1.0, mask=m, chunk_size=c
        )
        total, found = quick(fw, clip)(params, fw.array(keep), *batch)
        part, _ = fw.gl.clipped_grad(loss, params, *(fw.array(a[keep]) for a in (X, Y)), max_norm=1.0)
        np.testing.assert_allclose(fw.numpy(total["W"]), fw.numpy(part["W"]), rtol=1e-12)
        np.testing.assert_allclose(fw.numpy(found), norms(), rtol=1e-12)


def test_aux(fw):
    loss, params, batch = problem(fw)
    withs = lambda p, x, y: (loss(p, x, y), {"loss": loss(p, x, y), "x": x})
    for chunk in (None, 4):
        options = {"has_aux": True, "chunk_size": chunk}

        def run(params, *batch, options=options):
            return (
                fw.gl.per_example_grads(withs, params, *batch, **options)[-1],
                fw.gl.per_example_norms(withs, params, *batch, **options)[-1],
                fw.gl.clipped_grad(withs, params, *batch, max_norm=1.0, **options)[-1],
            )

        for found in quick(fw, run)(params, *batch):
            np.testing.assert_allclose(fw.numpy(found["loss"]), (np.tanh(X @ W.T) @ V - Y) ** 2, rtol=1e-12)
            np.testing.assert_array_equal(fw.numpy(found["x"]), X)


def test_statistics(fw):
    loss, params, batch = problem(fw)
    flat = np.concatenate([g.reshape(6, -1) for g in gradients()], 1)
    mean, variance = flat.mean(0), flat.var(0, ddof=1)
    join = lambda tree: np.concatenate([fw.numpy(tree[key]).reshape(-1) for key in "Wv"])
    for chunk in (None, 4, 1):
        run = lambda *given, c=chunk: fw.gl.per_example_statistics(loss, *given, chunk_size=c)
        found = quick(fw, run)(params, *batch)
        np.testing.assert_allclose(join(found.mean), mean, rtol=1e-11)
        np.testing.assert_allclose(join(found.variance), variance, rtol=1e-11)
        np.testing.assert_allclose(join(found.signal_to_noise), mean**2 / variance, rtol=1e-10)
    scale = fw.gl.gradient_noise_scale(loss, params, *batch, chunk_size=4)
    square = mean @ mean - variance.sum() / 6
    np.testing.assert_allclose(
        [float(s) for s in scale], [variance.sum() / square, variance.sum(), square], rtol=1e-10
    )
    K = fw.numpy(fw.gl.per_example_gram(loss, params, *batch))
    np.testing.assert_allclose(K, flat @ flat.T, rtol=1e-10, atol=1e-12)
    other = fw.gl.per_example_gram(loss, params, *batch, other=tuple(b[1:3] for b in batch))
    np.testing.assert_allclose(fw.numpy(other), flat @ flat[1:3].T, rtol=1e-10, atol=1e-12)
    order = np.argsort(-norms())[:2]
    longest, indices, rows = fw.gl.per_example_top_k(loss, params, *batch, k=2)
    np.testing.assert_array_equal(fw.numpy(indices), order)
    np.testing.assert_allclose(fw.numpy(longest), norms()[order], rtol=1e-12)
    np.testing.assert_allclose(fw.numpy(rows["v"]), gradients()[1][order], rtol=1e-12)


def test_gram_of_factors_and_of_gradients(fw):
    """Over time, and of a tied leaf."""
    loss = lambda p, x: (fw.xp.tanh(x @ p["V"]) ** 2).sum() + (x @ p["V"]).sum()
    params, x = {"V": fw.array(W.T)}, fw.array(rng.normal(size=(5, 2, 3)))
    K = fw.gl.per_example_gram(loss, params, x)
    flat = fw.numpy(fw.gl.per_example_grads(loss, params, x)["V"]).reshape(5, -1)
    np.testing.assert_allclose(fw.numpy(K), flat @ flat.T, rtol=1e-10)


def test_projections(fw):
    """Linear in the gradients, the same in each call; dot products are kept within what chance allows."""
    loss = lambda w, x: w @ x
    x = rng.normal(size=(4, 500))
    w, k = fw.array(np.zeros(500)), 4000
    run = lambda x, **o: fw.gl.per_example_projections(loss, w, x, dimension=k, **o)
    project = lambda x, **o: fw.numpy(quick(fw, lambda x: run(x, **o))(fw.array(x)))
    P = project(x)
    np.testing.assert_allclose(project(x, chunk_size=3), P, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(project(2 * x[:1]), 2 * P[:1], rtol=1e-10)
    assert np.abs(project(x, seed=1) - P).max() > 0.1
    sizes = np.linalg.norm(x, axis=1)
    off = (P @ P.T - x @ x.T) / np.outer(sizes, sizes)
    assert np.abs(off).max() < 5 * np.sqrt(2 / k)
    assert np.abs(off).max() > 0.1 * np.sqrt(2 / k)


def test_differentiated_again(fw):
    """d/dw of |g| = |w·x| |x| and of Σ g², g = (w·x) x, by every transform."""
    w, x = fw.array(np.array([1.0, -2.0, 0.5])), fw.array(X)
    loss = lambda w, x: (w @ x) ** 2 / 2
    dot, size = X @ fw.numpy(w), np.linalg.norm(X, axis=1)
    of_norms = (np.sign(dot) * size) @ X
    of_grads = 2 * (dot * size**2) @ X
    total = lambda f: lambda w: f(w).sum()
    n = total(lambda w: fw.gl.per_example_norms(loss, w, x))
    g = total(lambda w: fw.gl.per_example_grads(loss, w, x) ** 2)
    for f, expected in ((n, of_norms), (g, of_grads)):
        np.testing.assert_allclose(fw.numpy(quick(fw, fw.grad(f))(w)), expected, rtol=1e-10)
        np.testing.assert_allclose(
            fw.numpy(quick(fw, lambda w, f=f: fw.jvp(f, w, w))(w)), expected @ fw.numpy(w), rtol=1e-10
        )
        if fw.name == "torch":
            import torch

            v = w.clone().requires_grad_()
            np.testing.assert_allclose(torch.autograd.grad(f(v), v)[0], expected, rtol=1e-10)
            with torch.no_grad():
                assert not f(v).requires_grad
    clipped = lambda w: fw.gl.clipped_grad(loss, w, x, max_norm=1e-3)[
        0
    ].sum()  # all clipped: Σ C sign x / |x|
    assert np.abs(fw.numpy(fw.grad(clipped)(w))).max() < 1e-12


def test_mapped_and_compiled(fw):
    loss, params, batch = problem(fw)
    scaled = lambda s: fw.gl.per_example_norms(loss, {"W": params["W"] * s, "v": params["v"]}, *batch)
    found = fw.vmap(scaled)(fw.array(np.array([1.0, 2.0])))
    np.testing.assert_allclose(fw.numpy(found)[0], norms(), rtol=1e-12)
    calls = (
        lambda p, x, y: fw.gl.per_example_grads(loss, p, x, y)["v"],
        lambda p, x, y: fw.gl.per_example_norms(loss, p, x, y),
        lambda p, x, y: fw.gl.clipped_grad(loss, p, x, y, max_norm=1.0)[0]["W"],
    )
    for f in calls:
        np.testing.assert_allclose(
            fw.numpy(fw.compile(f)(params, *batch)), fw.numpy(f(params, *batch)), rtol=1e-11
        )


def test_sixteen_bits(fw):
    """Norms in bfloat16 are those of the float32 model to its rounding; nothing is promoted."""
    loss, params, batch = problem(fw, np.float32)
    kind = fw.xp.bfloat16
    cast = lambda a: a.astype(kind) if fw.name == "jax" else a.to(kind)
    low, data = {k: cast(p) for k, p in params.items()}, tuple(map(cast, batch))
    found = quick(fw, lambda p, *b: fw.gl.per_example_norms(loss, p, *b))(low, *data)
    assert found.dtype == kind
    total, _ = quick(fw, lambda p, *b: fw.gl.clipped_grad(loss, p, *b, max_norm=1.0))(low, *data)
    assert total["W"].dtype == kind
    wide = lambda a: fw.numpy(a.astype("float32") if fw.name == "jax" else a.float())
    assert np.abs(wide(found) - norms()).max() < 0.05 * norms().max()


def test_checkpoints_in_torch():
    torch = pytest.importorskip("torch")
    from torch.utils.checkpoint import checkpoint

    gl, rules = load("torch").gl, gradlab.rules
    w, x = torch.tensor(W), torch.tensor(X)
    torchs = lambda w, x: checkpoint(lambda x: torch.tanh(w @ x), x, use_reentrant=False).sum()
    with pytest.raises(StrategyError, match=r"per_example_norms: .*use gradlab\.rules\.checkpoint"):
        gl.per_example_norms(torchs, w, x)
    ours = lambda w, x: rules.checkpoint(lambda w, x: torch.tanh(w @ x), w, x).sum()
    plain = lambda w, x: torch.tanh(w @ x).sum()
    torch.testing.assert_close(gl.per_example_norms(ours, w, x), gl.per_example_norms(plain, w, x))


def test_a_module_for_params():
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(3, 2)
    with pytest.raises(KindError, match=r"params is a module; .* gradlab\.functional\(model\)"):
        gradlab.per_example_norms(lambda m, x: m(x).sum(), model, torch.ones(4, 3))


def test_memory_grows_like_a_pass(fw):
    """Norms and clipped sums of a wide layer: far below one gradient an example."""
    from gradlab.bench.memory import peak

    n, d = 256, 256
    w, x = fw.array(np.zeros((d, d)), np.float32), fw.array(np.ones((n, d)), np.float32)
    loss = lambda w, x: fw.xp.tanh(w @ x).sum()
    per_example = n * d * d * 4
    for call in (
        lambda w, x: fw.gl.per_example_norms(loss, w, x),
        lambda w, x: fw.gl.clipped_grad(loss, w, x, max_norm=1.0),
    ):
        assert peak(fw.name, call, w, x) < per_example / 10
    assert peak(fw.name, lambda w, x: fw.gl.per_example_grads(loss, w, x), w, x) >= per_example


def test_random_numbers_in_torch():
    torch = pytest.importorskip("torch")
    gl = load("torch").gl
    loss = lambda w, x: (torch.nn.functional.dropout(x, 0.5) @ w).sum()
    w, x = torch.ones(50), torch.ones(4, 50)
    with pytest.raises(RuntimeError, match="randomness"):
        gl.per_example_grads(loss, w, x)
    different = gl.per_example_grads(loss, w, x, randomness="different")
    assert set(different.unique().tolist()) == {0.0, 2.0}
    assert len({tuple(row.tolist()) for row in different}) == 4
    same = gl.per_example_grads(loss, w, x, randomness="same")
    assert len({tuple(row.tolist()) for row in same}) == 1
    torch.manual_seed(3)
    first = gl.per_example_norms(loss, w, x, randomness="different")
    torch.manual_seed(3)
    assert torch.equal(first, gl.per_example_norms(loss, w, x, randomness="different"))


def test_random_numbers_in_jax_are_keys():
    jax = pytest.importorskip("jax")
    gl = load("jax").gl
    loss = lambda w, x, key: w @ (x * jax.random.bernoulli(key, 0.5, x.shape))
    w, x, keys = jax.numpy.ones(50), jax.numpy.ones((4, 50)), jax.random.split(jax.random.key(0), 4)
    found = gl.per_example_grads(loss, w, x, keys)
    for n in range(4):
        np.testing.assert_array_equal(found[n], jax.random.bernoulli(keys[n], 0.5, (50,)))
    with pytest.raises(InputError, match="pass a key an example"):
        gl.per_example_grads(loss, w, x, keys, randomness="different")


def test_batch_norm_in_training_is_refused_in_torch():
    torch = pytest.importorskip("torch")
    gl = load("torch").gl
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    apply, params = gl.functional(model)
    loss = lambda p, x: apply(p, x).sum()
    for call in (gl.per_example_grads, gl.per_example_norms):
        with pytest.raises(InputError, match=r"batch norm in training mode.*model.eval\(\)"):
            call(loss, params, torch.ones(4, 3), keep_batch_axis=True)
    model.eval()
    assert gl.per_example_norms(loss, params, torch.ones(4, 3), keep_batch_axis=True).shape == (4,)


def test_batch_norm_in_training_is_refused_in_jax():
    jax = pytest.importorskip("jax")
    eqx = pytest.importorskip("equinox")
    gl = load("jax").gl
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, axis_name="batch", mode="ema")
    apply, params = gl.functional(norm)
    loss = lambda p, x: apply(p, x, state)[0].sum()
    with pytest.raises(InputError, match="inference_mode"):
        gl.per_example_grads(loss, params, jax.numpy.ones((4, 3)))


NORMALISED = {
    "rms": lambda jnp, w: w * (1 / jnp.sqrt((w**2).mean(-1, keepdims=True) + 1e-5)),
    "layer": lambda jnp, w: (w - w.mean(-1, keepdims=True)) / jnp.sqrt(w.var(-1, keepdims=True) + 1e-5),
}


@pytest.mark.parametrize("name", ["rms", pytest.param("layer", marks=pytest.mark.slow)])
def test_normalised_parameters_in_compiled_float32(name):
    """XLA on a CPU gets jit(vmap(grad)) of these wrong by half; ours is float64's, rounded."""
    jax = pytest.importorskip("jax")
    jnp, gl = jax.numpy, load("jax").gl
    w, x = rng.normal(size=(16, 16)), rng.normal(size=(256, 16, 16))
    loss = lambda w, x: jnp.sin(x @ NORMALISED[name](jnp, w)).sum()
    run = jax.jit(lambda w, x: gl.per_example_grads(loss, w, x))
    double = run(jnp.asarray(w), jnp.asarray(x))
    single = run(jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32))
    assert np.abs(single - double).max() < 1e-4 * np.abs(double).max()
    if jax.__version__ == "0.10.2" and jax.default_backend() == "cpu" and name == "rms":
        bare = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
        wrong = bare(jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32))
        assert np.abs(wrong - double).max() > 1e-2 * np.abs(double).max()


def test_nothing_is_left_behind_in_torch():
    """No graph on results, no .grad on parameters, and in-place changes of x by the loss are torch's own error."""
    torch = pytest.importorskip("torch")
    gl = load("torch").gl
    w = torch.nn.Parameter(torch.ones(2, 3))
    loss = lambda w, x: torch.nn.functional.linear(x, w).sum()
    with torch.no_grad():
        assert not gl.per_example_grads(loss, w.detach(), torch.ones(4, 3)).requires_grad
    assert w.grad is None

    def spoilt(w, x):
        h = x * 1.0
        y = torch.nn.functional.linear(h, w)
        h.zero_()
        return y.sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gl.per_example_norms(spoilt, w.detach(), torch.ones(4, 3))


def test_a_derivative_inside_the_loss_in_torch():
    """torch.autograd.grad within the loss uses the weights where no mode sees it: they are formed."""
    torch = pytest.importorskip("torch")
    gl = load("torch").gl

    def loss(w, x):
        x = x.detach().clone().requires_grad_()
        y = torch.tanh(torch.nn.functional.linear(x, w)).sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        return (g**2).sum()

    w, x = torch.tensor(W), torch.tensor(X)
    try:
        found = gl.per_example_grads(loss, w, x)
    except RuntimeError:  # where torch does not take it under vmap
        return
    for n in range(6):
        v = w.clone().requires_grad_()
        np.testing.assert_allclose(found[n], torch.autograd.grad(loss(v, x[n]), v)[0], rtol=1e-10)


def test_autocast_in_torch():
    """Activations in bfloat16 beside parameters in float32."""
    torch = pytest.importorskip("torch")
    gl = load("torch").gl
    model = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 2), torch.nn.Flatten(0), torch.nn.Linear(9, 1))
    apply, params = gl.functional(model)

    def loss(p, x):
        with torch.autocast("cpu", torch.bfloat16):
            return apply(p, x).float().square().sum()

    x = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
    plain = gl.per_example_norms(lambda p, x: apply(p, x).square().sum(), params, x)
    for call in (
        lambda: gl.per_example_norms(loss, params, x),
        lambda: sum(
            g.flatten(1).square().sum(1) for g in gl.per_example_grads(loss, params, x).values()
        ).sqrt(),
    ):
        assert (call() - plain).abs().max() < 0.05 * plain.max()
