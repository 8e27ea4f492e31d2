"""Outputs over disjoint sets of keys become one by the normalisers of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def merge_shares(first: Array, second: Array) -> tuple[Array, Array, Array]:
    """Return the shares of two outputs in their merger, and its logsumexp, float64.

    With ``l = ln(e^{l1} + e^{l2})`` these are ``e^{l1 - l}`` and ``e^{l2 - l}``, which sum to one;
    zero for a row that neither of them has a normaliser for, -inf.

    Examples
    --------
    >>> one, other, lse = merge_shares(np.array([0.0, -np.inf]), np.array([800.0, -np.inf]))
    >>> one.tolist(), other.tolist(), lse.tolist()
    ([0.0, 0.0], [1.0, 0.0], [800.0, -inf])
    """
    l1, l2 = (np.asarray(x, np.float64) for x in (first, second))
    seen = np.maximum(l1, l2) > -np.inf
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        lse = np.where(seen, np.logaddexp(l1, l2), -np.inf)
        gap = np.where(seen, l2 - l1, 0.0)
        return (
            np.where(seen, 1 / (1 + np.exp(gap)), 0.0),
            np.where(seen, 1 / (1 + np.exp(-gap)), 0.0),
            lse,
        )


def merge_into(out: Array, lse: Array, rows: slice, part: Array, part_lse: Array) -> None:
    """Merge an output over further keys into rows of ``out (n_q, m)``, ``lse (n_q,)`` in place."""
    kept, added, lse[rows] = merge_shares(lse[rows], part_lse)
    out[rows] *= kept[:, None].astype(out.dtype)
    out[rows] += added[:, None].astype(out.dtype) * part


def shares_of(parts: Sequence[tuple[slice, Array]], n_q: int) -> list[Array]:
    """Return the share of each part in the rows that it has, float64; those of a row sum to one.

    ``parts`` are rows and the logsumexp of these over the keys of the part.
    """
    top = np.full(n_q, -np.inf)
    for rows, lse in parts:
        top[rows] = np.maximum(top[rows], lse)
    top[np.isneginf(top)] = 0.0
    with np.errstate(under="ignore"):
        shares = [np.exp(lse - top[rows]) for rows, lse in parts]
    total = np.zeros(n_q)
    for (rows, _), share in zip(parts, shares, strict=True):
        total[rows] += share
    total[total == 0] = 1.0
    return [share / total[rows] for (rows, _), share in zip(parts, shares, strict=True)]
