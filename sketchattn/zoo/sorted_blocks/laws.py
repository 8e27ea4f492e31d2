"""Probabilities of the keys in a sample."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...operators.steep import norms_of
from ...problem import AttentionProblem

Array = NDArray[Any]

LAWS = ("uniform", "value", "kde_released", "oracle")


def square_shares(norms: Array) -> Array:
    """Return ``norms^2/sum norms^2``, uniform where all are zero; no square overflows."""
    top = norms.max(initial=0.0)
    with np.errstate(under="ignore"):
        squares = (norms / top) ** 2 if top > 0 else np.ones(len(norms))
        found: Array = squares / squares.sum()
    return found


def key_probabilities(problem: AttentionProblem, law: str) -> Array | None:
    """Return p (n_k,) in float64 of a problem without a mask; None is uniform.

    Parameters
    ----------
    problem : AttentionProblem
    law : {"uniform", "value", "kde_released", "oracle"}
        "value": ``|v_j|^2/(2 |V|_F^2) + 1/(2 n_k)``.  "kde_released": proportional to ``|v_j|/s +
        1/n_k`` with a one beside every value and s the largest eigenvalue of ``V^T V`` (exact,
        where the released code takes twenty steps from a random vector).  "oracle":
        ``|A e_j|^2/(2 |A|_F^2) + |v_j|^2/(2 |V|_F^2)``, of all of A: an oracle.
    """
    if law == "uniform":
        return None
    values = problem.values.astype(np.float64, copy=False)
    n_k = len(values)
    if law == "kde_released":
        wide = np.hstack([values, np.ones((n_k, 1))])
        norms = norms_of(wide)
        top = norms.max()
        with np.errstate(under="ignore"):
            largest = np.linalg.norm(wide / top, 2) ** 2 * top
            p = norms / top / largest + 1 / n_k
        found: Array = p / p.sum()
        return found
    p = 0.5 * square_shares(norms_of(values))
    if law == "value":
        return p + 0.5 / n_k
    return p + 0.5 * square_shares(problem.astype(np.float64).exact.column_norms())
