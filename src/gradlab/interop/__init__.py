"""Between the frameworks: shared arrays, functions of one called and differentiated from the other, weights exchanged.

from gradlab import interop
interop.as_torch(f_jax)(tensor), interop.as_jax(f_torch)(array)

Contracts; importing this imports neither framework.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from gradlab._errors import BackendError

__all__ = ["as_jax", "as_torch", "to_equinox", "to_jax", "to_state_dict", "to_torch"]

Rename = Mapping[str, str] | Callable[[str], str] | None


def to_torch(tree: Any, *, copy: bool | None = None) -> Any:
    """The jax arrays of a tree as torch tensors that share their memory.

    Dtype, shape and device stay. torch does not know that a jax array never changes: do not write into a shared
    tensor; copy it for that.

    Args:
        tree: A jax tree; numpy arrays in it are copied, everything else stays as it stands.
        copy: None: share what can be shared, which is every dense jax array on one device; False: refuse to
            copy; True: copy all.

    Returns:
        The tree with tensors in the places of arrays.

    Raises:
        KindError: an array that is traced (in jit, grad or vmap), lies on several devices, is a key of random
            numbers, or of a dtype that torch lacks.
        InputError: copy=False where a copy is needed.

    Cost:
        About 10 µs an array.

    Example:
        >>> import jax.numpy as jnp
        >>> from gradlab import interop
        >>> interop.to_torch({"w": jnp.array([1.0, 2.0]), "n": 3})
        {'n': 3, 'w': tensor([1., 2.])}

    Source:
        DLPack, https://dmlc.github.io/dlpack/latest/.
    """
    return _implementation("to_torch", "arrays")(tree, copy=copy)


def to_jax(tree: Any, *, copy: bool | None = None) -> Any:
    """The torch tensors of a tree as jax arrays that share their memory.

    Dtype, shape and device stay. A shared array changes where the tensor is changed in place, which jax does not
    expect: copy tensors that are trained.

    Args:
        tree: A torch tree, a state_dict for instance; numpy arrays in it are copied, everything else stays.
        copy: None: share what can be shared and copy the rest (not contiguous, not aligned to 64 bytes, a pending
            conjugate; and integers of 64 bits to 32 where jax has 64 switched off and all fit); False: refuse to
            copy; True: copy all.

    Returns:
        The tree with jax arrays in the places of tensors.

    Raises:
        KindError: a tensor that requires grad or is under a torch.func transform (see `as_torch`), is sparse, on a
            device that jax has not, a module; float64 where jax has 64 bits switched off.
        InputError: copy=False where a copy is needed; integers that do not fit into 32 bits.

    Cost:
        About 50 µs a tensor.

    Example:
        >>> import torch
        >>> from gradlab import interop
        >>> interop.to_jax([torch.tensor([1.0, 2.0]), "text"])
        [Array([1., 2.], dtype=float32), 'text']

    Source:
        DLPack, https://dmlc.github.io/dlpack/latest/.
    """
    return _implementation("to_jax", "arrays")(tree, copy=copy)


def as_torch(f: Callable[..., Any], *, jit: bool = True) -> Callable[..., Any]:
    """A function of jax, to be called, differentiated and mapped in torch.

    Its derivatives are jax's: of every nest of torch.func.grad, vjp, jvp, jacrev, jacfwd, hessian and vmap, of
    loss.backward() with or without create_graph, and of dual numbers, to any order.

    Args:
        f: Function of jax arrays, in trees that jax knows, to a tree of arrays. What it closes over is held constant.
        jit: Whether jax compiles it, and each derivative of it, at the first use with new shapes. False: for an f
            that looks at its numbers, at many times the price of a call.

    Returns:
        A function `(*args, **kwargs)` of trees with torch tensors (and numpy arrays) in the places of f's arrays.
        Whatever is no array is handed to f as it stands, and compiled for anew: pass what changes from call to
        call as a tensor. Its outputs are tensors in memory of their own, on the device and of the dtype that f gives.

    Raises:
        KindError: f is not callable; an argument that jax cannot hold: float64 where jax has 64 bits switched off
            (integers of 64 bits become 32, if they fit), a device that jax has not, a sparse tensor.
        BackendError: an array of jax among the arguments.
        StrategyError: f closes over an array that jax is differentiating.
        What f raises, as it is.

    Cost:
        Beyond f's own time 0.3 ms a call and 0.6 ms a gradient in eager torch, 1.7 ms under torch.func.grad
        (`experiments/interop_overhead.py`). A plain gradient runs f once, one that can be
        differentiated again, or under torch.func, once more. torch.compile breaks its graph there.

    Example:
        >>> import jax.numpy as jnp, torch
        >>> from gradlab import interop
        >>> f = interop.as_torch(lambda x: (x**3).sum())
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> f(x).backward()
        >>> x.grad
        tensor([ 3., 12.])
        >>> torch.func.hessian(f)(x.detach())
        tensor([[ 6.,  0.],
                [ 0., 12.]])

    Source:
        Griewank and Walther, Evaluating Derivatives (2008), section 3.
    """
    return _implementation("as_torch", "_torch")(f, jit=jit)


def as_jax(f: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch, to be called, differentiated, mapped and compiled in jax.

    Its derivatives are torch's, by reverse mode and with torch's faulty operations repaired: of every nest of
    jax.grad, jvp, vjp, linearize, jacfwd, jacrev, hessian, vmap, jit, checkpoint and scan, to any order.

    Args:
        f: Function of torch tensors, in trees that jax knows, to tuples, lists and dicts of tensors; a torch module
            too. What it closes over (a module's own parameters) is held constant. It must give the same for the same
            arguments: compiled code may call it more than once, or not at all.

    Returns:
        A function `(*args, **kwargs)` of trees with jax (and numpy) arrays in the places of f's tensors. Whatever is
        no array is handed to f as it stands; Python floats alone are arrays. Under vmap f runs once, under
        torch.func.vmap; random numbers differ among the examples.

    Raises:
        KindError: f is not callable, or returns what is no tensor, or float64 where jax has 64 bits switched off; an
            argument that torch cannot hold.
        BackendError: a tensor of torch among the arguments.
        StrategyError: jax asks for the shapes of an output, in jit and grad, and f, which looks at its numbers, was
            never called outside of them with such shapes.
        What f raises, as it is; in compiled code with f's traceback in jax's error.

    Cost:
        Beyond f's own time 0.1 ms a call; compiled, by a callback with copies to and from the host, 0.2 ms a call and
        0.6 ms a gradient (`experiments/interop_overhead.py`). A gradient runs f twice,
        a tangent about three times.

    Example:
        >>> import jax, jax.numpy as jnp, torch
        >>> from gradlab import interop
        >>> f = interop.as_jax(lambda x: (torch.sin(x) ** 2).sum())
        >>> jax.jit(jax.grad(f))(jnp.array([0.0, jnp.pi / 4])).round(3) + 0.0
        Array([0., 1.], dtype=float32)
        >>> jax.vmap(jax.hessian(f))(jnp.zeros((2, 1))).shape
        (2, 1, 1)

    Source:
        Griewank and Walther, Evaluating Derivatives (2008), section 3.
    """
    return _implementation("as_jax", "_jax")(f)


