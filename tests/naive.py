"""Slow references written from the formulas in explicit loops; nothing of the library is used."""

from __future__ import annotations

import math
from statistics import NormalDist
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


def naive_vjp(
    q: Array,
    k: Array,
    v: Array,
    cotangent: Array,
    *,
    scale: float,
    softcap: float = 0.0,
    sink: float | None = None,
    **options: Any,
) -> tuple[Array, Array, Array, Array, float]:
    """Return (dq, dk, dv, dbias, dsink) of one head, entry by entry through the softmax Jacobian.

    ``dL_il = sum_j (G_i . v_j) A_ij ([j = l] - A_il)``: no sum is shared between entries.
    """
    weights, _, lse = naive_attention(
        q, k, v, scale=scale, softcap=softcap, sink=sink, **options
    )  # fmt: skip
    n_q, n_k = weights.shape
    d_q, d_k, d_v = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    d_bias = np.zeros((n_q, n_k))
    d_sink = 0.0
    for i in range(n_q):
        read = [j for j in range(n_k) if weights[i, j] > 0]
        inner = {
            j: sum(float(cotangent[i, c]) * float(v[j, c]) for c in range(v.shape[1])) for j in read
        }
        for j in read:
            d_v[j] += weights[i, j] * cotangent[i]
        for t in read:
            d_logit = sum(
                inner[j] * weights[i, j] * ((1.0 if j == t else 0.0) - weights[i, t]) for j in read
            )
            d_bias[i, t] = d_logit
            slope = 1.0
            if softcap != 0.0:
                product = scale * sum(float(a) * float(b) for a, b in zip(q[i], k[t], strict=True))
                slope = 1.0 / math.cosh(product / softcap) ** 2
            d_q[i] += scale * slope * d_logit * k[t]
            d_k[t] += scale * slope * d_logit * q[i]
        if sink is not None:
            share = math.exp(sink - lse[i])
            d_sink -= share * sum(inner[j] * weights[i, j] for j in read)
    return d_q, d_k, d_v, d_bias, d_sink


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


# --- methods ------------------------------------------------------------------------------------


def naive_informer(
    q: Array,
    k: Array,
    v: Array,
    rank: int,
    key_samples: Array | None = None,
    *,
    scale: float,
    statistic: str = "max_mean",
    mean_divisor: str = "n_samples",
    fill: str = "mean",
    peek: bool = False,
    offset: int | None = None,
    key_mask: Array | None = None,
    rows: Array | None = None,
) -> tuple[list[int], Array, Array, Array]:
    """Return (I, statistic, Ahat, Ahat V): exact rows for those on top, uniform ones elsewhere.

    Row i sees keys j <= i + offset (None: all) that the mask keeps; ``key_samples (n_q, U)`` or
    ``(U,)``, None: all keys; ``peek``: the statistic looks at keys that the row does not see.
    ``rows`` are taken for I without a ranking.
    """
    n_q, n_k, d = len(q), len(k), q.shape[1]
    kept = [j for j in range(n_k) if key_mask is None or key_mask[j]]
    found = np.full(n_q, -math.inf)
    weights = np.zeros((n_q, n_k))
    exact: dict[int, Array] = {}
    for i in range(n_q):
        seen = [j for j in kept if offset is None or j <= i + offset]
        if not seen:
            continue
        looked = kept if peek else seen
        logits = {j: scale * sum(float(q[i, c]) * float(k[j, c]) for c in range(d)) for j in looked}
        if key_samples is None:
            sample = looked
        else:
            sample = [int(j) for j in (key_samples if key_samples.ndim == 1 else key_samples[i])]
            sample = [j for j in sample if j in logits]
        terms = [logits[j] for j in sample]
        if terms:
            top = max(terms)
            divisor = len(terms) if mean_divisor == "n_samples" else len(looked)
            mean = sum(terms) / divisor
            lse = top + math.log(sum(math.exp(x - top) for x in terms))
            found[i] = {
                "max_mean": top - mean,
                "zero_filled": max(0.0, top) - sum(terms) / len(looked),
                "kl": lse - math.log(len(terms)) - mean,
                "m": lse - math.log(len(terms)) + math.log(len(looked)) - mean,
            }[statistic]
        top = max(logits[j] for j in seen)
        total = sum(math.exp(logits[j] - top) for j in seen)
        exact[i] = np.zeros(n_k)
        for j in seen:
            exact[i][j] = math.exp(logits[j] - top) / total
            weights[i, j] = 1.0 if fill == "cumsum" else 1.0 / len(seen)
    if rows is None:
        # sorted is stable: equal statistics go to the smaller index.
        order = sorted(exact, key=lambda i: -found[i])[:rank]
    else:
        order = [int(i) for i in rows]
    for i in order:
        weights[i] = exact[i]
    out = np.zeros((n_q, v.shape[1]))
    for i in range(n_q):
        for c in range(v.shape[1]):
            out[i, c] = sum(float(weights[i, j]) * float(v[j, c]) for j in range(n_k))
    return order, found, weights, out


def naive_pilot_law(
    q: Array,
    k: Array,
    v: Array,
    pilots: Array,
    *,
    scale: float,
    offset: int | None = None,
    key_mask: Array | None = None,
    mix: float = 0.0,
    center: bool = False,
) -> Array:
    """Return p_j proportional to (sum over pilots i of A_ij^2)^(1/2) |V_j|, mixed with 1/m."""
    n_k = len(k)
    kept = [j for j in range(n_k) if key_mask is None or key_mask[j]]
    right = None if offset is None else 0
    a = naive_attention(
        q, k, v, scale=scale, first=offset or 0, right=right, key_mask=key_mask
    )[0]  # fmt: skip
    mean = [
        sum(float(v[j, c]) for j in kept) / len(kept) if center else 0.0 for c in range(v.shape[1])
    ]
    p = np.zeros(n_k)
    for j in kept:
        square = sum(float(a[i, j]) ** 2 for i in pilots)
        size = sum((float(v[j, c]) - mean[c]) ** 2 for c in range(v.shape[1]))
        p[j] = math.sqrt(square) * math.sqrt(size)
    total = sum(p)
    for j in kept:
        p[j] = p[j] / total if total > 0 else 1 / len(kept)
        p[j] = (1 - mix) * p[j] + mix / len(kept)
    return p


