"""Claims about U S P, logits and widths: worked numbers, the record, broken implementations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import combinations
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
    claims_of,
    on_heads,
    problem_on,
    recorded_pairs,
    refuted,
)
from numpy.typing import NDArray
from scipy.special import softmax

import sketchattn as sa
from sketchattn.errors.perturbation import quantize
from sketchattn.sampling.landmarks import pivoted_rows, segment_means
from sketchattn.sketches.compression import compress
from sketchattn.theory.dba.formulas import (
    exact_projector,
    exponential_determinant,
    jl_logit_width,
    largest_volume,
    logit_decoder,
    minors,
    numerical_rank,
    oblique_maps,
    output_factors,
    rrqr_factor,
    skeleton_residual,
    strong_rrqr,
    volume_sampling,
)
from sketchattn.theory.engine.checking import check, default_factory
from sketchattn.theory.engine.instances import Instance

Array = NDArray[Any]

CLAIMS = claims_of("dba")
RECORDED = recorded_pairs(CLAIMS)
REFUTED = refuted(CLAIMS)


# --- the record -----------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize(("name", "on"), RECORDED)
def test_recorded_verdicts(name: str, on: str, global_random_seed: int) -> None:
    # Means alarm at |z| > 5; dba.jl_logits is far below its delta; the rest is deterministic.
    check_recorded(CLAIMS, name, on, rng=global_random_seed)


@pytest.mark.statistical
@pytest.mark.parametrize("name", on_heads(CLAIMS))
def test_recorded_verdicts_on_a_bundled_head(name: str, global_random_seed: int) -> None:
    heads = sa.load_heads()
    problem = heads[global_random_seed % len(heads)]
    verdict = check(name, problem, rng=global_random_seed)
    recorded = CLAIMS[name].recorded
    assert verdict.status == recorded.get(str(problem.name), recorded["heads"]), str(verdict)


# --- negative controls ----------------------------------------------------------------------------


def library(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
    """Make what the library would, from the definitions."""
    if kind == "pack":
        return rng.standard_normal((r, n))
    if kind == "decoder":
        return np.linalg.lstsq(given["packed"].T, given["keys"].T, rcond=None)[0].T
    if kind == "softmax":
        return softmax(given["logits"], axis=1)
    if kind == "oblique":
        return oblique_maps(given["q"], given["k"])
    if kind == "projector":
        return exact_projector(given["q"], given["k"])
    if kind == "compress":
        return compress(given["q"], given["k"], r, given["how"], rng)
    if kind == "gaussian":
        return default_factory(kind, r, n, rng)
    if kind == "approximation":
        u, s, vt = np.linalg.svd(given["problem"].exact.to_dense(), full_matrices=False)
        return (u[:, :r] * s[:r]) @ vt[:r]
    if kind == "means":
        return means(counts=True, **given)
    if kind == "compressed":
        problem = given["problem"]
        q, k = compress(problem.q, problem.k, r)
        return softmax(problem.scale * q @ k.T, axis=1)
    if kind == "best_output":
        u, s, vt = np.linalg.svd(given["output"], full_matrices=False)
        return (u[:, :r] * s[:r]) @ vt[:r] @ np.linalg.pinv(given["values"])
    if kind == "rounded":
        return quantize(given["x"], given["dtype"])
    if kind == "skeleton":
        return np.array(largest_volume(given["matrix"], r))
    if kind == "columns":
        return strong_rrqr(given["matrix"], r, given["f"])
    assert kind == "volume_law"
    return volume_sampling(given["matrix"], r).law


def means(*, problem: sa.AttentionProblem, queries: Any, keys: Any, counts: bool) -> Array:
    """Return Ahat of means over clusters by an explicit product of three matrices."""
    logits = problem.scale * queries.centers @ keys.centers.T
    if counts:
        logits = logits + np.log(keys.counts)
    core = softmax(logits, axis=1)
    pack = np.eye(len(keys.counts))[keys.labels].T / keys.counts[:, None]
    return np.asarray(np.eye(len(queries.counts))[queries.labels] @ core @ pack)


def changed(kind: str, change: Callable[..., Any]) -> Factory:
    """Return an implementation of which one part is changed."""

    def broken(asked: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
        found = library(asked, r, n, rng, **given)
        return change(found, r=r, n=n, rng=rng, **given) if asked == kind else found

    return broken


def times(kind: str, factor: float) -> Factory:
    return changed(kind, lambda found, **_: factor * np.asarray(found))


def heated(factor: float) -> Factory:
    return changed("softmax", lambda _, logits, **__: softmax(factor * logits, axis=1))


def one_row_more(_: Any, *, r: int, n: int, rng: np.random.Generator, **__: Any) -> Array:
    return rng.standard_normal((r + 1, n))


def one_column_less(found: Any, **_: Any) -> tuple[Array, Array]:
    right, left = found
    return right[:, :-1], left[:-1]


def few_rows(_: Any, *, n: int, rng: np.random.Generator, **__: Any) -> Array:
    return rng.standard_normal((4, n)) / 2


def exact(_: Any, *, problem: sa.AttentionProblem, **__: Any) -> Array:
    return problem.exact.to_dense()


def no_counts(_: Any, *, problem: Any, queries: Any, keys: Any, **__: Any) -> Array:
    return means(problem=problem, queries=queries, keys=keys, counts=False)


def other_rows(found: Array, **_: Any) -> Array:
    return np.roll(found, 1, axis=0)


def coarse(_: Any, *, x: Array, **__: Any) -> Array:
    return np.asarray(np.rint(2 * x) / 2)


def least_volume(_: Any, *, r: int, matrix: Array, **__: Any) -> Array:
    sets = list(combinations(range(matrix.shape[0]), r))
    volumes = [[abs(np.linalg.det(matrix[np.ix_(i, j)])) for j in sets] for i in sets]
    i, j = np.unravel_index(int(np.argmin(volumes)), (len(sets), len(sets)))
    return np.array([sets[i], sets[j]])


def worst_set(law: Array, *, matrix: Array, subsets: Array, **_: Any) -> Array:
    left = []
    for s in subsets:
        c = matrix[:, s]
        left.append(np.linalg.norm(matrix - c @ np.linalg.pinv(c) @ matrix))
    return np.asarray(np.arange(len(law)) == int(np.argmax(left)), np.float64)


def alike(law: Array, **_: Any) -> Array:
    return np.full(len(law), 1 / len(law))


def smallest_columns(_: Any, *, r: int, matrix: Array, **__: Any) -> Array:
    return np.asarray(np.argsort(np.linalg.norm(matrix, axis=0))[:r])


CONTROLS: list[tuple[str, str, Factory]] = [
    ("lossless_logits", "oblique", times("decoder", 1.01)),
    ("logit_rank", "oblique", changed("pack", one_row_more)),
    ("vandermonde", "line-4", heated(1.01)),
    ("total_positivity", "line-4", heated(-1.0)),
    ("circle", "circle", heated(0.95)),
    ("oblique", "oblique", changed("oblique", one_column_less)),
    ("projector", "oblique", times("projector", 1.01)),
    ("svd_width", "clusters", changed("compress", lambda x, **_: (1.1 * x[0], x[1]))),
    ("jl_variance", "oblique", changed("gaussian", lambda x, **_: 1.5 * x.to_dense())),
    ("jl_logits", "wide-rows", changed("gaussian", few_rows)),
    ("multiplicity", "three-to-one", changed("means", no_counts)),
    ("multiplicity", "duplicates", changed("means", no_counts)),
    ("matrix_floor", "gauss", changed("approximation", exact)),
    ("output_floor", "gauss", changed("approximation", exact)),
    ("output_floor_attained", "gauss", times("best_output", 1.01)),
    ("logit_error", "odds", heated(1.01)),
    ("logit_error", "reference", heated(1.1)),
    ("block_form", "duplicates", changed("means", no_counts)),
    ("cluster_apriori", "ten-clusters", changed("means", other_rows)),
    ("compressed_logits", "ten-clusters", changed("compressed", other_rows)),
    ("quantized_inputs", "ten-clusters", changed("rounded", coarse)),
    ("lipschitz", "worked", changed("compressed", other_rows)),
    ("skeleton", "gauss", changed("skeleton", least_volume)),
    ("volume_sampling", "gauss", changed("volume_law", worst_set)),
    ("volume_sampling_exact", "gauss", changed("volume_law", alike)),
    ("strong_rrqr", "gauss", changed("columns", smallest_columns)),
]


@pytest.mark.parametrize(("name", "on", "broken"), CONTROLS)
def test_broken_implementations_are_reported(name: str, on: str, broken: Factory) -> None:
    check_reported(f"dba.{name}", on, broken)


@pytest.mark.parametrize(("name", "on"), sorted({(name, on) for name, on, _ in CONTROLS}))
def test_an_implementation_from_the_definition_is_not_reported(name: str, on: str) -> None:
    check_not_reported(f"dba.{name}", on, library, allowed=["holds"])


def test_every_theorem_has_a_control() -> None:
    assert {f"dba.{name}" for name, _, _ in CONTROLS} == set(CLAIMS) - REFUTED


@pytest.mark.parametrize(
    ("name", "on"),
    [
        ("pivoted_decoder", "oblique"),
        ("lossless_attention", "uniform"),
        ("softmax_commutes", "orthonormal"),
        ("no_log_count", "twice"),
        ("svd_output_floor", "orthonormal"),
        ("compressed_floor", "minilm"),
        ("projector_needs_more", "aligned"),
    ],
)
def test_refuted_statements_are_not_violated_by_everything(name: str, on: str) -> None:
    q = np.r_[np.eye(3), [[0.5, 0.5, 0.5]]]
    made: dict[str, Any] = {
        "oblique": sa.AttentionProblem(np.eye(2), np.eye(2)[[0, 1, 0]]),
        # Equal keys: logits of rank one and a matrix of rank one.
        "uniform": sa.AttentionProblem(q, np.ones((5, 3))),
        "twice": "twice",
        "orthonormal": sa.AttentionProblem(3 * np.eye(4), np.eye(4), np.eye(4)),
        "minilm": sa.load_heads()[0],
        # Q sees the first direction, K the second, both the third.
        "aligned": sa.AttentionProblem(np.eye(3)[[0, 2]], np.eye(3)[[1, 2]]),
    }
    verdict = check(f"dba.{name}", made[on])
    assert verdict.status == ("violated" if name == "projector_needs_more" else "holds")


def test_a_projector_may_be_as_narrow_as_the_logits() -> None:
    # The hand example of the refutation: rank(Q) = rank(K) = 2, rank(Q K^T) = 1.
    q, k = np.eye(3)[[0, 2]], np.eye(3)[[1, 2]]
    w = exact_projector(q, k)
    assert w.shape == (3, 1)
    assert q @ w @ w.T @ k.T == pytest.approx(q @ k.T, abs=1e-15)
    rng = np.random.default_rng(0)
    for _ in range(20):
        d = int(rng.integers(2, 9))
        # Row spaces that share some directions and are at right angles in the others.
        basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
        left, right = (np.flatnonzero(rng.random(d) < 0.7) for _ in range(2))
        q = rng.standard_normal((12, len(left))) @ basis[:, left].T
        k = rng.standard_normal((11, len(right))) @ basis[:, right].T
        w = exact_projector(q, k)
        rank = np.linalg.matrix_rank(q @ k.T) if len(np.intersect1d(left, right)) else 0
        assert w.shape[1] == rank == len(np.intersect1d(left, right))
        assert w.T @ w == pytest.approx(np.eye(rank), abs=1e-12)
        assert q @ w @ w.T @ k.T == pytest.approx(q @ k.T, abs=1e-12)
    # Row spaces of dimensions 3 and 2 at random angles in dimension 6.
    q = rng.standard_normal((12, 3)) @ rng.standard_normal((3, 6))
    k = rng.standard_normal((11, 2)) @ rng.standard_normal((2, 6))
    w = exact_projector(q, k)
    assert w.shape == (6, 2)
    assert q @ w @ w.T @ k.T == pytest.approx(q @ k.T, abs=1e-12)


def test_below_the_rank_no_projector_has_the_best_logits() -> None:
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((9, 2)), rng.standard_normal((8, 2))
    best = float(np.linalg.svd(q @ k.T, compute_uv=False)[1])
    found = []
    for angle in np.linspace(0, np.pi, 400, endpoint=False):
        w = np.array([np.cos(angle), np.sin(angle)])
        found.append(np.linalg.norm(q @ k.T - np.outer(q @ w, k @ w), 2))
    assert min(found) > 1.01 * best
    small = compress(q, k, 1, center=False)
    assert np.linalg.norm(q @ k.T - small[0] @ small[1].T, 2) == pytest.approx(best)


# --- T1 and T2: worked numbers --------------------------------------------------------------------


def gaussian(seed: int, n: int, d: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), rng.standard_normal((n, d))


@pytest.mark.parametrize("pack", ["pivots", "Gaussian", "means"])
def test_logits_are_kept_at_their_rank_and_not_below(pack: str) -> None:
    q, k = gaussian(0, 256, 32)
    rng = np.random.default_rng(1)
    logits = q @ k.T / math.sqrt(32)
    errors = {}
    for r in (31, 32):
        packed = {
            "pivots": k[pivoted_rows(k, r, rng)],
            "Gaussian": rng.standard_normal((r, 256)) @ k,
            "means": segment_means(k, r),
        }[pack]
        lhat = (q @ packed.T / math.sqrt(32)) @ logit_decoder(k, packed).T
        errors[r] = float(np.linalg.norm(logits - lhat) / np.linalg.norm(logits))
    assert errors[32] < 1e-12
    assert errors[31] > 0.05


def test_both_sides_are_kept_by_pivots() -> None:
    q, k = gaussian(2, 256, 32)
    rng = np.random.default_rng(3)
    logits = q @ k.T
    for r, most, least in ((32, 1e-12, 0.0), (31, 1.0, 0.05)):
        rows, columns = pivoted_rows(q, r, rng), pivoted_rows(k, r, rng)
        core = q[rows] @ k[columns].T
        lhat = logit_decoder(q, q[rows]) @ core @ logit_decoder(k, k[columns]).T
        error = float(np.linalg.norm(logits - lhat) / np.linalg.norm(logits))
        assert least <= error < most


def test_pivots_can_have_a_decoder_above_one_and_exchanges_bound_it() -> None:
    k = problem_on("three-keys").k
    rows = pivoted_rows(k, 2, np.random.default_rng(0))
    assert np.abs(logit_decoder(k, k[rows])).max() == pytest.approx(1.6, rel=2e-3)
    better = strong_rrqr(k.T, 2, f=1.0)
    assert np.abs(logit_decoder(k, k[better])).max() <= 1 + 1e-9
    # Among Gaussian keys it is common, too.
    worst = 0.0
    for seed in range(40):
        keys = gaussian(seed, 64, 8)[0]
        chosen = keys[pivoted_rows(keys, 8, np.random.default_rng(0))]
        worst = max(worst, float(np.abs(logit_decoder(keys, chosen)).max()))
    assert 1.1 < worst < 2**7


def test_determinants_of_the_line() -> None:
    known = {4: 3907.534355129156, 5: 2015.1224386521, 6: 238.0182178980}
    for m, wanted in known.items():
        q, k = np.linspace(-2, 2, m), np.linspace(-1.5, 2.5, m)
        assert exponential_determinant(q, k) == pytest.approx(wanted, rel=1e-10)
        assert np.linalg.det(np.exp(np.outer(q, k))) == pytest.approx(wanted, rel=1e-10)
        a = sa.AttentionProblem(q[:, None], k[:, None], scale=1.0).exact.to_dense()
        assert np.linalg.matrix_rank(a) == m
        assert numerical_rank(np.outer(q, k)) == 1
    verdict = check("dba.lossless_attention", "line-4")
    assert verdict.observed == pytest.approx(0.695025, abs=1e-6)
    with pytest.raises(ValueError, match="keys must be evenly spaced"):
        exponential_determinant([1.0, 2.0, 3.0], [0.0, 1.0, 3.0])
    with pytest.raises(ValueError, match="keys must be as many as queries"):
        exponential_determinant([1.0, 2.0], [0.0])


def test_minors_are_all_there_and_negative_for_a_wrong_order() -> None:
    a = np.exp(np.outer(np.arange(4.0), np.arange(4.0)) / 3)
    found = list(minors(a))
    assert [len(x) for x in found] == [16, 36, 16, 1]
    assert all((x > 0).all() for x in found)
    assert float(found[3][0]) == pytest.approx(np.linalg.det(a))
    assert list(minors(a[::-1]))[1].min() < 0
    with pytest.raises(ValueError, match="at most 10 rows"):
        list(minors(np.ones((11, 2))))


def test_the_circle() -> None:
    problem = problem_on("circle")
    a = problem.exact.to_dense()
    assert numerical_rank(problem.q @ problem.k.T) == 2
    assert np.abs(a - np.eye(32)).max() == pytest.approx(9.04e-9, rel=1e-3)
    sigma = np.linalg.svd(a, compute_uv=False)
    floor = np.linalg.norm(sigma[2:]) / np.linalg.norm(sigma)
    assert floor == pytest.approx(math.sqrt(30 / 32), abs=1e-7)
    assert check("dba.lossless_attention", "circle").observed == pytest.approx(floor)


# --- T3 -------------------------------------------------------------------------------------------


def test_three_to_one() -> None:
    eye = np.eye(2)
    core = [[0.85884369, 0.14115631], [0.66976155, 0.33023845]]
    logits = eye / math.sqrt(2)
    assert softmax(logits + np.log([3, 1]), axis=1)[0] == pytest.approx(core[0], abs=1e-8)
    assert softmax(logits, axis=1)[0] == pytest.approx(core[1], abs=1e-8)
    exact = problem_on("three-to-one").exact.to_dense()[0]
    assert exact[:3].sum() == pytest.approx(core[0][0], abs=1e-8)
    verdict = check("dba.no_log_count", "three-to-one")
    assert verdict.status == "violated"
    # Key 2 has the larger share in its own row: .36 with the counts and .60 without.
    own = np.exp(logits[1]) * [3, 1]
    without = softmax(logits[1])[1] - own[1] / own.sum()
    assert verdict.observed == pytest.approx(without)


def test_equal_counts_need_none() -> None:
    assert check("dba.no_log_count", "twice").status == "holds"
    assert check("dba.multiplicity", "twice").status == "holds"
    problem = problem_on("duplicates")
    a = problem.exact.to_dense()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        wrong = sa.DBA(12, pack="mean", core="softmax_nocount").approximate(problem, rng=0)
    assert np.linalg.norm(wrong.to_dense() - a) > 0.1 * np.linalg.norm(a)
    right = sa.DBA(12, preset="dba_means").approximate(problem, rng=0)
    assert np.abs(right.to_dense() - a).max() < 1e-10


# --- T4 and T7 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["gauss", "ten-clusters", "circle"])
def test_no_product_is_below_the_floor(on: str) -> None:
    for rank in (2, 8):
        verdict = check("dba.matrix_floor", on, rank=rank)
        assert verdict.status == "holds", str(verdict)
        # The truncated SVD itself attains it.
        attained = check("dba.matrix_floor", on, rank=rank, sketch=library)
        assert attained.observed == pytest.approx(1.0, abs=1e-9)


def test_outputs_have_another_floor() -> None:
    problem = problem_on("gauss")
    found = output_factors(problem.output, problem.values, 32)
    assert found.unpack @ found.pack @ problem.values == pytest.approx(problem.output, abs=1e-12)
    a = problem.exact.to_dense()
    assert np.linalg.norm(a - found.unpack @ found.pack) > 0.5 * np.linalg.norm(a)
    with pytest.raises(ValueError, match="values must have the width 32"):
        output_factors(problem.output, problem.values[:, :3], 2)


def test_compressed_logits_may_be_below_the_floor() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((256, 64)), rng.standard_normal((256, 64))
    problem = sa.AttentionProblem(q, k)
    verdict = check("dba.compressed_floor", problem, rank=32)
    assert verdict.status == "violated", str(verdict)


def test_oblique_maps() -> None:
    problem = problem_on("oblique")
    q, k = problem.q, problem.k
    assert [numerical_rank(x) for x in (q, k, q @ k.T)] == [3, 5, 2]
    maps = oblique_maps(q, k)
    assert maps.right.shape == (6, 2)
    assert q @ maps.right @ maps.left @ k.T == pytest.approx(q @ k.T, abs=1e-13)
    assert exact_projector(q, k).shape == (6, 2)


def test_widths_of_the_lemma() -> None:
    known = {512: (7185, 1380, 518), 4096: (9034, 1735, 651)}
    for n, wanted in known.items():
        found = np.asarray(jl_logit_width(n, n, [0.1, 0.25, 0.5], 0.1))
        assert found.tolist() == list(wanted)
        assert (found > 64).all()
    for problem in (sa.load_heads()[0], problem_on("clusters")):
        verdict = check("dba.jl_logits", problem)
        assert verdict.status == "vacuous"
        assert verdict.rank == jl_logit_width(problem.n_q, problem.n_k)


@pytest.mark.statistical
def test_variance_of_a_projected_logit(global_random_seed: int) -> None:
    rng = np.random.default_rng(global_random_seed)
    d, d_in, trials = 8, 5, 400_000
    q, k = rng.standard_normal(d), rng.standard_normal(d)
    dots = np.zeros(trials)
    for start in range(0, trials, 50_000):
        r = rng.standard_normal((50_000, d_in, d)) / math.sqrt(d_in)
        dots[start : start + 50_000] = np.sum((r @ q) * (r @ k), axis=1)
    wanted = ((q @ q) * (k @ k) + (q @ k) ** 2) / d_in
    # The kurtosis of a sum of five products is below 9: the sample variance has a relative
    # deviation of at most sqrt(8/400 000) = 0.0045, and 0.03 is more than six of them.
    assert dots.var() == pytest.approx(wanted, rel=0.03)


# --- T5 -------------------------------------------------------------------------------------------


def test_the_attaining_instance_is_attained() -> None:
    verdict = check("dba.logit_error", "odds")
    assert verdict.observed == pytest.approx(1.0, abs=1e-12)


def test_a_row_beyond_its_own_bound_is_seen() -> None:
    def one_row(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
        found = np.array(library(kind, r, n, rng, **given))
        if kind == "compressed":
            found[0] = np.roll(found[0], 1)
        return found

    verdict = check("dba.compressed_logits", "ten-clusters", sketch=one_row)
    assert verdict.status == "violated", str(verdict)
    assert check("dba.quantized_inputs", "gauss", dtype="float16").bound < 0.01
    assert check("dba.quantized_inputs", "gauss", dtype="int8").status in ("holds", "vacuous")


# --- T8 -------------------------------------------------------------------------------------------


def test_skeletons_of_largest_volume() -> None:
    for seed in range(20):
        e = np.exp(np.random.default_rng(seed).standard_normal((7, 7)))
        sigma = np.linalg.svd(e, compute_uv=False)
        for r in (1, 2, 3):
            rows, columns = largest_volume(e, r)
            left = np.abs(skeleton_residual(e, rows, columns)).max()
            assert left <= (r + 1) * sigma[r]
            # Entries of the decoder are ratios of volumes.
            w = e[:, columns] @ np.linalg.inv(e[np.ix_(rows, columns)])
            assert np.abs(w).max() <= 1 + 1e-12


def test_volume_sampling_by_enumeration() -> None:
    m = np.random.default_rng(0).standard_normal((7, 7))
    sigma = np.linalg.svd(m, compute_uv=False)
    for k in (1, 2, 3):
        found = volume_sampling(m, k)
        assert found.law.sum() == pytest.approx(1.0)
        assert found.law @ found.errors == pytest.approx(found.mean, rel=1e-10)
        assert found.mean <= found.bound
        assert found.bound == pytest.approx((k + 1) * np.sum(sigma[k:] ** 2))
        sets = list(combinations(range(7), k + 1))
        e = [
            sum(np.prod(sigma[list(s)] ** 2) for s in some)
            for some in (combinations(range(7), k), sets)
        ]
        assert found.mean == pytest.approx((k + 1) * e[1] / e[0])
    with pytest.raises(ValueError, match="rank k = 2 at least"):
        volume_sampling(np.zeros((3, 3)), 2)


@pytest.mark.parametrize("f", [1.0, 1.5, 3.0])
def test_strong_rrqr(f: float) -> None:
    for seed in range(10):
        # Kahan's matrices are hard for pivots: here a random one beside them.
        rng = np.random.default_rng(seed)
        m = rng.standard_normal((12, 15)) * 2.0 ** -np.arange(15)
        kahan = np.triu(np.full((12, 12), -0.3)) * 0.95 ** np.arange(12)[:, None]
        np.fill_diagonal(kahan, 0.95 ** np.arange(12))
        for a in (m, kahan):
            sigma = np.linalg.svd(a, compute_uv=False)
            for k in (1, 3, 7):
                columns = strong_rrqr(a, k, f)
                within = np.linalg.pinv(a[:, columns]) @ a
                left = np.linalg.norm(a - a[:, columns] @ within, 2)
                assert left <= rrqr_factor(k, a.shape[1], f) * sigma[k] * (1 + 1e-9)
                assert np.abs(within).max() <= max(f, 1.0) * (1 + 1e-8)


# --- odd problems ---------------------------------------------------------------------------------


def test_odd_problems_get_a_verdict() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((5, 3)), rng.standard_normal((9, 3)), rng.standard_normal((9, 2))
    mask = np.arange(9) % 3 > 0
    odd = {
        "one": sa.AttentionProblem(q[:1], k[:1], v[:1]),
        "one query": sa.AttentionProblem(q[:1], k, v),
        "one key": sa.AttentionProblem(q, k[:1], v[:1]),
        "masked": sa.AttentionProblem(q, k, v, key_mask=mask),
        "zero values": sa.AttentionProblem(q, k, np.zeros((9, 2))),
        "no values": sa.AttentionProblem(q, k),
        "causal": sa.AttentionProblem(k, k, v, causal=True),
        "large logits": sa.AttentionProblem(1e3 * q, k, v),
        "wide": sa.AttentionProblem(rng.standard_normal((2, 40)), rng.standard_normal((3, 40))),
        "uniform": sa.AttentionProblem(0 * q, k, v),
        "no keys": sa.AttentionProblem(q, k, v, key_mask=np.zeros(9, bool)),
        "negative scale": sa.AttentionProblem(q, k, v, scale=-0.5),
    }
    check_odd(CLAIMS, [Instance(*pair) for pair in odd.items()], trials=20)
    pair = check("dba.lossless_logits", (np.eye(3), np.eye(3)))
    assert "needs queries and keys" in pair.notes


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_verdicts_repeat_and_bounds_need_no_draw(name: str) -> None:
    check_repeats(CLAIMS, name, trials=20)


def test_refusals() -> None:
    calls: list[tuple[str, Callable[[], object]]] = [
        ("packed must have the width 2", lambda: logit_decoder(np.eye(2), np.eye(3))),
        ("keys must have the width 2", lambda: exact_projector(np.eye(2), np.eye(3))),
        ("eps must be in", lambda: jl_logit_width(5, 5, 1.0)),
        ("r must be at least 1", lambda: largest_volume(np.eye(2), 0)),
        ("f must be in", lambda: strong_rrqr(np.eye(2), 1, 0.5)),
        ("rank must be at least 1", lambda: check("dba.lossless_logits", "oblique", rank=0)),
        ("eta must be in", lambda: check("dba.logit_error", "odds", eta=0.0)),
    ]
    for message, call in calls:
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
    assert "r = 1 rows" in check("dba.lossless_logits", "oblique", rank=1).notes
