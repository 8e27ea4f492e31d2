"""Draw the layers of the package, as the import contract in ``pyproject.toml`` has them.

``python docs/draw_layers.py`` writes ``docs/layers.svg``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent

ABOUT = {
    "cli": "the command line",
    "studies": "error against rank",
    "bench": "times beside the competitor",
    "testing": "checks for other people's code",
    "integrations": "other frameworks",
    "theory": "claims with their constants, and the engine that checks them",
    "functional": "attention(): batches, masks, grouped heads",
    "zoo": "the methods, one file each",
    "errors": "reports, certificates, perturbation",
    "heads": "files, families, bundled data",
    "sampling": "laws, draws, leverage",
    "sketches": "random projections",
    "problem": "one head, validated",
    "operators": "what A and Ahat are",
    "partitions": "which keys a row reads itself, which through regions",
    "base": "arguments, draws, files",
    "kernels": "everything that is compiled",
}
FILL, EDGE, TEXT, SOFT = "#eaf1f8", "#7f9bb8", "#1b2733", "#51606e"


def layers(pyproject: str) -> list[list[str]]:
    """Return the rooms of each layer, from the top; those that do not exist yet are left out."""
    contracts = tomllib.loads(pyproject)["tool"]["importlinter"]["contracts"]
    (found,) = (contract["layers"] for contract in contracts if contract["id"] == "rooms")
    split = [[room.strip(" ()") for room in layer.replace(":", "|").split("|")] for layer in found]
    existing = [
        [
            room
            for room in rooms
            if (ROOT / "sketchattn" / room).is_dir()
            or (ROOT / "sketchattn" / f"{room}.py").exists()
        ]
        for rooms in split
    ]
    return [rooms for rooms in existing if rooms and rooms != ["__main__"]]


def draw(rows: list[list[str]]) -> Figure:
    """Return the picture: a band a layer, the top one first."""
    height = 0.52
    figure = Figure(figsize=(8, height * len(rows) + 0.35))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 8), ylim=(-0.35 / height, len(rows)))
    axes.axis("off")
    for level, rooms in enumerate(rows):
        bottom, width = len(rows) - 1 - level, 7.4 / len(rooms)
        for i, room in enumerate(rooms):
            left = 0.1 + i * width
            box = FancyBboxPatch(
                (left + 0.06, bottom + 0.14),
                width - 0.12,
                0.72,
                boxstyle="round,pad=0,rounding_size=0.08",
                facecolor=FILL,
                edgecolor=EDGE,
                linewidth=1,
            )
            axes.add_patch(box)
            beside = len(rooms) < 3
            name = (left + 0.2, bottom + (0.5 if beside else 0.65))
            about = (left + 1.4, bottom + 0.5) if beside else (left + 0.2, bottom + 0.33)
            size = (10, 8.5, 7)[min(len(rooms), 3) - 1]
            axes.text(*name, room, va="center", color=TEXT, fontsize=11, weight="bold")
            axes.text(*about, ABOUT[room], va="center", color=SOFT, fontsize=size)
    axes.annotate(
        "",
        (7.75, 0.14),
        (7.75, len(rows) - 0.14),
        arrowprops={"arrowstyle": "-|>", "color": EDGE, "linewidth": 1.5},
    )
    axes.text(
        7.6,
        -0.3,
        "imports go down; rooms of one layer do not import each other",
        ha="right",
        va="center",
        color=SOFT,
        fontsize=9,
    )
    return figure


def main() -> None:
    """Write the picture."""
    rows = layers((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    # The same bytes each time, and text that stays text.
    with rc_context({"svg.hashsalt": "layers", "svg.fonttype": "none"}):
        draw(rows).savefig(ROOT / "docs" / "layers.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