def naive_skeinformer(
    q: Array,
    k: Array,
    v: Array,
    columns: Array,
    pilots: Array | None = None,
    *,
    scale: float,
    normalizer: str = "adaptive",
    fill: str = "geometric",
    factors: Array | None = None,
    offset: int | None = None,
    key_mask: Array | None = None,
) -> tuple[Array, Array]:
    """Return (Ahat, Ahat V) for given columns J and exact rows; a repeated column counts again.

    Row i sees keys j <= i + offset (None: all) that the mask keeps; ``factors`` are the weights of
    the drawn columns (None: 1).
    """
    n_q, n_k, d = len(q), len(k), q.shape[1]
    exact_rows = set() if pilots is None else {int(i) for i in pilots}
    factor = dict.fromkeys((int(j) for j in columns), 0.0)
    for t, j in enumerate(columns):
        factor[int(j)] += 1.0 if factors is None else float(factors[t])
    weights = np.zeros((n_q, n_k))
    for i in range(n_q):
        seen = [
            j
            for j in range(n_k)
            if (key_mask is None or key_mask[j]) and (offset is None or j <= i + offset)
        ]
        if not seen:
            continue
        logits = {j: scale * sum(float(q[i, c]) * float(k[j, c]) for c in range(d)) for j in seen}
        top = max(logits.values())
        a = {j: math.exp(logits[j] - top) for j in seen}
        inside = [j for j in seen if j in factor]
        outside = [j for j in seen if j not in factor]
        total = sum(a.values())
        if i in exact_rows:
            for j in seen:
                weights[i, j] = a[j] / total
            continue
        if normalizer == "adaptive":
            if not inside:
                for j in outside:
                    weights[i, j] = 1 / len(outside)
                continue
            # Relative to the largest drawn logit: the others may be so large that these underflow.
            high = max(logits[j] for j in inside)
            if fill == "oracle":
                high = top
            a = {j: math.exp(min(logits[j] - high, 700.0)) for j in seen}
            if fill == "geometric":
                g = math.exp(sum(logits[j] - high for j in inside) / len(inside))
            elif fill == "arithmetic":
                g = sum(a[j] for j in inside) / len(inside)
            else:
                g = sum(a[j] for j in outside) / max(len(outside), 1)
            divisor = sum(a[j] for j in inside) + len(outside) * g
            for j in outside:
                weights[i, j] = g / divisor
            for j in inside:
                weights[i, j] = a[j] / divisor
        elif normalizer == "sampled":
            if not inside:
                continue
            high = max(logits[j] for j in inside)
            terms = {j: factor[j] * math.exp(logits[j] - high) for j in inside}
            for j in inside:
                weights[i, j] = terms[j] / sum(terms.values())
        else:
            for j in inside:
                weights[i, j] = factor[j] * a[j] / total
    out = np.zeros((n_q, v.shape[1]))
    for i in range(n_q):
        for c in range(v.shape[1]):
            out[i, c] = sum(float(weights[i, j]) * float(v[j, c]) for j in range(n_k))
    return weights, out


def naive_nystrom(
    q: Array,
    k: Array,
    v: Array,
    queries: Array,
    keys: Array,
    inverse: Array | int,
    *,
    scale: float,
    key_mask: Array | None = None,
) -> tuple[Array, Array]:
    """Return (Ahat, Ahat V) for landmark queries and keys; ``inverse`` is Z, or published steps."""
    left = naive_attention(q, keys, np.zeros((len(keys), 0)), scale=scale)[0]
    middle = naive_attention(queries, keys, np.zeros((len(keys), 0)), scale=scale)[0]
    right = naive_attention(queries, k, np.zeros((len(k), 0)), scale=scale, key_mask=key_mask)[0]
    if isinstance(inverse, int):
        columns = max(sum(abs(middle[i, j]) for i in range(len(middle))) for j in range(len(keys)))
        rows = max(sum(abs(x) for x in middle[i]) for i in range(len(middle)))
        z = middle.T / (columns * rows)
        unit = np.eye(len(middle))
        for _ in range(inverse):
            x = middle @ z
            z = 0.25 * z @ (13 * unit - 15 * x + 7 * x @ x - x @ x @ x)
    else:
        z = inverse
    weights = left @ z @ right
    return weights, weights @ v


def naive_performer(
    q: Array,
    k: Array,
    v: Array,
    omega: Array,
    *,
    scale: float,
    features: str = "positive",
    eps: float = 0.0,
    offset: int | None = None,
    key_mask: Array | None = None,
) -> tuple[Array, Array]:
    """Return (Ahat, Ahat V) as a quotient of sums over features; moderate inputs only.

    Query i sees keys j <= i + offset (None: all) that the mask keeps.  With ``eps`` features are
    divided by their maxima without the norms, of a query and of all keys, before it is added.
    """
    kept = [j for j in range(len(k)) if key_mask is None or key_mask[j]]
    x, y = math.sqrt(scale) * q, math.sqrt(scale) * k

    def project(row: Array) -> list[float]:
        return [sum(float(a) * float(b) for a, b in zip(w, row, strict=True)) for w in omega]

    high = max(max(project(y[j])) for j in kept) if eps else 0.0

    def phi(row: Array, top: float) -> list[float]:
        half = 0.5 * sum(float(a) ** 2 for a in row)
        dots = project(row)
        if features == "trigonometric":
            return [math.exp(half) * f(u) for f in (math.cos, math.sin) for u in dots]
        signs = (1, -1) if features == "hyperbolic" else (1,)
        return [math.exp(s * u - half - top) + eps for s in signs for u in dots]

    of_keys = {j: phi(y[j], high) for j in kept}
    weights = np.zeros((len(q), len(k)))
    for i in range(len(q)):
        mine = phi(x[i], max(project(x[i])) if eps else 0.0)
        seen = [j for j in kept if offset is None or j <= i + offset]
        entries = {j: sum(a * b for a, b in zip(mine, of_keys[j], strict=True)) for j in seen}
        for j in seen:
            weights[i, j] = entries[j] / sum(entries.values())
    out = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        for c in range(v.shape[1]):
            out[i, c] = sum(float(weights[i, j]) * float(v[j, c]) for j in range(len(k)))
    return weights, out


