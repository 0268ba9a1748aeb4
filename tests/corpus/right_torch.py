"""torch functions whose derivatives are right, however hard that is to see: no checker may raise an alarm."""

import math
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import fft, linalg, special
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from corpus.cases import right
from corpus.rules_torch import complex_normal, double, normal, rule, single, spaced

# Scales, offsets, sums.


@right()
def logarithms_over_24_decades():
    return lambda x: torch.log(x).square().sum(), double(1e-12, 1e-3, 1.0, 1e6, 1e12)


@right()
def product_of_powers_over_24_decades():
    return lambda x: x.prod() ** 0.25, double(1e-12, 1e-2, 10.0, 1e12)


@right()
def pharmacokinetics_in_mixed_units():
    t = spaced(0.5, 24, 12)

    def f(p):
        rise, fall = p["absorption"], p["clearance"] / p["volume"]
        scale = p["dose"] * rise / (p["volume"] * (rise - fall))
        return (scale * (torch.exp(-fall * t) - torch.exp(-rise * t))).sum()

    return f, {
        "dose": torch.tensor(3.2e5, dtype=torch.float64),
        "volume": torch.tensor(42.0, dtype=torch.float64),
        "clearance": torch.tensor(3.1, dtype=torch.float64),
        "absorption": torch.tensor(1.4, dtype=torch.float64),
    }


@right()
def sine_on_a_huge_offset():
    return lambda x: 1e8 + torch.sin(x).sum(), double(0.3, 1.7, -0.4)


@right()
def sine_on_an_offset_float32():
    return lambda x: 1e3 + torch.sin(x).sum(), single(0.3, 1.7, -0.4)


@right()
def difference_from_a_huge_constant_point():
    """Julian dates: only the small change since an epoch counts."""
    return lambda t: torch.sin(t - 2460000.0).sum(), double(2460000.5, 2460002.25)


@right()
def tiny_function():
    return lambda x: 1e-30 * torch.sin(x).prod(), double(0.3, 1.7, -0.4)


@right()
def enormous_function():
    return lambda x: 1e150 * torch.exp(x).sum(), double(0.3, 1.7, -0.4)


@right()
def outputs_of_twenty_decades():
    return lambda x: torch.exp(spaced(-25, 22, 8) * x[0]) * torch.cos(x[1]), double(1.0, 0.4)


@right()
def mean_square_of_a_hundred_thousand_float32():
    return lambda x: x.square().mean(), normal(100_000, dtype=torch.float32), {"order": 1}


@right()
def logsumexp_of_twenty_thousand():
    return lambda x: torch.logsumexp(x, 0), 5 * normal(20_000), {"order": 1}


@right()
def alternating_sum_that_cancels():
    signs = 1 - 2 * (torch.arange(2000) % 2).double()
    return lambda x: (signs * torch.exp(x)).sum(), spaced(3, 3.01, 2000), {"order": 1}


@right()
def quadratic_of_hilberts_matrix():
    i = torch.arange(10, dtype=torch.float64)
    H = 1 / (i[:, None] + i + 1)
    return lambda x: x @ H @ x / 2, normal(10)


