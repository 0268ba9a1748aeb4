"""One process of a group: every operation against the whole batch, then bad input, then the loss of a process.

Started by tests/test_distributed.py, with what torchrun sets in the environment. Process 0 prints what failed.
"""

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

import gradlab.torch as gl
from gradlab import distributed
from gradlab._errors import InputError, ProcessError, StrategyError

torch.set_num_threads(1)


def problem(dtype, sizes, rank):
    """A loss, its parameters, a direction and all examples; which of them are this process's."""
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
    params = {"w": normal(3), "b": normal(), "n": None}
    v = {"w": normal(3), "b": normal(), "n": None}
    X, y = normal(sum(sizes), 3), normal(sum(sizes))
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    loss = lambda p, x, y: torch.sin(p["w"] @ x + p["b"] - y) ** 2
    return loss, params, v, (X, y), (X[own], y[own])


def mean(loss):
    return lambda p, X, y: torch.func.vmap(loss, ({"w": None, "b": None, "n": None}, 0, 0))(p, X, y).mean()


def model(p, X, *_):
    return torch.tanh(X @ p["w"] + p["b"])


def leaves(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def apart(found, truth):
    """In units of the largest entry of the tree, since what cancels has the rounding of what it is made of."""
    pairs = list(zip(leaves(found), leaves(truth), strict=True))
    size = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / max(size, 1e-30)


def operations(loss, params, v, data, own):
    """Name, sharded, on one device."""
    f, options = mean(loss), {"max_norm": 0.3}
    of = lambda name, *args, **kw: (
        getattr(distributed, name)(*args, *own, **kw),
        getattr(gl, name)(*args, *data, **kw),
    )
    yield "hvp", *of("hvp", f, params, v)
    squared = lambda y, X, t: ((y - t) ** 4).mean()
    yield (
        "ggn_vp",
        distributed.ggn_vp(model, squared, params, v, *own),
        gl.ggn_vp(lambda p: model(p, data[0]), lambda y: squared(y, *data), params, v),
    )
    for found, truth in zip(*of("per_example_statistics", loss, params), strict=True):
        yield "per_example_statistics", found, truth
    yield "gradient_noise_scale", *of("gradient_noise_scale", loss, params)
    sharded, whole = of("clipped_grad", loss, params, **options)
    yield "clipped_grad", sharded[0], whole[0]
    norms = gl.per_example_norms(loss, params, *own)
    yield "norms of clipped_grad", sharded[1], norms
    yield "per_example_norms", distributed.per_example_norms(loss, params, *own), norms


def again(loss, params, v, data, own):
    """Derivatives of a sharded result: backward, and twice; torch.func; the batch; forward mode; a batch of points."""
    f, w = mean(loss), params["w"]
    at = lambda op, batch: lambda w: op(f, {**params, "w": w}, v, *batch)["w"]
    sharded, whole = at(distributed.hvp, own), at(gl.hvp, data)
    for name in ("grad", "jacrev", "jacfwd", "vmap", "backward"):
        yield name, *(derivative(name, g, w) for g in (sharded, whole))
    x = own[0].clone().requires_grad_()
    (distributed.hvp(f, params, v, x, own[1])["w"] ** 2).sum().backward()
    X = data[0].clone().requires_grad_()
    (gl.hvp(f, params, v, X, data[1])["w"] ** 2).sum().backward()
    start = next(i for i in range(len(X)) if torch.equal(X[i], x[0]))
    yield "the batch", x.grad, X.grad[start : start + len(x)]


def derivative(name, f, w):
    if name == "vmap":
        return torch.func.vmap(f)(torch.stack([w, 2 * w]))
    if name == "jacrev":
        return torch.func.jacrev(f)(w)
    if name == "jacfwd":
        return torch.func.jacfwd(f)(w)
    if name == "grad":
        return torch.func.grad(lambda w: (f(w) ** 2).sum())(w)
    w = w.clone().requires_grad_()
    (g,) = torch.autograd.grad((f(w) ** 2).sum(), w, create_graph=True)
    return torch.autograd.grad((g**2).sum(), w)[0]


def refusals(rank, own, params, v, loss):
    """What is refused, with words of the message."""
    f = mean(loss)
    call = lambda *args, **kw: lambda: distributed.hvp(f, *args, **kw)
    other = {**params, "w": params["w"][:2]} if rank else params
    yield "shapes", call(other, other, *own), InputError, "disagree"
    moved = {**params, "w": params["w"] + rank * 1e-7}
    yield "numbers", call(moved, v, *own), InputError, "other numbers"
    yield "empty", call(params, v, *(x[: len(x) * (rank != 1)] for x in own)), InputError, "process 1 of"
    yield "sizes", call(params, v, own[0], own[1][:1]), InputError, "leading axes"
    yield "over", call(params, v, *own, over=3), InputError, "pass a process group"
    yield "timeout", call(params, v, *own, timeout=float("nan")), InputError, "seconds above zero"


def main():
    start = time.time()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    failures = []
    loss, params, v, _, own = problem(torch.float64, [2] * size, rank)
    try:
        distributed.hvp(mean(loss), params, v, *own)
        failures.append("without a group: not refused")
    except StrategyError:
        pass
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        for sizes in ([3] * size, [1 + 4 * r for r in range(size)]):
            given = problem(dtype, sizes, rank)
            cases = list(operations(*given))
            cases += again(*given) if dtype == torch.float64 else []
            for name, found, truth in cases:
                if not (off := apart(found, truth)) <= tolerance:
                    failures.append(f"{name}, {dtype}, shards of {sizes}: off by {off:.1e}")
    for name, call, error, words in refusals(rank, own, params, v, loss):
        try:
            call()
            failures.append(f"{name}: not refused")
        except error as found:
            if words not in str(found):
                failures.append(f"{name}: {found}")
    dist.barrier()
    if "--lose" in sys.argv:
        if rank == size - 1:
            time.sleep(20 * ("--late" in sys.argv))
            os._exit(0)
        began = time.time()
        try:
            distributed.hvp(mean(loss), params, v, *own, timeout=5.0)
            failures.append("the loss of a process: not seen")
        except ProcessError as found:
            print(found)
            if time.time() - began > 15:
                failures.append(f"the loss of a process: seen after {time.time() - began:.0f} s")
    print("\n".join(failures) or f"process {rank}: all right after {time.time() - start:.1f} s")
    os._exit(bool(failures))


if __name__ == "__main__":
    main()
