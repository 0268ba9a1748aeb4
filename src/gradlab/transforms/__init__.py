"""One folder a topic: `__init__.py` is the contract, `_jax.py` and `_torch.py` implement it."""
