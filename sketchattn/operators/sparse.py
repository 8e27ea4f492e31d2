"""Matrices whose rows have keys of their own, as many as they like."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.head import Head
from .base import AttentionOperator, Index, pick, working_precision

Array = NDArray[Any]


class SparseAttention(AttentionOperator):
    """Represent ``Ahat`` by weights on the keys of each row, zero elsewhere.

    ``Ahat_ij = weights_t`` for ``j = columns_t`` with t in ``starts_i ... starts_{i+1} - 1``.

    Parameters
    ----------
    starts : int array (n_q + 1,)
        Where the keys of each row start, from 0 to ``len(columns)``, not decreasing.
    columns : int array (t,)
        Keys of all rows one after the other, in 0..n_k - 1, distinct in each row.
    weights : ndarray (t,)
        Entries of ``Ahat``.
    n_k : int
        Number of keys.
    effective_rank : int, optional
        Budget used.

    Raises
    ------
    ValueError
        For shapes that do not belong together, and keys that are repeated or out of range.

    Notes
    -----
    A product with m columns costs ``O(t m)``.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> a = sa.SparseAttention(np.array([0, 1, 3]), np.array([2, 0, 1]), np.array([1, 0.5, 0.5]), 3)
    >>> a.to_dense().tolist()
    [[0.0, 0.0, 1.0], [0.5, 0.5, 0.0]]
    """

    def __init__(
        self,
        starts: Array,
        columns: Array,
        weights: Array,
        n_k: int,
        effective_rank: int | None = None,
    ) -> None:
        if columns.shape != weights.shape or columns.ndim != 1:
            raise ValueError(
                f"columns must have the shape (t,) of weights, got {columns.shape} and "
                f"{weights.shape}; give a weight for each key"
            )
        lengths = np.diff(starts)
        if len(starts) == 0 or starts[0] != 0 or starts[-1] != len(columns) or (lengths < 0).any():
            raise ValueError(
                f"starts must rise from 0 to len(columns) = {len(columns)}, got "
                f"{np.asarray(starts)[:4]}...; give where the keys of each row start"
            )
        outside = len(columns) > 0 and (columns.min() < 0 or columns.max() >= n_k)
        if outside or _repeated(columns, lengths, n_k):
            raise ValueError(
                f"columns must be distinct in each row and in 0..n_k - 1 = {n_k - 1}, got keys "
                f"from {columns.min()} to {columns.max()}; add the weights of equal keys"
            )
        super().__init__((len(lengths), n_k), working_precision(weights), effective_rank)
        self.starts = starts
        self.chosen = columns
        self.weights = weights.astype(self.dtype, copy=False)

    def reads(self, problem: Head) -> Array:
        """Return how many keys each row has."""
        return np.diff(self.starts).astype(np.float64)

    def _sparse(self) -> Any:
        from scipy.sparse import csr_array

        return csr_array((self.weights, self.chosen, self.starts), shape=self.shape)

    def _matmat(self, x: Array) -> Array:
        return np.asarray(self._sparse() @ self._cast(x))

    def _rmatmat(self, y: Array) -> Array:
        return np.asarray(self._sparse().T @ self._cast(y))

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        return np.asarray(self._sparse()[pick(self.shape[0], index)].toarray())


def _repeated(columns: Array, lengths: Array, n_k: int) -> bool:
    """Say whether a row holds a column twice, for rows of these lengths one after the other."""
    entries = np.repeat(np.arange(len(lengths)), lengths) * max(n_k, 1) + columns
    size = len(lengths) * n_k
    if size <= 16 * len(entries):  # as good as a sorted list, in less time
        hit = np.zeros(size, bool)
        hit[entries] = True
        return int(np.count_nonzero(hit)) < len(entries)
    entries.sort()
    return bool((np.diff(entries) == 0).any())
