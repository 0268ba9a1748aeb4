"""Derivatives compared: which are right, what they cost, by gradlab and as each framework's user writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gradlab.bench.comparison.cases import Case
from gradlab.bench.comparison.crew import Crew, Hand, Refused, median, quotient, rounds

ENTRIES = 100_000  # of the vector with a rule of its own
INNER_STEPS, INNER_RATE = 5, 0.01
RK4_STEPS = 40
TOLERANCES = {"float32": (1e-4, 1e-6), "float64": (1e-8, 1e-10)}  # of odeint
REACH = 0.005  # of differences: 9 points, t = -4 reach ... 4 reach
SINGLE = 2e-3  # relative to the largest entry: rounding in float32 is below, a wrong derivative far above

COMPILED = ("gradient", "hvp", "per_example")  # by torch.compile in the short run too
JAX = (("gradlab", "compiled"), ("plain", "compiled"))
TORCH = (("gradlab", "eager"), ("plain", "eager"), ("plain", "compiled"))


@dataclass(frozen=True)
class Operation:
    """A derivative and the ways to it.

    Attributes:
        title: In tables.
        what: In the workers.
        task: On which model.
        accuracy: In float64, relative to the largest entry, against the other framework or against differences.
        ways: Of each framework, with its mode; "plain" is how the framework's own functions are put together.
        differenced: Whether the truth is that of differences of the function itself.
    """

    title: str
    what: str
    task: str
    accuracy: float = 1e-10
    ways: Mapping[str, tuple[tuple[str, str], ...]] = field(
        default_factory=lambda: {"jax": JAX, "torch": TORCH}
    )
    differenced: bool = False


GRADIENT = {
    "jax": (("plain", "compiled"),),
    "torch": (("autograd", "eager"), ("plain", "eager"), ("plain", "compiled")),
    "flax": (("plain", "compiled"),),
    "tensorflow": (("plain", "graph"), ("plain", "compiled")),
}
HVP = {
    "jax": (*JAX, ("reverse", "compiled")),
    "torch": (*TORCH, ("reverse", "eager"), ("autograd", "eager"), ("gradlab", "compiled")),
    "flax": (("plain", "compiled"),),
    "tensorflow": (("plain", "graph"), ("plain", "compiled")),
}
PER_EXAMPLE = {
    "jax": (*JAX, ("loop", "eager")),
    "torch": (*TORCH, ("loop", "eager")),
    "flax": (("plain", "compiled"),),
    "tensorflow": (("plain", "graph"), ("plain", "compiled")),
}
EAGER = {"jax": JAX, "torch": TORCH[:2]}
OPERATIONS = (
    Operation("gradient", "gradient", "mlp", ways=GRADIENT),
    Operation("Hessian-vector product", "hvp", "mlp", ways=HVP),
    Operation("Hessian", "hessian", "small"),
    Operation("Jacobian", "jacobian", "small"),
    Operation("per-example gradients", "per_example", "mlp", ways=PER_EXAMPLE),
    Operation("meta-gradient", "meta", "mlp"),
    Operation("custom rule", "rule", "mlp"),
    Operation("gradient of an ODE", "ode", "mlp", 1e-6, ways=EAGER),
    Operation("third order", "third", "small", 1e-6, ways=EAGER, differenced=True),
    Operation("third order, LayerNorm", "normed", "small", 1e-6, ways=EAGER, differenced=True),
)
Row = dict[str, Any]


def operations(crew: Crew, dtype: str, count: int, all_compiled: bool, say: Any) -> list[Row]:
    """Errors first; then what is right in turn, and its memory."""
    rows = []
    for hand in crew.hands.values():
        hand.ask("forget")
    for operation in OPERATIONS:
        if not all_compiled and operation.what not in COMPILED:
            operation = replace(operation, ways={**operation.ways, "torch": operation.ways["torch"][:2]})
        rows += measured(crew, operation, dtype, count, say)
    return rows


def measured(crew: Crew, operation: Operation, dtype: str, count: int, say: Any) -> list[Row]:
    """The rows of one operation."""
    rows: list[Row] = []
    calls: dict[str, tuple[Hand, Case]] = {}
    truths = {name: truth(crew, operation, name) for name in crew.hands if name in operation.ways}
    for framework, ways in operation.ways.items():
        for way, mode in ways if framework in crew.hands else ():
            say(f"{operation.title}: {framework}, {way}, {mode}")
            hand, case = crew.hands[framework], Case(operation.what, operation.task, mode, way)
            row: Row = {"operation": operation.title, "framework": framework, "way": way, "mode": mode}
            row |= verdict(crew, hand, case, operation, truths[framework], dtype)
            rows.append(row)
            if row["right"]:
                name = f"{framework}, {way}, {mode}"
                calls[name] = hand, case._replace(dtype=dtype)
                row["first_s"] = hand.ask("prepare", case=calls[name][1])["first_s"]
    say(f"{operation.title}: in turn")
    samples = rounds(calls, count)
    base = next(iter(samples), None)
    for row in rows:
        name = f"{row['framework']}, {row['way']}, {row['mode']}"
        if name in samples:
            hand, case = calls[name]
            row |= {
                "samples": samples[name],
                "seconds": median(samples[name]),
                "bytes": hand.ask("bytes", case=case),
            }
            row["ratio"] = quotient(samples[name], samples[base or name])
    for hand in crew.hands.values():
        hand.ask("forget")
    return rows


def verdict(
    crew: Crew, hand: Hand, case: Case, operation: Operation, truth: np.ndarray | None, dtype: str
) -> Row:
    """Whether an answer is right: in float64 to the operation's accuracy, and in the dtype that is timed.

    What is compiled for seconds is compiled once, in that dtype.
    """
    kinds = (
        [dtype]
        if (hand.framework, case.mode) == ("torch", "compiled")
        else [*dict.fromkeys(("float64", dtype))]
    )
    found: Row = {"error": {}, "right": True}
    for kind in kinds:
        try:
            answer = result(crew, hand, case._replace(dtype=kind))
        except Refused as refusal:
            return {**found, "right": False, "raises": str(refusal)}
        found["error"][kind] = None if truth is None else distance(answer, truth)
        limit = operation.accuracy if kind == "float64" else SINGLE
        found["right"] = found["right"] and (truth is None or distance(answer, truth) <= limit)
    return found


def truth(crew: Crew, operation: Operation, framework: str) -> np.ndarray | None:
    """What an answer is held against: differences, or the plain way of another framework; None where there is none."""
    if operation.differenced:
        hand = crew.hands[framework]
        mode = "compiled" if framework == "jax" else "eager"
        case = Case(operation.what, operation.task, mode, "values", dtype="float64")
        return differences(result(crew, hand, case))
    for other in ("jax", "torch"):
        if other != framework and other in crew.hands:
            mode = "compiled" if other == "jax" else "eager"
            case = Case(operation.what, operation.task, mode, "plain", dtype="float64")
            return result(crew, crew.hands[other], case)
    return None


def result(crew: Crew, hand: Hand, case: Case) -> np.ndarray:
    """The numbers that a call gives."""
    path = crew.scratch("result.npy")
    hand.ask("result", case=case, path=path)
    found: np.ndarray = np.load(path).astype(np.float64)
    return found


def distance(answer: np.ndarray, truth: np.ndarray) -> float:
    """The largest error, relative to the largest entry."""
    if answer.shape != truth.shape:
        return float("inf")
    far = np.abs(answer - truth).max() / np.abs(truth).max()
    return float(far) if np.isfinite(far) else float("inf")


def points() -> list[float]:
    """Where a function of t is evaluated to be differenced."""
    return [REACH * i for i in range(-4, 5)]


def differences(values: np.ndarray) -> np.ndarray:
    """The third derivative at 0 of values at `points()`, by the formula of order six."""
    weights = np.array([-7, 72, -338, 488, 0, -488, 338, -72, 7]) / 240
    return np.array([weights @ values / REACH**3])
