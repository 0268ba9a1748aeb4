"""What a jax optimiser's update computes, operation by operation: its roots made safe, its derivative looked for.

The slope of √v at v = 0 is infinite. Adam's update at a gradient of zero multiplies it by ∂v = 2 g ∂g = 0, and the
derivative is not-a-number. What optax computes cannot be changed, but its operations can be run again with another
rule for one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal

from gradlab.transforms.linearised._jax import has_primitive
from gradlab.transforms.rules._jax import sqrt

CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "checkpoint")
STEPS = ("sign", "round", "floor", "ceil", "convert_element_type", "argmax", "argmin", "custom_jvp_call")


def with_safe_roots(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, of trees of arrays, with `rules.sqrt` for its square roots."""

    def safe(*args: Any) -> Any:
        traced, shape = jax.make_jaxpr(f, return_shape=True)(*args)
        if not has_primitive("sqrt", traced.jaxpr):
            return f(*args)
        outputs = evaluated(traced.jaxpr, traced.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return safe


def evaluated(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    """The outputs of a jaxpr; control flow within it runs as it is."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else known[v]
    for equation in jaxpr.eqns:
        values = list(map(read, equation.invars))
        inner = equation.params.get("jaxpr") if equation.primitive.name in CALLS else None
        if equation.primitive.name == "sqrt":
            outputs = [sqrt(*values)]
        elif inner is not None:
            outputs = evaluated(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values)
        else:
            given = equation.primitive.get_bind_params(equation.params)
            functions, params = (
                given if isinstance(given, tuple) else ((), given)
            )  # as older versions have it
            found = equation.primitive.bind(*functions, *values, **params)
            outputs = found if equation.primitive.multiple_results else [found]
        known.update(zip(equation.outvars, outputs, strict=True))
    return list(map(read, jaxpr.outvars))


def is_cut_off(f: Callable[..., Any], x: Any) -> bool:
    """Whether f's derivative at the tree x is zero by its form, through no rounding and no sign of x."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)
    value = jax.make_jaxpr(f)(shapes).jaxpr
    slope = jax.make_jaxpr(lambda x, v: jax.jvp(f, (x,), (v,))[1])(shapes, shapes).jaxpr
    entries = len(jax.tree.leaves(shapes))
    follows = reached(value, value.invars) and not any(has_primitive(name, value) for name in STEPS)
    return follows and not reached(slope, slope.invars[entries:])


def reached(jaxpr: Any, variables: Any) -> bool:
    """Whether an output of a jaxpr depends on one of these inputs."""
    seen = set(variables)
    for equation in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in seen for v in equation.invars):
            seen.update(equation.outvars)
    return any(not isinstance(v, Literal) and v in seen for v in jaxpr.outvars)
