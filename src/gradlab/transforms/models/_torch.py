from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def functional(model: torch.nn.Module) -> tuple[Callable[..., Any], dict[str, torch.Tensor]]:
    """torch.func.functional_call: the named parameters, detached; tied ones appear once."""
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def apply(params: dict[str, torch.Tensor], *inputs: Any, **options: Any) -> Any:
        state = dict(model.named_buffers())
        if model.training:  # what training mode updates in place (batch norm) is not the model's own
            state = {name: buffer.clone() for name, buffer in state.items()}
        return torch.func.functional_call(model, {**state, **params}, inputs, options)

    return apply, params
