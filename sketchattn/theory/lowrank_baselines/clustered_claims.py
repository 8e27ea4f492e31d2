"""Claims: clustered attention, plain and improved, and the floors of sparse and low-rank rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ...base.draws import Draw
from ...errors.perturbation import logit_eta, tv_bound
from ...problem import AttentionProblem
from ...zoo.baselines import TopK
from ...zoo.clustered import Clustered
from ...zoo.nystromformer import Nystromformer
from ...zoo.performer import Performer
from ..engine.arguments import Array
from ..engine.instances import instance
from ..engine.observers import (
    RANKS,
    ROUNDING,
    few,
    implemented,
    is_default,
    largest,
    problem_of,
    quotient,
    spectral,
    square,
    weight_rounding,
)
from ..engine.records import Observations
from ..engine.registry import Context, claim
from .shared import DERIVED, ON, PAIRS

PAPER = "Vyas, Katharopoulos and Fleuret, arXiv 2007.04825"

EVERYWHERE = {
    "clusters": "holds",
    "blocks": "holds",
    "avoided-keys": "holds",
    "heads": "holds",
}

# --- instances -----------------------------------------------------------------------------------


@instance("avoided-keys", "8 queries, each avoids one of 8 keys; their mean sees a ninth key alone")
def _avoided_keys() -> AttentionProblem:
    # Logits of query i: -200 at key i, 0 at the other seven, -6 at the ninth.  The mean query has
    # -25 at all eight, and -6 at the ninth.
    q = np.eye(8)
    k = np.concatenate([-200.0 * np.eye(8), np.full((1, 8), -6.0)])
    v = np.concatenate([np.cos(np.arange(8.0)), [4.0]])[:, None]
    return AttentionProblem(q, k, v, scale=1.0)


@instance("near-queries", "24 queries in four groups as wide as .01, 40 keys, d = 5")
def _near_queries() -> AttentionProblem:
    rng = np.random.default_rng(32)
    q = np.repeat(2 * rng.standard_normal((4, 5)), 6, axis=0) + 0.01 * rng.standard_normal((24, 5))
    k, v = rng.standard_normal((40, 5)), rng.standard_normal((40, 3))
    return AttentionProblem(q, k, v)


# --- what observers share ------------------------------------------------------------------------


class _Case(NamedTuple):
    """Hold one clustering of the queries."""

    rng: np.random.Generator
    problem: AttentionProblem
    labels: Array
    rank: int

    @property
    def centers(self) -> Array:
        """The mean query of each cluster, for each query, (n_q, d)."""
        sums = np.zeros((self.rank, self.problem.d))
        np.add.at(sums, self.labels, self.problem.q)
        counts = np.bincount(self.labels, minlength=self.rank)
        return np.asarray(sums[self.labels] / counts[self.labels, None])


def _cases(
    context: Context, rank: int | None, most: int = 10, *, random: bool = True
) -> Iterator[_Case]:
    """Yield clusterings: by k-means, as the method draws them, and a third of them at random.

    All claims about an instance see the same ones.
    """
    problem = problem_of(context.instance)
    r = max(1, min(32, problem.n_q // 4, problem.n_k)) if rank is None else rank
    context.require(
        r <= min(problem.n_q, problem.n_k),
        f"r = {r} clusters of {problem.n_q} queries, {problem.n_k} keys",
    )
    for i, rng in enumerate(few(context, most)):

        def labels(i: int = i) -> Array:
            own = np.random.default_rng(np.random.SeedSequence(context.entropy, spawn_key=(i,)))
            if random and i % 3 == 2:
                return own.integers(0, r, problem.n_q)
            return np.asarray(Clustered(r).draw(problem, own)["labels"])

        found = context.instance.cached(("clusters", r, context.entropy, i, random), labels)
        yield _Case(rng, problem, found, r)


def _clustered(context: Context, case: _Case, top_keys: int | None = None) -> Array:
    """Return Ahat, improved where ``top_keys`` says how far."""
    if is_default(context):
        method = Clustered(case.rank, improved=top_keys is not None, top_keys=top_keys)
        return method.approximate(case.problem, draw=Draw(labels=case.labels)).to_dense()
    given = {"problem": case.problem, "labels": case.labels, "top_keys": top_keys}
    return implemented(context, "clustered", case.rank, case.rng, **given)


def _keys(context: Context) -> Array:
    """Return ``scale (K - mean)``."""
    problem = problem_of(context.instance)
    return np.asarray(problem.scale * (problem.k - problem.k.mean(axis=0)))


# --- how far a shared row is ---------------------------------------------------------------------


@claim(
    "lowrank_baselines.clustered_lipschitz",
    title="Rows of near queries, and of their mean",
    statement="""|A_i - A_j|_2 <= (1/2) |scale| |K - 1 kbar^T|_2 |q_i - q_j|_2, and the same with
        the row of the mean query in place of A_j and the mean in place of q_j: plain clustered
        attention in row i.  Published for pairs with the constant 1 and K as it is.""",
    source=f"{PAPER}, Proposition 1, halved and centred; for means derived",
    status="derived",
    kind="inequality",
    observes="the largest quotient over queries against their mean, and over pairs of a cluster",
    assumptions=PAIRS,
    recorded={**EVERYWHERE, "two-queries": "holds", "near-queries": "holds"},
    ladder=RANKS,
)
def _clustered_lipschitz(context: Context, *, rank: int | None = None) -> Observations:
    a = context.instance.a
    size = 0.5 * spectral(_keys(context))
    values, used = [], 0
    for case in _cases(context, rank):
        used = case.rank
        ahat, q = _clustered(context, case), case.problem.q
        other = case.rng.permutation(len(q))  # pairs of a cluster
        other = other[np.argsort(case.labels[other], kind="stable")]
        first, second = other[:-1], other[1:]
        same = case.labels[first] == case.labels[second]
        pairs = (a[first] - a[second])[same], (q[first] - q[second])[same]
        for rows, moves in ((a - ahat, q - case.centers), pairs):
            # Queries that are equal up to rounding have rows that are.
            limit = size * np.linalg.norm(moves, axis=1) + weight_rounding(context.instance)
            values.append(float((np.linalg.norm(rows, axis=1) / limit).max(initial=0.0)))
    return Observations(values, 1.0, rank=used, rounding=ROUNDING)


@claim(
    "lowrank_baselines.clustered_inertia",
    title="What k-means minimises bounds the error",
    statement="""|A - Ahat|_F <= (1/2) |scale| |K - 1 kbar^T|_2 (sum_i |q_i - mean query|^2)^(1/2),
        plain clustered attention with any clusters.""",
    source="derived: lowrank_baselines.clustered_lipschitz, all rows",
    status="derived",
    kind="inequality",
    observes="|A - Ahat|_F against its bound",
    assumptions=PAIRS,
    recorded={"near-queries": "holds", "two-queries": "vacuous", "heads": "vacuous"},
    ladder=RANKS,
)
def _clustered_inertia(context: Context, *, rank: int | None = None) -> Observations:
    a = context.instance.a
    size = 0.5 * spectral(_keys(context))
    values, bounds, used = [], [], 0
    for case in _cases(context, rank, random=False):
        used = case.rank
        values.append(math.sqrt(square(a - _clustered(context, case))))
        bounds.append(size * math.sqrt(square(case.problem.q - case.centers)))
    trivial = math.sqrt(square(a - 1 / a.shape[1]))
    return Observations(
        values,
        bounds or math.nan,
        rank=used,
        predictor="the mean of V",
        trivial=trivial,
        rounding=math.sqrt(len(a)) * weight_rounding(context.instance),
    )


@claim(
    "lowrank_baselines.clustered_perturbation",
    title="A shared row, by the range of the change of its logits",
    statement="""eta_i = (max_j D_ij - min_j D_ij)/2, D_ij = scale (q_i - mean query).k_j: plain
        clustered attention has TV(A_i, Ahat_i) <= tanh(eta_i/2) in every row; the same for two
        queries and their difference.""",
    source=f"{DERIVED}; softmax.perturbation for these changes",
    status="derived",
    kind="inequality",
    observes="the largest quotient over rows",
    assumptions=PAIRS,
    recorded={**EVERYWHERE, "two-queries": "holds"},
    ladder=RANKS,
)
def _clustered_perturbation(context: Context, *, rank: int | None = None) -> Observations:
    a = context.instance.a
    values, used = [], 0
    for case in _cases(context, rank):
        used = case.rank
        moves = case.problem.q - case.centers
        limit = np.asarray(tv_bound(logit_eta(moves @ _keys(context).T)))
        variation = np.abs(a - _clustered(context, case)).sum(axis=1) / 2
        values.append(float((variation / (limit + weight_rounding(context.instance))).max()))
    return Observations(values, 1.0, rank=used, rounding=ROUNDING)


@claim(
    "lowrank_baselines.clustered_geometric",
    title="The row of a mean query is the geometric mean of rows",
    statement="""Plain clustered attention: Ahat_ij is proportional over j to
        (prod_(l in cluster) A_lj)^(1/size).""",
    source=f"{DERIVED}; logits are linear in the query",
    status="derived",
    kind="inequality",
    observes="max_i |Ahat_i - normalised geometric mean|_1, which must be zero",
    assumptions=PAIRS,
    recorded=EVERYWHERE,
)
def _clustered_geometric(context: Context, *, rank: int | None = None) -> Observations:
    problem = problem_of(context.instance)
    logits = problem.scale * problem.q @ problem.k.T
    logits -= logits.max(axis=1, keepdims=True)
    values, used = [], 0
    for case in _cases(context, rank):
        used = case.rank
        counts = np.bincount(case.labels, minlength=case.rank)
        logs = np.zeros((case.rank, problem.n_k))
        np.add.at(logs, case.labels, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
        logs = logs[counts > 0] / counts[counts > 0, None]
        mean = np.exp(logs - logs.max(axis=1, keepdims=True))
        mean /= mean.sum(axis=1, keepdims=True)
        place = np.cumsum(counts > 0) - 1
        off = _clustered(context, case) - mean[place[case.labels]]
        values.append(float(np.abs(off).sum(axis=1).max()))
    return Observations(values, 0.0, rank=used, rounding=weight_rounding(context.instance))


@claim(
    "lowrank_baselines.clustered_between",
    title="A shared row is not between the rows that share it",
    statement="""Plain clustered attention: no query's row is farther from the row of its cluster
        than from some other row of the cluster, in total variation.""",
    source=(
        "rows of near queries taken for near rows; refuted: eight rows, each of which avoids one "
        "of eight keys, have a geometric mean on a ninth key"
    ),
    status="refuted",
    kind="inequality",
    observes="max_i TV(A_i, Ahat_i) - max_l TV(A_i, A_l) over clusters; must not be positive",
    assumptions=PAIRS,
    recorded={"avoided-keys": "violated"},
)
def _clustered_between(context: Context, *, rank: int = 1) -> Observations:
    a = context.instance.a
    values = []
    for case in _cases(context, rank, 3):
        ahat = _clustered(context, case)
        worst = -math.inf
        for c in range(case.rank):
            rows = a[case.labels == c]
            if not len(rows):
                continue
            apart = np.array([np.abs(rows - row).sum(axis=1).max() / 2 for row in rows])
            off = np.abs(rows - ahat[case.labels == c]).sum(axis=1) / 2
            worst = max(worst, float((off - apart).max()))
        values.append(max(worst, 0.0))
    return Observations(values, 0.0, rank=rank, rounding=1e-9)


@claim(
    "lowrank_baselines.clustered_sharing",
    title="A shared row can be worse than the uniform one",
    statement="""Plain clustered attention is at least as near to A as uniform rows are, in the
        Frobenius norm.""",
    source=(
        "the expectation that a method beats a trivial predictor; refuted: the instance "
        "avoided-keys with one cluster"
    ),
    status="refuted",
    kind="inequality",
    observes="|A - Ahat|_F against |A - 1 1^T/n_k|_F",
    assumptions=PAIRS,
    recorded={"avoided-keys": "violated"},
)
def _clustered_sharing(context: Context, *, rank: int = 1) -> Observations:
    a = context.instance.a
    values = [math.sqrt(square(a - _clustered(context, case))) for case in _cases(context, rank, 3)]
    return Observations(values, math.sqrt(square(a - 1 / a.shape[1])), rank=rank, rounding=1e-9)


# --- the improved form ---------------------------------------------------------------------------


def _counts(case: _Case) -> list[int]:
    """Return numbers of top keys: few, and a random one."""
    n = case.problem.n_k
    return [min(4, n), int(case.rng.integers(1, n + 1))]


@claim(
    "lowrank_baselines.clustered_proposition2",
    title="The improved form is never farther",
    statement="""|Ahat_i - A_i|_1 <= |Ac_i - A_i|_1 in every row, Ac plain and Ahat improved
        clustered attention with the same clusters, whatever the set of top keys is.""",
    source=f"{PAPER}, Proposition 2; proved in the chapter",
    status="published",
    kind="inequality",
    observes="max_i of the left less the right side, which must not be positive",
    assumptions=PAIRS,
    recorded=EVERYWHERE,
    ladder=RANKS,
)
def _clustered_proposition2(context: Context, *, rank: int | None = None) -> Observations:
    a = context.instance.a
    values, used = [], 0
    for case in _cases(context, rank):
        used = case.rank
        plain = np.abs(_clustered(context, case) - a).sum(axis=1)
        for count in _counts(case):
            better = np.abs(_clustered(context, case, count) - a).sum(axis=1)
            values.append(max(float((better - plain).max()), 0.0))
    # Two 1-norms; in rows where they are equal both are rounded.
    return Observations(values, 0.0, rank=used, rounding=2 * weight_rounding(context.instance))


@claim(
    "lowrank_baselines.clustered_full",
    title="All keys are top keys",
    statement="Improved clustered attention with top_keys = n_k is A, with any clusters.",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max |Ahat - A|, which must be zero",
    assumptions=PAIRS,
    recorded=EVERYWHERE,
)
def _clustered_full(context: Context, *, rank: int | None = None) -> Observations:
    values, used = [], 0
    for case in _cases(context, rank, 3):
        used = case.rank
        values.append(largest(_clustered(context, case, case.problem.n_k) - context.instance.a))
    return Observations(values, 0.0, rank=used, rounding=weight_rounding(context.instance))


@claim(
    "lowrank_baselines.clustered_stochastic",
    title="Rows of both forms are distributions",
    statement="""Plain and improved: Ahat >= 0 and Ahat 1 = 1; rows of the improved form have on
        the top keys the mass that the shared row has there.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="the larger of max_i |sum_j Ahat_ij - 1| and -min Ahat, which must be zero",
    assumptions=PAIRS,
    recorded=EVERYWHERE,
)
def _clustered_stochastic(context: Context, *, rank: int | None = None) -> Observations:
    values, used = [], 0
    for case in _cases(context, rank):
        used = case.rank
        for count in (None, *_counts(case)):
            ahat = _clustered(context, case, count)
            values.append(max(largest(ahat.sum(axis=1) - 1), float(-ahat.min()), 0.0))
    return Observations(values, 0.0, rank=used, rounding=weight_rounding(context.instance))


