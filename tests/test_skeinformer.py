"""Skeinformer: the worked example, the estimator against loops, its laws, identities, refusals."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from method_cases import dense_attention, make_problem, rounding
from naive import naive_attention, naive_pilot_law, naive_skeinformer
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.base.draws import head_generator
from sketchattn.kernels import sampled, softmax
from sketchattn.kernels._threads import limit_threads
from sketchattn.operators.solve import solve_rows
from sketchattn.sampling.draws import gumbel_top
from sketchattn.sampling.laws import log_column_norms, probabilities
from sketchattn.zoo.skeinformer.components import PRESETS, Components

Array = NDArray[Any]
PRECISIONS = [np.float32, np.float64]
FILLS = ("geometric", "arithmetic", "oracle")
LAWS: list[Any] = ["pilot", "optimal", "value_norm", "uniform"]
# Statistical tests fail with this probability when nothing is wrong.
LEVEL = 1e-6

pytestmark = pytest.mark.usefixtures("one_thread")


def message(text: str) -> str:
    """Return a pattern for a whole message."""
    return f"^{re.escape(text)}$"


def standard_errors() -> float:
    """Return how many standard errors a normal mean exceeds, on either side, with LEVEL."""
    from scipy.stats import norm

    return float(norm.isf(LEVEL / 2))


def make(rank: int = 5, **options: Any) -> sa.Skeinformer:
    return sa.Skeinformer(rank, **options)


def fixed(columns: Any, pilots: Any = None) -> dict[str, Array]:
    """Return a draw of these columns, and of these pilot rows."""
    draw = {"columns": np.asarray(columns, np.int64)}
    return draw if pilots is None else draw | {"pilot_rows": np.asarray(pilots, np.int64)}


def arrays(problem: sa.AttentionProblem) -> tuple[Array, Array, Array]:
    return np.asarray(problem.q), np.asarray(problem.k), np.asarray(problem.values)


def naive_options(problem: sa.AttentionProblem) -> dict[str, Any]:
    return {
        "scale": problem.scale,
        "offset": problem.offset if problem.causal else None,
        "key_mask": problem.key_mask,
    }


# --- the worked example -------------------------------------------------------------------------

LOGITS = np.log(np.array([[1.0, 2, 4], [1, 1, 1], [3, 1, 1]]))


@pytest.fixture(scope="module")
def example() -> sa.AttentionProblem:
    return sa.AttentionProblem(LOGITS, np.eye(3), np.array([[1.0], [2], [3]]), scale=1.0)


def test_the_worked_example_has_its_matrix(example: sa.AttentionProblem) -> None:
    a = np.array([[1 / 7, 2 / 7, 4 / 7], [1 / 3, 1 / 3, 1 / 3], [3 / 5, 1 / 5, 1 / 5]])
    assert example.exact.to_dense() == pytest.approx(a, rel=1e-12)
    assert example.output[:, 0] == pytest.approx([17 / 7, 2, 8 / 5], rel=1e-12)
    assert example.exact.frobenius_norm() ** 2 == pytest.approx(1.2019048, rel=1e-6)


def test_the_worked_example_has_its_laws(example: sa.AttentionProblem) -> None:
    pilot = make(2, pilots=[0]).details(example, rng=0).probabilities
    best = make(2, law="optimal", pilots=[0]).details(example, rng=0).probabilities
    assert pilot == pytest.approx(np.array([1, 4, 12]) / 17, rel=1e-6)
    assert best == pytest.approx([0.1874906, 0.2580348, 0.5544746], rel=1e-6)
    norms = example.exact.column_norms()
    assert (norms * [1, 2, 3]).sum() == pytest.approx(3.7393037, rel=1e-6)
    assert (pilot / best).min() == pytest.approx(0.3137412, rel=1e-6)
    assert (best**2 / pilot).sum() == pytest.approx(1.3161127, rel=1e-6)
    # C = min_j |A^(j)|^2 / 3 and the coherence.
    assert (norms**2).min() / 3 == pytest.approx(0.0775813, rel=1e-6)
    largest = example.exact.to_dense().max(axis=0) ** 2
    assert (3 * largest / norms**2).max() == pytest.approx(2.1972689, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "output", "row"),
    [
        (
            {"pilot_reuse": False},
            [2.1327046, 2, 2],
            [0.3203772, 0.2265409, 0.4530818],
        ),
        ({"pilots": [0]}, [17 / 7, 2, 2], [1 / 7, 2 / 7, 4 / 7]),
        ({"fill": "arithmetic", "pilot_reuse": False}, [19 / 9, 2, 2], [1 / 3, 2 / 9, 4 / 9]),
        ({"normalizer": "sampled", "pilot_reuse": False}, [8 / 3, 5 / 2, 5 / 2], [0, 1 / 3, 2 / 3]),
    ],
)
def test_the_worked_example_has_its_outputs(
    example: sa.AttentionProblem, options: dict[str, Any], output: list[float], row: list[float]
) -> None:
    method = make(2, **({"law": "uniform"} | options))
    draw = fixed([1, 2], [0] if "pilots" in options else None)
    ahat = method.approximate(example, draw=draw)
    assert (ahat @ example.values)[:, 0] == pytest.approx(output, rel=1e-6)
    assert method.attend(example, draw=draw)[:, 0] == pytest.approx(output, rel=1e-6)
    assert ahat.rows(0)[0] == pytest.approx(row, rel=1e-6)
    if options.get("normalizer") != "sampled":
        assert ahat.rows([1, 2]) == pytest.approx(np.full((2, 3), 1 / 3), rel=1e-6)


def test_the_worked_example_has_its_errors(example: sa.AttentionProblem) -> None:
    x = example.exact.column_norms() * [1, 2, 3]
    total, output, r = x.sum(), np.linalg.norm(example.output) ** 2, 2
    laws = {
        "optimal": make(2, law="optimal", pilots=[0]).details(example, rng=0).probabilities,
        "pilot": make(2, pilots=[0]).details(example, rng=0).probabilities,
    }
    expected = {
        name: (np.sum(x**2 / p) - output) / r for name, p in laws.items()
    }  # E |A V - Ohat|_F^2
    assert expected["optimal"] == pytest.approx(0.7622165, rel=1e-6)
    assert expected["pilot"] == pytest.approx(2.9722222, rel=1e-6)
    # The same by all pairs of draws of the estimator of Proposition 1.
    for name, p in laws.items():
        method = make(
            2, law=p, replace=True, weights="importance", normalizer="exact", pilot_reuse=False
        )
        mean = 0.0
        for pair in itertools.product(range(3), repeat=2):
            columns = np.array(pair)
            draw = {
                "columns": columns,
                "weights": 1 / (2 * p[columns]),
                "probabilities": p[columns],
            }
            error = method.attend(example, draw=draw) - example.output
            mean += p[columns].prod() * float(np.sum(error**2))
        assert mean == pytest.approx(expected[name], rel=1e-9)
    eta, sharper = (1 + np.sqrt(c * np.log(10)) for c in (8, 2))
    sizes = example.exact.frobenius_norm() ** 2 * np.linalg.norm(example.values) ** 2
    assert eta**2 / r * sizes == pytest.approx(235.61157, rel=1e-6)
    assert eta**2 / r * total**2 == pytest.approx(195.78526, rel=1e-6)
    assert sharper**2 / r * total**2 == pytest.approx(69.19258, rel=1e-6)
    # Markov's bound E1 / delta: 7.6221651 is printed, 7.622165 is what E1 gives to seven digits.
    assert expected["optimal"] / 0.1 == pytest.approx(7.6221651, rel=1e-6)


# --- against loops ------------------------------------------------------------------------------

PROBLEMS: dict[str, dict[str, Any]] = {
    "square": {"n_q": 12, "n_k": 12},
    "wide": {"n_q": 5, "n_k": 12},
    "tall": {"n_q": 23, "n_k": 12},
    "masked": {"n_q": 12, "n_k": 12, "key_mask": np.arange(12) % 3 != 1},
    "one": {"n_q": 1, "n_k": 1},
    "two": {"n_q": 3, "n_k": 2},
}
CAUSAL: dict[str, dict[str, Any]] = {
    "causal": {"n_q": 12, "n_k": 12, "causal": True},
    "top-left": {"n_q": 9, "n_k": 12, "causal": "top-left"},
    "bottom-right": {"n_q": 9, "n_k": 12, "causal": "bottom-right"},
    "blind rows": {"n_q": 15, "n_k": 12, "causal": "bottom-right"},
    "causal masked": {"n_q": 12, "n_k": 12, "causal": True, "key_mask": np.arange(12) % 3 > 0},
}
EVERY = PROBLEMS | CAUSAL


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_estimator_is_its_loops(dtype: Any, kind: str, fill: str, reuse: bool) -> None:
    problem = make_problem(dtype=dtype, **EVERY[kind])
    form = "corrected" if problem.causal else None
    for rank in {1, min(4, problem.n_k), problem.n_k}:
        method = make(rank, fill=fill, pilot_reuse=reuse, causal_form=form, pilots=3, mix=0.2)
        draw = method.draw(problem, rng=rank)
        ahat = method.approximate(problem, draw=draw)
        output = method.attend(problem, draw=draw)
        weights, expected = naive_skeinformer(
            *arrays(problem),
            draw["columns"],
            draw["pilot_rows"] if reuse else None,
            fill=fill,
            **naive_options(problem),
        )
        # What is asked of results with equal draws.
        limit = 1e-12 if dtype == np.float64 else 1e-5
        size = np.abs(expected).max()
        assert np.abs(ahat.to_dense() - weights).max() <= limit
        assert np.abs(output - expected).max() <= limit * size
        assert np.abs(ahat @ problem.values - expected).max() <= limit * size
        assert output.dtype == ahat.dtype == dtype
        assert ahat.effective_rank == len(draw["columns"])


@pytest.mark.parametrize("weights", ["none", "importance"])
@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("normalizer", ["sampled", "exact"])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_weighted_estimators_are_their_loops(
    dtype: Any, normalizer: str, replace: bool, weights: str
) -> None:
    law = "pilot" if replace or weights == "none" else "uniform"
    for kind, reuse in itertools.product(PROBLEMS, (True, False)):
        problem = make_problem(dtype=dtype, **PROBLEMS[kind])
        method = make(
            min(6, problem.n_k),
            law=law,
            replace=replace,
            weights=weights,
            normalizer=normalizer,
            pilot_reuse=reuse,
        )
        draw = method.draw(problem, rng=1)
        factors = draw.get("weights")
        dense, expected = naive_skeinformer(
            *arrays(problem),
            draw["columns"],
            draw["pilot_rows"] if reuse else None,
            normalizer=normalizer,
            factors=factors,
            **naive_options(problem),
        )
        ahat = method.approximate(problem, draw=draw)
        tolerance = rounding(problem) * max(1.0, 1.0 if factors is None else factors.max())
        assert np.abs(ahat.to_dense() - dense).max() <= tolerance * np.abs(dense).max()
        assert (
            np.abs(method.attend(problem, draw=draw) - expected).max()
            <= tolerance * np.abs(dense).sum(axis=1).max() * np.abs(problem.values).max()
        )
        if factors is not None and replace:
            assert factors == pytest.approx(1 / (method.rank * draw["probabilities"]), rel=1e-12)
        elif factors is not None:
            m = len(problem.kept_keys)
            assert factors == pytest.approx(np.full(len(factors), m / len(factors)), rel=1e-12)


def test_the_loops_are_the_published_formula() -> None:
    # exp(L) as it stands, the product of r entries and its root, a sum over the other keys.
    problem = make_problem(7, 9)
    assert np.abs(problem.scale * problem.q @ problem.k.T).max() <= 8
    columns, pilots, m = np.array([4, 1, 7]), np.array([2, 2, 5]), 9
    a = np.exp(problem.scale * problem.q @ problem.k.T)
    g = a[:, columns].prod(axis=1) ** (1 / 3)
    d = a[:, columns].sum(axis=1) + (m - 3) * g
    rest = np.delete(problem.values, columns, axis=0).sum(axis=0)
    expected = (a[:, columns] @ problem.values[columns] + g[:, None] * rest) / d[:, None]
    expected[pilots] = ((a / a.sum(axis=1, keepdims=True)) @ problem.values)[pilots]
    draw = fixed(columns, pilots)
    assert np.abs(make(3).attend(problem, draw=draw) - expected).max() <= 1e-12
    # Another law of the fill, or the pilots left out, would be seen.
    for options in ({"fill": "arithmetic"}, {"pilot_reuse": False, "law": "uniform"}):
        method = make(3, **options)
        part = {name: draw[name] for name in method.draw_names}
        assert np.abs(method.attend(problem, draw=part) - expected).max() > 1e-3


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_the_pilot_law_is_its_loops(kind: str, center: bool) -> None:
    problem = make_problem(**EVERY[kind])
    form = "corrected" if problem.causal else None
    for mix in (0.0, 0.3):
        method = make(1, pilots=4, mix=mix, center_values=center, causal_form=form)
        details = method.details(problem, rng=2)
        expected = naive_pilot_law(
            *arrays(problem),
            details.pilot_rows,
            mix=mix,
            center=center,
            **naive_options(problem),
        )
        assert np.abs(details.probabilities - expected).max() <= 1e-12
        assert details.probabilities.sum() == pytest.approx(1, rel=1e-12)
        assert len(details.pilot_rows) == 4


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_law_in_float32_is_the_law_of_the_library(dtype: Any) -> None:
    problem = make_problem(11, 13, dtype)
    rows = np.array([3, 3, 8, 0])
    law = make(1, pilots=rows).details(problem, rng=0).probabilities
    # 11 + 4 roundings of logits up to max |L|, then logarithms of sums of 4 positive terms.
    assert law == pytest.approx(probabilities("pilot", problem, pilots=rows), rel=rounding(problem))


@pytest.mark.parametrize("causal", [False, True, "bottom-right"])
def test_few_rows_are_solved_in_parts_of_the_keys(
    monkeypatch: pytest.MonkeyPatch, causal: Any
) -> None:
    monkeypatch.setattr("sketchattn.operators.solve.PART_KEYS", 8)
    for n_k, keep in itertools.product((7, 16, 37, 200), (None, "some", "first", "none")):
        n_q = n_k if causal is True else 21
        masks = {"some": np.arange(n_k) % 3 > 0, "first": np.arange(n_k) < 3}
        mask = None if keep is None else masks.get(keep, np.zeros(n_k, bool))
        problem = make_problem(n_q, n_k, causal=causal, key_mask=mask)
        rows = np.array([n_q - 1, 0, 3, 3])
        out, lse = solve_rows(problem, rows, problem.arrays.v)
        _, expected, logs = naive_attention(
            *arrays(problem),
            scale=problem.scale,
            first=problem.offset,
            right=0 if causal else None,
            key_mask=mask,
        )
        assert np.abs(out - expected[rows]).max() <= rounding(problem)
        seen = np.isfinite(logs[rows])
        assert np.array_equal(np.isfinite(lse), seen)
        assert np.abs(lse[seen] - logs[rows][seen]).max(initial=0.0) <= rounding(problem)


def test_column_norms_of_chosen_rows() -> None:
    for kind in EVERY:
        problem = make_problem(**EVERY[kind])
        rows = np.array([problem.n_q - 1, 0])
        counts = np.array([3.0, 1.0])
        _, lse = solve_rows(problem, rows, None)
        norms = np.exp(log_column_norms(problem, rows, lse, counts))
        a = dense_attention(problem)[rows]
        assert np.abs(norms - np.sqrt(counts @ a**2)).max() <= rounding(problem)


# --- promises -----------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [*LAWS, "given"])
@pytest.mark.parametrize(
    ("normalizer", "fill"),
    [*(("adaptive", fill) for fill in FILLS), ("sampled", "geometric")],
)
def test_rows_sum_to_one_and_nothing_is_negative(law: str, normalizer: str, fill: str) -> None:
    for n_q, n_k, masked, reuse in itertools.product((1, 9), (1, 2, 7, 100), (0, 1), (0, 1)):
        mask = np.arange(n_k) % 4 != 1 if masked else None
        problem = make_problem(n_q, n_k, key_mask=mask)
        given = np.ones(n_k) if mask is None else mask.astype(float)
        method = make(
            max(1, n_k // 3),
            law=given / given.sum() if law == "given" else law,
            normalizer=normalizer,
            fill=fill,
            pilot_reuse=bool(reuse),
        )
        ahat = method.approximate(problem, rng=n_k)
        dense = ahat.to_dense()
        assert dense.min() >= 0
        assert np.abs(dense.sum(axis=1) - 1).max() <= 1e-12
        assert np.abs(ahat.row_sums() - 1).max() <= 1e-12
        if mask is not None:
            assert not dense[:, ~mask].any()
        # Every row of the output is a convex combination of the values.
        output, values = method.attend(problem, rng=n_k), problem.values[problem.kept_keys]
        assert np.abs(output - ahat @ problem.values).max() <= 1e-12
        assert (output <= values.max(axis=0) + 1e-12).all()
        assert (output >= values.min(axis=0) - 1e-12).all()
        constant = sa.AttentionProblem(
            problem.q, problem.k, np.ones((n_k, 2)) * [2.0, -5.0], key_mask=mask
        )
        assert method.attend(constant, rng=n_k) == pytest.approx(
            np.ones((n_q, 2)) * [2.0, -5.0], rel=1e-12
        )


def test_without_a_fill_and_with_exact_normalisers_rows_lack_mass() -> None:
    problem = make_problem(9, 20)
    sums = make(5, preset="skein_nonorm").approximate(problem, rng=0).row_sums()
    assert sums.mean() < 0.5
    assert sums.max() < 0.99
    assert not make(5, preset="skein_nonorm").traits.row_stochastic


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("fill", FILLS)
def test_given_indices_the_output_moves_with_its_inputs(kind: str, fill: str) -> None:
    problem = make_problem(**EVERY[kind])
    n_q, n_k = problem.n_q, problem.n_k
    form = "corrected" if problem.causal else None
    method = make(min(3, n_k), fill=fill, causal_form=form, pilots=2, mix=0.1)
    draw = method.draw(problem, rng=0)
    options: dict[str, Any] = {"scale": problem.scale, "causal": problem.causal}
    options["key_mask"] = problem.key_mask
    q, k, v = arrays(problem)
    output = method.attend(problem, draw=draw)
    seeing = problem.visible_counts() > 0
    shift = np.array([3.0, -7.0, 0.5])
    moved = method.attend(sa.AttentionProblem(q, k, v + shift, **options), draw=draw)
    assert np.abs(moved - output - shift)[seeing].max() <= 1e-10
    # K + 1 c^T adds a constant to each row of L.
    along = sa.AttentionProblem(q, k + np.array([1.0, -2, 0.5, 3]), v, **options)
    assert np.abs(method.attend(along, draw=draw) - output).max() <= 1e-10
    turned = {name: x[::-1] for name, x in draw.items()}
    assert np.array_equal(method.attend(problem, draw=turned), output)
    if problem.causal:
        return
    rng = np.random.default_rng(0)
    order = rng.permutation(n_k)  # new key t is old key order[t]
    place = np.argsort(order)
    options["key_mask"] = None if problem.key_mask is None else problem.key_mask[order]
    keys = sa.AttentionProblem(q, k[order], v[order], **options)
    made = method.attend(keys, draw=fixed(place[draw["columns"]], draw["pilot_rows"]))
    assert np.abs(made - output).max() <= 1e-10
    order = rng.permutation(n_q)
    options["key_mask"] = problem.key_mask
    rows = sa.AttentionProblem(q[order], k, v, **options)
    place = np.argsort(order)
    made = method.attend(rows, draw=fixed(draw["columns"], place[draw["pilot_rows"]]))
    assert np.abs(made - output[order]).max() <= 1e-10


@pytest.mark.parametrize("kind", EVERY)
def test_limits_of_the_rank(kind: str) -> None:
    problem = make_problem(**EVERY[kind])
    exact, mean = dense_attention(problem), sa.VMean().approximate(problem).to_dense()
    form = "corrected" if problem.causal else None
    n_k, options = problem.n_k, {"causal_form": form, "law": "uniform"}
    for fill in FILLS:
        # All keys drawn: exact.  None: the mean of V, unless the fill knows the truth.
        whole = make(n_k, fill=fill, pilot_reuse=False, **options)
        dense = whole.approximate(problem, rng=0).to_dense()
        assert np.abs(dense - exact).max() <= rounding(problem)
        nothing = whole.approximate(problem, draw=fixed([])).to_dense()
        assert np.abs(nothing - mean).max() <= 1e-14
        assert np.abs(whole.attend(problem, draw=fixed([])) - mean @ problem.values).max() <= 1e-14
        if fill != "oracle":
            # One entry is its own mean: all keys weigh the same.
            one = make(1, fill=fill, pilot_reuse=False, **options)
            assert np.abs(one.approximate(problem, rng=0).to_dense() - mean).max() <= 1e-14
    # Pilot rows are exact rows, whatever else is drawn.
    method = make(1, pilots=3, **options)
    draw = method.draw(problem, rng=0)
    rows = draw["pilot_rows"]
    assert np.abs(method.approximate(problem, draw=draw).rows(rows) - exact[rows]).max() <= 1e-13
    output = method.attend(problem, draw=draw)
    assert np.abs(output[rows] - exact[rows] @ problem.values).max() <= rounding(problem)
    assert method.approximate(problem, draw=draw).rank_bound <= min(
        *exact.shape, problem.n_q if form else 2 + len(set(rows.tolist()))
    )


def test_the_rank_bound_is_true() -> None:
    problem = make_problem(40, 40, d=8)
    for rank, pilots in ((3, 4), (5, 1)):
        method = make(rank, pilots=pilots, law="uniform")
        draw = method.draw(problem, rng=0)
        ahat = method.approximate(problem, draw=draw)
        distinct = len(set(draw["pilot_rows"].tolist()))
        assert ahat.rank_bound == rank + 1 + distinct
        assert np.linalg.matrix_rank(ahat.to_dense()) <= ahat.rank_bound
        plain = make(rank, law="uniform", pilot_reuse=False).approximate(problem, rng=0)
        assert plain.rank_bound == rank + 1
        assert np.linalg.matrix_rank(plain.to_dense()) == rank + 1


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(np.float32, 100.0), (np.float64, 300.0), (np.float32, 1e4), (np.float64, 1e4)],
)
def test_large_logits_do_not_overflow(dtype: Any, size: float, fill: str) -> None:
    problem = make_problem(20, 30, dtype)
    logits = problem.scale * problem.q.astype(np.float64) @ problem.k.T
    grown = sa.AttentionProblem(
        problem.q, problem.k, problem.v, scale=problem.scale * 1.1 * size / np.abs(logits).max()
    )
    if size == 100:
        with np.errstate(over="ignore"):
            assert np.isinf(np.exp(dtype(grown.scale) * grown.q @ grown.k.T)).any()
    for law in ("pilot", "uniform"):
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            ahat = make(6, law=law, fill=fill, pilots=4).approximate(grown, rng=0)
            output = make(6, law=law, fill=fill, pilots=4).attend(grown, rng=0)
        assert np.isfinite(output).all()
        limit = 1e-12 if dtype == np.float64 else 1e-5
        assert np.abs(ahat.row_sums() - 1).max() <= limit
        # No key is lost to underflow: all logarithms of the law are finite.
        assert ahat.effective_rank == 6
    least = make(30, pilots=[0]).details(grown, rng=0).probabilities
    assert (least == 0).any() == (size == 1e4)
    assert make(30, pilots=[0]).approximate(grown, rng=0).effective_rank == 30


def test_logits_that_overflow_are_refused() -> None:
    big = np.full((4, 2), 3e38, np.float32)
    problem = sa.AttentionProblem(big, big, np.ones((4, 1), np.float32))
    with pytest.raises(ValueError, match=r"^scale \* q @ k\.T must be finite in float32, got an"):
        make(2, law="uniform", pilot_reuse=False).attend(problem, rng=0)


# --- identities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e8, 1e18])
def test_terms_of_large_logits_come_from_shares(size: float) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 24, 4))
    # Every key twice, one of them drawn: half of each row lies outside, whatever the logits.
    problem = sa.AttentionProblem(size * q, np.concatenate([k, k]), np.concatenate([v, v]))
    method = make(24, pilot_reuse=False, law="uniform")
    terms = method.error_terms(problem, draw=fixed(np.arange(24)))
    assert np.abs(terms.mass - 0.5).max() <= 1e-14


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("fill", FILLS)
def test_the_error_is_its_two_terms(kind: str, fill: str) -> None:
    problem = make_problem(**EVERY[kind])
    form = "corrected" if problem.causal else None
    rank = max(1, problem.n_k // 3)
    method = make(rank, fill=fill, pilot_reuse=False, law="uniform", causal_form=form)
    draw = method.draw(problem, rng=0)
    terms = method.error_terms(problem, draw=draw)
    exact = dense_attention(problem)
    error = exact @ problem.values - method.attend(problem, draw=draw)
    assert np.abs(terms.normalizer + terms.shape - error).max() <= 1e-12
    dense = method.approximate(problem, draw=draw).to_dense()
    outside = np.setdiff1d(np.arange(problem.n_k), draw["columns"])
    assert np.abs(terms.mass - exact[:, outside].sum(axis=1)).max() <= 1e-12
    assert np.abs(terms.mass_hat - dense[:, outside].sum(axis=1)).max() <= 1e-12
    if fill == "oracle":
        assert np.abs(terms.normalizer).max() <= 1e-12
    if not form:
        # AM fill: (m - r)/m for every row; GM fill: (m - r)/(m - r + r AM/GM).
        m, r = len(problem.kept_keys), len(draw["columns"])
        entries = np.exp(problem.scale * problem.q @ problem.k[draw["columns"]].T)
        ratio = entries.mean(axis=1) / np.exp(np.log(entries).mean(axis=1))
        mass = {"arithmetic": (m - r) / m, "geometric": (m - r) / (m - r + r * ratio)}
        if fill in mass:
            assert np.abs(terms.mass_hat - mass[fill]).max() <= 1e-12


def test_the_error_of_the_other_normalisers() -> None:
    problem = make_problem(9, 14, key_mask=np.arange(14) != 3)
    exact, v = dense_attention(problem), problem.values
    columns = np.array([1, 8, 4])
    outside = np.setdiff1d(np.arange(14), columns)
    tau = exact[:, outside].sum(axis=1, keepdims=True)
    t = exact[:, outside] @ v[outside] / tau
    h = exact[:, columns] @ v[columns] / (1 - tau)
    for normalizer, expected in (("sampled", tau * (t - h)), ("exact", tau * t)):
        method = make(3, normalizer=normalizer, law="uniform", pilot_reuse=False)
        error = exact @ v - method.attend(problem, draw=fixed(columns))
        assert np.abs(error - expected).max() <= 1e-12
        if normalizer == "sampled":
            terms = method.error_terms(problem, draw=fixed(columns))
            assert np.abs(terms.normalizer + terms.shape - expected).max() <= 1e-12
            assert not terms.mass_hat.any()
    text = (
        "normalizer must be 'adaptive' or 'sampled', without weights and replacement, for these "
        "terms, got 'exact', 'none' and replace=False; use sketchattn.error_report"
    )
    with pytest.raises(ValueError, match=message(text)):
        make(3, normalizer="exact").error_terms(problem, rng=0)


@pytest.mark.parametrize("kind", EVERY)
def test_pilot_reuse_removes_the_errors_of_its_rows(kind: str) -> None:
    problem = make_problem(**EVERY[kind])
    form = "corrected" if problem.causal else None
    options: dict[str, Any] = {"causal_form": form, "law": "uniform"}
    method = make(min(3, problem.n_k), pilots=4, **options)
    draw = method.draw(problem, rng=0)
    plain = make(min(3, problem.n_k), pilot_reuse=False, **options)
    exact = dense_attention(problem) @ problem.values
    rows = np.unique(draw["pilot_rows"])
    before = exact - plain.attend(problem, draw=fixed(draw["columns"]))
    after = exact - method.attend(problem, draw=draw)
    expected = np.sum(before**2) - np.sum(before[rows] ** 2)
    assert np.sum(after**2) == pytest.approx(expected, rel=1e-10, abs=1e-25)


def test_centred_values_are_put_back() -> None:
    problem = make_problem(9, 14, key_mask=np.arange(14) != 3)
    common: dict[str, Any] = {
        "replace": True, "weights": "importance", "normalizer": "exact", "pilot_reuse": False,
    }  # fmt: skip
    method = make(6, law="value_norm", center_values=True, **common)
    draw = method.draw(problem, rng=0)
    v = problem.values
    mean = v[problem.kept_keys].mean(axis=0)
    sizes = np.where(np.arange(14) != 3, np.linalg.norm(v - mean, axis=1), 0)
    law = method.details(problem, draw=draw).probabilities
    assert law == pytest.approx(sizes / sizes.sum(), rel=1e-12)
    a, columns = dense_attention(problem), draw["columns"]
    expected = (a[:, columns] * draw["weights"]) @ (v[columns] - mean) + mean
    assert np.abs(method.attend(problem, draw=draw) - expected).max() <= 1e-12
    raw = make(6, law="value_norm", **common).attend(problem, draw=draw)
    assert np.abs(raw - expected).max() > 1e-3
    # It is exact for constant values, where the estimator without it is not.
    constant = sa.AttentionProblem(
        problem.q, problem.k, np.full((14, 2), 3.0), key_mask=problem.key_mask
    )
    uniform = make(6, law="uniform", center_values=True, **common)
    assert uniform.attend(constant, rng=0) == pytest.approx(np.full((9, 2), 3.0), rel=1e-12)
    assert np.abs(make(6, law="uniform", **common).attend(constant, rng=0) - 3).max() > 0.1


# --- moments ------------------------------------------------------------------------------------


def unbiased(rank: int, law: Any, **options: Any) -> sa.Skeinformer:
    """Return the estimator of Proposition 1."""
    return make(
        rank,
        law=law,
        **({"replace": True, "weights": "importance", "normalizer": "exact", "pilot_reuse": False}
           | options),
    )  # fmt: skip


def estimates(problem: sa.AttentionProblem, law: Any, r: int, count: int, seed: int) -> Array:
    """Return at least ``count`` outputs of rank r (count, n_q, d_v).

    A draw of a larger rank with replacement is several independent ones of rank r.
    """
    groups = problem.n_k // r
    method = unbiased(groups * r, law)
    rng = np.random.default_rng(seed)
    exact = problem.exact.to_dense()
    terms = exact.T[:, :, None] * problem.values[:, None, :]  # A^(j) V_j
    made = []
    for _ in range(-(-count // groups)):
        draw = method.draw(problem, rng)
        columns = draw["columns"].reshape(groups, r)
        factors = groups * draw["weights"].reshape(groups, r)
        made.append(np.einsum("gr,grqc->gqc", factors, terms[columns]))
    single = unbiased(r, law)
    part = {
        "columns": columns[0], "weights": factors[0],
        "probabilities": draw["probabilities"][:r],
    }  # fmt: skip
    assert np.abs(single.attend(problem, draw=part) - made[-1][0]).max() <= 1e-11
    return np.concatenate(made)


def excess(errors: Array, expected: float) -> float:
    """Return by how many standard errors the mean of squared errors is off, over those allowed."""
    deviation = errors.std(ddof=1) / np.sqrt(len(errors))
    return float(abs(errors.mean() - expected) / deviation / standard_errors())


LAW_OF_ZEROS = np.where(np.arange(40) % 4 == 0, 0.0, 1 / 30)


@pytest.mark.statistical
@pytest.mark.parametrize("law", ["optimal", "uniform", "random", "zeros"])
def test_the_mean_error_is_its_formula(law: str, global_random_seed: int) -> None:
    # Level 1e-6, by the normal law of a mean of 20000 squared errors.
    problem, r = make_problem(40, 40, d=8), 6
    exact, v = dense_attention(problem), problem.values
    x = np.linalg.norm(exact, axis=0) * np.linalg.norm(v, axis=1)
    rng = np.random.default_rng(1)
    p = {
        "optimal": x / x.sum(),
        "uniform": np.full(40, 1 / 40),
        "random": rng.dirichlet(np.full(40, 5.0)),
        "zeros": LAW_OF_ZEROS,
    }[law]
    made = estimates(
        problem, law if law in ("optimal", "uniform") else p, r, 20000, global_random_seed
    )
    support = p > 0
    reached = exact[:, support] @ v[support]
    expected = (np.sum(x[support] ** 2 / p[support]) - np.linalg.norm(reached) ** 2) / r
    expected += np.linalg.norm(exact @ v - reached) ** 2
    errors = np.sum((made - exact @ v) ** 2, axis=(1, 2))
    assert excess(errors, expected) <= 1
    assert excess(errors, 1.25 * expected) > 1  # an error of the formula would be seen
    # Every entry of the mean is that of the reachable part: unbiased where p > 0.
    deviation = made.std(axis=0, ddof=1) / np.sqrt(len(made))
    from scipy.stats import norm

    limit = norm.isf(LEVEL / 2 / made[0].size)
    assert (np.abs(made.mean(axis=0) - reached) / deviation).max() <= limit
    if law == "zeros":
        assert (np.abs(made.mean(axis=0) - exact @ v) / deviation).max() > limit


@pytest.mark.statistical
def test_the_mean_error_of_distinct_uniform_columns(global_random_seed: int) -> None:
    # Level 1e-6, by the normal law of a mean of 4000 squared errors.
    problem, r, m = make_problem(10, 40, d=8), 6, 40
    exact, v = dense_attention(problem), problem.values
    method = unbiased(r, "uniform", replace=False)
    rng = np.random.default_rng(global_random_seed)
    errors = []
    for _ in range(4000):
        draw = method.draw(problem, rng)
        assert draw["weights"] == pytest.approx(np.full(r, m / r), rel=1e-12)
        made = (exact[:, draw["columns"]] * draw["weights"]) @ v[draw["columns"]]
        errors.append(np.sum((made - exact @ v) ** 2))
    x = np.linalg.norm(exact, axis=0) * np.linalg.norm(v, axis=1)
    independent = (m * np.sum(x**2) - np.linalg.norm(exact @ v) ** 2) / r
    assert excess(np.array(errors), (m - r) / (m - 1) * independent) <= 1
    assert excess(np.array(errors), independent) > 1


@pytest.mark.statistical
def test_constant_values_are_not_exact_for_the_unbiased_estimator(global_random_seed: int) -> None:
    # Level 1e-6, by the normal law of a mean of 20000 squared errors.
    n, r = 64, 8
    base = make_problem(n, n, d=8)
    problem = sa.AttentionProblem(base.q, base.k, np.full((n, 1), 3.0))
    errors = np.sum(
        (estimates(problem, "optimal", r, 20000, global_random_seed) - 3) ** 2, axis=(1, 2)
    )
    norms = np.linalg.norm(dense_attention(problem), axis=0)
    expected = (norms.sum() ** 2 - n) * 9 / r
    assert excess(errors, expected) <= 1
    assert expected > 10


@pytest.mark.statistical
def test_inclusion_probabilities_are_those_of_successive_draws(global_random_seed: int) -> None:
    # Level 1e-6 for the four counts together.
    from scipy.stats import binom

    p, repeats = np.array([0.5, 0.3, 0.15, 0.05]), 40000
    # P(j drawn in two) = p_j + sum_{i != j} p_i p_j / (1 - p_i).
    pi = np.array(
        [p[j] + sum(p[i] * p[j] / (1 - p[i]) for i in range(4) if i != j) for j in range(4)]
    )
    assert pi == pytest.approx([0.8288, 0.6687, 0.3722, 0.1303], abs=5e-5)
    rng = np.random.default_rng(global_random_seed)
    log_p = np.log(p)
    counts = np.zeros(4)
    for _ in range(repeats):
        counts[gumbel_top(log_p, 2, rng)[0]] += 1
    low, high = (binom.ppf(LEVEL / 8, repeats, pi), binom.isf(LEVEL / 8, repeats, pi))
    assert ((low <= counts) & (counts <= high)).all()
    wrong = np.minimum(2 * p, 1 - 1e-9)
    assert not (binom.ppf(LEVEL / 8, repeats, wrong) <= counts).all()
    # The method draws by this sampler and this law.
    method = make(2, law=p, pilot_reuse=False)
    problem = make_problem(3, 4)
    seen = {tuple(method.draw(problem, rng)["columns"].tolist()) for _ in range(300)}
    assert len(seen) >= 10


@pytest.mark.statistical
def test_pilot_reuse_saves_the_share_of_rows_that_it_sees(global_random_seed: int) -> None:
    # Level 1e-6, by Student's law of a mean of 60 ratios: given J, a row is spared with probability
    # 1 - (1 - 1/n)^s = 0.118.
    from scipy.stats import t

    n, s = 512, 64
    problem = make_problem(n, n, d=8)
    exact = problem.output
    rng = np.random.default_rng(global_random_seed)
    method = make(64, law="uniform", pilots=s)
    plain = make(64, law="uniform", pilot_reuse=False)
    ratios = []
    for _ in range(60):
        draw = method.draw(problem, rng)
        errors = [
            np.sum((x - exact) ** 2)
            for x in (
                method.attend(problem, draw=draw),
                plain.attend(problem, draw=fixed(draw["columns"])),
            )
        ]
        ratios.append(errors[0] / errors[1])
    assert (1 - 1 / n) ** s == pytest.approx(0.882, abs=5e-4)
    limit = t.isf(LEVEL / 2, 59) * np.std(ratios, ddof=1) / np.sqrt(60)
    assert abs(np.mean(ratios) - (1 - 1 / n) ** s) <= limit
    assert limit < 0.05  # no reuse, a ratio of 1, would be seen


# --- draws --------------------------------------------------------------------------------------


def test_draws_extend_those_of_smaller_ranks(global_random_seed: int) -> None:
    problem = make_problem(30, 30, key_mask=np.arange(30) != 4)
    for law in LAWS:
        whole = make(30, law=law, pilots=8).draw(problem, global_random_seed)
        assert len(whole["columns"]) == 29
        for rank in (1, 7, 20):
            part = make(rank, law=law, pilots=8).draw(problem, global_random_seed)
            assert np.array_equal(part["columns"], whole["columns"][:rank])
            assert np.array_equal(part["pilot_rows"], whole["pilot_rows"])
    # With as many pilots as columns the rows are nested too; the law, and with it J, changes.
    few, many = (make(r).draw(problem, global_random_seed)["pilot_rows"] for r in (5, 12))
    assert np.array_equal(few, many[:5])
    independent = [
        unbiased(r, "value_norm").draw(problem, global_random_seed)["columns"] for r in (5, 20)
    ]
    assert np.array_equal(independent[0], independent[1][:5])


def test_keys_that_cannot_be_drawn_are_not(global_random_seed: int) -> None:
    rng = np.random.default_rng(global_random_seed)
    base = make_problem(6, 12)
    v = base.values.copy()
    v[[1, 5, 6, 7, 8, 10]] = 0
    mask = np.arange(12) != 3
    problem = sa.AttentionProblem(base.q, base.k, v, key_mask=mask)
    possible = {0, 2, 4, 9, 11}
    method = make(8, pilots=2)
    for _ in range(1000):
        assert set(method.draw(problem, rng)["columns"].tolist()) == possible
    ahat = method.approximate(problem, rng=0)
    assert ahat.effective_rank == 5
    # A key of value zero keeps its mass through the fill.
    assert np.abs(ahat.row_sums() - 1).max() <= 1e-12
    assert (ahat.to_dense()[:, [1, 5]] > 0).all()
    # Mixing in the uniform law draws them as well, but never a masked one.
    mixed = make(11, pilots=2, mix=0.1)
    assert sorted(mixed.draw(problem, rng)["columns"].tolist()) == np.flatnonzero(mask).tolist()
    p = np.zeros(12)
    p[[2, 9]] = 0.5
    given = make(5, law=p, pilot_reuse=False)
    assert given.approximate(problem, rng=0).effective_rank == 2
    weighted = unbiased(9, p)
    for _ in range(50):
        assert set(weighted.draw(problem, rng)["columns"].tolist()) <= {2, 9}


def test_values_of_zero_are_drawn_uniformly() -> None:
    base = make_problem(6, 12)
    problem = sa.AttentionProblem(base.q, base.k, np.zeros((12, 2)), key_mask=np.arange(12) > 2)
    for law in ("pilot", "optimal", "value_norm"):
        details = make(4, law=law).details(problem, rng=0)
        assert details.probabilities == pytest.approx((np.arange(12) > 2) / 9, rel=1e-12)
        assert details.effective_rank == 4
        assert not make(4, law=law).attend(problem, rng=0).any()


def test_without_any_key_the_output_is_zero() -> None:
    problem = make_problem(6, 9, key_mask=np.zeros(9, bool))
    for options in ({}, {"normalizer": "sampled"}, {"law": "uniform", "pilot_reuse": False}):
        method = make(4, **options)
        assert not method.attend(problem, rng=0).any()
        assert method.approximate(problem, rng=0).effective_rank == 0
        details = method.details(problem, rng=0)
        assert details.row_sums == (0.0, 0.0)
        assert len(details.columns) == len(details.pilot_rows) == 0


def test_details_are_what_was_done() -> None:
    problem = make_problem(9, 14, key_mask=np.arange(14) != 3)
    method = make(5, pilots=3, pilot_reuse=False)
    draw = method.draw(problem, rng=0)
    details = method.details(problem, draw=draw)
    again = method.details(problem, rng=0)
    for name in ("pilot_rows", "columns", "probabilities", "log_fill", "log_total"):
        assert np.array_equal(getattr(details, name), getattr(again, name))
    assert np.array_equal(details.columns, draw["columns"])
    assert np.array_equal(details.pilot_rows, draw["pilot_rows"])
    logits = problem.scale * problem.q @ problem.k[draw["columns"]].T
    assert details.log_fill == pytest.approx(logits.mean(axis=1), rel=1e-12)
    total = np.exp(logits).sum(axis=1) + (13 - 5) * np.exp(logits.mean(axis=1))
    assert details.log_total == pytest.approx(np.log(total), rel=1e-12)
    assert details.row_sums == pytest.approx((1, 1), rel=1e-12)
    assert details.effective_rank == 5
    exact = make(5, preset="exact_normalizer").details(problem, rng=0)
    assert np.array_equal(exact.log_total, problem.logsumexp)
    assert np.isneginf(exact.log_fill).all()
    for both in (method.details, method.attend, method.error_terms):
        with pytest.raises(ValueError, match="^rng must be None when draw is given, got both"):
            both(problem, 0, draw=draw)


def test_attend_with_a_draw_has_the_bits_of_its_seed() -> None:
    for dtype, kind in itertools.product(PRECISIONS, EVERY):
        problem = make_problem(dtype=dtype, **EVERY[kind])
        form = "corrected" if problem.causal else None
        method = make(min(4, problem.n_k), causal_form=form, pilots=3)
        draw = method.draw(problem, rng=5)
        output = method.attend(problem, rng=5)
        assert np.array_equal(output, method.attend(problem, draw=draw))
        again = sa.attention(*problem.arrays, method, rng=5, scale=problem.scale) if not (
            problem.causal or problem.key_mask is not None
        ) else output  # fmt: skip
        assert np.array_equal(output, again)


def test_heads_share_their_pilots_where_that_is_asked_for() -> None:
    problem = make_problem(40, 30)
    shared, own = (make(5, shared_pilots=x) for x in (True, False))

    def rows(method: sa.Skeinformer, batch: int, head: int) -> list[int]:
        found: list[int] = method.draw(problem, head_generator(7, batch, head))[
            "pilot_rows"
        ].tolist()
        return found

    heads = [rows(shared, 0, h) for h in range(4)]
    assert all(x == heads[0] for x in heads)
    assert rows(shared, 1, 0) != heads[0]
    assert rows(own, 0, 0) != rows(own, 0, 1)
    columns = [shared.draw(problem, head_generator(7, 0, h))["columns"].tolist() for h in range(4)]
    assert columns[0] != columns[1]
    # A stream of its own has no other head to share with.
    rng = np.random.default_rng(0)
    assert not np.array_equal(
        shared.draw(problem, rng)["pilot_rows"], shared.draw(problem, rng)["pilot_rows"]
    )
    x = np.stack([problem.k] * 3)
    out = sa.attention(x, x, x, shared, rng=7)
    assert np.array_equal(out[1], shared.attend(sa.AttentionProblem(*x), head_generator(7, 0, 1)))


def test_given_pilot_rows_are_those_rows() -> None:
    problem = make_problem(9, 12)
    draw = make(3, pilots=[4, 4, 0]).draw(problem, rng=0)
    assert draw["pilot_rows"].tolist() == [4, 4, 0]
    with pytest.raises(
        ValueError,
        match=message("pilots must be row indices in 0..8, got 4..9; give indices of queries"),
    ):
        make(3, pilots=[4, 9]).draw(problem, rng=0)
    blind = make_problem(15, 12, causal="bottom-right")  # rows 0 to 2 see nothing
    method = make(3, pilots=[0, 1], causal_form="corrected")
    assert method.details(blind, rng=0).probabilities == pytest.approx(np.full(12, 1 / 12))
    assert not method.attend(blind, rng=0)[:3].any()
    rows = make(3, pilots=200, causal_form="corrected").draw(blind, rng=0)["pilot_rows"]
    assert set(rows.tolist()) == set(range(3, 15))


# --- masks and causal problems ------------------------------------------------------------------


def test_padding_changes_nothing() -> None:
    base = make_problem(13, 13)
    rng = np.random.default_rng(3)
    for mask in (np.arange(20) < 13, np.sort(rng.permutation(20)[:13])):
        keep = mask if mask.dtype == bool else np.isin(np.arange(20), mask)
        k, v = rng.standard_normal((20, 4)), rng.standard_normal((20, 3))
        k[keep], v[keep] = base.k, base.values
        padded = sa.AttentionProblem(base.q, k, v, key_mask=keep)
        for fill in FILLS:
            method = make(5, fill=fill, pilots=3)
            draw = method.draw(base, rng=0)
            moved = fixed(np.flatnonzero(keep)[draw["columns"]], draw["pilot_rows"])
            expected = method.attend(base, draw=draw)
            assert np.abs(method.attend(padded, draw=moved) - expected).max() <= 1e-13
            # The draw itself does not see the padding.
            assert np.array_equal(method.draw(padded, rng=0)["columns"], moved["columns"])


def test_sequences_of_a_batch_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, 2, 64, 4)) for _ in range(3))
    lengths = np.array([64, 9, 1])
    mask = np.arange(64) < lengths[:, None]
    method = make(16)
    out = sa.attention(q, k, v, method, rng=3, key_mask=mask)
    alone = sa.attention(q[:1], k[:1], v[:1], method, rng=3, key_mask=mask[:1])
    assert np.array_equal(out[:1], alone)
    # A single key gives its value; fewer keys than the rank give exact attention.
    assert np.abs(out[2] - v[2, :, :1]).max() <= 1e-14
    exact = sa.attention(q, k, v, key_mask=mask)
    assert np.abs(out[1] - exact[1]).max() <= 1e-12
    assert np.abs(out[0] - exact[0]).max() > 1e-2


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("fill", FILLS)
def test_the_corrected_causal_form(kind: str, fill: str) -> None:
    problem = make_problem(**CAUSAL[kind])
    hidden = ~problem.visible()
    seeing = problem.visible_counts() > 0
    exact = dense_attention(problem)
    method = make(4, fill=fill, causal_form="corrected", law="uniform", pilot_reuse=False)
    for seed in range(5):
        ahat = method.approximate(problem, rng=seed)
        dense = ahat.to_dense()
        assert not dense[hidden].any()
        assert np.abs(dense.sum(axis=1) - seeing).max() <= 1e-12
        assert np.abs(method.attend(problem, rng=seed) - dense @ problem.values).max() <= 1e-12
        # The first row that sees a key sees one, and is exact; so are all of few keys.
        first = int(np.flatnonzero(seeing)[0])
        if problem.visible_counts()[first] == 1:
            assert np.abs(dense[first] - exact[first]).max() <= 1e-14
    whole = make(12, fill=fill, causal_form="corrected", law="uniform", pilot_reuse=False)
    assert np.abs(whole.approximate(problem, rng=0).to_dense() - exact).max() <= 1e-13


def test_long_causal_prefix_sums_cross_tiles() -> None:
    # More rows than a tile has, and an offset that is no multiple of anything.
    for n_q, n_k, causal in (
        (300, 300, True),
        (200, 300, "bottom-right"),
        (333, 300, "bottom-right"),
    ):
        problem = make_problem(n_q, n_k, causal=causal, key_mask=np.arange(n_k) % 7 != 2)
        method = make(40, causal_form="corrected", pilots=5)
        draw = method.draw(problem, rng=0)
        ahat = method.approximate(problem, draw=draw)
        assert sampled.tile_rows(n_q, 40) < n_q
        expected = ahat.to_dense() @ problem.values
        assert np.abs(method.attend(problem, draw=draw) - expected).max() <= 1e-12
        assert np.abs(ahat @ problem.values - expected).max() <= 1e-12


def test_the_choice_of_columns_looks_at_later_rows() -> None:
    # Why the corrected form with a law of its own is no decoder, and its traits say so.
    problem = make_problem(30, 30, causal=True)
    k, v = problem.k.copy(), problem.values.copy()
    k[20:], v[20:] = 3 * k[20:][::-1], 5 * v[20:]
    other = sa.AttentionProblem(problem.q, k, v, causal=True)
    for law in LAWS:
        method = make(6, law=law, causal_form="corrected", pilots=12)
        first, second = (method.attend(x, rng=0)[:20] for x in (problem, other))
        assert method.traits.causal
        assert method.traits.autoregressive == (law == "uniform") == np.array_equal(first, second)
    method = make(6, causal_form="corrected")
    out = sa.attention(*problem.arrays, method, rng=0, causal=True)
    assert np.array_equal(out, method.attend(problem, rng=0))
    with pytest.raises(ValueError, match="^causal must be False for method 'skeinformer', which"):
        sa.attention(*problem.arrays, make(6), rng=0, causal=True)


# --- kernels ------------------------------------------------------------------------------------


def test_heads_in_one_call_are_heads_one_at_a_time() -> None:
    rng = np.random.default_rng(0)
    for dtype, ends in itertools.product(PRECISIONS, (None, np.arange(1, 151))):
        h, n, r = 5, 150, 24
        q, k, v = (rng.standard_normal((h, n, d)).astype(dtype) for d in (8, 8, 3))
        columns = np.array([np.sort(rng.permutation(n)[:r]) for _ in range(h)])
        keep = np.ones((h, n), bool)
        keep[np.arange(h)[:, None], columns] = False
        seen = np.full((h, n), r)
        if ends is not None:
            seen = np.array([np.searchsorted(c, ends) for c in columns])
        rest = (n if ends is None else ends) - seen
        made = []
        for threads in (1, 2):
            with limit_threads(threads):
                made.append(
                    sampled.sampled_product(
                        q, k, v, columns, scale=0.4, kind="geometric", seen=seen, rest=rest,
                        keep=keep, ends=ends, store=True,
                    )
                )  # fmt: skip
        for first, second in zip(*made, strict=True):
            assert np.array_equal(first, second)
        for i in range(h):
            problem = sa.AttentionProblem(q[i], k[i], v[i], scale=0.4, causal=ends is not None)
            form = None if ends is None else "corrected"
            method = make(r, law="uniform", pilot_reuse=False, causal_form=form)
            assert np.array_equal(made[0].out[i], method.attend(problem, draw=fixed(columns[i])))


@pytest.mark.parametrize(
    "options",
    [{}, {"replace": True, "normalizer": "sampled"}, {"shared_pilots": True, "mix": 0.1}],
)
def test_small_heads_of_a_call_share_each_pass(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[int] = []
    product = sampled.sampled_product

    def counted(q: Array, *args: Any, **kwargs: Any) -> Any:
        heads.append(len(q))
        return product(q, *args, **kwargs)

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, h, 40, 4)) for h in (6, 3, 3))
    keep = np.arange(40) < np.array([[40], [25]])
    method = make(8, **options)
    draws: dict[str, Any] = {"rng": 3, "key_mask": keep, "enable_gqa": True}
    monkeypatch.setattr(sampled, "sampled_product", counted)
    out = sa.attention(q, k, v, method, **draws)
    # Draws with replacement have as many distinct columns as they happen to have.
    assert sum(heads) == 12
    assert len(heads) == 1 or options.get("replace")
    monkeypatch.setattr(type(method), "_attend_heads", sa.Method._attend_heads)
    assert np.array_equal(out, sa.attention(q, k, v, method, **draws))


@pytest.mark.threads
def test_no_result_depends_on_the_number_of_threads() -> None:
    for dtype, kind in itertools.product(PRECISIONS, ("causal", "masked", "plain")):
        n = 300
        choices: dict[str, dict[str, Any]] = {
            "causal": {"causal": True},
            "masked": {"key_mask": np.arange(n) % 5 > 0},
            "plain": {},
        }
        options = choices[kind]
        problem = make_problem(n, n, dtype, **options)
        form = "corrected" if kind == "causal" else None
        results = []
        for threads in (1, 2, 3, 4):
            with limit_threads(threads):
                for fill in FILLS:
                    method = make(32, fill=fill, causal_form=form)
                    fresh = sa.AttentionProblem(*arrays(problem), **options)
                    draw = method.draw(fresh, rng=0)
                    ahat = method.approximate(fresh, draw=draw)
                    results.append((threads, fill, draw, method.attend(fresh, draw=draw), ahat))
        for _, fill, draw, output, ahat in results:
            one = next(x for x in results if x[1] == fill)
            assert all(np.array_equal(draw[name], one[2][name]) for name in draw)
            assert np.array_equal(output, one[3])
            assert np.array_equal(ahat.rows(np.arange(0, n, 50)), one[4].rows(np.arange(0, n, 50)))


def test_bodies_from_another_file_are_those_that_the_cache_was_made_for() -> None:
    # Numba's cache watches the file of a kernel only.  If this fails, put the new digits into
    # FOREIGN of kernels/sampled.py: that changes the file, and kernels are compiled again.
    names = ("_exp2_float32", "_exp2_float64", "_row_maximum_float32", "_row_maximum_float64")
    text = "".join(inspect.getsource(getattr(softmax, name)) for name in names)
    assert hashlib.sha256(text.encode()).hexdigest()[:8] == sampled.FOREIGN


# --- presets and refusals -----------------------------------------------------------------------

# component -> published method, and what each preset changes.
TABLE: dict[str, dict[str, Any]] = {
    "without_pilot_reuse": {"pilot_reuse": False},
    "uniform_law": {"law": "uniform"},
    "exact_normalizer": {"normalizer": "exact"},
    "sampled_normalizer": {"normalizer": "sampled"},
    "skein_nopilot": {"pilot_reuse": False},
    "skein_uniform": {"law": "uniform", "pilot_reuse": False},
    "skein_nonorm": {"normalizer": "exact", "pilot_reuse": False},
    "skein_simplenorm": {"normalizer": "sampled", "pilot_reuse": False},
}


def test_the_method_by_default_is_the_published_one() -> None:
    assert make().components == Components("pilot", False, "none", "adaptive", "geometric", True)
    assert make().get_params() == {
        "rank": 5, "law": "pilot", "replace": False, "weights": "none", "normalizer": "adaptive",
        "fill": "geometric", "pilot_reuse": True, "mix": 0.0, "center_values": False,
        "pilots": None, "shared_pilots": False, "causal_form": None, "preset": None,
    }  # fmt: skip
    assert len(make(7).draw(make_problem(9, 12), rng=0)["pilot_rows"]) == 7


@pytest.mark.parametrize("preset", TABLE)
def test_presets_are_the_published_ablations(preset: str) -> None:
    assert set(PRESETS) == set(TABLE)
    method = make(4, preset=preset)
    changed = {
        name: value
        for name, value in method.components._asdict().items()
        if value != getattr(Components(), name)
    }
    assert changed == TABLE[preset]
    assert (len(changed) == 1) == (not preset.startswith("skein_") or preset == "skein_nopilot")
    problem = make_problem(9, 60)
    plain = make(4, **TABLE[preset])
    assert np.array_equal(method.attend(problem, rng=0), plain.attend(problem, rng=0))
    assert method.traits == plain.traits
    # The same noise can choose the same columns by two laws.
    assert not all(
        np.array_equal(method.attend(problem, rng=seed), make(4).attend(problem, rng=seed))
        for seed in range(4)
    )


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"weights": "importance"},
        ValueError,
        "weights must be 'none' with normalizer='adaptive', whose fill stands for the keys that "
        "are not drawn, got 'importance'; use normalizer='sampled' or 'exact'",
    ),
    (
        {"replace": True},
        ValueError,
        "replace must be False with normalizer='adaptive', which takes each drawn column from the "
        "others once, got True; use normalizer='sampled' or 'exact'",
    ),
    (
        {"weights": "importance", "normalizer": "exact"},
        ValueError,
        "replace must be True with weights='importance' unless law='uniform': inclusion "
        "probabilities of a draw without replacement are not r p_j, got False; use law='uniform' "
        "or replace=True",
    ),
    (
        {"fill": "arithmetic", "normalizer": "sampled"},
        ValueError,
        "fill must be left at 'geometric' unless normalizer='adaptive', which alone has a fill, "
        "got 'arithmetic' with 'sampled'; drop it",
    ),
    (
        {"causal_form": "corrected", "normalizer": "exact"},
        ValueError,
        "causal_form must be None unless normalizer='adaptive', got 'corrected' with 'exact'; a "
        "row may see no drawn column",
    ),
    (
        {"center_values": True, "law": "uniform"},
        ValueError,
        "center_values must be False where no values are looked at, got True with law 'uniform'; "
        "use one of the laws pilot, optimal, value_norm",
    ),
    (
        {"law": "uniform", "pilot_reuse": False, "pilots": 3},
        ValueError,
        "pilots must be left at its default without law='pilot' and pilot_reuse, got 3; no pilot "
        "row is drawn",
    ),
    (
        {"law": "uniform", "pilot_reuse": False, "shared_pilots": True},
        ValueError,
        "shared_pilots must be left at its default without law='pilot' and pilot_reuse, got True; "
        "no pilot row is drawn",
    ),
    (
        {"law": "exakt"},
        ValueError,
        "law must be one of pilot, optimal, value_norm, uniform, or an array, got 'exakt'; choose "
        "one of optimal, pilot, uniform, value_norm",
    ),
    ({"law": [0.5, 0.6]}, ValueError, "law must sum to 1, got 1.1; divide it by its sum"),
    (
        {"normalizer": "adaptve"},
        ValueError,
        "normalizer must be one of adaptive, sampled, exact, got 'adaptve'; did you mean "
        "'adaptive'?",
    ),
    (
        {"weights": None},
        ValueError,
        "weights must be one of none, importance, got None; did you mean 'none'?",
    ),
    (
        {"fill": "mean"},
        ValueError,
        "fill must be one of geometric, arithmetic, oracle, got 'mean'; choose one of arithmetic, "
        "geometric, oracle",
    ),
    (
        {"causal_form": "correct"},
        ValueError,
        "causal_form must be one of corrected, got 'correct'; did you mean 'corrected'?",
    ),
    ({"replace": 1}, TypeError, "replace must be a bool, got int; pass True or False"),
    ({"pilot_reuse": "yes"}, TypeError, "pilot_reuse must be a bool, got str; pass True or False"),
    ({"mix": 1.5}, ValueError, "mix must be in [0, 1], got 1.5; 0 leaves the law alone"),
    ({"pilots": 0}, ValueError, "pilots must be at least 1, got 0; draw one row or more"),
    (
        {"preset": "skein_uniforn"},
        ValueError,
        "preset must be a known name, got 'skein_uniforn'; did you mean 'skein_uniform'?",
    ),
    (
        {"preset": "skein_uniform", "law": "value_norm"},
        ValueError,
        "law must be left at 'pilot' with preset 'skein_uniform', which sets it to 'uniform', got "
        "'value_norm'; drop one of them",
    ),
]


@pytest.mark.parametrize(("options", "error", "text"), REFUSED)
def test_combinations_that_are_wrong_are_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    problem = make_problem(6, 6)
    method = make(3, **options)
    calls: list[Callable[..., Any]] = [
        method.draw,
        method.approximate,
        method.attend,
        method.details,
    ]
    for call in calls:
        with pytest.raises(error, match=message(text)):
            call(problem, rng=0)


def test_causal_problems_need_a_choice() -> None:
    problem = make_problem(6, 6, causal=True)
    text = (
        "causal must be False for method 'skeinformer', which is published without a causal form, "
        "got True; use causal_form='corrected'"
    )
    for call in (make(3).draw, make(3).approximate, make(3).attend):
        with pytest.raises(ValueError, match=message(text)):
            call(problem, rng=0)
    with pytest.raises(ValueError, match="^rank must be between 1 and n_k = 6, got 7; lower rank"):
        make(7, causal_form="corrected").draw(problem, rng=0)


DRAWS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"columns": np.array([1, 4, 4])},
        ValueError,
        "columns must be distinct, got 1 repeated; this estimator draws without replacement",
    ),
    (
        {"columns": np.array([1, 4, 2])},
        ValueError,
        "columns must be indices of visible keys, got 2; draw from the 7 keys that are not masked",
    ),
    (
        {"columns": np.array([0, 1, 3, 4])},
        ValueError,
        "columns must hold at most 3 keys for rank = 3, got 4; change rank or the draw",
    ),
    (
        {"pilot_rows": np.array([0, 1, 2])},
        ValueError,
        "pilot_rows must hold 2 queries, got 3; change pilots or the draw",
    ),
    (
        {"pilot_rows": np.array([0, 9])},
        ValueError,
        "pilot_rows must be indices in 0..n_q - 1 = 8, got 0..9; give indices of queries",
    ),
    (
        {"pilot_rows": np.array([0.0, 1.0])},
        TypeError,
        "pilot_rows must be a one-dimensional integer array, got float64 of shape (2,); give "
        "indices of queries",
    ),
]


@pytest.mark.parametrize(("change", "error", "text"), DRAWS)
def test_draws_that_do_not_fit_are_refused(
    change: dict[str, Any], error: type[Exception], text: str
) -> None:
    problem = make_problem(9, 8, key_mask=np.arange(8) != 2)
    method = make(3, pilots=2)
    draw = {**method.draw(problem, rng=0), **change}
    for call in (method.approximate, method.attend, method.details):
        with pytest.raises(error, match=message(text)):
            call(problem, draw=draw)


def test_weights_that_do_not_belong_to_their_law_are_refused() -> None:
    problem = make_problem(9, 8)
    method = unbiased(4, "value_norm")
    draw = method.draw(problem, rng=0)
    assert sorted(draw) == ["columns", "probabilities", "weights"]
    wrong = {**draw, "weights": 2 * draw["weights"]}
    text = r"^weights must be 1/\(rank p\) = .* at position 0 for the probabilities of the draw"
    with pytest.raises(ValueError, match=text):
        method.approximate(problem, draw=wrong)
    few = {name: x[:3] for name, x in draw.items()}
    with pytest.raises(ValueError, match="^columns must hold 4 keys for rank = 4, got 3; change"):
        method.approximate(problem, draw=few)
    with pytest.raises(ValueError, match="^v must be given for an output, got None; make the"):
        make(3).draw(sa.AttentionProblem(problem.q, problem.k), rng=0)


@pytest.mark.parametrize(("short", "law"), [("exact", "optimal"), ("value", "value_norm")])
def test_short_names_of_laws(short: str, law: str) -> None:
    problem = make_problem(20, 20)
    one, other = (make(6, law=x, center_values=True) for x in (short, law))
    assert one.components == other.components
    assert one.get_params()["law"] == short
    assert np.array_equal(one.attend(problem, rng=0), other.attend(problem, rng=0))
