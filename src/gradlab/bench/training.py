"""Adam on one batch after the other, in either framework."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich.progress import track

from gradlab.bench.console import console


def train(
    framework: str,
    loss: Callable[..., Any],
    params: dict[str, Any],
    batches: Iterator[Any],
    rate: float,
    name: str,
    count: int,
) -> tuple[dict[str, Any], list[float], float]:
    """The parameters, the losses and the seconds a step after the first, by jax.jit and by plain backward in torch.

    `loss(params, *batch)`, of batches of numpy arrays, whose dtypes are kept. The rate falls to zero along a cosine.
    """
    tools: tuple[Any, Any, Any]
    if framework == "jax":
        import jax

        tools = jax.numpy.asarray, jax.jit, jax.value_and_grad
    else:
        import torch

        from gradlab.bench._torch import value_and_grad

        tools = torch.as_tensor, lambda f: f, value_and_grad
    array, compiled, gradient_of = tools
    adam = importlib.import_module(f"gradlab.{framework}").optimizers.adam(rate)
    gradient = gradient_of(loss)

    def step(params: Any, memory: Any, share: Any, batch: Any) -> Any:
        value, slope = gradient(params, *batch)
        updates, memory = adam.update(slope, memory, params)
        return {key: params[key] + share * updates[key] for key in params}, memory, value

    step, memory, losses, began = compiled(step), adam.init(params), [], 0.0
    for i in track(range(count), name, console=console()):
        share = array(np.float32((1 + np.cos(np.pi * i / count)) / 2))
        params, memory, value = step(params, memory, share, [array(x) for x in next(batches)])
        losses.append(float(value))
        began = time.perf_counter() if i == 0 else began
    return params, losses, (time.perf_counter() - began) / max(count - 1, 1)
