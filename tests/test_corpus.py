"""The checker on the corpus: every wrong derivative found and the right row blamed, no alarm on a right one."""

import importlib.util

import pytest

from corpus.cases import corpus
from frameworks import FRAMEWORKS
from gradlab import check

AT_LEAST = 40  # of each kind and framework
SLOW = 16  # all but every so many are left to `make test-all`: jax compiles a score of programs for each
CASES = {name: corpus(name) if importlib.util.find_spec(name) else [] for name in FRAMEWORKS}


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        wrong = "blamed" in metafunc.function.__name__
        chosen = [(name, case) for name, cases in CASES.items() for case in cases if case.wrong == wrong]
        marks = [[pytest.mark.slow] if i % SLOW else [] for i in range(len(chosen))]
        metafunc.parametrize(
            "case",
            [
                pytest.param(c, id=f"{name}-{c.name}", marks=m)
                for (name, c), m in zip(chosen, marks, strict=True)
            ],
        )


def statuses(case):
    f, x, options = case.built()
    report = check.derivatives(f, x, **options)
    return report, {row.claim: row.status for row in report.rows}


def test_a_wrong_derivative_is_blamed(case):
    report, found = statuses(case)
    assert {claim for claim in case.blamed if found.get(claim) != "failed"} == set(), str(report)
    assert {claim for claim in case.innocent if found.get(claim) == "failed"} == set(), str(report)


def test_a_right_derivative_is_not_accused(case):
    report, found = statuses(case)
    assert "failed" not in found.values(), str(report)
    assert report.passed == (case.verdict == "passed"), str(report)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_corpus_is_large(framework):
    pytest.importorskip(framework)
    for wrong in (True, False):
        assert sum(case.wrong == wrong for case in CASES[framework]) >= AT_LEAST
