"""Column sampling as a method: unbiased, with the error of its formula, and honest about masks."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.base import clone

import sketchattn as sa
from sketchattn.base.draws import Draw
from sketchattn.sampling.laws import LAWS, probabilities
from sketchattn.zoo.column_sampling import ColumnSampling

Array = NDArray[Any]

MASK = np.array([True, True, False, True, True, False, True, True])
TOKEN_LAWS = [law for law in LAWS if law != "uniform"]


def make_problem(dtype: Any = np.float64, n_q: int = 6, **options: Any) -> sa.AttentionProblem:
    g = np.random.default_rng(3)
    q, k, v = (g.standard_normal(shape).astype(dtype) for shape in ((n_q, 4), (8, 4), (8, 3)))
    return sa.AttentionProblem(2.0 * q, k, v, **options)


@pytest.fixture
def rng(global_random_seed: int) -> np.random.Generator:
    return np.random.default_rng([global_random_seed, 21])


def message(text: str) -> str:
    return f"^{re.escape(text)}$"


# --- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("key_mask", [None, MASK], ids=["all keys", "masked"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("replace", [True, False])
def test_it_is_a_times_s_transpose_s(replace: bool, dtype: Any, key_mask: Array | None) -> None:
    problem = make_problem(dtype, key_mask=key_mask)
    method = ColumnSampling(rank=5, law="value_norm", replace=replace)
    draw = method.draw(problem, rng=1)
    ahat = method.approximate(problem, draw=draw)
    a = problem.astype(np.float64).exact.to_dense()
    expected = np.zeros_like(a)
    for j, w in zip(draw["columns"], draw["weights"], strict=True):
        expected[:, j] += w * a[:, j]
    # Entries of A up to exp's error and the rounding of logits of size 10.
    rtol = 1e-13 if dtype == np.float64 else 2e-5
    np.testing.assert_allclose(ahat.to_dense(), expected, rtol=rtol)
    assert ahat.dtype == dtype
    assert ahat.shape == (6, 8)
    distinct = len(set(draw["columns"].tolist()))
    assert ahat.effective_rank == distinct <= 5
    assert ahat.rank_bound <= distinct
    assert np.array_equal(ahat.to_dense(), method.approximate(problem, rng=1).to_dense())
    p = probabilities("value_norm", problem)[draw["columns"]]
    if replace:
        np.testing.assert_allclose(draw["probabilities"], p, rtol=1e-15)
        np.testing.assert_allclose(draw["weights"], 1 / (5 * p), rtol=1e-15)
    else:
        assert distinct == 5
        np.testing.assert_allclose(draw["weights"], 1 / draw["probabilities"], rtol=1e-15)


def test_repeated_columns_are_merged() -> None:
    problem = make_problem()
    p = np.zeros(8)
    p[[2, 5]] = 0.9, 0.1
    method = ColumnSampling(rank=6, law=p, normalizer="exact", mix=0.5)
    draw = method.draw(problem, rng=0)
    counts = np.bincount(draw["columns"], minlength=8)
    assert counts.max() > 1
    ahat = method.approximate(problem, draw=draw)
    law = 0.5 * p + 1 / 16
    np.testing.assert_allclose(
        ahat.to_dense(), problem.exact.to_dense() * counts / (6 * law), rtol=1e-13
    )
    assert ahat.effective_rank == np.count_nonzero(counts)


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("law", "replace"),
    [("optimal", True), ("value_norm", True), ("pilot", True), ("uniform", False)],
)
def test_output_is_unbiased_with_the_predicted_error(
    law: str, replace: bool, rng: np.random.Generator
) -> None:
    """Level: |z| <= 5 for each entry of the output and for the mean square error."""
    problem = make_problem(key_mask=MASK)
    a, v, r, m = problem.exact.to_dense(), problem.values, 3, 6
    method = ColumnSampling(rank=r, law=law, replace=replace, pilots=np.arange(6))
    outputs = np.array([method.approximate(problem, rng=rng) @ v for _ in range(3000)])
    spread = outputs.std(axis=0, ddof=1) / math.sqrt(3000)
    assert (np.abs(outputs.mean(axis=0) - problem.output) <= 5 * spread).all()
    sizes = ((a * a).sum(axis=0) * (v * v).sum(axis=1))[MASK]
    b = np.sum(problem.output**2)
    if replace:
        p = probabilities(law, problem, pilots=np.arange(6))[MASK]
        expected = (np.sum(sizes / p) - b) / r
    else:
        expected = (m - r) / (m - 1) * (m * sizes.sum() - b) / r
    errors = np.sum((outputs - problem.output) ** 2, axis=(1, 2))
    assert abs(errors.mean() - expected) <= 5 * errors.std(ddof=1) / math.sqrt(3000)
    # Negative control: weights that are a tenth too large.
    wrong = np.abs(1.1 * outputs.mean(axis=0) - problem.output) / (1.1 * spread)
    assert wrong.max() > 5


def test_sampled_normalizer_is_self_normalised_and_needs_no_full_rows() -> None:
    for dtype, rtol in ((np.float64, 1e-13), (np.float32, 2e-5)):
        problem = make_problem(dtype, key_mask=MASK)
        exact, sampled = (
            ColumnSampling(rank=5, law="value_norm", normalizer=x) for x in ("exact", "sampled")
        )
        draw = exact.draw(problem, rng=4)
        rows = exact.approximate(problem, draw=draw).to_dense()
        normalised = sampled.approximate(problem, draw=draw)
        expected = rows / rows.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(normalised.to_dense(), expected, rtol=rtol)
        np.testing.assert_allclose(normalised.row_sums(), 1.0, rtol=1e-6)
        assert not np.allclose(rows.sum(axis=1), 1.0)
    problem = make_problem()
    ColumnSampling(rank=5, law="value_norm", normalizer="sampled").approximate(problem, rng=0)
    assert "_solution" not in problem.__dict__  # the normalisers of A were not computed


def test_uniform_without_replacement_is_the_uniform_method() -> None:
    problem = make_problem(key_mask=MASK)
    method = ColumnSampling(rank=4, law="uniform", replace=False)
    other = sa.UniformColumns(rank=4, estimator="horvitz-thompson")
    draw = method.draw(problem, rng=2)
    np.testing.assert_allclose(
        method.approximate(problem, draw=draw).to_dense(),
        other.approximate(problem, draw={"columns": draw["columns"]}).to_dense(),
        rtol=1e-14,
    )
    whole = ColumnSampling(rank=8, law="uniform", replace=False)
    assert method.traits.exact_at_full_rank
    ahat = whole.approximate(problem, rng=0)
    assert ahat.effective_rank == 6
    np.testing.assert_allclose(ahat.to_dense(), problem.exact.to_dense(), rtol=1e-13)


def test_better_laws_have_smaller_errors() -> None:
    """The formula of the error, not draws of it, on peaked attention with uneven values."""
    g = np.random.default_rng(0)
    v = g.standard_normal((64, 4)) * np.exp(g.standard_normal((64, 1)))
    problem = sa.AttentionProblem(4 * g.standard_normal((64, 8)), g.standard_normal((64, 8)), v)
    a = problem.exact.to_dense()
    sizes = (a * a).sum(axis=0) * (v * v).sum(axis=1)
    error = {
        law: float(np.sum(sizes / probabilities(law, problem, rng=0, pilots=32)))
        for law in ("optimal", "pilot", "uniform")
    }
    assert error["optimal"] < error["pilot"] < error["uniform"]


# --- draws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", list(LAWS))
@pytest.mark.parametrize("replace", [True, False])
def test_draws_of_every_law(law: str, replace: bool) -> None:
    problem = make_problem(np.float32, key_mask=MASK)
    method = ColumnSampling(rank=4, law=law, replace=replace)
    draw = method.draw(problem, rng=5)
    assert set(draw) == set(method.draw_names)
    assert draw["columns"].dtype == np.int64
    assert MASK[draw["columns"]].all()
    again = method.draw(problem, rng=5)
    assert all(np.array_equal(draw[name], again[name]) for name in draw)
    first = method.approximate(problem, rng=5)
    second = method.approximate(problem, draw=draw)
    assert np.array_equal(first.to_dense(), second.to_dense())
    # A larger rank extends the draw; the ridge laws depend on the rank unless it is given.
    larger = ColumnSampling(rank=6, law=law, replace=replace, ridge=0.25).draw(problem, rng=5)
    smaller = ColumnSampling(rank=4, law=law, replace=replace, ridge=0.25).draw(problem, rng=5)
    assert np.array_equal(larger["columns"][:4], smaller["columns"])


def test_draws_are_saved_and_read(tmp_path: Path) -> None:
    problem = make_problem()
    method = ColumnSampling(rank=5)
    draw = method.draw(problem, rng=0)
    draw.save(tmp_path / "draw.safetensors")
    loaded = Draw.load(tmp_path / "draw.safetensors")
    assert np.array_equal(
        method.approximate(problem, draw=loaded).to_dense(),
        method.approximate(problem, draw=draw).to_dense(),
    )
    # Stored in float32, as another implementation might.
    rounded = {name: x.astype("i4" if x.dtype.kind == "i" else "f4") for name, x in draw.items()}
    np.testing.assert_allclose(
        method.approximate(problem, draw=rounded).to_dense(),
        method.approximate(problem, draw=draw).to_dense(),
        rtol=1e-6,
    )


def changed(**arrays: Any) -> dict[str, Any]:
    draw: dict[str, Any] = dict(ColumnSampling(rank=3, law="uniform").draw(make_problem(), rng=0))
    return {**draw, **arrays}


@pytest.mark.parametrize(
    ("draw", "replace", "error", "text"),
    [
        (
            {"columns": np.arange(3)},
            True,
            ValueError,
            "draw must hold the arrays ['columns', 'probabilities', 'weights'], got ['columns']; "
            "use method.draw(problem, rng)",
        ),
        (
            changed(columns=np.array([0, 1, 8])),
            True,
            ValueError,
            "columns must be indices of visible keys, got 8; draw from the 8 keys that are not "
            "masked",
        ),
        (
            changed(columns=np.arange(4)),
            True,
            ValueError,
            "columns must hold 3 keys for rank = 3, got 4; change rank or the draw",
        ),
        (
            changed(columns=np.arange(4)),
            False,
            ValueError,
            "columns must hold at most 3 keys for rank = 3, got 4; change rank or the draw",
        ),
        (
            changed(columns=np.array([1, 1, 2])),
            False,
            ValueError,
            "columns must be distinct, got 1 repeated; this estimator draws without replacement",
        ),
        (
            changed(columns=np.zeros((3, 1), np.int64)),
            True,
            TypeError,
            "columns must be a one-dimensional integer array, got int64 of shape (3, 1); give "
            "indices of keys",
        ),
        (
            changed(weights=np.ones(2)),
            True,
            ValueError,
            "weights must have shape (3,), got (2,); give one for each drawn column",
        ),
        (
            changed(weights=np.ones(3, np.int64)),
            True,
            TypeError,
            "weights must hold floating-point numbers, got int64; convert them",
        ),
        (
            changed(probabilities=np.array([0.125, 0.0, 0.125])),
            True,
            ValueError,
            "probabilities must be finite and positive, got 0.0 at position 1; a column with "
            "probability zero cannot be drawn",
        ),
        (
            changed(probabilities=np.array([0.125, 2.0, 0.125])),
            True,
            ValueError,
            "probabilities must be at most 1, got 2; give those of the columns",
        ),
        (
            # n/r for a law that is not uniform
            changed(weights=np.full(3, 8 / 3), probabilities=np.array([0.125, 0.25, 0.125])),
            True,
            ValueError,
            "weights must be 1/(rank p) = 1.33333333 at position 1 for the probabilities of the "
            "draw, got 2.66666667; other weights are biased",
        ),
        (
            # 1/(rank p) for a draw without replacement
            changed(columns=np.arange(3)),
            False,
            ValueError,
            "weights must be 1/p = 8 at position 0 for the probabilities of the draw, got "
            "2.66666667; other weights are biased",
        ),
    ],
)
def test_given_draws_are_checked(
    draw: dict[str, Any], replace: bool, error: type[Exception], text: str
) -> None:
    method = ColumnSampling(rank=3, law="uniform", replace=replace)
    with pytest.raises(error, match=message(text)):
        method.approximate(make_problem(), draw=draw)


def test_masked_columns_of_a_draw_are_refused() -> None:
    draw = changed(columns=np.array([0, 2, 1]))
    with pytest.raises(ValueError, match="columns must be indices of visible keys, got 2"):
        ColumnSampling(rank=3).approximate(make_problem(key_mask=MASK), draw=draw)


# --- masks, causality, edges ---------------------------------------------------------------------


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("normalizer", ["exact", "sampled"])
def test_no_keys_give_zeros(replace: bool, normalizer: str) -> None:
    problem = make_problem(key_mask=np.zeros(8, bool))
    for law in ("uniform", "optimal"):
        method = ColumnSampling(rank=3, law=law, replace=replace, normalizer=normalizer)
        draw = method.draw(problem, rng=0)
        ahat = method.approximate(problem, draw=draw)
        assert ahat.effective_rank == 0
        assert not (ahat @ problem.values).any()


def test_one_key_and_values_of_zero() -> None:
    one = sa.AttentionProblem(np.ones((3, 2)), np.ones((1, 2)), np.full((1, 1), 5.0))
    ahat = ColumnSampling(rank=1).approximate(one, rng=0)
    np.testing.assert_allclose(ahat @ one.values, 5.0, rtol=1e-15)
    problem = make_problem()
    zero = sa.AttentionProblem(problem.q, problem.k, np.zeros((8, 3)))
    output = ColumnSampling(rank=3).approximate(zero, rng=0) @ zero.values
    assert not output.any()


def test_without_values_laws_of_values_say_what_is_missing() -> None:
    problem = sa.AttentionProblem(np.eye(3), np.eye(3))
    assert ColumnSampling(rank=2, law="uniform").approximate(problem, rng=0).shape == (3, 3)
    assert ColumnSampling(rank=2, law="key_norm").approximate(problem, rng=0).shape == (3, 3)
    with pytest.raises(ValueError, match=r"^v must be given for an output, got None"):
        ColumnSampling(rank=2).draw(problem, rng=0)


def test_a_law_that_leaves_out_a_column_is_refused() -> None:
    problem = make_problem()
    p = np.zeros(8)
    p[:4] = 0.25
    text = (
        "law must be positive wherever |A_:j| |V_j| > 0 for an unbiased estimate, got 0 for 4 "
        "such columns, for instance j = 4; mix in the uniform law (mix > 0)"
    )
    with pytest.raises(ValueError, match=message(text)):
        ColumnSampling(rank=3, law=p).draw(problem, rng=0)
    ColumnSampling(rank=3, law=p, mix=0.1).draw(problem, rng=0)
    # Nothing is promised about the self-normalised form, and values of zero do not matter.
    ColumnSampling(rank=3, law=p, normalizer="sampled").draw(problem, rng=0)
    v = problem.values * (p > 0)[:, None]
    ColumnSampling(rank=3, law=p).draw(sa.AttentionProblem(problem.q, problem.k, v), rng=0)


def test_causal_problems_are_for_laws_that_see_no_token() -> None:
    problem = make_problem(n_q=8, causal=True)
    for law in TOKEN_LAWS:
        assert not ColumnSampling(rank=3, law=law).traits.causal
        with pytest.raises(ValueError, match=r"^causal must be False for method 'column_sampling'"):
            ColumnSampling(rank=3, law=law).draw(problem, rng=0)
    for method in (
        ColumnSampling(rank=3, law="uniform"),
        ColumnSampling(rank=3, law=np.full(8, 0.125), replace=False),
        ColumnSampling(rank=3, law="uniform", normalizer="sampled"),
    ):
        assert method.traits.causal
        ahat = method.approximate(problem, rng=0)
        dense = ahat.to_dense()
        assert not np.triu(dense, 1).any()
        # A change of the last token leaves all other rows as they are.
        q, k, v = (x.copy() for x in problem.arrays if x is not None)
        q[7], k[7], v[7] = 9.0, -9.0, 9.0
        other = method.approximate(sa.AttentionProblem(q, k, v, causal=True), rng=0)
        np.testing.assert_allclose((other @ v)[:7], (ahat @ problem.values)[:7], rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_logits(dtype: Any) -> None:
    g = np.random.default_rng(0)
    q, k, v = (g.standard_normal((16, 4)).astype(dtype) for _ in range(3))
    problem = sa.AttentionProblem(q, k, v, scale=1e4)
    for normalizer in ("exact", "sampled"):
        output = ColumnSampling(rank=8, normalizer=normalizer).approximate(problem, rng=0) @ v
        assert np.isfinite(output).all()


def test_it_is_a_method() -> None:
    assert sa.methods()["column_sampling"] is ColumnSampling
    method = ColumnSampling(rank=3, law=np.array([0.5, 0.5]), mix=0.25)
    twin = clone(method)
    assert twin.get_params().keys() == method.get_params().keys()
    assert np.array_equal(twin.law, method.law)
    assert repr(ColumnSampling(rank=3)) == "ColumnSampling(rank=3)"
    traits = ColumnSampling(rank=3).traits
    assert (traits.key_mask, traits.rectangular, traits.randomized) == (True, True, True)
    assert (traits.row_stochastic, traits.nonnegative) == (False, True)
    assert not traits.exact_at_full_rank
    assert ColumnSampling(rank=3, normalizer="sampled").traits.row_stochastic


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: ColumnSampling(rank=9),
            ValueError,
            "rank must be between 1 and n_k = 8, got 9; lower rank or use method='exact'.",
        ),
        (
            lambda: ColumnSampling(rank=3, law="value-norm"),
            ValueError,
            "law must be a name or an array, got 'value-norm'; did you mean 'value_norm'?",
        ),
        (
            lambda: ColumnSampling(rank=3, law=[0.5, 0.6]),
            ValueError,
            "law must sum to 1, got 1.1; divide it by its sum",
        ),
        (
            lambda: ColumnSampling(rank=3, law=np.full(4, 0.25)),
            ValueError,
            "law must have shape (8,), got (4,); give one probability a column",
        ),
        (
            lambda: ColumnSampling(rank=3, replace=1),  # type: ignore[arg-type]  # refused
            TypeError,
            "replace must be a bool, got int; True draws a column again and again",
        ),
        (
            lambda: ColumnSampling(rank=3, normalizer="sample"),
            ValueError,
            "normalizer must be one of exact, sampled, got 'sample'; did you mean 'sampled'?",
        ),
        (
            lambda: ColumnSampling(rank=3, mix=-0.1),
            ValueError,
            "mix must be in [0, 1], got -0.1; 0 leaves the law alone",
        ),
        (
            lambda: ColumnSampling(rank=3, pilots=True),
            TypeError,
            "pilots must be an integer or a one-dimensional array of row indices, got bool of "
            "shape (); give how many rows to draw, or which",
        ),
        (
            lambda: ColumnSampling(rank=3, ridge=-1.0),
            ValueError,
            "ridge must be finite and positive, got -1; it is lam / tr K",
        ),
    ],
)
def test_parameters_out_of_range(
    make: Callable[[], ColumnSampling], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=message(text.rstrip("."))):
        make().draw(make_problem(), rng=0)


THREADS = """
import hashlib
import numpy as np
from sketchattn.heads.families import make_heads
from sketchattn.zoo.column_sampling import ColumnSampling
from sketchattn.sampling import leverage_scores, leverage_scores_fast

problem = make_heads("gaussian", n=700, d=32, rng=0)[0]
digest = hashlib.sha256()
for law in ("optimal", "leverage", "leverage_keys", "pilot", "spectral", "ridge_recursive"):
    draw = ColumnSampling(rank=64, law=law).draw(problem, rng=0)
    digest.update(b"".join(draw[name].tobytes() for name in sorted(draw)))
x = np.random.default_rng(0).standard_normal((20000, 8))
digest.update(leverage_scores(x).tobytes() + leverage_scores_fast(x, rng=0).tobytes())
print(digest.hexdigest())
"""


@pytest.mark.threads
@pytest.mark.slow
def test_draws_do_not_depend_on_the_number_of_threads() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", THREADS],
            env={**os.environ, "NUMBA_NUM_THREADS": n, "OPENBLAS_NUM_THREADS": n},
            cwd=Path(__file__).resolve().parent.parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for n in ("1", "2", "4")
    }
    assert len(found) == 1
