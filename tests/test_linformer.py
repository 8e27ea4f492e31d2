from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from method_cases import rounding
from naive import naive_attention
from numpy.typing import NDArray
from scipy.linalg import qr
from scipy.special import softmax

import sketchattn as sa
from sketchattn.sketches.base import sketches
from sketchattn.theory.engine.instances import spiked_attention
from sketchattn.zoo.linformer.fit import oracle_floor
from sketchattn.zoo.linformer.initialisations import INITIALISATIONS, initialise
from sketchattn.zoo.linformer.projections import ReducedAttention, pool_starts
from sketchattn.zoo.linformer.stack import rank_schedule

Array = NDArray[Any]
LINEAR = [*sketches(), "mean_pool"]


def random_head(
    n_q: int = 20, n_k: int = 32, d: int = 6, d_v: int = 5, seed: int = 0, **options: Any
) -> sa.AttentionProblem:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(s) for s in ((n_q, d), (n_k, d), (n_k, d_v)))
    return sa.AttentionProblem(q, k, v, **options)


def given(e: Array, f: Array | None = None, **options: Any) -> sa.Linformer:
    return sa.Linformer(len(e), "given", E=e, F=f, **options)


def dense_form(problem: sa.AttentionProblem, e: Array, f: Array) -> tuple[Array, Array]:
    """Return W = rowsoftmax(L E^T) from dense logits, and W F."""
    logits = problem.scale * problem.q @ problem.k.T
    weights: Array = softmax(logits @ e.T, axis=1)
    return weights, weights @ f


def relative(ahat: Any, problem: sa.AttentionProblem) -> float:
    error = ahat @ problem.values - problem.output
    return float(np.linalg.norm(error) / np.linalg.norm(problem.output))


# --- definition -----------------------------------------------------------------------------


@pytest.mark.parametrize("projection", LINEAR)
def test_definition(projection: str) -> None:
    problem = random_head()
    method = sa.Linformer(8, projection)
    ahat = method.approximate(problem, 3)
    assert isinstance(ahat, ReducedAttention)
    f = ahat.projection.to_dense(np.float64)
    # E is drawn first: with the same draw and sharing it is the F of another call.
    shared = sa.Linformer(8, projection, sharing="kv").approximate(problem, 3)
    assert isinstance(shared, ReducedAttention)
    e = shared.projection.to_dense(np.float64)
    weights, matrix = dense_form(problem, e, f)
    # Dot products of 32 terms of size 10 in float64, and one exponential.
    assert np.abs(ahat.weights - weights).max() < 1e-12
    assert np.abs(ahat.to_dense() - matrix).max() < 1e-12
    y = np.cos(np.arange(40.0)).reshape(20, 2)
    assert np.abs(ahat @ problem.values - matrix @ problem.values).max() < 1e-12
    assert np.abs(ahat.T @ y - matrix.T @ y).max() < 1e-12
    assert np.abs(ahat.row_sums() - matrix.sum(axis=1)).max() < 1e-12
    assert np.abs(ahat.factored().to_dense() - matrix).max() < 1e-12
    assert ahat.rank_bound == 8
    assert np.array_equal(
        method.approximate(problem, draw=method.draw(problem, 3)).to_dense(), ahat.to_dense()
    )
    same = np.array_equal(e, f)
    assert same == (projection == "mean_pool")  # F has a stream of its own


def test_batches_and_heads() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, *s)) for s in ((7, 4), (16, 4), (16, 5)))
    e, f = rng.standard_normal((2, 8, 16))
    out = sa.attention(q, k, v, given(e, f))
    for index in np.ndindex(2, 3):
        problem = sa.AttentionProblem(q[index], k[index], v[index])
        want = dense_form(problem, e, f)[1] @ v[index]
        assert np.abs(out[index] - want).max() < 1e-11


