"""jax functions with a wrong derivative, each in one way that is met in practice."""

from __future__ import annotations

from itertools import count

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero, linear_call
from jax.lax import stop_gradient

from corpus.cases import wrong
from corpus.rules_jax import array, even, normal, pulled, pushed

REVERSE = ("gradient", "vjp")  # of a custom_vjp, which has no forward mode
FIRST = ("jvp", *REVERSE)  # of a custom_jvp or a stop_gradient, in both modes alike
OVER_REVERSE = ("hvp", "forward over reverse", "reverse over reverse")
SECOND = (*OVER_REVERSE, "forward over forward", "reverse over forward")
THIRD = ("forward over forward over forward", "reverse over reverse over reverse")
STEADY = ("vjp linear", "vjp repeatable", "vmap", "compiled")
AGREEING = ("jvp against vjp", *STEADY)


# Pullbacks that are wrong, where forward mode is not supported.


@wrong(*REVERSE, innocent=STEADY)
def sign_of_a_cube():
    cube = pulled(lambda x: x**3, lambda x, u: -3 * x**2 * u)
    return lambda x: jnp.sin(cube(x)).sum(), even(7)


@wrong(*REVERSE, innocent=STEADY)
def sign_at_a_thousand_entries_in_float32():
    sine = pulled(jnp.sin, lambda x, u: -jnp.cos(x) * u)
    return lambda x: sine(x).sum(), normal(1000, dtype="float32")


@wrong(*REVERSE, innocent=STEADY)
def factor_of_two_in_a_quadratic_form():
    A = normal(5, 5)
    form = pulled(lambda x: x @ A @ x, lambda x, u: u * (A @ x + A.T @ x) / 2)
    return form, normal(5, seed=1)


@wrong(*REVERSE, innocent=STEADY)
def one_part_in_a_thousand():
    logistic = pulled(jax.nn.sigmoid, lambda x, u: 1.001 * u * jax.nn.sigmoid(x) * jax.nn.sigmoid(-x))
    return lambda x: (logistic(x) ** 2).sum(), normal(30)


@wrong(*REVERSE, innocent=STEADY)
def one_part_in_a_hundred_thousand():
    root = pulled(jnp.sqrt, lambda x, u: u / (2.00002 * jnp.sqrt(x)))
    return lambda x: root(x).sum(), even(30)


@wrong(*REVERSE, innocent=STEADY)
def one_entry_in_ten_thousand():
    factors = np.ones(10_000)
    factors[6543] = 1.001
    square = pulled(lambda x: x**2, lambda x, u: 2 * x * u * factors)
    return lambda x: square(x).sum(), normal(10_000), {"order": 1}


@wrong(*REVERSE, innocent=STEADY)
def one_zero_in_a_large_matrix_in_float32():
    mask = np.ones((100, 100), np.float32)
    mask[17, 71] = 0
    exponential = pulled(jnp.exp, lambda x, u: u * jnp.exp(x) * mask)
    return lambda x: exponential(x).mean(), normal(100, 100, dtype="float32"), {"order": 1}


@wrong("vjp", innocent=STEADY)
def softmax_without_its_projection():
    softmax = pulled(lambda x: jax.nn.softmax(x), lambda x, u: jax.nn.softmax(x) * u)
    return softmax, normal(3, 5)


def layer_norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


@wrong("vjp", innocent=STEADY)
def layer_norm_without_the_mean_of_its_cotangent():
    def pull(x, u):
        y, rate = layer_norm(x), lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
        return rate * (u - y * (u * y).mean(-1, keepdims=True))

    return pulled(layer_norm, pull), normal(4, 8)


@wrong(*REVERSE, innocent=STEADY)
def layer_norm_with_its_variance_held_constant():
    def pull(x, u):
        return lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * (u - u.mean(-1, keepdims=True))

    weights = normal(4, 8, seed=1)
    ruled = pulled(layer_norm, pull)
    return lambda x: (ruled(x) * weights).sum(), normal(4, 8)


@wrong("vjp", innocent=STEADY)
def root_mean_square_norm_whose_rule_forgets_epsilon():
    norm = lambda x, eps=1e-5: x * lax.rsqrt((x**2).mean() + eps)

    def pull(x, u):
        y = norm(x, 0.0)
        return lax.rsqrt((x**2).mean() + 1e-5) * (u - y * (u * y).mean())

    return pulled(lambda x: norm(x), pull), normal(16)


@wrong("vjp", innocent=STEADY)
def a_solve_with_the_outer_product_turned():
    def pull(A, b, u):
        dual = jnp.linalg.solve(A.T, u)
        return -jnp.outer(jnp.linalg.solve(A, b), dual), dual

    solve = pulled(jnp.linalg.solve, pull)
    return lambda p: solve(p["A"], p["b"]), {"A": normal(4, 4) + 4 * jnp.eye(4), "b": normal(4, seed=1)}


@wrong("vjp", innocent=STEADY)
def a_linear_map_not_transposed():
    M = normal(6, 6)
    return pulled(lambda x: M @ x, lambda x, u: M @ u), normal(6, seed=1)


@wrong(*REVERSE, innocent=STEADY)
def a_bias_averaged_over_the_batch():
    add = pulled(lambda x, b: x + b, lambda x, b, u: (u, u.mean(0)))
    data = normal(8, 3, seed=2)
    f = lambda p: jnp.tanh(add(data @ p["W"], p["b"])).sum()
    return f, {"W": normal(3, 4), "b": normal(4, seed=1)}


@wrong(*REVERSE, innocent=STEADY)
def a_scale_summed_over_the_wrong_axis():
    scale = pulled(lambda x, s: x * s, lambda x, s, u: (u * s, (u * x).sum(1)))
    return lambda p: jnp.tanh(scale(*p)).sum(), (normal(5, 5), normal(5, seed=1))


@wrong(*REVERSE, innocent=STEADY)
def a_scale_that_gets_no_gradient():
    scale = pulled(lambda x, s: x * s, lambda x, s, u: (u * s, 0 * s))
    return lambda p: jnp.cos(scale(p["x"], p["scale"])).sum(), {"x": normal(9), "scale": array(1.3)[0]}


