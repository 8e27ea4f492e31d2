"""Clusters of clusters for long heads: how many, which, and what rows see of both levels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.head import Head
from ...kernels.clustering import nearest_centers
from ...operators.nearfar import Clusters, Rows, kept_rows
from ...operators.nearfar_levels import Groups, rows_in_levels
from .regions import SAMPLE, SAMPLED, Sizes, clustered, in_metric, own_positions

Array = NDArray[Any]

# Kept keys from which on there are two levels; keys of a block and of a cluster then.
LONG, BLOCK, KEYS = 65536, 512, 64
# Clusters of a coarse one at LONG keys, and blocks and coarse clusters of a superblock at least.
CHILDREN, BLOCKS, GROUPS = 4, 4, 8


class Coarse(NamedTuple):
    """Say how many blocks a superblock has, how many keys a coarse cluster, and rows may refine."""

    blocks: int
    keys: int
    refine: int


class TwoLevels(NamedTuple):
    """Hold clusters, groups of them, and what rows see of both."""

    clusters: Clusters
    groups: Groups
    rows: Rows


def default_sizes(n: int, block: int | None, clusters: int | None) -> tuple[int, int]:
    """Return the keys of a block, and its clusters, where there are two levels of n keys.

    Examples
    --------
    >>> default_sizes(65536, None, None), default_sizes(65536, None, 4), default_sizes(9, 64, None)
    ((512, 8), (512, 4), (9, 8))
    """
    block = min(BLOCK if block is None else block, n)
    return block, min(BLOCK // KEYS if clusters is None else clusters, block)


def coarse_of(n: int, block: int, clusters: int, refine: int) -> Coarse:
    """Return sizes of the second level of n keys.

    A row sees ``n / keys`` coarse clusters at most, and as many children of each that it refines
    as these have keys in units of those of a cluster: both grow like the square root of n.

    Examples
    --------
    >>> coarse_of(65536, 512, 8, 32), coarse_of(1 << 20, 512, 8, 32)
    (Coarse(blocks=4, keys=256, refine=32), Coarse(blocks=16, keys=1024, refine=32))
    """
    growth = 1
    while 4 * growth * growth * LONG <= n:
        growth *= 2
    keys = max(1, CHILDREN * growth * block // clusters)
    return Coarse(max(BLOCKS, -(-GROUPS * keys // block)), keys, refine)


def levels_in_blocks(
    problem: Head, sizes: Sizes, coarse: Coarse, root: Array | None, directions: int,
    second_order: bool,
) -> TwoLevels:  # fmt: skip
    """Cut the kept keys into blocks, cluster each, and group the clusters of each superblock.

    Rows own keys as `in_blocks` says, and see the other blocks of the superblock of their own
    block directly, causal rows those before it, and all of another superblock as coarse clusters.
    Rows without a block see nothing directly.
    """
    (b, c), k = sizes[:2], kept_rows(problem, problem.arrays.k)
    n, n_q, f = len(k), problem.n_q, coarse.blocks
    blocks = -(-n // b)
    starts = np.minimum(np.arange(blocks + 1) * b, n)
    last = starts[-1] - starts[-2] if blocks else 0
    first = np.arange(blocks + 1) * c
    if blocks:
        first[-1] = first[-2] + min(c, -(-int(last) * c // b))
    if problem.causal:
        stops = problem.visible_counts()
        mine = np.maximum(stops - 1, 0) // b
        blocks = int(mine.max(initial=0))  # the last that is seen is somebody's own
        starts, first = starts[: blocks + 1], first[: blocks + 1]
    x = k if root is None else in_metric(k, root)
    labels, middles, centers = clustered(x, starts, first)
    count = int(first[-1])
    # Superblocks, those of causal rows complete.
    supers = blocks // f if problem.causal else -(-blocks // f)
    edges = first[np.minimum(np.arange(supers + 1) * f, blocks)]
    keys = np.diff(starts[np.minimum(np.arange(supers + 1) * f, blocks)])
    of_each = np.minimum(np.maximum(1, -(-keys // coarse.keys)), np.diff(edges))
    ends = np.concatenate([[0], np.cumsum(of_each)]).astype(np.int64)
    groups = grouped(centers + np.repeat(middles, np.diff(first), axis=0), edges, ends)
    # What rows of each block see.
    if problem.causal:
        own = np.arange(blocks + 1)
        above = np.minimum(own // f, supers)
        seen = np.zeros((blocks + 1, 9), np.int64)
        seen[:, 0] = own * b
        seen[:, 2], seen[:, 3] = edges[above], first
        seen[:, 4:6] = first[:, None]
        seen[:, 6] = ends[above]
        kind = mine
    elif n_q == problem.n_k:
        kind = own_positions(problem) // b
        own = np.arange(blocks)
        above = own // f
        seen = np.zeros((blocks, 9), np.int64)
        seen[:, 0] = own * b
        seen[:, 2], seen[:, 3] = edges[above], edges[above + 1]
        seen[:, 4], seen[:, 5] = first[own], first[own + 1]
        seen[:, 6] = ends[-1]
        seen[:, 7], seen[:, 8] = ends[above], ends[above + 1]
        stops = np.minimum(kind * b + b, n)
    else:
        kind = stops = np.zeros(n_q, np.int64)
        seen = np.array([[0, 0, 0, 0, 0, 0, ends[-1], 0, 0]], np.int64)
    return TwoLevels(
        Clusters(labels, count, root, directions, second_order),
        Groups(groups, int(ends[-1]), min(coarse.refine, int(ends[-1]))),
        rows_in_levels(stops, kind, seen),
    )


def grouped(centers: Array, edges: Array, ends: Array) -> Array:
    """Return coarse clusters of clusters ``edges[s] : edges[s + 1]``, -1 of those beyond.

    Those of superblock s are ``ends[s] : ends[s + 1]``.  Clusters without a centre are in none.
    """
    used = np.flatnonzero(np.isfinite(centers[: edges[-1]]).all(axis=1))
    found, _, _ = clustered(np.ascontiguousarray(centers[used]), np.searchsorted(used, edges), ends)
    labels = np.full(len(centers), -1, np.int64)
    labels[used] = found
    return labels


def levels_of_all_keys(
    problem: Head, count: int, coarse: Coarse, root: Array | None, directions: int,
    second_order: bool,
) -> TwoLevels:  # fmt: skip
    """Cluster all kept keys: coarse clusters first, then the keys of each of them.

    A row sees all coarse clusters.
    """
    k, n_q = kept_rows(problem, problem.arrays.k), problem.n_q
    x, n = k if root is None else in_metric(k, root), len(k)
    many = min(count, -(-n // coarse.keys))
    size = min(n, max(SAMPLE * many, SAMPLED))
    sample = x if size == n else np.ascontiguousarray(x[np.arange(size) * n // size])
    labels, middles, centers = clustered(sample, np.array([0, size]), np.array([0, many]))
    if size < n:
        used = np.ascontiguousarray(centers[np.isfinite(centers).all(axis=1)])
        labels = nearest_centers(x, middles[0], used)[0]
    members = np.argsort(labels.astype(np.int16 if many < 1 << 15 else np.int64), kind="stable")
    sizes = np.bincount(labels, minlength=many)
    # Children in proportion to keys: n / count of each.
    children = np.minimum(-(-sizes * count // n), sizes)
    first = np.concatenate([[0], np.cumsum(children)]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    inside, _, _ = clustered(np.ascontiguousarray(x[members]), starts, first)
    labels = np.empty(n, np.int64)
    labels[members] = inside
    groups = np.repeat(np.arange(many), children)
    seen = np.array([[0, 0, 0, 0, 0, 0, many, 0, 0]], np.int64)
    zeros = np.zeros(n_q, np.int64)
    return TwoLevels(
        Clusters(labels, int(first[-1]), root, directions, second_order),
        Groups(groups, many, min(coarse.refine, many)),
        rows_in_levels(zeros, zeros, seen),
    )
