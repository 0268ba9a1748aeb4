"""How many wrong backward rules does each checker find? Mutants of torch's operators at torch's own test inputs.

    python experiments/mutants.py --preset smoke|paper|clock --out results

Each mutant is an autograd.Function that runs the operator and changes the gradient it gives by a little; one
that gives the operator's own gradient, up to its rounding, is not counted. Expected: `check.derivatives` finds
at least 99.5 %, gradcheck 57 %, its fast mode 47 %; with `clock`, a check of a right operator in
at most 60 ms at first order (median, after warm-up); one line in results/mutants.jsonl.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track
from rich.table import Table
from torch.autograd import gradcheck
from torch.utils import _pytree as pytree

from gradlab import check
from gradlab.bench.audit import Expired, Operator, limited
from gradlab.bench.audit_torch import EXPLAINED, cases
from gradlab.bench.console import console as terminal
from gradlab.bench.record import append, environment
from gradlab.check.report import FAILED

PRESETS = {"smoke": (12, 5), "paper": (190, 4), "clock": (190, 0)}  # operators, mutants of each
KINDS = ("scale", "sign", "term", "bfloat16", "noise")
CHECKERS = ("gradlab", "gradcheck", "gradcheck, fast")
LIMIT = 120.0  # seconds for a check
LARGEST = 30  # entries of x, since gradcheck runs over all of them
Leaves = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Mutation:
    """A change of the gradient: a leaf, one of its entries, and a random number for each."""

    kind: str
    leaf: int
    entry: int
    seed: int

    def __call__(self, f: Callable[[Leaves], Leaves], x: Leaves, u: Leaves) -> Leaves:
        """The changed pullback of f at x."""
        if self.kind == "term":  # one summand of the sum over f's outputs
            return pulled(f, x, self._at(u, 0.0))
        return self._changed(pulled(f, x, u))

    def _changed(self, gradients: Leaves) -> Leaves:
        if self.kind == "leaf":
            return tuple(0 * g if i == self.leaf else g for i, g in enumerate(gradients))
        if self.kind == "bfloat16":
            return tuple(g.to(torch.bfloat16).to(g.dtype) for g in gradients)
        if self.kind == "noise":
            noise = torch.Generator().manual_seed(self.seed)
            return tuple(g * (1 + 1e-3 * torch.randn(g.shape, generator=noise)) for g in gradients)
        return self._at(gradients, {"scale": 1 + 1e-4, "sign": -1.0}[self.kind])

    def _at(self, leaves: Leaves, factor: float) -> Leaves:
        """The leaves with one entry multiplied."""
        factors = torch.ones_like(leaves[self.leaf]).reshape(-1)
        factors[self.entry] = factor
        return tuple(g * factors.view_as(g) if i == self.leaf else g for i, g in enumerate(leaves))


def pulled(f: Callable[[Leaves], Leaves], x: Leaves, u: Leaves) -> Leaves:
    """The gradients of u·f, which can be differentiated again."""
    with torch.enable_grad():
        x = tuple(leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in x)
        return torch.autograd.grad(f(x), x, u, create_graph=True, materialize_grads=True)


def mutant(f: Callable[[Leaves], Leaves], rule: Callable[..., Leaves]) -> Callable[[Leaves], Leaves]:
    """f with the rule for its backward."""

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *x: torch.Tensor) -> Leaves:
            ctx.save_for_backward(*x)
            return tuple(y.clone() for y in f(x))

        @staticmethod
        def backward(ctx: Any, *u: torch.Tensor) -> Leaves:
            return rule(f, ctx.saved_tensors, u)

    return lambda x: Rule.apply(*x)


def mutations(operator: Operator, count: int, rng: np.random.Generator) -> Iterator[Mutation]:
    """Mutations of all kinds in turn, at random places, that change the gradient by more than its rounding.

    There are none where an output is in another precision, which gradcheck does not judge, or all are empty.
    """
    f, x = operator.f, operator.x
    random = lambda leaf: torch.tensor(rng.normal(size=leaf.shape), dtype=leaf.dtype)
    y = f(x)
    if any(leaf.dtype not in (torch.float64, torch.complex128) for leaf in y) or not any(
        leaf.numel() for leaf in y
    ):
        return  # gradcheck wants nothing less
    u = tuple(map(random, y))
    exact = pulled(f, x, u)
    moved = [pulled(f, tuple(t * (1 + 2.0**-51 * random(t).sign()) for t in x), u) for _ in range(8)]
    rounding = [torch.stack([(m[i] - g).abs() for m in moved]).amax(0) for i, g in enumerate(exact)]
    start = int(rng.integers(len(KINDS)))
    for attempt in range(8 * count):
        kind = KINDS[(start + attempt) % len(KINDS)]
        kind = kind if kind != "term" or len(x) == 1 else "leaf"
        leaves = y if kind == "term" else x
        leaf = int(rng.choice([i for i, z in enumerate(leaves) if z.numel()]))
        entry = int(rng.integers(leaves[leaf].numel()))
        mutation = Mutation(kind, leaf, entry, int(rng.integers(2**31)))
        changed = zip(mutation(f, x, u), exact, rounding, strict=True)
        if any(((m - g).abs() > 10 * r + 1e-15 * g.abs()).any() for m, g, r in changed):
            yield mutation
            count -= 1
        if not count:
            return


def verdicts(operator: Operator, rule: Callable[..., Leaves]) -> dict[str, str]:
    """What each checker says: "found" (wrong), "unsure", "passed", or the name of what it raised."""
    f = mutant(operator.f, rule)
    inputs = tuple(x.clone().requires_grad_() for x in operator.x)
    return {
        "gradlab": said(lambda: ours(f, operator.x)),
        "gradcheck": said(lambda: theirs(f, inputs)),
        "gradcheck, fast": said(lambda: theirs(f, inputs, fast_mode=True)),
    }


def ours(f: Callable[[Leaves], Leaves], x: Leaves) -> str:
    """gradlab's verdict, at first order, as gradcheck's is."""
    report = check.derivatives(f, x, order=1)
    failed = any(row.status == FAILED for row in report.rows)
    return "found" if failed else "passed" if report.passed else "unsure"


def theirs(f: Callable[[Leaves], Leaves], inputs: Leaves, **options: Any) -> str:
    """gradcheck's."""
    return "passed" if gradcheck(lambda *x: f(x), inputs, raise_exception=False, **options) else "found"


