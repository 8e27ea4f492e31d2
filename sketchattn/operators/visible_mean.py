"""The mean of the values that each row sees."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.head import Head
from .base import AttentionOperator, Index, pick

Array = NDArray[Any]


class VisibleMean(AttentionOperator):
    """Represent ``Ahat_ij = 1 / (number of keys that row i sees)`` by prefix sums.

    Parameters
    ----------
    problem : AttentionProblem
        Gives the visible sets; rows that see no key are zero.
    """

    def __init__(self, problem: Head) -> None:
        super().__init__((problem.n_q, problem.n_k), problem.dtype)
        keep = np.ones(problem.n_k, bool) if problem.key_mask is None else problem.key_mask
        last = np.arange(problem.n_q) + problem.offset
        self.keep = keep
        self.end = np.clip(last + 1, 0, problem.n_k) if problem.causal else None
        counts = problem.visible_counts()
        self.inverse = np.where(counts > 0, 1.0 / np.maximum(counts, 1), 0.0)

    @property
    def rank_bound(self) -> int:
        """One without a causal mask."""
        return 1 if self.end is None else min(self.shape)

    def reads(self, problem: Head) -> Array:
        """Return one, the mean, for each row that sees a key."""
        return (problem.visible_counts() > 0).astype(np.float64)

    def _matmat(self, x: Array) -> Array:
        # Prefix sums in float64: float32 would lose a digit for every tenfold length.
        kept = np.where(self.keep[:, None], self._cast(x), 0).astype(np.float64)
        if self.end is None:
            sums = np.broadcast_to(kept.sum(axis=0), (self.shape[0], kept.shape[1]))
        else:
            prefix = np.concatenate([np.zeros((1, kept.shape[1])), np.cumsum(kept, axis=0)])
            sums = prefix[self.end]
        means: Array = (self.inverse[:, None] * sums).astype(self.dtype)
        return means

    def _rmatmat(self, y: Array) -> Array:
        scaled = self.inverse[:, None] * self._cast(y).astype(np.float64)
        if self.end is None:
            sums = np.broadcast_to(scaled.sum(axis=0), (self.shape[1], scaled.shape[1]))
        else:
            # Key j is seen by the rows whose end lies beyond it; ends ascend.
            suffix = np.zeros((scaled.shape[0] + 1, scaled.shape[1]))
            suffix[:-1] = np.cumsum(scaled[::-1], axis=0)[::-1]
            sums = suffix[np.searchsorted(self.end, np.arange(self.shape[1]), side="right")]
        return np.where(self.keep[:, None], sums, 0).astype(self.dtype)

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        seen = np.broadcast_to(self.keep, (len(chosen), self.shape[1]))
        if self.end is not None:
            seen = seen & (np.arange(self.shape[1]) < self.end[chosen][:, None])
        return np.where(seen, self.inverse[chosen][:, None], 0).astype(self.dtype)
