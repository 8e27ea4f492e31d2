"""Gradients of exact attention by tiles: BLAS a tile, weights from the log-sum-exp, never n x n.

Shapes and conventions are those of ``kernels.softmax``.  Besides, for every row of every head:
``g (H, n_q, m)`` is the cotangent of the output, ``lse (H, n_q)`` the natural log-sum-exp of its
logits, ``delta_i = g_i . out_i``.  A tile is, in this order::

    A_ij = exp(L_ij - lse_i)      dL_ij = A_ij (g_i . v_j - delta_i)
    dV_j += A_ij g_i              dS_ij = dL_ij (1 - tanh(S_ij / cap)^2),  dL_ij without a cap
    dQ_i += scale dS_ij k_j       dK_j += scale dS_ij q_i

Tiles of keys are dealt to ``chunks`` parts of a head, whose number follows from the shapes; each
part adds to a dQ of its own, and these are added in their order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import add_product, kernel, take
from ._threads import PRODUCT, deal
from .softmax import LOG2E, UNBOUNDED, _any_key, _hide, _scale_rows, exp2, tanh

Array = NDArray[Any]

# Rows and columns of a tile at most; two or three tiles of float32 stay in the cache of a core.
ROW_TILE = 256
KEY_TILE = 256
# Parts of all heads together that threads may share, if there are tiles enough.
PARTS = 16


@kernel()
def _cap_and_slope(s: Array, slope: Array, cap: Any) -> None:
    """``s <- cap log2(e) t``, ``slope <- 1 - t^2`` with ``t = tanh(s / cap)`` of natural logits."""
    one = s.dtype.type(1.0)
    inverse = one / cap
    outer = s.dtype.type(cap * s.dtype.type(LOG2E))
    for i in range(s.shape[0]):
        for j in range(s.shape[1]):
            t = tanh(s.dtype.type(s[i, j] * inverse))
            s[i, j] = outer * t
            slope[i, j] = one - t * t


@kernel()
def _weigh(s: Array, d: Array, lse: Array, delta: Array) -> None:
    """``s <- A``, ``d <- A (d - delta)``: from base-2 logits, and from ``g_i . v_j``.

    ``s``, ``d (rows, cols)``; ``lse``, natural, and ``delta (rows,)``.
    """
    to_bits = s.dtype.type(LOG2E)
    lowest = s.dtype.type(-np.inf)
    for i in range(s.shape[0]):
        # The logits of an empty row are all -inf, whatever they are measured from.
        b = s.dtype.type(lse[i] * to_bits) if lse[i] != lowest else s.dtype.type(0.0)
        shift = delta[i]
        for j in range(s.shape[1]):
            a = exp2(s.dtype.type(s[i, j] - b))
            s[i, j] = a
            d[i, j] = a * (d[i, j] - shift)


@kernel()
def _multiply(d: Array, slope: Array) -> None:
    """``d <- d slope``, both (rows, cols)."""
    for i in range(d.shape[0]):
        for j in range(d.shape[1]):
            d[i, j] *= slope[i, j]


@kernel(dealt=True)
def differentiate(
    turn: Array,
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    lse: Array,
    delta: Array,
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
    row_tile: int,
    key_tile: int,
    d_q: Array,
    d_k: Array,
    d_v: Array,
) -> None:
    """Fill ``d_q (H, chunks, n_q, d)``, whose sum over chunks is dQ / scale, and dK, dV by head.

    ``d_k (H, n_k, d)`` and ``d_v (H, n_k, m)`` are those of one query head each.
    """
    heads, n_q, d = q.shape
    n_k = k.shape[1]
    width = v.shape[2]
    chunks = d_q.shape[1]
    tiles = (n_k + key_tile - 1) // key_tile
    capped = cap > 0.0
    factor = q.dtype.type(scale) if capped else q.dtype.type(scale * LOG2E)
    outer = q.dtype.type(scale)
    plain = mask.shape[0] == 0 and bias.shape[0] == 0 and keys.shape[0] == 0
    query_buffer = np.empty(row_tile * d, q.dtype)
    logit_buffer = np.empty(row_tile * key_tile, q.dtype)
    weight_buffer = np.empty(row_tile * key_tile, q.dtype)
    slope_buffer = np.empty(row_tile * key_tile if capped else 0, q.dtype)
    for _ in range(heads * chunks):
        item = take(turn)
        if item >= heads * chunks:
            break
        h = item // chunks
        chunk = item - h * chunks
        h_kv = h // group
        start = first[h]
        d_q[h, chunk] = 0.0
        for tile in range(chunk, tiles, chunks):
            j0 = tile * key_tile
            j1 = min(j0 + key_tile, n_k)
            cols = j1 - j0
            d_k[h, j0:j1] = 0.0
            d_v[h, j0:j1] = 0.0
            if not _any_key(keys, keys_of[h], j0, j1):
                continue
            # row i sees key j if  j - right - start <= i <= j + left - start
            low = max(j0 - right - start, 0)
            high = min(j1 - 1 + left - start + 1, n_q)
            for i0 in range(low - low % row_tile, high, row_tile):
                i1 = min(i0 + row_tile, n_q)
                rows = i1 - i0
                scaled = query_buffer[: rows * d].reshape((rows, d))
                s = logit_buffer[: rows * cols].reshape((rows, cols))
                w = weight_buffer[: rows * cols].reshape((rows, cols))
                _scale_rows(q[h, i0:i1], factor, scaled)
                np.dot(scaled, k[h_kv, j0:j1].T, s)
                if capped:
                    slope = slope_buffer[: rows * cols].reshape((rows, cols))
                    _cap_and_slope(s, slope, q.dtype.type(cap))
                if not (plain and j0 >= start + i1 - 1 - left and j1 - 1 <= start + i0 + right):
                    _hide(
                        s, i0, j0, start, left, right,
                        keys, keys_of[h], mask, bias, mask_of[h],
                    )  # fmt: skip
                if width > 0:
                    np.dot(g[h, i0:i1], v[h_kv, j0:j1].T, w)
                else:
                    w[:] = 0.0
                _weigh(s, w, lse[h, i0:i1], delta[h, i0:i1])
                if width > 0:
                    add_product(s.T, g[h, i0:i1], d_v[h, j0:j1])
                if capped:
                    slope = slope_buffer[: rows * cols].reshape((rows, cols))
                    _multiply(w, slope)
                add_product(w, k[h_kv, j0:j1], d_q[h, chunk, i0:i1])
                add_product(w.T, q[h, i0:i1], d_k[h, j0:j1])
            for j in range(j0, j1):
                for c in range(d):
                    d_k[h, j, c] *= outer


@kernel(dealt=True)
def differentiate_bias(
    turn: Array,
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    lse: Array,
    delta: Array,
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
    target_of: Array,
    row_tile: int,
    key_tile: int,
    d_bias: Array,
) -> None:
    """Fill ``d_bias (M, n_q or tiles of rows, n_k or 1)`` with the sums of dL over broadcast axes.

    Head h adds to the slab ``target_of[h]``.  Where the bias is one row, each tile of rows has a
    row of its own here.
    """
    heads, n_q, d = q.shape
    n_k = k.shape[1]
    slabs = d_bias.shape[0]
    tiles = (n_q + row_tile - 1) // row_tile
    by_row = d_bias.shape[1] == n_q and tiles < n_q
    by_key = d_bias.shape[2] > 1
    capped = cap > 0.0
    factor = q.dtype.type(scale) if capped else q.dtype.type(scale * LOG2E)
    query_buffer = np.empty(row_tile * d, q.dtype)
    logit_buffer = np.empty(row_tile * key_tile, q.dtype)
    weight_buffer = np.empty(row_tile * key_tile, q.dtype)
    slope_buffer = np.empty(row_tile * key_tile if capped else 0, q.dtype)
    for _ in range(slabs * tiles):
        item = take(turn)
        if item >= slabs * tiles:
            break
        slab = item // tiles
        tile = item - slab * tiles
        i0 = tile * row_tile
        i1 = min(i0 + row_tile, n_q)
        rows = i1 - i0
        scaled = query_buffer[: rows * d].reshape((rows, d))
        if by_row:
            d_bias[slab, i0:i1] = 0.0
        else:
            d_bias[slab, tile] = 0.0
        for h in range(heads):
            if target_of[h] != slab:
                continue
            start = first[h]
            h_kv = h // group
            _scale_rows(q[h, i0:i1], factor, scaled)
            low = max(start + i0 - left, 0)
            high = min(start + i1 - 1 + right + 1, n_k)
            for j0 in range(low - low % key_tile, high, key_tile):
                j1 = min(j0 + key_tile, n_k)
                if not _any_key(keys, keys_of[h], j0, j1):
                    continue
                cols = j1 - j0
                s = logit_buffer[: rows * cols].reshape((rows, cols))
                w = weight_buffer[: rows * cols].reshape((rows, cols))
                np.dot(scaled, k[h_kv, j0:j1].T, s)
                if capped:
                    slope = slope_buffer[: rows * cols].reshape((rows, cols))
                    _cap_and_slope(s, slope, q.dtype.type(cap))
                _hide(
                    s, i0, j0, start, left, right, keys, keys_of[h], mask, bias, mask_of[h]
                )  # fmt: skip
                if v.shape[2] > 0:
                    np.dot(g[h, i0:i1], v[h_kv, j0:j1].T, w)
                else:
                    w[:] = 0.0
                _weigh(s, w, lse[h, i0:i1], delta[h, i0:i1])
                for i in range(rows):
                    row = i0 + i if by_row else tile
                    if by_key:
                        for j in range(cols):
                            d_bias[slab, row, j0 + j] += w[i, j]
                    else:
                        total = w.dtype.type(0.0)
                        for j in range(cols):
                            total += w[i, j]
                        d_bias[slab, row, 0] += total


# --- driver ---------------------------------------------------------------------------------


def _tile(slabs: int, length: int, most: int) -> int:
    """Return a length of tiles that leaves several for threads to share, in all slabs together."""
    for tile in (most, most // 2):
        if slabs * -(-length // tile) >= 8:
            return max(1, min(tile, length))
    return max(1, min(most // 4, length))


def softmax_gradients(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    out: Array,
    lse: Array,
    *,
    scale: float,
    group: int,
    softcap: float,
    first: Array,
    left: int | None,
    right: int | None,
    key_mask: Array | None,
    key_slab: Array,
    mask: Array | None,
    mask_slab: Array,
    sink: Array | None,
    bias_shape: tuple[int, int, int] | None = None,
    bias_slab: Array | None = None,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Return dq, dk, dv, dsink and dbias of prepared, finite arrays; nothing is validated.

    Parameters
    ----------
    q, k, v, g, out, lse : ndarray
        (H, n_q, d), (H_kv, n_k, d), (H_kv, n_k, m), (H, n_q, m) twice, (H, n_q), C-contiguous, one
        precision; ``out`` and ``lse`` are what ``softmax_product`` returned.
    scale, group, softcap, first, left, right, key_mask, key_slab, mask, mask_slab, sink
        As for ``softmax_product``.
    bias_shape, bias_slab : (M, m_q, m_k) and int64 (H,), optional
        Shape of the gradient of the bias, whose axes of length 1 are summed, and the slab that
        each head adds to; None: not computed.
    """
    heads, n_q, d = q.shape
    n_k, width = v.shape[1:]
    dtype = q.dtype
    delta = np.einsum("hic,hic->hi", g, out)
    d_sink = None
    if sink is not None:
        shares = np.exp(sink.astype(np.float64)[:, None] - lse)
        d_sink = -(shares * delta).sum(axis=1).astype(dtype)
    boolean = mask is not None and mask.dtype == np.bool_
    row_tile, key_tile = max(1, min(ROW_TILE, n_q)), _tile(heads, n_k, KEY_TILE)
    chunks = max(1, min(-(-n_k // key_tile), -(-PARTS // max(heads, 1))))
    parts = np.empty((heads, chunks, n_q, d), dtype)
    d_k, d_v = np.empty((heads, n_k, d), dtype), np.empty((heads, n_k, width), dtype)
    shared = (
        q,
        k,
        v,
        g,
        lse,
        delta,
        group,
        scale,
        softcap,
        first,
        UNBOUNDED if left is None else left,
        UNBOUNDED if right is None else right,
        np.empty((0, n_k), bool) if key_mask is None else key_mask,
        key_slab,
        mask if mask is not None and boolean else np.empty((0, 1, 1), bool),
        mask if mask is not None and not boolean else np.empty((0, 1, 1), dtype),
        mask_slab,
    )
    d_bias = None
    work = heads * n_q * n_k * (1 + PRODUCT * (3 * d + 2 * width))
    deal(differentiate, *shared, row_tile, key_tile, parts, d_k, d_v, work=work)
    if bias_shape is not None and bias_slab is not None:
        slabs, m_q, m_k = bias_shape
        row_tile = _tile(slabs, n_q, ROW_TILE)
        lines = n_q if m_q > 1 else -(-n_q // row_tile)
        d_bias = np.empty((slabs, lines, m_k), dtype)
        deal(differentiate_bias, *shared, bias_slab, row_tile, key_tile, d_bias, work=work)
        if m_q != lines:
            d_bias = d_bias.sum(axis=1, keepdims=True)
    d_q = parts[:, 0] if chunks == 1 else parts.sum(axis=1)
    d_q *= dtype.type(scale)
    if group > 1:
        d_k, d_v = (x.reshape((-1, group, *x.shape[1:])).sum(axis=1) for x in (d_k, d_v))
    return d_q, d_k, d_v, d_sink, d_bias
