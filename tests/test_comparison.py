"""The comparison of the frameworks: the same losses or none at all, held-out data that is, verdicts by numbers."""

import pytest

from gradlab.bench.comparison import TASKS, Disagreement
from gradlab.bench.comparison.agreement import same_losses
from gradlab.bench.comparison.crew import Crew

for name in ("sklearn", "jax", "optax", "torch"):
    pytest.importorskip(name)
STEPS = 50
TINY = TASKS["tiny"]


@pytest.fixture(scope="module")
def crew():
    with Crew(("jax", "torch"), "tiny", "cpu", 0) as found:
        yield found


def losses(crew, framework, task, **changed):
    mode = {"jax": "compiled", "torch": "eager"}[framework]
    done = crew.hands[framework].ask(
        "train", task=task, mode=mode, dtype="float64", steps=STEPS, optimiser=changed
    )
    return framework, done["losses"]


@pytest.mark.parametrize(
    "task",
    [
        "mlp",
        "decoder",
        pytest.param("conv", marks=pytest.mark.slow),
        pytest.param("untied", marks=pytest.mark.slow),
    ],
)
def test_both_frameworks_learn_the_same(crew, task):
    ours, theirs = (losses(crew, framework, task) for framework in ("jax", "torch"))
    assert same_losses(task, ours, theirs, 1e-8) < 1e-12
    assert len(ours[1]) == STEPS
    assert ours[1][-1] < ours[1][0]


@pytest.mark.parametrize(
    ("changed", "step"), [({"b2": 0.99}, 2), ({"max_norm": 0.5}, 2), ({"weight_decay": 0.0}, 1)]
)
def test_another_optimiser_is_seen(crew, changed, step):
    """The first update of Adam is the sign of the gradient, whatever b2 and the norm."""
    ours, theirs = losses(crew, "torch", "mlp"), losses(crew, "torch", "mlp", **changed)
    with pytest.raises(Disagreement, match=rf"mlp: torch and torch .* at step {step} "):
        same_losses("mlp", ours, theirs, 1e-8)
