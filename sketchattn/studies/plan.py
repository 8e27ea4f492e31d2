"""The plan of a study: its arguments, all of them checked before any work."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..base.arguments import check_count, check_flag, closest
from ..base.files import as_folder
from ..base.parallel import check_jobs, check_progress
from ..heads.inputs import as_heads, renamed
from ..problem import AttentionProblem
from ..zoo.base import Method, make_method
from .grid import Cell, Variant, by_name, default_methods, default_ranks, make_cells
from .summary import BOUND_COLUMNS, REFERENCES

if TYPE_CHECKING:
    from ..heads.container import Heads
    from ..theory.engine.curves import ErrorBound

MethodLike = str | Method
MethodsLike = (
    MethodLike | Mapping[str, MethodLike] | Sequence[MethodLike | tuple[str, MethodLike]] | None
)


@dataclass(frozen=True)
class Plan:
    """Hold what a study does, all of it valid.

    Attributes
    ----------
    problems : list of AttentionProblem
        With names that are distinct.
    variants, references : list of Variant
        The methods, and the floors and predictors beside them.
    left_out : dict from str to str
        Methods of the default choice that cannot honour all heads, and why.
    ranks, seeds : list of int
    cells : list of Cell
        The distinct computations on each head, references first.
    bounds : pandas.DataFrame
        Bounds of claims, with the columns ``BOUND_COLUMNS``.
    jobs : int
        Heads that may be computed at the same time.
    folder : Path or None
        Where results go.
    resume, pictures, progress : bool
        Whether to take finished cells, to draw, and to show a bar.
    """

    problems: list[AttentionProblem]
    variants: list[Variant]
    references: list[Variant]
    left_out: dict[str, str]
    ranks: list[int]
    seeds: list[int]
    cells: list[Cell]
    bounds: pd.DataFrame
    jobs: int
    folder: Path | None
    resume: bool
    pictures: bool
    progress: bool


def make_plan(
    heads: Heads | AttentionProblem | Sequence[AttentionProblem] | str | PathLike[str],
    *,
    methods: MethodsLike,
    ranks: Sequence[int] | None,
    seeds: int | Sequence[int],
    jobs: int,
    out: str | PathLike[str] | None,
    resume: bool,
    pictures: bool,
    progress: bool | None,
    bounds: str | Sequence[str] | None,
) -> Plan:
    """Return the plan of a study; refuse every argument of ``study`` that does not fit."""
    problems = as_heads(heads)
    chosen_ranks = as_ranks(ranks, problems)
    chosen_seeds = as_seeds(seeds)
    workers = check_jobs(jobs, "head")
    folder = as_folder(out)
    resume = check_flag(resume, "resume", "give True or False")
    pictures = check_flag(pictures, "pictures", "give True or False")
    show = check_progress(progress)
    variants, left_out = as_methods(methods, problems, chosen_ranks)
    limits = as_bounds(bounds, problems, variants, chosen_ranks)
    references = [Variant.of(name, by_name(name, chosen_ranks[0])) for name in REFERENCES]
    cells = make_cells(references, chosen_ranks, chosen_seeds[:1])
    taken = {cell.key for cell in cells}
    cells += [c for c in make_cells(variants, chosen_ranks, chosen_seeds) if c.key not in taken]
    return Plan(
        problems=problems,
        variants=variants,
        references=references,
        left_out=left_out,
        ranks=chosen_ranks,
        seeds=chosen_seeds,
        cells=cells,
        bounds=limits,
        jobs=workers,
        folder=folder,
        resume=resume,
        pictures=pictures,
        progress=show,
    )


def _integers(values: Any, name: str, least: int) -> list[int]:
    """Return a sequence of distinct integers as a list."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(
            f"{name} must be a sequence of integers, got {type(values).__name__}; "
            f"put it into a list"
        )
    found = [check_count(x, name, f"give {name} as integers", least) for x in values]
    if not found:
        raise ValueError(f"{name} must hold at least one number, got none; leave {name} out")
    repeated = [x for i, x in enumerate(found) if x in found[:i]]
    if repeated:
        raise ValueError(f"{name} must be distinct, got {repeated[0]} twice; delete one of them")
    return found


def as_seeds(seeds: Any) -> list[int]:
    """Return the seeds; a number s stands for 0..s-1."""
    if isinstance(seeds, numbers.Integral):
        return list(range(check_count(seeds, "seeds", "seeds=1 is one run a cell")))
    return _integers(seeds, "seeds", 0)


def as_ranks(ranks: Any, problems: Sequence[AttentionProblem]) -> list[int]:
    """Return the ranks, by default those that suit the smallest head."""
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


def as_methods(
    methods: Any, problems: Sequence[AttentionProblem], ranks: Sequence[int]
) -> tuple[list[Variant], dict[str, str]]:
    """Return the methods with their labels, and the default ones that were left out."""
    first = ranks[0]
    if methods is None:
        kept, left_out = [], {}
        for name in default_methods():
            variant = Variant.of(name, by_name(name, ranks[0]))
            if variant.method.traits.causal_form and not any(p.causal for p in problems):
                left_out[name] = "it makes another method causal, and no head is"
                continue
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
    variants = as_variants(methods, first)
    for variant in variants:
        refused = _refusal(variant, problems, ranks)
        if refused is not None:
            head, error = refused
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"methods must honour all heads, got {variant.label!r} with head {head!r}: {error}"
            ) from error
    return variants, {}


def as_variants(methods: Any, first: int) -> list[Variant]:
    """Return methods that were named, with their labels and, for now, the rank ``first``."""
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
        method = by_name(given, first) if isinstance(given, str) else make_method(given, {})
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
    return variants


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