def said(verdict: Callable[[], str]) -> str:
    """A verdict, or what stands for one."""
    try:
        with limited(LIMIT):
            return verdict()
    except Expired:
        return "too slow"
    except Exception as error:
        return type(error).__name__


def seconds(call: Callable[[], Any]) -> float:
    """Processor time of the second of two runs, which other jobs on the machine do not lengthen."""
    call()
    began = time.process_time()
    call()
    return time.process_time() - began


def run(
    operators: list[Operator], count: int, rng: np.random.Generator, until: float
) -> list[dict[str, Any]]:
    """A row an operator: verdicts on itself and on its mutants, or, without mutants, the time of a check of it."""
    rows: list[dict[str, Any]] = []
    for operator in track(operators, description="mutants"):
        row = {"name": operator.name, "variant": operator.variant}
        if time.monotonic() > until:
            break
        try:
            chosen = list(mutations(operator, count, rng))
        except RuntimeError as error:  # an operator whose gradient cannot be differentiated again
            rows.append({**row, "skipped": str(error).splitlines()[0][:100]})
            continue
        if not chosen and count:
            rows.append({**row, "skipped": "no mutant that differs"})
        elif count:
            wrong = [{"kind": m.kind, **verdicts(operator, m)} for m in chosen]
            rows.append({**row, "right": verdicts(operator, pulled), "mutants": wrong})
        else:
            clock = lambda order: seconds(lambda: check.derivatives(operator.f, operator.x, order=order))
            rows.append({**row, "seconds": {f"order {order}": clock(order) for order in (1, 2)}})
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Parts found, by kind and of all, for each checker; false alarms; the median times."""
    clocked = [row["seconds"] for row in rows if "seconds" in row]
    checked = [row for row in rows if "mutants" in row]
    mutants = [m for row in checked for m in row["mutants"]]
    kinds = {kind: [m for m in mutants if m["kind"] == kind] for kind in sorted({m["kind"] for m in mutants})}
    part = lambda which, name: sum(m[name] == "found" for m in which) / max(len(which), 1)
    return {
        "operators": len({row["name"] for row in rows if "skipped" not in row}),
        "mutants": {kind: len(which) for kind, which in kinds.items()} | {"all": len(mutants)},
        "found": {
            name: {kind: part(which, name) for kind, which in kinds.items()} | {"all": part(mutants, name)}
            for name in CHECKERS
        },
        "false alarms": {name: sum(row["right"][name] == "found" for row in checked) for name in CHECKERS},
        "median seconds": {
            order: float(np.median([times[order] for times in clocked])) for order in (clocked or [{}])[0]
        },
    }


def table(found: dict[str, Any]) -> Table:
    """A line a kind of mutant, a column a checker."""
    shown = Table("mutants", "number", *CHECKERS, title=f"found, of {found['operators']} operators")
    for kind, number in found["mutants"].items():
        shown.add_row(kind, str(number), *(f"{100 * found['found'][name][kind]:.1f} %" for name in CHECKERS))
    shown.add_row("right, called wrong", str(found["operators"]), *map(str, found["false alarms"].values()))
    return shown


def main(
    preset: Annotated[str, typer.Option(help="smoke, paper or clock")] = "smoke",
    seed: int = 0,
    out: str = "results",
    minutes: Annotated[float, typer.Option(help="after which no further operator is begun")] = 120.0,
) -> None:
    """Make the mutants, ask the checkers, append a record."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    number, count = PRESETS[preset]
    drawn: dict[str, list[Operator]] = {}
    for operator in cases():
        small = sum(x.numel() for x in pytree.tree_leaves(operator.x)) <= LARGEST
        right = not operator.code and operator.name not in EXPLAINED
        if small and right and "float64 sample" in operator.variant:  # of torch's OpInfo
            drawn.setdefault(operator.name, []).append(operator)
    names = rng.permutation(sorted(drawn))[:number]
    operators = [drawn[name][int(rng.integers(len(drawn[name])))] for name in names]
    rows = run(operators, count, rng, time.monotonic() + 60 * minutes)
    found = summary(rows)
    terminal().print(table(found) if count else found["median seconds"])
    config = {"preset": preset, "seed": seed, "operators": number, "mutants": count}
    record = {"experiment": "mutants", "config": config, "environment": environment(), **found, "rows": rows}
    append(Path(out) / "mutants.jsonl", record)


if __name__ == "__main__":
    typer.run(main)
