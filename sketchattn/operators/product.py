"""The sketched product ``A S^T S``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.head import Head
from ..kernels._threads import product
from .base import AttentionOperator, Index, pick
from .pullback import Gradient, rows_pullback
from .softmax import exact_of

Array = NDArray[Any]


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

    def __init__(self, problem: Head, sketch: Any, *, center: bool = False) -> None:
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

    def reads(self, problem: Head) -> Array:
        """Return how many keys each row sees: the sketch is of the exact matrix."""
        return problem.visible_counts().astype(np.float64)

    @property
    def nbytes(self) -> int:
        """Bytes of the exact operator and of the draw."""
        return exact_of(self.problem).nbytes + int(self.sketch.nbytes)

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

    def _sketched(self, x: Array) -> tuple[Array, Array]:
        """Return ``S^T S (X - 1 mean^T)``, zero at masked keys, and the mean that is exact."""
        keys = self.problem.kept_keys
        kept = self._cast(x)[keys]
        mean = kept.mean(axis=0) if self.center else np.zeros(kept.shape[1], self.dtype)
        full = np.zeros((self.shape[1], kept.shape[1]), self.dtype)
        full[keys] = self._project(kept - mean)
        return full, mean

    def _matmat(self, x: Array) -> Array:
        full, mean = self._sketched(x)
        out: Array = exact_of(self.problem) @ full + self._seen()[:, None] * mean
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
        z = (exact_of(self.problem).T @ y)[self.problem.kept_keys]
        return self._spread(z, product(self._seen(), y))

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        z = exact_of(self.problem).rows(chosen)[:, self.problem.kept_keys].T
        return np.ascontiguousarray(self._spread(z, self._seen()[chosen]).T)

    def pullback(self, x: Array, g: Array) -> Gradient:
        """Return what a cotangent G (n_q, m) of ``Ahat X`` is at the queries, keys and X."""
        made = rows_pullback(self.problem, None, self._sketched(x)[0], g)
        return made._replace(v=self._spread(made.v[self.problem.kept_keys], self._seen() @ g))
