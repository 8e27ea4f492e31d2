"""What masks hide may be non-finite: it reaches the rows that see it, and no others."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..kernels._threads import product
from .call import Terms

Array = NDArray[Any]

# Entries of a block of logits, or of visible entries, of chosen rows.
_BLOCK_ENTRIES = 1 << 20


def seen_by(terms: Terms, h: int, rows: Array, keys: Array) -> tuple[Array, Array | None]:
    """Return the visible set (rows, keys) of a head, and the bias there."""
    p = rows[:, None] + int(terms.first[h])
    seen = np.ones((len(rows), len(keys)), bool)
    if terms.left is not None:
        seen &= keys[None, :] >= p - terms.left
    if terms.right is not None:
        seen &= keys[None, :] <= p + terms.right
    if terms.key_mask is not None:
        seen &= terms.key_mask[terms.key_slab[h]][keys]
    bias = None
    if terms.mask is not None:
        mask = terms.mask[terms.mask_slab[h]]
        mask = mask[rows if mask.shape[0] > 1 else np.zeros_like(rows)]
        mask = mask[:, keys if mask.shape[1] > 1 else np.zeros_like(keys)]
        seen &= mask if mask.dtype == np.bool_ else mask != -np.inf
        bias = None if mask.dtype == np.bool_ else mask
    return seen, bias


def _reach(n_q: int, n_k: int, terms: Terms) -> tuple[Array, Array]:
    """Return which keys every row of a head sees, and which some row may see: both (H, n_k)."""
    key = np.arange(n_k)
    first = terms.first[:, None]
    everyone, someone = np.ones((2, len(first), n_k), bool)
    if terms.left is not None:
        everyone &= key >= first + n_q - 1 - terms.left
        someone &= key >= first - terms.left
    if terms.right is not None:
        everyone &= key <= first + terms.right
        someone &= key <= first + n_q - 1 + terms.right
    if terms.key_mask is not None:
        keep = terms.key_mask[terms.key_slab]
        everyone &= keep
        someone &= keep
    if terms.mask is not None:
        seen = terms.mask if terms.mask.dtype == np.bool_ else terms.mask != -np.inf
        everyone &= np.asarray(seen.all(axis=1))[terms.mask_slab]
        someone &= np.asarray(seen.any(axis=1))[terms.mask_slab]
    return everyone, someone


def without_hidden(n_q: int, k: Array, v: Array, terms: Terms) -> tuple[Array, Array]:
    """Return k and v with zeros where no query looks; refuse non-finite ones that all see."""
    grouped = (k.shape[0], terms.group, k.shape[1])
    everyone, someone = (x.reshape(grouped) for x in _reach(n_q, k.shape[1], terms))
    for label, x in (("k", k), ("v", v)):
        wrong = np.argwhere(~np.isfinite(x).all(axis=2) & everyone.all(axis=1))
        if len(wrong):
            raise ValueError(
                f"{label} must be finite where every query sees it, got a non-finite entry at "
                f"key {wrong[0, 1]} of key head {wrong[0, 0]}; replace it, or hide the key with a "
                f"mask"
            )
    shown: Array = np.expand_dims(someone.any(axis=1), 2)
    return np.where(shown, k, k.dtype.type(0)), np.where(shown, v, v.dtype.type(0))


def lost_rows(lse: Array, n_k: int, terms: Terms) -> Array:
    """Return the rows (H, n_q) that see a key and whose logits are -inf all the same.

    Such logits overflowed: what is empty is decided by masks, not by sums.
    """
    lost: Array = np.isneginf(lse)
    step = max(1, _BLOCK_ENTRIES // max(1, n_k))
    for h in np.flatnonzero(lost.any(axis=1)):
        rows = np.flatnonzero(lost[h])
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            lost[h, part] = seen_by(terms, int(h), part, np.arange(n_k))[0].any(axis=1)
    return lost


def add_non_finite(out: Array, lse: Array, q: Array, k: Array, v: Array, terms: Terms) -> None:
    """Add ``A_ij v_jc`` of non-finite values ``v_jc`` to the rows that see key j.

    The sum over j is NaN if a value is, if a weight is zero or NaN, or if both infinities meet.
    """
    n_q = q.shape[1]
    for h in range(q.shape[0]):
        k_h, v_h = k[h // terms.group], v[h // terms.group]
        keys = np.flatnonzero(~(np.isfinite(k_h).all(axis=1) & np.isfinite(v_h).all(axis=1)))
        up, down, nan = (
            x.astype(np.float32)
            for x in (v_h[keys] == np.inf, v_h[keys] == -np.inf, np.isnan(v_h[keys]))
        )
        step = max(1, _BLOCK_ENTRIES // max(1, len(keys)))
        for start in range(0, n_q if len(keys) else 0, step):
            block = slice(start, min(start + step, n_q))
            seen, bias = seen_by(terms, h, np.arange(n_q)[block], keys)
            with np.errstate(all="ignore"):
                logits = terms.scale * product(q[h, block], k_h[keys].T)
                if terms.softcap > 0:
                    logits = terms.softcap * np.tanh(logits / terms.softcap)
                if bias is not None:
                    logits = logits + bias
                weight = np.exp(logits - lse[h, block, None])
            positive = (seen & (weight > 0)).astype(np.float32)
            other = seen.astype(np.float32) - positive
            high, low = product(positive, up) > 0, product(positive, down) > 0
            lost = product(seen.astype(np.float32), nan) + product(other, up + down) > 0
            lost |= high & low
            # Logits of -inf alone leave no weight to divide by; an empty row sees no key.
            void = np.isneginf(lse[h, block]) & seen.any(axis=1)
            lse[h, block][void] = np.nan
            lost |= void[:, None]
            high, low = high & ~lost, low & ~lost
            target = out[h, block]
            for where, value in ((lost, np.nan), (high, np.inf), (low, -np.inf)):
                target[where & ~np.isnan(target)] = value
