"""Matrices that somebody else made, dense or as any linear operator."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from ..base.arguments import as_array, check_finite, float_dtype
from ..base.head import Head
from ..kernels._threads import product
from .base import AttentionOperator, Index, pick, working_precision

Array = NDArray[Any]


class DenseAttention(AttentionOperator):
    """Represent a matrix that is held as an array, for instance somebody else's ``Ahat``.

    Parameters
    ----------
    matrix : ndarray (n_q, n_k)
    """

    def __init__(self, matrix: Array) -> None:
        super().__init__(matrix.shape, working_precision(matrix))
        self.matrix = np.ascontiguousarray(matrix, self.dtype)

    def reads(self, problem: Head) -> Array:
        """Return how many keys each row sees: an array says nothing about how it was made."""
        return problem.visible_counts().astype(np.float64)

    def _matmat(self, x: Array) -> Array:
        return np.asarray(product(self.matrix, self._cast(x)))

    def _rmatmat(self, y: Array) -> Array:
        return np.asarray(product(self.matrix.T, self._cast(y)))

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        return self.matrix[pick(self.shape[0], index)]


class WrappedAttention(AttentionOperator):
    """Give a foreign ``LinearOperator`` the interface of an attention operator.

    Parameters
    ----------
    operator : scipy.sparse.linalg.LinearOperator (n_q, n_k)
    """

    def __init__(self, operator: Any) -> None:
        dtype = np.float32 if operator.dtype == np.float32 else np.float64
        super().__init__(operator.shape, dtype)
        self.operator = operator

    def wide(self) -> AttentionOperator:
        """Return itself: how the products are computed is not known."""
        return self

    def _matmat(self, x: Array) -> Array:
        return np.asarray(self.operator @ self._cast(x), self.dtype)

    def _rmatmat(self, y: Array) -> Array:
        return np.asarray(self.operator.T @ self._cast(y), self.dtype)


def as_operator(ahat: object, problem: Head) -> AttentionOperator:
    """Return ``ahat`` as an attention operator of the shape of a problem.

    Parameters
    ----------
    ahat : AttentionOperator, LinearOperator, or array (n_q, n_k)
    problem : AttentionProblem

    Raises
    ------
    TypeError, ValueError
        If it is none of these, or of another shape, not real, not finite, or an operator without
        its transposed product.
    """
    if isinstance(ahat, AttentionOperator):
        operator = ahat
    elif isinstance(ahat, LinearOperator):
        if np.issubdtype(ahat.dtype, np.complexfloating):
            raise TypeError(f"ahat must be real, got {ahat.dtype}; pass its real part")
        operator = WrappedAttention(ahat)
    else:
        matrix = as_array(ahat, "ahat")
        if matrix.ndim != 2:
            raise ValueError(
                f"ahat must be a matrix of shape ({problem.n_q}, {problem.n_k}), "
                f"got shape {matrix.shape}; a report is about one head"
            )
        float_dtype(matrix, "ahat")
        check_finite(matrix, "ahat")
        operator = DenseAttention(matrix)
    if operator.shape != (problem.n_q, problem.n_k):
        raise ValueError(
            f"ahat must have the shape ({problem.n_q}, {problem.n_k}) of the problem, "
            f"got {operator.shape}; approximate the same problem"
        )
    if isinstance(operator, WrappedAttention):
        try:
            operator.T @ np.zeros(problem.n_q)
        except (TypeError, NotImplementedError) as error:
            raise TypeError(
                f"ahat must have its transposed product, got {type(ahat).__name__} whose rmatvec "
                f"fails ({error}); define rmatvec or pass an array"
            ) from error
    return operator
