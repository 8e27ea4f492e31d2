"""Records in words: three digits a number, a phrase a field, for terminals and notebooks.

What is computed is kept to the last bit; what is shown is what a person reads.
"""

from __future__ import annotations

import html
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple


def number(x: float) -> str:
    """Return a number with three significant digits, "-" for NaN.

    Examples
    --------
    >>> number(0.0016789), number(12345.0), number(3e-05), number(float("nan"))
    ('0.00168', '1.23e4', '3e-5', '-')
    """
    if math.isnan(x):
        return "-"
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{x:.3g}").replace("e+", "e")


def shown(value: Any) -> str:
    """Return a value for people: numbers by `number`, "-" for nothing, sequences by commas."""
    if value is None:
        return "-"
    if hasattr(value, "item"):  # a NumPy number
        value = value.item()
    if isinstance(value, float):
        return number(value)
    if isinstance(value, tuple | list):
        return ", ".join(map(shown, value))
    return str(value)


def counted(count: int, word: str) -> str:
    """Return a count with its word, in the plural but for one.

    Examples
    --------
    >>> counted(1, "head"), counted(0, "head")
    ('1 head', '0 heads')
    """
    return f"{count} {word}{'' if count == 1 else 's'}"


def listed(names: Iterable[str], last: str = "and") -> str:
    """Return names as a part of a sentence.

    Examples
    --------
    >>> listed(["a", "b", "c"], "or"), listed(["a"])
    ('a, b or c', 'a')
    """
    *first, end = names
    return f"{', '.join(first)} {last} {end}" if first else end


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """Return aligned columns: the first ``left`` and a last one without numbers to the left.

    Examples
    --------
    >>> print(table(["name", "n", "about"], [["a", "10", "x"], ["bb", "9", "y"]], left=1))
    name   n  about
    a     10  x
    bb     9  y
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    last = len(header) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left or i == last else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for notebooks; names come from files, and are text."""

    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


class Phrase(NamedTuple):
    """Say one field of a record: its name, its value as text, and what it is."""

    name: str
    value: str
    about: str


class Worded(ABC):
    """Base of records that say in words what they hold.

    A subclass defines ``_title``, and ``_phrases``, a phrase for each field that it shows; those
    in ``_brief`` make its ``repr``.  Dataclasses are declared with ``repr=False``.
    """

    _brief: ClassVar[tuple[str, ...]] = ()

    def _title(self) -> str:
        return type(self).__name__

    @abstractmethod
    def _phrases(self) -> list[Phrase]: ...

    def __str__(self) -> str:
        phrases = self._phrases()
        name, value = (max((len(p[i]) for p in phrases), default=0) for i in (0, 1))
        lines = [f"  {p.name:<{name}}  {p.value:<{value}}  {p.about}".rstrip() for p in phrases]
        return "\n".join([self._title(), *lines])

    def __repr__(self) -> str:
        told = (f"{p.name}={p.value}" for p in self._phrases() if p.name in self._brief)
        return f"<{' '.join([type(self).__name__, *told])}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        top = html.escape(self._title())
        return f"<p>{top}</p>{html_table(('field', 'value', 'what it is'), self._phrases())}"
