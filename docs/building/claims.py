"""The tables of claims: what each says, whether it is true, and what was seen."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import sketchattn as sa

from .tables import table

Data = dict[str, Any]


def topics() -> list[str]:
    """Return the topics that have claims, in alphabetical order."""
    return sorted({name.partition(".")[0] for name in sa.theory.claims()})


def anchor(claim: str) -> str:
    """Return the label of a claim on its page; ids may differ in the case of a letter alone."""
    named = re.sub(r"[A-Z]", lambda m: f"-capital-{m[0].lower()}", claim)
    return "claim-" + re.sub(r"[^a-z0-9]+", "-", named).strip("-")


def on_heads(found: Data) -> str:
    """Return the verdicts on the bundled heads in words."""
    counts = found["heads"]
    total = sum(counts.values())
    if not total:
        return "on instances alone"
    if len(counts) == 1:
        return f"{next(iter(counts))} on all {total}"
    return ", ".join(f"{status} on {count}" for status, count in sorted(counts.items()))


def slack(found: Data) -> str:
    """Return how loose the bound is on the heads."""
    return f"{found['slack']:.3g}" if found["slack"] else "-"  # an equality has none


def counterexample(found: Data) -> Data | None:
    """Return the violation that is the farthest beyond its bound, the first of equal ones."""
    every = [x for x in found["instances"] if x["verdict"] == "violated"] + found["violated"]
    return max(every, key=beyond) if every else None


def beyond(case: Data) -> float:
    """Return how many times its bound an observation is; more than a bound of zero is infinite."""
    if not case["observed"] or not case["bound"]:
        return 0.0
    observed, bound = abs(float(case["observed"])), abs(float(case["bound"]))
    return observed / bound if bound else math.inf


def summary(verdicts: Data) -> str:
    """Return a line a topic: how many claims of each status, and what the heads say."""
    rows = []
    for topic in topics():
        mine = {n: c for n, c in sa.theory.claims().items() if n.startswith(f"{topic}.")}
        status = Counter(claim.status for claim in mine.values())
        seen: Counter[str] = Counter()
        for name in mine:
            seen.update(verdicts["claims"][name]["heads"])
        rows.append(
            [
                f"[{topic}](claims/{topic}.md)",
                str(len(mine)),
                *(str(status[x]) for x in ("published", "derived", "refuted")),
                *(str(seen[x]) for x in ("holds", "vacuous", "violated")),
            ]
        )
    total = [sum(int(row[i]) for row in rows) for i in range(1, 8)]
    rows.append(["all", *map(str, total)])
    names = ["topic", "claims", "published", "derived", "refuted", "holds", "vacuous", "violated"]
    return table(names, rows)


def refuted(verdicts: Data) -> str:
    """Return the table of refuted claims, each linked to its counterexample."""
    rows = []
    for name, claim in sa.theory.claims().items():
        if claim.status == "refuted":
            case = counterexample(verdicts["claims"][name])
            seen = "-" if case is None else f"{case['on']}: observed {case['observed']}"
            if case is not None and case["bound"]:
                seen += f", bound {case['bound']}"
            rows.append([f"`{name}`", plain(claim.title), plain(source(claim.source)), plain(seen)])
    return table(["claim", "about", "source", "counterexample"], rows)


def instances() -> str:
    """Return the table of the named instances."""
    rows = []
    for name, made in sa.theory.instances().items():
        rows.append([f"`{name}`", f"{made.m} x {made.n}", plain(made.note)])
    return table(["instance", "A", "what it is"], rows)


def source(text: str) -> str:
    """Return a source for a cell."""
    return text or "-"


def topic_page(topic: str, verdicts: Data) -> str:
    """Return the table of a topic, and below it each claim with its statement and what was seen."""
    mine = {n: c for n, c in sa.theory.claims().items() if n.startswith(f"{topic}.")}
    rows = [
        [
            f"`{name}`",
            plain(claim.title),
            claim.status,
            on_heads(verdicts["claims"][name]),
            slack(verdicts["claims"][name]),
        ]
        for name, claim in mine.items()
    ]
    parts = [table(["claim", "says", "status", "on the bundled heads", "slack"], rows)]
    parts.append("## One by one")
    parts += [one(name, claim, verdicts["claims"][name]) for name, claim in mine.items()]
    return "\n\n".join(parts)


def one(name: str, claim: Any, found: Data) -> str:
    """Return a claim: statement, source, assumptions, constants, and its verdicts."""
    lines = [
        f"({anchor(name)})=",
        f"**{name}**: {plain(claim.title)} ({claim.status})",
        "",
        f"`{code(claim.statement)}`",
        "",
        f"Source: {plain(source(claim.source))}. Observed: {plain(claim.observes)}. "
        f"Kind: {claim.kind}.",
    ]
    if claim.assumptions:
        lines.append(f"Assumed: {plain('; '.join(claim.assumptions))}.")
    if claim.constants:
        values = ", ".join(f"{key} = {value:g}" for key, value in claim.constants.items())
        lines.append(f"Checked with {values}.")
    lines.append(f"Bundled heads: {on_heads(found)}; slack {slack(found)}.")
    case = counterexample(found)
    if claim.status == "refuted" and case is not None:
        rate = f", {case['failures']} of {case['trials']} draws" if case["failures"] else ""
        lines.append(
            f"**Counterexample**: {case['on']}, observed {case['observed']} against "
            f"{case['bound']}{rate}."
        )
    if found["instances"]:
        cells = [
            [x["on"], x["verdict"], x["observed"], x["bound"], fails(x)] for x in found["instances"]
        ]
        names = ["instance", "verdict", "observed", "bound or value", "failures"]
        lines += ["", table(names, cells)]
    return "\n".join(lines)


def fails(case: Data) -> str:
    """Return how many draws were beyond the bound."""
    return "-" if case["failures"] is None else f"{case['failures']} of {case['trials']}"


def plain(text: str) -> str:
    """Return a text in which nothing is taken for markup of Markdown."""
    return re.sub(r"([\\`*_\[\]<>$~])", r"\\\1", text)


def code(text: str) -> str:
    """Return a text for a span of code."""
    return " ".join(text.split()).replace("`", "'")
