"""Regions that many rows share."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...partitions.ragged import Ragged
from .layouts import Layout, gather_layers
from .passes import EMPTY, Data, Near, RowRanges, Totals, fold_back, near_of

Array = NDArray[Any]

# Keys of the longest layout that is kept after a call: 40 bytes each.
_KEPT = 1 << 16
_ROW_STEPS = 32  # found by timing rows that see few regions


class Shared(Layout):
    """Regions that are spans or label classes, which all rows share but for a few of their own.

    Parameters
    ----------
    labels : int64 array (n_k,)
        Region of each key, in 0..count - 1; negative: the key does not exist.
    count : int
    own : int64 array (n_q,), optional
        The region whose keys are direct for each row; None: no row has one.
    causal : bool
        Labels then ascend with the position, and row i sees regions below ``own[i]`` only.
    """

    def __init__(
        self, labels: Array, count: int, n_q: int, own: Array | None, causal: bool = False
    ) -> None:
        self.n_q, self.n_k, self.causal, self.count = n_q, len(labels), causal, count
        kept = np.flatnonzero(labels >= 0)
        ascending = bool((np.diff(labels[kept]) >= 0).all())
        items = kept if ascending else kept[np.argsort(labels[kept], kind="stable")]
        ends = np.cumsum(np.bincount(labels[kept], minlength=count))
        lo = np.concatenate([[0], ends[:-1]])
        whole = ascending and len(kept) == self.n_k
        self._regions(lo, ends, EMPTY if whole else items.astype(np.int64))
        self.limit = EMPTY
        self.skip = np.zeros((n_q, 0), np.int64)
        self.near: tuple[Near, ...] = ()
        self._own = own
        if own is not None:
            if causal:
                seen = np.arange(1, n_q + 1)
                ends = np.searchsorted(kept, seen) if len(kept) < n_q else seen
                self.near = (near_of(own, ends.astype(np.int64)),)
                self.limit = own.astype(np.int64)
            else:
                self.near = (near_of(own),)
                self.skip = np.ascontiguousarray(own[:, None].astype(np.int64))

    def promoted(self, chosen: Array) -> Shared:
        """Return this layout with the regions ``chosen`` (n_q, t) direct, -1 for none."""
        import copy

        twin = copy.copy(self)
        twin.skip = np.ascontiguousarray(np.concatenate([self.skip, chosen], axis=1))
        twin.near = (*self.near, *(near_of(column) for column in chosen.T))
        return twin

    @classmethod
    def spans(cls, n: int, size: int, own: bool, causal: bool) -> Shared:
        """Return the layout of spans of ``size`` keys, a row for each, without a key masked.

        Calls of a model have the same shapes: what follows from these alone is kept, and copies
        share it.
        """
        import copy

        make = _spans if n <= _KEPT else _spans.__wrapped__
        return copy.copy(make(n, size, own, causal))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held."""
        return super().nbytes + sum(x.nbytes for near in self.near for x in near)

    @property
    def count_direct(self) -> bool:
        """Whether some row may have direct keys."""
        return bool(self.near)

    @property
    def slot_bound(self) -> int:
        """A bound of the slots of one row."""
        return int(self.sizes.max(initial=0)) * len(self.near) + self.count

    def slots(self, rows: Array) -> tuple[Ragged, Ragged]:
        """Return the direct keys and the regions of some rows."""
        seen = np.broadcast_to(self.nonempty, (len(rows), self.count)).copy()
        place = np.arange(len(rows))
        skip = self.skip[rows]
        for column in skip.T:
            some = column >= 0
            seen[place[some], column[some]] = False
        direct = [(column[column >= 0], place[column >= 0]) for column in skip.T]
        if len(self.limit):
            seen &= np.arange(self.count) < self.limit[rows][:, None]
            direct.append((self.limit[rows], place))
        owners, found = [EMPTY], [EMPTY]
        for region, place_of in direct:
            keys = self.region_keys(region)
            owner = place_of[keys.owner]
            visible = (keys.items <= rows[owner]) if self.causal else slice(None)
            owners.append(owner[visible])
            found.append(keys.items[visible])
        row, region = np.nonzero(seen)
        return (
            Ragged.grouped(np.concatenate(owners), np.concatenate(found), len(rows)),
            Ragged.grouped(row, region, len(rows)),
        )

    def solve(self, data: Data, x: Array, xhat: Array) -> tuple[Array, Array]:
        """Return ``Ahat X`` and log Zhat."""
        from ...kernels._threads import deal
        from ...kernels.partitioned import KEY_TILE, ROW_TILE, far

        sums = Totals(self.n_q, x.shape[1], data.q.dtype)
        ranges = RowRanges(self.lo, self.hi, self.items)
        for stage in self.near:
            sums.fold(stage, data.q, data.k, x, data.bits[:0], ranges, data.scale)
        deal(
            far, data.f, data.keys, data.bits, xhat, self.limit, self.skip, data.scale,
            ROW_TILE, KEY_TILE, sums.top, sums.total, sums.out, work=self._work(data, xhat),
        )  # fmt: skip
        return sums.finish()

    @staticmethod
    def _work(data: Data, x: Array) -> float:
        """Return the steps of a pass over all regions, for factors as wide as x."""
        from ...kernels._threads import PRODUCT

        # A row takes as long as some regions before its first one.
        entries = len(data.f) * (len(data.keys) + _ROW_STEPS)
        return float(entries * (1 + PRODUCT * (data.f.shape[1] + x.shape[1])))

    def transposed(
        self, data: Data, y: Array, lse: Array, *, only_far: bool = False
    ) -> tuple[Array, Array]:
        """Return the two parts of ``Ahat^T Y``."""
        from ...kernels._threads import deal
        from ...kernels.partitioned import ROW_TILE, far_transposed

        z = np.empty((self.count, y.shape[1]), y.dtype)
        deal(
            far_transposed, data.f, data.keys, data.bits, y, lse, self.limit, self.skip,
            data.scale, ROW_TILE, ROW_TILE, z, work=self._work(data, y),
        )  # fmt: skip
        out = np.zeros((self.n_k, y.shape[1]), y.dtype)
        ranges = RowRanges(self.lo, self.hi, self.items)
        for stage in () if only_far else self.near:
            fold_back(stage, data.q, data.k, y, lse, data.bits[:0], ranges, data.scale, out)
        return out, z

    def gather(self, z: Array, out: Array) -> None:
        """Add ``sum_t lam_t(j) z_t`` to ``out``: each key is in one region."""
        gather_layers(self, [(0, len(self.lo))], z, out)

    def heaviest(self, data: Data, count: int) -> Array:
        """Return the regions of largest mass of each row, int64 (n_q, count), -1 for none."""
        from ...kernels._threads import deal
        from ...kernels.partitioned import KEY_TILE, ROW_TILE, heaviest

        chosen = np.empty((self.n_q, count), np.int64)
        deal(
            heaviest, data.f, data.keys, data.bits, self.limit, self.skip, data.scale, ROW_TILE,
            KEY_TILE, chosen, work=self._work(data, data.f[:0]),
        )  # fmt: skip
        return chosen


@functools.lru_cache(maxsize=4)
def _spans(n: int, size: int, own: bool, causal: bool) -> Shared:
    labels = np.arange(n) // size
    made = Shared(labels, -(-n // size), n, labels if own else None, causal)
    _ = made.order
    return made
