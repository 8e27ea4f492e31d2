"""Statistics of the logits of each row over a few keys, or over all: maximum, sum, logsumexp.

What ProbSparse attention ranks its rows by, without the (n_q, keys, d) array that a gather of the
sampled keys would be: every dot product is reduced as soon as it is there.

Shapes and conventions shared by all kernels of this file:

* ``q (H, n_q, d)`` and ``k (H_kv, n_k, d)`` of one precision; head ``h`` reads ``h // group``.
* ``out (H, n_q, 4)``, float64: for each row the maximum, the sum and the logsumexp of its logits
  ``scale q . k`` over the keys that count, and their number.  Without any: -inf, 0, -inf, 0.
* All arithmetic is in float64, whatever the inputs: which rows are on top is a decision, and in
  float32 rounding would make it wherever two rows are close.
* Items are (head, tile of rows), a row is reduced in one order, so that results do not depend on
  the number of threads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import kernel, take
from ._threads import PRODUCT, deal

Array = NDArray[Any]

MAXIMUM, SUM, LOGSUMEXP, COUNT = 0, 1, 2, 3

# Rows of an item.  Sampled keys are read in no order, so that their tile only sets how finely
# work is split; tiles of logits of a product (128 x 512 in float64) fill half a megabyte.
SAMPLED_TILE = 64
ROW_TILE, KEY_TILE = 128, 512


@kernel(dealt=True)
def _sampled(
    turn: Array,
    q: Array,
    k: Array,
    group: int,
    scale: float,
    samples: Array,
    last: Array,
    exponentials: bool,
    tile: int,
    out: Array,
) -> None:
    """Fill ``out`` from the keys ``samples[s, i]`` of row i that are not after ``last[i]``.

    ``samples (S, n_q, U)`` int64 with S = 1 (one sample for all heads) or H, ``last (n_q,)`` int64.
    The logsumexp is left at -inf unless ``exponentials``.
    """
    heads, n_q, d = q.shape
    drawn = samples.shape[2]
    tiles = (n_q + tile - 1) // tile
    query = np.empty(d, np.float64)
    logits = np.empty(drawn, np.float64)
    for _ in range(heads * tiles):
        item = take(turn)
        if item >= heads * tiles:
            break
        h = item // tiles
        i0 = (item - h * tiles) * tile
        keys = k[h // group]
        chosen = samples[h if samples.shape[0] > 1 else 0]
        for i in range(i0, min(i0 + tile, n_q)):
            for c in range(d):
                query[c] = scale * np.float64(q[h, i, c])
            count = 0
            for t in range(drawn):
                j = chosen[i, t]
                if j > last[i]:
                    continue
                key = keys[j]
                dot = 0.0
                for c in range(d):
                    dot += query[c] * np.float64(key[c])
                logits[count] = dot
                count += 1
            top = -np.inf
            total = 0.0
            for t in range(count):
                total += logits[t]
                top = logits[t] if logits[t] > top else top
            lse = -np.inf
            if exponentials and count > 0:
                mass = 0.0
                for t in range(count):
                    mass += math.exp(logits[t] - top)
                lse = top + math.log(mass)
            out[h, i, 0] = top
            out[h, i, 1] = total
            out[h, i, 2] = lse
            out[h, i, 3] = count


@kernel(dealt=True)
def _shared(
    turn: Array,
    q: Array,
    keys: Array,
    group: int,
    scale: float,
    seen: Array,
    exponentials: bool,
    row_tile: int,
    key_tile: int,
    out: Array,
) -> None:
    """Fill ``out`` from the first ``seen[i]`` of ``keys (H_kv, U, d)``, float64, for row i.

    A tile of logits is one product; ``top`` and ``mass`` run over the tiles of keys,
    ``m' = max(m, max_j l_j)``, ``mass' = e^(m - m') mass + sum_j e^(l_j - m')``.
    """
    heads, n_q, d = q.shape
    drawn = keys.shape[1]
    tiles = (n_q + row_tile - 1) // row_tile
    query_buffer = np.empty(row_tile * d, np.float64)
    logit_buffer = np.empty(row_tile * key_tile, np.float64)
    mass = np.empty(row_tile, np.float64)
    for _ in range(heads * tiles):
        item = take(turn)
        if item >= heads * tiles:
            break
        h = item // tiles
        i0 = (item - h * tiles) * row_tile
        rows = min(row_tile, n_q - i0)
        query = query_buffer[: rows * d].reshape((rows, d))
        for i in range(rows):
            for c in range(d):
                query[i, c] = scale * np.float64(q[h, i0 + i, c])
            mass[i] = 0.0
            out[h, i0 + i, 0] = -np.inf
            out[h, i0 + i, 1] = 0.0
            out[h, i0 + i, 2] = -np.inf
            out[h, i0 + i, 3] = seen[i0 + i]
        most = 0
        for i in range(rows):
            most = max(most, seen[i0 + i])
        for j0 in range(0, min(most, drawn), key_tile):
            j1 = min(j0 + key_tile, drawn)
            logits = logit_buffer[: rows * (j1 - j0)].reshape((rows, j1 - j0))
            np.dot(query, keys[h // group, j0:j1].T, logits)
            for i in range(rows):
                count = min(seen[i0 + i] - j0, j1 - j0)
                if count <= 0:
                    continue
                before = out[h, i0 + i, 0]
                top = before
                total = 0.0
                for t in range(count):
                    total += logits[i, t]
                    top = logits[i, t] if logits[i, t] > top else top
                out[h, i0 + i, 0] = top
                out[h, i0 + i, 1] += total
                if exponentials:
                    part = 0.0
                    for t in range(count):
                        part += math.exp(logits[i, t] - top)
                    mass[i] = mass[i] * math.exp(before - top) + part
        if exponentials:
            for i in range(rows):
                if mass[i] > 0.0:
                    out[h, i0 + i, 2] = out[h, i0 + i, 0] + math.log(mass[i])


def sampled_statistics(
    q: Array,
    k: Array,
    samples: Array,
    last: Array,
    *,
    scale: float,
    group: int = 1,
    exponentials: bool = True,
) -> Array:
    """Return maximum, sum, logsumexp and number of the logits of each row over its own keys.

    Nothing is validated.

    Parameters
    ----------
    q, k : ndarray
        (H, n_q, d) and (H_kv, n_k, d), C-contiguous, one precision.
    samples : int64 array (S, n_q, U)
        Keys of each row, repeats counted; S is 1 or H.
    last : int64 array (n_q,)
        Sampled keys above it do not count.
    scale : float
    group : int
        Query heads that share a key head.
    exponentials : bool
        Whether the logsumexp is wanted.

    Returns
    -------
    ndarray (H, n_q, 4), float64
    """
    out = np.empty((*q.shape[:2], 4))
    # Keys in no order: a step is a load from memory rather than a multiplication in a register.
    steps = q.shape[0] * samples.shape[1] * samples.shape[2] * q.shape[2]
    arguments = (q, k, group, scale, samples, last, exponentials, SAMPLED_TILE, out)
    deal(_sampled, *arguments, work=steps / 2)
    return out


def shared_statistics(
    q: Array,
    keys: Array,
    seen: Array,
    *,
    scale: float,
    group: int = 1,
    exponentials: bool = True,
) -> Array:
    """Return maximum, sum, logsumexp and number of the logits of each row over the same keys.

    Nothing is validated.

    Parameters
    ----------
    q : ndarray (H, n_q, d)
        float32 or float64, C-contiguous.
    keys : float64 array (H_kv, U, d)
    seen : int64 array (n_q,)
        Row i counts the first ``seen[i]`` of them.
    scale, group, exponentials
        As for `sampled_statistics`.

    Returns
    -------
    ndarray (H, n_q, 4), float64

    Notes
    -----
    For all keys of a head this is the exact statistic, ``O(n_q n_k d)`` and one tile in memory.
    """
    out = np.empty((*q.shape[:2], 4))
    entries = q.shape[0] * q.shape[1] * keys.shape[1]
    deal(
        _shared,
        q,
        keys,
        group,
        scale,
        seen,
        exponentials,
        ROW_TILE,
        min(KEY_TILE, max(keys.shape[1], 1)),
        out,
        work=entries * (1 + PRODUCT * q.shape[2]),
    )
    return out
