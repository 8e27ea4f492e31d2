"""Attention heads: read, write and make (q, k, v) triples, and measure how hard they are.

A file holds the tensors ``q``, ``k`` and ``v`` of shape (heads, n, d), optionally ``key_mask``
(heads, n_k), and the metadata ``scale`` (a number, or "1/sqrt(d)"), ``causal`` ("true", "false",
"top-left" or "bottom-right"), ``heads`` (a JSON list with one entry a head) and ``description``.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .draws import Rng, as_generator
from .problem import (
    AttentionProblem,
    Causal,
    as_array,
    check_causal,
    check_finite,
    check_key_mask,
    check_same_dtype,
    check_scale,
    check_width,
    closest,
    float_dtype,
)

Array = NDArray[Any]
Triple = tuple[Array, Array, Array]

# name -> file in the folder data
BUNDLED = {"minilm": "minilm_n512.safetensors"}

_DATA = Path(__file__).parent / "data"
_TENSORS = ("q", "k", "v")
# What a file says about its tensors, beside free entries.
_ENTRIES = ("scale", "causal", "heads", "description")
_DEFAULT_SCALE = "1/sqrt(d)"
_LAYOUT = "(head, token, dim)"


class Heads(Sequence[AttentionProblem]):
    """Hold several heads of one shape, precision, scale and causality.

    ``heads[i]`` and ``heads["name"]`` are problems (made on first use and kept); slices and lists
    of numbers or names are heads again.

    Parameters
    ----------
    q : array of shape (heads, n_q, d)
        Queries; float16, float32 or float64, kept in this precision.  bfloat16 is widened
        exactly to float32.
    k : array of shape (heads, n_k, d)
        Keys, of the dtype of ``q``.
    v : array of shape (heads, n_k, d_v)
        Values, of the dtype of ``q``.
    scale : float, optional
        Factor of the logits of all heads; ``None`` is ``1/sqrt(d)``.
    causal : bool or {"top-left", "bottom-right"}, default False
        As for `AttentionProblem`, for all heads.
    key_mask : bool array of shape (heads, n_k) or (n_k,), optional
        True for the keys that exist; masked keys and values may be non-finite.
    names : sequence of str, optional
        Distinct names of the heads; by default head0, head1, ...
    description : str, default ""
        What the heads are.
    metadata : mapping from str to str, optional
        Anything else that a file should say, such as the model.

    Attributes
    ----------
    q, k, v : ndarray
        Read-only, in the precision given.
    key_mask : ndarray or None
        Read-only, (heads, n_k).
    scale, causal, names, description, metadata
        As validated.

    Raises
    ------
    TypeError
        For dtypes that are not floating point or differ, and masks that are not boolean.
    ValueError
        For shapes that do not fit, no head at all, repeated names, or non-finite visible entries.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> x = np.zeros((3, 5, 2), np.float16)
    >>> heads = sa.Heads(x, x, x, names=["a", "b", "c"])
    >>> heads["b"]
    AttentionProblem('b', n_q=5, n_k=5, d=2, d_v=2, dtype=float32, scale=0.707107, causal=False)
    >>> heads[1:].names, heads[["c", "a"]].names
    (('b', 'c'), ('c', 'a'))
    """

    q: Array
    k: Array
    v: Array
    key_mask: Array | None
    scale: float
    causal: Causal
    names: tuple[str, ...]
    description: str
    metadata: Mapping[str, str]
    _problems: dict[str, AttentionProblem]

    def __init__(
        self,
        q: object,
        k: object,
        v: object,
        *,
        scale: float | None = None,
        causal: Causal = False,
        key_mask: ArrayLike | None = None,
        names: Sequence[str] | None = None,
        description: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        arrays = [as_array(q, "q"), as_array(k, "k"), as_array(v, "v")]
        for label, x in zip(_TENSORS, arrays, strict=True):
            if x.ndim != 3:
                raise ValueError(
                    f"{label} must have three axes (heads, tokens, width), got shape {x.shape}; "
                    f"one head is {label}[None]"
                )
            float_dtype(x, label)
        check_same_dtype(*arrays)
        count, n_q, d = arrays[0].shape
        if count < 1:
            raise ValueError("q must hold at least one head, got 0; give heads or pick others")
        for label, x in zip("kv", arrays[1:], strict=True):
            if x.shape[0] != count:
                raise ValueError(
                    f"{label} must have the {count} heads of q, got {x.shape[0]}; "
                    f"repeat shared keys and values for each head"
                )
        check_width(*arrays)
        n_k = arrays[1].shape[1]
        factor = check_scale(scale, d)
        order = check_causal(causal, n_q, n_k)
        mask = None
        if key_mask is not None:
            checked = check_key_mask(key_mask, (count,), n_k)
            mask = np.array(np.broadcast_to(checked, (count, n_k)), order="C")
        labels = _check_names(names, count)
        extra = _check_metadata(description, metadata)
        wide = np.dtype(np.float32) if arrays[0].dtype.name == "bfloat16" else arrays[0].dtype
        owned = [np.array(x, dtype=wide.newbyteorder("="), order="C") for x in arrays]
        for label, x in zip(_TENSORS, owned, strict=True):
            hidden = None if label == "q" or mask is None else ~mask
            check_finite(x if hidden is None else np.where(hidden[:, :, None], 0, x), label)
        self._fill(
            q=owned[0],
            k=owned[1],
            v=owned[2],
            key_mask=mask,
            scale=factor,
            causal=order,
            names=labels,
            description=description,
            metadata=extra,
            _problems={},
        )

    def _fill(self, **fields: Any) -> None:
        for x in fields.values():
            if isinstance(x, np.ndarray):
                x.flags.writeable = False
        self.__dict__.update(fields)

    @classmethod
    def from_problems(
        cls, problems: AttentionProblem | Iterable[AttentionProblem], description: str = ""
    ) -> Heads:
        """Stack problems that share shape, precision, scale and causality.

        Parameters
        ----------
        problems : AttentionProblem or iterable of AttentionProblem
            At least one, all with values.  A problem without a name is called head0, head1, ...
            by its position.
        description : str, default ""
            What the heads are.

        Raises
        ------
        TypeError
            For anything that is not a problem.
        ValueError
            For no problem, a problem without values, or problems that differ.

        Examples
        --------
        >>> import sketchattn as sa
        >>> made = sa.make_heads("gaussian", n=8, d=4, heads=2, rng=0)
        >>> sa.Heads.from_problems([made[1], made[0]]).names
        ('gaussian/head1', 'gaussian/head0')
        """
        if not isinstance(problems, Iterable):
            problems = [problems]
        stack = [problems] if isinstance(problems, AttentionProblem) else list(problems)
        for problem in stack:
            if not isinstance(problem, AttentionProblem):
                raise TypeError(
                    f"problems must be AttentionProblem objects, got {type(problem).__name__}; "
                    f"make each with AttentionProblem(q, k, v)"
                )
        if not stack:
            raise ValueError("problems must hold at least one problem, got 0; give some")
        for i, problem in enumerate(stack):
            if problem.v is None:
                raise ValueError(
                    f"problems must have values, got v=None in problem {i}; "
                    f"make the problem with its values"
                )
            for what, first, this in zip(
                ("(n_q, n_k, d, d_v)", "dtype", "scale", "causal"),
                _signature(stack[0]),
                _signature(problem),
                strict=True,
            ):
                if this != first:
                    raise ValueError(
                        f"problems must share {what}, got {first} in problem 0 and {this} in "
                        f"problem {i}; use one set of heads for each"
                    )
        mask = None
        if any(p.key_mask is not None for p in stack):
            mask = np.stack(
                [np.ones(p.n_k, bool) if p.key_mask is None else p.key_mask for p in stack]
            )
        return cls(
            np.stack([p.q for p in stack]),
            np.stack([p.k for p in stack]),
            np.stack([p.values for p in stack]),
            scale=stack[0].scale,
            causal=stack[0].causal,
            key_mask=mask,
            names=[f"head{i}" if p.name is None else p.name for i, p in enumerate(stack)],
            description=description,
        )

    @property
    def n_q(self) -> int:
        """Number of queries of each head."""
        return int(self.q.shape[1])

    @property
    def n_k(self) -> int:
        """Number of keys of each head, masked ones included."""
        return int(self.k.shape[1])

    @property
    def d(self) -> int:
        """Width of queries and keys."""
        return int(self.q.shape[2])

    @property
    def d_v(self) -> int:
        """Width of the values."""
        return int(self.v.shape[2])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Precision that the arrays are kept in; halves are computed in float32."""
        return self.q.dtype

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int | np.integer[Any] | str) -> AttentionProblem: ...
    @overload
    def __getitem__(
        self,
        index: slice
        | range
        | list[int]
        | list[str]
        | tuple[int | str, ...]
        | NDArray[np.integer[Any]],
    ) -> Heads: ...
    def __getitem__(self, index: Any) -> AttentionProblem | Heads:
        if isinstance(index, slice):
            return self._take(list(range(len(self)))[index])
        if isinstance(index, list | tuple | range) or (
            isinstance(index, np.ndarray) and index.ndim == 1
        ):
            return self._take([self._position(i) for i in index])
        i = self._position(index)
        name = self.names[i]
        if name not in self._problems:
            made = AttentionProblem(
                self.q[i],
                self.k[i],
                self.v[i],
                scale=self.scale,
                causal=self.causal,
                key_mask=None if self.key_mask is None else self.key_mask[i],
                name=name,
            )
            self._problems.setdefault(name, made)
        return self._problems[name]

    def __contains__(self, item: object) -> bool:
        if isinstance(item, str):
            return item in self.names
        if not isinstance(item, AttentionProblem) or item.name not in self.names:
            return False
        return self._problems.get(item.name) is item

    def _position(self, index: object) -> int:
        if isinstance(index, str):
            if index not in self.names:
                raise ValueError(
                    f"heads must be picked by one of their names, got {index!r}"
                    f"{closest(index, self.names)}"
                )
            return self.names.index(index)
        if isinstance(index, bool | np.bool_) or not hasattr(index, "__index__"):
            raise TypeError(
                f"heads must be picked by numbers, names, a list of these or a slice, got "
                f"{type(index).__name__}; use heads[0] or heads[{self.names[0]!r}]"
            )
        i = operator.index(index)
        if not -len(self) <= i < len(self):
            raise IndexError(
                f"head number must be in {-len(self)}..{len(self) - 1}, got {i}; "
                f"there are {len(self)} heads"
            )
        return i % len(self)

    def _take(self, chosen: list[int]) -> Heads:
        if not chosen:
            raise ValueError(
                f"a choice of heads must not be empty, got no head; pick from {len(self)}"
            )
        names = _check_names([self.names[i] for i in chosen], len(chosen))
        part = object.__new__(Heads)
        # The arrays are valid and read-only already; problems are shared by name.
        part._fill(
            **{
                **self.__dict__,
                "q": self.q[chosen],
                "k": self.k[chosen],
                "v": self.v[chosen],
                "key_mask": None if self.key_mask is None else self.key_mask[chosen],
                "names": names,
            }
        )
        return part

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} of Heads cannot be changed; make other Heads")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name} of Heads cannot be deleted")

    def __reduce__(self) -> tuple[Any, ...]:
        options = {name: self.__dict__[name] for name in ("scale", "causal", "key_mask", "names")}
        options |= {"description": self.description, "metadata": dict(self.metadata)}
        return _rebuild, ((self.q, self.k, self.v), options)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.names[:2]))
        shown += ", ..." if len(self) > 2 else ""
        masked = "" if self.key_mask is None else ", key_mask=..."
        return (
            f"Heads([{shown}], heads={len(self)}, n_q={self.n_q}, n_k={self.n_k}, d={self.d}, "
            f"d_v={self.d_v}, dtype={self.dtype}, scale={self.scale:.6g}, "
            f"causal={self.causal!r}{masked})"
        )


