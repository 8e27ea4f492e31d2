"""Error reports: every field against its formula, both paths, and refusals."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from method_cases import CASES, IDS, MethodCase, dense_attention, make_problem
from numpy.typing import NDArray
from scipy.sparse.linalg import aslinearoperator

import sketchattn as sa
from sketchattn.metrics import FIELDS

Array = NDArray[Any]

OPTIONS: dict[str, dict[str, Any]] = {
    "square": {"n_q": 40, "n_k": 40},
    "rectangular": {"n_q": 25, "n_k": 60},
    "causal": {"n_q": 40, "n_k": 40, "causal": True},
    "empty rows": {"n_q": 50, "n_k": 30, "causal": "bottom-right"},
    "masked": {"n_q": 30, "n_k": 45, "key_mask": np.arange(45) % 3 > 0},
}
NAN_WITHOUT_VALUES = {"output_fro_rel", "output_fro_amm", "output_spec_rel", "output_spec_amm"}
SPECTRAL = {"output_spec_rel", "output_spec_amm", "matrix_spec_rel"}


def formulas(problem: sa.AttentionProblem, other: Array) -> dict[str, float]:
    """Return the fields from dense matrices, written from their definitions."""
    a = dense_attention(problem)
    v = problem.values.astype(np.float64)
    kept = v if problem.key_mask is None else v[problem.key_mask]
    seen = a.sum(axis=1) > 0
    o, error = a @ v, (other - a) @ v
    visible = problem.visible()
    mean = np.array([v[row].mean(axis=0) if row.any() else np.zeros(v.shape[1]) for row in visible])
    norm = np.linalg.norm
    divergence = []
    for row, approximate in zip(a[seen], other[seen], strict=True):
        total = 0.0
        for p, x in zip(row, approximate, strict=True):
            if p > 0:
                total += p * math.log(p / x) if x > 0 else math.inf
        divergence.append(total)
    variation = 0.5 * np.abs(other - a).sum(axis=1)[seen]
    return {
        "output_fro_rel": float(norm(error) / norm(o)),
        "output_fro_amm": float(norm(error) / (norm(a) * norm(kept))),
        "output_spec_rel": float(norm(error, 2) / norm(o, 2)),
        "output_spec_amm": float(norm(error, 2) / (norm(a, 2) * norm(kept, 2))),
        "matrix_fro_rel": float(norm(other - a) / norm(a)),
        "matrix_spec_rel": float(norm(other - a, 2) / norm(a, 2)),
        "row_tv_mean": float(variation.mean()),
        "row_tv_max": float(variation.max()),
        "row_kl_mean": float(np.mean(divergence)),
        "skill": float(1 - norm(error) / norm(mean - o)),
    }


def near(found: dict[str, float], wanted: dict[str, float], tolerance: float) -> list[str]:
    """Return the fields that differ by more than a relative tolerance."""
    return [
        name
        for name in wanted
        if found[name] != wanted[name]
        and not abs(found[name] - wanted[name]) <= tolerance * max(abs(wanted[name]), 1e-3)
    ]


def approximation(problem: sa.AttentionProblem, seed: int = 3) -> Array:
    """Return A with every visible entry changed by up to a tenth."""
    a = dense_attention(problem)
    noise = np.random.default_rng(seed).uniform(0.9, 1.1, a.shape)
    return a * noise


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("path", ["dense", "streaming"])
def test_every_field_is_its_formula(name: str, path: str) -> None:
    problem = make_problem(**OPTIONS[name])
    other = approximation(problem)
    report = sa.error_report(problem, other, path=path).as_dict()
    assert list(report) == list(FIELDS)
    # float64 sums of a few thousand terms; the norms by iteration are right to 1e-8.
    assert near(report, formulas(problem, other), 1e-7) == []


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", OPTIONS)
def test_paths_agree(case: MethodCase, dtype: Any, name: str) -> None:
    problem = make_problem(**OPTIONS[name], dtype=dtype, d=4)
    traits = case.traits
    if case.name == "exact" or (problem.causal and not (traits.causal or traits.oracle)):
        return  # "exact" is compared with rounding alone below; the others refuse, see methods
    ahat = case(8).approximate(problem, 0 if traits.randomized else None)
    dense, streamed = (
        sa.error_report(problem, ahat, path=path).as_dict() for path in ("dense", "streaming")
    )
    # Norms and distances to 1e-6; a divergence is a mean of logarithms of float32 entries.
    assert near(streamed, dense, 1e-6 if dtype == np.float64 else 5e-6) == []


@pytest.mark.parametrize("path", ["dense", "streaming"])
def test_exact_attention_has_the_error_of_its_rounding(path: str) -> None:
    for dtype, size in ((np.float32, 1e-5), (np.float64, 1e-13)):
        problem = make_problem(40, 40, dtype)
        report = sa.error_report(problem, problem.exact, path=path)
        assert report.output_fro_rel <= size
        assert report.matrix_fro_rel <= size
        assert report.skill >= 1 - 2 * size


@pytest.mark.parametrize("path", ["dense", "streaming"])
def test_divergence_is_infinite_where_support_is_missing(path: str) -> None:
    problem = make_problem(12, 12)
    for value in (0.0, -1e-9):
        other = approximation(problem)
        other[5, 7] = value
        assert sa.error_report(problem, other, path=path).row_kl_mean == math.inf
    # Hidden entries are not in the support.
    causal = make_problem(12, 12, causal=True)
    assert math.isfinite(sa.error_report(causal, approximation(causal), path=path).row_kl_mean)


@pytest.mark.parametrize("path", ["dense", "streaming"])
def test_one_changed_entry_is_seen_where_it_should_be(path: str) -> None:
    problem = make_problem(20, 20)
    a = dense_attention(problem)
    other = a.copy()
    other[3, 4] += 0.25
    report = sa.error_report(problem, other, path=path)
    assert abs(report.row_tv_max - 0.125) <= 1e-12
    assert abs(report.row_tv_mean - 0.125 / 20) <= 1e-12
    assert abs(report.matrix_fro_rel - 0.25 / np.linalg.norm(a)) <= 1e-12
    # Scaling by 1.01 is an error of one per cent in every relative norm, and of nothing else.
    scaled = sa.error_report(problem, 1.01 * a, path=path)
    for name in ("output_fro_rel", "output_spec_rel", "matrix_fro_rel", "matrix_spec_rel"):
        assert abs(getattr(scaled, name) - 0.01) <= 1e-9


@pytest.mark.parametrize("path", ["dense", "streaming"])
def test_zero_and_mean_of_v(path: str) -> None:
    problem = make_problem(30, 30)
    zero = sa.error_report(problem, sa.Zero().approximate(problem), path=path)
    assert zero.output_fro_rel == 1.0
    assert abs(zero.matrix_fro_rel - 1.0) <= 1e-14
    mean = sa.error_report(problem, sa.VMean().approximate(problem), path=path)
    assert abs(mean.skill) <= 1e-12


def test_fields_that_were_not_asked_for_are_nan() -> None:
    problem = make_problem(10, 10)
    for path in ("dense", "streaming"):
        report = sa.error_report(problem, approximation(problem), path=path, spectral=False)
        assert {name for name, x in report.as_dict().items() if math.isnan(x)} == SPECTRAL
    bare = sa.AttentionProblem(problem.q, problem.k)
    report = sa.error_report(bare, approximation(problem))
    missing = {name for name, x in report.as_dict().items() if math.isnan(x)}
    assert missing == NAN_WITHOUT_VALUES | {"skill"}


def test_operators_and_arrays_give_one_report() -> None:
    problem = make_problem(14, 14)
    other = approximation(problem)
    reports = [
        sa.error_report(problem, x, path="streaming").as_dict()
        for x in (other, aslinearoperator(other), other.tolist())
    ]
    assert near(reports[1], reports[0], 1e-7) == near(reports[2], reports[0], 1e-12) == []


# family -> method -> (output_fro_rel, output_spec_amm), mean of two heads; rank 128, n = 512
PUBLISHED = {
    "gaussian": {
        "zero": (1.0, 0.265),
        "vmean": (0.803, 0.083),
        "svd": (0.302, 0.027),
        "topk": (0.648, 0.059),
    },
    "peaked": {
        "zero": (1.0, 0.399),
        "vmean": (0.997, 0.399),
        "svd": (0.471, 0.186),
        "topk": (0.0027, 0.0013),
    },
    "clustered": {
        "zero": (1.0, 0.698),
        "vmean": (0.962, 0.679),
        "svd": (0.0101, 0.0061),
        "topk": (5.5e-5, 1.1e-4),
    },
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_floors_and_predictors_on_the_published_inputs(family: str) -> None:
    heads = sa.make_heads(family, n=512, d=64, heads=2, rng=0)
    for name, wanted in PUBLISHED[family].items():
        cls = sa.methods()[name]
        method = cls(rank=128) if "rank" in cls._get_param_names() else cls()
        reports = [sa.error_report(p, method.approximate(p)) for p in heads]
        for field, value in zip(("output_fro_rel", "output_spec_amm"), wanted, strict=True):
            found = float(np.mean([getattr(r, field) for r in reports]))
            # The table prints two or three digits: half a unit of the last one.
            last = 10.0 ** (math.floor(math.log10(value)) - (1 if value < 0.1 else 2))
            assert abs(found - value) <= 0.5001 * last, (family, name, field, found)


REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"problem": 3},
        TypeError,
        "problem must be an AttentionProblem, got int; "
        "make one with sketchattn.AttentionProblem(q, k, v)",
    ),
    (
        {"path": "exact"},
        ValueError,
        "path must be None, 'dense' or 'streaming', got 'exact'; None chooses",
    ),
    (
        {"problem": sa.AttentionProblem(np.ones((0, 2)), np.ones((3, 2)), np.ones((3, 2)))},
        ValueError,
        "problem must have a query and a visible key, got n_q = 0 and 3 keys; "
        "there is nothing to report",
    ),
    (
        {"ahat": np.ones((3, 4))},
        ValueError,
        "ahat must have the shape (4, 4) of the problem, got (3, 4); approximate the same problem",
    ),
]


@pytest.mark.parametrize(("change", "kind", "text"), REFUSALS)
def test_refusals(change: dict[str, Any], kind: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"problem": make_problem(4, 4), "ahat": np.eye(4)} | change
    with pytest.raises(kind, match=f"^{re.escape(text)}$"):
        sa.error_report(**arguments)
