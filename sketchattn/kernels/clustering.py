"""Clustering of rows, and attention of clusters: seeds, nearest centres, means, largest logits.

Rows are looked at about a point near their middle, so that rounding is relative to their spread.
The nearest centre c of row x is that with the largest ``x . c - |c|^2 / 2``, the first of equals;
the scores of a tile of rows are products in BLAS, and never more than a tile is held.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import kernel
from ._threads import blas_single_thread, map_pieces
from .softmax import LOG2E, exp2, row_maximum

Array = NDArray[Any]

# Rows and centres of a tile: its scores, and the rows, stay in the second-level cache.
ROWS, CENTERS = 256, 128
# Multiply-adds of a piece of rows: a fraction of a millisecond, which a thread is worth.
PIECE = 1 << 24
# Logits whose largest is found before any of them is looked at.
BLOCK = 64


@kernel()
def _nearest(
    x: Array,
    middle: Array,
    centers: Array,
    first: int,
    last: int,
    labels: Array,
    distance: Array,
) -> None:
    """Fill ``labels (n,)`` int64 and squared ``distance (n,)`` of the rows first..last - 1 of x.

    ``centers (m, d)`` are about ``middle (d,)``.  A row without a score that is a number gets 0.
    """
    d, m = x.shape[1], centers.shape[0]
    offset = np.empty(m, x.dtype)  # |c|^2 / 2
    for c in range(m):
        square = 0.0
        for j in range(d):
            square += np.float64(centers[c, j]) * np.float64(centers[c, j])
        offset[c] = 0.5 * square
    row_buffer = np.empty(ROWS * d, x.dtype)
    score_buffer = np.empty(ROWS * CENTERS, x.dtype)
    best_buffer = np.empty(ROWS, x.dtype)
    chosen_buffer = np.empty(ROWS, np.int32)
    zero, two = x.dtype.type(0.0), x.dtype.type(2.0)
    for i0 in range(first, last, ROWS):
        rows = min(ROWS, last - i0)
        y = row_buffer[: rows * d].reshape((rows, d))
        best, chosen = best_buffer[:rows], chosen_buffer[:rows]
        for i in range(rows):
            total = zero
            for j in range(d):
                value = x[i0 + i, j] - middle[j]
                y[i, j] = value
                total += value * value
            distance[i0 + i] = total
        best[:] = -np.inf
        chosen[:] = 0
        for c0 in range(0, m, CENTERS):
            count = min(CENTERS, m - c0)
            scores = score_buffer[: count * rows].reshape((count, rows))
            np.dot(centers[c0 : c0 + count], y.T, scores)
            # Rows lie side by side, so that all of them are compared at once; four centres at a
            # time, since what is best so far has to be read and written for each pass.
            whole = count - count % 4
            for k in range(0, whole, 4):
                c = c0 + k
                a0, a1, a2, a3 = scores[k], scores[k + 1], scores[k + 2], scores[k + 3]
                o0, o1, o2, o3 = offset[c], offset[c + 1], offset[c + 2], offset[c + 3]
                for i in range(rows):
                    high, place = best[i], chosen[i]
                    s = a0[i] - o0
                    place = np.int32(c) if s > high else place
                    high = s if s > high else high
                    s = a1[i] - o1
                    place = np.int32(c + 1) if s > high else place
                    high = s if s > high else high
                    s = a2[i] - o2
                    place = np.int32(c + 2) if s > high else place
                    high = s if s > high else high
                    s = a3[i] - o3
                    place = np.int32(c + 3) if s > high else place
                    high = s if s > high else high
                    best[i], chosen[i] = high, place
            for k in range(whole, count):
                o0 = offset[c0 + k]
                for i in range(rows):
                    s = scores[k, i] - o0
                    chosen[i] = np.int32(c0 + k) if s > best[i] else chosen[i]
                    best[i] = s if s > best[i] else best[i]
        for i in range(rows):
            labels[i0 + i] = chosen[i]
            # |x - c|^2, which rounding may leave below zero.
            rest = distance[i0 + i] - two * best[i]
            distance[i0 + i] = rest if rest > zero else zero


@kernel()
def _means(x: Array, middle: Array, labels: Array, centers: Array, counts: Array) -> None:
    """Move ``centers (m, d)``, float64, to the means of their rows about ``middle``.

    ``counts (m,)`` are their numbers of rows; a centre without any stays where it is.  Row by row,
    on one thread: it takes a small part of what finding the labels does.
    """
    sums = np.zeros(centers.shape, np.float64)
    counts[:] = 0
    for i in range(x.shape[0]):
        c = labels[i]
        counts[c] += 1
        for j in range(x.shape[1]):
            sums[c, j] += np.float64(x[i, j] - middle[j])
    for c in range(centers.shape[0]):
        if counts[c] > 0:
            for j in range(centers.shape[1]):
                centers[c, j] = sums[c, j] / counts[c]


@kernel()
def _spread(gram: Array, norms: Array, distance: Array, u: Array, chosen: Array) -> None:
    """Draw rows one after the other, each in proportion to its squared distance from those before.

    ``gram (s, s)`` and ``norms (s,)`` are products of rows, ``distance (s,)`` the squared distance
    from what is chosen already.  Of as many candidates as a row of ``u`` has uniform numbers, that
    one is ``chosen`` which leaves the smallest sum of distances.
    """
    s = gram.shape[0]
    cumulative = np.empty(s, np.float64)
    zero, two = gram.dtype.type(0.0), gram.dtype.type(2.0)
    for k in range(chosen.shape[0]):
        total = 0.0
        for j in range(s):
            total += np.float64(distance[j])
            cumulative[j] = total
        least, pick = np.inf, 0
        for t in range(u.shape[1]):
            if total > 0.0:
                row = min(np.searchsorted(cumulative, u[k, t] * total, side="right"), s - 1)
            else:
                row = min(int(u[k, t] * s), s - 1)
            own, rest = norms[row], zero
            for j in range(s):
                far = norms[j] + own - two * gram[row, j]
                far = far if far < distance[j] else distance[j]
                rest += far if far > zero else zero
            if rest < least:
                least, pick = np.float64(rest), row
        chosen[k] = pick
        own = norms[pick]
        for j in range(s):
            far = norms[j] + own - two * gram[pick, j]
            far = far if far < distance[j] else distance[j]
            distance[j] = far if far > zero else zero
        distance[pick] = zero


@kernel()
def _sink(kept: Array, places: Array, i: int) -> None:
    """Let entry i of a heap, whose smallest comes first, sink to where it belongs."""
    t = kept.size
    value, place = kept[i], places[i]
    while True:
        child = 2 * i + 1
        if child >= t:
            break
        if child + 1 < t and kept[child + 1] < kept[child]:
            child += 1
        if not kept[child] < value:
            break
        kept[i], places[i] = kept[child], places[child]
        i = child
    kept[i], places[i] = value, place


@kernel()
def _largest(logits: Array, chosen: Array, lse: Array) -> None:
    """Fill ``chosen (m, t)`` with the positions of the t largest of each row, in no order.

    ``lse (m,)``, float64, is the logarithm of a row's sum of exponentials.
    """
    m, n = logits.shape
    t = chosen.shape[1]
    kept = np.empty(t, logits.dtype)
    log2e = logits.dtype.type(LOG2E)
    for i in range(m):
        row = logits[i]
        for j in range(t):
            chosen[i, j] = j
            kept[j] = row[j]
        places = chosen[i]
        for back in range(t // 2):
            _sink(kept, places, t // 2 - 1 - back)
        top = logits.dtype.type(-np.inf)
        for j0 in range(0, n, BLOCK):
            block = row[j0 : min(j0 + BLOCK, n)]
            high = row_maximum(block)
            top = high if high > top else top
            if high > kept[0]:
                for j in range(max(t - j0, 0), block.size):
                    if block[j] > kept[0]:
                        kept[0] = block[j]
                        places[0] = j0 + j
                        _sink(kept, places, 0)
        total = 0.0
        for j0 in range(0, n, BLOCK):
            part = logits.dtype.type(0.0)
            for j in range(j0, min(j0 + BLOCK, n)):
                part += exp2(logits.dtype.type(log2e * (row[j] - top)))
            total += np.float64(part)
        lse[i] = np.float64(top) + np.log(total)


@kernel()
def _own_weights(
    q: Array,
    k: Array,
    ends: Array,
    top: Array,
    mass: Array,
    first: int,
    last: int,
    weights: Array,
) -> None:
    """Fill the ``weights (n, t)`` of queries on the keys of their cluster, each row of sum mass_c.

    Clusters first..last - 1; ``q (n, d)``, times the scale, lie in the order of clusters, which end
    before ``ends (m,)``.  ``top (m, t)`` are rows of ``k``.
    """
    t, d = top.shape[1], q.shape[1]
    keys = np.empty((t, d), q.dtype)
    log2e = q.dtype.type(LOG2E)
    zero = q.dtype.type(0.0)
    for c in range(first, last):
        start = ends[c - 1] if c > 0 else 0
        for j in range(t):
            keys[j] = k[top[c, j]]
        np.dot(q[start : ends[c]], keys.T, weights[start : ends[c]])
        for i in range(start, ends[c]):
            row = weights[i]
            high = row_maximum(row)
            total = zero
            for j in range(t):
                e = exp2(q.dtype.type(log2e * (row[j] - high)))
                row[j] = e
                total += e
            share = mass[c] / total
            for j in range(t):
                row[j] *= share


@kernel()
def _own_product(
    weights: Array,
    shared: Array,
    ends: Array,
    order: Array,
    top: Array,
    x: Array,
    coarse: Array,
    first: int,
    last: int,
    out: Array,
) -> None:
    """Fill rows of ``out (n, w)``: what a cluster's row gives beside its keys T, and on T its own.

    ``out_i = coarse_c - sum_T shared_c x_T + sum_T weights_i x_T``; ``coarse (m, w)`` and
    ``shared (m, t)`` are a row of a cluster, ``weights (n, t)`` lie in the order of clusters.
    """
    t, width = top.shape[1], x.shape[1]
    rows = np.empty((t, width), x.dtype)
    rest = np.empty(width, x.dtype)
    part = np.empty((ROWS, width), x.dtype)
    for c in range(first, last):
        rest[:] = coarse[c]
        for j in range(t):
            share = shared[c, j]
            for w in range(width):
                value = x[top[c, j], w]
                rows[j, w] = value
                rest[w] -= share * value
        for start in range(ends[c - 1] if c > 0 else 0, ends[c], ROWS):
            count = min(ROWS, ends[c] - start)
            np.dot(weights[start : start + count], rows, part[:count])
            for i in range(count):
                for w in range(width):
                    out[order[start + i], w] = rest[w] + part[i, w]


def nearest_centers(x: Array, middle: Array, centers: Array) -> tuple[Array, Array]:
    """Return the nearest of ``centers (m, d)`` for each row of ``x - middle``.

    All in one precision, writable and contiguous; nothing is validated.

    Returns
    -------
    labels : ndarray (n,), int64
    distance : ndarray (n,)
        Squared, with an error of a few roundings of ``|x - middle|^2``.
    """
    n = len(x)
    labels, distance = np.empty(n, np.int64), np.empty(n, x.dtype)
    size = ROWS * max(1, PIECE // (ROWS * max(1, centers.size)))

    def work(piece: slice) -> None:
        _nearest(x, middle, centers, piece.start, piece.stop, labels, distance)

    if n <= size:
        with blas_single_thread():
            work(slice(0, n))
    else:
        for _ in map_pieces(work, [slice(i, min(i + size, n)) for i in range(0, n, size)]):
            pass
    return labels, distance


def move_to_means(x: Array, middle: Array, labels: Array, centers: Array) -> Array:
    """Move ``centers (m, d)``, float64, to the means of ``x - middle`` and return their counts."""
    counts = np.empty(len(centers), np.int64)
    _means(x, middle, labels, centers, counts)
    return counts


def spread_rows(y: Array, distance: Array, u: Array) -> Array:
    """Return one row of ``y (s, d)`` for each of ``u (count, trials)`` by greedy k-means++.

    ``distance (s,)``, squared, is overwritten.  Holds the products of all pairs of rows.
    """
    chosen = np.empty(len(u), np.int64)
    with blas_single_thread():  # the same bits for any number of threads
        gram = y @ np.ascontiguousarray(y.T)
    _spread(gram, np.ascontiguousarray(np.diag(gram)), distance, u, chosen)
    return chosen


def largest_logits(logits: Array, count: int) -> tuple[Array, Array]:
    """Return the positions of the ``count`` largest of each row, and the row's log-sum-exp.

    ``logits (m, n)`` writable and contiguous, without NaN, n at least ``count``.
    """
    chosen, lse = np.empty((len(logits), count), np.int64), np.empty(len(logits))
    _largest(logits, chosen, lse)
    return chosen, lse


def _pieces(ends: Array, each: int) -> list[slice]:
    """Return slices of clusters with so many rows that a thread is worth it."""
    n = int(ends[-1])
    inside = np.searchsorted(ends, np.arange(each, n, each))
    bounds = np.unique(np.concatenate([[0], inside, [len(ends)]])).tolist()
    return [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def own_weights(q: Array, k: Array, ends: Array, top: Array, mass: Array) -> Array:
    """Return the weights (n, t) that ``_own_weights`` fills; all in one precision."""
    weights = np.empty((len(q), top.shape[1]), q.dtype)

    def work(piece: slice) -> None:
        _own_weights(q, k, ends, top, mass, piece.start, piece.stop, weights)

    for _ in map_pieces(work, _pieces(ends, PIECE // max(1, top.shape[1] * q.shape[1]) + 1)):
        pass
    return weights


def own_product(
    weights: Array, shared: Array, ends: Array, order: Array, top: Array, x: Array, coarse: Array
) -> Array:
    """Return the product (n, w) that ``_own_product`` fills; all in one precision."""
    out = np.empty((len(weights), x.shape[1]), x.dtype)

    def work(piece: slice) -> None:
        _own_product(
            weights, shared, ends, order, top, x, coarse, piece.start, piece.stop, out
        )

    for _ in map_pieces(work, _pieces(ends, PIECE // max(1, top.shape[1] * x.shape[1]) + 1)):
        pass
    return out
