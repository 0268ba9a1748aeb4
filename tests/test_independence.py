"""check.batch_independent: what mixes a batch is found, however little; what only looks so passes."""

import numpy as np
import pytest

import gradlab
from frameworks import arrays
from gradlab import check

B, D = 6, 4
rng = np.random.default_rng(0)
PARAMS = {"w": rng.normal(size=(D, 3)), "b": rng.normal(size=3)}
X = rng.normal(size=(B, D))
LABELS = np.array([0, 2, 1, 1, 0, 2])
TOKENS = np.array([[1, 2, 2, 0], [3, 1, 0, 0], [1, 1, 1, 1], [4, 2, 0, 0], [2, 2, 3, 0], [1, 0, 0, 0]])


def flat_mean(x, axis=-1):
    return x.mean(axis)[..., None]


def normalised(x):
    return (x - flat_mean(x)) / (flat_mean((x - flat_mean(x)) ** 2) + 1e-5) ** 0.5


def logits(p, x):
    return x @ p["w"] + p["b"]


def independent(fw):
    """Functions of params and a batch of inputs, labels and tokens that mix nothing."""
    xp = fw.xp
    shift = fw.array(np.arange(3.0))
    return {
        "losses": lambda p, b: (logits(p, b["x"]) ** 2).sum(-1),
        "losses of several positions": lambda p, b: logits(p, b["x"]) ** 2,
        "sum": lambda p, b: (logits(p, b["x"]) ** 2).sum(),
        "mean": lambda p, b: (logits(p, b["x"]) ** 2).mean(),
        "sum and weight decay": lambda p, b: (logits(p, b["x"]) ** 2).sum() + (p["w"] ** 2).sum(),
        "layer norm": lambda p, b: (normalised(logits(p, b["x"])) * shift).sum(-1) ** 2,
        "group norm": lambda p, b: (normalised(logits(p, b["x"])[:, None, :]) ** 3 * shift).sum((-1, -2)),
        "labels": lambda p, b: (logits(p, b["x"])[np.arange(B), b["labels"]] - 1) ** 2,
        "cross entropy": lambda p, b: xp.log(xp.exp(logits(p, b["x"])).sum(-1)) * (b["labels"] + 1),
        "embedding with duplicates": lambda p, b: (p["w"][b["tokens"] % D] ** 3).sum((-1, -2)),
        "mean over an example's tokens": lambda p, b: (
            (p["w"][b["tokens"] % D].sum(-1) * (b["tokens"] > 0)).sum(-1) / (b["tokens"] > 0).sum(-1)
        ),
        "mask": lambda p, b: xp.where(b["mask"][:, None], logits(p, b["x"]), 0.0).sum(-1) ** 2,
        "constant": lambda p, b: b["x"].sum(-1) ** 2,
    }


def dependent(fw):
    """The same that mix the batch."""
    xp = fw.xp
    counted = lambda p, b: p["w"][b["tokens"] % D].sum(-1) * (b["tokens"] > 0)
    standard = lambda z: (z - z.mean(0)) / (((z - z.mean(0)) ** 2).mean(0) + 1e-5) ** 0.5
    weak = lambda p, b: (logits(p, b["x"]) ** 2).sum(-1) * (1 + 1e-6 * xp.tanh(b["x"]).mean())
    similar = lambda p, b: logits(p, b["x"]) @ logits(p, b["x"]).T
    return {
        "batch norm": lambda p, b: (standard(logits(p, b["x"])) ** 3).sum(-1),
        "batch norm, summed": lambda p, b: (standard(logits(p, b["x"])) ** 3).sum(),
        "centred": lambda p, b: ((logits(p, b["x"]) - logits(p, b["x"]).mean(0)) ** 2).sum(-1),
        "contrastive": lambda p, b: xp.log(xp.exp(0.1 * similar(p, b)).sum(-1)),
        "contrastive, averaged": lambda p, b: xp.log(xp.exp(0.1 * similar(p, b)).sum(-1)).mean(),
        "weak": weak,
        "weak, summed": lambda p, b: weak(p, b).sum(),
        "mean over the batch's tokens": lambda p, b: counted(p, b).sum() / (b["tokens"] > 0).sum(),
        "losses by the batch's tokens": lambda p, b: counted(p, b).sum(-1) / (b["tokens"] > 0).sum(),
        "losses by the batch's mask": lambda p, b: logits(p, b["x"]).sum(-1) / (1 + b["mask"].sum()),
        "the largest": lambda p, b: (logits(p, b["x"]) ** 2).sum(-1).max(),
        "by the largest": lambda p, b: logits(p, b["x"]).sum(-1) / abs(b["x"]).max(),
        "neighbour": lambda p, b: logits(p, xp.roll(b["x"], 1, 0)).sum(-1) * b["x"].sum(-1),
        "the first": lambda p, b: (logits(p, b["x"]) * b["x"][0, 0]).sum(-1),
        "root of the sum": lambda p, b: (logits(p, b["x"]) ** 2).sum() ** 0.5,
    }