def to_equinox(
    model: Any, state_dict: Mapping[str, Any], *, rename: Rename = None, ignore: Sequence[str] = ()
) -> Any:
    """An equinox model with the weights of a torch model.

    An array at the path `layers[0].weight` has the name `layers.0.weight`; the layers of an equinox.nn.Sequential
    are named by their numbers, as in torch. Conventions that differ are converted: the bias of a convolution,
    (C, 1, 1) against (C,); the kernel of a transposed one, flipped; the two biases of GRUCell and LSTMCell, which
    equinox has added up; the stacked projections of MultiheadAttention; the slope of PReLU.

    Args:
        model: The equinox model, for its structure and shapes.
        state_dict: Of the torch model; its dtypes are kept.
        rename: The model's names to torch's, where they differ: a dict of names or beginnings of names (whole words
            between dots; the longest that fits counts, "" fits all), or a function of the name.
        ignore: Patterns of names that are left out on either side, as "*.running_mean".

    Returns:
        The model with copies of torch's weights.

    Raises:
        InputError: names without a match or shapes that differ, all of them listed.
        KindError: a state_dict that is none, a model without arrays; float64 where jax has 64 bits switched off.

    Cost:
        A copy of the weights.

    Example:
        >>> import equinox, jax, torch
        >>> from gradlab import interop
        >>> ours = equinox.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
        >>> theirs = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> names = {"layers.0": "0", "layers.1": "2"}
        >>> ours = interop.to_equinox(ours, theirs.state_dict(), rename=names)
        >>> x = torch.ones(3)
        >>> bool(abs(ours(interop.to_jax(x)) - interop.to_jax(theirs(x).detach())).max() < 1e-6)
        True

    Source:
        The documentation of torch.nn and of equinox.nn, layer by layer.
    """
    return _implementation("to_equinox", "weights")(model, state_dict, rename=rename, ignore=ignore)


def to_state_dict(model: Any, *, rename: Rename = None, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """The weights of an equinox model as a torch model's `load_state_dict` takes them.

    The inverse of `to_equinox`: from equinox to torch and back is exact. Where torch has two biases that only add up,
    the second is zero.

    Args:
        model: The equinox model.
        rename, ignore: As for `to_equinox`.

    Returns:
        A dict of names to tensors, copies of the model's arrays.

    Raises:
        InputError: two arrays of one name.
        KindError: a model without arrays, or with traced ones.

    Cost:
        A copy of the weights.

    Example:
        >>> import equinox, jax, torch
        >>> from gradlab import interop
        >>> weights = interop.to_state_dict(equinox.nn.Conv1d(2, 4, 3, key=jax.random.key(0)))
        >>> {name: tuple(w.shape) for name, w in weights.items()}
        {'bias': (4,), 'weight': (4, 2, 3)}
        >>> torch.nn.Conv1d(2, 4, 3).load_state_dict(weights)
        <All keys matched successfully>

    Source:
        As for `to_equinox`.
    """
    return _implementation("to_state_dict", "weights")(model, rename=rename, ignore=ignore)


def _implementation(name: str, module: str) -> Callable[..., Any]:
    needed = ("jax", "torch", "equinox") if module == "weights" else ("jax", "torch")
    missing = [framework for framework in needed if find_spec(framework) is None]
    if missing:
        raise BackendError(
            f"interop.{name}: {' and '.join(missing)} not installed; pip install 'gradlab[jax,torch]'"
        )
    return getattr(import_module(f"gradlab.interop.{module}"), name)