def naive_compressed_logits(q: Array, k: Array, d_in: int, keep: Array | None = None) -> Array:
    """Return the best rank d_in approximation of ``Q K_c^T``, from its whole decomposition.

    K_c are the kept keys minus their mean; masked columns are zero.
    """
    kept = [j for j in range(len(k)) if keep is None or keep[j]]
    mean = sum(k[j] for j in kept) / max(len(kept), 1)
    logits = np.zeros((len(q), len(k)))
    for i in range(len(q)):
        for j in kept:
            logits[i, j] = sum(
                float(a) * float(b - c) for a, b, c in zip(q[i], k[j], mean, strict=True)
            )
    u, s, vt = np.linalg.svd(logits, full_matrices=False)
    best = np.zeros_like(logits)
    for t in range(min(d_in, len(s))):
        best += s[t] * np.outer(u[:, t], vt[t])
    return best


def naive_hamming_labels(codes: list[list[int]], start: list[int], steps: int) -> list[int]:
    """Return labels of codes of bits after some assignments, from the rows ``start`` as centres."""
    centers = [list(codes[i]) for i in start]
    labels: list[int] = []
    for step in range(steps):
        if step:
            for c in range(len(centers)):
                mine = [code for code, label in zip(codes, labels, strict=True) if label == c]
                if mine:
                    ones = [sum(bits) for bits in zip(*mine, strict=True)]
                    centers[c] = [int(2 * count > len(mine)) for count in ones]
        labels = []
        for code in codes:
            distances = [sum(a != b for a, b in zip(code, c, strict=True)) for c in centers]
            labels.append(distances.index(min(distances)))
    return labels


def naive_clustered(
    q: Array,
    k: Array,
    v: Array,
    labels: Array,
    *,
    scale: float,
    key_mask: Array | None = None,
    top_keys: int | None = None,
) -> tuple[Array, Array]:
    """Return (Ahat, Ahat V): the row of the mean query; with ``top_keys`` the improved form."""
    kept = [j for j in range(len(k)) if key_mask is None or key_mask[j]]
    weights = np.zeros((len(q), len(k)))
    for i in range(len(q)):
        mine = [p for p in range(len(q)) if labels[p] == labels[i]]
        center = [sum(float(q[p, t]) for p in mine) / len(mine) for t in range(q.shape[1])]

        def softmax(query: Any, keys: list[int]) -> dict[int, float]:
            logits = {
                j: scale * sum(a * float(b) for a, b in zip(query, k[j], strict=True)) for j in keys
            }
            high = max(logits.values())
            total = sum(math.exp(x - high) for x in logits.values())
            return {j: math.exp(x - high) / total for j, x in logits.items()}

        shared = softmax(center, kept)
        for j in kept:
            weights[i, j] = shared[j]
        if top_keys is not None:
            top = sorted(kept, key=lambda j: -shared[j])[:top_keys]
            mass = sum(shared[j] for j in top)
            own = softmax([float(x) for x in q[i]], top)
            for j in top:
                weights[i, j] = mass * own[j]
    out = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        for c in range(v.shape[1]):
            out[i, c] = sum(float(weights[i, j]) * float(v[j, c]) for j in range(len(k)))
    return weights, out


def naive_usp(u: Array, s: Array | None, p: Array) -> Array:
    """Return ``U S P`` by loops; s is None for the identity."""
    inner = p
    if s is not None:
        inner = np.zeros((len(s), p.shape[1]))
        for a in range(len(s)):
            for j in range(p.shape[1]):
                inner[a, j] = sum(float(s[a, b]) * float(p[b, j]) for b in range(len(p)))
    out = np.zeros((len(u), p.shape[1]))
    for i in range(len(u)):
        for j in range(p.shape[1]):
            out[i, j] = sum(float(u[i, a]) * float(inner[a, j]) for a in range(len(inner)))
    return out


def _naive_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    terms = [math.exp(x - top) for x in logits]
    return [x / sum(terms) for x in terms]


def naive_dba_factors(
    q: Array,
    k: Array,
    queries: Array | None,
    keys: Array | None,
    labels_q: Array | None,
    labels_k: Array | None,
    *,
    scale: float,
    core: str,
    unpack: str,
    tau: float = 1.0,
) -> tuple[Array, Array | None, Array]:
    """Return (U, S, P) for landmarks and labels; packs by means where keys have labels."""

    def logits(row: Array, marks: Array, factor: float) -> list[float]:
        return [
            factor * sum(float(a) * float(b) for a, b in zip(row, mark, strict=True))
            for mark in marks
        ]

    counts: list[int] = []
    if labels_k is None:
        assert queries is not None
        p = np.array([_naive_softmax(logits(mark, k, scale)) for mark in queries])
    else:
        assert keys is not None
        counts = [sum(int(x) == b for x in labels_k) for b in range(len(keys))]
        p = np.zeros((len(keys), len(k)))
        for j, label in enumerate(labels_k):
            p[label, j] = 1 / counts[label]
    s: Array | None = None
    if core != "identity":
        assert queries is not None
        assert keys is not None
        s = np.zeros((len(queries), len(keys)))
        for a, mark in enumerate(queries):
            row = logits(mark, keys, scale)
            if core == "softmax_logcount":
                row = [x + math.log(c) for x, c in zip(row, counts, strict=True)]
            s[a] = _naive_softmax(row)
        if core == "pinv":
            s = np.linalg.pinv(s)
    if unpack == "onehot":
        assert labels_q is not None
        assert queries is not None
        u = np.zeros((len(q), len(queries)))
        for i, label in enumerate(labels_q):
            u[i, label] = 1
    elif unpack == "softmax":
        assert queries is not None
        u = np.array([_naive_softmax(logits(row, queries, tau * scale)) for row in q])
    else:
        assert keys is not None
        rows = [logits(row, keys, scale) for row in q]
        if labels_k is not None:
            rows = [[x + math.log(c) for x, c in zip(row, counts, strict=True)] for row in rows]
        u = np.array([_naive_softmax(row) for row in rows])
    return u, s, p


