"""Draws: everything random that a method uses, as named arrays, and the streams they come from."""

from __future__ import annotations

import json
import numbers
import os
from collections.abc import Iterable, Mapping
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import as_array
from .files import parse_safetensors, write_bytes
from .head import Head

Array = NDArray[Any]
Rng = int | np.integer[Any] | np.random.Generator | None


class Origin:
    """Say what a draw was made by and for; compares the problem when it is asked to.

    Attributes
    ----------
    method : str
        The method with its parameters.
    seed : int or None
        What ``rng`` was, where it was a number.
    problem : str
        ``problem.digest``.
    head : (int, int) or None
        The batch entry and the head, each from 0, where many were drawn for in one call: what
        ``rng=seed`` made of this one is what
        ``numpy.random.default_rng(numpy.random.SeedSequence(seed, spawn_key=head))`` makes.
    """

    def __init__(
        self,
        method: str,
        seed: int | None,
        problem: str | Head,
        head: tuple[int, int] | None = None,
    ) -> None:
        self.method = method
        self.seed = seed
        self.head = head
        self._problem = problem

    @property
    def problem(self) -> str:
        """The digest of the problem."""
        return self._problem if isinstance(self._problem, str) else self._problem.digest

    def fits(self, problem: Head) -> bool:
        """Say whether a problem is the one of the draw, in either precision, or made from it.

        While that one is in memory, a problem that is near it (queries and keys off by half of
        their size at most) or has a row of queries or keys in common is taken for a change of it:
        derivatives at a fixed draw, shifts, other values, and later tokens that must not matter
        are looked at in this way.  Heads of one layer have neither.
        """
        own = self._problem
        if own is problem:
            return True
        if not isinstance(own, str):
            pairs = ((own.q, problem.q), (own.k, problem.k))
            return all(_near(x, y) for x, y in pairs) or any(_shared(x, y) for x, y in pairs)
        if own == problem.digest:
            return True
        return problem.dtype == np.float64 and problem.astype(np.float32).digest == own

    def __getstate__(self) -> dict[str, Any]:
        found = self.as_dict()
        return found | {"_problem": found.pop("problem")}

    def as_dict(self) -> dict[str, Any]:
        """Return method, seed, the digest of the problem, and which head of a batch it is."""
        return {
            "method": self.method,
            "seed": self.seed,
            "problem": self.problem,
            "head": self.head,
        }

    def __repr__(self) -> str:
        head = "" if self.head is None else f"head={self.head}, "
        return f"Origin({self.method}, seed={self.seed}, {head}problem={self.problem[:12]}...)"


