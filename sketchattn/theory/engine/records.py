"""Records: what a claim is, what was observed, what was decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.words import Phrase, Worded, counted, number, shown

Array = NDArray[Any]

STATUSES = ("published", "derived", "refuted", "own")
KINDS = ("equality", "expectation", "tail", "inequality", "existence")
VERDICTS = ("holds", "violated", "vacuous", "not applicable", "inconclusive")

# What a claim on a bundled head is recorded under, and on anything else without a record.
HEADS = "heads"


def same(value: float, instance: Any) -> float:
    """Take a bound as it stands."""
    return value


def root(value: float, instance: Any) -> float:
    """Turn a bound of a square into one of its root."""
    return math.sqrt(value)


def root_relative(value: float, instance: Any) -> float:
    """Turn a bound of ``|Ahat V - A V|_F^2`` into one of its root relative to ``|A|_F |V|_F``."""
    return math.sqrt(value) / float(instance.fro)


class Curve(NamedTuple):
    """Say that a claim bounds an error measure of a method at each rank, so that it can be drawn.

    Attributes
    ----------
    method : str or class
        Registered name of the method, or its class; its ``rank`` is that of the claim.
    parameters : mapping, optional
        Those that the method must have; the others as by default.
    field : str
        The field of `ErrorReport`.
    convert : callable
        From the units of the claim to those of the field: `same`, `root` or `root_relative`.
    """

    method: str | type[Any]
    parameters: Mapping[str, Any] | None = None
    field: str = "output_fro_amm"
    convert: Callable[[float, Any], float] = same

    def __str__(self) -> str:
        listed = ", ".join(f"{name}={value!r}" for name, value in (self.parameters or {}).items())
        return f"{self.name}({listed})"

    @property
    def name(self) -> str:
        """Name of the method."""
        if isinstance(self.method, str):
            return self.method
        return str(getattr(self.method, "name", self.method.__name__))


@dataclass(frozen=True, repr=False)
class Claim(Worded):
    """Hold a statement with its constants, its source, and the verdicts that it gets.

    Attributes
    ----------
    id : str
        ``topic.name``.
    title, statement, source : str
        The exact statement as text, and where it comes from.
    status : {"published", "derived", "refuted", "own"}
        "own" is a claim of the user.
    kind : {"equality", "expectation", "tail", "inequality", "existence"}
    observes : str
        The observed quantity: which norm, and over which denominator.
    assumptions : tuple of str
        Evaluated on the problem; where one fails the claim is not applicable.
    recorded : mapping from str to str
        The verdict on named instances, on single heads, and under "heads" on the bundled heads
        that are not named.  Empty for a claim without a record, which is checked everywhere.
    constants : mapping from str to float
        The constants of the theorem, and the parameters with which it is checked by default.
    curve : Curve or None
        Which measured curve it bounds, for pictures of studies.
    """

    id: str
    title: str
    statement: str
    source: str
    status: str
    kind: str
    observes: str
    assumptions: tuple[str, ...]
    recorded: Mapping[str, str]
    constants: Mapping[str, float]
    curve: Curve | None = None

    @property
    def instances(self) -> tuple[str, ...]:
        """Names of the built-in instances that have a record, in order."""
        return tuple(x for x in self.recorded if x != HEADS and "/" not in x)

    _brief = ("id", "status", "kind")

    def __reduce__(self) -> tuple[Any, ...]:
        return reduced(self)

    def _title(self) -> str:
        return f"{self.id}: {self.title}"

    def _phrases(self) -> list[Phrase]:
        given = ", ".join(f"{name} = {number(x)}" for name, x in self.constants.items())
        about = {
            "id": self.id,
            "status": self.status,
            "kind": self.kind,
            "statement": self.statement,
            "source": self.source,
            "observes": self.observes,
            "assumptions": "; ".join(self.assumptions),
            "constants": given,
            "curve": "" if self.curve is None else f"{self.curve.field} of {self.curve}",
        }
        return [Phrase(name, text, "") for name, text in about.items() if text]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain Python objects, for JSON."""
        out = asdict_shallow(self)
        out["assumptions"] = list(self.assumptions)
        curve = self.curve
        out["curve"] = None if curve is None else {"method": str(curve), "field": curve.field}
        return out


def reduced(record: Any) -> tuple[Any, ...]:
    """Return how a record is pickled: read-only mappings, which cannot be, go as dictionaries."""
    fields = (getattr(record, name) for name in record.__dataclass_fields__)
    return _remade, (
        type(record),
        tuple(dict(x) if isinstance(x, MappingProxyType) else x for x in fields),
    )


def _remade(kind: type[Any], fields: tuple[Any, ...]) -> Any:
    return kind(*(MappingProxyType(x) if isinstance(x, dict) else x for x in fields))


