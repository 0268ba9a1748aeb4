"""What an adaptation is asked to be, checked once, in numbers and words that both frameworks share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from gradlab._errors import InputError, KindError, StrategyError
from gradlab.transforms.implicit_functions.options import Options
from gradlab.transforms.optimizers import Optimizer

Method = Literal["unroll", "checkpoint", "truncate", "first_order", "reptile", "implicit"]

OF_METHOD = {
    "last": "truncate",
    "proximal": "implicit",
    "cg_steps": "implicit",
}  # options of one method alone


@dataclass(frozen=True)
class Plan:
    """The options of `adapt` and of what is made of it; `op` is which."""

    op: str
    losses: dict[str, Any]
    optimizer: Any
    steps: int
    method: Method
    last: int | None = None
    proximal: float | None = None
    cg_steps: int | None = None
    stateful: bool = False

    def __post_init__(self) -> None:
        op = self.op
        for name, loss in self.losses.items():
            if not callable(loss):
                raise KindError(
                    f"{op}: {name} is a {type(loss).__name__}; pass a function {name}(params, *data)"
                )
        _positive(op, "steps", self.steps)
        if self.method not in get_args(Method):
            raise InputError(
                f"{op}: unknown method {self.method!r}; pass one of {', '.join(get_args(Method))}"
            )
        for name, method in OF_METHOD.items():
            if getattr(self, name) is not None and self.method != method:
                raise InputError(
                    f"{op}: {name} belongs to method={method!r}, the method is {self.method!r}; leave it out"
                )
        self._check_method()
        refuse_unmade(op, self.optimizer)
        if not (callable(self.optimizer) or _is_pair(self.optimizer)):
            raise KindError(
                f"{op}: optimizer is a {type(self.optimizer).__name__}; pass a pair of pure functions, such as "
                "optimizers.sgd(0.01), or a function of params that gives one (torch.optim changes "
                "parameters in place, which has no derivative)"
            )

    def _check_method(self) -> None:
        op = self.op
        if self.method == "truncate":
            if self.last is None:
                raise InputError(f"{op}: method='truncate' needs last, the number of steps differentiated")
            _positive(op, "last", self.last)
            if self.last > self.steps:
                raise InputError(
                    f"{op}: last is {self.last} of {self.steps} steps; pass at most {self.steps}"
                )
        if self.method == "reptile" and "outer_loss" not in self.losses:
            raise InputError(
                f"{op}: 'reptile' is no derivative of the adapted params; pass it to meta_grad, "
                "or 'first_order' here"
            )
        if self.method == "implicit":
            if not isinstance(self.proximal, (int, float)) or not 0 <= self.proximal < math.inf:
                raise InputError(
                    f"{op}: proximal is {self.proximal!r}; method='implicit' needs a number that is not negative, "
                    "the strength of ‖adapted - params‖²/2"
                )
            if self.cg_steps is not None:
                _positive(op, "cg_steps", self.cg_steps)
            if self.stateful:
                raise InputError(
                    f"{op}: method='implicit' needs a loss with a minimum, and a state changes it at each step; "
                    "pass another method, or no state"
                )

    def optimizer_at(self, params: Any) -> Any:
        """The optimiser, made of the parameters where it is a function of them."""
        if _is_pair(self.optimizer):
            return self.optimizer
        found = self.optimizer(params)
        if not _is_pair(found):
            raise KindError(
                f"{self.op}: optimizer(params) is a {type(found).__name__}; return a pair of functions init and "
                "update, such as optimizers.sgd(params['rate'])"
            )
        return found

    def free(self, i: int) -> bool:
        """Whether the gradient of step i is differentiated."""
        return i >= self.held

    @property
    def held(self) -> int:
        """How many steps at the beginning have gradients that are held constant."""
        if self.method == "first_order":
            return self.steps
        return self.steps - self.last if self.last is not None else 0

    def linear(self, eps: float, cg: Callable[..., Any]) -> dict[str, Any]:
        """How `argmin` and `root` solve linear systems, in arithmetic with this rounding.

        By cg_steps steps of cg(system, A, b), whatever is left; else until nearly nothing is.
        """
        if self.cg_steps is None:
            return {"linear_solver": "cg", "rtol": eps ** (2 / 3), "atol": eps ** (2 / 3)}
        return {"linear_solver": partial(cg, self.system(eps)), "rtol": 1e30}

    @property
    def unsolved(self) -> str:
        """What is said where the linear system of the implicit gradient is not solved."""
        return (
            f"{self.op}: the cg linear solve of the implicit gradient did not reach its tolerance; the Hessian at the "
            "adapted params is not positive definite (raise proximal), or the steps have diverged (lower the rate), or "
            "pass cg_steps, and look at the residual in the report"
        )

    def system(self, eps: float) -> Options:
        """The same as the options of a linear solve."""
        tolerance = eps ** (2 / 3) if self.cg_steps is None else eps
        return Options("argmin", len, None, "cg", tolerance, tolerance, self.cg_steps, "raise")


def bilevel_plan(
    kind: type[Plan],
    op: str,
    inner_loss: Any,
    outer_loss: Any,
    optimizer: Any,
    steps: int,
    method: Method,
    last: int | None,
    proximal: float | None,
    cg_steps: int | None,
    stateful: bool,
) -> Plan:
    """A plan, of the framework's kind, of which hyperparameters alone are differentiated."""
    if method in ("first_order", "reptile"):
        raise StrategyError(
            f"{op}: method={method!r} holds the gradients constant, through which meta is felt; pass "
            "method='truncate', last=1 for the cheapest gradient in meta"
        )
    refuse_unmade(op, optimizer)
    losses = {"inner_loss": of_pair(inner_loss), "outer_loss": of_pair(outer_loss)}
    proximal = 0.0 if method == "implicit" and proximal is None else proximal
    return kind(op, losses, on_first(optimizer), steps, method, last, proximal, cg_steps, stateful)