BATCH = {"x": X, "labels": LABELS, "tokens": TOKENS, "mask": np.ones(B, bool)}


def given(fw):
    return arrays(fw, PARAMS), arrays(fw, BATCH)


class Names:
    """A stand-in for a framework's namespace, to list the names of cases."""

    name, array = "jax", staticmethod(lambda a: a)
    xp = None


@pytest.mark.parametrize("name", independent(Names))
def test_what_is_independent_passes(fw, name):
    report = check.batch_independent(independent(fw)[name], *given(fw))
    assert report.passed, f"{report}\n{[row.message for row in report.rows]}"
    assert [row.claim for row in report.rows] == ["value", "losses", "gradients"]


@pytest.mark.parametrize("name", dependent(Names))
def test_what_mixes_the_batch_fails(fw, name):
    report = check.batch_independent(dependent(fw)[name], *given(fw))
    assert not report.passed
    assert report["losses"].status == "failed", report
    assert report["losses"].error > 1e-9
    assert report["gradients"].status == "failed", report


def test_the_two_examples_are_named(fw):
    def coupled(p, b):
        z = (logits(p, b["x"]) ** 2).sum(-1)
        z = [z[i] for i in range(B)]
        z[4] = z[4] * (1 + 1e-3 * b["x"][1].sum())
        return fw.xp.stack(z)

    report = check.batch_independent(coupled, *given(fw))
    assert report["losses"].where == "example 4 by example 1"
    message = report["losses"].message
    assert message.startswith("the loss of example 4 changes by ")
    assert "when example 1 is replaced (rounding: " in message
    scalar = check.batch_independent(lambda p, b: coupled(p, b).sum(), *given(fw))
    assert {*scalar["gradients"].where.split(" by ")} == {"example 1", "example 4"}
    assert "no sum over examples: replacing example" in scalar["gradients"].message
    with pytest.raises(check.CheckError, match="batch independence on"):
        report.raise_if_failed()


def test_gradients_alone(fw):
    if fw.name == "jax":
        import jax

        held = jax.lax.stop_gradient
    else:
        held = lambda x: x.detach()

    def only_in_the_gradient(p, b):
        z = logits(p, b["x"]).sum(-1)
        mixed = (z - z.mean()) ** 2
        return z**2 + mixed - held(mixed)

    report = check.batch_independent(only_in_the_gradient, *given(fw))
    assert report["losses"].status == "passed"
    assert report["gradients"].status == "failed"


def test_float32_is_judged_in_float64(fw):
    f = lambda p, b: (logits(p, b["x"]) ** 2).sum(-1)
    low = arrays(fw, PARAMS, "float32"), {"x": fw.array(X, "float32")}
    assert check.batch_independent(f, *low).passed
    weak = lambda p, b: f(p, b) * (1 + 1e-6 * fw.xp.tanh(b["x"]).mean())
    assert check.batch_independent(weak, *low)["losses"].status == "failed"


