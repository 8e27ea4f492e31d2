"""Rows whose logits are too large for one normaliser: each is a softmax of its own, in float64.

``exp(L_ij - lse_i)`` is off by the rounding of ``lse_i``, a relative error of ``u |lse_i|``, and by
that of ``L_ij`` where two products form it in two orders of summation, ``d u |q_i| |k_j| scale``.
Both grow with the logits.  Where they matter a row is formed whole, always in the same tile, and
divided by its own sum: products with rows and with columns then see one matrix, whose rows sum to
one whatever the size of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import check_logits, largest
from ..base.head import Head
from ..kernels._threads import product

Array = NDArray[Any]

# Bound of a row's logits above which it is steep: neighbours in float32 are 2^-11 apart there.
STEEP = 4096.0
# Rows of a tile.  A row is computed in its own tile only: with others BLAS could round otherwise.
TILE = 64


def norms_of(x: Array) -> Array:
    """Return the Euclidean norms of rows, float64; no square overflows or underflows."""
    wide = x.astype(np.float64, copy=False)
    top = np.abs(wide).max(axis=1, initial=0.0)
    shares = wide / np.where(top > 0, top, 1)[:, None]
    norms: Array = top * np.sqrt(np.einsum("ij,ij->i", shares, shares))
    return norms


def steep_rows(problem: Head) -> Array:
    """Return the rows, ascending, with ``|scale| |q_i| max_j |k_j| > STEEP``, j over visible keys.

    Keys that a row does not see do not decide how it is computed.
    """

    def find() -> Array:
        if _reach(problem) <= STEEP / 2:
            return np.zeros(0, np.int64)
        return np.flatnonzero(_bounds(problem) > STEEP)

    return problem.cached("steep_rows", find)


def check_overflow(problem: Head) -> None:
    """Refuse visible logits beyond the precision of the problem, in base 2 as kernels hold them.

    An approximation that meets one cannot tell it from a key that is hidden.
    """
    most = float(np.finfo(problem.dtype).max) / 2

    def check() -> bool:
        if _reach(problem) <= STEEP:
            return True
        rows = np.flatnonzero(~(_bounds(problem) <= most))
        for positions, logits in tiles_of(problem, rows):
            wrong = ((np.abs(logits) > most) & problem.visible(rows[positions])).any(axis=1)
            if wrong.any():
                _refuse(problem, rows[positions][wrong])
        return True

    problem.cached("overflow", check)


def _refuse(problem: Head, rows: Array) -> None:
    lse = np.zeros(problem.n_q, problem.dtype)
    lse[rows] = np.nan
    check_logits(lse)


def extent_of(problem: Head) -> tuple[float, float]:
    """Return bounds of the entries of q and k, which are the largest ones or above; NaN at NaN."""
    return problem.cached("extent", lambda: (largest(problem.q), largest(problem.k)))


def _reach(problem: Head) -> float:
    """Return ``|scale| d max |q| max |k|``, all keys, which no logit exceeds; NaN where one is."""
    most_q, most_k = extent_of(problem)
    return abs(problem.scale) * problem.d * most_q * most_k


def is_harmless(scale: float, d: int, most_q: float, most_k: float) -> bool:
    """Say whether no row can be steep, by the largest entries of q and k."""
    return abs(scale) * d * most_q * most_k <= STEEP / 2


def _bounds(problem: Head) -> Array:
    """Return ``|scale| |q_i| max_j |k_j|`` of all rows, j over visible keys, float64."""

    def find() -> Array:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            keys = norms_of(problem.k)
            if problem.key_mask is not None:
                keys = np.where(problem.key_mask, keys, 0)
            if problem.causal:
                reach = np.maximum.accumulate(np.concatenate([[0.0], keys]))
                last = np.arange(problem.n_q) + problem.offset + 1
                largest = reach[np.clip(last, 0, problem.n_k)]
            else:
                largest = np.full(problem.n_q, keys.max(initial=0.0))
            # 0 times a norm that overflowed is NaN, and above nothing: such logits are 0.
            bounds: Array = np.abs(problem.scale) * norms_of(problem.q) * largest
            return bounds

    return problem.cached("bounds", find)


def is_steep(problem: Head) -> bool:
    """Say whether a problem has steep rows."""
    return len(steep_rows(problem)) > 0


def tiles_of(problem: Head, rows: Array) -> Iterator[tuple[Array, Array]]:
    """Yield positions in ``rows`` and the logits of these rows, float64, -inf where hidden.

    Raises ValueError for a row that sees keys and whose largest logit overflows the precision of
    the problem.
    """
    if not len(rows):  # the usual case, for which nothing is converted
        return
    wide = problem.astype(np.float64)
    q, k = wide.arrays.q, wide.arrays.k
    hidden = bool(problem.causal) or problem.key_mask is not None
    most = float(np.finfo(problem.dtype).max)
    tile = rows // TILE
    order = np.argsort(tile, kind="stable")
    starts = np.flatnonzero(np.diff(tile[order], prepend=-1))
    for positions in np.split(order, starts[1:]):
        first = int(tile[positions[0]]) * TILE
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            logits = product(problem.scale * q[first : first + TILE], k.T)
        logits = logits[rows[positions] - first]
        seen = problem.visible_counts()[rows[positions]] > 0
        if hidden:
            np.copyto(logits, -np.inf, where=~problem.visible(rows[positions]))
        with np.errstate(invalid="ignore"):
            top = logits.max(axis=1, initial=-np.inf)
            wrong = seen & ~(np.abs(top) <= most)
        if wrong.any():
            _refuse(problem, rows[positions][wrong])
        yield positions, logits


def softmax_tiles(problem: Head, rows: Array) -> Iterator[tuple[Array, Array, Array]]:
    """Yield positions in ``rows``, these rows of A, and their logsumexp, all float64."""
    for positions, logits in tiles_of(problem, rows):
        top = logits.max(axis=1, initial=-np.inf)
        seen = top > -np.inf
        logits -= np.where(seen, top, 0)[:, None]
        with np.errstate(under="ignore", divide="ignore"):
            weights = np.exp(logits, out=logits)
            total = weights.sum(axis=1)
            weights /= np.where(seen, total, 1)[:, None]
            lse = np.where(seen, top + np.log(total), -np.inf)
        yield positions, weights, lse