def asdict_shallow(record: Any) -> dict[str, Any]:
    """Return the fields of a record, with mappings as dictionaries and numbers for JSON."""
    return {name: plain(getattr(record, name)) for name in record.__dataclass_fields__}


def plain(value: Any) -> Any:
    """Return a value for JSON; numbers that are not finite become "inf", "-inf" or "nan"."""
    if isinstance(value, Mapping):
        return {str(name): plain(x) for name, x in value.items()}
    if isinstance(value, tuple | list):
        return [plain(x) for x in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


@dataclass(frozen=True, repr=False)
class Verdict(Worded):
    """Hold the outcome of a check.

    Attributes
    ----------
    claim : str
        Id of the claim.
    status : {"holds", "violated", "vacuous", "not applicable", "inconclusive"}
    observed : float
        For a tail the (1 - delta)-quantile of the observations, for a mean their mean, otherwise
        the observation that comes nearest to its bound.
    bound : float
        What the claim puts against it.
    slack : float
        ``bound / observed``: how loose the claim is.
    trials : int
        Independent draws; 0 where nothing had to be drawn.
    failures : int or None
        Observations beyond the bound; None for means.
    interval : (float, float) or None
        For a tail the one-sided lower and upper limit of the rate of failure, each at the
        confidence asked for; for a mean its two-sided interval.
    notes : str
        Reasons and particulars.
    instance : str
        Name of the problem.
    rank : int or None
        Rows, columns or products that were used.
    delta : float or None
        The rate of failure that a tail claims.
    z : float or None
        Of a mean.
    vacuous : str
        Why the claim promises nothing here, whatever its verdict; empty otherwise.
    needs : int or None
        Trials that would decide what is inconclusive; None where nothing is.
    """

    claim: str
    status: str
    observed: float
    bound: float
    slack: float
    trials: int
    failures: int | None
    interval: tuple[float, float] | None
    notes: str
    instance: str = ""
    rank: int | None = None
    delta: float | None = None
    z: float | None = None
    vacuous: str = ""
    needs: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain Python objects, for JSON."""
        return asdict_shallow(self)

    def __str__(self) -> str:
        numbers_ = f"observed {number(self.observed)}, bound {number(self.bound)}"
        numbers_ += "" if self.rank is None else f" at rank {self.rank}"
        count = "" if self.failures is None else f", {counted(self.failures, 'failure')}"
        note = f" ({self.notes})" if self.notes else ""
        return f"{self._title()}; {numbers_}{count} in {counted(self.trials, 'trial')}{note}"

    def __repr__(self) -> str:
        return f"<Verdict {self._title()}>"

    def _title(self) -> str:
        return f"{self.claim} on {self.instance}: {self.status}"

    def _phrases(self) -> list[Phrase]:
        about = {
            "observed": "a quantile of a tail, a mean, or the observation nearest to its bound",
            "bound": "what the claim puts against it",
            "slack": "bound / observed: how loose the claim is",
            "rank": "rows, columns or products that were used",
            "failures": f"observations beyond the bound, in {counted(self.trials, 'trial')}",
            "delta": "the rate of failure that the claim allows",
            "interval": "of the rate of failure, or of the mean",
            "z": "standard errors between the mean and the claim",
            "notes": "",
        }
        values = {name: shown(getattr(self, name)) for name in about}
        return [Phrase(name, x, about[name]) for name, x in values.items() if x not in ("", "-")]


class Series(NamedTuple):
    """Hold trials of a quantity whose mean must be ``target``.

    ``spread`` is a standard deviation of one trial that is known, or bounded, beforehand.
    """

    name: str
    values: Sequence[float] | Array
    target: float
    spread: float = 0.0


@dataclass(frozen=True)
class Observations:
    """Hold what an observer saw.

    Attributes
    ----------
    values : sequence of float (trials,)
        One observation a trial.
    bound : float or sequence of float (trials,)
        What the claim puts against each; for equalities the theory.
    delta : float, optional
        Of a tail.
    rank : int, optional
        Rows, columns or products that were used.
    trivial : float, optional
        What the trivial predictor reaches in the units of ``values``.
    rounding : float, default 0
        Absolute error of an observation through rounding.
    bound_error : float, default 0
        Standard error of the bound where it was simulated itself.
    spread : float, default 0
        Standard deviation of one observation, where it is known beforehand: with heavy tails the
        trials do not show it.
    series : tuple of Series
        Further means that must be right, such as a bias of zero.
    notes : str
        Particulars.
    predictor : str
        Which one ``trivial`` is of, such as "zero" or "the mean of V".
    """

    values: Sequence[float] | Array
    bound: float | Sequence[float] | Array
    delta: float | None = None
    rank: int | None = None
    trivial: float | None = None
    rounding: float = 0.0
    bound_error: float = 0.0
    spread: float = 0.0
    series: tuple[Series, ...] = ()
    notes: str = ""
    predictor: str = "the trivial predictor"
