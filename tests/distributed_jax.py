"""One process with several devices, or of several: every operation against the whole batch, then a lost process.

Started by tests/test_distributed.py with DEVICES, and PROCESSES, RANK and PORT where there are several processes.
"""

import os
import sys
import time
from itertools import islice

DEVICES, PROCESSES = int(os.environ["DEVICES"]), int(os.environ.get("PROCESSES", 1))
RANK = int(os.environ.get("RANK", 0))
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import gradlab.jax as gl  # noqa: E402
from gradlab import distributed  # noqa: E402
from gradlab._errors import InputError, ProcessError  # noqa: E402

jax.config.update("jax_enable_x64", True)


def problem(dtype, examples):
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), dtype)
    params = {"w": normal(3), "b": normal(), "n": None}
    v = {"w": normal(3), "b": normal(), "n": None}
    data = np.asarray(normal(examples, 3)), np.asarray(normal(examples))
    own = tuple(np.split(x, PROCESSES)[RANK] for x in data)
    loss = lambda p, x, y: jnp.sin(p["w"] @ x + p["b"] - y) ** 2
    return loss, params, v, tuple(map(jnp.asarray, data)), tuple(map(jnp.asarray, own))


def mean(loss):
    return lambda p, X, y: jax.vmap(loss, (None, 0, 0))(p, X, y).mean()


def model(p, X, *_):
    return jnp.tanh(X @ p["w"] + p["b"])


def local(x):
    """The numbers of this process."""
    x = jnp.asarray(x)
    if x.is_fully_replicated or x.is_fully_addressable:
        return np.asarray(x)
    return np.concatenate(
        [np.asarray(s.data) for s in sorted(x.addressable_shards, key=lambda s: s.index[0].start)]
    )


def apart(found, truth):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True)
    return max(
        float(abs(local(a) - np.asarray(b)).max() / max(abs(np.asarray(b)).max(), 1e-30)) for a, b in pairs
    )


def whole(own):
    """Examples of all processes as one array, as jax.jit wants them."""
    if PROCESSES == 1:
        return own
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("examples",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("examples"))
    return tuple(jax.make_array_from_process_local_data(where, np.asarray(x)) for x in own)


def operations(loss, params, v, data, own):
    """Name, sharded, on one device."""
    f, batch = mean(loss), whole(own)

    def of(name, *args, **kw):
        call = lambda holder, batch: jax.jit(lambda batch: getattr(holder, name)(*args, *batch, **kw))(batch)
        return call(distributed, batch), call(gl, data)

    squared = lambda y, X, t: ((y - t) ** 4).mean()
    yield "hvp", *of("hvp", f, params, v)
    yield "hvp, uncompiled", distributed.hvp(f, params, v, *own), gl.hvp(f, params, v, *data)
    yield (
        "ggn_vp",
        jax.jit(lambda batch: distributed.ggn_vp(model, squared, params, v, *batch))(batch),
        jax.jit(lambda p: gl.ggn_vp(lambda p: model(p, data[0]), lambda y: squared(y, *data), p, v))(params),
    )
    yield "per_example_statistics", *of("per_example_statistics", loss, params)
    yield "gradient_noise_scale", *of("gradient_noise_scale", loss, params)
    (total, norms), (truth, _) = of("clipped_grad", loss, params, max_norm=0.3)
    yield "clipped_grad", total, truth
    yield "norms of clipped_grad", norms, jax.jit(lambda own: gl.per_example_norms(loss, params, *own))(own)


def again(loss, params, v, data, own):
    """Compiled, differentiated and mapped."""
    f, w = mean(loss), params["w"]
    at = lambda op, batch: lambda w: op(f, {**params, "w": w}, v, *batch)["w"]
    for name, nest, point in (
        ("grad", lambda h: jax.grad(lambda w: (h(w) ** 2).sum()), w),
        ("jacfwd of jacrev", lambda h: jax.jacfwd(jax.jacrev(h)), w),
        ("vmap", jax.vmap, jnp.stack([w, 2 * w])),
    ):
        yield (
            f"jit, {name}",
            *(jax.jit(nest(at(*g)))(point) for g in ((distributed.hvp, own), (gl.hvp, data))),
        )
    of_batch = lambda op: jax.jit(jax.grad(lambda X: (op(f, params, v, X, data[1])["w"] ** 2).sum()))(data[0])
    yield "the batch", of_batch(distributed.hvp), of_batch(gl.hvp)
    clipped = lambda op: jax.jit(
        jax.jacrev(lambda w: op(loss, {**params, "w": w}, *data, max_norm=0.3)[0]["w"])
    )(w)
    yield "clipped", clipped(distributed.clipped_grad), clipped(gl.clipped_grad)


def refusals(loss, params, v, own):
    """What is refused, with words of the message."""
    f = mean(loss)
    call = lambda *args, **kw: lambda: distributed.hvp(f, *args, **kw)
    if DEVICES > 1:
        yield (
            "divisible",
            call(params, v, *(x[:-1] for x in own)),
            f"for {jax.device_count()} devices; pass a multiple",
        )
    if PROCESSES > 1:
        other = {**params, "w": params["w"][:2]} if RANK else params
        yield "shapes", call(other, other, *own), "disagree"
        yield "numbers", call({**params, "w": params["w"] + RANK * 1e-7}, v, *own), "disagree"
        yield "sizes", call(params, v, *(x[: len(x) - RANK] for x in own)), "disagree"
    yield "sizes", call(params, v, own[0], own[1][:1]), "leading axes"
    yield "nothing", call(params, v, *(x[:0] for x in own)), "has 0 examples"
    yield "over", call(params, v, *own, over="examples"), "pass a jax.sharding.Mesh"
    yield "timeout", call(params, v, *own, timeout=0), "seconds above zero"


def main():
    start, failures = time.time(), []
    if PROCESSES > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{os.environ['PORT']}", PROCESSES, RANK)
    assert jax.device_count() == DEVICES * PROCESSES
    several = PROCESSES > 1
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-6)):
        given = problem(dtype, 2 * jax.device_count())
        cases = operations(*given) if dtype == "float64" else islice(operations(*given), 3 * (not several))
        cases = list(cases)
        cases += again(*given) if dtype == "float64" and not several else []
        for name, found, truth in cases:
            if not (off := apart(found, truth)) <= tolerance:
                failures.append(f"{name}, {dtype}: off by {off:.1e}")
    loss, params, v, _, own = problem("float64", 2 * jax.device_count())
    for name, call, words in refusals(loss, params, v, own):
        try:
            call()
            failures.append(f"{name}: not refused")
        except InputError as found:
            if words not in str(found):
                failures.append(f"{name}: {found}")
    if "--lose" in sys.argv:
        distributed.hvp(mean(loss), params, v, *own)
        if RANK == PROCESSES - 1:
            os._exit(0)
        began = time.time()
        try:
            distributed.hvp(mean(loss), params, v, *own, timeout=5.0)
            failures.append("the loss of a process: not seen")
        except ProcessError as found:
            print(found)
            if time.time() - began > 15:
                failures.append(f"the loss of a process: seen after {time.time() - began:.0f} s")
    print("\n".join(failures) or f"process {RANK}: all right after {time.time() - start:.1f} s", flush=True)
    os._exit(bool(failures))


if __name__ == "__main__":
    main()
