"""Private training: Poisson sampling, and the accounting of noise by the dp-accounting package.

    sigma = privacy.noise_multiplier(epsilon=4.0, delta=1e-4, sample_rate=256 / n, steps=300)
    for indices in privacy.poisson_batches(n, sample_rate=256 / n, steps=300, seed=None):
        grad, _ = private_grad(loss, params, X[indices], y[indices], max_norm=1.0, noise_multiplier=sigma,
                               expected_batch_size=256, rng=...)

Neighbouring data sets differ in one example that is added or removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args

from gradlab._errors import InputError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["epsilon", "noise_multiplier", "poisson_batches"]

Accountant = Literal["rdp", "pld"]
OVERFLOW = 1e-12  # probability that some batch of a run exceeds the padded size


def epsilon(
    *, noise_multiplier: float, delta: float, sample_rate: float, steps: int, accountant: Accountant = "rdp"
) -> float:
    """The epsilon of a run of Poisson-sampled Gaussian steps, at this delta.

    Args:
        noise_multiplier: σ > 0, the noise's standard deviation over max_norm.
        delta: Between 0 and 1, below one over the number of examples.
        sample_rate: The probability q with which each example is in a batch.
        steps: Steps of the run.
        accountant: `"rdp"` (Rényi moments: quick, an upper bound) or `"pld"` (the loss distribution itself: tight).

    Returns:
        ε: the run is (ε, δ)-differentially private.

    Raises:
        InputError: a number out of its range, an unknown accountant.
        ImportError: the extra `gradlab[privacy]` is not installed.

    Cost:
        Below a second; with `"pld"` some.

    Example:
        >>> from gradlab import privacy
        >>> run = {"delta": 1e-4, "sample_rate": 256 / 1437, "steps": 300}
        >>> round(privacy.epsilon(noise_multiplier=3.34, **run), 1)
        4.0

    Source:
        Mironov, Talwar and Zhang, Rényi differential privacy of the sampled Gaussian mechanism (2019),
        arXiv:1908.10530. Sommer, Meiser and Mohammadi, Privacy loss classes (2019), doi:10.2478/popets-2019-0029.
    """
    _check("epsilon", delta, sample_rate, steps, accountant)
    if not 0 < noise_multiplier < math.inf:
        raise InputError(f"epsilon: noise_multiplier is {noise_multiplier}; pass a positive finite number")
    fresh, event = _accounting(accountant)
    return float(fresh().compose(event(noise_multiplier, sample_rate, steps)).get_epsilon(delta))


def noise_multiplier(
    *, epsilon: float, delta: float, sample_rate: float, steps: int, accountant: Accountant = "rdp"
) -> float:
    """The smallest noise with which a run is (epsilon, delta)-differentially private.

    Args:
        epsilon: ε > 0.
        delta, sample_rate, steps, accountant: As for `epsilon`.

    Returns:
        σ, to 1e-4 upwards.

    Raises:
        InputError, ImportError: as for `epsilon`.

    Cost:
        Some twenty calls of `epsilon`.

    Example:
        >>> from gradlab import privacy
        >>> run = {"delta": 1e-4, "sample_rate": 256 / 1437, "steps": 300}
        >>> round(privacy.noise_multiplier(epsilon=1.0, **run), 1)
        10.9

    Source:
        As for `epsilon`.
    """
    _check("noise_multiplier", delta, sample_rate, steps, accountant)
    if not 0 < epsilon < math.inf:
        raise InputError(f"noise_multiplier: epsilon is {epsilon}; pass a positive finite number")
    import dp_accounting

    fresh, event = _accounting(accountant)
    found = dp_accounting.calibrate_dp_mechanism(
        fresh,
        lambda sigma: event(sigma, sample_rate, steps),
        epsilon,
        delta,
        bracket_interval=dp_accounting.LowerEndpointAndGuess(1e-2, 4.0),
        tol=1e-4,
    )
    return float(found)


def poisson_batches(
    size: int, *, sample_rate: float, steps: int, seed: int | None, padded: bool = False
) -> Iterator[Any]:
    """Batches in which each of `size` examples is with probability sample_rate, each time anew.

    Args:
        size: The number of examples in all.
        sample_rate: That probability.
        steps: How many batches.
        seed: Of the draws; None takes entropy from the operating system, as a run that is to be private should.
        padded: Whether to give arrays of one length, for compiled code: `(indices, mask)`, where mask is false for the
            filling. The length is passed in one run of 10¹², which raises.

    Returns:
        An iterator of arrays of indices, or of `(indices, mask)`. A batch may be empty.

    Raises:
        InputError: a number out of its range.
        RuntimeError: a batch did not fit the padded length.

    Cost:
        Some `size` random numbers a batch.

    Example:
        >>> from gradlab import privacy
        >>> [len(batch) for batch in privacy.poisson_batches(1000, sample_rate=0.1, steps=3, seed=0)]
        [89, 121, 108]

    Source:
        Mironov, Talwar and Zhang (2019), arXiv:1908.10530: the sampling that the accounting supposes.
    """
    import numpy as np

    if size < 1 or steps < 0 or not 0 < sample_rate <= 1:
        raise InputError(
            f"poisson_batches: size is {size}, steps {steps}, sample_rate {sample_rate}; pass a positive size, "
            "steps that are not negative, and a rate in (0, 1]"
        )
    length = _length(size, sample_rate, steps) if padded else size

    def batches() -> Iterator[Any]:
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            chosen = np.flatnonzero(rng.random(size) < sample_rate)
            yield _filled(chosen, length) if padded else chosen

    return batches()


def _length(size: int, sample_rate: float, steps: int) -> int:
    from scipy.stats import binom

    return int(min(size, binom.isf(OVERFLOW / max(steps, 1), size, sample_rate) + 1))


def _filled(chosen: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    if len(chosen) > length:
        raise RuntimeError(f"poisson_batches: a batch of {len(chosen)} does not fit {length}; start again")
    mask = np.arange(length) < len(chosen)
    return np.concatenate([chosen, np.zeros(length - len(chosen), chosen.dtype)]), mask


def _check(op: str, delta: float, sample_rate: float, steps: int, accountant: str) -> None:
    if accountant not in get_args(Accountant):
        raise InputError(f"{op}: unknown accountant {accountant!r}; pass 'rdp' or 'pld'")
    if not 0 < delta < 1:
        raise InputError(f"{op}: delta is {delta}; pass a number between 0 and 1")
    if not 0 < sample_rate <= 1:
        raise InputError(f"{op}: sample_rate is {sample_rate}; pass a probability above 0")
    if steps < 1:
        raise InputError(f"{op}: steps is {steps}; pass a positive whole number")


def _accounting(accountant: str) -> tuple[Callable[[], Any], Callable[..., Any]]:
    """A fresh accountant, and the event of a run."""
    try:
        import dp_accounting
        from dp_accounting import pld, rdp
    except ImportError as error:
        raise ImportError("gradlab.privacy needs dp-accounting: pip install 'gradlab[privacy]'") from error

    def event(sigma: float, sample_rate: float, steps: int) -> Any:
        step = dp_accounting.PoissonSampledDpEvent(sample_rate, dp_accounting.GaussianDpEvent(sigma))
        return dp_accounting.SelfComposedDpEvent(step, steps)

    return (rdp.RdpAccountant if accountant == "rdp" else pld.PLDAccountant), event
