"""Keys that share hash codes with a query: found by buckets, and weighed by their probability.

Each of L tables sorts the keys by their code, ties by index.  A row looks up one bucket a table and
counts what it finds, so that its cost is that of the collisions, not of all pairs; no large array
of n_q x n_k is made.  All numbers are float64: few pairs are kept, and their weights differ widely.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._jit import kernel, take
from ._threads import deal

Array = NDArray[Any]

# A count that no number of tables reaches: of keys that are kept whatever their codes.
KEPT = 1 << 24
# Rows of an item.
ROWS = 64
# Steps of work (see `_threads.PRODUCT`): of a bucket that is looked up, of a pair that is kept.
BUCKET, PAIR = 20, 80
# Buckets of the tables that are sorted together, and pairs of a row and a key up to which there is
# room for all of them: a few megabytes each.
SORTED, ROOM = 1 << 16, 1 << 19


@kernel()
def _log_tail(p: float, tables: int, least: int) -> float:
    """``ln P(Bin(tables, p) >= least)`` without cancellation, 0 < p <= 1."""
    if p >= 1.0:
        return 0.0
    if p * tables > least:
        # The tail is more than a half about: what is missing has ``least`` terms.
        term = math.exp(tables * math.log1p(-p))
        missing = term
        for m in range(1, least):
            term *= (tables - m + 1) * p / (m * (1.0 - p))
            missing += term
        return math.log1p(-missing)
    first = least * math.log(p) + (tables - least) * math.log1p(-p)
    for m in range(least):
        first += math.log((tables - m) / (m + 1.0))
    term, total = 1.0, 1.0
    for m in range(least, tables):
        term *= (tables - m) * p / ((m + 1.0) * (1.0 - p))
        total += term
        if term < 1e-17 * total:
            break
    return first + math.log(total)


@kernel(dealt=True)
def _collide(
    turn: Array,
    codes: Array, starts: Array, order: Array, ends: Array, least: int, sinks: int, window: int,
    first: int, begins: Array, counts: Array, columns: Array,
) -> None:  # fmt: skip
    """Count the keys of each row, or write them: ``columns`` from ``begins[i]`` on.

    Row i keeps a key ``j < ends[i]`` whose code equals its own in ``least`` tables, or that is one
    of the first ``sinks`` or of the last ``window`` of these.
    ``codes (rows, L)``, ``starts (L, codes + 1)``, ``order (L, n_k)``; rows are ``first ...``.
    """
    rows = counts.shape[0]
    tables, n_k = order.shape
    tiles = (rows + ROWS - 1) // ROWS
    found = np.zeros(n_k, np.int32)
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        for i in range(item * ROWS, min((item + 1) * ROWS, rows)):
            end = ends[first + i]
            at = begins[i]
            kept = 0
            found[:] = 0
            lead = min(sinks, end)
            tail = max(lead, end - window)
            for s in range(lead + end - tail):
                j = s if s < lead else tail + s - lead
                found[j] = KEPT
                if columns.size > 0:
                    columns[at + kept] = j
                kept += 1
            for table in range(tables):
                code = codes[first + i, table]
                for s in range(starts[table, code], starts[table, code + 1]):
                    j = order[table, s]
                    if j >= end:
                        break
                    found[j] += 1
                    if found[j] == least:
                        if columns.size > 0:
                            columns[at + kept] = j
                        kept += 1
            counts[i] = kept


@kernel(dealt=True)
def _weigh(
    turn: Array,
    q: Array, k: Array, v: Array, q_unit: Array, k_unit: Array, ends: Array, begins: Array,
    columns: Array, bits: int, tables: int, least: int, floor: float, sinks: int, window: int,
    scale: float, first: int, weights: Array, out: Array, lse: Array,
) -> None:  # fmt: skip
    """Turn the keys of each row into weights, output and log-sum-exp; -inf for a row without."""
    rows = lse.shape[0]
    tiles = (rows + ROWS - 1) // ROWS
    d, width, m = q.shape[1], q_unit.shape[1], v.shape[1]
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        for i in range(item * ROWS, min((item + 1) * ROWS, rows)):
            end = ends[first + i]
            high = -np.inf
            for t in range(begins[i], begins[i + 1]):
                j = columns[t]
                logit = 0.0
                for c in range(d):
                    logit += q[first + i, c] * k[j, c]
                logit *= scale
                if j >= sinks and j < end - window:
                    # Of unit vectors: exact for parallel ones, where an arc cosine has half of
                    # the digits, and a right angle where one of them is zero.
                    near, far = 0.0, 0.0
                    for c in range(width):
                        x, y = q_unit[first + i, c], k_unit[j, c]
                        near += (x - y) * (x - y)
                        far += (x + y) * (x + y)
                    angle = 2.0 * math.atan2(math.sqrt(near), math.sqrt(far))
                    # Two vectors that collide are not antiparallel, whatever rounding says.
                    p = max(1.0 - angle / math.pi, 1e-15) ** bits
                    log_u = _log_tail(p, tables, least)
                    logit -= log_u if floor == 0.0 else math.log(math.exp(log_u) + floor)
                weights[t] = logit
                high = max(high, logit)
            for c in range(m):
                out[i, c] = 0.0
            if high == -np.inf:
                lse[i] = high
                continue
            total = 0.0
            for t in range(begins[i], begins[i + 1]):
                weights[t] = math.exp(weights[t] - high)
                total += weights[t]
            lse[i] = high + math.log(total)
            for t in range(begins[i], begins[i + 1]):
                weights[t] /= total
                for c in range(m):
                    out[i, c] += weights[t] * v[columns[t], c]


# --- drivers --------------------------------------------------------------------------------------


class Buckets(NamedTuple):
    """Hold the keys of each table in the order of their codes.

    Attributes
    ----------
    starts : int32 array (L, codes + 1)
        Where the keys of a code start in ``order``.
    order : int32 array (L, n_k)
    """

    starts: Array
    order: Array


class Hashing(NamedTuple):
    """Hold how two vectors collide, and which keys are kept without.

    Attributes
    ----------
    bits, tables, least : int
        Codes of so many bits must be equal in ``least`` of the tables.
    floor : float
        Added to the probability that a weight is divided by.
    sinks, window : int
        The first and the last keys in sight, which are kept with weight one.
    """

    bits: int
    tables: int
    least: int
    floor: float
    sinks: int
    window: int


def pack(sides: Array, bits: int) -> Array:
    """Return ``sides (n, L bits)``, bool, as codes (n, L), uint16; the first bit is the lowest."""
    grouped = sides.reshape(len(sides), -1, bits)
    codes = np.zeros(grouped.shape[:2], np.uint16)
    for bit in range(bits):
        codes |= grouped[:, :, bit].astype(np.uint16) << np.uint16(bit)
    return codes


def fill_buckets(codes: Array, bits: int) -> Buckets:
    """Return the buckets of codes (n_k, L), uint16."""
    n_k, tables = codes.shape
    starts = np.zeros((tables, (1 << bits) + 1), np.int32)
    order = np.empty((tables, n_k), np.int32)
    # Many tables of few keys are sorted together: what numbers of one take is that of the call.
    most = max(1, SORTED >> bits)
    for first in range(0, tables, most):
        some = np.ascontiguousarray(codes[:, first : first + most].T)
        order[first : first + most] = np.argsort(some, axis=1, kind="stable")
        shifted = some.astype(np.int64) + (np.arange(len(some)) << bits)[:, None]
        sizes = np.bincount(shifted.ravel(), minlength=len(some) << bits)
        np.cumsum(sizes.reshape(len(some), -1), axis=1, out=starts[first : first + most, 1:])
    return Buckets(starts, order)


def count_keys(codes: Array, buckets: Buckets, ends: Array, how: Hashing) -> Array:
    """Return the number of keys that each row keeps, int64 (n_q,), for its codes (n_q, L).

    Row i sees the keys below ``ends[i]``, int64 (n_q,).
    """
    counts = np.zeros(len(codes), np.int64)
    nowhere, nothing = np.zeros(len(codes), np.int64), np.empty(0, np.int64)
    arguments = (codes, *buckets, ends, how.least, how.sinks, how.window, 0)
    deal(_collide, *arguments, nowhere, counts, nothing, work=BUCKET * codes.size)
    return counts


def find_keys(codes: Array, buckets: Buckets, ends: Array, how: Hashing) -> tuple[Array, Array]:
    """Return the keys of all rows one after the other, int64, and where those of each row start.

    What `count_keys` and `list_keys` find in two passes over the tables, in one where there is
    room for every key of every row.
    """
    n_q, n_k = len(codes), buckets.order.shape[1]
    if n_q * n_k > ROOM:
        counts = count_keys(codes, buckets, ends, how)
        begins = np.concatenate([[0], np.cumsum(counts)])
        return list_keys(codes, buckets, ends, how, slice(0, n_q), begins), begins
    counts, columns = np.zeros(n_q, np.int64), np.empty(n_q * n_k, np.int64)
    if len(columns):
        arguments = (codes, *buckets, ends, how.least, how.sinks, how.window, 0)
        deal(
            _collide, *arguments, n_k * np.arange(n_q), counts, columns, work=BUCKET * codes.size
        )
    kept = np.arange(n_k) < counts[:, None]
    return columns.reshape(n_q, n_k)[kept], np.concatenate([[0], np.cumsum(counts)])


def list_keys(
    codes: Array, buckets: Buckets, ends: Array, how: Hashing, rows: slice, begins: Array
) -> Array:
    """Return the keys of some rows one after the other, int64, as `count_keys` counted them.

    ``begins`` int64 (rows + 1,): where the keys of each row start, from 0.
    """
    columns = np.empty(begins[-1], np.int64)
    if not len(columns):
        return columns
    counts = np.zeros(len(begins) - 1, np.int64)
    arguments = (codes, *buckets, ends, how.least, how.sinks, how.window, rows.start)
    work = BUCKET * len(counts) * codes.shape[1]
    deal(_collide, *arguments, begins, counts, columns, work=work)
    return columns


def weigh_keys(
    arrays: tuple[Array, Array, Array],
    units: tuple[Array, Array],
    ends: Array,
    how: Hashing,
    scale: float,
    rows: slice,
    begins: Array,
    columns: Array,
) -> tuple[Array, Array, Array]:
    """Return weights (t,), output (rows, m) and log-sum-exp (rows,) of rows with keys of their own.

    The weights of a row are a softmax of ``scale q_i . k_j - ln(u_ij + floor)``, where u_ij is the
    probability that codes of ``units``, unit vectors (n_q, e) and (n_k, e), collide.  ``arrays``
    are Q, K and V in float64; ``begins`` and ``columns`` as of `list_keys`.
    """
    count = len(begins) - 1
    weights = np.empty(len(columns))
    out = np.empty((count, arrays[2].shape[1]))
    lse = np.empty(count)
    deal(
        _weigh, *arrays, *units, ends, begins, columns, how.bits, how.tables, how.least, how.floor,
        how.sinks, how.window, scale, rows.start, weights, out, lse,
        work=len(columns) * (PAIR + sum(x.shape[1] for x in arrays)),
    )  # fmt: skip
    return weights, out, lse
