"""The engine: decisions against their definitions, audits, records, tables and pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

import sketchattn as sa
from sketchattn import theory
from sketchattn.theory.engine.checking import run
from sketchattn.theory.engine.decisions import (
    can_certify,
    clopper_pearson,
    trials_for_rate,
    z_score,
)
from sketchattn.theory.engine.instances import DENSE_ENTRIES, Instance, instance
from sketchattn.theory.engine.records import (
    KINDS,
    STATUSES,
    VERDICTS,
    Observations,
    Series,
    Verdict,
)
from sketchattn.theory.engine.registry import Assumption, Context, Entry, claim, get_entry
from sketchattn.theory.engine.table import COLUMNS, Row
from sketchattn.theory.engine.validation import ValidationResult, validate

Array = NDArray[Any]
Observer = Callable[..., Observations]

# Cheap, and one of each kind: equality, tail, expectation, inequality, existence.
SOME = (
    "sketching.moment_countsketch",
    "sketching.hutchinson_tail",
    "sketching.rsvd_fro",
    "sketching.eckart_young",
    "sketching.eckart_young_attained",
)


def entry(kind: str, observe: Observer, status: str = "derived") -> Entry:
    """Return a claim that is not registered."""
    record = theory.Claim(
        "test.claim", "title", "statement", "source", status, kind, "x", (), {"pair": "holds"}, {}
    )
    return Entry(record, observe, (), {}, ())


def pair() -> Instance:
    return Instance("pair", (np.eye(2), np.ones((2, 1))))


def decide(kind: str, values: Any, bound: Any, confidence: float = 0.95, **fields: Any) -> Verdict:
    """Return the verdict on given observations."""
    seen = Observations(values, bound, **fields)
    return run(entry(kind, lambda context: seen), pair(), len(values), confidence, 0, {})


def with_effect(kind: str, values: Any, bound: Any, effect: float, **fields: Any) -> Verdict:
    """Return the verdict on a claim that is off by ``effect`` according to its record."""
    seen = Observations(values, bound, **fields)
    refuted = entry(kind, lambda context: seen)._replace(effects={"pair": effect})
    return run(refuted, pair(), len(values), 0.95, 0, {})


def normal(mean: float, std: float, count: int) -> Array:
    """Return numbers with exactly this mean and sample standard deviation."""
    x = stats.norm.ppf((np.arange(count) + 0.5) / count)
    x = (x - x.mean()) / x.std(ddof=1)
    return np.asarray(mean + std * x)


# --- rates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("failures", "trials"), [(0, 10), (3, 10), (10, 10), (7, 200), (1, 59)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 1 - 1e-6])
def test_limits_of_a_rate_are_those_of_their_definition(
    failures: int, trials: int, confidence: float
) -> None:
    low, high = clopper_pearson(failures, trials, confidence)
    # The lower limit is the rate with which so many failures or more have probability 1 - c.
    if failures > 0:
        assert stats.binom.sf(failures - 1, trials, low) == pytest.approx(1 - confidence, rel=1e-6)
    else:
        assert low == 0.0
    if failures < trials:
        assert stats.binom.cdf(failures, trials, high) == pytest.approx(1 - confidence, rel=1e-6)
    else:
        assert high == 1.0


@pytest.mark.parametrize(("delta", "trials"), [(0.1, 29), (0.05, 59), (0.01, 299)])
def test_trials_that_certify_without_a_failure(delta: float, trials: int) -> None:
    assert can_certify(delta, trials, 0.95)
    assert not can_certify(delta, trials - 1, 0.95)
    assert trials == math.ceil(math.log(0.05) / math.log(1 - delta))


def test_a_tail_holds_is_violated_or_neither() -> None:
    def tail(failures: int, trials: int) -> Verdict:
        values = np.concatenate([np.full(failures, 2.0), np.full(trials - failures, 0.5)])
        return decide("tail", values, 1.0, delta=0.05)

    assert tail(0, 59).status == "holds"
    assert tail(0, 58).status == "inconclusive"
    assert "58 trials cannot certify" in tail(0, 58).notes
    assert tail(4, 200).status == "holds"
    assert tail(10, 200).status == "inconclusive"
    assert tail(20, 200).status == "violated"
    # The verdicts are those of the limits.
    for failures in range(0, 30):
        verdict = tail(failures, 200)
        assert verdict.interval is not None
        low, high = verdict.interval
        wanted = "holds" if high <= 0.05 else "violated" if low > 0.05 else "inconclusive"
        assert (verdict.status, verdict.failures, verdict.trials) == (wanted, failures, 200)


def test_a_tail_observes_its_quantile_and_the_slack() -> None:
    values = np.arange(1.0, 101.0) / 100
    verdict = decide("tail", values, 2.0, delta=0.1)
    # The smallest number that at least 90 % of the others do not exceed.
    assert verdict.observed == pytest.approx(0.91, abs=0.011)
    assert verdict.slack == 2.0 / verdict.observed
    assert (verdict.bound, verdict.delta) == (2.0, 0.1)


@pytest.mark.parametrize("kind", ["tail", "inequality"])
def test_what_is_not_a_number_fails(kind: str) -> None:
    values = [0.5] * 99 + [math.nan]
    fields = {"delta": 0.001} if kind == "tail" else {}
    assert decide(kind, values, 1.0, **fields).failures == 1


@pytest.mark.parametrize("kind", ["equality", "expectation"])
def test_a_mean_that_is_not_a_number_is_violated(kind: str) -> None:
    assert decide(kind, [1.0] * 99 + [math.nan], 1.0).status == "violated"


# --- means --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "z", "status"),
    [
        ("equality", 0.0, "holds"),
        ("equality", 4.9, "holds"),
        ("equality", -4.9, "holds"),
        ("equality", 5.1, "violated"),
        ("equality", -5.1, "violated"),
        ("expectation", 4.9, "holds"),
        ("expectation", 5.1, "violated"),
        ("expectation", -100.0, "holds"),
    ],
)
def test_a_mean_is_compared_by_its_z_score(kind: str, z: float, status: str) -> None:
    count, std = 400, 0.1
    values = normal(1.0, std, count)
    target = 1.0 - z * std / math.sqrt(count)
    verdict = decide(kind, values, target)
    assert verdict.z == pytest.approx(z, abs=1e-9)
    assert verdict.status == status
    assert verdict.interval == pytest.approx((1 - 0.0098, 1 + 0.0098), abs=1e-5)


def test_few_trials_say_nothing_about_a_mean() -> None:
    assert decide("equality", [3.0], 1.0).status == "inconclusive"
    assert decide("equality", [3.0] * 59, 1.0).status == "inconclusive"
    assert decide("equality", normal(3.0, 0.1, 59), 1.0).status == "inconclusive"
    assert decide("equality", normal(3.0, 0.1, 60), 1.0).status == "violated"


def test_what_is_inconclusive_says_how_many_trials_decide() -> None:
    few = decide("equality", normal(3.0, 0.1, 59), 1.0)
    assert (few.needs, few.notes.endswith("needs 60 trials")) == (60, True)
    # 5 x 0.25 against 1.1: with (5 x .25/1.1)^2 times as many trials the error is a fifth.
    heavy = decide("equality", normal(1.0, 0.25 * math.sqrt(100), 100), 1.1)
    assert heavy.needs == math.ceil(100 * (5 * 0.25 / 1.1) ** 2)
    assert f"needs {heavy.needs} trials" in heavy.notes
    more = decide("equality", normal(1.0, 0.25 * math.sqrt(100), heavy.needs), 1.1)
    assert more.status == "holds"
    # A theory of zero is never reached by its own share of an error.
    assert decide("equality", normal(1.0, 3.0, 100), 0.0).needs is None
    for failures, trials in ((0, 58), (1, 5), (10, 200), (5, 100), (12, 200)):
        values = [2.0] * failures + [0.5] * (trials - failures)
        verdict = decide("tail", values, 1.0, delta=0.05)
        assert verdict.status == "inconclusive"
        assert verdict.needs is not None
        assert verdict.needs > trials
        assert verdict.notes.endswith(f"needs {verdict.needs} trials")
    assert decide("tail", [0.5] * 58, 1.0, delta=0.05).needs == 59


@pytest.mark.parametrize(("rate", "delta"), [(0.0, 0.05), (0.04, 0.05), (0.07, 0.05), (1.0, 0.4)])
def test_trials_for_a_rate_are_the_fewest(rate: float, delta: float) -> None:
    found = trials_for_rate(rate, delta, 0.95)
    assert found is not None
    for trials, wanted in ((found, True), (found - 1, False)):
        if not trials:
            continue
        # The limits of Clopper and Pearson are quantiles of beta laws, for any share.
        failures = rate * trials
        if rate < delta:
            decided = stats.beta.cdf(delta, failures + 1, trials - failures) >= 0.95
        else:
            decided = stats.beta.cdf(delta, failures, trials - failures + 1) < 0.05
        assert decided == wanted


def test_a_recorded_effect_that_was_not_seen_yet() -> None:
    # Off by 0.5 standard deviations: five standard errors from 100 trials on.
    verdict = with_effect("equality", normal(10.5, 1.0, 64), 10.0, 0.5)
    assert (verdict.status, verdict.needs) == ("inconclusive", math.ceil((5 + 1.6449) ** 2 / 0.25))
    assert with_effect("equality", normal(10.5, 1.0, 121), 10.0, 0.5).status == "violated"
    # No trace of the effect where it would have been seen; the other way; where it would not.
    assert with_effect("equality", normal(10.0, 1.0, 121), 10.0, 0.5).status == "holds"
    assert with_effect("equality", normal(9.8, 1.0, 64), 10.0, 0.5).status == "holds"
    assert with_effect("equality", normal(10.0, 1.0, 81), 10.0, 0.5).status == "inconclusive"
    # Single observations: seven of ten are beyond the bound.
    few = with_effect("inequality", [0.5, 0.5], 1.0, 0.7)
    assert (few.status, few.needs) == ("inconclusive", 3)
    assert with_effect("inequality", [0.5, 2.0], 1.0, 0.7).status == "violated"
    assert with_effect("inequality", [0.5] * 20, 1.0, 0.7).status == "holds"
    tail = with_effect("tail", [0.5] * 60, 1.0, 0.2, delta=0.05)
    assert tail.status == "inconclusive"
    assert tail.needs == max(61, trials_for_rate(0.2, 0.05, 0.95) or 0)
    assert with_effect("tail", [0.5] * 100, 1.0, 0.2, delta=0.05).status == "holds"


def test_recorded_effects_are_those_of_the_recorded_trials() -> None:
    found = {name: get_entry(name) for name in theory.claims() if get_entry(name).effects}
    assert len(found) >= 2
    for name, known in found.items():
        assert known.claim.status == "refuted"
        for on, effect in known.effects.items():
            assert known.claim.recorded[on] == "violated"
            verdict = theory.check(name, on)
            if verdict.z is not None:
                assert verdict.z / math.sqrt(verdict.trials) == pytest.approx(effect, rel=0.05)
            else:
                assert verdict.failures is not None
                assert verdict.failures / verdict.trials == pytest.approx(effect, rel=0.05)


def test_heavy_tails_are_inconclusive_and_not_right() -> None:
    # One standard error is a quarter of the theory: twice the theory would look the same.
    values = normal(1.0, 0.25 * math.sqrt(100), 100)
    verdict = decide("equality", values, 1.1)
    assert verdict.status == "inconclusive"
    assert "heavy tails" in verdict.notes


def test_a_spread_that_is_known_beforehand_counts() -> None:
    values = normal(1.0, 0.01, 100)
    assert decide("equality", values, 1.1).status == "violated"
    assert decide("equality", values, 1.1, spread=1.0).status == "holds"
    assert decide("equality", values, 1.1, spread=100.0).status == "inconclusive"
    biased = Series("bias", np.full(100, 0.1), 0.0)
    assert decide("equality", values, 1.0, series=(biased,)).status == "violated"
    known = Series("bias", np.full(100, 0.1), 0.0, spread=1.0)
    assert decide("equality", values, 1.0, series=(known,)).status == "holds"


def test_an_error_of_the_theory_itself_counts() -> None:
    values = normal(1.0, 0.01, 100)
    assert decide("equality", values, 1.02).status == "violated"
    assert decide("equality", values, 1.02, bound_error=0.01).status == "holds"


def test_equal_trials_need_no_standard_error() -> None:
    assert decide("equality", [2.0] * 5, 2.0).status == "holds"
    verdict = decide("equality", [2.0] * 60, 2.1)
    assert (verdict.status, verdict.z) == ("violated", -math.inf)
    assert decide("equality", [1e-17] * 60, 0.0, rounding=1e-12).status == "holds"


def test_a_series_beside_the_mean_must_be_right_too() -> None:
    values = normal(1.0, 0.1, 100)
    right = Series("bias", normal(0.0, 1.0, 100), 0.0)
    wrong = Series("bias", normal(0.6, 1.0, 100), 0.0)
    assert decide("equality", values, 1.0, series=(right,)).status == "holds"
    verdict = decide("equality", values, 1.0, series=(right, wrong))
    assert verdict.status == "violated"
    assert "bias: 0.6 and not 0, z = 6" in verdict.notes


def test_z_score_against_its_definition() -> None:
    x = np.array([1.0, 2.0, 4.0, 3.0])
    found = z_score(x, 2.0)
    assert (found.mean, found.error) == pytest.approx((2.5, np.std(x, ddof=1) / 2))
    assert found.z == pytest.approx(0.5 / found.error)


def test_skewed_trials_do_not_pass_for_a_wrong_mean() -> None:
    """Trials that missed the rare large ones: z is beyond -5 and its correction is not."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20_000, 60)) ** 2 * rng.standard_normal((20_000, 60)) ** 2
    found = [z_score(row, 1.0) for row in x]
    plain = sum(abs(m.z) > 5 for m in found)
    alarms = sum(m.too_large() or m.too_small() for m in found)
    # Some 400 and 2 of 20000.
    assert plain > 200
    assert alarms <= 20
    # The correction grows with z, and is none without skewness.
    values = normal(0.0, 1.0, 100)
    for target in (-0.7, 0.3, 0.9):
        mean = z_score(values, target)
        assert mean.corrected == pytest.approx(mean.z, abs=1e-9)
    skewed = np.array([0.0] * 99 + [1.0])
    scores = [z_score(skewed, target).corrected for target in np.linspace(0.02, 3.0, 50)]
    assert np.all(np.diff(scores) < 0)


