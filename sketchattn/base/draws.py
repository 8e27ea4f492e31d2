"""Draws: everything random that a method uses, as named arrays, and the streams they come from."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import as_array

Array = NDArray[Any]
Rng = int | np.integer[Any] | np.random.Generator | None


class Draw(dict[str, Array]):
    """Map names to the arrays that a method drew; can be saved and handed in again.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=8, d=4, rng=0)[0]
    >>> method = sa.UniformColumns(rank=3)
    >>> draw = method.draw(problem, rng=0)
    >>> (method.approximate(problem, draw=draw) @ problem.v).shape
    (8, 4)
    """

    def save(self, path: str | PathLike[str]) -> None:
        """Write the arrays as safetensors; a file that exists is replaced in one step."""
        from safetensors.numpy import save

        from .files import write_bytes

        write_bytes(path, save({name: np.ascontiguousarray(x) for name, x in self.items()}))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Draw:
        """Read the arrays that ``save`` wrote."""
        from safetensors.numpy import load_file

        return cls(load_file(str(path)))


def as_generator(rng: Rng) -> np.random.Generator:
    """Return the generator that ``rng`` stands for: None, a seed >= 0, or a generator itself."""
    if isinstance(rng, np.random.Generator):
        return rng
    if rng is None:
        return np.random.default_rng()
    if isinstance(rng, bool | np.bool_) or not isinstance(rng, numbers.Integral):
        raise TypeError(
            f"rng must be None, an integer or a numpy.random.Generator, got {type(rng).__name__}; "
            f"use numpy.random.default_rng"
        )
    if int(rng) < 0:
        raise ValueError(f"rng must be at least 0, got {int(rng)}; give a non-negative seed")
    return np.random.default_rng(int(rng))


def head_generator(entropy: int, batch: int, head: int) -> np.random.Generator:
    """Return the stream of one head, which depends on nothing but these three numbers."""
    return np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(batch, head)))


def entropy_of(rng: Rng) -> int:
    """Return the number that the streams of all heads of one call grow from."""
    if isinstance(rng, numbers.Integral) and not isinstance(rng, bool | np.bool_) and rng >= 0:
        return int(rng)
    words = as_generator(rng).integers(0, 2**32, size=4, dtype=np.uint64)
    return sum(int(w) << (32 * i) for i, w in enumerate(words))


def check_draw(draw: object, names: tuple[str, ...]) -> Draw:
    """Return a draw that a user handed in with exactly the arrays ``names``."""
    if not isinstance(draw, Mapping):
        raise TypeError(
            f"draw must be a mapping from names to arrays, got {type(draw).__name__}; "
            f"use method.draw(problem, rng)"
        )
    if set(draw) != set(names):
        raise ValueError(
            f"draw must hold the arrays {sorted(names)}, got {sorted(map(str, draw))}; "
            f"use method.draw(problem, rng)"
        )
    return Draw({name: as_array(draw[name], f"draw[{name!r}]") for name in names})


def check_columns(columns: Array, keys: Array) -> Array:
    """Return drawn columns as int64: distinct, and among the keys that may be drawn."""
    if columns.ndim != 1 or not np.issubdtype(columns.dtype, np.integer):
        raise TypeError(
            f"columns must be a one-dimensional integer array, got {columns.dtype} of shape "
            f"{columns.shape}; give indices of keys"
        )
    if len(np.unique(columns)) != len(columns):
        raise ValueError(
            f"columns must be distinct, got {len(columns) - len(np.unique(columns))} repeated; "
            f"this estimator draws without replacement"
        )
    foreign = np.setdiff1d(columns, keys)
    if len(foreign):
        raise ValueError(
            f"columns must be indices of visible keys, got {int(foreign[0])}; "
            f"draw from the {len(keys)} keys that are not masked"
        )
    return columns.astype(np.int64)
