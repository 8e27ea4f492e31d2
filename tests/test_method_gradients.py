"""Gradients of methods at a fixed draw: every one that promises them, against differences."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from method_cases import VARIANTS, MethodCase, dense_attention, make_problem, supports
from numpy.typing import NDArray

import sketchattn as sa

Array = NDArray[Any]
Vjp = Callable[[sa.AttentionProblem, Array, Mapping[str, Any]], tuple[Array, Array, Array]]

pytestmark = pytest.mark.usefixtures("one_thread")

# Parameters that change what is differentiated, beside those of the contract tests.
MORE: dict[str, list[dict[str, Any]]] = {
    "jl": [{"sketch": "sjlt", "sketch_options": {"s": 2}}],
    "column_sampling": [{"law": "pilot", "pilots": 3, "mix": 0.2}],
    "clustered": [{"improved": True, "top_keys": 40}],
    "combiner": [
        {"key": "mean", "bias": "log_count", "reference": "region_mean"},
        {"reference": "region_max", "second_order": "diag", "direct": "none"},
        {"reference": "mass_weighted(2, 64)"},
        {"reference": "mass_weighted", "direct": "own+top_mass(1)+window(1)"},
        {"pattern": "axial_rowmajor", "reference": "column"},
        {"pattern": "axial_horizontal", "split": True},
        {"pattern": "logsparse", "reference": "region_mean"},
        {"pattern": ("fixed", "logsparse"), "weights": (0.3, 0.7)},
    ],
    "dba": [
        {"preset": "softmax_interp"},
        {"landmarks": "segment_means", "pack": "mean", "core": "softmax_logcount"},
        {"landmarks": "segment_means", "pack": "mean", "unpack": "softmax_keys"},
        {"landmarks": "segment_means", "unpack": "softmax", "hidden": "srht", "d_in": 3},
        {"landmarks": "kmeans", "unpack": "lsq", "ridge": 0.1},
        {"pack": "mean", "unpack": "lsq", "hidden": "gaussian", "d_in": 9},
        {"preset": "nystrom", "iterations": None, "ridge": 1e-2},
    ],
    "linformer": [
        {"projection": "srht", "sharing": "kv"},
        {"projection": "gaussian", "scale": "none"},
        {"init": "fairseq"},
        {"projection": "mean_pool", "block_bias": False},
        {"projection": "mean_pool", "scale": "none"},
        {"projection": "max_pool"},
    ],
    "nystromformer": [
        {"iterations": 0},
        {"iterations": 14},
        {"iterations": None},
        {"landmarks": "random", "iterations": None, "rcond": 0.3},
        {"preset": "original", "renormalize": True},
        {"convolution": [0.5, -1.0, 2.0]},
    ],
    "performer": [
        {"features": "hyperbolic", "orthogonal": False},
        {"preset": "performer-pytorch"},
        {"eps": 0.1, "center_keys": True},
    ],
    "skeinformer": [
        {"fill": "arithmetic"},
        {"fill": "oracle", "causal_form": "corrected"},
        {"law": "uniform", "weights": "importance", "normalizer": "sampled"},
        {"preset": "exact_normalizer"},
        {"law": "uniform", "pilot_reuse": False, "causal_form": "corrected"},
    ],
}


def gradient_cases() -> list[MethodCase]:
    """Return every method, by its defaults and variants, that promises a gradient."""
    cases = [
        MethodCase(name, options)
        for name in sa.methods()
        for options in ({}, *VARIANTS.get(name, []), *MORE.get(name, []))
    ]
    return [case for case in cases if case.traits.differentiable]


CASES = gradient_cases()
every_case = pytest.mark.parametrize("case", CASES, ids=map(str, CASES))

# Sizes that no tile, block or span divides; d = 4 and d_v = 3.
KINDS: dict[str, dict[str, Any]] = {
    "square": {"n_q": 13, "n_k": 13},
    "rectangular": {"n_q": 9, "n_k": 14},
    "tall": {"n_q": 15, "n_k": 11},
    "masked": {"n_q": 13, "n_k": 13, "key_mask": np.arange(13) % 4 != 1},
    "causal": {"n_q": 13, "n_k": 13, "causal": True},
    "causal and masked": {
        "n_q": 13,
        "n_k": 13,
        "causal": True,
        "key_mask": np.arange(13) > 1,  # two rows see nothing
    },
    "bottom-right": {"n_q": 15, "n_k": 11, "causal": "bottom-right"},  # four rows see nothing
    "top-left": {"n_q": 9, "n_k": 14, "causal": "top-left"},
}
RANK = 5

# Differences of fourth order: what is left out is h^4 / 30 times a fifth derivative, and with
# logits up to 10 that of a weight is 10^5 at most, together below 1e-15; rounding of the output
# divided by the step, a few u |G| |O| / h, is 3e-11.  Small inverses have larger derivatives and
# more rounding, for which the relative term has room.  The step is so small that maxima rarely
# change places in it.
STEP = 2e-5
RELATIVE, ABSOLUTE = 1e-7, 1e-10


def moved(problem: sa.AttentionProblem, label: str, change: Array) -> sa.AttentionProblem:
    """Return a problem with one of its arrays moved."""
    arrays: dict[str, Any] = dict(zip("qkv", problem.arrays, strict=True))
    arrays[label] = arrays[label] + change
    return sa.AttentionProblem(
        **arrays, scale=problem.scale, causal=problem.causal, key_mask=problem.key_mask
    )


def slope(f: Callable[[float], float], h: float) -> float:
    """Return the derivative of f at zero, of fourth order in h."""
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


def library_vjp(method: sa.Method) -> Vjp:
    return lambda problem, g, draw: method.vjp(problem, g, draw=draw)


def wrong_slopes(
    method: sa.Method,
    problem: sa.AttentionProblem,
    draw: Mapping[str, Any],
    vjp: Vjp,
    *,
    directions: int = 2,
) -> list[str]:
    """Return where a gradient differs from differences of `attend` at the same draw."""
    rng = np.random.default_rng(1)
    out = method.attend(problem, draw=draw)
    g = rng.standard_normal(out.shape)
    found = vjp(problem, g, draw)
    wrong = []
    size = float(np.linalg.norm(g) * np.linalg.norm(out))
    for label, gradient in zip("qkv", found, strict=True):
        shape = getattr(problem, label).shape
        assert gradient.shape == shape
        for _ in range(directions):
            u = rng.standard_normal(shape)

            def f(h: float, label: str = label, u: Array = u) -> float:
                return float(np.sum(g * method.attend(moved(problem, label, h * u), draw=draw)))

            expected, made = slope(f, STEP), float(np.sum(gradient * u))
            allowed = RELATIVE * float(np.linalg.norm(gradient) * np.linalg.norm(u))
            if not abs(made - expected) <= allowed + ABSOLUTE * size:
                wrong.append(f"d{label}: {made:.12g} is not {expected:.12g}")
    return wrong


# --- against differences --------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_program(case: MethodCase, kind: str) -> None:
    problem = make_problem(**KINDS[kind])
    if not supports(case, problem):
        with pytest.raises(ValueError, match="must be"):
            case(RANK).vjp(problem, np.zeros((problem.n_q, 3)), rng=0)
        return
    method = case(RANK)
    draw = method.draw(problem, rng=3)
    assert wrong_slopes(method, problem, draw, library_vjp(method)) == []
    if problem.key_mask is not None:
        _, dk, dv = method.vjp(problem, np.ones((problem.n_q, 3)), draw=draw)
        assert not dk[~problem.key_mask].any()
        assert not dv[~problem.key_mask].any()


@every_case
def test_the_gradient_is_linear_in_the_cotangent(case: MethodCase) -> None:
    problem = make_problem(13, 13)
    method = case(RANK)
    draw = method.draw(problem, rng=0)
    rng = np.random.default_rng(2)
    one, two = (rng.standard_normal((13, 3)) for _ in range(2))
    both = method.vjp(problem, 2 * one - 3 * two, draw=draw)
    parts = method.vjp(problem, one, draw=draw), method.vjp(problem, two, draw=draw)
    for made, first, second in zip(both, *parts, strict=True):
        size = np.linalg.norm(first) + np.linalg.norm(second)
        assert np.linalg.norm(made - (2 * first - 3 * second)) <= 1e-12 * size
    assert not any(x.any() for x in method.vjp(problem, np.zeros((13, 3)), draw=draw))


@every_case
def test_float32_has_the_gradient_of_the_same_numbers(case: MethodCase) -> None:
    problem = make_problem(13, 13, np.float32)
    method = case(RANK)
    draw = method.draw(problem, rng=0)
    g = np.random.default_rng(1).standard_normal((13, 3)).astype(np.float32)
    found = method.vjp(problem, g, draw=draw)
    wide = method.vjp(problem.astype(np.float64), g.astype(np.float64), draw=draw)
    for made, expected, x in zip(found, wide, problem.arrays, strict=True):
        assert made.dtype == np.float32
        assert x is not None
        assert made.shape == x.shape
        # Rounded once.
        assert np.abs(made - expected).max() <= 2.0**-24 * np.abs(expected).max()
    # The same bits again, from an rng that makes the draw.
    for first, second in zip(found, method.vjp(problem, g, rng=0), strict=True):
        assert np.array_equal(first, second)


# name: problem, rank
EDGES = {
    "no query": (make_problem(0, 6), 3),
    "no key in sight": (make_problem(6, 6, key_mask=np.zeros(6, bool)), 3),
    "one of each": (make_problem(1, 1), 1),
    "one key in sight": (make_problem(5, 5, key_mask=np.arange(5) == 3), 3),
    "equal logits": (make_problem(9, 9, scale=0.0), 3),
    "negative scale": (make_problem(9, 9, scale=-0.7), 3),
}


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge: str) -> None:
    problem, rank = EDGES[edge]
    for name in sa.methods():
        method = MethodCase(name)(rank)
        if not (method.traits.differentiable and supports(MethodCase(name), problem)):
            continue
        draw = method.draw(problem, rng=0)
        with np.errstate(all="raise"):
            found = method.vjp(problem, np.ones((problem.n_q, 3)), draw=draw)
        assert [x.shape for x in found] == [x.shape for x in (problem.q, problem.k, problem.values)]
        assert wrong_slopes(method, problem, draw, library_vjp(method), directions=1) == [], name


@every_case
def test_steep_logits_have_finite_gradients(case: MethodCase) -> None:
    q, k, v = make_problem(9, 9).arrays
    problem = sa.AttentionProblem(1e6 * q, k, v)
    for x in case(3).vjp(problem, np.ones((9, 3)), rng=0):
        assert np.isfinite(x).all()


@pytest.mark.threads
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    from sketchattn.kernels._threads import limit_threads

    problem = make_problem(300, 300, d=40)
    g = np.random.default_rng(0).standard_normal((300, 3))
    for case in CASES:
        if case.options and case.name not in ("performer", "combiner", "clustered"):
            continue
        method = case(20)
        draw = method.draw(problem, rng=0)
        with limit_threads(1):
            one = method.vjp(problem, g, draw=draw)
        for x, y in zip(one, method.vjp(problem, g, draw=draw), strict=True):
            assert np.array_equal(x, y), case


# --- parts that need sizes of their own -----------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_convolutions_of_keys_and_values(axes: int) -> None:
    rng = np.random.default_rng(0)
    e, f = (rng.standard_normal((3, m, m)[:axes]) for m in (4, 3))
    for keep in (None, np.arange(12) % 5 != 2):
        problem = make_problem(7, 12, key_mask=keep)
        method = sa.Linformer(4, "conv", E=e, F=f)
        assert wrong_slopes(method, problem, {}, library_vjp(method)) == []


def test_matrices_that_are_given_and_averaged() -> None:
    e, f = np.random.default_rng(0).standard_normal((2, 4, 14))
    problem = make_problem(7, 12, key_mask=np.arange(12) % 5 != 2)
    method = sa.Linformer(4, "given", E=e, F=f, scale="average")
    assert wrong_slopes(method, problem, {}, library_vjp(method)) == []


def test_plans_of_causal_problems() -> None:
    problem = make_problem(13, 13, causal=True)
    choices: list[dict[str, Any]] = [
        {"pattern": "axial_joint", "reference": "region_max", "key": "max", "bias": "none"},
        {"reference": "mass_weighted(1, 64)", "allow_leak": True, "direct": "own+top_mass(2)"},
        {"pattern": "routing", "allow_leak": True, "reference": "region_mean"},
    ]
    for options in choices:
        method = sa.Combiner(rank=3, **options)
        draw = method.draw(problem, rng=1)
        assert wrong_slopes(method, problem, draw, library_vjp(method)) == [], options


def test_regions_and_slots_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sketchattn.operators.partitioned.pullback.LISTED", 40)
    monkeypatch.setattr("sketchattn.operators.pullback.PAIR_ENTRIES", 50)
    problem = make_problem(30, 30)
    method = sa.Combiner("axial_vertical", block=5, reference="region_mean")
    assert wrong_slopes(method, problem, {}, library_vjp(method)) == []


def test_many_keys_and_a_tile_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sketchattn.operators.pullback.TILE_ENTRIES", 64)
    monkeypatch.setattr("sketchattn.operators.pullback.LEAST_ROWS", 3)
    for method in (sa.Exact(), sa.Skeinformer(5, causal_form="corrected")):
        problem = make_problem(40, 40, causal=True)
        draw = method.draw(problem, rng=0)
        assert wrong_slopes(method, problem, draw, library_vjp(method), directions=1) == []


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3)])
@pytest.mark.parametrize(("ridge", "cut"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.3), (0.1, 0.3)])
def test_inverses_by_singular_values(shape: tuple[int, int], ridge: float, cut: float) -> None:
    from sketchattn.zoo.nystromformer.gradient import inverse_pullback

    rng = np.random.default_rng(1)
    u, w = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in shape)
    s = np.array([3.0, 2.0, 2.0 - 1e-3, 0.5])[: min(shape)]
    m = (u[:, : len(s)] * s) @ w[: len(s)]
    g, e = rng.standard_normal(shape[::-1]), rng.standard_normal(shape)

    def f(h: float) -> float:
        p, s, wt = np.linalg.svd(m + h * e, full_matrices=False)
        gain = np.where(s > cut * s[0], s / (s**2 + ridge * s[0] ** 2), 0)
        return float(np.sum(g * ((wt.T * gain) @ p.T)))

    made = float(np.sum(inverse_pullback(m, ridge, cut, g) * e))
    assert abs(made - slope(f, STEP)) <= 1e-8 * abs(made)


# --- negative controls ----------------------------------------------------------------------------


def dense_vjp(*, sign: float = 1.0, normalised: bool = True) -> Vjp:
    """Return the gradient of exact attention by the plain formula, or with a part left out."""

    def vjp(
        problem: sa.AttentionProblem, g: Array, draw: Mapping[str, Any]
    ) -> tuple[Array, Array, Array]:
        a = dense_attention(problem)
        change = g @ problem.values.T
        if normalised:
            change = change - np.sum(a * change, axis=1, keepdims=True)
        change = problem.scale * a * change
        return sign * change @ problem.k, change.T @ problem.q, a.T @ g

    return vjp


def test_differences_see_a_wrong_sign_and_a_missing_normaliser() -> None:
    problem, method = make_problem(13, 13, causal=True), sa.Exact()
    assert wrong_slopes(method, problem, {}, dense_vjp()) == []
    seen = [x[:2] for x in wrong_slopes(method, problem, {}, dense_vjp(sign=-1.0))]
    assert seen == ["dq", "dq"]
    seen = [x[:2] for x in wrong_slopes(method, problem, {}, dense_vjp(normalised=False))]
    assert seen == ["dq", "dq", "dk", "dk"]


# --- arguments ------------------------------------------------------------------------------------


def message(text: str) -> str:
    return f"^{re.escape(text)}$"


def test_what_has_no_gradient_is_refused() -> None:
    text = (
        "method must be differentiable at a fixed draw for its vjp, got TopK(rank=3); use a "
        "method whose traits.differentiable is True"
    )
    problem = make_problem(6, 6)
    assert not sa.TopK(3).traits.differentiable
    with pytest.raises(ValueError, match=message(text)):
        sa.TopK(3).vjp(problem, np.zeros((6, 3)))


def test_cotangents_that_do_not_fit_are_refused() -> None:
    problem, method = make_problem(6, 7), sa.UniformColumns(3)
    text = (
        "cotangent must have shape (n_q, d_v) = (6, 3), got (6, 4); give one weight for each "
        "entry of the output"
    )
    with pytest.raises(ValueError, match=message(text)):
        method.vjp(problem, np.zeros((6, 4)), rng=0)
    with pytest.raises(TypeError, match=r"^cotangent must "):
        method.vjp(problem, np.zeros((6, 3), int), rng=0)
    g = np.zeros((6, 3))
    g[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"^cotangent must be finite, got nan at index \(2, 1\)"):
        method.vjp(problem, g, rng=0)
    bare = sa.AttentionProblem(problem.q, problem.k)
    with pytest.raises(ValueError, match="^v must be given for an output"):
        method.vjp(bare, np.zeros((6, 3)), rng=0)
    with pytest.raises(TypeError, match="^problem must be an AttentionProblem"):
        method.vjp(np.eye(3), np.zeros((6, 3)), rng=0)  # type: ignore[arg-type]
    draw = method.draw(problem, rng=0)
    with pytest.raises(ValueError, match="^rng must be None when draw is given"):
        method.vjp(problem, np.zeros((6, 3)), rng=0, draw=draw)