# --- single observations ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inequality", "existence"])
def test_a_single_observation_beyond_rounding_is_a_violation(kind: str) -> None:
    assert decide(kind, [0.1, 0.9, 1.0], 1.0).status == "holds"
    assert decide(kind, [0.1, 1.0 + 1e-12], 1.0).status == "holds"
    verdict = decide(kind, [0.1, 1.001, 0.2], 1.0)
    assert (verdict.status, verdict.failures, verdict.observed) == ("violated", 1, 1.001)
    assert decide(kind, [1.001], 1.0, rounding=0.01).status == "holds"


def test_the_observation_nearest_to_its_own_bound_is_shown() -> None:
    verdict = decide("inequality", [1.0, 2.0, 3.0], [10.0, 3.0, 6.0])
    assert (verdict.observed, verdict.bound, verdict.slack) == (2.0, 3.0, 1.5)


# --- vacuous, not applicable --------------------------------------------------------------------


def test_a_bound_that_the_trivial_predictor_reaches_is_vacuous() -> None:
    values = [0.1] * 200
    assert decide("tail", values, 0.5, delta=0.05, trivial=0.6).status == "holds"
    verdict = decide("tail", values, 0.5, delta=0.05, trivial=0.5)
    assert verdict.status == "vacuous"
    assert verdict.vacuous == verdict.notes != ""
    assert (verdict.failures, verdict.slack) == (0, 5.0)
    # What is violated stays so, and says that it was vacuous besides.
    worse = decide("tail", [0.7] * 200, 0.5, delta=0.05, trivial=0.5)
    assert worse.status == "violated"
    assert worse.vacuous != ""
    assert decide("tail", [0.7] * 50, 0.5, delta=1.2).status == "vacuous"


