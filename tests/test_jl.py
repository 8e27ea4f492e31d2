from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.sketches.base import sketches
from sketchattn.theory.sketching.moments import amm_expected_sqerr

Array = NDArray[Any]
KINDS = list(sketches())
# S^T S = I at r = n.
ORTHOGONAL = ("dct", "haar")


def random_head(n_q: int = 10, n_k: int = 16, seed: int = 0, **options: Any) -> sa.AttentionProblem:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(s) for s in ((n_q, 6), (n_k, 6), (n_k, 5)))
    return sa.AttentionProblem(q, k, v, **options)


def sketch_of(ahat: sa.AttentionOperator) -> Array:
    assert isinstance(ahat, sa.ProductSketch)
    dense: Array = ahat.sketch.to_dense()
    return dense


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_definition(kind: str, center: bool) -> None:
    keep = np.arange(16) % 3 != 1
    for options in ({}, {"key_mask": keep}):
        problem = random_head(**options)
        shown = problem.kept_keys
        ahat = sa.JL(8, kind, center=center).approximate(problem, 0)
        s = sketch_of(ahat)
        exact = problem.exact.to_dense()[:, shown]
        want = np.zeros((10, 16))
        want[:, shown] = exact @ s.T @ s
        if center:
            mean = np.full((len(shown), len(shown)), 1 / len(shown))
            want[:, shown] = exact @ s.T @ s @ (np.eye(len(shown)) - mean) + 1 / len(shown)
        # Products of 16 terms in float64.
        assert np.abs(ahat.to_dense() - want).max() < 1e-12
        assert np.abs(ahat @ problem.values - want @ problem.values).max() < 1e-12
        y = np.cos(np.arange(30.0)).reshape(10, 3)
        assert np.abs(ahat.T @ y - want.T @ y).max() < 1e-12
        assert np.abs(ahat.rows([7, 2]) - want[[7, 2]]).max() < 1e-12
        assert np.linalg.matrix_rank(ahat.to_dense()) <= ahat.rank_bound == 8 + center
        if center:
            assert np.abs(ahat.row_sums() - 1).max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_draws_come_back(kind: str) -> None:
    problem = random_head().astype(np.float32)
    method = sa.JL(8, kind)
    draw = method.draw(problem, 5)
    assert set(draw) == set(sketches()[kind].array_names)
    first = method.approximate(problem, 5) @ problem.values
    assert np.array_equal(first, method.approximate(problem, draw=draw) @ problem.values)
    assert not np.array_equal(first, method.approximate(problem, 6) @ problem.values)
    wide = method.approximate(problem, draw=draw).wide()
    assert wide.dtype == np.float64
    assert np.abs(wide @ problem.values - first).max() < 1e-4  # float32, entries of size one


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_is_exact_where_the_sketch_is_orthogonal(kind: str) -> None:
    problem = random_head()
    method = sa.JL(16, kind)
    error = np.abs(method.approximate(problem, 0).to_dense() - problem.exact.to_dense()).max()
    assert method.traits.exact_at_full_rank == (kind in ORTHOGONAL)
    if kind in ORTHOGONAL:
        assert error < 1e-12


def errors_of(problem: sa.AttentionProblem, factor: float, seed: int, trials: int) -> Array:
    # The dense product, which test_definition compares with the operator: many trials are cheap.
    rng = np.random.default_rng(seed)
    exact, method = problem.exact.to_dense(), sa.JL(4, "gaussian")
    out = []
    for _ in range(trials):
        s = sketch_of(method.approximate(problem, rng))
        out.append(factor * (exact @ s.T @ (s @ problem.values)) - problem.output)
    return np.array(out)


@pytest.mark.statistical
@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (1.1**2, False)])
def test_exact_moment_and_bias(factor: float, right: bool, global_random_seed: int) -> None:
    # |z| <= 5 for a mean of 2000 trials, 6e-7; a sketch scaled by 1.1 shows in the moment.
    problem = random_head(40, 16)
    errors = errors_of(problem, factor, global_random_seed, 2000)
    squares = np.sum(errors**2, axis=(1, 2))
    theory = float(amm_expected_sqerr("gaussian", problem.exact.to_dense(), problem.values, 4))
    z = (squares.mean() - theory) / (squares.std(ddof=1) / math.sqrt(len(squares)))
    along = errors.sum(axis=(1, 2))
    bias = along.mean() / (along.std(ddof=1) / math.sqrt(len(along)))
    if right:
        assert abs(z) <= 5
        assert abs(bias) <= 5
    else:
        assert abs(z) > 5


def test_centring_is_exact_for_constant_values() -> None:
    base = random_head()
    problem = sa.AttentionProblem(base.q, base.k, np.full((16, 3), 2.5))
    for center in (True, False):
        ahat = sa.JL(8, "gaussian", center=center).approximate(problem, 0)
        error = np.abs(ahat @ problem.values - problem.output).max()
        assert error < 1e-12 if center else error > 1e-2


def test_never_causal() -> None:
    problem = random_head(16, 16, causal=True)
    with pytest.raises(ValueError, match=r"^causal must be False for method 'jl'"):
        sa.JL(4).approximate(problem, 0)
    # Why: the first row moves with the last value, although A is triangular.
    exact = problem.exact.to_dense()
    s = sketch_of(sa.JL(4).approximate(random_head(16, 16), 0))
    assert not exact[0, 1:].any()
    assert abs((exact @ s.T @ s)[0, -1]) > 1e-2


def test_fewer_keys_than_rank_and_none() -> None:
    keep = np.zeros(16, bool)
    for count in (3, 0):
        keep[:3] = count > 0
        base = random_head()
        problem = sa.AttentionProblem(base.q, base.k, base.values, key_mask=keep)
        ahat = sa.JL(8, "gaussian").approximate(problem, 0)
        if count:
            assert ahat.effective_rank == 3
        else:
            assert not (ahat @ problem.values).any()
            assert sa.JL(8).draw(problem, 0) == {}


def test_parameters_of_the_sketch() -> None:
    problem = random_head()
    ahat = sa.JL(8, "sjlt", {"s": 2}).approximate(problem, 0)
    assert (np.count_nonzero(sketch_of(ahat), axis=0) == 2).all()
    for options, error, message in (
        ({"sketch": "gausian"}, ValueError, r"did you mean 'gaussian'\?"),
        ({"sketch": 3}, TypeError, "^sketch must be a name, got int"),
        ({"sketch_options": 3}, TypeError, "^sketch_options must be a mapping"),
        ({"sketch_options": {"s": 2}}, TypeError, "^s must be a parameter of kind 'gaussian'"),
        ({"center": 1}, TypeError, "^center must be a bool"),
        ({"rank": 17}, ValueError, "^rank must be between 1 and n_k = 16, got 17"),
    ):
        given: dict[str, Any] = {"rank": 8, **options}
        with pytest.raises(error, match=message):
            sa.JL(**given).approximate(problem, 0)
    with pytest.raises(ValueError, match="^draw must hold the arrays"):
        sa.JL(8).approximate(problem, draw={"hash": np.zeros(16)})
