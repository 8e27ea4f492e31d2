"""Landmarks: few rows that stand for all rows of a matrix, and which row each one stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import check_choice, check_finite
from ..base.floating import without_floating_errors
from .clustering import as_rows

Array = NDArray[Any]

LAWS = ("random", "leverage")


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
    rows = as_rows(x, r)
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
    rows = as_rows(x, r)
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

    rows = as_rows(x, r)
    check_finite(rows, "x")
    with blas_single_thread():  # the same bits for any number of threads
        upper, order = qr(rows.T.astype(np.float64), mode="r", pivoting=True, check_finite=False)
    size = np.abs(np.diag(upper))
    cut = max(rows.shape) * float(np.finfo(np.float64).eps) * size.max(initial=0.0)
    rank = int((size > cut).sum())
    rest = np.setdiff1d(np.arange(len(rows)), order[:rank])
    # The same stream whatever r, so that a larger r extends what a smaller one drew.
    return np.concatenate([order[:rank], rng.permutation(rest)])[:r].astype(np.int64)


def _sizes(n: int, r: int) -> Array:
    """Return the lengths of r segments of n rows."""
    return np.asarray(n // r + (np.arange(r) < n % r))
