"""jax functions whose derivatives are right, and hard to see by differences."""

from __future__ import annotations

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.custom_batching import custom_vmap, sequential_vmap
from jax.custom_derivatives import linear_call
from jax.lax import stop_gradient
from jax.scipy import linalg, special

from corpus.cases import right
from corpus.rules_jax import array, even, normal, pulled, pushed

FIRST_ORDER = {"order": 1}
THIRD_ORDER = {"order": 3}


# Scale: stiff, badly scaled, far from zero, tiny, huge, oscillating.


@right()
def stiff_exponentials():
    rates = np.array([1.0, 1e2, 1e4])
    return lambda x: jnp.exp(-rates * x).sum(), array(1.0, 0.02, 1e-4)


@right()
def scales_from_1e_minus_12_to_1e12():
    size = 10.0 ** np.arange(-12, 13, 6)
    return lambda x: jnp.log1p((x / size) ** 2), jnp.asarray(size) * array(0.7, 1.3, -0.4, 2.0, -1.1)


@right()
def a_product_across_scales():
    return lambda x: jnp.log(x).sum() ** 2, array(1e-12, 1e-6, 1.0, 1e6, 1e12)


@right()
def leaves_of_different_size():
    f = lambda p: jnp.sin(p["big"] * 1e-9).sum() + jnp.cos(p["small"] * 1e9).sum()
    return f, {"big": 1e9 * normal(3), "small": 1e-9 * normal(3, seed=1)}


@right()
def an_offset_of_1e8():
    return lambda x: 1e8 + jnp.sin(x).sum(), normal(5)


@right()
def an_offset_of_1e4_in_float32():
    return lambda x: 1e4 + jnp.sin(x).sum(), normal(5, dtype="float32")


@right()
def a_point_far_from_zero():
    return lambda x: jnp.sin(x - 1e8).sum(), 1e8 + even(4)


@right()
def a_large_offset_that_cancels():
    return lambda x: ((x + 1e5) ** 2 - 1e10 - 2e5 * x).sum(), even(3)


@right()
def values_of_1e_minus_30():
    return lambda x: 1e-30 * jnp.tanh(x).sum(), normal(4)


@right()
def values_of_1e200():
    return lambda x: 1e200 * jnp.tanh(x).sum(), normal(4)


@right()
def planck_s_law_in_si_units():
    h, c, k = 6.626e-34, 2.998e8, 1.381e-23

    def radiance(p):
        wavelength, temperature = p
        return 2 * h * c**2 / wavelength**5 / jnp.expm1(h * c / (wavelength * k * temperature))

    return radiance, (array(5e-7, 1e-6), array(5800.0, 3000.0))


@right()
def oscillation_of_frequency_100():
    return lambda x: jnp.sin(100 * x).sum(), even(4)


@right()
def oscillation_of_frequency_1e4():
    return lambda x: jnp.sin(1e4 * x).sum(), even(3)


@right()
def a_chirp():
    return lambda x: jnp.sin(1 / x).sum(), array(0.01, 0.1, 1.0)


@right()
def a_finite_sum_of_weierstrass():
    k = np.arange(10)
    return lambda x: (0.5**k * jnp.cos(3.0**k * np.pi * x[:, None])).sum(), array(0.3, 0.71)


@right()
def rastrigin():
    return lambda x: (x**2 - 10 * jnp.cos(2 * np.pi * x)).sum() + 10 * x.size, normal(10)


@right()
def a_narrow_gaussian():
    return lambda x: jnp.exp(-(((x - 1) / 1e-4) ** 2) / 2).sum(), array(1.0001, 0.99995)


@right()
def a_steep_sigmoid():
    return lambda x: jax.nn.sigmoid(1e3 * (x - 0.5)).sum(), array(0.5, 0.501, 0.497)


@right()
def a_saturated_softmax():
    return lambda x: jax.nn.softmax(40 * x), array(1.0, 0.0, -1.0)


@right()
def cross_entropy_of_large_logits():
    loss = optax.softmax_cross_entropy_with_integer_labels
    return lambda z: loss(z, np.array([0, 2])).mean(), 1e3 * normal(2, 4)


@right()
def lennard_jones():
    distances = lambda x: jnp.linalg.norm(x[:, None] - x[None] + jnp.eye(4)[..., None], axis=-1)

    def energy(x):
        r = distances(x)[np.triu_indices(4, 1)]
        return (4 * (r**-12 - r**-6)).sum()

    return energy, array([0.0, 0, 0], [0.9, 0, 0], [0.2, 1.1, 0.1], [0.5, 0.4, 1.0])


