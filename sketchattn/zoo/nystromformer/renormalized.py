"""A product of three factors whose rows are divided by their sums."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...operators.base import AttentionOperator, Index, pick
from ...operators.factored import FactoredAttention

Array = NDArray[Any]

# Row sums up to here are not divided by: they can be zero or negative.
LEAST_ROW_SUM = 0.1


class RenormalizedAttention(FactoredAttention):
    """Represent ``diag(1/w) U S P``: w is the row sum where it exceeds 0.1, and 1 elsewhere.

    Parameters
    ----------
    u, s, p, effective_rank, remake
        As for `FactoredAttention`; rows of ``p`` sum to one.

    Attributes
    ----------
    sums : ndarray (n_q,)
        Row sums of ``U S P``.
    divisor : ndarray (n_q,)
        ``w``.
    """

    def __init__(
        self,
        u: Array | AttentionOperator,
        s: Array,
        p: Array | AttentionOperator,
        effective_rank: int | None = None,
        *,
        remake: Any = None,
    ) -> None:
        super().__init__(u, s, p, effective_rank, remake=remake)
        self.sums = np.asarray(self.u @ s.sum(axis=1, dtype=np.float64).astype(self.dtype))
        self.divisor = np.where(self.sums > LEAST_ROW_SUM, self.sums, self.dtype.type(1))

    def _matmat(self, x: Array) -> Array:
        return super()._matmat(x) / self.divisor[:, None]

    def _rmatmat(self, y: Array) -> Array:
        return super()._rmatmat(self._cast(y) / self.divisor[:, None])

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        return super().rows(chosen) / self.divisor[chosen, None]
