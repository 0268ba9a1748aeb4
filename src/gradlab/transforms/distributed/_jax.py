from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradlab.transforms.distributed import TIMEOUT, shards
from gradlab.transforms.distributed._jax_mesh import sharded
from gradlab.transforms.distributed.shards import OWN, SAME
from gradlab.transforms.gradient_statistics import NoiseScale, Statistics


def hvp(
    f: Callable[..., Any], x: Any, v: Any, *batch: Any, over: Any = None, timeout: float = TIMEOUT
) -> Any:
    body = lambda part, same, batch: shards.hvp(part, f, same, batch)
    return sharded("hvp", over, timeout, (x, v), batch, body)


def ggn_vp(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    x: Any,
    v: Any,
    *batch: Any,
    over: Any = None,
    timeout: float = TIMEOUT,
) -> Any:
    body = lambda part, same, batch: shards.ggn_vp(part, model, loss, same, batch)
    return sharded("ggn_vp", over, timeout, (x, v), batch, body)


def per_example_norms(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    over: Any = None,
    timeout: float = TIMEOUT,
    **options: Any,
) -> Any:
    body = lambda part, same, batch: part.ops.per_example_norms(loss, *same, *batch, **options)
    return sharded("per_example_norms", over, timeout, (params,), batch, body, OWN)


def clipped_grad(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    max_norm: Any,
    over: Any = None,
    timeout: float = TIMEOUT,
    **options: Any,
) -> Any:
    body = lambda part, same, batch: shards.clipped_grad(part, loss, same, batch, max_norm, options)
    return sharded("clipped_grad", over, timeout, (params,), batch, body, (SAME, OWN))


def per_example_statistics(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    over: Any = None,
    timeout: float = TIMEOUT,
    **options: Any,
) -> Statistics:
    body = lambda part, same, batch: shards.per_example_statistics(part, loss, same, batch, options)
    return sharded("per_example_statistics", over, timeout, (params,), batch, body)


def gradient_noise_scale(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    over: Any = None,
    timeout: float = TIMEOUT,
    **options: Any,
) -> NoiseScale:
    body = lambda part, same, batch: shards.gradient_noise_scale(part, loss, same, batch, options)
    return sharded("gradient_noise_scale", over, timeout, (params,), batch, body)
