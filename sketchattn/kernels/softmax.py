"""Tiled products with the softmax matrix: BLAS a tile, one stabilised softmax, never n x n.

Logits are kept in base 2: with ``s = scale log2(e) q . k`` a weight is ``2^(s - m)``, so that the
argument of the exponential needs no reduction by ``log 2`` and its power of two is exact.

Shapes and conventions shared by all kernels of this file:

* ``q (H, n_q, d)``, ``k (H_kv, n_k, d)``, ``v (H_kv, n_k, m)``; head ``h`` reads ``h // group``.
* Row ``i`` of head ``h`` has position ``p = first[h] + i`` and sees the keys
  ``p - left <= j <= p + right``; an unbounded side is a number above any length.
* ``keys (S, n_k)`` bool, ``keys_of (H,)``: True keeps, in slab ``keys_of[h]``; ``S = 0``: none.
* ``mask (M, m_q, m_k)`` bool, ``bias (M, m_q, m_k)`` in the precision of ``q``, ``mask_of (H,)``:
  an axis of length 1 is broadcast; ``M = 0``: none.
* Items are (head, tile); every output element is reduced by one thread in a fixed order, so
  results do not depend on the number of threads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import add_product, by_precision, kernel, take
from ._threads import PRODUCT, deal

Array = NDArray[Any]

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

UNBOUNDED = 1 << 40  # above any length; positions stay far from the limits of int64
KEY_TILE = 256
# Values wider than this are multiplied in pieces, so that a tile's accumulator stays in cache.
WIDEST = 256


# --- exponential, hyperbolic tangent, row maximum -------------------------------------------


def exp2(x: Any) -> Any:
    """Return ``2^x``, ``x <= 0`` up to rounding: 1 at 0, 0 below the normal range, NaN at NaN.

    ``x = j + f`` with the integer ``j = rint(x)``; ``2^f = 1 + f p(f)`` on ``|f| <= 1/2`` by
    Chebyshev interpolation, and ``j`` is added to the exponent bits.
    """
    lowest = -126.0 if isinstance(x, np.float32) else -1022.0
    return type(x)(0.0) if x < lowest else np.exp2(x)


def _exp2_float32(x: Any) -> Any:
    y = np.float32(-126.0) if x < np.float32(-126.0) else x
    j = np.rint(y)
    f = np.float32(y - j)
    p = np.float32(1.5453163e-4)
    p = p * f + np.float32(1.33908636e-3)
    p = p * f + np.float32(9.61808256e-3)
    p = p * f + np.float32(5.550357114e-2)
    p = p * f + np.float32(0.2402265077)
    p = p * f + np.float32(0.6931471880)
    p = np.float32(p * f + np.float32(1.0))
    bits = np.int32(p.view(np.int32) + (np.int32(j) << np.int32(23)))
    return np.float32(0.0) if x < np.float32(-126.0) else bits.view(np.float32)


def _exp2_float64(x: Any) -> Any:
    y = np.float64(-1022.0 if x < -1022.0 else x)
    j = np.rint(y)
    f = y - j
    p = 4.4549605981865186e-10
    p = p * f + 7.072585949269223e-09
    p = p * f + 1.0178062445845774e-07
    p = p * f + 1.321544258792169e-06
    p = p * f + 1.525273382983612e-05
    p = p * f + 0.0001540353044173605
    p = p * f + 0.0013333558146416936
    p = p * f + 0.009618129107606888
    p = p * f + 0.0555041086648216
    p = p * f + 0.24022650695910097
    p = p * f + 0.6931471805599453
    p = np.float64(p * f + 1.0)
    # Through int32: AVX2 converts doubles to 32-bit integers only.
    bits = np.int64(p.view(np.int64) + (np.int64(np.int32(j)) << np.int64(52)))
    return 0.0 if x < -1022.0 else bits.view(np.float64)


exp2 = by_precision(exp2, float32=_exp2_float32, float64=_exp2_float64)


def tanh(x: Any) -> Any:
    """Return ``tanh(x)``."""
    return np.tanh(x)


def _tanh_float32(x: Any) -> Any:
    # x + x^3 p(x^2) below 5/8, (1 - t) / (1 + t) with t = e^(-2|x|) above: both vectorise.
    a = abs(x)
    z = x * x
    p = np.float32(-6.0451651e-3)
    p = p * z + np.float32(2.09613291e-2)
    p = p * z + np.float32(-5.38432632e-2)
    p = p * z + np.float32(0.133327188)
    p = p * z + np.float32(-0.333333284)
    small = x + x * z * p
    t = exp2(np.float32(np.float32(-2.0 * LOG2E) * a))
    large = (np.float32(1.0) - t) / (np.float32(1.0) + t)
    large = -large if x < np.float32(0.0) else large
    return small if a < np.float32(0.625) else large


def _tanh_float64(x: Any) -> Any:
    return math.tanh(x)


tanh = by_precision(tanh, float32=_tanh_float32, float64=_tanh_float64)


def row_maximum(x: Any) -> Any:
    """Return the largest entry of a row; -inf if it is empty, unspecified if it has a NaN."""
    return x.max() if x.size else x.dtype.type(-np.inf)


# A floating-point maximum does not vectorise without the no-NaN flag.  Flipping the magnitude
# bits of negative numbers makes the order of the bit patterns, as integers, that of the numbers.


def _row_maximum_float32(x: Any) -> Any:
    flip = np.int32(0x7FFFFFFF)
    top = np.int32(-2139095041)  # the pattern of -inf
    for j in range(x.size):
        bits = np.float32(x[j]).view(np.int32)
        bits = np.int32(bits ^ ((bits >> np.int32(31)) & flip))
        top = bits if bits > top else top
    return np.int32(top ^ ((top >> np.int32(31)) & flip)).view(np.float32)


def _row_maximum_float64(x: Any) -> Any:
    flip = np.int64(0x7FFFFFFFFFFFFFFF)
    top = np.int64(-9218868437227405313)  # the pattern of -inf
    for j in range(x.size):
        bits = np.float64(x[j]).view(np.int64)
        bits = np.int64(bits ^ ((bits >> np.int64(63)) & flip))
        top = bits if bits > top else top
    return np.int64(top ^ ((top >> np.int64(63)) & flip)).view(np.float64)


row_maximum = by_precision(row_maximum, float32=_row_maximum_float32, float64=_row_maximum_float64)


# --- one tile -------------------------------------------------------------------------------


@kernel()
def _scale_rows(q: Array, factor: Any, out: Array) -> None:
    """``out = factor q`` for a tile of queries; both (rows, d), ``out`` owned by the caller."""
    for i in range(q.shape[0]):
        for c in range(q.shape[1]):
            out[i, c] = factor * q[i, c]


@kernel()
def _cap(s: Array, cap: Any) -> None:
    """``s <- cap log2(e) tanh(s / cap)`` in place; ``s`` holds natural logits."""
    inverse = s.dtype.type(1.0) / cap
    outer = s.dtype.type(cap * s.dtype.type(LOG2E))
    for i in range(s.shape[0]):
        for j in range(s.shape[1]):
            s[i, j] = outer * tanh(s.dtype.type(s[i, j] * inverse))


@kernel()
def _hide(
    s: Array,
    i0: int,
    j0: int,
    first: int,
    left: int,
    right: int,
    keys: Array,
    key_slab: int,
    mask: Array,
    bias: Array,
    mask_slab: int,
) -> None:
    """Add the bias and set hidden entries of the tile ``s`` to -inf; rows from i0, keys from j0."""
    rows, cols = s.shape
    hidden = s.dtype.type(-np.inf)
    log2e = s.dtype.type(LOG2E)
    for i in range(rows):
        if bias.shape[0] > 0:
            bi = i0 + i if bias.shape[1] > 1 else 0
            if bias.shape[2] > 1:
                for j in range(cols):
                    s[i, j] += log2e * bias[mask_slab, bi, j0 + j]
                    # Whatever a removed key holds, NaN included, is not read.
                    s[i, j] = hidden if bias[mask_slab, bi, j0 + j] == hidden else s[i, j]
            else:
                b = bias[mask_slab, bi, 0]
                for j in range(cols):
                    s[i, j] = hidden if b == hidden else s[i, j] + log2e * b
        if mask.shape[0] > 0:
            mi = i0 + i if mask.shape[1] > 1 else 0
            if mask.shape[2] > 1:
                for j in range(cols):
                    s[i, j] = s[i, j] if mask[mask_slab, mi, j0 + j] else hidden
            elif not mask[mask_slab, mi, 0]:
                for j in range(cols):
                    s[i, j] = hidden
        if keys.shape[0] > 0:
            for j in range(cols):
                s[i, j] = s[i, j] if keys[key_slab, j0 + j] else hidden
        p = first + i0 + i - j0
        for j in range(min(max(p - left, 0), cols)):
            s[i, j] = hidden
        for j in range(max(min(p + right + 1, cols), 0), cols):
            s[i, j] = hidden


@kernel()
def _any_key(keys: Array, slab: int, j0: int, j1: int) -> bool:
    """Say whether a tile of keys holds one that is kept."""
    if keys.shape[0] == 0:
        return True
    count = 0
    for j in range(j0, j1):
        count += 1 if keys[slab, j] else 0
    return count > 0


@kernel()
def online_softmax(s: Array, top: Array, total: Array, acc: Array) -> None:
    """Fold a tile of logits into the running softmax and leave its weights in ``s``.

    ``m' = max(m, max_j s_j)``, ``l' = 2^(m - m') l + sum_j 2^(s_j - m')``, the accumulator is
    scaled alike; ``s (rows, cols)``, ``top``, ``total (rows,)``, ``acc (rows, m)``.
    """
    lowest = s.dtype.type(-np.inf)
    zero = s.dtype.type(0.0)
    for i in range(s.shape[0]):
        high = row_maximum(s[i])
        before = top[i]
        if high > before:
            shift = exp2(s.dtype.type(before - high))
            top[i] = high
            total[i] *= shift
            for c in range(acc.shape[1]):
                acc[i, c] *= shift
        # A row without a visible key so far has no maximum: its weights are 2^(-inf - 0) = 0.
        m = top[i] if top[i] != lowest else zero
        part = zero
        for j in range(s.shape[1]):
            e = exp2(s.dtype.type(s[i, j] - m))
            s[i, j] = e
            part += e
        total[i] += part


# --- A X, and the normaliser ----------------------------------------------------------------


@kernel(dealt=True)
def attend(
    turn: Array,
    q: Array,
    k: Array,
    v: Array,
    group: int,
    scale: float,
    cap: float,
    first: Array,
    left: int,
    right: int,
    keys: Array,
    keys_of: Array,
    mask: Array,
    bias: Array,
    mask_of: Array,
    sink: Array,
    row_tile: int,
    key_tile: int,
    out: Array,
    lse: Array,
) -> None:
    """``out = A V (H, n_q, m)`` and ``lse (H, n_q)``, the natural log of the row sums of exp(L).

    Online softmax over tiles of keys: ``L = scale q . k``, capped, biased, hidden, in that order.
    ``sink (H,)`` adds a logit with value zero to every row; ``sink.size = 0``: none.  A row that
    sees nothing gives zeros and -inf.
    """
    heads, n_q, d = q.shape
    n_k = k.shape[1]
    width = v.shape[2]
    tiles = (n_q + row_tile - 1) // row_tile
    one = q.dtype.type(1.0)
    natural = q.dtype.type(LN2)
    capped = cap > 0.0
    factor = q.dtype.type(scale) if capped else q.dtype.type(scale * LOG2E)
    plain = mask.shape[0] == 0 and bias.shape[0] == 0 and keys.shape[0] == 0
    query_buffer = np.empty(row_tile * d, q.dtype)
    logit_buffer = np.empty(row_tile * key_tile, q.dtype)
    acc_buffer = np.empty(row_tile * width, q.dtype)
    top_buffer = np.empty(row_tile, q.dtype)
    total_buffer = np.empty(row_tile, q.dtype)
    # Items are dealt in turn: neighbouring tiles of a causal head cost about the same.
    for _ in range(heads * tiles):
        item = take(turn)
        if item >= heads * tiles:
            break
        h = item // tiles
        i0 = (item - h * tiles) * row_tile
        i1 = min(i0 + row_tile, n_q)
        rows = i1 - i0
        h_kv = h // group
        start = first[h]
        low = max(start + i0 - left, 0)
        high = min(start + i1 - 1 + right + 1, n_k)
        scaled = query_buffer[: rows * d].reshape((rows, d))
        acc = acc_buffer[: rows * width].reshape((rows, width))
        top = top_buffer[:rows]
        total = total_buffer[:rows]
        _scale_rows(q[h, i0:i1], factor, scaled)
        acc[:] = 0.0
        if sink.size > 0:
            top[:] = sink[h] * q.dtype.type(LOG2E)
            total[:] = 1.0
        else:
            top[:] = -np.inf
            total[:] = 0.0
        for j0 in range(low - low % key_tile, high, key_tile):
            j1 = min(j0 + key_tile, high)
            if not _any_key(keys, keys_of[h], j0, j1):
                continue
            s = logit_buffer[: rows * (j1 - j0)].reshape((rows, j1 - j0))
            np.dot(scaled, k[h_kv, j0:j1].T, s)
            if capped:
                _cap(s, q.dtype.type(cap))
            if not (plain and j0 >= start + i1 - 1 - left and j1 - 1 <= start + i0 + right):
                _hide(
                    s, i0, j0, start, left, right,
                    keys, keys_of[h], mask, bias, mask_of[h],
                )  # fmt: skip
            online_softmax(s, top, total, acc)
            if width > 0:
                add_product(s, v[h_kv, j0:j1], acc)
        for i in range(rows):
            t = total[i]
            if t == 0.0:
                lse[h, i0 + i] = -np.inf
                for c in range(width):
                    out[h, i0 + i, c] = 0.0
            else:
                lse[h, i0 + i] = (top[i] + np.log2(t)) * natural
                inverse = one / t
                for c in range(width):
                    out[h, i0 + i, c] = acc[i, c] * inverse


# --- A^T Y ----------------------------------------------------------------------------------


@kernel(dealt=True)
def attend_transposed(
    turn: Array,
    q: Array,
    k: Array,
    y: Array,
    lse: Array,
    scale: float,
    left: int,
    right: int,
    first: int,
    keys: Array,
    row_tile: int,
    key_tile: int,
    out: Array,
) -> None:
    """``out = A^T Y (n_k, m)`` for one head, ``A_ij = exp(scale q_i . k_j - lse_i)``.

    ``q (n_q, d)``, ``k (n_k, d)``, ``y (n_q, m)``, ``lse (n_q,)`` natural, -inf for an empty row;
    ``keys (1, n_k)`` bool or of length 0.  Tiles of keys are split over the threads.
    """
    n_q, d = q.shape
    n_k = k.shape[0]
    tiles = (n_k + key_tile - 1) // key_tile
    factor = q.dtype.type(scale * LOG2E)
    to_bits = q.dtype.type(LOG2E)
    lowest = q.dtype.type(-np.inf)
    no_mask = np.empty((0, 1, 1), np.bool_)
    no_bias = np.empty((0, 1, 1), q.dtype)
    query_buffer = np.empty(row_tile * d, q.dtype)
    logit_buffer = np.empty(row_tile * key_tile, q.dtype)
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        j0 = item * key_tile
        j1 = min(j0 + key_tile, n_k)
        cols = j1 - j0
        out[j0:j1] = 0.0
        if not _any_key(keys, 0, j0, j1):
            continue
        # row i sees key j if  j - right - first <= i <= j + left - first
        low = max(j0 - right - first, 0)
        high = min(j1 - 1 + left - first + 1, n_q)
        for i0 in range(low - low % row_tile, high, row_tile):
            i1 = min(i0 + row_tile, n_q)
            rows = i1 - i0
            scaled = query_buffer[: rows * d].reshape((rows, d))
            s = logit_buffer[: rows * cols].reshape((rows, cols))
            _scale_rows(q[i0:i1], factor, scaled)
            np.dot(scaled, k[j0:j1].T, s)
            if keys.shape[0] > 0 or not (
                j0 >= first + i1 - 1 - left and j1 - 1 <= first + i0 + right
            ):
                _hide(s, i0, j0, first, left, right, keys, 0, no_mask, no_bias, 0)
            for i in range(rows):
                b = lse[i0 + i] * to_bits if lse[i0 + i] != lowest else q.dtype.type(0.0)
                for j in range(cols):
                    s[i, j] = exp2(q.dtype.type(s[i, j] - b))
            add_product(s.T, y[i0:i1], out[j0:j1])


# --- drivers --------------------------------------------------------------------------------


def row_tile(rows: int) -> int:
    """Return how many queries a tile holds when ``rows`` are to be computed in all heads.

    Large tiles make BLAS fast, several tiles keep all threads busy.  The choice must not depend
    on the number of threads, or the last bits of a result would.
    """
    for tile, least in ((512, 8192), (256, 2048), (128, 512), (64, 128)):
        if rows >= least:
            return tile
    return 32


def softmax_product(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    group: int = 1,
    softcap: float = 0.0,
    first: Array | None = None,
    left: int | None = None,
    right: int | None = None,
    key_mask: Array | None = None,
    key_slab: Array | None = None,
    mask: Array | None = None,
    mask_slab: Array | None = None,
    sink: Array | None = None,
    tile: int | None = None,
) -> tuple[Array, Array]:
    """Return ``(A V, logsumexp)`` of many heads with prepared arrays; nothing is validated.

    Parameters
    ----------
    q, k, v : ndarray
        (H, n_q, d), (H_kv, n_k, d), (H_kv, n_k, m), C-contiguous, one precision; query head h
        reads ``h // group``.
    scale, softcap : float
        ``L = scale Q K^T``, then ``softcap tanh(L / softcap)`` unless it is 0.
    first : int64 array (H,), optional
        Position of query 0 of each head among the keys; None is 0.
    left, right : int, optional
        Row at position p sees ``p - left <= j <= p + right``; None is unbounded.
    key_mask, key_slab : bool (S, n_k) and int64 (H,), optional
        Keys to keep, and the slab of each head.
    mask, mask_slab : bool or float (M, m_q, m_k) and int64 (H,), optional
        Visible entries, or a bias added to the logits; axes of length 1 are broadcast.
    sink : array (H,), optional
        An extra logit of each head with value zero.
    tile : int, optional
        Queries of a tile; None takes what suits the queries of all heads.

    Returns
    -------
    out : ndarray (H, n_q, m)
    lse : ndarray (H, n_q)
    """
    heads, n_q, d = q.shape
    n_k, width = v.shape[1:]
    dtype = q.dtype
    zeros = np.zeros(heads, np.int64)
    out = np.empty((heads, n_q, width), dtype)
    lse = np.empty((heads, n_q), dtype)
    no_mask, no_bias = np.empty((0, 1, 1), bool), np.empty((0, 1, 1), dtype)
    boolean = mask is not None and mask.dtype == np.bool_
    tile = row_tile(heads * n_q) if tile is None else tile
    for start in range(0, max(width, 1), WIDEST):
        whole = width <= WIDEST
        piece = v if whole else np.ascontiguousarray(v[:, :, start : start + WIDEST])
        target = out if whole else np.empty((heads, n_q, piece.shape[2]), dtype)
        deal(
            attend,
            q,
            k,
            piece,
            group,
            scale,
            softcap,
            zeros if first is None else first,
            UNBOUNDED if left is None else left,
            UNBOUNDED if right is None else right,
            np.empty((0, n_k), bool) if key_mask is None else key_mask,
            zeros if key_slab is None else key_slab,
            mask if mask is not None and boolean else no_mask,
            mask if mask is not None and not boolean else no_bias,
            zeros if mask_slab is None else mask_slab,
            np.empty(0, dtype) if sink is None else sink,
            tile,
            min(KEY_TILE, max(n_k, 1)),
            target,
            lse,
            work=heads * n_q * n_k * (0.5 + PRODUCT * (d + piece.shape[2])),
        )
        if not whole:
            out[:, :, start : start + WIDEST] = target
    return out, lse


def transposed_product(
    q: Array,
    k: Array,
    y: Array,
    lse: Array,
    *,
    scale: float,
    first: int,
    right: int | None,
    key_mask: Array | None,
) -> Array:
    """Return ``A^T Y (n_k, m)`` of one head from its row normalisers; nothing is validated.

    ``q (n_q, d)``, ``k (n_k, d)``, ``y (n_q, m)``, ``lse (n_q,)``, ``key_mask (1, n_k)``.
    """
    n_k = k.shape[0]
    out = np.empty((n_k, y.shape[1]), q.dtype)
    for start in range(0, y.shape[1], WIDEST):
        piece = np.ascontiguousarray(y[:, start : start + WIDEST])
        target = np.empty((n_k, piece.shape[1]), q.dtype)
        deal(
            attend_transposed,
            q,
            k,
            piece,
            lse,
            scale,
            UNBOUNDED,
            UNBOUNDED if right is None else right,
            first,
            np.empty((0, n_k), bool) if key_mask is None else key_mask,
            KEY_TILE,
            row_tile(n_k),
            target,
            work=len(q) * n_k * (0.5 + PRODUCT * (q.shape[1] + piece.shape[1])),
        )
        out[:, start : start + WIDEST] = target
    return out
