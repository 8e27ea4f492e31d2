"""Sketches stored by sparse rows: independent sparse entries, and LESS-uniform."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from ..base.arguments import check_integer
from ..base.draws import Rng
from .base import (
    Array,
    Sketch,
    Spec,
    check_indices,
    check_signs,
    random_signs,
    register,
    streams,
)

_BATCH = 1 << 18  # gaps drawn at a time
_MARKED_BYTES = 1 << 24


def distinct(rng: np.random.Generator, count: int, size: int, total: int) -> Array:
    """Draw ``count`` independent uniform sets of ``size`` distinct numbers below ``total``.

    Floyd's algorithm: for j = total - size ... total - 1, t is uniform in 0..j, and t joins the
    set, or j where t is in it already.  A longer draw starts with the same sets.

    Returns
    -------
    int32 array (count, size)
        Each row ascends.
    """
    out = np.empty((count, size), np.int32)
    limits = np.arange(total - size + 1, total + 1)
    step = max(1, _MARKED_BYTES // total)
    for start in range(0, count, step):
        tried = rng.integers(0, limits, size=(min(step, count - start), size))
        marked = np.zeros((len(tried), total), bool)
        sets = np.arange(len(tried))
        for k in range(size):
            t = tried[:, k]
            chosen = np.where(marked[sets, t], limits[k] - 1, t)
            marked[sets, chosen] = True
            out[start : start + step, k] = chosen
    out.sort(axis=1)
    return out


class _SparseRows(Sketch):
    """Base of sketches in compressed rows; subclasses say where their rows start."""

    def _compressed(self) -> tuple[Array, Array, Array]:
        """Return (starts (r + 1,), columns, signs) with columns that ascend within a row."""
        columns, signs = self._arrays["columns"], self._arrays["signs"]
        return self._arrays["starts"], columns, signs

    def _compressed_transpose(self) -> tuple[Array, Array, Array]:
        """Return the same of ``S^T``, made once: a product gathers, so that nothing races."""
        if "transpose" not in self._derived:
            from scipy.sparse import csr_array

            starts, columns, signs = self._compressed()
            turned = csr_array((signs, columns, starts), shape=self.shape).T.tocsr()
            self._derived["transpose"] = (
                turned.indptr.astype(np.int64),
                turned.indices.astype(np.int32),
                turned.data,
            )
        transpose: tuple[Array, Array, Array] = self._derived["transpose"]
        return transpose

    def _apply(self, x: Array) -> Array:
        from ..kernels.sketching import gather

        return gather(x, *self._compressed(), self.isometry_scale, ordered=True)

    def _apply_transpose(self, y: Array) -> Array:
        from ..kernels.sketching import gather

        return gather(y, *self._compressed_transpose(), self.isometry_scale, ordered=True)

    def to_dense(self) -> Array:
        """Return S as a dense array (r, n)."""
        starts, columns, signs = self._compressed()
        dense = np.zeros(self.shape, self.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(starts))
        dense[rows, columns] = signs * self.dtype.type(self.isometry_scale)
        return dense


@register("sparse")
class SparseSketch(_SparseRows):
    """Hold independent entries: ``+-sqrt(s/r)`` with probability 1/(2s) each, otherwise 0.

    The kurtosis of an entry is s.  Parameter ``s`` is a number of at least 1, or "sqrt" for
    ``sqrt(n)``; 1 is the Rademacher sketch, 3 that of Achlioptas.

    Notes
    -----
    Achlioptas (2003), Database-friendly random projections; Li, Hastie and Church (2006), Very
    sparse random projections, for ``sqrt(n)``.  For s > 3 there is no tail bound that holds for
    every vector: one spike defeats it.

    The positions in row-major order have independent geometric gaps, so that only the nonzeros
    are drawn.  A product takes ``2 r n m / s`` operations.  The arrays are ``starts`` (r + 1,),
    ``columns`` and ``signs`` (nonzeros,).

    Examples
    --------
    >>> from sketchattn.sketches import make_sketch
    >>> make_sketch("sparse", 4, 100, rng=0, s="sqrt")
    <sketch 'sparse', r=4, n=100, dtype=float64, s=10.0>
    """

    array_names = ("starts", "columns", "signs")
    parameter_defaults = {"s": 3.0}

    @classmethod
    def _resolve(cls, r: int, n: int, parameters: dict[str, Any]) -> dict[str, Any]:
        s = parameters["s"]
        if isinstance(s, str):
            if s != "sqrt":
                raise ValueError(f"s must be a number or 'sqrt', got {s!r}; 'sqrt' is sqrt(n)")
            return {"s": math.sqrt(n)}
        if isinstance(s, bool | np.bool_) or not isinstance(s, numbers.Real):
            raise TypeError(f"s must be a number or 'sqrt', got {type(s).__name__}; use s=3")
        if not 1.0 <= float(s) < math.inf:
            raise ValueError(
                f"s must be at least 1 and finite, got {s}; an entry is nonzero with "
                f"probability 1/s"
            )
        return {"s": float(s)}

    @classmethod
    def _scale(cls, form: Spec) -> float:
        return math.sqrt(form.parameters["s"] / form.r)

    @classmethod
    def _draw(cls, form: Spec, rng: Rng) -> dict[str, Array]:
        gap_stream, sign_stream = streams(rng, 2)
        total = form.r * form.n
        pieces: list[Array] = []
        last = -1
        while last < total:
            gaps = gap_stream.geometric(1.0 / form.parameters["s"], size=min(_BATCH, total + 1))
            # A gap beyond the end is as good as any: the sum must not overflow.
            positions = last + np.cumsum(np.minimum(gaps, total + 1))
            last = int(positions[-1])
            pieces.append(positions)
        positions = np.concatenate(pieces)
        positions = positions[: np.searchsorted(positions, total)]
        starts = np.searchsorted(positions, np.arange(form.r + 1) * form.n)
        return {
            "starts": starts.astype(np.int64),
            "columns": (positions % form.n).astype(np.int32),
            "signs": random_signs(sign_stream, len(positions)),
        }

    @classmethod
    def _check_arrays(cls, arrays: dict[str, Array], form: Spec) -> dict[str, Array]:
        size = arrays["columns"].size
        starts = check_indices(
            arrays["starts"], "starts", (form.r + 1,), "(r + 1,)", size + 1, np.int64
        )
        if starts[0] != 0 or starts[-1] != size or (np.diff(starts) < 0).any():
            raise ValueError(
                f"starts must ascend from 0 to the number of entries {size}, got "
                f"{starts[0]} to {starts[-1]}; give compressed rows"
            )
        columns = check_indices(
            arrays["columns"], "columns", (size,), "(entries,)", form.n, np.int32
        )
        rows = np.repeat(np.arange(form.r), np.diff(starts))
        if (np.diff(rows * form.n + columns) <= 0).any():
            raise ValueError(
                "columns must ascend within each row, got an entry that does not; sort the "
                "columns of a row with their signs"
            )
        signs = check_signs(arrays["signs"], "signs", (size,), "(entries,)")
        return {"starts": starts, "columns": columns, "signs": signs}

    def _nested(self, r1: int) -> dict[str, Array]:
        starts = self._arrays["starts"][: r1 + 1]
        end = int(starts[-1])
        return {
            "starts": starts,
            "columns": self._arrays["columns"][:end],
            "signs": self._arrays["signs"][:end],
        }


@register("less_uniform")
class LessUniformSketch(_SparseRows):
    """Hold rows of ``t`` entries ``+-sqrt(n/(t r))`` in distinct uniform columns.

    Rows are independent; their signs are too.  Parameter ``t`` is an integer in 1..n, by default
    min(8, n).  t = n is the Rademacher sketch; t = 1 is uniform row sampling with signs.

    Notes
    -----
    Derezinski, Liao, Dobriban and Mahoney (2021), Sparse sketches with small inversion bias; the
    uniform case.  A product takes ``2 r t m`` operations.  The arrays are ``columns`` and
    ``signs`` (r, t).

    Examples
    --------
    >>> from sketchattn.sketches import make_sketch
    >>> make_sketch("less_uniform", 4, 100, rng=0).arrays["columns"].shape
    (4, 8)
    """

    array_names = ("columns", "signs")
    parameter_defaults = {"t": None}

    @classmethod
    def _resolve(cls, r: int, n: int, parameters: dict[str, Any]) -> dict[str, Any]:
        t = parameters["t"]
        if t is None:
            return {"t": min(8, n)}
        return {"t": check_integer(t, "t", 1, "a row has t distinct columns", high=n, limit="n")}

    @classmethod
    def _scale(cls, form: Spec) -> float:
        return math.sqrt(form.n / (form.parameters["t"] * form.r))

    @classmethod
    def _draw(cls, form: Spec, rng: Rng) -> dict[str, Array]:
        column_stream, sign_stream = streams(rng, 2)
        t = form.parameters["t"]
        return {
            "columns": distinct(column_stream, form.r, t, form.n),
            "signs": random_signs(sign_stream, (form.r, t)),
        }

    @classmethod
    def _check_arrays(cls, arrays: dict[str, Array], form: Spec) -> dict[str, Array]:
        shape = (form.r, form.parameters["t"])
        columns = check_indices(arrays["columns"], "columns", shape, "(r, t)", form.n, np.int32)
        if (np.diff(columns, axis=1) <= 0).any():
            raise ValueError(
                "columns must ascend within each row, got an entry that does not; they are "
                "distinct, and sorted with their signs"
            )
        return {
            "columns": columns,
            "signs": check_signs(arrays["signs"], "signs", shape, "(r, t)"),
        }

    def _compressed(self) -> tuple[Array, Array, Array]:
        starts = np.arange(self.shape[0] + 1) * self._parameters["t"]
        return starts, self._arrays["columns"].ravel(), self._arrays["signs"].ravel()

    def _nested(self, r1: int) -> dict[str, Array]:
        return {name: x[:r1] for name, x in self._arrays.items()}
