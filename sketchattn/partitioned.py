"""The operator of structured attention: direct keys and region summaries, and how regions merge.

A row of ``Ahat`` is ``exp(L_ij) / Zhat_i`` on its direct keys and ``rho_i(t) lam_t(j)`` on region
t, ``rho_i(t) = exp(g_i(t)) / Zhat_i``.  Four layouts compute its products: spans or labels that
all rows share, a dyadic tree, lines of a grid, and any explicit plan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .operators import AttentionOperator, Index, pick
from .partitions import Plan, Ragged
from .problem import AttentionProblem, check_logits

Array = NDArray[Any]

LOG2E = float(np.log2(np.e))
EMPTY = np.zeros(0, np.int64)
# Rows whose slots are listed at a time where no more than a few arrays of them may exist.
CHUNK_SLOTS = 1 << 22
# Keys whose queries, keys and values a cache holds.
CACHED_KEYS = 4096


# --- what a region is summarised by ---------------------------------------------------------------


class Reference(NamedTuple):
    """Say which query the local weights of a region are computed with.

    Attributes
    ----------
    kind : {"given", "mean", "max"}
        The rows of ``q0``; the mean or coordinate-wise maximum of the queries at the region's
        positions.
    q0 : float64 array (1, d) or (r, d), optional
    """

    kind: str
    q0: Array | None = None

    @property
    def shared(self) -> bool:
        """Whether all regions have the same reference query."""
        return self.q0 is not None and len(self.q0) == 1


class Rule(NamedTuple):
    """Name the rest of a summary: region key, bias, second-order term."""

    key: str = "expected"
    bias: str = "entropy"
    second_order: str = "none"


class Summaries(NamedTuple):
    """Hold what all regions are replaced by.

    Attributes
    ----------
    kappa : ndarray (r, d)
        Region keys.
    bias : float64 array (r,)
        ``g_i(t) = scale q_i . kappa_t + bias_t``, before a second-order term; -inf for a region
        without keys.
    entropy : float64 array (r,)
        H(lam_t).
    logit_keys : ndarray (r, d) or (r, 2 d)
        ``g_i(t) = scale f_i . logit_keys_t + logit_bias_t`` with ``f = q``, or q and its squares.
    logit_bias : ndarray (r,)
    variance : ndarray (r, d), optional
        Of the coordinates of k under lam, for the second-order term.
    """

    kappa: Array
    bias: Array
    entropy: Array
    logit_keys: Array
    logit_bias: Array
    variance: Array | None = None


class Record(NamedTuple):
    """Hold what merges exactly: sums over a key set with one reference query.

    With ``e_j = scale q0 . k_j``, ``M = max e_j`` and ``w_j = exp(e_j - M)``.  Axes in front are
    many sets at once.

    Attributes
    ----------
    top : float64 array (...)
        M, -inf for the empty set.
    weight : float64 array (...)
        ``sum w_j``.
    keys, values : float64 arrays (..., d), (..., m)
        ``sum w_j k_j`` and ``sum w_j x_j``.
    energy : float64 array (...)
        ``sum w_j (e_j - M)``.
    """

    top: Array
    weight: Array
    keys: Array
    values: Array
    energy: Array

    @classmethod
    def of(cls, e: Array, k: Array, x: Array) -> Record:
        """Return the record of one set from e (m,), k (m, d) and x (m, width)."""
        e, k, x = (np.asarray(y, np.float64) for y in (e, k, x))
        top = e.max(initial=-np.inf)
        w = np.exp(e - top) if len(e) else e
        energy = float(w @ (e - top)) if len(e) else 0.0
        return cls(np.asarray(top), np.asarray(w.sum()), w @ k, w @ x, np.asarray(energy))

    def merge(self, other: Record) -> Record:
        """Return the record of the union with a disjoint set of the same reference query."""
        top = np.maximum(self.top, other.top)
        parts = []
        for one in (self, other):
            some = one.weight > 0
            shift = np.where(some, one.top, 0) - np.where(some, top, 0)
            factor = np.where(some, np.exp(np.minimum(shift, 0)), 0)
            parts.append((one, factor, shift))
        return Record(
            top,
            sum((f * one.weight for one, f, _ in parts), np.zeros(())),
            sum((f[..., None] * one.keys for one, f, _ in parts), np.zeros(())),
            sum((f[..., None] * one.values for one, f, _ in parts), np.zeros(())),
            sum((f * (one.energy + s * one.weight) for one, f, s in parts), np.zeros(())),
        )

    def read(self, size: Array | int) -> tuple[Array, Array, Array]:
        """Return ``(kappa, xhat, H(lam))``; ``size`` is the number of keys of each set.

        ``H = ln W - E / W``: the equal form ``M + ln W - scale q0 . kappa`` loses digits where
        logits are large.
        """
        weight = np.where(self.weight > 0, self.weight, 1)
        kappa, xhat = self.keys / weight[..., None], self.values / weight[..., None]
        entropy = np.log(weight) - self.energy / weight
        return kappa, xhat, np.clip(entropy, 0.0, np.log(np.maximum(size, 1)))


# --- layouts --------------------------------------------------------------------------------------


class Data(NamedTuple):
    """What kernels need beside a layout: queries, keys, widened queries, summaries in bits."""

    q: Array
    k: Array
    f: Array
    keys: Array
    bits: Array
    scale: float


class _Near(NamedTuple):
    """Tiles of rows that share a region as direct keys; see `kernels.partitioned.near`."""

    order: Array
    first: Array
    last: Array
    region: Array
    groups: Array
    ends: Array
    skip: Array


def _near(region_of_row: Array, ends: Array = EMPTY, skip: Array = EMPTY) -> _Near:
    """Return the tiles of rows with the same region; rows of region -1 have none."""
    from .kernels.partitioned import ROW_TILE

    order = np.argsort(region_of_row, kind="stable")
    order = order[np.searchsorted(region_of_row[order], 0) :]
    names, starts = np.unique(region_of_row[order], return_index=True)
    stops = np.append(starts, len(order))[1:]
    tiles = -(-(stops - starts) // ROW_TILE)
    groups = np.concatenate([[0], np.cumsum(tiles)]).astype(np.int64)
    within = np.arange(groups[-1]) - np.repeat(groups[:-1], tiles)
    first = np.repeat(starts, tiles) + within * ROW_TILE
    last = np.minimum(first + ROW_TILE, np.repeat(stops, tiles))
    region = np.repeat(names, tiles).astype(np.int64)
    return _Near(order, first, last, region, groups, ends, skip)


class _Totals:
    """Hold what passes over slots leave for each row, and run them.

    ``top``, ``total`` and ``out`` are those of `kernels.partitioned`.
    """

    def __init__(self, n_q: int, width: int, dtype: Any) -> None:
        self.out = np.zeros((n_q, width), dtype)
        self.top = np.full(n_q, -np.inf, dtype)
        self.total = np.zeros(n_q, dtype)

    def fold(
        self, stage: _Near, q: Array, k: Array, x: Array, bias: Array, ranges: _Ranges, scale: float
    ) -> None:
        """Fold the slots of one stage into its rows."""
        from .kernels.partitioned import KEY_TILE, ROW_TILE, all_threads, near

        all_threads(
            near, q, k, x, bias, stage.order, stage.first, stage.last, stage.region, ranges.lo,
            ranges.hi, ranges.items, stage.ends, stage.skip, scale, ROW_TILE, KEY_TILE, None,
            self.top, self.total, self.out,
        )  # fmt: skip

    def finish(self) -> tuple[Array, Array]:
        """Divide, and return the product and log Zhat."""
        from .kernels.partitioned import ROW_TILE, all_threads, finish

        lse = np.empty(len(self.out), self.out.dtype)
        all_threads(finish, self.top, self.total, ROW_TILE, None, self.out, lse)
        return self.out, lse


class _Ranges(NamedTuple):
    """Ranges of slots: ``items[lo[t] : hi[t]]``, or positions themselves."""

    lo: Array
    hi: Array
    items: Array


def _fold_back(
    stage: _Near,
    q: Array,
    k: Array,
    y: Array,
    lse: Array,
    bias: Array,
    ranges: _Ranges,
    scale: float,
    out: Array,
) -> None:
    """Add what the rows of one stage give back to its slots."""
    from .kernels.partitioned import KEY_TILE, ROW_TILE, all_threads, near_transposed

    all_threads(
        near_transposed, q, k, y, lse, bias, stage.order, stage.first, stage.last, stage.groups,
        stage.region, ranges.lo, ranges.hi, ranges.items, stage.ends, stage.skip, scale,
        ROW_TILE, KEY_TILE, None, out,
    )  # fmt: skip


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
        # By where their keys are, which a cache then still holds for the next region.
        order = np.lexsort((-sizes, self.lo // CACHED_KEYS)).astype(np.int64)
        self.order = order[sizes[order] <= CACHED_KEYS]
        self.pieces = _pieces(self.lo, self.hi, self.at)
        self.nonempty = sizes > 0

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

    def summarize(self, problem: AttentionProblem, reference: Reference, rule: Rule) -> Summaries:
        """Compute the summaries of all regions, and keep the local weights."""
        from .kernels.partitioned import GIVEN, KEYS, MAXIMUM, MEAN, all_threads, summarize

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
        all_threads(
            summarize, k, q, q0, kind, KEYS[rule.key], self.lo, self.hi, self.at, self.items,
            self.order, max(int(sizes[self.order].max(initial=0)), 1), problem.scale, None,
            squares, lam, kappa, entropy, variance, log_weight,
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
        problem: AttentionProblem,
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
        from .kernels.partitioned import GIVEN, KEYS, all_threads, summarize

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
            all_threads(
                summarize, k, q, q0, GIVEN, KEYS[key], p.lo, p.hi, p.at, self.items, p.order,
                CACHED_KEYS, problem.scale, None, squares, lam, part_kappa, part_entropy,
                part_variance, log_weight,
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

    def _large_references(self, problem: AttentionProblem, reference: Reference) -> Array:
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

    def reference_queries(self, problem: AttentionProblem, reference: Reference) -> Array:
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
        from .kernels.partitioned import all_threads, spread_values

        out = np.empty((len(self.lo), x.shape[1]), x.dtype)
        all_threads(
            spread_values, self.lam, self.lo, self.hi, self.at, self.items, x, self.order, None, out
        )
        if self.pieces is not None:
            p = self.pieces
            parts = np.empty((len(p.lo), x.shape[1]), x.dtype)
            all_threads(
                spread_values, self.lam, p.lo, p.hi, p.at, self.items, x, p.order, None, parts
            )
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


def slot_logits(
    data: Data, rows: Array, direct: Ragged, regions: Ragged
) -> tuple[Array, Array, Array]:
    """Return the base-2 logits of direct keys and of regions of rows (s,), and log Zhat (s,)."""
    from .kernels.partitioned import ROW_TILE, all_threads
    from .kernels.partitioned import slot_logits as compute

    dtype = data.q.dtype
    d_out, r_out = np.empty(len(direct.items), dtype), np.empty(len(regions.items), dtype)
    lse = np.empty(len(rows), dtype)
    all_threads(
        compute, data.q, data.k, data.f, data.keys, data.bits, rows.astype(np.int64),
        direct.starts, direct.items, regions.starts, regions.items, data.scale, ROW_TILE, None,
        d_out, r_out, lse,
    )  # fmt: skip
    return d_out, r_out, lse


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
        self.near: tuple[_Near, ...] = ()
        self._own = own
        if own is not None:
            if causal:
                seen = np.arange(1, n_q + 1)
                ends = np.searchsorted(kept, seen) if len(kept) < n_q else seen
                self.near = (_near(own, ends.astype(np.int64)),)
                self.limit = own.astype(np.int64)
            else:
                self.near = (_near(own),)
                self.skip = np.ascontiguousarray(own[:, None].astype(np.int64))

    def promoted(self, chosen: Array) -> Shared:
        """Return this layout with the regions ``chosen`` (n_q, t) direct, -1 for none."""
        import copy

        twin = copy.copy(self)
        twin.skip = np.ascontiguousarray(np.concatenate([self.skip, chosen], axis=1))
        twin.near = (*self.near, *(_near(column) for column in chosen.T))
        return twin

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
        from .kernels.partitioned import KEY_TILE, ROW_TILE, all_threads, far

        sums = _Totals(self.n_q, x.shape[1], data.q.dtype)
        ranges = _Ranges(self.lo, self.hi, self.items)
        for stage in self.near:
            sums.fold(stage, data.q, data.k, x, data.bits[:0], ranges, data.scale)
        all_threads(
            far, data.f, data.keys, data.bits, xhat, self.limit, self.skip, data.scale,
            ROW_TILE, KEY_TILE, None, sums.top, sums.total, sums.out,
        )  # fmt: skip
        return sums.finish()

    def transposed(
        self, data: Data, y: Array, lse: Array, *, only_far: bool = False
    ) -> tuple[Array, Array]:
        """Return the two parts of ``Ahat^T Y``."""
        from .kernels.partitioned import ROW_TILE, all_threads, far_transposed

        z = np.empty((self.count, y.shape[1]), y.dtype)
        all_threads(
            far_transposed, data.f, data.keys, data.bits, y, lse, self.limit, self.skip,
            data.scale, ROW_TILE, ROW_TILE, None, z,
        )  # fmt: skip
        out = np.zeros((self.n_k, y.shape[1]), y.dtype)
        ranges = _Ranges(self.lo, self.hi, self.items)
        for stage in () if only_far else self.near:
            _fold_back(stage, data.q, data.k, y, lse, data.bits[:0], ranges, data.scale, out)
        return out, z

    def gather(self, z: Array, out: Array) -> None:
        """Add ``sum_t lam_t(j) z_t`` to ``out``: each key is in one region."""
        _gather_layers(self, [(0, len(self.lo))], z, out)

    def heaviest(self, data: Data, count: int) -> Array:
        """Return the regions of largest mass of each row, int64 (n_q, count), -1 for none."""
        from .kernels._threads import map_pieces

        count_all = self.count
        take = min(count, count_all)

        def work(rows: slice) -> Array:
            g = data.scale * LOG2E * (data.f[rows] @ data.keys.T) + data.bits
            if len(self.limit):
                g[np.arange(count_all) >= self.limit[rows][:, None]] = -np.inf
            place = np.arange(len(g))
            for column in self.skip[rows].T:
                g[place[column >= 0], column[column >= 0]] = -np.inf
            best = np.empty((len(g), take), np.int64)
            for z in range(take):
                t = g.argmax(axis=1)
                best[:, z] = np.where(g[place, t] > -np.inf, t, -1)
                g[place, t] = -np.inf
            return best

        step = max(64, (1 << 20) // max(count_all, 1))
        pieces = [slice(i, min(i + step, self.n_q)) for i in range(0, self.n_q, step)]
        chosen = np.full((self.n_q, count), -1, np.int64)
        for piece, best in zip(pieces, map_pieces(work, pieces), strict=True):
            chosen[piece, :take] = best
        return chosen


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
        self.mask = np.empty(0, bool) if mask is None else np.ascontiguousarray(mask)
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
        self.near: _Near | None = None
        if self.lowest:
            first, seen = np.arange(0, n, leaf), np.arange(1, n + 1)
            low, high = first, np.minimum(first + leaf, n)
            if mask is not None:
                low, high, seen = (np.searchsorted(kept, x) for x in (low, high, seen))
            self.leaves = _Ranges(low, high, self.items)
            self.near = _near(np.arange(n) >> self.lowest, seen if causal else EMPTY)

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

    def summarize(self, problem: AttentionProblem, reference: Reference, rule: Rule) -> Summaries:
        """Compute the summaries of all regions: merged up the tree where that is possible."""
        self._logits = None
        if not self.tree:
            return super().summarize(problem, reference, rule)
        assert reference.q0 is not None
        dtype, n = problem.dtype, self.n_k
        total = len(self.lo)
        with np.errstate(over="ignore", invalid="ignore"):
            e = _logits_of(problem, reference.q0[0])
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
        from .kernels.partitioned import all_threads, tree_leaves, tree_level

        out = np.empty((len(self.lo), x.shape[1]), x.dtype)
        left = self._left.astype(x.dtype, copy=False)
        if self.layers:
            all_threads(tree_leaves, x, left, self.layers[0][1], len(x), None, out)
        for first, count, below, children in self._levels():
            all_threads(tree_level, out, left, first, below, count, children, None)
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
        from .kernels.partitioned import ROW_TILE, all_threads, dyadic

        sums = _Totals(self.n_q, x.shape[1], data.q.dtype)
        if self.near is not None:
            sums.fold(self.near, data.q, data.k, x, data.bits[:0], self.leaves, data.scale)
        lse = np.empty(self.n_q, data.q.dtype)
        all_threads(
            dyadic, data.q, data.k, x, data.f, data.keys, data.bits, xhat, self.offsets,
            self.lowest, self.half, self.causal, self.mask, data.scale, ROW_TILE, None,
            sums.top, sums.total, sums.out, lse,
        )  # fmt: skip
        return sums.out, lse

    def transposed(
        self, data: Data, y: Array, lse: Array, *, only_far: bool = False
    ) -> tuple[Array, Array]:
        """Return the two parts of ``Ahat^T Y``."""
        from .kernels.partitioned import (
            ROW_TILE,
            all_threads,
            dyadic_transposed,
            neighbours_transposed,
        )

        z = np.empty((len(self.lo), y.shape[1]), y.dtype)
        all_threads(
            dyadic_transposed, data.f, data.keys, data.bits, y, lse, self.level, self.block,
            data.scale, None, z,
        )  # fmt: skip
        out = np.zeros((self.n_k, y.shape[1]), y.dtype)
        if only_far:
            return out, z
        if self.near is not None:
            bias = data.bits[:0]
            _fold_back(self.near, data.q, data.k, y, lse, bias, self.leaves, data.scale, out)
        else:
            all_threads(
                neighbours_transposed, data.q, data.k, y, lse, self.causal, self.mask, data.scale,
                ROW_TILE, None, out,
            )  # fmt: skip
        return out, z

    def gather(self, z: Array, out: Array) -> None:
        """Add ``sum_t lam_t(j) z_t`` to ``out``, level by level."""
        _gather_layers(self, self.layers, z, out)


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
        self.row_range = _Ranges(bounds[0], bounds[1], EMPTY if mask is None else kept)
        seen = np.searchsorted(kept, position + 1) if causal else EMPTY
        by_row = _near(row, seen)
        down, low, high, before, after = _lines(kept, column, row, m, rows)
        self.column_range = _Ranges(low, high, down)
        place = np.where(after > before, before, -1)
        by_column = _near(column, before, EMPTY) if causal else _near(column, EMPTY, place)
        self.near = (by_row, by_column)
        self.ranges = (self.row_range, self.column_range)

        # Lines and places, and the slots of every pair of both.
        line, site = (column, row) if vertical else (row, column)
        self.lines, sites = (m, rows) if vertical else (rows, m)
        items, low, high, _, _ = _lines(kept, line, site, self.lines, sites)
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
            self.far_range.append(_Ranges(first, first + self.lines, EMPTY))
            slot = z * group + own
            # Causal rows see the lines above their own, if lines are rows.
            upper = causal and not vertical
            self.far.append(_near(site, slot, EMPTY) if upper else _near(site, EMPTY, slot))
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

    def summarize(self, problem: AttentionProblem, reference: Reference, rule: Rule) -> Summaries:
        """Compute the summaries of all regions: merged along the lines where that is possible."""
        self._logits = None
        if not self.merged:
            return super().summarize(problem, reference, rule)
        assert reference.q0 is not None
        self._logits = _logits_of(problem, reference.q0[0])
        self._lam = None
        kappa, self._log_weight, entropy = self._along(problem.arrays.k)
        entropy = np.minimum(entropy, np.log(np.maximum(self.sizes, 1)))
        bias = self._bias(entropy, rule)
        return Summaries(kappa, bias, entropy, kappa, bias.astype(problem.dtype))

    def _along(self, x: Array) -> tuple[Array, Array, Array]:
        """Return the weighted means of x over all regions, their log weights and entropies."""
        from .kernels.partitioned import all_threads, line_means

        items, low, high, cut, past = self.scan
        out = np.empty((len(self.lo), x.shape[1]), x.dtype)
        log_weight, entropy = np.empty(len(self.lo)), np.empty(len(self.lo))
        size = len(cut)
        for z, mode in enumerate(self.modes):
            part = slice(z * size, (z + 1) * size)
            all_threads(
                line_means, x, self._logits, items, low, high, cut, past, size // self.lines,
                mode, None, out[part], log_weight[part], entropy[part],
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
        sums = _Totals(self.n_q, x.shape[1], data.q.dtype)
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
                _fold_back(stage, data.q, data.k, y, lse, none, ranges, scale, out)
        for stage, ranges in zip(self.far, self.far_range, strict=True):
            _fold_back(stage, data.f, data.keys, y, lse, data.bits, ranges, scale, z)
        return out, z

    def gather(self, z: Array, out: Array) -> None:
        """Add ``sum_t lam_t(j) z_t`` to ``out``, place by place."""
        _gather_layers(self, self.layers, z, out)


def _lines(
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


def _gather_layers(layout: Layout, layers: list[tuple[int, int]], z: Array, out: Array) -> None:
    """Add ``sum_t lam_t(j) z_t`` to ``out`` for layers of regions that share no key."""
    from .kernels.partitioned import all_threads, gather_values

    for first, last in layers:
        all_threads(
            gather_values, layout.lam, layout.lo, layout.hi, layout.at, layout.items, z, first,
            last, None, out,
        )  # fmt: skip


class Explicit(Layout):
    """Any plan, by its lists: as large in memory as there are slots."""

    def __init__(self, plan: Plan) -> None:
        self.n_q, self.n_k, self.causal = plan.n_q, plan.n_k, plan.causal
        self._plan = plan
        starts = plan.regions.starts
        self._regions(starts[:-1], starts[1:], plan.regions.items)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held."""
        plan = self._plan
        return super().nbytes + plan.direct.nbytes + plan.regions.nbytes + plan.row_regions.nbytes

    @property
    def count_direct(self) -> bool:
        """Whether some row has direct keys."""
        return len(self._plan.direct.items) > 0

    @property
    def slot_bound(self) -> int:
        """A bound of the slots of one row."""
        sizes = self._plan.direct.sizes + self._plan.row_regions.sizes
        return int(sizes.max(initial=1))

    def plan(self) -> Plan:
        """Return the plan."""
        return self._plan

    def slots(self, rows: Array) -> tuple[Ragged, Ragged]:
        """Return the direct keys and the regions of some rows."""
        return self._plan.direct.take(rows), self._plan.row_regions.take(rows)

    def solve(self, data: Data, x: Array, xhat: Array) -> tuple[Array, Array]:
        """Return ``Ahat X`` and log Zhat."""
        out = np.zeros((self.n_q, x.shape[1]), data.q.dtype)
        lse = np.empty(self.n_q, data.q.dtype)
        for rows in self.chunks():
            mine, theirs, lse[rows] = weights_of(self, data, rows)
            if x.shape[1]:
                out[rows] = mine @ x + theirs @ xhat
        return out, lse

    def transposed(
        self, data: Data, y: Array, lse: Array, *, only_far: bool = False
    ) -> tuple[Array, Array]:
        """Return the two parts of ``Ahat^T Y``."""
        out = np.zeros((self.n_k, y.shape[1]), y.dtype)
        z = np.zeros((len(self.lo), y.shape[1]), y.dtype)
        for rows in self.chunks():
            mine, theirs, _ = weights_of(self, data, rows)
            z += theirs.T @ y[rows]
            if not only_far:
                out += mine.T @ y[rows]
        return out, z

    def gather(self, z: Array, out: Array) -> None:
        """Add ``sum_t lam_t(j) z_t`` to ``out``."""
        out += self.local_weights(np.arange(len(self.lo))).T @ z


