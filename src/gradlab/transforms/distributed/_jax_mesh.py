"""The devices of a mesh as shards: jax.shard_map, and sums by psum, which jax differentiates itself."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.core import trace_state_clean
from jax._src.distributed import global_state
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gradlab._errors import InputError, ProcessError
from gradlab.transforms.distributed.shards import SAME, check_timeout, count_examples, reason

ARRAYS = (jax.Array, np.ndarray, np.generic)
CALLS = count()  # of operations over several processes, which all count alike


class Part:
    """One device's shard, within jax.shard_map."""

    where = staticmethod(jnp.where)
    map = staticmethod(jax.tree.map)
    leaves = staticmethod(jax.tree.leaves)

    def __init__(self, axes: tuple[str, ...], size: int, count: int):
        import gradlab.jax

        self.ops, self.axes, self.size, self.count = gradlab.jax, axes, size, count

    def total(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.psum(x, self.axes), tree)


def sharded(
    op: str,
    over: Any,
    timeout: float,
    same: tuple[Any, ...],
    batch: Any,
    body: Callable[..., Any],
    out: Any = SAME,
) -> Any:
    """What a body gives on every shard; `out` says which results are the same everywhere."""
    if over is not None and not isinstance(over, Mesh):
        raise InputError(
            f"distributed.{op}: over is a {type(over).__name__}; pass a jax.sharding.Mesh, or None"
        )
    check_timeout(op, timeout)
    mesh = over if over is not None else Mesh(np.array(jax.devices()), ("examples",))
    axes = tuple(mesh.axis_names)
    leaves, structure = jax.tree.flatten((same, batch))
    split = [False] * len(jax.tree.leaves(same)) + [True] * len(jax.tree.leaves(batch))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, ARRAYS)]
    specs = [P(axes) if split[i] else P() for i in places]
    arrays, examples = placed(op, timeout, mesh, [leaves[i] for i in places], [split[i] for i in places])
    part = Part(axes, examples // mesh.size, examples)

    def of_shard(*arrays: Any) -> Any:
        own = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            own[i] = x
        same, batch = jax.tree.unflatten(structure, own)
        return body(part, same, batch)

    results = jax.tree.map(lambda own: P(axes) if own else P(), out)
    run = jax.shard_map(of_shard, mesh=mesh, in_specs=tuple(specs), out_specs=results, check_vma=False)
    found = run(*arrays)
    if jax.process_count() == 1 or any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(found)):
        return found
    try:
        return jax.block_until_ready(found)
    except JaxRuntimeError as error:
        raise lost(op, mesh, timeout, error) from error


def placed(
    op: str, timeout: float, mesh: Mesh, arrays: Sequence[Any], split: Sequence[bool]
) -> tuple[list[Any], int]:
    """The arrays where the mesh wants them, and the number of examples in all processes."""
    traced = lambda x: isinstance(x, jax.core.Tracer)
    own = lambda x: not traced(x) and (not isinstance(x, jax.Array) or x.is_fully_addressable)
    examples = count_examples(op, [x for x, each in zip(arrays, split, strict=True) if each])
    processes = sorted({device.process_index for device in mesh.devices.flat})
    if len(processes) > 1:
        agree(
            op,
            timeout,
            mesh,
            processes,
            [described(x, each, own(x)) for x, each in zip(arrays, split, strict=True)],
        )
        parts = {own(x) for x, each in zip(arrays, split, strict=True) if each}
        if parts == {True}:
            examples *= len(processes)
        elif True in parts:
            raise InputError(
                f"distributed.{op}: some arrays of the batch are of this process alone, others global; pass one kind"
            )

    if examples % mesh.size or not examples:
        raise InputError(
            f"distributed.{op}: the batch has {examples} examples for {mesh.size} devices; pass a multiple of "
            f"{mesh.size}, at least one for each device"
        )
    tracing = any(map(traced, arrays)) or not trace_state_clean()
    if tracing and len(processes) > 1 and any(own(x) for x, each in zip(arrays, split, strict=True) if each):
        raise InputError(
            f"distributed.{op}: inside of jit the batch holds arrays of this process alone, which would make another "
            "program of it; pass global arrays (jax.make_array_from_process_local_data) as arguments of what is jitted"
        )

    def put(x: Any, each: bool) -> Any:
        where = NamedSharding(mesh, P(tuple(mesh.axis_names)) if each else P())
        if tracing or not own(x):
            return x
        if len(processes) > 1:
            return jax.make_array_from_process_local_data(where, np.asarray(x))
        return jax.device_put(x, where) if len(x.shape) and not (each and x.shape[0] % mesh.size) else x

    return [put(x, each) for x, each in zip(arrays, split, strict=True)], examples


def described(x: Any, each: bool, own: bool) -> str:
    """An array's form, with a checksum of what is to be the same in all processes."""
    bits = "" if each or not own else f" of checksum {zlib.crc32(np.asarray(x).tobytes()):08x}"
    return f"{x.dtype}{list(x.shape)}{bits}"


def agree(op: str, timeout: float, mesh: Mesh, processes: Sequence[int], forms: list[str]) -> None:
    """Refuse processes that disagree, or are not there: by the store of jax's own coordination service."""
    number, me, client = next(CALLS), jax.process_index(), global_state.client
    assert client is not None  # there is one where there are several processes
    key = lambda number, process: f"gradlab/{number}/{process}"
    client.key_value_set(key(number, me), json.dumps([op, forms]))
    for other in processes:
        try:
            theirs = json.loads(client.blocking_key_value_get(key(number, other), int(1000 * timeout)))
        except JaxRuntimeError as error:
            raise lost(op, mesh, timeout, error, other) from error
        if theirs != [op, forms]:
            raise InputError(
                f"distributed.{op}: processes disagree: process {me} has {', '.join(forms)}, process {other} calls "
                f"{theirs[0]} with {', '.join(theirs[1])}; call with the same shapes, and the same params, x and v"
            )
    if number:
        client.key_value_delete(key(number - 1, me))  # all have read it, since all are here


def lost(op: str, mesh: Mesh, timeout: float, error: Exception, other: int | None = None) -> ProcessError:
    """What to say of processes that do not answer."""
    whom = "the others" if other is None else f"process {other}"
    return ProcessError(
        f"distributed.{op}: process {jax.process_index()} of {jax.process_count()}, in the mesh "
        f"{dict(mesh.shape)}, waited for {whom} up to {timeout:g} s in vain ({reason(error)}); a process "
        "has ended, or calls something else. See the other processes' output, and start all again"
    )
