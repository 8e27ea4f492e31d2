"""One head as data: queries, keys, values and what each query may see.

This is the only place that validates the arrays of one head; its checks are shared with
``attention``, which accepts many heads in one array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arguments import (
    Causal,
    as_arrays,
    as_precision,
    check_causal,
    check_finite,
    check_key_mask,
    check_same_dtype,
    check_scale,
    check_width,
    float_dtype,
    prepare,
)
from .quiet import quiet

Array = NDArray[Any]
T = TypeVar("T")
H = TypeVar("H", bound="Head")


class HeadArrays(NamedTuple):
    """What kernels need of one problem: writeable contiguous arrays of one precision."""

    q: Array
    k: Array
    v: Array | None


class Head:
    """Hold Q, K, V, scale and what each query may see: an `AttentionProblem` without its solution.

    Operators are made of it; what a user makes is a problem, which knows its exact quantities too
    and documents parameters and attributes.
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
        raw_q, raw_k, *rest = as_arrays(q, k) if v is None else as_arrays(q, k, v)
        raw_v = rest[0] if rest else None
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
        sizes = [check_finite(arrays[0], "q")]
        for i, label in enumerate("kv"[: len(arrays) - 1], start=1):
            if mask is not None and not np.isfinite(arrays[i]).all():
                arrays[i] = np.where(mask[:, None], arrays[i], dtype.type(0))
            sizes.append(check_finite(arrays[i], label))
        # The caller may change its arrays later; a problem must not change with them.
        owned = [
            x.copy() if np.shares_memory(x, raw) else x
            for x, raw in zip(arrays, (raw_q, raw_k, raw_v), strict=False)
        ]
        self._hold(owned, scale, causal, mask, name, (sizes[0], sizes[1]))

    def _hold(
        self,
        owned: Sequence[Array],
        scale: float | None,
        causal: Causal,
        mask: Array | None,
        name: str | None = None,
        extent: tuple[float, float] | None = None,
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
        set_("_cache", {} if extent is None else {"extent": extent})

    @classmethod
    def adopt(
        cls: type[H],
        *arrays: Array,
        scale: float | None = None,
        causal: Causal = False,
        extent: tuple[float, float] | None = None,
    ) -> H:
        """Return a problem of q, k and perhaps v that are neither checked nor copied.

        For arrays that `prepare` returned, of one precision and finite, which nobody changes
        while the problem lives: what `attention` holds during a call.  ``extent`` has bounds of
        ``|q|`` and ``|k|``, by entries, where they are known.
        """
        problem = cls.__new__(cls)
        problem._hold(arrays, scale, causal, None, None, extent)
        return problem

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"{name} of an {type(self).__name__} cannot be changed; make another problem"
        )

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name} of an {type(self).__name__} cannot be deleted")

    def __iter__(self) -> Iterator[Array | None]:
        return iter((self.q, self.k, self.v))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (
            type(self),
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
            f"{type(self).__name__}({label}n_q={self.n_q}, n_k={self.n_k}, d={self.d}, "
            f"d_v={self.d_v}, dtype={self.dtype}, scale={self.scale:.6g}, "
            f"causal={self.causal!r}{masked})"
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
        if not self.causal:
            kept = self.n_k if self.key_mask is None else int(np.count_nonzero(self.key_mask))
            return np.full(self.n_q, kept)
        keep = np.ones(self.n_k, bool) if self.key_mask is None else self.key_mask
        total = np.concatenate([[0], np.cumsum(keep)])
        last = np.clip(np.arange(self.n_q) + self.offset + 1, 0, self.n_k)
        return total[last].astype(np.int64)

    def cached(self, key: object, compute: Callable[[], T]) -> T:
        """Return ``compute()``, computed once for each ``key`` of this problem."""
        if key not in self._cache:
            self._cache[key] = compute()
        value: T = self._cache[key]
        return value

    def forget(self) -> None:
        """Let go of what is cached; some of it holds this problem, and would live as garbage."""
        self._cache.clear()

    def astype(self: H, dtype: Any) -> H:
        """Return this problem in another precision (itself if it has it already)."""
        wanted = as_precision(dtype)
        if wanted is None:
            raise TypeError(f"dtype must be float32 or float64, got {dtype!r}; use one of these")
        if wanted == self.dtype:
            return self

        def convert() -> H:
            with np.errstate(over="ignore"):  # an infinity is refused below
                q, k, v = (None if x is None else x.astype(wanted) for x in self.arrays)
            return type(self)(
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


quiet(Head, "__init__")


def _rebuild(kind: type[Head], arrays: HeadArrays, options: dict[str, Any]) -> Head:
    return kind(*arrays, **options)
