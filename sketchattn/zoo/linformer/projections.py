"""Projections along the sequence, as matrices and as blocks, and the attention to their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.arguments import (
    as_array,
    check_finite,
    float_dtype,
    prepare,
)
from ...base.head import Head
from ...kernels._threads import product
from ...operators.base import AttentionOperator, Index, pick
from ...operators.factored import FactoredAttention
from ...problem import AttentionProblem
from ...sketches.base import Sketch

Array = NDArray[Any]

POOLING = ("mean_pool", "max_pool")
FIXED = (*POOLING, "conv", "given")
SCALES = ("isometry", "average", "none")


def pool_starts(n: int, r: int) -> Array:
    """Return the first position of each of r blocks and n: block b is floor(bn/r)..floor((b+1)n/r).

    Examples
    --------
    >>> pool_starts(7, 3).tolist()
    [0, 2, 4, 7]
    """
    return np.arange(r + 1, dtype=np.int64) * n // r


class Projection:
    """Apply E (r, n) to arrays whose first axis is the keys; masked keys count as zero."""

    def __init__(self, form: Array | Sketch, keep: Array | None, factor: float = 1.0) -> None:
        self.form, self.keep, self.factor = form, keep, factor
        self.shape: tuple[int, int] = (int(form.shape[0]), int(form.shape[1]))

    def _times(self, x: Array) -> Array:
        return x if self.factor == 1.0 else x.dtype.type(self.factor) * x

    def _shown(self, x: Array) -> Array:
        return x if self.keep is None else np.where(self.keep[:, None], x, x.dtype.type(0))

    def apply(self, x: Array) -> Array:
        """Return ``E X``."""
        shown = self._shown(x)
        if isinstance(self.form, np.ndarray):
            from ...kernels.sketching import dense_product

            return self._times(dense_product(prepare(self.form, x.dtype), prepare(shown, x.dtype)))
        return self._times(np.asarray(self.form @ shown, x.dtype))

    def apply_transpose(self, y: Array) -> Array:
        """Return ``E^T Y``."""
        return self._shown(self._times(np.asarray(product(self.form.T, y), y.dtype)))

    def to_dense(self, dtype: Any) -> Array:
        """Return E (r, n) without masked columns."""
        form = self.form.to_dense() if isinstance(self.form, Sketch) else self.form
        dense = self.factor * np.asarray(form, np.float64)
        if self.keep is not None:
            dense = np.where(self.keep, dense, 0.0)
        return dense.astype(dtype)

    def wide(self) -> Projection:
        """Return the projection in float64, from the same numbers."""
        form = self.form
        if not isinstance(form, Sketch):
            return Projection(form.astype(np.float64), self.keep, self.factor)
        again = type(form).from_arrays(form.arrays, form.shape, dtype=np.float64, **form.parameters)
        return Projection(again, self.keep, self.factor)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held."""
        return int(self.form.nbytes)


class MeanPool(Projection):
    """Average, or sum, the keys of each block that are not masked."""

    def __init__(self, n: int, r: int, keep: Array | None, average: bool) -> None:
        self.keep, self.average, self.shape = keep, average, (r, n)
        self.starts = pool_starts(n, r)
        ones = np.ones(n) if keep is None else keep.astype(np.float64)
        self.counts = np.add.reduceat(ones, self.starts[:-1])
        self.weights = 1 / np.maximum(self.counts, 1) if average else np.ones(r)

    def apply(self, x: Array) -> Array:
        """Return the mean, or the sum, of each block of rows."""
        sums = np.add.reduceat(self._shown(x), self.starts[:-1], axis=0)
        return np.asarray(self.weights[:, None] * sums, x.dtype)

    def apply_transpose(self, y: Array) -> Array:
        """Return each row of Y for all keys of its block."""
        spread = np.asarray(self.weights[:, None] * y, y.dtype)
        return self._shown(np.repeat(spread, np.diff(self.starts), axis=0))

    def to_dense(self, dtype: Any) -> Array:
        """Return the matrix (r, n) without masked columns."""
        return self.apply_transpose(np.eye(self.shape[0])).T.astype(dtype)

    def wide(self) -> Projection:
        """Return itself: counts are exact."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held."""
        return int(self.starts.nbytes + self.weights.nbytes)