def test_a_small_loss_beside_large_ones(fw):
    size = fw.array(10.0 ** np.linspace(-6, 4, B))
    alone = lambda p, b: size * (1 + fw.xp.tanh(logits(p, b["x"]).sum(-1)) ** 2)
    first = fw.array(np.eye(B)[0])
    mixed = lambda p, b: alone(p, b) * (1 + 1e-6 * first * fw.xp.tanh(b["x"]).mean())
    assert check.batch_independent(alone, *given(fw)).passed
    report = check.batch_independent(mixed, *given(fw))
    assert report["losses"].status == report["gradients"].status == "failed"
    assert report["losses"].where.startswith("example 0 by")
    assert report["losses"].error < 1e-10  # of a loss of 1e-6


def test_cancellation_is_no_influence(fw):
    wide = arrays(fw, {"x": X * 10.0 ** np.arange(-3, 3)[:, None]})
    cancelling = lambda p, b: ((1e6 + logits(p, b["x"])) - 1e6).sum(-1) ** 2
    assert check.batch_independent(cancelling, arrays(fw, PARAMS), wide).passed
    total = lambda p, b: cancelling(p, b).sum()
    assert check.batch_independent(total, arrays(fw, PARAMS), wide).passed


def test_larger_batches_of_every_size(fw):
    f = lambda p, b: (fw.xp.tanh(logits(p, b["x"])) ** 2).sum(-1)
    for size in (2, 3, 33):
        batch = arrays(fw, {"x": rng.normal(size=(size, D))})
        assert check.batch_independent(f, arrays(fw, PARAMS), batch).passed
        mixed = lambda p, b: f(p, b) + 1e-3 * fw.xp.flip(f(p, b), (0,))
        assert not check.batch_independent(mixed, arrays(fw, PARAMS), batch).passed


def test_data_that_is_no_example(fw):
    params, batch = given(fw)
    f = lambda p, b, scale: (logits(p, b["x"]) ** 2).sum(-1) * scale
    assert check.batch_independent(f, params, batch, 3.0).passed


def test_equal_examples(fw):
    """Another example of the batch is the same one: other numbers tell."""
    params = arrays(fw, PARAMS)
    batch = arrays(fw, {"x": np.ones((B, D)), "n": np.ones((B, 2), int)})
    mixed = lambda p, b: (logits(p, b["x"]).sum(-1)) * b["x"].mean()
    assert not check.batch_independent(mixed, params, batch).passed
    counted = lambda p, b: logits(p, b["x"]).sum(-1) / b["n"].sum()
    assert not check.batch_independent(counted, params, batch).passed


def test_values_that_the_function_does_not_take(fw):
    """Zero is no length of these sequences, and an error in the replaced example is no influence."""

    def ranked(p, b):
        if (np.asarray(fw.numpy(b["n"])) == 0).any():
            raise ValueError("empty sequence")
        return logits(p, b["x"]).sum(-1) ** 2 / b["n"]

    params, batch = arrays(fw, PARAMS), arrays(fw, {"x": X, "n": 1 + LABELS})
    if fw.name == "torch":
        assert check.batch_independent(ranked, params, batch).passed
    undefined = lambda p, b: (logits(p, b["x"]) ** 2).sum(-1) / b["n"]
    assert check.batch_independent(undefined, params, batch).passed


def test_large_integers_reach_the_function_as_they_are(fw):
    ids = np.array([2**31 - 1, 2**30 + 1, 7, -5, 0, 12345], "int32")
    seen = []

    def f(p, b):
        if not seen:  # the first run is not compiled
            seen.append(fw.numpy(b["ids"]))
        return (logits(p, b["x"]) ** 2).sum(-1) * (b["ids"] % 1000)

    batch = {"x": fw.array(X, "float32"), "ids": fw.array(ids)}
    assert check.batch_independent(f, arrays(fw, PARAMS, "float32"), batch).passed
    np.testing.assert_array_equal(seen[0], ids)
    assert seen[0].dtype == ids.dtype


