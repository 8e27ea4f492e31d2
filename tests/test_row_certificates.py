"""Certificates of rows: formulas against brute force, truth below them, nothing of size n x n."""

from __future__ import annotations

import math
import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.errors import rows as row_certificates
from sketchattn.errors.rows import KINDS, _log_mass, certify_rows, gap_bound, mass_aware_bound
from sketchattn.operators.partitioned.summaries import Reference, Rule
from sketchattn.partitions.patterns import make_plan
from sketchattn.partitions.ragged import Ragged
from sketchattn.theory.combiner.cases import ExtremalRow, extremal_row

Array = NDArray[Any]


def published(w: Array, lo: Array, hi: Array) -> Array:
    """Write ``B(w; lo, hi)`` as it is stated, without care for overflow or cancellation."""
    a, t = np.exp(-lo), np.exp(hi)
    c = 1 - w + w * t
    w1 = np.clip((c - np.sqrt(a * c)) / (t - a), 0, w)
    c2 = 1 - w + w * a
    w2 = np.clip((np.sqrt(t * c2) - c2) / (t - a), 0, w)
    found: Array = np.maximum(w1 - w1 * a / (c - w1 * (t - a)), w2 * t / (c2 + w2 * (t - a)) - w2)
    return found


def tilted(p: Array, eta: Array) -> Array:
    """Return rows proportional to ``p exp(eta)``."""
    out = p * np.exp(eta)
    return np.asarray(out / out.sum(axis=-1, keepdims=True))


# --- formulas -------------------------------------------------------------------------------------


def test_mass_aware_bound_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    w, lo, hi = rng.random(5000), rng.exponential(2, 5000), rng.exponential(2, 5000)
    found = np.asarray(mass_aware_bound(w, lo, hi))
    # The formula as it is stated loses digits where lo + hi is small: eps over that.
    assert np.abs(found - published(w, lo, hi)).max() < 1e-13 / (lo + hi).min()
    assert (found <= np.tanh((lo + hi) / 4) + 1e-15).all()
    assert mass_aware_bound(0.3, 1.0, 0.0) == pytest.approx(0.163810, abs=5e-7)
    # Delta = 1: (.377541, .622459) moves to (.622459, .377541).
    assert mass_aware_bound(1.0, 0.5, 0.5) == pytest.approx(0.244919, abs=5e-7)
    assert mass_aware_bound(1.0, 0.1, 0.9) == pytest.approx(math.tanh(0.25), rel=1e-14)


@pytest.mark.parametrize(
    ("w", "lo", "hi", "want"),
    [
        (0.0, 3.0, 2.0, 0.0),
        (0.0, math.inf, math.inf, 0.0),
        (0.4, 0.0, 0.0, 0.0),
        (1.0, math.inf, math.inf, 1.0),
        (0.3, math.inf, 0.0, 0.3),  # all of the mass goes
        (0.3, 0.0, math.inf, 1.0),  # a single key takes all
        (1.0, 800.0, 800.0, 1.0),
        (1.0, 1e-13, 0.0, 2.5e-14),
    ],
)
def test_mass_aware_bound_at_the_ends(w: float, lo: float, hi: float, want: float) -> None:
    assert mass_aware_bound(w, lo, hi) == pytest.approx(want, rel=1e-12)


def test_mass_aware_bound_is_small_where_ranges_are() -> None:
    # tanh((lo + hi)/4) to first order, for a mass that attains it.
    for width in (1e-3, 1e-6, 1e-9, 1e-11):
        found = mass_aware_bound(1.0, width / 2, width / 2)
        assert found == pytest.approx(math.tanh(width / 4), rel=1e-5)


def test_a_mass_that_underflows_is_not_nothing() -> None:
    # e^-900 of the row, tilted by e^1000, is all of it.
    assert mass_aware_bound(-900.0, 0.0, 1000.0, log=True) == pytest.approx(1.0)
    assert mass_aware_bound(-1000.0, 0.0, 900.0, log=True) < 1e-20
    assert mass_aware_bound(math.log(0.3), 1.0, 0.0, log=True) == mass_aware_bound(0.3, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"-ln w must be in \[0, inf\], got -0.5"):
        mass_aware_bound(0.5, 1.0, 1.0, log=True)