def test_rank_of_all_columns_is_vacuous_without_a_draw() -> None:
    def observe(context: Context) -> Observations:
        context.below(2, context.instance.n, 0.5, 0.05)
        raise AssertionError("nothing is drawn")

    verdict = run(entry("tail", observe), pair(), 10, 0.95, 0, {})
    assert (verdict.status, verdict.trials, verdict.bound) == ("vacuous", 0, 0.5)
    assert (verdict.rank, verdict.delta) == (2, 0.05)
    assert math.isnan(verdict.observed)


def test_a_failing_assumption_is_named() -> None:
    never = Assumption("never", lambda instance: "because it is a pair")
    base = entry("tail", lambda context: Observations([], 1.0, delta=0.5))
    verdict = run(base._replace(assumptions=(never,)), pair(), 10, 0.95, 0, {})
    assert (verdict.status, verdict.notes) == ("not applicable", "because it is a pair")

    def observe(context: Context) -> Observations:
        context.require(False, "parameters do not fit")
        raise AssertionError

    verdict = run(entry("tail", observe), pair(), 10, 0.95, 0, {})
    assert (verdict.status, verdict.notes) == ("not applicable", "parameters do not fit")


# --- audits -------------------------------------------------------------------------------------


def test_draws_that_repeat_or_are_scaled_are_noticed() -> None:
    def observe(marks: Array, sizes: Array) -> Observer:
        def inner(context: Context) -> Observations:
            for mark, size in zip(marks, sizes, strict=True):
                context.fingerprint(float(mark))
                context.audit("|S w|^2", float(size), 1.0)
            return Observations([0.0] * 100, 1.0, delta=0.05)

        return inner

    different, right = np.arange(100.0), normal(1.0, 0.1, 100)
    for marks, sizes, status, reason in (
        (different, right, "holds", ""),
        (np.zeros(100), right, "violated", "all 100 trials drew the same operator"),
        (different, 1.1 * right, "violated", "has the mean 1.1 and not 1"),
    ):
        verdict = run(entry("tail", observe(marks, sizes)), pair(), 100, 0.95, 0, {})
        assert verdict.status == status
        assert reason in verdict.notes


