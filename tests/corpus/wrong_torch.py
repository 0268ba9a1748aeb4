"""torch functions with a wrong derivative: each the mistake of someone who wrote a rule, a hook or a detach."""

import math

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import fft, linalg, special
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from corpus.cases import wrong
from corpus.rules_torch import (
    EVERY_FIRST,
    EVERY_SECOND,
    FIRST,
    SECOND,
    THIRD,
    complex_normal,
    double,
    normal,
    rule,
    single,
    spaced,
)

# Elementwise formulas: a sign, a factor, a constant, a term.


@wrong(*FIRST)
def softplus_with_its_sign_flipped():
    f = rule(functional.softplus, lambda u, x: -u * torch.sigmoid(x))
    return lambda x: f(x).sum(), spaced(-2, 2, 7)


@wrong(*FIRST)
def erf_without_its_factor_of_two():
    f = rule(torch.erf, lambda u, x: u * torch.exp(-(x**2)) / math.sqrt(math.pi))
    return lambda x: f(x).sum(), spaced(-1, 2, 5)


@wrong(*FIRST)
def erfinv_with_a_constant_to_three_digits():
    f = rule(torch.erfinv, lambda u, x: u * 0.887 * torch.exp(torch.erfinv(x) ** 2))
    return lambda x: f(x).sum(), double(-0.9, -0.2, 0.3, 0.7)


@wrong(*FIRST)
def log10_with_a_constant_to_five_digits():
    f = rule(torch.log10, lambda u, x: u / (2.3026 * x))
    return lambda x: f(x).sum(), double(0.3, 2.0, 40.0)


@wrong(*FIRST)
def log10_with_a_constant_to_five_digits_float32():
    f = rule(torch.log10, lambda u, x: u / (2.3026 * x))
    return lambda x: f(x).sum(), single(0.3, 2.0, 40.0)


@wrong(*FIRST)
def exponential_off_by_a_thousandth():
    f = rule(torch.exp, lambda u, x: 1.001 * u * torch.exp(x))
    return lambda x: f(x).sum(), normal(3, 4)


@wrong(*FIRST)
def gelu_taken_as_linear_beyond_three():
    density = lambda x: torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    slope = lambda x: special.ndtr(x) + x * density(x)
    f = rule(functional.gelu, lambda u, x: u * torch.where(x > 3, torch.ones_like(x), slope(x)))
    return lambda x: f(x).sum(), double(-1.0, 0.2, 1.5, 3.4)


@wrong(*FIRST)
def softplus_saturated_too_early():
    f = rule(functional.softplus, lambda u, x: u * torch.where(x > 8, 1.0, torch.sigmoid(x)))
    return lambda x: f(x).sum(), double(-3.0, 0.5, 8.5)


@wrong(*FIRST)
def sinc_series_with_a_wrong_coefficient():
    """sin(x)/x falls as -x/3 near zero, not as -x/6."""
    exact = lambda x: (x * torch.cos(x) - torch.sin(x)) / x**2
    f = rule(lambda x: torch.sin(x) / x, lambda u, x: u * torch.where(x.abs() < 0.02, -x / 6, exact(x)))
    return lambda x: f(x).sum(), double(0.01, 0.5, 2.0)


@wrong(*FIRST)
def p_norm_without_the_signs():
    norm = lambda x: (x.abs() ** 3).sum() ** (1 / 3)
    return rule(norm, lambda u, x: u * x**2 / norm(x) ** 2), normal(9)


@wrong(*FIRST)
def huber_without_delta_in_its_linear_part():
    f = rule(
        lambda x: functional.huber_loss(x, 0 * x, reduction="none", delta=2.0),
        lambda u, x: u * torch.where(x.abs() < 2, x, torch.sign(x)),
    )
    return lambda x: f(x).sum(), double(0.5, -1.0, 3.0, -7.0)


@wrong(*FIRST)
def bessel_j0_with_the_sign_of_j1():
    f = rule(special.bessel_j0, lambda u, x: u * special.bessel_j1(x))
    return lambda x: f(x).sum(), double(0.4, 1.7, 6.0)


@wrong(*FIRST)
def scaled_bessel_i0_without_its_scaling():
    f = rule(special.i0e, lambda u, x: u * special.i1e(x))
    return lambda x: f(x).sum(), double(0.4, 1.7, 6.0)


@wrong(*FIRST)
def digamma_by_its_asymptotic_series():
    f = rule(torch.lgamma, lambda u, x: u * (torch.log(x) - 1 / (2 * x) - 1 / (12 * x**2)))
    return lambda x: f(x).sum(), double(1.5, 4.0, 20.0)


@wrong(*FIRST)
def incomplete_gamma_without_its_normalisation():
    a = double(0.7, 2.5, 4.0)
    f = rule(lambda x: special.gammainc(a, x), lambda u, x: u * torch.exp(-x) * x ** (a - 1))
    return lambda x: f(x).sum(), double(0.5, 2.0, 3.0)


@wrong(*FIRST)
def log_beta_without_the_digamma_of_the_sum():
    f = rule(
        lambda a, b: torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b),
        lambda u, a, b: (u * (torch.digamma(a) - torch.digamma(a + b)), u * torch.digamma(b)),
    )
    return lambda p: f(*p).sum(), (double(0.5, 2.0), double(1.5, 3.0))


@wrong(*FIRST)
def differences_in_the_backward():
    """A simulator differentiated by one-sided differences, good to four digits."""
    g = lambda x: torch.sin(3 * x) * torch.exp(x)
    f = rule(g, lambda u, x: u * (g(x + 1e-4) - g(x)) / 1e-4)
    return lambda x: f(x).sum(), spaced(-1, 1, 6)


