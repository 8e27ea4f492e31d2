"""Spectra of the heads, and how much of each matrix its first singular values carry.

The floor ``svd`` says both at the ranks of a study: the spectral error of the best matrix of rank r
is ``sigma_(r+1) / sigma_1``, and ``1 - (its Frobenius error)^2`` is the share of ``|A|_F^2`` in the
first r values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...base.drawing import make_figure
from ..columns import SHARE
from ..palette import COLOURS, DASHES
from ..ranks import axis_of
from .axes import format_ranks
from .cost import WIDTH
from .curves import medians_of, table_of
from .places import Label, place_labels
from .words import shorten

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# More lines than these cannot be told apart: the others are grey.
MOST_NAMED = 12


def draw_spectra(references: pd.DataFrame) -> Figure:
    """Return the picture, in the style that is in force."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    # Singular values have an index of their own on every head; what they carry is of a rank.
    spectral = table_of(references.drop(columns=SHARE, errors="ignore"), "matrix_spec_rel")
    frobenius = table_of(references, "matrix_fro_rel")
    heads = [str(h) for h in dict.fromkeys(references["head"]) if ("svd", h) in spectral]
    figure = make_figure(figsize=(WIDTH, 5.0))
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.1, top=0.83, wspace=0.17)
    labels: dict[str, list[Label]] = {"left": [], "right": []}
    points: dict[str, list[tuple[float, float]]] = {"left": [], "right": []}
    indices: set[float] = set()
    ranks: set[float] = set()
    lowest = 1.0
    for i, head in enumerate(heads):
        tails = medians_of(spectral, "svd", [head])
        rests = medians_of(frobenius, "svd", [head])
        indices |= set(tails)
        ranks |= set(rests)
        dashes = list(DASHES.values())
        style = {
            "color": COLOURS[i % len(COLOURS)] if i < MOST_NAMED else "0.7",
            "linestyle": dashes[i // len(COLOURS) % len(dashes)],
            "linewidth": 1.4 if i < MOST_NAMED else 0.7,
            "gid": head,
        }
        sizes = [(1.0, 1.0), *((r + 1.0, x[0]) for r, x in tails.items() if x[0] > 0)]
        shares = [(float(r), 1 - x[0] ** 2) for r, x in rests.items()]
        lowest = min([lowest, *(y for _, y in sizes)])
        for axes, side, found in ((left, "left", sizes), (right, "right", shares)):
            if not found:
                continue
            x, y = zip(*found, strict=True)
            axes.plot(x, y, **style)
            points[side] += found
            if i < MOST_NAMED:
                letters = {"fontsize": 8, "color": "0.15"}
                labels[side].append(
                    (shorten(head.rsplit("/", 1)[-1], 24), found[1:] or found, letters)
                )
    top = max(indices, default=1)
    left.set_xscale("log", base=2)
    left.set_xlim(1, top * 1.15 + 1)
    left.set_yscale("log")
    left.set_ylim(max(lowest / 1.5, 1e-8), 1.3)
    left.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
    left.xaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    format_ranks(right, sorted(ranks) or [1])
    right.set_ylim(top=1.0 + 0.02)
    right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g} %"))
    left.set_title("singular values, as a share of the largest", fontsize=9.5)
    right.set_title(r"share of $\|A\|_F^2$ in the first r of them", fontsize=9.5)
    for axes, side, text in ((left, "left", "index"), (right, "right", axis_of(ranks))):
        axes.set_xlabel(text, fontsize=9, labelpad=2)
        axes.tick_params(labelsize=8.5)
        axes.grid(True, which="major", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        place_labels(axes, labels[side], points[side])
    figure.suptitle(
        "How low-rank the attention matrices are", x=0.01, y=0.98, ha="left", va="top",
        fontsize=11, fontweight="bold",
    )  # fmt: skip
    more = f"; {len(heads) - MOST_NAMED} more heads in grey" if len(heads) > MOST_NAMED else ""
    figure.text(
        0.01, 0.92,
        f"A line a head, known at 1 and at the ranks of the study{more}.  A curve that falls "
        "slowly is a head that no method of low rank can follow.",
        ha="left", va="top", fontsize=8.5, color="0.25",
    )  # fmt: skip
    return figure
