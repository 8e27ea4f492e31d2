"""Heads: a sequence of problems with names, in one layout."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import (
    Causal,
    as_arrays,
    check_causal,
    check_finite,
    check_key_mask,
    check_same_dtype,
    check_scale,
    check_width,
    closest,
    float_dtype,
)
from ..problem import AttentionProblem
from .projections import split_projections

Array = NDArray[Any]
Triple = tuple[Array, Array, Array]

TENSORS = ("q", "k", "v")
# What a file says about its tensors, beside free entries.
ENTRIES = ("scale", "causal", "heads", "description")
# What `Heads.replace` changes.
SETTINGS = ("scale", "causal", "key_mask", "names", "description", "metadata")
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
        arrays, fields = check_stack(
            q,
            k,
            v,
            scale=scale,
            causal=causal,
            key_mask=key_mask,
            names=names,
            description=description,
            metadata=metadata,
        )
        mask = fields["key_mask"]
        wide = np.dtype(np.float32) if arrays[0].dtype.name == "bfloat16" else arrays[0].dtype
        owned = [np.array(x, dtype=wide.newbyteorder("="), order="C") for x in arrays]
        for label, x in zip(TENSORS, owned, strict=True):
            hidden = None if label == "q" or mask is None else ~mask
            check_finite(x if hidden is None else np.where(hidden[:, :, None], 0, x), label)
        self._fill(**fields, q=owned[0], k=owned[1], v=owned[2], _problems={})

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
                        f"problem {i}; use one set of heads for each, or keep the list of "
                        f"problems: study, validate and certify take it"
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

    @classmethod
    def from_projections(
        cls,
        q: object,
        k: object,
        v: object,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        scale: float | None = None,
        causal: Causal = False,
        key_mask: ArrayLike | None = None,
        names: Sequence[str] | None = None,
        description: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> Heads:
        """Split what the projections of a layer give into heads.

        Columns ``h d, ..., (h + 1) d - 1`` belong to head h, as in ``x.reshape(n, num_heads, d)``.

        Parameters
        ----------
        q : array of shape (n_q, num_heads * d) or (batch, n_q, num_heads * d)
            What the projection of the queries gives; with rotary embedding, what comes after it.
        k : array of shape (n_k, num_kv_heads * d) or (batch, n_k, num_kv_heads * d)
        v : array of shape (n_k, num_kv_heads * d_v) or (batch, n_k, num_kv_heads * d_v)
        num_heads : int
            Query heads.
        num_kv_heads : int, optional
            Heads of keys and values, a divisor of ``num_heads``; each serves
            ``num_heads / num_kv_heads`` query heads that follow each other.  By default what the
            width of k says.
        scale, causal, description, metadata
            As for `Heads`.
        key_mask : bool array of shape (n_k,) or (batch, n_k), optional
            True for the keys that exist.
        names : sequence of str, optional
            One for each head and batch entry, batch entries first; by default head0, ..., or
            batch0.head0, ...

        Returns
        -------
        Heads
            ``batch * num_heads`` of them.

        Raises
        ------
        TypeError, ValueError
            For shapes that these numbers of heads do not divide, and all that `Heads` refuses.

        Examples
        --------
        >>> import numpy as np, sketchattn as sa
        >>> q, kv = np.ones((1, 300, 384), np.float32), np.ones((1, 300, 64), np.float32)
        >>> heads = sa.Heads.from_projections(q, kv, kv, num_heads=12, causal=True)
        >>> len(heads), heads.names[1], heads.n_k, heads.d
        (12, 'batch0.head1', 300, 32)
        """
        arrays, mask, labels = split_projections(q, k, v, num_heads, num_kv_heads, key_mask)
        return cls(
            *arrays,
            scale=scale,
            causal=causal,
            key_mask=mask,
            names=labels if names is None else names,
            description=description,
            metadata=metadata,
        )

    def replace(self, **changes: Any) -> Heads:
        """Return these heads with other settings: ``scale``, ``causal``, ``key_mask``, and so on.

        Parameters
        ----------
        **changes
            Of ``scale``, ``causal``, ``key_mask``, ``names``, ``description`` and ``metadata``, as
            for `Heads`: ``scale=None`` is ``1/sqrt(d)``, ``key_mask=None`` no mask.

        Returns
        -------
        Heads
            The arrays are shared, exact quantities are computed anew.

        Raises
        ------
        TypeError, ValueError
            For other names, and what `Heads` refuses.

        Examples
        --------
        >>> import sketchattn as sa
        >>> heads = sa.load_heads("minilm")[:2].replace(causal=True, scale=0.25)
        >>> heads[0].causal, heads[0].scale
        (True, 0.25)
        """
        self._check_changes(changes)
        settings = {name: getattr(self, name) for name in SETTINGS} | changes
        if self.key_mask is not None and settings["key_mask"] is not self.key_mask:
            # What the old mask hid may be anything.
            return Heads(self.q, self.k, self.v, **settings)
        made = object.__new__(Heads)
        _, fields = check_stack(self.q, self.k, self.v, **settings)
        made._fill(**fields, q=self.q, k=self.k, v=self.v, _problems={})
        return made

    @staticmethod
    def _check_changes(changes: Mapping[str, Any]) -> None:
        """Refuse what is no setting of heads."""
        for name in changes:
            if name in TENSORS:
                raise TypeError(
                    f"replace must be given settings, got the array {name!r}; make other Heads"
                )
            if name not in SETTINGS:
                raise TypeError(
                    f"replace must be given settings of heads, got {name!r}"
                    f"{closest(name, SETTINGS)}"
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
        names = check_names([self.names[i] for i in chosen], len(chosen))
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


def check_stack(
    q: object,
    k: object,
    v: object,
    *,
    scale: float | None,
    causal: Causal,
    key_mask: ArrayLike | None,
    names: Sequence[str] | None,
    description: str,
    metadata: Mapping[str, str] | None,
) -> tuple[list[Array], dict[str, Any]]:
    """Return the arrays of heads, as given, and the other fields; entries are not looked at."""
    arrays = as_arrays(q, k, v)
    for label, x in zip(TENSORS, arrays, strict=True):
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
    labels = check_names(names, count)
    extra = check_metadata(description, metadata)
    return arrays, {
        "scale": factor,
        "causal": order,
        "key_mask": mask,
        "names": labels,
        "description": description,
        "metadata": extra,
    }


def _rebuild(arrays: Triple, options: dict[str, Any]) -> Heads:
    return Heads(*arrays, **options)


def _signature(problem: AttentionProblem) -> tuple[object, ...]:
    shape = (problem.n_q, problem.n_k, problem.d, problem.d_v)
    return shape, problem.dtype, problem.scale, problem.causal


def check_names(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Return a distinct name for each of ``count`` heads."""
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


def check_metadata(description: object, metadata: object) -> Mapping[str, str]:
    """Return what else is said of heads, read-only."""
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
    for name in ENTRIES:
        if name in metadata:
            raise ValueError(
                f"metadata must not hold the entries {', '.join(ENTRIES)}, got {name!r}; "
                f"use the argument of that name"
            )
    layout = metadata.get("layout", _LAYOUT)
    if layout != _LAYOUT:
        raise ValueError(f"layout must be {_LAYOUT!r}, got {layout!r}; transpose q, k and v")
    return MappingProxyType(dict(metadata))
