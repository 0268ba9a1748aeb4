"""Two implementations of one function, one in each framework, compared value by value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from gradlab.check import _jax, _torch
from gradlab.check.claims import Checked
from gradlab.check.judge import agreed
from gradlab.check.report import FAILED, PASSED, Report, Row

WORDS = "jax gives"


def report(
    f_jax: Callable[..., Any], f_torch: Callable[..., Any], x: Any, args: Any, order: int, seed: int
) -> Report:
    """Both in float64 on the same numbers: values, then pullbacks and pushforwards, then Hessian products."""
    of_torch = _torch.Subject(*_torch.real_form(f_torch, _tensors(x), False), _tensors(args), False)
    with jax.enable_x64(True):
        wide = _jax.real_form(f_jax, _arrays(x), False)
        of_jax = _jax.Subject(*wide, _arrays(args), False, wide=True)
    shapes = of_torch.output.shapes, of_jax.output.shapes
    same = shapes[0] == shapes[1]
    message = "" if same else f"torch gives outputs of shapes {shapes[0]}, jax of {shapes[1]}"
    rows = [Row("structure", PASSED if same else FAILED, message=message)]
    return Report(
        "torch against jax", "float64", rows + (_compared(of_torch, of_jax, order, seed) if same else [])
    )


def _compared(of_torch: Any, of_jax: Any, order: int, seed: int) -> list[Row]:
    c = Checked(of_torch, None, seed, directions=1)
    v, u = c.directions[0], c.cotangent()
    of_torch.weigh(u)
    of_jax.weigh(u)
    where, output = of_torch.where, of_torch.where_output
    claims: list[tuple[str, np.ndarray, Callable[..., str]]] = [("value", v, output), ("jvp", v, output)]
    claims += [("vjp", u, where)] + ([("product", v, where)] if order == 2 else [])

    def row(name: str, seed: np.ndarray, place: Callable[[int], str]) -> Row:
        def of(subject: Any) -> Callable[..., np.ndarray]:
            one = getattr(subject, name)
            return lambda _, x, seed: one(x) if name == "value" else one(x, seed)

        claim, linear = "hvp" if name == "product" else name, name != "value"
        return agreed(claim, of(of_torch), of(of_jax), seed, c, place, WORDS, linear)

    return [row(*claim) for claim in claims]


def _sorted(tree: Any, convert: Callable[[Any], Any]) -> Any:
    """The tree with its leaves converted and its dictionaries in jax's order of keys."""
    if isinstance(tree, dict):
        return {key: _sorted(tree[key], convert) for key in sorted(tree)}
    if type(tree) in (list, tuple):
        return type(tree)(_sorted(child, convert) for child in tree)
    return convert(tree)


def _numbers(leaf: Any) -> Any:
    """A float leaf of either framework as a wide numpy array; anything else as it stands."""
    if isinstance(leaf, (torch.Tensor, jax.Array, np.ndarray)):
        array = np.asarray(leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf)
        wide = {"f": np.float64, "c": np.complex128}.get(array.dtype.kind)
        return array if wide is None else array.astype(wide)
    return leaf


def _tensors(tree: Any) -> Any:
    return _sorted(
        tree, lambda leaf: torch.as_tensor(a) if isinstance(a := _numbers(leaf), np.ndarray) else a
    )


def _arrays(tree: Any) -> Any:
    return _sorted(tree, lambda leaf: jnp.asarray(a) if isinstance(a := _numbers(leaf), np.ndarray) else a)
