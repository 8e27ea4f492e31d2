"""Few rows of attention over keys that grow one by one: a step of a decoder, in microseconds.

Rows lie in memory as they were appended, ``keys (., d)`` and ``values (., w)`` with room for more:
one row reads each of them once, so that products are loops over contiguous rows, without BLAS.
Rows are items; one is done by one thread in an order of its own.

The formula of `nearfar_rows` is that of ``nearfar.py``.  Keys of a complete block are sorted by
clusters, those of the last block are in order; ``place`` has the positions of all.  Tables of
clusters are panels, ``far (., 2 + h, d, PANEL)``: mean keys, halves of the variances and slopes,
each transposed and contiguous, to which clusters are added without moving the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import LANES, kernel, row_products, take
from .nearfar import _choose, _log_masses, _scaled, _within
from .softmax import exp2, row_maximum

Array = NDArray[Any]

# Clusters of a panel, and keys whose weights stay in the first-level cache.
PANEL, CHUNK = 2 * LANES, 512


@kernel()
def _logits(x: Array, keys: Array, first: int, out: Array) -> None:
    """``out_j = x . keys_(first + j)``."""
    for j in range(out.size):
        row = keys[first + j]
        total = x.dtype.type(0.0)
        for t in range(x.size):
            total += x[t] * row[t]
        out[j] = total


@kernel()
def _exponentials(s: Array, top: Any) -> Any:
    """``s <- 2^(s - top)``, and return the sum."""
    total = s.dtype.type(0.0)
    for j in range(s.size):
        e = exp2(s.dtype.type(s[j] - top))
        s[j] = e
        total += e
    return total


@kernel()
def _add_rows(w: Array, rows: Array, first: int, acc: Array) -> None:
    """``acc += sum_j w_j rows_(first + j)``, four at a time: each pass loads and stores ``acc``."""
    whole = w.size // 4 * 4
    for j in range(0, whole, 4):
        w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
        i = first + j
        r0, r1, r2, r3 = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        for t in range(acc.size):
            acc[t] += (w0 * r0[t] + w1 * r1[t]) + (w2 * r2[t] + w3 * r3[t])
    for j in range(whole, w.size):
        w0, r0 = w[j], rows[first + j]
        for t in range(acc.size):
            acc[t] += w0 * r0[t]


@kernel()
def _rescale(acc: Array, factor: Any) -> None:
    """``acc <- factor acc``."""
    for t in range(acc.size):
        acc[t] *= factor


@kernel(dealt=True)
def exact_rows(
    turn: Array, q: Array, stops: Array, keys: Array, values: Array, factor: float, out: Array
) -> None:
    """``out_i (w,)``: the softmax of ``scale q_i . k_j`` over the first ``stops[i]`` keys.

    ``factor`` is the scale times ``log2 e``.
    """
    d = q.shape[1]
    dtype = q.dtype
    lowest, zero, one = dtype.type(-np.inf), dtype.type(0.0), dtype.type(1.0)
    scale = dtype.type(factor)
    x = np.empty(d, dtype)
    buffer = np.empty(CHUNK, dtype)
    for _ in range(q.shape[0]):
        i = take(turn)
        if i >= q.shape[0]:
            break
        acc = out[i]
        acc[:] = zero
        for t in range(d):
            x[t] = scale * q[i, t]
        top, total = lowest, zero
        for first in range(0, stops[i], CHUNK):
            s = buffer[: min(CHUNK, stops[i] - first)]
            _logits(x, keys, first, s)
            high = row_maximum(s)
            if high > top:
                shift = exp2(dtype.type(top - high))
                top = high
                total *= shift
                _rescale(acc, shift)
            total += _exponentials(s, top)
            _add_rows(s, values, first, acc)
        if total > zero:
            _rescale(acc, one / total)


@kernel(dealt=True)
def nearfar_rows(
    turn: Array, q: Array, stops: Array, keys: Array, values: Array, place: Array, held: int,
    starts: Array, far: Array, terms: Array, means: Array, block: int, per: int, factor: float,
    most: int, tau: float, room: int, out: Array,
) -> None:  # fmt: skip
    """``out_i (w,)``: rows that see the keys with ``place < stops[i]`` of ``held`` ones.

    ``block`` keys have ``per`` clusters, cluster c the keys ``starts[c] : starts[c + 1]``;
    ``terms (3 + h, .)`` are radius, frozen, bits and bounds of slopes, ``means (1 + h, ., w)`` mean
    values and their slopes.  All are 0, and bits -inf, beyond the clusters.  A row reads ``most``
    clusters at most, of ``room`` keys together.
    """
    d, h = q.shape[1], far.shape[1] - 2
    dtype = q.dtype
    lowest, zero, one = dtype.type(-np.inf), dtype.type(0.0), dtype.type(1.0)
    scale, threshold = dtype.type(factor), dtype.type(tau)
    panels = (held // block * per + PANEL - 1) // PANEL
    lines = np.arange(max(panels, 1))
    x = np.empty((1, d), dtype)
    squares = np.empty((1, d), dtype)
    norms = np.empty(1, dtype)
    s_buffer = np.empty((panels, PANEL), dtype)
    u_buffer = np.empty((panels, PANEL), dtype)
    most = min(most, panels * PANEL)
    best = np.empty(most, dtype)
    order = np.empty(most, np.int64)
    chosen = np.empty(most, np.int32)
    taken = np.empty(most, np.int64)
    own_buffer = np.empty(min(block, held), dtype)
    for _ in range(q.shape[0]):
        i = take(turn)
        if i >= q.shape[0]:
            break
        stop = stops[i]
        acc = out[i]
        acc[:] = zero
        if stop == 0:
            continue
        _scaled(q[i : i + 1], scale, x, squares, norms)
        # Own keys.
        low = (stop - 1) // block * block
        own = own_buffer[: min(low + block, held) - low]
        _logits(x[0], keys, low, own)
        for j in range(own.size):
            own[j] = own[j] if place[low + j] < stop else lowest
        top = row_maximum(own)
        total = _exponentials(own, top)
        _add_rows(own, values, low, acc)
        end = low // block * per
        if end > 0:
            # Far clusters.
            used = (end + PANEL - 1) // PANEL
            columns = used * PANEL
            for p in range(used):
                at = lines[p : p + 1]
                row_products(x, lines[:1], far[p, 0], d, PANEL, s_buffer, at, True)
                row_products(squares, lines[:1], far[p, 1], d, PANEL, u_buffer, at, True)
            s = s_buffer[:used].reshape((1, columns))
            u = u_buffer[:used].reshape((1, columns))
            _log_masses(s, u, norms, terms[1], terms[0], terms[2])
            g = s[0]
            g[end:] = lowest
            near, members = 0, 0
            if most > 0:
                near = _choose(g, u[0], top, total, threshold, best, order, chosen)
                if room < held:
                    order[:] = chosen
                    near = _within(g, starts, room, order, chosen, taken)
            for a in range(near):
                c = chosen[a]
                g[c] = lowest
                members += starts[c + 1] - starts[c]
            # Near ones, key by key.
            logits = np.empty(members, dtype)
            members = 0
            for a in range(near):
                first, count = starts[chosen[a]], starts[chosen[a] + 1] - starts[chosen[a]]
                _logits(x[0], keys, first, logits[members : members + count])
                members += count
            high, other = row_maximum(g), row_maximum(logits)
            high = other if other > high else high
            if high > top:
                shift = exp2(dtype.type(top - high))
                top = high
                total *= shift
                _rescale(acc, shift)
            total += _exponentials(g, top)
            total += _exponentials(logits, top)
            members = 0
            for a in range(near):
                first, count = starts[chosen[a]], starts[chosen[a] + 1] - starts[chosen[a]]
                _add_rows(logits[members : members + count], values, first, acc)
                members += count
            _add_rows(g[:end], means[0], 0, acc)
            for a in range(h):
                for p in range(used):
                    at = lines[p : p + 1]
                    row_products(x, lines[:1], far[p, 2 + a], d, PANEL, u_buffer, at, True)
                y = u[0]
                for c in range(end):
                    b = terms[3 + a, c]
                    value = y[c] if y[c] < b else b
                    value = value if value > -b else -b
                    y[c] = value * g[c]
                _add_rows(y[:end], means[1 + a], 0, acc)
        if total > zero:
            _rescale(acc, one / total)
