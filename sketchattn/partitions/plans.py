"""Plans: which keys a row reads itself, and which through regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ragged import Ragged

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Plan:
    """Hold the direct keys and the regions of every row.

    Parameters
    ----------
    n_k : int
        Number of keys.
    direct : Ragged, n_q lists of keys
        Keys that row i attends to one by one.
    regions : Ragged, r lists of keys
        Sets of keys, each ascending and not empty.
    row_regions : Ragged, n_q lists of regions
        Regions that row i sees through their summaries.
    causal : bool
        Whether row i sees the keys ``j <= i`` only.

    Notes
    -----
    Ren, Dai, Dai, Yang, Leskovec, Schuurmans and Dai (2021), arXiv 2107.05768, section 3, with
    positions counted from 0: read with positions counted from 1, their equation (10) leaves keys
    uncovered.

    Examples
    --------
    >>> from sketchattn.partitions import make_plan
    >>> plan = make_plan("fixed", 5, block=2)
    >>> plan.direct[4].tolist(), [plan.regions[t].tolist() for t in plan.row_regions[4]]
    ([4], [[0, 1], [2, 3]])
    """

    n_k: int
    direct: Ragged
    regions: Ragged
    row_regions: Ragged
    causal: bool = False

    @classmethod
    def from_lists(
        cls,
        n_k: int,
        direct: Sequence[Any],
        regions: Sequence[Any],
        row_regions: Sequence[Any],
        *,
        causal: bool = False,
    ) -> Plan:
        """Return the plan of lists of integers, checked.

        Parameters
        ----------
        n_k : int
        direct, regions, row_regions : sequences of int sequences
            n_q lists of keys, r lists of keys, n_q lists of regions.
        causal : bool

        Raises
        ------
        ValueError
            If a row does not cover the keys that it sees exactly once, or a region is empty.

        Examples
        --------
        >>> Plan.from_lists(3, [[0], [1, 2]], [[1, 2], [0]], [[0], [1]]).n_q
        2
        """
        lists = Ragged.of([np.sort(np.asarray(x, np.int64)) for x in regions])
        plan = cls(n_k, Ragged.of(direct), lists, Ragged.of(row_regions), causal)
        plan.check()
        return plan

    @property
    def n_q(self) -> int:
        """Number of rows."""
        return len(self.direct)

    @property
    def slots(self) -> int:
        """Number of direct keys and regions of all rows: what a product costs."""
        return len(self.direct.items) + len(self.row_regions.items)

    def covered(self, rows: Array | None = None) -> Ragged:
        """Return for each row all keys of its parts, ascending; a key covered twice is there twice.

        Parameters
        ----------
        rows : int array, optional
            Rows to look at, by default all.
        """
        chosen = np.arange(self.n_q) if rows is None else np.asarray(rows)
        mine, far = self.direct.take(chosen), self.row_regions.take(chosen)
        inside = self.regions.take(far.items)
        owner = np.concatenate([mine.owner, np.repeat(far.owner, inside.sizes)])
        return Ragged.grouped(owner, np.concatenate([mine.items, inside.items]), len(chosen))

    def check(self) -> None:
        """Refuse a plan that does not cover the keys of each row exactly once.

        Raises
        ------
        ValueError
        """
        if len(self.row_regions) != self.n_q:
            raise ValueError(
                f"row_regions must have a list for each of the {self.n_q} rows, got "
                f"{len(self.row_regions)}; give empty lists where there is no region"
            )
        if self.causal and self.n_q != self.n_k:
            raise ValueError(
                f"n_q and n_k must be equal in a causal plan, got {self.n_q} and {self.n_k}; "
                f"give a row for each position"
            )
        for label, lists, top in (
            ("direct", self.direct, self.n_k),
            ("regions", self.regions, self.n_k),
            ("row_regions", self.row_regions, len(self.regions)),
        ):
            if len(lists.items) and not 0 <= lists.items.min() <= lists.items.max() < top:
                raise ValueError(
                    f"{label} must hold integers in 0..{top - 1}, got {lists.items.min()}.."
                    f"{lists.items.max()}; count from 0"
                )
        if not self.regions.sizes.all():
            t = int(np.argmin(self.regions.sizes))
            raise ValueError(f"regions must not be empty, got no key in region {t}; drop it")
        covered = self.covered()
        wanted = Ragged.ranges(np.zeros(self.n_q, np.int64), self._ends())
        if np.array_equal(covered.starts, wanted.starts) and np.array_equal(
            covered.items, wanted.items
        ):
            return
        for i in range(self.n_q):
            if not np.array_equal(covered[i], wanted[i]):
                missing = np.setdiff1d(wanted[i], covered[i])
                what = f"no key {missing[0]}" if len(missing) else "a key twice or unseen"
                raise ValueError(
                    f"a plan must cover each key that a row sees exactly once, got {what} in row "
                    f"{i}; check direct, regions and row_regions"
                )

    def _ends(self) -> Array:
        return np.arange(1, self.n_q + 1) if self.causal else np.full(self.n_q, self.n_k)

    def keep(self, mask: Array | None) -> tuple[Plan, Array]:
        """Return the plan without masked keys, and the old number of each region that is left.

        Parameters
        ----------
        mask : bool array (n_k,) or None
            True for the keys to keep.
        """
        regions, old = self.regions, np.arange(len(self.regions))
        direct, row_regions = self.direct, self.row_regions
        if mask is not None:
            direct = direct.select(mask[direct.items])
            regions = regions.select(mask[regions.items])
            row_regions = row_regions.select(regions.sizes[row_regions.items] > 0)
        plan, used = Plan(self.n_k, direct, regions, row_regions, self.causal).used()
        return plan, old[used]

    def used(self) -> tuple[Plan, Array]:
        """Return the plan without regions that no row uses, and the numbers of those left."""
        counts = np.bincount(self.row_regions.items, minlength=len(self.regions))
        left = np.flatnonzero(counts)
        if len(left) == len(self.regions):
            return self, left
        number = np.cumsum(counts > 0) - 1
        rows = Ragged(self.row_regions.starts, number[self.row_regions.items])
        return Plan(self.n_k, self.direct, self.regions.take(left), rows, self.causal), left

    def promote(self, chosen: Array) -> tuple[Plan, Array]:
        """Return the plan in which chosen regions of rows are direct, and what regions are left.

        Parameters
        ----------
        chosen : bool array (number of items of row_regions,)
            True where the row takes that region's keys one by one.
        """
        far = self.row_regions
        owner = far.owner[chosen]
        inside = self.regions.take(far.items[chosen])
        direct = Ragged.grouped(
            np.concatenate([self.direct.owner, np.repeat(owner, inside.sizes)]),
            np.concatenate([self.direct.items, inside.items]),
            self.n_q,
        )
        return Plan(self.n_k, direct, self.regions, far.select(~chosen), self.causal).used()

    def with_window(self, width: int) -> Plan:
        """Return the plan in which row i is direct on all keys it sees with ``|i - j| <= width``.

        What is left of a region that lies partly in the window, before it and after it, are
        regions of their own, to be summarised anew; many rows share them.

        Parameters
        ----------
        width : int
            At least 0.
        """
        far, n = self.row_regions, self.n_k
        # Keys of all regions in one ascending list: region t of n positions from t n on.
        shifted = self.regions.items + n * self.regions.owner
        row, region = far.owner, far.items
        low = np.searchsorted(shifted, region * n + np.maximum(row - width, 0))
        high = np.searchsorted(shifted, region * n + np.minimum(row + width, n - 1) + 1)
        touched = high > low
        near = Ragged.ranges(low[touched], high[touched])
        direct = Ragged.grouped(
            np.concatenate([self.direct.owner, np.repeat(row[touched], near.sizes)]),
            np.concatenate([self.direct.items, self.regions.items[near.items]]),
            self.n_q,
        )
        first, last = self.regions.starts[region[touched]], self.regions.starts[region[touched] + 1]
        sides = np.concatenate(
            [np.stack([first, low[touched]], axis=1), np.stack([high[touched], last], axis=1)]
        )
        rest = sides[:, 1] > sides[:, 0]
        span = len(self.regions.items) + 1
        sets, which = np.unique(sides[rest] @ [span, 1], return_inverse=True)
        new = Ragged.ranges(*np.divmod(sets, span))
        regions = Ragged(
            np.concatenate([self.regions.starts, self.regions.starts[-1] + new.starts[1:]]),
            np.concatenate([self.regions.items, self.regions.items[new.items]]),
        )
        rows = Ragged.grouped(
            np.concatenate([row[~touched], np.tile(row[touched], 2)[rest]]),
            np.concatenate([region[~touched], len(self.regions) + which.reshape(-1)]),
            self.n_q,
        )
        return Plan(n, direct, regions, rows, self.causal).used()[0]
