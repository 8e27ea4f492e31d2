"""Compression of the hidden width: optimal, exact where it can be, blind to shifts and masks."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from method_cases import dense_attention, make_problem
from naive import naive_compressed_logits
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.errors.perturbation import compression_eta, tv_bound
from sketchattn.kernels._threads import limit_threads
from sketchattn.sketches.compression import (
    KINDS,
    RANDOM_KINDS,
    Compression,
    apply_compression,
    compress,
    compress_problem,
    draw_projection,
    fit_compression,
    largest_width,
)

Array = NDArray[Any]
every_kind = pytest.mark.parametrize("kind", KINDS)


def message(text: str) -> str:
    """Return a pattern for a whole message."""
    return f"^{re.escape(text)}$"


def gaussian(n_q: int, n_k: int, d: int, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n_q, d)), rng.standard_normal((n_k, d))


def centered(q: Array, k: Array) -> Array:
    return np.asarray(q @ (k - k.mean(axis=0)).T)


# --- the best one -------------------------------------------------------------------------------

SIZES = {
    "tall": (40, 50, 6),
    "few keys": (30, 4, 6),
    "few queries": (3, 30, 6),
    "few of both": (4, 5, 9),
    "several pieces": (530, 520, 3),
}


def gaps(logits: Array, made: Array, d_in: int) -> list[float]:
    """Return how far errors are from the least ones in three norms, relative to the logits."""
    difference = np.linalg.svd(logits - made, compute_uv=False)
    s = np.linalg.svd(logits, compute_uv=False)
    tail = np.append(s[d_in:], 0.0)
    return [
        (np.linalg.norm(difference, order) - np.linalg.norm(tail, order)) / s[0]
        for order in (np.inf, 2, 1)  # spectral, Frobenius, nuclear
    ]


@pytest.mark.parametrize("size", SIZES)
def test_svd_is_the_best_in_every_unitarily_invariant_norm(size: str) -> None:
    n_q, n_k, d = SIZES[size]
    q, k = gaussian(n_q, n_k, d)
    k += 0.5
    logits = centered(q, k)
    for d_in in range(1, d + 1):
        qh, kh = compress(q, k, d_in)
        assert np.abs(gaps(logits, qh @ kh.T, d_in)).max() <= 1e-8
        for kind in ("gaussian", "srht", "pca_k"):
            other_q, other_k = compress(q, k, d_in, kind, rng=0, center=True)
            found = gaps(logits, other_q @ other_k.T, d_in)
            assert min(found) >= -1e-12
            if kind != "pca_k" and d_in < min(d, n_k - 1):
                assert min(found) > 1e-3  # the check sees that these are not the best
    if n_k > d:
        # Without centring it is the best one of other logits.
        qh, kh = compress(q, k, 2, center=False)
        assert gaps(logits, qh @ kh.T, 2)[0] > 1e-4
        assert np.abs(gaps(q @ k.T, qh @ kh.T, 2)).max() <= 1e-8


def test_svd_is_the_decomposition_of_the_whole_logits() -> None:
    q, k = gaussian(9, 11, 5, seed=3)
    keep = np.arange(11) % 4 != 1
    for d_in in (1, 3):
        for mask in (None, keep):
            qh, kh = compress(q, k, d_in, key_mask=mask)
            expected = naive_compressed_logits(q, k, d_in, mask)
            assert np.abs(qh @ kh.T - expected).max() <= 1e-13 * np.abs(expected).max() * 11


def test_an_oblique_projection_is_exact_at_the_rank_of_the_logits(global_random_seed: int) -> None:
    rng = np.random.default_rng(global_random_seed)
    q = np.hstack([rng.standard_normal((50, 3)), np.zeros((50, 3))])
    k = np.hstack([rng.standard_normal((50, 2)), np.zeros((50, 1)), rng.standard_normal((50, 3))])
    assert [np.linalg.matrix_rank(x) for x in (q, k, q @ k.T)] == [3, 5, 2]
    for center, logits in ((False, q @ k.T), (True, centered(q, k))):
        qh, kh = compress(q, k, 2, center=center)
        size = np.abs(logits).max()
        assert np.abs(qh @ kh.T - logits).max() <= 1e-13 * size
        # No width below the rank is exact; and the axes of the keys alone are not those of both.
        for other in (compress(q, k, 1, center=center), compress(q, k, 2, "pca_k", center=center)):
            assert np.abs(other[0] @ other[1].T - logits).max() > 0.01 * size
        # Widths beyond the rank add columns that are zero, not quotients of rounding.
        wide_q, wide_k = compress(q, k, 5, center=center)
        assert np.abs(wide_q @ wide_k.T - logits).max() <= 1e-13 * size
        assert not wide_q[:, 2:].any()
        assert not wide_k[:, 2:].any()
    maps = fit_compression(sa.AttentionProblem(q, k), 2)
    projector = maps.query_map @ maps.key_map.T
    assert np.abs(projector @ projector - projector).max() <= 1e-12
    assert np.abs(projector - projector.T).max() > 1e-6


def test_nearly_orthogonal_queries_and_keys_lose_no_digits() -> None:
    # Logits of size 1e-6 of |q| |k|: neither triangle is inverted, no Gram matrix is formed.
    rng = np.random.default_rng(5)
    q, k = rng.standard_normal((60, 6)), rng.standard_normal((60, 6))
    q[:, 3:] *= 1e-6
    k[:, :3] *= 1e-6
    logits = centered(q, k)
    s = np.linalg.svd(logits, compute_uv=False)
    qh, kh = compress(q, k, 6)
    # Rounding is relative to |q| |k| = 60: u 60 d against logits of 1e-4.
    assert np.linalg.norm(qh @ kh.T - logits, 2) <= 1e-9 * s[0]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (1, 5), (5, 1)])
@every_kind
def test_small_and_empty_arrays_are_compressed(kind: str, shape: tuple[int, int]) -> None:
    q, k = gaussian(*shape, 4)
    qh, kh = compress(q, k, 3, kind, rng=0)
    assert qh.shape == (shape[0], 3)
    assert kh.shape == (shape[1], 3)
    assert np.isfinite(qh).all()
    assert np.isfinite(kh).all()


def test_all_keys_masked_or_all_equal_leave_no_logits() -> None:
    q, k = gaussian(5, 6, 4)
    for mask, keys in ((np.zeros(6, bool), k), (None, np.ones((6, 4)))):
        qh, kh = compress(q, keys, 2, key_mask=mask)
        assert not (qh @ kh.T).any()


def test_whole_widths_lose_nothing() -> None:
    q, k = gaussian(20, 25, 6)
    for kind in ("svd", "srht", "pca_k"):
        width = largest_width(6, kind)
        assert width is not None
        qh, kh = compress(q, k, width, kind, rng=0, center=True)
        assert np.abs(qh @ kh.T - centered(q, k)).max() <= 1e-12
        qh, kh = compress(q, k, width - 3, kind, rng=0, center=True)
        assert np.abs(qh @ kh.T - centered(q, k)).max() > 1e-3


# --- random kinds -------------------------------------------------------------------------------


@pytest.mark.statistical
def test_a_gaussian_logit_has_the_variance_of_its_formula(global_random_seed: int) -> None:
    # Level 1e-6: the sample variance of T draws is normal with a relative deviation of
    # sqrt((kappa - 1)/T); a sum of d_in products of two normal numbers has kappa - 3 <= 12/d_in.
    from scipy.stats import norm

    d, d_in, count = 8, 5, 100_000
    rng = np.random.default_rng(7)
    q = rng.standard_normal(d)
    k = q + 0.5 * rng.standard_normal(d)
    # One wide draw holds many: blocks of columns are independent, their scale is that of the width.
    wide = draw_projection(d, d_in * count, "gaussian", global_random_seed) * np.sqrt(count)
    first = draw_projection(d, d_in, "gaussian", global_random_seed)
    assert np.abs(wide[:, :d_in] - first).max() <= 1e-14
    logits = ((q @ wide) * (k @ wide)).reshape(count, d_in).sum(axis=1)
    expected = ((q @ q) * (k @ k) + (q @ k) ** 2) / d_in
    level = norm.isf(5e-7)
    allowed = level * np.sqrt((12 / d_in + 2) / count)
    assert abs(logits.var() / expected - 1) <= allowed
    assert abs(logits.mean() - q @ k) <= level * np.sqrt(expected / count)
    # The formula without its second term would be seen.
    assert abs(logits.var() / ((q @ q) * (k @ k) / d_in) - 1) > allowed


def test_random_projections_are_the_sketches_of_their_name() -> None:
    from sketchattn.sketches.base import make_sketch

    for kind in RANDOM_KINDS:
        made = draw_projection(6, 4, kind, rng=2)
        assert np.array_equal(made, make_sketch(kind, 4, 6, rng=2).to_dense().T)
        q, k = gaussian(7, 8, 6)
        qh, kh = compress(q, k, 4, kind, rng=2)
        assert np.abs(qh - q @ made).max() <= 1e-14
        assert np.abs(kh - k @ made).max() <= 1e-14
        centered_kh = compress(q, k, 4, kind, rng=2, center=True)[1]
        assert np.abs(centered_kh - (k - k.mean(axis=0)) @ made).max() <= 1e-14
    assert draw_projection(6, 20, "gaussian", rng=0).shape == (6, 20)


@every_kind
def test_one_seed_is_one_compression(kind: str) -> None:
    q, k = gaussian(20, 20, 6)
    first = compress(q, k, 3, kind, rng=4)
    again = compress(q, k, 3, kind, rng=np.random.default_rng(4))
    other = compress(q, k, 3, kind, rng=5)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.array_equal(first[0], other[0]) == (kind not in RANDOM_KINDS)


# --- what it does not see -----------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("center", [None, True, False])
def test_a_vector_added_to_all_keys_leaves_attention_as_it_is(
    kind: str, center: bool | None
) -> None:
    problem = make_problem(20, 25, d=6)
    shift = 3 * np.random.default_rng(1).standard_normal(6)
    moved = sa.AttentionProblem(problem.q, problem.k + shift, scale=problem.scale)
    small = (compress_problem(x, 3, kind, rng=0, center=center) for x in (problem, moved))
    first, second = map(dense_attention, small)
    if center is False and kind in ("svd", "pca_k"):
        # Other logits, and others are the best of them: the invariance is that of centring.
        assert np.abs(first - second).max() > 1e-3
    else:
        assert np.abs(first - second).max() <= 1e-12


@every_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_masked_keys_decide_nothing(kind: str, dtype: Any) -> None:
    keep = np.arange(30) % 3 > 0
    q, k = (x.astype(dtype) for x in gaussian(20, 30, 6))
    poisoned = np.where(keep[:, None], k, np.nan).astype(dtype)
    expected_q, expected_k = compress(q, k[keep], 3, kind, rng=0)
    for keys in (k, poisoned):
        qh, kh = compress(q, keys, 3, kind, rng=0, key_mask=keep)
        assert np.array_equal(qh, expected_q)
        assert np.array_equal(kh[keep], expected_k)
        assert not kh[~keep].any()
    if kind not in RANDOM_KINDS:
        assert not np.array_equal(compress(q, k, 3, kind)[0], expected_q)


@every_kind
def test_a_problem_keeps_all_but_its_width(kind: str) -> None:
    keep = np.arange(12) < 9
    choices: list[dict[str, Any]] = [{}, {"key_mask": keep}, {"causal": True}, {"scale": 0.3}]
    for options in choices:
        problem = make_problem(12, 12, np.float32, d=6, **options)
        small = compress_problem(problem, 2, kind, rng=0)
        assert (small.n_q, small.n_k, small.d, small.d_v) == (12, 12, 2, 3)
        assert (small.scale, small.causal, small.dtype) == (
            problem.scale,
            problem.causal,
            problem.dtype,
        )
        assert (small.key_mask is None) == (problem.key_mask is None)
        assert np.array_equal(small.values, problem.values)
        q, k = compress(problem.q, problem.k, 2, kind, 0, key_mask=problem.key_mask)
        assert np.array_equal(small.q, q)
        assert np.array_equal(small.k, k)


@every_kind
def test_precision_and_layout_are_those_of_the_input(kind: str) -> None:
    q, k = gaussian(40, 50, 6)
    wide = compress(q, k, 3, kind, rng=0)
    for dtype in (np.float16, np.float32):
        qh, kh = compress(q.astype(dtype), k.astype(dtype), 3, kind, rng=0)
        for x in (qh, kh):
            assert x.dtype == np.float32
            assert x.flags.c_contiguous
        u = np.finfo(dtype).eps
        # Inputs are rounded once; logits of size 10 from sums of 6, and gaps of singular values.
        assert np.abs(qh @ kh.T - wide[0] @ wide[1].T).max() <= 200 * u
    strided = compress(np.asfortranarray(q), np.repeat(k, 2, axis=1)[:, ::2], 3, kind, rng=0)
    assert all(np.array_equal(a, b) for a, b in zip(strided, wide, strict=True))
    assert np.array_equal(q, gaussian(40, 50, 6)[0])


@pytest.mark.threads
@every_kind
def test_bits_do_not_depend_on_the_number_of_threads(kind: str) -> None:
    q, k = (x.astype(np.float32) for x in gaussian(2100, 1700, 24))
    made = []
    for count in (1, 2):
        with limit_threads(count):
            made.append(compress(q, k, 8, kind, rng=0))
    assert all(np.array_equal(a, b) for a, b in zip(*made, strict=True))


@every_kind
def test_attention_is_wrong_by_what_its_logits_allow(kind: str, global_random_seed: int) -> None:
    problem = make_problem(40, 50, d=8, seed=global_random_seed)
    for d_in in (2, 6):
        small = compress_problem(problem, d_in, kind, rng=global_random_seed)
        eta = compression_eta(problem.q, problem.k, small.q, small.k, scale=problem.scale)
        wrong = np.abs(dense_attention(small) - dense_attention(problem)).sum(axis=1) / 2
        assert (wrong <= np.asarray(tv_bound(eta)) + 1e-12).all()
        assert (wrong > np.asarray(tv_bound(eta / 8))).any()  # an eta too small is seen


# --- refusals -----------------------------------------------------------------------------------

Q, K = gaussian(5, 6, 4)
REFUSED: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (
        (Q, K, 5),
        {},
        ValueError,
        "d_in must be between 1 and d = 4, got 5; change d_in for kind 'svd'",
    ),
    (
        (Q, K, 0),
        {"kind": "gaussian"},
        ValueError,
        "d_in must be at least 1, got 0; change d_in for kind 'gaussian'",
    ),
    (
        (Q[:, :3], K[:, :3], 5),
        {"kind": "srht"},
        ValueError,
        "d_in must be between 1 and the padded d = 4, got 5; change d_in for kind 'srht'",
    ),
    (
        (Q, K, 2.0),
        {},
        TypeError,
        "d_in must be an integer, got float; give one of at least 1",
    ),
    (
        (Q, K, 2),
        {"kind": "pca"},
        ValueError,
        "kind must be one of svd, gaussian, srht, pca_k, got 'pca'; did you mean 'pca_k'?",
    ),
    (
        (Q, K, 2),
        {"kind": None},
        TypeError,
        "kind must be a name, got NoneType; choose one of svd, gaussian, srht, pca_k",
    ),
    (
        (Q, K, 2),
        {"center": 1},
        TypeError,
        "center must be a bool or None, got int; True subtracts the mean key, which no softmax "
        "sees",
    ),
    (
        (Q, K[:, :3], 2),
        {},
        ValueError,
        "k must have the head width d = 4 of q, got 3; project q and k to one width",
    ),
    (
        (1e200 * Q, 1e200 * K, 2),
        {},
        ValueError,
        "",  # where it overflows first is not promised
    ),
    (
        (3e38 * np.ones((2, 64), np.float32), np.ones((2, 64), np.float32), 2),
        {"kind": "gaussian", "rng": 0},
        ValueError,
        "",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "error", "text"), REFUSED)
def test_arguments_that_do_not_fit_are_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=message(text) if text else "must be finite"):
        compress(*arguments, **options)


def test_maps_and_projections_that_do_not_fit_are_refused() -> None:
    problem = sa.AttentionProblem(Q, K)
    good = fit_compression(problem, 2)
    bad = Compression(good.query_map[:3], good.key_map, good.shift)
    text = (
        "maps must have shapes (d, d_in), (d, d_in) and (d,) with d = 4, got (3, 2), (4, 2) and "
        "(4,); fit them to this problem"
    )
    with pytest.raises(ValueError, match=message(text)):
        apply_compression(problem, bad)
    text = "kind must be one that draws, gaussian or srht, got 'svd'; use fit_compression"
    with pytest.raises(ValueError, match=message(text)):
        draw_projection(4, 2, "svd")
    text = (
        "problem must be an AttentionProblem, got ndarray; make one with "
        "sketchattn.AttentionProblem(q, k, v)"
    )
    wrong: Any = Q
    with pytest.raises(TypeError, match=message(text)):
        compress_problem(wrong, 2)
