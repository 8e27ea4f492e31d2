"""Informer: its statistics and their lemma, its errors by their identity, and its draws."""

from __future__ import annotations

import math
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from method_cases import dense_attention
from naive import naive_informer
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.kernels import probsparse
from sketchattn.kernels._threads import deal, limit_threads
from sketchattn.zoo.informer.choices import PRESETS
from sketchattn.zoo.informer.lazy import lazy_errors
from sketchattn.zoo.informer.method import published_count
from sketchattn.zoo.informer.operator import InformerAttention
from sketchattn.zoo.informer.statistics import DRAWN_ENTRIES

Array = NDArray[Any]

EXAMPLE = np.log(np.array([[1.0, 2, 4], [1, 1, 1], [3, 1, 1]]))
MASK = np.arange(24) % 4 != 1

pytestmark = pytest.mark.usefixtures("one_thread")


def message(text: str) -> str:
    """Return a pattern for a whole message."""
    return f"^{re.escape(text)}$"


def from_logits(logits: Array, v: Array | None = None, **options: Any) -> sa.AttentionProblem:
    """Return a problem whose logits are the given matrix, bit by bit."""
    return sa.AttentionProblem(logits, np.eye(logits.shape[1]), v, scale=1, **options)


def make_problem(
    n_q: int = 24,
    n_k: int = 24,
    dtype: Any = np.float64,
    *,
    d: int = 4,
    seed: int = 0,
    size: float = 2.0,
    **options: Any,
) -> sa.AttentionProblem:
    rng = np.random.default_rng(seed)
    q = size * rng.standard_normal((n_q, d))
    k, v = (rng.standard_normal((n_k, m)) + 0.3 for m in (d, 3))
    return sa.AttentionProblem(*(x.astype(dtype) for x in (q, k, v)), **options)


def hide(problem: sa.AttentionProblem) -> Array:
    """Return the logits with -inf where a row sees nothing."""
    return np.where(problem.visible(), problem.scale * problem.q @ problem.k.T, -np.inf)


def squared(problem: sa.AttentionProblem, ahat: sa.AttentionOperator) -> float:
    """Return the squared Frobenius error of the output by the plain formulas."""
    exact = dense_attention(problem)
    return float(np.sum(((exact - ahat.to_dense()) @ problem.values) ** 2))


def naive(
    problem: sa.AttentionProblem, rank: int, samples: Array | None, **known: Any
) -> tuple[list[int], Array, Array, Array]:
    """Return what the formulas in loops give, in float64, from the arrays of a problem."""
    q, k, v = (x.astype(np.float64) for x in (problem.q, problem.k, problem.values))
    return naive_informer(
        q,
        k,
        v,
        rank,
        samples,
        scale=problem.scale,
        offset=problem.offset if problem.causal else None,
        key_mask=problem.key_mask,
        **known,
    )


# --- statistics ---------------------------------------------------------------------------------


def lemma_slacks(m: Array, highest: Array, counts: Array) -> list[Array]:
    """Return what must not be negative: Lemma 1, its sharper form, and KL <= Mbar."""
    log_n = np.log(counts)
    return [
        m - log_n,
        highest + log_n - m,
        m - np.maximum(log_n, highest),
        highest - (m - log_n),
        (m - log_n) - (highest - log_n),
    ]


def test_lemma_one_and_its_sharper_form_hold_on_every_row(global_random_seed: int) -> None:
    rng = np.random.default_rng(global_random_seed)
    for trial in range(50):
        n_q, n_k = (int(x) for x in rng.integers(1, 201, 2))
        logits = (0.1, 1.0, 10.0, 100.0)[trial % 4] * rng.standard_normal((n_q, n_k))
        causal = "bottom-right" if trial % 5 == 0 and n_q <= n_k else False
        problem = from_logits(logits, causal=causal)
        m, highest, kl = (sa.row_statistic(problem, s) for s in ("m", "max_mean", "kl"))
        counts = problem.visible_counts()
        # Against the plain formulas: a sum of n_k terms up to max |l|, in float64.
        shown = hide(problem)
        mean = np.where(problem.visible(), logits, 0).sum(axis=1) / counts
        size = 1 + np.abs(logits).max()
        assert np.abs(highest - (shown.max(axis=1) - mean)).max() <= 1e-13 * size
        lse = np.log(np.exp(shown - shown.max(axis=1, keepdims=True)).sum(axis=1))
        assert np.abs(m - (lse + shown.max(axis=1) - mean)).max() <= 1e-13 * size
        assert np.abs(kl - (m - np.log(counts))).max() <= 1e-13 * size
        for slack in lemma_slacks(m, highest, counts):
            assert slack.min() >= -1e-10 * size
    # Without its log n the upper bound is false, and so is the lower one for a sample.
    problem = from_logits(rng.standard_normal((20, 50)))
    m, highest = (sa.row_statistic(problem, s) for s in ("m", "max_mean"))
    assert (highest < m).all()
    sampled = sa.row_statistic(problem, "max_mean", key_samples=rng.integers(0, 50, (20, 3)))
    assert min(x.min() for x in lemma_slacks(m, sampled, problem.visible_counts())) < -1e-3


def test_the_order_of_the_maximum_is_not_that_of_the_divergence() -> None:
    problem = from_logits(EXAMPLE, np.arange(1.0, 4)[:, None])
    want = {
        "m": (1.2527630, 1.0986123, 1.2432338),
        "max_mean": (0.6931472, 0, 0.7324082),
        "kl": (0.1541507, 0, 0.1446215),
        "oracle": (0.1836735, 0, 0.16),
    }
    for statistic, numbers in want.items():
        assert np.abs(sa.row_statistic(problem, statistic) - numbers).max() <= 1e-7
    assert np.abs(lazy_errors(problem) - want["oracle"]).max() <= 1e-7
    picked = {}
    for statistic in want:
        sampling = None if statistic == "oracle" else "full"
        method = sa.Informer(1, statistic=statistic, key_sampling=sampling)
        picked[statistic] = method.select(problem).tolist()
    assert picked == {"m": [0], "kl": [0], "oracle": [0], "max_mean": [2]}
    regret = sa.selection_regret(problem, picked["max_mean"])
    assert regret.regret == pytest.approx(0.0236735, abs=1e-7)
    assert regret.relative == pytest.approx(0.0236735 / 0.3436735, abs=1e-7)
    assert sa.selection_regret(problem, [0]).regret == 0
    assert regret.rows == 1


def test_one_very_negative_logit_makes_the_measure_large() -> None:
    problem = from_logits(np.log(np.array([[1, 1, 1, 1e-6], [10, 1, 1, 1]])))
    assert np.abs(sa.row_statistic(problem, "kl") - (3.1662, 0.6030)).max() <= 1e-3
    assert np.abs(sa.row_statistic(problem, "row_norm") - (0.5774, 0.7807)).max() <= 1e-3
    variation = 0.5 * np.abs(dense_attention(problem) - 0.25).sum(axis=1)
    assert np.abs(variation - (0.25, 0.519)).max() <= 1e-3
    for statistic, row in (("m", 0), ("kl", 0), ("row_norm", 1)):
        sampling = None if statistic == "row_norm" else "full"
        method = sa.Informer(1, statistic=statistic, key_sampling=sampling)
        assert method.select(problem).tolist() == [row]


