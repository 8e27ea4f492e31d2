"""The small core: a softmax of landmarks, and its pseudo-inverse, iterated or exact."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...base.arguments import as_array, as_real, check_count, check_finite

Array = NDArray[Any]

# Up to here an error of eps c in an eigenvalue of M M^T grows to 3.25^8 eps = 3e-12 at most.
GRAM_STEPS = 8


def small_softmax(queries: Array, keys: Array, scale: float, counts: Array | None = None) -> Array:
    """Return ``rowsoftmax(scale Qc Kc^T + 1 log(c)^T)`` (m_q, m_k) in float64.

    A core is small, and a pseudo-inverse of it needs digits.  ``counts`` (m_k,) are positive.
    """
    from ...kernels._threads import blas_single_thread

    with blas_single_thread(), np.errstate(over="ignore", invalid="ignore"):
        logits = queries.astype(np.float64) @ keys.astype(np.float64).T
        logits *= scale
    check_finite(logits, "scale * landmark queries @ landmark keys.T")
    if counts is not None:
        logits += np.log(counts)
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    return np.asarray(logits)


def iterate_inverse(m: ArrayLike, iterations: int = 6) -> Array:
    """Approximate the pseudo-inverse of one matrix by the published iteration.

    ``Z_0 = M^T / (|M|_1 |M|_inf)``, ``Z <- Z (13 I - X (15 I - X (7 I - X))) / 4``, ``X = M Z``.

    Parameters
    ----------
    m : array (r, r)
    iterations : int
        At least 0.

    Returns
    -------
    ndarray (r, r), float64

    Raises
    ------
    TypeError, ValueError
        For arrays that are no finite square matrix, and counts below 0.

    Notes
    -----
    With ``E = I - M Z`` one step is ``E <- (3 E^3 + E^4) / 4`` exactly: third order where it
    converges.  The start is scaled by the norms of this matrix alone; released codes take the
    largest of all heads, so that the result of one head depends on the others.

    Examples
    --------
    >>> iterate_inverse([[0.5]], 8).round(12).tolist()
    [[2.0]]
    """
    from ...kernels._threads import blas_single_thread

    matrix = _square(m)
    steps = check_iterations(iterations)
    z = np.ascontiguousarray(matrix.T) / _start_scale(matrix)
    unit = np.eye(len(matrix))
    with blas_single_thread():  # the same bits for any number of threads
        for _ in range(steps):
            x = matrix @ z
            z = 0.25 * z @ (13 * unit - x @ (15 * unit - x @ (7 * unit - x)))
    return np.asarray(z)


def filter_inverse(m: ArrayLike, iterations: int = 6) -> Array:
    """Evaluate the same iteration from one decomposition, in half the time.

    ``Z_j = W diag((1 - f^(j)(1 - s^2/c)) / s) P^T`` for ``M = P diag(s) W^T``,
    ``c = |M|_1 |M|_inf`` and ``f(e) = (3 e^3 + e^4) / 4``: the iteration is a spectral filter.
    It lets singular values below about ``3.25^(-j/2) sqrt(c)`` go to zero in place of inverting
    them.

    Parameters
    ----------
    m, iterations
        As for `iterate_inverse`.

    Returns
    -------
    ndarray (r, r), float64

    Notes
    -----
    ``Z_j = M^T g(M M^T / c) / c`` with ``g = prod_i (13 - 15 p_i + 7 p_i^2 - p_i^3) / 4`` and
    ``p_(i+1)`` the factor times ``p_i``, ``p_0`` the eigenvalue; nothing is divided by.  Few steps
    do not see what squaring singular values loses; many do, and then take these themselves.

    Examples
    --------
    >>> filter_inverse([[0.5]], 8).round(12).tolist()
    [[2.0]]
    """
    from ...kernels._threads import blas_single_thread

    matrix = _square(m)
    steps = check_iterations(iterations)
    scale = _start_scale(matrix)
    with blas_single_thread():  # the same bits for any number of threads
        if steps <= GRAM_STEPS:
            values, p = np.linalg.eigh((matrix @ matrix.T) / scale)
            gain = _filter(np.maximum(values, 0), steps) / scale
            return np.asarray(((matrix.T @ p) * gain) @ p.T)
        p, s, wt = np.linalg.svd(matrix)
        gain = s * _filter(s**2 / scale, steps) / scale
        return np.asarray((wt.T * gain) @ p.T)


def _filter(p: Array, steps: int) -> Array:
    """Return ``g(p) = (1 - f^(j)(1 - p)) / p`` without the division."""
    gain = np.ones_like(p)
    for _ in range(steps):
        factor = 0.25 * (13 - p * (15 - p * (7 - p)))
        gain, p = gain * factor, p * factor
    return gain


def pseudo_inverse(m: ArrayLike, ridge: float = 0.0, rcond: float | None = None) -> Array:
    """Return the pseudo-inverse with a cut-off, or the ridge inverse, of one matrix.

    Singular values up to ``rcond s_1`` give zero, others ``1/s``, or with a ridge
    ``s / (s^2 + ridge s_1^2)``, which is ``(M^T M + ridge s_1^2 I)^-1 M^T``.

    Parameters
    ----------
    m : array (r, r)
    ridge : float, default 0
        At least 0, relative to ``s_1^2``.
    rcond : float, optional
        In [0, 1); by default ``r eps`` of float64.

    Returns
    -------
    ndarray (r, r), float64

    Examples
    --------
    >>> pseudo_inverse([[0.5, 0.0], [0.0, 0.0]]).tolist()
    [[2.0, 0.0], [0.0, 0.0]]
    """
    matrix = _square(m)
    extra = check_fraction(ridge, "ridge", math.inf)
    cut = inverse_cut(len(matrix), rcond)
    return pseudo_inverse_of(matrix, extra, cut)


def pseudo_inverse_of(m: Array, ridge: float, cut: float) -> Array:
    """Return the same for any (a, b) matrix in float64, unchecked: zero up to ``cut s_1``."""
    from ...kernels._threads import blas_single_thread

    with blas_single_thread():  # the same bits for any number of threads
        p, s, wt = np.linalg.svd(m, full_matrices=False)
        high = s.max(initial=0.0)
        size = s**2 + ridge * high**2
        gain = np.divide(s, size, out=np.zeros_like(s), where=s > cut * high)
        return np.asarray((wt.T * gain) @ p.T)


def inverse_cut(r: int, rcond: float | None) -> float:
    """Return the share of s_1 up to which singular values of an (r, r) matrix count as zero."""
    if rcond is None:
        return r * float(np.finfo(np.float64).eps)
    return check_fraction(rcond, "rcond", 1.0)


def _start_scale(matrix: Array) -> float:
    """Return ``|M|_1 |M|_inf``, at least ``s_1^2``; 1 for a zero matrix."""
    size = np.abs(matrix)
    scale = size.sum(axis=0).max(initial=0.0) * size.sum(axis=1).max(initial=0.0)
    return float(scale) if scale > 0 else 1.0


def _square(m: ArrayLike) -> Array:
    matrix = np.ascontiguousarray(as_array(m, "m"), dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"m must be a square matrix, got shape {matrix.shape}; pass (r, r)")
    check_finite(matrix, "m")
    return matrix


def check_iterations(iterations: object) -> int:
    """Return a number of steps of at least 0."""
    if isinstance(iterations, numbers.Integral) and iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {int(iterations)}; the paper takes 6")
    remedy = "the paper takes 6, None is the exact pseudo-inverse"
    return check_count(iterations, "iterations", remedy, 0, " or None")


def check_fraction(value: object, label: str, below: float) -> float:
    """Return a real number in [0, below) as a float."""
    number = as_real(value, label, "0 is none")
    if not 0 <= number < below:
        raise ValueError(
            f"{label} must be finite and in [0, {below:g}), got {number}; 0 switches it off"
        )
    return number
