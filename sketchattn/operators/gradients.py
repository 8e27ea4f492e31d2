"""The vector-Jacobian product of exact attention in double precision, written to be read.

With the weights ``A`` and the logits of ``operators.reference``, the cotangent ``G`` (n_q, d_v) of
the output, and ``C`` the logits after the softcap and before the bias::

    dV    = A^T G                                   1.
    dA_ij = G_i . v_j                               2. where j is visible
    delta_i = sum_j A_ij dA_ij                      3. = G_i . O_i
    dL_ij = A_ij (dA_ij - delta_i)                  4. the gradient of the bias
    dS_ij = dL_ij (1 - (C_ij / softcap)^2)          5. dL without a softcap
    dQ    = scale dS K                              6.
    dK    = scale dS^T Q                            7.
    dsink = -sum_i exp(sink - lse_i) delta_i        8.

Query heads that share a key head add their dK and dV.  Blocks of query rows are added in their
order, so the bits do not depend on the number of threads; n_q x n_k is never held.

The functions take arguments that `sketchattn.attention_vjp` has validated; they check nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .reference import (
    BoolArray,
    FloatArray,
    IntArray,
    Mask,
    block_logits,
    block_rows,
    in_order,
    masked_logits,
    softmax_rows,
    weighted_values,
)


class Gradients(NamedTuple):
    """Hold what a cotangent of the output becomes at each argument, heads flat.

    ``q (H, n_q, d)``, ``k (H_kv, n_k, d)``, ``v (H_kv, n_k, d_v)``, ``sink (H,)`` or None where
    there is none, ``bias`` of the shape that was asked for, or None; and ``lse (H, n_q)``, the
    log-sum-exp of the logits.
    """

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    sink: NDArray[Any] | None
    bias: NDArray[Any] | None
    lse: NDArray[Any]


def reference_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    cotangent: FloatArray,
    *,
    group: int,
    scale: float,
    first: IntArray,
    left: int | None,
    right: int | None,
    softcap: float,
    key_mask: BoolArray | None,
    key_slab: IntArray | None,
    mask: Mask | None,
    mask_slab: IntArray | None,
    sink: FloatArray | None,
    bias_shape: tuple[int, int, int] | None = None,
    bias_slab: IntArray | None = None,
) -> Gradients:
    """Return the gradients of ``sum(cotangent * O)`` for exact attention ``O``, in float64.

    Parameters
    ----------
    q, k, v, group, scale, first, left, right, softcap, key_mask, key_slab, mask, mask_slab, sink
        As for ``reference_attention``.
    cotangent : float64 array of shape (H, n_q, d_v)
        Weights of the output's entries in the scalar that is differentiated.
    bias_shape : (M, n_q or 1, n_k or 1), optional
        Shape of the gradient of the bias; axes of length 1 are summed.  None: not computed.
    bias_slab : int64 array of shape (H,), optional
        The slab that each head adds its bias gradient to.

    Notes
    -----
    A key or value outside the visible set of a row, and the cotangent of a row outside the rows
    that see a key, are not read: NaN or infinities there do not reach the other's gradient.

    Examples
    --------
    >>> one, zero = np.ones((1, 2, 1)), np.zeros(1, dtype=np.int64)
    >>> found = reference_vjp(
    ...     one, one, np.array([[[1.0], [2.0]]]), one, group=1, scale=1.0, first=zero, left=None,
    ...     right=0, softcap=0.0, key_mask=None, key_slab=None, mask=None, mask_slab=None,
    ...     sink=None)
    >>> found.v[0, :, 0], found.k[0, :, 0]
    (array([1.5, 0.5]), array([-0.25,  0.25]))
    """
    q, k, v, cotangent = (np.ascontiguousarray(x) for x in (q, k, v, cotangent))
    heads, n_q, _ = q.shape
    n_k = k.shape[1]
    d_q, d_k, d_v = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
    lse = np.empty((heads, n_q))
    d_sink = None if sink is None else np.zeros_like(sink)
    d_bias = None if bias_shape is None else np.zeros(bias_shape)
    step = block_rows(n_k)

    def block(task: tuple[int, int]) -> tuple[FloatArray, FloatArray, float, FloatArray]:
        h, start = task
        stop = min(start + step, n_q)
        rows, k_h, v_h, g = q[h, start:stop], k[h // group], v[h // group], cotangent[h, start:stop]
        seen, logits = block_logits(
            rows,
            k_h,
            h,
            start,
            scale=scale,
            first=first,
            left=left,
            right=right,
            softcap=softcap,
            key_mask=key_mask,
            key_slab=key_slab,
            mask=mask,
            mask_slab=mask_slab,
        )
        top = None if sink is None else float(sink[h])
        weights, lse[h, start:stop] = softmax_rows(logits, seen, top)
        values = weighted_values(weights.T, seen.T, g)
        with np.errstate(all="ignore"):
            d_weights = np.where(seen, g @ v_h.T, 0.0)
            delta = (weights * d_weights).sum(axis=1)
            d_logits = np.where(seen, weights * (d_weights - delta[:, None]), 0.0)
            d_top = 0.0 if top is None else -float(np.exp(top - lse[h, start:stop]) @ delta)
            d_products = d_logits
            if softcap != 0.0:
                capped = masked_logits(rows, k_h, scale=scale, softcap=softcap, stage="capped")
                slope = 1.0 - (capped / softcap) ** 2
                d_products = np.where(seen, d_logits * slope, 0.0)
            d_q[h, start:stop] = scale * weighted_values(d_products, seen, k_h)
            return scale * (d_products.T @ rows), values, d_top, d_logits

    tasks = [(h, i) for h in range(heads) for i in range(0, n_q, step)]
    for task, (keys, values, top, d_logits) in zip(
        tasks, in_order(block, tasks, 48 * step * n_k), strict=True
    ):
        h, start = task
        d_k[h // group] += keys
        d_v[h // group] += values
        if d_sink is not None:
            d_sink[h] += top
        if d_bias is not None and bias_slab is not None:
            _add_bias(d_bias[bias_slab[h]], d_logits, start)
    return Gradients(d_q, d_k, d_v, d_sink, d_bias, lse)


def _add_bias(total: FloatArray, d_logits: FloatArray, start: int) -> None:
    """Add the rows from ``start`` to a slab, summed over its axes of length 1."""
    if total.shape[1] == 1:
        d_logits = d_logits.sum(axis=1, keepdims=True)
    if total.shape[0] == 1:
        total += d_logits.sum(axis=0, keepdims=True)
    else:
        total[start : start + len(d_logits)] += d_logits
