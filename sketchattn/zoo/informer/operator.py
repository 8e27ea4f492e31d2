"""The matrix of an Informer without a causal mask: exact rows, and one row for all others."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.head import Head
from ...operators.base import AttentionOperator, Index, pick
from ...operators.sampled import SampledAttention
from ...problem import AttentionProblem
from .lazy import lazy_operator, lazy_row

Array = NDArray[Any]


class InformerAttention(SampledAttention):
    """Represent ``Ahat`` with exact rows that are streamed, and uniform weights elsewhere.

    A `SampledAttention` without columns whose replaced rows are never held: a product is one pass
    of exact attention for these queries.  For problems that are not causal.

    Parameters
    ----------
    problem : AttentionProblem
    rows : int64 array (r,)
        I, ascending.

    Attributes
    ----------
    replaced : int64 array (r,)
        I.
    """

    def __init__(self, problem: AttentionProblem, rows: Array) -> None:
        lazy = lazy_operator(problem, "mean", problem.dtype)
        super().__init__(
            lazy.chosen, lazy.weights, problem.n_k, len(rows), fill=lazy.fill, keys=lazy.keys
        )
        self.replaced = rows
        q, k, _ = problem.arrays
        if problem.key_mask is None:
            self.active = AttentionProblem.adopt(q[rows], k, scale=problem.scale)
        else:
            self.active = AttentionProblem(
                q[rows], k, scale=problem.scale, key_mask=problem.key_mask
            )

    @property
    def rank_bound(self) -> int:
        """Exact rows and the uniform one, at most."""
        return int(min(*self.shape, self.active.n_q + 1))

    @property
    def nbytes(self) -> int:
        """Bytes of the fill, of the exact rows' queries, and of the keys."""
        return super().nbytes + self.active.exact.nbytes

    def reads(self, problem: Head) -> Array:
        """Return all keys for the exact rows, and one, the mean, for all others."""
        seen = problem.visible_counts()
        found = (seen > 0).astype(np.float64)
        found[self.replaced] = seen[self.replaced]
        return found

    def wide(self) -> AttentionOperator:
        """Return the same estimator of the same problem and draw in float64."""
        twin = super().wide()
        if twin is not self and isinstance(twin, InformerAttention):
            twin.active = self.active.astype(np.float64)
        return twin

    def _matmat(self, x: Array) -> Array:
        x = self._cast(x)
        product = np.empty((self.shape[0], x.shape[1]), self.dtype)
        product[:] = lazy_row(np.asarray(self.fill), self.keys, x)
        if self.active.n_q:
            product[self.replaced] = self.active.exact @ x
        return product

    def _rmatmat(self, y: Array) -> Array:
        y = self._cast(y)
        out = super()._rmatmat(y)
        if self.active.n_q:
            out += np.asarray(self.active.exact.T @ y[self.replaced])
        return out

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        place = np.full(self.shape[0], -1)
        place[self.replaced] = np.arange(self.active.n_q)
        exact = place[chosen]
        keys = np.ones(self.shape[1], bool) if self.keys is None else self.keys
        out = np.where(keys, np.asarray(self.fill)[chosen][:, None], self.dtype.type(0))
        if (exact >= 0).any():
            out[exact >= 0] = self.active.exact.rows(exact[exact >= 0])
        return out