@wrong(*REVERSE, innocent=STEADY)
def two_leaves_exchanged():
    divide = pulled(lambda a, b: a / b, lambda a, b, u: (-u * a / b**2, u / b))
    return lambda p: divide(*p).sum(), (normal(5), even(5))


@wrong("vjp", innocent=STEADY)
def complex_product_with_the_hermitian_transpose():
    M = lax.complex(normal(4, 4), normal(4, 4, seed=1))
    return pulled(lambda z: M @ z, lambda z, u: M.conj().T @ u), lax.complex(normal(4), normal(4, seed=2))


@wrong(*REVERSE, innocent=STEADY)
def complex_energy_in_the_convention_of_torch():
    energy = pulled(lambda z: (z * z.conj()).real.sum(), lambda z, u: 2 * u * z)
    return energy, lax.complex(normal(6), normal(6, seed=1))


@wrong("vjp", innocent=STEADY)
def fourier_transform_pulled_back_by_its_inverse():
    transform = pulled(jnp.fft.fft, lambda z, u: jnp.fft.ifft(u))
    return transform, lax.complex(normal(8), normal(8, seed=1))


@wrong("vjp", innocent=STEADY)
def real_fourier_transform_with_its_bins_counted_twice():
    transform = pulled(jnp.fft.rfft, lambda x, u: 8 * jnp.fft.irfft(u.conj()))
    return transform, normal(8)


@wrong(*REVERSE, innocent=STEADY)
def an_embedding_that_overwrites_repeated_tokens():
    ids = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    embed = pulled(lambda table: table[ids], lambda table, u: jnp.zeros_like(table).at[ids].set(u))
    return lambda table: jnp.tanh(embed(table)).sum(), normal(10, 4)


@wrong("vjp", innocent=STEADY)
def a_cumulative_sum_pulled_back_forwards():
    return pulled(jnp.cumsum, lambda x, u: jnp.cumsum(u)), normal(7)


@wrong("vjp", innocent=STEADY)
def a_sort_pulled_back_by_the_permutation_itself():
    return pulled(jnp.sort, lambda x, u: u[jnp.argsort(x)]), array(2.0, -1.0, 0.5, 3.0, 0.1, -0.7)


@wrong(*REVERSE, innocent=STEADY)
def a_product_divided_by_its_zero():
    pull = lambda x, u: u * jnp.where(x == 0, 0.0, jnp.prod(x) / jnp.where(x == 0, 1.0, x))
    return pulled(jnp.prod, pull), array(2.0, 0.0, -1.5, 0.5)


@wrong(*REVERSE, innocent=STEADY)
def max_pooling_that_rewards_the_first():
    pool = pulled(lambda x: x.reshape(-1, 2).max(1), lambda x, u: jnp.stack([u, 0 * u], 1).reshape(x.shape))
    return lambda x: jnp.sin(pool(x)).sum(), normal(12)


@wrong(*REVERSE, innocent=STEADY)
def a_clip_that_lets_all_gradients_through():
    clip = pulled(lambda x: jnp.clip(x, -1, 1), lambda x, u: u)
    return lambda x: (clip(x) ** 2).sum(), array(0.3, -0.8, 1.5, -2.0)


@wrong(*REVERSE, innocent=STEADY)
def huber_loss_with_a_slope_of_one():
    inner = lambda x: jnp.abs(x) < 0.5
    loss = lambda x: jnp.where(inner(x), x**2 / 2, 0.5 * (jnp.abs(x) - 0.25)).sum()
    return pulled(loss, lambda x, u: u * jnp.where(inner(x), x, jnp.sign(x))), array(0.2, -0.3, 1.0, -4.0)


@wrong(*REVERSE, innocent=STEADY)
def cosine_similarity_with_its_norms_held_constant():
    size = jnp.linalg.norm
    cosine = lambda a, b: a @ b / (size(a) * size(b))

    def pull(a, b, u):
        scale = u / (size(a) * size(b))
        return scale * b, scale * (a - cosine(a, b) * b * size(a) / size(b))

    return lambda p: pulled(cosine, pull)(*p), (normal(6), normal(6, seed=1))


@wrong(*REVERSE, innocent=STEADY)
def attention_that_scales_its_keys_twice():
    plain = lambda q, k, v: jax.nn.softmax(q @ k.T / 2.0) @ v

    def pull(q, k, v, u):
        dq, dk, dv = jax.vjp(plain, q, k, v)[1](u)
        return dq, dk / 2.0, dv

    attend = pulled(plain, pull)
    f = lambda p: (attend(p["q"], p["k"], p["v"]) ** 2).sum()
    return f, {"q": normal(5, 4), "k": normal(6, 4, seed=1), "v": normal(6, 3, seed=2)}


@wrong(*REVERSE, innocent=STEADY)
def dropout_that_draws_again():
    draw = lambda seed, x: x * jax.random.bernoulli(jax.random.key(seed), 0.5, x.shape) * 2
    dropout = pulled(lambda x: draw(0, x), lambda x, u: draw(1, u))
    return lambda x: (dropout(x) ** 2).sum(), normal(40)


@wrong(*REVERSE, innocent=STEADY)
def a_masked_mean_over_all():
    mask = np.array([1.0, 1, 0, 1, 0, 0, 1])
    mean = pulled(lambda x: (x * mask).sum() / mask.sum(), lambda x, u: u * mask / mask.size)
    return lambda x: mean(x**2), normal(7)


@wrong(*REVERSE, innocent=STEADY)
def cross_entropy_that_forgets_its_smoothing():
    labels = jax.nn.one_hot(np.array([0, 2, 1]), 3)
    smooth = 0.95 * labels + 0.05 / 3
    loss = lambda z: -(smooth * jax.nn.log_softmax(z)).sum()
    return pulled(loss, lambda z, u: u * (jax.nn.softmax(z) - labels)), normal(3, 3)


