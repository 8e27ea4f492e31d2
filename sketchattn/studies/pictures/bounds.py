"""Bounds of claims as thin lines over the curves that they are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..columns import REFERENCES, quantiles
from ..palette import style_of
from ..ranks import Share
from .curves import Curve, Table, curve_of, table_of

if TYPE_CHECKING:
    import pandas as pd

# Bounds are thin, without a marker, in the colour of their method.
BOUND_DASHES: tuple[Any, ...] = ((0, (8, 2)), (0, (8, 2, 1.5, 2)), (0, (8, 2, 1.5, 2, 1.5, 2)))


class Bound(NamedTuple):
    """A claim whose bound is drawn, what lies below it, and how its line looks."""

    claim: str
    method: str
    what: str
    style: dict[str, Any]


def bounds_of(
    bounds: pd.DataFrame | None,
    field: str,
    methods: Sequence[str],
    shares: Mapping[float, Share],
) -> tuple[list[Bound], Table]:
    """Return the claims that bound a field, and their bounds by claim, head and rank.

    Of the methods given, and of those that every study draws as references.  ``shares``
    are those of the study: not all of its heads may have bounds.
    """
    if bounds is None:
        return [], {}
    own = bounds[(bounds["field"] == field) & bounds["method"].isin([*methods, *REFERENCES])]
    triples = dict.fromkeys(zip(own["claim"], own["method"], own["what"], strict=True))
    found = []
    for i, (claim, method, what) in enumerate(triples):
        dash = BOUND_DASHES[i % len(BOUND_DASHES)]
        style = {"color": style_of(method, methods).colour, "linestyle": dash, "linewidth": 0.9}
        found.append(Bound(claim, method, what, style))
    named = own.assign(method=own["claim"], **{field: own["bound"]})
    return found, table_of(named, field, shares)


def bound_curves(limits: Sequence[Bound], table: Table, heads: Sequence[str]) -> list[Curve]:
    """Return the median of each bound over heads."""
    curves = []
    for limit in limits:
        by_rank: dict[float, list[float]] = {}
        for head in heads:
            for rank, values in table.get((limit.claim, head), {}).items():
                by_rank.setdefault(rank, []).extend(values)
        ranks = sorted(by_rank)
        triples = [quantiles(by_rank[rank], (0.5,)) * 3 for rank in ranks]
        curves.append(curve_of(limit.claim, ranks, triples))
    return curves