def test_no_row_exceeds_the_mass_aware_bound() -> None:
    rng = np.random.default_rng(1)
    n = 20_000
    p = rng.dirichlet(np.full(6, 0.5), n)
    far = rng.random((n, 6)) < 0.5
    eta = np.where(far, rng.uniform(-1, 1, (n, 6)) * rng.exponential(2, (n, 1)), 0.0)
    lo, hi = np.maximum(-eta.min(axis=1), 0), np.maximum(eta.max(axis=1), 0)
    q = tilted(p, eta)
    tv = np.abs(p - q).sum(axis=1) / 2
    before = np.minimum((p * far).sum(axis=1), 1.0)
    after = np.minimum((q * far).sum(axis=1), 1.0)
    assert (tv <= np.asarray(mass_aware_bound(before, lo, hi)) + 1e-12).all()
    assert (tv <= np.asarray(mass_aware_bound(after, hi, lo)) + 1e-12).all()


@pytest.mark.parametrize(("w", "lo", "hi"), [(0.3, 1.0, 0.0), (0.3, 0.0, 1.0), (0.5, 0.4, 1.2)])
def test_the_mass_aware_bound_is_attained(w: float, lo: float, hi: float) -> None:
    # The best event of a fine grid: a mass x of the set at hi and the rest at -lo.
    x = np.linspace(0, w, 20_001)
    p = np.stack([x, w - x, np.full_like(x, 1 - w)], axis=1)
    tv = np.abs(p - tilted(p, np.array([hi, -lo, 0.0]))).sum(axis=1) / 2
    bound = float(np.asarray(mass_aware_bound(w, lo, hi)))
    assert bound * (1 - 1e-6) <= tv.max() <= bound * (1 + 1e-12)
    assert tv.max() > 0.99 * bound  # a bound that is 1 % smaller is false


@pytest.mark.parametrize(
    ("share", "with_direct", "posterior"), [(0.55, True, False), (0.5, False, True)]
)
def test_extremal_rows(share: float, with_direct: bool, posterior: bool) -> None:
    row = extremal_row(1.0, share, with_direct=with_direct, posterior=posterior)
    p = tilted(np.exp(row.logits), np.zeros(3))
    lo, hi = share, 1 - share
    tv = np.abs(p - tilted(p, np.array([0.0, hi, -lo]))).sum() / 2
    assert tv == pytest.approx(mass_aware_bound(row.mass, row.low, row.high), rel=1e-12)
    assert tv < 0.9 * math.tanh(0.25)


@pytest.mark.parametrize("posterior", [False, True])
@pytest.mark.parametrize("width", [0.1, 0.5, 1.0, 20.0])
def test_extremal_rows_attain_the_bound_or_say_so(width: float, posterior: bool) -> None:
    limit = 1 / (1 + math.exp(-width / 2))

    def row(share: float, with_direct: bool = not posterior) -> ExtremalRow:
        return extremal_row(width, share, with_direct=with_direct, posterior=posterior)

    share = limit - 1e-2 * (1 - limit)
    made = row(share)
    p = tilted(np.exp(made.logits), np.zeros(3))
    tv = np.abs(p - tilted(p, np.array([0.0, (1 - share) * width, -share * width]))).sum() / 2
    # exp(width) loses that much of the digits of the mass, which the best event forgives.
    assert tv == pytest.approx(mass_aware_bound(made.mass, made.low, made.high), rel=1e-6)
    need = re.escape(f"share must be below {limit:.6g} for width = {width:g}, with one of ")
    with pytest.raises(ValueError, match=f"^{need}.* got share = .*makes the event the best one$"):
        row(0.5 + 0.5 * limit)
    with pytest.raises(ValueError, match=f"^{need}"):
        row(share, with_direct=posterior)
    need = re.escape(f" {limit:.6g} for width = {width:g}, ")
    with pytest.raises(ValueError, match=f"^share must be (near|below){need}.*(; raise|best) "):
        row(0.01)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2.0, math.nan])
