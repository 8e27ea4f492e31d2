"""Clustered attention: its formula, Proposition 2, when it is exact, and its clusterings."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from method_cases import dense_attention, make_problem, rounding
from naive import naive_clustered, naive_hamming_labels
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.errors.perturbation import compression_eta, tv_bound
from sketchattn.kernels._threads import limit_threads
from sketchattn.sampling import kmeans
from sketchattn.sketches.base import streams
from sketchattn.zoo import clustered
from sketchattn.zoo.clustered import (
    ImprovedClusteredAttention,
    hamming_labels,
    largest_positions,
)

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("one_thread")


def message(text: str) -> str:
    """Return a pattern for a whole message."""
    return f"^{re.escape(text)}$"


def row_errors(ahat: sa.AttentionOperator, problem: sa.AttentionProblem) -> Array:
    """Return ``|Ahat_i - A_i|_1`` of every row."""
    return np.asarray(np.abs(ahat.to_dense() - dense_attention(problem)).sum(axis=1))


# --- the formula --------------------------------------------------------------------------------

FORMS: list[dict[str, Any]] = [
    {},
    {"improved": True, "top_keys": 1},
    {"improved": True, "top_keys": 4},
    {"improved": True},
    {"clustering": "lsh", "improved": True, "top_keys": 3},
]
SHAPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "square": (13, 13, {}),
    "wide": (7, 17, {}),
    "tall": (19, 9, {}),
    "masked": (13, 14, {"key_mask": np.arange(14) % 3 > 0}),
    "scale": (13, 13, {"scale": -0.3}),
    "uniform": (13, 13, {"scale": 0.0}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_is_the_formula(form: dict[str, Any], shape: str, dtype: Any) -> None:
    n_q, n_k, options = SHAPES[shape]
    problem = make_problem(n_q, n_k, dtype, **options)
    method = sa.Clustered(5, **form)
    labels = method.draw(problem, 3)["labels"]
    ahat = method.approximate(problem, 3)
    top = method.top_keys if method.top_keys is not None else (32 if form.get("improved") else None)
    q, k, v = (x.astype(np.float64) for x in problem if x is not None)
    expected, out = naive_clustered(
        q, k, v, labels, scale=problem.scale, key_mask=problem.key_mask, top_keys=top
    )
    allowed = rounding(problem)
    dense = ahat.to_dense()
    if shape != "uniform" or top is None:  # all keys are as large there
        assert np.abs(dense - expected).max() <= allowed
        size = np.abs(v).max()
        assert np.abs(ahat @ problem.values - out).max() <= n_k * allowed * size
    y = np.random.default_rng(1).standard_normal((n_q, 2)).astype(dtype)
    assert np.abs(ahat.T @ y - dense.T.astype(np.float64) @ y).max() <= n_q * 4 * allowed
    assert np.abs(ahat.rows([2, 0, 2]) - dense[[2, 0, 2]]).max() == 0
    assert np.abs(ahat.columns([1, 1, n_k - 1]) - dense[:, [1, 1, n_k - 1]]).max() <= allowed
    assert np.abs(ahat.row_sums() - 1).max() <= allowed
    assert ahat.effective_rank == len(np.unique(labels)) <= 5
    assert ahat.dtype == dtype
    assert ahat.nbytes > 0
    if not form.get("improved"):
        assert isinstance(ahat, sa.FactoredAttention)
        assert ahat.row_stochastic
        assert ahat.nonnegative
        assert ahat.rank_bound == min(int(ahat.effective_rank or 0), n_k)
        assert np.linalg.matrix_rank(expected) <= ahat.rank_bound
    # Other labels are another matrix.
    if shape != "uniform":
        other = {"labels": (labels + np.arange(n_q)) % 5}
        assert np.abs(method.approximate(problem, draw=other).to_dense() - dense).max() > 1e-3 or (
            top is not None and top >= len(problem.kept_keys)
        )


def test_products_do_not_depend_on_how_many_columns_are_gathered_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = make_problem(40, 50)
    ahat = sa.Clustered(6, improved=True, top_keys=7).approximate(problem, 0)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 9)), rng.standard_normal((40, 9))
    forward, back = ahat @ x, ahat.T @ y
    monkeypatch.setattr(clustered, "_GATHERED", 100)  # two columns
    assert np.abs(ahat @ x - forward).max() <= 1e-14
    assert np.abs(ahat.T @ y - back).max() <= 1e-13
    dense = ahat.to_dense()
    assert np.abs(dense @ x - forward).max() <= 1e-13
    assert np.abs(dense.T @ y - back).max() <= 1e-13


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_float64_has_the_same_clusters_and_top_keys(form: dict[str, Any]) -> None:
    problem = make_problem(60, 70, np.float32, d=8)
    method = sa.Clustered(6, **form)
    ahat = method.approximate(problem, 0)
    wide = ahat.wide()
    assert wide.dtype == np.float64
    assert np.abs(wide.to_dense() - ahat.to_dense()).max() <= rounding(problem)
    assert wide.wide() is wide
    if isinstance(ahat, ImprovedClusteredAttention):
        assert isinstance(wide, ImprovedClusteredAttention)
        assert np.array_equal(wide.top, ahat.top)
    draw = method.draw(problem, 0)
    again = method.approximate(problem.astype(np.float64), draw=draw).to_dense()
    assert np.abs(wide.to_dense() - again).max() <= 1e-12


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(form: dict[str, Any]) -> None:
    problem = make_problem(2100, 300, np.float32, d=8)
    method = sa.Clustered(40, **form)
    made = []
    for count in (1, 2):
        with limit_threads(count):
            ahat = method.approximate(problem, 0)
            made.append((ahat @ problem.values, ahat.T @ problem.q, ahat.rows([5])))
    assert all(np.array_equal(a, b) for a, b in zip(*made, strict=True))


# --- what is promised ---------------------------------------------------------------------------


@pytest.mark.parametrize("clustering", ["kmeans", "lsh"])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_improved_rows_are_never_farther_from_the_exact_ones(
    clustering: str, spread: float, global_random_seed: int
) -> None:
    rng = np.random.default_rng(global_random_seed)
    q, k = spread * rng.standard_normal((1000, 8)), rng.standard_normal((80, 8))
    problem = sa.AttentionProblem(q, k)
    labels = sa.Clustered(12, clustering=clustering).draw(problem, global_random_seed)
    plain = sa.Clustered(12).approximate(problem, draw=labels)
    far = row_errors(plain, problem)
    for top_keys in (1, 8, 40):
        method = sa.Clustered(12, improved=True, top_keys=top_keys)
        ahat = method.approximate(problem, draw=labels)
        slack = far - row_errors(ahat, problem)
        assert slack.min() >= -1e-12
        if top_keys == 1:  # one weight scaled to the mass that it had is what it was
            assert slack.max() <= 1e-12
            continue
        assert slack.max() > 1e-3
        # With weights of the query that are not scaled to the mass, rows get worse.
        dense = ahat.to_dense()
        assert isinstance(ahat, ImprovedClusteredAttention)
        for i in range(0, 1000, 7):
            top = ahat.top[labels["labels"][i]]
            dense[i, top] /= dense[i, top].sum()
        worse = np.abs(dense - dense_attention(problem)).sum(axis=1)
        if spread < 4 and top_keys < 40:
            assert (far - worse)[::7].min() < -1e-3


def test_plain_rows_are_wrong_by_what_their_logits_allow(global_random_seed: int) -> None:
    problem = make_problem(100, 60, d=6, seed=global_random_seed)
    for rank in (5, 30):
        method = sa.Clustered(rank)
        labels = method.draw(problem, global_random_seed)["labels"]
        used = [problem.q[labels == c].mean(axis=0) for c in range(rank)]
        centers = np.array(used)[labels]
        eta = compression_eta(problem.q, problem.k, centers, problem.k, scale=problem.scale)
        variation = row_errors(method.approximate(problem, draw={"labels": labels}), problem) / 2
        assert (variation <= np.asarray(tv_bound(eta)) + 1e-12).all()
        assert (variation > np.asarray(tv_bound(eta / 8))).any()


def test_improved_is_exact_with_all_keys(global_random_seed: int) -> None:
    for keep in (None, np.arange(40) % 4 > 0):
        problem = make_problem(50, 40, d=6, key_mask=keep, seed=global_random_seed)
        count = len(problem.kept_keys)
        exact = dense_attention(problem)
        for top_keys in (count, count + 5, 10**6):
            ahat = sa.Clustered(4, improved=True, top_keys=top_keys).approximate(problem, 0)
            assert np.abs(ahat.to_dense() - exact).max() <= 1e-14
            assert np.abs(ahat @ problem.values - exact @ problem.values).max() <= 1e-13
        ahat = sa.Clustered(4, improved=True, top_keys=count - 1).approximate(problem, 0)
        assert np.abs(ahat.to_dense() - exact).max() > 1e-4


@pytest.mark.parametrize("form", [*FORMS, {"clustering": "lsh"}], ids=str)
def test_equal_queries_make_it_exact(form: dict[str, Any], global_random_seed: int) -> None:
    rng = np.random.default_rng(global_random_seed)
    few = 3 * rng.standard_normal((6, 5))
    q = few[rng.permutation(np.arange(60) % 6)]
    problem = sa.AttentionProblem(q, rng.standard_normal((30, 5)), rng.standard_normal((30, 4)))
    if form.get("clustering") == "lsh":
        # A cluster of bits holds equal queries, perhaps others too: labels are given.
        labels = np.unique(q, axis=0, return_inverse=True)[1].reshape(-1)
        ahat = sa.Clustered(6, **form).approximate(problem, draw={"labels": labels})
    else:
        ahat = sa.Clustered(6, **form).approximate(problem, global_random_seed)
    assert ahat.effective_rank == 6
    assert row_errors(ahat, problem).max() <= 1e-12
    fewer = sa.Clustered(3, **form).approximate(problem, global_random_seed)
    top = sa.Clustered(3, **form).top_keys
    assert row_errors(fewer, problem).max() > (1e-3 if top or not form.get("improved") else -1)


def test_a_key_shift_changes_nothing() -> None:
    problem = make_problem(30, 30, d=6)
    moved = sa.AttentionProblem(problem.q, problem.k + 2.0, problem.values)
    for form in FORMS:
        method = sa.Clustered(5, **form)
        draw = method.draw(problem, 0)
        first, second = (method.approximate(x, draw=draw).to_dense() for x in (problem, moved))
        assert np.abs(first - second).max() <= 1e-12


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_masked_keys_might_as_well_be_deleted(form: dict[str, Any]) -> None:
    keep = np.arange(200) % 5 > 1
    problem = make_problem(40, 200, np.float32, key_mask=keep)
    deleted = sa.AttentionProblem(
        problem.q, problem.k[keep], problem.values[keep], scale=problem.scale
    )
    method = sa.Clustered(5, **form)
    made, expected = (method.approximate(x, 0) for x in (problem, deleted))
    assert np.abs(made.to_dense()[:, keep] - expected.to_dense()).max() <= rounding(problem)
    assert not made.to_dense()[:, ~keep].any()
    if isinstance(made, ImprovedClusteredAttention):
        assert isinstance(expected, ImprovedClusteredAttention)
        assert np.array_equal(made.top, np.flatnonzero(keep)[expected.top])


def test_no_queries_or_no_keys_give_zeros() -> None:
    for form in FORMS:
        empty = sa.AttentionProblem(np.zeros((0, 4)), np.ones((5, 4)), np.ones((5, 2)))
        out: Array = sa.Clustered(3, **form).approximate(empty, 0) @ empty.values
        assert out.shape == (0, 2)
        blind = make_problem(6, 5, key_mask=np.zeros(5, bool))
        ahat = sa.Clustered(3, **form).approximate(blind, 0)
        assert not (ahat @ blind.values).any()
        assert ahat.effective_rank == 0
        one = make_problem(1, 5)
        assert row_errors(sa.Clustered(3, **form).approximate(one, 0), one).max() <= 1e-14


# --- clusterings --------------------------------------------------------------------------------


def test_kmeans_is_that_of_the_landmarks() -> None:
    problem = make_problem(60, 60)
    seed = int(np.random.default_rng(5).integers(2**31))
    choices: list[dict[str, Any]] = [{}, {"steps": 2}, {"sample": 20}]
    for options in choices:
        labels = sa.Clustered(7, **options).draw(problem, 5)["labels"]
        assert np.array_equal(labels, kmeans(problem.q, 7, seed, **{"steps": 8, **options}).labels)


def test_hamming_clusters_are_those_of_the_naive_loops(global_random_seed: int) -> None:
    rng = np.random.default_rng(global_random_seed)
    x = rng.standard_normal((50, 5))
    for r, bits, steps in ((6, 12, 1), (6, 12, 5), (9, 3, 10), (50, 16, 2)):
        labels = hamming_labels(x, r, np.random.default_rng(3), bits=bits, steps=steps)
        first, second = streams(np.random.default_rng(3), 2)
        planes = first.standard_normal((bits, 6))
        codes = [[int(row @ g[:5] + g[5] > 0) for g in planes] for row in x]
        start = second.permutation(50)[:r].tolist()
        assert labels.tolist() == naive_hamming_labels(codes, start, steps)
        if steps == 5:
            assert labels.tolist() != naive_hamming_labels(codes, start, 1)


def test_hamming_clusters_follow_directions() -> None:
    # Four tight bundles far apart: all rows of one have one code, but for signs near zero.
    rng = np.random.default_rng(0)
    truth = np.arange(80) % 4
    x = 10 * rng.standard_normal((4, 12))[truth] + 1e-6 * rng.standard_normal((80, 12))
    labels = hamming_labels(x, 40, rng)
    assert all(len(set(labels[truth == c])) == 1 for c in range(4))
    assert len(set(labels)) == 4


@pytest.mark.parametrize("n", [1, 5, 64, 300, 4099])
def test_the_largest_positions_are_found(n: int, global_random_seed: int) -> None:
    rng = np.random.default_rng(global_random_seed)
    for logits in (rng.standard_normal((3, n)), rng.integers(0, 4, (3, n)).astype(float)):
        for count in {1, min(3, n), min(32, n), n}:
            found = largest_positions(logits, count)
            assert found.shape == (3, count)
            assert all(len(set(row)) == count for row in found.tolist())
            kept = np.sort(np.take_along_axis(logits, found, axis=1), axis=1)
            assert np.array_equal(kept, np.sort(logits, axis=1)[:, n - count :])
            if n > count:
                missed = np.sort(np.take_along_axis(logits, (found + 1) % n, axis=1), axis=1)
                assert not np.array_equal(missed, kept) or np.ptp(kept) == 0


# --- refusals -----------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"improved": 1},
        TypeError,
        "improved must be a bool, got int; True computes the top keys of each query",
    ),
    (
        {"clustering": "kmean"},
        ValueError,
        "clustering must be one of kmeans, lsh, got 'kmean'; did you mean 'kmeans'?",
    ),
    (
        {"top_keys": 3},
        ValueError,
        "top_keys must be None with improved=False, which has no use for it, got 3; drop it",
    ),
    (
        {"top_keys": 0, "improved": True},
        ValueError,
        "top_keys must be at least 1, got 0; change top_keys",
    ),
    (
        {"bits": 16},
        ValueError,
        "bits must be None with clustering='kmeans', which has no use for it, got 16; drop it",
    ),
    (
        {"bits": 2000, "clustering": "lsh"},
        ValueError,
        "bits must be between 1 and the largest = 1024, got 2000; change bits",
    ),
    (
        {"sample": 9, "clustering": "lsh"},
        ValueError,
        "sample must be None with clustering='lsh', which has no use for it, got 9; drop it",
    ),
    (
        {"sample": 2},
        ValueError,
        "sample must be at least 3, got 2; change sample",
    ),
    (
        {"steps": 2.0},
        TypeError,
        "steps must be an integer, got float; give one of at least 1",
    ),
]


@pytest.mark.parametrize(("options", "error", "text"), REFUSED)
def test_parameters_that_do_not_fit_are_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    method = sa.Clustered(3, **options)
    for call in (method.draw, method.approximate):
        with pytest.raises(error, match=message(text)):
            call(make_problem(6, 6), rng=0)


LABELS: list[tuple[Any, str]] = [
    (
        np.zeros(5, np.int64),
        "labels must be integers of shape (n_q,) = (6,), got int64 of shape (5,); give the "
        "cluster of each query",
    ),
    (
        np.zeros(6),
        "labels must be integers of shape (n_q,) = (6,), got float64 of shape (6,); give the "
        "cluster of each query",
    ),
    (
        np.arange(6),
        "labels must be in 0..rank - 1 = 2, got 0 to 5; raise rank or renumber the clusters",
    ),
    (
        np.arange(6) % 3 - 1,
        "labels must be in 0..rank - 1 = 2, got -1 to 1; raise rank or renumber the clusters",
    ),
]


@pytest.mark.parametrize(("labels", "text"), LABELS)
def test_labels_that_do_not_fit_are_refused(labels: Any, text: str) -> None:
    with pytest.raises(ValueError, match=message(text)):
        sa.Clustered(3).approximate(make_problem(6, 6), draw={"labels": labels})


def test_labels_may_leave_clusters_out() -> None:
    problem = make_problem(6, 6)
    method = sa.Clustered(5, improved=True, top_keys=2)
    sparse, dense = (np.array([4, 1, 4, 1, 4, 4], np.uint8), np.array([1, 0, 1, 0, 1, 1]))
    first, second = (method.approximate(problem, draw={"labels": x}) for x in (sparse, dense))
    assert np.array_equal(first.to_dense(), second.to_dense())
    assert first.effective_rank == 2
    causal = make_problem(6, 6, causal=True)
    with pytest.raises(ValueError, match="^causal must be False for method 'clustered'"):
        method.approximate(causal, 0)
