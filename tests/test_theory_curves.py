"""Claims as curves: the measure, the units and the method that each bound is about."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from method_cases import make_problem
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn import theory
from sketchattn.errors.reports import FIELDS
from sketchattn.theory.engine.checking import _context, default_factory
from sketchattn.theory.engine.registry import get_entry

Array = NDArray[Any]
BOUNDS = theory.error_bounds()
# About A S^T S for a random S; the certificate of `Combiner` has its own tests.
SKETCHED = sorted(set(BOUNDS) - {"combiner.certificate"})

# A rank that every claim takes on 32 keys: block sketches need multiples of 4.
RANK = 8


def observed(name: str, problem: sa.AttentionProblem) -> tuple[float, Array]:
    """Return one observation of a claim and the dense S that it was made with."""
    made: list[Array] = []

    def factory(kind: str, r: int, n: int, rng: np.random.Generator, **parameters: Any) -> Any:
        operator = default_factory(kind, r, n, rng, **parameters)
        made.append(operator.to_dense())
        return operator

    entry = get_entry(name)
    context = _context(entry, theory.Instance("one", problem), 1, 0, factory)
    seen = entry.observe(context, **{**entry.parameters, "rank": RANK})
    (value,) = seen.values
    (sketch,) = made
    return float(value), sketch


@pytest.mark.parametrize("name", SKETCHED)
def test_an_observation_of_the_claim_is_the_measure_that_it_bounds(name: str) -> None:
    curve = BOUNDS[name]
    problem = make_problem(20, 32)
    value, sketch = observed(name, problem)
    report = sa.error_report(problem, problem.exact.to_dense() @ sketch.T @ sketch).as_dict()
    instance = theory.Instance("one", problem)
    # Sums of a thousand products in float64.
    assert curve._curve.convert(value, instance) == pytest.approx(report[curve.field], rel=1e-9)
    # The other measures are other numbers: the right one was not met by chance.
    for field in set(FIELDS) - {curve.field}:
        assert report[field] != pytest.approx(report[curve.field], rel=1e-6)


@pytest.mark.parametrize("name", SKETCHED)
def test_the_operator_of_the_claim_is_the_one_of_the_method(name: str) -> None:
    # The mean square of the error of the method itself obeys the bound: z < 5 (3e-7 for a normal
    # mean), the bound being exact or an upper one.
    curve, trials = BOUNDS[name], 200
    problem = make_problem(20, 32)
    method = sa.methods()[curve.method](rank=RANK, **curve.parameters)
    assert curve.is_about(method)
    power = 1 if curve.what == "mean" else 2
    errors = np.array(
        [
            getattr(
                sa.error_report(problem, method.approximate(problem, seed), spectral=spectral),
                curve.field,
            )
            for spectral in [curve.field == "output_spec_amm"]
            for seed in range(trials)
        ]
    )
    limit = curve.at(problem, RANK)
    if "draws" in curve.what:
        assert np.mean(errors > limit) <= 0.05
        return
    powers = errors**power
    assert powers.mean() <= limit**power + 5 * powers.std(ddof=1) / math.sqrt(trials)
    if theory.claims()[name].kind == "equality":
        assert powers.mean() >= limit**power - 5 * powers.std(ddof=1) / math.sqrt(trials)


def test_bounds_fall_with_rank_and_say_what_lies_below() -> None:
    problem = make_problem(20, 32)
    for name in SKETCHED:
        curve, claim = BOUNDS[name], theory.claims()[name]
        assert curve.claim == name
        assert curve.field in FIELDS
        assert "rank" in get_entry(name).parameters
        few, many = curve.at(problem, 8), curve.at(problem, 16)
        assert few > many > 0
        if claim.kind == "tail":
            assert curve.what == f"{100 * (1 - claim.constants['delta']):g} % of draws"
        else:
            assert curve.what in ("mean", "root mean square")


def test_only_the_method_of_the_claim_is_meant() -> None:
    gaussian = BOUNDS["sketching.moment_gaussian"]
    assert gaussian.is_about(sa.JL(3))
    assert gaussian.is_about(sa.JL(3, sketch_options={}))
    assert not gaussian.is_about(sa.JL(3, "rademacher"))
    assert not gaussian.is_about(sa.JL(3, center=True))
    assert not gaussian.is_about(sa.UniformColumns(3))

    class Other(sa.JL):
        pass

    assert not gaussian.is_about(Other(3))  # may do anything
    sparse = BOUNDS["sketching.moment_sparse"]
    assert sparse.is_about(sa.JL(3, "sparse"))
    assert sparse.is_about(sa.JL(3, "sparse", {"s": 3}))
    assert not sparse.is_about(sa.JL(3, "sparse", {"s": 2}))
    assert BOUNDS["sketching.moment_sjlt"].is_about(sa.JL(8, "sjlt", {"s": 2}))
    assert not BOUNDS["sketching.moment_srht"].is_about(sa.JL(8, "srht", {"replace": True}))
    optimal = BOUNDS["sketching.moment_sample_optimal"]
    assert optimal.is_about(sa.ColumnSampling(3))
    assert not optimal.is_about(sa.ColumnSampling(3, "leverage"))
    assert not optimal.is_about(sa.ColumnSampling(3, np.full(32, 1 / 32)))
    assert not optimal.is_about(sa.ColumnSampling(3, mix=0.1))
    assert not optimal.is_about(sa.ColumnSampling(3, replace=False))
    assert not optimal.is_about(sa.ColumnSampling(3, normalizer="sampled"))


def test_bounds_that_do_not_apply_are_not_numbers() -> None:
    gaussian = BOUNDS["sketching.moment_gaussian"]
    masked = make_problem(6, 12, key_mask=np.arange(12) < 5)
    assert gaussian.at(masked, 5) > 0
    assert math.isnan(gaussian.at(masked, 6))
    zero = sa.AttentionProblem(np.ones((3, 2)), np.ones((4, 2)), np.zeros((4, 2)))
    assert math.isnan(gaussian.at(zero, 2))


def test_bounds_need_no_draw_even_where_draws_are_certain_to_differ() -> None:
    # 2^-n underflows from 1075 columns on.
    problem = make_problem(4, 1200)
    assert theory.bound("sketching.moment_countsketch", problem, rank=8) > 0
    assert theory.bound("sketching.moment_sample_uniform", problem, rank=200) > 0
