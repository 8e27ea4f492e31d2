"""Singular values of attention matrices: LAPACK on small ones, block Krylov on operators."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..base.head import Head
from ..kernels._threads import blas_single_thread, product
from .softmax import exact_of
from .solve import normalizer, solve
from .steep import is_steep

Array = NDArray[Any]
T = TypeVar("T")

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
    steps = _krylov(
        operator.shape, rank, tolerance, block=block, max_iterations=max_iterations, seed=seed
    )

    def multiply(asked: list[Asked]) -> list[Array]:
        (x,) = asked
        return [np.asarray((operator.T if x.transposed else operator) @ x.block, np.float64)]

    return _run([steps], multiply)[0]


class Asked(NamedTuple):
    """Ask for the product of a matrix, or of its transpose, with a block (n, w) or (m, w).

    In single precision if ``rough``; ``of`` is the number of who asks.
    """

    block: Array
    transposed: bool = False
    rough: bool = False
    of: int = 0


# What asks for products, is sent them, and returns a result at the end.
Steps = Generator[Asked, Array, T]


def _run(started: Sequence[Steps[T]], multiply: Callable[[list[Asked]], list[Array]]) -> list[T]:
    """Run several at the same time and return their results.

    What they ask for that is alike is handed to ``multiply`` together; rough products come first,
    so that who needs fewer of them waits for the others.
    """
    results: dict[int, T] = {}
    waiting: dict[int, Asked] = {}

    def go_on(which: int, given: Array | None) -> None:
        try:
            step = started[which]
            waiting[which] = next(step) if given is None else step.send(given)
        except StopIteration as stop:
            results[which] = stop.value

    for which in range(len(started)):
        go_on(which, None)
    while waiting:
        kind = max((x.rough, not x.transposed) for x in waiting.values())
        chosen = [i for i, x in waiting.items() if (x.rough, not x.transposed) == kind]
        products = multiply([waiting.pop(i)._replace(of=i) for i in chosen])
        for which, given in zip(chosen, products, strict=True):
            go_on(which, given)
    return [results[which] for which in range(len(started))]


def _krylov(
    shape: tuple[int, int],
    rank: int,
    tolerance: float,
    *,
    block: int | None = None,
    max_iterations: int = 60,
    seed: int = 0,
    start: Array | None = None,
    rough: bool = False,
) -> Steps[tuple[Array, Array, Array]]:
    """Take the steps of ``block_krylov``, from an orthonormal ``start`` (n, w) if it is given.

    A rough run, of products in single precision, hands on as many triplets as its block has, and
    what it has found when the iterations are over.
    """
    m, n = shape
    rank = min(rank, m, n)
    width = min(max(rank + 8, 16) if block is None else block, n)
    rng = np.random.default_rng(seed)
    fresh = _orthonormal(rng.standard_normal((n, width))) if start is None else start
    most = width if rough else rank
    basis = np.empty((n, 0))
    image = np.empty((m, 0))
    previous: Array | None = None
    change = np.inf
    for iteration in range(max_iterations):
        basis = np.concatenate([basis, fresh], axis=1)
        image = np.concatenate([image, (yield Asked(fresh, False, rough))], axis=1)
        # sigma(M W) from the small Gram matrix would lose half of the digits: take R of a QR.
        left, r = np.linalg.qr(image)
        u, s, wt = np.linalg.svd(r, full_matrices=False)
        top = s[:rank]
        if previous is not None and len(previous) == len(top) == rank:
            change = float(np.max(np.abs(top - previous), initial=0.0))
        over = rough and iteration + 1 == max_iterations
        if over or change <= tolerance * max(float(s[0]), 1e-300) or basis.shape[1] >= n:
            return left @ u[:, :most], s[:most], wt[:most] @ basis.T
        previous = top
        last = image[:, -fresh.shape[1] :]
        last = last / max(float(np.max(np.abs(last))), 1e-300)  # its span is all that counts
        fresh = _orthonormal((yield Asked(last, True, rough)), basis)
        if fresh.shape[1] == 0:  # the subspace is invariant: nothing can change any more
            return left @ u[:, :most], s[:most], wt[:most] @ basis.T
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


# Where a rough run stops: products in single precision are right to about 1e-6 of the norm.
ROUGH, ROUGH_ITERATIONS = 1e-6, 12


def _largest(shape: tuple[int, int], tolerance: float, rough: bool) -> Steps[float]:
    """Take the steps to the largest singular value, the first of them in single precision.

    Those find a subspace only; singular values are those of the products with it in float64.
    Vectors v and ``u = M v / sigma`` with the residual ``R = M^T U - V Sigma`` of the p largest
    triplets leave an error of at most ``|R|^2 / (sigma_1 - sigma')`` in ``sigma_1``, with the
    largest singular value outside of their span as sigma', here that of the next triplet: errors
    of vectors count by their squares, so that 1e-6 of the first steps is 1e-12.  Where no p
    shows that the tolerance is reached, iterations in float64 go on from there.
    """
    start = None
    if rough:
        found = yield from _krylov(shape, 1, ROUGH, max_iterations=ROUGH_ITERATIONS, rough=True)
        basis = _orthonormal(found[2].T)
        if basis.shape[1]:
            left, r = np.linalg.qr((yield Asked(basis)))
            u, s, wt = np.linalg.svd(r, full_matrices=False)
            back = yield Asked(left @ u, True)
            residual = back - basis @ (wt.T * s)
            for p in range(1, len(s)):
                error = dense_spectral_norm(residual[:, :p]) ** 2
                if error <= tolerance * s[0] * (s[0] - s[p]):
                    return float(s[0])
            start = _orthonormal(back)
            start = start if start.shape[1] else None
    return float((yield from _krylov(shape, 1, tolerance, start=start))[1][0])


class _Exact:
    """Multiply the exact matrix, in float64 and, where that is of use, in float32."""

    def __init__(self, problem: Head, wide: Head | None = None) -> None:
        self.wide = exact_of(problem.astype(np.float64) if wide is None else wide)
        self.narrow: Head | None = None
        if not is_steep(self.wide.problem):
            with suppress(ValueError):  # beyond the range of float32
                self.narrow = problem.astype(np.float32)

    def multiply(self, asked: Asked) -> Array:
        """Return ``A X`` or ``A^T Y``, float64."""
        if not asked.rough or self.narrow is None:
            return np.asarray((self.wide.T if asked.transposed else self.wide) @ asked.block)
        block = np.ascontiguousarray(asked.block, np.float32)
        if not asked.transposed:
            return np.asarray(solve(self.narrow, block)[0], np.float64)
        from ..kernels.softmax import transposed_product

        mask, (q, k, _) = self.narrow.key_mask, self.narrow.arrays
        out = transposed_product(
            q,
            k,
            block,
            normalizer(self.wide.problem).astype(np.float32),
            scale=self.narrow.scale,
            first=self.narrow.offset,
            right=0 if self.narrow.causal else None,
            key_mask=None if mask is None else mask[None].copy(),
        )
        return out.astype(np.float64)


@blas_single_thread()
def difference_norm(
    problem: Head, ahat: Any, *, tolerance: float = 1e-8, wide: Head | None = None
) -> float:
    """Return ``|Ahat - A|_2`` in float64, of an approximation that is never formed.

    Unless it is known, ``|A|_2`` is computed beside it, and kept: one pass over A serves both.

    Parameters
    ----------
    problem : Head
    ahat : LinearOperator (n_q, n_k)
    tolerance : float
        Relative; see ``block_krylov``.
    wide : Head, optional
        The problem in float64, where one is at hand whose normalisers are known.
    """
    exact = _Exact(problem, wide)
    shape = exact.wide.shape
    if min(shape) == 0:
        return 0.0
    rough = exact.narrow is not None

    def multiply(asked: list[Asked]) -> list[Array]:
        blocks = [x.block for x in asked]
        whole = exact.multiply(asked[0]._replace(block=np.concatenate(blocks, axis=1)))
        parts = np.split(whole, np.cumsum([x.shape[1] for x in blocks])[:-1], axis=1)
        made = []
        for x, part in zip(asked, parts, strict=True):
            if x.of == 0:
                mine = np.asarray((ahat.T if x.transposed else ahat) @ x.block, np.float64)
                part = mine - part
            made.append(part)
        return made

    found: list[float] = []

    def both() -> float:
        found.extend(_run([_largest(shape, tolerance, rough) for _ in range(2)], multiply))
        return found[1]

    if not is_small(shape):
        problem.cached("spectral_norm", both)
    if not found:
        found = _run([_largest(shape, tolerance, rough)], multiply)
    return found[0]


def is_small(shape: tuple[int, int]) -> bool:
    """Say whether a matrix goes to LAPACK."""
    return min(shape) <= DENSE_LIMIT and shape[0] * shape[1] <= DENSE_LIMIT**2


# Matrices with a smaller side than this have their Gram matrix decomposed, in less than a
# millisecond.  Of larger ones so many vectors are tried before.
LANCZOS_LEAST, LANCZOS_STEPS = 96, 64


@blas_single_thread()
def dense_spectral_norm(x: Array) -> float:
    """Return the largest singular value of a dense matrix, to a small multiple of its rounding.

    By Lanczos iteration where that shows that it has found it, otherwise from the smaller Gram
    matrix: the relative error of the largest eigenvalue of ``X^T X`` is a small multiple of the
    unit roundoff, so nothing is lost for the norm (small singular values would be).
    """
    x = np.asarray(x, np.float64)
    size = float(np.max(np.abs(x), initial=0.0))
    if size == 0.0:
        return 0.0
    large = min(x.shape) >= LANCZOS_LEAST
    if not (large and 1e-100 < size < 1e100):
        x = x / size  # no overflow or underflow of the squares
    else:
        size = 1.0
    found = _lanczos(x) if large else None
    return size * (_gram_norm(x) if found is None else found)


def _gram_norm(x: Array) -> float:
    """Return the largest singular value of a matrix from its smaller Gram matrix."""
    from scipy.linalg import eigh

    x = x if x.shape[0] >= x.shape[1] else x.T
    gram = product(x.T, x)
    last = gram.shape[0] - 1
    top = eigh(gram, eigvals_only=True, subset_by_index=[last, last])
    return float(np.sqrt(max(top[0], 0.0)))


def _lanczos(x: Array) -> float | None:
    """Return the largest singular value of ``x (m, n)``, None where it is not found for certain.

    Lanczos iteration for ``G = X^T X`` from a random vector, with full reorthogonalisation.  A
    Ritz value theta with the residual rho, as norms of G go, is off by at most ``rho^2 / gap``,
    ``gap`` its distance to the next one: this has to be below the unit roundoff of theta.  Values
    that lie too close together to be told apart are one to such an estimate, and nothing but the
    start says that none lies above: with ``rho <= 1e-10 theta`` as well, a value that is missed
    and larger by more than eps would need a start whose component along its vector is below
    ``1e-10 / eps`` of those that were found.
    """
    from ..kernels.comparison import gram_product

    x = np.require(x, requirements=["C", "W", "A"])
    n = x.shape[1]
    basis = np.zeros((LANCZOS_STEPS, n))
    diagonal, beside = np.zeros(LANCZOS_STEPS), np.zeros(LANCZOS_STEPS)
    v = np.random.default_rng(0).standard_normal(n)
    basis[0] = v / np.linalg.norm(v)
    for step in range(LANCZOS_STEPS):
        known = basis[: step + 1]
        w = gram_product(x, basis[step])
        diagonal[step] = basis[step] @ w
        for _ in range(2):  # what rounding leaves of the first time goes in the second
            w -= known.T @ (known @ w)
        beside[step] = rest = float(np.linalg.norm(w))
        if step % 2 or rest <= 1e-10 * diagonal[step]:
            tridiagonal = np.diag(diagonal[: step + 1])
            i = np.arange(step)
            tridiagonal[i + 1, i] = beside[:step]
            values, vectors = np.linalg.eigh(tridiagonal)  # reads the lower half
            top = float(values[-1])
            residual = rest * abs(float(vectors[-1, -1]))
            gap = top - (float(values[-2]) if step else 0.0)
            if residual <= 1e-10 * top and residual**2 <= 1e-16 * top * gap:
                return float(np.sqrt(top))
        if step + 1 == LANCZOS_STEPS or not rest > 0.0:
            return None
        basis[step + 1] = w / rest
    return None


@blas_single_thread()
def exact_spectral_norm(problem: Head) -> float:
    """Return ``|A|_2`` of a problem in float64, computed once."""

    def compute() -> float:
        exact = _Exact(problem)
        shape = exact.wide.shape
        if is_small(shape):
            return dense_spectral_norm(exact.wide.to_dense())
        rough = exact.narrow is not None
        return _run([_largest(shape, 1e-8, rough)], lambda x: [exact.multiply(x[0])])[0]

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
