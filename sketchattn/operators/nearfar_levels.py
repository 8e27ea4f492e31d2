"""Near keys exactly and far clusters by their moments, in two levels: for long heads.

A coarse cluster is a group of clusters, its children.  A row sees the coarse clusters of what is
far, refines those that its share asks for, and chooses near clusters among their children and
those that it sees directly; see ``nearfar.py`` for masses and values.  The moments of a coarse
cluster are merged from those of its children:

    M = sum m_c,  kappa_C = sum m_c kappa_c / M,
    Var_C = sum m_c (Var_c + (kappa_c - kappa_C)^2) / M,
    rho_C = max (|kappa_c - kappa_C| + rho_c),

all as of the keys themselves but the radius, which is an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.head import Head
from ..kernels._threads import PRODUCT, deal
from ..kernels.nearfar import values_of
from ..kernels.nearfar_levels import attend_levels, visit_levels
from ..kernels.softmax import LN2, LOG2E, WIDEST
from .base import AttentionOperator, Index, pick
from .nearfar import (
    LEAST,
    TILE,
    Clusters,
    Moments,
    NearFarAttention,
    Rows,
    Solved,
    cut_into_tiles,
    frozen_from,
    in_registers,
    items_of,
    kept_rows,
    over_all_keys,
)

Array = NDArray[Any]

# Rows of an item at most, and their share of all: lists of rows that chose the same cluster shrink
# with the number of these.  Rows that choose together.
MOST, SHARE, PART = 8192, 16, 512
# Sums of a transposed product that are kept apart, and their entries at most if more than two are.
SLABS, SLAB_ENTRIES = 8, 1 << 25


@dataclass(frozen=True)
class Groups:
    """Say which clusters form coarse ones.

    Attributes
    ----------
    labels : int array (R,)
        Coarse cluster of each cluster, -1 for none.
    count : int
        Number of coarse clusters, of which some may be empty.
    most : int
        Coarse clusters that a row may refine.
    """

    labels: Array
    count: int
    most: int


class Levels(NamedTuple):
    """Hold coarse clusters and their children, as kernels want them.

    See ``kernels/nearfar_levels.py``; ``counts (R2,)`` are the keys of each coarse cluster.
    """

    table: Array
    coarse: Array
    kids: Array
    first: Array
    wide: Array
    tables: Array
    place: Array
    counts: Array


def levels_of(m: Moments, groups: Groups, second_order: bool) -> Levels:
    """Return the tables of both levels; clusters without keys are nobody's children."""
    d, dtype, h = m.kappa.shape[0], m.kappa.dtype, len(m.z)
    sizes = np.diff(m.starts)
    r = len(sizes)
    parts = [m.kappa, m.half, m.rho[None], m.frozen[None], m.bits[None]]
    for a in range(h):
        parts += [m.p[a], m.bound[a : a + 1]]
    table = np.concatenate(parts)
    labels = np.where(sizes > 0, groups.labels, -1)
    kids = np.argsort(labels, kind="stable")[int(np.count_nonzero(labels < 0)) :]
    of_each = np.bincount(labels[kids], minlength=groups.count)
    first = np.concatenate([[0], np.cumsum(of_each)]).astype(np.int64)
    wide = np.concatenate([[0], np.cumsum(in_registers(of_each))]).astype(np.int64)
    place = np.full((2, r), -1, np.int64)
    place[0] = labels
    place[1, kids] = np.arange(len(kids)) - first[labels[kids]]
    coarse, counts = merged(m, sizes, kids, first, second_order)
    height = len(table)
    tables = np.zeros(int(wide[-1]) * height, dtype)
    for c, (low, high) in enumerate(zip(wide[:-1].tolist(), wide[1:].tolist(), strict=True)):
        block = tables[low * height : high * height].reshape(height, high - low)
        block[2 * d + 2] = -np.inf
        block[:, : of_each[c]] = table[:, kids[first[c] : first[c + 1]]]
    return Levels(table, coarse, kids, first, wide, tables, place, counts)