@right()
def a_power_of_200():
    return lambda x: (x**200).sum(), array(0.9, 1.0, 1.1)


@right()
def rosenbrock_in_its_valley():
    f = lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
    return f, array(1.0 + 1e-6, 1.0, 1.0 - 1e-6)


@right()
def a_very_ill_conditioned_quadratic():
    return lambda x: (10.0 ** np.arange(-8, 9, 4) * x**2).sum() / 2, normal(5)


# Kinks, jumps, poles and edges: beside them, and at them.


@right()
def beside_the_kink_of_an_absolute_value():
    return lambda x: jnp.abs(x).sum(), array(1e-5, -1e-3, 1.0)


@right()
def a_relu_network_away_from_its_kinks():
    W, V = normal(16, 4), normal(16, seed=1)
    return lambda x: V @ jax.nn.relu(W @ x), even(4)


@right("inconclusive")
def at_the_kink_of_a_relu():
    return lambda x: jax.nn.relu(x).sum(), array(0.0, 1.0, -1.0)


@right("inconclusive")
def at_the_kink_of_an_absolute_value():
    return lambda x: (jnp.abs(x) * array(1.0, 2.0)).sum(), array(0.0, -0.3)


@right("inconclusive")
def at_a_tie_of_a_maximum():
    return lambda x: jnp.max(x) ** 2, array(0.7, 1.3, 1.3)


@right("inconclusive")
def at_the_edge_of_a_clip():
    return lambda x: jnp.clip(x, -1.0, 1.0).sum(), array(1.0, 0.2)


@right("inconclusive")
def a_hinge_loss_at_its_margin():
    return lambda x: jnp.maximum(0.0, 1 - x).sum(), array(1.0, 0.5, 2.0)


@right("inconclusive")
def an_l1_penalty_of_a_sparse_vector():
    return lambda x: (x**2).sum() + 0.1 * jnp.abs(x).sum(), array(0.0, 1.5, 0.0, -0.2)


@right("inconclusive")
def at_a_knot_of_an_interpolation():
    table = np.array([0.0, 1.0, 0.5, 2.0])
    return lambda x: jnp.interp(x, np.arange(4.0), table).sum(), array(1.0, 2.5)


@right("inconclusive")
def at_a_jump():
    return lambda x: (x + jnp.floor(x)).sum(), array(1.0, 0.4)


@right("inconclusive")
def at_a_step():
    return lambda x: (x * jnp.heaviside(x - 1.5, 0.5)).sum(), array(1.5, 2.0)


@right("inconclusive")
def at_the_edge_of_a_square_root():
    return lambda x: jnp.sqrt(x).sum(), array(0.0, 1.0)


@right()
def beside_a_jump():
    return lambda x: (jnp.round(x) * x).sum(), array(0.3, 1.45, -2.2)


@right()
def a_step_function():
    return lambda x: jnp.floor(x).sum(), array(0.3, 1.5)


@right()
def the_square_of_a_relu_at_zero_once():
    return lambda x: (jax.nn.relu(x) ** 2).sum(), array(0.0, 1.0), FIRST_ORDER


@right("inconclusive")
def the_square_of_a_relu_at_zero_twice():
    return lambda x: (jax.nn.relu(x) ** 2).sum(), array(0.0, 1.0)


@right()
def huber_at_its_join_once():
    return lambda x: optax.huber_loss(x, delta=0.5).sum(), array(0.5, 0.2, 3.0), FIRST_ORDER


@right("inconclusive")
def huber_at_its_join_twice():
    return lambda x: optax.huber_loss(x, delta=0.5).sum(), array(0.5, 0.2, 3.0)


@right()
def the_cube_of_an_absolute_value_at_zero():
    return lambda x: (jnp.abs(x) ** 3).sum(), array(0.0, 1.0, -0.5)


@right()
def a_cubic_spline_at_its_knot():
    """max(0, x - 1)³ is twice differentiable."""
    return lambda x: (x**2 + jnp.maximum(0.0, x - 1) ** 3).sum(), array(1.0, 1.7, 0.3)


@right()
def a_flat_function_at_the_end_of_its_flatness():
    """exp(-1/x) for x > 0: every derivative at 0 is 0."""
    safe = lambda x: jnp.where(x > 0, x, 1.0)
    return lambda x: jnp.where(x > 0, jnp.exp(-1 / safe(x)), 0.0).sum(), array(0.0, 0.5, 1.5)


@right()
def smoothstep_inside():
    def step(x):
        t = jnp.clip(x, 0.0, 1.0)
        return t * t * (3 - 2 * t)

    return lambda x: step(x).sum(), array(0.2, 0.9, 1.5, -0.3)


