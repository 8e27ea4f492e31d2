"""Error reports: every field against its formula, both paths, and refusals."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
from method_cases import CASES, MethodCase, dense_attention, make_problem, supports
from numpy.typing import NDArray
from scipy.sparse.linalg import aslinearoperator

import sketchattn as sa
from sketchattn.errors import reports as metrics
from sketchattn.errors.reports import FIELDS

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

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("case", [x for x in CASES if x.name != "exact"], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_paths_agree(case: MethodCase, dtype: Any) -> None:
    # "exact" is compared with rounding alone below.
    for name, options in OPTIONS.items():
        problem = make_problem(**options, dtype=dtype, d=4)
        if not supports(case, problem):
            continue  # it refuses, see methods
        ahat = case(8).approximate(problem, 0 if case.traits.randomized else None)
        if ahat.path == "exact":  # errors are those of rounding, as those of "exact"
            continue
        dense, streamed = (
            sa.error_report(problem, ahat, path=path).as_dict() for path in ("dense", "streaming")
        )
        assert near(streamed, dense, 1e-6) == [], name


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


# --- what each field reacts to ------------------------------------------------------------------

every_path = pytest.mark.parametrize("path", ["dense", "streaming"])
OUTPUT = {"output_fro_rel", "output_fro_amm", "output_spec_rel", "output_spec_amm", "skill"}
MATRIX = {"matrix_fro_rel", "matrix_spec_rel"}
ROWS = {"row_tv_mean", "row_tv_max", "row_kl_mean"}


def moved(problem: sa.AttentionProblem, first: Array, second: Array, path: str) -> set[str]:
    """Return the fields that differ between two approximations by more than their tolerance."""
    reports = [sa.error_report(problem, x, path=path).as_dict() for x in (first, second)]
    return set(near(reports[1], reports[0], 1e-6))


@every_path
def test_a_change_that_v_does_not_see_leaves_the_output_alone(path: str) -> None:
    problem = make_problem(20, 20)
    other = approximation(problem)
    # A direction of the keys with delta V = 0, added to one row that is not the worst.
    delta = np.linalg.svd(problem.values.T)[2][-1]
    gaps = np.abs(other - dense_attention(problem)).sum(axis=1)
    row = np.zeros((20, 1))
    row[np.argmin(gaps)] = 0.02
    found = moved(problem, other, other + row * delta, path)
    assert {"matrix_fro_rel", "row_tv_mean"} <= found
    assert not found & OUTPUT
    assert "row_tv_max" not in found


@every_path
def test_other_values_leave_the_matrix_alone(path: str) -> None:
    problem = make_problem(20, 20)
    other = approximation(problem)
    v = np.random.default_rng(9).standard_normal((20, 3))
    changed = sa.AttentionProblem(problem.q, problem.k, v)
    first, second = (sa.error_report(x, other, path=path).as_dict() for x in (problem, changed))
    assert set(near(second, first, 1e-6)) == OUTPUT
    # Twice the values are twice the error and twice the output.
    doubled = sa.AttentionProblem(problem.q, problem.k, 2 * problem.values)
    assert near(sa.error_report(doubled, other, path=path).as_dict(), first, 1e-9) == []


@every_path
def test_one_row_and_a_scale_move_everything(path: str) -> None:
    problem = make_problem(20, 20)
    other = approximation(problem)
    assert moved(problem, other, 1.01 * other, path) == set(FIELDS)
    worst = np.argmax(np.abs(other - dense_attention(problem)).sum(axis=1))
    changed = other.copy()
    changed[worst] *= 1.05
    assert moved(problem, other, changed, path) == set(FIELDS)
    order = np.random.default_rng(0).permutation(20)
    shuffled = sa.AttentionProblem(problem.q[order], problem.k, problem.values)
    first = sa.error_report(problem, other, path=path).as_dict()
    assert near(sa.error_report(shuffled, other[order], path=path).as_dict(), first, 1e-7) == []


@every_path
def test_denominators(path: str) -> None:
    problem = make_problem(20, 25)
    report = sa.error_report(problem, approximation(problem), path=path)
    a, v, o = dense_attention(problem), problem.values, problem.output
    fro = np.linalg.norm

    def spec(x: Array) -> float:
        return float(np.linalg.norm(x, 2))

    assert report.output_fro_amm / report.output_fro_rel == pytest.approx(
        fro(o) / (fro(a) * fro(v)), rel=1e-12
    )
    assert report.output_spec_amm / report.output_spec_rel == pytest.approx(
        spec(o) / (spec(a) * spec(v)), rel=1e-7
    )


@every_path
def test_quotients_of_zero(path: str) -> None:
    problem = make_problem(8, 8)
    silent = sa.AttentionProblem(problem.q, problem.k, np.zeros((8, 3)))
    report = sa.error_report(silent, approximation(problem), path=path)
    assert {name: getattr(report, name) for name in OUTPUT} == dict.fromkeys(OUTPUT, 0.0)
    assert report.matrix_fro_rel > 0
    # One key: A is 1, and so is the mean of V; an error is infinitely worse than it.
    single = make_problem(4, 1)
    for ahat, skill in ((np.ones((4, 1)), 0.0), (np.full((4, 1), 0.5), -math.inf)):
        assert sa.error_report(single, ahat, path=path).skill == skill
    # Values that cancel: O = 0, and every error of it is infinite.
    even = sa.AttentionProblem(np.zeros((3, 2)), np.ones((2, 2)), np.array([[1.0], [-1.0]]))
    report = sa.error_report(even, np.array([[0.75, 0.25]] * 3), path=path)
    assert report.output_fro_rel == report.output_spec_rel == math.inf
    assert report.output_fro_amm == pytest.approx(0.5 * 3**0.5 / (1.5**0.5 * 2**0.5))


# --- the two paths ------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [10, 50, 58])
def test_paths_agree_on_small_errors_of_single_precision(rank: int) -> None:
    # Rounding a product U S P to float32 would move an error of 1e-3 by 1e-4 of itself.
    problem = make_problem(60, 60, np.float32, d=8)
    ahat = sa.SVDFloor(rank).approximate(problem)
    dense, streamed = (sa.error_report(problem, ahat, path=p) for p in ("dense", "streaming"))
    for name in FIELDS:
        expected = getattr(dense, name)
        # Ohat is the product in float32 on either path: one and the same array.
        assert getattr(streamed, name) == pytest.approx(expected, rel=1e-6), name


@pytest.mark.parametrize("spread", [700.0, 740.0, 760.0])
def test_paths_agree_on_weights_below_the_normal_range(spread: float) -> None:
    q, k = np.array([[1.0]]), np.array([[0.0], [-spread], [-1.0]])
    problem = sa.AttentionProblem(q, k, np.eye(3), scale=1.0)
    other = np.array([[0.5, 0.0, 0.5]])
    dense, streamed = (sa.error_report(problem, other, path=p) for p in ("dense", "streaming"))
    assert (dense.row_kl_mean == math.inf) == (streamed.row_kl_mean == math.inf) == (spread < 708)
    assert near(streamed.as_dict(), dense.as_dict(), 1e-6) == []


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in OPTIONS.values():
        problem = make_problem(**options)
        other = approximation(problem)
        whole = sa.error_report(problem, other, path="streaming").as_dict()
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "BLOCK_ENTRIES", 7 * problem.n_k)
            blocks = sa.error_report(problem, other, path="streaming").as_dict()
            patch.setattr(metrics, "BLOCK_ENTRIES", 1)
            single = sa.error_report(problem, other, path="streaming").as_dict()
        assert near(blocks, whole, 1e-12) == near(single, whole, 1e-12) == []


def test_the_path_is_chosen_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(10, 12)
    other = approximation(problem)
    called: list[str] = []

    def recorded(name: str) -> Any:
        plain = getattr(metrics, f"_{name}_rows")

        def run(*arguments: Any) -> Any:
            called.append(name)
            return plain(*arguments)

        return run

    for name in ("dense", "streamed"):
        monkeypatch.setattr(metrics, f"_{name}_rows", recorded(name))
    for limit, path, expected in (
        (120, None, "dense"),
        (119, None, "streamed"),
        (119, "dense", "dense"),
        (120, "streaming", "streamed"),
    ):
        monkeypatch.setattr(metrics, "DENSE_ENTRIES", limit)
        sa.error_report(problem, other, path=path)
        assert called.pop() == expected


def test_streaming_never_forms_the_exact_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(40, 2100, d=2)  # too long for the dense norm of A
    monkeypatch.setattr("sketchattn.operators.spectra.DENSE_LIMIT", 30)
    ahat = sa.UniformColumns(20).approximate(problem, rng=0)

    def forbidden(*_: object) -> Array:
        pytest.fail("rows of the exact matrix were formed")

    monkeypatch.setattr(sa.SoftmaxAttention, "rows", forbidden)
    monkeypatch.setattr(sa.SoftmaxAttention, "to_dense", forbidden)
    assert sa.error_report(problem, ahat, path="streaming").matrix_spec_rel > 0


def test_exact_quantities_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(20, 20)
    other = approximation(problem)
    for path in ("dense", "streaming"):
        sa.error_report(problem, other, path=path)

    def forbidden(*_: object, **__: object) -> Any:
        pytest.fail("computed again")

    monkeypatch.setattr("sketchattn.operators.solve.solve", forbidden)
    monkeypatch.setattr("sketchattn.operators.spectra.spectral_norm", forbidden)
    for path in ("dense", "streaming"):
        report = sa.error_report(problem, 1.1 * other, path=path, spectral=False)
        assert report.output_fro_rel > 0


@every_path
def test_approximations_that_are_not_finite_are_refused(path: str) -> None:
    problem = make_problem(6, 5)
    for value in (math.nan, math.inf, -math.inf):
        other = approximation(problem)
        other[[2, 4], 1] = value
        text = (
            "ahat must be finite, got NaN or infinity in 2 rows, the first is row 2; "
            "correct the approximation"
        )
        # An operator shows it only when its rows are read; an array is checked at once.
        factored = sa.FactoredAttention(np.eye(6), None, other)
        with pytest.raises(ValueError, match="ahat must be finite"):
            sa.error_report(problem, other, path=path)
        if math.isnan(value):
            with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="must be finite"):
                sa.error_report(problem, factored, path=path)
        held = sa.SampledAttention(np.arange(5), other, 5)
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            sa.error_report(problem, held, path=path)


def test_a_report_is_a_record() -> None:
    problem = make_problem(5, 5)
    report = sa.error_report(problem, approximation(problem))
    assert list(report.as_dict()) == [f.name for f in dataclasses.fields(report)] == list(FIELDS)
    assert all(isinstance(x, float) for x in report.as_dict().values())
    assert report == sa.error_report(problem, approximation(problem))
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.skill = 1.0  # type: ignore[misc]  # the point of the test


def test_problems_without_a_visible_key_are_refused() -> None:
    arrays = np.ones((3, 2))
    problem = sa.AttentionProblem(arrays, arrays, arrays, key_mask=np.zeros(3, bool))
    text = (
        "problem must have a query and a visible key, got n_q = 3 and 0 keys; "
        "there is nothing to report"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        sa.error_report(problem, np.eye(3))


# --- outputs of methods without a matrix --------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("path", ["dense", "streaming"])
def test_an_output_alone_has_the_errors_of_its_output(name: str, path: str) -> None:
    problem = make_problem(**OPTIONS[name])
    other = approximation(problem)
    report = sa.error_report(problem, output=other @ problem.values, path=path).as_dict()
    wanted = formulas(problem, other)
    known = {name: x for name, x in wanted.items() if name in NAN_WITHOUT_VALUES | {"skill"}}
    # As above: float64 sums of a few thousand terms; norms by iteration are right to 1e-8.
    assert near(report, known, 1e-7) == []
    assert all(math.isnan(report[name]) for name in set(FIELDS) - set(known))
    plain = sa.error_report(problem, output=other @ problem.values, path=path, spectral=False)
    assert {name for name, x in plain.as_dict().items() if math.isnan(x)} == set(FIELDS) - {
        "output_fro_rel",
        "output_fro_amm",
        "skill",
    }


def test_outputs_are_checked() -> None:
    problem = make_problem(6, 8)
    output = problem.output
    bare = sa.AttentionProblem(*problem.arrays[:2])
    calls: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (problem, {}, TypeError, "^error_report must be given ahat or output, got none"),
        (problem, {"ahat": problem.exact, "output": output}, TypeError, "got both; pass one"),
        (problem, {"output": output[1:]}, ValueError, r"^output must have shape \(n_q, d_v\) = "),
        (problem, {"output": output * np.nan}, ValueError, "^output must be finite"),
        (problem, {"output": output.astype(int)}, TypeError, "^output must"),
        (bare, {"output": output}, ValueError, "^v must be given for an output"),
    ]
    for given, arguments, kind, message in calls:
        with pytest.raises(kind, match=message):
            sa.error_report(given, **arguments)


# --- extreme logits, and floating-point settings of the caller ----------------------------------


def extreme(
    size: float, dtype: Any, options: dict[str, Any], level: bool = False
) -> tuple[sa.AttentionProblem, Array]:
    """Return a problem whose logits are integers times a power of two, and its exact matrix.

    Weights of distinct logits differ by a factor of ``exp(-size)``, which is zero: each row is even
    over the visible keys of its largest logit.
    """
    rng = np.random.default_rng(0)
    n_q, n_k = 24, 19 if options.get("causal") == "bottom-right" else 24
    q, k = rng.integers(-3, 4, (n_q, 1)).astype(float), rng.integers(-3, 4, (n_k, 1)).astype(float)
    if level:
        q[:], k[:] = 1.0, 1.0
    logits = (np.sign(size) * q) @ k.T
    k *= size
    if "key_mask" in options:
        k[~options["key_mask"]] = np.nan  # never read
    v = rng.standard_normal((n_k, 3)).astype(dtype)
    problem = sa.AttentionProblem(q.astype(dtype), k.astype(dtype), v, scale=1.0, **options)
    logits[~problem.visible()] = -np.inf
    best = (logits == logits.max(axis=1, keepdims=True)) & problem.visible()
    return problem, best / np.maximum(best.sum(axis=1, keepdims=True), 1)


EXTREME: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": True, "key_mask": np.arange(24) >= 6},
    {"key_mask": np.arange(24) % 3 == 1},
    {"causal": "bottom-right"},
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [2.0**13, 2.0**27, 2.0**100])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("level", [False, True])
def test_exact_side_certificate_and_report_agree_on_extreme_logits(
    dtype: Any, size: float, sign: float, level: bool
) -> None:
    u = float(np.finfo(dtype).eps)
    rounding = 64 * u  # all of these rows are steep, and divided by their own sums
    for options in EXTREME:
        problem, a = extreme(sign * size, dtype, options, level)
        exact = a @ problem.values.astype(np.float64)
        # Means of at most 24 numbers.
        assert np.all(np.abs(problem.output - exact) <= 32 * u * np.abs(problem.values).max())
        assert np.array_equal(np.isneginf(problem.logsumexp), a.sum(axis=1) == 0)
        wrong = (exact + 0.5).astype(dtype)
        theta = float(np.linalg.norm(wrong - exact) / np.linalg.norm(exact))
        certificate = sa.certify(problem, wrong)
        assert certificate.kind == "exact"
        assert certificate.estimate == pytest.approx(theta, rel=1e-12)
        sampled = sa.certify(problem, wrong, rows=8)
        assert sampled.low <= theta <= sampled.high
        even = np.full(a.shape, 1.0 / a.shape[1])
        visible = a.sum(axis=1) > 0
        tv = 0.5 * np.abs(even - a).sum(axis=1)[visible]
        for path in ("dense", "streaming"):
            made = sa.error_report(problem, output=wrong, path=path, spectral=False)
            assert made.output_fro_rel == pytest.approx(theta, rel=1e-6)
            assert made.output_fro_amm == pytest.approx(
                theta
                * np.linalg.norm(exact)
                / (np.linalg.norm(a) * np.linalg.norm(problem.values[problem.kept_keys])),
                rel=1e-5,
            )
            made = sa.error_report(problem, problem.exact, path=path, spectral=False)
            assert max(made.output_fro_rel, made.matrix_fro_rel, made.row_tv_max) < rounding
            made = sa.error_report(problem, even, path=path, spectral=False)
            assert made.row_tv_mean == pytest.approx(tv.mean(), rel=1e-6)
            assert made.matrix_fro_rel == pytest.approx(
                np.linalg.norm(even - a) / np.linalg.norm(a), rel=1e-6
            )


def peaked() -> sa.AttentionProblem:
    """Return a causal head with rows that see nothing and weights that underflow."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 40, 4))
    return sa.AttentionProblem(60 * q, k, v, causal=True, key_mask=np.arange(40) >= 3)


@pytest.mark.parametrize("path", ["dense", "streaming"])
def test_settings_of_the_caller_change_nothing(path: str) -> None:
    results = []
    for setting in ("warn", "raise"):
        problem = peaked()  # exact quantities are computed under each setting
        with np.errstate(all=setting), warnings.catch_warnings():
            warnings.simplefilter("error")
            ahat = sa.UniformColumns(rank=8).approximate(problem, rng=0)
            results.append(
                [
                    sa.error_report(problem, ahat, path=path),
                    sa.error_report(problem, output=np.zeros((40, 4)), path=path),
                ]
            )
    assert str(results[0]) == str(results[1])