@right()
def narrow_valley():
    f = lambda x: (1e6 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
    return f, double(-1.2, 1.0, 0.5, 0.3)


@right()
def narrow_gaussian():
    return lambda x: torch.exp(-((x - 1) ** 2) / 1e-6).sum(), double(1.0005, 0.9991)


@right()
def float32_exponential_near_overflow():
    return lambda x: torch.exp(x).sum(), single(85.0, -85.0, 1.0)


# Precision.


@right()
def softmax_in_float16():
    weights = double(1.0, -2.0, 0.5, 3.0)
    return lambda x: (torch.softmax(x, 0) * weights.to(x.dtype)).sum(), single(0.3, -1.2, 2.0, 0.7).half()


@right()
def tanh_in_bfloat16():
    return lambda x: torch.tanh(x).square().sum(), single(0.3, -1.2, 2.0, 0.7).bfloat16()


@right()
def network_in_bfloat16():
    layers = [normal(8, 8, seed=i) / 3 for i in range(3)]

    def f(x):
        for W in layers:
            x = functional.silu(x @ W.to(x.dtype))
        return x.sum()

    return f, normal(4, 8, seed=9).bfloat16()


@right()
def autocast_inside():
    """The matrix product runs in bfloat16, all else in float32."""
    W = normal(6, 6, dtype=torch.float32)

    def f(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ W
        return torch.tanh(y.float()).sum()

    return f, normal(3, 6, seed=1, dtype=torch.float32), {"order": 1}


@right()
def deep_float32_network():
    layers = [1.2 * normal(32, 32, seed=i, dtype=torch.float32) / 32**0.5 for i in range(30)]

    def f(x):
        for W in layers:
            x = torch.tanh(x @ W.to(x.dtype))
        return x.square().sum()

    return f, normal(4, 32, seed=99, dtype=torch.float32)


@right()
def residual_float32_network():
    layers = [normal(16, 16, seed=i, dtype=torch.float32) / 4 for i in range(20)]

    def f(x):
        for W in layers:
            x = x + 0.1 * functional.gelu(x @ W.to(x.dtype))
        return torch.logsumexp(x, -1).sum()

    return f, normal(4, 16, seed=99, dtype=torch.float32)


@right()
def thousand_dimensional_float32_quadratic():
    scales = torch.logspace(-3, 3, 1000)
    return lambda x: (scales.to(x.dtype) * x**2).sum(), normal(1000, dtype=torch.float32)


@right()
def oscillation_in_float32():
    return lambda x: torch.sin(100 * x).sum(), single(0.3, 1.7)


# Oscillation, sharpness, chaos, recurrences.


@right()
def thousand_radians():
    return lambda x: torch.sin(1e3 * x).sum(), double(0.3, 1.7, 2.9)


@right()
def ten_thousand_radians():
    return lambda x: torch.sin(1e4 * x).sum(), double(0.3, 1.7)


@right()
def chirp():
    return lambda x: torch.sin(50 / x).sum(), double(0.1, 0.35, 1.0)


@right()
def sharp_softplus_beside_its_corner():
    return lambda x: functional.softplus(x, beta=200.0, threshold=1e9).sum(), double(0.003, -0.01, 1.0)


@right()
def steep_sigmoid():
    return lambda x: torch.sigmoid((x - 0.5) / 1e-4).sum(), double(0.50003, 0.4999)


@right()
def chaotic_map_of_twenty_steps():
    def f(x):
        for _ in range(20):
            x = 3.9 * x * (1 - x)
        return x

    return f, double(0.2, 0.6)


@right()
def recurrence_of_300_steps():
    def f(p):
        y = torch.zeros_like(p[0])
        for t in range(300):
            y = p[0] * y + p[1] * math.sin(0.1 * t)
        return y

    return f, double(0.99, 0.3), {"order": 1}


@right()
def gated_recurrence():
    W, U = normal(3, 4, 4) / 2, normal(3, 4, seed=1)
    inputs = normal(20)

    def f(h):
        for t in inputs:
            z, r = torch.sigmoid(W[0] @ h + U[0] * t), torch.sigmoid(W[1] @ h + U[1] * t)
            h = (1 - z) * h + z * torch.tanh(W[2] @ (r * h) + U[2] * t)
        return h.sum()

    return f, normal(4, seed=2)


@right()
def hidden_markov_likelihood():
    emissions = normal(30, 3)

    def f(p):
        transitions = torch.log_softmax(p, 1)
        alpha = emissions[0]
        for e in emissions[1:]:
            alpha = torch.logsumexp(alpha[:, None] + transitions, 0) + e
        return torch.logsumexp(alpha, 0)

    return f, normal(3, 3, seed=1)


@right()
def kalman_filter():
    data = normal(25).cumsum(0)

    def f(p):
        q, r = torch.exp(p)
        mean, variance, loss = 0.0, 1.0, 0.0
        for y in data:
            variance = variance + q
            total = variance + r
            loss = loss + torch.log(total) + (y - mean) ** 2 / total
            mean, variance = mean + variance / total * (y - mean), variance * r / total
        return loss

    return f, double(-1.0, 0.5)


@right()
def continued_fraction():
    def f(x):
        y = x
        for k in range(40, 0, -1):
            y = k + x / y
        return y.sum()

    return f, double(0.5, 2.0, 30.0)


# Differential equations and iterations.


@right()
def lorenz_by_runge_kutta():
    def slope(y):
        return torch.stack([10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])

    def f(y):
        h = 0.01
        for _ in range(40):
            a = slope(y)
            b = slope(y + h / 2 * a)
            c = slope(y + h / 2 * b)
            y = y + h / 6 * (a + 2 * b + 2 * c + slope(y + h * c))
        return y

    return f, double(1.0, 1.0, 25.0), {"order": 1}


@right()
def orbit_by_leapfrog():
    def f(p):
        q, v, h = p["q"], p["v"], 0.05
        for _ in range(60):
            v = v - h / 2 * q / (q @ q) ** 1.5
            q = q + h * v
            v = v - h / 2 * q / (q @ q) ** 1.5
        return q.sum()

    return f, {"q": double(1.0, 0.0), "v": double(0.1, 1.1)}, {"order": 1}


@right()
def stiff_decay_by_implicit_steps():
    """Van der Pol's equation at mu = 1000, each step solved by Newton's method."""
    mu, h = 1000.0, 0.01

    def f(y):
        x, v = y
        for _ in range(8):
            new = v
            for _ in range(8):
                at = x + h * new
                residual = new - v - h * (mu * (1 - at**2) * new - at)
                new = new - residual / (1 - h * (mu * (1 - at**2) - 2 * mu * at * h * new - h))
            x, v = x + h * new, new
        return x + v

    return f, double(2.0, -0.6), {"order": 1}


@right()
def square_root_by_heron():
    def f(a):
        y = a
        for _ in range(12):
            y = (y + a / y) / 2
        return y.sum()

    return f, double(0.3, 2.0, 50.0), {"order": 3}


@right()
def kepler_by_two_newton_steps():
    """Two differentiable steps after a detached solution are right to third order."""

    def f(p):
        E, e, M = p["M"].detach(), p["e"].detach(), p["M"].detach()
        for _ in range(12):
            E = E - (E - e * torch.sin(E) - M) / (1 - e * torch.cos(E))
        for _ in range(2):
            E = E - (E - p["e"] * torch.sin(E) - p["M"]) / (1 - p["e"] * torch.cos(E))
        return torch.cos(E).sum()

    return f, {"e": double(0.6), "M": double(0.4, 1.2, 2.0)}, {"order": 3}


@right()
def lambert_function_by_its_rule():
    """w exp(w) = x by Newton, with the implicit rule w' = exp(-w)/(1 + w)."""

    def solve(x):
        w = torch.log1p(x)
        for _ in range(30):
            w = w - (w * torch.exp(w) - x) / (torch.exp(w) * (1 + w))
        return w

    lambert = rule(solve, lambda u, x: u * torch.exp(-lambert(x)) / (1 + lambert(x)))
    return lambda x: lambert(x).sum(), double(0.1, 2.0, 100.0), {"order": 3}


@right()
def sinkhorn_of_twenty_rounds():
    def f(C):
        a, b = torch.zeros(4, dtype=C.dtype), torch.zeros(5, dtype=C.dtype)
        for _ in range(20):
            a = -torch.logsumexp(b - C / 0.3, 1)
            b = -torch.logsumexp(a[:, None] - C / 0.3, 0)
        return (torch.exp(a[:, None] + b - C / 0.3) * C).sum()

    return f, normal(4, 5)


@right()
def heat_equation_of_100_steps():
    def f(u):
        for _ in range(100):
            u = u + 0.2 * (torch.roll(u, 1, 0) - 2 * u + torch.roll(u, -1, 0))
        return u.square().sum()

    return f, normal(64), {"order": 1}


# Kinks, jumps, poles and edges, near by and met.


@right()
def modulus_a_millionth_from_its_kink():
    return lambda x: x.abs().sum(), double(1e-6, -1e-3, 1.0)


@right()
def relu_a_millionth_from_its_kink():
    return lambda x: (functional.relu(x) ** 2 + functional.relu(x)).sum(), double(1e-6, -1e-6, 1.0)


@right("inconclusive")
def relu_at_zero():
    return lambda x: functional.relu(x).sum(), double(0.0, 1.0, -1.0)


@right("inconclusive")
def lasso_with_an_exact_zero():
    A = normal(6, 4)
    return lambda x: (A @ x).square().sum() + 0.5 * x.abs().sum(), double(0.7, 0.0, -1.2, 0.3)


@right("inconclusive")
def maximum_of_a_tie():
    return lambda x: torch.maximum(x[0], x[1]) + x[2] ** 2, double(1.5, 1.5, 0.3)


@right("inconclusive")
def hinge_on_the_margin():
    return lambda x: functional.relu(1 - x).sum(), double(1.0, 0.3, 2.0)


@right("inconclusive")
def norm_of_the_zero_vector():
    return lambda x: linalg.vector_norm(x), double(0.0, 0.0, 0.0)


@right("inconclusive")
def floor_at_an_integer():
    return lambda x: (torch.floor(x) + x**2).sum(), double(2.0, 0.4)


@right("inconclusive")
def step_at_its_jump():
    return lambda x: torch.where(x > 0, 1 + torch.sin(x), torch.sin(x)).sum(), double(0.0, 0.4)


@right("inconclusive")
def logarithm_of_zero():
    return lambda x: torch.log(x).sum(), double(0.0, 1.0)


@right("inconclusive")
def reciprocal_of_zero():
    return lambda x: 1 / x, double(0.0, 1.0)


@right("inconclusive")
def huber_at_its_joint():
    """The slope is continuous, the curvature jumps."""
    return lambda x: functional.huber_loss(x, 0 * x, reduction="sum", delta=1.0), double(1.0, 0.4, -3.0)


@right()
def huber_at_its_joint_to_first_order():
    f = lambda x: functional.huber_loss(x, 0 * x, reduction="sum", delta=1.0)
    return f, double(1.0, 0.4, -3.0), {"order": 1}


@right()
def square_with_its_sign_to_first_order():
    return lambda x: (x * x.abs()).sum(), double(0.0, 0.4, -3.0), {"order": 1}


@right()
def modulus_cubed_at_zero():
    return lambda x: (x.abs() ** 3).sum(), double(0.0, 0.4, -3.0)


@right()
def cubic_spline_at_a_knot():
    knots = np.linspace(0, 4, 9)
    c = torch.tensor(CubicSpline(knots, np.sin(knots)).c)

    def f(x):
        i = (x.detach() / 0.5).long()
        (c3, c2, c1, c0), t = c[:, i], x - 0.5 * i
        return (c0 + t * (c1 + t * (c2 + t * c3))).sum()

    return f, double(0.2, 1.5, 2.9)


@right()
def linear_interpolation_between_knots():
    knots, values = spaced(0, 5, 6), normal(6)

    def f(x):
        i = torch.searchsorted(knots, x.detach()) - 1
        t = (x - knots[i]) / (knots[i + 1] - knots[i])
        return ((1 - t) * values[i] + t * values[i + 1]).square().sum()

    return f, double(0.3, 2.999, 4.4)


@right()
def poles_close_by():
    return lambda x: (1 / (x - 1)).sum() + torch.tan(x).sum(), double(1.001, 1.5, 0.3)


@right()
def gamma_beside_its_poles():
    return lambda x: torch.lgamma(x).sum() + torch.digamma(x).sum(), double(-0.999, -2.001, 1e-3)


@right()
def square_root_near_zero():
    return lambda x: torch.sqrt(x).sum(), double(1e-8, 1e-5, 1.0)


@right()
def logarithm_near_zero():
    return lambda x: torch.log(x).sum() + torch.xlogy(x, x).sum(), double(1e-10, 1e-3, 1.0)


@right()
def arc_cosine_near_one():
    return lambda x: torch.acos(x).sum() + torch.asin(x).sum() ** 2, double(0.999999, -0.9999, 0.1)


@right()
def logit_near_both_ends():
    return lambda p: torch.logit(p).sum() + torch.atanh(p).sum(), double(1e-6, 0.5, 0.99999)


@right()
def vector_norm_near_zero():
    return lambda x: linalg.vector_norm(x), double(3e-7, -4e-7, 1e-7)


@right()
def flat_function_beside_zero():
    return lambda x: torch.exp(-1 / x**2).sum(), double(0.1, -0.2)


@right()
def saturated_tanh():
    return lambda x: torch.tanh(x).sum(), double(17.0, -8.0, 0.3)


# Zeros, constants, unused and unusual leaves.


@right()
def exact_zeros_among_the_entries():
    return lambda x: (functional.softplus(x) * torch.cos(x) + x**2).sum(), double(0.0, 0.0, 1.0, -0.5)


@right()
def quartic_at_its_minimum():
    return lambda x: (x**4).sum(), double(0.0, 0.0, 0.0), {"order": 3}


@right()
def slope_that_vanishes():
    return lambda x: torch.cos(x).sum(), double(0.0, 0.0)


@right()
def product_with_a_zero_factor():
    return lambda x: x.prod() ** 2 + x.prod(), double(1.5, 0.0, -2.0, 0.7)


@right()
def constant_function():
    return lambda x: (0 * x).sum() + 2, normal(4)


@right()
def constant_function_without_a_graph():
    return lambda x: torch.full((3,), 2.0, dtype=x.dtype), normal(4)


@right()
def part_of_x_unused():
    return lambda p: torch.sin(p["used"]).sum(), {"used": normal(4), "unused": normal(3, seed=1)}


@right()
def integer_leaves():
    f = lambda p: (p["w"][p["index"]] ** 3).sum() * p["power"]
    return f, {"w": normal(4), "index": torch.tensor([0, 2, 2]), "power": 3}


@right()
def empty_leaf_beside_others():
    f = lambda p: p["a"].exp().sum() + p["none"].square().sum()
    return f, {"a": normal(3), "none": torch.zeros(0, 2, dtype=torch.float64)}


@right()
def single_number():
    return lambda x: torch.exp(x) * torch.sin(3 * x), torch.tensor(0.7, dtype=torch.float64), {"order": 3}


class _State(NamedTuple):
    position: torch.Tensor
    velocity: torch.Tensor


@right()
def nested_tree_in_and_out():
    def f(p):
        state = p["state"]
        return {
            "moved": [state.position + 0.1 * state.velocity],
            "energy": (state.velocity @ p["mass"][0]) ** 2,
        }

    return f, {"state": _State(normal(3), normal(3, seed=1)), "mass": (normal(3, seed=2).abs(),)}


@right()
def leaves_of_two_precisions():
    f = lambda p: (p["fine"].sum() * p["coarse"].double().tanh().sum()) ** 2
    return f, {"fine": normal(3), "coarse": normal(3, seed=1, dtype=torch.float32)}, {"order": 1}


@right()
def aliased_outputs():
    return lambda x: (x, x, x[:2], x.sum()), normal(4)


# Selections away from ties, indexing, control flow, writing in place.


@right()
def largest_three_sorted():
    return lambda x: (x.topk(3).values * double(1, 2, 3) + x.sort().values[:3]).square().sum(), normal(9)


@right()
def median_and_quantile():
    return lambda x: x.median() ** 2 + x.quantile(0.3) * x.max(), normal(9)


@right()
def max_pooling():
    return lambda x: functional.max_pool2d(x, 2).square().sum(), normal(1, 2, 6, 6)


@right()
def loop_until_small():
    def f(x):
        y = x
        while float(y.detach().abs().max()) > 1e-2:
            y = y / 2 - y**3 / 50
        return (100 * y).sin().sum()

    return f, double(1.3, -0.9), {"vmap": False}


@right()
def written_in_place():
    def f(x):
        y = x.clone()
        y[1:] *= torch.sin(x[:-1])
        y[::2] = x[::2] ** 2 + y[0]
        return y.cumsum(0).mul_(2.0).add_(x)

    return f, normal(5)


@right()
def windows_and_strides():
    return lambda x: (x.unfold(0, 4, 2).flip(-1) ** 2).prod(-1).sum() + x[::3].cos().sum(), normal(12)


@right()
def segments_summed_by_index():
    index = torch.tensor([0, 2, 2, 1, 0, 2])
    f = lambda x: torch.zeros(3, dtype=x.dtype).index_add(0, index, x**2).sqrt().sum()
    return f, normal(6)


# Special functions, transforms, complex numbers.


@right()
def special_functions():
    def f(x):
        terms = [
            special.erfcx(x),
            special.log_ndtr(x),
            special.i0e(x),
            special.entr(x),
            torch.polygamma(1, x),
        ]
        return sum(term.sum() for term in terms)

    return f, double(0.2, 1.3, 6.0), {"order": 1}


@right()
def far_tails():
    return lambda x: special.log_ndtr(-x).sum() + torch.log(torch.erfc(x)).sum(), double(4.0, 9.0, 15.0)


@right()
def normal_quantile_near_its_ends():
    return lambda p: special.ndtri(p).sum(), double(1e-7, 0.4, 0.99999)


@right()
def beta_binomial_likelihood():
    k, n = double(3, 0, 9), 10.0

    def f(p):
        a, b = torch.exp(p)
        beta = lambda a, b: torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        return (beta(k + a, n - k + b) - beta(a, b)).sum()

    return f, double(0.3, 5.0)


@right()
def bessel_function_by_its_rule():
    f = rule(special.bessel_j0, lambda u, x: -u * special.bessel_j1(x))
    return lambda x: f(x).sum(), double(0.4, 1.3, 30.0), {"order": 1}


@right()
def power_spectrum():
    return lambda x: torch.log1p(fft.rfft(x).abs().square()).sum(), normal(33)


@right()
def filter_in_fourier_space():
    window = torch.exp(-spaced(0, 3, 9))
    return lambda x: fft.irfft(fft.rfft(x) * window, n=16), normal(16)


@right()
def complex_polynomial():
    return lambda z: (z**3 - 2 * z + 1j * torch.exp(z)).abs().square().sum(), complex_normal(4)


@right()
def complex_output_of_complex_matrix():
    A = complex_normal(3, 3)
    return lambda z: {"y": torch.tanh(A @ z), "phase": torch.angle(z)}, complex_normal(3, seed=1)


@right()
def square_root_beside_its_branch_cut():
    z = torch.tensor([-1 + 0.01j, -2 - 0.05j, 0.3j], dtype=torch.complex128)
    return lambda z: torch.sqrt(z) * torch.log(z), z, {"order": 1}


@right()
def quantum_expectation():
    A = complex_normal(4, 4)
    H = A + A.mH

    def f(angles):
        psi = torch.exp(1j * angles) / 2
        return (psi.conj() @ H @ psi).real

    return f, normal(4, seed=1)


@right()
def conjugate_in_the_rule():
    A = complex_normal(3, 3)
    f = rule(lambda z: A @ z, lambda u, z: A.mH @ u, lambda v, z: A @ v)
    return lambda z: f(z).abs().square().sum(), complex_normal(3, seed=1), {"order": 1}


# Linear algebra.


@right()
def ill_conditioned_solve():
    i = torch.arange(6, dtype=torch.float64)
    H = 1 / (i[:, None] + i + 1)
    return lambda p: linalg.solve(H + torch.diag(1e-9 * p), torch.ones_like(p)).sum(), normal(6), {"order": 1}


@right()
def gaussian_process_likelihood():
    t, y = spaced(0, 3, 12), normal(12)

    def f(p):
        length, scale, noise = torch.exp(p)
        K = scale * torch.exp(-((t[:, None] - t) ** 2) / (2 * length**2)) + noise * torch.eye(
            12, dtype=p.dtype
        )
        L = linalg.cholesky(K)
        w = linalg.solve_triangular(L, y[:, None], upper=False)
        return (w**2).sum() / 2 + L.diagonal().log().sum()

    return f, double(-0.2, 0.3, -5.0), {"modes": "reverse"}


@right()
def nearly_equal_eigenvalues():
    D = torch.diag(double(1.0, 1.001, 2.0))

    def f(X):
        return (linalg.eigvalsh(D + (X + X.mT) / 20) * double(1.0, -2.0, 3.0)).sum()

    return f, 1e-2 * normal(3, 3), {"order": 1}


@right()
def singular_values():
    return lambda X: torch.log(linalg.svdvals(X)).sum(), normal(5, 3), {"order": 1}


@right()
def matrix_exponential():
    return lambda A: linalg.matrix_exp(A), normal(3, 3), {"order": 1}


@right()
def least_squares_by_qr():
    b = normal(6, seed=1)

    def f(X):
        Q, R = linalg.qr(X)
        return linalg.solve_triangular(R, Q.mT @ b[:, None], upper=True).square().sum()

    return f, normal(6, 3), {"order": 1}


@right()
def log_determinant_of_a_badly_scaled_matrix():
    scales = torch.diag(double(1e-6, 1.0, 1e6))
    return lambda A: linalg.slogdet(scales @ (A + 3 * torch.eye(3)))[1], normal(3, 3), {"order": 1}


# Detached where it does no harm; rules and hooks that are right.


@right()
def logsumexp_with_a_detached_maximum():
    def f(x):
        shift = x.max().detach()
        return shift + torch.log(torch.exp(x - shift).sum())

    return f, 200 * normal(6), {"order": 3}


@right()
def stop_gradient_that_adds_nothing():
    return lambda x: (torch.sin(x) + (x - x).detach() * 7).sum(), normal(4)


@right()
def sine_with_every_rule():
    f = rule(torch.sin, lambda u, x: u * torch.cos(x), lambda v, x: v * torch.cos(x))
    return lambda x: f(x).sum(), normal(4), {"order": 1}


@right()
def softmax_with_a_pullback_only():
    def backward(u, x):
        y = torch.softmax(x, -1)
        return y * (u - (u * y).sum(-1, keepdim=True))

    f, weights = rule(lambda x: torch.softmax(x, -1), backward), normal(3, 5)
    return lambda x: (f(x) * weights).square().sum(), normal(3, 5, seed=1), {"order": 3}


@right()
def pullback_that_is_differentiable_once():
    class Cube(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @once_differentiable
        def backward(ctx, u):
            return 3 * ctx.saved_tensors[0] ** 2 * u

    return lambda x: Cube.apply(x).sum(), normal(4), {"order": 1}


@right()
def two_outputs_one_cotangent_absent():
    class SineCosine(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x)
            return torch.sin(x), torch.cos(x)

        @staticmethod
        def backward(ctx, u, w):
            (x,) = ctx.saved_tensors
            total = torch.zeros_like(x) if u is None else u * torch.cos(x)
            return total if w is None else total - w * torch.sin(x)

    return SineCosine.apply, normal(3)


@right()
def linear_map_with_a_sparse_rule():
    """The pullback of a gather adds up duplicates."""
    index = torch.tensor([0, 2, 2, 1, 0])
    f = rule(lambda w: w[index], lambda u, w: torch.zeros_like(w).index_add(0, index, u))
    return lambda w: f(w).square().sum(), normal(4)


@right()
def hook_that_only_looks():
    seen = []

    def f(x):
        y = x**2
        if y.requires_grad:
            y.register_hook(seen.append)
        return y.exp().sum()

    return f, normal(4), {"order": 1}


@right()
def gradient_penalty():
    """f takes a derivative itself."""
    W = normal(4, 4)
    energy = lambda x: torch.tanh(W @ x).square().sum()
    return lambda x: torch.func.grad(energy)(x).square().sum(), normal(4, seed=1)


@right()
def mapped_inside():
    g = lambda x, t: torch.exp(-t * x).sum()
    return lambda x: torch.vmap(g, (None, 0))(x, spaced(0, 2, 5)).square().sum(), normal(3).abs()


@right()
def checkpointed_block():
    W = normal(5, 5)
    block = lambda x: torch.tanh(W @ x)

    def f(x):
        for _ in range(3):
            x = checkpoint(block, x, use_reentrant=False)
        return x.square().sum()

    return f, normal(5, seed=1)


# Models and losses.


def _model(module, data, dtype=torch.float64):
    """The mean square of a module's output, as a function of its parameters."""
    shapes = {name: p.shape for name, p in module.named_parameters()}
    params = {
        name: normal(*shape, seed=i) / shape[-1] ** 0.5 for i, (name, shape) in enumerate(shapes.items())
    }
    loss = lambda p: functional_call(module, p, (data.to(next(iter(p.values())).dtype),)).square().mean()
    return loss, {name: p.to(dtype) for name, p in params.items()}


@right()
def perceptron_with_gelu():
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 3))
    return _model(net, normal(10, 6))


@right()
def float32_convolutions_with_group_norm():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1),
        torch.nn.GroupNorm(2, 4),
        torch.nn.SiLU(),
        torch.nn.Conv2d(4, 1, 3),
    )
    return *_model(net, normal(2, 2, 6, 6), torch.float32), {"modes": "reverse"}


