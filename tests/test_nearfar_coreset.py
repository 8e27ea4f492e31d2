"""A coreset for the far keys of nearfar: the formula, limits, its draw, and errors on heads."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from method_cases import dense_attention, make_problem, rounding
from naive import naive_nearfar_coreset
from numpy.typing import NDArray
from test_nearfar import changed, message, real

import sketchattn as sa
from sketchattn.kernels._threads import limit_threads
from sketchattn.operators.nearfar import NearFarAttention
from sketchattn.operators.nearfar_coreset import CoresetNearFarAttention
from sketchattn.zoo.nearfar import method as nearfar

Array = NDArray[Any]
PRECISIONS = [np.float32, np.float64]

pytestmark = pytest.mark.usefixtures("one_thread")


def coreset(**options: Any) -> sa.NearFar:
    return sa.NearFar(far="coreset", **{"block": 8, "clusters": 3, **options})


def matrix(
    method: sa.NearFar, problem: sa.AttentionProblem, rng: int = 0
) -> CoresetNearFarAttention:
    ahat = method.approximate(problem, rng=rng)
    assert isinstance(ahat, CoresetNearFarAttention)
    return ahat


# --- the formula --------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "square": (29, 29, {}),
    "wide": (7, 29, {}),
    "tall": (35, 29, {}),
    "masked": (29, 29, {"key_mask": np.arange(29) % 3 > 0}),
}
FORMS: list[dict[str, Any]] = [
    {"near": 0, "pivots": 9},
    {"near": 2, "pivots": 12},
    {"near": 5, "pivots": 12, "tau": 0.05},
    {"near": 2, "pivots": 5, "metric": "key", "second_order": "none"},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_weights_are_those_of_the_loops(form: dict[str, Any], shape: str) -> None:
    n_q, n_k, given = SHAPES[shape]
    problem = make_problem(n_q, n_k, **given)
    method, kept = coreset(**form), problem.kept_keys
    ahat = matrix(method, problem)
    wanted, near, ratios = naive_nearfar_coreset(
        problem.q, problem.k[kept], ahat.clusters.labels.tolist(), ahat.pivots.tolist(),
        ahat.weights, scale=problem.scale, most=form["near"], tau=form.get("tau", 0.0),
        second_order=form.get("second_order") != "none",
    )  # fmt: skip
    # No row of these is below the line where it would have moments.
    assert min(ratios) > 0.5 + 1e-6
    assert not len(ahat.others)
    assert [sorted(x[x >= 0].tolist()) for x in ahat.near] == near
    if form.get("tau"):
        assert {len(x) for x in near} != {5}
    # Pivots weigh up to some tens, and what they say of near clusters is a difference.
    tolerance = 100 * rounding(problem)
    dense = ahat.to_dense()
    assert np.abs(dense[:, kept] - wanted).max() <= tolerance
    assert not np.delete(dense, kept, axis=1).any()
    out = wanted @ problem.values[kept]
    output, lse = method.attend_with_lse(problem, rng=0)
    assert np.abs(output - out).max() <= 4 * tolerance
    assert np.abs(lse - ahat.log_normalizer).max() <= tolerance
    assert np.abs(ahat @ problem.values - out).max() <= 4 * tolerance
    y = np.random.default_rng(1).standard_normal((n_q, 5))
    assert np.abs((ahat.T @ y)[kept] - wanted.T @ y).max() <= 8 * tolerance * n_q
    some = [n_q - 1, 0]
    assert np.array_equal(ahat.rows(some), dense[some])
    assert np.abs(ahat.columns([4])[:, 0] - dense[:, 4]).max() <= tolerance
    sizes = np.bincount(ahat.clusters.labels, minlength=ahat.clusters.count)
    reads = [form["pivots"] + int(sizes[x].sum()) for x in near]
    assert ahat.reads(problem).tolist() == reads
    assert ahat.effective_rank == min(int(np.ceil(np.mean(reads))), len(kept))


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_rows_sum_to_one_and_products_are_linear(dtype: Any) -> None:
    problem = make_problem(300, 300, dtype, d=8)
    method = sa.NearFar(far="coreset", near=3, pivots=40, block=64, clusters=4)
    ahat = matrix(method, problem)
    tolerance = 400 * float(np.finfo(dtype).eps)
    dense = ahat.to_dense()
    assert np.abs(ahat.row_sums() - 1).max() <= tolerance
    assert np.abs(dense.sum(axis=1) - 1).max() <= tolerance
    # More columns than are multiplied at a time.
    x = np.random.default_rng(1).standard_normal((300, 150)).astype(dtype)
    assert np.abs(ahat @ x - dense @ x).max() <= 10 * tolerance
    assert np.abs(ahat.T @ x - dense.T @ x).max() <= 10 * tolerance
    wide = ahat.wide()
    assert np.abs(wide.to_dense() - dense).max() <= tolerance
    assert np.array_equal(wide.near, ahat.near)  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(ahat))
    assert np.array_equal(again @ x, ahat @ x)


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_where_all_clusters_are_near(shape: str, dtype: Any) -> None:
    n_q, n_k, given = SHAPES[shape]
    problem = make_problem(n_q, n_k, dtype, **given)
    exact = dense_attention(problem)
    ahat = matrix(coreset(near=99, pivots=6), problem)
    assert np.abs(ahat.to_dense() - exact).max() <= rounding(problem)
    # What the pivots say is taken out of every product; of few clusters it is not.
    tolerance = 100 * rounding(problem)
    assert np.abs(ahat @ problem.values - exact @ problem.values).max() <= tolerance
    less = matrix(coreset(near=1, pivots=6), problem)
    assert np.abs(less.to_dense() - exact).max() > 0.01


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_near_clusters_it_is_wildcat(shape: str, dtype: Any) -> None:
    n_q, n_k, given = SHAPES[shape]
    problem = make_problem(n_q, n_k, dtype, **given)
    method, other = coreset(near=0, pivots=9), sa.WildCat(rank=9)
    draw = method.draw(problem, rng=3)
    assert np.array_equal(draw["pivots"], other.draw(problem, rng=3)["pivots"])
    output, lse = other.attend_with_lse(problem, draw=dict(draw))
    assert np.isfinite(lse).all()
    found, found_lse = method.attend_with_lse(problem, draw=draw)
    tolerance = 100 * rounding(problem)
    assert np.abs(found - output).max() <= tolerance
    assert np.abs(found_lse - lse).max() <= tolerance
    dense = other.approximate(problem, draw=dict(draw)).to_dense()
    assert np.abs(method.approximate(problem, draw=draw).to_dense() - dense).max() <= tolerance


def test_pivots_of_all_keys_are_exact() -> None:
    problem = make_problem(29, 29)
    ahat = matrix(coreset(near=2, pivots=29), problem)
    assert np.abs(ahat.to_dense() - dense_attention(problem)).max() <= 1e-8


def test_rows_without_a_safe_normaliser_have_moments() -> None:
    problem = make_problem(29, 29)
    made = matrix(coreset(near=2, pivots=9), problem)
    # Weights that take away what they should give, from some of the rows.
    weights = made.weights.copy()
    weights[:4] *= -1
    ahat = CoresetNearFarAttention(
        problem, made.pivots, weights, made.clusters, made.layout, 2, 0.0
    )  # fmt: skip
    others = ahat.others
    assert 0 < len(others) < 29
    e = np.exp(problem.scale * problem.q @ problem.k.T)
    whole = e[:, made.pivots] @ weights
    read = np.isin(made.clusters.labels[None, :], -1) | np.array(
        [np.isin(made.clusters.labels, x[x >= 0]) for x in ahat.near]
    )
    exact = np.where(read, e, 0).sum(axis=1)
    total = exact + np.where(read, 0, whole).sum(axis=1)
    assert np.array_equal(others, np.flatnonzero(total <= 0.5 * exact))
    moments = NearFarAttention(
        problem, made.clusters, made.layout, 2, 0.0, np.ascontiguousarray(ahat.near)
    )
    dense = ahat.to_dense()
    assert np.abs(dense[others] - moments.rows(others)).max() <= rounding(problem)
    assert dense[others].min() >= 0
    assert np.abs(dense.sum(axis=1) - 1).max() <= 1e-12
    v, y = problem.values, np.random.default_rng(1).standard_normal((29, 3))
    assert np.abs(ahat @ v - dense @ v).max() <= 1e-12
    assert np.abs(ahat.T @ y - dense.T @ y).max() <= 1e-12
    assert np.abs(ahat.rows([int(others[0])]) - dense[others[:1]]).max() == 0
    assert np.abs((ahat.log_normalizer - moments.log_normalizer)[others]).max() <= 1e-12
    assert ahat.reads(problem)[others[0]] == moments.reads(problem)[others[0]]
    narrow = CoresetNearFarAttention(
        problem.astype(np.float32), made.pivots, weights, made.clusters, made.layout, 2, 0.0
    )
    assert np.array_equal(narrow.wide().others, narrow.others)  # type: ignore[attr-defined]


def test_huge_logits_are_finite() -> None:
    rng = np.random.default_rng(0)
    q, k = (100 * rng.standard_normal((2, 300, 4))).astype(np.float32)
    v = rng.standard_normal((300, 3)).astype(np.float32)
    for scale in (0.5, 0.005):  # of steep rows, and of those that fold near keys above the rest
        problem = sa.AttentionProblem(q, k, v, scale=scale)
        method = sa.NearFar(far="coreset", pivots=20, near=3, block=64, clusters=4)
        out = method.attend(problem, rng=0)
        assert np.isfinite(out).all()
        ahat = matrix(method, problem)
        assert (len(ahat.others) > 0) == (scale == 0.5) or len(ahat.others) < 300
        dense = ahat.to_dense()
        assert np.abs(dense.sum(axis=1) - 1).max() <= 1e-4
        assert np.abs(dense @ v - out).max() <= 1e-2  # logits of 1e3 in float32


def test_a_near_key_far_above_all_pivots_moves_the_largest_logit() -> None:
    # No pivot is the key that has all the mass, 900 above the others.
    k = np.zeros((64, 2))
    k[:, 1] = np.arange(64) * 1e-3
    k[5, 0] = 900.0
    q = np.zeros((64, 2))
    q[:, 0] = 1.0
    v = np.eye(64)
    for dtype in PRECISIONS:
        problem = sa.AttentionProblem(q.astype(dtype), k.astype(dtype), v.astype(dtype), scale=1.0)
        method = sa.NearFar(far="coreset", pivots=3, near=2, block=16, clusters=1)
        out = method.attend(problem, draw={"pivots": np.array([10, 20, 30])})
        assert np.abs(out - v[5]).max() <= 1e-6


def test_no_keys_and_one_key() -> None:
    problem = make_problem(5, 6, key_mask=np.zeros(6, bool))
    output, lse = coreset().attend_with_lse(problem, rng=0)
    assert not output.any()
    assert (lse == -np.inf).all()
    assert not coreset().approximate(problem, rng=0).to_dense().any()
    one = make_problem(5, 1)
    assert np.abs(coreset().attend(one, rng=0) - one.values[0]).max() <= 1e-15
    same = changed(make_problem(20, 20), k=np.ones((20, 4)))
    assert np.abs(coreset().attend(same, rng=0) - same.output).max() <= 1e-12


# --- threads and draws --------------------------------------------------------------------------


def test_the_same_bits_for_any_number_of_threads() -> None:
    problem = make_problem(700, 700, np.float32, d=8)
    method = sa.NearFar(far="coreset", pivots=60, near=4, block=64, clusters=4)
    results = []
    for threads in (1, 2, 4):
        with limit_threads(threads):
            ahat = matrix(method, problem)
            results.append((
                method.attend(problem, rng=0), ahat.T @ problem.values, ahat.to_dense(), ahat.near,
            ))  # fmt: skip
    for other in results[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_draws_are_replayed() -> None:
    problem = make_problem(64, 64)
    method = coreset(pivots=12)
    assert method.draw_names == ("pivots",)
    assert method.traits.randomized
    assert not method.traits.nonnegative
    assert not method.traits.decoding
    draw = method.draw(problem, rng=7)
    first = method.attend(problem, rng=7)
    assert np.array_equal(method.attend(problem, draw=draw), first)
    assert not np.array_equal(method.attend(problem, rng=8), first)
    ahat = method.approximate(problem, draw=draw)
    assert np.array_equal(ahat @ problem.values, first)
    assert set(problem.kept_keys[matrix(method, problem, 7).pivots]) <= set(draw["pivots"])
    with pytest.raises(ValueError, match="pivots must hold 1 to 12 keys"):
        method.attend(problem, draw={"pivots": np.arange(13)})
    plain = sa.NearFar()
    assert plain.draw_names == ()
    assert not plain.traits.randomized


def test_a_rank_is_pivots_and_near_keys() -> None:
    problem = make_problem(512, 512)
    cases: list[tuple[int, dict[str, Any], int, int]] = [
        (64, {}, 32, 4), (65, {}, 33, 4), (1, {}, 1, 0), (64, {"pivots": 10}, 10, 8),
        (64, {"near": 1}, 32, 1), (64, {"near": 99}, 32, 4), (512, {}, 256, 32),
    ]  # fmt: skip
    for rank, given, pivots, near in cases:
        method = sa.NearFar(rank, far="coreset", block=64, clusters=4, **given)
        ahat = matrix(method, problem)
        assert (len(ahat.pivots), ahat.most) == (pivots, near)
        sizes = np.append(np.diff(ahat.moments.starts), 0)
        assert pivots + sizes[ahat.near].sum(axis=1).max(initial=0) <= rank
    ahat = matrix(sa.NearFar(far="coreset"), problem)
    assert len(ahat.pivots) == 512 // nearfar.A_PIVOT
    assert ahat.most == nearfar.CORESET_NEAR


# --- what it is good for ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pivots", "near", "median", "worst", "reads"),
    [
        (128, 2, 0.149, 0.239, 0.048),
        (128, 4, 0.140, 0.191, 0.067),
        (256, 2, 0.099, 0.218, 0.080),
        (256, 8, 0.087, 0.153, 0.136),
    ],
)
def test_errors_on_long_heads(
    pivots: int, near: int, median: float, worst: float, reads: float
) -> None:
    # Means over draws, of numbers that were found with another one.
    method = sa.NearFar(far="coreset", pivots=pivots, near=near, block=256, clusters=8)
    found = []
    for problem in real("minilm_n4096_interp", False):
        ahat = matrix(method, problem)
        found.append((
            np.mean([relative(method, problem, rng) for rng in range(3)]), ahat.work(problem)
        ))  # fmt: skip
    errors = np.array(found)[:, 0]
    assert np.median(errors) <= 1.1 * median + 0.01
    assert errors.max() <= 1.1 * worst + 0.01
    assert np.mean(np.array(found)[:, 1]) <= 1.1 * reads


def relative(method: sa.Method, problem: sa.AttentionProblem, rng: int) -> float:
    out = method.attend(problem, rng=rng).astype(np.float64)
    return float(np.linalg.norm(out - problem.output) / np.linalg.norm(problem.output))


def test_near_clusters_mend_a_coreset_on_the_bundled_heads() -> None:
    errors: dict[int, list[float]] = {0: [], 2: [], 8: []}
    for problem in sa.load_heads("minilm"):
        for near, found in errors.items():
            method = sa.NearFar(far="coreset", pivots=32, near=near, block=64, clusters=4)
            found.append(float(np.mean([relative(method, problem, rng) for rng in range(3)])))
    most = [max(x) for x in errors.values()]
    middle = [float(np.median(x)) for x in errors.values()]
    assert most[0] > most[1] > most[2]
    assert middle[0] > middle[1] > middle[2]


# --- what is refused ----------------------------------------------------------------------------

BESIDE = "with far='coreset', "
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"levels": 2},
        f"levels must be None or 1 {BESIDE}which has one level, got 2; drop one of them",
    ),
    (
        {"first_order": 1},
        f"first_order must be None or 0 {BESIDE}which has no mean values to correct, got 1; drop "
        "one of them",
    ),
    (
        {"regions": "blocks"},
        f"regions must be 'auto' or 'all' {BESIDE}whose clusters are those of all keys, got "
        "'blocks'; drop one of them",
    ),
    (
        {"tolerance": 0.1},
        f"tolerance must be None {BESIDE}for which no setting is found, got 0.1; drop one of them",
    ),
    (
        {"rank": 4, "pivots": 5},
        "pivots must be at most rank = 4, the budget of pivots and near keys, got 5; raise rank or "
        "lower pivots",
    ),
]


@pytest.mark.parametrize(("given", "text"), REFUSED)
def test_what_has_no_meaning_is_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=message(text)):
        sa.NearFar(far="coreset", **given).attend(make_problem(29, 29))


def test_other_refusals() -> None:
    problem = make_problem(29, 29, causal=True)
    text = (
        "causal must be False for method 'nearfar' with far='coreset', whose pivots stand for all "
        "keys, got True; take far='moments'"
    )
    for call in (coreset().attend, coreset().approximate, coreset().draw):
        with pytest.raises(ValueError, match=message(text)):
            call(problem)
    with pytest.raises(ValueError, match="method must hold keys of a decoder"):
        coreset().state(problem)
    text = "pivots must be None with far='moments', which has none, got 4; pass far='coreset'"
    with pytest.raises(ValueError, match=message(text)):
        sa.NearFar(pivots=4).attend(problem)
    with pytest.raises(ValueError, match="far must be one of moments, coreset, got 'corset'"):
        sa.NearFar(far="corset").attend(problem)
    with pytest.raises(ValueError, match="pivots must be"):
        coreset(pivots=0).attend(make_problem(29, 29))
