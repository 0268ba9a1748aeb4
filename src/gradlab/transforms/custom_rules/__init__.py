"""Functions with derivative rules of their own, which hold under every transform and every nest of them.

Contracts only; `_jax.py` and `_torch.py` implement them in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gradlab.transforms.custom_rules.declared import Declaration, declaration

__all__ = ["custom_jvp", "custom_vjp"]


@declaration
def custom_vjp(
    f: Callable[..., Any], nondiff_argnums: Sequence[int] = (), *, check: bool = False
) -> Declaration:
    """A function whose derivative is a rule for its cotangents, in every mode.

    With the pullback u ↦ Jᵀ u given as bwd, reverse mode is bwd, forward mode v ↦ J v is its transpose
    as a linear map of u, and higher derivatives are those of bwd and of fwd's residuals.

    Args:
        f: Function of positional arguments, each a tree. Float and complex arrays are differentiated;
            integers, None, strings and functions are handed on as they stand.
        nondiff_argnums: Positions of static arguments, of any kind. As in jax, f and fwd take them where
            they stand, bwd takes them first, and returns no cotangent for them.
        check: Whether the first call with concrete numbers, under no transform, proves the rule by
            `check.derivatives` at its arguments, to second order, and raises `CheckError` where a claim fails.

    Returns:
        The function, to be called like f (keywords are resolved to positions), with two methods.

        `.defvjp(fwd, bwd)`: `fwd(*args) -> (out, residuals)`, out like f's, residuals any tree;
        `bwd(*static, residuals, u) -> tuple`, u like out, one cotangent like each argument, None for zero
        (of an argument, or of a part of its tree). bwd must be linear in u. A residual that is itself an
        argument or an output has the derivative of that one; any other has that of fwd's code. fwd is
        deterministic: torch runs it again for residuals it has computed, where they are differentiated.

        `.defvmap(rule)`, optional: `rule(axis_size, in_batched, *args) -> (out, out_batched)`, with the
        batch on the leading axis and trees of bools that say where, in place of f under vmap where
        nothing is differentiated. fwd and bwd are batched by the framework.

    Raises:
        InputError: cotangents of another number, structure or shape; out of fwd unlike that of f.
        KindError: cotangents of another dtype, a static position that does not exist.
        StrategyError: no rule yet; f closes over an array that is being differentiated, in torch also over
            one under a vmap that is differentiated, or over any tensor under torch.compile (pass it as an
            argument); a bwd that is not linear in u where its transpose is asked for (in jax always, and
            there too one that jax cannot transpose: a while loop over u).
        BackendError: arrays of both frameworks, or of neither.

    Cost:
        That of fwd and bwd, and of f once, at the first derivative (its form is compared). Forward mode: in
        jax one bwd (its transpose); in torch about three. Compiled by torch.compile under torch.func, a rule has
        the Python numbers that it closes over as they were at the first call: pass what changes as an argument.

    Example:
        >>> import torch
        >>> from gradlab import custom_vjp
        >>> @custom_vjp
        ... def cube(x):
        ...     return x**3
        >>> cube.defvjp(lambda x: (x**3, x), lambda x, u: (3 * x**2 * u,))
        >>> x = torch.tensor(2.0)
        >>> torch.func.grad(cube)(x), torch.func.jvp(torch.func.grad(cube), (x,), (x,))[1]
        (tensor(12.), tensor(24.))
        >>> import jax, jax.numpy as jnp
        >>> jax.grad(cube)(jnp.float32(2.0)), jax.jacfwd(jax.jacfwd(cube))(jnp.float32(2.0))
        (Array(12., dtype=float32), Array(12., dtype=float32))

    Source:
        Griewank and Walther, Evaluating Derivatives (2008), section 3; Radul et al., You only linearize
        once, POPL 2023, doi:10.1145/3571236 (transposition of linear maps).
    """


@declaration
def custom_jvp(
    f: Callable[..., Any], nondiff_argnums: Sequence[int] = (), *, check: bool = False
) -> Declaration:
    """A function whose derivative is a rule for its tangents, in every mode.

    With the pushforward v ↦ J v given as rule, forward mode is the rule, reverse mode u ↦ Jᵀ u is its
    transpose as a linear map of v, and higher derivatives are those of the rule.

    Args:
        f: Function of positional arguments, as for `custom_vjp`.
        nondiff_argnums: Positions of static arguments, of any kind; the rule takes them first.
        check: As for `custom_vjp`.

    Returns:
        The function, to be called like f (keywords are resolved to positions), with two methods.

        `.defjvp(rule)`: `rule(*static, primals, tangents) -> (out, tangent)`, where primals and tangents
        are tuples of the arguments and of tangents like them (zeros where nothing moves, None for what is
        not differentiated), tangent is like out and linear in tangents. It returns rule: a decorator.

        `.defvmap(rule)`: as for `custom_vjp`.

    Raises:
        InputError: a tangent of another structure or shape than out; out unlike that of f.
        KindError: a tangent of another dtype, a static position that does not exist.
        StrategyError: no rule yet; closures as for `custom_vjp`; a rule that is not linear in tangents where
            its transpose is asked for.
        BackendError: arrays of both frameworks, or of neither.

    Cost:
        That of the rule; in torch of f and the rule. Reverse mode: of the rule and its transpose.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gradlab import custom_jvp
        >>> @custom_jvp
        ... def cube(x):
        ...     return x**3
        >>> @cube.defjvp
        ... def rule(primals, tangents):
        ...     (x,), (v,) = primals, tangents
        ...     return x**3, 3 * x**2 * v
        >>> jax.grad(jax.grad(cube))(jnp.float32(2.0))
        Array(12., dtype=float32)
        >>> import torch
        >>> torch.func.grad(torch.func.grad(cube))(torch.tensor(2.0))
        tensor(12.)

    Source:
        Griewank and Walther, Evaluating Derivatives (2008), section 3; Radul et al., You only linearize
        once, POPL 2023, doi:10.1145/3571236 (transposition of linear maps).
    """
