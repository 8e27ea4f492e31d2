"""Claims about rows, their statistics and their choice: worked numbers, record, broken versions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from claim_cases import (
    Factory,
    check_not_reported,
    check_odd,
    check_recorded,
    check_repeats,
    check_reported,
    check_statuses,
    claims_of,
    on_heads,
    problem_on,
    recorded_pairs,
    refuted,
)
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import entropy, spearmanr

import sketchattn as sa
from sketchattn.errors.perturbation import value_diameter
from sketchattn.theory.engine.checking import check
from sketchattn.theory.engine.instances import instances
from sketchattn.theory.informer.formulas import (
    miss_probability,
    rank_agreement,
    selection_bound,
    variation_bound,
)
from sketchattn.zoo.informer.method import published_count
from sketchattn.zoo.informer.statistics import row_statistic

Array = NDArray[Any]

CLAIMS = claims_of("informer")
RECORDED = recorded_pairs(CLAIMS)
REFUTED = refuted(CLAIMS)


def from_logits(logits: Array, v: Array | None = None) -> sa.AttentionProblem:
    return sa.AttentionProblem(logits, np.eye(logits.shape[1]), v, scale=1.0)


def gaussian(seed: int, n_q: int, n_k: int, temperature: float) -> sa.AttentionProblem:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, 8)) for n in (n_q, n_k, n_k))
    return sa.AttentionProblem(q, k, v, scale=temperature / math.sqrt(8))


# --- worked numbers -------------------------------------------------------------------------------


def test_disagreement_example() -> None:
    problem = problem_on("worked")
    found = {name: row_statistic(problem, name) for name in ("m", "max_mean", "kl", "oracle")}
    want = {
        "m": [1.2527630, 1.0986123, 1.2432338],
        "max_mean": [0.6931472, 0, 0.7324082],
        "kl": [0.1541507, 0, 0.1446215],
        "oracle": [0.1836735, 0, 0.16],
    }
    for name, numbers in want.items():
        assert found[name] == pytest.approx(numbers, abs=1e-7)
    top = {name: int(np.argmax(x)) for name, x in found.items()}
    assert top == {"m": 0, "max_mean": 2, "kl": 0, "oracle": 0}
    regret = {name: sa.selection_regret(problem, [row]).regret for name, row in top.items()}
    assert regret["max_mean"] == pytest.approx(0.0236735, abs=1e-7)
    assert regret["m"] == regret["oracle"] == 0.0
    verdict = check("informer.regret", problem, rank=1)
    assert verdict.notes.startswith("regret m ")
    assert "max_mean 0.0689" in verdict.notes  # 0.0236735 over the sum 0.3436735
    agreement = rank_agreement(problem, 1)
    assert agreement.spearman == pytest.approx(0.5)
    assert agreement.recall == 0.0


def test_counterexample_of_the_row_norms() -> None:
    a = instances()["two-rows"].a
    problem = from_logits(np.log(a))
    excess = row_statistic(problem, "m") - math.log(4)
    assert excess == pytest.approx([3.1662, 0.6030], abs=1e-3)
    assert row_statistic(problem, "row_norm") == pytest.approx([0.5774, 0.7807], abs=1e-3)
    variation = np.abs(a - 0.25).sum(axis=1) / 2
    assert variation == pytest.approx([0.25, 0.519], abs=1e-3)
    verdict = check("informer.measure_orders_rows", "two-rows")
    assert verdict.status == "violated"
    assert verdict.observed == pytest.approx(3.1662 - 0.6030, abs=2e-3)


def test_miss_probability() -> None:
    assert miss_probability(1024, 35) == pytest.approx(0.966, abs=5e-4)
    assert np.asarray(miss_probability([2, 1], 3)).tolist() == [0.125, 0.0]


@pytest.mark.statistical
def test_a_planted_largest_key_is_missed(global_random_seed: int) -> None:
    rng = np.random.default_rng(global_random_seed)
    k = np.eye(1024)
    problem = sa.AttentionProblem(9 * k[rng.integers(0, 1024, 1000)], k, scale=1.0)
    keys = sa.Informer(1, samples=35).draw(problem, rng)["key_samples"]
    missed = np.mean((keys != problem.q.argmax(axis=1)[:, None]).all(axis=1))
    # A binomial share of 1000 has the deviation 0.0057: five of them are 0.03.
    assert missed == pytest.approx(miss_probability(1024, 35), abs=5 * 0.0057)


# --- formulas -------------------------------------------------------------------------------------


def test_measures_and_bounds_from_their_definitions() -> None:
    rng = np.random.default_rng(0)
    for i in range(50):
        n_q, n_k = (int(x) for x in rng.integers(2, 60, 2))
        logits = float(rng.choice([0.1, 1, 10, 100])) * rng.standard_normal((n_q, n_k))
        v = rng.standard_normal((n_k, 3))
        problem = from_logits(logits, v)
        size = 1e-10 * (1 + np.abs(logits).max())
        m = logsumexp(logits, axis=1) - logits.mean(axis=1)
        bar = logits.max(axis=1) - logits.mean(axis=1)
        assert row_statistic(problem, "m") == pytest.approx(m, abs=size)
        assert row_statistic(problem, "max_mean") == pytest.approx(bar, abs=size)
        names = ["lemma1", "sandwich"]
        names += ["variation", "row_selection", "regret"] if i % 5 == 0 else []
        for name in names:
            verdict = check(f"informer.{name}", problem, trials=3)
            assert verdict.status == "holds", str(verdict)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_divergence_bounds_the_error(temperature: float) -> None:
    problem = gaussian(1, 30, 40, temperature)
    a = problem.exact.to_dense()
    kl = row_statistic(problem, "kl")
    assert kl == pytest.approx([entropy(np.full(40, 1 / 40), row) for row in a])
    errors = np.linalg.norm((a - 1 / 40) @ problem.values, axis=1)
    variation = np.abs(a - 1 / 40).sum(axis=1) / 2
    diameter = value_diameter(problem.values)
    pairs = problem.values[:, None] - problem.values[None]
    assert diameter == pytest.approx(np.linalg.norm(pairs, axis=2).max())
    assert (errors <= variation * diameter).all()
    assert (variation <= np.sqrt(kl / 2)).all()
    assert (variation <= np.sqrt(1 - np.exp(-kl))).all()
    assert variation_bound(kl) == pytest.approx(np.sqrt(np.minimum(kl / 2, 1 - np.exp(-kl))))
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = rng.permutation(30)[: int(rng.integers(0, 31))]
        left = float(np.sum(np.delete(errors, rows) ** 2))
        by_kl, by_bar = (selection_bound(problem, rows, measure=x) for x in ("kl", "max_mean"))
        assert left <= by_kl <= by_bar
    # The rows of largest KL minimise the bound by KL.
    best = np.argsort(-kl)[:10]
    others = [selection_bound(problem, rng.permutation(30)[:10]) for _ in range(20)]
    assert selection_bound(problem, best) <= min(others)


def test_rank_agreement_is_spearman() -> None:
    problem = gaussian(2, 50, 20, 2.0)
    m, bar = (row_statistic(problem, x) for x in ("m", "max_mean"))
    found = rank_agreement(problem, 10)
    assert found.spearman == pytest.approx(spearmanr(m, bar).statistic)
    top = [set(np.argsort(-x)[:10].tolist()) for x in (m, bar)]
    assert found.recall == len(top[0] & top[1]) / 10
    assert math.isnan(rank_agreement(from_logits(np.zeros((3, 4))), 2).spearman)


@pytest.mark.statistical
def test_random_rows_leave_their_share(global_random_seed: int) -> None:
    problem = gaussian(3, 40, 30, 1.0)
    verdict = check("informer.random_rows", problem, trials=2000, rng=global_random_seed, rank=12)
    assert verdict.status == "holds"
    assert verdict.z is not None
    assert abs(verdict.z) <= 5
    assert verdict.bound == pytest.approx(0.7)


def test_a_large_shift_of_the_keys_decides_with_the_wrong_divisor() -> None:
    problem = gaussian(4, 40, 60, 1.0)
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 60, (40, 20))
    c = 1e5 * rng.standard_normal(8)
    moved = sa.AttentionProblem(problem.q, problem.k + c, problem.values, scale=problem.scale)
    top = {}
    for divisor in ("n_samples", "n_keys"):
        found = [row_statistic(x, key_samples=keys, mean_divisor=divisor) for x in (problem, moved)]
        top[divisor] = [np.argsort(-x, kind="stable")[:10].tolist() for x in found]
    assert top["n_samples"][0] == top["n_samples"][1]
    assert top["n_keys"][1] == np.argsort(-(problem.q @ c), kind="stable")[:10].tolist()


# --- the record -----------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize(("name", "on"), RECORDED)
def test_recorded_verdicts(name: str, on: str, global_random_seed: int) -> None:
    # Means alarm at |z| > 5; the rest is deterministic or far from its limit.
    check_recorded(CLAIMS, name, on, rng=global_random_seed)


@pytest.mark.statistical
@pytest.mark.parametrize("name", on_heads(CLAIMS))
def test_recorded_verdicts_on_bundled_heads(name: str, global_random_seed: int) -> None:
    head = sa.load_heads()[global_random_seed % 12]
    verdict = check(name, head, trials=60, rng=global_random_seed)
    assert verdict.status == CLAIMS[name].recorded["heads"], str(verdict)


def test_statuses() -> None:
    assert {c.status for c in CLAIMS.values()} == {"published", "derived", "refuted"}
    check_statuses(CLAIMS)


def test_proposition1_is_false_without_its_provisos() -> None:
    # Five logits of 1 and of -1, against 1.01, -3.3 and eight numbers that make the mean zero.
    even, skewed = np.repeat([1.0, -1.0], 5), np.array([1.01, *(8 * [2.29 / 8]), -3.3])
    assert skewed.max() > even.max()
    assert skewed.var() > even.var()
    gap = float(logsumexp(even) - logsumexp(skewed))
    verdict = check("informer.proposition1", "skewed-rows")
    assert (verdict.status, verdict.failures) == ("violated", 1)
    assert verdict.observed == pytest.approx(gap, rel=1e-9)
    found = rank_agreement(problem_on("clusters"), 8)
    note = check("informer.proposition1", "clusters", rank=8).notes
    assert f"Spearman {found.spearman:.3f}" in note


@pytest.mark.parametrize("on", ["worked", "two-values"])
def test_proposition1_is_not_violated_by_everything(on: str) -> None:
    assert check("informer.proposition1", on).status == "holds"
    # A measure that falls with Mbar is reported where the honest one is not.
    broken = statistic("m", lambda x: -x)
    assert check("informer.proposition1", on, sketch=broken).status == "violated"


# --- negative controls ----------------------------------------------------------------------------


def honest(
    kind: str, r: int, n: int, rng: np.random.Generator, *, problem: Any, **parameters: Any
) -> Array:
    """Write everything from its definition."""
    logits = problem.scale * problem.q @ problem.k.T
    seen = np.ones(logits.shape, bool)
    if problem.causal:
        seen = np.tril(seen)
    counts = seen.sum(axis=1)
    exact = np.where(seen, np.exp(logits - logits.max(axis=1, keepdims=True)), 0.0)
    exact /= exact.sum(axis=1, keepdims=True)
    flat = seen / counts[:, None]
    if kind == "random_rows":
        return rng.permutation(problem.n_q)[:r]
    if kind == "key_samples":
        return rng.integers(0, n, (problem.n_q, r))
    if kind == "informer":
        out = flat.copy()
        out[parameters["rows"]] = exact[parameters["rows"]]
        return np.asarray(out)
    assert kind == "statistic"
    name, keys = parameters["statistic"], parameters.get("key_samples")
    if name == "row_norm":
        return np.asarray(np.linalg.norm(exact, axis=1))
    if name == "oracle":
        return np.asarray(np.sum(((exact - flat) @ problem.values) ** 2, axis=1))
    if keys is not None:
        logits, seen = np.take_along_axis(logits, keys, axis=1), np.ones(keys.shape, bool)
        counts = np.full(len(keys), keys.shape[1])
    divisor = n if parameters.get("mean_divisor") == "n_keys" else counts
    mean = np.where(seen, logits, 0.0).sum(axis=1) / divisor
    masked = np.where(seen, logits, -np.inf)
    if name == "max_mean":
        return np.asarray(masked.max(axis=1) - mean)
    kl = np.asarray(logsumexp(masked, axis=1) - mean - np.log(counts))
    return kl if name == "kl" else kl + np.log(counts)


def statistic(name: str, change: Callable[[Array], Array]) -> Factory:
    """Return an implementation with one statistic changed."""

    def broken(kind: str, r: int, n: int, rng: np.random.Generator, **parameters: Any) -> Array:
        found = honest(kind, r, n, rng, **parameters)
        return change(found) if parameters.get("statistic") == name else found

    return broken


def released_divisor(
    kind: str, r: int, n: int, rng: np.random.Generator, **parameters: Any
) -> Array:
    """Divide every sampled sum by the number of keys."""
    if "key_samples" in parameters:
        parameters["mean_divisor"] = "n_keys"
    return honest(kind, r, n, rng, **parameters)


def uncentred(kind: str, r: int, n: int, rng: np.random.Generator, **parameters: Any) -> Array:
    """Forget the mean of the logits."""
    problem = parameters["problem"]
    if parameters["statistic"] == "max_mean":
        return np.asarray((problem.scale * problem.q @ problem.k.T).max(axis=1))
    return honest(kind, r, n, rng, **parameters)


def summed(kind: str, r: int, n: int, rng: np.random.Generator, **parameters: Any) -> Array:
    """Give lazy rows the sum of the values they see."""
    found = honest(kind, r, n, rng, **parameters)
    if kind == "informer":
        lazy = np.setdiff1d(np.arange(len(found)), parameters["rows"])
        found[lazy] *= np.count_nonzero(found[lazy], axis=1)[:, None]
    return found


def all_exact(kind: str, r: int, n: int, rng: np.random.Generator, **parameters: Any) -> Array:
    """Use more rows than allowed."""
    if kind == "informer":
        parameters["rows"] = np.arange(parameters["problem"].n_q)
    return honest(kind, r, n, rng, **parameters)


def shuffled(kind: str, r: int, n: int, rng: np.random.Generator, **parameters: Any) -> Array:
    """Compute other rows than asked for."""
    if kind == "informer":
        parameters["rows"] = (np.asarray(parameters["rows"]) + 1) % parameters["problem"].n_q
    return honest(kind, r, n, rng, **parameters)


def first_rows(kind: str, r: int, n: int, rng: np.random.Generator, **parameters: Any) -> Array:
    return np.arange(r)


def distinct_keys(kind: str, r: int, n: int, rng: np.random.Generator, **parameters: Any) -> Array:
    """Draw keys without replacement."""
    rows = range(parameters["problem"].n_q)
    return np.array([rng.permutation(n)[:r] for _ in rows])


CONTROLS: list[tuple[str, str, Factory]] = [
    ("lemma1", "worked", statistic("m", lambda x: x - 0.1)),
    ("lemma1", "two-values", statistic("m", lambda x: x + 1)),
    ("lemma1", "reference", statistic("max_mean", lambda x: 0.5 * x)),
    ("sandwich", "worked", statistic("kl", lambda x: x - 0.1)),
    ("sandwich", "reference", statistic("m", lambda x: x + 0.1)),
    ("sandwich", "two-values", statistic("max_mean", lambda x: 0.1 * x)),
    ("sandwich", "causal", statistic("max_mean", lambda x: x + 3)),
    ("key_shift", "clusters", released_divisor),
    ("key_shift", "worked", uncentred),
    ("row_selection", "causal", summed),
    ("row_selection", "reference", summed),
    ("row_selection", "clusters", shuffled),
    ("row_selection", "reference", all_exact),
    ("regret", "reference", all_exact),
    ("oracle", "worked", shuffled),
    ("oracle", "causal", statistic("oracle", lambda x: -x)),
    ("random_rows", "reference", first_rows),
    ("variation", "two-values", statistic("kl", lambda x: 0.5 * x)),
    ("total_bound", "two-values", statistic("kl", lambda x: 0.1 * x)),
    ("total_bound", "lazy-queries", summed),
    ("total_bound_surrogate", "lazy-queries", statistic("max_mean", lambda x: 1e-3 * x)),
    ("miss_rate", "worked", distinct_keys),
]


@pytest.mark.parametrize(("name", "on", "broken"), CONTROLS)
def test_broken_implementations_are_reported(name: str, on: str, broken: Factory) -> None:
    check_reported(f"informer.{name}", on, broken)


@pytest.mark.parametrize(("name", "on"), sorted({(name, on) for name, on, _ in CONTROLS}))
def test_an_implementation_from_the_definition_is_not_reported(name: str, on: str) -> None:
    check_not_reported(f"informer.{name}", on, honest)


def test_every_theorem_has_a_control() -> None:
    controlled = {f"informer.{name}" for name, _, _ in CONTROLS}
    assert controlled == set(CLAIMS) - REFUTED


# --- odd problems ---------------------------------------------------------------------------------


def test_odd_problems_get_a_verdict() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((5, 3)), rng.standard_normal((9, 3)), rng.standard_normal((9, 2))
    mask = np.arange(9) % 3 > 0
    odd = [
        sa.AttentionProblem(q[:1], k[:1], v[:1], name="one"),
        sa.AttentionProblem(q, k, v, key_mask=mask, name="masked"),
        sa.AttentionProblem(q, k, np.zeros((9, 2)), name="zero values"),
        sa.AttentionProblem(q, k, name="no values"),
        sa.AttentionProblem(k, k, v, causal=True, name="causal"),
        sa.AttentionProblem(k, k, v, causal=True, key_mask=~mask, name="causal and masked"),
        sa.AttentionProblem(1e3 * q, k, v, name="large logits"),
        sa.AttentionProblem(0 * q, k, v, name="uniform"),
        sa.AttentionProblem(q, k, v, key_mask=np.zeros(9, bool), name="no keys"),
    ]
    check_odd(CLAIMS, odd, trials=60)


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_verdicts_repeat_and_bounds_need_no_draw(name: str) -> None:
    check_repeats(CLAIMS, name, trials=20)


def test_refusals() -> None:
    problem = gaussian(0, 5, 6, 1.0)
    calls: list[Callable[[], object]] = [
        lambda: variation_bound(-1.0),
        lambda: selection_bound(problem, [5]),
        lambda: selection_bound(problem, [0], measure="m"),
        lambda: miss_probability(0, 3),
        lambda: rank_agreement(problem, 6),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^(kl|rows|measure|n_k) must"):
            call()
    assert selection_bound(problem, np.arange(5)) == 0.0
    assert published_count(1024) == 35
