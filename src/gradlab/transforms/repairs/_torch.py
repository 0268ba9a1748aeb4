"""Faulty torch operations, re-expressed in primitives that torch differentiates rightly to every order.

The faults are of one kind: a fused operation saves a statistic of its input (a mean, an LU
factorisation) as if it were a constant, so a derivative of its derivative formula misses a term.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_named: Any = torch.return_types  # its stubs lack what it has


class Level(IntEnum):
    """How much of the table a call needs."""

    NONE = 0  # reverse over reverse of these operations is right, or none occurs
    TRANSFORMS = 1  # repair where a torch.func transform or forward mode inside f meets a faulty operation
    ALL = 2  # repair every occurrence: the result will be differentiated again, or forward mode is used


class Repair(TorchFunctionMode):
    """While active, calls of faulty operations run their right form; `names` says which were called.

    A forward-mode level that is open when it is made is the caller's own, of first order, and needs none.
    """

    def __init__(self, level: Level):
        super().__init__()
        self.level = level
        self.names: set[str] = set()
        self.own = forward_ad._current_level

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        right = RIGHT_FORMS.get(func)
        if right is not None:
            self.names.add(func.__name__)
            if self.level == Level.ALL or transforming(self.own):
                return right(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def repaired(f: Callable[..., Any], repair: Repair | None = None) -> Callable[..., Any]:
    """`f` with right forms in place, and attention by its differentiable (MATH) kernel."""
    repair = repair or Repair(Level.ALL)

    def right(*args: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH), repair:
            return f(*args)

    return right


def transforming(own: int = -1) -> bool:
    """Whether the compiler, a torch.func transform or forward mode (beyond level `own`) is at work here."""
    return is_compiling() or peek_interpreter_stack() is not None or forward_ad._current_level > own


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    y = _standardised(input, tuple(range(-len(normalized_shape), 0)), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    if not training:  # fixed statistics: torch's own derivatives are right
        return functional.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    dims = (0, *range(2, input.ndim))
    if running_mean is not None or running_var is not None:  # updated in place, as torch's own does
        functional.batch_norm(input.detach(), running_mean, running_var, training=True, momentum=momentum)
    return _affine(_standardised(input, dims, eps), weight, bias)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    if not use_input_stats:
        return functional.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    dims = tuple(range(2, input.ndim))
    if running_mean is not None or running_var is not None:
        functional.instance_norm(input.detach(), running_mean, running_var, momentum=momentum)
    return _affine(_standardised(input, dims, eps), weight, bias)


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    channels = (-1,) + (1,) * (y.ndim - 2)
    y = y if weight is None else y * weight.view(channels)
    return y if bias is None else y + bias.view(channels)


def slogdet(A: Tensor) -> Any:
    """log |det A| = Σ log |Uᵢᵢ| from A = P L U."""
    LU, pivots = torch.linalg.lu_factor(A)
    diagonal = LU.diagonal(dim1=-2, dim2=-1)
    sign = _parity(pivots, A.dtype) * diagonal.sign().prod(-1)
    return _named.linalg_slogdet((sign.detach(), diagonal.abs().log().sum(-1)))


def det(A: Tensor) -> Tensor:
    """det A = ± Π Uᵢᵢ from A = P L U; not a number, rather than wrong, beyond first order at a singular A."""
    LU, pivots = torch.linalg.lu_factor(A)
    return _parity(pivots, A.dtype) * LU.diagonal(dim1=-2, dim2=-1).prod(-1)


def logdet(A: Tensor) -> Tensor:
    sign, logabsdet = slogdet(A)
    return torch.where(sign < 0, torch.nan, logabsdet)


def _parity(pivots: Tensor, dtype: torch.dtype) -> Tensor:
    swaps = pivots != torch.arange(1, pivots.shape[-1] + 1, device=pivots.device, dtype=pivots.dtype)
    return 1 - 2 * (swaps.sum(-1) % 2).to(dtype)


def solve(A: Tensor, B: Tensor, *, left: bool = True, out: Tensor | None = None) -> Tensor:
    """X with A X = B (or X A = B) by two triangular solves, each with derivatives of its own."""
    vector = B.ndim == 1 or (A.ndim - 1 == B.ndim and A.shape[:-1] == B.shape)
    if not left:
        return solve(A.mT, B.mT).mT
    LU, pivots = torch.linalg.lu_factor(A)
    X = torch.linalg.lu_solve(LU, pivots, B.unsqueeze(-1) if vector else B)
    return X.squeeze(-1) if vector else X


def solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False, out: Any = None) -> Any:
    info = torch.linalg.lu_factor_ex(A.detach(), check_errors=check_errors).info
    return _named.linalg_solve_ex((solve(A, B, left=left), info))


def tensorsolve(A: Tensor, B: Tensor, dims: Any = None, *, out: Tensor | None = None) -> Tensor:
    if dims is not None:
        A = A.movedim(tuple(dims), tuple(range(A.ndim - len(dims), A.ndim)))
    shape = A.shape[B.ndim :]
    return solve(A.reshape(B.numel(), -1), B.reshape(-1)).reshape(shape)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Forward over reverse of torch's own raises ("ZeroTensors are immutable")."""
    if size_average is not None or reduce is not None:
        return functional.mse_loss(input, target, size_average, reduce, reduction)
    losses = (input - target) ** 2
    return _reduced(losses if weight is None else losses * weight, reduction, weight)


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Forward mode of torch's own raises."""
    size = (input - target).abs()
    losses = torch.where(size <= delta, size**2 / 2, delta * (size - delta / 2))
    return _reduced(losses if weight is None else losses * weight, reduction, weight)