def test_float32_agrees_with_its_wide_twin() -> None:
    problem = random_head(n_q=64, n_k=96).astype(np.float32)
    for projection in LINEAR:
        ahat = sa.Linformer(16, projection).approximate(problem, 0)
        wide = ahat.wide()
        assert ahat.dtype == np.float32
        assert wide.dtype == np.float64
        # Logits up to 30, rounded at 6e-8 after sums of 96 terms.
        size = np.abs(wide.to_dense()).max()
        assert np.abs(ahat.to_dense() - wide.to_dense()).max() < 1e-3 * size


# --- full rank --------------------------------------------------------------------------------


def test_full_rank() -> None:
    problem = random_head(64, 64, 64, 64)
    order = np.random.default_rng(1).permutation(64)
    for e in (np.eye(64), np.eye(64)[order]):
        assert np.abs(given(e).approximate(problem).to_dense() - problem.exact.to_dense()).max() < (
            1e-12
        )
    mean = sa.Linformer(64, "mean_pool").approximate(problem)
    assert np.abs(mean.to_dense() - problem.exact.to_dense()).max() < 1e-12
    # An isometry is not enough: the softmax does not commute with rotations.
    rotation = qr(np.random.default_rng(2).standard_normal((64, 64)))[0]
    assert np.abs(rotation.T @ rotation - np.eye(64)).max() < 1e-13
    assert relative(given(rotation).approximate(problem), problem) > 0.5


# --- pooling -----------------------------------------------------------------------------------


def blocks_head(counts: list[int], seed: int = 0, **options: Any) -> sa.AttentionProblem:
    rng = np.random.default_rng(seed)
    k = np.repeat(rng.standard_normal((len(counts), 6)), counts, axis=0)
    q, v = rng.standard_normal((20, 6)), rng.standard_normal((len(k), 5))
    return sa.AttentionProblem(q, k, v, **options)


def test_pooling_is_exact_for_constant_blocks() -> None:
    problem = blocks_head([4] * 8)
    ahat = sa.Linformer(8, "mean_pool").approximate(problem)
    assert np.abs(ahat @ problem.values - problem.output).max() < 1e-12


def test_pooling_with_uneven_counts_needs_the_bias() -> None:
    # Blocks of 7 positions, of which 1, 7, 3, ... are not masked.
    counts = [1, 7, 3, 5, 4, 4, 6, 2]
    keep = np.concatenate([np.arange(7) < c for c in counts])
    problem = blocks_head([7] * 8, key_mask=keep)
    exact = problem.output
    for bias, right in ((None, True), (True, True), (False, False)):
        ahat = sa.Linformer(8, "mean_pool", block_bias=bias).approximate(problem)
        error = float(np.abs(ahat @ problem.values - exact).max())
        assert error < 1e-12 if right else error > 1e-3
    # 7 keys in 3 blocks of 2, 2 and 3.
    problem = blocks_head([2, 2, 3])
    ahat = sa.Linformer(3, "mean_pool").approximate(problem)
    assert np.abs(ahat @ problem.values - problem.output).max() < 1e-12


def test_empty_blocks_are_hidden() -> None:
    keep = np.ones(32, bool)
    keep[4:8] = False
    problem = blocks_head([4] * 8, key_mask=keep)
    for projection in ("mean_pool", "max_pool"):
        method = sa.Linformer(8, projection)
        out = method.attend(problem)
        if projection == "mean_pool":
            assert np.abs(out - problem.output).max() < 1e-12
        short = sa.AttentionProblem(problem.q, problem.k[keep], problem.values[keep])
        want = sa.Linformer(7, projection).attend(short)
        assert np.abs(out - want).max() < 1e-12


