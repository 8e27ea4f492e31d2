"""Pictures as PNG that do not depend on how its user has set Matplotlib up."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def plain_style() -> Iterator[None]:
    """Make and draw figures with the defaults of Matplotlib, and leave its settings as they were.

    A figure that is made inside is drawn inside too: some settings are read only then.
    """
    _load()
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name in another script than the font has is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        yield


def _load() -> None:
    """Load Matplotlib, whatever backend its user has asked for: windows are not for us."""
    if "matplotlib" in sys.modules:
        return
    wanted = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if wanted is not None:
            os.environ["MPLBACKEND"] = wanted
    if wanted:
        with suppress(ValueError, ImportError):  # a backend that is not installed
            matplotlib.rcParams["backend"] = wanted


def make_figure(**options: Any) -> Figure:
    """Return a figure without pyplot: no window opens, and no global state changes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure


def as_png(figure: Figure, **options: Any) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", **options)
    return buffer.getvalue()
