"""The exact matrix ``A = rowsoftmax(scale Q K^T)`` by streaming products."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.head import Head
from ..kernels._threads import blas_single_thread, product
from .base import AttentionOperator, Index, pick
from .solve import normalizer, row_softmax, solve
from .steep import is_steep, softmax_tiles, steep_rows

Array = NDArray[Any]

# Logits that are held in float64 at a time where rows are asked for.
_ENTRIES = 1 << 22


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
    result.  ``A^T Y``, entries and norms are computed in float64 and rounded once; so are rows
    whose logits may exceed 4096 in size, in every product: the exponential of a logit less a
    normaliser has the relative error that these have absolutely.

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

    def reads(self, problem: Head) -> Array:
        """Return how many keys each row sees: all of them are read."""
        return self.problem.visible_counts().astype(np.float64)

    def _matmat(self, x: Array) -> Array:
        return solve(self.problem, self._cast(x))[0]

    def _rmatmat(self, y: Array) -> Array:
        out = self._transposed(np.ascontiguousarray(y, np.float64), 1)
        return out.astype(self.dtype, copy=False)

    def wide(self) -> AttentionOperator:
        """Return itself: in float64 it would be another matrix, without this one's rounding."""
        return self

    def _transposed(self, y: Array, power: int) -> Array:
        """Return ``B^T Y``, float64, with ``B_ij = A_ij^power`` and Y float64.

        Logits and normalisers times ``power``.
        """
        from ..kernels.softmax import transposed_product

        problem = self.problem
        if is_steep(problem):
            out = np.zeros((problem.n_k, y.shape[1]))
            for positions, weights, _ in softmax_tiles(problem, np.arange(problem.n_q)):
                out += product((weights**power).T, y[positions])
            return out
        mask = problem.key_mask
        q, k, _ = problem.astype(np.float64).arrays
        return transposed_product(
            q,
            k,
            np.require(y, requirements=["C", "W", "A"]),
            power * normalizer(problem),
            scale=power * problem.scale,
            first=problem.offset,
            right=0 if problem.causal else None,
            key_mask=None if mask is None else mask[None].copy(),
        )

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        problem = self.problem
        chosen = pick(problem.n_q, index)
        out = np.empty((len(chosen), problem.n_k), self.dtype)
        if is_steep(problem):
            for positions, weights, _ in softmax_tiles(problem, chosen):
                out[positions] = weights
            return out
        q, k, _ = problem.astype(np.float64).arrays
        step = max(1, _ENTRIES // max(problem.n_k, 1))
        for start in range(0, len(chosen), step):
            part = chosen[start : start + step]
            logits = product(problem.scale * q[part], k.T)
            if problem.causal or problem.key_mask is not None:
                np.copyto(logits, -np.inf, where=~problem.visible(part))
            out[start : start + step] = row_softmax(logits)
        return out

    def columns(self, index: Index) -> Array:
        """Return chosen columns as a dense array (n_q, len(index))."""
        problem = self.problem
        chosen = pick(problem.n_k, index)
        if is_steep(problem):
            out = np.empty((problem.n_q, len(chosen)), self.dtype)
            for positions, weights, _ in softmax_tiles(problem, np.arange(problem.n_q)):
                out[positions] = weights[:, chosen]
            return out
        q, k, _ = problem.astype(np.float64).arrays
        logits: Array = product(problem.scale * q, k[chosen].T)
        lse = normalizer(problem)
        logits -= np.where(np.isfinite(lse), lse, 0)[:, None]
        # Hidden logits may lie far above the normaliser: out before they overflow.
        if problem.key_mask is not None:
            logits[:, ~problem.key_mask[chosen]] = -np.inf
        if problem.causal:
            last = np.arange(problem.n_q) + problem.offset
            logits[chosen[None, :] > last[:, None]] = -np.inf
        np.exp(logits, out=logits)
        return logits.astype(self.dtype, copy=False)

    def row_norms(self) -> Array:
        """Return the Euclidean norms of the rows, float64 (n_q,).

        ``|A_i|^2 = exp(lse(2 L_i) - 2 lse(L_i))``.
        """
        wide = self.problem.astype(np.float64)
        lse = normalizer(self.problem)
        doubled = self.problem.cached("doubled", lambda: solve(wide, None, 2.0)[1])
        seen = np.isfinite(lse)
        steep = steep_rows(wide)
        seen[steep] = False
        norms = np.zeros(len(lse))
        norms[seen] = np.exp(0.5 * doubled[seen] - lse[seen])
        for positions, weights, _ in softmax_tiles(wide, steep):
            norms[steep[positions]] = np.linalg.norm(weights, axis=1)
        return norms

    def column_norms(self) -> Array:
        """Return the Euclidean norms of the columns, float64 (n_k,)."""
        return np.sqrt(self._transposed(np.ones((self.shape[0], 1)), 2)[:, 0])

    def column_sums(self) -> Array:
        """Return ``A^T 1`` (n_k,): how much attention each key receives."""
        return self._rmatvec(np.ones(self.shape[0], self.dtype))

    @blas_single_thread()
    def frobenius_norm(self) -> float:
        """Return ``|A|_F`` in float64."""
        return float(np.linalg.norm(self.row_norms()))


def entries(problem: Head, columns: Array) -> Array:
    """Return ``A_ij`` for the columns j of each row, int (n_q, t), none hidden; float64."""
    if is_steep(problem):
        made = np.empty(columns.shape)
        for positions, rows, _ in softmax_tiles(problem, np.arange(problem.n_q)):
            made[positions] = np.take_along_axis(rows, columns[positions], axis=1)
        return made
    q, k, _ = problem.astype(np.float64).arrays
    logits = product(k[columns], (problem.scale * q)[:, :, None])[:, :, 0]
    weights: Array = np.exp(logits - normalizer(problem)[:, None])
    return weights


def exact_of(problem: Head) -> SoftmaxAttention:
    """Return the exact matrix of a problem, the same object each time."""
    return problem.cached("exact", lambda: SoftmaxAttention(problem))