def test_the_text_of_the_paper_fills_with_zero() -> None:
    problem = from_logits(np.array([[-1.0, -2, -4], [-1, 3, -1], [-6, -6, -6]]))
    samples = np.array([0, 2])
    # Zero stands for the key that is left out: -1 + 5/3, 0 + 5/3; -1 + 2/3, 0 + 2/3; ...
    filled = sa.row_statistic(problem, "zero_filled", key_samples=samples)
    released = sa.row_statistic(problem, key_samples=samples, mean_divisor="n_keys")
    assert np.abs(filled - (5 / 3, 2 / 3, 4)).max() <= 1e-14
    assert np.abs(released - (2 / 3, -1 / 3, -2)).max() <= 1e-14
    # Nothing is left out where all keys are looked at.
    whole = sa.row_statistic(problem, "zero_filled")
    assert np.array_equal(whole, sa.row_statistic(problem))


def test_row_norms_are_those_of_rows() -> None:
    for options in ({}, {"causal": True}, {"key_mask": MASK}):
        problem = make_problem(**options)
        want = np.linalg.norm(dense_attention(problem), axis=1)
        assert np.abs(sa.row_statistic(problem, "row_norm") - want).max() <= 1e-13


def test_a_vector_added_to_all_keys_moves_the_divisor_of_the_released_code(
    global_random_seed: int,
) -> None:
    n, u, r = 60, 12, 7
    rng = np.random.default_rng(global_random_seed)
    problem = make_problem(n, n, d=8, seed=global_random_seed, size=1.0)
    c = 1e4 * rng.standard_normal(8)
    moved = sa.AttentionProblem(problem.q, problem.k + c, problem.v)
    samples = rng.integers(0, n, (n, u))
    # Logits of 1e4 or so are rounded by 1e-12 each; the mean adds n of them.
    for statistic in ("m", "kl", "max_mean"):
        for chosen in (None, samples):
            before, after = (
                sa.row_statistic(x, statistic, key_samples=chosen) for x in (problem, moved)
            )
            assert np.abs(before - after).max() <= 1e-9
    draw = {"key_samples": samples}
    divided = {
        divisor: [
            sa.Informer(r, u, mean_divisor=divisor).select(x, draw=draw).tolist()
            for x in (problem, moved)
        ]
        for divisor in ("n_samples", "n_keys")
    }
    assert divided["n_samples"][0] == divided["n_samples"][1]
    along = np.argsort(-(problem.q @ c), kind="stable")[:r]
    assert divided["n_keys"][1] == along.tolist()
    assert divided["n_keys"][0] != divided["n_keys"][1]
    # The shift itself: q_i.c (1 - U/n_k).
    shift = problem.scale * (problem.q @ c) * (1 - u / n)
    before, after = (
        sa.row_statistic(x, key_samples=samples, mean_divisor="n_keys") for x in (problem, moved)
    )
    assert np.abs(after - before - shift).max() <= 1e-9


@pytest.mark.statistical
def test_a_sample_misses_the_largest_key_as_often_as_it_should(global_random_seed: int) -> None:
    # Level 1e-6 on each side: 1000 rows, each missed with probability (1 - 1/1024)^35.
    from scipy.stats import binom

    n, u, rows = 1024, 35, 1000
    rng = np.random.default_rng(global_random_seed)
    keys = rng.standard_normal((n, 128))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    problem = sa.AttentionProblem(50 * keys[:rows], keys, scale=1)
    draw = sa.Informer(8, u).draw(problem, global_random_seed)
    found = sa.row_statistic(problem, key_samples=draw["key_samples"])
    # The logit of the planted key is 50, all others are below 35; the mean is within 6.
    missed = int((found < 42).sum())
    assert missed == int((draw["key_samples"] != np.arange(rows)[:, None]).all(axis=1).sum())
    rate = (1 - 1 / n) ** u
    assert abs(rate - 0.966) < 1e-3
    assert binom.ppf(1e-6, rows, rate) <= missed <= binom.isf(1e-6, rows, rate)
    assert binom.isf(1e-6, rows, rate) - rows * rate <= 0.03 * rows
    assert not (sa.row_statistic(problem) < 42).any()


