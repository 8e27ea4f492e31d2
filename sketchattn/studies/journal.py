"""Journals: finished cells on disk, one line each, and the lock of a folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..base.files import decode, encode, write_bytes, write_text, writing
from ..base.parallel import is_alive
from ..problem import AttentionProblem
from .columns import COLUMNS, Key, Values
from .grid import Cell

if TYPE_CHECKING:
    from filelock import BaseFileLock


def journal_name(problem: AttentionProblem) -> str:
    """Return a file name that heads share only if both their name and their content are equal."""
    slug = re.sub(r"[^A-Za-z0-9.-]+", "_", str(problem.name)).strip("._")[:60]
    digest = hashlib.sha256(f"{problem.name}\0{problem.digest}".encode()).hexdigest()
    return f"{slug}-{digest[:16]}.jsonl"


def format_line(digest: str, cell: Cell, values: Values) -> bytes:
    """Return the line of a finished cell: head, key, values, and a checksum of these."""
    record = {
        "problem": digest,
        "method": cell.key[0],
        "rank": cell.rank,
        "seed": cell.key[1],
        "version": __version__,
        "values": {name: encode(x) for name, x in values.items()},
    }
    return json.dumps({**record, "sum": _checksum(record)}, allow_nan=False).encode() + b"\n"


def _checksum(record: dict[str, Any]) -> str:
    """Return what tells whether a record is the one that was written."""
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:16]


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the record of one line, None if it is not what was written."""
    try:
        record = json.loads(line)
        if record.pop("sum") != _checksum(record):
            return None
        values = {name: decode(record["values"][name]) for name in COLUMNS[4:]}
        whole = all(
            isinstance(x, int | float) or (name in ("bytes", "effective_rank") and x is None)
            for name, x in values.items()
        )
        known = {"problem", "method", "seed", "version"} <= set(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return {**record, "values": values} if whole and known else None


def read_journal(path: Path, digest: str) -> dict[Key, Values]:
    """Return the finished cells of one head, and delete lines that are not what was written.

    Parameters
    ----------
    path : Path
        Need not exist.
    digest : str
        ``problem.digest``; lines about other heads or written by other versions do not count.
    """
    if not path.exists():
        return {}
    raw = path.read_bytes()
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


# --- one study a folder -------------------------------------------------------------------------

# File systems that know no locks (some of Lustre, NFS and FUSE) say so with one of these.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


def holder_of(lock: Path) -> Path:
    """Return the file that names token, host and process of the study that holds a lock."""
    return lock.with_name(f"{lock.name}-holder")


def _holder(lock: Path) -> list[str]:
    """Return token, host and process of the study that holds a lock, or held it when it died."""
    try:
        return holder_of(lock).read_text(errors="replace").split()
    except OSError:
        return []


@contextmanager
def lock_folder(path: Path, folder: Path) -> Iterator[str]:
    """Hold a folder for this study and yield its token.

    The system releases the lock when the process ends, however it ends.  On file systems without
    locks there is a file in its place, which a study that died on another machine leaves behind.
    """
    lock = _acquire(path, folder)
    try:
        with named_holder(path) as token:
            yield token
    finally:
        lock.release()


@contextmanager
def named_holder(path: Path) -> Iterator[str]:
    """Write who holds a folder, for its workers, and yield the token."""
    token = uuid.uuid4().hex
    write_text(holder_of(path), f"{token} {_host()} {os.getpid()}\n")
    try:
        yield token
    finally:
        with suppress(OSError):
            holder_of(path).unlink()


def _acquire(path: Path, folder: Path) -> BaseFileLock:
    """Return the lock of a folder, held; refuse a folder that another study holds."""
    from filelock import FileLock, SoftFileLock, Timeout

    found: BaseFileLock = FileLock(path)
    with writing(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FileLock says that it falls back to a file
        try:
            try:
                return _held(found)
            except (OSError, NotImplementedError) as error:
                unknown = isinstance(error, NotImplementedError) or error.errno in _NO_LOCKS
                if isinstance(error, Timeout) or not unknown:
                    raise
                # Another file: what FileLock has made of the first looks like a held one.
                found = SoftFileLock(path.with_name(f"{path.name}-soft"))
                return _held(found)
        except Timeout:
            pass
    holder = _holder(path)
    process = f"process {holder[2]}" if len(holder) == 3 else "another process"
    if len(holder) == 3 and holder[1] != _host():
        process += f" of {holder[1]}"
    left = f", or delete {found.lock_file} if that process is gone"
    soft = isinstance(found, SoftFileLock)
    raise ValueError(
        f"out must be a folder that no other study writes to, got {str(folder)!r}, which "
        f"{process} holds; wait for it or name another folder{left if soft else ''}"
    )


def _held(lock: BaseFileLock) -> BaseFileLock:
    # Old workers may look whether their study is alive: try for a second.
    lock.acquire(timeout=1.0, poll_interval=0.05)
    return lock


def _host() -> str:
    return re.sub(r"\s", "_", platform.node()) or "unknown"


def is_held(path: Path, token: str) -> bool:
    """Say whether the study that a worker belongs to still holds its folder.

    After a killed study its workers live on for a moment; they must not write beside the study
    that continues it.
    """
    holder = _holder(path)
    if len(holder) != 3 or holder[0] != token:
        return False
    # Processes of another machine are not seen here; then the token decides alone.
    return holder[1] != _host() or is_alive(int(holder[2]))
