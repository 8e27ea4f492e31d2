"""Where labels go: beside their own points, away from all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .words import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[Any]
# Text, the spots that it may stand at in data coordinates, and its style.
Label = tuple[str, Sequence[tuple[float, float]], dict[str, Any]]

# Letters are about this wide, as a share of their height.
LETTER = 0.62
# Where a label may stand around its point: distances in points, and directions with the corner of
# the label that lies there.
DISTANCES = (6.0, 13.0, 22.0, 34.0, 48.0, 66.0, 88.0, 112.0)
DIRECTIONS = (
    (1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0), (0.8, 0.6), (0.8, -0.6), (-0.8, 0.6),
    (-0.8, -0.6), (0.4, 0.92), (0.4, -0.92), (-0.4, 0.92), (-0.4, -0.92),
)  # fmt: skip
AROUND = np.array([(r * x, r * y) for r in DISTANCES for x, y in DIRECTIONS])


def place_labels(
    axes: Axes,
    labels: Sequence[Label],
    obstacles: Sequence[tuple[float, float]],
    texts: Sequence[Any] = (),
) -> None:
    """Write each label beside one of its spots, where it covers least; the first choose first.

    Parameters
    ----------
    axes : Axes
        With its final limits.
    labels : sequence of (text, spots, style)
    obstacles : sequence of (x, y)
        Points that should not be covered, in data coordinates.
    texts : sequence of Text
        What stands there already.
    """
    # Everything in points of a 72nd of an inch, as the offsets are.
    to_points = 72.0 / axes.figure.dpi
    transform = axes.transData

    def at(points: Sequence[tuple[float, float]]) -> Array:
        xy = np.asarray(points, float).reshape(-1, 2)
        return np.asarray(transform.transform(xy)) * to_points

    frame = axes.get_window_extent()
    low = np.array([frame.x0, frame.y0]) * to_points
    high = np.array([frame.x1, frame.y1]) * to_points
    covered = at(obstacles)
    taken = [np.array(x.get_window_extent().extents) * to_points for x in texts]
    for text, spots, style in labels:
        if not len(spots):
            continue
        size = float(style["fontsize"])
        width, height = LETTER * size * len(text) + 2, size + 2
        if style.get("fontweight") == "bold":
            width *= 1.08
        # All places at once: (spots x places around each, 2).
        offsets = np.tile(AROUND, (len(spots), 1))
        aligned = np.sign(np.where(np.abs(offsets) < 0.5 * np.abs(offsets).max(1)[:, None], 0,
                                   offsets))  # fmt: skip
        corners = np.repeat(at(spots), len(AROUND), axis=0) + offsets
        corners -= (1 - aligned) / 2 * (width, height)
        ends = corners + (width, height)
        price = 0.12 * np.hypot(*offsets.T)
        price += np.repeat(0.5 * np.arange(len(spots))[::-1], len(AROUND))
        price += 90.0 * ((corners < low + 2) | (ends > high - 2)).any(axis=1)
        inside = (covered > corners[:, None] - 1.5) & (covered < ends[:, None] + 1.5)
        price += 4.0 * inside.all(axis=2).sum(axis=1)
        for box in taken:
            shared = np.minimum(ends, box[2:]) - np.maximum(corners, box[:2])
            price += 0.8 * np.maximum(shared, 0).prod(axis=1)
        j = int(price.argmin())
        taken.append(np.concatenate([corners[j], ends[j]]))
        dx, dy = offsets[j]
        across, up = (1 - aligned[j]) / 2
        axes.annotate(
            text,
            spots[j // len(AROUND)],
            (dx, dy),
            textcoords="offset points",
            ha={0.0: "left", 0.5: "center", 1.0: "right"}[float(across)],
            va={0.0: "bottom", 0.5: "center", 1.0: "top"}[float(up)],
            zorder=8,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.6, "shrinkA": 0,
                        "shrinkB": 2} if np.hypot(dx, dy) > 10 else None,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 0.3},
            **style,
        )  # fmt: skip


def end_labels(axes: Axes, labels: Sequence[Label], size: float, room: float) -> None:
    """Write labels behind the right edge, each as high as its line ends or as near as it fits.

    One that is wider than what is left of the figure is cut in its middle.

    Parameters
    ----------
    axes : Axes
        With its final limits.
    labels : sequence of (text, [last point], style of the line)
    size : float
        Of the letters, in points.
    room : float
        Between the axes and the samples of the lines, in points.
    """
    from matplotlib.collections import LineCollection

    if not labels:
        return
    frame = axes.get_window_extent()
    to_points = 72.0 / axes.figure.dpi
    width, span = frame.width * to_points, frame.height * to_points
    to_axes = axes.transAxes.inverted()
    ends = [
        (text, spots[-1], style, float(to_axes.transform(axes.transData.transform(spots[-1]))[1]))
        for text, spots, style in labels
    ]
    ends.sort(key=lambda item: item[3])
    heights = spread(np.array([y for *_, y in ends]), size * 1.2 / span, 0.0, 1.0)
    start, stop = 1 + room / width, 1 + (room + 20) / width
    # One collection of all leaders: an arrow each would take longer than the curves.
    points = [to_axes.transform(axes.transData.transform(spot)) for _, spot, *_ in ends]
    leaders = [[tuple(p), (start, y)] for p, y in zip(points, heights, strict=True)]
    colours = [style["color"] for _, _, style, _ in ends]
    axes.add_collection(
        LineCollection(
            leaders, colors=colours, linewidths=0.7, alpha=0.7, transform=axes.transAxes,
            clip_on=False, zorder=2.9,
        ),
        autolim=False,
    )  # fmt: skip
    right = float(axes.figure.bbox.x1) - 2 / to_points
    for (text, _, style, _), height in zip(ends, heights, strict=True):
        axes.plot(
            [start, (start + stop) / 2, stop], [height] * 3, transform=axes.transAxes,
            clip_on=False, markevery=[1], gid=f"{text}:sample", **style,
        )  # fmt: skip
        label = axes.text(
            stop + 4 / width, height, text, transform=axes.transAxes, ha="left", va="center",
            fontsize=size, color="0.1", parse_math=False, gid=f"{text}:label",
        )  # fmt: skip
        shown = len(text)
        while shown > 8 and label.get_window_extent().x1 > right:
            shown -= 1
            label.set_text(shorten(text, shown))


def spread(wanted: Array, gap: float, low: float, high: float) -> Array:
    """Return heights near those wanted, ascending, at least ``gap`` apart and within limits.

    Where they do not fit the gap is smaller.

    Examples
    --------
    >>> spread(np.array([0.0, 0.1, 5.0]), 1.0, 0.0, 10.0).tolist()
    [0.0, 1.0, 5.0]
    """
    if len(wanted) > 1:
        gap = min(gap, (high - low) / (len(wanted) - 1))
    # The nearest ascending sequence, by pooling neighbours that are too close.
    steps = gap * np.arange(len(wanted))
    blocks: list[tuple[float, int]] = []
    for x in wanted - steps:
        total, count = float(x), 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            before, many = blocks.pop()
            total, count = total + before, count + many
        blocks.append((total, count))
    flat = np.concatenate([np.full(count, total / count) for total, count in blocks])
    top = high - gap * (len(wanted) - 1)
    return np.asarray(np.clip(flat, low, max(low, top)) + steps)