def _rebuild(arrays: Triple, options: dict[str, Any]) -> Heads:
    return Heads(*arrays, **options)


def _signature(problem: AttentionProblem) -> tuple[object, ...]:
    shape = (problem.n_q, problem.n_k, problem.d, problem.d_v)
    return shape, problem.dtype, problem.scale, problem.causal


def _check_names(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"head{i}" for i in range(count))
    if not isinstance(names, str) and isinstance(names, Iterable):
        names = tuple(names)
    if not isinstance(names, tuple) or not all(isinstance(x, str) and x for x in names):
        raise TypeError(
            f"names must be a sequence of strings that are not empty, got {names!r}; "
            f"give one for each head"
        )
    if len(names) != count:
        raise ValueError(
            f"names must have one entry for each of the {count} heads, got {len(names)}; "
            f"give one for each head"
        )
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(
                f"names must be distinct, got {name!r} more than once; name each head differently"
            )
        seen.add(name)
    return names


def _check_metadata(description: object, metadata: object) -> Mapping[str, str]:
    if not isinstance(description, str):
        raise TypeError(
            f"description must be a string, got {type(description).__name__}; use str(...)"
        )
    if metadata is None:
        return MappingProxyType({})
    if not isinstance(metadata, Mapping) or not all(
        isinstance(x, str) for pair in metadata.items() for x in pair
    ):
        raise TypeError(
            f"metadata must map strings to strings, got {metadata!r}; convert with str(...)"
        )
    for name in _ENTRIES:
        if name in metadata:
            raise ValueError(
                f"metadata must not hold the entries {', '.join(_ENTRIES)}, got {name!r}; "
                f"use the argument of that name"
            )
    layout = metadata.get("layout", _LAYOUT)
    if layout != _LAYOUT:
        raise ValueError(f"layout must be {_LAYOUT!r}, got {layout!r}; transpose q, k and v")
    return MappingProxyType(dict(metadata))


