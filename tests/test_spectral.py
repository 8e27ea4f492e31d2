"""Singular values: block Krylov and Gram matrices against LAPACK, hard spectra included."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from method_cases import dense_attention, make_problem
from numpy.typing import NDArray
from scipy.sparse.linalg import aslinearoperator

import sketchattn as sa
from sketchattn.operators import spectra as spectral
from sketchattn.operators.spectra import (
    block_krylov,
    dense_spectral_norm,
    exact_spectral_norm,
    singular_values,
    spectral_norm,
    truncated_svd,
)
from sketchattn.operators.wrapped import as_operator

Array = NDArray[Any]
U = 2.0**-53
TOLERANCE = 1e-8  # of spectral_norm: no wanted value moved by more in the last iteration

pytestmark = pytest.mark.usefixtures("one_thread")


def rotated(values: Array, m: int, n: int, seed: int = 0) -> Array:
    """Return an m x n matrix with given singular values between random orthonormal bases."""
    rng = np.random.default_rng(seed)
    r = min(m, n, len(values))
    left = np.linalg.qr(rng.standard_normal((m, r)))[0]
    right = np.linalg.qr(rng.standard_normal((n, r)))[0]
    product: Array = (left * values[:r]) @ right.T
    return product


def spectra(n: int) -> dict[str, Array]:
    """Return singular values from easy to as hard as they get."""
    i = np.arange(n)
    return {
        "geometric": 0.9**i,
        "harmonic": 1 / (1 + i),
        "slow": 1 / np.log(2 + i),
        "linear": 1 - i / n,
        "flat": np.ones(n),
        "nearly flat": 1 + 1e-5 * (1 - i / n),
        "one above": np.concatenate([[1.0], np.full(n - 1, 0.9999)]),
        "cluster above": np.concatenate([1 + 1e-6 * np.arange(40)[::-1], np.full(n - 40, 0.999)]),
        "two clusters": np.where(i < n // 2, 1.0, 0.5),
        "edge": 1.0001 - (i / n) ** 0.25,
        "rank one": np.where(i == 0, 2.0, 0.0),
        "rank three": np.where(i < 3, 3.0 - i, 0.0),
        "tiny tail": np.where(i < 20, 1.0, 1e-13),
        "many scales": 10.0 ** (-15 * i / n),
    }


SIZE = 200
SPECTRA = spectra(SIZE)
SHAPES = {"square": (SIZE, SIZE), "tall": (3 * SIZE, SIZE), "wide": (SIZE, 3 * SIZE)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_spectral_norm_is_that_of_lapack(name: str, shape: str) -> None:
    x = rotated(SPECTRA[name], *SHAPES[shape])
    expected = float(scipy.linalg.svdvals(x)[0])
    # An iteration that no longer moves may be short of the limit by several times its last step.
    assert spectral_norm(aslinearoperator(x)) == pytest.approx(expected, rel=100 * TOLERANCE)
    # The square root of an eigenvalue: half the backward error of a Gram matrix, 2 n u.
    assert dense_spectral_norm(x) == pytest.approx(expected, rel=max(x.shape) * 2 * U)


@pytest.mark.parametrize("name", SPECTRA)
def test_spectral_norm_never_exceeds_the_true_one(name: str) -> None:
    # The values of M W with an orthonormal W interlace; a basis that lost its orthogonality shows
    # as a value that is too large.  Rounding of the products: n u.
    x = rotated(SPECTRA[name], SIZE, SIZE)
    for tolerance in (1e-3, 1e-8, 1e-13):
        found = spectral_norm(aslinearoperator(x), tolerance=tolerance)
        assert found <= SPECTRA[name][0] * (1 + 10 * SIZE * U)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e150])
def test_spectral_norm_of_any_size(scale: float) -> None:
    x = scale * rotated(SPECTRA["harmonic"], 60, 50)
    expected = scale * float(np.linalg.norm(x / scale, 2))
    assert dense_spectral_norm(x) == pytest.approx(expected, rel=1e-13)
    assert spectral_norm(aslinearoperator(x)) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 3), (16, 16), (17, 40), (40, 17)])
def test_norms_of_small_and_zero_matrices(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal(shape)
    expected = float(np.linalg.norm(x, 2))
    assert spectral_norm(aslinearoperator(x)) == pytest.approx(expected, rel=1e-12)
    assert dense_spectral_norm(x) == pytest.approx(expected, rel=1e-13)
    zero = np.zeros(shape)
    assert spectral_norm(aslinearoperator(zero)) == 0.0
    assert dense_spectral_norm(zero) == 0.0


def test_norms_of_empty_matrices() -> None:
    for shape in ((0, 3), (3, 0), (0, 0)):
        assert dense_spectral_norm(np.zeros(shape)) == 0.0
        assert spectral_norm(aslinearoperator(np.zeros(shape))) == 0.0


def test_dense_norm_of_extreme_entries_neither_overflows_nor_underflows() -> None:
    for big in (1e300, 1e-300, 5e-324):
        with np.errstate(all="raise", under="ignore"):
            assert dense_spectral_norm(np.array([[big, 0.0], [0.0, big]])) == big
    assert dense_spectral_norm(np.array([[1e200, 0], [0, 1e-200]])) == 1e200


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_triplets_are_those_of_lapack(name: str, shape: str) -> None:
    x = rotated(SPECTRA[name], *SHAPES[shape])
    expected = scipy.linalg.svdvals(x)
    for rank in (1, 7):
        u, s, vt = block_krylov(aslinearoperator(x), rank)
        assert (u.shape, s.shape, vt.shape) == ((len(x), rank), (rank,), (rank, x.shape[1]))
        assert np.all(np.abs(s - expected[:rank]) <= 1e-6 * expected[0])
        assert np.all(np.diff(s) <= 0)
        assert np.abs(u.T @ u - np.eye(rank)).max() <= 1e3 * U
        assert np.abs(vt @ vt.T - np.eye(rank)).max() <= 1e3 * U
        # M v = s u exactly for Ritz triplets, whatever has converged.
        assert np.abs(x @ vt.T - u * s).max() <= 1e3 * U * expected[0]


def test_a_smaller_block_finds_the_same_values() -> None:
    x = rotated(SPECTRA["geometric"], 80, 90)
    for block in (1, 2, 90, 200):
        s = block_krylov(aslinearoperator(x), 3, block=block)[1]
        assert np.allclose(s, SPECTRA["geometric"][:3], rtol=1e-7, atol=0)


def test_more_triplets_than_there_are() -> None:
    x = np.random.default_rng(0).standard_normal((5, 9))
    u, s, vt = block_krylov(aslinearoperator(x), 50)
    assert len(s) == 5
    assert np.allclose((u * s) @ vt, x, atol=1e-13)


def test_the_start_does_not_matter_beyond_the_tolerance() -> None:
    x = rotated(SPECTRA["linear"], SIZE, SIZE)
    first, second = (block_krylov(aslinearoperator(x), 1, seed=seed)[1] for seed in (0, 1))
    assert first == pytest.approx(second, rel=1e-6)
    again = block_krylov(aslinearoperator(x), 1, seed=0)[1]
    assert np.array_equal(first, again)


def test_a_value_that_does_not_settle_raises_with_its_last_change() -> None:
    x = rotated(SPECTRA["linear"], SIZE, SIZE)
    values = []
    for iterations in (2, 3):
        with pytest.raises(RuntimeError) as caught:
            block_krylov(aslinearoperator(x), 1, max_iterations=iterations, tolerance=1e-15)
        found = re.fullmatch(
            rf"singular values must settle within {iterations} iterations to 1e-15, got a last "
            r"change of (\S+); raise block or tolerance",
            str(caught.value),
        )
        assert found is not None, str(caught.value)
        values.append(float(found[1]))
    assert 0 < values[1] < values[0] < 1
    # A change that is tolerated settles.
    assert block_krylov(aslinearoperator(x), 1, max_iterations=12, tolerance=values[1])[1] > 0.9


def test_products_in_single_precision_settle() -> None:
    # Their rounding, 1e-7, is larger than the tolerance: it must not look like a change.
    x = rotated(SPECTRA["linear"], SIZE, SIZE).astype(np.float32)
    found = spectral_norm(aslinearoperator(x))
    assert found == pytest.approx(float(np.linalg.norm(x.astype(float), 2)), rel=1e-6)


# --- singular values of problems ----------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"n_q": 30, "n_k": 30},
        {"n_q": 20, "n_k": 45},
        {"n_q": 45, "n_k": 20},
        {"n_q": 30, "n_k": 30, "causal": True},
        {"n_q": 30, "n_k": 30, "key_mask": np.arange(30) % 4 != 1},
    ],
    ids=["square", "wide", "tall", "causal", "masked"],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_singular_values_of_a_problem_are_those_of_its_matrix(
    options: dict[str, Any], dtype: Any
) -> None:
    problem = make_problem(dtype=dtype, **options)
    dense = dense_attention(problem)
    expected = scipy.linalg.svdvals(dense)
    error = 1e-12 * expected[0]
    assert np.abs(singular_values(problem) - expected).max() <= error
    assert abs(exact_spectral_norm(problem) - expected[0]) <= error
    u, s, vt = truncated_svd(problem, 5)
    assert (u.shape, s.shape, vt.shape) == ((problem.n_q, 5), (5,), (5, problem.n_k))
    assert abs(np.linalg.norm(dense - (u * s) @ vt, 2) - expected[5]) <= error
    assert singular_values(problem) is singular_values(problem)
    assert s.base is singular_values(problem)
    for x in (u, s, vt, singular_values(problem)):
        assert not x.flags.writeable  # kept by the problem


def count_products(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that says how many exact products ran since it was last asked."""
    counted = [0]
    plain = sa.SoftmaxAttention._matmat

    def product(self: sa.SoftmaxAttention, x: Array) -> Array:
        counted[0] += 1
        return plain(self, x)

    monkeypatch.setattr(sa.SoftmaxAttention, "_matmat", product)

    def since() -> int:
        found, counted[0] = counted[0], 0
        return found

    return since


