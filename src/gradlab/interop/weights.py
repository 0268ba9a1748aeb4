"""Weights of an equinox model and of a torch model, matched by path and by what each layer's conventions are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import torch

from gradlab._errors import InputError, KindError
from gradlab.interop.arrays import array, tensor

Rename = Mapping[str, str] | Callable[[str], str] | None


@dataclass(frozen=True)
class Layer:
    """How one array or several of an equinox layer stand in torch's.

    `names` are torch's beside the layer's own name; `read` makes the arrays of theirs, in the order of `attributes`,
    and `write` theirs of the arrays.
    """

    attributes: tuple[str, ...]
    names: tuple[str, ...]
    read: Callable[..., Any]
    write: Callable[..., Any]


def same(name: str, torch_name: str | None = None) -> Layer:
    """An array that is the same in both."""
    one = lambda x: (x,)
    return Layer((name,), (torch_name or name,), one, one)


def conv_bias(layer: Any) -> Layer:
    """(C, 1, 1) against (C,)."""
    return Layer(
        ("bias",),
        ("bias",),
        lambda b: (b.reshape(-1, *[1] * layer.num_spatial_dims),),
        lambda b: (b.reshape(-1),),
    )


def transposed_kernel(layer: Any) -> Layer:
    """(out, in / groups, ...) against (in, out / groups, ...), and flipped along every axis of space."""
    space = tuple(range(2, 2 + layer.num_spatial_dims))

    def swapped(x: Any) -> tuple[Any]:
        first, second, *kernel = x.shape
        x = x.reshape(layer.groups, first // layer.groups, second, *kernel).swapaxes(1, 2)
        return (jnp.flip(x.reshape(layer.groups * second, first // layer.groups, *kernel), space),)

    return Layer(("weight",), ("weight",), swapped, swapped)


def slope(layer: Any) -> Layer:
    """() against (1,), for one slope of all."""
    shape = layer.negative_slope.shape
    read = lambda w: (w.reshape(shape) if w.size == 1 else w,)
    return Layer(("negative_slope",), ("weight",), read, lambda a: (a.reshape(-1),))


def gru_biases(layer: Any) -> Layer:
    """One bias of all gates and one of the new state's product, against two of all gates, of which some only add up."""
    n = layer.hidden_size

    def read(b_ih: Any, b_hh: Any) -> tuple[Any, Any]:
        return b_ih.at[: 2 * n].add(b_hh[: 2 * n]), b_hh[2 * n :]

    def write(bias: Any, bias_n: Any) -> tuple[Any, Any]:
        return bias, jnp.concatenate([jnp.zeros(2 * n, bias.dtype), bias_n])

    return Layer(("bias", "bias_n"), ("bias_ih", "bias_hh"), read, write)


def lstm_biases(layer: Any) -> Layer:
    """One bias, against two that only add up."""
    return Layer(
        ("bias",), ("bias_ih", "bias_hh"), lambda a, b: (a + b,), lambda bias: (bias, jnp.zeros_like(bias))
    )


PROJECTIONS = ("query_proj", "key_proj", "value_proj")


def attention(layer: Any) -> Iterator[Layer]:
    """Three projections, against one matrix of all, or three where keys or values are of another size."""
    weights = [getattr(layer, name).weight for name in PROJECTIONS]
    biases = [getattr(layer, name).bias for name in PROJECTIONS]
    stacked = lambda *parts: (jnp.concatenate(parts),)
    inside = lambda kind: tuple(f"{name}.{kind}" for name in PROJECTIONS)

    def split(x: Any) -> Any:
        return jnp.split(x, 3) if x.shape[0] % 3 == 0 else (x, x, x)  # which is refused for its shape

    if len({w.shape for w in weights}) == 1:
        yield Layer(inside("weight"), ("in_proj_weight",), split, stacked)
    else:
        for name in PROJECTIONS:
            yield same(f"{name}.weight", f"{name[0]}_proj_weight")
    if any(b is not None for b in biases):
        yield Layer(inside("bias"), ("in_proj_bias",), split, stacked)
    for kind in ("weight", "bias"):
        if getattr(layer.output_proj, kind) is not None:
            yield same(f"output_proj.{kind}", f"out_proj.{kind}")


def layers(node: Any) -> list[Layer]:
    """What is said of a layer's own arrays; an array that nothing is said of has the same name and form in torch."""
    nn = eqx.nn
    if isinstance(node, nn.MultiheadAttention):
        return list(attention(node))
    found = []
    if isinstance(node, nn.ConvTranspose):
        found.append(transposed_kernel(node))
    if isinstance(node, (nn.Conv, nn.ConvTranspose)) and node.bias is not None:
        found.append(conv_bias(node))
    if isinstance(node, nn.GRUCell) and node.bias is not None:
        found.append(gru_biases(node))
    if isinstance(node, nn.LSTMCell) and node.bias is not None:
        found.append(lstm_biases(node))
    if isinstance(node, nn.PReLU):
        found.append(slope(node))
    return found


