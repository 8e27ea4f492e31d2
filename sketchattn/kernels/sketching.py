"""Products with sketches: fast Walsh-Hadamard transforms, hashed, sparse and dense rows.

Shapes and conventions shared by all kernels of this file:

* ``x (n, m)`` and ``y (r, m)`` are C-contiguous; ``signs`` are int8, +1 or -1; every result is
  multiplied by ``scale`` once, at the end.
* Items and the order of every sum follow from the shapes alone, so results do not depend on the
  number of threads.
* Sums over rows of ``x`` that are split over items go to one buffer an item, ``parts``, which
  `_combine` adds in order: no two threads ever write to one place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import kernel, take
from ._threads import PRODUCT, deal

Array = NDArray[Any]

MOST_PARTS = 8
ROWS = 64
# A tile of columns: 64 floats are 256 bytes of a row, read as one stream; 16 are a cache line.
WIDE, NARROW = 64, 16
L2_BYTES = 1 << 18


# --- Walsh-Hadamard transform ---------------------------------------------------------------


@kernel()
def _radix4(data: Array, start: int, gap: int, span: int) -> None:
    """Two stages at once on four runs of ``span`` elements, ``gap`` apart, from ``start``."""
    a = data[start : start + span]
    b = data[start + gap : start + gap + span]
    c = data[start + 2 * gap : start + 2 * gap + span]
    d = data[start + 3 * gap : start + 3 * gap + span]
    for k in range(span):
        p, q = a[k] + b[k], a[k] - b[k]
        s, t = c[k] + d[k], c[k] - d[k]
        a[k], b[k], c[k], d[k] = p + s, q + t, p - s, q - t


@kernel()
def _radix2(data: Array, start: int, gap: int, span: int) -> None:
    """One stage on two runs of ``span`` elements, ``gap`` apart, from ``start``."""
    a = data[start : start + span]
    b = data[start + gap : start + gap + span]
    for k in range(span):
        p, q = a[k] + b[k], a[k] - b[k]
        a[k], b[k] = p, q


@kernel()
def _stages(data: Array, rows: int, width: int, low: int, high: int, first: int, span: int) -> None:
    """All stages ``low <= h < high`` on ``span`` elements from ``first`` in each run of ``low``.

    Stage ``h`` takes rows ``i`` and ``i + h`` to their sum and difference, for ``i & h = 0``.
    """
    h = low
    while 4 * h <= high:
        for base in range(0, rows, 4 * h):
            for run in range(base, base + h, low):
                _radix4(data, run * width + first, h * width, span)
        h *= 4
    if h < high:
        for base in range(0, rows, 2 * h):
            for run in range(base, base + h, low):
                _radix2(data, run * width + first, h * width, span)


@kernel()
def _transform(data: Array, rows: int, width: int) -> None:
    """``X <- H X`` in place, H the Hadamard matrix of order ``rows`` (entries +1, -1).

    ``data`` holds X (rows, width) flat, ``rows`` a power of two; ``H_ij = (-1)^popcount(i & j)``.
    Stages below ``small`` run on one block after the other, later ones on slices of all blocks,
    so that both kinds stay in the first-level cache.
    """
    small = 1
    while 2 * small * width <= 4096 and 2 * small <= rows:
        small *= 2
    for base in range(0, rows, small):
        block = data[base * width : (base + small) * width]
        h = 1
        while 4 * h <= small:
            for start in range(0, small, 4 * h):
                _radix4(block, start * width, h * width, h * width)
            h *= 4
        if h < small:
            for start in range(0, small, 2 * h):
                _radix2(block, start * width, h * width, h * width)
    if small < rows:
        span = min(max(1, 512 // width), small) * width
        for first in range(0, small * width, span):
            last = min(span, small * width - first)
            _stages(data, rows, width, small, rows, first, last)


@kernel()
def _odd(x: int) -> int:
    """Return the parity of the number of set bits of ``x >= 0``."""
    x ^= x >> 32
    x ^= x >> 16
    x ^= x >> 8
    x ^= x >> 4
    x ^= x >> 2
    x ^= x >> 1
    return x & 1


# Row i = (i1, i2) of H X with i2 = i mod b, i1 = i div b, and X cut into blocks X_k of b rows:
#     (H X)_i = sum_k (-1)^popcount(i1 & k) (H_b X_k)_{i2},
# so the last stages are done for the wanted rows alone, and only one block is ever stored.


@kernel(dealt=True)
def _hadamard(
    turn: Array,
    x: Array,
    signs: Array,
    rows: Array,
    block: int,
    tile: int,
    chunks: int,
    parts: Array,
) -> None:
    """``parts[c] (r, m)``: the terms of blocks of chunk c of ``P H D x``; H has entries +1, -1.

    ``x (n, m)``, ``signs (n,)``, ``rows (r,)`` int64; rows of x beyond n count as zero.
    """
    n, m = x.shape
    blocks = (n + block - 1) // block
    tiles = (m + tile - 1) // tile
    data = np.empty(block * tile, x.dtype)
    for _ in range(chunks * tiles):
        item = take(turn)
        if item >= chunks * tiles:
            break
        chunk, c0 = item // tiles, (item % tiles) * tile
        width = min(tile, m - c0)
        part = parts[chunk]
        part[:, c0 : c0 + width] = 0.0
        for k in range(chunk * blocks // chunks, (chunk + 1) * blocks // chunks):
            j0 = k * block
            j1 = min(j0 + block, n)
            for j in range(j0, j1):
                sign = x.dtype.type(signs[j])
                row = x[j, c0 : c0 + width]
                target = data[(j - j0) * width : (j - j0 + 1) * width]
                for c in range(width):
                    target[c] = sign * row[c]
            data[(j1 - j0) * width : block * width] = 0.0
            _transform(data, block, width)
            for i in range(rows.shape[0]):
                sign = x.dtype.type(1 - 2 * _odd((rows[i] // block) & k))
                row = data[(rows[i] % block) * width : (rows[i] % block + 1) * width]
                target = part[i, c0 : c0 + width]
                for c in range(width):
                    target[c] += sign * row[c]


@kernel(dealt=True)
def _hadamard_transpose(
    turn: Array,
    y: Array,
    signs: Array,
    rows: Array,
    block: int,
    tile: int,
    scale: float,
    out: Array,
) -> None:
    """``out = scale D H P^T y (n, m)``, block by block; H has entries +1, -1.

    ``y (r, m)``, ``signs (n,)``, ``rows (r,)`` int64.
    """
    n, m = out.shape
    blocks = (n + block - 1) // block
    tiles = (m + tile - 1) // tile
    data = np.empty(block * tile, y.dtype)
    for _ in range(blocks * tiles):
        item = take(turn)
        if item >= blocks * tiles:
            break
        k, c0 = item // tiles, (item % tiles) * tile
        width = min(tile, m - c0)
        j0 = k * block
        data[: block * width] = 0.0
        for i in range(rows.shape[0]):
            sign = y.dtype.type(1 - 2 * _odd((rows[i] // block) & k))
            row = y[i, c0 : c0 + width]
            target = data[(rows[i] % block) * width : (rows[i] % block + 1) * width]
            for c in range(width):
                target[c] += sign * row[c]
        _transform(data, block, width)
        for j in range(j0, min(j0 + block, n)):
            factor = y.dtype.type(scale * signs[j])
            row = data[(j - j0) * width : (j - j0 + 1) * width]
            target = out[j, c0 : c0 + width]
            for c in range(width):
                target[c] = factor * row[c]


# --- sparse matrices ------------------------------------------------------------------------


@kernel(dealt=True)
def _scatter(
    turn: Array,
    x: Array,
    buckets: Array,
    signs: Array,
    tile: int,
    chunks: int,
    parts: Array,
) -> None:
    """``parts[c][buckets[j, k]] += signs[j, k] x_j`` over the rows j of chunk c and all k.

    ``x (n, m)``, ``buckets (n, s)`` int32, ``signs (n, s)``, ``parts (chunks, r, m)``.
    """
    n, m = x.shape
    tiles = (m + tile - 1) // tile
    for _ in range(chunks * tiles):
        item = take(turn)
        if item >= chunks * tiles:
            break
        chunk, c0 = item // tiles, (item % tiles) * tile
        c1 = min(c0 + tile, m)
        part = parts[chunk]
        part[:, c0:c1] = 0.0
        j0, j1 = chunk * n // chunks, (chunk + 1) * n // chunks
        if m == 1:  # a loop of length one costs more than its body
            for j in range(j0, j1):
                for k in range(buckets.shape[1]):
                    part[buckets[j, k], 0] += x.dtype.type(signs[j, k]) * x[j, 0]
        else:
            for j in range(j0, j1):
                for k in range(buckets.shape[1]):
                    i = buckets[j, k]
                    sign = x.dtype.type(signs[j, k])
                    # Unsigned: an index that might be negative is checked, not vectorised.
                    for c in range(np.uint64(c0), np.uint64(c1)):
                        part[i, c] += sign * x[j, c]


@kernel()
def _gather_rows(
    i0: int,
    i1: int,
    x: Array,
    starts: Array,
    columns: Array,
    signs: Array,
    block: int,
    factor: Any,
    out: Array,
) -> None:
    """Compute the rows ``i0 <= i < i1`` of ``_gather``."""
    n, m = x.shape
    place = starts[i0:i1].copy()
    for j0 in range(0, n, block):
        j1 = j0 + block
        for i in range(i0, i1):
            if j0 == 0:
                out[i] = 0.0
            p = place[i - i0]
            end = starts[i + 1]
            if m == 1:
                total = out[i, 0]
                while p < end and columns[p] < j1:
                    total += x.dtype.type(signs[p]) * x[columns[p], 0]
                    p += 1
                out[i, 0] = total
            # Four at a time: one load and one store of the output for four rows.
            while p + 4 <= end and columns[p + 3] < j1:
                ja, jb, jc, jd = columns[p], columns[p + 1], columns[p + 2], columns[p + 3]
                sa, sb = x.dtype.type(signs[p]), x.dtype.type(signs[p + 1])
                sc, sd = x.dtype.type(signs[p + 2]), x.dtype.type(signs[p + 3])
                for c in range(m):
                    out[i, c] += sa * x[ja, c] + sb * x[jb, c] + sc * x[jc, c] + sd * x[jd, c]
                p += 4
            while p < end and columns[p] < j1:
                j = columns[p]
                sign = x.dtype.type(signs[p])
                for c in range(m):
                    out[i, c] += sign * x[j, c]
                p += 1
            place[i - i0] = p
            if j1 >= n:
                for c in range(m):
                    out[i, c] *= factor


@kernel(dealt=True)
def _gather(
    turn: Array,
    x: Array,
    starts: Array,
    columns: Array,
    signs: Array,
    block: int,
    pieces: int,
    scale: float,
    out: Array,
) -> None:
    """``out_i = scale sum_p signs[p] x_{columns[p]}``, ``starts[i] <= p < starts[i + 1]``.

    ``x (n, m)``, ``starts (len(out) + 1,)`` int64, ``columns`` int32.  x is read in blocks of
    ``block`` rows that stay in cache for all rows of a piece; columns have to ascend within a
    row unless one block covers x.
    """
    r = out.shape[0]
    factor = x.dtype.type(scale)
    for _ in range(pieces):
        item = take(turn)
        if item >= pieces:
            break
        i0, i1 = item * r // pieces, (item + 1) * r // pieces
        _gather_rows(i0, i1, x, starts, columns, signs, block, factor, out)


@kernel(dealt=True)
def _combine(turn: Array, parts: Array, scale: float, out: Array) -> None:
    """``out = scale sum_c parts[c]``, in the order of c."""
    chunks, r, m = parts.shape
    factor = out.dtype.type(scale)
    tiles = (r + ROWS - 1) // ROWS
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        for i in range(item * ROWS, min((item + 1) * ROWS, r)):
            for c in range(m):
                total = parts[0, i, c]
                for chunk in range(1, chunks):
                    total += parts[chunk, i, c]
                out[i, c] = factor * total


# --- dense rows -----------------------------------------------------------------------------


@kernel(dealt=True)
def _dense(turn: Array, a: Array, x: Array, tile: int, out: Array) -> None:
    """``out = a x`` in tiles of rows; a (r, n), x (n, m)."""
    tiles = (a.shape[0] + tile - 1) // tile
    for _ in range(tiles):
        item = take(turn)
        if item >= tiles:
            break
        start = item * tile
        stop = min(start + tile, a.shape[0])
        np.dot(a[start:stop], x, out[start:stop])


# --- drivers --------------------------------------------------------------------------------


def _add_parts(parts: Array, scale: float) -> Array:
    out = np.empty(parts.shape[1:], parts.dtype)
    deal(_combine, parts, scale, out, work=parts.size)
    return out


def _hadamard_sizes(order: int, length: int, r: int, m: int) -> tuple[int, int]:
    """Return the rows of a block and the columns of a tile for r rows of a transform.

    The rows that are wanted cost ``r`` updates a block beside ``log2(block)`` for each of its
    rows: blocks of four times r rows keep that below one stage.
    """
    block = 1
    while block < order and block < max(1024, 4 * r):
        block *= 2
    # Few blocks leave threads without work, and a large block must still fit a cache.
    few = -(-length // block) < 8
    return block, min(m, NARROW if few else WIDE)


def hadamard_apply(x: Array, signs: Array, rows: Array, order: int, scale: float) -> Array:
    """Return ``scale P H D x (r, m)`` with the Hadamard matrix of entries +1, -1.

    Parameters
    ----------
    x : ndarray (n, m)
        Rows n to ``order`` count as zero; they are never stored.
    signs : int8 array (n,)
        Diagonal of D.
    rows : int64 array (r,)
        Rows of ``H D x`` to return, in 0..order - 1; repeats are allowed.
    order : int
        A power of two, at least n.
    scale : float
        Factor of the result.
    """
    n, m = x.shape
    r = len(rows)
    block, tile = _hadamard_sizes(order, n, r, m)
    chunks = min(MOST_PARTS, -(-n // block))
    parts = np.empty((chunks, r, m), x.dtype)
    work = n * m * block.bit_length()
    deal(_hadamard, x, signs, rows, block, tile, chunks, parts, work=work)
    return _add_parts(parts, scale)


def hadamard_transpose(y: Array, signs: Array, rows: Array, order: int, scale: float) -> Array:
    """Return ``scale D H P^T y (n, m)``, the transpose of ``hadamard_apply``; y is (r, m)."""
    n, m = len(signs), y.shape[1]
    block, tile = _hadamard_sizes(order, n, len(rows), m)
    out = np.empty((n, m), y.dtype)
    work = n * m * block.bit_length()
    deal(_hadamard_transpose, y, signs, rows, block, tile, scale, out, work=work)
    return out


def scatter(x: Array, buckets: Array, signs: Array, r: int, scale: float) -> Array:
    """Return ``scale S x (r, m)`` for S with ``signs[j, k]`` in row ``buckets[j, k]`` of column j.

    Parameters
    ----------
    x : ndarray (n, m)
    buckets, signs : int32 and int8 arrays (n, s)
        Entries of one column that share a row add up.
    r : int
        Rows of S.
    scale : float
        Factor of the result.
    """
    n, m = x.shape
    updates = buckets.size * m
    # Buffers cost r m updates each to clear and to add: an eighth of the work at most.
    chunks = max(1, min(MOST_PARTS, n, buckets.size // (8 * r)))
    tile = min(m, max(NARROW, L2_BYTES // (r * x.itemsize)))
    parts = np.empty((chunks, r, m), x.dtype)
    deal(_scatter, x, buckets, signs, tile, chunks, parts, work=updates)
    return _add_parts(parts, scale)


def gather(
    x: Array, starts: Array, columns: Array, signs: Array, scale: float, *, ordered: bool
) -> Array:
    """Return ``scale S x`` for S in compressed rows, with entries ``signs`` in ``columns``.

    Parameters
    ----------
    x : ndarray (n, m)
    starts : int64 array (r + 1,)
        Row i has the entries ``starts[i] <= p < starts[i + 1]``.
    columns, signs : int32 and int8 arrays (starts[-1],)
    scale : float
        Factor of the result.
    ordered : bool
        Columns ascend within every row; only then can x be read in blocks.
    """
    n, m = x.shape
    r = len(starts) - 1
    out = np.empty((r, m), x.dtype)
    # Rows of x that fit the second-level cache, but some entries of every row of S in a block.
    block = max(L2_BYTES // (m * x.itemsize), 16 * n * r // max(1, len(columns)), 64)
    block, pieces = min(block, n) if ordered else n, max(1, min(MOST_PARTS, r // ROWS))
    work = len(columns) * m + out.size
    deal(_gather, x, starts, columns, signs, block, pieces, scale, out, work=work)
    return out


def dense_product(a: Array, x: Array) -> Array:
    """Return ``a x`` (r, m) for a dense flat ``a`` (r, n) and a tall ``x`` (n, m).

    As fast as BLAS on threads of its own, which would keep a core busy for milliseconds after
    their work, beside the kernel that comes next.
    """
    r = len(a)
    out = np.empty((r, x.shape[1]), x.dtype)
    # BLAS packs x once a tile: few tiles, but one for each thread.
    tile = 128 if r >= 256 else 64 if r >= 128 else 32
    if x.size == 0 or r == 0:
        out[:] = 0
        return out
    deal(_dense, a, x, tile, out, work=PRODUCT * r * x.size)
    return out
