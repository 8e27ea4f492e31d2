"""Chosen columns with weights, a fill for the rest, and rows that are exact."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.head import Head
from ..kernels._threads import product
from .base import AttentionOperator, Index, pick, working_precision

Array = NDArray[Any]


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
            working_precision(weights, *extra),
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

    def reads(self, problem: Head) -> Array:
        """Return the columns that each row sees, one more for a fill, all keys for exact rows."""
        seen = problem.visible_counts()
        mask = problem.key_mask
        kept = np.ones(self.chosen.shape, bool) if mask is None else mask[self.chosen]
        if self.chosen.ndim == 1:
            columns = np.sort(self.chosen[kept])
            ends = np.arange(self.shape[0]) + problem.offset + 1
            own = np.full(self.shape[0], len(columns))
            if problem.causal:
                own = np.searchsorted(columns, ends)
        else:
            if problem.causal:
                kept &= self.chosen <= np.arange(self.shape[0])[:, None] + problem.offset
            own = kept.sum(axis=1)
        found = own.astype(np.float64)
        if self.fill is not None:
            found += own < seen
        if self.replaced is not None:
            found[self.replaced] = seen[self.replaced]
        return found

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
        out: Array = product(self.weights, x[self.chosen]) if shared else self._sparse() @ x
        if self.fill is not None:
            out += self._fill_product(self.fill, x)
        if self.replaced is not None and self.row_weights is not None:
            out[self.replaced] = product(self.row_weights, x)
        return out

    def _rmatmat(self, y: Array) -> Array:
        y = self._cast(y)
        others = y
        if self.replaced is not None:
            others = y.copy()
            others[self.replaced] = 0
        if self.chosen.ndim == 1:
            out = np.zeros((self.shape[1], y.shape[1]), self.dtype)
            out[self.chosen] = product(self.weights.T, others)
        else:
            out = self._sparse().T @ others
        if self.fill is not None:
            out += self._fill_transposed(self.fill, others)
        if self.replaced is not None and self.row_weights is not None:
            out += product(self.row_weights.T, y[self.replaced])
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
