"""Checks of arguments: each says which argument, what it must be, what it is, and what to do."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Causal = bool | str

ALIGNMENTS = ("top-left", "bottom-right")


def as_array(x: object, name: str) -> Array:
    """Return ``x`` as a NumPy array without copying where possible.

    Accepts arrays, nested sequences of numbers, and anything with ``__array__`` or
    ``__dlpack__`` whose memory the CPU can read.  bfloat16 tensors without a NumPy equivalent
    are widened exactly to float32.
    """
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be a plain array, got a masked array; pass its data and use key_mask"
        )
    if isinstance(x, np.ndarray):
        return np.asarray(x)  # a subclass may index, reshape or multiply in its own way
    if getattr(x, "requires_grad", False) is True:
        raise TypeError(
            f"{name} must not require a gradient, since none is computed; pass {name}.detach()"
        )
    if str(getattr(x, "dtype", "")).endswith("bfloat16") and callable(getattr(x, "float", None)):
        x = x.float()  # type: ignore[attr-defined]  # a tensor's exact widening, checked above
    try:
        if hasattr(x, "__array__") or not hasattr(x, "__dlpack__"):
            return np.asarray(x)
        return np.from_dlpack(x)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TypeError(
            f"{name} must be an array in CPU memory, got {type(x).__name__} "
            f"which cannot be read ({reason}); convert it to a NumPy array first"
        ) from error


def float_dtype(x: Array, name: str) -> np.dtype[Any]:
    """Return the precision that ``x`` is computed in: float32 for halves, or its own."""
    if x.dtype.name in ("float16", "bfloat16", "float32"):
        return np.dtype(np.float32)
    if x.dtype.name == "float64":
        return np.dtype(np.float64)
    raise TypeError(
        f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; "
        f"convert it with astype(np.float32)"
    )


def as_precision(dtype: Any) -> np.dtype[Any] | None:
    """Return float32 or float64 as NumPy's dtype, and None for everything else."""
    if dtype is None:
        return None  # which NumPy would take for float64
    try:
        wanted: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        return None
    return wanted if wanted in (np.dtype(np.float32), np.dtype(np.float64)) else None


def prepare(x: Array, dtype: np.dtype[Any]) -> Array:
    """Return ``x`` as a C-contiguous writeable array of the native ``dtype``.

    Kernels see one layout only: each other one would compile once more.
    """
    return np.require(x, dtype=dtype, requirements=["C", "W", "A"])


def check_width(q: Array, k: Array, v: Array | None) -> None:
    """Refuse widths and lengths that do not belong together (last two axes)."""
    if q.shape[-1] < 1:
        raise ValueError("q must have a head width d of at least 1, got d = 0; pass q of (n_q, d)")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k must have the head width d = {q.shape[-1]} of q, got {k.shape[-1]}; "
            f"project q and k to one width"
        )
    if v is not None and v.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"v must have one row for each of the n_k = {k.shape[-2]} keys, "
            f"got {v.shape[-2]}; pass k and v of equal length"
        )


def check_same_dtype(q: Array, k: Array, v: Array | None) -> None:
    """Refuse mixed precisions: which one to compute in would be a guess."""
    for name, x in (("k", k), ("v", v)):
        if x is not None and x.dtype.name != q.dtype.name:  # the byte order does not matter
            raise TypeError(
                f"{name} must have the dtype {q.dtype} of q, got {x.dtype}; "
                f"convert q, k and v to one dtype"
            )


def as_float(x: Any) -> float:
    """Return a real number as a float; an integer beyond all floats is infinite."""
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def check_scale(scale: object, d: int) -> float:
    """Return the factor of the logits; ``None`` is ``1/sqrt(d)``."""
    if scale is None:
        return 1.0 / math.sqrt(d)
    if isinstance(scale, np.ndarray) and scale.ndim == 0:
        scale = scale.item()
    if isinstance(scale, bool | np.bool_) or not isinstance(scale, numbers.Real):
        raise TypeError(
            f"scale must be a real number or None, got {type(scale).__name__}; "
            f"None is 1/sqrt(d) = {1.0 / math.sqrt(d):.6g}"
        )
    value = as_float(scale)
    if not math.isfinite(value):
        raise ValueError(
            f"scale must be finite, got {value}; None is 1/sqrt(d) = {1.0 / math.sqrt(d):.6g}"
        )
    return value


