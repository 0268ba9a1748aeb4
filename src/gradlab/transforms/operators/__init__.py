"""The linear operator that `hessian_operator`, `jacobian_operator` and `ggn_operator` return."""

from __future__ import annotations

import os
from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING, Any

from gradlab._errors import InputError, TooLargeError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

__all__ = ["LinearOperator"]


class LinearOperator:
    """A matrix known by its products, linearised once and applied many times.

    A direction is a tree like the operator's domain or one flat vector over all its float leaves
    (in the framework's own leaf order); the result has the same form. Where a leaf of the domain is
    held constant, its place in a direction is ignored and its place in a result is None.

    Attributes:
        shape: `(m, n)`: the number of float entries of the codomain and of the domain.
        dtype: dtype of the flat matrix, the framework's own.
        T: the transposed operator.
        aux: what the function returned beside its value, with `has_aux=True`; else None.

    Example:
        >>> import jax.numpy as jnp
        >>> from gradlab import hessian_operator
        >>> H = hessian_operator(lambda x: jnp.sum(x**3), jnp.array([1.0, 2.0]))
        >>> H.shape
        (2, 2)
        >>> H @ jnp.array([1.0, 1.0])
        Array([ 6., 12.], dtype=float32)
    """

    # Spaces and maps are the framework's: `Tree`s, and functions of lists of leaves.
    def __init__(
        self,
        domain: Any,
        codomain: Any,
        apply: Callable[[Any], Any],
        apply_many: Callable[[Any, int | None], Any],
        transposed: Callable[[LinearOperator], LinearOperator],
        *,
        chunk_size: int | None = None,
        aux: Any = None,
    ):
        self.shape = (codomain.size, domain.size)
        self.dtype = domain.dtype
        self.aux = aux
        self._domain, self._codomain = domain, codomain
        self._apply, self._apply_many = apply, apply_many
        self._transposed, self._chunk_size = transposed, chunk_size

    @property
    def T(self) -> LinearOperator:
        """The transposed operator; a symmetric operator is its own."""
        return self._transposed(self)

    def __matmul__(self, v: Any) -> Any:
        return self.matvec(v)

    def matvec(self, v: Any) -> Any:
        """The product with one direction, `op @ v`: a tree like the domain, or a flat vector of length n.

        Under torch.compile write `op.matvec(v)`: torch traces `@` for its own tensors alone.
        """
        leaves, shaped = self._domain.read(v)
        return shaped(self._codomain, self._apply(leaves))

    def matmat(self, V: Any) -> Any:
        """The products with k directions stacked on one leading axis: a tree, or an array (k, n).

        Returns:
            The k products, stacked on a leading axis in the same form: a tree, or an array (k, m).

        Cost:
            k products; at most `chunk_size` of them at a time, which bounds the memory to that many
            times the memory of one.
        """
        leaves, shaped = self._domain.read(V, name="V", batch=True)
        return shaped(self._codomain, self._apply_many(leaves, self._chunk_size))

    def dense(self) -> Any:
        """The matrix, an array of shape (m, n) over the flat vectors: min(m, n) products.

        Raises:
            TooLargeError: the matrix cannot fit in the device's memory; nothing has been computed.
        """
        check_fits("dense", self.shape, self._domain)
        m, n = self.shape
        op = self if n <= m else self.T
        chunk = self._chunk_size or min(op.shape[1], DIRECTIONS)
        if 0 in self.shape:
            return self._domain.zeros(self.shape)
        rows = [
            op._codomain.ravel(op._apply_many(op._domain.basis(i, min(i + chunk, op.shape[1])), None))
            for i in range(0, op.shape[1], chunk)
        ]
        matrix = self._domain.stack(rows)
        return matrix.T if op is self else matrix

    def to_scipy(self) -> ScipyOperator:
        """The operator for scipy.sparse.linalg (cg, eigsh, ...): numpy vectors in and out.

        SciPy's convention holds there: `matmat` takes and gives columns, shape (n, k).
        """
        import numpy as np  # here: `import gradlab` stays below 0.1 s without either
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        def product(op: LinearOperator, v: Any) -> Any:
            flat = op._domain.from_numpy(np.asarray(v).reshape(-1))
            leaves = op._apply(op._domain.split(flat))
            return op._domain.to_numpy(op._codomain.ravel(leaves))

        def products(op: LinearOperator, V: Any) -> Any:
            flat = op._domain.from_numpy(np.asarray(V).T)
            leaves = op._apply_many(op._domain.split(flat), op._chunk_size)
            return op._domain.to_numpy(op._codomain.ravel(leaves)).T

        return ScipyOperator(
            self.shape,
            matvec=lambda v: product(self, v),
            rmatvec=lambda u: product(self.T, u),
            matmat=lambda V: products(self, V),
            rmatmat=lambda U: products(self.T, U),
            dtype=self._domain.numpy_dtype,
        )

    def __repr__(self) -> str:
        return f"LinearOperator(shape={self.shape}, dtype={self.dtype})"


# Directions at once where the caller set no chunk_size (measured: docs/decisions.md).
DIRECTIONS = 256
PUSHES = 1024  # of a Jacobian in forward mode, which keeps nothing of a direction

# Bytes of memory of this machine; 2^63 where the system does not say.
HOST_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**63


def check_fits(op: str, shape: tuple[int, int], tree: Any) -> None:
    """Refuse, before any work, a dense matrix larger than the memory of the device."""
    size = shape[0] * shape[1] * tree.dtype.itemsize
    memory = tree.memory() or HOST_MEMORY
    if size > memory:
        raise TooLargeError(
            f"{op}: the dense {shape[0]} x {shape[1]} matrix needs {size / 2**30:.1f} GiB, the device has "
            f"{memory / 2**30:.1f} GiB; use the operator's products (hvp, hessian_operator, "
            "jacobian_operator) instead"
        )


def check_chunk_size(op: str, chunk_size: int | None) -> None:
    """A chunk size is None or a positive integer."""
    if chunk_size is None:
        return
    if not isinstance(chunk_size, Integral) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise InputError(f"{op}: chunk_size is {chunk_size!r}; pass a positive integer or None")
