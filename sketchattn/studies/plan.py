"""The plan of a study: its arguments, all of them checked before any work."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import numpy as np
import pandas as pd

from ..base.arguments import check_count, check_flag, check_name
from ..base.files import as_folder
from ..base.parallel import check_jobs, check_progress
from ..heads.inputs import as_heads, renamed
from ..problem import AttentionProblem
from ..zoo.base import Method
from .call import call_of
from .columns import BOUND_COLUMNS, FLOORS, REFERENCES, SHARE
from .distributed import check_cluster
from .grid import (
    LONG,
    LONG_ROWS,
    NOT_COMPARED,
    Cell,
    Variant,
    as_method,
    by_name,
    default_methods,
    default_ranks,
    label_of,
    make_cells,
)
from .ranks import Asked, asked_of, has_shares

if TYPE_CHECKING:
    from ..heads.container import Heads
    from ..theory.engine.curves import ErrorBound

# Heads above this length are told what takes long.
LARGE = 4096
# Entries of A over all cells from which processes for heads, which take seconds to start, pay.
LONG_STUDY = 1 << 29

HeadsLike = Union[  # noqa: UP007  # a name of Heads, which is not loaded here
    "Heads",
    AttentionProblem,
    Sequence[AttentionProblem | str | PathLike[str]],
    str,
    PathLike[str],
]
# By name, which may carry parameters, by class, or as an object; or a plain function.
MethodLike = str | type[Method] | Method | Callable[..., Any]
MethodsLike = (
    MethodLike | Mapping[str, MethodLike] | Sequence[MethodLike | tuple[str, MethodLike]] | None
)


class Here(NamedTuple):
    """What a study does on one head.

    ``asked``: ranks in order, each with the share that it was given as, NaN for none; ``rows``:
    exact rows that errors are from, all for None; ``without``: references that there are none of;
    ``cells``: the distinct computations, references first.
    """

    asked: list[Asked]
    rows: int | None
    without: frozenset[str]
    cells: list[Cell]


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
    ranks : list of int or float
        As given: floats are shares of the keys of each head.
    seeds : list of int
    here : dict from str to Here
        What is done on each head, by its name.
    spectral : bool
        Whether spectral norms are computed.
    notes, warnings : tuple of str
        What is not measured and why, and what takes long.
    bounds : pandas.DataFrame
        Bounds of claims, with the columns ``BOUND_COLUMNS``.
    jobs : int
        Heads that may be computed at the same time.
    folder : Path or None
        Where results go.
    cluster : distributed.Client, str or None
        Where cells are computed, if not here.
    resume, pictures, progress, report : bool
        Whether to take finished cells, to draw, to show a bar, and to write a report.
    call : str
        How the study was asked for.
    """

    problems: list[AttentionProblem]
    variants: list[Variant]
    references: list[Variant]
    left_out: dict[str, str]
    ranks: list[int | float]
    seeds: list[int]
    here: dict[str, Here]
    spectral: bool
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    bounds: pd.DataFrame
    jobs: int
    folder: Path | None
    cluster: Any
    resume: bool
    pictures: bool
    progress: bool
    report: bool
    call: str

    @property
    def shares(self) -> bool:
        """Whether a rank was given as a share of the keys."""
        return has_shares({name: here.asked for name, here in self.here.items()})

    @property
    def total(self) -> int:
        """Number of cells of all heads."""
        return sum(len(here.cells) for here in self.here.values())