def max_pool_rows(x: Array, r: int, keep: Array | None) -> Array:
    """Return the maximum over each block of the rows that are not masked, zero where none is."""
    low = x.dtype.type(-np.inf)
    shown = x if keep is None else np.where(keep[:, None], x, low)
    out: Array = np.maximum.reduceat(shown, pool_starts(len(x), r)[:-1], axis=0)
    return np.where(out == low, x.dtype.type(0), out)


def convolve(weights: Array, x: Array, r: int, keep: Array | None) -> Array:
    """Return ``sum_t w_t x_(bm+t)`` for weights (m,), (m, d) a channel or (m, d, d) mixing them."""
    m = len(x) // r
    shown = x if keep is None else np.where(keep[:, None], x, x.dtype.type(0))
    blocks = shown.reshape(r, m, x.shape[1])
    formula = {1: "t,bti->bi", 2: "ti,bti->bi", 3: "tij,bti->bj"}[weights.ndim]
    return np.ascontiguousarray(np.einsum(formula, weights.astype(x.dtype), blocks))


class ReducedAttention(AttentionOperator):
    """Represent ``Ahat = W F`` with ``W = rowsoftmax(scale Q C^T + 1 b^T)``, C = E K (r, d).

    A product is exact attention to the r compressed keys: W is never held.

    Parameters
    ----------
    problem : AttentionProblem
        Its queries, keys and scale.
    e : callable
        ``K -> E K``.
    f : projection
        F, with its products.
    bias : ndarray (r,), optional
        b.
    empty : bool ndarray (r,), optional
        Rows of E without a key, which get no weight.
    remake : callable, optional
        Returns the same operator in float64.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        e: Callable[[Array], Array],
        f: Projection,
        bias: Array | None = None,
        empty: Array | None = None,
        remake: Callable[[], ReducedAttention] | None = None,
    ) -> None:
        super().__init__((problem.n_q, problem.n_k), problem.dtype, f.shape[0])
        self.projection = f
        self._remake = remake
        q, k = problem.arrays.q, e(problem.arrays.k)
        scale = problem.scale
        if bias is not None:
            # One more feature carries the bias: scale Q C^T + 1 b^T = [scale Q, 1] [C, b]^T.
            ones = np.ones((len(q), 1), q.dtype)
            q = np.concatenate([q.dtype.type(scale) * q, ones], axis=1)
            k = np.concatenate([k, bias[:, None].astype(k.dtype)], axis=1)
            scale = 1.0
        keep = None if empty is None else ~empty
        if bias is None and keep is None:
            check_finite(k, "E k")
            self.compressed = AttentionProblem.adopt(q, k, scale=scale)
        else:
            self.compressed = AttentionProblem(q, k, scale=scale, key_mask=keep)

    @property
    def rank_bound(self) -> int:
        """The number of compressed keys, or the smaller side."""
        return min(*self.shape, self.projection.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the queries, the compressed keys and F."""
        return self.compressed.exact.nbytes + self.projection.nbytes

    def reads(self, problem: Head) -> Array:
        """Return the number of compressed keys for each row."""
        return np.full(self.shape[0], float(self.projection.shape[0]))

    def wide(self) -> AttentionOperator:
        """Return the same estimator of the same problem and draw in float64."""
        return self if self._remake is None else self._remake()

    @property
    def weights(self) -> Array:
        """``W`` as a dense array (n_q, r)."""
        return self.compressed.exact.to_dense()

    def factored(self) -> FactoredAttention:
        """Return the same matrix with its factors W (n_q, r) and F (r, n_k) in memory."""
        return FactoredAttention(self.weights, None, self.projection.to_dense(self.dtype))

    def _matmat(self, x: Array) -> Array:
        return np.asarray(self.compressed.exact @ self.projection.apply(self._cast(x)))

    def _rmatmat(self, y: Array) -> Array:
        return self.projection.apply_transpose(np.asarray(self.compressed.exact.T @ self._cast(y)))

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        weights = self.compressed.exact.rows(pick(self.shape[0], index))
        return np.ascontiguousarray(self.projection.apply_transpose(weights.T.copy()).T)


def check_array(value: object, name: str, axes: tuple[int, ...] = (2,)) -> Array:
    """Return a checked array of floating-point numbers."""
    array = as_array(value, name)
    float_dtype(array, name)
    if array.ndim not in axes:
        raise ValueError(
            f"{name} must have {' or '.join(map(str, axes))} axes, got shape {array.shape}; "
            f"matrices are (r, n_k), convolution weights (m,), (m, d) or (m, d, d)"
        )
    check_finite(array, name)
    return array