@right()
def a_pole_nearby():
    return lambda x: (1 / (x - 1)).sum(), array(1.001, 0.999, 3.0)


@right()
def a_tangent_near_its_pole():
    return lambda x: jnp.tan(x).sum(), array(np.pi / 2 - 1e-3, 1.0)


@right()
def a_square_root_near_zero():
    return lambda x: jnp.sqrt(x).sum(), array(1e-8, 1e-4, 1.0)


@right()
def a_logarithm_near_zero():
    return lambda x: jnp.log(x).sum(), array(1e-5, 1e-3, 1.0)


@right()
def arccosine_near_one():
    return lambda x: jnp.arccos(x).sum(), array(1 - 1e-6, -1 + 1e-4, 0.2)


@right()
def arctanh_near_one():
    return lambda x: jnp.arctanh(x).sum(), array(0.99999, -0.999)


@right()
def arccosine_near_one_in_float32():
    return lambda x: jnp.arccos(x).sum(), array(0.999, 0.5, dtype="float32")


@right()
def entropy_of_small_probabilities():
    return lambda p: special.entr(p).sum(), array(1e-6, 1e-3, 0.2, 0.7)


@right()
def a_logarithmic_barrier():
    A, b = normal(8, 3), np.abs(normal(8, seed=1)) + 1e-3
    return lambda x: -jnp.log(b - A @ x).sum(), array(0.0, 0.0, 0.0)


# Zeros, constants, and what f does not depend on.


@right()
def a_product_with_a_zero():
    return jnp.prod, array(2.0, 0.0, -1.5, 0.5)


@right()
def all_zeros():
    return lambda x: jnp.sinh(x).sum() + jnp.prod(jnp.cos(x)), array(0.0, 0.0, 0.0)


@right()
def sinc_at_zero():
    return lambda x: jnp.sinc(x).sum(), array(0.0, 0.4, -1.3)


@right()
def a_root_guarded_by_two_wheres():
    safe = lambda x: jnp.where(x > 0, x, 1.0)
    return lambda x: jnp.where(x > 0, jnp.sqrt(safe(x)), 0.0).sum(), array(-0.5, 0.3, 2.0)


@right()
def a_quartic_at_its_minimum():
    return lambda x: (x**4).sum(), array(0.0, 0.0)


@right()
def a_saddle_at_zero():
    return lambda x: x[0] * x[1] + x[2] ** 2 * x[0], array(0.0, 0.0, 0.0)


@right()
def a_constant():
    return lambda x: 0 * x.sum() + 3.0, normal(4)


@right()
def a_constant_without_x():
    return lambda x: jnp.array([1.0, 2.0]), normal(4)


@right()
def part_of_x_ignored():
    return lambda p: jnp.sin(p["used"]).sum(), {"used": normal(3), "unused": normal(4, seed=1)}


@right()
def a_sum_that_is_always_one():
    return lambda x: jax.nn.softmax(x).sum(), normal(5)


@right()
def integer_leaves():
    x = {"w": normal(4, 3), "ids": jnp.array([0, 2, 2]), "n": 3, "none": None}
    return lambda x: (jnp.tanh(x["w"][x["ids"]]) ** x["n"]).sum(), x


@right()
def a_scalar_point():
    return lambda x: jnp.exp(-x) * jnp.cos(3 * x), jnp.asarray(0.8)


@right()
def a_python_float_beside_an_array():
    return lambda p: p["a"] ** 2 * jnp.sin(p["b"]), {"a": array(0.3, 0.9), "b": 1.1}


@right()
def a_tree_of_many_leaves():
    x = [{"a": normal(2, seed=i), "b": (even(3), normal(seed=i))} for i in range(4)]
    return lambda x: sum(jnp.sin(leaf).prod() for leaf in jax.tree.leaves(x)), x


@right()
def many_outputs_in_a_tree():
    return lambda x: {"a": x**2, "b": [jnp.outer(x, x), jnp.exp(x).sum()], "c": 1e-9 * jnp.cos(x)}, normal(3)


# Cancellation and ill-conditioning.


@right()
def one_minus_cosine():
    return lambda x: ((1 - jnp.cos(x)) / x**2).sum(), array(0.01, 0.1, 1.0)


@right()
def an_exponential_less_its_series():
    return lambda x: ((jnp.exp(x) - 1 - x) / x**2).sum(), array(0.01, 0.3)


@right()
def variance_by_squares():
    return lambda x: (x**2).mean() - x.mean() ** 2, 1e3 + normal(20)


