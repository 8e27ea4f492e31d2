"""Near keys exactly, far clusters by their moments, each row with a choice of its own.

With clusters c of the keys a row is ``Ahat_ij = exp(L_ij) / Zhat_i`` on its own keys and on the
clusters that it reads key by key, and ``exp(g_ic) / Zhat_i (1 + y_ic z_j) / m_c`` on all others:

    g_ic = ln m_c + scale q_i . kappa_c + phi(sigma_ic, m_c),
    sigma_ic^2 = scale^2 sum_t q_it^2 Var_c(k_t),
    y_ic = clip(scale q_i . p_c, -1/max|z|, 1/max|z|).

``phi`` is ``sigma^2/2`` up to ``sigma = s_m``, the expected maximum of m normal numbers, and goes
on as the tangent there; it is at most ``|scale q_i|`` times the radius of the cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.head import Head
from ..kernels._jit import LANES
from ..kernels._threads import PRODUCT, deal, product
from ..kernels.nearfar import attend, attend_transposed, dense_rows, moments, values_of
from ..kernels.softmax import LN2, LOG2E, WIDEST
from .base import AttentionOperator, Index, pick
from .steep import steep_rows

Array = NDArray[Any]

# Rows of a tile, and of an item at least and at most: rows of an item that chose the same cluster
# are multiplied together.
TILE, LEAST, MOST = 128, 128, 1024
# Sums of a transposed product that are kept apart, for as many threads.
SLABS = 8
# Entries of whole rows that are held at a time.
ENTRIES = 1 << 22


class Rows(NamedTuple):
    """Say what every row sees of N kept keys and R clusters.

    Attributes
    ----------
    stops : int64 array (n_q,)
        Its own keys end there.
    tiles : int64 array (T, 7)
        First row, last + 1, first own key, last + 1, clusters, first and last + 1 cluster to skip.
    items : int64 array
        Where items begin among the tiles, and their number.
    """

    stops: Array
    tiles: Array
    items: Array

    def some(self, index: Array) -> Rows:
        """Return chosen rows, ascending, as if there were no others."""
        tile = self.tiles[np.searchsorted(self.tiles[:, 1], index, side="right")]
        own = tile[:, 2]
        stops = np.where(tile[:, 3] > own, self.stops[index], own)
        return rows_in_tiles(stops, own, tile[:, 4], tile[:, 5:])

    def reads(self, near: Array, starts: Array) -> tuple[Array, Array, Array]:
        """Return own keys, clusters and near keys of each row that chose clusters."""
        tile = np.repeat(self.tiles, self.tiles[:, 1] - self.tiles[:, 0], axis=0)
        own = np.where(tile[:, 3] > tile[:, 2], self.stops - tile[:, 2], 0)
        sizes = np.append(np.diff(starts), 0)  # -1 is the last: nothing
        return own, tile[:, 4] - (tile[:, 6] - tile[:, 5]), sizes[near].sum(axis=1)


class Moments(NamedTuple):
    """Hold the moments of R clusters, as kernels want them; see ``kernels/nearfar.py``."""

    members: Array
    starts: Array
    wide: Array
    kt: Array
    kappa: Array
    half: Array
    rho: Array
    frozen: Array
    bits: Array
    z: Array
    p: Array
    bound: Array


@dataclass(frozen=True)
class Clusters:
    """Say which kept keys form clusters, and what is kept of these.

    Attributes
    ----------
    labels : int array (N,)
        Cluster of each kept key, -1 for none.
    count : int
        Number R of clusters, of which some may be empty.
    root : array (d, d) or None
        Directions are those of ``K root``; None: of K.
    directions : int
        Of the first-order correction.
    second_order : bool
        Whether phi is used; without it every g is a lower bound.
    """

    labels: Array
    count: int
    root: Array | None
    directions: int
    second_order: bool

    def moments(self, k: Array) -> Moments:
        """Return the moments of kept keys (N, d), in their precision."""
        r, d, h, dtype = self.count, k.shape[1], self.directions, k.dtype
        # Narrow labels are sorted in one pass.
        narrow: Array = self.labels.astype(np.int16 if r < 1 << 15 else np.int64)
        unlabelled = int(np.count_nonzero(narrow < 0))
        members = np.argsort(narrow, kind="stable")[unlabelled:]
        sizes = np.bincount(self.labels[members], minlength=r)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        x = k if self.root is None or h == 0 else product(k, self.root.astype(dtype))
        n, columns = len(members), in_registers(r)
        wide = np.concatenate([[0], np.cumsum(in_registers(sizes))]).astype(np.int64)
        kt = np.zeros(int(wide[-1]) * (d + 1), dtype)
        kappa, half = np.zeros((d, columns), dtype), np.zeros((d, columns), dtype)
        rho, bound = np.zeros(columns, dtype), np.zeros((h, columns), dtype)
        z, p = np.empty((h, n), dtype), np.zeros((h, d, columns), dtype)
        work = n * d * (3 + 12 * h)
        deal(moments, k, x, members, starts, wide, kt, kappa, half, rho, z, p, bound, work=work)
        counts = np.zeros(columns, np.int64)
        counts[:r] = sizes
        # Frozen from the start, the second order is zero; variances still say what is near.
        frozen = frozen_from(counts if self.second_order else np.ones_like(counts))
        with np.errstate(divide="ignore"):
            bits = np.log2(counts)
        return Moments(
            members, starts, wide, kt, kappa, half, rho, frozen.astype(dtype), bits.astype(dtype),
            z, p, bound,
        )  # fmt: skip


def in_registers(n: Any) -> Any:
    """Return numbers of columns filled up to whole registers."""
    return -(-n // LANES) * LANES


def expected_maximum(m: Array) -> Array:
    """Return Blom's value of the expected maximum of m standard normal numbers, 0 up to m = 1.

    ``Phi^-1((m - 3/8) / (m + 1/4))``.

    Examples
    --------
    >>> expected_maximum(np.array([0, 1, 8, 32])).round(2).tolist()
    [0.0, 0.0, 1.43, 2.07]
    """
    from scipy.special import ndtri

    m = np.maximum(m, 1)
    found: Array = np.maximum(ndtri((m - 0.375) / (m + 0.25)), 0)
    return found


def frozen_from(m: Array) -> Array:
    """Return from which u on, in bits, the second-order term of clusters of m keys is frozen."""
    found: Array = 0.5 * LOG2E * expected_maximum(m) ** 2
    return found


def rows_in_tiles(
    stops: Array, own: Array, ends: Array, skip: Array | None, height: int = TILE
) -> Rows:
    """Return rows cut into tiles that see the same clusters and begin their own keys together.

    Parameters
    ----------
    stops, own : int array (n_q,)
        Own keys are ``own[i] .. stops[i] - 1``; both ascend.
    ends : int array (n_q,)
        Row i sees the clusters below.
    skip : int array (n_q, 2), optional
        First and last + 1 of the clusters that it does not see.
    height : int
        Rows of a tile at most.
    """
    n = len(stops)
    low, high = cut_into_tiles((np.diff(own) != 0) | (np.diff(ends) != 0), n, height)
    tiles = np.zeros((len(low), 7), np.int64)
    tiles[:, 0], tiles[:, 1] = low, high
    tiles[:, 2], tiles[:, 4] = own[low], ends[low]
    tiles[:, 3] = stops[high - 1]
    if skip is not None:
        tiles[:, 5:] = skip[low]
    size = min(max(n // 8, LEAST), MOST)
    return Rows(stops.astype(np.int64), tiles, items_of(high, size))


def cut_into_tiles(changes: Array, n: int, height: int) -> tuple[Array, Array]:
    """Return first rows of tiles, and last + 1; ``changes (n - 1,)`` says where one has to end."""
    change = np.flatnonzero(changes) + 1
    runs = np.concatenate([[0], change, [n]]).tolist() if n else [0, 0]
    cuts = [i for a, b in zip(runs[:-1], runs[1:], strict=True) for i in range(a, b, height)]
    low = np.array(cuts, np.int64)
    return low, np.append(low[1:], n).astype(np.int64)[: len(low)]


def items_of(high: Array, size: int) -> Array:
    """Return where items of ``size`` rows or more begin among the tiles, and their number."""
    items, start = [0], 0
    for t, stop in enumerate(high.tolist()):
        if stop - start >= size:
            items.append(t + 1)
            start = stop
    if items[-1] < len(high):
        items.append(len(high))
    return np.array(items, np.int64)


class NearFarAttention(AttentionOperator):
    """Represent ``Ahat`` by clusters of keys, their moments, and the choice of every row.

    Parameters
    ----------
    problem : AttentionProblem
    clusters : Clusters
    rows : Rows
    most : int
        Candidates of a row at most.
    tau : float
        What share times variance keeps a candidate.
    near : int32 array (n_q, most), optional
        The choice of an operator in another precision: clusters, then -1.
    room : int, optional
        Keys of these clusters that a row may read; None: all.

    Attributes
    ----------
    near : ndarray (n_q, most), int32
        Clusters that rows read key by key, then -1.
    moments : Moments
    steep : ndarray or None
        Rows whose logits are too large for one normaliser in several products.

    Notes
    -----
    Weights are recomputed in every product; nothing of the size of the matrix is held.  Steep rows
    are formed whole, and divided by their own sums, in all products.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=64, d=4, rng=0)[0]
    >>> ahat = sa.NearFar(block=16, clusters=4, near=2).approximate(problem)
    >>> ahat.near.shape, bool(abs(ahat.row_sums() - 1).max() < 1e-6)
    ((64, 2), True)
    """

    def __init__(
        self,
        problem: Head,
        clusters: Clusters,
        rows: Rows,
        most: int,
        tau: float,
        near: Array | None = None,
        room: int | None = None,
    ) -> None:
        super().__init__((problem.n_q, problem.n_k), problem.dtype, None)
        self.problem, self.clusters, self.layout = problem, clusters, rows
        self.most, self.tau = most, tau
        self.kept = problem.kept_keys
        self.k = kept_rows(problem, problem.arrays.k)
        self.moments = clusters.moments(self.k)
        nothing = np.empty((len(self.k), 0), self.dtype)
        made = solve(problem, self.k, nothing, self.moments, rows, most, tau, near, room)
        self.near = made.near
        self._settle(made)

    def _settle(self, made: Solved) -> None:
        """Keep what is known of the rows once they have chosen."""
        self.top, self.total = made.top, made.total
        steep = steep_rows(self.problem)
        self.steep = steep if len(steep) else None
        read = self.reads(self.problem) - self._own()
        mean = float(read.mean()) if len(read) else 0.0
        self.effective_rank = min(len(self.kept), int(np.ceil(mean)))

    @property
    def nbytes(self) -> int:
        """Bytes of queries, keys, moments, layout and choice."""
        held = super().nbytes + self.problem.q.nbytes
        parts = (*self.moments, *self.layout)
        return held + self.clusters.labels.nbytes + sum(x.nbytes for x in parts)

    @property
    def _tile_of(self) -> Array:
        tiles = self.layout.tiles
        return np.repeat(np.arange(len(tiles)), tiles[:, 1] - tiles[:, 0])

    def _own(self) -> Array:
        """Return the number of own keys of each row."""
        tile = self.layout.tiles[self._tile_of]
        return np.where(tile[:, 3] > tile[:, 2], self.layout.stops - tile[:, 2], 0)

    def reads(self, problem: Head) -> Array:
        """Return own keys, keys of near clusters, and far clusters of each row."""
        sizes = np.append(np.diff(self.moments.starts), 0)  # -1 is the last: nothing
        full = np.concatenate([[0], np.cumsum(sizes[:-1] > 0)])
        tile = self.layout.tiles[self._tile_of]
        far = full[tile[:, 4]] - (full[tile[:, 6]] - full[tile[:, 5]])
        near = sizes[self.near].sum(axis=1) - (self.near >= 0).sum(axis=1)
        return np.asarray(self._own() + far + near, np.float64)

    @property
    def log_normalizer(self) -> Array:
        """Natural logarithm of ``Zhat_i`` (n_q,), -inf for a row without keys."""
        return log_sums(self.top, self.total)

    def estimated_error(self, values: Array) -> float:
        """Return an estimate of ``|Ahat V - A V|_F / |A V|_F``: a diagnostic, never a bound.

        ``e_i^2 = sum_c Pi_ic^2 sigma_ic^2 V_c`` over the far clusters of row i, of share ``Pi_ic``
        and mean squared distance ``V_c`` of a value from their mean: what mean values change by to
        first order, clusters taken as independent.  Without near keys that nobody saw it is within
        a factor of three of the truth on most real heads, and a tenth of it on a few.

        Parameters
        ----------
        values : array (n_k, d_v)

        Examples
        --------
        >>> import sketchattn as sa
        >>> problem = sa.load_heads("minilm")[5]
        >>> ahat = sa.NearFar(preset="fast").approximate(problem)
        >>> 0.03 < ahat.estimated_error(problem.values) < 0.3
        True
        """
        m, q = self.moments, self.problem.q.astype(np.float64)
        v = kept_rows(self.problem, np.asarray(values, np.float64))[m.members]
        sizes = np.diff(m.starts)
        label = np.repeat(np.arange(len(sizes)), sizes)
        counts = np.maximum(sizes, 1)
        means = np.zeros((len(sizes), v.shape[1]))
        np.add.at(means, label, v)
        means /= counts[:, None]
        square = ((v - means[label]) ** 2).sum(axis=1)
        spread = np.bincount(label, weights=square, minlength=len(sizes)) / counts
        r = len(sizes)
        kappa, half = (x[:, :r].astype(np.float64) for x in (m.kappa, m.half))
        frozen, rho, logs_of_counts = (x[:r] for x in (m.frozen, m.rho, m.bits))
        scale, tile, lse = self.problem.scale, self.layout.tiles[self._tile_of], self.log_normalizer
        total, step = 0.0, max(1, ENTRIES // max(1, len(sizes)))
        clusters = np.arange(len(sizes))
        for start in range(0, len(q), step):
            rows = slice(start, start + step)
            x = scale * q[rows]
            # half holds ln 2 / 2 times variances, and squares are of logits in base 2.
            sigma2 = product(x * x, half) * 2 * LOG2E
            far = (clusters < tile[rows, 4:5]) & (sizes > 0)
            far &= ~((clusters >= tile[rows, 5:6]) & (clusters < tile[rows, 6:7]))
            near = np.zeros((len(x), len(sizes) + 1), bool)
            np.put_along_axis(near, self.near[rows], True, axis=1)
            far &= ~near[:, :-1]
            bits = 0.5 * LOG2E * sigma2
            phi = np.where(bits <= frozen, bits, 2 * np.sqrt(frozen * bits) - frozen)
            phi = np.minimum(phi, LOG2E * np.linalg.norm(x, axis=1)[:, None] * rho)
            logs = product(x, kappa) + LN2 * (phi + logs_of_counts)
            logs = np.where(far, logs - np.where(lse > -np.inf, lse, 0)[rows, None], -np.inf)
            total += float((np.exp(2 * logs) * sigma2 * spread).sum())
        size = float(np.linalg.norm(self @ np.asarray(values, self.dtype)))
        return float(np.sqrt(total)) / size if size > 0 else 0.0

    def wide(self) -> AttentionOperator:
        """Return the operator in float64, with the same clusters and choice."""
        if self.dtype == np.float64:
            return self
        problem = self.problem.astype(np.float64)
        return NearFarAttention(problem, self.clusters, self.layout, self.most, self.tau, self.near)

    def _matmat(self, x: Array) -> Array:
        values = kept_rows(self.problem, self._cast(x))
        made = solve(
            self.problem, self.k, values, self.moments, self.layout, self.most, self.tau, self.near
        )
        return made.out if self.steep is None else self._by_rows(made.out, x)

    def _by_rows(self, out: Array, x: Array) -> Array:
        """Return a product with the steep rows replaced by those of `rows`."""
        x = self._cast(x)
        if self.problem.key_mask is not None:
            x = np.where(self.problem.key_mask[:, None], x, self.dtype.type(0))
        for part in self._steep_parts():
            out[part] = product(self.rows(part), x)
        return out

    def _steep_parts(self) -> list[Array]:
        """Return the steep rows, so many at a time that they hold few entries."""
        if self.steep is None:
            return []
        step = max(1, ENTRIES // max(1, self.shape[1]))
        return [self.steep[i : i + step] for i in range(0, len(self.steep), step)]

    def _rmatmat(self, y: Array) -> Array:
        y, m, (stops, tiles, _) = self._cast(y), self.moments, self.layout
        n, r, h, dtype = len(self.kept), self.clusters.count, self.clusters.directions, self.dtype
        out = np.zeros((self.shape[1], y.shape[1]), dtype)
        total = self.total
        if self.steep is not None:
            total = total.copy()
            total[self.steep] = np.inf
        sizes = np.maximum(np.diff(m.starts), 1).astype(dtype)
        label = np.repeat(np.arange(r), np.diff(m.starts))
        for start in range(0, y.shape[1], WIDEST):
            part = np.require(y[:, start : start + WIDEST], requirements=["C", "W"])
            width = part.shape[1]
            keys = np.zeros((SLABS, n, width), dtype)
            z = np.zeros((SLABS, 1 + h, m.kappa.shape[1], width), dtype)
            deal(
                attend_transposed, self.problem.arrays.q, self.k, part, stops, tiles,
                self._factor, m.kt, m.members, m.starts, m.wide, m.kappa, m.half, m.rho, m.frozen,
                m.bits,
                m.p, m.bound, self.near, self.top, total, keys, z,
                work=float(self.reads(self.problem).sum()) * (1 + 0.1 * width),
            )  # fmt: skip
            found, far = keys[0], z[0, :, :r] / sizes[:, None]
            for slab in range(1, SLABS):
                found += keys[slab]
                far += z[slab, :, :r] / sizes[:, None]
            spread = far[0][label]
            for a in range(h):
                spread += m.z[a][:, None] * far[1 + a][label]
            found[m.members] += spread
            out[self.kept, start : start + width] = found
        for rows in self._steep_parts():
            out += product(self.rows(rows).T, y[rows])
        return out

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        m, (stops, tiles, _) = self.moments, self.layout
        found = np.zeros((len(chosen), len(self.kept)), self.dtype)
        deal(
            dense_rows, self.problem.arrays.q, self.k, chosen, self._tile_of, stops, tiles,
            self._factor, m.kt, m.members, m.starts, m.wide, m.kappa, m.half, m.rho, m.frozen,
            m.bits,
            m.z, m.p, m.bound, self.near, found,
            work=found.size,
        )  # fmt: skip
        return over_all_keys(self.problem, found)

    @property
    def _factor(self) -> float:
        return float(self.problem.scale * LOG2E)


class Solved(NamedTuple):
    """Hold a product, the choice of rows, and their largest logits and sums."""

    out: Array
    near: Array
    top: Array
    total: Array


def kept_rows(problem: Head, x: Array) -> Array:
    """Return the rows of kept keys, contiguous; all of them are not copied."""
    return x if problem.key_mask is None else np.ascontiguousarray(x[problem.key_mask])


def over_all_keys(problem: Head, found: Array) -> Array:
    """Return rows over kept keys (t, N) as rows over all keys (t, n_k), zero for the others."""
    if problem.key_mask is None:
        return found
    out = np.zeros((len(found), problem.n_k), found.dtype)
    out[:, problem.key_mask] = found
    return out


def log_sums(top: Array, total: Array) -> Array:
    """Return the natural logarithm of ``2^top total``, -inf where a row has nothing."""
    with np.errstate(divide="ignore"):
        return np.asarray(LN2 * (top + np.log2(total)), top.dtype)


def solve(
    problem: Head,
    k: Array,
    x: Array,
    m: Moments,
    rows: Rows,
    most: int,
    tau: float,
    near: Array | None = None,
    room: int | None = None,
) -> Solved:
    """Return ``Ahat X`` with the clusters that rows choose, or with those of ``near``.

    ``k (N, d)`` and ``x (N, w)`` are rows of kept keys; arguments are those of `NearFarAttention`.
    """
    q, dtype, n_q = problem.arrays.q, problem.dtype, problem.n_q
    h, r, d = len(m.z), len(m.starts) - 1, q.shape[1]
    choose = near is None
    chosen = np.empty((n_q, most), np.int32) if near is None else near
    top, total = np.empty(n_q, dtype), np.empty(n_q, dtype)
    width = x.shape[1]
    out = np.empty((n_q, width), dtype)
    limit = 60.0 if dtype == np.float32 else 500.0
    own = float((rows.tiles[:, 3] - rows.tiles[:, 2]) @ (rows.tiles[:, 1] - rows.tiles[:, 0]))
    far = float(rows.tiles[:, 4] @ (rows.tiles[:, 1] - rows.tiles[:, 0]))
    listed = n_q * min(most * len(k) / max(r, 1), len(k))
    for start in range(0, max(width, 1), WIDEST):
        part = x if width <= WIDEST else np.ascontiguousarray(x[:, start : start + WIDEST])
        piece = part.shape[1]
        ordered, vbar = np.empty((len(m.members), piece), dtype), np.empty((r, piece), dtype)
        beta = np.empty((h, r, piece), dtype)
        deal(values_of, part, m.members, m.starts, m.z, ordered, vbar, beta,
             work=len(m.members) * piece * (1 + h))  # fmt: skip
        target = out if width <= WIDEST else np.empty((n_q, piece), dtype)
        deal(
            attend, q, k, part, rows.stops, rows.tiles, rows.items, float(problem.scale * LOG2E),
            m.kt, m.starts, m.wide, m.kappa, m.half, m.rho, m.frozen, m.bits, m.p, m.bound, ordered,
            vbar,
            beta, tau, len(k) if room is None else room, limit, choose, chosen, top, total, target,
            work=(own + 2 * far + listed) * (0.5 + PRODUCT * (d + piece)),
        )  # fmt: skip
        choose = False
        if width > WIDEST:
            out[:, start : start + piece] = target
    return Solved(out, chosen, top, total)