class Draw(dict[str, Array]):
    """Map names to the arrays that a method drew; can be saved and handed in again.

    ``origin`` tells method, seed and problem of a draw that `Method.draw` made or a file holds.
    A draw of another head is refused where it is handed in; `detach` gives one that is not.
    Copies, also by ``Draw(draw)`` and ``draw | other``, are of the same origin; a plain ``dict`` of
    the arrays has none.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem, other = (sa.make_heads("gaussian", n=8, d=4, rng=s)[0] for s in (0, 1))
    >>> method = sa.UniformColumns(rank=3)
    >>> draw = method.draw(problem, rng=0)
    >>> (method.approximate(problem, draw=draw) @ problem.v).shape
    (8, 4)
    >>> draw.origin.seed
    0
    >>> (method.approximate(other, draw=draw.detach()) @ other.v).shape
    (8, 4)
    """

    origin: Origin | None = None

    def __init__(
        self,
        arrays: Mapping[str, Array] | Iterable[tuple[str, Array]] = (),
        /,
        **named: Array,
    ) -> None:
        super().__init__(arrays, **named)
        if isinstance(arrays, Draw) and arrays.origin is not None:
            self.origin = arrays.origin

    def detach(self) -> Draw:
        """Return the same arrays without their origin, for use on any problem that they fit."""
        return Draw(dict(self))

    def copy(self) -> Draw:
        """Return the same arrays under the same names, and their origin."""
        return Draw(self)

    def __or__(self, other: Any) -> Any:
        """Return these arrays and others, which win; the origin is that of these if they have one.

        What has more or other arrays is still for the problem that it was drawn for.
        """
        return self._joined(super().__or__(other), other)

    def __ror__(self, other: Any) -> Any:
        return self._joined(super().__ror__(other), other)

    def _joined(self, arrays: Any, other: Any) -> Any:
        if arrays is NotImplemented:
            return arrays
        return _restored(arrays, self.origin or getattr(other, "origin", None))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restored, (dict(self), self.origin))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the arrays and their origin; a file that exists is replaced in one step.

        Parameters
        ----------
        path : path
            ``.safetensors`` (the origin is its metadata) or ``.npz`` (the origin is the entry
            ``origin``, a JSON text).  Of a draw without an origin all of it is null.

        Raises
        ------
        ValueError
            For another ending.
        """
        suffix = _suffix(path)
        arrays = {name: np.ascontiguousarray(x) for name, x in self.items()}
        # Always there: a file without it is no draw.
        nothing: dict[str, Any] = dict.fromkeys((*_FIELDS, _HEAD))
        made = nothing if self.origin is None else self.origin.as_dict()
        if suffix == ".npz":
            buffer = BytesIO()
            arrays[_ORIGIN] = np.array(json.dumps(made))
            np.savez(buffer, **arrays)  # type: ignore[arg-type]  # any name is one of an array
            write_bytes(path, buffer.getvalue())
            return
        from safetensors.numpy import save

        texts = {name: json.dumps(x) for name, x in made.items()}
        write_bytes(path, save(arrays, metadata=texts))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Draw:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            For another ending, no such file, or one that `save` did not write.
        """
        source = Path(os.path.expanduser(path))
        suffix = _suffix(source)
        if not source.is_file():
            raise ValueError(f"path must be an existing file, got {str(source)!r}; check its name")
        raw = source.read_bytes()
        try:
            if suffix == ".npz":
                with np.load(BytesIO(raw), allow_pickle=False) as archive:
                    arrays = {name: archive[name] for name in archive.files}
                made = json.loads(str(arrays.pop(_ORIGIN))) if _ORIGIN in arrays else {}
            else:
                arrays, _, texts = parse_safetensors(raw)
                names = (*_FIELDS, _HEAD) if all(name in texts for name in _FIELDS) else ()
                made = {name: json.loads(texts.get(name, "null")) for name in names}
            origin = _origin_of(made) if made else None
        except Exception as error:  # the formats raise many kinds for damaged files
            raise ValueError(
                f"path must be a file that Draw.save wrote, got {str(source)!r}, which is not "
                f"({' '.join(str(error).split()) or type(error).__name__}); save the draw again"
            ) from error
        if not made:
            raise ValueError(
                f"path must be a file that Draw.save wrote, got {str(source)!r}, which does not "
                f"say what drew its arrays ({_some(arrays)}); read heads with read_heads, and "
                f"make a draw of arrays of your own by Draw(arrays)"
            )
        return _restored(arrays, origin)


def _near(x: Array, y: Array) -> bool:
    return x.shape == y.shape and bool(np.linalg.norm(x - y) <= 0.5 * np.linalg.norm(x))


def _shared(x: Array, y: Array) -> bool:
    """Say whether two arrays have an equal row at the same place."""
    n = min(len(x), len(y))
    return x.shape[1:] == y.shape[1:] and bool(np.any(np.all(x[:n] == y[:n], axis=1)))


_ORIGIN = "origin"
_FIELDS = ("method", "seed", "problem")
_HEAD = "head"


def _origin_of(made: Mapping[str, Any]) -> Origin | None:
    """Return the origin that a file states, None where all of it is null."""
    method, seed, problem = (made[name] for name in _FIELDS)
    if method is None:
        return None
    head = made.get(_HEAD)
    return Origin(method, seed, problem, None if head is None else (int(head[0]), int(head[1])))


def _some(names: Iterable[str], count: int = 6) -> str:
    """Return a few of many names."""
    every = list(names)
    return ", ".join([*every[:count], *(["..."] if len(every) > count else [])]) or "none"


def _restored(arrays: Mapping[str, Array], origin: Origin | None) -> Draw:
    draw = Draw(arrays)
    if origin is not None:
        draw.origin = origin
    return draw


def _suffix(path: str | PathLike[str]) -> str:
    if not isinstance(path, str | PathLike):
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}; name a file")
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".npz"):
        raise ValueError(
            f"path must end in .safetensors or .npz, got {str(path)!r}; choose one of these formats"
        )
    return suffix


