from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import gradlab.torch as gl
from gradlab.check.claims import entry_name, natural_scales, rows
from gradlab.check.report import Report
from gradlab.transforms.repairs._torch import repaired
from gradlab.transforms.trees._torch import Tree, tree_function

OP = "check.derivatives"


def report(f: Callable[..., Any], x: Any, args: Any, order: int, has_aux: bool, seed: int) -> Report:
    """Check f in its own dtype, with a float64 run of the same function as its shadow, where it has one."""
    subject = Subject(f, x, args, has_aux)
    shadow = None
    if subject.tree.dtype != torch.float64:
        x, args = pytree.tree_map(_widened, (x, args))
        shadow = _shadow(f, x, args, has_aux, nullcontext) or _shadow(f, x, args, has_aux, Widened)
    return Report("torch", str(subject.tree.dtype).removeprefix("torch."), rows(subject, shadow, order, seed))


def _shadow(f: Any, x: Any, args: Any, has_aux: Any, within: Callable[[], Any]) -> Subject | None:
    """The float64 run of f; None where an operation meets a tensor of another dtype, or has no such form."""
    try:
        shadow = Subject(f, x, args, has_aux, within)
        shadow.gradient(shadow.x)
    except RuntimeError:
        return None
    return shadow if shadow.output.dtype == torch.float64 else None


class Widened(TorchFunctionMode):
    """While active, every operation runs in float64: what f closes over too, which torch does not promote."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        narrow = args and isinstance(args[0], torch.Tensor) and _widened(args[0]) is not args[0]
        if narrow and (name in ("__setitem__", "set_") or (name.endswith("_") and not name.endswith("__"))):
            raise RuntimeError(f"{name} writes into a {args[0].dtype} tensor of f's own")
        if name in ("float", "half", "bfloat16"):
            func = torch.Tensor.double
        return func(*map(_widened, args), **{key: _widened(value) for key, value in kwargs.items()})


def _widened(leaf: Any) -> Any:
    if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
        return torch.float64
    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64:
        return leaf.double()
    return type(leaf)(map(_widened, leaf)) if type(leaf) in (list, tuple) else leaf


class Subject:
    """f at x as torch differentiates it: flat numpy float64 vectors in and out."""

    def __init__(
        self, f: Callable[..., Any], x: Any, args: Any, has_aux: bool, within: Callable[[], Any] = nullcontext
    ):
        self.within = within  # the mode in which everything of f runs
        detach = lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
        x, args = pytree.tree_map(detach, x), pytree.tree_map(detach, args)
        self.tree = Tree(OP, "x", x)
        self.given = [
            leaf for leaf in pytree.tree_leaves((self.tree.leaves, args)) if isinstance(leaf, torch.Tensor)
        ]
        before = [leaf.clone() for leaf in self.given]
        self.function, output = tree_function(OP, f, self.tree, args, has_aux)
        with within():
            outputs, _ = self.function(self.tree.leaves)
        changed = [i for i, (a, b) in enumerate(zip(self.given, before, strict=True)) if not _same(a, b)]
        self.changed = ["x" if i < len(self.tree.leaves) else "args" for i in changed]
        self.output = output([y.detach() for y in outputs])
        self.n, self.scalar = self.tree.size, self.output.shapes == [()]
        self.eps = torch.finfo(self.tree.dtype).eps
        self.x = self._numpy(self.tree.ravel(self.tree.leaves))
        self.weights = np.ones(1) if self.scalar else np.random.default_rng(1).normal(size=self.output.size)
        self.u = torch.as_tensor(self.weights, dtype=self.output.dtype, device=self.output.leaves[0].device)

    def flat(self, z: Any) -> Any:
        """f on flat vectors."""
        return self.output.ravel(self.function(self.tree.split(z))[0])

    def weighted(self, z: Any) -> Any:
        """The scalar u·f that second-order claims are about; f itself when it is scalar."""
        return self.flat(z) @ self.u

    def value(self, x: np.ndarray) -> np.ndarray:
        return self._run(self.flat, x)

    def mutated(self) -> str:
        return self.changed[0] if self.changed else ""

    def jvp(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        return self._run(lambda x, v: torch.func.jvp(self.flat, (x,), (v,))[1], x, v)

    def vjp(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        return self._run(lambda x, u: _pulled(self.flat, x, u, create_graph=False), x, u)

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return self._run(lambda x: _pulled(self.weighted, x, None, create_graph=False), x)

    def second(self, x: np.ndarray, v: np.ndarray, how: str) -> np.ndarray:
        def forward_over_reverse(x: Any, v: Any) -> Any:
            return torch.func.jvp(torch.func.grad(repaired(self.weighted)), (x,), (v,))[1]

        def reverse_over_reverse(x: Any, v: Any) -> Any:
            return _pulled(
                lambda x: _pulled(self.weighted, x, None, create_graph=True), x, v, create_graph=False
            )

        def product(x: Any, v: Any) -> Any:
            point, direction = self.tree.put(self.tree.split(x)), self.tree.like(self.tree.split(v))
            return self.tree.ravel(Tree(OP, "v", gl.hvp(self.of_tree, point, direction)).leaves)

        ways = {
            "hvp": product,
            "forward over reverse": forward_over_reverse,
            "reverse over reverse": reverse_over_reverse,
        }
        return self._run(ways[how], x, v)

    def hessian(self, x: np.ndarray) -> np.ndarray:
        return self._run(lambda x: gl.hessian(self.weighted, x), x)

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

    def _run(self, function: Callable[..., Any], *vectors: np.ndarray) -> np.ndarray:
        first = self.tree.leaves[0]
        arrays = [torch.tensor(v, dtype=self.tree.dtype, device=first.device) for v in vectors]
        with self.within():
            return self._numpy(function(*arrays))

    def _numpy(self, array: Any) -> np.ndarray:
        return array.detach().to(torch.float64).cpu().numpy()


def _pulled(f: Callable[..., Any], x: Any, u: Any, create_graph: bool) -> Any:
    """Reverse mode by torch.autograd.grad, which every autograd.Function supports; zeros where f ignores x."""
    x = x if x.requires_grad else x.clone().requires_grad_()
    y = f(x)
    if not y.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(y, x, u, create_graph=create_graph, materialize_grads=True)[0]


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
