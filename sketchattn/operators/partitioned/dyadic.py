"""Regions that are nodes of a binary tree over positions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.head import Head
from ...partitions.ragged import Ragged
from .layouts import Layout, gather_layers, logits_of
from .passes import EMPTY, Data, Near, RowRanges, Totals, fold_back, near_of
from .summaries import Reference, Rule, Summaries

Array = NDArray[Any]


class Dyadic(Layout):
    """Sibling blocks of a dyadic tree over positions, with a direct leaf block.

    Parameters
    ----------
    n : int
    leaf : int
        A power of two.
    causal : bool
    mask : bool array (n,), optional
    tree : bool
        Whether summaries are merged up the tree, which needs one reference query for all.
    """

    def __init__(self, n: int, leaf: int, causal: bool, mask: Array | None, tree: bool) -> None:
        self.n_q = self.n_k = n
        self.causal, self.tree = causal, tree
        self.lowest = leaf.bit_length() - 1
        levels = max((n - 1).bit_length(), 1)
        # Causal rows use even blocks only; a tree needs the others to merge.
        self.half = causal and not tree
        self.mask = np.empty(0, bool) if mask is None else mask.copy()  # kernels want it writeable
        kept = np.arange(n) if mask is None else np.flatnonzero(mask)
        offsets, level, block = [0], [EMPTY], [EMPTY]
        total = 0
        for e in range(1, levels):
            offsets.append(total)
            if not tree and e < self.lowest:
                continue
            count = -(-n // (1 << e))
            b = np.arange(0, count, 2 if self.half else 1)
            sibling = b ^ 1
            used = (sibling << e < n) & (e >= self.lowest)
            if causal:
                used &= b & 1 == 0
            level.append(np.where(used, e, -e))
            block.append(b)
            total += len(b)
        self.offsets = np.asarray(offsets, np.int64)
        self.level, self.block = (np.concatenate(x).astype(np.int64) for x in (level, block))
        size = np.abs(self.level)
        low = self.block << size
        high = np.minimum((self.block + 1) << size, n)
        unused = self.level < 0
        if not tree:
            high[unused] = low[unused]
        if mask is not None:
            low, high = np.searchsorted(kept, low), np.searchsorted(kept, high)
        self._regions(low, high, EMPTY if mask is None else kept)
        # Regions of one level share no key.
        bounds = [*offsets[1:], total]
        self.layers = [(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True) if b > a]
        self.near: Near | None = None
        if self.lowest:
            first, seen = np.arange(0, n, leaf), np.arange(1, n + 1)
            low, high = first, np.minimum(first + leaf, n)
            if mask is not None:
                low, high, seen = (np.searchsorted(kept, x) for x in (low, high, seen))
            self.leaves = RowRanges(low, high, self.items)
            self.near = near_of(np.arange(n) >> self.lowest, seen if causal else EMPTY)

    @property
    def slot_bound(self) -> int:
        """A bound of the slots of one row."""
        return (1 << self.lowest) + len(self.offsets) + 2

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held."""
        return super().nbytes + (0 if self.near is None else sum(x.nbytes for x in self.near))

    def _levels(self) -> list[tuple[int, int, int, int]]:
        """Return (first node, count, first child, number of children) of levels 2 and up."""
        out = []
        for (a, b), (c, d) in zip(self.layers[1:], self.layers[:-1], strict=True):
            out.append((a, b - a, c, d - c))
        return out

    def summarize(self, problem: Head, reference: Reference, rule: Rule) -> Summaries:
        """Compute the summaries of all regions: merged up the tree where that is possible."""
        self._logits = None
        if not self.tree:
            return super().summarize(problem, reference, rule)
        assert reference.q0 is not None
        dtype, n = problem.dtype, self.n_k
        total = len(self.lo)
        with np.errstate(over="ignore", invalid="ignore"):
            e = logits_of(problem, reference.q0[0])
        if len(self.mask):
            e[~self.mask] = -np.inf
        log_weight, entropy, left = np.empty(total), np.empty(total), np.empty(total)
        below: tuple[Array, Array] = (e, np.where(np.isfinite(e), 0.0, -np.inf))
        for a, b in self.layers:
            pairs = []
            for x in below:
                even = x[0::2]
                odd = np.full(len(even), -np.inf)
                odd[: len(x) // 2] = x[1::2]
                pairs.append((even, odd))
            (w_left, w_right), (h_left, h_right) = pairs
            merged = np.logaddexp(w_left, w_right)
            some = np.isfinite(merged)
            shift = np.where(some, merged, 0)
            p, r = np.exp(w_left - shift), np.exp(w_right - shift)
            # H of the union: sum_c w_c (H_c - ln w_c).
            h = np.zeros(len(merged))
            for w, inner, log_w in ((p, h_left, w_left - shift), (r, h_right, w_right - shift)):
                inside = w > 0
                h[inside] += w[inside] * (inner[inside] - log_w[inside])
            sizes = np.maximum(self.sizes[a:b], 1)
            h = np.where(some, np.clip(h, 0.0, np.log(sizes)), -np.inf)
            log_weight[a:b], entropy[a:b], left[a:b] = merged, h, p
            below = (merged, h)
        self._logits, self._log_weight = e, log_weight
        self._left = left.astype(dtype)
        self._lam = None
        kappa = self._climb(problem.arrays.k)
        bias = self._bias(entropy, rule)
        assert n == len(problem.k)
        return Summaries(kappa, bias, entropy, kappa, bias.astype(dtype))

    def _climb(self, x: Array) -> Array:
        """Return the weighted means of x over all nodes, level by level."""
        from ...kernels._threads import deal
        from ...kernels.partitioned import tree_leaves, tree_level

        out = np.empty((len(self.lo), x.shape[1]), x.dtype)
        left = self._left.astype(x.dtype, copy=False)
        if self.layers:
            deal(tree_leaves, x, left, self.layers[0][1], len(x), out, work=x.size)
        for first, count, below, children in self._levels():
            deal(tree_level, out, left, first, below, count, children, work=count * x.shape[1])
        return out

    def spread(self, x: Array) -> Array:
        """Return the value summaries (r, m)."""
        return super().spread(x) if self._logits is None else self._climb(x)

    def slots(self, rows: Array) -> tuple[Ragged, Ragged]:
        """Return the direct keys and the regions of some rows."""
        n, e0 = self.n_k, self.lowest
        first = (rows >> e0) << e0
        last = rows + 1 if self.causal else np.minimum(first + (1 << e0), n)
        own = Ragged.ranges(first, last)
        owner, keys = [own.owner], [own.items]
        place, found = [EMPTY], [EMPTY]
        for e in range(e0, max((n - 1).bit_length(), 1) if n > 1 else 0):
            b = rows >> e
            sibling = b ^ 1
            some = np.flatnonzero((sibling << e < n) & ((b & 1 == 1) | (not self.causal)))
            if e == 0:
                owner.append(some)
                keys.append(sibling[some])
                continue
            t = self.offsets[e] + (sibling[some] >> 1 if self.half else sibling[some])
            filled = self.nonempty[t]
            place.append(some[filled])
            found.append(t[filled])
        owners, items = np.concatenate(owner), np.concatenate(keys)
        if len(self.mask):
            kept = self.mask[items]
            owners, items = owners[kept], items[kept]
        return (
            Ragged.grouped(owners, items, len(rows)),
            Ragged.grouped(np.concatenate(place), np.concatenate(found), len(rows)),
        )

    def solve(self, data: Data, x: Array, xhat: Array) -> tuple[Array, Array]:
        """Return ``Ahat X`` and log Zhat."""
        from ...kernels._threads import deal
        from ...kernels.partitioned import ROW_TILE, dyadic

        sums = Totals(self.n_q, x.shape[1], data.q.dtype)
        if self.near is not None:
            sums.fold(self.near, data.q, data.k, x, data.bits[:0], self.leaves, data.scale)
        lse = np.empty(self.n_q, data.q.dtype)
        deal(
            dyadic, data.q, data.k, x, data.f, data.keys, data.bits, xhat, self.offsets,
            self.lowest, self.half, self.causal, self.mask, data.scale, ROW_TILE,
            sums.top, sums.total, sums.out, lse, work=self._work(data, x),
        )  # fmt: skip
        return sums.out, lse

    def _work(self, data: Data, x: Array) -> float:
        """Return the steps of a pass over a region a level, for factors as wide as x."""
        return float(len(data.q) * len(self.offsets) * (data.f.shape[1] + x.shape[1]))

    def transposed(
        self, data: Data, y: Array, lse: Array, *, only_far: bool = False
    ) -> tuple[Array, Array]:
        """Return the two parts of ``Ahat^T Y``."""
        from ...kernels._threads import deal
        from ...kernels.partitioned import ROW_TILE, dyadic_transposed, neighbours_transposed

        z = np.empty((len(self.lo), y.shape[1]), y.dtype)
        deal(
            dyadic_transposed, data.f, data.keys, data.bits, y, lse, self.level, self.block,
            data.scale, z, work=self._work(data, y),
        )  # fmt: skip
        out = np.zeros((self.n_k, y.shape[1]), y.dtype)
        if only_far:
            return out, z
        if self.near is not None:
            bias = data.bits[:0]
            fold_back(self.near, data.q, data.k, y, lse, bias, self.leaves, data.scale, out)
        else:
            deal(
                neighbours_transposed, data.q, data.k, y, lse, self.causal, self.mask, data.scale,
                ROW_TILE, out, work=self._work(data, y),
            )  # fmt: skip
        return out, z

    def gather(self, z: Array, out: Array) -> None:
        """Add ``sum_t lam_t(j) z_t`` to ``out``, level by level."""
        gather_layers(self, self.layers, z, out)
