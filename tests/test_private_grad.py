"""Private sums: the noise by its distribution, the bound of one example's part, sampling and accounting."""

import numpy as np
import pytest

from frameworks import load
from gradlab import InputError, KindError, privacy

rng = np.random.default_rng(1)
OPTIONS = {"max_norm": 2.0, "noise_multiplier": 1.5, "expected_batch_size": 4}


def generator(fw, seed=0):
    if fw.name == "torch":
        return fw.xp.Generator().manual_seed(seed)
    import jax

    return jax.random.key(seed)


def test_the_noise_is_normal_and_belongs_to_the_sum(fw):
    """20 000 entries in two leaves: deviation σ C / B, mean, fourth moment and correlation within five errors."""
    n = 10_000
    params = {"a": fw.array(np.zeros(n)), "b": fw.array(np.zeros(n))}
    loss = lambda p, x: (p["a"] + p["b"]).sum() * x
    draw = lambda seed: fw.gl.private_grad(
        loss, params, fw.array(np.zeros(3)), rng=generator(fw, seed), **OPTIONS
    )[0]
    grad = draw(0)
    z = np.stack([fw.numpy(grad[key]) for key in "ab"]) / (1.5 * 2.0 / 4)
    assert abs(z.mean()) < 5 / np.sqrt(2 * n)
    assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / (2 * n))
    assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / (2 * n))
    assert abs((z[0] * z[1]).mean()) < 5 / np.sqrt(n)
    np.testing.assert_array_equal(fw.numpy(draw(0)["a"]), fw.numpy(grad["a"]))
    assert np.abs(fw.numpy(draw(1)["a"]) - fw.numpy(grad["a"])).max() > 0


def test_noise_on_sixteen_bits_is_drawn_in_thirty_two(fw):
    """The same numbers as for float32, rounded once; bfloat16's own draws are other ones."""
    loss = lambda p, x: p.sum() * x
    draw = lambda dtype: fw.gl.private_grad(
        loss,
        as_dtype(fw, np.zeros(64), dtype),
        as_dtype(fw, np.zeros(3), dtype),
        rng=generator(fw),
        **OPTIONS,
    )[0]
    wide, low = draw(fw.xp.float32), draw(fw.xp.bfloat16)
    assert low.dtype == fw.xp.bfloat16
    assert bool((low == (wide.to(low.dtype) if fw.name == "torch" else wide.astype(low.dtype))).all())


def as_dtype(fw, x, dtype):
    return fw.array(x).to(dtype) if fw.name == "torch" else fw.array(x).astype(dtype)


def test_a_generator_goes_on():
    torch = pytest.importorskip("torch")
    fw = load("torch")
    one = generator(fw)
    draw = lambda: fw.gl.private_grad(
        lambda w, x: w @ x, torch.zeros(3), torch.ones(2, 3), rng=one, **OPTIONS
    )[0]
    assert not torch.equal(draw(), draw())


@pytest.mark.parametrize(
    "clipping", ["flat", *(pytest.param(c, marks=pytest.mark.slow) for c in ("per_leaf", "automatic"))]
)
def test_one_example_moves_the_sum_by_at_most_the_bound(fw, clipping):
    params = {"W": fw.array(rng.normal(size=(4, 3))), "v": fw.array(rng.normal(size=4))}
    loss = lambda p, x: fw.xp.tanh(p["W"] @ x) @ p["v"]
    x = 10 * np.random.default_rng(2).normal(size=(5, 3))
    sums = []
    for kept in range(6):
        given = fw.array(np.delete(x, kept, 0) if kept < 5 else x)
        grad = fw.gl.private_grad(
            loss, params, given, rng=generator(fw), clipping=clipping, **{**OPTIONS, "noise_multiplier": 0}
        )[0]
        sums.append(4 * np.concatenate([fw.numpy(grad[key]).reshape(-1) for key in "Wv"]))
    moved = np.linalg.norm(np.stack(sums[:5]) - sums[5], axis=1)
    assert moved.max() <= 2.0 * (1 + 1e-12)
    assert moved.max() > (1.4 if clipping == "per_leaf" else 1.9)  # a leaf's own bound is 2 / √2


