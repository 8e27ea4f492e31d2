"""A decoder's keys in blocks: each is clustered once, when it is complete."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...kernels._threads import deal, deal_without_blas
from ...kernels.decoding import PANEL, nearfar_rows
from ...kernels.nearfar import values_of
from ...kernels.softmax import LOG2E
from ...operators.nearfar import Clusters
from ...problem import AttentionProblem
from ..decoding import DecodingState, with_room
from .regions import Sizes, clustered

Array = NDArray[Any]

# A step of a decoder costs what it reads, where a row of many costs what it computes: smaller
# clusters, more of them near, and one candidate for so many keys of a block.
STEP_CLUSTERS, STEP_TAU, STEP_NEAR = 16, 0.003, 8


class NearFarState(DecodingState):
    """Hold keys and values of complete blocks by clusters, with their moments, and the last block.

    Parameters
    ----------
    problem : AttentionProblem
    sizes : Sizes
        Keys of a block, its clusters, and how many a row may read key by key, of how many keys.
    tau : float
    directions : int
        Of the first-order correction.
    second_order : bool
    """

    def __init__(
        self,
        problem: AttentionProblem,
        sizes: Sizes,
        tau: float,
        directions: int,
        second_order: bool,
    ) -> None:
        self.sizes, self.tau = sizes, tau
        self._directions, self._second_order = directions, second_order
        self._limit = float(np.finfo(problem.dtype).max) / 2
        h, d, dtype = directions, problem.d, problem.dtype
        self._place = np.zeros(0, np.int32)
        self._starts = np.zeros(1, np.int64)
        self._far = np.zeros((0, 2 + h, d, PANEL), dtype)
        self._terms = np.zeros((3 + h, 0), dtype)
        self._means = np.zeros((1 + h, 0, problem.values.shape[1]), dtype)
        super().__init__(problem)

    def _hold(self, k: Array, v: Array) -> None:
        block, before = self.sizes.block, self._held
        self._store(k, v)
        self._place = with_room(self._place, self._held)
        self._place[before : self._held] = np.arange(before, self._held)
        if self._held // block > before // block:
            self._cluster(before // block, self._held // block)

    def _cluster(self, done: int, full: int) -> None:
        """Cluster the blocks ``done .. full - 1``, and sort their keys."""
        block, per = self.sizes[:2]
        low, high, count = done * block, full * block, (full - done) * per
        k, v, dtype = self._keys[low:high], self._values[low:high], self.dtype
        blocks = np.arange(full - done + 1)
        labels, _, _ = clustered(k, blocks * block, blocks * per)
        m = Clusters(labels, count, None, self._directions, self._second_order).moments(k)
        ordered, vbar = np.empty_like(v), np.empty((count, self.d_v), dtype)
        beta = np.empty((self._directions, count, self.d_v), dtype)
        work = v.size * (1 + self._directions)
        deal(values_of, v, m.members, m.starts, m.z, ordered, vbar, beta, work=work)
        self._keys[low:high], self._values[low:high] = k[m.members], ordered
        self._place[low:high] = low + m.members
        # Clusters behind those that there are.
        first, last = done * per, full * per
        new = np.arange(first, last)
        self._starts = with_room(self._starts, last + 1)
        self._starts[new + 1] = low + m.starts[1:]
        self._far = with_room(self._far, -(-last // PANEL))
        for i, table in enumerate((m.kappa, m.half, *m.p)):
            self._far[new // PANEL, i, :, new % PANEL] = table[:, :count].T
        self._terms = with_room(self._terms, len(self._far) * PANEL, 1)
        self._terms[2, last:] = -np.inf
        for i, term in enumerate((m.rho, m.frozen, m.bits, *m.bound)):
            self._terms[i, first:last] = term[:count]
        self._means = with_room(self._means, last, 1)
        self._means[0, first:last], self._means[1:, first:last] = vbar, beta

    def _attend(self, q: Array, stops: Array, most: float, out: Array) -> None:
        if not abs(self.scale) * self.d * most <= self._limit:
            for _ in self._wide_logits(q, stops, self._place[: self._held]):
                pass  # what it refuses no kernel can tell from a key that is hidden
        block, per, near, room = self.sizes
        read = block + 2 * self._held // block * per + near * block // per
        deal_without_blas(
            nearfar_rows, q, stops, self._keys, self._values, self._place, self._held,
            self._starts, self._far, self._terms, self._means, block, per,
            float(self.scale * LOG2E), near, self.tau, self._held if room is None else room, out,
            work=len(q) * self._work(read),
        )  # fmt: skip
