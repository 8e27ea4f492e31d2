"""The rows of a study as a report reads them: medians over seeds, by head and over heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ...errors.reports import FIELDS
from ..columns import REFERENCES, quantiles
from ..ranks import ranks_of, shares_of

if TYPE_CHECKING:
    import pandas as pd

# What costs are measured in, and the error that comes first.
MAIN = "output_fro_rel"


class Spread(NamedTuple):
    """Hold a quartile, the median and the other quartile, and the largest value."""

    low: float
    middle: float
    high: float
    most: float


class Medians:
    """Hold the medians over seeds of every method, floor and predictor.

    Attributes
    ----------
    heads, methods : list of str
        In the order of the rows; methods without references.
    beside : list of str
        The references, in their order.
    ranks : list of int or Share
        In increasing order, as `ranks_of` has them.
    shares : dict from float to Share
        The shares among them.
    seeds : int
        Their number.
    columns : tuple of str
        The measures and costs that the rows have.
    """

    def __init__(self, frame: pd.DataFrame, references: pd.DataFrame) -> None:
        """Read the frames of a `StudyResult`."""
        own = frame[~frame["method"].isin(REFERENCES)]
        self.heads: list[str] = list(dict.fromkeys(references["head"]))
        self.methods: list[str] = list(dict.fromkeys(own["method"]))
        self.beside: list[str] = list(dict.fromkeys(references["method"]))
        self.shares = shares_of(references)
        self.ranks = sorted(set(ranks_of(references, self.shares)))
        self.seeds = int(frame["seed"].nunique())
        extra = ["work"] if "work" in frame else []
        ends = [f"{MAIN}_low", f"{MAIN}_high"]
        # Errors of all rows are their own interval.
        if set(ends) <= set(frame) and (frame[ends[0]] < frame[ends[1]]).any():
            extra += ends
        self.columns = (*FIELDS, "seconds", *extra)
        self._values: dict[tuple[str, str, float], dict[str, float]] = {}
        for part in (own, references):
            ranks = ranks_of(part, self.shares)
            columns = [part[name].tolist() for name in ("method", "head", *self.columns)]
            found: dict[tuple[str, str, float], list[tuple[float, ...]]] = {}
            for rank, method, head, *values in zip(ranks, *columns, strict=True):
                found.setdefault((method, head, rank), []).append(tuple(values))
            for key, rows in found.items():
                middle = [quantiles(column, (0.5,))[0] for column in zip(*rows, strict=True)]
                self._values[key] = dict(zip(self.columns, middle, strict=True))

    def at(self, field: str, label: str, head: str, rank: float) -> float:
        """Return the median over seeds; NaN where there is no such row."""
        return self._values.get((label, head, rank), {}).get(field, math.nan)

    def curve(self, field: str, label: str, head: str) -> list[float]:
        """Return the medians over seeds at every rank."""
        return [self.at(field, label, head, rank) for rank in self.ranks]

    def by_head(self, field: str, label: str, rank: float) -> dict[str, float]:
        """Return the medians over seeds of the heads that have a number."""
        found = {head: self.at(field, label, head, rank) for head in self.heads}
        return {head: x for head, x in found.items() if not math.isnan(x)}

    def over(self, field: str, label: str, rank: float) -> Spread:
        """Return quartiles, median and maximum over heads."""
        values = list(self.by_head(field, label, rank).values())
        return Spread(*quantiles(values, (0.25, 0.5, 0.75, 1.0)))

    def typical(self, field: str, label: str) -> list[float]:
        """Return the median over heads at every rank."""
        return [self.over(field, label, rank).middle for rank in self.ranks]

    def lost(self, label: str, rank: float) -> list[str]:
        """Return the heads on which a method does not beat the mean of V."""
        return [
            head
            for head, x in self.by_head(MAIN, label, rank).items()
            if x >= self.at(MAIN, "vmean", head, rank)
        ]

    def best(self, rank: float, *, worst_head: bool = False) -> tuple[str, float]:
        """Return the method with the smallest median error over heads, or on its worst head."""
        pick = 3 if worst_head else 1
        found = [(self.over(MAIN, label, rank)[pick], label) for label in self.methods]
        error, label = min((pair for pair in found if not math.isnan(pair[0])), default=(0.0, ""))
        return label, error if label else math.nan


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the points that no other beats in both coordinates, by the first one.

    Examples
    --------
    >>> front([(1.0, 3.0), (2.0, 1.0), (3.0, 2.0), (0.5, 4.0)])
    [3, 0, 1]
    """
    order = sorted(
        (i for i, point in enumerate(points) if all(map(math.isfinite, point))),
        key=lambda i: points[i],
    )
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept
