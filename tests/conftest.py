"""Fixtures: each test that asks for `fw` runs once a framework, and is skipped where one is absent."""

import importlib.util

import pytest

from frameworks import FRAMEWORKS, load


def pytest_configure(config):
    if importlib.util.find_spec("jax") is not None:
        import jax

        jax.config.update("jax_enable_x64", True)  # closed forms are compared in float64


@pytest.fixture(params=FRAMEWORKS)
def fw(request):
    """One framework under the names that both have: arrays, transforms, gradlab's namespace."""
    return load(request.param)
