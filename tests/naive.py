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


def naive_transposed(weights: Array, y: Array) -> Array:
    """Return A^T Y of weights (n_q, n_k) and y (n_q, m)."""
    out = np.zeros((weights.shape[1], y.shape[1]))
    for j in range(weights.shape[1]):
        for c in range(y.shape[1]):
            out[j, c] = sum(float(weights[i, j]) * float(y[i, c]) for i in range(len(weights)))
    return out


def naive_compare(weights: Array, other: Array) -> Array:
    """Return for each row of A and B: sum A^2, sum (A - B)^2, sum |A - B|, sum A log(A / B).

    A term of the last sum is 0 where A is 0, and infinite where B is not positive but A is.
    """
    out = np.zeros((len(weights), 4))
    for i in range(len(weights)):
        for a, b in zip(weights[i].tolist(), other[i].tolist(), strict=True):
            out[i, 0] += a * a
            out[i, 1] += (a - b) * (a - b)
            out[i, 2] += abs(a - b)
            if a > 0.0:
                out[i, 3] += a * math.log(a / b) if b > 0.0 else math.inf
    return out


# --- sketches: the matrix that the arrays of a draw stand for -----------------------------------


def naive_hadamard(order: int) -> Array:
    """Return the matrix of entries +1, -1 by H_2N = [[H_N, H_N], [H_N, -H_N]]."""
    if order == 1:
        return np.ones((1, 1))
    half = naive_hadamard(order // 2)
    return np.block([[half, half], [half, -half]])


def naive_cosines(n: int) -> Array:
    """Return the orthonormal DCT-II: C_ij = c_i cos(pi i (j + 1/2) / n)."""
    out = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            size = math.sqrt((1 if i == 0 else 2) / n)
            out[i, j] = size * math.cos(math.pi * i * (j + 0.5) / n)
    return out


def naive_sketch(
    kind: str, r: int, n: int, arrays: dict[str, Array], *, s: float = 1, t: int = 1
) -> Array:
    """Return S (r, n), scaled, of a kind with parameters s and t."""
    out = np.zeros((r, n))
    if kind in ("gaussian", "rademacher", "uniform", "haar"):
        factor = {"uniform": math.sqrt(3 / r), "haar": math.sqrt(n / r)}.get(kind, 1 / math.sqrt(r))
        for i in range(r):
            for j in range(n):
                out[i, j] = factor * arrays["sketch"][i, j]
    elif kind == "sparse":
        for i in range(r):
            for p in range(arrays["starts"][i], arrays["starts"][i + 1]):
                out[i, arrays["columns"][p]] += math.sqrt(s / r) * arrays["signs"][p]
    elif kind == "less_uniform":
        for i in range(r):
            for k in range(t):
                out[i, arrays["columns"][i, k]] += math.sqrt(n / (t * r)) * arrays["signs"][i, k]
    elif kind == "countsketch":
        for j in range(n):
            out[arrays["hash"][j], j] += arrays["signs"][j]
    elif kind in ("sjlt", "osnap"):
        for j in range(n):
            for k in range(int(s)):
                out[arrays["hash"][j, k], j] += arrays["signs"][j, k] / math.sqrt(s)
    else:
        order = n
        hadamard = kind == "srht"
        while hadamard and order & (order - 1):
            order += 1
        transform = naive_hadamard(order) / math.sqrt(order) if hadamard else naive_cosines(n)
        for i in range(r):
            for j in range(n):
                entry = transform[arrays["rows"][i], j] * arrays["signs"][j]
                out[i, j] = math.sqrt(order / r) * entry
    return out