def merged(
    m: Moments, sizes: Array, kids: Array, first: Array, second_order: bool
) -> tuple[Array, Array]:
    """Return the table of coarse clusters, with the moments of all their keys, and their counts."""
    d, dtype, many = m.kappa.shape[0], m.kappa.dtype, len(first) - 1
    full = np.flatnonzero(np.diff(first))
    starts = first[full]
    weights = sizes[kids].astype(np.float64)
    kappa, half = (x[:, kids].astype(np.float64) for x in (m.kappa, m.half))
    counts = np.zeros(many)
    coarse = np.zeros((2 * d + 3, in_registers(many)))
    if len(full):
        counts[full] = np.add.reduceat(weights, starts)
        means = np.add.reduceat(weights * kappa, starts, axis=1) / counts[full]
        away = kappa - np.repeat(means, np.diff(first)[full], axis=1)
        spread = half + 0.5 * LN2 * away**2
        coarse[:d, full] = means
        coarse[d : 2 * d, full] = np.add.reduceat(weights * spread, starts, axis=1) / counts[full]
        reach = np.sqrt((away**2).sum(axis=0)) + m.rho[kids]
        coarse[2 * d, full] = np.maximum.reduceat(reach, starts)
    # Columns beyond the last are empty too.
    every = np.append(counts, np.zeros(coarse.shape[1] - many))
    coarse[2 * d + 1] = frozen_from(every if second_order else np.ones_like(every))
    with np.errstate(divide="ignore"):
        coarse[2 * d + 2] = np.log2(every)
    return coarse.astype(dtype), counts


