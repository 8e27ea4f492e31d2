"""One attention head as data: validated, immutable, with its exact quantities computed once.

This is the only place that validates arrays.  The private checks are shared with
``attention``, which accepts many heads in one array.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from .operators import SoftmaxAttention

Array = NDArray[Any]
Causal = bool | str
T = TypeVar("T")

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


class HeadArrays(NamedTuple):
    """What kernels need of one problem: writeable contiguous arrays of one precision."""

    q: Array
    k: Array
    v: Array | None


class AttentionProblem:
    """Hold one head of attention: Q, K, V, scale and what each query may see.

    ``A = rowsoftmax(scale Q K^T)`` over the visible keys, ``O = A V``.

    Parameters
    ----------
    q : array of shape (n_q, d)
        Queries; float16, bfloat16, float32 or float64, or anything with ``__array__`` or
        ``__dlpack__`` on the CPU.  Half precisions are computed in float32.
    k : array of shape (n_k, d)
        Keys, of the dtype of ``q``.
    v : array of shape (n_k, d_v), optional
        Values, of the dtype of ``q``.  Without them there is a matrix but no output.
    scale : float, optional
        Factor of the logits; ``None`` is ``1/sqrt(d)``, 0 is legal (uniform attention).
    causal : bool or {"top-left", "bottom-right"}, default False
        Query i sees the keys j <= i + offset.  ``True`` needs ``n_q = n_k``; otherwise the
        alignment is named: offset 0, or ``n_k - n_q``.
    key_mask : bool array of shape (n_k,), optional
        True for the keys that exist.  Masked keys are never read: they may hold NaN.
    name : str, optional
        Label used in studies and error messages.

    Attributes
    ----------
    q, k, v : ndarray
        Read-only arrays in the computing precision; ``v`` may be None.
    scale, causal, key_mask, name, offset, n_q, n_k, d, d_v, dtype
        As validated; ``key_mask`` is None or a read-only array, ``d_v`` is None without values.

    Raises
    ------
    TypeError
        For dtypes that are not floating point, mixed dtypes, gradients, GPU memory, or a mask
        that is not boolean.
    ValueError
        For shapes that do not fit, non-finite visible entries, a scale that is not finite, or
        ``causal=True`` with ``n_q != n_k``.

    Notes
    -----
    Unpacks like the triple that it holds: ``q, k, v = problem``.  Exact quantities are computed
    on first use and kept; pickling leaves them behind.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> problem = sa.AttentionProblem(np.zeros((2, 4)), np.ones((3, 4)), np.eye(3))
    >>> problem.output
    array([[0.33333333, 0.33333333, 0.33333333],
           [0.33333333, 0.33333333, 0.33333333]])
    """

    q: Array
    k: Array
    v: Array | None
    key_mask: Array | None
    scale: float
    causal: Causal
    name: str | None
    arrays: HeadArrays
    _cache: dict[object, Any]

    def __init__(
        self,
        q: object,
        k: object,
        v: object = None,
        *,
        scale: float | None = None,
        causal: Causal = False,
        key_mask: ArrayLike | None = None,
        name: str | None = None,
    ) -> None:
        raw_q, raw_k = as_array(q, "q"), as_array(k, "k")
        raw_v = None if v is None else as_array(v, "v")
        for label, x in (("q", raw_q), ("k", raw_k), ("v", raw_v)):
            if x is not None and x.ndim != 2:
                raise ValueError(
                    f"{label} must have two axes (tokens, width), got shape {x.shape}; "
                    f"a problem is one head, use attention for many"
                )
        if not (name is None or isinstance(name, str)):
            raise TypeError(
                f"name must be a string or None, got {type(name).__name__}; it labels the head"
            )
        dtype = float_dtype(raw_q, "q")
        check_same_dtype(raw_q, raw_k, raw_v)
        check_width(raw_q, raw_k, raw_v)
        n_k = raw_k.shape[0]
        mask = None
        if key_mask is not None:
            mask = check_key_mask(key_mask, (), n_k).copy()
            mask.flags.writeable = False
        arrays = [prepare(raw_q, dtype), prepare(raw_k, dtype)]
        arrays += [] if raw_v is None else [prepare(raw_v, dtype)]
        check_finite(arrays[0], "q")
        for i, label in enumerate("kv"[: len(arrays) - 1], start=1):
            if mask is not None and not np.isfinite(arrays[i]).all():
                arrays[i] = np.where(mask[:, None], arrays[i], dtype.type(0))
            check_finite(arrays[i], label)
        # The caller may change its arrays later; a problem must not change with them.
        owned = [
            x.copy() if np.shares_memory(x, raw) else x
            for x, raw in zip(arrays, (raw_q, raw_k, raw_v), strict=False)
        ]
        self._hold(owned, scale, causal, mask, name)

    def _hold(
        self,
        owned: Sequence[Array],
        scale: float | None,
        causal: Causal,
        mask: Array | None,
        name: str | None = None,
    ) -> None:
        set_ = self.__dict__.__setitem__
        set_("arrays", HeadArrays(owned[0], owned[1], owned[2] if len(owned) > 2 else None))
        views = [x.view() for x in owned] + [None] * (3 - len(owned))
        for label, view in zip("qkv", views, strict=True):
            if view is not None:
                view.flags.writeable = False
            set_(label, view)
        set_("scale", check_scale(scale, owned[0].shape[1]))
        set_("causal", check_causal(causal, owned[0].shape[0], owned[1].shape[0]))
        set_("key_mask", mask)
        set_("name", name)
        set_("_cache", {})

    @classmethod
    def adopt(
        cls, *arrays: Array, scale: float | None = None, causal: Causal = False
    ) -> AttentionProblem:
        """Return a problem of q, k and perhaps v that are neither checked nor copied.

        For arrays that `prepare` returned, of one precision and finite, which nobody changes
        while the problem lives: what `attention` holds during a call.
        """
        problem = cls.__new__(cls)
        problem._hold(arrays, scale, causal, None)
        return problem

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"{name} of an AttentionProblem cannot be changed; make another problem"
        )

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name} of an AttentionProblem cannot be deleted")

    def __iter__(self) -> Iterator[Array | None]:
        return iter((self.q, self.k, self.v))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (
            self.arrays,
            {
                "scale": self.scale,
                "causal": self.causal,
                "key_mask": self.key_mask,
                "name": self.name,
            },
        )

    def __repr__(self) -> str:
        label = "" if self.name is None else f"{self.name!r}, "
        masked = "" if self.key_mask is None else f", kept_keys={int(self.key_mask.sum())}"
        return (
            f"AttentionProblem({label}n_q={self.n_q}, n_k={self.n_k}, d={self.d}, d_v={self.d_v}, "
            f"dtype={self.dtype}, scale={self.scale:.6g}, causal={self.causal!r}{masked})"
        )

    @property
    def n_q(self) -> int:
        """Number of queries."""
        return int(self.q.shape[0])

    @property
    def n_k(self) -> int:
        """Number of keys, masked ones included."""
        return int(self.k.shape[0])

    @property
    def d(self) -> int:
        """Width of queries and keys."""
        return int(self.q.shape[1])

    @property
    def d_v(self) -> int | None:
        """Width of the values; None without values."""
        return None if self.v is None else int(self.v.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Computing precision, float32 or float64."""
        return self.q.dtype

    @property
    def offset(self) -> int:
        """Position of the first query among the keys, for causal problems."""
        return self.n_k - self.n_q if self.causal == "bottom-right" else 0

    @property
    def values(self) -> Array:
        """Values (n_k, d_v); raises ValueError for a problem without them."""
        if self.v is None:
            raise ValueError(
                "v must be given for an output, got None; make the problem with its values"
            )
        return self.v

    @property
    def kept_keys(self) -> Array:
        """Indices of the keys that are not masked, int64, ascending."""
        if self.key_mask is None:
            return np.arange(self.n_k)
        return np.flatnonzero(self.key_mask)

    def visible(self, rows: Array | None = None) -> Array:
        """Return the visible set of some rows as a boolean array (len(rows), n_k).

        Parameters
        ----------
        rows : int array, optional
            Indices of queries, negative ones from the end; None is all of them, n_q x n_k.
        """
        index = np.arange(self.n_q)
        index = index if rows is None else index[np.asarray(rows)]
        keep = np.ones(self.n_k, bool) if self.key_mask is None else self.key_mask
        if not self.causal:
            return np.broadcast_to(keep, (len(index), self.n_k)).copy()
        seen: Array = np.arange(self.n_k)[None, :] <= (index + self.offset)[:, None]
        return seen & keep

    def visible_counts(self) -> Array:
        """Return the number of visible keys of each row, int64 (n_q,)."""
        keep = np.ones(self.n_k, bool) if self.key_mask is None else self.key_mask
        if not self.causal:
            return np.full(self.n_q, int(keep.sum()))
        total = np.concatenate([[0], np.cumsum(keep)])
        last = np.clip(np.arange(self.n_q) + self.offset + 1, 0, self.n_k)
        return total[last].astype(np.int64)

    def cached(self, key: object, compute: Callable[[], T]) -> T:
        """Return ``compute()``, computed once for each ``key`` of this problem."""
        if key not in self._cache:
            self._cache[key] = compute()
        value: T = self._cache[key]
        return value

    def astype(self, dtype: Any) -> AttentionProblem:
        """Return this problem in another precision (itself if it has it already)."""
        wanted = as_precision(dtype)
        if wanted is None:
            raise TypeError(f"dtype must be float32 or float64, got {dtype!r}; use one of these")
        if wanted == self.dtype:
            return self

        def convert() -> AttentionProblem:
            with np.errstate(over="ignore"):  # an infinity is refused below
                q, k, v = (None if x is None else x.astype(wanted) for x in self.arrays)
            return AttentionProblem(
                q,
                k,
                v,
                scale=self.scale,
                causal=self.causal,
                key_mask=self.key_mask,
                name=self.name,
            )

        return self.cached(("astype", wanted.name), convert)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that defines the problem, as 64 hexadecimal digits."""
        import hashlib

        h = hashlib.sha256()
        for x in (*self.arrays, self.key_mask):
            if x is None:
                h.update(b"none;")
            else:
                h.update(f"{x.dtype.str}{x.shape};".encode())
                h.update(np.ascontiguousarray(x).data)
        h.update(f"{self.scale!r};{self.causal!r};".encode())
        return h.hexdigest()

    @cached_property
    def exact(self) -> SoftmaxAttention:
        """The exact softmax matrix as an operator, never n_q x n_k in memory."""
        from .operators import SoftmaxAttention

        return SoftmaxAttention(self)

    @cached_property
    def _solution(self) -> tuple[Array, Array]:
        from .operators import solve

        out, lse = solve(self, self.arrays.v)
        check_logits(lse)
        out.flags.writeable = False
        lse.flags.writeable = False
        return out, lse

    @property
    def output(self) -> Array:
        """Exact output ``A V`` (n_q, d_v), read-only; rows that see no key are zero.

        Raises ValueError without values, and for logits that overflow the computing precision.
        """
        _ = self.values
        return self._solution[0]

    @property
    def logsumexp(self) -> Array:
        """Natural logarithm of the row sums of ``exp(L)`` (n_q,), -inf for an empty row."""
        return self._solution[1]


def _rebuild(arrays: HeadArrays, options: dict[str, Any]) -> AttentionProblem:
    return AttentionProblem(*arrays, **options)