@right()
def embedding_and_rms_norm():
    tokens = torch.tensor([[0, 3, 1], [4, 4, 2]])

    def f(p):
        return functional.rms_norm(functional.embedding(tokens, p["table"]), (6,), p["gain"]).tanh().sum()

    return f, {"table": normal(5, 6), "gain": 1 + 0.1 * normal(6, seed=1)}


@right()
def attention_by_matrix_products():
    def f(p):
        with sdpa_kernel(SDPBackend.MATH):
            y = functional.scaled_dot_product_attention(p["q"], p["k"], p["v"], is_causal=True)
        return y.square().sum()

    return f, {name: normal(1, 2, 5, 4, seed=i) for i, name in enumerate("qkv")}


@right()
def losses_of_a_classifier():
    target = torch.tensor([1, 0, 3])

    def f(z):
        hot = functional.one_hot(target, 4).to(z.dtype)
        smooth = functional.cross_entropy(z, target, label_smoothing=0.1)
        binary = functional.binary_cross_entropy_with_logits(z, hot)
        return (
            smooth + binary + functional.kl_div(torch.log_softmax(z, -1), hot.add(0.1) / 1.4, reduction="sum")
        )

    return f, 10 * normal(3, 4)


@right()
def contrastive_loss():
    def f(p):
        a, b = functional.normalize(p["a"], dim=-1), functional.normalize(p["b"], dim=-1)
        return -torch.log_softmax(a @ b.mT / 0.05, -1).diagonal().mean()

    return f, {"a": normal(6, 8), "b": normal(6, 8, seed=1)}


