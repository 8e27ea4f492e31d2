"""The table of verdicts: each with its claim and with what is recorded, as cells and as text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...base.words import number
from .records import Claim, Verdict

COLUMNS = (
    "claim",
    "instance",
    "source",
    "verdict",
    "recorded",
    "observed",
    "bound",
    "slack",
    "trials",
    "failures",
    "low",
    "high",
    "rank",
    "delta",
    "z",
    "notes",
)
# Seed, trials and confidence of the recorded verdicts: the defaults.
RECORDED_WITH = (0, 200, 0.95)


@dataclass(frozen=True)
class Row:
    """Pair a verdict with its claim and with the verdict that is recorded.

    Attributes
    ----------
    claim : Claim
    verdict : Verdict
    recorded : str or None
        None where nothing is recorded, as for a user's head.
    confidence : float
        Of the check.
    repeats : bool
        Whether seed, trials and confidence are those of the record.
    """

    claim: Claim
    verdict: Verdict
    recorded: str | None
    confidence: float
    repeats: bool

    @property
    def expected(self) -> bool:
        """Whether the verdict is the recorded one.

        Without a record everything but the violation of a claim that is not refuted is expected;
        of a claim of the user nothing is, so that nothing differs.
        With another seed, or other trials, "inconclusive" and "holds" do not contradict each
        other, and what needs more trials than there were contradicts no record.
        """
        status = self.verdict.status
        if self.recorded is None:
            return status != "violated" or self.claim.status in ("refuted", "own")
        if status == self.recorded:
            return True
        if self.repeats:
            return False
        needs = self.verdict.needs
        too_few = status == "inconclusive" and needs is not None and needs > self.verdict.trials
        return too_few or {status, self.recorded} == {"inconclusive", "holds"}

    @property
    def lost(self) -> bool:
        """Whether a claim of the user without a record is violated."""
        own = self.claim.status == "own" and self.recorded is None
        return own and self.verdict.status == "violated"

    @property
    def checked(self) -> bool:
        """Whether the claim applies, or is recorded as one that does not."""
        return self.verdict.status != "not applicable" or self.recorded == "not applicable"

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict with the source, the record and whether it is expected, for JSON."""
        return {
            **self.verdict.as_dict(),
            "source": self.claim.source,
            "claim_status": self.claim.status,
            "recorded": self.recorded,
            "expected": self.expected,
        }

    def cells(self) -> list[Any]:
        """Return the values of ``COLUMNS``."""
        v = self.verdict
        low, high = v.interval if v.interval is not None else (math.nan, math.nan)
        return [
            v.claim,
            v.instance,
            self.claim.source,
            v.status,
            self.recorded,
            v.observed,
            v.bound,
            v.slack,
            v.trials,
            v.failures,
            low,
            high,
            v.rank,
            v.delta,
            v.z,
            v.notes,
        ]


def render(rows: Sequence[Row], heads: Iterable[str], trials: int, confidence: float) -> str:
    """Return rows as text; of heads with the same verdict the one with the least slack.

    Notes are at the end of a line: why a verdict is what it is, and how many trials it needs.

    Parameters
    ----------
    rows : sequence of Row
    heads : names
        Problems that are heads, and so are put together.
    trials, confidence
        Of the checks.
    """
    numbers = ("observed", "bound", "slack", "fail", "rate")
    table = [["claim", "on", "source", "verdict", *numbers, ""]]
    marks = [" "]
    for group in groups(rows, heads):
        row = min(group, key=lambda x: x.verdict.slack if x.verdict.slack >= 0 else math.inf)
        v = row.verdict
        on = v.instance if len(group) == 1 else f"{len(group)} heads"
        table.append(
            [
                v.claim,
                on,
                _short_source(row.claim),
                v.status,
                number(v.observed),
                number(v.bound),
                number(v.slack),
                "" if v.failures is None else f"{v.failures}/{v.trials}",
                _interval(v),
                v.notes,
            ]
        )
        marks.append("!" if not all(x.expected for x in group) else " ")
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = []
    for mark, cells in zip(marks, table, strict=True):
        parts = [
            cell.rjust(w) if 4 <= i < 9 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append(f"{mark} {'  '.join(parts)}".rstrip())
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.verdict.status] = counts.get(row.verdict.status, 0) + 1
    listed = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    lines += [
        "",
        f"{len(rows)} checks of {trials} trials: {listed}",
        f"rate: one-sided {100 * confidence:g} % limits of the rate of failure; for a "
        f"mean its interval",
    ]
    odd = [row for row in rows if not row.expected]
    if odd:
        lines += ["", f"{len(odd)} verdicts differ from the record:"]
        for row in odd:
            recorded = row.recorded or "anything but violated"
            lines.append(f"! {row.verdict} [recorded: {recorded}]")
    else:
        lines.append(outcome(rows))
    return "\n".join(lines)


def outcome(rows: Sequence[Row]) -> str:
    """Return what is to be said where no verdict differs from the record."""
    if not any(row.checked for row in rows):
        reasons = list(dict.fromkeys(row.verdict.notes for row in rows))
        why = f" ({'; '.join(reasons[:3])})" if reasons else ""
        return f"nothing was checked: no claim applies to a problem{why}"
    if all(row.claim.status == "own" and row.recorded is None for row in rows):
        return "your own claims have no record"
    if any(row.recorded is not None for row in rows):
        return "all verdicts are the recorded ones"
    return "nothing is recorded for these; no theorem fails"


def groups(rows: Sequence[Row], heads: Iterable[str]) -> Iterator[list[Row]]:
    """Yield rows one by one, but heads of a claim with one verdict together."""
    known = set(heads)
    together: dict[tuple[str, str, bool], list[Row]] = {}
    order: list[list[Row]] = []
    for row in rows:
        if row.verdict.instance not in known:
            order.append([row])
            continue
        key = (row.claim.id, row.verdict.status, row.expected)
        if key not in together:
            together[key] = []
            order.append(together[key])
        together[key].append(row)
    return iter(order)


def _interval(verdict: Verdict) -> str:
    if verdict.interval is None:
        return ""
    low, high = verdict.interval
    return f"{number(low)}..{number(high)}"


def _short_source(claim: Claim) -> str:
    text = re.split(r"[:;,(]", claim.source)[0].strip()
    return text if len(text) <= 24 else f"{text[:21]}..."
