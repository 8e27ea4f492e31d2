"""Ridge leverage of kernels, its recursive estimate, and Nystrom factors.

Ridge scores of a positive semidefinite K are ``l_i = (K (K + lam I)^{-1})_ii``; columns drawn by
them give Nystrom approximations with ``0 <= K - Kt <= c lam I``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import as_array, as_real, check_count, check_positive
from ..base.draws import Rng, as_generator
from ..base.floating import without_floating_errors
from ..base.quiet import quiet
from ..kernels._threads import blas_single_thread, product
from .draws import ColumnDraw
from .leverage import as_matrix

Array = NDArray[Any]


class ExponentialKernel:
    """Represent ``K_ij = exp(scale x_i.x_j - shift)``, the kernel of unnormalised attention.

    Parameters
    ----------
    points : array (n, d)
        Keys, or queries stacked on keys: then ``exp(scale Q K^T - shift)`` is an off-diagonal
        block of this positive semidefinite matrix.
    scale : float
        Not negative: otherwise the matrix is not positive semidefinite.

    Attributes
    ----------
    shift : float
        ``scale max_i |x_i|^2``, which keeps all entries at most 1.

    Raises
    ------
    ValueError
        For a negative scale, and where ``scale |x_i|^2`` overflows.

    Examples
    --------
    >>> import numpy as np
    >>> ExponentialKernel(np.eye(2), 1.0).to_dense().round(3).tolist()
    [[1.0, 0.368], [0.368, 1.0]]
    """

    def __init__(self, points: ArrayLike, scale: float) -> None:
        self.points: Array = as_matrix(points, "points").astype(np.float64)
        self.scale: float = as_real(scale, "scale", "give one")
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(
                f"scale must be finite and not negative for a positive semidefinite kernel, got "
                f"{self.scale}; change the sign of one factor"
            )
        self._squares: Array = self.scale * np.einsum("ij,ij->i", self.points, self.points)
        self.shift: float = float(self._squares.max(initial=0.0))
        if not math.isfinite(self.shift):
            raise ValueError(
                f"scale * |points|^2 must be finite in float64, got an overflow in row "
                f"{int(np.argmax(~np.isfinite(self._squares)))}; scale the points down"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return len(self.points), len(self.points)

    def diagonal(self) -> Array:
        """Return the diagonal, float64 (n,)."""
        diagonal: Array = np.exp(self._squares - self.shift)
        return diagonal

    def block(self, rows: Array, columns: Array) -> Array:
        """Return the entries of chosen rows and columns, float64 (len(rows), len(columns))."""
        logits: Array = product(self.scale * self.points[rows], self.points[columns].T)
        logits -= self.shift
        # |x_i.x_j| <= max |x|^2 up to rounding of the product.
        entries: Array = np.exp(np.minimum(logits, 0.0, out=logits), out=logits)
        return entries

    def to_dense(self) -> Array:
        """Return the matrix, float64 (n, n)."""
        everything = np.arange(len(self.points))
        dense = self.block(everything, everything)
        return (dense + dense.T) / 2


quiet(ExponentialKernel, "__init__")


class _DenseKernel:
    """Give a matrix in memory the interface of ``ExponentialKernel``."""

    def __init__(self, matrix: Array) -> None:
        self.matrix = matrix
        self.shape = matrix.shape

    def diagonal(self) -> Array:
        diagonal: Array = self.matrix.diagonal()
        return diagonal

    def block(self, rows: Array, columns: Array) -> Array:
        entries: Array = self.matrix[np.ix_(rows, columns)]
        return entries


def _symmetric(kernel: Any, name: str = "kernel") -> Array:
    """Return a symmetric float64 matrix (n, n)."""
    if isinstance(kernel, ExponentialKernel):
        return kernel.to_dense()
    matrix = as_matrix(kernel, name).astype(np.float64)
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name} must be square, got shape {matrix.shape}; pass K (n, n)")
    size = float(np.max(np.abs(matrix), initial=0.0))
    # Entries that were computed in float32 differ from their mirror image by rounding.
    if np.max(np.abs(matrix - matrix.T), initial=0.0) > 1e-5 * size:
        raise ValueError(
            f"{name} must be symmetric, got entries that differ by "
            f"{np.max(np.abs(matrix - matrix.T)):.6g} from their mirror image; pass (K + K.T)/2"
        )
    return (matrix + matrix.T) / 2


def _as_kernel(kernel: Any) -> ExponentialKernel | _DenseKernel:
    if isinstance(kernel, ExponentialKernel):
        return kernel
    dense = _DenseKernel(_symmetric(kernel))
    if len(dense.matrix) and dense.diagonal().min() < 0:
        raise ValueError(
            f"kernel must be positive semidefinite, got the diagonal entry "
            f"{dense.diagonal().min():.6g}; pass K = B B^T"
        )
    return dense


def _eigh(kernel: Any) -> tuple[Array, Array]:
    """Return eigenvalues, none negative, and eigenvectors of a positive semidefinite matrix."""
    from scipy.linalg import eigh

    matrix = _symmetric(kernel)
    if len(matrix) == 0:
        return np.zeros(0), np.zeros((0, 0))
    values, vectors = eigh(matrix, check_finite=False)
    # Negative only by rounding: of eigh in float64, or of entries that were computed in float32.
    if values[0] < -1e-5 * max(values[-1], -values[0]):
        raise ValueError(
            f"kernel must be positive semidefinite, got the eigenvalue {values[0]:.6g}; "
            f"pass K = B B^T"
        )
    return np.maximum(values, 0.0), vectors


@without_floating_errors
@blas_single_thread()
def ridge_leverage(kernel: Any, lam: float) -> Array:
    """Return the ridge leverage scores ``l_i = (K (K + lam I)^{-1})_ii``.

    Parameters
    ----------
    kernel : array (n, n) or ExponentialKernel
        K, symmetric positive semidefinite; float64 (n, n) in memory.
    lam : float
        Ridge, > 0, in the units of K.

    Returns
    -------
    ndarray, float64 (n,)
        In [0, 1), with the sum ``d_eff``; all zero for K = 0.

    Notes
    -----
    Alaoui and Mahoney, "Fast randomized kernel methods with statistical guarantees" (2015).
    From the eigendecomposition, ``l_i = sum_k U_ik^2 s_k/(s_k + lam)``: a sum of terms that are
    not negative, so that small scores keep their digits.  The equal form
    ``(K - K (K + lam I)^{-1} K)_ii / lam`` cancels.  Cost O(n^3).

    Examples
    --------
    >>> import numpy as np
    >>> ridge_leverage(np.diag([3.0, 1.0]), 1.0).tolist()
    [0.75, 0.5]
    """
    lam = check_positive(lam, "lam")
    values, vectors = _eigh(kernel)
    scores: Array = (vectors * vectors) @ (values / (values + lam))
    return scores


@without_floating_errors
@blas_single_thread()
def d_eff(kernel: Any, lam: float) -> float:
    """Return the effective dimension ``sum_k s_k/(s_k + lam)`` of a kernel matrix.

    Parameters
    ----------
    kernel : array (n, n) or ExponentialKernel
        Symmetric positive semidefinite, with eigenvalues s_k.
    lam : float
        Ridge, > 0.

    Examples
    --------
    >>> import numpy as np
    >>> d_eff(np.diag([3.0, 1.0]), 1.0)
    1.25
    """
    from scipy.linalg import eigvalsh

    lam = check_positive(lam, "lam")
    matrix = _symmetric(kernel)
    if len(matrix) == 0:
        return 0.0
    values = eigvalsh(matrix, check_finite=False)
    if values[0] < -1e-5 * max(values[-1], -values[0]):
        raise ValueError(
            f"kernel must be positive semidefinite, got the eigenvalue {values[0]:.6g}; "
            f"pass K = B B^T"
        )
    values = np.maximum(values, 0.0)
    return float(np.sum(values / (values + lam)))


class RecursiveRidge(NamedTuple):
    """Hold the result of recursive ridge leverage sampling.

    Attributes
    ----------
    scores : float64 array (n,)
        Overestimates of the ridge leverage scores, at most 1.
    draw : ColumnDraw
        Columns kept independently with ``min(1, oversampling l_i ln(sum l/delta))``; the number
        of them is random.
    """

    scores: Array
    draw: ColumnDraw


@without_floating_errors
def ridge_leverage_recursive(
    kernel: Any,
    lam: float,
    *,
    delta: float = 0.1,
    oversampling: float = 16.0,
    base: int | None = None,
    rng: Rng = None,
) -> RecursiveRidge:
    """Return overestimates of ridge leverage scores and a draw by them, without forming K.

    Half of the points, drawn at random, are sampled recursively; with their columns and weights S
    ``l_i = (3/(2 lam)) (K - K S^T (S K S^T + lam I)^{-1} S K)_ii``, at most 1.

    Parameters
    ----------
    kernel : array (n, n) or ExponentialKernel
        K, symmetric positive semidefinite.
    lam : float
        Ridge, > 0.
    delta : float
        Failure probability, in (0, 1); each level of the recursion takes a third.
    oversampling : float
        Factor of the keep probabilities, > 0.  With 16 the guarantee holds; less is cheaper.
    base : int, optional
        Up to so many points K itself is used; by default ``ceil(192 ln(1/delta))``.
    rng : None, int or numpy.random.Generator

    Returns
    -------
    RecursiveRidge

    Notes
    -----
    Musco and Musco, "Recursive sampling for the Nystrom method" (2017), Algorithm 2
    (RecursiveRLS-Nystrom).  They prove that with probability ``1 - 3 delta`` the scores are no
    less than the exact ones, at most ``384 d_eff ln(d_eff/delta)`` columns are drawn, and the
    Nystrom approximation by these columns has ``Kt <= K <= Kt + lam I``.  O(n s) entries of K and
    O(n s^2) time for s columns.  Deviations: scores are at least ``K_ii/(tr K + lam)``, as the
    exact ones are, so that rounding cannot turn one into zero; and up to ``base`` points one pass
    with ``S = I`` is made, where the algorithm returns all points without scores.

    Examples
    --------
    >>> import numpy as np
    >>> result = ridge_leverage_recursive(np.eye(3), 1.0, rng=0)
    >>> result.scores.round(12).tolist(), result.draw.columns.tolist()
    ([0.75, 0.75, 0.75], [0, 1, 2])
    """
    whole = _as_kernel(kernel)
    lam = check_positive(lam, "lam")
    delta = check_positive(delta, "delta", below=1.0)
    oversampling = check_positive(oversampling, "oversampling")
    if base is not None:
        check_count(base, "base", "None is 192 ln(1/delta)", more=" or None")
    generator = as_generator(rng)
    n = whole.shape[0]
    floor = whole.diagonal() / (float(whole.diagonal().sum()) + lam)
    # Nested halves from the outside in; then samples from the inside out.
    halves = [np.arange(n)]
    budgets = [delta]
    while True:
        limit = base if base is not None else math.ceil(192 * math.log(1 / budgets[-1]))
        if len(halves[-1]) <= limit:
            break
        kept = generator.random(len(halves[-1])) < 0.5
        halves.append(halves[-1][kept])
        budgets.append(budgets[-1] / 3)
    columns, weights = halves[-1], np.ones(len(halves[-1]))
    scores = probabilities = np.ones(len(columns))
    # The innermost set is taken whole; if it is everything, scores still come from one more pass.
    levels = list(zip(halves[:-1], budgets[:-1], strict=True)) or [(halves[0], delta)]
    for index, budget in reversed(levels):
        # Threads of BLAS change the order of sums, and with it the last bits of a draw.
        with blas_single_thread():
            scores = _ridge_from_sample(whole, index, columns, weights, lam)
        scores = np.minimum(np.maximum(1.5 * scores, floor[index]), 1.0)
        factor = oversampling * max(math.log(max(scores.sum(), 1e-300) / budget), 0.0)
        probabilities = np.minimum(1.0, factor * scores)
        drawn = generator.random(len(index)) < probabilities
        columns, weights = index[drawn], 1.0 / probabilities[drawn]
    draw = ColumnDraw(columns.astype(np.int64), weights, 1.0 / weights, n, len(columns), False)
    return RecursiveRidge(scores, draw)


def _ridge_from_sample(
    kernel: ExponentialKernel | _DenseKernel,
    index: Array,
    columns: Array,
    weights: Array,
    lam: float,
) -> Array:
    """Return ``(1/lam) (K - K S^T (S K S^T + lam I)^{-1} S K)_ii`` for i in ``index``.

    For K = B B^T this is ``b_i^T (B^T S^T S B + lam I)^{-1} b_i``: with S = I the exact scores.
    """
    from scipy.linalg import cholesky, solve_triangular

    diagonal = kernel.diagonal()[index]
    if len(columns) == 0:
        return diagonal / lam
    root = np.sqrt(weights)
    cross = kernel.block(index, columns) * root
    core = kernel.block(columns, columns) * root * root[:, None]
    core[np.diag_indices(len(core))] += lam
    lower = cholesky(core, lower=True, check_finite=False)
    half = solve_triangular(lower, cross.T, lower=True, check_finite=False)
    scores: Array = np.maximum(diagonal - np.einsum("ij,ij->j", half, half), 0.0) / lam
    return scores


@without_floating_errors
@blas_single_thread()
def nystrom_factor(kernel: Any, columns: ArrayLike, tol: float | None = None) -> Array:
    """Return F (n, q) with ``Kt = F F^T = K_:J (K_JJ)^+ K_J:``, the Nystrom approximation of K.

    Parameters
    ----------
    kernel : array (n, n) or ExponentialKernel
        K, symmetric positive semidefinite.
    columns : int array (s,)
        J; repeats do not matter.
    tol : float, optional
        Eigenvalues of ``K_JJ`` up to ``tol`` times the largest count as zero, by default
        ``s eps``.

    Returns
    -------
    ndarray, float64 (n, q)
        q is the numerical rank of ``K_JJ``.

    Notes
    -----
    ``0 <= Kt <= K`` in the semidefinite order, up to rounding.

    Examples
    --------
    >>> import numpy as np
    >>> f = nystrom_factor(np.array([[2.0, 1.0], [1.0, 2.0]]), [0])
    >>> (f @ f.T).round(12).tolist()
    [[2.0, 1.0], [1.0, 0.5]]
    """
    from scipy.linalg import eigh

    whole = _as_kernel(kernel)
    chosen = as_array(columns, "columns")
    if chosen.size == 0:
        return np.zeros((whole.shape[0], 0))
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
        raise TypeError(
            f"columns must be a one-dimensional integer array, got {chosen.dtype} of shape "
            f"{chosen.shape}; give indices"
        )
    chosen = np.unique(chosen)
    if not 0 <= chosen[0] <= chosen[-1] < whole.shape[0]:
        raise ValueError(
            f"columns must be in 0..{whole.shape[0] - 1}, got {int(chosen[0])}.."
            f"{int(chosen[-1])}; give indices of rows of K"
        )
    relative = len(chosen) * float(np.finfo(np.float64).eps) if tol is None else tol
    if tol is not None:
        relative = check_positive(tol, "tol", below=1.0)
    cross = whole.block(np.arange(whole.shape[0]), chosen)
    core = cross[chosen]
    values, vectors = eigh((core + core.T) / 2, check_finite=False)
    kept = values > relative * max(values[-1], 0.0)
    factor: Array = cross @ (vectors[:, kept] / np.sqrt(values[kept]))
    return factor


class PsdCheck(NamedTuple):
    """Hold the extreme eigenvalues of ``K - Kt`` and what they mean.

    Attributes
    ----------
    lowest, highest : float
        Eigenvalues of ``K - Kt``.
    below : bool
        ``Kt <= K``: the lowest is at least ``-1e-8 tr K``.
    within : bool
        ``K - Kt <= lam I``, with the same allowance.
    """

    lowest: float
    highest: float
    below: bool
    within: bool


@without_floating_errors
@blas_single_thread()
def ridge_psd_check(kernel: Any, approximation: ArrayLike, lam: float) -> PsdCheck:
    """Check ``0 <= K - Kt <= lam I`` in the semidefinite order by eigenvalues.

    Parameters
    ----------
    kernel : array (n, n) or ExponentialKernel
        K.
    approximation : array (n, n)
        Kt, symmetric.
    lam : float
        Bound, > 0.

    Returns
    -------
    PsdCheck

    Examples
    --------
    >>> import numpy as np
    >>> ridge_psd_check(np.eye(2), np.diag([1.0, 0.0]), 1.0).within
    True
    """
    from scipy.linalg import eigvalsh

    lam = check_positive(lam, "lam")
    matrix = _symmetric(kernel)
    other = _symmetric(approximation, "approximation")
    if matrix.shape != other.shape:
        raise ValueError(
            f"approximation must have the shape {matrix.shape} of kernel, got {other.shape}; "
            f"pass Kt (n, n)"
        )
    if len(matrix) == 0:
        return PsdCheck(0.0, 0.0, True, True)
    values = eigvalsh(matrix - other, check_finite=False)
    slack = 1e-8 * float(np.trace(matrix))
    lowest, highest = float(values[0]), float(values[-1])
    return PsdCheck(lowest, highest, lowest >= -slack, highest <= lam + slack)
