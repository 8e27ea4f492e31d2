"""The gradient of Linformer: that of attention to compressed keys, spread by E^T and F^T."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .projections import Projection, pool_starts

Array = NDArray[Any]


def max_pool_transpose(x: Array, y: Array, keep: Array | None) -> Array:
    """Return Y (r, m) at the places of the maxima of the blocks of X (n, m), the first of equals.

    Examples
    --------
    >>> x = np.array([[1.0], [5.0], [2.0], [2.0]])
    >>> max_pool_transpose(x, np.array([[7.0], [9.0]]), None).ravel().tolist()
    [0.0, 7.0, 9.0, 0.0]
    """
    n, starts = len(x), pool_starts(len(x), len(y))
    shown = x if keep is None else np.where(keep[:, None], x, -np.inf)
    top = np.maximum.reduceat(shown, starts[:-1], axis=0)
    hit = shown == np.repeat(top, np.diff(starts), axis=0)
    place = np.where(hit, np.arange(n)[:, None], n)
    first = np.minimum.reduceat(place, starts[:-1], axis=0)
    out = np.zeros(x.shape)
    block, channel = np.nonzero(np.isfinite(top))
    out[first[block, channel], channel] = y[block, channel]
    return out


def convolve_transpose(weights: Array, y: Array, n: int, keep: Array | None) -> Array:
    """Return (n, d) of Y (r, m): the transpose of `projections.convolve`.

    Examples
    --------
    >>> convolve_transpose(np.array([1.0, 2.0]), np.array([[3.0], [5.0]]), 4, None).ravel().tolist()
    [3.0, 6.0, 5.0, 10.0]
    """
    formula = {1: "t,bi->bti", 2: "ti,bi->bti", 3: "tij,bj->bti"}[weights.ndim]
    out = np.einsum(formula, weights.astype(np.float64), y).reshape(n, -1)
    return out if keep is None else np.where(keep[:, None], out, 0.0)


def spread(
    projection: Projection | None, weights: Array | None, x: Array, y: Array, keep: Array | None
) -> Array:
    """Return what a cotangent Y (r, m) of the compressed X (n, m) is at X.

    ``projection`` is E or F where it is a matrix; else ``weights`` are those of a convolution, and
    None stands for maxima.
    """
    if projection is not None:
        return projection.apply_transpose(y)
    if weights is None:
        return max_pool_transpose(x, y, keep)
    return convolve_transpose(weights, y, len(x), keep)
