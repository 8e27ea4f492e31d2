"""What traits promise holds for problems that are degenerate, not only for random ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from method_cases import CASES, IDS, MethodCase, dense_attention, make_problem, rounding, supports
from numpy.typing import NDArray

import sketchattn as sa

Array = NDArray[Any]
N = 8
every_method = pytest.mark.parametrize("case", CASES, ids=IDS)

pytestmark = pytest.mark.usefixtures("one_thread")


def changed(name: str, dtype: Any, **options: Any) -> sa.AttentionProblem:
    """Return a problem that has lost some of its information."""
    q, k, v = (np.array(x) for x in make_problem(N, N, dtype))
    if name == "zero values at the end":
        v[5:] = 0
    elif name == "zero values":
        v[:] = 0
    elif name == "equal values":
        v[:] = v[0]
    elif name == "zero keys":
        k[:] = 0
    elif name == "equal keys":
        k[:] = k[0]
    elif name == "keys in pairs":
        k[1::2] = k[::2]
    elif name == "zero queries":
        q[:] = 0
    elif name == "equal queries":
        q[:] = q[0]
    elif name == "queries in pairs":
        q[1::2] = q[::2]
    elif name == "keys and values in pairs":
        k[1::2], v[1::2] = k[::2], v[::2]
    elif name == "padding":
        q[5:], k[5:], v[5:] = 0, 0, 0
    elif name == "one direction":
        q[:, 1:], k[:, 1:] = 0, 0
    else:
        raise AssertionError(name)
    return sa.AttentionProblem(q, k, v, **options)


# Methods whose rows hold drawn columns only: a row that sees none of them is zero.
DRAWN_COLUMNS = ("uniform", "column_sampling")
NAMES = (
    "zero values at the end",
    "zero values",
    "equal values",
    "zero keys",
    "equal keys",
    "keys in pairs",
    "zero queries",
    "equal queries",
    "queries in pairs",
    "keys and values in pairs",
    "padding",
    "one direction",
)
MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "masked": {"key_mask": np.arange(N) % 3 != 1},
    "one key": {"key_mask": np.arange(N) == 4},
    "last keys": {"causal": True, "key_mask": np.arange(N) >= 3},
    "no key": {"key_mask": np.zeros(N, bool)},
}


@every_method
@pytest.mark.parametrize("name", NAMES)
def test_promises_hold_for_degenerate_problems(case: MethodCase, name: str) -> None:
    dtype = (np.float32, np.float64)[NAMES.index(name) % 2]
    for mask in MASKS:
        keep_promises(case, changed(name, dtype, **MASKS[mask]))


def keep_promises(case: MethodCase, problem: sa.AttentionProblem) -> None:
    """Check what the traits of a method say of its approximations of a problem."""
    traits = case.traits
    if not supports(case, problem):
        with pytest.raises(ValueError, match="must be"):
            case(3).approximate(problem, rng=0)
        return
    truth, seen = dense_attention(problem), problem.visible()
    tolerance = rounding(problem)
    for rank in (3, N):
        if not traits.uses_rank and rank < N:
            continue
        ahat = case(rank).approximate(problem, rng=1)
        dense = ahat.to_dense().astype(np.float64)
        assert np.all(np.isfinite(dense))
        size = max(1.0, float(np.abs(dense).sum(axis=1).max(initial=0.0)))
        if not traits.oracle or traits.causal or not problem.causal:
            assert np.all(dense[~seen] == 0)
        if traits.row_stochastic:
            some = seen.any(axis=1)
            if case.name in DRAWN_COLUMNS:
                some &= seen[:, case(rank).draw(problem, rng=1)["columns"]].any(axis=1)
            assert np.abs(dense.sum(axis=1)[some] - 1).max(initial=0.0) <= tolerance * size
            assert np.all(dense[~some] == 0)
        if traits.nonnegative:
            assert dense.min(initial=0.0) >= 0
        if traits.exact_at_full_rank and rank == N:
            assert np.abs(dense - truth).max() <= tolerance
        if not traits.randomized:
            again = case(rank).approximate(problem, rng=2).to_dense()
            assert np.array_equal(again, ahat.to_dense())
            assert len(case(rank).draw(problem, rng=1)) == 0
        out = case(rank).attend(problem, rng=1)
        assert np.all(np.isfinite(out))
        scale = size * (1 + np.abs(problem.values).max())
        assert np.abs(out - dense @ problem.values).max(initial=0.0) <= 4 * tolerance * scale


@every_method
@pytest.mark.parametrize("mask", ["causal", "last keys"])
@pytest.mark.parametrize("name", ["zero values at the end", "equal keys", "padding", "random"])
def test_a_row_does_not_depend_on_later_tokens(case: MethodCase, name: str, mask: str) -> None:
    if not (case.traits.causal and case.traits.autoregressive):
        pytest.skip("no such promise")
    options = MASKS[mask]
    first = make_problem(N, N, **options) if name == "random" else changed(name, float, **options)
    for cut in (1, 4, 6):
        q, k, v = (np.array(x) for x in first)
        for x in (q, k, v):
            x[cut:] = 3 - 2 * x[cut:]
        second = sa.AttentionProblem(q, k, v, **options)
        for rank in (1, 3, N):
            one, other = (case(rank).attend(x, rng=1)[:cut] for x in (first, second))
            assert np.array_equal(one, other)