def test_large_problems_take_their_largest_values_from_the_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = make_problem(60, 50)
    expected = scipy.linalg.svdvals(dense_attention(problem))
    monkeypatch.setattr(spectral, "DENSE_LIMIT", 49)

    def forbidden(*_: object) -> Array:
        pytest.fail("the matrix was formed")

    monkeypatch.setattr(sa.SoftmaxAttention, "to_dense", forbidden)
    monkeypatch.setattr(sa.SoftmaxAttention, "rows", forbidden)
    assert exact_spectral_norm(problem) == pytest.approx(expected[0], rel=1e-7)
    calls = count_products(monkeypatch)
    u, s, vt = truncated_svd(problem, 6)
    assert np.allclose(s, expected[:6], rtol=0, atol=1e-6 * expected[0])
    assert calls() > 0
    smaller = truncated_svd(problem, 4)
    assert calls() == 0  # a smaller rank is part of what is known
    assert np.array_equal(smaller[1], s[:4])
    assert (smaller[0].shape, smaller[2].shape) == ((60, 4), (4, 50))
    assert np.allclose(truncated_svd(problem, 8)[1], expected[:8], rtol=0, atol=1e-6 * expected[0])
    assert calls() > 0
    assert np.abs(u.T @ u - np.eye(6)).max() <= 1e-12
    assert np.abs(vt @ vt.T - np.eye(6)).max() <= 1e-12
    assert not any(x.flags.writeable for x in (u, s, vt))


