"""A function of torch called from jax: a primitive whose tangents, cotangents and batches are calls of its kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from torch._subclasses.fake_tensor import FakeTensorMode

from gradlab._errors import BackendError, KindError, StrategyError
from gradlab.interop.arrays import X64, array, tensor
from gradlab.interop.calls import ARRAY, Batched, Call, Constant, Flat, Foreign, Pulled, Pushed, of_live, put
from gradlab.transforms.linearised._torch import linearise

OP = "as_jax"


def as_jax(f: Callable[..., Any]) -> Foreign:
    def make(structure: Any, constants: tuple[Any, ...], forms: Any) -> Call:
        def flat(*xs: Any) -> list[Any]:
            rest = iter(xs)
            leaves = [next(rest) if c is ARRAY else c.value for c in constants]
            args, kwargs = jax.tree.unflatten(structure, leaves)
            paths, call.output = jax.tree_util.tree_flatten_with_path(f(*args, **kwargs))
            return [checked(function, path, y) for path, y in paths]

        call = Call(flat, Torch())
        return call

    function = FromJax(OP, f, make)
    return function


def checked(function: Foreign, path: Any, y: Any) -> Any:
    """An output that is a tensor."""
    if isinstance(y, torch.Tensor):
        return y
    raise KindError(
        f"{OP}: {function.name} returned a {type(y).__name__} at output{jax.tree_util.keystr(path)}, which jax "
        "cannot differentiate or compile; return tensors, in tuples, lists and dicts"
    )


class Torch:
    """Reverse mode alone, with faulty operations repaired, as everywhere in gradlab.torch."""

    def runs(self, flat: Flat) -> Flat:
        return flat

    def push(self, flat: Flat, live: Sequence[int], floats: Sequence[int]) -> Flat:
        def pushed(*args: Any) -> Any:
            n = len(args) - len(live)
            return self.line(flat, args[:n], live, floats).push(list(args[n:]))

        return pushed

    def pull(self, flat: Flat, live: Sequence[int], floats: Sequence[int]) -> Flat:
        def pulled(*args: Any) -> Any:
            n = len(args) - len(floats)
            us = [u.conj() for u in args[n:]]
            return [ct.conj() for ct in self.line(flat, args[:n], live, floats).pull(us)]

        return pulled

    def batch(self, flat: Flat, dims: Sequence[int | None]) -> Flat:
        return torch.func.vmap(flat, tuple(dims), randomness="different")

    def line(self, flat: Flat, xs: Any, live: Any, floats: Any) -> Any:
        function = of_live(flat, xs, live, floats)
        return linearise(lambda some: (function(*some), None), [xs[i] for i in live], flat)


class FromJax(Foreign):
    """A function of torch, called with jax arrays."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays = (jax.Array, np.ndarray, np.generic)
        kinds = arrays if any(isinstance(leaf, arrays) for leaf in leaves) else (*arrays, float)
        xs, constants = [], []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                raise BackendError(
                    f"{OP}: {self.name} was given a tensor of torch; pass jax arrays, or close over it"
                )
            constants.append(ARRAY if isinstance(leaf, kinds) else Constant(leaf))
            if isinstance(leaf, kinds):
                xs.append(jnp.asarray(leaf))
        call = self.call(structure, tuple(constants), tuple((x.shape, x.dtype) for x in xs))
        ys = bind(call, xs)
        return jax.tree.unflatten(call.output, ys)


def run(call: Call, xs: Sequence[Any]) -> list[Any]:
    """The outputs for tensors of its own, without a graph."""
    with torch.enable_grad():
        ys = call.flat(*xs)
    return [y.detach() for y in ys]


def numbers(*xs: Any, call: Call) -> list[Any]:
    """For jax arrays with numbers, on their device; f may change its tensors, and keep those that it returns."""
    given = [tensor(OP, f"argument {i}", x, copy=True) for i, x in enumerate(xs)]
    ys = run(call, given)
    if call.forms is None:
        call.forms = forms(ys)
    return [array(OP, f"output {i}", y, copy=True) for i, y in enumerate(ys)]


def bind(call: Call, xs: Sequence[Any]) -> list[Any]:
    """The outputs as jax arrays, traced where the arguments are."""
    return called_p.bind(*xs, call=call)


def on_host(call: Call, device: str, *xs: Any) -> list[np.ndarray]:
    """The same in compiled code, which calls Python with arrays of the host."""
    return [to_numpy(y) for y in run(call, [from_numpy(np.asarray(x)).to(device) for x in xs])]


