"""Pictures of a study: error against rank, one picture for each error measure.

Small multiples that share their axes: first the median over all heads, then one panel a head.  The
floors and predictors are in every panel, in black and grey; methods are in colour.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.drawing import as_png, make_figure, plain_style
from ..base.files import write_bytes
from ..errors.reports import FIELDS
from .palette import DASHES, REFERENCE_LABELS, style_of
from .summary import FLOORS, PREDICTORS, REFERENCES, quantiles

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]

MOST_HEADS = 15
# References that have a place on axes of errors: exact attention has rounding only.
BESIDE = (*FLOORS, *PREDICTORS)

# field -> what it is, as text and as a formula
MEASURES = {
    "output_fro_rel": ("relative output error", r"$\|\hat{O}-O\|_F \,/\, \|O\|_F$"),
    "output_fro_amm": (
        "output error over the norms of A and V",
        r"$\|\hat{O}-O\|_F \,/\, (\|A\|_F\,\|V\|_F)$",
    ),
    "output_spec_rel": ("relative output error, spectral", r"$\|\hat{O}-O\|_2 \,/\, \|O\|_2$"),
    "output_spec_amm": (
        "spectral output error over the norms of A and V",
        r"$\|\hat{O}-O\|_2 \,/\, (\|A\|_2\,\|V\|_2)$",
    ),
    "matrix_fro_rel": ("relative matrix error", r"$\|\hat{A}-A\|_F \,/\, \|A\|_F$"),
    "matrix_spec_rel": ("relative matrix error, spectral", r"$\|\hat{A}-A\|_2 \,/\, \|A\|_2$"),
    "row_tv_mean": (
        "total variation of a row, mean over rows",
        r"mean$_i$ $\frac{1}{2}\Sigma_j|\hat{A}_{ij}-A_{ij}|$",
    ),
    "row_tv_max": (
        "total variation of a row, worst row",
        r"max$_i$ $\frac{1}{2}\Sigma_j|\hat{A}_{ij}-A_{ij}|$",
    ),
    "row_kl_mean": (
        "divergence of a row, mean over rows",
        r"mean$_i$ $\Sigma_j A_{ij}\,\log(A_{ij}/\hat{A}_{ij})$",
    ),
    "skill": (
        "skill over the mean of V",
        r"$1-\|\hat{O}-O\|_F \,/\, \|O_{\mathrm{mean\ of\ V}}-O\|_F$",
    ),
}

# Bounds of claims are thin, without a marker, in the colour of their method.
BOUND_DASHES: tuple[Any, ...] = ((0, (8, 2)), (0, (8, 2, 1.5, 2)), (0, (8, 2, 1.5, 2, 1.5, 2)))

REFERENCE_STYLES: dict[str, dict[str, Any]] = {
    "svd": {"color": "black", "linestyle": "-", "linewidth": 1.3},
    "topk": {"color": "black", "linestyle": (0, (5, 2)), "linewidth": 1.3},
    "zero": {"color": "0.45", "linestyle": (0, (1, 1.5)), "linewidth": 1.5},
    "vmean": {"color": "0.45", "linestyle": (0, (6, 1.5, 1, 1.5)), "linewidth": 1.5},
}


class _Curve(NamedTuple):
    """One line of one panel: a value for each rank, and a band where there is one."""

    name: str
    ranks: list[int]
    middle: list[float]
    low: list[float]
    high: list[float]


class _Bound(NamedTuple):
    """A claim whose bound is drawn, what lies below it, and how its line looks."""

    claim: str
    what: str
    style: dict[str, Any]


class _Scale(NamedTuple):
    """The vertical axis that all panels of a picture share."""

    kind: str
    bottom: float
    top: float
    threshold: float


def plot_study(
    frame: pd.DataFrame,
    references: pd.DataFrame,
    out: str | PathLike[str],
    bounds: pd.DataFrame | None = None,
) -> list[Path]:
    """Draw one PNG for each error measure; those that cannot be drawn cost one warning.

    Parameters
    ----------
    frame, references : pandas.DataFrame
        As in `StudyResult`.
    out : path
        An existing folder; ``<field>.png`` in it is replaced in one step.
    bounds : pandas.DataFrame, optional
        As in `StudyResult`.

    Returns
    -------
    list of Path
        In the order of the fields.

    Warns
    -----
    RuntimeWarning
        If pictures are missing, and why the first is.

    Examples
    --------
    >>> import tempfile
    >>> import sketchattn as sa
    >>> heads = sa.make_heads("gaussian", n=16, d=4, rng=0)
    >>> result = sa.study(heads, methods=["uniform"], ranks=[2, 4], seeds=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paths = plot_study(result.frame, result.references, folder)
    >>> paths[0].name, len(paths)
    ('output_fro_rel.png', 10)
    """
    paths, missing = [], []
    for field in FIELDS:
        path = Path(out) / f"{field}.png"
        try:
            with plain_style():
                figure = _draw_figure(frame, references, field, bounds)
                data = as_png(figure, dpi=120, metadata={"Software": None})
            write_bytes(path, data)
        except Exception as error:  # of the drawing, of a font, of the file system
            missing.append(f"{field} ({type(error).__name__}: {error})")
        else:
            paths.append(path)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        warnings.warn(
            f"pictures are missing beside the results: {missing[0]}{more}",
            RuntimeWarning,
            stacklevel=2,
        )
    return paths


def study_figure(
    frame: pd.DataFrame,
    references: pd.DataFrame,
    field: str,
    bounds: pd.DataFrame | None = None,
) -> Figure:
    """Return the picture of one error measure as a Matplotlib figure.

    Parameters
    ----------
    frame, references : pandas.DataFrame
        As in `StudyResult`.
    field : str
        A field of `ErrorReport`.
    bounds : pandas.DataFrame, optional
        As in `StudyResult`: each is drawn if it is one of this field, and on no other.

    Returns
    -------
    matplotlib.figure.Figure
        Made without pyplot, so that no window opens and no global state changes.  Its first axes
        are the median over heads with quartiles as bands, the others one head each with the
        median over seeds and a band from the smallest to the largest.  Each line carries the name
        of its method as ``get_gid()``, a bound the id of its claim.

    Notes
    -----
    Values that the axis cannot show sit on its edge: zeros (minus infinity for ``skill``) as a
    triangle that points down, infinities as one that points up; the legend says so.  More than 15
    heads are drawn in part, evenly spaced, and the title says so; the first panel covers them all.
    """
    with plain_style():
        return _draw_figure(frame, references, field, bounds)


def _draw_figure(
    frame: pd.DataFrame, references: pd.DataFrame, field: str, bounds: pd.DataFrame | None
) -> Figure:
    heads = list(dict.fromkeys(frame["head"])) or list(dict.fromkeys(references["head"]))
    own = frame[~frame["method"].isin(REFERENCES)]
    methods = list(dict.fromkeys(own["method"]))
    seeds = frame["seed"].nunique()
    places = np.linspace(0, len(heads) - 1, min(len(heads), MOST_HEADS)).round().astype(int)
    drawn = [heads[i] for i in np.unique(places)]

    tables = [_table(own, field), _table(references, field)]
    panels: list[tuple[str, list[_Curve]]] = [
        (_summary_title(len(heads), seeds), _summary_curves(tables, methods))
    ]
    panels += [(str(head), _head_curves(tables, methods, head)) for head in drawn]
    limits = _bounds(bounds, field, methods)
    limit_table = _limit_table(bounds, field)
    beyond = [_limit_curves(limits, limit_table, shown) for shown in (heads, *([h] for h in drawn))]
    every = [*(curves for _, curves in panels), *beyond]
    scale = _scale(field, [curve for curves in every for curve in curves])

    what, formula = MEASURES[field]
    title = f"{field}: {what}, {formula}"
    if len(drawn) < len(heads):
        title += f"\n{len(drawn)} of {len(heads)} heads drawn, evenly spaced"

    rows, columns, boxes = _layout(len(drawn))
    entries = len(methods) + len(BESIDE) + len(limits) + 3
    # Names of claims are long.
    legend_columns, legend_size = (3, 8) if limits or columns < 4 else (4, 9)
    # Inches; fixed margins, since Matplotlib's automatic layout takes longer than all the rest.
    width, height = 0.8 + 2.6 * columns, 2.0 * rows
    top = 0.8 if "\n" in title else 0.6
    bottom = 0.75 + 0.22 * math.ceil(entries / legend_columns)
    figure = make_figure(figsize=(width, height + top + bottom))
    grid = figure.add_gridspec(
        rows,
        columns,
        left=0.7 / width,
        right=1 - 0.15 / width,
        bottom=bottom / (height + top + bottom),
        top=1 - top / (height + top + bottom),
        wspace=0.22,
        hspace=0.3,
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
            for note in _draw(axes, curve, methods, scale, big=size > 1):
                on_edge.setdefault(note, []).append(curve.name)
        for limit, curve in zip(limits, over, strict=True):
            shown, _ = _clip(curve.middle, scale)
            axes.plot(curve.ranks, shown, zorder=3.5, gid=limit.claim, **limit.style)
        notes |= set(on_edge)
        if size > 1:
            _name_edges(axes, on_edge, field)
        if summary:
            _format_axes(axes, scale, sorted({r for c in curves for r in c.ranks}))
            axes.patch.set_facecolor("#f7f7f4")
        letters, points = (60, 10) if size > 1 else (30, 8)
        axes.set_title(_shorten(name, letters), fontsize=points, pad=6, parse_math=False)
        axes.tick_params(
            labelsize=9 if size > 1 else 7,
            pad=2,
            labelbottom=size > 1 or y == lowest[x],
            labelleft=size > 1 or x == 0 or (x == 2 and y < 2),
        )
        axes.grid(True, which="major", color="0.88", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=11, y=1 - 0.1 / (height + top + bottom), va="top")
    figure.text(0.5, (bottom - 0.45) / (height + top + bottom), "rank r", ha="center", fontsize=10)
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


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2 - 1]}...{text[-(most // 2 - 2) :]}"


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


# --- curves -------------------------------------------------------------------------------------

# (method, head) -> rank -> values over seeds
_Table = dict[tuple[str, str], dict[int, list[float]]]


def _table(frame: pd.DataFrame, field: str) -> _Table:
    table: _Table = {}
    columns = (frame[name].tolist() for name in ("method", "head", "rank", field))
    for method, head, rank, value in zip(*columns, strict=True):
        table.setdefault((method, head), {}).setdefault(int(rank), []).append(float(value))
    return table


def _head_curves(tables: Sequence[_Table], methods: Sequence[str], head: str) -> list[_Curve]:
    """Median over seeds, band from the smallest to the largest."""
    curves = []
    for name in (*BESIDE, *methods):
        table = tables[0] if name in methods else tables[1]
        by_rank = table.get((name, head), {})
        ranks = sorted(by_rank)
        triples = [quantiles(by_rank[rank], (0.0, 0.5, 1.0)) for rank in ranks]
        curves.append(_curve(name, ranks, triples))
    return curves


def _summary_curves(tables: Sequence[_Table], methods: Sequence[str]) -> list[_Curve]:
    """Median over heads of the median over seeds, band between the quartiles over heads."""
    curves = []
    for name in (*BESIDE, *methods):
        table = tables[0] if name in methods else tables[1]
        by_rank: dict[int, list[float]] = {}
        for (method, _), found in table.items():
            if method == name:
                for rank, values in found.items():
                    by_rank.setdefault(rank, []).append(quantiles(values, (0.5,))[0])
        ranks = sorted(by_rank)
        triples = [quantiles(by_rank[rank], (0.25, 0.5, 0.75)) for rank in ranks]
        curves.append(_curve(name, ranks, triples))
    return curves


def _curve(name: str, ranks: list[int], triples: list[list[float]]) -> _Curve:
    low, middle, high = ([t[i] for t in triples] for i in range(3))
    return _Curve(name, ranks, middle, low, high)


def _bounds(bounds: pd.DataFrame | None, field: str, methods: Sequence[str]) -> list[_Bound]:
    """Return the claims that bound a field; their colour is that of their method."""
    if bounds is None:
        return []
    own = bounds[bounds["field"] == field]
    triples = dict.fromkeys(zip(own["claim"], own["method"], own["what"], strict=True))
    found = []
    for i, (claim, method, what) in enumerate(triples):
        dash = BOUND_DASHES[i % len(BOUND_DASHES)]
        style = {"color": _style(method, methods)["color"], "linestyle": dash, "linewidth": 0.9}
        found.append(_Bound(claim, what, style))
    return found


def _limit_table(bounds: pd.DataFrame | None, field: str) -> _Table:
    """Return the bounds of a field by claim and head."""
    if bounds is None:
        return {}
    own = bounds[bounds["field"] == field]
    return _table(own.assign(method=own["claim"], **{field: own["bound"]}), field)


def _limit_curves(limits: Sequence[_Bound], table: _Table, heads: Sequence[str]) -> list[_Curve]:
    """Return the median of each bound over heads."""
    curves = []
    for limit in limits:
        by_rank: dict[int, list[float]] = {}
        for head in heads:
            for rank, values in table.get((limit.claim, head), {}).items():
                by_rank.setdefault(rank, []).extend(values)
        ranks = sorted(by_rank)
        triples = [quantiles(by_rank[rank], (0.5,)) * 3 for rank in ranks]
        curves.append(_curve(limit.claim, ranks, triples))
    return curves


# --- axes ---------------------------------------------------------------------------------------


def _scale(field: str, curves: Sequence[_Curve]) -> _Scale:
    """Choose the vertical axis that shows every finite value of a picture.

    Errors are on a logarithmic axis; where some are negative, which only ``row_kl_mean`` of rows
    that do not sum to one can be, on one that is linear around zero.  ``skill`` is linear down to
    -1, and logarithmic below where it falls under -2.
    """
    bands = [x for c in curves if c.name not in BESIDE for x in (*c.low, *c.high)]
    finite = [x for c in curves for x in c.middle] + bands
    finite = [x for x in finite if math.isfinite(x)]
    if field == "skill":
        low = min([*finite, 0.0])
        if low >= -2.0:
            return _Scale("linear", low - 0.05 * (1.0 - low), 1.05, 1.0)
        return _Scale("symlog", low * 1.5, 1.15, 1.0)
    positive = [x for x in finite if x > 0] or [1.0]
    if min(finite, default=0.0) < 0:
        smallest = min(abs(x) for x in finite if x != 0)
        return _Scale("symlog", min(finite) * 2.0, max(positive) * 2.0, smallest)
    room = max((max(positive) / min(positive)) ** 0.05, 1.15)
    return _Scale("log", min(positive) / room, max(positive) * room, 1.0)


def _format_axes(axes: Axes, scale: _Scale, ranks: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(_spread(ranks)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    if len(ranks) == 1:
        axes.set_xlim(ranks[0] / 2, ranks[0] * 2)
    else:
        room = (ranks[-1] / ranks[0]) ** 0.04
        axes.set_xlim(ranks[0] / room, ranks[-1] * room)
    number = FuncFormatter(lambda y, _: f"{y:g}")
    if scale.kind == "symlog":
        axes.set_yscale("symlog", linthresh=scale.threshold, linscale=1.0)
        axes.yaxis.set_major_locator(FixedLocator(_symmetric_ticks(scale)))
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
    axes.yaxis.set_major_formatter(number)


def _spread(ranks: Sequence[int]) -> list[int]:
    """Return ranks that are far enough apart for their labels."""
    gap = (ranks[-1] / ranks[0]) ** (1 / 7)
    chosen = [ranks[0]]
    for rank in ranks[1:]:
        if rank >= chosen[-1] * gap * (1 - 1e-9):
            chosen.append(rank)
    return chosen


def _symmetric_ticks(scale: _Scale) -> list[float]:
    def powers(most: float) -> list[float]:
        if most < scale.threshold:
            return []
        first, last = math.ceil(math.log10(scale.threshold)), math.floor(math.log10(most))
        step = max(1, -(-(last - first + 1) // 5))
        return [10.0**i for i in range(first, last + 1, step)]

    return [-x for x in reversed(powers(-scale.bottom))] + [0.0, *powers(scale.top)]


def _style(name: str, methods: Sequence[str]) -> dict[str, Any]:
    if name in REFERENCE_STYLES:
        return REFERENCE_STYLES[name]
    look = style_of(name, methods)
    return {
        "color": look.colour,
        "linestyle": DASHES[look.dash],
        "marker": look.marker,
        "linewidth": 1.4,
    }


def _draw(
    axes: Axes, curve: _Curve, methods: Sequence[str], scale: _Scale, *, big: bool
) -> set[str]:
    """Draw a curve and its band; return which values had to be drawn on an edge or left a gap."""
    if not curve.ranks:
        return set()
    style = dict(_style(curve.name, methods))
    reference = curve.name in BESIDE
    middle, notes = _clip(curve.middle, scale)
    if reference:
        zorder = 2.0
    else:
        zorder = 3.0
        style["markersize"] = 4.5 if big else 3.0
        low, _ = _clip(curve.low, scale)
        high, _ = _clip(curve.high, scale)
        band = {"color": style["color"], "alpha": 0.18, "linewidth": 0, "zorder": zorder - 0.5}
        axes.fill_between(curve.ranks, low, high, **band)
    if curve.name in PREDICTORS and len(set(curve.middle)) == 1 and math.isfinite(middle[0]):
        line = axes.axhline(middle[0], zorder=zorder, **style)
    else:
        if reference and len(curve.ranks) == 1:
            style |= {"marker": "_", "markersize": 12}
        (line,) = axes.plot(curve.ranks, middle, zorder=zorder, **style)
    line.set_gid(curve.name)
    for kind, marker in (("bottom", "v"), ("top", "^")):
        where = [i for i, note in enumerate(notes) if note == kind]
        if where:
            axes.plot(
                [curve.ranks[i] for i in where],
                [middle[i] for i in where],
                linestyle="none",
                marker=marker,
                markersize=7 if big else 5,
                color=style["color"],
                clip_on=False,
                zorder=5.0,
                gid=f"{curve.name}:{kind}",
            )
    return set(notes) - {""}


def _clip(values: Sequence[float], scale: _Scale) -> tuple[list[float], list[str]]:
    """Return values that the axis can show, and "top", "bottom" or "gap" where it cannot."""
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
        else:
            shown.append(x)
            notes.append("")
    return shown, notes


def _name_edges(axes: Axes, on_edge: dict[str, list[str]], field: str) -> None:
    """Name the curves that touch an edge: their triangles may cover each other."""
    places = (("top", 0.965, "top", "infinite"), ("bottom", 0.035, "bottom", _lower_edge(field)))
    for edge, y, alignment, what in places:
        names = on_edge.get(edge, [])
        if names:
            text = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            axes.text(
                0.5,
                y,
                f"{what}: {text}",
                transform=axes.transAxes,
                ha="center",
                va=alignment,
                fontsize=8,
                color="0.25",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1.5},
                zorder=6.0,
                parse_math=False,
            )


def _lower_edge(field: str) -> str:
    return "minus infinity" if field == "skill" else "zero"


def _legend_handles(
    methods: Sequence[str], limits: Sequence[_Bound], notes: set[str], field: str
) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=REFERENCE_LABELS.get(name, name), **_style(name, methods))
        for name in (*methods, *BESIDE)
    ]
    handles += [Line2D([], [], label=f"{x.claim} ({x.what})", **x.style) for x in limits]
    edge: dict[str, Any] = {"linestyle": "none", "color": "0.2", "markersize": 7}
    if "top" in notes:
        handles.append(Line2D([], [], marker="^", label="on the upper edge: infinite", **edge))
    if "bottom" in notes:
        label = f"on the lower edge: {_lower_edge(field)}"
        handles.append(Line2D([], [], marker="v", label=label, **edge))
    if "gap" in notes:
        handles.append(Line2D([], [], linestyle="none", label="gaps: not a number"))
    return handles