# --- floors --------------------------------------------------------------------------------------


@claim(
    "lowrank_baselines.rank_floor",
    title="What a method of rank r leaves at least",
    statement="""Nystromformer, Performer (positive features) and plain clustered attention with r
        landmarks, directions or clusters have rank at most r:
        |A - Ahat|_F^2 >= sum_(j > r) sigma_j(A)^2.""",
    source="Eckart and Young, Psychometrika 1 (1936), for the rank of Ahat",
    status="derived",
    kind="inequality",
    observes="the floor over |A - Ahat|_F, in turn for the three methods",
    assumptions=PAIRS,
    recorded={"clusters": "holds", "blocks": "holds", "heads": "holds"},
    ladder=RANKS,
)
def _rank_floor(context: Context, *, rank: int | None = None) -> Observations:
    problem, a = problem_of(context.instance), context.instance.a
    n = min(problem.n_q, problem.n_k)
    r = max(1, min(16, n // 4)) if rank is None else rank
    context.require(r <= n, f"r = {r} of {n} tokens")
    sigma = context.instance.svd[1]
    floor = math.sqrt(float(np.sum(sigma[r:] ** 2)))
    # Singular values are rounded in the size of the first one, and Ahat is, and with it its rank.
    room = ROUNDING * float(sigma[0]) + math.sqrt(len(a)) * weight_rounding(context.instance)
    values = []
    for rng in few(context, 3):
        if is_default(context):
            methods = (Nystromformer(r), Performer(r), Clustered(r))
            made = [method.approximate(problem, rng).to_dense() for method in methods]
        else:
            made = [implemented(context, "rank", r, rng, problem=problem)]
        values += [quotient(floor, math.sqrt(square(a - ahat)), room) for ahat in made]
    return Observations(values, 1.0, rank=r)


def _topk(context: Context, r: int, renormalize: bool) -> Array:
    problem = problem_of(context.instance)
    if is_default(context):
        return TopK(r, renormalize=renormalize).approximate(problem).to_dense()
    rng = np.random.default_rng(context.entropy)
    return implemented(context, "topk", r, rng, problem=problem, renormalize=renormalize)


@claim(
    "lowrank_baselines.topk_floor",
    title="The least error of r entries a row",
    statement="""The r largest entries of every row, as they are: |A - Ahat|_F^2 is the sum of the
        squares of the others, and at most |A - B|_F^2 for every B with r entries a row.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|A - Ahat|_F over that of others: renormalised, random keys, r keys for all rows",
    assumptions=ON,
    recorded={"reference": "holds", "clusters": "holds", "heads": "holds"},
    ladder=RANKS,
)
def _topk_floor(context: Context, *, rank: int = 4) -> Observations:
    a = context.instance.a
    context.require(rank <= a.shape[1], f"r = {rank} of {a.shape[1]} keys")
    raw = _topk(context, rank, False)
    left = square(a - raw)
    dropped = float(np.sum(np.sort(a, axis=1)[:, : a.shape[1] - rank] ** 2))
    tiny = ROUNDING**2 * square(a)
    values = [1.0 + abs(left - dropped) / max(dropped, tiny) if dropped > tiny else 1.0]
    others = [_topk(context, rank, True)]
    for rng in few(context, 3):
        chosen = np.argpartition(rng.random(a.shape), rank - 1, axis=1)[:, :rank]
        shared = np.broadcast_to(rng.permutation(a.shape[1])[:rank], chosen.shape)
        for columns in (chosen, shared):
            other = np.zeros_like(a)
            np.put_along_axis(other, columns, np.take_along_axis(a, columns, axis=1), axis=1)
            others.append(other)
    values += [math.sqrt((left + tiny) / (square(a - x) + tiny)) for x in others]
    return Observations(values, 1.0, rank=rank, rounding=1e-9)


@claim(
    "lowrank_baselines.topk_renormalised",
    title="What renormalising the largest entries costs",
    statement="""T the r largest entries of row i, m_i their sum: divided by m_i the row is off by
        |A_i - Ahat_i|_2^2 = sum_(j not in T) A_ij^2 + (1/m_i - 1)^2 sum_(j in T) A_ij^2: more than
        as they are, unless m_i = 1.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i |difference of the two sides|, must be zero; notes: error over the raw one",
    assumptions=ON,
    recorded={"reference": "holds", "clusters": "holds", "heads": "holds"},
    ladder=RANKS,
)
def _topk_renormalised(context: Context, *, rank: int = 4) -> Observations:
    a = context.instance.a
    context.require(rank <= a.shape[1], f"r = {rank} of {a.shape[1]} keys")
    ordered = np.sort(a, axis=1)
    kept, dropped = ordered[:, -rank:], ordered[:, : a.shape[1] - rank]
    mass = kept.sum(axis=1)
    raw = np.sum(dropped**2, axis=1)
    want = raw + (1 / mass - 1) ** 2 * np.sum(kept**2, axis=1)
    found = np.sum((a - _topk(context, rank, True)) ** 2, axis=1)
    ratio = math.sqrt(float(found.sum()) / float(raw.sum())) if raw.sum() > 0 else 1.0
    note = f"renormalised over raw {ratio:.3g}"
    return Observations([largest(found - want)], 0.0, rank=rank, rounding=ROUNDING, notes=note)
