"""Files are written to a temporary name in the same folder and renamed: all of it, or none."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# What to do about an error of the file system.
_REMEDIES = {
    errno.ENOSPC: "free some space and start again",
    errno.EDQUOT: "free some space and start again",
    errno.EFBIG: "free some space and start again",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder that can be written to",
    errno.EPERM: "choose a folder that can be written to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "make its folder first",
    errno.EISDIR: "choose another name",
    errno.ENOTDIR: "choose another folder",
    errno.EEXIST: "choose another folder",
}


# What the temporary name of a file begins with.
UNFINISHED = ".new-"


@contextmanager
def writing(path: str | PathLike[str]) -> Iterator[None]:
    """Say in one line which file could not be written, why, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # it says so already
            raise
        reason = error.strerror or type(error).__name__
        remedy = _REMEDIES.get(error.errno, "look at its folder")
        raise type(error)(
            f"{os.fspath(path)} could not be written whole ({reason}); {remedy}"
        ) from error


def write_bytes(path: str | PathLike[str], data: bytes) -> None:
    """Replace the file ``path`` by ``data`` in one step; an interruption leaves the old file.

    A link stays one: what it points to is replaced.
    """
    with writing(path):
        target = Path(os.path.realpath(path) if os.path.islink(path) else path)
        # As short as any name may be, however long that of the file is.
        handle, temporary = tempfile.mkstemp(prefix=UNFINISHED, dir=target.parent)
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


def append_bytes(path: str | PathLike[str], data: bytes, *, sync: bool = False) -> None:
    """Append to a file in one write; what could not be written whole is taken back.

    With ``sync`` all that was written to the file so far survives a power cut.
    """
    with writing(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(handle).st_size
            try:
                if os.write(handle, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.ftruncate(handle, size)
                raise
            if sync:
                os.fsync(handle)
        finally:
            os.close(handle)


def make_folder(path: str | PathLike[str]) -> Path:
    """Return a folder that is there now, with the folders that it is in."""
    with writing(path):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def as_folder(out: Any) -> Path | None:
    """Return a path that is a folder or nothing yet; ``~`` is the home folder; refuse a file."""
    if out is None:
        return None
    if not isinstance(out, str | PathLike):
        raise TypeError(f"out must be a path, got {type(out).__name__}; name a folder")
    folder = Path(os.path.expanduser(out))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {str(folder)!r}; name another")
    return folder


# Neither JSON nor CSV has a word for numbers that are not finite that all readers share.
_SPELLED = ("inf", "-inf", "nan")


# Numbers of a .safetensors file that NumPy has a type for; BF16 is read by its bits.
KINDS = {
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2", "BOOL": "?",
    "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8",
    "U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8",
}  # fmt: skip


def parse_safetensors(raw: bytes) -> tuple[dict[str, Array], dict[str, str], dict[str, str]]:
    """Return the arrays of a ``.safetensors`` file, their kinds in its own words, and its metadata.

    Arrays are read-only.  BF16 is widened to float32, which is exact; kinds that are not in
    ``KINDS`` are left as bytes.  Raises ``safetensors.SafetensorError`` for other bytes.
    """
    from safetensors import deserialize

    parse: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = deserialize
    parsed = parse(raw)
    # The parser has checked the header: 8 bytes of length, then JSON.
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    arrays: dict[str, Array] = {}
    kinds: dict[str, str] = {}
    for name, tensor in parsed:
        kind = kinds[name] = str(tensor["dtype"])
        x = np.frombuffer(tensor["data"], KINDS.get(kind, "<u1"))
        if kind in KINDS:
            x = x.reshape(tensor["shape"])
        # bfloat16 is the upper half of a float32.
        arrays[name] = (x.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else x
    return arrays, kinds, dict(header.get("__metadata__") or {})


def encode(value: Any) -> Any:
    """Return a value for JSON: numbers that are not finite become "inf", "-inf" or "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def decode(value: Any) -> Any:
    """Return what `encode` was given."""
    return float(value) if value in _SPELLED else value
