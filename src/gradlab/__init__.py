"""Higher-order derivatives, one vocabulary on JAX and PyTorch."""
