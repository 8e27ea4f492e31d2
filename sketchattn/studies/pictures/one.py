"""One panel: a measure against rank, the median over heads, every line named where it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...base.drawing import make_figure
from ..columns import PREDICTORS
from ..palette import REFERENCE_LABELS
from ..ranks import axis_of, shares_of
from .axes import (
    Scale,
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
from .cost import GROUND, WIDTH, without_the_useless
from .curves import BESIDE, Curve, head_curves, methods_of, summary_curves, tables_of
from .places import Label, end_labels
from .words import MEASURES, shorten

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT = 5.6


def draw_one(
    frame: pd.DataFrame, references: pd.DataFrame, field: str, bounds: pd.DataFrame | None
) -> Figure:
    """Return the picture of one measure, in the style that is in force."""
    figure = make_figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0.075, 0.09, 0.66, 0.79))
    heads = [str(x) for x in dict.fromkeys(frame["head"])]
    methods = methods_of(frame)
    own = {m: m for m in methods}
    panel = panel_of(frame, references, field, methods, heads, BESIDE, bounds)
    labels = draw_panel(axes, panel, field, scale_for(field, [panel]), own)
    axes.tick_params(labelsize=8.5)
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(axis_of(panel.ranks), fontsize=9, labelpad=2)
    axes.set_ylabel(field, fontsize=9, labelpad=2)
    end_labels(axes, labels, 8.5, 14.0)
    what, formula = MEASURES[field]
    figure.suptitle(
        f"{what[0].upper()}{what[1:]}: {formula}", x=0.01, y=0.985, ha="left", va="top",
        fontsize=11, fontweight="bold",
    )  # fmt: skip
    over = "1 head, median over seeds" if len(heads) == 1 else (
        f"Median of {len(heads)} heads, bands between quartiles of heads"
    )  # fmt: skip
    better = "higher" if field == "skill" else "lower"
    figure.text(
        0.01, 0.925, f"{over}; {better} is better.", ha="left", va="top", fontsize=8.5,
        color="0.25",
    )  # fmt: skip
    return figure


class Panel(NamedTuple):
    """What one panel shows: its curves, the bounds over them, and these bounds as curves."""

    curves: list[Curve]
    limits: list[Bound]
    over: list[Curve]

    @property
    def ranks(self) -> list[float]:
        """The ranks of all curves, in order."""
        return sorted({r for c in (*self.curves, *self.over) for r in c.ranks})


def panel_of(
    frame: pd.DataFrame,
    references: pd.DataFrame,
    field: str,
    methods: Sequence[str],
    heads: Sequence[str],
    beside: Sequence[str],
    bounds: pd.DataFrame | None,
) -> Panel:
    """Return the curves of some methods over some heads; a single head shows its seeds."""
    table = tables_of(frame, references, field)
    every = [*beside, *methods]
    if len(heads) == 1:
        curves = head_curves(table, every, heads[0])
    else:
        curves = summary_curves(table, every, heads)
    curves = [c for c in curves if any(not math.isnan(x) for x in c.middle)]
    limits, limit_table = bounds_of(bounds, field, methods, shares_of(references))
    return Panel(curves, limits, bound_curves(limits, limit_table, heads))


def scale_for(field: str, panels: Sequence[Panel]) -> Scale:
    """Return the axis that panels share: no bound lies outside, vacuous or not."""
    curves = [c for panel in panels for c in panel.curves]
    scale = without_the_useless(scale_of(field, curves), curves)
    return with_values(scale, [x for panel in panels for c in panel.over for x in c.middle])


def draw_panel(
    axes: Axes,
    panel: Panel,
    field: str,
    scale: Scale,
    names: Mapping[str, str],
    words: float | str = 8,
    **look: Any,
) -> list[Label]:
    """Draw a panel; return what its lines are called, where they end, and how they look.

    ``names`` are all methods that have a look here, and what they are called.
    """
    methods = list(names)
    format_ranks(axes, panel.ranks or [1])
    format_errors(axes, scale)
    _shade(axes, panel.curves, scale, field)
    on_edge: dict[str, list[str]] = {}
    ends: list[Label] = []
    for curve in panel.curves:
        called = names.get(curve.name, REFERENCE_LABELS.get(curve.name, curve.name))
        for note in draw_curve(axes, curve, methods, scale, **look):
            on_edge.setdefault(note, []).append(called)
        (line,) = (x for x in axes.lines if x.get_gid() == curve.name)
        line.set_label(called)
        style = {"markersize": 4.5, **line_style(curve.name, methods), **look}
        flat = curve.name in PREDICTORS and len(set(curve.middle)) == 1
        last = _last(curve.ranks, clip(curve.middle, scale)[0])
        ends.append((called, [(axes.get_xlim()[1], last[1]) if flat else last], style))
    for limit, curve in zip(panel.limits, panel.over, strict=True):
        shown, _ = clip(curve.middle, scale)
        (line,) = axes.plot(curve.ranks, shown, zorder=3.5, gid=limit.claim, **limit.style)
        line.set_label(f"{limit.claim} ({limit.what})")
        if any(math.isfinite(x) for x in shown):
            ends.append((shorten(limit.claim, 34), [_last(curve.ranks, shown)], limit.style))
    name_edges(axes, on_edge, field, words)
    return ends


def _last(ranks: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return the last point that is there."""
    return [(float(x), y) for x, y in zip(ranks, values, strict=True) if not math.isnan(y)][-1]


def _shade(axes: Axes, curves: Sequence[Curve], scale: Scale, field: str) -> None:
    """Put what is worse than the mean of V on grey ground."""
    level = next((c.middle[0] for c in curves if c.name == "vmean"), math.nan)
    if scale.bottom < level < scale.top:
        end = scale.bottom if field == "skill" else scale.top
        axes.axhspan(min(level, end), max(level, end), color=GROUND, linewidth=0, zorder=0.2)
