"""Files are written to a temporary name in the same folder and renamed: all of it, or none."""

from __future__ import annotations

import math
import os
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any


def write_bytes(path: str | PathLike[str], data: bytes) -> None:
    """Replace the file ``path`` by ``data`` in one step; an interruption leaves the old file."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: str | PathLike[str], text: str) -> None:
    """Replace the file ``path`` by ``text`` (UTF-8) in one step."""
    write_bytes(path, text.encode())


def as_folder(out: Any) -> Path | None:
    """Return a path that is a folder or nothing yet; refuse a file."""
    if out is None:
        return None
    if not isinstance(out, str | PathLike):
        raise TypeError(f"out must be a path, got {type(out).__name__}; name a folder")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {str(folder)!r}; name another")
    return folder


# Neither JSON nor CSV has a word for numbers that are not finite that all readers share.
_SPELLED = ("inf", "-inf", "nan")


def encode(value: Any) -> Any:
    """Return a value for JSON: numbers that are not finite become "inf", "-inf" or "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def decode(value: Any) -> Any:
    """Return what `encode` was given."""
    return float(value) if value in _SPELLED else value