@right()
def variance_by_squares_in_float32():
    return lambda x: (x**2).mean() - x.mean() ** 2, 10 + normal(20, dtype="float32")


@right()
def a_hilbert_system():
    H = 1.0 / (np.arange(6)[:, None] + np.arange(6) + 1)
    return lambda b: jnp.linalg.solve(H, b), normal(6)


@right()
def a_nearly_singular_system():
    A = np.array([[1.0, 1.0], [1.0, 1.0 + 1e-6]])
    return lambda p: jnp.linalg.solve(p["A"], p["b"]), {"A": jnp.asarray(A), "b": array(1.0, 2.0)}


@right()
def a_determinant():
    return jnp.linalg.det, normal(4, 4)


@right()
def a_determinant_of_a_singular_matrix():
    A = normal(3, 3)
    return jnp.linalg.det, A.at[2].set(A[0] - 2 * A[1]), FIRST_ORDER


@right()
def eigenvalues_close_to_each_other():
    f = lambda A: jnp.linalg.eigvalsh((A + A.T) / 2)
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    return f, jnp.asarray(Q @ np.diag([1.0, 1.001, 3.0]) @ Q.T)


@right()
def singular_values():
    return lambda A: jnp.linalg.svd(A, compute_uv=False), normal(4, 3)


@right()
def a_log_likelihood_of_a_gaussian_process():
    t, y = even(12, 0.0, 3.0), normal(12)

    def f(p):
        gram = jnp.exp(p["a"]) * jnp.exp(-((t[:, None] - t) ** 2) / 2 * jnp.exp(-p["l"]))
        L = jnp.linalg.cholesky(gram + jnp.exp(p["noise"]) * jnp.eye(12))
        return (linalg.solve_triangular(L, y, lower=True) ** 2).sum() / 2 + jnp.log(jnp.diag(L)).sum()

    return f, {"a": array(0.2)[0], "l": array(-0.5)[0], "noise": array(-3.0)[0]}


@right()
def a_pseudoinverse():
    return jnp.linalg.pinv, normal(4, 3), FIRST_ORDER


@right()
def a_kalman_filter():
    A, C = jnp.array([[1.0, 0.1], [-0.1, 0.95]]), jnp.array([1.0, 0.0])
    data = normal(20)

    def f(p):
        def step(state, y):
            m, P = state
            m, P = A @ m, A @ P @ A.T + jnp.exp(p[0]) * jnp.eye(2)
            gain, s = P @ C, C @ P @ C + jnp.exp(p[1])
            update = (m + gain / s * (y - C @ m), P - jnp.outer(gain, gain) / s)
            return update, (y - C @ m) ** 2 / s + jnp.log(s)

        return lax.scan(step, (jnp.zeros(2), jnp.eye(2)), data)[1].sum()

    return f, array(-2.0, -1.0)


# Long programs: sums, scans, integrations, iterations.


@right()
def a_sum_of_1e5_terms():
    return lambda x: (jnp.sin(x) ** 2).sum(), normal(100_000), FIRST_ORDER


@right()
def a_sum_of_1e5_terms_in_float32():
    return lambda x: (x**2).sum(), normal(100_000, dtype="float32"), FIRST_ORDER


@right()
def a_logistic_map_in_chaos():
    return lambda x: lax.scan(lambda y, _: (3.9 * y * (1 - y), None), x, length=25)[0].sum(), array(0.3, 0.62)


@right()
def a_recurrent_network_of_200_steps():
    W = normal(4, 4) / 2.5
    inputs = normal(200, 4, seed=1)
    f = lambda h: lax.scan(lambda h, x: (jnp.tanh(W @ h + x), h), h, inputs)[1]
    return lambda h: (f(h) ** 2).mean(), normal(4, seed=2)


@right()
def lorenz_by_runge_kutta():
    def field(y):
        return jnp.stack([10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])

    def step(y, _, h=0.01):
        a = field(y)
        b = field(y + h / 2 * a)
        c = field(y + h / 2 * b)
        return y + h / 6 * (a + 2 * b + 2 * c + field(y + h * c)), None

    return lambda y: lax.scan(step, y, length=100)[0], array(1.0, 1.5, 20.0)


@right()
def a_pendulum_by_leapfrog():
    def step(state, _, h=0.05):
        q, p = state
        p = p - h / 2 * jnp.sin(q)
        q = q + h * p
        return (q, p - h / 2 * jnp.sin(q)), None

    return lambda x: lax.scan(step, x, length=300)[0], (array(0.3)[0], array(1.2)[0])


