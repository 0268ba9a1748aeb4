"""diffrax's solvers by gradlab's names, its loop, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gradlab.transforms.odes._jax_dense import Path
from gradlab.transforms.odes._jax_implicit import Esdirk, Rosenbrock
from gradlab.transforms.odes.options import Status, Tolerance
from gradlab.transforms.odes.tableaux import RK4, TSIT5


class RungeKutta4(dfx.AbstractERK):
    """The classical method, which diffrax lacks; it has no estimate of its error."""

    tableau: ClassVar = dfx.ButcherTableau(
        a_lower=tuple(map(np.array, RK4.a[1:])),
        b_sol=np.array(RK4.b),
        b_error=np.zeros(RK4.stages),
        c=np.array(RK4.c[1:]),
    )
    interpolation_cls: ClassVar = dfx.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms: object) -> int:
        """Of the error of a solution."""
        return RK4.order


class Watching(dfx.Tsit5):
    """Tsit5 until the equation is seen to be stiff, there it stops.

    By Hairer and Wanner II (1996), IV.2: h |k₇ - k₆| / |y₇ - y₆|, of the two stages at the end of a step, is h times
    the size of the Jacobian; stiff is what takes STIFF steps at the limit of stability, without RESET others on end.
    Sizes are in units of the tolerances, as those of errors: else a large entry that is slow hides a fast one.
    """

    norm: Callable[[Any], Any] = eqx.field(static=True, default=None)
    rtol: Any = None
    atol: Any = None

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any) -> Any:
        """Tsit5's own; how many steps at the limit of stability; how many others since the last."""
        return super().init(terms, t0, t1, y0, args), jnp.array(0), jnp.array(0)

    def step(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any, state: Any, made_jump: Any) -> Any:
        """Tsit5's step, after which it may be enough."""
        inner, limit, other = state
        y1, error, dense, inner, result = super().step(terms, t0, t1, y0, args, inner, made_jump)
        sixth = lambda y, k: y + jnp.tensordot(jnp.array(TSIT5.a[5], k.dtype), k[:5], 1)
        apart = jax.tree.map(lambda y, end, k: end - sixth(y, k), y0, y1, dense["k"])
        slopes = jax.tree.map(lambda k: k[6] - k[5], dense["k"])
        scale = lambda x, y, end: x / (self.atol + self.rtol * jnp.maximum(jnp.abs(y), jnp.abs(end)))
        size = lambda x: self.norm(jax.tree.map(scale, x, y0, y1))
        at_limit = size(slopes) > LIMIT * size(apart)
        other = jnp.where(at_limit, 0, other + 1)
        limit = jnp.where(at_limit, limit + 1, jnp.where(other >= RESET, 0, limit))
        result = dfx.RESULTS.where(limit >= STIFF, dfx.RESULTS.stagnation, result)
        return y1, error, dense, (inner, limit, other), result


LIMIT, STIFF, RESET = 3.25, 15, 6


class Resuming(dfx.AbstractStepSizeController):
    """A controller that begins with a step of this size, and tells what the next would be; of size zero, it chooses."""

    inner: Any
    size: Any

    def wrap(self, direction: Any) -> Any:
        """With the direction of time."""
        return Resuming(self.inner.wrap(direction), self.size)

    def init(
        self, terms: Any, t0: Any, t1: Any, y0: Any, dt0: Any, args: Any, func: Any, error_order: Any
    ) -> Any:
        """The end of the first step."""
        begin = lambda size: self.inner.init(terms, t0, t1, y0, size, args, func, error_order)
        end = jax.lax.cond(self.size > 0, lambda: t0 + self.size, lambda: begin(None)[0])
        end, state = begin(end - t0)
        return end, (state, end - t0)

    def adapt_step_size(
        self, t0: Any, t1: Any, y0: Any, y1: Any, args: Any, y_error: Any, error_order: Any, state: Any
    ) -> Any:
        """The inner one's; the size of a step that was cut short at the end is not forgotten."""
        inner, last = state
        keep, start, end, made_jump, inner, result = self.inner.adapt_step_size(
            t0, t1, y0, y1, args, y_error, error_order, inner
        )
        size = end - start
        size = jnp.where(keep & (t1 - t0 < last), jnp.maximum(size, last), size)
        return keep, start, end, made_jump, (inner, size), result


