"""What every attention matrix can do, exact or approximate."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator

from ..base.head import Head
from ..base.quiet import quiet
from ..kernels._threads import blas_single_thread

Array = NDArray[Any]
Index = ArrayLike | slice

if TYPE_CHECKING:
    Operator = LinearOperator[Any]
else:
    Operator = LinearOperator  # SciPy's class can be subscripted from 1.17 on only


def pick(length: int, index: Index) -> Array:
    """Return the positions that an index, slice or boolean mask picks, as NumPy would."""
    if not isinstance(index, slice):
        index = np.asarray(index)
        if index.ndim > 1 or index.dtype == np.bool_ and index.ndim == 0:
            raise ValueError(
                f"index must be an integer, a slice, or a one-dimensional array of integers or "
                f"booleans, got {index.dtype} of shape {index.shape}; flatten it"
            )
        if index.size == 0 and index.dtype == np.float64:  # what an empty list becomes
            index = index.astype(np.int64)
    return np.atleast_1d(np.arange(length)[index])


def working_precision(*arrays: Array) -> np.dtype[Any]:
    """Return float32 if arrays are held in no more, else float64, whatever they hold."""
    return np.dtype(np.float32 if np.result_type(*arrays) == np.float32 else np.float64)


# What multiplies by the matrix, in whichever class it is defined.
PRODUCTS = ("_matmat", "_rmatmat", "_matvec", "_rmatvec", "rows", "columns", "row_sums", "to_dense")


class AttentionOperator(Operator):
    """Represent an n_q x n_k attention matrix by its products.

    Parameters
    ----------
    shape : (int, int)
        (n_q, n_k).
    dtype : dtype
        float32 or float64; products are computed in it.
    effective_rank : int, optional
        How much of the rank budget could be used; None for matrices without a budget.

    Attributes
    ----------
    rank_bound : int
        An upper bound of the matrix rank.
    nbytes : int
        Bytes of the arrays that the operator holds.
    effective_rank : int or None
        As given: smaller than the rank asked for where fewer keys could be drawn.
    path : str
        ``"exact"`` where the products are those of the exact matrix, otherwise ``"sketch"``.
    """

    path = "sketch"

    def __init_subclass__(cls, **options: Any) -> None:
        """Keep the processor's floating-point flags, and threads of BLAS, out of all products.

        BLAS may raise them for finite numbers: vector kernels compute lanes that are thrown away.
        NumPy then warns, or raises under ``np.errstate``, though the product is right.  What a
        product really overflows to, or NaN, is in its result.

        BLAS rounds otherwise for other numbers of threads; products are the same bits for all.
        """
        super().__init_subclass__(**options)
        for name in ("__init__", *PRODUCTS):
            if name in vars(cls):
                setattr(cls, name, blas_single_thread()(vars(cls)[name]))
        quiet(cls, "__init__", *PRODUCTS)

    def __init__(
        self, shape: tuple[int, int], dtype: Any, effective_rank: int | None = None
    ) -> None:
        super().__init__(np.dtype(dtype), shape)  # type: ignore[call-arg]  # stubs know __new__ only
        self.effective_rank = effective_rank

    def _matmat(self, x: Array) -> Array:
        raise TypeError(f"{type(self).__name__} must define its product A X")

    def _rmatmat(self, y: Array) -> Array:
        raise TypeError(f"{type(self).__name__} must define its product A^T Y")

    def _matvec(self, x: Array) -> Array:
        return self._matmat(np.reshape(x, (-1, 1)))[:, 0]

    def _rmatvec(self, y: Array) -> Array:
        return self._rmatmat(np.reshape(y, (-1, 1)))[:, 0]

    def _cast(self, x: Array) -> Array:
        return np.require(x, dtype=self.dtype, requirements=["C", "W", "A"])

    @property
    def rank_bound(self) -> int:
        """An upper bound of the rank of the matrix."""
        return min(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that the operator holds."""
        return sum(x.nbytes for x in self.__dict__.values() if isinstance(x, np.ndarray))

    def wide(self) -> AttentionOperator:
        """Return the operator whose products are computed in float64 from the same arrays."""
        if self.dtype == np.float64:
            return self
        twin = copy.copy(self)
        twin.dtype = np.dtype(np.float64)
        for name, x in self.__dict__.items():
            if isinstance(x, np.ndarray) and x.dtype == np.float32:
                setattr(twin, name, x.astype(np.float64))
        return twin

    def reads(self, problem: Head) -> Array:
        """Return how much of a problem each row of ``Ahat`` reads, float64 (n_q,).

        Keys, and what stands for many of them: features, landmarks, clusters, regions, means.
        What was looked at to choose these does not count.  NaN where it is not known.

        Parameters
        ----------
        problem : AttentionProblem
            The one that the operator approximates; its visible sets count.
        """
        return np.full(self.shape[0], np.nan)

    def work(self, problem: Head) -> float:
        """Return what a row reads, mean over rows, as a share of what a row of ``A`` reads.

        ``sum_i reads_i / sum_i |visible_i|``: 1 is the exact matrix, and a causal one of n tokens
        reads (n + 1) / 2 keys a row.  It may exceed 1: a row that sees few keys may read more
        features than these.  NaN where it is not known or no row sees a key.

        Examples
        --------
        >>> import sketchattn as sa
        >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
        >>> problem.exact.work(problem)
        1.0
        >>> sa.UniformColumns(rank=4).approximate(problem, rng=0).work(problem)
        0.25
        """
        seen = int(problem.visible_counts().sum())
        return float(self.reads(problem).sum() / seen) if seen else float("nan")

    def rows(self, index: Index) -> Array:
        """Return chosen rows of the matrix as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        unit = np.zeros((self.shape[0], len(chosen)), self.dtype)
        unit[chosen, np.arange(len(chosen))] = 1
        return np.ascontiguousarray(self._rmatmat(unit).T)

    def columns(self, index: Index) -> Array:
        """Return chosen columns of the matrix as a dense array (n_q, len(index))."""
        chosen = pick(self.shape[1], index)
        unit = np.zeros((self.shape[1], len(chosen)), self.dtype)
        unit[chosen, np.arange(len(chosen))] = 1
        return self._matmat(unit)

    def row_sums(self) -> Array:
        """Return ``A 1`` (n_q,): ones for a row-stochastic matrix."""
        return self._matvec(np.ones(self.shape[1], self.dtype))

    def to_dense(self) -> Array:
        """Return the matrix as a dense array (n_q, n_k)."""
        return self.rows(np.arange(self.shape[0]))