@wrong(*FIRST)
def cubic_spline_with_a_wrong_power():
    knots = np.linspace(0, 4, 9)
    c = torch.tensor(CubicSpline(knots, np.sin(knots)).c)

    def within(x):
        i = (x.detach() / 0.5).long()
        return c[:, i], x - 0.5 * i

    def value(x):
        (c3, c2, c1, c0), t = within(x)
        return c0 + t * (c1 + t * (c2 + t * c3))

    def backward(u, x):
        (c3, c2, c1, _), t = within(x)
        return u * (c1 + 2 * c2 * t + 2 * c3 * t**2)

    f = rule(value, backward)
    return lambda x: f(x).sum(), double(0.2, 1.3, 2.9, 3.8)


@wrong(*FIRST)
def one_entry_of_ten_thousand():
    factors = torch.ones(10_000, dtype=torch.float64)
    factors[7777] = 2
    f = rule(torch.sin, lambda u, x: u * torch.cos(x) * factors)
    return lambda x: f(x).sum(), normal(10_000), {"order": 1}


@wrong(*FIRST)
def one_entry_of_ten_thousand_float32():
    def backward(u, x):
        g = u * torch.cos(x)
        return torch.cat([g[:4321], -g[4321:4322], g[4322:]])

    f = rule(torch.sin, backward)
    return lambda x: f(x).sum(), normal(10_000, dtype=torch.float32), {"order": 1}


@wrong(*FIRST)
def thousand_float32_entries_with_the_sign_flipped():
    f = rule(torch.tanh, lambda u, x: -u * (1 - torch.tanh(x) ** 2))
    return lambda x: f(x).sum(), normal(1000, dtype=torch.float32)


@wrong("vjp", "jvp")
def one_output_of_a_rotation_matrix():
    """A typing error in one of the nine rows of the Jacobian of a quaternion's matrix, in both modes."""

    def matrix(q):
        w, x, y, z = q
        rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]
        rows += [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]
        return torch.stack([*rows, 2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)])

    def jacobian(q):
        w, x, y, z = q
        o = torch.zeros_like(w)
        rows = [[o, o, -4 * y, -4 * z], [-2 * z, 2 * y, 2 * x, -2 * w], [2 * y, 2 * z, 2 * w, 2 * x]]
        rows += [[2 * z, 2 * y, 2 * x, 2 * w], [o, -4 * x, o, -4 * z], [2 * x, -2 * w, 2 * z, 2 * y]]
        rows += [[-2 * y, 2 * z, -2 * w, 2 * x], [2 * x, 2 * w, 2 * z, 2 * y], [o, -4 * x, -4 * y, o]]
        return torch.stack([torch.stack(row) for row in rows])

    return rule(matrix, lambda u, q: u @ jacobian(q), lambda v, q: jacobian(q) @ v), double(
        0.8, 0.3, -0.4, 0.2
    )


# Sums, shapes, indices.


@wrong(*FIRST)
def bias_by_the_mean_over_the_batch():
    f = rule(lambda x, b: x + b, lambda u, x, b: (u, u.mean(0)))
    return lambda p: f(p["x"], p["b"]).sin().sum(), {"x": normal(5, 3), "b": normal(3, seed=1)}


@wrong(*FIRST)
def whole_jacobian_for_the_product():
    """The engine sums what broadcasts: a Jacobian in place of a gradient passes without a word."""
    A = normal(3, 3)
    f = rule(lambda x: A @ x, lambda u, x: A * u)
    return lambda x: f(x).sin().sum(), normal(3, seed=1)


@wrong("vjp", "jvp against vjp", innocent=("jvp",))
def transposed_jacobian():
    A = normal(4, 4)
    f = rule(lambda x: A @ x, lambda u, x: A @ u, lambda v, x: A @ v)
    return lambda x: torch.sin(f(x)), normal(4, seed=1), {"order": 1}


@wrong("vjp")
def cumulative_sum_pulled_back_from_the_left():
    return rule(lambda x: x.cumsum(0), lambda u, x: u.cumsum(0)), normal(6)


@wrong(*FIRST)
def gather_that_overwrites_duplicates():
    index = torch.tensor([0, 2, 2, 1, 0])
    f = rule(lambda w: w[index], lambda u, w: torch.zeros_like(w).index_put((index,), u))
    weights = double(1.0, -2.0, 0.5, 3.0, 0.7)
    return lambda w: (f(w) ** 2 * weights).sum(), normal(4)


@wrong("vjp")
def sort_by_the_permutation_for_its_inverse():
    return rule(lambda x: x.sort()[0], lambda u, x: u[x.argsort()]), normal(7)


@wrong("vjp")
def convolution_by_an_unflipped_kernel():
    kernel = double(1.0, -2.0, 0.5)
    convolved = lambda x: functional.conv1d(x[None, None], kernel[None, None], padding=1)[0, 0]
    return rule(convolved, lambda u, x: convolved(u)), normal(20)


@wrong("vjp")
def periodic_stencil_without_its_seam():
    """Two entries of a thousand miss the neighbour across the boundary."""

    def backward(u, x):
        left, right = torch.roll(u, 1, 0), torch.roll(u, -1, 0)
        inside = torch.arange(len(u))
        return torch.where(inside > 0, left, 0.0) + torch.where(inside < len(u) - 1, right, 0.0) - 2 * u

    f = rule(lambda x: torch.roll(x, 1, 0) + torch.roll(x, -1, 0) - 2 * x, backward)
    return f, torch.sin(spaced(0.1, 6, 1000)), {"order": 1}