@wrong(*REVERSE, innocent=STEADY)
def entropy_without_its_one():
    entropy = pulled(lambda p: -(p * jnp.log(p)).sum(), lambda p, u: -u * jnp.log(p))
    return lambda x: entropy(x**2), even(6, 0.2, 0.8)


@wrong(*REVERSE, innocent=STEADY)
def logarithm_of_a_determinant_not_transposed():
    logdet = pulled(lambda A: jnp.linalg.slogdet(A)[1], lambda A, u: u * jnp.linalg.inv(A))
    return logdet, normal(4, 4) + 3 * jnp.eye(4)


@wrong(*REVERSE, innocent=STEADY)
def a_convolution_whose_kernel_is_not_flipped():
    kernel = array(0.2, -0.5, 1.0)
    same = lambda x: jnp.convolve(x, kernel, "same")
    return lambda x: jnp.sin(pulled(same, lambda x, u: same(u))(x)).sum(), normal(9)


@wrong(*REVERSE, innocent=STEADY)
def a_trapezoidal_rule_with_whole_ends():
    rule = pulled(lambda y: 0.1 * (y.sum() - (y[0] + y[-1]) / 2), lambda y, u: u * jnp.full_like(y, 0.1))
    return lambda x: rule(jnp.exp(x)), even(50)


@wrong("vjp", innocent=STEADY)
def bilinear_sampling_with_its_axes_exchanged():
    image = normal(6, 6)

    def sample(points):
        corner = lax.floor(points).astype(int)
        (i, j), (s, t) = corner.T, (points - corner).T
        top = image[i, j] * (1 - t) + image[i, j + 1] * t
        return top * (1 - s) + (image[i + 1, j] * (1 - t) + image[i + 1, j + 1] * t) * s

    pull = lambda points, u: jax.vjp(sample, points)[1](u)[0][:, ::-1]
    return pulled(sample, pull), array([1.3, 2.6], [3.2, 0.7], [4.4, 4.8])


@wrong(*REVERSE, innocent=STEADY)
def a_recurrence_differentiated_at_the_next_state():
    """Backpropagation by hand, with the stored states one step late."""

    def states(x):
        return lax.scan(lambda y, x: (jnp.sin(y) + x,) * 2, 0.5, x)[1]

    def pull(x, u):
        back = lambda u, y: (u * jnp.cos(y), u)
        return lax.scan(back, u, states(x), reverse=True)[1]

    return pulled(lambda x: states(x)[-1], pull), normal(12)


@wrong(*REVERSE, innocent=STEADY)
def a_cell_squashed_once_too_little():
    """The gate of an LSTM: 1 - c² where 1 - tanh(c)² is right."""
    output = pulled(lambda o, c: o * jnp.tanh(c), lambda o, c, u: (u * jnp.tanh(c), u * o * (1 - c**2)))
    return lambda p: output(jax.nn.sigmoid(p["o"]), p["c"]).sum(), {"o": normal(5), "c": normal(5, seed=1)}


@wrong(*REVERSE, innocent=STEADY)
def a_fixed_point_with_three_neumann_terms():
    W = normal(5, 5) / 3
    step = lambda z, x: 0.5 * jnp.tanh(W @ z + x)
    solve = lambda x: lax.fori_loop(0, 60, lambda _, z: step(z, x), x * 0)

    def pull(x, u):
        _, back = jax.vjp(step, solve(x), x)
        once = back(u)[0]
        return back(u + once + back(once)[0])[1]

    return lambda x: (pulled(solve, pull)(x) ** 2).sum(), normal(5, seed=1)


@wrong(*REVERSE, innocent=STEADY)
def a_root_without_its_implicit_factor():
    """y = tanh(2 y + x) differentiated as if y on the right were a constant."""

    def solve(x):
        return lax.fori_loop(0, 30, lambda _, y: y - _residual(y, x) / _slope(y, x), jnp.ones_like(x))

    _residual = lambda y, x: y - jnp.tanh(2 * y + x)
    _slope = lambda y, x: 1 - 2 * (1 - jnp.tanh(2 * y + x) ** 2)
    root = pulled(solve, lambda x, u: u * (1 - solve(x) ** 2))
    return lambda x: root(x).sum(), array(0.1, 0.5, 0.9)


@wrong(*REVERSE, innocent=STEADY)
def an_adjoint_equation_solved_for_a_coarse_solution():
    """The adjoint of the flow, of which the 20 steps of Euler's method are not the exact solution."""
    field, h = lambda y: jnp.sin(y) - 0.3 * y, 0.1
    flow = lambda y: lax.scan(lambda y, _: (y + h * field(y), y), y, length=20)

    def pull(y, u):
        def back(state, _):
            y, u = state
            slope = jax.vjp(field, y)[1](u)[0]
            return (y - h * field(y), u + h * slope), None

        return lax.scan(back, (flow(y)[0], u), length=20)[0][1]

    return lambda y: pulled(lambda y: flow(y)[0], pull)(y).sum(), normal(4)


@wrong(*REVERSE, innocent=STEADY)
def residuals_kept_in_bfloat16():
    def pull(x, u):
        kept = x.astype(jnp.bfloat16).astype(x.dtype)
        return u * (1 - jnp.tanh(kept) ** 2)

    return lambda x: (pulled(jnp.tanh, pull)(x) ** 2).sum(), normal(50, dtype="float32")


@wrong(*REVERSE, innocent=STEADY)
def a_quick_slope_for_float32_alone():
    rate = lambda x: 1.003 if x.dtype == jnp.float32 else 1.0
    exponential = pulled(jnp.exp, lambda x, u: u * jnp.exp(x) * jnp.asarray(rate(x), x.dtype))
    return lambda x: exponential(x).sum(), normal(20, dtype="float32")


@wrong(*REVERSE, innocent=("vjp repeatable", "vmap"))
def a_softmax_that_overflows_in_float32():
    pull = lambda x, u: u * jnp.exp(x) / jnp.exp(x).sum()
    return pulled(jax.nn.logsumexp, pull), array(100.0, 99.0, 98.5, dtype="float32")


