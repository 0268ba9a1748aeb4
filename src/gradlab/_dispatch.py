"""Which framework do these arguments belong to?

A contract is a signature and a docstring; `operation` turns it into the function that looks at
its arguments, finds the framework they belong to, and calls the implementation of the same name
from `gradlab.jax` or `gradlab.torch`. Nothing is imported until a framework's own array has been
seen, so `import gradlab` stays free of both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar

from gradlab._errors import BackendError

Contract = TypeVar("Contract", bound=Callable[..., Any])


def operation(contract: Contract, within: str = "") -> Contract:
    """Make the public function of a contract: the same call, sent to the framework of its arguments.

    The implementations stand in gradlab.jax and gradlab.torch, or in a namespace of theirs.
    """
    name = contract.__name__
    full = f"{within}.{name}" if within else name

    @wraps(contract)
    def dispatched(*args: Any, **options: Any) -> Any:
        # Import statements, not importlib: torch.compile traces these, in a cold process too.
        if framework_of(full, args) == "torch":
            import gradlab.torch as namespace
        else:
            import gradlab.jax as namespace  # type: ignore[no-redef]
        holder = getattr(namespace, within) if within else namespace
        return getattr(holder, name)(*args, **options)

    return dispatched  # type: ignore[return-value]


def library(contract: Contract) -> Contract:
    """The public function of a contract whose implementations stand in gradlab.jax.rules and gradlab.torch.rules."""
    return operation(contract, "rules")


def framework_of(name: str, args: tuple[Any, ...]) -> str:
    """Return "jax" or "torch": the one framework whose arrays stand in the trees `args`.

    Raises:
        BackendError: arrays of both frameworks, or of neither.
    """
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    found: set[str] = set()
    for arg in args:
        _collect(arg, torch, jax, found)
    if len(found) == 1:
        return found.pop()
    given = "arrays of jax and of torch" if found else "no jax or torch array"
    namespaces = (
        f", or call gradlab.jax.{name} or gradlab.torch.{name}, which also take numpy arrays and numbers"
    )
    raise BackendError(
        f"{name}: the arguments hold {given}; convert them to one framework{'' if '.' in name else namespaces}"
    )


def refuse_foreign(op: str, name: str, leaf: Any, own: str) -> None:
    """Refuse an array of a framework in the namespace of the other."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    found: set[str] = set()
    _collect(leaf, torch, jax, found)
    for framework in found - {own}:
        raise BackendError(
            f"{op}: {name} is an array of {framework}; call gradlab.{framework}.{op}, or convert it"
        )


def _collect(tree: Any, torch: Any, jax: Any, found: set[str]) -> None:
    if torch is not None and isinstance(tree, (torch.Tensor, torch.nn.Module)):
        found.add("torch")
    elif jax is not None and isinstance(tree, jax.Array):
        found.add("jax")
    elif isinstance(tree, dict):
        for child in tree.values():
            _collect(child, torch, jax, found)
    elif isinstance(tree, (list, tuple)):
        for child in tree:
            _collect(child, torch, jax, found)
    elif tree is not None and not isinstance(tree, _ATOMS):
        _collect_registered(tree, torch, jax, found)


_ATOMS = (bool, int, float, complex, str, bytes, type(lambda: None), type(len))


def _collect_registered(tree: Any, torch: Any, jax: Any, found: set[str]) -> None:
    """Look into nodes that only a framework's own tree registry knows: equinox modules, dataclasses."""
    for flatten in (
        jax and jax.tree_util.tree_leaves,
        torch and import_module("torch.utils._pytree").tree_leaves,
    ):
        leaves: Any = flatten(tree) if flatten else ()
        if len(leaves) != 1 or leaves[0] is not tree:
            for leaf in leaves:
                if torch is not None and isinstance(leaf, torch.Tensor):
                    found.add("torch")
                elif jax is not None and isinstance(leaf, jax.Array):
                    found.add("jax")
