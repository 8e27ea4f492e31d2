"""Records of regions, which merge exactly."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Record(NamedTuple):
    """Hold what merges exactly: sums over a key set with one reference query.

    With ``e_j = scale q0 . k_j``, ``M = max e_j`` and ``w_j = exp(e_j - M)``.  Axes in front are
    many sets at once.

    Attributes
    ----------
    top : float64 array (...)
        M, -inf for the empty set.
    weight : float64 array (...)
        ``sum w_j``.
    keys, values : float64 arrays (..., d), (..., m)
        ``sum w_j k_j`` and ``sum w_j x_j``.
    energy : float64 array (...)
        ``sum w_j (e_j - M)``.
    """

    top: Array
    weight: Array
    keys: Array
    values: Array
    energy: Array

    @classmethod
    def of(cls, e: Array, k: Array, x: Array) -> Record:
        """Return the record of one set from e (m,), k (m, d) and x (m, width)."""
        e, k, x = (np.asarray(y, np.float64) for y in (e, k, x))
        top = e.max(initial=-np.inf)
        w = np.exp(e - top) if len(e) else e
        energy = float(w @ (e - top)) if len(e) else 0.0
        return cls(np.asarray(top), np.asarray(w.sum()), w @ k, w @ x, np.asarray(energy))

    def merge(self, other: Record) -> Record:
        """Return the record of the union with a disjoint set of the same reference query."""
        top = np.maximum(self.top, other.top)
        parts = []
        for one in (self, other):
            some = one.weight > 0
            shift = np.where(some, one.top, 0) - np.where(some, top, 0)
            factor = np.where(some, np.exp(np.minimum(shift, 0)), 0)
            parts.append((one, factor, shift))
        return Record(
            top,
            sum((f * one.weight for one, f, _ in parts), np.zeros(())),
            sum((f[..., None] * one.keys for one, f, _ in parts), np.zeros(())),
            sum((f[..., None] * one.values for one, f, _ in parts), np.zeros(())),
            sum((f * (one.energy + s * one.weight) for one, f, s in parts), np.zeros(())),
        )

    def read(self, size: Array | int) -> tuple[Array, Array, Array]:
        """Return ``(kappa, xhat, H(lam))``; ``size`` is the number of keys of each set.

        ``H = ln W - E / W``: the equal form ``M + ln W - scale q0 . kappa`` loses digits where
        logits are large.
        """
        weight = np.where(self.weight > 0, self.weight, 1)
        kappa, xhat = self.keys / weight[..., None], self.values / weight[..., None]
        entropy = np.log(weight) - self.energy / weight
        return kappa, xhat, np.clip(entropy, 0.0, np.log(np.maximum(size, 1)))
