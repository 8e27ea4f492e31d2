"""One call of ``attention``, validated: everything that its computation needs, made once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import (
    Causal,
    as_arrays,
    check_causal,
    check_finite,
    check_flag,
    check_key_mask,
    check_scale,
)
from .checks import (
    check_attn_mask,
    check_computing,
    check_layout,
    check_offset,
    check_sink,
    check_softcap,
    check_window,
)
from .layout import Layout, narrow_logits

Array = NDArray[Any]


@dataclass(frozen=True)
class Terms:
    """Hold what turns ``q`` and ``k`` of H flat heads into weights, as kernels read it.

    The fields are, by name, the options of ``softmax_product`` and ``reference_attention``, so
    that ``product(q, k, v, **vars(terms))`` is the exact attention.

    Attributes
    ----------
    scale, softcap : float
        ``L = scale Q K^T``, then ``softcap tanh(L / softcap)`` unless it is 0.
    group : int
        Query head h reads key head ``h // group``.
    first : int64 array (H,)
        Position of query 0 of each head among the keys.
    left, right : int or None
        A query at position p sees ``p - left <= j <= p + right``; None is unbounded.
    key_mask : bool array (S, n_k) or None
        Keys to keep.
    key_slab : int64 array (H,)
        The row of ``key_mask`` that each head reads.
    mask : bool or float array (M, n_q or 1, n_k or 1) or None
        Visible entries, or a bias whose ``-inf`` hides.
    mask_slab : int64 array (H,)
        The slab of ``mask`` that each head reads.
    sink : array (H,) or None
        An extra logit of each head, without a value.
    """

    scale: float
    softcap: float
    group: int
    first: Array
    left: int | None
    right: int | None
    key_mask: Array | None
    key_slab: Array
    mask: Array | None
    mask_slab: Array
    sink: Array | None


@dataclass(frozen=True)
class Call:
    """Hold the arguments of one call, all of them valid.

    Attributes
    ----------
    q, k, v : array
        As they were given: any floating point, any strides.
    layout : Layout
        Their shapes, and the moves to and from flat heads.
    computing : dtype
        float32 or float64.
    reference : bool
        Whether reference grade was asked for.
    causal : bool or {"top-left", "bottom-right"}
        The alignment; ``terms`` hold what it means for each query.
    key_mask : bool array (..., n_k) or None
        Over no batch axis or all of them; once more in ``terms``, flat.
    terms : Terms
        What makes the weights.
    exact_only : tuple of (name, neutral value, value in words)
        The options that were given and that only the exact method honours.
    return_lse : bool
        Whether the logsumexp is returned too.
    most_q : float
        ``max |q|``, finite.
    """

    q: Array
    k: Array
    v: Array
    layout: Layout
    computing: np.dtype[Any]
    reference: bool
    causal: Causal
    key_mask: Array | None
    terms: Terms
    exact_only: tuple[tuple[str, object, str], ...]
    return_lse: bool
    most_q: float

    def flat(self) -> tuple[Array, Array, Array]:
        """Return q (H, n_q, d), k and v (H_kv, n_k, ...), contiguous and in ``computing``."""
        q, k, v = (self.layout.flatten(x, self.computing) for x in (self.q, self.k, self.v))
        return q, k, v

    def finish(self, out: Array, lse: Array) -> Array | tuple[Array, Array]:
        """Return the results of flat heads in the layout and dtype of the call."""
        shaped = self.shaped(out, lse)
        return shaped if self.return_lse else shaped[0]

    def shaped(self, out: Array, lse: Array) -> tuple[Array, Array]:
        """Return output (H, n_q, d_v) and logsumexp (H, n_q) in the layout of the call."""
        layout = self.layout
        return layout.output(out, self.q.dtype), lse.reshape((*layout.lead, layout.n_q))


def check_call(
    q: object,
    k: object,
    v: object,
    *,
    scale: float | None,
    causal: Causal,
    offset: ArrayLike | None,
    key_mask: ArrayLike | None,
    attn_mask: ArrayLike | None,
    softcap: float,
    window: tuple[int, int],
    sink: ArrayLike | None,
    enable_gqa: bool,
    compute_dtype: Any,
    return_lse: bool,
) -> Call:
    """Return a validated call; refuse every argument of ``attention`` that does not fit.

    Only keys and values may still be non-finite: whether they may be depends on the method.
    """
    made = as_arrays(q, k, v)
    arrays = made[0], made[1], made[2]
    layout = check_layout(*arrays, enable_gqa=enable_gqa)
    computing = check_computing(arrays[0], compute_dtype)
    factor = check_scale(scale, layout.d)
    # An offset says where the first query is, so that True needs no square shape.
    alignment = check_causal(causal, layout.n_q if offset is None else layout.n_k, layout.n_k)
    first = layout.first(None if offset is None else check_offset(offset, layout), alignment)
    left, right = check_window(window)
    if alignment:
        right = 0 if right is None else min(right, 0)
    cap = check_softcap(softcap, computing)
    flag = check_flag(return_lse, "return_lse")
    keys = None if key_mask is None else check_key_mask(key_mask, layout.batch, layout.n_k)
    mask = None if attn_mask is None else check_attn_mask(attn_mask, layout)
    sinks = None if sink is None else check_sink(sink, layout)
    most_q = check_finite(arrays[0], "q")

    unread = np.zeros_like(first)
    key_slabs = (None, unread) if keys is None else layout.key_slabs(keys)
    mask_slabs = (None, unread) if mask is None else layout.mask_slabs(mask, computing)
    return Call(
        *arrays,
        layout=layout,
        computing=computing,
        reference=compute_dtype is not None and computing == np.float64,
        causal=alignment,
        key_mask=keys,
        terms=Terms(
            scale=factor,
            softcap=cap,
            group=layout.group,
            first=first,
            left=left,
            right=right,
            key_mask=key_slabs[0],
            key_slab=key_slabs[1],
            mask=mask_slabs[0],
            mask_slab=mask_slabs[1],
            sink=None if sinks is None else layout.per_head(narrow_logits(sinks, computing)),
        ),
        exact_only=_given(
            ("attn_mask", attn_mask, None),
            ("offset", offset, None),
            ("softcap", softcap, 0),
            ("window", tuple(window), (-1, -1)),
            ("sink", sink, None),
        ),
        return_lse=flag,
        most_q=most_q,
    )


def _given(*options: tuple[str, Any, Any]) -> tuple[tuple[str, object, str], ...]:
    """Return, of (name, value, neutral value), those that are not neutral, with their words."""
    found = []
    for name, value, neutral in options:
        if value is neutral or (neutral is not None and value == neutral):
            continue
        plain = neutral is not None or np.isscalar(value)
        found.append((name, neutral, repr(value) if plain else "an array"))
    return tuple(found)