# --- errors -------------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("mean", {}),
    "rectangular": ("mean", {"n_q": 15}),
    "masked": ("mean", {"key_mask": MASK}),
    "masked_mean": ("masked_mean", {"key_mask": MASK, "causal": True}),
    "cummean": ("cummean", {"causal": True}),
    "bottom-right": ("cummean", {"causal": "bottom-right", "n_q": 29}),
    "cumsum": ("cumsum", {"causal": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_the_sum_over_the_rows_that_are_left(
    kind: str, global_random_seed: int
) -> None:
    fill, options = KINDS[kind]
    problem = make_problem(seed=global_random_seed, **options)
    errors = lazy_errors(problem, fill=fill)
    rng = np.random.default_rng(global_random_seed)
    seen = np.flatnonzero(problem.visible_counts())
    for r in (0, 1, 6, len(seen)):
        rows = rng.permutation(seen)[:r]
        method = sa.Informer(24, fill=fill)
        ahat = method.approximate(problem, draw={"pilot_rows": rows})
        left = np.delete(errors, rows).sum()
        assert abs(squared(problem, ahat) - left) <= 1e-12 * errors.sum()
        regret = sa.selection_regret(problem, rows, fill=fill)
        assert regret.residual == pytest.approx(left, rel=1e-12, abs=1e-12)
        assert regret.total == pytest.approx(errors.sum(), rel=1e-12)
        assert regret.regret >= 0
        best = sa.Informer(max(r, 1), fill=fill, statistic="oracle").select(problem)[:r]
        assert sa.selection_regret(problem, best, fill=fill).regret == 0
    # Another fill has other errors.
    if fill == "cumsum":
        assert errors.sum() > 2 * lazy_errors(problem).sum()


def test_no_statistic_has_a_negative_regret(global_random_seed: int) -> None:
    problem = make_problem(40, 40, seed=global_random_seed)
    relative = {}
    for statistic in ("max_mean", "zero_filled", "m", "kl", "row_norm", "oracle", "random"):
        rows = sa.Informer(8, statistic=statistic).select(problem, global_random_seed)
        regret = sa.selection_regret(problem, rows)
        assert 0 <= regret.regret <= regret.total
        assert regret.residual >= regret.least
        relative[statistic] = regret.relative
    assert relative["oracle"] == 0
    assert max(relative.values()) > 0


@pytest.mark.statistical
def test_random_rows_leave_their_share_of_the_error(global_random_seed: int) -> None:
    # Level 6e-7, 5 standard errors of a sum of r of n values drawn without replacement.
    from scipy.stats import binom

    n, r, trials = 40, 11, 2000
    problem = make_problem(n, n, seed=global_random_seed)
    errors = lazy_errors(problem)
    method = sa.Informer(r, statistic="random")
    rng = np.random.default_rng(global_random_seed)
    rows = [method.draw(problem, rng)["pilot_rows"] for _ in range(trials)]
    assert all(len(np.unique(x)) == r for x in rows)
    left = np.array([np.delete(errors, x).sum() for x in rows]) / errors.sum()
    spread = math.sqrt(r * (1 - r / n) * errors.var(ddof=1)) / errors.sum()
    assert abs(left.mean() - (1 - r / n)) <= 5 * spread / math.sqrt(trials)
    # Each row is drawn as often as any other: level 1e-6 for all of them together.
    counts = np.bincount(np.concatenate(rows), minlength=n)
    assert counts.min() >= binom.ppf(1e-6 / (2 * n), trials, r / n)
    assert counts.max() <= binom.isf(1e-6 / (2 * n), trials, r / n)
    # The rows with the largest errors are far outside.
    best = np.sort(errors)[: n - r].sum() / errors.sum()
    assert abs(best - (1 - r / n)) > 5 * spread / math.sqrt(trials)


@pytest.mark.parametrize("temperature", [0.5, 1, 2, 4])
def test_the_divergence_bounds_the_error_of_a_row(
    temperature: float, global_random_seed: int
) -> None:
    problem = make_problem(40, 30, seed=global_random_seed, size=temperature)
    exact, v = dense_attention(problem), problem.values
    variation = 0.5 * np.abs(exact - 1 / 30).sum(axis=1)
    diameter = np.linalg.norm(v[:, None] - v[None], axis=2).max()
    errors = lazy_errors(problem)
    assert (np.sqrt(errors) <= variation * diameter * (1 + 1e-12)).all()
    rows = sa.Informer(9).select(problem, global_random_seed)
    lazy = np.delete(np.arange(40), rows)
    ahat = sa.Informer(9).approximate(problem, draw={"pilot_rows": rows})
    for statistic in ("kl", "max_mean"):
        kl = sa.row_statistic(problem, statistic)
        bound = np.minimum(kl / 2, 1 - np.exp(-kl))
        assert (variation**2 <= bound * (1 + 1e-12)).all()
        assert squared(problem, ahat) <= diameter**2 * bound[lazy].sum()
    # Half the diameter is too little for a row that sees one end of V, and so is half the bound.
    ends = from_logits(np.array([[30.0, 0.0]]), np.array([[0.0], [1.0]]))
    kl = sa.row_statistic(ends, "kl")
    assert lazy_errors(ends)[0] > 0.25 * 0.9 > 0.25**2
    assert lazy_errors(ends)[0] <= min(kl[0] / 2, 1 - math.exp(-kl[0]))


# --- the matrix ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 24), (7, 24), (30, 24), (1, 24), (5, 1), (1, 1)], ids=str)
def test_all_rows_are_exact_attention(shape: tuple[int, int]) -> None:
    problem = make_problem(*shape)
    ahat = sa.Informer(max(shape)).approximate(problem, 0)
    assert ahat.effective_rank == shape[0]
    assert np.abs(ahat.to_dense() - dense_attention(problem)).max() <= 1e-12
    assert np.abs(ahat @ problem.values - problem.output).max() <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_are_exact_or_uniform(kind: str, dtype: Any) -> None:
    fill, options = KINDS[kind]
    problem = make_problem(dtype=dtype, **options)
    method = sa.Informer(9, 5, fill=fill)
    rows = method.select(problem, 3)
    ahat = method.approximate(problem, 3)
    dense = ahat.to_dense().astype(np.float64)
    exact = dense_attention(problem)
    assert isinstance(ahat, sa.SampledAttention)
    assert ahat.replaced is not None
    assert ahat.replaced.tolist() == sorted(rows)
    assert len(rows) == 9
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    assert np.abs(dense - exact)[rows].max() <= tolerance
    seen = problem.visible()
    lazy = np.delete(np.arange(problem.n_q), rows)
    counts = seen.sum(axis=1)
    want = seen * (1.0 if fill == "cumsum" else 1 / np.maximum(counts, 1)[:, None])
    assert np.abs(dense - want)[lazy].max() <= tolerance
    assert dense.min() >= 0
    assert not dense[~seen].any()
    sums = np.where(counts > 0, 1.0, 0.0)
    if fill == "cumsum":
        sums[lazy] = lazy + 1
    assert method.traits.row_stochastic == (fill != "cumsum")
    assert np.abs(ahat.row_sums() - sums).max() <= 30 * tolerance
    assert np.abs(ahat @ problem.values - dense @ problem.values).max() <= 30 * tolerance
    y = np.random.default_rng(1).standard_normal((problem.n_q, 2)).astype(dtype)
    assert np.abs(ahat.T @ y - dense.T @ y).max() <= 100 * tolerance
    wide = ahat.wide()
    assert wide.dtype == np.float64
    assert np.abs(wide.to_dense() - dense).max() <= tolerance
    assert np.linalg.matrix_rank(dense, 1e-5) <= ahat.rank_bound
    if not problem.causal:
        assert isinstance(ahat, InformerAttention)
        assert ahat.rank_bound == 10
        assert ahat.nbytes < problem.exact.nbytes + problem.arrays.q.nbytes + 8 * 60


def test_no_row_is_the_mean_of_v() -> None:
    problem = make_problem()
    none = {"pilot_rows": np.empty(0, np.int64)}
    ahat = sa.Informer(1).approximate(problem, draw=none)
    assert ahat.effective_rank == 0
    assert np.abs(ahat @ problem.values - problem.values.mean(axis=0)).max() <= 1e-14
    assert ahat.rank_bound == 1


# options of the method, of the problem, and what the naive implementation needs to know
SAME: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}, {}),
    "released": ({"preset": "released"}, {}, {"mean_divisor": "n_keys"}),
    "paper": ({"preset": "paper"}, {}, {"statistic": "zero_filled"}),
    "kl": ({"statistic": "kl"}, {}, {"statistic": "kl"}),
    "m": ({"statistic": "m", "mean_divisor": "n_keys"}, {},
          {"statistic": "m", "mean_divisor": "n_keys"}),
    "shared": ({"key_sampling": "shared"}, {}, {}),
    "shared released": ({"key_sampling": "shared", "preset": "released"}, {},
                        {"mean_divisor": "n_keys"}),
    "per_head": ({"key_sampling": "per_head"}, {}, {}),
    "full": ({"key_sampling": "full"}, {}, {}),
    "full kl": ({"key_sampling": "full", "statistic": "kl"}, {}, {"statistic": "kl"}),
    "masked": ({}, {"key_mask": np.arange(70) % 4 != 1}, {}),
    "masked shared": ({"key_sampling": "shared"}, {"key_mask": np.arange(70) % 4 != 1}, {}),
    "masked full": ({"key_sampling": "full", "statistic": "m"},
                    {"key_mask": np.arange(70) % 4 != 1}, {"statistic": "m"}),
    "causal": ({"preset": "corrected_causal"}, {"causal": True},
               {"statistic": "kl", "fill": "cummean"}),
    "causal m": ({"preset": "corrected_causal", "statistic": "m"}, {"causal": True},
                 {"statistic": "m", "fill": "cummean"}),
    "causal full": ({"preset": "corrected_causal", "key_sampling": "full"}, {"causal": True},
                    {"statistic": "kl", "fill": "cummean"}),
    "causal shared": ({"preset": "corrected_causal", "key_sampling": "shared"}, {"causal": True},
                      {"statistic": "kl", "fill": "cummean"}),
    "causal masked": ({"preset": "corrected_causal", "fill": "masked_mean"},
                      {"causal": "bottom-right", "key_mask": np.arange(70) % 4 != 1},
                      {"statistic": "kl", "fill": "masked_mean"}),
    "released causal": ({"preset": "released_causal"}, {"causal": True},
                        {"mean_divisor": "n_keys", "fill": "cumsum", "peek": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_given_draw_gives_what_the_formulas_give(name: str, dtype: Any) -> None:
    options, given, known = SAME[name]
    n_q = 70 if given.get("causal") is True else 50
    problem = make_problem(n_q, 70, dtype, d=8, size=1.5, **given)
    method = sa.Informer(12, None if "full" in name else 9, **options)
    draw = method.draw(problem, 5)
    samples = draw.get("key_samples")
    order, statistic, weights, want = naive(problem, 12, samples, **known)
    assert method.select(problem, draw=draw).tolist() == order
    found = sa.row_statistic(
        problem,
        method.choices.statistic,
        key_samples=samples,
        mean_divisor=method.choices.mean_divisor or "n_samples",
        scope=method.choices.scope or "visible",
    )
    # In float64 whatever the inputs: sums of d and of at most 70 terms.
    seen = np.isfinite(statistic)
    assert np.array_equal(seen, np.isfinite(found))
    assert np.abs(found[seen] - statistic[seen]).max() <= 1e-12
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    ahat = method.approximate(problem, draw=draw)
    for got, right in ((ahat @ problem.values, want), (ahat.to_dense(), weights)):
        assert np.linalg.norm(got - right) <= tolerance * np.linalg.norm(right)
    # Given rows are taken as they are, in any order.
    rows = np.array([3, 17, 8])
    handed = method.approximate(problem, draw={"pilot_rows": rows})
    want = naive(problem, 12, samples, rows=rows, **known)[3]
    assert np.linalg.norm(handed @ problem.values - want) <= tolerance * np.linalg.norm(want)
    both = {**draw, "pilot_rows": rows[::-1]}
    again = method.approximate(problem, draw=both)
    assert np.array_equal(again @ problem.values, handed @ problem.values)
    # What a comparison must not accept.
    other = method.approximate(problem, draw={"pilot_rows": rows[:2]})
    assert np.linalg.norm(other @ problem.values - want) > 10 * tolerance * np.linalg.norm(want)


def test_the_released_steps_one_by_one() -> None:
    # Unscaled products, one sample of keys for all rows, the largest minus the sum over n_k.
    n, u = 96, 25
    problem = make_problem(n, n, d=8)
    index = np.random.default_rng(0).integers(0, n, u)
    products = problem.q @ problem.k[index].T
    measure = products.max(axis=1) - products.sum(axis=1) / n
    top = np.argsort(-measure, kind="stable")[:u]
    out = np.broadcast_to(problem.values.mean(axis=0), problem.values.shape).copy()
    out[top] = problem.output[top]
    method = sa.Informer(preset="released", key_sampling="shared")
    assert method.budget(problem) == (u, u)
    draw = {"key_samples": index}
    assert method.select(problem, draw=draw).tolist() == top.tolist()
    made = method.approximate(problem, draw=draw) @ problem.values
    assert np.abs(made - out).max() <= 1e-12
    corrected = sa.Informer(preset="corrected", key_sampling="shared")
    assert corrected.select(problem, draw=draw).tolist() != top.tolist()
    # The sample of each row repeated gives the same as the shared one.
    repeated = {"key_samples": np.tile(index, (n, 1))}
    chosen = sa.Informer(preset="released").select(problem, draw=repeated)
    assert chosen.tolist() == top.tolist()


def test_ties_go_to_the_smaller_index() -> None:
    q, v = np.ones((9, 2)), np.eye(9)
    for sampling in ("per_query", "shared", "full"):
        for scale in (0.0, None):
            problem = sa.AttentionProblem(q, np.tile(np.arange(2.0), (9, 1)), v, scale=scale)
            method = sa.Informer(4, key_sampling=sampling)
            assert method.select(problem, 0).tolist() == [0, 1, 2, 3]
    problem = from_logits(np.array([[0.0, 1], [0, 2], [0, 1], [0, 2]]))
    method = sa.Informer(2, key_sampling="full")
    assert method.select(problem).tolist() == [1, 3]
    assert sa.Informer(1, key_sampling="full").select(problem).tolist() == [1]


def test_budgets_are_clamped_and_returned() -> None:
    for n, count in ((1, 1), (2, 2), (96, 25), (512, 35), (720, 35), (1024, 35), (2048, 40)):
        assert published_count(n) == count
    assert [published_count(n, math.ceil(256 / math.log(n))) for n in (1024, 2048, 4096)] == [
        259, 272, 279,
    ]  # fmt: skip
    one = make_problem(1, 1)
    for method in (
        sa.Informer(1), sa.Informer(1, 40), sa.Informer(factor=5), sa.Informer(preset="paper")
    ):  # fmt: skip
        assert method.budget(one) == (1, 1)
        ahat = method.approximate(one, 0)
        assert ahat.effective_rank == 1
        assert np.abs(ahat @ one.values - one.output).max() <= 1e-14
    wide = make_problem(6, 40)
    assert sa.Informer(30).budget(wide) == (6, 30)
    assert sa.Informer(30).approximate(wide, 0).effective_rank == 6
    assert sa.Informer(30, 100).budget(wide) == (6, 40)
    assert sa.Informer(3, factor=5).budget(wide) == (3, 20)
    assert sa.Informer(samples=3, factor=5).budget(wide) == (6, 3)
    assert sa.Informer(factor=1, preset="released").budget(wide) == (2, 4)
    assert sa.Informer(4, preset="released").budget(wide) == (4, 4)
    assert sa.Informer(4, key_sampling="full").budget(wide) == (4, 0)
    masked = make_problem(30, 24, key_mask=np.arange(24) < 4)
    assert sa.Informer(10).budget(masked) == (10, 4)
    assert sa.Informer(28).approximate(make_problem(30, 24), 0).effective_rank == 28


# --- causal problems and masks ------------------------------------------------------------------


def test_corrected_causal_rows_look_at_no_later_key() -> None:
    problem = make_problem(causal=True)
    method = sa.Informer(7, 6, preset="corrected_causal")
    draw = method.draw(problem, 0)
    assert (draw["key_samples"] <= np.arange(24)[:, None]).all()
    assert (draw["key_samples"].max(axis=1)[8:] > 3).any()
    ahat = method.approximate(problem, draw=draw)
    dense = ahat.to_dense()
    assert not np.triu(dense, 1).any()
    assert np.abs(dense.sum(axis=1) - 1).max() <= 1e-14
    assert dense[0, 0] == 1.0
    kl = sa.row_statistic(problem, "kl")
    assert abs(kl[0]) <= 1e-14
    lazy = np.delete(np.arange(24), method.select(problem, draw=draw))
    for i in lazy:
        assert np.abs((ahat @ problem.values)[i] - problem.values[: i + 1].mean(axis=0)).max() < (
            1e-14
        )
    # Keys after row i do not move its statistic, in the corrected form and in that one only.
    k = problem.k.copy()
    k[12:] += 3
    moved = sa.AttentionProblem(problem.q, k, problem.v, causal=True)
    for samples in (draw["key_samples"], None):
        before, after = (sa.row_statistic(x, "kl", key_samples=samples) for x in (problem, moved))
        assert np.array_equal(before[:12], after[:12])
        assert not np.array_equal(before[12:], after[12:])
    released = sa.Informer(7, 6, preset="released_causal")
    samples = released.draw(problem, 0)["key_samples"]
    assert (samples > np.arange(24)[:, None]).any()
    before, after = (
        sa.row_statistic(x, key_samples=samples, scope="all") for x in (problem, moved)
    )
    assert not np.array_equal(before[:12], after[:12])


def test_released_causal_rows_sum_to_their_number() -> None:
    problem = make_problem(causal=True)
    ahat = sa.Informer(5, preset="released_causal").approximate(problem, 0)
    assert isinstance(ahat, sa.SampledAttention)
    want = np.arange(1.0, 25)
    want[ahat.replaced] = 1
    assert np.abs(ahat.row_sums() - want).max() <= 1e-13
    assert not sa.Informer(5, preset="released_causal").traits.row_stochastic
    corrected = sa.Informer(5, preset="corrected_causal").approximate(problem, 0)
    assert squared(problem, ahat) > 10 * squared(problem, corrected)


def test_rows_that_see_few_keys_compare_by_divergence() -> None:
    # Row 1 sees two keys and is far from uniform; row 3 sees four and is nearly so.
    logits = np.zeros((4, 4))
    logits[1, 0] = 2.0
    logits[3, 0] = 0.5
    problem = from_logits(logits, causal=True)
    m, kl = (sa.row_statistic(problem, s) for s in ("m", "kl"))
    assert np.abs(m - kl - np.log([1, 2, 3, 4])).max() <= 1e-14
    assert (int(m.argmax()), int(kl.argmax())) == (3, 1)
    for statistic, row in (("m", 3), ("kl", 1)):
        method = sa.Informer(1, statistic=statistic, key_sampling="full", preset="corrected_causal")
        assert method.select(problem).tolist() == [row]


def test_a_sampled_divergence_allows_for_the_sample_and_not_for_the_keys() -> None:
    # All rows are uniform, and so is every sample: ln U is what a sum over U keys has too much.
    # With ln nv in its place the first rows would be on top, by ln(U / nv).
    problem = from_logits(np.zeros((24, 24)), causal=True)
    method = sa.Informer(5, 6, preset="corrected_causal")
    samples = method.draw(problem, 0)["key_samples"]
    kl, m = (sa.row_statistic(problem, s, key_samples=samples) for s in ("kl", "m"))
    assert np.abs(kl).max() <= 1e-14
    assert np.abs(m - np.log(np.arange(1, 25))).max() <= 1e-14
    assert method.select(problem, 0).tolist() == [0, 1, 2, 3, 4]


def test_masked_keys_leave_all_statistics_finite() -> None:
    problem = make_problem(24, 24, key_mask=MASK)
    k, v = (np.where(MASK[:, None], x, np.nan) for x in (problem.k, problem.values))
    poisoned = sa.AttentionProblem(problem.q, k, v, key_mask=MASK)
    bare = sa.AttentionProblem(
        problem.q, problem.k[MASK], problem.values[MASK], scale=problem.scale
    )
    short = np.random.default_rng(0).integers(0, MASK.sum(), (24, 7))
    index = np.flatnonzero(MASK)[short]
    for statistic in ("m", "kl", "max_mean", "zero_filled"):
        for full in (False, True):
            options = [{} if full else {"key_samples": x} for x in (index, index, short)]
            masked, hidden, cut = (
                sa.row_statistic(x, statistic, **given)  # type: ignore[arg-type]  # arrays only
                for x, given in zip((problem, poisoned, bare), options, strict=True)
            )
            assert np.isfinite(masked).all()
            assert np.array_equal(masked, hidden)
            assert np.abs(masked - cut).max() <= 1e-13
    for statistic in ("row_norm", "oracle"):
        masked, cut = (sa.row_statistic(x, statistic) for x in (problem, bare))
        assert np.abs(masked - cut).max() <= 1e-13
    method = sa.Informer(6, 7)
    made, want = (
        method.approximate(x, draw={"key_samples": given}) @ x.values
        for x, given in ((problem, index), (bare, short))
    )
    assert np.abs(made - want).max() <= 1e-13


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"key_sampling": "shared"},
        {"key_sampling": "full"},
        {"statistic": "row_norm"},
        {"statistic": "oracle"},
        {"statistic": "random"},
    ],
    ids=str,
)
def test_rows_that_see_no_key_are_never_selected(options: dict[str, Any]) -> None:
    problem = make_problem(30, 24, causal="bottom-right")  # six rows see nothing
    method = sa.Informer(24, fill="cummean", **options)
    for seed in range(3):
        rows = method.select(problem, seed)
        assert len(rows) == 24
        assert rows.min() >= 6
        ahat = method.approximate(problem, seed)
        assert ahat.effective_rank == 24
        assert not (ahat @ problem.values)[:6].any()
        assert np.abs(ahat @ problem.values - problem.output).max() <= 1e-12
    empty = make_problem(key_mask=np.zeros(24, bool))
    method = sa.Informer(5, **options)
    assert method.select(empty, 0).tolist() == []
    assert not (method.approximate(empty, 0) @ empty.values).any()


