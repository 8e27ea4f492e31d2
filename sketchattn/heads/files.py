"""Files of heads, read and written without loss, and the heads that are bundled.

A file holds the tensors ``q``, ``k`` and ``v`` of shape (heads, n, d) or (batch, heads, n, d),
optionally ``key_mask`` (heads, n_k), and the metadata ``scale`` (a number, or "1/sqrt(d)"),
``causal`` ("true", "false", "top-left" or "bottom-right"), ``heads`` (a JSON list with one entry a
head) and ``description``.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import Causal, check_scale, closest
from ..base.files import write_bytes
from ..problem import AttentionProblem
from .container import ENTRIES, TENSORS, Heads, check_stack
from .stored import joined, stored_heads
from .tensors import from_json, from_npz, from_safetensors, open_tensors

Array = NDArray[Any]

# name -> file in the folder data
BUNDLED = {"minilm": "minilm_n512.safetensors"}

_DEFAULT_SCALE = "1/sqrt(d)"
# Files that hold more than this together are read a head at a time.
WHOLE_BYTES = 1 << 26
# Heads are hardly wider; projections of several heads are.
WIDE = 256
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


def read_heads(path: str | PathLike[str] | Iterable[str | PathLike[str]]) -> Heads:
    """Read heads from ``.safetensors`` or ``.npz`` files.

    Parameters
    ----------
    path : str or path, or several of them
        A file, a folder (all files of heads in it, in the order of the numbers in their names), or
        a pattern with ``*``, ``?``, ``[...]`` or ``**``.  A file holds the tensors ``q`` (heads,
        n_q, d), ``k`` (heads, n_k, d) and ``v`` (heads, n_k, d_v) in float16, float32 or float64,
        or bfloat16 in ``.safetensors``, each perhaps with an axis of a batch in front; optionally
        a boolean ``key_mask`` (heads, n_k) or (batch, n_k); and metadata (arrays of no axis in
        ``.npz``): ``scale``, by default "1/sqrt(d)"; ``causal``, by default "false"; ``heads``, a
        JSON list; ``description``.

    Returns
    -------
    Heads
        In the precision of the file; bfloat16 is widened exactly to float32.  An entry of
        ``heads`` that is a string is the name of its head; any other is a name behind the name
        of the file: ``{"layer": 0, "head": 6}`` in ``minilm.npz`` is "minilm/layer0.head6", and
        "minilm/batch1.layer0.head6" in entry 1 of a batch.  Names that several files share get the
        names of the files, and where these are alike of their folders, in front.

        Heads of several files may differ in shape, scale and causality: ``heads[i]`` is a problem
        as ever, and ``heads.n_k`` or ``heads.q`` refuse where heads differ.  Of more than 64 MB a
        head is read when ``heads[i]`` asks for it, and not kept.

    Raises
    ------
    TypeError, ValueError
        For a name with another ending, something that is not a file or cannot be read, a folder
        or pattern without a file of heads, missing or unknown tensors, and everything that
        `Heads` refuses.

    Warns
    -----
    RuntimeWarning
        For heads wider than 256 in a file that does not name its heads: q, k and v may be
        projections, which `Heads.from_projections` splits.

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
    sources = find_files(path)
    large = sum(map(_content_bytes, sources)) > WHOLE_BYTES
    parts = [(str(x), _read_lazily(x) if large else _read_file(x)) for x in sources]
    return parts[0][1] if len(parts) == 1 else joined(parts)


def find_files(path: object) -> list[Path]:
    """Return the files of heads that a path, a folder, a pattern or several of these name."""
    if isinstance(path, Iterable) and not isinstance(path, str):
        given = list(path)
        if not given:
            raise ValueError("path must name at least one file, got an empty list; give some")
        every = [source for item in given for source in find_files(item)]
        return list({os.path.realpath(source): source for source in every}.values())
    if not isinstance(path, str | PathLike):
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}; name a file")
    source = Path(os.path.expanduser(path))
    if source.is_dir():
        listed = [source / name for name in os.listdir(source) if not name.startswith(".")]
        found = _files_of_heads(listed)
        if not found:
            raise ValueError(
                f"path must be a folder with {' or '.join(_READERS)} files, got {str(source)!r}, "
                f"which holds none; check its name"
            )
        return found
    if is_pattern(source):
        import glob

        found = _files_of_heads(map(Path, glob.glob(str(source), recursive=True)))
        if not found:
            raise ValueError(
                f"path must match a {' or '.join(_READERS)} file, got the pattern "
                f"{str(source)!r}, which matches none; check its folder and name"
            )
        return found
    source = _check_path(source)
    if not source.is_file():
        raise ValueError(
            f"path must be an existing file, got {str(source)!r}; check its folder and name"
        )
    return [source]


def is_pattern(path: Path) -> bool:
    """Say whether a path that is nothing itself may match others."""
    return any(sign in str(path) for sign in "*?[") and not path.exists()


def _files_of_heads(paths: Iterable[Path]) -> list[Path]:
    """Return the files of heads among paths, layer2 before layer10."""

    def order(path: Path) -> list[tuple[int, int, str]]:
        parts = re.split(r"(\d+)", str(path))
        return [(1, int(x), x) if x.isdecimal() else (0, 0, x) for x in parts]

    return sorted((x for x in paths if x.suffix in _READERS and x.is_file()), key=order)


