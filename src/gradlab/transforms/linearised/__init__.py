"""A function linearised at a point, once, to be applied many times.

`linearise` gives the outputs of a function of leaves and its two linear maps: `push` (J v) and
`pull` (Jᵀ u), each also for many stacked directions. With `gradient=True` the function is the
gradient of a scalar function, so that J is its Hessian. `_jax.py` uses jax.linearize; `_torch.py`
uses a kept autograd graph, or torch.func where a transform or the compiler is at work.
"""
