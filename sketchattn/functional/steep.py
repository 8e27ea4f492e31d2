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


def may_be_steep(lse: Array, q: Array, k: Array, terms: Terms, most: float) -> Array:
    """Return the heads (H,) that may have a steep row, by all keys, seen or not; none is missed.

    ``most = max |q| max |k|``, by which nearly all calls end without another look at q and k.
    """
    limits = np.finfo(q.dtype)
    with np.errstate(all="ignore"):
        if is_small(q.shape[2], most, terms):
            return np.asarray(_large(lse).any(axis=1))
        # Squares that underflow are below tiny, and sums are off by a factor 1 + d eps at most.
        norms = (
            np.sqrt(
                np.einsum("hic,hic->hi", x, x).max(axis=1, initial=0) + x.shape[2] * limits.tiny
            )
            for x in (q, k)
        )
        size, reach = (x.astype(np.float64) for x in norms)
        bound = np.abs(terms.scale) * size * np.repeat(reach, terms.group)
        small = bound <= STEEP * (1 - 2 * q.shape[2] * float(limits.eps))  # False for NaN
    found: Array = ~small | _large(lse).any(axis=1)
    return found


def is_small(d: int, most: float, terms: Terms) -> bool:
    """Say whether no logit is large: ``|q_i| |k_j| <= d max |q| max |k|``, d times ``most``."""
    return d * most * abs(terms.scale) <= STEEP / 2


def is_calm(lse: Array) -> bool:
    """Say whether every row sees a key and has a logsumexp that is a number of ordinary size."""
    if not lse.size:
        return True
    return bool(lse.min() >= -STEEP and lse.max() <= STEEP)  # False for NaN


def _large(lse: Array) -> Array:
    return np.isfinite(lse) & (np.abs(lse) > STEEP)


def solve_steep(
    out: Array, lse: Array, q: Array, k: Array, v: Array, terms: Terms, most: float
) -> None:
    """Put steep rows into the output (H, n_q, d_v) and logsumexp (H, n_q) of a kernel.

    A row is steep where ``|scale| |q_i| max_j |k_j|`` over the keys that it sees, or its
    logsumexp, is above STEEP: float32 then has not the digits that tell its weights, and in base
    2 a logit has a rounding of its own.  What a row does not see decides nothing; one that sees a
    key that is not finite is left as it is.
    """
    keys = np.arange(k.shape[1])
    for h in np.flatnonzero(may_be_steep(lse, q, k, terms, most)):
        k_h, v_h = (x[h // terms.group].astype(np.float64) for x in (k, v))
        with np.errstate(all="ignore"):
            sizes, reach = np.abs(terms.scale) * norms_of(q[h]), norms_of(k_h)
            # Finite keys alone: where another one is seen the bound of a row is not finite.
            most = np.where(np.isfinite(reach), reach, 0).max(initial=0.0)
            large = _large(lse[h])
            may = large | (sizes * most > STEEP)
        sink = None if terms.sink is None else float(terms.sink[h])
        for tile in np.unique(np.flatnonzero(may) // TILE):
            rows = np.arange(tile * TILE, min((tile + 1) * TILE, q.shape[1]))
            seen, bias = seen_by(terms, int(h), rows, keys)
            with np.errstate(all="ignore"):
                bound = sizes[rows] * np.where(seen, reach, 0).max(axis=1, initial=0.0)
            steep = np.isfinite(bound) & ((bound > STEEP) | large[rows])
            with blas_single_thread():
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