# --- draws --------------------------------------------------------------------------------------


@pytest.mark.statistical
def test_keys_are_drawn_uniformly_from_those_in_sight(global_random_seed: int) -> None:
    # Level 1e-6 for each of the four: chi-squared of the counts of the keys.
    from scipy.stats import chi2

    keep = np.arange(8) != 2
    cases: list[tuple[dict[str, Any], dict[str, Any], int]] = [
        ({}, {}, 8),
        ({}, {"key_mask": keep}, 7),
        ({"preset": "corrected_causal"}, {"causal": True, "key_mask": keep}, 4),
        ({"preset": "released_causal"}, {"causal": True}, 8),
    ]
    for options, given, sight in cases:
        problem = make_problem(8, 8, **given)
        rng = np.random.default_rng(global_random_seed)
        method = sa.Informer(4, 8, **options)
        drawn = [method.draw(problem, rng)["key_samples"] for _ in range(200)]
        # Row 4 sees the keys 0, 1, 3, 4 where it is causal.
        row = np.concatenate([x[4] for x in drawn])
        counts = np.bincount(row, minlength=8)
        mean = len(row) / sight
        assert np.count_nonzero(counts) == sight
        statistic = float(((counts[counts > 0] - mean) ** 2).sum() / mean)
        assert statistic <= chi2.isf(1e-6, sight - 1)
    # Rows do not share their samples, unless they are asked to.
    problem = make_problem(50, 50)
    draw = sa.Informer(4, 8).draw(problem, global_random_seed)
    assert len(np.unique(draw["key_samples"], axis=0)) == 50
    shared = sa.Informer(4, 8, key_sampling="shared").draw(problem, global_random_seed)
    assert shared["key_samples"].shape == (8,)


