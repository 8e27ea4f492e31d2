"""What other libraries mean by attention: a record of each, and its function on NumPy arrays.

Exact implementations agree on the formula and differ in where a causal mask is anchored when
``n_q != n_k``, what a row returns that sees no key, what its logsumexp is, whether a mask and the
causal flag go together, and in which order the axes lie.  ``conventions`` says so library by
library, and ``as_convention`` computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import as_array, check_name
from ..base.floating import without_floating_errors
from ..operators.reference import round_to
from .batched import attention

Array = NDArray[Any]

# What jax writes into the logits that a mask hides.
JAX_HIDDEN = -0.7 * float(np.finfo(np.float32).max)

# Keywords that Hugging Face models hand to every attention function; the eager one ignores them.
_HF_IGNORED = frozenset(
    {
        "cache_position",
        "encoder_hidden_states",
        "is_causal",
        "output_attentions",
        "position_ids",
        "sliding_window",
        "use_cache",
    }
)


@dataclass(frozen=True)
class Convention:
    """Hold what one library means by attention.

    Attributes
    ----------
    name : str
        The key in ``sketchattn.conventions``.
    library, version, function : str
        What was read, which version of it, and the function with its signature.
    layout, out_layout : str
        Order of the axes of q, k and v, and of the output: batch, heads, n (tokens), d (width).
    causal : str
        Where the causal mask is anchored when ``n_q != n_k``: "top-left" sees ``j <= i``,
        "bottom-right" ``j <= i + n_k - n_q``; otherwise in words.
    window : str
        The sliding window, and where it is anchored.
    empty_row : {"zero", "mean"}
        Output of a row that sees no key: zeros, or the mean of V over all keys.
    lse_empty : float or None
        Logsumexp of such a row, None where the library does not return it.
    mask_plus_causal : str
        What becomes of a mask beside the causal flag.
    gqa : str
        How fewer key heads than query heads are asked for.
    dv : bool
        Whether the width of V may differ from that of Q and K.
    source : str
        Where it was read, or that it was measured.

    Examples
    --------
    >>> import sketchattn as sa
    >>> sa.conventions["jax"].empty_row, sa.conventions["flash"].causal
    ('mean', 'bottom-right')
    """

    name: str
    library: str
    version: str
    function: str
    layout: str
    out_layout: str
    causal: str
    window: str
    empty_row: str
    lse_empty: float | None
    mask_plus_causal: str
    gqa: str
    dv: bool
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, in order."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def conventions_table() -> str:
    """Return the records as a table in Markdown, a row each.

    Examples
    --------
    >>> [row.split("|")[1].split(":")[0].strip(" *") for row in conventions_table().splitlines()]
    ['', '---', 'torch', 'jax', 'onnx', 'flash', 'hf', 'sketchattn']
    """
    head = (
        "layout",
        "causal, n_q != n_k",
        "window",
        "row without a key",
        "its lse",
        "mask and causal",
        "GQA",
        "d_v != d",
    )
    lines = ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for x in conventions.values():
        layout = x.layout if x.layout == x.out_layout else f"{x.layout} in, {x.out_layout} out"
        cells = (
            f"**{x.name}**: {x.library} {x.version}",
            layout,
            x.causal,
            x.window,
            {"zero": "zeros", "mean": "mean of V over all keys"}[x.empty_row],
            "not returned" if x.lse_empty is None else f"{x.lse_empty:.3g}",
            x.mask_plus_causal,
            x.gqa,
            "yes" if x.dv else "no",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@without_floating_errors
def torch_attention(
    query: object,
    key: object,
    value: object,
    attn_mask: object = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    compute_dtype: Any = None,
) -> Array:
    """Compute ``torch.nn.functional.scaled_dot_product_attention`` on NumPy arrays.

    Parameters
    ----------
    query, key, value : array (..., h, n, d)
    attn_mask : array, optional
        Boolean (True = attend), float32 or of the dtype of ``query`` (added).
    dropout_p : float
        Must be 0.
    is_causal : bool
        Row i sees keys ``j <= i`` (top-left); not together with ``attn_mask``.
    scale : float, optional
        ``None`` is ``1/sqrt(d)``.
    enable_gqa : bool
        Allow fewer key heads; a single one is shared without it.
    compute_dtype : {None, numpy.float32, numpy.float64}
        See `sketchattn.attention`.
    """
    _no_dropout(dropout_p, "dropout_p")
    q, k, v = _arrays(query=query, key=key, value=value)
    mask = None
    if attn_mask is not None:
        if is_causal:
            raise ValueError(
                "attn_mask must be None when is_causal is True, got both; torch documents them as "
                "exclusive, put the causal part into the mask"
            )
        mask = as_array(attn_mask, "attn_mask")
        if mask.dtype.name not in ("bool", "float32", q.dtype.name):
            raise TypeError(
                f"attn_mask must be bool, float32 or {q.dtype.name} like query, got {mask.dtype}; "
                f"convert it"
            )
    shared = q.ndim > 2 and k.ndim > 2 and k.shape[-3] == 1
    return attention(
        q,
        k,
        v,
        scale=scale,
        causal="top-left" if is_causal else False,
        attn_mask=mask,
        enable_gqa=bool(enable_gqa) or shared,
        compute_dtype=compute_dtype,
    )


@without_floating_errors
def jax_attention(
    query: object,
    key: object,
    value: object,
    bias: object = None,
    mask: object = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: object = None,
    key_value_seq_lengths: object = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    compute_dtype: Any = None,
) -> Any:
    """Compute ``jax.nn.dot_product_attention`` on NumPy arrays.

    Parameters
    ----------
    query, key, value : array (batch, n, h, d) or (n, h, d)
    bias : float array, optional
        Broadcastable to (batch, h, n_q, n_k); added.
    mask : bool array, optional
        Likewise; True = attend.
    scale : float, optional
        ``None`` is ``1/sqrt(d)``.
    is_causal : bool
        Row i sees keys ``j <= i`` (top-left).
    query_seq_lengths, key_value_seq_lengths : int array (batch,), optional
        Rows beyond the length are zero; keys beyond it are hidden.
    local_window_size : int or (int, int), optional
        Row i sees ``i - left <= j <= i + right``; an integer is both sides.
    implementation : None or {"xla", "cudnn"}
        Has no influence.
    return_residual : bool
        Return the logsumexp (batch, n_q, h) too.
    compute_dtype : {None, numpy.float32, numpy.float64}
        See `sketchattn.attention`.
    """
    q, k, v = _arrays(query=query, key=key, value=value)
    if q.ndim not in (3, 4):
        raise ValueError(f"query must have 3 or 4 axes, got shape {q.shape}; see the layout")
    if v.shape != k.shape:
        raise ValueError(f"value must have the shape {k.shape} of key, got {v.shape}; jax needs it")
    added = None if bias is None else as_array(bias, "bias")
    if mask is not None:
        shown = as_array(mask, "mask")
        if shown.dtype != np.bool_:
            raise ValueError(f"mask must be bool, got {shown.dtype}; pass additive ones as bias")
        added = shown if added is None else np.where(shown, added, added.dtype.type(-np.inf))
    batched = q.ndim == 4
    q, k, v = (np.swapaxes(x, -2, -3) for x in (q, k, v))
    lengths = [
        None if x is None else as_array(x, name)
        for name, x in (
            ("query_seq_lengths", query_seq_lengths),
            ("key_value_seq_lengths", key_value_seq_lengths),
        )
    ]
    valid = [
        None if x is None else np.arange(n) < x.reshape(-1, 1)
        for n, x in zip((q.shape[-2], k.shape[-2]), lengths, strict=True)
    ]
    if not batched:
        valid = [None if x is None else x[0] for x in valid]
        added = added[0] if added is not None and added.ndim == 4 else added
    window = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
    out, lse = attention(
        q,
        k,
        v,
        scale=scale,
        causal="top-left" if is_causal else False,
        key_mask=valid[1],
        attn_mask=added,
        window=(-1, -1) if window is None else (window[0], window[1]),
        enable_gqa=True,
        compute_dtype=compute_dtype,
        return_lse=True,
    )
    empty = np.isneginf(lse)
    rows = valid[0]
    if rows is not None:  # a row beyond the length sees no key
        empty = empty | ~np.broadcast_to(rows[..., None, :], empty.shape)
    out = with_means(out, empty, v)
    if rows is not None:
        out = np.where(np.expand_dims(rows, (-3, -1)), out, out.dtype.type(0))
    out = np.swapaxes(out, -2, -3)
    if not return_residual:
        return out
    return out, round_to(np.swapaxes(np.where(empty, JAX_HIDDEN, lse), -1, -2), q.dtype)


@without_floating_errors
def onnx_attention(
    Q: object,
    K: object,
    V: object,
    attn_mask: object = None,
    past_key: object = None,
    past_value: object = None,
    nonpad_kv_seqlen: object = None,
    *,
    is_causal: int = 0,
    q_num_heads: int | None = None,
    kv_num_heads: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    left_window_size: int = -1,
    right_window_size: int = -1,
    compute_dtype: Any = None,
) -> Array:
    """Compute the output Y of the ONNX operator Attention on NumPy arrays.

    Parameters
    ----------
    Q, K, V : array (batch, h, n, d), or packed (batch, n, h d)
        Packed ones need ``q_num_heads`` and ``kv_num_heads``.
    attn_mask : array, optional
        Boolean (True = attend) or added; one that is shorter than the keys hides the others.
    past_key, past_value : array (batch, h_kv, past, d), optional
        Keys and values in front; queries begin behind them.
    nonpad_kv_seqlen : int array (batch,), optional
        Keys beyond the length are hidden, and the last query is at its end.
    is_causal : int
        Nonzero: the query at position p sees ``j <= p``.
    q_num_heads, kv_num_heads : int, optional
        Heads of packed inputs.
    scale : float, optional
        ``None`` is ``1/sqrt(d)``.
    softcap : float
        0 is off.
    softmax_precision : int, optional
        Has no influence: the softmax is at least that precise.
    left_window_size, right_window_size : int
        The query at position p sees ``p - left <= j <= p + right``; -1 is unbounded.
    compute_dtype : {None, numpy.float32, numpy.float64}
        See `sketchattn.attention`.
    """
    q, k, v = _arrays(Q=Q, K=K, V=V)
    packed = q.ndim == 3
    if packed:
        if q_num_heads is None or kv_num_heads is None:
            raise ValueError(
                f"q_num_heads and kv_num_heads must be given for packed inputs, got "
                f"{q_num_heads!r} and {kv_num_heads!r}; say how many heads there are"
            )
        q, k, v = (
            np.swapaxes(x.reshape(*x.shape[:2], h, -1), 1, 2)
            for x, h in ((q, q_num_heads), (k, kv_num_heads), (v, kv_num_heads))
        )
    elif q.ndim != 4 or q_num_heads is not None or kv_num_heads is not None:
        raise ValueError(
            f"q_num_heads and kv_num_heads must be given for inputs with 3 axes and only for "
            f"them, got {q_num_heads!r} and {kv_num_heads!r} for shape {q.shape}; see the layout"
        )
    k, v, offset, keys, mask = onnx_operands(
        q,
        k,
        v,
        None if attn_mask is None else as_array(attn_mask, "attn_mask"),
        None if past_key is None else as_array(past_key, "past_key"),
        None if past_value is None else as_array(past_value, "past_value"),
        None if nonpad_kv_seqlen is None else as_array(nonpad_kv_seqlen, "nonpad_kv_seqlen"),
    )
    out = attention(
        q,
        k,
        v,
        scale=scale,
        causal=bool(is_causal) and "top-left",
        offset=offset,
        key_mask=keys,
        attn_mask=mask,
        softcap=softcap,
        window=(left_window_size, right_window_size),
        enable_gqa=True,
        compute_dtype=compute_dtype,
    )
    return np.swapaxes(out, 1, 2).reshape(len(q), q.shape[2], -1) if packed else out


def onnx_operands(
    q: Array,
    k: Array,
    v: Array,
    attn_mask: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    nonpad_kv_seqlen: Array | None = None,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Return keys, values, positions of query 0, key mask and mask of the operator Attention.

    Heads are unpacked, (batch, h, n, d); positions int64 (batch,), the key mask (batch, n_k).
    """
    if (past_key is None) != (past_value is None):
        raise ValueError("past_key and past_value must be given together, got one; pass both")
    offset = np.zeros(len(q), np.int64)
    if past_key is not None and past_value is not None:
        if nonpad_kv_seqlen is not None:
            raise ValueError("nonpad_kv_seqlen must be None beside past_key, got both; drop one")
        k, v = np.concatenate([past_key, k], axis=2), np.concatenate([past_value, v], axis=2)
        offset += past_key.shape[2]
    n_k, keys = k.shape[2], None
    if nonpad_kv_seqlen is not None:
        valid = nonpad_kv_seqlen.reshape(len(q)).astype(np.int64)
        offset = valid - q.shape[2]
        keys = np.arange(n_k) < valid[:, None]
    mask = attn_mask
    if mask is not None and mask.shape[-1] < n_k:  # padded, never broadcast along the keys
        fill = mask.dtype.type(0 if mask.dtype == np.bool_ else -np.inf)
        pad = np.full((*mask.shape[:-1], n_k - mask.shape[-1]), fill, mask.dtype)
        mask = np.concatenate([mask, pad], axis=-1)
    return k, v, offset, keys, mask