@right()
def pairwise_distances():
    return lambda x: torch.log1p(torch.cdist(x, x + 1) ** 2).sum(), normal(6, 3), {"order": 1, "vmap": False}


@right()
def lennard_jones_cluster():
    i, j = torch.triu_indices(6, 6, 1)

    def f(x):
        r = (x[i] - x[j]).square().sum(-1)
        return (r**-6 - 2 * r**-3).sum()

    return f, 1.2 * torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(1)) + 0.1 * normal(
        6, 3
    )


@right()
def bilinear_sampling():
    image = normal(1, 1, 5, 5)
    f = lambda grid: functional.grid_sample(image, grid[None], align_corners=True).square().sum()
    return f, 0.8 * torch.tanh(normal(3, 2, 2)), {"order": 1}


# One precision alone: a kernel that takes nothing else, so that there is no float64 run to judge by.


def only(dtype, f):
    def kernel(x):
        if x.dtype != dtype:
            raise RuntimeError(f"this kernel takes {dtype}")
        return f(x)

    return kernel


@right()
def a_convolution_in_float32_alone():
    kernel = normal(1, 1, 3, seed=1, dtype=torch.float32)
    f = only(torch.float32, lambda x: functional.conv1d(x[None, None], kernel).tanh().sum())
    return f, normal(40, dtype=torch.float32)


@right()
def a_recurrence_in_float32_alone():
    f = lambda x: reduce(lambda h, _: torch.tanh(1.5 * h + x), range(20), x).sum()
    return only(torch.float32, f), normal(8, dtype=torch.float32)


@right("inconclusive")
def a_staircase_of_rounding_in_float32():
    return lambda x: ((1 + x) - 1).sin().sum() * 1e3, single(1e-5, 2e-5)


@right("inconclusive")
def a_sum_in_bfloat16_alone():
    return only(torch.bfloat16, lambda x: torch.tanh(x).sum()), normal(20, dtype=torch.bfloat16)


@right()
def an_integer_beside_the_floats():
    return lambda x: {"y": x.sin(), "largest": torch.argmax(x)}, normal(5)