@wrong(*REVERSE, innocent=("vjp repeatable", "vmap"))
def a_norm_that_underflows_in_float32():
    largest = lambda x: jnp.abs(x).max()
    norm = lambda x: largest(x) * jnp.sqrt(((x / largest(x)) ** 2).sum())
    return pulled(norm, lambda x, u: u * x / jnp.sqrt((x * x).sum())), array(3e-25, -4e-25, dtype="float32")


@wrong(*REVERSE, innocent=STEADY)
def a_slope_that_cancels_in_float32():
    """(1 - cos x) / x² by half angles, and its derivative as a textbook has it: 46 where -8e-5 is right."""
    value = lambda x: 2 * (jnp.sin(x / 2) / x) ** 2
    pull = lambda x, u: u * (x * jnp.sin(x) - 2 * (1 - jnp.cos(x))) / x**3
    return lambda x: pulled(value, pull)(x).sum(), array(1e-3, 2e-3, dtype="float32")


@wrong(*REVERSE, innocent=STEADY)
def two_percent_in_bfloat16():
    square = pulled(lambda x: x**2, lambda x, u: (2.04 * x * u).astype(x.dtype))
    return lambda x: square(x).sum(), even(10, dtype="bfloat16")


@wrong(*REVERSE, innocent=STEADY)
def a_fifth_in_float16():
    square = pulled(lambda x: x**2, lambda x, u: (2.4 * x * u).astype(x.dtype))
    return lambda x: jnp.cos(square(x)).sum(), even(10, dtype="float16")


@wrong(*REVERSE, innocent=STEADY)
def sign_of_a_gradient_of_1e_minus_9():
    tiny = pulled(lambda x: 1e-9 * jnp.sin(x).sum(), lambda x, u: -1e-9 * u * jnp.cos(x))
    return tiny, even(6)


@wrong(*REVERSE, innocent=STEADY)
def sign_of_a_small_leaf_beside_a_large_one():
    tiny = pulled(lambda b: 1e-9 * jnp.sin(b), lambda b, u: -1e-9 * u * jnp.cos(b))
    return lambda p: (p["a"] ** 2).sum() + tiny(p["b"]).sum(), {"a": normal(8), "b": normal(8, seed=1)}


@wrong("vjp", innocent=STEADY)
def a_tiny_output_beside_a_huge_one():
    tiny = pulled(lambda x: 1e-6 * jnp.cos(x), lambda x, u: 1e-6 * jnp.sin(x) * u)
    return lambda x: {"huge": 1e6 * jnp.sin(x), "tiny": tiny(x)}, normal(4)


@wrong("vjp", innocent=STEADY)
def one_output_of_three_forgotten():
    parts = lambda x: (jnp.sin(x), x**2, jnp.exp(x))
    return pulled(parts, lambda x, u: jnp.cos(x) * u[0] + 2 * x * u[1]), normal(5)


@wrong("gradient", "vjp", "vjp linear")
def weight_decay_in_the_gradient_of_a_module():
    model = eqx.nn.MLP(3, 1, 5, 1, activation=jnp.tanh, key=jax.random.key(0))
    data = normal(6, 3)

    @eqx.filter_custom_vjp
    def loss(model, data):
        return (jax.vmap(model)(data) ** 2).mean()

    @loss.def_fwd
    def forward(perturbed, model, data):
        return loss(model, data), None

    @loss.def_bwd
    def backward(residuals, u, perturbed, model, data):
        gradient = eqx.filter_grad(lambda m: (jax.vmap(m)(data) ** 2).mean())(model)
        return jax.tree.map(lambda g, w: u * g + 1e-3 * w, gradient, eqx.filter(model, eqx.is_inexact_array))

    return lambda model: loss(model, data), model, {"modes": "reverse"}


# Tangents that are wrong: forward and reverse mode agree, and both are wrong.


@wrong(*FIRST, innocent=AGREEING)
def gelu_by_tanh_with_the_slope_of_the_exact_one():
    normal_pdf, normal_cdf = jax.scipy.stats.norm.pdf, jax.scipy.special.ndtr
    gelu = pushed(lambda x: jax.nn.gelu(x), lambda x, v: v * (normal_cdf(x) + x * normal_pdf(x)))
    return lambda x: gelu(x).sum(), normal(20)


@wrong(*FIRST, innocent=AGREEING)
def softplus_that_is_linear_too_early():
    """A slope of 1 beyond 10, where it is 1 - 2e-5."""
    softplus = pushed(jax.nn.softplus, lambda x, v: v * jnp.where(x > 10, 1.0, jax.nn.sigmoid(x)))
    return lambda x: softplus(x).sum(), array(-3.0, 0.5, 4.0, 11.0)


@wrong(*FIRST, innocent=AGREEING)
def scaled_bessel_function_without_its_scale():
    i0e, i1e = jax.scipy.special.i0e, jax.scipy.special.i1e
    return lambda x: pushed(i0e, lambda x, v: v * i1e(x))(x).sum(), even(5)


@wrong(*FIRST, innocent=AGREEING)
def sign_of_a_bessel_function():
    """J₀' = -J₁, both by quadrature."""
    t = (np.arange(64) + 0.5) * np.pi / 64
    J0 = lambda x: jnp.cos(x[..., None] * np.sin(t)).mean(-1)
    J1 = lambda x: jnp.cos(x[..., None] * np.sin(t) - t).mean(-1)
    return lambda x: pushed(J0, lambda x, v: v * J1(x))(x).sum(), even(5, 1.0, 7.0)


@wrong(*FIRST, innocent=AGREEING)
def digamma_by_two_terms_of_its_series():
    gammaln = pushed(jax.scipy.special.gammaln, lambda x, v: v * (jnp.log(x) - 1 / (2 * x)))
    return lambda x: gammaln(x).sum(), even(6, 15.0, 40.0)


