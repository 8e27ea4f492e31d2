"""Formulas: decoders, maps and widths, total positivity, skeletons and their volumes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ...base.floating import without_floating_errors
from ..engine.arguments import Array, Int, ceil, log_quotient, matrix_of, real, whole

# Singular values up to this, relative to the largest, times the size of a matrix, are rounding.
_CUT = 4 * float(np.finfo(np.float64).eps)


@without_floating_errors
def numerical_rank(x: object) -> int:
    """Return the number of singular values above ``4 max(m, n) eps`` times the largest.

    Parameters
    ----------
    x : array (m, n)

    Examples
    --------
    >>> numerical_rank([[1.0, 2.0], [2.0, 4.0]])
    1
    """
    matrix = matrix_of(x, "x")
    sigma = np.linalg.svd(matrix, compute_uv=False)
    return int((sigma > _CUT * max(matrix.shape) * sigma.max(initial=0.0)).sum())


def _basis(x: Array) -> Array:
    """Return an orthonormal basis of the row space of x, as rows."""
    _, sigma, vt = np.linalg.svd(x, full_matrices=False)
    found: Array = vt[: int((sigma > _CUT * max(x.shape) * sigma.max(initial=0.0)).sum())]
    return found


# --- logits -------------------------------------------------------------------------------------


@without_floating_errors
def logit_decoder(keys: object, packed: object) -> Array:
    """Return ``W = K (P K)^+``, with which ``L = (scale Q (P K)^T) W^T`` if rank(P K) = rank(K).

    Parameters
    ----------
    keys : array (n_k, d)
        K.
    packed : array (r, d)
        P K, with any P (r, n_k).

    Returns
    -------
    ndarray (n_k, r), float64

    Notes
    -----
    The row space of P K lies in that of K; with the same dimension it is the same,
    ``(P K)^+ (P K)`` is the projector onto it, and ``W (P K) = K``.  Derived (T1).

    Examples
    --------
    >>> k = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    >>> logit_decoder(k, k[:2]).round(12).tolist()
    [[1.0, 0.0], [0.0, 1.0], [3.0, 2.0]]
    """
    k, p = matrix_of(keys, "keys"), matrix_of(packed, "packed")
    if k.shape[1] != p.shape[1]:
        raise ValueError(
            f"packed must have the width {k.shape[1]} of keys, got {p.shape[1]}; pass P @ K"
        )
    return np.asarray(k @ np.linalg.pinv(p, rcond=_CUT * max(p.shape)))


class Oblique(NamedTuple):
    """Hold maps with ``Q R T K^T = Q K^T``.

    Attributes
    ----------
    right : ndarray (d, d_in)
        R.
    left : ndarray (d_in, d)
        T.
    """

    right: Array
    left: Array


@without_floating_errors
def oblique_maps(queries: object, keys: object) -> Oblique:
    """Return R (d, d_in) and T (d_in, d) with ``Q R T K^T = Q K^T``, d_in = rank(Q K^T).

    ``Q K^T = M s N^T``, ``R = Q^+ M s``, ``T = N^T (K^T)^+``.

    Parameters
    ----------
    queries, keys : array (n_q, d), (n_k, d)

    Returns
    -------
    Oblique

    Notes
    -----
    No smaller d_in can do: a product has no larger rank than its factors.  Derived (T7).

    Examples
    --------
    >>> q, k = np.array([[1.0, 0.0, 0.0]]), np.array([[1.0, 0.0, 2.0]])
    >>> maps = oblique_maps(q, k)
    >>> (q @ maps.right @ maps.left @ k.T).round(12).tolist(), maps.right.shape
    ([[1.0]], (3, 1))
    """
    q, k = matrix_of(queries, "queries"), matrix_of(keys, "keys")
    (left, upper_q), (right, upper_k) = np.linalg.qr(q), np.linalg.qr(k)
    u, s, wt = np.linalg.svd(upper_q @ upper_k.T, full_matrices=False)
    rank = int((s > _CUT * max(q.shape + k.shape) * s.max(initial=0.0)).sum())
    m, nt = left @ u[:, :rank], wt[:rank] @ right.T
    cuts = [_CUT * max(x.shape) for x in (q, k)]
    first = np.linalg.pinv(q, rcond=cuts[0]) @ (m * s[:rank])
    return Oblique(first, nt @ np.linalg.pinv(k, rcond=cuts[1]).T)


@without_floating_errors
def exact_projector(queries: object, keys: object) -> Array:
    """Return orthonormal columns W (d, d_in) with ``Q W W^T K^T = Q K^T``, d_in = rank(Q K^T).

    The columns span the projection of the row space of K onto that of Q.

    Parameters
    ----------
    queries, keys : array (n_q, d), (n_k, d)

    Returns
    -------
    ndarray (d, d_in), float64

    Notes
    -----
    With X the row space of Q and W = P_X (row space of K), a subspace of X: for x in X and y in
    the row space of K, ``x.y = x.P_X y = x.P_W P_X y = x.P_W y``, the last since W is in X.
    Derived: an orthogonal projector needs no larger d_in than oblique maps do.

    Examples
    --------
    >>> q, k = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[3.0, 4.0], [1.0, 0.0]])
    >>> np.abs(exact_projector(q, k)).round(12).tolist()
    [[1.0], [0.0]]
    """
    q, k = matrix_of(queries, "queries"), matrix_of(keys, "keys")
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"keys must have the width {q.shape[1]} of queries, got {k.shape[1]}; pass one head"
        )
    rows, columns = _basis(q), _basis(k)
    # Cosines of the principal angles of the two row spaces: 0 are the directions without effect.
    u, cosines, _ = np.linalg.svd(rows @ columns.T, full_matrices=False)
    kept = u[:, cosines > 1e-12]
    return np.ascontiguousarray(rows.T @ kept)


@without_floating_errors
def jl_logit_width(
    n_q: ArrayLike, n_k: ArrayLike, eps: ArrayLike = 0.5, delta: ArrayLike = 0.1
) -> Int:
    """Return the d_in at which Gaussian projections keep all ``q.k`` to ``eps |q| |k|``.

    ``ceil(4 ln(4 n_q n_k/delta)/(eps^2 - eps^3))``, with probability ``1 - delta``.

    Parameters
    ----------
    n_q, n_k : int or array
    eps, delta : float or array
        In (0, 1).

    Notes
    -----
    ``P(|q^T R R^T k - q.k| > eps |q||k|) <= 4 exp(-(eps^2 - eps^3) d_in/4)`` for one pair, from the
    norms of the two vectors ``q/|q| +- k/|k|``, and all pairs.  Derived (T7).  At the sizes of
    heads it exceeds d, where no projection is needed: vacuous.

    Examples
    --------
    >>> jl_logit_width([512, 4096], [512, 4096], 0.25).tolist()
    [1380, 1735]
    """
    rows, columns = (whole(x, name).astype(np.float64) for x, name in ((n_q, "n_q"), (n_k, "n_k")))
    e, d = real(eps, "eps", 0, 1), real(delta, "delta", 0, 1)
    return ceil(4 * log_quotient(4 * rows * columns, d) / (e**2 - e**3))


class OutputFactors(NamedTuple):
    """Hold the factors of ``Ahat = U P``.

    Attributes
    ----------
    unpack : ndarray (n_q, r)
    pack : ndarray (r, n_k)
    """

    unpack: Array
    pack: Array


@without_floating_errors
def output_factors(output: object, values: object, r: int) -> OutputFactors:
    """Return the matrix of rank r with the best output, ``Ahat = O_r V^+``.

    ``|O - Ahat V|_F = (sum_{j>r} sigma_j(O)^2)^(1/2)`` if V has full column rank; 0 for r = d_v.

    Parameters
    ----------
    output : array (n_q, d_v)
        O = A V.
    values : array (n_k, d_v)
        V.
    r : int
        In 1..d_v.

    Returns
    -------
    OutputFactors

    Notes
    -----
    ``V^+ V = I``.  It needs O, hence A: a floor, no method; its rows are no distributions.  Derived
    (T4).

    Examples
    --------
    >>> v = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> o = np.array([[0.5, 0.5], [0.25, 0.75]])
    >>> found = output_factors(o, v, 2)
    >>> bool(np.allclose(found.unpack @ found.pack @ v, o))
    True
    """
    o, v = matrix_of(output, "output"), matrix_of(values, "values")
    if o.shape[1] != v.shape[1]:
        raise ValueError(
            f"values must have the width {o.shape[1]} of output, got {v.shape[1]}; pass V of A V"
        )
    count = int(whole(r, "r", 1, max(v.shape[1], 1)))
    u, sigma, wt = np.linalg.svd(o, full_matrices=False)
    pack = wt[:count] @ np.linalg.pinv(v, rcond=_CUT * max(v.shape))
    return OutputFactors(u[:, :count] * sigma[:count], pack)


# --- total positivity ---------------------------------------------------------------------------


@without_floating_errors
def exponential_determinant(queries: object, keys: object) -> float:
    """Return ``det exp(q_i k_j)`` for evenly spaced keys, as a Vandermonde determinant.

    ``exp(k_1 sum_i q_i) prod_{i<l} (e^{q_l h} - e^{q_i h})`` with ``k_j = k_1 + (j - 1) h``.

    Parameters
    ----------
    queries, keys : array (n,)
        Of width 1; the factor of the logits belongs to one of them.

    Returns
    -------
    float

    Notes
    -----
    Column j is ``e^{q_i k_1} (e^{q_i h})^(j-1)``.  Positive for increasing queries and h > 0.
    Derived (T2).

    Examples
    --------
    >>> q, k = np.linspace(-2, 2, 4), np.linspace(-1.5, 2.5, 4)
    >>> round(exponential_determinant(q, k), 6)
    3907.534355
    """
    q, k = np.asarray(queries, np.float64).ravel(), np.asarray(keys, np.float64).ravel()
    steps = np.diff(k)
    if len(q) != len(k) or len(q) < 1:
        raise ValueError(
            f"keys must be as many as queries, got {len(k)} and {len(q)}; the matrix is square"
        )
    if len(steps) and np.ptp(steps) > 1e-9 * np.abs(steps).max():
        raise ValueError(f"keys must be evenly spaced, got steps {steps}; use np.linspace")
    h = float(steps.mean()) if len(steps) else 0.0
    nodes = np.exp(q * h)
    i, j = np.triu_indices(len(q), 1)
    return float(np.exp(k[0] * q.sum()) * np.prod(nodes[j] - nodes[i]))


def minors(matrix: object) -> Iterator[Array]:
    """Yield all minors of order 1, 2, ... of a small matrix.

    Parameters
    ----------
    matrix : array (m, n)
        At most 10 rows and columns.

    Examples
    --------
    >>> [x.round(12).tolist() for x in minors([[1.0, 2.0], [3.0, 4.0]])]
    [[1.0, 2.0, 3.0, 4.0], [-2.0]]
    """
    a = _small(matrix)

    @without_floating_errors  # each is computed when it is asked for
    def of_order(r: int) -> Array:
        rows, columns = _subsets(a.shape[0], r), _subsets(a.shape[1], r)
        found = np.linalg.det(a[rows[:, None, :, None], columns[None, :, None, :]])
        return np.asarray(found).ravel()

    return map(of_order, range(1, min(a.shape) + 1))


def _small(matrix: object) -> Array:
    a = matrix_of(matrix, "matrix")
    if max(a.shape) > 10:
        raise ValueError(
            f"matrix must have at most 10 rows and columns to try all subsets, got shape {a.shape};"
            f" pass a part of it"
        )
    return a


def _subsets(n: int, r: int) -> Array:
    return np.array(list(combinations(range(n), r)), np.int64).reshape(-1, r)


# --- skeletons ----------------------------------------------------------------------------------


@without_floating_errors
def largest_volume(matrix: object, r: int) -> tuple[Array, Array]:
    """Return the rows I and columns J, r of each, of largest ``|det E[I, J]|``, by brute force.

    Parameters
    ----------
    matrix : array (m, n)
        At most 10 rows and columns.
    r : int
        In 1..min(m, n).

    Examples
    --------
    >>> [x.tolist() for x in largest_volume([[1.0, 2.0], [3.0, -4.0]], 1)]
    [[1], [1]]
    """
    a = _small(matrix)
    count = int(whole(r, "r", 1, min(a.shape)))
    rows, columns = _subsets(a.shape[0], count), _subsets(a.shape[1], count)
    volumes = np.abs(np.linalg.det(a[rows[:, None, :, None], columns[None, :, None, :]]))
    i, j = np.unravel_index(int(np.argmax(volumes)), volumes.shape)
    return rows[i], columns[j]


@without_floating_errors
def skeleton_residual(matrix: object, rows: ArrayLike, columns: ArrayLike) -> Array:
    """Return ``E - E[:, J] E[I, J]^-1 E[I, :]``.

    Parameters
    ----------
    matrix : array (m, n)
    rows, columns : int array (r,)
        I and J.

    Examples
    --------
    >>> skeleton_residual([[1.0, 2.0], [3.0, 4.0]], [1], [1]).tolist()
    [[-0.5, 0.0], [0.0, 0.0]]
    """
    a = matrix_of(matrix, "matrix")
    i, j = np.asarray(rows, np.int64), np.asarray(columns, np.int64)
    return np.asarray(a - a[:, j] @ np.linalg.solve(a[np.ix_(i, j)], a[i]))


class VolumeSampling(NamedTuple):
    """Hold all sets of k columns, their probabilities, and what each leaves.

    Attributes
    ----------
    subsets : ndarray (N, k)
    law : ndarray (N,)
        Proportional to ``det(M_S^T M_S)``.
    errors : ndarray (N,)
        ``|M - C C^+ M|_F^2``, C = M_S.
    mean : float
        ``(k + 1) e_{k+1}/e_k`` of the squared singular values: the expectation, exactly.
    bound : float
        ``(k + 1) |M - M_k|_F^2``.
    """

    subsets: Array
    law: Array
    errors: Array
    mean: float
    bound: float


@without_floating_errors
def volume_sampling(matrix: object, k: int) -> VolumeSampling:
    """Enumerate volume sampling of k columns.

    Parameters
    ----------
    matrix : array (m, n)
        At most 10 rows and columns, of rank k at least.
    k : int

    Returns
    -------
    VolumeSampling

    Notes
    -----
    ``det(M_S^T M_S) |m_j - C C^+ m_j|^2 = det(M_T^T M_T)`` for T = S and j; every T of k + 1
    columns arises k + 1 times, and ``sum_T det(M_T^T M_T) = e_{k+1}(sigma^2)``, the elementary
    symmetric polynomial.  Deshpande, Rademacher, Vempala and Wang (2006) for the bound.

    Examples
    --------
    >>> found = volume_sampling([[3.0, 0.0], [0.0, 1.0]], 1)
    >>> found.law.round(12).tolist(), found.errors.tolist(), round(found.mean, 12), found.bound
    ([0.9, 0.1], [1.0, 9.0], 1.8, 2.0)
    """
    a = _small(matrix)
    count = int(whole(k, "k", 1, a.shape[1]))
    sets = _subsets(a.shape[1], count)
    grams = a[:, sets].transpose(1, 2, 0) @ a[:, sets].transpose(1, 0, 2)
    volumes = np.maximum(np.linalg.det(grams), 0.0)
    errors = np.array([_residual(a, s) for s in sets])
    sigma = np.linalg.svd(a, compute_uv=False)
    # e_k of the squares: coefficients of prod_i (1 + sigma_i^2 t), all terms positive.
    e = np.array([1.0, *np.zeros(count + 1)])
    for x in sigma**2:
        e[1:] += x * e[:-1]
    if not e[count] > 0:
        raise ValueError(f"matrix must have rank k = {count} at least, got less; lower k")
    mean = (count + 1) * float(e[count + 1] / e[count])
    bound = (count + 1) * float(np.sum(sigma[count:] ** 2))
    return VolumeSampling(sets, volumes / volumes.sum(), errors, mean, bound)


def _residual(a: Array, columns: Array) -> float:
    c = a[:, columns]
    left = a - c @ (np.linalg.pinv(c) @ a)
    return float(np.sum(left * left))


@without_floating_errors
def strong_rrqr(matrix: object, k: int, f: float = 2.0) -> Array:
    """Choose k columns whose volume no exchange of two columns raises by more than a factor f.

    Parameters
    ----------
    matrix : array (m, n)
    k : int
        In 1..min(m, n).
    f : float
        At least 1; values near 1 need more exchanges.

    Returns
    -------
    ndarray (k,), int64

    Notes
    -----
    Gu and Eisenstat (1996): from the pivots of a column-pivoted QR, exchanges i in S with j not in
    S while ``(C^+ M)_ij^2 + (|m_j - C C^+ m_j| |row i of C^+|)^2 > f^2``, the square of the factor
    by which the volume grows.  Then no entry of ``C^+ M`` is larger than f, and
    ``|M - C C^+ M|_2 <= sqrt(1 + f^2 k (n - k)) sigma_{k+1}(M)``.

    Examples
    --------
    >>> strong_rrqr([[1.0, -0.8, 0.8], [0.0, 0.6, 0.6]], 2, f=1.01).tolist()
    [1, 2]
    """
    from scipy.linalg import qr

    a = matrix_of(matrix, "matrix")
    count, most = int(whole(k, "k", 1, min(a.shape))), float(real(f, "f", 1, low_open=False))
    chosen = np.sort(qr(a, mode="r", pivoting=True, check_finite=False)[1][:count])
    # Every exchange multiplies the volume by more than f; with f = 1 rounding must not cycle.
    limit = max(most, 1 + 1e-9) ** 2
    for _ in range(100 * count * a.shape[1]):
        inverse = np.linalg.pinv(a[:, chosen])
        within = inverse @ a
        left = np.linalg.norm(a - a[:, chosen] @ within, axis=0)
        growth = within**2 + np.outer(np.linalg.norm(inverse, axis=1), left) ** 2
        growth[:, chosen] = 0.0
        i, j = np.unravel_index(int(np.argmax(growth)), growth.shape)
        if not growth[i, j] > limit:
            break
        chosen = np.sort(np.r_[np.delete(chosen, i), j])
    return np.asarray(chosen, np.int64)


@without_floating_errors
def rrqr_factor(k: int, n: int, f: float = 2.0) -> float:
    """Return ``sqrt(1 + f^2 k (n - k))``, over ``sigma_{k+1}`` the error of a strong RRQR.

    Examples
    --------
    >>> rrqr_factor(1, 9, 1.0)
    3.0
    """
    return math.sqrt(1 + f * f * k * (n - k))
