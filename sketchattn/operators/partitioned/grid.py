"""Regions that are lines of a grid of positions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.head import Head
from ...partitions.ragged import Ragged
from .layouts import Layout, gather_layers, line_summaries, logits_of
from .passes import EMPTY, Data, RowRanges, Totals, fold_back, near_of
from .summaries import Reference, Rule, Summaries

Array = NDArray[Any]


class Grid(Layout):
    """Positions in a grid of m columns: own row and own column direct, lines as regions.

    Parameters
    ----------
    n, m : int
        Positions, columns.
    vertical : bool
        Whether regions are columns without the own row, or rows without the own column.
    causal : bool
    split : bool
        Whether what lies before and after the own place of a line are two regions.
    mask : bool array (n,), optional
    merged : bool
        Whether summaries are merged along the lines, which needs one reference query for all.

    Notes
    -----
    Region ``g H + h`` is line h of H without its place g; lines are columns and places rows, or the
    other way round.  Rows at place g share their regions, so that every part is a product of
    tiles.  A line without one place is one range of the line written twice.
    """

    def __init__(
        self,
        n: int,
        m: int,
        vertical: bool,
        causal: bool,
        split: bool,
        mask: Array | None,
        merged: bool = False,
    ) -> None:
        self.n_q = self.n_k = n
        self.causal, self.merged = causal, merged
        m = min(m, n)
        row, column = np.divmod(np.arange(n), m)
        rows = -(-n // m)
        kept = np.arange(n) if mask is None else np.flatnonzero(mask)
        position = np.arange(n)

        # The own row, up to the own key if causal; the own column without the own key.
        starts = np.arange(rows) * m
        bounds = [np.searchsorted(kept, x) for x in (starts, np.minimum(starts + m, n))]
        self.row_range = RowRanges(bounds[0], bounds[1], EMPTY if mask is None else kept)
        seen = np.searchsorted(kept, position + 1) if causal else EMPTY
        by_row = near_of(row, seen)
        down, low, high, before, after = line_summaries(kept, column, row, m, rows)
        self.column_range = RowRanges(low, high, down)
        place = np.where(after > before, before, -1)
        by_column = near_of(column, before, EMPTY) if causal else near_of(column, EMPTY, place)
        self.near = (by_row, by_column)
        self.ranges = (self.row_range, self.column_range)

        # Lines and places, and the slots of every pair of both.
        line, site = (column, row) if vertical else (row, column)
        self.lines, sites = (m, rows) if vertical else (rows, m)
        items, low, high, _, _ = line_summaries(kept, line, site, self.lines, sites)
        order = line[items] * sites + site[items]
        g, h = (x.ravel() for x in np.divmod(np.arange(sites * self.lines), self.lines))
        cut = np.searchsorted(order, h * sites + g)
        past = np.searchsorted(order, h * sites + g + 1)
        self.scan = (items, low, high, cut, past)
        self.modes = (1, 2) if split else (1,) if vertical and causal else (3,)
        low, high = low[h], high[h]
        if split:
            self._regions(np.concatenate([low, past]), np.concatenate([cut, high]), items)
        elif vertical and causal:
            self._regions(low, cut, items)
        else:
            # The line twice from 2 low on: after place g of the first copy to g of the second.
            twice = Ragged.ranges(low[: self.lines], high[: self.lines])
            doubled = Ragged.grouped(
                np.concatenate([2 * twice.owner, 2 * twice.owner + 1]),
                np.concatenate([twice.items, twice.items]),
                2 * self.lines,
            )
            self._regions(low + past, low + high - low + cut, items[doubled.items])
        self.sets = 2 if split else 1
        group = sites * self.lines
        own = site * self.lines + line
        self.far = []
        self.far_range = []
        for z in range(self.sets):
            first = z * group + np.arange(sites) * self.lines
            self.far_range.append(RowRanges(first, first + self.lines, EMPTY))
            slot = z * group + own
            # Causal rows see the lines above their own, if lines are rows.
            upper = causal and not vertical
            self.far.append(near_of(site, slot, EMPTY) if upper else near_of(site, EMPTY, slot))
        self.upper = causal and not vertical
        self.place, self.site, self.line = position, site, line
        self.layers = [
            (z * group + t * self.lines, z * group + (t + 1) * self.lines)
            for z in range(self.sets)
            for t in range(sites)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held."""
        stages = (*self.near, *self.far, *self.ranges, *self.far_range, self.scan)
        return super().nbytes + sum(x.nbytes for stage in stages for x in stage)

    def summarize(self, problem: Head, reference: Reference, rule: Rule) -> Summaries:
        """Compute the summaries of all regions: merged along the lines where that is possible."""
        self._logits = None
        if not self.merged:
            return super().summarize(problem, reference, rule)
        assert reference.q0 is not None
        self._logits = logits_of(problem, reference.q0[0])
        self._lam = None
        kappa, self._log_weight, entropy = self._along(problem.arrays.k)
        entropy = np.minimum(entropy, np.log(np.maximum(self.sizes, 1)))
        bias = self._bias(entropy, rule)
        return Summaries(kappa, bias, entropy, kappa, bias.astype(problem.dtype))

    def _along(self, x: Array) -> tuple[Array, Array, Array]:
        """Return the weighted means of x over all regions, their log weights and entropies."""
        from ...kernels._threads import deal
        from ...kernels.partitioned import line_means

        items, low, high, cut, past = self.scan
        out = np.empty((len(self.lo), x.shape[1]), x.dtype)
        log_weight, entropy = np.empty(len(self.lo)), np.empty(len(self.lo))
        size = len(cut)
        for z, mode in enumerate(self.modes):
            part = slice(z * size, (z + 1) * size)
            deal(
                line_means, x, self._logits, items, low, high, cut, past, size // self.lines,
                mode, out[part], log_weight[part], entropy[part], work=4 * x.size,
            )  # fmt: skip
        return out, log_weight, entropy

    def spread(self, x: Array) -> Array:
        """Return the value summaries (r, m)."""
        return super().spread(x) if self._logits is None else self._along(x)[0]

    @property
    def slot_bound(self) -> int:
        """A bound of the slots of one row."""
        return len(self.row_range.lo) + len(self.column_range.lo) + self.sets * self.lines

    def slots(self, rows: Array) -> tuple[Ragged, Ragged]:
        """Return the direct keys and the regions of some rows."""
        owners, found = [], []
        for stage, ranges in zip(self.near, self.ranges, strict=True):
            region = np.empty(self.n_q, np.int64)
            region[stage.order] = np.repeat(stage.region, stage.last - stage.first)
            low, high = ranges.lo[region[rows]], ranges.hi[region[rows]]
            if len(stage.ends):
                high = np.minimum(high, stage.ends[rows])
            slots = Ragged.ranges(low, high)
            owner, items = slots.owner, slots.items
            if len(stage.skip):
                other = items != stage.skip[rows][owner]
                owner, items = owner[other], items[other]
            owners.append(owner)
            found.append(ranges.items[items] if len(ranges.items) else items)
        lines = np.arange(self.lines)
        mine = self.line[rows][:, None]
        place, h = np.nonzero(lines < mine if self.upper else lines != mine)
        half = len(self.lo) // self.sets
        t = self.site[rows][place] * self.lines + h
        place, t = (
            np.concatenate([place] * self.sets),
            np.concatenate([t + z * half for z in range(self.sets)]),
        )
        filled = self.nonempty[t]
        return (
            Ragged.grouped(np.concatenate(owners), np.concatenate(found), len(rows)),
            Ragged.grouped(place[filled], t[filled], len(rows)),
        )

    def solve(self, data: Data, x: Array, xhat: Array) -> tuple[Array, Array]:
        """Return ``Ahat X`` and log Zhat."""
        sums = Totals(self.n_q, x.shape[1], data.q.dtype)
        for stage, ranges in zip(self.near, self.ranges, strict=True):
            sums.fold(stage, data.q, data.k, x, data.bits[:0], ranges, data.scale)
        for stage, ranges in zip(self.far, self.far_range, strict=True):
            sums.fold(stage, data.f, data.keys, xhat, data.bits, ranges, data.scale)
        return sums.finish()

    def transposed(
        self, data: Data, y: Array, lse: Array, *, only_far: bool = False
    ) -> tuple[Array, Array]:
        """Return the two parts of ``Ahat^T Y``."""
        out = np.zeros((self.n_k, y.shape[1]), y.dtype)
        z = np.zeros((len(self.lo), y.shape[1]), y.dtype)
        scale, none = data.scale, data.bits[:0]
        if not only_far:
            for stage, ranges in zip(self.near, self.ranges, strict=True):
                fold_back(stage, data.q, data.k, y, lse, none, ranges, scale, out)
        for stage, ranges in zip(self.far, self.far_range, strict=True):
            fold_back(stage, data.f, data.keys, y, lse, data.bits, ranges, scale, z)
        return out, z

    def gather(self, z: Array, out: Array) -> None:
        """Add ``sum_t lam_t(j) z_t`` to ``out``, place by place."""
        gather_layers(self, self.layers, z, out)
