from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx


def functional(model: Any) -> tuple[Callable[..., Any], Any]:
    """equinox.partition: the float arrays are the parameters, the rest of the module is held."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(params: Any, *inputs: Any, **options: Any) -> Any:
        return eqx.combine(params, static)(*inputs, **options)

    return apply, params
