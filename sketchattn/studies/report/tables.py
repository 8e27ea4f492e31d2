"""The tables of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...base.pages import Cell, Column, Table, number, short
from ...errors.reports import FIELDS
from ..columns import EXACT, FLOORS, PREDICTORS, quantiles
from ..palette import REFERENCE_LABELS
from ..ranks import Share, in_words, ranks_of
from .hardness import number_of
from .medians import MAIN, Medians
from .words import seconds

if TYPE_CHECKING:
    import pandas as pd

# Hardness: field, title, and what it is.
HARD = (
    ("perplexity_median", "keys attended", "median over rows of exp(entropy)"),
    ("stable_rank", "stable rank", "|A|_F^2 / |A|_2^2"),
    ("rank_90", "rank 90 %", "singular values that hold 90 % of |A|_F^2"),
    ("rank_99", "rank 99 %", "singular values that hold 99 % of |A|_F^2"),
    ("max_logit", "largest logit", "max |L_ij|"),
    ("log_kappa", "log kappa", "logarithm of the largest over the smallest row sum of exp(L)"),
    ("alpha", "alpha", "keys times the largest squared column norm"),
)


def _time(x: float) -> Cell:
    return Cell(seconds(x), x)


def _rank(rank: float) -> Cell:
    return Cell(str(rank), float(rank) if isinstance(rank, Share) else rank)


def budget_table(medians: Medians) -> Table:
    """Return the best method at each rank, beside the floors and the mean of V."""
    columns = [
        Column("rank", True),
        Column("best by median"),
        Column("median error", True, "relative output error, median over heads"),
        Column("its worst head", True),
        Column("its time", True, "median over heads"),
        Column("best on its worst head"),
        Column("error there", True),
        Column("floor: r keys a row", True, "the r largest entries of each row"),
        Column("floor: rank r", True, "the best matrix of rank r, blind to V"),
        Column("mean of V", True),
    ]
    rows = []
    for rank in medians.ranks:
        name, error = medians.best(rank)
        if not name:
            continue
        careful, worst = medians.best(rank, worst_head=True)
        rows.append(
            [
                _rank(rank),
                Cell(name, mark="name"),
                number(error),
                number(medians.over(MAIN, name, rank).most),
                _time(medians.over("seconds", name, rank).middle),
                Cell(careful, mark="name"),
                number(worst),
                *(number(medians.over(MAIN, x, rank).middle) for x in ("topk", "svd", "vmean")),
            ]
        )
    return Table("budgets", columns, rows)


# Shares of the work of exact attention that a reader asks for.
SHARES = (0.05, 0.1, 0.25, 0.5)


def work_table(medians: Medians) -> Table | None:
    """Return the best method within each share of the work of exact attention."""
    if "work" not in medians.columns:
        return None
    columns = [
        Column("work at most", True, "keys, features or clusters a row reads, of all"),
        Column("best by median"),
        Column("rank", True),
        Column("work", True),
        Column("median error", True),
        Column("worst head", True),
        Column("time", True),
    ]
    rows = []
    for share in SHARES:
        points = []
        for name in medians.methods:
            for rank in medians.ranks:
                work = medians.over("work", name, rank).middle
                error = medians.over(MAIN, name, rank).middle
                if work <= share and not math.isnan(error):
                    points.append((error, work, name, rank))
        if not points:
            continue
        error, work, name, rank = min(points)
        rows.append(
            [
                Cell(f"{100 * share:g} %", share),
                Cell(name, mark="name"),
                _rank(rank),
                Cell(f"{short(100 * work, 2)} %", work),
                number(error),
                number(medians.over(MAIN, name, rank).most),
                _time(medians.over("seconds", name, rank).middle),
            ]
        )
    return Table("by-work", columns, rows) if rows else None


def all_table(medians: Medians) -> Table:
    """Return every method, floor and predictor at every rank: medians over heads."""
    columns = [
        Column("method"),
        Column("rank", True),
        Column("median error", True, "relative output error"),
        Column("quartiles", True, "over heads"),
        Column("worst head", True),
        Column("beats mean of V", True, "heads on which the error is below that of the mean of V"),
        *(Column(x, True) for x in ("time", *(["work"] if "work" in medians.columns else []))),
        *(Column(field, True) for field in FIELDS if field != MAIN),
    ]
    rows = []
    for name in (*medians.methods, *medians.beside):
        reference = name not in medians.methods
        for rank in medians.ranks:
            if (name in PREDICTORS or name == EXACT) and rank != medians.ranks[0]:
                continue  # the same at every rank
            spread = medians.over(MAIN, name, rank)
            heads = len(medians.by_head(MAIN, name, rank))
            won = heads - len(medians.lost(name, rank))
            alike = name in PREDICTORS or name == EXACT
            rows.append(
                [
                    Cell(REFERENCE_LABELS.get(name, name), mark="" if reference else "name"),
                    Cell("any", math.nan) if alike else _rank(rank),
                    number(spread.middle),
                    Cell(f"{short(spread.low)} to {short(spread.high)}", spread.high - spread.low),
                    number(spread.most),
                    Cell("-", math.nan)
                    if name == "vmean"
                    else Cell(f"{won} of {heads}", won, "good" if won == heads else "bad"),
                    # Of floors the exact matrix is already decomposed: their times mean nothing.
                    Cell("-", math.nan)
                    if name in FLOORS
                    else _time(medians.over("seconds", name, rank).middle),
                    *(
                        number(medians.over("work", name, rank).middle)
                        for _ in range("work" in medians.columns)
                    ),
                    *(
                        number(medians.over(field, name, rank).middle)
                        for field in FIELDS
                        if field != MAIN
                    ),
                ]
            )
    return Table("everything", columns, rows)


def head_table(medians: Medians, hardness: Mapping[str, dict[str, Any]]) -> Table:
    """Return every head: how hard it is, and which method is best on it."""
    rank = medians.ranks[-1]
    known = [x for x in HARD if any(x[0] in found for found in hardness.values())]
    columns = [
        Column("head"),
        *(Column(title, True, about) for _, title, about in known),
        Column(f"best at rank {in_words(rank)}"),
        Column("its error", True),
        Column("mean of V", True),
    ]
    rows = []
    for head in medians.heads:
        errors = [(medians.at(MAIN, name, head, rank), name) for name in medians.methods]
        error, name = min((x for x in errors if not math.isnan(x[0])), default=(math.nan, "-"))
        mean = medians.at(MAIN, "vmean", head, rank)
        found = hardness.get(head, {})
        rows.append(
            [
                Cell(head, mark="name"),
                *(number(number_of(found, field)) for field, _, _ in known),
                Cell(name),
                number(error)._replace(mark="good" if error < mean else "bad"),
                number(mean),
            ]
        )
    return Table("by-head", columns, rows)


def bound_table(medians: Medians, bounds: pd.DataFrame) -> Table | None:
    """Return how far each bound of a claim is above what was measured."""
    if not len(bounds):
        return None
    columns = [
        Column("claim"),
        Column("method"),
        Column("measure"),
        Column("bounds"),
        Column("rank", True),
        Column("bound", True, "median over heads"),
        Column("measured", True, "median over heads"),
        Column("bound / measured", True),
    ]
    rows = []
    groups: dict[tuple[str, str, str, str, float], list[float]] = {}
    columns_of = [bounds[name].tolist() for name in ("claim", "method", "field", "what")]
    ranks = ranks_of(bounds, medians.shares)
    for *key, bound in zip(*columns_of, ranks, bounds["bound"].tolist(), strict=True):
        groups.setdefault((*key,), []).append(bound)
    for (claim, method, field, what, rank), values in groups.items():
        bound = quantiles(values, (0.5,))[0]
        seen = medians.over(field, method, rank).middle
        rows.append(
            [
                Cell(claim, mark="name"),
                Cell(method),
                Cell(field),
                Cell(what),
                _rank(rank),
                number(bound),
                number(seen),
                number(bound / seen if seen > 0 else math.nan),
            ]
        )
    return Table("bounds", columns, rows)
