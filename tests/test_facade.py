"""The façade: pure import, dispatch, one framework alone, equal signatures on both sides."""

HEAVY = ["jax", "jaxlib", "torch", "equinox", "diffrax", "optax", "matplotlib", "numpy", "scipy"]
TOPICS = [
    "custom_rules",
    "gradient_statistics",
    "hessians",
    "implicit_functions",
    "jacobians",
    "meta",
    "models",
    "optimizers",
    "per_example",
    "rules",
]
LIBRARIES = ["optimizers", "rules"]  # namespaces of their own
