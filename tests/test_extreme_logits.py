"""Logits of any size: one matrix, whose rows sum to one, whichever product looks at it."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from method_cases import CASES, IDS, MethodCase, supports, unit_roundoff
from naive import naive_attention
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.operators.steep import STEEP, steep_rows

Array = NDArray[Any]
PRECISIONS = [np.float32, np.float64]
MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": "bottom-right"},
    "masked": {"key_mask": np.arange(13) % 3 > 0},
}
N_Q, N_K, D = 9, 13, 4

pytestmark = pytest.mark.usefixtures("one_thread")


def exact_softmax(problem: sa.AttentionProblem) -> Array:
    """Return A in float64 from logits in rational arithmetic, which have no rounding."""
    q, k = ([[Fraction(float(x)) for x in row] for row in y] for y in (problem.q, problem.k))
    scale, seen = Fraction(problem.scale), problem.visible()
    out = np.zeros(seen.shape)
    for i, row in enumerate(q):
        keys = np.flatnonzero(seen[i])
        logits = [scale * sum(x * y for x, y in zip(row, k[j], strict=True)) for j in keys]
        top = max(logits, default=Fraction(0))
        # A float holds no more than 1e308: beyond -1000 an exponential is zero anyway.
        weights = np.exp([float(max(x - top, Fraction(-1000))) for x in logits])
        out[i, keys] = weights / weights.sum()
    return out


def bound_of_logits(problem: sa.AttentionProblem) -> float:
    """Return ``|scale| max |q_i| max |k_j|``."""
    q, k = (np.linalg.norm(x.astype(np.longdouble), axis=1).max() for x in problem.arrays[:2])
    return float(abs(problem.scale) * q * k)


def views(problem: sa.AttentionProblem) -> dict[str, Array]:
    """Return A as every product of the exact operator sees it."""
    exact, dtype = problem.exact, problem.dtype
    return {
        "A X": exact @ np.eye(problem.n_k, dtype=dtype),
        "A^T Y": (exact.T @ np.eye(problem.n_q, dtype=dtype)).T,
        "rows": exact.rows(slice(None)),
        "columns": exact.columns(slice(None)),
        "some rows": np.concatenate([exact.rows([i]) for i in range(problem.n_q)]),
        "some columns": np.concatenate([exact.columns([j]) for j in range(problem.n_k)], axis=1),
        "output": problem.output,
    }


def allowed(problem: sa.AttentionProblem, name: str, logit_error: float) -> Array | float:
    """Return the error of an entry when each logit is off by ``logit_error``.

    ``A exp(2 delta)`` by the logits and the sum of the row; n + 8 roundings of size u beside.
    """
    u = unit_roundoff(problem.dtype)
    return float(np.expm1(min(2 * logit_error, 1.0))) + (problem.n_k + 8) * u


def representable(size: float, dtype: Any, **options: Any) -> sa.AttentionProblem:
    """Return a problem whose logits, their terms and their sums are exact in ``dtype``.

    ``L_ij = size + c_ij unit`` with integers ``|c_ij| <= 16``, and a unit of 1/4 at least: many
    ties, differences of order one where the size leaves room for them.
    """
    rng = np.random.default_rng(0)
    unit = max(abs(size) * 2.0**-18, 0.25)
    q, k = np.zeros((N_Q, D)), np.zeros((N_K, D))
    q[:, 0], k[:, 0] = size, 1
    q[:, 1:3] = unit * rng.integers(-2, 3, (N_Q, 2))
    k[:, 1:3] = rng.integers(-2, 3, (N_K, 2))
    q, k = q.astype(dtype), k.astype(dtype)
    return sa.AttentionProblem(q, k, np.eye(N_K, dtype=dtype), scale=1.0, **options)


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("power", [0, 8, 11, 13, 15, 22, 29, 53, 100, 1000])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_exactly_representable_logits_of_any_size(
    sign: int, dtype: Any, power: int, options: dict[str, Any]
) -> None:
    if power > 120 and dtype == np.float32:
        pytest.skip("beyond float32")
    problem = representable(sign * 2.0**power, dtype, **options)
    truth = exact_softmax(problem)
    assert (truth > 0.1).sum() > N_Q  # ties or near ties, else nothing is tested
    bound = bound_of_logits(problem)
    for name, seen in views(problem).items():
        # Below STEEP kernels scale queries by log2(e): terms are rounded, in float64 but for A X.
        kernel = name in ("A X", "output")
        u = unit_roundoff(dtype if kernel else np.float64)
        delta = 0.0 if bound > STEEP else (D + 5) * u * bound
        assert np.abs(seen - truth).max() <= allowed(problem, name, delta), name
    norms = problem.exact.row_norms(), problem.exact.column_norms()
    for axis, norm in zip((1, 0), norms, strict=True):
        wanted = np.linalg.norm(truth, axis=axis)
        slack = 4 * (D + 5) * unit_roundoff(np.float64) * min(bound, STEEP) * (N_K + N_Q)
        assert np.abs(norm - wanted).max() <= slack


def naive(problem: sa.AttentionProblem, **options: Any) -> tuple[Array, Array, Array]:
    """Return A, A V and the logsumexp by loops; logits that are exact in float64 stay exact."""
    return naive_attention(
        problem.q,
        problem.k,
        problem.values,
        scale=problem.scale,
        first=problem.offset,
        right=0 if problem.causal else None,
        key_mask=problem.key_mask,
        **options,
    )


# About 1e2, 1e4, 1e6, 1e8, 1e12, 1e16 and 1e30.
POWERS = [7, 13, 20, 27, 40, 53, 100]


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_whatever_says_something_about_a_head_says_the_same(
    sign: int, dtype: Any, power: int, options: dict[str, Any]
) -> None:
    problem = representable(sign * 2.0**power, dtype, **options)
    values = np.random.default_rng(5).standard_normal((N_K, 3)).astype(dtype)
    problem = sa.AttentionProblem(problem.q, problem.k, values, scale=1.0, **options)
    a, exact, lse = naive(problem)
    bound = bound_of_logits(problem)
    u, wide = unit_roundoff(dtype), unit_roundoff(np.float64)
    # Up to STEEP the base of logits and normalisers is 2, and both are rounded.
    delta, far = (0.0 if bound > STEEP else (D + 5) * x * bound for x in (u, wide))
    small, tiny = (float(np.expm1(2 * x)) + (N_K + 8) * y for x, y in ((delta, u), (far, wide)))
    size = float(np.abs(values).max())
    seen = lse > -np.inf

    out, other = sa.attention(problem.q, problem.k, values, scale=1.0, return_lse=True, **options)
    for found in (out, problem.output, problem.exact @ values):
        assert np.abs(found - exact).max() <= small * size
    for found in (other, problem.logsumexp):
        assert np.array_equal(np.isneginf(found), ~seen)
        least = delta + 4 * u * (1 + np.abs(lse[seen]).max())
        assert np.abs(found[seen] - lse[seen]).max() <= least

    wrong = np.asarray(exact + 0.5, dtype)
    theta = float(np.linalg.norm(wrong - exact) / np.linalg.norm(exact))
    certificate = sa.certify(problem, wrong)
    assert certificate.kind == "exact"
    assert certificate.estimate == pytest.approx(theta, rel=100 * tiny)
    even = np.full(a.shape, 1.0 / N_K)
    tv = 0.5 * np.abs(even - a).sum(axis=1)[seen]
    for path in ("dense", "streaming"):
        made = sa.error_report(problem, output=wrong, path=path, spectral=False)
        assert made.output_fro_rel == pytest.approx(theta, rel=100 * tiny)
        made = sa.error_report(problem, even, path=path, spectral=False)
        assert made.row_tv_mean == pytest.approx(float(tv.mean()), abs=N_K * tiny)
        assert made.row_tv_max == pytest.approx(float(tv.max()), abs=N_K * tiny)
        made = sa.error_report(problem, a, path=path, spectral=False)
        assert max(made.matrix_fro_rel, made.row_tv_max, abs(made.row_kl_mean)) <= N_K * tiny

    report = sa.describe(problem)
    logs = np.log(a, out=np.zeros_like(a), where=a > 0)
    entropy = -(a * logs).sum(axis=1)[seen]
    # A logit off by far moves a term of the entropy by that, times one and the logarithm.
    loose = (N_K + 8) * (tiny + far) * (1 + float(np.log(N_K)) + 2 * far)
    assert np.log(report.perplexity_mean) == pytest.approx(float(entropy.mean()), abs=loose)
    assert np.log(report.perplexity_min) == pytest.approx(float(entropy.min()), abs=loose)
    assert np.log(report.perplexity_max) == pytest.approx(float(entropy.max()), abs=loose)
    logits = problem.q.astype(np.float64) @ problem.k.astype(np.float64).T
    assert report.max_logit == np.abs(logits[problem.visible()]).max()
    sums = lse[seen]
    slack = 2 * far + 8 * wide * (1 + np.abs(sums).max())
    assert report.log_kappa == pytest.approx(float(sums.max() - sums.min()), abs=slack)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_attention_with_every_option_at_any_size(sign: int, dtype: Any, power: int) -> None:
    size = sign * 2.0**power
    problem = representable(size, dtype)
    rng = np.random.default_rng(6)
    values = rng.standard_normal((N_K, 3)).astype(dtype)
    unit = max(abs(size) * 2.0**-18, 0.25)
    bias = (unit * rng.integers(-4, 5, (N_Q, N_K))).astype(dtype)
    bias[rng.random(bias.shape) < 0.2] = -np.inf
    bias[3] = -np.inf
    everything: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"attn_mask": bias}, {"mask": bias.astype(np.float64)}),
        ({"attn_mask": bias > 0}, {"mask": bias > 0}),
        ({"window": (2, 1)}, {"left": 2, "right": 1}),
        ({"causal": True, "offset": -2}, {"first": -2, "right": 0}),
        ({"sink": np.array([size], dtype)}, {"sink": size}),
        ({"softcap": 4 * abs(size)}, {"softcap": 4 * abs(size)}),
    ]
    for given, meant in everything:
        _, exact, lse = naive_attention(problem.q, problem.k, values, scale=1.0, **meant)
        out, found = sa.attention(
            problem.q[None], problem.k[None], values[None], scale=1.0, return_lse=True, **given
        )
        seen = lse > -np.inf
        bound = bound_of_logits(problem)
        u = unit_roundoff(np.float64 if bound > STEEP else dtype)
        # A cap divides, takes tanh and multiplies; then logits are no longer exact.
        rounded = "softcap" in given or bound <= STEEP
        delta = (D + 9) * u * bound if rounded else 0.0
        small = float(np.expm1(min(2 * delta, 1.0))) + (N_K + 8) * unit_roundoff(dtype)
        assert np.abs(out[0] - exact).max() <= small * np.abs(values).max(), given
        assert np.array_equal(np.isneginf(found[0]), ~seen)
        least = delta + 4 * unit_roundoff(dtype) * (1 + np.abs(lse[seen]).max())
        assert np.abs(found[0, seen] - lse[seen]).max() <= least, given


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_heads_of_attention_are_steep_row_by_row(dtype: Any) -> None:
    """Neither other heads nor what a row does not see change a bit of it, finite or not."""
    rng = np.random.default_rng(7)
    q, k, v = rng.standard_normal((3, 2, 200, D)).astype(dtype)
    plain = sa.attention(q, k, v, causal=True)
    for value in (1e8, np.inf, np.nan):
        later = k.copy()
        later[:, 150:] *= dtype(value)
        found = sa.attention(q, later, v, causal=True)
        assert np.array_equal(found[:, :150], plain[:, :150])
    large = q.copy()
    large[1] *= dtype(1e8)
    assert np.array_equal(sa.attention(large, k, v, causal=True)[0], plain[0])
    marked = v.copy()
    marked[:, 150:] = np.nan
    steep = sa.attention(large, k, v, causal=True)
    assert np.array_equal(sa.attention(large, k, marked, causal=True)[:, :150], steep[:, :150])


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("size", [1e0, 4e2, 4e4, 4e6, 4e8, 1e16, 1e30, 1e300])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_generic_logits_of_any_size(dtype: Any, size: float, options: dict[str, Any]) -> None:
    if size > 1e38 and dtype == np.float32:
        pytest.skip("beyond float32")
    rng = np.random.default_rng(1)
    # A common part of the keys is most of the logits, so that differences can be of order one.
    q = rng.standard_normal((N_Q, D))
    k = rng.standard_normal(D) + rng.standard_normal((N_K, D)) / min(size, 1e12)
    q, k = (size * q).astype(dtype), k.astype(dtype)
    problem = sa.AttentionProblem(q, k, np.eye(N_K, dtype=dtype), **options)
    truth = exact_softmax(problem)
    bound = bound_of_logits(problem)
    made = views(problem)
    for name, seen in made.items():
        single = bound <= STEEP and name in ("A X", "output")
        delta = (D + 5) * unit_roundoff(dtype if single else np.float64) * bound
        assert np.abs(seen - truth).max() <= allowed(problem, name, delta), name
        assert seen.min() >= 0
        # Rows sum to one whatever the logits are: by their own sums above STEEP, below it up to
        # twice the error of one logit.
        least = 0.0 if bound > STEEP else np.expm1(2 * delta)
        some = problem.visible().any(axis=1)
        sums = seen.astype(np.float64).sum(axis=1)
        assert np.abs(sums[some] - 1).max() <= least + (N_K + 8) * unit_roundoff(dtype), name
        assert np.all(sums[~some] == 0)
    if bound > STEEP and len(steep_rows(problem)) == N_Q:
        # One arithmetic: what differs is the last rounding of a product.
        for name in ("rows", "columns", "some rows", "some columns", "A^T Y"):
            assert np.array_equal(made[name], made["rows"]), name


@pytest.mark.parametrize("size", [4e2, 4e4, 4e6, 4e8])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(
    "method",
    [
        sa.ColumnSampling(rank=N_K, law="uniform", replace=False),
        sa.ColumnSampling(rank=N_K, law="uniform", replace=False, normalizer="sampled"),
        sa.Skeinformer(rank=N_K, normalizer="exact", pilot_reuse=False),
        sa.UniformColumns(rank=N_K),
        sa.TopK(rank=N_K),
    ],
    ids=repr,
)
def test_methods_that_are_exact_at_full_rank_are_exact_at_any_size(
    method: sa.Method, dtype: Any, size: float
) -> None:
    problem = representable(float(2.0 ** np.round(np.log2(size))), dtype)
    seen = method.approximate(problem, rng=0)
    u = unit_roundoff(dtype)
    bound = bound_of_logits(problem)
    delta = 0.0 if bound > STEEP else (D + 5) * u * bound
    truth = exact_softmax(problem)
    for dense in (seen.to_dense(), seen @ np.eye(N_K, dtype=dtype)):
        assert np.abs(dense - truth).max() <= allowed(problem, "", delta)


@pytest.mark.parametrize("size", [2.0**8, 2.0**13, 2.0**22, 2.0**60])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_rows_that_see_small_keys_only_do_not_depend_on_later_ones(dtype: Any, size: float) -> None:
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, N_K, D)).astype(dtype)
    v = np.eye(N_K, dtype=dtype)
    later = k.copy()
    later[7:] *= dtype(size)
    first = sa.AttentionProblem(q, k, v, causal=True).output[:7]
    assert np.array_equal(first, sa.AttentionProblem(q, later, v, causal=True).output[:7])
    hidden = k.copy()
    hidden[3] *= dtype(size)
    keep = np.arange(N_K) != 3
    plain = sa.AttentionProblem(q, k, v, key_mask=keep).output
    assert np.array_equal(plain, sa.AttentionProblem(q, hidden, v, key_mask=keep).output)


# --- every method -------------------------------------------------------------------------------

EXTREMES = {np.float32: (1e4, 1e8, 1e30), np.float64: (1e8, 1e30, 1e300)}
SIGHTS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"key_mask": np.arange(8) == 4},
    {"key_mask": np.zeros(8, bool)},
]
# Methods whose rows hold drawn columns only: a row that sees none of them is zero.
DRAWN_COLUMNS = ("uniform", "column_sampling")


def extreme(size: float, low: bool, dtype: Any, **options: Any) -> sa.AttentionProblem:
    """Return a problem with logits of about a size, or all of them at about minus that."""
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((2, 8, D))
    if low:
        q, k = np.abs(q), -np.abs(k)
    v = rng.standard_normal((8, 3)).astype(dtype)
    root = size**0.5
    return sa.AttentionProblem((root * q).astype(dtype), (root * k).astype(dtype), v, **options)


@pytest.mark.parametrize("low", [False, True], ids=["both signs", "low"])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_methods_give_one_matrix_or_refuse(case: MethodCase, dtype: Any, low: bool) -> None:
    traits, refusals = case.traits, list[str]()
    for size in EXTREMES[dtype]:
        for options in SIGHTS:
            problem = extreme(size, low, dtype, **options)
            if not supports(case, problem):
                continue
            try:
                ahat = case(3).approximate(problem, rng=0)
                dense = ahat.to_dense().astype(np.float64)
                back = (ahat.T @ np.eye(8, dtype=dtype)).T.astype(np.float64)
                out = case(3).attend(problem, rng=0)
            except ValueError as refusal:
                refusals.append(str(refusal))
                continue
            seen = problem.visible()
            size_of = max(1.0, float(np.abs(dense).sum(axis=1).max()))
            # Sums of eight terms of this size, and of the factors of a product.
            slack = 1000 * unit_roundoff(dtype) * size_of
            for made in (dense, back):
                assert np.all(np.isfinite(made))
                if not traits.oracle or traits.causal or not problem.causal:
                    assert np.all(made[~seen] == 0)
                if traits.row_stochastic:
                    some = seen.any(axis=1)
                    if case.name in DRAWN_COLUMNS:
                        columns = case(3).draw(problem, rng=0)["columns"]
                        some &= seen[:, columns].any(axis=1)
                    assert np.abs(made.sum(axis=1)[some] - 1).max(initial=0.0) <= slack
            assert np.abs(out - dense @ problem.values).max() <= slack * 10
    for text in refusals:
        assert " must be finite" in text
        assert "\n" not in text


@pytest.mark.parametrize(("dtype", "size"), [(np.float32, 1e25), (np.float64, 1e160)])
def test_rows_of_overflowed_logits_are_not_empty_ones(dtype: Any, size: float) -> None:
    q = np.full((3, 2), size, dtype)
    v = np.eye(3, dtype=dtype)
    problem = sa.AttentionProblem(q, -q, v)
    calls: list[Callable[[], Any]] = [
        lambda: sa.attention(q, -q, v),
        lambda: sa.attention(q, -q, v, attn_mask=np.zeros((3, 3), dtype)),
        lambda: problem.output,
        lambda: problem.exact @ v,
        lambda: problem.exact.T @ v,
        lambda: problem.exact.columns([0]),
        lambda: problem.exact.row_sums(),
        lambda: sa.Skeinformer(rank=2).approximate(problem, rng=0),
        lambda: sa.Nystromformer(rank=2).approximate(problem, rng=0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^scale \* q @ k\.T must be finite in float"):
            call()
    # What is hidden is empty, whatever it holds.
    hidden = sa.attention(q, -q, v, attn_mask=np.zeros((3, 3), bool))
    assert not hidden.any()


@pytest.mark.parametrize("name", ["uniform", "skeinformer", "performer"])
def test_a_steep_head_changes_no_other_head(name: str) -> None:
    # Sizes are looked at for all heads of a call at once: a large one must not tell of the others.
    q, k, v = (np.random.default_rng(s).standard_normal((2, 24, 4)) for s in range(3))
    q, k = q.astype(np.float32), k.astype(np.float32)
    v = v.astype(np.float32)
    q[1] *= 300
    k[1] *= 300
    method = {
        "uniform": sa.UniformColumns,
        "skeinformer": sa.Skeinformer,
        "performer": sa.Performer,
    }
    made = method[name](rank=6)
    draw = made.draw(sa.AttentionProblem(q[0], k[0], v[0]), rng=0)
    both = [sa.attention(q, k, v, made, draw=draw)[h] for h in range(2)]
    for h in range(2):
        alone = made.attend(sa.AttentionProblem(q[h], k[h], v[h]), draw=draw.detach())
        assert np.array_equal(both[h], alone)
