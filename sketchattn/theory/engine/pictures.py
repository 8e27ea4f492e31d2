"""Pictures of claims: the observed distribution against the bound, step by step of a ladder."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...base.drawing import as_png, make_figure, plain_style
from ...kernels._threads import limit_threads
from ...problem import AttentionProblem
from .checking import sample
from .instances import Instance, as_instance
from .records import Claim, Observations
from .registry import Entry, adopt, get_entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Trials of each step of a picture.
TRIALS = 30


class Panel(NamedTuple):
    """Name one problem of a picture, with the verdict on it; a built-in instance by its name."""

    problem: str | AttentionProblem | Instance
    name: str
    status: str


class Picture(NamedTuple):
    """Ask for the picture of a claim on a few problems."""

    claim: str
    panels: tuple[Panel, ...]
    entropy: int
    own: tuple[Entry, ...] = ()


def picture(task: Picture) -> tuple[str, bytes | str]:
    """Return the id of a claim and its picture as PNG, or why there is none."""
    try:
        adopt(task.own)
        with plain_style():
            return task.claim, as_png(figure_of(task, (5.4 * len(task.panels), 4.4)))
    except Exception as error:  # of the drawing, or of a claim at other parameters
        return task.claim, f"{type(error).__name__}: {error}"


def figure_of(task: Picture, size: tuple[float, float] | None = None) -> Figure:
    """Return the picture of a claim as a figure, in the style that is set.

    Without a size, in inches, all is as the user has set it: size, resolution, letters and grid.
    """
    claim = get_entry(task.claim).claim
    own = size is None
    with limit_threads(1):
        options: dict[str, Any] = {} if own else {"figsize": size, "dpi": 110}
        figure = make_figure(layout="constrained", **options)
        width, height = figure.get_size_inches()
        for i, panel in enumerate(task.panels):
            axes = figure.add_subplot(1, len(task.panels), i + 1)
            draw(axes, claim, steps_of(claim, as_instance(panel.problem), task.entropy), own)
            title = f"{panel.name}: {panel.status}"
            if own:
                title = _filled(title, 0.75 * width / len(task.panels), "x-small")
            axes.set_title(title, fontsize="x-small" if own else 9, parse_math=False)
    title = f"{claim.id} ({claim.status} {claim.kind})\n{claim.title}"
    beside = textwrap.fill(claim.observes, 60)
    if own:
        title = "\n".join(_filled(line, width, "small") for line in title.split("\n"))
        beside = _filled(claim.observes, 0.8 * height, "x-small")
    figure.suptitle(title, fontsize="small" if own else 10, parse_math=False)
    figure.supylabel(beside, fontsize="x-small" if own else 8, parse_math=False)
    if own:
        _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    """Name the lines of all panels once, below them, in as many columns as there is room for."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:
        return
    columns = 1 if figure.get_figwidth() < 4 else 2 if figure.get_figwidth() < 6 else len(found)
    figure.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=columns,
        fontsize="x-small",
    )  # fmt: skip


def _filled(text: str, inches: float, size: str) -> str:
    """Return a text broken into lines that are not wider than this."""
    from matplotlib.font_manager import FontProperties

    # A letter is about 0.55 of its size wide.
    points = FontProperties(size=size).get_size_in_points()
    return textwrap.fill(text, max(12, int(72 * inches / (0.55 * points))))


def _plain_numbers(axes: Axes) -> None:
    """Label a logarithmic axis with as many numbers as there is room for in the figure."""
    from matplotlib.ticker import LogLocator, NullLocator

    if axes.get_yscale() != "log":
        return
    low, high = axes.get_ylim()
    decades, height = math.log10(high / low), axes.get_window_extent().height / axes.figure.dpi
    subs = (
        range(1, 10) if decades < 0.15 * height else (1, 2, 5) if decades < 0.75 * height else (1,)
    )
    axes.yaxis.set_major_locator(LogLocator(subs=[float(x) for x in subs], numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")


class Step(NamedTuple):
    """Hold what was observed with so many rows."""

    rank: int
    seen: Observations


def steps_of(claim: Claim, instance: Instance, entropy: int) -> list[Step]:
    """Observe a claim at the parameters of its ladder that fit the problem."""
    entry = get_entry(claim.id)
    steps = []
    for extra in entry.ladder or ({},):
        if int(extra.get("rank", 1)) > instance.n:
            continue
        parameters = {**entry.parameters, **extra}
        seen = sample(entry, instance, TRIALS, entropy, parameters)
        if seen is not None and len(seen.values):
            steps.append(Step(1 if seen.rank is None else seen.rank, seen))
    return sorted(steps, key=lambda step: step.rank)


def draw(axes: Axes, claim: Claim, steps: Sequence[Step], own: bool = False) -> None:
    """Draw observations, bound and trivial predictor over the number of rows.

    ``own`` leaves letters and grid as the user has set them, and the legend to the figure.
    """
    if not steps:
        axes.text(
            0.5,
            0.5,
            "nothing to draw: not applicable, or r >= n\nfor all parameters of the picture",
            ha="center",
            va="center",
            transform=axes.transAxes,
            fontsize=9,
        )
        axes.set_axis_off()
        return
    ranks = [step.rank for step in steps]
    means = claim.kind in ("equality", "expectation")
    bounds = [float(np.median(np.asarray(step.seen.bound, np.float64))) for step in steps]
    middle: list[float] = []
    low: list[float] = []
    high: list[float] = []
    for step in steps:
        values = np.asarray(step.seen.values, np.float64)
        if means:
            spread = 5 * float(values.std(ddof=1)) / math.sqrt(len(values))
            centre = float(values.mean())
            triple = (centre, centre - spread, centre + spread)
        else:
            centre, below, above = (float(x) for x in np.quantile(values, (0.5, 0.05, 0.95)))
            triple = (centre, below, above)
        for kept, x in zip((middle, low, high), triple, strict=True):
            kept.append(x)
    what = "mean, 5 standard errors" if means else "median, 5 % to 95 %"
    errors = np.array([np.subtract(middle, low), np.subtract(high, middle)])
    axes.errorbar(
        ranks,
        middle,
        yerr=np.maximum(errors, 0.0),
        fmt="o",
        color="#0072B2",
        capsize=3,
        label=f"observed: {what}",
        zorder=3,
    )
    if not means:
        for step in steps:
            values = np.asarray(step.seen.values, np.float64)
            axes.plot([step.rank] * len(values), values, ".", color="#56B4E9", markersize=2)
    label = "theory" if claim.kind == "equality" else "bound"
    axes.plot(ranks, bounds, "-", color="black", marker="_", label=label, zorder=2)
    trivial = [step.seen.trivial for step in steps if step.seen.trivial is not None]
    if len(trivial) == len(ranks):
        style: dict[str, Any] = {"color": "0.45", "label": steps[0].seen.predictor, "zorder": 1}
        if len(ranks) > 1:
            axes.plot(ranks, trivial, "--", **style)
        else:  # a line through one point has no length
            axes.axhline(trivial[0], linestyle="--", **style)
    if len(ranks) == 1:
        axes.axhline(bounds[0], color="black", zorder=2)
    axes.set_xlabel("r", fontsize="small" if own else 9)
    axes.set_xscale("log", base=2)
    shown = [*bounds, *(x for x in middle if math.isfinite(x))]
    if min(shown) > 0 and max(shown) < math.inf:
        axes.set_yscale("log", nonpositive="clip")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    if own:
        _plain_numbers(axes)
        return
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    axes.tick_params(which="both", labelsize=8)
    axes.legend(fontsize=7)
