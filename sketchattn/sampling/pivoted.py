"""Randomly pivoted Cholesky: keys that span a Gaussian kernel, drawn by what is left of it.

Chen, Epperly, Tropp and Webber, "Randomly pivoted Cholesky" (arXiv 2207.06503).  The residual of
``G_jl = exp(-|z_j - z_l|^2 / 2)`` after the pivots J is ``G - G_:J G_JJ^-1 G_J:``; its diagonal
``res`` falls from 1, and the next pivot has the law ``res_j p_j / sum``.  With
``p_j = e^{|z_j|^2}`` it is the law of the diagonal of the exponential kernel ``exp(z_j . z_l)``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..kernels._threads import map_pieces

Array = NDArray[Any]

# Pivots whose columns are subtracted from all keys together, and keys of a piece of that work.
BLOCK, PIECE = 128, 512
# Keys whose residual may be brought up to date one at a time, between two blocks.
LEAST_ROWS, ROWS_SHARE = 4 * BLOCK, 32


class PivotedCholesky:
    """Draw pivots of a Gaussian kernel one after another, from one row of uniforms each.

    The same pivots, one by one, as if every column were subtracted at once: cost ``O(n r (d +
    r))``, nearly all of it products of matrices.  In float64; the bits depend on neither the
    number of threads nor ``most``.

    Parameters
    ----------
    z : float64 array (n, d)
        Keys, C-contiguous and finite.
    log_law : array (n,)
        ``ln p_j``.
    most : int
        Number of pivots at most.
    tolerance : float
        Keys whose residual is at most this are out.

    Attributes
    ----------
    pivots : list of int
        What was drawn, distinct.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> z = rng.standard_normal((6, 2))
    >>> z[3:] = z[:3]
    >>> drawn = PivotedCholesky(z, np.zeros(6), 6, 1e-12)
    >>> [drawn.step(rng.random(6)) for _ in range(4)]
    [True, True, True, False]
    >>> sorted(j % 3 for j in drawn.pivots)
    [0, 1, 2]
    """

    def __init__(self, z: Array, log_law: Array, most: int, tolerance: float) -> None:
        n = len(z)
        self.pivots: list[int] = []
        self._z, self._half = z, 0.5 * np.einsum("ij,ij->i", z, z)
        self._log_law, self._tolerance = log_law, tolerance
        self._factor = np.empty((n, most))
        self._flushed = 0
        self._res = np.ones(n)
        self._weight = np.empty(n)
        self._chosen, self._count = np.empty(BLOCK, np.int64), 0
        self._row_of = np.full(n, -1)
        size = min(n, max(LEAST_ROWS, n // ROWS_SHARE))
        self._rows, self._used = np.empty((size, BLOCK)), 0
        self._done, self._left = np.empty(size, np.int64), np.empty(size)
        self._weigh()

    def step(self, u: Array) -> bool:
        """Draw one more pivot with the uniforms ``u (n,)``; False where nothing is left."""
        from ..kernels.pivoted import next_pivot

        while True:
            if self._count == BLOCK:
                self._flush()
            found, self._used = next_pivot(
                u,
                self._weight,
                self._res,
                self._tolerance,
                self._z,
                self._half,
                self._factor,
                self._flushed,
                self._chosen,
                self._count,
                self._row_of,
                self._rows,
                self._done,
                self._left,
                self._used,
            )
            if found >= 0:
                self._count += 1
                self.pivots.append(int(found))
                return True
            if self._count == 0:
                return False
            # Old weights that underflow say nothing, and without room none can be renewed.
            self._flush()

    def _weigh(self) -> None:
        """Set the weights of the race from the residuals."""
        alive = self._res > self._tolerance
        score = np.full(len(alive), -np.inf)
        score[alive] = np.log(self._res[alive]) + self._log_law[alive]
        top = score.max(initial=-np.inf)
        np.exp(score - (top if np.isfinite(top) else 0.0), out=self._weight)

    def _flush(self) -> None:
        """Subtract the columns of the pivots since the last time from all keys."""
        from scipy.linalg.blas import dtrsm

        from ..kernels.pivoted import exponentials

        start, stop = self._flushed, self._flushed + self._count
        chosen = self._chosen[: self._count].copy()
        lower = np.asfortranarray(np.tril(self._rows[self._row_of[chosen], : self._count]))
        across, basis = self._z[chosen].T.copy(), self._factor[chosen, :start].T.copy()
        half = self._half[chosen]

        def work(piece: slice) -> None:
            x = self._z[piece] @ across
            exponentials(x, self._half[piece], half, 0.0)
            x -= self._factor[piece, :start] @ basis
            x = dtrsm(1.0, lower, x.T, lower=1, overwrite_b=1).T
            self._factor[piece, start:stop] = x
            self._res[piece] -= np.einsum("ij,ij->i", x, x)

        pieces = [slice(i, i + PIECE) for i in range(0, len(self._z), PIECE)]
        for _ in map_pieces(work, pieces):
            pass
        np.maximum(self._res, 0.0, out=self._res)
        self._res[self.pivots] = 0.0
        self._flushed, self._count, self._used = stop, 0, 0
        self._row_of[:] = -1
        self._weigh()
