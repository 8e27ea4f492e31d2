"""Dense sketches: independent entries, and matrices that a user gives."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from scipy.sparse.linalg import LinearOperator

from ..base.arguments import as_array, check_finite, float_dtype
from ..base.draws import Rng
from .base import Array, Sketch, Spec, check_shape, random_signs, register, streams

# Rows of a draw that are made at a time in float64 before they are rounded.
_DRAWN_BYTES = 1 << 24
# A product runs in pieces that follow from its shape alone: BLAS gives other bits for other
# numbers of threads, so each piece is done by one.
_ROWS, _COLUMNS = 128, 4096


def _tasks(length: int, least: int, most: int) -> list[slice]:
    step = min(max(-(-length // 4), least), most)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _run(tasks: list[slice], work: Callable[[slice], None]) -> None:
    from ..kernels._threads import map_pieces

    for _ in map_pieces(work, tasks):
        pass


class DenseSketch(Sketch):
    """Base of sketches that are stored as the dense array ``sketch`` (r, n), without the scale."""

    array_names: ClassVar[tuple[str, ...]] = ("sketch",)

    def _apply(self, x: Array) -> Array:
        matrix = self._arrays["sketch"]
        out = np.empty((self.shape[0], x.shape[1]), self.dtype)

        def work(rows: slice) -> None:
            np.matmul(matrix[rows], x, out=out[rows])
            out[rows] *= self.dtype.type(self.isometry_scale)

        _run(_tasks(len(out), 32, _ROWS), work)
        return out

    def _apply_transpose(self, y: Array) -> Array:
        matrix = self._arrays["sketch"]
        out = np.empty((self.shape[1], y.shape[1]), self.dtype)
        scaled = y * self.dtype.type(self.isometry_scale)

        def work(columns: slice) -> None:
            np.matmul(matrix[:, columns].T, scaled, out=out[columns])

        _run(_tasks(len(out), 512, _COLUMNS), work)
        return out

    def to_dense(self) -> Array:
        """Return S as a dense array (r, n)."""
        dense: Array = self._arrays["sketch"] * self.dtype.type(self.isometry_scale)
        return dense

    def _nested(self, r1: int) -> dict[str, Array]:
        return {"sketch": self._arrays["sketch"][:r1]}

    @classmethod
    def _check_arrays(cls, arrays: dict[str, Array], form: Spec) -> dict[str, Array]:
        matrix = arrays["sketch"]
        check_shape(matrix, "sketch", (form.r, form.n), "(r, n)")
        if matrix.dtype.kind not in "fiub":
            raise TypeError(f"sketch must hold real numbers, got {matrix.dtype}; convert it first")
        check_finite(matrix, "sketch")
        cls._check_entries(matrix)
        return {"sketch": matrix.astype(form.dtype)}

    @classmethod
    def _check_entries(cls, matrix: Array) -> None:
        """Refuse entries that the family cannot have; any real number is a Gaussian one."""


class _Independent(DenseSketch):
    """Base of dense sketches with independent entries, drawn row by row."""

    @classmethod
    def _draw(cls, form: Spec, rng: Rng) -> dict[str, Array]:
        (generator,) = streams(rng, 1)
        matrix = np.empty((form.r, form.n), form.dtype)
        step = max(1, _DRAWN_BYTES // (8 * form.n))
        for start in range(0, form.r, step):
            rows = matrix[start : start + step]
            rows[:] = cls._entries(generator, rows.shape)
        return {"sketch": matrix}

    @classmethod
    @abstractmethod
    def _entries(cls, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """Return independent unscaled entries."""


@register("gaussian")
class GaussianSketch(_Independent):
    """Hold independent N(0, 1/r) entries; the kurtosis of an entry is 3.

    Examples
    --------
    >>> from sketchattn.sketches import make_sketch
    >>> make_sketch("gaussian", 4, 100, rng=0)
    <sketch 'gaussian', r=4, n=100, dtype=float64>
    """

    @classmethod
    def _scale(cls, form: Spec) -> float:
        return 1.0 / math.sqrt(form.r)

    @classmethod
    def _entries(cls, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        return rng.standard_normal(shape)


@register("rademacher")
class RademacherSketch(_Independent):
    """Hold independent entries ``+-1/sqrt(r)`` with probability 1/2 each; the kurtosis is 1."""

    @classmethod
    def _scale(cls, form: Spec) -> float:
        return 1.0 / math.sqrt(form.r)

    @classmethod
    def _entries(cls, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        return random_signs(rng, shape)

    @classmethod
    def _check_entries(cls, matrix: Array) -> None:
        foreign = matrix[np.abs(matrix) != 1]
        if foreign.size:
            raise ValueError(
                f"sketch must hold +1 and -1, got {foreign[0]}; the scale is not a part of the draw"
            )


@register("uniform")
class UniformSketch(_Independent):
    """Hold independent entries ``sqrt(3/r) U[-1, 1]``; the kurtosis of an entry is 1.8."""

    @classmethod
    def _scale(cls, form: Spec) -> float:
        return math.sqrt(3.0 / form.r)

    @classmethod
    def _entries(cls, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        return rng.uniform(-1.0, 1.0, shape)

    @classmethod
    def _check_entries(cls, matrix: Array) -> None:
        if np.abs(matrix).max() > 1:
            raise ValueError(
                f"sketch must be in [-1, 1], got {np.abs(matrix).max()} in absolute value; "
                f"the scale is not a part of the draw"
            )


class GivenSketch(DenseSketch):
    """Hold a matrix that a user gives, scale included: nothing is known about its law."""

    kind = "given"

    @classmethod
    def _scale(cls, form: Spec) -> float:
        return 1.0

    @classmethod
    def _draw(cls, form: Spec, rng: Rng) -> dict[str, Array]:
        raise TypeError(
            "kind must be a known sketch for a draw, got 'given'; use make_sketch, or "
            "check_sketch for a matrix"
        )

    def _nested(self, r1: int) -> dict[str, Array]:
        raise ValueError(
            f"r1 must equal r = {self.shape[0]} for a given matrix, whose law is unknown, got "
            f"{r1}; pass a matrix of {r1} rows"
        )


class GivenOperator(GivenSketch):
    """Hold a linear operator that a user gives, scale included; its products are used."""

    array_names = ()

    _operator: LinearOperator[Any]

    def __init__(self, operator: LinearOperator[Any], dtype: np.dtype[Any]) -> None:
        self._operator = operator
        rows, columns = operator.shape
        super().__init__((int(rows), int(columns)), dtype, {}, {})

    def _apply(self, x: Array) -> Array:
        return np.asarray(self._operator.matmat(x), dtype=self.dtype)

    def _apply_transpose(self, y: Array) -> Array:
        return np.asarray(self._operator.rmatmat(y), dtype=self.dtype)

    def to_dense(self) -> Array:
        """Return S as a dense array (r, n)."""
        return self._apply(np.eye(self.shape[1], dtype=self.dtype))

    @property
    def arrays(self) -> dict[str, Array]:
        """The matrix of the operator, formed for this: ``sketch`` (r, n)."""
        return {"sketch": self.to_dense()}


def check_sketch(sketch: object, n: int) -> Sketch:
    """Return a sketch, linear operator or matrix that a user gives as a ``Sketch`` for length n.

    Parameters
    ----------
    sketch : Sketch, scipy.sparse.linalg.LinearOperator, or array of shape (r, n)
        Scaled: ``S^T S`` should average to the identity, which is not checked.
    n : int
        Length of the vectors that are to be sketched.

    Returns
    -------
    Sketch
        The sketch itself, or one of kind "given".

    Raises
    ------
    TypeError
        For other objects, and numbers that are not float32 or float64.
    ValueError
        For a shape that does not fit, or entries that are not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from sketchattn.sketches import check_sketch
    >>> check_sketch(np.ones((2, 6)), 6)
    <sketch 'given', r=2, n=6, dtype=float64>
    """
    if isinstance(sketch, LinearOperator):
        rows, columns = sketch.shape
        dtype = np.dtype(sketch.dtype)
        if not isinstance(sketch, Sketch) and dtype not in (np.float32, np.float64):
            raise TypeError(
                f"sketch must be float32 or float64, got {dtype}; give its operator that dtype"
            )
        matrix = None
    else:
        if type(sketch).__module__.startswith("scipy.sparse"):
            raise TypeError(
                f"sketch must be a sketch, a linear operator or a dense array, got "
                f"{type(sketch).__name__}; wrap it with scipy.sparse.linalg.aslinearoperator"
            )
        matrix = as_array(sketch, "sketch")
        dtype = float_dtype(matrix, "sketch")
        if matrix.ndim != 2:
            raise ValueError(
                f"sketch must have two axes (r, n), got shape {matrix.shape}; give one matrix"
            )
        rows, columns = matrix.shape
    if columns != n or rows < 1:
        raise ValueError(
            f"sketch must have shape (r, n) with r >= 1 and n = {n}, got ({rows}, {columns}); "
            f"give one column for each entry that is sketched"
        )
    if isinstance(sketch, Sketch):
        return sketch
    if matrix is None:
        return GivenOperator(sketch, dtype)  # type: ignore[arg-type]  # an operator, checked above
    return GivenSketch.from_arrays({"sketch": matrix}, (int(rows), int(columns)), dtype=dtype)