def make_plan(
    heads: HeadsLike,
    *,
    methods: MethodsLike,
    ranks: float | Sequence[float] | None,
    seeds: int | Sequence[int],
    jobs: int | None,
    out: str | PathLike[str] | None,
    resume: bool,
    pictures: bool,
    progress: bool | None,
    bounds: str | Sequence[str] | None,
    report: bool,
    dask: object,
    floors: bool | Sequence[str],
    spectral: bool,
    rows: int | None,
) -> Plan:
    """Return the plan of a study; refuse every argument of ``study`` that does not fit."""
    problems = as_heads(heads, stored=True)
    given = as_ranks(ranks, problems)
    asked = asked_of(given, {str(p.name): p.n_k for p in problems})
    by_head = {name: list(dict.fromkeys(r for r, _ in own)) for name, own in asked.items()}
    chosen_seeds = as_seeds(seeds)
    check_jobs(jobs, "head")
    folder = as_folder(out)
    resume = check_flag(resume, "resume", "give True or False")
    pictures = check_flag(pictures, "pictures", "give True or False")
    report = check_flag(report, "report", "give True or False")
    show = check_progress(progress)
    cluster = check_cluster(dask)
    spectral = check_flag(spectral, "spectral", "give True or False")
    wanted = as_floors(floors)
    samples = as_rows(rows, problems)
    variants, left_out = as_methods(methods, problems, by_head, samples)
    limits = as_bounds(bounds, problems, variants, asked, samples)
    first = next(iter(by_head.values()))[0]
    references = [
        Variant.of(name, by_name(name, first))
        for name in REFERENCES
        if name in wanted or name not in FLOORS
    ]
    here = {}
    for name, sample in samples.items():
        without = frozenset(() if sample is None else NOT_SAMPLED)
        beside = [v for v in references if v.label not in without]
        how = (by_head[name], chosen_seeds, sample, spectral)
        cells = make_cells(beside, how[0], chosen_seeds[:1], *how[2:])
        taken = {cell.key for cell in cells}
        cells += [cell for cell in make_cells(variants, *how) if cell.key not in taken]
        here[name] = Here(asked[name], sample, without, cells)
    return Plan(
        problems=problems,
        variants=variants,
        references=references,
        left_out=left_out,
        ranks=given,
        seeds=chosen_seeds,
        here=here,
        spectral=spectral,
        notes=_notes(problems, samples, wanted),
        warnings=_warnings(problems, samples, wanted, spectral),
        bounds=limits,
        jobs=check_jobs(jobs, "head", long=_entries(problems, here) >= LONG_STUDY),
        folder=folder,
        cluster=cluster,
        resume=resume,
        pictures=pictures,
        progress=show,
        report=report,
        call=call_of(heads, methods=methods, ranks=ranks, seeds=seeds, bounds=bounds, out=out),
    )


def _entries(problems: Sequence[AttentionProblem], here: Mapping[str, Here]) -> int:
    """Return how many entries of A all cells of a study have together."""
    return sum(len(here[str(p.name)].cells) * p.n_q * p.n_k for p in problems)


# References that a sample of rows does not tell, or that cost what the sample saves.
NOT_SAMPLED = ("svd", "exact")


def as_floors(floors: Any) -> tuple[str, ...]:
    """Return the names of the floors to compute."""
    if isinstance(floors, bool | np.bool_):
        return FLOORS if floors else ()
    names = [floors] if isinstance(floors, str) else floors
    if not isinstance(names, Iterable):
        raise TypeError(
            f"floors must be True, False or names, got {type(floors).__name__}; "
            f"floors=('topk',) is one of them"
        )
    found = tuple(check_name(name, "floors", FLOORS) for name in names)
    return tuple(name for name in FLOORS if name in found)


def as_rows(rows: Any, problems: Sequence[AttentionProblem]) -> dict[str, int | None]:
    """Return how many rows of each head are sampled, None for those that are measured whole."""
    if rows is not None:
        rows = check_count(rows, "rows", "rows=512 samples so many rows of each head")
    found: dict[str, int | None] = {}
    for problem in problems:
        long = max(problem.n_q, problem.n_k) >= LONG
        asked = rows if rows is not None else LONG_ROWS if long else None
        few = asked is not None and asked < int((problem.visible_counts() > 0).sum())
        found[str(problem.name)] = asked if few else None
    return found