def weights_of(layout: Layout, data: Data, rows: Array) -> tuple[Any, Any, Array]:
    """Return the weights on direct keys and on regions of some rows, sparse, and log Zhat."""
    from scipy.sparse import csr_array

    direct, regions = layout.slots(rows)
    d_logits, r_logits, lse = slot_logits(data, rows, direct, regions)
    check_logits(lse)
    shift = np.where(np.isfinite(lse), lse, 0) * data.q.dtype.type(LOG2E)
    made = []
    for logits, lists, width in (
        (d_logits, direct, layout.n_k),
        (r_logits, regions, len(layout.lo)),
    ):
        weights = np.exp2(logits - np.repeat(shift, lists.sizes))
        made.append(csr_array((weights, lists.items, lists.starts), shape=(len(rows), width)))
    return made[0], made[1], lse


def _logits_of(problem: AttentionProblem, q0: Array) -> Array:
    """Return ``scale q0 . k_j``, float64 (n_k,), with the same bits for any number of threads."""
    out = np.empty(problem.n_k)
    step = 1 << 14
    row = problem.scale * q0
    for i in range(0, problem.n_k, step):
        out[i : i + step] = np.sum(problem.k[i : i + step] * row, axis=1, dtype=np.float64)
    return out


# --- the operator ---------------------------------------------------------------------------------


