"""The table in docs/composition.md, run again cell by cell."""

import re

import pytest

import composition
from frameworks import FRAMEWORKS, load

COMPILED = ("compiled", "compiled vmap", "compiled grad")
QUICK = ("hvp", "jacobian, reverse", "per_example_grads", "clipped_grad")
PARTS = {
    "quick": lambda name: name in QUICK,
    "rest": lambda name: name not in QUICK and "meta" not in name,
    "meta": lambda name: "meta" in name,
}


def documented(framework):
    """The page's table of one framework: {operation: {transform: outcome}}."""
    section = composition.PAGE.read_text().split(f"## {framework}\n")[1].split("\n## ")[0]
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in section.strip().split("\n")]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=() if part == "quick" else pytest.mark.slow) for part in PARTS]
)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_cell(framework, part):
    """A cell that is wrong raises, naming operation and transform; one that changed differs from the page."""
    fw = load(framework)
    page = documented(framework)
    for case in composition.cases(fw):
        if not PARTS[part](case.name):
            continue
        for name, transform in composition.transforms(fw).items():
            try:
                found = composition.outcome(transform, case.call, case, fw)
            except Exception as error:
                raise AssertionError(f"{case.name} under {name}") from error
            assert found == page[case.name][name], f"{case.name} under {name}: {found}"
    assert set(page) == {case.name for case in composition.cases(fw)}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_wrong_cell_is_seen(framework):
    fw = load(framework)
    case = next(composition.cases(fw))
    wrong = lambda x: case.call(x) * (1 + 1e-8)
    for name, transform in composition.transforms(fw).items():
        if name not in COMPILED:
            with pytest.raises(AssertionError):
                composition.outcome(transform, wrong, case, fw)
