"""Singular values of attention matrices: LAPACK on small ones, block Krylov on operators."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.head import Head
from ..kernels._threads import blas_single_thread, product
from .softmax import exact_of

Array = NDArray[Any]

# Smaller sides up to this go to LAPACK: 2048 x 2048 takes seconds and 32 MB in float64.
DENSE_LIMIT = 2048


def _orthonormal(x: Array, basis: Array | None = None) -> Array:
    """Return an orthonormal basis of ``x`` minus its part in ``basis``; null directions drop.

    What is left of ``x`` at the size of its rounding is noise, not a direction: it drops too.
    """
    from scipy.linalg import qr

    largest = float(np.max(np.abs(x), initial=0.0))
    if largest == 0.0 or not np.isfinite(largest):
        return x[:, :0]
    x = x / largest  # no overflow or underflow of squares
    size = np.linalg.norm(x)
    if basis is not None and basis.shape[1] > 0:
        x = x - basis @ (basis.T @ x)
    factor, r, _ = qr(x, mode="economic", pivoting=True)
    q: Array = factor[:, np.abs(np.diag(r)) > 1e-12 * size]
    if basis is not None and basis.shape[1] and q.shape[1]:
        # Rounding of the first pass, at most 1e-4 of these unit vectors, goes in a second one.
        q = qr(q - basis @ (basis.T @ q), mode="economic")[0]
    return q


@blas_single_thread()
def block_krylov(
    operator: Any,
    rank: int,
    *,
    tolerance: float = 1e-9,
    block: int | None = None,
    max_iterations: int = 60,
    seed: int = 0,
) -> tuple[Array, Array, Array]:
    """Return the largest singular triplets of an operator by randomized block Krylov iteration.

    Builds an orthonormal basis W of ``[X, (M^T M) X, (M^T M)^2 X, ...]`` and takes the singular
    values of ``M W``, the best that the subspace contains.

    Parameters
    ----------
    operator : LinearOperator (m, n)
        Products with float64 blocks.
    rank : int
        Number of triplets.
    tolerance : float
        Stop when no wanted singular value moved by more than this, relative to the largest.
    block : int, optional
        Columns of X, by default ``rank + 8``, at least 16: a product with the exact matrix costs
        little more for 16 columns than for one.
    max_iterations : int
        Products with ``M`` at most.
    seed : int
        Of the Gaussian start; the result depends on it only within the tolerance.

    Returns
    -------
    u : ndarray (m, rank)
    s : ndarray (rank,), descending
    vt : ndarray (rank, n)

    Raises
    ------
    RuntimeError
        If the tolerance is not reached.

    Notes
    -----
    Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate singular
    value decomposition" (2015), Algorithm 2, with full reorthogonalisation and a stopping rule.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.sparse.linalg import aslinearoperator
    >>> block_krylov(aslinearoperator(np.diag([3.0, 2.0, 1.0])), 1)[1].round(6).tolist()
    [3.0]
    """
    m, n = operator.shape
    rank = min(rank, m, n)
    width = min(max(rank + 8, 16) if block is None else block, n)
    rng = np.random.default_rng(seed)
    fresh = _orthonormal(rng.standard_normal((n, width)))
    basis = np.empty((n, 0))
    image = np.empty((m, 0))
    previous: Array | None = None
    change = np.inf
    for _ in range(max_iterations):
        basis = np.concatenate([basis, fresh], axis=1)
        image = np.concatenate([image, np.asarray(operator @ fresh, np.float64)], axis=1)
        # sigma(M W) from the small Gram matrix would lose half of the digits: take R of a QR.
        left, r = np.linalg.qr(image)
        u, s, wt = np.linalg.svd(r, full_matrices=False)
        top = s[:rank]
        if previous is not None and len(previous) == len(top) == rank:
            change = float(np.max(np.abs(top - previous), initial=0.0))
        if change <= tolerance * max(float(s[0]), 1e-300) or basis.shape[1] >= n:
            return left @ u[:, :rank], top, wt[:rank] @ basis.T
        previous = top
        last = image[:, -fresh.shape[1] :]
        last = last / max(float(np.max(np.abs(last))), 1e-300)  # its span is all that counts
        fresh = _orthonormal(np.asarray(operator.T @ last, np.float64), basis)
        if fresh.shape[1] == 0:  # the subspace is invariant: nothing can change any more
            return left @ u[:, :rank], top, wt[:rank] @ basis.T
    raise RuntimeError(
        f"singular values must settle within {max_iterations} iterations to {tolerance}, got a "
        f"last change of {change:.3g}; raise block or tolerance"
    )


def spectral_norm(operator: Any, *, tolerance: float = 1e-8) -> float:
    """Return the largest singular value of an operator in float64.

    Parameters
    ----------
    operator : LinearOperator (n_q, n_k)
    tolerance : float
        Relative; see ``block_krylov``.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.sparse.linalg import aslinearoperator
    >>> round(spectral_norm(aslinearoperator(np.diag([3.0, 2.0]))), 9)
    3.0
    """
    if min(operator.shape) == 0:
        return 0.0
    return float(block_krylov(operator, 1, tolerance=tolerance)[1][0])


@blas_single_thread()
def dense_spectral_norm(x: Array) -> float:
    """Return the largest singular value of a dense matrix from its smaller Gram matrix.

    The relative error of the largest eigenvalue of ``X^T X`` is a small multiple of the unit
    roundoff, so nothing is lost for the norm (small singular values would be).
    """
    from scipy.linalg import eigh

    x = np.asarray(x, np.float64)
    size = float(np.max(np.abs(x), initial=0.0))
    if size == 0.0:
        return 0.0
    x = x / size  # no overflow or underflow of the squares
    x = x if x.shape[0] >= x.shape[1] else x.T
    gram = product(x.T, x)
    last = gram.shape[0] - 1
    top = eigh(gram, eigvals_only=True, subset_by_index=[last, last])
    return size * float(np.sqrt(max(top[0], 0.0)))


def exact_spectral_norm(problem: Head) -> float:
    """Return ``|A|_2`` of a problem in float64, computed once."""

    def compute() -> float:
        wide = exact_of(problem.astype(np.float64))
        if min(wide.shape) <= DENSE_LIMIT and wide.shape[0] * wide.shape[1] <= DENSE_LIMIT**2:
            return dense_spectral_norm(wide.to_dense())
        return spectral_norm(wide)

    return problem.cached("spectral_norm", compute)


def _frozen(u: Array, s: Array, vt: Array) -> tuple[Array, Array, Array]:
    """Return the arrays read-only: they are kept, and handed out many times."""
    for x in (u, s, vt):
        x.flags.writeable = False
    return u, s, vt


@blas_single_thread()
def _dense_svd(problem: Head) -> tuple[Array, Array, Array]:
    from scipy.linalg import svd

    def compute() -> tuple[Array, Array, Array]:
        dense = exact_of(problem.astype(np.float64)).to_dense()
        u, s, vt = svd(dense, full_matrices=False, overwrite_a=True, check_finite=False)
        return _frozen(u, s, vt)

    return problem.cached("svd", compute)


def singular_values(problem: Head) -> Array:
    """Return all singular values of A (min(n_q, n_k),), descending, float64.

    Raises
    ------
    ValueError
        If the smaller side exceeds 2048: use ``truncated_svd``.
    """
    if min(problem.n_q, problem.n_k) > DENSE_LIMIT:
        raise ValueError(
            f"min(n_q, n_k) must be at most {DENSE_LIMIT} for all singular values, got "
            f"{min(problem.n_q, problem.n_k)}; use truncated_svd for the largest ones"
        )
    return _dense_svd(problem)[1]


def truncated_svd(problem: Head, rank: int) -> tuple[Array, Array, Array]:
    """Return the ``rank`` largest singular triplets ``(u, s, vt)`` of A in float64.

    The decomposition is computed once a problem; for large ones a larger rank computes again.
    """
    if min(problem.n_q, problem.n_k) <= DENSE_LIMIT:
        u, s, vt = _dense_svd(problem)
        return u[:, :rank], s[:rank], vt[:rank]
    cache: dict[int, tuple[Array, Array, Array]] = problem.cached("truncated_svd", dict)
    if not cache or max(cache) < rank:
        cache.clear()
        found = block_krylov(exact_of(problem.astype(np.float64)), rank, tolerance=1e-7)
        cache[rank] = _frozen(*found)
    u, s, vt = next(iter(cache.values()))
    return u[:, :rank], s[:rank], vt[:rank]
