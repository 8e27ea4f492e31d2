from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from claim_cases import (
    check_statuses,
    claims_of,
    recorded_pairs,
)
from numpy.typing import NDArray
from scipy.stats import binom

import sketchattn as sa
from sketchattn.theory.engine.checking import check, default_factory
from sketchattn.theory.engine.instances import instances, spiked_attention
from sketchattn.theory.linformer.formulas import (
    constant_value_invariance,
    linformer_thm1_failure,
    linformer_thm1_k,
    linformer_thm2_construction,
    linformer_thm2_k,
    pooling_bound,
    regime_flags,
    spectrum,
    unreduced_vs_reduced_gap,
)
from sketchattn.theory.softmax.formulas import perturbation_bound

Array = NDArray[Any]
CLAIMS = claims_of("linformer")
RECORDED = recorded_pairs(CLAIMS)


def scaled(kind: str, r: int, n: int, rng: np.random.Generator, **parameters: Any) -> Any:
    return 1.1 * default_factory(kind, r, n, rng, **parameters).to_dense()


def repeated(kind: str, r: int, n: int, rng: np.random.Generator, **parameters: Any) -> Any:
    return default_factory(kind, r, n, np.random.default_rng(0), **parameters)


# --- the record -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize(("name", "problem"), RECORDED)
def test_recorded_verdicts(name: str, problem: str, global_random_seed: int) -> None:
    # Means alarm at |z| > 5; tails are decided far from their limits.
    verdict = check(name, problem, rng=global_random_seed)
    assert verdict.status == CLAIMS[name].recorded[problem], str(verdict)


def test_claims_of_the_method_exist() -> None:
    for name in sa.Linformer(1).traits.claims:
        assert name in CLAIMS
    assert {c.status for c in CLAIMS.values()} == {"published", "derived", "refuted"}
    check_statuses(CLAIMS)


RANDOM = ["lemma1", "thm1", "thm2", "thm2_collapse", "additive", "mean_square", "oracle"]


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("broken", [scaled, repeated])
def test_broken_projections_are_reported(name: str, broken: Any) -> None:
    # A factor 1.1 moves |S w|^2 by 21 %; 200 trials of 5 probes know it to 1 %.
    problem = "uniform-ones" if name in ("lemma1", "thm1", "thm2") else "clusters"
    verdict = check(f"linformer.{name}", problem, sketch=broken, trials=200)
    assert verdict.status == "violated"
    assert "the draws are not those of the claim" in verdict.notes


# --- tables -------------------------------------------------------------------------------------


def test_tables() -> None:
    lengths = [512, 1024, 4096, 16384, 65536]
    table = {
        2 / 3: [211, 234, 281, 328, 375],
        0.5: [250, 278, 333, 389, 444],
        0.3: [496, 551, 661, 771, 881],
        0.1: [3466, 3851, 4621, 5392, 6162],
    }
    for eps, want in table.items():
        assert np.asarray(linformer_thm1_k(lengths, eps)).tolist() == want
    assert linformer_thm2_k(512, 64, 0.5) == 125
    assert linformer_thm2_k(4096, 64, 0.5) == 167
    for n, success in ((512, 0.5856), (1024, 0.6545), (4096, 0.7523), (65536, 0.8765)):
        r = linformer_thm1_k(n, 0.5)
        assert abs(1 - float(linformer_thm1_failure(n, 0.5, r)) - success) < 5e-5
    calls: tuple[Callable[[], object], ...] = (
        lambda: linformer_thm1_k(512, 1.0),
        lambda: linformer_thm2_k(512, 64, 1.5),
        lambda: linformer_thm2_k(512, 1, 0.5),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"^(eps|d) must be"):
            call()


def test_wrong_bounds_and_projections_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims about formulas and the library's own projections: constants, and blocks."""
    from sketchattn.theory.linformer import projection_claims

    pooled, perturbed = pooling_bound, perturbation_bound
    for name, attribute, wrong in (
        ("pooling", "pooling_bound", lambda *x: tuple(1e-2 * y for y in pooled(*x))),
        ("perturbation", "perturbation_bound", lambda x: 0.6 * perturbed(x)),
        (
            "constant_values",
            "Linformer",
            lambda rank, how: sa.Linformer(rank, "given", E=np.full((rank, 256), 1 / 128)),
        ),
    ):
        on = CLAIMS[f"linformer.{name}"].instances[0]
        assert check(f"linformer.{name}", on, trials=20).status == "holds"
        with monkeypatch.context() as patch:
            patch.setattr(projection_claims, attribute, wrong)
            assert check(f"linformer.{name}", on, trials=20).status == "violated", name


