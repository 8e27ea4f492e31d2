"""How every method of a study looks, in pictures and in the report alike.

Colour never stands alone: of any 24 methods no two share both dash and marker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .columns import EXACT

# Okabe and Ito's colours without black (references) and yellow (too light on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# By plotly's name, as Matplotlib wants them.
DASHES: dict[str, Any] = {
    "solid": "-",
    "dash": (0, (5, 1.5)),
    "dot": (0, (1.2, 1.2)),
    "dashdot": (0, (5, 1.5, 1.2, 1.5)),
}
# By Matplotlib's letter, as plotly calls them.  Triangles up and down mean infinite and zero.
SYMBOLS = {
    "o": "circle",
    "s": "square",
    "D": "diamond",
    "X": "x",
    "P": "cross",
    "p": "pentagon",
    "h": "hexagon",
    "d": "diamond-tall",
    "<": "triangle-left",
    ">": "triangle-right",
    "H": "hexagon2",
    "8": "octagon",
    "*": "star",
    "1": "y-down",
    "2": "y-up",
}
MARKERS = tuple(SYMBOLS)


class Style(NamedTuple):
    """Say how a line looks.

    Attributes
    ----------
    colour : str
        ``#rrggbb``.
    dash : str
        A key of `DASHES`.
    marker : str
        A key of `SYMBOLS`; "" for references, which have none.
    """

    colour: str
    dash: str
    marker: str


# Floors are black, predictors grey; exact attention is one point.
REFERENCES_LOOK = {
    "svd": Style("#000000", "solid", ""),
    "topk": Style("#000000", "dash", ""),
    "zero": Style("#737373", "dot", ""),
    "vmean": Style("#737373", "dashdot", ""),
    EXACT: Style("#000000", "dot", ""),
}
REFERENCE_LABELS = {
    "svd": "best rank-r A (SVD, V-blind)",
    "topk": "r largest entries a row (top-k)",
    "zero": "zero output",
    "vmean": "mean of V",
    EXACT: "exact attention",
}


def style_of(label: str, labels: Sequence[str]) -> Style:
    """Return how a method looks among the methods of a study.

    Parameters
    ----------
    label : str
        A reference, or one of ``labels``.
    labels : sequence of str
        The methods of the study in order, without references.

    Examples
    --------
    >>> style_of("b", ["a", "b"])
    Style(colour='#D55E00', dash='solid', marker='s')
    >>> style_of("svd", []).dash
    'solid'
    """
    if label in REFERENCES_LOOK:
        return REFERENCES_LOOK[label]
    i = list(labels).index(label)
    dashes = list(DASHES)
    return Style(
        COLOURS[i % len(COLOURS)],
        dashes[i // len(COLOURS) % len(dashes)],
        MARKERS[i % len(MARKERS)],
    )
