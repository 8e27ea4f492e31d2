"""Regions as the lists of a plan say, one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...partitions.plans import Plan
from ...partitions.ragged import Ragged
from .layouts import Layout, weights_of
from .passes import Data

Array = NDArray[Any]


class Explicit(Layout):
    """Any plan, by its lists: as large in memory as there are slots."""

    def __init__(self, plan: Plan) -> None:
        self.n_q, self.n_k, self.causal = plan.n_q, plan.n_k, plan.causal
        self._plan = plan
        starts = plan.regions.starts
        self._regions(starts[:-1], starts[1:], plan.regions.items)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held."""
        plan = self._plan
        return super().nbytes + plan.direct.nbytes + plan.regions.nbytes + plan.row_regions.nbytes

    @property
    def count_direct(self) -> bool:
        """Whether some row has direct keys."""
        return len(self._plan.direct.items) > 0

    @property
    def slot_bound(self) -> int:
        """A bound of the slots of one row."""
        sizes = self._plan.direct.sizes + self._plan.row_regions.sizes
        return int(sizes.max(initial=1))

    def plan(self) -> Plan:
        """Return the plan."""
        return self._plan

    def slots(self, rows: Array) -> tuple[Ragged, Ragged]:
        """Return the direct keys and the regions of some rows."""
        return self._plan.direct.take(rows), self._plan.row_regions.take(rows)

    def solve(self, data: Data, x: Array, xhat: Array) -> tuple[Array, Array]:
        """Return ``Ahat X`` and log Zhat."""
        out = np.zeros((self.n_q, x.shape[1]), data.q.dtype)
        lse = np.empty(self.n_q, data.q.dtype)
        for rows in self.chunks():
            mine, theirs, lse[rows] = weights_of(self, data, rows)
            if x.shape[1]:
                out[rows] = mine @ x + theirs @ xhat
        return out, lse

    def transposed(
        self, data: Data, y: Array, lse: Array, *, only_far: bool = False
    ) -> tuple[Array, Array]:
        """Return the two parts of ``Ahat^T Y``."""
        return self.transposed_by_rows(data, y, only_far=only_far)

    def gather(self, z: Array, out: Array) -> None:
        """Add ``sum_t lam_t(j) z_t`` to ``out``."""
        out += self.local_weights(np.arange(len(self.lo))).T @ z