def test_all_values_of_a_large_matrix_are_refused() -> None:
    text = (
        "min(n_q, n_k) must be at most 2048 for all singular values, got 2049; "
        "use truncated_svd for the largest ones"
    )
    zeros = np.zeros((2049, 1), np.float32)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        singular_values(sa.AttentionProblem(zeros, zeros))
    # Only the smaller side counts: A = 11^T/n_k here.
    values = singular_values(sa.AttentionProblem(zeros[:3], zeros))
    assert np.allclose(values, [np.sqrt(3 / 2049), 0, 0], atol=1e-15)


# --- both norms of a report ---------------------------------------------------------------------


def _head(n: int = 400, dtype: Any = np.float32, size: float = 1.0, **options: Any) -> Any:
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((n, 8)) for _ in range(3))
    arrays = (x.astype(dtype) for x in (size * q, size * k, v))
    return sa.AttentionProblem(*arrays, **options)


def _norms(problem: Any, other: Array) -> tuple[float, float]:
    dense = problem.astype(np.float64).exact.to_dense()
    return float(np.linalg.norm(other - dense, 2)), float(np.linalg.norm(dense, 2))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": True}])
def test_norms_of_a_difference_and_of_the_matrix(
    options: dict[str, Any], dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectral, "DENSE_LIMIT", 100)
    if "mask" in options:
        options = {"key_mask": np.random.default_rng(6).random(400) < 0.8}
    asked: list[spectral.Asked] = []
    multiply = spectral._Exact.multiply

    def count(self: Any, x: spectral.Asked) -> Array:
        asked.append(x)
        return multiply(self, x)

    monkeypatch.setattr(spectral._Exact, "multiply", count)
    problem = _head(dtype=dtype, **options)
    ahat = sa.UniformColumns(rank=40).approximate(problem, rng=0).wide()
    found = spectral.difference_norm(problem, ahat)
    expected = _norms(problem, ahat.to_dense())
    # What single precision finds is a subspace: in the values it counts by its square.
    assert found == pytest.approx(expected[0], rel=1e-8)
    assert any(x.rough for x in asked)
    shared = [x.block.shape[1] for x in asked]
    assert max(shared) == 32  # columns of both at the same time
    calls = len(asked)
    assert spectral.exact_spectral_norm(problem) == pytest.approx(expected[1], rel=1e-8)
    assert len(asked) == calls  # kept
    # And beside a norm that is known, the difference alone.
    asked.clear()
    assert spectral.difference_norm(problem, ahat) == pytest.approx(expected[0], rel=1e-8)
    assert max(x.block.shape[1] for x in asked) == 16
    # Few products in float64: that is what the rest is for.
    assert sum(not x.rough for x in asked) < sum(x.rough for x in asked)


