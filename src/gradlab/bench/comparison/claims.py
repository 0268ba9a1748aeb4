"""What people say of the frameworks, each held against what was measured on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gradlab.bench.clock import interval

CONFIRMED, REFUTED, UNRESOLVED, UNMEASURABLE = "confirmed", "refuted", "not resolved", "not measurable here"
PAID_STEPS = 1000  # a short training run
Record = dict[str, Any]


class Number(NamedTuple):
    """A measured number; `over` says what its bounds are."""

    value: float
    low: float
    high: float
    over: str = "99 % over rounds"


class Unmeasurable(LookupError):
    """This machine, or this run, cannot tell."""


@dataclass(frozen=True)
class Claim:
    """A claim holds where its number is beyond the threshold.

    Attributes:
        claim: As people make it.
        measured: What was measured.
        number: Of a record; raises `Unmeasurable` with the reason.
        threshold: Which the number has to pass.
        above: Whether it has to be above it, or below.
    """

    claim: str
    measured: str
    number: Callable[[Record], Number]
    threshold: float
    above: bool = True

    def judge(self, record: Record) -> dict[str, Any]:
        """The claim with its number and its verdict."""
        said = {"claim": self.claim, "measured": self.measured}
        said["holds"] = f"{'above' if self.above else 'below'} {self.threshold:g}"
        try:
            number = self.number(record)
        except Unmeasurable as reason:
            nothing = {"value": None, "low": None, "high": None}
            return {**said, **nothing, "verdict": UNMEASURABLE, "reason": str(reason)}
        return {**said, **number._asdict(), "verdict": verdict(number, self.threshold, self.above)}


def verdict(number: Number, threshold: float, above: bool = True) -> str:
    """Confirmed or refuted where the whole interval is on one side of the threshold, else not resolved."""
    if not number.low <= number.high:  # nan
        return UNRESOLVED
    if number.low > threshold:
        return CONFIRMED if above else REFUTED
    if number.high < threshold:
        return REFUTED if above else CONFIRMED
    return UNRESOLVED


def judged(record: Record) -> list[dict[str, Any]]:
    """Every claim."""
    return [claim.judge(record) for claim in CLAIMS]


def _row(record: Record, table: str, **keys: Any) -> Record:
    """The one row of a table with these entries."""
    for row in record.get(table, []):
        if all(row.get(key) == value for key, value in keys.items()):
            found: Record = row
            return found
    missing = record.get("missing", {}).get(keys.get("column"))
    raise Unmeasurable(missing or f"{', '.join(map(str, keys.values()))}: not in this run")


def _tasks(record: Record) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in record.get("steps", [])))


def _rounds(quotients: list[list[float]]) -> Number:
    """The geometric mean of quotients in every round, and the bounds of its median."""
    if not quotients:
        raise Unmeasurable("nothing of this was right, or run")
    shortest = min(map(len, quotients))
    means = np.exp(np.mean([np.log(q[:shortest]) for q in quotients], axis=0))
    return Number(float(np.median(means)), *interval(means.tolist()))


def _over(ours: Record, theirs: Record) -> list[float]:
    return [a / b for a, b in zip(ours["samples"], theirs["samples"], strict=True)]


def ratio(table: str, over: str, under: str, **keys: Any) -> Callable[[Record], Number]:
    """Time of one column over that of another, in the mean over the models (or of one, where it is named)."""

    def of(record: Record) -> Number:
        tasks = [keys["task"]] if "task" in keys else _tasks(record)
        rest = {key: value for key, value in keys.items() if key != "task"}
        pairs = [
            [_row(record, table, task=task, column=name, **rest) for name in (over, under)] for task in tasks
        ]
        return _rounds([_over(*pair) for pair in pairs])

    return of


def best_ratio(table: str, over: str, under: str) -> Callable[[Record], Number]:
    """The same of the model where it is largest."""

    def of(record: Record) -> Number:
        return max(ratio(table, over, under, task=task)(record) for task in _tasks(record))

    return of


def spread(value: Callable[[Record, str], float]) -> Callable[[Record], Number]:
    """A number of every model, with the range of them."""

    def of(record: Record) -> Number:
        values = [value(record, task) for task in _tasks(record)]
        if not values:
            raise Unmeasurable("nothing was trained")
        return Number(float(np.median(values)), min(values), max(values), "the range over the models")

    return of


def compiling(column: str) -> Callable[[Record, str], float]:
    """Seconds that the first step of a model takes beyond the others."""
    return lambda record, task: float(_row(record, "training", task=task, column=column)["compile_s"])


def paid(record: Record, task: str) -> float:
    """Seconds of a short run of eager torch over those of torch.compile, compiling included."""
    eager, compiled = (
        _row(record, "steps", task=task, column=name)["seconds"]["median"]
        for name in ("torch eager", "torch compile")
    )
    return float(PAID_STEPS * eager / (compiling("torch compile")(record, task) + PAID_STEPS * compiled))


def memory(over: str, under: str) -> Callable[[Record, str], float]:
    """Bytes of loss and gradient of one column over those of another."""

    def of(record: Record, task: str) -> float:
        sizes = [_row(record, "steps", task=task, column=name)["bytes"] for name in (over, under)]
        if None in sizes:
            raise Unmeasurable("no framework says how much memory it takes on this device")
        return float(sizes[0] / sizes[1])

    return of


def way(record: Record, operation: str, framework: str, name: str, mode: str) -> Record:
    """A derivative that is right."""
    row = _row(record, "operations", operation=operation, framework=framework, way=name, mode=mode)
    if "samples" not in row:
        raise Unmeasurable(
            f"{operation}: {name} in {framework} is {'refused' if 'raises' in row else 'wrong'}"
        )
    return row


def ways(
    operation: str, over: tuple[str, str, str], under: tuple[str, str, str]
) -> Callable[[Record], Number]:
    """Time of one way to a derivative (framework, way, mode) over that of another."""
    return lambda record: _rounds([_over(way(record, operation, *over), way(record, operation, *under))])


HIGHER = (
    "Hessian-vector product",
    "Hessian",
    "Jacobian",
    "per-example gradients",
    "meta-gradient",
    "third order",
)


def fastest(record: Record, operation: str, framework: str) -> Record:
    """The fastest right way of a framework to a derivative."""
    rows = [
        row
        for row in record.get("operations", [])
        if (row["operation"], row["framework"]) == (operation, framework) and "samples" in row
    ]
    if not rows:
        raise Unmeasurable(f"{operation}: nothing right in {framework}, or not in this run")
    return min(rows, key=lambda row: float(row["seconds"]["median"]))


def higher_order(record: Record) -> Number:
    """torch's fastest over jax's, in the mean over the derivatives beyond a gradient."""
    return _rounds([_over(*(fastest(record, name, side) for side in ("torch", "jax"))) for name in HIGHER])


def layer_on_top(framework: str, mode: str) -> Callable[[Record], Number]:
    """gradlab's way over the framework's own, in the mean over the same derivatives, both right."""

    def of(record: Record) -> Number:
        found = [[way(record, name, framework, w, mode) for w in ("gradlab", "plain")] for name in HIGHER]
        return _rounds([_over(*pair) for pair in found])

    return of


def wrong_third(record: Record) -> Number:
    """The error of torch's own third derivative through LayerNorm, over what float64 leaves of doubt."""
    row = _row(
        record, "operations", operation="third order, LayerNorm", framework="torch", way="plain", mode="eager"
    )
    if row["error"].get("float64") is None:
        raise Unmeasurable("torch refuses it")
    error = float(row["error"]["float64"])
    return Number(error, error, error, "one number, no noise")


