"""Tests of the tests: each wrong program must make the checker that is named fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_kernels
import test_metrics
from method_cases import dense_attention, make_problem, rounding
from numpy.typing import NDArray

import sketchattn as sa

Array = NDArray[Any]
PRECISIONS = [np.float32, np.float64]

pytestmark = pytest.mark.usefixtures("one_thread")


# --- wrong programs -----------------------------------------------------------------------------

# What a wrong program makes of the problem: a matrix in place of A, from q, k, scale and A itself.
Mutant = Callable[[Array, Array, float, Array], Array]


def softmax(logits: Array, seen: Array) -> Array:
    weights = np.where(seen, np.exp(logits - np.where(seen, logits, -np.inf).max(1)[:, None]), 0)
    normalized: Array = weights / weights.sum(axis=1, keepdims=True)
    return normalized


def scaled(factor: float) -> Mutant:
    """Scale the logits by another number."""
    return lambda q, k, scale, a: softmax(factor * scale * (q @ k.T), a > 0)


def without(index: int, axis: int) -> Mutant:
    """Drop one row, or one key before the rows are normalised."""

    def mutant(q: Array, k: Array, scale: float, a: Array) -> Array:
        kept = np.ones(a.shape)
        kept[(index, slice(None)) if axis == 0 else (slice(None), index)] = 0
        dropped: Array = a * kept
        if axis == 1:
            dropped = dropped / dropped.sum(axis=1, keepdims=True)
        return dropped

    return mutant


def one_entry(q: Array, k: Array, scale: float, a: Array) -> Array:
    """Change the largest weight of the last row by a tenth of a per cent."""
    changed = a.copy()
    changed[-1, np.argmax(a[-1])] *= 1.001
    return changed


MUTANTS: dict[str, Mutant] = {
    "scale x 1.1": scaled(1.1),
    "scale x 1.001": scaled(1.001),
    "no 1/sqrt(d)": lambda q, k, scale, a: softmax(q @ k.T, a > 0),
    "transposed": lambda q, k, scale, a: a.T,
    "queries for keys": lambda q, k, scale, a: softmax(scale * (k @ q.T), a > 0),
    "last row dropped": without(-1, 0),
    "last key dropped": without(-1, 1),
    "keys shifted": lambda q, k, scale, a: np.roll(a, 1, axis=1),
    "rows shifted": lambda q, k, scale, a: np.roll(a, 1, axis=0),
    "rows not normalised": lambda q, k, scale, a: a * 1.001,
    "squared": lambda q, k, scale, a: a**2,
    "one entry": one_entry,
    "zeros": lambda q, k, scale, a: np.zeros_like(a),
    "NaN": lambda q, k, scale, a: np.full_like(a, np.nan),
    "one NaN": lambda q, k, scale, a: np.where(a == a.max(), np.nan, a),
    "mean of V": lambda q, k, scale, a: np.full_like(a, 1 / a.shape[1]),
    "identity": lambda q, k, scale, a: np.eye(len(a)),
}
every_mutant = pytest.mark.parametrize("mutant", MUTANTS)
every_precision = pytest.mark.parametrize("dtype", PRECISIONS)


def mutate(mutant: str, case: test_kernels.Case) -> Array:
    q, k = case.q.astype(np.float64), case.k.astype(np.float64)
    return MUTANTS[mutant](q, k, case.scale, case.weights)


def plain(dtype: Any) -> test_kernels.Case:
    return test_kernels.make(12, 12, dtype, seed=3)


# --- kernels ------------------------------------------------------------------------------------


@every_precision
@every_mutant
def test_the_check_of_the_product_fails(mutant: str, dtype: Any) -> None:
    case = plain(dtype)
    out, lse = case.product()
    assert not test_kernels.wrong(case, out, lse)
    v = case.v.astype(np.float64)
    assert not test_kernels.wrong(case, (case.weights @ v).astype(dtype))
    assert test_kernels.wrong(case, (mutate(mutant, case) @ v).astype(dtype))


@every_precision
def test_the_check_of_the_product_fails_for_wrong_values_and_normalisers(dtype: Any) -> None:
    case = plain(dtype)
    out, lse = case.product()
    assert test_kernels.wrong(case, np.roll(out, 1, axis=1), lse)
    for factor in (1.001, 1.1, 0.0, np.nan):
        assert test_kernels.wrong(case, out, factor * lse)
    assert test_kernels.wrong(case, out, lse * np.log2(math.e))
    empty = test_kernels.make(12, 12, dtype, seed=3, right=0, first=-2)
    out, lse = empty.product()
    assert not test_kernels.wrong(empty, out, lse)
    assert test_kernels.wrong(empty, out, np.where(np.isneginf(lse), 0, lse))
    mean = np.where(np.isneginf(lse)[:, None], empty.v.mean(axis=0), out)
    assert test_kernels.wrong(empty, mean, lse)


@every_precision
@every_mutant
def test_the_check_of_the_transposed_product_fails(mutant: str, dtype: Any) -> None:
    case = plain(dtype)
    y = np.random.default_rng(1).standard_normal((12, 3)).astype(dtype)
    assert not test_kernels.transposed_wrong(case, y, test_kernels.transposed(case, y))
    changed = (mutate(mutant, case).T @ y.astype(np.float64)).astype(dtype)
    assert test_kernels.transposed_wrong(case, y, changed)


@every_mutant
def test_the_check_of_the_comparison_fails(mutant: str) -> None:
    case = plain(np.float64)
    other = test_kernels.another(case, np.float64, "positive")
    assert not test_kernels.compare_wrong(case, other, test_kernels.compared(case, other))
    changed = mutate(mutant, case)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(changed > 0, changed * (np.log(changed) - np.log(other)), 0.0)
    gap = changed - other
    result = np.stack([(changed**2).sum(1), (gap**2).sum(1), np.abs(gap).sum(1), terms.sum(1)], 1)
    assert test_kernels.compare_wrong(case, other, result)


@pytest.mark.parametrize("swapped", [(0, 1), (1, 2), (2, 3), (0, 3)])
def test_the_check_of_the_comparison_knows_its_columns(swapped: tuple[int, int]) -> None:
    case = plain(np.float64)
    other = test_kernels.another(case, np.float64, "positive")
    result = test_kernels.compared(case, other)
    order = list(range(4))
    order[swapped[0]], order[swapped[1]] = order[swapped[1]], order[swapped[0]]
    assert test_kernels.compare_wrong(case, other, result[:, order])
    assert test_kernels.compare_wrong(case, other, result[::-1])


# --- operators and reports ----------------------------------------------------------------------


@every_precision
@every_mutant
def test_the_rounding_that_is_allowed_is_none_of_these(mutant: str, dtype: Any) -> None:
    problem = make_problem(12, 12, dtype, seed=3)
    a = dense_attention(problem)
    assert np.abs(problem.exact.to_dense() - a).max() <= rounding(problem)
    q, k = (x.astype(np.float64) for x in problem.arrays[:2])
    changed = MUTANTS[mutant](q, k, problem.scale, a)
    # A thousandth is below what single precision may do to logits of this size.
    if (
        dtype == np.float64
        or "1.001" not in mutant
        and mutant not in ("one entry", "rows not normalised")
    ):
        assert not np.abs(changed - a).max() <= rounding(problem)


@pytest.mark.parametrize("path", ["dense", "streaming"])
@every_mutant
def test_the_check_of_the_report_fails(mutant: str, path: str) -> None:
    problem = make_problem(12, 12, seed=3)
    a = dense_attention(problem)
    other = test_metrics.approximation(problem)
    right = test_metrics.formulas(problem, other)
    assert (
        test_metrics.near(sa.error_report(problem, other, path=path).as_dict(), right, 1e-7) == []
    )
    q, k = problem.q, problem.k
    changed = MUTANTS[mutant](q, k, problem.scale, a)
    if np.isnan(changed).any():
        with pytest.raises(ValueError, match="ahat must be finite"):
            sa.error_report(problem, changed, path=path)
        return
    # A report of another matrix: every distance moves.
    found = sa.error_report(problem, changed, path=path).as_dict()
    wrong = test_metrics.near(found, right, 1e-7)
    assert {"matrix_fro_rel", "row_tv_mean", "row_kl_mean", "output_fro_rel"} <= set(wrong)


def test_the_check_of_the_report_fails_for_nan() -> None:
    right = test_metrics.formulas(make_problem(6, 6), np.full((6, 6), 1 / 6))
    for name in right:
        assert test_metrics.near({**right, name: np.nan}, right, 1e-7) == [name]
        assert test_metrics.near({**right, name: right[name] * 1.01 + 1e-4}, right, 1e-7) == [name]


def test_zero_and_the_mean_of_v_fail_every_bound_on_accuracy() -> None:
    # The error that exact attention is allowed in either precision, against theirs.
    for dtype in PRECISIONS:
        problem = make_problem(40, 40, dtype)
        for method in (sa.Zero(), sa.VMean()):
            report = sa.error_report(problem, method.approximate(problem))
            assert report.output_fro_rel > 1e3 * rounding(problem)
            assert report.matrix_fro_rel > 1e3 * rounding(problem) / 10
            assert report.skill < 1e-12


# --- what tests leave behind ----------------------------------------------------------------------


def test_what_an_item_registers_is_gone_after_it(request: pytest.FixtureRequest) -> None:
    plugins = request.config.pluginmanager.get_plugins()
    (plugin,) = (p for p in plugins if type(p).__name__ == "Registered")
    item: Any = plugin
    around = item.pytest_runtest_protocol()
    next(around)

    @sa.register("left_behind")
    def first_key(q: Array, k: Array, v: Array) -> Array:
        return np.repeat(v[:1], len(q), axis=0)

    sa.theory.bound_claim(
        "mine.left", bound=lambda problem, r: 1.0, error="output_fro_rel", method=sa.JL
    )
    assert "left_behind" in sa.methods()
    assert "mine.left" in sa.theory.claims()
    with pytest.raises(StopIteration):
        around.send(None)
    assert "left_behind" not in sa.methods()
    assert "mine.left" not in sa.theory.claims()
