"""Passes over slots that layouts share: what kernels need, rows in tiles, and their sums."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...partitions.ragged import Ragged

Array = NDArray[Any]

LOG2E = math.log2(math.e)  # that of the kernels would load the compiler
EMPTY = np.zeros(0, np.int64)


class Data(NamedTuple):
    """What kernels need beside a layout: queries, keys, widened queries, summaries in bits."""

    q: Array
    k: Array
    f: Array
    keys: Array
    bits: Array
    scale: float


class Near(NamedTuple):
    """Tiles of rows that share a region as direct keys; see `kernels.partitioned.near`."""

    order: Array
    first: Array
    last: Array
    region: Array
    groups: Array
    ends: Array
    skip: Array


class RowRanges(NamedTuple):
    """Ranges of slots: ``items[lo[t] : hi[t]]``, or positions themselves."""

    lo: Array
    hi: Array
    items: Array


def near_of(region_of_row: Array, ends: Array = EMPTY, skip: Array = EMPTY) -> Near:
    """Return the tiles of rows with the same region; rows of region -1 have none."""
    tile = _tile(ends)
    sizes = np.bincount(region_of_row + 1)
    # NumPy sorts 16 bits by counting.
    short = np.uint16 if len(sizes) <= 1 << 16 else np.int64
    order = np.argsort((region_of_row + 1).astype(short), kind="stable")[sizes[0] :]
    names = np.flatnonzero(sizes[1:])
    stops = np.cumsum(sizes[1:][names])
    starts = stops - sizes[1:][names]
    tiles = -(-(stops - starts) // tile)
    groups = np.concatenate([[0], np.cumsum(tiles)]).astype(np.int64)
    within = np.arange(groups[-1]) - np.repeat(groups[:-1], tiles)
    first = np.repeat(starts, tiles) + within * tile
    last = np.minimum(first + tile, np.repeat(stops, tiles))
    region = np.repeat(names, tiles).astype(np.int64)
    return Near(order, first, last, region, groups, ends, skip)


def _tile(ends: Array) -> int:
    """Return how many rows are in a tile of a stage at most."""
    from ...kernels.partitioned import ROW_TILE, WHOLE_TILE

    return ROW_TILE if len(ends) else WHOLE_TILE


class Totals:
    """Hold what passes over slots leave for each row, and run them.

    ``top``, ``total`` and ``out`` are those of `kernels.partitioned`.
    """

    def __init__(self, n_q: int, width: int, dtype: Any) -> None:
        self.out = np.zeros((n_q, width), dtype)
        self.top = np.full(n_q, -np.inf, dtype)
        self.total = np.zeros(n_q, dtype)

    def fold(
        self,
        stage: Near,
        q: Array,
        k: Array,
        x: Array,
        bias: Array,
        ranges: RowRanges,
        scale: float,
    ) -> None:
        """Fold the slots of one stage into its rows."""
        from ...kernels._threads import deal
        from ...kernels.partitioned import KEY_TILE, near

        deal(
            near, q, k, x, bias, stage.order, stage.first, stage.last, stage.region, ranges.lo,
            ranges.hi, ranges.items, stage.ends, stage.skip, scale, _tile(stage.ends), KEY_TILE,
            self.top, self.total, self.out, work=_work(stage, ranges, q, x),
        )  # fmt: skip

    def finish(self) -> tuple[Array, Array]:
        """Divide, and return the product and log Zhat."""
        from ...kernels._threads import deal
        from ...kernels.partitioned import ROW_TILE, finish

        lse = np.empty(len(self.out), self.out.dtype)
        deal(finish, self.top, self.total, ROW_TILE, self.out, lse, work=self.out.size)
        return self.out, lse


def _work(stage: Near, ranges: RowRanges, q: Array, x: Array) -> float:
    """Return the steps of a pass over the slots of one stage, for factors as wide as x."""
    from ...kernels._threads import PRODUCT

    slots = (ranges.hi - ranges.lo)[stage.region]
    pairs = int((stage.last - stage.first) @ slots) if len(slots) else 0
    return float(pairs * (1 + PRODUCT * (q.shape[1] + x.shape[1])))


def fold_back(
    stage: Near,
    q: Array,
    k: Array,
    y: Array,
    lse: Array,
    bias: Array,
    ranges: RowRanges,
    scale: float,
    out: Array,
) -> None:
    """Add what the rows of one stage give back to its slots."""
    from ...kernels._threads import deal
    from ...kernels.partitioned import KEY_TILE, near_transposed

    deal(
        near_transposed, q, k, y, lse, bias, stage.order, stage.first, stage.last, stage.groups,
        stage.region, ranges.lo, ranges.hi, ranges.items, stage.ends, stage.skip, scale,
        _tile(stage.ends), KEY_TILE, out, work=_work(stage, ranges, q, y),
    )  # fmt: skip


def slot_logits(
    data: Data, rows: Array, direct: Ragged, regions: Ragged
) -> tuple[Array, Array, Array]:
    """Return the base-2 logits of direct keys and of regions of rows (s,), and log Zhat (s,)."""
    from ...kernels._threads import deal
    from ...kernels.partitioned import ROW_TILE
    from ...kernels.partitioned import slot_logits as compute

    dtype = data.q.dtype
    d_out, r_out = np.empty(len(direct.items), dtype), np.empty(len(regions.items), dtype)
    lse = np.empty(len(rows), dtype)
    deal(
        compute, data.q, data.k, data.f, data.keys, data.bits, rows.astype(np.int64),
        direct.starts, direct.items, regions.starts, regions.items, data.scale, ROW_TILE,
        d_out, r_out, lse, work=(d_out.size + r_out.size) * data.q.shape[1],
    )  # fmt: skip
    return d_out, r_out, lse
