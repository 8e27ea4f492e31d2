"""The pictures that the site draws from `docs/data`: one of all methods, and one a method."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import sketchattn as sa
from sketchattn.base.drawing import make_figure, plain_style
from sketchattn.studies.palette import DASHES, style_of
from sketchattn.studies.pictures.places import Label, end_labels, place_labels

from .measure import Data, at_budget, points_of

FLOOR, FLAT = "#51606e", "#9aa5b1"
# How far a line may be above the mean of V before it leaves the picture.
TOP = 3.0
# Text of a picture, in points.
LETTERS, SMALL, PLAIN = 7.0, 8.0, 10.0
# What rounding leaves: such points stand on no picture.
EXACT = 1e-6


def as_svg(figure: Any) -> bytes:
    """Return a figure as SVG whose bytes depend on what is drawn alone."""
    from matplotlib import rc_context

    out = BytesIO()
    with rc_context({"svg.hashsalt": "sketchattn", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return b"\n".join(line.rstrip() for line in out.getvalue().splitlines()) + b"\n"


def series(points: list[Data], x: str, y: str) -> tuple[list[float], list[float]]:
    """Return two columns of the points where both are known and can stand on a log axis."""
    pairs = [(p[x], p[y]) for p in points if p[x] and p[y]]
    return [a for a, _ in pairs], [b for _, b in pairs]


def overview(data: Data, times: Data) -> bytes:
    """Draw the error of every method against rank, and error against time on long heads."""
    every = list(sa.methods())
    with plain_style():
        figure = make_figure(figsize=(10.4, 5.0))
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
        figure.subplots_adjust(left=0.065, right=0.985, bottom=0.1, top=0.93, wspace=0.5)
        ranks = [p["rank"] for p in data["references"]["svd"]]
        left.set(xscale="log", yscale="log", ylim=(3e-3, TOP))
        left.set(xlim=(ranks[0] / 1.2, ranks[-1] * 1.2))
        left.set_xticks(ranks, [str(r) for r in ranks])
        left.minorticks_off()
        names: list[Label] = []
        for name in sorted(data["methods"]):
            style = style_of(name, every)
            look: dict[str, Any] = {
                "color": style.colour, "linestyle": DASHES[style.dash], "marker": style.marker,
                "markersize": 4, "linewidth": 1.2,
            }  # fmt: skip
            points = [p for p in data["methods"][name] if p["median"] and p["median"] > EXACT]
            x, y = series(points, "rank", "median")
            left.plot(x, y, **look)
            # A line that ends before the others is named where it ends.
            if points[-1]["rank"] < data["methods"]["uniform"][-1]["rank"]:
                left.annotate(
                    name, (x[-1], y[-1]), xytext=(5, -3), textcoords="offset points",
                    color=style.colour, fontsize=LETTERS,
                )  # fmt: skip
            else:
                names.append((name, [(x[-1], min(y[-1], TOP))], look))
        references(left, data, names)
        left.set_xlabel(f"rank r, of n = {data['n']} keys")
        left.set_ylabel(r"relative error of the output, $\|\hat{O} - O\|_F / \|O\|_F$")
        left.set_title(f"Real heads: median of {len(data['heads'])}", fontsize=PLAIN)
        figure.draw_without_rendering()
        end_labels(left, names, LETTERS, 5)

        spots: list[tuple[float, float]] = []
        beside: list[Label] = []
        for name, found in sorted(times["methods"].items()):
            if not found.get("error") or found["error"] < EXACT or name == "zero":
                continue
            style = style_of(name, every)
            spots.append((found["one"], found["error"]))
            right.plot(
                *spots[-1], color=style.colour, marker=style.marker or "_", markersize=7,
                linestyle="none",
            )  # fmt: skip
            beside.append((name, [spots[-1]], {"color": style.colour, "fontsize": LETTERS}))
        right.axvline(1, color=FLAT, linewidth=1, linestyle=":")
        right.set(xscale="log", yscale="log")
        right.set_xlabel("time on one thread, as a share of exact attention")
        right.set_ylabel("relative error of the output")
        heads = times["heads"]
        right.set_title(
            f"Longer heads: median of {heads['count']}, n = {heads['n']}, r = {times['rank']}",
            fontsize=PLAIN,
        )
        figure.draw_without_rendering()
        place_labels(right, beside, spots)
        return as_svg(figure)


def references(ax: Any, data: Data, names: list[Label] | None = None) -> None:
    """Draw the floors and the mean of V, and add what they are called."""
    for name, text, dash in (
        ("svd", "floor: SVD", "--"),
        ("topk", "floor: top keys", "-."),
        ("vmean", "mean of V", ":"),
    ):
        x, y = series(data["references"].get(name, []), "rank", "median")
        if x:
            look = {"color": FLOOR, "linestyle": dash, "linewidth": 1.8}
            ax.plot(x, y, label=text, zorder=1, **look)
            if names is not None:
                names.append((text, [(x[-1], y[-1])], look))


def method(name: str, data: Data) -> bytes | None:
    """Draw a method: error against rank, against time, and head by head; None without numbers."""
    points = points_of(data, name)
    if len(points) < 2:
        return None
    style = style_of(name, list(sa.methods()))
    look = {"color": style.colour, "marker": style.marker, "markersize": 5, "linewidth": 1.6}
    with plain_style():
        figure = make_figure(figsize=(9.6, 3.3), layout="constrained")
        by_rank, by_time, by_head = figure.subplots(1, 3)
        for ax, x in ((by_rank, "rank"), (by_time, "time")):
            shown = [p for p in points if p["median"] and p[x] and p["median"] > 1e-7]
            xs = [p[x] for p in shown]
            ax.fill_between(
                xs, [p["low"] for p in shown], [p["high"] for p in shown], color=style.colour,
                alpha=0.15, linewidth=0,
            )  # fmt: skip
            ax.plot(xs, [p["median"] for p in shown], **look, label="median, quartiles")
            ax.plot(
                xs, [p["worst"] for p in shown], color=style.colour, linewidth=1, linestyle=":",
                marker="v", markersize=3, label="worst head",
            )  # fmt: skip
            ax.set(xscale="log", yscale="log")
        references(by_rank, data)
        by_rank.set_xlabel(f"rank r, of n = {data['n']} keys")
        by_rank.set_ylabel("relative error of the output")
        by_rank.legend(fontsize=6.5, frameon=False)
        by_time.axvline(1, color=FLAT, linewidth=1, linestyle=":")
        by_time.set_xlabel("time, as a share of exact attention")
        budget = at_budget(data, name)
        assert budget is not None  # ranks begin below it
        heads(by_head, budget, data, style)
        return as_svg(figure)


def heads(ax: Any, point: Data, data: Data, style: Any) -> None:
    """Put the error of every head against the number of keys that its rows use."""
    xs, ys, names = [], [], []
    for head, error in point["heads"].items():
        if error:
            xs.append(data["heads"][head]["perplexity"])
            ys.append(error)
            names.append(head)
    ax.plot(xs, ys, color=style.colour, marker="o", linestyle="none", markersize=5)
    worst = max(range(len(ys)), key=ys.__getitem__)
    ax.plot(xs[worst], ys[worst], marker="o", markersize=11, markerfacecolor="none",
            markeredgecolor="#b3261e", linestyle="none")  # fmt: skip
    ax.set_title(f"worst: {names[worst].split('/')[-1]}", fontsize=SMALL, color="#b3261e")
    mean = data["references"]["vmean"][0]["heads"]
    ax.plot(
        [data["heads"][head]["perplexity"] for head in names], [mean[head] for head in names],
        color=FLAT, marker="_", linestyle="none", markersize=9, label="mean of V",
    )  # fmt: skip
    ax.set(xscale="log", yscale="log")
    ax.set_xlabel("keys that a row uses (perplexity, median)")
    ax.set_ylabel(f"error of each head at r = {point['rank']}")
    ax.legend(fontsize=6.5, frameon=False)
