"""Faulty torch operations, re-expressed in primitives that torch differentiates rightly to every order.

Most faults are of one kind: a fused operation saves a statistic of its input (a mean, an LU
factorisation) as if it were a constant, so a derivative of its derivative formula misses a term. Which
operations are at fault in which version of torch is data: known_wrong.json, which
experiments/framework_audit.py makes by running the checker over torch's own test inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
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
    EAGER = 3  # and run what f has compiled uncompiled: its second derivative raises, or is silently zero


class Repair(TorchFunctionMode):
    """While active, calls of faulty operations run their right form; says what else of f matters.

    Attributes:
        names: faulty operations that were called.
        differentiates: whether f called torch.autograd.grad itself, so that its order is one higher.
        forward: whether forward mode gives what reverse mode gives: f opens no forward mode of its own
            (a second one through an autograd.Function is a silent zero), no torch.no_grad and no hook,
            which reverse mode alone regards.
    """

    def __init__(self, level: Level):
        super().__init__()
        self.level = level
        self.names: set[str] = set()
        self.differentiates, self.forward = False, True

    @property
    def plain(self) -> bool:
        """Whether nothing was seen that a later call must run in this mode for."""
        return self.forward and not self.names

    def __enter__(self) -> Any:
        if not is_compiling():
            self.own, self.forwards = _depth(), _forward_levels()  # of the transforms around f
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        right = RIGHT_FORMS.get(func)
        if is_compiling():  # which traces no more than this
            return (right or func)(*args, **(kwargs or {}))
        self.differentiates = self.differentiates or func in DIFFERENTIATING
        alone = func in REVERSE_ALONE and not (func is torch._C._set_grad_enabled and args[0])
        self.forward = self.forward and not alone and _forward_levels() <= self.forwards
        if right is not None:
            self.names.add(func.__name__)
            if self.level >= Level.ALL or _depth() > self.own:
                return right(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def repaired(f: Callable[..., Any], repair: Repair | None = None) -> Callable[..., Any]:
    """`f` with right forms in place, and attention by its differentiable (MATH) kernel."""
    repair = repair or Repair(Level.ALL)

    def right(*args: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH), repair:
            return f(*args)

    return right


@contextmanager
def unseen(guard: Any) -> Iterator[None]:
    """A no_grad or enable_grad of an operation of gradlab's own, whose derivatives are right in every mode.

    A Repair at work around it takes it for none of f's, after which forward mode would not be trusted.
    """
    if is_compiling():
        with guard:
            yield
        return
    with torch._C.DisableTorchFunction():
        guard.__enter__()
    try:
        yield
    finally:
        with torch._C.DisableTorchFunction():
            guard.__exit__(None, None, None)


def transforming() -> bool:
    """Whether the compiler, a torch.func transform or forward mode is at work around this line."""
    return is_compiling() or _depth() > 0


def _depth() -> int:
    """How many transforms and forward modes are at work around this line."""
    return len(get_interpreter_stack() or ()) + forward_ad._current_level + 1


def _forward_levels() -> int:
    """How many of them are forward modes; torch.func's first one opens a level of its own."""
    stack = get_interpreter_stack() or ()
    return max(sum(level.key() == TransformType.Jvp for level in stack), forward_ad._current_level + 1)


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
    if not training:
        return _affine(_by_statistics(input, running_mean, running_var, eps), weight, bias)
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
        return _affine(_by_statistics(input, running_mean, running_var, eps), weight, bias)
    dims = tuple(range(2, input.ndim))
    if running_mean is not None or running_var is not None:
        functional.instance_norm(input.detach(), running_mean, running_var, momentum=momentum)
    return _affine(_standardised(input, dims, eps), weight, bias)


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps); in float32 for 16-bit numbers, whose squares overflow."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    centred = wide - wide.mean(dims, keepdim=True)
    return (centred * torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)).to(x.dtype)


def _by_statistics(x: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float) -> Tensor:
    """The same with fixed statistics of each channel, which batch norm outside training must be given."""
    if mean is None or variance is None:
        raise ValueError("Expected running_mean and running_var to be defined when training=False")
    channels = (-1,) + (1,) * (x.ndim - 2)
    return (x - mean.view(channels)) * torch.rsqrt(variance.view(channels) + eps)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    channels = (-1,) + (1,) * (y.ndim - 2)
    y = y if weight is None else y * weight.view(channels)
    return y if bias is None else y + bias.view(channels)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """v g / |v|, the norm over all axes but `dim`; torch's fused form is wrong already at second order."""
    axes = tuple(i for i in range(v.ndim) if i != dim % v.ndim) if dim != -1 else tuple(range(v.ndim))
    return v * (g / (v * v).sum(axes, keepdim=True).sqrt())


def slogdet(A: Tensor) -> Any:
    """log |det A| = Σ log |Uᵢᵢ| from A = P L U."""
    LU, pivots, _ = torch.linalg.lu_factor_ex(A)
    diagonal = LU.diagonal(dim1=-2, dim2=-1)
    sign = _parity(pivots, A.dtype) * diagonal.sign().prod(-1)
    return _named.linalg_slogdet((sign.detach(), diagonal.abs().log().sum(-1)))


