"""Attention matrices as linear operators: the exact one, and the few kinds of approximations.

Each is a ``scipy.sparse.linalg.LinearOperator`` of shape (n_q, n_k): ``ahat @ v`` and
``ahat.T @ y`` cost what the structure costs, and nothing of size n_q x n_k is formed unless
``to_dense`` is asked for.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator

from .problem import AttentionProblem, as_array, check_finite, float_dtype

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
    """Represent ``Ahat = U S P`` by its factors.

    Parameters
    ----------
    u : ndarray (n_q, r)
    s : ndarray (r, r), (r,) for a diagonal, or None for the identity
    p : ndarray (r, n_k)
    effective_rank : int, optional
        Budget used, by default r.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> mean = sa.FactoredAttention(np.ones((4, 1)), None, np.full((1, 2), 0.5))
    >>> (mean @ np.array([1.0, 3.0])).tolist()
    [2.0, 2.0, 2.0, 2.0]
    """

    def __init__(
        self, u: Array, s: Array | None, p: Array, effective_rank: int | None = None
    ) -> None:
        if u.ndim != 2 or p.ndim != 2:
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
            _precision(u, p),
            inner[0] if effective_rank is None else effective_rank,
        )
        self.u, self.p = u.astype(self.dtype, copy=False), p.astype(self.dtype, copy=False)
        self.s = None if s is None else s.astype(self.dtype, copy=False)

    @property
    def rank_bound(self) -> int:
        """The smallest inner dimension of the factors."""
        return int(min(*self.u.shape, *self.p.shape))

    def _core(self, x: Array, transpose: bool = False) -> Array:
        if self.s is None:
            return x
        if self.s.ndim == 1:
            return self.s[:, None] * x
        return (self.s.T if transpose else self.s) @ x

    def _matmat(self, x: Array) -> Array:
        return self.u @ self._core(self.p @ self._cast(x))

    def _rmatmat(self, y: Array) -> Array:
        return self.p.T @ self._core(self.u.T @ self._cast(y), transpose=True)

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        rows: Array = self._core(self.u[chosen].T, transpose=True).T @ self.p
        return rows


def zero_attention(problem: AttentionProblem) -> FactoredAttention:
    """Return the zero matrix of the shape of a problem, of rank 0."""
    u, p = (np.zeros(s, problem.dtype) for s in ((problem.n_q, 0), (0, problem.n_k)))
    return FactoredAttention(u, None, p)


class SampledAttention(AttentionOperator):
    """Represent ``Ahat`` by weights on few columns, the same for all rows or a row's own.

    Parameters
    ----------
    columns : int array (r,) or (n_q, r)
        Distinct keys of every row, or of each row.
    weights : ndarray (n_q, r)
        Entries of ``Ahat`` at these columns; all others are zero.
    n_k : int
        Number of keys.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> a = sa.SampledAttention(np.array([2, 0]), np.array([[0.25, 0.75]]), n_k=3)
    >>> a.to_dense().tolist()
    [[0.75, 0.0, 0.25]]
    """

    def __init__(
        self, columns: Array, weights: Array, n_k: int, effective_rank: int | None = None
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
        super().__init__(
            (weights.shape[0], n_k),
            _precision(weights),
            weights.shape[1] if effective_rank is None else effective_rank,
        )
        self.chosen = columns
        self.weights = weights.astype(self.dtype, copy=False)

    @property
    def rank_bound(self) -> int:
        """The number of shared columns, or no less than the smaller side."""
        shared = self.chosen.ndim == 1
        return int(min(*self.shape, self.weights.shape[1] if shared else max(self.shape)))

    def _sparse(self) -> Any:
        from scipy.sparse import csr_array

        n_q, r = self.weights.shape
        starts = np.arange(0, n_q * r + 1, r) if r else np.zeros(n_q + 1, np.int64)
        return csr_array((self.weights.ravel(), self.chosen.ravel(), starts), shape=self.shape)

    def _matmat(self, x: Array) -> Array:
        x = self._cast(x)
        if self.chosen.ndim == 1:
            return self.weights @ x[self.chosen]
        product: Array = self._sparse() @ x
        return product

    def _rmatmat(self, y: Array) -> Array:
        y = self._cast(y)
        if self.chosen.ndim == 1:
            out = np.zeros((self.shape[1], y.shape[1]), self.dtype)
            out[self.chosen] = self.weights.T @ y
            return out
        product: Array = self._sparse().T @ y
        return product

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        out = np.zeros((len(chosen), self.shape[1]), self.dtype)
        if self.chosen.ndim == 1:
            out[:, self.chosen] = self.weights[chosen]
        else:
            np.put_along_axis(out, self.chosen[chosen], self.weights[chosen], axis=1)
        return out


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
