"""A library of rules: functions whose derivatives are right where the plain formula's are not.

Contracts only; `_jax.py` and `_torch.py` implement them, with the modules beside them. Unless said otherwise
they hold in every mode and nest of modes, to any order, under vmap and compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradlab._dispatch import library

__all__ = [
    "checkpoint",
    "clip_gradient",
    "eigh",
    "expm",
    "log1mexp",
    "logdet",
    "logsumexp",
    "matrix_function",
    "norm",
    "reverse_gradient",
    "sqrt",
    "stochastic_logdet",
    "straight_through",
]


@library
def norm(x: Any, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
    """The 2-norm, without overflow, and with slope 0 at zero.

    ‖x‖ = m (Σ (xᵢ/m)²)^½ with m = max |xᵢ| held constant; ∂‖x‖ = x/‖x‖, and 0 at x = 0, where every plain
    formula gives NaN.

    Args:
        x: Real array.
        axis: Axes that are summed over; None: all; (): none.
        keepdims: Whether they stay, with length 1.

    Returns:
        An array without those axes.

    Raises:
        KindError: x is complex.

    Cost:
        That of a maximum and a sum. At zero all derivatives are 0: the norm has none there, 0 is its
        subgradient of least size.

    Example:
        >>> import torch
        >>> from gradlab import rules
        >>> torch.func.grad(rules.norm)(torch.tensor([3.0, 4.0])), torch.func.grad(rules.norm)(torch.zeros(2))
        (tensor([0.6000, 0.8000]), tensor([0., 0.]))
        >>> rules.norm(torch.tensor([3e30, 4e30]))
        tensor(5.0000e+30)

    Source:
        Blue, ACM Trans. Math. Software 4 (1978), doi:10.1145/355769.355771 (scaling).
    """


@library
def sqrt(x: Any) -> Any:
    """The square root, with slope 0 at zero.

    ∂√x = 1/(2√x) for x > 0, and 0 at x = 0, where the true slope is infinite: in √(y²) and its like an
    infinite slope times zero gives NaN.

    Args:
        x: Real array.

    Returns:
        An array like x, NaN where x < 0.

    Raises:
        KindError: x is complex.

    Cost:
        A root.

    Example:
        >>> import torch
        >>> from gradlab import rules
        >>> torch.func.grad(lambda y: rules.sqrt(y**2).sum())(torch.tensor([-2.0, 0.0]))
        tensor([-1.,  0.])

    Source:
        Griewank and Walther, Evaluating Derivatives (2008), chapter 14.
    """


@library
def log1mexp(x: Any) -> Any:
    """log(1 - exp(-x)) for x > 0, to full precision at both ends, and so its derivatives.

    log(-expm1(-x)) for x < log 2, log1p(-exp(-x)) beyond; ∂ = exp(-x)/(1 - exp(-x)).

    Args:
        x: Real array, x > 0.

    Returns:
        An array like x: -inf at 0 (with slope inf), 0 at inf (with slope 0), NaN where x < 0, as its slope is.

    Raises:
        KindError: x is complex.

    Cost:
        Both branches.

    Example:
        >>> import torch
        >>> from gradlab import rules
        >>> rules.log1mexp(torch.tensor([1e-30, 10.0]))
        tensor([-6.9078e+01, -4.5401e-05])
        >>> torch.func.grad(lambda x: rules.log1mexp(x).sum())(torch.tensor([1e-30, 1e4]))
        tensor([1.0000e+30, 0.0000e+00])

    Source:
        Mächler, Accurately computing log(1 - exp(-|a|)), R package Rmpfr (2012).
    """


@library
def logsumexp(x: Any, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
    """log Σ exp(xᵢ), with slope 0 where nothing is summed.

    m + log Σ exp(xᵢ - m) with m = max xᵢ held constant; ∂ = softmax(x). Entries of -inf (masked ones) have weight
    0; where all are -inf the value is -inf and every derivative 0, where plain formulas give NaN.

    Args:
        x: Real array.
        axis: Axes that are summed over; None: all; (): none.
        keepdims: Whether they stay, with length 1.

    Returns:
        An array without those axes; inf where an entry is inf, with derivatives NaN.

    Raises:
        KindError: x is complex.

    Cost:
        That of a maximum and a sum of exponentials.

    Example:
        >>> import torch
        >>> from gradlab import rules
        >>> x = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf]])
        >>> rules.logsumexp(x, axis=-1), torch.func.grad(lambda x: rules.logsumexp(x, axis=-1)[0])(x)[0]
        (tensor([0., -inf]), tensor([1., 0.]))

    Source:
        Blanchard, Higham and Higham, IMA J. Numer. Anal. 41 (2021), doi:10.1093/imanum/draa038.
    """


@library
def straight_through(hard: Any, soft: Any) -> Any:
    """The value of `hard` with the derivatives of `soft`: an estimator for what has none of its own.

    hard + (soft - soft₀), with hard and soft₀ = soft held constant.

    Args:
        hard: Tree of float arrays: rounded, sampled, one-hot.
        soft: A tree like it, finite.

    Returns:
        A tree equal to hard.

    Raises:
        InputError: trees of different structures or shapes.
        KindError: leaves of different dtypes, or with none that floats: an integer has no derivative.

    Cost:
        Two additions.

    Example:
        >>> import torch
        >>> from gradlab import rules
        >>> quantised = lambda x: rules.straight_through(x.round(), x)
        >>> quantised(torch.tensor(1.7)), torch.func.grad(lambda x: quantised(x) ** 2)(torch.tensor(1.7))
        (tensor(2.), tensor(4.))

    Source:
        Bengio, Léonard and Courville, arXiv:1308.3432.
    """


@library
def reverse_gradient(x: Any, scale: float = 1.0) -> Any:
    """x itself, with -scale times its derivative: gradient reversal, for adversaries.

    Args:
        x: Tree; its float arrays are differentiated, what else it holds is constant.
        scale: Factor λ; the derivative is -λ times the identity, in every mode.

    Returns:
        A tree equal to x.

    Raises:
        KindError: x holds no float array, or a complex one.

    Cost:
        A multiplication of the tangent.

    Example:
        >>> import torch
        >>> from gradlab import rules
        >>> torch.func.grad(lambda x: rules.reverse_gradient(x, 0.5) ** 2)(torch.tensor(3.0))
        tensor(-3.)

    Source:
        Ganin and Lempitsky, ICML 2015, arXiv:1409.7495.
    """


@library
def clip_gradient(x: Any, max_norm: float) -> Any:
    """x itself, whose cotangent is scaled down to a norm of at most `max_norm`.

    u ↦ u min(1, max_norm/‖u‖), with one norm over the whole tree.

    Args:
        x: Tree; its float arrays are differentiated, what else it holds is constant.
        max_norm: Positive number, inf for none; or an array of one, traced or mapped, where what is not positive
            gives derivatives that are NaN.

    Returns:
        A tree equal to x.

    Raises:
        InputError: max_norm is not positive.
        KindError: x holds no float array, or a complex one.
        StrategyError: forward mode through it, in torch; jax refuses it with an error of its own.

    Cost:
        A norm. Not linear in u, hence no derivative of the value: reverse mode alone, once or over itself;
        in jax also forward mode over it.

    Example:
        >>> import torch
        >>> from gradlab import rules
        >>> torch.func.grad(lambda x: (10 * rules.clip_gradient(x, 1.0)).sum())(torch.zeros(4))
        tensor([0.5000, 0.5000, 0.5000, 0.5000])

    Source:
        Pascanu, Mikolov and Bengio, ICML 2013, arXiv:1211.5063.
    """


@library
def eigh(A: Any) -> Any:
    """Eigenvalues and eigenvectors of symmetric or Hermitian matrices, with finite derivatives at equal eigenvalues.

    With A = V diag(w) Vᴴ and E = Vᴴ ∂A V: ∂wᵢ = Eᵢᵢ, ∂V = V (F ∘ E), where Fᵢⱼ = 1/(wⱼ - wᵢ), and 0 on the diagonal
    and where wᵢ and wⱼ are equal to rounding. The gauge is that of Vᴴ ∂V = 0 within such groups.

    Args:
        A: Array of shape (..., n, n); its Hermitian part (A + Aᴴ)/2 is taken.

    Returns:
        `(w, V)`, of shapes (..., n), ascending, and (..., n, n), columns.

    Cost:
        A decomposition; a derivative is two products of matrices.
        At equal eigenvalues first derivatives are right of whatever does not depend on the basis chosen
        within their space (sums over it, its projector, spectral functions); second ones are NaN, as F has
        lost what they need: take `matrix_function` for those.

    Example:
        >>> import torch
        >>> from gradlab import rules
        >>> total = lambda A: rules.eigh(A)[0].exp().sum()
        >>> torch.func.grad(total)(torch.eye(2, dtype=torch.float64))
        tensor([[2.7183, 0.0000],
                [0.0000, 2.7183]], dtype=torch.float64)

    Source:
        Giles, Collected matrix derivative results (2008), section 3.1; Magnus, Econometric Theory 1 (1985),
        doi:10.1017/S0266466600011129.
    """


@library
def matrix_function(f: Callable[[Any], Any], A: Any, order: int = 3) -> Any:
    """f of symmetric or Hermitian matrices, V f(diag w) Vᴴ, with right derivatives at equal eigenvalues.

    With V and w held constant and Δ = Vᴴ A V - diag w, which is zero but for its derivatives,
    f(A) = V (f(diag w) + Σ f[wᵢ, wⱼ] Δᵢⱼ + Σ f[wᵢ, wⱼ, wₖ] Δᵢⱼ Δⱼₖ + ...) Vᴴ, where f[...] are divided
    differences: for each of them the quotient, or Taylor's series where rounding spoils the quotient more.

    Args:
        f: Elementwise function of a real array, exact to rounding, with order + 2 derivatives of its own.
        A: Array of shape (..., n, n); its Hermitian part (A + Aᴴ)/2 is taken.
        order: Terms of the series, 0 to 3: derivatives by A are right up to this order, and lack terms beyond.

    Returns:
        An array like A.

    Raises:
        InputError: order is not 0, 1, 2 or 3.

    Cost:
        A decomposition, O(n³) time, and n^(order + 1) numbers: at n = 100 third order takes 800 MB, second 8.
        Measured of log, √, exp and cos on the scales 1e-8 to 1e8, divided differences of first, second and third
        order are good to 1e-10, 2e-8 and 1e-6 in float64, to 3e-5, 2e-4 and 2e-2 in float32: at worst, where
        neither form is good; to rounding at equal eigenvalues and at such that are well apart.

    Example:
        >>> import torch
        >>> from gradlab import rules
        >>> trace = lambda A: rules.matrix_function(torch.exp, A).diagonal().sum()
        >>> torch.func.grad(trace)(torch.zeros(2, 2))
        tensor([[1., 0.],
                [0., 1.]])

    Source:
        Daleckii and Krein (1965); Higham, Functions of Matrices (2008), section 3.2,
        doi:10.1137/1.9780898717778.
    """


@library
def expm(A: Any) -> Any:
    """The exponential of square matrices.

    ∂ expm(A) along E is the upper right block of expm([[A, E], [0, A]]), in every mode and order.

    Args:
        A: Array of shape (..., n, n).

    Returns:
        An array like A.

    Cost:
        O(n³) products by scaling and squaring; eight times that for a derivative. The relative error grows
        with the norm of A, 1e-11 at 1e6 in float64. jax squares 32 times at most: beyond a norm of 2³⁴ the value
        and its derivatives are NaN there.

    Example:
        >>> import torch
        >>> from gradlab import rules
        >>> rules.expm(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        tensor([[1., 1.],
                [0., 1.]])

    Source:
        Al-Mohy and Higham, SIAM J. Matrix Anal. Appl. 30 (2009), doi:10.1137/080716426.
    """


@library
def logdet(A: Any) -> Any:
    """log |det A|, whose derivatives are right in every nest of modes.

    ∂ log |det A| = tr(A⁻¹ ∂A), and ∂A⁻¹ = -A⁻¹ ∂A A⁻¹. torch's own logdet and slogdet are wrong from second order
    on wherever forward mode is involved.

    Args:
        A: Real array of shape (..., n, n).

    Returns:
        An array of shape (...); -inf, with derivatives that are not finite, where A is singular, and there alone.

    Raises:
        KindError: A is complex.

    Cost:
        A factorisation; an inverse for its derivatives.

    Example:
        >>> import torch
        >>> from gradlab import rules
        >>> torch.func.grad(rules.logdet)(torch.diag(torch.tensor([2.0, -4.0]))).diagonal()
        tensor([ 0.5000, -0.2500])

    Source:
        Giles, Collected matrix derivative results (2008), section 2.2.
    """


@library
def stochastic_logdet(
    matvec: Callable[..., Any], probes: Any, *params: Any, steps: int = 30, order: int = 3
) -> Any:
    """An estimate of log det A of a symmetric positive definite A that is known by its products alone.

    The value is the mean over probes z of ‖z‖² Σ τ² log θ, with the eigenvalues θ of Lanczos' tridiagonal matrix
    and the first entries τ of its eigenvectors. Derivatives are those of the mean of
    w·Δz - ½ w·Δ A⁻¹Δz + ⅓ w·Δ A⁻¹Δ A⁻¹Δz, with w = A⁻¹z, A held constant, and Δ = A(params) - A: along a direction
    w·(∂A)z, whose mean over random probes is tr(A⁻¹ ∂A).

    Args:
        matvec: Function `matvec(v, *params)` to A v, of vectors of n entries; arrays that it closes over are
            differentiated as well.
        probes: Array of shape (k, n), of independent entries of mean 0 and variance 1 (random signs vary least);
            not differentiated.
        *params: Trees; their float arrays are differentiated.
        steps: Of Lanczos' iteration; n at the most.
        order: Terms of the series, 0 to 3: derivatives are right up to this order, and lack terms beyond.

    Returns:
        A scalar: unbiased in its derivatives, and in its value but for the error of the quadrature, whose
        standard error falls as 1/√k. With k = n orthogonal probes of length √n derivatives are exact.

    Raises:
        InputError: probes is not a matrix, steps is not positive, order is not 0, 1, 2 or 3, A v is not like v.
        KindError: probes are not floats.
        StrategyError: probes are being differentiated; in torch, matvec closes over a differentiated tensor where
            it cannot be seen.
        ConvergenceError: A is seen not to be positive definite, or conjugate gradients do not converge (equinox's
            own error where jax has no numbers to look at).

    Cost:
        `steps` products for each probe, and memory of `steps` vectors; to be differentiated one more solve
        by conjugate gradients for each probe, and one or two for each order. torch.compile leaves it out of its
        graphs: it would unroll the iterations for minutes.

    Example:
        >>> import torch
        >>> from gradlab import rules
        >>> probes = 2**0.5 * torch.eye(2, dtype=torch.float64)
        >>> a = torch.tensor([2.0, 8.0], dtype=torch.float64)
        >>> estimate = lambda a: rules.stochastic_logdet(lambda v, a: a * v, probes, a)
        >>> estimate(a), torch.func.grad(estimate)(a)  # log 16
        (tensor(2.7726, dtype=torch.float64), tensor([0.5000, 0.1250], dtype=torch.float64))

    Source:
        Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38 (2017), doi:10.1137/16M1104974; Gardner et al.,
        NeurIPS 2018, arXiv:1809.11165.
    """


@library
def checkpoint(f: Callable[..., Any], *args: Any) -> Any:
    """f(*args), of which nothing but the arguments is kept for the backward pass: f runs again there.

    Args:
        f: Function of trees. In torch it must not close over tensors that are differentiated: the parameters of
            a module are passed by torch.func.functional_call. In jax it may be an equinox module.
        *args: Trees; float arrays are differentiated, numbers, strings and what else there is are constant.

    Returns:
        f's output.

    Raises:
        StrategyError: f closes over a tensor that is being differentiated (torch; jax differentiates it).

    Cost:
        One more evaluation of f for each backward pass; memory of the arguments alone. torch's own generators, of
        the host and of the arguments' devices, and generators among the arguments draw the same numbers again.
        Under torch.compile f runs as it stands: the compiler itself chooses what to compute again.

    Example:
        >>> import torch
        >>> from gradlab import rules
        >>> layer = torch.nn.Linear(2, 1)
        >>> call = lambda params, x: torch.func.functional_call(layer, params, (x,))
        >>> y = rules.checkpoint(call, dict(layer.named_parameters()), torch.tensor([3.0, 4.0]))
        >>> torch.autograd.grad(y, layer.weight)
        (tensor([[3., 4.]]),)

    And for a function alone:
        >>> import torch
        >>> from gradlab import rules
        >>> torch.func.grad(lambda x: rules.checkpoint(torch.sin, x))(torch.tensor(0.0))
        tensor(1.)

    Source:
        Griewank and Walther, ACM Trans. Math. Software 26 (2000), doi:10.1145/347837.347846.
    """