def test_equal_draws_are_noticed_where_chance_does_not_explain_them() -> None:
    def observer(chance: float) -> Observer:
        def inner(context: Context) -> Observations:
            for _ in context.generators():
                context.fingerprint(1.0, chance)
            return Observations([0.0] * context.trials, 1.0, delta=0.05)

        return inner

    # 2^-20 is above the level of 5.7e-7, 2^-21 is below
    for chance, trials, status in ((1.0, 400, "holds"), (0.5, 21, ""), (0.5, 22, "violated")):
        verdict = run(entry("tail", observer(chance)), pair(), trials, 0.95, 0, {})
        assert (verdict.status == "violated") == (status == "violated")


def test_trials_have_streams_of_their_own() -> None:
    def first(claim_id: str, name: str, entropy: int) -> list[float]:
        seen: list[float] = []

        def observe(context: Context) -> Observations:
            seen.extend(rng.random() for rng in context.generators())
            return Observations(seen, 1.0, delta=0.5)

        base = entry("tail", observe)
        other = dataclasses.replace(base.claim, id=claim_id)
        run(
            base._replace(claim=other), Instance(name, (np.eye(2), np.eye(2))), 5, 0.95, entropy, {}
        )
        return seen

    base = first("a.b", "x", 0)
    assert base == first("a.b", "x", 0)
    others = [first("a.c", "x", 0), first("a.b", "y", 0), first("a.b", "x", 1)]
    numbers = base + [x for other in others for x in other]
    assert len(set(numbers)) == 20