def test_max_pool_and_convolution_by_channel() -> None:
    problem = random_head(10, 12, 6, 6)
    weights = {
        1: np.array([0.5, 0.25, -0.5]),
        2: np.random.default_rng(0).standard_normal((3, 6)),
        3: np.random.default_rng(0).standard_normal((3, 6, 6)),
    }

    def compress(x: Array, form: int) -> Array:
        out = np.zeros((4, 6))
        for b in range(4):
            block = x[3 * b : 3 * b + 3]
            if form == 0:
                out[b] = block.max(axis=0)
            for t in range(3 if form else 0):
                w = weights[form][t]
                out[b] += block[t] @ w if form == 3 else block[t] * w
        return out

    for form in range(4):
        method = sa.Linformer(4, "conv", E=weights[form]) if form else sa.Linformer(4, "max_pool")
        k, v = compress(problem.k, form), compress(problem.values, form)
        want = softmax(problem.scale * problem.q @ k.T, axis=1) @ v
        assert np.abs(method.attend(problem) - want).max() < 1e-12
        assert method.is_linear == (form == 1)
        if form != 1:
            with pytest.raises(ValueError, match=r"^projection must be linear for a matrix"):
                method.approximate(problem)
    mixed = sa.Linformer(4, "conv", E=weights[3], F=weights[1])
    assert mixed.is_linear
    want = softmax(problem.scale * problem.q @ compress(problem.k, 3).T, axis=1) @ compress(
        problem.values, 1
    )
    assert np.abs(mixed.approximate(problem) @ problem.values - want).max() < 1e-12


def naive_compressed(x: Array, r: int, keep: Array, weights: Array | None) -> Array:
    """Return r rows by loops: the maximum of a block without weights, otherwise a convolution."""
    m = len(x) // r
    out = np.zeros((r, x.shape[1]))
    for b in range(r):
        seen = [j for j in range(b * m, (b + 1) * m) if keep[j]]
        for c in range(x.shape[1]):
            if weights is None:
                out[b, c] = max((float(x[j, c]) for j in seen), default=0.0)
                continue
            for j in seen:
                w = weights[j - b * m]
                if weights.ndim == 3:
                    out[b, c] += sum(float(x[j, i]) * float(w[i, c]) for i in range(x.shape[1]))
                else:
                    out[b, c] += float(x[j, c]) * float(w if weights.ndim == 1 else w[c])
    return out


def naive_linformer(
    q: Array, k: Array, v: Array, r: int, keep: Array, e: Array | None, f: Array | None
) -> Array:
    """Return the output of one head by loops; blocks without a key are hidden."""
    blocks = np.array([block.any() for block in keep.reshape(r, -1)])
    pooled = naive_compressed(k, r, keep, e), naive_compressed(v, r, keep, e if f is None else f)
    scale = 1 / math.sqrt(q.shape[1])
    return naive_attention(q, *pooled, scale=scale, key_mask=blocks)[1]


def nonlinear(d: int = 4, d_v: int = 4) -> dict[str, sa.Linformer]:
    rng = np.random.default_rng(5)
    by_channel, mixing = rng.standard_normal((3, d)), rng.standard_normal((3, d, d))
    wide = rng.standard_normal((3, d_v, d_v))
    return {
        "max": sa.Linformer(4, "max_pool"),
        "channel": sa.Linformer(4, "conv", E=by_channel),
        "mixing": sa.Linformer(4, "conv", E=mixing),
        "plain keys": sa.Linformer(4, "conv", E=rng.standard_normal(3), F=wide),
    }