def _reduced(losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
    if reduction == "mean":
        return losses.mean() if weight is None else losses.sum() / weight.expand_as(losses).sum()
    return losses.sum() if reduction == "sum" else losses


RIGHT_FORMS: dict[Any, Callable[..., Any]] = {
    functional.scaled_dot_product_attention: functional.scaled_dot_product_attention,  # `met`: wants MATH
    functional.mse_loss: mse_loss,
    functional.huber_loss: huber_loss,
    functional.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    functional.batch_norm: batch_norm,
    torch.batch_norm: batch_norm,
    functional.instance_norm: instance_norm,
    torch.instance_norm: instance_norm,
    torch.det: det,
    torch.linalg.det: det,
    Tensor.det: det,
    torch.logdet: logdet,
    Tensor.logdet: logdet,
    torch.slogdet: slogdet,
    torch.linalg.slogdet: slogdet,
    Tensor.slogdet: slogdet,
    torch.linalg.solve: solve,
    torch.linalg.solve_ex: solve_ex,
    torch.linalg.tensorsolve: tensorsolve,
}

# The same operations as they appear in a recorded autograd graph.
FAULTY_BEYOND_SECOND = frozenset(
    {
        "NativeLayerNormBackward0",
        "NativeBatchNormBackward0",
        "CudnnBatchNormBackward0",
        "MiopenBatchNormBackward0",
        "LinalgDetBackward0",
        "LinalgSlogdetBackward0",
        "LinalgSolveExBackward0",
    }
)
WITHOUT_SECOND = frozenset(
    {
        "ScaledDotProductFlashAttentionForCpuBackward0",
        "ScaledDotProductFlashAttentionBackward0",
        "ScaledDotProductEfficientAttentionBackward0",
        "ScaledDotProductCudnnAttentionBackward0",
        "ScaledDotProductFusedAttentionOverrideableBackward0",
    }
)
# Control flow as operators: their backward loses terms, already at first order for a while_loop.
UNREPAIRABLE = frozenset(
    {
        "WhileLoopAutogradOpBackward",
        "ScanAutogradOpBackward",
        "AssociativeScanAutogradOpBackward",
        "CondAutogradOpBackward",
        "MapAutogradOpBackward",
    }
)
