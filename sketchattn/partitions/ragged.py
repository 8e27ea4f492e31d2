"""Lists of different lengths in one array."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Ragged:
    """Hold lists of integers of unequal length, one after another.

    Parameters
    ----------
    starts : int64 array (n + 1,)
        List i is ``items[starts[i] : starts[i + 1]]``.
    items : int64 array (starts[-1],)

    Examples
    --------
    >>> lists = Ragged.of([[3, 1], [], [2]])
    >>> len(lists), lists[0].tolist(), lists.sizes.tolist()
    (3, [3, 1], [2, 0, 1])
    """

    starts: Array
    items: Array

    @classmethod
    def of(cls, lists: Iterable[Any]) -> Ragged:
        """Return the lists of a sequence of integer sequences."""
        arrays = [np.asarray(x, np.int64).reshape(-1) for x in lists]
        starts = np.concatenate([[0], np.cumsum([len(x) for x in arrays], dtype=np.int64)])
        return cls(starts.astype(np.int64), np.concatenate([np.zeros(0, np.int64), *arrays]))

    @classmethod
    def grouped(cls, owner: Array, items: Array, n: int) -> Ragged:
        """Return list ``owner[p]`` with ``items[p]`` for every p; each list ascends."""
        # One sort of pairs written as one number; far below 2^63 for any plan that fits in memory.
        width = int(items.max(initial=0)) + 1
        pairs = np.sort(owner.astype(np.int64) * width + items)
        counts = np.bincount(owner, minlength=n)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(starts, pairs % width)

    @classmethod
    def ranges(cls, lows: Array, highs: Array) -> Ragged:
        """Return ``lows[i], ..., highs[i] - 1`` for every i."""
        sizes = np.maximum(np.asarray(highs) - lows, 0)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
        return cls(starts, np.repeat(lows, sizes).astype(np.int64) + within)

    @property
    def sizes(self) -> Array:
        """Lengths of the lists, int64 (n,)."""
        return np.diff(self.starts)

    @property
    def owner(self) -> Array:
        """The list that each item is in, int64 (number of items,)."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Array:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.items[self.starts[index] : self.starts[index + 1]]

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(len(self)))

    def take(self, index: Array) -> Ragged:
        """Return the lists ``index[0], index[1], ...``."""
        inner = Ragged.ranges(self.starts[index], self.starts[np.asarray(index) + 1])
        return Ragged(inner.starts, self.items[inner.items])

    def select(self, keep: Array) -> Ragged:
        """Return the lists with only those items for which ``keep`` (number of items,) is True."""
        total = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)
        return Ragged(total[self.starts], self.items[keep])

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return int(self.starts.nbytes + self.items.nbytes)
