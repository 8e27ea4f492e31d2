"""Leverage scores, exact and approximate, and what samples by them promise.

The score of row i of X is ``l_i = |U_i|^2`` for any orthonormal basis U of the range of X: how much
the row alone decides what the range is.  ``0 <= l_i <= 1`` and the scores sum to the rank.  Rows
drawn with ``p_i >= beta l_i/rank`` embed the range: with r draws (with replacement)
``P(|U^T S^T S U - I|_2 > eps) <= 2 q exp(-beta r eps^2/(3 q))``, q the rank.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import (
    as_array,
    as_integer,
    check_choice,
    check_count,
    check_finite,
    check_positive,
    float_dtype,
)
from ..base.draws import Rng, as_generator
from ..base.floating import without_floating_errors
from ..kernels._threads import blas_single_thread, map_pieces
from .draws import check_probabilities

if TYPE_CHECKING:
    from numpy.random import Generator

Array = NDArray[Any]

LEVERAGE_METHODS = ("auto", "gram", "qr", "svd")

# Rows a tile: 2048 x 64 float64 is 1 MB, which stays in cache between product and row norms.
TILE_ROWS = 2048
# Smallest eigenvalue of the Gram matrix over its largest.  The relative error of scores from one
# Cholesky factorisation is about u/ratio, with u = 1.1e-16; a second one on X R^{-1} removes it
# as long as the first leaves a well-conditioned matrix.
ONE_PASS_RATIO = 1e-4
TWO_PASS_RATIO = 1e-8


def as_matrix(x: ArrayLike, name: str = "x") -> Array:
    """Return a finite float32 or float64 matrix."""
    matrix = as_array(x, name)
    if matrix.dtype.kind in "iu":
        matrix = matrix.astype(np.float64)
    matrix = matrix.astype(float_dtype(matrix, name), copy=False)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must have two axes, got shape {matrix.shape}; pass a matrix")
    # The sum of finite entries is finite unless it overflows; one pass and no array of flags.
    if not np.isfinite(matrix.sum(dtype=np.float64)):
        check_finite(matrix, name)
    return matrix


def _cutoff(x: Array, sigma: float, tol: float | None) -> float:
    """Return the singular value up to which directions count as rounding of the data."""
    if tol is not None:
        return tol * sigma
    if x.dtype == np.float64:
        return float(max(x.shape)) * float(np.finfo(np.float64).eps) * sigma
    # Rounding every entry to float32 moves X by at most u |X|_F; eps = 2 u leaves a factor 2.
    size = float(np.linalg.norm(x.astype(np.float64)))
    return float(np.finfo(np.float32).eps) * size


def _over_tiles(work: Callable[[slice], Array], n: int) -> Iterator[Array]:
    """Yield ``work`` of all tiles of n rows, in order, on as many threads as kernels use."""
    tiles = [slice(start, start + TILE_ROWS) for start in range(0, n, TILE_ROWS)]
    # Starting threads costs what a few tiles cost.
    if len(tiles) >= 8:
        yield from map_pieces(work, tiles)
    else:
        with blas_single_thread():
            yield from map(work, tiles)


def _gram(x: Array, basis: Array | None = None) -> Array:
    """Return ``(X B)^T (X B)`` in float64."""
    width = x.shape[1] if basis is None else basis.shape[1]

    def work(part: slice) -> Array:
        tile = x[part].astype(np.float64)
        if basis is not None:
            tile = tile @ basis
        product: Array = tile.T @ tile
        return product

    total = np.zeros((width, width))
    for product in _over_tiles(work, len(x)):
        total += product
    return total


def _row_squares(x: Array, basis: Array) -> Array:
    """Return ``|X_i B|^2`` of all rows, float64 (n,), with products in the precision of B."""

    def work(part: slice) -> Array:
        tile = x[part].astype(basis.dtype, copy=False) @ basis
        squares: Array = np.einsum("ij,ij->i", tile, tile)
        return squares

    # The first entry is the answer for no rows.
    return np.concatenate([np.zeros(0), *_over_tiles(work, len(x))])


def _inverse_root(gram: Array) -> tuple[Array, float] | None:
    """Return ``R^{-1}`` of ``G = R^T R`` and G's smallest eigenvalue over the largest, or None.

    ``X R^{-1}`` has orthonormal columns for ``G = X^T X``; None where the ratio is too small.
    """
    from scipy.linalg import solve_triangular

    if not np.isfinite(gram).all():
        return None
    eigenvalues = np.linalg.eigvalsh(gram)
    # 1e-280: below, the entries of G have lost digits to underflow.
    if not eigenvalues[-1] > 1e-280 or eigenvalues[0] < TWO_PASS_RATIO * eigenvalues[-1]:
        return None
    upper = np.linalg.cholesky(gram).T
    inverse = solve_triangular(upper, np.eye(len(gram)), check_finite=False)
    return inverse, float(eigenvalues[0] / eigenvalues[-1])


def _whitening(x: Array) -> Array | None:
    """Return B (d, d) such that ``X B`` has orthonormal columns, from Gram matrices, or None."""
    if x.shape[0] < x.shape[1]:
        return None
    with blas_single_thread():
        with np.errstate(over="ignore", invalid="ignore"):
            first = _inverse_root(_gram(x))
        if first is None or first[1] >= ONE_PASS_RATIO:
            return None if first is None else first[0]
        # Cholesky QR, twice: the Gram matrix of X R1^{-1} is I up to u cond(X)^2.
        second = _inverse_root(_gram(x, first[0]))
        return None if second is None else first[0] @ second[0]


def _orthonormal_basis(x: Array, k: int | None, tol: float | None) -> Array:
    """Return orthonormal U (n, q) of the range of X, or of its k leading directions."""
    from scipy.linalg import qr, svd

    wide = x.astype(np.float64)
    with blas_single_thread():
        q, r = qr(wide, mode="economic", check_finite=False)
        u, s, _ = svd(r, full_matrices=False, check_finite=False)
    top = float(s[0]) if len(s) else 0.0
    rank = int(np.count_nonzero(s > _cutoff(x, top, tol)))
    if k is not None and k < rank:
        # Subspaces turn by about u sigma_1 / gap: a gap of rounding size leaves them undefined.
        if s[k - 1] - s[k] <= max(x.shape) * float(np.finfo(np.float64).eps) * top:
            warnings.warn(
                f"k must separate singular values, got k = {k} where sigma_k = {s[k - 1]:.9g} "
                f"and sigma_(k+1) = {s[k]:.9g} are equal; the scores depend on rounding, change k",
                stacklevel=3,
            )
        rank = k
    with blas_single_thread():
        basis: Array = q @ u[:, :rank]
    return basis


def _pivoted_basis(x: Array, tol: float | None) -> Array:
    """Return orthonormal U (n, q) from a QR factorisation with column pivoting."""
    from scipy.linalg import qr

    with blas_single_thread():
        q, r, _ = qr(x.astype(np.float64), mode="economic", pivoting=True, check_finite=False)
    size = np.abs(np.diag(r))
    top = float(size[0]) if len(size) else 0.0
    basis: Array = q[:, : int(np.count_nonzero(size > _cutoff(x, top, tol)))]
    return basis


def _squares(basis: Array) -> Array:
    scores: Array = np.minimum(np.einsum("ij,ij->i", basis, basis), 1.0)
    return scores


@without_floating_errors
def leverage_scores(
    x: ArrayLike, *, k: int | None = None, tol: float | None = None, method: str = "auto"
) -> Array:
    """Return the leverage scores ``l_i = |U_i|^2`` of the rows of a matrix.

    U is an orthonormal basis of the range of X, or of its k leading left singular vectors.

    Parameters
    ----------
    x : array (n, d)
        float32 or float64 (halves and integers are widened); computed in float64.
    k : int, optional
        Scores of the best rank-k subspace instead of the range, in 1..min(n, d).  A UserWarning
        says so where ``sigma_k = sigma_(k+1)``: that subspace is not defined.
    tol : float, optional
        Singular values up to ``tol sigma_1`` count as zero.  By default ``max(n, d) eps`` for
        float64, and for float32 ``eps |X|_F / sigma_1``, which covers the rounding of the entries.
    method : {"auto", "gram", "qr", "svd"}, default "auto"
        "svd" is a thin QR factorisation and the SVD of R.  "qr" is QR with column pivoting,
        truncated where the diagonal of R falls to the tolerance.  "gram" is Cholesky on
        ``X^T X``, the fastest; twice where one pass would lose digits, and refused where
        cond(X) > 1e4.  "auto" is "gram" where it is accurate, otherwise "svd".

    Returns
    -------
    ndarray, float64 (n,)
        In [0, 1], with the (numerical) rank as their sum.

    Raises
    ------
    TypeError, ValueError
        For shapes, k, tol and method out of range, and where "gram" is not accurate.

    Notes
    -----
    Invariant under ``X -> X T`` for invertible T; the same bits for any number of threads.  QR
    without pivoting and without truncation is wrong for rank-deficient matrices: it gives
    (1, 1, 0) in the example below.  Cost ``O(n d^2)``.  "gram" is matrix products only, which run
    several times faster than the same count of operations in a QR factorisation.

    Examples
    --------
    >>> leverage_scores([[1, 1], [1, 1], [0, 0]]).round(12).tolist()
    [0.5, 0.5, 0.0]
    """
    matrix = as_matrix(x)
    check_choice(method, "method", LEVERAGE_METHODS)
    if tol is not None:
        tol = check_positive(tol, "tol", below=1.0)
    if k is not None:
        k = as_integer(k, "k", "give a rank", " or None")
        if not 1 <= k <= min(matrix.shape):
            raise ValueError(
                f"k must be between 1 and min(n, d) = {min(matrix.shape)}, got {k}; "
                f"None is the whole range"
            )
        if method in ("gram", "qr"):
            raise ValueError(
                f"k must be None for method={method!r}, which has no singular vectors, got "
                f"{int(k)}; use method='svd'"
            )
        return _squares(_orthonormal_basis(matrix, int(k), tol))
    if min(matrix.shape) == 0:
        return np.zeros(len(matrix))
    if method == "qr":
        return _squares(_pivoted_basis(matrix, tol))
    # A tolerance above 1e-4 may cut singular values that the Gram matrix resolves.
    if method == "gram" or (method == "auto" and (tol is None or tol < 1e-4)):
        whitening = _whitening(matrix)
        if whitening is not None:
            return np.minimum(_row_squares(matrix, whitening), 1.0)
        if method == "gram":
            raise ValueError(
                "x must have full column rank and a condition number of at most 1e4 for "
                "method='gram', got a Gram matrix that is singular to working accuracy; "
                "use method='svd'"
            )
    return _squares(_orthonormal_basis(matrix, None, tol))


@without_floating_errors
def fast_sketch_rows(n: int, q: int, error: float = 0.1, delta: float = 0.1) -> int:
    """Return the sketch rows that keep n fast leverage scores within ``1 +- error``.

    The smallest r, at most n, with ``n P(|r/c - 1| > error) <= delta`` for
    ``c ~ chi^2_{r-q+1}``: the law of ``l~_i / l_i = r/c`` with a Gaussian sketch.

    Parameters
    ----------
    n : int
        Number of scores.
    q : int
        Rank of the matrix (its width is on the safe side).
    error : float
        Relative error of every score, in (0, 1).
    delta : float
        Probability that some score is worse, in (0, 1).

    Returns
    -------
    int

    Notes
    -----
    With ``M = (Pi U)^T (Pi U)``, ``r M ~ Wishart_q(r, I)`` and ``l~ = u^T M^{-1} u``; for fixed u
    ``|u|^2/(u^T (r M)^{-1} u) ~ chi^2_{r-q+1}`` (Muirhead 1982, Theorem 3.2.12).  A union bound
    over the rows is far below what embedding the whole range within ``error`` needs
    (about ``4 q/error^2`` rows).

    Examples
    --------
    >>> fast_sketch_rows(65536, 64)
    6255
    """
    from scipy.special import chdtr, chdtrc

    error = check_positive(error, "error", below=1.0)
    delta = check_positive(delta, "delta", below=1.0)
    for name, value in (("n", n), ("q", q)):
        check_count(value, name, "give a size")

    def fails(r: int) -> bool:
        # l~/l > 1 + error iff c < r/(1 + error); l~/l < 1 - error iff c > r/(1 - error).
        freedom = r - q + 1
        tail = chdtr(freedom, r / (1 + error)) + chdtrc(freedom, r / (1 - error))
        return bool(n * tail > delta)

    low, high = q - 1, q
    while high < n and fails(high):
        low, high = high, 2 * high
    if high >= n and fails(n):
        return int(n)
    high = min(high, n)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fails(middle) else (low, middle)
    return int(high)


@without_floating_errors
def leverage_scores_fast(
    x: ArrayLike,
    *,
    error: float = 0.1,
    delta: float = 0.1,
    rows: int | None = None,
    sketch: Any = "countsketch",
    projection: int | None = None,
    tol: float | None = None,
    rng: Rng = None,
) -> Array:
    """Return approximate leverage scores of the rows of a tall matrix from a sketch of it.

    ``Z = Pi1 X``, ``Z = Q R``, ``l~_i = |(X R^{-1} Pi2)_i|^2``.

    Parameters
    ----------
    x : array (n, d)
        float32 or float64; computed in its own precision, with the Gram matrix of Z in float64.
    error, delta : float
        Give ``rows`` by ``fast_sketch_rows(n, d, error, delta)``; in (0, 1).
    rows : int, optional
        Rows r1 of Pi1, at least d.
    sketch : str, LinearOperator, object with ``apply``, or array (r1, n)
        Pi1: the kind that ``sketchattn.sketches.make_sketch`` knows by this name, or a sketch
        itself (then ``rows``, ``error`` and ``delta`` do not matter).
    projection : int, optional
        Columns r2 of a Gaussian Pi2 (d, r2).  None leaves it out, which is cheaper and exact
        unless ``r2 < d``: an error of 10 % takes hundreds of columns.
    tol : float, optional
        As in ``leverage_scores``, for the singular values of Z.
    rng : None, int or numpy.random.Generator

    Returns
    -------
    ndarray, float64 (n,)
        Not clipped to [0, 1] and not rescaled.

    Notes
    -----
    Drineas, Magdon-Ismail, Mahoney and Woodruff, "Fast approximation of matrix coherence and
    statistical leverage" (2012), Algorithm 1, with Z factored by Cholesky where that is accurate.
    They sketch by a randomised Hadamard transform (``sketch="srht"``), for which no matrix is bad;
    the default costs less, and halves the scores of two rows of leverage near one that fall into
    the same row of Z.  Exact scores by "gram" take ``n d^2`` operations for the Gram matrix and
    ``2 n d^2`` for ``X R^{-1}``; the sketch replaces the first by one pass over X.  So these can be
    1.5 times as fast at most at any width where r2 < d is too inaccurate, and their gain lies
    where exact scores need a QR factorisation.
    If Pi1 distorts the range of X by gam, ``|U^T Pi1^T Pi1 U - I|_2 <= gam``, then
    ``l_i/(1+gam) <= l~_i <= l_i/(1-gam)`` without Pi2, and the normalised scores have
    ``leverage_quality >= leverage_approx_factor(gam, e)`` with an e-accurate Pi2.  ``rows`` follows
    the exact law for a Gaussian Pi1; other kinds come close to it where no row has a leverage
    near one.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((500, 3))
    >>> identity = np.eye(500)
    >>> bool(np.allclose(leverage_scores_fast(x, sketch=identity), leverage_scores(x)))
    True
    """
    matrix = as_matrix(x)
    n, d = matrix.shape
    if min(n, d) == 0:
        return np.zeros(n)
    if tol is not None:
        tol = check_positive(tol, "tol", below=1.0)
    if projection is not None:
        projection = check_count(projection, "projection", "None leaves it out", more=" or None")
    generator = as_generator(rng)
    small = _sketched(matrix, sketch, rows, error, delta, generator)
    basis = _whitening(small) if tol is None else None
    if basis is None:
        basis = _truncated_inverse(small, tol)
    if projection is not None:
        basis = basis @ (
            generator.standard_normal((basis.shape[1], projection)) / math.sqrt(projection)
        )
    return _row_squares(matrix, basis.astype(matrix.dtype))


def _sketched(
    x: Array, sketch: Any, rows: int | None, error: float, delta: float, rng: Generator
) -> Array:
    """Return ``Pi1 X`` for a named, ready or dense sketch."""
    n, d = x.shape
    if isinstance(sketch, str):
        from ..sketches.base import make_sketch

        if rows is None:
            rows = max(d, fast_sketch_rows(n, d, error, delta))
        elif as_integer(rows, "rows", "give one", " or None") < d:
            raise ValueError(
                f"rows must be at least the width d = {d} of x, got {int(rows)}; raise rows"
            )
        small = make_sketch(sketch, int(rows), n, rng, dtype=x.dtype).apply(x)
    else:
        operator = sketch if hasattr(sketch, "shape") else as_array(sketch, "sketch")
        if len(operator.shape) != 2 or operator.shape[1] != n:
            raise ValueError(
                f"sketch must have shape (r1, n) with n = {n}, got {tuple(operator.shape)}; "
                f"make it for the rows of x"
            )
        small = operator.apply(x) if hasattr(operator, "apply") else operator @ x
    return np.asarray(small)


def _truncated_inverse(z: Array, tol: float | None) -> Array:
    """Return ``V_q diag(1/s_q)`` of ``Z = U diag(s) V^T`` without directions of rounding size."""
    from scipy.linalg import svd

    with blas_single_thread():
        _, s, vt = svd(z.astype(np.float64), full_matrices=False, check_finite=False)
    kept = s > _cutoff(z, float(s[0]), tol)
    inverse: Array = vt[kept].T / s[kept]
    return inverse


@without_floating_errors
def leverage_quality(p: ArrayLike, leverage: ArrayLike) -> float:
    """Return ``beta = min_i p_i q / l_i`` over ``l_i > 0``, with q the sum of the scores.

    The largest beta with ``p_i >= beta l_i/q``: sampling from p needs 1/beta times the draws
    that sampling from the scores themselves needs.

    Parameters
    ----------
    p : array (n,)
        Probabilities with sum 1.
    leverage : array (n,)
        Leverage or ridge leverage scores, not all zero.

    Returns
    -------
    float
        In [0, 1].

    Examples
    --------
    >>> leverage_quality([0.5, 0.5], [1.0, 0.5])
    0.75
    """
    scores = np.asarray(_scores(leverage))
    law = check_probabilities(p, len(scores))
    seen = scores > 0
    if not seen.any():
        raise ValueError("leverage must have a positive score, got none; give those of a matrix")
    return float(np.min(law[seen] / scores[seen]) * scores.sum())


def _scores(leverage: ArrayLike) -> Array:
    scores = as_array(leverage, "leverage")
    if scores.dtype.kind not in "fiu":
        raise TypeError(f"leverage must hold real numbers, got {scores.dtype}; give scores")
    if scores.ndim != 1:
        raise ValueError(f"leverage must have shape (n,), got {scores.shape}; give a score a row")
    check_finite(scores, "leverage")
    if len(scores) and scores.min() < 0:
        raise ValueError(f"leverage must not be negative, got {scores.min():.6g}; give scores")
    return scores.astype(np.float64)


@without_floating_errors
def leverage_approx_factor(gam: float, e: float = 0.0) -> float:
    """Return ``beta = (1-gam)(1-e)/((1+gam)(1+e))`` that fast scores keep after normalisation.

    Parameters
    ----------
    gam : float
        Distortion of the range by Pi1, in [0, 1).
    e : float
        Relative error of all squared norms under Pi2, in [0, 1); 0 without Pi2.

    Examples
    --------
    >>> round(leverage_approx_factor(0.5), 12)
    0.333333333333
    """
    for name, value in (("gam", gam), ("e", e)):
        if not 0.0 <= float(value) < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {float(value):.6g}; change {name}")
    return (1 - gam) * (1 - e) / ((1 + gam) * (1 + e))


@without_floating_errors
@blas_single_thread()
def css_relative_error(x: ArrayLike, columns: ArrayLike, k: int) -> float:
    """Return ``|X - C C^+ X|_F / |X - X_k|_F`` of a column subset.

    Parameters
    ----------
    x : array (m, n)
    columns : int array (c,), or array (m, c)
        Indices of the chosen columns, or C itself.
    k : int
        Rank of the best approximation ``X_k`` to compare with, in 1..min(m, n).

    Returns
    -------
    float
        inf if ``X = X_k`` but C does not span it, and 1 if both errors are zero.  Errors up to
        ``max(m, n) eps |X|_F`` count as zero.

    Examples
    --------
    >>> import numpy as np
    >>> round(css_relative_error(np.diag([2.0, 1.0, 1.0]), [0], 1), 12)
    1.0
    """
    matrix = as_matrix(x).astype(np.float64)
    chosen = as_array(columns, "columns")
    if chosen.ndim == 1 and len(chosen) == 0:
        chosen = chosen.astype(np.int64)
    if chosen.ndim == 1:
        if chosen.dtype.kind not in "iu":
            raise TypeError(f"columns must hold indices, got {chosen.dtype}; give integers")
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < matrix.shape[1]:
            raise ValueError(
                f"columns must be in 0..{matrix.shape[1] - 1}, got "
                f"{int(chosen.min())}..{int(chosen.max())}; give indices of columns of x"
            )
        subset = matrix[:, chosen]
    else:
        subset = as_matrix(chosen, "columns").astype(np.float64)
        if subset.shape[0] != len(matrix):
            raise ValueError(
                f"columns must have the {len(matrix)} rows of x, got {subset.shape[0]}; "
                f"pass a matrix C of chosen columns"
            )
    k = as_integer(k, "k", "give a rank")
    if not 1 <= k <= min(matrix.shape):
        raise ValueError(
            f"k must be between 1 and min(m, n) = {min(matrix.shape)}, got {k}; change k"
        )
    if min(subset.shape):
        basis = _orthonormal_basis(subset, None, None)
        residual = float(np.linalg.norm(matrix - basis @ (basis.T @ matrix)))
    else:
        residual = float(np.linalg.norm(matrix))
    best = float(np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[int(k) :]))
    zero = max(matrix.shape) * float(np.finfo(np.float64).eps) * float(np.linalg.norm(matrix))
    if best <= zero:
        return 1.0 if residual <= zero else math.inf
    return residual / best