def test_draws_are_saved_and_rows_are_nested(tmp_path: Path, global_random_seed: int) -> None:
    problem = make_problem(40, 40, np.float32)
    orders = [sa.Informer(r, 6).select(problem, global_random_seed).tolist() for r in (3, 9, 40)]
    assert orders[0] == orders[2][:3]
    assert orders[1] == orders[2][:9]
    method = sa.Informer(9, 6)
    draw = method.draw(problem, global_random_seed)
    full = sa.Draw(**draw, pilot_rows=method.select(problem, draw=draw))
    full.save(tmp_path / "draw.safetensors")
    loaded = sa.Draw.load(tmp_path / "draw.safetensors")
    assert sorted(loaded) == ["key_samples", "pilot_rows"]
    assert loaded["key_samples"].dtype == np.int64
    want = method.approximate(problem, global_random_seed) @ problem.values
    assert np.array_equal(method.approximate(problem, draw=loaded) @ problem.values, want)
    only = {"pilot_rows": loaded["pilot_rows"]}
    assert np.array_equal(method.approximate(problem, draw=only) @ problem.values, want)
    for kind in (np.int32, np.uint8):
        narrow = {"key_samples": draw["key_samples"].astype(kind)}
        assert np.array_equal(method.approximate(problem, draw=narrow) @ problem.values, want)


