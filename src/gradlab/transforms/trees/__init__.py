"""Trees split into the leaves that are differentiated and the rest, which is held constant.

Every operation differentiates with respect to the float arrays of one tree. `Tree` knows which
leaves those are, puts them back beside the constants to call the user's function, shapes results
(None stands where a leaf was held constant), reads directions given as a tree or as one flat
vector, and names the leaf when they do not fit. `_jax.py` and `_torch.py` hold the same class.
"""
