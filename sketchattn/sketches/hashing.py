"""Sketches with a few entries in every column: CountSketch, SJLT, OSNAP."""

from __future__ import annotations

import math
from abc import abstractmethod
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
from .sparse import distinct


class _Hashed(Sketch):
    """Base of sketches whose column j has ``signs[j]`` in the rows ``hash[j]``."""

    array_names = ("hash", "signs")

    def _buckets(self) -> tuple[Array, Array]:
        """Return rows and signs as arrays (n, s)."""
        n = self.shape[1]
        return self._arrays["hash"].reshape(n, -1), self._arrays["signs"].reshape(n, -1)

    def _apply(self, x: Array) -> Array:
        from ..kernels.sketching import scatter

        return scatter(x, *self._buckets(), self.shape[0], self.isometry_scale)

    def _apply_transpose(self, y: Array) -> Array:
        from ..kernels.sketching import gather

        hashed, signs = self._buckets()
        starts = np.arange(len(hashed) + 1) * hashed.shape[1]
        return gather(y, starts, hashed.ravel(), signs.ravel(), self.isometry_scale, ordered=False)

    def to_dense(self) -> Array:
        """Return S as a dense array (r, n)."""
        hashed, signs = self._buckets()
        dense = np.zeros(self.shape, self.dtype)
        dense[hashed, np.arange(len(hashed))[:, None]] = signs * self.dtype.type(
            self.isometry_scale
        )
        return dense


@register("countsketch")
class CountSketch(_Hashed):
    """Hold one entry +-1 a column, in an independent uniform row.

    Notes
    -----
    Charikar, Chen and Farach-Colton (2002); Clarkson and Woodruff (2013), the sparse embedding of
    ``scipy.linalg.clarkson_woodruff_transform``.  A product takes ``n m`` operations.  The arrays
    are ``hash`` and ``signs`` (n,).

    Examples
    --------
    >>> import numpy as np
    >>> from sketchattn.sketches import make_sketch
    >>> np.abs(make_sketch("countsketch", 3, 7, rng=0).to_dense()).sum(axis=0)
    array([1., 1., 1., 1., 1., 1., 1.])
    """

    @classmethod
    def _scale(cls, form: Spec) -> float:
        return 1.0

    @classmethod
    def _draw(cls, form: Spec, rng: Rng) -> dict[str, Array]:
        row_stream, sign_stream = streams(rng, 2)
        return {
            "hash": row_stream.integers(0, form.r, size=form.n, dtype=np.int32),
            "signs": random_signs(sign_stream, form.n),
        }

    @classmethod
    def _check_arrays(cls, arrays: dict[str, Array], form: Spec) -> dict[str, Array]:
        return {
            "hash": check_indices(arrays["hash"], "hash", (form.n,), "(n,)", form.r, np.int32),
            "signs": check_signs(arrays["signs"], "signs", (form.n,), "(n,)"),
        }

    def _nested(self, r1: int) -> dict[str, Array]:
        r = self.shape[0]
        if r % r1:
            raise ValueError(
                f"r1 must divide r = {r} for kind 'countsketch', whose bucket h becomes h mod r1, "
                f"got {r1}; choose a divisor, or draw a sketch with a multiple of r1 rows"
            )
        return {**self._arrays, "hash": self._arrays["hash"] % np.int32(r1)}


class _ManyHashed(_Hashed):
    """Base of hashed sketches with ``s`` entries a column, scaled by ``1/sqrt(s)``."""

    parameter_defaults = {"s": None}

    @classmethod
    def _scale(cls, form: Spec) -> float:
        return 1.0 / math.sqrt(form.parameters["s"])

    @classmethod
    def _draw(cls, form: Spec, rng: Rng) -> dict[str, Array]:
        row_stream, sign_stream = streams(rng, 2)
        s = form.parameters["s"]
        return {
            "hash": cls._rows(row_stream, form.r, form.n, s),
            "signs": random_signs(sign_stream, (form.n, s)),
        }

    @classmethod
    @abstractmethod
    def _rows(cls, rng: np.random.Generator, r: int, n: int, s: int) -> Array:
        """Return the rows of the entries of every column, int32 (n, s)."""

    @classmethod
    def _check_arrays(cls, arrays: dict[str, Array], form: Spec) -> dict[str, Array]:
        s = form.parameters["s"]
        hashed = check_indices(arrays["hash"], "hash", (form.n, s), "(n, s)", form.r, np.int32)
        cls._check_rows(hashed, form.r, s)
        return {
            "hash": hashed,
            "signs": check_signs(arrays["signs"], "signs", (form.n, s), "(n, s)"),
        }

    @classmethod
    @abstractmethod
    def _check_rows(cls, hashed: Array, r: int, s: int) -> None:
        """Refuse rows that no draw has."""

    def _nested(self, r1: int) -> dict[str, Array]:
        raise ValueError(
            f"r1 must equal r = {self.shape[0]} for kind {self.kind!r}, since fewer rows hold a "
            f"random number of the {self._parameters['s']} entries of a column, got {r1}; draw a "
            f"sketch with r = {r1}"
        )