def apart(dtype: str) -> Callable[[Record], Number]:
    """The largest relative difference of losses between frameworks."""

    def of(record: Record) -> Number:
        far = [row["largest"] for row in record.get("agreement", []) if row["dtype"] == dtype]
        if not far:
            raise Unmeasurable(f"one framework alone, or no {dtype} in this run")
        return Number(max(far), min(far), max(far), "the range over models and pairs")

    return of


def accuracy(record: Record, task: str) -> float:
    """How far the columns' accuracies on held-out data are apart, in per cent."""
    rows = [row for row in record.get("training", []) if row["task"] == task and row["column"] != "jax eager"]
    if len(rows) < 2:
        raise Unmeasurable("one framework alone")
    values = [row["accuracy"] for row in rows]
    return 100 * float(max(values) - min(values))


def devices(framework: str, way: str) -> Callable[[Record], Number]:
    """How many times as fast a step is on all devices as on one, over the number of devices."""

    def of(record: Record) -> Number:
        many = _row(record, "parallel", framework=framework, way=way)
        if "raises" in many:
            raise Unmeasurable(many["raises"])
        if not many["real"] or many["devices"] < 2:
            raise Unmeasurable(
                "one CPU, whose cores the devices share" if not many["real"] else "one accelerator"
            )
        one = _row(record, "parallel", framework=framework, way="one")["seconds"]["median"]
        return _rounds([[one / seconds / many["devices"] for seconds in many["samples"]]])

    return of


