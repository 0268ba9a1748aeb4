"""Higher-order derivatives, one vocabulary on JAX and PyTorch.

Differentiate with respect to the first argument after `f`; everything after it is data:

    hvp(f, x, v, *args)                 (∇²ₓ f(x, *args)) v
    hessian(f, x, *args)                ∇²ₓ f
    hessian_diagonal(f, x, *args)       its diagonal
    hessian_operator(f, x, *args)       H @ v, H.matmat(V), H.dense(), H.to_scipy()
    ggn_vp(model, loss, x, v, *args)    Jᵀ (∇² loss) J v
    ggn_operator(model, loss, x, *args)
    jacobian(f, x, *args)               ∂f/∂x
    jacobian_operator(f, x, *args)      J @ v, J.T @ u
    custom_vjp(f), custom_jvp(f)        f with a derivative rule that holds in every mode and nest
    root(residual)(y0, *args)           y with residual(y, *args) = 0, differentiable in args
    fixed_point(step)(y0, *args)        y with step(y, *args) = y
    argmin(objective)(y0, *args)        a minimum of objective(y, *args)
    per_example_grads(loss, params, *batch)   ∇ loss(params, *example) of each example
    per_example_norms(loss, params, *batch)   their norms, without forming them
    clipped_grad(loss, params, *batch, max_norm=1.0)   their sum, clipped one by one
    private_grad(loss, params, *batch, ...)   the same with noise; gradlab.privacy accounts for it
    per_example_statistics, gradient_noise_scale, per_example_gram, per_example_projections, per_example_top_k
    adapt(loss, params, *data)          params after steps of an optimiser, differentiable
    meta_grad(inner, outer, params, tasks)  the gradient after adaptation to each task; maml_grad
    bilevel_grad(inner, outer, meta, params, data)  the gradient in hyperparameters
    optimizers.sgd(rate), .adam, ...    optimisers as pure functions
    odeint(f, y0, ts, *args)            y(ts) of dy/dt = f(t, y, *args), differentiable in y0, ts and args
    flow_log_density(f, x, *args, ts=, log_base=)   log p(x) of a continuous normalizing flow
    steady_state(f, y0, *args)          where dy/dt = f settles, differentiable in args
    functional(model)                   (apply, params) of a torch.nn.Module or an equinox module
    distributed.hvp(f, x, v, *batch)    this and others over a batch sharded across devices and processes
    rules.norm(x), rules.eigh(A), ...   functions with derivatives right where plain formulas' are not

The framework is that of the arguments; `gradlab.jax` and `gradlab.torch` hold the same names bound
to one framework. `gradlab.check` proves a derivative right on your own function, `gradlab.bench`
measures what it costs; `gradlab.interop` takes arrays, functions and weights from one framework to the other.
Importing gradlab imports neither framework.
"""

from importlib import import_module
from typing import Any

from gradlab._errors import (
    BackendError,
    ConvergenceError,
    ConvergenceWarning,
    GradientWarning,
    GradlabError,
    InputError,
    KindError,
    ProcessError,
    StrategyError,
    TooLargeError,
)
from gradlab.transforms.custom_rules import custom_jvp, custom_vjp
from gradlab.transforms.flows import flow_log_density
from gradlab.transforms.gradient_statistics import (
    gradient_noise_scale,
    per_example_gram,
    per_example_projections,
    per_example_statistics,
    per_example_top_k,
)
from gradlab.transforms.hessians import (
    ggn_operator,
    ggn_vp,
    hessian,
    hessian_diagonal,
    hessian_operator,
    hvp,
)
from gradlab.transforms.implicit_functions import argmin, fixed_point, root
from gradlab.transforms.jacobians import jacobian, jacobian_operator
from gradlab.transforms.meta import (
    adapt,
    bilevel_grad,
    bilevel_value_and_grad,
    maml_grad,
    meta_grad,
    meta_value_and_grad,
)
from gradlab.transforms.models import functional
from gradlab.transforms.odes import odeint
from gradlab.transforms.operators import LinearOperator
from gradlab.transforms.per_example import (
    clipped_grad,
    per_example_grads,
    per_example_norms,
    private_grad,
)
from gradlab.transforms.steady_states import steady_state

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "ConvergenceError",
    "ConvergenceWarning",
    "GradientWarning",
    "GradlabError",
    "InputError",
    "KindError",
    "LinearOperator",
    "ProcessError",
    "StrategyError",
    "TooLargeError",
    "adapt",
    "argmin",
    "bilevel_grad",
    "bilevel_value_and_grad",
    "clipped_grad",
    "custom_jvp",
    "custom_vjp",
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
    "per_example_grads",
    "per_example_gram",
    "per_example_norms",
    "per_example_projections",
    "per_example_statistics",
    "per_example_top_k",
    "private_grad",
    "root",
    "steady_state",
]


def __getattr__(name: str) -> Any:
    """The modules of gradlab are imported at their first use."""
    if name in ("bench", "check", "interop", "jax", "torch"):
        return import_module(f"gradlab.{name}")
    if name in ("distributed", "optimizers", "rules"):
        return import_module(f"gradlab.transforms.{name}")
    if name == "privacy":
        return import_module("gradlab.transforms.per_example.privacy")
    raise AttributeError(f"module 'gradlab' has no attribute {name!r}")
