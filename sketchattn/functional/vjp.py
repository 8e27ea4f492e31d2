"""``attention_vjp``: the gradients of exact attention, for any number of heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import Causal, as_array, check_flag, float_dtype
from ..base.floating import without_floating_errors
from ..operators.gradients import Gradients, reference_vjp
from ..operators.reference import round_to
from .call import Call, check_call
from .exact import arrays, check_sums, exact
from .steep import may_be_steep

Array = NDArray[Any]


@without_floating_errors
def attention_vjp(
    q: object,
    k: object,
    v: object,
    cotangent: object,
    *,
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
    return_bias: bool = False,
    return_sink: bool = False,
) -> tuple[Array, ...]:
    """Compute the gradients of ``sum(cotangent * attention(q, k, v))``, which is exact attention.

    The vector-Jacobian product: with the weights ``A``, the cotangent ``G`` and the output ``O``::

        dV = A^T G                  dL_ij = A_ij (G_i . v_j - G_i . O_i)
        dbias = dL                  dS = dL (1 - tanh(S / softcap)^2),  S = scale Q K^T
        dQ = scale dS K             dK = scale dS^T Q

    and ``dS = dL`` without a softcap.  Query heads that share a key head add their dK and dV.

    Parameters
    ----------
    q, k, v
        As for ``attention``.
    cotangent : array (..., h, n_q, d_v)
        Derivative of a scalar by each entry of the output; any floating point.
    scale, causal, offset, key_mask, attn_mask, softcap, window, sink, enable_gqa
        As for ``attention``.
    compute_dtype : {None, numpy.float32, numpy.float64}
        None computes float32 and halves in float32 and float64 in float64, fast.
        ``float64`` is reference grade: inputs widened exactly, plain float64 arithmetic, one
        rounding at the end.
    return_bias : bool
        Return the gradient of a floating-point ``attn_mask`` too.
    return_sink : bool
        Return the gradient of ``sink`` too.

    Returns
    -------
    dq : ndarray (..., h, n_q, d)
        In the dtype of ``q``, and so are ``dk`` and ``dv``.  Zero in rows that see no key.
    dk : ndarray (..., h_kv, n_k, d)
    dv : ndarray (..., h_kv, n_k, d_v)
        Zero for keys that no query sees.
    dbias : ndarray
        Only with ``return_bias``: of the shape and dtype of ``attn_mask``, summed over the axes
        that were broadcast, zero where it is -inf.
    dsink : ndarray (h,)
        Only with ``return_sink``: in the dtype of ``sink``, summed over the batch.

    Raises
    ------
    ValueError, TypeError
        For everything that ``attention`` refuses, a cotangent of another shape, and a gradient
        that is asked for of a mask or a sink that has none.

    Notes
    -----
    Nothing of size n_q x n_k is held, but for the gradient of a bias of that size.  The bits do
    not depend on the number of threads.  Keys and values that are hidden from a row do not reach
    its gradient, whatever they hold; a cotangent that is not finite reaches the keys that its row
    sees.  Formulas: Dao et al., FlashAttention (2022), appendix B.4.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> x = np.random.default_rng(0).standard_normal((2, 3, 5, 4))
    >>> dq, dk, dv = sa.attention_vjp(x, x, x, np.ones_like(x), causal=True)
    >>> np.allclose(dv.sum(axis=-2), 5)  # the weights of every query sum to 1
    True
    """
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
        return_lse=False,
    )
    bias = _differentiable(attn_mask, "attn_mask", return_bias, "return_bias")
    sinks = _differentiable(sink, "sink", return_sink, "return_sink")
    found = exact_vjp(call, _check_cotangent(cotangent, call), None if bias is None else bias.shape)
    results = [
        shaped(flat, x) for flat, x in ((found.q, call.q), (found.k, call.k), (found.v, call.v))
    ]
    if bias is not None and found.bias is not None:
        results.append(shaped(found.bias, bias))
    if sinks is not None and found.sink is not None:
        results.append(shaped(found.sink, sinks))
    return tuple(results)


def shaped(gradient: Array, argument: Array) -> Array:
    """Return a gradient in the shape of its argument, rounded once to its dtype."""
    return round_to(gradient, argument.dtype.newbyteorder("=")).reshape(argument.shape)


def exact_vjp(
    call: Call,
    cotangent: Array,
    bias_shape: tuple[int, ...] | None = None,
    forward: tuple[Array, Array] | None = None,
) -> Gradients:
    """Return the gradients of flat heads for a cotangent (..., n_q, d_v), in ``call.computing``.

    That of the sink is (h,), summed over the batch.  ``bias_shape`` is the shape of ``attn_mask``,
    and None leaves its gradient out; ``forward`` is what ``exact`` returned for this call, if it
    is known.
    """
    found = _flat_vjp(call, cotangent, bias_shape, forward)
    if found.sink is None:
        return found
    return found._replace(sink=found.sink.reshape((-1, call.layout.h)).sum(axis=0))


def _flat_vjp(
    call: Call,
    cotangent: Array,
    bias_shape: tuple[int, ...] | None,
    forward: tuple[Array, Array] | None,
) -> Gradients:
    """Return ``exact_vjp``, but the gradient of the sink of each flat head."""
    layout, terms = call.layout, call.terms
    flat = arrays(call)
    q, k, v, clean, most = flat
    g = layout.flatten(cotangent, call.computing)
    slabs: dict[str, Any] = {}
    if bias_shape is not None:
        shape = (1,) * (2 - len(bias_shape)) + bias_shape
        of_head = layout.slab_of_head(shape[:-2])
        slabs = {
            "bias_shape": (int(np.prod(shape[:-2], dtype=np.int64)), *shape[-2:]),
            "bias_slab": of_head,
        }
    if not call.reference:
        out, lse = exact(call, flat) if forward is None else forward
        # Weights of kernels are exp(L - lse), which large logits round away.
        if clean and np.isfinite(g).all() and not may_be_steep(lse, q, k, terms, most).any():
            from ..kernels.gradients import softmax_gradients  # loads the compiler

            return Gradients(*softmax_gradients(q, k, v, g, out, lse, **vars(terms), **slabs), lse)
    q, k, v, g = (x.astype(np.float64, copy=False) for x in (q, k, v, g))
    sink = None if terms.sink is None else terms.sink.astype(np.float64)
    found = reference_vjp(q, k, v, g, **vars(replace(terms, sink=sink)), **slabs)
    if call.reference and clean:
        check_sums(call, found.lse)
    if call.computing == np.float64:
        return found
    return Gradients(*(None if x is None else x.astype(call.computing) for x in found))  # type: ignore[arg-type]  # None stays None


def _check_cotangent(cotangent: object, call: Call) -> Array:
    """Return a cotangent of the shape of the output."""
    x = as_array(cotangent, "cotangent")
    float_dtype(x, "cotangent")
    shape = (*call.layout.lead, call.layout.n_q, call.layout.d_v)
    if x.shape != shape:
        raise ValueError(
            f"cotangent must have the shape {shape} of the output, got {x.shape}; "
            f"broadcast it first"
        )
    return x


def _differentiable(argument: object, name: str, wanted: object, flag: str) -> Array | None:
    """Return the argument whose gradient is wanted, and None if none is."""
    if not check_flag(wanted, flag):
        return None
    if argument is None:
        raise ValueError(f"{flag} must be False without {name}, got True; pass {name}")
    x = as_array(argument, name)
    if x.dtype == np.bool_:
        raise ValueError(
            f"{name} must be floating point for {flag}=True, got bool; "
            f"a mask that only hides has no gradient"
        )
    return x
