"""Arguments and results of the formulas: checked, broadcast, rounded up."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...base.arguments import as_array, check_finite, closest

Array = NDArray[Any]
Float = float | NDArray[np.float64]
# A number of rows: inf, and an array of floats, only where int64 cannot hold it.
Int = int | float | NDArray[np.int64] | NDArray[np.float64]

# A bound that is an integer up to this relative error of its floating-point formula counts as one.
_CEIL = 1e-12
_INT64 = np.iinfo(np.int64)


def real(
    value: ArrayLike,
    name: str,
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = True,
    high_open: bool = True,
) -> Array:
    """Return ``value`` as float64, every number between ``low`` and ``high``."""
    x = as_array(value, name)
    if x.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be real, got dtype {x.dtype}; give a number")
    x = x.astype(np.float64)
    bad = ~((x > low) if low_open else (x >= low)) | ~((x < high) if high_open else (x <= high))
    if bad.any():
        left = "(" if low_open else "["
        right = ")" if high_open or math.isinf(high) else "]"
        raise ValueError(
            f"{name} must be in {left}{low:g}, {high:g}{right}, got {float(x[bad].flat[0]):g}; "
            f"change {name}"
        )
    return x


def whole(value: ArrayLike, name: str, low: int = 1, high: int | None = None) -> Array:
    """Return ``value`` as int64, every number between ``low`` and ``high``, both included."""
    x = as_array(value, name)
    beyond = x.dtype.kind == "O" and all(isinstance(y, int) for y in x.flat)
    if x.dtype.kind not in "iu" and not beyond:
        raise TypeError(f"{name} must be an integer, got dtype {x.dtype}; round it")
    bad = x < low
    too_large = x > (_INT64.max if high is None else high)
    if bad.any() or too_large.any():
        most = ""
        if high is not None:
            most = f" and at most {high}"
        elif not bad.any():
            most = f" and at most {_INT64.max}, the largest of 64 bits"
        raise ValueError(
            f"{name} must be at least {low}{most}, got {int(x[bad | too_large].flat[0])}; "
            f"change {name}"
        )
    return x.astype(np.int64)


def floats(x: Array) -> Float:
    """Return an array as it is, one without axes as a number."""
    out: Float = x.item() if x.ndim == 0 else x
    return out


def log_quotient(count: ArrayLike, delta: ArrayLike) -> Array:
    """Return ``ln(count/delta)`` of positive numbers, also where the quotient overflows."""
    x, d = np.asarray(count, np.float64), np.asarray(delta, np.float64)
    with np.errstate(all="ignore"):
        quotient = x / d
        out: Array = np.where(np.isfinite(quotient), np.log(quotient), np.log(x) - np.log(d))
    return out


def rows_of(numbers: Array) -> Int:
    """Return numbers of rows, whole or infinite, so that none of them wraps around.

    Parameters
    ----------
    numbers : array of float64, or of Python integers and infinities
        Each at least 1.

    Returns
    -------
    int, float or ndarray
        Of a number an int of any size, or inf; of an array int64, or float64 where an entry is
        2^63 or more.
    """
    if numbers.ndim == 0:
        one = numbers.item()
        return one if one == math.inf else int(one)
    if (numbers < 2.0**63).all():
        whole: NDArray[np.int64] = numbers.astype(np.int64)
        return whole
    out: NDArray[np.float64] = numbers.astype(np.float64)
    return out


def ceil(x: ArrayLike) -> Int:
    """Round up to at least 1; a formula whose value is an integer up to rounding stays there.

    As `rows_of`: nothing wraps around, and what overflows is infinite.
    """
    bound = np.asarray(x, np.float64)
    if np.isnan(bound).any():
        raise ValueError("the formula must give a number of rows, got NaN; change its arguments")
    nearest = np.rint(bound)
    with np.errstate(invalid="ignore"):  # of inf and inf
        near = np.abs(bound - nearest) <= _CEIL * nearest
    return rows_of(np.maximum(np.where(near, nearest, np.ceil(bound)), 1))


def matrix_of(x: object, name: str) -> Array:
    """Return a finite real matrix as float64."""
    array = as_array(x, name)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be real, got dtype {array.dtype}; convert it")
    if array.ndim != 2:
        raise ValueError(f"{name} must have two axes, got shape {array.shape}; pass a matrix")
    array = array.astype(np.float64, copy=False)
    check_finite(array, name)
    return array


def product_of(A: object, V: object) -> tuple[Array, Array]:
    """Return the factors of one product, A (m, n) and V (n, d_v), as float64."""
    a, v = matrix_of(A, "A"), matrix_of(V, "V")
    if a.shape[1] != v.shape[0]:
        raise ValueError(
            f"V must have one row for each of the n = {a.shape[1]} columns of A, got "
            f"{v.shape[0]}; pass factors of one product"
        )
    return a, v


def spectrum_of(sigma: object) -> Array:
    """Return singular values, descending and not negative, as float64."""
    s = as_array(sigma, "sigma")
    if s.ndim != 1 or s.dtype.kind not in "iuf":
        raise TypeError(
            f"sigma must be a one-dimensional real array, got {s.dtype} of shape {s.shape}; "
            f"pass singular values"
        )
    s = s.astype(np.float64)
    if (s < 0).any() or (np.diff(s) > 1e-12 * (s[:1] if len(s) else 1.0)).any():
        raise ValueError(
            "sigma must be non-negative and descending, got values that are not; sort them"
        )
    return s


def choice(value: object, name: str, known: tuple[str, ...]) -> str:
    """Return ``value``, one of the known strings."""
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be a string, got {type(value).__name__}; choose one of {', '.join(known)}"
        )
    if value not in known:
        raise ValueError(
            f"{name} must be {' or '.join(map(repr, known))}, got {value!r}{closest(value, known)}"
        )
    return value


def smallest(holds: Callable[[int], bool]) -> int | float:
    """Return the smallest r >= 1 with ``holds(r)``, which stays true once it is.

    Infinite where no r that a float can hold will do.
    """
    high = 1
    while not holds(high):
        high *= 2
        if high.bit_length() > sys.float_info.max_exp:
            return math.inf
    low = high // 2  # does not hold, or is 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def each(function: Callable[..., int | float], *arguments: Array) -> Int:
    """Apply a function of numbers to broadcast arrays; as `rows_of`, nothing wraps around."""
    broadcast = np.broadcast_arrays(*arguments)
    rows = zip(*(x.ravel().tolist() for x in broadcast), strict=True)
    found = np.array([function(*row) for row in rows], object)
    return rows_of(found.reshape(broadcast[0].shape))