EXPLICIT = {
    "euler": dfx.Euler,
    "midpoint": dfx.Midpoint,
    "bosh3": dfx.Bosh3,
    "rk4": RungeKutta4,
    "dopri5": dfx.Dopri5,
    "tsit5": dfx.Tsit5,
    "dopri8": dfx.Dopri8,
}


class Found(NamedTuple):
    """A solution."""

    ys: Any  # at the times asked for; not-a-number past where it ended
    counts: dict[str, Any]
    status: Any
    reached: Any  # the last time, and the state there
    path: Any  # what is known between the steps, where it is dense
    seen: Any  # whether it ended where it was seen to be stiff, and whether at the event
    size: Any  # of the next step, where that of the first was given


@dataclass(frozen=True)
class Integrator:
    """diffrax's loop, by a method and tolerances.

    With `integrals` the state is (y, ...), of which y alone is watched. `adjoint` and `event` are diffrax's, where it
    is to take the derivative of the steps, or to end at an event.
    """

    tolerance: Tolerance
    norm: Callable[[Any], Any]
    integrals: bool = False
    adjoint: Any = None
    event: Any = None

    def __call__(self, field: Any, t0: Any, t1: Any, y0: Any, args: Any, **asked: Any) -> Found:
        """The solution at the times `ts`, or `dense`; by the second method alone where it is `stiff` from the start.

        A first step of this `size`, or one that is chosen where that is zero.
        """
        if self.tolerance.stiff is None:
            asked.pop("stiff", None)
            return self.run(self.tolerance.tableau, field, t0, t1, y0, args, **asked)
        return self.switched(field, t0, t1, y0, args, **asked)

    def switched(
        self,
        field: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        args: Any,
        ts: Any = None,
        dense: bool = False,
        stiff: Any = False,
        size: Any = None,
    ) -> Found:
        """By the first method until the equation is seen to be stiff, by the second from there on."""
        tableau, second = self.tolerance.tableau, self.tolerance.stiff
        until = jnp.where(stiff, t0, t1)
        early = self.run(tableau, field, t0, until, y0, args, ts=ts, dense=dense, size=size, watching=True)
        t, y = early.reached
        watched, event = early.seen
        seen = stiff | watched
        up = jnp.where(t0 < t1, 1, -1)
        until = jnp.where(seen, t1, t)
        later = None if ts is None else up * jnp.clip(up * ts, up * t, up * until)
        size = None if size is None else jnp.where(stiff, size, 0)
        late = self.run(second, field, t, until, y, args, ts=later, dense=dense, size=size)
        counts = jax.tree.map(jnp.add, early.counts, late.counts)
        counts["evaluations"] -= jnp.where(seen, 0, 1)
        taken = counts["accepted"] + counts["rejected"]  # of a segment, it may be as many by each method
        many = taken > self.tolerance.max_steps * (2 if dense else 1)
        status = jnp.where(seen, jnp.where(many, Status.MAX_STEPS, late.status), early.status)
        ys = None
        if ts is not None:
            first = up * ts <= up * t
            held = first | (seen & ~many)
            pick = lambda a, b: jnp.where(beside(first, a), a, jnp.where(beside(held, a), b, jnp.nan))
            ys = jax.tree.map(pick, early.ys, late.ys)
        path = Path((*early.path.pieces, *late.path.pieces), t, up) if dense else None
        size = None if size is None else jnp.where(seen, late.size, early.size)
        return Found(ys, counts, status, late.reached, path, (seen, event | late.seen[1]), size)

    def run(
        self,
        tableau: Any,
        field: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        args: Any,
        ts: Any = None,
        dense: bool = False,
        size: Any = None,
        watching: bool = False,
    ) -> Found:
        """One loop of diffrax's."""
        asked, dt0 = self.tolerance, None
        controller: Any = dfx.ConstantStepSize()
        if asked.step_size is None:
            rounding = 1e-4 * jnp.finfo(t0.dtype).eps * jnp.maximum(jnp.abs(t0), jnp.abs(t1))
            controller = dfx.PIDController(
                asked.rtol, asked.atol, norm=self.whole, dtmin=rounding, force_dtmin=False
            )
            controller = controller if size is None else Resuming(controller, size)
        else:
            dt0 = jnp.sign(t1 - t0) * asked.step_size
        saved = {"end": dfx.SubSaveAt(t1=True)} | ({} if ts is None else {"at": dfx.SubSaveAt(ts=ts)})
        run = dfx.diffeqsolve(
            dfx.ODETerm(field),
            Watching(norm=self.whole, rtol=asked.rtol, atol=asked.atol) if watching else self.solver(tableau),
            t0,
            t1,
            dt0,
            y0,
            args,
            saveat=dfx.SaveAt(subs=saved, dense=dense, controller_state=size is not None),
            stepsize_controller=controller,
            adjoint=self.adjoint or dfx.ForwardMode(),
            event=self.event,
            max_steps=asked.max_steps,
            throw=False,
        )
        t, y = jax.lax.stop_gradient(run.ts["end"][0]), jax.tree.map(lambda y: y[0], run.ys["end"])
        accepted, rejected = run.stats["num_accepted_steps"], run.stats["num_rejected_steps"]
        stages = tableau.stages if tableau.name == "rodas5p" else tableau.stages - 1
        counts = {
            "evaluations": stages * (accepted + rejected) + 1,
            "accepted": accepted,
            "rejected": rejected,
        }
        few = jnp.where(run.result == dfx.RESULTS.max_steps_reached, Status.MAX_STEPS, Status.STEP_TOO_SMALL)
        stiff = run.result == dfx.RESULTS.stagnation
        event = jnp.array(False) if self.event is None else run.event_mask
        status = jnp.where((run.result == dfx.RESULTS.successful) | event, Status.DONE, few)
        at_end = lambda: finite(field(t, y, args))
        fine = finite(y) & jax.lax.cond(status == Status.DONE, lambda: jnp.array(True), at_end)
        status = jnp.where(fine, status, Status.NOT_FINITE)
        ys = None
        if ts is not None:
            held = jnp.isfinite(run.ts["at"])
            ys = jax.tree.map(lambda y: jnp.where(beside(held, y), y, jnp.nan), run.ys["at"])
        path = Path((run.interpolation,), t, jnp.where(t0 < t1, 1, -1)) if dense else None
        if size is not None and dt0 is None:
            size = run.controller_state[1]
        return Found(ys, counts, status, (t, y), path, (stiff, event), size)

    @property
    def whole(self) -> Callable[[Any], Any]:
        """The norm of a state with its integrals."""
        return (lambda e: self.norm(e[0])) if self.integrals else self.norm

    def solver(self, tableau: Any) -> Any:
        """Of a method; an implicit one iterates to within the tolerances, or at fixed steps to the rounding."""
        if not tableau.implicit:
            return EXPLICIT[tableau.name]()
        fixed = self.tolerance.step_size is not None
        rtol, atol = (1e-14, 1e-14) if fixed else (self.tolerance.rtol, self.tolerance.atol)
        if self.adjoint is not None and tableau.name in DIFFERENTIABLE:
            return DIFFERENTIABLE[tableau.name](root_finder=dfx.VeryChord(rtol, atol, self.norm))
        kind = Rosenbrock if tableau.name == "rodas5p" else Esdirk
        return kind(tableau, rtol, atol, self.norm, self.integrals)


DIFFERENTIABLE = {"kvaerno3": dfx.Kvaerno3, "kvaerno5": dfx.Kvaerno5}


def finite(tree: Any) -> Any:
    """Whether all of it is."""
    return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def beside(held: Any, y: Any) -> Any:
    """A flag for each time, as many axes as the states."""
    return held.reshape(-1, *[1] * (y.ndim - 1))
