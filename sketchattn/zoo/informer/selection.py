"""What the lazy rows cost, and what a choice of rows loses against the best one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...base.arguments import as_array
from ...base.floating import without_floating_errors
from ...problem import AttentionProblem
from ..base import check_problem
from .arguments import check_pilots
from .lazy import lazy_errors

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


@without_floating_errors
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