# --- the catalogue ------------------------------------------------------------------------------


def test_every_claim_is_whole() -> None:
    catalogue = theory.claims()
    assert list(catalogue) == sorted(catalogue)
    names = set(theory.instances())
    bundled = set(sa.load_heads().names)
    for name, record in catalogue.items():
        assert record.id == name
        assert name.count(".") == 1
        assert record.status in STATUSES
        assert record.kind in KINDS
        assert all((record.title, record.statement, record.source, record.observes))
        assert "  " not in record.statement
        assert "\n" not in record.statement
        assert record.instances, name
        assert set(record.instances) <= names
        assert set(record.recorded.values()) <= set(VERDICTS)
        assert {x for x in record.recorded if "/" in x} <= bundled
        refuted = "violated" in record.recorded.values()
        assert refuted == (record.status == "refuted"), name
        json.dumps(record.as_dict(), allow_nan=False)


def test_claims_hold_their_parameters_as_constants() -> None:
    record = theory.claims()["sketching.jl_pairs_gaussian"]
    assert record.constants == {"eps": 0.5, "delta": 0.05, "points": 32.0}
    assert theory.claims()["sketching.ose_gaussian_loose"].constants["factor"] == 18.0


def test_registration_refuses_what_is_wrong() -> None:
    fields: dict[str, Any] = {
        "title": "t",
        "statement": "s",
        "source": "s",
        "status": "derived",
        "kind": "tail",
        "observes": "x",
        "recorded": {"reference": "holds"},
    }
    for change, text in (
        ({"status": "guessed"}, "status must be"),
        ({"kind": "guess"}, "kind must be"),
        ({"recorded": {"reference": "fine"}}, "recorded must hold verdicts"),
    ):
        with pytest.raises(ValueError, match=text):
            claim("test.x", **{**fields, **change})
    with pytest.raises(ValueError, match=r"id must be topic\.name, got 'x'"):
        claim("x", **fields)
    theory.claims()
    with pytest.raises(ValueError, match="id must be unique"):
        claim("sketching.amm_markov", **fields)(lambda context: Observations([], 1.0))
    with pytest.raises(ValueError, match="name must be unique, got 'reference' twice"):
        instance("reference", "again")(lambda: (np.eye(2), np.eye(2)))
    with pytest.raises(ValueError, match="name must not hold a slash"):
        instance("a/b", "slash")


# --- check --------------------------------------------------------------------------------------


def test_check_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"got 'sketching\.moment_gausian'; did you mean"):
        theory.check("sketching.moment_gausian")
    with pytest.raises(TypeError, match=r"ranks must be a parameter of claim .*; did you mean 'ra"):
        theory.check("sketching.moment_gaussian", ranks=3)
    with pytest.raises(
        ValueError, match="named instance, got 'refrence'; did you mean 'reference'"
    ):
        theory.check("sketching.moment_gaussian", "refrence")
    with pytest.raises(TypeError, match="problem must be an AttentionProblem"):
        theory.check("sketching.moment_gaussian", 3)
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        theory.check("sketching.moment_gaussian", trials=0)
    with pytest.raises(TypeError, match="trials must be an integer, got float"):
        theory.check("sketching.moment_gaussian", trials=2.0)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 1.0"):
        theory.check("sketching.moment_gaussian", confidence=1.0)
    with pytest.raises(TypeError, match="sketch must be callable, got str"):
        theory.check("sketching.moment_gaussian", sketch="gaussian")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="A must have two axes"):
        theory.check("sketching.moment_gaussian", (np.ones(3), np.ones((3, 1))))
    with pytest.raises(ValueError, match="V must have one row for each of the n = 3"):
        theory.check("sketching.moment_gaussian", (np.ones((2, 3)), np.ones((2, 1))))