@without_floating_errors
def flash_attention(
    q: object,
    k: object,
    v: object,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: object = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    compute_dtype: Any = None,
) -> Any:
    """Compute ``flash_attn_func`` of FlashAttention 2 on NumPy arrays.

    Parameters
    ----------
    q, k, v : array (batch, n, h, d)
    dropout_p : float
        Must be 0.
    softmax_scale : float, optional
        ``None`` is ``1/sqrt(d)``.
    causal : bool
        Row i sees keys ``j <= i + n_k - n_q`` (bottom-right).
    window_size : (int, int)
        Row i sees ``i + n_k - n_q - left <= j <= i + n_k - n_q + right``; -1 is unbounded.
    softcap : float
        0 is off.
    alibi_slopes : array (h,) or (batch, h), optional
        Adds ``-slope |i + n_k - n_q - j|`` to the logits.
    deterministic : bool
        Has no influence.
    return_attn_probs : bool
        Return the output, the logsumexp (batch, h, n_q) and None, as probabilities are not made.
    compute_dtype : {None, numpy.float32, numpy.float64}
        See `sketchattn.attention`.
    """
    _no_dropout(dropout_p, "dropout_p")
    query, key, value = _arrays(q=q, k=k, v=v)
    if query.ndim != 4:
        raise ValueError(f"q must be (batch, n, h, d), got shape {query.shape}; add axes")
    query, key, value = (np.swapaxes(x, 1, 2) for x in (query, key, value))
    n_q, n_k = query.shape[2], key.shape[2]
    bias = None
    if alibi_slopes is not None:
        distance = np.abs(np.arange(n_q)[:, None] + (n_k - n_q) - np.arange(n_k))
        slopes = as_array(alibi_slopes, "alibi_slopes").astype(np.float64)
        bias = -slopes[..., None, None] * distance
    out, lse = attention(
        query,
        key,
        value,
        scale=softmax_scale,
        causal="bottom-right" if causal else False,
        offset=n_k - n_q,
        attn_mask=bias,
        window=window_size,
        softcap=softcap,
        enable_gqa=True,
        compute_dtype=compute_dtype,
        return_lse=True,
    )
    out = np.swapaxes(out, 1, 2)
    return (out, np.where(np.isneginf(lse), np.inf, lse), None) if return_attn_probs else out


