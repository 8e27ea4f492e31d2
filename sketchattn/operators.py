"""Attention matrices as linear operators: the exact one, and the few kinds of approximations.

Each is a ``scipy.sparse.linalg.LinearOperator`` of shape (n_q, n_k): ``ahat @ v`` and
``ahat.T @ y`` cost what the structure costs, and nothing of size n_q x n_k is formed unless
``to_dense`` is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator

from .problem import AttentionProblem, as_array, check_finite, float_dtype, stacked

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


def _precision(*arrays: Array) -> np.dtype[Any]:
    """Return float32 if arrays are held in no more, else float64, whatever they hold."""
    return np.dtype(np.float32 if np.result_type(*arrays) == np.float32 else np.float64)


def _row_softmax(logits: Array) -> Array:
    """Turn logits into ``rowsoftmax(logits)`` in place; a row of -inf becomes zeros."""
    top = logits.max(axis=1, keepdims=True, initial=-np.inf)
    logits -= np.where(np.isfinite(top), top, 0)
    weights: Array = np.exp(logits, out=logits)
    total = weights.sum(axis=1, keepdims=True)
    np.divide(weights, total, out=weights, where=total > 0)
    return weights


def softmax_over(problem: AttentionProblem, columns: Array, weights: Array | None = None) -> Array:
    """Return ``rowsoftmax(L_ij + ln w_j)`` over chosen keys, (n_q, t); empty rows are zero.

    ``columns`` int (t,) are keys that are not masked, ``weights (t,)`` are positive; None is 1.
    """
    q, k, _ = problem.arrays
    logits = (problem.dtype.type(problem.scale) * q) @ k[columns].T
    if weights is not None:
        logits += np.log(weights).astype(problem.dtype)
    if problem.causal:
        logits[columns[None, :] > (np.arange(problem.n_q) + problem.offset)[:, None]] = -np.inf
    return _row_softmax(logits)


def _problem_masks(problem: AttentionProblem) -> dict[str, Any]:
    mask = problem.key_mask
    return {
        "first": np.array([problem.offset]),
        "right": 0 if problem.causal else None,
        "key_mask": None if mask is None else mask[None].copy(),
    }


def solve(problem: AttentionProblem, x: Array | None, factor: float = 1.0) -> tuple[Array, Array]:
    """Return ``(A X, logsumexp)`` of a problem, with its logits times ``factor``."""
    from .kernels.softmax import softmax_product

    q, k, _ = problem.arrays
    x = np.empty((problem.n_k, 0), problem.dtype) if x is None else x
    out, lse = softmax_product(
        q[None], k[None], x[None], scale=factor * problem.scale, **_problem_masks(problem)
    )
    return out[0], lse[0]


# Keys in a part of a product with few rows, and how many parts there are at most.
PART_KEYS, MOST_PARTS = 2048, 16


def solve_rows(problem: AttentionProblem, rows: Array, x: Array | None) -> tuple[Array, Array]:
    """Return ``(A_I X, logsumexp_I)`` of the rows I (s,) of a problem; A_I is never held."""
    out, lse = solve_rows_of_heads([problem], rows[None], None if x is None else x[None])
    return out[0], lse[0]


def solve_rows_of_heads(
    problems: Sequence[AttentionProblem], rows: Array, x: Array | None
) -> tuple[Array, Array]:
    """Return ``(A_I X, logsumexp_I)`` of heads that are alike, (H, s, m) and (H, s).

    ``problems`` differ in their arrays and masks only; ``rows`` int (H, s), ``x (H, n_k, m)``.
    Neither the number of heads nor what the others hold changes a bit of a head.
    """
    from .kernels.softmax import row_tile, softmax_product

    first = problems[0]
    heads, count = rows.shape
    x = np.empty((heads, first.n_k, 0), first.dtype) if x is None else x
    q = np.stack([problem.arrays.q[i] for problem, i in zip(problems, rows, strict=True)])
    if first.n_k >= 2 * PART_KEYS and not first.causal and count < PART_KEYS:
        made = [_solve_in_parts(*args) for args in zip(problems, q, x, strict=True)]
        return stacked([out for out, _ in made]), stacked([lse for _, lse in made])
    options: dict[str, Any] = {"scale": first.scale, "tile": row_tile(count)}
    masked = any(problem.key_mask is not None for problem in problems)
    if masked:
        everything = np.ones(first.n_k, bool)
        masks = (everything if y.key_mask is None else y.key_mask for y in problems)
        options["key_mask"] = np.stack(list(masks))
    k = stacked([problem.arrays.k for problem in problems])
    slab = np.arange(heads)
    if first.causal:
        # Each row has a position of its own: to the kernel it is a head, and all share the keys.
        options |= {"first": rows.ravel() + first.offset, "right": 0, "group": max(count, 1)}
        q, slab = q.reshape(heads * count, 1, first.d), np.repeat(slab, count)
    if masked:
        options["key_slab"] = slab
    out, lse = softmax_product(q, k, x, **options)
    return out.reshape(heads, count, x.shape[2]), lse.reshape(heads, count)


def _solve_in_parts(problem: AttentionProblem, q: Array, x: Array) -> tuple[Array, Array]:
    """Return the same for the queries ``q (s, d)`` of one head with many keys."""
    from .kernels.softmax import softmax_product

    n_k, (k, mask) = problem.n_k, (problem.arrays.k, problem.key_mask)
    # Few rows make few tiles, so keys are split as well: parts of them are heads to the kernel.
    # With lse_c of part c, lse = logsumexp_c lse_c and A_I X = sum_c exp(lse_c - lse) (A_I X)_c.
    parts = min(MOST_PARTS, n_k // PART_KEYS)
    width = n_k // parts
    made = []
    for start, heads in ((0, parts), (width * parts, 1)):
        stop = start + heads * width if start == 0 else n_k
        if start == stop:
            continue
        keys, values = (
            y[start:stop].reshape(heads, (stop - start) // heads, y.shape[1]) for y in (k, x)
        )
        made.append(
            softmax_product(
                np.repeat(q[None], heads, axis=0),
                keys,
                values,
                scale=problem.scale,
                key_mask=None if mask is None else mask[start:stop].reshape(heads, -1).copy(),
                key_slab=np.arange(heads),
            )
        )
    outs, lses = (np.concatenate([part[i] for part in made]) for i in (0, 1))
    top = lses.max(axis=0)
    shares = np.exp(lses - np.where(np.isneginf(top), 0, top))
    total = shares.sum(axis=0)
    seen = total > 0
    shares /= np.where(seen, total, 1)
    with np.errstate(divide="ignore"):
        lse = np.where(seen, top + np.log(total), -np.inf).astype(problem.dtype)
    return np.einsum("cs,csm->sm", shares, outs), lse


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


class SoftmaxAttention(AttentionOperator):
    """Represent the exact matrix ``A = rowsoftmax(scale Q K^T)`` by streaming products.

    Parameters
    ----------
    problem : AttentionProblem
        Its masks hold: hidden entries are zero, a row that sees no key is zero.

    Notes
    -----
    ``A X`` is an online softmax over tiles of keys, ``A^T Y`` a second pass with the stored
    row normalisers; both cost ``O(n_q n_k (d + m))`` and memory ``O(n_q + n_k)`` beside the
    result.  Norms are computed in float64.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> a = sa.AttentionProblem(np.eye(3), np.eye(3), np.eye(3)).exact
    >>> bool(np.allclose(a.row_sums(), 1))
    True
    """

    path = "exact"

    def __init__(self, problem: AttentionProblem) -> None:
        super().__init__((problem.n_q, problem.n_k), problem.dtype)
        self.problem = problem

    @property
    def nbytes(self) -> int:
        """Bytes of the queries and keys."""
        return self.problem.arrays.q.nbytes + self.problem.arrays.k.nbytes

    def _matmat(self, x: Array) -> Array:
        return solve(self.problem, self._cast(x))[0]

    def _rmatmat(self, y: Array) -> Array:
        return self._transposed(self._cast(y), 1)

    def wide(self) -> AttentionOperator:
        """Return itself: in float64 it would be another matrix, without this one's rounding."""
        return self

    def _transposed(self, y: Array, power: int) -> Array:
        """Return ``B^T Y`` with ``B_ij = A_ij^power``: logits and normalisers times ``power``."""
        from .kernels.softmax import transposed_product

        problem = self.problem
        mask = problem.key_mask
        return transposed_product(
            problem.arrays.q,
            problem.arrays.k,
            y,
            power * problem.logsumexp,
            scale=power * problem.scale,
            first=problem.offset,
            right=0 if problem.causal else None,
            key_mask=None if mask is None else mask[None].copy(),
        )

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        problem = self.problem
        chosen = pick(problem.n_q, index)
        logits = self._logits(problem.q[chosen], problem.k)
        if problem.causal or problem.key_mask is not None:
            np.copyto(logits, -np.inf, where=~problem.visible(chosen))
        return _row_softmax(logits)

    def columns(self, index: Index) -> Array:
        """Return chosen columns as a dense array (n_q, len(index))."""
        problem = self.problem
        chosen = pick(problem.n_k, index)
        logits = self._logits(problem.q, problem.k[chosen])
        lse = problem.logsumexp
        logits -= np.where(np.isfinite(lse), lse, 0)[:, None]
        # Hidden logits may lie far above the normaliser: out before they overflow.
        if problem.key_mask is not None:
            logits[:, ~problem.key_mask[chosen]] = -np.inf
        if problem.causal:
            last = np.arange(problem.n_q) + problem.offset
            logits[chosen[None, :] > last[:, None]] = -np.inf
        weights: Array = np.exp(logits, out=logits)
        return weights

    def _logits(self, q: Array, k: Array) -> Array:
        logits: Array = (self.dtype.type(self.problem.scale) * q) @ k.T
        return logits

    def row_norms(self) -> Array:
        """Return the Euclidean norms of the rows, float64 (n_q,).

        ``|A_i|^2 = exp(lse(2 L_i) - 2 lse(L_i))``.
        """
        wide = self.problem.astype(np.float64)
        lse = wide.logsumexp
        doubled = self.problem.cached("doubled", lambda: solve(wide, None, 2.0)[1])
        seen = np.isfinite(lse)
        norms = np.zeros(len(lse))
        norms[seen] = np.exp(0.5 * doubled[seen] - lse[seen])
        return norms

    def column_norms(self) -> Array:
        """Return the Euclidean norms of the columns, float64 (n_k,)."""
        wide = self.problem.astype(np.float64).exact
        return np.sqrt(wide._transposed(np.ones((self.shape[0], 1)), 2)[:, 0])

    def column_sums(self) -> Array:
        """Return ``A^T 1`` (n_k,): how much attention each key receives."""
        return self._rmatvec(np.ones(self.shape[0], self.dtype))

    def frobenius_norm(self) -> float:
        """Return ``|A|_F`` in float64."""
        return float(np.linalg.norm(self.row_norms()))


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
            _precision(*(np.empty(0, x.dtype) for x in (u, p))),
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
        from .kernels._threads import blas_single_thread

        # The same bits for any number of threads, and none that waits beside the next kernel.
        with blas_single_thread():
            return np.asarray((self.s.T if transpose else self.s) @ x)

    def _matmat(self, x: Array) -> Array:
        return np.asarray(self.u @ self._core(self.p @ self._cast(x)))

    def _rmatmat(self, y: Array) -> Array:
        return np.asarray(self.p.T @ self._core(self.u.T @ self._cast(y), transpose=True))

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
            return np.asarray(inner.T @ self.p)
        return np.ascontiguousarray((self.p.T @ inner).T)


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
            dtype = np.float64 if weights is None else _precision(weights)
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
        from .kernels.sketching import scatter

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


