"""Prove a derivative right on your own function, against differences with an error estimate.

from gradlab import check
check.derivatives(f, x, *args).raise_if_failed()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal, get_args

from gradlab._dispatch import framework_of
from gradlab._errors import BackendError, InputError, KindError
from gradlab.check.report import FAILED, UNSUPPORTED, CheckError, Report, Row

__all__ = ["CheckError", "Report", "Row", "agree", "batch_independent", "derivatives"]

Modes = Literal["all", "forward", "reverse"]


def derivatives(
    f: Callable[..., Any],
    x: Any,
    *args: Any,
    order: int = 2,
    modes: Modes = "all",
    has_aux: bool = False,
    vmap: bool = True,
    compiled: bool | None = None,
    directions: int = 2,
    accuracy: float = 0.0,
    explore: bool = False,
    seed: int = 0,
) -> Report:
    """Check every claim a framework makes of f's derivatives at x against extrapolated differences.

    Along random directions v, scaled like x, f is evaluated in float64 on a ladder of steps; its slope is
    extrapolated to step zero with an estimate of its own error ε. A derivative d is wrong where
    |d - reference| > 10 ε + (rounding of the arithmetic, measured), and only if a second, finer ladder
    agrees; what differences cannot resolve to one percent (a kink, a jump, a pole) is inconclusive.

    The rows, for an f with many outputs at second order of u·f with a fixed random u:

    - `value` (deterministic, finite, inputs not changed), `structure` (shape and dtype);
    - `jvp`, `vjp`, `gradient` against differences; `jvp against vjp`; `vjp linear` (in the cotangent, zero
      included); `vjp repeatable`; `each part alone` (a leaf of x, or of f's outputs, without the others);
    - from order 2 `hvp` (gradlab's), `forward over reverse` and the other nests as the framework runs
      them bare, `hessian symmetric`, and up to 8 entries the dense `hessian`; at order 3 the eight nests;
    - `vmap`, `vmap of jvp`, `vmap of vjp` (over points, and over directions or cotangents at one point),
      `vjp of vmap` against a loop; `compiled` against f as it runs uncompiled.

    Args:
        f: Function `f(x, *args)` to a tree of floats, or `(value, aux)`.
        x: Point: a tree, or a tuple of them; its float and complex arrays are differentiated (complex
            ones as pairs of reals), other leaves are held constant.
        *args: Data, handed to f as they are.
        order: 1, 2 or 3.
        modes: Which modes the nests are made of: `"all"`, or `"forward"` or `"reverse"` alone.
        has_aux: Whether f returns `(value, aux)`.
        vmap: Whether to check the function under vmap.
        compiled: Whether to check it compiled; None: in jax, where it is cheap, and not in torch, where
            torch.compile takes seconds.
        directions: Random directions of the whole of x for each claim. A tree of several leaves, or of
            entries 10⁴ times smaller or larger than most of their leaf, has up to 6 more, of one each.
        accuracy: Of an f that is itself computed to a tolerance, as by a solver with steps of its own: how far
            its derivatives may be off, relative to their largest entry. 0: by rounding alone, which is measured.
        explore: Whether to search the inputs around x too, when no claim fails at x: x scaled and shifted as
            a whole, a few entries replaced by any number up to 1000 times the largest. The report is then
            of the simplest point found where a claim fails, which is its `.point`. Needs hypothesis.
        seed: Of the directions, and of the search.

    Returns:
        A `Report`: `.rows` (one a claim, with `.status` "passed", "failed", "unsupported" where the
        framework refuses, or "inconclusive"; `.error`, `.uncertainty` and `.where`), `.passed`,
        `.raise_if_failed()`, `.to_json()`, and a table when printed. A float32 or lower function is
        judged in its own precision, against a float64 run of the same function where it has one.

    Raises:
        InputError: order, modes or directions that do not exist, an empty tree.
        KindError: f is not callable, x or f's output has no floats.
        BackendError: arrays of both frameworks, or of neither; exploration without hypothesis.

    Cost:
        45 evaluations of f along the first direction and 29 along another one, shared by all claims of first
        order, and as many gradients for those of second order; besides one derivative a claim and direction.
        Does not grow with the number of parameters. A row is evaluated again where its error needs an
        explanation. Exploration checks 200 points, without vmap and compilation.
        Entries of a direction have sizes between 0.5 and 1.5, so that one wrong entry among n shifts the
        slope by at least half of its fault, and is missed only where that is below 10 ε (ε is 1e-13 of a
        smooth slope) or half of the digits of the whole slope (1.5e-8 in float64); or where faults cancel
        along every direction, with probability zero for one wrong entry. Wrong entries are located by
        bisection.

    Example:
        >>> import torch
        >>> from gradlab import check
        >>> check.derivatives(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0])).passed
        True

    Source:
        Ridders, Advances in Engineering Software 4 (1982), doi:10.1016/S0141-1195(82)80057-0; Moré and
        Wild, SIAM J. Sci. Comput. 33 (2011), doi:10.1137/100786125.
    """
    if not callable(f):
        raise KindError(f"check.derivatives: f is a {type(f).__name__}; pass the function, then its point")
    if order not in (1, 2, 3):
        raise InputError(f"check.derivatives: order is {order!r}; pass 1, 2 or 3")
    if modes not in get_args(Modes):
        raise InputError(f"check.derivatives: modes is {modes!r}; pass one of {', '.join(get_args(Modes))}")
    if not isinstance(directions, int) or directions < 1:
        raise InputError(f"check.derivatives: directions is {directions!r}; pass a positive integer")
    if explore and find_spec("hypothesis") is None:
        raise BackendError(
            "check.derivatives: explore=True needs hypothesis; pip install 'gradlab[tools]', or leave it out"
        )
    if not 0 <= accuracy < 1:
        raise InputError(
            f"check.derivatives: accuracy is {accuracy!r}; pass a number from 0 (rounding alone) to 1"
        )
    framework = framework_of("check.derivatives", (x, *args))
    from gradlab.check.claims import MODES, Checked, rows

    if framework == "torch":
        from gradlab.check import _torch as adapter
    else:
        from gradlab.check import _jax as adapter  # type: ignore[no-redef]
    subject, shadow = adapter.subjects(f, x, args, has_aux)
    chosen = MODES if modes == "all" else (modes,)
    compiled = framework == "jax" if compiled is None else compiled

    def found(subject: Any, *how: Any) -> list[Row]:
        return rows(Checked(subject, shadow, seed, directions, accuracy), order, chosen, *how)

    report = Report(framework, subject.dtype, found(subject, vmap, compiled))
    if explore and not report.failed:
        from gradlab.check.exploration import failing_point

        refused = tuple(row.claim for row in report.rows if row.status == UNSUPPORTED)
        fails = lambda z: any(row.status == FAILED for row in found(subject.at(z), False, False, refused))
        z = failing_point(subject.x, subject.sizes, fails, seed)
        if z is not None:
            there = subject.at(z)
            report = replace(report, rows=found(there, vmap, compiled), point=adapter.restored(there, x))
    return report


def agree(
    f_jax: Callable[..., Any], f_torch: Callable[..., Any], x: Any, *args: Any, order: int = 2, seed: int = 0
) -> Report:
    """Check that two implementations of one function, in jax and in torch, agree to second order.

    Compares in float64, on the same numbers: value, J v, Jᵀ u and (∇² u·f) v for random v and u. For code
    that is being ported; `derivatives` says whether either is right.

    Args:
        f_jax: Function `f(x, *args)` of jax arrays to a tree of floats.
        f_torch: The same of torch tensors, with outputs of the same shapes in the same order.
        x: Point: a tree (dicts, lists, tuples) of arrays of numpy or of either framework.
        *args: Data, converted likewise.
        order: 1 or 2.
        seed: Of v and u.

    Returns:
        A `Report` with rows `structure`, `value`, `jvp`, `vjp` and `hvp`; the error is torch less jax.

    Raises:
        InputError: order is not 1 or 2, an empty tree.
        KindError: a function is not callable, or x has no floats.

    Cost:
        About one derivative of each kind in each framework; a few more where they differ.

    Example:
        >>> import jax.numpy as jnp, numpy as np, torch
        >>> from gradlab import check
        >>> check.agree(lambda x: jnp.sin(x).sum(), lambda x: torch.sin(x).sum(), np.ones(3)).passed
        True

    Source:
        Griewank and Walther, Evaluating Derivatives (2008), chapter 3.
    """
    for name, f in (("f_jax", f_jax), ("f_torch", f_torch)):
        if not callable(f):
            raise KindError(
                f"check.agree: {name} is a {type(f).__name__}; pass two functions, then their point"
            )
    if order not in (1, 2):
        raise InputError(f"check.agree: order is {order!r}; pass 1 or 2")
    from gradlab.check import agreement

    return agreement.report(f_jax, f_torch, x, args, order, seed)


def batch_independent(f: Callable[..., Any], params: Any, batch: Any, *args: Any, seed: int = 0) -> Report:
    """Check that no example of a batch influences the loss of another, before per-example results are trusted.

    With the losses ℓᵢ of f: ∂ℓᵢ/∂(example j) = 0 for i ≠ j, and the same of ∇ℓᵢ, by replacing examples, each
    by another one of the batch and by two with other numbers. A scalar f is a sum (or mean) over examples:
    f with i and j replaced - f with i - f with j + f = 0, and the same of ∇f.

    Args:
        f: Function `f(params, batch, *args)` to the losses of the examples, on a leading axis, or a scalar.
        params: A tree; its float arrays are differentiated.
        batch: A tree of arrays, each with a leading axis of the same B ≥ 2 examples: floats, integers, masks.
        *args: Data that belongs to no example.
        seed: Of the examples put in place of others, and of the losses' weights in the gradient.

    Returns:
        A `Report` with rows `value` (deterministic, finite), `losses` and `gradients`; where one failed,
        `.where` is "example i by example j", `.error` the change of i's, `.uncertainty` that of rounding,
        measured. Where f has a float64 run, it is judged there.

    Raises:
        InputError: an empty batch, one example, leaves without a leading axis or with different ones, an
            output of another shape.
        KindError: f is not callable, params holds no floats, an output that is not of floats.
        BackendError: arrays of both frameworks, or of neither.

    Cost:
        About 12 log₂ B evaluations of f and as many gradients; a few more to name the two examples. Half of the
        batch is replaced at a time, such that every two examples are parted: an influence is missed only where
        it cancels within the half, or shows for none of the three replacements.

    Example:
        >>> import torch
        >>> from gradlab import check
        >>> w, batch = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 3.0], [2.0, 5.0], [0.0, 1.0]])
        >>> check.batch_independent(lambda w, batch: (batch @ w) ** 2, w, batch).passed
        True
        >>> check.batch_independent(lambda w, batch: ((batch - batch.mean(0)) @ w) ** 2, w, batch).passed
        False

    Source:
        Opacus, arXiv:2109.12298, section 2 (batch norm and other layers that mix a batch).
    """
    if not callable(f):
        raise KindError(
            f"check.batch_independent: f is a {type(f).__name__}; pass the function, its params and a batch"
        )
    framework = framework_of("check.batch_independent", (params, batch, *args))
    from gradlab.check import independence

    return independence.report(framework, f, params, batch, args, seed)
