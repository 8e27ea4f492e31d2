"""Kernel halving: one key of each pair is kept, so that signed sums of a kernel stay small.

Pairs are consecutive points (0, 1), (2, 3), ...; buckets are runs of whole pairs.  The kernel is
``kappa(x, y) = 2^(left_x . right_y - shift) (values_x . values_y + 1)``.  With the differences
``f_i = kappa(x_2i, .) - kappa(x_(2i+1), .)``, ``psi`` is the sum of ``+-f_t`` so far, + where the
even one is kept, and the odd one of pair i is kept where ``(2 u_i - 1) a_i <= <psi, f_i>``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import kernel, prange
from ._threads import kernel_threads
from .softmax import LOG2E, exp2

Array = NDArray[Any]

# Pairs whose products with all earlier points a thread forms at a time.
PAIRS = 16
# Entries of the kernel below which a second thread costs more than it saves.
SERIAL_ENTRIES = 1 << 20
RULES = {"simple": 0, "kt": 1}


@kernel(parallel=True)
def halve_buckets(
    left: Array,
    right: Array,
    values: Array,
    starts: Array,
    shift: Array,
    level: Array,
    equal: Array,
    uniforms: Array,
    rule: int,
    threads: int,
    odd: Array,
) -> None:
    """Fill ``odd (pairs,)``: whether the second point of a pair is kept.

    ``left, right (n, d)``, ``values (n, m)``, m = 0 for none; bucket b has the points
    ``starts[b] ... starts[b + 1] - 1``, ``shift`` and ``level = ln(2 S/delta)`` one a bucket.
    Pairs that are not ``equal (pairs,)`` are not decided and do not count.
    """
    n, width = values.shape
    longest = 0
    for b in range(starts.size - 1):
        longest = max(longest, starts[b + 1] - starts[b])
    one = left.dtype.type(1.0)
    for worker in prange(threads):
        buffer = np.empty(2 * PAIRS * longest, left.dtype)
        other = np.empty(2 * PAIRS * longest if width > 0 else 0, left.dtype)
        sign = np.empty(longest, left.dtype)
        for b in range(worker, starts.size - 1, threads):
            p0 = starts[b]
            pairs = (starts[b + 1] - p0) // 2
            low = left.dtype.type(shift[b])
            top, spread, first = 0.0, 0.0, True
            for i0 in range(0, pairs, PAIRS):
                i1 = min(i0 + PAIRS, pairs)
                rows, columns = 2 * (i1 - i0), 2 * i1
                s = buffer[: rows * columns].reshape((rows, columns))
                np.dot(left[p0 + 2 * i0 : p0 + 2 * i1], right[p0 : p0 + columns].T, s)
                w = other[: (rows * columns if width > 0 else 0)]
                w = w.reshape((rows if width > 0 else 0, columns))
                if width > 0:
                    np.dot(values[p0 + 2 * i0 : p0 + 2 * i1], values[p0 : p0 + columns].T, w)
                for r in range(rows):
                    line = s[r]
                    for j in range(2 * (i0 + r // 2) + 2):
                        line[j] = exp2(left.dtype.type(line[j] - low))
                    if width > 0:
                        for j in range(2 * (i0 + r // 2) + 2):
                            line[j] *= w[r, j] + one
                for i in range(i0, i1):
                    pair = p0 // 2 + i
                    upper, lower = s[2 * (i - i0)], s[2 * (i - i0) + 1]
                    j = 2 * i
                    sign[j] = 0.0
                    sign[j + 1] = 0.0
                    if not equal[pair]:
                        continue
                    square = np.float64(upper[j]) - 2 * np.float64(upper[j + 1]) + lower[j + 1]
                    square = square if square > 0.0 else 0.0
                    size = np.sqrt(square)
                    top = size if size > top else top
                    alpha = left.dtype.type(0.0)
                    for t in range(j):
                        alpha += sign[t] * (upper[t] - lower[t])
                    if rule == 0:
                        a = size * top * (0.5 + level[b])
                    else:
                        a = max(size * np.sqrt(2.0 * spread * level[b]), square)
                        if a > 0.0:
                            more = square * (1.0 + (square - 2.0 * a) * spread / (a * a))
                            spread += more if more > 0.0 else 0.0
                    kept = not first and (2.0 * uniforms[pair] - 1.0) * a <= alpha
                    first = False
                    odd[pair] = kept
                    sign[j] = -one if kept else one
                    sign[j + 1] = one if kept else -one


# --- drivers --------------------------------------------------------------------------------


def halved(
    keys: Array,
    values: Array | None,
    starts: Array,
    equal: Array,
    uniforms: Array,
    *,
    scale: float,
    delta: float,
    rule: str,
) -> Array:
    """Return which pairs keep their second point, bool (n // 2,), before any flip.

    Parameters
    ----------
    keys, values : ndarray (n, d), (n, m)
        Points; values None leave their factor out of the kernel, otherwise none exceeds 1 in size.
    starts : int64 array (buckets + 1,)
        Even, but for the last.
    equal : bool array (n // 2,)
        Pairs to decide.
    uniforms : float64 array (n // 2,)
        In [0, 1), one a pair.
    scale : float
        Of the logits.
    delta : float
        Failure probability of a bucket.
    rule : str
        A key of ``RULES``.
    """
    dtype, n = keys.dtype, len(keys)
    factor = abs(scale) * LOG2E
    left = dtype.type(factor) * keys
    with np.errstate(over="ignore"):
        squares = factor * np.einsum("ij,ij->i", keys, keys, dtype=np.float64)
    sizes = np.diff(starts)
    entries = float(np.sum(sizes.astype(np.float64) ** 2))
    odd = np.zeros(n // 2, bool)
    with kernel_threads() as threads:
        halve_buckets(
            left,
            keys,
            np.empty((n, 0), dtype) if values is None else values,
            starts,
            np.maximum.reduceat(squares, starts[:-1]),
            np.log(2.0 * sizes / delta),
            equal,
            uniforms,
            RULES[rule],
            min(threads, len(sizes)) if entries > SERIAL_ENTRIES else 1,
            odd,
        )
    return odd
