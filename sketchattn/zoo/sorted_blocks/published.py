"""ApproxD: the published estimate of the normalisers, in logarithms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from ...base.head import Head
from ...operators.steep import norms_of
from .laws import square_shares
from .layout import Blocks, Sample

Array = NDArray[Any]

# Entries of the exact matrix that are held at a time.
ENTRIES = 1 << 22
EPS = 0.5


def value_shares(values: Array) -> Array:
    """Return ``|v_j|^2/|V|_F^2`` (n_k,), uniform where all are zero."""
    return square_shares(norms_of(values))


def split_sums(head: Head, blocks: Blocks) -> tuple[Array, Array]:
    """Return the logarithms of the row sums of ``e^L`` on the own block and off it, (n_q,) each.

    float64, -inf where there is nothing to sum; all of ``Q K^T`` is formed, some rows at a time.
    """
    q, k, _ = head.astype(np.float64).arrays
    on, off = np.empty(len(q)), np.empty(len(q))
    step = max(1, ENTRIES // max(1, len(k)))
    for start in range(0, len(q), step):
        part = slice(start, start + step)
        with np.errstate(under="ignore"):
            logits = head.scale * (q[part] @ k.T)
        own = blocks.queries[part, None] == blocks.keys
        for out, keep in ((on, own), (off, ~own)):
            out[part] = _row_logsumexp(np.where(keep, logits, -np.inf))
    return on, off


def _row_logsumexp(logits: Array) -> Array:
    with np.errstate(divide="ignore", under="ignore"):
        return np.asarray(logsumexp(logits, axis=1))


def approximate_normalizers(
    head: Head,
    blocks: Blocks,
    rows: Array,
    sample: Sample,
    draws: int,
    *,
    eps: float = EPS,
    factor: float = 1.0,
    sums: tuple[Array, Array] | None = None,
) -> Array:
    """Return ``ln D_i`` (n_q,) by the published algorithm, float64.

    With s draws of keys, block sums B_i, ``tau = max_{i in T} R_i`` and kappa the quotient of the
    largest and the smallest R_i, the sums off the block: ``C_i = factor eps^2 s/(n ln n) (tau/kappa
    + B_i)``, ``d_i = (n/s) sum_t (1 - M_{i l_t}) min(e^{L_{i l_t}}, C_i)``, ``D_i = B_i + max(d_i,
    tau/kappa)``.

    Parameters
    ----------
    head : Head
        Without a mask.
    blocks : Blocks
    rows : int array
        T.
    sample : Sample
        Distinct keys of uniform draws, the weight of each ``n/s`` times its draws.
    draws : int
        s.
    eps, factor : float
    sums : (ndarray, ndarray), optional
        What `split_sums` returns.
    """
    q, k, _ = head.astype(np.float64).arrays
    on, off = split_sums(head, blocks) if sums is None else sums
    if blocks.number == 1:  # nothing is off the block
        return on
    n = len(k)
    least = off[rows].max(initial=-np.inf) - (off.max() - off.min())
    cap = np.logaddexp(least, on) + math.log(max(factor * eps**2 * draws, 1e-300))
    cap -= math.log(n * math.log(n))
    with np.errstate(under="ignore"):
        logits = head.scale * (q @ k[sample.columns].T)
    logits = np.minimum(logits, cap[:, None]) + np.log(sample.weights)
    logits[blocks.queries[:, None] == blocks.keys[sample.columns]] = -np.inf
    return np.asarray(np.logaddexp(on, np.maximum(_row_logsumexp(logits), least)))