def zero_attention(problem: AttentionProblem) -> FactoredAttention:
    """Return the zero matrix of the shape of a problem, of rank 0."""
    u, p = (np.zeros(s, problem.dtype) for s in ((problem.n_q, 0), (0, problem.n_k)))
    return FactoredAttention(u, None, p)


class SampledAttention(AttentionOperator):
    """Represent ``Ahat`` by weights on few columns, one weight on all others, and some exact rows.

    ``Ahat_ij = weights_it`` for ``j = columns_t`` (or ``columns_it``), ``fill_i`` for every other
    key that row i sees, zero elsewhere; the rows ``rows`` are replaced by ``row_weights``.

    Parameters
    ----------
    columns : int array (r,) or (n_q, r)
        Distinct keys of every row, or of each row.
    weights : ndarray (n_q, r)
        Entries of ``Ahat`` at these columns, zero where a row does not see one.
    n_k : int
        Number of keys.
    effective_rank : int, optional
        Budget used, by default r.
    fill : ndarray (n_q,), optional
        Weight of each key that a row sees and that is not among its columns; None is zero.
    keys : bool ndarray (n_k,), optional
        True for the keys that get the fill; None is all.
    offset : int, optional
        The fill of row i goes to keys ``j <= i + offset``; None: to all of them.
    rows : int array (s,), optional
        Distinct rows to replace.
    row_weights : ndarray (s, n_k), optional
        What they are replaced by.

    Raises
    ------
    ValueError, TypeError
        For shapes that do not belong together, indices that are repeated or out of range, and
        ``keys`` or ``offset`` without a fill.

    Notes
    -----
    A product costs ``O((n_q + n_k) m + n_q r m + s n_k m)``; only where each row has its own
    columns and a fill there is a factor ``log n_k`` at ``n_q r``.  The keys that get the fill are
    summed themselves, by prefix sums where ``offset`` is given and by a tree of partial sums where
    the columns differ: nothing is subtracted from a total, where digits would cancel.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> a = sa.SampledAttention(np.array([2, 0]), np.array([[0.25, 0.75]]), n_k=3)
    >>> a.to_dense().tolist()
    [[0.75, 0.0, 0.25]]
    >>> half = np.full(2, 0.5)
    >>> a = sa.SampledAttention(np.array([0]), np.ones((2, 1)), 3, fill=half, offset=0)
    >>> a.to_dense().tolist()
    [[1.0, 0.0, 0.0], [1.0, 0.5, 0.0]]
    """

    def __init__(
        self,
        columns: Array,
        weights: Array,
        n_k: int,
        effective_rank: int | None = None,
        *,
        fill: Array | None = None,
        keys: Array | None = None,
        offset: int | None = None,
        rows: Array | None = None,
        row_weights: Array | None = None,
    ) -> None:
        wanted = (weights.shape, weights.shape[1:])
        if weights.ndim != 2 or columns.shape not in wanted:
            raise ValueError(
                f"columns must have the shape {wanted[0]} of weights or {wanted[1]}, "
                f"got {columns.shape}; give a column for each weight"
            )
        ordered = np.sort(columns, axis=-1)
        if ordered.size and (
            ordered.min() < 0 or ordered.max() >= n_k or (np.diff(ordered) == 0).any()
        ):
            raise ValueError(
                f"columns must be distinct in each row and in 0..n_k - 1 = {n_k - 1}, got indices "
                f"from {ordered.min()} to {ordered.max()}; add the weights of equal columns"
            )
        n_q = weights.shape[0]
        if fill is None and not (keys is None and offset is None):
            raise ValueError(
                "fill must be given where keys or offset say which keys get it, got None; "
                "drop keys and offset"
            )
        if fill is not None and fill.shape != (n_q,):
            raise ValueError(
                f"fill must have shape (n_q,) = ({n_q},), got {fill.shape}; give one weight a row"
            )
        if keys is not None and (keys.shape != (n_k,) or keys.dtype != np.bool_):
            raise ValueError(
                f"keys must be boolean of shape (n_k,) = ({n_k},), got {keys.dtype} of shape "
                f"{keys.shape}; True for the keys that get the fill"
            )
        if (rows is None) != (row_weights is None):
            raise ValueError(
                "rows and row_weights must be given together, got one of them; "
                "say which rows are replaced, and by what"
            )
        if rows is not None and row_weights is not None:
            _check_rows(rows, row_weights, n_q, n_k)
        extra = [x for x in (fill, row_weights) if x is not None]
        super().__init__(
            (n_q, n_k),
            _precision(weights, *extra),
            weights.shape[1] if effective_rank is None else effective_rank,
        )
        self.chosen = columns
        self.weights = weights.astype(self.dtype, copy=False)
        self.fill = None if fill is None else fill.astype(self.dtype, copy=False)
        self.keys = keys
        self.offset = offset
        self.replaced = rows
        self.row_weights = (
            None if row_weights is None else row_weights.astype(self.dtype, copy=False)
        )

    @property
    def rank_bound(self) -> int:
        """Shared columns, replaced rows, and one for a fill that is not causal, at most."""
        if self.chosen.ndim == 2 or self.offset is not None:
            return min(self.shape)
        extra = 0 if self.replaced is None else len(self.replaced)
        extra += 0 if self.fill is None else 1
        return int(min(*self.shape, self.weights.shape[1] + extra))

    def _sparse(self) -> Any:
        from scipy.sparse import csr_array

        n_q, r = self.weights.shape
        starts = np.arange(0, n_q * r + 1, r) if r else np.zeros(n_q + 1, np.int64)
        return csr_array((self.weights.ravel(), self.chosen.ravel(), starts), shape=self.shape)

    # --- the fill -----------------------------------------------------------------------------

    def _filled(self) -> Array:
        """Return the keys that get a fill in some row, bool (n_k,)."""
        keys = np.ones(self.shape[1], bool) if self.keys is None else self.keys.copy()
        if self.chosen.ndim == 1:
            keys[self.chosen] = False
        return keys

    def _ends(self) -> Array:
        """Return for each row the number of keys that its fill may reach."""
        n_q, n_k = self.shape
        if self.offset is None:
            return np.full(n_q, n_k)
        return np.clip(np.arange(n_q) + self.offset + 1, 0, n_k)

    def _nodes(self, fill: Array, leaves: int) -> Any:
        """Return which partial sums make up the fill of each row, sparse (n_q, 2 leaves).

        Node 1 is the sum over all keys, node t the sum of nodes 2t and 2t + 1, node leaves + j is
        key j alone.  The keys between two columns of a row are 2 log2(leaves) nodes at most.
        """
        from scipy.sparse import csr_array

        n_q, r = self.weights.shape
        ordered = np.sort(self.chosen, axis=1)
        ends = self._ends()
        low = np.concatenate([np.zeros((n_q, 1), np.int64), ordered + 1], axis=1).ravel()
        high = np.concatenate([ordered, ends[:, None]], axis=1)
        high = np.minimum(high, ends[:, None]).ravel()
        row = np.repeat(np.arange(n_q), r + 1)
        some = low < high
        low, high, row = low[some] + leaves, high[some] + leaves, row[some]
        nodes, owners = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        while len(low):
            odd = low % 2 == 1
            nodes.append(low[odd])
            owners.append(row[odd])
            low = low + odd
            odd = high % 2 == 1
            high = high - odd
            last = odd & (low <= high)
            nodes.append(high[last])
            owners.append(row[last])
            low, high = low // 2, high // 2
            some = low < high
            low, high, row = low[some], high[some], row[some]
        owner, node = np.concatenate(owners), np.concatenate(nodes)
        return csr_array((fill[owner], (owner, node)), shape=(n_q, 2 * leaves))

    def _leaves(self) -> int:
        return 1 << max(self.shape[1] - 1, 0).bit_length()

    def _fill_product(self, fill: Array, x: Array) -> Array:
        """Return the product of the fill with X (n_k, m); sums are taken in float64."""
        n_q, n_k = self.shape
        kept = np.where(self._filled()[:, None], x, 0).astype(np.float64, copy=False)
        if self.chosen.ndim == 2:
            leaves = self._leaves()
            tree = np.zeros((2 * leaves, x.shape[1]))
            tree[leaves : leaves + n_k] = kept
            level = leaves
            while level > 1:
                tree[level // 2 : level] = (
                    tree[level : 2 * level : 2] + tree[level + 1 : 2 * level : 2]
                )
                level //= 2
            spread: Array = (self._nodes(fill.astype(np.float64), leaves) @ tree).astype(self.dtype)
            return spread
        if self.offset is None:
            sums = np.broadcast_to(kept.sum(axis=0), (n_q, x.shape[1]))
        else:
            prefix = np.concatenate([np.zeros((1, x.shape[1])), np.cumsum(kept, axis=0)])
            sums = prefix[self._ends()]
        product: Array = (fill[:, None] * sums).astype(self.dtype)
        return product

    def _fill_transposed(self, fill: Array, y: Array) -> Array:
        """Return the transposed product of the fill with Y (n_q, m)."""
        n_q, n_k = self.shape
        if self.chosen.ndim == 2:
            leaves = self._leaves()
            tree = self._nodes(fill.astype(np.float64), leaves).T @ y.astype(np.float64)
            level = 1
            while level < leaves:
                tree[2 * level : 4 * level] += np.repeat(tree[level : 2 * level], 2, axis=0)
                level *= 2
            sums = tree[leaves : leaves + n_k]
        else:
            scaled = fill[:, None] * y.astype(np.float64, copy=False)
            if self.offset is None:
                sums = np.broadcast_to(scaled.sum(axis=0), (n_k, y.shape[1]))
            else:
                # Row i reaches key j if i >= j - offset.
                suffix = np.zeros((n_q + 1, y.shape[1]))
                suffix[:-1] = np.cumsum(scaled[::-1], axis=0)[::-1]
                sums = suffix[np.clip(np.arange(n_k) - self.offset, 0, n_q)]
        return np.where(self._filled()[:, None], sums, 0).astype(self.dtype)

    # --- products -----------------------------------------------------------------------------

    def _matmat(self, x: Array) -> Array:
        x = self._cast(x)
        shared = self.chosen.ndim == 1
        product: Array = self.weights @ x[self.chosen] if shared else self._sparse() @ x
        if self.fill is not None:
            product += self._fill_product(self.fill, x)
        if self.replaced is not None and self.row_weights is not None:
            product[self.replaced] = self.row_weights @ x
        return product

    def _rmatmat(self, y: Array) -> Array:
        y = self._cast(y)
        others = y
        if self.replaced is not None:
            others = y.copy()
            others[self.replaced] = 0
        if self.chosen.ndim == 1:
            out = np.zeros((self.shape[1], y.shape[1]), self.dtype)
            out[self.chosen] = self.weights.T @ others
        else:
            out = self._sparse().T @ others
        if self.fill is not None:
            out += self._fill_transposed(self.fill, others)
        if self.replaced is not None and self.row_weights is not None:
            out += self.row_weights.T @ y[self.replaced]
        return out

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        out = np.zeros((len(chosen), self.shape[1]), self.dtype)
        if self.fill is not None:
            reach = np.arange(self.shape[1]) < self._ends()[chosen][:, None]
            np.copyto(out, self.fill[chosen][:, None], where=reach & self._filled())
        if self.chosen.ndim == 1:
            out[:, self.chosen] = self.weights[chosen]
        else:
            np.put_along_axis(out, self.chosen[chosen], self.weights[chosen], axis=1)
        if self.replaced is not None and self.row_weights is not None:
            place = np.full(self.shape[0], -1)
            place[self.replaced] = np.arange(len(self.replaced))
            exact = place[chosen]
            out[exact >= 0] = self.row_weights[exact[exact >= 0]]
        return out