@right()
def a_stiff_oscillator_by_backward_euler():
    def step(y, _, h=0.1):
        residual = lambda z: z - y - h * jnp.stack([z[1], 50 * (1 - z[0] ** 2) * z[1] - z[0]])
        newton = lambda z, _: (z - jnp.linalg.solve(jax.jacfwd(residual)(z), residual(z)), None)
        return lax.scan(newton, y, length=8)[0], None

    return lambda y: lax.scan(step, y, length=10)[0].sum(), array(2.0, -0.1), FIRST_ORDER


@right()
def heat_on_a_grid():
    def step(u, _):
        return u + 0.2 * (jnp.roll(u, 1) - 2 * u + jnp.roll(u, -1)) + 0.01 * jnp.sin(u), None

    return lambda u: (lax.scan(step, u, length=100)[0] ** 2).sum(), normal(40)


@right()
def keplers_equation_by_newton_in_a_while_loop():
    """Reverse mode is not supported."""

    def anomaly(p):
        M, e = p
        step = lambda E: E - (E - e * jnp.sin(E) - M) / (1 - e * jnp.cos(E))
        going = lambda state: jnp.abs(state[1] - state[0]).max() > 1e-14
        first = step(M)
        start = (M, first, jnp.asarray(0))
        far = lambda state: going(state) & (state[2] < 30)
        return lax.while_loop(far, lambda s: (s[1], step(s[1]), s[2] + 1), start)[1]

    return anomaly, (array(0.4, 2.0), array(0.3, 0.7))


@right()
def a_loop_with_as_many_turns_as_data_say():
    turns = jnp.asarray(7)
    return lambda x: lax.fori_loop(0, turns, lambda _, y: jnp.sin(y) + x, x).sum(), normal(3)


@right()
def a_square_root_by_newton_unrolled():
    def root(x):
        y = 0.5 * (1 + x)
        for _ in range(7):
            y = (y + x / y) / 2
        return y

    return lambda x: root(x).sum(), even(5)


@right()
def a_fixed_point_by_custom_root():
    def solve(x):
        newton = lambda f, y: lax.fori_loop(0, 40, lambda _, y: y - f(y) / (3 * y**2 + 1), y)
        return lax.custom_root(lambda y: y**3 + y - x, x, newton, lambda g, y: y / g(jnp.ones_like(y)))

    return lambda x: solve(x).sum(), even(4)


@right()
def a_linear_solve_of_ones_own():
    A = normal(5, 5) + 4 * jnp.eye(5)

    def f(b):
        solve = lambda _, b: jnp.linalg.solve(A, b)
        back = lambda _, b: jnp.linalg.solve(A.T, b)
        return jnp.sin(lax.custom_linear_solve(lambda x: A @ x, b, solve, back))

    return f, normal(5, seed=1)


@right()
def conjugate_gradients():
    A = normal(5, 5)
    A = A @ A.T + 3 * jnp.eye(5)
    return lambda b: jax.scipy.sparse.linalg.cg(lambda x: A @ x, jnp.sin(b), tol=1e-14)[0], normal(5, seed=1)


@right()
def an_associative_scan():
    combine = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])
    return lambda p: lax.associative_scan(combine, p)[1], (even(9, 0.5, 0.9), normal(9))


@right()
def sinkhorn_iterations():
    def f(cost):
        def step(fg, _):
            f = -0.5 * jax.nn.logsumexp((fg[1] - cost) / 0.5, axis=1)
            g = -0.5 * jax.nn.logsumexp((f[:, None] - cost) / 0.5, axis=0)
            return (f, g), None

        (f, g), _ = lax.scan(step, (jnp.zeros(4), jnp.zeros(4)), length=50)
        return (jnp.exp((f[:, None] + g - cost) / 0.5) * cost).sum()

    return f, jnp.abs(normal(4, 4))


# Choices: sorting, tables, indices, control flow.


@right()
def a_sort():
    return lambda x: jnp.sort(x**3) @ np.arange(8.0), normal(8)


@right()
def the_three_largest():
    return lambda x: lax.top_k(jnp.sin(x), 3)[0], normal(10)


@right()
def a_median():
    return lambda x: jnp.median(x) ** 2 + jnp.quantile(x, 0.8), normal(9)


@right()
def an_interpolation_between_knots():
    table = np.sin(np.arange(10.0))
    return lambda x: jnp.interp(x, np.arange(10.0), table).sum(), array(1.3, 4.7, 8.2)


@right()
def an_image_sampled_between_its_pixels():
    image = normal(6, 6)
    sample = jax.scipy.ndimage.map_coordinates
    return lambda x: sample(image, [x[0], x[1]], order=1), array([1.3, 2.6], [3.4, 0.7])


