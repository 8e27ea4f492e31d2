"""Arguments and results of the formulas: checked, broadcast, rounded up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...base.arguments import as_array, check_finite, closest

Array = NDArray[Any]
Float = float | NDArray[np.float64]
Int = int | NDArray[np.int64]

# A bound that is an integer up to this relative error of its floating-point formula counts as one.
_CEIL = 1e-12


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
    if x.dtype.kind not in "iu":
        raise TypeError(f"{name} must be an integer, got dtype {x.dtype}; round it")
    x = x.astype(np.int64)
    bad = (x < low) | (x > high if high is not None else False)
    if bad.any():
        most = "" if high is None else f" and at most {high}"
        raise ValueError(
            f"{name} must be at least {low}{most}, got {int(x[bad].flat[0])}; change {name}"
        )
    return x


def floats(x: Array) -> Float:
    """Return an array as it is, one without axes as a number."""
    out: Float = x.item() if x.ndim == 0 else x
    return out


def ceil(x: ArrayLike) -> Int:
    """Round up; a formula whose value is an integer up to rounding stays there."""
    bound = np.asarray(x, np.float64)
    with np.errstate(invalid="ignore"):
        up = np.ceil(bound * (1 - _CEIL))
    whole = np.maximum(up, 1).astype(np.int64)
    out: Int = whole.item() if whole.ndim == 0 else whole
    return out


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


def smallest(holds: Callable[[int], bool]) -> int:
    """Return the smallest r >= 1 with ``holds(r)``, which stays true once it is."""
    high = 1
    while not holds(high):
        high *= 2
    low = high // 2  # does not hold, or is 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def each(function: Callable[..., int], *arguments: Array) -> Int:
    """Apply a function of numbers to broadcast arrays."""
    broadcast = np.broadcast_arrays(*arguments)
    found = [function(*row) for row in zip(*(x.ravel() for x in broadcast), strict=True)]
    whole = np.array(found, np.int64).reshape(broadcast[0].shape)
    out: Int = whole.item() if whole.ndim == 0 else whole
    return out