def test_an_empty_batch_is_noise(fw):
    loss = lambda w, x: w @ x
    w = fw.array(np.zeros(1000))
    grad, norms = fw.gl.private_grad(loss, w, fw.array(np.zeros((0, 1000))), rng=generator(fw), **OPTIONS)
    assert norms.shape == (0,)
    assert 0.65 < fw.numpy(grad).std() < 0.85


def test_refused(fw):
    call = lambda **o: fw.gl.private_grad(
        lambda w, x: w @ x,
        fw.array(np.zeros(3)),
        fw.array(np.ones((2, 3))),
        **{"rng": generator(fw), **OPTIONS, **o},
    )
    for options, message in (
        ({"rng": 0}, "rng is a int"),
        ({"rng": None}, "rng is a NoneType"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier is nan"),
        ({"expected_batch_size": 0}, "expected_batch_size is 0"),
        ({"max_norm": 0}, "max_norm is 0"),
    ):
        with pytest.raises(InputError, match=message):
            call(**options)
    with pytest.raises(KindError, match="max_norm is a list"):
        call(max_norm=[1.0])


def test_poisson_batches():
    """Each example is in a batch with the rate, independently; padded batches hold the same."""
    options = {"sample_rate": 0.1, "steps": 400, "seed": 0}
    batches = list(privacy.poisson_batches(200, **options))
    chosen = np.zeros((400, 200))
    for row, batch in zip(chosen, batches, strict=True):
        row[batch] = 1
    assert abs(chosen.mean() - 0.1) < 5 * np.sqrt(0.09 / chosen.size)
    sizes = chosen.sum(1)
    assert abs(sizes.var() / (200 * 0.09) - 1) < 5 * np.sqrt(2 / 400)
    padded = list(privacy.poisson_batches(200, padded=True, **options))
    assert len({len(indices) for indices, _ in padded}) == 1
    for batch, (indices, mask) in zip(batches, padded, strict=True):
        np.testing.assert_array_equal(indices[mask], batch)
    fresh = lambda: next(privacy.poisson_batches(1000, sample_rate=0.5, steps=1, seed=None))
    assert not np.array_equal(fresh(), fresh())
    with pytest.raises(InputError, match="sample_rate 0"):
        privacy.poisson_batches(10, sample_rate=0, steps=1, seed=0)


DIGITS = {"delta": 1e-4, "sample_rate": 256 / 1437, "steps": 300}


@pytest.mark.parametrize(("epsilon", "sigma"), [(1.0, 10.93), (2.0, 5.96), (4.0, 3.34), (8.0, 1.97)])
def test_accounting(epsilon, sigma):
    """Noise for digits by Rényi moments, and what the loss distribution says of the same noise."""
    pytest.importorskip("dp_accounting")
    found = privacy.noise_multiplier(epsilon=epsilon, **DIGITS)
    assert abs(found - sigma) < 0.01
    assert privacy.epsilon(noise_multiplier=found, **DIGITS) <= epsilon


def test_accountants_agree():
    """Every example in every step, once: the Gaussian mechanism's closed form bounds both."""
    pytest.importorskip("dp_accounting")
    from scipy.optimize import brentq
    from scipy.stats import norm

    sigma, delta = 2.0, 1e-5
    spent = lambda e: (
        norm.cdf(0.5 / sigma - e * sigma) - np.exp(e) * norm.cdf(-0.5 / sigma - e * sigma) - delta
    )
    exact = brentq(spent, 0, 20)
    run = {"noise_multiplier": sigma, "delta": delta, "sample_rate": 1.0, "steps": 1}
    tight, loose = (privacy.epsilon(accountant=a, **run) for a in ("pld", "rdp"))
    assert exact <= tight * (1 + 1e-6) <= exact * 1.01
    assert tight < loose < 1.5 * exact


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 0}, "delta is 0"),
        ({"sample_rate": 1.5}, "sample_rate is 1.5"),
        ({"steps": 0}, "steps is 0"),
        ({"accountant": "moments"}, "unknown accountant"),
        ({"noise_multiplier": 0}, "noise_multiplier is 0"),
    ],
)
def test_accounting_refuses(options, message):
    with pytest.raises(InputError, match=message):
        privacy.epsilon(**{"noise_multiplier": 1.0, **DIGITS, **options})
