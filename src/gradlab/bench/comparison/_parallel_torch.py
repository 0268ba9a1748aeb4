"""Data parallelism in torch: a process a device, gradients averaged (DDP), or parameters shared out as well (FSDP).

python -m gradlab.bench.comparison._parallel_torch one|ddp|fsdp preset task device rank ranks port
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradlab.bench._torch import arrays
from gradlab.bench.comparison._models_torch import build, cross_entropy
from gradlab.bench.comparison._torch import adamw, update
from gradlab.bench.comparison.data import Optimiser, Task, batch
from gradlab.bench.comparison.parallel import followed, told


def stepper(way: str, task: Task, dtype: str, device: str, rank: int, ranks: int) -> Any:
    """`step(i)`: learn from this process's part of batch i; the loss of all of it."""
    model: Any = build(task, dtype, device)
    if way == "ddp":
        model = DistributedDataParallel(model)
    elif way == "fsdp":
        for block in getattr(model, "blocks", []):
            fully_shard(block)
        fully_shard(model)
    optimiser, max_norm = adamw(model, Optimiser()), Optimiser().max_norm

    def call(i: int) -> float:
        mine = slice(rank * task.batch // ranks, (rank + 1) * task.batch // ranks)
        examples = arrays([part[mine] for part in batch(task, i)], dtype, device)
        loss = update(cross_entropy, model, optimiser, max_norm, *examples)
        if ranks > 1:
            distributed.all_reduce(loss)
        return float(loss) / ranks

    return call


def main() -> None:
    """Train in float64 to compare, and in float32 to time."""
    way, preset, name, device, rank, ranks, port = sys.argv[1:]
    if device == "cuda":
        torch.cuda.set_device(int(rank))
    if int(ranks) > 1:
        distributed.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=f"tcp://localhost:{port}",
            rank=int(rank),
            world_size=int(ranks),
        )
    made = lambda task, dtype: stepper(way, task, dtype, device, int(rank), int(ranks))
    told(followed(made, lambda dtype: nullcontext(), preset, name), int(ranks), int(rank))
    if int(ranks) > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
