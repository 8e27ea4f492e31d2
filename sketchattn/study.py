"""Studies: error against rank, for many heads and methods, in parallel and resumable.

A study is a grid heads x methods x ranks x seeds.  One worker handles one head, so that the exact
side is computed once a head; every finished cell is appended at once to the journal of its head,
and a study that is started again with the same folder takes what it finds there.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import os
import platform
import re
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import __version__
from ._files import write_bytes, write_text
from .methods import Method, make_method
from .methods import methods as registered
from .metrics import FIELDS, error_report
from .problem import AttentionProblem, closest

if TYPE_CHECKING:
    import pandas as pd

    from .heads import Heads
    from .theory import ErrorBound

FLOORS = ("svd", "topk")
PREDICTORS = ("zero", "vmean")
REFERENCES = (*FLOORS, *PREDICTORS)
COLUMNS = ("head", "method", "rank", "seed", *FIELDS, "seconds", "bytes", "effective_rank")

# Of the bounds of claims: ``bound`` is that of ``field``, below which lies ``what``.
BOUND_COLUMNS = ("claim", "method", "head", "rank", "field", "what", "bound")

# Fields of the summary; the others are in the frame.
MAIN_FIELDS = ("output_fro_rel", "matrix_fro_rel", "row_tv_mean", "skill")

# A cell is timed again while all its runs took less than this, three times at most.
TIMED_SECONDS = 0.05

MethodLike = str | Method
MethodsLike = (
    MethodLike | Mapping[str, MethodLike] | Sequence[MethodLike | tuple[str, MethodLike]] | None
)
Values = dict[str, Any]
# What a cell is known by inside the journal of its head: method with parameters, and seed.
Key = tuple[str, int | None]


# --- what a study returns -----------------------------------------------------------------------


@dataclass(frozen=True)
class StudyResult:
    """Hold the rows of a study and where they were written.

    Attributes
    ----------
    frame : pandas.DataFrame
        One row for each head, method, rank and seed, in this order; columns ``COLUMNS``.
    references : pandas.DataFrame
        The same columns for the floors ``svd`` and ``topk`` and the predictors ``zero`` and
        ``vmean``, at all ranks and one seed.
    left_out : dict from str to str
        Methods of the default choice that cannot honour all heads, and why.
    out : Path or None
        Folder with ``results.csv``, ``references.csv``, ``study.json`` and the pictures.
    pictures : tuple of Path
        One PNG for each error measure.
    computed, reused : int
        Cells that this call computed, and cells that it found in the folder.
    bounds : pandas.DataFrame
        Bounds of claims, those asked for, with the columns ``BOUND_COLUMNS``; ``bounds.csv`` in
        the folder.
    """

    frame: pd.DataFrame
    references: pd.DataFrame
    left_out: dict[str, str]
    out: Path | None
    pictures: tuple[Path, ...]
    computed: int
    reused: int
    bounds: pd.DataFrame

    def summary(self) -> pd.DataFrame:
        """Return medians and quartiles over heads and seeds, floors and predictors beside.

        Returns
        -------
        pandas.DataFrame
            One row for each method and rank: ``method``, ``role`` ("method", "floor" or
            "predictor"), ``rank`` (missing for predictors), then for each of ``MAIN_FIELDS`` its
            median and, with the endings ``_q25`` and ``_q75``, its quartiles, and the median
            ``seconds``.  Infinite values count as larger than all others, NaN does not count.
        """
        import pandas as pd

        rows: list[Values] = []
        roles = dict.fromkeys(FLOORS, "floor") | dict.fromkeys(PREDICTORS, "predictor")
        own = self.frame[~self.frame["method"].isin(REFERENCES)]
        for frame in (own, self.references):
            for (method, rank), part in frame.groupby(["method", "rank"], sort=False):
                role = roles.get(str(method), "method")
                if role == "predictor" and rank != frame["rank"].iloc[0]:
                    continue  # the same at every rank
                row: Values = {
                    "method": method,
                    "role": role,
                    "rank": None if role == "predictor" else rank,
                }
                for field in MAIN_FIELDS:
                    low, middle, high = quantiles(part[field].tolist(), (0.25, 0.5, 0.75))
                    row |= {field: middle, f"{field}_q25": low, f"{field}_q75": high}
                row["seconds"] = quantiles(part["seconds"].tolist(), (0.5,))[0]
                rows.append(row)
        return pd.DataFrame(rows).astype({"rank": "Int64"})

    def render(self) -> str:
        """Return the summary as text: medians, and the quartiles of the first field."""
        sizes = {name: self.frame[name].nunique() for name in ("head", "method", "rank", "seed")}
        counts = ", ".join(f"{n} {word}{'' if n == 1 else 's'}" for word, n in sizes.items())
        lines = [f"{counts}: medians [quartiles] over heads and seeds", ""]
        lines += _table_lines(self.summary())
        lines += [
            "",
            "svd: the best matrix of this rank, blind to V; topk: the largest entries of each row;",
            "zero, vmean: what an approximation must beat (skill 0 is the mean of V).",
        ]
        lines += [f"left out: {name} ({reason})" for name, reason in self.left_out.items()]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.render()


def quantiles(values: Iterable[float], levels: Sequence[float]) -> list[float]:
    """Return sample quantiles by linear interpolation that infinite values do not turn into NaN.

    Parameters
    ----------
    values : iterable of float
        NaN does not count; without any other value the quantiles are NaN.
    levels : sequence of float
        In [0, 1].

    Examples
    --------
    >>> quantiles([1.0, 2.0, float("inf"), float("inf")], (0.0, 0.5, 1.0))
    [1.0, inf, inf]
    """
    ordered = sorted(x for x in map(float, values) if not math.isnan(x))
    if not ordered:
        return [math.nan] * len(levels)
    found = []
    for level in levels:
        position = level * (len(ordered) - 1)
        below = ordered[math.floor(position)]
        above = ordered[math.ceil(position)]
        weight = position - math.floor(position)
        if below == above or weight == 0.0:
            found.append(below)
        elif math.isinf(below) or math.isinf(above):
            found.append(below if math.isinf(below) else above)
        else:
            found.append(below + weight * (above - below))
    return found


def _table_lines(table: pd.DataFrame) -> list[str]:
    """Return the summary as aligned lines with a header."""

    def number(x: float, digits: int = 3) -> str:
        return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{x:.{digits}g}").replace("e+", "e")

    first, *others = MAIN_FIELDS
    rows = [["method", "rank", first, *others, "seconds"]]
    groups = [""]
    for record in table.to_dict("records"):
        rank = "" if _is_missing(record["rank"]) else str(record["rank"])
        spread = ", ".join(number(record[first + end], 2) for end in ("_q25", "_q75"))
        cells = [str(record["method"]), rank, f"{number(record[first])} [{spread}]"]
        for field in others:
            x = record[field]
            # A skill of 1e-11 is rounding, an error of this size is not.
            small = field == "skill" and abs(x) < 5e-4
            cells.append("0" if small else number(x))
        rows.append([*cells, number(record["seconds"])])
        predictor = record["role"] == "predictor"
        groups.append("predictors" if predictor else f"{record['role']} {record['method']}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for i, row in enumerate(rows):
        if i > 1 and groups[i] != groups[i - 1]:
            lines.append("")
        parts = [row[0].ljust(widths[0])]
        parts += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(parts).rstrip())
    return lines


def _is_missing(x: object) -> bool:
    import pandas as pd

    return x is None or x is pd.NA


# --- what goes in: all refusals happen here, before any work ------------------------------------


def as_heads(heads: Any) -> list[AttentionProblem]:
    """Return what ``heads`` stands for as problems with distinct names.

    Parameters
    ----------
    heads : Heads, AttentionProblem, sequence of AttentionProblem, path, or name
        A string is the file of that name if there is one or if it ends in ``.safetensors`` or
        ``.npz``, otherwise the name of a bundled set.

    Raises
    ------
    TypeError, ValueError
        For anything else, an empty problem, a problem without values, or repeated names.
    """
    from .heads import load_heads, read_heads

    if isinstance(heads, PathLike):
        heads = read_heads(heads)
    elif isinstance(heads, str):
        named_file = Path(heads).suffix in (".safetensors", ".npz") or Path(heads).is_file()
        heads = read_heads(heads) if named_file else load_heads(heads)
    if isinstance(heads, AttentionProblem):
        heads = [heads]
    if not isinstance(heads, Iterable):
        raise TypeError(
            f"heads must be Heads, problems, a file or the name of a bundled set, got "
            f"{type(heads).__name__}; make problems with sketchattn.AttentionProblem(q, k, v)"
        )
    problems = list(heads)
    if not problems:
        raise ValueError("heads must hold at least one problem, got 0; give some")
    seen: set[str] = set()
    named = []
    for i, problem in enumerate(problems):
        if not isinstance(problem, AttentionProblem):
            raise TypeError(
                f"heads must hold AttentionProblem objects, got {type(problem).__name__} at "
                f"position {i}; make it with sketchattn.AttentionProblem(q, k, v)"
            )
        name = f"head{i}" if problem.name is None else problem.name
        if name in seen:
            raise ValueError(
                f"heads must have distinct names, got {name!r} twice; "
                f"give each problem a name of its own"
            )
        seen.add(name)
        if problem.v is None:
            raise ValueError(
                f"heads must have values for a study, got v=None in {name!r}; "
                f"make the problem with its values"
            )
        if problem.d_v == 0 or not problem.visible_counts().any():
            raise ValueError(
                f"heads must have a query that sees a key, and values of width 1 or more, got "
                f"n_q = {problem.n_q}, {len(problem.kept_keys)} visible keys and "
                f"d_v = {problem.d_v} in {name!r}; leave it out"
            )
        named.append(problem if problem.name is not None else _renamed(problem, name))
    return named


def _renamed(problem: AttentionProblem, name: str) -> AttentionProblem:
    return AttentionProblem(
        *problem.arrays,
        scale=problem.scale,
        causal=problem.causal,
        key_mask=problem.key_mask,
        name=name,
    )


def _integer(value: object, name: str, least: int, remedy: str) -> int:
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
    found = [_integer(x, name, least, f"give {name} as integers") for x in values]
    if not found:
        raise ValueError(f"{name} must hold at least one number, got none; leave {name} out")
    repeated = [x for i, x in enumerate(found) if x in found[:i]]
    if repeated:
        raise ValueError(f"{name} must be distinct, got {repeated[0]} twice; delete one of them")
    return found


def _as_seeds(seeds: Any) -> list[int]:
    if isinstance(seeds, numbers.Integral):
        return list(range(_integer(seeds, "seeds", 1, "seeds=1 is one run a cell")))
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


def _as_ranks(ranks: Any, problems: Sequence[AttentionProblem]) -> list[int]:
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
class _Variant:
    """A method under the label that it has in the study."""

    label: str
    method: Method
    ranked: bool
    randomized: bool
    oracle: bool

    @classmethod
    def of(cls, label: str, method: Method) -> _Variant:
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


def _by_name(name: str, rank: int) -> Method:
    cls = registered().get(name)
    takes_rank = cls is not None and "rank" in cls._get_param_names()
    return make_method(name, {"rank": rank} if takes_rank else {})


def default_methods() -> list[str]:
    """Return the registered methods that a study compares: no oracle, no predictor, not exact."""
    chosen = []
    for name in registered():
        traits = _by_name(name, 1).traits
        if name != "exact" and traits.uses_rank and not traits.oracle:
            chosen.append(name)
    return chosen


def _as_methods(
    methods: Any, problems: Sequence[AttentionProblem], ranks: Sequence[int]
) -> tuple[list[_Variant], dict[str, str]]:
    """Return the methods with their labels, and the default ones that were left out."""
    if methods is None:
        kept, left_out = [], {}
        for name in default_methods():
            variant = _Variant.of(name, _by_name(name, ranks[0]))
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
    variants: list[_Variant] = []
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(
                f"methods must be pairs (label, method) where they are tuples, got {len(pair)} "
                f"entries; write ('label', method)"
            )
        label, given = pair
        method = _by_name(given, ranks[0]) if isinstance(given, str) else make_method(given, {})
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
        variants.append(_Variant.of(label, method))
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
    variant: _Variant, problems: Sequence[AttentionProblem], ranks: Sequence[int]
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


def _as_bounds(
    bounds: Any,
    problems: Sequence[AttentionProblem],
    variants: Sequence[_Variant],
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
        copy = _renamed(problem, str(problem.name))  # leaves the exact quantities behind
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
    from .theory import claims, error_bounds

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


def _whose(curve: ErrorBound, variants: Sequence[_Variant]) -> str:
    """Return the label of the method that a bound is about."""
    for variant in variants:
        if curve.is_about(variant.method):
            return variant.label
    raise ValueError(
        f"bounds must be about a method of the study, got {curve.claim!r}, which is about {curve}; "
        f"add that method or leave the bound out"
    )


def as_folder(out: Any) -> Path | None:
    """Return a path that is a folder or nothing yet; refuse a file."""
    if out is None:
        return None
    if not isinstance(out, str | PathLike):
        raise TypeError(f"out must be a path, got {type(out).__name__}; name a folder")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {str(folder)!r}; name another")
    return folder


def _as_flag(value: object, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}; give True or False")
    return bool(value)


# --- cells --------------------------------------------------------------------------------------


class _Cell(NamedTuple):
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
    'sketchattn.methods.baselines.TopK(rank=4, renormalize=True)'
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


def _cells(variants: Sequence[_Variant], ranks: list[int], seeds: list[int]) -> list[_Cell]:
    """Return the distinct computations behind the rows of one head, and of its references."""
    cells: dict[Key, _Cell] = {}
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
                cell = _Cell(
                    key,
                    variant.label,
                    method,
                    rank if variant.ranked else None,
                    seed,
                    first if variant.oracle else method,
                )
                cells.setdefault(key, cell)
    return list(cells.values())


def _measure(problem: AttentionProblem, cell: _Cell, *, warm: bool) -> Values:
    """Return the values of one cell: what the error report says, and what it cost."""
    values = problem.values
    linear = cell.method.traits.matrix

    def run(method: Method) -> Any:
        """Return what is measured, Ahat or the output itself, after the output was computed."""
        if not linear:
            return method.attend(problem, rng=cell.seed)
        ahat = method.approximate(problem, rng=cell.seed)
        _ = ahat @ values
        return ahat

    if not warm:  # the first run of a method may compile kernels or decompose the exact matrix
        run(cell.first)
    times: list[float] = []
    while not times or (len(times) < 3 and sum(times) < TIMED_SECONDS):
        start = time.perf_counter()
        found = run(cell.method)
        times.append(time.perf_counter() - start)
    report = error_report(problem, found) if linear else error_report(problem, output=found)
    rank = found.effective_rank if linear else None
    return {
        **report.as_dict(),
        "seconds": statistics.median(times),
        "bytes": int(found.nbytes) if linear else None,
        "effective_rank": None if rank is None else int(rank),
    }


# --- journals -----------------------------------------------------------------------------------

# Neither JSON nor CSV has a word for numbers that are not finite that all readers share.
_SPELLED = ("inf", "-inf", "nan")


def encode(value: Any) -> Any:
    """Return a value for JSON: numbers that are not finite become "inf", "-inf" or "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def decode(value: Any) -> Any:
    """Return what `encode` was given."""
    return float(value) if value in _SPELLED else value