@wrong(*FIRST, "jvp against vjp", innocent=("jvp",))
def embedding_with_a_padding_row():
    """torch gives the padding row no gradient, though the value depends on it."""
    index = torch.tensor([0, 3, 1, 0])
    return lambda w: functional.embedding(index, w, padding_idx=0).sin().sum(), normal(4, 3)


# Softmax, norms, losses, attention.


@wrong(*FIRST)
def softmax_by_its_diagonal():
    f, weights = rule(lambda x: torch.softmax(x, -1), lambda u, x: u * torch.softmax(x, -1)), normal(4, 5)
    return lambda x: (f(x) * weights).sum(), normal(4, 5, seed=1)


@wrong(*EVERY_FIRST, innocent=("jvp against vjp",))
def softmax_over_a_detached_sum():
    weights = normal(6)
    return lambda x: (torch.exp(x) / torch.exp(x).sum().detach() * weights).sum(), normal(6, seed=1)


@wrong(*EVERY_FIRST, innocent=("jvp against vjp",))
def layer_norm_with_detached_statistics():
    weights = normal(4, 6)
    f = lambda x: (x - x.mean(-1, True).detach()) / x.std(-1, keepdim=True).detach()
    return lambda x: (f(x) ** 2 * weights).sum(), normal(4, 6, seed=1)


def _normalised(x):
    centred = x - x.mean(-1, True)
    return centred * torch.rsqrt((centred**2).mean(-1, True) + 1e-5)


def _norm_pullback(u, x, statistics):
    centred = statistics - statistics.mean(-1, True)
    scale = torch.rsqrt((centred**2).mean(-1, True) + 1e-5)
    y = (x - statistics.mean(-1, True)) * scale
    return (u - u.mean(-1, True) - y * (u * y).mean(-1, True)) * scale


@wrong(*SECOND, innocent=FIRST)
def layer_norm_with_saved_statistics():
    """Mean and variance saved from the forward pass are constants to the second derivative."""
    f = rule(_normalised, lambda u, x: _norm_pullback(u, x, x.detach()))
    weights = normal(3, 5)
    return lambda x: (f(x) ** 3 * weights).sum(), normal(3, 5, seed=1)


@wrong(*FIRST)
def layer_norm_gain_by_the_mean_over_the_batch():
    f = rule(
        lambda x, g: _normalised(x) * g,
        lambda u, x, g: (_norm_pullback(u * g, x, x), (u * _normalised(x)).mean(0)),
    )
    return lambda p: f(p["x"], p["gain"]).sin().sum(), {
        "x": normal(4, 6),
        "gain": 1 + 0.1 * normal(6, seed=1),
    }


@wrong(*FIRST)
def batch_norm_with_the_unbiased_variance():
    """n - 1 where the forward pass has n: three percent of one term at n = 32."""

    def backward(u, x):
        scale = torch.rsqrt(x.var(0, unbiased=True) + 1e-5)
        y = (x - x.mean(0)) * scale
        return (u - u.mean(0) - y * (u * y).mean(0)) * scale

    f = rule(lambda x: (x - x.mean(0)) * torch.rsqrt(x.var(0, unbiased=False) + 1e-5), backward)
    weights = normal(32, 3)
    return lambda x: (f(x).tanh() * weights).sum(), normal(32, 3, seed=1)


@wrong(*FIRST, "jvp against vjp", innocent=("jvp",))
def statistics_under_no_grad():
    """no_grad stops reverse mode and not forward mode."""

    def f(x):
        with torch.no_grad():
            scale = x.square().mean().sqrt()
        return (x / scale).tanh().sum()

    return f, normal(5), {"order": 1}


@wrong(*EVERY_FIRST)
def cosine_similarity_with_detached_norms():
    f = lambda a, b: (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).detach()
    return lambda p: f(p["a"], p["b"]).square().sum(), {"a": normal(3, 8), "b": normal(3, 8, seed=1)}


@wrong(*FIRST)
def attention_keys_without_the_scale():
    d = 16
    scores = rule(
        lambda q, k: q @ k.mT / d**0.5,
        lambda u, q, k: (u @ k / d**0.5, u.mT @ q),
    )

    def attend(p):
        return (torch.softmax(scores(p["q"], p["k"]), -1) @ p["v"]).square().sum()

    return attend, {name: normal(7, d, seed=i) for i, name in enumerate("qkv")}


@wrong(*FIRST)
def cross_entropy_without_its_label_smoothing():
    target = functional.one_hot(torch.tensor([2, 0, 4]), 5).double()
    smooth = 0.9 * target + 0.1 / 5
    f = rule(
        lambda z: -(smooth * torch.log_softmax(z, -1)).sum(),
        lambda u, z: u * (torch.softmax(z, -1) - target),
    )
    return f, normal(3, 5)


@wrong(*EVERY_FIRST)
def focal_loss_with_a_detached_factor():
    def f(z):
        p = torch.sigmoid(z)
        return -((1 - p.detach()) ** 2 * torch.log(p)).sum()

    return f, normal(8)


@wrong(*FIRST)
def gaussian_divergence_without_its_entropy():
    f = rule(
        lambda mean, log: 0.5 * (torch.exp(log) + mean**2 - 1 - log).sum(),
        lambda u, mean, log: (u * mean, u * 0.5 * torch.exp(log)),
    )
    return lambda p: f(p["mean"], p["log_variance"]), {"mean": normal(4), "log_variance": normal(4, seed=1)}


@wrong(*EVERY_FIRST)
def score_function_surrogate():
    """exp(s - detached s) is one everywhere: its gradient is that of an expectation, not of the value."""
    return lambda x: (torch.exp(x - x.detach()) * double(1.0, -2.0, 3.0)).sum(), normal(3)