@right()
def a_running_maximum():
    return lambda x: lax.cummax(x) ** 2, normal(7)


@right()
def max_pooling():
    return (
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID"),
        normal(6, 6),
        FIRST_ORDER,
    )


@right()
def segments_with_repeats():
    ids = np.array([0, 2, 2, 1, 0, 2])
    return lambda x: jnp.sin(jax.ops.segment_sum(x**2, ids, 3)), normal(6)


@right()
def a_branch_of_cond():
    yes, no = lambda x: jnp.sin(x) * x, lambda x: x**2
    return lambda x: lax.cond(x.sum() > 0, yes, no, x).sum(), even(3)


@right()
def a_branch_in_python():
    """Not to be compiled: f looks at its values."""

    def f(x):
        return jnp.sin(x).sum() if x[0] > 0 else (x**2).sum()

    return f, even(3)


@right()
def as_many_terms_as_python_says():
    def f(x):
        y, k = x, 0
        while jnp.abs(y).max() < 50 and k < 12:
            y, k = y * 1.5 + jnp.sin(y), k + 1
        return y.sum()

    return f, array(0.8, 1.3)


@right()
def keyed_dropout():
    mask = lambda x: jax.random.bernoulli(jax.random.key(3), 0.7, x.shape)
    return lambda x: (jnp.tanh(x) * mask(x)).sum(), normal(20)


@right()
def a_reparametrised_sample_in_float32():
    noise = lambda p: jax.random.normal(jax.random.key(0), p["mean"].shape, p["mean"].dtype)
    f = lambda p: ((p["mean"] + jnp.exp(p["log"]) * noise(p)) ** 2).mean()
    return f, {"mean": normal(6, dtype="float32"), "log": normal(6, seed=1, dtype="float32")}, FIRST_ORDER


# Special functions.


@right()
def gamma_functions():
    return lambda x: special.gammaln(x) + special.digamma(x), array(0.01, 0.6, 2.5, 30.0)


@right()
def modified_bessel_functions():
    return lambda x: special.i0e(x) + special.i1(x), array(0.3, 2.0, 7.9)


@right()
def incomplete_beta():
    return lambda x: special.betainc(2.5, 0.7, x), array(0.1, 0.5, 0.95)


@right()
def inverse_error_function_near_one():
    return lambda x: special.erfinv(x).sum(), array(0.999, -0.3, 0.99999)


@right()
def normal_quantiles():
    return lambda p: special.ndtri(p).sum(), array(1e-8, 0.3, 0.999), FIRST_ORDER


@right()
def a_far_tail_of_the_normal_law():
    """To first order: jax's series is short, and its second derivative at -30 off by 1.4e-7."""
    return lambda x: special.log_ndtr(x).sum(), array(-30.0, -5.0, 2.0, 6.0), FIRST_ORDER


@right()
def exponential_integrals():
    return lambda x: special.expi(x) + special.exp1(x), array(0.2, 1.0, 4.0), FIRST_ORDER


@right()
def polygamma_and_zeta():
    return lambda x: special.polygamma(1, x) + special.zeta(x + 1.5, 2.0), array(0.8, 2.0, 5.0), FIRST_ORDER


@right()
def x_log_x_at_zero_weight():
    return lambda y: special.xlogy(array(0.0, 2.0), y).sum(), array(0.5, 3.0)


@right()
def log_of_a_sum_of_exponentials_far_out():
    return lambda x: special.logsumexp(x), array(1e3, 999.0, -1e3)


@right()
def black_scholes():
    cdf = special.ndtr

    def price(p):
        s, k, sigma = p["s"], p["k"], p["sigma"]
        d = (jnp.log(s / k) + sigma**2 / 2) / sigma
        return s * cdf(d) - k * cdf(d - sigma)

    return price, {"s": array(100.0)[0], "k": array(103.0)[0], "sigma": array(0.05)[0]}


# Complex numbers.


@right()
def a_complex_modulus():
    return lambda z: jnp.abs(z**2 + 1).sum(), lax.complex(normal(4), normal(4, seed=1))


@right()
def a_power_spectrum():
    return lambda x: jnp.abs(jnp.fft.rfft(x)) ** 2, normal(12)


@right()
def a_fourier_transform_and_back():
    filtered = lambda z: jnp.fft.ifft(jnp.fft.fft(z) * np.exp(-np.arange(8)))
    return lambda z: jnp.sin(filtered(z)), lax.complex(normal(8), normal(8, seed=1))


@right()
def a_complex_logarithm_near_its_cut():
    return lambda z: jnp.log(z), array(-1 + 1e-3j, 2 - 1j, dtype=complex)


