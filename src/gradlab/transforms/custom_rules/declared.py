"""What a rule is declared with, before and after its framework is known."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cached_property, update_wrapper, wraps
from operator import itemgetter
from typing import Any, TypeVar

from gradlab._dispatch import framework_of
from gradlab._errors import KindError, StrategyError

Contract = TypeVar("Contract", bound=Callable[..., Any])


class Declared:
    """A function with a rule: its name in messages, its arguments by position, which of them are static."""

    op = ""

    def __init__(self, f: Callable[..., Any], nondiff_argnums: Sequence[int] = (), *, check: bool = False):
        if not callable(f):
            raise KindError(f"{self.op}: f is a {type(f).__name__}; pass the function, or decorate it")
        numbers = (nondiff_argnums,) if isinstance(nondiff_argnums, int) else tuple(nondiff_argnums)
        if not all(isinstance(i, int) and i >= 0 for i in numbers):
            raise KindError(f"{self.op}: nondiff_argnums is {nondiff_argnums!r}; pass positions, as (0, 2)")
        self.f, self.static, self.check = f, numbers, check
        self.name = getattr(f, "__name__", type(f).__name__)
        self.definitions: dict[str, tuple[Any, ...]] = {}
        update_wrapper(self, f, updated=())  # type: ignore[arg-type]

    def define(self, how: str, *rules: Any) -> None:
        """Keep the functions that a method `how` of the rule was given."""
        for rule in rules:
            if not callable(rule):
                raise KindError(f"{self.op}: .{how} was given a {type(rule).__name__}; pass functions")
        self.definitions[how] = rules

    def defined(self, how: str) -> tuple[Any, ...]:
        """The functions given to the method `how`."""
        if how not in self.definitions:
            raise StrategyError(
                f"{self.op}: {self.name} has no rule yet; give it one with {self.name}.{how}(...)"
            )
        return self.definitions[how]

    @cached_property
    def signature(self) -> inspect.Signature:
        """Of f."""
        return inspect.signature(self.f)

    @cached_property
    def width(self) -> int:
        """How many arguments f has with its defaults; 0 where it does not say."""
        try:
            kinds = [parameter.kind for parameter in self.signature.parameters.values()]
        except (TypeError, ValueError):
            return 0
        return sum(kind in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD) for kind in kinds)

    def positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments by position, with f's defaults."""
        if kwargs or len(args) < self.width:
            bound = self.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            if bound.kwargs:
                raise KindError(
                    f"{self.op}: {self.name} takes {', '.join(bound.kwargs)} by keyword alone, and a rule knows "
                    "positions; make it positional"
                )
            args = bound.args
        if self.static and max(self.static) >= len(args):
            raise KindError(
                f"{self.op}: nondiff_argnums holds {max(self.static)}, {self.name} was called with {len(args)} "
                "arguments; pass positions of its arguments"
            )
        return args

    def split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The static arguments, and the others."""
        if not self.static:
            return (), args
        moving = tuple(arg for i, arg in enumerate(args) if i not in self.static)
        return tuple(args[i] for i in self.static), moving

    def joined(self, static: tuple[Any, ...], moving: Sequence[Any]) -> tuple[Any, ...]:
        """All arguments, from the static ones and the others."""
        if not static:
            return tuple(moving)
        args = list(moving)
        for i, arg in sorted(zip(self.static, static, strict=True), key=itemgetter(0)):
            args.insert(i, arg)
        return tuple(args)

    def argument(self, i: int) -> str:
        """The name of argument number i of those that are not static."""
        position = [k for k in range(i + len(self.static) + 1) if k not in self.static][i]
        try:
            return list(self.signature.parameters)[position]
        except (IndexError, TypeError, ValueError):
            return f"argument {position}"

    def verify(self, args: tuple[Any, ...]) -> None:
        """Prove the rule at these arguments, once; raises CheckError where a claim fails."""
        from gradlab import check

        static, moving = self.split(args)
        self.check = False  # the calls that prove it are not proven
        try:
            report = check.derivatives(lambda x: self(*self.joined(static, x)), moving, compiled=False)  # type: ignore[operator]
        finally:
            self.check = True
        if report.failed:
            report.raise_if_failed()
        self.check = False


class Declaration(Declared):
    """A rule declared before its framework is known, which that of the arguments decides at each call."""

    def __init__(self, op: str, f: Callable[..., Any], nondiff_argnums: Sequence[int], check: bool):
        self.op = op
        super().__init__(f, nondiff_argnums, check=check)
        self._bound: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's value; its derivative is the rule."""
        return self._in(framework_of(self.op, (*args, kwargs)))(*args, **kwargs)

    def _in(self, framework: str) -> Any:
        """The same rule bound to a framework."""
        if framework not in self._bound:
            if framework == "torch":
                import gradlab.torch as namespace
            else:
                import gradlab.jax as namespace  # type: ignore[no-redef]
            rule = getattr(namespace, self.op)(self.f, self.static, check=self.check)
            for how, functions in self.definitions.items():
                getattr(rule, how)(*functions)
            self._bound[framework] = rule
        return self._bound[framework]

    def _declare(self, how: str, *rules: Any) -> None:
        self.define(how, *rules)
        self._bound.clear()
        if "torch" in sys.modules:  # made now, since torch.compile cannot make it while it traces
            self._in("torch")

    def defvmap(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Give a batched form of f: `rule(axis_size, in_batched, *args) -> (out, out_batched)`."""
        self._declare("defvmap", rule)
        return rule


class CotangentRule(Declaration):
    """`custom_vjp` before its framework is known."""

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        """Give the rule: `fwd(*args) -> (out, residuals)`, `bwd(*static, residuals, u) -> cotangents`."""
        self._declare("defvjp", fwd, bwd)


class TangentRule(Declaration):
    """`custom_jvp` before its framework is known."""

    def defjvp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Give the rule: `rule(*static, primals, tangents) -> (out, tangent)`."""
        self._declare("defjvp", rule)
        return rule


def declaration(contract: Contract) -> Contract:
    """Make the public function of a contract: one that declares a rule for both frameworks."""
    op = contract.__name__
    kind = CotangentRule if op == "custom_vjp" else TangentRule

    @wraps(contract)
    def declare(f: Any, nondiff_argnums: Sequence[int] = (), *, check: bool = False) -> Declaration:
        return kind(op, f, nondiff_argnums, check)

    return declare  # type: ignore[return-value]
