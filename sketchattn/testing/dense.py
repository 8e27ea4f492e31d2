"""One attention problem of all heads, and its answer with the whole matrix: for small sizes only.

The truth of a check is `sketchattn.attention` in reference grade.  What is here says the same in
one line a step, so that a wrong program is the right one with one part replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Product = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Parts:
    """Hold what one output is made of; key heads are repeated, one for each query head.

    Attributes
    ----------
    q, k, v : array (B, H, n, d)
    scale, softcap : float
        A softcap of 0 is off.
    bias : array broadcastable to (B, H, n_q, n_k), or None
        Finite; what it hides is in ``seen``.
    seen : bool array (B, H, n_q, n_k)
    sink : array (H,) or None
    empty_row : {"zero", "mean"}
        What a row without a key returns.
    """

    q: Array
    k: Array
    v: Array
    scale: float
    softcap: float
    bias: Array | None
    seen: Array
    sink: Array | None
    empty_row: str


def in_sequence(a: Array, b: Array, stride: int = 1) -> Array:
    """Return ``a b`` with sums one after the other, as ``np.matmul`` does not have them.

    Every ``stride``-th term comes first, then those beside them; a negative one begins at the end.
    """
    total = np.zeros((*a.shape[:-1], b.shape[-1]), a.dtype)
    terms = np.arange(a.shape[-1])[:: 1 if stride > 0 else -1]
    for t in np.concatenate([terms[start :: abs(stride)] for start in range(abs(stride))]):
        total += a[..., t, None] * b[..., None, t, :]
    return total


def scaled_logits(p: Parts, multiply: Product = np.matmul) -> Array:
    """Return ``scale Q K^T``, without softcap and bias."""
    products: Array = multiply(p.q, np.swapaxes(p.k, -1, -2))
    products *= products.dtype.type(p.scale)
    return products


def logits(p: Parts, multiply: Product = np.matmul) -> Array:
    """Return the logits as they enter the softmax, hidden ones included."""
    x = scaled_logits(p, multiply)
    if p.softcap:
        cap = x.dtype.type(p.softcap)
        x = cap * np.tanh(x / cap)
    return x if p.bias is None else x + p.bias.astype(x.dtype)


def softmax(
    x: Array, seen: Array, sink: Array | None = None, exp: Callable[[Array], Array] = np.exp
) -> Array:
    """Return the softmax of the visible logits of each row; zeros in a row without any."""
    shown = np.where(seen, x, x.dtype.type(-np.inf))
    top = shown.max(axis=-1, keepdims=True, initial=-np.inf)
    if sink is not None:
        extra = sink.astype(x.dtype)[:, None, None]
        top = np.maximum(top, extra)
    top = np.where(np.isneginf(top), 0, top)
    powers = exp(shown - top)
    total = powers.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + exp(extra - top)
    a: Array = powers / np.where(total == 0, total.dtype.type(1), total)
    return a


def weights(p: Parts) -> Array:
    """Return A (B, H, n_q, n_k)."""
    return softmax(logits(p), p.seen, p.sink)


def combine(a: Array, p: Parts) -> Array:
    """Return ``A V``, with the rows that see no key as the convention has them."""
    out: Array = a @ p.v
    if p.empty_row == "mean" and p.v.shape[-2]:
        empty = ~p.seen.any(axis=-1, keepdims=True)
        out = np.where(empty, p.v.mean(axis=-2, keepdims=True), out)
    return out


def output(p: Parts) -> Array:
    """Return O (B, H, n_q, d_v)."""
    return combine(weights(p), p)