def test_heads_have_samples_of_their_own_or_one_draw_for_all(global_random_seed: int) -> None:
    one = np.random.default_rng(0).standard_normal((64, 4))
    x = np.broadcast_to(one, (2, 2, 64, 4))
    out = sa.attention(x, x, x, "informer", rank=8, samples=4, rng=global_random_seed)
    heads = out.reshape(4, 64, 4)
    # Equal samples would have probability 64^-256.
    for h in range(3):
        assert not np.array_equal(heads[h], heads[h + 1])
    method = sa.Informer(8, 4)
    draw = method.draw(sa.AttentionProblem(one, one, one), 0)
    for head in sa.attention(x, x, x, method, draw=draw).reshape(4, 64, 4):
        assert np.array_equal(head, sa.attention(one, one, one, method, rng=0))
    causal = sa.attention(x, x, x, "informer", rank=8, preset="corrected_causal", causal=True)
    assert np.abs(causal[..., 0, :] - one[0]).max() <= 1e-14


# --- refusals -----------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({"rank": 31}, {"n_q": 30}, ValueError,
     "rank must be between 1 and n_k = 24, got 31; lower rank or use method='exact'"),
    ({}, {}, TypeError, "rank must be an integer, got NoneType; give one in 1..n_k = 24"),
    ({"rank": 2, "samples": 0}, {}, ValueError,
     "samples must be at least 1, got 0; give the number of keys that a row looks at"),
    ({"rank": 2, "samples": 2.0}, {}, TypeError,
     "samples must be an integer, got float; give the number of keys that a row looks at"),
    ({"factor": 0}, {}, ValueError,
     "factor must be at least 1, got 0; 5 is the factor of the public code"),
    ({"rank": 2, "samples": 2, "factor": 5}, {}, ValueError,
     "factor must be None where rank and samples are given or not needed, got 5; "
     "drop it, or rank"),
    ({"rank": 2, "statistic": "kll"}, {}, ValueError,
     "statistic must be a known name, got 'kll'; did you mean 'kl'?"),
    ({"rank": 2, "mean_divisor": "n_key"}, {}, ValueError,
     "mean_divisor must be a known name, got 'n_key'; did you mean 'n_keys'?"),
    ({"rank": 2, "key_sampling": 3}, {}, TypeError,
     "key_sampling must be a string, got int; choose one of per_query, per_head, shared, full"),
    ({"rank": 2, "fill": "meen"}, {}, ValueError,
     "fill must be a known name, got 'meen'; did you mean 'mean'?"),
    ({"rank": 2, "scope": "every"}, {}, ValueError,
     "scope must be a known name, got 'every'; choose one of all, visible"),
    ({"rank": 2, "preset": "relesed"}, {}, ValueError,
     "preset must be a known name, got 'relesed'; did you mean 'released'?"),
    ({"rank": 2, "statistic": "oracle", "key_sampling": "shared"}, {}, ValueError,
     "key_sampling must be None for statistic 'oracle', which samples no keys, got 'shared'; "
     "drop it"),
    ({"rank": 2, "statistic": "random", "samples": 3}, {}, ValueError,
     "samples must be None for statistic 'random' with key_sampling None, which has no use for "
     "it, got 3; drop it"),
    ({"rank": 2, "key_sampling": "full", "samples": 3}, {}, ValueError,
     "samples must be None for statistic 'max_mean' with key_sampling 'full', which has no use "
     "for it, got 3; drop it"),
    ({"rank": 2, "statistic": "zero_filled", "mean_divisor": "n_keys"}, {}, ValueError,
     "mean_divisor must be None for statistic 'zero_filled' with key_sampling 'per_query', which "
     "has no use for it, got 'n_keys'; drop it"),
    ({"rank": 2, "statistic": "row_norm", "scope": "all"}, {}, ValueError,
     "scope must be None for statistic 'row_norm' with key_sampling 'full', which has no use for "
     "it, got 'all'; drop it"),
    ({"rank": 2}, {"causal": True}, ValueError,
     "causal must be False for method 'informer' with fill 'mean', got True; "
     "use preset='corrected_causal'"),
    ({"rank": 2, "fill": "cumsum"}, {}, ValueError,
     "fill must be 'mean' or 'masked_mean' for a problem that is not causal, got 'cumsum'; "
     "running sums follow a causal mask"),
    ({"rank": 2, "fill": "cumsum"}, {"causal": True, "key_mask": MASK}, ValueError,
     "fill must be 'cummean' with a key_mask or n_q != n_k, got 'cumsum'; the released code has "
     "neither"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "given", "error", "text"), WRONG)
def test_parameters_that_do_not_fit_are_refused(
    options: dict[str, Any], given: dict[str, Any], error: type[Exception], text: str
) -> None:
    problem = make_problem(**given)
    method = sa.Informer(**options)
    for call in (method.draw, method.approximate, method.select, method.budget):
        with pytest.raises(error, match=message(text)):
            call(problem)


