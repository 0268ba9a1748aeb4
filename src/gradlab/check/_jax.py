from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gradlab.jax as gl
from gradlab.check.claims import entry_name, natural_scales, rows
from gradlab.check.report import Report
from gradlab.transforms.trees._jax import Tree, tree_function

OP = "check.derivatives"


def report(f: Callable[..., Any], x: Any, args: Any, order: int, has_aux: bool, seed: int) -> Report:
    """Check f in its own dtype, with a float64 run of the same function as its shadow, where it has one."""
    subject = Subject(f, x, args, has_aux)
    shadow = None
    if subject.tree.dtype != jnp.float64:
        wide = lambda leaf: leaf.astype(jnp.float64) if _is_float(leaf) else leaf
        try:
            with jax.enable_x64(True):
                shadow = Subject(f, jax.tree.map(wide, x), jax.tree.map(wide, args), has_aux, wide=True)
        except TypeError:  # f closes over arrays of its own dtype, in an operation that does not promote
            shadow = None
    return Report("jax", str(subject.tree.dtype), rows(subject, shadow, order, seed))


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray)) and jnp.issubdtype(leaf.dtype, jnp.floating)


class Subject:
    """f at x as jax differentiates it: flat numpy float64 vectors in and out."""

    def __init__(self, f: Callable[..., Any], x: Any, args: Any, has_aux: bool, wide: bool = False):
        self.tree = Tree(OP, "x", x)
        self.function, output = tree_function(OP, f, self.tree, args, has_aux)
        outputs, _ = self.function(self.tree.leaves)
        self.output = output(outputs)
        self.mode = (lambda: jax.enable_x64(True)) if wide else nullcontext
        self.n, self.scalar = self.tree.size, self.output.shapes == [()]
        self.eps = float(jnp.finfo(self.tree.dtype).eps)
        self.x = self._numpy(self.tree.ravel(self.tree.leaves))
        self.weights = np.ones(1) if self.scalar else np.random.default_rng(1).normal(size=self.output.size)
        self.u = jnp.asarray(self.weights, self.output.dtype)
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def flat(self, z: Any) -> Any:
        """f on flat vectors."""
        return self.output.ravel(self.function(self.tree.split(z))[0])

    def weighted(self, z: Any) -> Any:
        """The scalar u·f that second-order claims are about; f itself when it is scalar."""
        return self.flat(z) @ self.u

    def value(self, x: np.ndarray) -> np.ndarray:
        return self._run("value", self.flat, x)

    def mutated(self) -> str:
        return ""  # jax arrays cannot be

    def jvp(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        return self._run("jvp", lambda x, v: jax.jvp(self.flat, (x,), (v,))[1], x, v)

    def vjp(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        return self._run("vjp", lambda x, u: jax.vjp(self.flat, x)[1](u)[0], x, u)

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return self._run("gradient", jax.grad(self.weighted), x)

    def second(self, x: np.ndarray, v: np.ndarray, how: str) -> np.ndarray:
        def forward_over_reverse(x: Any, v: Any) -> Any:
            return jax.jvp(jax.grad(self.weighted), (x,), (v,))[1]

        def reverse_over_reverse(x: Any, v: Any) -> Any:
            return jax.vjp(jax.grad(self.weighted), x)[1](v)[0]

        def product(x: Any, v: Any) -> Any:
            point, direction = self.tree.put(self.tree.split(x)), self.tree.like(self.tree.split(v))
            return self.tree.ravel(Tree(OP, "v", gl.hvp(self.of_tree, point, direction)).leaves)

        ways = {
            "hvp": product,
            "forward over reverse": forward_over_reverse,
            "reverse over reverse": reverse_over_reverse,
        }
        return self._run(how, ways[how], x, v)

    def hessian(self, x: np.ndarray) -> np.ndarray:
        return self._run("hessian", lambda x: gl.hessian(self.weighted, x), x)

    def of_tree(self, x: Any) -> Any:
        """u·f as a function of the user's own tree."""
        outputs, _ = self.function(Tree(OP, "x", x).leaves)
        return self.output.ravel(outputs) @ self.u

    def scales(self) -> np.ndarray:
        """A natural change of each entry: its size, or that of its leaf where it is nearly zero."""
        return natural_scales(self.x, self.tree.sizes)

    def where(self, i: int) -> str:
        return entry_name(self.tree, i)

    def where_output(self, i: int) -> str:
        return entry_name(self.output, i)

    def _run(self, name: str, function: Callable[..., Any], *vectors: np.ndarray) -> np.ndarray:
        """Compiled once; op by op where f looks at its values, which jit does not allow."""
        with self.mode():
            arrays = [jnp.asarray(v, self.tree.dtype) for v in vectors]
            run = self._compiled.setdefault(name, jax.jit(function))
            try:
                return self._numpy(run(*arrays))
            except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
                self._compiled[name] = function
                return self._numpy(function(*arrays))

    def _numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array, np.float64)
