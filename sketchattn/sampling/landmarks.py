"""Landmarks: few rows that stand for all rows of a matrix, and which row each one stands for."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import as_array, as_integer, check_choice, check_finite, float_dtype
from ..base.floating import without_floating_errors

Array = NDArray[Any]

LAWS = ("random", "leverage")
# Rows whose nearest centres are found at a time: their scores stay in the second-level cache.
PIECE = 1024


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
def segment_means(x: ArrayLike, r: int) -> Array:
    """Return the means of r segments of consecutive rows; the first n mod r have one row more.

    Parameters
    ----------
    x : array (n, d)
    r : int
        In 1..n.

    Returns
    -------
    ndarray (r, d), float64

    Raises
    ------
    ValueError
        For an x that is no matrix, and r out of range.

    Examples
    --------
    >>> segment_means(np.array([[1.0], [3.0], [5.0]]), 2).tolist()
    [[2.0], [5.0]]
    """
    rows = _rows(x, r)
    size, longer = divmod(len(rows), r)
    split = longer * (size + 1)
    # Segments of one length are an axis of an array.
    d = rows.shape[1]
    first = rows[:split].reshape(longer, size + 1, d).mean(axis=1, dtype=np.float64)
    rest = rows[split:].reshape(r - longer, size, d).mean(axis=1, dtype=np.float64)
    return np.asarray(np.concatenate([first, rest]))


@without_floating_errors
def segment_labels(n: int, r: int) -> Array:
    """Return the segment of each of n rows: those whose means `segment_means` returns.

    Parameters
    ----------
    n : int
    r : int
        In 1..n.

    Returns
    -------
    ndarray (n,), int64

    Examples
    --------
    >>> segment_labels(5, 2).tolist()
    [0, 0, 0, 1, 1]
    """
    if not 1 <= r <= n:
        raise ValueError(f"r must be in 1..n = {n}, got {r}; {'raise' if r < 1 else 'lower'} r")
    return np.repeat(np.arange(r), _sizes(n, r))


@without_floating_errors
def nearest(x: ArrayLike, centers: ArrayLike) -> Array:
    """Return for each row the nearest of several centres, the first one of equals.

    ``argmin_c |x_i - c|^2 = argmax_c (x_i . c - |c|^2 / 2)``, one product of matrices.

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
    ``|x_i| |c - mean|``, which decides only between centres that are as good as each other.  The
    same bits for any number of threads.

    Examples
    --------
    >>> nearest(np.array([[0.0], [5.0], [9.0]]), [[1.0], [8.0]]).tolist()
    [0, 1, 1]
    """
    from ..kernels._threads import map_pieces

    rows, marks = _rows(x, None), np.asarray(as_array(centers, "centers"), np.float64)
    if marks.ndim != 2 or len(marks) < 1 or marks.shape[1] != rows.shape[1]:
        raise ValueError(
            f"centers must have shape (m, d) with m >= 1 and d = {rows.shape[1]}, got "
            f"{marks.shape}; give one row for each centre"
        )
    middle = marks.mean(axis=0)
    apart = marks - middle
    # x.(c - mean) - b_c with b_c = mean.(c - mean) + |c - mean|^2 / 2 ranks as -|x - c|^2 / 2.
    offset = (apart @ middle + 0.5 * (apart**2).sum(axis=1)).astype(rows.dtype)
    across = np.ascontiguousarray(apart.T, rows.dtype)

    def work(piece: slice) -> Array:
        scores = rows[piece] @ across
        scores -= offset
        return np.asarray(scores.argmax(axis=1))

    pieces = [slice(start, start + PIECE) for start in range(0, len(rows), PIECE)]
    return np.concatenate([np.zeros(0, np.int64), *map_pieces(work, pieces)]).astype(np.int64)


@without_floating_errors
def kmeans(
    x: ArrayLike, r: int, seed: int, *, steps: int = 8, sample: int | None = None
) -> Clusters:
    """Cluster rows around at most r centres by k-means++ and a few steps of Lloyd.

    Parameters
    ----------
    x : array (n, d)
    r : int
        In 1..n.
    seed : int
        In 0..2^32 - 1.
    steps : int, default 8
        Steps of Lloyd at most, at least 1.
    sample : int, optional
        Find the centres on this many rows, at least r, drawn without replacement; None, or n and
        more: on all rows.  All rows are then assigned to their nearest centre.

    Returns
    -------
    Clusters
        With fewer than r centres where a cluster would be empty.

    Raises
    ------
    TypeError, ValueError
        For an x that is no finite matrix, and numbers out of range.

    Notes
    -----
    Seeding and steps are scikit-learn's, on one thread, so that the result has the same bits for
    any number of them: the greedy k-means++ of Arthur and Vassilvitskii (2007) on all rows, the
    plain one (a candidate a centre) on a sample, where it takes most of the time.  Where all rows
    are used and at most r of them are distinct, these are the centres.

    Examples
    --------
    >>> found = kmeans([[0.0], [0.0], [4.0]], 3, seed=0)
    >>> sorted(found.centers.ravel().tolist()), sorted(found.counts.tolist())
    ([0.0, 4.0], [1, 2])
    """
    rows = _rows(x, r)
    check_finite(rows, "x")
    for label, value, low in (("seed", seed, 0), ("steps", steps, 1), ("sample", sample, r)):
        if value is None and label == "sample":
            continue
        if as_integer(value, label, f"it is at least {low}") < low:
            raise ValueError(f"{label} must be at least {low}, got {value}; raise {label}")
    if sample is not None and sample < len(rows):
        drawn = np.random.default_rng(seed).choice(len(rows), sample, replace=False)
        centers = _lloyd(rows[np.sort(drawn)], r, seed, steps, greedy=False)
    else:
        centers = _lloyd(rows, r, seed, steps, greedy=True)
        sample = None
    found = around(rows, centers)
    if sample is None and len(found.counts) < r:
        # Only rows that repeat leave clusters empty; then they are the centres, without rounding.
        distinct, first = np.unique(rows, axis=0, return_index=True)
        if len(distinct) <= r:
            centers = np.asarray(rows[np.sort(first)], np.float64)
            found = around(rows, centers)
    return found


def _lloyd(rows: Array, r: int, seed: int, steps: int, *, greedy: bool) -> Array:
    """Return r centres, float64 (r, d), perhaps equal ones."""
    import warnings

    from sklearn.cluster import KMeans, kmeans_plusplus
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    from ..kernels._threads import blas_single_thread

    # One thread: partial sums of several would be added in an order that depends on their number.
    with warnings.catch_warnings(), threadpool_limits(1, user_api="openmp"), blas_single_thread():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal rows make equal centroids
        start: Any = "k-means++"
        if not greedy:
            # In float64, whose distances scikit-learn computes without converting blocks.
            wide = rows.astype(np.float64)
            start, _ = kmeans_plusplus(wide, r, random_state=seed, n_local_trials=1)
            start = start.astype(rows.dtype)
        model = KMeans(r, init=start, n_init=1, max_iter=steps, random_state=seed)
        return np.asarray(model.fit(rows).cluster_centers_, np.float64)


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
    labels = nearest(x, centers)
    centers = np.asarray(as_array(centers, "centers"), np.float64)
    counts = np.bincount(labels, minlength=len(centers))
    kept = counts > 0
    place = np.cumsum(kept) - 1
    return Clusters(
        np.ascontiguousarray(centers[kept]), place[labels].astype(np.int64), counts[kept]
    )


@without_floating_errors
def chosen_rows(x: ArrayLike, r: int, law: str, rng: np.random.Generator) -> Array:
    """Draw r distinct rows, uniformly or by leverage, in drawing order.

    Parameters
    ----------
    x : array (n, d)
    r : int
        In 1..n.
    law : {"random", "leverage"}
        All rows alike, or in proportion to their leverage scores ``|e_j^T U|^2`` (U an orthonormal
        basis of the columns of x), one after the other without replacement.
    rng : numpy.random.Generator

    Returns
    -------
    ndarray (r,), int64
        The first of a larger draw with the same generator: draws are nested in r.

    Examples
    --------
    >>> chosen_rows(np.diag([1.0, 1.0, 0.0]), 2, "leverage", np.random.default_rng(0)).max() < 2
    np.True_
    """
    rows = _rows(x, r)
    check_choice(law, "law", LAWS)
    if law == "random":
        return np.asarray(rng.permutation(len(rows))[:r], np.int64)
    from .draws import gumbel_top
    from .leverage import leverage_scores

    scores = leverage_scores(rows)
    # Rows of zeros have none: they come last, uniformly.
    floor = float(np.finfo(np.float64).tiny)
    order, _ = gumbel_top(np.log(np.maximum(scores, floor)), r, rng)
    return np.asarray(order, np.int64)


@without_floating_errors
def pivoted_rows(x: ArrayLike, r: int, rng: np.random.Generator) -> Array:
    """Return the first r pivots of the column-pivoted QR factorisation of ``x^T``.

    Parameters
    ----------
    x : array (n, d)
    r : int
        In 1..n.
    rng : numpy.random.Generator
        Draws the rows beyond the numerical rank of x, uniformly among those left.

    Returns
    -------
    ndarray (r,), int64
        Distinct rows; nested in r.  Where r is at least the rank, they span all rows.

    Notes
    -----
    Businger and Golub (1965), by LAPACK; ``O(n d^2)``.  A diagonal entry of R up to
    ``max(n, d) eps`` times the first ends the pivots.

    Examples
    --------
    >>> x = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    >>> pivoted_rows(x, 2, np.random.default_rng(0)).tolist()
    [1, 2]
    """
    from scipy.linalg import qr

    from ..kernels._threads import blas_single_thread

    rows = _rows(x, r)
    check_finite(rows, "x")
    with blas_single_thread():  # the same bits for any number of threads
        upper, order = qr(rows.T.astype(np.float64), mode="r", pivoting=True, check_finite=False)
    size = np.abs(np.diag(upper))
    cut = max(rows.shape) * float(np.finfo(np.float64).eps) * size.max(initial=0.0)
    rank = int((size > cut).sum())
    rest = np.setdiff1d(np.arange(len(rows)), order[:rank])
    # The same stream whatever r, so that a larger r extends what a smaller one drew.
    return np.concatenate([order[:rank], rng.permutation(rest)])[:r].astype(np.int64)


def _rows(x: ArrayLike, r: int | None) -> Array:
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


def _sizes(n: int, r: int) -> Array:
    """Return the lengths of r segments of n rows."""
    return np.asarray(n // r + (np.arange(r) < n % r))
