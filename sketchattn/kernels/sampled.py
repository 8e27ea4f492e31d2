"""One pass over tiles of queries for sampled columns: logits, exponentials, fill, product.

With ``S = L[:, J]`` a row of the sampled part is, in base 2 and with the row's largest logit m,

    e_t = 2^(S_t - m),   g = the weight of each key that the row sees outside J,
    D = sum_t e_t + rest g,   Ohat = (sum_t e_t V_(J_t) + g sum_(j not in J) V_j) / D,

where every exponent is at most 0.  The kinds of g are named below.

Shapes and conventions shared by all kernels of this file:

* ``q (H, n_q, d)``, ``keys (H, r, d)`` and ``values (H, r, m)`` of the sampled columns in
  ascending order: the columns that a row sees are the first ``seen[h, i]`` of them.
* ``rest (H, n_q)`` counts the keys that a row sees outside J, and ``keep (H, n_k)`` says which
  these are; ``ends (n_q,)`` is the number of keys that a row may reach, ascending, for rows that
  see a prefix; ``ends.size = 0``: all rows see all keys.
* Items are (head, tile) and every sum has an order of its own, so that results do not depend on
  the number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._jit import kernel, take
from ._threads import PRODUCT, deal
from .softmax import LN2, LOG2E, exp2, row_maximum, row_tile

Array = NDArray[Any]

# Numba's cache watches this file only.  These are the first digits of the SHA-256 of the bodies
# that are compiled into these kernels from another file; a test compares them, and changing
# them here makes the cache start afresh.
FOREIGN = "1fa8f3b5"

# Kinds of fill: g is the geometric or the arithmetic mean of e_t, the true mean of the keys
# outside J (from their logsumexp ``tail``), or zero.
GEOMETRIC, ARITHMETIC, TAIL, EMPTY = 0, 1, 2, 3
KINDS = {"geometric": GEOMETRIC, "arithmetic": ARITHMETIC, "oracle": TAIL, "none": EMPTY}

# Logits of a tile: half a megabyte in float32, which a second-level cache holds.
TILE_ENTRIES = 1 << 17
# Keys that one partial sum adds up.
SUM_BLOCK = 1024


@kernel()
def _weigh(
    s: Array, seen: Array, rest: Array, tail: Array, kind: int, fill: Array, total: Array,
    stats: Array,
) -> None:  # fmt: skip
    """Turn the base-2 logits ``s (rows, r)`` of a tile into ``e`` in place; zero where hidden.

    Writes ``fill (rows,)``, the weight g, and ``total (rows,)``, the sum D; both relative to the
    row's largest logit.  ``stats (rows, 2)`` receives the natural logarithms of g and D.
    """
    lowest = s.dtype.type(-np.inf)
    zero = s.dtype.type(0.0)
    one = s.dtype.type(1.0)
    to_bits = s.dtype.type(LOG2E)
    natural = s.dtype.type(LN2)
    for i in range(s.shape[0]):
        count = seen[i]
        others = s.dtype.type(rest[i])
        row = s[i, :count]
        high = row_maximum(row)
        beyond = lowest
        if kind == TAIL:
            beyond = s.dtype.type(tail[i] * to_bits)
            high = beyond if beyond > high else high
        part = zero
        mean = zero
        if high == lowest:
            # No column in sight: all keys weigh the same, or there is none.
            high = zero
            g = one if others > zero and kind != EMPTY else zero
            log_g = zero if g > zero else lowest
            row[:] = zero
        else:
            for t in range(count):
                x = s.dtype.type(row[t] - high)
                mean += x
                e = exp2(x)
                row[t] = e
                part += e
            if kind == GEOMETRIC:
                log_g = s.dtype.type(mean / s.dtype.type(max(count, 1)))
                g = exp2(log_g)
            elif kind == ARITHMETIC:
                g = s.dtype.type(part / s.dtype.type(max(count, 1)))
                log_g = s.dtype.type(np.log2(g))
            elif kind == TAIL and others > zero:
                g = s.dtype.type(exp2(s.dtype.type(beyond - high)) / others)
                log_g = s.dtype.type(beyond - high - np.log2(others))
            else:
                g = zero
                log_g = lowest
        s[i, count:] = zero
        fill[i] = g
        total[i] = part + others * g
        stats[i, 0] = natural * (high + log_g)
        stats[i, 1] = natural * (high + s.dtype.type(np.log2(total[i])))


@kernel(dealt=True)
def sampled_softmax(
    turn: Array,
    q: Array,
    keys: Array,
    values: Array,
    bias: Array,
    seen: Array,
    rest: Array,
    tail: Array,
    kind: int,
    v: Array,
    keep: Array,
    ends: Array,
    base: Array,
    scale: float,
    tile: int,
    weights: Array,
    fill: Array,
    stats: Array,
    out: Array,
) -> None:
    """``out = Ohat (H, n_q, m)``, ``weights = e / D (H, n_q, r)``, ``fill = g / D (H, n_q)``.

    ``weights`` of shape (H, n_q, 0) are not stored, ``values`` of width 0 not multiplied.
    ``bias (H, r)`` is added to the natural logits, ``H = 0``: none.  ``tail (H, n_q)`` is read for
    the kind TAIL.  ``base (H, tiles, m)`` float64 holds the sums of ``v (H, n_k, m)`` over the
    keys kept before the end of each tile's first row, or with ``tiles = 1`` over all keys kept.
    ``stats (H, n_q, 2)``: natural logarithms of g and D.
    """
    heads, n_q, d = q.shape
    r = keys.shape[1]
    width = values.shape[2]
    stored = weights.shape[2]
    tiles = (n_q + tile - 1) // tile
    factor = q.dtype.type(scale * LOG2E)
    to_bits = q.dtype.type(LOG2E)
    zero = q.dtype.type(0.0)
    one = q.dtype.type(1.0)
    query_buffer = np.empty(tile * d, q.dtype)
    logit_buffer = np.empty(tile * r, q.dtype)
    part_buffer = np.empty(tile * width, q.dtype)
    total = np.empty(tile, q.dtype)
    sums = np.empty(width, np.float64)
    shared = np.empty(width, q.dtype)
    for _ in range(heads * tiles):
        item = take(turn)
        if item >= heads * tiles:
            break
        h = item // tiles
        i0 = (item - h * tiles) * tile
        i1 = min(i0 + tile, n_q)
        rows = i1 - i0
        scaled = query_buffer[: rows * d].reshape((rows, d))
        s = logit_buffer[: rows * r].reshape((rows, r))
        part = part_buffer[: rows * width].reshape((rows, width))
        for i in range(rows):
            for c in range(d):
                scaled[i, c] = factor * q[h, i0 + i, c]
        if r > 0:
            np.dot(scaled, keys[h].T, s)
        if bias.shape[0] > 0:
            for i in range(rows):
                for t in range(r):
                    s[i, t] += to_bits * bias[h, t]
        _weigh(
            s, seen[h, i0:i1], rest[h, i0:i1], tail[h, i0:i1] if kind == TAIL else tail[h, :0],
            kind, fill[h, i0:i1], total, stats[h, i0:i1],
        )  # fmt: skip
        if width > 0:
            if r > 0:
                np.dot(s, values[h], part)
            else:
                part[:] = zero
            first = 0 if base.shape[1] == 1 else item - h * tiles
            for c in range(width):
                sums[c] = base[h, first, c]
                shared[c] = q.dtype.type(sums[c])
            reached = ends[i0] if ends.size > 0 else 0
        for i in range(rows):
            inverse = one / total[i] if total[i] > zero else zero
            g = fill[h, i0 + i] * inverse
            fill[h, i0 + i] = g
            for t in range(stored):
                weights[h, i0 + i, t] = s[i, t] * inverse
            if width > 0:
                if ends.size > 0:
                    for j in range(reached, ends[i0 + i]):
                        if keep[h, j]:
                            for c in range(width):
                                sums[c] += v[h, j, c]
                    reached = ends[i0 + i]
                    for c in range(width):
                        shared[c] = q.dtype.type(sums[c])
                for c in range(width):
                    out[h, i0 + i, c] = part[i, c] * inverse + g * shared[c]


@kernel(dealt=True)
def block_sums(turn: Array, v: Array, keep: Array, bounds: Array, parts: Array) -> None:
    """``parts[h, b] (m,)``, float64: the sum of ``v[h, j]`` over keys kept in block b of keys.

    ``v (H, n_k, m)``, ``keep (H, n_k)`` bool; block b is ``bounds[b] <= j < bounds[b + 1]``.
    """
    heads, blocks, width = parts.shape
    for _ in range(heads * blocks):
        item = take(turn)
        if item >= heads * blocks:
            break
        h = item // blocks
        b = item - h * blocks
        for c in range(width):
            parts[h, b, c] = 0.0
        for j in range(bounds[b], bounds[b + 1]):
            if keep[h, j]:
                for c in range(width):
                    parts[h, b, c] += v[h, j, c]


@kernel(dealt=True)
def pilot_norms(
    turn: Array, k: Array, pilots: Array, bias: Array, first: Array, tile: int, out: Array
) -> None:
    """``out_j = log2 sum_t 2^(k_j . pilots_t + bias_t) (H, n_k)`` over ``t >= first_j``.

    ``k (H, n_k, d)``, ``pilots (H, s, d)``, ``bias (H, s)``, ``first (H, n_k)`` or of size 0;
    ``out`` is float64, -inf where there is no such t.
    """
    heads, n_k, _ = k.shape
    count = pilots.shape[1]
    tiles = (n_k + tile - 1) // tile
    lowest = k.dtype.type(-np.inf)
    buffer = np.empty(tile * count, k.dtype)
    for _ in range(heads * tiles):
        item = take(turn)
        if item >= heads * tiles:
            break
        h = item // tiles
        j0 = (item - h * tiles) * tile
        j1 = min(j0 + tile, n_k)
        s = buffer[: (j1 - j0) * count].reshape((j1 - j0, count))
        np.dot(k[h, j0:j1], pilots[h].T, s)
        for i in range(j1 - j0):
            start = first[h, j0 + i] if first.size > 0 else 0
            row = s[i, start:]
            for t in range(row.size):
                row[t] += bias[h, start + t]
            high = row_maximum(row)
            if high == lowest:
                out[h, j0 + i] = -np.inf
                continue
            total = k.dtype.type(0.0)
            for t in range(row.size):
                total += exp2(k.dtype.type(row[t] - high))
            out[h, j0 + i] = high + np.log2(np.float64(total))


@kernel(dealt=True)
def row_norms(turn: Array, x: Array, size: Array, block: int, out: Array) -> None:
    """``out_hi = size_h |x_hi / size_h|``, float64, for ``x (H, n, m)`` up to ``size (H,)``."""
    heads, n, width = x.shape
    blocks = (n + block - 1) // block
    for _ in range(heads * blocks):
        item = take(turn)
        if item >= heads * blocks:
            break
        h = item // blocks
        b = item - h * blocks
        for i in range(b * block, min((b + 1) * block, n)):
            total = 0.0
            for c in range(width):
                y = np.float64(x[h, i, c]) / size[h]
                total += y * y
            out[h, i] = size[h] * np.sqrt(total)


# --- drivers --------------------------------------------------------------------------------


def log_column_norms(
    k: Array,
    pilots: Array,
    lse: Array,
    *,
    scale: float,
    counts: Array,
    positions: Array | None,
) -> Array:
    """Return ``(1/2) ln sum_i counts_i exp(2 (scale k_j . q_i - lse_i))``, float64 (H, n_k).

    It is half a logsumexp over the pilot queries, so that no array of their rows is formed, and
    no square underflows.  Nothing is validated.

    Parameters
    ----------
    k : ndarray (H, n_k, d)
    pilots : ndarray (H, s, d)
        Pilot queries.
    lse : float64 array (H, s)
        -inf for a query that sees no key, which does not count.
    scale : float
    counts : float64 array (H, s)
        How often each was drawn.
    positions : int64 array (H, s), optional
        Ascending: pilot i sees the keys up to this one; None: all keys.
    """
    dtype, (heads, n_k, _) = k.dtype, k.shape
    bias = np.where(lse > -np.inf, np.log2(counts) - 2.0 * LOG2E * lse, -np.inf).astype(dtype)
    first = np.empty((0, n_k), np.int64)
    if positions is not None:
        first = np.stack([np.searchsorted(x, np.arange(n_k)) for x in positions])
    out = np.empty((heads, n_k))
    scaled = dtype.type(2.0 * scale * LOG2E) * pilots
    tile = tile_rows(n_k, pilots.shape[1])
    work = heads * n_k * pilots.shape[1] * (1 + PRODUCT * k.shape[2])
    deal(pilot_norms, k, scaled, bias, first, tile, out, work=work)
    out *= 0.5 * LN2
    return out


def euclidean_norms(x: Array) -> Array:
    """Return the Euclidean norms of the rows of ``x (H, n, m)``, float64, without underflow."""
    size = np.maximum(np.max(x, axis=(1, 2), initial=0.0), -np.min(x, axis=(1, 2), initial=0.0))
    size = size.astype(np.float64)
    size[size == 0.0] = 1.0
    out = np.empty(x.shape[:2])
    deal(row_norms, x, size, SUM_BLOCK, out, work=x.size)
    return out


class SampledProduct(NamedTuple):
    """Hold what one pass computes.

    Attributes
    ----------
    out : ndarray (H, n_q, m)
    weights : ndarray (H, n_q, r)
        Entries at the sampled columns, or (H, n_q, 0).
    fill : ndarray (H, n_q)
        Entry at every key that a row sees outside J.
    log_fill, log_total : ndarray (H, n_q)
        Natural logarithms of g and D, with the row's logits as they are.
    """

    out: Array
    weights: Array
    fill: Array
    log_fill: Array
    log_total: Array


def tile_rows(n_q: int, r: int) -> int:
    """Return the queries of a tile: as many as `row_tile` says, and few where r is large.

    It knows nothing of the other heads of a call, whose number then does not change a bit.
    """
    return max(8, min(row_tile(n_q), TILE_ENTRIES // max(r, 1)))


def sampled_product(
    q: Array,
    k: Array,
    v: Array,
    columns: Array,
    *,
    scale: float,
    kind: str,
    seen: Array,
    rest: Array,
    keep: Array,
    bias: Array | None = None,
    tail: Array | None = None,
    ends: Array | None = None,
    store: bool = False,
) -> SampledProduct:
    """Return the product of sampled columns with V, and what it is made of, for many heads.

    Nothing is validated; arrays are C-contiguous and of one precision.

    Parameters
    ----------
    q, k, v : ndarray (H, n_q, d), (H, n_k, d), (H, n_k, m)
    columns : int64 array (H, r)
        Ascending.
    scale : float
    kind : str
        A key of ``KINDS``.
    seen, rest : int64 arrays (H, n_q)
        Numbers of columns and of other keys that each row sees.
    keep : bool array (H, n_k)
        The other keys.
    bias : ndarray (H, r), optional
        Added to the logits.
    tail : ndarray (H, n_q), optional
        For "oracle": logsumexp of the other keys that a row sees.
    ends : int64 array (n_q,), optional
        Row i reaches the keys below ``ends[i]``, which never falls.
    store : bool
        Whether to return the weights.
    """
    heads, n_q, _ = q.shape
    n_k, width = v.shape[1:]
    r = columns.shape[1]
    dtype = q.dtype
    which = np.arange(heads)[:, None]
    keys, values = (np.ascontiguousarray(x[which, columns]) for x in (k, v))
    tile = tile_rows(n_q, r)
    if ends is None:
        bounds = np.append(np.arange(0, n_k, SUM_BLOCK), n_k)
    else:
        bounds = np.append(0, ends[::tile])
    parts = np.empty((heads, len(bounds) - 1, width))
    out = np.empty((heads, n_q, width), dtype)
    weights = np.empty((heads, n_q, r if store else 0), dtype)
    fill = np.empty((heads, n_q), dtype)
    stats = np.empty((heads, n_q, 2), dtype)
    if width:
        deal(block_sums, v, keep, bounds, parts, work=v.size)
    base = parts.sum(axis=1, keepdims=True) if ends is None else np.cumsum(parts, axis=1)
    deal(
        sampled_softmax,
        q,
        keys,
        values,
        np.empty((0, r), dtype) if bias is None else bias,
        seen,
        rest,
        np.empty((heads, 0), dtype) if tail is None else tail,
        KINDS[kind],
        v,
        keep,
        np.empty(0, np.int64) if ends is None else ends,
        base,
        scale,
        tile,
        weights,
        fill,
        stats,
        out,
        work=heads * n_q * (width + r * (1 + PRODUCT * (q.shape[2] + width))),
    )
    return SampledProduct(out, weights, fill, stats[..., 0], stats[..., 1])