@register("sjlt")
class SJLTSketch(_ManyHashed):
    """Hold ``s`` entries ``+-1/sqrt(s)`` a column, in distinct uniform rows.

    Parameter ``s`` is an integer in 1..r, by default min(8, r).

    Notes
    -----
    Kane and Nelson (2014), Sparser Johnson-Lindenstrauss transforms, the "graph" construction.  A
    product takes ``2 s n m`` operations.  The arrays are ``hash`` and ``signs`` (n, s).

    Examples
    --------
    >>> import numpy as np
    >>> from sketchattn.sketches import make_sketch
    >>> np.square(make_sketch("sjlt", 8, 5, rng=0, s=4).to_dense()).sum(axis=0)
    array([1., 1., 1., 1., 1.])
    """

    @classmethod
    def _resolve(cls, r: int, n: int, parameters: dict[str, Any]) -> dict[str, Any]:
        s = parameters["s"]
        if s is None:
            return {"s": min(8, r)}
        return {"s": check_integer(s, "s", 1, "a column has s distinct rows", high=r, limit="r")}

    @classmethod
    def _rows(cls, rng: np.random.Generator, r: int, n: int, s: int) -> Array:
        return distinct(rng, n, s, r)

    @classmethod
    def _check_rows(cls, hashed: Array, r: int, s: int) -> None:
        if (np.diff(np.sort(hashed, axis=1), axis=1) == 0).any():
            raise ValueError(
                "hash must hold distinct rows for each column, got a repeat; use kind "
                "'countsketch' for s = 1, or 'osnap' for one entry in each block of rows"
            )


@register("osnap")
class OSNAPSketch(_ManyHashed):
    """Hold ``s`` entries ``+-1/sqrt(s)`` a column, one in a uniform row of each of s blocks.

    Parameter ``s`` is a divisor of r, by default the largest that is at most 8.

    Notes
    -----
    Nelson and Nguyen (2013), OSNAP, and the "block" construction of Kane and Nelson (2014).  A
    product takes ``2 s n m`` operations.  The arrays are ``hash`` and ``signs`` (n, s); column k
    of ``hash`` lies in the rows ``k r/s`` to ``(k + 1) r/s - 1``.

    Examples
    --------
    >>> import numpy as np
    >>> from sketchattn.sketches import make_sketch
    >>> make_sketch("osnap", 8, 100, rng=0, s=2).arrays["hash"].max(axis=0)
    array([3, 7], dtype=int32)
    """

    @classmethod
    def _resolve(cls, r: int, n: int, parameters: dict[str, Any]) -> dict[str, Any]:
        if parameters["s"] is None:
            return {"s": max(s for s in range(1, 9) if r % s == 0)}
        s = check_integer(
            parameters["s"], "s", 1, "a column has one entry in each of s blocks", high=r, limit="r"
        )
        if r % s:
            raise ValueError(
                f"s must divide r = {r}, got {s}; the rows are cut in s equal blocks: choose a "
                f"divisor, or kind 'sjlt'"
            )
        return {"s": s}

    @classmethod
    def _rows(cls, rng: np.random.Generator, r: int, n: int, s: int) -> Array:
        rows = rng.integers(0, r // s, size=(n, s), dtype=np.int32)
        rows += np.arange(s, dtype=np.int32) * np.int32(r // s)
        return rows

    @classmethod
    def _check_rows(cls, hashed: Array, r: int, s: int) -> None:
        if (hashed // (r // s) != np.arange(s)).any():
            raise ValueError(
                f"hash must hold one row of each block of r / s = {r // s} rows, in order, got "
                f"another block; use kind 'sjlt' for rows in any order"
            )
