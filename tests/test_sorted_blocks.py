"""HyperAttention and KDEformer: known numbers, Gray order, blocks, samples, and what is refused."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from method_cases import dense_attention, make_problem, rounding
from naive import naive_gray_position, naive_sorted_blocks, naive_weighted_blocks
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.operators.steep import steep_rows
from sketchattn.theory.training_free.blocks import alpha_kappa, normalizer_variance
from sketchattn.zoo.sorted_blocks.laws import LAWS, key_probabilities
from sketchattn.zoo.sorted_blocks.layout import (
    Sample,
    gray_positions,
    hash_codes,
    sort_blocks,
    weighted_sample,
)
from sketchattn.zoo.sorted_blocks.passes import table
from sketchattn.zoo.sorted_blocks.published import approximate_normalizers, split_sums

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("one_thread")


def golden(**options: Any) -> sa.AttentionProblem:
    """Return 64 Gaussian queries, keys and values."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((64, d)) for d in (4, 4, 3))
    return sa.AttentionProblem(q, k, v, **options)


PLANES = np.random.default_rng(3).standard_normal((4, 7))
DRAWN = np.array([46, 60, 56, 32, 60, 62, 62, 5])


def middle(drawn: Array, n: int) -> Array:
    """Return numbers that draw these of n keys."""
    found: Array = (drawn + 0.5) / n
    return found


def error(found: Array, problem: sa.AttentionProblem) -> float:
    return float(np.linalg.norm(found - problem.output) / np.linalg.norm(problem.output))


def blocks_of(problem: sa.AttentionProblem, align: str, order: str = "inverse") -> Any:
    return sort_blocks(problem.q, problem.k, PLANES, 8, order=order, align=align)


# --- known numbers ------------------------------------------------------------------------------

HYPER: list[tuple[dict[str, Any], tuple[float, ...]]] = [
    (
        {"align": "rank"},
        (2.7798540116, 9.3085095691, -0.5057704081, 1.1656306082, 4.0727932831),
    ),
    ({}, (2.6643800455, 9.0756453991)),
    (
        {"preset": "released"},
        (1.8336996092, 5.5774254305, -0.2291737340, -0.0720256713, 4.3166578237),
    ),
]
KDE: list[tuple[dict[str, Any], tuple[float, ...]]] = [
    ({"preset": "released"}, (2.4142095839, 7.9668861549, 0.0618087781, 0.5897093436)),
    ({"align": "rank"}, (1.5965049834, 5.6102449303)),
    ({"preset": "paper"}, (2.6220489635, 7.5709178533)),
]
GOLDEN: list[tuple[Any, Array, dict[str, Any], tuple[float, ...]]]
GOLDEN = [(sa.HyperAttention, middle(DRAWN, 64), *x) for x in HYPER]
GOLDEN += [(sa.KDEformer, np.random.default_rng(5).random(8), *x) for x in KDE]


@pytest.mark.parametrize(("kind", "uniforms", "options", "numbers"), GOLDEN)
def test_known_outputs(
    kind: Any, uniforms: Array, options: dict[str, Any], numbers: tuple[float, ...]
) -> None:
    problem, method = golden(), kind(rank=16, **options)
    draw = {"planes": PLANES, "uniforms": uniforms}
    out, lse = method.attend_with_lse(problem, draw=draw)
    found = [error(out, problem), np.linalg.norm(out), out[0, 0], out[63, 2], lse[0]]
    assert found[: len(numbers)] == pytest.approx(numbers, abs=1e-8)
    assert method.approximate(problem, draw=draw) @ problem.values == pytest.approx(out, abs=1e-12)
    assert np.array_equal(method.attend(problem, draw=draw), out)


def test_known_samples_and_blocks() -> None:
    assert np.random.default_rng(4).integers(0, 64, 8).tolist() == DRAWN.tolist()
    drawn = weighted_sample(middle(DRAWN, 64), None, 64)
    assert drawn.columns.tolist() == [5, 32, 46, 56, 60, 62]
    assert drawn.weights.tolist() == [8, 8, 8, 8, 16, 16]
    problem = golden()
    for order, start in (("inverse", [32, 91, 83, 115, 93, 54]), ("forward", [40, 77, 71, 111])):
        found = gray_positions(hash_codes(problem.q, PLANES), order)
        assert found[: len(start)].tolist() == start
    rank, code = blocks_of(problem, "rank"), blocks_of(problem, "code")
    assert rank.keys[:12].tolist() == [4, 7, 1, 5, 4, 3, 0, 7, 7, 2, 4, 1]
    assert rank.queries[:8].tolist() == [1, 5, 4, 7, 5, 3, 0, 7]
    assert code.queries[:8].tolist() == [1, 5, 4, 7, 5, 2, 0, 7]
    p = key_probabilities(problem, "kde_released")
    assert p is not None
    assert p[0] == pytest.approx(0.0147357459, abs=1e-10)
    p = key_probabilities(problem, "oracle")
    assert p is not None
    assert p[0] == pytest.approx(0.0193823336, abs=1e-10)


