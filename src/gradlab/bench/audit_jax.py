"""jax's own operations, and optax's losses and equinox's layers, each at points where users meet it.

A case is two lines of Python: a point x and an expression in it, which are also its reproduction.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
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
from gradlab.transforms.linearised._jax import equations

FULL = {"jnp": "jax.numpy", "jsp": "jax.scipy", "lax": "jax.lax", "nn": "jax.nn", "eqx": "equinox"}
NAME = re.compile(r"(?<![\w.])(?:jnp|jsp|lax|nn|jax|optax|eqx)(?:\.\w+)+|odeint|x\.at")
METHOD = re.compile(r"\]\.(\w+)\(")
NAMES: dict[str, Any] = {
    "eqx": eqx, "jax": jax, "jnp": jnp, "jsp": jsp, "optax": optax, "lax": lax, "nn": nn,
    "odeint": odeint, "key": key, "normal": normal,
}  # fmt: skip
IMPORTS = {
    "eqx": "import equinox as eqx",
    "optax": "import optax",
    "jnp": "import jax.numpy as jnp",
    "jsp": "import jax.scipy as jsp",
    "lax": "from jax import lax",
    "nn": "from jax import nn",
    "odeint": "from jax.experimental.ode import odeint",
    "key": "from jax.random import key, normal",
}


def cases() -> Iterator[Operator]:
    """Every case, built when it is reached; in float64 only if the caller has enabled it."""
    for point, expression in lines():
        x = eval(point, NAMES)
        f = eval(f"lambda x: {expression}", NAMES)
        yield Operator(name(point, expression), f"{expression}, x = {point}", f, x, code(point, expression))


def nodes(operator: Operator) -> set[str]:
    """The names of the primitives that f is made of."""
    jaxpr = jax.make_jaxpr(operator.f)(operator.x).jaxpr
    return {equation.primitive.name for equation in equations(jaxpr)}


def lines() -> Iterator[tuple[str, str]]:
    """The point and the expression of every case."""
    for module, functions, points in ELEMENTWISE:
        for function in functions.split():
            yield from ((f"jnp.array({point})", f"{module}.{function}(x)") for point in points)
    for point, block in EXPRESSIONS:
        yield from ((point, line.strip()) for line in block.splitlines() if line.strip())


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


def code(point: str, expression: str) -> str:
    """A reproduction: what the checker says of this case."""
    used = set(re.findall(r"\w+", f"{point} {expression}"))
    imports = [line for word, line in IMPORTS.items() if word in used]
    return "\n".join(
        [
            "; ".join(["import jax", *imports, "from gradlab import check"]),
            'jax.config.update("jax_enable_x64", True)',
            f"x = {point}",
            f"print(check.derivatives(lambda x: {expression}, x))",
        ]
    )
