"""Near keys exactly, and weighted pivots for all others: choice and products.

In base 2, with ``x_i = scale log2(e) q_i``, pivot s has for row i the weight
``e_is = 2^(x_i . k_s + b_s - top_i)``, and with ``W (r, n)`` in units of ``2^b_s`` a row is

    sum_s e_is (W X)_s
        + sum_{c near} [ sum_{j in c} 2^(x_i . k_j - top_i) x_j - sum_s e_is (W_c X_c)_s ]

over the same with X = 1: what the pivots say of the clusters that a row reads key by key is taken
out.  Rows choose the ``most`` clusters of the largest mean weight ``2^g_ic / m_c`` by the moments
of `nearfar`, and of these they keep those whose share times ``sigma^2`` is at least tau.

``pivots (d + 1, r')`` are transposed, with ``b_s`` below them, and filled up to whole registers
with ``b_s = -inf``; ``w`` holds the weights of the keys of every cluster, ``(r', m_c)`` from
``r' starts[c]`` on.  Tables of clusters are those of `nearfar`, whose rows see all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import add_product, kernel, row_products, take
from .nearfar import LIST, _choose, _log_masses, _scaled, _within
from .softmax import LN2, exp2, row_maximum

Array = NDArray[Any]


@kernel(dealt=True)
def pivot_values(turn: Array, x: Array, w: Array, starts: Array, table: Array) -> None:
    """``table[c] = -W_c X_c``, (R, r', m), from the values ordered by clusters."""
    count, size, width = table.shape[0], table.shape[1], x.shape[1]
    lines = np.arange(size)
    for _ in range(count):
        c = take(turn)
        if c >= count:
            break
        low, high = starts[c], starts[c + 1]
        block = w[size * low : size * high].reshape((size, high - low))
        row_products(block, lines, x[low:high], high - low, width, table[c], lines, True)
        for s in range(size):
            for t in range(width):
                table[c, s, t] = -table[c, s, t]


@kernel()
def _weigh(e: Array, shift: Array) -> None:
    """``e <- 2^(e - shift)``, a number a row."""
    for i in range(e.shape[0]):
        m = shift[i]
        line = e[i]
        for s in range(line.size):
            line[s] = exp2(line.dtype.type(line[s] - m))


@kernel()
def _dot(x: Array, y: Array) -> Any:
    """Return the inner product of two rows, in their precision."""
    total = x.dtype.type(0.0)
    for s in range(x.size):
        total += x[s] * y[s]
    return total


@kernel()
def _chosen_by_weight(
    s: Array, u: Array, bits: Array, top: Any, normalizer: Any, tau: Any, weight: Array,
    best: Array, place: Array, chosen: Array,
) -> None:  # fmt: skip
    """Write the near clusters of one row to ``chosen``, then -1."""
    real = s.dtype.type
    lowest = real(-np.inf)
    for c in range(s.size):
        weight[c] = s[c] - bits[c] if bits[c] > lowest else lowest
    _choose(weight, u, lowest, real(0.0), real(0.0), best, place, chosen)
    kept = 0
    for y in range(chosen.size):
        c = chosen[y]
        if c < 0:
            break
        g = real(s[c] - top)
        # Logarithms: a mass may lie far above those of all pivots.
        if tau <= 0 or g + np.log2(real(2.0 * LN2) * u[c]) >= np.log2(tau * normalizer):
            chosen[kept] = c
            kept += 1
    for y in range(kept, chosen.size):
        chosen[y] = -1


@kernel(dealt=True)
def attend_coreset(
    turn: Array, q: Array, tiles: Array, items: Array, factor: float, pivots: Array, sizes: Array,
    masses: Array, table: Array, whole: Array, kt: Array, starts: Array, wide: Array, kappa: Array,
    half: Array, rho: Array, frozen: Array, bits: Array, ordered: Array, tau: float, room: int,
    limit: float, small: float, choose: bool, decide: bool, near: Array, top: Array, total: Array,
    out: Array,
) -> None:  # fmt: skip
    """``out (n_q, w)``, the largest logit ``top`` that rows refer to, and ``total`` beside it.

    ``ordered (N, w)`` are values by clusters, ``whole (r', w)`` their sums by W, and
    ``table (R, r', w)`` less those of each cluster; ``masses (R + 1, r')`` are sums of W in each
    cluster and in all, ``sizes (r')`` of their absolute values.  ``near`` is written if ``choose``,
    clusters of at most ``room`` keys together, ``total`` if ``decide``; they are read otherwise.
    A row whose normaliser is at most ``small`` of its absolute terms, or half of what was read
    exactly, has the total 0, and no use of its output.
    """
    d, width, count = q.shape[1], out.shape[1], starts.size - 1
    most, columns, size = near.shape[1], kappa.shape[1], pivots.shape[1]
    highest, members, tallest = 0, 0, 0
    for t in range(tiles.shape[0]):
        highest = max(highest, tiles[t, 1] - tiles[t, 0])
    for c in range(count):
        members = max(members, wide[c + 1] - wide[c])
    for item in range(items.size - 1):
        tallest = max(tallest, tiles[items[item + 1] - 1, 1] - tiles[items[item], 0])
    dtype = q.dtype
    scale = dtype.type(factor)
    x_buffer = np.empty(tallest * (d + 1), dtype)
    e_buffer = np.empty(tallest * size, dtype)
    acc_buffer = np.empty(tallest * width, dtype)
    amounts = np.empty(tallest, dtype)
    exact = np.empty(tallest, dtype)
    absolute = np.empty(tallest, dtype)
    squares = np.empty((highest, d), dtype)
    norm_buffer = np.empty(highest, dtype)
    s_buffer = np.empty(highest * columns, dtype)
    u_buffer = np.empty(highest * columns, dtype)
    weight = np.empty(columns, dtype)
    offsets = np.empty(count + 1, np.int64)
    listed = np.empty(tallest * most, np.int64)
    lines = np.arange(max(tallest, LIST))
    weight_buffer = np.empty(LIST * members, dtype)
    best = np.empty(most, dtype)
    place = np.empty(most, np.int64)
    taken = np.empty(most, np.int64)
    zero, one = dtype.type(0.0), dtype.type(1.0)
    threshold = dtype.type(tau)
    for _ in range(items.size - 1):
        item = take(turn)
        if item >= items.size - 1:
            break
        base = tiles[items[item], 0]
        stop = tiles[items[item + 1] - 1, 1]
        x = x_buffer[: (stop - base) * (d + 1)].reshape((stop - base, d + 1))
        e = e_buffer[: (stop - base) * size].reshape((stop - base, size))
        acc = acc_buffer[: (stop - base) * width].reshape((stop - base, width))
        offsets[:] = 0
        for tile in range(items[item], items[item + 1]):
            i0, i1 = tiles[tile, 0], tiles[tile, 1]
            rows = i1 - i0
            norms = norm_buffer[:rows]
            mine = lines[i0 - base : i1 - base]
            _scaled(q[i0:i1], scale, x[i0 - base : i1 - base], squares, norms)
            # All pivots.
            for i in range(i0 - base, i1 - base):
                x[i, d] = one
            row_products(x, mine, pivots, d + 1, size, e, mine, True)
            for i in range(i0, i1):
                top[i] = row_maximum(e[i - base])
            _weigh(e[i0 - base : i1 - base], top[i0:i1])
            if width > 0:
                row_products(e, mine, whole, size, width, acc, mine, True)
            for i in range(i0 - base, i1 - base):
                amounts[i] = _dot(e[i], masses[count])
                absolute[i] = _dot(e[i], sizes)
                exact[i] = zero
            # The choice.
            if choose and most > 0:
                s = s_buffer[: rows * columns].reshape((rows, columns))
                u = u_buffer[: rows * columns].reshape((rows, columns))
                row_products(x, mine, kappa, d, columns, s, lines[:rows], True)
                row_products(squares, lines[:rows], half, d, columns, u, lines[:rows], True)
                _log_masses(s, u, norms, frozen, rho, bits)
                for r in range(rows):
                    i = i0 + r - base
                    normalizer = amounts[i]
                    normalizer = normalizer if normalizer > zero else absolute[i]
                    _chosen_by_weight(
                        s[r], u[r], bits, top[i0 + r], normalizer, threshold, weight, best, place,
                        near[i0 + r],
                    )  # fmt: skip
                    if room < starts[count]:
                        place[:] = near[i0 + r]
                        _within(weight, starts, room, place, near[i0 + r], taken)
            for i in range(i0, i1):
                for y in range(most):
                    c = near[i, y]
                    if c < 0:
                        break
                    offsets[c + 1] += 1
        # Near clusters: the rows of each together.
        for c in range(count):
            offsets[c + 1] += offsets[c]
        for i in range(base, stop):
            x[i - base, d] = -top[i]
            for y in range(most):
                c = near[i, y]
                if c < 0:
                    break
                listed[offsets[c]] = i - base
                offsets[c] += 1
        first = 0
        for c in range(count):
            m, cols = starts[c + 1] - starts[c], wide[c + 1] - wide[c]
            keys = kt[wide[c] * (d + 1) : wide[c + 1] * (d + 1)].reshape((d + 1, cols))
            for l0 in range(first, offsets[c], LIST):
                l1 = min(l0 + LIST, offsets[c])
                rows = l1 - l0
                mine = listed[l0:l1]
                flat = weight_buffer[: rows * cols]
                weights = flat.reshape((rows, cols))
                row_products(x, mine, keys, d + 1, cols, weights, lines[:rows], True)
                if row_maximum(flat) > limit:
                    for r in range(rows):
                        high = row_maximum(weights[r, :m])
                        if high > zero:
                            i = mine[r]
                            shift = exp2(dtype.type(-high))
                            top[base + i] += high
                            x[i, d] = -top[base + i]
                            exact[i] *= shift
                            absolute[i] *= shift
                            amounts[i] *= shift
                            for t in range(width):
                                acc[i, t] *= shift
                            for t in range(size):
                                e[i, t] *= shift
                            for j in range(m):
                                weights[r, j] -= high
                for j in range(flat.size):
                    flat[j] = exp2(dtype.type(flat[j]))
                for r in range(rows):
                    part = zero
                    for j in range(m):
                        part += weights[r, j]
                    exact[mine[r]] += part
                    amounts[mine[r]] += part - _dot(e[mine[r]], masses[c])
                if width > 0:
                    row_products(e, mine, table[c], size, width, acc, mine, False)
                    row_products(
                        weights, lines[:rows], ordered[starts[c] : starts[c + 1]], m, width, acc,
                        mine, False,
                    )  # fmt: skip
            first = offsets[c]
        for i in range(base, stop):
            amount = amounts[i - base]
            if decide:
                least = dtype.type(small) * (absolute[i - base] + exact[i - base])
                least = max(least, dtype.type(0.5) * exact[i - base])
                total[i] = amount if amount > least else zero
            inverse = one / amount if total[i] > zero else zero
            for t in range(width):
                out[i, t] = acc[i - base, t] * inverse


@kernel(dealt=True)
def take_coreset(
    turn: Array, q: Array, y: Array, order: Array, first: Array, parts: int, factor: float,
    pivots: Array, kt: Array, starts: Array, wide: Array, top: Array, total: Array, z: Array,
    out: Array,
) -> None:  # fmt: skip
    """``z[c] = sum_i e_i y_i`` over the rows ``order[first[c] : first[c + 1]]``, which read c.

    ``out (N, w)``, in the order of clusters, gets what these say of its keys; ``z[R:]``, of which
    there are ``parts``, are the same sums over all rows, cut into as many.  Both are zero before.
    Rows whose total is not positive are left out.
    """
    d, width, count, n_q = q.shape[1], y.shape[1], starts.size - 1, q.shape[0]
    size = pivots.shape[1]
    members = 0
    for c in range(count):
        members = max(members, wide[c + 1] - wide[c])
    dtype = q.dtype
    scale = dtype.type(factor)
    x = np.empty((LIST, d + 1), dtype)
    e_buffer = np.empty(LIST * size, dtype)
    y_buffer = np.empty(LIST * width, dtype)
    weight_buffer = np.empty(LIST * members, dtype)
    sums_buffer = np.empty(members * width, dtype)
    tops = np.empty(LIST, dtype)
    lines = np.arange(LIST)
    zero, one = dtype.type(0.0), dtype.type(1.0)
    for _ in range(count + parts):
        item = take(turn)
        if item >= count + parts:
            break
        if item < count:
            low, high = first[item], first[item + 1]
            m, cols = starts[item + 1] - starts[item], wide[item + 1] - wide[item]
        else:
            g = item - count
            low, high = g * n_q // parts, (g + 1) * n_q // parts
            m, cols = 0, 0
        sums = sums_buffer[: cols * width].reshape((cols, width))
        sums[:] = zero
        for l0 in range(low, high, LIST):
            rows = min(high - l0, LIST)
            e = e_buffer[: rows * size].reshape((rows, size))
            part = y_buffer[: rows * width].reshape((rows, width))
            for r in range(rows):
                i = order[l0 + r] if item < count else l0 + r
                used = total[i] > zero
                inverse = one / total[i] if used else zero
                for t in range(d):
                    x[r, t] = scale * q[i, t]
                x[r, d] = one
                tops[r] = top[i]
                for t in range(width):
                    part[r, t] = inverse * y[i, t]
            row_products(x, lines[:rows], pivots, d + 1, size, e, lines[:rows], True)
            _weigh(e, tops)
            add_product(e.T, part, z[item])
            if m == 0:
                continue
            keys = kt[wide[item] * (d + 1) : wide[item + 1] * (d + 1)].reshape((d + 1, cols))
            weights = weight_buffer[: rows * cols].reshape((rows, cols))
            for r in range(rows):
                x[r, d] = -tops[r]
            row_products(x, lines[:rows], keys, d + 1, cols, weights, lines[:rows], True)
            for r in range(rows):
                for j in range(cols):
                    weights[r, j] = exp2(dtype.type(weights[r, j]))
            add_product(weights.T, part, sums)
        for j in range(m):
            for t in range(width):
                out[starts[item] + j, t] = sums[j, t]


@kernel(dealt=True)
def spread_coreset(turn: Array, w: Array, starts: Array, z: Array, out: Array) -> None:
    """``out += W_c^T z[c]`` of the keys of every cluster c, in the order of clusters."""
    count, size = starts.size - 1, z.shape[1]
    for _ in range(count):
        c = take(turn)
        if c >= count:
            break
        low, high = starts[c], starts[c + 1]
        if high > low:
            block = w[size * low : size * high].reshape((size, high - low))
            add_product(block.T, z[c], out[low:high])


@kernel(dealt=True)
def coreset_rows(
    turn: Array, q: Array, rows: Array, factor: float, pivots: Array, w: Array, kt: Array,
    members: Array, starts: Array, wide: Array, near: Array, top: Array, total: Array, out: Array,
) -> None:  # fmt: skip
    """Write rows of the matrix over the kept keys, ``out (len(rows), N)``, zero before."""
    d, most, count, size = q.shape[1], near.shape[1], starts.size - 1, pivots.shape[1]
    dtype = q.dtype
    scale = dtype.type(factor)
    widest = 0
    for c in range(count):
        widest = max(widest, wide[c + 1] - wide[c])
    x = np.empty((1, d + 1), dtype)
    e = np.empty((1, size), dtype)
    buffer = np.empty(widest, dtype)
    tops = np.empty(1, dtype)
    line = np.arange(1)
    read = np.zeros(count, np.bool_)
    zero, one = dtype.type(0.0), dtype.type(1.0)
    for _ in range(rows.size):
        item = take(turn)
        if item >= rows.size:
            break
        i = rows[item]
        if not total[i] > zero:
            continue
        inverse = one / total[i]
        for t in range(d):
            x[0, t] = scale * q[i, t]
        x[0, d] = one
        tops[0] = top[i]
        row_products(x, line, pivots, d + 1, size, e, line, True)
        _weigh(e, tops)
        x[0, d] = -top[i]
        for y in range(most):
            if near[i, y] >= 0:
                read[near[i, y]] = True
        for c in range(count):
            low, m, cols = starts[c], starts[c + 1] - starts[c], wide[c + 1] - wide[c]
            if m == 0:
                continue
            if read[c]:
                weights = buffer[:cols].reshape((1, cols))
                keys = kt[wide[c] * (d + 1) : wide[c + 1] * (d + 1)].reshape((d + 1, cols))
                row_products(x, line, keys, d + 1, cols, weights, line, True)
                for j in range(m):
                    buffer[j] = exp2(dtype.type(buffer[j]))
                read[c] = False
            else:
                weights = buffer[:m].reshape((1, m))
                block = w[size * low : size * (low + m)].reshape((size, m))
                row_products(e, line, block, size, m, weights, line, True)
            for j in range(m):
                out[item, members[low + j]] = inverse * buffer[j]