@wrong(*FIRST, innocent=AGREEING)
def a_normal_density_with_a_rounded_pi():
    density = lambda x: jnp.exp(-(x**2) / 2) / np.sqrt(2 * 3.1416)
    return lambda x: pushed(jax.scipy.special.ndtr, lambda x, v: v * density(x))(x).sum(), normal(10)


@wrong(*FIRST, innocent=AGREEING)
def sinc_whose_slope_is_cut_short_near_zero():
    slope = lambda x: jnp.where(jnp.abs(x) < 0.3, -x / 3, (x * jnp.cos(x) - jnp.sin(x)) / x**2)
    sinc = pushed(lambda x: jnp.sin(x) / x, lambda x, v: v * slope(x))
    return lambda x: sinc(x).sum(), array(0.05, 1.0, -2.0)


@wrong(*FIRST, innocent=AGREEING)
def an_integral_with_its_boundary_term_alone():
    """∫₀ᵃ sin(a t) dt = (1 - cos a²) / a."""
    integral = pushed(lambda a: (1 - jnp.cos(a**2)) / a, lambda a, v: v * jnp.sin(a**2))
    return lambda a: integral(a).sum(), array(0.7, 1.4)


@wrong("jvp", "vjp", innocent=AGREEING)
def a_spline_whose_slope_forgets_the_grid():
    knots = np.sin(np.arange(30) * 0.2)

    def cubic(s):
        i = jnp.floor(s).astype(int)
        a, b, c, d = (jnp.asarray(knots)[i + k] for k in (-1, 0, 1, 2))
        t = s - i
        return b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))

    slope = lambda x, v: jax.jvp(cubic, (x / 0.2,), (v,))[1]
    return pushed(lambda x: cubic(x / 0.2), slope), array(0.55, 1.23, 3.71)


@wrong("jvp", "vjp", innocent=AGREEING)
def cholesky_that_does_not_halve_the_diagonal():
    def push(A, V):
        L = jnp.linalg.cholesky(A)
        inner = jax.scipy.linalg.solve_triangular(L, (V + V.T) / 2, lower=True)
        return L @ jnp.tril(jax.scipy.linalg.solve_triangular(L, inner.T, lower=True).T)

    factor = pushed(lambda A: jnp.linalg.cholesky((A + A.T) / 2), push)
    A = normal(4, 4)
    return factor, A @ A.T + 4 * jnp.eye(4)


@wrong("jvp", "vjp", innocent=("jvp against vjp", "vjp linear", "compiled"))
def an_exponential_of_matrices_as_if_they_commuted():
    expm = jax.scipy.linalg.expm
    return pushed(expm, lambda A, V: expm(A) @ V), normal(3, 3), {"order": 1, "vmap": False}


@wrong("jvp", "vjp", innocent=AGREEING)
def eigenvectors_with_the_gaps_turned():
    """Each is to move by its neighbours over λⱼ - λᵢ, not λᵢ - λⱼ."""
    weights = np.arange(3.0)

    def push(A, V):
        w, U = jnp.linalg.eigh(A)
        gaps = w[:, None] - w + jnp.eye(3)
        return 2 * (U * (U @ (U.T @ V @ U * (1 - jnp.eye(3)) / gaps))) @ weights

    squares = pushed(lambda A: jnp.linalg.eigh(A)[1] ** 2 @ weights, push)
    A = normal(3, 3)
    return lambda B: squares((B + B.T) / 2), A + A.T


@wrong(*FIRST, innocent=AGREEING)
def a_power_whose_exponent_has_the_wrong_base():
    """∂(xʸ)/∂y with log y for log x."""
    power = pushed(lambda x, y: x**y, lambda x, y, v, w: x**y * (y / x * v + jnp.log(y) * w))
    return lambda p: power(p["x"], p["y"]).sum(), {"x": even(4), "y": even(4, 1.5, 3.0)}


@wrong(*FIRST, innocent=AGREEING)
def an_angle_with_its_arguments_exchanged():
    angle = pushed(jnp.arctan2, lambda y, x, v, w: (y * v - x * w) / (x**2 + y**2))
    return lambda p: angle(p[0], p[1]).sum(), (normal(5), normal(5, seed=1))


@wrong(*FIRST, innocent=AGREEING)
def a_complex_modulus_without_its_imaginary_part():
    modulus = pushed(lambda z: jnp.abs(z), lambda z, v: z.real * v.real / jnp.abs(z))
    return lambda z: modulus(z).sum(), lax.complex(normal(5), normal(5, seed=1))


@wrong(*FIRST, innocent=AGREEING)
def a_polynomial_without_its_last_coefficient():
    c = np.array([1.0, -0.5, 0.25, 2e-5])
    p = pushed(lambda x: jnp.polyval(c[::-1], x), lambda x, v: v * (c[1] + 2 * c[2] * x))
    return lambda x: p(x).sum(), even(8)


@wrong(*FIRST, innocent=AGREEING)
def an_inverse_square_root_by_one_step_of_newton():
    def push(x, v):
        rough = lax.rsqrt(x) * 1.01
        return -0.5 * v * (rough * (1.5 - 0.5 * x * rough**2)) ** 3

    return lambda x: pushed(lax.rsqrt, push)(x).sum(), even(9)


@wrong(*FIRST, innocent=AGREEING)
def batch_norm_with_detached_statistics():
    weights = normal(8, 3, seed=1)

    def f(x):
        mean, deviation = stop_gradient(x.mean(0)), stop_gradient(x.std(0))
        return (weights * (x - mean) / (deviation + 1e-5)).sum()

    return f, normal(8, 3)


@wrong(*FIRST, innocent=AGREEING)
def a_straight_through_estimator():
    return lambda x: ((x + stop_gradient(jnp.round(x) - x)) ** 2).sum(), array(0.3, 1.8, -2.2, 3.4)


@wrong(*FIRST, innocent=AGREEING)
def truncated_backpropagation_through_time():
    def step(h, xk):
        x, k = xk
        h = jnp.where(k % 5 == 0, stop_gradient(h), h)
        return jnp.tanh(0.9 * h + x), None

    return lambda x: lax.scan(step, 0.1, (x, jnp.arange(12)))[0], normal(12)


