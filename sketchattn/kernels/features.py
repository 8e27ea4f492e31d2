"""Products with feature maps: those that released codes add a constant to, and causal ones.

Causal ones are prefix sums over keys as convex steps, never n x n: with ``a_jl = logsumexp_{j' <=
j} N_j'l`` of the log-features N of the keys and ``e_i`` the last key that query i sees, ``Ahat_ij =
sum_l U_il exp(N_jl - a_(e_i)l)``.  Both directions need two arrays with entries in [0, 1] only: ``U
= rowsoftmax_l(T_il + a_(e_i)l)`` and the steps ``beta_jl = exp(N_jl - a_jl)``, since ``exp(a_(j-1)l
- a_jl) = 1 - beta_jl``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import add_product, kernel, take
from ._threads import PRODUCT, deal
from .softmax import LOG2E, exp2, row_maximum

Array = NDArray[Any]

# Columns of X that one thread carries through all tokens: its state is (R, COLUMNS).
COLUMNS = 32
# Features whose states (LINES, m) one thread carries where each has a result of its own.
LINES = 8
# Rows whose features a thread holds at a time.
TILE = 256
# Keys are summed in so many pieces at most, which do not depend on the threads.
PIECES = 16


@kernel()
def _prefix_work(t: Array, n: Array, keep: Array, offset: int, u: Array, beta: Array) -> None:
    """Fill ``u (n_q, R)`` and ``beta (n_k, R)`` from ``t (n_q, R)`` and ``n (n_k, R)``.

    Query i sees keys j <= i + offset; ``keep (n_k,)`` bool.  A query that sees no key gets zeros.
    """
    n_q, width = t.shape
    n_k = n.shape[0]
    log2e = t.dtype.type(LOG2E)
    top = np.empty(width, t.dtype)
    total = np.empty(width, np.float64)
    line = np.empty(width, t.dtype)
    top[:] = -np.inf
    total[:] = 0.0
    seen = False
    i = 0
    while i < n_q and i + offset < 0:
        u[i] = 0.0
        i += 1
    for j in range(n_k):
        if keep[j]:
            seen = True
            for l in range(width):  # noqa: E741  (the letter of the formulas)
                value = t.dtype.type(log2e * n[j, l])
                before = top[l]
                high = value if value > before else before
                term = exp2(t.dtype.type(value - high))
                # Sums in float64: float32 would lose a digit for every hundredfold length.
                total[l] = total[l] * np.float64(exp2(t.dtype.type(before - high)))
                total[l] += np.float64(term)
                top[l] = high
                beta[j, l] = t.dtype.type(np.float64(term) / total[l])
        else:
            beta[j] = 0.0
        while i < n_q and (i + offset == j or j == n_k - 1):
            if not seen:
                u[i] = 0.0
                i += 1
                continue
            for l in range(width):  # noqa: E741  (the letter of the formulas)
                line[l] = log2e * t[i, l] + top[l]
            high = row_maximum(line)
            weight = 0.0
            for l in range(width):  # noqa: E741  (the letter of the formulas)
                w = np.float64(exp2(t.dtype.type(line[l] - high))) * total[l]
                line[l] = w
                weight += w
            inverse = 1.0 / weight
            for l in range(width):  # noqa: E741  (the letter of the formulas)
                u[i, l] = line[l] * inverse
            i += 1


@kernel(dealt=True)
def _forward(turn: Array, u: Array, beta: Array, offset: int, x: Array, out: Array) -> None:
    """``out = Ahat X (n_q, m)``: ``C <- C + beta_j (x_j - C)``, ``out_i = u_i C`` after key e_i."""
    n_q, width = u.shape
    n_k, m = x.shape
    parts = (m + COLUMNS - 1) // COLUMNS
    for _ in range(parts):
        part = take(turn)
        if part >= parts:
            break
        c0 = part * COLUMNS
        c1 = min(c0 + COLUMNS, m)
        state = np.zeros((width, COLUMNS), x.dtype)
        line = np.zeros(COLUMNS, x.dtype)
        row = np.zeros(COLUMNS, x.dtype)
        i = 0
        while i < n_q and i + offset < 0:
            out[i, c0:c1] = 0.0
            i += 1
        for j in range(n_k):
            for c in range(c1 - c0):
                row[c] = x[j, c0 + c]
            first = i < n_q and (i + offset == j or j == n_k - 1)
            line[:] = 0.0
            for l in range(width):  # noqa: E741  (the letter of the formulas)
                b = beta[j, l]
                w = u[i, l] if first else x.dtype.type(0.0)
                for c in range(COLUMNS):
                    y = state[l, c]
                    y = y + b * (row[c] - y)
                    state[l, c] = y
                    line[c] += w * y
            if first:
                for c in range(c1 - c0):
                    out[i, c0 + c] = line[c]
                i += 1
            while i < n_q and j == n_k - 1:  # queries beyond the last key see all of them
                line[:] = 0.0
                for l in range(width):  # noqa: E741  (the letter of the formulas)
                    w = u[i, l]
                    for c in range(COLUMNS):
                        line[c] += w * state[l, c]
                for c in range(c1 - c0):
                    out[i, c0 + c] = line[c]
                i += 1


@kernel(dealt=True)
def _backward(turn: Array, u: Array, beta: Array, offset: int, y: Array, out: Array) -> None:
    """``out = Ahat^T Y (n_k, m)``: from the last key, ``D <- D + sum_{e_i = j} u_i y_i``.

    Then ``out_j = beta_j D`` and ``D <- (1 - beta_j) D``.
    """
    n_q, width = u.shape
    n_k, m = out.shape
    one = y.dtype.type(1.0)
    parts = (m + COLUMNS - 1) // COLUMNS
    for _ in range(parts):
        part = take(turn)
        if part >= parts:
            break
        c0 = part * COLUMNS
        c1 = min(c0 + COLUMNS, m)
        state = np.zeros((width, COLUMNS), y.dtype)
        line = np.zeros(COLUMNS, y.dtype)
        i = n_q - 1
        for back in range(n_k):
            j = n_k - 1 - back
            while i >= 0 and i + offset >= j:
                for c in range(c1 - c0):
                    line[c] = y[i, c0 + c]
                for l in range(width):  # noqa: E741  (the letter of the formulas)
                    w = u[i, l]
                    for c in range(COLUMNS):
                        state[l, c] += w * line[c]
                i -= 1
            line[:] = 0.0
            for l in range(width):  # noqa: E741  (the letter of the formulas)
                b = beta[j, l]
                rest = one - b
                for c in range(COLUMNS):
                    d = state[l, c]
                    line[c] += b * d
                    state[l, c] = rest * d
            for c in range(c1 - c0):
                out[j, c0 + c] = line[c]


@kernel(dealt=True)
def _prefix_dots(turn: Array, beta: Array, offset: int, x: Array, y: Array, out: Array) -> None:
    """``out_il = y_i . C_l (n_q, R)``, C the state of ``_forward`` after the last key of row i."""
    n_q, width = out.shape
    n_k, m = x.shape
    parts = (width + LINES - 1) // LINES
    state = np.empty((LINES, m), x.dtype)
    for _ in range(parts):
        part = take(turn)
        if part >= parts:
            break
        l0 = part * LINES
        count = min(LINES, width - l0)
        state[:] = 0.0
        i = 0
        while i < n_q and i + offset < 0:
            out[i, l0 : l0 + count] = 0.0
            i += 1
        for j in range(n_k):
            for l in range(count):  # noqa: E741  (the letter of the formulas)
                b = beta[j, l0 + l]
                for c in range(m):
                    state[l, c] += b * (x[j, c] - state[l, c])
            while i < n_q and (i + offset == j or j == n_k - 1):
                for l in range(count):  # noqa: E741  (the letter of the formulas)
                    total = x.dtype.type(0.0)
                    for c in range(m):
                        total += y[i, c] * state[l, c]
                    out[i, l0 + l] = total
                i += 1


@kernel(dealt=True)
def _suffix_dots(
    turn: Array, u: Array, beta: Array, offset: int, y: Array, x: Array, out: Array
) -> None:
    """``out_jl = beta_jl (D_l . x_j) (n_k, R)``, D the state of ``_backward`` at key j."""
    n_q, m = y.shape
    n_k, width = beta.shape
    one = x.dtype.type(1.0)
    parts = (width + LINES - 1) // LINES
    state = np.empty((LINES, m), x.dtype)
    for _ in range(parts):
        part = take(turn)
        if part >= parts:
            break
        l0 = part * LINES
        count = min(LINES, width - l0)
        state[:] = 0.0
        i = n_q - 1
        for back in range(n_k):
            j = n_k - 1 - back
            while i >= 0 and i + offset >= j:
                for l in range(count):  # noqa: E741  (the letter of the formulas)
                    w = u[i, l0 + l]
                    for c in range(m):
                        state[l, c] += w * y[i, c]
                i -= 1
            for l in range(count):  # noqa: E741  (the letter of the formulas)
                b = beta[j, l0 + l]
                rest = one - b
                total = x.dtype.type(0.0)
                for c in range(m):
                    total += state[l, c] * x[j, c]
                    state[l, c] *= rest
                out[j, l0 + l] = b * total


@kernel(dealt=True)
def _pack(
    turn: Array,
    y: Array,
    half: Array,
    keep: Array,
    across: Array,
    v: Array,
    top: Array,
    total: Array,
    packed: Array,
) -> None:
    """Sum features ``exp(N_jl - m)`` of keys, and their products with V, over pieces of the keys.

    ``y (n, d)``, ``half (n,)`` is ``|y_j|^2/2``, ``keep (n,)`` bool, ``across (d, R)``, ``v (n,
    m)``; piece c gives ``top[c] = m = max_jl omega_l . y_j``, ``total[c] (R,)`` and ``packed[c]
    (R, m)``; -inf and zeros where no key of it is kept.
    """
    n, d = y.shape
    width = across.shape[1]
    pieces = top.shape[0]
    lowest = y.dtype.type(-np.inf)
    log2e = y.dtype.type(LOG2E)
    buffer = np.empty(TILE * width, y.dtype)
    for _ in range(pieces):
        piece = take(turn)
        if piece >= pieces:
            break
        total[piece] = 0.0
        packed[piece] = 0.0
        m = lowest
        stop = (piece + 1) * n // pieces
        for i0 in range(piece * n // pieces, stop, TILE):
            i1 = min(i0 + TILE, stop)
            s = buffer[: (i1 - i0) * width].reshape((i1 - i0, width))
            np.dot(y[i0:i1], across, s)
            before = m
            for i in range(i1 - i0):
                if keep[i0 + i]:
                    m = max(m, row_maximum(s[i]))
            if m > before:
                shift = exp2(y.dtype.type(log2e * (before - m)))
                for l in range(width):  # noqa: E741  (the letter of the formulas)
                    total[piece, l] *= shift
                    for c in range(v.shape[1]):
                        packed[piece, l, c] *= shift
            for i in range(i1 - i0):
                if keep[i0 + i]:
                    low = half[i0 + i] + m
                    for l in range(width):  # noqa: E741  (the letter of the formulas)
                        e = exp2(y.dtype.type(log2e * (s[i, l] - low)))
                        s[i, l] = e
                        total[piece, l] += e
                else:
                    s[i] = 0.0
            add_product(s.T, v[i0:i1], packed[piece])
        top[piece] = m


@kernel(dealt=True)
def _unpack(
    turn: Array,
    x: Array,
    half: Array,
    across: Array,
    total: Array,
    packed: Array,
    eps: float,
    top: Array,
    out: Array,
) -> None:
    """``out_i = sum_l w_il packed_l / sum_l w_il total_l``, ``w_il`` the features of queries.

    ``w_il = exp(omega_l . x_i - half_i - top_i) + eps``, ``top_i = max_l omega_l . x_i``; ``x (n,
    d)``, ``across (d, R)``, ``total (R,)``, ``packed (R, m)``, ``out (n, m)``.
    """
    n, d = x.shape
    width = across.shape[1]
    log2e = x.dtype.type(LOG2E)
    extra = x.dtype.type(eps)
    tiles = (n + TILE - 1) // TILE
    buffer = np.empty(TILE * width, x.dtype)
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        i0 = item * TILE
        i1 = min(i0 + TILE, n)
        s = buffer[: (i1 - i0) * width].reshape((i1 - i0, width))
        np.dot(x[i0:i1], across, s)
        for i in range(i1 - i0):
            high = row_maximum(s[i])
            top[i0 + i] = high
            low = half[i0 + i] + high
            weight = x.dtype.type(0.0)
            for l in range(width):  # noqa: E741  (the letter of the formulas)
                w = exp2(x.dtype.type(log2e * (s[i, l] - low))) + extra
                s[i, l] = w
                weight += w * total[l]
            inverse = x.dtype.type(1.0) / weight
            for l in range(width):  # noqa: E741  (the letter of the formulas)
                s[i, l] *= inverse
        np.dot(s, packed, out[i0:i1])


def feature_sums(
    y: Array, keep: Array, omega: Array, v: Array
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Return ``m``, ``sum_j exp(N_jl - m)`` (R,) and ``sum_j exp(N_jl - m) v_j`` (R, m).

    ``y (n, d)``, ``keep`` bool (n,) with at least one key, ``omega (R, d)``, ``v (n, m)``, and
    ``m = max_jl omega_l . y_j`` without the norms.  Nothing is validated.
    """
    pieces = min(PIECES, -(-len(y) // TILE))
    top = np.empty(pieces, y.dtype)
    total = np.empty((pieces, len(omega)), y.dtype)
    packed = np.empty((*total.shape, v.shape[1]), y.dtype)
    half = 0.5 * np.einsum("ij,ij->i", y, y)
    across = np.ascontiguousarray(omega.T)
    work = len(y) * len(omega) * (1 + PRODUCT * (y.shape[1] + v.shape[1]))
    deal(_pack, y, half, keep, across, v, top, total, packed, work=work)
    high = float(top.max())
    with np.errstate(invalid="ignore"):  # an overflow, which shows in m
        share = np.exp(top.astype(np.float64) - high)
        return high, np.einsum("c,cl->l", share, total), np.einsum("c,clm->lm", share, packed)


def feature_means(
    x: Array, omega: Array, total: Array, packed: Array, eps: float
) -> tuple[Array, Array]:
    """Return the quotients (n, m) of ``_unpack`` and the maxima (n,); nothing is validated."""
    top, out = np.empty(len(x), x.dtype), np.empty((len(x), packed.shape[1]), x.dtype)
    half = 0.5 * np.einsum("ij,ij->i", x, x)
    # Features and quotients do not change if both are divided by one number.
    size = total.max()
    sums, products = (np.ascontiguousarray(z / size, x.dtype) for z in (total, packed))
    across = np.ascontiguousarray(omega.T)
    work = len(x) * len(omega) * (1 + PRODUCT * (x.shape[1] + packed.shape[1]))
    deal(_unpack, x, half, across, sums, products, eps, top, out, work=work)
    return out, top


def prefix_factors(t: Array, n: Array, keep: Array, offset: int) -> tuple[Array, Array]:
    """Return ``(U, beta)`` of log-features ``t (n_q, R)`` and ``n (n_k, R)``.

    ``keep`` bool (n_k,); query i sees the keys ``j <= i + offset``.  Nothing is validated.
    """
    u, beta = np.zeros_like(t), np.zeros_like(n)
    if u.size and beta.size:
        _prefix_work(t, n, keep, offset, u, beta)
    return u, beta


def prefix_product(u: Array, beta: Array, offset: int, x: Array) -> Array:
    """Return ``Ahat X (n_q, m)`` for x (n_k, m)."""
    out = np.zeros((len(u), x.shape[1]), x.dtype)
    if out.size and len(x):
        deal(_forward, u, beta, offset, x, out, work=(u.size + beta.size) * x.shape[1])
    return out


def prefix_transposed(u: Array, beta: Array, offset: int, y: Array) -> Array:
    """Return ``Ahat^T Y (n_k, m)`` for y (n_q, m)."""
    out = np.zeros((len(beta), y.shape[1]), y.dtype)
    if out.size and len(y):
        deal(_backward, u, beta, offset, y, out, work=(u.size + beta.size) * y.shape[1])
    return out


def prefix_dots(beta: Array, offset: int, x: Array, y: Array) -> Array:
    """Return ``y_i . C_il`` (n_q, R) for y (n_q, m) and the prefix means C of x (n_k, m)."""
    out = np.zeros((len(y), beta.shape[1]), x.dtype)
    if out.size and len(x):
        work = (out.size + beta.size) * x.shape[1]
        deal(_prefix_dots, beta, offset, x, y, out, work=work)
    return out


def suffix_dots(u: Array, beta: Array, offset: int, y: Array, x: Array) -> Array:
    """Return ``sum_i U_il exp(N_jl - a_(e_i)l) y_i . x_j`` (n_k, R), over the rows that see j."""
    out = np.zeros(beta.shape, x.dtype)
    if out.size and len(y):
        work = (u.size + out.size) * x.shape[1]
        deal(_suffix_dots, u, beta, offset, y, x, out, work=work)
    return out