def naive_dba_layer(
    x: Array,
    c: Array,
    w: dict[str, Array],
    heads: int,
    *,
    keep: Array | None = None,
    target: Array | None = None,
    eps: float = 1e-5,
) -> tuple[Array, Array, Array, Array, Array]:
    """Return (out, Y, U, S, P) of one sequence by the eight published steps, entry by entry."""

    def apply(rows: Array, name: str) -> Array:
        weight, bias = w[f"w_{name}"], w[f"b_{name}"]
        out = np.zeros((len(rows), len(weight)))
        for i, row in enumerate(rows):
            for o in range(len(weight)):
                dot = sum(float(a) * float(b) for a, b in zip(weight[o], row, strict=True))
                out[i, o] = dot + float(bias[o])
        return out

    def slice_of(rows: Array, h: int) -> Array:
        width = rows.shape[1] // heads
        return rows[:, h * width : (h + 1) * width]

    n, d = x.shape
    r = len(c)
    half = math.sqrt(len(w["w_pq"]) / heads)
    pq, pk, pv = apply(c, "pq"), apply(x, "pk"), apply(x, "pv")
    p = np.zeros((heads, r, n))
    y = np.zeros((r, d))
    width = d // heads
    there = [j for j in range(n) if keep is None or keep[j]]
    for h in range(heads):
        g = slice_of(pq, h) @ slice_of(pk, h).T / half
        for a in range(r):
            row = _naive_softmax([float(g[a, j]) for j in there])
            for j, value in zip(there, row, strict=True):
                p[h, a, j] = value
                y[a, h * width : (h + 1) * width] += value * slice_of(pv, h)[j]
    q, k, v = (apply(y, name) for name in ("q", "k", "v"))
    s = np.zeros((heads, r, r))
    mixed = np.zeros((r, d))
    for h in range(heads):
        g = slice_of(q, h) @ slice_of(k, h).T / half
        for a in range(r):
            s[h, a] = _naive_softmax(g[a].tolist())
            for b in range(r):
                mixed[a, h * width : (h + 1) * width] += s[h, a, b] * slice_of(v, h)[b]
    z = np.zeros((r, d))
    for a in range(r):
        mean = sum(mixed[a]) / d
        variance = sum((m - mean) ** 2 for m in mixed[a]) / d
        for col in range(d):
            unit = (mixed[a, col] - mean) / math.sqrt(variance + eps)
            z[a, col] = unit * w["ln_g"][col] + w["ln_b"][col]
    queries = x if target is None else target
    lengths = apply(queries, "len")
    u = np.zeros((heads, len(queries), r))
    joined = np.zeros((len(queries), d))
    for h in range(heads):
        for i in range(len(queries)):
            u[h, i] = _naive_softmax(slice_of(lengths, h)[i].tolist())
            for a in range(r):
                joined[i, h * width : (h + 1) * width] += u[h, i, a] * slice_of(z, h)[a]
    return apply(joined, "out"), y, u, s, p


# --- plans of direct keys and regions -----------------------------------------------------------


def naive_plan(
    pattern: str, n: int, block: int, *, causal: bool = False, split: bool = False
) -> list[tuple[list[int], list[tuple[int, ...]]]]:
    """Return (direct keys, regions) of each row, positions counted from 0; nothing is shared."""
    rows: list[tuple[list[int], list[tuple[int, ...]]]] = []
    for i in range(n):
        seen = [j for j in range(n) if not causal or j <= i]
        a, c = divmod(i, block)
        groups: dict[Any, list[int]] = {}
        direct = []
        for j in seen:
            x, y = divmod(j, block)
            own_row, own_column = x == a, y == c
            if pattern in ("fixed", "axial_rowmajor"):
                name: Any = None if own_row else x
            elif pattern == "logsparse":
                # The highest bit in which i and j differ says which sibling block j lies in.
                e = (i ^ j).bit_length() - 1
                name = None if own_row else e
            elif own_row or own_column:
                name = None
            elif pattern == "axial_vertical":
                name = (y, x > a) if split else y
            else:
                name = (x, y > c) if split else x
            if name is None:
                direct.append(j)
            else:
                groups.setdefault(name, []).append(j)
        rows.append((direct, [tuple(keys) for keys in groups.values()]))
    return rows


def naive_combiner(
    q: Array,
    k: Array,
    rows: list[tuple[list[int], list[tuple[int, ...]]]],
    reference: Any,
    *,
    scale: float,
    key: str = "expected",
    bias: str = "entropy",
    second_order: str = "none",
    key_mask: Array | None = None,
) -> tuple[Array, Array]:
    """Return (Ahat, log Zhat): exp(L) on direct keys, exp(g) times lam on regions, over their sum.

    ``reference(region)`` is the query that lam of a region is the softmax for.
    """
    n_k = len(k)
    weights = np.zeros((len(q), n_k))
    normalizer = np.full(len(q), -math.inf)
    summaries: dict[tuple[int, ...], tuple[Array, Array, float, Array, Array]] = {}
    for i, (direct, regions) in enumerate(rows):
        near = [j for j in direct if key_mask is None or key_mask[j]]
        slots = [(scale * float(q[i] @ k[j]), [j], [1.0]) for j in near]
        for whole in regions:
            region = tuple(j for j in whole if key_mask is None or key_mask[j])
            if not region:
                continue
            if region not in summaries:
                q0 = np.asarray(reference(region), np.float64)
                e = [scale * float(q0 @ k[j]) for j in region]
                w = [math.exp(x - max(e)) for x in e]
                lam = np.array([x / sum(w) for x in w])
                kappa = sum(p * k[j] for p, j in zip(lam, region, strict=True))
                variance = sum(p * (k[j] - kappa) ** 2 for p, j in zip(lam, region, strict=True))
                entropy = -sum(p * math.log(p) for p in lam if p > 0)
                pooled = {
                    "expected": kappa,
                    "mean": np.mean(k[list(region)], axis=0),
                    "max": np.max(k[list(region)], axis=0),
                }[key]
                b = {"entropy": entropy, "log_count": math.log(len(region)), "none": 0.0}[bias]
                summaries[region] = (lam, pooled, b, variance, q0)
            lam, pooled, b, variance, q0 = summaries[region]
            g = scale * float(q[i] @ pooled) + b
            if second_order == "diag":
                g += 0.5 * scale**2 * float(((q[i] - q0) ** 2) @ variance)
            slots.append((g, list(region), [float(x) for x in lam]))
        if not slots:
            continue
        top = max(g for g, _, _ in slots)
        total = sum(math.exp(g - top) for g, _, _ in slots)
        normalizer[i] = top + math.log(total)
        for g, keys, shares in slots:
            for j, share in zip(keys, shares, strict=True):
                weights[i, j] += math.exp(g - top) / total * share
    return weights, normalizer


