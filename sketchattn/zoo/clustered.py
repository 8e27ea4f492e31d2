"""Clustered attention: queries of a cluster share one row of weights, plain or improved.

With clusters of the queries, their means ``Qc`` (m, d) and ``Ac = rowsoftmax(scale Qc K^T)``, plain
clustered attention is ``Ahat_i = Ac_c``, c the cluster of i.  The improved form has, on the
``top_keys`` largest entries T of ``Ac_c``, the weights of the query itself, scaled to the mass that
``Ac_c`` has there: ``Ahat_ij = (sum_T Ac_c) exp(L_ij) / sum_(l in T) exp(L_il)`` for j in T.
It is never farther from A: ``|Ahat_i - A_i|_1 <= |Ac_c - A_i|_1``, row by row, whatever T is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import check_choice, check_finite, check_flag, check_integer
from ..base.draws import Draw, check_draw
from ..base.head import Head
from ..operators.base import AttentionOperator, Index, pick
from ..operators.factored import Assignment, FactoredAttention, zero_attention
from ..operators.pullback import (
    Gradient,
    means_pullback,
    rows_pullback,
    softmax_pullback,
    zero_gradient,
)
from ..operators.softmax import SoftmaxAttention, entries
from ..operators.steep import is_steep
from ..problem import AttentionProblem
from ..sampling.clustering import check_sample, kmeans
from ..sketches.base import streams
from .base import InFloat64, Method, Traits, register

Array = NDArray[Any]

CLUSTERINGS = ("kmeans", "lsh")
# Defaults of each: steps of Lloyd, and bits of a hash; those of lsh are published.
STEPS = {"kmeans": 8, "lsh": 10}
BITS, TOP_KEYS = 32, 32
# Codes in which a hash counts at most: float32 holds sums of so many signs exactly.
MOST_BITS = 1024

# About the plain form, the improved one, and any product of so few factors.
PLAIN_CLAIMS = (
    "lowrank_baselines.clustered_lipschitz",
    "lowrank_baselines.clustered_inertia",
    "lowrank_baselines.clustered_perturbation",
    "lowrank_baselines.clustered_geometric",
    "lowrank_baselines.clustered_between",
    "lowrank_baselines.clustered_sharing",
    "lowrank_baselines.clustered_stochastic",
)
IMPROVED_CLAIMS = (
    "lowrank_baselines.clustered_proposition2",
    "lowrank_baselines.clustered_full",
    "lowrank_baselines.clustered_stochastic",
)
FLOOR_CLAIMS = ("lowrank_baselines.rank_floor", "dba.matrix_floor", "dba.output_floor")

# Queries, and clusters, that are one piece of work; entries of a gathered array at most.
_QUERIES, _CLUSTERS, _GATHERED = 1024, 32, 1 << 22
# Logits of clusters that are held at a time, and top keys up to which these are scanned for them.
_LOGITS, _SCANNED = 1 << 19, 64


# --- clusters -----------------------------------------------------------------------------------


def hamming_labels(
    x: Array, r: int, rng: np.random.Generator, *, bits: int = BITS, steps: int = 10
) -> Array:
    """Cluster rows by the signs of random projections, around centres of bits.

    Parameters
    ----------
    x : array (n, d)
        Finite.
    r : int
        Centres, in 1..n.
    rng : numpy.random.Generator
    bits : int, default 32
        Signs of ``[x_i, 1] . g`` with as many independent normal vectors g (d + 1,).
    steps : int, default 10
        Assignments to the nearest centre in Hamming distance, the first one of equals; between
        them, a centre becomes the majority of each bit in its cluster.

    Returns
    -------
    ndarray (n,), int64
        Labels in 0..r - 1, of which some may not occur.

    Notes
    -----
    Vyas, Katharopoulos and Fleuret (2020) and their public code, with two deviations: centres start
    from r rows drawn without replacement, not from the first r, and a centre that loses all rows
    stays where it is, while there it becomes random bits.

    Examples
    --------
    >>> x = np.array([[3.0, 0.0], [3.1, 0.1], [-3.0, 0.0], [-3.1, 0.2]])
    >>> labels = hamming_labels(x, 2, np.random.default_rng(0))
    >>> bool(labels[0] == labels[1] and labels[2] == labels[3])
    True
    """
    from ..kernels._threads import map_pieces

    n, d = x.shape
    first, second = streams(rng, 2)
    planes = first.standard_normal((bits, d + 1))
    pieces = [slice(start, min(start + _QUERIES, n)) for start in range(0, n, _QUERIES)]
    codes = np.empty((n, bits), np.float32)

    def hash_rows(piece: slice) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            side = x[piece].astype(np.float64) @ planes[:, :d].T + planes[:, d]
        codes[piece] = np.where(side > 0, 1, -1)

    for _ in map_pieces(hash_rows, pieces):
        pass
    centers = codes[second.permutation(n)[:r]]
    labels = np.empty(n, np.int64)
    for step in range(steps):
        if step:
            # Sums of signs: small integers, exact in any order.
            sums = Assignment(labels, r, dtype=np.float32).T @ codes
            used = np.bincount(labels, minlength=r) > 0
            centers = np.where(used[:, None], np.where(sums > 0, 1, -1), centers)
            centers = centers.astype(np.float32)
        across = np.ascontiguousarray(centers.T)

        def assign(piece: slice, across: Array = across) -> None:
            # Of bits with signs, code . center = bits - 2 distance.
            labels[piece] = (codes[piece] @ across).argmax(axis=1)

        for _ in map_pieces(assign, pieces):
            pass
    return labels


def _without_gaps(labels: Array) -> tuple[Array, int]:
    """Return labels renumbered so that each one occurs, and how many there are."""
    used, dense = np.unique(labels, return_inverse=True)
    return dense.reshape(-1).astype(np.int64), len(used)


# --- the improved form --------------------------------------------------------------------------


def largest_positions(logits: Array, count: int) -> Array:
    """Return the positions of the ``count`` largest entries of each row, in no order.

    Blocks without one that is larger than those found so far are not looked into.

    Parameters
    ----------
    logits : ndarray (m, n)
    count : int
        In 1..n.

    Returns
    -------
    ndarray (m, count), int64

    Examples
    --------
    >>> sorted(largest_positions(np.array([[3.0, 9.0, 1.0, 7.0]]), 2)[0].tolist())
    [1, 3]
    """
    return _largest(logits, count)[0]


def _largest(logits: Array, count: int) -> tuple[Array, Array | None]:
    """Return the same, and where it comes with them the log-sum-exp of each row."""
    from ..kernels.clustering import largest_logits

    n = logits.shape[1]
    if count > _SCANNED:
        return np.argpartition(logits, n - count, axis=1)[:, n - count :].astype(np.int64), None
    return largest_logits(np.require(logits, requirements=["C", "W"]), count)


def _top_keys(problem: Head, count: int) -> tuple[Array, Array | None]:
    """Return for each query its ``count`` largest logits among the keys that are not masked.

    And the log-sum-exp of its logits, where it comes with them.
    """
    from ..kernels._threads import map_pieces

    keep = problem.kept_keys
    keys = problem.k if problem.key_mask is None else problem.k[keep]
    scale = problem.dtype.type(problem.scale)

    def work(piece: slice) -> tuple[Array, Array | None]:
        return _largest((scale * problem.q[piece]) @ keys.T, count)

    # Rows of logits that stay in the caches.
    m, step = problem.n_q, max(8, min(128, _LOGITS // max(1, len(keep))))
    pieces = [slice(start, min(start + step, m)) for start in range(0, m, step)]
    found = list(map_pieces(work, pieces))
    lses = [lse for _, lse in found if lse is not None]
    return keep[np.concatenate([top for top, _ in found])], np.concatenate(lses) if lses else None


class ImprovedClusteredAttention(AttentionOperator):
    """Represent clustered attention with each query's own weights on the top keys of its cluster.

    Parameters
    ----------
    base : FactoredAttention
        Plain clustered attention: an `Assignment` times a `SoftmaxAttention` of the centroids.
    q : ndarray (n_q, d)
        The queries, in the precision of ``base``.
    top : int array (m, t)
        Distinct keys T of each cluster, none of them masked.
    lse : array (m,), optional
        Log-sum-exp of the logits of each cluster; computed in float64 where it is None.

    Notes
    -----
    A product costs ``O(m n_k (d + d_v) + n_q t d_v)``: the row of a cluster without its top keys,
    for all of its queries at once, and the weights of each query on these.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=8, d=4, rng=0)[0]
    >>> ahat = sa.Clustered(rank=3, improved=True, top_keys=2).approximate(problem, rng=0)
    >>> ahat.top.shape, ahat.effective_rank
    ((3, 2), 3)
    """

    def __init__(
        self, base: FactoredAttention, q: Array, top: Array, lse: Array | None = None
    ) -> None:
        from ..kernels.clustering import own_weights

        super().__init__((base.shape[0], base.shape[1]), base.dtype, base.effective_rank)
        self.base = base
        self.q = q
        self.top = top
        centers, labels = self._rows_of_clusters.problem, self._labels
        counts = np.bincount(labels, minlength=len(top))
        self.order = np.argsort(labels, kind="stable")
        self.ends = np.cumsum(counts)
        # Weights of the centroids on their top keys, from the normaliser of the whole row.
        if lse is None or is_steep(centers):
            wide = entries(centers, top)
        else:
            logits = centers.k[top].astype(np.float64) @ centers.q[:, :, None].astype(np.float64)
            wide = np.exp(centers.scale * logits[:, :, 0] - lse[:, None])
        self.shared: Array = wide.astype(self.dtype)
        # In the order of clusters, in float64 where logits of a query need it.
        used = np.zeros(centers.n_k, bool)
        used[top.ravel()] = True
        steep = is_steep(Head.adopt(q, centers.k[used], scale=centers.scale))
        dtype = np.dtype(np.float64) if steep else self.dtype
        sorted_q = dtype.type(centers.scale) * q[self.order].astype(dtype, copy=False)
        keys = np.require(centers.k, dtype, ["C", "W"])
        mass = wide.sum(axis=1).astype(dtype)
        self.weights: Array = own_weights(sorted_q, keys, self.ends, top, mass).astype(
            self.dtype, copy=False
        )

    @property
    def _labels(self) -> Array:
        return cast(Assignment, self.base.u).labels

    @property
    def _rows_of_clusters(self) -> SoftmaxAttention:
        return cast(SoftmaxAttention, self.base.p)

    def _each(self, work: Any, first: int = 0, last: int | None = None) -> None:
        """Run ``work(c, rows)`` for clusters, with their slices of the queries in order."""
        from ..kernels._threads import map_pieces

        starts = np.concatenate([[0], self.ends[:-1]]).tolist()
        ends = self.ends.tolist()

        def some(piece: slice) -> None:
            for c in range(piece.start, piece.stop):
                work(c, slice(starts[c], ends[c]))

        m = len(ends) if last is None else last
        starting = range(first, m, _CLUSTERS)
        pieces = [slice(start, min(start + _CLUSTERS, m)) for start in starting]
        for _ in map_pieces(some, pieces):
            pass

    @property
    def nbytes(self) -> int:
        """Bytes of the factors, queries, top keys and weights."""
        return super().nbytes + self.base.nbytes

    def reads(self, problem: Head) -> Array:
        """Return the clusters, as of the plain form, and the own keys of each query."""
        return np.asarray(self.base.reads(problem) + self.top.shape[1])

    def wide(self) -> AttentionOperator:
        """Return the operator in float64, with the same clusters and top keys."""
        if self.dtype == np.float64:
            return self
        base = cast(FactoredAttention, self.base.wide())
        return ImprovedClusteredAttention(base, self.q.astype(np.float64), self.top)

    def _widths(self, width: int) -> list[slice]:
        """Return columns of a product, so many at a time that the gathered rows stay small."""
        step = max(1, _GATHERED // max(1, self.top.size))
        return [slice(start, min(start + step, width)) for start in range(0, width, step)]

    def _matmat(self, x: Array) -> Array:
        from ..kernels.clustering import own_product

        x = np.require(self._cast(x), requirements=["C", "W"])
        coarse = np.require(self.base.p @ x, requirements=["C", "W"])
        return own_product(self.weights, self.shared, self.ends, self.order, self.top, x, coarse)

    def _rmatmat(self, y: Array) -> Array:
        y = self._cast(y)
        sums = np.asarray(self.base.u.T @ y)
        out = np.asarray(self.base.p.T @ sums)
        for columns in self._widths(y.shape[1]):
            part = np.ascontiguousarray(y[self.order, columns])
            spread = np.empty((*self.top.shape, part.shape[1]), self.dtype)

            def work(
                c: int,
                rows: slice,
                part: Array = part,
                spread: Array = spread,
                columns: slice = columns,
            ) -> None:
                np.matmul(self.weights[rows].T, part[rows], out=spread[c])
                spread[c] -= self.shared[c][:, None] * sums[c, columns]

            self._each(work)
            np.add.at(out[:, columns], self.top.ravel(), spread.reshape(-1, part.shape[1]))
        return out

    def pullback(self, x: Array, g: Array) -> tuple[Gradient, Array]:
        """Return what a cotangent G of ``Ahat X`` is at queries, keys and X, and at the centres.

        Of the operator in float64.  The weights s of a query on T sum to M, the mass of T in the
        row of the centre: a cotangent ``G_i . x_j`` of them is ``sum_j s_ij G_i . x_j / M`` for M,
        and what it is above that for the query's own logits.  For the centre, entries on T have
        that of M, and others ``sum_i G_i . x_j``.
        """
        centers, (m, t), d = self._rows_of_clusters.problem, self.top.shape, self.q.shape[1]
        scale, kept = centers.scale, centers.kept_keys
        sums, mass = np.asarray(self.base.u.T @ g), self.shared.sum(axis=1)
        g, q, own = g[self.order], self.q[self.order], np.empty(self.q.shape)
        dcenters, shift = np.empty((m, d)), np.empty(m)
        dk, dx = np.zeros(centers.k.shape), np.zeros(x.shape)
        step = max(1, _GATHERED // (t * max(d, x.shape[1], 1)))
        for first in range(0, m, step):
            top = self.top[first : first + step]
            dkeys, dtop = np.empty((*top.shape, d)), np.empty((*top.shape, x.shape[1]))

            def work(
                c: int,
                rows: slice,
                first: int = first,
                dkeys: Array = dkeys,
                dtop: Array = dtop,
            ) -> None:
                s, values, keys = self.weights[rows], x[self.top[c]], centers.k[self.top[c]]
                change = g[rows] @ values.T
                mean = np.einsum("ij,ij->i", s, change)[:, None] / mass[c]
                share = float(mean.sum())
                change = s * (change - mean)
                own[rows] = scale * (change @ keys)
                # Of the centre's entries on T, what they have beside sum_i G_i . x_j.
                beside = self.shared[c] * (share - values @ sums[c])
                shift[c], dcenters[c] = -beside.sum(), scale * (beside @ keys)
                dkeys[c - first] = scale * (change.T @ q[rows] + np.outer(beside, centers.q[c]))
                dtop[c - first] = s.T @ g[rows] - np.outer(self.shared[c], sums[c])

            self._each(work, first, first + len(top))
            np.add.at(dk, top.ravel(), dkeys.reshape(-1, d))
            np.add.at(dx, top.ravel(), dtop.reshape(-1, x.shape[1]))
        made = softmax_pullback(centers.q, centers.k[kept], x[kept], sums, scale, lse=shift)
        dq = np.empty(own.shape)
        dq[self.order] = own
        dk[kept] += made.k
        dx[kept] += made.x
        return Gradient(dq, dk, dx), dcenters + made.q

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        labels = self._labels[chosen]
        place = np.empty(self.shape[0], np.int64)
        place[self.order] = np.arange(self.shape[0])
        out = self._rows_of_clusters.rows(labels)
        np.put_along_axis(out, self.top[labels], self.weights[place[chosen]], axis=1)
        return out


# --- the method ---------------------------------------------------------------------------------


@register("clustered")
class Clustered(Method):
    """Give the queries of a cluster one row of weights, that of their mean query.

    ``Ahat_i = rowsoftmax(scale Qc K^T)_c`` with c the cluster of query i and Qc_c the mean of its
    queries; with ``improved`` each query has its own weights on the top keys of its cluster.

    Parameters
    ----------
    rank : int
        Number of clusters at most, in 1..n_k; never more than there are queries.
        ``effective_rank`` is their number.
    improved : bool, default False
        Compute the weights on the ``top_keys`` largest entries of the cluster's row for each query
        itself, scaled to the mass that the row has there.
    top_keys : int, optional
        Of the improved form, 32 by default; all keys where there are fewer.  One is the plain form.
    clustering : {"kmeans", "lsh"}
        `sketchattn.sampling.kmeans` on the queries, or steps of Lloyd on the signs of random
        projections of them in Hamming distance, which is the published one.
    steps : int, optional
        Steps of Lloyd: 8 for "kmeans", 10 for "lsh" by default.
    bits : int, optional
        Signs a query, for "lsh" only: 32 by default, 1024 at most.
    sample : "auto", int or None
        For "kmeans": the queries on which centres are found before all of them are assigned, as for
        `sketchattn.sampling.kmeans`; None is all.

    Raises
    ------
    TypeError, ValueError
        For values out of range, options that would be ignored, and causal problems.

    Notes
    -----
    Vyas, Katharopoulos and Fleuret (2020), arXiv 2007.04825.  Plain rows are wrong by what their
    logits are wrong by: ``tanh(eta_i/2)`` in total variation, eta_i the half-range over keys of
    ``scale (q_i - Qc_c).k_j``, see `sketchattn.errors.perturbation`.  Their Proposition 2: the
    improved form is never farther from A in the l1 norm of a row.  Both forms are exact where
    queries of a cluster are equal, the improved one also where ``top_keys`` is the number of keys.

    Deviations from the public code: see `hamming_labels` for "lsh"; means are taken over the final
    clusters, those that are empty are dropped, and top keys are those of scaled logits.

    The draw is ``labels`` (n_q,), in 0..rank - 1.  Cost ``O(r n_k (d + d_v))`` and the clustering;
    improved ``O(n_q top_keys (d + d_v))`` more.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
    >>> plain = sa.Clustered(rank=4).approximate(problem, rng=0)
    >>> plain.rank_bound, bool(abs(plain.row_sums() - 1).max() < 1e-6)
    (4, True)
    >>> better = sa.Clustered(rank=4, improved=True, top_keys=4).approximate(problem, rng=0)
    >>> a = problem.exact.to_dense()
    >>> bool((abs(better.to_dense() - a).sum(1) <= abs(plain.to_dense() - a).sum(1) + 1e-6).all())
    True
    """

    draw_names = ("labels",)

    def __init__(
        self,
        rank: int,
        improved: bool = False,
        top_keys: int | None = None,
        clustering: str = "kmeans",
        steps: int | None = None,
        bits: int | None = None,
        sample: int | str | None = "auto",
    ) -> None:
        self.rank = rank
        self.improved = improved
        self.top_keys = top_keys
        self.clustering = clustering
        self.steps = steps
        self.bits = bits
        self.sample = sample

    @property
    def traits(self) -> Traits:
        """Rows are softmaxes, or parts of two that sum to one; every row sees all keys."""
        claims = IMPROVED_CLAIMS if self.improved else PLAIN_CLAIMS + FLOOR_CLAIMS
        return Traits(
            key_mask=True,
            row_stochastic=True,
            nonnegative=True,
            claims=claims,
            differentiable=True,
        )

    # --- arguments --------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        check_flag(self.improved, "improved", "True computes the top keys of each query")
        check_choice(self.clustering, "clustering", CLUSTERINGS)
        for label, useful, least, most, why in (
            ("top_keys", bool(self.improved), 1, None, "improved=False"),
            ("steps", True, 1, None, ""),
            ("bits", self.clustering == "lsh", 1, MOST_BITS, "clustering='kmeans'"),
            ("sample", self.clustering == "kmeans", int(self.rank), None, "clustering='lsh'"),
        ):
            given = getattr(self, label)
            if given is None or (label == "sample" and isinstance(given, str) and given == "auto"):
                continue
            if not useful:
                raise ValueError(
                    f"{label} must be None with {why}, which has no use for it, got {given!r}; "
                    f"drop it"
                )
            if isinstance(given, str) and label == "sample":
                check_sample(given, least)
            check_integer(given, label, least, f"change {label}", high=most, limit="the largest")

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        made = check_draw(draw, self.draw_names)
        labels = made["labels"]
        if labels.shape != (problem.n_q,) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"labels must be integers of shape (n_q,) = ({problem.n_q},), got {labels.dtype} "
                f"of shape {labels.shape}; give the cluster of each query"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < int(self.rank):
            raise ValueError(
                f"labels must be in 0..rank - 1 = {int(self.rank) - 1}, got {int(labels.min())} to "
                f"{int(labels.max())}; raise rank or renumber the clusters"
            )
        return made

    # --- the approximation ------------------------------------------------------------------

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        r = min(int(self.rank), problem.n_q)
        if r == 0:
            return Draw(labels=np.zeros(0, np.int64))
        steps = STEPS[self.clustering] if self.steps is None else int(self.steps)
        if self.clustering == "lsh":
            bits = BITS if self.bits is None else int(self.bits)
            return Draw(labels=hamming_labels(problem.q, r, rng, bits=bits, steps=steps))
        found = kmeans(problem.q, r, int(rng.integers(2**31)), steps=steps, sample=self.sample)
        return Draw(labels=found.labels)

    def _plain(self, problem: AttentionProblem, labels: Array, m: int) -> FactoredAttention:
        """Return plain clustered attention; every label in 0..m - 1 occurs."""
        sums = Assignment(labels, m).T @ problem.q.astype(np.float64)
        wide = sums / np.bincount(labels)[:, None]
        check_finite(wide, "means of q")
        centers = np.ascontiguousarray(wide, problem.dtype)
        if problem.key_mask is None:
            right = AttentionProblem.adopt(centers, problem.arrays.k, scale=problem.scale)
        else:
            right = AttentionProblem(
                centers, problem.k, scale=problem.scale, key_mask=problem.key_mask
            )
        unpack = Assignment(labels, m, dtype=problem.dtype)

        remake = InFloat64(self._plain, problem, (labels, m))
        return FactoredAttention(unpack, None, right.exact, m, remake=remake)

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        keys = len(problem.kept_keys)
        if problem.n_q == 0 or keys == 0:
            return zero_attention(problem)
        labels, m = _without_gaps(draw["labels"])
        base = self._plain(problem, labels, m)
        if not self.improved:
            return base
        count = min(TOP_KEYS if self.top_keys is None else int(self.top_keys), keys)
        right = cast(SoftmaxAttention, base.p).problem
        return ImprovedClusteredAttention(base, problem.arrays.q, *_top_keys(right, count))

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        if problem.n_q == 0 or not len(problem.kept_keys):
            return zero_gradient(problem)
        labels, m = _without_gaps(draw["labels"])
        ahat = self._approximate(problem, draw)
        if isinstance(ahat, ImprovedClusteredAttention):
            found, dcenters = ahat.pullback(problem.values, cotangent)
            return found._replace(q=found.q + means_pullback(labels, dcenters))
        rows = cast(SoftmaxAttention, cast(FactoredAttention, ahat).p).problem
        sums = np.asarray(Assignment(labels, m).T @ cotangent)
        made = rows_pullback(rows, None, problem.values, sums)
        return made._replace(q=means_pullback(labels, made.q))