def test_a_share_is_inside_the_unit_interval(share: float) -> None:
    wrong = f"share must be in (0, 1), got {share:g}; change share"
    with pytest.raises(ValueError, match=f"^{re.escape(wrong)}$"):
        extremal_row(1.0, share)


@pytest.mark.parametrize("width", [0.0, -1.0, 20.5, 600.0, math.inf, math.nan])
def test_a_width_keeps_the_digits_of_the_mass(width: float) -> None:
    wrong = f"width must be in (0, 20], got {width:g}; change width"
    with pytest.raises(ValueError, match=f"^{re.escape(wrong)}$"):
        extremal_row(width, 0.5, with_direct=True)


def bennett(b: Array, v: Array) -> Array:
    return np.asarray(np.log1p(v / b**2 * (np.expm1(b) - b)))


def test_gap_bound_is_below_hoeffding_and_bennett_and_above_every_law() -> None:
    rng = np.random.default_rng(2)
    n = 10_000
    lam = rng.dirichlet(np.full(4, 0.7), n)
    eta = rng.standard_normal((n, 4)) * rng.exponential(1.5, (n, 1))
    eta -= (lam * eta).sum(axis=1, keepdims=True)
    gap = np.log((lam * np.exp(-eta)).sum(axis=1))
    low, high = -eta.min(axis=1), eta.max(axis=1)
    variance = (lam * eta**2).sum(axis=1)
    by_range = np.asarray(gap_bound(low, high))
    by_both = np.asarray(gap_bound(low, high, variance))
    slack = 1e-12 * (1 + low + high)
    assert (gap <= by_both + slack).all()
    assert (by_both <= by_range + slack).all()
    assert (by_range <= (low + high) ** 2 / 8 + slack).all()
    assert (by_both <= bennett(low, variance) + slack).all()
    assert (by_both <= low + slack).all()


@pytest.mark.parametrize(("b", "v"), [(1.0, 0.3), (0.2, 0.01), (3.0, 5.0), (40.0, 2.0)])
def test_the_gap_bound_is_attained_by_two_points(b: float, v: float) -> None:
    p = v / (b**2 + v)  # of -eta = b, the other point is -v/b
    gap = float(np.logaddexp(math.log(p) + b, math.log1p(-p) - v / b))
    assert gap_bound(b, v / b, v) == pytest.approx(gap, rel=1e-12)
    assert gap > 0.99 * float(np.asarray(gap_bound(b, v / b, v)))


def test_gap_bound_at_the_ends() -> None:
    assert gap_bound(0.0, 5.0) == gap_bound(5.0, 0.0) == gap_bound(0.0, math.inf) == 0.0
    assert gap_bound(1e3, 1e3) == pytest.approx(1e3 - math.log(2), rel=1e-12)
    for b in (2e-6, 1e-6, 9e-7, 1e-9):
        # v/2 to first order in b, and never below E exp(-eta) = cosh b of two points.
        assert float(np.asarray(gap_bound(b, b))) == pytest.approx(b**2 / 2, rel=2 * b + 1e-9)


def test_formulas_refuse_what_is_out_of_range() -> None:
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: mass_aware_bound(1.2, 1, 1), r"mass must be in \[0, 1\], got 1.2"),
        (lambda: mass_aware_bound(0.5, -1, 1), "low must be in"),
        (lambda: mass_aware_bound(0.5, 1, math.nan), "high must be in"),
        (lambda: gap_bound(1, 1, -1.0), "variance must be in"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="low must be real"):
        gap_bound(np.array(["x"]), 1)


# --- certificates ---------------------------------------------------------------------------------


def problem_of(
    n: int, seed: int = 0, *, size: float = 1.0, d: int = 5, **given: Any
) -> sa.AttentionProblem:
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((n, d)), rng.standard_normal((n, d))
    return sa.AttentionProblem(size * q + 0.3, k, rng.standard_normal((n, 3)), **given)


