"""Heads of several shapes, and heads that stay in their files until they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import Causal, check_causal, check_scale, float_dtype
from ..problem import AttentionProblem
from .container import Heads, check_metadata, check_names
from .tensors import StoredTensor

Array = NDArray[Any]
Triple = tuple[StoredTensor, StoredTensor, StoredTensor]


class StoredProblem(AttentionProblem):
    """One head of a file: it knows its shape, and reads its arrays each time they are asked for.

    What works with the arrays works with ``load()``, which is a problem as any other; this one
    stands for it in lists, and keeps nothing.
    """

    def __init__(
        self,
        tensors: Triple,
        index: int,
        *,
        scale: float,
        causal: Causal,
        key_mask: Array | None,
        name: str,
    ) -> None:
        path = tensors[0].path
        self.__dict__.update(
            tensors=tensors,
            index=index,
            stamp=_stamp(path),
            scale=scale,
            causal=causal,
            key_mask=key_mask,
            name=name,
            _cache={},
        )

    tensors: Triple
    index: int
    stamp: tuple[int, int]

    def __getattr__(self, label: str) -> Any:
        if label not in ("q", "k", "v", "arrays"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {label!r}")
        return getattr(self.load(), label)

    def load(self) -> AttentionProblem:
        """Return the problem itself, read from its file."""
        path = self.tensors[0].path
        if _stamp(path) != self.stamp:
            raise ValueError(
                f"the file of a head must not change while it is used, got another {str(path)!r}; "
                f"read it again"
            )
        try:
            return AttentionProblem(
                *(x.read(self.index) for x in self.tensors),
                scale=self.scale,
                causal=self.causal,
                key_mask=self.key_mask,
                name=self.name,
            )
        except ValueError as error:
            raise ValueError(f"{path.name}, head {self.name!r}: {error}") from error

    def replaced(self, **changes: Any) -> StoredProblem:
        """Return this head with another name, scale or causality."""
        known = {x: getattr(self, x) for x in ("scale", "causal", "key_mask", "name")}
        return StoredProblem(self.tensors, self.index, **known | changes)

    @property
    def n_q(self) -> int:
        """Number of queries."""
        return self.tensors[0].shape[-2]

    @property
    def n_k(self) -> int:
        """Number of keys, masked ones included."""
        return self.tensors[1].shape[-2]

    @property
    def d(self) -> int:
        """Width of queries and keys."""
        return self.tensors[0].shape[-1]

    @property
    def d_v(self) -> int:
        """Width of the values."""
        return self.tensors[2].shape[-1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Computing precision."""
        return float_dtype(np.empty(0, self.tensors[0].dtype), "q")

    def astype(self, dtype: Any) -> AttentionProblem:  # type: ignore[override]  # read, not kept
        """Return the problem, read, in another precision."""
        return self.load().astype(dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        # Other processes and machines may not see the file.
        return self.load().__reduce__()


def _stamp(path: Path) -> tuple[int, int]:
    """Return what changes with a file: its size and the time of its last change."""
    try:
        found = path.stat()
    except OSError as error:
        raise ValueError(
            f"the file of a head must be there while it is used, got none at {str(path)!r}; read "
            f"it again"
        ) from error
    return found.st_size, found.st_mtime_ns


class MixedHeads(Heads):
    """Hold heads one by one: of several shapes, or in files.

    What all share is an attribute as of any heads; asking for what differs is refused.
    """

    problems: tuple[AttentionProblem, ...]

    def __init__(
        self,
        problems: Sequence[AttentionProblem],
        *,
        description: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._fill(
            problems=tuple(problems),
            names=check_names([str(p.name) for p in problems], len(problems)),
            description=description,
            metadata=check_metadata(description, metadata),
        )

    def __getattr__(self, label: str) -> Any:
        if label in ("q", "k", "v"):
            _ = self.n_q, self.n_k, self.d, self.d_v, self.dtype
            stacked = np.stack([getattr(p, label) for p in self])
            stacked.flags.writeable = False
            return stacked
        if label == "key_mask":
            masks = [p.key_mask for p in self.problems]
            if all(x is None for x in masks):
                return None
            n_k = self.n_k
            return np.stack([np.ones(n_k, bool) if x is None else x for x in masks])
        if label in ("scale", "causal"):
            return self._shared(label)
        raise AttributeError(f"Heads has no attribute {label!r}")

    def _shared(self, label: str) -> Any:
        first = getattr(self.problems[0], label)
        for problem in self.problems:
            other = getattr(problem, label)
            if other != first:
                raise ValueError(
                    f"heads must share {label} for this, got {first} in {self.names[0]!r} and "
                    f"{other} in {problem.name!r}; ask each head, heads[i].{label}"
                )
        return first

    @property
    def n_q(self) -> int:
        """Number of queries of each head."""
        return int(self._shared("n_q"))

    @property
    def n_k(self) -> int:
        """Number of keys of each head, masked ones included."""
        return int(self._shared("n_k"))

    @property
    def d(self) -> int:
        """Width of queries and keys."""
        return int(self._shared("d"))

    @property
    def d_v(self) -> int:
        """Width of the values."""
        return int(self._shared("d_v"))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Precision that the heads are computed in."""
        found: np.dtype[Any] = self._shared("dtype")
        return found

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice | list | tuple | range | np.ndarray):
            return super().__getitem__(index)
        problem = self.problems[self._position(index)]
        return problem.load() if isinstance(problem, StoredProblem) else problem

    def __contains__(self, item: object) -> bool:
        return (
            item in self.names if isinstance(item, str) else any(item is p for p in self.problems)
        )

    def _take(self, chosen: list[int]) -> Heads:
        if not chosen:
            raise ValueError(
                f"a choice of heads must not be empty, got no head; pick from {len(self)}"
            )
        return MixedHeads(
            [self.problems[i] for i in chosen],
            description=self.description,
            metadata=self.metadata,
        )

    def replace(self, **changes: Any) -> Heads:
        """Return these heads with other settings; see `Heads.replace`."""
        self._check_changes(changes)
        names = check_names(changes.get("names", self.names), len(self))
        made = []
        for problem, name in zip(self.problems, names, strict=True):
            own: dict[str, Any] = {"name": name}
            if "scale" in changes:
                own["scale"] = check_scale(changes["scale"], problem.d)
            if "causal" in changes:
                own["causal"] = check_causal(changes["causal"], problem.n_q, problem.n_k)
            if "key_mask" in changes:
                raise TypeError(
                    "key_mask must be replaced in heads of one shape that are in memory, got heads "
                    "of files; make each problem with its mask"
                )
            made.append(_changed(problem, own))
        return MixedHeads(
            made,
            description=changes.get("description", self.description),
            metadata=changes.get("metadata", self.metadata),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.problems, self.description, dict(self.metadata))

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.names[:2])) + (", ..." if len(self) > 2 else "")
        parts = [f"Heads([{shown}], heads={len(self)}"]
        for label in ("n_q", "n_k", "d", "d_v", "dtype", "causal"):
            found = list(dict.fromkeys(str(getattr(p, label)) for p in self.problems))
            parts.append(f"{label}={' or '.join(found[:3])}{' or ...' if found[3:] else ''}")
        return ", ".join(parts) + ")"


def _rebuild(
    problems: Sequence[AttentionProblem], description: str, metadata: dict[str, str]
) -> MixedHeads:
    return MixedHeads(problems, description=description, metadata=metadata)


def _changed(problem: AttentionProblem, changes: dict[str, Any]) -> AttentionProblem:
    """Return a problem with another name, scale or causality."""
    if isinstance(problem, StoredProblem):
        return problem.replaced(**changes)
    known = {x: getattr(problem, x) for x in ("scale", "causal", "key_mask", "name")}
    return AttentionProblem(*problem.arrays, **known | changes)


def stored_heads(tensors: Triple, fields: Mapping[str, Any]) -> MixedHeads:
    """Return the heads of one file from its tensors and the checked fields of `Heads`."""
    mask = fields["key_mask"]
    problems = [
        StoredProblem(
            tensors,
            i,
            scale=fields["scale"],
            causal=fields["causal"],
            key_mask=None if mask is None else mask[i],
            name=name,
        )
        for i, name in enumerate(fields["names"])
    ]
    return MixedHeads(
        problems, description=fields["description"], metadata=dict(fields["metadata"])
    )


def joined(parts: Sequence[tuple[str, Heads]]) -> Heads:
    """Return the heads of several sources, each with what it is called, one after the other.

    Names that sources share get the names of these in front.
    """
    if len(parts) == 1:
        return parts[0][1]
    every = [
        (label, problem)
        for label, heads in parts
        for problem in (heads.problems if isinstance(heads, MixedHeads) else heads)
    ]
    names = [str(problem.name) for _, problem in every]
    for depth in range(1, 1 + max(len(Path(label).parts) for label, _ in parts)):
        counts = Counter(names)
        if max(counts.values()) == 1:
            break
        shared = {label for (label, _), name in zip(every, names, strict=True) if counts[name] > 1}
        names = [
            _behind(label, str(problem.name), depth) if label in shared else name
            for (label, problem), name in zip(every, names, strict=True)
        ]
    return MixedHeads(
        [_changed(p, {"name": name}) for (_, p), name in zip(every, names, strict=True)]
    )


def _behind(label: str, name: str, depth: int) -> str:
    """Return a name behind the last parts of the path that it comes from."""
    path = Path(label)
    own = name.removeprefix(f"{path.stem}/")
    return "/".join([*path.with_suffix("").parts[-depth:], own])
