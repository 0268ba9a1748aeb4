"""The comparison of the frameworks: the same losses or none at all, held-out data that is, verdicts by numbers."""

import importlib.util
import math
from dataclasses import replace

import numpy as np
import pytest

for name in ("sklearn", "jax", "equinox", "optax", "torch"):
    pytest.importorskip(name)

import torch  # noqa: E402

from gradlab import InputError  # noqa: E402
from gradlab.bench.comparison import TASKS, Disagreement, Optimiser, claims  # noqa: E402
from gradlab.bench.comparison import _models_torch as torch_models  # noqa: E402
from gradlab.bench.comparison import _torch as torch_side  # noqa: E402
from gradlab.bench.comparison.agreement import same_losses  # noqa: E402
from gradlab.bench.comparison.claims import (  # noqa: E402
    CONFIRMED,
    REFUTED,
    UNMEASURABLE,
    UNRESOLVED,
    Claim,
    Number,
    verdict,
)
from gradlab.bench.comparison.crew import Crew, Refused  # noqa: E402
from gradlab.bench.comparison.data import batch, digits, held_out, scores, text, windows  # noqa: E402
from gradlab.bench.comparison.operations import EAGER, OPERATIONS, differences, measured, points  # noqa: E402
from gradlab.bench.comparison.parallel import Lost, _first, parallel  # noqa: E402
from gradlab.bench.energy import utilisation  # noqa: E402

STEPS = 50
TINY = TASKS["tiny"]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def crew():
    with Crew(("jax", "torch"), "tiny", "cpu", 0) as found:
        yield found


def asked(crew, framework, task, **changed):
    mode = "eager" if framework == "torch" else "compiled"
    done = crew.hands[framework].ask(
        "train", task=task, mode=mode, dtype="float64", steps=STEPS, optimiser=changed
    )
    return framework, done["losses"]


def by_torch(task, spoil=None, **changed):
    """Losses in this process, of weights that are spoilt first."""
    learner = torch_side.Learner(TINY[task], "eager", "float64", "cpu", 0, Optimiser(**changed))
    if spoil:
        spoil(learner.model)
    step = lambda i: float(learner.step(*torch_side.arrays(batch(TINY[task], i), "float64")))
    return "torch", [step(i) for i in range(STEPS)]


@pytest.mark.parametrize(
    "task", ["mlp", "decoder", pytest.param("conv", marks=slow), pytest.param("untied", marks=slow)]
)
def test_both_frameworks_learn_the_same(crew, task):
    ours, theirs = (asked(crew, framework, task) for framework in ("jax", "torch"))
    assert same_losses(task, ours, theirs, 1e-8) < 1e-12
    assert len(ours[1]) == STEPS
    assert ours[1][-1] < ours[1][0]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mlp", "decoder"])
@pytest.mark.parametrize("framework", ["flax", "tensorflow"])
def test_the_further_columns_learn_the_same(framework, task):
    pytest.importorskip(framework)
    with Crew((framework,), "tiny", "cpu", 0) as more:
        assert same_losses(task, by_torch(task), asked(more, framework, task), 1e-8) < 1e-10


@pytest.mark.parametrize(
    ("changed", "step"), [({"b2": 0.99}, 2), ({"max_norm": 0.5}, 2), ({"weight_decay": 0.0}, 1)]
)
def test_another_optimiser_is_seen(changed, step):
    """The first update of Adam is the sign of the gradient, whatever b2 and the norm."""
    with pytest.raises(Disagreement, match=rf"mlp: torch and torch .* at step {step} "):
        same_losses("mlp", by_torch("mlp"), by_torch("mlp", **changed), 1e-8)


def test_a_wrong_weight_is_seen():
    def spoil(model):
        with torch.no_grad():
            model.layers[1].weight[3, 2] += 1e-4

    with pytest.raises(Disagreement, match=r"at step 0 .* no time was taken"):
        same_losses("mlp", by_torch("mlp"), by_torch("mlp", spoil), 1e-8)


