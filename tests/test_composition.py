"""The table in docs/composition.md, run again cell by cell."""

import re

import pytest

import composition
from frameworks import FRAMEWORKS, load

COMPILED = ("compiled", "compiled vmap", "compiled grad")


def documented(framework):
    """The page's table of one framework: {operation: {transform: outcome}}."""
    section = composition.PAGE.read_text().split(f"## {framework}\n")[1].split("\n## ")[0]
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in section.strip().split("\n")]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


@pytest.mark.parametrize("meta", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "meta"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_cell(framework, meta):
    """A cell that is wrong raises, naming operation and transform; one that changed differs from the page."""
    fw = load(framework)
    page = documented(framework)
    for case in composition.cases(fw):
        if ("meta" in case.name) != meta:
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
