"""python -m gradlab.bench.gradbench --framework jax|torch: answers on stdout what the suite asks on stdin."""

from __future__ import annotations

import argparse
import os
import sys


def main() -> None:
    """Keep stdout for the answers alone, and answer until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m gradlab.bench.gradbench", description=__doc__)
    parser.add_argument("--framework", choices=("jax", "torch"), required=True)
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch; jax takes them from its own flags"
    )
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints, from whatever language, goes to stderr
    if options.framework == "jax":
        os.environ["JAX_ENABLE_X64"] = "1"
    else:
        import torch

        torch.set_num_threads(options.threads)
    from gradlab.bench.gradbench.protocol import serve

    serve(options.framework, sys.stdin, answers)


if __name__ == "__main__":
    main()