def _journal_name(problem: AttentionProblem) -> str:
    """Return a file name that heads share only if both their name and their content are equal."""
    slug = re.sub(r"[^A-Za-z0-9.-]+", "_", str(problem.name)).strip("._")[:60]
    digest = hashlib.sha256(f"{problem.name}\0{problem.digest}".encode()).hexdigest()
    return f"{slug}-{digest[:16]}.jsonl"


def _line(digest: str, cell: _Cell, values: Values) -> bytes:
    record = {
        "problem": digest,
        "method": cell.key[0],
        "rank": cell.rank,
        "seed": cell.key[1],
        "version": __version__,
        "values": {name: encode(x) for name, x in values.items()},
    }
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the record of one line, None if it is not whole."""
    try:
        record = json.loads(line)
        values = {name: decode(record["values"][name]) for name in COLUMNS[4:]}
        whole = all(
            isinstance(x, int | float) or (name in ("bytes", "effective_rank") and x is None)
            for name, x in values.items()
        )
        known = {"problem", "method", "seed", "version"} <= set(record)
    except (ValueError, KeyError, TypeError):
        return None
    return {**record, "values": values} if whole and known else None


def read_journal(path: Path, digest: str) -> dict[Key, Values]:
    """Return the finished cells of one head, and delete lines that are not whole.

    Parameters
    ----------
    path : Path
        Need not exist.
    digest : str
        ``problem.digest``; lines about other heads or written by other versions do not count.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    found: dict[Key, Values] = {}
    kept = []
    for line in raw.splitlines(keepends=True):
        record = _parse(line) if line.endswith(b"\n") else None
        if record is None:
            continue
        kept.append(line)
        if record["problem"] == digest and record["version"] == __version__:
            found.setdefault((record["method"], record["seed"]), record["values"])
    if len(whole := b"".join(kept)) != len(raw):
        write_bytes(path, whole)
    return found


