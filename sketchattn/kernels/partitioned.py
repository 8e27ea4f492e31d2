"""Direct keys and region summaries under one softmax: BLAS a tile where rows share slots.

With direct keys ``D_i`` and regions t in ``T_i`` that have keys a_t and biases b_t a row is

    s_ij = scale q_i . k_j,   g_it = scale f_i . a_t + b_t,
    Z_i = sum_(j in D_i) exp(s_ij) + sum_(t in T_i) exp(g_it),
    Ohat_i = (sum_j exp(s_ij) x_j + sum_t exp(g_it) xhat_t) / Z_i,

with ``f = q``, or the squares of q appended where a region has a second-order term.  Logits are in
base 2 and relative to the largest of a row: no exponential can overflow.  A pass leaves for each
row its largest logit ``top``, ``total = sum 2^(s - top)`` and ``out = sum 2^(s - top) x``, which
the next pass goes on from; the last one divides.

Regions are ranges of a list of keys, ``items[lo[t] : hi[t]]``, and their local weights lie at
``lam[at[t] : at[t] + hi[t] - lo[t]]``.  Work is dealt to threads by whole regions, rows or tiles,
each summed in an order of its own: results do not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import add_product, kernel, take
from .softmax import LOG2E, exp2, online_softmax, row_maximum

Array = NDArray[Any]

# Numba's cache watches this file only.  These are the first digits of the SHA-256 of the bodies
# that are compiled into these kernels from another file; a test compares them, and changing
# them here makes the cache start afresh.
FOREIGN = "150c499d"

# Kinds of reference query: given rows, the mean or the coordinate-wise maximum of the queries
# at the positions of the region.
GIVEN, MEAN, MAXIMUM = 0, 1, 2
# Kinds of region key: sum of lam k, mean, coordinate-wise maximum.
KEYS = {"expected": 0, "mean": 1, "max": 2}

ROW_TILE, KEY_TILE = 128, 512
# Rows that share a region in full: BLAS is a fifth faster at this height than at half of it.  A
# tile of rows that each see one key more than the last computes the half that they do not see, so
# that such tiles stay lower.
WHOLE_TILE = 256


# --- summaries ----------------------------------------------------------------------------------


@kernel(dealt=True)
def summarize(
    turn: Array,
    k: Array, q: Array, q0: Array, reference: int, key: int, lo: Array, hi: Array, at: Array,
    items: Array, order: Array, widest: int, scale: float, squares: bool,
    lam: Array, kappa: Array, entropy: Array, spread: Array, log_weight: Array,
) -> None:  # fmt: skip
    """Summarise every region t by its reference query: ``lam_t = softmax(scale q0_t . k_j)``.

    ``kappa (N, d)`` is the region key, ``entropy (N,)`` H(lam_t), -inf for an empty region,
    ``spread (N, d)`` the variances of the coordinates of k under lam if ``squares``, ``log_weight
    (N,)`` float64 ``ln sum_j exp(scale q0_t . k_j)``.  ``q0 (N, d)`` or (1, d) float64 is read for
    the reference GIVEN, ``q (n, d)`` otherwise; ``lam`` of size 0 is not stored.  Regions are dealt
    in ``order``.  All sums are float64.
    """
    d = k.shape[1]
    count = order.size
    weights = np.empty(widest, np.float64)
    reference_row = np.empty(d, np.float64)
    row = np.empty(d, np.float64)
    square = np.empty(d, np.float64)
    for _ in range(count):
        p = take(turn)
        if p >= count:
            break
        t = order[p]
        size = hi[t] - lo[t]
        if size <= 0:
            entropy[t] = -np.inf
            log_weight[t] = -np.inf
            kappa[t] = 0.0
            if squares:
                spread[t] = 0.0
            continue
        if reference == GIVEN:
            source = t if q0.shape[0] > 1 else 0
            for c in range(d):
                reference_row[c] = scale * q0[source, c]
        elif reference == MEAN:
            reference_row[:] = 0.0
            for x in range(lo[t], hi[t]):
                j = items[x] if items.size > 0 else x
                for c in range(d):
                    reference_row[c] += q[j, c]
            for c in range(d):
                reference_row[c] *= scale / size
        else:
            reference_row[:] = -np.inf
            for x in range(lo[t], hi[t]):
                j = items[x] if items.size > 0 else x
                for c in range(d):
                    reference_row[c] = max(reference_row[c], np.float64(q[j, c]))
            for c in range(d):
                reference_row[c] *= scale
        high = -np.inf
        for x in range(size):
            j = items[lo[t] + x] if items.size > 0 else lo[t] + x
            e = 0.0
            for c in range(d):
                e += reference_row[c] * np.float64(k[j, c])
            weights[x] = e
            high = e if e > high else high
        total = 0.0
        moment = 0.0
        for x in range(size):
            shifted = weights[x] - high
            w = exp2(np.float64(LOG2E * shifted))
            weights[x] = w
            total += w
            moment += w * shifted
        inverse = 1.0 / total
        # H(lam) = ln W - E / W lies between 0 and ln m; rounding must not leave that.
        found = np.log(total) - moment * inverse
        entropy[t] = min(max(found, 0.0), np.log(np.float64(size)))
        log_weight[t] = high + np.log(total)
        row[:] = 0.0
        for x in range(size):
            j = items[lo[t] + x] if items.size > 0 else lo[t] + x
            w = weights[x] * inverse
            weights[x] = w
            for c in range(d):
                row[c] += w * np.float64(k[j, c])
        if lam.size > 0:
            for x in range(size):
                lam[at[t] + x] = weights[x]
        if squares:
            square[:] = 0.0
            for x in range(size):
                j = items[lo[t] + x] if items.size > 0 else lo[t] + x
                w = weights[x]
                for c in range(d):
                    difference = np.float64(k[j, c]) - row[c]
                    square[c] += w * difference * difference
            for c in range(d):
                spread[t, c] = square[c]
        if key == 0:
            for c in range(d):
                kappa[t, c] = row[c]
        elif key == 1:
            row[:] = 0.0
            for x in range(size):
                j = items[lo[t] + x] if items.size > 0 else lo[t] + x
                for c in range(d):
                    row[c] += np.float64(k[j, c])
            for c in range(d):
                kappa[t, c] = row[c] / size
        else:
            row[:] = -np.inf
            for x in range(size):
                j = items[lo[t] + x] if items.size > 0 else lo[t] + x
                for c in range(d):
                    row[c] = max(row[c], np.float64(k[j, c]))
            for c in range(d):
                kappa[t, c] = row[c]


@kernel(dealt=True)
def spread_values(
    turn: Array, lam: Array, lo: Array, hi: Array, at: Array, items: Array, x: Array, order: Array,
    out: Array,
) -> None:  # fmt: skip
    """``out_t = sum_(j in region t) lam_t(j) x_j (N, m)``; sums are float64."""
    width = x.shape[1]
    row = np.empty(width, np.float64)
    for _ in range(order.size):
        p = take(turn)
        if p >= order.size:
            break
        t = order[p]
        row[:] = 0.0
        for y in range(hi[t] - lo[t]):
            j = items[lo[t] + y] if items.size > 0 else lo[t] + y
            w = np.float64(lam[at[t] + y])
            for c in range(width):
                row[c] += w * np.float64(x[j, c])
        for c in range(width):
            out[t, c] = row[c]


@kernel(dealt=True)
def gather_values(
    turn: Array,
    lam: Array, lo: Array, hi: Array, at: Array, items: Array, z: Array, first: int, last: int,
    out: Array,
) -> None:  # fmt: skip
    """``out_j += lam_t(j) z_t`` for the regions ``first <= t < last``, which share no key."""
    width = z.shape[1]
    for _ in range(last - first):
        t = first + take(turn)
        if t >= last:
            break
        for y in range(hi[t] - lo[t]):
            j = items[lo[t] + y] if items.size > 0 else lo[t] + y
            w = lam[at[t] + y]
            for c in range(width):
                out[j, c] += w * z[t, c]


# --- the tree -----------------------------------------------------------------------------------


@kernel(dealt=True)
def tree_level(
    turn: Array, x: Array, left: Array, first: int, below: int, count: int, children: int
) -> None:
    """Merge two children a node: ``x_t = w x_left + (1 - w) x_right`` with ``w = left_t``.

    Nodes ``first, ..., first + count - 1`` of a level have the children ``below + 2 b`` and
    ``below + 2 b + 1``; with an odd number of ``children`` the last node has one.
    """
    width = x.shape[1]
    tiles = (count + ROW_TILE - 1) // ROW_TILE
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        for b in range(item * ROW_TILE, min((item + 1) * ROW_TILE, count)):
            t = first + b
            a = below + 2 * b
            w = left[t]
            if w == x.dtype.type(1.0):  # one child, or another without keys
                for c in range(width):
                    x[t, c] = x[a, c]
            elif w == x.dtype.type(0.0):
                a += 1 if 2 * b + 1 < children else 0
                for c in range(width):
                    x[t, c] = x[a, c]
            else:
                v = x.dtype.type(1.0) - w
                for c in range(width):
                    x[t, c] = w * x[a, c] + v * x[a + 1, c]


@kernel(dealt=True)
def tree_leaves(turn: Array, x: Array, left: Array, count: int, n: int, out: Array) -> None:
    """Nodes of two keys each: ``out_b = w x_(2b) + (1 - w) x_(2b + 1)``."""
    width = x.shape[1]
    tiles = (count + ROW_TILE - 1) // ROW_TILE
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        for b in range(item * ROW_TILE, min((item + 1) * ROW_TILE, count)):
            w = left[b]
            if w == out.dtype.type(1.0):
                for c in range(width):
                    out[b, c] = x[2 * b, c]
            elif w == out.dtype.type(0.0):
                for c in range(width):
                    out[b, c] = x[min(2 * b + 1, n - 1), c]
            else:
                v = out.dtype.type(1.0) - w
                for c in range(width):
                    out[b, c] = w * x[2 * b, c] + v * x[2 * b + 1, c]


# --- lines of a grid ----------------------------------------------------------------------------


@kernel()
def _fold_key(mean: Array, row: Array, e: float, weight: float, inside: float) -> Any:
    """Merge one key into a running record: ``ln W``, weighted mean, entropy of the weights.

    With ``w = e^(e - ln W')`` for the key, v for the rest: ``mean' = v mean + w x`` and
    ``H' = v (H - ln v) - w ln w``.  Returns ``(ln W', H')``.
    """
    if weight == -np.inf:
        for c in range(mean.size):
            mean[c] = row[c]
        return e, 0.0
    high = max(weight, e)
    total = high + np.log(np.exp(weight - high) + np.exp(e - high))
    w = np.exp(e - total)
    v = np.exp(weight - total)
    for c in range(mean.size):
        mean[c] = v * mean[c] + w * np.float64(row[c])
    return total, max(v * (inside - (weight - total)) - w * (e - total), 0.0)


@kernel(dealt=True)
def line_means(
    turn: Array, x: Array, e: Array, items: Array, low: Array, high: Array, cut: Array, past: Array,
    sites: int, mode: int, out: Array, log_weight: Array, entropy: Array,
) -> None:  # fmt: skip
    """Weighted means of every line before (mode 1), after (2) or without (3) each place.

    Line h is ``items[low[h] : high[h]]``; region ``t = g H + h`` has the slots below ``cut[t]`` and
    from ``past[t]`` on.  Weights are ``exp(e_j)`` with ``e (n_k,)``; also their logarithmic sum and
    entropy, ``(G H,)`` float64, -inf without keys.  A scan each way, and one merge a region.
    """
    width = x.shape[1]
    lines = low.size
    mean = np.empty(width, np.float64)
    for _ in range(lines):
        h = take(turn)
        if h >= lines:
            break
        if mode != 2:
            weight = -np.inf
            inside = 0.0
            mean[:] = 0.0
            u = low[h]
            for g in range(sites):
                t = g * lines + h
                while u < cut[t]:
                    j = items[u]
                    weight, inside = _fold_key(mean, x[j], e[j], weight, inside)
                    u += 1
                log_weight[t] = weight
                entropy[t] = inside if weight > -np.inf else -np.inf
                for c in range(width):
                    out[t, c] = mean[c]
        if mode != 1:
            weight = -np.inf
            inside = 0.0
            mean[:] = 0.0
            u = high[h]
            for back in range(sites):
                t = (sites - 1 - back) * lines + h
                while u > past[t]:
                    u -= 1
                    j = items[u]
                    weight, inside = _fold_key(mean, x[j], e[j], weight, inside)
                other = log_weight[t] if mode == 3 else -np.inf
                if other == -np.inf:
                    log_weight[t] = weight
                    entropy[t] = inside if weight > -np.inf else -np.inf
                    for c in range(width):
                        out[t, c] = mean[c]
                elif weight > -np.inf:
                    top = max(weight, other)
                    total = top + np.log(np.exp(weight - top) + np.exp(other - top))
                    w = np.exp(weight - total)
                    v = np.exp(other - total)
                    first = v * (entropy[t] - (other - total))
                    entropy[t] = max(first + w * (inside - (weight - total)), 0.0)
                    log_weight[t] = total
                    for c in range(width):
                        out[t, c] = v * np.float64(out[t, c]) + w * mean[c]


# --- slots in tiles of rows that share them -----------------------------------------------------


@kernel()
def _hide_slots(s: Array, rows: Array, j0: int, ends: Array, skip: Array) -> None:
    """Set the logits of slots from ``ends[i]`` on, and of slot ``skip[i]``, to -inf."""
    lowest = s.dtype.type(-np.inf)
    for r in range(s.shape[0]):
        if ends.size > 0:
            for u in range(max(ends[rows[r]] - j0, 0), s.shape[1]):
                s[r, u] = lowest
        if skip.size > 0:
            u = skip[rows[r]] - j0
            if 0 <= u < s.shape[1]:
                s[r, u] = lowest


@kernel()
def _weigh(s: Array, rows: Array, top: Array, total: Array, shifts: Array) -> None:
    """Turn a tile of logits into weights, and fold their sums into the rows that it belongs to.

    ``m' = max(m, max_u s_u)``, ``l' = 2^(m - m') l + sum_u 2^(s_u - m')`` with m in ``top`` and l
    in ``total (n_q,)``; ``shifts (rows,)`` get ``2^(m - m')``, by which sums of values shrink.
    """
    lowest = s.dtype.type(-np.inf)
    zero = s.dtype.type(0.0)
    for r in range(s.shape[0]):
        i = rows[r]
        high = row_maximum(s[r])
        before = top[i]
        shifts[r] = s.dtype.type(1.0)
        if high > before:
            shifts[r] = exp2(s.dtype.type(before - high))
            top[i] = high
        # A row without a visible key so far has no maximum: its weights are 2^(-inf - 0) = 0.
        m = top[i] if top[i] != lowest else zero
        part = zero
        for u in range(s.shape[1]):
            e = exp2(s.dtype.type(s[r, u] - m))
            s[r, u] = e
            part += e
        total[i] = shifts[r] * total[i] + part


@kernel(dealt=True)
def near(
    turn: Array, q: Array, k: Array, x: Array, bias: Array, order: Array, first: Array, last: Array,
    region: Array, lo: Array, hi: Array, items: Array, ends: Array, skip: Array, scale: float,
    row_tile: int, key_tile: int, top: Array, total: Array, out: Array,
) -> None:  # fmt: skip
    """Fold the slots of region ``t = region[p]`` into the rows ``order[first[p] : last[p]]``.

    Slots are ``lo[t] <= u < hi[t]``.  Slot u has key ``k[items[u]]`` and value ``x[items[u]]`` (no
    ``items``: u itself) and, if ``bias`` is not of size 0, ``bias[u]`` in base 2.  Row i sees the
    slots below ``ends[i]`` without ``skip[i]``; arrays of size 0: all.  Every row is in one tile at
    most, of up to ``row_tile`` rows.
    """
    d = q.shape[1]
    width = x.shape[1]
    factor = q.dtype.type(scale * LOG2E)
    gathered = items.size > 0
    query_buffer = np.empty(row_tile * d, q.dtype)
    logit_buffer = np.empty(row_tile * key_tile, q.dtype)
    key_buffer = np.empty((key_tile if gathered else 0) * d, q.dtype)
    value_buffer = np.empty((key_tile if gathered else 0) * width, q.dtype)
    part_buffer = np.empty(row_tile * width, q.dtype)
    shifts = np.empty(row_tile, q.dtype)
    for _ in range(first.size):
        p = take(turn)
        if p >= first.size:
            break
        t = region[p]
        rows = last[p] - first[p]
        start = lo[t]
        stop = hi[t]
        if ends.size > 0:
            latest = start
            for r in range(first[p], last[p]):
                latest = max(latest, ends[order[r]])
            stop = min(stop, latest)
        if stop <= start or rows <= 0:
            continue
        scaled = query_buffer[: rows * d].reshape((rows, d))
        part = part_buffer[: rows * width].reshape((rows, width))
        mine = order[first[p] : last[p]]
        for r in range(rows):
            i = mine[r]
            for c in range(d):
                scaled[r, c] = factor * q[i, c]
        for j0 in range(start, stop, key_tile):
            j1 = min(j0 + key_tile, stop)
            cols = j1 - j0
            s = logit_buffer[: rows * cols].reshape((rows, cols))
            if gathered:
                keys = key_buffer[: cols * d].reshape((cols, d))
                values = value_buffer[: cols * width].reshape((cols, width))
                for y in range(cols):
                    j = items[j0 + y]
                    for c in range(d):
                        keys[y, c] = k[j, c]
                    for c in range(width):
                        values[y, c] = x[j, c]
            else:
                keys = k[j0:j1]
                values = x[j0:j1]
            np.dot(scaled, keys.T, s)
            if bias.size > 0:
                for r in range(rows):
                    for y in range(cols):
                        s[r, y] += bias[j0 + y]
            _hide_slots(s, mine, j0, ends, skip)
            _weigh(s, mine, top, total, shifts)
            if width > 0:
                np.dot(s, values, part)
                for r in range(rows):
                    i = mine[r]
                    shift = shifts[r]
                    for c in range(width):
                        out[i, c] = shift * out[i, c] + part[r, c]


@kernel(dealt=True)
def near_transposed(
    turn: Array, q: Array, k: Array, y: Array, lse: Array, bias: Array, order: Array, first: Array,
    last: Array, groups: Array, region: Array, lo: Array, hi: Array, items: Array, ends: Array,
    skip: Array, scale: float, row_tile: int, key_tile: int, out: Array,
) -> None:  # fmt: skip
    """``out_u += sum_i exp(s_iu - lse_i) y_i`` over the tiles ``groups[g] <= p < groups[g + 1]``.

    Slots and rows are those of `near`.  Tiles of one group share their region, and regions of
    different groups share no slot; ``out`` has a row for each key, ``items[u]``.
    """
    d = q.shape[1]
    width = y.shape[1]
    factor = q.dtype.type(scale * LOG2E)
    to_bits = q.dtype.type(LOG2E)
    lowest = q.dtype.type(-np.inf)
    zero = q.dtype.type(0.0)
    gathered = items.size > 0
    query_buffer = np.empty(row_tile * d, q.dtype)
    weight_buffer = np.empty(row_tile * width, q.dtype)
    logit_buffer = np.empty(row_tile * key_tile, q.dtype)
    key_buffer = np.empty((key_tile if gathered else 0) * d, q.dtype)
    part_buffer = np.empty(key_tile * width, q.dtype)
    for _ in range(groups.size - 1):
        g = take(turn)
        if g >= groups.size - 1:
            break
        if groups[g + 1] == groups[g]:
            continue
        t = region[groups[g]]
        for j0 in range(lo[t], hi[t], key_tile):
            j1 = min(j0 + key_tile, hi[t])
            cols = j1 - j0
            part = part_buffer[: cols * width].reshape((cols, width))
            if gathered:
                keys = key_buffer[: cols * d].reshape((cols, d))
                for u in range(cols):
                    for c in range(d):
                        keys[u, c] = k[items[j0 + u], c]
            else:
                keys = k[j0:j1]
            for p in range(groups[g], groups[g + 1]):
                rows = last[p] - first[p]
                scaled = query_buffer[: rows * d].reshape((rows, d))
                given = weight_buffer[: rows * width].reshape((rows, width))
                s = logit_buffer[: rows * cols].reshape((rows, cols))
                for r in range(rows):
                    i = order[first[p] + r]
                    for c in range(d):
                        scaled[r, c] = factor * q[i, c]
                    for c in range(width):
                        given[r, c] = y[i, c]
                np.dot(scaled, keys.T, s)
                for r in range(rows):
                    i = order[first[p] + r]
                    b = lse[i] * to_bits if lse[i] != lowest else zero
                    for u in range(cols):
                        s[r, u] -= b
                    if bias.size > 0:
                        for u in range(cols):
                            s[r, u] += bias[j0 + u]
                _hide_slots(s, order[first[p] : last[p]], j0, ends, skip)
                # What was hidden may lie far above the normaliser: out before it overflows.
                for r in range(rows):
                    for u in range(cols):
                        s[r, u] = exp2(s[r, u])
                np.dot(s.T, given, part)
                for u in range(cols):
                    j = items[j0 + u] if gathered else j0 + u
                    for c in range(width):
                        out[j, c] += part[u, c]


@kernel(dealt=True)
def finish(turn: Array, top: Array, total: Array, tile: int, out: Array, lse: Array) -> None:
    """Divide ``out (n_q, m)`` by ``total``, write ``lse (n_q,)``, natural; zeros without keys."""
    n_q, width = out.shape
    natural = out.dtype.type(1.0 / LOG2E)
    lowest = out.dtype.type(-np.inf)
    zero = out.dtype.type(0.0)
    tiles = (n_q + tile - 1) // tile
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        for i in range(item * tile, min((item + 1) * tile, n_q)):
            if total[i] == zero:
                lse[i] = lowest
                continue
            lse[i] = natural * (top[i] + np.log2(total[i]))
            inverse = out.dtype.type(1.0) / total[i]
            for c in range(width):
                out[i, c] *= inverse


# --- regions that all rows share ----------------------------------------------------------------


@kernel()
def _hide_regions(s: Array, i0: int, j0: int, limit: Array, skip: Array) -> None:
    """Set logits of regions ``t >= limit_i`` and of the regions ``skip_i`` to -inf."""
    lowest = s.dtype.type(-np.inf)
    for r in range(s.shape[0]):
        if limit.size > 0:
            for u in range(max(limit[i0 + r] - j0, 0), s.shape[1]):
                s[r, u] = lowest
        for z in range(skip.shape[1]):
            u = skip[i0 + r, z] - j0
            if 0 <= u < s.shape[1]:
                s[r, u] = lowest


@kernel(dealt=True)
def far(
    turn: Array,
    f: Array, keys: Array, bias: Array, xhat: Array, limit: Array, skip: Array, scale: float,
    row_tile: int, key_tile: int, top: Array, total: Array, out: Array,
) -> None:  # fmt: skip
    """Fold all regions into every row but those hidden.

    ``f (n_q, e)``, ``keys (R, e)``, ``bias (R,)`` in base 2, ``xhat (R, m)``; row i sees regions
    ``t < limit_i`` (``limit.size = 0``: all) that are not among ``skip_i (n_q, z)``, -1 for none.
    """
    n_q, e = f.shape
    count = keys.shape[0]
    width = xhat.shape[1]
    tiles = (n_q + row_tile - 1) // row_tile
    factor = f.dtype.type(scale * LOG2E)
    query_buffer = np.empty(row_tile * e, f.dtype)
    logit_buffer = np.empty(row_tile * key_tile, f.dtype)
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        i0 = item * row_tile
        i1 = min(i0 + row_tile, n_q)
        rows = i1 - i0
        scaled = query_buffer[: rows * e].reshape((rows, e))
        for r in range(rows):
            for c in range(e):
                scaled[r, c] = factor * f[i0 + r, c]
        end = count
        if limit.size > 0:
            end = 0
            for i in range(i0, i1):
                end = max(end, limit[i])
        for j0 in range(0, end, key_tile):
            j1 = min(j0 + key_tile, end)
            s = logit_buffer[: rows * (j1 - j0)].reshape((rows, j1 - j0))
            np.dot(scaled, keys[j0:j1].T, s)
            for r in range(rows):
                for u in range(j1 - j0):
                    s[r, u] += bias[j0 + u]
            _hide_regions(s, i0, j0, limit, skip)
            online_softmax(s, top[i0:i1], total[i0:i1], out[i0:i1])
            if width > 0:
                add_product(s, xhat[j0:j1], out[i0:i1])


@kernel()
def _is_any(values: Array, value: int) -> bool:
    """Say whether a number is among a few."""
    for z in range(values.size):  # noqa: SIM110  (no generators in kernels)
        if values[z] == value:
            return True
    return False


@kernel(dealt=True)
def heaviest(
    turn: Array,
    f: Array, keys: Array, bias: Array, limit: Array, skip: Array, scale: float, row_tile: int,
    key_tile: int, chosen: Array,
) -> None:  # fmt: skip
    """Write the regions of largest logit of each row, largest first; of equal ones the lower comes.

    Rows and regions are those of `far`; ``chosen (n_q, t)`` gets -1 where a row sees fewer.
    """
    n_q, e = f.shape
    count = keys.shape[0]
    most = chosen.shape[1]
    tiles = (n_q + row_tile - 1) // row_tile
    factor = f.dtype.type(scale * LOG2E)
    lowest = f.dtype.type(-np.inf)
    query_buffer = np.empty(row_tile * e, f.dtype)
    logit_buffer = np.empty(row_tile * key_tile, f.dtype)
    best = np.empty((row_tile, most), f.dtype)
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        i0 = item * row_tile
        i1 = min(i0 + row_tile, n_q)
        rows = i1 - i0
        scaled = query_buffer[: rows * e].reshape((rows, e))
        for r in range(rows):
            for c in range(e):
                scaled[r, c] = factor * f[i0 + r, c]
        best[:] = lowest
        chosen[i0:i1] = -1
        end = count
        if limit.size > 0:
            end = 0
            for i in range(i0, i1):
                end = max(end, limit[i])
        for j0 in range(0, end, key_tile):
            j1 = min(j0 + key_tile, end)
            s = logit_buffer[: rows * (j1 - j0)].reshape((rows, j1 - j0))
            np.dot(scaled, keys[j0:j1].T, s)
            for r in range(rows):
                i = i0 + r
                last = best[r, most - 1]
                stop = j1 if limit.size == 0 else min(j1, limit[i])
                for t in range(j0, stop):
                    g = s[r, t - j0] + bias[t]
                    if not g > last or _is_any(skip[i], t):
                        continue
                    z = most - 1
                    while z > 0 and g > best[r, z - 1]:
                        best[r, z] = best[r, z - 1]
                        chosen[i, z] = chosen[i, z - 1]
                        z -= 1
                    best[r, z] = g
                    chosen[i, z] = t
                    last = best[r, most - 1]


@kernel(dealt=True)
def far_transposed(
    turn: Array,
    f: Array, keys: Array, bias: Array, y: Array, lse: Array, limit: Array, skip: Array,
    scale: float, row_tile: int, key_tile: int, out: Array,
) -> None:  # fmt: skip
    """``out_t = sum_i exp(g_it - lse_i) y_i (R, m)`` over the rows that see region t."""
    n_q, e = f.shape
    count = keys.shape[0]
    tiles = (count + key_tile - 1) // key_tile
    factor = f.dtype.type(scale * LOG2E)
    to_bits = f.dtype.type(LOG2E)
    lowest = f.dtype.type(-np.inf)
    zero = f.dtype.type(0.0)
    query_buffer = np.empty(row_tile * e, f.dtype)
    logit_buffer = np.empty(row_tile * key_tile, f.dtype)
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        j0 = item * key_tile
        j1 = min(j0 + key_tile, count)
        cols = j1 - j0
        out[j0:j1] = zero
        for i0 in range(0, n_q, row_tile):
            i1 = min(i0 + row_tile, n_q)
            rows = i1 - i0
            scaled = query_buffer[: rows * e].reshape((rows, e))
            s = logit_buffer[: rows * cols].reshape((rows, cols))
            for r in range(rows):
                for c in range(e):
                    scaled[r, c] = factor * f[i0 + r, c]
            np.dot(scaled, keys[j0:j1].T, s)
            for r in range(rows):
                b = lse[i0 + r] * to_bits if lse[i0 + r] != lowest else zero
                for u in range(cols):
                    s[r, u] += bias[j0 + u] - b
            _hide_regions(s, i0, j0, limit, skip)
            for r in range(rows):
                for u in range(cols):
                    s[r, u] = exp2(s[r, u])
            add_product(s.T, y[i0:i1], out[j0:j1])


# --- sibling blocks of a dyadic tree ------------------------------------------------------------


@kernel()
def _dot(a: Array, b: Array) -> Any:
    """Return ``a . b`` of two rows of equal length."""
    total = a.dtype.type(0.0)
    for c in range(a.size):
        total += a[c] * b[c]
    return total


@kernel(dealt=True)
def dyadic(
    turn: Array, q: Array, k: Array, x: Array, f: Array, keys: Array, bias: Array, xhat: Array,
    offsets: Array, lowest_level: int, half: bool, causal: bool, keep: Array, scale: float,
    tile: int, top: Array, total: Array, out: Array, lse: Array,
) -> None:  # fmt: skip
    """Fold the sibling block of each level into every row, divide, and write ``lse (n,)``.

    Row i at level e uses block ``(i >> e) ^ 1``: node ``offsets[e]`` plus that number, or half of
    it where only even ones are stored (``half``).  With ``lowest_level = 0`` the row's own key and
    its neighbour are folded too.  ``keep (n,)`` bool or of size 0.
    """
    n, d = q.shape
    e_width = f.shape[1]
    width = x.shape[1]
    levels = offsets.size
    tiles = (n + tile - 1) // tile
    factor = q.dtype.type(scale * LOG2E)
    natural = q.dtype.type(1.0 / LOG2E)
    minus = q.dtype.type(-np.inf)
    one = q.dtype.type(1.0)
    scaled = np.empty(d, q.dtype)
    wide = np.empty(e_width, q.dtype)
    s = np.empty(levels + 3, q.dtype)
    source = np.empty(levels + 3, np.int64)
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        for i in range(item * tile, min((item + 1) * tile, n)):
            count = 0
            keys_used = 0
            if lowest_level == 0:
                for c in range(d):
                    scaled[c] = factor * q[i, c]
                for z in range(2):
                    j = i ^ z
                    if j >= n or (causal and j > i) or (keep.size > 0 and not keep[j]):
                        continue
                    s[count] = _dot(scaled, k[j])
                    source[count] = j
                    count += 1
                keys_used = count
            for c in range(e_width):
                wide[c] = factor * f[i, c]
            for e in range(max(lowest_level, 1), levels):
                b = i >> e
                sibling = b ^ 1
                if (causal and b & 1 == 0) or (sibling << e) >= n:
                    continue
                t = offsets[e] + (sibling >> 1 if half else sibling)
                if bias[t] == minus:
                    continue
                s[count] = _dot(wide, keys[t]) + bias[t]
                source[count] = t
                count += 1
            high = row_maximum(s[:count])
            if top[i] > high:
                high = top[i]
            if high == minus:
                lse[i] = minus
                continue
            before = exp2(q.dtype.type(top[i] - high))
            sums = before * total[i]
            for y in range(count):
                w = exp2(q.dtype.type(s[y] - high))
                s[y] = w
                sums += w
            inverse = one / sums
            lse[i] = natural * (high + np.log2(sums))
            if width > 0:
                before *= inverse
                for c in range(width):
                    out[i, c] *= before
                for y in range(keys_used):
                    w = s[y] * inverse
                    for c in range(width):
                        out[i, c] += w * x[source[y], c]
                for y in range(keys_used, count):
                    w = s[y] * inverse
                    t = source[y]
                    for c in range(width):
                        out[i, c] += w * xhat[t, c]


@kernel(dealt=True)
def dyadic_transposed(
    turn: Array,
    f: Array, keys: Array, bias: Array, y: Array, lse: Array, level: Array, block: Array,
    scale: float, out: Array,
) -> None:  # fmt: skip
    """``out_t = sum_i exp(g_it - lse_i) y_i (N, m)`` over the rows of the sibling of node t.

    Node t is block ``block[t]`` of level ``level[t]``; a negative level: a node that is not used.
    """
    n = f.shape[0]
    e_width = f.shape[1]
    width = y.shape[1]
    factor = f.dtype.type(scale * LOG2E)
    to_bits = f.dtype.type(LOG2E)
    minus = f.dtype.type(-np.inf)
    count = level.size
    wide = np.empty(e_width, f.dtype)
    # From the largest down, so that threads end at about the same time.
    for _ in range(count):
        p = take(turn)
        if p >= count:
            break
        t = count - 1 - p
        out[t] = 0.0
        if level[t] < 0 or bias[t] == minus:
            continue
        for c in range(e_width):
            wide[c] = factor * keys[t, c]
        low = (block[t] ^ 1) << level[t]
        for i in range(low, min(low + (1 << level[t]), n)):
            if lse[i] == minus:
                continue
            w = exp2(f.dtype.type(_dot(wide, f[i]) + bias[t] - lse[i] * to_bits))
            for c in range(width):
                out[t, c] += w * y[i, c]


@kernel(dealt=True)
def neighbours_transposed(
    turn: Array,
    q: Array, k: Array, y: Array, lse: Array, causal: bool, keep: Array, scale: float, tile: int,
    out: Array,
) -> None:  # fmt: skip
    """``out_j += sum exp(s_ij - lse_i) y_i`` over the rows j and its neighbour that see key j."""
    n, d = k.shape
    width = y.shape[1]
    factor = q.dtype.type(scale * LOG2E)
    to_bits = q.dtype.type(LOG2E)
    minus = q.dtype.type(-np.inf)
    tiles = (n + tile - 1) // tile
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        for j in range(item * tile, min((item + 1) * tile, n)):
            if keep.size > 0 and not keep[j]:
                continue
            for z in range(2):
                i = j ^ z
                if i >= n or (causal and j > i) or lse[i] == minus:
                    continue
                s = q.dtype.type(0.0)
                for c in range(d):
                    s += factor * q[i, c] * k[j, c]
                w = exp2(q.dtype.type(s - lse[i] * to_bits))
                for c in range(width):
                    out[j, c] += w * y[i, c]


# --- any plan: a row and its slots --------------------------------------------------------------


@kernel(dealt=True)
def slot_logits(
    turn: Array,
    q: Array, k: Array, f: Array, keys: Array, bias: Array, rows: Array, d_starts: Array,
    direct: Array, r_starts: Array, regions: Array, scale: float, tile: int,
    d_out: Array, r_out: Array, lse: Array,
) -> None:  # fmt: skip
    """Write the base-2 logits of the slots of rows (s,), and ``lse (s,)``, natural.

    Direct keys of row ``rows[p]`` are ``direct[d_starts[p] : d_starts[p + 1]]``, its regions
    likewise; ``d_out`` and ``r_out`` have their lengths.
    """
    d = q.shape[1]
    e_width = f.shape[1]
    count = rows.size
    tiles = (count + tile - 1) // tile
    factor = q.dtype.type(scale * LOG2E)
    natural = q.dtype.type(1.0 / LOG2E)
    minus = q.dtype.type(-np.inf)
    scaled = np.empty(d, q.dtype)
    wide = np.empty(e_width, q.dtype)
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        for p in range(item * tile, min((item + 1) * tile, count)):
            i = rows[p]
            for c in range(d):
                scaled[c] = factor * q[i, c]
            for c in range(e_width):
                wide[c] = factor * f[i, c]
            for y in range(d_starts[p], d_starts[p + 1]):
                d_out[y] = _dot(scaled, k[direct[y]])
            for y in range(r_starts[p], r_starts[p + 1]):
                t = regions[y]
                r_out[y] = minus if bias[t] == minus else _dot(wide, keys[t]) + bias[t]
            high = row_maximum(d_out[d_starts[p] : d_starts[p + 1]])
            other = row_maximum(r_out[r_starts[p] : r_starts[p + 1]])
            high = other if other > high else high
            if high == minus:
                lse[p] = minus
                continue
            total = q.dtype.type(0.0)
            for y in range(d_starts[p], d_starts[p + 1]):
                total += exp2(q.dtype.type(d_out[y] - high))
            for y in range(r_starts[p], r_starts[p + 1]):
                total += exp2(q.dtype.type(r_out[y] - high))
            lse[p] = natural * (high + np.log2(total))
