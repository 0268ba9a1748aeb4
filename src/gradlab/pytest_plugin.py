"""gradlab in pytest: the fixture `check_derivatives` and the marker `gradlab_check`.

Loaded by every pytest run beside which gradlab is installed: it imports nothing until a test asks for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gradlab.check import Report

MARKER = "gradlab_check"
FRAMEWORKS = ("jax", "torch")
DTYPES = ("float32", "float64")
KNOWN = {"frameworks": FRAMEWORKS, "dtypes": ("bfloat16", "float16", *DTYPES)}


@dataclass(frozen=True)
class CheckDerivatives:
    """Calls `gradlab.check.derivatives` and fails the test where a claim fails.

    Attributes:
        framework: that the marker chose for this run of the test, None without the marker.
        dtype: likewise.
        options: of the marker, which a call may override.
    """

    framework: str | None = None
    dtype: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, f: Callable[..., Any], x: Any, *args: Any, **options: Any) -> Report:
        """Check f at x; returns the report, or raises `CheckError` at the line of the test."""
        __tracebackhide__ = True
        from gradlab import check

        report = check.derivatives(f, x, *args, **{**self.options, **options})
        try:
            return report.raise_if_failed()
        except check.CheckError as error:
            raise error.with_traceback(None) from None

    def array(self, a: Any) -> Any:
        """An array of numbers in this run's framework and dtype (complex numbers in that precision)."""
        import numpy as np

        if self.framework is None or self.dtype is None:
            pytest.fail(f"check_derivatives.array: mark the test with @pytest.mark.{MARKER}", pytrace=False)
        from gradlab.check.arguments import arrays

        given = np.asarray(a)
        numbers = given if given.dtype.kind in "fc" else given.astype(np.float64)
        return arrays(numbers, self.framework, self.dtype)


@pytest.fixture
def check_derivatives(request: pytest.FixtureRequest) -> Iterator[CheckDerivatives]:
    """`check.derivatives(f, x, *args, **options).raise_if_failed()`; `.array`, `.framework`, `.dtype`."""
    framework, dtype = getattr(request, "param", (None, None))
    if framework is not None:
        pytest.importorskip(framework, reason=f"{MARKER}: {framework} is not installed")
    with _precision(framework, dtype):
        yield CheckDerivatives(framework, dtype, _options(request.node)[1])


def _precision(framework: str | None, dtype: str | None) -> Any:
    """In jax, float64 for this test alone."""
    if framework != "jax" or dtype != "float64":
        return nullcontext()
    import jax

    return jax.enable_x64(True)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}(frameworks={FRAMEWORKS}, dtypes={DTYPES}, **options): run the test, which takes the fixture "
        "check_derivatives, once for each framework and dtype; the options are of gradlab.check.derivatives.",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One run of a marked test for each framework and dtype."""
    if metafunc.definition.get_closest_marker(MARKER) is None:
        return
    choices, _ = _options(metafunc.definition)
    if "check_derivatives" in metafunc.fixturenames:
        runs = [(f, d) for f in choices["frameworks"] for d in choices["dtypes"]]
        metafunc.parametrize("check_derivatives", runs, ids=list(map("-".join, runs)), indirect=True)
    elif any(mark.name == MARKER for mark in metafunc.definition.own_markers):
        _refuse(f"{metafunc.function.__name__} does not take the fixture check_derivatives")


def _options(node: pytest.Item) -> tuple[dict[str, tuple[str, ...]], dict[str, Any]]:
    """The frameworks and dtypes of a test's markers, and their options; those nearer to the test win."""
    choices: dict[str, tuple[str, ...]] = {"frameworks": FRAMEWORKS, "dtypes": DTYPES}
    options: dict[str, Any] = {}
    for mark in reversed(list(node.iter_markers(MARKER))):
        if mark.args:
            _refuse(f"it takes keywords alone, not {mark.args[0]!r}; pass frameworks=, dtypes= or options")
        for name, value in mark.kwargs.items():
            if name in choices:
                choices[name] = _chosen(name, value)
            else:
                options[name] = value
    _refuse_unknown(options)
    return choices, options


def _chosen(name: str, value: Any) -> tuple[str, ...]:
    chosen = (value,) if isinstance(value, str) else tuple(value)
    unknown = [choice for choice in chosen if choice not in KNOWN[name]]
    if unknown or not chosen:
        given = ", ".join(map(repr, unknown)) or "empty"
        _refuse(f"{name} is {given}; choose from {', '.join(KNOWN[name])}")
    return chosen


def _refuse_unknown(options: dict[str, Any]) -> None:
    if not options:
        return
    from gradlab import check

    parameters = inspect.signature(check.derivatives).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    unknown = [name for name in options if name not in known]
    if unknown:
        _refuse(f"no option {unknown[0]!r}; choose from frameworks, dtypes, {', '.join(known)}")


def _refuse(message: str) -> None:
    pytest.fail(f"{MARKER}: {message}", pytrace=False)