@pytest.mark.parametrize("case", nonlinear())
@pytest.mark.parametrize("masked", [False, True])
def test_attention_without_a_matrix(case: str, masked: bool) -> None:
    method = nonlinear()[case]
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((2, h, *s)) for h, s in ((4, (5, 4)), (2, (12, 4)), (2, (12, 4)))
    )
    keep = np.ones((2, 12), bool)
    if masked:
        keep[0, [0, 4, 5]] = False
        keep[1, 3:6] = False  # a whole block
    options: dict[str, Any] = {"enable_gqa": True, "key_mask": keep if masked else None}
    out = sa.attention(q, k, v, method, **options)
    assert out.shape == (2, 4, 5, 4)
    e, f = (None if x is None else np.asarray(x) for x in (method.E, method.F))
    for b, h in np.ndindex(2, 4):
        want = naive_linformer(q[b, h], k[b, h // 2], v[b, h // 2], 4, keep[b], e, f)
        # Logits up to 30 of float64 sums of 50 terms, and one exponential.
        assert np.abs(out[b, h] - want).max() < 1e-11
    # A head alone is the method's own call, and float32 the same numbers rounded.
    one = sa.attention(q[0, 0], k[0, 0], v[0, 0], method)
    problem = sa.AttentionProblem(q[0, 0], k[0, 0], v[0, 0])
    assert np.array_equal(one, method.attend(problem))
    assert np.array_equal(one, sa.attention(q[0, 0], k[0, 0], v[0, 0], method, draw={}))
    q32, k32, v32 = (x.astype(np.float32) for x in (q, k, v))
    short = sa.attention(q32, k32, v32, method, **options)
    assert short.dtype == np.float32
    assert np.abs(short - out).max() < 1e-3 * np.abs(out).max()


def test_attention_takes_maxima_by_name() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((3, n, 4)) for n in (5, 12, 12))
    out = sa.attention(q, k, v, "linformer", rank=4, projection="max_pool")
    want = naive_linformer(q[2], k[2], v[2], 4, np.ones(12, bool), None, None)
    assert np.abs(out[2] - want).max() < 1e-12
    # The comparison tells maxima from means.
    means = sa.attention(q, k, v, "linformer", rank=4, projection="mean_pool")
    assert np.abs(means[2] - want).max() > 1e-2
    with pytest.raises(ValueError, match=r"^causal must be False for method 'linformer'"):
        sa.attention(q, k[:, :5], v[:, :5], "linformer", rank=5, projection="max_pool", causal=True)


def test_traits_say_where_there_is_no_matrix() -> None:
    for method in nonlinear().values():
        assert not method.traits.matrix
        with pytest.raises(ValueError, match=r"^projection must be linear for a matrix"):
            method.approximate(random_head(5, 12, 4, 4))
    linear = [sa.Linformer(4, x) for x in LINEAR]
    linear += [
        sa.Linformer(4, "conv", E=np.ones(3)),
        sa.Linformer(4, "conv", E=np.ones((3, 4)), F=np.ones(3)),
        sa.Linformer(4, "conv"),  # refused for another reason, which its check gives
    ]
    assert all(method.traits.matrix for method in linear)
    for cls in sa.methods().values():
        known = cls._get_param_names()
        assert cls(**({"rank": 2} if "rank" in known else {})).traits.matrix
    problem = random_head(5, 12, 4, 4)
    with pytest.raises(ValueError, match="^rng must be None when draw is given"):
        sa.Linformer(4, "max_pool").attend(problem, 0, draw={})
    with pytest.raises(ValueError, match="^draw must hold"):
        sa.Linformer(4, "max_pool").attend(problem, draw={"E": np.eye(4, 12)})


@pytest.mark.parametrize("name", sorted(sa.methods()))
def test_attend_is_the_product_with_the_values(name: str) -> None:
    problem = random_head(12, 12)
    cls = sa.methods()[name]
    method = cls(**({"rank": 4} if "rank" in cls._get_param_names() else {}))
    want = method.approximate(problem, 3) @ problem.values
    out = method.attend(problem, 3)
    # A method may have a faster way than through its matrix; then it rounds differently.
    shorter = ("_attend", "_run", "_attend_with_lse")
    plain = all(getattr(cls, x) is getattr(sa.Method, x) for x in shorter)
    allowed = 0.0 if plain else rounding(problem)
    assert np.abs(out - want).max() <= allowed * np.linalg.norm(want)
    assert np.array_equal(method.attend(problem, draw=method.draw(problem, 3)), out)
    bare = sa.AttentionProblem(problem.q, problem.k)
    with pytest.raises(ValueError, match="^v must be given"):
        method.attend(bare, 3)


# --- invariants ---------------------------------------------------------------------------------


def test_invariants_hold_for_means_and_fail_for_gaussian_projections() -> None:
    problem = random_head()
    q, k, v = problem.q, problem.k, problem.values
    shift_k, shift_v = np.cos(np.arange(6.0)), np.sin(np.arange(5.0)) + 2
    for projection, holds in (("mean_pool", True), ("gaussian", False)):
        method = sa.Linformer(8, projection)

        def out(q: Array, k: Array, v: Array, method: sa.Linformer = method) -> Array:
            return method.attend(sa.AttentionProblem(q, k, v), 0)

        base = out(q, k, v)
        differences = (
            out(q, k + shift_k, v) - base,
            out(q, k, v + shift_v) - (base + shift_v),
            out(q, k, np.ones((32, 1)) * shift_v) - shift_v,
        )
        for difference in differences:
            size = np.abs(difference).max()
            assert size < 1e-12 if holds else size > 1e-2
        order = np.random.default_rng(0).permutation(20)
        assert np.abs(out(q[order], k, v) - base[order]).max() < 1e-12
        # Rows are convex combinations of the rows of F V.
        ahat = method.approximate(problem, 0)
        assert isinstance(ahat, ReducedAttention)
        values = ahat.projection.apply(np.ascontiguousarray(v))
        assert (base <= values.max(axis=0) + 1e-12).all()
        assert (base >= values.min(axis=0) - 1e-12).all()
        order = np.random.default_rng(1).permutation(32)
        assert np.abs(out(q, k[order], v[order]) - base).max() > 1e-2  # keys are not a set


@pytest.mark.parametrize("projection", LINEAR)
def test_rank_floor(projection: str) -> None:
    q, k, v = random_head(64, 64).arrays
    spiked = sa.AttentionProblem(np.eye(64), 5.0 * np.eye(64), np.eye(64), scale=1.0)
    assert np.abs(spiked.exact.to_dense() - spiked_attention(64, 5.0)).max() < 1e-13
    for problem in (sa.AttentionProblem(q, k, v), spiked):
        sigma = np.linalg.svd(problem.exact.to_dense(), compute_uv=False)
        error = sa.Linformer(16, projection).approximate(problem, 0).to_dense()
        error = error - problem.exact.to_dense()
        assert np.linalg.norm(error) >= np.linalg.norm(sigma[16:]) - 1e-10
        assert np.linalg.norm(error, 2) >= sigma[16] - 1e-10
    assert abs(sigma[1] - 0.697275) < 1e-6
    assert abs(np.linalg.norm(sigma[16:]) - 4.830864) < 1e-6


# --- oracle and fits ----------------------------------------------------------------------------


def test_oracle() -> None:
    problem = random_head(40, 32)
    rng = np.random.default_rng(3)
    e = rng.standard_normal((8, 32)) / 4
    ahat = given(e).approximate(problem)
    assert isinstance(ahat, ReducedAttention)
    weights = ahat.weights
    floor = oracle_floor(weights, problem.output)
    projector = weights @ np.linalg.pinv(weights)
    want = np.linalg.norm(problem.output - projector @ problem.output)
    assert abs(floor.error - want) < 1e-8
    best = np.linalg.pinv(weights) @ problem.output @ np.linalg.pinv(problem.values)
    error = np.linalg.norm(given(e, best).approximate(problem) @ problem.values - problem.output)
    assert abs(error - floor.error) < 1e-8
    for _ in range(5):
        f = best + 0.01 * rng.standard_normal((8, 32))
        worse = np.linalg.norm(given(e, f).approximate(problem) @ problem.values - problem.output)
        assert worse >= floor.error - 1e-10


def test_fits_order_the_errors() -> None:
    heads = [sa.make_heads("clustered", n=48, d=8, rng=i)[0] for i in range(2)]
    problem = heads[0]
    low = sa.fit_linformer(problem, 8, "low-rank")
    fit = sa.fit_linformer(problem, 8)
    random = [relative(sa.Linformer(8).approximate(problem, s), problem) for s in range(5)]
    assert fit.errors[0] <= low.errors[0] + 1e-12
    assert low.errors[0] < min(random)
    assert all(b <= a for a, b in zip(fit.history, fit.history[1:], strict=False))
    wide = problem.astype(np.float64)
    assert abs(relative(fit.method().approximate(wide), wide) - fit.errors[0]) < 1e-9
    assert fit.errors[0] >= fit.floors[0] - 1e-12
    # More iterations never hurt, and a joint fit cannot beat the fits of single heads' floors.
    assert sa.fit_linformer(problem, 8, iterations=0).history[0] >= fit.history[-1]
    joint = sa.fit_linformer(heads, 8, iterations=1)
    assert len(joint.errors) == len(joint.floors) == 2
    assert all(a >= b - 1e-9 for a, b in zip(joint.errors, joint.floors, strict=True))


def test_joint_projection_of_values_is_a_stationary_point() -> None:
    heads = [sa.make_heads("clustered", n=24, d=4, rng=i)[0].astype(np.float64) for i in range(3)]
    fit = sa.fit_linformer(heads, 4, iterations=0)
    gradient, scale = np.zeros_like(fit.F), 0.0
    for head in heads:
        weights, matrix = dense_form(head, fit.E, fit.F)
        size = float(np.linalg.norm(head.output)) ** 2
        gradient += weights.T @ (matrix @ head.values - head.output) @ head.values.T / size
        scale += float(np.linalg.norm(weights.T @ head.output @ head.values.T)) / size
    assert np.linalg.norm(gradient) < 1e-6 * scale


# --- masks, lengths, causality ------------------------------------------------------------------


@pytest.mark.parametrize("projection", [*LINEAR, "max_pool"])
def test_masked_keys_do_not_matter(projection: str) -> None:
    problem = random_head()
    keep = np.random.default_rng(4).random(32) < 0.6
    method = sa.Linformer(8, projection)
    out = []
    for content in (0.0, 1e100, np.nan):
        k, v = problem.k.copy(), problem.values.copy()
        k[~keep], v[~keep] = content, content
        out.append(method.attend(sa.AttentionProblem(problem.q, k, v, key_mask=keep), 0))
    assert np.array_equal(out[0], out[1])
    assert np.array_equal(out[0], out[2])
    if projection != "max_pool":
        masked = sa.AttentionProblem(problem.q, problem.k, problem.values, key_mask=keep)
        assert not method.approximate(masked, 0).to_dense()[:, ~keep].any()


def test_padding_is_the_shorter_problem() -> None:
    problem = random_head(n_k=20)
    e, f = np.random.default_rng(0).standard_normal((2, 8, 32))
    short = given(e, f).attend(problem)
    assert np.abs(short - given(e[:, :20], f[:, :20]).attend(problem)).max() < 1e-12
    k, v = (
        np.concatenate([x, np.full((12, x.shape[1]), 1e30)]) for x in (problem.k, problem.values)
    )
    padded = sa.AttentionProblem(problem.q, k, v, key_mask=np.arange(32) < 20)
    assert np.abs(given(e, f).attend(padded) - short).max() < 1e-11
    with pytest.raises(ValueError, match=r"n_max >= n_k = 32, got \(8, 20\)"):
        given(e[:, :20]).approximate(padded)


def test_no_visible_key_gives_zeros() -> None:
    base = random_head()
    problem = sa.AttentionProblem(base.q, base.k, base.values, key_mask=np.zeros(32, bool))
    for projection in (*LINEAR, "max_pool"):
        out = sa.Linformer(8, projection).attend(problem, 0)
        assert out.shape == (20, 5)
        assert not out.any()


def test_causal_is_refused_because_of_leakage() -> None:
    problem = random_head(16, 16, causal=True)
    with pytest.raises(ValueError, match=r"every row of E K mixes all positions"):
        sa.Linformer(4).approximate(problem, 0)
    q, k, v = random_head(16, 16).arrays
    assert v is not None
    e = np.random.default_rng(0).standard_normal((4, 16))
    before = given(e).attend(sa.AttentionProblem(q, k, v))
    k, v = k.copy(), v.copy()
    k[-1] += 1
    v[-1] += 1
    after = given(e).attend(sa.AttentionProblem(q, k, v))
    assert np.abs(after[0] - before[0]).max() > 1e-2


# --- a stack --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sharing", "count"), [("none", 288), ("headwise", 24), ("kv", 12), ("layerwise", 1)]
)
def test_sharing(sharing: str, count: int) -> None:
    stack = sa.linformer_projections(12, 12, 16, 4, sharing, rng=0)
    every = [matrix for layer in stack for head in layer for matrix in head]
    assert len(every) == 288
    assert len({id(x) for x in every}) == count
    assert len({x.tobytes() for x in every}) == count
    for head in (stack[0][0], stack[5][7]):
        assert (head.E is head.F) == (sharing in ("kv", "layerwise"))
    assert np.array_equal(
        sa.linformer_projections(12, 12, 16, 4, sharing, rng=0)[3][2].F, stack[3][2].F
    )


