"""Which keys form clusters, and which of them a row sees: blocks of positions, or all keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.head import Head
from ...kernels._threads import deal, product
from ...kernels.clustering import nearest_centers
from ...kernels.nearfar import cluster
from ...operators.nearfar import ENTRIES, Clusters, Rows, kept_rows, rows_in_tiles
from ...operators.solve import row_softmax

Array = NDArray[Any]

STEPS = 4
# Queries that the metric and the rule for regions look at.
METRIC_ROWS, RULE_ROWS = 1024, 64
GOLDEN = (np.sqrt(5.0) - 1.0) / 2.0
# Keys that are looked at for the centres of clusters of all keys: for each cluster, and at least.
SAMPLE, SAMPLED = 4, 512


class Sizes(NamedTuple):
    """Hold what a budget is spent on.

    Attributes
    ----------
    block, clusters : int
        Keys B of a block, and its clusters C.
    near : int
        Clusters that a row may read key by key.
    room : int or None
        How many keys these may have together; None: any number.
    """

    block: int
    clusters: int
    near: int
    room: int | None = None


def default_block(n: int) -> int:
    """Return the power of two up to ``4 sqrt(n)``: 256 keys for 4096, 512 for 16384.

    Examples
    --------
    >>> [default_block(n) for n in (1, 512, 4096, 16384)]
    [4, 64, 256, 512]
    """
    size: int = 1 << (int(4 * np.sqrt(max(n, 1))).bit_length() - 1)
    return size


def most_clusters(n: int, rank: int, near: int | None) -> int:
    """Return how many of ``rank`` slots clusters of n keys may take: half, or all.

    With half of them for ``2 n / rank`` keys each, the other half holds two clusters of mean size
    if ``rank^2 >= 8 n``; fewer near keys are worth less than as many clusters.
    """
    return rank if near == 0 or rank * rank < 8 * n else rank // 2


def within_rank(n: int, rank: int, sizes: Sizes, near: int | None, blocks: bool) -> Sizes:
    """Return sizes with which clusters and near keys of a row are ``rank`` at most.

    There are fewer clusters of a block, or larger blocks, where those of ``sizes`` do not fit.
    Clusters of all keys have no ``blocks``: any number of them can be made.
    """
    block, clusters = sizes[:2]
    most = most_clusters(n, rank, near)
    if not blocks:
        block, clusters = n, min(most, -(-n * clusters // block))
    elif n * clusters > most * block:
        clusters = max(1, most * block // n)
        block = max(block, -(-n * clusters // most))
    sizes = Sizes(block, clusters, 0)
    return spent(sizes, n, rank - -(-n * clusters // block), near)


def spent(sizes: Sizes, n: int, room: int, near: int | None) -> Sizes:
    """Return the same block and clusters with ``room`` near keys in ``near`` clusters at most."""
    block, clusters = sizes[:2]
    # Some clusters are smaller than the mean: as many again are looked at.
    candidates = min(2 * -(-room * clusters // block), -(-n * clusters // block))
    return Sizes(block, clusters, candidates if near is None else min(near, candidates), room)


def metric_root(problem: Head) -> Array:
    """Return the symmetric root of the second moment of the queries over its trace, (d, d).

    Only ratios of distances count, and without the trace their squares could overflow.
    """
    n = problem.n_q
    rows = np.arange(n) if n <= METRIC_ROWS else np.arange(METRIC_ROWS) * n // METRIC_ROWS
    q = problem.q[rows].astype(np.float64)
    q /= np.abs(q).max(initial=0.0) or 1.0
    values, vectors = np.linalg.eigh(product(q.T, q))
    values = np.maximum(values, 0)
    values /= values.sum() or 1.0
    root: Array = product(vectors * np.sqrt(values), vectors.T)
    return root


def own_positions(problem: Head) -> Array:
    """Return among the kept keys the position (n_q,) of the own key of each row; n_q is n_k.

    That of a row whose own key is hidden is the last kept one before it, or else the first.
    """
    if problem.key_mask is None:
        return np.arange(problem.n_q)
    place: Array = np.maximum(np.cumsum(problem.key_mask) - 1, 0)
    return place


def own_share(problem: Head, block: int) -> float:
    """Return the share of its block of keys in a row of A, mean over a few rows."""
    k, place = kept_rows(problem, problem.arrays.k), own_positions(problem)
    n = len(k)
    # Steps of the golden ratio: even ones would stand at the same place in all blocks.
    rows = (np.arange(min(RULE_ROWS, problem.n_q)) * GOLDEN % 1.0 * problem.n_q).astype(np.int64)
    q = problem.dtype.type(problem.scale) * problem.q[rows]
    share, step = 0.0, max(1, ENTRIES // n)
    for i in range(0, len(rows), step):
        weights = row_softmax(product(q[i : i + step], k.T))
        own = (place[rows[i : i + step]] // block * block)[:, None] + np.arange(block)
        inside = np.take_along_axis(weights, np.minimum(own, n - 1), axis=1)
        share += float(inside.sum(where=own < n))
    return share / len(rows)


class Regions(NamedTuple):
    """Hold clusters and what rows see of them."""

    clusters: Clusters
    rows: Rows


def in_blocks(
    problem: Head, sizes: Sizes, root: Array | None, directions: int, second_order: bool
) -> Regions:
    """Cut the kept keys into blocks, and cluster each.

    Causal rows own the keys from the block of the last one that they see, and see the blocks
    before; other rows own the block of their own key if n_q is n_k, and see all other blocks.
    """
    (b, c), k = sizes[:2], kept_rows(problem, problem.arrays.k)
    n, n_q = len(k), problem.n_q
    skip = None
    if problem.causal:
        stops = problem.visible_counts()
        block = np.maximum(stops - 1, 0) // b
        own, ends = block * b, block * c
        full, rest = int(block.max(initial=0)), 0
    else:
        full, rest = divmod(n, b)
        first = np.minimum(np.arange(full + 1) * c, full * c)
        ends = np.full(n_q, full * c + (-(-rest * c // b) if rest else 0))
        if n_q == problem.n_k:
            block = own_positions(problem) // b
            own, stops = block * b, np.minimum(block * b + b, n)
            first = np.append(first, ends[:1])
            skip = np.stack([first[block], first[block + 1]], axis=1)
        else:
            own = stops = np.zeros(n_q, np.int64)
    count = full + (rest > 0)
    starts = np.minimum(np.arange(count + 1) * b, n)
    first = np.minimum(np.arange(count + 1) * c, full * c + (-(-rest * c // b) if rest else 0))
    labels, _, _ = clustered(k if root is None else in_metric(k, root), starts, first)
    clusters = Clusters(labels, int(first[-1]), root, directions, second_order)
    return Regions(clusters, rows_in_tiles(stops, own, ends, skip))


def of_all_keys(
    problem: Head, count: int, root: Array | None, directions: int, second_order: bool
) -> Regions:
    """Cluster all kept keys: centres from evenly spaced ones, and the nearest of them for each."""
    k, n_q = kept_rows(problem, problem.arrays.k), problem.n_q
    x, n = k if root is None else in_metric(k, root), len(k)
    size = min(n, max(SAMPLE * count, SAMPLED))
    sample = x if size == n else np.ascontiguousarray(x[np.arange(size) * n // size])
    labels, middles, centers = clustered(sample, np.array([0, size]), np.array([0, count]))
    if size < n:
        used = np.ascontiguousarray(centers[np.isfinite(centers).all(axis=1)])
        labels = nearest_centers(x, middles[0], used)[0]
    clusters = Clusters(labels, count, root, directions, second_order)
    zeros = np.zeros(n_q, np.int64)
    return Regions(clusters, rows_in_tiles(zeros, zeros, np.full(n_q, count), None))


def in_metric(k: Array, root: Array) -> Array:
    """Return ``K root`` in the precision of the keys, writeable and contiguous."""
    return np.require(product(k, root.astype(k.dtype)), requirements=["C", "W"])


def clustered(x: Array, starts: Array, first: Array) -> tuple[Array, Array, Array]:
    """Return labels, -1 outside of all blocks, middles of blocks and centres about them."""
    n, d = x.shape
    labels = np.full(n, -1, np.int64)
    middles = np.zeros((len(first) - 1, d), x.dtype)
    centers = np.full((int(first[-1]), d), np.inf, x.dtype)
    sizes, counts = np.diff(starts), np.diff(first)
    work = float((sizes * counts).sum()) * (2 + d / 4)
    deal(
        cluster, x, starts.astype(np.int64), first.astype(np.int64), STEPS, labels, middles,
        centers, work=work,
    )  # fmt: skip
    return labels, middles, centers
