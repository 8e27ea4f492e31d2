"""Pictures of a study: which method is best at which cost, each method alone, heads, spectra."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.arguments import closest
from ..base.drawing import as_png, make_figure, plain_style
from ..base.files import write_bytes
from ..errors.reports import FIELDS
from .columns import MAIN_FIELDS, REFERENCES
from .pictures.cost import draw_cost
from .pictures.curves import BESIDE, methods_of
from .pictures.each_method import draw_each
from .pictures.layers import draw_layers
from .pictures.one import draw_one, draw_panel, panel_of, scale_for
from .pictures.panels import draw_panels
from .pictures.spectra import draw_spectra
from .pictures.words import MEASURES
from .ranks import axis_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# About this measure are the pictures that are not of one measure each.
MAIN = MAIN_FIELDS[0]
OVERVIEWS = ("error_against_cost", "methods", "heads", "layers", "spectra")
PICTURES = tuple(f"{name}.png" for name in (*OVERVIEWS, *FIELDS))

# At this resolution pictures are a little wider than GitHub shows them.
DPI = 125

# Replaced by tests that want a picture to fail.
_draw_figure = draw_one


def plot_study(
    frame: pd.DataFrame,
    references: pd.DataFrame,
    out: str | PathLike[str],
    bounds: pd.DataFrame | None = None,
) -> list[Path]:
    """Draw the pictures of a study; those that cannot be drawn cost one warning.

    Parameters
    ----------
    frame, references : pandas.DataFrame
        As in `StudyResult`.
    out : path
        An existing folder; each of `PICTURES` in it is replaced in one step.
    bounds : pandas.DataFrame, optional
        As in `StudyResult`.

    Returns
    -------
    list of Path
        ``error_against_cost.png`` (error against time and against work), ``methods.png`` (a panel a
        method), ``heads.png`` (a panel a head), ``layers.png`` (layer by head), ``spectra.png``,
        then ``<field>.png`` for each error measure.

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
    ('error_against_cost.png', 15)
    """
    draw: dict[str, Callable[[], Figure]] = {
        "error_against_cost": lambda: draw_cost(frame, references, MAIN),
        "methods": lambda: draw_each(frame, references, MAIN),
        "heads": lambda: draw_panels(frame, references, MAIN, bounds),
        "layers": lambda: draw_layers(frame, references, MAIN),
        "spectra": lambda: draw_spectra(references),
    }
    for field in FIELDS:
        draw[field] = partial(_draw_figure, frame, references, field, bounds)
    paths, missing = [], []
    for name in (*OVERVIEWS, *FIELDS):
        path = Path(out) / f"{name}.png"
        try:
            with plain_style():
                data = as_png(draw[name](), dpi=DPI, metadata={"Software": None})
            write_bytes(path, data)
        except Exception as error:  # of the drawing, of a font, of the file system
            missing.append(f"{name} ({type(error).__name__}: {error})")
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
    """Return a panel a head of one error measure as a Matplotlib figure.

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
    triangle that points down, infinities as one that points up; so do numbers far from where most
    curves are, and all that is much worse than both predictors.  The legend says so, and the first
    panel names the methods.  More than 15 heads are drawn in part, evenly spaced, and the title
    says so; the first panel covers them all.
    """
    with plain_style():
        return draw_panels(frame, references, field, bounds)


def own_figure(
    frame: pd.DataFrame,
    references: pd.DataFrame,
    bounds: pd.DataFrame,
    field: str,
    methods: Mapping[str, str] | Sequence[str] | None,
    heads: str | Sequence[str] | None,
    floors: bool | Sequence[str],
    claims: str | Sequence[str],
    ax: Axes | None,
) -> Figure:
    """Return `StudyResult.figure`, in the style of the user."""
    if field not in MEASURES:
        raise ValueError(f"field must be an error measure, got {field!r}{closest(field, MEASURES)}")
    every = [str(head) for head in dict.fromkeys(frame["head"])]
    known = methods_of(frame)
    names = _names(methods, known)
    panels: list[tuple[str | None, list[str]]]
    if heads is None:
        panels = [(None, every)]
    elif isinstance(heads, str) and heads == "each":
        panels = [(head, [head]) for head in every]
    else:
        panels = [(None, _chosen(heads, "heads", every))]
    if ax is not None and len(panels) > 1:
        raise ValueError(
            f"ax must be None where heads='each' needs {len(panels)} panels, got axes; name the "
            f"heads of one panel"
        )
    if isinstance(floors, bool):
        beside = list(BESIDE) if floors else []
    else:
        beside = _chosen(floors, "floors", BESIDE)
    wanted = _chosen(claims, "bounds", list(dict.fromkeys(bounds["claim"])))
    limits = bounds[bounds["claim"].isin(wanted)]
    _check_limits(limits, field, names)
    beside = [name for name in beside if name in set(references["method"])]

    axes: list[Axes]
    figure: Any
    if ax is not None:
        axes, figure = [ax], ax.figure
        while not hasattr(figure, "savefig"):  # a part of a figure
            figure = figure.figure
    else:
        figure = make_figure(layout="constrained")
        axes = _grid(figure, len(panels))
    own = {"markersize": None, "linewidth": None}  # as the user has set them
    parts = [
        panel_of(frame, references, field, list(names), shown, beside, limits)
        for _, shown in panels
    ]
    scale = scale_for(field, parts)
    for one, part, (title, _) in zip(axes, parts, panels, strict=True):
        draw_panel(one, part, field, scale, names, words="small", **own)
        if title is not None:
            one.set_title(title, fontsize="medium", parse_math=False)
    across = axis_of(rank for part in parts for rank in part.ranks).replace("rank r", "rank")
    if len(panels) == 1:
        axes[0].set_xlabel(across)
        axes[0].set_ylabel(MEASURES[field][0])
    else:
        figure.supxlabel(across)
        figure.supylabel(MEASURES[field][0])
    if ax is None:
        _legend(figure, axes)
    made: Figure = figure
    return made


def _check_limits(limits: pd.DataFrame, field: str, methods: Collection[str]) -> None:
    """Refuse a bound of another measure, or of a method that is not drawn."""
    columns = (limits[name] for name in ("claim", "method", "field"))
    for claim, method, about in dict.fromkeys(zip(*columns, strict=True)):
        if about != field:
            raise ValueError(
                f"bounds must be about {field!r}, got {claim!r}, which is about {about!r}; draw "
                f"that measure or leave the bound out"
            )
        if method not in methods and method not in REFERENCES:
            raise ValueError(
                f"bounds must be about a method that is drawn, got {claim!r}, which is about "
                f"{method!r}; add it to methods or leave the bound out"
            )


def _grid(figure: Figure, panels: int) -> list[Axes]:
    """Return axes for so many panels; a figure of many is larger than one of one."""
    columns = min(panels, 4)
    rows = -(-panels // columns)
    width, height = figure.get_size_inches()
    if panels > 1:
        figure.set_size_inches(width * (0.5 + 0.35 * columns), height * (0.3 + 0.5 * rows))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    every = list(grid.ravel())
    for unused in every[panels:]:
        unused.set_visible(False)
    return every[:panels]


def _names(methods: Mapping[str, str] | Sequence[str] | None, known: Sequence[str]) -> Any:
    """Return the chosen methods and what they are called."""
    if methods is None:
        return {name: name for name in known}
    chosen = _chosen(list(methods) if isinstance(methods, Mapping) else methods, "methods", known)
    return dict(methods) if isinstance(methods, Mapping) else {name: name for name in chosen}


def _chosen(given: str | Sequence[str], name: str, known: Collection[str]) -> list[str]:
    """Return names of what is there, once each; refuse any other."""
    found = [given] if isinstance(given, str) else list(given)
    for x in found:
        if x not in known:
            raise ValueError(
                f"{name} must be among those of this result, got {x!r}{closest(str(x), known)}"
            )
    return list(dict.fromkeys(found))


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Name the lines: inside one panel where few are, beside the panels otherwise."""
    handles, labels = axes[0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: handles[i].get_gid() in BESIDE)
    words = ["x"] * len(order)  # Matplotlib leaves names out that begin with "_"
    chosen = [handles[i] for i in order]
    if len(axes) == 1 and len(order) <= 8:
        legend = axes[0].legend(chosen, words, loc="best")
    else:
        legend = figure.legend(chosen, words, loc="outside right upper")
    for text, i in zip(legend.get_texts(), order, strict=True):
        text.set_text(labels[i])
        text.set_parse_math(False)
