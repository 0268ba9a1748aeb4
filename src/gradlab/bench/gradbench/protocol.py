"""The suite's protocol: a JSON message a line, an answer a line, in turn.

`start` is answered with the tool's name, `define` with whether the module is here, `evaluate` with the output and
the nanoseconds of every run, anything else (`analysis`, what later versions add) with its id alone.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import IO, Any

from gradlab.bench.gradbench import EVALUATIONS
from gradlab.bench.gradbench.evaluations import OUTPUTS, prepared

Message = dict[str, Any]


def serve(framework: str, messages: Iterable[str], answers: IO[str]) -> None:
    """Answer every line until there are no more."""
    for line in messages:
        if line.strip():
            message = json.loads(line)
            answers.write(encoded(message["id"], answer(framework, message)) + "\n")
            answers.flush()


def encoded(number: int, fields: Message) -> str:
    """The answer as a line; an output that is not finite is none that JSON knows, and no success."""
    try:
        return json.dumps({"id": number, **fields}, allow_nan=False)
    except ValueError as error:
        return json.dumps({"id": number, "success": False, "error": f"the output is not finite: {error}"})


def answer(framework: str, message: Message) -> Message:
    """The fields of the answer beside its id."""
    kind = message["kind"]
    if kind == "start":
        return {"tool": "gradlab", "config": {"framework": framework}}
    try:
        if kind == "define":
            functions(framework, message["module"])
            return {"success": True}
        if kind == "evaluate":
            return evaluate(framework, message["module"], message["function"], message["input"])
    except Exception:
        return {"success": False, "error": traceback.format_exc()}
    return {}


def functions(framework: str, module: str) -> dict[str, Callable[..., Any]]:
    """The functions of an evaluation in a framework, by the suite's names."""
    if module not in EVALUATIONS:
        raise ValueError(f"no evaluation {module!r} here; there are {', '.join(EVALUATIONS)}")
    return import_module(f"gradlab.bench.gradbench._{framework}").FUNCTIONS[module]


def call(framework: str, module: str, function: str, given: Message) -> Callable[[], Any]:
    """A call without arguments that runs a function on the input's arrays and waits for the result."""
    side = import_module(f"gradlab.bench.gradbench._{framework}")
    found = functions(framework, module)
    if function not in found:
        raise ValueError(f"{module} has no function {function!r}; it has {', '.join(found)}")
    arrays, options = prepared(module, given)
    run = side.bound(found[function], side.arrays(arrays), options)
    return lambda: side.synchronise(run())


def evaluate(framework: str, module: str, function: str, given: Message) -> Message:
    """Run as often and as long as asked, the first time, which compiles, under a name of its own."""
    run = call(framework, module, function, given)
    start = time.perf_counter_ns()
    result = run()
    timings: list[Message] = [{"name": "compile", "nanoseconds": time.perf_counter_ns() - start}]
    asked: Message = given if isinstance(given, dict) else {}  # hello's input is a number
    least: int = asked.get("min_runs") or asked.get("runs") or 1
    seconds: float = asked.get("min_seconds") or 0.0
    spent = 0
    while len(timings) <= least or spent < 1e9 * seconds:
        start = time.perf_counter_ns()
        result = run()
        timings.append({"name": "evaluate", "nanoseconds": time.perf_counter_ns() - start})
        spent += timings[-1]["nanoseconds"]
    side = import_module(f"gradlab.bench.gradbench._{framework}")
    output = OUTPUTS.get((module, function), plain)(side.numpy(result), given)
    return {"success": True, "output": output, "timings": timings}


def plain(result: Any, given: Message) -> Any:
    """An array as nested lists, or a number."""
    return result.tolist()
