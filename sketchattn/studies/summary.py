"""What a study returns: its rows, and the table that sums them up."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors.reports import FIELDS

if TYPE_CHECKING:
    import pandas as pd

Values = dict[str, Any]
# What a cell is known by inside the journal of its head: method with parameters, and seed.
Key = tuple[str, int | None]

FLOORS = ("svd", "topk")
PREDICTORS = ("zero", "vmean")
REFERENCES = (*FLOORS, *PREDICTORS)
# The finite-sample interval of ``output_fro_rel``, and the exact rows that errors are from.
SAMPLED_COLUMNS = ("output_fro_rel_low", "output_fro_rel_high", "rows")
COLUMNS = (
    *("head", "method", "rank", "seed", *FIELDS, "seconds", "bytes", "effective_rank"),
    *SAMPLED_COLUMNS,
)

# Of the bounds of claims: ``bound`` is that of ``field``, below which lies ``what``.
BOUND_COLUMNS = ("claim", "method", "head", "rank", "field", "what", "bound")

# Fields of the summary; the others are in the frame.
MAIN_FIELDS = ("output_fro_rel", "matrix_fro_rel", "row_tv_mean", "skill")


@dataclass(frozen=True)
class StudyResult:
    """Hold the rows of a study and where they were written.

    Attributes
    ----------
    frame : pandas.DataFrame
        One row for each head, method, rank and seed, in this order; columns ``COLUMNS``.
        ``rows`` are the exact rows that the errors of a row are from: n_q, or those of a sample,
        the same for all methods on a head.  Then ``output_fro_rel_low`` and
        ``output_fro_rel_high`` are the finite-sample interval at confidence 0.95, each by itself
        (NaN for ``topk``); otherwise both are the error.
    references : pandas.DataFrame
        The same columns for the floors ``svd`` and ``topk`` and the predictors ``zero`` and
        ``vmean``, at all ranks and one seed.
    left_out : dict from str to str
        Methods of the default choice that cannot honour all heads, and why.
    out : Path or None
        Folder with ``results.csv``, ``references.csv``, ``study.json`` and the pictures.
    pictures : tuple of Path
        One PNG for each error measure.
    computed, reused : int
        Cells that this call computed, and cells that it found in the folder.
    bounds : pandas.DataFrame
        Bounds of claims, those asked for, with the columns ``BOUND_COLUMNS``; ``bounds.csv`` in
        the folder.
    notes : tuple of str
        What was not measured, and why.
    """

    frame: pd.DataFrame
    references: pd.DataFrame
    left_out: dict[str, str]
    out: Path | None
    pictures: tuple[Path, ...]
    computed: int
    reused: int
    bounds: pd.DataFrame
    notes: tuple[str, ...] = ()

    def summary(self) -> pd.DataFrame:
        """Return medians and quartiles over heads and seeds, floors and predictors beside.

        Returns
        -------
        pandas.DataFrame
            One row for each method and rank: ``method``, ``role`` ("method", "floor" or
            "predictor"), ``rank`` (missing for predictors), then for each of ``MAIN_FIELDS`` its
            median and, with the endings ``_q25`` and ``_q75``, its quartiles, and the median
            ``seconds``.  Infinite values count as larger than all others, NaN does not count.
        """
        import pandas as pd

        rows: list[Values] = []
        roles = dict.fromkeys(FLOORS, "floor") | dict.fromkeys(PREDICTORS, "predictor")
        own = self.frame[~self.frame["method"].isin(REFERENCES)]
        for frame in (own, self.references):
            for (method, rank), part in frame.groupby(["method", "rank"], sort=False):
                role = roles.get(str(method), "method")
                if role == "predictor" and rank != frame["rank"].iloc[0]:
                    continue  # the same at every rank
                if role == "predictor":  # heads may have other ranks
                    part = frame[frame["method"] == method].drop_duplicates("head")
                row: Values = {
                    "method": method,
                    "role": role,
                    "rank": None if role == "predictor" else rank,
                }
                for field in MAIN_FIELDS:
                    low, middle, high = quantiles(part[field].tolist(), (0.25, 0.5, 0.75))
                    row |= {field: middle, f"{field}_q25": low, f"{field}_q75": high}
                row["seconds"] = quantiles(part["seconds"].tolist(), (0.5,))[0]
                rows.append(row)
        return pd.DataFrame(rows).astype({"rank": "Int64"})

    def render(self) -> str:
        """Return the summary as text: medians, and the quartiles of the first field."""
        sizes = {name: self.frame[name].nunique() for name in ("head", "method", "rank", "seed")}
        counts = ", ".join(f"{n} {word}{'' if n == 1 else 's'}" for word, n in sizes.items())
        lines = [f"{counts}: medians [quartiles] over heads and seeds", ""]
        lines += _table_lines(self.summary())
        lines += [
            "",
            "svd: the best matrix of this rank, blind to V; topk: the largest entries of each row;",
            "zero, vmean: what an approximation must beat (skill 0 is the mean of V).",
        ]
        lines += [f"left out: {name} ({reason})" for name, reason in self.left_out.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.render()


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


def _table_lines(table: pd.DataFrame) -> list[str]:
    """Return the summary as aligned lines with a header."""

    def number(x: float, digits: int = 3) -> str:
        return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{x:.{digits}g}").replace("e+", "e")

    first, *others = MAIN_FIELDS
    rows = [["method", "rank", first, *others, "seconds"]]
    groups = [""]
    for record in table.to_dict("records"):
        rank = "" if is_missing(record["rank"]) else str(record["rank"])
        spread = ", ".join(number(record[first + end], 2) for end in ("_q25", "_q75"))
        cells = [str(record["method"]), rank, f"{number(record[first])} [{spread}]"]
        for field in others:
            x = record[field]
            # A skill of 1e-11 is rounding, an error of this size is not.
            small = field == "skill" and abs(x) < 5e-4
            cells.append("0" if small else number(x))
        rows.append([*cells, number(record["seconds"])])
        predictor = record["role"] == "predictor"
        groups.append("predictors" if predictor else f"{record['role']} {record['method']}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for i, row in enumerate(rows):
        if i > 1 and groups[i] != groups[i - 1]:
            lines.append("")
        parts = [row[0].ljust(widths[0])]
        parts += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(parts).rstrip())
    return lines


def is_missing(x: object) -> bool:
    """Say whether a cell of a frame holds no number, which is not the same as NaN."""
    import pandas as pd

    return x is None or x is pd.NA
