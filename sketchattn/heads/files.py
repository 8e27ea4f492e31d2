"""Files of heads, read and written without loss, and the heads that are bundled.

A file holds the tensors ``q``, ``k`` and ``v`` of shape (heads, n, d), optionally ``key_mask``
(heads, n_k), and the metadata ``scale`` (a number, or "1/sqrt(d)"), ``causal`` ("true", "false",
"top-left" or "bottom-right"), ``heads`` (a JSON list with one entry a head) and ``description``.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import Causal, check_scale, closest
from ..base.files import parse_safetensors, write_bytes
from ..problem import AttentionProblem
from .container import ENTRIES, TENSORS, Heads

Array = NDArray[Any]

# name -> file in the folder data
BUNDLED = {"minilm": "minilm_n512.safetensors"}

_DEFAULT_SCALE = "1/sqrt(d)"
# What Git leaves in place of a large file that was not fetched.
_POINTER = b"version https://git-lfs.github.com/spec/"


def load_heads(name: str = "minilm") -> Heads:
    """Return a bundled set of real heads.

    Parameters
    ----------
    name : {"minilm"}
        "minilm": all-MiniLM-L6-v2, two heads of each of its six layers, n = 512, d = 32, float16,
        on the text of the GNU GPL v3; the folder of the data holds attribution and licence.

    Returns
    -------
    Heads

    Raises
    ------
    ValueError
        For a name that is not bundled.

    Examples
    --------
    >>> import sketchattn as sa
    >>> heads = sa.load_heads("minilm")
    >>> len(heads), heads.names[1]
    (12, 'minilm/layer0.head6')
    """
    if not isinstance(name, str):
        raise TypeError(
            f"name must be a string, got {type(name).__name__}; choose one of "
            f"{', '.join(sorted(BUNDLED))}"
        )
    if name not in BUNDLED:
        hint = ", or read_heads for a file" if Path(name).suffix in _READERS else ""
        raise ValueError(
            f"name must be a bundled set of heads, got {name!r}{closest(name, BUNDLED)}{hint}"
        )
    # The package may lie in an archive.
    source = importlib.resources.files(__package__) / "data" / BUNDLED[name]
    return _read(source.read_bytes(), Path(BUNDLED[name]), name)


def read_heads(path: str | PathLike[str]) -> Heads:
    """Read heads from a ``.safetensors`` or ``.npz`` file.

    Parameters
    ----------
    path : str or path
        The file holds the tensors ``q`` (heads, n_q, d), ``k`` (heads, n_k, d) and ``v``
        (heads, n_k, d_v) in float16, float32 or float64, or bfloat16 in ``.safetensors``,
        optionally a boolean ``key_mask`` (heads, n_k), and metadata (arrays of no axis in
        ``.npz``): ``scale``, by default "1/sqrt(d)"; ``causal``, by default "false"; ``heads``,
        a JSON list; ``description``.

    Returns
    -------
    Heads
        In the precision of the file; bfloat16 is widened exactly to float32.  An entry of
        ``heads`` that is a string is the name of its head; any other is a name behind the name
        of the file: ``{"layer": 0, "head": 6}`` in ``minilm.npz`` is "minilm/layer0.head6".

    Raises
    ------
    TypeError, ValueError
        For a name with another ending, something that is not a file or cannot be read, missing
        or unknown tensors, and everything that `Heads` refuses.

    Examples
    --------
    >>> import os, tempfile
    >>> import sketchattn as sa
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "heads.npz")
    ...     sa.write_heads(path, sa.make_heads("peaked", n=16, d=4, heads=2, rng=0))
    ...     sa.read_heads(path).names
    ('peaked/head0', 'peaked/head1')
    """
    source = _check_path(path)
    if not source.is_file():
        raise ValueError(
            f"path must be an existing file, got {str(source)!r}; check its folder and name"
        )
    raw = source.read_bytes()
    return _read(raw, source, source.stem)


def write_heads(
    path: str | PathLike[str], heads: Heads | AttentionProblem | Iterable[AttentionProblem]
) -> None:
    """Write heads to a ``.safetensors`` or ``.npz`` file that `read_heads` reads without loss.

    Parameters
    ----------
    path : str or path
        A file that exists is replaced in one step.
    heads : Heads, AttentionProblem or iterable of AttentionProblem
        Heads keep their precision; problems (of one shape, see `Heads.from_problems`) are
        written in the one they are computed in.

    Raises
    ------
    TypeError
        For anything that is not heads.
    ValueError
        For a name with another ending, a folder that does not exist, problems that differ, and
        problems without values.

    Examples
    --------
    >>> import os, tempfile
    >>> import sketchattn as sa
    >>> heads = sa.load_heads("minilm")[:2]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "two.safetensors")
    ...     sa.write_heads(path, heads)
    ...     sa.read_heads(path).dtype
    dtype('float16')
    """
    target = check_target(path)
    if not isinstance(heads, Heads):
        heads = Heads.from_problems(heads)
    tensors = {"q": heads.q, "k": heads.k, "v": heads.v}
    if heads.key_mask is not None:
        tensors["key_mask"] = heads.key_mask
    entries = {
        "scale": _DEFAULT_SCALE if heads.scale == check_scale(None, heads.d) else repr(heads.scale),
        "causal": str(heads.causal).lower(),
        "heads": json.dumps(heads.names),
        "description": heads.description,
    }
    write_bytes(target, _WRITERS[target.suffix](tensors, entries, dict(heads.metadata)))


def check_target(path: object) -> Path:
    """Return the path of a file of heads that can be written."""
    target = _check_path(path)
    if not target.parent.is_dir():
        raise ValueError(
            f"path must be in an existing folder, got {str(target)!r}; make the folder first"
        )
    if target.is_dir():
        raise ValueError(f"path must be a file, got the folder {str(target)!r}; add a file name")
    return target


def _check_path(path: object) -> Path:
    if not isinstance(path, str | PathLike):
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}; name a file")
    source = Path(os.path.expanduser(path))
    if source.suffix not in _READERS:
        raise ValueError(
            f"path must end in {' or '.join(_READERS)}, got {str(source)!r}; "
            f"choose one of these formats"
        )
    return source


def _read(raw: bytes, source: Path, stem: str) -> Heads:
    try:
        if raw.startswith(_POINTER):
            raise ValueError(
                "the file must hold the heads themselves, got a pointer of Git LFS to them; "
                "fetch it with: git lfs pull"
            )
        tensors, entries = _READERS[source.suffix](raw)
        return _decode(tensors, entries, stem)
    except TypeError as error:
        raise TypeError(f"{source.name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from error


def _unreadable(error: Exception, kind: str) -> ValueError:
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return ValueError(
        f"the file must be a whole {kind} file, got bytes that are not ({reason}); "
        f"write it again with write_heads"
    )


def from_safetensors(raw: bytes) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the tensors of a ``.safetensors`` file and its metadata; bfloat16 as float32."""
    from safetensors import SafetensorError

    try:
        tensors, kinds, metadata = parse_safetensors(raw)
    except SafetensorError as error:
        raise _unreadable(error, ".safetensors") from error
    for name, kind in kinds.items():
        if kind not in ("F16", "BF16", "F32", "F64", "BOOL"):
            raise TypeError(
                f"{name} must be stored as F16, BF16, F32 or F64 (key_mask as BOOL), got {kind}; "
                f"convert it first"
            )
    return tensors, metadata


