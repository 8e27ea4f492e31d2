"""Softmax over the block of a query and the sample beside it, never n_q x n_k.

With blocks beta and weights c_j of the sampled keys, zero for the others, the weight of key j for
query i is ``e^{L_ij} (M_ij + (1 - M_ij) c_j)``, ``M_ij = [beta(q_i) = beta(k_j)]``; where a key of
the own block counts twice, as in released codes, ``e^{L_ij} (M_ij + c_j)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.head import Head
from ...kernels._threads import product
from ...kernels.softmax import softmax_product
from ...operators.solve import row_softmax
from ...operators.steep import steep_rows
from .layout import Blocks, Sample

Array = NDArray[Any]

# Queries of a tile, all of one block: their number decides how BLAS rounds, so that it must not
# depend on the data, or a row would on the others.  Full tiles make BLAS fast; queries that no tile
# is full of are work for nothing.
TILES = (16, 32, 64)
# Numbers of keys that are gathered at a time.
GATHERED = 1 << 21


class Table(NamedTuple):
    """Hold what the queries of each block read.

    Attributes
    ----------
    columns : int64 array (blocks, w)
    log_weights : float64 array (blocks, w)
        Added to logits; -inf where a place is empty, or the key is in the block already.
    """

    columns: Array
    log_weights: Array


def table(blocks: Blocks, sample: Sample, mask_overlap: bool) -> Table:
    """Return the keys of all blocks with their weights."""
    count, size, n_k = blocks.number, blocks.size, len(blocks.keys)
    own = np.zeros(count * size, np.int64)
    own[:n_k] = blocks.sorted_keys
    weights = np.full(count * size, -np.inf)
    weights[:n_k] = 0.0
    if not mask_overlap:
        counted = np.zeros(n_k)
        counted[sample.columns] = sample.weights
        weights[:n_k] = np.log1p(counted[blocks.sorted_keys])
    outside = blocks.keys[sample.columns] != np.arange(count)[:, None]
    shape = (count, len(sample.columns))
    return Table(
        np.hstack([own.reshape(count, size), np.broadcast_to(sample.columns, shape)]),
        np.hstack(
            [weights.reshape(count, size), np.where(outside, np.log(sample.weights), -np.inf)]
        ),
    )


def attend(head: Head, values: Array, blocks: Blocks, read: Table) -> tuple[Array, Array]:
    """Return the output ``(n_q, m)`` and the logsumexp of the rows ``(n_q,)``."""
    (q, k, _), dtype = head.arrays, head.dtype
    n_q, width = len(q), values.shape[1]
    tile = next((x for x in TILES if x * blocks.number >= n_q // 2), TILES[-1])
    # Queries in the order of blocks, each block from the start of a tile.
    order = np.argsort(blocks.queries, kind="stable")
    counts = np.bincount(blocks.queries, minlength=blocks.number)
    tiles = -(-counts // tile)
    shift = tile * (np.cumsum(tiles) - tiles) - (np.cumsum(counts) - counts)
    places = np.arange(n_q) + np.repeat(shift, counts)
    of_tile = np.repeat(np.arange(blocks.number), tiles)
    rows = np.zeros((len(of_tile) * tile, q.shape[1]), dtype)
    rows[places] = q[order]
    rows = rows.reshape(len(of_tile), tile, -1)
    bias = read.log_weights.astype(dtype)[:, None]
    step = max(1, GATHERED // (read.columns.shape[1] * max(q.shape[1], width, 1)))
    parts = []
    for start in range(0, len(of_tile), step):
        chosen = of_tile[start : start + step]
        gathered = read.columns[chosen]
        parts.append(
            softmax_product(
                rows[start : start + step],
                k[gathered],
                values[gathered],
                scale=head.scale,
                mask=bias,
                mask_slab=chosen,
                tile=tile,
            )
        )
    out, lse = np.empty((n_q, width), dtype), np.empty(n_q, dtype)
    for found, part in ((out, 0), (lse, 1)):
        whole = np.concatenate([x[part] for x in parts])
        found[order] = whole.reshape(len(of_tile) * tile, *found.shape[1:])[places]
    _attend_steep(head, values, blocks, read, out, lse)
    return out, lse


def row_pieces(
    head: Head, blocks: Blocks, read: Table, rows: Array
) -> Iterator[tuple[Array, Array, Array]]:
    """Yield some of the rows (s,), keys (t,) that they read, and logits (s, t) with log-weights.

    float64; every row comes once, with -inf where it does not read a key.
    """
    q, k, _ = head.astype(np.float64).arrays
    order = rows[np.argsort(blocks.queries[rows], kind="stable")]
    found, starts = np.unique(blocks.queries[order], return_index=True)
    for c, some in zip(found, np.split(order, starts[1:]), strict=True):
        used = read.log_weights[c] > -np.inf
        columns = read.columns[c, used]
        with np.errstate(under="ignore"):
            logits = product(head.scale * q[some], k[columns].T)
        yield some, columns, logits + read.log_weights[c, used]


def _attend_steep(
    head: Head, values: Array, blocks: Blocks, read: Table, out: Array, lse: Array
) -> None:
    """Compute rows with large logits in float64."""
    steep = steep_rows(head)
    if not len(steep):
        return
    for rows, columns, logits in row_pieces(head, blocks, read, steep):
        top = logits.max(axis=1)
        with np.errstate(under="ignore"):
            lse[rows] = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        out[rows] = product(row_softmax(logits), values[columns].astype(np.float64, copy=False))
