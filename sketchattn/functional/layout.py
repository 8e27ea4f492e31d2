"""Shapes, masks and options of one call, and the moves between them and what kernels see."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import (
    Causal,
    as_array,
    as_float,
    as_precision,
    check_finite,
    check_same_dtype,
    check_width,
    float_dtype,
    prepare,
)

Array = NDArray[Any]


def check_flag(value: object, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}; pass True or False")
    return bool(value)


def computing_dtype(q: Array, compute_dtype: Any) -> np.dtype[Any]:
    natural = float_dtype(q, "q")
    if compute_dtype is None:
        return natural
    wanted = as_precision(compute_dtype)
    if wanted is None:
        raise TypeError(
            f"compute_dtype must be None, numpy.float32 or numpy.float64, got {compute_dtype!r}; "
            f"None computes in {natural}"
        )
    if wanted.itemsize < natural.itemsize:
        raise ValueError(
            f"compute_dtype must not be narrower than the inputs, got {wanted} for {q.dtype}; "
            f"convert q, k and v first"
        )
    return wanted


def check_window(window: object) -> tuple[int | None, int | None]:
    pair = tuple(window) if isinstance(window, Sequence | np.ndarray) else ()
    if len(pair) != 2:
        raise TypeError(
            f"window must be a pair (left, right), got {window!r}; (-1, -1) is unbounded"
        )
    sides: list[int | None] = []
    for label, side in zip(("left", "right"), pair, strict=True):
        if isinstance(side, bool | np.bool_) or not isinstance(side, numbers.Integral):
            raise TypeError(
                f"window must hold two integers, got {label} = {side!r}; -1 is unbounded"
            )
        if side < -1:
            raise ValueError(
                f"window must hold integers of at least -1, got {label} = {side}; -1 is unbounded"
            )
        # No length comes near 2^40, and positions plus it stay far from the limits of int64.
        sides.append(None if side == -1 or int(side) >= 1 << 40 else int(side))
    return sides[0], sides[1]


def check_softcap(softcap: object, dtype: np.dtype[Any]) -> float:
    if isinstance(softcap, bool | np.bool_) or not isinstance(softcap, numbers.Real):
        raise TypeError(
            f"softcap must be a real number, got {type(softcap).__name__}; 0 turns it off"
        )
    value = as_float(softcap)
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(f"softcap must be finite and at least 0, got {value}; 0 turns it off")
    # Its inverse and its product with log2(e) have to be finite too; the capped logits are then
    # zero, or not capped, to rounding.
    limits = np.finfo(dtype)
    return min(max(value, float(limits.tiny)), float(limits.max) / 8) if value else 0.0


def narrow_logits(x: Array, dtype: np.dtype[Any]) -> Array:
    """Return a copy of logits in ``dtype``; finite ones stay finite, so that only -inf hides."""
    limit = dtype.type(np.finfo(dtype).max / 2)
    with np.errstate(over="ignore", under="ignore"):
        narrow = x.astype(dtype)
    np.clip(narrow, -limit, limit, out=narrow)
    np.copyto(narrow, -np.inf, where=x == -np.inf)
    return narrow


class Layout:
    """Shapes of one call, and the moves between them and the flat (H, n, d) of the kernels."""

    def __init__(self, q: Array, k: Array, v: Array, *, enable_gqa: bool) -> None:
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.ndim < 2:
                raise ValueError(
                    f"{name} must have shape (..., heads, tokens, width), got {x.shape}; "
                    f"two axes are one head"
                )
            float_dtype(x, name)
        check_same_dtype(q, k, v)
        check_width(q, k, v)
        for name, x in (("k", k), ("v", v)):
            if x.ndim != q.ndim:
                raise ValueError(
                    f"{name} must have as many axes as q of shape {q.shape}, got {x.shape}; "
                    f"add axes of length 1 and broadcast them"
                )
        if v.shape[:-2] != k.shape[:-2]:
            raise ValueError(
                f"v must have the batch and head axes {k.shape[:-2]} of k, got {v.shape[:-2]}; "
                f"pass k and v of equal heads"
            )
        self.lead = q.shape[:-2]
        self.batch = q.shape[:-3] if q.ndim > 2 else ()
        self.has_heads = q.ndim > 2
        self.h = q.shape[-3] if self.has_heads else 1
        h_kv = k.shape[-3] if self.has_heads else 1
        if k.shape[:-3] != q.shape[:-3]:
            raise ValueError(
                f"k must have the batch axes {q.shape[:-3]} of q, got {k.shape[:-3]}; "
                f"broadcast them first"
            )
        if check_flag(enable_gqa, "enable_gqa") and h_kv and self.h % h_kv == 0:
            self.group = self.h // h_kv
        elif h_kv == self.h:
            self.group = 1
        elif enable_gqa:
            raise ValueError(
                f"k must have a number of heads that divides the {self.h} heads of q, got {h_kv}; "
                f"repeat or drop heads"
            )
        else:
            raise ValueError(
                f"k must have the {self.h} heads of q, got {h_kv}; "
                f"pass enable_gqa=True to share key heads"
            )
        self.n_q, self.d = q.shape[-2:]
        self.n_k, self.d_v = v.shape[-2:]
        self.entries = math.prod(self.batch)

    def flatten(self, arrays: tuple[Array, ...], dtype: np.dtype[Any]) -> list[Array]:
        """Return q, k, v as contiguous (H, n, d) in the computing precision."""
        return [prepare(x.reshape((math.prod(x.shape[:-2]), *x.shape[-2:])), dtype) for x in arrays]

    def per_head(self, x: Array) -> Array:
        """Return one entry for each flat head of an array over heads (h,)."""
        return np.ascontiguousarray(np.tile(x, self.entries))

    def offsets(self, offset: ArrayLike | None, alignment: Causal) -> Array:
        """Return the position of query 0 among the keys for each flat head, int64 (H,)."""
        if offset is None:
            start = self.n_k - self.n_q if alignment == "bottom-right" else 0
            return np.full(self.entries * self.h, start, np.int64)
        x = as_array(offset, "offset")
        if not np.issubdtype(x.dtype, np.integer):
            raise TypeError(
                f"offset must hold integers, got {x.dtype}; it is the position of query 0"
            )
        try:
            full = np.broadcast_to(x, self.batch)
        except ValueError:
            raise ValueError(
                f"offset must be broadcastable to the batch axes {self.batch}, got shape "
                f"{x.shape}; give one integer or one a batch entry"
            ) from None
        for extreme in (int(x.min()), int(x.max())) if x.size else ():
            if abs(extreme) >= 1 << 32:
                raise ValueError(
                    f"offset must be below 2^32 in size, got {extreme}; check its units"
                )
        return np.ascontiguousarray(np.repeat(full.reshape(-1).astype(np.int64), self.h))

    def check_mask(self, mask: Array) -> Array:
        """Return a mask without repetition; refuse an ambiguous dtype and a shape that is wrong."""
        full = (*self.lead, self.n_q, self.n_k)
        if mask.dtype != np.bool_ and mask.dtype.name not in (
            "float16", "bfloat16", "float32", "float64",
        ):  # fmt: skip
            raise TypeError(
                f"attn_mask must be boolean or floating point, got {mask.dtype}; "
                f"convert it with astype(bool) if True means attend"
            )
        if mask.ndim > len(full) or any(
            a not in (1, b) for a, b in zip(mask.shape[::-1], full[::-1], strict=False)
        ):
            raise ValueError(
                f"attn_mask must be broadcastable to {full}, got {mask.shape}; "
                f"axes are aligned to the right"
            )
        # An expanded view repeats one entry with stride 0: keep that one.
        once = (slice(0, 1) if stride == 0 else slice(None) for stride in mask.strides)
        mask = mask[(*once, ...)]
        if mask.dtype != np.bool_:
            bad = np.isnan(mask) | (mask == np.inf)
            if bad.any():
                where = tuple(int(i) for i in np.argwhere(bad)[0])
                raise ValueError(
                    f"attn_mask must hold no NaN and no +inf, got {mask[where]} at index {where}; "
                    f"-inf hides a key"
                )
        return mask

    def check_sink(self, sink: Array) -> Array:
        """Refuse a sink that is not one finite logit a head."""
        float_dtype(sink, "sink")
        if sink.shape != (self.h,):
            raise ValueError(
                f"sink must have shape ({self.h},), got {sink.shape}; give one logit for each head"
            )
        check_finite(sink, "sink")
        return sink

    def keep(self, x: Array, keys: Array) -> Array:
        """Return keys or values (..., h_kv, n_k, m) with zeros where a key is masked."""
        shown = np.expand_dims(keys, -2) if self.has_heads else keys
        return np.where(shown[..., None], x, x.dtype.type(0))

    def key_slabs(self, keys: Array) -> tuple[Array, Array]:
        """Return the masks (S, n_k) and the slab of each flat head."""
        lead = keys.shape[:-1]
        slabs = keys.reshape((math.prod(lead), self.n_k))
        of_batch = np.broadcast_to(np.arange(math.prod(lead)).reshape(lead), self.batch)
        return (
            np.require(slabs, requirements=["C", "W"]),
            np.repeat(of_batch.reshape(-1), self.h).astype(np.int64),
        )

    def mask_slabs(self, mask: Array, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """Return the mask (M, m_q, m_k) and the slab of each flat head; broadcast axes stay 1."""
        mask = mask.reshape((1,) * (2 - mask.ndim) + mask.shape) if mask.ndim < 2 else mask
        lead = mask.shape[:-2]
        of_head = np.broadcast_to(np.arange(math.prod(lead)).reshape(lead), self.lead)
        flat = mask.reshape((math.prod(lead), *mask.shape[-2:]))
        if flat.dtype != np.bool_:
            flat = narrow_logits(flat, dtype)
        return (
            np.require(flat, requirements=["C", "W"]),
            np.ascontiguousarray(of_head.reshape(-1).astype(np.int64)),
        )

    def finish(
        self, out: Array, lse: Array, dtype: np.dtype[Any], return_lse: bool
    ) -> Array | tuple[Array, Array]:
        """Return the results in the layout and dtype of the call."""
        from ..operators.reference import round_to

        shaped = round_to(out, dtype.newbyteorder("=")).reshape((*self.lead, self.n_q, self.d_v))
        if not return_lse:
            return shaped
        return shaped, lse.reshape((*self.lead, self.n_q))