@wrong(*FIRST, innocent=AGREEING)
def an_ode_with_frozen_steps():
    """Steps that depend on the state, and so does the time that is reached."""

    def step(y, _):
        h = 0.1 / (1 + stop_gradient(jnp.abs(y)))
        return y + h * (jnp.cos(y) - y), None

    return lambda y: lax.scan(step, y, length=15)[0].sum(), array(0.1, 1.5, -2.0)


@wrong(*FIRST, innocent=AGREEING)
def a_root_whose_tangents_are_not_solved_for():
    """y³ + y = x."""

    def root(x):
        newton = lambda f, y: lax.fori_loop(0, 40, lambda _, y: y - f(y) / (3 * y**2 + 1), y)
        return lax.custom_root(lambda y: y**3 + y - x, x, newton, lambda g, y: y)

    return lambda x: root(x).sum(), even(4)


@wrong("jvp", "vjp", "gradient", innocent=("value", "vmap"))
def squared_distance_by_a_square_root_at_zero():
    distance = lambda x: jnp.sqrt((x**2).sum(1))
    return lambda x: (distance(x) ** 2).sum(), array([0.0, 0.0], [0.3, -1.0])


@wrong("jvp", "vjp", "gradient", innocent=("value", "vmap"))
def a_cosine_detached_at_one_entry():
    frozen = np.arange(2000) == 1234
    return lambda x: jnp.cos(jnp.where(frozen, stop_gradient(x), x)).sum(), even(2000), {"order": 1}


# One mode that is right and one that is wrong.


@wrong("vjp", "jvp against vjp", innocent=("jvp", *STEADY))
def a_linear_solve_called_symmetric():
    A = normal(5, 5) + 4 * jnp.eye(5)
    solve = lambda _, b: jnp.linalg.solve(A, b)
    return lambda b: lax.custom_linear_solve(lambda x: A @ x, b, solve, symmetric=True), normal(5, seed=1)


@wrong("vjp", "jvp against vjp", innocent=("jvp", *STEADY))
def a_linear_call_with_a_wrong_transpose():
    """Differences of neighbours, transposed without their sign."""
    difference = lambda _, x: x - jnp.roll(x, 1)
    back = lambda _, u: u - jnp.roll(u, 1)
    return lambda x: linear_call(difference, back, (), jnp.sin(x)), normal(6)


@wrong(*REVERSE, "jvp against vjp", "forward over forward", innocent=("value", "jvp", "vmap"))
def sinc_guarded_by_one_where():
    """0 / 0 in the branch not taken, which forward mode discards and reverse mode multiplies by zero."""
    return lambda x: jnp.where(x == 0, 1.0, jnp.sin(x) / x).sum(), array(0.0, 0.5, 2.0)


# Right at first order.


@wrong(*OVER_REVERSE, innocent=(*REVERSE, *STEADY))
def a_pullback_with_a_constant_residual():
    cube = pulled(lambda x: x**3, lambda x, u: 3 * stop_gradient(x) ** 2 * u)
    return lambda x: cube(x).sum(), even(6)


@wrong(*SECOND, innocent=(*FIRST, *AGREEING))
def an_exponential_with_a_constant_slope():
    exponential = pushed(jnp.exp, lambda x, v: stop_gradient(jnp.exp(x)) * v)
    return lambda x: exponential(x).sum(), normal(6)


@wrong(*OVER_REVERSE, innocent=(*REVERSE, *STEADY))
def layer_norm_with_a_constant_rate_at_second_order():
    def pull(x, u):
        y, rate = layer_norm(x), stop_gradient(lax.rsqrt(x.var(-1, keepdims=True) + 1e-5))
        return rate * (u - u.mean(-1, keepdims=True) - y * (u * y).mean(-1, keepdims=True))

    ruled = pulled(layer_norm, pull)
    return lambda x: jnp.sin(ruled(x)).sum(), normal(3, 6)


@wrong(*SECOND, innocent=(*FIRST, *AGREEING))
def a_spectral_norm_with_frozen_vectors():
    def f(W):
        U, _, V = jnp.linalg.svd(stop_gradient(W))
        return U[:, 0] @ W @ V[0]

    return f, normal(4, 3)


@wrong(*SECOND, innocent=(*FIRST, *AGREEING))
def optimal_transport_by_the_envelope_theorem():
    """Sinkhorn's dual at potentials that are held constant: right at their optimum, once."""
    n, eps = 4, 0.5

    def f(cost):
        held = stop_gradient(cost)

        def step(fg, _):
            f = -eps * jax.nn.logsumexp((fg[1] - held) / eps - np.log(n), axis=1)
            g = -eps * jax.nn.logsumexp((f[:, None] - held) / eps - np.log(n), axis=0)
            return (f, g), None

        (f, g), _ = lax.scan(step, (jnp.zeros(n), jnp.zeros(n)), length=300)
        plan = jnp.exp((f[:, None] + g - cost) / eps) / n**2
        return f.mean() + g.mean() - eps * plan.sum()

    return f, jnp.abs(normal(n, n)) + 0.2


@wrong(*OVER_REVERSE, innocent=(*REVERSE, *STEADY))
def a_logistic_loss_with_a_constant_probability():
    signs = np.array([1.0, -1, 1, 1, -1])
    loss = pulled(
        lambda z: jax.nn.softplus(-signs * z).sum(),
        lambda z, u: -u * signs * stop_gradient(jax.nn.sigmoid(-signs * z)),
    )
    return loss, normal(5)


@wrong("hessian symmetric", "hvp", "hessian", "reverse over reverse", innocent=(*REVERSE, *STEADY))
def a_hessian_with_one_side():
    """x₀² x₁, with x₁ held constant in the first entry of its gradient."""
    pull = lambda x, u: u * jnp.stack([2 * x[0] * stop_gradient(x[1]), x[0] ** 2])
    return pulled(lambda x: x[0] ** 2 * x[1], pull), array(0.7, 1.3)


