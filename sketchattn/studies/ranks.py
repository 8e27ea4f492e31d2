"""At which rank the rows of several heads stand side by side.

A rank that was given as an integer is the same on all heads.  One that was given as a share of the
keys is another on heads of other lengths: their rows have the share in common, which the column
`SHARE` holds, and whatever goes over heads takes ranks from `ranks_of`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .columns import SHARE, is_missing, quantiles

if TYPE_CHECKING:
    import pandas as pd


# A rank of a head, and the share that it was given as, NaN for an integer.
Asked = tuple[int, float]
# Column of `ranked`.
AT = "at"


class Share(float):
    """A share of the keys of each head, in the place of a rank.

    Its value is where it stands on an axis: the share itself, or ``place`` among integers.

    Examples
    --------
    >>> str(Share(0.125)), Share(0.125) + 0, Share(0.125, place=20.0) + 0
    ('12.5 %', 0.125, 20.0)
    """

    share: float

    def __new__(cls, share: float, place: float | None = None) -> Share:
        """Return a share, with its place on an axis."""
        made = super().__new__(cls, share if place is None else place)
        made.share = share
        return made

    def __str__(self) -> str:
        return f"{100 * self.share:.4g} %"


def rank_of(x: float, n_k: int) -> int:
    """Return the rank of a head that an integer or a share of its keys asks for.

    Examples
    --------
    >>> rank_of(8, 10), rank_of(0.25, 10), rank_of(0.01, 10)
    (8, 3, 1)
    """
    return max(1, math.floor(x * n_k + 0.5)) if isinstance(x, float) else x


def asked_of(given: Sequence[float], lengths: Mapping[str, int]) -> dict[str, list[Asked]]:
    """Return what the ranks as given ask of each head: a rank, and the share it was given as.

    Parameters
    ----------
    given : sequence of int or float
        Floats are shares.  Of those that are the same rank on every head the first counts.
    lengths : mapping from str to int
        Keys of each head, by its name.

    Returns
    -------
    dict from str to list of (rank, share)
        The same number for all heads; the share of an integer is NaN.

    Examples
    --------
    >>> asked_of([0.25, 0.3, 4], {"a": 10, "b": 100})
    {'a': [(3, 0.25), (3, 0.3), (4, nan)], 'b': [(25, 0.25), (30, 0.3), (4, nan)]}
    """
    kept: dict[tuple[int, ...], float] = {}
    for x in given:
        kept.setdefault(tuple(rank_of(x, n) for n in lengths.values()), x)
    return {
        name: [(rank_of(x, n), x if isinstance(x, float) else math.nan) for x in kept.values()]
        for name, n in lengths.items()
    }


def has_shares(asked: Mapping[str, Sequence[Asked]]) -> bool:
    """Say whether a rank was given as a share."""
    return any(not math.isnan(share) for own in asked.values() for _, share in own)


def with_shares(
    rows: pd.DataFrame, asked: Mapping[str, Sequence[Asked]], names: Sequence[str]
) -> pd.DataFrame:
    """Return rows that were written without their shares as `asked_of` says that they are.

    Parameters
    ----------
    rows : pandas.DataFrame
        One row stands for all shares that are the same rank on its head.
    asked : mapping
        Of every head in the rows.
    names : sequence of str
        Columns, "head" among them, in whose groups ranks are in order.
    """
    found: dict[tuple[Any, ...], dict[int, list[int]]] = {}
    keys = zip(*(rows[name].tolist() for name in names), strict=True)
    for i, (key, rank) in enumerate(zip(keys, rows["rank"].tolist(), strict=True)):
        found.setdefault(key, {}).setdefault(int(rank), []).append(i)
    place = list(names).index("head")
    pairs = [
        (i, share)
        for key, by_rank in found.items()
        for rank, share in asked[key[place]]
        for i in by_rank.get(rank, ())
    ]
    chosen = rows.iloc[[i for i, _ in pairs]].reset_index(drop=True)
    return chosen.assign(**{SHARE: [share for _, share in pairs]})


# --- rows side by side --------------------------------------------------------------------------


def shares_of(study: pd.DataFrame) -> dict[float, Share]:
    """Return the shares of a study, none where all ranks are integers.

    Beside integers a share stands at its median rank over heads, a little off those at which
    another stands; the axis of all others is that of shares.
    """
    if SHARE not in study:
        return {}
    columns = (study[name].tolist() for name in ("head", "rank", SHARE))
    rows = dict.fromkeys((head, int(r), float(x)) for head, r, x in zip(*columns, strict=True))
    whole = {float(rank) for _, rank, x in rows if math.isnan(x)}
    by_share: dict[float, list[int]] = {}
    for _, rank, x in rows:
        if not math.isnan(x):
            by_share.setdefault(x, []).append(rank)
    if not whole:
        return {x: Share(x) for x in sorted(by_share)}
    found, taken = {}, set(whole)
    for x in sorted(by_share):
        place = quantiles(by_share[x], (0.5,))[0]
        while place in taken:
            place = math.nextafter(place, math.inf)
        taken.add(place)
        found[x] = Share(x, place)
    return found


def ranks_of(rows: pd.DataFrame, shares: Mapping[float, Share] | None = None) -> list[float]:
    """Return the rank of each row among those of other heads: a `Share` where it was given so.

    ``shares`` are those of the study, which are read off its own rows by default.
    """
    ranks: list[float] = [int(rank) for rank in rows["rank"].tolist()]
    if SHARE not in rows:
        return ranks
    known = shares_of(rows) if shares is None else shares
    given = rows[SHARE].tolist()
    return [r if math.isnan(x) else known[x] for r, x in zip(ranks, given, strict=True)]


def ranked(rows: pd.DataFrame, shares: Mapping[float, Share] | None = None) -> pd.DataFrame:
    """Return rows with a column more, `AT`, that holds `ranks_of`."""
    import pandas as pd

    return rows.assign(**{AT: pd.Series(ranks_of(rows, shares), dtype=object, index=rows.index)})


def described(at: float | None, ranks: Iterable[int], end: str = "") -> dict[str, Any]:
    """Return what a table of all heads holds of `ranks_of`: ``rank``, ``share``.

    Parameters
    ----------
    at : int, Share or None
        None for none.
    ranks : iterable of int
        Of the rows there: the rank is missing where it differs.
    end : str
        Of the names of both.
    """
    own = set(ranks) if isinstance(at, Share) else {at}
    share = at.share if isinstance(at, Share) else math.nan
    return {f"rank{end}": own.pop() if len(own) == 1 else None, f"{SHARE}{end}": share}


def text_of(record: Mapping[Any, Any], end: str = "", none: str = "") -> str:
    """Return the rank of a record that `described` is part of, as text; ``none`` without any."""
    share, rank = record.get(f"{SHARE}{end}", math.nan), record[f"rank{end}"]
    if not math.isnan(share):
        return str(Share(share))
    return none if is_missing(rank) else str(rank)


def in_words(rank: float) -> str:
    """Return a rank inside a sentence.

    Examples
    --------
    >>> in_words(8), in_words(Share(0.1))
    ('8', '10 % of n')
    """
    return f"{rank} of n" if isinstance(rank, Share) else str(rank)


def axis_of(ranks: Iterable[float]) -> str:
    """Return what an axis of ranks is called.

    Examples
    --------
    >>> axis_of([8, 16]), axis_of([Share(0.1)]), axis_of([8, Share(0.1, place=20.0)])
    ('rank r', 'rank r, % of the n keys of a head', 'rank r, or % of the n keys of a head')
    """
    kinds = {isinstance(rank, Share) for rank in ranks}
    if True not in kinds:
        return "rank r"
    return f"rank r,{' or' if False in kinds else ''} % of the n keys of a head"
