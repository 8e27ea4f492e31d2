"""Tensors in ``.safetensors`` and ``.npz`` files: read whole, or a head at a time."""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.files import KINDS, parse_safetensors
from .container import TENSORS

Array = NDArray[Any]

# What readers of damaged archives raise.
_DAMAGED = (
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


# --- whole files --------------------------------------------------------------------------------


def from_safetensors(raw: bytes) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the tensors of a ``.safetensors`` file and its metadata; bfloat16 as float32."""
    from safetensors import SafetensorError

    try:
        tensors, kinds, metadata = parse_safetensors(raw)
    except SafetensorError as error:
        raise unreadable(error, ".safetensors") from error
    for name, kind in kinds.items():
        _check_kind(name, kind)
    return tensors, metadata


def from_npz(raw: bytes) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the arrays of an ``.npz`` file and its metadata."""
    try:
        with zipfile.ZipFile(BytesIO(raw)):
            pass
        with np.load(BytesIO(raw), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except _DAMAGED as error:
        raise unreadable(error, ".npz") from error
    for name, x in arrays.items():
        refuse_nameless(x, name)
    named = {*TENSORS, "key_mask"}
    tensors = {name: x for name, x in arrays.items() if name in named or np.ndim(x)}
    small = {name: x for name, x in arrays.items() if name not in tensors}
    if "heads" in tensors and tensors["heads"].dtype.kind == "U" and tensors["heads"].ndim == 1:
        small["heads"] = tensors.pop("heads")
    return tensors, _entries(small)


def _entries(arrays: dict[str, Array]) -> dict[str, str]:
    """Return metadata from arrays of no axis, and names of heads from one of one axis."""
    entries: dict[str, str] = {}
    for name, x in arrays.items():
        if x.ndim:
            entries[name] = json.dumps(x.tolist())
            continue
        item = x.item()
        entries[name] = item.decode(errors="replace") if isinstance(item, bytes) else str(item)
    text = entries.pop("metadata", "{}")
    free = from_json(text)
    if not isinstance(free, dict):
        raise ValueError(f"metadata must be a JSON object, got {text!r}; correct the file")
    return {name: str(x) for name, x in free.items()} | entries


def refuse_nameless(x: object, name: str) -> None:
    """Refuse numbers of a type that NumPy's files have no name for, such as bfloat16."""
    # What an archive holds beside arrays comes as bytes.
    if isinstance(x, np.ndarray) and x.dtype.kind == "V" and x.dtype.names is None:
        raise TypeError(
            f"{name} must be stored as float16, float32 or float64, got {x.dtype.itemsize} bytes "
            f"a number of an unnamed type, as NumPy writes bfloat16; store it as float32, or as "
            f"BF16 in .safetensors"
        )


def from_json(text: str) -> object:
    """Return what a JSON text stands for, None for other text."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def unreadable(error: Exception, kind: str) -> ValueError:
    """Return the refusal of a file that is damaged or of another kind."""
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return ValueError(
        f"the file must be a whole {kind} file, got bytes that are not ({reason}); "
        f"write it again with write_heads"
    )


# --- a head at a time ---------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """Say where a tensor lies: at ``offset`` of a file, or in a member of an archive."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    bfloat16: bool = False
    member: str = ""
    fortran: bool = False

    def read(self, head: int | None = None) -> Array:
        """Return the tensor whole, or the matrix of one head counted over all axes but two."""
        if self.fortran:
            whole = self._numbers(0, prod(self.shape)).reshape(self.shape, order="F")
            return whole if head is None else whole.reshape(-1, *self.shape[-2:])[head]
        shape = self.shape if head is None else self.shape[-2:]
        count = prod(shape)
        return self._numbers((head or 0) * count, count).reshape(shape)

    def _numbers(self, first: int, count: int) -> Array:
        kind = np.dtype("<u2") if self.bfloat16 else self.dtype
        start, wanted = self.offset + first * kind.itemsize, count * kind.itemsize
        if self.member:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as member:
                member.seek(start)
                raw = member.read(wanted)
        else:
            with self.path.open("rb") as file:
                file.seek(start)
                raw = file.read(wanted)
        if len(raw) != wanted:
            raise ValueError(
                f"{self.name} must be whole in its file, got {len(raw)} of {wanted} bytes; write "
                f"it again"
            )
        x = np.frombuffer(raw, kind)
        # bfloat16 is the upper half of a float32.
        return (x.astype(np.uint32) << 16).view(np.float32) if self.bfloat16 else x


def _check_kind(name: str, kind: str) -> None:
    """Refuse kinds of numbers of a ``.safetensors`` file that heads are not made of."""
    if kind not in ("F16", "BF16", "F32", "F64", "BOOL"):
        raise TypeError(
            f"{name} must be stored as F16, BF16, F32 or F64 (key_mask as BOOL), got {kind}; "
            f"convert it first"
        )


def open_tensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return where the tensors of a file lie, and its metadata; no tensor is read."""
    return (_open_safetensors if path.suffix == ".safetensors" else _open_npz)(path)


def _open_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):  # checks the header against the file
            pass
    except SafetensorError as error:
        raise unreadable(error, ".safetensors") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = dict(header.pop("__metadata__", None) or {})
    tensors = {}
    for name, entry in header.items():
        kind = entry["dtype"]
        _check_kind(name, kind)
        wide = np.dtype(np.float32) if kind == "BF16" else np.dtype(KINDS[kind])
        start = 8 + length + entry["data_offsets"][0]
        shape = tuple(entry["shape"])
        tensors[name] = StoredTensor(path, name, shape, wide, start, bfloat16=kind == "BF16")
    return tensors, metadata


def _open_npz(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    tensors: dict[str, StoredTensor] = {}
    small: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                with archive.open(info) as member:
                    version = np.lib.format.read_magic(member)
                    reader = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }[version]
                    shape, fortran, dtype = reader(member)
                    offset = member.tell()
                if dtype.hasobject:
                    raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
                tensor = StoredTensor(
                    path, name, shape, dtype, offset, member=info.filename, fortran=fortran
                )
                named = name in (*TENSORS, "key_mask")
                text = name == "heads" and len(shape) == 1 and dtype.kind == "U"
                if named or (shape and not text):
                    tensors[name] = tensor
                else:
                    small[name] = tensor.read()
    except _DAMAGED as error:
        raise unreadable(error, ".npz") from error
    for name, tensor in tensors.items():
        refuse_nameless(np.empty(0, tensor.dtype), name)
    return tensors, _entries(small)
