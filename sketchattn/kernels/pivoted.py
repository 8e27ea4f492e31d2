"""Kernels of keys, and the next pivot of a randomly pivoted Cholesky factorisation of one.

`next_pivot` looks for it in stale residuals.  The kernel is Gaussian, ``G_jl = exp(-|z_j - z_l|^2 /
2)``, and a pivot is the key whose race ``-ln u_j / (res_j p_j)`` ends first: it has the law ``res_j
p_j / sum``.  Residuals only fall, so that a race with an old residual ends too early and never too
late: a key that is not first in it need not be looked at again.  Those that are have their residual
brought up to date, one at a time, and all others are left until there is a whole block of columns
to subtract, by BLAS.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import kernel
from .softmax import LOG2E, exp2

Array = NDArray[Any]

# Numba's cache watches this file only.  These are the first digits of the SHA-256 of the bodies
# that are compiled into these kernels from another file; a test compares them, and changing
# them here makes the cache start afresh.
FOREIGN = "3c116716"

# What `next_pivot` returns where there is no pivot: nothing is left, or no room for another row.
NOTHING, FULL = -1, -2


@kernel()
def exponentials(x: Array, rows: Array, columns: Array, most: float) -> None:
    """``x_ij <- exp(min(x_ij - rows_i - columns_j, most))`` in place, ``x (b, r)``."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y = x[i, j] - rows[i] - columns[j]
            y = most if y > most else y
            x[i, j] = exp2(x.dtype.type(LOG2E * y))


@kernel()
def _refresh(
    j: int,
    z: Array,
    half: Array,
    factor: Array,
    flushed: int,
    chosen: Array,
    count: int,
    row_of: Array,
    rows: Array,
    done: Array,
    left: Array,
) -> None:
    """Bring row ``row_of[j]`` of the factor up to the last pivot, and the residual with it."""
    row = row_of[j]
    for t in range(done[row], count):
        p = chosen[t]
        pivot = row_of[p]
        dot = 0.0
        for c in range(z.shape[1]):
            dot += z[j, c] * z[p, c]
        x = np.exp(min(dot - half[j] - half[p], 0.0))
        known = 0.0
        for c in range(flushed):
            known += factor[j, c] * factor[p, c]
        for c in range(t):
            known += rows[row, c] * rows[pivot, c]
        f = (x - known) / rows[pivot, t]
        rows[row, t] = f
        left[row] = max(left[row] - f * f, 0.0)
    done[row] = count


@kernel()
def next_pivot(
    u: Array,
    weight: Array,
    res: Array,
    tolerance: float,
    z: Array,
    half: Array,
    factor: Array,
    flushed: int,
    chosen: Array,
    count: int,
    row_of: Array,
    rows: Array,
    done: Array,
    left: Array,
    used: int,
) -> tuple[int, int]:
    """Return the key whose race ends first, or NOTHING or FULL, and how many rows are in use.

    ``u (n,)`` uniform on [0, 1), ``weight (n,)`` proportional to ``res_j p_j`` with the residuals
    ``res (n,)`` after ``flushed`` columns of ``factor (n, r)``; 0 for keys that are out.  ``z (n,
    d)``, ``half = |z|^2 / 2``.  ``chosen[:count]`` are pivots whose columns are in ``rows`` only:
    row ``row_of[j]``, -1 for none, holds those of key j, ``done`` of them, and ``left`` is what
    they leave of ``res_j``.  The new pivot's row is ended with the root of its residual.
    """
    n = u.shape[0]
    first = -1
    best = np.inf
    for j in range(n):
        # 1 - u <= -ln u: most keys need no logarithm.
        if 1.0 - u[j] < best * weight[j]:
            time = -np.log(u[j]) / weight[j]
            if time < best:
                best = time
                first = j
    if first < 0:
        return NOTHING, used
    winner = -1
    best = np.inf
    for k in range(-1, n):
        # The first of the old race is likely to be that of the new one, and spares the others.
        j = first if k < 0 else k
        if (k >= 0 and j == first) or not 1.0 - u[j] < best * weight[j]:
            continue
        time = -np.log(u[j]) / weight[j]
        if not time < best:
            continue
        if row_of[j] < 0:
            if used == rows.shape[0]:
                return FULL, used
            row_of[j] = used
            done[used] = 0
            left[used] = res[j]
            used += 1
        _refresh(j, z, half, factor, flushed, chosen, count, row_of, rows, done, left)
        rest = left[row_of[j]]
        if rest > tolerance:
            time = time * (res[j] / rest)
            if time < best:
                best = time
                winner = j
        else:
            weight[j] = 0.0
    if winner < 0:
        return NOTHING, used
    rows[row_of[winner], count] = np.sqrt(left[row_of[winner]])
    chosen[count] = winner
    weight[winner] = 0.0
    return winner, used
