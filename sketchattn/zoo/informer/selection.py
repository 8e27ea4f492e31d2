"""What the lazy rows cost, and what a choice of rows loses against the best one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...base.arguments import as_array
from ...operators.base import AttentionOperator, Index, pick
from ...operators.sampled import SampledAttention
from ...problem import AttentionProblem
from ..base import check_problem
from .arguments import check_pilots
from .lazy import lazy_errors, lazy_operator, lazy_row

Array = NDArray[Any]


@dataclass(frozen=True)
class SelectionRegret:
    """Say how much error a choice of exact rows leaves, and how much no choice avoids.

    Attributes
    ----------
    residual : float
        ``sum_(i not in I) e_i``, the squared Frobenius error of the output.
    least : float
        The same for the r rows with the largest e_i.
    total : float
        ``sum_i e_i``, that of no exact row at all.
    regret : float
        ``residual - least``, never negative.
    relative : float
        ``regret / total``; 0 where the total is 0.
    rows : int
        r, the number of rows in I.
    """

    residual: float
    least: float
    total: float
    regret: float
    relative: float
    rows: int


def selection_regret(
    problem: AttentionProblem, rows: ArrayLike, *, fill: str = "masked_mean"
) -> SelectionRegret:
    """Return ``R(I) = sum_(i not in I) e_i - min_J sum_(i not in J) e_i`` over as many rows.

    Parameters
    ----------
    problem : AttentionProblem
        With values.
    rows : int array (r,)
        I: distinct queries that are computed exactly; may be empty.
    fill : {"masked_mean", "mean", "cummean", "cumsum"}
        As for `lazy_errors`.

    Returns
    -------
    SelectionRegret

    Raises
    ------
    TypeError, ValueError
        For rows that are repeated, out of range or not integers, and a problem without values.

    Notes
    -----
    An ``O(n_q n_k d)`` reference in float64.  The minimum is that of the Frobenius norm; other
    rows may be better in the spectral norm.  Uniformly random rows have the expected residual
    ``(1 - r / n_q) total``.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> logits = np.log([[1.0, 2, 4], [1, 1, 1], [3, 1, 1]])
    >>> problem = sa.AttentionProblem(logits, np.eye(3), np.arange(1.0, 4)[:, None], scale=1)
    >>> round(selection_regret(problem, [2]).regret, 7)
    0.0236735
    """
    check_problem(problem)
    chosen = check_pilots(as_array(rows, "rows"), problem.n_q, "rows")
    errors = lazy_errors(problem, fill=fill)
    left = np.delete(errors, chosen)
    # Both sums add numbers in ascending order, so that equal sets give equal sums.
    residual = math.fsum(np.sort(left))
    least = math.fsum(np.sort(errors)[: len(left)])
    total = math.fsum(errors)
    regret = residual - least
    return SelectionRegret(
        residual, least, total, regret, regret / total if total else 0.0, len(chosen)
    )


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