def test_ranks_of_layers() -> None:
    ranks = rank_schedule(3, 8, 3)
    stack = sa.linformer_projections(3, 2, 16, ranks, "headwise", init="fairseq", rng=1)
    assert [layer[1].E.shape for layer in stack] == [(8, 16), (5, 16), (2, 16)]
    with pytest.raises(ValueError, match=r"^ranks must be equal with sharing='layerwise'"):
        sa.linformer_projections(3, 2, 16, ranks, "layerwise")
    with pytest.raises(ValueError, match=r"^ranks must hold one rank for each of the 3 layers"):
        sa.linformer_projections(3, 2, 16, [4, 4])


@pytest.mark.statistical
@pytest.mark.parametrize("init", list(INITIALISATIONS))
def test_isometry_factors(init: str, global_random_seed: int) -> None:
    # |z| <= 5 over 2000 trials: 6e-7 for a normal mean.
    r, n, trials = 8, 24, 2000
    x = np.cos(np.arange(24.0)) + 0.5
    rng = np.random.default_rng(global_random_seed)
    squares = np.array(
        [float(np.sum((initialise(init, r, n, rng) @ x) ** 2)) for _ in range(trials)]
    )
    squares /= float(x @ x)
    error = squares.std(ddof=1) / math.sqrt(trials)
    factor = INITIALISATIONS[init].factor(r, n)
    assert abs(squares.mean() - factor) <= 5 * error
    assert abs(squares.mean() - 1.1 * factor) > 5 * error or error > 0.02 * factor


