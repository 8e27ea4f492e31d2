"""What a row of an approximation reads, as a share of what exact attention reads."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.sparse.linalg import aslinearoperator

import sketchattn as sa
from sketchattn.base.head import Head
from sketchattn.operators.base import AttentionOperator
from sketchattn.operators.blocks import Block, BlockAttention
from sketchattn.operators.factored import zero_attention
from sketchattn.operators.filled import SparseOrMean
from sketchattn.operators.partitioned.operator import MixtureAttention
from sketchattn.operators.visible_mean import VisibleMean
from sketchattn.operators.wrapped import DenseAttention, as_operator
from sketchattn.partitions.patterns import make_plan
from sketchattn.problem import AttentionProblem
from sketchattn.studies.grid import by_name, default_methods

N = 24


def head(causal: bool = False, mask: np.ndarray | None = None, n: int = N) -> AttentionProblem:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, n, 4)).astype(np.float32)
    return AttentionProblem(q, k, v, causal=causal, key_mask=mask)


MASK = np.arange(N) % 3 != 0


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("causal", [False, True])
def test_exact_attention_reads_what_a_row_sees(causal: bool, mask: np.ndarray | None) -> None:
    problem = head(causal, mask)
    seen = problem.visible().sum(axis=1)
    assert problem.exact.reads(problem).tolist() == seen.tolist()
    assert problem.exact.work(problem) == 1.0
    if causal and mask is None:
        assert problem.exact.reads(problem).mean() == (N + 1) / 2
    # Somebody else's array says nothing about how it was made.
    assert DenseAttention(problem.exact.to_dense()).work(problem) == 1.0


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_sampled_columns_count_where_a_row_sees_them(
    causal: bool, mask: np.ndarray | None, own: bool
) -> None:
    problem = head(causal, mask)
    seen = problem.visible()
    rng = np.random.default_rng(1)
    if own:
        columns = np.stack([rng.permutation(N)[:5] for _ in range(N)])
    else:
        columns = rng.permutation(N)[:5]
    each = np.broadcast_to(columns, (N, 5))
    counts = np.take_along_axis(seen, each, axis=1).sum(axis=1)
    # Weights of zero are read too: nothing is told from their size.
    weights = np.zeros((N, 5))
    plain = sa.SampledAttention(columns, weights, N)
    assert plain.reads(problem).tolist() == counts.tolist()
    assert plain.work(problem) == counts.sum() / seen.sum()
    filled = sa.SampledAttention(columns, weights, N, fill=np.zeros(N))
    assert filled.reads(problem).tolist() == (counts + (counts < seen.sum(axis=1))).tolist()
    rows = np.array([20, 3])
    some = sa.SampledAttention(columns, weights, N, rows=rows, row_weights=np.zeros((2, N)))
    wanted = counts.copy()
    wanted[rows] = seen.sum(axis=1)[rows]
    assert some.reads(problem).tolist() == wanted.tolist()


def test_columns_of_queries_that_come_last_are_seen_from_there() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((4, 4)), rng.standard_normal((10, 4))
    problem = AttentionProblem(q, k, k, causal="bottom-right")
    columns = np.array([7, 0, 9])
    ahat = sa.SampledAttention(columns, np.zeros((4, 3)), 10)
    assert ahat.reads(problem).tolist() == problem.visible()[:, columns].sum(axis=1).tolist()


def test_sparse_rows_read_what_they_store() -> None:
    problem = head(n=4)
    starts, columns = np.array([0, 1, 1, 4, 6]), np.array([2, 0, 1, 3, 0, 2])
    weights = np.ones(6)
    assert sa.SparseAttention(starts, columns, weights, 4).work(problem) == 6 / 16
    # A row without keys is the mean of all, which is one.
    assert SparseOrMean(problem, starts, columns, weights).work(problem) == 7 / 16


def test_factors_read_their_inner_width_and_the_mean_one() -> None:
    problem = head()
    u, s, p = np.ones((N, 3)), np.ones((3, 2)), np.ones((2, N))
    assert sa.FactoredAttention(u, s, p).work(problem) == 3 / N
    assert zero_attention(problem).work(problem) == 0.0
    assert VisibleMean(problem).work(problem) == 1 / N
    unseen = head(mask=np.zeros(N, bool))
    assert VisibleMean(unseen).reads(unseen).tolist() == [0.0] * N
    assert math.isnan(unseen.exact.work(unseen))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", ["fixed", "axial_vertical", "logsparse"])
def test_partitions_read_direct_keys_and_regions(pattern: str, causal: bool) -> None:
    problem = head(causal)
    plan = make_plan(pattern, N, causal=causal)
    ahat = sa.PartitionedAttention(problem, plan)
    wanted = plan.direct.sizes + plan.row_regions.sizes
    assert ahat.reads(problem).tolist() == wanted.tolist()
    rank = int(by_name("combiner", 8).set_params(pattern=pattern).rank)
    made = by_name("combiner", rank).set_params(pattern=pattern).approximate(problem)
    assert isinstance(made, sa.PartitionedAttention)  # by spans, trees or lines: the same slots
    slots = made.plan.direct.sizes + made.plan.row_regions.sizes
    assert made.reads(problem).tolist() == slots.tolist()
    mix = MixtureAttention([ahat, ahat], np.array([0.5, 0.5]))
    assert mix.reads(problem).tolist() == (2 * wanted).tolist()


def test_blocks_add_up() -> None:
    problem = head(causal=True)
    q, k, v = problem.arrays
    last = slice(16, N)
    corner = Head.adopt(q[last], k[16:], causal=True)
    blocks = [
        Block(last, np.arange(16, N), sa.SoftmaxAttention(corner), np.ones(8)),
        Block(last, np.arange(16), sa.SampledAttention(np.array([15, 3]), np.zeros((8, 2)), 16),
              np.ones(8)),
    ]  # fmt: skip
    ahat = BlockAttention(blocks, (N, N), np.float32)
    assert ahat.reads(problem).tolist() == [0.0] * 16 + [i + 1 + 2 for i in range(8)]


def test_what_is_not_known_is_not_a_number() -> None:
    problem = head()
    foreign = as_operator(aslinearoperator(problem.exact.to_dense()), problem)
    assert math.isnan(foreign.work(problem))
    assert math.isnan(AttentionOperator((N, N), np.float32).work(problem))


# What the rows of each method read at rank r = 8, of n keys, by what it says of itself.
SHARES = {
    "clustered": 8 / N,
    "jl": 1.0,
    "linformer": 8 / N,
    "nystromformer": 8 / N,
    "svd": 8 / N,
    "topk": 8 / N,
    "uniform": 8 / N,
    "vmean": 1 / N,
    "zero": 0.0,
    "exact": 1.0,
    "compressed": 1.0,
}


@pytest.mark.parametrize("name", sorted({*default_methods(), *SHARES}))
def test_every_method_says_what_it_reads(name: str) -> None:
    problem = head()
    ahat = by_name(name, 8).approximate(problem, rng=0)
    work = ahat.work(problem)
    assert 0 <= work < 2
    assert work == pytest.approx(SHARES.get(name, work), rel=1e-15)
    # A column of the study.
    row = sa.study(problem_named(problem), methods=[name], ranks=[8], seeds=1, pictures=False)
    assert row.frame["work"].tolist() == [work]


def problem_named(problem: AttentionProblem) -> AttentionProblem:
    return AttentionProblem(*problem.arrays, name="h")


def test_informer_and_improved_clusters_count_their_exact_parts() -> None:
    problem = head()
    informer = sa.Informer(rank=6).approximate(problem, rng=0)
    assert isinstance(informer, sa.SampledAttention)
    assert informer.replaced is not None
    assert informer.reads(problem).tolist() == [
        N if i in set(informer.replaced.tolist()) else 1 for i in range(N)
    ]
    improved = sa.Clustered(rank=3, improved=True, top_keys=2).approximate(problem, rng=0)
    assert improved.work(problem) == 5 / N


def test_a_causal_performer_may_read_more_than_exact_attention() -> None:
    problem = head(causal=True)
    assert sa.Performer(rank=N).approximate(problem, rng=0).work(problem) == N / ((N + 1) / 2)
