"""How fast is odeint in torch beside torchdiffeq and torchode, forwards and with the gradient of a neural ODE?

    python experiments/ode_speed.py [--end 1.0] [--repeats 20] [--out results]

A perceptron 16-64-16 on a batch of 128 from time 0 to `end`, rtol 1e-5, methods of order 5, processor seconds of one
thread. torchdiffeq and torchode are measured where they are installed. Expected: forwards twice as fast as
torchdiffeq, compiled three times; the gradient of recorded steps ("direct") nearly twice as fast, compiled nearly three
times, that under error control as fast as torchdiffeq's of recorded steps, and compiled twice. Each time is quoted
beside evaluations of f times the cost of one without gradients. The gradients are compared before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
import typer
from rich.table import Table

import gradlab.torch as gl
from gradlab.bench.clock import interleave
from gradlab.bench.console import console
from gradlab.bench.record import append, environment

RTOL, ATOL = 1e-5, 1e-7


def solvers(
    f: Callable[[Any, Any], Any], params: list[Any], y0: Any, ts: Any
) -> dict[str, Callable[[], Any]]:
    """The last state by each library that is there."""
    found = {
        f"gradlab {adjoint}{', compiled' if compile else ''}": lambda adjoint=adjoint, compile=compile: (
            gl.odeint(f, y0, ts, rtol=RTOL, atol=ATOL, adjoint=adjoint, compile=compile).ys[-1]
        )
        for adjoint, compile in (
            ("auto", False),
            ("auto", True),
            ("backsolve", False),
            ("direct", False),
            ("direct", True),
        )
    }
    with suppress(ImportError):
        import torchdiffeq as td

        options = {"rtol": RTOL, "atol": ATOL, "method": "dopri5"}
        found["torchdiffeq"] = lambda: td.odeint(f, y0, ts, **options)[-1]
        found["torchdiffeq adjoint"] = lambda: td.odeint_adjoint(
            f, y0, ts, adjoint_params=tuple(params), **options
        )[-1]
    with suppress(ImportError):
        import torchode as to

        term = to.ODETerm(f)
        control = to.IntegralController(atol=ATOL, rtol=RTOL, term=term)
        solver = to.AutoDiffAdjoint(to.Tsit5(term=term), control)
        problem = to.InitialValueProblem(y0=y0, t_eval=ts.expand(len(y0), -1))
        found["torchode"] = lambda: solver.solve(problem).ys[:, -1]
    return found


def main(end: float = 1.0, repeats: int = 20, seed: int = 0, out: Path = Path("results")) -> None:
    """Compare the gradients, time all in turns, print a table, append one record."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16))
    y0, ts, params = torch.randn(128, 16), torch.tensor([0.0, end]), list(net.parameters())
    count = [0]

    def counted(_: Any, y: Any) -> Any:
        count[0] += 1
        return net(y)

    runs = solvers(lambda _, y: net(y), params, y0, ts)
    gradient = lambda run: torch.autograd.grad(run().square().mean(), params)
    expected = gradient(
        lambda: gl.odeint(lambda _, y: net(y), y0, ts, rtol=1e-7, atol=1e-8, method="dopri8").ys[-1]
    )
    evaluations, calls = {}, {}
    for name, run in solvers(counted, params, y0, ts).items():
        if "compiled" not in name:
            count[0] = 0
            torch.no_grad()(run)()
            evaluations[name] = [count[0]]
            count[0] = 0
            gradient(run)
            evaluations[name].append(count[0])
    for name, run in runs.items():
        off = max(float((g - e).norm() / e.norm()) for g, e in zip(gradient(run), expected, strict=True))
        if off > 1e-3:
            raise SystemExit(f"{name}: its gradient is off by {off:.1e}")
        calls[f"{name}, forward"] = torch.no_grad()(run)
        calls[f"{name}, gradient"] = lambda run=run: gradient(run)
    calls["f"] = torch.no_grad()(lambda: net(y0))
    times = interleave(calls, synchronise=lambda result: result, repeats=repeats, now=process_time)
    median = {name: float(np.median(timing.samples)) for name, timing in times.items()}
    head = "solver", "forward, ms", "÷ torchdiffeq", "÷ torchode", "÷ (evaluations × f)", "evaluations"
    table = Table(*head, "gradient, ms", *head[2:])
    for name in runs:
        row = [name]
        for kind, n in zip(
            ("forward", "gradient"), evaluations[name.removesuffix(", compiled")], strict=True
        ):
            time = median[f"{name}, {kind}"]
            others = [median.get(f"{other}, {kind}", float("nan")) for other in ("torchdiffeq", "torchode")]
            ratios = [f"{time / x:.2f}" for x in (*others, n * median["f"])]
            row += [f"{time * 1e3:.2f}", *ratios, str(n)]
        table.add_row(*row)
    console().print(table)
    record = {"end": end, "seed": seed, "medians": median, "evaluations": evaluations, **environment()}
    append(out / "ode_speed.jsonl", record)


if __name__ == "__main__":
    typer.run(main)