def test_known_variance_mass_and_assumptions() -> None:
    problem = golden()
    a, d = problem.exact.to_dense(), np.exp(problem.logsumexp)
    blocks = blocks_of(problem, "rank")
    outside = blocks.queries[:, None] != blocks.keys
    variance = normalizer_variance(a, outside, np.full(64, 1 / 64), 8)
    assert variance[0] * d[0] ** 2 == pytest.approx(105.4651997977, abs=1e-8)
    for order, align, mass in (
        ("inverse", "rank", 0.2180946579),
        ("inverse", "code", 0.2412832561),
        ("forward", "rank", 0.1870978813),
    ):
        made = blocks_of(problem, align, order)
        own = made.queries[:, None] == made.keys
        assert (a * own).sum(axis=1).mean() == pytest.approx(mass, abs=1e-9)
    assert alpha_kappa(problem) == pytest.approx((42.0683110528, 15.5905129848), abs=1e-8)
    found = alpha_kappa(problem, blocks.queries, blocks.keys)
    assert found.kappa == pytest.approx(12.4854579467, abs=1e-8)


def test_the_published_algorithm() -> None:
    problem = golden()
    rng = np.random.default_rng(14)
    rows, columns = rng.choice(64, 8, replace=False), rng.integers(0, 64, 8)
    draw = {
        "planes": PLANES,
        "rows": rows,
        "uniforms": middle(columns, 64),
        "value_uniforms": rng.random(8),
    }
    method = sa.HyperAttention(rank=16, preset="paper")
    out = method.attend(problem, draw=draw)
    assert error(out, problem) == pytest.approx(10.6281362247, abs=1e-8)
    blocks = blocks_of(problem, "rank")
    drawn = weighted_sample(draw["uniforms"], None, 64)
    found = np.exp(approximate_normalizers(problem, blocks, rows, drawn, 8))
    assert found[0] == pytest.approx(19.0295184176, abs=1e-8)
    on, off = split_sums(problem, blocks)
    assert np.logaddexp(on, off) == pytest.approx(problem.logsumexp, abs=1e-12)
    assert np.exp(problem.logsumexp[0]) == pytest.approx(62.9807838809, abs=1e-8)
    traits = method.traits
    assert traits.oracle
    assert not any([traits.causal, traits.row_stochastic, traits.logsumexp])
    # Of one block nothing is off it.
    whole = sort_blocks(problem.q, problem.k, PLANES, 64, order="inverse", align="rank")
    exact = approximate_normalizers(problem, whole, rows, drawn, 8)
    assert exact == pytest.approx(problem.logsumexp, abs=1e-12)
    # Normalisers that miss the largest logits by thousands leave no number.
    large = sa.AttentionProblem(100 * problem.q, 100 * problem.k, problem.values)
    with pytest.raises(ValueError, match=r"^weights of the published estimate must be finite in f"):
        method.attend(large, draw=draw)


def causal_draw(method: sa.HyperAttention, problem: sa.AttentionProblem) -> sa.Draw:
    """Return the known planes, and numbers that go on from block to block."""
    rng = np.random.default_rng(9)
    return sa.Draw(
        {
            name: PLANES if name.startswith("planes") else rng.random(x.shape)
            for name, x in method.draw(problem, rng=0).items()
        }
    )