def errors(problem: sa.AttentionProblem, ahat: Any) -> tuple[Array, Array, Array]:
    """Return total variation, KL(Ahat_i | A_i) and the error of the output of all rows."""
    a, b = problem.exact.to_dense(), ahat.to_dense()
    some = (a > 0) & (b > 0)
    logs = np.log(np.where(some, b, 1)) - np.log(np.where(some, a, 1))
    kl = (b * logs).sum(axis=1)
    out = np.linalg.norm((b - a) @ problem.values, axis=1)
    return np.abs(a - b).sum(axis=1) / 2, kl, out


def check_all(problem: sa.AttentionProblem, ahat: Any, directions: int = 16) -> Any:
    found = certify_rows(ahat, directions=directions)
    tv, kl, out = errors(problem, ahat)
    assert set(found.bounds) == set(KINDS)
    # Logits, and logarithms of weights, are rounded in their own size.
    reach = abs(problem.scale) * float(np.abs(problem.q @ problem.k.T).max())
    rounding = 1e-13 * (1 + reach)
    # A bound may be the root of a divergence that is known up to rounding.
    for name in KINDS:
        assert (tv <= found.bounds[name] + math.sqrt(rounding)).all(), name
        assert ((found.bounds[name] >= 0) & (found.bounds[name] <= 1)).all()
    assert (kl <= found.kl + rounding).all()
    assert found.output is not None
    assert (out <= found.output + 10 * math.sqrt(rounding)).all()
    stacked = np.stack([found.bounds[name] for name in KINDS])
    assert np.array_equal(found.tv, stacked.min(axis=0))
    assert all(found.bounds[name][i] == found.tv[i] for i, name in enumerate(found.kind))
    return found


@pytest.mark.parametrize("size", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "pattern", ["fixed", "logsparse", "axial_vertical", "axial_horizontal", "axial_rowmajor"]
)
def test_no_row_is_worse_than_its_certificate(pattern: str, causal: bool, size: float) -> None:
    problem = problem_of(37, size=size, causal=causal)
    references = ["zero", "region_mean"] if causal else ["zero", "global_mean", "mass_weighted"]
    for reference in references:
        ahat = sa.Combiner(pattern, reference=reference).approximate(problem)
        for directions in (0, 1, 3, 16):
            check_all(problem, ahat, directions)


@pytest.mark.parametrize(
    ("parameters", "given"),
    [
        ({"pattern": "routing", "rank": 5}, {}),
        ({"pattern": "routing", "rank": 5, "direct": "none"}, {}),
        ({"direct": "own+top_mass(2)"}, {}),
        ({"direct": "window(3)"}, {}),
        ({"direct": "none", "reference": "zero", "key": "mean", "bias": "log_count"}, {}),
        ({}, {"key_mask": np.arange(30) % 3 > 0}),
        ({"pattern": "logsparse", "reference": "zero"}, {"key_mask": np.arange(30) > 7}),
        ({"reference": "zero"}, {"key_mask": np.arange(30) > 7, "causal": True}),
        ({"reference": np.full(5, 3.0)}, {}),
        ({"block": 1}, {}),
        ({"block": 30}, {}),
    ],
)
def test_every_choice_that_is_certified(parameters: Any, given: Any) -> None:
    problem = problem_of(30, **given)
    check_all(problem, sa.Combiner(**parameters).approximate(problem, rng=0))


@pytest.mark.slow
def test_ten_thousand_problems() -> None:
    rng = np.random.default_rng(3)
    rows = 0
    for seed in range(500):
        n = int(rng.integers(1, 41))
        problem = problem_of(
            n, seed, size=float(np.exp(rng.uniform(-8, 9))), causal=bool(seed % 2), d=3
        )
        name = str(rng.choice(["fixed", "logsparse", "axial_vertical", "axial_horizontal"]))
        check_all(problem, sa.Combiner(name, reference="zero").approximate(problem))
        rows += n
    assert rows >= 9000


def test_rectangular_problems() -> None:
    rng = np.random.default_rng(4)
    q, k, v = rng.standard_normal((7, 4)), rng.standard_normal((50, 4)), rng.random((50, 2))
    problem = sa.AttentionProblem(q, k, v)
    check_all(problem, sa.Combiner("fixed", block=6, direct="none").approximate(problem))


