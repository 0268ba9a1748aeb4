"""Steps of explicit methods as compiled functions of tensors alone, run by the same loop as the others.

torch.compile's tracer says what f is now, as a graph of tensors that are all given to it: the parameters of a module
or the numbers of a closure are looked up at each solution, and another graph is made where f has become another
function. inductor compiles a step made of that graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils import _pytree as pytree

from gradlab._errors import StrategyError
from gradlab.transforms.odes._torch_stages import Field, Single, combined, weights
from gradlab.transforms.odes.tableaux import METHODS


@dataclass(eq=False)
class Program:
    """f as a graph: the flat slope, of t, the flat state and other tensors."""

    graph: Any
    t: int | None  # their places among the inputs, where they are used
    y: int | None
    looked: bool = False  # whether f was looked at
    repaired: bool = False  # whether it calls faulty operations
    steps: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    def slope(self, t: Any, y: Any, others: Sequence[Any]) -> Any:
        """f at (t, y)."""
        given = list(others)
        for place, x in sorted((p, x) for p, x in ((self.t, t), (self.y, y)) if p is not None):
            given.insert(place, x)
        # as it was traced, or what f differentiates by itself would have no derivative
        with torch.enable_grad():
            return self.graph(*given)[0]

    def run(self, name: str, made: Callable[..., Any], options: tuple[Any, ...], *given: Any) -> Any:
        """A step, made with these options, at tensors that have the same form each time; compiled at the first."""
        key = name, *options
        if key not in self.steps:
            from torch import _inductor  # some seconds, that nobody else should wait for
            from torch.fx.experimental.proxy_tensor import make_fx

            with torch.no_grad(), trouble():
                graph = make_fx(made(self, *options))(*given)
                self.steps[key] = _inductor.compile(graph, list(given))
        return self.steps[key](*given)


@dataclass(eq=False)
class Bound:
    """A program with the tensors that it is given besides t and the state: a parameter's number, or the tensor."""

    program: Program
    sources: list[Any]

    def others(self, params: Sequence[Any]) -> list[Any]:
        """Those tensors."""
        return [(params[s] if isinstance(s, int) else s).detach() for s in self.sources]

    def place(self, number: int) -> int | None:
        """Where a parameter is among them."""
        return next((i for i, s in enumerate(self.sources) if isinstance(s, int) and s == number), None)

    def forwards(self, params: Sequence[Any], whole: bool, note: Any = None) -> Callable[..., Any]:
        """A step of one example, with the polynomial within it if `whole`; its slopes are noted if they shall be."""
        program, others = self.program, self.others(params)

        def step(stages: Any, t: float, h: float, *given: Any) -> Any:
            options = stages.tableau.name, stages.run.watched, whole, note is not None
            y, slope, size, *more = program.run("forwards", forward_step, options, *given, *others)
            if note is not None:
                note(more.pop())
            return y, slope, size, None, None, more[0] if more else None

        return step

    def begin(self, params: Sequence[Any]) -> Callable[..., Any]:
        """The first slope of one example, and what its first step is chosen by."""
        program, others = self.program, self.others(params)

        def first(run: Any) -> Any:
            tensor = lambda *x: torch.tensor(x, dtype=run.y.dtype, device=run.y.device)
            tol = tensor(run.tolerance.rtol, float(run.tolerance.atol))
            at = tensor(run.t, run.end - run.t)
            slope, found = program.run("begin", euler_step, (), run.y.view(-1), at, tol, *others)
            run.evaluations += 1
            return slope.view(run.shape), found.tolist()

        return first

    def recorded(
        self, params: Sequence[Any], wanted: Sequence[int]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The pullbacks of a recorded step, and of the first slope."""
        program, others = self.program, self.others(params)
        places = tuple((self.place(i), params[i].numel()) for i in wanted)

        def step(tableau: Any, *given: Any) -> Any:
            return program.run("recorded", recorded_step, (tableau.name, places), *given, *others)

        def first(*given: Any) -> Any:
            return program.run("slopes", pullback, (places, False), *given, *others)[:2]

        return step, first

    def backwards(self, *given: Any) -> Backwards:
        """Those of the adjoint."""
        return Backwards(self, *given)


@contextmanager
def trouble() -> Iterator[None]:
    """What a compiler reports, by the name of the option."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise StrategyError(
            f"odeint: compile=True cannot compile f: {type(error).__name__}: {reason}; pass compile=False"
        ) from error


