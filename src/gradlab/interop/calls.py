"""A function of one framework's arrays, and the functions of arrays that its derivatives and batches are.

Whichever framework asks, a tangent of f is another function of that framework, `f.pushed(...)`, and so are a cotangent
and a batch of f: each made of f by f's own framework. So nests of any order are nothing new. Each is made once, so
that compiled code is used again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from gradlab._errors import KindError

Flat = Callable[..., Sequence[Any]]  # of arrays, one positional argument each
CALLS = 512  # of one function, by structure, shapes and constants of its arguments, that are remembered


class Engine(Protocol):
    """How a framework makes one flat function of another; `live` are arguments and `floats` outputs, by number."""

    def runs(self, flat: Flat) -> Flat:
        """The function as it is to be called with numbers: compiled, if the framework compiles."""

    def push(self, flat: Flat, live: Sequence[int], floats: Sequence[int]) -> Flat:
        """The tangent: of the arguments and then the tangents of those that live."""

    def pull(self, flat: Flat, live: Sequence[int], floats: Sequence[int]) -> Flat:
        """The cotangents of the live arguments: of the arguments and then cotangents of the floats."""

    def batch(self, flat: Flat, dims: Sequence[int | None]) -> Flat:
        """The function mapped over these axes, with the batch on the leading axis of every output."""


class Call:
    """A function of one framework's arrays that another one is to differentiate."""

    def __init__(self, flat: Flat, engine: Any):
        self.flat, self.engine = flat, engine
        self.made: dict[Hashable, Any] = {}
        self.run = engine.runs(flat)
        self.forms: Any = None  # shapes and dtypes of outputs, where they are known
        self.output: Any = None  # the structure of what f returned, once it has run

    def pushed(self, live: Sequence[int], floats: Sequence[int]) -> Call:
        """J v."""
        return self.once(Pushed, tuple(live), tuple(floats))

    def pulled(self, live: Sequence[int], floats: Sequence[int]) -> Call:
        """Jᵀ u."""
        return self.once(Pulled, tuple(live), tuple(floats))

    def batched(self, dims: Sequence[int | None]) -> Call:
        """The same of a batch."""
        return self.once(Batched, tuple(dims))

    def once(self, kind: Any, *how: Any) -> Any:
        """What was made of this call in this way."""
        if (kind, how) not in self.made:
            self.made[kind, how] = kind(self, *how)
        return self.made[kind, how]


class Pushed(Call):
    """The tangents of a call."""

    def __init__(self, of: Call, live: tuple[int, ...], floats: tuple[int, ...]):
        super().__init__(of.engine.push(of.flat, live, floats), of.engine)
        self.of, self.live, self.floats = of, live, floats


class Pulled(Call):
    """The cotangents of a call."""

    def __init__(self, of: Call, live: tuple[int, ...], floats: tuple[int, ...]):
        super().__init__(of.engine.pull(of.flat, live, floats), of.engine)
        self.of, self.live, self.floats = of, live, floats


class Batched(Call):
    """A call under vmap."""

    def __init__(self, of: Call, dims: tuple[int | None, ...]):
        super().__init__(of.engine.batch(of.flat, dims), of.engine)
        self.of, self.dims = of, dims


def put(values: Sequence[Any], places: Sequence[int], some: Sequence[Any]) -> list[Any]:
    """The values with some others in these places."""
    values = list(values)
    for i, x in zip(places, some, strict=True):
        values[i] = x
    return values


def of_live(flat: Flat, xs: Sequence[Any], live: Sequence[int], floats: Sequence[int]) -> Callable[..., Any]:
    """The float outputs as a function of the arguments that live."""

    def function(*some: Any) -> list[Any]:
        ys = flat(*put(xs, live, some))
        return [ys[i] for i in floats]

    return function


@dataclass(frozen=True)
class Constant:
    """An argument that is no array, told from others by its type too: 1 is not True, nor 0.0 -0.0."""

    value: Any

    @property
    def key(self) -> Hashable:
        """What is equal where the constant is the same."""
        return type(self.value), repr(self.value) if isinstance(self.value, float) else self.value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


ARRAY = Constant("an array")  # stands in the place of one among constants


class Foreign:
    """What as_torch and as_jax return: f as a function of the other framework, called with trees."""

    def __init__(self, op: str, f: Callable[..., Any], make: Callable[..., Call]):
        if not callable(f):
            raise KindError(f"{op}: f is a {type(f).__name__}; pass a function")
        self.op, self.f = op, f
        self.name = getattr(f, "__name__", type(f).__name__)
        self.cached = lru_cache(CALLS)(make)
        self.make = make
        self.__name__ = f"{op}({self.name})"
        self.__doc__ = getattr(f, "__doc__", None)

    def __repr__(self) -> str:
        return self.__name__

    def call(self, structure: Any, constants: tuple[Any, ...], forms: tuple[Any, ...]) -> Call:
        """The call for arguments of this structure, with these constants (None for an array) and forms of arrays."""
        try:
            return self.cached(structure, constants, forms)
        except TypeError as error:
            if "unhashable" not in str(error):
                raise
            return self.make(structure, constants, forms)
