"""``attention``: many heads, batches, grouped keys and masks in, one output out."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .draws import Rng, as_generator
from .problem import (
    AttentionProblem,
    Causal,
    as_array,
    as_float,
    as_precision,
    check_causal,
    check_finite,
    check_key_mask,
    check_logits,
    check_same_dtype,
    check_scale,
    check_width,
    float_dtype,
    prepare,
)

if TYPE_CHECKING:
    from .methods import Method

Array = NDArray[Any]


@overload
def attention(
    q: object,
    k: object,
    v: object,
    method: str | Method = ...,
    *,
    rng: Rng = ...,
    draw: Mapping[str, Any] | None = ...,
    scale: float | None = ...,
    causal: Causal = ...,
    offset: ArrayLike | None = ...,
    key_mask: ArrayLike | None = ...,
    attn_mask: ArrayLike | None = ...,
    softcap: float = ...,
    window: tuple[int, int] = ...,
    sink: ArrayLike | None = ...,
    enable_gqa: bool = ...,
    compute_dtype: Any = ...,
    return_lse: Literal[False] = ...,
    **parameters: Any,
) -> Array: ...


@overload
def attention(
    q: object,
    k: object,
    v: object,
    method: str | Method = ...,
    *,
    rng: Rng = ...,
    draw: Mapping[str, Any] | None = ...,
    scale: float | None = ...,
    causal: Causal = ...,
    offset: ArrayLike | None = ...,
    key_mask: ArrayLike | None = ...,
    attn_mask: ArrayLike | None = ...,
    softcap: float = ...,
    window: tuple[int, int] = ...,
    sink: ArrayLike | None = ...,
    enable_gqa: bool = ...,
    compute_dtype: Any = ...,
    return_lse: Literal[True],
    **parameters: Any,
) -> tuple[Array, Array]: ...


def attention(
    q: object,
    k: object,
    v: object,
    method: str | Method = "exact",
    *,
    rng: Rng = None,
    draw: Mapping[str, Any] | None = None,
    scale: float | None = None,
    causal: Causal = False,
    offset: ArrayLike | None = None,
    key_mask: ArrayLike | None = None,
    attn_mask: ArrayLike | None = None,
    softcap: float = 0.0,
    window: tuple[int, int] = (-1, -1),
    sink: ArrayLike | None = None,
    enable_gqa: bool = False,
    compute_dtype: Any = None,
    return_lse: bool = False,
    **parameters: Any,
) -> Array | tuple[Array, Array]:
    """Compute attention, exact or approximate, for any number of heads.

    ``L = scale Q K^T``; ``L = softcap tanh(L / softcap)``; ``L += bias``; hidden entries are
    ``-inf``; ``A = rowsoftmax(L)``; ``O = A V``: in this order.

    Parameters
    ----------
    q : array (..., h, n_q, d)
        Queries, float16, bfloat16, float32 or float64; (n_q, d) is one head.
    k : array (..., h_kv, n_k, d)
        Keys, of the dtype of ``q``.
    v : array (..., h_kv, n_k, d_v)
        Values, of the dtype of ``q``.
    method : str or Method, default "exact"
        A registered name, whose parameters follow as keywords (``rank=64``), or an object.
    rng : None, int or numpy.random.Generator
        Randomness of the method.  For (n_q, d) it is handed to the method; otherwise each
        (batch, head) has a stream of its own, which depends on neither the number of heads nor
        the number of threads.
    draw : mapping, optional
        One draw used for every head instead of ``rng``.
    scale : float, optional
        ``None`` is ``1/sqrt(d)``; 0 is legal.
    causal : bool or {"top-left", "bottom-right"}
        Query i sees the keys ``j <= i + offset``; ``True`` needs ``n_q = n_k``.
    offset : int array broadcastable to the batch axes, optional
        Position of query 0 among the keys, used by ``causal`` and ``window`` alike; overrides
        the alignment and may be negative.
    key_mask : bool array (n_k,) or (..., n_k), optional
        True for the keys to keep, one mask or one a batch entry.
    attn_mask : array broadcastable to (..., h, n_q, n_k), optional
        Boolean (True = attend), or floating point and added to the logits; ``-inf`` hides.
        Aligned to the right: three axes are (h, n_q, n_k).
    softcap : float, default 0
        Caps the logits before any mask; 0 is off.
    window : (int, int), default (-1, -1)
        Query at position p sees ``p - left <= j <= p + right``; -1 is unbounded.
    sink : array (h,), optional
        An extra logit for each head whose value is zero.
    enable_gqa : bool
        Allow ``h_kv < h``; query head i reads key head ``i // (h / h_kv)``.
    compute_dtype : {None, numpy.float32, numpy.float64}
        None computes float32 and halves in float32 and float64 in float64, fast.
        ``float64`` is reference grade: inputs widened exactly, plain float64 arithmetic, one
        rounding at the end.
    return_lse : bool
        Return the logsumexp of each row too.
    **parameters
        Parameters of the method.

    Returns
    -------
    out : ndarray (..., h, n_q, d_v)
        In the dtype of ``q``.  Rows that see no key are zero.
    lse : ndarray (..., h, n_q)
        Only with ``return_lse``: in the computing precision, -inf for a row that sees no key.

    Raises
    ------
    ValueError, TypeError
        For every shape, dtype, mask, scale or option that does not fit, for an option that the
        method cannot honour, for logits that overflow, and for non-finite entries that no mask
        hides from anybody.  With a mask, a window or ``causal``, keys and values may be
        non-finite; they reach exactly the rows that see them.

    Notes
    -----
    Semantics are those that torch, FlashAttention and ONNX agree on; where they differ, an
    ambiguous call is refused.  Any other method than "exact" runs a head at a time as an
    ``AttentionProblem`` and supports what its traits say.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> x = np.random.default_rng(0).standard_normal((2, 3, 5, 4))
    >>> sa.attention(x, x, x, causal=True).shape
    (2, 3, 5, 4)
    >>> sa.attention(x, x, x, "uniform", rank=2, rng=0).shape
    (2, 3, 5, 4)
    """
    arrays = as_array(q, "q"), as_array(k, "k"), as_array(v, "v")
    layout = _Layout(*arrays, enable_gqa=enable_gqa)
    computing = _computing_dtype(arrays[0], compute_dtype)
    factor = check_scale(scale, layout.d)
    # An offset says where the first query is, so that True needs no square shape.
    alignment = check_causal(causal, layout.n_q if offset is None else layout.n_k, layout.n_k)
    first = layout.offsets(offset, alignment)
    left, right = _check_window(window)
    if alignment:
        right = 0 if right is None else min(right, 0)
    cap = _check_softcap(softcap, computing)
    flag = _check_flag(return_lse, "return_lse")
    keys = None if key_mask is None else check_key_mask(key_mask, layout.batch, layout.n_k)
    mask = None if attn_mask is None else layout.check_mask(as_array(attn_mask, "attn_mask"))
    sinks = None if sink is None else layout.check_sink(as_array(sink, "sink"))
    check_finite(arrays[0], "q")

    if not _is_exact(method):
        from .methods import make_method

        chosen = make_method(method, parameters)
        for name, given, off in (
            ("attn_mask", attn_mask, None),
            ("offset", offset, None),
            ("softcap", softcap, 0),
            ("window", tuple(window), (-1, -1)),
            ("sink", sink, None),
            ("return_lse", flag, False),
        ):
            if given is not off and not (off is not None and given == off):
                shown = repr(given) if off is not None or np.isscalar(given) else "an array"
                raise ValueError(
                    f"{name} must be {off!r} for method {chosen.name!r}, which cannot honour it, "
                    f"got {shown}; use method='exact'"
                )
        for label, x in (("k", arrays[1]), ("v", arrays[2])):
            check_finite(x if keys is None else layout.keep(x, keys), label)
        return _approximate(arrays, layout, chosen, rng, draw, factor, alignment, keys, computing)
    if parameters:
        from .methods import make_method

        make_method(method, parameters)  # refuses them: the exact method has none
    if draw is not None:
        raise ValueError("draw must be None for method 'exact', got a draw; it draws nothing")
    if rng is not None:
        as_generator(rng)  # unused, but a wrong one would fail with any other method

    q3, k3, v3 = layout.flatten(arrays, computing)
    options: dict[str, Any] = {
        "scale": factor,
        "group": layout.group,
        "softcap": cap,
        "first": first,
        "left": left,
        "right": right,
        "sink": None if sinks is None else layout.per_head(_narrow(sinks, computing)),
        "key_mask": None,
        "key_slab": None,
        "mask": None,
        "mask_slab": None,
    }
    if keys is not None:
        options["key_mask"], options["key_slab"] = layout.key_slabs(keys)
    if mask is not None:
        options["mask"], options["mask_slab"] = layout.mask_slabs(mask, computing)
    grade = compute_dtype is not None and computing == np.float64
    out, lse = _exact(q3, k3, v3, options, grade)
    return layout.finish(out, lse, arrays[0].dtype, flag)


# --- arguments ------------------------------------------------------------------------------


def _is_exact(method: object) -> bool:
    if isinstance(method, str):
        return method == "exact"
    return type(method).__name__ == "Exact" and getattr(method, "name", None) == "exact"


def _check_flag(value: object, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}; pass True or False")
    return bool(value)


def _computing_dtype(q: Array, compute_dtype: Any) -> np.dtype[Any]:
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


def _check_window(window: object) -> tuple[int | None, int | None]:
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


def _check_softcap(softcap: object, dtype: np.dtype[Any]) -> float:
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


def _narrow(x: Array, dtype: np.dtype[Any]) -> Array:
    """Return a copy of logits in ``dtype``; finite ones stay finite, so that only -inf hides."""
    limit = dtype.type(np.finfo(dtype).max / 2)
    with np.errstate(over="ignore", under="ignore"):
        narrow = x.astype(dtype)
    np.clip(narrow, -limit, limit, out=narrow)
    np.copyto(narrow, -np.inf, where=x == -np.inf)
    return narrow


class _Layout:
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
        if _check_flag(enable_gqa, "enable_gqa") and h_kv and self.h % h_kv == 0:
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
            flat = _narrow(flat, dtype)
        return (
            np.require(flat, requirements=["C", "W"]),
            np.ascontiguousarray(of_head.reshape(-1).astype(np.int64)),
        )

    def finish(
        self, out: Array, lse: Array, dtype: np.dtype[Any], return_lse: bool
    ) -> Array | tuple[Array, Array]:
        """Return the results in the layout and dtype of the call."""
        from .reference import round_to

        shaped = round_to(out, dtype.newbyteorder("=")).reshape((*self.lead, self.n_q, self.d_v))
        if not return_lse:
            return shaped
        return shaped, lse.reshape((*self.lead, self.n_q))


# --- computation ----------------------------------------------------------------------------


def _exact(
    q: Array, k: Array, v: Array, options: dict[str, Any], reference: bool
) -> tuple[Array, Array]:
    from .kernels.softmax import softmax_product
    from .reference import reference_attention

    product = reference_attention if reference else softmax_product
    clean = bool(np.isfinite(k).all() and np.isfinite(v).all())
    if not clean:
        k, v = _without_hidden(q.shape[1], k, v, options)
        clean = bool(np.isfinite(k).all() and np.isfinite(v).all())
    if clean:
        out, lse = product(q, k, v, **options)
        check_logits(lse)
        return out, lse
    if reference:
        return product(q, k, v, **options)
    # 0 times NaN is NaN: the product runs on finite values, and what the others contribute is
    # added where their keys are seen.
    out, lse = product(q, k, np.where(np.isfinite(v), v, v.dtype.type(0)), **options)
    _add_non_finite(out, lse, q, k, v, options)
    return out, lse


def _seen(
    options: dict[str, Any], h: int, rows: Array, n_k: int, keys: Array
) -> tuple[Array, Array | None]:
    """Return the visible set (rows, keys) of a head, and the bias there."""
    p = rows[:, None] + int(options["first"][h])
    seen = np.ones((len(rows), len(keys)), bool)
    if options["left"] is not None:
        seen &= keys[None, :] >= p - options["left"]
    if options["right"] is not None:
        seen &= keys[None, :] <= p + options["right"]
    if options["key_mask"] is not None:
        seen &= options["key_mask"][options["key_slab"][h]][keys]
    bias = None
    if options["mask"] is not None:
        mask = options["mask"][options["mask_slab"][h]]
        mask = mask[rows if mask.shape[0] > 1 else np.zeros_like(rows)]
        mask = mask[:, keys if mask.shape[1] > 1 else np.zeros_like(keys)]
        seen &= mask if mask.dtype == np.bool_ else mask != -np.inf
        bias = None if mask.dtype == np.bool_ else mask
    return seen, bias


def _reach(n_q: int, n_k: int, options: dict[str, Any]) -> tuple[Array, Array]:
    """Return which keys every row of a head sees, and which some row may see: both (H, n_k)."""
    key = np.arange(n_k)
    first = options["first"][:, None]
    everyone, someone = np.ones((2, len(first), n_k), bool)
    if options["left"] is not None:
        everyone &= key >= first + n_q - 1 - options["left"]
        someone &= key >= first - options["left"]
    if options["right"] is not None:
        everyone &= key <= first + options["right"]
        someone &= key <= first + n_q - 1 + options["right"]
    if options["key_mask"] is not None:
        keep = options["key_mask"][options["key_slab"]]
        everyone &= keep
        someone &= keep
    if options["mask"] is not None:
        seen = options["mask"] if options["mask"].dtype == np.bool_ else options["mask"] != -np.inf
        everyone &= seen.all(axis=1)[options["mask_slab"]]
        someone &= seen.any(axis=1)[options["mask_slab"]]
    return everyone, someone


def _without_hidden(n_q: int, k: Array, v: Array, options: dict[str, Any]) -> tuple[Array, Array]:
    """Return k and v with zeros where no query looks; refuse non-finite ones that all see."""
    grouped = (k.shape[0], options["group"], k.shape[1])
    everyone, someone = (x.reshape(grouped) for x in _reach(n_q, k.shape[1], options))
    for label, x in (("k", k), ("v", v)):
        wrong = np.argwhere(~np.isfinite(x).all(axis=2) & everyone.all(axis=1))
        if len(wrong):
            raise ValueError(
                f"{label} must be finite where every query sees it, got a non-finite entry at "
                f"key {wrong[0, 1]} of key head {wrong[0, 0]}; replace it, or hide the key with a "
                f"mask"
            )
    shown: Array = np.expand_dims(someone.any(axis=1), 2)
    return np.where(shown, k, k.dtype.type(0)), np.where(shown, v, v.dtype.type(0))


# Entries of a block of logits between rows and keys that are not finite.
_BLOCK_ENTRIES = 1 << 20


def _add_non_finite(
    out: Array, lse: Array, q: Array, k: Array, v: Array, options: dict[str, Any]
) -> None:
    """Add ``A_ij v_jc`` of non-finite values ``v_jc`` to the rows that see key j.

    The sum over j is NaN if a value is, if a weight is zero or NaN, or if both infinities meet.
    """
    n_q, n_k = q.shape[1], k.shape[1]
    for h in range(q.shape[0]):
        k_h, v_h = k[h // options["group"]], v[h // options["group"]]
        keys = np.flatnonzero(~(np.isfinite(k_h).all(axis=1) & np.isfinite(v_h).all(axis=1)))
        up, down, nan = (
            x.astype(np.float32)
            for x in (v_h[keys] == np.inf, v_h[keys] == -np.inf, np.isnan(v_h[keys]))
        )
        step = max(1, _BLOCK_ENTRIES // max(1, len(keys)))
        for start in range(0, n_q if len(keys) else 0, step):
            block = slice(start, min(start + step, n_q))
            seen, bias = _seen(options, h, np.arange(n_q)[block], n_k, keys)
            with np.errstate(all="ignore"):
                logits = options["scale"] * (q[h, block] @ k_h[keys].T)
                if options["softcap"] > 0:
                    logits = options["softcap"] * np.tanh(logits / options["softcap"])
                if bias is not None:
                    logits = logits + bias
                weight = np.exp(logits - lse[h, block, None])
            positive = (seen & (weight > 0)).astype(np.float32)
            other = seen.astype(np.float32) - positive
            high, low = positive @ up > 0, positive @ down > 0
            lost = (seen.astype(np.float32) @ nan + other @ (up + down) > 0) | (high & low)
            # Logits of -inf alone leave no weight to divide by; an empty row sees no key.
            void = np.isneginf(lse[h, block]) & seen.any(axis=1)
            lse[h, block][void] = np.nan
            lost |= void[:, None]
            high, low = high & ~lost, low & ~lost
            target = out[h, block]
            for where, value in ((lost, np.nan), (high, np.inf), (low, -np.inf)):
                target[where & ~np.isnan(target)] = value


# Entries of the arrays of heads that a method is given at a time; copies of them are made.
_HEADS_ENTRIES = 1 << 22


def _approximate(
    arrays: tuple[Array, Array, Array],
    layout: _Layout,
    chosen: Method,
    rng: Rng,
    draw: Mapping[str, Any] | None,
    scale: float,
    causal: Causal,
    keys: Array | None,
    computing: np.dtype[Any],
) -> Array:
    from .draws import entropy_of, head_generator
    from .reference import round_to

    native = arrays[0].dtype.newbyteorder("=")
    if draw is not None and rng is not None:
        raise ValueError("rng must be None when draw is given, got both; pass one of them")
    q3, k3, v3 = layout.flatten(arrays, computing)
    slabs = None if keys is None else layout.key_slabs(keys)
    out = np.zeros((layout.entries * layout.h, layout.n_q, layout.d_v), computing)
    nothing = layout.n_k == 0 or layout.n_q == 0

    def problem_of(flat: int) -> AttentionProblem:
        head = (q3[flat], k3[flat // layout.group], v3[flat // layout.group])
        if slabs is None:
            # Checked above, and nobody changes them during this call.
            return AttentionProblem.adopt(*head, scale=scale, causal=causal)
        kept = slabs[0][slabs[1][flat]]
        return AttentionProblem(*head, scale=scale, causal=causal, key_mask=kept)

    if causal and not chosen.traits.causal:
        if len(out) and not nothing:
            chosen.check(problem_of(0))  # a method says better why, and what to do
        raise ValueError(
            f"causal must be False for method {chosen.name!r}, which sees all keys, got "
            f"{causal!r}; use a method whose traits.causal is True"
        )
    if nothing:
        return round_to(out, native).reshape((*layout.lead, layout.n_q, layout.d_v))
    entropy = entropy_of(rng) if draw is None and layout.lead else 0

    def rng_of(flat: int) -> Rng:
        # One head alone is the same call as the method's own: the same rng, the same bits.
        if draw is not None or layout.lead == ():
            return rng
        return head_generator(entropy, *divmod(flat, layout.h))

    numbers = (layout.n_q + layout.n_k) * (layout.d + layout.d_v)
    step = max(1, _HEADS_ENTRIES // max(numbers, 1))
    for start in range(0, len(out), step):
        heads = range(start, min(start + step, len(out)))
        out[start : start + step] = chosen.attend_heads(
            [problem_of(flat) for flat in heads], [rng_of(flat) for flat in heads], draw=draw
        )
    return round_to(out, native).reshape((*layout.lead, layout.n_q, layout.d_v))
