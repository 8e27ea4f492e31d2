"""Compressed: the formula, any method inside, its draws, traits and parameters."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from method_cases import dense_attention, make_problem, rounding
from numpy.typing import NDArray
from sklearn.base import clone

import sketchattn as sa
from sketchattn.sketches.base import streams
from sketchattn.sketches.compression import (
    KINDS,
    RANDOM_KINDS,
    compress_problem,
    draw_projection,
)

Array = NDArray[Any]
every_kind = pytest.mark.parametrize("kind", KINDS)

pytestmark = pytest.mark.usefixtures("one_thread")


def message(text: str) -> str:
    """Return a pattern for a whole message."""
    return f"^{re.escape(text)}$"


def error_of(problem: sa.AttentionProblem, method: sa.Method) -> float:
    report = sa.error_report(problem, method.approximate(problem, rng=0), spectral=False)
    return float(report.matrix_fro_rel)


# --- the formula --------------------------------------------------------------------------------

MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"key_mask": np.arange(16) % 3 > 0},
    "causal": {"causal": True},
    "scale": {"scale": -0.3},
}


@every_kind
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_exact_matrix_inside_is_the_softmax_of_compressed_logits(
    kind: str, mask: str, dtype: Any
) -> None:
    problem = make_problem(16, 16, dtype, d=6, **MASKS[mask])
    method = sa.Compressed(3, kind=kind)
    ahat = method.approximate(problem, rng=7)
    rng = streams(np.random.default_rng(7), 2)[0] if kind in RANDOM_KINDS else None
    small = compress_problem(problem, 3, kind, rng)
    expected = dense_attention(small)
    assert np.abs(ahat.to_dense() - expected).max() <= rounding(small)
    assert np.abs(ahat @ problem.values - expected @ problem.values).max() <= 16 * rounding(small)
    assert np.abs(ahat.T @ problem.q - expected.T @ problem.q).max() <= 99 * rounding(small)
    assert isinstance(ahat, sa.SoftmaxAttention)
    assert (ahat.path, ahat.effective_rank) == ("sketch", 3)
    assert ahat.problem.d == 3
    wide = ahat.wide()
    assert wide.dtype == np.float64
    assert np.abs(wide.to_dense() - expected).max() <= 1e-12
    assert wide.effective_rank == 3
    # It is no other matrix: not A, and not that of another width.
    for other in (dense_attention(problem), sa.Compressed(2, kind=kind).approximate(problem, 7)):
        dense = other if isinstance(other, np.ndarray) else other.to_dense()
        assert np.abs(dense - expected).max() > 1e-3


def test_causal_problems_keep_their_alignment() -> None:
    problem = make_problem(8, 12, d=6, causal="bottom-right")
    ahat = sa.Compressed(6).approximate(problem)
    assert np.abs(ahat.to_dense() - dense_attention(problem)).max() <= 1e-12
    assert not sa.Compressed(2).approximate(problem).to_dense()[~problem.visible()].any()


def test_the_softmax_makes_rank_that_no_factorisation_has() -> None:
    # Independent normal Q and K, n = 512, d = 64: compressed logits of rank 32 are closer to A
    # than any matrix of rank 32, and from rank 64 on they are A.
    rng = np.random.default_rng(0)
    problem = sa.AttentionProblem(*(rng.standard_normal((512, 64)) for _ in range(3)))
    floor = error_of(problem, sa.SVDFloor(32))
    made = error_of(problem, sa.Compressed(32))
    assert made < 0.95 * floor
    assert abs(made - 0.504) <= 0.02  # published for one such head; heads differ by less
    assert error_of(problem, sa.Compressed(64)) <= 1e-12
    assert error_of(problem, sa.Compressed(128)) <= 1e-12
    # A projection that is blind to Q and K is far worse than both.
    assert error_of(problem, sa.Compressed(32, kind="gaussian")) > 2 * floor


def test_a_rank_beyond_the_width_is_reported() -> None:
    problem = make_problem(20, 20, d=6)
    for kind, used in (("svd", 6), ("pca_k", 6), ("srht", 8), ("gaussian", 15)):
        assert sa.Compressed(15, kind=kind).approximate(problem, 0).effective_rank == used
        assert sa.Compressed(15, kind=kind).width(6) == used
        assert sa.Compressed(4, kind=kind).approximate(problem, 0).effective_rank == 4
    few = make_problem(20, 20, d=6, key_mask=np.arange(20) < 3)
    assert sa.Compressed(15).approximate(few).effective_rank == 3


# --- any method inside --------------------------------------------------------------------------

INSIDE: list[sa.Method] = [
    sa.Nystromformer(5, "kmeans"),
    sa.Performer(5),
    sa.Skeinformer(5),
    sa.JL(5, sketch="countsketch"),
    sa.ColumnSampling(5, law="uniform"),
    sa.Linformer(5),
    sa.Informer(5, samples=4),
    sa.SVDFloor(5),
    sa.TopK(5),
]


@every_kind
@pytest.mark.parametrize("inner", INSIDE, ids=lambda x: str(x.name))
def test_a_method_inside_sees_the_compressed_problem(inner: sa.Method, kind: str) -> None:
    problem = make_problem(18, 18, d=6)
    method = sa.Compressed(5, inner, d_in=3, kind=kind)
    if kind in RANDOM_KINDS:
        first, rng = streams(np.random.default_rng(3), 2)
        small = compress_problem(problem, 3, kind, first)
    else:
        small, rng = compress_problem(problem, 3, kind), np.random.default_rng(3)
    expected = inner.approximate(small, deepcopy(rng))
    made = method.approximate(problem, rng=3)
    assert type(made) is type(expected)
    assert np.array_equal(made.to_dense(), expected.to_dense())
    assert (made.rank_bound, made.effective_rank) == (expected.rank_bound, expected.effective_rank)
    assert np.array_equal(method.attend(problem, 3), inner.attend(small, deepcopy(rng)))
    # The draw: that of the inner method, and the projection where there is one.
    draw = method.draw(problem, rng=3)
    inside = inner.draw(small, deepcopy(rng))
    assert set(draw) == set(inside) | ({"projection"} if kind in RANDOM_KINDS else set())
    assert all(np.array_equal(draw[name], x) for name, x in inside.items())
    again = method.approximate(problem, draw=draw)
    assert np.array_equal(again.to_dense(), expected.to_dense())
    assert np.array_equal(method.attend(problem, draw=draw), method.attend(problem, 3))
    # The whole problem gives another matrix.
    other = inner.approximate(problem, np.random.default_rng(3))
    assert not np.allclose(made.to_dense(), other.to_dense())


def test_the_whole_width_is_the_inner_method() -> None:
    problem = make_problem(24, 24, d=6)
    plain = sa.Nystromformer(6).approximate(problem).to_dense()
    made = sa.Compressed(6, "nystromformer", d_in=6).approximate(problem).to_dense()
    assert np.abs(made - plain).max() <= 1e-9 * np.abs(plain).max()
    less = sa.Compressed(6, "nystromformer", d_in=2).approximate(problem).to_dense()
    assert np.abs(less - plain).max() > 1e-2


def test_many_heads_are_compressed_one_by_one() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, 20, 6)) for _ in range(3))
    out = sa.attention(q, k, v, "compressed", rank=4, rng=0)
    for b in range(2):
        for h in range(3):
            problem = sa.AttentionProblem(q[b, h], k[b, h], v[b, h])
            assert np.array_equal(out[b, h], sa.Compressed(4).attend(problem))
    made = sa.attention(
        q, k, v, "compressed", rank=8, inner="nystromformer", d_in=3, kind="pca_k", rng=0
    )
    problem = sa.AttentionProblem(q[1, 2], k[1, 2], v[1, 2])
    expected = sa.Nystromformer(8).approximate(compress_problem(problem, 3, "pca_k")) @ v[1, 2]
    assert np.array_equal(made[1, 2], expected)
    draw = {"projection": draw_projection(6, 3, "gaussian", 0)}
    given = sa.attention(q, k, v, "compressed", rank=3, kind="gaussian", draw=draw)
    one = sa.Compressed(3, kind="gaussian").approximate(problem, draw=draw) @ v[1, 2]
    assert np.abs(given[1, 2] - one).max() <= 1e-13


def test_a_study_sweeps_it_by_name_and_as_an_object() -> None:
    heads = sa.make_heads("clustered", n=64, d=8, rng=0)
    methods: list[Any] = ["compressed", ("inside", sa.Compressed(1, sa.Nystromformer(1), d_in=4))]
    frame = sa.study(heads, methods=methods, ranks=[2, 4, 8], seeds=1, jobs=1).frame
    errors = frame[frame["method"] == "compressed"].groupby("rank")["matrix_fro_rel"].median()
    assert list(errors.index) == [2, 4, 8]
    assert errors[8] < 1e-5 < errors[4] < errors[2]
    inside = frame[frame["method"] == "inside"]
    assert sorted(inside["effective_rank"].unique()) == [2, 4, 8]


# --- parameters ---------------------------------------------------------------------------------


def test_parameters_are_nested() -> None:
    method = sa.Compressed(8, sa.Nystromformer(3, "kmeans", iterations=2), d_in=4)
    assert method.get_params()["inner__landmarks"] == "kmeans"
    copied = clone(method)
    assert copied.inner is not method.inner
    assert copied.get_params()["inner__iterations"] == 2
    copied.set_params(inner__iterations=5, rank=6)
    assert copied.method.get_params() == sa.Nystromformer(6, "kmeans", iterations=5).get_params()
    assert method.inner.get_params()["iterations"] == 2  # type: ignore[union-attr]  # a method
    assert "inner=Nystromformer(iterations=2, landmarks='kmeans', rank=3)" in repr(method)
    # The rank of an object inside is replaced, in it and not in what was handed in.
    assert method.method.get_params()["rank"] == 8
    assert method.inner.get_params()["rank"] == 3  # type: ignore[union-attr]  # a method


def test_traits_are_those_of_the_inner_method() -> None:
    plain = sa.Compressed(4).traits
    assert (plain.causal, plain.key_mask, plain.row_stochastic, plain.nonnegative) == (True,) * 4
    assert (plain.randomized, plain.uses_rank, plain.exact_at_full_rank) == (False, True, True)
    assert not plain.autoregressive  # it was fitted to later keys too
    drawn = sa.Compressed(4, kind="gaussian").traits
    assert (drawn.randomized, drawn.autoregressive, drawn.exact_at_full_rank) == (True, True, False)
    assert not sa.Compressed(4, kind="gaussian", center=True).traits.autoregressive
    inside = sa.Compressed(4, "nystromformer", d_in=2).traits
    assert (inside.causal, inside.row_stochastic, inside.nonnegative) == (False,) * 3
    assert (inside.key_mask, inside.randomized) == (True, False)
    assert sa.Compressed(4, "nystromformer", d_in=2, kind="srht").traits.randomized
    assert not sa.Compressed(4, "column_sampling", d_in=2).traits.exact_at_full_rank
    assert sa.Compressed(4, "svd", d_in=2).traits.oracle


REFUSED: list[tuple[sa.Method, type[Exception], str]] = [
    (
        sa.Compressed(4, "nystromformer"),
        ValueError,
        "d_in must be given with inner 'nystromformer', whose budget is rank, got None; pass the "
        "width after compression, in 1..d = 6",
    ),
    (
        sa.Compressed(4, d_in=2),
        ValueError,
        "d_in must be None with inner 'exact', for which rank is the width, got 2; drop it",
    ),
    (
        sa.Compressed(4, "jl", d_in=7),
        ValueError,
        "d_in must be between 1 and d = 6, got 7; change d_in for kind 'svd'",
    ),
    (
        sa.Compressed(4, "nystromfromer", d_in=2),
        ValueError,
        "method must be registered, got 'nystromfromer'; did you mean 'nystromformer'?",
    ),
    (
        sa.Compressed(4, sa.JL, d_in=2),  # type: ignore[arg-type]  # the point of the test
        TypeError,
        "inner must be a name or a method object, got ABCMeta; see sketchattn.methods()",
    ),
    (
        sa.Compressed(4, kind="pca"),
        ValueError,
        "kind must be one of svd, gaussian, srht, pca_k, got 'pca'; did you mean 'pca_k'?",
    ),
    (
        sa.Compressed(4, center="yes"),  # type: ignore[arg-type]  # the point of the test
        TypeError,
        "center must be a bool or None, got str; True subtracts the mean key, which no softmax "
        "sees",
    ),
    (
        sa.Compressed(4, sa.Nystromformer(4, iterations=-1), d_in=2),
        ValueError,
        "iterations must be at least 0, got -1; the paper takes 6",
    ),
    (
        sa.Compressed(4, sa.Nystromformer(4, np.zeros((2, 4, 6))), d_in=2),
        ValueError,
        "landmarks must have shape (2, r, d) = (2, 4, 2), got (2, 4, 6); landmark queries first, "
        "landmark keys second",
    ),
]


@pytest.mark.parametrize(("method", "error", "text"), REFUSED)
def test_parameters_that_do_not_fit_are_refused_before_any_work(
    method: sa.Method, error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sketchattn.zoo import compressed

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(compressed, "fit_compression", never)
    problem = make_problem(8, 8, d=6)
    for call in (method.check, method.draw, method.approximate, method.attend):
        with pytest.raises(error, match=message(text)):
            call(problem)


def test_projections_that_do_not_fit_are_refused() -> None:
    problem = make_problem(8, 8, d=6)
    method = sa.Compressed(3, kind="gaussian")
    good = method.draw(problem, 0)["projection"]
    assert good.shape == (6, 3)
    choices: list[tuple[Any, type[Exception], str]] = [
        (
            good[:5],
            ValueError,
            "projection must have shape (d, d_in) = (6, 3), got (5, 3); draw it for this width",
        ),
        (
            np.where(np.arange(3) == 1, np.nan, good),
            ValueError,
            "projection must be finite, got nan at index (0, 1); replace it, or hide its key with "
            "a mask",
        ),
        (
            good > 0,
            TypeError,
            "projection must be float16, bfloat16, float32 or float64, got bool; convert it with "
            "astype(np.float32)",
        ),
    ]
    for projection, error, text in choices:
        with pytest.raises(error, match=message(text)):
            method.approximate(problem, draw={"projection": projection})
    # Any projection that fits may be handed in.
    axes = np.eye(6)[:, :3]
    made = method.approximate(problem, draw={"projection": axes}).to_dense()
    cut = sa.AttentionProblem(problem.q[:, :3], problem.k[:, :3], scale=problem.scale)
    assert np.abs(made - dense_attention(cut)).max() <= 1e-14
    # A draw without it, or with an inner method that knows its own arrays.
    inside = sa.Compressed(3, "jl", d_in=2, kind="srht")
    drawn = inside.draw(problem, 0)
    with pytest.raises(ValueError, match="draw must hold the arrays"):
        inside.approximate(problem, draw={"sketch": drawn["sketch"]})
    with pytest.raises(ValueError, match="draw must hold the arrays"):
        inside.approximate(problem, draw={**drawn, "other": axes})


def test_the_inner_draw_does_not_depend_on_the_width() -> None:
    problem = make_problem(12, 12, d=6)
    draws = [
        sa.Compressed(5, "uniform", d_in=width, kind="gaussian").draw(problem, 0)
        for width in (2, 4)
    ]
    assert np.array_equal(draws[0]["columns"], draws[1]["columns"])
    first, second = (x["projection"] for x in draws)
    assert np.allclose(np.sqrt(2) * first, 2 * second[:, :2])
