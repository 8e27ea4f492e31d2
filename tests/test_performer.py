"""Performer: its two forms, its random matrix, its errors, and what released variants do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from method_cases import make_problem
from naive import naive_performer
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.kernels._threads import limit_threads
from sketchattn.zoo.performer import PrefixAttention, feature_mse, gaussian_directions

Array = NDArray[Any]

# A pair of scaled rows with s = |x + y|^2 = .5725, at which estimates have tame tails.
X = np.array([0.5, -0.2, 0.1, 0.3])
Y = np.array([0.1, 0.2, -0.2, 0.15])

pytestmark = pytest.mark.usefixtures("one_thread")


def moderate(n_q: int, n_k: int, dtype: Any = np.float64, **options: Any) -> sa.AttentionProblem:
    return make_problem(n_q, n_k, dtype, scale=0.3, **options)


# --- the formula --------------------------------------------------------------------------------

FORMS: list[dict[str, Any]] = [
    {},
    {"orthogonal": False},
    {"features": "hyperbolic"},
    {"features": "trigonometric"},
    {"eps": 1e-3},
    {"preset": "performer-pytorch"},
]


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("causal", [False, True, "bottom-right", "top-left"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_formula_by_loops(
    options: dict[str, Any], causal: Any, masked: bool, dtype: Any
) -> None:
    method = sa.Performer(5, **options)
    if causal and not method.traits.causal:
        return
    n_q = {False: 7, True: 12, "bottom-right": 15, "top-left": 16}[causal]
    mask = np.arange(12) % 4 != 0 if masked else None
    problem = moderate(n_q, 12, dtype, causal=causal, key_mask=mask)
    draw = method.draw(problem, rng=2)
    ahat = method.approximate(problem, draw=draw)
    q, k, v = (np.asarray(x, np.float64) for x in (problem.q, problem.k, problem.values))
    form = method.form
    weights, out = naive_performer(
        q,
        k,
        v,
        draw["features"],
        scale=problem.scale,
        features=form.features,
        eps=form.eps,
        offset=problem.offset if causal else None,
        key_mask=mask,
    )
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    if form.features == "trigonometric":  # signed terms cancel in the normaliser
        tolerance *= 10 * max(1.0, float(np.abs(weights).max()))
    size = np.abs(v).max()
    assert np.abs(ahat.to_dense() - weights).max() <= tolerance
    assert np.abs(ahat @ problem.values - out).max() <= tolerance * size
    assert np.abs(method.attend(problem, draw=draw) - out).max() <= tolerance * size
    y = np.random.default_rng(3).standard_normal((n_q, 2)).astype(dtype)
    assert np.abs(ahat.T @ y - weights.T @ y).max() <= n_q * tolerance * 4
    rows = np.array([0, n_q - 1])
    assert np.abs(ahat.rows(rows) - weights[rows]).max() <= tolerance
    wide = ahat.wide()
    assert wide.dtype == np.float64
    expected = method.approximate(problem.astype(np.float64), draw=draw).to_dense()
    assert np.array_equal(wide.to_dense(), expected)


@pytest.mark.parametrize("scale", [0.02, 0.5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_outputs_with_eps_hold_no_features(scale: float, dtype: Any) -> None:
    # More rows than maxima are taken of at a time, and exponents of -100 and more.
    mask = np.arange(1500) % 7 != 0
    problem = make_problem(1100, 1500, dtype, d=8, key_mask=mask, scale=scale)
    method = sa.Performer(20, eps=1e-3)
    draw = method.draw(problem, rng=0)
    out = method.attend(problem, draw=draw)
    ahat = method.approximate(problem.astype(np.float64), draw=draw)
    expected = ahat @ problem.values.astype(np.float64)
    # Exponents of size 200 carry 200 roundings, and the weights that many more than a term of 1.
    tolerance = 1000 * float(np.finfo(dtype).eps) * np.abs(problem.values).max()
    assert out.dtype == dtype
    assert np.abs(out - expected).max() <= tolerance
    other = sa.Performer(20, eps=0.1).attend(problem, draw=draw)
    assert np.abs(other - expected).max() > 10 * tolerance


@pytest.mark.parametrize("side", ["k", "q"])
def test_features_with_eps_that_overflow_are_refused(side: str) -> None:
    arrays = {x: np.ones((6, 4), np.float32) for x in "qkv"}
    arrays[side][3] = 3e38
    problem = sa.AttentionProblem(*arrays.values(), scale=1e-3)  # whose logits are finite
    draw = {"features": np.full((5, 4), 900.0)}
    with pytest.raises(ValueError, match=rf"^features @ {side}.T must be finite, got "):
        sa.Performer(5, eps=1e-3).attend(problem, draw=draw)


def test_a_negative_scale_is_honoured() -> None:
    problem = moderate(6, 8)
    turned = sa.AttentionProblem(problem.q, -problem.k, problem.v, scale=-problem.scale)
    first, second = (sa.Performer(4).attend(x, rng=0) for x in (problem, turned))
    assert np.abs(first - second).max() <= 1e-14


@pytest.mark.parametrize("features", ["positive", "hyperbolic"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_overflows_and_outputs_stay_in_the_hull(
    features: str, causal: bool, dtype: Any
) -> None:
    plain = make_problem(40, 40, dtype)
    problem = sa.AttentionProblem(
        80 * plain.q, 80 * plain.k, plain.values, scale=0.5, causal=causal
    )
    assert np.abs(0.5 * problem.q @ problem.k.T).max() > 1e4
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        ahat = sa.Performer(8, features).approximate(problem, rng=0)
        out = ahat @ problem.values
    tolerance = 1e-10 if dtype == np.float64 else 1e-5
    assert np.abs(ahat.row_sums() - 1).max() <= tolerance
    assert ahat.to_dense().min() >= 0
    v = problem.values
    for i in range(40):
        seen = v[: i + 1] if causal else v
        assert (out[i] >= seen.min(axis=0) - tolerance * 4).all()
        assert (out[i] <= seen.max(axis=0) + tolerance * 4).all()
    # The quotient as it is written has no value here.
    w = sa.Performer(8, features).draw(problem, rng=0)["features"]
    with np.errstate(all="ignore"):
        x, y = (math.sqrt(0.5) * z.astype(np.float64) for z in (problem.q, problem.k))
        phi = [np.exp(z @ w.T - 0.5 * np.sum(z * z, axis=1)[:, None]) for z in (x, y)]
        naive = phi[0] @ phi[1].T
        assert not np.isfinite(naive / naive.sum(axis=1, keepdims=True)).all()


def test_factors_know_what_they_are() -> None:
    problem = moderate(9, 12)
    for features, expected in (("positive", True), ("hyperbolic", True), ("trigonometric", False)):
        method = sa.Performer(6, features)
        ahat = method.approximate(problem, rng=0)
        assert isinstance(ahat, sa.FactoredAttention)
        assert ahat.row_stochastic == ahat.nonnegative == expected
        assert method.traits.row_stochastic == method.traits.nonnegative == expected
        assert ahat.rank_bound == min(9, 6 if features == "positive" else 12)
        assert ahat.nbytes > 0
    u, p = np.full((3, 2), 0.5), np.full((2, 4), 0.25)
    core = np.array([[0.25, 0.75], [1.0, 0.0]])
    assert sa.FactoredAttention(u, core, p).row_stochastic
    assert sa.FactoredAttention(u, np.ones(2), p).row_stochastic
    assert not sa.FactoredAttention(u, np.array([1.0, 0.5]), p).row_stochastic
    assert sa.FactoredAttention(u, np.array([1.0, 0.5]), p).nonnegative
    assert not sa.FactoredAttention(u, np.array([1.0, -1.0]), p).nonnegative
    assert not sa.FactoredAttention(2 * u, None, p).row_stochastic
    assert not sa.FactoredAttention(u, None, -p).nonnegative


def test_trigonometric_normalisers_are_counted() -> None:
    problem = make_problem(60, 60, scale=1.0)
    details = sa.Performer(3, "trigonometric").details(problem, rng=0)
    assert details.nonpositive > 0
    draw = sa.Performer(3, "trigonometric").draw(problem, rng=0)
    x, y, w = problem.q, problem.k, draw["features"]
    angles = x @ w.T, y @ w.T
    size = np.exp(0.5 * np.sum(y * y, axis=1))
    total = (np.cos(angles[0][:, None] - angles[1][None]).sum(axis=2) * size).sum(axis=1)
    assert details.nonpositive == int((total <= 0).sum())
    positive = sa.Performer(3).details(problem, draw=draw)
    assert positive.nonpositive == 0
    pairs = ((x[:, None] + y[None]) ** 2).sum(axis=2)
    assert pairs.max() <= positive.largest_sum
    assert positive.relative_variance >= math.expm1(pairs.max()) / 3


# --- causal -------------------------------------------------------------------------------------


def test_later_keys_are_not_read() -> None:
    problem = moderate(30, 30, causal=True)
    k, v = problem.k.copy(), problem.values.copy()
    k[20:] += 50.0  # far larger than anything before
    v[20:] = 1e6
    other = sa.AttentionProblem(problem.q, k, v, scale=0.3, causal=True)
    method = sa.Performer(6)
    draw = method.draw(problem, rng=0)
    first, second = (method.attend(x, draw=draw) for x in (problem, other))
    assert np.array_equal(first[:20], second[:20])
    assert not np.array_equal(first[20:], second[20:])
    # A maximum over all keys, as released codes take it, would show: those forms are refused.
    refused: list[dict[str, Any]] = [{"eps": 1e-6}, {"preset": "google"}, {"center_keys": True}]
    for options in refused:
        with pytest.raises(ValueError, match="^causal must be False for method 'performer' with"):
            sa.Performer(6, **options).approximate(problem, draw=draw)


def test_threads_do_not_change_the_bits() -> None:
    for causal in (False, True):
        problem = moderate(400, 400, np.float32, d=8, causal=causal)
        wide = np.random.default_rng(0).standard_normal((400, 70)).astype(np.float32)
        results = []
        for count in (1, 2):
            with limit_threads(count):
                ahat = sa.Performer(40).approximate(problem, rng=0)
                results.append((ahat @ wide, ahat.T @ wide))
        assert np.array_equal(results[0][0], results[1][0])
        assert np.array_equal(results[0][1], results[1][1])
        assert isinstance(ahat, PrefixAttention) == causal
    # Several pieces of the keys, which are summed apart.
    problem = moderate(600, 3000, np.float32, d=8)
    outputs = []
    for count in (1, 2):
        with limit_threads(count):
            outputs.append(sa.Performer(40, eps=1e-3).attend(problem, rng=0))
    assert np.array_equal(outputs[0], outputs[1])


# --- the random matrix --------------------------------------------------------------------------


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_larger_rank_extends_a_smaller_one(orthogonal: bool, global_random_seed: int) -> None:
    large = gaussian_directions(11, 4, global_random_seed, orthogonal=orthogonal)
    for r in (1, 3, 4, 5, 8):
        small = gaussian_directions(r, 4, global_random_seed, orthogonal=orthogonal)
        assert np.array_equal(small, large[:r])
    for start in (0, 4, 8):
        block = large[start : start + 4]
        gram = block @ block.T
        off = np.abs(gram - np.diag(np.diag(gram))).max()
        assert (off <= 1e-12 * np.diag(gram).max()) == orthogonal


def first_entries(count: int, d: int, seed: int, **options: Any) -> Array:
    """Return Qm_11 of many blocks: the first entry of the first direction over its norm."""
    rng = np.random.default_rng(seed)
    rows = (gaussian_directions(1, d, rng, **options)[0] for _ in range(count))
    return np.array([row[0] / np.linalg.norm(row) for row in rows])


@pytest.mark.statistical
def test_the_sign_fix_makes_directions_uniform(global_random_seed: int) -> None:
    # Qm_11 has mean 0 and variance 1/d: five standard errors, level 6e-7.
    d, count = 4, 4000
    fixed = first_entries(count, d, global_random_seed)
    assert abs(fixed.mean()) <= 5 / math.sqrt(d * count)
    unfixed = first_entries(count, d, global_random_seed, sign_fix=False)
    expected = -math.gamma(d / 2) / (math.sqrt(math.pi) * math.gamma((d + 1) / 2))
    assert abs(unfixed.mean() - expected) <= 5 / math.sqrt(d * count)
    assert abs(unfixed.mean()) > 5 / math.sqrt(d * count)


def estimates(
    count: int, r: int, features: str, seed: int, x: Array, y: Array, **options: Any
) -> Array:
    """Return estimates of exp(x . y), one for each of ``count`` draws of all r directions."""
    d = len(x)
    if options.get("orthogonal", True):
        made = np.empty((count, r, d))
        rng = np.random.default_rng(seed)
        for start in range(0, r, d):
            basis, upper = np.linalg.qr(rng.standard_normal((count, d, d)))
            if options.get("sign_fix", True):
                basis = basis * np.sign(np.diagonal(upper, axis1=1, axis2=2))[:, None]
            norms = np.linalg.norm(rng.standard_normal((count, d, d)), axis=2)
            block = norms[:, :, None] * basis.transpose(0, 2, 1)
            made[:, start : start + d] = block[:, : r - start]
    else:
        made = np.random.default_rng(seed).standard_normal((count, r, d))
    half = 0.5 * float(x @ x + y @ y)
    forms: dict[str, Callable[[], Array]] = {
        "positive": lambda: np.exp(made @ (x + y) - half),
        "hyperbolic": lambda: np.cosh(made @ (x + y)) * math.exp(-half),
        "trigonometric": lambda: np.cos(made @ (x - y)) * math.exp(half),
    }
    return np.asarray(forms[features]().mean(axis=1))


@pytest.mark.statistical
@pytest.mark.parametrize("sign", [1, -1])
def test_estimates_are_unbiased_with_the_sign_fix_only(sign: int, global_random_seed: int) -> None:
    # |x + y| = 1 along the diagonal, d = 4; E - SM in standard errors: level 6e-7 (normal).
    x = y = sign * np.full(4, 0.25)
    truth = math.exp(float(x @ y))
    for fixed in (True, False):
        made = estimates(40000, 4, "positive", global_random_seed, x, y, sign_fix=fixed)
        distance = abs(made.mean() - truth) / (made.std() / math.sqrt(len(made)))
        assert (distance <= 5) == fixed
    # Hyperbolic features are even in omega: signs do not matter to them.
    made = estimates(40000, 4, "hyperbolic", global_random_seed, x, y, sign_fix=False)
    assert abs(made.mean() - truth) <= 5 * made.std() / math.sqrt(len(made))


# --- errors of one entry ------------------------------------------------------------------------

GOLDEN = [
    ("positive", False, 0.2071799579),
    ("hyperbolic", False, 0.0451534847),
    ("trigonometric", False, 0.0254707727),
    ("positive", True, 0.1881378862),
    ("hyperbolic", True, 0.0261114128),
    ("trigonometric", True, 0.0115009101),
]
KURTOSIS = {"positive": 27.4, "hyperbolic": 43.9, "trigonometric": 8.13}


@pytest.mark.parametrize(("features", "orthogonal", "value"), GOLDEN)
def test_errors_have_their_golden_values(features: str, orthogonal: bool, value: float) -> None:
    found = feature_mse(X, Y, 4, features, orthogonal=orthogonal)
    assert found == pytest.approx(value, rel=0, abs=1e-9)


def test_blocks_count_their_pairs() -> None:
    assert feature_mse(X, Y, 6) == pytest.approx(0.1282463, abs=1e-7)  # blocks of 4 and 2
    iid, gain = feature_mse(X, Y, 6, orthogonal=False), 0.0253894291
    assert feature_mse(X, Y, 6) == pytest.approx(iid - gain * 14 / 36, abs=1e-9)
    assert feature_mse(X, Y, 1) == feature_mse(X, Y, 1, orthogonal=False)


@pytest.mark.statistical
@pytest.mark.parametrize(("features", "orthogonal"), [(f, o) for f, o, _ in GOLDEN])
def test_errors_are_those_of_the_formulas(
    features: str, orthogonal: bool, global_random_seed: int
) -> None:
    # Mean of T squared errors of a mean of r terms with kurtosis kappa: relative standard error
    # sqrt(((kappa - 3)/r + 2)/T) if independent; five of them, and half as much again with blocks.
    count, r = 60000, 4
    made = estimates(count, r, features, global_random_seed, X, Y, orthogonal=orthogonal)
    found = float(np.mean((made - math.exp(float(X @ Y))) ** 2))
    expected = feature_mse(X, Y, r, features, orthogonal=orthogonal)
    allowed = 5 * math.sqrt(((KURTOSIS[features] - 3) / r + 2) / count)
    allowed *= 1.5 if orthogonal else 1.0
    assert abs(found / expected - 1) <= allowed
    # The formula of the other kind of directions is refuted by the same numbers.
    other = feature_mse(X, Y, r, features, orthogonal=not orthogonal)
    if features != "positive":
        assert abs(found / other - 1) > allowed


def test_the_corrected_bound_for_orthogonal_features_holds() -> None:
    # MSE_ort <= MSE_iid - 2(r-1)/(r(d+2)) (SM - e^(-n2/2))^2 for r <= d; with SM^2 in place of the
    # square, as it was first printed, it is wrong.
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        d = int(rng.integers(1, 9))
        r = int(rng.integers(1, d + 1))
        x, y = rng.uniform(0.1, 0.8) * rng.standard_normal((2, d))
        iid, ort = (feature_mse(x, y, r, orthogonal=o) for o in (False, True))
        truth, n2 = math.exp(float(x @ y)), float(x @ x + y @ y)
        factor = 2 * (r - 1) / (r * (d + 2))
        assert ort <= iid - factor * (truth - math.exp(-n2 / 2)) ** 2 + 1e-12 * (1 + iid)
        wrong += ort > iid - (1 - 1 / r) * 2 / (d + 2) * truth**2 + 1e-12
    assert wrong > 0
    x = np.array([0.7, 0.2, -0.3, 0.4])
    assert feature_mse(x, -x, 4) == pytest.approx(0.0, abs=1e-15)
    for features, most in (("positive", 233.333), ("trigonometric", 700.0)):
        size = np.sqrt(0.49 * most)
        assert np.isfinite(feature_mse([size], [size], 4, features))
        with pytest.raises(ValueError, match=r"^x and y must have \|x\|\^2 \+ \|y\|\^2 below"):
            feature_mse([1.1 * size], [size], 4, features)
    claimed = -(1 - 1 / 4) * 2 / 6 * math.exp(-2 * float(x @ x))
    assert claimed == pytest.approx(-0.0525340, abs=1e-6)


# --- released variants --------------------------------------------------------------------------


def test_eps_turns_it_into_the_mean_of_v() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((512, 64)) for _ in range(3))
    problem = sa.AttentionProblem(q, k, v)
    size = np.linalg.norm(problem.output)
    mean = np.linalg.norm(v.mean(axis=0) - problem.output) / size
    errors = {}
    for eps in (1e-4, 0.0):
        out = sa.Performer(512, eps=eps).attend(problem, rng=0)
        errors[eps] = np.linalg.norm(out - problem.output) / size
    assert abs(errors[1e-4] - mean) <= 0.01
    assert errors[0.0] > mean + 0.5


def test_presets_are_their_parameters() -> None:
    problem = moderate(8, 10)
    for preset, eps in (("google", 1e-6), ("performer-pytorch", 1e-4)):
        first = sa.Performer(6, preset=preset).attend(problem, rng=0)
        second = sa.Performer(6, eps=eps, sign_fix=False).attend(problem, rng=0)
        assert np.array_equal(first, second)
    assert not np.array_equal(first, sa.Performer(6).attend(problem, rng=0))


def test_centred_keys_are_another_estimator_of_the_same_matrix() -> None:
    problem = moderate(8, 10)
    moved = sa.AttentionProblem(problem.q, problem.k + 1.0, problem.v, scale=0.3)
    centred, plain = sa.Performer(6, center_keys=True), sa.Performer(6)
    first, second = (centred.attend(x, rng=0) for x in (problem, moved))
    assert np.abs(first - second).max() <= 1e-12
    assert np.abs(plain.attend(problem, rng=0) - plain.attend(moved, rng=0)).max() > 1e-3


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"features": "relu"}, ValueError, "features must be one of positive, hyperbolic, trigonom"),
    ({"orthogonal": 1}, TypeError, "orthogonal must be a bool, got int"),
    ({"eps": -1.0}, ValueError, "eps must be finite and at least 0, got -1.0"),
    ({"eps": "1e-4"}, TypeError, "eps must be a real number, got str"),
    ({"eps": 1e-4, "features": "hyperbolic"}, ValueError, "eps must be 0 for hyperbolic features"),
    ({"sign_fix": False, "orthogonal": False}, ValueError, "sign_fix must be True with orthogonal"),
    ({"preset": "gogle"}, ValueError, "preset must be a known name, got 'gogle'; did you mean"),
    ({"preset": "google", "eps": 1e-4}, ValueError, "eps must be left at 0.0 with preset 'google'"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD)
def test_refusals(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        sa.Performer(5, **options).approximate(moderate(8, 8), rng=0)


@pytest.mark.parametrize(
    ("features", "error", "text"),
    [
        (np.ones((4, 4)), ValueError, "features must have shape (rank, d) = (5, 4), got (4, 4)"),
        (np.full((5, 4), np.inf), ValueError, "features must be finite"),
        (np.ones((5, 4), int), TypeError, "features must be float16, bfloat16, float32 or float64"),
    ],
)
def test_draws_that_do_not_fit_are_refused(
    features: Array, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        sa.Performer(5).approximate(moderate(8, 8), draw={"features": features})


def test_norms_beyond_the_precision_are_refused() -> None:
    q = np.ones((4, 4), np.float32)
    for causal in (False, True):
        problem = sa.AttentionProblem(q, 1e25 * q, q, causal=causal)
        with (
            np.errstate(over="ignore", invalid="ignore"),
            pytest.raises(ValueError, match=r"must be finite"),
        ):
            sa.Performer(2).attend(problem, rng=0)
