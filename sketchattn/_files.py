"""Files are written to a temporary name in the same folder and renamed: all of it, or none."""

from __future__ import annotations

import os
import tempfile
from os import PathLike
from pathlib import Path


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