class PartitionedAttention(AttentionOperator):
    """Represent ``Ahat`` by direct keys and shared region summaries under one softmax.

    ``Ahat_ij = exp(L_ij) / Zhat_i`` for direct keys j of row i, and ``rho_i(t) lam_t(j)`` for j in
    a region t of the row, ``rho_i(t) = exp(g_i(t)) / Zhat_i``,
    ``Zhat_i = sum_j exp(L_ij) + sum_t exp(g_i(t))``, ``g_i(t) = scale q_i . kappa_t + b_t``.

    Parameters
    ----------
    problem : AttentionProblem
    layout : Plan or Layout
        Which keys are direct and which regions a row has.  Keys that the problem masks must not
        be in it: see `Plan.keep`.
    reference : Reference or array (d,) or (r, d), optional
        Reference queries of the regions; zeros by default.
    rule : Rule
        Region key, bias and second-order term.
    effective_rank : int, optional
    lower_bound, bilinear, causal_safe : bool, optional
        What is known of the choices; see the attributes.
    remake : callable, optional
        Returns the same operator in float64.

    Attributes
    ----------
    summaries : Summaries
        Region keys, biases, entropies.
    reference : Reference
    lower_bound : bool
        ``Zhat_i <= Z_i``, and ``KL(Ahat_i || A_i) = log Z_i - log Zhat_i``.
    bilinear : bool
        The log-ratio error is ``scale (q_i - q0_t) . (kappa_t - k_j)``.
    causal_safe : bool
        No row depends on later positions.

    Notes
    -----
    Weights are recomputed in every product: nothing of the size of the slots is held, except for
    explicit plans.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> from sketchattn.partitions import make_plan
    >>> problem = sa.make_heads("gaussian", n=12, d=4, rng=0)[0]
    >>> ahat = sa.PartitionedAttention(problem, make_plan("fixed", 12, block=4))
    >>> ahat.summaries.kappa.shape, bool(abs(ahat.row_sums() - 1).max() < 1e-6)
    ((3, 4), True)
    >>> bool((ahat.log_normalizer <= problem.logsumexp + 1e-5).all())
    True
    """

    def __init__(
        self,
        problem: AttentionProblem,
        layout: Plan | Layout,
        reference: Reference | Array | None = None,
        rule: Rule = Rule(),  # noqa: B008  (a tuple: immutable)
        effective_rank: int | None = None,
        *,
        lower_bound: bool | None = None,
        bilinear: bool | None = None,
        causal_safe: bool | None = None,
        remake: Callable[[], AttentionOperator] | None = None,
    ) -> None:
        super().__init__((problem.n_q, problem.n_k), problem.dtype, effective_rank)
        self.layout = Explicit(layout) if isinstance(layout, Plan) else layout
        if reference is None:
            reference = np.zeros(problem.d)
        if not isinstance(reference, Reference):
            reference = Reference("given", np.atleast_2d(np.asarray(reference, np.float64)))
        if reference.q0 is not None and reference.q0.shape not in (
            (1, problem.d),
            (len(self.layout.lo), problem.d),
        ):
            raise ValueError(
                f"reference must have shape (d,) = ({problem.d},) or (r, d) = "
                f"({len(self.layout.lo)}, {problem.d}), got {reference.q0.shape}; give one query "
                f"for each region"
            )
        self.problem, self.reference, self.rule = problem, reference, rule
        self.layout.dtype = problem.dtype
        self.summaries = self.layout.summarize(problem, reference, rule)
        exact_rule = is_variational(reference, rule)
        self.lower_bound = exact_rule if lower_bound is None else lower_bound
        self.bilinear = exact_rule if bilinear is None else bilinear
        self.causal_safe = (
            reference.kind != "given" or not np.any(reference.q0)
            if causal_safe is None
            else causal_safe
        )
        self._remake = remake
        self._lse: Array | None = None

    # --- what it is made of ---------------------------------------------------------------------

    @property
    def data(self) -> Data:
        """What kernels need."""
        q, k, _ = self.problem.arrays
        s = self.summaries
        wide = s.logit_keys.shape[1] > q.shape[1]
        f = np.concatenate([q, q * q], axis=1) if wide else q
        bits = s.logit_bias * self.problem.dtype.type(LOG2E)
        return Data(q, k, f, s.logit_keys, bits, self.problem.scale)

    @property
    def plan(self) -> Plan:
        """The plan with explicit lists, which are as large as there are slots.

        Region t is that of all other arrays; some may have no key, or no row that uses them.
        """
        return self.layout.plan()

    @property
    def q0(self) -> Array:
        """Reference query of each region, float64 (r, d)."""
        return self.layout.reference_queries(self.problem, self.reference)

    @property
    def local_weights(self) -> Any:
        """The local weights lam_t(j) as a sparse matrix (r, n_k)."""
        return self.layout.local_weights(np.arange(len(self.layout.lo)))

    @property
    def log_normalizer(self) -> Array:
        """Natural logarithm of ``Zhat_i`` (n_q,), -inf for a row without keys."""
        if self._lse is None:
            none = np.empty((self.shape[1], 0), self.dtype)
            regions = np.empty((len(self.layout.lo), 0), self.dtype)
            self._lse = self.layout.solve(self.data, none, regions)[1]
            check_logits(self._lse)
        return self._lse

    @property
    def direct_mass(self) -> Array:
        """What each row puts on its direct keys, (n_q,)."""
        return self._mass(1, 0)

    @property
    def far_mass(self) -> Array:
        """What each row puts on its regions, (n_q,)."""
        return self._mass(0, 1)

    def _mass(self, direct: int, far: int) -> Array:
        x = np.full((self.shape[1], 1), direct, self.dtype)
        xhat = np.full((len(self.layout.lo), 1), far, self.dtype)
        return self.layout.solve(self.data, x, xhat)[0][:, 0]

    def region_masses(self, index: Index | None = None) -> Any:
        """Return ``rho_i(t)`` of chosen rows (all by default), sparse (len(index), r)."""
        rows = pick(self.shape[0], slice(None) if index is None else index)
        return weights_of(self.layout, self.data, rows)[1]

    def region_values(self, x: Array) -> Array:
        """Return ``xhat_t = sum_j lam_t(j) x_j`` (r, m) of x (n_k, m)."""
        return self.layout.spread(self._cast(x))

    @property
    def rank_bound(self) -> int:
        """The number of regions where no key is direct, else the smaller dimension."""
        if self.layout.count_direct:
            return min(self.shape)
        return min(*self.shape, int(self.layout.nonempty.sum()))

    @property
    def nbytes(self) -> int:
        """Bytes of queries, keys, summaries and plan."""
        held = self.layout.nbytes + self.problem.q.nbytes + self.problem.k.nbytes
        s = self.summaries
        own = [s.kappa, s.bias, s.entropy, s.logit_bias]
        own += [] if s.logit_keys is s.kappa else [s.logit_keys]
        own += [] if s.variance is None else [s.variance]
        return held + sum(x.nbytes for x in own)

    def wide(self) -> AttentionOperator:
        """Return the operator of the same plan in float64."""
        if self.dtype == np.float64 or self._remake is None:
            return self
        return self._remake()

    # --- products -------------------------------------------------------------------------------

    def _matmat(self, x: Array) -> Array:
        x = self._cast(x)
        if self.problem.key_mask is not None:
            x = np.where(self.problem.key_mask[:, None], x, self.dtype.type(0))
        out, self._lse = self.layout.solve(self.data, x, self.layout.spread(x))
        check_logits(self._lse)
        return out

    def _rmatmat(self, y: Array) -> Array:
        out, z = self.layout.transposed(self.data, self._cast(y), self.log_normalizer)
        self.layout.gather(z, out)
        return out

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        out = np.zeros((len(chosen), self.shape[1]), self.dtype)
        step = max(1, CHUNK_SLOTS // max(self.layout.slot_bound, 1))
        for start in range(0, len(chosen), step):
            part = slice(start, start + step)
            mine, theirs, _ = weights_of(self.layout, self.data, chosen[part])
            used, where = np.unique(theirs.indices, return_inverse=True)
            theirs = type(theirs)(
                (theirs.data, where.reshape(-1), theirs.indptr), shape=(theirs.shape[0], len(used))
            )
            out[part] = (mine + theirs @ self.layout.local_weights(used)).toarray()
        return out

    def columns(self, index: Index) -> Array:
        """Return chosen columns as a dense array (n_q, len(index))."""
        chosen = pick(self.shape[1], index)
        unit = np.zeros((self.shape[1], len(chosen)), self.dtype)
        unit[chosen, np.arange(len(chosen))] = 1
        return self._matmat(unit)

    def far_sums(self, y: Array, rows: Array | None = None) -> Array:
        """Return ``sum_i rho_i(t) y_i`` (r, m) over all rows, or over some; y (n_q, m)."""
        if rows is not None:
            return np.asarray(self.region_masses(rows).T @ y[rows])
        given = self._cast(y)
        return self.layout.transposed(self.data, given, self.log_normalizer, only_far=True)[1]


def is_variational(reference: Reference, rule: Rule) -> bool:
    """Say whether region logits are Gibbs lower bounds: expected key and entropy of one lam."""
    if rule.second_order != "none":
        return False
    if rule.key == "expected" and rule.bias == "entropy":
        return True
    uniform = reference.kind == "given" and not np.any(reference.q0)
    return uniform and rule.key in ("expected", "mean") and rule.bias in ("entropy", "log_count")


class MixtureAttention(AttentionOperator):
    """Represent a weighted average of matrices: ``Ahat = sum_c w_c Ahat^(c)``.

    Parameters
    ----------
    parts : sequence of AttentionOperator
        Of one shape and precision.
    weights : array (number of parts,)
        Non-negative, with sum 1.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> from sketchattn.operators import DenseAttention
    >>> mix = MixtureAttention([DenseAttention(np.eye(2)), DenseAttention(np.ones((2, 2)) / 2)],
    ...                        np.array([0.5, 0.5]))
    >>> mix.to_dense().tolist()
    [[0.75, 0.25], [0.25, 0.75]]
    """

    # A mixture keeps neither identity of its components.
    lower_bound = bilinear = False

    def __init__(
        self,
        parts: Sequence[AttentionOperator],
        weights: Array,
        effective_rank: int | None = None,
    ) -> None:
        super().__init__(parts[0].shape, parts[0].dtype, effective_rank)
        self.parts = tuple(parts)
        self.weights = np.asarray(weights, self.dtype)
        self.causal_safe = all(bool(getattr(part, "causal_safe", False)) for part in parts)

    def _sum(self, products: list[Array]) -> Array:
        out = self.weights[0] * products[0]
        for w, x in zip(self.weights[1:], products[1:], strict=True):
            out += w * x
        return np.asarray(out)

    def _matmat(self, x: Array) -> Array:
        return self._sum([part @ x for part in self.parts])

    def _rmatmat(self, y: Array) -> Array:
        return self._sum([part.T @ y for part in self.parts])

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        return self._sum([part.rows(index) for part in self.parts])

    @property
    def rank_bound(self) -> int:
        """The sum of the bounds, at most the smaller dimension."""
        return int(min(*self.shape, sum(part.rank_bound for part in self.parts)))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def wide(self) -> AttentionOperator:
        """Return the average of the parts in float64."""
        if self.dtype == np.float64:
            return self
        parts = [part.wide() for part in self.parts]
        return MixtureAttention(parts, self.weights.astype(np.float64), self.effective_rank)