def test_batch_norm_of_torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    inputs, labels = torch.randn(8, 4), torch.randint(0, 3, (8,))

    def losses(model, reduction="none"):
        apply, params = gradlab.functional(model)
        entropy = torch.nn.functional.cross_entropy
        f = lambda params, batch: entropy(apply(params, batch[0]), batch[1], reduction=reduction)
        return check.batch_independent(f, params, (inputs, labels))

    norm = lambda kind: torch.nn.Sequential(
        torch.nn.Linear(4, 6), kind, torch.nn.ReLU(), torch.nn.Linear(6, 3)
    )
    for reduction in ("none", "mean", "sum"):
        report = losses(norm(torch.nn.BatchNorm1d(6)), reduction)
        assert report["losses"].status == report["gradients"].status == "failed"
        assert losses(norm(torch.nn.BatchNorm1d(6)).eval(), reduction).passed
        for kind in (torch.nn.LayerNorm(6), torch.nn.GroupNorm(2, 6)):
            assert losses(norm(kind), reduction).passed
    weighted = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]))
    apply, params = gradlab.functional(norm(torch.nn.Identity()))
    report = check.batch_independent(lambda p, b: weighted(apply(p, b[0]), b[1]), params, (inputs, labels))
    assert not report.passed
    dropout = losses(norm(torch.nn.Dropout(0.5)))
    assert [(row.claim, row.status) for row in dropout.rows] == [("value", "failed")]
    assert not dropout.passed


def test_random_functions():
    np_rng = np.random.default_rng(1)
    jnp = pytest.importorskip("jax.numpy")
    noisy = lambda p, b: (b @ p) * np_rng.normal()
    report = check.batch_independent(noisy, jnp.ones(D), jnp.asarray(X))
    assert report["value"].status == "failed"
    assert not report.passed


def test_jax_models():
    jax = pytest.importorskip("jax")
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(D, 3, 8, 1, key=jax.random.key(0))
    each = lambda model, x: jax.vmap(model)(x).sum(-1) ** 2
    assert check.batch_independent(each, model, jax.numpy.asarray(X)).passed
    keys = jax.random.split(jax.random.key(0), B)
    with pytest.raises(gradlab.KindError, match=r"batch holds key<fry>; pass numbers \(of random keys"):
        check.batch_independent(each, model, (jax.numpy.asarray(X), keys))
    noise = lambda model, b: each(model, b[0] + jax.vmap(lambda key: jax.random.normal(key, (D,)))(b[1]))
    raw = jax.vmap(jax.random.key_data)(keys)
    wrapped = lambda model, b: noise(model, (b[0], jax.random.wrap_key_data(b[1])))
    assert check.batch_independent(wrapped, model, (jax.numpy.asarray(X), raw)).passed


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"f": 3}, gradlab.KindError, "f is a int; pass the function, its params and a batch"),
        ({"batch": {}}, gradlab.InputError, "batch is an empty tree; pass arrays with a leading axis"),
        ({"batch": {"x": np.ones((0, D))}}, gradlab.InputError, "the batch is empty; pass at least two"),
        (
            {"batch": {"x": np.ones((1, D))}},
            gradlab.InputError,
            "the batch has one example, which has no other",
        ),
        (
            {"batch": {"x": X, "y": np.ones(B - 1)}},
            gradlab.InputError,
            r"batch\['y'\] has 5 examples, batch\['x'\] has 6",
        ),
        (
            {"batch": {"x": X, "y": np.ones(())}},
            gradlab.InputError,
            r"batch\['y'\] has shape \(\), no leading",
        ),
        ({"batch": {"x": X, "y": 2.0}}, gradlab.InputError, r"batch\['y'\] has type float, no leading"),
        (
            {"f": lambda p, b: p["b"]},
            gradlab.InputError,
            r"f returned shape \(3,\); return the losses of the 6",
        ),
        ({"f": lambda p, b: (p["b"], 1)}, gradlab.InputError, "f returned a tuple; return the losses"),
        ({"f": lambda p, b: b["x"].sum(-1) > 0}, gradlab.KindError, "f returned .*bool; return floats"),
        ({"params": {"n": np.arange(3)}}, gradlab.KindError, "params holds no float array"),
    ],
)
def test_bad_input(fw, change, error, message):
    f = change.get("f", lambda p, b: b["x"].sum(-1))
    params, batch = arrays(fw, change.get("params", PARAMS)), arrays(fw, change.get("batch", {"x": X}))
    with pytest.raises(error, match=f"^check.batch_independent: {message}"):
        check.batch_independent(f, params, batch)
