"""Slow references written from the formulas in explicit loops; nothing of the library is used."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def naive_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    first: int = 0,
    left: int | None = None,
    right: int | None = None,
    softcap: float = 0.0,
    key_mask: Array | None = None,
    mask: Array | None = None,
    sink: float | None = None,
) -> tuple[Array, Array, Array]:
    """Return (A, out, lse) of one head: q (n_q, d), k (n_k, d), v (n_k, d_v).

    Row i has position p = first + i and sees p - left <= j <= p + right (None: unbounded), where
    key_mask (n_k,) and mask (n_q, n_k) agree; a mask of numbers is added and -inf removes.
    """
    n_q, n_k, d, d_v = len(q), len(k), q.shape[1], v.shape[1]
    weights = np.zeros((n_q, n_k))
    out = np.zeros((n_q, d_v))
    lse = np.full(n_q, -math.inf)
    for i in range(n_q):
        position = first + i
        logits: dict[int, float] = {}  # visible keys only
        for j in range(n_k):
            if left is not None and j < position - left:
                continue
            if right is not None and j > position + right:
                continue
            if key_mask is not None and not key_mask[j]:
                continue
            bias = 0.0
            if mask is not None and mask.dtype == np.bool_:
                if not mask[i, j]:
                    continue
            elif mask is not None:
                bias = float(mask[i, j])
                if bias == -math.inf:
                    continue
            logit = scale * sum(float(q[i, t]) * float(k[j, t]) for t in range(d))
            if softcap != 0.0:
                logit = softcap * math.tanh(logit / softcap)
            logits[j] = logit + bias
        terms = list(logits.values())
        if sink is not None:
            terms.append(sink)
        if not terms:
            continue
        top = max(terms)
        total = sum(math.exp(term - top) for term in terms)
        lse[i] = top + math.log(total)
        for j, logit in logits.items():
            weights[i, j] = math.exp(logit - top) / total
            for c in range(d_v):
                out[i, c] += weights[i, j] * float(v[j, c])
    return weights, out, lse