@right()
def a_complex_solve():
    A = lax.complex(normal(3, 3), normal(3, 3, seed=1)) + 3 * jnp.eye(3)
    return lambda z: jnp.linalg.solve(A, jnp.exp(z)), lax.complex(normal(3), normal(3, seed=2))


@right()
def an_orbit_of_mandelbrot():
    orbit = lambda c: lax.scan(lambda z, _: (z * z + c, None), c, length=12)[0]
    return lambda c: jnp.abs(orbit(c)).sum(), array(-0.1 + 0.65j, 0.2 + 0.3j, dtype=complex)


@right()
def a_complex64_function():
    return lambda z: (z * z.conj()).real.sum() + jnp.angle(z).sum(), array(
        1 + 2j, -0.5 + 1j, dtype="complex64"
    )


@right()
def a_wave_of_real_phases():
    return lambda x: jnp.abs(jnp.exp(1j * x * np.arange(1, 4)).sum()) ** 2, array(0.7)


# Rules of one's own that are right.


@right()
def a_pullback_alone():
    cube = pulled(lambda x: x**3, lambda x, u: 3 * x**2 * u)
    return lambda x: jnp.sin(cube(x)).sum(), even(5)


@right()
def a_tangent_alone_to_third_order():
    sine = pushed(jnp.sin, lambda x, v: jnp.cos(x) * v)
    return lambda x: (sine(x) ** 2).sum(), even(4), THIRD_ORDER


@right()
def a_stable_softplus_with_its_own_tangent():
    softplus = pushed(
        lambda x: jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x))), lambda x, v: jax.nn.sigmoid(x) * v
    )
    return lambda x: softplus(x).sum(), array(-30.0, -1.0, 0.5, 40.0)


@right()
def a_linear_call_transposed():
    forward, back = lambda _, x: x - jnp.roll(x, 1), lambda _, u: u - jnp.roll(u, -1)
    return lambda x: linear_call(forward, back, (), jnp.sin(x)), normal(6)


@right()
def a_batching_rule():
    square = custom_vmap(lambda x: x * x)
    square.def_vmap(lambda size, batched, x: (x * x, batched[0]))
    return lambda x: jnp.sin(square(x)).sum(), even(5)


@right()
def one_example_after_the_other():
    total = sequential_vmap(lambda x: jnp.cumsum(x**2))
    return lambda x: total(x), even(5)


@right()
def a_callback_with_a_tangent():
    host = lambda x: jax.pure_callback(np.arctan, x, x, vmap_method="broadcast_all")
    return lambda x: pushed(host, lambda x, v: v / (1 + x**2))(x).sum(), normal(4)


@right()
def a_constant_by_detachment():
    """The maximum that is subtracted cancels, whether it is differentiated or not."""
    shift = lambda x: stop_gradient(x.max())
    return lambda x: jnp.log(jnp.exp(x - shift(x)).sum()) + shift(x), 100 * normal(5)


@right()
def a_clipped_gradient_that_is_not_clipped():
    """Where no entry of the cotangent is near the bound."""
    same = pulled(lambda x: x * 1.0, lambda x, u: jnp.clip(u, -1e12, 1e12))
    return lambda x: jnp.sin(same(x)).sum(), even(4)


# Models, and functions that differentiate or compile themselves.


@right()
def a_module_of_equinox():
    model = eqx.nn.MLP(3, 2, 6, 2, activation=jax.nn.gelu, key=jax.random.key(0))
    data = normal(5, 3)
    return lambda m: eqx.filter_jit(lambda m: (jax.vmap(m)(data) ** 2).mean())(m), model


@right()
def a_deep_network_in_float32():
    layers = normal(30, 16, 16, dtype="float32") / 4, normal(30, 16, seed=1, dtype="float32")
    layer = lambda x, Wb: (jnp.tanh(Wb[0] @ x + 0.1 * Wb[1]), None)
    return lambda x: lax.scan(layer, x, layers)[0], normal(16, seed=2, dtype="float32")


@right()
def attention_in_float32():
    def f(p):
        weights = jax.nn.softmax(p["q"] @ p["k"].T / np.sqrt(8).astype(np.float32))
        return (weights @ p["v"]).sum(1)

    return f, {name: normal(6, 8, seed=i, dtype="float32") for i, name in enumerate("qkv")}


@right()
def layer_norm_in_bfloat16():
    def f(x):
        centred = x - x.mean()
        return centred * lax.rsqrt((centred**2).mean() + 1e-5)

    return f, normal(16, dtype="bfloat16")


@right()
def a_softmax_in_float16():
    return lambda x: jax.nn.softmax(x) @ even(6, dtype="float16"), normal(6, dtype="float16")


