"""How regions lie in memory: what every layout can do, and what layouts of lines share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import check_logits
from ...base.head import Head
from ...partitions.plans import Plan
from ...partitions.ragged import Ragged
from .passes import EMPTY, Data, slot_logits
from .summaries import Reference, Rule, Summaries

Array = NDArray[Any]

# Rows whose slots are listed at a time where no more than a few arrays of them may exist.
CHUNK_SLOTS = 1 << 22
# Keys whose queries, keys and values a cache holds.
CACHED_KEYS = 4096


class _Pieces(NamedTuple):
    """Split large regions: piece c of region ``region[z]``, ``starts[z] <= c < starts[z + 1]``."""

    lo: Array
    hi: Array
    at: Array
    region: Array
    starts: Array
    order: Array


def _pieces(lo: Array, hi: Array, at: Array) -> _Pieces | None:
    """Return the pieces of up to ``CACHED_KEYS`` keys of the regions that have more."""
    region = np.flatnonzero(hi - lo > CACHED_KEYS)
    if not len(region):
        return None
    counts = -(-(hi - lo)[region] // CACHED_KEYS)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    within = (np.arange(starts[-1]) - np.repeat(starts[:-1], counts)) * CACHED_KEYS
    low = np.repeat(lo[region], counts) + within
    high = np.minimum(low + CACHED_KEYS, np.repeat(hi[region], counts))
    order = np.argsort(low, kind="stable").astype(np.int64)
    return _Pieces(low, high, np.repeat(at[region], counts) + within, region, starts, order)


class Layout(ABC):
    """Say which slots each row has, and compute products with them.

    Regions are ranges of a list of keys, ``items[lo[t] : hi[t]]``; no ``items``: positions
    themselves.  The local weights of region t start at ``at[t]`` of one array.
    """

    n_q: int
    n_k: int
    causal: bool
    dtype: Any
    lo: Array
    hi: Array
    items: Array
    _lam: Array | None = None
    _order: Array | None = None
    # Where all regions have one reference query: e_j of the keys, ln W_t of the regions.
    _logits: Array | None = None
    _log_weight: Array

    @property
    def lam(self) -> Array:
        """Local weights of all regions, one after another."""
        if self._lam is None:
            self._lam = self._local_weights()
        return self._lam

    def _local_weights(self) -> Array:
        """Return ``lam_t(j) = exp(e_j - ln W_t)``, not kept when regions were merged."""
        if self._logits is None:
            raise ValueError("summarize must be called before products, got none; call it first")
        keys = self.region_keys(np.arange(len(self.lo)))
        shift = np.where(np.isfinite(self._log_weight), self._log_weight, 0)
        lam = np.exp(self._logits[keys.items] - np.repeat(shift, keys.sizes))
        return np.asarray(lam.astype(self.dtype))

    def _regions(self, lo: Array, hi: Array, items: Array) -> None:
        self.lo, self.hi, self.items = lo.astype(np.int64), hi.astype(np.int64), items
        sizes = np.maximum(self.hi - self.lo, 0)
        self.at = np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(np.int64)
        self._order = None
        self.pieces = _pieces(self.lo, self.hi, self.at)
        self.nonempty = sizes > 0

    @property
    def order(self) -> Array:
        """Regions of up to ``CACHED_KEYS`` keys, in the order in which they are summarised.

        By where their keys are, which a cache then still holds for the next region.  Regions that
        are merged need none: a million of them are not sorted for nothing.
        """
        if self._order is None:
            sizes = self.sizes
            order = np.lexsort((-sizes, self.lo // CACHED_KEYS)).astype(np.int64)
            self._order = order[sizes[order] <= CACHED_KEYS]
        return self._order

    @property
    def sizes(self) -> Array:
        """Number of keys of each region, int64 (r,)."""
        return np.asarray(np.maximum(self.hi - self.lo, 0))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held."""
        held = [x.nbytes for x in self.__dict__.values() if isinstance(x, np.ndarray)]
        return int(sum(held))

    def region_keys(self, index: Array) -> Ragged:
        """Return the keys of some regions."""
        places = Ragged.ranges(self.lo[index], self.hi[index])
        if not len(self.items):
            return places
        return Ragged(places.starts, self.items[places.items])

    def local_weights(self, index: Array) -> Any:
        """Return lam of some regions as a sparse matrix (len(index), n_k)."""
        from scipy.sparse import csr_array

        keys = self.region_keys(index)
        where = Ragged.ranges(self.at[index], self.at[index] + keys.sizes)
        return csr_array(
            (self.lam[where.items], keys.items, keys.starts), shape=(len(index), self.n_k)
        )

    def summarize(self, problem: Head, reference: Reference, rule: Rule) -> Summaries:
        """Compute the summaries of all regions, and keep the local weights."""
        from ...kernels._threads import deal
        from ...kernels.partitioned import GIVEN, KEYS, MAXIMUM, MEAN, summarize

        q, k, _ = problem.arrays
        dtype, d, r = problem.dtype, problem.d, len(self.lo)
        sizes = self.sizes
        lam = self._lam = np.empty(int(sizes.sum()), dtype)
        squares = rule.second_order == "diag"
        kappa = np.empty((r, d), dtype)
        entropy, log_weight = np.empty(r), np.empty(r)
        variance = np.empty((r if squares else 0, d))
        kind = {"given": GIVEN, "mean": MEAN, "max": MAXIMUM}[reference.kind]
        q0 = np.empty((0, d)) if reference.q0 is None else np.ascontiguousarray(reference.q0)
        deal(
            summarize, k, q, q0, kind, KEYS[rule.key], self.lo, self.hi, self.at, self.items,
            self.order, max(int(sizes[self.order].max(initial=0)), 1), problem.scale,
            squares, lam, kappa, entropy, variance, log_weight, work=3 * k.shape[1] * sizes.sum(),
        )  # fmt: skip
        if self.pieces is not None:
            self._summarize_large(problem, reference, rule, lam, kappa, entropy, variance)
        bias = self._bias(entropy, rule)
        if not squares:
            return Summaries(kappa, bias, entropy, kappa, bias.astype(dtype))
        # 1/2 scale^2 sum_c (q_c - q0_c)^2 var_c is linear in q and its squares.
        centre = self.reference_queries(problem, reference)
        factor = problem.scale
        keys = np.concatenate([kappa - factor * centre * variance, 0.5 * factor * variance], axis=1)
        more = 0.5 * factor**2 * np.sum(centre**2 * variance, axis=1)
        return Summaries(
            kappa, bias, entropy, keys.astype(dtype), (bias + more).astype(dtype), variance
        )

    def _summarize_large(
        self,
        problem: Head,
        reference: Reference,
        rule: Rule,
        lam: Array,
        kappa: Array,
        entropy: Array,
        variance: Array,
    ) -> None:
        """Summarise large regions by their pieces, which merge as sets with one reference query.

        With ``w_c = W_c / W`` of piece c: ``lam = w_c lam_c``, ``kappa = sum w_c kappa_c``,
        ``H = sum w_c (H_c - ln w_c)``, ``var = sum w_c (var_c + (kappa_c - kappa)^2)``.
        """
        from ...kernels._threads import deal
        from ...kernels.partitioned import GIVEN, KEYS, summarize

        p = self.pieces
        assert p is not None
        d, count = problem.d, len(p.lo)
        squares = rule.second_order == "diag"
        if reference.shared:
            assert reference.q0 is not None
            q0 = np.ascontiguousarray(reference.q0)
        else:
            q0 = np.repeat(self._large_references(problem, reference), np.diff(p.starts), axis=0)
        part_kappa, part_entropy = np.empty((count, d), problem.dtype), np.empty(count)
        log_weight = np.empty(count)
        part_variance = np.empty((count if squares else 0, d))
        q, k, _ = problem.arrays
        # Expected keys are what variances are about; the means or maxima come from a second pass.
        for key in dict.fromkeys(["expected", rule.key] if squares else [rule.key]):
            deal(
                summarize, k, q, q0, GIVEN, KEYS[key], p.lo, p.hi, p.at, self.items, p.order,
                CACHED_KEYS, problem.scale, squares, lam, part_kappa, part_entropy,
                part_variance, log_weight, work=3 * k.shape[1] * (p.hi - p.lo).sum(),
            )  # fmt: skip
            if key == "expected":
                expected = part_kappa.astype(np.float64)
        for z, t in enumerate(p.region):
            mine = slice(p.starts[z], p.starts[z + 1])
            sizes = (p.hi - p.lo)[mine]
            shifted = log_weight[mine] - log_weight[mine].max()
            w = np.exp(shifted)
            total = w.sum()
            w, log_w = w / total, shifted - np.log(total)
            h = float(np.sum(np.where(w > 0, w * (part_entropy[mine] - log_w), 0)))
            entropy[t] = min(max(h, 0.0), float(np.log(sizes.sum())))
            if rule.key == "max":
                kappa[t] = part_kappa[mine].max(axis=0)
            else:
                shares = w if rule.key == "expected" else sizes / sizes.sum()
                kappa[t] = shares @ part_kappa[mine].astype(np.float64)
            if squares:
                mean = w @ expected[mine]
                variance[t] = w @ (part_variance[mine] + (expected[mine] - mean) ** 2)
            for c in range(p.starts[z], p.starts[z + 1]):
                lam[p.at[c] : p.at[c] + p.hi[c] - p.lo[c]] *= lam.dtype.type(w[c - p.starts[z]])

    def _large_references(self, problem: Head, reference: Reference) -> Array:
        """Return the reference queries of large regions, float64 (number of them, d)."""
        p = self.pieces
        assert p is not None
        if reference.q0 is not None:
            return np.asarray(reference.q0[p.region])
        # Levels of a tree have the same pieces.
        ranges, which = np.unique(np.stack([p.lo, p.hi], axis=1), axis=0, return_inverse=True)
        reduce = np.add if reference.kind == "mean" else np.maximum
        rows = []
        for low, high in ranges:
            x = problem.q[self.items[low:high]] if len(self.items) else problem.q[low:high]
            rows.append(reduce.reduce(x, axis=0, dtype=np.float64))
        found = reduce.reduceat(np.asarray(rows)[which.reshape(-1)], p.starts[:-1], axis=0)
        if reference.kind == "mean":
            found = found / self.sizes[p.region][:, None]
        return np.asarray(found)

    def _bias(self, entropy: Array, rule: Rule) -> Array:
        sizes = self.sizes
        if rule.bias == "entropy":
            return entropy
        found = np.log(np.maximum(sizes, 1)) if rule.bias == "log_count" else np.zeros(len(sizes))
        return np.where(sizes > 0, found, -np.inf)

    def reference_queries(self, problem: Head, reference: Reference) -> Array:
        """Return the reference query of each region, float64 (r, d); zeros for an empty one."""
        if reference.q0 is not None:
            return np.broadcast_to(reference.q0, (len(self.lo), problem.d))
        keys = self.region_keys(np.arange(len(self.lo)))
        q0 = np.zeros((len(self.lo), problem.d))
        some = np.flatnonzero(keys.sizes)
        add = np.add if reference.kind == "mean" else np.maximum
        if len(some):
            rows = problem.q[keys.items].astype(np.float64)
            q0[some] = add.reduceat(rows, keys.starts[:-1][some], axis=0)
            if reference.kind == "mean":
                q0[some] /= keys.sizes[some][:, None]
        return q0

    def spread(self, x: Array) -> Array:
        """Return the value summaries ``xhat_t = sum_j lam_t(j) x_j`` (r, m)."""
        from ...kernels._threads import deal
        from ...kernels.partitioned import spread_values

        out = np.empty((len(self.lo), x.shape[1]), x.dtype)
        deal(
            spread_values, self.lam, self.lo, self.hi, self.at, self.items, x, self.order, out,
            work=self.lam.size * x.shape[1],
        )  # fmt: skip
        if self.pieces is not None:
            p = self.pieces
            parts = np.empty((len(p.lo), x.shape[1]), x.dtype)
            deal(
                spread_values, self.lam, p.lo, p.hi, p.at, self.items, x, p.order, parts,
                work=(p.hi - p.lo).sum() * x.shape[1],
            )  # fmt: skip
            out[p.region] = np.add.reduceat(parts, p.starts[:-1], axis=0, dtype=np.float64)
        return out

    @abstractmethod
    def slots(self, rows: Array) -> tuple[Ragged, Ragged]:
        """Return the direct keys and the regions of some rows."""

    @abstractmethod
    def solve(self, data: Data, x: Array, xhat: Array) -> tuple[Array, Array]:
        """Return ``Ahat X`` (n_q, m) from X (n_k, m) and its summaries (r, m), and log Zhat."""

    @abstractmethod
    def transposed(
        self, data: Data, y: Array, lse: Array, *, only_far: bool = False
    ) -> tuple[Array, Array]:
        """Return the direct part of ``Ahat^T Y`` (n_k, m), and ``sum_i rho_i(t) y_i`` (r, m)."""

    def transposed_by_rows(
        self, data: Data, y: Array, *, only_far: bool = False
    ) -> tuple[Array, Array]:
        """Return what `transposed` does from rows that are listed, each divided by its own sum."""
        out = np.zeros((self.n_k, y.shape[1]), y.dtype)
        z = np.zeros((len(self.lo), y.shape[1]), y.dtype)
        for rows in self.chunks():
            mine, theirs, _ = weights_of(self, data, rows)
            z += theirs.T @ y[rows]
            if not only_far:
                out += mine.T @ y[rows]
        return out, z

    @abstractmethod
    def gather(self, z: Array, out: Array) -> None:
        """Add ``sum_t lam_t(j) z_t`` to ``out`` (n_k, m)."""

    @property
    def count_direct(self) -> bool:
        """Whether some row may have direct keys."""
        return True

    def chunks(self) -> list[Array]:
        """Return pieces of rows whose slots are few enough to be listed."""
        most = max(1, CHUNK_SLOTS // max(self.slot_bound, 1))
        return [np.arange(i, min(i + most, self.n_q)) for i in range(0, self.n_q, most)]

    @property
    @abstractmethod
    def slot_bound(self) -> int:
        """A bound of the slots of one row."""

    def plan(self) -> Plan:
        """Return the plan with explicit lists: as large as there are slots.

        Its regions are numbered as everywhere in this layout, so that some may be empty or used
        by no row.
        """
        direct, regions = self.slots(np.arange(self.n_q))
        index = np.arange(len(self.lo))
        return Plan(self.n_k, direct, self.region_keys(index), regions, self.causal)

    def heaviest(self, data: Data, count: int) -> Array:
        """Return the regions of largest mass of each row, int64 (n_q, count), -1 for none."""
        chosen = np.full((self.n_q, count), -1, np.int64)
        for rows in self.chunks():
            _, regions = self.slots(rows)
            logits = slot_logits(data, rows, Ragged(np.zeros(len(rows) + 1, np.int64), EMPTY),
                                 regions)[1]  # fmt: skip
            owner = regions.owner
            order = np.lexsort((regions.items, -logits, owner))
            place = np.arange(len(order)) - regions.starts[owner]
            best = (place < count) & (logits[order] > -np.inf)
            chosen[rows[owner[best]], place[best]] = regions.items[order[best]]
        return chosen


def line_summaries(
    kept: Array, line: Array, site: Array, lines: int, sites: int
) -> tuple[Array, Array, Array, Array, Array]:
    """Return kept positions by line, then site; where each line starts and ends in that list.

    Also where each position would be in the list, and one past it if it is there.
    """
    items = kept[np.argsort(line[kept] * sites + site[kept], kind="stable")].astype(np.int64)
    order = line[items] * sites + site[items]
    bounds = np.searchsorted(order, np.arange(lines + 1) * sites)
    name = line * sites + site
    before, after = np.searchsorted(order, name), np.searchsorted(order, name + 1)
    return items, bounds[:-1], bounds[1:], before, after


def gather_layers(layout: Layout, layers: list[tuple[int, int]], z: Array, out: Array) -> None:
    """Add ``sum_t lam_t(j) z_t`` to ``out`` for layers of regions that share no key."""
    from ...kernels._threads import deal
    from ...kernels.partitioned import gather_values

    for first, last in layers:
        deal(
            gather_values, layout.lam, layout.lo, layout.hi, layout.at, layout.items, z, first,
            last, out, work=out.size,
        )  # fmt: skip


def weights_of(layout: Layout, data: Data, rows: Array) -> tuple[Any, Any, Array]:
    """Return the weights on direct keys and on regions of some rows, sparse, and log Zhat."""
    from scipy.sparse import csr_array

    direct, regions = layout.slots(rows)
    d_logits, r_logits, lse = slot_logits(data, rows, direct, regions)
    check_logits(lse)
    # Each row by its own largest logit and its own sum: a rounded log Zhat would not sum to one.
    owners = direct.owner, regions.owner
    high = np.full(len(rows), -np.inf, d_logits.dtype)
    for owner, logits in zip(owners, (d_logits, r_logits), strict=True):
        np.maximum.at(high, owner, logits)
    high[np.isneginf(high)] = 0
    weights = [np.exp2(x - high[o]) for o, x in zip(owners, (d_logits, r_logits), strict=True)]
    total = np.zeros(len(rows))
    for owner, w in zip(owners, weights, strict=True):
        total += np.bincount(owner, w, minlength=len(rows))
    total[total == 0] = 1
    made = []
    for w, owner, lists, width in zip(
        weights, owners, (direct, regions), (layout.n_k, len(layout.lo)), strict=True
    ):
        w = (w / total[owner]).astype(d_logits.dtype, copy=False)
        made.append(csr_array((w, lists.items, lists.starts), shape=(len(rows), width)))
    return made[0], made[1], lse


def logits_of(problem: Head, q0: Array) -> Array:
    """Return ``scale q0 . k_j``, float64 (n_k,), with the same bits for any number of threads."""
    out = np.empty(problem.n_k)
    step = 1 << 14
    row = problem.scale * q0
    for i in range(0, problem.n_k, step):
        out[i : i + step] = np.sum(problem.k[i : i + step] * row, axis=1, dtype=np.float64)
    return out