def refuse_unmade(op: str, optimizer: Any) -> None:
    """Refuse the function that makes an optimiser of a rate, which would take the parameters for the rate."""
    home = getattr(optimizer, "__module__", None) or ""
    if not _is_pair(optimizer) and home.startswith(("optax.", "gradlab.transforms.optimizers")):
        name = getattr(optimizer, "__name__", type(optimizer).__name__)
        raise KindError(f"{op}: optimizer is the function {name}; call it with a rate, as in {name}(0.01)")


def on_first(optimizer: Any) -> Any:
    """An optimiser of params, or a function of meta that gives one, for the tree (params, meta)."""
    if not _is_pair(optimizer):
        return (lambda both: on_first(optimizer(both[1]))) if callable(optimizer) else optimizer

    def update(gradients: Any, state: Any, both: Any) -> Any:
        updates, state = optimizer.update(gradients[0], state, both[0])
        return (updates, gradients[1]), state  # nothing, for what is not adapted

    return Optimizer(lambda both: optimizer.init(both[0]), update)


def of_pair(loss: Any) -> Any:
    """loss(params, meta, *data) as a function of the one tree (params, meta); what is no function as it stands."""
    return (lambda both, *data: loss(*both, *data)) if callable(loss) else loss


def segments(steps: int) -> tuple[int, int, int]:
    """Steps in a segment, segments, and steps left over: about √steps of each kind are kept at once."""
    length = math.isqrt(steps - 1) + 1
    return length, *divmod(steps, length)


def shape_of(leaf: Any) -> Any:
    """The shape of an array; None of what is none, or an array of objects."""
    return None if str(getattr(leaf, "dtype", "")) == "object" else getattr(leaf, "shape", None)


def task_count(op: str, shapes: dict[str, Any], empty: str) -> int:
    """The number of tasks, from the shape of every leaf of the data by name."""
    first = None
    for name, shape in shapes.items():
        if shape is None or not len(shape):
            given = "no array of numbers" if shape is None else "a scalar"
            raise InputError(f"{op}: {name} is {given}; pass arrays with a leading axis of tasks")
        if first is None:
            first = name
        if shape[0] != shapes[first][0]:
            raise InputError(
                f"{op}: {first} has {shapes[first][0]} tasks on its leading axis, {name} has {shape[0]}; stack "
                "the tasks, all of one shape (pad the smaller ones, with weights in the loss)"
            )
    if first is None or not shapes[first][0]:
        raise InputError(f"{op}: {empty} hold no tasks; pass at least one")
    return shapes[first][0]


def check_pair(
    op: str, pair: Any, name: str = "tasks", parts: tuple[str, str] = ("support", "query")
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Two tuples of data: (support, query)."""
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
        raise InputError(f"{op}: {name} is not a pair; pass ({parts[0]}, {parts[1]}), each a tuple of arrays")
    for part, data in zip(parts, pair, strict=True):
        if not isinstance(data, (tuple, list)):
            raise KindError(
                f"{op}: {part} is a {type(data).__name__}; pass a tuple, of what the loss takes after params"
            )
    return tuple(pair[0]), tuple(pair[1])


def _is_pair(optimizer: Any) -> bool:
    return callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))


def _positive(op: str, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{op}: {name} is {value!r}; pass a positive whole number")