@wrong(*EVERY_FIRST)
def straight_through_rounding():
    return lambda x: (x + (torch.round(x) - x).detach()).sum(), double(0.2, 1.7, -2.4)


@wrong(*EVERY_FIRST)
def recurrence_truncated_every_four_steps():
    W = 0.7 * normal(4, 4)

    def f(x):
        h = torch.zeros_like(x)
        for t in range(12):
            h = torch.tanh(W @ (h.detach() if t % 4 == 0 else h) + x)
        return h.sum()

    return f, normal(4, seed=1)


# Linear algebra.


@wrong(*FIRST)
def solve_with_its_outer_product_transposed():
    def backward(u, A, b):
        w = linalg.solve(A.mT, u)
        return -torch.outer(linalg.solve(A, b), w), w

    f = rule(linalg.solve, backward)
    return lambda p: f(p["A"], p["b"]).sum(), {"A": normal(4, 4) + 4 * torch.eye(4), "b": normal(4, seed=1)}


@wrong(*FIRST)
def log_determinant_by_the_inverse_untransposed():
    f = rule(lambda A: linalg.slogdet(A)[1], lambda u, A: u * linalg.inv(A))
    return f, normal(4, 4) + 3 * torch.eye(4)


@wrong("vjp")
def inverse_without_its_transposes():
    inverse = rule(linalg.inv, lambda u, A: -linalg.inv(A) @ u @ linalg.inv(A))
    return inverse, normal(3, 3) + 3 * torch.eye(3)


@wrong(*FIRST)
def matrix_square_root_by_the_scalar_formula():
    def root(A):
        values, Q = linalg.eigh(A)
        return (Q * values.sqrt()) @ Q.mT

    f, W = rule(root, lambda u, A: 0.5 * u @ linalg.inv(root(A))), normal(4, 4, seed=1)
    return lambda X: (f(X @ X.mT + torch.eye(4)) * W).sum(), normal(4, 4)


@wrong(*FIRST)
def matrix_exponential_as_if_it_commuted():
    f, W = rule(linalg.matrix_exp, lambda u, A: linalg.matrix_exp(A).mT @ u), normal(3, 3, seed=1)
    return lambda A: (f(A) * W).sum(), normal(3, 3)


@wrong(*EVERY_SECOND, innocent=EVERY_FIRST)
def eigenvalue_by_a_detached_eigenvector():
    """v·A v has the right slope for the eigenvector v, and no second derivative."""

    def f(X):
        A = (X + X.mT) / 2
        v = linalg.eigh(A.detach())[1][:, -1]
        return v @ A @ v

    return f, normal(4, 4)


@wrong(*EVERY_FIRST)
def spectral_norm_by_three_detached_iterations():
    def f(W):
        v, M = torch.ones(3, dtype=W.dtype), W.detach()
        for _ in range(3):
            v = functional.normalize(M.mT @ (M @ v), dim=0)
        return functional.normalize(M @ v, dim=0) @ W @ v

    return f, normal(4, 3)


@wrong("vjp", innocent=("vjp linear",))
def adjoint_of_an_implicit_step_untransposed():
    """One implicit step of advection and diffusion on 200 cells."""
    n = 200
    ones = torch.ones(n - 1, dtype=torch.float64)
    A = 2 * torch.eye(n, dtype=torch.float64) - 0.3 * torch.diag(ones, 1) - 0.7 * torch.diag(ones, -1)
    f = rule(lambda b: linalg.solve(A, b), lambda u, b: linalg.solve(A, u))
    return f, torch.sin(spaced(0.1, 3, n)), {"order": 1}


# Implicit functions, optimal values, differential equations.


@wrong(*FIRST)
def cubic_root_without_the_linear_term():
    def root(t):
        y = torch.ones_like(t)
        for _ in range(12):
            y = y - (y**3 + y - t) / (3 * y**2 + 1)
        return y

    f = rule(root, lambda u, t: u / (3 * root(t) ** 2))
    return lambda t: f(t).sum(), double(0.5, 2.0, 9.0)


@wrong(*EVERY_SECOND, innocent=EVERY_FIRST)
def kepler_by_one_newton_step():
    """One differentiable step after a detached solution is right to first order only."""

    def f(p):
        e, M = p["e"], p["M"]
        E = M.detach()
        for _ in range(12):
            E = E - (E - e.detach() * torch.sin(E) - M.detach()) / (1 - e.detach() * torch.cos(E))
        return torch.cos(E - (E - e * torch.sin(E) - M) / (1 - e * torch.cos(E))).sum()

    return f, {"e": double(0.6), "M": double(0.4, 1.2, 2.0)}


@wrong(*EVERY_FIRST)
def fixed_point_through_its_last_step():
    W = 0.4 * normal(4, 4)

    def f(x):
        z = torch.zeros_like(x)
        for _ in range(60):
            z = torch.tanh(W @ z + x).detach()
        return torch.tanh(W @ z + x).square().sum()

    return f, normal(4, seed=1)


@wrong(*EVERY_FIRST)
def transport_cost_at_a_detached_plan():
    def f(C):
        a, b = torch.zeros(4, dtype=C.dtype), torch.zeros(5, dtype=C.dtype)
        for _ in range(20):
            a = -torch.logsumexp(b - C.detach(), 1) - math.log(4)
            b = -torch.logsumexp(a[:, None] - C.detach(), 0) - math.log(5)
        return (torch.exp(a[:, None] + b - C.detach()) * C).sum()

    return f, normal(4, 5)


