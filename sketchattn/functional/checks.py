"""The arguments of ``attention`` that a problem does not have: each checked by one function."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import (
    as_array,
    as_float,
    as_precision,
    check_finite,
    check_flag,
    check_same_dtype,
    check_width,
    float_dtype,
)
from .layout import Layout

Array = NDArray[Any]


def check_layout(q: Array, k: Array, v: Array, *, enable_gqa: object) -> Layout:
    """Return the layout of q, k and v; refuse arrays that do not belong together."""
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
    if k.shape[:-3] != q.shape[:-3]:
        raise ValueError(
            f"k must have the batch axes {q.shape[:-3]} of q, got {k.shape[:-3]}; "
            f"broadcast them first"
        )
    h, h_kv = (x.shape[-3] if x.ndim > 2 else 1 for x in (q, k))
    if check_flag(enable_gqa, "enable_gqa") and h_kv and h % h_kv == 0:
        group = h // h_kv
    elif h_kv == h:
        group = 1
    elif enable_gqa:
        raise ValueError(
            f"k must have a number of heads that divides the {h} heads of q, got {h_kv}; "
            f"repeat or drop heads"
        )
    else:
        raise ValueError(
            f"k must have the {h} heads of q, got {h_kv}; pass enable_gqa=True to share key heads"
        )
    (n_q, d), (n_k, d_v) = q.shape[-2:], v.shape[-2:]
    return Layout(q.shape[:-2], group, n_q, n_k, d, d_v)


def check_computing(q: Array, compute_dtype: Any) -> np.dtype[Any]:
    """Return the precision to compute in, which is not narrower than that of q."""
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


def check_offset(offset: ArrayLike, layout: Layout) -> Array:
    """Return the positions of query 0 as integers that can be broadcast to the batch."""
    x = as_array(offset, "offset")
    if not np.issubdtype(x.dtype, np.integer):
        raise TypeError(f"offset must hold integers, got {x.dtype}; it is the position of query 0")
    try:
        np.broadcast_to(x, layout.batch)
    except ValueError:
        raise ValueError(
            f"offset must be broadcastable to the batch axes {layout.batch}, got shape "
            f"{x.shape}; give one integer or one a batch entry"
        ) from None
    for extreme in (int(x.min()), int(x.max())) if x.size else ():
        if abs(extreme) >= 1 << 32:
            raise ValueError(f"offset must be below 2^32 in size, got {extreme}; check its units")
    return x


def check_window(window: object) -> tuple[int | None, int | None]:
    """Return the reach of a query to the left and to the right, None where it is unbounded."""
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
    """Return the cap of the logits as a number that kernels of this precision can divide by."""
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


def check_attn_mask(attn_mask: ArrayLike, layout: Layout) -> Array:
    """Return a mask without repetition; refuse an ambiguous dtype and a shape that is wrong."""
    mask = as_array(attn_mask, "attn_mask")
    full = (*layout.lead, layout.n_q, layout.n_k)
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


def check_sink(sink: ArrayLike, layout: Layout) -> Array:
    """Return a sink that is one finite logit a head."""
    logits = as_array(sink, "sink")
    float_dtype(logits, "sink")
    if logits.shape != (layout.h,):
        raise ValueError(
            f"sink must have shape ({layout.h},), got {logits.shape}; give one logit for each head"
        )
    check_finite(logits, "sink")
    return logits


def check_foreign(parameters: Mapping[str, Any]) -> None:
    """Refuse arguments that other libraries have under another name, or that there is no use for.

    They are no parameters of a method: the remedy is not among its names.
    """
    if "is_causal" in parameters:
        raise TypeError(
            f"is_causal must be given as causal, got is_causal={parameters['is_causal']!r}; "
            f"pass causal=True, or 'top-left' or 'bottom-right' where n_q != n_k"
        )
    if "dropout_p" in parameters:
        raise TypeError(
            f"dropout_p must be left out, got {parameters['dropout_p']!r}; "
            f"there is no dropout here, weights are those of inference"
        )