# --- Theorem 1 --------------------------------------------------------------------------------


def test_c1_no_error_may_be_made_and_one_always_is() -> None:
    seen = instances()["uniform-difference"]
    assert not seen.product.any()
    for seed in range(50):
        s = np.random.default_rng(seed).standard_normal((250, 512)) / math.sqrt(250)
        assert np.linalg.norm(seen.a @ s.T @ (s @ seen.v)) > 0
    verdict = check("linformer.thm1", "uniform-difference", trials=60)
    assert verdict.failures == 60
    assert verdict.status == "violated"


@pytest.mark.statistical
def test_c2_has_the_success_rate_and_the_error_that_theory_gives(global_random_seed: int) -> None:
    verdict = check("linformer.thm1", "uniform-spike", rng=global_random_seed)
    assert verdict.rank == 250
    assert verdict.status == "violated"
    assert verdict.interval is not None
    assert verdict.interval[0] > 0.4144
    assert verdict.failures is not None
    success, p = 200 - verdict.failures, 0.2737
    assert abs(success - 200 * p) <= 5 * math.sqrt(200 * p * (1 - p))
    # RMS sqrt((n+1)/r), |z| <= 5 over 4000 trials of (u - 1) + cross term, from two sums.
    rng = np.random.default_rng(global_random_seed)
    s = rng.standard_normal((4000, 250)) / math.sqrt(250)
    rest = rng.standard_normal((4000, 250)) * math.sqrt(511 / 250)
    squares = (np.sum(s * (s + rest), axis=1) - 1) ** 2
    z = (squares.mean() - 513 / 250) / (squares.std(ddof=1) / math.sqrt(4000))
    assert abs(z) <= 5


def test_c3_and_c4_no_matrix_of_low_rank_serves_all_vectors() -> None:
    n, r = 512, 250
    # Any projection of rank r leaves sqrt(1 - r/n) of some unit vector.
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((n, r)))[0]
    left = np.linalg.norm(np.eye(n) - basis @ basis.T, axis=0)
    assert left.max() >= math.sqrt(1 - r / n) > 0.7153 - 1e-4
    verdict = check("linformer.thm1_fixed", "identity", rank=r)
    assert abs(verdict.observed - 1) < 1e-10
    assert verdict.status == "violated"


# --- Theorem 2 --------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("mode", ["1/n", "2^-n", 0.5])
def test_c5_outputs_are_noise(mode: str | float, global_random_seed: int) -> None:
    verdict = check("linformer.thm2", "uniform-ones", rng=global_random_seed, delta_mode=mode)
    assert verdict.status == "violated"
    # P(success) = Phi((1+eps)/s) - Phi((1-eps)/s), at most 1e-7 here: one success has 2e-5.
    assert verdict.failures is not None
    assert verdict.failures >= 200 - binom.isf(1e-6, 200, 1e-7)
    problem = instances()["uniform-ones"].problem
    assert problem is not None
    delta = {"1/n": 1 / 512, "2^-n": 0.0}.get(str(mode), 0.5)
    rng = np.random.default_rng(global_random_seed)
    short = sa.AttentionProblem(problem.q[:1], problem.k, problem.values)
    outputs = np.array(
        [
            float((linformer_thm2_construction(short, 250, mode, rng) @ short.values)[0, 0])
            for _ in range(100)
        ]
    )
    variance = 512 / 250**2 * math.exp(-2 * delta)
    assert abs(outputs.mean()) <= 5 * math.sqrt(variance / 100)
    # Of normal numbers the variance has the relative deviation sqrt(2/99).
    assert abs(outputs.var(ddof=1) / variance - 1) <= 5 * math.sqrt(2 / 99)


def test_c6_rows_collapse_in_proportion_to_delta() -> None:
    rng = np.random.default_rng(0)
    problem = sa.AttentionProblem(*rng.standard_normal((3, 64, 8)))
    spread = {}
    for delta in (0.1, 1e-3, 1e-6):
        assert check("linformer.thm2_collapse", problem, step=delta, trials=20).status == "holds"
        out = linformer_thm2_construction(problem, 16, delta, rng=1) @ problem.values
        spread[delta] = np.linalg.norm(out - out.mean(axis=0))
    assert abs(spread[1e-3] / spread[1e-6] / 1e3 - 1) < 0.05