def to_equinox(model: Any, state_dict: Any, *, rename: Rename = None, ignore: Sequence[str] = ()) -> Any:
    op = "to_equinox"
    if not isinstance(state_dict, Mapping):
        hint = (
            "pass its state_dict()"
            if isinstance(state_dict, torch.nn.Module)
            else "pass a module's state_dict()"
        )
        raise KindError(f"{op}: state_dict is a {type(state_dict).__name__}; {hint}")
    given = {name: x for name, x in state_dict.items() if not ignored(name, ignore)}
    places, leaves, structure = named_arrays(op, model)
    missing, misshaped = [], []
    used: set[str] = set()
    for layer in matched(op, model, places, rename, ignore):
        used.update(layer.names)
        if absent := [name for name in layer.names if name not in given]:
            missing += absent
            continue
        theirs = [array(op, f"state_dict[{name!r}]", given[name].detach(), copy=True) for name in layer.names]
        try:
            ours = layer.read(*theirs)
        except (TypeError, ValueError):  # of a shape that the layer's rule cannot take
            ours = theirs
        for name, x in zip(layer.attributes, ours, strict=False):
            if x.shape != leaves[places[name]].shape:
                shapes = " and ".join(
                    f"{n} {tuple(y.shape)}" for n, y in zip(layer.names, theirs, strict=True)
                )
                misshaped.append(f"{name} {leaves[places[name]].shape} from {shapes}")
            else:
                leaves[places[name]] = x
    refuse_unmatched(op, missing, sorted(set(given) - used), misshaped)
    return jax.tree.unflatten(structure, leaves)


def to_state_dict(
    model: Any, *, rename: Rename = None, ignore: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    op = "to_state_dict"
    places, leaves, _ = named_arrays(op, model)
    found: dict[str, torch.Tensor] = {}
    for layer in matched(op, model, places, rename, ignore):
        theirs = layer.write(*(leaves[places[name]] for name in layer.attributes))
        for name, x in zip(layer.names, theirs, strict=True):
            if name in found:
                raise InputError(f"{op}: two arrays of the model are named {name!r}; mend rename")
            if not ignored(name, ignore):
                found[name] = tensor(op, name, x, copy=True)
    return found


def refuse_unmatched(op: str, missing: list[str], unused: list[str], misshaped: list[str]) -> None:
    """Refuse weights that fit not, and list them all."""
    said = [
        f"the state dict has no {', '.join(missing)}" if missing else "",
        f"the model has no place for {', '.join(unused)}" if unused else "",
        f"shapes differ: {'; '.join(misshaped)}" if misshaped else "",
    ]
    if any(said):
        hint = "map the model's names to torch's with rename={'layers.0': '0', ...}, or leave some out by ignore=[...]"
        how = hint if missing or unused else "pass the model that these weights are of"
        raise InputError(f"{op}: {'; '.join(filter(None, said))}; {how}")


def ignored(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name is left out."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def renamed(op: str, rename: Rename, name: str) -> str:
    """The name by the longest prefix that is mapped, or by a function."""
    if rename is None:
        return name
    if callable(rename):
        found = rename(name)
        if not isinstance(found, str):
            raise KindError(f"{op}: rename({name!r}) is a {type(found).__name__}; return a name")
        return found
    fits = [prefix for prefix in rename if not prefix or name == prefix or name.startswith(prefix + ".")]
    if not fits:
        return name
    prefix = max(fits, key=len)
    rest = name[len(prefix) :].strip(".")
    return ".".join(filter(None, (rename[prefix], rest)))


def path_name(model: Any, path: Sequence[Any]) -> str:
    """A path as torch writes it: keys between dots, where a Sequential's layers are its own."""
    words, node = [], model
    for key in path:
        word = str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key))))
        if not (isinstance(node, eqx.nn.Sequential) and word == "layers"):
            words.append(word)
        node = (
            getattr(node, word, None)
            if hasattr(key, "name")
            else node[getattr(key, "idx", getattr(key, "key", 0))]
        )
    return ".".join(words)


def named_arrays(op: str, model: Any) -> tuple[dict[str, int], list[Any], Any]:
    """The places of a model's arrays among its leaves by name, the leaves and the structure."""
    paths, structure = jax.tree_util.tree_flatten_with_path(model)
    places = {path_name(model, path): i for i, (path, x) in enumerate(paths) if eqx.is_array(x)}
    if not places:
        raise KindError(
            f"{op}: model is a {type(model).__name__} without arrays of jax; pass an equinox module"
        )
    return places, [x for _, x in paths], structure


def matched(
    op: str, model: Any, places: dict[str, int], rename: Rename, ignore: Sequence[str]
) -> Iterator[Layer]:
    """The layers' rules with full names, then every array that none speaks of."""
    rest = {name: None for name in places if not ignored(name, ignore)}
    special = lambda node: isinstance(node, eqx.Module) and bool(layers(node))
    for path, node in jax.tree_util.tree_flatten_with_path(model, is_leaf=special)[0]:
        if not special(node):
            continue
        within = path_name(model, path)
        full = lambda name: f"{within}.{name}" if within else name
        for layer in layers(node):
            attributes = tuple(map(full, layer.attributes))
            if all(name in rest for name in attributes):
                for name in attributes:
                    del rest[name]
                names = tuple(renamed(op, rename, full(name)) for name in layer.names)
                yield Layer(attributes, names, layer.read, layer.write)
    for name in rest:
        yield same(name, renamed(op, rename, name))