def test_the_method_draws_its_initialisation() -> None:
    problem = random_head()
    draw = sa.Linformer(8, init="nystromformer").draw(problem, 0)
    assert draw["E"].shape == (8, 32)
    assert abs(draw["E"].std() - 0.02) < 0.005  # 256 numbers: five standard errors
    plain = sa.Linformer(8, scale="none").draw(problem, 0)
    scaled = sa.Linformer(8).draw(problem, 0)
    assert np.abs(plain["E"] / math.sqrt(8) - scaled["E"]).max() < 1e-12


def test_scales_of_pooling_and_of_given_rows() -> None:
    problem = random_head()
    sums = sa.Linformer(8, "mean_pool", scale="none").approximate(problem)
    assert isinstance(sums, ReducedAttention)
    assert np.array_equal(sums.projection.to_dense(np.float64), np.kron(np.eye(8), np.ones(4)))
    e = np.abs(np.random.default_rng(0).standard_normal((8, 32)))
    ahat = given(e, scale="average").approximate(problem)
    assert np.abs(ahat.row_sums() - 1).max() < 1e-12
    assert pool_starts(32, 8).tolist() == list(range(0, 33, 4))


# --- what is worth anything -----------------------------------------------------------------------


@pytest.mark.statistical
def test_order_of_errors(global_random_seed: int) -> None:
    # Independent normal Q, K, V, logits of variance 1; gaps are many times the spread of draws.
    n, d, r = 512, 64, 128
    rng = np.random.default_rng(global_random_seed)
    q, k, v = rng.standard_normal((3, n, d))
    problem = sa.AttentionProblem(q, k, v)
    a = problem.exact.to_dense()
    jl = float(np.mean([relative(sa.JL(r).approximate(problem, s), problem) for s in range(3)]))
    errors = [
        relative(sa.SVDFloor(r).approximate(problem), problem),
        relative(sa.Linformer(r, "mean_pool").approximate(problem), problem),
        relative(sa.VMean().approximate(problem), problem),
        1.0,
        jl,
        relative(sa.Linformer(r).approximate(problem, 0), problem),
    ]
    assert errors == sorted(errors)
    amm = float(np.sum(a * a)) * float(np.sum(v * v))
    predicted = math.sqrt((amm / float(np.sum(problem.output**2)) + 1) / r)
    assert abs(jl / predicted - 1) < 0.05


