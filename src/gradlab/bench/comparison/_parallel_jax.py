"""Data parallelism in jax: one program over sharded arrays, on the devices of one process or of several.

python -m gradlab.bench.comparison._parallel_jax one|sharded|shard_map|processes preset task device rank ranks port
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gradlab.bench.comparison._jax import adamw, update
from gradlab.bench.comparison._models_jax import build, cross_entropy
from gradlab.bench.comparison.data import Optimiser, Task, batch
from gradlab.bench.comparison.parallel import followed, told


def stepper(way: str, task: Task, dtype: str, mesh: Mesh) -> Any:
    """`step(i)`: learn from batch i, whose examples are spread over the mesh; the loss of all of them."""
    everywhere, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    rule = adamw(Optimiser())

    def put(x: Any, where: NamedSharding) -> Any:
        return jax.make_array_from_callback(x.shape, where, lambda index: np.asarray(x)[index])

    placed = lambda tree: jax.tree.map(lambda x: put(x, everywhere), tree)
    model = placed(build(task, dtype))
    state = placed(jax.jit(rule.init)(build(task, dtype)))
    loss_of = cross_entropy if way != "shard_map" else averaged(mesh)
    step = jax.jit(partial(update, rule, loss_of=loss_of))

    def spread_out(part: np.ndarray) -> Any:
        return put(part.astype(dtype) if part.dtype.kind == "f" else part, spread)

    def call(i: int) -> Any:
        nonlocal model, state
        model, state, loss = step(model, state, *map(spread_out, batch(task, i)))
        return jax.block_until_ready(loss)

    return call


def averaged(mesh: Mesh) -> Any:
    """The mean over devices of the loss of each one's examples, written out."""

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    def loss(model: Any, inputs: Any, targets: Any) -> Any:
        return jax.lax.pmean(cross_entropy(model, inputs, targets), "data")

    return loss


def main() -> None:
    """Train in float64 to compare, and in float32 to time."""
    way, preset, name, device, rank, ranks, port = sys.argv[1:]
    if way == "processes":
        jax.distributed.initialize(f"localhost:{port}", int(ranks), int(rank))
    devices = jax.devices("gpu" if device == "cuda" else device)
    mesh = Mesh(np.array(devices[:1] if way == "one" else devices), ("data",))

    def made(task: Task, dtype: str) -> Any:
        step = stepper(way, task, dtype, mesh)
        return lambda i: float(step(i))

    wide = lambda dtype: jax.enable_x64(dtype == "float64")
    told(followed(made, wide, preset, name), len(mesh.devices), int(rank))


if __name__ == "__main__":
    main()
