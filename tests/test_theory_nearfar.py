"""Claims about near keys and far moments: worked numbers, the record, broken versions."""

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
    claims_of,
    on_heads,
    problem_on,
    recorded_pairs,
    refuted,
)
from naive import naive_farthest_first, naive_nearfar
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.operators.nearfar import NearFarAttention, expected_maximum
from sketchattn.theory import nearfar
from sketchattn.theory.engine.checking import check
from sketchattn.theory.nearfar.cases import SPECIAL, given_clusters, matrix_of
from sketchattn.theory.nearfar.formulas import Case, Form, forms, one_cluster, others
from sketchattn.zoo.nearfar import regions

Array = NDArray[Any]

CLAIMS = claims_of("nearfar")
RECORDED = recorded_pairs(CLAIMS)
REFUTED = refuted(CLAIMS)


def case_on(name: str, **options: Any) -> Case:
    problem = problem_on(name)
    form = (SPECIAL.get(name) or forms(problem))[0]._replace(**options)
    return Case(form, matrix_of(problem, form))


# --- worked numbers -------------------------------------------------------------------------------


def test_two_logits_a_cluster() -> None:
    # Logits -400 and 400 share a cluster of mean 0, 200 is alone.
    case = case_on("far-shares", second_order="none")
    assert case.counts.tolist() == [2, 1]
    assert case.lower[0] == pytest.approx([math.log(2), 200])
    assert case.mass[0] == pytest.approx([400, 200])
    assert case.width[0] == pytest.approx([400, 0])
    assert case.log_normalizer[0] == pytest.approx(200)
    assert case.share_tv[0] == pytest.approx(1)
    # s_2 sigma - s_2^2/2 with s_2 = Phi^-1(13/18).
    s = 0.5894558
    frozen = case_on("far-shares")
    assert frozen.log_normalizer[0] == pytest.approx(math.log(2) + 400 * s - s * s / 2, abs=1e-4)


def test_the_mean_of_the_largest_of_normal_numbers() -> None:
    known = {1: 0, 2: 1 / math.sqrt(math.pi), 3: 1.5 / math.sqrt(math.pi), 10: 1.5387527}
    for m, value in known.items():
        assert nearfar.normal_maximum(m) == pytest.approx(value, abs=1e-7)
    assert nearfar.normal_maximum(10**6) == pytest.approx(4.8636, abs=1e-3)
    found = np.asarray(nearfar.normal_maximum([2, 8]))
    assert found == pytest.approx([nearfar.normal_maximum(m) for m in (2, 8)], rel=1e-12)
    # Blom's values are near.
    for m in (8, 32, 64, 256):
        assert abs(expected_maximum(np.array(m)) - nearfar.normal_maximum(m)) < 0.02


def test_the_window_of_the_frozen_second_order() -> None:
    # The numbers that the statement of the claim has.
    for m, most in ((8, 1.07), (32, 1.32), (64, 1.41)):
        assert nearfar.frozen_window(0.0, m)[1] == pytest.approx(most, abs=0.005)
    low, high = nearfar.frozen_window(10.0, 64)
    assert -0.08 < low < 0
    assert high == pytest.approx(1.41, abs=0.005)
    assert nearfar.frozen_window(10.0, 1) == pytest.approx((0, 0), abs=1e-12)
    assert nearfar.frozen_second_order([1.0, 10.0], 1) == pytest.approx([0, 0])
    for name, given in (("sigma", (-1.0, 8)), ("m", (1.0, 0))):
        with pytest.raises(ValueError, match=f"{name} must"):
            nearfar.frozen_window(*given)


@pytest.mark.statistical
@pytest.mark.parametrize("m", [2, 8, 32, 64])
def test_normal_logits_are_inside_the_window(m: int, global_random_seed: int) -> None:
    for sigma in (0.5, 1.0, 2.0, 4.0, 6.0, 10.0):
        for name in ("nearfar.frozen_above", "nearfar.frozen_gap"):
            found = check(name, "reference", sigma=sigma, m=m, rng=global_random_seed)
            assert found.status in ("holds", "inconclusive"), str(found)