def check_causal(causal: object, n_q: int, n_k: int) -> Causal:
    """Return ``False``, ``True`` (square) or the name of an alignment."""
    if isinstance(causal, bool | np.bool_):
        if causal and n_q != n_k:
            raise ValueError(
                f"causal=True must have n_q = n_k, got n_q = {n_q} and n_k = {n_k}; name the "
                f"alignment: causal='top-left' or causal='bottom-right'"
            )
        return bool(causal)
    if causal is None:
        return False
    if isinstance(causal, str):
        if causal not in ALIGNMENTS:
            raise ValueError(
                f"causal must be False, True, 'top-left' or 'bottom-right', got {causal!r}"
                f"{closest(causal, ALIGNMENTS)}"
            )
        return causal
    raise TypeError(
        f"causal must be a bool, 'top-left' or 'bottom-right', got {type(causal).__name__}; "
        f"an explicit position of the first query is the argument offset of attention"
    )


def check_key_mask(key_mask: object, lead: tuple[int, ...], n_k: int) -> Array:
    """Return a boolean mask whose last axis is the keys, broadcastable to ``lead + (n_k,)``."""
    mask = as_array(key_mask, "key_mask")
    wanted = " or ".join(str(s) for s in dict.fromkeys([(n_k,), (*lead, n_k)]))
    if mask.dtype != np.bool_:
        raise TypeError(
            f"key_mask must be boolean, True for the keys to keep, got {mask.dtype}; "
            f"convert it with astype(bool)"
        )
    full = (*lead, n_k)
    fits = (
        1 <= mask.ndim <= len(full)
        and mask.shape[-1] == n_k
        and all(a in (1, b) for a, b in zip(mask.shape[::-1], full[::-1], strict=False))
    )
    if not fits:
        raise ValueError(
            f"key_mask must have shape {wanted}, got {mask.shape}; give one entry for each key"
        )
    return mask


def check_finite(x: Array, name: str) -> None:
    """Refuse NaN and infinities, and say where the first one is."""
    finite = np.isfinite(x)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{name} must be finite, got {x[where]} at index {where}; "
            f"replace it, or hide its key with a mask"
        )


def stacked(arrays: Sequence[Array]) -> Array:
    """Return arrays of one shape and dtype with an axis in front.

    Nothing is copied for one array, or where they are neighbours in the memory of another.
    """
    first = arrays[0]
    if len(arrays) == 1:
        return first[None]
    start, base = first.__array_interface__["data"][0], first.base
    if isinstance(base, np.ndarray) and all(
        x.base is base and x.__array_interface__["data"][0] == start + h * first.nbytes
        for h, x in enumerate(arrays)
    ):
        shape, strides = (len(arrays), *first.shape), (first.nbytes, *first.strides)
        return np.lib.stride_tricks.as_strided(first, shape, strides)
    return np.stack(arrays)


def check_logits(lse: Array) -> None:
    """Refuse logits that overflowed, which finite inputs show as a logsumexp that is NaN."""
    wrong = np.isnan(lse)
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"scale * q @ k.T must be finite in {lse.dtype}, got an overflow in row {where}; "
            f"make scale, q or k smaller, or compute in float64"
        )


def check_rank(rank: object, n_k: int) -> int:
    """Return ``rank`` as an integer in ``1..n_k``."""
    if isinstance(rank, bool | np.bool_) or not isinstance(rank, numbers.Integral):
        raise TypeError(
            f"rank must be an integer, got {type(rank).__name__}; give one in 1..n_k = {n_k}"
        )
    value = int(rank)
    if not 1 <= value <= n_k:
        raise ValueError(
            f"rank must be between 1 and n_k = {n_k}, got {value}; "
            f"{'raise' if value < 1 else 'lower'} rank or use method='exact'"
        )
    return value


def closest(name: str, known: object) -> str:
    """Return ``"; did you mean ...?"``, or the list of what there is if nothing is close."""
    import difflib

    names = sorted(str(n) for n in known)  # type: ignore[attr-defined]  # any collection of names
    match = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; choose one of {', '.join(names)}"
