"""Decisions: counts of failures against delta, means against theory, single observations.

The draws are audited too: a sketch whose mean is off, or that is the same in all trials, is not
the one that a claim is about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.words import number
from .arguments import smallest
from .records import Claim, Observations, Verdict

Array = NDArray[Any]

# An alarm of a z-score: 5.7e-7 two-sided for a normal mean.
ALARM = 5.0
# Fewer trials of a skewed quantity give false alarms, even with the correction of z.
LEAST_TRIALS = 60
# Deterministic inequalities may be missed by this factor: rounding in float64.
ROUNDING = 1e-9

# --- rates ----------------------------------------------------------------------------------


def clopper_pearson(failures: int, trials: int, confidence: float) -> tuple[float, float]:
    """Return the lower and the upper limit of a rate, each one-sided.

    Parameters
    ----------
    failures, trials : int
    confidence : float

    Examples
    --------
    >>> low, high = clopper_pearson(0, 59, 0.95)
    >>> low, high < 0.05 < clopper_pearson(0, 58, 0.95)[1]
    (0.0, True)
    """
    from scipy.stats import beta

    low = 0.0
    high = 1.0
    if failures > 0:
        low = float(beta.ppf(1 - confidence, failures, trials - failures + 1))
    if failures < trials:
        high = float(beta.ppf(confidence, failures + 1, trials - failures))
    return low, high


def can_certify(delta: float | None, trials: int, confidence: float) -> bool:
    """Return whether ``trials`` without a failure would certify a rate of at most delta."""
    return delta is None or trials == 0 or clopper_pearson(0, trials, confidence)[1] <= delta


def trials_for_rate(rate: float, delta: float, confidence: float) -> int | None:
    """Return the trials from which a share of failures puts one limit on one side of delta.

    Parameters
    ----------
    rate : float
        The share, not delta.
    delta, confidence : float

    Examples
    --------
    >>> trials_for_rate(0.0, 0.05, 0.95), trials_for_rate(1.0, 0.05, 0.95)
    (59, 1)
    """
    from scipy.stats import beta

    def decided(trials: int) -> bool:
        failures = rate * trials
        if rate < delta:
            return bool(beta.ppf(confidence, failures + 1, trials - failures) <= delta)
        return bool(beta.ppf(1 - confidence, failures, trials - failures + 1) > delta)

    found = smallest(decided)
    return None if found == math.inf else int(found)


# --- means ----------------------------------------------------------------------------------


class Mean(NamedTuple):
    """Hold how the mean of independent trials differs from its target.

    Attributes
    ----------
    mean, error : float
        With its standard error.
    z : float
        ``(mean - target)/error``; 0 for a difference within rounding.
    corrected : float
        z corrected for the skewness of the trials.
    trials : int
    """

    mean: float
    error: float
    z: float
    corrected: float
    trials: int

    def too_large(self) -> bool:
        """Return whether the mean is above its target beyond chance."""
        return self.trials >= LEAST_TRIALS and min(self.z, self.corrected) > ALARM

    def too_small(self) -> bool:
        """Return whether the mean is below its target beyond chance."""
        return self.trials >= LEAST_TRIALS and max(self.z, self.corrected) < -ALARM


def z_score(
    values: Sequence[float] | Array,
    target: float,
    *,
    rounding: float = 0.0,
    error: float = 0.0,
    spread: float = 0.0,
) -> Mean:
    """Return mean, standard error and ``z = (mean - target)/error`` of independent trials.

    Parameters
    ----------
    values : (trials,)
    target : float
    rounding : float
        A difference up to this is none.
    error : float
        Standard error of the target itself.
    spread : float
        Standard deviation of one trial that is known beforehand; the larger one counts.

    Returns
    -------
    Mean
        z is infinite where all values are equal and wrong.

    Notes
    -----
    Squares are skewed to the right: a sample that misses the rare large ones has a small mean and
    a small standard deviation at once.  With the skewness g of the trials and ``a = g/sqrt(T)``
    the corrected score is ``z + a z^2/3 + a^2 z^3/27 + a/6``, which grows with z and is closer to
    normal (Hall, On the removal of skewness by transformation, JRSS B 54 (1992)).  An alarm needs
    both.
    """
    x = np.asarray(values, np.float64)
    count = len(x)
    mean = float(x.mean())
    if not math.isfinite(mean):
        return Mean(mean, math.nan, math.inf, math.inf, max(count, LEAST_TRIALS))
    seen = float(x.std(ddof=1)) if count > 1 else 0.0
    used = math.hypot(max(seen, spread), error * math.sqrt(count))
    difference = mean - target
    allowed = max(rounding, 1e-12 * abs(target), 1e-12 * float(np.abs(x).max(initial=0.0)))
    if abs(difference) <= allowed:
        return Mean(mean, used / math.sqrt(count), 0.0, 0.0, count)
    if used == 0.0:
        endless = math.copysign(math.inf, difference)
        return Mean(mean, 0.0, endless, endless, count)
    z = difference / used * math.sqrt(count)
    a = float(np.mean(((x - mean) / used) ** 3)) / math.sqrt(count)
    corrected = z + a * z**2 / 3 + a**2 * z**3 / 27 + a / 6
    return Mean(mean, used / math.sqrt(count), z, corrected, count)


def trials_for_size(found: Mean, size: float) -> int | None:
    """Return the trials whose mean would show an error of this size, None where none would."""
    need = found.trials * (ALARM * found.error / size) ** 2 if size > 0 else math.inf
    return math.ceil(need) if math.isfinite(need) else None


def audit(
    audits: Mapping[str, tuple[float, list[float]]], marks: Sequence[tuple[float, float]]
) -> str:
    """Return what is wrong with the draws of a check, empty if nothing is.

    Parameters
    ----------
    audits : mapping from names to (target, values)
        Quantities whose mean must be the target.
    marks : sequence of (float, float)
        Numbers, and with which chance at most another independent draw has the same one.
    """
    from scipy.stats import norm

    shared = math.prod(chance for _, chance in marks[1:])
    if len({mark for mark, _ in marks}) == 1 and shared < 2 * norm.sf(ALARM):
        return f"all {len(marks)} trials drew the same operator"
    for name, (target, values) in audits.items():
        seen = z_score(values, target)
        if seen.too_large() or seen.too_small():
            return f"{name} has the mean {seen.mean:.4g} and not {target:.4g} (z = {seen.z:.3g})"
    return ""


# --- verdicts -------------------------------------------------------------------------------


def _ratio(bound: float, observed: float) -> float:
    if observed > 0:
        return bound / observed
    return math.inf if bound > 0 else 1.0


def _vacuous(bound: float, seen: Observations) -> str:
    if seen.trivial is None or bound < seen.trivial:
        return ""
    return (
        f"the bound {number(bound)} is not below {number(seen.trivial)}, the error of "
        f"{seen.predictor}"
    )


def decide(claim: Claim, seen: Observations, confidence: float) -> Verdict:
    """Return the verdict on what was observed, by the kind of the claim; see `check`."""
    values = np.asarray(seen.values, np.float64)
    if claim.kind == "tail":
        return _decide_tail(claim, seen, values, confidence)
    if claim.kind in ("equality", "expectation"):
        return _decide_mean(claim, seen, values, confidence)
    return _decide_each(claim, seen, values)


def _decide_tail(claim: Claim, seen: Observations, values: Array, confidence: float) -> Verdict:
    assert seen.delta is not None  # every tail has one
    delta, trials = seen.delta, len(values)
    bounds = np.broadcast_to(np.asarray(seen.bound, np.float64), values.shape)
    # NaN is a failure
    failures = int(np.count_nonzero(~(values <= bounds * (1 + ROUNDING) + seen.rounding)))
    low, high = clopper_pearson(failures, trials, confidence)
    status = "holds" if high <= delta else "violated" if low > delta else "inconclusive"
    notes, needs = [], None
    if status == "inconclusive":
        rate = failures / trials
        if rate == delta:  # half a failure more
            rate = (failures + 0.5) / trials
        needs = trials_for_rate(rate, delta, confidence)
        if not can_certify(delta, trials, confidence):
            notes.append(f"{trials} trials cannot certify delta = {delta:.3g}")
        if needs is not None:
            needs = max(needs, trials + 1)
            notes.append(f"needs {needs} trials")
    ratios = values / np.where(bounds > 0, bounds, 1.0)
    bound = float(np.median(bounds))
    observed = float(np.quantile(ratios, max(0.0, 1 - delta), method="higher"))
    observed *= bound if bound > 0 else 1.0
    vacuous = _vacuous(float(bounds.max()), seen)
    if delta >= 1:
        vacuous = f"the claimed rate of failure is {delta:.3g}"
    return Verdict(
        claim.id,
        status,
        observed,
        bound,
        _ratio(bound, observed),
        trials,
        failures,
        (low, high),
        "; ".join(notes),
        rank=seen.rank,
        delta=delta,
        vacuous=vacuous,
        needs=needs,
    )


def not_seen_yet(verdict: Verdict, effect: float, confidence: float) -> Verdict:
    """Return "inconclusive" for a refuted claim that held, if too few trials explain that.

    Parameters
    ----------
    verdict : Verdict
        Of a claim that is recorded as violated here, found to hold.
    effect : float
        What the recorded trials showed: of a mean the difference from its target in standard
        deviations of one trial, otherwise the share of observations beyond the bound.
    confidence : float
        Of seeing the effect with as many trials as are named.

    Returns
    -------
    Verdict
        As it was where the effect, were it there, would have been seen but with chance 5.7e-7.
    """
    from scipy.stats import binom, norm

    count = verdict.trials
    if verdict.z is not None:
        excluded = abs(verdict.z - effect * math.sqrt(count)) > ALARM
        asked: float | None = ((ALARM + float(norm.isf(1 - confidence))) / effect) ** 2
    else:
        assert verdict.failures is not None  # rates are counted
        excluded = bool(binom.cdf(verdict.failures, count, effect) < 2 * norm.sf(ALARM))
        if verdict.delta is not None:
            asked = trials_for_rate(effect, verdict.delta, confidence)
        else:
            asked = math.log(1 - confidence) / math.log1p(-effect)
    if excluded:
        return verdict
    needs = max(math.ceil(asked or 0), count + 1)
    note = f"refuted with more trials; needs {needs} trials"
    notes = "; ".join(x for x in (verdict.notes, note) if x)
    return replace(verdict, status="inconclusive", notes=notes, needs=needs)


def _decide_mean(claim: Claim, seen: Observations, values: Array, confidence: float) -> Verdict:
    from scipy.stats import norm

    target = float(np.asarray(seen.bound, np.float64))
    found = z_score(
        values, target, rounding=seen.rounding, error=seen.bound_error, spread=seen.spread
    )
    wrong = found.too_large() or (claim.kind == "equality" and found.too_small())
    notes, needs = [], None
    for series in seen.series:
        other = z_score(
            series.values, series.target, rounding=math.sqrt(seen.rounding), spread=series.spread
        )
        if other.too_large() or other.too_small():
            wrong = True
            notes.append(
                f"{series.name}: {other.mean:.4g} and not {series.target:.4g}, z = {other.z:.3g}"
            )
    if wrong:
        status = "violated"
    elif found.trials < LEAST_TRIALS and found.z != 0.0:
        status = "inconclusive"
        needs = LEAST_TRIALS
        notes.append(f"a mean of {found.trials} trials; {LEAST_TRIALS} are the least")
    elif ALARM * found.error > abs(target) + seen.rounding and found.z != 0.0:
        status = "inconclusive"
        needs = trials_for_size(found, abs(target) + seen.rounding)
        notes.append("heavy tails: an error of the size of the theory could not be seen")
    else:
        status = "holds"
    if needs is not None:
        notes.append(f"needs {needs} trials")
    half = float(norm.isf((1 - confidence) / 2)) * found.error
    return Verdict(
        claim.id,
        status,
        found.mean,
        target,
        _ratio(target, found.mean),
        found.trials,
        None,
        (found.mean - half, found.mean + half),
        "; ".join(notes),
        rank=seen.rank,
        z=found.z,
        vacuous=_vacuous(target, seen),
        needs=needs,
    )


def _decide_each(claim: Claim, seen: Observations, values: Array) -> Verdict:
    bounds = np.broadcast_to(np.asarray(seen.bound, np.float64), values.shape)
    failed = ~(values <= bounds * (1 + ROUNDING) + seen.rounding)
    failures = int(np.count_nonzero(failed))
    ratios = [_ratio(float(b), float(x)) for x, b in zip(values, bounds, strict=True)]
    # Of several beyond their bound one that is beyond rounding too.
    worst = int(np.argmin(np.where(failed, ratios, np.inf) if failures else ratios))
    return Verdict(
        claim.id,
        "violated" if failures else "holds",
        float(values[worst]),
        float(bounds[worst]),
        ratios[worst],
        len(values),
        failures,
        None,
        "",
        rank=seen.rank,
        vacuous=_vacuous(float(bounds[worst]), seen),
    )