@pytest.mark.parametrize(
    ("align", "leaf", "numbers"),
    [
        ("rank", 16, (0.4662036942, 6.0419594735, 4.3812807927)),
        ("code", 16, (0.4441037907, 5.9371920136, 4.3812807927)),
        ("rank", 32, (0.4208940196, None, 4.4726617547)),
        ("rank", 64, (0.0, None, 4.3931846904)),
    ],
)
def test_known_causal_outputs(align: str, leaf: int, numbers: tuple[float, ...]) -> None:
    problem = golden(causal=True)
    method = sa.HyperAttention(16, block=8, sample=8, align=align, leaf=leaf)
    draw = causal_draw(method, problem)
    firsts = [x[0] for name, x in draw.items() if name.startswith("uniforms")]
    if leaf == 16:
        assert len(firsts) == 3
        assert firsts[:2] == pytest.approx([0.8702492, 0.0265877], abs=1e-7)
    out, lse = method.attend_with_lse(problem, draw=draw)
    found = [error(out, problem), np.linalg.norm(out), lse[63]]
    for x, wanted in zip(found, numbers, strict=True):
        assert wanted is None or x == pytest.approx(wanted, abs=1e-8)
    ahat = method.approximate(problem, draw=draw)
    assert ahat @ problem.values == pytest.approx(out, abs=1e-12)
    assert ahat.path == ("exact" if leaf == 64 else "sketch")


# --- Gray order ---------------------------------------------------------------------------------


def distances(planes: int, order: str) -> Array:
    """Return in how many bits codes at neighbouring positions differ."""
    codes = np.arange(2**planes)
    by_place = np.argsort(gray_positions(codes, order), kind="stable")
    return np.array([int(x).bit_count() for x in by_place[1:] ^ by_place[:-1]])


@pytest.mark.parametrize("planes", range(1, 13))
def test_neighbours_in_the_inverse_order_differ_in_one_bit(planes: int) -> None:
    assert (distances(planes, "inverse") == 1).all()
    assert ((distances(planes, "forward") == 1).all()) == (planes < 3)


@pytest.mark.parametrize(
    ("planes", "mean", "most", "share"), [(7, 1.307, 4, 0.244), (10, 1.328, 5, 0.249)]
)
def test_how_far_the_forward_order_jumps(planes: int, mean: float, most: int, share: float) -> None:
    found = distances(planes, "forward")
    assert found.mean() == pytest.approx(mean, abs=5e-4)
    assert found.max() == most
    assert np.mean(found > 1) == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("order", ["inverse", "forward"])
def test_positions_are_those_of_the_reflected_sequence(order: str) -> None:
    found = gray_positions(np.arange(32), order).tolist()
    assert found == [naive_gray_position(code, 5, order) for code in range(32)]
    # The last shift of the prefix matters for long codes only.
    code = np.array([(1 << 61) + 5])
    assert gray_positions(gray_positions(code, "inverse"), "forward") == code


# --- blocks -------------------------------------------------------------------------------------

SHAPES = [(13, 13, 4), (7, 17, 5), (19, 9, 2), (5, 30, 30), (40, 33, 7), (1, 6, 1), (6, 1, 1)]


@pytest.mark.parametrize("align", ["rank", "code"])
@pytest.mark.parametrize("order", ["inverse", "forward"])
@pytest.mark.parametrize("planes", [0, 1, 3, 7])
def test_blocks_by_loops(planes: int, order: str, align: str) -> None:
    for n_q, n_k, size in SHAPES:
        rng = np.random.default_rng(n_q)
        q, k, w = (rng.standard_normal(s) for s in ((n_q, 4), (n_k, 4), (4, planes)))
        k[::3] = k[0]
        found = sort_blocks(q, k, w, size, order=order, align=align)
        wanted = naive_sorted_blocks(q, k, w, size, order=order, align=align)
        assert [x.tolist() for x in (found.sorted_keys, found.queries, found.keys)] == list(wanted)
        assert found.number == math.ceil(n_k / size)
    # Without planes both stay in their order.
    if planes == 0:
        assert found.sorted_keys.tolist() == list(range(n_k))


def test_float32_has_the_blocks_of_the_same_numbers_in_float64() -> None:
    problem = make_problem(200, 300, np.float32)
    w = np.random.default_rng(1).standard_normal((4, 7))
    found = [
        sort_blocks(x.q, x.k, w, 16, order="inverse", align="code")
        for x in (problem, problem.astype(np.float64))
    ]
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)


# --- the formula --------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"align": "rank", "order": "forward"},
    {"mask_overlap": False},
    {"planes": 0},
    {"sample": 0},
    {"probabilities": "value"},
    {"probabilities": "kde_released", "planes": 2},
    {"probabilities": "oracle"},
    {"block": 1, "sample": 9},
]
PROBLEMS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "square": (13, 13, {}),
    "wide": (7, 17, {}),
    "tall": (90, 9, {}),
    "masked": (13, 14, {"key_mask": np.arange(14) % 3 > 0}),
    "scale": (13, 13, {"scale": -0.3}),
    "long": (70, 65, {}),
}