def test_the_difference_to_normal_logits_grows_with_sigma() -> None:
    # With mu_m in place of s_m: the same draws at all sigma.
    m = 32
    g = np.random.default_rng(0).standard_normal((20_000, m))
    mu = float(np.asarray(nearfar.normal_maximum(m)))
    found = []
    for sigma in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0):
        least = min(sigma, mu)
        means = np.log(np.exp(sigma * (g - g.max(axis=1, keepdims=True))).mean(axis=1))
        found.append(least * (sigma - least / 2) - float((sigma * g.max(axis=1) + means).mean()))
    # Means of 20,000 have an error of sigma/200.
    assert found[0] > -0.02
    assert np.diff(found[:5]).min() > -0.1
    assert found[4] < math.log(m) - mu**2 / 2 + 0.2


def test_tilted_weights_and_their_remainder() -> None:
    rng = np.random.default_rng(0)
    closest = 0.0
    for _ in range(2000):
        a = rng.standard_normal(int(rng.integers(2, 20))) * rng.exponential()
        a -= a.mean()
        a *= rng.uniform(0, 1) / max(np.abs(a).max(), 1e-9)
        weights = np.exp(a) / np.exp(a).mean()
        off = np.abs(weights - 1 - a - (a**2 - (a**2).mean()) / 2).max()
        bound = float(np.asarray(nearfar.tilted_remainder(np.abs(a).max())))
        assert off <= bound + 1e-15
        closest = max(closest, off / (bound + 1e-15))
    assert closest > 0.3
    with pytest.raises(ValueError, match="reach must"):
        nearfar.tilted_remainder(1.5)


def test_sums_of_all_others() -> None:
    rng = np.random.default_rng(0)
    logs, rest = 30 * rng.standard_normal((5, 7)), rng.standard_normal(5)
    found = others(logs, rest)
    for i in range(5):
        for c in range(7):
            terms = [rest[i], *np.delete(logs[i], c)]
            assert found[i, c] == pytest.approx(np.logaddexp.reduce(terms), rel=1e-12)
    assert others(np.zeros((2, 1)), np.full(2, -np.inf)).tolist() == [[-np.inf]] * 2


def test_moments_merge() -> None:
    rng = np.random.default_rng(1)
    k, v = rng.standard_normal((30, 4)), rng.standard_normal((30, 2))
    parts = [slice(0, 4), slice(4, 5), slice(5, 30)]
    merged = nearfar.merged_moments(nearfar.cluster_moments(k[x], v[x]) for x in parts)
    whole = nearfar.cluster_moments(k, v)
    assert merged.size == 30
    for name in ("key", "variance", "value"):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert merged.radius >= whole.radius
    with pytest.raises(ValueError, match="parts must hold at least 1 cluster, got 0"):
        nearfar.merged_moments([])
    with pytest.raises(ValueError, match="keys and values must be matrices"):
        nearfar.cluster_moments(k, v[:3])


