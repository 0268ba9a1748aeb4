"""torch.nn's recurrent layers and cells written out: their fused kernels fail under vmap (pytorch#105982)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

Step = Callable[[Tensor, Any, Tensor, Tensor | None], Any]  # input's part, state, w_hh, b_hh -> state


def lstm_step(part: Tensor, state: Any, w: Tensor, b: Tensor | None) -> Any:
    """i, f, g, o = part + W h + b; c' = σ(f) c + σ(i) tanh(g); h' = σ(o) tanh(c')."""
    h, c = state
    i, f, g, o = (part + linear(h, w, b)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(part: Tensor, state: Any, w: Tensor, b: Tensor | None) -> Any:
    """r = σ(..), z = σ(..), n = tanh(part_n + r (W h + b)_n); h' = (1 - z) n + z h."""
    (h,) = state
    (r, z, n), (hr, hz, hn) = part.chunk(3, -1), linear(h, w, b).chunk(3, -1)
    z = (z + hz).sigmoid()
    return ((1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * h,)


def plain_step(activation: Callable[[Tensor], Tensor]) -> Step:
    """h' = activation(part + W h + b)."""
    return lambda part, state, w, b: (activation(part + linear(state[0], w, b)),)


def layer(
    step: Step,
    input: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    rate: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """All layers and directions of a recurrent network over its time axis: (output, *last states)."""
    time = 1 if batch_first and input.ndim == 3 else 0
    each, directions = 4 if has_biases else 2, 1 + bidirectional
    projected = len(weights) == (each + 1) * num_layers * directions  # an LSTM with proj_size
    each += projected
    ends: list[Any] = []
    for i in range(num_layers):
        outputs = []
        for reverse in range(directions):
            k = i * directions + reverse
            w_ih, w_hh, *b = weights[each * k : each * (k + 1)]
            w_hr = b.pop() if projected else None
            b_ih, b_hh = b or (None, None)
            parts = linear(input, w_ih, b_ih).unbind(time)
            h = tuple(s[k] for s in state)
            hs = []
            for part in reversed(parts) if reverse else parts:
                h = step(part, h, w_hh, b_hh)
                h = h if w_hr is None else (linear(h[0], w_hr), *h[1:])
                hs.append(h[0])
            outputs.append(torch.stack(hs[::-1] if reverse else hs, time))
            ends.append(h)
        input = torch.cat(outputs, -1)
        if rate and train and i < num_layers - 1:
            input = dropout(input, rate)
    return input, *(torch.stack(parts) for parts in zip(*ends, strict=True))


def over_time(step: Step, has_cell: bool = False) -> Callable[..., Any]:
    """The form of torch.lstm and its kin, which take one hidden state or a list of two."""

    def run(input: Tensor, state: Any, weights: Any, *options: Any) -> Any:
        if not isinstance(weights, (list, tuple)):
            raise NotImplementedError("packed sequences cannot be mapped over examples; pass padded ones")
        return layer(step, input, state if has_cell else (state,), weights, *options)

    return run


def cell(step: Step, has_cell: bool = False) -> Callable[..., Any]:
    """The form of torch.lstm_cell and its kin."""

    def run(input: Tensor, state: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
        new = step(linear(input, w_ih, b_ih), state if has_cell else (state,), w_hh, b_hh)
        return new if has_cell else new[0]

    return run


tanh, relu = plain_step(torch.tanh), plain_step(torch.relu)
WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    torch.lstm: over_time(lstm_step, has_cell=True),
    torch.gru: over_time(gru_step),
    torch.rnn_tanh: over_time(tanh),
    torch.rnn_relu: over_time(relu),
    torch.lstm_cell: cell(lstm_step, has_cell=True),
    torch.gru_cell: cell(gru_step),
    torch.rnn_tanh_cell: cell(tanh),
    torch.rnn_relu_cell: cell(relu),
}