def test_a_loss_that_is_no_number_does_not_agree():
    with pytest.raises(Disagreement, match="at step 1 "):
        same_losses("mlp", ("jax", [1.0, math.nan]), ("torch", [1.0, math.nan]), 1e-8)
    with pytest.raises(InputError, match="2 and 1 losses"):
        same_losses("mlp", ("jax", [1.0, 1.0]), ("torch", [1.0]), 1e-8)


@pytest.mark.parametrize("task", TINY)
def test_weights_are_those_that_interop_exchanges(task):
    import jax

    from gradlab import interop
    from gradlab.bench.comparison import _models_jax as jax_models

    drawn = jax_models.build(TINY[task], "float32", seed=1)
    theirs = torch_models.build(TINY[task], "float32", seed=1).state_dict()
    read = interop.to_equinox(jax_models.build(TINY[task], "float32"), theirs)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), drawn, read))


def test_nothing_held_out_is_trained_on():
    (images, _), (others, _) = digits()
    assert len(images) + len(others) == 1797
    assert not {a.tobytes() for a in images} & {a.tobytes() for a in others}
    train, _ = text()
    length = TINY["decoder"].sizes["length"]
    pieces = windows(length)
    assert len(pieces) > 1000
    assert not any(bytes(piece.astype(np.uint8)).decode() in train for piece in pieces[:200])


@pytest.mark.parametrize("task", TINY.values(), ids=lambda task: task.name)
def test_batches_are_drawn_by_their_number(task):
    (a, b), (c, _) = batch(task, 3), batch(task, 3)
    assert np.array_equal(a, c)
    assert not np.array_equal(a, batch(task, 4)[0])
    assert len(a) == len(b) == task.batch
    inputs, targets = held_out(task)
    assert len(inputs) == len(targets)
    if task.kind == "decoder":
        assert np.array_equal(a[:, 1:], b[:, :-1])


def test_scores():
    targets = np.array([0, 0, 1, 2])
    right = np.eye(3)[[0, 0, 1, 2]]
    assert scores(right, targets) == {"accuracy": 1.0, "f1": 1.0}
    found = scores(np.eye(3)[[0, 0, 0, 0]], targets)
    assert found["accuracy"] == 0.5
    assert found["f1"] == pytest.approx((2 / 3) / 3)


@pytest.mark.parametrize(
    ("low", "high", "above", "expected"),
    [
        (1.1, 1.3, True, CONFIRMED),
        (1.1, 1.3, False, REFUTED),
        (0.7, 0.9, True, REFUTED),
        (0.7, 0.9, False, CONFIRMED),
        (0.9, 1.1, True, UNRESOLVED),
        (0.9, 1.1, False, UNRESOLVED),
        (-math.inf, math.inf, True, UNRESOLVED),
        (math.nan, math.nan, True, UNRESOLVED),
        (1.0, 1.0, True, UNRESOLVED),
    ],
)
def test_verdicts(low, high, above, expected):
    assert verdict(Number((low + high) / 2, low, high), 1.0, above) == expected


def record(torch_s, jax_s, rounds=12):
    row = lambda column, s: {
        "task": "mlp",
        "column": column,
        "samples": [s] * rounds,
        "seconds": {"median": s, "interval": [s, s]},
        "bytes": None,
    }
    return {"steps": [row("torch eager", torch_s), row("jax jit", jax_s)], "missing": {"flax jit": "absent"}}


