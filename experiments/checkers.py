"""Which checker finds the wrong derivatives of the corpus, and which raises false alarms?

    python experiments/checkers.py --preset paper --framework both --out results

Expected: gradlab finds every wrong function of tests/corpus and accuses no right one; gradcheck, gradgradcheck and
check_grads miss a fifth or more and accuse a tenth or more. A table for each framework, once more as markdown, and
a record appended to results/checkers.jsonl.

The rules, the same for all. A wrong function is found where the checker raises, a right one is falsely accused
where it raises. Each gets the case's own function and point: the float and complex arrays as a tuple, whatever
else stands in the tree held constant. Where the case asks for first order only, or for reverse mode, nothing more
is asked of anybody. An option that the function does not support (forward mode without a jvp, vmap without a
rule) counts for nothing. Points where no derivative exists (kinks, jumps, poles) are left out of the false alarms.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track
from rich.table import Table

from gradlab.bench.console import console
from gradlab.bench.record import append, environment
from gradlab.cli import Framework, Preset

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from corpus.cases import Case, corpus

LIMIT_S = 60.0  # a check that takes longer has said nothing
EVERY = {"smoke": 8, "paper": 1}  # which of the cases are run
FOUND, SILENT, REFUSED, DOUBT, LATE = "found", "silent", "refused", "inconclusive", "late"
REFUSALS = (
    "forward ad", "forward-mode", "jvp function", "functorch", "vmap", "not implemented", "does not support",
    "data-dependent", "not used in the graph", "require grad",
)  # fmt: skip
Checker = Callable[[Callable[..., Any], Any, dict[str, Any]], str]


def main(preset: Preset = Preset.smoke, framework: Framework = Framework.both, out: str = "results") -> None:
    """Run every checker on every case, one framework a process."""
    if framework is Framework.both:
        for name in (Framework.jax, Framework.torch):
            flags = ["--preset", preset.value, "--framework", name.value, "--out", out]
            subprocess.run(
                [sys.executable, __file__, *flags], check=True, env={**os.environ, "JAX_ENABLE_X64": "1"}
            )
        return
    warnings.simplefilter("ignore")
    os.environ["JAX_ENABLE_X64"] = "1"
    cases = corpus(framework.value)[:: EVERY[preset.value]]
    checkers = {"gradlab": _gradlab, **(_torch() if framework is Framework.torch else _jax())}
    for check in checkers.values():  # imports and first calls are no part of a check
        _outcome(check, cases[-1])
    rows, names = [], list(checkers)
    for turn, case in enumerate(
        track(cases, f"{framework.value}: {len(cases)} functions", console=console())
    ):
        for i in range(len(names)):  # nobody is always the first, who pays for what is compiled
            name = names[(turn + i) % len(names)]
            rows.append({"case": case.name, "checker": name, **_outcome(checkers[name], case)})
    summary = {name: _summary(cases, [row for row in rows if row["checker"] == name]) for name in checkers}
    counts = {"wrong": sum(case.wrong for case in cases), "right": sum(map(_smooth, cases))}
    config = {"framework": framework.value, "preset": preset.value, "limit_s": LIMIT_S}
    record = {"experiment": "checkers", "config": config, "environment": environment(), **counts}
    append(Path(out) / "checkers.jsonl", {**record, "checkers": summary, "rows": rows})
    _show(framework.value, counts, summary)


def _smooth(case: Case) -> bool:
    return not case.wrong and case.verdict == "passed"


def _outcome(check: Checker, case: Case) -> dict[str, Any]:
    """What a checker says of a case that is built anew, and in how many seconds."""
    f, x, options = case.built()
    began = time.perf_counter()
    try:
        with _limited():
            said = check(f, x, options)
    except TimeoutError:
        said = LATE
    return {"said": said, "seconds": time.perf_counter() - began}


@contextmanager
def _limited() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _summary(cases: list[Case], rows: list[dict[str, Any]]) -> dict[str, Any]:
    said = {row["case"]: row["said"] for row in rows}
    names = lambda chosen, *words: [case.name for case in cases if chosen(case) and said[case.name] in words]
    wrong = lambda case: case.wrong
    return {
        "missed": names(wrong, SILENT, REFUSED, DOUBT, LATE),
        "false_alarms": names(_smooth, FOUND),
        "undecided": names(_smooth, DOUBT, LATE),
        "median_s": float(np.median([row["seconds"] for row in rows])),
    }


def _show(framework: str, counts: dict[str, int], summary: dict[str, Any]) -> None:
    found, alarms = f"wrong found, of {counts['wrong']}", f"false alarms, of {counts['right']}"
    headings = [f"{framework}: checker", found, alarms, "undecided", "median ms"]
    table, lines = Table(*headings), ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for name, s in summary.items():
        numbers = [counts["wrong"] - len(s["missed"]), len(s["false_alarms"]), len(s["undecided"])]
        cells = [name, *map(str, numbers), f"{1e3 * s['median_s']:.0f}"]
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    console().print(table)
    print("\n".join(lines))


def _gradlab(f: Callable[..., Any], x: Any, options: dict[str, Any]) -> str:
    from gradlab import check

    report = check.derivatives(f, x, **options)
    statuses = {row.status for row in report.rows}
    return FOUND if "failed" in statuses else SILENT if report.passed else DOUBT


def _worst(calls: list[Callable[[], Any]]) -> str:
    """The first call that raises decides; the first is the checker itself, the others are its options."""
    for number, call in enumerate(calls):
        try:
            call()
        except TimeoutError:
            raise
        except Exception as error:
            if number == 0 or not _refused(error):
                return FOUND
    return SILENT


def _refused(error: BaseException | None) -> bool:
    """Whether the framework says that it cannot, anywhere in the chain of causes."""
    while error is not None:
        if isinstance(error, NotImplementedError) or any(word in str(error).lower() for word in REFUSALS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _torch() -> dict[str, Checker]:
    """gradcheck as its manual has it, and with all it can do."""
    from torch.autograd import gradcheck, gradgradcheck

    forward = ({"check_forward_ad": True}, {"check_forward_ad": True, "check_batched_forward_grad": True})
    batched, strict = {"check_batched_grad": True}, {"check_grad_dtypes": True}
    over = {"check_fwd_over_rev": True, "check_rev_over_rev": False, "check_undefined_grad": False}

    def checker(
        first: tuple[dict, ...] = ({},), second: tuple[dict, ...] = (), double: bool = False
    ) -> Checker:
        def check(f: Callable[..., Any], x: Any, options: dict[str, Any]) -> str:
            flat, tensors = _torch_leaves(f, x, double)
            if options.get("modes") == "reverse":
                keep = lambda kinds: [
                    k for k in kinds if not {"check_forward_ad", "check_fwd_over_rev"} & set(k)
                ]
            else:
                keep = list
            calls = [lambda k=k: gradcheck(flat, tensors(), **k) for k in keep(first)]
            if options.get("order", 2) > 1:
                calls += [lambda k=k: gradgradcheck(flat, tensors(), **k) for k in keep(second)]
            return _worst(calls)

        return check

    fast = {"fast_mode": True}
    return {
        "gradcheck": checker(),
        "gradcheck, gradgradcheck": checker(second=({},)),
        "the same, every option": checker(({}, *forward, batched, strict), ({}, over, batched, strict)),
        "the same, fast mode": checker((fast,), (fast,)),
        "gradcheck, gradgradcheck, all in float64": checker(second=({},), double=True),
    }


def _torch_leaves(
    f: Callable[..., Any], x: Any, double: bool
) -> tuple[Callable[..., Any], Callable[[], Any]]:
    """f of its float leaves alone, to a tuple of its float outputs; and a fresh copy of those leaves."""
    import torch
    from torch.utils import _pytree as pytree

    leaves, structure = pytree.tree_flatten(x)
    differentiable = lambda t: isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex())
    which = [i for i, leaf in enumerate(leaves) if differentiable(leaf)]

    def flat(*given: Any) -> Any:
        full = list(leaves)
        for i, leaf in zip(which, given, strict=True):
            full[i] = leaf
        outputs = [
            y for y in pytree.tree_leaves(f(pytree.tree_unflatten(full, structure))) if differentiable(y)
        ]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def tensors(wide: bool = double) -> tuple[Any, ...]:
        torch.manual_seed(0)
        copies = [leaves[i].detach().clone() for i in which]
        if wide:
            copies = [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in copies]
        return tuple(t.requires_grad_() for t in copies)

    try:
        flat(*tensors())
    except RuntimeError:  # a function that has no float64 form is given its own point
        return flat, lambda: tensors(wide=False)
    return flat, tensors


def _jax() -> dict[str, Checker]:
    """check_grads, to first and to second order, in reverse mode alone where forward mode is refused."""
    from jax.test_util import check_grads

    def checker(order: int) -> Checker:
        def check(f: Callable[..., Any], x: Any, options: dict[str, Any]) -> str:
            flat, arrays = _jax_leaves(f, x)
            upto = min(order, options.get("order", 2))
            reverse = lambda: check_grads(flat, arrays, upto, modes=("rev",))
            if options.get("modes") == "reverse":
                return _worst([reverse])
            return _worst([reverse, lambda: check_grads(flat, arrays, upto)])

        return check

    return {"check_grads, order 1": checker(1), "check_grads, order 2": checker(2)}


def _jax_leaves(f: Callable[..., Any], x: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    import jax
    import jax.numpy as jnp

    leaves, structure = jax.tree.flatten(x)
    differentiable = lambda a: isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jnp.inexact)
    which = [i for i, leaf in enumerate(leaves) if differentiable(leaf)]

    def flat(*given: Any) -> Any:
        full = list(leaves)
        for i, leaf in zip(which, given, strict=True):
            full[i] = leaf
        return tuple(y for y in jax.tree.leaves(f(jax.tree.unflatten(structure, full))) if differentiable(y))

    return flat, tuple(leaves[i] for i in which)


if __name__ == "__main__":
    typer.run(main)
