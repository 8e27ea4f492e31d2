"""Clusters of rows: few centres, and which one each row belongs to.

Finding them must cost less than what they save, so centres are found on a sample and all rows are
looked at once, when they are assigned.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import as_array, as_integer, check_finite, check_flag, float_dtype
from ..base.floating import without_floating_errors

Array = NDArray[Any]

# Seeds are drawn from so many rows for each, and at least, and so many rows at a time.
SEED_RATIO, SEED_LEAST, SEED_PART = 8, 512, 1024
# Rows of the first steps of Lloyd, and of the last one: at least, for each centre, and of n rows
# one in so many.
FIRST = 1024, 8, 8
LAST = 4096, 32, 2
# Steps on a sample end where one lowers the sum of squared distances by less than this share.
TOLERANCE = 0.02
# Times that centres without rows move to the rows farthest away before they are dropped.
REFILLS = 4


class Clusters(NamedTuple):
    """Hold a clustering of n rows into m groups, none of them empty.

    Attributes
    ----------
    centers : ndarray (m, d), float64
    labels : ndarray (n,), int64
        Cluster of each row, in 0..m - 1.
    counts : ndarray (m,), int64
        Rows of each cluster, positive.
    """

    centers: Array
    labels: Array
    counts: Array


@without_floating_errors
def nearest(x: ArrayLike, centers: ArrayLike) -> Array:
    """Return for each row the nearest of several centres, the first one of equals.

    ``argmin_c |x_i - c|^2 = argmax_c (x_i . c - |c|^2 / 2)``, products of matrices.

    Parameters
    ----------
    x : array (n, d)
    centers : array (m, d)
        At least one.

    Returns
    -------
    ndarray (n,), int64

    Notes
    -----
    Computed in the precision of ``x``, about the mean of the centres: rounding is relative to
    ``|x_i - mean| |c - mean|``, which decides only between centres that are as good as each other.
    The same bits for any number of threads; no more than a tile of the (n, m) products is held.

    Examples
    --------
    >>> nearest(np.array([[0.0], [5.0], [9.0]]), [[1.0], [8.0]]).tolist()
    [0, 1, 1]
    """
    rows = as_rows(x, None)
    marks = np.asarray(as_array(centers, "centers"), np.float64)
    if marks.ndim != 2 or len(marks) < 1 or marks.shape[1] != rows.shape[1]:
        raise ValueError(
            f"centers must have shape (m, d) with m >= 1 and d = {rows.shape[1]}, got "
            f"{marks.shape}; give one row for each centre"
        )
    return _nearest(rows, marks)[0]


@without_floating_errors
def kmeans(
    x: ArrayLike,
    r: int,
    seed: int,
    *,
    steps: int = 8,
    sample: int | str | None = "auto",
    balanced: bool = False,
) -> Clusters:
    """Cluster rows around r centres by k-means++ and a few steps of Lloyd, on a sample.

    Parameters
    ----------
    x : array (n, d)
    r : int
        In 1..n.
    seed : int
        In 0..2^32 - 1.
    steps : int, default 8
        Steps of Lloyd at most, at least 1.
    sample : "auto", int or None
        Rows on which centres are found, drawn without replacement: "auto", see below; so many, at
        least r; None, all.  All rows are then assigned to their nearest centre.
    balanced : bool, default False
        Let no cluster have more than twice the mean number of rows: rows beyond that, those
        farthest from the centre, go to the nearest cluster that has room, and centres become the
        means of their rows.

    Returns
    -------
    Clusters
        With fewer than r centres where fewer rows are distinct.

    Raises
    ------
    TypeError, ValueError
        For an x that is no finite matrix, and numbers out of range.

    Notes
    -----
    Seeds are those of the greedy k-means++ of Arthur and Vassilvitskii (2007) on ``max(8 r, 512)``
    rows, 1024 at a time.  "auto" takes steps on ``max(1024, n/8, min(8 r, n/2))`` rows, until one
    lowers the sum of squared distances by less than 2 %, one on twice as many and the last one on
    ``max(4096, n/2, 32 r)``; where r exceeds n/8 and n 1024, two on n/2.  A centre that loses all
    rows moves to the row farthest from its own centre; where at most r rows are distinct, these are
    the centres.  The same bits for any number of threads.

    On heads the sum of squared distances is within 5 % of that of scikit-learn's ``KMeans`` with 8
    steps from one start, which the tests compare.  Cost ``O(n r d)``, 2 to 3 times that of
    assigning all rows where these are many.

    Examples
    --------
    >>> found = kmeans([[0.0], [0.0], [4.0]], 3, seed=0)
    >>> sorted(found.centers.ravel().tolist()), sorted(found.counts.tolist())
    ([0.0, 4.0], [1, 2])
    """
    from ..kernels._threads import blas_single_thread

    rows = as_rows(x, r)
    top = max(float(rows.max(initial=0.0)), -float(rows.min(initial=0.0)))
    if not np.isfinite(top):
        check_finite(rows, "x")
    check_flag(balanced, "balanced", "True limits the size of a cluster")
    check_sample(sample, r)
    for label, value, low in (("seed", seed, 0), ("steps", steps, 1)):
        if as_integer(value, label, f"it is at least {low}") < low:
            raise ValueError(f"{label} must be at least {low}, got {value}; raise {label}")
    # By a power of two, so that no square leaves the range of the precision.
    factor = 1.0 if 1e-9 < top < 1e9 or top == 0 else float(np.ldexp(1.0, -int(np.log2(top))))
    scaled = _writable(rows) if factor == 1 else rows * rows.dtype.type(factor)
    with blas_single_thread():
        found = _filled(
            scaled, _centers(scaled, r, np.random.default_rng(seed), int(steps), sample)
        )
    if len(found.counts) < r:
        # Only rows that repeat leave clusters empty; then they are the centres, without rounding.
        distinct, first = np.unique(scaled, axis=0, return_index=True)
        if len(distinct) <= r:
            found = around(scaled, np.asarray(scaled[np.sort(first)], np.float64))
    if balanced:
        found = _balanced(scaled, found)
    return found if factor == 1 else found._replace(centers=found.centers / factor)


def check_sample(sample: object, least: int) -> None:
    """Check a number of rows on which centres are found: "auto", None, or at least ``least``."""
    if sample is None or (isinstance(sample, str) and sample == "auto"):
        return
    if isinstance(sample, str):
        raise ValueError(
            f"sample must be 'auto', an integer or None, got {sample!r}; None is all rows"
        )
    if as_integer(sample, "sample", f"it is at least {least}") < least:
        raise ValueError(f"sample must be at least {least}, got {sample}; raise sample")


@without_floating_errors
def around(x: ArrayLike, centers: ArrayLike) -> Clusters:
    """Cluster rows around given centres, without those to which no row is nearest.

    Parameters
    ----------
    x : array (n, d)
    centers : array (m, d)
        At least one; of equal ones the first is kept.

    Returns
    -------
    Clusters

    Examples
    --------
    >>> around([[0.0], [5.0], [6.0]], [[1.0], [9.0], [5.5]]).counts.tolist()
    [1, 2]
    """
    return _without_empty(np.asarray(as_array(centers, "centers"), np.float64), nearest(x, centers))


# --- rows and centres ---------------------------------------------------------------------------


def as_rows(x: ArrayLike, r: int | None) -> Array:
    """Return x as a matrix in its computing precision, with at least r rows."""
    rows = as_array(x, "x")
    if rows.dtype.kind in "iub":
        rows = rows.astype(np.float64)
    dtype = float_dtype(rows, "x")
    if rows.ndim != 2 or (r is not None and not 1 <= r <= len(rows)):
        raise ValueError(
            f"r must be in 1..n for x of shape (n, d), got {r} and {rows.shape}; lower r"
        )
    return np.ascontiguousarray(rows, dtype)


def _nearest(rows: Array, centers: Array) -> tuple[Array, Array]:
    """Return the nearest of centres (m, d), float64, for each row, and its squared distance."""
    from ..kernels.clustering import nearest_centers

    middle = centers.mean(axis=0).astype(rows.dtype)
    return nearest_centers(_writable(rows), middle, (centers - middle).astype(rows.dtype))


def _writable(rows: Array) -> Array:
    """Return rows as kernels take them."""
    return np.require(rows, rows.dtype, ["C", "W"])


def _without_empty(centers: Array, labels: Array) -> Clusters:
    counts = np.bincount(labels, minlength=len(centers))
    kept = counts > 0
    place = np.cumsum(kept) - 1
    return Clusters(
        np.ascontiguousarray(centers[kept]), place[labels].astype(np.int64), counts[kept]
    )


def _farthest(distance: Array, count: int) -> Array:
    """Return the rows with the largest distances that are not zero, ``count`` at most."""
    order = np.argsort(distance, kind="stable")[len(distance) - count :]
    return np.asarray(order[distance[order] > 0])


# --- steps --------------------------------------------------------------------------------------


def _phases(n: int, r: int, steps: int, sample: int | str | None) -> list[tuple[int, int]]:
    """Return numbers of rows, and how many steps are taken on each at most."""
    if sample is None or not isinstance(sample, str):
        return [(n if sample is None else min(n, int(sample)), steps)]
    if FIRST[0] < n < 8 * r:  # few rows a centre: steps gain little and cost as much as exact rows
        return [(max(n // 2, r), min(steps, 2))]
    first = min(n, max(FIRST[0], n // FIRST[2], min(FIRST[1] * r, n // 2)))
    last = min(n, max(LAST[0], n // LAST[2], LAST[1] * r))
    if first == last or steps <= 2:
        return [(last, steps)]
    return [(first, steps - 2), (min(last, 2 * first), 1), (last, 1)]


def _centers(
    rows: Array, r: int, rng: np.random.Generator, steps: int, sample: int | str | None
) -> Array:
    """Return r centres, float64 (r, d), perhaps equal ones."""
    from ..kernels.clustering import move_to_means, nearest_centers

    n = len(rows)
    phases = _phases(n, r, steps, sample)
    seeded = min(phases[0][0], max(SEED_LEAST, SEED_RATIO * r))
    # Samples are nested: each is the beginning of the next one.
    order = rng.permutation(n)
    drawn = rows[order[: max([seeded] + [size for size, _ in phases if size < n])]]
    start = drawn[:seeded]
    middle = start.mean(axis=0, dtype=np.float64).astype(rows.dtype)
    centers = _seeds(start - middle, r, rng)
    for size, count in phases:
        y = rows if size == n else drawn[:size]
        least = 1 - (TOLERANCE if size < n else 0)
        spread = np.inf
        for _ in range(count):
            labels, distance = nearest_centers(y, middle, centers.astype(rows.dtype))
            empty = np.flatnonzero(move_to_means(y, middle, labels, centers) == 0)
            if len(empty):
                far = _farthest(distance, len(empty))
                centers[empty[: len(far)]] = y[far] - middle
            total = float(distance.sum(dtype=np.float64))
            if total >= least * spread:
                break
            spread = total
    return np.asarray(centers + middle)


def _seeds(y: Array, r: int, rng: np.random.Generator) -> Array:
    """Return r of the rows y (s, d), far from each other, float64: parts of y give some each."""
    from ..kernels.clustering import nearest_centers, spread_rows

    s, d = y.shape
    parts = -(-s // SEED_PART)
    u = rng.random((r, 2 + int(np.log(r))))
    seeds = np.empty((r, d), y.dtype)
    # Above any squared distance between two rows, so that the first seed is drawn uniformly.
    distance = np.full(s, 8 * (y * y).sum(axis=1).max() + 1, y.dtype)
    for i in range(parts):
        a, b = (j * r // parts for j in (i, i + 1))
        part = slice(i * s // parts, (i + 1) * s // parts)
        rows = np.ascontiguousarray(y[part])
        far = distance[part]
        if a:
            far = nearest_centers(rows, np.zeros(d, y.dtype), seeds[:a])[1]
        seeds[a:b] = rows[spread_rows(rows, far, u[a:b])]
    return seeds.astype(np.float64)


def _filled(rows: Array, centers: Array) -> Clusters:
    """Assign all rows; centres without any move to the rows farthest away, or are dropped."""
    for left in range(REFILLS, -1, -1):
        labels, distance = _nearest(rows, centers)
        empty = np.flatnonzero(np.bincount(labels, minlength=len(centers)) == 0)
        far = _farthest(distance, len(empty)) if len(empty) and left else empty[:0]
        if not len(far):
            break
        centers[empty[: len(far)]] = rows[far]
    return _without_empty(centers, labels)


def _balanced(rows: Array, found: Clusters) -> Clusters:
    """Move rows until no cluster has more than twice the mean number of them."""
    from ..kernels.clustering import move_to_means

    centers, labels = found.centers, found.labels.copy()
    m, n = len(centers), len(rows)
    most = 2 * n // m
    wide = rows.astype(np.float64)
    far = ((wide - centers[labels]) ** 2).sum(axis=1)
    waiting = np.zeros(0, np.int64)
    counts = np.bincount(labels, minlength=m)
    # Those of a cluster in order of distance: what is beyond the limit waits for another one.
    while True:
        order = np.lexsort((far, labels))
        order = order[labels[order] >= 0]
        starts = np.cumsum(counts) - counts
        beyond = order[np.arange(len(order)) - starts[labels[order]] >= most]
        if not len(beyond):
            break
        labels[beyond] = -1
        counts = np.minimum(counts, most)
        room = np.flatnonzero(counts < most)
        waiting = np.sort(beyond)
        nearest_room, _ = _nearest(np.ascontiguousarray(rows[waiting]), centers[room])
        labels[waiting] = room[nearest_room]
        far[waiting] = ((wide[waiting] - centers[labels[waiting]]) ** 2).sum(axis=1)
        counts = np.bincount(labels, minlength=m)
    middle = rows.mean(axis=0, dtype=np.float64).astype(rows.dtype)
    counts = move_to_means(_writable(rows), middle, labels, centers)
    return Clusters(centers + middle, labels, counts)
