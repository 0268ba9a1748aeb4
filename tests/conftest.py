"""Fixtures: each test that asks for `fw` runs once a framework, and is skipped where one is absent."""

import importlib.util
import os

import pytest

from frameworks import FRAMEWORKS, load


def pytest_configure(config):
    # What XLA has compiled is kept, between workers and processes that a test starts, and for the next run.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.rootpath / ".pytest_cache" / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if importlib.util.find_spec("jax") is not None:
        import jax

        jax.config.update("jax_enable_x64", True)  # closed forms are compared in float64


# Tests that mostly wait, for a compiler above all; nearly all have siblings that stay in `make test`.
LONGER = (
    "test_check.py::test_float32_convolution_over_float32_data",
    "test_check_claims.py::test_complex_functions[jax-False]",
    "test_check_claims.py::test_complex_functions[jax-True]",
    "test_check_claims.py::test_third_order[jax]",
    "test_comparison.py::test_both_frameworks_learn_the_same[decoder]",
    "test_compile.py::test_inductor_gauss_newton_and_jacobian",
    "test_compile.py::test_inductor_many_directions",
    "test_corpus.py::test_a_right_derivative_is_not_accused[jax-a_log_likelihood_of_a_gaussian_process]",
    "test_corpus.py::test_a_right_derivative_is_not_accused[jax-a_softmax_in_float16]",
    "test_corpus.py::test_a_right_derivative_is_not_accused[jax-a_sum_that_is_always_one]",
    "test_corpus.py::test_a_right_derivative_is_not_accused[jax-an_orbit_of_mandelbrot]",
    "test_corpus.py::test_a_right_derivative_is_not_accused[jax-at_a_knot_of_an_interpolation]",
    "test_corpus.py::test_a_right_derivative_is_not_accused[jax-conjugate_gradients]",
    "test_corpus.py::test_a_right_derivative_is_not_accused[jax-gamma_functions]",
    "test_corpus.py::test_a_right_derivative_is_not_accused[jax-random_numbers_of_the_dtype]",
    "test_corpus.py::test_a_wrong_derivative_is_blamed[jax-cholesky_that_does_not_halve_the_diagonal]",
    "test_corpus.py::test_a_wrong_derivative_is_blamed[torch-fixed_point_through_its_last_step]",
    "test_custom_rules.py::test_a_wrong_cell_is_seen[jax]",
    "test_custom_rules.py::test_every_cell[jax-0]",
    "test_custom_rules.py::test_every_cell[jax-4]",
    "test_custom_rules.py::test_every_cell[torch-4]",
    "test_explore.py::test_the_point_is_a_tree_like_x",
    "test_facade.py::test_the_test_of_purity_can_fail",
    "test_flows.py::test_a_network_s_parameters_are_reached[jax]",
    "test_flows.py::test_densities_and_their_derivatives[jax]",
    "test_flows.py::test_the_estimate_of_all_directions_is_the_trace[jax]",
    "test_implicit.py::test_a_shared_parameter_under_vmap[jax]",
    "test_implicit.py::test_a_tolerance_is_honoured[jax]",
    "test_implicit.py::test_a_wrong_cell_is_seen[jax]",
    "test_implicit.py::test_an_unconverged_linear_solve_is_an_error[jax-gmres]",
    "test_implicit.py::test_kepler[jax]",
    "test_implicit.py::test_solvers_of_ones_own[jax]",
    "test_independence.py::test_batch_norm_of_torch",
    "test_independence.py::test_jax_models",
    "test_independence.py::test_larger_batches_of_every_size[jax]",
    "test_interop.py::test_the_checker_passes[as_torch]",
    "test_interop_weights.py::test_the_same_function[conv net]",
    "test_interop_weights.py::test_the_same_function[decoder]",
    "test_models.py::test_against_differences[jax]",
    "test_models.py::test_against_differences[torch]",
    "test_models.py::test_an_equinox_module_is_a_point",
    "test_models.py::test_every_operation_on_a_real_model[jax]",
    "test_models.py::test_tied_weights_and_training_statistics",
    "test_odes.py::test_a_float32_state_with_float64_times[jax]",
    "test_odes.py::test_backwards_in_time[jax]",
    "test_odes.py::test_closures[jax]",
    "test_odes.py::test_examples_have_steps_of_their_own[jax]",
    "test_odes.py::test_fixed_steps_are_those_of_diffrax[bosh3]",
    "test_odes.py::test_fixed_steps_are_those_of_diffrax[dopri8]",
    "test_odes.py::test_fixed_steps_are_those_of_diffrax[euler]",
    "test_odes.py::test_fixed_steps_are_those_of_diffrax[midpoint]",
    "test_odes.py::test_fixed_steps_are_those_of_diffrax[rk4]",
    "test_odes.py::test_nests_in_torch[grad of vmap]",
    "test_odes.py::test_nests_in_torch[jacfwd of jacfwd]",
    "test_odes.py::test_trees_and_stats[jax]",
    "test_odes.py::test_what_does_not_finish[jax]",
    "test_odes_adjoints.py::test_a_solve_of_jax_holds_no_room_for_all_its_steps",
    "test_odes_adjoints.py::test_a_state_that_does_not_come_back[jax]",
    "test_odes_adjoints.py::test_fixed_steps_of_jax_hold_no_room_for_more",
    "test_odes_adjoints.py::test_implicit_steps[direct-kvaerno5-jax]",
    "test_odes_adjoints.py::test_implicit_steps[direct-kvaerno5-torch]",
    "test_odes_adjoints.py::test_matrix[jax-backsolve-grad]",
    "test_odes_adjoints.py::test_more_steps_than_a_segment_of_jax",
    "test_odes_compiled.py::test_compiled_steps_that_are_recorded[midpoint]",
    "test_odes_compiled.py::test_sixteen_bits_within_an_equation[True]",
    "test_odes_stiff.py::test_error_of_a_gradient[jax-",
    "test_odes_stiff.py::test_error_of_a_gradient[torch-robertson-rodas5p-0.0001]",
    "test_odes_stiff.py::test_every_example_by_itself_in_torch[kvaerno5]",
    "test_odes_stiff.py::test_every_example_by_itself_in_torch[rodas5p]",
    "test_per_example.py::test_equal_to_a_loop[jax]",
    "test_per_example_edges.py::test_a_mask_leaves_examples_out[jax]",
    "test_per_example_edges.py::test_an_infinite_example_does_not_poison_the_sum[jax-nan]",
    "test_per_example_edges.py::test_differentiated_again[jax]",
    "test_per_example_edges.py::test_mapped_and_compiled[jax]",
    "test_per_example_edges.py::test_projections[jax]",
    "test_per_example_edges.py::test_statistics[jax]",
    "test_per_example_twins.py::test_jax_and_torch_agree[transformer]",
    "test_private_grad.py::test_one_example_moves_the_sum_by_at_most_the_bound[jax-flat]",
    "test_pytest_plugin.py::test_an_absent_framework_is_skipped[torch-jax]",
    "test_rules.py::test_at_zero_the_norm_and_the_root_are_flat[jax]",
    "test_rules.py::test_batches_of_matrices[jax]",
    "test_rules.py::test_clipping_is_of_the_whole_tree[jax]",
    "test_rules.py::test_eigh_at_equal_eigenvalues[jax]",
    "test_rules.py::test_eigh_of_hermitian_matrices[jax]",
    "test_rules.py::test_estimate_of_small_matrices_and_of_nothing[jax]",
    "test_rules.py::test_estimate_refuses[jax]",
    "test_rules.py::test_every_mode_to_second_order[jax-eigh]",
    "test_rules.py::test_every_mode_to_second_order[jax-log1mexp]",
    "test_rules.py::test_every_mode_to_second_order[jax-logdet]",
    "test_rules.py::test_every_mode_to_second_order[jax-logsumexp]",
    "test_rules.py::test_every_mode_to_second_order[jax-matrix_function, degenerate]",
    "test_rules.py::test_every_mode_to_second_order[jax-norm of rows]",
    "test_rules.py::test_every_mode_to_second_order[jax-norm]",
    "test_rules.py::test_expm_of_large_norm[jax]",
    "test_rules.py::test_log1mexp_at_both_ends[jax]",
    "test_rules.py::test_logdet_of_orthogonal_probes_is_exact[jax]",
    "test_rules.py::test_logdet_of_random_probes_is_unbiased[jax]",
    "test_rules.py::test_logsumexp_of_nothing_is_flat[jax]",
    "test_rules.py::test_matrix_function_of_hermitian_matrices[jax]",
    "test_steady_states.py::test_a_tree_reaches_the_state_that_it_leads_to[jax]",
    "test_steady_states.py::test_derivatives_of_every_mode[jax]",
    "test_unusual_functions.py::test_custom_vjp_of_jax",
    "test_verify.py::test_differences_alone_see_a_wrong_result[jax]",
    "test_verify.py::test_right_operations_pass[jax]",
    "test_verify.py::test_wrong_results_fail[jax-not a number]",
    "test_verify.py::test_wrong_results_fail[jax-one entry]",
    "test_verify.py::test_wrong_results_fail[jax-sign]",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if any(test in item.nodeid for test in LONGER):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=FRAMEWORKS)
def fw(request):
    """One framework under the names that both have: arrays, transforms, gradlab's namespace."""
    return load(request.param)