def _content_bytes(source: Path) -> int:
    """Return how many bytes the tensors of a file take once they are unpacked."""
    if source.suffix == ".npz":
        try:
            with zipfile.ZipFile(source) as archive:
                return sum(info.file_size for info in archive.infolist())
        except (OSError, ValueError, zipfile.BadZipFile):
            pass  # which reading it says better
    return source.stat().st_size


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
        if not source.suffix and not source.exists():
            raise FileNotFoundError(
                f"path must be a file of heads or a folder of them, got {str(source)!r}, which "
                f"does not exist; check it"
            )
        raise ValueError(
            f"path must end in {' or '.join(_READERS)}, got {str(source)!r}; "
            f"choose one of these formats"
        )
    return source


def _read_file(source: Path) -> Heads:
    return _read(source.read_bytes(), source, source.stem)


def _read(raw: bytes, source: Path, stem: str) -> Heads:
    with _naming(source):
        if raw.startswith(_POINTER):
            raise ValueError(
                "the file must hold the heads themselves, got a pointer of Git LFS to them; "
                "fetch it with: git lfs pull"
            )
        tensors, entries = _READERS[source.suffix](raw)
        arrays, options = _decode(tensors, entries, stem)
        return Heads(*arrays, **options)


def _read_lazily(source: Path) -> Heads:
    """Return the heads of a file, each of which is read when it is asked for."""
    with _naming(source):
        tensors, entries = open_tensors(source)
        # Arrays of these shapes that take no memory.
        shapes = {
            name: x.read() if name == "key_mask" else np.broadcast_to(x.dtype.type(0), x.shape)
            for name, x in tensors.items()
        }
        arrays, options = _decode(shapes, entries, source.stem)
        _, fields = check_stack(*arrays, **options)
        return stored_heads((tensors["q"], tensors["k"], tensors["v"]), fields)


@contextmanager
def _naming(source: Path) -> Iterator[None]:
    """Put the name of a file before what is wrong with it."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{source.name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from error


def _decode(
    tensors: dict[str, Array], entries: dict[str, str], stem: str
) -> tuple[list[Array], dict[str, Any]]:
    """Return q, k and v (heads, n, d), and the options of `Heads` that a file states."""
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
    arrays, mask = [tensors[name] for name in TENSORS], tensors.get("key_mask")
    batch = 0
    if all(x.ndim == 4 for x in arrays):
        batch, heads = arrays[0].shape[:2]
        for label, x in zip(TENSORS, arrays, strict=True):
            if x.shape[:2] != (batch, heads):
                raise ValueError(
                    f"{label} must have the batch and the heads of q, {(batch, heads)}, got "
                    f"{x.shape[:2]}; repeat shared keys and values for each head"
                )
        if mask is not None:
            mask = _mask_of_batch(mask, batch, heads, arrays[1].shape[2])
        arrays = [x.reshape(-1, *x.shape[2:]) for x in arrays]
    count = len(arrays[0]) if arrays[0].ndim else 0
    options = {
        "scale": scale,
        "causal": causal,
        "key_mask": mask,
        "names": _names(entries.get("heads"), stem, count, batch),
        "description": entries.get("description", ""),
        "metadata": {name: x for name, x in entries.items() if name not in ENTRIES},
    }
    if "heads" not in entries and arrays[0].ndim == 3 and arrays[0].shape[2] > WIDE:
        shape = tensors["q"].shape
        warnings.warn(
            f"q of shape {shape} is {count} head{'' if count == 1 else 's'} of width {shape[-1]}; "
            f"if it is the projections of several heads, split it with "
            f"sketchattn.Heads.from_projections(q, k, v, num_heads=...), and if not, name the "
            f"heads in the metadata ({stem})",
            RuntimeWarning,
            stacklevel=2,
        )
    return arrays, options


def _mask_of_batch(mask: Array, batch: int, heads: int, n_k: int) -> Array:
    """Return a mask (n_k,), (batch, n_k) or (batch, heads, n_k) for each head of a batch."""
    if mask.ndim == 2:
        mask = mask[:, None]
    try:
        return np.broadcast_to(mask, (batch, heads, n_k)).reshape(batch * heads, n_k)
    except ValueError:
        raise ValueError(
            f"key_mask must have shape {(n_k,)}, {(batch, n_k)} or {(batch, heads, n_k)}, got "
            f"{mask.shape}; give one entry for each key"
        ) from None


def _names(text: str | None, stem: str, count: int, batch: int) -> list[str]:
    """Return a name for each of ``count`` heads from the JSON list of a file.

    The list may name the heads of one entry of a batch: all others then have the same.
    """
    heads = count // max(batch, 1)
    if text is None:
        listed: Any = list(range(heads if batch else count))
    else:
        listed = from_json(text)
        if not isinstance(listed, list):
            raise ValueError(
                f"heads must be a JSON list with one entry for each head, got {text!r}; "
                f"correct the metadata"
            )
    if batch and len(listed) == heads:
        return [_name(x, stem, f"batch{b}") for b in range(batch) for x in listed]
    return [_name(x, stem, "") for x in listed]


def _name(entry: Any, stem: str, where: str) -> str:
    """Return the name of a head from its entry in a file, and from where in the batch it is."""
    if isinstance(entry, str):
        return f"{entry}/{where}" if where else entry
    if isinstance(entry, dict):
        own = ".".join(f"{key}{value}" for key, value in entry.items())
    else:
        own = f"head{entry}"
    return f"{stem}/{where}.{own}" if where else f"{stem}/{own}"


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
    ".npz": from_npz,
}
_WRITERS: dict[str, Callable[[dict[str, Array], dict[str, str], dict[str, str]], bytes]] = {
    ".safetensors": _to_safetensors,
    ".npz": _to_npz,
}
