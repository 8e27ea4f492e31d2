"""The exact matrix ``A = rowsoftmax(scale Q K^T)`` by streaming products."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.head import Head
from ..kernels._threads import blas_single_thread, product
from .base import AttentionOperator, Index, pick
from .solve import row_softmax, solution, solve

Array = NDArray[Any]


class SoftmaxAttention(AttentionOperator):
    """Represent the exact matrix ``A = rowsoftmax(scale Q K^T)`` by streaming products.

    Parameters
    ----------
    problem : AttentionProblem
        Its masks hold: hidden entries are zero, a row that sees no key is zero.

    Notes
    -----
    ``A X`` is an online softmax over tiles of keys, ``A^T Y`` a second pass with the stored
    row normalisers; both cost ``O(n_q n_k (d + m))`` and memory ``O(n_q + n_k)`` beside the
    result.  Norms are computed in float64.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> a = sa.AttentionProblem(np.eye(3), np.eye(3), np.eye(3)).exact
    >>> bool(np.allclose(a.row_sums(), 1))
    True
    """

    path = "exact"

    def __init__(self, problem: Head) -> None:
        super().__init__((problem.n_q, problem.n_k), problem.dtype)
        self.problem = problem

    @property
    def nbytes(self) -> int:
        """Bytes of the queries and keys."""
        return self.problem.arrays.q.nbytes + self.problem.arrays.k.nbytes

    def _matmat(self, x: Array) -> Array:
        return solve(self.problem, self._cast(x))[0]

    def _rmatmat(self, y: Array) -> Array:
        return self._transposed(self._cast(y), 1)

    def wide(self) -> AttentionOperator:
        """Return itself: in float64 it would be another matrix, without this one's rounding."""
        return self

    def _transposed(self, y: Array, power: int) -> Array:
        """Return ``B^T Y`` with ``B_ij = A_ij^power``: logits and normalisers times ``power``."""
        from ..kernels.softmax import transposed_product

        problem = self.problem
        mask = problem.key_mask
        return transposed_product(
            problem.arrays.q,
            problem.arrays.k,
            y,
            power * solution(problem)[1],
            scale=power * problem.scale,
            first=problem.offset,
            right=0 if problem.causal else None,
            key_mask=None if mask is None else mask[None].copy(),
        )

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        problem = self.problem
        chosen = pick(problem.n_q, index)
        logits = self._logits(problem.q[chosen], problem.k)
        if problem.causal or problem.key_mask is not None:
            np.copyto(logits, -np.inf, where=~problem.visible(chosen))
        return row_softmax(logits)

    def columns(self, index: Index) -> Array:
        """Return chosen columns as a dense array (n_q, len(index))."""
        problem = self.problem
        chosen = pick(problem.n_k, index)
        logits = self._logits(problem.q, problem.k[chosen])
        lse = solution(problem)[1]
        logits -= np.where(np.isfinite(lse), lse, 0)[:, None]
        # Hidden logits may lie far above the normaliser: out before they overflow.
        if problem.key_mask is not None:
            logits[:, ~problem.key_mask[chosen]] = -np.inf
        if problem.causal:
            last = np.arange(problem.n_q) + problem.offset
            logits[chosen[None, :] > last[:, None]] = -np.inf
        weights: Array = np.exp(logits, out=logits)
        return weights

    def _logits(self, q: Array, k: Array) -> Array:
        logits: Array = product(self.dtype.type(self.problem.scale) * q, k.T)
        return logits

    def row_norms(self) -> Array:
        """Return the Euclidean norms of the rows, float64 (n_q,).

        ``|A_i|^2 = exp(lse(2 L_i) - 2 lse(L_i))``.
        """
        wide = self.problem.astype(np.float64)
        lse = solution(wide)[1]
        doubled = self.problem.cached("doubled", lambda: solve(wide, None, 2.0)[1])
        seen = np.isfinite(lse)
        norms = np.zeros(len(lse))
        norms[seen] = np.exp(0.5 * doubled[seen] - lse[seen])
        return norms

    def column_norms(self) -> Array:
        """Return the Euclidean norms of the columns, float64 (n_k,)."""
        wide = exact_of(self.problem.astype(np.float64))
        return np.sqrt(wide._transposed(np.ones((self.shape[0], 1)), 2)[:, 0])

    def column_sums(self) -> Array:
        """Return ``A^T 1`` (n_k,): how much attention each key receives."""
        return self._rmatvec(np.ones(self.shape[0], self.dtype))

    @blas_single_thread()
    def frobenius_norm(self) -> float:
        """Return ``|A|_F`` in float64."""
        return float(np.linalg.norm(self.row_norms()))


def exact_of(problem: Head) -> SoftmaxAttention:
    """Return the exact matrix of a problem, the same object each time."""
    return problem.cached("exact", lambda: SoftmaxAttention(problem))
