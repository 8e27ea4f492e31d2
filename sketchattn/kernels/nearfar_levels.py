"""Two levels of clusters: far ones summarised together, refined where a row's share asks for it.

A coarse cluster is a group of clusters, its *children*, as those are groups of keys; both have the
moments of `nearfar`, and a mass ``g_ic`` of the same form.  A row folds

* its own keys one by one;
* the coarse clusters ``< end`` of its tile that are not among ``skip``, but
* the children of those that it refines: the ``most`` of largest g whose share of what was read so
  far times ``sigma^2`` is at least tau; and clusters ``low .. high - 1`` of its tile, which no
  coarse cluster holds for it;
* of these clusters those that it chooses, by the same rule after all of that, key by key.

``tiles (T, 11)``: first row, last row + 1, first and last + 1 own key; first and last + 1 cluster
seen directly, first and last + 1 of them to skip; coarse clusters, first and last + 1 to skip.

``table (2 d + 3 + h (d + 1), R')`` has what is known of every cluster as a column: ``kappa``,
``half``, ``rho``, ``frozen``, ``bits`` and for each direction the slope and its bound.  ``coarse``
is one of coarse clusters, without directions.  The columns of the children of a coarse cluster C
are together, ``(., R'_C)`` in ``tables``, of columns ``wide_of[C] : wide_of[C + 1]``; they are the
clusters ``kids[first[C] : first[C + 1]]``, and columns without one have ``bits = -inf``.
``place (2, R)`` has the coarse cluster of each cluster, -1 for none, and its column there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import LANES, kernel, row_products, take
from .nearfar import (
    LIST,
    OWN,
    _choose,
    _fold,
    _log_masses,
    _scaled,
    _transposed,
    _within,
    fold_near,
)
from .softmax import exp2

Array = NDArray[Any]


@kernel()
def _columns(table: Array, low: int, high: int, d: int, out: Array) -> None:
    """Copy columns of a table, and fill up with clusters that weigh nothing."""
    empty = table.dtype.type(-np.inf)
    for t in range(out.shape[0]):
        fill = empty if t == 2 * d + 2 else table.dtype.type(0.0)
        for c in range(high - low):
            out[t, c] = table[t, low + c]
        for c in range(high - low, out.shape[1]):
            out[t, c] = fill


@kernel()
def _scores(
    x: Array, ix: Array, squares: Array, isquares: Array, norms: Array, block: Array, d: int,
    cols: int, s: Array, u: Array, lines: Array,
) -> None:  # fmt: skip
    """Logarithms of masses s and second-order terms u of a list of rows and columns of a table."""
    row_products(x, ix, block[:d], d, cols, s, lines, True)
    row_products(squares, isquares, block[d : 2 * d], d, cols, u, lines, True)
    _log_masses(s, u, norms, block[2 * d + 1], block[2 * d], block[2 * d + 2])


@kernel()
def _slopes(
    x: Array, ix: Array, block: Array, start: int, d: int, cols: int, s: Array, u: Array,
    lines: Array,
) -> None:  # fmt: skip
    """Write the weights s times the clipped slopes of one direction to u."""
    row_products(x, ix, block[start : start + d], d, cols, u, lines, True)
    bound = block[start + d]
    for r in range(s.shape[0]):
        for c in range(cols):
            b = bound[c]
            y = u[r, c]
            y = y if y < b else b
            y = y if y > -b else -b
            u[r, c] = y * s[r, c]


@kernel()
def _above_mean(g: Any, u: Any, norm: Any, frozen: Any, rho: Any, bits: Any) -> Any:
    """Return the mean logit of a cluster, which its largest exceeds, from its mass."""
    two = np.sqrt(frozen * u)
    phi = u if u <= frozen else two + two - frozen
    cap = norm * rho
    phi = phi if phi < cap else cap
    return g - phi - bits


@kernel()
def _place_of(
    c: int, low: int, high: int, cols: int, refined: Array, wide_of: Array, place: Array
) -> Any:
    """Return where a cluster stands among those that a row sees, -1 if nowhere."""
    if low <= c < high:
        return c - low
    start = cols
    for y in range(refined.size):
        parent = refined[y]
        if parent < 0:
            break
        if parent == place[0, c]:
            return start + place[1, c]
        start += wide_of[parent + 1] - wide_of[parent]
    return -1


@kernel()
def _cluster_at(
    at: int, low: int, cols: int, refined: Array, wide_of: Array, first: Array, kids: Array
) -> Any:
    """Return the cluster that stands at a place among those that a row sees."""
    if at < cols:
        return low + at
    start = cols
    found = 0
    for y in range(refined.size):
        parent = refined[y]
        step = wide_of[parent + 1] - wide_of[parent]
        if at < start + step:
            found = kids[first[parent] + at - start]
            break
        start += step
    return found


@kernel(dealt=True)
def attend_levels(
    turn: Array, q: Array, k: Array, v: Array, stops: Array, tiles: Array, items: Array,
    part: int, factor: float, kt: Array, starts: Array, wide: Array, table: Array, coarse: Array,
    kids: Array, first: Array, wide_of: Array, tables: Array, place: Array, ordered: Array,
    vbar: Array, beta: Array, vkids: Array, beta_kids: Array, vcoarse: Array, tau: float,
    room: int, limit: float, choose: bool, refined: Array, near: Array, top: Array, total: Array,
    out: Array,
) -> None:  # fmt: skip
    """``out (n_q, w)``, the largest logit ``top`` that rows refer to, and ``total`` beside it.

    ``refined`` and ``near``, int32, have a row of each row: coarse clusters, ascending, and
    clusters, then -1.  They are written if ``choose``, and read otherwise; arrays without rows say
    that they are not to be kept.  Rows choose ``part`` at a time, or a tile more.  ``room`` and
    ``limit`` are those of `attend`.
    """
    d, width, count, h = q.shape[1], v.shape[1], starts.size - 1, beta.shape[0]
    height, many, groups = table.shape[0], refined.shape[1], first.size - 1
    most, kept = near.shape[1], near.shape[0] == q.shape[0]
    highest, longest, members, tallest, direct, ends, children = 0, 0, 0, 0, 0, 0, 0
    for t in range(tiles.shape[0]):
        highest = max(highest, tiles[t, 1] - tiles[t, 0])
        longest = max(longest, tiles[t, 3] - tiles[t, 2])
        direct = max(direct, tiles[t, 5] - tiles[t, 4])
        ends = max(ends, tiles[t, 8])
    for c in range(count):
        members = max(members, wide[c + 1] - wide[c])
    for c in range(groups):
        children = max(children, wide_of[c + 1] - wide_of[c])
    for item in range(items.size - 1):
        tallest = max(tallest, tiles[items[item + 1] - 1, 1] - tiles[items[item], 0])
    longest = (longest + LANES - 1) // LANES * LANES + LANES
    direct = (direct + LANES - 1) // LANES * LANES
    ends = (ends + LANES - 1) // LANES * LANES
    dtype = q.dtype
    scale = dtype.type(factor)
    x_buffer = np.empty(tallest * (d + 1), dtype)
    acc_buffer = np.empty(tallest * width, dtype)
    squares_buffer = np.empty(tallest * d, dtype)
    norm_buffer = np.empty(tallest, dtype)
    floor_buffer = np.empty(tallest, dtype)
    largest = max(max(highest * max(ends, direct), LIST * children), LIST * members)
    s_buffer = np.empty(max(largest, highest * longest), dtype)
    u_buffer = np.empty(largest, dtype)
    own = np.empty((d, longest), dtype)
    block_buffer = np.empty(height * direct, dtype)
    list_norms = np.empty(LIST, dtype)
    lists = np.empty(groups + 1, np.int64)
    offsets = np.empty(count + 1, np.int64)
    listed = np.empty(tallest * max(most, many), np.int64)
    refined_buffer = np.empty((0 if kept else tallest, many), np.int32)
    near_buffer = np.empty((0 if kept else tallest, most), np.int32)
    at = np.empty(tallest + 1, np.int64)
    cursor = np.empty(tallest, np.int64)
    g_all = np.empty(0, dtype)
    u_all = np.empty(0, dtype)
    lines = np.arange(max(tallest, LIST))
    best = np.empty(max(most, many), dtype)
    places = np.empty(max(most, many), np.int64)
    taken = np.empty(most, np.int64)
    lowest = dtype.type(-np.inf)
    zero = dtype.type(0.0)
    threshold = dtype.type(tau)
    held, reached = -1, -1
    for _ in range(items.size - 1):
        item = items.size - 2 - take(turn)
        if item < 0:
            break
        base = tiles[items[item], 0]
        stop = tiles[items[item + 1] - 1, 1]
        n = stop - base
        x = x_buffer[: n * (d + 1)].reshape((n, d + 1))
        squares = squares_buffer[: n * d].reshape((n, d))
        acc = acc_buffer[: n * width].reshape((n, width))
        refs = refined[base:stop] if kept else refined_buffer[:n]
        nears = near[base:stop] if kept else near_buffer[:n]
        acc[:] = 0.0
        offsets[:] = 0
        t1 = items[item]
        while t1 < items[item + 1]:
            # Few rows at a time, which stay in the cache, but for the lists of near clusters.
            t0 = t1
            p0 = tiles[t0, 0] - base
            while t1 < items[item + 1] and tiles[t1, 0] - base - p0 < part:
                t1 += 1
            p1 = tiles[t1 - 1, 1] - base
            lists[:] = 0
            for tile in range(t0, t1):
                i0, i1 = tiles[tile, 0], tiles[tile, 1]
                own_low, own_high, end = tiles[tile, 2], tiles[tile, 3], tiles[tile, 8]
                rows, a0, a1 = i1 - i0, i0 - base, i1 - base
                mine = lines[a0:a1]
                norms, floor = norm_buffer[a0:a1], floor_buffer[a0:a1]
                _scaled(q[i0:i1], scale, x[a0:a1], squares[a0:a1], norms)
                top[i0:i1] = lowest
                total[i0:i1] = zero
                floor[:] = lowest
                # Own keys.
                step = OWN if stops[i0] < stops[i1 - 1] else rows
                if own_high > own_low:
                    if held != own_low:
                        held, reached = own_low, own_low
                    if reached < own_high:
                        _transposed(k[reached:own_high], own, reached - own_low)
                        reached = own_high
                    for r0 in range(0, rows, step):
                        r1 = min(r0 + step, rows)
                        last = stops[i0 + r1 - 1]
                        cols = (last - own_low + LANES - 1) // LANES * LANES
                        if cols <= 0:
                            continue
                        s = s_buffer[: (r1 - r0) * cols].reshape((r1 - r0, cols))
                        row_products(x, mine[r0:r1], own, d, cols, s, lines[: r1 - r0], True)
                        for r in range(r0, r1):
                            for j in range(stops[i0 + r] - own_low, cols):
                                s[r - r0, j] = lowest
                        _fold(s, floor[r0:r1], top[i0 + r0 : i0 + r1], total[i0 + r0 : i0 + r1],
                              acc[a0 + r0 : a0 + r1])  # fmt: skip
                        if width > 0:
                            row_products(
                                s, lines[: r1 - r0], v[own_low:last], last - own_low, width, acc,
                                mine[r0:r1], False,
                            )  # fmt: skip
                # Coarse clusters, less those that are refined.
                if end == 0:
                    if choose:
                        refs[a0:a1] = -1
                    continue
                cols = (end + LANES - 1) // LANES * LANES
                s = s_buffer[: rows * cols].reshape((rows, cols))
                u = u_buffer[: rows * cols].reshape((rows, cols))
                _scores(x, mine, squares, mine, norms, coarse, d, cols, s, u, lines[:rows])
                for r in range(rows):
                    for c in range(end, cols):
                        s[r, c] = lowest
                    for c in range(tiles[tile, 9], tiles[tile, 10]):
                        s[r, c] = lowest
                    ref = refs[a0 + r]
                    if choose and many > 0:
                        found = _choose(
                            s[r], u[r], top[i0 + r], total[i0 + r], threshold, best, places, ref
                        )
                        for y in range(1, found):
                            value, z = ref[y], y
                            while z > 0 and ref[z - 1] > value:
                                ref[z] = ref[z - 1]
                                z -= 1
                            ref[z] = value
                    for y in range(many):
                        if ref[y] < 0:
                            break
                        s[r, ref[y]] = lowest
                        lists[ref[y] + 1] += 1
                _fold(s, floor, top[i0:i1], total[i0:i1], acc[a0:a1])
                if width > 0:
                    row_products(s, lines[:rows], vcoarse, end, width, acc, mine, False)
            # Room for what each row sees of the clusters below.
            at[p0] = 0
            for tile in range(t0, t1):
                cols = (tiles[tile, 5] - tiles[tile, 4] + LANES - 1) // LANES * LANES
                for i in range(tiles[tile, 0] - base, tiles[tile, 1] - base):
                    cursor[i] = at[i] + cols
                    seen = cols
                    for y in range(many):
                        c = refs[i, y]
                        if c < 0:
                            break
                        seen += wide_of[c + 1] - wide_of[c]
                    at[i + 1] = at[i] + seen
            if at[p1] > g_all.size:
                g_all = np.empty(at[p1] + at[p1] // 8, dtype)
                u_all = np.empty(g_all.size, dtype)
            for c in range(groups):
                lists[c + 1] += lists[c]
            for i in range(p0, p1):
                for y in range(many):
                    c = refs[i, y]
                    if c < 0:
                        break
                    listed[lists[c]] = i
                    lists[c] += 1
            held_low, held_high = -1, -1
            for tile in range(t0, t1):
                low, high = tiles[tile, 4], tiles[tile, 5]
                if high == low:
                    continue
                a0, a1 = tiles[tile, 0] - base, tiles[tile, 1] - base
                rows = a1 - a0
                cols = (high - low + LANES - 1) // LANES * LANES
                block = block_buffer[: height * cols].reshape((height, cols))
                if held_low != low or held_high != high:
                    _columns(table, low, high, d, block)
                    held_low, held_high = low, high
                s = s_buffer[: rows * cols].reshape((rows, cols))
                u = u_buffer[: rows * cols].reshape((rows, cols))
                mine = lines[a0:a1]
                norms = norm_buffer[a0:a1]
                _scores(x, mine, squares, mine, norms, block, d, cols, s, u, lines[:rows])
                for r in range(rows):
                    for c in range(tiles[tile, 6] - low, tiles[tile, 7] - low):
                        s[r, c] = lowest
                    start = at[a0 + r]
                    for c in range(cols):
                        g_all[start + c] = s[r, c]
                    for c in range(cols):
                        u_all[start + c] = u[r, c]
            begin = 0
            for c in range(groups):
                cols = wide_of[c + 1] - wide_of[c]
                flat = tables[wide_of[c] * height : wide_of[c + 1] * height]
                block = flat.reshape((height, cols))
                for l0 in range(begin, lists[c], LIST):
                    mine = listed[l0 : min(l0 + LIST, lists[c])]
                    rows = mine.size
                    for r in range(rows):
                        list_norms[r] = norm_buffer[mine[r]]
                    s = s_buffer[: rows * cols].reshape((rows, cols))
                    u = u_buffer[: rows * cols].reshape((rows, cols))
                    _scores(x, mine, squares, mine, list_norms, block, d, cols, s, u, lines[:rows])
                    for r in range(rows):
                        start = cursor[mine[r]]
                        for j in range(cols):
                            g_all[start + j] = s[r, j]
                        for j in range(cols):
                            u_all[start + j] = u[r, j]
                        cursor[mine[r]] = start + cols
                begin = lists[c]
            # Choose among them and fold the others.
            for tile in range(t0, t1):
                low, high = tiles[tile, 4], tiles[tile, 5]
                direct_cols = (high - low + LANES - 1) // LANES * LANES
                for i in range(tiles[tile, 0] - base, tiles[tile, 1] - base):
                    cursor[i] = at[i] + direct_cols
                    chosen = nears[i]
                    start, seen = at[i], at[i + 1] - at[i]
                    if seen == 0:
                        if choose:
                            chosen[:] = -1
                        continue
                    g, u_row = g_all[start : start + seen], u_all[start : start + seen]
                    if choose and most > 0:
                        found = _choose(
                            g, u_row, top[base + i], total[base + i], threshold, best, places,
                            chosen,
                        )  # fmt: skip
                        for y in range(found):
                            places[y] = chosen[y]
                            chosen[y] = _cluster_at(
                                chosen[y], low, direct_cols, refs[i], wide_of, first, kids
                            )
                        if room < k.shape[0]:
                            _within(g, starts, room, places, chosen, taken)
                    else:
                        for y in range(most):
                            if chosen[y] < 0:
                                break
                            places[y] = _place_of(
                                chosen[y], low, high, direct_cols, refs[i], wide_of, place
                            )
                    for y in range(most):
                        c = chosen[y]
                        if c < 0:
                            break
                        z = places[y]
                        mean = _above_mean(
                            g[z], u_row[z], norm_buffer[i], table[2 * d + 1, c], table[2 * d, c],
                            table[2 * d + 2, c],
                        )  # fmt: skip
                        floor_buffer[i] = mean if mean > floor_buffer[i] else floor_buffer[i]
                        g[z] = lowest
                        offsets[c + 1] += 1
                    r = base + i
                    _fold(g.reshape((1, seen)), floor_buffer[i : i + 1], top[r : r + 1],
                          total[r : r + 1], acc[i : i + 1])  # fmt: skip
            if width > 0:
                held_low, held_high = -1, -1
                for tile in range(t0, t1):
                    low, high = tiles[tile, 4], tiles[tile, 5]
                    if high == low:
                        continue
                    a0, a1 = tiles[tile, 0] - base, tiles[tile, 1] - base
                    rows = a1 - a0
                    cols = (high - low + LANES - 1) // LANES * LANES
                    s = s_buffer[: rows * cols].reshape((rows, cols))
                    u = u_buffer[: rows * cols].reshape((rows, cols))
                    mine = lines[a0:a1]
                    for r in range(rows):
                        start = at[a0 + r]
                        for c in range(cols):
                            s[r, c] = g_all[start + c]
                    row_products(
                        s, lines[:rows], vbar[low:high], high - low, width, acc, mine, False
                    )
                    if h == 0:
                        continue
                    block = block_buffer[: height * cols].reshape((height, cols))
                    if held_low != low or held_high != high:
                        _columns(table, low, high, d, block)
                        held_low, held_high = low, high
                    for a in range(h):
                        _slopes(
                            x, mine, block, 2 * d + 3 + a * (d + 1), d, cols, s, u, lines[:rows]
                        )
                        row_products(
                            u, lines[:rows], beta[a, low:high], high - low, width, acc, mine, False
                        )
                begin = 0
                for c in range(groups):
                    cols, m = wide_of[c + 1] - wide_of[c], first[c + 1] - first[c]
                    for l0 in range(begin, lists[c], LIST):
                        mine = listed[l0 : min(l0 + LIST, lists[c])]
                        rows = mine.size
                        s = s_buffer[: rows * cols].reshape((rows, cols))
                        u = u_buffer[: rows * cols].reshape((rows, cols))
                        for r in range(rows):
                            start = cursor[mine[r]]
                            for j in range(cols):
                                s[r, j] = g_all[start + j]
                            cursor[mine[r]] = start + cols
                        values = vkids[first[c] : first[c + 1]]
                        row_products(s, lines[:rows], values, m, width, acc, mine, False)
                        flat = tables[wide_of[c] * height : wide_of[c + 1] * height]
                        block = flat.reshape((height, cols))
                        for a in range(h):
                            _slopes(
                                x, mine, block, 2 * d + 3 + a * (d + 1), d, cols, s, u, lines[:rows]
                            )
                            values = beta_kids[a, first[c] : first[c + 1]]
                            row_products(u, lines[:rows], values, m, width, acc, mine, False)
                    begin = lists[c]
        fold_near(
            x, acc, top[base : base + n], total[base : base + n], nears, offsets, listed, kt,
            starts, wide, ordered, limit, s_buffer, lines,
        )  # fmt: skip
        for i in range(n):
            inverse = dtype.type(1.0) / total[base + i] if total[base + i] > zero else zero
            for t in range(width):
                out[base + i, t] = acc[i, t] * inverse


@kernel()
def _masses_of(
    x: Array, length: Any, block: Array, low: int, d: int, g: Array, u: Array
) -> None:
    """Logarithms of masses and second-order terms of one row, columns ``low, ...`` of a table."""
    two = g.dtype.type(2.0)
    g[:] = g.dtype.type(0.0)
    u[:] = g.dtype.type(0.0)
    for t in range(d):
        value = x[t]
        w = value * value
        kappa, half = block[t, low:], block[d + t, low:]
        for c in range(g.size):
            g[c] += value * kappa[c]
            u[c] += w * half[c]
    rho, frozen, bits = block[2 * d, low:], block[2 * d + 1, low:], block[2 * d + 2, low:]
    for c in range(g.size):
        f, w = frozen[c], u[c]
        phi = w if w <= f else two * np.sqrt(f * w) - f
        cap = length * rho[c]
        phi = phi if phi < cap else cap
        g[c] += phi + bits[c]


@kernel()
def _slopes_of(x: Array, block: Array, low: int, start: int, d: int, slope: Array) -> None:
    """Clipped slopes of one row and one direction, of columns ``low, ...`` of a table."""
    slope[:] = slope.dtype.type(0.0)
    for t in range(d):
        value, p = x[t], block[start + t, low:]
        for c in range(slope.size):
            slope[c] += value * p[c]
    bound = block[start + d, low:]
    for c in range(slope.size):
        b = bound[c]
        value = slope[c] if slope[c] < b else b
        slope[c] = value if value > -b else -b


@kernel(dealt=True)
def visit_levels(
    turn: Array, q: Array, k: Array, rows: Array, tile_of: Array, stops: Array, tiles: Array,
    factor: float, kt: Array, members: Array, starts: Array, wide: Array, table: Array,
    coarse: Array, kids: Array, first: Array, wide_of: Array, tables: Array, place: Array,
    z: Array, refined: Array, near: Array, dense: Array, y: Array, keys: Array, fine: Array,
    far: Array, spread: Array, coarse_spread: Array, squares: Array,
) -> None:  # fmt: skip
    """Form rows of the matrix one by one, divided by their own sums, and do what is asked for.

    * ``dense (len(rows), N)``: write them; zero before.
    * ``y (len(rows), w)``: add products of weights and rows of y, those of every G-th row in slab
      g, to ``keys (G, N, w)`` of keys read one by one, ``fine (G, 1 + h, R, w)`` of clusters and
      the same times the clipped slopes, and ``far (G, R2, w)`` of coarse clusters.
    * ``squares (len(rows),)``: ``sum_c w_ic^2 sigma_ic^2 spread_c`` of clusters and coarse ones.

    Arrays without rows are not asked for.
    """
    d, h = q.shape[1], z.shape[0]
    width, height = y.shape[1], table.shape[0]
    most, many, groups = near.shape[1], refined.shape[1], first.size - 1
    direct, ends, longest, size, children = 0, 0, 0, 0, 0
    for t in range(tiles.shape[0]):
        longest = max(longest, tiles[t, 3] - tiles[t, 2])
        direct = max(direct, tiles[t, 5] - tiles[t, 4])
        ends = max(ends, tiles[t, 8])
    for c in range(starts.size - 1):
        size = max(size, starts[c + 1] - starts[c])
    for c in range(groups):
        children = max(children, wide_of[c + 1] - wide_of[c])
    direct += min(many * children, wide_of[groups])
    dtype = q.dtype
    scale = dtype.type(factor)
    lowest = dtype.type(-np.inf)
    zero, one = dtype.type(0.0), dtype.type(1.0)
    x = np.empty(d, dtype)
    own = np.empty(longest, dtype)
    g_buffer, u_buffer = np.empty(direct, dtype), np.empty(direct, dtype)
    slopes = np.empty((h, direct), dtype)
    names = np.empty(direct, np.int64)
    a_buffer, b_buffer = np.empty(ends, dtype), np.empty(ends, dtype)
    logits = np.empty(min(most * size, members.size), dtype)
    slabs = keys.shape[0] if y.shape[0] > 0 else rows.size
    for _ in range(slabs):
        slab = take(turn)
        if slab >= slabs:
            break
        for item in range(slab, rows.size, slabs):
            i = rows[item]
            tile = tile_of[i]
            own_low, low, high, end = tiles[tile, 2], tiles[tile, 4], tiles[tile, 5], tiles[tile, 8]
            own_high = stops[i] if tiles[tile, 3] > own_low else own_low
            norm = 0.0
            for t in range(d):
                x[t] = scale * q[i, t]
                norm += np.float64(x[t]) * np.float64(x[t])
            length = dtype.type(np.sqrt(norm))
            largest = lowest
            for j in range(own_low, own_high):
                value = zero
                for t in range(d):
                    value += x[t] * k[j, t]
                own[j - own_low] = value
                largest = value if value > largest else largest
            a, b = a_buffer[:end], b_buffer[:end]
            _masses_of(x, length, coarse, 0, d, a, b)
            a[tiles[tile, 9] : tiles[tile, 10]] = lowest
            # Clusters seen directly, then the children of each that is refined.
            seen = high - low
            _masses_of(x, length, table, low, d, g_buffer[:seen], u_buffer[:seen])
            for r in range(h):
                _slopes_of(x, table, low, 2 * d + 3 + r * (d + 1), d, slopes[r, :seen])
            for c in range(low, high):
                names[c - low] = c
            g_buffer[tiles[tile, 6] - low : tiles[tile, 7] - low] = lowest
            for s in range(many):
                c = refined[i, s]
                if c < 0:
                    break
                a[c] = lowest
                cols = wide_of[c + 1] - wide_of[c]
                after = seen + first[c + 1] - first[c]
                block = tables[wide_of[c] * height : wide_of[c + 1] * height].reshape(
                    (height, cols)
                )
                _masses_of(x, length, block, 0, d, g_buffer[seen:after], u_buffer[seen:after])
                for r in range(h):
                    _slopes_of(x, block, 0, 2 * d + 3 + r * (d + 1), d, slopes[r, seen:after])
                for j in range(after - seen):
                    names[seen + j] = kids[first[c] + j]
                seen = after
            g, u = g_buffer[:seen], u_buffer[:seen]
            read = 0
            for s in range(most):
                c = near[i, s]
                if c < 0:
                    break
                start = high - low
                if low <= c < high:
                    start = c - low
                else:
                    for r in range(many):
                        parent = refined[i, r]
                        if parent < 0:
                            break
                        if parent == place[0, c]:
                            start += place[1, c]
                            break
                        start += first[parent + 1] - first[parent]
                g[start] = lowest
                m, step = starts[c + 1] - starts[c], wide[c + 1] - wide[c]
                for j in range(m):
                    logits[read + j] = zero
                for t in range(d):
                    value = x[t]
                    row = kt[wide[c] * (d + 1) + t * step :]
                    for j in range(m):
                        logits[read + j] += value * row[j]
                for j in range(m):
                    value = logits[read + j]
                    largest = value if value > largest else largest
                read += m
            for c in range(end):
                largest = a[c] if a[c] > largest else largest
            for c in range(seen):
                largest = g[c] if g[c] > largest else largest
            if largest == lowest:
                continue
            sums = 0.0
            for j in range(own_high - own_low):
                own[j] = exp2(dtype.type(own[j] - largest))
                sums += np.float64(own[j])
            for j in range(read):
                logits[j] = exp2(dtype.type(logits[j] - largest))
                sums += np.float64(logits[j])
            for c in range(end):
                a[c] = exp2(dtype.type(a[c] - largest))
                sums += np.float64(a[c])
            for c in range(seen):
                g[c] = exp2(dtype.type(g[c] - largest))
                sums += np.float64(g[c])
            inverse = dtype.type(1.0 / sums)
            for j in range(own_high - own_low):
                own[j] *= inverse
            for j in range(read):
                logits[j] *= inverse
            for c in range(end):
                a[c] *= inverse
            for c in range(seen):
                g[c] *= inverse
            if dense.shape[0] > 0:
                line = dense[item]
                for j in range(own_low, own_high):
                    line[j] = own[j - own_low]
                read = 0
                for s in range(most):
                    c = near[i, s]
                    if c < 0:
                        break
                    for j in range(starts[c], starts[c + 1]):
                        line[members[j]] = logits[read]
                        read += 1
                for c in range(end):
                    if not a[c] > zero:
                        continue
                    m = 0
                    for s in range(first[c], first[c + 1]):
                        m += starts[kids[s] + 1] - starts[kids[s]]
                    share = a[c] / dtype.type(m)
                    for s in range(first[c], first[c + 1]):
                        for j in range(starts[kids[s]], starts[kids[s] + 1]):
                            line[members[j]] = share
                for s in range(seen):
                    if not g[s] > zero:
                        continue
                    c = names[s]
                    share = g[s] / dtype.type(starts[c + 1] - starts[c])
                    for j in range(starts[c], starts[c + 1]):
                        w = one
                        for r in range(h):
                            w += slopes[r, s] * z[r, j]
                        line[members[j]] = share * (w if w > zero else zero)
            if y.shape[0] > 0:
                source = y[item]
                for j in range(own_low, own_high):
                    target, w = keys[slab, j], own[j - own_low]
                    for t in range(width):
                        target[t] += w * source[t]
                read = 0
                for s in range(most):
                    c = near[i, s]
                    if c < 0:
                        break
                    for j in range(starts[c], starts[c + 1]):
                        target, w = keys[slab, members[j]], logits[read]
                        read += 1
                        for t in range(width):
                            target[t] += w * source[t]
                for c in range(end):
                    target, w = far[slab, c], a[c]
                    for t in range(width):
                        target[t] += w * source[t]
                for s in range(seen):
                    target, w = fine[slab, 0, names[s]], g[s]
                    for t in range(width):
                        target[t] += w * source[t]
                    for r in range(h):
                        target, w = fine[slab, 1 + r, names[s]], slopes[r, s] * g[s]
                        for t in range(width):
                            target[t] += w * source[t]
            if squares.size > 0:
                found = 0.0
                for c in range(end):
                    w = np.float64(a[c])
                    found += w * w * np.float64(b[c]) * coarse_spread[c]
                for s in range(seen):
                    w = np.float64(g[s])
                    found += w * w * np.float64(u[s]) * spread[names[s]]
                squares[item] = found
