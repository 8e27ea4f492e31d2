"""Rows whose logits are too large for a kernel: each is solved in double, from natural logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..operators.reference import masked_logits, softmax_rows
from ..operators.steep import STEEP, TILE, norms_of
from .call import Terms
from .hidden import seen_by

Array = NDArray[Any]


def solve_steep(out: Array, lse: Array, q: Array, k: Array, v: Array, terms: Terms) -> None:
    """Put steep rows into the output (H, n_q, d_v) and logsumexp (H, n_q) of a kernel.

    A row is steep where ``|scale| |q_i| max_j |k_j|`` over the keys that it sees, or its
    logsumexp, is above STEEP: float32 then has not the digits that tell its weights, and in base
    2 a logit has a rounding of its own.  What a row does not see decides nothing; one that sees a
    key that is not finite is left as it is.
    """
    if lse.size == 0:
        return
    keys = np.arange(k.shape[1])
    with np.errstate(all="ignore"):
        sizes = np.abs(terms.scale) * np.stack([norms_of(x) for x in q])
        reach = np.stack([norms_of(x) for x in k])
        # Finite keys alone: where another one is seen the bound of a tile below is not finite.
        most = np.where(np.isfinite(reach), reach, 0).max(axis=1, initial=0.0)
        large = np.isfinite(lse) & (np.abs(lse) > STEEP)
        may = large | (sizes * np.repeat(most, terms.group)[:, None] > STEEP)
    for h in np.flatnonzero(may.any(axis=1)):
        k_h, v_h = (x[h // terms.group].astype(np.float64) for x in (k, v))
        sink = None if terms.sink is None else float(terms.sink[h])
        for tile in np.unique(np.flatnonzero(may[h]) // TILE):
            rows = np.arange(tile * TILE, min((tile + 1) * TILE, q.shape[1]))
            seen, bias = seen_by(terms, int(h), rows, keys)
            with np.errstate(all="ignore"):
                seen_reach = np.where(seen, reach[h // terms.group], 0).max(axis=1, initial=0.0)
                bound = sizes[h, rows] * seen_reach
            steep = np.isfinite(bound) & ((bound > STEEP) | large[h, rows])
            logits = masked_logits(
                q[h, rows].astype(np.float64),
                k_h,
                scale=terms.scale,
                softcap=terms.softcap,
                bias=bias,
                seen=seen,
            )
            weights, normalizer = softmax_rows(logits, seen, sink)
            out[h, rows[steep]] = (weights @ v_h)[steep]
            lse[h, rows[steep]] = normalizer[steep]
