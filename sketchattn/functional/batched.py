"""``attention``: many heads, batches, grouped keys and masks in, one output out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from numpy.typing import ArrayLike, NDArray

from ..base.arguments import Causal, check_flag
from ..base.draws import Draw, Rng
from ..base.floating import without_floating_errors
from .approximate import approximate, approximate_with_lse, check_approximate, draws_of
from .call import check_call
from .checks import check_foreign
from .exact import check_exact, exact, is_exact

if TYPE_CHECKING:
    from ..zoo.base import Method

Array = NDArray[Any]


@overload
def attention(
    q: object,
    k: object,
    v: object,
    method: str | type[Method] | Method = ...,
    *,
    rng: Rng = ...,
    draw: Mapping[str, Any] | list[Any] | tuple[Any, ...] | None = ...,
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
    return_draws: Literal[False] = ...,
    **parameters: Any,
) -> Array: ...


@overload
def attention(
    q: object,
    k: object,
    v: object,
    method: str | type[Method] | Method = ...,
    *,
    rng: Rng = ...,
    draw: Mapping[str, Any] | list[Any] | tuple[Any, ...] | None = ...,
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
    return_draws: Literal[False] = ...,
    **parameters: Any,
) -> tuple[Array, Array]: ...


@overload
def attention(
    q: object,
    k: object,
    v: object,
    method: str | type[Method] | Method = ...,
    *,
    rng: Rng = ...,
    draw: Mapping[str, Any] | list[Any] | tuple[Any, ...] | None = ...,
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
    return_lse: bool = ...,
    return_draws: Literal[True],
    **parameters: Any,
) -> tuple[Any, ...]: ...


@without_floating_errors
def attention(
    q: object,
    k: object,
    v: object,
    method: str | type[Method] | Method = "exact",
    *,
    rng: Rng = None,
    draw: Mapping[str, Any] | list[Any] | tuple[Any, ...] | None = None,
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
    return_draws: bool = False,
    **parameters: Any,
) -> Array | tuple[Any, ...]:
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
    method : str, class or Method, default "exact"
        A registered name or a class, whose parameters follow as keywords (``rank=64``), or an
        object.
    rng : None, int or numpy.random.Generator
        Randomness of the method.  For (n_q, d) it is handed to the method; otherwise each
        (batch, head) has a stream of its own, which depends on neither the number of heads nor
        the number of threads.
    draw : mapping or list of mappings, optional
        Instead of ``rng``: one draw used for every head, or one for each (batch, head) in order.
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
        None computes float32 and halves in float32 and float64 in float64, fast; rows with
        logits that may exceed 4096 in size, always in float64.
        ``float64`` is reference grade: inputs widened exactly, plain float64 arithmetic, one
        rounding at the end.
    return_lse : bool
        Return the logsumexp of each row too; of a method that approximates, its own, where
        ``traits.logsumexp`` says that it has one.
    return_draws : bool
        Return the draws of the heads too, last.
    **parameters
        Parameters of the method.

    Returns
    -------
    out : ndarray (..., h, n_q, d_v)
        In the dtype of ``q``; float32 for tensors in bfloat16, which NumPy does not have.  Rows
        that see no key are zero.
    lse : ndarray (..., h, n_q)
        Only with ``return_lse``: in the computing precision, -inf for a row that sees no key.
    draws : list of Draw
        Only with ``return_draws``: one for each (batch, head) in order, empty for "exact"; the
        origin of each says which, and the seed.

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
    check_foreign(parameters)
    return_draws = check_flag(return_draws, "return_draws", "give True or False")
    call = check_call(
        q,
        k,
        v,
        scale=scale,
        causal=causal,
        offset=offset,
        key_mask=key_mask,
        attn_mask=attn_mask,
        softcap=softcap,
        window=window,
        sink=sink,
        enable_gqa=enable_gqa,
        compute_dtype=compute_dtype,
        return_lse=return_lse,
    )
    if is_exact(method):
        check_exact(method, parameters, rng, draw)
        found = call.finish(*exact(call))
        if not return_draws:
            return found
        heads = call.layout.entries * call.layout.h
        return (*(found if return_lse else (found,)), [Draw() for _ in range(heads)])
    from ..zoo.base import make_method  # loads scikit-learn, which exact attention does without

    chosen = make_method(method, parameters)
    run = approximate_with_lse if return_lse else approximate
    if not return_draws:
        return run(call, chosen, rng, draw)
    check_approximate(call, chosen, rng, draw)
    draws = draws_of(call, chosen, rng, draw)
    found = run(call, chosen, None, [dict(x) for x in draws])
    return (*(found if return_lse else (found,)), draws)
