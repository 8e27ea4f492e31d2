"""Products of few factors, ``Ahat = U S P``, and the one-hot factor of an assignment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.head import Head
from ..kernels._threads import product
from .base import AttentionOperator, Index, pick, working_precision
from .softmax import SoftmaxAttention

Array = NDArray[Any]


class FactoredAttention(AttentionOperator):
    """Represent ``Ahat = U S P`` by its factors: products cost ``O(n r)`` a column.

    Parameters
    ----------
    u : ndarray or AttentionOperator (n_q, r)
    s : ndarray (r, r), (r,) for a diagonal, or None for the identity
    p : ndarray or AttentionOperator (r, n_k)
        A factor that is itself a softmax matrix, or one-hot (`Assignment`), need not be held: give
        it as an operator.
    effective_rank : int, optional
        Budget used, by default r.
    remake : callable, optional
        Returns the same operator in float64, where arrays alone do not say it.

    Attributes
    ----------
    nonnegative, row_stochastic : bool
        Whether all factors are, hence ``Ahat``: sufficient, not necessary.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> mean = sa.FactoredAttention(np.ones((4, 1)), None, np.full((1, 2), 0.5))
    >>> (mean @ np.array([1.0, 3.0])).tolist()
    [2.0, 2.0, 2.0, 2.0]
    >>> mean.row_stochastic, mean.rank_bound
    (True, 1)
    """

    def __init__(
        self,
        u: Array | AttentionOperator,
        s: Array | None,
        p: Array | AttentionOperator,
        effective_rank: int | None = None,
        *,
        remake: Callable[[], FactoredAttention] | None = None,
    ) -> None:
        if len(u.shape) != 2 or len(p.shape) != 2:
            raise ValueError(
                f"u and p must have shapes (n_q, r) and (r, n_k), got {u.shape} and {p.shape}; "
                f"pass matrices"
            )
        inner = (u.shape[1], p.shape[0])
        if (s is None or s.ndim == 1) and inner[0] != inner[1]:
            raise ValueError(f"u and p must share r, got {inner[0]} and {inner[1]}; check s")
        if s is not None and s.shape != (inner if s.ndim == 2 else inner[:1]):
            raise ValueError(f"s must have shape {inner} or {inner[:1]}, got {s.shape}; check u, p")
        super().__init__(
            (u.shape[0], p.shape[1]),
            working_precision(*(np.empty(0, x.dtype) for x in (u, p))),
            inner[0] if effective_rank is None else effective_rank,
        )
        self.u, self.p = (
            x.astype(self.dtype, copy=False) if isinstance(x, np.ndarray) else x for x in (u, p)
        )
        self.s = None if s is None else s.astype(self.dtype, copy=False)
        self._remake = remake

    @property
    def rank_bound(self) -> int:
        """The smallest inner dimension of the factors, or rank that one of them knows."""
        known = [x.rank_bound for x in (self.u, self.p) if isinstance(x, AttentionOperator)]
        return int(min(*self.u.shape, *self.p.shape, *known))

    def reads(self, problem: Head) -> Array:
        """Return the inner dimension: each row weighs so many rows of ``S P``, or one of so many.

        A row that is one row of P, as that of its cluster, reads little, and the rows of P read
        all keys, as many rows as there are: shared among all queries that is the same number.
        """
        return np.full(self.shape[0], float(self.u.shape[1]))

    @property
    def nbytes(self) -> int:
        """Bytes of the factors, or of what they are computed from."""
        return int(sum(x.nbytes for x in (self.u, self.s, self.p) if x is not None))

    @property
    def nonnegative(self) -> bool:
        """Whether no factor has a negative entry."""
        s = self.s
        return _nonnegative(self.u) and _nonnegative(self.p) and (s is None or _nonnegative(s))

    @property
    def row_stochastic(self) -> bool:
        """Whether rows of every factor are non-negative and sum to one, up to rounding."""
        s = self.s
        if s is not None and s.ndim == 1:
            s = s[:, None]  # a diagonal is row-stochastic if its entries are ones
        return all(_row_stochastic(x) for x in (self.u, s, self.p) if x is not None)

    def wide(self) -> AttentionOperator:
        """Return the operator in float64: the same arrays, or the same draw."""
        if self.dtype == np.float64:
            return self
        if self._remake is not None:
            return self._remake()
        twin = super().wide()
        for name in ("u", "p"):
            factor = getattr(self, name)
            if isinstance(factor, AttentionOperator):
                setattr(twin, name, factor.wide())
        return twin

    def _core(self, x: Array, transpose: bool = False) -> Array:
        if self.s is None:
            return x
        if self.s.ndim == 1:
            return self.s[:, None] * x
        # The same bits for any number of threads, and none that waits beside the next kernel.
        return np.asarray(product(self.s.T if transpose else self.s, x))

    def _matmat(self, x: Array) -> Array:
        return np.asarray(product(self.u, self._core(product(self.p, self._cast(x)))))

    def _rmatmat(self, y: Array) -> Array:
        return np.asarray(
            product(self.p.T, self._core(product(self.u.T, self._cast(y)), transpose=True))
        )

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        u, p = self.u, self.p
        if isinstance(u, Assignment) and not u.transposed and u.weights is None and self.s is None:
            # Rows of P as they are, with nothing but their own rounding.
            labels = u.labels[chosen]
            return np.asarray(p[labels] if isinstance(p, np.ndarray) else p.rows(labels))
        rows = u[chosen] if isinstance(u, np.ndarray) else u.rows(chosen)
        inner = self._core(rows.T, transpose=True)
        if isinstance(self.p, np.ndarray):
            return np.asarray(product(inner.T, self.p))
        return np.ascontiguousarray(product(self.p.T, inner).T)


class Assignment(AttentionOperator):
    """Represent a one-hot matrix by its labels: entry ``(i, labels_i)`` is 1 or ``weights_i``.

    Parameters
    ----------
    labels : int array (n,)
        Column of the entry of each row, in 0..r - 1.
    r : int
        Number of columns.
    weights : array (n,), optional
        The entries, float32 or float64, in whose precision products are computed; None is ones.
        A row of weight zero is zero, and what it is multiplied with is not read.
    transpose : bool, default False
        Represent the transpose (r, n) instead: with ``weights = 1 / counts[labels]`` it takes the
        means of clusters.
    dtype : dtype, optional
        Precision, by default that of the weights, or float64.

    Attributes
    ----------
    nonnegative, row_stochastic : bool
        What the matrix is, up to the rounding of its weights.

    Raises
    ------
    TypeError, ValueError
        For labels that are no integers in 0..r - 1, and weights of another length.

    Notes
    -----
    A product with m columns costs ``O((n + r) m)``: a copy of chosen rows, or sums over the rows of
    each label, which have the same bits for any number of threads.  Memory is ``O(n)``.

    Examples
    --------
    >>> import numpy as np
    >>> spread = Assignment(np.array([0, 1, 0]), 2)
    >>> (spread @ np.array([5.0, 7.0])).tolist()
    [5.0, 7.0, 5.0]
    >>> mean = Assignment(np.array([0, 1, 0]), 2, np.array([0.5, 1.0, 0.5]), transpose=True)
    >>> (mean @ np.array([1.0, 2.0, 3.0])).tolist()
    [2.0, 2.0]
    """

    def __init__(
        self,
        labels: Array,
        r: int,
        weights: Array | None = None,
        *,
        transpose: bool = False,
        dtype: Any = None,
    ) -> None:
        labels = np.asarray(labels)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(
                f"labels must be a one-dimensional integer array, got {labels.dtype} of shape "
                f"{labels.shape}; give a column for each row"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < r:
            raise ValueError(
                f"labels must be in 0..r - 1 = {r - 1}, got {labels.min()} to {labels.max()}; "
                f"raise r"
            )
        if weights is not None and weights.shape != labels.shape:
            raise ValueError(
                f"weights must have shape (n,) = {labels.shape}, got {weights.shape}; give one "
                f"for each label"
            )
        if dtype is None:
            dtype = np.float64 if weights is None else working_precision(weights)
        super().__init__((r, len(labels)) if transpose else (len(labels), r), dtype)
        self.labels = labels.astype(np.int64)
        self.weights = None if weights is None else weights.astype(self.dtype)
        self.transposed = bool(transpose)
        used = labels if weights is None else labels[weights != 0]
        self._used = int((np.bincount(used, minlength=1) > 0).sum()) if len(used) else 0

    @property
    def _r(self) -> int:
        return int(self.shape[0 if self.transposed else 1])

    @property
    def rank_bound(self) -> int:
        """The rank: how many labels there are."""
        return self._used

    @property
    def nonnegative(self) -> bool:
        """Whether no weight is negative."""
        return self.weights is None or bool((self.weights >= 0).all())

    @property
    def row_stochastic(self) -> bool:
        """Whether weights are not negative and rows sum to one, up to rounding."""
        if not self.nonnegative:
            return False
        eps = float(np.finfo(self.dtype).eps)
        if not self.transposed:
            w = self.weights
            return w is None or bool((np.abs(w - 1) <= 4 * eps).all())
        counts = np.bincount(self.labels, minlength=self._r)
        sums = np.bincount(self.labels, self.weights, minlength=self._r)
        # Each of the weights of a row may carry a rounding or two.
        return bool((np.abs(sums - 1) <= (counts + 4) * eps).all())

    def _spread(self, x: Array) -> Array:
        """Return for each label its row of x (r, m), weighted."""
        out: Array = x[self.labels]
        if self.weights is not None:
            out[self.weights == 0] = 0
            out *= self.weights[:, None]
        return out

    def _sums(self, y: Array) -> Array:
        """Return for each label the weighted sum of its rows of y (n, m)."""
        from ..kernels.sketching import scatter

        if self.weights is not None:
            some = (self.weights != 0)[:, None]
            y = np.multiply(y, self.weights[:, None], out=np.zeros_like(y), where=some)
        if y.size == 0 or self._r == 0:
            return np.zeros((self._r, y.shape[1]), self.dtype)
        buckets = self.labels.astype(np.int32)[:, None]
        return scatter(y, buckets, np.ones(buckets.shape, np.int8), self._r, 1.0)

    def _matmat(self, x: Array) -> Array:
        return (self._sums if self.transposed else self._spread)(self._cast(x))

    def _rmatmat(self, y: Array) -> Array:
        return (self._spread if self.transposed else self._sums)(self._cast(y))

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array."""
        chosen = pick(self.shape[0], index)
        return self._entries(chosen) if self.transposed else self._units(chosen)

    def columns(self, index: Index) -> Array:
        """Return chosen columns as a dense array."""
        chosen = pick(self.shape[1], index)
        made = self._units(chosen) if self.transposed else self._entries(chosen)
        return np.ascontiguousarray(made.T)

    def _units(self, chosen: Array) -> Array:
        """Return rows of the matrix that is not transposed, (len(chosen), r)."""
        out = np.zeros((len(chosen), self._r), self.dtype)
        out[np.arange(len(chosen)), self.labels[chosen]] = (
            1 if self.weights is None else self.weights[chosen]
        )
        return out

    def _entries(self, chosen: Array) -> Array:
        """Return its columns, transposed, (len(chosen), n)."""
        hit = self.labels[None, :] == chosen[:, None]
        return np.where(hit, 1 if self.weights is None else self.weights, 0).astype(self.dtype)


def _nonnegative(x: Array | AttentionOperator) -> bool:
    """Say whether a factor is known to have no negative entry."""
    if isinstance(x, np.ndarray):
        return bool((x >= 0).all())
    return isinstance(x, SoftmaxAttention) or bool(getattr(x, "nonnegative", False))


def _row_stochastic(x: Array | AttentionOperator) -> bool:
    """Say whether a factor is known to be non-negative with rows that sum to one."""
    if isinstance(x, SoftmaxAttention):
        return bool((x.problem.visible_counts() > 0).all())
    if not isinstance(x, np.ndarray):
        return bool(getattr(x, "row_stochastic", False))
    # A row of n terms that sum to 1 carries n roundings; entries carry one or two each.
    tolerance = (x.shape[1] + 4) * float(np.finfo(x.dtype).eps)
    return _nonnegative(x) and bool((np.abs(x.sum(axis=1) - 1) <= tolerance).all())


def zero_attention(problem: Head) -> FactoredAttention:
    """Return the zero matrix of the shape of a problem, of rank 0."""
    u, p = (np.zeros(s, problem.dtype) for s in ((problem.n_q, 0), (0, problem.n_k)))
    return FactoredAttention(u, None, p)
