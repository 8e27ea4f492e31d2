"""The causal estimator: prefix sums over the keys carry the features to each row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.head import Head
from ...operators.base import AttentionOperator

Array = NDArray[Any]


class PrefixAttention(AttentionOperator):
    """Represent ``Ahat_ij = sum_l U_il exp(N_jl - a_(e_i)l)`` over keys up to e_i by prefix sums.

    Parameters
    ----------
    t : ndarray (n_q, R)
        ``omega_l . x_i``.
    n : ndarray (n_k, R)
        ``omega_l . y_j - |y_j|^2 / 2``.
    keep : bool ndarray (n_k,)
    offset : int
        Query i sees the keys ``j <= i + offset``.
    effective_rank : int
    remake : callable
        Returns the same operator in float64.

    Notes
    -----
    Holds U (n_q, R) and the steps ``beta_jl = exp(N_jl - a_jl)`` (n_k, R), both in [0, 1]; a
    product carries one state (R, m) through the tokens.  Rows do not read what lies behind them.
    """

    def __init__(
        self, t: Array, n: Array, keep: Array, offset: int, effective_rank: int, remake: Any
    ) -> None:
        from ...kernels.features import prefix_factors

        super().__init__((len(t), len(n)), t.dtype, effective_rank)
        self.u, self.beta = prefix_factors(t, n, keep, offset)
        self.offset = offset
        self._remake = remake

    def reads(self, problem: Head) -> Array:
        """Return the number of features, R, for each row."""
        return np.full(self.shape[0], float(self.u.shape[1]))

    def wide(self) -> AttentionOperator:
        """Return the same estimator of the same problem and draw in float64."""
        made: AttentionOperator = self._remake()
        return made

    def _matmat(self, x: Array) -> Array:
        from ...kernels.features import prefix_product

        return prefix_product(self.u, self.beta, self.offset, self._cast(x))

    def _rmatmat(self, y: Array) -> Array:
        from ...kernels.features import prefix_transposed

        return prefix_transposed(self.u, self.beta, self.offset, self._cast(y))
