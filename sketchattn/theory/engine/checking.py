"""Checking: one claim on one problem, with seeded trials, or its bound alone.

``check`` evaluates the assumptions of a claim, lets it observe independent trials, and decides:

- *tail* (``P(observed > bound) <= delta``): failures are counted and the Clopper-Pearson limits of
  the rate of failure are compared with delta;
- *equality* and *expectation* (of a mean): ``z = (mean - theory) / (std / sqrt(trials))``, an
  alarm above 5 unless the skewness of the trials explains it;
- *inequality* and *existence*: every single observation must obey.

Whatever the kind, the draws themselves are audited: a sketch whose mean is off, whose signs are
missing, or that is the same in all trials is not the one that the claim is about.
"""

from __future__ import annotations

import math
import numbers
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ...base.arguments import closest
from ...base.draws import Rng, entropy_of
from ...base.floating import without_floating_errors
from ...base.words import shown
from ...kernels._threads import limit_threads
from .decisions import audit, decide, not_seen_yet
from .instances import Instance, as_instance
from .observing import observe
from .records import Observations, Verdict
from .registry import (
    Context,
    Entry,
    NotApplicable,
    OperatorFactory,
    Stop,
    Vacuous,
    get_entry,
)


def check_trials(trials: object) -> int:
    """Return ``trials`` as an integer of at least 1."""
    if isinstance(trials, bool | np.bool_) or not isinstance(trials, numbers.Integral):
        raise TypeError(f"trials must be an integer, got {type(trials).__name__}; 200 is usual")
    if int(trials) < 1:
        raise ValueError(f"trials must be at least 1, got {int(trials)}; 200 is usual")
    return int(trials)


def check_confidence(confidence: object) -> float:
    """Return ``confidence`` as a number strictly between 0 and 1."""
    if isinstance(confidence, bool | np.bool_) or not isinstance(confidence, numbers.Real):
        raise TypeError(
            f"confidence must be a real number, got {type(confidence).__name__}; 0.95 is usual"
        )
    if not 0.0 < float(confidence) < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {float(confidence)}; 0.95 is usual")
    return float(confidence)


def _instance_of(entry: Entry, problem: object) -> Instance:
    """Return what to check a claim on: by default what it has a record for, or a bundled head."""
    if problem is not None:
        return as_instance(problem)
    if entry.claim.instances:
        return as_instance(entry.claim.instances[0])
    from ...heads.files import load_heads

    return as_instance(load_heads()[0])


