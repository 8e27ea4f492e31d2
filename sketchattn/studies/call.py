"""How a study was asked for, as a reader can ask for it again."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from ..base.machine import command

# Of the text of an argument; a list of method objects can be a page.
MOST = 400


def call_of(heads: Any, **options: Any) -> str:
    """Return the command that was typed, or the call of `sketchattn.study`.

    Parameters
    ----------
    heads
        Shown as it is where it is a name or a path, as ``heads`` otherwise.
    **options
        Those that differ from None.

    Examples
    --------
    >>> call_of("minilm", methods=["uniform"], ranks=None, seeds=2)
    "sa.study('minilm', methods=['uniform'], seeds=2)"
    """
    if typed := command():
        return typed
    given = [_text(heads) if isinstance(heads, str | PathLike) else "heads"]
    given += [f"{name}={_text(x)}" for name, x in options.items() if x is not None]
    return f"sa.study({', '.join(given)})"


def _text(value: Any) -> str:
    if isinstance(value, PathLike):
        value = str(value)
    elif isinstance(value, Mapping):
        value = dict(value)
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST else f"{text[:MOST]}..."
