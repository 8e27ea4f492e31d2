"""Checks of arguments: each says which argument, what it must be, what it is, and what to do.

First names and numbers, then arrays, then what a head is made of.
"""

from __future__ import annotations

import math
import mmap
import numbers
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .words import listed

Array = NDArray[Any]
Causal = bool | str

ALIGNMENTS = ("top-left", "bottom-right")


def closest(name: str, known: Iterable[object]) -> str:
    """Return ``"; did you mean ...?"``, or the list of what there is if nothing is close."""
    import difflib

    names = sorted(str(n) for n in known)
    match = difflib.get_close_matches(name, names, n=1)
    if not names:
        return "; there is none"
    return f"; did you mean {match[0]!r}?" if match else f"; choose one of {', '.join(names)}"


def guesses(name: str, known: Iterable[str], count: int = 5) -> str:
    """Return ``"; did you mean ...?"`` with the nearest of so many names that no line lists all."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=count, cutoff=0.0)
    return f"; did you mean {listed(map(repr, near), 'or')}?" if near else ""


def check_name(value: object, name: str, known: Sequence[str]) -> str:
    """Return a string that is one of ``known``."""
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be a string, got {type(value).__name__}; choose one of {', '.join(known)}"
        )
    if value not in known:
        raise ValueError(f"{name} must be a known name, got {value!r}{closest(value, known)}")
    return value


def check_choice(value: object, name: str, known: Sequence[str], more: str = "") -> None:
    """Refuse what is not one of ``known``; ``more`` says what else it could have been."""
    if value not in known:
        raise ValueError(
            f"{name} must be one of {', '.join(known)}{more}, got {value!r}"
            f"{closest(str(value), known)}"
        )


def check_flag(value: object, name: str, remedy: str = "pass True or False") -> bool:
    """Return a bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}; {remedy}")
    return bool(value)


def as_integer(value: object, name: str, remedy: str, more: str = "") -> int:
    """Return an integer of any size; ``more`` says what else it could have been."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer{more}, got {type(value).__name__}; {remedy}")
    return int(value)


def check_count(value: object, name: str, remedy: str, low: int = 1, more: str = "") -> int:
    """Return an integer of at least ``low``; one remedy for whatever else is given."""
    number = as_integer(value, name, remedy, more)
    if number < low:
        raise ValueError(f"{name} must be at least {low}, got {number}; {remedy}")
    return number


def check_integer(
    value: object, name: str, low: int, remedy: str, *, high: int | None = None, limit: str = ""
) -> int:
    """Return an integer in ``low..high``; ``limit`` names the upper end."""
    number = as_integer(value, name, f"give one of at least {low}")
    if number < low or (high is not None and number > high):
        wanted = f"at least {low}" if high is None else f"between {low} and {limit} = {high}"
        raise ValueError(f"{name} must be {wanted}, got {number}; {remedy}")
    return number


def as_float(x: Any) -> float:
    """Return a real number as a float; an integer beyond all floats is infinite."""
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def as_real(value: object, name: str, remedy: str, more: str = "") -> float:
    """Return a real number as a float; ``more`` says what else it could have been."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number{more}, got {type(value).__name__}; {remedy}")
    return as_float(value)


def check_not_negative(value: object, name: str, remedy: str) -> float:
    """Return a finite real number of at least 0 as a float."""
    number = as_real(value, name, remedy)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {number}; {remedy}")
    return number


def check_positive(value: object, name: str, *, below: float = math.inf) -> float:
    """Return a finite real number above 0, and below a limit, as a float."""
    number = as_real(value, name, "give one > 0")
    if not 0.0 < number < below:
        limit = "" if math.isinf(below) else f" and below {below:g}"
        raise ValueError(f"{name} must be positive{limit}, got {number:.6g}; change {name}")
    return number


