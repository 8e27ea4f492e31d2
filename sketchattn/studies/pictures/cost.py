"""The first picture: error against time, and against what a row reads.

Every method is its Pareto front over ranks; those that no other beats at their cost are strong and
the others pale.  What lies on grey ground is of no use: slower than exact attention, reading more
than it, or worse than the mean of V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...base.drawing import make_figure
from ..columns import EXACT, FLOORS, PREDICTORS, quantiles
from ..palette import DASHES, style_of
from ..ranks import in_words
from .axes import Scale, clip, draw_intervals, format_errors, name_edges, scale_of
from .curves import (
    Curve,
    Table,
    curve_of,
    front_of,
    intervals_of,
    medians_of,
    methods_of,
    points_of,
    tables_of,
)
from .places import Label, place_labels
from .words import MEASURES, seconds_as_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What GitHub shows is about 880 pixels wide: 8.8 inches, in which 8 points are 11 of its pixels.
WIDTH = 8.8
GROUND = "#ececec"

COSTS = {
    "seconds": ("time of a head", "slower than exact"),
    "work": ("keys, features, landmarks, clusters or regions that a row reads, share of exact",
             "reads more than exact"),
}  # fmt: skip


def draw_cost(frame: pd.DataFrame, references: pd.DataFrame, field: str) -> Figure:
    """Return the picture of one measure against both costs, in the style that is in force."""
    methods = methods_of(frame)
    errors = tables_of(frame, references, field)
    heads = len(dict.fromkeys(frame["head"]))
    middles = {name: medians_of(errors, name) for name in (*methods, *FLOORS, "vmean", "zero")}
    curves = []
    for name, found in middles.items():
        triples = [quantiles(x, (0.5,)) * 3 for x in found.values()]
        curves.append(curve_of(name, list(found), triples))
    scale = without_the_useless(scale_of(field, curves), curves)
    figure = make_figure(figsize=(WIDTH, 10.4))
    panels = figure.subplots(2, 1, sharey=True)
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.055, top=0.915, hspace=0.2)
    what, formula = MEASURES[field]
    over = "1 head" if heads == 1 else f"{heads} heads, median"
    figure.suptitle(
        f"Which approximation is best at which cost: {what} {formula}\n",
        x=0.01, y=0.985, ha="left", va="top", fontsize=11, fontweight="bold",
    )  # fmt: skip
    figure.text(
        0.01, 0.962,
        f"{over}.  Down and left is better.  A point is a rank, a line the best ranks of one "
        "method.\nStrong, on yellow: no other method is better at that cost.  Grey ground: of no "
        "use.",
        ha="left", va="top", fontsize=8.5, color="0.25", linespacing=1.35,
    )  # fmt: skip
    for axes, cost in zip(panels, COSTS, strict=True):
        format_errors(axes, scale)
        table = tables_of(frame, references, cost)
        spans = {m: intervals_of(frame, m) if field == "output_fro_rel" else {} for m in methods}
        _draw_panel(axes, methods, middles, table, cost, scale, field, spans)
        axes.set_ylabel(field, fontsize=9, labelpad=2)
        axes.tick_params(labelsize=8.5)
    return figure


def _draw_panel(
    axes: Axes,
    methods: Sequence[str],
    middles: dict[str, dict[float, list[float]]],
    table: Table,
    cost: str,
    scale: Scale,
    field: str,
    spans: dict[str, dict[float, tuple[float, float]]],
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    points = {m: points_of(middles[m], medians_of(table, m), m) for m in methods}
    points = {m: [p for p in found if p.cost > 0] for m, found in points.items()}
    costs = [p.cost for found in points.values() for p in found]
    exact = quantiles([x for v in medians_of(table, EXACT).values() for x in v], (0.5,))[0]
    known = [*costs, exact] if exact > 0 else costs
    low, high = (min(known), max(known)) if known else (0.1, 1.0)
    room = max((high / low) ** 0.05, 1.15)
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room)
    label, beyond = COSTS[cost]
    axes.set_xlabel(label, fontsize=9, labelpad=2)
    if cost == "seconds":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: seconds_as_text(x)))
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g} %"))
    decades = math.log10(high / low)
    subs = [1.0, 2.0, 5.0] if decades < 3 else [1.0, 3.0] if decades < 5 else [1.0]
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)

    # Of no use: worse than what needs no keys, or dearer than what is exact.
    mean = quantiles([x for v in middles["vmean"].values() for x in v], (0.5,))[0]
    if math.isfinite(mean) and scale.bottom < mean < scale.top:
        axes.axhspan(mean, scale.top, color=GROUND, linewidth=0, zorder=0.2)
        axes.axhline(mean, color="0.45", linewidth=1.2, zorder=1.5, gid="vmean")
    if exact > 0:
        axes.axvspan(exact, high * room * 10, color=GROUND, linewidth=0, zorder=0.2)
        axes.axvline(exact, color="black", linewidth=1.2, zorder=1.5, gid=EXACT)
    fixed, floors = _draw_references(axes, middles, table, cost, scale, mean, exact, beyond)

    everything = [p for found in points.values() for p in found]
    best = front_of(p for p in everything if not exact > 0 or p.cost <= exact)
    best = [p for p in best if not math.isfinite(mean) or p.error < mean]
    strong = list(dict.fromkeys(p.method for p in best))
    if best:
        shown, _ = clip([p.error for p in best], scale)
        axes.plot(
            [p.cost for p in best], shown, color="#ffe28a", linewidth=9, alpha=0.7, zorder=1.8,
            solid_capstyle="round", gid="front",
        )  # fmt: skip
    labels: list[Label] = []
    outside: dict[str, list[str]] = {}
    for method in (*(m for m in methods if m not in strong), *strong):
        own = front_of(points[method])
        look = style_of(method, methods)
        on = method in strong
        rest = [p for p in points[method] if p not in own]
        shown, notes = clip([p.error for p in own], scale)
        axes.plot(
            [p.cost for p in own], shown, color=look.colour, linestyle=DASHES[look.dash],
            marker=look.marker, markersize=5.5 if on else 4, linewidth=1.7 if on else 1.0,
            alpha=1.0 if on else 0.45, zorder=4 if on else 3, gid=method,
        )  # fmt: skip
        if on:
            bars = {p.cost: spans[method][p.rank] for p in own if p.rank in spans[method]}
            draw_intervals(
                axes, bars, scale, color=look.colour, zorder=3.8, gid=f"{method}:interval"
            )
        others, more = clip([p.error for p in rest], scale)
        if rest:
            axes.plot(
                [p.cost for p in rest], others, color=look.colour, linestyle="none",
                marker=look.marker, markersize=3, markerfacecolor="none", alpha=0.35, zorder=2.5,
                gid=f"{method}:rest",
            )  # fmt: skip
        for note in {*notes, *more} - {""}:
            outside.setdefault(note, []).append(method)
        spots = [(p.cost, y) for p, y, note in zip(own, shown, notes, strict=True) if not note]
        spots = spots or [(p.cost, y) for p, y in zip(own, shown, strict=True)]
        if spots:
            style = {
                "fontsize": 9 if on else 8,
                "fontweight": "bold" if on else "normal",
                "color": "black" if on else "0.35",
                "gid": f"{method}:label",
            }
            labels.append((method, spots, style))
    obstacles = [(p.cost, clip([p.error], scale)[0][0]) for found in points.values() for p in found]
    labels.sort(key=lambda item: item[0] not in strong)
    labels = floors + labels
    place_labels(axes, labels, obstacles, fixed)
    name_edges(axes, outside, field)


def without_the_useless(scale: Scale, curves: Sequence[Curve]) -> Scale:
    """Return an axis that ends at thrice what predictors reach, if most values lie below.

    Whatever is worse than zero or than the mean of V is of no use, however much worse it is.
    """
    if scale.kind != "log":
        return scale
    beside = [x for c in curves if c.name in PREDICTORS for x in c.middle if math.isfinite(x)]
    others = [x for c in curves if c.name not in PREDICTORS for x in c.middle if x > 0]
    if not beside or not others:
        return scale
    top = max(3.0 * max(beside), quantiles(others, (0.75,))[0] * 1.3)
    return scale._replace(top=min(scale.top, top)) if top > 3 * scale.bottom else scale


def _draw_references(
    axes: Axes,
    middles: dict[str, dict[float, list[float]]],
    table: Table,
    cost: str,
    scale: Scale,
    mean: float,
    exact: float,
    beyond: str,
) -> tuple[list[Any], list[Label]]:
    """Draw floors, the mean of V and exact attention; return their texts, and labels to place."""
    texts = []
    labels: list[Label] = []
    small: dict[str, Any] = {"fontsize": 8, "color": "0.25", "zorder": 6}
    if math.isfinite(mean) and scale.bottom < mean < scale.top:
        left, right = (math.log(x) for x in axes.get_xlim())
        spots = [(math.exp(left + x * (right - left)), mean) for x in (0.1, 0.85, 0.7, 0.3, 0.5)]
        style = {"fontsize": 8, "color": "0.25", "fontstyle": "italic"}
        labels.append(("line: mean of V, worse above it", spots[::-1], style))
    if exact > 0:
        value = seconds_as_text(exact) if cost == "seconds" else "100 %"
        texts.append(axes.annotate(
            f"exact: {value}", (exact, 0), (-3, 3), ha="right", va="bottom", rotation=90,
            xycoords=axes.get_xaxis_transform(), textcoords="offset points",
            **(small | {"color": "black", "fontweight": "bold"}),
        ))  # fmt: skip
        texts.append(axes.annotate(
            beyond, (exact, 0), (3, 3), ha="left", va="bottom", rotation=90,
            xycoords=axes.get_xaxis_transform(), textcoords="offset points", **small,
        ))  # fmt: skip
    look: dict[str, Any] = {"color": "black", "linewidth": 1.4}
    for name in FLOORS:
        values = {rank: quantiles(x, (0.5,))[0] for rank, x in middles[name].items()}
        inside = {rank: y for rank, y in values.items() if scale.bottom < y < scale.top}
        dash = DASHES[style_of(name, []).dash]
        if cost == "work":
            works = {r: quantiles(x, (0.5,))[0] for r, x in medians_of(table, name).items()}
            spots = [(works[r], y) for r, y in inside.items() if works.get(r, 0) > 0]
            if spots:
                across, up = zip(*spots, strict=True)
                axes.plot(across, up, linestyle=dash, gid=name, zorder=2.2, **look)
                style = {"fontsize": 8, "color": "0.25", "fontstyle": "italic"}
                labels.append((_FLOOR_WORDS[name], spots, style))
        elif name == "svd":
            # What a floor costs means nothing: a tick at the right edge for each rank.
            for i, (rank, y) in enumerate(inside.items()):
                named = f"{'floor: best matrix of rank ' if i == 0 else ''}{in_words(rank)}"
                axes.plot(
                    [0.982, 1], [y] * 2, transform=axes.get_yaxis_transform(), linestyle=dash,
                    gid=name, zorder=5, **look,
                )  # fmt: skip
                axes.annotate(
                    named, (0.98, y), (-2, 0),
                    xycoords=axes.get_yaxis_transform(), textcoords="offset points", ha="right",
                    va="center", fontstyle="italic", **small,
                )  # fmt: skip
    return texts, labels


_FLOOR_WORDS = {"svd": "floor: best rank-r matrix", "topk": "floor: r largest entries a row"}