# --- what is true -------------------------------------------------------------------------------


def test_perturbation_bound_is_tight() -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((20000, 6))
    change = rng.standard_normal((20000, 6)) * rng.uniform(0, 3, (20000, 1))
    p, q = np.exp(logits), np.exp(logits + change)
    p /= p.sum(axis=1, keepdims=True)
    q /= q.sum(axis=1, keepdims=True)
    bound = np.asarray(perturbation_bound(np.ptp(change, axis=1)))
    assert (np.abs(p - q).sum(axis=1) <= bound * (1 + 1e-9) + 1e-14).all()
    for width in (0.1, 1.0, 5.0):
        t = 1 / (1 + math.exp(width / 2))
        moved = t * math.exp(width) / (1 - t + t * math.exp(width))
        assert 0.99 < 2 * (moved - t) / float(perturbation_bound(width)) <= 1 + 1e-9


def test_pooling_bound_on_every_row() -> None:
    rng = np.random.default_rng(1)
    for noise in (0.0, 0.05, 0.5):
        k = np.repeat(rng.standard_normal((8, 6)), 4, axis=0)
        k += noise * rng.standard_normal((32, 6))
        problem = sa.AttentionProblem(rng.standard_normal((20, 6)), k, rng.standard_normal((32, 5)))
        rows, outputs = pooling_bound(problem, 8)
        ahat = sa.Linformer(8, "mean_pool").approximate(problem)
        moved = np.abs(ahat.to_dense() - problem.exact.to_dense()).sum(axis=1)
        assert (moved <= rows + 1e-12).all()
        error = np.linalg.norm(ahat @ problem.values - problem.output, axis=1)
        assert (error <= outputs + 1e-12).all()
    with pytest.raises(ValueError, match="^problem must be neither causal nor masked"):
        pooling_bound(sa.AttentionProblem(k, k, key_mask=np.ones(32, bool)), 8)


@pytest.mark.statistical
def test_unreduced_form_on_random_and_spiked_attention(global_random_seed: int) -> None:
    rng = np.random.default_rng(0)
    values = np.cos(0.7 * np.outer(np.arange(1.0, 257), np.arange(1.0, 3)))
    problems = [
        (spiked_attention(256, 5.0), values),
        sa.AttentionProblem(*rng.standard_normal((3, 256, 2))),
    ]
    for problem in problems:
        assert check("linformer.additive", problem, rng=global_random_seed).status != "violated"
        verdict = check("linformer.mean_square", problem, rng=global_random_seed, trials=400)
        assert verdict.z is not None
        assert abs(verdict.z) <= 5


# --- records ------------------------------------------------------------------------------------


def test_spectrum_regime_and_gap() -> None:
    curves = spectrum(spiked_attention(64, 5.0))
    assert abs(curves.sigma[1] - 0.697275) < 1e-6
    s = curves.sigma[1]
    assert abs(curves.energy[0] - 1 / (1 + 63 * s * s)) < 1e-12
    assert abs(curves.values[0] - 1 / (1 + 63 * s)) < 1e-12
    with pytest.raises(ValueError, match="^A must not be zero"):
        spectrum(np.zeros((3, 3)))

    q, k, v = np.random.default_rng(0).standard_normal((3, 64, 4))
    problem = sa.AttentionProblem(q, k, v)
    flags = regime_flags(problem)
    largest = max(np.abs(q).max(), np.abs(k).max())
    assert abs(flags.hardness - math.sqrt(2) * largest / math.sqrt(math.log(64))) < 1e-12
    assert flags.hard
    assert not regime_flags(sa.AttentionProblem(q / 100, k / 100, v)).hard
    exact = problem.exact.to_dense()
    assert abs(flags.stable_rank - (np.linalg.norm(exact) / np.linalg.norm(exact, 2)) ** 2) < 1e-9

    gap = unreduced_vs_reduced_gap(problem, 16, rng=0)
    assert gap.oracle <= gap.reduced
    s_matrix = np.random.default_rng(0).standard_normal((16, 64)) / 4
    error = exact @ s_matrix.T @ (s_matrix @ v) - problem.output
    assert abs(gap.unreduced - np.linalg.norm(error) / np.linalg.norm(problem.output)) < 1e-12


def test_constant_value_invariance() -> None:
    assert constant_value_invariance(np.full((2, 4), 0.25)) == 0.0
    assert constant_value_invariance(np.full((2, 4), 0.5)) == 1.0