def as_array(x: object, name: str) -> Array:
    """Return ``x`` as a NumPy array without copying where possible.

    Accepts arrays, nested sequences of numbers, and anything with ``__array__`` or
    ``__dlpack__`` whose memory the CPU can read.  bfloat16 tensors without a NumPy equivalent
    are widened exactly to float32.
    """
    # Nothing is a masked array before their module is loaded, which another thread may be doing.
    masked = getattr(sys.modules.get("numpy.ma"), "MaskedArray", None)
    if masked is not None and isinstance(x, masked):
        raise TypeError(
            f"{name} must be a plain array, got a masked array; pass its data and use key_mask"
        )
    if isinstance(x, np.ndarray):
        return np.asarray(x)  # a subclass may index, reshape or multiply in its own way
    if getattr(x, "requires_grad", False) is True:
        raise TypeError(
            f"{name} must not require a gradient, since none is computed; pass {name}.detach()"
        )
    if _is_widened(x):
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


def _is_widened(x: object) -> bool:
    """Say whether something is a tensor in bfloat16, which becomes an array in float32."""
    if isinstance(x, np.ndarray):
        return False
    return str(getattr(x, "dtype", "")).endswith("bfloat16") and callable(getattr(x, "float", None))


def as_arrays(*given: object) -> list[Array]:
    """Return q, k and, where it is given, v as arrays.

    Tensors in bfloat16 beside others are refused here: as arrays they could be taken for float32.
    """
    made = [as_array(x, label) for x, label in zip(given, "qkv", strict=False)]
    if any(map(_is_widened, given)):
        pairs = zip(given, made, strict=True)
        names = ["bfloat16" if _is_widened(x) else y.dtype.name for x, y in pairs]
        for label, name in zip("kv", names[1:], strict=False):
            _same_dtype(label, name, names[0])
    return made


def float_dtype(x: Array, name: str) -> np.dtype[Any]:
    """Return the precision that ``x`` is computed in: float32 for halves, or its own."""
    # Comparing is quicker than asking for a name, which the other byte order has too.
    if x.dtype == np.float32 or x.dtype.name in ("float16", "bfloat16", "float32"):
        return np.dtype(np.float32)
    if x.dtype == np.float64 or x.dtype.name == "float64":
        return np.dtype(np.float64)
    raise TypeError(
        f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; "
        f"convert it with astype(np.float32)"
    )


def numpy_name(dtype: Any) -> Any:
    """Return the name of a dtype of torch, ``float16`` of ``torch.float16``; others as they are."""
    kind, _, name = str(dtype).rpartition(".")
    return name if kind == "torch" and not isinstance(dtype, str) else dtype


def as_precision(dtype: Any) -> np.dtype[Any] | None:
    """Return float32 or float64 as NumPy's dtype, and None for everything else."""
    if dtype is None:
        return None  # which NumPy would take for float64
    try:
        wanted: np.dtype[Any] = np.dtype(numpy_name(dtype))
    except TypeError:
        return None
    return wanted if wanted in (np.dtype(np.float32), np.dtype(np.float64)) else None


def prepare(x: Array, dtype: np.dtype[Any]) -> Array:
    """Return ``x`` as a C-contiguous writeable array of the native ``dtype``.

    Kernels see one layout only: each other one would compile once more.  An array of a file that
    was mapped for reading is not read into memory.
    """
    if not x.flags.writeable and x.dtype == dtype and x.flags.c_contiguous and x.flags.aligned:
        again = _mapped_again(x)
        if again is not None:
            return again
    return np.require(x, dtype=dtype, requirements=["C", "W", "A"])


# Entries of a piece that stays in the second-level cache between two passes over it.
_PIECE = 1 << 18


