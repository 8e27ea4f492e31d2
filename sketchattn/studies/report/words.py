"""What a study says, in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...base.pages import short, shorten
from ..columns import EXACT
from ..ranks import in_words
from .medians import MAIN, Medians, front

# Pieces of text, and whether each is strong: names stay text, whatever they are.
Sentence = list[tuple[str, bool]]

# Methods that one sentence names.
MOST_NAMED = 6


def say(*parts: str | tuple[str, bool]) -> Sentence:
    """Return a sentence from text and from what `strong` returns."""
    return [part if isinstance(part, tuple) else (part, False) for part in parts]


def strong(text: object) -> tuple[str, bool]:
    """Return text that is set in bold."""
    return shorten(text, 60), True


def count(n: int, word: str) -> str:
    """Return a number with its word.

    Examples
    --------
    >>> count(1, "head"), count(2, "head")
    ('1 head', '2 heads')
    """
    return f"{n} {word}{'' if n == 1 else 's'}"


def seconds(x: float) -> str:
    """Return a time with its unit.

    Examples
    --------
    >>> seconds(0.00123), seconds(2.5), seconds(4e-5)
    ('1.23 ms', '2.50 s', '40.0 µs')
    """
    if not math.isfinite(x):
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if x >= size:
            return f"{short(x / size)} {unit}"
    return f"{short(x * 1e6)} µs"


def named(names: Sequence[str]) -> list[str | tuple[str, bool]]:
    """Return names in bold with commas between them, the first few of many."""
    parts: list[str | tuple[str, bool]] = []
    for name in names[:MOST_NAMED]:
        parts += [", ", strong(name)] if parts else [strong(name)]
    return [*parts, f" and {len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else parts


def what_was_measured(medians: Medians, about: Mapping[str, Any]) -> str:
    """Return the grid in one line."""
    sizes = [(head["n_q"], head["n_k"], head["d"]) for head in about.get("heads", ())]
    ranks = medians.ranks
    words = [
        count(len(medians.methods), "method"),
        f"on {count(len(medians.heads), 'attention head')}{_sizes(sizes)}",
        f"at {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(in_words, ranks))}",
        f"with {count(medians.seeds, 'seed')}",
    ]
    return " ".join(words)


def _sizes(sizes: Sequence[tuple[int, int, int]]) -> str:
    if not sizes:
        return ""
    keys, widths = sorted({n for _, n, _ in sizes}), sorted({d for _, _, d in sizes})
    spans = [f"{x[0]}" if len(x) == 1 else f"{x[0]} to {x[-1]}" for x in map(list, (keys, widths))]
    return f" ({spans[0]} keys, dimension {spans[1]})"


def findings(medians: Medians) -> list[Sentence]:
    """Return what a study says about its methods, the main thing first."""
    found = [_best(medians)]
    found += [x for x in (_floor(medians), *_losers(medians), _time(medians)) if x]
    return [sentence for sentence in found if sentence]


def _best(medians: Medians) -> Sentence:
    """Say which method is best at the smallest and at the largest rank."""
    if not medians.methods:
        return say("No method was measured: what follows is about floors and predictors.")
    parts: list[str | tuple[str, bool]] = ["Smallest median error over heads: "]
    ends = list(dict.fromkeys((medians.ranks[-1], medians.ranks[0])))
    for i, rank in enumerate(ends):
        label, error = medians.best(rank)
        if not label:
            return say("No method has a number for the relative output error.")
        careful, worst = medians.best(rank, worst_head=True)
        mean = medians.over(MAIN, "vmean", rank).middle
        at = in_words(rank)
        parts += ["; " if i else "", strong(label), f" at rank {at} with {short(error)}"]
        parts += [f" (the mean of V has {short(mean)})"] if i == 0 else []
        if careful != label and len(medians.heads) > 1:
            parts += [", while ", strong(careful), f" has the best worst head, {short(worst)}"]
        elif len(medians.heads) > 1:
            parts += [f", {short(worst)} on its worst head"]
    return say(*parts, ".")


def _floor(medians: Medians) -> Sentence:
    """Say how far the best method is from what nobody can beat."""
    rank = medians.ranks[-1]
    label, error = medians.best(rank)
    keys, matrix = (medians.over(MAIN, name, rank).middle for name in ("topk", "svd"))
    if not label or not (keys > 0 and matrix > 0):
        return []
    at = in_words(rank)
    parts = [f"Floors at rank {at}: keeping the {at} largest entries of each row leaves "]
    parts += [f"{short(keys)}, the best matrix of this rank {short(matrix)}; the best method is "]
    return say(*parts, f"{_times(error / keys)} the first and {_times(error / matrix)} the second.")


def _times(ratio: float) -> str:
    return f"{short(ratio, 2)} times"


def _losers(medians: Medians) -> list[Sentence]:
    """Say which methods the mean of V beats, and how often."""
    rank, heads = medians.ranks[-1], len(medians.heads)
    last = in_words(rank)
    never = [
        label
        for label in medians.methods
        if all(medians.by_head(MAIN, label, r) for r in medians.ranks)
        and all(
            len(medians.lost(label, r)) == len(medians.by_head(MAIN, label, r))
            for r in medians.ranks
        )
    ]
    lost = {x: len(medians.lost(x, rank)) for x in medians.methods if x not in never}
    some = sorted((x for x in lost if lost[x]), key=lambda x: -lost[x])
    found = []
    if never:
        found.append(say("Never better than the mean of V, at any rank: ", *named(never), "."))
    if some:
        parts: list[str | tuple[str, bool]] = [f"Not better than the mean of V at rank {last}: "]
        for i, label in enumerate(some[:MOST_NAMED]):
            parts += [", " if i else "", strong(label), f" on {lost[label]} of {heads}"]
        more = f" and {len(some) - MOST_NAMED} more" if len(some) > MOST_NAMED else ""
        found.append(say(*parts, f"{' heads' if heads > 1 else ' head'}{more}."))
    if medians.methods and not never and not some:
        found.append(say(f"Every method beats the mean of V on every head at rank {last}."))
    return found


def _time(medians: Medians) -> Sentence:
    """Say what is faster than exact attention and better than the mean of V."""
    if EXACT not in medians.beside or not medians.methods:
        return []
    exact = medians.over("seconds", EXACT, medians.ranks[0]).middle
    mean = medians.over(MAIN, "vmean", medians.ranks[0]).middle
    points = [(label, rank) for label in medians.methods for rank in medians.ranks]
    costs = [medians.over("seconds", *point).middle for point in points]
    errors = [medians.over(MAIN, *point).middle for point in points]
    both = list(zip(costs, errors, strict=True))
    useful = [i for i in front(both) if costs[i] < exact and errors[i] < mean]
    head = say(f"Exact attention takes {seconds(exact)} a head here")
    if not useful:
        return head + say("; no method that beats the mean of V is faster.")
    label, rank = points[useful[-1]]
    cost, error = both[useful[-1]]
    rest = f" at rank {in_words(rank)}, {seconds(cost)} with an error of {short(error)}."
    return head + say("; the best that is faster: ", strong(label), rest)