# --- files --------------------------------------------------------------------------------------


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
    return _read(_DATA / BUNDLED[name], name)


def read_heads(path: str | PathLike[str]) -> Heads:
    """Read heads from a ``.safetensors`` or ``.npz`` file.

    Parameters
    ----------
    path : str or path
        The file holds the tensors ``q`` (heads, n_q, d), ``k`` (heads, n_k, d) and ``v``
        (heads, n_k, d_v) in float16, bfloat16, float32 or float64, optionally a boolean
        ``key_mask`` (heads, n_k), and metadata (arrays of no axis in ``.npz``): ``scale``, by
        default "1/sqrt(d)"; ``causal``, by default "false"; ``heads``, a JSON list;
        ``description``.

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
    return _read(source, source.stem)


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
    from ._files import write_bytes

    target = _check_path(path)
    if not target.parent.is_dir():
        raise ValueError(
            f"path must be in an existing folder, got {str(target)!r}; make the folder first"
        )
    if target.is_dir():
        raise ValueError(f"path must be a file, got the folder {str(target)!r}; add a file name")
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


def _check_path(path: object) -> Path:
    if not isinstance(path, str | PathLike):
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}; name a file")
    source = Path(path)
    if source.suffix not in _READERS:
        raise ValueError(
            f"path must end in {' or '.join(_READERS)}, got {str(source)!r}; "
            f"choose one of these formats"
        )
    return source


def _read(source: Path, stem: str) -> Heads:
    raw = source.read_bytes()
    try:
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


def _from_safetensors(raw: bytes) -> tuple[dict[str, Array], dict[str, str]]:
    from safetensors import SafetensorError, deserialize

    parse: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = deserialize
    try:
        parsed = parse(raw)
    except SafetensorError as error:
        raise _unreadable(error, ".safetensors") from error
    # The parser has checked the header: 8 bytes of length, then JSON.
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    stored = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?", "BF16": "<u2"}
    tensors: dict[str, Array] = {}
    for name, tensor in parsed:
        kind = tensor["dtype"]
        if kind not in stored:
            raise TypeError(
                f"{name} must be stored as F16, BF16, F32 or F64 (key_mask as BOOL), got {kind}; "
                f"convert it first"
            )
        x = np.frombuffer(tensor["data"], stored[kind]).reshape(tensor["shape"])
        # bfloat16 is the upper half of a float32.
        tensors[name] = (x.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else x
    return tensors, dict(header.get("__metadata__") or {})


def _from_npz(raw: bytes) -> tuple[dict[str, Array], dict[str, str]]:
    import zipfile
    import zlib
    from io import BytesIO

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
    named = {*_TENSORS, "key_mask"}
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


def _from_json(text: str) -> object:
    """Return what a JSON text stands for, None for other text."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _decode(tensors: dict[str, Array], entries: dict[str, str], stem: str) -> Heads:
    missing = [name for name in _TENSORS if name not in tensors]
    if missing:
        raise ValueError(
            f"the file must hold the tensors q, k and v, got {', '.join(sorted(tensors)) or 'none'}"
            f"; add {', '.join(missing)}"
        )
    foreign = sorted(set(tensors) - {*_TENSORS, "key_mask"})
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
        metadata={name: x for name, x in entries.items() if name not in _ENTRIES},
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
    from io import BytesIO

    buffer = BytesIO()
    # Free names could be those of tensors, so they share one entry.
    texts = {**entries, "metadata": json.dumps(metadata)}
    arrays: dict[str, Any] = {**tensors, **{name: np.array(x) for name, x in texts.items()}}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