@without_floating_errors
def hf_attention(
    module: object,
    query: object,
    key: object,
    value: object,
    attention_mask: object = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    softcap: float | None = None,
    s_aux: object = None,
    position_bias: object = None,
    compute_dtype: Any = None,
    **others: Any,
) -> tuple[Array, None]:
    """Compute ``eager_attention_forward`` of Hugging Face models on NumPy arrays.

    Parameters
    ----------
    module : object
        Not read.
    query, key, value : array (batch, h, n, d)
        Key heads are not repeated.
    attention_mask : float array, optional
        Broadcastable to (batch, h, n_q, n_k) and added: 0, or the lowest finite number where a
        key is hidden.  It alone says what is causal.
    scaling : float, optional
        ``None`` is ``1/sqrt(d)``.
    dropout : float
        Must be 0.
    softcap : float, optional
        Caps the logits.
    s_aux : array (h,), optional
        An extra logit of each head, without a value.
    position_bias : array, optional
        Added to the logits too.
    compute_dtype : {None, numpy.float32, numpy.float64}
        See `sketchattn.attention`.
    **others
        What models hand to every attention function, and the eager one ignores.

    Returns
    -------
    out : ndarray (batch, n_q, h, d_v)
    weights : None
        They are not made.
    """
    _no_dropout(dropout, "dropout")
    for name, given in others.items():
        if given is not None and name not in _HF_IGNORED:
            raise TypeError(f"{name} must be left out, got {given!r}; eager attention lacks it")
    q, k, v = _arrays(query=query, key=key, value=value)
    bias = None
    for name, x in (("attention_mask", attention_mask), ("position_bias", position_bias)):
        if x is None:
            continue
        part = as_array(x, name)
        if part.dtype == np.bool_ or np.issubdtype(part.dtype, np.integer):
            raise TypeError(f"{name} must be floating point, got {part.dtype}; it is added")
        # In double precision the lowest number of a narrower type can be added to another.
        bias = part if bias is None else bias.astype(np.float64) + part.astype(np.float64)
    out = attention(
        q,
        k,
        v,
        scale=scaling,
        attn_mask=bias,
        softcap=softcap or 0.0,
        sink=None if s_aux is None else as_array(s_aux, "s_aux"),
        enable_gqa=True,
        compute_dtype=compute_dtype,
    )
    return np.swapaxes(out, 1, 2), None