_traced: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class Trace:
    """The programs of functions of one code. Calling it says which of them f is now, and its tensors."""

    def __init__(self) -> None:
        self.programs: dict[Any, Program] = {}
        self.latest: Any = None  # a graph and its program
        self.found: Any = None

        def slope(f: Any, t: Any, y: Any, form: Any, args: Any) -> Any:
            spec, sizes, shapes, kinds = form
            parts = [
                x.view(shape).to(kind)
                for x, shape, kind in zip(torch.split(y, sizes), shapes, kinds, strict=True)
            ]
            out = f(t, parts[0] if spec is None else pytree.tree_unflatten(parts, spec), *args)
            leaves = [out] if spec is None else pytree.tree_leaves(out)
            return torch.cat([leaf.reshape(-1) for leaf in leaves])

        slope.__code__ = slope.__code__.replace()  # with a cache of graphs of its own
        self.traced: Any = torch.compile(slope, backend=self.backend, fullgraph=True, dynamic=False)

    def backend(self, graph: Any, _: Any) -> Callable[..., Any]:
        """Takes the place of a compiler: notes the graph and what it is given."""

        def run(*given: Any) -> Any:
            self.found = graph, given
            return (torch.empty(0),)

        return run

    def __call__(self, equation: Any, t: Any, y: Any, args: Any) -> tuple[Program, list[Any]]:
        tree = equation.tree
        t, y = t.detach().clone(), y.detach().view(-1)
        spec = None if equation.bare else pytree.tree_structure(tree.put(tree.leaves))
        form = spec, tree.sizes, tree.shapes, [x.dtype for x in tree.leaves]
        with torch.enable_grad(), trouble():
            self.traced(equation.f, t, y, form, args)
            graph, given = self.found
        self.found = None
        others = [x for x in given if x is not t and x is not y]
        if self.latest is not None and self.latest[0] is graph:
            return self.latest[1], others
        kinds = tuple((x.shape, x.stride(), x.dtype, x.device) for x in given)
        constants = any(node.op in ("get_attr", "call_module") for node in graph.graph.nodes)
        key = (id(graph) if constants else graph.code, kinds)
        place = lambda it: next((i for i, x in enumerate(given) if x is it), None)
        if key not in self.programs:
            self.programs[key] = Program(graph, place(t), place(y))
        self.latest = graph, self.programs[key]
        return self.programs[key], others


def traced(equation: Any, t: Any, y: Any, args: Any) -> tuple[Program, list[Any]]:
    """The program that f is now, and the tensors that it is given."""
    f = equation.f
    code = getattr(getattr(f, "__func__", f), "__code__", f)
    if code not in _traced:
        _traced[code] = Trace()
    return _traced[code](equation, t, y, args)


def sizes(rows: Sequence[Any], before: Any, after: Any, tol: Any) -> Any:
    """The root mean squares of rows, in units of the tolerances."""
    scale = tol[1] + tol[0] * torch.maximum(before.abs(), after.abs())
    return torch.stack([(row / scale).square().mean().sqrt() for row in rows])


def errors(tableau: Any, slopes: Sequence[Any], h: Any, watched: bool) -> list[Any]:
    """What the rows of the weights of errors are of."""
    rows = weights(tableau, torch.float64, torch.device("cpu")).error[: 4 if watched else 2].tolist()
    return [h * combined(row, slopes) for row in rows]


def euler_step(program: Program) -> Callable[..., Any]:
    """As of Run, after the slope at its start."""

    def step(y: Any, at: Any, tol: Any, *others: Any) -> Any:
        t, span = at.unbind()
        slope = program.slope(t, y, others)
        size = lambda x: sizes([x], y, y, tol)[0]
        d0, d1 = size(y), size(slope)
        h = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        h = torch.minimum(h, span.abs())
        step = torch.copysign(h, span)
        later = program.slope(t + step, y + step * slope, others)
        return slope, torch.stack([d1, h, size(later - slope)])

    return step


def forward_step(
    program: Program, method: str, watched: bool, whole: bool, noted: bool
) -> Callable[..., Any]:
    """A step of the equation."""
    tableau: Any = METHODS[method]

    def step(y: Any, slope: Any, at: Any, tol: Any, *others: Any) -> Any:
        t, h = at.unbind()
        slopes, end = [slope], y
        for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
            end = y + h * combined(row, slopes)
            slopes.append(program.slope(t + c * h, end, others))
        out = end, slopes[-1], sizes(errors(tableau, slopes, h, watched), y, end, tol)
        dense = [torch.stack([h * combined(row, slopes) for row in tableau.dense])] if whole else []
        return *out, *dense, *([torch.stack(slopes)] if noted else [])

    return step


def pulled(program: Program, places: Sequence[Any], timed: bool, a: Any, t: Any, y: Any, others: Any) -> Any:
    """The slope of the adjoint, the integrands and the slope of f."""
    with torch.enable_grad():
        t, y = t.detach().requires_grad_(timed), y.detach().requires_grad_()
        used = {i for i, _ in places}
        others = [x.detach().requires_grad_(i in used) for i, x in enumerate(others)]
        slope = program.slope(t, y, others)
        wanted = [a.new_zeros(size, requires_grad=True) if i is None else others[i] for i, size in places]
        inputs = [y, *wanted, *([t] if timed else [])]
        if not slope.requires_grad:
            return torch.zeros_like(a), a.new_zeros(sum(x.numel() for x in inputs[1:])), slope.detach()
        moved, *rest = torch.autograd.grad(slope, inputs, -a, materialize_grads=True)
    return moved, torch.cat([a.new_zeros(0), *(x.reshape(-1) for x in rest)]), slope.detach()