SAMPLES = np.zeros((24, 3), np.int64)
DRAWS: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({"key_samples": SAMPLES + 0.5}, {}, TypeError,
     "key_samples must hold integers, got float64; give indices of keys"),
    ({"key_samples": SAMPLES[:5]}, {}, ValueError,
     "key_samples must have shape (24, 3), got (5, 3); give U keys for each row"),
    ({"key_samples": SAMPLES[0]}, {}, ValueError,
     "key_samples must have shape (24, 3), got (3,); give U keys for each row"),
    ({"key_samples": SAMPLES[:, :2]}, {}, ValueError,
     "key_samples must have shape (24, 3), got (24, 2); change samples or the draw"),
    ({"key_samples": SAMPLES}, {"key_sampling": "shared"}, ValueError,
     "key_samples must have shape (3,), got (24, 3); give U keys for all rows"),
    ({"key_samples": SAMPLES - 1}, {}, ValueError,
     "key_samples must be in 0..n_k - 1 = 23, got -1; give indices of keys"),
    ({"key_samples": SAMPLES + 24}, {}, ValueError,
     "key_samples must be in 0..n_k - 1 = 23, got 24; give indices of keys"),
    ({"key_samples": SAMPLES + 5}, {}, ValueError,
     "key_samples must not be masked, got key 5; draw from the 18 keys that are not masked"),
    ({"pilot_rows": np.array([0.0, 1.0])}, {}, TypeError,
     "pilot_rows must be a one-dimensional integer array, got float64 of shape (2,); "
     "give indices of queries"),
    ({"pilot_rows": np.array([3, 3, 4])}, {}, ValueError,
     "pilot_rows must be distinct, got 1 repeated; give each once"),
    ({"pilot_rows": np.array([3, 24])}, {}, ValueError,
     "pilot_rows must be in 0..n_q - 1 = 23, got 24; give indices of queries"),
    ({"pilot_rows": np.array([-1, 4])}, {}, ValueError,
     "pilot_rows must be in 0..n_q - 1 = 23, got -1; give indices of queries"),
    ({"pilot_rows": np.arange(5)}, {}, ValueError,
     "pilot_rows must hold at most 4 rows for rank = 4, got 5; change rank or the draw"),
    ({"pilot_rows": np.arange(3), "other": SAMPLES}, {}, ValueError,
     "draw must hold the arrays ['pilot_rows'], got ['other', 'pilot_rows']; "
     "use method.draw(problem, rng)"),
]  # fmt: skip