def test_the_same_seed_gives_the_same_verdict() -> None:
    first, again, other = (
        theory.check("sketching.hutchinson_tail", "rank-one", trials=40, rng=seed)
        for seed in (3, 3, 4)
    )
    assert first == again
    assert first.observed != other.observed


@pytest.mark.threads
def test_check_is_the_same_for_any_number_of_threads() -> None:
    import numba

    before = numba.get_num_threads()
    found = []
    for count in range(1, before + 1):
        numba.set_num_threads(count)
        try:
            found.append(theory.check("sketching.moment_srht", "reference", trials=40))
            assert numba.get_num_threads() == count
        finally:
            numba.set_num_threads(before)
    assert all(x == found[0] for x in found)


def test_a_user_can_hand_in_a_sketch_of_any_form() -> None:
    def plain(kind: str, r: int, n: int, rng: np.random.Generator, **_: Any) -> Array:
        return rng.standard_normal((r, n)) / math.sqrt(r)

    verdict = theory.check("sketching.moment_gaussian", trials=100, sketch=plain)
    assert verdict.status == "holds"
    wrong = theory.check("sketching.moment_rademacher", trials=2000, sketch=plain)
    # (a + b)/r and not (a + b - 2c)/r: 3 % apart, with a standard error of 1 %.
    assert wrong.observed == pytest.approx(2.6834, rel=0.06)


def test_verdicts_can_be_written_as_json() -> None:
    for verdict in (
        theory.check("sketching.ose_sjlt"),
        theory.check("sketching.eckart_young_attained", "spectrum-exact-rank", rank=20),
        theory.check("sketching.moment_gaussian", trials=5),
    ):
        back = json.loads(json.dumps(verdict.as_dict(), allow_nan=False))
        assert back["claim"] == verdict.claim
        assert back["status"] == verdict.status
        assert str(verdict).startswith(f"{verdict.claim} on {verdict.instance}: {verdict.status}")


def test_bounds_without_draws() -> None:
    found = theory.bound("sketching.moment_gaussian", rank=16)
    assert found == pytest.approx(2.6833788937, rel=1e-10)
    assert theory.bound("sketching.ose_sjlt") == 0.5
    assert math.isnan(theory.bound("sketching.rsvd_structure", "spectrum-step"))
    assert math.isnan(theory.bound("sketching.rsvd_fro", "reference"))


# --- instances ----------------------------------------------------------------------------------


def test_an_attention_problem_is_its_dense_matrix_without_masked_keys() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, 4)).astype(np.float32) for n in (5, 7, 7))
    mask = np.array([1, 1, 0, 1, 1, 0, 1], bool)
    problem = sa.AttentionProblem(q, k, v, key_mask=mask)
    found = Instance("masked", problem)
    shorter = sa.AttentionProblem(q, k[mask], v[mask]).astype(np.float64)
    assert (found.m, found.n) == found.a.shape == (5, 5)
    assert np.allclose(found.a, shorter.exact.to_dense(), atol=1e-15)
    assert np.array_equal(found.v, shorter.values)
    assert found.stochastic
    mean = np.linalg.norm(found.product - found.v.mean(axis=0))
    assert found.trivial == min(np.linalg.norm(found.product), mean)
    with pytest.raises(ValueError, match="read-only"):
        found.a[0, 0] = 1.0


def test_causal_problems_and_rows_that_see_nothing() -> None:
    heads = sa.make_heads("gaussian", n=32, d=8, rng=1)
    problem = sa.AttentionProblem(*heads[0].arrays, causal=True)
    verdict = theory.check("sketching.moment_countsketch", problem, trials=60)
    assert verdict.status == "holds"