def naive_pivots(
    keys: Array, c: float, uniforms: Array, *, weighted: bool = True
) -> tuple[list[int], Array]:
    """Return the pivots of a randomly pivoted Cholesky factorisation, and what they leave (n,).

    Of ``exp(-c |k_j - k_l|^2 / 2)``, the key of the largest
    ``ln res_j + 2 h_j - ln(-ln u_j)`` a step, every column subtracted from all keys.
    """
    n = len(keys)
    half = [0.5 * c * float(k @ k) for k in keys]
    left, columns, pivots = np.ones(n), list[Array](), list[int]()
    for row in uniforms:
        scores = np.full(n, -math.inf)
        for j in range(n):
            if left[j] > 1e-12:
                law = 2 * half[j] if weighted else 0.0
                scores[j] = math.log(left[j]) + law - math.log(-math.log(row[j]))
        if scores.max() == -math.inf:
            break
        s = int(np.argmax(scores))
        column = np.array([math.exp(-0.5 * c * float((k - keys[s]) @ (k - keys[s]))) for k in keys])
        for f in columns:
            column = column - f * f[s]
        column = column / math.sqrt(left[s])
        columns.append(column)
        pivots.append(s)
        left = np.maximum(left - column**2, 0.0)
        left[pivots] = 0.0
    return pivots, left


def naive_wildcat(
    q: Array, k: Array, v: Array, pivots: Array, scale: float, tau2: float
) -> tuple[Array, Array, Array]:
    """Return Ahat, Ohat and the log-normalisers of centred keys, from the exponential kernel."""
    centred = k - k.mean(axis=0)
    kernel = np.exp(abs(scale) / tau2 * (centred @ centred.T))
    weights = np.linalg.solve(kernel[np.ix_(pivots, pivots)], kernel[pivots])
    left = np.exp(scale * (q @ centred[pivots].T))
    den = left @ weights.sum(axis=1)
    ahat = (left @ weights) / den[:, None]
    return ahat, ahat @ v, np.log(den) + scale * (q @ k.mean(axis=0))


def naive_nystroem(q: Array, k: Array, v: Array, landmarks: Array, scale: float) -> Array:
    """Return Ohat of scikit-learn's Nystroem features of ``sqrt(scale)`` times Q and K."""
    x, y = math.sqrt(scale) * q, math.sqrt(scale) * k
    b = y[landmarks]

    def gaussian(s: Array, t: Array) -> Array:
        return np.asarray(np.exp(-0.5 * ((s[:, None] - t[None]) ** 2).sum(axis=2)))

    u, size, vt = np.linalg.svd(gaussian(b, b))
    core = (u / np.maximum(size, 1e-12)) @ vt
    weights = np.exp(0.5 * (y**2).sum(axis=1))
    left = gaussian(x, b) @ core
    right = gaussian(b, y) * weights
    return np.asarray((left @ (right @ v)) / (left @ right.sum(axis=1))[:, None])


