"""The figures of a report: plain data for plotly, with names that are text.

Each figure has one menu, and every entry of it replaces the numbers of all curves: what the legend
has switched off stays off.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...base.pages import NEUTRAL, Chart, label, layout_of, menu, rounded, short
from ...errors.reports import FIELDS
from ..columns import EXACT, FLOORS, PREDICTORS, quantiles
from ..palette import SYMBOLS, style_of
from ..ranks import Share, axis_of, in_words, ranks_of
from .hardness import number_of
from .medians import MAIN, Medians, front

if TYPE_CHECKING:
    import pandas as pd

Trace = dict[str, Any]

# Heads that menus and maps show, and methods times ranks times heads: a menu of thousands helps
# nobody, and pages stay small.
MOST_HEADS, MOST_POINTS = 150, 15_000
# Methods up to which bands are drawn: more of them cover each other.
MOST_BANDS = 6
# Height of what is drawn, and of a line of the legend, which has two columns on a telephone.
DRAWN, LINE, MENU = 380, 21, 60

TITLES = {
    "output_fro_rel": "relative output error",
    "output_fro_amm": "output error over the norms of A and V",
    "output_spec_rel": "relative output error, spectral norm",
    "output_spec_amm": "spectral output error over the norms of A and V",
    "matrix_fro_rel": "relative matrix error",
    "matrix_spec_rel": "relative matrix error, spectral norm",
    "row_tv_mean": "total variation of a row, mean",
    "row_tv_max": "total variation of a row, worst row",
    "row_kl_mean": "divergence of a row, mean",
    "skill": "skill over the mean of V (1 is exact)",
}
# In legends and maps, where there is little room.
NAMES = {
    "svd": "floor: rank r (SVD)",
    "topk": "floor: r keys a row",
    "zero": "zeros",
    "vmean": "mean of V",
    "exact": "exact attention",
}
COSTS = {"seconds": "time a head", "work": "keys or features that a row reads"}
ALL = "median of all heads"


def shown_heads(medians: Medians) -> list[str]:
    """Return the heads of menus and maps: all, or as many as fit, evenly spaced."""
    heads = medians.heads
    curves = max(1, len(medians.methods)) * len(medians.ranks)
    most = min(len(heads), MOST_HEADS, max(1, MOST_POINTS // curves))
    return [heads[i * len(heads) // most] for i in range(most)]


def _choices(medians: Medians) -> list[tuple[str, str | None]]:
    """Return the entries of the menu of heads: all of them together first."""
    heads: list[tuple[str, str | None]] = [(label(x), x) for x in shown_heads(medians)]
    return heads if len(medians.heads) == 1 else [(ALL, None), *heads]


def _values(medians: Medians, field: str, name: str, head: str | None) -> list[float]:
    return medians.typical(field, name) if head is None else medians.curve(field, name, head)


def _apart(traces: Sequence[Trace]) -> list[Trace]:
    """Return traces in groups of their own, whose legend flows; columns would be too wide."""
    return [{"legendgroup": f"own-{i}"} | trace for i, trace in enumerate(traces)]


def _level(medians: Medians, field: str, name: str, head: str | None) -> float:
    """Return what is the same at every rank that the head has."""
    return next((x for x in _values(medians, field, name, head) if math.isfinite(x)), math.nan)


def _height(traces: Sequence[Trace]) -> int:
    """Return the height of a figure whose legend has two columns, as on a telephone."""
    entries = sum(bool(trace.get("showlegend", True)) for trace in traces)
    return DRAWN + MENU + LINE * math.ceil(entries / 2)


def _line(name: str, methods: Sequence[str], **more: Any) -> Trace:
    """Return the look of a method or reference, without its numbers."""
    style = style_of(name, methods)
    reference = name not in methods
    trace: Trace = {
        "type": "scatter",
        "mode": "lines+markers" if style.marker else "lines",
        "name": label(NAMES.get(name, name), 24),
        "line": {
            "color": NEUTRAL if reference else style.colour,
            "dash": style.dash,
            "width": 2 if reference else 1.8,
        },
        "connectgaps": True,  # heads of other lengths may have other ranks
    }
    if style.marker:
        # The rim is what there is of symbols without an area.
        trace["marker"] = {
            "symbol": SYMBOLS[style.marker],
            "size": 8,
            "color": style.colour,
            "line": {"color": style.colour, "width": 1.5},
        }
    return trace | more


Write = Callable[[float], str]


def plain(x: float) -> str:
    """Return a number of an axis.

    Examples
    --------
    >>> plain(0.2), plain(1e-5), plain(50.0)
    ('0.2', '1e-5', '50')
    """
    text = short(x, 2)
    return text.replace(".0e", "e") if "e" in text else f"{float(text):g}"


def _write_seconds(x: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if x >= 0.999 * size:
            return f"{plain(x / size)} {unit}"
    return f"{plain(x * 1e6)} µs"


def _write_share(x: float) -> str:
    return f"{plain(100 * x)} %"


def _log_range(values: Sequence[float]) -> list[float] | None:
    """Return the range of a logarithmic axis with some room, None for no positive value."""
    positive = [x for x in values if 0 < x < math.inf]
    if not positive:
        return None
    low, high = math.log10(min(positive)), math.log10(max(positive))
    room = max(0.05 * (high - low), 0.05)
    return [round(low - room, 3), round(high + room, 3)]


def _error_range(medians: Medians) -> list[float] | None:
    """Return the errors among which methods live: curves that are exact do not squeeze the rest."""
    errors = [
        x for name in (*medians.methods, "vmean", "zero") for x in medians.typical(MAIN, name)
    ]
    finite = sorted(x for x in errors if 0 < x < math.inf)
    if not finite:
        return None
    trivial = [x for name in PREDICTORS for x in medians.typical(MAIN, name) if 0 < x < math.inf]
    top = 3 * max(trivial, default=finite[-1])
    typical = finite[len(finite) // 2]
    bottom = max(finite[0], typical * 1e-3)
    floors = [x for name in FLOORS for x in medians.typical(MAIN, name) if 0 < x < math.inf]
    # As much of the floors as there is room for.
    return _log_range([max(min([bottom, *floors]), bottom / 4), min(finite[-1], top)])


def _axis(title: str, span: list[float] | None, write: Write = plain) -> dict[str, Any]:
    """Return a logarithmic axis with numbers in plain digits, beyond its ends for who zooms."""
    axis: dict[str, Any] = {"title": {"text": title}, "type": "log"}
    if span is None:
        return axis
    decades = span[1] - span[0]
    steps = [1.0, 2.0, 5.0] if decades < 2.2 else [1.0, 3.0] if decades < 4 else [1.0]
    if decades < 1.2:
        steps = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0]
    powers = range(math.floor(span[0]) - 2, math.ceil(span[1]) + 2)
    ticks = [step * 10.0**power for power in powers for step in steps]
    return axis | {
        "range": span,
        "tickvals": rounded(ticks),
        "ticktext": [write(x) for x in ticks],
    }


def _rank_axis(ranks: Sequence[float]) -> dict[str, Any]:
    return {
        "title": {"text": axis_of(ranks)},
        "type": "log",
        "tickvals": list(ranks),
        "ticktext": [str(rank) for rank in ranks],
        "range": _log_range(list(map(float, ranks))),
    }


# --- curves -------------------------------------------------------------------------------------


class _Curves(NamedTuple):
    """Hold traces without numbers, and the numbers by entry of the menu and by trace."""

    traces: list[Trace]
    numbers: dict[str, list[dict[str, Any]]]

    def figure(self, **layout: Any) -> dict[str, Any]:
        """Return the figure, with the numbers of the first entry in place."""
        every = list(self.numbers.values())
        names = [
            name
            for name in (every[0][0] if self.traces else ())
            # What is the same in all entries is not repeated in each.
            if any(x[name] != y[name] for own in every for x, y in zip(own, every[0], strict=True))
        ]
        buttons = [
            (entry, "restyle", [{name: [x[name] for x in own] for name in names}])
            for entry, own in self.numbers.items()
        ]
        traces = _apart([trace | own for trace, own in zip(self.traces, every[0], strict=True)])
        menus = [menu(buttons)] if len(buttons) > 1 else []
        return {"data": traces, "layout": layout_of(updatemenus=menus, **layout)}


_HOVER = "<b>%{fullData.name}</b><br>rank %{customdata}: error %{y:.3g}<br>%{text}<extra></extra>"


def _spreads(medians: Medians, name: str, head: str | None, field: str = MAIN) -> list[str] | str:
    """Return what hovering tells beside the median, at every rank; nothing for one head."""
    if head is not None or len(medians.heads) == 1:
        return ""
    found = []
    for rank in medians.ranks:
        spread = medians.over(field, name, rank)
        quartiles = f"half of the heads: {short(spread.low)} to {short(spread.high)}"
        found.append(f"{quartiles}<br>worst head: {short(spread.most)}")
    return found


def cost_chart(medians: Medians, cost: str) -> Chart:
    """Return error against time or against work: curves, Pareto front, predictors, exact."""
    wanted = [*medians.methods, *(["topk"] if cost == "work" else [])]
    exact = EXACT in medians.beside
    traces: list[Trace] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Pareto front",
            "line": {"color": "#D4A017", "width": 9, "shape": "hv"},
            "opacity": 0.4,
            "hoverinfo": "skip",
        }
    ]
    traces += [_line(name, medians.methods, hovertemplate=_cost_hover(cost)) for name in wanted]
    hover = "<b>%{fullData.name}</b>: error %{y:.3g}<extra></extra>"
    traces += [_line(name, medians.methods, hovertemplate=hover) for name in ("vmean",)]
    if exact:
        hover = f"<b>exact attention</b>: {'%{x:.3s}s' if cost == 'seconds' else '%{x:.0%}'}"
        hover += "<extra></extra>"
        traces.append(_line(EXACT, medians.methods, hovertemplate=hover))
    numbers: dict[str, list[dict[str, Any]]] = {}
    spans: list[float] = []
    for entry, head in _choices(medians):
        curves = {
            name: (_values(medians, cost, name, head), _values(medians, MAIN, name, head))
            for name in wanted
        }
        points = [pair for name in medians.methods for pair in zip(*curves[name], strict=True)]
        best = [points[i] for i in front(points)]
        costs = [x for x, _ in points if 0 < x < math.inf]
        limit = 1.0 if cost == "work" else math.nan
        if exact and cost == "seconds":
            limit = _level(medians, cost, EXACT, head)
        ends = [min(costs, default=1.0), max([*costs, *([limit] if limit > 0 else [])], default=1)]
        spans += ends
        # To the right of its last point a front stays what it is.
        own = [_numbers([*(x for x, _ in best), ends[1]], [*(y for _, y in best), *_end(best)])]
        own += [
            _numbers(*curves[name], medians.ranks, _spreads(medians, name, head)) for name in wanted
        ]
        own += [_numbers(ends, [_level(medians, MAIN, "vmean", head)] * 2)]
        if exact:
            own.append(_numbers([limit] * 2, [1e-12, 1e3]))
        numbers.setdefault(entry, own)
    figure = _Curves(traces, numbers).figure(
        xaxis=_axis(
            COSTS[cost],
            _log_range(spans),
            _write_seconds if cost == "seconds" else _write_share,
        ),
        yaxis=_axis("relative output error", _error_range(medians)),
    )
    words = {
        "seconds": "Below and to the left is better. The band is the Pareto front: the smallest "
        "error for the time. The upright line is exact attention.",
        "work": "Work is the share of keys, features, landmarks or clusters that a row reads, of "
        "what exact attention reads (the upright line at 1).",
    }
    titles = {"seconds": "Error against time", "work": "Error against work"}
    return Chart(f"against-{cost}", titles[cost], words[cost], figure, _height(traces))


def _end(points: Sequence[tuple[float, float]]) -> list[float]:
    return [points[-1][1]] if points else [math.nan]


def _cost_hover(cost: str) -> str:
    words = "%{x:.3s}s a head" if cost == "seconds" else "reads %{x:.2%} of what exact reads"
    return _HOVER.replace("<extra>", f"<br>{words}<extra>")


def _numbers(
    x: Sequence[float], y: Sequence[float], ranks: Sequence[float] = (), text: list[str] | str = ""
) -> dict[str, Any]:
    """Return what a curve is drawn from: its points, and their ranks and text for who hovers."""
    told = [in_words(rank) if isinstance(rank, Share) else rank for rank in ranks]
    return {"x": rounded(x, 4), "y": rounded(y, 4), "customdata": told, "text": text}


def rank_chart(medians: Medians, bounds: pd.DataFrame) -> Chart:
    """Return error against rank, for all heads and for each."""
    names = [*medians.methods, *(x for x in (*FLOORS, *PREDICTORS) if x in medians.beside)]
    sampled = f"{MAIN}_low" in medians.columns
    bands = medians.methods if len(medians.methods) <= MOST_BANDS else []
    limits = _Bounds(bounds, medians)
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "fill": "toself",
            "fillcolor": _faint(style_of(name, medians.methods).colour),
            "line": {"width": 0},
            "hoverinfo": "skip",
            "showlegend": False,
            "legendgroup": f"group-{i}",
            "name": "",
        }
        for i, name in enumerate(bands)
    ]
    traces += [
        _line(name, medians.methods, hovertemplate=_HOVER, legendgroup=f"group-{i}")
        for i, name in enumerate(names)
    ]
    claims = [claim for claim in limits.claims if limits.fields[claim] == MAIN]
    traces += [limits.line(claim, medians) for claim in claims]
    numbers: dict[str, list[dict[str, Any]]] = {}
    for entry, head in _choices(medians):
        own = []
        for name in bands:
            low, high = _band(medians, name, head)
            x = [*medians.ranks, *reversed(medians.ranks)]
            own.append(_numbers(x, [*low, *reversed(high)]))
        for name in names:
            y = _values(medians, MAIN, name, head)
            spread = _spreads(medians, name, head)
            own.append(_numbers(medians.ranks, y, medians.ranks, spread))
        for claim in claims:
            y = limits.curve(claim, head, MAIN)
            own.append(_numbers(medians.ranks, y, medians.ranks))
        if sampled:
            for name, each in zip(names, own[len(bands) :], strict=False):
                each["error_y"] = _intervals(medians, name, head)
            for each in own:
                each.setdefault("error_y", {"visible": False})
        numbers.setdefault(entry, own)
    figure = _Curves(traces, numbers).figure(
        xaxis=_rank_axis(medians.ranks),
        yaxis=_axis("relative output error", _error_range(medians)),
    )
    about = "Click a name to switch its curve off or on, twice to see it alone; the menu shows a "
    about += "head by itself. Floors: no matrix of rank r, no r keys a row can do better; on a "
    about += "wide screen the buttons above the curves zoom."
    if bands:
        about += " Bands: the middle half of the heads; one head is its median over seeds."
    return Chart("against-rank", "Error against rank", about, figure, _height(traces))


def _band(medians: Medians, name: str, head: str | None) -> tuple[list[float], list[float]]:
    """Return the quartiles over heads; the median itself for one head."""
    if head is not None:
        curve = medians.curve(MAIN, name, head)
        return curve, curve
    spreads = [medians.over(MAIN, name, rank) for rank in medians.ranks]
    return [x.low for x in spreads], [x.high for x in spreads]


def _intervals(medians: Medians, name: str, head: str | None) -> dict[str, Any]:
    """Return the finite-sample intervals as error bars; none where all rows were read."""
    middle, low, high = (
        _values(medians, f"{MAIN}{end}", name, head) for end in ("", "_low", "_high")
    )
    up = [max(b - a, 0.0) for a, b in zip(middle, high, strict=True)]
    down = [max(a - b, 0.0) for a, b in zip(middle, low, strict=True)]
    if not any(x > 0 for x in (*up, *down) if math.isfinite(x)):
        return {"visible": False}
    return {"type": "data", "array": rounded(up), "arrayminus": rounded(down), "visible": True}


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.14)"


class _Bounds:
    """Read the bounds of claims: what each is about, and its curve."""

    def __init__(self, bounds: pd.DataFrame, medians: Medians) -> None:
        self.claims = list(dict.fromkeys(bounds["claim"])) if len(bounds) else []
        self.fields: dict[str, str] = {}
        self._method: dict[str, str] = {}
        self._what: dict[str, str] = {}
        self._values: dict[tuple[str, str, float], float] = {}
        self._medians = medians
        columns = [
            bounds[x].tolist() for x in ("claim", "method", "head", "field", "what", "bound")
        ]
        rows = zip(ranks_of(bounds, medians.shares), *columns, strict=True)
        for rank, claim, method, head, field, what, bound in rows:
            self.fields[claim], self._method[claim], self._what[claim] = field, method, what
            self._values[claim, head, rank] = float(bound)

    def line(self, claim: str, medians: Medians) -> Trace:
        """Return the look of a bound: thin, in the colour of its method."""
        look = _line(self._method[claim], medians.methods, hovertemplate=_HOVER)
        look["name"] = label(f"bound {claim} ({self._what[claim]})", 44)
        look["mode"] = "lines"
        look["line"] = {"color": look["line"]["color"], "width": 1.4, "dash": "longdashdot"}
        return look

    def curve(self, claim: str, head: str | None, field: str) -> list[float]:
        """Return the bound at every rank, its median over heads without one."""
        heads = self._medians.heads if head is None else [head]
        if self.fields[claim] != field:
            return [math.nan] * len(self._medians.ranks)
        return [
            quantiles([self._values.get((claim, x, r), math.nan) for x in heads], (0.5,))[0]
            for r in self._medians.ranks
        ]


def measure_chart(medians: Medians, bounds: pd.DataFrame) -> Chart:
    """Return every error measure against rank, medians over heads, with the bounds of claims."""
    names = [*medians.methods, *(x for x in (*FLOORS, *PREDICTORS) if x in medians.beside)]
    limits = _Bounds(bounds, medians)
    traces = [_line(name, medians.methods, hovertemplate=_HOVER) for name in names]
    traces += [limits.line(claim, medians) for claim in limits.claims]
    # What a bound is about comes first; the main measure has a figure of its own.
    order = [field for field in dict.fromkeys((*limits.fields.values(), *FIELDS)) if field != MAIN]
    order += [MAIN] if MAIN in limits.fields.values() else []
    buttons = []
    first: tuple[list[Trace], dict[str, Any]] | None = None
    for field in order:
        own = []
        for name in names:
            spread = _spreads(medians, name, None, field)
            own.append(_numbers(medians.ranks, medians.typical(field, name), medians.ranks, spread))
        for claim in limits.claims:
            y = limits.curve(claim, None, field)
            own.append(_numbers(medians.ranks, y, medians.ranks))
        every = [x for each in own for x in each["y"] if x is not None]
        axis = _axis(TITLES[field], None)
        if field == "skill":
            span = [max(-1.0, min([*every, 0.0]) - 0.05), 1.05]
            axis = {"title": axis["title"], "type": "linear", "range": span}
        else:
            span = _log_range([x for x in every if x > 1e-5 * max(every, default=1.0)]) or [-2, 1]
            axis = _axis(TITLES[field], span)
        first = first or ([t | n for t, n in zip(traces, own, strict=True)], axis)
        keys = ("y", "text")
        restyled = {key: [each[key] for each in own] for key in keys}
        relayout = {f"yaxis.{key}": value for key, value in axis.items() if key != "title"}
        relayout |= {"yaxis.title.text": TITLES[field]}
        relayout |= {"yaxis.tickmode": "array" if "tickvals" in axis else "auto"}
        buttons.append((TITLES[field], "update", [restyled, relayout]))
    data, axis = first or ([], {})
    layout = layout_of(updatemenus=[menu(buttons)], xaxis=_rank_axis(medians.ranks), yaxis=axis)
    about = "The same study in the other measures, medians over heads: choose one in the menu."
    if limits.claims:
        about += " Thin dashed lines are the bounds of claims, in the colour of their method."
    figure = {"data": _apart(data), "layout": layout}
    return Chart("measures", "Every measure", about, figure, _height(traces))


# --- maps ---------------------------------------------------------------------------------------

# Blue is better than the mean of V, red worse: told apart by the colour-blind.
_SCALE = [
    [0.0, "#053061"], [0.15, "#2166ac"], [0.3, "#67a9cf"], [0.44, "#d1e5f0"], [0.5, "#f7f7f7"],
    [0.56, "#fddbc7"], [0.7, "#ef8a62"], [0.85, "#b2182b"], [1.0, "#67001f"],
]  # fmt: skip


def head_map(medians: Medians) -> Chart:
    """Return methods against heads: the error as a multiple of that of the mean of V."""
    heads = shown_heads(medians)
    rank = medians.ranks[-1]
    order = sorted(medians.methods, key=lambda x: _last_if_nan(medians.over(MAIN, x, rank).middle))
    order = [*(x for x in FLOORS if x in medians.beside), *order]
    buttons = []
    first: dict[str, Any] = {}
    for rank in reversed(medians.ranks):
        z, text = [], []
        for name in order:
            errors = [medians.at(MAIN, name, head, rank) for head in heads]
            means = [medians.at(MAIN, "vmean", head, rank) for head in heads]
            z.append(rounded(map(_log_ratio, errors, means), 2))
            text.append([short(x, 2) for x in errors])
        first = first or {"z": z, "text": text}
        buttons.append((f"rank {in_words(rank)}", "restyle", [{"z": [z], "text": [text]}]))
    shared = os.path.commonprefix(heads) if len(heads) > 1 else ""
    shared = shared[: shared.rfind("/") + 1]  # what all names have in common says nothing here
    places = [label(head[len(shared) :], 24) for head in heads]
    rows = [label(NAMES.get(x, x), 20) for x in order]
    trace = {
        "type": "heatmap",
        **first,
        "x": list(range(len(heads))),
        "y": list(range(len(order))),
        "customdata": [[[row, head] for head in places] for row in rows],
        "hovertemplate": "<b>%{customdata[0]}</b><br>%{customdata[1]}<br>error %{text}"
        "<extra></extra>",
        "texttemplate": "%{text}" if len(heads) <= 24 else "",
        "zmin": -1.0,
        "zmax": 1.0,
        "colorscale": _SCALE,
        "xgap": 1,
        "ygap": 1,
        "colorbar": {
            "orientation": "h",
            "y": 0.0,
            "yref": "container",
            "yanchor": "bottom",
            "thickness": 12,
            "len": 0.9,
            "tickvals": [-1, 0, 1],
            "ticktext": ["1/10", "mean of V", "10 x"],
            "tickangle": 0,
            "outlinewidth": 0,
        },
    }
    layout = layout_of(
        updatemenus=[menu(buttons)] if len(buttons) > 1 else [],
        xaxis={
            "tickvals": trace["x"],
            "ticktext": places,
            "tickangle": -90,
            "showgrid": False,
            "tickfont": {"size": 11},
        },
        yaxis={
            "tickvals": trace["y"],
            "ticktext": rows,
            "autorange": "reversed",
            "showgrid": False,
            "tickfont": {"size": 12},
        },
    )
    about = "Relative output error (the numbers) and how it compares with the mean of V (colour): "
    about += "blue is better, white no better, red worse."
    if len(heads) < len(medians.heads):
        about += f" {len(heads)} of {len(medians.heads)} heads, evenly spaced."
    height = MENU + 190 + 26 * len(order)
    figure = {"data": [trace], "layout": layout}
    return Chart("heads-map", "Methods by heads", about, figure, height)


def _last_if_nan(x: float) -> float:
    return math.inf if math.isnan(x) else x


def _log_ratio(error: float, mean: float) -> float:
    return math.log10(error / mean) if error > 0 and 0 < mean < math.inf else math.nan


def hardness_chart(medians: Medians, hardness: Mapping[str, dict[str, Any]]) -> Chart:
    """Return the error of each method against how many keys a row of the head attends to."""
    heads = [head for head in medians.heads if head in hardness]
    keys = [number_of(hardness[head], "perplexity_median") or math.nan for head in heads]
    names = [*medians.methods, "vmean"]
    traces = [
        _line(
            name,
            medians.methods,
            mode="markers",
            x=rounded(keys),
            hovertemplate="<b>%{fullData.name}</b><br>%{customdata}<br>error %{y:.3g}, "
            "%{x:.3g} keys attended<extra></extra>",
            customdata=[label(head) for head in heads],
        )
        for name in names
    ]
    for trace in traces:
        trace.setdefault("marker", {"symbol": "line-ew-open", "size": 14, "color": NEUTRAL})
    every: list[float] = []
    buttons: list[tuple[str, str, list[Any]]] = []
    first: list[list[float | None]] = []
    for rank in reversed(medians.ranks):
        y = [rounded(medians.at(MAIN, name, head, rank) for head in heads) for name in names]
        every += [x for row in y for x in row if x is not None]
        first = first or y
        buttons.append((f"rank {in_words(rank)}", "restyle", [{"y": y}]))
    traces = [trace | {"y": y} for trace, y in zip(traces, first, strict=True)]
    figure = {
        "data": _apart(traces),
        "layout": layout_of(
            updatemenus=[menu(buttons)] if len(buttons) > 1 else [],
            xaxis=_axis("keys that a row attends to (median perplexity)", _log_range(keys)),
            yaxis=_axis("relative output error", _log_range(every)),
        ),
    }
    about = "One point a head and method: which methods suffer where rows attend to few keys, and "
    about += "which where they attend to many."
    return Chart("hardness-map", "Error against hardness", about, figure, _height(traces))


def charts(
    medians: Medians,
    bounds: pd.DataFrame,
    hardness: Mapping[str, dict[str, Any]],
) -> list[Chart]:
    """Return the figures of a report that its rows have the numbers for."""
    makers: list[Callable[[], Chart]] = [lambda: cost_chart(medians, "seconds")]
    if "work" in medians.columns:
        makers.append(lambda: cost_chart(medians, "work"))
    makers += [
        lambda: rank_chart(medians, bounds),
        lambda: head_map(medians),
        lambda: measure_chart(medians, bounds),
    ]
    if len(hardness) > 2:
        makers.append(lambda: hardness_chart(medians, hardness))
    return [make() for make in makers]