def _no_dropout(value: object, name: str) -> None:
    if value != 0.0:
        raise ValueError(f"{name} must be 0, got {value!r}; weights are those of inference")


def _arrays(**named: object) -> list[Array]:
    return [as_array(x, name) for name, x in named.items()]


def with_means(out: Array, empty: Array, v: Array) -> Array:
    """Return the output (..., h, n_q, d_v) with the mean of V in rows that see no key."""
    if not empty.any() or not v.shape[-2]:
        return out
    mean = round_to(v.astype(np.float64).mean(axis=-2, keepdims=True), out.dtype)
    mean = np.repeat(mean, out.shape[-3] // v.shape[-3], axis=-3)
    return np.where(empty[..., None], mean, out)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch": torch_attention,
    "jax": jax_attention,
    "onnx": onnx_attention,
    "flash": flash_attention,
    "hf": hf_attention,
    "sketchattn": attention,
}

conventions: Mapping[str, Convention] = MappingProxyType(
    {
        x.name: x
        for x in (
            Convention(
                name="torch",
                library="torch",
                version="2.13",
                function=(
                    "torch.nn.functional.scaled_dot_product_attention(query, key, value, "
                    "attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False)"
                ),
                layout="BHND",
                out_layout="BHND",
                causal="top-left",
                window="none",
                empty_row="zero",
                lse_empty=None,
                mask_plus_causal="documented as an error; CPU backends but MATH intersect them",
                gqa="enable_gqa=True; a single key head is shared without it",
                dv=True,
                source="measured on the CPU; a row whose mask is finfo.min is the mean of V",
            ),
            Convention(
                name="jax",
                library="jax",
                version="0.10.2",
                function=(
                    "jax.nn.dot_product_attention(query, key, value, bias=None, mask=None, *, "
                    "scale=None, is_causal=False, query_seq_lengths=None, "
                    "key_value_seq_lengths=None, local_window_size=None, implementation=None, "
                    "return_residual=False)"
                ),
                layout="BNHD",
                out_layout="BNHD",
                causal="top-left",
                window="(left, right), top-left; an integer is both sides",
                empty_row="mean",
                lse_empty=JAX_HIDDEN,
                mask_plus_causal="intersected",
                gqa="by the numbers of heads",
                dv=False,
                source="measured; jax/_src/nn/functions.py",
            ),
            Convention(
                name="onnx",
                library="ONNX Attention",
                version="opsets 23 to 25",
                function=(
                    "Attention(Q, K, V, attn_mask, past_key, past_value, nonpad_kv_seqlen; "
                    "is_causal, q_num_heads, kv_num_heads, scale, softcap, softmax_precision, "
                    "left_window_size, right_window_size)"
                ),
                layout="BHND",
                out_layout="BHND",
                causal="offset 0, or the past length, or nonpad_kv_seqlen - n_q",
                window="(left, right), with the same offset",
                empty_row="zero",
                lse_empty=None,
                mask_plus_causal="intersected",
                gqa="by the numbers of heads",
                dv=True,
                source="measured with onnx 1.23; onnx/reference/ops/op_attention.py",
            ),
            Convention(
                name="flash",
                library="FlashAttention",
                version="2.1 and later",
                function=(
                    "flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, "
                    "window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
                    "return_attn_probs=False)"
                ),
                layout="BNHD",
                out_layout="BNHD",
                causal="bottom-right",
                window="(left, right), bottom-right",
                empty_row="zero",
                lse_empty=math.inf,
                mask_plus_causal="no mask",
                gqa="by the numbers of heads",
                dv=True,
                source=(
                    "published: Dao-AILab/flash-attention, README section 2.1 and "
                    "csrc/flash_attn/src/softmax.h; version 3 returns -inf for the lse"
                ),
            ),
            Convention(
                name="hf",
                library="transformers, eager",
                version="5.24",
                function=(
                    "eager_attention_forward(module, query, key, value, attention_mask, "
                    "scaling=None, dropout=0.0, **kwargs)"
                ),
                layout="BHND",
                out_layout="BNHD",
                causal="by the mask",
                window="by the mask",
                empty_row="mean",
                lse_empty=None,
                mask_plus_causal="the mask holds both",
                gqa="by the numbers of heads",
                dv=True,
                source="measured; masks hold the lowest finite number",
            ),
            Convention(
                name="sketchattn",
                library="sketchattn",
                version="this one",
                function=(
                    "sketchattn.attention(q, k, v, *, scale=None, causal=False, offset=None, "
                    "key_mask=None, attn_mask=None, softcap=0.0, window=(-1, -1), sink=None, "
                    "enable_gqa=False, return_lse=False)"
                ),
                layout="BHND",
                out_layout="BHND",
                causal="named by the caller",
                window="(left, right), with the offset of the causal mask",
                empty_row="zero",
                lse_empty=-math.inf,
                mask_plus_causal="intersected",
                gqa="enable_gqa=True",
                dv=True,
                source="sketchattn.attention",
            ),
        )
    }
)


def as_convention(name: str) -> Callable[..., Any]:
    """Return attention with the signature and the meaning of another library, on NumPy arrays.

    The numbers are those of `sketchattn.attention`; a keyword ``compute_dtype=numpy.float64``
    beside the library's own asks for reference grade.

    Parameters
    ----------
    name : {"torch", "jax", "onnx", "flash", "hf", "sketchattn"}
        A key of ``sketchattn.conventions``.

    Returns
    -------
    callable
        Takes the arguments of ``sketchattn.conventions[name].function``.

    Raises
    ------
    ValueError, TypeError
        For an unknown name; the function raises for what the library refuses, for dropout, and
        for what `sketchattn.attention` refuses.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> q = np.ones((1, 2, 1, 4))  # batch, tokens, heads, width
    >>> k = v = np.ones((1, 5, 1, 4))
    >>> sa.as_convention("flash")(q, k, v, causal=True).shape
    (1, 2, 1, 4)
    """
    return _FUNCTIONS[check_name(name, "convention", tuple(_FUNCTIONS))]