def pullback(program: Program, places: Sequence[Any], timed: bool) -> Callable[..., Any]:
    """The same of tensors alone."""
    return lambda a, t, y, *others: pulled(program, places, timed, a, t, y, others)


def recorded_step(program: Program, method: str, places: Sequence[Any]) -> Callable[..., Any]:
    """The pullback of a step from y with these slopes: its state and last slope, and slopes (`own`) by themselves."""
    tableau: Any = METHODS[method]

    def step(moved: Any, slope: Any, own: Any, y: Any, slopes: Any, at: Any, *others: Any) -> Any:
        t, h = at.unbind()
        last, total = tableau.stages - 1, 0.0
        D: list[Any] = [None] * tableau.stages
        for i in range(last, -1, -1):
            g = own[i] + slope if i == last else own[i]
            column = [row[i] if i < len(row) else 0.0 for row in tableau.a[i + 1 :]]
            g = g + h * combined(column, D[i + 1 :]) if any(column) else g
            if i > 0:
                at_stage = y + h * combined(tableau.a[i], slopes.unbind())
                back, grads, _ = pulled(program, places, False, -g, t + tableau.c[i] * h, at_stage, others)
                D[i], total = back + moved if i == last else back, total + grads
        return sum(D[1:]), g, total

    return step


def backward_step(program: Program, method: str, places: Sequence[Any], timed: bool) -> Callable[..., Any]:
    """A step of the adjoint, with the states at its stages."""
    tableau: Any = METHODS[method]

    def step(a: Any, slope: Any, integrand: Any, states: Any, at: Any, tol: Any, *others: Any) -> Any:
        t, h = at.unbind()
        slopes, end, gained = [slope], a, tableau.b[0] * integrand
        for i in range(1, tableau.stages):
            end = a + h * combined(tableau.a[i], slopes)
            moved, integrand, rate = pulled(
                program, places, timed, end, t + tableau.c[i] * h, states[i - 1], others
            )
            slopes.append(moved)
            gained = gained + tableau.b[i] * integrand if tableau.b[i] != 0 else gained
        return end, moved, sizes(errors(tableau, slopes, h, False), a, end, tol), integrand, h * gained, rate

    return step


class Backwards:
    """The adjoint of one example by compiled steps."""

    def __init__(
        self, bound: Bound, params: Any, wanted: Sequence[int], trajectory: Any, known: dict[float, Any]
    ):
        self.program, self.others = bound.program, bound.others(params)
        self.timed, self.trajectory, self.known = bound.program.t is not None, trajectory, known
        self.places = tuple((bound.place(i), params[i].numel()) for i in wanted)
        self.empty = not (self.places or self.timed)

    def field(self, jacobians: Any) -> Field:
        """As the integrator has it."""
        return Field(self.slopes, jacobians, compiled=self.step)

    def note(self, time: float, rate: Any) -> None:
        if time in self.known:
            self.known[time] = rate.view(1, -1)

    def slopes(self, time: float, t: Any, a: Any) -> Any:
        """Those at the start."""
        y = self.trajectory.states([time])
        given = (a.view(-1), t.reshape(()), y.view(-1), *self.others)
        moved, integrand, rate = self.program.run("slopes", pullback, (self.places, self.timed), *given)
        self.note(time, rate)
        return moved.view(a.shape), None if self.empty else integrand[None]

    def step(self, stages: Any, t: float, h: float, a: Any, slope: Any, at: Any, tol: Any) -> Any:
        """One of the method."""
        tableau, c = stages.tableau, stages.tableau.c[1:]
        integrand = a.new_zeros(0) if self.empty else stages.run.integrand[0]
        states = self.trajectory.states([t + x * h for x in c])
        given = (a, slope, integrand, states, at, tol, *self.others)
        options = tableau.name, self.places, self.timed
        y, slope, size, integrand, gained, rate = self.program.run(
            "backwards", backward_step, options, *given
        )
        self.note(t + c[-1] * h, rate)
        return y, slope, size, *((None, None) if self.empty else (integrand[None], gained[None])), None


class Compiled(Single):
    """The stages of one example by a compiled step."""

    def __init__(self, run: Any, tableau: Any):
        self.run, self.tableau = run, tableau
        self.weights = weights(tableau, run.y.dtype, run.y.device)
        tensor = lambda *x: torch.tensor(x, dtype=run.y.dtype, device=run.y.device)
        self.tol = tensor(run.tolerance.rtol, float(run.tolerance.atol))
        self.tensor = tensor

    def __call__(self, t: Any, h: Any) -> tuple[Any, Any, Any, Any]:
        """As of Stages."""
        run = self.run
        given = run.y.view(-1), run.slope.view(-1), self.tensor(t, h), self.tol
        y, slope, self.found, integrand, self.Q, self.dense = run.f.compiled(self, t, h, *given)
        run.evaluations += self.tableau.stages - 1
        return y.view(run.shape), slope.view(run.shape), integrand, False

    def judged(self, size: Any) -> Any:
        """As of Stages."""
        return self.found.tolist()

    def sums(self, rows: Any) -> Any:
        """As of Stages, of the polynomial alone."""
        return self.dense.view(-1, *self.run.shape)
