"""``attention``: many heads, batches, grouped keys and masks in, one output out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import (
    Causal,
    as_array,
    check_causal,
    check_finite,
    check_key_mask,
    check_logits,
    check_scale,
)
from ..base.draws import Rng, as_generator
from ..problem import AttentionProblem
from .hidden import add_non_finite, without_hidden
from .layout import (
    Layout,
    check_flag,
    check_softcap,
    check_window,
    computing_dtype,
    narrow_logits,
)

if TYPE_CHECKING:
    from ..zoo.base import Method

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
    layout = Layout(*arrays, enable_gqa=enable_gqa)
    computing = computing_dtype(arrays[0], compute_dtype)
    factor = check_scale(scale, layout.d)
    # An offset says where the first query is, so that True needs no square shape.
    alignment = check_causal(causal, layout.n_q if offset is None else layout.n_k, layout.n_k)
    first = layout.offsets(offset, alignment)
    left, right = check_window(window)
    if alignment:
        right = 0 if right is None else min(right, 0)
    cap = check_softcap(softcap, computing)
    flag = check_flag(return_lse, "return_lse")
    keys = None if key_mask is None else check_key_mask(key_mask, layout.batch, layout.n_k)
    mask = None if attn_mask is None else layout.check_mask(as_array(attn_mask, "attn_mask"))
    sinks = None if sink is None else layout.check_sink(as_array(sink, "sink"))
    check_finite(arrays[0], "q")

    if not _is_exact(method):
        from ..zoo.base import make_method

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
        from ..zoo.base import make_method

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
        "sink": None if sinks is None else layout.per_head(narrow_logits(sinks, computing)),
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


# --- computation ----------------------------------------------------------------------------


def _exact(
    q: Array, k: Array, v: Array, options: dict[str, Any], reference: bool
) -> tuple[Array, Array]:
    from ..kernels.softmax import softmax_product
    from ..operators.reference import reference_attention

    product = reference_attention if reference else softmax_product
    clean = bool(np.isfinite(k).all() and np.isfinite(v).all())
    if not clean:
        k, v = without_hidden(q.shape[1], k, v, options)
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
    add_non_finite(out, lse, q, k, v, options)
    return out, lse


# Entries of the arrays of heads that a method is given at a time; copies of them are made.
_HEADS_ENTRIES = 1 << 22


def _approximate(
    arrays: tuple[Array, Array, Array],
    layout: Layout,
    chosen: Method,
    rng: Rng,
    draw: Mapping[str, Any] | None,
    scale: float,
    causal: Causal,
    keys: Array | None,
    computing: np.dtype[Any],
) -> Array:
    from ..base.draws import entropy_of, head_generator
    from ..operators.reference import round_to

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
