"""Near keys exactly, and a weighted coreset for all others, each row with a choice of its own.

With pivots s and weights W (r, n), ``exp(L_ij)`` is close to ``sum_s exp(L_is) W_sj``.  The near
clusters of a row are read key by key, and what the pivots say of them is taken out:

    Zhat_i ohat_i = sum_s e_is (W V)_s
        + sum_{c near} [ sum_{j in c} exp(L_ij) v_j - sum_s e_is (W_c V_c)_s ],

and ``Zhat_i`` is the same with V = 1.  Weights may be negative, and so may entries of the matrix;
where a normaliser is not safely positive, a row has the moments of its far clusters instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.head import Head
from ..kernels._threads import PRODUCT, deal
from ..kernels.nearfar import values_of
from ..kernels.nearfar_coreset import (
    attend_coreset,
    coreset_rows,
    pivot_values,
    spread_coreset,
    take_coreset,
)
from ..kernels.softmax import LOG2E, WIDEST
from .base import AttentionOperator, Index, pick
from .nearfar import (
    Clusters,
    Moments,
    NearFarAttention,
    Rows,
    Solved,
    in_registers,
    kept_rows,
    log_sums,
    over_all_keys,
)
from .steep import steep_rows

Array = NDArray[Any]

# Of the sum of absolute terms: below it the sign of a normaliser is that of its rounding.
LIMIT = 1e-12
# A weight whose logarithm to base 2 is beyond is no number to compute with.
REACH = 1000.0
# Sums over all rows of a transposed product that are kept apart, for as many threads.
PARTS = 8


class Coreset(NamedTuple):
    """Hold the keys that stand for all, as kernels want them; see ``kernels/nearfar_coreset.py``.

    Attributes
    ----------
    pivots : array (d + 1, r')
        Their keys, transposed, and logarithms of weights below them.
    w : array (r' N,)
        Weights of the keys of each cluster, in units of these.
    masses : array (R + 1, r')
        Their sums in each cluster, and in all.
    sizes : array (r',)
        Sums of the absolute values of those of clusters.
    number : int
        Of pivots.
    """

    pivots: Array
    w: Array
    masses: Array
    sizes: Array
    number: int


def coreset_of(k: Array, pivots: Array, weights: Array, m: Moments) -> Coreset:
    """Return pivots, positions among the kept keys ``k (N, d)``, with ``weights (r, N)``."""
    r, n = weights.shape
    size, dtype = int(in_registers(max(r, 1))), k.dtype
    with np.errstate(divide="ignore"):
        largest = np.maximum(np.abs(weights).max(axis=1, initial=0), np.abs(weights.sum(axis=1)))
        logs = np.clip(np.log2(largest), -REACH, REACH)
    ordered = (weights / np.exp2(logs)[:, None]).astype(dtype)[:, m.members]
    keys = np.zeros((k.shape[1] + 1, size), dtype)
    keys[:-1, :r] = k[pivots].T
    keys[-1] = -np.inf
    keys[-1, :r] = logs
    bounds = m.starts.tolist()
    w, masses = np.zeros(size * n, dtype), np.zeros((len(bounds), size))
    for c, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        block = w[size * low : size * high].reshape(size, high - low)
        block[:r] = ordered[:, low:high]
        block.sum(axis=1, dtype=np.float64, out=masses[c])
    masses[-1] = masses[:-1].sum(axis=0)
    sizes = np.abs(masses[:-1]).sum(axis=0)
    return Coreset(keys, w, masses.astype(dtype), sizes.astype(dtype), r)


class CoresetNearFarAttention(AttentionOperator):
    """Represent ``Ahat`` by a weighted coreset, clusters of keys, and the choice of every row.

    Parameters
    ----------
    problem : AttentionProblem
        Not causal.
    pivots : int array (r,)
        Positions of the pivots among the kept keys.
    weights : float64 array (r, N)
        What each pivot weighs for each kept key.
    clusters : Clusters
        Of all kept keys.
    rows : Rows
        All rows, which see all clusters and have no own keys.
    most : int
        Near clusters of a row at most.
    tau : float
        What share times variance keeps a candidate.
    room : int, optional
        Keys of near clusters that a row may read; None: all.
    chosen : (int32 array (n_q, most), bool array (n_q,)), optional
        The choice of an operator in another precision, and which of its rows have moments.

    Attributes
    ----------
    near : ndarray (n_q, most), int32
        Clusters that rows read key by key, then -1.
    moments : Moments
    coreset : Coreset
    others : ndarray
        Rows that have the moments of far clusters: those whose normaliser would be at most 1e-12 of
        its absolute terms (or their rounding), or half of what they read key by key; and those
        whose logits are too large for one normaliser in several products.

    Notes
    -----
    Weights of rows are recomputed in every product; W and nothing larger is held.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=64, d=4, rng=0)[0]
    >>> method = sa.NearFar(far="coreset", pivots=16, near=2, block=16, clusters=4)
    >>> ahat = method.approximate(problem, rng=0)
    >>> ahat.near.shape, bool(abs(ahat.row_sums() - 1).max() < 1e-6)
    ((64, 2), True)
    """

    def __init__(
        self,
        problem: Head,
        pivots: Array,
        weights: Array,
        clusters: Clusters,
        rows: Rows,
        most: int,
        tau: float,
        room: int | None = None,
        chosen: tuple[Array, Array] | None = None,
    ) -> None:
        super().__init__((problem.n_q, problem.n_k), problem.dtype, None)
        self.problem, self.clusters, self.layout = problem, clusters, rows
        self.pivots, self.weights, self.most, self.tau = pivots, weights, most, tau
        self.kept = problem.kept_keys
        self.k = kept_rows(problem, problem.arrays.k)
        self.moments = clusters.moments(self.k)
        self.coreset = coreset_of(self.k, pivots, weights, self.moments)
        nothing = np.empty((len(self.k), 0), self.dtype)
        near = None if chosen is None else chosen[0]
        made = solve_coreset(
            problem, nothing, self.moments, self.coreset, rows, most, tau, near, room=room
        )
        self.near, self.top, self.total = made.near, made.top, made.total
        if chosen is not None:
            self.total[chosen[1]] = 0
        self.others = np.flatnonzero(~(self.total > 0))
        self._moments_of_others = rest_of(problem, self.k, clusters, rows, most, tau, made.near,
                                          self.others)  # fmt: skip
        read = self.reads(problem)
        self.effective_rank = min(len(self.kept), int(np.ceil(read.mean())) if len(read) else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of queries, keys, weights, moments, layout and choice."""
        parts = (*self.moments, *self.layout, *self.coreset[:4], self.clusters.labels)
        held = super().nbytes + self.problem.q.nbytes + sum(x.nbytes for x in parts)
        return held + (0 if self._moments_of_others is None else self._moments_of_others.nbytes)

    def reads(self, problem: Head) -> Array:
        """Return pivots and keys of near clusters of each row; of some, clusters for pivots."""
        sizes = np.append(np.diff(self.moments.starts), 0)  # -1 is the last: nothing
        found = sizes[self.near].sum(axis=1) + float(self.coreset.number)
        if self._moments_of_others is not None:
            found[self.others] = self._moments_of_others.reads(problem)
        return np.asarray(found, np.float64)

    @property
    def log_normalizer(self) -> Array:
        """Natural logarithm of ``Zhat_i`` (n_q,)."""
        found = log_sums(self.top, self.total)
        if self._moments_of_others is not None:
            found[self.others] = self._moments_of_others.log_normalizer
        return found

    def wide(self) -> AttentionOperator:
        """Return the operator in float64, with the same pivots, weights, clusters and choice."""
        if self.dtype == np.float64:
            return self
        other = np.zeros(self.shape[0], bool)
        other[self.others] = True
        return CoresetNearFarAttention(
            self.problem.astype(np.float64), self.pivots, self.weights, self.clusters, self.layout,
            self.most, self.tau, chosen=(self.near, other),
        )  # fmt: skip

    def _matmat(self, x: Array) -> Array:
        values = kept_rows(self.problem, self._cast(x))
        out = solve_coreset(
            self.problem, values, self.moments, self.coreset, self.layout, self.most, self.tau,
            self.near, self.total,
        ).out  # fmt: skip
        if self._moments_of_others is not None:
            out[self.others] = self._moments_of_others @ values
        return out

    def _rmatmat(self, y: Array) -> Array:
        y, m, core, n = self._cast(y), self.moments, self.coreset, len(self.kept)
        q, r, size = self.problem.arrays.q, self.clusters.count, self.coreset.pivots.shape[1]
        out = np.zeros((self.shape[1], y.shape[1]), self.dtype)
        # Rows by the clusters that they read.
        which = np.where(self.near < 0, r, self.near).ravel()
        order = np.argsort(which, kind="stable")[: int((which < r).sum())] // max(self.most, 1)
        first = np.concatenate([[0], np.cumsum(np.bincount(which, minlength=r + 1)[:r])])
        for start in range(0, y.shape[1], WIDEST):
            part = np.require(y[:, start : start + WIDEST], requirements=["C", "W"])
            width = part.shape[1]
            z = np.zeros((r + PARTS, size, width), self.dtype)
            found = np.zeros((n, width), self.dtype)
            deal(
                take_coreset, q, part, order.astype(np.int64), first.astype(np.int64), PARTS,
                self._factor, core.pivots, m.kt, m.starts, m.wide, self.top, self.total, z, found,
                work=(len(order) + len(q)) * size * (0.5 + PRODUCT * (q.shape[1] + width)),
            )  # fmt: skip
            whole = z[r]
            for g in range(r + 1, r + PARTS):
                whole += z[g]
            z[:r] -= whole
            np.negative(z[:r], out=z[:r])
            deal(
                spread_coreset, core.w, m.starts, z[:r], found, work=n * size * width * PRODUCT
            )  # fmt: skip
            out[self.kept[m.members], start : start + width] = found
        if self._moments_of_others is not None:
            out[self.kept] += self._moments_of_others.T @ y[self.others]
        return out

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        m, core = self.moments, self.coreset
        found = np.zeros((len(chosen), len(self.kept)), self.dtype)
        deal(
            coreset_rows, self.problem.arrays.q, chosen, self._factor, core.pivots, core.w, m.kt,
            m.members, m.starts, m.wide, self.near, self.top, self.total, found,
            work=found.size * (1 + PRODUCT * core.number),
        )  # fmt: skip
        if self._moments_of_others is not None:
            place = np.searchsorted(self.others, chosen)
            held = np.append(self.others, -1)[place] == chosen
            found[held] = self._moments_of_others.rows(place[held])
        return over_all_keys(self.problem, found)

    @property
    def _factor(self) -> float:
        return float(self.problem.scale * LOG2E)


def attend_once(
    problem: Head, x: Array, pivots: Array, weights: Array, clusters: Clusters, rows: Rows,
    most: int, tau: float, room: int | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Return ``Ahat X`` and the log-normalisers; no operator is held.

    Arguments are those of `CoresetNearFarAttention`, and ``x (N, w)`` rows of kept keys.
    """
    k = kept_rows(problem, problem.arrays.k)
    m = clusters.moments(k)
    core = coreset_of(k, pivots, weights, m)
    out, near, top, total = solve_coreset(problem, x, m, core, rows, most, tau, room=room)
    lse = log_sums(top, total)
    others = np.flatnonzero(~(total > 0))
    rest = rest_of(problem, k, clusters, rows, most, tau, near, others)
    if rest is not None:
        out[others], lse[others] = rest @ x, rest.log_normalizer
    return out, lse


def rest_of(
    problem: Head, k: Array, clusters: Clusters, rows: Rows, most: int, tau: float, near: Array,
    others: Array,
) -> NearFarAttention | None:  # fmt: skip
    """Return the rows that have the moments of far clusters, over the kept keys; None if none."""
    if not len(others):
        return None
    some = type(problem).adopt(
        np.ascontiguousarray(problem.arrays.q[others]), k, scale=problem.scale
    )
    mine = np.ascontiguousarray(near[others])
    return NearFarAttention(some, clusters, rows.some(others), most, tau, mine)


def solve_coreset(
    problem: Head,
    x: Array,
    m: Moments,
    core: Coreset,
    rows: Rows,
    most: int,
    tau: float,
    near: Array | None = None,
    total: Array | None = None,
    room: int | None = None,
) -> Solved:
    """Return ``Ahat X`` with the clusters that rows choose, or with those of ``near``.

    ``x (N, w)`` are rows of kept keys.  Rows that need the moments of far clusters have the total 0
    and no output; ``total`` says which these are.
    """
    q, dtype, n_q = problem.arrays.q, problem.dtype, problem.n_q
    r, d, n, size = len(m.starts) - 1, q.shape[1], len(m.members), core.pivots.shape[1]
    choose = near is None
    chosen = np.empty((n_q, most), np.int32) if near is None else near
    top = np.empty(n_q, dtype)
    width = x.shape[1]
    out = np.empty((n_q, width), dtype)
    limit = 60.0 if dtype == np.float32 else 500.0
    small = max(LIMIT, 4 * (core.number + n / max(r, 1)) * float(np.finfo(dtype).eps))
    no_scores = np.empty((0, n), dtype)
    for start in range(0, max(width, 1), WIDEST):
        part = x if width <= WIDEST else np.ascontiguousarray(x[:, start : start + WIDEST])
        piece = part.shape[1]
        ordered, vbar = np.empty((n, piece), dtype), np.empty((r, piece), dtype)
        no_slopes = np.empty((0, r, piece), dtype)
        deal(
            values_of, part, m.members, m.starts, no_scores, ordered, vbar, no_slopes,
            work=n * piece,
        )  # fmt: skip
        table = np.empty((r, size, piece), dtype)
        deal(pivot_values, ordered, core.w, m.starts, table, work=n * size * piece * PRODUCT)
        whole = -table.sum(axis=0)
        target = out if width <= WIDEST else np.empty((n_q, piece), dtype)
        decide = total is None
        total = np.empty(n_q, dtype) if total is None else total
        deal(
            attend_coreset, q, rows.tiles, rows.items, float(problem.scale * LOG2E), core.pivots,
            core.sizes, core.masses, table, whole, m.kt, m.starts, m.wide, m.kappa, m.half, m.rho,
            m.frozen, m.bits, ordered, tau, n if room is None else room, limit, small, choose,
            decide, chosen, top, total, target,
            work=n_q * (size + r + most * n / max(r, 1)) * (0.5 + PRODUCT * (d + piece)),
        )  # fmt: skip
        if decide:
            total[steep_rows(problem)] = 0
        choose = False
        if width > WIDEST:
            out[:, start : start + piece] = target
    assert total is not None
    return Solved(out, chosen, top, total)