@wrong(*OVER_REVERSE, innocent=(*REVERSE, *STEADY))
def one_part_in_ten_thousand_at_second_order():
    keep = lambda x: x + 1e-4 * (stop_gradient(x) - x)
    sine = pulled(jnp.sin, lambda x, u: jnp.cos(keep(x)) * u)
    return lambda x: sine(x).sum(), even(6)


@wrong("forward over reverse", "reverse over reverse", innocent=(*REVERSE, *STEADY))
def a_pullback_made_of_a_wrong_tangent():
    slope = pushed(lambda x: 3 * x**2, lambda x, v: 6.06 * x * v)
    cube = pulled(lambda x: x**3, lambda x, u: slope(x) * u)
    return lambda x: cube(x).sum(), even(5)


@wrong("reverse over forward", "reverse over reverse", innocent=(*FIRST, *AGREEING))
def a_tangent_made_of_a_wrong_pullback():
    slope = pulled(lambda x: 3 * x**2, lambda x, u: 6.06 * x * u)
    cube = pushed(lambda x: x**3, lambda x, v: slope(x) * v)
    return lambda x: cube(x).sum(), even(5)


@wrong(*SECOND, innocent=(*FIRST, *AGREEING))
def a_zero_with_a_curvature():
    """The square of a zero that is half detached."""
    return lambda x: jnp.exp(x).sum() + ((x - stop_gradient(x)) ** 2).sum(), normal(5)


@wrong(*THIRD, innocent=(*FIRST, *SECOND, *AGREEING))
def a_slope_s_slope_held_constant():
    square = pushed(lambda x: x**2, lambda x, v: 2 * stop_gradient(x) * v)
    cube = pushed(lambda x: x**3, lambda x, v: 3 * square(x) * v)
    return lambda x: cube(x).sum(), even(4), {"order": 3}


@wrong(*THIRD, innocent=(*FIRST, *SECOND, *AGREEING))
def a_detached_cube():
    return lambda x: jnp.sin(x).sum() + ((x - stop_gradient(x)) ** 3).sum(), even(4), {"order": 3}


@wrong("reverse over reverse over reverse", innocent=(*REVERSE, *OVER_REVERSE))
def a_pullback_s_pullback_held_constant():
    twice = pulled(lambda x: 12 * x**2, lambda x, u: 24 * stop_gradient(x) * u * 0.9)
    slope = pulled(lambda x: 4 * x**3, lambda x, u: twice(x) * u)
    quartic = pulled(lambda x: x**4, lambda x, u: slope(x) * u)
    return lambda x: quartic(x).sum(), even(4), {"order": 3, "modes": "reverse"}


# Values that change, pullbacks that are no linear maps.


@wrong("value")
def a_counter_in_python():
    """Each call is another function, as far as it is not compiled."""
    calls = count(1)
    return lambda x: next(calls) * (x**2).sum(), even(4)


@wrong("value")
def a_counter_in_a_callback():
    calls = count(1)
    shape = jax.ShapeDtypeStruct((), np.float64)
    f = lambda x: (x**2).sum() + jax.pure_callback(lambda: np.float64(next(calls)), shape)
    return f, even(4)


@wrong("value")
def noise_from_a_callback():
    shape = jax.ShapeDtypeStruct((5,), np.float64)
    rng = np.random.default_rng(0)
    draw = lambda: jax.pure_callback(lambda: 1e-3 * rng.normal(size=5), shape)
    return lambda x: (x**2 * (1 + draw())).sum(), even(5)


@wrong("vjp", "vjp linear")
def guided_backpropagation():
    relu = pulled(jax.nn.relu, lambda x, u: jnp.where(x > 0, jnp.maximum(u, 0.0), 0.0))
    return relu, normal(12)


@wrong("vjp linear")
def a_gradient_clipped_by_its_norm():
    clip = lambda u: u * jnp.minimum(1.0, 1e-2 / jnp.linalg.norm(u))
    return pulled(lambda x: x * 1.0, lambda x, u: clip(u)), normal(6)


@wrong("vjp linear", innocent=("vjp", "vjp repeatable"))
def a_cotangent_divided_by_its_own_norm():
    """Right but for a zero cotangent, of which it makes 0 / 0."""

    def pull(x, u):
        size = jnp.abs(u).max()
        return (u / size) * jnp.cos(x) * size

    return pulled(jnp.sin, pull), normal(6)


@wrong("vjp")
def a_cotangent_rounded_to_bfloat16():
    sine = pulled(jnp.sin, lambda x, u: u.astype(jnp.bfloat16).astype(u.dtype) * jnp.cos(x))
    return lambda x: sine(2 * x) * 3.3, normal(6)


@wrong("gradient", "vjp linear")
def noise_added_to_a_gradient():
    noise = 1e-3 * np.random.default_rng(0).normal(size=30)
    square = pulled(lambda x: x**2, lambda x, u: 2 * x * u + noise)
    return lambda x: square(x).sum(), normal(30)


@wrong("vjp repeatable")
def a_pullback_that_counts():
    calls = count(0)
    sine = pulled(jnp.sin, lambda x, u: jnp.cos(x) * u * (1 + 0.01 * next(calls)))
    return lambda x: sine(x).sum(), even(4)


@wrong("vjp repeatable")
def a_pullback_with_noise_from_a_callback():
    rng = np.random.default_rng(0)

    def pull(x, u):
        noise = jax.pure_callback(lambda: rng.normal(size=4), jax.ShapeDtypeStruct((4,), np.float64))
        return jnp.cos(x) * u * (1 + 1e-2 * noise)

    return lambda x: pulled(jnp.sin, pull)(x).sum(), even(4)


# Parts of x or of the output alone.