def from_numpy(x: np.ndarray) -> torch.Tensor:
    """A copy as a tensor; numpy has a bfloat16 that torch does not know."""
    if x.dtype == ml_dtypes.bfloat16:
        return torch.tensor(x.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(x)


def to_numpy(y: torch.Tensor) -> np.ndarray:
    """And back."""
    y = y.cpu().resolve_conj().resolve_neg().contiguous()
    if y.dtype == torch.bfloat16:
        return y.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    narrow = y.dtype in (torch.int64, torch.uint64) and not jax.config.jax_enable_x64  # type: ignore[attr-defined]
    return y.to(torch.int32).numpy() if narrow else y.numpy()


def forms(ys: Sequence[torch.Tensor]) -> list[ShapedArray]:
    """Shapes and dtypes that jax has for tensors."""
    wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    for i, y in enumerate(ys):
        if y.dtype in (torch.float64, torch.complex128) and not wide:
            raise KindError(
                f"{OP}: output {i} is {y.dtype}, and jax would make it 32 bits; {X64}, or convert it"
            )
    name = lambda y: str(y.dtype).removeprefix("torch.")
    return [ShapedArray(tuple(y.shape), jax.dtypes.canonicalize_dtype(jnp.dtype(name(y)))) for y in ys]


def without_axis(x: Any, axis: int | None) -> ShapedArray:
    """The form of an array less an axis."""
    shape = x.shape if axis is None else (*x.shape[:axis], *x.shape[axis + 1 :])
    return ShapedArray(shape, x.dtype)


def shapes(call: Call, avals: Sequence[Any]) -> list[ShapedArray]:
    """The forms of a call's outputs."""
    if isinstance(call, Pushed):
        outputs = shapes(call.of, avals[: len(avals) - len(call.live)])
        return [outputs[i] for i in call.floats]
    if isinstance(call, Pulled):
        return [without_axis(avals[i], None) for i in call.live]
    if isinstance(call, Batched):
        size = next(x.shape[d] for x, d in zip(avals, call.dims, strict=True) if d is not None)
        outputs = shapes(call.of, list(map(without_axis, avals, call.dims)))
        return [ShapedArray((size, *y.shape), y.dtype) for y in outputs]
    if call.forms is None:
        call.forms = found_without_numbers(call, avals)
    return call.forms


def found_without_numbers(call: Call, avals: Sequence[Any]) -> list[ShapedArray]:
    """The forms of what f returns, which it runs for on tensors that have a shape alone."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            ys = run(call, [torch.empty(x.shape, dtype=getattr(torch, str(x.dtype))) for x in avals])
    except Exception as error:
        raise StrategyError(
            f"{OP}: to compile or linearise f, jax asks for the shapes of its output, and f fails on tensors without "
            f"numbers ({type(error).__name__}: {str(error).splitlines()[0]}); where that is because f looks at its "
            "numbers, call the function once as it is, outside of jit and grad, on arrays of these shapes"
        ) from error
    return forms(ys)


def _batched(args: Any, dims: Any, *, call: Call) -> Any:
    ys = bind(call.batched(dims), args)
    return ys, [0] * len(ys)


def _jvp(primals: Any, tangents: Any, *, call: Call) -> Any:
    ys = bind(call, primals)
    live = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]
    floats = [i for i, y in enumerate(ys) if jnp.issubdtype(y.dtype, jnp.inexact)]
    ts = [ad.Zero(jax.typeof(y).to_tangent_aval()) for y in ys]
    if live and floats:
        moved = bind(call.pushed(live, floats), [*primals, *(tangents[i] for i in live)])
        ts = put(ts, floats, moved)
    return ys, ts


def _transposed(cotangents: Any, *args: Any, call: Call) -> list[Any]:
    linear = [i for i, x in enumerate(args) if ad.is_undefined_primal(x)]
    args = tuple(x.aval if i in linear else x for i, x in enumerate(args))
    cts = [jnp.asarray(ad.instantiate_zeros(ct)) for ct in cotangents]
    return put([None] * len(args), linear, transposed(call, linear, args, cts))


def transposed(call: Call, linear: Sequence[int], args: Sequence[Any], cts: Sequence[Any]) -> Sequence[Any]:
    """The cotangents of the arguments in which a call is linear."""
    if isinstance(call, Pushed):
        n = len(args) - len(call.live)
        return bind(call.of.pulled([call.live[i - n] for i in linear], call.floats), [*args[:n], *cts])
    if isinstance(call, Pulled):
        n = len(args) - len(call.floats)
        return bind(call.of.pushed(call.live, [call.floats[i - n] for i in linear]), [*args[:n], *cts])
    if isinstance(call, Batched):
        return batched_transpose(call, linear, args, cts)
    floats = [i for i, ct in enumerate(cts) if jnp.issubdtype(ct.dtype, jnp.inexact)]
    ones = [
        jnp.ones(args[i].shape, args[i].dtype) for i in linear
    ]  # a linear call has one pullback everywhere
    return bind(call.pulled(linear, floats), [*put(args, linear, ones), *(cts[i] for i in floats)])


def batched_transpose(call: Batched, linear: Sequence[int], args: Sequence[Any], cts: Sequence[Any]) -> Any:
    """Of each example; what examples share has the sum."""
    known = [i for i in range(len(args)) if i not in linear]

    def one(some: Sequence[Any], cts: Sequence[Any]) -> Sequence[Any]:
        unknown = [without_axis(args[i], call.dims[i]) for i in linear]
        placed = put(put(args, known, some), linear, unknown)
        return transposed(call.of, linear, placed, cts)

    found = jax.vmap(one, ([call.dims[i] for i in known], 0))([args[i] for i in known], cts)
    dims = [call.dims[i] for i in linear]
    return [x.sum(0) if d is None else jnp.moveaxis(x, 0, d) for x, d in zip(found, dims, strict=True)]


def _compiled(device: str) -> Callable[..., Any]:
    def called(*xs: Any, call: Call) -> Any:
        forms = [jax.ShapeDtypeStruct(y.shape, y.dtype) for y in shapes(call, list(map(jax.typeof, xs)))]
        return jax.pure_callback(partial(on_host, call, device), forms, *xs)

    return mlir.lower_fun(called, multiple_results=True)


called_p = Primitive("gradlab_torch")
called_p.multiple_results = True
called_p.def_impl(numbers)
called_p.def_abstract_eval(lambda *avals, call: shapes(call, avals))
ad.primitive_jvps[called_p] = _jvp
ad.primitive_transposes[called_p] = _transposed
batching.primitive_batchers[called_p] = _batched
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(called_p, _compiled(_platform), platform=_platform)