def _from_npz(raw: bytes) -> tuple[dict[str, Array], dict[str, str]]:
    try:
        with zipfile.ZipFile(BytesIO(raw)):
            pass
        with np.load(BytesIO(raw), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (
        EOFError,
        KeyError,
        OSError,
        RuntimeError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise _unreadable(error, ".npz") from error
    for name, x in arrays.items():
        refuse_nameless(x, name)
    named = {*TENSORS, "key_mask"}
    tensors = {name: x for name, x in arrays.items() if name in named or np.ndim(x)}
    entries: dict[str, str] = {}
    for name, x in arrays.items():
        if name not in tensors:
            item = x.item()
            entries[name] = item.decode(errors="replace") if isinstance(item, bytes) else str(item)
    if "heads" in tensors and tensors["heads"].dtype.kind == "U" and tensors["heads"].ndim == 1:
        entries["heads"] = json.dumps(tensors.pop("heads").tolist())
    text = entries.pop("metadata", "{}")
    free = _from_json(text)
    if not isinstance(free, dict):
        raise ValueError(f"metadata must be a JSON object, got {text!r}; correct the file")
    return tensors, {name: str(x) for name, x in free.items()} | entries


def refuse_nameless(x: object, name: str) -> None:
    """Refuse numbers of a type that NumPy's files have no name for, such as bfloat16."""
    # What an archive holds beside arrays comes as bytes.
    if isinstance(x, np.ndarray) and x.dtype.kind == "V" and x.dtype.names is None:
        raise TypeError(
            f"{name} must be stored as float16, float32 or float64, got {x.dtype.itemsize} bytes "
            f"a number of an unnamed type, as NumPy writes bfloat16; store it as float32, or as "
            f"BF16 in .safetensors"
        )


def _from_json(text: str) -> object:
    """Return what a JSON text stands for, None for other text."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _decode(tensors: dict[str, Array], entries: dict[str, str], stem: str) -> Heads:
    missing = [name for name in TENSORS if name not in tensors]
    if missing:
        raise ValueError(
            f"the file must hold the tensors q, k and v, got {', '.join(sorted(tensors)) or 'none'}"
            f"; add {', '.join(missing)}"
        )
    foreign = sorted(set(tensors) - {*TENSORS, "key_mask"})
    if foreign:  # ignoring a mask or bias of another name would be another problem
        raise ValueError(
            f"the file must hold no tensors but q, k, v and key_mask, got also "
            f"{', '.join(foreign)}; remove it or rename a mask of keys to key_mask"
        )
    text = entries.get("scale", _DEFAULT_SCALE)
    try:
        scale = None if text == _DEFAULT_SCALE else float(text)
    except ValueError as error:
        raise ValueError(
            f"scale must be a number or {_DEFAULT_SCALE!r}, got {text!r}; correct the metadata"
        ) from error
    order = entries.get("causal", "false")
    causal: Causal = {"true": True, "false": False}.get(order.lower(), order)
    return Heads(
        tensors["q"],
        tensors["k"],
        tensors["v"],
        scale=scale,
        causal=causal,
        key_mask=tensors.get("key_mask"),
        names=_names(entries.get("heads"), stem, len(tensors["q"]) if tensors["q"].ndim else 0),
        description=entries.get("description", ""),
        metadata={name: x for name, x in entries.items() if name not in ENTRIES},
    )


def _names(text: str | None, stem: str, count: int) -> list[str]:
    """Return a name for each head from the JSON list of a file."""
    if text is None:
        return [f"{stem}/head{i}" for i in range(count)]
    listed = _from_json(text)
    if not isinstance(listed, list):
        raise ValueError(
            f"heads must be a JSON list with one entry for each head, got {text!r}; "
            f"correct the metadata"
        )
    names = []
    for entry in listed:
        if isinstance(entry, str):
            names.append(entry)
        elif isinstance(entry, dict):
            names.append(f"{stem}/{'.'.join(f'{key}{value}' for key, value in entry.items())}")
        else:
            names.append(f"{stem}/head{entry}")
    return names


def _to_safetensors(
    tensors: dict[str, Array], entries: dict[str, str], metadata: dict[str, str]
) -> bytes:
    from safetensors.numpy import save

    # The format writes memory as it lies.
    whole = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    return save(whole, metadata={**metadata, **entries})


def _to_npz(tensors: dict[str, Array], entries: dict[str, str], metadata: dict[str, str]) -> bytes:
    buffer = BytesIO()
    # Free names could be those of tensors, so they share one entry.
    texts = {**entries, "metadata": json.dumps(metadata)}
    arrays: dict[str, Any] = {**tensors, **{name: np.array(x) for name, x in texts.items()}}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


_READERS: dict[str, Callable[[bytes], tuple[dict[str, Array], dict[str, str]]]] = {
    ".safetensors": from_safetensors,
    ".npz": _from_npz,
}
_WRITERS: dict[str, Callable[[dict[str, Array], dict[str, str], dict[str, str]], bytes]] = {
    ".safetensors": _to_safetensors,
    ".npz": _to_npz,
}
