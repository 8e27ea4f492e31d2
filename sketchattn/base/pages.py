"""Pages of HTML that stand alone: one file, no network, and names from files are text in them.

A page runs the scripts that stand here and no others: their hashes are in its policy, so that
not even a name that was not escaped could run anything.
"""

from __future__ import annotations

import base64
import hashlib
import math
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Figure = dict[str, Any]


class Column(NamedTuple):
    """Head a column of a table.

    ``number`` says that it sorts by value, not by text; ``about`` is shown where a pointer rests.
    """

    title: str
    number: bool = False
    about: str = ""


class Cell(NamedTuple):
    """Hold what a cell shows, and what it sorts by where that is another thing.

    ``mark`` is a class of ``page.css`` such as "good" or "bad"; ``link`` an address inside the
    page or beside it.
    """

    text: str
    value: float | str | None = None
    mark: str = ""
    link: str = ""


class Table(NamedTuple):
    """Hold a table that sorts; ``name`` is its id in the page."""

    name: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


class Chart(NamedTuple):
    """Hold a figure of plotly as plain data, what it shows, and its height in pixels."""

    name: str
    title: str
    about: str
    figure: Figure
    height: int


def number(x: float | None, digits: int = 3) -> Cell:
    """Return the cell of a number, which sorts by its value; missing ones and NaN are a dash.

    Examples
    --------
    >>> number(0.1)
    Cell(text='0.100', value=0.1, mark='', link='')
    >>> number(float("nan")).text
    '-'
    """
    if x is None or math.isnan(x):
        return Cell("-", math.nan)
    return Cell(str(x) if isinstance(x, int) else short(x, digits), float(x))


def short(x: float, digits: int = 3) -> str:
    """Return a number as a reader wants it: few digits, and an exponent only where it helps.

    Examples
    --------
    >>> short(0.00001234), short(1234567.0), short(0.5), short(20308.3), short(float("inf"))
    ('1.23e-5', '1.23e6', '0.500', '20300', 'inf')
    """
    if not math.isfinite(x):
        return str(x)
    if x == 0:
        return "0"
    if not 1e-4 <= abs(x) < 1e5:
        mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    text = f"{x:#.{digits}g}"
    # Of 2.03e4 all digits, but no point after the last.
    return f"{float(text):.0f}" if "e" in text else text.rstrip(".")


def rounded(values: Iterable[float], digits: int = 5) -> list[float | None]:
    """Return numbers for a figure: a few digits of each, None for what no axis can show."""
    return [float(f"{x:.{digits}g}") if math.isfinite(x) else None for x in values]


def label(text: object, most: int = 40) -> str:
    """Return text for a label of plotly, which would read ``<b>`` and ``&amp;`` as markup.

    Examples
    --------
    >>> label("a<b>&"), label("x" * 50, most=9)
    ('a&lt;b&gt;&amp;', 'xxxx…xxxx')
    """
    clean = shorten(text, most)
    return clean.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def shorten(text: object, most: int = 40) -> str:
    """Return text on one line, without its middle where it is longer than ``most``."""
    clean = " ".join(str(text).split())
    half = (most - 1) // 2
    return clean if len(clean) <= most else f"{clean[:half]}…{clean[-half:]}"


def render_page(room: str, template: str, charts: Sequence[Chart] = (), **context: Any) -> str:
    """Return a page as text.

    Parameters
    ----------
    room : str
        Full name of the package with the folder ``templates`` that the template is in.
    template : str
        File in that folder; it extends ``page.html`` of this room.
    charts : sequence of Chart
        For the macro ``chart``; plotly is part of the page where there is one.
    **context
        What the template names.

    Raises
    ------
    jinja2.UndefinedError
        For a name of the template that ``context`` lacks.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(name) for name in dict.fromkeys((room, __package__ or ""))]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {
        "separators": (",", ":"),
        "allow_nan": False,
        "ensure_ascii": False,
    }
    scripts = [_part("tables.js")]
    if charts:
        from plotly.offline import get_plotlyjs

        scripts += [get_plotlyjs(), _part("charts.js")]
    hashes = (base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in scripts)
    found: str = environment.get_template(template).render(
        **context,
        charts={chart.name: chart for chart in charts},
        style=_part("page.css"),
        scripts=scripts,
        policy=" ".join(f"'sha256-{x}'" for x in hashes),
    )
    return found


def _part(name: str) -> str:
    """Return a file of the templates as it stands."""
    raw = pkgutil.get_data(__package__ or "", f"templates/{name}") or b""
    # What the browser hashes has no carriage returns.
    return raw.decode().replace("\r\n", "\n")


# --- figures ------------------------------------------------------------------------------------

# Of marks and lines that are read on white and on black alike.
NEUTRAL = "#808080"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


def layout_of(**options: Any) -> dict[str, Any]:
    """Return the layout that all figures share; the page colours text, grid and menus itself."""
    axis = {"zeroline": False, "showline": False, "automargin": True, "gridcolor": NEUTRAL}
    shared: dict[str, Any] = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 13, "color": NEUTRAL},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "#1d2430",
            "font": {"color": "#ffffff", "family": FONT, "size": 13},
            "align": "left",
            "namelength": -1,
        },
        "dragmode": False,
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": NEUTRAL, "activecolor": NEUTRAL},
        "legend": {
            "orientation": "h",
            "yref": "container",
            "y": 0.0,
            "yanchor": "bottom",
            "xref": "container",
            "x": 0.0,
            "font": {"size": 12},
            "tracegroupgap": 0,
            "itemsizing": "constant",
            "bgcolor": "rgba(0,0,0,0)",
        },
    }
    for name, value in options.items():
        if name.startswith(("xaxis", "yaxis")):
            value = {**axis, **value}
        known = shared.get(name)
        shared[name] = (
            {**known, **value} if isinstance(known, Mapping) and isinstance(value, dict) else value
        )
    return shared


def menu(buttons: Sequence[tuple[str, str, list[Any]]], **place: Any) -> dict[str, Any]:
    """Return a menu of plotly from triples (label, method of plotly, arguments)."""
    return {
        "type": "dropdown",
        "direction": "down",
        "showactive": True,
        "x": 0.0,
        "xanchor": "left",
        "y": 1.0,
        "yanchor": "bottom",
        "pad": {"b": 12, "t": 0, "l": 0, "r": 0},
        "bordercolor": NEUTRAL,
        "bgcolor": "#ffffff",  # it covers what is below; the page chooses the colour
        "font": {"size": 13},
        "buttons": [
            {"label": text, "method": method, "args": arguments}
            for text, method, arguments in buttons
        ],
        **place,
    }