def rows_in_levels(stops: Array, kind: Array, seen: Array, least: int = LEAST) -> Rows:
    """Return rows cut into tiles of one kind.

    Parameters
    ----------
    stops : int array (n_q,)
        Where own keys end; ascends.
    kind : int array (n_q,)
        Rows of ``seen``, which say what a row sees; equal ones stand together.
    seen : int array (K, 9)
        First and last + 1 own key (of the kind, where rows see all alike); first and last + 1
        cluster seen directly, first and last + 1 of them to skip; coarse clusters, first and last
        + 1 to skip.
    least : int
        Rows of an item at least.
    """
    n = len(stops)
    low, high = cut_into_tiles(np.diff(kind), n, TILE)
    tiles = np.zeros((len(low), 11), np.int64)
    tiles[:, 0], tiles[:, 1] = low, high
    tiles[:, 2:] = seen[kind[low]]
    tiles[:, 3] = stops[high - 1]
    size = min(max(n // SHARE, least), MOST)
    return Rows(stops.astype(np.int64), tiles, items_of(high, size))


class TwoLevelAttention(NearFarAttention):
    """Represent ``Ahat`` by clusters of keys, groups of them, and two choices of every row.

    Parameters
    ----------
    problem : AttentionProblem
    clusters : Clusters
    groups : Groups
    rows : Rows
        Of `rows_in_levels`.
    most : int
        Candidates of a row at most.
    tau : float
        What share times variance keeps a candidate, of both levels.
    chosen : (int32 array (n_q, groups.most), int32 array (n_q, most)), optional
        The choices of an operator in another precision.

    Attributes
    ----------
    refined : ndarray (n_q, groups.most), int32
        Coarse clusters that rows refine, then -1.
    near : ndarray (n_q, most), int32
        Clusters that rows read key by key, then -1.
    moments : Moments
    levels : Levels
    steep : ndarray or None
        Rows whose logits are too large for one normaliser in several products.

    Notes
    -----
    Transposed products form their rows one by one.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=256, d=4, rng=0)[0]
    >>> ahat = sa.NearFar(block=16, clusters=4, near=2, levels=2).approximate(problem)
    >>> ahat.refined.shape, bool(abs(ahat.row_sums() - 1).max() < 1e-6)
    ((256, 2), True)
    """

    def __init__(
        self,
        problem: Head,
        clusters: Clusters,
        groups: Groups,
        rows: Rows,
        most: int,
        tau: float,
        chosen: tuple[Array, Array] | None = None,
        room: int | None = None,
    ) -> None:
        AttentionOperator.__init__(self, (problem.n_q, problem.n_k), problem.dtype, None)
        self.problem, self.clusters, self.groups, self.layout = problem, clusters, groups, rows
        self.most, self.tau = most, tau
        self.kept = problem.kept_keys
        self.k = kept_rows(problem, problem.arrays.k)
        self.moments = clusters.moments(self.k)
        self.levels = levels_of(self.moments, groups, clusters.second_order)
        choose = chosen is None
        if chosen is None:
            chosen = _room(problem.n_q, groups.most), _room(problem.n_q, most)
        self.refined, self.near = chosen
        nothing = np.empty((len(self.k), 0), self.dtype)
        self._settle(self._solve(nothing, choose, room))

    def _solve(self, x: Array, choose: bool, room: int | None = None) -> Solved:
        return solve_levels(
            self.problem, self.k, x, self.moments, self.levels, self.layout, self.tau,
            (self.refined, self.near), choose, room,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of queries, keys, moments of both levels, layout and choices."""
        return super().nbytes + self.groups.labels.nbytes + sum(x.nbytes for x in self.levels)

    def reads(self, problem: Head) -> Array:
        """Return own keys, keys of near clusters, and clusters of both levels, of each row."""
        sizes, children = np.diff(self.moments.starts), np.diff(self.levels.first)
        fine, coarse = (np.concatenate([[0], np.cumsum(x > 0)]) for x in (sizes, children))
        t = self.layout.tiles
        far = fine[t[:, 5]] - fine[t[:, 4]] - (fine[t[:, 7]] - fine[t[:, 6]])
        far += coarse[t[:, 8]] - (coarse[t[:, 10]] - coarse[t[:, 9]])
        found = self._own() + far[self._tile_of]
        for chosen, members in ((self.near, sizes), (self.refined, children)):
            more = np.append(members - 1, 0)  # -1 is the last: nothing
            for column in chosen.T:
                found += more[column]
        return np.asarray(found, np.float64)

    def estimated_error(self, values: Array) -> float:
        """Return an estimate of ``|Ahat V - A V|_F / |A V|_F``: a diagnostic, never a bound.

        That of `NearFarAttention`, over the far clusters of both levels.
        """
        m, levels = self.moments, self.levels
        v = kept_rows(self.problem, np.asarray(values, np.float64))
        sizes = np.diff(m.starts)
        counts = np.maximum(sizes, 1)[:, None]
        running, square = np.zeros((2, len(sizes), v.shape[1]))
        for c, (low, high) in enumerate(zip(m.starts[:-1], m.starts[1:], strict=True)):
            part = v[m.members[low:high]]
            running[c] = part.sum(axis=0)
            square[c] = (part**2).sum(axis=0)
        spread = np.maximum(square / counts - (running / counts) ** 2, 0).sum(axis=1)
        total = np.maximum(levels.counts, 1)[:, None]
        both = [sums_of(x[levels.kids], levels.first) / total for x in (running, square)]
        coarse_spread = np.maximum(both[1] - both[0] ** 2, 0).sum(axis=1)
        squares = np.zeros(self.shape[0])
        self._visit(
            np.arange(self.shape[0]), spread=2 * LN2 * spread,
            coarse_spread=2 * LN2 * coarse_spread, squares=squares,
        )  # fmt: skip
        size = float(np.linalg.norm(self @ np.asarray(values, self.dtype)))
        return float(np.sqrt(squares.sum())) / size if size > 0 else 0.0

    def wide(self) -> AttentionOperator:
        """Return the operator in float64, with the same clusters and choices."""
        if self.dtype == np.float64:
            return self
        problem = self.problem.astype(np.float64)
        return TwoLevelAttention(
            problem, self.clusters, self.groups, self.layout, self.most, self.tau,
            (self.refined, self.near),
        )  # fmt: skip

    def _matmat(self, x: Array) -> Array:
        out = self._solve(kept_rows(self.problem, self._cast(x)), False).out
        return out if self.steep is None else self._by_rows(out, x)

    def _rmatmat(self, y: Array) -> Array:
        m, levels, n = self.moments, self.levels, len(self.kept)
        h, r, dtype = self.clusters.directions, self.clusters.count, self.dtype
        out = np.zeros((self.shape[1], y.shape[1]), dtype)
        sizes = np.maximum(np.diff(m.starts), 1).astype(dtype)[:, None]
        counts = np.maximum(levels.counts, 1).astype(dtype)[:, None]
        label = np.repeat(np.arange(r, dtype=np.int32), np.diff(m.starts))
        y = self._cast(y)
        for start in range(0, y.shape[1], WIDEST):
            part = np.require(y[:, start : start + WIDEST], requirements=["C", "W"])
            width = part.shape[1]
            slabs = SLABS if SLABS * n * width <= SLAB_ENTRIES else 2
            keys = np.zeros((slabs, n, width), dtype)
            fine = np.zeros((slabs, 1 + h, r, width), dtype)
            far = np.zeros((slabs, self.groups.count, width), dtype)
            self._visit(np.arange(self.shape[0]), y=part, keys=keys, fine=fine, far=far)
            found = keys[0]
            for slab in range(1, slabs):
                found += keys[slab]
            far_keys = fine.sum(axis=0) / sizes
            inside = levels.place[0] >= 0
            far_keys[0, inside] += (far.sum(axis=0) / counts)[levels.place[0, inside]]
            spread = far_keys[0][label]
            for a in range(h):
                spread += m.z[a][:, None] * far_keys[1 + a][label]
            found[m.members] += spread
            out[self.kept, start : start + width] = found
        return out

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        found = np.zeros((len(chosen), len(self.kept)), self.dtype)
        self._visit(chosen, dense=found)
        return over_all_keys(self.problem, found)

    def _visit(self, rows: Array, **asked: Array) -> None:
        """Form rows one by one for what is asked for; see `visit_levels`."""
        m, levels, dtype = self.moments, self.levels, self.dtype
        none2, none3 = np.zeros((0, 0), dtype), np.zeros((0, 0, 0), dtype)
        nothing = {
            "dense": none2, "y": none2, "keys": none3, "fine": np.zeros((0, 0, 0, 0), dtype),
            "far": none3, "spread": np.zeros(0), "coarse_spread": np.zeros(0),
            "squares": np.zeros(0),
        }  # fmt: skip
        given = {**nothing, **asked}
        deal(
            visit_levels, self.problem.arrays.q, self.k, rows.astype(np.int64), self._tile_of,
            self.layout.stops, self.layout.tiles, self._factor, m.kt, m.members, m.starts, m.wide,
            levels.table, levels.coarse, levels.kids, levels.first, levels.wide, levels.tables,
            levels.place, m.z, self.refined, self.near, *(given[name] for name in nothing),
            work=float(self.reads(self.problem)[rows].sum()) * self.k.shape[1] / 8,
        )  # fmt: skip


def _room(n: int, most: int) -> Array:
    return np.empty((n, most), np.int32)


def sums_of(x: Array, first: Array) -> Array:
    """Return sums of ranges of rows, which may be empty."""
    found = np.zeros((len(first) - 1, *x.shape[1:]), x.dtype)
    full = np.flatnonzero(np.diff(first))
    if len(full):
        found[full] = np.add.reduceat(x, first[full], axis=0)
    return found


def solve_levels(
    problem: Head,
    k: Array,
    x: Array,
    m: Moments,
    levels: Levels,
    rows: Rows,
    tau: float,
    chosen: tuple[Array, Array],
    choose: bool,
    room: int | None = None,
) -> Solved:
    """Return ``Ahat X`` with the clusters that rows choose, or with those of ``chosen``.

    ``k (N, d)`` and ``x (N, w)`` are rows of kept keys; ``chosen`` has the coarse clusters that
    rows refine and the clusters that they read, and is written if ``choose`` and if it has a row
    of each row: arrays without rows are not kept.
    """
    q, dtype, n_q, d = problem.arrays.q, problem.dtype, problem.n_q, k.shape[1]
    refined, near = chosen
    h, r, width = len(m.z), len(m.starts) - 1, x.shape[1]
    if choose and width > WIDEST and len(near) < n_q:
        refined, near = _room(n_q, refined.shape[1]), _room(n_q, near.shape[1])
    top, total = np.empty(n_q, dtype), np.empty(n_q, dtype)
    out = np.empty((n_q, width), dtype)
    limit = 60.0 if dtype == np.float32 else 500.0
    t = rows.tiles
    tall = (t[:, 1] - t[:, 0]).astype(np.float64)
    seen = float(tall @ (t[:, 3] - t[:, 2] + 2 * (t[:, 5] - t[:, 4] + t[:, 8])))
    seen += n_q * min(near.shape[1] * len(k) / max(r, 1), len(k))
    sizes, counts = np.diff(m.starts), np.maximum(levels.counts, 1)[:, None]
    for start in range(0, max(width, 1), WIDEST):
        part = x if width <= WIDEST else np.ascontiguousarray(x[:, start : start + WIDEST])
        piece = part.shape[1]
        ordered, vbar = np.empty((len(m.members), piece), dtype), np.empty((r, piece), dtype)
        beta = np.empty((h, r, piece), dtype)
        deal(values_of, part, m.members, m.starts, m.z, ordered, vbar, beta,
             work=len(m.members) * piece * (1 + h))  # fmt: skip
        vkids = vbar[levels.kids]
        sums = sums_of(vkids * sizes[levels.kids][:, None].astype(np.float64), levels.first)
        vcoarse = (sums / counts).astype(dtype)
        target = out if width <= WIDEST else np.empty((n_q, piece), dtype)
        deal(
            attend_levels, q, k, part, rows.stops, rows.tiles, rows.items,
            PART, float(problem.scale * LOG2E), m.kt, m.starts, m.wide,
            levels.table, levels.coarse, levels.kids, levels.first, levels.wide, levels.tables,
            levels.place, ordered, vbar, beta, vkids, np.ascontiguousarray(beta[:, levels.kids]),
            vcoarse, tau, len(k) if room is None else room, limit, choose,
            refined, near, top, total, target,
            work=seen * (0.5 + PRODUCT * (d + piece)),
        )  # fmt: skip
        choose = False
        if width > WIDEST:
            out[:, start : start + piece] = target
    return Solved(out, near, top, total)
