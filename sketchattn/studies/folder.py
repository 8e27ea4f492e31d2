"""What is in the folder of a study, read as it was written."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .columns import BOUND_COLUMNS, COLUMNS, SHARE
from .plots import PICTURES
from .ranks import Asked, asked_of, has_shares, with_shares

if TYPE_CHECKING:
    import pandas as pd

WORDS = {"head", "method", "claim", "field", "what"}
COUNTS = {"rank", "seed", "rows", "bytes", "effective_rank"}


class Found(NamedTuple):
    """Hold what a finished study left in its folder."""

    frame: pd.DataFrame
    references: pd.DataFrame
    bounds: pd.DataFrame
    settings: dict[str, Any]
    pictures: tuple[Path, ...]


def read_folder(folder: Path) -> Found | None:
    """Return what a finished study left in a folder, None if there is none that can be read."""
    try:
        settings = json.loads((folder / "study.json").read_text())
        if not isinstance(settings, dict):
            return None
        frames = [read_rows(folder / name, COLUMNS) for name in ("results.csv", "references.csv")]
        path = folder / "bounds.csv"
        bounds = read_rows(path, BOUND_COLUMNS) if path.is_file() else _empty(BOUND_COLUMNS)
    except (OSError, ValueError, KeyError):
        return None
    if SHARE not in frames[0] and has_shares(asked := _asked_in(settings, frames)):
        frames = [with_shares(frame, asked, ("head", "method")) for frame in frames]
        bounds = with_shares(bounds, asked, ("claim", "head")) if len(bounds) else bounds
    pictures = tuple(folder / name for name in PICTURES if (folder / name).is_file())
    return Found(frames[0], frames[1], bounds, settings, pictures)


def _asked_in(settings: dict[str, Any], frames: Sequence[pd.DataFrame]) -> dict[str, list[Asked]]:
    """Return what a study asked of its heads that wrote no shares; {} where nothing says it."""
    try:
        asked = asked_of(settings["ranks"], {x["name"]: x["n_k"] for x in settings["heads"]})
    except (TypeError, KeyError):
        return {}
    known = {(name, rank) for name, own in asked.items() for rank, _ in own}
    there = {pair for x in frames for pair in zip(x["head"], x["rank"], strict=True)}
    return asked if there <= known else {}


def read_rows(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Return rows as a study wrote them, with the same types.

    A column that older versions did not write is NaN, or missing where it counts something; that
    of shares is there where it was written.
    """
    import pandas as pd

    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    found: dict[str, Any] = {}
    columns = [*columns, *([SHARE] if SHARE in header else [])]
    for name in columns:
        if name not in header:
            texts = [""] * len(rows)
        else:
            i = header.index(name)
            texts = [row[i] for row in rows]
        if name in WORDS:
            found[name] = pd.Series(texts, dtype=object if not texts else None)
        elif name in COUNTS:
            values = [None if x == "" else int(x) for x in texts]
            whole = None not in values and name != "effective_rank"
            found[name] = pd.Series(values, dtype="int64" if whole else "Int64")
        else:
            found[name] = pd.Series([float(x) if x else float("nan") for x in texts], dtype=float)
    return pd.DataFrame(found, columns=list(columns))


def _empty(columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(columns=list(columns))
