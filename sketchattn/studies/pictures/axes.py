"""Axes of errors and ranks: what they show, and what lies outside of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..columns import PREDICTORS, quantiles
from ..palette import DASHES, style_of
from .curves import BESIDE, Curve
from .words import lower_edge, some_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Decades beyond which an axis shows where most curves are, and names what lies outside.
MOST_DECADES = 3.5

REFERENCE_WIDTHS = {"svd": 1.3, "topk": 1.3, "zero": 1.5, "vmean": 1.5}


class Scale(NamedTuple):
    """A vertical axis; what is finite and above ``top`` or below ``bottom`` is named there."""

    kind: str
    bottom: float
    top: float
    threshold: float


def scale_of(field: str, curves: Sequence[Curve]) -> Scale:
    """Choose the vertical axis of a picture: where the medians live.

    Errors are on a logarithmic axis; where some are negative, which only ``row_kl_mean`` of rows
    that do not sum to one can be, on one that is linear around zero.  ``skill`` is linear down to
    -1, and logarithmic below where it falls under -2.  All finite values are inside unless they
    take more than `MOST_DECADES`: then a decade beyond the 6th and the 94th percentile is the end.
    """
    bands = [x for c in curves if c.name not in BESIDE for x in (*c.low, *c.high)]
    medians = [x for c in curves for x in c.middle if math.isfinite(x)]
    finite = medians + [x for x in bands if math.isfinite(x)]
    if field == "skill":
        low = min([*finite, 0.0])
        if low >= -2.0:
            return Scale("linear", low - 0.05 * (1.0 - low), 1.05, 1.0)
        if low < -(10**MOST_DECADES):
            low = max(low, min(10 * quantiles(medians, (0.06,))[0], -2.0))
        return Scale("symlog", low * 1.5, 1.15, 1.0)
    positive = [x for x in finite if x > 0] or [1.0]
    if min(finite, default=0.0) < 0:
        smallest = min(abs(x) for x in finite if x != 0)
        return Scale("symlog", min(finite) * 2.0, max(positive) * 2.0, smallest)
    low, high = min(positive), max(positive)
    if math.log10(high / low) > MOST_DECADES:
        logs = [math.log10(x) for x in medians if x > 0] or [0.0]
        first, last = quantiles(logs, (0.06, 0.94))
        beside = [math.log10(x) for c in curves if c.name in PREDICTORS for x in c.middle if x > 0]
        beside = [x for x in beside if math.isfinite(x)]
        first, last = min([first - 1, *beside]), max([last + 1, *beside])
        low, high = max(low, 10**first), min(high, 10**last)
    room = max((high / low) ** 0.05, 1.15)
    return Scale("log", low / room, high * room, 1.0)


def with_values(scale: Scale, values: Sequence[float]) -> Scale:
    """Return an axis that shows some values too, whatever they are: bounds of claims."""
    finite = [x for x in values if math.isfinite(x) and (x > 0 or scale.kind != "log")]
    if not finite:
        return scale
    low, high = min(finite), max(finite)
    if scale.kind == "log":
        low, high = low / 1.15, high * 1.15
    else:
        room = 0.05 * (max(high, scale.top) - min(low, scale.bottom))
        low, high = low - room, high + room
    return scale._replace(bottom=min(scale.bottom, low), top=max(scale.top, high))


def clip(values: Sequence[float], scale: Scale) -> tuple[list[float], list[str]]:
    """Return values that the axis can show, and what is wrong with the others.

    That is "top" or "bottom" for infinities, zeros of a logarithm, "above" or "below" for numbers
    outside, and "gap" for NaN.
    """
    shown, notes = [], []
    for x in values:
        if math.isnan(x):
            shown.append(math.nan)
            notes.append("gap")
        elif x == math.inf:
            shown.append(scale.top)
            notes.append("top")
        elif x == -math.inf or (scale.kind == "log" and x <= 0):
            shown.append(scale.bottom)
            notes.append("bottom")
        elif x > scale.top:
            shown.append(scale.top)
            notes.append("above")
        elif x < scale.bottom:
            shown.append(scale.bottom)
            notes.append("below")
        else:
            shown.append(x)
            notes.append("")
    return shown, notes


EDGES = {"top": "^", "above": "^", "bottom": "v", "below": "v"}


def name_edges(
    axes: Axes, on_edge: dict[str, list[str]], field: str, size: float | str = 8
) -> None:
    """Name the curves that touch an edge: their triangles may cover each other."""
    places = (
        (0.965, "top", (("top", "infinite"), ("above", "above the axis"))),
        (0.035, "bottom", (("bottom", lower_edge(field)), ("below", "below the axis"))),
    )
    for y, alignment, kinds in places:
        said = [f"{what}: {some_of(on_edge[kind], 6)}" for kind, what in kinds if kind in on_edge]
        if said:
            axes.text(
                0.5,
                y,
                "\n".join(said),
                transform=axes.transAxes,
                ha="center",
                va=alignment,
                fontsize=size,
                color="0.25",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1.5},
                zorder=6.0,
                parse_math=False,
            )


def line_style(name: str, methods: Sequence[str]) -> dict[str, Any]:
    """Return how Matplotlib draws the line of a method or reference."""
    look = style_of(name, methods)
    style = {"color": look.colour, "linestyle": DASHES[look.dash]}
    if look.marker:
        return {**style, "marker": look.marker, "linewidth": 1.4}
    return {**style, "linewidth": REFERENCE_WIDTHS.get(name, 1.3)}


def format_errors(axes: Axes, scale: Scale) -> None:
    """Set the vertical axis up, with plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    if scale.kind == "symlog":
        axes.set_yscale("symlog", linthresh=scale.threshold, linscale=1.0)
        axes.yaxis.set_major_locator(FixedLocator(symmetric_ticks(scale)))
        axes.yaxis.set_minor_locator(NullLocator())
    elif scale.kind == "log":
        axes.set_yscale("log")
        decades = math.log10(scale.top / scale.bottom)
        subs = [1.0, 2.0, 5.0] if decades < 2.5 else [1.0]
        if decades < 0.5:
            subs = [float(i) for i in range(1, 10)]
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(scale.bottom, scale.top)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def format_ranks(axes: Axes, ranks: Sequence[float], most: int = 7) -> None:
    """Set the horizontal axis of ranks up."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    words = {float(rank): str(rank) for rank in ranks}
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(spread_ranks(ranks, most)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: words.get(x, f"{x:.0f}")))
    axes.xaxis.set_minor_locator(NullLocator())
    if len(ranks) == 1:
        axes.set_xlim(ranks[0] / 2, ranks[0] * 2)
    else:
        room = (ranks[-1] / ranks[0]) ** 0.04
        axes.set_xlim(ranks[0] / room, ranks[-1] * room)


def spread_ranks(ranks: Sequence[float], most: int = 7) -> list[float]:
    """Return ranks that are far enough apart for their labels."""
    gap = (ranks[-1] / ranks[0]) ** (1 / most)
    chosen = [ranks[0]]
    for rank in ranks[1:]:
        if rank >= chosen[-1] * gap * (1 - 1e-9):
            chosen.append(rank)
    return chosen


def symmetric_ticks(scale: Scale) -> list[float]:
    """Return ticks of an axis that is linear around zero."""

    def powers(most: float) -> list[float]:
        if most < scale.threshold:
            return []
        first, last = math.ceil(math.log10(scale.threshold)), math.floor(math.log10(most))
        step = max(1, -(-(last - first + 1) // 5))
        return [10.0**i for i in range(first, last + 1, step)]

    return [-x for x in reversed(powers(-scale.bottom))] + [0.0, *powers(scale.top)]


def draw_curve(
    axes: Axes,
    curve: Curve,
    methods: Sequence[str],
    scale: Scale,
    *,
    markersize: float | None = 4.5,
    band: bool = True,
    **changes: Any,
) -> set[str]:
    """Draw a curve and its band; return which values had to be drawn on an edge or left a gap."""
    if not curve.ranks:
        return set()
    style = line_style(curve.name, methods)
    reference = curve.name in BESIDE
    middle, notes = clip(curve.middle, scale)
    zorder = 2.0 if reference else 3.0
    if not reference:
        style["markersize"] = markersize
        if band and (curve.low, curve.high) != (curve.middle, curve.middle):
            low, _ = clip(curve.low, scale)
            high, _ = clip(curve.high, scale)
            look = {"color": style["color"], "alpha": 0.18, "linewidth": 0}
            axes.fill_between(curve.ranks, low, high, zorder=zorder - 0.5, **look)
    style |= changes
    zorder = style.pop("zorder", zorder)
    if curve.name in PREDICTORS and len(set(curve.middle)) == 1 and math.isfinite(middle[0]):
        line = axes.axhline(middle[0], zorder=zorder, **style)
    else:
        if reference and len(curve.ranks) == 1:
            style |= {"marker": "_", "markersize": 12}
        (line,) = axes.plot(curve.ranks, middle, zorder=zorder, **style)
    line.set_gid(curve.name)
    for kind, marker in EDGES.items():
        where = [i for i, note in enumerate(notes) if note == kind]
        if where:
            axes.plot(
                [curve.ranks[i] for i in where],
                [middle[i] for i in where],
                linestyle="none",
                marker=marker,
                markersize=None if markersize is None else markersize * 1.6,
                color=style["color"],
                clip_on=False,
                zorder=5.0,
                gid=f"{curve.name}:{kind}",
            )
    return set(notes) - {""}


def draw_intervals(
    axes: Axes, spans: Mapping[Any, tuple[float, float]], scale: Scale, **style: Any
) -> None:
    """Draw intervals as bars with caps at places of the horizontal axis."""
    for place, (low, high) in spans.items():
        ends, _ = clip([low, high], scale)
        axes.plot([place, place], ends, marker="_", markersize=4, linewidth=0.9, **style)
