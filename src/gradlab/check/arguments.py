"""A function, a point and its data as a command line names them, and numbers as arrays of a framework."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gradlab._dispatch import framework_of
from gradlab._errors import BackendError, InputError

FRAMEWORKS = ("jax", "torch")
COMPLEX = {"float64": "complex128"}  # and complex64 for the others
NO_LITERAL = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError)


def load(reference: str) -> Any:
    """What `module:name` or `path/to/file.py:name` names; the name may be dotted."""
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise InputError(f"{reference!r} is no module:name and no path/to/file.py:name")
    found: Any = _module(place)
    for attribute in name.split("."):
        if not hasattr(found, attribute):
            raise InputError(f"{place} has no {name}")
        found = getattr(found, attribute)
    return found


def _module(place: str) -> ModuleType:
    """A module by its name, from the current directory too, or a file."""
    path = Path(place)
    if path.suffix == ".py" and not path.is_file():
        raise InputError(f"there is no file {place}")
    folder = str(path.resolve().parent if path.suffix == ".py" else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return _from_file(path.resolve()) if path.suffix == ".py" else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == place.split(".")[0]:
            raise InputError(
                f"there is no module {error.name}, in the current directory or installed"
            ) from error
        raise InputError(f"importing {place} failed: {told(error)}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"importing {place} failed: {told(error)}") from error


def _from_file(path: Path) -> ModuleType:
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    spec = importlib.util.spec_from_file_location(path.stem if known is None else f"_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def told(error: BaseException) -> str:
    """An error in one line, with the place in the user's own files."""
    first = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    package = str(Path(__file__).parents[1])
    foreign = lambda name: "site-packages" in name or name.startswith((package, "<")) or "importlib" in name
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not foreign(frame.filename)]
    return f"{first} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else first


def read(text: str, floats: bool = False) -> tuple[Any, bool]:
    """A Python literal, a .npy or .npz file, or a name in a module; and whether it was a literal.

    Lists of numbers become numpy arrays; `floats`: integers and single numbers too.
    """
    if text.endswith((".npy", ".npz")):
        return _from_numpy(text), False
    try:
        return _numbers(ast.literal_eval(text), floats), True
    except NO_LITERAL as error:
        if isinstance(error, InputError):
            raise
    if ":" not in text:
        raise InputError(f"{text!r} is no Python literal, no .npy or .npz file and no module:name")
    found = load(text)
    if not (inspect.isroutine(found) or isinstance(found, partial)):
        return found, False
    try:
        return found(), False
    except Exception as error:
        raise InputError(f"{text}() raised {told(error)}") from error


def _from_numpy(path: str) -> Any:
    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {told(error)}") from error
    return dict(loaded) if path.endswith(".npz") else loaded


def _numbers(literal: Any, floats: bool) -> Any:
    """A literal's lists of numbers as arrays, its dicts and tuples as the tree around them."""
    if isinstance(literal, dict):
        return {key: _numbers(child, floats) for key, child in literal.items()}
    if isinstance(literal, tuple) or (isinstance(literal, list) and _holds_a_tree(literal)):
        return type(literal)(_numbers(child, floats) for child in literal)
    single = isinstance(literal, (int, float, complex)) and not isinstance(literal, bool)
    if not isinstance(literal, list) and not (floats and single):
        return literal
    try:
        array = np.asarray(literal)
    except ValueError as error:
        raise InputError(f"{literal} is ragged; write a tuple of lists for a tree") from error
    if array.dtype.kind not in "biufc":
        raise InputError(f"{literal} is not of numbers alone")
    return array.astype(np.float64) if (floats and array.dtype.kind in "iu") or not array.size else array


def _holds_a_tree(literal: list[Any]) -> bool:
    return any(
        isinstance(child, (dict, tuple)) or (isinstance(child, list) and _holds_a_tree(child))
        for child in literal
    )


def framework_for(trees: tuple[Any, ...], asked: str | None) -> str:
    """The framework asked for, else that of the arrays, else the one that is loaded."""
    try:
        held = framework_of("gradlab check", trees)
    except BackendError:
        held = None
    if asked and held and asked != held:
        raise InputError(f"the point and data hold arrays of {held}; leave out --framework {asked}")
    loaded = [name for name in FRAMEWORKS if sys.modules.get(name) is not None]
    chosen = asked or held or (loaded[0] if len(loaded) == 1 else None)
    if chosen is None:
        given = "both jax and torch" if loaded else "neither jax nor torch"
        raise InputError(f"which framework? your file imports {given}; pass --framework jax or torch")
    if importlib.util.find_spec(chosen) is None:
        raise InputError(f"{chosen} is not installed; pip install 'gradlab[{chosen}]'")
    return chosen


def arrays(tree: Any, framework: str, dtype: str | None) -> Any:
    """The tree with its numpy arrays as the framework's, and all floats of the dtype, where one is given."""
    convert, mapped, _ = _tools(framework)
    return mapped(lambda leaf: convert(leaf, dtype), tree)


def dtype_of(tree: Any, framework: str) -> str | None:
    """The dtype of the first float array of a tree."""
    _, _, leaves = _tools(framework)
    names = (str(getattr(leaf, "dtype", "")).removeprefix("torch.") for leaf in leaves(tree))
    known = {"complex64": "float32", "complex128": "float64"}
    return next(
        (known.get(name, name) for name in names if name.startswith(("float", "bfloat", "complex"))), None
    )


def _tools(framework: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Of a framework: to convert a leaf, to map over a tree, to list its leaves."""
    if framework == "torch":
        from torch.utils import _pytree

        return _tensor, _pytree.tree_map, _pytree.tree_leaves
    import jax

    return _jax_array, jax.tree.map, jax.tree.leaves


def _tensor(leaf: Any, dtype: str | None) -> Any:
    import torch

    leaf = torch.tensor(leaf) if isinstance(leaf, np.ndarray) else leaf
    if dtype is None or not isinstance(leaf, torch.Tensor):
        return leaf
    if leaf.is_complex():
        return leaf.to(getattr(torch, COMPLEX.get(dtype, "complex64")))
    return leaf.to(getattr(torch, dtype)) if leaf.is_floating_point() else leaf


def _jax_array(leaf: Any, dtype: str | None) -> Any:
    import jax
    import jax.numpy as jnp

    leaf = jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
    if dtype is None or not isinstance(leaf, jax.Array):
        return leaf
    if jnp.iscomplexobj(leaf):
        return leaf.astype(COMPLEX.get(dtype, "complex64"))
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