def test_what_is_exact_is_certified_to_be() -> None:
    problem = problem_of(24)
    for block in (1, 24):
        found = check_all(problem, sa.Combiner(block=block).approximate(problem))
        assert not found.tv.any()
        assert found.output is not None
        assert not found.output.any()
    equal = sa.AttentionProblem(problem.q, np.repeat(problem.k[:6], 4, axis=0), problem.v)
    found = check_all(equal, sa.Combiner(block=4).approximate(equal))
    assert found.tv.max() < 1e-7


def test_small_spreads_give_small_certificates() -> None:
    problem = problem_of(64, size=0.02, scale=1.0)
    found = check_all(problem, sa.Combiner(block=8).approximate(problem))
    assert found.tv.max() < 0.1


def test_local_weights_that_underflow_still_count() -> None:
    # lam of the second key is e^-2000: no variance in float64, and all of the row is on it.
    k = np.array([[0.0], [1.0], [0.0]])
    problem = sa.AttentionProblem(np.array([[1000.0]]), k, np.eye(3), scale=1.0)
    plan = sa.partitions.Plan.from_lists(3, [[2]], [[0, 1]], [[0]])
    ahat = sa.PartitionedAttention(problem, plan, np.array([-2000.0]))
    assert errors(problem, ahat)[0] == pytest.approx(1.0)
    found = check_all(problem, ahat)
    assert all(found.bounds[name] == pytest.approx(1.0) for name in KINDS)


def test_extreme_logits_neither_overflow_nor_fail() -> None:
    for size in (1e3, 1e4, 1e8):
        found = check_all(
            problem := problem_of(20, size=size),
            sa.Combiner(block=4, reference="zero").approximate(problem),
        )
        assert np.isfinite(found.tv).all()


def test_float32_operators_are_certified_in_float64() -> None:
    wide = problem_of(40)
    narrow = wide.astype(np.float32)
    ahat = sa.Combiner(block=5).approximate(narrow)
    found = certify_rows(ahat)
    assert found.tv.dtype == np.float64
    tv, _, out = errors(wide, ahat)
    # Inputs of float32 are off by 6e-8 relative, and so are logits of size 5 and sums.
    assert (tv <= found.tv + 1e-5).all()
    assert found.output is not None
    assert (out <= found.output + 1e-5).all()
    same = certify_rows(sa.Combiner(block=5).approximate(narrow.astype(np.float64)))
    assert found.tv == pytest.approx(same.tv, rel=1e-5)


def test_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(33)
    ahat = sa.Combiner("logsparse").approximate(problem)
    whole = certify_rows(ahat)
    monkeypatch.setattr(row_certificates, "CHUNK", 60)
    parts = certify_rows(ahat)
    assert parts.tv == pytest.approx(whole.tv, rel=1e-12)
    assert parts.output == pytest.approx(whole.output, rel=1e-12)


def test_nothing_of_size_n_times_n() -> None:
    n = 16384
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, n, 4)).astype(np.float32)
    ahat = sa.Combiner(block=256).approximate(sa.AttentionProblem(q, k))
    tracemalloc.start()
    found = certify_rows(ahat)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.output is None
    # A is 1 GB in float32; a few arrays of 16 MB and of pairs of a row and a slot are held.
    assert peak < 200e6