def _append(path: Path, line: bytes) -> None:
    """Append one line in one write, so that a killed process leaves whole lines behind."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        written = os.write(handle, line)
        if written != len(line):
            raise OSError(f"{path} could not be written whole; free some space and start again")
    finally:
        os.close(handle)


# --- one study a folder -------------------------------------------------------------------------

_TOKEN = 32  # characters
_LOCKED_BYTE = 1 << 20  # behind the text: Windows refuses to read bytes that are locked

if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _holder(handle: int) -> list[str]:
    """Return token, host and process that a lock file names."""
    os.lseek(handle, 0, os.SEEK_SET)
    return os.read(handle, 1024).decode(errors="replace").split()


@contextmanager
def _lock(path: Path, folder: Path) -> Iterator[str]:
    """Hold a folder for this study and yield its token.

    The system releases the lock when the process ends, however it ends.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        for _ in range(20):  # a worker may be looking whether its study is alive
            if _try_lock(handle):
                break
            time.sleep(0.05)
        else:
            holder = _holder(handle)
            process = f"process {holder[2]}" if len(holder) == 3 else "another process"
            raise ValueError(
                f"out must be a folder that no other study writes to, got {str(folder)!r}, which "
                f"{process} holds; wait for it or name another folder"
            )
        token = uuid.uuid4().hex
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, f"{token} {_host()} {os.getpid()}\n".encode())
        yield token
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _host() -> str:
    return re.sub(r"\s", "_", platform.node()) or "unknown"


