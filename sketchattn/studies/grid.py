"""The grid of a study: heads, methods, ranks and seeds, each checked before any work."""

from __future__ import annotations

import hashlib
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..base.arguments import closest
from ..heads.inputs import renamed
from ..problem import AttentionProblem
from ..zoo.base import Method, make_method
from ..zoo.base import methods as registered
from .summary import BOUND_COLUMNS, REFERENCES, Key

if TYPE_CHECKING:
    import pandas as pd

    from ..theory.engine.curves import ErrorBound

MethodLike = str | Method
MethodsLike = (
    MethodLike | Mapping[str, MethodLike] | Sequence[MethodLike | tuple[str, MethodLike]] | None
)


# --- what goes in: all refusals happen here, before any work ------------------------------------


def as_integer(value: object, name: str, least: int, remedy: str) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}; {remedy}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {int(value)}; {remedy}")
    return int(value)


def _integers(values: Any, name: str, least: int) -> list[int]:
    """Return a sequence of distinct integers as a list."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(
            f"{name} must be a sequence of integers, got {type(values).__name__}; "
            f"put it into a list"
        )
    found = [as_integer(x, name, least, f"give {name} as integers") for x in values]
    if not found:
        raise ValueError(f"{name} must hold at least one number, got none; leave {name} out")
    repeated = [x for i, x in enumerate(found) if x in found[:i]]
    if repeated:
        raise ValueError(f"{name} must be distinct, got {repeated[0]} twice; delete one of them")
    return found


def as_seeds(seeds: Any) -> list[int]:
    if isinstance(seeds, numbers.Integral):
        return list(range(as_integer(seeds, "seeds", 1, "seeds=1 is one run a cell")))
    return _integers(seeds, "seeds", 0)


def default_ranks(n_k: int) -> list[int]:
    """Return the powers of two from 8 to ``n_k / 2``; ``[max(1, n_k // 2)]`` if there is none.

    Examples
    --------
    >>> default_ranks(100), default_ranks(10)
    ([8, 16, 32], [5])
    """
    powers = [2**i for i in range(3, max(n_k // 2, 1).bit_length())]
    return powers or [max(1, n_k // 2)]


def as_ranks(ranks: Any, problems: Sequence[AttentionProblem]) -> list[int]:
    smallest = min(problems, key=lambda problem: problem.n_k)
    if ranks is None:
        return default_ranks(smallest.n_k)
    found = _integers([ranks] if isinstance(ranks, numbers.Integral) else ranks, "ranks", 1)
    if max(found) > smallest.n_k:
        raise ValueError(
            f"ranks must be at most n_k = {smallest.n_k} of head {smallest.name!r}, got "
            f"{max(found)}; lower it or leave the head out"
        )
    return found


@dataclass(frozen=True)
class Variant:
    """A method under the label that it has in the study."""

    label: str
    method: Method
    ranked: bool
    randomized: bool
    oracle: bool

    @classmethod
    def of(cls, label: str, method: Method) -> Variant:
        traits = method.traits
        ranked = traits.uses_rank and "rank" in method.get_params(deep=False)
        return cls(label, method, ranked, traits.randomized, traits.oracle)

    def at(self, rank: int) -> Method:
        """Return the method with this rank, if it has one."""
        from sklearn.base import clone

        chosen: Method = clone(self.method)
        if self.ranked:
            chosen.set_params(rank=rank)
        return chosen

    def check(self, problem: AttentionProblem, ranks: Sequence[int]) -> None:
        """Refuse a head that the method cannot honour at one of the ranks."""
        for rank in ranks if self.ranked else ranks[:1]:
            self.at(rank).check(problem)


def by_name(name: str, rank: int) -> Method:
    cls = registered().get(name)
    takes_rank = cls is not None and "rank" in cls._get_param_names()
    return make_method(name, {"rank": rank} if takes_rank else {})


def default_methods() -> list[str]:
    """Return the registered methods that a study compares: no oracle, no predictor, not exact."""
    chosen = []
    for name in registered():
        traits = by_name(name, 1).traits
        if name != "exact" and traits.uses_rank and not traits.oracle:
            chosen.append(name)
    return chosen


def as_methods(
    methods: Any, problems: Sequence[AttentionProblem], ranks: Sequence[int]
) -> tuple[list[Variant], dict[str, str]]:
    """Return the methods with their labels, and the default ones that were left out."""
    if methods is None:
        kept, left_out = [], {}
        for name in default_methods():
            variant = Variant.of(name, by_name(name, ranks[0]))
            refused = _refusal(variant, problems, ranks)
            if refused is None:
                kept.append(variant)
            else:
                head, error = refused
                left_out[name] = f"head {head!r}: {error}"
        if not kept:
            reasons = "; ".join(f"{name} ({why})" for name, why in left_out.items())
            raise ValueError(
                f"methods must hold one that can honour all heads, got none by default: {reasons}"
            )
        return kept, left_out
    if isinstance(methods, str | Method):
        methods = [methods]
    if isinstance(methods, Mapping):
        pairs = list(methods.items())
    elif isinstance(methods, Iterable):
        pairs = [m if isinstance(m, tuple) else (None, m) for m in methods]
    else:
        raise TypeError(
            f"methods must be names, method objects or a mapping from labels to these, got "
            f"{type(methods).__name__}; see sketchattn.methods()"
        )
    variants: list[Variant] = []
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(
                f"methods must be pairs (label, method) where they are tuples, got {len(pair)} "
                f"entries; write ('label', method)"
            )
        label, given = pair
        method = by_name(given, ranks[0]) if isinstance(given, str) else make_method(given, {})
        label = getattr(method, "name", type(method).__name__) if label is None else label
        if not isinstance(label, str) or not label:
            raise TypeError(
                f"methods must have labels that are strings, got {label!r}; name the variant"
            )
        if label in REFERENCES and getattr(method, "name", None) != label:
            raise ValueError(
                f"methods must not use the label of a reference for another method, got "
                f"{label!r}; choose another label"
            )
        if any(label == v.label for v in variants):
            raise ValueError(
                f"methods must have distinct labels, got {label!r} twice; "
                f"pass pairs (label, method)"
            )
        variants.append(Variant.of(label, method))
    if not variants:
        raise ValueError("methods must hold at least one method, got none; leave methods out")
    for variant in variants:
        refused = _refusal(variant, problems, ranks)
        if refused is not None:
            head, error = refused
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"methods must honour all heads, got {variant.label!r} with head {head!r}: {error}"
            ) from error
    return variants, {}


def _refusal(
    variant: Variant, problems: Sequence[AttentionProblem], ranks: Sequence[int]
) -> tuple[str, TypeError | ValueError] | None:
    """Return the first head that a method cannot honour, and why."""
    name = ""
    try:
        for problem in problems:
            name = str(problem.name)
            variant.check(problem, ranks)
    except (TypeError, ValueError) as error:
        return name, error
    return None


def as_bounds(
    bounds: Any,
    problems: Sequence[AttentionProblem],
    variants: Sequence[Variant],
    ranks: Sequence[int],
) -> pd.DataFrame:
    """Return the bounds of claims on every head at every rank; they need no draw."""
    import pandas as pd

    names = [bounds] if isinstance(bounds, str) else bounds
    if names is None:
        return pd.DataFrame(columns=list(BOUND_COLUMNS))
    if not isinstance(names, Iterable):
        raise TypeError(
            f"bounds must be ids of claims, got {type(names).__name__}; "
            f"see sketchattn.theory.error_bounds()"
        )
    curves = {curve.claim: curve for curve in map(_error_bound, names)}
    if not curves:
        raise ValueError("bounds must hold at least one id, got none; leave bounds out")
    labels = {name: _whose(curve, variants) for name, curve in curves.items()}
    found: dict[str, list[list[Any]]] = {name: [] for name in curves}
    for problem in problems:
        copy = renamed(problem, str(problem.name))  # leaves the exact quantities behind
        for name, curve in curves.items():
            found[name] += [
                [name, labels[name], problem.name, r, curve.field, curve.what, curve.at(copy, r)]
                for r in ranks
            ]
    for name, rows in found.items():
        if all(math.isnan(row[-1]) for row in rows):
            raise ValueError(
                f"bounds must apply to a head at one of the ranks, got {name!r}, which applies to "
                f"none; sketchattn.theory.check says why"
            )
    every = [row for rows in found.values() for row in rows]
    return pd.DataFrame(every, columns=list(BOUND_COLUMNS)).astype({"bound": np.float64})


def _error_bound(name: object) -> ErrorBound:
    from ..theory.engine.curves import error_bounds
    from ..theory.engine.registry import claims

    known = error_bounds()
    if not isinstance(name, str):
        raise TypeError(
            f"bounds must hold strings, got {type(name).__name__}; "
            f"see sketchattn.theory.error_bounds()"
        )
    if name in known:
        return known[name]
    claim = claims().get(name)
    if claim is None:
        raise ValueError(f"bounds must be ids of claims, got {name!r}{closest(name, known)}")
    raise ValueError(
        f"bounds must be claims about an error measure at each rank, got {name!r}, which is about "
        f"{claim.observes}; choose one of sketchattn.theory.error_bounds()"
    )


def _whose(curve: ErrorBound, variants: Sequence[Variant]) -> str:
    """Return the label of the method that a bound is about."""
    for variant in variants:
        if curve.is_about(variant.method):
            return variant.label
    raise ValueError(
        f"bounds must be about a method of the study, got {curve.claim!r}, which is about {curve}; "
        f"add that method or leave the bound out"
    )


def as_flag(value: object, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}; give True or False")
    return bool(value)


# --- cells --------------------------------------------------------------------------------------


class Cell(NamedTuple):
    key: Key
    label: str
    method: Method
    rank: int | None
    seed: int
    # The method at the rank that is run first, untimed.
    first: Method


def describe_method(method: Method) -> str:
    """Return a method with all its parameters as text that is the same in every process.

    Examples
    --------
    >>> import sketchattn as sa
    >>> describe_method(sa.TopK(rank=4))
    'sketchattn.zoo.baselines.TopK(rank=4, renormalize=True)'
    """
    cls = type(method)
    parameters = sorted(method.get_params(deep=False).items())
    listed = ", ".join(f"{name}={_describe_value(x)}" for name, x in parameters)
    return f"{cls.__module__}.{cls.__qualname__}({listed})"


def _describe_value(x: object) -> str:
    if isinstance(x, np.ndarray):  # its repr would leave entries out
        digest = hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()
        return f"array({x.dtype.str}, {x.shape}, sha256={digest})"
    if isinstance(x, np.generic):
        return repr(x.item())
    if isinstance(x, Method):
        return describe_method(x)
    return repr(x)


def make_cells(variants: Sequence[Variant], ranks: list[int], seeds: list[int]) -> list[Cell]:
    """Return the distinct computations behind the rows of one head, and of its references."""
    cells: dict[Key, Cell] = {}
    for variant in variants:
        # A truncated decomposition is computed at the largest rank and cut for the others, so
        # that rows do not depend on which cells an interrupted study had finished.
        order = sorted(ranks, reverse=True) if variant.oracle else ranks
        first = variant.at(order[0])
        for rank in order if variant.ranked else order[:1]:
            method = variant.at(rank)
            text = describe_method(method)
            for seed in seeds if variant.randomized else seeds[:1]:
                key = (text, seed if variant.randomized else None)
                cell = Cell(
                    key,
                    variant.label,
                    method,
                    rank if variant.ranked else None,
                    seed,
                    first if variant.oracle else method,
                )
                cells.setdefault(key, cell)
    return list(cells.values())
