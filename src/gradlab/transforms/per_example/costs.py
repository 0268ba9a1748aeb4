"""Which form of a sum of squared entries is cheaper: by the Gram matrices of the factors, or formed and squared.

A leaf's gradient for one example is Σₜ lₜ rₜᵀ in each of G groups, with lₜ of p entries and rₜ of q. Its squared norm
is Σₜₛ (lₜ·lₛ)(rₜ·rₛ), or the sum of the squares of its p q entries.
"""

from __future__ import annotations

# Nanoseconds a multiplication and addition in small matrix products, and an entry that is written and read again;
# on one core, fitted by `experiments/per_example_cost.py --preset calibrate` (results/per_example_cost.jsonl).
PRODUCT = 0.03
ENTRY = 0.5


def gram(T: int, p: int, q: int, groups: int = 1) -> float:
    """Nanoseconds an example of both Gram matrices, their product and its sum."""
    return groups * T * T * (PRODUCT * (p + q) + 2 * ENTRY)


def formed(T: int, p: int, q: int, groups: int = 1) -> float:
    """Nanoseconds an example of the gradient and its sum of squares."""
    return groups * p * q * (PRODUCT * T + ENTRY)


def gram_is_cheaper(T: int, p: int, q: int, groups: int = 1) -> bool:
    """With one row (T = 1) always: it is |l|² |r|²."""
    return T == 1 or gram(T, p, q, groups) < formed(T, p, q, groups)