def _check_rows(rows: Array, row_weights: Array, n_q: int, n_k: int) -> None:
    """Refuse replaced rows that are not distinct rows with n_k weights each."""
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise TypeError(
            f"rows must be a one-dimensional integer array, got {rows.dtype} of shape "
            f"{rows.shape}; give indices of queries"
        )
    ordered = np.sort(rows)
    if len(rows) and (ordered[0] < 0 or ordered[-1] >= n_q or (np.diff(ordered) == 0).any()):
        raise ValueError(
            f"rows must be distinct and in 0..n_q - 1 = {n_q - 1}, got {len(rows)} indices from "
            f"{ordered[0]} to {ordered[-1]}; give each row once"
        )
    if row_weights.shape != (len(rows), n_k):
        raise ValueError(
            f"row_weights must have shape (s, n_k) = ({len(rows)}, {n_k}), got "
            f"{row_weights.shape}; give one row of weights for each of rows"
        )


class ProductSketch(AttentionOperator):
    """Represent ``Ahat = A S^T S`` by the exact matrix and a sketch of its keys.

    Parameters
    ----------
    problem : AttentionProblem
    sketch : sketchattn.sketches.Sketch (r, n)
        n is the number of keys that are not masked.
    center : bool, default False
        ``Ahat = a m^T + A S^T S (I - 1 m^T)`` instead, with the mean ``m^T X`` over the keys that
        are not masked and ``a = A 1`` (ones, zero for a row that sees no key).

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=8, d=4, rng=0)[0]
    >>> sketch = sa.sketches.make_sketch("dct", 8, 8, rng=0)
    >>> sa.error_report(problem, sa.ProductSketch(problem, sketch)).matrix_fro_rel < 1e-6
    True
    """

    def __init__(self, problem: AttentionProblem, sketch: Any, *, center: bool = False) -> None:
        n = len(problem.kept_keys)
        if sketch.shape[1] != n:
            raise ValueError(
                f"sketch must have n = {n} columns, one for each key that is not masked, got "
                f"{sketch.shape[1]}; draw it for this problem"
            )
        super().__init__((problem.n_q, problem.n_k), problem.dtype, int(sketch.shape[0]))
        self.problem = problem
        self.sketch = sketch
        self.center = center

    @property
    def rank_bound(self) -> int:
        """Rows of the sketch, and one more for the mean."""
        return int(min(*self.shape, self.sketch.shape[0] + int(self.center)))

    @property
    def nbytes(self) -> int:
        """Bytes of the exact operator and of the draw."""
        return self.problem.exact.nbytes + int(self.sketch.nbytes)

    def wide(self) -> AttentionOperator:
        """Return the same estimator of the same problem and draw in float64."""
        if self.dtype == np.float64:
            return self
        again = type(self.sketch).from_arrays(
            self.sketch.arrays, self.sketch.shape, dtype=np.float64, **self.sketch.parameters
        )
        return ProductSketch(self.problem.astype(np.float64), again, center=self.center)

    def _project(self, x: Array) -> Array:
        """Return ``S^T S X`` for (n, m), rows that are not masked."""
        return np.asarray(self.sketch.T @ (self.sketch @ x), self.dtype)

    def _seen(self) -> Array:
        return (self.problem.visible_counts() > 0).astype(self.dtype)

    def _matmat(self, x: Array) -> Array:
        keys = self.problem.kept_keys
        kept = self._cast(x)[keys]
        mean = kept.mean(axis=0) if self.center else np.zeros(kept.shape[1], self.dtype)
        full = np.zeros((self.shape[1], kept.shape[1]), self.dtype)
        full[keys] = self._project(kept - mean)
        out: Array = self.problem.exact @ full + self._seen()[:, None] * mean
        return out

    def _spread(self, z: Array, total: Array) -> Array:
        """Return ``Ahat^T Y`` from ``z = (A^T Y)`` at the keys kept and ``total = a^T Y``."""
        projected = self._project(z)
        if self.center:
            projected = projected - projected.mean(axis=0) + total / max(len(projected), 1)
        out = np.zeros((self.shape[1], z.shape[1]), self.dtype)
        out[self.problem.kept_keys] = projected
        return out

    def _rmatmat(self, y: Array) -> Array:
        y = self._cast(y)
        z = (self.problem.exact.T @ y)[self.problem.kept_keys]
        return self._spread(z, self._seen() @ y)

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        z = self.problem.exact.rows(chosen)[:, self.problem.kept_keys].T
        return np.ascontiguousarray(self._spread(z, self._seen()[chosen]).T)


