"""What a mask over all pairs of queries and keys says, in the two words that methods know.

Arrays in, arrays out: no framework is needed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import Causal

Array = NDArray[Any]


@dataclass(frozen=True)
class Seen:
    """Say what queries see: the first ``keys`` keys, less masked ones, less later ones if causal.

    Attributes
    ----------
    causal : bool or {"top-left", "bottom-right"}
        As for ``sketchattn.attention``.
    key_mask : bool array (B, keys) or None
        Keys to keep; None keeps all.
    keys : int
        Keys after these are slots of a cache that nothing is in yet: no query sees them.
    """

    causal: Causal
    key_mask: Array | None
    keys: int


def read_mask(mask: Array, *, cached: bool = False) -> Seen | None:
    """Return what a boolean mask (B, n_q, n_k) says, None if that is something else.

    The visible set is exactly that of the mask: key padding is a row that all queries share, and
    what is causal is a triangle cut by the row of the last query, which sees all kept keys.  The
    triangle ends at the last key, or at the last key that anybody sees.

    Parameters
    ----------
    mask : bool array (B, n_q, n_k)
        True where a query sees a key.
    cached : bool
        Keys may be slots of a cache: at the end, those that no query sees are left out.
    """
    entries, n_q, n_k = mask.shape
    if 0 in mask.shape:
        return Seen(False, None, n_k)
    last = mask[:, -1]
    used = int(np.flatnonzero(mask.any(axis=(0, 1))).max(initial=n_q - 1)) + 1
    if n_q == 1 or bool((mask == last[:, None]).all()):
        keys = used if cached and n_q < n_k else n_k
        return Seen(False, _some(last[:, :keys]), keys)
    for keys in dict.fromkeys((n_k, used)):
        triangle = np.tri(n_q, keys, keys - n_q, dtype=bool)
        if keys >= n_q and np.array_equal(mask[:, :, :keys], triangle & last[:, None, :keys]):
            return Seen(keys == n_q or "bottom-right", _some(last[:, :keys]), keys)
    return None


def _some(kept: Array) -> Array | None:
    """Return a mask of keys, None where it keeps all."""
    return None if bool(kept.all()) else np.ascontiguousarray(kept)
