"""No public function raises or warns by a floating-point exception for input that it accepts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from method_cases import CASES, IDS, MethodCase, make_problem, supports

import sketchattn as sa
from sketchattn import sampling
from sketchattn.sketches import make_sketch, sketches

pytestmark = pytest.mark.usefixtures("one_thread")

MASKS: list[dict[str, Any]] = [{}, {"causal": True}, {"key_mask": np.arange(8) > 5}]


def peaked(dtype: Any, **options: Any) -> sa.AttentionProblem:
    """Return a problem with logits of some hundreds: most exponentials underflow."""
    q, k, v = (np.array(x) for x in make_problem(8, 8, dtype))
    return sa.AttentionProblem(30 * q, 30 * k, v, **options)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_methods_under_any_errstate(case: MethodCase, dtype: Any) -> None:
    for options in MASKS:
        problem = peaked(dtype, **options)
        if not supports(case, problem):
            continue
        method, y = case(3), np.ones((8, 2), dtype)
        with np.errstate(all="ignore"):
            wanted = method.approximate(peaked(dtype, **options), rng=0)
            dense, product, back = wanted.to_dense(), wanted @ problem.values, wanted.T @ y
        with np.errstate(all="raise"):
            assert method.traits.target
            draw = method.draw(problem, rng=0)
            ahat = method.approximate(problem, draw=draw)
            assert np.array_equal(ahat.to_dense(), dense)
            assert np.array_equal(ahat @ problem.values, product)
            assert np.array_equal(ahat.T @ y, back)
            assert np.isfinite(ahat.row_sums()).all()
            ahat.wide()
            ahat.columns([1])
            method.attend(problem, rng=0)
            method.attend_heads([problem, problem], [0, 1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_problems_and_attention_under_any_errstate(dtype: Any) -> None:
    for options in MASKS:
        with np.errstate(all="raise"):
            problem = peaked(dtype, **options)
            assert np.isfinite(problem.output).all()
            exact = problem.exact
            assert np.isfinite(exact.row_norms()).all()
            assert np.isfinite(exact.column_norms()).all()
            assert np.isfinite(exact.frobenius_norm())
            assert np.isfinite(exact.columns([0])).all()
            sa.attention(*problem, **options)
            for law in sampling.LAWS:
                p = sampling.probabilities(law, problem, rng=0, pilots=3)
                assert abs(p.sum() - 1) <= 1e-12
                sampling.sample_columns(p, 3, 0, replace=True)
                sampling.sample_gumbel(p, 3, 0)


@pytest.mark.parametrize("kind", sketches())
def test_sketches_under_any_errstate(kind: str) -> None:
    tiny = np.full((12, 2), 5e-324)
    with np.errstate(all="raise"):
        sketch = make_sketch(kind, 4, 12, rng=0)
        assert np.isfinite(sketch @ tiny).all()
        assert np.isfinite(sketch.T @ tiny[:4]).all()
        sketch.to_dense()
