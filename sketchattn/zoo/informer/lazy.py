"""Lazy rows: what stands for the queries that are not computed, and what it costs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import check_name
from ...operators.sampled import SampledAttention
from ...problem import AttentionProblem
from ..base import check_problem

Array = NDArray[Any]
FILLS = ("mean", "masked_mean", "cummean", "cumsum")
# Fills that end where the sight of a causal row ends.
CAUSAL_FILLS = FILLS[1:]
RUNNING_FILLS = FILLS[2:]


def fill_weights(problem: AttentionProblem, fill: str) -> Array:
    """Return the weight of each key that a lazy row sees, in float64 (n_q,)."""
    if fill == "cumsum":
        return np.ones(problem.n_q)
    counts = problem.visible_counts()
    return np.where(counts > 0, 1.0 / np.maximum(counts, 1), 0.0)


def lazy_operator(problem: AttentionProblem, fill: str, dtype: Any) -> SampledAttention:
    """Return the matrix whose rows are all lazy."""
    return SampledAttention(
        np.empty(0, np.int64),
        np.empty((problem.n_q, 0), dtype),
        problem.n_k,
        0,
        fill=fill_weights(problem, fill).astype(dtype),
        keys=None if problem.key_mask is None else problem.key_mask.copy(),
        offset=problem.offset if problem.causal else None,
    )


def lazy_row(fill: Array, keys: Array | None, x: Array) -> Array:
    """Return the lazy row of a product with ``x (n_k, m)`` where no problem is causal, (m,).

    Then lazy rows differ by nothing but zero for rows without a key: one mean serves them all.
    """
    kept = x if keys is None else x[keys]
    total = kept.sum(axis=0, dtype=np.float64)
    return np.asarray(float(fill.max(initial=0.0)) * total)


def check_fill(problem: AttentionProblem, fill: str) -> None:
    """Refuse a fill that a problem has no use for."""
    if fill in RUNNING_FILLS and not problem.causal:
        raise ValueError(
            f"fill must be 'mean' or 'masked_mean' for a problem that is not causal, got {fill!r}; "
            f"running sums follow a causal mask"
        )
    if fill == "mean" and problem.causal:
        raise ValueError(
            f"fill must end where a row's sight ends for a causal problem, got {fill!r}; "
            f"use 'cummean'"
        )
    if fill == "cumsum" and (problem.key_mask is not None or problem.n_q != problem.n_k):
        raise ValueError(
            "fill must be 'cummean' with a key_mask or n_q != n_k, got 'cumsum'; the released code "
            "has neither"
        )


def lazy_errors(problem: AttentionProblem, *, fill: str = "masked_mean") -> Array:
    """Return ``e_i = |A_i V - fill_i|^2``, float64 (n_q,): what an exact row i would save.

    Parameters
    ----------
    problem : AttentionProblem
        With values; computed in float64, ``O(n_q n_k d)``.
    fill : {"masked_mean", "mean", "cummean", "cumsum"}
        What a lazy row gets; see `Informer`.  "masked_mean" fits every problem.

    Returns
    -------
    ndarray (n_q,)
        ``sum_(i not in I) e_i = |A V - Ahat V|_F^2`` for every set I of exact rows.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> logits = np.log([[1.0, 2, 4], [1, 1, 1], [3, 1, 1]])
    >>> problem = sa.AttentionProblem(logits, np.eye(3), np.arange(1.0, 4)[:, None], scale=1)
    >>> lazy_errors(problem).round(7).tolist()
    [0.1836735, 0.0, 0.16]
    """
    check_problem(problem)
    check_name(fill, "fill", FILLS)
    check_fill(problem, fill)
    _ = problem.values
    wide = problem.astype(np.float64)
    difference = wide.output - lazy_operator(wide, fill, np.float64) @ wide.values
    return np.asarray(np.einsum("ic,ic->i", difference, difference))