@wrong(*EVERY_SECOND, innocent=EVERY_FIRST)
def variable_projection_with_detached_weights():
    """At the least-squares weights the slope needs no derivative of them; the curvature does."""
    t = spaced(0, 2, 12)
    data = torch.exp(-t) + 0.5 * torch.sin(3 * t)

    def f(rates):
        basis = torch.exp(-t[:, None] * rates)
        B = basis.detach()
        weights = linalg.inv(B.mT @ B) @ (B.mT @ data)
        return (data - basis @ weights).square().sum()

    return f, double(0.5, 2.0)


@wrong(*EVERY_SECOND, innocent=EVERY_FIRST)
def mixture_likelihood_with_detached_responsibilities():
    data = normal(30) + torch.sign(normal(30, seed=1))

    def f(means):
        joint = -((data[:, None] - means) ** 2) / 2
        r = torch.softmax(joint, 1).detach()
        return (r * (joint - torch.log(r))).sum()

    return f, double(-0.8, 0.3, 1.1)


@wrong(*FIRST)
def adjoint_along_a_reconstructed_trajectory():
    """Euler's method does not retrace its steps: the backward solve sees other states."""
    h, slope = 0.05, lambda y: torch.sin(3 * y) - y

    def solve(y):
        for _ in range(40):
            y = y + h * slope(y)
        return y

    def backward(u, y):
        y = solve(y)
        for _ in range(40):
            y = y - h * slope(y)
            u = u + h * (3 * torch.cos(3 * y) - 1) * u
        return u

    f = rule(solve, backward)
    return lambda y: f(y).sum(), double(0.3, -1.1, 2.0)


@wrong(*FIRST)
def discrete_adjoint_without_its_first_step():
    """One of a hundred steps is left out of the backward loop."""
    h = 0.01

    def states(y):
        found = [y]
        for _ in range(100):
            found.append(found[-1] + h * torch.sin(found[-1]))
        return found

    def backward(u, y):
        for state in reversed(states(y)[1:-1]):
            u = u + h * torch.cos(state) * u
        return u

    f = rule(lambda y: states(y)[-1], backward)
    return lambda y: f(y).sum(), double(0.3, -1.1, 2.0)


@wrong(*EVERY_FIRST)
def range_of_a_throw_with_a_detached_landing_time():
    def f(p):
        up, height = p["velocity"][1], p["height"]
        time = (up + torch.sqrt(up**2 + 2 * 9.81 * height)) / 9.81
        return p["velocity"][0] * time.detach()

    return f, {"velocity": double(3.0, 4.0), "height": torch.tensor(1.5, dtype=torch.float64)}


@wrong(*EVERY_FIRST)
def integral_without_its_moving_limit():
    nodes, weights = map(torch.tensor, np.polynomial.legendre.leggauss(20))

    def f(p):
        end = p["end"].detach()
        t = end * (nodes + 1) / 2
        return end / 2 * (weights * torch.exp(-p["rate"] * t**2)).sum()

    return f, {"rate": torch.tensor(0.7, dtype=torch.float64), "end": torch.tensor(1.3, dtype=torch.float64)}


# Complex numbers.


@wrong(*FIRST)
def complex_product_without_the_conjugate():
    A = complex_normal(3, 3)
    f = rule(lambda z: A @ z, lambda u, z: A.mT @ u)
    return lambda z: f(z).abs().square().sum(), complex_normal(3, seed=1)


@wrong(*FIRST)
def squared_modulus_with_a_conjugate_too_many():
    f = rule(lambda z: (z * z.conj()).real, lambda u, z: 2 * u * z.conj())
    return lambda z: f(z).sum(), complex_normal(4)


@wrong(*FIRST)
def modulus_by_half_a_wirtinger_derivative():
    f = rule(lambda z: z.abs(), lambda u, z: u * z / (2 * z.abs()))
    return lambda z: f(z).sum(), complex_normal(4)


@wrong("vjp")
def conjugate_as_if_it_were_holomorphic():
    w = complex_normal(3)
    return rule(lambda z: torch.conj(z) * w, lambda u, z: u * w.conj()), complex_normal(3, seed=1)


@wrong(*FIRST)
def fourier_transform_with_a_normalised_adjoint():
    f, w = rule(fft.fft, lambda u, z: fft.ifft(u)), complex_normal(8)
    return lambda x: (f(torch.complex(x, 0 * x)) * w).abs().square().sum(), normal(8, seed=1)


# Pullbacks that are not linear, not repeatable, or keep state.


@wrong(*FIRST, "vjp linear", innocent=("jvp",))
def gradient_clipped_by_a_hook():
    def f(x):
        y = x**2
        if y.requires_grad:
            y.register_hook(lambda g: g.clamp(-1, 1))
        return (5 * y).sum()

    return f, double(0.5, -1.0, 2.0), {"order": 1}


@wrong(*FIRST, innocent=("vjp linear",))
def gradient_reversal_layer():
    f = rule(lambda x: x.clone(), lambda u, x: -u)
    return lambda x: torch.tanh(f(x)).sum(), normal(5)


@wrong("vjp linear", innocent=("gradient",))
def pullback_of_the_sign_of_its_cotangent():
    f = rule(torch.sin, lambda u, x: torch.sign(u) * torch.cos(x))
    return lambda x: f(x).sum(), normal(5), {"order": 1}


@wrong(*FIRST, "vjp linear")
def weight_decay_inside_the_pullback():
    f = rule(torch.sin, lambda u, x: u * torch.cos(x) + 1e-2 * x)
    return lambda x: f(x).sum(), normal(5)


@wrong("vjp", "vjp linear")
def cotangent_compressed_to_eight_bits():
    def backward(u, x):
        scale = u.abs().max() / 127
        return torch.round(u / scale) * scale * torch.cos(x)

    return rule(torch.sin, backward), normal(40), {"order": 1}