@right()
def a_mean_of_a_thousand_in_float16():
    return lambda x: jnp.sin(x).mean(), normal(1000, dtype="float16"), FIRST_ORDER


@right()
def a_product_of_matrices_in_bfloat16_inside_float32():
    W = normal(8, 8, dtype="bfloat16")
    f = lambda x: jnp.tanh((W @ x.astype(jnp.bfloat16)).astype(jnp.float32)).sum()
    return f, normal(8, seed=1, dtype="float32"), FIRST_ORDER


@right()
def leaves_of_two_precisions():
    f = lambda p: (p["a"] ** 3).sum() + jnp.sin(p["b"]).sum()
    return f, {"a": even(4, dtype="float32"), "b": even(4, dtype="float64")}


@right()
def a_convolution_in_float32():
    image, kernel = normal(1, 1, 8, 8, dtype="float32"), normal(2, 1, 3, 3, seed=1, dtype="float32")
    return lambda k: jnp.tanh(lax.conv(image, k, (1, 1), "SAME")).sum(), kernel


@right()
def a_logarithm_of_a_sum_in_float32():
    return lambda x: jax.nn.logsumexp(x), array(1e4, 9999.0, 0.0, dtype="float32")


@right()
def a_checkpointed_network():
    Ws = [normal(6, 6, seed=i) / 2 for i in range(4)]

    @jax.checkpoint
    def block(W, x):
        return jnp.tanh(W @ x)

    def f(x):
        for W in Ws:
            x = block(W, x)
        return x

    return f, normal(6, seed=9)


@right()
def a_gradient_penalty():
    W = normal(5, 3)
    energy = lambda x: jnp.tanh(W @ x).sum()
    return lambda x: (jax.grad(energy)(x) ** 2).sum(), normal(3, seed=1)


@right()
def a_score_matching_loss():
    """A Hessian's trace inside, so that a Hessian of it is of fourth order."""
    W = normal(4, 2)
    energy = lambda x, W: jnp.cos(W @ x).sum()

    def f(W):
        x = array(0.3, -0.4)
        gradient, hessian = jax.grad(energy)(x, W), jax.hessian(energy)(x, W)
        return jnp.trace(hessian) + (gradient**2).sum() / 2

    return f, W


@right()
def mapped_and_compiled_inside():
    inner = jax.jit(jax.vmap(lambda x, y: jnp.sin(x) * y, (0, None)))
    return lambda x: lax.map(lambda y: inner(x, y).sum(), x), normal(4)


@right()
def a_partial_function():
    def f(scale, x):
        return jnp.exp(-scale * x**2).sum()

    return partial(f, 0.3), normal(4)


@right()
def third_order_of_a_rational_function():
    return lambda x: (x / (1 + x**2)).sum() * x[0], even(4), THIRD_ORDER


# One precision alone, or one that f's own constants have: what float64 run there is has to be found.


def only(dtype, f):
    def kernel(x):
        if x.dtype != dtype:
            raise TypeError(f"this kernel takes {dtype}")
        return f(x)

    return kernel


@right()
def a_convolution_in_float32_alone():
    kernel = normal(3, seed=1, dtype=np.float32)
    f = only(np.float32, lambda x: jnp.tanh(jnp.convolve(x, kernel)).sum())
    return f, normal(40, dtype=np.float32)


@right()
def a_recurrent_cell_with_a_carry_in_float32():
    cell = eqx.nn.GRUCell(3, 4, key=jax.random.key(0), dtype=jnp.float32)
    data, start = normal(5, 3, dtype=np.float32), jnp.zeros(4, np.float32)
    return lambda cell: lax.scan(lambda h, x: (cell(x, h), h), start, data)[0].sum(), cell


@right()
def a_determinant_with_a_constant_in_float32():
    f = lambda X: jnp.linalg.slogdet(X @ X.T + 0.01 * jnp.eye(6, dtype=np.float32))[1]
    return f, normal(6, 6, dtype=np.float32)


@right()
def a_staircase_of_rounding_in_float32():
    return lambda x: jnp.sin((1 + x) - 1).sum() * 1e3, array(1e-5, 2e-5, dtype=np.float32)


@right()
def random_numbers_of_the_dtype():
    key = jax.random.key(0)
    return lambda x: jnp.tanh(x + 0.1 * jax.random.normal(key, x.shape, x.dtype)).sum(), normal(
        30, dtype=np.float32
    )


@right()
def an_integer_beside_the_floats():
    return lambda x: {"y": jnp.sin(x), "largest": jnp.argmax(x)}, normal(5)
