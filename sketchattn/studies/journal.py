"""Journals: finished cells on disk, one line each, and the lock of a folder."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import __version__
from ..base.files import decode, encode, write_bytes
from ..problem import AttentionProblem
from .grid import Cell
from .summary import COLUMNS, Key, Values


def journal_name(problem: AttentionProblem) -> str:
    """Return a file name that heads share only if both their name and their content are equal."""
    slug = re.sub(r"[^A-Za-z0-9.-]+", "_", str(problem.name)).strip("._")[:60]
    digest = hashlib.sha256(f"{problem.name}\0{problem.digest}".encode()).hexdigest()
    return f"{slug}-{digest[:16]}.jsonl"


def format_line(digest: str, cell: Cell, values: Values) -> bytes:
    """Return the line of a finished cell: the head that it is about, its key, and its values."""
    record = {
        "problem": digest,
        "method": cell.key[0],
        "rank": cell.rank,
        "seed": cell.key[1],
        "version": __version__,
        "values": {name: encode(x) for name, x in values.items()},
    }
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the record of one line, None if it is not whole."""
    try:
        record = json.loads(line)
        values = {name: decode(record["values"][name]) for name in COLUMNS[4:]}
        whole = all(
            isinstance(x, int | float) or (name in ("bytes", "effective_rank") and x is None)
            for name, x in values.items()
        )
        known = {"problem", "method", "seed", "version"} <= set(record)
    except (ValueError, KeyError, TypeError):
        return None
    return {**record, "values": values} if whole and known else None


def read_journal(path: Path, digest: str) -> dict[Key, Values]:
    """Return the finished cells of one head, and delete lines that are not whole.

    Parameters
    ----------
    path : Path
        Need not exist.
    digest : str
        ``problem.digest``; lines about other heads or written by other versions do not count.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    found: dict[Key, Values] = {}
    kept = []
    for line in raw.splitlines(keepends=True):
        record = _parse(line) if line.endswith(b"\n") else None
        if record is None:
            continue
        kept.append(line)
        if record["problem"] == digest and record["version"] == __version__:
            found.setdefault((record["method"], record["seed"]), record["values"])
    if len(whole := b"".join(kept)) != len(raw):
        write_bytes(path, whole)
    return found


def append_line(path: Path, line: bytes) -> None:
    """Append one line in one write, so that a killed process leaves whole lines behind."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        written = os.write(handle, line)
        if written != len(line):
            raise OSError(f"{path} could not be written whole; free some space and start again")
    finally:
        os.close(handle)


# --- one study a folder -------------------------------------------------------------------------

_TOKEN = 32  # characters
_LOCKED_BYTE = 1 << 20  # behind the text: Windows refuses to read bytes that are locked

if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _holder(handle: int) -> list[str]:
    """Return token, host and process that a lock file names."""
    os.lseek(handle, 0, os.SEEK_SET)
    return os.read(handle, 1024).decode(errors="replace").split()


@contextmanager
def lock_folder(path: Path, folder: Path) -> Iterator[str]:
    """Hold a folder for this study and yield its token.

    The system releases the lock when the process ends, however it ends.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        for _ in range(20):  # a worker may be looking whether its study is alive
            if _try_lock(handle):
                break
            time.sleep(0.05)
        else:
            holder = _holder(handle)
            process = f"process {holder[2]}" if len(holder) == 3 else "another process"
            raise ValueError(
                f"out must be a folder that no other study writes to, got {str(folder)!r}, which "
                f"{process} holds; wait for it or name another folder"
            )
        token = uuid.uuid4().hex
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, f"{token} {_host()} {os.getpid()}\n".encode())
        yield token
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _host() -> str:
    return re.sub(r"\s", "_", platform.node()) or "unknown"


def is_held(path: Path, token: str) -> bool:
    """Say whether the study that a worker belongs to still holds its folder.

    After a killed study its workers live on for a while; they must not write beside the study
    that continues it.
    """
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        holder = _holder(handle)
        if not holder or holder[0] != token:
            return False
        # Locks of another machine may be invisible here; then the token decides alone.
        return holder[1] != _host() or not _try_lock(handle)
    finally:
        os.close(handle)
