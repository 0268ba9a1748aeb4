"""What are the derivatives of well-known initial value problems, to ten digits and more?

    python experiments/reference_sensitivities.py [--out src/gradlab/bench/ode_references.json] [--only NAME,NAME]

The variational equations of every problem in gradlab.bench.ode_problems, S' = J S + ∂f/∂p with S in units of
1 / p, by SciPy at a tolerance of 1e-12 (DOP853, or Radau where stiff), with Jacobians by complex steps.
Expected: solved again by LSODA at 1e-11, every number agrees to 1e-7 or better; aborts where one does not. The table
says how well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track
from rich.table import Table
from scipy.integrate import solve_ivp

from gradlab.bench.console import console
from gradlab.bench.ode_problems import EQUATIONS, Equation


def jacobians(e: Equation, t: float, y: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """∂f/∂y and ∂f/∂p by complex steps, which are exact to rounding."""
    step = 1e-40

    def columns(at: Any, n: int) -> np.ndarray:
        rows = [np.imag(np.array(at(1j * step * np.eye(n)[i]), dtype=complex)) / step for i in range(n)]
        return np.stack(rows, 1)

    return (
        columns(lambda d: e.f(t, y + d, p.astype(complex)), len(y)),
        columns(lambda d: e.f(t, y.astype(complex), p + d), len(p)),
    )


def sensitivities(e: Equation, method: str, tolerance: float) -> dict[str, np.ndarray]:
    """y, ∂y/∂y0 and ∂y/∂p at the end."""
    y0, p = np.array(e.y0), np.array(e.p)
    n, m = len(y0), len(p)

    def variational(t: float, z: np.ndarray) -> np.ndarray:
        y, S = z[:n], z[n:].reshape(n, n + m)
        J, P = jacobians(e, t, y, p)
        slope = J @ S
        slope[:, n:] += P * p
        return np.concatenate([np.array(e.f(t, y, p), dtype=float), slope.ravel()])

    def jacobian(t: float, z: np.ndarray) -> np.ndarray:
        """Block-lower-triangular; its second derivatives by differences, good enough for Newton's iteration."""
        J, _ = jacobians(e, t, z[:n], p)
        blocks, here = np.zeros((len(z), len(z))), variational(t, z)
        blocks[:n, :n] = J
        blocks[n:, n:] = np.kron(J, np.eye(n + m))
        for i in range(n):
            moved = z.copy()
            moved[i] += 1e-7 * max(abs(z[i]), 1e-3)
            blocks[n:, i] = (variational(t, moved) - here)[n:] / (moved[i] - z[i])
        return blocks

    start = np.concatenate([y0, np.hstack([np.eye(n), np.zeros((n, m))]).ravel()])
    options = {"jac": jacobian} if method == "Radau" else {}
    found = solve_ivp(
        variational, (0, e.end), start, method, rtol=tolerance, atol=tolerance * 1e-4, **options
    )
    if not found.success:
        raise RuntimeError(f"{e.name}: {found.message}")
    z = found.y[:, -1]
    S = z[n:].reshape(n, n + m)
    return {"y": z[:n], "dy0": S[:, :n], "dp": S[:, n:] / p}


def main(out: Path = Path("src/gradlab/bench/ode_references.json"), only: str = "") -> None:
    """Make the references, check them, write them; of some problems alone, named with commas between."""
    screen = console()
    table = Table("problem", "by", "largest |∂y/∂y0|", "difference")
    references = json.loads(out.read_text()) if out.exists() else {}
    chosen = [EQUATIONS[name] for name in only.split(",") if name] or list(EQUATIONS.values())
    for e in track(chosen, console=screen, transient=True):
        method = "Radau" if e.stiff else "DOP853"
        found, other = sensitivities(e, method, 1e-12), sensitivities(e, "LSODA", 1e-11)
        apart = max(np.abs(found[k] - other[k]).max() / np.abs(found[k]).max() for k in found)
        table.add_row(e.name, method, f"{np.abs(found['dy0']).max():.2e}", f"{apart:.1e}")
        if not apart < 1e-7:
            screen.print(table)
            raise SystemExit(f"{e.name}: two methods differ by {apart:.1e}")
        references[e.name] = {name: value.tolist() for name, value in found.items()}
        out.write_text(json.dumps(references, indent=1) + "\n")
    screen.print(table)


if __name__ == "__main__":
    typer.run(main)