def test_claims_are_judged_by_their_numbers():
    faster = next(claim for claim in claims.CLAIMS if claim.claim == "JAX trains faster than PyTorch")
    assert faster.judge(record(2.0, 1.0))["verdict"] == CONFIRMED
    assert faster.judge(record(1.0, 2.0))["verdict"] == REFUTED
    assert faster.judge(record(2.0, 1.0))["value"] == pytest.approx(2.0)
    assert faster.judge(record(2.0, 1.0, rounds=4))["verdict"] == UNRESOLVED, (
        "four rounds bound nothing at 99 %"
    )
    found = claims.judged(record(2.0, 1.0))
    assert len(found) >= 15
    reasons = {row["claim"]: row.get("reason") for row in found}
    assert reasons["TPUs make JAX the fastest choice"] == "no TPU"
    assert reasons["flax is slower than equinox"] == "absent"
    memory = next(row for row in found if "of the memory" in row["claim"])
    assert (memory["verdict"], memory["value"]) == (UNMEASURABLE, None)


def test_rounds_not_columns_are_averaged():
    """A slow round that shakes both columns does not widen the interval of their ratio."""
    shaken = record(2.0, 1.0)
    for row in shaken["steps"]:
        row["samples"] = [s * (1 + i) for i, s in enumerate(row["samples"])]
    number = claims.ratio("steps", "torch eager", "jax jit")(shaken)
    assert (number.low, number.high) == pytest.approx((2.0, 2.0))


def test_a_claim_whose_row_failed_is_not_judged():
    of = {"parallel": [{"framework": "jax", "way": "sharded", "raises": "lost"}], "missing": {}}
    said = Claim("c", "m", claims.devices("jax", "sharded"), 0.9).judge(of)
    assert (said["verdict"], said["reason"]) == (UNMEASURABLE, "lost")


def test_the_differenced_third_derivative():
    t = np.array(points())
    assert differences(np.sin(t + 0.3))[0] == pytest.approx(-np.cos(0.3), rel=1e-6)


def test_a_worker_tells_what_went_wrong(crew):
    with pytest.raises(Refused, match="torch, train: KeyError"):
        crew.hands["torch"].ask("train", task="none", mode="eager", dtype="float64", steps=1)


def test_what_is_not_installed_is_said():
    if importlib.util.find_spec("tensorflow") is not None:
        pytest.skip("tensorflow is installed")
    with Crew(("tensorflow",), "tiny", "cpu", 0) as more:
        assert not more.hands
        assert more.missing["tensorflow"] == "not installed: pip install 'gradlab[tensorflow]'"


def test_a_process_that_is_lost_is_named():
    import subprocess
    import sys

    fails = [sys.executable, "-c", "import sys; sys.exit('no memory')"]
    started = [subprocess.Popen(fails, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)]
    with pytest.raises(Lost, match="ddp: process 0 of 1 ended with status 1: no memory"):
        _first(started, "ddp")


def test_utilisation_is_not_available_without_a_device():
    with utilisation("cpu") as used:
        pass
    assert used() is None


def test_a_derivative_is_held_against_the_other_framework(crew):
    rule = next(operation for operation in OPERATIONS if operation.what == "rule")
    rows = measured(crew, replace(rule, ways=EAGER), "float64", 1, lambda said: None)
    assert len(rows) == 4
    assert all(row["right"] and row["error"]["float64"] < 1e-12 for row in rows)
    none = measured(crew, replace(rule, ways=EAGER, accuracy=1e-20), "float64", 1, lambda said: None)
    assert not any(row["right"] or "seconds" in row for row in none)


@pytest.mark.slow
def test_third_order_through_a_norm_is_wrong_in_torch_alone(crew):
    normed = next(operation for operation in OPERATIONS if operation.what == "normed")
    found = {
        (r["framework"], r["way"]): r["right"] for r in measured(crew, normed, "float64", 1, lambda s: None)
    }
    assert found == {
        ("jax", "gradlab"): True,
        ("jax", "plain"): True,
        ("torch", "gradlab"): True,
        ("torch", "plain"): False,
    }


@pytest.mark.slow
def test_several_devices_learn_what_one_does():
    rows = parallel(("jax", "torch"), "tiny", "decoder", "cpu", lambda said: None)
    assert not [row for row in rows if "raises" in row]
    assert all(row["largest"] < 1e-12 for row in rows)
    assert {row["devices"] for row in rows if row["way"] != "one"} == {2}
