"""One small panel a method: that method in colour with its spread over heads, all others in grey.

Floors and predictors are in every panel, and axes are shared.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...base.drawing import make_figure
from ..columns import quantiles
from ..palette import REFERENCE_LABELS
from ..ranks import axis_of
from .axes import (
    clip,
    draw_curve,
    draw_intervals,
    format_errors,
    format_ranks,
    line_style,
    name_edges,
    scale_of,
)
from .cost import GROUND, WIDTH, without_the_useless
from .curves import BESIDE, intervals_of, medians_of, methods_of, summary_curves, tables_of
from .words import MEASURES, shorten

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4
# Inches: a row of panels, and what stands above and below all of them.
ROW, ABOVE, BELOW = 1.72, 0.95, 0.85
INTERVALS = "  Bars: 95 % intervals, errors are of sampled rows."


def draw_each(frame: pd.DataFrame, references: pd.DataFrame, field: str) -> Figure:
    """Return the picture of one measure, in the style that is in force."""
    from matplotlib.collections import LineCollection

    methods = methods_of(frame)
    table = tables_of(frame, references, field)
    heads = len(dict.fromkeys(frame["head"]))
    beside = summary_curves(table, BESIDE)
    curves = summary_curves(table, methods)
    worst = {
        name: {r: quantiles(x, (1.0,))[0] for r, x in medians_of(table, name).items()}
        for name in methods
    }
    scale = without_the_useless(scale_of(field, [*beside, *curves]), [*beside, *curves])
    ranks = sorted({r for c in (*beside, *curves) for r in c.ranks})
    others = {c.name: list(zip(c.ranks, clip(c.middle, scale)[0], strict=True)) for c in curves}
    mean = next((c for c in beside if c.name == "vmean"), None)
    columns = min(COLUMNS, max(len(methods), 1))
    rows = max(1, -(-len(methods) // columns))
    height = ROW * rows + ABOVE + BELOW
    figure = make_figure(figsize=(WIDTH, height))
    grid = figure.add_gridspec(
        rows, columns, left=0.07, right=0.99, bottom=BELOW / height, top=1 - ABOVE / height,
        wspace=0.06, hspace=0.24,
    )  # fmt: skip
    first: Axes | None = None
    sampled = False
    for i, curve in enumerate(curves):
        y, x = divmod(i, columns)
        axes = figure.add_subplot(grid[y, x], sharex=first, sharey=first)
        if first is None:
            first = axes
            format_ranks(axes, ranks, 5)
            format_errors(axes, scale)
        if mean is not None and mean.middle and scale.bottom < mean.middle[0] < scale.top:
            axes.axhspan(mean.middle[0], scale.top, color=GROUND, linewidth=0, zorder=0.2)
        grey = [line for name, line in others.items() if name != curve.name]
        axes.add_collection(LineCollection(grey, colors="0.72", linewidths=0.7, zorder=1.5))
        for reference in beside:
            draw_curve(axes, reference, methods, scale, markersize=2.5, linewidth=1.1)
        notes = draw_curve(axes, curve, methods, scale, markersize=4.0, linewidth=1.9, zorder=4.0)
        if heads > 1:
            tops = [worst[curve.name][r] for r in curve.ranks]
            shown, _ = clip(tops, scale)
            style = line_style(curve.name, methods)
            axes.plot(
                curve.ranks, shown, color=style["color"], linewidth=0.9, zorder=3.5,
                gid=f"{curve.name}:worst",
            )  # fmt: skip
        if field == "output_fro_rel":
            colour = line_style(curve.name, methods)["color"]
            spans = intervals_of(frame, curve.name)
            draw_intervals(axes, spans, scale, color=colour, gid=f"{curve.name}:interval")
            sampled = sampled or bool(spans)
        on_edge = {note: [f"{_extreme(curve.middle, note)}"] for note in notes if note != "gap"}
        name_edges(axes, on_edge, field, 7.5)
        axes.set_title(
            shorten(curve.name, 26), fontsize=9, fontweight="bold", pad=3, parse_math=False
        )
        last = i + columns >= len(curves)
        axes.tick_params(labelsize=8, pad=2, labelbottom=last, labelleft=x == 0, length=2.5)
        axes.grid(True, which="major", color="0.9", linewidth=0.5)
        axes.set_axisbelow(True)
    what, formula = MEASURES[field]
    figure.suptitle(
        f"Each method against rank: {what} {formula}", x=0.01, y=1 - 0.1 / height, ha="left",
        va="top", fontsize=11, fontweight="bold",
    )  # fmt: skip
    over = "Line: median of its seeds." if heads == 1 else (
        f"Line: median of {heads} heads; band: quartiles of heads; thin line: the worst head."
    )  # fmt: skip
    figure.text(
        0.01, 1 - 0.4 / height,
        f"{over}  Grey lines: all other methods.\nGrey ground: worse than the mean of V."
        f"{INTERVALS if sampled else ''}",
        ha="left", va="top", fontsize=8.5, color="0.25", linespacing=1.35,
    )  # fmt: skip
    figure.text(0.53, 0.5 / height, axis_of(ranks), ha="center", fontsize=9)
    _legend(figure, height)
    return figure


def _extreme(values: list[float], note: str) -> str:
    """Return the largest or smallest number that an edge stands for."""
    known = [x for x in values if not math.isnan(x)]
    return f"{max(known):.3g}" if note in ("top", "above") else f"{min(known):.3g}"


def _legend(figure: Figure, height: float) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=REFERENCE_LABELS[name], **line_style(name, [])) for name in BESIDE
    ]
    figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.53, 0.42 / height), ncols=4,
        fontsize=8.5, frameon=False, handlelength=2.8, columnspacing=1.5,
    )  # fmt: skip
