"""Pictures of claims: the observed distribution against the bound, step by step of a ladder."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...base.drawing import as_png, make_figure, plain_style
from ...kernels._threads import limit_threads
from ...problem import AttentionProblem
from .checking import sample
from .instances import Instance, as_instance
from .records import Claim, Observations
from .registry import get_entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Trials of each step of a picture.
TRIALS = 30


class Panel(NamedTuple):
    """Name one problem of a picture, with the verdict on it; a built-in instance by its name."""

    problem: str | AttentionProblem
    name: str
    status: str


class Picture(NamedTuple):
    """Ask for the picture of a claim on a few problems."""

    claim: str
    panels: tuple[Panel, ...]
    entropy: int


def picture(task: Picture) -> tuple[str, bytes | str]:
    """Return the id of a claim and its picture as PNG, or why there is none."""
    try:
        with limit_threads(1), plain_style():
            return task.claim, as_png(draw_claim(task))
    except Exception as error:  # of the drawing, or of a claim at other parameters
        return task.claim, f"{type(error).__name__}: {error}"


def draw_claim(task: Picture) -> Figure:
    """Return the picture of a claim, in the style that is in force."""
    claim = get_entry(task.claim).claim
    figure = make_figure(figsize=(5.4 * len(task.panels), 4.4), dpi=110, layout="constrained")
    for i, panel in enumerate(task.panels):
        axes = figure.add_subplot(1, len(task.panels), i + 1)
        draw(axes, claim, steps_of(claim, as_instance(panel.problem), task.entropy))
        title = f"{panel.name}: {panel.status}"
        axes.set_title(title, fontsize=9, parse_math=False)
    title = f"{claim.id} ({claim.status} {claim.kind})\n{claim.title}"
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.supylabel(textwrap.fill(claim.observes, 60), fontsize=8, parse_math=False)
    return figure


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


def draw(axes: Axes, claim: Claim, steps: Sequence[Step]) -> None:
    """Draw observations, bound and trivial predictor over the number of rows."""
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
        axes.plot(ranks, trivial, "--", color="0.45", label="trivial predictor", zorder=1)
    axes.set_xlabel("r", fontsize=9)
    axes.set_xscale("log", base=2)
    shown = [*bounds, *(x for x in middle if math.isfinite(x))]
    if min(shown) > 0 and max(shown) < math.inf:
        axes.set_yscale("log", nonpositive="clip")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    axes.tick_params(which="both", labelsize=8)
    axes.legend(fontsize=7)
