"""Verdicts as one page of HTML: counts by topic, what differs from the record, every check."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from ...base.pages import Cell, Column, Table, number, render_page, short
from .records import VERDICTS, Claim
from .table import Row, groups

# What a claim and a verdict are called says how they are coloured.
_MARKS = {"holds": "good", "violated": "bad"}
_COLUMNS = (
    Column("claim", about="opens its statement and picture"),
    Column("statement"),
    Column("source"),
    Column("status", about="published, derived, or refuted"),
    Column("verdict"),
    Column("observed", True),
    Column("bound", True),
    Column("slack", True, "bound / observed: how loose the claim is"),
    Column("failures", True, "observations beyond the bound, of the trials"),
    Column("on", about="the instance, or how many heads have this verdict"),
    Column("record", about="whether the verdict is the recorded one"),
)


class _Shown(NamedTuple):
    """Hold a claim as its page entry shows it."""

    claim: Claim
    anchor: str
    picture: str
    constants: str
    notes: list[tuple[str, str]]


def verdicts_page(
    rows: Sequence[Row],
    heads: Collection[str],
    trials: int,
    confidence: float,
    pictures: Mapping[str, str] | None = None,
) -> str:
    """Return the verdicts as a page.

    Parameters
    ----------
    rows : sequence of Row
    heads : names
        Problems that are heads: those of a claim that agree are one line.
    trials, confidence
        Of the checks.
    pictures : mapping from ids to addresses, optional
        Of the pictures of claims, relative to the page.
    """
    counts = {status: 0 for status in VERDICTS}
    for row in rows:
        counts[row.verdict.status] = counts.get(row.verdict.status, 0) + 1
    lines = [_line(part) for part in groups(rows, heads)]
    return render_page(
        __package__ or "",
        "verdicts.html",
        title="sketchattn validate",
        checks=len(rows),
        claims=len({row.claim.id for row in rows}),
        trials=trials,
        level=f"{100 * confidence:g} %",
        counts={status: n for status, n in counts.items() if n},
        surprising={x.verdict.status for x in rows if not x.expected},
        marks=_MARKS,
        topics=_topics(rows),
        odd=[row for row in rows if not row.expected],
        refuted=_refuted(rows),
        table=Table("verdicts", _COLUMNS, lines),
        menus=[(i, column.title, _values(lines, i)) for i, column in _filtered()],
        shown=_claims(rows, pictures or {}),
    )


def _line(part: Sequence[Row]) -> list[Cell]:
    """Return the cells of rows that agree: the numbers are those with the least slack."""
    row = min(part, key=lambda x: x.verdict.slack if x.verdict.slack >= 0 else math.inf)
    claim, v = row.claim, row.verdict
    failures = Cell("-", math.nan)
    if v.failures is not None:
        failures = Cell(f"{v.failures}/{v.trials}", v.failures / max(v.trials, 1))
    agrees = all(x.expected for x in part)
    recorded = row.recorded or "anything but violated"
    return [
        Cell(claim.id, mark="name", link=f"#{_anchor(claim.id)}"),
        Cell(claim.title, mark="wide"),
        Cell(claim.source.split(":")[0] if len(claim.source) > 60 else claim.source, mark="long"),
        Cell(claim.status),
        Cell(v.status, mark=_MARKS.get(v.status, "")),
        *(number(x) for x in (v.observed, v.bound, v.slack)),
        failures,
        Cell(v.instance if len(part) == 1 else f"{len(part)} heads"),
        Cell("as recorded" if agrees else f"recorded: {recorded}", mark="" if agrees else "bad"),
    ]


def _filtered() -> list[tuple[int, Column]]:
    """Return the columns that have a menu."""
    return [(i, x) for i, x in enumerate(_COLUMNS) if x.title in ("status", "verdict")]


def _values(lines: Sequence[Sequence[Cell]], column: int) -> list[str]:
    return sorted({line[column].text for line in lines})


def _anchor(name: str) -> str:
    return "claim-" + re.sub(r"[^A-Za-z0-9_.-]", "-", name)


def _topics(rows: Sequence[Row]) -> Table:
    """Return a line a topic with its counts by verdict."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.claim.id.partition(".")[0], []).append(row)
    seen = [x for x in VERDICTS if any(row.verdict.status == x for row in rows)]
    columns = [Column("topic"), Column("claims", True), Column("checks", True)]
    columns += [Column(status, True) for status in seen]
    lines = []
    for topic, part in found.items():
        statuses = [row.verdict.status for row in part]
        line = [
            Cell(topic, mark="name"),
            number(len({row.claim.id for row in part})),
            number(len(part)),
        ]
        line += [Cell(str(statuses.count(x) or "-"), statuses.count(x)) for x in seen]
        lines.append(line)
    return Table("topics", columns, lines)


def _refuted(rows: Sequence[Row]) -> Table | None:
    """Return the refuted claims, each with the counterexample that is farthest beyond its bound."""
    worst: dict[str, Row] = {}
    for row in rows:
        if row.claim.status == "refuted" and row.verdict.status == "violated":
            known = worst.get(row.claim.id)
            if known is None or row.verdict.slack < known.verdict.slack:
                worst[row.claim.id] = row
    columns = [
        Column("claim"),
        Column("what it says"),
        Column("counterexample"),
        Column("observed", True),
        Column("bound", True),
    ]
    lines = [
        [
            Cell(name, mark="name", link=f"#{_anchor(name)}"),
            Cell(row.claim.title, mark="wide"),
            Cell(row.verdict.instance),
            number(row.verdict.observed),
            number(row.verdict.bound),
        ]
        for name, row in worst.items()
    ]
    return Table("refuted", columns, lines) if lines else None


def _claims(rows: Sequence[Row], pictures: Mapping[str, str]) -> list[_Shown]:
    """Return each claim once, with what its checks noted."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.claim.id, []).append(row)
    shown = []
    for name, part in found.items():
        claim = part[0].claim
        constants = ", ".join(f"{key} = {short(x)}" for key, x in claim.constants.items())
        notes = [(row.verdict.instance, row.verdict.notes) for row in part if row.verdict.notes]
        shown.append(_Shown(claim, _anchor(name), pictures.get(name, ""), constants, notes))
    return shown
