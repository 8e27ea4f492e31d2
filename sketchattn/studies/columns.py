"""What the rows of a study are made of, and how values of many are summed up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors.reports import FIELDS

Values = dict[str, Any]
# What a cell is known by inside the journal of its head: method with parameters, and seed.
Key = tuple[str, int | None]

FLOORS = ("svd", "topk")
PREDICTORS = ("zero", "vmean")
EXACT = "exact"
REFERENCES = (*FLOORS, *PREDICTORS, EXACT)
ROLES = dict.fromkeys(FLOORS, "floor") | dict.fromkeys(PREDICTORS, "predictor") | {EXACT: "exact"}
# The finite-sample interval of ``output_fro_rel``, and the exact rows that errors are from.
SAMPLED_COLUMNS = ("output_fro_rel_low", "output_fro_rel_high", "rows")
COLUMNS = (
    *("head", "method", "rank", "seed", *FIELDS, "seconds", "bytes", "effective_rank", "work"),
    *SAMPLED_COLUMNS,
)
# Beside ``rank`` where one was given as a share of the keys: that share, NaN for integers.
SHARE = "share"

# Of the bounds of claims: ``bound`` is that of ``field``, below which lies ``what``.
BOUND_COLUMNS = ("claim", "method", "head", "rank", "field", "what", "bound")

# Fields of the summary; the others are in the frame.
MAIN_FIELDS = ("output_fro_rel", "matrix_fro_rel", "row_tv_mean", "skill")


def quantiles(values: Iterable[float], levels: Sequence[float]) -> list[float]:
    """Return sample quantiles by linear interpolation that infinite values do not turn into NaN.

    Parameters
    ----------
    values : iterable of float
        NaN does not count; without any other value the quantiles are NaN.
    levels : sequence of float
        In [0, 1].

    Examples
    --------
    >>> quantiles([1.0, 2.0, float("inf"), float("inf")], (0.0, 0.5, 1.0))
    [1.0, inf, inf]
    """
    ordered = sorted(x for x in map(float, values) if not math.isnan(x))
    if not ordered:
        return [math.nan] * len(levels)
    found = []
    for level in levels:
        position = level * (len(ordered) - 1)
        below = ordered[math.floor(position)]
        above = ordered[math.ceil(position)]
        weight = position - math.floor(position)
        if below == above or weight == 0.0:
            found.append(below)
        elif math.isinf(below) or math.isinf(above):
            found.append(below if math.isinf(below) else above)
        else:
            found.append(below + weight * (above - below))
    return found


def is_missing(x: object) -> bool:
    """Say whether a cell of a frame holds no number, which is not the same as NaN."""
    import pandas as pd

    return x is None or x is pd.NA