def test_all_directions_give_the_exact_variance() -> None:
    # x^T Cov x of spans of 8 keys in 5 dimensions, by hand.
    problem = problem_of(32)
    ahat = sa.PartitionedAttention(problem, make_plan("fixed", 32, block=8))
    loose, tight = (certify_rows(ahat, directions=k) for k in (0, 5))
    assert (tight.tv <= loose.tv + 1e-12).all()
    assert tight.kl.mean() < 0.8 * loose.kl.mean()
    more = certify_rows(ahat, directions=50)
    assert np.array_equal(more.tv, tight.tv)
    known = row_certificates._regions(ahat, 5)
    for t in range(4):
        k = problem.k[8 * t : 8 * t + 8]
        covariance = np.cov(k.T, bias=True)
        made = known.axes[t].T @ np.diag(known.axis_variance[t]) @ known.axes[t]
        assert made == pytest.approx(covariance, abs=1e-12)
        assert known.rest_radius[t] < 1e-12
    one = row_certificates._regions(ahat, 2)
    values = np.linalg.eigvalsh(np.cov(problem.k[:8].T, bias=True))[::-1]
    assert one.axis_variance[0] == pytest.approx(values[:2], rel=1e-9)
    assert one.rest_variance[0] == pytest.approx(values[2], rel=1e-9)
    for bad, kind in ((-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(kind, match="directions must be"):
            certify_rows(ahat, directions=bad)  # type: ignore[arg-type]  # refused


def test_mixtures_have_the_mean_certificate() -> None:
    problem = problem_of(30)
    names = ("axial_vertical", "axial_horizontal")
    mixed = sa.Combiner(names, weights=(0.25, 0.75)).approximate(problem)
    found = certify_rows(mixed)
    parts = [certify_rows(sa.Combiner(name).approximate(problem)) for name in names]
    assert found.tv == pytest.approx(0.25 * parts[0].tv + 0.75 * parts[1].tv)
    assert set(found.kind) == {"mixture"}
    tv, kl, out = errors(problem, mixed)
    assert found.output is not None
    assert (tv <= found.tv).all()
    assert (kl <= found.kl).all()
    assert (out <= found.output).all()


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"preset": "paper"}, "key='max' and bias='none'"),
        ({"bias": "none"}, "key='expected' and bias='none'"),
        ({"bias": "log_count"}, "key='expected' and bias='log_count'"),
        ({"key": "mean"}, "key='mean' and bias='entropy'"),
        ({"second_order": "diag"}, "second_order='diag', which gives up"),
        ({"preset": "joint_mixture"}, "key='max'"),
        ({"pattern": "axial_joint"}, "a plan that covers some keys twice"),
        ({"pattern": ("fixed", "logsparse"), "bias": "none"}, "key='expected' and bias='none'"),
    ],
)
def test_rules_without_a_bound_are_refused(parameters: Any, why: str) -> None:
    causal = "axial_joint" in str(parameters) or "joint" in str(parameters)
    problem = problem_of(20, causal=causal)
    with pytest.raises(ValueError, match="ahat must have a bilinear error") as stop:
        certify_rows(sa.Combiner(**parameters).approximate(problem))
    assert why in str(stop.value)


def test_other_operators_are_refused() -> None:
    problem = problem_of(20)
    with pytest.raises(TypeError, match="must be a PartitionedAttention, got SoftmaxAttention"):
        certify_rows(problem.exact)


def test_plans_of_ones_own_are_certified() -> None:
    problem = problem_of(20)
    plan = make_plan("fixed", 20, block=6)
    for reference in (None, Reference("mean"), problem.q[0]):
        check_all(problem, sa.PartitionedAttention(problem, plan, reference))
    with pytest.raises(ValueError, match="second_order"):
        certify_rows(
            sa.PartitionedAttention(problem, plan, rule=Rule("expected", "entropy", "diag"))
        )


# --- in a study -----------------------------------------------------------------------------------


def test_a_study_draws_the_certificate_over_the_truth() -> None:
    heads = [problem_of(48, seed, size=0.1, name=f"h{seed}", d=8) for seed in range(2)]
    found = sa.study(
        heads, methods=["combiner", "uniform"], ranks=[4, 12, 48], seeds=1,
        bounds="combiner.certificate",
    )  # fmt: skip
    assert set(found.bounds["field"]) == {"row_tv_mean"}
    limits = {
        (str(row["head"]), int(row["rank"])): float(row["bound"])
        for row in found.bounds.to_dict("records")
    }
    own = [x for x in found.frame.to_dict("records") if x["method"] == "combiner"]
    assert len(own) == len(limits) == 6
    for row in own:
        head, rank = str(row["head"]), int(row["rank"])
        assert float(row["row_tv_mean"]) <= limits[head, rank] + 1e-9
        ahat = sa.Combiner(rank=rank).approximate(heads[int(head[1:])])
        assert limits[head, rank] == pytest.approx(certify_rows(ahat).tv.mean())
    curve = sa.theory.error_bounds()["combiner.certificate"]
    assert curve.is_about(sa.Combiner(rank=3))
    assert not curve.is_about(sa.Combiner("logsparse", rank=3))
    assert not curve.is_about(sa.Combiner(rank=3, reference="zero"))
    assert math.isnan(curve.at(heads[0], 49))