def _notes(
    problems: Sequence[AttentionProblem],
    samples: Mapping[str, int | None],
    floors: Sequence[str],
) -> tuple[str, ...]:
    """Return what is not measured on sampled heads, and why."""
    counts = sorted({rows for rows in samples.values() if rows is not None})
    if not counts:
        return ()
    where = "all heads" if None not in samples.values() else "the longer heads"
    noted = [
        f"errors of {where} are from {' or '.join(map(str, counts))} exact rows, the same for all "
        f"methods (rows= changes that); spectral norms and the worst row are NaN there, since no "
        f"sample of rows tells them"
    ]
    if "svd" in floors:
        noted.append(f"svd is left out on {where}: it needs the whole matrix")
    return tuple(noted)


def _warnings(
    problems: Sequence[AttentionProblem],
    samples: Mapping[str, int | None],
    floors: Sequence[str],
    spectral: bool,
) -> tuple[str, ...]:
    """Return what takes long on heads that are long and measured whole."""
    large = [p for p in problems if samples[str(p.name)] is None and max(p.n_q, p.n_k) > LARGE]
    if not large:
        return ()
    most = max(large, key=lambda p: p.n_q * p.n_k)
    slow = [*floors, *(["spectral norms"] if spectral else [])]
    what = f"; {', '.join(slow)} take longest" if slow else ""
    ways = [
        *(["floors=False (--no-floors)"] if floors else []),
        *(["spectral=False (--no-spectral)"] if spectral else []),
    ]
    leave = f" and {' and '.join(ways)} leave out what is dearest" if ways else ""
    return (
        f"each cell compares all {most.n_q} x {most.n_k} entries of {most.name!r}{what}: "
        f"rows=512 (--rows 512) takes a sample of rows{leave}",
    )


