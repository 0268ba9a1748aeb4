"""gradlab's operations bound to jax: jax arrays, equinox modules, and numpy arrays and Python numbers too."""

from gradlab.transforms.custom_rules._jax import custom_jvp, custom_vjp
from gradlab.transforms.distributed import _jax as distributed
from gradlab.transforms.flows._jax import flow_log_density
from gradlab.transforms.gradient_statistics._jax import (
    gradient_noise_scale,
    per_example_gram,
    per_example_projections,
    per_example_statistics,
    per_example_top_k,
)
from gradlab.transforms.hessians._jax import (
    ggn_operator,
    ggn_vp,
    hessian,
    hessian_diagonal,
    hessian_operator,
    hvp,
)
from gradlab.transforms.implicit_functions._jax import argmin, fixed_point, root
from gradlab.transforms.jacobians._jax import jacobian, jacobian_operator
from gradlab.transforms.meta._jax import (
    adapt,
    bilevel_grad,
    bilevel_value_and_grad,
    maml_grad,
    meta_grad,
    meta_value_and_grad,
)
from gradlab.transforms.models._jax import functional
from gradlab.transforms.odes._jax import odeint
from gradlab.transforms.optimizers import _jax as optimizers
from gradlab.transforms.per_example._jax import (
    clipped_grad,
    per_example_grads,
    per_example_norms,
    private_grad,
)
from gradlab.transforms.rules import _jax as rules
from gradlab.transforms.steady_states._jax import steady_state

__all__ = [
    "adapt",
    "argmin",
    "bilevel_grad",
    "bilevel_value_and_grad",
    "clipped_grad",
    "custom_jvp",
    "custom_vjp",
    "distributed",
    "fixed_point",
    "flow_log_density",
    "functional",
    "ggn_operator",
    "ggn_vp",
    "gradient_noise_scale",
    "hessian",
    "hessian_diagonal",
    "hessian_operator",
    "hvp",
    "jacobian",
    "jacobian_operator",
    "maml_grad",
    "meta_grad",
    "meta_value_and_grad",
    "odeint",
    "optimizers",
    "per_example_grads",
    "per_example_gram",
    "per_example_norms",
    "per_example_projections",
    "per_example_statistics",
    "per_example_top_k",
    "private_grad",
    "root",
    "rules",
    "steady_state",
]
