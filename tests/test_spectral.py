"""Singular values: block Krylov and the Gram route against LAPACK."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from method_cases import dense_attention, make_problem
from numpy.typing import NDArray
from scipy.sparse.linalg import aslinearoperator

from sketchattn.operators import DenseAttention
from sketchattn import spectral

Array = NDArray[Any]


def spectrum(sigma: Array, m: int, n: int, seed: int = 0) -> Array:
    """Return a random m x n matrix with these singular values."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((m, len(sigma))))[0]
    v = np.linalg.qr(rng.standard_normal((n, len(sigma))))[0]
    out: Array = (u * sigma) @ v.T
    return out


MATRICES: dict[str, Array] = {
    "decaying": spectrum(0.8 ** np.arange(40), 60, 50),
    "polynomial": spectrum(1.0 / np.arange(1, 31), 200, 30),
    "wide": spectrum(0.5 ** np.arange(8), 9, 120),
    "rank one": spectrum(np.array([3.0]), 40, 40),
    "rank deficient": spectrum(np.array([2.0, 2.0, 1.0]), 70, 70),
    "clustered": spectrum(1 + 1e-3 * np.arange(30)[::-1], 80, 80),
    "identity": np.eye(64),
    "zero": np.zeros((20, 30)),
    "one entry": np.array([[-2.5]]),
    "row": np.arange(7.0)[None, :],
    "tiny": 1e-200 * spectrum(np.array([1.0, 0.5]), 10, 10),
    "huge": 1e200 * spectrum(np.array([1.0, 0.5]), 10, 10),
}


@pytest.mark.parametrize("name", MATRICES)
def test_spectral_norms_are_those_of_lapack(name: str) -> None:
    matrix = MATRICES[name]
    truth = float(np.linalg.norm(matrix, 2))
    # The largest eigenvalue of a Gram matrix is right to a small multiple of n u.
    assert abs(spectral.dense_spectral_norm(matrix) - truth) <= 1e-13 * truth * max(matrix.shape)
    # Stopped at a change of 1e-8; values are second order in the angle, so the error is smaller.
    assert abs(spectral.spectral_norm(aslinearoperator(matrix)) - truth) <= 1e-8 * truth


@pytest.mark.parametrize("name", ["decaying", "polynomial", "wide", "rank deficient"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_block_krylov_finds_the_largest_triplets(name: str, rank: int) -> None:
    matrix = MATRICES[name]
    truth = np.linalg.svd(matrix, compute_uv=False)
    u, s, vt = spectral.block_krylov(aslinearoperator(matrix), rank)
    r = len(s)
    assert r == min(rank, *matrix.shape)
    assert np.all(np.abs(s - truth[:r]) <= 1e-8 * truth[0])
    assert np.allclose(u.T @ u, np.eye(r), atol=1e-10)
    assert np.allclose(vt @ vt.T, np.eye(r), atol=1e-10)
    assert np.linalg.norm(matrix - (u * s) @ vt, 2) <= (truth[r] if r < len(truth) else 0) + (
        1e-6 * truth[0]
    )


def test_one_iteration_is_not_enough_and_says_so() -> None:
    flat = spectrum(np.linspace(1, 0.9, 300), 400, 400)
    with pytest.raises(RuntimeError, match="must settle within 2 iterations"):
        spectral.block_krylov(aslinearoperator(flat), 1, block=1, max_iterations=2)


@pytest.mark.parametrize("shape", [(30, 30), (20, 45), (45, 20)])
def test_the_decomposition_of_a_problem(shape: tuple[int, int]) -> None:
    problem = make_problem(*shape)
    dense = dense_attention(problem)
    truth = np.linalg.svd(dense, compute_uv=False)
    assert np.allclose(spectral.singular_values(problem), truth, atol=1e-13)
    assert abs(spectral.exact_spectral_norm(problem) - truth[0]) <= 1e-12
    u, s, vt = spectral.truncated_svd(problem, 5)
    assert abs(np.linalg.norm(dense - (u * s) @ vt, 2) - truth[5]) <= 1e-12
    # Computed once.
    assert spectral.truncated_svd(problem, 5)[1].base is spectral.singular_values(problem)


def test_large_problems_are_decomposed_by_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(60, 70, d=3)
    truth = np.linalg.svd(dense_attention(problem), compute_uv=False)
    monkeypatch.setattr(spectral, "DENSE_LIMIT", 8)
    assert abs(spectral.exact_spectral_norm(problem) - truth[0]) <= 1e-8 * truth[0]
    for rank in (2, 6, 4):  # 6 computes again, 4 cuts
        s = spectral.truncated_svd(problem, rank)[1]
        assert np.all(np.abs(s - truth[:rank]) <= 1e-6 * truth[0])
    text = (
        "min(n_q, n_k) must be at most 8 for all singular values, got 60; "
        "use truncated_svd for the largest ones"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        spectral.singular_values(problem)


def test_empty_operators_have_norm_zero() -> None:
    assert spectral.spectral_norm(DenseAttention(np.zeros((0, 4)))) == 0.0
    assert spectral.dense_spectral_norm(np.zeros((0, 4))) == 0.0