def same_in_parallel(record: Record) -> Number:
    """The largest relative difference of the losses from those on one device."""
    far = [r["largest"] for r in record.get("parallel", []) if r["way"] != "one" and "largest" in r]
    if not far:
        raise Unmeasurable("no run over several devices")
    return Number(max(far), min(far), max(far), "the range over engines")


def sharded_over_replicated(record: Record) -> Number:
    """Median step of FSDP over that of DDP; each run by itself, so their own bounds are divided."""
    fsdp, ddp = (_row(record, "parallel", framework="torch", way=name) for name in ("fsdp", "ddp"))
    if "raises" in fsdp or "raises" in ddp:
        raise Unmeasurable("one of them did not run")
    (a, b), (c, d) = fsdp["seconds"]["interval"], ddp["seconds"]["interval"]
    return Number(fsdp["seconds"]["median"] / ddp["seconds"]["median"], a / d, b / c, "99 % of both")


def shrinking(record: Record) -> Number:
    """torch eager over jax at the smallest batch, over the same at the largest."""
    sizes = [row["batch"] for row in record.get("batches", [])]
    if len(set(sizes)) < 2:
        raise Unmeasurable("one batch size in this run")
    small, large = (
        _over(*(_row(record, "batches", column=name, batch=size) for name in ("torch eager", "jax jit")))
        for size in (min(sizes), max(sizes))
    )
    return _rounds([[a / b for a, b in zip(small, large, strict=True)]])


def utilised(record: Record) -> Number:
    """Per cent of the time that the device computes, jax less torch."""
    found = {}
    for name in ("jax jit", "torch eager"):
        values = [r["utilisation"] for r in record.get("training", []) if r["column"] == name]
        if not values or None in values:
            raise Unmeasurable("the device does not say how busy it is")
        found[name] = values
    gaps = [a - b for a, b in zip(found["jax jit"], found["torch eager"], strict=True)]
    return Number(float(np.median(gaps)), min(gaps), max(gaps), "the range over the models")


def never(reason: str) -> Callable[[Record], Number]:
    """What this experiment cannot measure."""

    def of(record: Record) -> Number:
        raise Unmeasurable(reason)

    return of


