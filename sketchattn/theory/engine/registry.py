"""The registry of claims: each with its assumptions and the function that observes it."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ...base.arguments import closest
from .instances import Instance
from .records import KINDS, STATUSES, VERDICTS, Claim, Observations
from .topics import load

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
        The matrices A (m, n) and V (n, d_v), or the problem itself.
    trials : int
    factory : callable
        ``factory(kind, r, n, rng, **parameters)`` makes a random S (r, n).
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


_ENTRIES: dict[str, Entry] = {}


def claim(
    id: str,  # noqa: A002  (the name of the field)
    *,
    title: str,
    statement: str,
    source: str,
    status: str,
    kind: str,
    observes: str,
    recorded: Mapping[str, str],
    assumptions: Sequence[Assumption] = (),
    constants: Mapping[str, float] | None = None,
    ladder: Sequence[Mapping[str, Any]] = (),
    effects: Mapping[str, float] | None = None,
) -> Callable[[Observer], Observer]:
    """Register the observer of a claim.

    Parameters
    ----------
    id, title, statement, source, status, kind, observes, recorded
        As in `Claim`.
    assumptions : sequence of Assumption
    constants : mapping, optional
        Constants of the theorem; numeric parameters of the observer are added.
    ladder : sequence of mappings
        Parameters of the steps of its picture, from few to many rows.
    effects : mapping, optional
        How far a refuted claim is off on named instances, where that takes some trials to see: of a
        mean the difference from its target in standard deviations of one trial, otherwise the
        share of observations beyond the bound.

    Returns
    -------
    callable
        Decorator of ``observe(context, *, parameter=default, ...) -> Observations``, whose
        keyword-only parameters are those of the claim.
    """
    for value, name, known in ((status, "status", STATUSES), (kind, "kind", KINDS)):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}; choose one")
    wrong = [x for x in recorded.values() if x not in VERDICTS]
    if wrong:
        raise ValueError(f"recorded must hold verdicts, got {wrong[0]!r}; choose from {VERDICTS}")
    if "." not in id:
        raise ValueError(f"id must be topic.name, got {id!r}; name the topic")

    def register(observe: Observer) -> Observer:
        if id in _ENTRIES:
            raise ValueError(f"id must be unique, got {id!r} twice; rename one")
        parameters = {
            name: p.default
            for name, p in inspect.signature(observe).parameters.items()
            if p.kind is p.KEYWORD_ONLY
        }
        numeric = {
            name: float(x)
            for name, x in parameters.items()
            if isinstance(x, numbers.Real) and not isinstance(x, bool)
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
            MappingProxyType(dict(recorded)),
            MappingProxyType({**(constants or {}), **numeric}),
        )
        off = MappingProxyType(dict(effects or {}))
        _ENTRIES[id] = Entry(record, observe, tuple(assumptions), parameters, tuple(ladder), off)
        return observe

    return register


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


def get_record(name: str) -> Claim:
    """Return the record of a claim that is registered already; topics are not loaded."""
    return _ENTRIES[name].claim


def get_entry(id: str) -> Entry:  # noqa: A002  (the name of the field)
    """Return a registered claim with its observer; refuse an unknown id."""
    load()
    if not isinstance(id, str):
        raise TypeError(
            f"id must be a string, got {type(id).__name__}; see sketchattn.theory.claims()"
        )
    if id not in _ENTRIES:
        raise ValueError(f"id must be that of a claim, got {id!r}{closest(id, _ENTRIES)}")
    return _ENTRIES[id]
