"""Nystromformer: its formula, its pseudo-inverse, when it is exact, and when it is not."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from method_cases import dense_attention, make_problem
from naive import naive_nystrom
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.kernels._threads import limit_threads
from sketchattn.sampling.landmarks import segment_means
from sketchattn.zoo.nystromformer import (
    RenormalizedAttention,
    filter_inverse,
    iterate_inverse,
    pseudo_inverse,
)

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("one_thread")


def small_softmax(r: int, seed: int, spread: float = 1.0) -> Array:
    """Return a row-stochastic matrix (r, r)."""
    logits = spread * np.random.default_rng(seed).standard_normal((r, r))
    weights: Array = np.exp(logits)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def step(e: Any) -> Any:
    """Return f(e) = (3 e^3 + e^4) / 4 of a number or an array of eigenvalues."""
    return (3 * e**3 + e**4) / 4


def gaussian(seed: int, n: int = 128, d: int = 16) -> sa.AttentionProblem:
    rng = np.random.default_rng(seed)
    return sa.AttentionProblem(*(rng.standard_normal((n, d)) for _ in range(3)))


# --- the pseudo-inverse -------------------------------------------------------------------------


def test_the_residual_of_a_step_is_its_polynomial(global_random_seed: int) -> None:
    m = small_softmax(12, global_random_seed)
    for j in range(6):
        before, after = (np.eye(12) - m @ iterate_inverse(m, i) for i in (j, j + 1))
        cube = before @ before @ before
        assert np.abs(after - (3 * cube + cube @ before) / 4).max() <= 1e-12
        # Another polynomial would be seen.
        assert np.abs(after - cube).max() > 1e-6 or np.linalg.norm(before) < 0.02


@pytest.mark.parametrize("j", [0, 1, 6, 8, 9, 20])
def test_the_filter_is_the_iteration(j: int, global_random_seed: int) -> None:
    m = small_softmax(16, global_random_seed)
    expected = iterate_inverse(m, j)
    error = np.abs(filter_inverse(m, j) - expected).max()
    # Small singular values differ by their conditioning, which the iteration itself amplifies.
    allowed = max(1e-10, 1e-15 * np.linalg.cond(m) ** 2 if j > 8 else 0.0)
    assert error <= allowed * np.abs(expected).max()
    assert (
        np.abs(filter_inverse(m, j + 1) - expected).max() > 1e-9 * np.abs(expected).max() or j > 8
    )


def test_the_residual_norm_is_that_of_the_smallest_singular_value(global_random_seed: int) -> None:
    m = small_softmax(10, global_random_seed)
    c = np.abs(m).sum(axis=0).max()  # rows sum to one
    e = 1 - np.linalg.svd(m, compute_uv=False)[-1] ** 2 / c
    for j in range(13):
        residual = np.eye(10) - m @ iterate_inverse(m, j)
        assert abs(np.linalg.norm(residual, 2) - e) <= 1e-8
        e = step(e)


def test_inverses_agree_where_they_must() -> None:
    m = small_softmax(8, 3)
    exact = np.linalg.inv(m)
    size = np.abs(exact).max() * np.linalg.cond(m)
    assert np.abs(pseudo_inverse(m) - exact).max() <= 1e-14 * size
    assert np.abs(iterate_inverse(m, 40) - exact).max() <= 1e-12 * size
    high = np.linalg.norm(m, 2)
    ridge = np.linalg.solve(m.T @ m + 1e-3 * high**2 * np.eye(8), m.T)
    assert np.abs(pseudo_inverse(m, ridge=1e-3) - ridge).max() <= 1e-11 * np.abs(ridge).max()
    assert np.abs(pseudo_inverse(m, ridge=1e-3) - exact).max() > 1e-3
    # A matrix of rank one: one singular value is left, and zero gives zero.
    assert np.abs(pseudo_inverse(np.full((3, 3), 1 / 3)) - 1 / 3).max() <= 1e-14
    assert not pseudo_inverse(np.zeros((2, 2))).any()
    assert not iterate_inverse(np.zeros((2, 2))).any()
    p, s, wt = np.linalg.svd(m)
    cut = pseudo_inverse(m, rcond=float(s[4] / s[0]))
    assert np.abs(cut - (wt.T[:, :4] / s[:4]) @ p.T[:4]).max() <= 1e-12 * np.abs(cut).max()


# --- the formula --------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"iterations": 0},
    {"iterations": 10},
    {"preset": "nystrom-attention"},
    {"preset": "original"},
    {"landmarks": "random"},
    {"landmarks": "leverage"},
    {"landmarks": "kmeans"},
    {"iterations": None, "ridge": 1e-3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_formula_by_loops(options: dict[str, Any], masked: bool, dtype: Any) -> None:
    mask = np.arange(20) % 5 != 2 if masked else None
    problem = make_problem(13, 20, dtype, key_mask=mask)
    method = sa.Nystromformer(5, **options)
    draw = method.draw(problem, rng=1)
    ahat = method.approximate(problem, draw=draw)
    q, k, v = (np.asarray(x, np.float64) for x in (problem.q, problem.k, problem.values))
    if draw:
        queries, keys = draw["landmarks"]
    elif mask is not None and options.get("preset") == "original":
        queries, keys = segment_means(q, 5), segment_means(np.where(mask[:, None], k, 0), 5)
    else:
        queries, keys = segment_means(q, 5), segment_means(k if mask is None else k[mask], 5)
    inverse: Any = options.get("iterations", 6)
    if inverse is None:
        logits = problem.scale * queries @ keys.T
        m = np.exp(logits)
        m /= m.sum(axis=1, keepdims=True)
        high = np.linalg.norm(m, 2)
        inverse = np.linalg.solve(m.T @ m + 1e-3 * high**2 * np.eye(5), m.T)
    weights, out = naive_nystrom(
        q, k, v, queries, keys, inverse, scale=problem.scale, key_mask=mask
    )
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    size = max(1.0, float(np.abs(weights).max()))
    # |Z| enters: what rounding of F and B it is multiplied with.
    size *= max(1.0, float(np.abs(method.inverse(np.eye(1))).max()))
    assert np.abs(ahat.to_dense() - weights).max() <= tolerance * size
    assert np.abs(ahat @ problem.values - out).max() <= tolerance * size * np.abs(v).max()
    assert np.abs(method.attend(problem, draw=draw) - out).max() <= tolerance * size * 4
    y = np.random.default_rng(2).standard_normal((13, 2)).astype(dtype)
    assert np.abs(ahat.T @ y - weights.T @ y).max() <= 13 * tolerance * size * 4
    assert ahat.rank_bound == 5


def test_segments_differ_by_one_row_at_most() -> None:
    x = np.arange(7.0)[:, None]
    assert segment_means(x, 3).ravel().tolist() == [1.0, 3.5, 5.5]
    assert segment_means(x, 7).ravel().tolist() == list(range(7))
    with pytest.raises(ValueError, match=r"^r must be in 1..n for x of shape \(n, d\), got 8"):
        segment_means(x, 8)


def test_zeroed_and_deleted_keys_are_two_estimators() -> None:
    mask = np.arange(12) % 3 > 0
    problem = make_problem(12, 12, key_mask=mask)
    deleted, zeroed = (
        sa.Nystromformer(4, masking=x).approximate(problem).to_dense() for x in ("delete", "zero")
    )
    assert np.abs(deleted - zeroed).max() > 1e-3
    assert not zeroed[:, ~mask].any()
    # Without a mask, and with r | n, they are the same numbers.
    plain = make_problem(12, 12)
    first, second = (
        sa.Nystromformer(4, preset=x).approximate(plain).to_dense() for x in (None, "original")
    )
    assert np.array_equal(first, second)


# --- exactness ----------------------------------------------------------------------------------


def on_landmarks(side: str, seed: int) -> tuple[sa.AttentionProblem, sa.Nystromformer]:
    """Return a problem in which every query, or every key, is one of 8 landmarks."""
    rng = np.random.default_rng(seed)
    marks = 1.5 * rng.standard_normal((2, 8, 8))
    q, k = (rng.standard_normal((64, 8)) for _ in range(2))
    labels = np.concatenate([np.arange(8), rng.integers(0, 8, 56)])
    q, k = (marks[0][labels], k) if side == "queries" else (q, marks[1][labels])
    problem = sa.AttentionProblem(q, k, rng.standard_normal((64, 3)))
    return problem, sa.Nystromformer(8, landmarks=marks, iterations=None)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_queries_on_landmarks_make_it_exact_and_keys_do_not(seed: int) -> None:
    problem, method = on_landmarks("queries", seed)
    exact = dense_attention(problem)
    ahat = method.approximate(problem)
    assert np.linalg.norm(ahat.to_dense() - exact) <= 1e-10 * np.linalg.norm(exact)
    problem, method = on_landmarks("keys", seed)
    exact = dense_attention(problem)
    error = np.linalg.norm(method.approximate(problem).to_dense() - exact)
    assert error > 0.01 * np.linalg.norm(exact)


def test_all_tokens_as_landmarks_need_many_steps() -> None:
    problem = gaussian(0)
    exact = dense_attention(problem)
    errors = [
        np.linalg.norm(sa.Nystromformer(128, iterations=j).approximate(problem).to_dense() - exact)
        / np.linalg.norm(exact)
        for j in (6, 10, 14, None)
    ]
    assert errors[0] > errors[1] > errors[2] > 1e-6
    assert errors[3] <= 1e-10


@pytest.mark.parametrize("seed", range(3))
def test_rows_sum_to_one_with_an_inverse_only(seed: int) -> None:
    problem = gaussian(seed, n=64)
    exact = sa.Nystromformer(8, iterations=None).approximate(problem)
    queries, keys = (segment_means(x, 8) for x in (problem.q, problem.k))
    m = np.exp(problem.scale * queries @ keys.T)
    m /= m.sum(axis=1, keepdims=True)
    assert np.linalg.cond(m) < 1e6
    assert np.abs(exact.row_sums() - 1).max() <= 1e-8
    # Two steps do not invert it.
    short = sa.Nystromformer(8, iterations=2).approximate(problem)
    assert np.abs(short.row_sums() - 1).max() > 1e-6
    assert not sa.Nystromformer(8).traits.row_stochastic
    assert isinstance(short, sa.FactoredAttention)
    assert not short.row_stochastic


def test_more_accurate_is_worse() -> None:
    # |Ahat - A|_F/|A|_F, medians over seeds 0..9 at n = 128, d = 16, r = 32.
    printed = {2: 0.767, 4: 0.674, 6: 0.567, 8: 0.560, 10: 0.644, 14: 1.35}
    problems = [gaussian(seed) for seed in range(10)]
    exact = [dense_attention(x) for x in problems]

    def errors(**options: Any) -> Array:
        method = sa.Nystromformer(32, **options)
        return np.array(
            [
                np.linalg.norm(method.approximate(x).to_dense() - a) / np.linalg.norm(a)
                for x, a in zip(problems, exact, strict=True)
            ]
        )

    for steps, value in printed.items():
        assert np.median(errors(iterations=steps)) == pytest.approx(value, rel=0.02)
    for ridge, value in {1e-4: 0.548, 1e-3: 0.572, 1e-2: 0.685}.items():
        assert np.median(errors(iterations=None, ridge=ridge)) == pytest.approx(value, rel=0.02)
    inverse = errors(iterations=None)
    assert np.median(inverse) == pytest.approx(3.41, rel=0.02)
    assert (errors(iterations=6) < inverse).all()


def test_heads_do_not_depend_on_each_other() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 24, 8)) for _ in range(3))
    q[1] *= 5  # a maximum over heads would show
    both = sa.attention(q, k, v, "nystromformer", rank=6)
    for h in range(2):
        assert np.array_equal(both[h], sa.attention(q[h], k[h], v[h], "nystromformer", rank=6))


def test_threads_do_not_change_the_bits() -> None:
    problem = gaussian(1, n=600, d=8)
    for landmarks in ("segment_means", "kmeans", "leverage"):
        outputs = []
        for count in (1, 2):
            with limit_threads(count):
                outputs.append(sa.Nystromformer(40, landmarks).attend(problem, rng=0))
        assert np.array_equal(outputs[0], outputs[1])


@pytest.mark.parametrize("law", ["random", "leverage"])
def test_drawn_landmarks_are_nested_rows(law: str, global_random_seed: int) -> None:
    problem = make_problem(15, 20, key_mask=np.arange(20) != 7, seed=global_random_seed)
    large = sa.Nystromformer(12, law).draw(problem, global_random_seed)["landmarks"]
    small = sa.Nystromformer(5, law).draw(problem, global_random_seed)["landmarks"]
    assert np.array_equal(small, large[:, :5])
    for rows, source in zip(large, (problem.q, problem.k[problem.kept_keys]), strict=True):
        found = [np.flatnonzero((source == row).all(axis=1)).tolist() for row in rows]
        assert all(len(x) == 1 for x in found)
        assert len({x[0] for x in found}) == 12


def test_budgets_beyond_the_tokens_are_reported() -> None:
    problem = make_problem(3, 12)
    for landmarks in ("segment_means", "kmeans", "random"):
        assert sa.Nystromformer(8, landmarks).approximate(problem, rng=0).effective_rank == 3


def test_equal_tokens_do_not_warn() -> None:
    x = np.ones((9, 4))
    ahat = sa.Nystromformer(4, "kmeans").approximate(sa.AttentionProblem(x, x, x), rng=0)
    assert np.abs(ahat.to_dense() - 1 / 9).max() <= 0.1


def test_products_in_float64_are_those_of_the_same_draw() -> None:
    problem = make_problem(13, 20, np.float32)
    method = sa.Nystromformer(5, "random")
    draw = method.draw(problem, rng=0)
    wide = method.approximate(problem, draw=draw).wide()
    expected = method.approximate(problem.astype(np.float64), draw=draw)
    assert wide.dtype == np.float64
    assert np.array_equal(wide.to_dense(), expected.to_dense())


# --- rows that sum to one, and the convolution ----------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_renormalized_rows_are_divided_by_their_sums(masked: bool, dtype: Any) -> None:
    mask = np.arange(20) % 5 != 2 if masked else None
    problem = make_problem(13, 20, dtype, key_mask=mask)
    plain = sa.Nystromformer(5, iterations=2).approximate(problem)
    ahat = sa.Nystromformer(5, iterations=2, renormalize=True).approximate(problem)
    sums = plain.row_sums().astype(np.float64)
    assert np.abs(sums - 1).max() > 1e-3
    assert (sums > 0.1).all()
    expected = plain.to_dense() / sums[:, None]
    # Rounding of a row sum, 5 terms of |F Z| at most 10 here, is divided by at least 0.1.
    tolerance = 100 * 5 * float(np.finfo(dtype).eps)
    assert np.abs(ahat.to_dense() - expected).max() <= tolerance
    assert np.abs(ahat.row_sums() - 1).max() <= tolerance
    y = np.random.default_rng(1).standard_normal((13, 2)).astype(dtype)
    assert np.abs(ahat.T @ y - expected.T @ y).max() <= 13 * 4 * tolerance
    assert np.abs(ahat.rows([2, 0]) - expected[[2, 0]]).max() <= tolerance
    wide = ahat.wide()
    assert wide.dtype == np.float64
    assert np.abs(wide.to_dense() - expected).max() <= tolerance
    assert isinstance(ahat, RenormalizedAttention)
    assert np.array_equal(ahat.divisor, ahat.sums)


def test_small_and_negative_row_sums_are_left_alone_and_counted() -> None:
    # Ridge beyond all singular values shrinks Z, hence rows, to nearly nothing.
    problem = make_problem(13, 20)
    options: dict[str, Any] = {"iterations": None, "ridge": 100.0}
    plain = sa.Nystromformer(5, **options)
    ahat = sa.Nystromformer(5, renormalize=True, **options).approximate(problem)
    assert np.array_equal(ahat.to_dense(), plain.approximate(problem).to_dense())
    details = plain.details(problem)
    assert details.not_renormalized == 13
    assert 0 < details.least_sum <= details.largest_sum < 0.1
    # One matrix with both kinds of rows.
    s = np.array([[1.0, 0.0], [0.0, -0.5]])
    mixed = RenormalizedAttention(np.array([[0.5, 0.5], [0.1, 0.9]]), s, np.eye(2))
    assert mixed.sums.tolist() == pytest.approx([0.25, -0.35])
    assert mixed.divisor.tolist() == [0.25, 1.0]
    assert mixed.to_dense()[0].tolist() == pytest.approx([2.0, -1.0])
    assert mixed.to_dense()[1].tolist() == pytest.approx([0.1, -0.45])
    details = sa.Nystromformer(5).details(problem)
    sums = sa.Nystromformer(5).approximate(problem).row_sums()
    assert details == (sums.min(), sums.max(), (sums <= 0.1).sum())


@pytest.mark.parametrize("m", [1, 5, 33])
@pytest.mark.parametrize("masked", [False, True])
def test_the_convolution_is_added_to_the_output(m: int, masked: bool) -> None:
    mask = np.arange(12) % 3 > 0 if masked else None
    problem = make_problem(12, 12, key_mask=mask)
    w = np.random.default_rng(m).standard_normal(m)
    v = problem.values if mask is None else np.where(mask[:, None], problem.values, 0)
    near = np.zeros_like(v)
    for i in range(12):
        for t in range(m):
            j = i + t - (m - 1) // 2
            if 0 <= j < 12:
                near[i] += w[t] * v[j]
    for options in ({}, {"renormalize": True}, {"landmarks": "random"}):
        plain = sa.Nystromformer(4, **options).attend(problem, rng=0)
        method = sa.Nystromformer(4, convolution=w, **options)
        out = method.attend(problem, rng=0)
        assert np.abs(out - plain - near).max() <= 1e-13 * m
        assert np.abs(out - plain - near[:, ::-1]).max() > 1e-3  # another order would be seen
        assert not method.traits.matrix
        with pytest.raises(ValueError, match=r"^convolution must be None for a matrix, got weig"):
            method.approximate(problem, rng=0)


def test_the_convolution_keeps_the_precision_and_needs_equal_lengths() -> None:
    method = sa.Nystromformer(4, convolution=[0.5, 1.0, 0.5])
    assert method.attend(make_problem(12, 12, np.float32)).dtype == np.float32
    with pytest.raises(ValueError, match=r"^n_q and n_k must be equal for method 'nystromformer'"):
        method.attend(make_problem(11, 12))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"renormalize": 1}, TypeError, "renormalize must be a bool, got int"),
    ({"convolution": np.ones(4)}, ValueError, "convolution must have shape (m,) with m odd, got"),
    ({"convolution": np.ones((3, 3))}, ValueError, "convolution must have shape (m,) with m odd"),
    ({"convolution": [np.inf]}, ValueError, "convolution must be finite, got inf at index (0,)"),
    ({"convolution": [1]}, TypeError, "convolution must be float16, bfloat16, float32 or float64"),
    ({"landmarks": "segments"}, ValueError, "landmarks must be one of segment_means, kmeans"),
    ({"landmarks": np.zeros((2, 3, 4))}, ValueError, "landmarks must have shape (2, r, d) = (2, 5"),
    ({"landmarks": np.full((2, 5, 4), np.nan)}, ValueError, "landmarks must be finite"),
    ({"iterations": -1}, ValueError, "iterations must be at least 0, got -1"),
    ({"iterations": 6.0}, TypeError, "iterations must be an integer or None, got float"),
    ({"ridge": 1e-3}, ValueError, "ridge must be left out with iterations = 6"),
    ({"rcond": 1e-3}, ValueError, "rcond must be left out with iterations = 6"),
    ({"iterations": None, "ridge": -1.0}, ValueError, "ridge must be finite and in [0, inf)"),
    ({"iterations": None, "rcond": 1.0}, ValueError, "rcond must be finite and in [0, 1)"),
    ({"masking": "drop"}, ValueError, "masking must be one of delete, zero, got 'drop'"),
    ({"masking": "zero", "landmarks": "random"}, ValueError, "masking must be 'delete' unless"),
    ({"preset": "orignal"}, ValueError, "preset must be a known name, got 'orignal'; did you mean"),
    ({"preset": "original", "iterations": 8}, ValueError, "iterations must be left at 6 with pres"),
    ({"preset": "original", "landmarks": "kmeans"}, ValueError, "landmarks must be left at 'segme"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD)
def test_refusals(options: dict[str, Any], error: type[Exception], text: str) -> None:
    problem = make_problem(8, 8)
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        sa.Nystromformer(5, **options).approximate(problem, rng=0)


def test_a_draw_of_another_shape_is_refused() -> None:
    problem = make_problem(8, 8)
    text = "landmarks must have shape (2, r, d) = (2, 5, 4), got (2, 4, 4); landmark queries first"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        sa.Nystromformer(5, "random").approximate(problem, draw={"landmarks": np.ones((2, 4, 4))})
