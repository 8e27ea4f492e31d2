"""Rows with keys of their own, or, where a row has none, all that it sees alike."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.head import Head
from .base import Index, pick
from .sparse import SparseAttention
from .visible_mean import VisibleMean

Array = NDArray[Any]


class SparseOrMean(SparseAttention):
    """Represent ``Ahat`` by weights on the keys of each row; a row without any is uniform.

    Parameters
    ----------
    problem : AttentionProblem
        Gives the visible sets.
    starts, columns, weights, effective_rank
        As of `SparseAttention`.

    Attributes
    ----------
    empty_rows : int
        Rows that see keys and have none of their own.
    """

    def __init__(
        self,
        problem: Head,
        starts: Array,
        columns: Array,
        weights: Array,
        effective_rank: int | None = None,
    ) -> None:
        super().__init__(starts, columns, weights, problem.n_k, effective_rank)
        self.empty = np.flatnonzero((np.diff(starts) == 0) & (problem.visible_counts() > 0))
        self.mean = VisibleMean(problem)

    @property
    def empty_rows(self) -> int:
        """Rows that see keys and have none of their own."""
        return len(self.empty)

    def reads(self, problem: Head) -> Array:
        """Return how many keys each row has; the mean of all counts as one."""
        found = super().reads(problem)
        found[self.empty] = 1
        return found

    def wide(self) -> SparseOrMean:
        """Return the operator whose products are computed in float64 from the same arrays."""
        twin = super().wide()
        assert isinstance(twin, SparseOrMean)  # a copy of this one
        if twin is not self:
            mean = self.mean.wide()
            assert isinstance(mean, VisibleMean)
            twin.mean = mean
        return twin

    def _matmat(self, x: Array) -> Array:
        out = super()._matmat(x)
        if len(self.empty):
            out[self.empty] = self.mean._matmat(x)[self.empty]
        return out

    def _rmatmat(self, y: Array) -> Array:
        out = super()._rmatmat(y)
        if len(self.empty):
            rest = np.zeros_like(self._cast(y))
            rest[self.empty] = self._cast(y)[self.empty]
            out = out + self.mean._rmatmat(rest)
        return out

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        out = super().rows(chosen)
        fill = np.isin(chosen, self.empty)
        if fill.any():
            out[fill] = self.mean.rows(chosen[fill])
        return out