@pytest.mark.parametrize("size", [1e-3, 1e-7, 1e-12])
def test_norms_of_differences_that_single_precision_does_not_see(size: float) -> None:
    problem = _head()
    dense = problem.astype(np.float64).exact.to_dense()
    other = dense + size * np.random.default_rng(7).standard_normal(dense.shape)
    expected = np.linalg.norm(other - dense, 2)
    # Rounding of the matrix in float64, |A| of about 1, is what is left at the smallest one.
    found = spectral.difference_norm(problem, as_operator(other, problem))
    assert abs(found - expected) <= 1e-8 * expected + 1e-14


def test_a_useless_start_costs_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _head()
    ahat = sa.UniformColumns(rank=40).approximate(problem, rng=0).wide()
    expected = spectral.difference_norm(problem, ahat)
    rng = np.random.default_rng(8)
    multiply = spectral._Exact.multiply

    def noise(self: Any, x: spectral.Asked) -> Array:
        made = multiply(self, x)
        return rng.standard_normal(made.shape) if x.rough else made

    monkeypatch.setattr(spectral._Exact, "multiply", noise)
    assert spectral.difference_norm(problem, ahat) == pytest.approx(expected, rel=1e-8)
    monkeypatch.setattr(spectral._Exact, "multiply", lambda *_: np.zeros((400, 16)))
    assert spectral.difference_norm(problem, as_operator(np.zeros((400, 400)), problem)) == 0.0


def test_logits_that_single_precision_cannot_hold_have_no_rough_products() -> None:
    assert spectral._Exact(_head()).narrow is not None
    assert spectral._Exact(_head(size=40.0)).narrow is None  # logits above 4096
    # Norms of 1e-40 and 1e40, whose products are moderate.
    q = np.full((4, 2), 1e-40)
    assert spectral._Exact(sa.AttentionProblem(q, 1e40 * np.eye(4, 2))).narrow is None


@pytest.mark.parametrize("name", SPECTRA)
def test_lanczos_finds_the_norm_or_nothing(name: str) -> None:
    x = rotated(SPECTRA[name], SIZE, SIZE)
    found = spectral._lanczos(x)
    expected = float(scipy.linalg.svdvals(x)[0])
    assert found is None or found == pytest.approx(expected, rel=SIZE * 2 * U)
    # Of few distinct values, or far below the largest, 64 vectors are enough; of 200 values within
    # 1e-5 of each other they are not.
    easy = {"geometric", "harmonic", "flat", "one above", "rank one", "rank three", "many scales"}
    assert found is not None or name not in easy
    assert found is None or name != "nearly flat"


def test_values_too_close_to_be_told_apart_are_left_to_lapack() -> None:
    # To Lanczos two values 1e-7 apart are one between them, with a residual of their distance.
    values = np.concatenate([[1.0, 1 - 1e-7], 0.5 * np.ones(SIZE - 2)])
    x = rotated(values, SIZE, SIZE)
    assert spectral._lanczos(x) in (None, pytest.approx(1.0, rel=SIZE * 2 * U))
    assert dense_spectral_norm(x) == pytest.approx(1.0, rel=SIZE * 2 * U)


def test_a_large_matrix_that_is_not_finite_is_refused() -> None:
    x = np.ones((SIZE, SIZE))
    x[3, 5] = np.nan
    with pytest.raises(ValueError, match="infs or NaNs"):
        dense_spectral_norm(x)
