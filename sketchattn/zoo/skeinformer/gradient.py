"""The gradient of Skeinformer at fixed columns and pilot rows.

A row of the adaptive form is a softmax over the sampled logits S and one more slot, all other keys
of the row, with the logit ``f = ln(rest g)`` and the mean u of their values.  What reaches f goes
on to S where g is a mean of sampled entries, ``df/dS_t = 1/seen`` or ``exp(S_t)/sum exp(S)``, and
to the logits of the others where g is theirs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.draws import Draw
from ...kernels._threads import map_pieces
from ...operators.pullback import (
    Gradient,
    Sight,
    chosen_pullback,
    columns_pullback,
    row_tiles,
    rows_pullback,
    softmax_pullback,
    zero_gradient,
)
from ...operators.sampled import SampledAttention
from ...problem import AttentionProblem
from .components import Components
from .products import merged, restricted

Array = NDArray[Any]


def gradient(
    c: Components, problem: AttentionProblem, draw: Draw, g: Array, center: bool
) -> Gradient:
    """Return what a cotangent G (n_q, d_v) of the output is at Q, K and V, in float64."""
    if len(problem.kept_keys) == 0:
        return zero_gradient(problem)
    columns, factors = merged(draw)
    exact = zero_gradient(problem)
    if c.pilot_reuse:
        rows = np.unique(draw["pilot_rows"])
        exact = rows_pullback(problem, rows, problem.values, g[rows])
        g = g.copy()
        g[rows] = 0
    if c.normalizer == "adaptive":
        made = _adaptive(c.fill, problem, columns, g)
    elif c.normalizer == "sampled":
        made = columns_pullback(problem, columns, g, factors)
    else:
        weights = np.ones(len(columns)) if factors is None else factors
        if center and c.weights == "importance":
            made = _centred(problem, columns, weights, g)
        else:
            made = chosen_pullback(problem, columns, weights, g)
    return Gradient(*(x + y for x, y in zip(exact, made, strict=True)))


def _centred(problem: AttentionProblem, columns: Array, weights: Array, g: Array) -> Gradient:
    """Return the gradient of ``A_J diag(w) (V_J - 1 m^T) + 1 m^T``, m the mean of the values."""
    v, kept = problem.values, problem.kept_keys
    x = np.zeros(v.shape)
    x[columns] = weights[:, None] * (v[columns] - v[kept].mean(axis=0))
    made = rows_pullback(problem, None, x, g)
    dv, inside = np.zeros(v.shape), weights[:, None] * made.v[columns]
    dv[columns] = inside
    dv[kept] += (g.sum(axis=0) - inside.sum(axis=0)) / len(kept)
    return made._replace(v=dv)


def _adaptive(fill: str, problem: AttentionProblem, columns: Array, g: Array) -> Gradient:
    """Return the gradient of rows that are filled; columns ascend."""
    q, k, v = problem.q, problem.k, problem.values
    scale, n_q, n_k = problem.scale, problem.n_q, problem.n_k
    others = np.ones(n_k, bool) if problem.key_mask is None else problem.key_mask.copy()
    others[columns] = False
    last = np.arange(n_q) + problem.offset if problem.causal else np.full(n_q, n_k)
    seen = np.searchsorted(columns, last, side="right")
    rest = problem.visible_counts() - seen

    def spread(weights: Array) -> SampledAttention:
        """Return the matrix with a weight a row on each of the other keys that it sees."""
        none, offset = np.zeros(0, np.int64), problem.offset if problem.causal else None
        return SampledAttention(
            none, np.zeros((n_q, 0)), n_k, fill=weights, keys=others, offset=offset
        )

    beyond = np.asarray(spread(1.0 / np.maximum(rest, 1)) @ v)
    tail = np.full(n_q, -np.inf)
    if fill == "oracle":
        tail = restricted(problem, others, with_values=False).logsumexp
    keys = np.ascontiguousarray(k[columns].T)
    values = np.ascontiguousarray(v[columns].T)
    outside, dtail, dq = np.zeros(n_q), np.zeros(n_q), np.zeros(q.shape)

    def work(tile: slice) -> tuple[Array, Array]:
        s = (scale * q[tile]) @ keys
        count, more = seen[tile, None], rest[tile, None]
        hidden = np.arange(len(columns)) >= count
        s[hidden] = -np.inf
        high = np.maximum(s.max(axis=1, initial=-np.inf), tail[tile])[:, None]
        high = np.where(np.isneginf(high), 0.0, high)
        part, logs = np.exp(s - high), np.where(hidden, 0.0, s - high)
        inside = part.sum(axis=1, keepdims=True)
        if fill == "oracle":
            slot = np.exp(tail[tile, None] - high)
        elif fill == "arithmetic":
            slot = more * np.where(count > 0, inside / np.maximum(count, 1), 1.0)
        else:
            # A row that sees no sampled column weighs all others alike: exp(0) each.
            slot = more * np.exp(logs.sum(axis=1, keepdims=True) / np.maximum(count, 1))
        total = inside + slot
        total[total == 0] = 1.0
        weights, slot = part / total, slot / total
        change = g[tile] @ values
        change_slot = np.einsum("ij,ij->i", g[tile], beyond[tile])[:, None]
        delta = np.sum(weights * change, axis=1, keepdims=True) + slot * change_slot
        ds, df = weights * (change - delta), slot * (change_slot - delta)
        if fill == "oracle":
            dtail[tile] = df[:, 0]
        elif fill == "arithmetic":
            ds += df * part / np.where(inside > 0, inside, 1.0)
        else:
            ds += np.where(hidden, 0.0, df / np.maximum(count, 1))
        outside[tile] = slot[:, 0] / np.maximum(more[:, 0], 1)
        dq[tile] = scale * (ds @ keys.T)
        return scale * (ds.T @ q[tile]), weights.T @ g[tile]

    dk, dv = np.zeros(k.shape), np.zeros(v.shape)
    for dk_part, dv_part in map_pieces(work, row_tiles(n_q, len(columns))):
        dk[columns] += dk_part
        dv[columns] += dv_part
    dv += spread(outside).T @ g
    if fill == "oracle":
        positions = np.flatnonzero(others)
        none = np.zeros((len(positions), 0))
        sight = Sight(positions, last) if problem.causal else None
        made = softmax_pullback(
            q, k[positions], none, np.zeros((n_q, 0)), scale, sight=sight, lse=dtail
        )
        dq += made.q
        dk[positions] += made.k
    return Gradient(dq, dk, dv)