class DenseAttention(AttentionOperator):
    """Represent a matrix that is held as an array, for instance somebody else's ``Ahat``.

    Parameters
    ----------
    matrix : ndarray (n_q, n_k)
    """

    def __init__(self, matrix: Array) -> None:
        super().__init__(matrix.shape, _precision(matrix))
        self.matrix = np.ascontiguousarray(matrix, self.dtype)

    def _matmat(self, x: Array) -> Array:
        return self.matrix @ self._cast(x)

    def _rmatmat(self, y: Array) -> Array:
        return self.matrix.T @ self._cast(y)

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        return self.matrix[pick(self.shape[0], index)]


class WrappedAttention(AttentionOperator):
    """Give a foreign ``LinearOperator`` the interface of an attention operator.

    Parameters
    ----------
    operator : scipy.sparse.linalg.LinearOperator (n_q, n_k)
    """

    def __init__(self, operator: Any) -> None:
        dtype = np.float32 if operator.dtype == np.float32 else np.float64
        super().__init__(operator.shape, dtype)
        self.operator = operator

    def wide(self) -> AttentionOperator:
        """Return itself: how the products are computed is not known."""
        return self

    def _matmat(self, x: Array) -> Array:
        return np.asarray(self.operator @ self._cast(x), self.dtype)

    def _rmatmat(self, y: Array) -> Array:
        return np.asarray(self.operator.T @ self._cast(y), self.dtype)


