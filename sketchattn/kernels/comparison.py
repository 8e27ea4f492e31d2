"""A against an approximation: sums over rows, and the singular value of the difference.

Logits and weights are those of ``softmax``, in base 2; all arrays are float64 but the
approximation, which may be float32.  Of each row four sums are wanted: ``sum_j A_ij^2``,
``sum_j (A_ij - B_ij)^2``, ``sum_j |A_ij - B_ij|`` and ``sum_j A_ij log(A_ij / B_ij)``, infinite
where ``B_ij <= 0 < A_ij``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import add_product, by_precision, kernel, take
from ._threads import PRODUCT, deal
from .softmax import (
    KEY_TILE,
    LN2,
    LOG2E,
    UNBOUNDED,
    _hide,
    _scale_rows,
    exp2,
    row_maximum,
)

Array = NDArray[Any]

# Rows of an item of dense matrices, and entries of a row that stay in the first cache with theirs.
DENSE_ROWS, DENSE_TILE = 64, 1024
# Logits of an item of rows that are kept between its two passes: 4 MB.
HELD = 1 << 19


# --- one row ----------------------------------------------------------------------------------


def log2(x: Any) -> Any:
    """Return the base-2 logarithm of ``x > 0`` in float64."""
    return np.log2(x)


def _log2_float64(x: Any) -> Any:
    # x = m 2^e with m in [1/sqrt 2, sqrt 2), and log m = 2 artanh(t) with t = (m - 1)/(m + 1):
    # |t| <= 0.1716, so that the first term left out is below 2e-17 of the sum.
    tiny = x < 2.2250738585072014e-308
    y = np.float64(x * 1.8014398509481984e16 if tiny else x)  # 2^54
    bits = y.view(np.int64)
    e = (bits >> np.int64(52)) - np.int64(1023)
    m = np.int64((bits & np.int64(0x000FFFFFFFFFFFFF)) | np.int64(0x3FF0000000000000)).view(
        np.float64
    )
    high = m > 1.4142135623730951
    m = np.float64(0.5 * m if high else m)
    t = (m - 1.0) / (m + 1.0)
    z = t * t
    p = 1.0 / 21.0
    p = p * z + 1.0 / 19.0
    p = p * z + 1.0 / 17.0
    p = p * z + 1.0 / 15.0
    p = p * z + 1.0 / 13.0
    p = p * z + 1.0 / 11.0
    p = p * z + 1.0 / 9.0
    p = p * z + 1.0 / 7.0
    p = p * z + 1.0 / 5.0
    p = p * z + 1.0 / 3.0
    p = p * z + 1.0
    # The exponent goes through int32, which AVX2 converts to double.
    whole = np.float64(np.int32(e)) + (1.0 if high else 0.0) - (54.0 if tiny else 0.0)
    return whole + (2.0 * LOG2E) * t * p


log2 = by_precision(log2, float32=_log2_float64, float64=_log2_float64)


@kernel()
def _add_sums(exact: Array, logs: Array, other: Array, out: Array) -> None:
    """Add the four sums of a piece of a row to ``out (4,)``.

    ``exact``, ``logs = log2(exact)`` wherever that is not zero, ``other``, all of one length.
    Passes that do little each, so that all of them are vectorised.
    """
    square = 0.0
    difference = 0.0
    absolute = 0.0
    missing = 0
    for j in range(exact.size):
        a = exact[j]
        x = np.float64(other[j])
        square += a * a
        difference += (a - x) * (a - x)
        absolute += abs(a - x)
    out[0] += square
    out[1] += difference
    out[2] += absolute
    if out[3] == np.inf:
        return
    for j in range(exact.size):
        missing += 1 if (other[j] <= 0.0 and exact[j] > 0.0) else 0
    if missing > 0:
        out[3] = np.inf
        return
    divergence = 0.0
    for j in range(exact.size):
        a = exact[j]
        # Where A is zero the term is zero, whatever the logarithms are.
        t = 0.0 if a == 0.0 else logs[j]
        x = np.float64(1.0 if a == 0.0 else other[j])
        divergence += a * (t - log2(x))
    out[3] += divergence * LN2


# --- dense matrices ---------------------------------------------------------------------------


@kernel(dealt=True)
def compare_dense(turn: Array, exact: Array, other: Array, difference: Array, out: Array) -> None:
    """Compare the rows of two matrices (b, n_k) that are held; ``difference = B - A``.

    ``out (b, 4)``.  In the divergence entries of A below the normal range count as zero, as they
    do where A is made by a kernel.
    """
    rows, n_k = exact.shape
    items = (rows + DENSE_ROWS - 1) // DENSE_ROWS
    weights = np.empty(DENSE_TILE, np.float64)
    logs = np.empty(DENSE_TILE, np.float64)
    for _ in range(items):
        item = take(turn)
        if item >= items:
            break
        for i in range(item * DENSE_ROWS, min((item + 1) * DENSE_ROWS, rows)):
            out[i] = 0.0
            for j0 in range(0, n_k, DENSE_TILE):
                cols = min(DENSE_TILE, n_k - j0)
                a = exact[i, j0 : j0 + cols]
                b = other[i, j0 : j0 + cols]
                for j in range(cols):
                    difference[i, j0 + j] = b[j] - a[j]
                    normal = a[j] >= 2.2250738585072014e-308
                    weights[j] = a[j] if normal else 0.0
                    logs[j] = log2(np.float64(a[j] if normal else 1.0))
                _add_sums(weights[:cols], logs[:cols], b, out[i])


@kernel(dealt=True)
def gram_times(turn: Array, x: Array, v: Array, parts: Array) -> None:
    """``parts[t] = X_t^T X_t v`` for the tiles X_t of rows of ``x (m, n)``; ``v (n,)``.

    ``parts (tiles, n)``: their sum is ``X^T X v``.  X is read once.
    """
    m, n = x.shape
    tiles = parts.shape[0]
    rows = (m + tiles - 1) // tiles
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        part = parts[item]
        part[:] = 0.0
        for i in range(item * rows, min((item + 1) * rows, m)):
            s = 0.0
            for j in range(n):
                s += x[i, j] * v[j]
            for j in range(n):
                part[j] += s * x[i, j]


# --- A in tiles -------------------------------------------------------------------------------


@kernel(dealt=True)
def compare(
    turn: Array,
    q: Array,
    k: Array,
    v: Array,
    other: Array,
    i0: int,
    scale: float,
    right: int,
    first: int,
    keys: Array,
    row_tile: int,
    key_tile: int,
    known: bool,
    lse: Array,
    product: Array,
    out: Array,
) -> None:
    """Compare rows ``i0 ... i0 + b`` of A with ``other (b, n_k)``, and find ``A V`` beside it.

    ``q (n_q, d)``, ``k (n_k, d)``, ``v (n_k, m)``, ``out (n_q, 4)``.  ``lse (n_q,)``, natural, and
    ``product (n_q, m)`` of these rows are taken as they are if ``known``, and filled otherwise:
    the logits of a tile of rows are formed once for both passes over its keys.
    """
    n_k, d = k.shape
    rows_all = other.shape[0]
    tiles = (rows_all + row_tile - 1) // row_tile
    factor = scale * LOG2E
    lowest = -np.inf
    no_mask = np.empty((0, 1, 1), np.bool_)
    no_bias = np.empty((0, 1, 1), np.float64)
    query_buffer = np.empty(row_tile * d, np.float64)
    logit_buffer = np.empty(row_tile * n_k, np.float64)
    weight_buffer = np.empty(row_tile * key_tile, np.float64)
    top = np.empty(row_tile, np.float64)
    total = np.empty(row_tile, np.float64)
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        b0 = item * row_tile
        b1 = min(b0 + row_tile, rows_all)
        rows = b1 - b0
        start = i0 + b0
        scaled = query_buffer[: rows * d].reshape((rows, d))
        _scale_rows(q[start : start + rows], factor, scaled)
        out[start : start + rows] = 0.0
        top[:] = lowest
        total[:] = 0.0
        for j0 in range(0, n_k, key_tile):
            j1 = min(j0 + key_tile, n_k)
            s = logit_buffer[rows * j0 : rows * j1].reshape((rows, j1 - j0))
            if j0 > first + start + rows - 1 + right:
                s[:] = lowest
                continue
            np.dot(scaled, k[j0:j1].T, s)
            if keys.shape[0] > 0 or not j1 - 1 <= first + start + right:
                _hide(
                    s, start, j0, first, n_k + abs(first) + out.shape[0], right,
                    keys, 0, no_mask, no_bias, 0,
                )  # fmt: skip
            if known:
                continue
            for i in range(rows):
                high = row_maximum(s[i])
                if high > top[i]:
                    total[i] *= exp2(np.float64(top[i] - high))
                    top[i] = high
                m = top[i] if top[i] != lowest else 0.0
                part = 0.0
                for j in range(j1 - j0):
                    part += exp2(np.float64(s[i, j] - m))
                total[i] += part
        if not known:
            product[start : start + rows] = 0.0
            for i in range(rows):
                empty = total[i] == 0.0
                lse[start + i] = lowest if empty else (top[i] + np.log2(total[i])) * LN2
        for j0 in range(0, n_k, key_tile):
            j1 = min(j0 + key_tile, n_k)
            cols = j1 - j0
            s = logit_buffer[rows * j0 : rows * j1].reshape((rows, cols))
            weights = weight_buffer[: rows * cols].reshape((rows, cols))
            for i in range(rows):
                row = start + i
                b = lse[row] * LOG2E if lse[row] != lowest else 0.0
                for j in range(cols):
                    s[i, j] -= b
                    weights[i, j] = exp2(s[i, j])
                _add_sums(weights[i], s[i], other[b0 + i, j0:j1], out[row])
            if v.shape[1] > 0 and not known:
                add_product(weights, v[j0:j1], product[start : start + rows])


# --- drivers ----------------------------------------------------------------------------------


def compare_matrices(exact: Array, other: Array) -> tuple[Array, Array]:
    """Return ``B - A`` and the four sums (b, 4) of each row, of float64 matrices (b, n_k).

    Nothing is validated; A and B are C-contiguous.
    """
    difference, out = np.empty(exact.shape), np.empty((len(exact), 4))
    deal(compare_dense, exact, other, difference, out, work=4 * exact.size)
    return difference, out


def gram_product(x: Array, v: Array) -> Array:
    """Return ``X^T X v (n,)`` for a float64 matrix (m, n), C-contiguous, and a vector (n,)."""
    tiles = min(16, max(1, x.size >> 16))
    parts = np.empty((tiles, x.shape[1]))
    deal(gram_times, x, v, parts, work=x.size / 2)
    total: Array = parts.sum(axis=0)
    return total


def held_rows(n_k: int) -> int:
    """Return how many rows an item of `compare` has, which depends on the number of keys alone."""
    return int(min(64, max(4, HELD // max(1, n_k))))


def compare_rows(
    q: Array,
    k: Array,
    v: Array,
    other: Array,
    start: int,
    lse: Array,
    product: Array,
    out: Array,
    *,
    known: bool,
    scale: float,
    first: int,
    right: int | None,
    key_mask: Array | None,
) -> None:
    """Fill ``out[start : start + len(other)]`` with the sums of ``compare``; nothing is validated.

    The same rows of ``lse (n_q,)`` and ``product (n_q, m)`` are read or filled, see there.  All
    float64 but ``other (b, n_k)``; ``key_mask (1, n_k)``, ``out (n_q, 4)``.
    """
    n_k, d = k.shape
    deal(
        compare,
        q,
        k,
        v,
        other,
        start,
        scale,
        UNBOUNDED if right is None else right,
        first,
        np.empty((0, n_k), bool) if key_mask is None else key_mask,
        held_rows(n_k),
        min(KEY_TILE, n_k),
        known,
        lse,
        product,
        out,
        work=other.size * (4 + 2 * PRODUCT * (d + v.shape[1])),
    )
