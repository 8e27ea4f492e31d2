"""Matrices that are made of smaller ones, each on rows and keys of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.head import Head
from .base import AttentionOperator, Index, pick
from .merging import shares_of

Array = NDArray[Any]


class Block(NamedTuple):
    """Hold a matrix, where it stands, and a factor of each of its rows.

    Attributes
    ----------
    rows : slice
        Its rows, with start and stop.
    columns : int array
        Its keys, distinct.
    matrix : AttentionOperator (len(rows), len(columns))
    factor : ndarray (len(rows),)
    """

    rows: slice
    columns: Array
    matrix: AttentionOperator
    factor: Array


class BlockAttention(AttentionOperator):
    """Represent ``Ahat`` as a sum of blocks: ``Ahat[rows, columns] += diag(factor) matrix``.

    Parameters
    ----------
    blocks : sequence of Block
    shape : (int, int)
    dtype : dtype
    effective_rank : int, optional
        Budget used.

    Notes
    -----
    A product costs what those with the blocks cost.  Blocks may overlap: they are added.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        shape: tuple[int, int],
        dtype: Any,
        effective_rank: int | None = None,
    ) -> None:
        super().__init__(shape, dtype, effective_rank)
        self.blocks = [
            block._replace(factor=block.factor.astype(self.dtype, copy=False)) for block in blocks
        ]
        if blocks and all(block.matrix.path == "exact" for block in blocks):
            self.path = "exact"

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays of all blocks."""
        return sum(x.columns.nbytes + x.factor.nbytes + x.matrix.nbytes for x in self.blocks)

    def reads(self, problem: Head) -> Array:
        """Return the sum over the blocks of a row; those that hide keys are exact."""
        q, k, _ = problem.arrays
        found = np.zeros(self.shape[0])
        for rows, columns, matrix, _ in self.blocks:
            part = Head.adopt(q[rows], k[columns], scale=problem.scale)
            found[rows] += matrix.reads(part)
        return found

    def wide(self) -> AttentionOperator:
        """Return the operator whose products are computed in float64 from the same arrays."""
        if self.dtype == np.float64:
            return self
        twin = copy.copy(self)
        twin.dtype = np.dtype(np.float64)
        twin.blocks = [
            x._replace(matrix=x.matrix.wide(), factor=x.factor.astype(np.float64))
            for x in self.blocks
        ]
        return twin

    def _matmat(self, x: Array) -> Array:
        x = self._cast(x)
        out = np.zeros((self.shape[0], x.shape[1]), self.dtype)
        for rows, columns, matrix, factor in self.blocks:
            out[rows] += factor[:, None] * (matrix @ x[columns])
        return out

    def _rmatmat(self, y: Array) -> Array:
        y = self._cast(y)
        out = np.zeros((self.shape[1], y.shape[1]), self.dtype)
        for rows, columns, matrix, factor in self.blocks:
            out[columns] += matrix.T @ (factor[:, None] * y[rows])
        return out

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        out = np.zeros((len(chosen), self.shape[1]), self.dtype)
        for rows, columns, matrix, factor in self.blocks:
            inside = np.flatnonzero((chosen >= rows.start) & (chosen < rows.stop))
            if len(inside):
                local = chosen[inside] - rows.start
                out[np.ix_(inside, columns)] += factor[local, None] * matrix.rows(local)
        return out


def merged_blocks(
    problem: Head,
    parts: Sequence[tuple[slice, Array, AttentionOperator, Array]],
    effective_rank: int | None = None,
) -> BlockAttention:
    """Return the blocks of a problem whose rows share one normaliser.

    ``parts`` are rows, keys, the row-normalised matrix on them, and the logsumexp of its rows.
    """
    shares = shares_of([(rows, lse) for rows, _, _, lse in parts], problem.n_q)
    blocks = [
        Block(rows, columns, matrix, share)
        for (rows, columns, matrix, _), share in zip(parts, shares, strict=True)
    ]
    return BlockAttention(blocks, (problem.n_q, problem.n_k), problem.dtype, effective_rank)