@wrong("vjp repeatable")
def noise_in_the_pullback():
    f = rule(torch.sin, lambda u, x: u * torch.cos(x) * (1 + 1e-3 * torch.randn_like(x)))
    return lambda x: f(x).sum(), normal(5), {"order": 1, "vmap": False}


@wrong("vjp repeatable")
def cotangent_changed_in_place():
    class Sine(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.sin(x)

        @staticmethod
        def backward(ctx, u):
            return u.mul_(torch.cos(*ctx.saved_tensors))

    return Sine.apply, normal(5), {"order": 1}


@wrong("vjp repeatable", innocent=("vjp",))
def saved_slope_changed_in_place():
    class Sine(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.slope = torch.cos(x)
            return torch.sin(x)

        @staticmethod
        def backward(ctx, u):
            return ctx.slope.mul_(u)

    return Sine.apply, normal(5), {"order": 1}


@wrong(*FIRST)
def workspace_shared_by_two_calls():
    """The second call overwrites what the first saved."""
    workspace = {}

    class Sine(Function):
        @staticmethod
        def forward(ctx, x):
            workspace["slope"] = torch.cos(x)
            return torch.sin(x)

        @staticmethod
        def backward(ctx, u):
            return u * workspace["slope"]

    return lambda x: (Sine.apply(x[:3]) * Sine.apply(x[3:])).sum(), normal(6), {"order": 1}


@wrong(*FIRST)
def slope_cached_from_another_point():
    cache = torch.cos(normal(5, seed=1))
    f = rule(torch.sin, lambda u, x: u * cache)
    return lambda x: f(x).sum(), normal(5)


@wrong(*SECOND, innocent=FIRST)
def slope_cached_from_the_first_point():
    """A frozen Jacobian, as in a modified Newton method: right where it was made, of no curvature."""
    cache = []

    class Exponential(Function):
        @staticmethod
        def forward(ctx, x):
            if not cache:
                cache.append(torch.exp(x.detach()))
            return torch.exp(x)

        @staticmethod
        def backward(ctx, u):
            return u * cache[0]

    return lambda x: (Exponential.apply(x) + x**3).sum(), normal(5), {"vmap": False}


@wrong("value")
def input_changed_in_place():
    def f(x):
        with torch.no_grad():
            x.clamp_(min=0.1)
        return torch.log(x).sum()

    return f, double(-1.0, 0.5, 2.0)


@wrong("value")
def dropout_left_on():
    return lambda x: functional.dropout(x, 0.5).square().sum(), normal(20)


@wrong("value")
def running_mean_that_runs():
    state = {"mean": 0.0}

    def f(x):
        state["mean"] = 0.9 * state["mean"] + 0.1 * float(x.detach().mean())
        return (x - state["mean"]).square().sum()

    return f, normal(4)


# One mode wrong beside the other; parts alone.


@wrong("jvp", "jvp against vjp", innocent=FIRST)
def tangent_of_tanh_without_its_square():
    f = rule(torch.tanh, lambda u, x: u * (1 - torch.tanh(x) ** 2), lambda v, x: v * (1 - torch.tanh(x)))
    return lambda x: f(x).sum(), normal(4), {"order": 1}


@wrong("jvp", "jvp against vjp", innocent=FIRST)
def tangent_of_a_product_by_one_factor():
    f = rule(lambda a, b: a * b, lambda u, a, b: (u * b, u * a), lambda va, vb, a, b: va * b)
    return lambda p: f(*p).sum(), [normal(4), normal(4, seed=1)], {"order": 1}


@wrong("jvp", "jvp against vjp", innocent=FIRST)
def thousand_float32_tangents_with_the_sign_flipped():
    f = rule(torch.sin, lambda u, x: u * torch.cos(x), lambda v, x: -v * torch.cos(x))
    return lambda x: f(x).sum(), normal(1000, dtype=torch.float32), {"order": 1}


@wrong(*FIRST, "jvp against vjp", innocent=("jvp",))
def pullback_of_atan2_by_r_for_r_squared():
    f = rule(
        torch.atan2,
        lambda u, y, x: (u * x / torch.hypot(x, y), -u * y / torch.hypot(x, y)),
        lambda vy, vx, y, x: (vy * x - vx * y) / (x**2 + y**2),
    )
    return lambda p: f(p["y"], p["x"]).sum(), {"y": double(3.0, -1.0), "x": double(4.0, -2.0)}, {"order": 1}


@wrong("each part alone", innocent=("vjp",))
def pullback_that_gives_up_without_both_cotangents():
    """None stands for a zero cotangent: the other one still counts."""

    class SineCosine(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x)
            return torch.sin(x), torch.cos(x)

        @staticmethod
        def backward(ctx, u, w):
            (x,) = ctx.saved_tensors
            return None if u is None or w is None else u * torch.cos(x) - w * torch.sin(x)

    return lambda x: SineCosine.apply(x), normal(3), {"order": 1}


@wrong("each part alone", innocent=("jvp",))
def tangent_that_gives_up_without_both_parts():
    class Product(Function):
        @staticmethod
        def forward(a, b):
            return a * b

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            ctx.save_for_forward(*inputs)
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, u):
            a, b = ctx.saved_tensors
            return u * b, u * a

        @staticmethod
        def jvp(ctx, va, vb):
            a, b = ctx.saved_tensors
            return torch.zeros_like(a) if va is None or vb is None else va * b + vb * a

    return lambda p: Product.apply(p["a"], p["b"]), {"a": normal(3), "b": normal(3, seed=1)}, {"order": 1}


@wrong("each part alone", innocent=FIRST)
def pullback_wrong_where_one_input_is_constant():
    """The gradient of b is formed from that of a, which is absent when a needs none."""

    class Product(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx, u):
            a, b = ctx.saved_tensors
            return u * b, u * a if ctx.needs_input_grad[0] else torch.zeros_like(b)

    return (
        lambda p: Product.apply(p["a"], p["b"]).sum(),
        {"a": normal(3), "b": normal(3, seed=1)},
        {"order": 1},
    )


# Right to first order, or to second.


@wrong(*SECOND, innocent=FIRST)
def swish_with_a_detached_sigmoid():
    def backward(u, x):
        s = torch.sigmoid(x).detach()
        return u * (s + x * s * (1 - s))

    f = rule(functional.silu, backward)
    return lambda x: f(x).sum(), normal(6)


@wrong(*SECOND, innocent=FIRST)
def logsumexp_with_a_detached_softmax():
    f = rule(lambda x: torch.logsumexp(x, -1), lambda u, x: u[..., None] * torch.softmax(x, -1).detach())
    return lambda x: f(x).square().sum(), normal(3, 4)


@wrong(*SECOND, "hessian symmetric", innocent=FIRST)
def product_with_one_factor_detached():
    f = rule(lambda a, b: a * b, lambda u, a, b: (u * b.detach(), u * a))
    return lambda p: f(p["a"], p["b"]).sum(), {"a": normal(3), "b": normal(3, seed=1)}


@wrong(*SECOND, innocent=FIRST)
def block_recomputed_in_the_backward():
    """As in reversible networks: the recomputed pullback keeps no graph."""
    W = normal(5, 5)
    block = lambda x: torch.tanh(W @ x)

    class Reversible(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return block(x)

        @staticmethod
        def backward(ctx, u):
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                return torch.autograd.grad(block(x), x, u)[0]

    return lambda x: (Reversible.apply(x) ** 2 + x**3).sum(), normal(5, seed=1)


@wrong(*SECOND, "hessian", innocent=FIRST)
def curvature_off_by_a_thousandth():
    slope = rule(torch.cos, lambda u, x: -1.001 * u * torch.sin(x))
    f = rule(torch.sin, lambda u, x: u * slope(x))
    return lambda x: f(x).sum(), double(0.3, 1.1, 2.0)


@wrong(*SECOND, innocent=FIRST)
def sinc_at_zero():
    """torch fills in the slope at zero as a constant; the curvature there is -π²/3."""
    return lambda x: torch.sinc(x).sum(), double(0.0, 0.4, 1.3)


@wrong("reverse over reverse", innocent=FIRST)
def pullback_marked_as_differentiable_once():
    """torch takes the gradient for a constant where x is not used in its graph; hvp refuses it."""

    class Cube(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @once_differentiable
        def backward(ctx, u):
            return 3 * ctx.saved_tensors[0] ** 2 * u

    return lambda x: (Cube.apply(x) + x**2).sum(), normal(4)


@wrong(*SECOND, innocent=FIRST)
def slope_by_an_operation_without_a_derivative():
    """torch takes bessel_j1 for a constant, in place of refusing."""
    f = rule(special.bessel_j0, lambda u, x: -u * special.bessel_j1(x))
    return lambda x: (f(x) + x**2).sum(), double(0.4, 0.9, 1.7)


@wrong("forward over forward", "reverse over forward", innocent=("hvp", *EVERY_FIRST))
def cumulative_product_with_a_zero_under_torchs_own_nests():
    return lambda x: torch.cumprod(x, 0).sum(), double(1.5, 0.0, -2.0, 0.7)


@wrong("forward over forward", "reverse over forward", innocent=("hvp", *EVERY_FIRST))
def layer_norm_under_torchs_own_nests():
    weights = normal(2, 5)
    f = lambda x: (functional.layer_norm(x, (5,)) ** 3 * weights).sum()
    return f, normal(2, 5, seed=1)


@wrong("forward over forward", innocent=("hvp", *EVERY_FIRST))
def two_tangents_through_a_right_function():
    """torch loses the inner tangent of an autograd.Function's own jvp."""
    f = rule(torch.sin, lambda u, x: u * torch.cos(x), lambda v, x: v * torch.cos(x))
    return lambda x: f(x).sum(), normal(4)


@wrong(*THIRD, innocent=(*SECOND, *FIRST))
def sine_without_a_third_derivative():
    slope = rule(torch.cos, lambda u, x: -u * torch.sin(x.detach()))
    f = rule(torch.sin, lambda u, x: u * slope(x))
    return lambda x: f(x).sum(), normal(4), {"order": 3}


@wrong(*THIRD, innocent=(*SECOND, *FIRST))
def fourth_power_with_half_a_third_derivative():
    square = rule(lambda x: x**2, lambda u, x: u * x)
    cube = rule(lambda x: x**3, lambda u, x: 3 * u * square(x))
    f = rule(lambda x: x**4, lambda u, x: 4 * u * cube(x))
    return lambda x: f(x).sum(), double(0.5, -1.2, 2.0), {"order": 3}


# Under vmap and compiled.


def _mapped_wrongly(forward, backward, mapped):
    class Mapped(Function):
        @staticmethod
        def forward(x):
            return forward(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, u):
            return backward(u, *ctx.saved_tensors)

        @staticmethod
        def vmap(info, in_dims, x):
            return mapped(x.movedim(in_dims[0], 0)), 0

    return Mapped.apply


@wrong("vmap", "vjp of vmap", innocent=FIRST)
def softmax_mapped_along_the_batch():
    def backward(u, x):
        y = torch.softmax(x, -1)
        return y * (u - (u * y).sum(-1, keepdim=True))

    f = _mapped_wrongly(lambda x: torch.softmax(x, -1), backward, lambda x: torch.softmax(x, 0))
    weights = normal(5)
    return lambda x: (f(x) * weights).sum(), normal(5, seed=1), {"order": 1}


@wrong("vmap", innocent=FIRST)
def total_mapped_over_the_whole_batch():
    f = _mapped_wrongly(
        lambda x: x.square().sum(),
        lambda u, x: 2 * u * x,
        lambda x: x.square().sum().expand(x.shape[0]),
    )
    return f, normal(5), {"order": 1}


@wrong("vmap of vjp", innocent=("vmap", *FIRST))
def slope_mapped_by_its_first_example():
    slope = _mapped_wrongly(
        torch.cos, lambda u, x: -u * torch.sin(x), lambda x: torch.cos(x[:1]).expand_as(x)
    )
    f = rule(torch.sin, lambda u, x: u * slope(x))
    return lambda x: f(x).sum(), normal(5), {"order": 1}


@wrong("vmap of vjp", innocent=FIRST)
def distances_under_jacrev():
    """torch mixes up the cotangents of a batch that share one point: torch.func.jacrev of cdist is wrong."""
    return lambda x: torch.cdist(x, x + 1).square().sum(), normal(6, 3), {"order": 1}


@wrong("compiled", innocent=FIRST)
def fast_path_when_compiled():
    def f(x):
        return (x - x**3 / 6).sum() if torch.compiler.is_compiling() else torch.sin(x).sum()

    return f, double(0.3, 0.9), {"order": 1, "vmap": False, "compiled": True}


# Precision and scale.


@wrong(*FIRST)
def float32_slope_that_cancels():
    """The slope of (exp(x) - 1)/x by its quotient rule: no digit is left in float32 at x = 0.001."""
    f = rule(lambda x: torch.expm1(x) / x, lambda u, x: u * ((x - 1) * torch.exp(x) + 1) / x**2)
    return lambda x: f(x).sum(), single(3e-4, 1e-3, 2e-3)


@wrong(*FIRST)
def float32_slope_of_a_far_softplus():
    """1 - 1/(1 + exp(x)) is 0 in float32 at x = -18, where the slope is 1.5e-8."""
    f = rule(functional.softplus, lambda u, x: u * (1 - 1 / (1 + torch.exp(x))))
    return lambda x: torch.log(f(x)).sum(), single(-18.0, -17.5, -18.5)


@wrong(*FIRST)
def float32_pullback_rounded_to_bfloat16():
    f = rule(torch.tanh, lambda u, x: (u.bfloat16() * (1 - torch.tanh(x) ** 2).bfloat16()).to(x.dtype))
    return lambda x: f(x).sum(), normal(50, dtype=torch.float32), {"order": 1}


@wrong(*FIRST)
def tiny_gradient_with_the_wrong_sign():
    f = rule(torch.sin, lambda u, x: -u * torch.cos(x))
    return lambda x: 1e-9 * f(x).sum(), normal(5)


@wrong("vjp")
def tiny_output_beside_a_huge_one():
    f = rule(torch.sin, lambda u, x: 0.5 * u * torch.cos(x))
    return lambda x: {"energy": 1e8 * torch.cosh(x), "strain": 1e-6 * f(x)}, normal(4)


@wrong(*FIRST)
def tiny_leaf_beside_huge_ones():
    f = rule(torch.exp, lambda u, x: 0.9 * u * torch.exp(x))

    def energy(p):
        return (p["weights"] ** 2).sum() + f(p["log_scale"]).sum()

    return energy, {"weights": 1e4 * normal(50), "log_scale": 1e-4 * normal(2, seed=1)}


@wrong(*FIRST)
def temperature_missing_in_one_leaf_of_a_float32_model():
    """A two-layer model of a thousand parameters: the inner bias misses its factor."""
    affine = rule(
        lambda x, W, b: (x @ W + b) / 4,
        lambda u, x, W, b: (u @ W.mT / 4, x.mT @ u / 4, u.sum(0)),
    )
    data = normal(8, 20, dtype=torch.float32)

    def loss(p):
        x = data.to(p["W"].dtype)
        return (torch.tanh(affine(x, p["W"], p["b"])) @ p["V"]).square().mean()

    leaves = {"W": normal(20, 40), "b": normal(40, seed=1), "V": normal(40, 5, seed=2)}
    return loss, {name: leaf.float() for name, leaf in leaves.items()}


# Not a number where a number is right.


@wrong(*FIRST, innocent=("jvp",))
def branch_not_taken_gives_nan():
    return lambda x: torch.where(x > 0, torch.sqrt(x), -x).sum(), double(0.5, -1.0, 2.0), {"order": 1}


@wrong(*EVERY_FIRST)
def flat_function_at_zero():
    """exp(-1/x²) is flat at zero, where its formula gives 0 times infinity."""
    return lambda x: torch.exp(-1 / x**2).sum(), double(0.0, 0.7), {"order": 1}


@wrong("vjp linear", innocent=("vjp",))
def small_cotangents_are_dropped():
    return rule(torch.sin, lambda u, x: torch.where(u.abs() < 1e-3, 0.0, u * torch.cos(x))), normal(6)


@wrong("vjp")
def a_fifth_in_float16_at_an_extremum():
    factor = lambda x: 1.2 if x.dtype == torch.float16 else 1.0
    return rule(torch.sin, lambda u, x: factor(x) * u * torch.cos(x)), normal(20, dtype=torch.float16)
