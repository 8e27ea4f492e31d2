"""Contracts that every registered method meets, and what floors and predictors promise."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from method_cases import (
    CASES,
    IDS,
    MethodCase,
    dense_attention,
    make_problem,
    rounding,
    unit_roundoff,
)
from numpy.typing import NDArray
from sklearn.base import clone

import sketchattn as sa
from sketchattn.draws import check_draw

Array = NDArray[Any]
every_method = pytest.mark.parametrize("case", CASES, ids=IDS)

GRID: dict[str, tuple[dict[str, Any], int]] = {
    "square": ({"n_q": 12, "n_k": 12}, 5),
    "few queries": ({"n_q": 3, "n_k": 11}, 5),
    "few keys": ({"n_q": 11, "n_k": 4}, 3),
    "one token": ({"n_q": 1, "n_k": 1}, 1),
    "rank one": ({"n_q": 9, "n_k": 9}, 1),
    "full rank": ({"n_q": 8, "n_k": 8}, 8),
}


def seed_of(case: MethodCase, seed: int) -> int | None:
    return seed if case.traits.randomized else None


@every_method
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", GRID)
def test_shape_precision_and_promises(case: MethodCase, dtype: Any, name: str) -> None:
    options, rank = GRID[name]
    problem = make_problem(**options, dtype=dtype)
    before = [x.copy() for x in problem.arrays if x is not None]
    ahat = case(rank).approximate(problem, seed_of(case, 1))
    output = ahat @ problem.values
    traits = case(rank).traits
    assert ahat.shape == (problem.n_q, problem.n_k)
    assert output.shape == problem.values.shape[:0] + (problem.n_q, problem.d_v)
    assert output.dtype == ahat.dtype == dtype
    assert np.isfinite(output).all()
    dense = ahat.to_dense().astype(np.float64)
    tolerance = rounding(problem)
    scale = max(1.0, float(np.abs(dense).max(initial=0.0)))
    if traits.row_stochastic:
        assert np.all(np.abs(ahat.row_sums() - 1) <= tolerance * scale)
    if traits.nonnegative:
        assert np.all(dense >= 0)
    if traits.exact_at_full_rank and rank == problem.n_k:
        assert np.all(np.abs(dense - dense_attention(problem)) <= tolerance)
    assert np.linalg.matrix_rank(dense, tol=1e3 * tolerance * scale) <= ahat.rank_bound
    assert ahat.nbytes >= 0
    assert (ahat.path == "exact") == (case.name == "exact")
    for x, kept in zip(problem.arrays, before, strict=True):
        assert x is not None
        assert np.array_equal(x, kept)


@every_method
def test_the_same_rng_gives_the_same_bits_and_so_does_its_draw(
    case: MethodCase, tmp_path: Path
) -> None:
    problem = make_problem(15, 20)
    method = case(6)
    rng = seed_of(case, 7)
    first = method.approximate(problem, rng) @ problem.values
    assert np.array_equal(first, method.approximate(problem, rng) @ problem.values)
    draw = method.draw(problem, rng)
    assert set(draw) == set(check_draw(draw, tuple(draw)))
    draw.save(tmp_path / "draw.safetensors")
    loaded = sa.Draw.load(tmp_path / "draw.safetensors") if draw else draw
    for again in (draw, loaded):
        assert np.array_equal(first, method.approximate(problem, draw=again) @ problem.values)
    other = method.approximate(problem, seed_of(case, 8)) @ problem.values
    assert np.array_equal(first, other) != method.traits.randomized
    text = "rng must be None when draw is given, got both; pass one of them"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        method.approximate(problem, 3, draw=draw)


@every_method
def test_draws_that_do_not_fit_are_refused(case: MethodCase) -> None:
    problem = make_problem(15, 20)
    method = case(6)
    with pytest.raises(TypeError, match="draw must be a mapping from names to arrays, got int"):
        method.approximate(problem, draw=3)  # type: ignore[arg-type]  # refused
    draw = dict(method.draw(problem, seed_of(case, 0)))
    with pytest.raises(ValueError, match="draw must hold the arrays"):
        method.approximate(problem, draw=draw | {"foreign": np.zeros(3)})


@every_method
def test_a_mask_is_a_deletion(case: MethodCase) -> None:
    traits = case.traits
    mask = np.array([True, False, True, True, False, True, True, True, False, True])
    problem = make_problem(10, 10, key_mask=mask)
    method = case(4)
    if not traits.key_mask:
        with pytest.raises(ValueError, match="key_mask must be None for method"):
            method.approximate(problem, seed_of(case, 2))
        return
    short = sa.AttentionProblem(
        problem.q, problem.k[mask], problem.values[mask], scale=problem.scale
    )
    masked = method.approximate(problem, seed_of(case, 2))
    deleted = method.approximate(short, seed_of(case, 2))
    dense = masked.to_dense()
    assert np.all(dense[:, ~mask] == 0)
    k, v = problem.k.copy(), problem.values.copy()
    k[~mask] = v[~mask] = 1e3
    filled = sa.AttentionProblem(problem.q, k, v, scale=problem.scale, key_mask=mask)
    assert np.array_equal(dense, method.approximate(filled, seed_of(case, 2)).to_dense())
    # The projection of Linformer belongs to positions: with fewer of them it is another draw.
    if case.name != "linformer":
        assert np.allclose(dense[:, mask], deleted.to_dense(), atol=rounding(problem))
    over = case(9).approximate(problem, seed_of(case, 2))
    assert over.effective_rank is None or over.effective_rank <= 9


@every_method
@pytest.mark.parametrize("causal", [True, "bottom-right"])
def test_causal_methods_do_not_see_the_future(case: MethodCase, causal: Any) -> None:
    traits = case.traits
    n_q = 12 if causal is True else 9
    problem = make_problem(n_q, 12, causal=causal)
    method = case(5)
    if not traits.causal:
        if not traits.oracle:
            with pytest.raises(ValueError, match="causal must be False for method"):
                method.approximate(problem, seed_of(case, 2))
        return
    output = method.approximate(problem, seed_of(case, 2)) @ problem.values
    seen = 12 - n_q + 4  # keys that rows 0..3 see
    k, v = problem.k.copy(), problem.values.copy()
    k[seen:] += 1
    v[seen:] *= -3
    changed = sa.AttentionProblem(problem.q, k, v, scale=problem.scale, causal=causal)
    again = method.approximate(changed, seed_of(case, 2)) @ changed.values
    assert np.array_equal(output[:4], again[:4])
    if case.name != "zero":
        assert not np.array_equal(output[4:], again[4:])


@every_method
def test_ranks_out_of_range(case: MethodCase) -> None:
    problem = make_problem(6, 7)
    if "rank" not in case(1).get_params():
        return
    for rank, verb in ((0, "raise"), (8, "lower")):
        text = (
            f"rank must be between 1 and n_k = 7, got {rank}; {verb} rank or use method='exact'"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            case(rank).approximate(problem, seed_of(case, 0))
    text = "rank must be an integer, got float; give one in 1..n_k = 7"
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        case(2.5).approximate(problem, seed_of(case, 0))  # type: ignore[arg-type]  # refused
    case(7).approximate(problem, seed_of(case, 0))


@every_method
def test_methods_hold_parameters_only(case: MethodCase) -> None:
    method = case(3)
    assert clone(method).get_params() == method.get_params()
    assert type(method).__name__ in repr(method)
    assert sa.methods()[method.name] is type(method)
    assert method.name == method.name.lower()
    with pytest.raises(TypeError, match="problem must be an AttentionProblem, got ndarray"):
        method.approximate(np.zeros((3, 3)))  # type: ignore[arg-type]  # refused


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("topk", "svd", "jl", "column_sampling", "uniform")],
    ids=str,
)
def test_the_error_falls_with_the_rank(case: MethodCase) -> None:
    """Medians over 15 draws at ranks a factor of 8 apart: spread is far below the decrease."""
    problem = sa.make_heads("clustered", n=64, d=8, rng=0)[0].astype(np.float64)
    medians = []
    for rank in (4, 32):
        seeds = range(15) if case.traits.randomized else [None]
        medians.append(
            float(
                np.median(
                    [
                        sa.error_report(
                            problem, case(rank).approximate(problem, s), spectral=False
                        ).output_fro_rel
                        for s in seeds
                    ]
                )
            )
        )
    assert medians[1] < 0.8 * medians[0], medians


# --- floors and predictors ------------------------------------------------------------------


def test_the_mean_of_v_has_the_error_of_its_identity() -> None:
    """``|A - 11^T/n_k|_F^2 = |A|_F^2 - n_q/n_k``."""
    problem = make_problem(20, 30)
    a = dense_attention(problem)
    difference = a - sa.VMean().approximate(problem).to_dense()
    assert abs((difference**2).sum() - ((a**2).sum() - 20 / 30)) <= 1e-12


def test_top_keys_keep_the_mass_that_they_hold() -> None:
    problem = make_problem(20, 30)
    a = dense_attention(problem)
    kept = np.sort(a, axis=1)[:, -6:].sum(axis=1)
    renormalized = sa.TopK(rank=6).approximate(problem).to_dense()
    assert np.all(np.abs(0.5 * np.abs(a - renormalized).sum(axis=1) - (1 - kept)) <= 1e-13)
    raw = sa.TopK(rank=6, renormalize=False).approximate(problem).to_dense()
    assert np.all(np.abs(np.abs(a - raw).sum(axis=1) - (1 - kept)) <= 1e-13)


def test_raw_top_keys_are_the_floor_of_sparse_rows() -> None:
    problem = make_problem(4, 6)
    a = dense_attention(problem)
    raw = sa.TopK(rank=2, renormalize=False).approximate(problem).to_dense()
    best = [
        min(
            (row**2).sum() - (row[list(pair)] ** 2).sum()
            for pair in itertools.combinations(range(6), 2)
        )
        for row in a
    ]
    assert np.allclose(((a - raw) ** 2).sum(axis=1), best, atol=1e-15)


def test_horvitz_thompson_columns_are_unbiased_with_the_stated_variance() -> None:
    """All subsets of 3 of 8 keys: ``E Ahat = A``, ``(n^2/r)(1 - r/n) S^2``."""
    problem = make_problem(5, 8)
    a, v, n, r = dense_attention(problem), problem.values, 8, 3
    method = sa.UniformColumns(rank=r, estimator="horvitz-thompson")
    made = [
        method.approximate(problem, draw={"columns": np.array(subset)}).to_dense()
        for subset in itertools.combinations(range(n), r)
    ]
    assert np.allclose(np.mean(made, axis=0), a, atol=1e-13)
    found = np.mean([(((m - a) @ v) ** 2).sum() for m in made])
    x = np.stack([np.outer(a[:, j], v[j]) for j in range(n)])
    spread = ((x - x.mean(axis=0)) ** 2).sum() / (n - 1)
    assert abs(found - n**2 / r * (1 - r / n) * spread) <= 1e-12
    # The self-normalised estimator is biased: this check can fail.
    biased = [
        sa.UniformColumns(rank=r).approximate(problem, draw={"columns": np.array(s)}).to_dense()
        for s in itertools.combinations(range(n), r)
    ]
    assert np.abs(np.mean(biased, axis=0) - a).max() > 1e-2


@every_method
def test_no_matrix_of_this_rank_beats_the_floor(case: MethodCase) -> None:
    problem = make_problem(20, 20)
    a = dense_attention(problem)
    sigma = np.linalg.svd(a, compute_uv=False)
    ahat = case(5).approximate(problem, seed_of(case, 4))
    tail = sigma[ahat.rank_bound :]
    dense = ahat.to_dense()
    slack = 1e3 * unit_roundoff(np.float64)
    assert np.linalg.norm(a - dense) >= np.linalg.norm(tail) - slack
    assert np.linalg.norm(a - dense, 2) >= (tail[0] if len(tail) else 0.0) - slack
    if case.name == "svd":
        assert abs(np.linalg.norm(a - dense) - np.linalg.norm(tail)) <= slack


def test_draws_are_nested_in_the_rank() -> None:
    problem = make_problem(10, 40)
    small, large = (sa.UniformColumns(rank=r).draw(problem, rng=5)["columns"] for r in (7, 21))
    assert np.array_equal(small, large[:7])


@pytest.mark.parametrize(
    ("columns", "kind", "text"),
    [
        (
            [0, 0, 1],
            ValueError,
            "columns must be distinct, got 1 repeated; this estimator draws without replacement",
        ),
        (
            [0, 1, 9],
            ValueError,
            "columns must be indices of visible keys, got 9; "
            "draw from the 9 keys that are not masked",
        ),
        (
            [0, 1],
            ValueError,
            "columns must hold 3 keys for rank = 3, got 2; change rank or the draw",
        ),
        (
            [0.0, 1.0, 2.0],
            TypeError,
            "columns must be a one-dimensional integer array, got float64 of shape (3,); "
            "give indices of keys",
        ),
    ],
)
def test_uniform_columns_that_no_draw_could_be(
    columns: list[float], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=f"^{re.escape(text)}$"):
        sa.UniformColumns(rank=3).approximate(make_problem(9, 9), draw={"columns": columns})