_READERS: dict[str, Callable[[bytes], tuple[dict[str, Array], dict[str, str]]]] = {
    ".safetensors": _from_safetensors,
    ".npz": _from_npz,
}
_WRITERS: dict[str, Callable[[dict[str, Array], dict[str, str], dict[str, str]], bytes]] = {
    ".safetensors": _to_safetensors,
    ".npz": _to_npz,
}


# --- heads that are made ------------------------------------------------------------------------

# name -> recipe(rng, heads, n, d, *, parameters) that returns q, k, v in float64
FAMILIES: dict[str, Callable[..., Triple]] = {}


def _family(recipe: Callable[..., Triple]) -> Callable[..., Triple]:
    """Register a recipe under its name; its keyword-only arguments are the parameters."""
    FAMILIES[recipe.__name__.removeprefix("_")] = recipe
    return recipe


def make_heads(
    family: str,
    n: int,
    d: int = 64,
    *,
    heads: int = 1,
    rng: Rng = None,
    dtype: DTypeLike = np.float32,
    **parameters: float,
) -> Heads:
    """Make heads with known structure: the same numbers for the same ``rng``.

    ``N`` is a fresh array of independent standard normal numbers; logits are
    ``L = Q K^T / sqrt(d)``.

    Parameters
    ----------
    family : str
        - "gaussian": ``q = sqrt(logit_std) N``, ``k = sqrt(logit_std) N``, so that the logits
          have the standard deviation ``logit_std`` (1); a temperature T is ``logit_std = 1/T``.
        - "peaked": "gaussian" with ``logit_std`` 4, which doubles q and k.
        - "clustered": ``q = c[t] + noise N``, ``k = c[t] + noise N``, ``v = u[t] + value_noise N``
          with random topics t, ``clusters`` (16) centres ``c = spread N`` (1.6), ``u = N``;
          ``noise`` 0.4, ``value_noise`` 0.5.
        - "ar1": q, k and v are stationary sequences ``x_t = rho x_(t-1) + sqrt(1 - rho^2) N`` with
          ``rho`` (0.95), so neighbouring tokens are similar; q and k times ``sqrt(logit_std)``
          (1).
        - "near_permutation": ``L_ij = sharpness u_p(i).u_j`` with random unit vectors u and a
          random permutation p; ``sharpness`` (20).
        - "low_rank": "gaussian" logits of rank ``logit_rank`` (4) and standard deviation
          ``logit_std`` (1).
        - "duplicates": ``k = c[t]`` with ``distinct`` (16) keys c, each repeated equally often
          up to one, in random order; q and v are N.
        - "attention_sink": "gaussian", and the first ``sinks`` (4) keys receive about ``mass``
          (0.9) of each row.
    n : int
        Number of tokens, of queries and keys.
    d : int, default 64
        Width of queries, keys and values.
    heads : int, default 1
        Number of heads.
    rng : None, int or numpy.random.Generator
        Source of all numbers.
    dtype : float16, float32 (default) or float64
        Draws are float64 and rounded to this.
    **parameters
        Those of the family, named above with their defaults in brackets.

    Returns
    -------
    Heads
        Named "gaussian/head0", ..., with the parameters as metadata.

    Raises
    ------
    TypeError
        For a parameter that the family does not have, and wrong types.
    ValueError
        For an unknown family, sizes below 1, and parameters out of range.

    Notes
    -----
    The recipes themselves are in ``sketchattn.heads.FAMILIES``; their docstrings say in which
    order the numbers are drawn.

    Examples
    --------
    >>> import sketchattn as sa
    >>> heads = sa.make_heads("clustered", n=512, d=64, heads=2, rng=0)
    >>> heads.names, round(float(heads.q[0, 0, 0]), 8)
    (('clustered/head0', 'clustered/head1'), 0.26763278)
    """
    if not isinstance(family, str):
        raise TypeError(
            f"family must be a string, got {type(family).__name__}; choose one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    if family not in FAMILIES:
        raise ValueError(
            f"family must be the name of a recipe, got {family!r}{closest(family, FAMILIES)}"
        )
    recipe = FAMILIES[family]
    known = {
        name: p.default
        for name, p in inspect.signature(recipe).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
    for name in parameters:
        if name not in known:
            raise TypeError(
                f"parameters of {family!r} must be among {', '.join(sorted(known))}, got {name!r}"
                f"{closest(name, known)}"
            )
    sizes = [_count("heads", heads), _count("n", n), _count("d", d)]
    try:
        kind = np.dtype(dtype)
    except TypeError:
        kind = np.dtype(object)
    if kind.name not in ("float16", "float32", "float64"):
        raise TypeError(
            f"dtype must be float16, float32 or float64, got {dtype!r}; "
            f"the values are rounded to it"
        )
    chosen = known | parameters
    q, k, v = recipe(as_generator(rng), *sizes, **chosen)
    listed = ", ".join(f"{name}={value}" for name, value in chosen.items())
    metadata = {"family": family} | {name: str(value) for name, value in chosen.items()}
    if isinstance(rng, numbers.Integral):
        metadata["rng"] = str(int(rng))
    with np.errstate(over="ignore"):  # infinities are refused with their place
        q, k, v = q.astype(kind), k.astype(kind), v.astype(kind)
    return Heads(
        q,
        k,
        v,
        names=[f"{family}/head{i}" for i in range(sizes[0])],
        description=f"made heads, {family}({listed})",
        metadata=metadata,
    )


def _count(name: str, value: object, most: int | None = None, bound: str = "") -> int:
    """Return ``value`` as an integer in ``1..most``."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}; use int(...)")
    if int(value) < 1 or (most is not None and int(value) > most):
        allowed = "at least 1" if most is None else f"between 1 and {bound} = {most}"
        verb = "raise" if int(value) < 1 else "lower"
        raise ValueError(f"{name} must be {allowed}, got {int(value)}; {verb} {name}")
    return int(value)


def _real(name: str, value: object, low: float, high: float, *, strict: bool = False) -> float:
    """Return ``value`` as a float in [low, high], or in (low, high) if ``strict``."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}; use float(...)")
    number = float(value)
    fits = low < number < high if strict else low <= number <= high
    if not fits or not math.isfinite(number):
        allowed = "finite and at least 0" if math.isinf(high) else f"above {low} and below {high}"
        verb = "raise" if number <= low else "lower"
        raise ValueError(f"{name} must be {allowed}, got {number}; {verb} {name}")
    return number


@_family
def _gaussian(
    rng: np.random.Generator, heads: int, n: int, d: int, *, logit_std: float = 1.0
) -> Triple:
    """Draw ``q, k, v = N, N, N`` in this order; q and k times ``sqrt(logit_std)``.

    A logit ``q.k / sqrt(d)`` of independent standard normal vectors has variance 1.
    """
    factor = math.sqrt(_real("logit_std", logit_std, 0, math.inf))
    q, k, v = (rng.standard_normal((heads, n, d)) for _ in range(3))
    return factor * q, factor * k, v


@_family
def _peaked(
    rng: np.random.Generator, heads: int, n: int, d: int, *, logit_std: float = 4.0
) -> Triple:
    """Draw as "gaussian", by default ``q = 2 N``, ``k = 2 N``, ``v = N``: few keys win a row."""
    return _gaussian(rng, heads, n, d, logit_std=logit_std)


@_family
def _clustered(
    rng: np.random.Generator,
    heads: int,
    n: int,
    d: int,
    *,
    clusters: int = 16,
    spread: float = 1.6,
    noise: float = 0.4,
    value_noise: float = 0.5,
) -> Triple:
    """Draw tokens of ``clusters`` topics t, whose queries and keys share a centre.

    ``c = spread N``, ``t``, ``q = c[t] + noise N``, ``k = c[t] + noise N``, ``u = N``,
    ``v = u[t] + value_noise N``, drawn in this order.
    """
    clusters = _count("clusters", clusters)
    spread = _real("spread", spread, 0, math.inf)
    noise = _real("noise", noise, 0, math.inf)
    value_noise = _real("value_noise", value_noise, 0, math.inf)
    centres = spread * rng.standard_normal((heads, clusters, d))
    topic = rng.integers(0, clusters, (heads, n))[:, :, None]
    q, k = (
        np.take_along_axis(centres, topic, 1) + noise * rng.standard_normal((heads, n, d))
        for _ in range(2)
    )
    values = rng.standard_normal((heads, clusters, d))
    v = np.take_along_axis(values, topic, 1) + value_noise * rng.standard_normal((heads, n, d))
    return q, k, v


@_family
def _ar1(
    rng: np.random.Generator,
    heads: int,
    n: int,
    d: int,
    *,
    rho: float = 0.95,
    logit_std: float = 1.0,
) -> Triple:
    """Draw q, k and v, in this order, as stationary autoregressive sequences of order 1.

    ``x_0 = N``, ``x_t = rho x_(t-1) + sqrt(1 - rho^2) N``: every ``x_t`` is standard normal and
    ``E x_s x_t = rho^|s-t|``.  q and k are multiplied by ``sqrt(logit_std)``.
    """
    rho = _real("rho", rho, -1, 1, strict=True)
    factor = math.sqrt(_real("logit_std", logit_std, 0, math.inf))
    triple = [rng.standard_normal((heads, n, d)) for _ in range(3)]
    for x in triple:
        x[:, 1:] *= math.sqrt(1 - rho * rho)
        for t in range(1, n):
            x[:, t] += rho * x[:, t - 1]
    return factor * triple[0], factor * triple[1], triple[2]


@_family
def _near_permutation(
    rng: np.random.Generator, heads: int, n: int, d: int, *, sharpness: float = 20.0
) -> Triple:
    """Draw keys of one length and point each query at its own key.

    ``u = N / |N|``, a permutation p of each head, ``v = N``, in this order;
    ``k_j = d^(1/4) u_j`` and ``q_i = sharpness d^(1/4) u_p(i)``, so ``L_ij = sharpness
    u_p(i).u_j``: sharpness at ``j = p(i)``, and about ``sharpness N / sqrt(d)`` elsewhere.  A tends
    to the permutation matrix as sharpness grows; small d needs a larger one.
    """
    sharpness = _real("sharpness", sharpness, 0, math.inf)
    unit = rng.standard_normal((heads, n, d))
    unit /= np.linalg.norm(unit, axis=2, keepdims=True)
    target = rng.permuted(np.tile(np.arange(n), (heads, 1)), axis=1)[:, :, None]
    k = d**0.25 * unit
    return sharpness * np.take_along_axis(k, target, 1), k, rng.standard_normal((heads, n, d))


@_family
def _low_rank(
    rng: np.random.Generator,
    heads: int,
    n: int,
    d: int,
    *,
    logit_rank: int = 4,
    logit_std: float = 1.0,
) -> Triple:
    """Draw q and k with ``logit_rank`` coordinates that are not zero, then ``v = N``.

    These are ``sqrt(logit_std) (d / logit_rank)^(1/4) N``, so that the logits have the standard
    deviation ``logit_std`` and, also after rounding, rank at most ``logit_rank``.
    """
    logit_rank = _count("logit_rank", logit_rank, d, "d")
    logit_std = _real("logit_std", logit_std, 0, math.inf)
    factor = math.sqrt(logit_std) * (d / logit_rank) ** 0.25
    q, k = np.zeros((2, heads, n, d))
    for x in (q, k):
        x[:, :, :logit_rank] = factor * rng.standard_normal((heads, n, logit_rank))
    return q, k, rng.standard_normal((heads, n, d))


@_family
def _duplicates(
    rng: np.random.Generator, heads: int, n: int, d: int, *, distinct: int = 16
) -> Triple:
    """Draw ``c = N`` (distinct, d), the key t of each token, ``q = N`` and ``v = N``; ``k = c[t]``.

    t is a random order of ``0, 1, ..., distinct - 1, 0, 1, ...``, so every key occurs.
    """
    distinct = _count("distinct", distinct, n, "n")
    keys = rng.standard_normal((heads, distinct, d))
    label = rng.permuted(np.tile(np.arange(n) % distinct, (heads, 1)), axis=1)[:, :, None]
    q = rng.standard_normal((heads, n, d))
    return q, np.take_along_axis(keys, label, 1), rng.standard_normal((heads, n, d))


@_family
def _attention_sink(
    rng: np.random.Generator, heads: int, n: int, d: int, *, sinks: int = 4, mass: float = 0.9
) -> Triple:
    """Draw as "gaussian", then raise the logits of the first ``sinks`` keys by one number.

    With ``b = log((n - sinks) mass / (sinks (1 - mass)))`` the first coordinate is
    ``d^(1/4) sqrt(|b|)`` in all queries, the same with the sign of b in the sinks, and 0 in the
    other keys: ``L_ij = b [j < sinks] + N sqrt(1 - 1/d)``.  The expected sums of ``exp(L)`` over
    sinks and others are then as ``mass`` to ``1 - mass``.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2 for sinks and other keys, got {n}; raise n")
    sinks = _count("sinks", sinks, n - 1, "n - 1")
    mass = _real("mass", mass, 0, 1, strict=True)
    q, k, v = _gaussian(rng, heads, n, d)
    raised = math.log((n - sinks) * mass / (sinks * (1 - mass)))
    length = d**0.25 * math.sqrt(abs(raised))
    q[:, :, 0] = length
    k[:, :, 0] = 0.0
    k[:, :sinks, 0] = math.copysign(length, raised)
    return q, k, v


# --- how hard a problem is ----------------------------------------------------------------------

# Singular values that a report keeps.
_LEADING = 16
# Entries of a block of rows: 8 MB in float64.
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class HardnessReport:
    """Say what makes a problem easy or hard to approximate.

    Hidden entries, rows that see no key and keys that no row sees do not count.

    Attributes
    ----------
    name : str or None
        Of the problem.
    rows, keys : int
        Queries that see a key, and keys that a query sees.
    perplexity_median, perplexity_mean, perplexity_min, perplexity_max : float
        Of ``exp(H_i)`` over rows, ``H_i = -sum_j A_ij log A_ij``: the number of keys that a row
        attends to, 1 to ``keys``.  The mean is the geometric one, exp of the mean entropy.
    frobenius_norm, spectral_norm : float
        ``|A|_F`` and ``|A|_2``.
    stable_rank : float
        ``|A|_F^2 / |A|_2^2``.
    max_column_norm : float
        ``max_j |A e_j|_2``.
    alpha : float
        ``keys * max_j |A e_j|_2^2``.
    log_kappa, kappa : float
        ``kappa = max_i / min_i`` of the row sums of ``exp(L)``, and its natural logarithm; kappa
        is inf where it exceeds float64.
    max_logit : float
        ``max |L_ij|``.
    rank_90, rank_99 : int or None
        Smallest r such that the r largest singular values hold 90 or 99 % of ``|A|_F^2``; None
        for matrices that are too large for all singular values.
    singular_values : tuple of float or None
        The largest ones, at most 16; None like the ranks.

    Notes
    -----
    alpha and kappa are the quantities that HyperAttention (arXiv 2310.05869) assumes to be
    ``n^o(1)``.
    """

    name: str | None
    rows: int
    keys: int
    perplexity_median: float
    perplexity_mean: float
    perplexity_min: float
    perplexity_max: float
    frobenius_norm: float
    spectral_norm: float
    stable_rank: float
    max_column_norm: float
    alpha: float
    log_kappa: float
    kappa: float
    max_logit: float
    rank_90: int | None
    rank_99: int | None
    singular_values: tuple[float, ...] | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary of numbers, in their order."""
        return dataclasses.asdict(self)


def describe(problem: AttentionProblem) -> HardnessReport:
    """Measure how hard a problem is to approximate.

    Parameters
    ----------
    problem : AttentionProblem
        With at least one visible entry; values are not needed.

    Returns
    -------
    HardnessReport
        Computed in float64.

    Raises
    ------
    TypeError
        For anything that is not a problem.
    ValueError
        For a problem in which no query sees a key.

    Notes
    -----
    Rows are streamed in blocks, ``O(n_q n_k d)``; all singular values only up to
    ``n_q n_k = 2048^2``, the norm ``|A|_2`` above from products with A.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> report = sa.describe(sa.AttentionProblem(np.zeros((4, 2)), np.zeros((8, 2))))
    >>> round(report.perplexity_median, 6), round(report.stable_rank, 6), report.max_logit
    (8.0, 1.0, 0.0)
    """
    from .spectral import DENSE_LIMIT, exact_spectral_norm, singular_values

    if not isinstance(problem, AttentionProblem):
        raise TypeError(
            f"problem must be an AttentionProblem, got {type(problem).__name__}; "
            f"take one of the heads, such as heads[0]"
        )
    counts = problem.visible_counts()
    if not counts.any():
        raise ValueError(
            f"problem must have a visible entry, got none in {problem.n_q} queries and "
            f"{problem.n_k} keys; unmask some keys"
        )
    keys = len(_seen_keys(problem))
    entropy, max_logit = _stream_rows(problem, np.flatnonzero(counts))
    exact = problem.exact
    frobenius = exact.frobenius_norm()
    column = float(exact.column_norms().max())
    lse = problem.astype(np.float64).logsumexp[counts > 0]
    log_kappa = float(lse.max() - lse.min())
    leading: tuple[float, ...] | None = None
    ranks: list[int] | list[None] = [None, None]
    if problem.n_q * problem.n_k <= DENSE_LIMIT**2 and min(problem.n_q, problem.n_k) <= DENSE_LIMIT:
        sigma = singular_values(problem)
        energy = np.cumsum(sigma**2)
        ranks = [int(np.searchsorted(energy, share * energy[-1])) + 1 for share in (0.9, 0.99)]
        leading = tuple(sigma[:_LEADING].tolist())
        spectral = leading[0]
    else:
        spectral = exact_spectral_norm(problem)
    return HardnessReport(
        name=problem.name,
        rows=int(np.count_nonzero(counts)),
        keys=keys,
        perplexity_median=float(np.median(np.exp(entropy))),
        perplexity_mean=math.exp(entropy.mean()),
        perplexity_min=math.exp(entropy.min()),
        perplexity_max=math.exp(entropy.max()),
        frobenius_norm=frobenius,
        spectral_norm=spectral,
        stable_rank=(frobenius / spectral) ** 2,
        max_column_norm=column,
        alpha=keys * column**2,
        log_kappa=log_kappa,
        kappa=float(np.exp(log_kappa)) if log_kappa < 709 else math.inf,
        max_logit=max_logit,
        rank_90=ranks[0],
        rank_99=ranks[1],
        singular_values=leading,
    )


def _seen_keys(problem: AttentionProblem) -> Array:
    """Return the keys that some query sees: with causal order, those before the last query."""
    kept = problem.kept_keys
    return kept[kept < problem.n_q + problem.offset] if problem.causal else kept


def _stream_rows(problem: AttentionProblem, rows: Array) -> tuple[Array, float]:
    """Return the entropies of some rows that see a key, and ``max |L_ij|`` over all they see.

    ``H_i = sum_j exp(-g_ij) g_ij`` with ``g_ij = lse_i - L_ij = -log A_ij``, a sum without
    cancellation.
    """
    wide = problem.astype(np.float64)
    hides = problem.key_mask is not None or bool(problem.causal)
    entropy = np.empty(len(rows))
    top = 0.0
    block = max(_BLOCK // problem.n_k, 1)
    for start in range(0, len(rows), block):
        pick = rows[start : start + block]
        logits = (wide.scale * wide.q[pick]) @ wide.k.T
        seen = problem.visible(pick) if hides else None
        if seen is not None:
            logits[~seen] = 0.0
        top = max(top, float(logits.max()), -float(logits.min()))
        gap = np.subtract(wide.logsumexp[pick][:, None], logits, out=logits)
        weights = np.exp(-gap)
        if seen is not None:
            weights[~seen] = 0.0
        # Rounding can leave an entropy of -1e-16 where one key has all the mass.
        entropy[start : start + block] = np.maximum(np.einsum("ij,ij->i", weights, gap), 0.0)
    return entropy, top
