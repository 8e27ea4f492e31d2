"""Numbers that are the same bytes on every machine: inputs from raw words, results on a lattice.

Library functions and BLAS differ in the last bits from one processor to the next.  Inputs are
therefore made of integers only, and results are rounded to multiples of a power of two; a result
that lies so close to a rounding boundary that those bits could decide is not used at all.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .inputs import rounded

Array = NDArray[Any]

# Results are multiples of this, or of 64 or 4096 times it where they are less well conditioned.
STEP = 2.0**-30
STEPS = (STEP, 64 * STEP, 4096 * STEP)
# Amplification of relative changes that each of these is good for.
CONDITIONS = tuple(2.0**8 * step / STEP for step in STEPS)
# How far a result stays from a rounding boundary, in steps.
MARGIN = 2.0**-12


def words(name: str, count: int) -> Array:
    """Return raw 64-bit words of a stream that depends on its name alone.

    Raw words of Philox are fixed for all versions of NumPy, its distributions are not.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.random.Philox(key=key).random_raw(count)


def signs(name: str, shape: tuple[int, ...]) -> Array:
    """Return +1 and -1 in float64."""
    top: Array = words(name, math.prod(shape)) >> np.uint64(63)
    return np.where(top == 0, 1.0, -1.0).reshape(shape)


def bits(name: str, shape: tuple[int, ...], share: float) -> Array:
    """Return True with probability ``share``, a multiple of 1/256."""
    top = (words(name, math.prod(shape)) >> np.uint64(56)).astype(np.int64)
    return (top < round(256 * share)).reshape(shape)


def normals(name: str, shape: tuple[int, ...], half_sizes: int = 2) -> Array:
    """Return nearly normal numbers of deviation ``half_sizes / 2``, exact in bfloat16 and float16.

    The sum of twelve uniform 16-bit integers has variance ``2^32 - 1``; centred, rounded to a
    multiple of ``2^-12`` and to 8 significant bits, all in integers.
    """
    count = math.prod(shape)
    raw = words(name, 3 * count).reshape(count, 3)
    total = np.zeros(count, np.int64)
    for shift in (0, 16, 32, 48):
        parts = (raw >> np.uint64(shift)) & np.uint64(0xFFFF)
        total += parts.astype(np.int64).sum(axis=1)
    centred = (total - 12 * 0xFFFF // 2) * half_sizes  # in units of 2^-17
    multiples = (centred + (1 << 4)) >> 5
    return (
        rounded(np.ldexp(multiples.astype(np.float64), -12), "bfloat16")
        .astype(np.float64)
        .reshape(shape)
    )


def on_lattice(x: Array, step: float = STEP) -> Array:
    """Return the multiples of ``step`` that are nearest; infinities stay."""
    return np.where(np.isfinite(x), np.rint(x / step), x) * step


def clearance(x: Array, step: float = STEP) -> float:
    """Return the distance, in steps, from the boundary of rounding that is nearest to any entry."""
    with np.errstate(invalid="ignore"):
        inside = np.abs(x / step - np.floor(x / step) - 0.5)
    return float(np.where(np.isfinite(x), inside, 0.5).min(initial=0.5))


def raised(x: float) -> float:
    """Return a number rounded up to six significant bits."""
    m, e = math.frexp(x)
    return math.ldexp(math.ceil(m * 64) / 64, e)


def raised_clearance(x: float) -> float:
    """Return the distance of six significant bits of a number from an integer, in the last one."""
    m, _ = math.frexp(x)
    return abs(64 * m - round(64 * m)) if x else 0.5
