"""The models in torch.nn: a batch in, logits out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from gradlab.bench.comparison.data import VOCABULARY, Task, flattened, weight


class MLP(nn.Module):
    """Layers with tanh between them."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(widths))

    def forward(self, x: Any) -> Any:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


class Conv(nn.Module):
    """3x3 convolutions with GELU, the later ones halving the image, and a linear head."""

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        pairs = pairwise(channels)
        self.layers = nn.ModuleList(nn.Conv2d(n, m, 3, 1 if n == 1 else 2, padding=1) for n, m in pairs)
        self.head = nn.Linear(flattened(channels), 10)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = functional.gelu(layer(x), approximate="tanh")
        return self.head(x.flatten(1))


class Block(nn.Module):
    """Causal attention and two layers with GELU, each after a norm and added to what came in."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm0, self.norm1 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, h: Any) -> Any:
        batch, length, width = h.shape
        qkv = self.qkv(self.norm0(h))
        q, k, v = qkv.reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return h + self.down(functional.gelu(self.up(self.norm1(h)), approximate="tanh"))


class Decoder(nn.Module):
    """A GPT: what comes next, at every place; the head is the embedding itself where it is tied."""

    def __init__(self, width: int, heads: int, blocks: int, length: int, tied: bool):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.place = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = None if tied else nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Any) -> Any:
        h = self.embed(tokens) + self.place
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        return functional.linear(h, self.embed.weight) if self.head is None else self.head(h)


MODELS: dict[str, Any] = {"mlp": MLP, "conv": Conv, "decoder": Decoder}


def build(task: Task, dtype: str, device: str = "cpu", seed: int = 0, values: Any = weight) -> Any:
    """The model of a task, with the weights that every framework begins with, or other values by path and shape."""
    model = MODELS[task.kind](**task.sizes)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            value = torch.as_tensor(values(name, tuple(leaf.shape), seed))
            leaf.data = value.to(device, getattr(torch, dtype))
    return model


def cross_entropy(model: Any, inputs: Any, targets: Any) -> Any:
    """Mean over the examples, and over the places of each."""
    logits = model(inputs)
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
