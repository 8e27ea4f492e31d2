"""Near keys exactly, far clusters by their moments: clusters, moments, choice and products.

In base 2, with ``x_i = scale log2(e) q_i``, a far cluster c of m_c keys has for row i the logarithm
of its mass

    g_ic = x_i . kappa_c + log2 m_c + phi(u_ic),   u_ic = sum_j x_ij^2 half_cj,
    phi(u) = u up to f_c, else 2 sqrt(f_c u) - f_c;  at most |x_i| rho_c,

with the mean key ``kappa``, ``half`` ln 2 / 2 times the variances of the coordinates, and the
radius rho.  Its value is ``vbar_c + sum_a clip(x_i . p_ca, -b_ca, b_ca) beta_ca``.  A row folds

* its own keys, a range of the list of keys that ends at ``stops[i]``, one by one;
* the clusters ``< end`` of its tile that are not among ``skip``, by g, but
* those that it chose key by key.  Rows that chose the same cluster are multiplied together.

A choice: the ``most`` clusters of largest g, of equal ones the lower, of which those stay whose
share of what was read so far times ``sigma^2 = 2 ln 2 u`` is at least tau.

``tiles (T, 7)``: first row, last row + 1, first and last + 1 own key, clusters, first and last + 1
cluster to skip.  Items are ranges of tiles; each is done by one thread in an order of its own, so
that results do not depend on the number of threads.

Tables of clusters are transposed and filled up to whole registers, columns ``(., R')``, of which
those without a cluster have ``bits = -inf``: products of few rows are `row_products`, in which a
row does not depend on those beside it.  The keys of a cluster, ``(d + 1, m')``, are filled up with
zeros, whose weights nobody adds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import LANES, add_product, kernel, row_products, take
from .softmax import LN2, exp2, row_maximum

Array = NDArray[Any]

# Clusters whose largest is found before any of them is looked at, and rows of a product of a list.
SCAN, LIST = 32, 96
# Rows of own keys of a causal tile that are multiplied together; it computes half a square more
# than they see.
OWN = 24
# Rounding of a logit in base 2, of its precision at least, and of a few weights and their sum.
EPS, CLOSE = 2.0**-23, 1e-5


# --- clusters -----------------------------------------------------------------------------------


@kernel()
def _transposed(k: Array, out: Array, first: int) -> None:
    """Write the rows of k as columns ``first, ...`` of ``out``, and zeros beyond them."""
    for t in range(out.shape[0]):
        row = out[t, first:]
        for j in range(k.shape[0]):
            row[j] = k[j, t]
        for j in range(k.shape[0], row.size):
            row[j] = 0.0


@kernel(dealt=True)
def cluster(
    turn: Array, x: Array, starts: Array, first: Array, steps: int,
    labels: Array, middles: Array, centers: Array,
) -> None:  # fmt: skip
    """Cluster the rows of x block by block: farthest rows first, then ``steps`` of Lloyd.

    Block b holds rows ``starts[b] : starts[b + 1]`` and clusters ``first[b] : first[b + 1]``.  The
    first centre is the row farthest from the mean, the next one that farthest from those before,
    until all distances are zero; ``labels`` number clusters over all blocks, ``centers`` are about
    the ``middles`` of the blocks, and infinite where a block had no row for one.
    """
    blocks, d = first.size - 1, x.shape[1]
    widest, most = 0, 0
    for b in range(blocks):
        widest = max(widest, starts[b + 1] - starts[b])
        most = max(most, first[b + 1] - first[b])
    y_buffer = np.empty(widest * d, x.dtype)
    across_buffer = np.empty((widest + LANES) * d, x.dtype)
    lines = np.arange(most)
    s_buffer = np.empty((widest + LANES) * most, x.dtype)
    c_buffer = np.empty(most * d, x.dtype)
    far = np.empty(widest, x.dtype)
    best = np.empty(widest, x.dtype)
    place = np.empty(widest, np.int32)
    before = np.empty(widest, np.int32)
    sums = np.empty((most, d), np.float64)
    counts = np.empty(most, np.int64)
    zero = x.dtype.type(0.0)
    half = x.dtype.type(0.5)
    for _ in range(blocks):
        b = take(turn)
        if b >= blocks:
            break
        low = starts[b]
        n = starts[b + 1] - low
        wanted = first[b + 1] - first[b]
        y = y_buffer[: n * d].reshape((n, d))
        middle = sums[0]
        middle[:] = 0.0
        for j in range(n):
            for t in range(d):
                middle[t] += np.float64(x[low + j, t])
        for t in range(d):
            middles[b, t] = middle[t] / max(n, 1)
        for j in range(n):
            square = zero
            for t in range(d):
                value = x[low + j, t] - middles[b, t]
                y[j, t] = value
                square += value * value
            far[j] = square
        columns = (n + LANES - 1) // LANES * LANES
        across = across_buffer[: d * columns].reshape((d, columns))
        _transposed(y, across, 0)
        count = 0
        for c in range(wanted):
            pick, high = 0, x.dtype.type(-1.0)
            for j in range(n):
                pick = j if far[j] > high else pick
                high = far[j] if far[j] > high else high
            if not high > zero and c > 0:
                break
            for t in range(d):
                c_buffer[c * d + t] = y[pick, t]
            count += 1
            best[:n] = zero
            for t in range(d):
                center, row = y[pick, t], across[t]
                for j in range(n):
                    value = row[j] - center
                    best[j] += value * value
            for j in range(n):
                far[j] = best[j] if best[j] < far[j] or c == 0 else far[j]
        for c in range(count, wanted):
            for t in range(d):
                centers[first[b] + c, t] = np.inf
        chosen = c_buffer[: count * d].reshape((count, d))
        scores = s_buffer[: count * columns].reshape((count, columns))
        for step in range(steps + 1):
            row_products(
                chosen, lines[:count], across, d, columns, scores, lines[:count], True
            )  # fmt: skip
            best[:n] = -np.inf
            before[:n] = place[:n]
            place[:n] = 0
            for c in range(count):
                offset = zero
                for t in range(d):
                    offset += chosen[c, t] * chosen[c, t]
                offset *= half
                for j in range(n):
                    score = scores[c, j] - offset
                    place[j] = np.int32(c) if score > best[j] else place[j]
                    best[j] = score if score > best[j] else best[j]
            if step == steps:
                break
            # Sums change by the rows that moved; centres stay where none did.
            if step == 0:
                sums[:count] = 0.0
                counts[:count] = 0
            moved = 0
            for j in range(n):
                c = place[j]
                if step > 0 and c == before[j]:
                    continue
                moved += 1
                counts[c] += 1
                for t in range(d):
                    sums[c, t] += np.float64(y[j, t])
                if step > 0:
                    c = before[j]
                    counts[c] -= 1
                    for t in range(d):
                        sums[c, t] -= np.float64(y[j, t])
            if moved == 0:
                break
            for c in range(count):
                if counts[c] > 0:
                    for t in range(d):
                        chosen[c, t] = sums[c, t] / counts[c]
        for c in range(count):
            for t in range(d):
                centers[first[b] + c, t] = chosen[c, t]
        for j in range(n):
            labels[low + j] = first[b] + place[j]


@kernel(dealt=True)
def moments(
    turn: Array, k: Array, x: Array, members: Array, starts: Array, wide: Array, kt: Array,
    kappa: Array, half: Array, rho: Array, z: Array, p: Array, bound: Array,
) -> None:  # fmt: skip
    """Fill what is known of the keys of every cluster c, ``members[starts[c] : starts[c + 1]]``.

    ``kt`` holds the keys of each, transposed, with a row of ones below them, in columns
    ``wide[c] : wide[c + 1]``; ``kappa``, ``half (d, R')``, ``rho (R',)`` as above.  For each of the
    directions a, the leading ones of the rows of x, ``z (h, N)`` are the scores of members,
    ``p (h, d, R')`` the slopes ``ln 2 mean((k - kappa) z) / mean(z^2)`` and ``bound (h, R')`` 1
    over h times the largest |z|.  All are zero before.
    """
    d, count, h = k.shape[1], starts.size - 1, z.shape[0]
    widest = 0
    for c in range(count):
        widest = max(widest, starts[c + 1] - starts[c])
    mean = np.empty(d, np.float64)
    square = np.empty(d, np.float64)
    y = np.empty((widest if h > 0 else 0, x.shape[1]), np.float64)
    scores = np.empty(widest if h > 0 else 0, np.float64)
    e = np.empty((h, x.shape[1]), np.float64)
    next_e = np.empty((h, x.shape[1]), np.float64)
    tiny = np.finfo(np.float64).tiny
    for _ in range(count):
        c = take(turn)
        if c >= count:
            break
        low = starts[c]
        m = starts[c + 1] - low
        if m == 0:
            continue
        columns = wide[c + 1] - wide[c]
        block = kt[wide[c] * (d + 1) : wide[c + 1] * (d + 1)].reshape((d + 1, columns))
        mean[:] = 0.0
        for j in range(m):
            row = k[members[low + j]]
            for t in range(d):
                mean[t] += np.float64(row[t])
                block[t, j] = row[t]
            block[d, j] = 1.0
        for t in range(d):
            mean[t] /= m
            kappa[t, c] = mean[t]
        square[:] = 0.0
        radius = 0.0
        for j in range(m):
            row = k[members[low + j]]
            distance = 0.0
            for t in range(d):
                value = np.float64(row[t]) - mean[t]
                square[t] += value * value
                distance += value * value
            radius = max(radius, distance)
        for t in range(d):
            half[t, c] = 0.5 * LN2 / m * square[t]
        rho[c] = np.sqrt(radius)
        if h == 0:
            continue
        width = x.shape[1]
        square[:] = 0.0
        for j in range(m):
            row = x[members[low + j]]
            for t in range(width):
                value = np.float64(row[t])
                y[j, t] = value
                square[t] += value
        for j in range(m):
            for t in range(width):
                y[j, t] -= square[t] / m
        # In units of the largest entry, whose powers would overflow: directions have no length.
        largest = 0.0
        for j in range(m):
            for t in range(width):
                largest = max(largest, abs(y[j, t]))
        largest = 1.0 / largest if largest > tiny else 0.0
        for j in range(m):
            for t in range(width):
                y[j, t] *= largest
        # Columns of the covariance of largest diagonal, then four steps of subspace iteration.
        square[:] = 0.0
        for j in range(m):
            for t in range(width):
                square[t] += y[j, t] * y[j, t]
        for a in range(h):
            column = 0
            for t in range(width):
                column = t if square[t] > square[column] else column
            square[column] = -1.0
            e[a] = 0.0
            for j in range(m):
                for t in range(width):
                    e[a, t] += y[j, column] * y[j, t]
        for step in range(5):
            for a in range(h):
                for other in range(a):
                    total = 0.0
                    for t in range(width):
                        total += e[a, t] * e[other, t]
                    for t in range(width):
                        e[a, t] -= total * e[other, t]
                total = 0.0
                for t in range(width):
                    total += e[a, t] * e[a, t]
                total = 1.0 / np.sqrt(total) if total > tiny else 0.0
                for t in range(width):
                    e[a, t] *= total
            if step == 4:
                break
            next_e[:] = 0.0
            for j in range(m):
                for a in range(h):
                    total = 0.0
                    for t in range(width):
                        total += y[j, t] * e[a, t]
                    for t in range(width):
                        next_e[a, t] += total * y[j, t]
            e[:] = next_e
        for a in range(h):
            middle = 0.0
            for j in range(m):
                score = 0.0
                for t in range(width):
                    score += y[j, t] * e[a, t]
                scores[j] = score
                middle += score
            middle /= m
            # Scores along a direction that is only rounding have a mean, and weights would not
            # add to one.
            largest, total = 0.0, tiny
            square[:] = 0.0
            for j in range(m):
                score = scores[j] - middle
                z[a, low + j] = score
                largest = max(largest, abs(score))
                total += score * score
                row = k[members[low + j]]
                for t in range(d):
                    square[t] += (np.float64(row[t]) - mean[t]) * score
            bound[a, c] = 1.0 / (h * largest) if largest > 0.0 else 0.0
            for t in range(d):
                p[a, t, c] = LN2 * square[t] / total if largest > 0.0 else 0.0


@kernel(dealt=True)
def values_of(
    turn: Array, v: Array, members: Array, starts: Array, z: Array, ordered: Array, vbar: Array,
    beta: Array,
) -> None:  # fmt: skip
    """Order the values by clusters, ``ordered (N, w)``, and take their means and slopes.

    ``vbar_c = mean v``, ``beta_ca = mean z_a (v - vbar)``: (R, w) and (h, R, w).
    """
    width, count, h = v.shape[1], vbar.shape[0], z.shape[0]
    mean = np.empty(width, np.float64)
    for _ in range(count):
        c = take(turn)
        if c >= count:
            break
        low = starts[c]
        m = starts[c + 1] - low
        mean[:] = 0.0
        for j in range(low, low + m):
            row = v[members[j]]
            for t in range(width):
                mean[t] += np.float64(row[t])
                ordered[j, t] = row[t]
        for t in range(width):
            mean[t] /= max(m, 1)
            vbar[c, t] = mean[t]
        for a in range(h):
            for t in range(width):
                beta[a, c, t] = 0.0
            for j in range(low, low + m):
                score = z[a, j]
                for t in range(width):
                    beta[a, c, t] += score * (ordered[j, t] - vbar[c, t])
            for t in range(width):
                beta[a, c, t] /= max(m, 1)


# --- pieces of a row ----------------------------------------------------------------------------


@kernel()
def _log_masses(s: Array, u: Array, norms: Array, frozen: Array, rho: Array, bits: Array) -> None:
    """``s += phi(u) + log2 m`` for a tile of rows and all clusters; see the head of the file."""
    two = s.dtype.type(2.0)
    for i in range(s.shape[0]):
        norm = norms[i]
        for c in range(s.shape[1]):
            f = frozen[c]
            w = u[i, c]
            phi = two * np.sqrt(f * w) - f
            phi = w if w <= f else phi
            cap = norm * rho[c]
            phi = phi if phi < cap else cap  # which also stands for what is no number
            s[i, c] += phi + bits[c]


@kernel()
def _fold(s: Array, floor: Array, top: Array, total: Array, acc: Array) -> None:
    """Fold logits into the running softmax and leave weights, relative to at least ``floor``."""
    lowest = s.dtype.type(-np.inf)
    zero = s.dtype.type(0.0)
    for i in range(s.shape[0]):
        high = row_maximum(s[i])
        high = floor[i] if floor[i] > high else high
        before = top[i]
        if high > before:
            shift = exp2(s.dtype.type(before - high))
            top[i] = high
            total[i] *= shift
            for t in range(acc.shape[1]):
                acc[i, t] *= shift
        m = top[i] if top[i] != lowest else zero
        part = zero
        for j in range(s.shape[1]):
            e = exp2(s.dtype.type(s[i, j] - m))
            s[i, j] = e
            part += e
        total[i] += part


@kernel()
def _above(g: Array, value: Any) -> Any:
    """Return how many entries of a row are larger, in its precision: float32 counts exactly."""
    zero, one = g.dtype.type(0.0), g.dtype.type(1.0)
    count = zero
    for c in range(g.size):
        count += one if g[c] > value else zero
    return count


@kernel()
def _cut(g: Array, most: int, below: Any) -> Any:
    """Return numbers ``low <= high`` with at most ``most`` entries above ``high``.

    Those between them, if any, are equal: the first of these fill up what is missing.  Bisection;
    a pass over a row is a few instructions for eight entries.  More than ``most`` entries are above
    ``below``, unless it is -inf.
    """
    lowest = g.dtype.type(-np.inf)
    wanted = g.dtype.type(most)
    high = row_maximum(g)
    low = below
    if below == lowest:
        low = high
        for c in range(g.size):
            value = g[c] if g[c] > lowest else high
            low = value if value < low else low
        if _above(g, lowest) <= wanted:
            return lowest, lowest
        if _above(g, low) <= wanted:
            return lowest, low
    half = g.dtype.type(0.5)
    while True:
        middle = g.dtype.type(half * low + half * high)
        if not low < middle < high:
            return low, high
        count = _above(g, middle)
        if count == wanted:
            return middle, middle
        if count > wanted:
            low = middle
        else:
            high = middle


@kernel()
def _scan(g: Array, above: Any, place: Array, best: Array) -> int:
    """Write where a row is larger, in ascending order, and what it is there; return how often."""
    found = 0
    for c0 in range(0, g.size, SCAN):
        part = g[c0 : min(c0 + SCAN, g.size)]
        if not row_maximum(part) > above:
            continue
        for c in range(part.size):
            value = part[c]
            if value > above:
                place[found] = c0 + c
                best[found] = value
                found += 1
    return found


@kernel()
def _few(
    g: Array, u: Array, top: Any, total: Any, tau: Any, above: Any, ref: Any, best: Array,
    place: Array, chosen: Array,
) -> int:  # fmt: skip
    """Do what `_choose` does where candidates above a limit decide; -1 if the others could.

    At most so many are above that all are candidates; the others add at most so many times the
    limit to the sums, and the answer stands if that cannot change it.
    """
    real = g.dtype.type
    found = _scan(g, above, place, best)
    sums = total * exp2(real(top - ref)) if top != real(-np.inf) else real(0.0)
    for y in range(found):
        w = exp2(real(best[y] - ref))
        sums += w
        best[y] = w * real(2.0 * LN2) * u[place[y]]
    rest = real(chosen.size - found) * exp2(real(above - ref))
    least, largest = tau * sums * real(1 - CLOSE), tau * (sums + rest) * real(1 + CLOSE)
    for y in range(found):
        if least <= best[y] < largest:
            return -1
    kept = 0
    for y in range(found):
        if best[y] >= largest:
            chosen[kept] = place[y]
            kept += 1
    return kept


@kernel()
def _choose(
    g: Array, u: Array, top: Any, total: Any, tau: Any, best: Array, place: Array, chosen: Array
) -> int:
    """Write the near clusters of one row to ``chosen``, then -1, and return how many there are.

    ``best`` and ``place`` are of the length of ``chosen``.
    """
    real = g.dtype.type
    most = chosen.size
    lowest = real(-np.inf)
    ref = row_maximum(g)
    ref = top if top > ref else ref
    kept, below = -1, lowest
    if tau > 0 and ref > lowest:
        # Sums of a row are at least its largest weight, for own keys have the weight 1 among them:
        # with the largest u only clusters above a limit can stay.
        limit = real(np.log2(tau / (real(2.0 * LN2) * row_maximum(u))))
        above = ref + limit - real(0.01) - real(8.0 * EPS) * abs(ref)
        if _above(g, above) <= real(most):
            kept = _few(g, u, top, total, tau, above, ref, best, place, chosen)
        else:
            below = above
    if kept < 0:
        low, high = _cut(g, most, below)
        found = _scan(g, high, place, best)
        if low < high:
            for c in range(g.size):
                if found < most and low < g[c] <= high:
                    place[found] = c
                    best[found] = g[c]
                    found += 1
        ref = top
        for y in range(found):
            ref = best[y] if best[y] > ref else ref
        kept = 0
        if found > 0:
            sums = total * exp2(real(top - ref)) if top != lowest else real(0.0)
            for y in range(found):
                w = exp2(real(best[y] - ref))
                best[y] = w
                sums += w
            for y in range(found):
                if best[y] * real(2.0 * LN2) * u[place[y]] >= tau * sums:
                    chosen[kept] = place[y]
                    kept += 1
    for y in range(kept, most):
        chosen[y] = -1
    return kept


@kernel()
def _within(
    g: Array, starts: Array, room: int, place: Array, chosen: Array, taken: Array
) -> int:
    """Leave in ``chosen`` what a budget of ``room`` keys allows, and return how many clusters.

    Those of largest mass ``g[place]`` come first; one that has more keys than are left is skipped.
    ``place`` and ``taken`` are of the length of ``chosen``, whose order is kept.
    """
    found = 0
    while found < chosen.size and chosen[found] >= 0:
        taken[found] = 0
        found += 1
    for _ in range(found):
        best = -1
        for y in range(found):
            if taken[y] == 0 and (best < 0 or g[place[y]] > g[place[best]]):
                best = y
        m = starts[chosen[best] + 1] - starts[chosen[best]]
        taken[best] = 1 if m <= room else -1
        room -= m if m <= room else 0
    kept = 0
    for y in range(found):
        if taken[y] > 0:
            chosen[kept] = chosen[y]
            place[kept] = place[y]
            kept += 1
    for y in range(kept, found):
        chosen[y] = -1
    return kept


@kernel()
def _scaled(q: Array, factor: Any, x: Array, squares: Array, norms: Array) -> None:
    """``x = factor q``, its squares and its norms, of a tile; x may have more columns."""
    for i in range(q.shape[0]):
        total = 0.0
        for t in range(q.shape[1]):
            value = factor * q[i, t]
            x[i, t] = value
            squares[i, t] = value * value
            total += np.float64(value) * np.float64(value)
        norms[i] = np.sqrt(total)


@kernel()
def fold_near(
    x: Array, acc: Array, top: Array, total: Array, near: Array, offsets: Array, listed: Array,
    kt: Array, starts: Array, wide: Array, ordered: Array, limit: Any, buffer: Array, lines: Array,
) -> None:  # fmt: skip
    """Fold the keys of near clusters into the running softmax, the rows of each together.

    ``x (n, d + 1)`` with a last column to write to, ``near (n, most)`` clusters, then -1,
    ``offsets[c + 1]`` how many rows chose c; ``buffer`` holds `LIST` rows of a cluster.
    """
    d, most, width = x.shape[1] - 1, near.shape[1], acc.shape[1]
    count = starts.size - 1
    zero = x.dtype.type(0.0)
    for c in range(count):
        offsets[c + 1] += offsets[c]
    for i in range(x.shape[0]):
        x[i, d] = -top[i]
        for y in range(most):
            c = near[i, y]
            if c < 0:
                break
            listed[offsets[c]] = i
            offsets[c] += 1
    first = 0
    for c in range(count):
        if offsets[c] == first:
            continue
        m, cols = starts[c + 1] - starts[c], wide[c + 1] - wide[c]
        keys = kt[wide[c] * (d + 1) : wide[c + 1] * (d + 1)].reshape((d + 1, cols))
        for l0 in range(first, offsets[c], LIST):
            mine = listed[l0 : min(l0 + LIST, offsets[c])]
            rows = mine.size
            flat = buffer[: rows * cols]
            weights = flat.reshape((rows, cols))
            row_products(x, mine, keys, d + 1, cols, weights, lines[:rows], True)
            if row_maximum(flat) > limit:
                for r in range(rows):
                    high = row_maximum(weights[r, :m])
                    if high > zero:
                        i = mine[r]
                        shift = exp2(x.dtype.type(-high))
                        top[i] += high
                        x[i, d] = -top[i]
                        total[i] *= shift
                        for t in range(width):
                            acc[i, t] *= shift
                        for j in range(m):
                            weights[r, j] -= high
            for j in range(flat.size):
                flat[j] = exp2(x.dtype.type(flat[j]))
            for r in range(rows):
                part = zero
                for j in range(m):
                    part += weights[r, j]
                total[mine[r]] += part
            if width > 0:
                row_products(
                    weights, lines[:rows], ordered[starts[c] : starts[c + 1]], m, width, acc, mine,
                    False,
                )  # fmt: skip
        first = offsets[c]


# --- A X ----------------------------------------------------------------------------------------


@kernel(dealt=True)
def attend(
    turn: Array, q: Array, k: Array, v: Array, stops: Array, tiles: Array, items: Array,
    factor: float, kt: Array, starts: Array, wide: Array, kappa: Array, half: Array, rho: Array,
    frozen: Array, bits: Array, p: Array, bound: Array, ordered: Array, vbar: Array,
    beta: Array, tau: float, room: int, limit: float, choose: bool, near: Array, top: Array,
    total: Array, out: Array,
) -> None:  # fmt: skip
    """``out (n_q, w)``, the largest logit ``top`` that rows refer to, and ``total`` beside it.

    ``near (n_q, most)`` int32 is written if ``choose``, and read otherwise: clusters of at most
    ``room`` keys together, then -1.
    Logits of near keys may exceed ``top`` by ``limit``, which is far from an overflow; those that
    do move it.
    """
    d, width, count, h = q.shape[1], v.shape[1], starts.size - 1, p.shape[0]
    most, columns = near.shape[1], kappa.shape[1]
    highest, longest, members, tallest = 0, 0, 0, 0
    for t in range(tiles.shape[0]):
        highest = max(highest, tiles[t, 1] - tiles[t, 0])
        longest = max(longest, tiles[t, 3] - tiles[t, 2])
    for c in range(count):
        members = max(members, wide[c + 1] - wide[c])
    for item in range(items.size - 1):
        tallest = max(tallest, tiles[items[item + 1] - 1, 1] - tiles[items[item], 0])
    # No power of two: steps through columns would meet in few lines of the cache.
    longest = (longest + LANES - 1) // LANES * LANES + LANES
    dtype = q.dtype
    scale = dtype.type(factor)
    x_buffer = np.empty(tallest * (d + 1), dtype)
    acc_buffer = np.empty(tallest * width, dtype)
    squares = np.empty((highest, d), dtype)
    norm_buffer = np.empty(highest, dtype)
    floor_buffer = np.empty(highest, dtype)
    s_buffer = np.empty(highest * max(columns, longest), dtype)
    u_buffer = np.empty(highest * columns, dtype)
    own = np.empty((d, longest), dtype)
    offsets = np.empty(count + 1, np.int64)
    listed = np.empty(tallest * most, np.int64)
    lines = np.arange(max(tallest, LIST))
    weight_buffer = np.empty(LIST * members, dtype)
    best = np.empty(most, dtype)
    place = np.empty(most, np.int64)
    taken = np.empty(most, np.int64)
    lowest = dtype.type(-np.inf)
    zero = dtype.type(0.0)
    two = dtype.type(2.0)
    threshold = dtype.type(tau)
    held, reached = -1, -1
    for _ in range(items.size - 1):
        # Later items have more to do where rows see the keys before them.
        item = items.size - 2 - take(turn)
        if item < 0:
            break
        base = tiles[items[item], 0]
        stop = tiles[items[item + 1] - 1, 1]
        x = x_buffer[: (stop - base) * (d + 1)].reshape((stop - base, d + 1))
        acc = acc_buffer[: (stop - base) * width].reshape((stop - base, width))
        acc[:] = 0.0
        offsets[:] = 0
        for tile in range(items[item], items[item + 1]):
            i0, i1 = tiles[tile, 0], tiles[tile, 1]
            own_low, own_high, end = tiles[tile, 2], tiles[tile, 3], tiles[tile, 4]
            rows = i1 - i0
            norms = norm_buffer[:rows]
            floor = floor_buffer[:rows]
            _scaled(q[i0:i1], scale, x[i0 - base : i1 - base], squares, norms)
            top[i0:i1] = lowest
            total[i0:i1] = zero
            floor[:] = lowest
            # Own keys.
            step = OWN if stops[i0] < stops[i1 - 1] else rows
            if own_high > own_low:
                # The next tile may see more keys of the same block.
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
                    mine = lines[i0 + r0 - base : i0 + r1 - base]
                    row_products(x, mine, own, d, cols, s, lines[: r1 - r0], True)
                    for r in range(r0, r1):
                        for j in range(stops[i0 + r] - own_low, cols):
                            s[r - r0, j] = lowest
                    _fold(s, floor[r0:r1], top[i0 + r0 : i0 + r1], total[i0 + r0 : i0 + r1],
                          acc[i0 + r0 - base : i0 + r1 - base])  # fmt: skip
                    if width > 0:
                        row_products(
                            s, lines[: r1 - r0], v[own_low:last], last - own_low, width, acc, mine,
                            False,
                        )  # fmt: skip
            if end == 0:
                for r in range(rows):
                    for y in range(most):
                        near[i0 + r, y] = -1
                continue
            # Far clusters, less those that are chosen.
            cols = (end + LANES - 1) // LANES * LANES
            s = s_buffer[: rows * cols].reshape((rows, cols))
            u = u_buffer[: rows * cols].reshape((rows, cols))
            mine = lines[i0 - base : i1 - base]
            row_products(x, mine, kappa, d, cols, s, lines[:rows], True)
            row_products(squares, lines[:rows], half, d, cols, u, lines[:rows], True)
            _log_masses(s, u, norms, frozen, rho, bits)
            for r in range(rows):
                for c in range(end, cols):
                    s[r, c] = lowest
                for c in range(tiles[tile, 5], tiles[tile, 6]):
                    s[r, c] = lowest
                chosen = near[i0 + r]
                if choose and most > 0:
                    _choose(s[r], u[r], top[i0 + r], total[i0 + r], threshold, best, place, chosen)
                    if room < k.shape[0]:
                        place[:] = chosen
                        _within(s[r], starts, room, place, chosen, taken)
                for y in range(most):
                    c = chosen[y]
                    if c < 0:
                        break
                    # The largest of its logits is at least their mean.
                    f, w = frozen[c], u[r, c]
                    phi = w if w <= f else two * np.sqrt(f * w) - f
                    cap = norms[r] * rho[c]
                    phi = phi if phi < cap else cap
                    mean = s[r, c] - phi - bits[c]
                    floor[r] = mean if mean > floor[r] else floor[r]
                    s[r, c] = lowest
                    offsets[c + 1] += 1
            _fold(s, floor, top[i0:i1], total[i0:i1], acc[i0 - base : i1 - base])
            if width > 0:
                row_products(s, lines[:rows], vbar, end, width, acc, mine, False)
                for a in range(h):
                    row_products(x, mine, p[a], d, cols, u, lines[:rows], True)
                    for r in range(rows):
                        for c in range(cols):
                            b = bound[a, c]
                            y = u[r, c]
                            y = y if y < b else b
                            y = y if y > -b else -b
                            u[r, c] = y * s[r, c]
                    row_products(u, lines[:rows], beta[a], end, width, acc, mine, False)
        fold_near(
            x, acc, top[base:stop], total[base:stop], near[base:stop], offsets, listed, kt, starts,
            wide, ordered, limit, weight_buffer, lines,
        )  # fmt: skip
        for i in range(base, stop):
            inverse = dtype.type(1.0) / total[i] if total[i] > zero else zero
            for t in range(width):
                out[i, t] = acc[i - base, t] * inverse


# --- A^T Y and rows -----------------------------------------------------------------------------


@kernel(dealt=True)
def attend_transposed(
    turn: Array, q: Array, k: Array, y: Array, stops: Array, tiles: Array, factor: float,
    kt: Array, members: Array, starts: Array, wide: Array, kappa: Array, half: Array, rho: Array,
    frozen: Array, bits: Array, p: Array, bound: Array, near: Array, top: Array, total: Array,
    out: Array, z: Array,
) -> None:  # fmt: skip
    """Sum over the rows of tiles ``g, g + G, ...`` in slab g of ``out`` and ``z``.

    ``out (G, N, w)`` gets ``sum_i w_ij y_i`` of the keys that rows read one by one, and
    ``z (G, 1 + h, R', w)`` ``sum_i w_ic y_i`` of the far clusters and the same times the clipped
    slopes.  Both are zero before.  ``near``, ``top`` and ``total`` are those of `attend`; rows
    without a finite positive total are left out.
    """
    d, width, h = q.shape[1], y.shape[1], p.shape[0]
    most = near.shape[1]
    highest, ends, longest, size = 0, 0, 0, 0
    for t in range(tiles.shape[0]):
        highest = max(highest, tiles[t, 1] - tiles[t, 0])
        ends = max(ends, tiles[t, 4])
        longest = max(longest, tiles[t, 3] - tiles[t, 2])
    for c in range(starts.size - 1):
        size = max(size, starts[c + 1] - starts[c])
    ends = (ends + LANES - 1) // LANES * LANES
    lines = np.arange(highest)
    dtype = q.dtype
    scale = dtype.type(factor)
    x_buffer = np.empty(highest * d, dtype)
    square_buffer = np.empty(highest * d, dtype)
    norm_buffer = np.empty(highest, dtype)
    s_buffer = np.empty(highest * max(ends, longest), dtype)
    u_buffer = np.empty(highest * ends, dtype)
    y_buffer = np.empty(highest * width, dtype)
    logits = np.empty(size, dtype)
    used = np.empty(highest, np.bool_)
    lowest = dtype.type(-np.inf)
    zero = dtype.type(0.0)
    slabs = out.shape[0]
    for _ in range(slabs):
        g = take(turn)
        if g >= slabs:
            break
        for tile in range(g, tiles.shape[0], slabs):
            i0, i1 = tiles[tile, 0], tiles[tile, 1]
            own_low, own_high, end = tiles[tile, 2], tiles[tile, 3], tiles[tile, 4]
            rows = i1 - i0
            x = x_buffer[: rows * d].reshape((rows, d))
            squares = square_buffer[: rows * d].reshape((rows, d))
            norms = norm_buffer[:rows]
            part = y_buffer[: rows * width].reshape((rows, width))
            _scaled(q[i0:i1], scale, x, squares, norms)
            for r in range(rows):
                inverse = dtype.type(1.0) / total[i0 + r] if total[i0 + r] > zero else zero
                used[r] = inverse > zero
                for t in range(width):
                    part[r, t] = inverse * y[i0 + r, t]
            if own_high > own_low:
                cols = own_high - own_low
                s = s_buffer[: rows * cols].reshape((rows, cols))
                np.dot(x, k[own_low:own_high].T, s)
                for r in range(rows):
                    m = top[i0 + r] if top[i0 + r] != lowest else zero
                    seen = stops[i0 + r] - own_low if used[r] else 0
                    for j in range(cols):
                        e = exp2(dtype.type(s[r, j] - m))
                        s[r, j] = e if j < seen else zero
                add_product(s.T, part, out[g, own_low:own_high])
            if end == 0:
                continue
            cols = (end + LANES - 1) // LANES * LANES
            s = s_buffer[: rows * cols].reshape((rows, cols))
            u = u_buffer[: rows * cols].reshape((rows, cols))
            row_products(x, lines[:rows], kappa, d, cols, s, lines[:rows], True)
            row_products(squares, lines[:rows], half, d, cols, u, lines[:rows], True)
            _log_masses(s, u, norms, frozen, rho, bits)
            for r in range(rows):
                for c in range(end, cols):
                    s[r, c] = lowest
                for c in range(tiles[tile, 5], tiles[tile, 6]):
                    s[r, c] = lowest
                m = top[i0 + r] if top[i0 + r] != lowest else zero
                if not used[r]:
                    for c in range(cols):
                        s[r, c] = zero
                    continue
                for a in range(most):
                    c = near[i0 + r, a]
                    if c < 0:
                        break
                    s[r, c] = lowest
                    low, n = starts[c], starts[c + 1] - starts[c]
                    first, step = wide[c] * (d + 1), wide[c + 1] - wide[c]
                    logits[:n] = -m
                    for t in range(d):
                        value = x[r, t]
                        row = kt[first + t * step : first + t * step + n]
                        for j in range(n):
                            logits[j] += value * row[j]
                    for j in range(n):
                        w = exp2(dtype.type(logits[j]))
                        target = out[g, members[low + j]]
                        for t in range(width):
                            target[t] += w * part[r, t]
                for c in range(cols):
                    s[r, c] = exp2(dtype.type(s[r, c] - m))
            add_product(s.T, part, z[g, 0, :cols])
            for a in range(h):
                row_products(x, lines[:rows], p[a], d, cols, u, lines[:rows], True)
                for r in range(rows):
                    for c in range(cols):
                        b = bound[a, c]
                        w = u[r, c]
                        w = w if w < b else b
                        w = w if w > -b else -b
                        u[r, c] = w * s[r, c]
                add_product(u.T, part, z[g, 1 + a, :cols])


@kernel(dealt=True)
def dense_rows(
    turn: Array, q: Array, k: Array, rows: Array, tile_of: Array, stops: Array, tiles: Array,
    factor: float, kt: Array, members: Array, starts: Array, wide: Array, kappa: Array,
    half: Array, rho: Array, frozen: Array, bits: Array, z: Array, p: Array, bound: Array,
    near: Array,
    out: Array,
) -> None:  # fmt: skip
    """Write rows of the matrix over the kept keys, ``out (len(rows), N)``, zero before."""
    d, h, most = q.shape[1], p.shape[0], near.shape[1]
    dtype = q.dtype
    count = rows.size
    x = np.empty(d, dtype)
    g, u = np.empty(kappa.shape[1], dtype), np.empty(kappa.shape[1], dtype)
    slope = np.empty(h, dtype)
    lowest = dtype.type(-np.inf)
    zero, one, two = dtype.type(0.0), dtype.type(1.0), dtype.type(2.0)
    scale = dtype.type(factor)
    for _ in range(count):
        item = take(turn)
        if item >= count:
            break
        i = rows[item]
        line = out[item]
        tile = tile_of[i]
        own_low, end = tiles[tile, 2], tiles[tile, 4]
        own_high = stops[i] if tiles[tile, 3] > own_low else own_low
        norm = 0.0
        for t in range(d):
            x[t] = scale * q[i, t]
            norm += np.float64(x[t]) * np.float64(x[t])
        length = dtype.type(np.sqrt(norm))
        high = lowest
        for j in range(own_low, own_high):
            value = zero
            for t in range(d):
                value += x[t] * k[j, t]
            line[j] = value
            high = value if value > high else high
        g[:end] = zero
        u[:end] = zero
        for t in range(d):
            value = x[t]
            w = value * value
            for c in range(end):
                g[c] += value * kappa[t, c]
                u[c] += w * half[t, c]
        for c in range(end):
            f, w = frozen[c], u[c]
            phi = w if w <= f else two * np.sqrt(f * w) - f
            cap = length * rho[c]
            phi = phi if phi < cap else cap
            g[c] += phi + bits[c]
        for c in range(tiles[tile, 5], tiles[tile, 6]):
            g[c] = lowest
        for a in range(most):
            c = near[i, a]
            if c < 0:
                break
            g[c] = lowest
            low, m = starts[c], starts[c + 1] - starts[c]
            first, step = wide[c] * (d + 1), wide[c + 1] - wide[c]
            for j in range(m):
                value = zero
                for t in range(d):
                    value += x[t] * kt[first + t * step + j]
                line[members[low + j]] = value
                high = value if value > high else high
        for c in range(end):
            high = g[c] if g[c] > high else high
        if high == lowest:
            continue
        # One by one in float32 a long row would lose digits.
        sums = 0.0
        for j in range(own_low, own_high):
            e = exp2(dtype.type(line[j] - high))
            line[j] = e
            sums += np.float64(e)
        for a in range(most):
            c = near[i, a]
            if c < 0:
                break
            for j in range(starts[c], starts[c + 1]):
                e = exp2(dtype.type(line[members[j]] - high))
                line[members[j]] = e
                sums += np.float64(e)
        for c in range(end):
            e = exp2(dtype.type(g[c] - high))
            g[c] = e
            sums += np.float64(e)
        inverse = dtype.type(1.0 / sums)
        for j in range(own_low, own_high):
            line[j] *= inverse
        for a in range(most):
            c = near[i, a]
            if c < 0:
                break
            for j in range(starts[c], starts[c + 1]):
                line[members[j]] *= inverse
        for c in range(end):
            m = starts[c + 1] - starts[c]
            if not g[c] > zero or m == 0:
                continue
            share = g[c] * inverse / dtype.type(m)
            for a in range(h):
                value = zero
                for t in range(d):
                    value += x[t] * p[a, t, c]
                value = value if value < bound[a, c] else bound[a, c]
                slope[a] = value if value > -bound[a, c] else -bound[a, c]
            for j in range(starts[c], starts[c + 1]):
                w = one
                for a in range(h):
                    w += slope[a] * z[a, j]
                line[members[j]] = share * (w if w > zero else zero)
