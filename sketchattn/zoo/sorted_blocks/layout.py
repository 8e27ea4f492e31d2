"""Which keys a query reads: blocks of keys sorted by their hashes, and a sample with weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...kernels._threads import product

Array = NDArray[Any]

ORDERS = ("inverse", "forward")
ALIGNMENTS = ("code", "rank")
# A code is one int64.
MOST_PLANES = 62


def hash_codes(x: Array, planes: Array) -> Array:
    """Return ``sum_t [x_i . w_t > 0] 2^t`` for rows ``x (n, d)`` and ``planes (d, P)``, int64."""
    with np.errstate(over="ignore", invalid="ignore"):
        # In float64 for both precisions: the same rows then have the same codes.
        side = product(x.astype(np.float64, copy=False), planes)
    found: Array = (side > 0) @ (np.int64(1) << np.arange(planes.shape[1], dtype=np.int64))
    return found


def gray_positions(codes: Array, order: str) -> Array:
    """Return the positions that codes sort by.

    Parameters
    ----------
    codes : int64 array
        Not negative.
    order : {"inverse", "forward"}
        With ``g(i) = i xor (i >> 1)`` the Gray sequence: "inverse" is ``g^-1(code)``, where codes
        at neighbouring positions differ in one bit; "forward" is ``g(code)``, as released codes
        have it.

    Examples
    --------
    >>> gray_positions(np.arange(8), "inverse").tolist()  # of 0 1 3 2 6 7 5 4
    [0, 1, 3, 2, 7, 6, 4, 5]
    """
    if order == "forward":
        found: Array = codes ^ (codes >> 1)
        return found
    found = codes.copy()
    for shift in (1, 2, 4, 8, 16, 32):
        found ^= found >> shift
    return found


class Blocks(NamedTuple):
    """Hold the blocks of all keys and queries.

    Attributes
    ----------
    sorted_keys : int64 array (n_k,)
        Keys by position, equal ones in their order: block c is ``[c size, (c + 1) size)`` of it.
    keys, queries : int64 arrays (n_k,), (n_q,)
        Block of each.
    size : int
        Keys of a block; the last one may hold fewer.
    """

    sorted_keys: Array
    keys: Array
    queries: Array
    size: int

    @property
    def number(self) -> int:
        """Number of blocks."""
        return -(-len(self.sorted_keys) // self.size)


def sort_blocks(q: Array, k: Array, planes: Array, size: int, *, order: str, align: str) -> Blocks:
    """Sort keys by the positions of their codes, cut them into blocks, and find those of queries.

    Parameters
    ----------
    q, k : ndarray (n_q, d), (n_k, d)
    planes : ndarray (d, P)
        Without planes keys and queries stay in their order, aligned by rank.
    size : int
        Keys of a block, at least 1.
    order : {"inverse", "forward"}
        See `gray_positions`.
    align : {"code", "rank"}
        "rank": the query of rank t among n_q, sorted like the keys, is in block
        ``floor(t blocks / n_q)``.  "code": in the block of the middle of the place that its own
        code has among those of the keys, whatever the other queries are.
    """
    n_q, n_k, width = len(q), len(k), planes.shape[1]
    codes = hash_codes(q, planes), hash_codes(k, planes)
    at_q, at_k = (gray_positions(x, order) for x in codes)
    if width <= 16:  # NumPy sorts short integers by their digits
        at_q, at_k = at_q.astype(np.uint16), at_k.astype(np.uint16)
    sorted_keys = np.argsort(at_k, kind="stable")
    keys, count = np.empty(n_k, np.int64), -(-n_k // size)
    keys[sorted_keys] = np.arange(n_k) // size
    if align == "rank" or not width:
        queries = np.empty(n_q, np.int64)
        queries[np.argsort(at_q, kind="stable")] = np.arange(n_q) * count // max(n_q, 1)
    else:
        places = at_k[sorted_keys]
        ends = [np.searchsorted(places, at_q, side) for side in ("left", "right")]
        queries = np.minimum((ends[0] + ends[1]) // 2 // size, count - 1)
    return Blocks(sorted_keys, keys, queries, size)


class Sample(NamedTuple):
    """Hold distinct keys, ascending, with the sums of ``1/(s p_j)`` over their draws."""

    columns: Array
    weights: Array


def weighted_sample(uniforms: Array, p: Array | None, n_k: int) -> Sample:
    """Draw keys with replacement by numbers from [0, 1).

    Parameters
    ----------
    uniforms : float64 array (s,)
        Each draws the first j with ``p_0 + ... + p_j > u``.
    p : float64 array (n_k,), optional
        Sums to one; None is uniform, where that is ``floor(u n_k)``.
    n_k : int
    """
    if p is None:
        drawn = np.minimum((uniforms * n_k).astype(np.int64), n_k - 1)
        weights = np.full(len(drawn), n_k / max(len(drawn), 1))
    else:
        # Sums end at one up to rounding: nothing is drawn beyond the last key that can be.
        last = int(np.flatnonzero(p)[-1])
        drawn = np.minimum(np.searchsorted(np.cumsum(p), uniforms, side="right"), last)
        weights = 1 / (len(drawn) * p[drawn])
    columns, which = np.unique(drawn, return_inverse=True)
    return Sample(columns, np.bincount(which.reshape(-1), weights, len(columns)))