# --- refusals -----------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown projection": (
        {"projection": "gausian"}, ValueError,
        r"^projection must be a known name, got 'gausian'; did you mean 'gaussian'\?$",
    ),
    "projection type": ({"projection": 3}, TypeError, "^projection must be a string"),
    "layerwise": (
        {"sharing": "layerwise"}, ValueError, r"^sharing must be 'none' or 'kv' in one head",
    ),
    "unknown sharing": ({"sharing": "k"}, ValueError, "^sharing must be a known name, got 'k'"),
    "isometric means": (
        {"projection": "mean_pool", "scale": "isometry"}, ValueError,
        "^scale must be 'average' or 'none' for projection 'mean_pool', got 'isometry'",
    ),
    "average of a sketch": (
        {"scale": "average"}, ValueError, "^scale must be 'isometry' or 'none'",
    ),
    "init of a sketch": (
        {"projection": "srht", "init": "paper"}, ValueError,
        "^init must come with projection='gaussian'",
    ),
    "unknown init": ({"init": "papr"}, ValueError, "^init must be a known name"),
    "no matrix": ({"projection": "given"}, ValueError, "^E must be given"),
    "a matrix too many": ({"E": np.eye(8, 32)}, ValueError, "^E must be None"),
    "rank of a matrix": (
        {"projection": "given", "E": np.eye(4, 32)}, ValueError,
        r"^E must have shape \(rank, n_max\) with rank = 8",
    ),
    "F with kv": (
        {"projection": "given", "E": np.eye(8, 32), "F": np.eye(8, 32), "sharing": "kv"},
        ValueError, "^F must be None with sharing='kv'",
    ),
    "bias of a sketch": ({"block_bias": True}, ValueError, "^block_bias must be None or False"),
    "options of means": (
        {"projection": "mean_pool", "sketch_options": {"s": 2}}, ValueError,
        "^sketch_options must be None",
    ),
    "taps": (
        {"projection": "conv", "E": np.ones(3)}, ValueError, r"^E must have shape \(4,\)",
    ),
    "rank": ({"rank": 33}, ValueError, "^rank must be between 1 and n_k = 32, got 33"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    options, error, message = REFUSALS[case]
    method = sa.Linformer(**{"rank": 8, **options})
    with pytest.raises(error, match=message):
        method.attend(random_head(), 0)


def test_strides_that_do_not_divide_are_refused() -> None:
    problem = random_head(4, 512, 2, 2)
    method = sa.Linformer(100, "conv", E=np.ones(5))
    with pytest.raises(ValueError, match=r"a stride of int\(n_k/rank\) = 5 gives 102 rows"):
        method.approximate(problem)


def test_draws_are_validated() -> None:
    problem = random_head()
    method = sa.Linformer(8)
    with pytest.raises(ValueError, match=r"^draw\['E'\] must have shape \(rank, n_k\)"):
        method.approximate(problem, draw={"E": np.eye(8), "F": np.eye(8, 32)})
    with pytest.raises(ValueError, match="^draw must hold the arrays"):
        method.approximate(problem, draw={"E": np.eye(8, 32)})
    # Any matrices can stand for a structured draw.
    e = np.random.default_rng(0).standard_normal((8, 32))
    ahat = sa.Linformer(8, "srht").approximate(problem, draw={"E": e, "F": e})
    assert np.abs(ahat.to_dense() - dense_form(problem, e, e)[1]).max() < 1e-12