@pytest.mark.parametrize("shape", PROBLEMS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_formula_by_loops(options: dict[str, Any], shape: str) -> None:
    n_q, n_k, others = PROBLEMS[shape]
    problem = make_problem(n_q, n_k, **others)
    method = sa.HyperAttention(rank=6, **options)
    draw = method.draw(problem, rng=2)
    kept = problem.kept_keys
    part = sa.AttentionProblem(
        problem.q, problem.k[kept], problem.values[kept], scale=problem.scale
    )
    size = method.block or 3
    _, of_query, of_key = naive_sorted_blocks(
        part.q, part.k, draw["planes"], size, order=method.order, align=method.align
    )
    p = key_probabilities(part, method.probabilities)
    p = np.full(len(kept), 1 / len(kept)) if p is None else p
    assert p.sum() == pytest.approx(1.0)
    drawn = [next(j for j in range(len(p)) if p[: j + 1].sum() > u) for u in draw["uniforms"]]
    logits = part.scale * part.q @ part.k.T
    a, normalizer = naive_weighted_blocks(logits, of_query, of_key, drawn, p, method.mask_overlap)
    ahat = method.approximate(problem, draw=draw)
    dense = ahat.to_dense()
    allowed = rounding(problem)
    assert np.abs(dense[:, kept] - a).max() <= allowed
    assert np.all(np.delete(dense, kept, axis=1) == 0)
    out, lse = method.attend_with_lse(problem, draw=draw)
    assert lse == pytest.approx(normalizer, abs=allowed)
    assert np.abs(out - a @ part.values).max() <= allowed * np.abs(part.values).max()
    assert ahat.effective_rank == min(size + len(set(drawn)), len(kept))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [sa.HyperAttention, sa.KDEformer])
def test_no_key_is_appended(kind: Any, dtype: Any) -> None:
    """Zero keys would add to the normalisers of the last block, and values of one would shrink."""
    for n_q, n_k in ((13, 13), (5, 17), (50, 11)):
        plain = make_problem(n_q, n_k, dtype)
        problem = sa.AttentionProblem(plain.q, plain.k - 3, np.ones((n_k, 2), dtype))
        for options in ({}, {"preset": "released"}, {"planes": 0}):
            out = kind(rank=5, **options).attend(problem, rng=0)
            assert np.abs(out - 1).max() <= 16 * np.finfo(dtype).eps


def test_shapes_at_the_edge() -> None:
    plain = make_problem(9, 11)
    for method in (sa.HyperAttention(4), sa.HyperAttention(4, preset="released"), sa.KDEformer(4)):
        bare = sa.AttentionProblem(plain.q, plain.k, np.empty((11, 0)))
        assert method.attend(bare, rng=0).shape == (9, 0)
        none = sa.AttentionProblem(plain.q[:0], plain.k, plain.values)
        assert method.attend(none, rng=0).shape == (0, 3)
        assert method.approximate(none, rng=0).shape == (0, 11)
        masked = make_problem(9, 11, key_mask=np.zeros(11, bool))
        out, lse = method.attend_with_lse(masked, rng=0)
        assert not out.any()
        assert np.isneginf(lse).all()
        wide = sa.AttentionProblem(plain.q, plain.k, np.ones((11, 300)))
        assert method.attend(wide, rng=0) == pytest.approx(1.0)


def test_where_it_is_exact_it_says_so() -> None:
    problem = make_problem(12, 10)
    whole: list[sa.Method] = [
        sa.HyperAttention(10),
        sa.KDEformer(2, block=10, sample=3),
        sa.HyperAttention(4, exact_below=13),
        sa.HyperAttention(4, preset="released", exact_below=4096),
    ]
    for method in whole:
        assert method.approximate(problem, rng=0).path == "exact"
        out, lse = method.attend_with_lse(problem, rng=0)
        assert np.array_equal(out, problem.output)
        assert np.array_equal(lse, problem.logsumexp)
    for method in (
        sa.HyperAttention(9),
        sa.KDEformer(10, block=9),
        sa.HyperAttention(4, exact_below=12),
        sa.HyperAttention(4, preset="released"),
    ):
        assert method.approximate(problem, rng=0).path == "sketch"


def test_presets_are_what_they_say() -> None:
    problem = golden()
    draws = {"planes": PLANES, "uniforms": middle(DRAWN, 64)}
    for kind in (sa.HyperAttention, sa.KDEformer):
        presets = [None, "released"] + (["paper"] if kind is sa.KDEformer else [])
        found = [kind(16, preset=x).attend(problem, draw=draws) for x in presets]
        for i, one in enumerate(found):
            assert all(np.abs(one - x).max() > 1e-3 for x in found[:i])
    with pytest.raises(ValueError, match=r"^align must be left at 'code' with preset 'released'"):
        sa.KDEformer(4, order="forward", align="other", preset="released").draw(problem)
    assert sa.KDEformer(4, preset="paper").traits.oracle


