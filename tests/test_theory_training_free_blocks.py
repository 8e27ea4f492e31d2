"""Claims about sorted blocks beside a sample: worked numbers, record, broken versions."""

from __future__ import annotations

import math
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
    on_heads,
    recorded_pairs,
    refuted,
)
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn import theory
from sketchattn.theory.engine.checking import check
from sketchattn.theory.engine.instances import instances
from sketchattn.theory.training_free.blocks import (
    AlphaKappa,
    alpha_kappa,
    mixed_bernstein,
    mixed_law,
    normalizer_variance,
    product_error,
    published_samples,
)

Array = NDArray[Any]

NAMES = (
    "block_sample_unbiased",
    "block_sample_variance",
    "alpha_kappa",
    "approximate_normalizer",
    "mixed_expected_error",
    "mixed_bernstein",
    "value_norms_best",
)
CLAIMS = {f"training_free.{x}": theory.claims()[f"training_free.{x}"] for x in NAMES}
RECORDED = recorded_pairs(CLAIMS)
REFUTED = refuted(CLAIMS)


# --- worked numbers -------------------------------------------------------------------------------


def test_known_errors_of_products() -> None:
    seen = instances()["block-sample"]
    assert np.sum(seen.product**2) == pytest.approx(7.9074905875, abs=1e-9)
    norms = np.sum(seen.v**2, axis=1)
    laws = norms / norms.sum(), np.full(64, 1 / 64), mixed_law(seen.a, seen.v)
    numbers = 79.4126557829, 56.1138791507, 44.0197563472
    for law, number in zip(laws, numbers, strict=True):
        assert product_error(seen.a, seen.v, law, 8) == pytest.approx(number, abs=1e-8)
    verdict = check("training_free.value_norms_best", "block-sample")
    assert verdict.observed == pytest.approx(numbers[0] / numbers[1])


def test_the_assumptions_fail_on_bundled_heads() -> None:
    found = [alpha_kappa(head) for head in sa.load_heads()]
    alphas, kappas = (np.array(x) for x in zip(*found, strict=True))
    assert (alphas.min(), alphas.max()) == pytest.approx((30.298, 20308.27), abs=1e-2)
    assert float(np.median(alphas)) == pytest.approx(6438, rel=1e-3)
    assert float(np.median(kappas)) == pytest.approx(28.8, abs=0.05)
    assert (kappas.min(), kappas.max()) == pytest.approx((2.8224, 1.8995e5), rel=1e-3)
    asked = [published_samples(x, 512, 0.5) for x in found]
    # More than 10^10 draws of 512 keys.
    three = min(asked), float(np.median(asked)), max(asked)
    assert three == pytest.approx((10.96, 20.64, 47.88), abs=0.01)
    for head in sa.load_heads()[:3]:
        verdict = check("training_free.approximate_normalizer", head)
        assert verdict.status == "not applicable"
        assert "assumption violated: alpha" in verdict.notes
        assert "log10 m" in check("training_free.alpha_kappa", head).notes


def test_where_the_theorem_asks_for_more_rows_than_there_are() -> None:
    rng = np.random.default_rng(0)
    q, k, v = 0.01 * rng.standard_normal((3, 60, 2))
    verdict = check("training_free.approximate_normalizer", sa.AttentionProblem(q, k, v))
    assert verdict.status == "vacuous"
    assert "asks rank" in verdict.notes


def test_formulas_by_enumeration() -> None:
    rng = np.random.default_rng(1)
    a, v, p = rng.random((3, 4)), rng.standard_normal((4, 2)), np.array([0.1, 0.2, 0.3, 0.4])
    outside = rng.random((3, 4)) < 0.7
    rest = np.where(outside, a, 0.0)
    # Of one draw, over all outcomes; s draws divide by s.
    wanted = (p[:, None] * (rest.T / p[:, None] - rest.sum(axis=1)) ** 2).sum(axis=0)
    assert normalizer_variance(a, outside, p, 3) == pytest.approx(wanted / 3)
    errors = [np.sum((np.outer(a[:, j], v[j]) / p[j] - a @ v) ** 2) for j in range(4)]
    assert product_error(a, v, p, 5) == pytest.approx(float(p @ errors) / 5)


def test_the_tail_solves_its_equation() -> None:
    rng = np.random.default_rng(2)
    a, v = rng.random((5, 20)), rng.standard_normal((20, 3))
    stable = [np.sum(x**2) / np.linalg.norm(x, 2) ** 2 for x in (a, v)]
    for samples in (1, 10, 1000):
        t = mixed_bernstein(a, v, samples, 0.05)
        linear = (2 / 3) * t * (math.sqrt(stable[0] * stable[1]) + 1)
        exponent = samples * t**2 / (4 * max(stable) + linear)
        assert 8 * math.exp(-exponent) == pytest.approx(0.05)
    # Moments of the summands stay below those that the proof uses.
    p = mixed_law(a, v)
    size = float(np.linalg.norm(a, 2) * np.linalg.norm(v, 2))
    terms = [np.outer(a[:, j], v[j]) / p[j] / size for j in range(20)]
    root = math.sqrt(stable[0] * stable[1])
    assert max(np.linalg.norm(x, 2) for x in terms) <= root * (1 + 1e-12)
    for second in (
        sum(w * x @ x.T for w, x in zip(p, terms, strict=True)),
        sum(w * x.T @ x for w, x in zip(p, terms, strict=True)),
    ):
        assert np.linalg.norm(second, 2) <= 2 * max(stable)


