"""Arrays handed over by DLPack, without a copy where both frameworks can hold the same memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.errors import JaxRuntimeError
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils import _pytree as pytree

from gradlab._errors import InputError, KindError
from gradlab.transforms.linearised._torch import materialised

SMALL = np.iinfo(np.int32)
X64 = 'jax.config.update("jax_enable_x64", True)'


def to_torch(tree: Any, *, copy: bool | None = None) -> Any:
    def convert(path: Any, leaf: Any) -> Any:
        name = "tree" + jax.tree_util.keystr(path)
        if isinstance(leaf, np.ndarray):
            refuse_copy("to_torch", name, "a numpy array", copy)
            return torch.tensor(leaf)
        return tensor("to_torch", name, leaf, copy) if isinstance(leaf, jax.Array) else leaf

    return jax.tree_util.tree_map_with_path(convert, tree)


def to_jax(tree: Any, *, copy: bool | None = None) -> Any:
    def convert(path: Any, leaf: Any) -> Any:
        name = "tree" + pytree.keystr(path)
        if isinstance(leaf, torch.nn.Module):
            raise KindError(f"to_jax: {name} is a module; pass its state_dict(), or use interop.to_equinox")
        if isinstance(leaf, np.ndarray):
            refuse_copy("to_jax", name, "a numpy array", copy)
            leaf = torch.tensor(leaf)
        return array("to_jax", name, leaf, copy) if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map_with_path(convert, tree)


def tensor(op: str, name: str, x: Any, copy: bool | None = None) -> torch.Tensor:
    """One jax array as a tensor."""
    if isinstance(x, jax.core.Tracer):
        raise KindError(
            f"{op}: {name} is traced by jax (jit, grad or vmap are at work) and has no numbers to share; "
            "use interop.as_jax to call torch there"
        )
    if not x.is_fully_addressable or len(x.devices()) > 1:
        raise KindError(f"{op}: {name} lies on {len(x.devices())} devices; gather it with jax.device_get")
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        raise KindError(f"{op}: {name} is a key of random numbers; pass jax.random.key_data of it")
    try:
        shared = torch.from_dlpack(jax.block_until_ready(x))
    except (BufferError, RuntimeError, TypeError) as error:
        raise KindError(
            f"{op}: {name} is {x.dtype} on {x.device}, which torch cannot hold ({error}); convert it first"
        ) from error
    return shared.clone() if copy else shared


def array(op: str, name: str, t: torch.Tensor, copy: bool | None = None) -> jax.Array:
    """One tensor as a jax array."""
    if is_functorch_wrapped_tensor(t):
        raise KindError(
            f"{op}: {name} is under a torch.func transform and has no numbers to share; "
            "use interop.as_torch to call jax there"
        )
    if t.requires_grad:
        raise KindError(
            f"{op}: {name} requires grad, which jax would not know of; pass it detached, "
            "or use interop.as_torch to differentiate through jax"
        )
    if type(t) not in (torch.Tensor, torch.nn.Parameter) or t.layout is not torch.strided or t.is_quantized:
        raise KindError(f"{op}: {name} is a {type(t).__name__} of layout {t.layout}; pass a dense tensor")
    if t.device.type == "meta":
        raise KindError(f"{op}: {name} is on the meta device and has no numbers to share")
    plain = materialised(t.detach()).resolve_conj().resolve_neg()
    if t.is_conj() or t.is_neg():
        refuse_copy(op, name, "a tensor whose conjugate or sign is pending", copy)
    plain = narrowed(op, name, plain, copy)
    if copy:
        plain = plain.clone(memory_format=torch.contiguous_format)
    try:
        found = jax.dlpack.from_dlpack(plain)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, JaxRuntimeError) and "striding" in str(error):
            refuse_copy(op, name, "not contiguous", copy)
            return array(op, name, plain.contiguous())
        raise KindError(
            f"{op}: {name} is {t.dtype} on {t.device}, which jax cannot hold ({str(error).splitlines()[0]}); "
            "convert it first, with .cpu() where jax has no such device"
        ) from error
    if copy is False and found.size and found.unsafe_buffer_pointer() != plain.data_ptr():
        refuse_copy(op, name, "not aligned to 64 bytes", copy)
    return found


def narrowed(op: str, name: str, t: torch.Tensor, copy: bool | None) -> torch.Tensor:
    """The tensor, or with 64-bit numbers off in jax, integers of 32 bits."""
    if jax.config.jax_enable_x64 or t.dtype not in WIDE:  # type: ignore[attr-defined]
        return t
    if t.dtype not in (torch.int64, torch.uint64):
        raise KindError(f"{op}: {name} is {t.dtype}, and jax would make it 32 bits; {X64}, or convert it")
    refuse_copy(op, name, f"{t.dtype}, and jax has 64 bits switched off", copy)
    if t.numel() and (int(t.min()) < SMALL.min or int(t.max()) > SMALL.max):
        raise InputError(f"{op}: {name} holds integers beyond 32 bits; {X64}")
    return t.to(torch.int32)


WIDE = frozenset({torch.float64, torch.complex128, torch.int64, torch.uint64})


def refuse_copy(op: str, name: str, what: str, copy: bool | None) -> None:
    """Refuse to copy, where that was forbidden."""
    if copy is False:
        raise InputError(f"{op}: {name} is {what} and cannot be shared; leave out copy=False to copy it")
