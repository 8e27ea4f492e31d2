"""Verdicts for people: a line a topic, what differs from the record, counterexamples."""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from ...base.words import counted, html_table, number, table
from .records import VERDICTS
from .table import Row, groups, outcome


class Section(NamedTuple):
    """Hold a part of the summary: what it is, and a table that may be empty."""

    title: str
    header: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]


def headline(rows: Sequence[Row], trials: int) -> str:
    """Return the counts of verdicts in one line."""
    seen = [row.verdict.status for row in rows]
    parts = [f"{seen.count(status)} {status}" for status in VERDICTS if status in seen]
    every = f"{counted(len(rows), 'check')} of {counted(trials, 'trial')}"
    return f"{every}: {', '.join(parts)}" if parts else every


def _topics(rows: Sequence[Row]) -> Section:
    """Return a line a topic: how many of its checks have which verdict."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.claim.id.partition(".")[0], []).append(row)
    shown = [status for status in VERDICTS if any(x.verdict.status == status for x in rows)]
    lines = []
    for topic, part in found.items():
        seen = [row.verdict.status for row in part]
        counts = [str(seen.count(status) or "-") for status in shown]
        lines.append((topic, str(len({x.claim.id for x in part})), str(len(part)), *counts, ""))
    return Section("", ("topic", "claims", "checks", *shown, ""), lines)


def _differing(rows: Sequence[Row], heads: Collection[str]) -> Section:
    """Return what differs from the record; heads that agree are one line."""
    odd = [row for row in rows if not row.expected]
    if not odd:
        return Section(outcome(rows), (), [])
    lines = []
    for part in groups(odd, heads):
        more = f" and {counted(len(part) - 1, 'other head')}" if len(part) > 1 else ""
        recorded = part[0].recorded or "anything but violated"
        lines.append((f"! {part[0].verdict}{more} [recorded: {recorded}]",))
    return Section(f"{len(odd)} verdicts differ from the record:", (), lines)


def _example(row: Row) -> tuple[str, ...]:
    """Return one observation beyond its bound as cells."""
    v = row.verdict
    often = f"{v.failures}/{v.trials}" if v.z is None else f"z = {number(v.z)}"
    cells = (number(v.observed), number(v.bound), often)
    return (row.claim.id, v.instance, *cells, row.claim.title)


COLUMNS = ("claim", "on", "observed", "bound", "beyond", "about")


# Of each claim of the user that fails so many problems are named.
WORST = 3


def _slack(row: Row) -> float:
    """Return how loose a claim is where it was checked; NaN is as bad as it gets."""
    return -math.inf if math.isnan(row.verdict.slack) else row.verdict.slack


def _refuted(rows: Sequence[Row]) -> Section:
    """Return the refuted claims, each with the counterexample that is the farthest off."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.claim.status == "refuted":
            found.setdefault(row.claim.id, []).append(row)
    lines = []
    for part in found.values():
        bad = [row for row in part if row.verdict.status == "violated"]
        if bad:  # the recorded one first, then what is the farthest off
            lines.append(_example(min(bad, key=lambda x: (x.recorded is None, x.verdict.slack))))
            continue
        needs = [x.verdict.needs for x in part if x.verdict.needs is not None]
        why = f"needs {min(needs)} trials" if needs else "no counterexample"
        lines.append((part[0].claim.id, "-", "-", "-", why, part[0].claim.title))
    return Section("refuted claims, with a counterexample each:", COLUMNS, lines)


def _own(rows: Sequence[Row], heads: Collection[str]) -> Section:
    """Return where claims of the user fail, of each claim where it is the farthest off."""
    found: dict[str, list[tuple[Row, int]]] = {}
    for part in groups([row for row in rows if row.lost], heads):
        worst = min(part, key=_slack)
        found.setdefault(worst.claim.id, []).append((worst, len(part) - 1))
    lines: list[tuple[str, ...]] = []
    for name, places in found.items():
        places.sort(key=lambda place: _slack(place[0]))
        for row, others in places[:WORST]:
            cells = _example(row)
            more = f" and {counted(others, 'other head')}" if others else ""
            lines.append((cells[0], cells[1] + more, *cells[2:]))
        if len(places) > WORST:
            left = f"and on {len(places) - WORST} more: --all, render(every=True)"
            lines.append((name, left, *[""] * (len(COLUMNS) - 2)))
    return Section("your own claims are violated:", COLUMNS, lines)


def sections(rows: Sequence[Row], heads: Collection[str]) -> list[Section]:
    """Return the parts of the summary, in order; nothing of what is empty."""
    if not any(row.checked for row in rows):
        return [Section(outcome(rows), (), [])]
    found = [_topics(rows), _differing(rows, heads)]
    return found + [x for x in (_own(rows, heads), _refuted(rows)) if x.lines]


def as_text(rows: Sequence[Row], heads: Collection[str], trials: int) -> str:
    """Return the summary as text."""
    parts = []
    for section in sections(rows, heads):
        lines = [section.title] if section.title else []
        if section.header:
            left = 2 if section.header == COLUMNS else 1
            lines.append(table(section.header, section.lines, left))
        else:
            lines += [" ".join(line) for line in section.lines]
        parts.append("\n".join(lines))
    top = headline(rows, trials)
    return "\n\n".join([top, *parts])


def as_html(rows: Sequence[Row], heads: Collection[str], trials: int) -> str:
    """Return the summary for a notebook."""
    parts: Iterable[str] = (
        (f"<p>{html.escape(section.title)}</p>" if section.title else "")
        + (html_table(section.header, section.lines) if section.lines else "")
        for section in sections(rows, heads)
    )
    return f"<p>{html.escape(headline(rows, trials))}</p>{''.join(parts)}"