FORWARD, REVERSE = ("jax", "plain", "compiled"), ("jax", "reverse", "compiled")
CLAIMS = (
    Claim(
        "JAX trains faster than PyTorch",
        "a training step: torch eager ÷ jax jit, mean over the models",
        ratio("steps", "torch eager", "jax jit"),
        1,
    ),
    Claim(
        "JAX trains faster than compiled PyTorch",
        "a training step: torch.compile ÷ jax jit, mean over the models",
        ratio("steps", "torch compile", "jax jit"),
        1,
    ),
    Claim(
        "JAX saves 15–30 % of the time",
        "a training step: jax jit ÷ torch eager, mean over the models",
        ratio("steps", "jax jit", "torch eager"),
        0.85,
        above=False,
    ),
    Claim(
        "JAX saves 15–30 % of the memory",
        "loss and gradient: bytes of jax jit ÷ torch eager",
        spread(memory("jax jit", "torch eager")),
        0.85,
        above=False,
    ),
    Claim(
        "XLA fuses more than torch.compile, so it needs less memory",
        "loss and gradient: bytes of jax jit ÷ torch.compile",
        spread(memory("jax jit", "torch compile")),
        1,
        above=False,
    ),
    Claim(
        "torch.compile makes training up to twice as fast",
        "a training step: torch eager ÷ torch.compile, of the model that gains most",
        best_ratio("steps", "torch eager", "torch compile"),
        2,
    ),
    Claim(
        "torch.compile pays for itself within a short run",
        f"{PAID_STEPS} steps: torch eager ÷ torch.compile with compiling",
        spread(paid),
        1,
    ),
    Claim(
        "jit costs seconds before the first step",
        "seconds of the first step beyond the others, jax jit",
        spread(compiling("jax jit")),
        1,
    ),
    Claim(
        "torch.compile takes longer to compile than jax.jit",
        "seconds of compiling a training step: torch.compile ÷ jax jit",
        spread(lambda r, t: compiling("torch compile")(r, t) / compiling("jax jit")(r, t)),
        1,
    ),
    Claim(
        "JAX without jit is slower by an order of magnitude",
        "a training step of the MLP: jax eager ÷ jax jit",
        ratio("steps", "jax eager", "jax jit", task="mlp"),
        10,
    ),
    Claim(
        "TensorFlow is 10–20 % slower than compiled PyTorch",
        "a training step: TensorFlow with XLA ÷ torch.compile, mean over the models",
        ratio("steps", "tensorflow XLA", "torch compile"),
        1.1,
    ),
    Claim(
        "flax is slower than equinox",
        "a training step: flax ÷ equinox, both jitted, mean over the models",
        ratio("steps", "flax jit", "jax jit"),
        1,
    ),
    Claim(
        "Eager PyTorch answers faster than JAX where models are small",
        "inference of one example: jax jit ÷ torch eager, mean over the models",
        ratio("latency", "jax jit", "torch eager"),
        1,
    ),
    Claim(
        "torch.compile lowers the latency of inference",
        "inference of one example: torch eager ÷ torch.compile, mean over the models",
        ratio("latency", "torch eager", "torch compile"),
        1,
    ),
    Claim(
        "JAX's lead shrinks as batches grow",
        "torch eager ÷ jax jit on the MLP at the smallest batch ÷ at the largest",
        shrinking,
        1,
    ),
    Claim(
        "JAX is best for custom autodiff and higher-order gradients",
        "six derivatives beyond a gradient: fastest right way of torch ÷ of jax, in the mean",
        higher_order,
        1,
    ),
    Claim(
        "A Hessian-vector product is cheaper forward over reverse (JAX)",
        "reverse over reverse ÷ forward over reverse, jitted",
        ways("Hessian-vector product", REVERSE, FORWARD),
        1,
    ),
    Claim(
        "A Hessian-vector product is cheaper forward over reverse (PyTorch)",
        "reverse over reverse ÷ forward over reverse, torch.func, eager",
        ways("Hessian-vector product", ("torch", "reverse", "eager"), ("torch", "plain", "eager")),
        1,
    ),
    Claim(
        "torch.func is slower than torch.autograd",
        "a gradient: torch.func.grad ÷ torch.autograd.grad, eager",
        ways("gradient", ("torch", "plain", "eager"), ("torch", "autograd", "eager")),
        1,
    ),
    Claim(
        "vmap makes per-example gradients ten times faster (PyTorch)",
        "32 examples: a loop ÷ vmap(grad), eager",
        ways("per-example gradients", ("torch", "loop", "eager"), ("torch", "plain", "eager")),
        10,
    ),
    Claim(
        "vmap makes per-example gradients ten times faster (JAX)",
        "32 examples: a loop over a jitted gradient ÷ jitted vmap(grad)",
        ways("per-example gradients", ("jax", "loop", "eager"), FORWARD),
        10,
    ),
    Claim(
        "A layer on top of the framework costs speed (PyTorch)",
        "the same derivatives: gradlab ÷ torch.func, eager, in the mean",
        layer_on_top("torch", "eager"),
        1,
    ),
    Claim(
        "A layer on top of the framework costs speed (JAX)",
        "the same derivatives: gradlab ÷ jax, jitted, in the mean",
        layer_on_top("jax", "compiled"),
        1,
    ),
    Claim(
        "PyTorch's higher derivatives can be silently wrong",
        "relative error of torch.func's third derivative through layer_norm, float64",
        wrong_third,
        1e-5,
    ),
    Claim(
        "Frameworks give different results in float32",
        "largest relative difference of the losses of 50 steps",
        apart("float32"),
        1e-3,
    ),
    Claim("Even in float64 frameworks train differently", "the same in float64", apart("float64"), 1e-8),
    Claim(
        "The framework decides how accurate a model becomes",
        "held-out accuracy: largest less smallest over the frameworks, per cent",
        spread(accuracy),
        1,
    ),
    Claim(
        "Data-parallel training computes something else than one device",
        "largest relative difference of losses in float64 (sharded arrays, shard_map, jax.distributed, DDP, FSDP)",
        same_in_parallel,
        1e-10,
    ),
    Claim(
        "FSDP is slower than DDP where the model fits",
        "a training step on two devices: FSDP ÷ DDP",
        sharded_over_replicated,
        1,
    ),
    Claim(
        "JAX scales linearly over devices",
        "speed on all devices ÷ on one ÷ their number, sharded arrays",
        devices("jax", "sharded"),
        0.9,
    ),
    Claim("PyTorch DDP scales linearly over devices", "the same, DDP", devices("torch", "ddp"), 0.9),
    Claim(
        "JAX keeps the accelerator busier",
        "utilisation while training: jax jit less torch eager, per cent",
        utilised,
        0,
    ),
    Claim("TPUs make JAX the fastest choice", "a training step on a TPU", never("no TPU"), 1),
)