def _is_held(path: Path, token: str) -> bool:
    """Say whether the study that a worker belongs to still holds its folder.

    After a killed study its workers live on for a while; they must not write beside the study
    that continues it.
    """
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        holder = _holder(handle)
        if not holder or holder[0] != token:
            return False
        # Locks of another machine may be invisible here; then the token decides alone.
        return holder[1] != _host() or not _try_lock(handle)
    finally:
        os.close(handle)


# --- work ---------------------------------------------------------------------------------------


class _Task(NamedTuple):
    problem: AttentionProblem
    cells: list[_Cell]
    journal: Path
    lock: Path
    token: str
    jobs: int


def _run_head(task: _Task) -> tuple[str, dict[Key, Values]]:
    """Compute the cells of one head, append each to its journal, and return them."""
    from .kernels._threads import blas_single_thread, cpu_count, limit_threads

    problem = task.problem
    found: dict[Key, Values] = {}
    warmed: set[str] = set()
    shared = task.lock.exists()  # a worker on another machine may not see the folder
    with ExitStack() as stack:
        if task.jobs > 1:
            stack.enter_context(limit_threads(max(1, cpu_count() // task.jobs)))
        # Decompositions round differently with another number of BLAS threads, and results must
        # not depend on ``jobs``.
        stack.enter_context(blas_single_thread())
        for cell in task.cells:
            if shared and not _is_held(task.lock, task.token):
                raise RuntimeError(
                    f"study must hold its folder {str(task.lock.parent.parent)!r} while it runs, "
                    f"got a lock that is lost; start it again to continue"
                )
            try:
                values = _measure(problem, cell, warm=cell.label in warmed)
            except Exception as error:
                at = "" if cell.rank is None else f", rank {cell.rank}"
                raise RuntimeError(
                    f"method {cell.label!r} failed on head {problem.name!r}{at}, seed "
                    f"{cell.seed}: {type(error).__name__}: {error}"
                ) from error
            warmed.add(cell.label)
            found[cell.key] = values
            if shared:
                _append(task.journal, _line(problem.digest, cell, values))
    return str(problem.name), found


class _Progress:
    """Show finished cells and the time left on stderr, by watching journals grow."""

    def __init__(self, journals: Sequence[Path], total: int, done: int, show: bool) -> None:
        self._sizes = {path: path.stat().st_size if path.exists() else 0 for path in journals}
        self._lines = 0
        self._returned = 0
        self._shown = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._bar: Any = None
        self._thread: threading.Thread | None = None
        if show:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=done,
                desc="study",
                unit="cell",
                file=sys.stderr,
                dynamic_ncols=True,
                smoothing=0.05,
            )
            self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Progress:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._show()
            self._bar.close()

    def returned(self, cells: int) -> None:
        """Count the cells of a finished head, whose journal may be on another machine."""
        with self._lock:
            self._returned += cells

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self._show()

    def _show(self) -> None:
        for path, size in self._sizes.items():
            try:
                with path.open("rb") as file:
                    file.seek(size)
                    fresh = file.read()
            except FileNotFoundError:
                continue
            self._lines += fresh.count(b"\n")
            self._sizes[path] = size + len(fresh)
        with self._lock:
            done = max(self._lines, self._returned)
        self._bar.update(done - self._shown)
        self._shown = done


def study(
    heads: Heads | AttentionProblem | Sequence[AttentionProblem] | str | PathLike[str],
    methods: MethodsLike = None,
    ranks: Sequence[int] | None = None,
    seeds: int | Sequence[int] = 4,
    jobs: int = 1,
    out: str | PathLike[str] | None = None,
    *,
    resume: bool = True,
    pictures: bool = True,
    progress: bool | None = None,
    bounds: str | Sequence[str] | None = None,
) -> StudyResult:
    """Measure error against rank: every method on every head, at every rank, for every seed.

    Each cell is ``error_report(problem, method.approximate(problem, rng=seed))``.  The floors
    ``svd`` and ``topk`` and the predictors ``zero`` and ``vmean`` are always computed beside.

    Parameters
    ----------
    heads : Heads, AttentionProblem, sequence of AttentionProblem, path, or name
        A file (``.safetensors`` or ``.npz``), or the name of a bundled set such as "minilm".
    methods : names, method objects, pairs (label, method), or mapping from labels, optional
        Parameters other than ``rank`` are those of the object.  By default all registered methods
        but ``exact``, floors and predictors; those that cannot honour all heads are left out and
        named in the result.
    ranks : sequence of int, optional
        In 1..n_k of every head; by default powers of two from 8 to n_k / 2.
    seeds : int or sequence of int, default 4
        A number s stands for the seeds 0..s-1.
    jobs : int, default 1
        Heads that are computed at the same time.  Each takes its share of the threads.  The
        numbers do not depend on it, ``seconds`` does.
    out : path, optional
        Folder for ``results.csv``, ``references.csv``, ``study.json``, one PNG for each error
        measure, and the journals in ``cells``.
    resume : bool, default True
        Take the cells that the folder holds from an earlier study, finished or killed, of the
        same heads, methods with the same parameters, seeds and library version; ``False``
        computes all of them again.  Code that you changed without its version is not noticed.
    pictures : bool, default True
        Draw the pictures into ``out``.
    progress : bool, optional
        Show a bar with the time left on stderr; by default where stderr is a terminal.
    bounds : id or sequence of ids, optional
        Claims of ``sketchattn.theory.error_bounds()`` whose bounds are drawn over the measured
        curves, each on the error measure that it is about and in the colour of its method.

    Returns
    -------
    StudyResult
        ``frame``, ``references``, ``summary()``; prints as a table.

    Raises
    ------
    TypeError, ValueError
        Before any work, for a method that cannot honour a head, ranks above n_k, repeated names,
        empty heads, heads without values, unknown names, a bound that is about no error measure
        or about none of the methods, or a folder that another study holds.
    RuntimeError
        If a method fails on a head.  Finished cells stay in the folder.

    Notes
    -----
    A method without a matrix (``traits.matrix`` is False) is measured by its output: errors of the
    matrix are NaN, ``bytes`` and ``effective_rank`` are missing.

    A deterministic method is computed once and its row repeated for every seed; one without a rank
    once for every rank.  ``seconds`` is the median time of ``approximate`` and one product with V
    after a first untimed run, with other heads running beside it where ``jobs > 1``; for floors
    the exact matrix is already decomposed, so that theirs mean nothing.  BLAS runs on one thread.

    Heads are distributed by ``joblib.Parallel`` on its current backend:
    ``with joblib.parallel_config("dask"): study(...)`` runs on a cluster.

    Examples
    --------
    >>> import sketchattn as sa
    >>> heads = sa.make_heads("clustered", n=64, d=8, heads=2, rng=0)
    >>> result = sa.study(heads, methods=["uniform"], ranks=[8, 16], seeds=3)
    >>> result.frame.shape
    (12, 17)
    >>> float(result.frame["output_fro_rel"].median()) < 1
    True
    """
    problems = as_heads(heads)
    chosen_ranks = _as_ranks(ranks, problems)
    chosen_seeds = _as_seeds(seeds)
    workers = _integer(jobs, "jobs", 1, "jobs=1 computes one head after the other")
    folder = as_folder(out)
    resume = _as_flag(resume, "resume")
    pictures = _as_flag(pictures, "pictures")
    show = (
        sys.stderr is not None and sys.stderr.isatty()
        if progress is None
        else _as_flag(progress, "progress")
    )
    variants, left_out = _as_methods(methods, problems, chosen_ranks)
    limits = _as_bounds(bounds, problems, variants, chosen_ranks)
    references = [_Variant.of(name, _by_name(name, chosen_ranks[0])) for name in REFERENCES]
    cells = _cells(references, chosen_ranks, chosen_seeds[:1])
    taken = {cell.key for cell in cells}
    cells += [c for c in _cells(variants, chosen_ranks, chosen_seeds) if c.key not in taken]

    with ExitStack() as stack:
        if folder is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sketchattn-")))
        else:
            work = folder
        journals = work / "cells"
        journals.mkdir(parents=True, exist_ok=True)
        token = stack.enter_context(_lock(journals / ".lock", work))
        paths = {str(p.name): journals / _journal_name(p) for p in problems}
        if not resume:
            for path in paths.values():
                path.unlink(missing_ok=True)
        found = {str(p.name): read_journal(paths[str(p.name)], p.digest) for p in problems}
        pending = {
            name: [cell for cell in cells if cell.key not in done] for name, done in found.items()
        }
        total = len(problems) * len(cells)
        computed = sum(map(len, pending.values()))
        busy = [p for p in problems if pending[str(p.name)]]
        workers = min(workers, max(1, len(busy)))
        tasks = (
            # A copy leaves the exact quantities of one head behind when its cells are done.
            _Task(
                _renamed(p, str(p.name)),
                pending[str(p.name)],
                paths[str(p.name)],
                journals / ".lock",
                token,
                workers,
            )
            for p in busy
        )
        with _Progress(list(paths.values()), total, total - computed, show) as bar:
            for name, fresh in _in_parallel(tasks, workers):
                found[name].update(fresh)
                bar.returned(len(fresh))
        frame = _frame(problems, variants, chosen_ranks, chosen_seeds, found)
        beside = _frame(problems, references, chosen_ranks, chosen_seeds[:1], found)
        drawn: list[Path] = []
        if folder is not None:
            _write_csv(folder / "results.csv", frame)
            _write_csv(folder / "references.csv", beside)
            if len(limits):
                _write_csv(folder / "bounds.csv", limits)
            else:  # of an earlier study
                (folder / "bounds.csv").unlink(missing_ok=True)
            if pictures:
                from .plots import plot_study

                drawn = plot_study(frame, beside, folder, limits)
            settings = {
                "version": __version__,
                "heads": [_describe_head(p) for p in problems],
                "methods": {v.label: describe_method(v.method) for v in variants},
                "left_out": left_out,
                "ranks": chosen_ranks,
                "seeds": chosen_seeds,
                "bounds": list(dict.fromkeys(limits["claim"])),
                "jobs": int(jobs),
                "machine": _machine(),
            }
            write_text(folder / "study.json", json.dumps(settings, indent=2) + "\n")
        return StudyResult(
            frame, beside, left_out, folder, tuple(drawn), computed, total - computed, limits
        )


def _in_parallel(tasks: Iterator[_Task], workers: int) -> Iterator[tuple[str, dict[Key, Values]]]:
    """Yield the results of heads as they are finished."""
    from joblib import Parallel, delayed

    # Heads travel whole: memory-mapped files of the parent would not reach other machines.
    parallel = Parallel(n_jobs=workers, return_as="generator_unordered", max_nbytes=None)
    results = parallel(delayed(_run_head)(task) for task in tasks)
    try:
        yield from results
    finally:
        results.close()  # an interruption ends the workers too


def _frame(
    problems: Sequence[AttentionProblem],
    variants: Sequence[_Variant],
    ranks: Sequence[int],
    seeds: Sequence[int],
    found: Mapping[str, Mapping[Key, Values]],
) -> pd.DataFrame:
    """Return the full grid in order: head, method, rank, seed."""
    import pandas as pd

    rows: list[list[Any]] = []
    keys = {(v.label, rank): describe_method(v.at(rank)) for v in variants for rank in ranks}
    for problem in problems:
        done = found[str(problem.name)]
        for variant in variants:
            for rank in ranks:
                for seed in seeds:
                    own = seed if variant.randomized else None
                    values = done[keys[variant.label, rank], own]
                    rows.append(
                        [problem.name, variant.label, rank, seed]
                        + [values[name] for name in COLUMNS[4:]]
                    )
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    kinds: dict[str, Any] = dict.fromkeys(FIELDS, np.float64)
    kinds["effective_rank"] = "Int64"
    if frame["bytes"].isna().any():
        kinds["bytes"] = "Int64"
    return frame.astype(kinds)


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a frame so that reading gives the same numbers: "inf", "nan", or empty for no rank."""
    import csv
    import io

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(frame.columns)
    for row in frame.itertuples(index=False):
        writer.writerow("" if _is_missing(x) else x for x in row)
    write_text(path, buffer.getvalue())


def _describe_head(problem: AttentionProblem) -> dict[str, Any]:
    return {
        "name": problem.name,
        "n_q": problem.n_q,
        "n_k": problem.n_k,
        "d": problem.d,
        "d_v": problem.d_v,
        "dtype": problem.dtype.name,
        "scale": problem.scale,
        "causal": problem.causal,
        "kept_keys": len(problem.kept_keys),
        "digest": problem.digest,
    }


def _machine() -> dict[str, Any]:
    from .bench import machine

    return machine()
