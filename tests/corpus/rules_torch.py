"""What the torch corpus is made of: points, and autograd.Functions written as formulas."""

from collections.abc import Callable

import numpy as np
import torch
from torch.autograd import Function

FIRST = ("vjp", "gradient")  # the rows of a wrong pullback of a scalar function
EVERY_FIRST = ("jvp", *FIRST)  # of a function whose operations, and not its rule, are at fault
SECOND = ("hvp", "reverse over reverse")
EVERY_SECOND = (*SECOND, "forward over reverse", "reverse over forward", "forward over forward")
THIRD = ("reverse over reverse over reverse",)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def single(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def spaced(low: float, high: float, n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64).to(dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def complex_normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.complex(normal(*shape, seed=seed), normal(*shape, seed=seed + 1000))


def rule(forward: Callable, backward: Callable, jvp: Callable | None = None) -> Callable:
    """forward(*xs) with the pullback backward(u, *xs), and the pushforward jvp(*vs, *xs) where it has one."""

    class Reverse(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*xs):
            return forward(*xs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, u):
            return backward(u, *ctx.saved_tensors)

    class Both(Reverse):
        @staticmethod
        def jvp(ctx, *vs):
            return jvp(*vs, *ctx.saved_tensors)

    return (Both if jvp else Reverse).apply
