"""The registry of claims: each with its assumptions and the function that observes it."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ...base.arguments import check_name, closest, guesses
from ...errors.reports import FIELDS
from .instances import Instance
from .records import KINDS, STATUSES, VERDICTS, Claim, Curve, Observations
from .topics import ENGINE, load

# --- what an observer is given and gives --------------------------------------------------------


class Assumption(NamedTuple):
    """Pair the text of an assumption with its test, which returns the reason of a failure."""

    text: str
    test: Callable[[Instance], str | None]


class Stop(Exception):  # noqa: N818  (control flow, not an error)
    """End an observation early."""


class NotApplicable(Stop):
    """Say that a condition of the claim fails."""


class Vacuous(Stop):
    """Say that the claim promises nothing here, and what it puts in its place."""

    def __init__(self, reason: str, bound: float, rank: int | None, delta: float | None) -> None:
        super().__init__(reason)
        self.bound, self.rank, self.delta = bound, rank, delta


OperatorFactory = Callable[..., Any]


@dataclass
class Context:
    """Give an observer its problem, its trials and its random operators.

    Attributes
    ----------
    instance : Instance
        The matrices ``a`` (m, n) and ``v`` (n, d_v) in float64, and ``problem``, None for a pair.
    trials : int
        How many observations to make; 0 asks for the bound alone.
    factory : callable
        ``factory(kind, r, n, rng, **parameters)`` makes a random S (r, n).

    Examples
    --------
    What an observer does, here for ``|S x|^2 <= 2 |x|^2`` with the first column x of V:

    >>> import numpy as np, sketchattn as sa
    >>> @sa.theory.claim(
    ...     "mine.norm", title="A norm survives", statement="P(|S x|^2 > 2 |x|^2) <= delta",
    ...     kind="tail", observes="|S x|^2 / |x|^2",
    ... )
    ... def observe(context, *, rank=64, delta=0.1):
    ...     x = context.instance.v[:, 0]
    ...     context.require(x.any(), "the first column of V is zero")
    ...     seen = []
    ...     for rng in context.generators():
    ...         s = context.operator("gaussian", rank, context.instance.n, rng)
    ...         seen.append(np.sum(s.apply(x[:, None]) ** 2) / (x @ x))
    ...     return sa.theory.Observations(seen, 2.0, delta=delta, rank=rank)
    >>> print(sa.theory.check("mine.norm", "reference").status)
    holds
    """

    instance: Instance
    trials: int
    entropy: int
    key: tuple[int, ...]
    factory: OperatorFactory
    audits: dict[str, tuple[float, list[float]]] = field(default_factory=dict)
    fingerprints: list[tuple[float, float]] = field(default_factory=list)

    def generators(self) -> Iterator[np.random.Generator]:
        """Yield one independent generator for each trial, the same for the same seed."""
        for i in range(self.trials):
            yield np.random.default_rng(
                np.random.SeedSequence(self.entropy, spawn_key=(*self.key, i))
            )

    def operator(
        self, kind: str, r: int, n: int, rng: np.random.Generator, **parameters: Any
    ) -> Any:
        """Return a random S (r, n) with ``E[S^T S] = I``."""
        return self.factory(kind, r, n, rng, **parameters)

    def audit(self, name: str, value: float, target: float) -> None:
        """Record one trial of a quantity whose mean is ``target`` for the operators meant."""
        self.audits.setdefault(name, (target, []))[1].append(value)

    def fingerprint(self, value: float, chance: float = 0.0) -> None:
        """Record a number that two independent draws share with at most this chance."""
        self.fingerprints.append((value, chance))

    def require(self, condition: bool, reason: str) -> None:
        """End with "not applicable" unless a condition on problem and parameters holds."""
        if not condition:
            raise NotApplicable(reason)

    def below(self, rank: int, n: int, bound: float, delta: float | None = None) -> None:
        """End with "vacuous" where as many rows are asked for as the problem has columns."""
        if rank >= n:
            raise Vacuous(
                f"asks rank r = {rank} >= n = {n}, where the exact product costs no more",
                bound,
                rank,
                delta,
            )


Observer = Callable[..., Observations]

# --- registering and finding --------------------------------------------------------------------


class Entry(NamedTuple):
    """Hold a registered claim with what the engine needs beside its text."""

    claim: Claim
    observe: Observer
    assumptions: tuple[Assumption, ...]
    parameters: Mapping[str, Any]
    ladder: tuple[Mapping[str, Any], ...]
    effects: Mapping[str, float] = MappingProxyType({})
    own: bool = False


_ENTRIES: dict[str, Entry] = {}


def claim(
    id: str,  # noqa: A002  (the name of the field)
    *,
    title: str,
    statement: str,
    kind: str,
    observes: str,
    source: str = "own",
    status: str = "own",
    recorded: Mapping[str, str] | None = None,
    assumptions: Sequence[Assumption] = (),
    constants: Mapping[str, float] | None = None,
    ladder: Sequence[Mapping[str, Any]] = (),
    effects: Mapping[str, float] | None = None,
    curve: Curve | None = None,
) -> Callable[[Observer], Observer]:
    """Register the observer of a claim.

    `bound_claim` does it in one call where the claim is a bound of an error of a method.

    Parameters
    ----------
    id, title, statement, kind, observes, source, status
        As in `Claim`.
    recorded : mapping, optional
        As in `Claim`; without it the claim is checked on all instances and all heads, and no
        verdict differs from a record.
    assumptions : sequence of Assumption
    constants : mapping, optional
        Constants of the theorem; numeric parameters of the observer are added.
    ladder : sequence of mappings
        Parameters of the steps of its picture, from few to many rows.
    effects : mapping, optional
        How far a refuted claim is off on named instances, where that takes some trials to see: of a
        mean the difference from its target in standard deviations of one trial, otherwise the
        share of observations beyond the bound.
    curve : Curve, optional
        Which measured curve the claim bounds, for pictures of studies.

    Returns
    -------
    callable
        Decorator of ``observe(context, *, parameter=default, ...) -> Observations``, whose
        keyword-only parameters are those of the claim.

    Raises
    ------
    ValueError
        For an unknown kind, status or verdict, a curve of no method or no error, and an id that is
        taken: of your own claims the last one counts.

    Examples
    --------
    An observer is given a `Context`: the matrices of the problem, its trials, each with a
    generator of its own, and random operators.  It returns one number a trial and what the claim
    puts against it:

    >>> import numpy as np, sketchattn as sa
    >>> @sa.theory.claim(
    ...     "mine.rows", title="Rows sum to one", kind="inequality",
    ...     statement="| sum_j A_ij - 1 | <= tol", observes="max_i | sum_j A_ij - 1 |",
    ... )
    ... def observe(context, *, tol=1e-6):
    ...     sums = context.instance.a.sum(axis=1)
    ...     return sa.theory.Observations([float(np.abs(sums - 1).max())], tol)
    >>> print(sa.theory.check("mine.rows", "reference").status)
    holds
    """
    check_fields(id, status, kind, recorded or {})

    def register(observe: Observer) -> Observer:
        parameters = {
            name: p.default
            for name, p in inspect.signature(observe).parameters.items()
            if p.kind is p.KEYWORD_ONLY
        }
        record = Claim(
            id,
            title,
            " ".join(statement.split()),
            source,
            status,
            kind,
            observes,
            tuple(a.text for a in assumptions),
            MappingProxyType(dict(recorded or {})),
            MappingProxyType({**(constants or {}), **numeric(parameters)}),
            curve,
        )
        module = str(getattr(observe, "__module__", ""))
        own = not module.startswith(f"{ENGINE.rpartition('.')[0]}.")
        if own and curve is not None:
            check_curve(curve, parameters)
        off = dict(effects or {})
        enter(Entry(record, observe, tuple(assumptions), parameters, tuple(ladder), off, own))
        return observe

    return register


def check_fields(id: str, status: str, kind: str, recorded: Mapping[str, str]) -> None:  # noqa: A002
    """Refuse what is no field of a claim."""
    for value, name, known in ((status, "status", STATUSES), (kind, "kind", KINDS)):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}; choose one")
    wrong = [x for x in recorded.values() if x not in VERDICTS]
    if wrong:
        raise ValueError(f"recorded must hold verdicts, got {wrong[0]!r}; choose from {VERDICTS}")
    if "." not in id:
        raise ValueError(f"id must be topic.name, got {id!r}; name the topic")


def check_curve(curve: Curve, parameters: Mapping[str, Any]) -> None:
    """Refuse a curve that no study measures: of no method, of no error, or without a rank."""
    from ...zoo.base import Method, methods

    check_name(curve.field, "the field of curve", FIELDS)
    cls: Any = curve.method
    if isinstance(cls, str):
        cls = methods()[check_name(cls, "the method of curve", tuple(methods()))]
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise TypeError(
            f"curve must be of a method, got {type(cls).__name__}; give its name or its class"
        )
    known = cls._get_param_names()
    for name in curve.parameters or {}:
        if name not in known:
            raise ValueError(
                f"curve must have parameters of method {curve.name!r}, got {name!r}"
                f"{closest(str(name), known)}"
            )
    if "rank" not in parameters:
        raise TypeError(
            "curve must be of an observer with the parameter rank, got none; write "
            "observe(context, *, rank=None)"
        )


def numeric(parameters: Mapping[str, Any]) -> dict[str, float]:
    """Return the parameters that are numbers."""
    return {
        name: float(x)
        for name, x in parameters.items()
        if isinstance(x, numbers.Real) and not isinstance(x, bool)
    }


def enter(entry: Entry) -> None:
    """Register a claim; one of the user's replaces another of the user's."""
    name = entry.claim.id
    if entry.own:
        load()
    if name in _ENTRIES and not (entry.own and _ENTRIES[name].own):
        raise ValueError(f"id must be unique, got {name!r} twice; rename one")
    _ENTRIES[name] = entry


def claims() -> dict[str, Claim]:
    """Return all claims as a dictionary from ids to records, in alphabetical order.

    Examples
    --------
    >>> import sketchattn.theory
    >>> sketchattn.theory.claims()["sketching.moment_gaussian"].kind
    'equality'
    """
    load()
    return {name: _ENTRIES[name].claim for name in sorted(_ENTRIES)}


def own_entries(names: Iterable[str]) -> tuple[Entry, ...]:
    """Return those of the named claims that are the user's: other processes do not know them."""
    return tuple(_ENTRIES[name] for name in names if _ENTRIES[name].own)


def adopt(entries: Iterable[Entry]) -> None:
    """Register claims of the user that came from another process."""
    for entry in entries:
        _ENTRIES[entry.claim.id] = entry


def get_entry(id: str) -> Entry:  # noqa: A002  (the name of the field)
    """Return a registered claim with its observer; refuse an unknown id."""
    load()
    if not isinstance(id, str):
        raise TypeError(
            f"id must be a string, got {type(id).__name__}; see sketchattn.theory.claims()"
        )
    if id not in _ENTRIES:
        raise ValueError(f"id must be that of a claim, got {id!r}{near_ids(id, _ENTRIES)}")
    return _ENTRIES[id]


def near_ids(name: str, known: Iterable[str]) -> str:
    """Return the nearest ids, and how claims of one's own are made known."""
    return guesses(name, known) + how_to_import(name)


def how_to_import(name: str) -> str:
    """Return how a claim of one's own is made known, where no claim has the topic of this name."""
    if name.partition(".")[0] in {x.partition(".")[0] for x in claims()}:
        return ""
    return " (claims of your own are registered first: --import FILE.py)"