# --- samples ------------------------------------------------------------------------------------


def dense_weights(blocks: Any, sample: Sample, mask_overlap: bool) -> Array:
    """Return the weight of every key for every query."""
    read = table(blocks, sample, mask_overlap)
    weights = np.zeros((blocks.number, len(blocks.keys)))
    for c in range(blocks.number):
        np.add.at(weights[c], read.columns[c], np.exp(read.log_weights[c]))
    return np.asarray(weights[blocks.queries])


def normalizers(p: Array | None, mask_overlap: bool, rng: np.random.Generator) -> Array:
    """Return ``Dhat/D`` of 2000 draws of eight keys, (2000, 64)."""
    problem = golden()
    blocks = blocks_of(problem, "rank", "inverse" if mask_overlap else "forward")
    a = problem.exact.to_dense()
    found = []
    for _ in range(2000):
        weights = dense_weights(blocks, weighted_sample(rng.random(8), p, 64), mask_overlap)
        found.append((weights * a).sum(axis=1))
    return np.array(found)


@pytest.mark.statistical
@pytest.mark.parametrize("law", LAWS)
def test_normalizers_are_unbiased_with_a_known_variance(law: str, global_random_seed: int) -> None:
    problem = golden()
    p = key_probabilities(problem, law)
    found = normalizers(p, True, np.random.default_rng(global_random_seed))
    p = np.full(64, 1 / 64) if p is None else p
    blocks = blocks_of(problem, "rank")
    outside = blocks.queries[:, None] != blocks.keys
    theory = normalizer_variance(problem.exact.to_dense(), outside, p, 8)
    # Four standard errors of a mean over rows, bounded by the root mean variance of a row.
    assert abs(found.mean() - 1) <= 4 * math.sqrt(theory.mean() / 2000)
    assert found.var(axis=0).mean() / theory.mean() == pytest.approx(1.0, abs=0.1)


def test_released_codes_count_keys_of_the_block_twice() -> None:
    found = normalizers(None, False, np.random.default_rng(0))
    # One and the mass on the block; 0.004 is the standard error of 2000 draws.
    assert found.mean() == pytest.approx(1.187, abs=0.016)
    assert abs(found.mean() - 1) > 0.1


# --- sizes of logits ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [sa.HyperAttention, sa.KDEformer])
def test_large_logits(kind: Any, dtype: Any) -> None:
    plain = golden()
    q, k, v = (x.astype(dtype) for x in (plain.q, plain.k, plain.values))
    for factor in (10, 30, 100):
        problem = sa.AttentionProblem(factor * q, factor * k, v)
        assert (len(steep_rows(problem)) > 0) == (factor > 10)
        for options in ({}, {"preset": "released"}):
            method = kind(16, **options)
            draw = method.draw(problem, rng=0)
            out, lse = method.attend_with_lse(problem, draw=draw)
            wide = method.approximate(problem.astype(np.float64), draw=draw)
            assert np.isfinite(out).all()
            assert np.isfinite(lse).all()
            # Logits are rounded in the precision of the problem below STEEP.
            allowed = 2 * rounding(problem) if factor < 100 else 64 * np.finfo(dtype).eps
            assert np.abs(out - wide @ plain.values).max() <= allowed * np.abs(v).max()


def test_two_heads_are_two_heads() -> None:
    heads = [make_problem(40, 40, seed=s) for s in range(2)]
    for method in (sa.HyperAttention(8), sa.KDEformer(8, preset="released")):
        both = method.attend_heads(heads, [1, 2])
        for i, head in enumerate(heads):
            assert np.array_equal(both[i], method.attend(head, rng=i + 1))


# --- causal -------------------------------------------------------------------------------------