def as_operator(ahat: object, problem: AttentionProblem) -> AttentionOperator:
    """Return ``ahat`` as an attention operator of the shape of a problem.

    Parameters
    ----------
    ahat : AttentionOperator, LinearOperator, or array (n_q, n_k)
    problem : AttentionProblem

    Raises
    ------
    TypeError, ValueError
        If it is none of these, or of another shape, not real, not finite, or an operator without
        its transposed product.
    """
    if isinstance(ahat, AttentionOperator):
        operator = ahat
    elif isinstance(ahat, LinearOperator):
        if np.issubdtype(ahat.dtype, np.complexfloating):
            raise TypeError(f"ahat must be real, got {ahat.dtype}; pass its real part")
        operator = WrappedAttention(ahat)
    else:
        matrix = as_array(ahat, "ahat")
        if matrix.ndim != 2:
            raise ValueError(
                f"ahat must be a matrix of shape ({problem.n_q}, {problem.n_k}), "
                f"got shape {matrix.shape}; a report is about one head"
            )
        float_dtype(matrix, "ahat")
        check_finite(matrix, "ahat")
        operator = DenseAttention(matrix)
    if operator.shape != (problem.n_q, problem.n_k):
        raise ValueError(
            f"ahat must have the shape ({problem.n_q}, {problem.n_k}) of the problem, "
            f"got {operator.shape}; approximate the same problem"
        )
    if isinstance(operator, WrappedAttention):
        try:
            operator.T @ np.zeros(problem.n_q)
        except (TypeError, NotImplementedError) as error:
            raise TypeError(
                f"ahat must have its transposed product, got {type(ahat).__name__} whose rmatvec "
                f"fails ({error}); define rmatvec or pass an array"
            ) from error
    return operator
