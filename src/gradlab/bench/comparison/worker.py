"""One framework in a process of its own, which does what it is asked, line by line in JSON.

    python -m gradlab.bench.comparison.worker jax|torch|flax|tensorflow smoke cpu 0

Each framework has a process of its own, all alive at once and only one at work: so calls of different frameworks can be
timed in turn, round by round, as calls of one are. A line in asks, `{"do": name, ...}`; a line out answers.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from contextlib import nullcontext
from typing import Any

import numpy as np

from gradlab.bench.comparison.cases import Case, Ready
from gradlab.bench.comparison.data import SMALL, TASKS, Optimiser, Task, batch, held_out, scores
from gradlab.bench.energy import utilisation
from gradlab.bench.memory import peak

SAMPLE_S = 5e-3  # a shorter call is repeated within a sample
LIBRARY = {"jax": "jax", "torch": "torch", "flax": "jax", "tensorflow": "tensorflow"}


class Worker:
    """A framework, and the calls it has made ready."""

    def __init__(self, framework: str, preset: str, device: str, seed: int):
        self.framework, self.device, self.seed = framework, device, seed
        self.tasks = {**TASKS[preset], "small": SMALL}
        self.side: Any = importlib.import_module(f"gradlab.bench.comparison._{framework}")
        self.ready: dict[Case, Ready] = {}
        self.first: dict[Case, float] = {}
        self.inner: dict[Case, int] = {}

    def answer(self, do: str, **asked: Any) -> Any:
        """What was asked for."""
        if "case" in asked:
            asked["case"] = Case(*asked["case"])
        dtype = asked["case"].dtype if "case" in asked else asked.get("dtype")
        with self._wide(dtype == "float64"):
            return getattr(self, do)(**asked)

    def _wide(self, needed: bool) -> Any:
        if LIBRARY[self.framework] != "jax":
            return nullcontext()
        import jax

        return jax.enable_x64(needed)

    def train(
        self, task: str, mode: str, dtype: str, steps: int, optimiser: dict[str, float] | None = None
    ) -> dict[str, Any]:
        """Losses and seconds of each step; what is reached on held-out data."""
        todo, device = self.tasks[task], self.device
        learner = self._learner(todo, mode, dtype, Optimiser(**optimiser or {}))
        losses, seconds = [], []
        with utilisation(device) as used:
            for i in range(steps):
                examples = self.side.arrays(batch(todo, i, self.seed), dtype, device)
                start = time.perf_counter()
                loss = self.side.synchronise(learner.step(*examples))
                seconds.append(time.perf_counter() - start)
                losses.append(float(loss))
        inputs, targets = held_out(todo)
        case = Case("step", task, mode, dtype=dtype)
        self.ready[case] = self.side.repeated(learner, todo, dtype, device, todo.batch, self.seed)
        self.first[case] = seconds[0]
        logits = np.asarray(self.side.host(learner.logits(self.side.arrays(inputs, dtype, device))))
        return {"losses": losses, "seconds": seconds, "utilisation": used(), **scores(logits, targets)}

    def _learner(self, task: Task, mode: str, dtype: str, optimiser: Optimiser) -> Any:
        return self.side.Learner(task, mode, dtype, self.device, self.seed, optimiser)

    def prepare(self, case: Case) -> dict[str, float]:
        """Make a call ready; seconds of the first, compilation included, and of a later one."""
        if case not in self.ready:
            self._start(case)
        later = min(self._seconds(case, 1) for _ in range(2))
        self.inner[case] = max(1, round(SAMPLE_S / later))
        return {"first_s": self.first[case], "later_s": later}

    def _start(self, case: Case) -> Any:
        """Make a call and run it for the first time; its result."""
        task = self.tasks[case.task]
        common = (case.dtype, self.device, case.batch or task.batch, self.seed)
        if case.what == "step":
            learner = self._learner(task, case.mode, case.dtype, Optimiser())
            self.ready[case] = self.side.repeated(learner, task, *common)
        elif case.what == "predict":
            self.ready[case] = self.side.predict(task, case.mode, *common)
        else:
            self.ready[case] = self.side.operation(case.what, case.way, task, case.mode, *common)
        start = time.perf_counter()
        found = self.side.synchronise(self.ready[case].run())
        self.first[case] = time.perf_counter() - start
        return found

    def _seconds(self, case: Case, count: int) -> float:
        run, wait = self.ready[case].run, self.side.synchronise
        start = time.perf_counter()
        for _ in range(count):
            wait(run())
        return (time.perf_counter() - start) / count

    def sample(self, case: Case) -> float:
        """Seconds a call, after one that brings it back into the caches."""
        self._seconds(case, 1)
        return self._seconds(case, self.inner[case])

    def each(self, case: Case, count: int) -> list[float]:
        """Seconds of so many calls, one by one."""
        self._seconds(case, 3)
        return [self._seconds(case, 1) for _ in range(count)]

    def result(self, case: Case, path: str) -> None:
        """What a call gives, its leaves after one another, into a file."""
        found = self.ready[case].run() if case in self.ready else self._start(case)
        np.save(path, self.side.flat(found))

    def bytes(self, case: Case) -> int | None:
        """Temporaries and results at once; None where it is not known."""
        ready = self.ready[case]
        if ready.pure is None:
            return None
        return peak(LIBRARY[self.framework], ready.pure, *ready.args, device=self.device)

    def resident(self) -> int | None:
        """The most bytes that the process has held, of everything."""
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def forget(self) -> None:
        """Let go of what was made ready."""
        self.ready.clear()
        self.inner.clear()


def main() -> None:
    """Answer until there is nothing more to read."""
    framework, preset, device, seed = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    say = lambda reply: print(json.dumps(reply), file=replies, flush=True)
    try:
        worker = Worker(framework, preset, device, int(seed))
    except ModuleNotFoundError:
        say({"missing": f"not installed: pip install 'gradlab[{framework}]'"})
        return
    if why := getattr(worker.side, "lacks", lambda device: None)(device):
        say({"missing": why})
        return
    say({"ready": True})
    for line in sys.stdin:
        try:
            say({"reply": worker.answer(**json.loads(line))})
        except Exception as error:  # told to who asked, who decides
            say({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})


if __name__ == "__main__":
    main()
