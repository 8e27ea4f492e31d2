"""Tables in Markdown, and numbers as they stand in them."""

from __future__ import annotations

from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; bars inside of cells are escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def cell(text: str) -> str:
    """Return a text for a cell: one line, with bars that do not end it."""
    return " ".join(text.split()).replace("|", "\\|")


def short(value: float | None) -> str:
    """Return a number in three digits or fewer."""
    if value is None:
        return "-"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def percent(value: float | None) -> str:
    """Return a share in per cent."""
    return "-" if value is None else f"{100 * value:.0f} %"