def naive_block_sample(
    q: Array, k: Array, scale: float, planes: Array, block: int, samples: Array, align: str
) -> tuple[Array, Array]:
    """Return weights and logsumexp of sorted blocks with sampled keys beside them, by loops.

    ``N_i = sum_j [beta(q_i) = beta(k_j)] e^{L_ij} + (n/s) sum_t [not so] e^{L_i,l_t}``: keys are
    sorted by the place of their hash code in the Gray sequence, and cut in blocks; a query is in
    the block of its rank among queries, or where its code stands among those of the keys.
    """

    def place(x: Array) -> int:
        code = sum(1 << t for t in range(planes.shape[1]) if x @ planes[:, t] > 0)
        out = code
        while code:
            code >>= 1
            out ^= code
        return out

    n, m = len(k), len(q)
    places = [place(x) for x in k]
    order = sorted(range(n), key=lambda j: places[j])
    of_key = np.zeros(n, int)
    for position, j in enumerate(order):
        of_key[j] = position // block
    blocks = -(-n // block)
    ordered = sorted(places)
    asked = [place(x) for x in q]
    of_query = np.zeros(m, int)
    for position, i in enumerate(sorted(range(m), key=lambda i: asked[i])):
        of_query[i] = position * blocks // m
    if align == "code":
        for i in range(m):
            low = sum(x < asked[i] for x in ordered)
            high = sum(x <= asked[i] for x in ordered)
            of_query[i] = min((low + high) // 2 // block, blocks - 1)
    weights, lse = np.zeros((m, n)), np.zeros(m)
    for i in range(m):
        for j in range(n):
            if of_query[i] == of_key[j]:
                weights[i, j] += np.exp(scale * q[i] @ k[j])
        for j in samples:
            if of_query[i] != of_key[j]:
                weights[i, j] += n / len(samples) * np.exp(scale * q[i] @ k[j])
        lse[i] = np.log(weights[i].sum())
        weights[i] /= weights[i].sum()
    return weights, lse


def naive_gray_position(code: int, planes: int, order: str) -> int:
    """Return where a code stands in the reflected sequence, or what stands at its place there."""
    sequence = [""]
    for _ in range(planes):
        sequence = ["0" + x for x in sequence] + ["1" + x for x in reversed(sequence)]
    codes = [int(x or "0", 2) for x in sequence]
    return codes.index(code) if order == "inverse" else codes[code]


def naive_sorted_blocks(
    q: Array, k: Array, planes: Array, size: int, *, order: str, align: str
) -> tuple[list[int], list[int], list[int]]:
    """Return the keys by position, and the blocks of queries and of keys."""
    width = planes.shape[1]
    at_q, at_k = (
        [
            naive_gray_position(
                sum(2**t for t in range(width) if float(row @ planes[:, t]) > 0), width, order
            )
            for row in x.astype(np.float64)
        ]
        for x in (q, k)
    )
    by_place = sorted(range(len(k)), key=lambda j: (at_k[j], j))
    blocks = math.ceil(len(k) / size)
    of_key = [by_place.index(j) // size for j in range(len(k))]
    if align == "rank" or width == 0:
        rank = sorted(range(len(q)), key=lambda i: (at_q[i], i))
        of_query = [rank.index(i) * blocks // len(q) for i in range(len(q))]
    else:
        ends = [(sum(x < y for x in at_k), sum(x <= y for x in at_k)) for y in at_q]
        of_query = [min((low + high) // 2 // size, blocks - 1) for low, high in ends]
    return by_place, of_query, of_key


def naive_weighted_blocks(
    logits: Array, of_query: list[int], of_key: list[int], drawn: list[int], p: Array, overlap: bool
) -> tuple[Array, Array]:
    """Return (Ahat, ln D) of blocks and drawn keys weighted by 1/(s p), each as often as drawn.

    ``overlap``: keys of the own block are not counted again.
    """
    weights, normalizer = np.zeros(logits.shape), np.empty(len(logits))
    for i, row in enumerate(logits):
        terms = [(j, 0.0) for j in range(len(row)) if of_query[i] == of_key[j]]
        terms += [
            (j, -math.log(len(drawn) * p[j]))
            for j in drawn
            if not overlap or of_query[i] != of_key[j]
        ]
        top = max(row[j] + w for j, w in terms)
        normalizer[i] = top + math.log(sum(math.exp(row[j] + w - top) for j, w in terms))
        for j, w in terms:
            weights[i, j] += math.exp(row[j] + w - normalizer[i])
    return weights, normalizer


def naive_halving(
    k: Array, v: Array, b: float, scale: float, uniforms: Array, delta: float, rule: str
) -> list[bool]:
    """Return for each pair of neighbours whether the second one stays, by sums over all points.

    ``kappa(x, y) = e^(scale k_x.k_y) (v_x.v_y + b^2)``, ``f_i = kappa(x_2i, .) -
    kappa(x_2i+1, .)``, ``psi = sum_t +-f_t``: the second one of pair i > 0 stays where
    ``(2 u_i - 1) a_i <= <psi, f_i>``.
    """
    size, pairs = len(k), len(k) // 2
    level = np.log(2 * size / delta)

    def inner(i: int, t: int) -> float:
        total = 0.0
        for x, left in ((2 * i, 1), (2 * i + 1, -1)):
            for y, right in ((2 * t, 1), (2 * t + 1, -1)):
                kappa = np.exp(scale * k[x] @ k[y]) * (v[x] @ v[y] + b * b)
                total += left * right * kappa
        return total

    signs: list[int] = []
    largest = spread = 0.0
    for i in range(pairs):
        length = np.sqrt(inner(i, i))
        largest = max(largest, length)
        alpha = sum(sign * inner(t, i) for t, sign in enumerate(signs))
        if rule == "simple":
            a = length * largest * (0.5 + level)
        else:
            a = max(length * np.sqrt(spread) * np.sqrt(2 * level), length**2)
            spread += max(0.0, length**2 * (1 + (length**2 - 2 * a) * spread / a**2))
        second = i > 0 and (2 * uniforms[i] - 1) * a <= alpha
        signs.append(-1 if second else 1)
    return [sign < 0 for sign in signs]


def naive_hashed_keys(
    q: Array,
    k: Array,
    planes: Array,
    *,
    scale: float,
    bits: int,
    least: int,
    floor: float = 0.0,
    center: bool = True,
    sinks: int = 0,
    window: int = 0,
    causal: bool = False,
    key_mask: Array | None = None,
) -> tuple[Array, Array]:
    """Return the weights (n_q, n_k) of MagicPIG, zero where no key is kept, and log-sum-exps.

    Every pair is looked at: its codes table by table, its angle, its chance as a binomial sum.
    """
    tables = planes.shape[1] // bits
    exists = np.ones(len(k), bool) if key_mask is None else key_mask
    mean = np.zeros(k.shape[1])
    if center and not causal:
        mean = np.mean([k[j] for j in range(len(k)) if exists[j]], axis=0)
    weights, lse = np.zeros((len(q), len(k))), np.full(len(q), -math.inf)
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if exists[j] and (not causal or j <= i)]
        kept: dict[int, float] = {}
        for place, j in enumerate(seen):
            y = k[j] - mean
            sides = [(float(q[i] @ w) > 0) == (float(y @ w) > 0) for w in planes.T]
            agree = sum(all(sides[t * bits : (t + 1) * bits]) for t in range(tables))
            logit = scale * float(q[i] @ k[j])
            if place < sinks or place >= len(seen) - window:
                kept[j] = logit
            elif agree >= least:
                size = float(np.linalg.norm(q[i]) * np.linalg.norm(y))
                angle = math.acos(min(1.0, max(-1.0, float(q[i] @ y) / size)))
                p = (1 - angle / math.pi) ** bits
                chance = 1 - sum(
                    math.comb(tables, m) * p**m * (1 - p) ** (tables - m) for m in range(least)
                )
                kept[j] = logit - math.log(chance + floor)
        if kept:
            top = max(kept.values())
            total = sum(math.exp(x - top) for x in kept.values())
            lse[i] = top + math.log(total)
            for j, x in kept.items():
                weights[i, j] = math.exp(x - top) / total
    return weights, lse


def naive_budget_sample(
    logits: Array, order: Array, *, top: int, b: int, sinks: int = 0, window: int = 0
) -> tuple[Array, Array]:
    """Return the weights (n_q, n_k) of a fixed budget, and log-sum-exps.

    ``logits`` are -inf where hidden; a row keeps sinks, window, its ``top`` largest other logits,
    and the first b remaining keys of its ``order``.
    """
    weights, lse = np.zeros(logits.shape), np.full(len(logits), -math.inf)
    for i, row in enumerate(logits):
        seen = [j for j in range(len(row)) if row[j] > -math.inf]
        fixed = seen[:sinks] + [
            j for j in seen[max(0, len(seen) - window) :] if j not in seen[:sinks]
        ]
        others = sorted((j for j in seen if j not in fixed), key=lambda j: -row[j])
        fixed += others[:top]
        rest = [int(j) for j in order[i] if j in seen and j not in fixed]
        total_rest = len(seen) - len(fixed)
        drawn = rest[: min(b, total_rest)]
        kept = {j: float(row[j]) for j in fixed}
        kept |= {j: float(row[j]) + math.log(total_rest / len(drawn)) for j in drawn}
        if kept:
            high = max(kept.values())
            total = sum(math.exp(x - high) for x in kept.values())
            lse[i] = high + math.log(total)
            for j, x in kept.items():
                weights[i, j] = math.exp(x - high) / total
    return weights, lse


def naive_mass(q: Array, k: Array, *, scale: float, second_order: bool) -> tuple[float, float]:
    """Return (logarithm of the mass, variance of the logits) of a cluster k of keys for a row q."""
    m, d = k.shape
    kappa = [sum(float(x) for x in k[:, t]) / m for t in range(d)]
    sigma2 = scale**2 * sum(
        float(q[t]) ** 2 * sum((float(x) - kappa[t]) ** 2 for x in k[:, t]) / m for t in range(d)
    )
    radius = max(math.dist([float(x) for x in key], kappa) for key in k)
    length = math.sqrt(sum(float(x) ** 2 for x in q))
    s = max(0.0, NormalDist().inv_cdf((m - 3 / 8) / (m + 1 / 4)))
    sigma = math.sqrt(sigma2)
    phi = sigma2 / 2 if sigma <= s else s * sigma - s * s / 2
    phi = min(phi, abs(scale) * length * radius) if second_order else 0.0
    mean = scale * sum(float(q[t]) * kappa[t] for t in range(d))
    return math.log(m) + mean + phi, sigma2


def naive_nearfar(
    q: Array,
    k: Array,
    v: Array,
    labels: list[int],
    seen: list[dict[str, Any]],
    *,
    scale: float,
    most: int,
    tau: float,
    scores: list[list[float]] | None = None,
    second_order: bool = True,
) -> tuple[Array, Array, list[list[int]]]:
    """Return (weights (n_q, n_k), outputs, near clusters of each row) of near keys and moments.

    Key j is in cluster ``labels[j]``, -1 for none.  ``seen[i]`` has the ``own`` keys of row i and
    the ``clusters`` that it sees.  ``scores`` has, for each direction, a score z_j of each key: the
    slope of row i is ``scale q_i . E[(k - kappa) z] / E[z^2]``, clipped to 1 over the number of
    directions times the largest |z| of the cluster.
    """
    n_q, n_k, d = len(q), len(k), q.shape[1]
    weights = np.zeros((n_q, n_k))
    chosen: list[list[int]] = []

    def members(c: int) -> list[int]:
        return [j for j in range(n_k) if labels[j] == c]

    def mean(c: int) -> list[float]:
        return [sum(float(k[j, t]) for j in members(c)) / len(members(c)) for t in range(d)]

    def logit(i: int, x: Any) -> float:
        return scale * sum(float(q[i, t]) * float(x[t]) for t in range(d))

    for i in range(n_q):
        own = {j: logit(i, k[j]) for j in seen[i]["own"]}
        mass, variance = {}, {}
        for c in seen[i]["clusters"]:
            if not members(c):
                continue
            mass[c], variance[c] = naive_mass(
                q[i], k[members(c)], scale=scale, second_order=second_order
            )
        candidates = sorted(mass, key=lambda c: (-mass[c], c))[:most]
        top = max([*own.values(), *(mass[c] for c in candidates)], default=0.0)
        total = sum(math.exp(x - top) for x in own.values())
        total += sum(math.exp(mass[c] - top) for c in candidates)
        near = [c for c in candidates if math.exp(mass[c] - top) / total * variance[c] >= tau]
        chosen.append(sorted(near))
        terms = dict(own)
        terms |= {j: logit(i, k[j]) for c in near for j in members(c)}
        far = [c for c in mass if c not in near]
        top = max([*terms.values(), *(mass[c] for c in far)], default=0.0)
        total = sum(math.exp(x - top) for x in terms.values())
        total += sum(math.exp(mass[c] - top) for c in far)
        for j, x in terms.items():
            weights[i, j] = math.exp(x - top) / total
        for c in far:
            share = math.exp(mass[c] - top) / total / len(members(c))
            kappa = mean(c)
            slopes = []
            for z in scores or []:
                square = sum(z[j] ** 2 for j in members(c))
                largest = max(abs(z[j]) for j in members(c))
                if square == 0:
                    slopes.append(0.0)
                    continue
                p = [
                    sum((float(k[j, t]) - kappa[t]) * z[j] for j in members(c)) / square
                    for t in range(d)
                ]
                bound = 1 / (len(scores or []) * largest)
                slopes.append(min(max(logit(i, p), -bound), bound))
            for j in members(c):
                tilt = sum(y * z[j] for y, z in zip(slopes, scores or [], strict=True))
                weights[i, j] = share * max(0.0, 1 + tilt)
    return weights, weights @ v.astype(np.float64), chosen


def naive_nearfar_coreset(
    q: Array,
    k: Array,
    labels: list[int],
    pivots: list[int],
    w: Array,
    *,
    scale: float,
    most: int,
    tau: float,
    second_order: bool = True,
) -> tuple[Array, list[list[int]], list[float]]:
    """Return (weights (n_q, n_k), near clusters, normalisers over exact masses) of a coreset.

    ``exp(L_ij)`` is ``sum_s exp(L_is) w_sj`` over the pivots, and itself in near clusters: the
    ``most`` of largest mean weight, of which those stay whose share of the normaliser of the
    pivots, times the variance, is at least tau.
    """
    weights, chosen, ratios = np.zeros((len(q), len(k))), [], []
    for i in range(len(q)):
        logits = [scale * sum(float(x) * float(y) for x, y in zip(q[i], z, strict=True)) for z in k]
        top = max(logits)
        e = [math.exp(x - top) for x in logits]
        for j in range(len(k)):
            weights[i, j] = sum(e[s] * float(w[t, j]) for t, s in enumerate(pivots))
        before, found = sum(weights[i].tolist()), {}
        for c in sorted(set(labels)):
            inside = [j for j in range(len(k)) if labels[j] == c]
            mass, variance = naive_mass(q[i], k[inside], scale=scale, second_order=second_order)
            found[c] = (mass - math.log(len(inside)), mass, variance)
        candidates = sorted(found, key=lambda c: (-found[c][0], c))[:most]
        near = [c for c in candidates if math.exp(found[c][1] - top) * found[c][2] >= tau * before]
        chosen.append(sorted(near))
        read = 0.0
        for j in range(len(k)):
            if labels[j] in near:
                weights[i, j] = e[j]
                read += e[j]
        total = sum(weights[i].tolist())
        ratios.append(total / read if read else math.inf)
        weights[i] /= total
    return weights, chosen, ratios


def naive_two_levels(
    q: Array,
    k: Array,
    v: Array,
    labels: list[int],
    parents: list[int],
    seen: list[dict[str, Any]],
    *,
    scale: float,
    refine: int,
    most: int,
    tau: float,
    scores: list[list[float]],
    second_order: bool = True,
) -> tuple[Array, Array, list[list[int]], list[list[int]]]:
    """Return (weights, outputs, refined coarse clusters, near clusters) of two levels of clusters.

    Key j is in cluster ``labels[j]``, cluster c in coarse cluster ``parents[c]``, -1 for none.
    ``seen[i]`` has the ``own`` keys of row i, the ``clusters`` that it sees directly, and the
    ``coarse`` ones.  Both choices take what has the largest masses, and of it what has a share of
    all that was read before and of the candidates, times a variance, of at least tau; what was
    read before the second choice are own keys and the coarse clusters that are not refined.
    """
    n_q, n_k, d = len(q), len(k), q.shape[1]
    weights = np.zeros((n_q, n_k))
    all_refined: list[list[int]] = []
    all_near: list[list[int]] = []
    normal = NormalDist()

    def logit(i: int, x: Any) -> float:
        return scale * sum(float(q[i, t]) * float(x[t]) for t in range(d))

    keys_of: dict[tuple[str, int], list[int]] = {}
    for j in range(n_k):
        if labels[j] >= 0:
            keys_of.setdefault(("cluster", labels[j]), []).append(j)
            if parents[labels[j]] >= 0:
                keys_of.setdefault(("coarse", parents[labels[j]]), []).append(j)
    means = {
        x: [sum(float(k[j, t]) for j in js) / len(js) for t in range(d)]
        for x, js in keys_of.items()
    }
    variances = {
        x: [sum((float(k[j, t]) - means[x][t]) ** 2 for j in js) / len(js) for t in range(d)]
        for x, js in keys_of.items()
    }
    radius = {
        x: max(math.dist([float(y) for y in k[j]], means[x]) for j in js)
        for x, js in keys_of.items()
    }
    for x in [x for x in keys_of if x[0] == "coarse"]:
        radius[x] = max(
            math.dist(means[c], means[x]) + radius[c]
            for c in keys_of
            if c[0] == "cluster" and parents[c[1]] == x[1]
        )

    def mass(i: int, x: tuple[str, int]) -> tuple[float, float]:
        m = len(keys_of[x])
        sigma2 = scale**2 * sum(float(q[i, t]) ** 2 * variances[x][t] for t in range(d))
        s, sigma = max(0.0, normal.inv_cdf((m - 3 / 8) / (m + 1 / 4))), math.sqrt(sigma2)
        phi = sigma2 / 2 if sigma <= s else s * sigma - s * s / 2
        length = math.sqrt(sum(float(y) ** 2 for y in q[i]))
        phi = min(phi, abs(scale) * length * radius[x]) if second_order else 0.0
        return math.log(m) + logit(i, means[x]) + phi, sigma2

    def choice(
        masses: dict[tuple[str, int], tuple[float, float]], read: list[float], limit: int
    ) -> list[tuple[str, int]]:
        candidates = sorted(masses, key=lambda x: -masses[x][0])[:limit]
        top = max([*read, *(masses[x][0] for x in candidates)], default=0.0)
        total = sum(math.exp(y - top) for y in [*read, *(masses[x][0] for x in candidates)])
        return [x for x in candidates if math.exp(masses[x][0] - top) / total * masses[x][1] >= tau]

    for i in range(n_q):
        own = {j: logit(i, k[j]) for j in seen[i]["own"]}
        coarse = {x: mass(i, x) for c in seen[i]["coarse"] if (x := ("coarse", c)) in keys_of}
        refined = choice(coarse, list(own.values()), refine)
        parts = {c for _, c in refined}
        visible = [*seen[i]["clusters"], *(c for c, x in enumerate(parents) if x in parts)]
        fine = {x: mass(i, x) for c in visible if (x := ("cluster", c)) in keys_of}
        rest = {x: y for x, y in coarse.items() if x not in refined}
        near = choice(fine, [*own.values(), *(y for y, _ in rest.values())], most)
        all_refined.append(sorted(parts))
        all_near.append(sorted(c for _, c in near))
        terms = dict(own) | {j: logit(i, k[j]) for x in near for j in keys_of[x]}
        far = {x: y for x, (y, _) in (rest | fine).items() if x not in near}
        top = max([*terms.values(), *far.values()], default=0.0)
        total = sum(math.exp(y - top) for y in [*terms.values(), *far.values()])
        for j, y in terms.items():
            weights[i, j] = math.exp(y - top) / total
        for x, y in far.items():
            share = math.exp(y - top) / total / len(keys_of[x])
            tilts = dict.fromkeys(keys_of[x], 0.0)
            for z in scores if x[0] == "cluster" else []:
                square = sum(z[j] ** 2 for j in keys_of[x])
                if square == 0:
                    continue
                p = [
                    sum((float(k[j, t]) - means[x][t]) * z[j] for j in keys_of[x]) / square
                    for t in range(d)
                ]
                bound = 1 / (len(scores) * max(abs(z[j]) for j in keys_of[x]))
                slope = min(max(logit(i, p), -bound), bound)
                for j in keys_of[x]:
                    tilts[j] += slope * z[j]
            for j in keys_of[x]:
                weights[i, j] = share * max(0.0, 1 + tilts[j])
    return weights, weights @ v.astype(np.float64), all_refined, all_near


def naive_farthest_first(x: Array, count: int, steps: int) -> list[int]:
    """Return labels of rows by the farthest rows as first centres, then steps of Lloyd."""
    n, rows = len(x), [[float(t) for t in row] for row in x]

    def mean(group: list[int]) -> list[float]:
        return [sum(rows[j][t] for j in group) / len(group) for t in range(x.shape[1])]

    centers: list[list[float]] = []
    far = [math.dist(rows[j], mean(list(range(n)))) for j in range(n)]
    while len(centers) < count and (not centers or max(far) > 0):
        centers.append(rows[far.index(max(far))])
        far = [min(math.dist(row, c) for c in centers) for row in rows]
    labels: list[int] = []
    for step in range(steps + 1):
        distances = [[math.dist(row, c) for c in centers] for row in rows]
        labels = [x.index(min(x)) for x in distances]
        if step < steps:
            groups = [[j for j in range(n) if labels[j] == c] for c in range(len(centers))]
            centers = [mean(g) if g else c for g, c in zip(groups, centers, strict=True)]
    return labels
