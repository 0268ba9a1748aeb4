"""jax's own operations, and optax's losses and equinox's layers, each at points where users meet it.

A case is two pieces of Python: a point x and an expression in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy as jsp
import jax.scipy.optimize
import jax.scipy.sparse.linalg
import optax
from jax import lax, nn
from jax.experimental.ode import odeint
from jax.random import key, normal

from gradlab.bench.audit import Operator
from gradlab.bench.audit_jax_table import ELEMENTWISE, EXPRESSIONS
from gradlab.bench.faults_jax import EXPLAINED, FAULTS
from gradlab.transforms.linearised._jax import equations

__all__ = ["EXPLAINED", "cases", "nodes"]

FULL = {"jnp": "jax.numpy", "jsp": "jax.scipy", "lax": "jax.lax", "nn": "jax.nn", "eqx": "equinox"}
NAME = re.compile(r"(?<![\w.])(?:jnp|jsp|lax|nn|jax|optax|eqx)(?:\.\w+)+|odeint|x\.at")
METHOD = re.compile(r"\]\.(\w+)\(")
NAMES: dict[str, Any] = {
    "eqx": eqx, "jax": jax, "jnp": jnp, "jsp": jsp, "optax": optax, "lax": lax, "nn": nn,
    "odeint": odeint, "key": key, "normal": normal,
}  # fmt: skip
SLOW = ("hyp2f1", "ctc_loss", "random.beta", "random.dirichlet")  # minutes of compilation at second order


def cases() -> Iterator[Operator]:
    """Every case; jax must be told to keep float64 where they are run."""
    for point, expression, order in lines():
        with jax.enable_x64(True):
            x, f = eval(point, NAMES), eval(f"lambda x: {expression}", NAMES)
        operation = name(point, expression)
        yield Operator(operation, f"{expression}, x = {point}", f, x, FAULTS.get(operation, ""), order)


def nodes(operator: Operator) -> set[str]:
    """The names of the primitives that f is made of."""
    jaxpr = jax.make_jaxpr(operator.f)(operator.x).jaxpr
    return {equation.primitive.name for equation in equations(jaxpr)}


def lines() -> Iterator[tuple[str, str, int]]:
    """The point, the expression and the order of every case: special functions to third, at one point."""
    for module, functions, points in ELEMENTWISE:
        for function, (k, point) in product(functions.split(), enumerate(points)):
            third = module == "jsp.special" and k == 0
            yield f"jnp.array({point})", f"{module}.{function}(x)", 3 if third else 2
    for point, block in EXPRESSIONS:
        for line in filter(None, map(str.strip, block.splitlines())):
            yield point, line, 1 if any(name in line for name in SLOW) else 2


def name(point: str, expression: str) -> str:
    """The operation's full name: the first that the expression calls, or else that its point holds."""
    found = NAME.search(expression) or NAME.search(point)
    if found is None:
        return expression
    if found[0] == "x.at":
        method = METHOD.search(expression)
        return f"jax.numpy.ndarray.at.{method[1] if method else 'get'}"
    if found[0] == "odeint":
        return "jax.experimental.ode.odeint"
    first, rest = found[0].split(".", 1)
    return f"{FULL.get(first, first)}.{rest}"