def _mapped_again(x: Array) -> Array | None:
    """Return a private, writeable map of what ``x`` is in a file; None if it is in no file."""
    whole: np.memmap[Any, Any] | None = None
    part: object = x
    while isinstance(part, np.ndarray):
        whole = part if isinstance(part, np.memmap) else whole
        part = part.base
    if whole is None or whole.mode != "r" or not isinstance(whole.filename, str | os.PathLike):
        return None
    start = whole.offset + x.ctypes.data - whole.ctypes.data
    try:
        again: Array = np.asarray(np.memmap(whole.filename, x.dtype, "c", start, x.shape))
    except (OSError, ValueError):  # the file is gone or shorter, and lives in the first map only
        return None
    # Another file may have its name by now.
    old, new = (y.reshape(-1).view(np.uint8) for y in (x, again))
    pieces = (slice(i, i + _PIECE) for i in range(0, old.size, _PIECE))
    same = all(np.array_equal(old[i], new[i]) for i in pieces)
    # Both maps show the same pages, which would count twice as memory of this process.
    pages = getattr(whole, "_mmap", None)
    if same and isinstance(pages, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)
    return again if same else None


def largest(x: Array) -> float:
    """Return ``max |x|``, 0 if x is empty, NaN if it has one: from memory once, without a copy."""
    flat = x.reshape(-1) if x.flags.c_contiguous else x
    step = _PIECE if flat.ndim == 1 else max(1, len(x))
    most = 0.0
    with np.errstate(all="ignore"):
        for start in range(0, len(flat), step):
            piece = flat[start : start + step]
            high, low = (float(f.reduce(piece, axis=None)) for f in (np.maximum, np.minimum))
            if high != high:
                return high
            most = max(most, high, -low)
    return most


def check_finite(x: Array, name: str) -> float:
    """Return ``max |x|``; refuse NaN and infinities, and say where the first one is."""
    most = largest(x)
    if not np.isfinite(most):
        finite = np.isfinite(x)
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{name} must be finite, got {x[where]} at index {where}; "
            f"replace it, or hide its key with a mask"
        )
    return most


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


def check_width(q: Array, k: Array, v: Array | None) -> None:
    """Refuse widths and lengths that do not belong together (last two axes)."""
    if q.shape[-1] < 1:
        raise ValueError("q must have a head width d of at least 1, got d = 0; pass q of (n_q, d)")
    if k.shape[-1] != q.shape[-1]:
        several = q.shape[-1] % max(k.shape[-1], 1) == 0
        raise ValueError(
            f"k must have the head width d = {q.shape[-1]} of q, got {k.shape[-1]}; project q and "
            f"k to one width"
            + ", or make heads of grouped queries with Heads.from_projections"
            * several
        )
    if v is not None and v.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"v must have one row for each of the n_k = {k.shape[-2]} keys, "
            f"got {v.shape[-2]}; pass k and v of equal length"
        )


def check_same_dtype(q: Array, k: Array, v: Array | None) -> None:
    """Refuse mixed precisions: which one to compute in would be a guess."""
    for name, x in (("k", k), ("v", v)):
        # The byte order does not matter, and names take their time.
        if x is not None and x.dtype != q.dtype and x.dtype.name != q.dtype.name:
            _same_dtype(name, str(x.dtype), str(q.dtype))


def _same_dtype(label: str, name: str, wanted: str) -> None:
    if name != wanted:
        raise TypeError(
            f"{label} must have the dtype {wanted} of q, got {name}; "
            f"convert q, k and v to one dtype"
        )


def check_scale(scale: object, d: int) -> float:
    """Return the factor of the logits; ``None`` is ``1/sqrt(d)``."""
    if scale is None:
        return 1.0 / math.sqrt(d)
    if isinstance(scale, np.ndarray) and scale.ndim == 0:
        scale = scale.item()
    remedy = f"None is 1/sqrt(d) = {1.0 / math.sqrt(d):.6g}"
    value = as_real(scale, "scale", remedy, " or None")
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite, got {value}; {remedy}")
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
    value = as_integer(rank, "rank", f"give one in 1..n_k = {n_k}")
    if not 1 <= value <= n_k:
        raise ValueError(
            f"rank must be between 1 and n_k = {n_k}, got {value}; "
            f"{'raise' if value < 1 else 'lower'} rank or use method='exact'"
        )
    return value