def check_origin(draw: object, problem: Head) -> None:
    """Refuse a draw that was made for another problem, and a file of one that was not read."""
    text = draw.get(_ORIGIN) if isinstance(draw, Mapping) else None
    if getattr(getattr(text, "dtype", None), "kind", "") == "U":
        raise ValueError(
            "draw must hold arrays alone, got also the text 'origin', which Draw.save adds; read "
            "the file with sketchattn.Draw.load, which knows the problem then"
        )
    origin = getattr(draw, "origin", None)
    if isinstance(origin, Origin) and not origin.fits(problem):
        raise ValueError(
            f"draw must be of this problem, got one that {origin.method} drew for another "
            f"(digest {origin.problem[:12]}, here {problem.digest[:12]}); draw again, or use "
            f"draw.detach() if it is meant"
        )


def as_generator(rng: Rng) -> np.random.Generator:
    """Return the generator that ``rng`` stands for: None, a seed >= 0, or a generator itself."""
    if isinstance(rng, np.random.Generator):
        return rng
    if rng is None:
        return np.random.default_rng()
    if isinstance(rng, bool | np.bool_) or not isinstance(rng, numbers.Integral):
        raise TypeError(
            f"rng must be None, an integer or a numpy.random.Generator, got {type(rng).__name__}; "
            f"use numpy.random.default_rng"
        )
    if int(rng) < 0:
        raise ValueError(f"rng must be at least 0, got {int(rng)}; give a non-negative seed")
    return np.random.default_rng(int(rng))


def seed_of(rng: Rng) -> int | None:
    """Return ``rng`` where it is a number."""
    return int(rng) if isinstance(rng, numbers.Integral) else None


def of_head(draw: Draw, rng: Rng, batch: int, head: int) -> Draw:
    """Return a draw of the stream of one head, which now says so."""
    if draw.origin is not None:
        draw.origin.seed, draw.origin.head = seed_of(rng), (batch, head)
    return draw


def head_generator(entropy: int, batch: int, head: int) -> np.random.Generator:
    """Return the stream of one head, which depends on nothing but these three numbers."""
    return np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(batch, head)))


def entropy_of(rng: Rng) -> int:
    """Return the number that the streams of all heads of one call grow from."""
    if isinstance(rng, numbers.Integral) and not isinstance(rng, bool | np.bool_) and rng >= 0:
        return int(rng)
    words = as_generator(rng).integers(0, 2**32, size=4, dtype=np.uint64)
    return sum(int(w) << (32 * i) for i, w in enumerate(words))


def check_named(draw: object) -> Mapping[str, Any]:
    """Return a draw that a user handed in; refuse what is no mapping."""
    if not isinstance(draw, Mapping):
        raise TypeError(
            f"draw must be a mapping from names to arrays, got {type(draw).__name__}; "
            f"use method.draw(problem, rng)"
        )
    return draw


def check_draw(draw: object, names: tuple[str, ...]) -> Draw:
    """Return a draw that a user handed in with exactly the arrays ``names``."""
    arrays = check_named(draw)
    if set(arrays) != set(names):
        raise ValueError(
            f"draw must hold the arrays {sorted(names)}, got {sorted(map(str, arrays))}; "
            f"use method.draw(problem, rng)"
        )
    return Draw({name: as_array(arrays[name], f"draw[{name!r}]") for name in names})


def check_columns(columns: Array, keys: Array) -> Array:
    """Return drawn columns as int64: distinct, and among the keys that may be drawn."""
    if columns.ndim != 1 or not np.issubdtype(columns.dtype, np.integer):
        raise TypeError(
            f"columns must be a one-dimensional integer array, got {columns.dtype} of shape "
            f"{columns.shape}; give indices of keys"
        )
    if len(np.unique(columns)) != len(columns):
        raise ValueError(
            f"columns must be distinct, got {len(columns) - len(np.unique(columns))} repeated; "
            f"this estimator draws without replacement"
        )
    foreign = np.setdiff1d(columns, keys)
    if len(foreign):
        raise ValueError(
            f"columns must be indices of visible keys, got {int(foreign[0])}; "
            f"draw from the {len(keys)} keys that are not masked"
        )
    return columns.astype(np.int64)