def test_published_samples() -> None:
    found = published_samples(AlphaKappa(10.0, 100.0), 1000, 0.1)
    assert found == pytest.approx(14 + 2 + math.log10(math.log(1000)) + 6)


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
    check_statuses(CLAIMS)


# --- negative controls ----------------------------------------------------------------------------


def honest(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Array:
    """Write everything from its definition."""
    if kind == "mixed_sample":
        a, v = given["a"], given["v"]
        p = 0.5 * np.sum(a**2, axis=0) / np.sum(a**2) + 0.5 * np.sum(v**2, axis=1) / np.sum(v**2)
        drawn = rng.choice(n, r, p=p)
        return np.asarray((a[:, drawn] / (r * p[drawn])) @ v[drawn])
    problem = given["problem"]
    weights = np.exp(problem.scale * problem.q @ problem.k.T)
    own = given["query_blocks"][:, None] == given["key_blocks"]
    if kind == "block_sample":
        p = given["p"]
        drawn = rng.choice(n, r, p=p / p.sum())
        counts = np.bincount(drawn, minlength=n) / (r * p)
        return quotient(problem, weights * np.where(own, 1.0, counts))
    assert kind == "approximate_normalizers"
    rows, columns, eps = given["rows"], given["columns"], given["eps"]
    off = np.where(own, 0.0, weights).sum(axis=1)
    least = off[rows].max() / (off.max() / off.min())
    inside = np.where(own, weights, 0.0).sum(axis=1)
    cap = eps**2 * r / (n * math.log(n)) * (least + inside)
    entries = np.where(own[:, columns], 0.0, np.minimum(weights[:, columns], cap[:, None]))
    return np.asarray(np.log(inside + np.maximum(n / r * entries.sum(axis=1), least)))


def quotient(problem: Any, weights: Array) -> Array:
    """Return the output and the log-normaliser of weights."""
    total = weights.sum(axis=1, keepdims=True)
    return np.hstack([weights @ problem.values / total, np.log(total)])


def twice(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Array:
    """Count drawn keys of the own block again, as released codes do."""
    problem, p = given["problem"], given["p"]
    drawn = rng.choice(n, r, p=p / p.sum())
    own = given["query_blocks"][:, None] == given["key_blocks"]
    counts = np.bincount(drawn, minlength=n) / (r * p)
    return quotient(problem, np.exp(problem.scale * problem.q @ problem.k.T) * (own + counts))


def blocks_alone(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Array:
    problem = given["problem"]
    own = given["query_blocks"][:, None] == given["key_blocks"]
    return quotient(problem, np.exp(problem.scale * problem.q @ problem.k.T) * own)


def half_the_draws(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Array:
    """Draw half as many keys as said."""
    return honest(kind, r // 2, n, rng, **given)


def unweighted(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Array:
    """Draw uniformly, weighted as if by the law."""
    a, v = given["a"], given["v"]
    p = mixed_law(a, v)
    drawn = rng.integers(0, n, r)
    return np.asarray((a[:, drawn] / (r * p[drawn])) @ v[drawn])


def one_key(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Array:
    return honest(kind, 1, n, rng, **given)


def released_normalizers(
    kind: str, r: int, n: int, rng: np.random.Generator, **given: Any
) -> Array:
    """Forget the sampled sum."""
    problem = given["problem"]
    own = given["query_blocks"][:, None] == given["key_blocks"]
    weights = np.exp(problem.scale * problem.q @ problem.k.T)
    return np.asarray(np.log(np.where(own, weights, 0.0).sum(axis=1)))


CONTROLS: list[tuple[str, str, Factory]] = [
    ("block_sample_unbiased", "block-sample", twice),
    ("block_sample_unbiased", "reference", twice),
    ("block_sample_unbiased", "block-sample", blocks_alone),
    ("block_sample_variance", "block-sample", half_the_draws),
    ("approximate_normalizer", "nearly-flat", released_normalizers),
    ("mixed_expected_error", "block-sample", half_the_draws),
    ("mixed_expected_error", "half-read", unweighted),
    ("mixed_bernstein", "half-read", one_key),
]


@pytest.mark.parametrize(("name", "on", "broken"), CONTROLS)
def test_broken_implementations_are_reported(name: str, on: str, broken: Factory) -> None:
    check_reported(f"training_free.{name}", on, broken)


@pytest.mark.parametrize(("name", "on"), sorted({(name, on) for name, on, _ in CONTROLS}))
def test_an_implementation_from_the_definition_is_not_reported(name: str, on: str) -> None:
    check_not_reported(f"training_free.{name}", on, honest)


def test_every_theorem_has_a_control() -> None:
    controlled = {f"training_free.{name}" for name, _, _ in CONTROLS}
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
        sa.AttentionProblem(1e3 * q, k, v, name="large logits"),
        sa.AttentionProblem(0 * q, k, v, name="uniform"),
        sa.AttentionProblem(q, k, v, key_mask=np.zeros(9, bool), name="no keys"),
    ]
    check_odd(CLAIMS, odd, trials=60)


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_verdicts_repeat_and_bounds_need_no_draw(name: str) -> None:
    if CLAIMS[name].recorded[CLAIMS[name].instances[0]] != "not applicable":
        check_repeats(CLAIMS, name, trials=20)
