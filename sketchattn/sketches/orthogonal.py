"""Sketches with orthogonal rows: sampled fast transforms (SRHT, DCT), and Haar matrices."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import numpy as np

from ..base.arguments import check_flag
from ..base.draws import Rng
from .base import Array, Sketch, Spec, check_indices, check_signs, random_signs, register, streams
from .dense import DenseSketch


class _SampledTransform(Sketch):
    """Base of ``S = sqrt(N/r) P C D``: signs D, an orthonormal C of order N, r uniform rows P."""

    array_names = ("signs", "rows")
    parameter_defaults = {"replace": False}

    @classmethod
    @abstractmethod
    def _order(cls, n: int) -> int:
        """Return the order N >= n of the transform."""

    @classmethod
    def _resolve(cls, r: int, n: int, parameters: dict[str, Any]) -> dict[str, Any]:
        replace = check_flag(parameters["replace"], "replace", "False draws distinct rows")
        order = cls._order(n)
        if not replace and r > order:
            padded = f" (n = {n} padded to a power of two)" if order != n else ""
            raise ValueError(
                f"r must be between 1 and the {order} rows of the transform{padded} for kind "
                f"{cls.kind!r} with distinct rows, got {r}; lower r or pass replace=True"
            )
        return {"replace": replace}

    @classmethod
    def _scale(cls, form: Spec) -> float:
        return math.sqrt(cls._order(form.n) / form.r)

    @classmethod
    def _draw(cls, form: Spec, rng: Rng) -> dict[str, Array]:
        sign_stream, row_stream = streams(rng, 2)
        order = cls._order(form.n)
        if form.parameters["replace"]:
            rows = row_stream.integers(0, order, size=form.r)
        else:
            # The whole permutation, so that a larger r extends the rows of a smaller one.
            rows = row_stream.permutation(order)[: form.r].copy()
        return {"signs": random_signs(sign_stream, form.n), "rows": rows}

    @classmethod
    def _check_arrays(cls, arrays: dict[str, Array], form: Spec) -> dict[str, Array]:
        rows = check_indices(
            arrays["rows"], "rows", (form.r,), "(r,)", cls._order(form.n), np.int64
        )
        repeats = form.r - len(np.unique(rows))
        if repeats and not form.parameters["replace"]:
            raise ValueError(
                f"rows must be distinct, got {repeats} repeated; pass replace=True for rows drawn "
                f"with replacement"
            )
        return {"signs": check_signs(arrays["signs"], "signs", (form.n,), "(n,)"), "rows": rows}

    def _nested(self, r1: int) -> dict[str, Array]:
        return {"signs": self._arrays["signs"], "rows": self._arrays["rows"][:r1]}


@register("srht")
class SRHTSketch(_SampledTransform):
    """Hold ``sqrt(n2/r) P H D``: random signs D, Hadamard matrix H, r rows P of n2.

    H is orthonormal, of order ``n2 = 2^ceil(log2 n)``; vectors are padded with zeros to n2.
    Parameter ``replace``: False (default) draws distinct rows, and then r may be as large as n2,
    where ``S^T S = I_n`` exactly.

    Notes
    -----
    Ailon and Chazelle (2009) and Tropp (2011), the subsampled randomized Hadamard transform.
    Stages of the fast transform beyond blocks of about 4 r rows are done for the r wanted rows
    alone: a product takes ``n m (log2(4 r) + 1)`` additions, and no padded copy of X is made.
    The arrays are ``signs`` (n,) and ``rows`` (r,).

    Examples
    --------
    >>> import numpy as np
    >>> from sketchattn.sketches import make_sketch
    >>> sketch = make_sketch("srht", 8, 6, rng=0)
    >>> x = np.arange(6.0)
    >>> bool(np.isclose(np.linalg.norm(sketch @ x), np.linalg.norm(x)))
    True
    """

    @classmethod
    def _order(cls, n: int) -> int:
        return 1 << (n - 1).bit_length()

    def _factor(self) -> float:
        """Return the scale beside a Hadamard matrix of entries +1, -1."""
        return 1.0 / math.sqrt(self.shape[0])

    def _apply(self, x: Array) -> Array:
        from ..kernels.sketching import hadamard_apply

        signs, rows = self._arrays["signs"], self._arrays["rows"]
        return hadamard_apply(x, signs, rows, self._order(self.shape[1]), self._factor())

    def _apply_transpose(self, y: Array) -> Array:
        from ..kernels.sketching import hadamard_transpose

        signs, rows = self._arrays["signs"], self._arrays["rows"]
        return hadamard_transpose(y, signs, rows, self._order(self.shape[1]), self._factor())

    def to_dense(self) -> Array:
        """Return S as a dense array (r, n), from ``H_ij = (-1)^popcount(i & j)``."""
        common = self._arrays["rows"][:, None] & np.arange(self.shape[1])
        signs = np.where(np.bitwise_count(common) & 1, -1, 1) * self._arrays["signs"]
        dense: Array = signs.astype(self.dtype) * self.dtype.type(self._factor())
        return dense


@register("dct")
class DCTSketch(_SampledTransform):
    """Hold ``sqrt(n/r) P C D``: random signs D, orthonormal DCT-II C of order n, r rows P.

    Parameter ``replace``: False (default) draws distinct rows, r <= n.  No padding for any n;
    the second moment is not that of "srht", since the entries of C differ in size.

    Notes
    -----
    Avron, Maymounkov and Toledo (2010), Blendenpik.  A product is one ``scipy.fft.dct`` of all
    of X.  The arrays are ``signs`` (n,) and ``rows`` (r,).

    Examples
    --------
    >>> import numpy as np
    >>> from sketchattn.sketches import make_sketch
    >>> dense = make_sketch("dct", 2, 6, rng=0).to_dense()
    >>> bool(np.allclose(dense @ dense.T, 3 * np.eye(2)))
    True
    """

    @classmethod
    def _order(cls, n: int) -> int:
        return n

    def _apply(self, x: Array) -> Array:
        from scipy.fft import dct

        from ..kernels._threads import thread_count

        turned = x * self._arrays["signs"].astype(self.dtype)[:, None]
        turned = dct(turned, axis=0, norm="ortho", overwrite_x=True, workers=thread_count())
        out: Array = turned[self._arrays["rows"]] * self.dtype.type(self.isometry_scale)
        return out

    def _apply_transpose(self, y: Array) -> Array:
        from scipy.fft import idct

        from ..kernels._threads import thread_count

        full = np.zeros((self.shape[1], y.shape[1]), self.dtype)
        np.add.at(full, self._arrays["rows"], y * self.dtype.type(self.isometry_scale))
        full = idct(full, axis=0, norm="ortho", overwrite_x=True, workers=thread_count())
        full *= self._arrays["signs"].astype(self.dtype)[:, None]
        return full

    def to_dense(self) -> Array:
        """Return S as a dense array (r, n).

        ``C_ij = sqrt(2/n) cos(pi i (2 j + 1) / (2 n))``, and ``C_0j = 1/sqrt(n)``.
        """
        r, n = self.shape
        rows = self._arrays["rows"][:, None]
        # The angle has period 4 n in units of pi / (2 n): reduced exactly before it is rounded.
        angle = rows * (2 * np.arange(n) + 1) % (4 * n) * (math.pi / (2 * n))
        entries = np.where(rows == 0, math.sqrt(1.0 / n), math.sqrt(2.0 / n) * np.cos(angle))
        dense: Array = (entries * self._arrays["signs"] * self.isometry_scale).astype(self.dtype)
        return dense


@register("haar")
class HaarSketch(DenseSketch):
    """Hold ``sqrt(n/r) Q^T`` with Q (n, r) uniform among the matrices with orthonormal columns.

    Q is the factor of a QR decomposition of an independent Gaussian matrix, with columns
    multiplied by the sign of the diagonal of R; without that it is not uniform.  r <= n.

    Notes
    -----
    Mezzadri (2007), How to generate random matrices from the classical compact groups.  A draw
    takes ``4 n r^2`` operations.  The array is ``sketch`` (r, n), Q^T.

    Examples
    --------
    >>> import numpy as np
    >>> from sketchattn.sketches import make_sketch
    >>> dense = make_sketch("haar", 2, 6, rng=0).to_dense()
    >>> bool(np.allclose(dense @ dense.T, 3 * np.eye(2)))
    True
    """

    @classmethod
    def _resolve(cls, r: int, n: int, parameters: dict[str, Any]) -> dict[str, Any]:
        if r > n:
            raise ValueError(
                f"r must be between 1 and n = {n} for kind 'haar', whose rows are orthogonal, got "
                f"{r}; lower r or use kind 'gaussian'"
            )
        return parameters

    @classmethod
    def _scale(cls, form: Spec) -> float:
        return math.sqrt(form.n / form.r)

    @classmethod
    def _draw(cls, form: Spec, rng: Rng) -> dict[str, Array]:
        from ..kernels._threads import blas_single_thread

        (generator,) = streams(rng, 1)
        # Drawn row by row of Q^T: a larger r extends the Gaussian matrix by columns.
        normal = generator.standard_normal((form.r, form.n)).T
        with blas_single_thread():  # LAPACK gives other bits for other numbers of threads
            q, triangle = np.linalg.qr(normal)
        q *= np.copysign(1.0, np.diag(triangle))
        return {"sketch": np.ascontiguousarray(q.T, dtype=form.dtype)}

    @classmethod
    def _check_entries(cls, matrix: Array) -> None:
        from ..kernels._threads import product

        wide = matrix.astype(np.float64)
        error = float(np.abs(product(wide, wide.T) - np.eye(len(wide))).max())
        # Rounding to float32 moves a product of two rows by at most 2^-23.
        if error > 1e-6:
            raise ValueError(
                f"sketch must have orthonormal rows, got a Gram matrix that differs from the "
                f"identity by {error:.3g}; the scale is not a part of the draw"
            )