@pytest.mark.parametrize(("draw", "options", "error", "text"), DRAWS)
def test_draws_that_do_not_fit_are_refused(
    draw: dict[str, Array], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    problem = make_problem(key_mask=MASK)
    method = sa.Informer(4, 3, **options)
    for call in (method.approximate, method.select, method.attend):
        with pytest.raises(error, match=message(text)):
            call(problem, draw=draw)


def test_samples_that_a_row_does_not_see_are_refused() -> None:
    problem = make_problem(causal=True)
    samples = np.minimum(SAMPLES + 2, np.arange(24)[:, None])
    samples[4, 1] = 9
    text = (
        "key_samples must be keys that their row sees, got key 9 in row 4, which sees keys up to "
        "4; draw for a causal problem, or use scope='all'"
    )
    method = sa.Informer(4, 3, preset="corrected_causal")
    with pytest.raises(ValueError, match=message(text)):
        method.approximate(problem, draw={"key_samples": samples})
    with pytest.raises(ValueError, match=message(text)):
        sa.row_statistic(problem, key_samples=samples)
    released = sa.Informer(4, 3, preset="released_causal")
    assert released.approximate(problem, draw={"key_samples": samples}).effective_rank == 4
    blind = make_problem(30, 24, causal="bottom-right")
    text = "pilot_rows must be rows that see a key, got 2; its output is zero"
    with pytest.raises(ValueError, match=message(text)):
        method.approximate(blind, draw={"pilot_rows": np.array([2, 9])})


def test_arguments_of_the_functions_are_refused() -> None:
    problem = make_problem()
    wrong: Any = np.eye(3)
    text = (
        "problem must be an AttentionProblem, got ndarray; "
        "make one with sketchattn.AttentionProblem(q, k, v)"
    )
    for call in (
        lambda: lazy_errors(wrong),
        lambda: sa.selection_regret(wrong, [0]),
        lambda: sa.row_statistic(wrong),
        lambda: sa.Informer(1).check(wrong),
    ):
        with pytest.raises(TypeError, match=message(text)):
            call()
    text = "rows must be distinct, got 1 repeated; give each once"
    with pytest.raises(ValueError, match=message(text)):
        sa.selection_regret(problem, [1, 1])
    text = "v must be given for an output, got None; make the problem with its values"
    bare = sa.AttentionProblem(problem.q, problem.k)
    with pytest.raises(ValueError, match=message(text)):
        sa.selection_regret(bare, [1])
    with pytest.raises(ValueError, match=message(text)):
        sa.Informer(2, statistic="oracle").approximate(bare)
    text = (
        "key_samples must be None for statistic 'oracle', which is about whole rows, got an "
        "array; drop it"
    )
    with pytest.raises(ValueError, match=message(text)):
        sa.row_statistic(problem, "oracle", key_samples=SAMPLES)
    text = "fill must end where a row's sight ends for a causal problem, got 'mean'; use 'cummean'"
    with pytest.raises(ValueError, match=message(text)):
        lazy_errors(make_problem(causal=True), fill="mean")
    huge = sa.AttentionProblem(np.full((2, 2), 1e200), np.full((2, 2), 1e200))
    text = (
        "scale * q @ k.T must be finite in float64, got an overflow in row 0; "
        "make scale, q or k smaller"
    )
    for samples in (None, np.zeros((2, 1), np.int64)):
        with pytest.raises(ValueError, match=message(text)):
            sa.row_statistic(huge, key_samples=samples)


def test_traits_follow_the_choices() -> None:
    plain = sa.Informer(3).traits
    assert (plain.causal, plain.key_mask, plain.rectangular) == (False, True, True)
    assert (plain.randomized, plain.row_stochastic, plain.oracle) == (True, True, False)
    released = sa.Informer(3, preset="released_causal").traits
    assert (released.causal, released.key_mask, released.rectangular) == (True, False, False)
    assert sa.Informer(3, preset="corrected_causal").traits.causal
    oracle = sa.Informer(3, statistic="oracle").traits
    assert (oracle.oracle, oracle.causal, oracle.randomized) == (True, False, False)
    assert sa.Informer(3, statistic="random").traits.randomized
    assert not sa.Informer(3, key_sampling="full").traits.randomized
    for preset in PRESETS:
        problem = make_problem(causal="causal" in preset)
        assert sa.Informer(preset=preset).approximate(problem, 0).effective_rank == 20
    # A parameter given beside a preset replaces its choice.
    assert sa.Informer(3, preset="released", fill="masked_mean").choices.fill == "masked_mean"
    assert sa.Informer(3, preset="released").choices.mean_divisor == "n_keys"
    assert sa.Informer(3, mean_divisor="n_samples", preset="released").choices == (
        sa.Informer(3).choices
    )


# --- kernels ------------------------------------------------------------------------------------


@pytest.mark.threads
def test_kernels_do_not_depend_on_the_number_of_threads() -> None:
    rng = np.random.default_rng(0)
    heads, group, n, u = 4, 2, 150, 40
    for dtype in (np.float32, np.float64):
        q = rng.standard_normal((heads, n, 5)).astype(dtype)
        k = rng.standard_normal((heads // group, n, 5)).astype(dtype)
        wide = k.astype(np.float64)
        samples = rng.integers(0, n, (heads, n, u))
        last = np.arange(n)
        own, shared = (np.empty((4, heads, n, 4)) for _ in range(2))
        for t in range(4):
            with limit_threads(t + 1):
                one, both = (q, k, group, 0.5, samples, last), (q, wide, group, 0.5, last + 1)
                deal(probsparse._sampled, *one, True, 32, own[t], work=1e9)
                deal(probsparse._shared, *both, True, 32, 64, shared[t], work=1e9)
        for out in (own, shared):
            assert all(np.array_equal(x, out[0]) for x in out[1:])
        # Heads in one call are the heads alone; one sample may serve all of them.
        for h in range(heads):
            part, keys = slice(h, h + 1), slice(h // group, h // group + 1)
            alone = probsparse.sampled_statistics(q[part], k[keys], samples[part], last, scale=0.5)
            assert np.array_equal(alone[0], own[0, h])
            alone = probsparse.shared_statistics(q[part], wide[keys], last + 1, scale=0.5)
            # A product of another tile may add in another order: sums of 150 terms below 10.
            assert np.abs(alone[0] - shared[0, h]).max() <= 1e-11
        common = probsparse.sampled_statistics(q, k, samples[:1], last, scale=0.5, group=group)
        assert np.array_equal(common[0], own[0, 0])


def test_kernels_are_their_formula() -> None:
    rng = np.random.default_rng(1)
    n_q, n_k, u, d = 70, 1100, 30, 6
    for dtype in (np.float32, np.float64):
        q, k = (rng.standard_normal((1, n, d)).astype(dtype) for n in (n_q, n_k))
        samples = rng.integers(0, n_k, (1, n_q, u))
        last = rng.integers(-1, n_k, n_q)
        last[:2] = -1, n_k
        logits = 3.0 * q[0].astype(np.float64) @ k[0].astype(np.float64).T
        sampled = probsparse.sampled_statistics(q, k, samples, last, scale=3.0)[0]
        seen = np.clip(last + 1, 0, n_k)
        keys = k.astype(np.float64)
        shared = probsparse.shared_statistics(q, keys, seen, scale=3.0)[0]
        for i in range(n_q):
            picked = samples[0, i][samples[0, i] <= last[i]]
            for got, terms in ((sampled[i], logits[i, picked]), (shared[i], logits[i, : seen[i]])):
                if len(terms) == 0:
                    assert got.tolist() == [-np.inf, 0, -np.inf, 0]
                    continue
                top = terms.max()
                lse = top + math.log(np.exp(terms - top).sum())
                # Sums of up to n_k terms below 60.
                assert np.abs(got - (top, terms.sum(), lse, len(terms))).max() <= 1e-10
        without = probsparse.sampled_statistics(q, k, samples, last, scale=3.0, exponentials=False)[
            0
        ]
        assert np.array_equal(without[:, [0, 1, 3]], sampled[:, [0, 1, 3]])
        assert (without[:, 2] == -np.inf).all()
    for driver in (probsparse._sampled, probsparse._shared):
        assert len(getattr(driver, "signatures", [None])) <= 2  # one a precision


def test_sampled_keys_are_not_gathered() -> None:
    n, u, d = 1024, 64, 64
    problem = make_problem(n, n, np.float32, d=d)
    method = sa.Informer(16, u)
    method.approximate(problem, 0)
    tracemalloc.start()
    try:
        method.approximate(problem, 0) @ problem.values
        peak = tracemalloc.get_traced_memory()[1]
        assert problem.k[method.draw(problem, 0)["key_samples"]].nbytes == 4 * n * u * d
        gathered = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The draw itself, and three outputs: the rows, their mean, and what a product returns.
    assert peak <= 8 * n * u + 3 * 4 * n * d < 4 * n * u * d / 8
    assert gathered >= 4 * n * u * d  # what is measured would show it


def test_close_rows_are_ranked_in_float64() -> None:
    # Two rows whose statistics differ by 1e-9 of their size, below the resolution of float32.
    n = 40
    rng = np.random.default_rng(0)
    k = rng.standard_normal((n, 2)).astype(np.float32)
    q = np.array([[1, 1e-8], [1, 0], [1, -1e-8]], np.float32)
    problem = sa.AttentionProblem(q, k, k)
    for sampling in ("full", "shared"):
        method = sa.Informer(3, key_sampling=sampling)
        draw = method.draw(problem, 0)
        chosen = draw.get("key_samples")
        keys = k if chosen is None else k[chosen]
        logits = q.astype(np.float64) @ keys.T.astype(np.float64)
        want = np.argsort(-(logits.max(axis=1) - logits.mean(axis=1)), kind="stable")
        assert method.select(problem, draw=draw).tolist() == want.tolist()
        assert len(np.unique(logits.astype(np.float32).max(axis=1))) == 1


def test_small_heads_of_a_call_share_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[int] = []
    statistics = probsparse.sampled_statistics

    def counted(q: Array, *args: Any, **kwargs: Any) -> Any:
        heads.append(len(q))
        return statistics(q, *args, **kwargs)

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, 40, 4)) for _ in range(3))
    keep = np.arange(40) < np.array([[40], [25]])
    method = sa.Informer(rank=8, samples=5)
    monkeypatch.setattr(probsparse, "sampled_statistics", counted)
    out = sa.attention(q, k, v, method, rng=3, key_mask=keep)
    assert heads == [6]
    monkeypatch.setattr(sa.Informer, "_attend_heads", sa.Method._attend_heads)
    assert np.array_equal(out, sa.attention(q, k, v, method, rng=3, key_mask=keep))


@pytest.mark.parametrize("statistic", ["max_mean", "zero_filled", "kl"])
def test_rows_that_are_reduced_while_others_draw_are_those_of_the_draw(statistic: str) -> None:
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((3, 1500, 8)).astype(np.float32) for _ in range(3))
    method = sa.Informer(rank=100, statistic=statistic)
    assert 2 * DRAWN_ENTRIES < 1500 * 100
    for keep in (None, np.arange(1500) % 7 != 2):
        first = sa.AttentionProblem(q[0], k[0], v[0], key_mask=keep)
        mine, theirs = np.random.default_rng(2), np.random.default_rng(2)
        draw = method.draw(first, theirs)
        for threads in (1, 2, 3):
            with limit_threads(threads):
                out = method.attend(first, rng=2)
            assert np.array_equal(out, method.attend(first, draw=draw))
        # The stream is left where the draw leaves it.
        assert np.array_equal(method.attend(first, mine), method.attend(first, draw=draw))
        assert mine.bit_generator.state == theirs.bit_generator.state
        heads = [sa.AttentionProblem(*x, key_mask=keep) for x in zip(q, k, v, strict=True)]
        many = method.attend_heads(heads, [2, 3, 4])
        alone = [method.attend(x, seed) for x, seed in zip(heads, (2, 3, 4), strict=True)]
        assert np.array_equal(many, np.stack(alone))