def moved(problem: sa.AttentionProblem, cut: int) -> sa.AttentionProblem:
    """Return a problem with other queries, keys and values from a token on."""
    q, k, v = (np.array(x) for x in problem)
    for x in (q, k, v):
        x[cut:] = 3 - 2 * x[cut:]
    return sa.AttentionProblem(q, k, v, causal=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_later_tokens_do_not_change_a_bit(dtype: Any) -> None:
    problem = golden(causal=True).astype(dtype)
    for method in (sa.HyperAttention(16, leaf=8), sa.KDEformer(16, leaf=8)):
        draw = method.draw(problem, rng=0)
        first = method.attend(problem, draw=draw)
        assert method.traits.autoregressive
        for cut in (1, 20, 40, 63):
            other = method.attend(moved(problem, cut), draw=draw)
            assert np.array_equal(first[:cut], other[:cut])
            assert not np.array_equal(first[cut:], other[cut:])


def test_ranks_leak_later_queries() -> None:
    problem = golden(causal=True)
    method = sa.HyperAttention(16, block=8, sample=8, align="rank", leaf=16)
    assert not method.traits.autoregressive
    draw = causal_draw(method, problem)
    q = np.array(problem.q)
    q[63] = -3 * q[63] + 1
    changed = sa.AttentionProblem(q, problem.k, problem.v, causal=True)
    first, other = (method.attend(x, draw=draw) for x in (problem, changed))
    assert np.abs(first - other)[:63].max() > 0.1


def test_causal_keys_that_are_masked() -> None:
    mask = np.arange(40) % 4 != 1
    problem = make_problem(40, 40, causal=True, key_mask=mask)
    method = sa.HyperAttention(8, leaf=8)
    ahat = method.approximate(problem, rng=0).to_dense()
    assert np.all(ahat[~problem.visible()] == 0)
    assert ahat.sum(axis=1)[problem.visible().any(axis=1)] == pytest.approx(1.0)
    exact = sa.HyperAttention(8, leaf=40).approximate(problem, rng=0).to_dense()
    assert np.abs(exact - dense_attention(problem)).max() <= rounding(problem)


# --- real heads ---------------------------------------------------------------------------------


def test_errors_on_bundled_heads() -> None:
    found = [
        error(sa.HyperAttention(64).attend(head, rng=seed), head)
        for head in sa.load_heads()
        for seed in range(5)
    ]
    # Zero has the error one, the mean of V .80.
    assert 0.90 <= float(np.median(found)) < 1.0


# --- what is refused ----------------------------------------------------------------------------


def test_refusals() -> None:
    problem = golden()
    bare = sa.AttentionProblem(problem.q, problem.k)
    draw = {"planes": PLANES, "uniforms": np.full(8, 0.5)}
    refused: list[tuple[sa.Method, dict[str, Any], str]] = [
        (sa.HyperAttention(16, block=0), {}, "block must be at least 1, got 0"),
        (sa.HyperAttention(16, sample=-1), {}, "sample must be at least 0, got -1"),
        (sa.HyperAttention(16, planes=63), {}, "planes must be between 0 and MOST_PLANES = 62"),
        (sa.HyperAttention(16, exact_below=-1), {}, "exact_below must be at least 0"),
        (sa.KDEformer(16, leaf=0), {}, "leaf must be at least 1"),
        (sa.KDEformer(16, probabilities="norm"), {}, "probabilities must be"),
        (sa.KDEformer(16, align="ranks"), {}, "align must be"),
        (sa.KDEformer(16, order="gray"), {}, "order must be"),
        (sa.KDEformer(16, preset="published"), {}, "preset must be a known name"),
        (sa.HyperAttention(16), draw | {"uniforms": np.full(8, 1.0)}, "uniforms must be at least"),
        (sa.HyperAttention(16), draw | {"uniforms": np.full(7, 0.5)}, "uniforms must have shape"),
        (sa.HyperAttention(16), draw | {"planes": PLANES[:3]}, "planes must have shape"),
        (sa.HyperAttention(16), {"planes": PLANES}, "draw must hold the arrays"),
        (
            sa.HyperAttention(16, preset="paper"),
            draw | {"rows": np.array([64]), "value_uniforms": np.full(8, 0.5)},
            "rows must be in 0..n_q - 1 = 63",
        ),
    ]
    for method, given, text in refused:
        with pytest.raises(ValueError, match="^" + re.escape(text)) as found:
            method.approximate(problem, **({"draw": given} if given else {"rng": 0}))
        assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match=r"^v must be given for an output, got None"):
        sa.KDEformer(16).approximate(bare, rng=0)
    assert sa.HyperAttention(16).approximate(bare, rng=0).shape == (64, 64)
    rows = {"rows": np.zeros(2), "value_uniforms": np.full(8, 0.5)}
    with pytest.raises(TypeError, match=r"^rows must be a one-dimensional integer array"):
        sa.HyperAttention(16, preset="paper").approximate(problem, draw=draw | rows)