def _integers(values: Any, name: str, least: int) -> list[int]:
    """Return a sequence of distinct integers as a list."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(
            f"{name} must be a sequence of integers, got {type(values).__name__}; "
            f"put it into a list"
        )
    shares = ", or as shares of n_k such as 0.1" if name == "ranks" else ""
    found = [check_count(x, name, f"give {name} as integers{shares}", least) for x in values]
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


def as_ranks(ranks: Any, problems: Sequence[AttentionProblem]) -> list[int | float]:
    """Return the ranks as given, by default those that suit the smallest head; floats are shares.

    A share of the keys of each head is rounded to the nearest rank, halves up, and at least 1.
    """
    smallest = min(problems, key=lambda problem: problem.n_k)
    if ranks is None:
        return list(default_ranks(smallest.n_k))
    if isinstance(ranks, numbers.Integral | float | np.floating):
        ranks = [ranks]
    given = ranks if isinstance(ranks, str) or not isinstance(ranks, Iterable) else list(ranks)
    shares: list[float] = []
    if isinstance(given, list):
        shares = [_share(x) for x in given if isinstance(x, float | np.floating)]
    for i, x in enumerate(shares):
        if x in shares[:i]:
            raise ValueError(f"ranks must be distinct, got {x} twice; delete one of them")
    found: list[int | float]
    if not shares:
        found = list(_integers(given, "ranks", 1))
    else:
        rest = [x for x in given if not isinstance(x, float | np.floating)]
        whole = iter(_integers(rest, "ranks", 1) if rest else [])
        share = iter(shares)
        found = [next(share if isinstance(x, float | np.floating) else whole) for x in given]
    largest = max((x for x in found if not isinstance(x, float)), default=0)
    if largest > smallest.n_k:
        raise ValueError(
            f"ranks must be at most n_k = {smallest.n_k} of head {smallest.name!r}, got "
            f"{largest}; lower it or leave the head out"
        )
    return found


def _share(x: Any) -> float:
    """Return a share of the keys."""
    value = float(x)
    if not 0.0 < value <= 1.0:
        raise ValueError(
            f"ranks must be integers or shares in (0, 1] of the keys of each head, got {value}; "
            f"write a rank without a point"
        )
    return value


def as_methods(
    methods: Any,
    problems: Sequence[AttentionProblem],
    ranks: Mapping[str, Sequence[int]],
    samples: Mapping[str, int | None],
) -> tuple[list[Variant], dict[str, str]]:
    """Return the methods with their labels, and the default ones that were left out."""
    first = ranks[str(problems[0].name)][0]
    if methods is None:
        kept, left_out = [], {}
        for name in default_methods():
            variant = Variant.of(name, by_name(name, first))
            why = _unsuited(variant, problems, ranks, samples)
            if why is None:
                kept.append(variant)
            else:
                left_out[name] = why
        if not kept:
            reasons = "; ".join(f"{name} ({why})" for name, why in left_out.items())
            raise ValueError(
                f"methods must hold one that can honour all heads, got none by default: {reasons}"
            )
        return kept, NOT_COMPARED | left_out
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


def as_variants(methods: Any, rank: int) -> list[Variant]:
    """Return methods that were named with their labels; those that have a rank at this one."""
    if isinstance(methods, str | Method) or callable(methods):
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
        method = as_method(given, rank)
        label = label_of(given, method) if label is None else label
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


def _unsuited(
    variant: Variant,
    problems: Sequence[AttentionProblem],
    ranks: Mapping[str, Sequence[int]],
    samples: Mapping[str, int | None],
) -> str | None:
    """Return why a method is not among the default ones for these heads, None if it is."""
    traits = variant.method.traits
    causal = [p for p in problems if p.causal]
    if traits.causal_form and not causal:
        return "it makes another method causal, and no head is"
    if causal and not traits.causal:
        which = (
            f"{causal[0].name!r} is"
            if len(causal) == 1
            else f"{len(causal)} of {len(problems)} heads are"
        )
        return f"it sees all keys, and {which} causal"
    long = [p for p in problems if samples[str(p.name)] is not None]
    if traits.quadratic and long:
        return (
            f"it computes all {long[0].n_q} x {long[0].n_k} logits of {long[0].name!r}; name it in "
            f"methods to run it all the same"
        )
    refused = _refusal(variant, problems, ranks)
    return None if refused is None else f"head {refused[0]!r}: {refused[1]}"


def _refusal(
    variant: Variant, problems: Sequence[AttentionProblem], ranks: Mapping[str, Sequence[int]]
) -> tuple[str, TypeError | ValueError] | None:
    """Return the first head that a method cannot honour, and why."""
    name = ""
    try:
        for problem in problems:
            name = str(problem.name)
            variant.check(problem, ranks[name])
    except (TypeError, ValueError) as error:
        return name, error
    return None


def as_bounds(
    bounds: Any,
    problems: Sequence[AttentionProblem],
    variants: Sequence[Variant],
    asked: Mapping[str, Sequence[Asked]],
    samples: Mapping[str, int | None],
) -> pd.DataFrame:
    """Return the bounds of claims on every head at every rank; they need no draw.

    Of heads that are measured whole: bounds need norms of the matrix.
    """
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
    whole = [problem for problem in problems if samples[str(problem.name)] is None]
    if not whole:
        raise ValueError(
            "bounds must be of heads that are measured whole, got samples of rows of all of them; "
            "leave bounds out"
        )
    for problem in whole:
        copy = renamed(problem, str(problem.name))  # leaves the exact quantities behind
        for name, curve in curves.items():
            own = asked[str(problem.name)]
            at = {r: curve.at(copy, r) for r in dict.fromkeys(r for r, _ in own)}
            found[name] += [
                [name, labels[name], problem.name, r, curve.field, curve.what, at[r], share]
                for r, share in own
            ]
    for name, rows in found.items():
        if all(math.isnan(row[-2]) for row in rows):
            raise ValueError(
                f"bounds must apply to a head at one of the ranks, got {name!r}, which applies to "
                f"none; sketchattn.theory.check says why"
            )
    every = [row for rows in found.values() for row in rows]
    frame = pd.DataFrame(every, columns=[*BOUND_COLUMNS, SHARE]).astype({"bound": np.float64})
    return frame if has_shares(asked) else frame.drop(columns=SHARE)


def _error_bound(name: object) -> ErrorBound:
    from ..theory.engine.curves import error_bounds
    from ..theory.engine.registry import claims, near_ids

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
        raise ValueError(f"bounds must be ids of claims, got {name!r}{near_ids(name, known)}")
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
