"""Layer by head: how hard each head is, and which method is best on it.

Heads whose names do not say where they are stand in a strip.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...base.drawing import make_figure
from ..columns import quantiles
from ..ranks import in_words, ranks_of, shares_of
from .cost import WIDTH
from .curves import medians_of, methods_of, tables_of
from .words import MEASURES, shorten

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MOST_COLUMNS = 12


def place_of(name: str) -> tuple[int, int] | None:
    """Return layer and head of a name, None where it says none.

    Examples
    --------
    >>> place_of("minilm/layer3.head5"), place_of("model.layers.11.self_attn/head2")
    ((3, 5), (11, 2))
    >>> place_of("clustered/head0") is None
    True
    """
    found = re.search(r"(?:layers?|blocks?|h)[._/-]?(\d+)", name, re.IGNORECASE)
    if found is None:
        return None
    rest = name[found.end() :]
    head = re.search(r"head[._/-]?(\d+)", rest, re.IGNORECASE) or re.search(r"(\d+)\D*$", rest)
    return None if head is None else (int(found[1]), int(head[1]))


def cells_of(names: Sequence[str]) -> tuple[dict[str, tuple[int, int]], list[str], list[str]]:
    """Return row and column of each head, and what rows and columns are called."""
    places = {name: place_of(name) for name in names}
    known = [x for x in places.values() if x is not None]
    if len(known) == len(names) and len(set(known)) == len(names):
        layers = sorted({x[0] for x in known})
        heads = sorted({x[1] for x in known})
        # Chosen heads of a model would leave most of a full map empty.
        if len(names) * 3 >= len(layers) * len(heads):
            where = {
                name: (layers.index(x[0]), heads.index(x[1]))
                for name, x in places.items() if x is not None
            }  # fmt: skip
            return where, [f"layer {i}" for i in layers], [f"head {i}" for i in heads]
        counts: dict[int, int] = {}
        where = {}
        for name, x in sorted(places.items(), key=lambda item: item[1] or (0, 0)):
            assert x is not None
            where[name] = (layers.index(x[0]), counts.get(x[0], 0))
            counts[x[0]] = counts.get(x[0], 0) + 1
        return where, [f"layer {i}" for i in layers], [""] * max(counts.values())
    columns = min(len(names), MOST_COLUMNS)
    where = {name: divmod(i, columns) for i, name in enumerate(names)}
    return where, [""] * -(-len(names) // columns), [""] * columns


def draw_layers(frame: pd.DataFrame, references: pd.DataFrame, field: str) -> Figure:
    """Return the picture of one measure, in the style that is in force."""
    methods = methods_of(frame)
    heads = [str(x) for x in dict.fromkeys(frame["head"])]
    table = tables_of(frame, references, field)
    ranks = sorted(set(ranks_of(frame, shares_of(references))))
    rank = ranks[len(ranks) // 2]
    best: dict[str, tuple[float, str]] = {}
    mean: dict[str, float] = {}
    sign = -1.0 if field == "skill" else 1.0
    for head in heads:
        found = []
        for method in methods:
            values = medians_of(table, method, [head]).get(rank, [])
            found += [(sign * x, x, method) for x in values if not math.isnan(x)]
        if found:
            _, x, method = min(found)
            best[head] = (x, method)
        values = [x for v in medians_of(table, "vmean", [head]).values() for x in v]
        mean[head] = quantiles(values, (0.5,))[0]

    where, rows, columns = cells_of(heads)
    from matplotlib.colors import LogNorm, Normalize

    grid = np.full((len(rows), len(columns)), np.nan)
    for head, (y, x) in where.items():
        if head in best:
            grid[y, x] = best[head][0]
    shown = grid[np.isfinite(grid)]
    logarithmic = field != "skill" and len(shown) > 0 and shown.min() > 0
    limits = (float(shown.min()), float(shown.max())) if len(shown) else (0.1, 1.0)
    if limits[0] == limits[1]:
        limits = (limits[0] * 0.9, limits[1] * 1.1 + 1e-300)
    norm: Any = LogNorm(*limits) if logarithmic else Normalize(*limits)

    cell = 0.62
    height = cell * len(rows) + 1.35
    figure = make_figure(figsize=(WIDTH, height))
    left = 0.75 if any(rows) else 0.12
    span = WIDTH - left - 1.0
    axes = figure.add_axes((left / WIDTH, 0.15 / height, span / WIDTH, cell * len(rows) / height))
    image = axes.imshow(grid, aspect="auto", cmap="cividis_r", norm=norm)
    letters = max(6, int(span / len(columns) * 13.5))
    for head, (y, x) in where.items():
        if head not in best:
            continue
        value, method = best[head]
        dark = float(norm(value)) > 0.55
        place = place_of(head)
        named = f"head {place[1]}" if place is not None and any(rows) else head
        lines = [] if any(columns) else [shorten(named, letters)]
        beats = not math.isfinite(mean[head]) or sign * value < sign * mean[head]
        lines += [shorten(method, letters), f"{value:.2g}" + ("" if beats else " > mean of V")]
        axes.text(
            x, y, "\n".join(lines), ha="center", va="center", fontsize=8,
            color="white" if dark else "black", parse_math=False, linespacing=1.25,
        )  # fmt: skip
    axes.set_xticks(range(len(columns)) if any(columns) else [], columns if any(columns) else [])
    axes.set_yticks(range(len(rows)) if any(rows) else [], rows if any(rows) else [])
    axes.tick_params(labelsize=8.5, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(True, which="minor", color="white", linewidth=2)
    bar = figure.add_axes((1 - 0.8 / WIDTH, 0.15 / height, 0.16 / WIDTH, cell * len(rows) / height))
    drawn = figure.colorbar(image, cax=bar)
    drawn.ax.tick_params(labelsize=8)
    if logarithmic:
        few = [limits[0] * (limits[1] / limits[0]) ** (i / 4) for i in range(5)]
        drawn.set_ticks(few, labels=[f"{x:.2g}" for x in few])
    drawn.minorticks_off()
    what, formula = MEASURES[field]
    figure.suptitle(
        f"Which method is best on which head, at rank {in_words(rank)}", x=0.01, y=1 - 0.1 / height,
        ha="left", va="top", fontsize=11, fontweight="bold",
    )  # fmt: skip
    figure.text(
        0.01, 1 - 0.42 / height,
        f"The method with the smallest {what} {formula}, median over seeds, and that error.\n"
        "Dark: a hard head.",
        ha="left", va="top", fontsize=8.5, color="0.25", linespacing=1.35,
    )  # fmt: skip
    return figure