def check_parameters(entry: Entry, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a claim, with those that are given in place of the defaults."""
    known = entry.parameters
    for name, value in given.items():
        if name not in known:
            hint = closest(name, known) if known else "; it takes none"
            raise TypeError(
                f"{name} must be a parameter of claim {entry.claim.id!r}, got {name!r}{hint}"
            )
        counted = name == "rank" and value is not None
        if (counted or _is_number(known[name])) and not _is_number(value):
            default = f"by default it is {shown(known[name])}"
            raise TypeError(
                f"{name} must be a number for claim {entry.claim.id!r}, got {value!r}; {default}"
            )
    return {**known, **given}


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


@without_floating_errors
def default_factory(kind: str, r: int, n: int, rng: np.random.Generator, **parameters: Any) -> Any:
    """Return a random operator S (r, n): a sketch, or for ``sample_*`` a draw of columns.

    Parameters
    ----------
    kind : str
        A kind of ``sketchattn.sketches``, or "sample_wr", "sample_wor", "sample_poisson" or
        "sample_gumbel".
    r, n : int
    rng : numpy.random.Generator
    **parameters
        Those of the sketch; for a draw ``p``, the law (n,), but for "sample_wor".

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> default_factory("sample_wor", 2, 5, rng).to_dense().shape
    (2, 5)
    """
    if kind.startswith("sample_"):
        from ... import sampling

        if kind == "sample_wor":
            return sampling.sample_uniform(n, r, rng)
        draw = {
            "sample_wr": sampling.sample_with_replacement,
            "sample_poisson": sampling.sample_poisson,
            "sample_gumbel": sampling.sample_gumbel,
        }[kind]
        return draw(parameters["p"], r, rng)
    from ...sketches.base import make_sketch

    return make_sketch(kind, r, n, rng, **parameters)


@without_floating_errors
def check(
    id: str,  # noqa: A002  (the name of the field)
    problem: object = None,
    *,
    trials: int = 200,
    confidence: float = 0.95,
    rng: Rng = 0,
    sketch: OperatorFactory | None = None,
    **parameters: Any,
) -> Verdict:
    """Check a claim on a problem.

    Parameters
    ----------
    id : str
        A key of `claims`.
    problem : AttentionProblem, Heads of one head, Instance, its name, or pair (A, V), optional
        By default the first instance that the claim has a record for; without one the first
        bundled head.
    trials : int, default 200
        Independent draws.
    confidence : float, default 0.95
        Of the limits of a rate of failure, each one-sided.
    rng : None, int or numpy.random.Generator
        The same integer gives the same verdict.
    sketch : callable, optional
        ``sketch(kind, r, n, rng, **parameters)`` makes the random operators in place of the
        library's own: an array (r, n), a LinearOperator or a Sketch.  For other people's
        sketches, and to see that broken ones are noticed.
    **parameters
        Those of the claim, such as ``eps``, ``delta`` or ``rank``; its ``constants`` say what
        they are by default.

    Returns
    -------
    Verdict

    Raises
    ------
    TypeError, ValueError
        For an unknown id or parameter, and values out of range.

    Notes
    -----
    - tail: *holds* if the upper limit of the rate of failure is at most delta, *violated* if the
      lower one is above, otherwise *inconclusive*.  Without a failure delta is certified from
      ``ln(1 - confidence)/ln(1 - delta)`` trials on: 59 for 0.05.
    - equality and expectation: *violated* if ``|z| > 5`` (``z > 5`` where the claim is an upper
      bound); *inconclusive* below 60 trials, or where an error of the size of the theory itself
      could not have been seen.
    - inequality and existence: *violated* by a single observation beyond rounding.
    - a refuted claim is *inconclusive* too where its counterexample takes more trials to be seen.
      What is inconclusive ``needs`` a number of trials, which the notes name.
    - *vacuous*: not violated, but the bound is not below what the trivial predictor (zero, or the
      mean of V) reaches, or it asks for as many rows as there are columns; then nothing is drawn.
      The notes name the predictor, its error, and a rank at which the bound is below it.
    - *not applicable*: an assumption fails; the notes say which.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("clustered", n=64, d=8, rng=0)[0]
    >>> sa.theory.check("sketching.moment_countsketch", problem).status
    'holds'
    """
    entry = get_entry(id)
    count, level = check_trials(trials), check_confidence(confidence)
    chosen = check_parameters(entry, parameters)
    if sketch is not None and not callable(sketch):
        raise TypeError(
            f"sketch must be callable, got {type(sketch).__name__}; "
            f"pass a function of kind, r, n and rng"
        )
    instance = _instance_of(entry, problem)
    with limit_threads(1):  # a trial is small, and must round the same everywhere
        return run(entry, instance, count, level, entropy_of(rng), chosen, sketch)


def _context(
    entry: Entry, instance: Instance, trials: int, entropy: int, sketch: OperatorFactory | None
) -> Context:
    key = tuple(zlib.crc32(text.encode()) for text in (entry.claim.id, instance.name))
    return Context(instance, trials, entropy, key, sketch or default_factory)


def run(
    entry: Entry,
    instance: Instance,
    trials: int,
    confidence: float,
    entropy: int,
    parameters: Mapping[str, Any],
    sketch: OperatorFactory | None = None,
) -> Verdict:
    """Return the verdict on checked arguments."""
    nothing: dict[str, Any] = {
        "claim": entry.claim.id,
        "instance": instance.name,
        "observed": math.nan,
        "slack": math.nan,
        "trials": 0,
        "failures": None,
        "interval": None,
    }
    for assumption in entry.assumptions:
        reason = assumption.test(instance)
        if reason is not None:
            return Verdict(status="not applicable", bound=math.nan, notes=reason, **nothing)
    context = _context(entry, instance, trials, entropy, sketch)
    try:
        seen = observe(entry, context, parameters)
    except NotApplicable as stop:
        return Verdict(status="not applicable", bound=math.nan, notes=str(stop), **nothing)
    except Vacuous as stop:
        return Verdict(
            status="vacuous",
            bound=stop.bound,
            notes=str(stop),
            vacuous=str(stop),
            rank=stop.rank,
            delta=stop.delta,
            **nothing,
        )
    verdict = decide(entry.claim, seen, confidence)
    effect = entry.effects.get(instance.name)
    if effect is not None and verdict.status == "holds":
        verdict = not_seen_yet(verdict, effect, confidence)
    broken = audit(context.audits, context.fingerprints)
    status, notes = verdict.status, [seen.notes, verdict.notes]
    if broken:
        status = "violated"
        notes.insert(0, f"the draws are not those of the claim: {broken}")
    elif verdict.vacuous and status in ("holds", "inconclusive"):
        status = "vacuous"
        since = "" if seen.trivial is None else _since(entry, context, parameters, verdict.rank)
        verdict = replace(verdict, vacuous=verdict.vacuous + since)
        notes.append(verdict.vacuous)
    text = "; ".join(x for x in notes if x)
    return replace(verdict, status=status, notes=text, instance=instance.name)


def _since(entry: Entry, context: Context, parameters: Mapping[str, Any], rank: int | None) -> str:
    """Return from which rank on the bound of a vacuous claim would be below the predictor.

    Where nothing is drawn a bound costs as much as its observation, and ranks are doubled only.
    """
    if rank is None or "rank" not in entry.parameters:
        return ""
    silent = replace(context, trials=0, audits={}, fingerprints=[])
    n = context.instance.n

    def is_below(r: int) -> bool:
        try:
            seen = observe(entry, silent, {**parameters, "rank": r})
        except (Stop, ValueError, ArithmeticError):  # of a rank that the operator cannot have
            return False
        limit = np.asarray(seen.bound, np.float64)
        return seen.trivial is not None and limit.size > 0 and bool(limit.max() < seen.trivial)

    low = high = rank
    while high < n and not is_below(high):
        low, high = high, 2 * high
    if high >= n:
        return f"; it is at no rank below n = {n}" if rank < n else ""
    if entry.claim.kind in ("inequality", "existence"):  # whose bounds need what is observed
        return f"; it is at rank {high}"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_below(middle) else (middle, high)
    return f"; it is from rank {high} on"


def sample(
    entry: Entry,
    instance: Instance,
    trials: int,
    entropy: int,
    parameters: Mapping[str, Any],
) -> Observations | None:
    """Return the observations themselves, None where the claim is not applicable or vacuous.

    ``trials`` 0 gives the bound alone.
    """
    if any(a.test(instance) is not None for a in entry.assumptions):
        return None
    try:
        return observe(entry, _context(entry, instance, trials, entropy, None), parameters)
    except Stop:
        return None


@without_floating_errors
def bound(id: str, problem: object = None, **parameters: Any) -> float:  # noqa: A002
    """Return what a claim puts against its observation, without drawing anything.

    Parameters
    ----------
    id : str
        A key of `claims`, whose ``observes`` says in which units the bound is.
    problem, **parameters
        As for `check`.

    Returns
    -------
    float
        NaN where the claim is not applicable, or where each draw has a bound of its own.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=64, d=8, rng=0)[0]
    >>> points = [sa.theory.bound("sketching.moment_gaussian", problem, rank=r) for r in (8, 16)]
    >>> round(points[0] / points[1], 12)
    2.0
    """
    entry = get_entry(id)
    chosen = check_parameters(entry, parameters)
    instance = _instance_of(entry, problem)
    for assumption in entry.assumptions:
        if assumption.test(instance) is not None:
            return math.nan
    try:
        seen = observe(entry, _context(entry, instance, 0, 0, None), chosen)
    except NotApplicable:
        return math.nan
    except Vacuous as stop:
        return stop.bound
    value = np.asarray(seen.bound, np.float64)
    return float(value) if value.ndim == 0 else math.nan