def det(A: Tensor) -> Tensor:
    """det A = ± Π Uᵢᵢ from A = P L U, whose derivatives at a singular A are made not-a-number, not wrong."""
    LU, pivots, _ = torch.linalg.lu_factor_ex(A)
    diagonal = LU.diagonal(dim1=-2, dim2=-1)
    unknown = 0 * diagonal.abs().sqrt().sum(-1)  # zero; its slope is 0 · ∞ where a pivot vanishes
    return _parity(pivots, A.dtype) * diagonal.prod(-1) + unknown


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
    residual = input - target
    size = residual.abs()
    losses = torch.where(size <= delta, residual**2 / 2, delta * (size - delta / 2))
    return _reduced(losses if weight is None else losses * weight, reduction, weight)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    options: Any = None,
    **rest: Any,
) -> Tensor:
    """In chunks, torch's own has a derivative that is zero in forward mode and at second order."""
    logits = functional.linear(input, linear_weight, linear_bias)
    return functional.cross_entropy(
        logits, target, ignore_index=-100 if ignore_index is None else ignore_index, **rest
    )


def _reduced(losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
    if reduction == "mean":
        return losses.mean() if weight is None else losses.sum() / weight.expand_as(losses).sum()
    return losses.sum() if reduction == "sum" else losses


_FORMS: dict[Any, Callable[..., Any]] = {
    functional.scaled_dot_product_attention: functional.scaled_dot_product_attention,  # `met`: wants MATH
    functional.mse_loss: mse_loss,
    functional.huber_loss: huber_loss,
    functional.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    functional.batch_norm: batch_norm,
    torch.batch_norm: lambda x, w, b, mean, var, *rest: batch_norm(x, mean, var, w, b, *rest),
    functional.instance_norm: instance_norm,
    torch.instance_norm: lambda x, w, b, mean, var, *rest: instance_norm(x, mean, var, w, b, *rest),
    torch._weight_norm: weight_norm,
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
if hasattr(functional, "linear_cross_entropy"):
    _FORMS[functional.linear_cross_entropy] = linear_cross_entropy

_TABLE = json.loads(Path(__file__).with_name("known_wrong.json").read_text())


def known_wrong(version: str) -> list[dict[str, Any]]:
    """What the audit found in a version of torch; in one that was not audited, all that it found in any."""
    audited = {name: entries for name, entries in _TABLE.items() if name.startswith("torch ")}
    own = audited.get(f"torch {version.split('+')[0]}")
    return own if own is not None else [entry for entries in audited.values() for entry in entries]


def named(entries: list[dict[str, Any]]) -> frozenset[Any]:
    """The operations of some entries, under all their names, as far as this torch has them."""
    found: set[Any] = set()
    for name in {name for entry in entries for name in (entry["operation"], *entry["aliases"])}:
        try:
            found.add(attrgetter(name.removeprefix("torch."))(torch))
        except AttributeError:
            continue
    return frozenset(found)


def _nodes(entries: list[dict[str, Any]]) -> frozenset[str]:
    """The operations of some entries in a recorded autograd graph, on accelerators too."""
    nodes = {node for entry in entries for node in entry["nodes"]}
    twins = {node.replace("Native", other) for node in nodes for other in ("Cudnn", "Miopen")}
    return frozenset(nodes | {node for node in twins if "BatchNormBackward" in node})


# Imprecise by less than this is no fault to refuse or to repair.
_WRONG = [e for e in known_wrong(torch.__version__) if e["failed"] and (e["relative_error"] or 1) > 1e-6]
_failing = lambda *claims: [entry for entry in _WRONG if not set(claims).isdisjoint(entry["failed"])]
_mendable = lambda entries: [entry for entry in entries if not named([entry]).isdisjoint(_FORMS)]

# Operations whose own raise where their right forms do not, in every version.
_RAISING = {functional.scaled_dot_product_attention, functional.mse_loss, functional.huber_loss}
RIGHT_FORMS = {f: right for f, right in _FORMS.items() if f in _RAISING or f in named(_WRONG)}

# In a recorded autograd graph: operations that are wrong at second order ...
_SECOND = _mendable(_failing("reverse over reverse"))
# ... or at third, so that a graph which holds a derivative of theirs is wrong at second ...
_THIRD = _mendable(_failing("reverse over reverse over reverse"))
_HELD = {node.replace("Backward0", "BackwardBackward0") for node in _nodes(_THIRD)}
FAULTY_AT_SECOND = _nodes(_SECOND) | _HELD
# ... or in some nest, beyond second order.
FAULTY = _nodes(_mendable(_WRONG)) | FAULTY_AT_SECOND
WITHOUT_SECOND = frozenset(
    {
        "ScaledDotProductFlashAttentionForCpuBackward0",
        "ScaledDotProductFlashAttentionBackward0",
        "ScaledDotProductEfficientAttentionBackward0",
        "ScaledDotProductCudnnAttentionBackward0",
        "ScaledDotProductFusedAttentionOverrideableBackward0",
    }
)
FIRST_IN_GRAD_MODE = frozenset({"LinalgDetBackward0"})  # zero at a singular matrix under torch.no_grad
DIFFERENTIATING = frozenset({torch.autograd.grad, torch.autograd.backward, Tensor.backward})
# What forward mode sees otherwise than reverse mode does: it runs through no_grad, and past hooks; or it is
# wrong, or its derivative is.
REVERSE_ALONE = frozenset(
    {
        torch._C._set_grad_enabled,
        Tensor.register_hook,
        torch.index_reduce,
        Tensor.index_reduce,
        Tensor.index_reduce_,
    }
) | (
    named(_failing("jvp", "forward over forward", "forward over reverse", "reverse over forward"))
    - set(RIGHT_FORMS)
)
# Without a right form, and wrong in reverse mode; of control flow the audit has no associative_scan and no map.
UNREPAIRABLE = frozenset({"AssociativeScanAutogradOpBackward", "MapAutogradOpBackward"}) | (
    _nodes([entry for entry in _failing("vjp", "reverse over reverse") if not _mendable([entry])])
)
