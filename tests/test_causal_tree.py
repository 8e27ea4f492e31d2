"""The halving tree: mergers, exactness, what a row sees, and the published recursion in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from naive import naive_block_sample
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.operators.merging import merge_into, merge_shares, shares_of
from sketchattn.zoo.causal_tree import spans

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("one_thread")


def instance_g(causal: bool = True) -> sa.AttentionProblem:
    """Return the instance that the golden lines are about."""
    g = np.random.default_rng(0)
    q, k = g.standard_normal((64, 4)), g.standard_normal((64, 4))
    return sa.AttentionProblem(q, k, g.standard_normal((64, 3)), scale=0.5, causal=causal)


class BlockSample(sa.Method):
    """Attend to sorted blocks and eight sampled keys, whose lse merges; for the tree only."""

    name = "block_sample"
    draw_names = ("samples",)

    def __init__(self, align: str = "code") -> None:
        self.align = align

    @property
    def traits(self) -> sa.Traits:
        return sa.Traits(uses_rank=False, row_stochastic=True, nonnegative=True, logsumexp=True)

    def _draw(self, problem: sa.AttentionProblem, rng: np.random.Generator) -> sa.Draw:
        return sa.Draw(samples=np.floor(rng.random(8) * problem.n_k).astype(np.int64))

    def _made(self, problem: sa.AttentionProblem, draw: Mapping[str, Any]) -> tuple[Array, Array]:
        planes = np.random.default_rng(3).standard_normal((4, 7))
        return naive_block_sample(
            *problem.arrays[:2], problem.scale, planes, 8, draw["samples"], self.align
        )

    def _approximate(
        self, problem: sa.AttentionProblem, draw: Mapping[str, Any]
    ) -> sa.AttentionOperator:
        columns = np.arange(problem.n_k)
        return sa.SampledAttention(columns, self._made(problem, draw)[0], problem.n_k)

    def _attend_with_lse(
        self, problem: sa.AttentionProblem, draw: Mapping[str, Any]
    ) -> tuple[Array, Array]:
        weights, lse = self._made(problem, draw)
        return weights @ problem.values, lse


# --- mergers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "lse"),
    [
        (0.0, 40.0, 40.0 + np.log1p(np.exp(-40.0))),
        (0.0, -40.0, np.exp(-40.0)),
        (-np.inf, 3.5, 3.5),
        (3.5, -np.inf, 3.5),
        (800.0, -800.0, 800.0),
        (15.0, 0.0, 15.0 + np.log1p(np.exp(-15.0))),
        (-np.inf, -np.inf, -np.inf),
    ],
)
def test_mergers(first: float, second: float, lse: float) -> None:
    one, other, found = merge_shares(np.array([first]), np.array([second]))
    empty = lse == -np.inf
    assert found[0] == lse if empty else abs(found[0] - lse) <= 1e-14 * abs(lse)
    want = [0.0 if empty else np.exp(x - lse) for x in (first, second)]
    assert one[0] == pytest.approx(want[0], rel=1e-14, abs=1e-300)
    assert other[0] == pytest.approx(want[1], rel=1e-14, abs=1e-300)
    assert one[0] + other[0] == (0 if empty else pytest.approx(1, abs=1e-15))
    parts = [(slice(0, 1), np.array([x])) for x in (first, second)]
    for share, wanted in zip(shares_of(parts, 1), want, strict=True):
        assert share[0] == pytest.approx(wanted, rel=1e-14, abs=1e-300)
    # The released merger subtracts ln(c + machine epsilon) and saturates at 15.9 above the first.
    gap = second - first
    released = first - np.log(1 / (1 + np.exp(min(gap, 700.0))) + np.finfo(np.float32).eps)
    if gap >= 20:
        assert abs(released - lse) > 4


def test_merging_parts_one_after_another() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, 4)) for n in (9, 30, 30))
    out, lse = np.zeros((9, 4)), np.full(9, -np.inf)
    for keys in np.split(np.arange(30), [3, 4, 17]):
        part = sa.AttentionProblem(q, k[keys], v[keys])
        merge_into(out, lse, slice(0, 9), part.output, part.logsumexp)
    whole = sa.AttentionProblem(q, k, v)
    assert np.abs(out - whole.output).max() <= 1e-14
    assert np.abs(lse - whole.logsumexp).max() <= 1e-14


# --- the tree -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 16, 31, 64, 100])
@pytest.mark.parametrize("leaf", [1, 3, 16])
def test_every_entry_below_the_diagonal_is_in_one_block(n: int, leaf: int) -> None:
    count = np.zeros((n, n), int)
    for start, middle, stop in spans(0, n, leaf):
        if middle == start:
            assert stop - start <= leaf
            count[start:stop, start:stop] += np.tril(np.ones((stop - start,) * 2, int))
        else:
            count[middle:stop, start:middle] += 1
    assert np.array_equal(count, np.tril(np.ones((n, n), int)))


MASKS: list[dict[str, Any]] = [
    {"causal": True},
    {"causal": True, "key_mask": np.arange(64) % 5 != 2},
    {"causal": True, "key_mask": np.arange(64) >= 40},
    {"causal": True, "key_mask": np.zeros(64, bool)},
]


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("leaf", [1, 7, 16, 64])
def test_exact_blocks_make_exact_attention(leaf: int, options: dict[str, Any]) -> None:
    problem = sa.AttentionProblem(*instance_g(), scale=0.5, **options)
    method = sa.CausalTree(1, inner="exact", leaf=leaf)
    output, lse = method.attend_with_lse(problem)
    ahat = method.approximate(problem)
    assert np.abs(output - problem.output).max() <= 1e-12
    seen = problem.logsumexp > -np.inf
    assert np.array_equal(lse > -np.inf, seen)
    assert np.abs(lse[seen] - problem.logsumexp[seen]).max(initial=0.0) <= 1e-12
    assert np.abs(ahat.to_dense() - problem.exact.to_dense()).max() <= 1e-12
    assert np.abs(ahat.T @ problem.q - problem.exact.T @ problem.q).max() <= 1e-12


def test_a_tree_of_one_leaf_says_that_it_is_exact() -> None:
    problem = instance_g()
    for leaf, path in ((64, "exact"), (1000, "exact"), (63, "sketch")):
        method = sa.CausalTree(4, leaf=leaf)
        assert method.approximate(problem, rng=0).path == path
        assert (len(method.draw(problem, rng=0)) == 0) == (path == "exact")
    assert np.array_equal(sa.CausalTree(4, leaf=64).attend(problem, rng=0), problem.output)


@pytest.mark.parametrize("n_q", [64, 40, 1])
def test_queries_at_the_end_of_the_keys(n_q: int) -> None:
    q, k, v = instance_g().arrays
    assert v is not None
    problem = sa.AttentionProblem(q[64 - n_q :], k, v, scale=0.5, causal="bottom-right")
    exact = sa.CausalTree(64, inner="exact", leaf=8).attend(problem)
    assert np.abs(exact - problem.output).max() <= 1e-12
    method = sa.CausalTree(64, inner="uniform", leaf=8)
    assert np.abs(method.attend(problem, rng=0) - problem.output).max() <= 1e-12
    names = list(method.draw(problem, rng=0))
    assert (names[:1] == ["columns[prefix]"]) == (n_q < 64)


@pytest.mark.parametrize("leaf", [1, 8, 50])
@pytest.mark.parametrize("alignment", ["top-left", "bottom-right"])
def test_every_alignment_is_exact_with_exact_blocks(alignment: Any, leaf: int) -> None:
    q, k, v = instance_g().arrays
    assert v is not None
    mask = np.arange(64) % 7 != 0
    for rows, keys in ((40, 64), (64, 30), (64, 1), (1, 64)):
        problem = sa.AttentionProblem(
            q[:rows], k[:keys], v[:keys], causal=alignment, key_mask=mask[:keys]
        )
        seen = problem.logsumexp > -np.inf
        for method in (
            sa.CausalTree(keys, inner="exact", leaf=leaf),
            sa.StreamHalving(keys, block=leaf),
        ):
            out, lse = method.attend_with_lse(problem, 0)
            dense = method.approximate(problem, 0).to_dense()
            assert np.abs(dense @ problem.values - out).max() <= 1e-12
            assert np.abs(dense.sum(axis=1) - seen).max() <= 1e-12
            assert not dense[~problem.visible()].any()
            assert np.array_equal(lse > -np.inf, seen)
            if isinstance(method, sa.CausalTree) or leaf == 1:  # larger blocks need room in a cache
                assert np.abs(out - problem.output).max() <= 1e-12
                assert np.abs(lse[seen] - problem.logsumexp[seen]).max(initial=0.0) <= 1e-12


@pytest.mark.parametrize(
    ("inner", "text"),
    [
        ("svd", "inner must know the normaliser of its rows, got 'svd'"),
        (sa.VMean(), "inner must know the normaliser of its rows, got VMean()"),
    ],
)
def test_inner_methods_without_a_normaliser_are_refused(inner: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("(", r"\(").replace(")", r"\)")):
        sa.CausalTree(4, inner=inner).attend(instance_g(), rng=0)


def test_leaf_must_be_positive() -> None:
    with pytest.raises(ValueError, match="leaf must be"):
        sa.CausalTree(4, leaf=0).attend(instance_g(), rng=0)


def test_draws_are_independent_of_their_neighbours() -> None:
    problem = instance_g()
    draw = sa.CausalTree(4, inner="uniform", leaf=8).draw(problem, rng=0)
    assert len({tuple(x.tolist()) for x in draw.values()}) == len(draw) == 7
    coarse = sa.CausalTree(4, inner="uniform", leaf=32).draw(problem, rng=0)
    assert np.array_equal(coarse["columns[0:64]"], draw["columns[0:64]"])


# First uniforms in preorder; the lse of the last row stands in 4.3931846904 exactly.
GOLDEN = {
    ("rank", 16): (0.4662036942, 6.0419594735, 4.3812807927),
    ("code", 16): (0.4441037907, 5.9371920136, 4.3812807927),
    ("rank", 32): (0.4208940196, None, 4.4726617547),
    ("rank", 64): (0.0, None, 4.3931846904),
}


@pytest.mark.parametrize(("align", "leaf"), GOLDEN)
def test_golden_lines(align: str, leaf: int) -> None:
    problem = instance_g()
    method = sa.CausalTree(64, inner=BlockSample(align), leaf=leaf)
    uniforms = np.random.default_rng(9)
    draw = {}
    for start, middle, stop in spans(0, 64, leaf):
        if middle > start:
            draw[f"samples[{start}:{stop}]"] = np.floor(
                uniforms.random(8) * (middle - start)
            ).astype(np.int64)
    output, lse = method.attend_with_lse(problem, draw=draw)
    relative, size, last = GOLDEN[align, leaf]
    norm = np.linalg.norm(problem.output)
    assert np.linalg.norm(output - problem.output) / norm == pytest.approx(relative, abs=1e-8)
    assert lse[63] == pytest.approx(last, abs=1e-8)
    if size is not None:
        assert np.linalg.norm(output) == pytest.approx(size, abs=1e-8)
    dense = method.approximate(problem, draw=draw).to_dense()
    assert np.abs(dense @ problem.values - output).max() <= 1e-12


def moved_rows(method: sa.Method, causal: bool = True) -> float:
    """Return how far rows before a token move when its query, key and value change."""
    problem, far = instance_g(causal), 0.0
    before = method.attend(problem, rng=1)
    for token in (63, 40, 17):
        changed = [np.array(x) for x in problem]
        for x in changed:
            x[token] = 2 - 3 * x[token]
        after = method.attend(sa.AttentionProblem(*changed, scale=0.5, causal=causal), rng=1)
        far = max(far, float(np.abs(after - before)[:token].max()))
    return far


def test_rows_do_not_move_with_later_tokens() -> None:
    assert moved_rows(sa.CausalTree(4, leaf=8)) == 0.0
    assert moved_rows(sa.CausalTree(4, inner=BlockSample("code"), leaf=16)) == 0.0
    # Blocks by the rank of a query among queries move rows: the probe sees it.
    assert moved_rows(sa.CausalTree(4, inner=BlockSample("rank"), leaf=16)) > 0.1


def test_attention_returns_the_normalisers_of_a_method() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, 20, 4)).astype(np.float32) for _ in range(3))
    method = sa.CausalTree(20, leaf=4)
    for causal in (False, True):
        out, lse = sa.attention(q, k, v, method, rng=0, causal=causal, return_lse=True)
        want, wanted = sa.attention(q, k, v, causal=causal, return_lse=True)
        assert np.asarray(lse).shape == wanted.shape == (2, 3, 20)
        assert lse.dtype == wanted.dtype
        assert np.abs(lse - wanted).max() <= 1e-5
        assert np.array_equal(out, sa.attention(q, k, v, method, rng=0, causal=causal))
        assert np.abs(out - want).max() <= 1e-5
    # Few keys give other normalisers than the exact ones, for each head its own.
    few, lse = sa.attention(q, k, v, "uniform", rank=3, rng=0, return_lse=True)
    assert np.array_equal(few, sa.attention(q, k, v, "uniform", rank=3, rng=0))
    assert np.abs(lse - wanted).max() > 0.01
    empty = sa.attention(q, k[..., :0, :], v[..., :0, :], "uniform", rank=1, return_lse=True)[1]
    assert np.all(empty == -np.inf)
