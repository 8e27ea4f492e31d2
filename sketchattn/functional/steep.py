"""Rows whose logits are too large for a kernel: each is solved in double, from natural logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..kernels._threads import blas_single_thread
from ..operators.reference import masked_logits, softmax_rows
from ..operators.steep import STEEP, TILE, norms_of
from .call import Terms
from .hidden import seen_by

Array = NDArray[Any]


def may_be_steep(lse: Array, q: Array, k: Array, terms: Terms) -> bool:
    """Say whether some row may be steep, judged by all keys, also by those that it does not see."""
    return lse.size > 0 and bool(_may_be_steep(lse, *_sizes(q, k, terms), terms).any())


def _sizes(q: Array, k: Array, terms: Terms) -> tuple[Array, Array]:
    """Return ``|scale| |q_i|`` (H, n_q) and ``|k_j|`` (H_kv, n_k)."""
    with np.errstate(all="ignore"):
        return np.abs(terms.scale) * np.stack([norms_of(x) for x in q]), np.stack(
            [norms_of(x) for x in k]
        )


def _may_be_steep(lse: Array, sizes: Array, reach: Array, terms: Terms) -> Array:
    """Return the rows (H, n_q) that are steep if they see all finite keys."""
    # Where another one is seen the bound of a tile is not finite.
    most = np.where(np.isfinite(reach), reach, 0).max(axis=1, initial=0.0)
    with np.errstate(all="ignore"):
        found: Array = _large(lse) | (sizes * np.repeat(most, terms.group)[:, None] > STEEP)
    return found


def _large(lse: Array) -> Array:
    return np.isfinite(lse) & (np.abs(lse) > STEEP)


@blas_single_thread()
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
    sizes, reach = _sizes(q, k, terms)
    large, may = _large(lse), _may_be_steep(lse, sizes, reach, terms)
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