def test_problems_that_a_claim_cannot_be_checked_on_say_why() -> None:
    q = np.zeros((DENSE_ENTRIES // 2048 + 1, 1))
    large = sa.AttentionProblem(q, np.zeros((2048, 1)), np.zeros((2048, 1)))
    without = sa.AttentionProblem(np.zeros((3, 2)), np.zeros((3, 2)))
    empty = sa.AttentionProblem(np.zeros((0, 2)), np.zeros((3, 2)), np.zeros((3, 2)))
    zero = sa.AttentionProblem(np.zeros((3, 2)), np.zeros((3, 2)), np.zeros((3, 2)))
    for problem, reason in (
        (large, "needs the dense matrix"),
        (without, "needs values V"),
        (empty, "needs the dense matrix"),
        (zero, "needs A and V that are not zero"),
    ):
        verdict = theory.check("sketching.moment_gaussian", problem, trials=5)
        assert verdict.status == "not applicable"
        assert reason in verdict.notes


@pytest.mark.parametrize("t", [0.0, 1.0, 5.0, 800.0])
def test_spiked_attention_has_its_singular_values(t: float) -> None:
    n = 16
    a = theory.spiked_attention(n, t)
    logits = sa.AttentionProblem(t * np.eye(n), np.eye(n), scale=1.0).astype(np.float64)
    assert np.allclose(a, logits.exact.to_dense(), atol=1e-14)
    s = 1.0 if t > 700 else (math.exp(t) - 1) / (math.exp(t) + n - 1)
    sigma = np.linalg.svd(a, compute_uv=False)
    assert np.allclose(sigma, [1.0] + [s] * (n - 1), atol=1e-13)


def test_the_spiked_instance_has_the_floor_of_the_specification() -> None:
    sigma = theory.instances()["spiked"].svd[1]
    assert sigma[1] == pytest.approx(0.697275, abs=1e-6)
    assert np.linalg.norm(sigma[16:]) == pytest.approx(4.830864, abs=1e-6)


# --- validate -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result() -> ValidationResult:
    heads = sa.make_heads("clustered", n=48, d=8, heads=2, rng=0)
    return validate(SOME, heads, trials=60)


def test_a_validation_checks_instances_and_heads(result: ValidationResult) -> None:
    rows = {(row.claim.id, row.verdict.instance): row for row in result.rows}
    assert len(rows) == len(result.rows)
    for name in SOME:
        wanted = {*theory.claims()[name].instances, "clustered/head0", "clustered/head1"}
        assert {on for claim_id, on in rows if claim_id == name} == wanted
    for row in result.rows:
        named = "/" not in row.verdict.instance
        assert row.recorded == (row.claim.recorded[row.verdict.instance] if named else None)
    single = theory.check(SOME[0], "reference", trials=60)
    assert rows[SOME[0], "reference"].verdict == single


def test_a_validation_does_not_depend_on_jobs(result: ValidationResult) -> None:
    heads = sa.make_heads("clustered", n=48, d=8, heads=2, rng=0)
    again = validate(SOME, heads, trials=60, jobs=2)
    assert [row.verdict for row in again.rows] == [row.verdict for row in result.rows]


def test_tables_of_a_validation(result: ValidationResult) -> None:
    frame = result.frame
    assert tuple(frame.columns) == COLUMNS
    assert len(frame) == len(result.rows)
    text = result.render(every=True)
    for name in SOME:
        assert name in text
    assert "2 heads" in text
    assert "all verdicts are the recorded ones" in text
    plain = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert len(plain["rows"]) == len(result.rows)
    assert plain["unexpected"] == 0


def test_a_verdict_that_differs_from_its_record_is_named(result: ValidationResult) -> None:
    row = next(row for row in result.rows if row.verdict.status == "holds" and row.recorded)
    odd = dataclasses.replace(row, recorded="violated")
    assert row.expected
    assert not odd.expected
    changed = dataclasses.replace(result, rows=(odd, *result.rows[1:]))
    assert changed.unexpected == (odd,)
    text = changed.render()
    assert "1 verdicts differ from the record" in text
    assert "[recorded: violated]" in text


def expected(
    status: str, recorded: str | None, claim_status: str = "derived", **fields: Any
) -> bool:
    repeats = fields.pop("repeats", True)
    record = dataclasses.replace(theory.claims()[SOME[1]], status=claim_status)
    base = Verdict("a.b", status, 1.0, 1.0, 1.0, 200, 0, (0.0, 0.1), "", delta=0.05)
    return Row(record, dataclasses.replace(base, **fields), recorded, 0.95, repeats).expected


def test_what_differs_from_a_record() -> None:
    assert expected("vacuous", "vacuous")
    assert not expected("holds", "vacuous")
    assert not expected("violated", "holds")
    # Without a record only a theorem that fails is news.
    assert all(expected(status, None) for status in VERDICTS if status != "violated")
    assert not expected("violated", None)
    assert expected("violated", None, "refuted")
    # The same draws must give the same verdict; others may not suffice to certify.
    assert not expected("inconclusive", "holds")
    assert not expected("holds", "inconclusive")
    assert expected("inconclusive", "holds", repeats=False)
    assert expected("holds", "inconclusive", repeats=False)
    assert not expected("inconclusive", "violated", repeats=False)
    assert not expected("violated", "holds", repeats=False)
    assert expected("inconclusive", "inconclusive")


def test_what_needs_more_trials_contradicts_no_record() -> None:
    for recorded in ("violated", "holds"):
        for trials, needs, wanted in ((60, 61, True), (60, 60, False), (60, None, False)):
            fields: dict[str, Any] = {"trials": trials, "needs": needs, "repeats": False}
            if recorded == "violated":
                assert expected("inconclusive", recorded, **fields) == wanted
    assert not expected("inconclusive", "violated", trials=60, needs=61, repeats=True)
    assert not expected("violated", "holds", trials=60, needs=61, repeats=False)


def test_bundled_heads_have_a_record() -> None:
    heads = sa.load_heads()
    found = validate("sketching.moment_sample_optimal", heads[:1], trials=60)
    assert [row.recorded for row in found.rows] == ["holds", "holds", "holds"]
    # The same name with other numbers is another head.
    other = sa.AttentionProblem(*heads[1].arrays, name=heads[0].name)
    found = validate("sketching.moment_sample_optimal", other, trials=60)
    assert [row.recorded for row in found.rows] == ["holds", "holds", None]


def test_topics_and_claims_about_instances_only() -> None:
    head = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
    found = validate("sketching.posterior_rank_one", head, trials=30)
    assert [row.verdict.instance for row in found.rows] == ["rank-one"]


def test_validate_refuses_what_is_wrong() -> None:
    head = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
    with pytest.raises(ValueError, match=r"got 'sketching\.amm_markof'; did you mean"):
        validate("sketching.amm_markof", head)
    with pytest.raises(ValueError, match="got 'sketch'; did you mean 'sketching'"):
        validate("sketch", head)
    with pytest.raises(ValueError, match="claims must hold at least one id"):
        validate([], head)
    with pytest.raises(TypeError, match="claims must be ids or topics, got int"):
        validate(3, head)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(TypeError, match="claims must hold strings, got int"):
        validate([3], head)  # type: ignore[list-item]  # on purpose
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        validate(SOME, head, jobs=0)
    with pytest.raises(TypeError, match="jobs must be an integer, got str"):
        validate(SOME, head, jobs="2")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(TypeError, match="progress must be a bool, got int"):
        validate(SOME, head, progress=1)  # type: ignore[arg-type]  # on purpose
    named = sa.AttentionProblem(*head.arrays, name="reference")
    with pytest.raises(ValueError, match="must not have the name of an instance, got 'reference'"):
        validate(SOME, named)


def test_an_error_in_a_check_names_claim_and_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from sketchattn.theory.engine import registry

    def fails(context: Context) -> Observations:
        raise ZeroDivisionError("no")

    known = get_entry(SOME[0])
    monkeypatch.setitem(registry._ENTRIES, SOME[0], known._replace(observe=fails, parameters={}))
    head = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
    with pytest.raises(
        RuntimeError, match=r"claim 'sketching.moment_countsketch' failed on 'gauss"
    ):
        validate(SOME[0], head, trials=2)


def test_pictures_of_a_validation(result: ValidationResult, tmp_path: Path) -> None:
    paths = result.plot(tmp_path / "new")
    assert [path.name for path in paths] == [f"{name}.png" for name in SOME]
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000
    assert sorted(x.name for x in (tmp_path / "new").iterdir()) == sorted(x.name for x in paths)


def test_a_picture_without_anything_to_draw(tmp_path: Path) -> None:
    head = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
    found = validate("sketching.ose_sjlt", head, trials=2)
    (path,) = found.plot(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_pictures_show_values_bound_and_trivial_predictor() -> None:
    from matplotlib.figure import Figure

    from sketchattn.theory.engine.instances import get_instance
    from sketchattn.theory.engine.pictures import draw, steps_of

    record = theory.claims()["sketching.amm_jl_moment"]
    steps = steps_of(record, get_instance("clusters"), 0)
    assert [step.rank for step in steps] == [32, 64, 128, 256]
    axes = Figure().add_subplot()
    draw(axes, record, steps)
    lines: Mapping[str, Any] = {str(line.get_label()): line for line in axes.get_lines()}
    assert np.allclose(lines["bound"].get_ydata(), [2 / r for r in (32, 64, 128, 256)])
    assert "the mean of V" in lines


# --- topics -------------------------------------------------------------------------------------

THEORY = Path(theory.__file__).parent
TOPICS = sorted(
    x.name for x in THEORY.iterdir() if (x / "__init__.py").is_file() and x.name != "engine"
)


def test_the_stub_lists_exactly_the_topics() -> None:
    listed = re.findall(
        r"^from \. import (\w+) as \1$", (THEORY / "__init__.pyi").read_text(), re.M
    )
    assert sorted(listed) == TOPICS
    assert len(TOPICS) >= 8


@pytest.mark.parametrize("topic", TOPICS)
def test_a_topic_is_reached_without_an_import_of_its_own(topic: str) -> None:
    program = f"import sketchattn as sa; print(sa.theory.{topic}.__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == f"sketchattn.theory.{topic}", done.stderr


def test_the_engine_imports_no_topic() -> None:
    program = (
        "import pkgutil, sys; from importlib import import_module\n"
        "import sketchattn.theory.engine as engine\n"
        "for x in pkgutil.iter_modules(engine.__path__): "
        "import_module(f'{engine.__name__}.{x.name}')\n"
        "print(*[x for x in sys.modules if x.startswith('sketchattn.theory.')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    loaded = {x.split(".")[2] for x in done.stdout.split()}
    assert loaded == {"engine"}, done.stderr
