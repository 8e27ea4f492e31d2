"""Sampling: laws against formulas, samplers against their exact law, weights, leverage scores."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

import sketchattn as sa
from sketchattn.kernels._threads import blas_single_thread
from sketchattn.sampling.draws import (
    ColumnDraw,
    check_probabilities,
    inclusion_probabilities,
    sample_columns,
    sample_gumbel,
    sample_poisson,
    sample_uniform,
    sample_with_replacement,
    self_normalize,
)
from sketchattn.sampling.laws import LAWS, check_unbiased, pilot_rows, probabilities
from sketchattn.sampling.leverage import (
    css_relative_error,
    fast_sketch_rows,
    leverage_approx_factor,
    leverage_quality,
    leverage_scores,
    leverage_scores_fast,
)
from sketchattn.sampling.ridge import (
    ExponentialKernel,
    d_eff,
    nystrom_factor,
    ridge_leverage,
    ridge_leverage_recursive,
    ridge_psd_check,
)

Array = NDArray[Any]
Sampler = Callable[[np.random.Generator], ColumnDraw]

# Level of every random test here: a false alarm with probability 1e-6, or |z| > 5 (5.7e-7).
LEVEL = 1e-6
Z = 5.0


@pytest.fixture
def rng(global_random_seed: int) -> np.random.Generator:
    return np.random.default_rng([global_random_seed, 20])


def message(text: str) -> str:
    return f"^{re.escape(text)}$"


def reference_instance() -> tuple[Array, Array]:
    """A (6, 64) and V (64, 5) without randomness: L_ij = 3 sin(1 + (i+1)(j+1))."""
    i, j, c = np.arange(6)[:, None], np.arange(64), np.arange(5)
    logits = 3 * np.sin(1 + (i + 1) * (j + 1))
    weights = np.exp(logits)
    return weights / weights.sum(axis=1, keepdims=True), np.cos(0.7 * np.outer(j + 1, c + 1))


ENUMERATION = (
    np.array([[1.0, 2.0, 0.0], [0.5, -1.0, 3.0]]),
    np.array([[1.0, -1.0], [2.0, 0.0], [-1.0, 1.0]]),
)
ENUMERATION_LAW = np.array([0.2, 0.5, 0.3])


def sizes(a: Array, v: Array) -> Array:
    """Return |A_:j|^2 |V_j|^2."""
    product: Array = (a * a).sum(axis=0) * (v * v).sum(axis=1)
    return product


def estimate(a: Array, v: Array, draw: ColumnDraw) -> Array:
    """Return A S^T S V from the definition."""
    out = np.zeros((a.shape[0], v.shape[1]))
    for j, w in zip(draw.columns, draw.weights, strict=True):
        out += w * np.outer(a[:, j], v[j])
    return out


def z_score(x: Array, mean: float | Array) -> float:
    """Return the largest |z| of the mean over the first axis."""
    spread = np.asarray(x.std(axis=0, ddof=1) / math.sqrt(len(x)))
    difference = np.abs(x.mean(axis=0) - mean)
    # A constant has no spread: it is right up to rounding, or it is wrong.
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(difference < 1e-12, 0.0, difference / spread)
    return float(np.max(z))


def chi2_alarm(observed: Array, expected: Array) -> bool:
    """Return whether counts reject a law at LEVEL; cells of probability zero must be empty."""
    assert observed.sum() == pytest.approx(expected.sum())
    if observed[expected == 0].any():
        return True
    seen = expected > 0
    statistic = float(np.sum((observed[seen] - expected[seen]) ** 2 / expected[seen]))
    return statistic > stats.chi2.isf(LEVEL, int(seen.sum()) - 1)


class Scripted(np.random.Generator):
    """A generator whose uniform numbers or permutations are given: makes enumeration possible."""

    def __init__(self, uniform: Any = None, permutation: Any = None) -> None:
        super().__init__(np.random.PCG64(0))
        self.given = uniform
        self.order = permutation

    def random(self, *args: Any, **kwargs: Any) -> Any:
        return np.array(self.given, np.float64)

    def permutation(self, x: Any, axis: int = 0) -> Any:
        return np.asarray(x)[list(self.order)]


# --- exact second moments: all outcomes of the real samplers -------------------------------------


def moments(outcomes: list[tuple[float, ColumnDraw]]) -> tuple[float, Array]:
    """Return E |A S^T S V - A V|_F^2 and E A S^T S V over all outcomes (probability, draw)."""
    a, v = ENUMERATION
    assert math.fsum(p for p, _ in outcomes) == pytest.approx(1.0, rel=1e-13)
    estimates = [(p, estimate(a, v, draw)) for p, draw in outcomes]
    mean = sum((p * x for p, x in estimates), np.zeros((2, 2)))
    return math.fsum(p * float(np.sum((x - a @ v) ** 2)) for p, x in estimates), mean


def outcomes_with_replacement() -> list[tuple[float, ColumnDraw]]:
    middles = np.cumsum(ENUMERATION_LAW) - ENUMERATION_LAW / 2
    return [
        (
            float(ENUMERATION_LAW[i] * ENUMERATION_LAW[j]),
            sample_with_replacement(ENUMERATION_LAW, 2, Scripted(middles[[i, j]])),
        )
        for i, j in itertools.product(range(3), repeat=2)
    ]


def outcomes_uniform() -> list[tuple[float, ColumnDraw]]:
    orders = list(itertools.permutations(range(3)))
    return [
        (1 / len(orders), sample_uniform(3, 2, Scripted(permutation=order))) for order in orders
    ]


def outcomes_poisson() -> list[tuple[float, ColumnDraw]]:
    pi = np.array([0.4, 1.0, 0.6])
    found = []
    for kept in itertools.product([True, False], repeat=3):
        probability = float(np.prod(np.where(kept, pi, 1 - pi)))
        if probability > 0:
            u = np.where(kept, pi / 2, (1 + pi) / 2)
            found.append((probability, sample_poisson(ENUMERATION_LAW, 2, Scripted(u))))
    return found


# rtol 1e-12: sums of at most 9 terms of size 100, each with a few roundings of 1e-16.
@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        pytest.param(outcomes_with_replacement, 30.0, id="with replacement"),
        pytest.param(outcomes_uniform, 17.25, id="uniform without"),
        pytest.param(outcomes_poisson, 15.75, id="poisson"),
    ],
)
def test_second_moment_by_enumeration(
    outcomes: Callable[[], list[tuple[float, ColumnDraw]]], expected: float
) -> None:
    a, v = ENUMERATION
    error, mean = moments(outcomes())
    assert error == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(mean, a @ v, rtol=1e-12, atol=1e-12)


def test_enumeration_sees_wrong_weights() -> None:
    a, v = ENUMERATION
    wrong = [
        (p, ColumnDraw(d.columns, np.full(2, 1.5), d.probabilities, 3, 2, True))
        for p, d in outcomes_with_replacement()
    ]
    error, mean = moments(wrong)
    assert error != pytest.approx(30.0, rel=0.1)
    assert not np.allclose(mean, a @ v, rtol=0.1)


# --- the reference instance ----------------------------------------------------------------------


# rtol 1e-9: the golden values have ten digits.
@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ("uniform", 2.7030770948),
        ("optimal", 2.1396425928),
        ("value_norm2", 2.6772921340),
        ("leverage", 2.8092708008),
    ],
)
def test_laws_give_the_golden_moments(law: str, expected: float) -> None:
    a, v = reference_instance()
    p = probabilities(law, (a, v))
    assert p.sum() == pytest.approx(1.0, rel=1e-14)
    b = np.sum((a @ v) ** 2)
    assert (np.sum(sizes(a, v) / p) - b) / 16 == pytest.approx(expected, rel=1e-9)


def test_poisson_golden_moment() -> None:
    a, v = reference_instance()
    pi = inclusion_probabilities(probabilities("optimal", (a, v)), 16)
    assert np.sum((1 / pi - 1) * sizes(a, v)) == pytest.approx(1.4661558540, rel=1e-9)


def reference_samplers() -> dict[str, tuple[Sampler, float | None]]:
    pair = reference_instance()
    optimal = probabilities("optimal", pair)
    return {
        "uniform wr": (lambda g: sample_with_replacement(np.full(64, 1 / 64), 16, g), 2.7030770948),
        "optimal wr": (lambda g: sample_with_replacement(optimal, 16, g), 2.1396425928),
        "value_norm2 wr": (
            lambda g: sample_with_replacement(probabilities("value_norm2", pair), 16, g),
            2.6772921340,
        ),
        "leverage wr": (
            lambda g: sample_with_replacement(probabilities("leverage", pair), 16, g),
            2.8092708008,
        ),
        "uniform": (lambda g: sample_uniform(64, 16, g), 2.0594873103),
        "poisson": (lambda g: sample_poisson(optimal, 16, g), 1.4661558540),
        "gumbel": (lambda g: sample_gumbel(optimal, 16, g), None),
    }


def simulate(sampler: Sampler, rng: np.random.Generator, trials: int) -> tuple[Array, Array]:
    """Return squared errors (trials,) and estimates (trials, 6, 5) on the reference instance."""
    a, v = reference_instance()
    estimates = np.empty((trials, 6, 5))
    for t in range(trials):
        draw = sampler(rng)
        estimates[t] = (a[:, draw.columns] * draw.weights) @ v[draw.columns]
    return np.sum((estimates - a @ v) ** 2, axis=(1, 2)), estimates


@pytest.mark.statistical
@pytest.mark.parametrize("kind", list(reference_samplers()))
def test_monte_carlo_mean_and_bias(kind: str, rng: np.random.Generator) -> None:
    """Level: |z| > 5 for the error, and for each of 30 entries of the bias."""
    a, v = reference_instance()
    sampler, expected = reference_samplers()[kind]
    errors, estimates = simulate(sampler, rng, 4000)
    assert z_score(estimates, a @ v) <= Z
    if expected is not None:
        assert z_score(errors, expected) <= Z


@pytest.mark.statistical
def test_gumbel_error_is_the_predicted_one(rng: np.random.Generator) -> None:
    """M = sum_j |A_:j|^2 |V_j|^2 (E[1/P(g_j > tau_j)] - 1), the expectation simulated."""
    a, v = reference_instance()
    p = probabilities("optimal", (a, v))
    errors, _ = simulate(reference_samplers()["gumbel"][0], rng, 4000)
    g = np.log(p) + rng.gumbel(size=(4000, 64))
    ranked = -np.sort(-g, axis=1)
    # Without j the 16th largest of the others is the 17th of all where j is among the 16.
    tau = np.where(g >= ranked[:, 15:16], ranked[:, 16:17], ranked[:, 15:16])
    predicted = (1 / -np.expm1(-np.exp(np.log(p) - tau)) - 1) @ sizes(a, v)
    spread = math.hypot(errors.std(ddof=1), predicted.std(ddof=1)) / math.sqrt(4000)
    assert abs(errors.mean() - predicted.mean()) <= Z * spread
    # Tighter than sampling with replacement, and not zero.
    assert 1.3 < predicted.mean() < 1.9


def with_weights(sampler: Sampler, weights: Callable[[ColumnDraw], Array]) -> Sampler:
    def draw(g: np.random.Generator) -> ColumnDraw:
        d = sampler(g)
        return ColumnDraw(d.columns, weights(d), d.probabilities, d.n, d.rank, d.replace)

    return draw


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        pytest.param("gumbel", "1/(r p)", id="gumbel with the weights of replacement"),
        pytest.param("gumbel", "n/r", id="gumbel with the weights of uniform draws"),
        pytest.param("optimal wr", "n/r", id="optimal with the weights of uniform draws"),
        pytest.param("optimal wr", "1/p", id="missing 1/r"),
        pytest.param("uniform", "1.1", id="scaled by 1.1"),
        pytest.param("poisson", "1/(r p)", id="poisson unclamped, scaled by 1.1"),
    ],
)
def test_wrong_weights_are_seen_as_biased(
    kind: str, weights: str, rng: np.random.Generator
) -> None:
    a, v = reference_instance()
    p = probabilities("optimal", (a, v))
    wrong: dict[str, Callable[[ColumnDraw], Array]] = {
        "1/(r p)": lambda d: 1 / (16 * p[d.columns]) * (1.1 if kind == "poisson" else 1.0),
        "n/r": lambda d: np.full(len(d.columns), 4.0),
        "1/p": lambda d: 1 / p[d.columns],
        "1.1": lambda d: 1.1 * d.weights,
    }
    # sum_j w_j |A_:j|^2 |V_j|^2; without the squares the weights 1/(r p) would make it constant.
    sampler = with_weights(reference_samplers()[kind][0], wrong[weights])
    total = sizes(a, v)
    right = reference_samplers()[kind][0]
    sums = {
        name: np.array(
            [(d.weights * total[d.columns]).sum() for d in (s(rng) for _ in range(4000))]
        )
        for name, s in (("right", right), ("wrong", sampler))
    }
    assert z_score(sums["right"], total.sum()) <= Z
    assert z_score(sums["wrong"], total.sum()) > Z


# --- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(lambda g: sample_uniform(64, 64, g), id="uniform"),
        pytest.param(lambda g: sample_gumbel(np.full(64, 1 / 64), 64, g), id="gumbel"),
        pytest.param(lambda g: sample_poisson(np.full(64, 1 / 64), 64, g), id="poisson"),
    ],
)
def test_everything_drawn_is_exact(sampler: Sampler) -> None:
    # 1e-12 relative: 64 terms of one rounding each.
    a, v = reference_instance()
    draw = sampler(np.random.default_rng(3))
    assert np.array_equal(draw.diagonal(), np.ones(64))
    np.testing.assert_allclose(estimate(a, v, draw), a @ v, rtol=0, atol=1e-12)


# --- laws of the samplers ------------------------------------------------------------------------

LAW4 = np.array([0.5, 0.3, 0.0, 0.15, 0.05])
TRIALS = 20000


def ordered_pairs(draws: list[ColumnDraw], n: int) -> Array:
    counts = np.zeros((n, n))
    for draw in draws:
        counts[draw.columns[0], draw.columns[1]] += 1
    return counts


@pytest.mark.statistical
def test_law_with_replacement(rng: np.random.Generator) -> None:
    columns = sample_with_replacement(LAW4, TRIALS, rng).columns
    counts = np.bincount(columns, minlength=5)
    assert not chi2_alarm(counts, TRIALS * LAW4)
    assert chi2_alarm(counts, TRIALS * np.array([0.46, 0.34, 0.0, 0.15, 0.05]))
    pairs = np.zeros((5, 5))
    np.add.at(pairs, (columns[::2], columns[1::2]), 1)
    assert not chi2_alarm(pairs, TRIALS // 2 * np.outer(LAW4, LAW4))


@pytest.mark.statistical
def test_law_uniform_without_replacement(rng: np.random.Generator) -> None:
    draws = [sample_uniform(5, 2, rng, keep=LAW4 > 0) for _ in range(TRIALS // 4)]
    keep = (LAW4 > 0).astype(float)
    law = np.outer(keep, keep) * (1 - np.eye(5)) / 12
    assert not chi2_alarm(ordered_pairs(draws, 5), TRIALS // 4 * law)


@pytest.mark.statistical
def test_uniform_draws_hit_a_set_hypergeometrically(rng: np.random.Generator) -> None:
    hits = [int((sample_uniform(40, 12, rng).columns < 15).sum()) for _ in range(TRIALS // 4)]
    # Ends of the range are pooled until every cell expects more than 5.
    expected = TRIALS // 4 * stats.hypergeom(40, 15, 12).pmf(np.arange(13))
    observed = np.bincount(hits, minlength=13).astype(float)
    low, high = np.flatnonzero(expected > 5)[[0, -1]]

    def pooled(x: Array) -> Array:
        return np.concatenate(
            [[x[: low + 1].sum()], x[low + 1 : high], [x[high:].sum()]],
        )

    assert not chi2_alarm(pooled(observed), pooled(expected))


@pytest.mark.statistical
def test_law_of_gumbel_draws_is_plackett_luce(rng: np.random.Generator) -> None:
    draws = [sample_gumbel(LAW4, 2, rng) for _ in range(TRIALS)]
    with np.errstate(divide="ignore"):
        law = np.outer(LAW4 / (1 - LAW4), LAW4) * (1 - np.eye(5))
    assert law.sum() == pytest.approx(1.0)
    inclusion = law.sum(axis=0) + law.sum(axis=1)
    np.testing.assert_allclose(
        inclusion, [0.8288, 0.6687, 0.0, 0.3722, 0.1303], rtol=0, atol=5.1e-5
    )
    counts = ordered_pairs(draws, 5)
    assert not chi2_alarm(counts, TRIALS * law)
    # Negative control: unordered, or drawn from p twice with a rejection of equal pairs.
    rejected = np.outer(LAW4, LAW4) * (1 - np.eye(5))
    assert chi2_alarm(counts, TRIALS * rejected / rejected.sum())


@pytest.mark.statistical
def test_gumbel_weights_are_unbiased_and_uncorrelated(rng: np.random.Generator) -> None:
    # E w^m is finite for m <= r, of products of two for 2 m <= r: eight draws give the means of
    # products four moments, which a z-score needs.
    p = np.concatenate([[0.0], np.arange(1.0, 13.0)]) / 78.0
    w = np.array([sample_gumbel(p, 8, rng).diagonal() for _ in range(TRIALS // 4)])
    assert not w[:, 0].any()
    assert z_score(w[:, 1:], 1.0) <= Z
    for i, j in itertools.combinations(range(1, 13), 2):
        assert z_score(w[:, i] * w[:, j], 1.0) <= Z
    # Negative control: the weights of uniform draws, 12/8.
    assert z_score(1.5 * (w[:, 1:] > 0), 1.0) > Z


@pytest.mark.statistical
def test_law_of_poisson_draws(rng: np.random.Generator) -> None:
    pi = inclusion_probabilities(LAW4, 2)
    counts = np.zeros((2,) * 5)
    for _ in range(TRIALS // 2):
        kept = np.zeros(5, int)
        kept[sample_poisson(LAW4, 2, rng).columns] = 1
        counts[tuple(kept)] += 1
    law = np.ones(())
    for q in pi:
        law = np.multiply.outer(law, [1 - q, q])
    assert not chi2_alarm(counts.ravel(), TRIALS // 2 * law.ravel())


def test_zero_probabilities_are_never_drawn() -> None:
    # The sum of the law before the zeros rounds to less than 1, and u comes as close to 1 as it
    # can: an unguarded search would answer with the last index.
    p = np.concatenate([np.full(10, 0.1), np.zeros(3)])
    largest = 1.0 - 2.0**-53
    for order in (slice(None), slice(None, None, -1)):
        law = p[order]
        for u in (0.0, largest):
            drawn = sample_with_replacement(law, 2, Scripted([u, u])).columns
            assert (law[drawn] > 0).all()
        for seed in range(20):
            for draw in (
                sample_gumbel(law, 10, seed),
                sample_gumbel(law, 13, seed),
                sample_poisson(law, 12, seed),
                sample_columns(law, 13, seed, replace=False),
            ):
                assert (law[draw.columns] > 0).all()
                assert draw.effective_rank <= 10
    assert not sample_poisson(p, 5, Scripted(np.zeros(13))).diagonal()[10:].any()


def test_fewer_columns_than_asked_for_are_recorded() -> None:
    p = np.array([0.0, 0.7, 0.0, 0.3])
    for draw in (sample_gumbel(p, 3, 0), sample_uniform(4, 3, 0, keep=p > 0)):
        assert (draw.rank, draw.effective_rank) == (3, 2)
        assert draw.weights.tolist() == [1.0, 1.0]
    one = sample_with_replacement([0.0, 1.0], 5, 0)
    assert (one.columns.tolist(), one.effective_rank) == ([1] * 5, 1)
    assert one.diagonal()[1] == pytest.approx(1.0, rel=1e-15)
    nothing = np.zeros(3)
    for draw in (
        sample_with_replacement(nothing, 2, 0),
        sample_gumbel(nothing, 2, 0),
        sample_poisson(nothing, 2, 0),
        sample_uniform(3, 2, 0, keep=nothing > 0),
        sample_columns(nothing, 2, 0, replace=False),
        sample_columns(np.zeros(0), 2, 0),
    ):
        assert draw.shape == (0, draw.n)
        assert draw.effective_rank == 0
        assert draw.columns.dtype == np.int64


@pytest.mark.parametrize(
    "sample",
    [
        pytest.param(lambda r, seed: sample_with_replacement(LAW4, r, seed), id="with"),
        pytest.param(lambda r, seed: sample_uniform(5, r, seed), id="uniform"),
        pytest.param(lambda r, seed: sample_gumbel(LAW4, r, seed), id="gumbel"),
    ],
)
def test_a_larger_rank_extends_the_draw(sample: Callable[[int, int], ColumnDraw]) -> None:
    for seed in range(10):
        whole = sample(4, seed).columns
        for r in range(1, 5):
            assert np.array_equal(sample(r, seed).columns, whole[:r])
    assert any(not np.array_equal(sample(4, 0).columns, sample(4, s).columns) for s in range(1, 10))


def test_poisson_draws_grow_with_the_rank() -> None:
    for seed in range(10):
        drawn = [set(sample_poisson(LAW4, r, seed).columns.tolist()) for r in (0.5, 1, 2.5, 4)]
        assert all(a <= b for a, b in itertools.pairwise(drawn))
        assert drawn[-1] == {0, 1, 3, 4}


def test_two_draws_of_k_are_one_of_2k() -> None:
    g = np.random.default_rng(5)
    halves = [sample_with_replacement(LAW4, 7, g).columns for _ in range(2)]
    assert np.array_equal(np.concatenate(halves), sample_with_replacement(LAW4, 14, 5).columns)


def test_sample_columns_chooses_the_sampler() -> None:
    half = np.array([0.5, 0.0, 0.5])
    assert np.array_equal(
        sample_columns(LAW4, 3, 1).columns, sample_with_replacement(LAW4, 3, 1).columns
    )
    assert np.array_equal(
        sample_columns(half, 1, 1, replace=False).columns,
        sample_uniform(3, 1, 1, keep=half > 0).columns,
    )
    drawn, priority = sample_columns(LAW4, 3, 1, replace=False), sample_gumbel(LAW4, 3, 1)
    assert np.array_equal(drawn.columns, priority.columns)
    assert np.array_equal(drawn.weights, priority.weights)


def naive_water_filling(p: Array, target: float) -> Array:
    """Clamp those above 1, rescale the rest, repeat."""
    pi = np.zeros(len(p))
    free = p > 0
    clamped = np.zeros(len(p), bool)
    while free.any():
        scaled = p * (target - clamped.sum()) / p[free].sum()
        above = free & (scaled > 1)
        if not above.any():
            pi[free] = scaled[free]
            break
        clamped |= above
        free &= ~above
    pi[clamped] = 1.0
    return pi


def test_inclusion_probabilities_are_water_filling() -> None:
    g = np.random.default_rng(2)
    for trial in range(200):
        n = int(g.integers(1, 12))
        p = g.gamma(0.3, size=n) * (g.random(n) < 0.8)
        if p.sum() == 0:
            continue
        p /= p.sum()
        support = int((p > 0).sum())
        target = support * (0.02 + 0.98 * g.random()) if trial % 3 else float(support)
        pi = inclusion_probabilities(p, target)
        # Sums of at most 12 terms between clamped and rescaled: a few dozen roundings.
        np.testing.assert_allclose(pi, naive_water_filling(p, target), rtol=1e-12)
        assert pi.sum() == pytest.approx(min(target, support), rel=1e-12)
        assert ((pi > 0) == (p > 0)).all()
        assert pi.max() <= 1
    assert inclusion_probabilities(LAW4, 9).tolist() == [1, 1, 0, 1, 1]
    assert not inclusion_probabilities(np.zeros(3), 2).any()


# --- the draw as a sketch ------------------------------------------------------------------------


def test_a_draw_is_a_sketch() -> None:
    draw = sample_with_replacement(LAW4, 6, 3)
    g = np.random.default_rng(0)
    dense = draw.to_dense()
    assert draw.shape == dense.shape == (6, 5)
    for x in (g.standard_normal(5), g.standard_normal((5, 3))):
        y = g.standard_normal((6, *x.shape[1:]))
        np.testing.assert_allclose(draw.apply(x), dense @ x, rtol=1e-14, atol=1e-14)
        np.testing.assert_allclose(draw.apply_transpose(y), dense.T @ y, rtol=1e-14, atol=1e-13)
        assert draw.apply(x.astype(np.float32)).dtype == np.float32
        assert draw.apply_transpose(y.astype(np.float32)).dtype == np.float32
    np.testing.assert_allclose(np.diag(draw.diagonal()), dense.T @ dense, rtol=1e-14, atol=1e-14)
    columns, weights = draw.merged()
    assert columns.tolist() == sorted(set(draw.columns.tolist()))
    assert draw.effective_rank == len(columns)
    np.testing.assert_array_equal(draw.diagonal()[columns], weights)
    for x in (draw.columns, draw.weights, draw.probabilities):
        assert not x.flags.writeable
    with pytest.raises(
        ValueError,
        match=message(
            "x must have shape (5,) or (5, m), got (6,); S has the shape (6, 5)",
        ),
    ):
        draw.apply(np.ones(6))


def test_self_normalized_rows_sum_to_one_and_do_not_need_the_normaliser() -> None:
    g = np.random.default_rng(0)
    entries, weights = g.random((4, 3)), np.array([2.0, 1.0, 0.5])
    rows = self_normalize(entries, weights)
    np.testing.assert_allclose(rows.sum(axis=1), 1.0, rtol=1e-15)
    expected = [[weights[j] * e[j] / (weights @ e) for j in range(3)] for e in entries]
    np.testing.assert_allclose(rows, expected, rtol=1e-14)
    np.testing.assert_allclose(self_normalize(7.0 * entries, weights), rows, rtol=1e-14)
    assert not np.allclose(self_normalize(entries, np.ones(3)), rows)
    assert not self_normalize(np.zeros((2, 3)), weights).any()
    assert self_normalize(entries.astype(np.float32), weights).dtype == np.float32
    with pytest.raises(ValueError, match="entries and weights must have shapes"):
        self_normalize(entries, np.ones(2))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_seed_same_bits(dtype: Any) -> None:
    p = np.asarray(LAW4, dtype)
    for sample in (sample_with_replacement, sample_gumbel, sample_poisson):
        first, second = sample(p, 3, 11), sample(p, 3, np.random.default_rng(11))
        for name in ("columns", "weights", "probabilities"):
            assert np.array_equal(getattr(first, name), getattr(second, name))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: sample_with_replacement([0.5, 0.4], 2),
            ValueError,
            "p must sum to 1, got 0.9; divide it by its sum",
        ),
        (
            lambda: sample_gumbel([1.5, -0.5], 2),
            ValueError,
            "p must not be negative, got -0.5 at index 1; give probabilities",
        ),
        (
            lambda: sample_poisson([NAN, 1.0], 2),
            ValueError,
            "p must be finite, got nan at index (0,); replace it, or hide its key with a mask",
        ),
        (
            lambda: check_probabilities(np.eye(2), 2),
            ValueError,
            "p must have shape (2,), got (2, 2); give one probability a column",
        ),
        (
            lambda: check_probabilities(np.array([True, False])),
            TypeError,
            "p must hold real numbers, got bool; give probabilities",
        ),
        (
            lambda: sample_with_replacement([1.0], 0),
            ValueError,
            "rank must be at least 1, got 0; draw one column or more",
        ),
        (
            lambda: sample_uniform(3, 2.0),  # type: ignore[arg-type]  # what is refused
            TypeError,
            "rank must be an integer, got float; give one >= 1",
        ),
        (
            lambda: sample_uniform(-1, 2),
            ValueError,
            "n must not be negative, got -1; give the columns' number",
        ),
        (
            lambda: sample_uniform(3, 2, keep=[True, False]),
            ValueError,
            "keep must have shape (3,), got (2,); give one entry a column",
        ),
        (
            lambda: sample_uniform(2, 2, keep=[1, 0]),
            TypeError,
            f"keep must be boolean, got {np.array([1, 0]).dtype}; convert it with astype(bool)",
        ),
        (
            lambda: sample_poisson([1.0], 0.0),
            ValueError,
            "rank must be finite and positive, got 0.0; give one > 0",
        ),
        (
            lambda: inclusion_probabilities([1.0], True),
            TypeError,
            "rank must be a real number, got bool; give one > 0",
        ),
        (
            lambda: sample_columns([1.0], 1, replace="no"),  # type: ignore[arg-type]  # refused
            TypeError,
            "replace must be a bool, got str; pass True or False",
        ),
        (
            lambda: sample_gumbel([1.0], 1, rng=-1),
            ValueError,
            "rng must be at least 0, got -1; give a non-negative seed",
        ),
    ],
)
def test_samplers_refuse(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=message(text)):
        call()


def test_rounding_of_a_law_is_forgiven() -> None:
    law = check_probabilities(np.array([0.1, 0.2, 0.7], np.float32))
    assert law.dtype == np.float64
    assert law.sum() == pytest.approx(1.0, rel=1e-15)
    assert check_probabilities([1.0, -1e-13]).tolist() == [1.0, 0.0]
    given = np.array([0.25, 0.75])
    check_probabilities(given)[0] = 9.0
    assert given.tolist() == [0.25, 0.75]


# --- laws ----------------------------------------------------------------------------------------


def small_problem(dtype: Any = np.float64, **options: Any) -> sa.AttentionProblem:
    g = np.random.default_rng(7)
    q, k, v = (g.standard_normal(shape).astype(dtype) for shape in ((9, 4), (7, 4), (7, 3)))
    return sa.AttentionProblem(2.0 * q, k, v, **options)


MASK = np.array([True, True, False, True, True, False, True])
NAMES = list(LAWS)


def naive_law(law: str, problem: sa.AttentionProblem, ridge: float) -> Array:
    """Return a law from dense matrices, by its formula."""
    a = problem.astype(np.float64).exact.to_dense()
    keep = problem.kept_keys
    a = a[:, keep]
    v, k = (x[keep].astype(np.float64) for x in (problem.values, problem.k))
    norm_a, norm_v = np.sqrt((a * a).sum(axis=0)), np.sqrt((v * v).sum(axis=1))
    norm_k = np.sqrt((k * k).sum(axis=1))

    def leverage(x: Array) -> Array:
        inverse: Array = np.linalg.pinv(x)
        scores: Array = np.diag(x @ inverse)
        return scores

    kernel = np.exp(problem.scale * k @ k.T)
    lam = ridge * np.trace(kernel)
    laws: dict[str, Callable[[], Array]] = {
        "uniform": lambda: np.ones(len(keep)),
        "value_norm": lambda: norm_v,
        "value_norm2": lambda: norm_v**2,
        "key_norm": lambda: norm_k,
        "key_norm2": lambda: norm_k**2,
        "column_norm2": lambda: norm_a**2,
        "optimal": lambda: norm_a * norm_v,
        "pilot": lambda: norm_a * norm_v,
        "spectral": lambda: (
            norm_a**2 / np.linalg.norm(a, 2) ** 2 + norm_v**2 / np.linalg.norm(v, 2) ** 2
        ),
        "leverage": lambda: leverage(v),
        "leverage_keys": lambda: leverage(k),
        "ridge": lambda: np.diag(kernel @ np.linalg.inv(kernel + lam * np.eye(len(keep)))),
    }
    rough = laws[law]()
    p = np.zeros(problem.n_k)
    p[keep] = rough / rough.sum()
    return p


@pytest.mark.parametrize("key_mask", [None, MASK], ids=["all keys", "masked"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("law", [x for x in NAMES if x not in ("leverage_fast", "ridge_recursive")])
def test_laws_are_their_formulas(law: str, dtype: Any, key_mask: Array | None) -> None:
    problem = small_problem(dtype, key_mask=key_mask)
    # All rows as pilots give the exact column norms.
    p = probabilities(law, problem, pilots=np.arange(9), ridge=0.05)
    # All laws are computed in float64 from the same inputs; condition numbers here are < 100.
    np.testing.assert_allclose(p, naive_law(law, problem, 0.05), rtol=1e-10)
    assert p.dtype == np.float64
    if key_mask is not None:
        assert not p[~key_mask].any()
    assert np.array_equal(p, probabilities(law, problem, pilots=np.arange(9), ridge=0.05))


@pytest.mark.parametrize("law", NAMES)
def test_every_law_is_a_law_that_draws_kept_keys(law: str) -> None:
    problem = small_problem(key_mask=MASK)
    p = probabilities(law, problem, rng=3)
    assert p.sum() == pytest.approx(1.0, rel=1e-14)
    assert (p >= 0).all()
    assert not p[~MASK].any()
    assert np.array_equal(p, probabilities(law, problem, rng=3))
    mixed = probabilities(law, problem, mix=0.25, rng=3)
    np.testing.assert_allclose(mixed, 0.75 * p + 0.25 * MASK / MASK.sum(), rtol=1e-14)
    # Weights 1/(r p_j) are bounded by m/(theta r).
    assert (mixed[MASK] >= 0.25 / MASK.sum()).all()
    nothing = sa.AttentionProblem(
        problem.q, problem.k, problem.v, key_mask=np.zeros(problem.n_k, bool)
    )
    assert not probabilities(law, nothing, mix=0.5, rng=0).any()


def test_a_law_without_an_opinion_is_uniform() -> None:
    problem = small_problem(key_mask=MASK)
    zero = sa.AttentionProblem(problem.q, problem.k, np.zeros((7, 3)), key_mask=MASK)
    for law in ("value_norm", "value_norm2", "optimal", "leverage", "pilot"):
        np.testing.assert_allclose(probabilities(law, zero, rng=0), MASK / 5.0, rtol=1e-15)
    draw = sample_with_replacement(probabilities("optimal", zero), 3, 0)
    a = zero.exact.to_dense()
    assert not estimate(a, np.zeros((7, 3)), draw).any()


@pytest.mark.parametrize("law", ["uniform", "value_norm", "optimal", "leverage", "pilot"])
def test_one_column_and_one_value(law: str) -> None:
    p = probabilities(law, (np.ones((4, 1)), np.full((1, 1), -2.0)), rng=0)
    assert p.tolist() == [1.0]
    draw = sample_with_replacement(p, 3, 0)
    np.testing.assert_allclose(estimate(np.ones((4, 1)), np.full((1, 1), -2.0), draw), -2.0)


@pytest.mark.parametrize("law", ["uniform", "value_norm2", "optimal", "spectral", "leverage"])
def test_laws_of_two_matrices_and_of_their_problem_agree(law: str) -> None:
    problem = small_problem()
    pair = (problem.exact.to_dense(), problem.values)
    # A is computed in two ways: rounding of logits of size 10, times the condition of the law.
    np.testing.assert_allclose(probabilities(law, pair), probabilities(law, problem), rtol=1e-12)


def test_pilot_rows_count_with_their_multiplicity() -> None:
    problem = small_problem()
    a = problem.exact.to_dense()
    rows = np.array([4, 1, 4])
    rough = np.sqrt((a[rows] ** 2).sum(axis=0)) * np.linalg.norm(problem.values, axis=1)
    for source in (problem, (a, problem.values)):
        p = probabilities("pilot", source, pilots=rows)
        np.testing.assert_allclose(p, rough / rough.sum(), rtol=1e-12)
    drawn = pilot_rows(problem, 30, rng=0)
    assert drawn.shape == (30,)
    assert 0 <= drawn.min() <= drawn.max() < 9
    assert np.array_equal(
        probabilities("pilot", problem, pilots=30, rng=0),
        probabilities("pilot", problem, pilots=drawn),
    )


def test_causal_pilots_do_not_see_the_future() -> None:
    g = np.random.default_rng(1)
    q, v = g.standard_normal((6, 3)), g.standard_normal((6, 2))
    problem = sa.AttentionProblem(q, q, v, causal=True)
    p = probabilities("pilot", problem, pilots=[2])
    a = problem.exact.rows([2])[0]
    rough = a * np.linalg.norm(v, axis=1)
    np.testing.assert_allclose(p, rough / rough.sum(), rtol=1e-12)
    assert not p[3:].any()
    with pytest.raises(ValueError, match=r"got 0 for 3 such columns, for instance j = 3; mix in"):
        check_unbiased(p, problem)
    check_unbiased(probabilities("pilot", problem, pilots=[2], mix=0.1), problem)
    check_unbiased(probabilities("pilot", problem, pilots=[5]), problem)


def test_pilot_law_in_float32_has_no_false_zeros() -> None:
    # ln A of about -80: A^2 underflows in float32, and A itself nearly.
    k = np.zeros((4, 1), np.float32)
    k[1] = -80.0
    problem = sa.AttentionProblem(
        np.ones((3, 1), np.float32), k, np.ones((4, 1), np.float32), scale=1.0
    )
    p = probabilities("pilot", problem, pilots=[0])
    assert p[1] == pytest.approx(math.exp(-80) / 3, rel=1e-6)
    check_unbiased(p, problem)


def test_laws_survive_extreme_logits() -> None:
    g = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        q, v = g.standard_normal((8, 2)).astype(dtype), g.standard_normal((8, 2)).astype(dtype)
        problem = sa.AttentionProblem(q, q[::-1].copy(), v, scale=1e4)
        for law in NAMES:
            p = probabilities(law, problem, rng=0)
            assert np.isfinite(p).all()
            assert p.sum() == pytest.approx(1.0, rel=1e-12)
        # Zero only where the column is zero as well.
        check_unbiased(probabilities("optimal", problem), problem)


def test_optimal_law_is_the_minimum() -> None:
    a, v = reference_instance()
    c = sizes(a, v)
    best = np.sum(c / probabilities("optimal", (a, v)))
    assert best == pytest.approx(5.855166569935**2, rel=1e-12)
    g = np.random.default_rng(0)
    for _ in range(50):
        p = probabilities("optimal", (a, v)) * np.exp(0.1 * g.standard_normal(64))
        assert np.sum(c / (p / p.sum())) >= best
    for law in ("uniform", "value_norm", "value_norm2", "column_norm2", "spectral", "leverage"):
        assert np.sum(c / probabilities(law, (a, v))) >= best


def test_given_laws() -> None:
    problem = small_problem(key_mask=MASK)
    p = MASK * np.arange(1.0, 8.0)
    p /= p.sum()
    np.testing.assert_allclose(probabilities(p.astype(np.float32), problem), p, rtol=1e-6)
    with pytest.raises(
        ValueError,
        match=message(
            "law must be zero for masked keys, got 0.142857 for key 2; set it to zero and divide "
            "by the sum"
        ),
    ):
        probabilities(np.full(7, 1 / 7), problem)
    with pytest.raises(ValueError, match=r"^law must have shape \(7,\), got \(3,\)"):
        probabilities(np.full(3, 1 / 3), problem)


def test_bias_is_refused_only_where_there_is_one() -> None:
    a, v = ENUMERATION
    p = np.array([0.5, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"got 0 for 1 such column, for instance j = 2; mix in"):
        check_unbiased(p, (a, v))
    check_unbiased(p, (a, v * np.array([[1.0], [1.0], [0.0]])))
    check_unbiased(p, (a * np.array([1.0, 1.0, 0.0]), v))
    problem = small_problem(key_mask=MASK)
    p = probabilities("uniform", problem)
    check_unbiased(p, problem)
    p[0] = 0.0
    with pytest.raises(ValueError, match="for instance j = 0"):
        check_unbiased(p / p.sum(), problem)
    # Without values every column that a query sees counts; those that none sees do not.
    unseen = sa.AttentionProblem(np.ones((2, 1)), np.ones((4, 1)), causal="top-left")
    check_unbiased([0.5, 0.5, 0.0, 0.0], unseen)
    with pytest.raises(ValueError, match="for instance j = 1"):
        check_unbiased([1.0, 0.0, 0.0, 0.0], unseen)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: probabilities("optmal", small_problem()),
            ValueError,
            "law must be a name or an array, got 'optmal'; did you mean 'optimal'?",
        ),
        (
            lambda: probabilities("key_norm", ENUMERATION),
            ValueError,
            "law must be about A and V where these two are given, got 'key_norm', which needs "
            "keys; pass an AttentionProblem",
        ),
        (
            lambda: probabilities("uniform", np.eye(3)),
            TypeError,
            "source must be an AttentionProblem or a pair (A, V) of matrices, got ndarray; pass "
            "(A, V) as a tuple",
        ),
        (
            lambda: probabilities("uniform", (np.eye(3), np.eye(2))),
            ValueError,
            "A and V must have shapes (m, n) and (n, d_v), got (3, 3) and (2, 2); the product is "
            "A V",
        ),
        (
            lambda: probabilities("uniform", small_problem(), mix=1.5),
            ValueError,
            "mix must be in [0, 1], got 1.5; 0 leaves the law alone",
        ),
        (
            lambda: probabilities("pilot", small_problem(), pilots=0),
            ValueError,
            "pilots must be at least 1, got 0; draw one row or more",
        ),
        (
            lambda: probabilities("pilot", small_problem(), pilots=[0, 9]),
            ValueError,
            "pilots must be row indices in 0..8, got 0..9; give indices of queries",
        ),
        (
            lambda: probabilities("pilot", small_problem(), pilots=2.5),
            TypeError,
            "pilots must be an integer or a one-dimensional array of row indices, got float64 of "
            "shape (); give how many rows to draw, or which",
        ),
        (
            lambda: probabilities("ridge", small_problem(), ridge=0.0),
            ValueError,
            "ridge must be finite and positive, got 0; it is lam / tr K",
        ),
        (
            lambda: probabilities("value_norm", sa.AttentionProblem(np.eye(2), np.eye(2))),
            ValueError,
            "v must be given for an output, got None; make the problem with its values",
        ),
        (
            lambda: probabilities("ridge", small_problem(scale=-1.0)),
            ValueError,
            "scale must be finite and not negative for a positive semidefinite kernel, got -1.0; "
            "change the sign of one factor",
        ),
    ],
)
def test_laws_refuse(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=message(text)):
        call()


# --- tail bounds of sampling with replacement ----------------------------------------------------


def too_many(failures: int, trials: int, delta: float) -> bool:
    """Return whether so many failures reject a failure rate of delta, at LEVEL."""
    return failures > stats.binom.isf(LEVEL, trials, delta)


@pytest.mark.statistical
@pytest.mark.parametrize("law", ["optimal", "uniform", "leverage"])
def test_frobenius_tail_bound(law: str, rng: np.random.Generator) -> None:
    """|err|_F <= eta T/sqrt(beta r), eta = 1 + sqrt((2/beta) ln(1/delta)), beta = min p/p*."""
    a, v = reference_instance()
    p, total = probabilities(law, (a, v)), 5.855166569935
    beta = float(np.min(p / probabilities("optimal", (a, v))))
    delta, r = 0.1, 16
    eta = 1 + math.sqrt(2 / beta * math.log(1 / delta))
    errors, _ = simulate(lambda g: sample_with_replacement(p, r, g), rng, 1000)
    failures = int(np.count_nonzero(np.sqrt(errors) > eta * total / math.sqrt(beta * r)))
    assert not too_many(failures, 1000, delta)
    # Negative control: a tenth of the bound fails nearly always.
    assert (
        too_many(
            int(np.count_nonzero(np.sqrt(errors) > 0.1 * eta * total / math.sqrt(beta * r))),
            1000,
            delta,
        )
        or law != "optimal"
    )


@pytest.mark.statistical
def test_spectral_tail_bound(rng: np.random.Generator) -> None:
    """Matrix Bernstein with the law "spectral": r = 613 for t = .3, delta = .05."""
    a, v = reference_instance()
    a, v = a / np.linalg.norm(a, 2), v / np.linalg.norm(v, 2)
    asr = (np.linalg.norm(a) ** 2 + np.linalg.norm(v) ** 2) / 2
    assert asr == pytest.approx((1.919993230830 + 2.725412001156) / 2, rel=1e-10)
    t, delta = 0.3, 0.05
    r = math.ceil(4 * asr * (1 + t / 3) * math.log((6 + 5) / delta) / t**2)
    assert r == 613
    p = probabilities("spectral", (a, v))
    expected = ((a * a).sum(axis=0) + (v * v).sum(axis=1)) / (2 * asr)
    np.testing.assert_allclose(p, expected, rtol=1e-12)
    errors = []
    for _ in range(400):
        d = sample_with_replacement(p, r, rng).diagonal()
        errors.append(np.linalg.norm((a * d) @ v - a @ v, 2))
    assert not too_many(int(np.count_nonzero(np.array(errors) >= t)), 400, delta)


@pytest.mark.statistical
@pytest.mark.parametrize("law", ["leverage", "value_norm2"])
def test_rows_by_leverage_embed_the_range(law: str, rng: np.random.Generator) -> None:
    """|U^T S^T S U - I|_2 > eps with probability <= 2 q exp(-beta r eps^2/(3 q))."""
    q, eps, delta, n = 5, 0.5, 0.05, 512
    x = rng.standard_normal((n, q)) * np.exp(rng.standard_normal((n, 1)))
    u = np.linalg.qr(x)[0]
    p = probabilities(law, (np.ones((1, n)), x))
    beta = leverage_quality(p, leverage_scores(x))
    assert beta == pytest.approx(1.0, rel=1e-10) or law != "leverage"
    r = math.ceil(3 * q / (beta * eps**2) * math.log(2 * q / delta))
    assert r == 318 or law != "leverage"
    failures = 0
    for _ in range(200):
        d = sample_with_replacement(p, r, rng).diagonal()
        failures += bool(np.abs(np.linalg.eigvalsh((u.T * d) @ u - np.eye(q))).max() > eps)
    assert not too_many(failures, 200, delta)


# --- leverage scores -----------------------------------------------------------------------------

METHODS = ("auto", "gram", "qr", "svd")


def tall(n: int = 60, d: int = 5, seed: int = 0, condition: float = 10.0) -> Array:
    g = np.random.default_rng(seed)
    u, v = np.linalg.qr(g.standard_normal((n, d)))[0], np.linalg.qr(g.standard_normal((d, d)))[0]
    x: Array = (u * np.geomspace(1.0, 1.0 / condition, d)) @ v.T
    return x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_leverage_scores_of_the_reference_values(method: str, dtype: Any) -> None:
    v = reference_instance()[1].astype(dtype)
    scores = leverage_scores(v, method=method)
    assert scores.dtype == np.float64
    # Golden values have ten digits; float32 moves the entries of V by 6e-8.
    rel = 1e-9 if dtype == np.float64 else 1e-6
    assert scores.sum() == pytest.approx(5.0, rel=1e-12)
    assert scores.max() == pytest.approx(0.1518796258, rel=rel)
    assert leverage_quality(np.full(64, 1 / 64), scores) == pytest.approx(0.5143876249, rel=rel)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_leverage_scores_are_those_of_an_orthonormal_basis(method: str, condition: float) -> None:
    for n, d in ((60, 5), (5, 5), (1, 1), (2500, 3)):
        x = tall(n, d, condition=condition)
        scores = leverage_scores(x, method=method)
        # X is rounded: the range turns by u cond; scores move by twice that.
        u = np.linalg.svd(x, full_matrices=False)[0]
        np.testing.assert_allclose(scores, (u * u).sum(axis=1), rtol=0, atol=1e-15 * 50 * condition)
        assert scores.sum() == pytest.approx(d, rel=1e-11)
        assert 0 <= scores.min() <= scores.max() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_leverage_scores_do_not_see_the_basis(method: str) -> None:
    x = tall()
    mixing = np.random.default_rng(1).standard_normal((5, 5)) + 5 * np.eye(5)
    # cond(X) cond(T) < 1000 times a few roundings.
    np.testing.assert_allclose(
        leverage_scores(x @ mixing, method=method), leverage_scores(x), rtol=1e-11
    )
    # Powers of ten of any size, which would overflow or vanish when squared.
    for factor in (1e-200, 1e-100, 1e100, 1e200):
        if method != "gram" or abs(math.log10(factor)) < 150:
            np.testing.assert_allclose(
                leverage_scores(factor * x, method=method), leverage_scores(x), rtol=1e-11
            )


def test_two_cholesky_passes_are_as_good_as_a_qr_factorisation() -> None:
    # One pass loses u cond^2 = 1e-9 here; two lose u cond.
    x = tall(300, 6, condition=3e3)
    u = np.linalg.svd(x, full_matrices=False)[0]
    exact = (u * u).sum(axis=1)
    gram = leverage_scores(x, method="gram")
    np.testing.assert_allclose(gram, exact, rtol=0, atol=1e-15 * 20 * 3e3)
    r = np.linalg.cholesky(x.T @ x)
    once = (np.linalg.solve(r, x.T) ** 2).sum(axis=0)
    assert np.abs(once - exact).max() > np.abs(gram - exact).max()


@pytest.mark.parametrize("method", ["auto", "qr", "svd"])
def test_rank_deficient_leverage(method: str) -> None:
    example = [[1, 1], [1, 1], [0, 0]]
    np.testing.assert_allclose(leverage_scores(example, method=method), [0.5, 0.5, 0], atol=1e-15)
    # Negative control: QR without truncation has an orthonormal basis of something larger.
    q = np.linalg.qr(np.array(example, float))[0]
    assert (q * q).sum() == pytest.approx(2.0)
    x = tall(40, 3)
    wide = x @ np.random.default_rng(2).standard_normal((3, 6))
    for dtype in (np.float64, np.float32):
        scores = leverage_scores(wide.astype(dtype), method=method)
        # Rounding of the entries turns the range by u |X|/sigma_min < 1e3 u.
        tolerance = 1e-12 if dtype == np.float64 else 1e-4
        np.testing.assert_allclose(scores, leverage_scores(x), rtol=0, atol=tolerance)
        assert scores.sum() == pytest.approx(3.0, rel=1e-6)
    assert not leverage_scores(np.zeros((4, 2)), method=method).any()
    # More columns than rows: every row of full rank decides for itself.
    np.testing.assert_allclose(leverage_scores(tall(7, 3).T, method=method), np.ones(3), rtol=1e-12)
    assert leverage_scores(np.zeros((0, 2)), method=method).shape == (0,)


def test_many_tiles_are_one_matrix() -> None:
    # More than eight tiles of 2048 rows, and a part of one: they are computed on threads.
    x = tall(17000, 3)
    u = np.linalg.svd(x, full_matrices=False)[0]
    for method in METHODS:
        scores = leverage_scores(x, method=method)
        np.testing.assert_allclose(scores, (u * u).sum(axis=1), rtol=1e-11)
        assert np.array_equal(scores, leverage_scores(x, method=method))
    fast = leverage_scores_fast(x, error=0.2, sketch="countsketch", rng=0)
    assert fast.shape == (17000,)


def test_gram_refuses_what_it_cannot_do() -> None:
    for x in (np.array([[1.0, 1], [1, 1], [0, 0]]), tall(condition=1e6)):
        with pytest.raises(ValueError, match=r"for method='gram', got a Gram matrix that is sing"):
            leverage_scores(x, method="gram")
    x = tall(condition=1e6)
    np.testing.assert_allclose(leverage_scores(x), leverage_scores(x, method="svd"), rtol=1e-9)


def test_rank_k_leverage() -> None:
    x = tall(50, 6, condition=100.0)
    u = np.linalg.svd(x, full_matrices=False)[0]
    for k in range(1, 7):
        scores = leverage_scores(x, k=k)
        np.testing.assert_allclose(scores, (u[:, :k] ** 2).sum(axis=1), rtol=0, atol=1e-12)
    equal = np.diag([2.0, 1.0, 1.0])
    with pytest.warns(UserWarning, match=r"^k must separate singular values, got k = 2 where"):
        leverage_scores(equal, k=2)
    np.testing.assert_allclose(leverage_scores(equal, k=1), [1, 0, 0], atol=1e-15)
    # k beyond the rank is the range, and says nothing.
    np.testing.assert_allclose(leverage_scores([[1, 1], [1, 1], [0, 0]], k=2), [0.5, 0.5, 0])


def test_tolerance_is_relative_to_the_largest_singular_value() -> None:
    x = np.diag([1.0, 1e-3])
    assert leverage_scores(x).tolist() == [1.0, 1.0]
    assert leverage_scores(x, tol=1e-2).tolist() == [1.0, 0.0]
    assert leverage_scores(x, tol=1e-2, method="qr").tolist() == [1.0, 0.0]


def test_leverage_quality_measures_beta(rng: np.random.Generator) -> None:
    scores = leverage_scores(tall())
    p = scores / scores.sum()
    assert leverage_quality(p, scores) == pytest.approx(1.0, rel=1e-14)
    theta = 0.3
    mixed = (1 - theta) * p + theta / len(p)
    assert leverage_quality(mixed, scores) >= 1 - theta
    other = rng.random(len(p))
    other /= other.sum()
    beta = leverage_quality(other, scores)
    ratio = other / (scores / scores.sum())
    assert 0 < beta == pytest.approx(ratio.min(), rel=1e-14)
    assert leverage_quality([1.0, 0.0], [0.5, 0.5]) == 0.0
    assert leverage_approx_factor(0.0) == 1.0
    assert leverage_approx_factor(0.5, 0.5) == pytest.approx(1 / 9)


def test_fast_scores_are_within_the_distortion_of_the_sketch(rng: np.random.Generator) -> None:
    x = tall(300, 5, condition=50.0)
    exact = leverage_scores(x)
    u = np.linalg.svd(x, full_matrices=False)[0]
    for rows in (30, 100, 299):
        sketch = rng.standard_normal((rows, 300)) / math.sqrt(rows)
        gam = float(np.abs(np.linalg.eigvalsh((sketch @ u).T @ (sketch @ u) - np.eye(5))).max())
        fast = leverage_scores_fast(x, sketch=sketch)
        # 1e-9: rounding with cond(X) = 50 is far below; the bound itself is exact.
        assert (fast >= exact / (1 + gam) * (1 - 1e-9)).all()
        if gam < 1:
            assert (fast <= exact / (1 - gam) * (1 + 1e-9)).all()
            beta = leverage_quality(fast / fast.sum(), exact)
            assert beta >= leverage_approx_factor(gam) * (1 - 1e-9)


def test_fast_scores_with_an_exact_sketch_are_exact() -> None:
    for condition in (10.0, 1e3, 1e6):
        x = tall(80, 4, condition=condition)
        fast = leverage_scores_fast(x, sketch=np.eye(80))
        np.testing.assert_allclose(fast, leverage_scores(x), rtol=0, atol=1e-14 * condition)
    deficient = tall(80, 3) @ np.ones((3, 5)) + np.outer(tall(80, 3)[:, 0], np.arange(5.0))
    fast = leverage_scores_fast(deficient, sketch=np.eye(80))
    np.testing.assert_allclose(fast, leverage_scores(deficient), rtol=0, atol=1e-12)
    single = leverage_scores_fast(tall(80, 4).astype(np.float32), sketch=np.eye(80, dtype="f4"))
    np.testing.assert_allclose(single, leverage_scores(tall(80, 4)), rtol=0, atol=1e-5)
    assert not leverage_scores_fast(np.zeros((4, 2)), sketch=np.eye(4)).any()


@pytest.mark.statistical
def test_fast_scores_follow_their_exact_law(rng: np.random.Generator) -> None:
    """Gaussian sketch: r l_i / l~_i is chi-square with r - q + 1 degrees; Kolmogorov at LEVEL."""
    x, rows = tall(40, 4), 20
    exact = leverage_scores(x)[0]
    ratios = np.array(
        [
            exact / leverage_scores_fast(x, sketch=rng.standard_normal((rows, 40)))[0]
            for _ in range(600)
        ]
    )
    # Without 1/sqrt(r) the sketch makes scores r times smaller: exactly the factor of the law.
    critical = stats.kstwo.isf(LEVEL, len(ratios))
    assert stats.kstest(ratios, stats.chi2(rows - 4 + 1).cdf).statistic < critical
    assert stats.kstest(ratios, stats.chi2(rows + 4).cdf).statistic > critical


@pytest.mark.statistical
def test_fast_sketch_rows_keep_all_scores_within_the_error(rng: np.random.Generator) -> None:
    n, q, error, delta = 600, 3, 0.6, 0.1
    rows = fast_sketch_rows(n, q, error, delta)
    assert rows < n
    x = tall(n, q)
    exact = leverage_scores(x)
    failures = 0
    for _ in range(200):
        sketch = rng.standard_normal((rows, n)) / math.sqrt(rows)
        ratio = leverage_scores_fast(x, sketch=sketch) / exact
        failures += bool(np.abs(ratio - 1).max() > error)
    assert not too_many(failures, 200, delta)


def test_fast_sketch_rows_is_the_smallest() -> None:
    def fails(r: int, n: int, q: int, error: float, delta: float) -> bool:
        law = stats.chi2(r - q + 1)
        return bool(n * (law.cdf(r / (1 + error)) + law.sf(r / (1 - error))) > delta)

    for n, q, error, delta in ((65536, 64, 0.1, 0.1), (10**5, 1, 0.3, 0.01), (4096, 8, 0.5, 0.5)):
        rows = fast_sketch_rows(n, q, error, delta)
        assert not fails(rows, n, q, error, delta)
        assert fails(rows - 1, n, q, error, delta)
    assert fast_sketch_rows(100, 5, 0.1) == 100
    assert fast_sketch_rows(1, 1, 0.9, 0.9) == 1


@pytest.mark.statistical
def test_projection_of_fast_scores_is_unbiased(rng: np.random.Generator) -> None:
    x = tall(30, 4)
    exact = leverage_scores(x)
    fast = np.array(
        [leverage_scores_fast(x, sketch=np.eye(30), projection=2, rng=rng) for _ in range(1000)]
    )
    assert z_score(fast, exact) <= Z
    assert fast.std() > 0.01


@pytest.mark.parametrize("kind", ["countsketch", "srht", "gaussian", "sjlt"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fast_scores_by_the_name_of_a_sketch(kind: str, dtype: Any) -> None:
    x = tall(2000, 4).astype(dtype)
    exact = leverage_scores(x)
    fast = leverage_scores_fast(x, error=0.3, sketch=kind, rng=0)
    assert np.array_equal(fast, leverage_scores_fast(x, error=0.3, sketch=kind, rng=0))
    assert fast.dtype == np.float64
    # No row dominates: the law of the Gaussian sketch is close, and 0.3 is its 10 % quantile for
    # the worst of 2000 rows; 0.45 is beyond 1e-6.
    assert np.abs(fast / exact - 1).max() < 0.45
    assert not np.array_equal(fast, leverage_scores_fast(x, error=0.3, sketch=kind, rng=1))


# --- column subsets ------------------------------------------------------------------------------


def test_column_subset_error() -> None:
    g = np.random.default_rng(0)
    x = g.standard_normal((12, 9))
    s = np.linalg.svd(x, compute_uv=False)
    chosen = np.array([0, 4, 7])
    c = x[:, chosen]
    residual = np.linalg.norm(x - c @ np.linalg.lstsq(c, x, rcond=None)[0])
    expected = residual / np.linalg.norm(s[2:])
    assert css_relative_error(x, chosen, 2) == pytest.approx(expected, rel=1e-12)
    assert css_relative_error(x, c, 2) == pytest.approx(expected, rel=1e-12)
    # No subset of k columns beats the best rank-k matrix; all columns are exact.
    assert css_relative_error(x, chosen, 3) >= 1
    assert css_relative_error(x, np.arange(9), 3) == pytest.approx(0.0, abs=1e-13)
    assert css_relative_error(x, [], 1) == pytest.approx(
        np.linalg.norm(x) / np.linalg.norm(s[1:]), rel=1e-12
    )
    low = np.outer(np.arange(1.0, 5.0), [1.0, 2.0, 0.0])
    assert css_relative_error(low, [0], 1) == 1.0
    assert css_relative_error(low, [2], 1) == math.inf


# --- ridge leverage ------------------------------------------------------------------------------


def clustered_kernel(n: int = 60, seed: int = 0) -> ExponentialKernel:
    """Keys in few clusters: an effective dimension far below n."""
    g = np.random.default_rng(seed)
    centers = g.standard_normal((4, 3))
    return ExponentialKernel(centers[g.integers(0, 4, n)] + 0.1 * g.standard_normal((n, 3)), 0.5)


@pytest.mark.parametrize("lam", [1e-3, 0.1, 10.0])
def test_ridge_leverage_formulas_agree(lam: float) -> None:
    g = np.random.default_rng(0)
    b = g.standard_normal((30, 12))
    k = b @ b.T
    scores = ridge_leverage(k, lam)
    inverse = np.linalg.inv(k + lam * np.eye(30))
    # The inverse is right up to u cond, and the second form divides the difference of two
    # matrices of size |K| by lam: u cond^2 with cond = |K|/lam, times a few for 30 terms.
    condition = float(np.linalg.norm(k, 2)) / lam
    tolerance = max(1e-10, 1e-15 * condition**2)
    np.testing.assert_allclose(scores, np.diag(k @ inverse), rtol=0, atol=tolerance)
    np.testing.assert_allclose(scores, np.diag(k - k @ inverse @ k) / lam, rtol=0, atol=tolerance)
    # 18 eigenvalues that should be zero are a few u |K|, over lam.
    assert d_eff(k, lam) == pytest.approx(scores.sum(), abs=1e-14 * condition)
    assert (scores >= 0).all()
    assert (scores < 1).all()


def test_ridge_leverage_tends_to_leverage() -> None:
    x = tall(30, 4)
    # Off by lam/sigma_min^2 = 1e-6, and by u/lam = 1e-8 from eigenvalues that should be zero.
    np.testing.assert_allclose(
        ridge_leverage(x @ x.T, 1e-8), leverage_scores(x), rtol=0, atol=1.1e-6
    )
    assert not ridge_leverage(np.zeros((3, 3)), 1.0).any()
    assert d_eff(np.zeros((3, 3)), 1.0) == 0.0
    assert ridge_leverage(np.zeros((0, 0)), 1.0).shape == (0,)
    assert ridge_leverage(np.eye(2, dtype=np.float32), 1.0).tolist() == [0.5, 0.5]


def test_exponential_kernel_is_the_unnormalised_attention() -> None:
    problem = small_problem()
    stacked = ExponentialKernel(np.concatenate([problem.q, problem.k]), problem.scale)
    block = stacked.block(np.arange(9), np.arange(9, 16)) * math.exp(stacked.shift)
    np.testing.assert_allclose(block, np.exp(problem.scale * problem.q @ problem.k.T), rtol=1e-12)
    dense = stacked.to_dense()
    assert np.array_equal(dense, dense.T)
    np.testing.assert_allclose(np.diag(dense), stacked.diagonal(), rtol=1e-12)
    assert dense.max() <= 1
    # Positive semidefinite up to rounding of 16 entries.
    assert np.linalg.eigvalsh(dense)[0] > -1e-13
    huge = ExponentialKernel(1e3 * problem.k, 1.0)
    assert np.isfinite(huge.to_dense()).all()


@pytest.mark.statistical
def test_nystrom_by_ridge_leverage(rng: np.random.Generator) -> None:
    """r >= 8 d_eff ln(n/delta): K - Kt <= 2 lam I, and always 0 <= Kt <= K."""
    n, delta = 60, 0.1
    kernel = clustered_kernel(n)
    k = kernel.to_dense()
    lam = 0.02 * np.trace(k)
    scores = ridge_leverage(kernel, lam)
    r = math.ceil(8 * scores.sum() * math.log(n / delta))
    failures = 0
    for _ in range(50):
        draw = sample_with_replacement(scores / scores.sum(), r, rng)
        factor = nystrom_factor(kernel, draw.columns)
        check = ridge_psd_check(k, factor @ factor.T, 2 * lam)
        assert check.below
        failures += not check.within
    assert not too_many(failures, 50, delta)
    # Negative control: one column is not enough.
    single = nystrom_factor(kernel, [0])
    assert not ridge_psd_check(k, single @ single.T, 2 * lam).within
    assert not ridge_psd_check(k, 1.1 * k, 2 * lam).below


def test_nystrom_is_exact_where_the_columns_span() -> None:
    x = tall(20, 3)
    k = x @ x.T
    factor = nystrom_factor(k, [0, 5, 9, 9])
    assert factor.shape == (20, 3)
    # cond(K_JJ) < 1e5 here.
    np.testing.assert_allclose(factor @ factor.T, k, rtol=0, atol=1e-10)
    assert nystrom_factor(k, []).shape == (20, 0)
    repeated = nystrom_factor(np.ones((4, 4)), [0, 1, 2])
    np.testing.assert_allclose(repeated @ repeated.T, np.ones((4, 4)), rtol=1e-12)


@pytest.mark.statistical
def test_recursive_ridge_leverage_keeps_its_guarantee(rng: np.random.Generator) -> None:
    """With probability 1 - 3 delta: overestimates, Kt <= K <= Kt + lam I, few columns."""
    n, delta = 250, 0.1
    kernel = clustered_kernel(n)
    k = kernel.to_dense()
    lam = 0.05 * np.trace(k)
    exact = ridge_leverage(k, lam)
    total = exact.sum()
    failures = 0
    for _ in range(40):
        # A small base makes the recursion several levels deep.
        scores, draw = ridge_leverage_recursive(kernel, lam, delta=delta, base=60, rng=rng)
        assert scores.shape == (n,)
        assert scores.max() <= 1
        assert len(np.unique(draw.columns)) == len(draw.columns)
        with blas_single_thread():  # threads do not pay for 250 x 250
            factor = nystrom_factor(kernel, draw.columns)
            check = ridge_psd_check(k, factor @ factor.T, lam)
        assert check.below
        failures += not (
            (scores >= exact * (1 - 1e-9)).all()
            and check.within
            and len(draw.columns) <= 384 * total * math.log(total / delta)
        )
    assert not too_many(failures, 40, 3 * delta)


def test_recursive_ridge_leverage_without_recursion_is_exact() -> None:
    kernel = clustered_kernel(50)
    k = kernel.to_dense()
    lam = 0.05 * np.trace(k)
    for given in (kernel, k):
        scores, draw = ridge_leverage_recursive(given, lam, rng=0)
        np.testing.assert_allclose(
            scores, np.minimum(1.5 * ridge_leverage(k, lam), 1.0), rtol=1e-10
        )
        assert draw.n == 50
        assert (draw.weights >= 1).all()
    few = ridge_leverage_recursive(kernel, lam, oversampling=0.5, rng=0).draw
    assert 0 < len(few.columns) < 50
    again = ridge_leverage_recursive(kernel, lam, oversampling=0.5, rng=0).draw
    assert np.array_equal(few.columns, again.columns)
    assert ridge_leverage_recursive(np.zeros((0, 0)), 1.0, rng=0).scores.shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: leverage_scores(np.ones(3)),
            ValueError,
            "x must have two axes, got shape (3,); pass a matrix",
        ),
        (
            lambda: leverage_scores([[1.0, NAN]]),
            ValueError,
            "x must be finite, got nan at index (0, 1); replace it, or hide its key with a mask",
        ),
        (
            lambda: leverage_scores([[INF, 1.0]]),
            ValueError,
            "x must be finite, got inf at index (0, 0); replace it, or hide its key with a mask",
        ),
        (
            lambda: leverage_scores(np.eye(2), method="svdd"),
            ValueError,
            "method must be one of auto, gram, qr, svd, got 'svdd'; did you mean 'svd'?",
        ),
        (
            lambda: leverage_scores(np.eye(2), k=3),
            ValueError,
            "k must be between 1 and min(n, d) = 2, got 3; None is the whole range",
        ),
        (
            lambda: leverage_scores(np.eye(2), k=1, method="qr"),
            ValueError,
            "k must be None for method='qr', which has no singular vectors, got 1; use "
            "method='svd'",
        ),
        (
            lambda: leverage_scores(np.eye(2), tol=1.0),
            ValueError,
            "tol must be positive and below 1, got 1; change tol",
        ),
        (
            lambda: leverage_scores_fast(np.ones((5, 3)), rows=2),
            ValueError,
            "rows must be at least the width d = 3 of x, got 2; raise rows",
        ),
        (
            lambda: leverage_scores_fast(np.ones((5, 3)), sketch=np.eye(4)),
            ValueError,
            "sketch must have shape (r1, n) with n = 5, got (4, 4); make it for the rows of x",
        ),
        (
            lambda: leverage_scores_fast(np.ones((5, 3)), sketch=np.eye(5), projection=0),
            ValueError,
            "projection must be at least 1, got 0; None leaves it out",
        ),
        (
            lambda: leverage_scores_fast(np.ones((5, 3)), error=1.0),
            ValueError,
            "error must be positive and below 1, got 1; change error",
        ),
        (
            lambda: fast_sketch_rows(0, 1),
            ValueError,
            "n must be at least 1, got 0; give a size",
        ),
        (
            lambda: leverage_quality([0.5, 0.5], [0.0, 0.0]),
            ValueError,
            "leverage must have a positive score, got none; give those of a matrix",
        ),
        (
            lambda: leverage_quality([0.5, 0.5], [-1.0, 0.0]),
            ValueError,
            "leverage must not be negative, got -1; give scores",
        ),
        (
            lambda: leverage_approx_factor(1.0),
            ValueError,
            "gam must be in [0, 1), got 1; change gam",
        ),
        (
            lambda: ridge_leverage(np.ones((2, 3)), 1.0),
            ValueError,
            "kernel must be square, got shape (2, 3); pass K (n, n)",
        ),
        (
            lambda: ridge_leverage([[1.0, 2.0], [0.0, 1.0]], 1.0),
            ValueError,
            "kernel must be symmetric, got entries that differ by 2 from their mirror image; "
            "pass (K + K.T)/2",
        ),
        (
            lambda: d_eff(-np.eye(2), 1.0),
            ValueError,
            "kernel must be positive semidefinite, got the eigenvalue -1; pass K = B B^T",
        ),
        (
            lambda: ridge_leverage([[0.0, 1.0], [1.0, 0.0]], 1.0),
            ValueError,
            "kernel must be positive semidefinite, got the eigenvalue -1; pass K = B B^T",
        ),
        (
            lambda: ridge_leverage_recursive(-np.eye(2), 1.0),
            ValueError,
            "kernel must be positive semidefinite, got the diagonal entry -1; pass K = B B^T",
        ),
        (
            lambda: ridge_leverage(np.eye(2), 0.0),
            ValueError,
            "lam must be positive, got 0; change lam",
        ),
        (
            lambda: ridge_leverage(np.eye(2), "1"),  # type: ignore[arg-type]  # what is refused
            TypeError,
            "lam must be a real number, got str; give one > 0",
        ),
        (
            lambda: ridge_leverage_recursive(np.eye(2), 1.0, delta=1.5),
            ValueError,
            "delta must be positive and below 1, got 1.5; change delta",
        ),
        (
            lambda: ExponentialKernel(np.eye(2), -1.0),
            ValueError,
            "scale must be finite and not negative for a positive semidefinite kernel, got -1.0; "
            "change the sign of one factor",
        ),
        (
            lambda: nystrom_factor(np.eye(2), [2]),
            ValueError,
            "columns must be in 0..1, got 2..2; give indices of rows of K",
        ),
        (
            lambda: ridge_psd_check(np.eye(2), np.eye(3), 1.0),
            ValueError,
            "approximation must have the shape (2, 2) of kernel, got (3, 3); pass Kt (n, n)",
        ),
        (
            lambda: css_relative_error(np.eye(2), [2], 1),
            ValueError,
            "columns must be in 0..1, got 2..2; give indices of columns of x",
        ),
        (
            lambda: css_relative_error(np.eye(2), [0], 0),
            ValueError,
            "k must be between 1 and min(m, n) = 2, got 0; change k",
        ),
    ],
)
def test_leverage_refuses(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=message(text)):
        call()