@wrong("each part alone", innocent=(*FIRST, "jvp against vjp"))
def a_tangent_rule_that_wants_both_tangents():
    product = jax.custom_jvp(lambda a, b: a * b)

    def push(primals, tangents):
        (a, b), (v, w) = primals, tangents
        if isinstance(w, SymbolicZero):
            return product(a, b), 2 * b * v
        left = jnp.zeros_like(a) if isinstance(v, SymbolicZero) else b * v
        return product(a, b), left + a * w

    product.defjvp(push, symbolic_zeros=True)
    return lambda p: product(p["a"], p["b"]).sum(), {"a": even(4), "b": even(4, 1.0, 3.0)}


@wrong("each part alone", innocent=("vjp", "vjp linear", "vjp repeatable"))
def a_pullback_that_wants_both_cotangents():
    both = jax.custom_vjp(lambda x: (x**2, x**3))

    def pull(x, u):
        if any(isinstance(part, SymbolicZero) for part in u):
            return (jnp.zeros_like(x),)
        return (2 * x * u[0] + 3 * x**2 * u[1],)

    both.defvjp(lambda x: (both(x.value), x.value), pull, symbolic_zeros=True)
    return both, even(4)


@wrong("each part alone", innocent=(*REVERSE, "vjp linear", "vjp repeatable"))
def a_pullback_that_wants_all_perturbed():
    """A gradient by the weights alone, the data a constant, is half of what it is with the data."""
    product = jax.custom_vjp(lambda a, b: a * b)

    def forward(a, b):
        factor = 1.0 if a.perturbed and b.perturbed else 0.5
        return a.value * b.value, (a.value, b.value, factor)

    def pull(kept, u):
        a, b, factor = kept
        zero = isinstance(u, SymbolicZero)
        return (0 * a, 0 * b) if zero else (factor * u * b, factor * u * a)

    product.defvjp(forward, pull, symbolic_zeros=True)
    return lambda p: product(p["a"], p["b"]).sum(), {"a": even(4), "b": even(4, 1.0, 3.0)}


# Batches.


def batched(f, rule):
    """f with a batching rule of its own: `rule(size, batched, *x)` gives the values."""
    ruled = custom_vmap(f)
    ruled.def_vmap(lambda size, which, *x: (rule(size, which, *x), True))
    return ruled


@wrong("vmap", innocent=("jvp", "vjp", "gradient", "value"))
def a_batch_that_repeats_its_first():
    f = batched(lambda x: jnp.sin(x), lambda n, _, x: jnp.broadcast_to(jnp.sin(x[0]), x.shape))
    return lambda x: f(x).sum(), normal(5)


@wrong("vmap", innocent=("value", "jvp", "vjp", "vjp linear"))
def a_batch_normalised_as_a_whole():
    norm = lambda x: x / jnp.sqrt((x**2).sum())
    return batched(norm, lambda n, _, x: norm(x)), normal(5)


@wrong("vmap", innocent=("value", "jvp", "vjp"))
def a_callback_that_accumulates_along_the_batch():
    """A numpy function given one axis more than it was written for."""

    def total(x):
        kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x: np.cumsum(x, 0), kind, x, vmap_method="expand_dims")

    return pushed(total, lambda x, v: jnp.cumsum(v)), normal(6)


@wrong("vmap of jvp", innocent=("value", "jvp", "vmap"))
def a_tangent_with_a_wrong_batch():
    slope = batched(lambda x: jnp.cos(x), lambda n, _, x: jnp.cos(x[::-1]))
    return pushed(jnp.sin, lambda x, v: slope(x) * v), normal(5)


@wrong("vmap of vjp", "vjp of vmap", innocent=("value", "vjp", "vmap"))
def a_pullback_with_a_wrong_batch():
    slope = batched(lambda x: jnp.cos(x), lambda n, _, x: jnp.cos(x.mean(0)) + 0 * x)
    return pulled(jnp.sin, lambda x, u: slope(x) * u), normal(5)


@wrong("vjp of vmap", innocent=("value", "vjp", "vmap", "vmap of vjp"))
def a_pullback_that_is_wrong_for_batched_cotangents_and_points():
    multiply = lambda slope, u: slope * u
    rule = lambda n, which, slope, u: slope * u * (1.5 if all(which) else 1.0)
    product = batched(multiply, rule)
    return pulled(jnp.sin, lambda x, u: product(jnp.cos(x), u)), normal(5)


@wrong("vmap of vjp", innocent=("value", "vjp", "vmap", "vjp of vmap"))
def a_pullback_that_is_wrong_for_batched_cotangents_alone():
    """As in a Jacobian by reverse mode: many cotangents at one point."""

    def rule(n, which, slope, u):
        return slope * u * (1.0 if which[0] else 2.0)

    product = batched(lambda slope, u: slope * u, rule)
    return pulled(jnp.sin, lambda x, u: product(jnp.cos(x), u)), normal(5)


# Compiled.


@wrong("compiled")
def another_function_where_it_is_traced():
    traced = lambda x: isinstance(x, jax.core.Tracer)
    return lambda x: (jnp.sin(x) if traced(x) else x - x**3 / 6).sum(), normal(5)


@wrong("compiled")
def a_fallback_where_values_are_not_known():
    """An early exit that needs the values, and silently other terms where there are none."""

    def terms(x):
        try:
            return 3 if float(jnp.abs(x).max()) < 1 else 12
        except jax.errors.ConcretizationTypeError:
            return 4

    def f(x):
        return sum(x**k / np.prod(np.arange(1.0, k + 1)) for k in range(terms(x))).sum()

    return f, array(0.5, 1.2, -2.0)


@wrong("vjp linear", innocent=("vjp",))
def small_cotangents_are_dropped():
    return pulled(jnp.sin, lambda x, u: jnp.where(jnp.abs(u) < 1e-3, 0.0, u * jnp.cos(x))), normal(6)


@wrong("vjp")
def a_fifth_in_float16_at_an_extremum():
    factor = lambda x: jnp.asarray(1.2 if x.dtype == np.float16 else 1.0, x.dtype)
    return pulled(jnp.sin, lambda x, u: factor(x) * u * jnp.cos(x)), normal(20, dtype=np.float16)
