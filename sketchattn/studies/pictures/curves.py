"""The numbers of pictures: values by method, head and rank, their medians, and fronts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..columns import FLOORS, PREDICTORS, REFERENCES, quantiles
from ..ranks import AT, Share, ranked, ranks_of, shares_of

if TYPE_CHECKING:
    import pandas as pd

# References that have a place on axes of errors: exact attention has rounding only.
BESIDE = (*FLOORS, *PREDICTORS)

# (method, head) -> rank as in `ranks_of` -> values over seeds
Table = dict[tuple[str, str], dict[float, list[float]]]


class Curve(NamedTuple):
    """One line of one panel: a value for each rank, and a band where there is one."""

    name: str
    ranks: Sequence[float]
    middle: list[float]
    low: list[float]
    high: list[float]


class Point(NamedTuple):
    """What a method reaches at one rank: its cost, its error, and where it does."""

    method: str
    rank: float
    cost: float
    error: float


def methods_of(frame: pd.DataFrame) -> list[str]:
    """Return the methods of a study in order; those that are references are drawn as such."""
    return [m for m in dict.fromkeys(frame["method"]) if m not in REFERENCES]


def table_of(frame: pd.DataFrame, field: str, shares: Mapping[float, Share] | None = None) -> Table:
    """Return the values of one column by method, head and rank; ``shares`` as for `ranks_of`."""
    table: Table = {}
    columns = [frame[name].tolist() for name in ("method", "head", field)]
    for method, head, value, rank in zip(*columns, ranks_of(frame, shares), strict=True):
        table.setdefault((method, head), {}).setdefault(rank, []).append(float(value))
    return table


def tables_of(frame: pd.DataFrame, references: pd.DataFrame, field: str) -> Table:
    """Return the values of methods and of references; references stand at one seed."""
    shares = shares_of(references)
    own = table_of(frame[~frame["method"].isin(REFERENCES)], field, shares)
    return own | table_of(references, field, shares)


def curve_of(name: str, ranks: Sequence[float], triples: Sequence[Sequence[float]]) -> Curve:
    """Return a curve from its low, middle and high values."""
    low, middle, high = ([t[i] for t in triples] for i in range(3))
    return Curve(name, ranks, middle, low, high)


def head_curves(table: Table, names: Sequence[str], head: str) -> list[Curve]:
    """Return medians over seeds, with bands from the smallest to the largest."""
    curves = []
    for name in names:
        by_rank = table.get((name, head), {})
        ranks = sorted(by_rank)
        curves.append(
            curve_of(name, ranks, [quantiles(by_rank[rank], (0.0, 0.5, 1.0)) for rank in ranks])
        )
    return curves


def medians_of(
    table: Table, name: str, heads: Iterable[str] | None = None
) -> dict[float, list[float]]:
    """Return the medians over seeds of one method by rank, one for each head."""
    wanted = None if heads is None else set(heads)
    by_rank: dict[float, list[float]] = {}
    for (method, head), found in table.items():
        if method == name and (wanted is None or head in wanted):
            for rank, values in found.items():
                by_rank.setdefault(rank, []).append(quantiles(values, (0.5,))[0])
    return {rank: by_rank[rank] for rank in sorted(by_rank)}


def summary_curves(
    table: Table,
    names: Sequence[str],
    heads: Iterable[str] | None = None,
    levels: Sequence[float] = (0.25, 0.5, 0.75),
) -> list[Curve]:
    """Return medians over heads of medians over seeds, with bands between quartiles of heads."""
    curves = []
    for name in names:
        by_rank = medians_of(table, name, heads)
        curves.append(
            curve_of(name, list(by_rank), [quantiles(x, levels) for x in by_rank.values()])
        )
    return curves


def points_of(errors: Mapping[float, Sequence[float]], costs: Mapping[float, Sequence[float]],
              method: str) -> list[Point]:  # fmt: skip
    """Return the median error of a method against its median cost, a point a rank."""
    points = []
    for rank, values in errors.items():
        cost = quantiles(costs.get(rank, ()), (0.5,))[0]
        error = quantiles(values, (0.5,))[0]
        if not (math.isnan(cost) or math.isnan(error)):
            points.append(Point(method, rank, cost, error))
    return points


def intervals_of(frame: pd.DataFrame, method: str) -> dict[float, tuple[float, float]]:
    """Return the interval of ``output_fro_rel`` at each rank where errors are of sampled rows.

    The medians over heads and seeds of its ends, each of which holds for one head and seed.
    """
    names = ("output_fro_rel", *(f"output_fro_rel_{end}" for end in ("low", "high")))
    if not set(names) <= set(frame.columns):
        return {}
    own = ranked(frame[frame["method"] == method], shares_of(frame))
    found = {}
    for rank in sorted(set(own[AT])):
        part = own[own[AT] == rank]
        low, high = (quantiles(part[name].tolist(), (0.5,))[0] for name in names[1:])
        if low < high:
            found[rank] = (low, high)
    return found


def front_of(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other beats in both cost and error, by rising cost.

    Examples
    --------
    >>> points = [Point("a", 1, 1.0, 0.5), Point("a", 2, 2.0, 0.7), Point("b", 1, 3.0, 0.1)]
    >>> [(point.method, point.rank) for point in front_of(points)]
    [('a', 1), ('b', 1)]
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.error)):
        if not front or point.error < front[-1].error:
            front.append(point)
    return front
