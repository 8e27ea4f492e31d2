"""A panel a head: one measure against rank, first the median over all heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...base.drawing import make_figure
from ..palette import REFERENCE_LABELS
from ..ranks import axis_of, shares_of
from .axes import (
    clip,
    draw_curve,
    format_errors,
    format_ranks,
    line_style,
    name_edges,
    scale_of,
    with_values,
)
from .bounds import Bound, bound_curves, bounds_of
from .cost import WIDTH, without_the_useless
from .curves import BESIDE, Curve, head_curves, methods_of, summary_curves, tables_of
from .words import MEASURES, lower_edge, shorten

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_HEADS = 15


def draw_panels(
    frame: pd.DataFrame, references: pd.DataFrame, field: str, bounds: pd.DataFrame | None
) -> Figure:
    """Return the picture of one measure, in the style that is in force."""
    heads = list(dict.fromkeys(frame["head"])) or list(dict.fromkeys(references["head"]))
    methods = methods_of(frame)
    names = [*BESIDE, *methods]
    seeds = frame["seed"].nunique()
    places = np.linspace(0, len(heads) - 1, min(len(heads), MOST_HEADS)).round().astype(int)
    drawn = [heads[i] for i in np.unique(places)]

    table = tables_of(frame, references, field)
    panels: list[tuple[str, list[Curve]]] = [
        (_summary_title(len(heads), seeds), summary_curves(table, names))
    ]
    panels += [(str(head), head_curves(table, names, head)) for head in drawn]
    limits, limit_table = bounds_of(bounds, field, methods, shares_of(references))
    beyond = [bound_curves(limits, limit_table, shown) for shown in (heads, *([h] for h in drawn))]
    every = [curve for _, curves in panels for curve in curves]
    scale = without_the_useless(scale_of(field, every), every)
    scale = with_values(scale, [x for over in beyond for c in over for x in c.middle])

    ranks = sorted({rank for curve in panels[0][1] for rank in curve.ranks})

    what, formula = MEASURES[field]
    title = f"{field}: {what}, {formula}"
    if len(drawn) < len(heads):
        title += f"\n{len(drawn)} of {len(heads)} heads drawn, evenly spaced"

    rows, columns, boxes = _layout(len(drawn))
    entries = len(methods) + len(BESIDE) + len(limits) + 3
    # Names of claims are long.
    legend_columns, legend_size = (2 if limits else 4), 8
    # Inches; fixed margins, since Matplotlib's automatic layout takes longer than all the rest.
    width, height = WIDTH, 1.75 * rows
    top = 0.8 if "\n" in title else 0.6
    bottom = 0.75 + 0.19 * math.ceil(entries / legend_columns)
    figure = make_figure(figsize=(width, height + top + bottom))
    grid = figure.add_gridspec(
        rows,
        columns,
        left=0.55 / width,
        right=1 - 0.1 / width,
        bottom=bottom / (height + top + bottom),
        top=1 - top / (height + top + bottom),
        wspace=0.2,
        hspace=0.26,
    )
    first: Axes | None = None
    notes: set[str] = set()
    lowest = {x: y for y, x, size in boxes if size == 1}
    for (name, curves), over, (y, x, size) in zip(panels, beyond, boxes, strict=True):
        axes = figure.add_subplot(grid[y : y + size, x : x + size], sharex=first, sharey=first)
        summary = first is None
        first = axes if first is None else first
        on_edge: dict[str, list[str]] = {}
        for curve in curves:
            markersize = 4.5 if size > 1 else 3.0
            for note in draw_curve(axes, curve, methods, scale, markersize=markersize):
                on_edge.setdefault(note, []).append(curve.name)
        for limit, curve in zip(limits, over, strict=True):
            shown, _ = clip(curve.middle, scale)
            axes.plot(curve.ranks, shown, zorder=3.5, gid=limit.claim, **limit.style)
        notes |= set(on_edge)
        if size > 1:
            name_edges(axes, on_edge, field)
        if summary:
            format_ranks(axes, ranks)
            format_errors(axes, scale)
            axes.patch.set_facecolor("#f7f7f4")
        letters, points = (60, 9.5) if size > 1 else (28, 8)
        axes.set_title(shorten(name, letters), fontsize=points, pad=6, parse_math=False)
        axes.tick_params(
            labelsize=8.5 if size > 1 else 7.5,
            pad=2,
            labelbottom=size > 1 or y == lowest[x],
            labelleft=size > 1 or x == 0 or (x == 2 and y < 2),
        )
        axes.grid(True, which="major", color="0.88", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=11, y=1 - 0.1 / (height + top + bottom), va="top")
    figure.text(
        0.5, (bottom - 0.45) / (height + top + bottom), axis_of(ranks), ha="center", fontsize=10
    )
    handles = _legend_handles(methods, limits, notes, field)
    labels = [str(handle.get_label()) for handle in handles]
    legend = figure.legend(
        handles=handles,
        labels=["x"] * len(handles),  # Matplotlib leaves names out that begin with "_"
        loc="upper center",
        bbox_to_anchor=(0.5, (bottom - 0.5) / (height + top + bottom)),
        ncols=legend_columns,
        fontsize=legend_size,
        frameon=False,
        handlelength=3.2,
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)
        text.set_parse_math(False)
    return figure


def _summary_title(heads: int, seeds: int) -> str:
    if heads == 1:
        return f"1 head: median of {seeds} seed{'' if seeds == 1 else 's'}"
    return f"median of {heads} heads (band: quartiles over heads)"


def _layout(heads: int) -> tuple[int, int, list[tuple[int, int, int]]]:
    """Return rows and columns of the grid and (row, column, size) of each panel.

    The summary takes the first 2 x 2 cells; a single head takes 2 x 2 beside it.
    """
    columns = 5 if heads > 12 else 4
    if heads == 1:
        return 2, columns, [(0, 0, 2), (0, 2, 2)]
    rows = max(2, -(-(heads + 4) // columns))
    cells = [(y, x, 1) for y in range(rows) for x in range(columns) if y > 1 or x > 1]
    return rows, columns, [(0, 0, 2), *cells[:heads]]


def _legend_handles(
    methods: Sequence[str], limits: Sequence[Bound], notes: set[str], field: str
) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=REFERENCE_LABELS.get(name, name), **line_style(name, methods))
        for name in (*methods, *BESIDE)
    ]
    handles += [Line2D([], [], label=f"{x.claim} ({x.what})", **x.style) for x in limits]
    edge: dict[str, Any] = {"linestyle": "none", "color": "0.2", "markersize": 7}
    for kinds, marker, side in (
        ((("top", "infinite"), ("above", "above it")), "^", "upper"),
        ((("bottom", lower_edge(field)), ("below", "below it")), "v", "lower"),
    ):
        said = " or ".join(what for kind, what in kinds if kind in notes)
        if said:
            label = f"on the {side} edge: {said}"
            handles.append(Line2D([], [], marker=marker, label=label, **edge))
    if "gap" in notes:
        handles.append(Line2D([], [], linestyle="none", label="gaps: not a number"))
    return handles