@pytest.mark.parametrize("causal", [False, True])
def test_cases_are_those_of_the_loops(causal: bool) -> None:
    q, k, v = np.random.default_rng(2).standard_normal((3, 29, 3))
    problem = sa.AttentionProblem(q, k, v, causal=causal)
    form = Form("blocks", 8, 3, near=2, tau=0.02)
    case = Case(form, matrix_of(problem, form))
    labels, direct, far, _ = case.structure
    near = case.operator.near
    for i in range(29):
        block = i // 8
        own = [j for j in range(29) if j // 8 == block and (j <= i or not causal)]
        chosen = [c for c in near[i].tolist() if c >= 0]
        read = own + [j for j in range(29) if labels[j] in chosen]
        assert np.flatnonzero(direct[i]).tolist() == sorted(read)
        rest = {int(labels[j]) for j in range(29) if labels[j] >= 0 and j // 8 != block}
        if causal:
            rest = {c for c in rest if c < 3 * block}
        assert np.flatnonzero(far[i]).tolist() == sorted(rest - set(chosen))
    assert (np.exp(case.mass).sum(axis=1) + np.exp(case.direct_mass)) == pytest.approx(
        np.exp(case.log_z)
    )
    # What is observed agrees with the formulas.
    phi = np.asarray(nearfar.frozen_second_order(case.sigma, np.maximum(case.counts, 1)))
    wanted = case.lower + np.minimum(phi, case.width)
    assert case.g[case.seen] == pytest.approx(wanted[case.seen], abs=1e-12)


def test_an_unseen_key_has_nearly_all_of_the_mass() -> None:
    case = case_on("unseen-key")
    problem = case.problem
    # 120 keys of logit 24 and one of 30.
    share = math.exp(6) / (120 + math.exp(6))
    exact = problem.exact @ problem.values
    assert exact == pytest.approx(np.full((128, 1), share), rel=1e-9)
    # Rows of the block of that key read it.
    out = case.ahat @ problem.values
    assert out[:32] == pytest.approx(exact[:32], rel=1e-9)
    assert out[32:].max() < 1e-8
    verdict = check("nearfar.estimate", "unseen-key")
    assert verdict.status == "violated"
    # Twenty times the estimate, and any other factor.
    for factor in (20.0, 1e6):
        assert check("nearfar.estimate", "unseen-key", constant=factor).status == "violated"
    # Where the choice sees the queries' metric, the key is alone and nothing is wrong.
    method = sa.NearFar(block=32, clusters=4, near=1, tau=0.0, regions="blocks", metric="query")
    assert method.attend(problem) == pytest.approx(exact, rel=1e-6)


def test_rates_of_the_first_order() -> None:
    # Directions that the logits do not follow: one direction is no better than none.
    rng = np.random.default_rng(3)
    k, v = rng.standard_normal((64, 6)), rng.standard_normal((64, 2))
    q = rng.standard_normal((20, 6))

    def distance(size: float, order: int, followed: bool) -> float:
        form = Form("one", 64, 1, first_order=order)
        one = np.zeros(64, np.int64)
        problem = sa.AttentionProblem(q, size * k, v, scale=1.0)
        if followed:
            # Queries along the direction of the scores.
            z = given_clusters(problem, one, form._replace(first_order=1)).moments.z[0]
            direction = np.linalg.lstsq(k - k.mean(axis=0), z, rcond=None)[0]
            queries = np.outer(q[:, 0], direction / np.linalg.norm(direction))
            problem = sa.AttentionProblem(queries, size * k, v, scale=1.0)
        ahat = given_clusters(problem, one, form)
        return float(np.abs(ahat.to_dense() - problem.exact.to_dense()).sum())

    for followed, order, rate in ((True, 1, 4), (True, 0, 2), (False, 1, 2), (False, 0, 2)):
        found = distance(0.02, order, followed) / distance(0.01, order, followed)
        assert found == pytest.approx(rate, rel=0.05)


# --- one per cent ---------------------------------------------------------------------------------

# The problem that attains each inequality.
ATTAINED = {
    "promotion": "nearfar-golden",
    "interval": "far-shares",
    "tanh": "near-pair",
    "frozen": "near-pair",
    "first_order_divergence": "across",
}


@pytest.mark.parametrize(("name", "on"), ATTAINED.items())
def test_a_constant_that_is_one_per_cent_too_small_is_refuted(name: str, on: str) -> None:
    verdict = check(f"nearfar.{name}", on)
    assert verdict.status == "holds"
    assert check(f"nearfar.{name}", on, constant=0.99).status == "violated"


def test_every_inequality_has_a_problem_that_attains_it() -> None:
    tunable = {k for k, c in CLAIMS.items() if "constant" in c.constants} - REFUTED
    assert tunable == {f"nearfar.{name}" for name in ATTAINED}


# --- the record -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "on"), RECORDED)
def test_recorded_verdicts(name: str, on: str, global_random_seed: int) -> None:
    check_recorded(CLAIMS, name, on, rng=global_random_seed)


@pytest.mark.parametrize("name", on_heads(CLAIMS))
def test_recorded_verdicts_on_bundled_heads(name: str, global_random_seed: int) -> None:
    head = sa.load_heads()[global_random_seed % 12]
    recorded = CLAIMS[name].recorded
    verdict = check(name, head, rng=global_random_seed)
    assert verdict.status == recorded.get(str(head.name), recorded["heads"]), str(verdict)


def test_statuses() -> None:
    check_statuses(CLAIMS)
    assert {"nearfar.estimate"} == REFUTED


def test_claims_of_the_method_are_those_of_its_choices() -> None:
    chosen: dict[str, dict[str, Any]] = {
        "plain": {"first_order": 0},
        "none": {"second_order": "none", "first_order": 0},
        "one": {"first_order": 1},
    }
    claims = {name: set(sa.NearFar(**x).traits.claims) for name, x in chosen.items()}
    assert set().union(*claims.values()) == set(CLAIMS)
    assert {"nearfar.jensen", "nearfar.promotion"} == claims["none"] - claims["plain"]
    assert "nearfar.frozen" in claims["plain"] - claims["none"]
    assert all(x.startswith("nearfar.first_order") for x in claims["one"] - claims["plain"])


# --- negative controls ----------------------------------------------------------------------------


def honest(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
    """Write everything from its definition."""
    if kind == "merge":
        k, v = given["keys"], given["values"]
        key = k.mean(axis=0)
        radius = max(math.dist(x, key) for x in k)
        return np.array([len(k), *key, *k.var(axis=0), *v.mean(axis=0), radius])
    if kind == "output":
        return loops(given["problem"], given["form"])
    return formula(kind, **given)


def loops(problem: sa.AttentionProblem, form: Form, x: Array | None = None) -> Array:
    """Return the causal output with clusters of the keys, or of other rows x."""
    n, b, c = problem.n_k, form.block, form.clusters
    x = problem.k if x is None else x
    labels: list[int] = []
    for start in range(0, n, b):
        part = x[start : start + b]
        if len(part) == b:
            labels += [start // b * c + y for y in naive_farthest_first(part, c, 4)]
        else:
            labels += [-1] * len(part)
    seen = [
        {"own": list(range(i // b * b, i + 1)), "clusters": list(range(i // b * c))}
        for i in range(n)
    ]
    found = naive_nearfar(
        problem.q, problem.k, problem.values, labels, seen,
        scale=float(problem.scale), most=form.near, tau=form.tau,
    )  # fmt: skip
    return found[1]


def formula(
    kind: str,
    *,
    count: bool = True,
    parabola: bool = False,
    slope: float = 1.0,
    clip: float = 1.0,
    **given: Any,
) -> Array:
    """Return Ahat or log Zhat, row by row, with parts of the formula changed."""
    problem, form = given["problem"], given["form"]
    labels, direct, far, scores = (given[x] for x in ("labels", "direct", "far", "scores"))
    scale, q, k = problem.scale, problem.q, problem.k
    logits = scale * q @ k.T
    ahat, normalizers = np.zeros(logits.shape), np.empty(len(logits))
    for i in range(len(logits)):
        slots: list[tuple[Any, Any, Array]] = [
            (logits[i, j], [j], np.ones(1)) for j in np.flatnonzero(direct[i])
        ]
        for c in np.flatnonzero(far[i]):
            members = np.flatnonzero(labels == c)
            m, kappa = len(members), k[members].mean(axis=0)
            away = k[members] - kappa
            sigma = math.sqrt(scale**2 * q[i] ** 2 @ (away**2).mean(axis=0))
            g = scale * q[i] @ kappa + (math.log(m) if count else 0.0)
            if parabola:
                g += sigma**2 / 2
            elif form.second_order == "frozen":
                phi = float(np.asarray(nearfar.frozen_second_order(sigma, m)))
                radius = math.sqrt((away**2).sum(axis=1).max())
                g += min(phi, abs(scale) * float(np.linalg.norm(q[i])) * radius)
            weights = np.ones(m)
            for z in scores[:, members]:
                if z.any():
                    p = away.T @ z / (z @ z)
                    y, most = slope * scale * q[i] @ p, clip / (len(scores) * np.abs(z).max())
                    weights += np.clip(y, -most, most) * z
            slots.append((g, members, weights / m))
        top = max(x for x, _, _ in slots)
        normalizers[i] = top + math.log(sum(math.exp(x - top) for x, _, _ in slots))
        for x, keys, share in slots:
            ahat[i, keys] += math.exp(x - normalizers[i]) * share
    return ahat if kind == "nearfar" else normalizers


def changed(**options: Any) -> Factory:
    """Return an implementation with a part of the formula changed."""

    def broken(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
        return formula(kind, **options, **given)

    return broken


def moved(factor: float) -> Factory:
    """Return rows that are nearer to the exact ones, or farther."""

    def broken(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
        found = honest(kind, r, n, rng, **given)
        if kind != "nearfar":
            return found
        a = given["problem"].exact.to_dense()
        return a + factor * (found - a)

    return broken


def times(name: str, factor: float) -> Factory:
    """Return an implementation of which one part is too large."""

    def broken(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
        found = honest(kind, r, n, rng, **given)
        return factor * found if kind == name else found

    return broken


def without_second_order(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Forget phi."""
    given["form"] = given["form"]._replace(second_order="none")
    return honest(kind, r, n, rng, **given)


def without_direct(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Give a tenth of what a row reads key by key to the key after it."""
    found = honest(kind, r, n, rng, **given)
    if kind != "nearfar":
        return found
    return 0.9 * found + 0.1 * np.roll(found, 1, axis=1)


def without_between(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Average the variances of parts, and forget how far apart they are."""
    found = honest(kind, r, n, rng, **given)
    d, k, parts = given["keys"].shape[1], given["keys"], given["parts"]
    found[d + 1 : 2 * d + 1] = sum(len(x) * k[x].var(axis=0) for x in parts) / len(k)
    return found


def largest_radius(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Take the largest radius of a part for that of the union."""
    found = honest(kind, r, n, rng, **given)
    k = given["keys"]
    found[-1] = max(np.linalg.norm(k[x] - k[x].mean(axis=0), axis=1).max() for x in given["parts"])
    return found


def leaky(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Cluster in a metric of all queries."""
    problem, form = given["problem"], given["form"]
    sizes = regions.Sizes(form.block, 2, 1)
    made = regions.in_blocks(problem, sizes, regions.metric_root(problem), 0, True)
    return NearFarAttention(problem, made.clusters, made.rows, 1, 0.0) @ problem.values


def ahead(kind: str, r: int, n: int, rng: Any, **given: Any) -> Any:
    """Let the clusters of a block change with the keys after it."""
    problem = given["problem"]
    return loops(problem, given["form"]._replace(clusters=2), np.flip(problem.k, axis=0).copy())


class Drifting:
    """Lose a little more of the normaliser at every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
        found = honest(kind, r, n, rng, **given)
        if kind != "log_normalizer":
            return found
        self.calls += 1
        return found - 0.5 * self.calls


CONTROLS: list[tuple[str, str, Factory]] = [
    ("rows", "nearfar-golden", times("nearfar", 1.01)),
    ("rows", "nearfar-golden", changed(clip=3.0)),
    ("rows", "causal", without_direct),
    ("exact_near", "nearfar-golden", without_direct),
    ("exact_keys", "nearfar-golden", changed(count=False)),
    ("exact_keys", "causal", changed(count=False)),
    ("jensen", "nearfar-golden", changed(parabola=True)),
    ("jensen", "causal", times("log_normalizer", 1.01)),
    ("promotion", "nearfar-golden", Drifting()),
    ("promotion", "nearfar-golden", changed(parabola=True)),
    ("interval", "far-shares", changed(parabola=True)),
    ("interval", "nearfar-golden", changed(count=False)),
    ("interval", "causal", times("log_normalizer", 1.2)),
    ("tanh", "near-pair", moved(1.01)),
    ("frozen", "nearfar-golden", changed(parabola=True)),
    ("frozen", "causal", times("log_normalizer", 1.01)),
    ("frozen_above", "reference", without_second_order),
    ("frozen_gap", "reference", changed(parabola=True)),
    ("first_order_divergence", "nearfar-golden", changed(slope=-1.0)),
    ("first_order_divergence", "causal", changed(slope=3.0, clip=3.0)),
    ("first_order_rate", "nearfar-golden", changed(slope=0.0)),
    ("first_order_rate", "causal", changed(slope=1.01)),
    ("merge", "nearfar-golden", without_between),
    ("merge", "far-shares", largest_radius),
    ("causal", "nearfar-golden", leaky),
    ("causal", "nearfar-golden", ahead),
]


@pytest.mark.parametrize(("name", "on", "broken"), CONTROLS)
def test_broken_implementations_are_reported(name: str, on: str, broken: Factory) -> None:
    check_reported(f"nearfar.{name}", on, broken)


@pytest.mark.parametrize(("name", "on"), sorted({(name, on) for name, on, _ in CONTROLS}))
def test_an_implementation_from_the_definition_is_not_reported(name: str, on: str) -> None:
    check_not_reported(f"nearfar.{name}", on, honest, allowed=["holds"])


def test_every_theorem_has_a_control() -> None:
    assert {f"nearfar.{name}" for name, _, _ in CONTROLS} == set(CLAIMS) - REFUTED


def test_an_estimate_that_is_large_enough_is_not_refuted() -> None:
    def generous(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
        return 2.0 if kind == "estimate" else honest(kind, r, n, rng, **given)

    assert check("nearfar.estimate", "unseen-key", sketch=generous).status == "holds"


# --- odd problems ---------------------------------------------------------------------------------


def test_odd_problems_get_a_verdict() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((5, 3)), rng.standard_normal((9, 3)), rng.standard_normal((9, 2))
    mask = np.arange(9) % 3 > 0
    odd = [
        sa.AttentionProblem(q[:1], k[:1], v[:1], name="one"),
        sa.AttentionProblem(q, k, v, key_mask=mask, name="masked"),
        sa.AttentionProblem(k, k, v, key_mask=mask, name="masked and square"),
        sa.AttentionProblem(q, k, np.zeros((9, 2)), name="zero values"),
        sa.AttentionProblem(q, k, name="no values"),
        sa.AttentionProblem(k, k, v, causal=True, name="causal"),
        sa.AttentionProblem(k, k, v, causal=True, key_mask=~mask, name="causal and masked"),
        sa.AttentionProblem(1e3 * q, k, v, name="large logits"),
        sa.AttentionProblem(1e3 * k, k, v, name="large logits and square"),
        sa.AttentionProblem(0 * q, k, v, name="uniform"),
        sa.AttentionProblem(q, k, v, scale=-0.5, name="negative scale"),
        sa.AttentionProblem(q[:4], k, v, causal="bottom-right", name="bottom-right"),
        sa.AttentionProblem(q, k, v, key_mask=np.zeros(9, bool), name="no keys"),
    ]
    check_odd(CLAIMS, odd, trials=20)


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_verdicts_repeat_and_bounds_need_no_draw(name: str) -> None:
    check_repeats(CLAIMS, name)


def test_one_cluster_is_one() -> None:
    problem = problem_on("nearfar-golden")
    ahat = matrix_of(problem, one_cluster(problem))
    assert ahat.clusters.count == 1
    assert np.ptp(ahat.to_dense(), axis=1).max() < 1e-15