def test_gap_of_an_unbounded_range() -> None:
    # The limit of far upper ends and large variances, and of far lower ends.
    assert gap_bound(3.0, math.inf, math.inf) == 3.0
    assert gap_bound(3.0, 1e12) == pytest.approx(3.0, rel=1e-9)
    assert gap_bound(3.0, math.inf) == 3.0
    assert gap_bound(math.inf, 1.0, 1.0) == math.inf
    assert gap_bound(3.0, math.inf, 1.0) == gap_bound(3.0, 1e6, 1.0)


# --- extreme logits, and floating-point settings of the caller ----------------------------------


@pytest.mark.parametrize("size", [1e4, 1e8, 1e30])
@pytest.mark.parametrize("causal", [False, True])
def test_extreme_logits_have_bounds(size: float, causal: bool) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 24, 2))
    keep = np.arange(24) >= 6
    for factor in (size, -size):
        problem = sa.AttentionProblem(factor * q, k, v, causal=causal, key_mask=keep)
        ahat = sa.Combiner(block=4).approximate(problem)
        found = certify_rows(ahat)
        for bound in (found.tv, *found.bounds.values()):
            assert np.all((bound >= 0) & (bound <= 1))
        assert not np.isnan(found.kl).any()
        assert found.output is not None
        assert np.isfinite(found.output).all()
        if causal:  # rows that see nothing are exact
            assert not found.tv[:6].any()
            assert not found.output[:6].any()
        if size == 1e4:  # beyond it rounding of the operator itself is of the size of its rows
            truth = 0.5 * np.abs(ahat.to_dense() - problem.exact.to_dense()).sum(axis=1)
            # eps times the logits, through the softmax of both sides
            assert np.all(truth <= found.tv + 64 * 2.0**-52 * size * 24)


def test_settings_of_the_caller_change_nothing() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 48, 4))
    problem = sa.AttentionProblem(100 * q, k, v, causal=True, key_mask=np.arange(48) >= 3)
    ahat = sa.Combiner(block=8).approximate(problem)
    made = []
    for setting in ("ignore", "raise"):
        with np.errstate(all=setting):
            made.append(
                (
                    certify_rows(ahat),
                    mass_aware_bound([0.0, 1e-300, 0.5], [0.0, 800.0, 1.0], [800.0, 0.0, np.inf]),
                    gap_bound([0.0, 1e-200, 800.0], [1.0, 1e-200, np.inf], [1e-300, 1.0, np.inf]),
                )
            )
    (rows, mass, gap), (other, *rest) = made
    assert np.array_equal(rows.tv, other.tv)
    assert np.array_equal(rows.kl, other.kl)
    assert np.array_equal(np.stack([mass, gap]), np.stack(rest))


def test_shares_of_regions_do_not_see_a_shift_of_large_logits() -> None:
    direct = Ragged.of([[0, 1], [], [2]])
    regions = Ragged.of([[0], [1, 2], [0]])
    # Whole numbers: a shift by 2^50 is exact, and the normaliser of a shifted row is not.
    d, r = np.array([3.0, -2.0, 0.0]), np.array([1.0, 4.0, 5.0, -60.0])
    mass = np.exp(_log_mass(direct, regions, d, r))
    assert np.allclose(mass, [2 / 10.25, 1 / 3, 2 / 3, 2.0**-60], rtol=1e-15)
    shifted = _log_mass(direct, regions, d + 2.0**50, r + 2.0**50)
    assert np.array_equal(np.exp(shifted), mass)
