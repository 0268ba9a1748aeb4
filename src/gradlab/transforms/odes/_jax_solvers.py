"""diffrax's solvers by gradlab's names."""

from __future__ import annotations

from typing import ClassVar

import diffrax as dfx
import numpy as np

from gradlab.transforms.odes.tableaux import RK4


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


SOLVERS = {
    "euler": dfx.Euler,
    "midpoint": dfx.Midpoint,
    "bosh3": dfx.Bosh3,
    "rk4": RungeKutta4,
    "dopri5": dfx.Dopri5,
    "tsit5": dfx.Tsit5,
    "dopri8": dfx.Dopri8,
}
