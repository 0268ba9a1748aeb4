"""Is every derivative right, on real data, in both frameworks, and what does it cost?

    python experiments/derivative_check.py --preset smoke --framework both --out results

Expected: every cell green, jax and torch within 1e-12 of each other in float64, exit code 0; a table of times
in gradients; results/verify.json and results/verify.png. The same job as `gradlab verify`.
"""

import typer

from gradlab.cli import verify

if __name__ == "__main__":
    typer.run(verify)
